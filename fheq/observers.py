"""Observers turn statistics into ranges: `range(stats, bits)` finishes what `fheq.observing.statistics` collects."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np

from fheq.errors import QuantizationError
from fheq.observing.clipping import End, clip_error, ends
from fheq.observing.statistics import HIGH, HISTOGRAM, LOW, MOMENTS, PARTS, TensorStats, bins, of_statistics


class Observer(Protocol):
    """Turns statistics into ranges; a pure function, and equal observers give equal ranges.

    An observer may have an attribute `reads`, the parts of the statistics that it needs beside counts and extremes (of
    `fheq.observing.statistics.PARTS`); one that has none is given all.
    """

    def range(self, stats: TensorStats, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """Lowest and highest real value to represent, each `(C,)`."""
        ...


def observed_range(observer: Observer, stats: TensorStats, bits: int, what: str) -> tuple[np.ndarray, np.ndarray]:
    """`observer.range(stats, bits)`, worked out once for all the specs of a grid that share it.

    Args:
        what: the tensor and the option that the observer is given as, for errors.

    Raises:
        QuantizationError: the statistics lack what the observer reads, or what it gives is no range.
    """
    try:
        ends = _range(stats, observer, bits) if isinstance(observer, Hashable) else observer.range(stats, bits)
    except QuantizationError as error:
        raise QuantizationError(f"{what}, {observer!r}: {error}") from error
    channels = len(np.asarray(stats.count))
    try:
        low, high = (np.broadcast_to(np.asarray(end, np.float64), (channels,)) for end in ends)
    except (TypeError, ValueError) as error:
        raise QuantizationError(
            f"{what}, {observer!r}, must give (lowest, highest), arrays of shape ({channels},); it gave {ends!r}"
        ) from error
    if not np.all(np.isfinite(low) & np.isfinite(high) & (low <= high)):
        raise QuantizationError(f"{what}, {observer!r}, must give finite ends in order; it gave {ends!r}")
    return low, high


@of_statistics
def _range(stats: TensorStats, observer: Observer, bits: int) -> tuple[np.ndarray, np.ndarray]:
    return observer.range(stats, bits)


def check_observer(what: str, observer: object) -> None:
    """Checks that something is an observer.

    Raises:
        QuantizationError: it is not; the message names the option.
    """
    if isinstance(observer, type) or not callable(getattr(observer, "range", None)):
        raise QuantizationError(f"{what} must be an observer, such as MinMax() or Percentile(99.9), got {observer!r}")


def parts_read(observers: Iterable[Observer]) -> tuple[str, ...]:
    """The parts of statistics that some observers read, in the order of `PARTS`.

    Raises:
        QuantizationError: one is no observer, or reads something else.
    """
    if isinstance(observers, str) or not isinstance(observers, Iterable):
        raise QuantizationError(f"observers must be a list of observers, such as [MinMax()], got {observers!r}")
    observers = list(observers)
    for observer in observers:
        check_observer("observers", observer)
        unknown = set(getattr(observer, "reads", PARTS)).difference(PARTS)
        if unknown:
            raise QuantizationError(f"{observer!r} reads {sorted(unknown)}; the parts of statistics are {list(PARTS)}")
    wanted = {part for observer in observers for part in getattr(observer, "reads", PARTS)}
    return tuple(part for part in PARTS if part in wanted)


@dataclass(frozen=True)
class MinMax:
    """The observed extremes."""

    reads: ClassVar[tuple[str, ...]] = ()

    def range(self, stats: TensorStats, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Observer`."""
        del bits
        return np.asarray(stats.minimum, np.float64), np.asarray(stats.maximum, np.float64)


@dataclass(frozen=True)
class Percentile:
    """The range that holds the middle `percent` of the values (to the histogram's resolution)."""

    percent: float = 99.9
    reads: ClassVar[tuple[str, ...]] = (HISTOGRAM,)

    def __post_init__(self) -> None:
        if not 0 < self.percent <= 100:
            raise QuantizationError(f"percent must be above 0 and at most 100, got {self.percent!r}")

    def range(self, stats: TensorStats, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Observer`."""
        del bits
        _, value, mass = bins(stats)
        below = np.cumsum(mass, axis=1) / np.maximum(np.asarray(stats.count)[:, None], 1)
        tail = (100 - self.percent) / 200
        channel = np.arange(len(value))
        low = value[channel, np.argmax(below > tail, axis=1)]
        high = value[channel, np.argmax(below >= 1 - tail, axis=1)]
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
    reads: ClassVar[tuple[str, ...]] = (MOMENTS, HISTOGRAM)

    def range(self, stats: TensorStats, bits: int) -> tuple[np.ndarray, np.ndarray]:
        """See `Observer`."""
        least, most = (np.asarray(v, np.float64) for v in (stats.minimum, stats.maximum))
        bottom, bottoms, tops = _ends(stats, self.smallest, self.largest, self.candidates)
        low, high = least, most
        for _ in range(self.sweeps):
            top = tops.best(clip_error(bottom, tops, bits))
            bottom = bottoms.best(clip_error(bottoms, top, bits))
            low, high = bottom.at[0], top.at[0]
        size = np.maximum(np.abs(least), np.abs(most))
        known = (size > 2.0 ** (LOW + 8)) & (size < 2.0 ** (HIGH - 1))  # the histogram resolves them
        return np.where(known, low, least), np.where(known, high, most)


@of_statistics
def _ends(stats: TensorStats, smallest: float, largest: float, candidates: int) -> tuple[End, End, End]:
    """The least value seen, and candidates for the lower and the upper end: no bits are in them."""
    least, most = (np.asarray(v, np.float64)[None] for v in (stats.minimum, stats.maximum))
    middle = np.where((least > 0) | (most < 0), (least + most) / 2, 0.0)
    fractions = np.linspace(smallest, largest, candidates)[:, None]
    tops, bottoms = (middle + (end - middle) * fractions for end in (most, least))
    below, above = ends(stats, np.concatenate([least, bottoms]), tops)
    return below[:1], below[1:], above
