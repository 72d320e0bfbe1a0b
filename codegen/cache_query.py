"""Choosing entries of a listing: filters such as ``variant=tiled`` or ``size>1MB``, sort keys, and prefixes of ids."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterable, Sequence

from attncomp.codegen.cache_inventory import EntryInfo
from attncomp.codegen.cache_units import parse_age, parse_size
from attncomp.errors import CacheError

SHORTEST_PREFIX = 6
_TEXT_FIELDS = ("id", "name", "variant", "status")
_FILTER = re.compile(r"\s*([a-z]+)\s*(>=|<=|!=|=|~|>|<)\s*(.+?)\s*\Z")
_TEXT_OPERATORS: dict[str, Callable[[str, str], bool]] = {
    "=": operator.eq,
    "!=": operator.ne,
    "~": operator.contains,
}
_NUMBER_OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt,
    "<": operator.lt,
    ">=": operator.ge,
    "<=": operator.le,
}
_SORT_KEYS: dict[str, Callable[[EntryInfo], tuple[float | str, ...]]] = {
    "used": lambda info: (info.last_used,),
    "created": lambda info: (info.created or 0.0,),
    "size": lambda info: (info.size,),
    "name": lambda info: (info.name,),
    "variant": lambda info: (info.variant, info.name),
    "status": lambda info: (info.status,),
    "id": lambda info: (info.id,),
}

EntryFilter = Callable[[EntryInfo], bool]


def parse_filter(text: str, *, now: float) -> EntryFilter:
    """A predicate over entries.

    Texts (``id name variant status``) know ``=``, ``!=`` and ``~`` (contains); ``size`` (``1MB``), ``age`` since the
    build and ``used`` since the last use (``30d``) know ``< <= > >=``.

    Raises:
        CacheError: if the filter can't be understood.
    """
    match = _FILTER.match(text)
    if match is None:
        raise _wrong_filter(text, "it is not of the form FIELD OPERATOR VALUE")
    name, sign, value = match.groups()
    if name in _TEXT_FIELDS:
        if sign not in _TEXT_OPERATORS:
            raise _wrong_filter(text, f"{name} knows the operators {' '.join(_TEXT_OPERATORS)}")
        compare_text = _TEXT_OPERATORS[sign]
        return lambda info: compare_text(str(getattr(info, name)), value)
    if name not in ("size", "age", "used"):
        raise _wrong_filter(text, f"there is no field {name!r}; fields are {', '.join(_TEXT_FIELDS)}, size, age, used")
    if sign not in _NUMBER_OPERATORS:
        raise _wrong_filter(text, f"{name} knows the operators {' '.join(_NUMBER_OPERATORS)}")
    try:
        limit = float(parse_size(value)) if name == "size" else parse_age(value)
    except ValueError as error:
        raise _wrong_filter(text, str(error)) from None
    compare = _NUMBER_OPERATORS[sign]
    if name == "size":
        return lambda info: compare(info.size, limit)
    if name == "used":
        return lambda info: compare(now - info.last_used, limit)
    return lambda info: info.created is not None and compare(now - info.created, limit)


def sort_entries(infos: Iterable[EntryInfo], key: str) -> list[EntryInfo]:
    """Sorted by ``used``, ``created``, ``size``, ``name``, ``variant``, ``status`` or ``id``.

    ``:asc`` or ``:desc`` may follow; without, times and sizes go down and texts go up.

    Raises:
        CacheError: for any other key.
    """
    name, _, order = key.partition(":")
    if name not in _SORT_KEYS or order not in ("", "asc", "desc"):
        raise CacheError(
            f"entries can't be sorted by {key!r}",
            fix=f"Use one of {', '.join(_SORT_KEYS)}, with :asc or :desc if you like",
        )
    down = order == "desc" or (not order and name in ("used", "created", "size"))
    return sorted(infos, key=_SORT_KEYS[name], reverse=down)


def is_prefix(text: str) -> bool:
    """Whether ``text`` could begin an id, and is long enough to mean one."""
    return SHORTEST_PREFIX <= len(text) <= 64 and re.fullmatch(r"[0-9a-f]+", text) is not None


def matching_ids(ids: Sequence[str], prefix: str) -> list[str]:
    """The ids that begin with ``prefix``; one in the good case."""
    return [each for each in ids if each.startswith(prefix)]


def _wrong_filter(text: str, why: str) -> CacheError:
    return CacheError(
        f"the filter {text!r} can't be understood: {why}", fix="Examples: variant=tiled, name~causal, size>1MB"
    )
