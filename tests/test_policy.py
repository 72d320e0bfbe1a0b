"""The policy file: what it means, and what it says when it is wrong."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from attncomp.errors import PolicyError
from attncomp.policy import PRESETS, Policy, Settings, check_variants, load_policy, parse_size
from attncomp.policy_match import LengthRange, module_matches
from attncomp.policy_reader import toml_lines

EXAMPLE = """\
version = 1
[defaults]
allow = "exact"              # exact | bounded | approximate
min_speedup = 1.03
tune = "model"
[[rule]]                     # later rules win
match = { module = "model.layers.*.self_attn", phase = "prefill", kv_len = ">=16384" }
allow = "approximate"
max_error = 0.02
variants = ["vertical_slash", "streaming"]
[[rule]]
match = { module = "model.layers.0.*" }
allow = "exact"
variants = "all"
[cache]
dir = "kernels"
max_size = "2GiB"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "attncomp.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture
def example(tmp_path: Path) -> Policy:
    return load_policy(write(tmp_path, EXAMPLE))


def test_settings_outside_every_rule_are_the_defaults(example: Policy) -> None:
    assert example.resolve(module="encoder.attn", kv_len=65536) == Settings()


def test_a_rule_overrides_only_the_keys_it_sets(example: Policy) -> None:
    settings = example.resolve(module="model.layers.7.self_attn", phase="prefill", kv_len=16384)
    assert settings == Settings("approximate", 1.03, "model", 0.02, ("vertical_slash", "streaming"))


def test_later_rules_win_key_by_key(example: Policy) -> None:
    settings = example.resolve(module="model.layers.0.self_attn", phase="prefill", kv_len=16384)
    assert (settings.allow, settings.variants) == ("exact", None)
    assert settings.max_error == 0.02


@pytest.mark.parametrize(
    "change", [{"phase": "decode"}, {"kv_len": 16383}, {"kv_len": None}, {"module": "model.layers.7"}]
)
def test_every_condition_of_a_match_must_hold(example: Policy, change: dict[str, Any]) -> None:
    site: dict[str, Any] = {"module": "model.layers.7.self_attn", "phase": "prefill", "kv_len": 16384, **change}
    assert example.resolve(**site) == Settings()


def test_cache_settings_are_relative_to_the_file(example: Policy, tmp_path: Path) -> None:
    assert example.cache.dir == str(tmp_path / "kernels")
    assert example.cache.max_size == 2 * 1024**3


def test_home_and_environment_are_expanded_in_the_cache_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("WHERE", "/scratch")
    assert load_policy({"version": 1, "cache": {"dir": "~/kernels"}}).cache.dir == "/home/someone/kernels"
    assert load_policy({"version": 1, "cache": {"dir": "$WHERE/kernels"}}).cache.dir == "/scratch/kernels"


def test_round_trips(example: Policy) -> None:
    assert load_policy(example.to_dict()) == example
    assert load_policy(example.to_dict()).canonical() == example.canonical()
    assert pickle.loads(pickle.dumps(example)) == example
    assert hash(load_policy(example.to_dict())) == hash(example)
    assert load_policy(example) is example


def test_canonical_text_depends_on_meaning_only() -> None:
    def canonical(kv_len: str, cache: str) -> str:
        rule = {"match": {"kv_len": kv_len}, "min_speedup": 2}
        return load_policy({"version": 1, "rule": [rule], "cache": {"dir": cache}}).canonical()

    assert canonical(">=16", "/a") == canonical("> 15", "/b")
    assert canonical(">=16", "/a") != canonical(">=17", "/a")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_differ(name: str) -> None:
    policy = load_policy(name)
    assert (policy.canonical() == load_policy(None).canonical()) == (name == "exact")


def test_what_the_presets_mean() -> None:
    assert load_policy("always").defaults.min_speedup == 0
    assert load_policy("measured").defaults.tune == "measure"
    assert not load_policy("off").defaults.permits("tiled", "exact")
    assert load_policy("bounded").defaults.permits("any", "bounded")
    assert not load_policy("bounded").defaults.permits("any", "approximate")


def test_permits_looks_at_name_and_exactness() -> None:
    settings = Settings(allow="approximate", max_error=0.1, variants=("streaming",))
    assert settings.permits("streaming", "approximate")
    assert settings.permits("streaming", "exact")
    assert not settings.permits("tiled", "exact")


