"""Reading policy sources: TOML with line numbers, and typed access to its tables with errors that name the place."""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attncomp.errors import PolicyError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # type: ignore[import-not-found, unused-ignore]  # installed where tomllib is not

KeyPath = tuple["str | int", ...]

_HEADER = re.compile(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]\]?\s*(?:#.*)?")
_KEY = re.compile(r"""\s*((?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[A-Za-z0-9_-]+|"[^"]*"|'[^']*'))*)\s*=""")
_KEY_PART = re.compile(r"""[A-Za-z0-9_-]+|"[^"]*"|'[^']*'""")
_AT_LINE = re.compile(r"\s*\(at (?:line (\d+), column \d+|end of document)\)")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a policy came from, so that every later error can name the place.

    Attributes:
        name: the file as the user wrote it, or a description such as ``policy dict``.
        folder: what relative paths inside the policy are relative to.
        lines: first line (from 1) of every table and key of a file; empty for other sources.
    """

    name: str
    folder: Path = field(default_factory=Path)
    lines: Mapping[KeyPath, int] = field(default_factory=dict)

    def where(self, path: KeyPath = ()) -> str:
        """``file:line`` of a key, or of the nearest table around it that has a line of its own."""
        for end in range(len(path), 0, -1):
            if path[:end] in self.lines:
                return f"{self.name}:{self.lines[path[:end]]}"
        return self.name


@dataclass(frozen=True, slots=True)
class Section:
    """One table of a policy, and the place that it has in its source."""

    values: Mapping[str, Any]
    origin: Origin
    path: KeyPath = ()

    @property
    def title(self) -> str:
        """How a user calls this table: ``[defaults]``, ``rule 2``, ``the match of rule 2``, ``the top level``."""
        match self.path:
            case ():
                return "the top level"
            case ("rule", int(index)):
                return f"rule {index + 1}"
            case ("rule", int(index), "match"):
                return f"the match of rule {index + 1}"
            case _:
                return f"[{'.'.join(str(part) for part in self.path)}]"

    def error(self, key: str | None, what: str, fix: str | None = None) -> PolicyError:
        path = self.path if key is None else (*self.path, key)
        return PolicyError(what, where=self.origin.where(path), fix=fix)

    def require_known(self, keys: Iterable[str]) -> None:
        """Refuse the first key that is not one of `keys`."""
        known = tuple(keys)
        for key in self.values:
            if key not in known:
                raise self.error(
                    str(key),
                    f'unknown key "{key}" in {self.title}',
                    f"{nearest(key, known)}The keys here are {', '.join(known)}",
                )

    def section(self, key: str) -> Section:
        value = self.values.get(key, {})
        if not isinstance(value, Mapping):
            raise self.type_error(key, "a table")
        return Section(value, self.origin, (*self.path, key))

    def sections(self, key: str) -> Iterator[Section]:
        value = self.values.get(key, [])
        if not isinstance(value, (list, tuple)):
            raise self.type_error(key, "an array of tables", f"Write [[{key}]], with two brackets")
        for index, item in enumerate(value):
            if not isinstance(item, Mapping):
                raise Section({}, self.origin, (*self.path, key)).error(
                    None, f'item {index + 1} of "{key}" must be a table, not {describe(item)}'
                )
            yield Section(item, self.origin, (*self.path, key, index))

    def text(self, key: str) -> str:
        value = self.values[key]
        if not isinstance(value, str):
            raise self.type_error(key, "a string")
        if not value.strip():
            raise self.error(key, f'"{key}" in {self.title} is empty', "Leave the key out, or give it a value")
        return value

    def choice(self, key: str, choices: tuple[str, ...]) -> str:
        value = self.text(key)
        if value not in choices:
            raise self.error(
                key,
                f'"{key}" in {self.title} can\'t be "{value}"',
                f"{nearest(value, choices)}The values are {', '.join(choices)}",
            )
        return value

    def number(self, key: str) -> float:
        value = self.values[key]
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.type_error(key, "a number")
        try:
            number = float(value)
        except OverflowError:  # an integer of hundreds of digits
            number = math.inf
        if not math.isfinite(number):
            raise self.error(key, f'"{key}" in {self.title} must be finite, not {number}')
        return number

    def texts(self, key: str) -> tuple[str, ...]:
        value = self.values[key]
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
            raise self.type_error(key, "a list of strings")
        return tuple(value)

    def type_error(self, key: str, wanted: str, fix: str | None = None) -> PolicyError:
        return self.error(key, f'"{key}" in {self.title} must be {wanted}, not {describe(self.values[key])}', fix)


def read_toml(path: str | os.PathLike[str]) -> Section:
    """Read a TOML file.

    Raises:
        PolicyError: the file can't be read, is not UTF-8, or is not TOML.
    """
    name = os.fspath(path)
    try:
        data = Path(path).expanduser().read_bytes()
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: an unknown home; ValueError: no path at all
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise PolicyError(
            f"the policy file can't be read: {reason}", where=name, fix="Check the path, or name a preset"
        ) from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise PolicyError("the policy file is not UTF-8", where=f"{name}:{line}", fix="Save it as UTF-8") from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        found = _AT_LINE.search(message)
        line = int(found[1]) if found and found[1] else text.count("\n") + 1
        reason = _AT_LINE.sub("", message)
        raise PolicyError(f"not valid TOML: {reason[:1].lower()}{reason[1:]}", where=f"{name}:{line}") from error
    return Section(values, Origin(name, Path(path).expanduser().parent, toml_lines(text)))


def toml_lines(text: str) -> dict[KeyPath, int]:
    """The first line of every table header and ``key =`` in a valid TOML text; keys of inline tables are not listed."""
    lines: dict[KeyPath, int] = {}
    counts: dict[KeyPath, int] = {}
    table: KeyPath = ()
    closing: str | None = None  # the delimiter of the multi-line string that is open
    for number, line in enumerate(text.splitlines(), start=1):
        if closing is not None:
            closing = None if closing in line else closing
            continue
        if header := _HEADER.fullmatch(line):
            table = _table_path(_key_parts(header[2]), counts, repeated=header[1] == "[[")
            for end in range(1, len(table) + 1):
                lines.setdefault(table[:end], number)
        elif key := _KEY.match(line):
            parts = _key_parts(key[1])
            for end in range(1, len(parts) + 1):
                lines.setdefault((*table, *parts[:end]), number)
        for delimiter in ('"""', "'''"):
            if line.count(delimiter) % 2:
                closing = delimiter
    return lines


def nearest(word: object, known: Iterable[str]) -> str:
    """``Did you mean "x"? `` for the nearest of `known`, or nothing where none is near."""
    close = difflib.get_close_matches(str(word), tuple(known), n=1, cutoff=0.5)
    return f'Did you mean "{close[0]}"? ' if close else ""


def describe(value: object) -> str:
    """A value as an error shows it: its TOML type and, where that is short, itself."""
    match value:
        case bool():
            return f"the boolean {str(value).lower()}"
        case str():
            return f'the string "{value}"'
        case int() | float():
            return f"the number {value}"
        case Mapping():
            return "a table"
        case list() | tuple():
            return "a list"
        case None:
            return "None"
        case _:
            return f"a {type(value).__name__}"


def _key_parts(text: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in _KEY_PART.findall(text))


def _table_path(parts: tuple[str, ...], counts: dict[KeyPath, int], *, repeated: bool) -> KeyPath:
    path: KeyPath = ()
    for position, part in enumerate(parts):
        path = (*path, part)
        if repeated and position == len(parts) - 1:
            counts[path] = counts.get(path, -1) + 1
        if path in counts:  # an array of tables: its latest element is meant
            path = (*path, counts[path])
    return path
