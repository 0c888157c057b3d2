"""The expected error of a range: of rounding inside, of clipping what was seen and of clipping what was not."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fheq.statistics import TensorStats, bins, of_statistics


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
