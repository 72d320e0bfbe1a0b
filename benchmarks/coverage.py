"""How much of transformers' attention is found, proven and rewritten: every model type, in every mode.

``PYTHONPATH=. python benchmarks/coverage.py --results sweep.jsonl`` appends one row for each model type and mode, and
goes on where it stopped; ``--report docs/coverage.md`` renders what the file holds. Every model type gets a process of
its own, so that a crash or a model that takes too long costs its rows only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.coverage_graphs import Seen, observer
from benchmarks.coverage_models import model_types
from benchmarks.coverage_modes import Mode, chosen_modes, run_modes

TIMEOUT = 240
"""Seconds of processor time for all modes of a model type."""
WAIT = 6
"""Times as many seconds pass before a process is ended that does not use the processor, or shares it."""
MEMORY = 10 * 2**30


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("coverage.jsonl"), help="rows are appended to this file")
    parser.add_argument("--only", default=".", help="a regular expression that a model type must match")
    parser.add_argument(
        "--modes", default="^(eager|sdpa|diffusers)/", help="a regular expression: attention/shapes/phase"
    )
    parser.add_argument("--shard", default="1/1", help="i/n: every n-th model type, from the i-th")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timeout", type=int, default=TIMEOUT, help="seconds of processor time for a model type")
    parser.add_argument("--device", default="cpu", help="cpu or cuda; inductor's matches are counted on cpu alone")
    parser.add_argument("--report", type=Path, help="render the results to this file, and run nothing")
    chosen = parser.parse_args(arguments)
    if chosen.report is not None:
        from benchmarks.coverage_report import render

        chosen.report.write_text(render(read(chosen.results)))
        return 0
    shard, shards = (int(x) for x in chosen.shard.split("/"))
    names = [n for n in model_types() if re.search(chosen.only, n)][shard - 1 :: shards]
    wanted = {n: chosen_modes(chosen.modes, n) for n in names}
    sweep(wanted, chosen.results, chosen.workers, chosen.timeout, chosen.device)
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    """The last row of each model type and mode."""
    rows = {}
    if path.exists():
        for line in path.read_text().splitlines():
            row = json.loads(line)
            rows[row["model"], row["mode"]] = row
    return list(rows.values())


def sweep(modes: Mapping[str, Sequence[Mode]], results: Path, workers: int, timeout: int, device: str = "cpu") -> None:
    """Run what `results` lacks, `workers` model types at a time."""
    done = {(r["model"], r["mode"]) for r in read(results)}
    todo = [(n, [m for m in wanted if (n, str(m)) not in done]) for n, wanted in modes.items()]
    todo = [(n, m) for n, m in todo if m]
    random.Random(0).shuffle(todo)  # a sweep that is cut short has seen all kinds of models
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a backward pass would start CUDA's driver, beyond the limit on memory
        prepare()
    commit = revision()
    running: dict[int, tuple[str, list[Mode], float, Path]] = {}
    while todo or running:
        while todo and len(running) < workers:
            name, wanted = todo.pop(0)
            part = results.with_name(f".{results.name}.{os.getpid()}.{len(todo)}")
            part.write_text("")
            pid = begin(name, wanted, part, commit, timeout, device)
            running[pid] = (name, wanted, time.monotonic(), part)
        time.sleep(0.05)
        for pid, (name, wanted, start, part) in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            slow = time.monotonic() - start > WAIT * timeout
            if not ended and slow:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            if ended or slow:
                del running[pid]
                spent = slow or (os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL))
                why = f"no answer after {timeout} s" if spent else f"the process ended with status {status}"
                finish(name, wanted, part, results, why)


def finish(name: str, wanted: list[Mode], part: Path, results: Path, why: str) -> None:
    """Add a process's rows to the results, and a row for the first mode that is missing."""
    lines = [x for x in part.read_text().splitlines() if x.endswith("}")]
    why = " | ".join([why, *last_words(part)])
    part.unlink()
    errors_of(part).unlink(missing_ok=True)
    have = {json.loads(x)["mode"] for x in lines}
    for n, mode in enumerate(m for m in wanted if str(m) not in have):
        said = why if n == 0 else "an earlier mode did not end"
        lines.append(
            json.dumps({"model": name, "mode": str(mode), "status": "crashed" if n == 0 else "not run", "why": said})
        )
    with results.open("a") as file:
        file.write("".join(x + "\n" for x in lines))
    states = [json.loads(x) for x in lines]
    said = ", ".join(f"{r['mode']}: {r['status']} {counts(r)}".strip() for r in states)
    print(f"{name}: {said}", flush=True)


