"""The picture of the docs: TFLOP/s over length, a panel for each case, drawn from rows that were measured.

Rows come from files that ``programs.py --rows`` and ``dispatch.py --rows`` wrote; of a row that stands in several, the
last one counts. Only forward passes of one head width are drawn. The SVG is written by hand: text, lines and circles.

Run with ``PYTHONPATH=. python benchmarks/picture.py --rows benchmarks/rows/*.jsonl --out docs/speed.svg``.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
Points = dict[int, float]

COLOURS = {"attncomp": "#c2410c", "flex": "#1d4ed8", "cuDNN": "#4d7c0f", "flash": "#7e22ce", "inductor": "#64748b"}
"""Who is drawn, in this order; the first one thicker."""
PANEL, PLOT = (250, 190), (180, 110)
MARGIN = (50, 30)
COLUMNS = 4


@dataclass
class Panel:
    """One case. lines: who → length → TFLOP/s."""

    title: str
    lines: dict[str, Points] = field(default_factory=dict)

    def add(self, who: str, length: int, rate: float) -> None:
        if math.isfinite(rate):
            self.lines.setdefault(who, {})[length] = rate

    @property
    def lengths(self) -> list[int]:
        return sorted({n for points in self.lines.values() for n in points})

    @property
    def highest(self) -> float:
        return max(rate for points in self.lines.values() for rate in points.values())


def panels(rows: Iterable[Row], width: int) -> list[Panel]:
    """A panel for each case with numbers at several lengths, plain attention first."""
    found: dict[str, Panel] = {}
    for row in rows:
        if row["width"] != width:
            continue
        if "case" in row:
            _of_program(found, row)
        else:
            _of_point(found, row)
    return sorted((p for p in found.values() if len(p.lengths) > 1), key=lambda p: not p.title.startswith("plain"))


def _of_program(found: dict[str, Panel], row: Row) -> None:
    if row["phase"] != "forward" or row["heads"] != row["kv_heads"] or row["case"] == "causal":
        return
    panel = found.setdefault(row["case"], Panel(row["case"]))
    for who, result in row["found"].items():
        if "tflops" in result:
            panel.add(who.replace("flash varlen", "flash"), row["n"], result["tflops"])


def _of_point(found: dict[str, Panel], row: Row) -> None:
    n = row["keys"]
    plain = row["mask"] in ("full", "causal") and row["heads"] == row["kv_heads"] and row["dtype"] == "bfloat16"
    if not plain or row["queries"] != n or "ms" not in row:
        return
    title = f"plain, {row['mask']}"
    pairs = n * n if row["mask"] == "full" else n * (n + 1) / 2
    flops = 4 * row["batch"] * row["heads"] * row["width"] * pairs
    for who, ms in row["ms"].items():
        if who in COLOURS:
            found.setdefault(title, Panel(title)).add(who, n, flops / ms / 1e9)


def latest(lines: Iterable[str]) -> list[Row]:
    """The last row of each case."""
    kept: dict[tuple[Any, ...], Row] = {}
    for line in lines:
        row = json.loads(line)
        names = ("case", "phase", "n", "batch", "mask", "window", "queries", "keys", "dtype", "written")
        kept[tuple(row.get(n) for n in (*names, "heads", "kv_heads", "width"))] = row
    return list(kept.values())


def svg(shown: Sequence[Panel], title: str) -> str:
    """The whole picture, on white."""
    down = -(-len(shown) // COLUMNS)
    size = (COLUMNS * PANEL[0] + 20, down * PANEL[1] + 70)
    text = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size[0]} {size[1]}" font-family="sans-serif">',
        f'<rect width="{size[0]}" height="{size[1]}" fill="white"/>',
        f'<text x="20" y="24" font-size="15">{escape(title)}</text>',
    ]
    drawn = [who for who in COLOURS if any(who in p.lines for p in shown)]
    for n, who in enumerate(drawn):
        x = 20 + 110 * n
        text.append(f'<line x1="{x}" y1="44" x2="{x + 22}" y2="44" stroke="{COLOURS[who]}" stroke-width="3"/>')
        text.append(f'<text x="{x + 28}" y="48" font-size="12">{who}</text>')
    for n, panel in enumerate(shown):
        x, y = 10 + n % COLUMNS * PANEL[0], 60 + n // COLUMNS * PANEL[1]
        text += [f'<g transform="translate({x},{y})">', *_panel(panel), "</g>"]
    return "\n".join([*text, "</svg>", ""])


def _panel(panel: Panel) -> list[str]:
    left, top = MARGIN
    wide, high = PLOT
    lengths = panel.lengths
    first, last = math.log2(lengths[0]), math.log2(lengths[-1])
    step = _step(panel.highest)
    ceiling = step * math.ceil(panel.highest / step)

    def x(n: int) -> float:
        return left + wide * ((math.log2(n) - first) / (last - first) if last > first else 0.5)

    def y(rate: float) -> float:
        return top + high * (1 - rate / ceiling)

    text = [f'<text x="{left}" y="{top - 10}" font-size="13">{escape(panel.title)}</text>']
    for n in range(round(ceiling / step) + 1):
        at = y(n * step)
        text.append(f'<line x1="{left}" y1="{at:.1f}" x2="{left + wide}" y2="{at:.1f}" stroke="#e2e8f0"/>')
        text.append(f'<text x="{left - 6}" y="{at + 4:.1f}" font-size="10" text-anchor="end">{n * step:g}</text>')
    for n in lengths if len(lengths) <= 5 else lengths[::2]:
        name = f"{n // 1024}k" if n >= 1024 else str(n)
        text.append(f'<text x="{x(n):.1f}" y="{top + high + 16}" font-size="10" text-anchor="middle">{name}</text>')
    for who in reversed(COLOURS):  # the first on top
        points = sorted(panel.lines.get(who, {}).items())
        if not points:
            continue
        thick = 2.5 if who == next(iter(COLOURS)) else 1.5
        path = " ".join(f"{x(n):.1f},{y(rate):.1f}" for n, rate in points)
        text.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[who]}" stroke-width="{thick}"/>')
        text += [
            f'<circle cx="{x(n):.1f}" cy="{y(r):.1f}" r="{thick + 0.5}" fill="{COLOURS[who]}"/>' for n, r in points
        ]
    return text


def _step(highest: float) -> float:
    """Between two lines of the grid: three to six of them."""
    size = 10.0 ** math.floor(math.log10(highest))
    return next(s for s in (size / 5, size / 2, size, 2 * size) if highest / s <= 6)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=Path, nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--title", default="H100, forward, TFLOP/s over length, bfloat16")
    args = parser.parse_args(arguments)
    lines = [line for path in args.rows for line in path.read_text().splitlines() if line]
    shown = panels(latest(lines), args.width)
    args.out.write_text(svg(shown, f"{args.title}, width {args.width}"))
    print(f"{args.out}: {len(shown)} panels, {sum(len(p.lines) for p in shown)} lines")


if __name__ == "__main__":
    main()
