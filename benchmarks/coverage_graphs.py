"""What stands in the graphs of a model: attention sites counted apart from the lifter, and inductor's matches."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

import attncomp.passes.rewrite as rewrite
from attncomp.backend import run_passes
from attncomp.passes.site import Missed, Site, location_of
from attncomp.report import SiteReport

POLICY = {"version": 1, "defaults": {"min_speedup": 0}}

SOFTMAX = frozenset({"softmax", "_softmax", "_safe_softmax", "special_softmax"})
FUSED = frozenset({"scaled_dot_product_attention", "flex_attention"})
CONTRACTIONS = frozenset({"matmul", "bmm", "einsum", "baddbmm", "tensordot", "mm", "__matmul__"})
"""Products, by the names that functions, methods and operators have."""
_THROUGH = frozenset(
    word
    for line in (
        "_to_copy _unsafe_view add add_ alias amax amin as_strided bfloat16 cat chunk clamp clamp_ clamp_max",
        "clamp_min clone concat constant_pad_nd contiguous conv2d convolution copy copy_ detach diagonal div div_",
        "dropout dropout_ exp expand expand_as feature_dropout flatten flip float gather getitem half iadd iand imul",
        "index index_select isub lift_fresh_copy logical_not mT masked_fill masked_fill_ max maximum mean minimum",
        "movedim mul mul_ nan_to_num nan_to_num_ narrow neg pad permute pow relu repeat repeat_interleave reshape",
        "reshape_as roll rsub scatter select select_scatter sigmoid slice slice_scatter softplus split",
        "split_with_sizes squeeze stack sub sub_ swapaxes swapdims t tanh tile to transpose tril triu true_divide",
        "truediv type_as unbind unflatten unfold unsafe_view unsqueeze view view_as where",
    )
    for word in line.split()
)


def operation(node: Node) -> str:
    """The name of what a node calls, the same for functions, methods and ATen operators."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return ""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket.__name__)
    return str(getattr(target, "__name__", target))


@dataclass(frozen=True)
class Anchor:
    """One attention site: an SDPA or flex call, or a softmax between two contractions."""

    kind: str
    name: str
    location: str


def anchors(graph: GraphModule) -> list[Anchor]:
    """The attention sites of a Dynamo or ATen graph, those in its subgraphs too."""
    found: list[Anchor] = []
    for module in graph.modules():
        if isinstance(module, GraphModule):
            found.extend(_anchors(module))
    return found


def _anchors(graph: GraphModule) -> Iterator[Anchor]:
    for node in graph.graph.nodes:
        name = operation(node)
        if name == "flex_attention":  # the lifter names it by its first result; the others are statistics
            result = next((u for u in node.users if operation(u) == "getitem" and u.args[1] == 0), node)
            yield Anchor("flex", result.name, location_of(node))
        elif name in FUSED:
            yield Anchor("sdpa", node.name, location_of(node))
        elif name in SOFTMAX and _behind(node) and _ahead(node):
            yield Anchor("softmax", node.name, location_of(node))


_REACH = 400
"""Nodes looked at on each side of a softmax."""


def _behind(softmax: Node) -> bool:
    """Whether a product of two computed tensors is softmax's source, with only pointwise steps and views between."""
    queue, seen = list(softmax.all_input_nodes[:1]), {softmax}
    while queue and len(seen) < _REACH:
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if _computed_product(node):
            return True
        if operation(node) in _THROUGH:
            queue.extend(node.all_input_nodes)
    return False


def _ahead(softmax: Node) -> bool:
    """Whether the weights reach a product with a computed tensor through pointwise steps and views."""
    queue, seen = list(softmax.users), {softmax}
    while queue and len(seen) < _REACH:
        node = queue.pop(0)
        if node in seen:
            continue
        seen.add(node)
        if _computed_product(node):
            return True
        if operation(node) in _THROUGH and operation(node) not in ("conv2d", "convolution"):
            queue.extend(node.users)
    return False


def _computed_product(node: Node) -> bool:
    """A contraction, none of whose factors is a parameter as it is."""
    if operation(node) not in CONTRACTIONS:
        return False
    return not any(_parameter(x) for x in node.all_input_nodes[-2:])


def _parameter(node: Node) -> bool:
    while operation(node) in _THROUGH and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op == "get_attr" or (
        node.op == "placeholder" and (bool(node.meta.get("attncomp_state")) or "_parameters_" in str(node.target))
    )


@dataclass
class Seen:
    """What one compilation of a model showed, over all of its graphs."""

    sites: list[dict[str, Any]] = field(default_factory=list)
    graphs: int = 0
    fallbacks: list[str] = field(default_factory=list)
    inductor: int = 0
    inductor_failures: list[str] = field(default_factory=list)
    seconds: float = 0.0


