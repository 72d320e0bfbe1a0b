"""The ``torch.compile`` backend: ``torch.compile(model, backend="attncomp")``.

The graph from Dynamo is captured, its attention rewritten, and the rest handed to inductor (or run eagerly).
Whatever can't be captured goes to inductor whole. Inductor's own attention matcher, which is unsound on some
graphs, is kept off every graph that passes here, by a configuration that is scoped to the compilation.
"""

from __future__ import annotations

import contextlib
import difflib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch.fx import GraphModule

from attncomp.codegen.cache import configure_default_cache
from attncomp.codegen.fingerprint import sources_fingerprint
from attncomp.codegen.variants import VARIANTS
from attncomp.errors import AttncompError, OptionsError
from attncomp.executor import eager
from attncomp.kept_values import while_kept
from attncomp.passes.rewrite import Rewritten, rewrite
from attncomp.policy import Policy, check_variants, load_policy
from attncomp.report import Report, record

log = logging.getLogger("attncomp")

OWN_OPTIONS = ("policy", "executor", "verify")
EXECUTORS = ("inductor", "eager")

_policies: dict[str, Policy] = {}
_warned: set[str] = set()


def attncomp(
    graph: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph; called by ``torch.compile(..., backend="attncomp")``.

    Args:
        graph: Dynamo's graph. example_inputs: its fake inputs.
        mode: as for inductor: ``default``, ``reduce-overhead``, ``max-autotune``, ``max-autotune-no-cudagraphs``.
        options: ``policy`` (path, preset or dict), ``executor`` (``inductor`` or ``eager``), ``verify`` (also compare
            every rewritten site with the original on random inputs while compiling); every other key goes to
            inductor's configuration.

    Raises:
        OptionsError, PolicyError: the user's options or policy are wrong.
    """
    own, inductor_options = _split_options(options or {})
    check_values = bool(own.get("verify", False))
    one_plan = ""
    if _records_cuda_graphs(example_inputs, mode, inductor_options):
        one_plan = "branches would cut the CUDA graphs into pieces"

    def compiled(result: Rewritten) -> Callable[..., Any]:
        return _executed(result, graph, example_inputs, own.get("executor", "inductor"), mode, inductor_options)

    result = run_passes(graph, example_inputs, own.get("policy"), check_values=check_values, one_plan=one_plan)
    try:
        made = compiled(result)
    except torch._dynamo.exc.RestartAnalysis:  # Dynamo's way to begin again with what it has learnt
        raise
    except Exception as error:  # torch's operator for branches is young: the model must not pay for it
        if not any(s.lengths for s in result.report.sites):
            record(result.report)
            raise
        log.info("a graph with plans by length was not compiled, and gets one plan for each site", exc_info=True)
        one_plan = f"torch did not compile the branches ({type(error).__name__})"
        result = run_passes(graph, example_inputs, own.get("policy"), check_values=check_values, one_plan=one_plan)
        made = compiled(result)
    record(result.report)
    return made


def _executed(
    result: Rewritten,
    graph: GraphModule,
    example_inputs: Sequence[Any],
    executor: str,
    mode: str | None,
    options: Mapping[str, Any],
) -> Callable[..., Any]:
    """What the passes made of a graph, compiled; the graph itself where nothing was rewritten."""
    target = graph
    lifted: tuple[torch.Tensor, ...] = ()
    if result.report.fallback is not None:
        _warn_once(result.report.fallback)
    elif result.captured is None:
        pass  # nothing in the graph can be attention
    elif any(s.verdict == "rewritten" for s in result.report.sites):
        target, lifted = result.captured.graph, result.captured.lifted
    inputs = [*lifted, *example_inputs]
    compiled = eager(target) if executor == "eager" else _inductor(target, inputs, mode, options)
    whole = (lambda *args: compiled(*lifted, *args)) if lifted else compiled
    return while_kept(whole, graph, example_inputs, result.kept) if target is not graph and result.kept else whole


def _records_cuda_graphs(inputs: Sequence[Any], mode: str | None, options: Mapping[str, Any]) -> bool:
    wanted = options.get("triton.cudagraphs", mode in ("reduce-overhead", "max-autotune"))
    return bool(wanted) and any(isinstance(x, torch.Tensor) and x.is_cuda for x in inputs)


def run_passes(
    graph: GraphModule,
    example_inputs: Sequence[Any],
    policy: Any,
    *,
    check_values: bool = False,
    apply: bool = True,
    one_plan: str = "",
) -> Rewritten:
    """Every pass over one Dynamo graph, with the installed variants; the options are those of `rewrite`."""
    loaded = load_policy(policy)
    check_variants(loaded, [v.name for v in VARIANTS])
    if loaded.cache.dir is not None or loaded.cache.max_size is not None:
        configure_default_cache(loaded.cache.dir, loaded.cache.max_size)
    fingerprint = sources_fingerprint()
    try:
        return rewrite(
            graph,
            example_inputs,
            policy=loaded,
            variants=VARIANTS,
            fingerprints={v.name: fingerprint for v in VARIANTS},
            check_values=check_values,
            apply=apply,
            one_plan=one_plan,
        )
    except AttncompError:
        raise
    except Exception as error:  # never worse: a fault of ours leaves the model to inductor
        log.exception("attncomp failed on a graph, which goes to inductor as it is")
        return Rewritten(None, Report((), f"error: {type(error).__name__}: {error}", policy=loaded.canonical()))


def _split_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    import torch._inductor.config as inductor_config  # inductor takes seconds to import: only while compiling

    own = {k: v for k, v in options.items() if k in OWN_OPTIONS}
    rest = {k.replace("-", "_"): v for k, v in options.items() if k not in OWN_OPTIONS}
    known = inductor_config.get_config_copy()
    for key in rest:
        if key not in known:
            near = difflib.get_close_matches(key, [*OWN_OPTIONS, *known], n=1)
            hint = (
                f'Did you mean "{near[0]}"'
                if near
                else f"attncomp's own are {', '.join(OWN_OPTIONS)}; all others are inductor's"
            )
            raise OptionsError(f'unknown option "{key}"', where="torch.compile options", fix=hint)
    executor = own.get("executor", "inductor")
    if executor not in EXECUTORS:
        raise OptionsError(
            f'"executor" is {executor!r}', where="torch.compile options", fix=f"Use one of {', '.join(EXECUTORS)}"
        )
    return own, rest


_SOFTMAX_PARTS = ("softmax", "exp", "scaled_dot_product")


def may_be_matched(graph: GraphModule) -> bool:
    """Whether inductor's attention matcher could find anything: each of its patterns holds a softmax or its pieces."""
    for module in graph.modules():
        if isinstance(module, GraphModule):
            for node in module.graph.nodes:
                called = f"{node.target} {getattr(node.target, '__name__', '')}"
                if node.op.startswith("call_") and (
                    node.op == "call_module" or any(part in called for part in _SOFTMAX_PARTS)
                ):
                    return True
    return False


def inductor_guard(graph: GraphModule) -> dict[str, Any]:
    """Inductor settings that keep its attention matcher off a graph: the pass with its patterns, switched off by name.

    The pass holds other patterns too, so it stays on where nothing in the graph could be taken for attention. The
    setting is part of inductor's cache keys and holds for one compilation only; nothing changes for other users of
    inductor.
    """
    if not may_be_matched(graph):
        return {}
    import torch._inductor.config as inductor_config

    if hasattr(inductor_config, "disabled_passes"):
        already = inductor_config.disabled_passes
        return {"disabled_passes": f"{already},PASS_PATTERN_0" if already else "PASS_PATTERN_0"}
    return {"pattern_matcher": False}


def _inductor(
    graph: GraphModule, inputs: Sequence[Any], mode: str | None, options: Mapping[str, Any]
) -> Callable[..., Any]:
    from torch._inductor import list_mode_options  # seconds to import, and the eager executor does without it
    from torch._inductor.compile_fx import compile_fx

    from attncomp.codegen.inductor_calls import call_directly

    call_directly()
    patches = inductor_guard(graph)
    if mode is not None and mode != "default":
        patches |= list_mode_options(mode)
    disabled = [p["disabled_passes"] for p in (patches, options) if p.get("disabled_passes")]
    patches |= dict(options)
    if disabled:
        patches["disabled_passes"] = ",".join(dict.fromkeys(disabled))
    return cast("Callable[..., Any]", compile_fx(graph, list(inputs), config_patches=patches))


def _warn_once(reason: str) -> None:
    code = reason.split(":")[0]
    if code in _warned:
        return
    _warned.add(code)
    warnings.warn(
        f"attncomp left a graph to inductor as it is ({reason}). The model runs and is right; its attention is not "
        "rewritten. attncomp.reports() has the details.",
        stacklevel=2,
    )


@contextlib.contextmanager
def forget_warnings() -> Any:
    """Let every fallback warn again inside the block (for tests)."""
    saved = set(_warned)
    _warned.clear()
    try:
        yield
    finally:
        _warned.clear()
        _warned.update(saved)


# A compiled module asks its backend for the settings it was compiled with (`OptimizedModule.get_compiler_config`); they
# are inductor's.
_backend: Any = attncomp  # a function's type has no such attribute
_backend.get_compiler_config = lambda: torch._inductor.config.get_config_copy()
