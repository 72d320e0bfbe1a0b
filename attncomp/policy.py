"""Loading a policy: a TOML file, the name of a preset, or a dict of the same shape; `docs/policy.md` has every key."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from attncomp.errors import PolicyError
from attncomp.policy_match import KINDS, PHASES, LengthRange, Match
from attncomp.policy_reader import KeyPath, Origin, Section, nearest, read_toml
from attncomp.policy_types import EXACTNESS, TUNE, VERSION, CacheSettings, Policy, Rule, Settings

__all__ = [
    "DEFAULT_PRESET",
    "PRESETS",
    "CacheSettings",
    "Match",
    "Policy",
    "Rule",
    "Settings",
    "check_variants",
    "load_policy",
    "parse_size",
]

DEFAULT_PRESET = "exact"

PRESETS: dict[str, dict[str, Any]] = {
    # What a compile without a policy does.
    "exact": {"version": VERSION},
    # Rewrite every understood site: for tests, and to look at what would be generated.
    "always": {"version": VERSION, "defaults": {"min_speedup": 0}},
    # Rank by timing the best candidates on this machine instead of by the model alone.
    "measured": {"version": VERSION, "defaults": {"tune": "measure"}},
    # Also variants whose error is provably under a bound.
    "bounded": {"version": VERSION, "defaults": {"allow": "bounded"}},
    # Analyse and report, rewrite nothing.
    "off": {"version": VERSION, "defaults": {"variants": []}},
}

_SETTINGS = ("allow", "min_speedup", "tune", "max_error", "variants")
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\s*", re.IGNORECASE)


def load_policy(source: str | os.PathLike[str] | Mapping[str, Any] | Policy | None = None) -> Policy:
    """Read and check a policy.

    Args:
        source: a path to a TOML file, the name of a preset (`PRESETS`), a dict of the file's shape, a `Policy`
            (returned as it is), or None for the default preset. ``./NAME`` reaches a file that is named like a preset.

    Raises:
        PolicyError: an unknown key, a wrong type, an impossible value, or an unreadable file; names file, line and key.
    """
    match source:
        case Policy():
            return source
        case None:
            return _policy(Section(PRESETS[DEFAULT_PRESET], Origin(f'preset "{DEFAULT_PRESET}"')))
        case Mapping():
            return _policy(Section(source, Origin("policy dict")))
        case str() if source in PRESETS:
            return _policy(Section(PRESETS[source], Origin(f'preset "{source}"')))
        case str() if not _looks_like_path(source):
            raise PolicyError(
                f"{_shown(source)} is neither a preset nor a file",
                fix=f"{nearest(source, PRESETS)}The presets are {', '.join(PRESETS)}; a file's path ends in .toml",
            )
        case str() | os.PathLike():
            return _policy(read_toml(source))
        case _:
            raise PolicyError(
                f"a policy can't be of type {type(source).__name__}", fix="Pass a path, a preset's name, or a dict"
            )


def check_variants(policy: Policy, names: Iterable[str]) -> None:
    """Check the variant names that a policy lists against those that exist.

    Raises:
        PolicyError: a name is not in `names`; names the line and the nearest name that exists.
    """
    known = tuple(names)
    listed: list[tuple[tuple[str, ...] | None, KeyPath, str]] = [
        (policy.defaults.variants, ("defaults", "variants"), "[defaults]")
    ]
    for index, rule in enumerate(policy.rules):
        listed.append((dict(rule.overrides).get("variants"), ("rule", index, "variants"), f"rule {index + 1}"))
    for variants, path, title in listed:
        for name in variants or ():
            if name not in known:
                raise PolicyError(
                    f'unknown variant "{name}" in {title}',
                    where=policy.origin.where(path),
                    fix=f"{nearest(name, known)}The variants are {', '.join(known)}",
                )


def parse_size(value: int | str) -> int:
    """Bytes of a size such as ``"2GiB"``, ``"500 MB"`` (powers of 1000 without the i) or a plain number of bytes.

    Raises:
        ValueError: the text is not a size.
    """
    if isinstance(value, int):
        return value
    found = _SIZE.fullmatch(value)
    if not found:
        raise ValueError(f'"{value}" is not a size')
    unit = (found[2] or "").upper()
    base = 1024 if unit.endswith("I") else 1000
    size = float(found[1]) * (base ** ("KMGT".find(unit[0]) + 1) if unit else 1)
    if math.isinf(size):
        raise ValueError(f'"{value[:20]}..." is no size that any disk has')
    return int(size)


def _policy(top: Section) -> Policy:
    top.require_known(("version", "defaults", "rule", "cache"))
    if "version" not in top.values:
        raise top.error(None, 'the policy has no "version"', f"Add version = {VERSION} at the top")
    version = top.values["version"]
    if isinstance(version, bool) or not isinstance(version, int):
        raise top.type_error("version", "a whole number")
    if version != VERSION:
        raise top.error(
            "version", f"policy version {version} is not known", f"This attncomp reads version {VERSION} only"
        )
    section = top.section("defaults")
    section.require_known(_SETTINGS)
    defaults = replace(Settings(), **_read_settings(section))
    _require_budget(section, defaults.allow, defaults.max_error)
    return Policy(
        version=version,
        defaults=defaults,
        rules=tuple(_read_rule(section, defaults) for section in top.sections("rule")),
        cache=_read_cache(top.section("cache")),
        origin=top.origin,
    )


def _read_rule(section: Section, defaults: Settings) -> Rule:
    section.require_known(("match", *_SETTINGS))
    if "match" not in section.values:
        raise section.error(
            None, f'{section.title} has no "match"', "What holds for every site belongs into [defaults]"
        )
    overrides = _read_settings(section)
    if not overrides:
        raise section.error(None, f"{section.title} sets nothing", f"Set one of {', '.join(_SETTINGS)}")
    if "allow" in overrides:
        _require_budget(section, overrides["allow"], overrides.get("max_error", defaults.max_error))
    return Rule(_read_match(section.section("match")), tuple(overrides.items()), section.origin.where(section.path))


def _read_match(section: Section) -> Match:
    section.require_known(Match.__slots__)
    conditions: dict[str, Any] = {}
    for key in section.values:
        if key in ("kv_len", "q_len"):
            conditions[key] = _read_length(section, key)
        elif key in ("phase", "kind"):
            conditions[key] = section.choice(key, PHASES if key == "phase" else KINDS)
        else:
            conditions[key] = section.text(key)
    if any(not segment for segment in conditions.get("module", "*").split(".")):
        raise section.error(
            "module",
            f'the module glob "{conditions["module"]}" in {section.title} has an empty segment',
            "Write names or globs between single dots; ** stands for any number of segments",
        )
    return Match(**conditions)


def _read_length(section: Section, key: str) -> LengthRange:
    value = section.values[key]
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise section.type_error(key, "a number or a condition", 'Write a number, ">=16384" or "1024..4096"')
    try:
        return LengthRange.parse(value)
    except ValueError as error:
        raise section.error(
            key, f'"{key}" in {section.title}: {error}', 'Write a number, ">=16384", "<4096" or "1024..4096"'
        ) from error


def _read_settings(section: Section) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key in section.values:
        match key:
            case "allow":
                found[key] = section.choice(key, EXACTNESS)
            case "tune":
                found[key] = section.choice(key, TUNE)
            case "min_speedup":
                found[key] = section.number(key)
                if found[key] < 0:
                    raise section.error(
                        key,
                        f'"{key}" in {section.title} is negative',
                        "Use 0 to rewrite always, 1.03 for a margin of 3 %",
                    )
            case "max_error":
                found[key] = section.number(key)
                if not 0 < found[key] <= 1:
                    raise section.error(
                        key,
                        f'"{key}" in {section.title} must be above 0 and at most 1, not {found[key]:g}',
                        'It is a relative L2 error; allow = "exact" is what forbids any',
                    )
            case "variants":
                found[key] = None if section.values[key] == "all" else section.texts(key)
    return found


def _require_budget(section: Section, allow: str, max_error: float | None) -> None:
    if allow == "approximate" and max_error is None:
        raise section.error(
            "allow",
            f'"allow" in {section.title} is "approximate", but no "max_error" holds there',
            "State the relative L2 error that you accept, such as max_error = 0.02",
        )


def _read_cache(section: Section) -> CacheSettings:
    section.require_known(CacheSettings.__slots__)
    folder: str | None = None
    if "dir" in section.values:
        text = section.text("dir")
        try:
            path = Path(os.path.expandvars(text)).expanduser()
        except RuntimeError as error:
            what = f'"dir" in [cache] is in a home directory that is not known: {text}'
            raise section.error("dir", what, "Write the path out") from error
        if "\0" in text:
            raise section.error("dir", '"dir" in [cache] has a character that no path may have: \\0', "Leave it out")
        folder = os.fspath(section.origin.folder / path)
    max_size: int | None = None
    if "max_size" in section.values:
        value = section.values["max_size"]
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise section.type_error("max_size", "a size", 'Write a size such as "2GiB", or a number of bytes')
        try:
            max_size = parse_size(value)
        except ValueError as error:
            raise section.error("max_size", f'"max_size" in [cache]: {error}', 'Write a size such as "2GiB"') from error
        if max_size <= 0:
            raise section.error("max_size", '"max_size" in [cache] must be above 0', 'Write a size such as "2GiB"')
    return CacheSettings(folder, max_size)


def _looks_like_path(text: str) -> bool:
    if text.endswith(".toml") or os.sep in text or (os.altsep or os.sep) in text:
        return True
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # longer than any name, or with a character that none may have
        return False


def _shown(text: str) -> str:
    return f'"{text}"' if len(text) <= 80 and text.isprintable() else f"{text[:80]!r}..."
