"""Steps of tensors that are multiplied with each other.

What a product of two encrypted tensors is off by is one's step times the other's size. A factor that hardly varies gains
little by steps of its own small range when the other one's are coarser, but is a great number of them away from 0: the
product takes that many more bits, and a channel with a small range of its own few of the cells that rounding leaves. Where
both hardly vary, their product would be the widest of all channels, which lose the same low bits.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import NamedTuple

import numpy as np

from fheq.planning.plan import Plan
from fheq.steps import Product


class Interval(NamedTuple):
    """The range of a quantized tensor, the bits for it and its step: `()`, or one per channel."""

    low: np.ndarray
    high: np.ndarray
    bits: int
    scale: np.ndarray


def steps_in_products(layout: Plan, known: Mapping[str, Interval], free: Container[str]) -> dict[str, np.ndarray]:
    """The steps of `known` tensors, those of `free` factors no finer than of a range from 0."""
    wider = {key: np.array(interval.scale) for key, interval in known.items()}
    for step in layout.steps:
        if isinstance(step, Product) and all(o.key in known and o.slope is None for o in step.operands):
            for key in {operand.key for operand in step.operands}:
                if key in free:
                    low, high, bits, _ = known[key]
                    wider[key] = np.maximum(wider[key], np.maximum(np.abs(low), np.abs(high)) / (2.0**bits - 1))
    return wider
