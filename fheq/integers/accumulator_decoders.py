"""Decoders of accumulators: what real values the integers stand for that steps make."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fheq.arrays.namespace import array_namespace
from fheq.integers.decoders import offset_with_fillers, operand_decoder, step_of
from fheq.integers.integer_weights import Weights, quantize_weight, reading, weighed_scale
from fheq.planning.plan import Plan
from fheq.qparams import QParams
from fheq.steps import Add, Linear, Operand, Product, Step, Sum

Array = Any
SUM_ERROR = 1 / 16
SUM_MULTIPLIER = 128
SUM_RATIO = 2.0**16  # of scales: what is in yet smaller steps adds nothing
ACCUMULATOR_REACH = 2.0  # steps: multipliers of accumulators are exact to a 32nd; `fit` makes most of them exact


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
        parts = summands(layout, qparams, step)
        *times, scale = multipliers(layout, qparams, step, *parts)
        # What the multipliers miss of a scale is least where it counts for nothing in the middle of the range.
        left, right = (x.offset + (x.scale - k * scale) * x.middle for x, k in zip(parts, times))
        return scale, left + step.sign * right
    assert isinstance(step, Product)
    a, b = (operand_decoder(layout, qparams, o) for o in step.operands)
    scale = a.scale * b.scale
    return (scale[..., 0], np.zeros(step.shape)) if step.contract else (scale, np.zeros(step.shape))


def accumulator_scale(layout: Plan, qparams: QParams, step: Step) -> Array:
    """The scale alone of `accumulator_decoder`, for which no weight is quantized."""
    if isinstance(step, Linear):
        return weighed_scale(qparams, step, reading(layout, qparams, step))
    return accumulator_decoder(layout, qparams, step)[0]


class Summand(NamedTuple):
    """What a sum reads, `real = scale * q + offset`; arrays of the step's shape.

    middle: the integer about which it varies; reach: to how many steps from there multipliers are to be exact.
    """

    scale: Array
    offset: Array
    middle: Array
    reach: Array

    def multiplied(self, multiplier: Array, unit: Array) -> tuple[Array, Array]:
        """(slope, intercept) of what a sum in steps of `unit` takes for a real value."""
        slope = multiplier * unit / self.scale
        return slope, (1 - slope) * (self.offset + self.scale * self.middle)


def summands(layout: Plan, qparams: QParams, step: Add) -> tuple[Summand, Summand]:
    """The operands of a sum: quantized tensors, or accumulators about their 0."""
    a, b = (_summand(layout, qparams, operand) for operand in step.operands)
    if sums_accumulators(layout, step):
        near = np.full(step.shape, ACCUMULATOR_REACH)
        return a._replace(reach=near), b._replace(reach=near)
    return a, b


def sums_accumulators(layout: Plan, step: Add) -> bool:
    """Whether a sum reads an accumulator."""
    return any(operand.key in layout.summed for operand in step.operands)


def _summand(layout: Plan, qparams: QParams, operand: Operand) -> Summand:
    if operand.key not in layout.summed:
        d = operand_decoder(layout, qparams, operand)
        return Summand(d.scale, offset_with_fillers(operand, d), (d.low + d.high) / 2, (d.high - d.low) / 2)
    made = step_of(layout, operand.key)
    scale, offset = accumulator_decoder(layout, qparams, made)
    xp = array_namespace(scale, offset)
    scale, offset = (xp.broadcast_to(v, made.shape).ravel()[operand.elements] for v in (scale, offset))
    if operand.slope is not None:
        scale, offset = scale * operand.slope, offset * operand.slope + operand.intercept
    scale, offset = scale.reshape(operand.shape), offset.reshape(operand.shape)
    return Summand(scale, offset, (_middle(qparams, operand, made) - offset) / scale, xp.zeros_like(scale))


def _middle(qparams: QParams, operand: Operand, made: Step) -> Array:
    """The real value in the middle of an accumulator's range; 0 before it has one."""
    known = qparams.accumulators.get(operand.key)
    if known is None:
        return 0.0
    a = known.expanded(len(made.shape))
    middle = a.scale * ((a.qmin + a.qmax) / 2 - a.zero_point)
    middle = array_namespace(middle).broadcast_to(middle, made.shape).ravel()[operand.elements]
    if operand.slope is not None:
        middle = middle * operand.slope + operand.intercept
    return middle.reshape(operand.shape)


def multipliers(layout: Plan, qparams: QParams, step: Add, a: Summand, b: Summand) -> tuple[Array, Array, Array]:
    """How often a sum takes each operand, and its unit: the one that `qparams` has for a sum of accumulators."""
    if not sums_accumulators(layout, step):
        return add_multipliers(a, b)
    known = qparams.accumulators.get(step.out)
    if known is None:
        *found, unit = add_multipliers(a, b)
        for operand, x, k in zip(step.operands, (a, b), found):
            unit = unit if operand.key in layout.summed else x.scale / k  # what is missed is a layer's
        return *found, unit
    unit = known.expanded(len(step.shape)).scale
    xp = array_namespace(a.scale, b.scale, unit)
    times = (xp.maximum(xp.round(x.scale / unit), 1) for x in (a, b))
    return *times, xp.broadcast_to(unit, step.shape)


def add_multipliers(a: Summand, b: Summand) -> tuple[Array, Array, Array]:
    """Integers m, n and a scale s with `m * s = a.scale` and `n * s = b.scale`, for the sum `s * (m * p + n * q)`.

    Equal scales give 1, 1. Unequal ones come from accumulators and from models that state their quantizers: the convergents
    of the continued fraction of their ratio are tried, until one is wrong by less than `SUM_ERROR` of the larger step at the
    ends of its reach or the next one has multipliers above `SUM_MULTIPLIER`.
    """
    xp = array_namespace(a.scale, b.scale)
    swapped = a.scale > b.scale
    large = xp.maximum(a.scale, b.scale)
    small = xp.maximum(xp.minimum(a.scale, b.scale), large / SUM_RATIO)
    reach = xp.where(swapped, a.reach, b.reach)
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
