"""From a recurrence that was found to the site: its spec, and its tensors as graph nodes in the spec's own order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch.fx import GraphModule, Node

from attncomp.expr import ONE, ZERO, Const, Expr, Load, Score, floordiv, ge, mul, op, sub, to_float
from attncomp.passes.as_written import work_of
from attncomp.passes.assemble import needs_gradient
from attncomp.passes.falling import falls
from attncomp.passes.nodes import ancestors, name_of, value_of
from attncomp.passes.prove import prove
from attncomp.passes.recurrence_pool import Frame
from attncomp.passes.recurrences import Dims, Read, Recurrence
from attncomp.passes.site import Around, Layout, Operand, Site, State, location_of, module_of
from attncomp.spec import AttentionSpec, B, D, E, H, I, J, Normaliser, TensorInfo, Transition
from attncomp.variant import Rejection


@dataclass(frozen=True, slots=True)
class Found:
    """A recurrence and the node that it is; final: the node of its last state, where one is needed."""

    recurrence: Recurrence
    output: Node
    frame: Frame
    final: State | None


def site_of_recurrence(graph: GraphModule, anchor: Node, found: Found) -> Site | Rejection:
    made = _Maker(graph, anchor, found)
    return made.site()


def _nodes_of(x: Any) -> list[Node]:
    """The nodes in a dataclass of such."""
    if isinstance(x, Node):
        return [x]
    if is_dataclass(x):
        return [n for f in fields(x) for n in _nodes_of(getattr(x, f.name))]
    return [n for y in x for n in _nodes_of(y)] if isinstance(x, list | tuple) else []


def _loses(cast: Node, dtype: torch.dtype) -> bool:
    """Whether a cast has fewer digits than its input, and than `dtype`."""
    to, of = value_of(cast), value_of(cast.all_input_nodes[0]) if cast.all_input_nodes else None
    if not isinstance(to, torch.Tensor) or not isinstance(of, torch.Tensor) or not to.is_floating_point():
        return False
    if to.dtype.itemsize < 2:
        return to.dtype != of.dtype
    if not of.is_floating_point() or of.dtype.itemsize < 2:
        return False
    return torch.promote_types(of.dtype, to.dtype) != to.dtype and torch.promote_types(to.dtype, dtype) != to.dtype


class _Maker:
    def __init__(self, graph: GraphModule, anchor: Node, found: Found) -> None:
        self.graph = graph
        self.anchor = anchor
        self.found = found
        self.captured: list[tuple[Node, float | None]] = []
        batch = found.frame.batch
        self.outer = 1 if len(batch) < 2 else len(batch) - 1
        b = h = 1
        for n, size in enumerate(batch):
            b, h = (b * size, h) if n < self.outer else (b, h * size)
        self.b, self.h = b, h
        r = found.recurrence
        self.turned = r.before or found.frame.backwards or found.frame.results_backwards
        self.length = found.frame.length + (r.before and found.final is not None)

    def _rounding(self, dtype: torch.dtype) -> Node | None:
        """A cast between the operands and the rows that loses digits which the rows have; the comparison of functions
        of numbers does not see it."""
        read = set(_nodes_of(self.found.recurrence))
        above = ancestors(self.found.output)
        ends = read.union(*(ancestors(n) for n in read - above))
        queue = [self.found.output, *([] if self.found.final is None else [self.found.final.node])]
        seen: set[Node] = set()
        while queue:
            node = queue.pop()
            if node in seen or node in ends:
                continue
            seen.add(node)
            if name_of(node) in ("_to_copy", "to", "type_as") and _loses(node, dtype):
                return node
            queue += node.all_input_nodes
        return None

    def site(self) -> Site | Rejection:
        r, output = self.found.recurrence, self.found.output
        dtype = value_of(output).dtype
        rounding = self._rounding(dtype)
        if rounding is not None:
            to = value_of(rounding).dtype
            return Rejection("mixed-dtypes", f"{rounding.name} rounds to {to}, the output is {dtype}")
        operands = []
        for read in (r.q, r.k, r.v):
            node = self._cast(read.node, dtype)
            if node is None:
                of = str(value_of(read.node).dtype).removeprefix("torch.")
                return Rejection("mixed-dtypes", f"an operand is {of}, the output {dtype}")
            operands.append(Operand(node, read.dims))
        q, k, v = operands
        n, frame = self.length, self.found.frame
        d = 1 if r.k.dims[-1] is None else int(value_of(r.k.node).shape[r.k.dims[-1]])
        sizes = tuple(Const(x) for x in (self.b, self.h, n, n, d, frame.width))
        b_at, h_at = ZERO if self.b == 1 else B, ZERO if self.h == 1 else H
        k_load = Load("k", (b_at, h_at, J, D))
        program: Expr = Score() if r.scale == 1.0 else mul(Score(), Const(r.scale))
        beta = None if r.beta is None else self._load(self._plain(r.beta), 0.0)
        value: Expr = Load("v", (b_at, h_at, J, E))
        value = value if beta is None else mul(beta, value)
        transition = None
        if (
            self._constant(r.decay)
            and not r.delta
            and r.erase is None
            and r.initial is None
            and self.found.final is None
        ):
            program = program if r.decay is None else mul(program, self._power(r.decay))
        else:
            transition = self._transition(r, beta, k_load)
        infos = tuple(self._info(n) for n in range(len(self.captured)))
        around, extra = self._around(beta)
        read_nodes = [*(x.node for x in operands), *(node for node, _ in self.captured), *extra]
        training = any(map(needs_gradient, read_nodes))
        text = str(dtype).removeprefix("torch.")
        shapes = {
            "q": (sizes[0], sizes[1], sizes[2], sizes[4]),
            "k": (sizes[0], sizes[1], sizes[3], sizes[4]),
            "v": (sizes[0], sizes[1], sizes[3], sizes[5]),
        }
        spec = AttentionSpec(
            sizes=sizes,
            tensors=(*(TensorInfo(name, shapes[name], text, training) for name in shapes), *infos),
            score=mul(Load("q", (b_at, h_at, I, D)), k_load),
            program=program,
            mask=ge(I, J) if r.block == 1 else ge(floordiv(I, Const(r.block)), floordiv(J, Const(r.block))),
            normaliser=Normaliser("none"),
            value=value,
            dtype=text,
            transition=transition,
            training=training,
        )
        rank = len(frame.batch)
        places = {dim: place for place, dim in enumerate(frame.dims)}
        order = tuple((places[dim],) for dim in range(rank + 2))
        site = Site(
            kind="linear",
            anchor=self.anchor,
            output=output,
            spec=spec,
            proof=prove(spec.mask, spec.extents),
            layout=Layout(tuple(Const(s) for s in frame.batch), self.outer, order),
            q=q,
            k=k,
            v=v,
            captured=tuple(node for node, _ in self.captured),
            module=module_of(self.anchor) or module_of(output),
            location=location_of(self.anchor) or location_of(output),
            final=self.found.final,
            around=around,
            extra=extra,
        )
        names_of = {"bfloat16": "bf16", "float16": "fp16", "float64": "fp64"}
        return replace(site, written=work_of(site.covered(), training, names_of.get(text, "fp32")))

    def _constant(self, decay: Read | float | None) -> bool:
        """Whether a decay is the same at each step, and learns nothing."""
        if isinstance(decay, Read):
            return decay.dims[-2] is None and decay.dims[-1] is None and not needs_gradient(decay.node)
        return decay is None or decay > 0

    def _power(self, decay: Read | float) -> Expr:
        """What is left of a key's weight at a later query: the decay to the power of their distance."""
        distance = to_float(sub(I, J))
        if isinstance(decay, Read):
            load = self._load(decay, 0.0)
            return op("exp", mul(load, distance)) if decay.log else op("pow", load, distance)
        return op("pow", Const(decay), distance)

    def _transition(self, r: Recurrence, beta: Expr | None, k: Expr) -> Transition:
        decay: Expr | None = None
        constant = not isinstance(r.decay, Read) or r.decay.dims[-2] is None
        if r.decay is not None and constant and r.before and r.initial is not None:
            decay = self._load(self._of_rows(r.decay, r.k), 1.0)  # in front of the first row nothing decays
        elif isinstance(r.decay, Read):
            decay = self._gate(r.decay, r.of_values)
        elif r.decay is not None:
            decay = Const(r.decay)
        erase: Expr | None = None
        write: Expr | None = None
        if r.delta:
            erase = mul(Const(1.0) if beta is None else beta, k)
            write = k if decay is None or r.early else mul(decay, k)
        if r.erase is not None and r.write is not None:
            vector = self._load(r.erase, 0.0)
            erase, write = vector if r.sign > 0 else mul(Const(-1.0), vector), self._load(r.write, 0.0)
        initial = None if r.initial is None else self._state(r.initial)
        return Transition(decay, erase, write, initial, self.found.final is not None)

    # -- captured tensors, each as a node of the spec's own order: (b, h), (b, h, j), (b, h, j, d) or (b, h, d, e)

    def _around(self, beta: Expr | None) -> tuple[Around | None, tuple[Node, ...]]:
        """What is done before and after the spec's recurrence, and the nodes that are read for that."""
        r = self.found.recurrence
        if not self.turned:
            return None, ()
        bonus: float | bool | None = r.bonus if isinstance(r.bonus, float) else None
        extra: tuple[Node, ...] = ()
        if isinstance(r.bonus, Read):
            bonus, extra = True, (self._arranged(self._plain(r.bonus).node, r.bonus.dims, 4),)
        place = int(beta.tensor.removeprefix("c")) if isinstance(beta, Load) else None
        pads = tuple(pad for _, pad in self.captured)
        ways = (self.found.frame.backwards, self.found.frame.results_backwards, r.before)
        return Around(*ways, pads, r.scale, bonus, place), extra

    def _load(self, read: Read, pad: float, of_values: bool = False) -> Load:
        """pad: what stands in front of the first row, where rows are read a row later. of_values: its channels are
        those of the values."""
        kept = 2 if read.dims[-2] is None and read.dims[-1] is None else 3 if read.dims[-1] is None else 4
        node = self._arranged(read.node, read.dims, kept)
        axes = (B, H, J, E if of_values else D)[:kept]
        return self._loaded(node, axes, None if read.dims[-2] is None else pad)

    def _gate(self, read: Read, of_values: bool) -> Expr:
        """A gate, by what its tensor is a function of where that tells a kernel that it is positive."""
        name, source = name_of(read.node), read.node.args[0] if read.node.args else None
        same = isinstance(source, Node) and value_of(source).shape == value_of(read.node).shape
        if read.log:
            return op("exp", self._load(read, 0.0, of_values))
        starts = self.found.recurrence.before and self.found.recurrence.initial is not None
        if name in ("exp", "sigmoid") and same and isinstance(source, Node) and not (starts and name == "sigmoid"):
            return op(name, self._load(replace(read, node=source), 0.0, of_values))
        return self._load(read, 1.0, of_values)

    def _of_rows(self, decay: Read | float, like: Read) -> Read:
        """A decay that is the same in each step, as a tensor that has the steps as its last dimension but one."""
        n, rank = self.found.frame.length, len(self.found.frame.batch)
        if isinstance(decay, float):
            node = self._made(torch.ops.aten.new_full.default, like.node, [n, 1], decay)
            return Read(node, (*[None] * rank, 0, None))
        node, dims = self._plain(decay).node, self._plain(decay).dims
        size = value_of(node).dim()
        node = self._made(torch.ops.aten.unsqueeze.default, node, size)
        node = self._made(torch.ops.aten.expand.default, node, [*[-1] * size, n])
        return Read(node, (*dims[:-2], size, dims[-1]))

    def _plain(self, read: Read) -> Read:
        """What a read means, as a node."""
        return Read(self._made(torch.ops.aten.exp.default, read.node), read.dims) if read.log else read

    def _state(self, read: Read) -> Load:
        load = self._loaded(self._arranged(read.node, read.dims, 4), (B, H, D, E), None)
        if self.found.frame.width == 1:  # its one column is all that there is
            load = Load(load.tensor, (*load.index[:3], E))
        return load

    def _loaded(self, node: Node, axes: Sequence[Expr], pad: float | None) -> Load:
        if not self.turned:
            pad = None
        if (node, pad) not in self.captured:
            self.captured.append((node, pad))
        shape = value_of(node).shape
        index = tuple(ZERO if size == 1 else a for size, a in zip(shape, axes, strict=True))
        return Load(f"c{self.captured.index((node, pad))}", index)

    def _info(self, n: int) -> TensorInfo:
        node, pad = self.captured[n]
        value = value_of(node)
        sizes = [int(s) for s in value.shape]
        if pad is not None:
            sizes[2] += self.length - self.found.frame.length
        shape = tuple(ONE if s == 1 else Const(s) for s in sizes)
        text = str(value.dtype).removeprefix("torch.")
        fall = None if self.turned else falls(self.graph, node)
        return TensorInfo(f"c{n}", shape, text, needs_gradient(node), None, fall)

    def _arranged(self, node: Node, dims: Dims, kept: int) -> Node:
        """A view of a node as (b, h, ...), of `kept` dimensions."""
        rank = value_of(node).dim()
        batch = len(self.found.frame.batch)
        used = [d for d in dims[: batch + kept - 2] if d is not None]
        rest = [d for d in range(rank) if d not in used]
        order = [*rest, *used]
        if order != list(range(rank)):
            node = self._made(torch.ops.aten.permute.default, node, order)
        sizes = [1 if d is None else None for d in dims[: batch + kept - 2]]
        shape, at = [], len(rest)
        for s in sizes:
            shape.append(1 if s == 1 else int(value_of(node).shape[at]))
            at += s is None
        if batch > 2 and any(s == 1 for s in shape[:batch]):
            full = [*self.found.frame.batch, *shape[batch:]]
            node = self._made(torch.ops.aten.reshape.default, node, shape)
            node = self._made(torch.ops.aten.expand.default, node, full)
            shape = full
        merged = self._merged(shape, batch)
        if merged != list(value_of(node).shape):
            node = self._made(torch.ops.aten.reshape.default, node, merged)
        return node

    def _merged(self, shape: list[int], batch: int) -> list[int]:
        b = h = 1
        for n, size in enumerate(shape[:batch]):
            b, h = (b * size, h) if n < self.outer else (b, h * size)
        return [b, h, *shape[batch:]]

    def _cast(self, node: Node, dtype: torch.dtype) -> Node | None:
        """The node in the output's dtype; None if that is narrower than its own."""
        of = value_of(node).dtype
        if of == dtype:
            return node
        if torch.promote_types(of, dtype) != dtype:
            return None
        return self._made(torch.ops.aten._to_copy.default, node, dtype=dtype)

    def _made(self, target: Any, source: Node, *args: Any, **kwargs: Any) -> Node:
        """A new node behind `source`."""
        after = source
        while after.next.op == "placeholder":
            after = after.next
        value = value_of(source)
        mode = detect_fake_mode([value])
        assert mode is not None
        with self.graph.graph.inserting_after(after):
            node = self.graph.graph.call_function(target, (source, *args), kwargs)
        with mode:
            made = target(value, *args, **kwargs)
        node.meta = {**source.meta, "val": made}
        return node
