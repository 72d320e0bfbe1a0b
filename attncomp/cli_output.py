"""What the command line prints: tables for people, JSON with a schema number for programs, errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from enum import IntEnum
from typing import NoReturn

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

SCHEMA = 1
_PIPED_WIDTH = 200


class Exit(IntEnum):
    """Exit codes of every command."""

    OK = 0
    PROBLEM = 1
    USAGE = 2
    CACHE_UNUSABLE = 3


def print_json(body: dict[str, object]) -> None:
    print(json.dumps({"schema": SCHEMA, **body}, indent=1))


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print rows under headings; a heading that begins with ``>`` is set flush right. Text is folded, never cut off: a
    name in part can't be pasted anywhere."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        right = column.startswith(">")
        table.add_column(column.lstrip(">"), justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(plain(cell)) for cell in row))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPED_WIDTH)
    with console.capture() as printed:
        console.print(table)
    print("\n".join(line.rstrip() for line in printed.get().splitlines()))


def fail(code: Exit, message: str) -> NoReturn:
    """Print an error and end the command."""
    print(f"error: {message.rstrip('.')}.", file=sys.stderr)
    raise typer.Exit(code)


def plain(text: str) -> str:
    """Names come from other people's code: no control characters for the terminal to obey."""
    return "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
