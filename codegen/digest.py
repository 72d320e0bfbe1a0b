"""Canonical JSON and domain-separated digests: the one way this project turns named fields into an identity."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from collections.abc import Set as AbstractSet

_DIGEST = re.compile(r"[0-9a-f]{64}\Z")
# Strings that look like an encoded float, or like an escaped string, are escaped: different values, different texts.
_NEEDS_ESCAPE = re.compile(r"str:|-?0x|-?inf\Z")


def canonical_json(obj: object) -> str:
    """One text per value: sorted keys, no spaces, ASCII, floats as ``float.hex()``.

    Accepts None, bool, int, float, str, lists and tuples (the same array), sets (sorted) and mappings with string keys.
    ``True``, ``1`` and ``1.0`` differ, and so do ``0.0`` and ``-0.0``.

    Raises:
        TypeError: for any other type, subclasses included: an identity must never depend on somebody's ``__str__``.
        ValueError: for NaN, which is not equal to itself and so can't be part of an identity.
    """
    return json.dumps(_encoded(obj, "$"), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(domain: str, obj: object) -> str:
    """SHA-256 (64 hex digits) of ``obj``'s canonical JSON; equal objects of different domains get different digests."""
    return digest_of_text(domain, canonical_json(obj))


def digest_of_text(domain: str, text: str) -> str:
    """As `digest`, for a text that already is canonical JSON."""
    return hashlib.sha256(f"attncomp/{domain}/1\0{text}".encode()).hexdigest()


def is_digest(text: object) -> bool:
    """Whether ``text`` is a string of exactly 64 lower-case hex digits, and so safe as a file name."""
    return isinstance(text, str) and _DIGEST.match(text) is not None


def _encoded(obj: object, path: str) -> object:
    kind = type(obj)
    if obj is None or kind is bool or kind is int:
        return obj
    if isinstance(obj, str) and kind is str:
        return f"str:{obj}" if _NEEDS_ESCAPE.match(obj) else obj
    if isinstance(obj, float) and kind is float:
        if math.isnan(obj):
            raise ValueError(f"{path}: NaN can't be part of an identity")
        return obj.hex()
    if isinstance(obj, (list, tuple)):
        return [_encoded(item, f"{path}[{index}]") for index, item in enumerate(obj)]
    if isinstance(obj, AbstractSet):
        return sorted((_encoded(item, f"{path}{{}}") for item in obj), key=_sort_key)
    if isinstance(obj, Mapping):
        for key in obj:
            if type(key) is not str:
                raise TypeError(f"{path}: the key {key!r} is a {type(key).__qualname__}; keys must be strings")
        return {key: _encoded(value, f"{path}.{key}") for key, value in obj.items()}
    name = f"{kind.__module__}.{kind.__qualname__}"
    raise TypeError(f"{path}: a value of type {name} has no canonical form; spell it as a string or a number")


def _sort_key(encoded: object) -> str:
    return json.dumps(encoded, sort_keys=True)
