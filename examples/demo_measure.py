"""One row of the demo's table, in a process of its own: load the model, run it one way, write what was seen.

The request and the answer are JSON; logits travel as a ``.pt`` file. Lines starting with ``step:`` on stdout say
what is being done.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo_model
import psutil
import torch

NEW_TOKENS = 32
RUNS = 2


class PeakMemory:
    """Highest resident memory of this process while the block runs, above what was resident when it began (bytes)."""

    def __enter__(self) -> PeakMemory:
        gc.collect()
        self._process = psutil.Process()
        self._before = self._process.memory_info().rss
        self._peak = self._before
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._done.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._done.wait(0.005):
            self._peak = max(self._peak, self._process.memory_info().rss)

    @property
    def bytes(self) -> int:
        return self._peak - self._before


def greedy(model: Any, prompt: torch.Tensor, count: int) -> list[int]:
    """``count`` tokens after ``prompt`` (1, n), each the most probable one, decoded step by step with a KV cache."""
    chosen: list[int] = []
    cache, ids = None, prompt
    for _ in range(count):
        out = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1].argmax(-1, keepdim=True)
        chosen.append(int(ids))
    return chosen


def checked_positions(length: int) -> torch.Tensor:
    """Positions whose logits are compared: every ninth of the text, and all that predict a greedy token."""
    first = length - NEW_TOKENS - 1
    return torch.cat([torch.arange(0, first, 9), torch.arange(first, length - 1)])


def timed(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """What ``call`` returns, and the seconds it took."""
    start = time.perf_counter()
    value = call()
    return value, time.perf_counter() - start


def measure(request: dict[str, Any]) -> dict[str, Any]:
    """Run the model one way. ``request``: attention, backend (or null), ids, model, logits, decode."""
    print("step: loading", flush=True)
    model = demo_model.load(Path(request["model"]), request["attention"])
    ids = torch.tensor([request["ids"]])
    answer: dict[str, Any] = {}
    with torch.inference_mode():
        if request["decode"]:
            print(f"step: decoding {NEW_TOKENS} tokens greedily", flush=True)
            answer["greedy"] = greedy(model, ids, NEW_TOKENS)
            ids = torch.cat([ids, torch.tensor([answer["greedy"]])], dim=1)
        keep = checked_positions(ids.shape[1])
        run = model
        if request["backend"]:
            run = torch.compile(model, backend=request["backend"])

        def forward() -> torch.Tensor:
            logits: torch.Tensor = run(ids, use_cache=False, logits_to_keep=keep).logits
            return logits

        print("step: first call" + (" (compiles)" if request["backend"] else ""), flush=True)
        logits, answer["first_s"] = timed(forward)
        torch.save(logits[0].clone(), request["logits"])
        del logits
        print(f"step: timing {RUNS} calls", flush=True)
        with PeakMemory() as peak:
            seconds = [timed(forward)[1] for _ in range(RUNS)]
        answer |= {"run_s": statistics.median(seconds), "peak_bytes": peak.bytes}
    if request["backend"] == "attncomp":
        import attncomp

        reports = attncomp.reports()
        answer["report"] = "\n".join(map(str, reports))
        answer["sites"] = [{"verdict": site.verdict, "mask": site.mask} for report in reports for site in report.sites]
    return answer


def main() -> None:
    request_path, answer_path = sys.argv[1:]
    answer = measure(json.loads(Path(request_path).read_text(encoding="utf-8")))
    Path(answer_path).write_text(json.dumps(answer), encoding="utf-8")


if __name__ == "__main__":
    main()
