"""docs/coverage.md from the rows of a sweep."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.coverage_models import model_types
from benchmarks.measure import table

FORWARD, GRADIENT = 1e-5, 1e-4
"""Relative differences from eager mode that count as agreeing, in float32."""

PLACES = {"cpu": "a CPU", "cuda": "a GPU, with the kernels generated for it,"}

Row = dict[str, Any]
INTRODUCTION = """\
# Coverage

Model types of transformers, in small configurations with random weights, on {place} in float32, compiled with
`min_speedup = 0` (whatever can be rewritten is) and compared with eager mode. A *site* is an SDPA call, a
`flex_attention` call, or a softmax between two products of computed tensors. Sites are counted in the graphs apart from
the lifter, so that what it does not see, and graphs that were left to inductor, count as well. A model type is *fully
rewritten* if all of its sites are.

*inductor* is how many sites inductor's own attention patterns match in the same graphs
(`counters["inductor"]["fuse_attention"]` after its passes over the joint graph; the same as in a full compile). It is
counted where attention is written by hand; an SDPA call needs no matcher, but keeps its dense mask there. Outputs
*agree* within a relative 1e-5 over all outputs of a model together, gradients within 1e-4. *dynamic* runs one compiled
model at two sizes.

    PYTHONPATH=. python benchmarks/coverage.py --results sweep.jsonl
    PYTHONPATH=. python benchmarks/coverage.py --results sweep.jsonl --report docs/coverage.md

