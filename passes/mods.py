"""Score and mask functions of a flex_attention call, read as expressions over (b, h, i, j)."""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from attncomp.expr import Expr, Load
from attncomp.passes.nodes import Index, value_of
from attncomp.passes.reader import Reader
from attncomp.passes.symbols import NotAnIntegerError
from attncomp.variant import Rejection


def read_mod(reader: Reader, body: GraphModule, bound: Sequence[Expr | Node], dtype: torch.dtype) -> Expr | Rejection:
    """What `body` returns for these arguments: expressions for numbers, graph nodes for captured tensors.

    dtype: of float arguments (the scores are computed in float32, whatever the queries are).
    """
    given = [n for n in body.graph.nodes if n.op == "placeholder"]
    if len(given) != len(bound):
        return Rejection("flex-function", f"{len(bound)} arguments for a function of {len(given)}")
    fakes = [value_of(x) for x in bound if isinstance(x, Node)]
    fake_mode = detect_fake_mode([n.meta["example_value"] for n in given if "example_value" in n.meta] + fakes)
    if fake_mode is None:
        return Rejection("flex-function", "the captured graph carries no fake tensors")
    with fake_mode, torch.no_grad():
        values = [
            value_of(x) if isinstance(x, Node) else torch.empty((), dtype=dtype if x.kind == "float" else torch.int64)
            for x in bound
        ]
        try:
            traced = make_fx(Body(body).run, pre_dispatch=True, _allow_non_fake_inputs=True)(*values)
        except Exception as error:  # whatever the user's function does that can't be traced
            return Rejection("flex-function", f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}")
    for node in traced.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return Rejection("flex-function", f"{node.target} changes a tensor in place")
    placeholders = (n for n in traced.graph.nodes if n.op == "placeholder")
    inner = _ModReader(reader, traced, dict(zip(placeholders, bound, strict=True)))
    (result,) = pytree.tree_leaves(next(n for n in traced.graph.nodes if n.op == "output").args[0])
    try:
        return inner.at(result, ()) if isinstance(result, Node) else reader.scalar(result)
    except NotAnIntegerError as reason:
        return Rejection("flex-function", str(reason))


class Body(Interpreter):
    """Runs a function's graph; numbers that index a tensor stay tensors, where eager would read their values."""

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is operator.getitem and isinstance(args[0], torch.Tensor):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if all(isinstance(x, torch.Tensor) and x.dim() == 0 for x in index):
                return torch.ops.aten.index.Tensor(args[0], list(index))
        return super().call_function(target, args, kwargs)


class _ModReader(Reader):
    """Reads a function's graph, with its arguments bound to expressions and to nodes of the graph around it."""

    def __init__(self, outer: Reader, graph: GraphModule, bound: Mapping[Node, Expr | Node]) -> None:
        super().__init__(graph, outer.extents, narrowest=outer.narrowest)
        self.outer = outer
        self.bound = bound
        for node in graph.graph.nodes:
            of = bound.get(node)
            own = of.meta.get("attncomp_grad", True) if isinstance(of, Node) else isinstance(of, Load)
            sources = (a.meta["attncomp_grad"] for a in node.all_input_nodes)
            node.meta["attncomp_grad"] = own if node.op == "placeholder" else any(sources)

    def at(self, node: Node, index: Index) -> Expr:
        of = self.bound.get(node)
        if of is None:
            return super().at(node, index)
        return self.outer.at(of, index) if isinstance(of, Node) else of

    def load(self, node: Node, index: Index) -> Expr:
        raise NotAnIntegerError(f"{node.name} of the function can't be read ({node.target})")
