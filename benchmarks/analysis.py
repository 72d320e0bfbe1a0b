"""Seconds of analysis, by stage, beside inductor's cold compile of the same graph: ``python benchmarks/analysis.py``.

A Llama-shaped model of 32 layers with random weights. Each row is two fresh processes with inductor's caches off: one
analyses (capture, lift, choose, lower), one compiles the graph as it is with inductor.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ATTENTION, SHAPES, MODES = ("eager", "sdpa"), ("static", "dynamic"), ("inference", "training")


def model(attention: str, layers: int) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention)


def one(what: str, attention: str, shapes: str, mode: str, layers: int) -> dict[str, float]:
    """Seconds by stage (`what` is analysis), or of inductor's compile (forward and, in training, backward)."""
    import torch

    from attncomp.backend import run_passes

    found: dict[str, float] = {}

    def analysis(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        report = run_passes(graph, inputs, {"version": 1, "defaults": {"min_speedup": 0}}).report
        found.update(report.stages)
        found["sites"] = len(report.sites)
        found["rewritten"] = sum(s.verdict == "rewritten" for s in report.sites)
        return graph.forward

    def inductor(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        from torch._inductor.compile_fx import compile_fx

        start = time.perf_counter()
        made = compile_fx(graph, list(inputs))
        found["inductor"] = time.perf_counter() - start
        return made

    training = mode == "training"
    built = model(attention, layers).train(training)
    backend = analysis if what == "analysis" else inductor
    made: Any = torch.compile(built, backend=backend, dynamic=True if shapes == "dynamic" else None)
    with contextlib.nullcontext() if training else torch.no_grad():
        out = made(input_ids=torch.randint(0, 128, (2, 64)), use_cache=False).logits
    if training and what == "inductor":
        start = time.perf_counter()
        torch.autograd.backward(out.sum())  # its first call compiles
        found["inductor"] += time.perf_counter() - start
    return found


def fresh(*arguments: str) -> dict[str, float]:
    """`one` in a process of its own, with caches of its own that stay off."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "PYTHONPATH": os.pathsep.join(
                [str(Path(__file__).resolve().parent.parent), os.environ.get("PYTHONPATH", "")]
            ),
        }
        command = [sys.executable, __file__, "--one", *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--only", default="", help="rows whose name holds this, such as 'sdpa dynamic'")
    parser.add_argument("--one", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.one:
        what, attention, shapes, mode, layers = options.one
        print(json.dumps(one(what, attention, shapes, mode, int(layers))))
        return
    print("| graph | sites rewritten | capture s | lift s | choose s | lower s | analysis s | inductor s | share |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for attention in ATTENTION:
        for shapes in SHAPES:
            for mode in MODES:
                name = f"{attention} {shapes} {mode}"
                if options.only not in name:
                    continue
                own = fresh("analysis", attention, shapes, mode, str(options.layers))
                other = fresh("inductor", attention, shapes, mode, str(options.layers))["inductor"]
                stages = [own[s] for s in ("capture", "lift", "choose", "lower")]
                cells = " | ".join(f"{s:.2f}" for s in (*stages, sum(stages)))
                sites = f"{own['rewritten']:.0f} of {own['sites']:.0f}"
                print(f"| {name} | {sites} | {cells} | {other:.1f} | {sum(stages) / other:.1%} |", flush=True)


if __name__ == "__main__":
    main()
