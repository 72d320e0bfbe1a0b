"""What a policy rule asks of a site: module path, phase, lengths, kind, mask text, device."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

PHASES = ("prefill", "decode", "train", "inference", "any")
KINDS = ("softmax", "linear", "pointwise")

_COMPARISON = re.compile(r"\s*(>=|<=|==|>|<)\s*(\d[\d_]*)\s*")
_RANGE = re.compile(r"\s*(\d[\d_]*)?\s*\.\.\s*(\d[\d_]*)?\s*")
_PLAIN = re.compile(r"\s*(\d[\d_]*)\s*")


@dataclass(frozen=True, slots=True)
class LengthRange:
    """The lengths from `low` to `high`, both included; `high=None` has no upper end."""

    low: int
    high: int | None

    @classmethod
    def parse(cls, value: str | int) -> LengthRange:
        """Read ``">=16384"``, ``"<4096"``, ``"1024..4096"`` (ends included), ``"1024.."``, ``"..4096"``, a number.

        Raises:
            ValueError: the text is none of these, or no length fulfils it.
        """
        text = str(value)
        low, high = _parse_bounds(text)
        if low < 0 or (high is not None and high < low):
            raise ValueError(f'no length fulfils "{text}"')
        return cls(low, high)

    def __contains__(self, length: int) -> bool:
        return self.low <= length and (self.high is None or length <= self.high)

    def __str__(self) -> str:
        """One canonical text for each range, so that two spellings of one condition hash alike."""
        if self.high is None:
            return f">={self.low}"
        if self.low == self.high:
            return f"=={self.low}"
        return f"<={self.high}" if self.low == 0 else f"{self.low}..{self.high}"


@dataclass(frozen=True, slots=True)
class Match:
    """The conditions of one rule; None means "any". All of them must hold.

    Attributes:
        module: glob over the dotted module path; `*` stands for (part of) one segment, `**` for any number of segments.
        phase: one of `PHASES`; "inference" is prefill or decode.
        kv_len: condition on the number of keys.
        q_len: condition on the number of queries.
        kind: one of `KINDS`.
        mask: glob over the mask's canonical text, such as ``causal & window(*)``.
        device: glob over the device; ``cuda`` also holds for ``cuda:1``.
    """

    module: str | None = None
    phase: str | None = None
    kv_len: LengthRange | None = None
    q_len: LengthRange | None = None
    kind: str | None = None
    mask: str | None = None
    device: str | None = None

    def holds(
        self, *, module: str, phase: str, kv_len: int | None, q_len: int | None, kind: str, mask: str, device: str
    ) -> bool:
        """Whether a site fulfils every condition. A length that is not known (None) fulfils no length condition."""
        return (
            (self.module is None or module_matches(self.module, module))
            and _phase_matches(self.phase, phase)
            and (self.kv_len is None or (kv_len is not None and kv_len in self.kv_len))
            and (self.q_len is None or (q_len is not None and q_len in self.q_len))
            and (self.kind is None or self.kind == kind)
            and (self.mask is None or fnmatchcase(mask, self.mask))
            and (self.device is None or _device_matches(self.device, device))
        )

    def to_dict(self) -> dict[str, str]:
        """The conditions that are set, as text in the policy file's own language."""
        return {key: str(value) for key in self.__slots__ if (value := getattr(self, key)) is not None}


def module_matches(pattern: str, path: str) -> bool:
    """Match a dotted module path segment by segment.

    ``model.layers.*.self_attn`` holds for ``model.layers.3.self_attn``, ``**.self_attn`` for every module of that name,
    and ``**`` for every path, the empty one of the root included.
    """
    return _segments_match(tuple(pattern.split(".")), tuple(path.split(".")) if path else ())


def _segments_match(pattern: tuple[str, ...], path: tuple[str, ...]) -> bool:
    # The positions in `path` that the pattern read so far can end at: no backtracking, however many `**` there are.
    reached = {0}
    for part in pattern:
        if part == "**":
            reached = set(range(min(reached), len(path) + 1))
        else:
            reached = {at + 1 for at in reached if at < len(path) and fnmatchcase(path[at], part)}
        if not reached:
            return False
    return len(path) in reached


def _phase_matches(wanted: str | None, phase: str) -> bool:
    if wanted is None or wanted == "any":
        return True
    return phase in ("prefill", "decode", "inference") if wanted == "inference" else wanted == phase


def _device_matches(pattern: str, device: str) -> bool:
    return fnmatchcase(device, pattern) or fnmatchcase(device.partition(":")[0], pattern)


def _parse_bounds(text: str) -> tuple[int, int | None]:
    if match := _PLAIN.fullmatch(text):
        return int(match[1]), int(match[1])
    if match := _COMPARISON.fullmatch(text):
        number = int(match[2])
        bounds: dict[str, tuple[int, int | None]] = {
            ">=": (number, None),
            ">": (number + 1, None),
            "<=": (0, number),
            "<": (0, number - 1),
            "==": (number, number),
        }
        return bounds[match[1]]
    if (match := _RANGE.fullmatch(text)) and (match[1] or match[2]):
        return int(match[1] or 0), int(match[2]) if match[2] else None
    raise ValueError(f'"{text}" is not a length condition')
