"""Statistics of tensors, and observers that turn them into ranges.

Statistics are a monoid and know no bits: `init`, `update` with a batch, `merge`. Observers read them: `range(stats, bits)`.

The histogram has fixed edges: each power of two from 2^-40 to 2^24 is cut into 16, for either sign, and what is smaller
counts as zero. So histograms of any data merge by addition, and their resolution is relative (about 5%).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

Array = Any
T = TypeVar("T")

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
    """Index of the histogram bin of each float32 value: its exponent and the top bits of its mantissa are the bin."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32) >> (23 - _PARTS.bit_length() + 1)
    magnitude = jnp.clip(bits - (126 + _LOW) * _PARTS + 1, 0, _SIDE)
    return _SIDE + jnp.where(x < 0, -magnitude, magnitude)


def centres() -> np.ndarray:
    """The value that stands for each bin, shape `(BINS,)`."""
    place = np.arange(_SIDE)
    magnitude = 2.0 ** (place // _PARTS + _LOW - 1) * (1 + (place % _PARTS + 0.5) / _PARTS)
    return np.concatenate([-magnitude[::-1], [0.0], magnitude])


class Bins(NamedTuple):
    """The bins of a histogram that some channel uses, K of them: the others change no sum over bins.

    centre: `(K,)`; value: `(C, K)` what stands for each bin of each channel; mass: `(C, K)` how many values are there.
    """

    centre: np.ndarray
    value: np.ndarray
    mass: np.ndarray


def bins(stats: TensorStats) -> Bins:
    """The bins in use; the value of each is its centre, within the observed extremes.

    The outermost bins in use stand for the extremes themselves, which is exact for values that crowd at a limit, as those of
    a saturated tanh do.
    """
    least, most = (np.asarray(v, np.float64)[:, None] for v in (stats.minimum, stats.maximum))
    histogram = np.asarray(stats.histogram)
    kept = np.flatnonzero(histogram.any(axis=0))
    mass, centre = histogram[:, kept].astype(np.float64), centres()[kept]
    used = mass > 0
    place = np.arange(len(kept))[None, :]
    first = np.argmax(used, axis=1)[:, None]
    last = len(kept) - 1 - np.argmax(used[:, ::-1], axis=1)[:, None]
    value = np.clip(centre[None, :], least, most)
    return Bins(centre, np.where(place <= first, least, np.where(place >= last, most, value)), mass)


def update(stats: TensorStats, values: Array, keep: Array) -> TensorStats:
    """Adds a batch.

    Args:
        values: `(B, C, n)` float32.
        keep: `(B,)` bool; samples to count.
    """
    _, c, n = values.shape
    mask = keep[:, None, None]
    wide = values.astype(stats.total.dtype)
    seen = jnp.where(mask, wide, 0)
    low, high = (jnp.where(mask, values, end) for end in (jnp.inf, -jnp.inf))
    place = jnp.arange(c, dtype=jnp.int32)[None, :, None] * BINS + bin_of(values)
    ones = jnp.broadcast_to(mask, values.shape).astype(stats.histogram.dtype)
    histogram = stats.histogram.ravel().at[place.ravel()].add(ones.ravel(), mode="promise_in_bounds")
    return TensorStats(
        stats.count + jnp.sum(keep) * n,
        jnp.minimum(stats.minimum, jnp.min(low, axis=(0, 2))),
        jnp.maximum(stats.maximum, jnp.max(high, axis=(0, 2))),
        stats.total + jnp.sum(seen, axis=(0, 2)),
        stats.squares + jnp.sum(seen * seen, axis=(0, 2)),
        histogram.reshape(stats.histogram.shape),
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


def merge_over(stats: TensorStats, axis: str) -> TensorStats:
    """`merge` over the devices along an axis of a mesh, inside of `jax.shard_map`."""
    add = lambda leaf: jax.lax.psum(leaf, axis)
    least, most = jax.lax.pmin(stats.minimum, axis), jax.lax.pmax(stats.maximum, axis)
    return TensorStats(add(stats.count), least, most, add(stats.total), add(stats.squares), add(stats.histogram))


def of_statistics(fn: Callable[[TensorStats], T]) -> Callable[[TensorStats], T]:
    """Remembers a function of statistics while they are alive, so that many fits to the same ones work it out once."""
    known: dict[tuple[int, ...], tuple[list[weakref.ref], T]] = {}

    @wraps(fn)
    def remembered(stats: TensorStats) -> T:
        key = tuple(map(id, stats))
        if key not in known or any(ref() is not leaf for ref, leaf in zip(known[key][0], stats)):
            forget = lambda _: known.pop(key, None)
            known[key] = [weakref.ref(leaf, forget) for leaf in stats], fn(stats)
        return known[key][1]

    return remembered


@of_statistics
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
    """The observed extremes."""

    def range(self, stats: TensorStats, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Observer`."""
        del bits
        return np.asarray(stats.minimum, np.float64), np.asarray(stats.maximum, np.float64)


@dataclass(frozen=True)
class Percentile:
    """The range that holds the middle `percent` of the values (to the histogram's resolution)."""

    percent: float = 99.9

    def range(self, stats: TensorStats, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Observer`."""
        del bits
        value, _, mass = bins(stats)
        below = np.cumsum(mass, axis=1) / np.maximum(np.asarray(stats.count)[:, None], 1)
        tail = (100 - self.percent) / 200
        low = value[np.argmax(below > tail, axis=1)]
        high = value[np.argmax(below >= 1 - tail, axis=1)]
        low = np.clip(low, stats.minimum, stats.maximum)
        return low, np.clip(high, low, stats.maximum)


@dataclass(frozen=True)
class MeanSquaredError:
    """The range that minimises the mean squared error of rounding and clipping (Banner et al., arXiv 1810.05723).

    It is searched on the histogram, one end after the other. Unseen data go beyond what was observed (see `Tail`); that
    expectation is part of the error, so that with many bits, where clipping would dominate, the range is wider than what was
    observed.
    """

    smallest: float = 0.15
    largest: float = 2.0
    candidates: int = 112
    sweeps: int = 2

    def range(self, stats: TensorStats, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Observer`."""
        least, most = (np.asarray(v, np.float64) for v in (stats.minimum, stats.maximum))
        low, high = least, most
        fractions = np.linspace(self.smallest, self.largest, self.candidates)[:, None]
        middle = np.where((least > 0) | (most < 0), (least + most) / 2, 0.0)
        error = ClipError(stats)
        for _ in range(self.sweeps):
            tops = middle + (most - middle) * fractions
            high = _best(error, np.broadcast_to(low, tops.shape), tops, bits)[1]
            bottoms = middle + (least - middle) * fractions
            low = _best(error, bottoms, np.broadcast_to(high, bottoms.shape), bits)[0]
        size = np.maximum(np.abs(least), np.abs(most))
        known = (size > 2.0 ** (_LOW + 8)) & (size < 2.0 ** (_HIGH - 1))  # the histogram resolves them
        return np.where(known, low, least), np.where(known, high, most)


class Tail(NamedTuple):
    """What is known of the values beyond one end of the observed range, per channel `(C,)`.

    deviation: standard deviation; reach: the observed extreme, in deviations from the mean; excess: mean excess of unseen
    values beyond the extreme, 0 at a hard limit.
    """

    deviation: np.ndarray
    reach: np.ndarray
    excess: np.ndarray

    def unseen(self, room: np.ndarray) -> np.ndarray:
        """Expected sum of squared excesses over as many new values as were seen.

        Channels, measured in their deviations, are taken as alike: what the others reached, this one may reach; one new
        value in all goes beyond the furthest, exponentially.

        Args:
            room: `(..., C)`, how far beyond the extreme the range ends.
        """
        count = len(self.reach)
        at = self.reach + np.maximum(room, 0) / self.deviation
        others = self._others(at) / max(count - 1, 1)
        beyond = np.maximum(at - np.max(self.reach), 0) * self.deviation
        furthest = 2 * self.excess**2 / count * np.exp(-beyond / np.maximum(self.excess, 1e-30))
        return np.where(self.excess > 0, others * self.deviation**2 + furthest, 0.0)

    # Sum over all channels of max(reach - at, 0)^2, from sums over sorted reaches.
    def _others(self, at: np.ndarray) -> np.ndarray:
        ordered = np.sort(self.reach)
        sums = [np.concatenate([np.cumsum((ordered**k)[::-1])[::-1], [0.0]]) for k in range(3)]
        i = np.searchsorted(ordered, at)
        return np.maximum(sums[2][i] - 2 * at * sums[1][i] + at**2 * sums[0][i], 0)


@of_statistics
def tails(stats: TensorStats) -> tuple[Tail, Tail]:
    """The tails below the minimum and above the maximum.

    The mean excess over the 80% and the 95% quantile is extrapolated to the extreme: equal for exponential tails, vanishing
    for bounded ones. Channels, measured in their deviations, are averaged.
    """
    count = np.maximum(np.asarray(stats.count, np.float64), 1)
    mean = stats.total / count
    deviation = np.sqrt(np.maximum(stats.squares / count - mean**2, 1e-60))
    _, value, histogram = bins(stats)
    sides = []
    for sign, extreme in ((-1, stats.minimum), (1, stats.maximum)):
        x, mass = (value, histogram) if sign > 0 else (-value[:, ::-1], histogram[:, ::-1])
        inner, outer = (_mean_excess(x, mass, count, share) for share in (0.2, 0.05))
        excess = outer * np.minimum(outer / np.maximum(inner, 1e-30), 1) ** 2
        soft = outer > 1e-6 * deviation
        shared = np.mean((excess / deviation)[soft]) if np.any(soft) else 0.0
        sides.append(Tail(deviation, sign * (extreme - mean) / deviation, np.where(soft, shared * deviation, 0.0)))
    return sides[0], sides[1]


def _mean_excess(value: np.ndarray, mass: np.ndarray, count: np.ndarray, share: float) -> np.ndarray:
    above = np.cumsum(mass[:, ::-1], axis=1)[:, ::-1]  # values in this bin or higher
    first = np.argmax(above <= share * count[:, None], axis=1)
    start = value[np.arange(len(value)), np.maximum(first - 1, 0)]
    beyond = np.arange(value.shape[1])[None, :] >= first[:, None]
    weight = np.where(beyond, mass, 0)
    return np.sum(weight * (value - start[:, None]), axis=1) / np.maximum(weight.sum(axis=1), 1)


class ClipError:
    """Expected sum of squared errors of quantizing to a range, from sums over the histogram's bins.

    Values that are exactly 0 cost nothing: 0 is a step of every quantizer.
    """

    def __init__(self, stats: TensorStats):
        self.least, self.most = (np.asarray(v, np.float64) for v in (stats.minimum, stats.maximum))
        self.ends = tails(stats)
        centre, value, mass = bins(stats)
        self.value = value
        moments = np.stack([mass, mass * value, mass * value**2])
        edge = np.zeros((*moments.shape[:2], 1))
        self.below = np.concatenate([edge, np.cumsum(moments, axis=2)], axis=2)  # of the bins before i
        self.above = self.below[:, :, -1:] - self.below  # of the bins from i on
        still = np.where(centre == 0, mass, 0)
        self.still = np.concatenate([edge[0], np.cumsum(still, axis=1)], axis=1)

    def __call__(self, low: np.ndarray, high: np.ndarray, bits: int) -> np.ndarray:
        """The error for ranges [low, high], each `(candidates, C)`."""
        channel = np.arange(low.shape[1])[None, :]
        i = np.stack([np.searchsorted(v, x, side="left") for v, x in zip(self.value, low.T)], axis=1)
        j = np.stack([np.searchsorted(v, x, side="right") for v, x in zip(self.value, high.T)], axis=1)
        under, over = self.below[:, channel, i], self.above[:, channel, j]
        clipped = sum(m[2] - 2 * end * m[1] + end**2 * m[0] for m, end in ((under, low), (over, high)))
        inside = self.below[0][channel, j] - self.below[0][channel, i] - self.still[channel, j] + self.still[channel, i]
        step = np.maximum(high - low, 1e-30) / (2.0**bits - 1)
        unseen = self.ends[0].unseen(self.least - low) + self.ends[1].unseen(high - self.most)
        return clipped + np.maximum(inside, 0) * step**2 / 12 + unseen


def _best(error: ClipError, low: np.ndarray, high: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    best = np.argmin(error(low, high, bits), axis=0)
    columns = np.arange(low.shape[1])
    return low[best, columns], high[best, columns]
