"""Whether the blocks of a flex_attention call are those of its ``mask_mod``.

A block mask made by ``create_block_mask`` in the same graph is, if it is made from the same function: the function is
found under ``vmap`` and read; equal expressions are equal functions. One that comes from outside is compared with the
``mask_mod`` on the values with which the graph is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from attncomp.expr import ZERO, Expr
from attncomp.passes.mods import Body, read_mod
from attncomp.passes.nodes import called, is_one, value_of, with_ancestors
from attncomp.passes.opaque import opaque
from attncomp.passes.reader import Reader
from attncomp.passes.site import location_of
from attncomp.passes.symbols import hint
from attncomp.passes.vmapped import Segment
from attncomp.variant import Rejection

_BUILDERS = ("torch/nn/attention/flex_attention.py", "torch/_functorch/vmap.py", "torch/nn/functional.py")
"""Where the nodes that make a block mask from a function come from."""

_ELEMENTS = 1 << 24
"""About so many elements of the mask are compared; of a larger one, some rows of blocks."""


def blocks_agree(
    reader: Reader,
    block_mask: Sequence[Any],
    body: GraphModule,
    tensors: Sequence[Node],
    mask: Expr,
    index: Sequence[Expr],
    queries: Node,
) -> Rejection | None:
    """None if the blocks are those of the mask_mod.

    body, tensors: the mask_mod. mask: what it was read as, at `index` (b, h, i, j).
    """
    tables = [x for x in block_mask[2:-3] if isinstance(x, Node)]
    if all(x.op in ("placeholder", "get_attr") for x in tables):
        return _given(reader.graph, block_mask, body, tensors, queries)
    made: list[Node] = []
    seen: set[Node] = set()
    stack = list(tables)
    while stack:
        node = stack.pop()
        if node in seen or not isinstance(value_of(node), torch.Tensor | tuple | list):
            continue
        seen.add(node)
        if node.target is opaque:
            segment = node.meta.get("attncomp_segment")
            mine = _function_of(segment) if isinstance(segment, Segment) else None
            if mine is not None:
                made.append(node)
                continue
            if not isinstance(segment, Segment) or not all(
                _builder(n) for n in segment.nodes if "stack_trace" in n.meta
            ):
                return Rejection("block-mask", f"its blocks are computed by {node.name}")
        elif node.op != "call_function" or not _builder(node):
            return Rejection("block-mask", f"its blocks are computed from {node.name}, not from a mask_mod")
        stack.extend(node.all_input_nodes)
    for node in made:
        found = _read_segment(reader, node, body, index)
        if found != mask:
            return Rejection("block-mask", "its blocks were made from another function than its mask_mod")
    return None if made else Rejection("block-mask", "its blocks were made from no function")


def _builder(node: Node) -> bool:
    return location_of(node).rsplit(":", 1)[0].endswith(_BUILDERS)


def _function_of(segment: Segment) -> tuple[Node, tuple[Node, ...]] | None:
    """The value under four nested vmaps that a segment returns, and where each of them begins; None if it is not so."""
    if len(segment.results) != 1:
        return None
    node, levels = segment.results[0], 0
    while called(node) == "_remove_batch_dim" and isinstance(node.args[0], Node):
        node, levels = node.args[0], levels + 1
    begins = {n.args[2]: n for n in segment.nodes if called(n) == "_add_batch_dim"}
    if levels != 4 or set(begins) != {1, 2, 3, 4}:
        return None
    if sum(called(n) == "_add_batch_dim" for n in segment.nodes) != 4 or any(n.args[1] != 0 for n in begins.values()):
        return None
    return node, tuple(begins[n] for n in (1, 2, 3, 4))


def _read_segment(reader: Reader, node: Node, body: GraphModule, index: Sequence[Expr]) -> Expr | None:
    """The function of a segment at `index`, if it runs over the ranges of its four axes."""
    segment = node.meta["attncomp_segment"]
    found = _function_of(segment)
    assert found is not None
    result, begins = found
    outer = dict(zip(segment.operands, node.args[2:], strict=True))
    graph = Graph()
    env: dict[Node, Any] = {}
    bound: list[Any] = []
    arguments = [n for n in body.graph.nodes if n.op == "placeholder"][:4]
    for begin, axis, like in zip(begins, index, arguments, strict=True):
        source = outer.get(begin.args[0])
        if not isinstance(source, Node):
            return None
        at = ZERO if is_one(value_of(source).shape[0]) else axis  # made for one batch or head, used for all
        if reader.at(source, (at,)) != at:
            return None
        env[begin] = graph.placeholder(like.name)
        env[begin].meta = dict(like.meta)
        bound.append(at)
    for operand, given in outer.items():
        if not isinstance(given, Node) or not isinstance(value_of(given), torch.Tensor):
            continue
        env[operand] = graph.placeholder(operand.name)
        env[operand].meta = {"example_value": value_of(given)}
        bound.append(given)
    needed = with_ancestors([result])
    for n in segment.nodes:
        if n in needed and n not in env:
            if any(a not in env for a in n.all_input_nodes):
                return None
            env[n] = graph.node_copy(n, env.__getitem__)
    graph.output(env[result])
    read = read_mod(reader, GraphModule({}, graph), bound, torch.float32)
    return None if isinstance(read, Rejection) else reader.refine(read)


def _given(
    graph: torch.fx.GraphModule, block_mask: Sequence[Any], body: GraphModule, tensors: Sequence[Node], queries: Node
) -> Rejection | None:
    def real(x: Any) -> torch.Tensor | None:
        example = x.meta.get("attncomp_example", lambda: None)() if x.op == "placeholder" else None
        value = getattr(graph, str(x.target), None) if x.op == "get_attr" else example
        return value if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor) else None

    tables = [real(x) if isinstance(x, Node) else None for x in block_mask[2:6]]
    values = [real(x) for x in tensors]
    if tables[0] is None or tables[1] is None or any(x is None for x in values):
        return Rejection("block-mask", "its blocks come from outside, and can't be compared with its mask_mod")
    lengths = [hint(value_of(x) if isinstance(x, Node) else x) for x in block_mask[:2]]
    b, h = (hint(s) for s in value_of(queries).shape[:2])

    def function(*at: torch.Tensor) -> Any:
        return Body(body).run(*at, *values)

    try:
        agree = _same(function, tables, (b, h, *lengths), (block_mask[-3], block_mask[-2]))
    except Exception as error:  # whatever the user's function does on values
        return Rejection("block-mask", f"its mask_mod can't be evaluated: {type(error).__name__}")
    return None if agree else Rejection("block-mask", "its blocks are not those of its mask_mod")


@torch.no_grad()
def _same(function: Callable[..., Any], tables: Sequence[Any], shape: tuple[int, ...], block: tuple[int, int]) -> bool:
    """Whether the listed blocks hold every allowed key, and the full ones no other."""
    b, h, rows, columns = shape
    partial = _listed(tables[0], tables[1], -(-columns // block[1]))
    full = torch.zeros_like(partial)
    if tables[2] is not None:
        full = _listed(tables[2], tables[3], partial.shape[-1])
    device = partial.device
    count = -(-rows // block[0])
    if partial.shape[-2] != count:
        return False
    some = max(min(count, _ELEMENTS // max(b * h * min(block[0], rows) * columns, 1)), 1)
    keys = torch.arange(columns, device=device)
    pad = partial.shape[-1] * block[1] - columns
    for row in sorted({round(n * (count - 1) / max(some - 1, 1)) for n in range(some)}):
        queries = torch.arange(row * block[0], min((row + 1) * block[0], rows), device=device)
        index = (torch.arange(b, device=device), torch.arange(h, device=device), queries, keys)
        allowed = _on_grid(function, index)
        tiles = torch.nn.functional.pad(allowed, (0, pad)).unflatten(-1, (-1, block[1]))
        filled = torch.nn.functional.pad(allowed, (0, pad), value=True).unflatten(-1, (-1, block[1]))
        any_key, every_key = tiles.any(-1).any(-2), filled.all(-1).all(-2)
        if bool((any_key & ~(partial | full)[..., row, :]).any()) or bool((full[..., row, :] & ~every_key).any()):
            return False
    return True


def _on_grid(function: Callable[..., Any], index: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """A function of four numbers on every combination of four ranges."""
    for n in reversed(range(4)):
        function = torch.vmap(function, in_dims=tuple(0 if m == n else None for m in range(4)))
    result: torch.Tensor = function(*index)
    return result


def _listed(count: torch.Tensor, indices: torch.Tensor, columns: int) -> torch.Tensor:
    """The listed blocks of each row of blocks, as a table of booleans."""
    table = torch.zeros((*indices.shape[:-1], columns + 1), dtype=torch.bool, device=indices.device)
    used = torch.arange(indices.shape[-1], device=indices.device) < count[..., None]
    table.scatter_(-1, torch.where(used, indices.long(), columns), True)
    return table[..., :columns]
