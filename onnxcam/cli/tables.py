"""Tables on standard output: whole lines where they are piped, as many columns as there is room for on a terminal.

Only what a terminal shows is drawn by rich, which takes a while to import.
"""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table


def print_table(
    columns: Sequence[str],
    rows: Sequence[tuple[Sequence[str], str]],
    right: Collection[str] = (),
    spare: Sequence[str] = (),
) -> None:
    """Print rows of (cells, style).

    The columns `right` are aligned there; empty columns are left out. A pipe gets all of a line. On a terminal that is
    too narrow the columns `spare` go, the first one first; if that is not enough, cells are folded.
    """
    used = [c for i, c in enumerate(columns) if not c or any(cells[i] for cells, _ in rows)]
    if not sys.stdout.isatty():
        _print_lines(columns, rows, right, used)
        return
    console = _console()
    table = _table(columns, rows, right, used)
    for column in spare:
        if _width(console, table) <= console.width:
            break
        used = [c for c in used if c != column]
        table = _table(columns, rows, right, used)
    console.print(table)


def say(text: str) -> None:
    """Print a line as it is, for the terminal to wrap."""
    print(text)


def _print_lines(
    columns: Sequence[str], rows: Sequence[tuple[Sequence[str], str]], right: Collection[str], used: Collection[str]
) -> None:
    kept = [i for i, column in enumerate(columns) if column in used]
    lines = [[columns[i] for i in kept], *([cells[i] for i in kept] for cells, _ in rows)]
    widths = [max(map(_cells, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = []
        for i, text, width in zip(kept, line, widths, strict=True):
            space = " " * (width - _cells(text))
            padded.append(space + text if columns[i] in right else text + space)
        print("  ".join(padded).rstrip())


def _cells(text: str) -> int:
    """How many cells of a terminal `text` takes: two for a wide character, none for an accent of its own."""
    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text
    )


def _console() -> Console:
    from rich.console import Console

    class Quiet(Console):
        def on_broken_pipe(self) -> None:
            """Rich would exit with 1, which is our code for a bug."""
            raise BrokenPipeError

    return Quiet(highlight=False)


def _table(
    columns: Sequence[str], rows: Sequence[tuple[Sequence[str], str]], right: Collection[str], used: Collection[str]
) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    kept = [i for i, column in enumerate(columns) if column in used]
    for i in kept:
        table.add_column(columns[i], justify="right" if columns[i] in right else "left", overflow="fold")
    for cells, style in rows:
        table.add_row(*(Text(cells[i]) for i in kept), style=style or None)
    return table


def _width(console: Console, table: Table) -> int:
    from rich.measure import Measurement

    unlimited = console.options.update(width=1_000_000)
    return Measurement.get(console, unlimited, table).maximum