@pytest.mark.parametrize(
    ("pattern", "path", "holds"),
    [
        ("model.layers.*.self_attn", "model.layers.3.self_attn", True),
        ("model.layers.*.self_attn", "model.layers.3.4.self_attn", False),
        ("model.layers.*.self_attn", "model.layers.self_attn", False),
        ("model.layers.[0-3].self_attn", "model.layers.2.self_attn", True),
        ("model.layers.[0-3].self_attn", "model.layers.12.self_attn", False),
        ("model.layers.?.self_attn", "model.layers.12.self_attn", False),
        ("**.self_attn", "self_attn", True),
        ("**.self_attn", "a.b.c.self_attn", True),
        ("**.self_attn", "a.self_attn.q", False),
        ("model.**.*attn", "model.x.y.cross_attn", True),
        ("**.a.**.b", "a.b.a.c.a.b", True),
        ("**.a.**.b", "b.a", False),
        ("**", "", True),
        ("**", "a.b", True),
        ("*", "", False),
        ("*", "a.b", False),
        ("model", "Model", False),
    ],
)
def test_module_globs(pattern: str, path: str, holds: bool) -> None:
    assert module_matches(pattern, path) is holds


def test_module_globs_do_not_backtrack() -> None:
    assert not module_matches(".".join(["**", "a"] * 30), ".".join(["a"] * 200 + ["b"]))


@pytest.mark.parametrize(
    ("text", "inside", "outside", "canonical"),
    [
        (">=16384", (16384, 99999), (16383,), ">=16384"),
        ("> 16_383", (16384,), (16383,), ">=16384"),
        ("<4096", (0, 4095), (4096,), "<=4095"),
        ("<=4096", (4096,), (4097,), "<=4096"),
        ("1024..4096", (1024, 4096), (1023, 4097), "1024..4096"),
        ("1024..", (1024, 10**9), (1023,), ">=1024"),
        ("..4096", (1, 4096), (4097,), "<=4096"),
        ("==1", (1,), (0, 2), "==1"),
        ("512", (512,), (511, 513), "==512"),
        (512, (512,), (511, 513), "==512"),
    ],
)
def test_length_conditions(text: str | int, inside: tuple[int, ...], outside: tuple[int, ...], canonical: str) -> None:
    condition = LengthRange.parse(text)
    assert all(length in condition for length in inside)
    assert not any(length in condition for length in outside)
    assert str(condition) == canonical
    assert LengthRange.parse(canonical) == condition


@pytest.mark.parametrize(
    ("match", "site", "holds"),
    [
        ({"phase": "inference"}, {"phase": "prefill"}, True),
        ({"phase": "inference"}, {"phase": "decode"}, True),
        ({"phase": "inference"}, {"phase": "train"}, False),
        ({"phase": "any"}, {"phase": "train"}, True),
        ({"q_len": 1}, {"q_len": 1}, True),
        ({"q_len": 1}, {"q_len": 2}, False),
        ({"kind": "linear"}, {"kind": "linear"}, True),
        ({"kind": "linear"}, {"kind": "softmax"}, False),
        ({"mask": "*window(*)"}, {"mask": "causal & window(4096)"}, True),
        ({"mask": "causal"}, {"mask": "causal & window(4096)"}, False),
        ({"device": "cuda"}, {"device": "cuda:1"}, True),
        ({"device": "cuda:0"}, {"device": "cuda:1"}, False),
        ({"device": "cpu"}, {"device": "cuda"}, False),
        ({}, {}, True),
    ],
)
def test_conditions(match: dict[str, Any], site: dict[str, Any], holds: bool) -> None:
    policy = load_policy({"version": 1, "rule": [{"match": match, "min_speedup": 7}]})
    assert (policy.resolve(**site).min_speedup == 7) is holds


