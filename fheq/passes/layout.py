"""Where the elements of a value are when only some of them are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FIXED = -1  # a known integer
DEAD = -2  # nobody reads it


@dataclass(frozen=True, eq=False)
class Address:
    """Where each element of a value is (arrays are flat, one entry per element).

    Args:
        names: new values.
        source: position in `names`, FIXED or DEAD.
        place: flat index into that value, or the known integer.
        pending: what is to be added to what is there.
    """

    names: tuple[str, ...]
    source: np.ndarray
    place: np.ndarray
    pending: np.ndarray

    @staticmethod
    def join(parts: Sequence[Address]) -> Address:
        """The address of values put one behind the other."""
        if len(parts) == 1:
            return parts[0]
        names = tuple(dict.fromkeys(name for part in parts for name in part.names))
        number = lambda part: np.array([names.index(n) for n in part.names] + [DEAD, FIXED])  # -1 and -2 index the end
        source = np.concatenate([number(part)[part.source] for part in parts])
        place, pending = (np.concatenate([getattr(p, field) for p in parts]) for field in ("place", "pending"))
        return Address(names, source, place, pending)

    def gather(self, index: np.ndarray, fill: np.ndarray | None) -> Address:
        """The address of copied elements; known integers where the index is negative."""
        hole, at = index < 0, np.maximum(index, 0)
        known = 0 if fill is None else fill.ravel()
        source, place = np.where(hole, FIXED, self.source[at]), np.where(hole, known, self.place[at])
        return Address(self.names, source, place, np.where(hole, 0, self.pending[at]))

    def read(self, elements: np.ndarray) -> Address:
        """The address of some elements, to gather them: it names only values that are read, and nothing in it is dead.

        A dead element copies any computed one: nobody reads it, and a copy costs nothing.
        """
        source, place, pending = (v[elements] for v in (self.source, self.place, self.pending))
        dead, computed = source == DEAD, np.flatnonzero(source >= 0)
        if np.any(dead):
            copied = (source[computed[0]], place[computed[0]]) if len(computed) else (FIXED, 0)
            source, place = np.where(dead, copied[0], source), np.where(dead, copied[1], place)
        used = np.unique(source[source >= 0])
        number = np.full(len(self.names) + 1, FIXED)  # FIXED indexes the end
        number[used] = np.arange(len(used))
        return Address(tuple(self.names[i] for i in used), number[source], place, pending)


def address(name: str, elements: np.ndarray, pending: np.ndarray | None, size: int) -> Address:
    """The address of a value of `size` elements whose flat `elements` are those of the new value `name`."""
    source, place, rest = np.full(size, DEAD), np.zeros(size, np.int64), np.zeros(size, np.int64)
    flat = elements.ravel()
    source[flat], place[flat] = 0, np.arange(len(flat))
    if pending is not None:
        rest[flat] = pending.ravel()
    return Address((name,), source, place, rest)


def layout_of(live: np.ndarray) -> np.ndarray:
    """Flat indices of the live elements, as a grid where they form one, so that what broadcasts stays small; else flat."""
    number = np.arange(live.size).reshape(live.shape)
    if live.all():
        return number
    grid = np.ix_(*kept(live))
    return number[grid] if live[grid].all() else np.flatnonzero(live)


def kept(live: np.ndarray) -> tuple[np.ndarray, ...]:
    """Along each axis, the indices at which anything is live."""
    axes = range(live.ndim)
    return tuple(np.flatnonzero(live.any(axis=tuple(a for a in axes if a != axis))) for axis in axes)
