"""Tables on standard output: whole lines where they are piped, as many columns as there is room for on a terminal."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Rich would exit with 1, which is our code for a bug."""
        raise BrokenPipeError


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
    console = _Console(highlight=False)
    used = [c for i, c in enumerate(columns) if not c or any(cells[i] for cells, _ in rows)]
    table = _table(columns, rows, right, used)
    for column in spare:
        if not console.is_terminal or _width(console, table) <= console.width:
            break
        used = [c for c in used if c != column]
        table = _table(columns, rows, right, used)
    if not console.is_terminal:
        console.width = max(console.width, _width(console, table))
    console.print(table)


def say(text: str) -> None:
    """Print a line as it is, for the terminal to wrap."""
    _Console(highlight=False).print(text, soft_wrap=True, markup=False)


def _table(
    columns: Sequence[str], rows: Sequence[tuple[Sequence[str], str]], right: Collection[str], used: Collection[str]
) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    kept = [i for i, column in enumerate(columns) if column in used]
    for i in kept:
        table.add_column(columns[i], justify="right" if columns[i] in right else "left", overflow="fold")
    for cells, style in rows:
        table.add_row(*(Text(cells[i]) for i in kept), style=style or None)
    return table


def _width(console: Console, table: Table) -> int:
    unlimited = console.options.update(width=1_000_000)
    return Measurement.get(console, unlimited, table).maximum