@pytest.mark.parametrize(
    ("text", "size"), [("2GiB", 2 * 1024**3), ("500 MB", 500 * 10**6), ("1.5k", 1500), ("12", 12), (7, 7), ("3 B", 3)]
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_size(text) == size


# text of the file, line that the error must name, parts that its text must have
WRONG_FILES = {
    "unknown top-level key": ("version = 1\ndefault = 1\n", 2, ['"default" in the top level', 'mean "defaults"?']),
    "unknown table": ("version = 1\n\n[[rules]]\nallow = 'exact'\n", 3, ['"rules"', 'mean "rule"?']),
    "unknown setting": (
        "version = 1\n[defaults]\nmin_speedups = 2\n",
        3,
        ['unknown key "min_speedups" in [defaults]', 'Did you mean "min_speedup"?', "allow, min_speedup, tune"],
    ),
    "unknown condition in an inline table": (
        "version = 1\n[[rule]]\ntune = 'model'\nmatch = { modul = 'a' }\n",
        4,
        ['unknown key "modul" in the match of rule 1', 'mean "module"?'],
    ),
    "unknown condition in a table": (
        "version = 1\n[[rule]]\ntune = 'model'\n[rule.match]\nkvlen = 3\n",
        5,
        ['"kvlen" in the match of rule 1', 'mean "kv_len"?'],
    ),
    "second rule": (
        "version = 1\n[[rule]]\nmatch = {}\ntune = 'model'\n[[rule]]\nmatch = {}\ntune = 'measured'\n",
        7,
        ['"tune" in rule 2', 'can\'t be "measured"', 'mean "measure"?'],
    ),
    "dotted key": ("version = 1\ndefaults.tune = 3\n", 2, ['"tune" in [defaults] must be a string, not the number 3']),
    "wrong type": (
        "version = 1\n[defaults]\nmin_speedup = 'fast'\n",
        3,
        ['"min_speedup" in [defaults] must be a number, not the string "fast"'],
    ),
    "boolean number": ("version = 1\n[defaults]\nmin_speedup = true\n", 3, ["not the boolean true"]),
    "not finite": ("version = 1\n[defaults]\nmin_speedup = nan\n", 3, ["must be finite"]),
    "negative": ("version = 1\n[defaults]\nmin_speedup = -1\n", 3, ["is negative", "Use 0"]),
    "error budget": ("version = 1\n[defaults]\nmax_error = 0\n", 3, ["above 0 and at most 1"]),
    "unknown value": (
        "version = 1\n[defaults]\nallow = 'aproximate'\n",
        3,
        ['can\'t be "aproximate"', 'mean "approximate"?'],
    ),
    "no budget in the defaults": (
        "version = 1\n[defaults]\nallow = 'approximate'\n",
        3,
        ['"approximate", but no "max_error"', "max_error = 0.02"],
    ),
    "no budget in a rule": (
        "version = 1\n[[rule]]\nmatch = {}\n# comment\nallow = 'approximate'\n",
        5,
        ['"allow" in rule 1', 'no "max_error"'],
    ),
    "variants": ("version = 1\n[defaults]\nvariants = 'tiled'\n", 3, ["must be a list of strings"]),
    "single bracket": ("version = 1\n[rule]\nallow = 'exact'\n", 2, ["must be an array of tables", "[[rule]]"]),
    "no match": ("version = 1\n[[rule]]\nallow = 'exact'\n", 2, ['rule 1 has no "match"', "[defaults]"]),
    "no effect": ("version = 1\n[[rule]]\nmatch = { q_len = 1 }\n", 2, ["rule 1 sets nothing"]),
    "length": (
        "version = 1\n[[rule]]\nallow = 'exact'\nmatch = { kv_len = '>=16k' }\n",
        4,
        ['"kv_len" in the match of rule 1', '">=16k" is not a length condition', '"1024..4096"'],
    ),
    "empty range": (
        "version = 1\n[[rule]]\nallow = 'exact'\nmatch = { kv_len = '9..3' }\n",
        4,
        ['no length fulfils "9..3"'],
    ),
    "length type": ("version = 1\n[[rule]]\nallow = 'exact'\nmatch = { q_len = 1.5 }\n", 4, ["not the number 1.5"]),
    "phase": (
        "version = 1\n[[rule]]\nallow = 'exact'\nmatch = { phase = 'training' }\n",
        4,
        ['mean "train"?', "prefill, decode"],
    ),
    "module": ("version = 1\n[[rule]]\nallow = 'exact'\nmatch = { module = 'a..b' }\n", 4, ["empty segment"]),
    "empty text": ("version = 1\n[[rule]]\nallow = 'exact'\nmatch = { mask = '' }\n", 4, ['"mask"', "is empty"]),
    "no version": ("[defaults]\ntune = 'model'\n", None, ['no "version"', "Add version = 1"]),
    "other version": ("\nversion = 2\n", 2, ["version 2 is not known"]),
    "version type": ("version = '1'\n", 1, ['must be a whole number, not the string "1"']),
    "cache size": ("version = 1\n[cache]\nmax_size = '2 gigs'\n", 3, ['"2 gigs" is not a size', '"2GiB"']),
    "no cache": ("version = 1\n[cache]\nmax_size = 0\n", 3, ["must be above 0"]),
    "cache key": ("version = 1\n[cache]\npath = 'x'\n", 3, ['unknown key "path" in [cache]', "dir, max_size"]),
    "table type": ("version = 1\ndefaults = 3\n", 2, ['"defaults" in the top level must be a table']),
    "syntax": ("version = 1\n[defaults]\nallow = exact\n", 3, ["not valid TOML"]),
    "syntax at the end": ("version = 1\n[defaults\n", 2, ["not valid TOML"]),
    "after a multi-line list": (
        'version = 1\n[defaults]\nvariants = [\n  "a = 1",\n  "b",\n]\ntune = 1\n',
        7,
        ['"tune"'],
    ),
}


@pytest.mark.parametrize(("text", "line", "parts"), WRONG_FILES.values(), ids=WRONG_FILES.keys())
def test_errors_name_file_line_and_key(tmp_path: Path, text: str, line: int | None, parts: list[str]) -> None:
    path = write(tmp_path, text)
    with pytest.raises(PolicyError) as caught:
        load_policy(path)
    assert caught.value.where == (f"{path}:{line}" if line else str(path))
    assert str(caught.value).startswith(f"{caught.value.where}: ")
    for part in parts:
        assert part in str(caught.value)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "latin.toml"
    path.write_bytes(b"version = 1\n# \xe9\n")
    with pytest.raises(PolicyError, match=r"latin\.toml:2: .*not UTF-8"):
        load_policy(path)
    with pytest.raises(PolicyError, match=r"missing\.toml: the policy file can't be read: No such file"):
        load_policy(str(tmp_path / "missing.toml"))
    with pytest.raises(PolicyError, match="can't be read"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ({"version": 1, "defaults": {"tune": 1}}, 'policy dict: "tune" in [defaults] must be a string'),
        ({"version": 1, "rule": [3]}, 'policy dict: item 1 of "rule" must be a table, not the number 3'),
        ({}, 'policy dict: the policy has no "version"'),
        ("alway", 'Did you mean "always"? The presets are exact'),
        ({"version": 1, "defaults": {"min_speedup": 10**400}}, '"min_speedup" in [defaults] must be finite, not inf'),
        ("x" * 5000, "xxx'... is neither a preset nor a file"),
        ("a\0b.toml", "the policy file can't be read: embedded null byte"),
        ("~nobody-of-this-name/a.toml", "the policy file can't be read: Could not determine home directory"),
        (
            {"version": 1, "cache": {"dir": "~nobody-of-this-name/a"}},
            'policy dict: "dir" in [cache] is in a home directory that is not known: ~nobody-of-this-name/a. Write',
        ),
        ({"version": 1, "cache": {"dir": "a\0b"}}, 'policy dict: "dir" in [cache] has a character'),
        (
            {"version": 1, "cache": {"max_size": "9" * 400 + "GiB"}},
            '"max_size" in [cache]: "99999999999999999999..." is',
        ),
        (3, "a policy can't be of type int. Pass a path"),
    ],
)
def test_errors_of_other_sources(source: Any, text: str) -> None:
    with pytest.raises(PolicyError) as caught:
        load_policy(source)
    assert text in str(caught.value)


