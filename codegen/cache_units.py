"""Sizes and ages as people write and read them: ``2GiB``, ``30d``, ``3 hours ago``."""

from __future__ import annotations

import math
import re

_SIZE_UNITS = {
    "": 1,
    "b": 1,
    **{prefix: 1000**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}i": 1024**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}ib": 1024**power for power, prefix in enumerate("kmgt", start=1)},
    **{f"{prefix}b": 1000**power for power, prefix in enumerate("kmgt", start=1)},
}
_AGE_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 7 * 86400.0}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*\Z")


def parse_size(text: str | int) -> int:
    """Bytes of ``"2GiB"`` (powers of 1024), ``"500MB"`` or ``"500M"`` (powers of 1000), or a plain number.

    Raises:
        ValueError: if the text is none of these.
    """
    if isinstance(text, int):
        if text < 0:
            raise ValueError(f"a size can't be negative: {text}")
        return text
    match = _QUANTITY.match(text)
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _SIZE_UNITS:
        raise ValueError(
            f"{text!r} is not a size; write a number with B, KiB, MiB, GiB, TiB, kB, MB, GB or TB, as in 2GiB"
        )
    size = float(match.group(1)) * _SIZE_UNITS[unit]
    if math.isinf(size):
        raise ValueError(f"{text[:20]}... is no size that any disk has")
    return int(size)


def parse_age(text: str) -> float:
    """Seconds of ``"90s"``, ``"45m"``, ``"12h"``, ``"30d"`` or ``"2w"``.

    Raises:
        ValueError: if the number or its unit is missing or unknown.
    """
    match = _QUANTITY.match(text)
    unit = match.group(2).lower() if match else None
    if match is None or unit not in _AGE_UNITS:
        raise ValueError(f"{text!r} is not an age; write a number with s, m, h, d or w, as in 30d")
    return float(match.group(1)) * _AGE_UNITS[unit]


def format_size(size: float) -> str:
    """``312.4K``, ``9.8M``, ``2.0G``; whole bytes below 1024."""
    if size < 1024:
        return f"{int(size)}B"
    for unit in "KMG":
        size /= 1024
        if size < 1024:
            return f"{size:.1f}{unit}"
    return f"{size / 1024:.1f}T"


def format_age(seconds: float) -> str:
    """``just now``, ``2 min ago``, ``1 hour ago``, ``3 days ago``; a time to come counts as now."""
    if seconds < 60:
        return "just now"
    if seconds < 3600:
        return f"{int(seconds // 60)} min ago"
    unit, length = ("hour", 3600) if seconds < 86400 else ("day", 86400)
    count = int(seconds // length)
    return f"{count} {unit}{'' if count == 1 else 's'} ago"
