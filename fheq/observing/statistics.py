"""Statistics of tensors: a monoid that knows no bits.

`init`, `update` with a batch, `merge`. Observers make ranges of them (`fheq.observers`).

The histogram has fixed edges: each power of two from 2^-40 to 2^24 is cut into 16, for either sign, and what is smaller
counts as zero. So histograms of any data merge by addition, and their resolution is relative (about 5%).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache, wraps
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from fheq.errors import QuantizationError

Array = Any
T = TypeVar("T")
A = ParamSpec("A")

LOW, HIGH, _PARTS = -40, 24, 16
_SIDE = (HIGH - LOW) * _PARTS
BINS = 2 * _SIDE + 1
MOST_PARTS = 64  # of a bin
ROW = 4096  # values that are added at once
MOMENTS, HISTOGRAM, FRACTION = "moments", "histogram", "fraction"
PARTS = (MOMENTS, HISTOGRAM)  # what may be collected beside counts and extremes; fractions are those of inputs alone


class TensorStats(NamedTuple):
    """Statistics of one tensor, per channel; `C` is 1 for a tensor without a channel axis.

    count: `(C,)` elements seen; minimum, maximum: `(C,)`; total, squares: `(C,)` sums of x and x^2; histogram: `(C, BINS)`;
    fraction: `(C,)` the greatest distance of an element to a whole number. Moments, histograms and fractions are None where
    they were not collected.
    """

    count: Array
    minimum: Array
    maximum: Array
    total: Array
    squares: Array
    histogram: Array
    fraction: Array | None = None


Stats = Mapping[str, TensorStats]  # of a graph, by tensor name


def init(channels: int, parts: Collection[str] = PARTS) -> TensorStats:
    """The statistics of no data: the identity of `merge`.

    Args:
        parts: what is collected beside counts and extremes, of `PARTS` and `FRACTION`.
    """
    zeros = np.zeros(channels) if MOMENTS in parts else None
    counts = np.zeros((channels, BINS), np.int64) if HISTOGRAM in parts else None
    full = np.full(channels, np.inf)
    fraction = np.zeros(channels) if FRACTION in parts else None
    return TensorStats(np.zeros(channels, np.int64), full, -full, zeros, zeros, counts, fraction)


def bin_of(x: Array) -> Array:
    """Index of the histogram bin of each float32 value: its exponent and the top bits of its mantissa are the bin."""
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.int32) >> (23 - _PARTS.bit_length() + 1)
    magnitude = jnp.clip(bits - (126 + LOW) * _PARTS + 1, 0, _SIDE)
    return _SIDE + jnp.where(x < 0, -magnitude, magnitude)


def centres() -> np.ndarray:
    """The value that stands for each bin, shape `(BINS,)`."""
    magnitude = _magnitude(np.arange(_SIDE), 0.5)
    return np.concatenate([-magnitude[::-1], [0.0], magnitude])


def _magnitude(place: np.ndarray, part: float) -> np.ndarray:
    """Where bins of one side begin, from 0 on, or a part of each further."""
    return 2.0 ** (place // _PARTS + LOW - 1) * (1 + (place % _PARTS + part) / _PARTS)


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
    a saturated tanh do. Where values lie far from 0 beside their range (years, temperatures), a few bins hold all of them:
    these are cut into parts, as if values were even in each.

    Raises:
        QuantizationError: histograms were not collected.
    """
    if stats.histogram is None:
        raise QuantizationError("the statistics hold no histograms: calibrate with an observer that reads them, or with all")
    least, most = (np.asarray(v, np.float64)[:, None] for v in (stats.minimum, stats.maximum))
    histogram = np.asarray(stats.histogram)
    kept = np.flatnonzero(histogram.any(axis=0))
    mass, centre = histogram[:, kept].astype(np.float64), centres()[kept]
    used = mass > 0
    parts = _parts_of_bins(kept, least, most)
    if parts > 1:
        edges = _edges(kept)
        share = (np.arange(parts) + 0.5) / parts
        low, high = (np.clip(edge[None, :], least, most) for edge in edges)
        inside = (low[:, :, None] + (high - low)[:, :, None] * share).reshape(len(mass), -1)
        return Bins(np.repeat(centre, parts), inside, np.repeat(mass / parts, parts, axis=1))
    place = np.arange(len(kept))[None, :]
    first = np.argmax(used, axis=1)[:, None]
    last = len(kept) - 1 - np.argmax(used[:, ::-1], axis=1)[:, None]
    value = np.clip(centre[None, :], least, most)
    return Bins(centre, np.where(place <= first, least, np.where(place >= last, most, value)), mass)