def errors_of(part: Path) -> Path:
    """Where the process that writes `part` has its standard error."""
    return part.with_name(f"{part.name}.err")


def last_words(part: Path) -> list[str]:
    """The last lines of a process's standard error: what a library said before it ended the process."""
    path = errors_of(part)
    return path.read_text(errors="replace").splitlines()[-3:] if path.exists() else []


def revision() -> str:
    """The commit that is measured; empty outside a checkout."""
    here = Path(__file__).resolve().parent
    asked = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=here, capture_output=True, text=True, check=False
    )
    return asked.stdout.strip()


def counts(row: dict[str, Any]) -> str:
    sites = [s for s in row.get("sites", ()) if not s["kind"].startswith("more")]
    return f"{sum(s['verdict'] == 'rewritten' for s in sites)}/{len(sites)}" if row["status"] == "ran" else ""


def prepare() -> None:
    """Import what every child needs: a forked process has it at once."""
    torch.set_num_threads(1)
    from torch._inductor.fx_passes import joint_graph

    for name in ("auto.modeling_auto", "llama.modeling_llama", "vit.modeling_vit"):
        importlib.import_module(f"transformers.models.{name}")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    joint_graph.lazy_init(torch.device("cpu"))
    warm_up()


def warm_up() -> None:
    """Compile something small, so that what torch and attncomp import and cache on first use is there for all."""
    layer = torch.nn.MultiheadAttention(8, 2)
    x = torch.randn(2, 4, 8)

    def attention(x: torch.Tensor) -> torch.Tensor:
        q, k, v = layer.in_proj_weight.matmul(x.mT).mT.unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        weighted: torch.Tensor = (q @ k.mT).softmax(-1) @ v
        return weighted + torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    compiled = torch.compile(attention, backend=observer(Seen()), dynamic=False)
    with torch.no_grad():
        compiled(x)
    if not torch.backends.cuda.is_built():  # there, a backward starts threads that no fork survives
        compiled(x).sum().backward()
    torch._dynamo.reset()


def begin(name: str, modes: list[Mode], part: Path, commit: str, timeout: int, device: str) -> int:
    """A process for one model type; its number. CUDA does not survive a fork: there, it is a new interpreter."""
    if device == "cpu":
        pid = os.fork()
        if pid == 0:
            child(name, modes, part, commit, timeout, device)
        return pid
    pattern = "|".join(f"^{mode}$" for mode in modes)
    code = "import sys; from benchmarks.coverage import new_interpreter; new_interpreter(*sys.argv[1:])"
    command = [sys.executable, "-c", code, name, pattern, str(part), commit, str(timeout), device]
    return os.posix_spawn(sys.executable, command, os.environ)


def new_interpreter(name: str, pattern: str, part: str, commit: str, timeout: str, device: str) -> None:
    """What `begin` runs where it can not fork."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False
    logging.getLogger("transformers").setLevel(logging.ERROR)
    child(name, chosen_modes(pattern, name), Path(part), commit, int(timeout), device)


def child(name: str, modes: list[Mode], part: Path, commit: str, timeout: int, device: str) -> None:
    """In the process of a model type: write a row after each mode, then end without any clean-up."""
    code = 1
    try:
        if device == "cpu":  # CUDA's driver maps more than it uses
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (timeout, timeout))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(os.open(errors_of(part), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
        with part.open("a") as file:
            for row in run_modes(name, modes, device):
                file.write(json.dumps(row | {"commit": commit, "torch": torch.__version__}) + "\n")
                file.flush()
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    sys.exit(main())
