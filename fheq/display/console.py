"""Tables in a terminal. The plain ones need no rich."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

if TYPE_CHECKING:
    from rich.console import Console

NAME_WIDTH = 30
WIDTH = 80  # of output that goes to no terminal


def shorten(text: str, width: int = NAME_WIDTH) -> str:
    """A name with its middle left out where it is long: the ends tell names apart."""
    if len(text) <= width:
        return text
    tail = (width - 1) * 2 // 3
    return f"{text[: width - 1 - tail]}…{text[-tail:]}"


def number(value: float) -> str:
    """A number in at most 9 characters."""
    return f"{value:.4g}"


def span(values: Any) -> str:
    """One number, or smallest and largest of several; "traced" inside a JAX transform."""
    if isinstance(values, jax.core.Tracer):
        return "traced"
    array = np.asarray(values, np.float64)
    if not array.size:
        return "none"
    low, high = float(array.min()), float(array.max())
    return number(low) if low == high else f"{number(low)} .. {number(high)}"


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A plain table: the first column to the left, the others to the right."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(zip(line, widths))
        ).rstrip()
        for line in lines
    )


def console(stderr: bool = False) -> Console:
    """A rich console; 80 columns where the output is no terminal."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else WIDTH, highlight=False, soft_wrap=not stream.isatty())


def show_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table to standard output, never wider than the console: the first column is cut first."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for i, column in enumerate(header):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True, overflow="ellipsis")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console().print(table)


@contextmanager
def working(what: str, show: bool | None = None) -> Iterator[None]:
    """A spinner on standard error while something without measurable progress runs; by default only on a terminal."""
    if not (sys.stderr.isatty() if show is None else show):
        yield
        return
    with console(stderr=True).status(what):
        yield
