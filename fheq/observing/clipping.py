"""The expected error of a range: of rounding inside, of clipping what was seen and of clipping what was not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from fheq.observing.statistics import TensorStats, bins, of_statistics


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
    for bounded ones. Channels, measured in their deviations, are averaged. Without a histogram nothing is expected beyond.
    """
    if stats.total is None or stats.squares is None or stats.histogram is None:
        nothing = np.zeros(len(stats.count))
        return Tail(nothing + 1, nothing, nothing), Tail(nothing + 1, nothing, nothing)
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
    few = above <= share * count[:, None]
    first = np.where(few.any(axis=1), np.argmax(few, axis=1), value.shape[1])  # or none, where they crowd in the last one
    start = value[np.arange(len(value)), np.maximum(first - 1, 0)]
    beyond = np.arange(value.shape[1])[None, :] >= first[:, None]
    weight = np.where(beyond, mass, 0)
    return np.sum(weight * (value - start[:, None]), axis=1) / np.maximum(weight.sum(axis=1), 1)


@dataclass(frozen=True)
class End:
    """Candidates for one end of a range; arrays `(candidates, C)`.

    Args:
        at: where the range ends.
        clipped: sum of squared errors of what was seen beyond.
        below: how many values were seen below (of an upper end, those that are equal to it included), without those that are
            exactly 0: they cost nothing, for 0 is a step of every quantizer.
        unseen: expected sum of squared errors of what was not seen.
    """

    at: np.ndarray
    clipped: np.ndarray
    below: np.ndarray
    unseen: np.ndarray

    def __getitem__(self, index: Any) -> End:
        return End(self.at[index], self.clipped[index], self.below[index], self.unseen[index])

    def best(self, error: np.ndarray) -> End:
        """The candidate of the least error `(candidates, C)` in each channel."""
        return self[np.argmin(error, axis=0)[None], np.arange(error.shape[1])[None]]


def ends(stats: TensorStats, low: np.ndarray, high: np.ndarray) -> tuple[End, End]:
    """Lower and upper ends of ranges, from sums over the histogram's bins.

    Args:
        low, high: candidates, each `(candidates, C)`.
    """
    centre, value, mass = bins(stats)
    moments = np.stack([mass, mass * value, mass * value**2])
    edge = np.zeros((*moments.shape[:2], 1))
    below = np.concatenate([edge, np.cumsum(moments, axis=2)], axis=2)  # of the bins before i
    above = below[:, :, -1:] - below  # of the bins from i on
    still = np.where(centre == 0, mass, 0)
    moving = below[0] - np.concatenate([edge[0], np.cumsum(still, axis=1)], axis=1)
    least, most = (np.asarray(v, np.float64) for v in (stats.minimum, stats.maximum))
    tail = tails(stats)
    channel = np.arange(low.shape[1])[None, :]

    def end(at: np.ndarray, side: Literal["left", "right"], beyond: np.ndarray, unseen: np.ndarray) -> End:
        i = np.stack([np.searchsorted(v, x, side=side) for v, x in zip(value, at.T)], axis=1)
        m = beyond[:, channel, i]
        return End(at, m[2] - 2 * at * m[1] + at**2 * m[0], moving[channel, i], unseen)

    lower = end(low, "left", below, tail[0].unseen(least - low))
    return lower, end(high, "right", above, tail[1].unseen(high - most))


def clip_error(low: End, high: End, bits: int) -> np.ndarray:
    """Expected sum of squared errors of quantizing to the ranges between two ends; one of them may be a single candidate."""
    step = np.maximum(high.at - low.at, 1e-30) / (2.0**bits - 1)
    inside = np.maximum(high.below - low.below, 0)
    return low.clipped + high.clipped + inside * step**2 / 12 + (low.unseen + high.unseen)