With `--device cuda` the generated kernels run; a part of the types in the other modes was run so on an H100
([benchmarks/RESULTS.md](../benchmarks/RESULTS.md#models-of-transformers-on-an-h100-for-correctness)).
"""


def render(rows: Sequence[Row]) -> str:
    """The whole page."""
    modes = list(dict.fromkeys(r["mode"] for r in sorted(rows, key=lambda r: _order(r["mode"]))))
    ran = [r for r in rows if r["status"] == "ran"]
    commits = Counter(r["commit"] for r in ran if r.get("commit"))
    where = ", ".join(f"{c} ({n} rows)" for c, n in commits.most_common()) or "unknown"
    versions = ", ".join(sorted({str(r.get("torch", "2.13.0+cpu")) for r in ran}))
    parts = [
        INTRODUCTION.replace("{place}", PLACES["cuda" if any(r.get("device") == "cuda" for r in rows) else "cpu"]),
        f"Measured at commit {where}, torch {versions}, {_transformers()}. {_extent(rows)}\n",
        "## Summary\n",
        _summary(rows, modes),
        "\n## Masks of decoder models\n",
        MASKS,
        _masks(ran, modes),
        "\n## Rejections\n",
        REASONS,
        _rejections(ran),
        "\n## Disagreements and failures\n",
        _troubles(rows),
        "\n## Not compiled without attncomp either\n",
        "Model types that Dynamo itself can't trace, or that eager mode does not run in this mode.\n",
        _not_compiled(rows),
        "\n## Model types\n",
        LEGEND,
        _models(rows, modes),
        "\n## Model types that are not in the sweep\n",
        _not_built(rows),
        OTHERS,
    ]
    return "\n".join(parts) + "\n"


MASKS = """\
Model types with a causal language model in transformers' mappings; sites that have a mask. *Proven* masks are index
arithmetic that a kernel can evaluate or skip by; with *dense*, a part of the mask is read from memory.
"""

REASONS = """\
Every site that was kept, by reason. *More* are sites that attncomp reports and that are not attention by the definition
above.
Weights that are alive where Dynamo breaks the graph, inside a layer or between two, are results of that graph.
"""

OTHERS = """
## Other libraries

Diffusion transformers of diffusers (`diffusers.CLASS` above) run in the same sweep where the library is installed; it
needs no other package than importlib_metadata and pillow. Models of timm, and those of transformers that have a timm
backbone, are left out: timm needs torchvision's operators, and torchvision's wheels, made for CUDA, do not load them
beside a CPU build of torch. On a CPU, `flex_attention` has no backward, so its rows are for inference.
"""

LEGEND = """\
Rewritten sites of all sites in each mode; `-`: not there, or not run; `!`: see above. *Inductor* is its matches in
eager/static/inference.
"""


def _transformers() -> str:
    try:
        import transformers
    except ImportError:
        return "transformers not installed"
    return f"transformers {transformers.__version__}"


def _extent(rows: Sequence[Row]) -> str:
    """How much of the library the rows are: a sweep is drawn in random order, and may have been cut short."""
    every = set(model_types()) - {r["model"] for r in rows}
    tried = len({r["model"] for r in rows if not r["mode"].startswith("diffusers")})
    left = len([name for name in every if "." not in name])
    return f"{tried} of {tried + left} model types of transformers were tried, in the modes that their rows show."


def _order(mode: str) -> tuple[int, ...]:
    attention, shapes, phase = mode.split("/")
    kinds = ("eager", "sdpa", "flex_attention", "diffusers")
    return (kinds.index(attention) if attention in kinds else 9, phase == "training", shapes == "dynamic")


def sites_of(row: Row) -> list[Row]:
    """The attention sites of a row, without the further ones that the lifter reports."""
    return [s for s in row.get("sites", ()) if not s["kind"].startswith("more")]


def rewritten(sites: Iterable[Row]) -> int:
    return sum(s["verdict"] == "rewritten" for s in sites)


def agrees(row: Row) -> bool:
    """False for NaN, too."""
    outputs, gradients = (row["error"], row.get("other_error", 0.0)), row.get("gradient_error", 0.0)
    return all(x <= FORWARD for x in outputs) and gradients <= GRADIENT


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.1f}%)" if whole else "-"


def _summary(rows: Sequence[Row], modes: Sequence[str]) -> str:
    head = ("mode", "ran", "with attention", "fully rewritten", "sites rewritten", "inductor", "agree with eager")
    lines = []
    for mode in modes:
        ran = [r for r in rows if r["mode"] == mode and r["status"] == "ran"]
        some = [r for r in ran if sites_of(r)]
        sites = [s for r in ran for s in sites_of(r)]
        full = sum(rewritten(sites_of(r)) == len(sites_of(r)) for r in some)
        failed = sum(r["mode"] == mode and r["status"] in ("failed", "crashed") for r in rows)
        counted = bool(some) and mode.startswith("eager") and all(r["inductor"] is not None for r in some)
        matches = sum(min(r["inductor"], len(sites_of(r))) for r in some) if counted else 0
        lines.append(
            (
                mode,
                str(len(ran) + failed),
                str(len(some)),
                _share(full, len(some)),
                _share(rewritten(sites), len(sites)),
                _share(matches, len(sites)) if counted else "-",
                _share(sum(agrees(r) for r in ran), len(ran) + failed),
            )
        )
    return table(head, lines)


def _masks(ran: Sequence[Row], modes: Sequence[str]) -> str:
    decoders = _decoders()
    lines = []
    for mode in modes:
        masks = [s["mask"] for r in ran if r["mode"] == mode and r["model"] in decoders for s in sites_of(r)]
        masks = [m for m in masks if m != "none"]
        proven = [m for m in masks if not re.search("dense|unknown", m)]
        common = ", ".join(f"{m} ({n})" for m, n in Counter(masks).most_common(6))
        lines.append((mode, _share(len(proven), len(masks)), common))
    return table(("mode", "proven", "masks (sites)"), lines)


def _decoders() -> set[str]:
    try:
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    except ImportError:
        return set()
    return {str(name) for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}


def place(location: str) -> str:
    """``file:line`` within the library."""
    return re.sub(r"^.*/site-packages/", "", location or "?")


def _rejections(ran: Sequence[Row]) -> str:
    groups: dict[tuple[bool, str], list[tuple[Row, Row]]] = defaultdict(list)
    for row in ran:
        for site in row["sites"]:
            if site["verdict"] == "kept":
                groups[site["kind"].startswith("more"), site["reason"].split(":")[0]].append((row, site))
    lines = []
    for (more, code), items in sorted(groups.items(), key=lambda x: (x[0][0], -len(x[1]))):
        models = list(dict.fromkeys(r["model"] for r, _ in items))
        row, site = items[0]
        reason = site["reason"].partition(": ")[2][:160].replace("|", "\\|").replace("\n", " ")
        lines.append(
            (
                f"`{code}`{' (more)' if more else ''}",
                str(len(items)),
                str(len(models)),
                ", ".join(models[:6]) + (", ..." if len(models) > 6 else ""),
                f"{reason} ({place(site['location'])} of {row['model']})",
            )
        )
    return table(("reason", "sites, all modes", "model types", "examples", "said at the first"), lines)


def _troubles(rows: Sequence[Row]) -> str:
    lines = []
    for r in sorted(rows, key=lambda r: (r["model"], _order(r["mode"]))):
        if r["status"] == "ran" and not agrees(r):
            noise = f"; eager mode twice differs by {r['noise']:.1e}" if r["noise"] else ""
            second = f", at the second size {r['other_error']:.1e}" if r.get("other_error") is not None else ""
            gradients = f", gradients {r['gradient_error']:.1e}" if "gradient_error" in r else ""
            alone = r.get("without")
            dynamo = f"; without attncomp {alone:.1e}" if isinstance(alone, float) and alone > FORWARD else ""
            more = f"{second}{gradients}{noise}{dynamo}{_conditioning(r)}"
            lines.append(f"- {r['model']}, {r['mode']}: outputs differ by {r['error']:.1e}{more}")
        elif r["status"] in ("failed", "crashed"):
            why = " ".join(r["why"].split())[:200]
            lines.append(f"- {r['model']}, {r['mode']}: {r['status']}: {why}")
    return "\n".join(lines) if lines else "None."


def _conditioning(row: Row) -> str:
    given = row.get("perturbed")
    return f"; eager mode differs by {given:.1e} if its inputs change by one rounding" if given is not None else ""


def _not_compiled(rows: Sequence[Row]) -> str:
    lines = [
        f"- {r['model']}, {r['mode']}: {' '.join(r['why'].split())[:160]}"
        for r in sorted(rows, key=lambda r: (r["model"], _order(r["mode"])))
        if r["status"] in ("not compiled", "not run by eager")
    ]
    return "\n".join(lines) if lines else "None."


def _models(rows: Sequence[Row], modes: Sequence[str]) -> str:
    by_model: dict[str, dict[str, Row]] = defaultdict(dict)
    for r in rows:
        by_model[r["model"]][r["mode"]] = r
    lines = []
    for model, have in sorted(by_model.items()):
        if not any(r["status"] in ("ran", "failed", "crashed") for r in have.values()):
            continue
        masks = Counter(s["mask"] for r in have.values() if r["status"] == "ran" for s in sites_of(r))
        first = have.get("eager/static/inference", {})
        counted = first.get("status") == "ran" and sites_of(first) and first["inductor"] is not None
        matches = str(first["inductor"]) if counted else "-"
        cells = [_cell(have.get(m)) for m in modes]
        lines.append((model, *cells, matches, ", ".join(m for m, _ in masks.most_common(4))))
    return table(("model type", *(_short(m) for m in modes), "inductor", "masks"), lines)


def _short(mode: str) -> str:
    return mode.replace("flex_attention", "flex").replace("inference", "inf.").replace("training", "tr.")


def _cell(row: Row | None) -> str:
    if row is None or row["status"] not in ("ran", "failed", "crashed"):
        return "-"
    if row["status"] != "ran":
        return "!"
    sites = sites_of(row)
    return f"{rewritten(sites)}/{len(sites)}{'' if agrees(row) else ' !'}"


def _not_built(rows: Sequence[Row]) -> str:
    ran = {r["model"] for r in rows if r["status"] in ("ran", "failed", "crashed")}
    reasons: dict[str, list[str]] = defaultdict(list)
    for r in rows:
        if r["status"] == "not built" and r["model"] not in ran:
            ran.add(r["model"])
            reasons[_why_not(r["why"])].append(r["model"])
    lines = [f"- {why} ({len(names)}): {', '.join(sorted(names))}" for why, names in sorted(reasons.items())]
    return "\n".join(lines) if lines else "None."


def _why_not(why: str) -> str:
    library = re.search(r"requires the (\S+) library|No module named '(\S+)'", why)
    if library:
        return f"needs {library.group(1) or library.group(2)}, which is not in the development environment"
    for text, said in (
        ("no model class", "no model class of its own in the auto mappings"),
        ("million parameters", "no configuration small enough"),
        ("missing the required", "has no forward"),
    ):
        if text in why:
            return said
    return "no generic configuration and inputs run under eager mode"
