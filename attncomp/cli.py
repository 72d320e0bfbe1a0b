"""The command line. Commands about policies and the cache import no torch, so that they start fast."""

from __future__ import annotations

import os
import sys
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from attncomp import __version__
from attncomp.cache_cli import cache_app
from attncomp.cli_output import Exit, fail, plain, print_json, print_table
from attncomp.cli_target import load_target
from attncomp.errors import AttncompError, CacheUnusableError, PolicyError, TargetError
from attncomp.policy import PRESETS, Policy, check_variants, load_policy

if TYPE_CHECKING:
    from attncomp.report import Report, SiteReport


class _Commands(TyperGroup):
    """Turns the users' mistakes that a command raises into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CacheUnusableError as error:
            fail(Exit.CACHE_UNUSABLE, str(error))
        except AttncompError as error:
            fail(Exit.USAGE, str(error))


app = typer.Typer(
    cls=_Commands,
    name="attncomp",
    help="Find attention in PyTorch models, say what it computes, and how it is best computed here.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
)
policy_app = typer.Typer(name="policy", help="Check and show policies.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(policy_app)
app.add_typer(cache_app)

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", "-v", help="Print candidates, proofs, and tracebacks of your code.")
]


def main() -> None:
    """Entry point of the ``attncomp`` command."""
    app(prog_name="attncomp")


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"attncomp {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find attention in PyTorch models, say what it computes, and how it is best computed here."""


