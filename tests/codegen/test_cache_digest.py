"""Canonical JSON: one text for one value, another text for any other, in every process."""

from __future__ import annotations

import enum
import json
import math
import os
import re
import subprocess
import sys
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attncomp.codegen.digest import canonical_json, digest, is_digest

SCALARS: st.SearchStrategy[Any] = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=8)
    | st.floats(allow_nan=False).map(float.hex)
    | st.sampled_from(["str:", "str:0x1p+0", "inf", "-inf", "0x0.0p+0"])
)
VALUES: st.SearchStrategy[Any] = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


def same(left: Any, right: Any) -> bool:
    """Equality that tells True, 1 and 1.0 apart, and 0.0 from -0.0."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float):
        return left == right and math.copysign(1, left) == math.copysign(1, right)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


@settings(max_examples=100, deadline=None)
@given(VALUES, VALUES)
def test_equal_texts_exactly_for_equal_values(left: Any, right: Any) -> None:
    assert (canonical_json(left) == canonical_json(right)) == same(left, right)


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_is_compact_ascii_json_and_stable(value: Any) -> None:
    text = canonical_json(value)
    assert text.isascii()
    assert json.dumps(json.loads(text), sort_keys=True, separators=(",", ":")) == text


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=4), SCALARS, max_size=5))
def test_the_order_of_keys_does_not_matter(value: dict[str, Any]) -> None:
    assert canonical_json(dict(reversed(value.items()))) == canonical_json(value)
    assert canonical_json(OrderedDict(value)) == canonical_json(value)


@pytest.mark.parametrize(
    ("left", "right"),
    [
        (True, 1),
        (1, 1.0),
        (0.0, -0.0),
        (1.0, "0x1.0000000000000p+0"),
        (math.inf, "inf"),
        ("str:inf", "inf"),
        ([["ab"], "c"], [["a"], "bc"]),
        ({"a": {"b": 1}}, {"a": 1, "b": 1}),
        (None, "null"),
    ],
)
def test_near_values_differ(left: object, right: object) -> None:
    assert canonical_json(left) != canonical_json(right)


def test_sets_are_sorted_and_tuples_are_arrays() -> None:
    assert canonical_json({"b", "a", "c"}) == '["a","b","c"]'
    assert canonical_json(frozenset((2, 1))) == "[1,2]"
    assert canonical_json((1, (2,))) == canonical_json([1, [2]])


class Color(enum.IntEnum):
    RED = 1


class Text(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value", [object(), b"x", 1j, Color.RED, Text("x"), {1: 2}, {("a",): 1}, [{"x": [object()]}], range(3)]
)
def test_unknown_types_are_refused(value: object) -> None:
    with pytest.raises(TypeError):
        canonical_json(value)


def test_the_refusal_says_where() -> None:
    with pytest.raises(TypeError, match=re.escape("$.mask[1]") + ".*complex"):
        canonical_json({"mask": [1, 2j]})
    with pytest.raises(ValueError, match="NaN"):
        canonical_json([math.nan])


def test_domains_separate() -> None:
    assert digest("kernel", {"a": 1}) != digest("render", {"a": 1})
    assert is_digest(digest("kernel", {}))


@pytest.mark.parametrize("text", ["", "a" * 63, "A" * 64, "g" * 64, "a" * 64 + "\n", "../" + "a" * 61, None, 5])
def test_is_digest_refuses_what_is_no_safe_file_name(text: object) -> None:
    assert not is_digest(text)


def test_digest_is_the_same_in_another_process(tmp_path: os.PathLike[str]) -> None:
    fields = "{'dtype': 'bf16', 'axes': {'d', 'e', 'b', 'i'}, 'scale': 0.125, 'head_dim': 128}"
    script = f"from attncomp.codegen.digest import digest; print(digest('kernel', {fields}))"
    found = {
        subprocess.run(
            [sys.executable, "-c", script],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "HOME": os.fspath(tmp_path),
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed in ("1", "2")
    }
    assert found == {digest("kernel", eval(fields))}
