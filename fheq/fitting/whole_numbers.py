"""Inputs that hold whole numbers in floating point: categories, counts, pixels from 0 to 255.

Rounded to steps of another size they are moved: category 3 becomes 2.99, and falls on the other side of a threshold or next
to its row of a table. In steps of 1, or of 1 / n, they are exact. Tables want steps of 1, which take the fewest bits. Where
weights absorb the steps of channels, channels are to fill the same integers: a weight times a step of 1 beside weights times
steps of 1/63 would leave these no bits.
"""

from __future__ import annotations

import numpy as np

from fheq.observing.statistics import TensorStats

Interval = tuple[np.ndarray, np.ndarray]


def is_whole(seen: TensorStats, bits: int) -> np.ndarray:
    """By channel `(C,)`, whether all that was seen is whole, more than one number and no more than `bits` bits can count."""
    if seen.fraction is None:
        return np.zeros(np.shape(seen.minimum), bool)
    span = np.asarray(seen.maximum) - np.asarray(seen.minimum)
    return (np.asarray(seen.fraction) == 0) & (span > 0) & (span < 2.0**bits)


def holding(seen: TensorStats, interval: Interval, whole: np.ndarray) -> Interval:
    """An observer's range without clipping where numbers are whole."""
    low, high = interval
    return np.where(whole, np.minimum(low, seen.minimum), low), np.where(whole, np.maximum(high, seen.maximum), high)


def in_steps_of_one(seen: TensorStats, interval: Interval, bits: int, whole: np.ndarray) -> Interval:
    """Ranges of whole numbers with 2^b of them for the least b: all that was seen, what the observer expects beyond as far
    as there are bits for it, and 0 where it costs none.

    Args:
        interval: lowest and highest value by channel, as `holding` gives them; where numbers are not whole it stays.
    """
    low, high = (np.round(end) for end in interval)
    fits = high - low < 2.0**bits
    low, high = np.where(fits, low, seen.minimum), np.where(fits, high, seen.maximum)
    count = 2.0 ** np.ceil(np.log2(np.maximum(high - low, 1) + 1))
    low = np.where((low > 0) & (high < count), 0, low)
    return np.where(whole, low, interval[0]), np.where(whole, low + count - 1, interval[1])


def filling(low: np.ndarray, high: np.ndarray, bits: int, whole: np.ndarray) -> np.ndarray:
    """By channel, the least step 1 / n in which whole numbers need no more integers than the widest channel.

    Args:
        low, high: `(C,)` ranges as `in_steps_of_one` gives them.
    """
    span = np.where(whole, high - low, 1.0)
    free = ~whole & (high > low)
    widest = 2.0**bits - 1 if np.any(free) else np.max(span)
    return 1 / np.floor(widest / span)


def unit_fraction(scale: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Scales that whole numbers share with others, where they are below 1: the next larger 1 / n."""
    below = whole & (scale <= 1)
    return np.where(below, 1 / np.floor(1 / np.where(below, scale, 1.0) + 1e-9), scale)
