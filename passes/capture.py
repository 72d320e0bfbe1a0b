"""Capture: a Dynamo graph as functional, pre-dispatch ATen, with mutations written back and autograd intact.

Pre-dispatch means one spelling for every operation (``matmul``, ``softmax.int``, ``scaled_dot_product_attention`` stay
whole), before autograd and decompositions. Functional means that a value never changes after it is made; what the
user's code mutates comes out as extra values, which are copied back into the inputs at the end.
"""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node

from attncomp.passes.anchors import marks
from attncomp.passes.autocast import explicit_casts, with_regions
from attncomp.passes.capture_parts import capture_parts
from attncomp.passes.dropouts import explicit_dropouts
from attncomp.passes.fast_paths import FAST_PATHS
from attncomp.passes.hidden_writes import without_hidden_writes
from attncomp.passes.inference_mode import without_inference_mode
from attncomp.passes.inline import Checkpoint, inline
from attncomp.passes.mask import HUGE
from attncomp.passes.nodes import name_of, value_of
from attncomp.passes.opaque import opaque, restore
from attncomp.passes.subclasses import hide_subclasses, show_subclasses
from attncomp.passes.vmapped import Segment
from attncomp.passes.vmaps import functorch_depth, leave_functorch, without_vmap
from attncomp.passes.writes import explicit_writes
from attncomp.variant import Rejection

log = logging.getLogger("attncomp")

_VIEW_NAMES = frozenset(
    {
        "alias",
        "detach",
        "expand",
        "flatten",
        "mT",
        "narrow",
        "permute",
        "reshape",
        "select",
        "slice",
        "squeeze",
        "t",
        "transpose",
        "unflatten",
        "unsqueeze",
        "view",
        "_unsafe_view",
    }
)


@dataclass(frozen=True)
class Captured:
    """A functional graph that takes `lifted` tensors before the user's inputs.

    `lifted` are the parameters and buffers that the Dynamo graph held. `checkpoints` were inlined, and are outlined
    again when the graph is rewritten; so are the nodes under ``vmap``, which stand as opaque nodes by number.
    """

    graph: GraphModule
    lifted: tuple[torch.Tensor, ...]
    checkpoints: tuple[Checkpoint, ...] = ()
    segments: Mapping[int, Segment] = field(default_factory=dict)


def capture(dynamo_graph: GraphModule, inputs: Sequence[Any]) -> Captured | Rejection:
    """Trace to functional pre-dispatch ATen, or say why that can't be done (the graph then goes on untouched)."""
    if any(getattr(n.target, "__name__", "") == "_enter_dual_level" for n in dynamo_graph.graph.nodes):
        # torch's tracer fails inside of the level and leaves it entered, for all that runs later
        return Rejection("forward-mode", "the graph computes forward-mode derivatives (torch.func.jvp)")
    inlined = inline(without_vmap(dynamo_graph))
    if isinstance(inlined, Rejection):
        return inlined
    graph_of_regions = without_inference_mode(with_regions(inlined.graph))
    plain = graph_of_regions is dynamo_graph
    written = without_hidden_writes(explicit_dropouts(graph_of_regions))
    if isinstance(written, Rejection):
        return written
    dynamo_graph = written
    given = [n for n in dynamo_graph.graph.nodes if n.op == "placeholder"]
    hidden = hide_subclasses(dynamo_graph, inputs, len(inlined.kept))
    if isinstance(hidden, Rejection):
        return hidden
    grad_inputs = [isinstance(x, torch.Tensor) and x.requires_grad for x in inputs]
    depth = functorch_depth()
    try:
        graph, lifted, targets = _traced(hidden.graph, hidden.only_given(inputs), plain and not hidden.segments)
    except Exception as error:  # any failure of torch's tracer means the same: not ours to change
        leave_functorch(depth)
        return Rejection("capture-failed", f"{type(error).__name__}: {_first_line(error)}")
    kept = (*inlined.kept, *hidden.segments)
    restore(graph, kept)
    show_subclasses(graph, hidden, given, inputs)
    placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
    if len(placeholders) != len(lifted) + len(inputs):
        return Rejection(
            "capture-failed", f"{len(placeholders)} traced inputs for {len(lifted) + len(inputs)} given ones"
        )
    places = _mutated(graph, targets)
    if isinstance(places, Rejection):
        return places
    if targets and torch.is_grad_enabled() and any((*(p.requires_grad for p in lifted), *grad_inputs)):
        _read_from_copies(graph, set(targets.values()))
    explicit_casts(graph)
    _write_back(graph, places)
    explicit_writes(graph)
    for node in list(graph.graph.nodes):
        if name_of(node) in ("_assert_tensor_metadata",):  # says what the tracer saw; holds by construction
            graph.graph.erase_node(node)
    for node, source in zip(placeholders[len(lifted) :], given, strict=True):
        example = getattr(source.meta.get("grapharg"), "example", None)
        if isinstance(example, torch.Tensor):  # the values that the graph is compiled with; not kept alive for that
            node.meta["attncomp_example"] = weakref.ref(example)
    names = ["_buffers_"] * len(lifted) + [str(n.target) for n in given]
    for node, x, name in zip(placeholders, (*lifted, *inputs), names, strict=True):
        node.meta["attncomp_state"] = isinstance(x, torch.nn.Parameter) or ("_buffers_" in name and _moderate(x))
    for node in graph.graph.nodes:
        if node.op == "get_attr" and "attncomp_state" not in node.meta:
            node.meta["attncomp_state"] = _moderate(getattr(graph, str(node.target)))
    _mark_gradients(graph, [*(isinstance(t, torch.nn.Parameter) and t.requires_grad for t in lifted), *grad_inputs])
    graph.graph.lint()
    graph.recompile()
    segments = {n: item for n, item in enumerate(kept) if isinstance(item, Segment)}
    for node in graph.graph.nodes:
        if node.target is opaque:
            node.meta["attncomp_segment"] = segments[node.args[1]]
    return Captured(graph, lifted, inlined.checkpoints, segments)


