"""Tables: a region between two linear layers as one table per group of channels."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fheq.affine import Affine, integers_of
from fheq.planning.plan import Plan
from fheq.regions import FILLER, in_float64

CHUNK = 1 << 22  # table entries evaluated at a time


class Tabulated(NamedTuple):
    """The tables of a point.

    source: `(n,)` source element of each distinct table application (-1 where the value is known); group: `(n,)` its table;
    place: for each element of the point, which application it is; table: `(G, entries)`, of the smallest integer type that
    holds it.
    """

    source: np.ndarray
    group: np.ndarray
    place: np.ndarray
    table: np.ndarray


def tabulate(
    layout: Plan, point: str, affine: Affine, scale: np.ndarray, offset: np.ndarray, codes: np.ndarray
) -> Tabulated:
    """Evaluates the region that ends in `point` for every code of its source, by the model's own ops in float64.

    Args:
        affine: the quantizer of the point.
        scale, offset: flat decoders of the source's elements.
        codes: the integers that a source element takes.
    """
    shape = layout.shape(point)
    size = int(np.prod(shape))
    elements = layout.regions[point].elements
    quantizer = affine.expanded(len(shape))
    leaves = np.stack(
        [np.broadcast_to(getattr(quantizer, n), shape).ravel() for n in ("scale", "zero_point", "qmin", "qmax")]
    )
    columns = lambda _, need: np.stack([scale[need], offset[need]], axis=1)
    label = layout.elements.signature(point, columns)
    label = np.unique(np.stack([label, *leaves], axis=1), axis=0, return_inverse=True)[1].ravel()
    first = np.full(label.max() + 1, -1)
    first[label[::-1]] = np.arange(size)[::-1]
    rows = [_rows(layout, point, affine, first[at], scale, offset, codes, leaves) for at in _slices(len(first), len(codes))]
    table, same = distinct_rows(np.concatenate(rows))
    applied = np.stack([np.where(elements == FILLER, -1, elements), same[label]], axis=1)
    pairs, place = np.unique(applied, axis=0, return_inverse=True)
    return Tabulated(pairs[:, 0], pairs[:, 1], place.ravel(), table)


def distinct_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different rows of a table, in order of appearance, and which of them each row is."""
    numbers: dict[bytes, int] = {}
    same = np.array([numbers.setdefault(row.tobytes(), len(numbers)) for row in table])
    return table[np.unique(same, return_index=True)[1]], same


def _slices(groups: int, entries: int) -> list[slice]:
    step = max(1, CHUNK // max(entries, 1))
    return [slice(i, i + step) for i in range(0, groups, step)]


def _rows(layout: Plan, point: str, affine: Affine, elements: np.ndarray, scale, offset, codes, leaves) -> np.ndarray:
    def source(_: str, need: np.ndarray) -> np.ndarray:
        safe = np.maximum(need, 0)
        return scale[safe][:, None] * codes[None, :] + offset[safe][:, None]

    real = in_float64(lambda: layout.elements.evaluate(point, elements, source)).astype(np.float64)
    step, zero_point, qmin, qmax = (leaf[elements][:, None] for leaf in leaves)
    steps = np.nan_to_num(real / step, nan=0.0, posinf=1e300, neginf=-1e300)
    largest = np.max(leaves[3])
    whole = integers_of(affine.mode, steps, zero_point + affine.origin) - affine.origin
    q = np.clip(whole, qmin, qmax).astype(np.min_scalar_type(int(largest)))
    return np.broadcast_to(q, (len(elements), len(codes)))
