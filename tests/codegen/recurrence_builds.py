"""Compiling the generated kernels of a recurrence for a GPU that is not here: shared memory and spilled registers."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from attncomp.codegen.compile import cross_compile
from attncomp.codegen.recurrence_form import RecurrenceForm, recognise_form
from attncomp.codegen.recurrence_kernel_form import KernelForm, kernel_form
from attncomp.codegen.recurrence_source import Shape, recurrence_source
from attncomp.codegen.recurrence_triton import options_of
from attncomp.codegen.variants.chunked_recurrence import CHUNKED_RECURRENCE, tiles_for
from attncomp.plan import Plan
from tests.codegen.linear_cases import causal_proof
from tests.codegen.recurrence_cases import make_case

ELEMENT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
INPUTS = ("q", "k", "v", "grad", "out", "dq", "dk", "dv")
WORKED = ("qin", "kout", "kin", "pairs", "lowers", "system", "before", "behind", "made", "erased", "dpairs", "dlowers")


def compiled(
    name: str, dtype: str, width: int, capability: int, shared: int, changes: dict[str, Any], only: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The compiled kernels of one case, by name."""
    from triton.backends.compiler import GPUTarget

    spec = make_case(name, dtype=dtype, gate_dtype="float32", width=width, heads=4, length=256).spec
    plan = Plan(spec, causal_proof(spec), CHUNKED_RECURRENCE.name, {**tiles_for(spec, shared), **changes})
    whole = recognise_form(spec)
    assert isinstance(whole, RecurrenceForm)
    form = kernel_form(spec, whole)
    assert isinstance(form, KernelForm), form
    shape = Shape.of(plan, form)
    kernels, constants, multiples, options = {}, {}, {}, {}
    for kernel in only or shape.kernels:
        tensors, numbers = shape.tensors(kernel), shape.numbers(kernel)
        kinds = {
            t: ELEMENT[dtype] if t in INPUTS else "bf16" if t in WORKED and dtype == "bfloat16" else "fp32"
            for t in tensors
        }
        kernels[kernel] = {**{t: f"*{k}" for t, k in kinds.items()}, **dict.fromkeys(numbers, "i32")}
        constants[kernel] = {n: 1 for n in numbers if n.endswith("_x")}
        multiples[kernel] = tuple(n for n in numbers if n[-2:] in ("_b", "_h", "_t"))
        options[kernel] = {"num_warps": 1, "num_stages": 1} if kernel == "sum_gates" else options_of(plan, kernel)
    source = recurrence_source(plan, form)
    return cross_compile(
        source, kernels, GPUTarget("cuda", capability, 32), constants=constants, options=options, multiples=multiples
    )


def resources(kernel: Any) -> dict[str, int]:
    """Registers, bytes of a thread's stack (what does not fit the registers) and shared memory of a compiled kernel."""
    import triton.backends.nvidia

    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        code = Path(folder) / "kernel.cubin"
        code.write_bytes(kernel.asm["cubin"])
        said = subprocess.run([tool, "-res-usage", code], capture_output=True, text=True, check=True).stdout
    stack, registers = (max(int(n) for n in re.findall(rf"{what}:(\d+)", said)) for what in ("STACK", "REG"))
    return {"registers": registers, "stack": stack, "shared": int(kernel.metadata.shared)}
