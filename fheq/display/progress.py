"""Progress bars on what takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], what: str, show: bool | None = None, total: int | None = None) -> Iterator[T]:
    """Iterates over `items` under a progress bar on standard error.

    Args:
        show: True or False to force it; None shows it when standard error is a terminal.
    """
    if show is None:
        show = sys.stderr.isatty()
    if not show:
        yield from items
        return
    from rich.console import Console
    from rich.progress import track as rich_track

    count = total if total is not None else (len(items) if isinstance(items, Sized) else None)
    yield from rich_track(items, description=what, total=count, console=Console(stderr=True), transient=True)