@app.command()
def explain(
    target: Annotated[str, typer.Argument(metavar="FILE.py:FACTORY", help="Returns (model, args) or with kwargs.")],
    policy: Annotated[str | None, typer.Option("--policy", metavar="FILE|PRESET", help="The policy.")] = None,
    dynamic: Annotated[bool, typer.Option("--dynamic", help="Analyse with symbolic shapes.")] = False,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Say what attncomp finds in a model, what it would do, and why. Nothing is compiled or kept."""
    chosen = load_policy(policy)
    # What the user's code prints must not get between the lines of the report.
    with redirect_stdout(sys.stderr):
        try:
            model, args, kwargs = load_target(target)
        except TargetError as error:
            if verbose and error.__cause__ is not None:
                traceback.print_exception(error.__cause__)
            raise
        from attncomp.explain import explain as analyse

        if dynamic:
            report = analyse(model, *args, policy=chosen, dynamic=True, **kwargs)
        else:
            report = analyse(model, *args, policy=chosen, **kwargs)
    if as_json:
        print(report.to_json())
    else:
        _print_report(report, verbose)
    if _errors(report):
        raise typer.Exit(Exit.PROBLEM)


@app.command()
def variants(as_json: AsJson = False) -> None:
    """List the ways to compute an attention that attncomp knows."""
    from attncomp.codegen.variants import VARIANTS

    if as_json:
        rows = [
            {
                "name": variant.name,
                "family": variant.family,
                "exactness": variant.exactness,
                "devices": list(variant.devices),
                "summary": variant.summary,
            }
            for variant in VARIANTS
        ]
        print_json({"variants": rows})
        return
    print_table(
        ("NAME", "FAMILY", "EXACTNESS", "DEVICES", "SUMMARY"),
        ((v.name, v.family, v.exactness, ", ".join(v.devices), v.summary) for v in VARIANTS),
    )


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Check what attncomp needs. Exit code 1 if something is broken."""
    from attncomp.cli_doctor import examine

    checks = examine()
    broken = [check for check in checks if check.status == "broken"]
    if as_json:
        rows = [{"name": c.name, "status": c.status, "detail": c.detail, "fix": c.fix} for c in checks]
        print_json({"ok": not broken, "checks": rows})
    else:
        print_table(("CHECK", "STATUS", "DETAIL", "WHAT TO DO"), ((c.name, c.status, c.detail, c.fix) for c in checks))
    if broken:
        raise typer.Exit(Exit.PROBLEM)


@policy_app.command("check")
def check_policy(
    file: Annotated[Path, typer.Argument(metavar="FILE", exists=True, dir_okay=False, help="The policy file.")],
    as_json: AsJson = False,
) -> None:
    """Check a policy file. Exit code 1 if it is not valid."""
    try:
        policy = load_policy(file)
        if _lists_variants(policy):
            from attncomp.codegen.variants import VARIANTS

            check_variants(policy, [variant.name for variant in VARIANTS])
    except PolicyError as error:
        if as_json:
            print_json({"ok": False, "where": error.where, "problem": error.what, "fix": error.fix})
            raise typer.Exit(Exit.PROBLEM) from error
        fail(Exit.PROBLEM, str(error))
    if as_json:
        print_json({"ok": True, "rules": len(policy.rules)})
    else:
        print(f"{file}: ok, {len(policy.rules)} rule{'' if len(policy.rules) == 1 else 's'}")


@policy_app.command("show")
def show_policy(
    source: Annotated[str | None, typer.Argument(metavar="FILE|PRESET", help="Default: the exact preset.")] = None,
    as_json: AsJson = False,
) -> None:
    """Print a policy with all defaults as TOML. It can be saved and edited."""
    policy = load_policy(source)
    if as_json:
        print_json({"policy": policy.to_dict(), "presets": list(PRESETS)})
    else:
        print(policy.to_toml(), end="")


def _lists_variants(policy: Policy) -> bool:
    return bool(policy.defaults.variants) or any(dict(rule.overrides).get("variants") for rule in policy.rules)


def _print_report(report: Report, verbose: bool) -> None:
    if report.sites:
        print_table(
            ("MODULE", "LOCATION", "KIND", "MASK", "VERDICT", "VARIANT", ">MS", ">AS WRITTEN", "REASON"),
            (
                (
                    _module(site),
                    _location(site),
                    site.kind,
                    site.mask,
                    site.verdict,
                    site.variant or "",
                    _milliseconds(site.predicted_ms),
                    _milliseconds(site.as_written_ms),
                    site.reason,
                )
                for site in report.sites
            ),
        )
    for site in report.sites if verbose else ():
        print(f"\n{plain(_module(site))} ({plain(_location(site))})")
        if site.candidates:
            print_table(
                ("CANDIDATE", ">MS", "REJECTED BECAUSE"),
                ((c.variant, _milliseconds(c.predicted_ms), c.rejection or "") for c in site.candidates),
            )
        if site.lengths:
            print_table(
                ("LENGTHS", "PLAN", "BECAUSE"),
                ((p.lengths, p.variant or "as written", f"{p.reason} (at {p.at})") for p in site.lengths),
            )
        for fact in site.facts:
            print(f"proof: {plain(fact)}")
    rewritten = sum(site.verdict == "rewritten" for site in report.sites)
    kept = len(report.sites) - rewritten
    print(f"\n{rewritten} rewritten, {kept} kept." if report.sites else "No attention was found.")
    for error in _errors(report):
        print(error, file=sys.stderr)


def _errors(report: Report) -> list[str]:
    """What was left as written because something failed, not because leaving it is right."""
    errors = [f"error: {_module(site)}: {site.reason}" for site in report.sites if site.reason.startswith("error")]
    if report.fallback is not None:
        errors.append(f"error: the graph would be left to inductor as it is: {report.fallback}")
    return errors


def _module(site: SiteReport) -> str:
    return site.module or "(top level)"


def _location(site: SiteReport) -> str:
    """``file:line``, relative to the working directory where the file is inside it."""
    path, _, line = site.location.rpartition(":")
    return f"{os.path.relpath(path)}:{line}" if Path(path).is_relative_to(Path.cwd()) else site.location


def _milliseconds(predicted: float | None) -> str:
    return "" if predicted is None else f"{predicted:.3f}"
