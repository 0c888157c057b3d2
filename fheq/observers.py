"""Statistics of tensors, and observers that turn them into ranges.

Statistics are a monoid and know no bits: `init`, `update` with a batch, `merge`. Observers read them: `range(stats, bits)`.

The histogram has fixed edges: each power of two from 2^-40 to 2^24 is cut into 16, for either sign, and what is smaller
counts as zero. So histograms of any data merge by addition, and their resolution is relative (about 5%).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np

Array = Any

_LOW, _HIGH, _PARTS = -40, 24, 16
_SIDE = (_HIGH - _LOW) * _PARTS
BINS = 2 * _SIDE + 1


class TensorStats(NamedTuple):
    """Statistics of one tensor, per channel; `C` is 1 for a tensor without a channel axis.

    count: `(C,)` elements seen; minimum, maximum: `(C,)`; total, squares: `(C,)` sums of x and x^2; histogram: `(C, BINS)`.
    """

    count: Array
    minimum: Array
    maximum: Array
    total: Array
    squares: Array
    histogram: Array


def init(channels: int) -> TensorStats:
    """The statistics of no data: the identity of `merge`."""
    zeros = np.zeros(channels)
    counts = np.zeros(channels, np.int64)
    full = np.full(channels, np.inf)
    return TensorStats(counts, full, -full, zeros, zeros, np.zeros((channels, BINS), np.int64))


def bin_of(x: Array) -> Array:
    """Index of the histogram bin of each value."""
    mantissa, exponent = jnp.frexp(jnp.abs(x))
    part = ((mantissa - 0.5) * (2 * _PARTS)).astype(jnp.int32)
    place = jnp.clip((exponent - _LOW) * _PARTS + part, 0, _SIDE)
    small = exponent < _LOW
    magnitude = jnp.where(small | (x == 0), 0, jnp.minimum(place + 1, _SIDE))
    return _SIDE + jnp.where(x < 0, -magnitude, magnitude)


def centres() -> np.ndarray:
    """The value that stands for each bin, shape `(BINS,)`."""
    place = np.arange(_SIDE)
    magnitude = 2.0 ** (place // _PARTS + _LOW - 1) * (1 + (place % _PARTS + 0.5) / _PARTS)
    return np.concatenate([-magnitude[::-1], [0.0], magnitude])


def update(stats: TensorStats, values: Array, keep: Array) -> TensorStats:
    """Adds a batch.

    Args:
        values: `(B, C, n)`.
        keep: `(B,)` bool; samples to count.
    """
    b, c, n = values.shape
    mask = keep[:, None, None]
    wide = values.astype(stats.total.dtype)
    seen = jnp.where(mask, wide, 0)
    histogram = stats.histogram.at[jnp.arange(c)[None, :, None], bin_of(values)].add(
        jnp.broadcast_to(mask, values.shape).astype(stats.histogram.dtype)
    )
    return TensorStats(
        stats.count + jnp.sum(keep) * n,
        jnp.minimum(stats.minimum, jnp.min(jnp.where(mask, wide, jnp.inf), axis=(0, 2))),
        jnp.maximum(stats.maximum, jnp.max(jnp.where(mask, wide, -jnp.inf), axis=(0, 2))),
        stats.total + jnp.sum(seen, axis=(0, 2)),
        stats.squares + jnp.sum(seen * seen, axis=(0, 2)),
        histogram,
    )


def merge(a: TensorStats, b: TensorStats) -> TensorStats:
    """The statistics of the data of both."""
    return TensorStats(
        a.count + b.count,
        np.minimum(a.minimum, b.minimum),
        np.maximum(a.maximum, b.maximum),
        a.total + b.total,
        a.squares + b.squares,
        a.histogram + b.histogram,
    )


def per_tensor(stats: TensorStats) -> TensorStats:
    """The same data seen as one channel."""
    return TensorStats(
        np.sum(stats.count, keepdims=True),
        np.min(stats.minimum, keepdims=True),
        np.max(stats.maximum, keepdims=True),
        np.sum(stats.total, keepdims=True),
        np.sum(stats.squares, keepdims=True),
        np.sum(stats.histogram, axis=0, keepdims=True),
    )


class Observer(Protocol):
    """Turns statistics into ranges."""

    def range(self, stats: TensorStats, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest real value to represent, each `(C,)`."""
        ...


