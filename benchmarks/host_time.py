"""Host time of one call: what the Python and the driver around a short attention cost, in microseconds.

Many calls of a tiny shape (batch 1, 8 heads of width 64, 128 tokens, bfloat16, causal, scores capped at 50) are queued,
and the clock is read before the device is waited for; each number is the median over the repetitions. The first table
compares whole calls: torch's SDPA (causal, without the cap), attncomp's operator called eagerly, and both in functions
that are compiled. The second takes a call of the generated kernel apart:

    function        what inductor's code calls
    straight call   of a call that repeats an earlier one: a check of that, addresses, allocation, launches
    check           of it, in C
    allocation      of the results alone
    launcher in C   of the kernels of the pass, called with their arguments
    one argument    of a kernel that does nothing, the least that the driver and Triton's function in C take
    first kind      a call that repeats none of the last: signature, lookup, allocation, launches
    signature       of it, how the tensors lie in memory, and their addresses
    tensor maps     of one launch, made anew, as where addresses are met for the first time
    Triton's way    the same launch as Triton documents it, through `compiled[grid](*args)`
    preparing       what is done once for each way that tensors lie in memory

Without a CUDA device (``--device cpu``) nothing is launched: the numbers are those of attncomp's own Python alone.

Run with ``PYTHONPATH=. python benchmarks/host_time.py``.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import attncomp
from attncomp.codegen import launch, ops
from attncomp.codegen.fingerprint import sources_fingerprint
from attncomp.codegen.prepared import signature
from attncomp.codegen.straight_calls import layout_check
from attncomp.codegen.tiled_launch import kernels_of
from attncomp.codegen.triton_calls import DirectCall
from attncomp.codegen.variants.tiled import TILED
from attncomp.expr import Const, Score, ge, mul, op
from attncomp.hardware import H100_SXM, detect
from attncomp.passes.prove import prove
from attncomp.plan import Plan
from attncomp.spec import AXES, I, J, plain_spec
from attncomp.variant import Rejection, Request
from benchmarks import measure as m

HEADS, LENGTH, WIDTH, CAP = 8, 128, 64, 50.0
POLICY = {"version": 1, "defaults": {"min_speedup": 0, "variants": ["tiled"]}}
Call = Callable[[], Any]


def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention that is measured, as a model writes it."""
    n = q.shape[2]
    i = torch.arange(n, device=q.device)
    scores = CAP * torch.tanh(q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 / CAP))
    scores = scores.masked_fill(i[:, None] < i[None, :], float("-inf"))
    return torch.softmax(scores.float(), -1).to(q.dtype) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def plan_of(device: str, dtype: torch.dtype, *, training: bool) -> Plan:
    """The plan of the variant ``tiled`` for `capped`; on a CPU, that of an H100."""
    spec = plain_spec(
        batch=1,
        heads=HEADS,
        query=LENGTH,
        key=LENGTH,
        width=WIDTH,
        dtype=str(dtype).removeprefix("torch."),
        program=mul(op("tanh", mul(Score(), Const(WIDTH**-0.5 / CAP))), Const(CAP)),
        mask=ge(I, J),
        training=training,
    )
    hardware = detect(device) if device == "cuda" else H100_SXM
    hints = dict(zip(AXES, (1, HEADS, LENGTH, LENGTH, WIDTH, WIDTH), strict=True))
    request = Request(spec, prove(spec.mask, spec.extents), "cuda", hardware, hints)
    offer = TILED.accept(request)
    if isinstance(offer, Rejection):
        raise SystemExit(f"tiled does not take the attention that is measured: {offer}")
    return Plan(spec, request.proof, TILED.name, offer.params, sources_fingerprint())


def host_us(call: Call, device: str, calls: int, repetitions: int) -> float:
    """Microseconds of host time for one of `calls` calls in a row, the median over the repetitions."""
    warm = time.perf_counter() + (0.0 if calls < 10 else 0.1)  # a processor that idled is slow at first
    for n in range(10_000):
        if n >= 3 and time.perf_counter() > warm:
            break
        call()
    times = []
    for _ in range(repetitions):
        m.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        times.append((time.perf_counter() - start) / calls * 1e6)
    m.synchronize(device)
    return statistics.median(times)