def _traced(
    dynamo_graph: GraphModule, inputs: Sequence[Any], plain: bool
) -> tuple[GraphModule, tuple[torch.Tensor, ...], dict[str, str]]:
    """(functional graph, the tensors it takes first, name of each mutated value → name of its placeholder).

    The mutated values are the graph's first outputs. plain: without regions, whose marks copies of a layer would share.
    """
    parts = None
    try:
        if plain:
            parts = capture_parts(dynamo_graph, inputs, marks(dynamo_graph))
    except Exception:  # a stretch that can't be traced on its own says nothing of the whole graph
        log.debug("the repeated parts of a graph were not traced on their own", exc_info=True)
    if parts is not None:
        return parts.graph, (), parts.targets
    exported, signature = aot_export_module(
        dynamo_graph, list(inputs), trace_joint=False, pre_dispatch=True, decompositions=FAST_PATHS
    )
    assert isinstance(exported, GraphModule)
    named: dict[str, torch.Tensor] = dict(dynamo_graph.named_parameters(remove_duplicate=False)) | dict(
        dynamo_graph.named_buffers(remove_duplicate=False)
    )
    lifted = tuple(named[name] for name in (*signature.parameters, *signature.buffers))
    placeholders = [n for n in exported.graph.nodes if n.op == "placeholder"]
    targets = {str(value): str(place) for value, place in signature.user_inputs_to_mutate.items()}
    buffers = {fqn: placeholders[len(signature.parameters) + n].name for n, fqn in enumerate(signature.buffers)}
    targets |= {value: buffers[fqn] for value, fqn in signature.buffers_to_mutate.items()}
    return exported, lifted, targets


def _moderate(x: Any) -> bool:
    """Whether a buffer or constant holds no huge numbers, as masks do."""
    if not isinstance(x, torch.Tensor) or isinstance(x, FakeTensor):
        return False
    return not x.is_floating_point() or bool((x.detach().abs() < HUGE).all())


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else ""


def _mutated(graph: GraphModule, targets: dict[str, str]) -> list[Node] | Rejection:
    """The placeholders of which the leading extra outputs are the new values, in the order of these.

    targets: name of such an output's node → name of the placeholder.
    """
    output = next(n for n in reversed(graph.graph.nodes) if n.op == "output")
    by_name = {n.name: n for n in graph.graph.nodes}
    places = []
    for value in output.args[0][: len(targets)]:
        place = by_name.get(targets.get(getattr(value, "name", ""), ""))
        if place is None:
            return Rejection("mutation-unclear", f"the tracer returned the unknown mutation {value}")
        places.append(place)
    return places


def _write_back(graph: GraphModule, places: Sequence[Node]) -> None:
    """Replace the leading extra outputs by copies into the inputs.

    Outputs that were views of a mutated input view it again.
    """
    if not places:
        return
    output = next(n for n in reversed(graph.graph.nodes) if n.op == "output")
    results = list(output.args[0])
    extra, results = results[: len(places)], results[len(places) :]
    fresh: dict[Node, Node] = {}
    with graph.graph.inserting_before(output):
        for place, value in zip(places, extra, strict=True):
            graph.graph.call_function(torch.ops.aten.copy_.default, (place, value)).meta["val"] = value_of(place)
            fresh[value] = place

        def again(node: Node) -> Node | None:
            """The same view, of the input after the copy; None if `node` does not view a mutated value."""
            if node in fresh:
                return fresh[node]
            if name_of(node) not in _VIEW_NAMES or not node.args or not isinstance(node.args[0], Node):
                return None
            base = again(node.args[0])
            if base is None:
                return None
            assert callable(node.target)
            new = graph.graph.call_function(node.target, (base, *node.args[1:]), dict(node.kwargs))
            new.meta = dict(node.meta)
            fresh[node] = new
            return new

        results = [(again(r) or r) if isinstance(r, Node) else r for r in results]
    output.args = (tuple(results),)


def _read_from_copies(graph: GraphModule, names: set[str]) -> None:
    """Let the graph read copies of the inputs that it mutates.

    What autograd saves must not change before the backward pass.
    """
    last = [n for n in graph.graph.nodes if n.op == "placeholder"][-1]
    for place in [n for n in graph.graph.nodes if n.op == "placeholder" and n.name in names and n.users]:
        with graph.graph.inserting_after(last):
            copy = graph.graph.call_function(torch.ops.aten.clone.default, (place,))
        copy.meta["val"] = value_of(place)
        copy.meta["attncomp_copy"] = True
        place.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)


def _mark_gradients(graph: GraphModule, inputs: Sequence[bool]) -> None:
    """Set ``meta["attncomp_grad"]`` on every node whose tensor a gradient flows into."""
    flags = iter(inputs)
    enabled = torch.is_grad_enabled()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            node.meta["attncomp_grad"] = next(flags, False) and enabled
            continue
        if node.target is torch._C._set_grad_enabled:
            enabled = bool(node.args[0])
            continue
        value = value_of(node)
        floating = isinstance(value, torch.Tensor) and (value.dtype.is_floating_point or value.dtype.is_complex)
        if isinstance(value, tuple | list) or node.target is operator.getitem:
            floating = True
        flows = any(a.meta.get("attncomp_grad", False) for a in node.all_input_nodes)
        node.meta["attncomp_grad"] = bool(enabled and floating and flows and name_of(node) != "detach")
