"""Attention in the code that inductor generates: a call of a Python function instead of an operator.

A call of an operator goes through torch's dispatcher, through the Python wrapper of its autograd formula, and through
the dispatcher again: more host time than everything else that a short attention needs. In inductor's code nothing is
left for them to do: gradients, modes and subclasses were dealt with when the graph was made. So the operators get a
lowering of their own, that of every operator which inductor does not know but for the name of what is called, with an
import of that name at the head of the generated code. Such code is kept in inductor's caches like any other, and runs
in a process that never saw this module.
"""

from __future__ import annotations

import logging
import threading
from functools import lru_cache
from typing import Any

import torch

from attncomp.codegen import ops

log = logging.getLogger("attncomp")

_lock = threading.Lock()
_CALLED: dict[Any, tuple[str, str]] = {
    torch.ops.attncomp.attention.default: (ops.run_attention.__name__, "attncomp_attention"),
    torch.ops.attncomp.attention_backward.default: (ops.run_attention_backward.__name__, "attncomp_attention_backward"),
}
"""The function in `ops` that is called for an operator, and its name in generated code."""


def call_directly() -> None:
    """Let inductor's code call attncomp's functions, and go on to call the operators where inductor looks different."""
    with _lock:
        _register()


@lru_cache(maxsize=1)
def _register() -> None:
    try:
        from torch._inductor.lowering import fallbacks, register_lowering

        kernel = _kernel_class()
        for op in _CALLED:
            fallbacks.add(op)
            register_lowering(op, type_promotion_kind=None)(_lowering(op, kernel))
    except (ImportError, AttributeError, TypeError):
        log.debug("inductor's code will call attncomp's operators", exc_info=True)


def _lowering(op: Any, kernel: Any) -> Any:
    from torch._inductor import ir
    from torch.utils._pytree import tree_map

    def boxed(x: Any) -> Any:
        if not isinstance(x, ir.IRNode):
            return x
        return x.wrap_for_lowering() if hasattr(x, "wrap_for_lowering") else ir.TensorBox.create(x)

    def lower(*args: Any, **kwargs: Any) -> Any:
        return tree_map(boxed, kernel.create(op, *args, **kwargs))

    lower._is_fallback_handler = True  # type: ignore[attr-defined]  # inductor's mark: the graph's node becomes one call
    return lower


def _kernel_class() -> Any:
    from torch._inductor import ir
    from torch._inductor.virtualized import V

    class AttentionCall(ir.FallbackKernel):
        """A call of a function that `_CALLED` names."""

        def codegen(self, wrapper: Any) -> None:
            root = wrapper  # what a part of a graph imports is not written down
            while hasattr(root, "parent_wrapper"):
                root = root.parent_wrapper
            other_language = V.graph.cpp_wrapper or getattr(V.graph, "fx_wrapper", False)
            if hasattr(root, "add_import_once") and not other_language:
                function, name = _CALLED[self.op_overload]
                root.add_import_once(f"from {ops.__name__} import {function} as {name}")
                self.python_kernel_name = name
            super().codegen(wrapper)

    return AttentionCall