def _edges(kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends of bins, the one of 0 taken for a point."""
    place = np.abs(kept - _SIDE) - 1
    near, far = (np.where(place < 0, 0.0, _magnitude(place, part)) for part in (0, 1))
    return np.where(kept < _SIDE, -far, near), np.where(kept < _SIDE, -near, far)


def _parts_of_bins(kept: np.ndarray, least: np.ndarray, most: np.ndarray) -> int:
    """How many parts bins take to be finer, beside the range, than those of a range from 0."""
    low, high = _edges(kept)
    width = np.minimum(high, most) - np.maximum(low, least)
    coarse = np.max(width / np.maximum(most - least, 1e-300), initial=0.0)
    return 1 if coarse <= 1 / _PARTS else int(min(np.ceil(coarse * MOST_PARTS), MOST_PARTS))


def update(stats: TensorStats, values: Array, keep: Array) -> TensorStats:
    """Adds a batch to what is collected; a pure function of arrays, for `jax.jit`.

    Args:
        values: `(B, C, n)` float32.
        keep: `(B,)` bool; samples to count.
    """
    values = jnp.swapaxes(values, 1, 2)  # calibration gives them in this order: channels last, nothing is copied
    size = _together(*values.shape)
    rows, kept = values.reshape(-1, size, values[0].size), keep.reshape(-1, size, 1)
    full, zeros = jnp.full(rows.shape[1:], jnp.inf, values.dtype), jnp.zeros(rows.shape[1:])
    optional = jax.tree.map(lambda _: zeros, (stats.total, stats.squares, stats.fraction))
    # Some samples at a time: operations on whole rows become vector instructions, XLA's reductions of leading axes do not.
    found, _ = jax.lax.scan(lambda row, more: (_add(row, *more), None), (full, -full, *optional), (rows, kept))
    low, high, total, squares, fraction = jax.tree.map(lambda leaf: leaf.reshape(-1, values.shape[2]), found)
    return TensorStats(
        stats.count + jnp.sum(keep) * values.shape[1],
        jnp.minimum(stats.minimum, jnp.min(low, axis=0)),
        jnp.maximum(stats.maximum, jnp.max(high, axis=0)),
        None if total is None else stats.total + jnp.sum(total, axis=0),
        None if squares is None else stats.squares + jnp.sum(squares, axis=0),
        None if stats.histogram is None else _counted(stats.histogram, values, keep[:, None, None]),
        None if stats.fraction is None else jnp.maximum(stats.fraction, jnp.max(fraction, axis=0)),
    )


def _add(found: tuple[Array, ...], value: Array, kept: Array) -> tuple[Array, ...]:
    """The extremes, sums, sums of squares and greatest fractions of each place of a row, of which a part is collected."""
    low, high, total, squares, fraction = found
    seen = jnp.where(kept, value, 0)
    return (
        jnp.minimum(low, jnp.where(kept, value, jnp.inf)),
        jnp.maximum(high, jnp.where(kept, value, -jnp.inf)),
        None if total is None else total + seen,
        None if squares is None else squares + jnp.square(seen.astype(squares.dtype)),
        None if fraction is None else jnp.maximum(fraction, jnp.abs(seen - jnp.round(seen))),
    )


def _together(samples: int, size: int, channels: int) -> int:
    """How many samples are added at once: a power of two that divides their number, few enough for the first cache."""
    count = 1
    while samples % (2 * count) == 0 and 2 * count * channels * size <= ROW:
        count *= 2
    return count


def _counted(histogram: Array, values: Array, mask: Array) -> Array:
    place = jnp.arange(values.shape[2], dtype=jnp.int32) * BINS + bin_of(values)
    ones = jnp.broadcast_to(mask, values.shape).astype(histogram.dtype)
    found = histogram.ravel().at[place.ravel()].add(ones.ravel(), mode="promise_in_bounds")
    return found.reshape(histogram.shape)


def merge(a: TensorStats, b: TensorStats) -> TensorStats:
    """The statistics of the data of both, as far as both were collected."""

    def add(x: Array | None, y: Array | None) -> Array | None:
        return None if x is None or y is None else x + y

    return TensorStats(
        a.count + b.count,
        np.minimum(a.minimum, b.minimum),
        np.maximum(a.maximum, b.maximum),
        add(a.total, b.total),
        add(a.squares, b.squares),
        add(a.histogram, b.histogram),
        None if a.fraction is None or b.fraction is None else np.maximum(a.fraction, b.fraction),
    )


def with_values(stats: TensorStats, channel: np.ndarray, value: np.ndarray, count: np.ndarray) -> TensorStats:
    """The statistics with known values, of the channels given, each met `count` times; arrays of one shape `(n,)`."""

    def filled(leaf: Array | None, at: Any, put: Any, reduce: np.ufunc = np.add) -> Array | None:
        if leaf is not None:
            leaf = np.array(leaf)
            reduce.at(leaf, at, put)
        return leaf

    place = np.asarray(bin_of(np.asarray(value, np.float32)))
    return TensorStats(
        filled(stats.count, channel, count),
        filled(stats.minimum, channel, value, np.minimum),
        filled(stats.maximum, channel, value, np.maximum),
        filled(stats.total, channel, count * value),
        filled(stats.squares, channel, count * value**2),
        filled(stats.histogram, (channel, place), count),
        filled(stats.fraction, channel, np.abs(value - np.round(value)), np.maximum),
    )


def of_statistics(fn: Callable[Concatenate[TensorStats, A], T]) -> Callable[Concatenate[TensorStats, A], T]:
    """Remembers a function of statistics, and of options that can be hashed, while the statistics are alive, so that many
    fits to the same ones work it out once."""
    known: dict[tuple[int, ...], tuple[list[weakref.ref], dict[Any, T]]] = {}

    @wraps(fn)
    def remembered(stats: TensorStats, *options: A.args, **named: A.kwargs) -> T:
        leaves = [leaf for leaf in stats if leaf is not None]
        key = tuple(map(id, stats))
        if key not in known or any(ref() is not leaf for ref, leaf in zip(known[key][0], leaves)):
            forget = lambda _: known.pop(key, None)
            known[key] = [weakref.ref(leaf, forget) for leaf in leaves], {}
        found, given = known[key][1], (options, tuple(named.items()))
        if given not in found:
            found[given] = fn(stats, *options, **named)
        return found[given]

    return remembered


@of_statistics
def clipped(stats: TensorStats, low: float, high: float) -> TensorStats:
    """The statistics of the values when clipped; moments, as far as they were collected, to the histogram's resolution."""
    ends = {"minimum": np.clip(stats.minimum, low, high), "maximum": np.clip(stats.maximum, low, high), "fraction": None}
    if stats.histogram is None:
        return stats._replace(**ends, total=None, squares=None)
    found = stats._replace(**ends, histogram=_clipped(stats.histogram, *_bins(low, high)))
    if stats.total is None:
        return found
    used = bins(found)
    return found._replace(total=np.sum(used.mass * used.value, axis=1), squares=np.sum(used.mass * used.value**2, axis=1))


@lru_cache(maxsize=256)
def _bins(low: float, high: float) -> tuple[int, int]:
    first, last = np.asarray(bin_of(np.array([low, high], np.float32)))
    return int(first), int(last)


def _clipped(histogram: np.ndarray, first: int, last: int) -> np.ndarray:
    """Counts `(C, BINS)`, those of other bins moved to the first and the last one; a value that is clipped within its own
    bin stays there."""
    kept = np.zeros_like(histogram)
    kept[:, first : last + 1] = histogram[:, first : last + 1]
    kept[:, first] += histogram[:, :first].sum(axis=1)
    kept[:, last] += histogram[:, last + 1 :].sum(axis=1)
    return kept


@of_statistics
def per_tensor(stats: TensorStats) -> TensorStats:
    """The same data seen as one channel."""

    def add(x: Array | None) -> Array | None:
        return None if x is None else np.sum(x, axis=0, keepdims=True)

    return TensorStats(
        np.sum(stats.count, keepdims=True),
        np.min(stats.minimum, keepdims=True),
        np.max(stats.maximum, keepdims=True),
        add(stats.total),
        add(stats.squares),
        add(stats.histogram),
        None if stats.fraction is None else np.max(stats.fraction, keepdims=True),
    )
