"""The policy as data: what attncomp may do to a site, and how much faster it must be to be worth it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from attncomp.policy_match import Match
from attncomp.policy_reader import Origin

VERSION = 1
EXACTNESS = ("exact", "bounded", "approximate")
TUNE = ("model", "measure")


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for one site.

    Attributes:
        allow: the weakest class of exactness that may be chosen, one of `EXACTNESS`.
        min_speedup: keep what the user wrote unless the plan is predicted this many times as fast; 0 always rewrites.
        tune: "model" ranks by the cost model, "measure" by timing the best candidates.
        max_error: budget for the relative L2 error of the site's output; None where none is stated.
        variants: names of the variants that may be chosen; None allows all, an empty tuple keeps what the user wrote.
    """

    allow: str = "exact"
    min_speedup: float = 1.03
    tune: str = "model"
    max_error: float | None = None
    variants: tuple[str, ...] | None = None

    def permits(self, variant: str, exactness: str) -> bool:
        """Whether a variant of this name and class of exactness may be chosen at all."""
        listed = self.variants is None or variant in self.variants
        return listed and EXACTNESS.index(exactness) <= EXACTNESS.index(self.allow)

    def to_dict(self) -> dict[str, Any]:
        """The settings in the policy file's own shape; keys without a value are left out."""
        return _settings_dict(asdict(self))


@dataclass(frozen=True, slots=True)
class Rule:
    """Settings for the sites that `match` holds for.

    Attributes:
        match: the conditions.
        overrides: pairs (name of a field of `Settings`, value), only those that the rule sets.
        where: the place of the rule in its source, for reports.
    """

    match: Match
    overrides: tuple[tuple[str, Any], ...]
    where: str = field(default="", compare=False)

    def to_dict(self) -> dict[str, Any]:
        return {"match": self.match.to_dict(), **_settings_dict(dict(self.overrides), unset=False)}


@dataclass(frozen=True, slots=True)
class CacheSettings:
    """Where the kernel cache lives and how large it may grow; None leaves the cache's own default.

    Attributes:
        dir: an absolute path, or one relative to the working directory for policies that are no file.
        max_size: bytes.
    """

    dir: str | None = None
    max_size: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True, slots=True)
class Policy:
    """A checked policy. Compares and hashes by what it says, not by where it was read."""

    version: int = VERSION
    defaults: Settings = Settings()
    rules: tuple[Rule, ...] = ()
    cache: CacheSettings = CacheSettings()
    origin: Origin = field(default=Origin("default policy"), compare=False, repr=False)

    def resolve(
        self,
        *,
        module: str = "",
        phase: str = "prefill",
        kv_len: int | None = None,
        q_len: int | None = None,
        kind: str = "softmax",
        mask: str = "none",
        device: str = "cpu",
    ) -> Settings:
        """The settings of one site: the defaults, overridden key by key by every rule that holds, later rules last.

        Args:
            module: dotted path of the module that holds the site, relative to the compiled model; "" for the root.
            phase: "prefill", "decode" or "train".
            kv_len: number of keys; None where it is not known, which fulfils no condition on it.
            q_len: number of queries; likewise.
            kind: "softmax" or "linear".
            mask: canonical text of the mask, such as ``causal & window(4096)``.
            device: such as "cuda" or "cuda:0".
        """
        settings = self.defaults
        for rule in self.rules:
            if rule.match.holds(
                module=module, phase=phase, kv_len=kv_len, q_len=q_len, kind=kind, mask=mask, device=device
            ):
                settings = replace(settings, **dict(rule.overrides))
        return settings

    def to_dict(self) -> dict[str, Any]:
        """The whole policy in the file's shape, defaults filled in; `load_policy` reads it back to an equal policy."""
        data: dict[str, Any] = {"version": self.version, "defaults": self.defaults.to_dict()}
        if self.rules:
            data["rule"] = [rule.to_dict() for rule in self.rules]
        if cache := self.cache.to_dict():
            data["cache"] = cache
        return data

    def to_toml(self) -> str:
        """`to_dict` as a TOML file."""
        data = self.to_dict()
        lines = [f"version = {self.version}", "[defaults]", *_toml_lines(data["defaults"])]
        for rule in data.get("rule", ()):
            lines += ["[[rule]]", *_toml_lines(rule)]
        if "cache" in data:
            lines += ["[cache]", *_toml_lines(data["cache"])]
        return "\n".join(lines) + "\n"

    def canonical(self) -> str:
        """One text for each meaning, for cache keys. The cache's own settings change no result and are not in it."""
        data = self.to_dict()
        data.pop("cache", None)
        return json.dumps(data, sort_keys=True, separators=(",", ":"))


def _settings_dict(values: Mapping[str, Any], *, unset: bool = True) -> dict[str, Any]:
    """In the file's language. None means "not set" with `unset`; without it, a rule that resets the key to "all"."""
    shown: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, tuple):
            shown[key] = list(value)
        elif value is not None:
            shown[key] = value
        elif not unset:
            shown[key] = "all"
    return shown


def _toml_lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_toml(value)}" for key, value in values.items()]


def _toml(value: object) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(_toml_lines(value))
        return f"{{ {inner} }}" if inner else "{}"
    # JSON's strings, numbers and lists of strings are TOML's.
    return json.dumps(value, ensure_ascii=False)
