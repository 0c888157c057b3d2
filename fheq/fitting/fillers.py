"""Known values that are put beside those of a tensor: pads, a token of its own.

Sums, products with clear weights and outputs take them exactly, wherever they lie. A product of two encrypted tensors, a
maximum and a join read them as integers of the tensor's own quantizer, which must then reach that far.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fheq.integers.decoders import representative
from fheq.observing.statistics import Stats, TensorStats, init, with_values
from fheq.planning.granularity import channel_axis
from fheq.planning.plan import Plan
from fheq.steps import Join, Maximum, Operand, Product, Step

FAR = 256.0  # ranges: what is further is a mask, which tables of 8 bits do not tell from the end of the range
MANY = 2**20  # elements: more than a tensor has, so that what is put beside them counts


def with_fillers(layout: Plan, stats: Stats) -> Stats:
    """The statistics, those of tensors that are read beside known values beyond their range with these values."""
    found = dict(stats)
    made = {step.out: step for step in layout.steps if isinstance(step, Maximum | Join) and step.out not in layout.points}
    for step in layout.steps:
        if isinstance(step, Product | Maximum | Join):
            for operand in step.operands:
                if operand.slope is None and np.any(operand.elements < 0):
                    for key in _sources(made, operand.key):
                        if key in found or not _decided(operand):
                            found[key] = _beside(layout, step, operand, key, found.get(key, _decisions(layout, key)))
    return found


def _decided(operand: Operand) -> bool:
    """Whether the known values beside an operand's are decisions too."""
    return bool(np.all(np.isin(np.asarray(operand.fill)[operand.elements < 0], (0, 1))))


def _decisions(layout: Plan, key: str) -> TensorStats:
    """The statistics of decisions, which are not observed: as many zeros as ones."""
    axis = channel_axis(layout, key)
    channel, value = np.indices((1 if axis is None else layout.shape(key)[axis], 2)).reshape(2, -1)
    return with_values(init(channel.max() + 1), channel, value.astype(np.float64), np.full(channel.size, MANY))


def _sources(made: Mapping[str, Step], key: str) -> list[str]:
    """The quantized tensors whose integers a tensor has; joins of maxima of joins reach the same one in many ways.

    Args:
        made: the maxima and joins.
    """
    reached = [key]
    for name in reached:
        reached += [o.key for o in made[name].operands if o.key not in reached] if name in made else []
    return list(dict.fromkeys(name for name in reached if name not in made))


def _beside(layout: Plan, step: Step, operand: Operand, key: str, stats: TensorStats) -> TensorStats:
    """The statistics of a tensor with the fillers of an operand that its range leaves out and that matter to a step."""
    hole = np.flatnonzero(operand.elements < 0)
    value = np.asarray(operand.fill, np.float64)[hole]
    channel = _channels(layout, key) if key == operand.key else np.zeros(1, int)
    of = channel[np.maximum(operand.elements[representative(operand, None)[hole]], 0) % channel.size]
    low, high = (np.asarray(end, np.float64)[of] for end in (stats.minimum, stats.maximum))
    reach = FAR * np.maximum(high - low, np.maximum(np.abs(low), np.abs(high)))
    below, above = (value < low) & (value >= low - reach), (value > high) & (value <= high + reach)
    if isinstance(step, Maximum):  # values beyond the other end win only over each other
        alone = np.broadcast_to(_known_rows(step)[..., None], operand.shape).ravel()[hole]
        below, above = below & (alone | (step.sign < 0)), above & (alone | (step.sign > 0))
    if not np.any(below | above):
        return stats
    of, value = np.unique(np.stack([of, value])[:, below | above], axis=1)
    of = of.astype(int)
    often = np.asarray(stats.count)[of] // np.bincount(channel)[of]  # as an element of the tensor
    return with_values(stats, of, value, often)


def _known_rows(step: Maximum) -> np.ndarray:
    """The elements of a maximum that are one of nothing but known values, in its shape."""
    return np.all([np.all(x.elements.reshape(x.shape) < 0, axis=-1) for x in step.xs], axis=0)


def _channels(layout: Plan, key: str) -> np.ndarray:
    """The channel of each element of a tensor, flat."""
    axis, shape = channel_axis(layout, key), layout.shape(key)
    if axis is None:
        return np.zeros(max(int(np.prod(shape)), 1), int)
    return np.broadcast_to(np.arange(shape[axis]).reshape(-1, *(1,) * (-axis - 1)), shape).ravel()