@dataclass(frozen=True)
class MinMax:
    """The observed extremes, widened where a fraction of the range costs little: by `2^(bits - 8) * margin` of it, at most
    `margin`, at ends that do not look like hard limits (many values at the extreme)."""

    margin: float = 0.1

    def range(self, stats: TensorStats, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Observer`."""
        low, high = np.asarray(stats.minimum, np.float64), np.asarray(stats.maximum, np.float64)
        more = self.margin * min(1.0, 2.0 ** (bits - 8)) * (high - low)
        at = bin_indices(stats)
        rows = np.arange(len(low))
        crowd = np.maximum(2, np.asarray(stats.count) // 100)
        hard_low = np.asarray(stats.histogram)[rows, at(low)] > crowd
        hard_high = np.asarray(stats.histogram)[rows, at(high)] > crowd
        return np.where(hard_low, low, low - more), np.where(hard_high, high, high + more)


def bin_indices(stats: TensorStats):
    """`bin_of` for host arrays."""
    del stats

    def at(x: np.ndarray) -> np.ndarray:
        mantissa, exponent = np.frexp(np.abs(x))
        place = np.clip((exponent - _LOW) * _PARTS + ((mantissa - 0.5) * (2 * _PARTS)).astype(int), 0, _SIDE)
        magnitude = np.where((exponent < _LOW) | (x == 0), 0, np.minimum(place + 1, _SIDE))
        return _SIDE + np.where(x < 0, -magnitude, magnitude)

    return at


@dataclass(frozen=True)
class Percentile:
    """The range that holds the middle `percent` of the values (to the histogram's resolution)."""

    percent: float = 99.9

    def range(self, stats: TensorStats, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Observer`."""
        del bits
        below = np.cumsum(np.asarray(stats.histogram), axis=1) / np.maximum(np.asarray(stats.count)[:, None], 1)
        tail = (100 - self.percent) / 200
        value = centres()
        low = value[np.argmax(below > tail, axis=1)]
        high = value[np.argmax(below >= 1 - tail, axis=1)]
        low = np.clip(low, stats.minimum, stats.maximum)
        return low, np.clip(high, low, stats.maximum)


@dataclass(frozen=True)
class MeanSquaredError:
    """The clip that minimises the mean squared error of rounding and clipping (Banner et al., arXiv 1810.05723), searched on
    the histogram, one end after the other."""

    candidates: int = 60
    sweeps: int = 2

    def range(self, stats: TensorStats, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Observer`."""
        low, high = MinMax().range(stats, bits)
        fractions = np.linspace(1.0, 0.15, self.candidates)
        pivot = np.clip(0.0, low, high)
        for _ in range(self.sweeps):
            tops = pivot + (high - pivot) * fractions[:, None]
            high = _best(stats, np.broadcast_to(low, tops.shape), tops, bits)[1]
            bottoms = pivot + (low - pivot) * fractions[:, None]
            low = _best(stats, bottoms, np.broadcast_to(high, bottoms.shape), bits)[0]
        return low, high


def clip_error(stats: TensorStats, low: np.ndarray, high: np.ndarray, bits: int) -> np.ndarray:
    """Sum of squared errors of `bits`-bit quantization to [low, high], each `(candidates, C)`."""
    value = centres()
    histogram = np.asarray(stats.histogram, np.float64)
    value = np.clip(value[None, :], np.asarray(stats.minimum)[:, None], np.asarray(stats.maximum)[:, None])
    step = np.maximum(high - low, 1e-30) / (2.0**bits - 1)
    errors = []
    for lo, hi, s in zip(low, high, step):
        above = np.maximum(value - hi[:, None], 0)
        under = np.maximum(lo[:, None] - value, 0)
        inside = (value >= lo[:, None]) & (value <= hi[:, None]) & (value != 0)
        errors.append(np.sum(histogram * (above**2 + under**2 + inside * (s[:, None] ** 2 / 12)), axis=1))
    return np.stack(errors)


def _best(stats: TensorStats, low: np.ndarray, high: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    best = np.argmin(clip_error(stats, low, high, bits), axis=0)
    columns = np.arange(low.shape[1])
    return low[best, columns], high[best, columns]
