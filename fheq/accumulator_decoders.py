"""Decoders of accumulators: what real values the integers stand for that steps make."""

from __future__ import annotations

from typing import Any

import numpy as np

from fheq.decoders import Decoder, operand_decoder
from fheq.integer_weights import Weights, quantize_weight
from fheq.namespace import array_namespace
from fheq.plan import Plan
from fheq.qparams import QParams
from fheq.steps import Add, Linear, Product, Step, Sum

Array = Any
SUM_ERROR = 1 / 16
SUM_MULTIPLIER = 128


def accumulator_decoder(layout: Plan, qparams: QParams, step: Step, weights: Weights | None = None) -> tuple[Array, Array]:
    """(scale, offset) of the integers that a step makes, broadcasting against its shape.

    Args:
        weights: what `quantize_weight` gives for a linear step, where it is known.
    """
    if isinstance(step, Linear):
        weights = weights or quantize_weight(layout, qparams, step)
        return weights.scale, weights.offset
    if isinstance(step, Sum):
        x = operand_decoder(layout, qparams, step.x)
        valid = (step.x.elements >= 0).reshape(step.x.shape)
        fill = np.sum(step.x.fill.reshape(step.x.shape), axis=-1)
        at = np.argmax(valid, axis=-1)[..., None]
        xp = array_namespace(x.scale)
        scale = step.coefficient * xp.take_along_axis(x.scale, at, -1)[..., 0]
        return scale, step.coefficient * (xp.sum(xp.where(valid, x.offset, 0), axis=-1) + fill)
    if isinstance(step, Add):
        a, b = (operand_decoder(layout, qparams, o) for o in step.operands)
        m, n, scale = add_multipliers(a, b)
        # What the multipliers miss of a scale is least where it counts for nothing in the middle of the range.
        left, right = (x.offset + (x.scale - k * scale) * (x.low + x.high) / 2 for x, k in ((a, m), (b, n)))
        return scale, left + step.sign * right
    assert isinstance(step, Product)
    a, b = (operand_decoder(layout, qparams, o) for o in step.operands)
    scale = a.scale * b.scale
    return (scale[..., 0], np.zeros(step.shape)) if step.contract else (scale, np.zeros(step.shape))


def add_multipliers(a: Decoder, b: Decoder) -> tuple[Array, Array, Array]:
    """Integers m, n and a scale s with `m * s = a.scale` and `n * s = b.scale`, for the sum `s * (m * p + n * q)`.

    Equal scales give 1, 1. Unequal ones come from models that state their quantizers: the convergents of the continued
    fraction of their ratio are tried, until one is wrong by less than `SUM_ERROR` of the larger step at the ends of the
    range or the next one has multipliers above `SUM_MULTIPLIER`.
    """
    xp = array_namespace(a.scale, b.scale)
    swapped = a.scale > b.scale
    small, large = xp.minimum(a.scale, b.scale), xp.maximum(a.scale, b.scale)
    reach = xp.where(swapped, a.high - a.low, b.high - b.low) / 2
    ratio = large / small
    before, found = (xp.ones_like(ratio), xp.zeros_like(ratio)), (xp.round(ratio), xp.ones_like(ratio))
    rest = ratio - found[0]
    for _ in range(4):
        rest = 1 / xp.where(abs(rest) < 1e-9, 1e-9, rest)
        term = xp.round(rest)
        after = tuple(term * f + b for f, b in zip(found, before))
        error = abs(found[0] / found[1] / ratio - 1) * reach
        better = (error > SUM_ERROR) & (xp.maximum(abs(after[0]), abs(after[1])) <= SUM_MULTIPLIER)
        before, found = found, tuple(xp.where(better, n, f) for n, f in zip(after, found))
        rest = xp.where(better, rest - term, 0)
    more, fewer = abs(found[0]), abs(found[1])
    return xp.where(swapped, more, fewer), xp.where(swapped, fewer, more), small / fewer