def test_the_documentation_shows_valid_policies(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "policy.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"^```toml\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(load_policy(write(tmp_path, text)).rules) == 2
    for name in PRESETS:
        assert f"| `{name}` |" in page


def test_any_mapping_is_a_dict() -> None:
    class Frozen(Mapping[str, Any]):
        def __getitem__(self, key: str) -> Any:
            return {"version": 1}[key]

        def __iter__(self) -> Any:
            return iter(["version"])

        def __len__(self) -> int:
            return 1

    assert load_policy(Frozen()) == load_policy("exact")


def test_check_variants_names_line_and_nearest(example: Policy, tmp_path: Path) -> None:
    check_variants(example, ["tiled", "streaming", "vertical_slash"])
    with pytest.raises(PolicyError) as caught:
        check_variants(example, ["tiled", "streaming", "vertical_slashes"])
    assert caught.value.where == f"{tmp_path / 'attncomp.toml'}:10"
    assert 'unknown variant "vertical_slash" in rule 1. Did you mean "vertical_slashes"?' in str(caught.value)


def test_rules_know_their_place(example: Policy, tmp_path: Path) -> None:
    assert [rule.where for rule in example.rules] == [f"{tmp_path / 'attncomp.toml'}:{line}" for line in (6, 11)]


def test_lines_of_toml_constructs() -> None:
    text = '# [no]\na.b = 1\n"q r" = """\nx = 1\n[fake]\n"""\n[t.u]\n\'k\' = 2\n[[s]]\n[s.v]\n[[s]]\n[[s.w]]\nz = 1\n'
    assert toml_lines(text) == {
        ("a",): 2,
        ("a", "b"): 2,
        ("q r",): 3,
        ("t",): 7,
        ("t", "u"): 7,
        ("t", "u", "k"): 8,
        ("s",): 9,
        ("s", 0): 9,
        ("s", 0, "v"): 10,
        ("s", 1): 11,
        ("s", 1, "w"): 12,
        ("s", 1, "w", 0): 12,
        ("s", 1, "w", 0, "z"): 13,
    }


def test_errors_survive_worker_processes() -> None:
    error = PolicyError("what", where="here:1", fix="Do it")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.where) == (PolicyError, "here:1: what. Do it.", "here:1")