def with_gradients(call: Callable[..., Tensor], inputs: Sequence[Tensor]) -> Call:
    """Forward and backward of `call`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    direction = torch.randn_like(inputs[0])
    return lambda: torch.autograd.grad(call(*leaves), leaves, direction)


def whole_calls(inputs: list[Tensor], digest: str, device: str) -> dict[str, tuple[Call, Call]]:
    """name → (forward, forward and backward)."""

    def operator(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.attncomp.attention(q, k, v, [], [], digest)[0]
        return out

    functions: dict[str, Callable[..., Tensor]] = {"SDPA, eager": sdpa, "attncomp's operator, eager": operator}
    if device == "cuda":
        functions["SDPA, inductor"] = torch.compile(sdpa)
        functions["capped, attncomp"] = m.compiled(capped, "attncomp", {"policy": POLICY})
    return {name: (partial(f, *inputs), with_gradients(f, inputs)) for name, f in functions.items()}


def layers(plan: Plan, inputs: list[Tensor], digest: str, *, backward: bool) -> dict[str, Call]:
    """name → one layer of a pass, alone."""
    q, k, v = inputs
    kernels = kernels_of(ops.resolve(digest)[0])
    out, lse = ops.run_attention(q, k, v, [], [], digest)
    tensors = [q, k, v, out, torch.randn_like(out), lse] if backward else [q, k, v]
    calls = kernels.backwards if backward else kernels.forwards
    prepare = kernels.backward if backward else kernels.forward

    def whole() -> Any:
        if backward:
            return ops.run_attention_backward(tensors[4], out, lse, q, k, v, [], [], digest)
        return ops.run_attention(q, k, v, [], [], digest)

    whole()
    key, _ = signature(tensors, [])
    call = calls.memo.get(key)
    assert call is not None
    whole()
    every = tensors + [output.allocate() for output in call._outputs]
    addresses = [t.data_ptr() for t in every]
    stream = launch.current_stream(call._index)
    results = [output for output in call._outputs[: call.results] if not output.shared]
    found: dict[str, Call] = {"function": whole}
    straight, check = call.straight(tensors), layout_check(tensors)
    if straight is not None and check is not None:
        found["straight call"] = lambda: straight(*tensors)
        found["check"] = lambda: check(*tensors)
    found[f"allocation ({len(results)})"] = lambda: [output.allocate() for output in results]
    launches = []
    for one in call._launches:
        direct = one.direct
        if direct is not None:
            given = [x for (n, box), f in zip(one.boxes, direct.describe, strict=False) for x in f(box.of(every[n]))]
            given += [*(addresses[n] for n in one._taken), *one._numbers]
            text, names = direct.text("grid", "stream", ["*given"], "")
            space = {"grid": one._grid, "stream": stream, "given": given, **names}
            launches.append(eval(f"lambda: {text}", space))
    if launches:
        found[f"launcher in C ({len(launches)})"] = lambda: [one() for one in launches]
    found["first kind"] = lambda: calls.run(tensors, [])
    found["signature"] = lambda: signature(tensors, [])
    first = call._launches[0]
    if first.direct is not None and first.boxes:
        boxes = list(zip(first.boxes, first.direct.describe, strict=False))
        found[f"tensor maps ({len(boxes)})"] = lambda: [describe(box.of(every[n])) for (n, box), describe in boxes]
    values = [*(box.of(every[n]) for n, box in first.boxes), *(every[n] for n in first._taken), *first._numbers]
    found["Triton's way"] = lambda: first._code.launch(first._grid, values, False)
    found["preparing"] = lambda: prepare(tensors, [])
    return found


def _nothing() -> Any:
    """A kernel of one argument that does nothing."""
    import triton

    @triton.jit
    def nothing(x):  # type: ignore[no-untyped-def]  # Triton would look for the annotation's name in the kernel
        pass

    return nothing


def least_launch() -> Call:
    """Launches a kernel that does nothing as a straight call launches one."""
    one = launch.Launch(_nothing(), 4)
    x = torch.empty(16, device="cuda")
    for _ in range(2):
        one(1, [x], [])
    device, pointer = torch.cuda.current_device(), x.data_ptr()
    direct = one.code(device, [(True, x.dtype, device)], []).direct
    assert direct is not None
    text, names = direct.text("1", "stream", ["pointer"], "")
    call: Call = eval(f"lambda: {text}", {"stream": launch.current_stream(device), "pointer": pointer, **names})
    return call


def without_launches() -> None:
    """Let kernels be called that do nothing: on a CPU there is nothing to run them."""

    def pretend(code: launch.Code, grid: int, values: Sequence[Any], interpreted: bool) -> None:
        code.direct = DirectCall(None, lambda *args: None, (None,) * 8, (None,) * 2, [lambda box: [None] * 9] * 8)

    code: Any = launch.Code  # a method of a class is not to be replaced elsewhere
    code.launch = pretend


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--calls", type=int, default=200, help="calls in a row; few enough for the device's queue")
    parser.add_argument("--runs", type=int, default=30, help="repetitions, of which the median is taken")
    parser.add_argument("--tiny", action="store_true", help="few calls, to check the script")
    args = parser.parse_args(arguments)
    calls = 5 if args.tiny else args.calls
    dtype = torch.bfloat16
    if args.device == "cpu":
        without_launches()
    inputs = [torch.randn(1, HEADS, LENGTH, WIDTH, dtype=dtype, device=args.device) for _ in range(3)]
    plan = plan_of(args.device, dtype, training=True)
    digest = ops.register_plan(plan)

    def us(call: Call) -> str:
        return f"{host_us(call, args.device, calls, args.runs):.1f}"

    m.say(f"{m.conditions(args.device)}; microseconds of host time for one call\n")
    rows = []
    before = len(attncomp.reports())
    for name, (forward, both) in whole_calls(inputs, digest, args.device).items():
        with torch.no_grad():
            without = us(forward)
        rows.append([name, without, us(both)])
    m.say(m.table(["whole calls", "forward", "forward and backward"], rows))
    if args.device == "cuda":
        m.say(f"\ncapped: {m.report_summary(m.reports_since(before))}")
    with torch.no_grad():
        alone = plan_of(args.device, dtype, training=False)
        for title, of, backward in (
            ("layers of the forward pass, no gradients", alone, False),
            ("layers of the forward pass", plan, False),
            ("layers of the backward pass", plan, True),
        ):
            found = layers(of, inputs, ops.register_plan(of), backward=backward)
            if args.device == "cuda":
                found["one argument"] = least_launch()
            m.say("\n" + m.table([title, "µs"], [[name, us(call)] for name, call in found.items()]))


if __name__ == "__main__":
    main()
