"""The range that keeps most of a distribution's information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fheq.observing.statistics import HISTOGRAM, TensorStats, bins

SMALLEST = 1e-4  # probability, in all, of what a quantized distribution leaves empty


@dataclass(frozen=True)
class Entropy:
    """The range of least Kullback-Leibler divergence between the values and the quantized ones (Migacz, GTC 2017).

    A range is worth what is left of the distribution when all within a step are taken as alike and all beyond its ends lie
    at them. Values that are exactly 0, a step of every quantizer, count for nothing. Bins are about 5% wide, so that beyond
    5 bits or so, where steps are narrower, there is little to gain by clipping, and the range is that of the extremes.
    """

    cells: int = 2048
    candidates: int = 64
    smallest: float = 0.15
    sweeps: int = 2
    reads: ClassVar[tuple[str, ...]] = (HISTOGRAM,)

    def range(self, stats: TensorStats, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Observer`."""
        least, most = (np.asarray(v, np.float64) for v in (stats.minimum, stats.maximum))
        if 2**bits >= self.cells:
            return least, most
        mass = [self._spread(*row) for row in zip(*_edges(stats), least, most)]
        ends = [self._ends(*row, 2**bits) for row in zip(mass, least, most)]
        low, high = np.asarray(ends, np.float64).T
        return least + (most - least) * low / self.cells, least + (most - least) * high / self.cells

    def _spread(self, edges: np.ndarray, below: np.ndarray, least: float, most: float) -> np.ndarray:
        """The mass of each of the cells that the observed range is cut into, even within a bin."""
        return np.diff(np.interp(np.linspace(least, most, self.cells + 1), edges, below))

    def _ends(self, mass: np.ndarray, least: float, most: float, levels: int) -> tuple[int, int]:
        """First cell, and the one after the last, one end searched after the other from the middle outwards."""
        low, high = 0, self.cells
        if not most > least:
            return low, high
        middle = -least / (most - least) if least <= 0 <= most else 0.5
        fractions = np.linspace(self.smallest, 1, self.candidates)
        tops = np.unique(np.ceil(self.cells * (middle + (1 - middle) * fractions)).astype(int))
        bottoms = np.unique(np.floor(self.cells * middle * (1 - fractions)).astype(int))
        for _ in range(self.sweeps):
            high = min(tops, key=lambda top: divergence(mass, low, top, levels))
            low = min(bottoms, key=lambda bottom: divergence(mass, bottom, high, levels))
        return low, high


def _edges(stats: TensorStats) -> tuple[np.ndarray, np.ndarray]:
    """Edges between the bins in use, `(C, K + 1)`, and the mass below each, that of zeros left out."""
    centre, value, mass = bins(stats)
    between = (value[:, 1:] + value[:, :-1]) / 2
    edges = np.concatenate([value[:, :1], between, value[:, -1:]], axis=1)
    below = np.cumsum(np.where(centre == 0, 0, mass), axis=1)
    return edges, np.concatenate([np.zeros((len(mass), 1)), below], axis=1)


def divergence(mass: np.ndarray, first: int, last: int, levels: int) -> float:
    """Kullback-Leibler divergence of the distribution clipped to some cells and quantized, from the one that is clipped.

    Args:
        mass: of each cell, `(cells,)`.
        first, last: the cells kept, `last` excluded.
        levels: steps that these are quantized to.
    """
    count = last - first
    if count < 1 or not mass.any():
        return float("inf")
    inner = mass[first:last]
    clipped = inner.copy()
    clipped[0] += mass[:first].sum()
    clipped[-1] += mass[last:].sum()
    level = np.arange(count) * levels // count
    used = inner > 0
    share = np.bincount(level, inner) / np.maximum(np.bincount(level, used), 1)
    quantized = np.where(used, share[level], 0)
    p = clipped / clipped.sum()
    q = np.maximum(quantized / max(quantized.sum(), 1e-300), SMALLEST / count)
    q /= q.sum()
    return float(np.sum(p * np.log(np.where(p > 0, p, 1) / q)))