@contextlib.contextmanager
def observed_lift(into: list[tuple[list[Anchor], list[Site | Missed]]]) -> Iterator[None]:
    """Note the anchors of every captured graph, and what the lifter made of them, before anything is rewritten.

    Bodies of operators are captured as graphs of their own, after the graph around them.
    """
    passes: Any = rewrite
    original = passes.lift

    def lift(graph: GraphModule, maxima: bool = True) -> list[Site | Missed]:
        before = list(_anchors(graph))
        found: list[Site | Missed] = original(graph, maxima)
        into.append((before, list(found)))
        return found

    passes.lift = lift
    try:
        yield
    finally:
        passes.lift = original


def observer(seen: Seen, *, count_inductor: bool = True) -> Callable[..., Any]:
    """A backend that does what attncomp does with the eager executor, and notes all of it."""

    def compile_graph(graph: GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        dynamo = anchors(graph)
        if count_inductor and any(operation(n) in SOFTMAX | FUSED | {"exp"} for n in _all_nodes(graph)):
            matched = inductor_matches(graph, inputs)
            if isinstance(matched, int):
                seen.inductor += matched
            else:
                seen.inductor_failures.append(matched)
        seen.graphs += 1
        lifted: list[tuple[list[Anchor], list[Site | Missed]]] = []
        with observed_lift(lifted):
            result = run_passes(graph, inputs, POLICY)
        report = result.report
        seen.seconds += report.seconds
        if report.fallback:
            seen.fallbacks.append(report.fallback)
        if result.captured is None:
            seen.sites.extend(
                {
                    "kind": a.kind,
                    "verdict": "kept",
                    "mask": "unknown",
                    "reason": report.fallback,
                    "location": a.location,
                }
                for a in dynamo
            )
            return graph.forward
        reports = iter(report.sites)
        for before, found in lifted:
            seen.sites.extend(_matched(before, found, list(itertools.islice(reports, len(found)))))
        seen.sites.extend(_row(r, r.kind) for r in reports)  # in bodies that stay as they are
        if any(s.verdict == "rewritten" for s in report.sites):
            call, constants = result.captured.graph.forward, result.captured.lifted
            return (lambda *args: call(*constants, *args)) if constants else call
        return graph.forward

    return compile_graph


def _all_nodes(graph: GraphModule) -> Iterator[Node]:
    for module in graph.modules():
        if isinstance(module, GraphModule):
            yield from module.graph.nodes


def _matched(
    before: Sequence[Anchor], found: Sequence[Site | Missed], reports: Sequence[SiteReport]
) -> list[dict[str, Any]]:
    """One row for each anchor, and one for each further site that the lifter saw (linear attention, ...).

    An anchor whose weights meet values in several products counts as rewritten only if all of these are.
    """
    by_name: dict[str, list[SiteReport]] = {}
    for item, report in zip(found, reports, strict=True):
        by_name.setdefault(item.anchor.name, []).append(report)
    rows = []
    for anchor in before:
        own = by_name.pop(anchor.name, [])
        if not own:
            rows.append(
                {
                    "kind": anchor.kind,
                    "verdict": "kept",
                    "mask": "unknown",
                    "reason": "not-seen: the lifter does not take this softmax for attention",
                    "location": anchor.location,
                }
            )
        else:
            rows.append(_row(next((r for r in own if r.verdict == "kept"), own[0]), anchor.kind))
    rows.extend(_row(r, "more " + r.kind) for own in by_name.values() for r in own)
    return rows


def _row(report: SiteReport, kind: str) -> dict[str, Any]:
    return {
        "kind": kind,
        "verdict": report.verdict,
        "mask": report.mask,
        "variant": report.variant,
        "reason": "" if report.verdict == "rewritten" else report.reason,
        "location": report.location,
    }


class _MatchedError(Exception):
    """Raised to leave AOTAutograd once the joint graph has been through the matcher."""


def inductor_matches(graph: GraphModule, inputs: Sequence[Any]) -> int | str:
    """How often inductor's attention patterns match a Dynamo graph; a string says why that can't be told.

    AOTAutograd traces the graph with inductor's decompositions as it does for inductor, inductor's passes over the
    joint graph run, and nothing is compiled.
    """
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.utils import counters
    from torch._functorch.aot_autograd import aot_module_simplified
    from torch._inductor.decomposition import select_decomp_table
    from torch._inductor.fx_passes.joint_graph import joint_graph_passes

    before = counters["inductor"]["fuse_attention"]

    def matched(module: GraphModule, *_: Any, **__: Any) -> Any:
        joint_graph_passes(module)
        raise _MatchedError

    stop: Any = matched
    try:
        aot_module_simplified(
            graph,
            list(inputs),
            fw_compiler=stop,
            bw_compiler=stop,
            inference_compiler=stop,
            partition_fn=stop,
            decompositions=select_decomp_table(),
            keep_inference_input_mutations=True,
        )
    except _MatchedError:
        return int(counters["inductor"]["fuse_attention"] - before)
    except TensorifyScalarRestartAnalysis:  # Dynamo starts again with that number fixed, as it does under inductor
        raise
    except Exception as error:  # the model does not go through inductor's tracer
        return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
    return 0
