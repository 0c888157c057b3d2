"""Steps of tensors that are multiplied with each other.

What a product of two encrypted tensors is off by is one's step times the other's size. A factor that hardly varies gains
little by steps of its own small range when the other one's are coarser, but is a great number of them away from 0: the
product takes that many more bits, and a channel with a small range of its own few of the cells that rounding leaves.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import NamedTuple

import numpy as np

from fheq.planning.granularity import channel_numbers
from fheq.planning.plan import Plan
from fheq.steps import Operand, Product


class Interval(NamedTuple):
    """The range of a quantized tensor, the bits for it and its step: `()`, or one per channel of `axis`."""

    low: np.ndarray
    high: np.ndarray
    bits: int
    scale: np.ndarray
    axis: int | None


def steps_in_products(layout: Plan, known: Mapping[str, Interval], free: Container[str]) -> dict[str, np.ndarray]:
    """The steps of `known` tensors, those of `free` ones larger where a product cannot tell the difference."""
    wider = {key: np.array(interval.scale) for key, interval in known.items()}
    for step in layout.steps:
        if isinstance(step, Product) and all(o.key in known and o.slope is None for o in step.operands):
            relative = [_relative(layout, known, operand) for operand in step.operands]
            for operand, other in zip(step.operands, relative[::-1]):
                if operand.key not in free:
                    continue
                interval, flat = known[operand.key], wider[operand.key].reshape(-1)
                size = _size(interval).reshape(-1)
                least = np.minimum(other, 1 / (2.0**interval.bits - 1))  # as fine as the partner's, beside the values
                channel = _channels(layout, interval, operand)
                np.maximum.at(flat, channel, least * size[channel])
    return wider


def _size(interval: Interval) -> np.ndarray:
    return np.maximum(np.abs(interval.low), np.abs(interval.high))


def _relative(layout: Plan, known: Mapping[str, Interval], operand: Operand) -> np.ndarray:
    """The step at each element of an operand, as a part of the largest value there."""
    interval = known[operand.key]
    part = interval.scale / np.maximum(_size(interval), 1e-300)
    return part.reshape(-1)[_channels(layout, interval, operand)]


def _channels(layout: Plan, interval: Interval, operand: Operand) -> np.ndarray:
    """The channel at each element of an operand; 0 at fillers."""
    number = channel_numbers(layout.shape(operand.key), interval.axis)
    return np.where(operand.elements < 0, 0, number[np.maximum(operand.elements, 0)])
