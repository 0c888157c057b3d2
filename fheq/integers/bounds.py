"""Bounds of accumulators' integers: what any input in range can make of them, from integer weights and input ranges."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fheq.affine import Affine, affine_bits, bit_length
from fheq.integers.accumulator_decoders import accumulator_decoder, multipliers, summands
from fheq.integers.decoders import operand_decoder, step_of
from fheq.integers.integer_weights import Weights, apply_form, lacking, quantize_weight
from fheq.planning.granularity import channel_axis, first_of_channel
from fheq.planning.plan import Plan
from fheq.qparams import QParams
from fheq.steps import Add, Linear, Maximum, Operand, Product, Step, Sum

SLACK = 1e-6  # relative: scales are float32


class Bounds(NamedTuple):
    """Smallest and largest integer of an accumulator; arrays of the step's shape, or per channel."""

    low: np.ndarray
    high: np.ndarray


def worst_case(layout: Plan, qparams: QParams, step: Step, weights: Weights | None = None) -> Bounds:
    """Bounds that hold for every input in range, of the step's shape, in float64 (exact integers).

    Args:
        weights: what `quantize_weight` gives for a linear step, where it is known.
    """
    return Bounds(*(np.round(v) for v in _worst_case(layout, qparams, step, weights)))


def _worst_case(layout: Plan, qparams: QParams, step: Step, weights: Weights | None) -> tuple[np.ndarray, ...]:
    if isinstance(step, Linear):
        weights = weights or quantize_weight(layout, qparams, step)
        x, w = weights.reading.x, weights.integers
        if "exclusive" in step.options:
            return _exclusive_bounds(step, x.low, x.high, w)
        middle = apply_form(step, (x.low + x.high) / 2, w) + lacking(step, x, w)
        reach = apply_form(step, (x.high - x.low) / 2, np.abs(w))
        return middle - reach, middle + reach
    if isinstance(step, Sum):
        x = operand_decoder(layout, qparams, step.x)
        valid = (step.x.elements >= 0).reshape(step.x.shape)
        return tuple(np.sum(np.where(valid, v, 0), axis=-1) for v in (x.low, x.high))
    if isinstance(step, Add):
        m, n, _ = multipliers(layout, qparams, step, *summands(layout, qparams, step))
        left, right = (_of_operand(layout, qparams, o) for o in step.operands)
        n_low, n_high = (n * right.low, n * right.high) if step.sign > 0 else (-n * right.high, -n * right.low)
        low, high = m * left.low + n_low, m * left.high + n_high
        extreme = from_its_extreme(layout, step)
        return (low, np.minimum(high, 0)) if extreme > 0 else (np.maximum(low, 0), high) if extreme < 0 else (low, high)
    assert isinstance(step, Product)
    a, b = (operand_decoder(layout, qparams, o) for o in step.operands)
    p, r = (np.round(d.offset / d.scale) for d in (a, b))
    corners = [i * j for i in (a.low + p, a.high + p) for j in (b.low + r, b.high + r)]
    low, high = np.min(np.stack(corners), axis=0), np.max(np.stack(corners), axis=0)
    return (np.sum(low, -1), np.sum(high, -1)) if step.contract else (low, high)


def _of_operand(layout: Plan, qparams: QParams, operand: Operand) -> Bounds:
    """Bounds of the integers of a summand."""
    if operand.key not in layout.summed:
        d = operand_decoder(layout, qparams, operand)
        return Bounds(d.low, d.high)
    made = worst_case(layout, qparams, step_of(layout, operand.key))
    return Bounds(*(v.ravel()[operand.elements].reshape(operand.shape) for v in made))


def from_its_extreme(layout: Plan, step: Add) -> int:
    """1 for differences of elements from a maximum that they take part in (never above 0), -1 from a minimum, else 0."""
    made = next((s for s in layout.steps if s.out == step.b.key), None)
    if step.sign > 0 or not isinstance(made, Maximum) or any(x.key != step.a.key for x in made.xs):
        return 0
    if step.a.slope is not None or step.b.slope is not None or np.any(step.b.elements < 0):
        return 0
    windows = np.concatenate([x.elements.reshape(-1, x.shape[-1]) for x in made.xs], axis=1)[step.b.elements]
    return made.sign if np.all(np.any(windows == step.a.elements[:, None], axis=1)) else 0


def _exclusive_bounds(step: Linear, low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of a product with bits of which at most one per group is 1."""
    group = np.unique(step.options["exclusive"], return_inverse=True)[1]
    ends = []
    for smaller in (np.minimum, np.maximum):
        terms = smaller(low[..., None] * weight, high[..., None] * weight)
        total = np.zeros((*terms.shape[:-2], group.max() + 1, terms.shape[-1]))
        smaller.at(np.moveaxis(total, -2, 0), group, np.moveaxis(terms, -2, 0))
        ends.append(total.sum(axis=-2).reshape(step.shape))
    return ends[0], ends[1]


def channel_bounds(bounds: Bounds, axis: int | None) -> Bounds:
    """Bounds of the step's shape to bounds per channel `(C,)`, or `(1,)`."""
    ndim = bounds.low.ndim
    if axis is None or ndim == 0:
        return Bounds(bounds.low.min().reshape(1), bounds.high.max().reshape(1))
    others = tuple(i for i in range(ndim) if i != axis % ndim)
    return Bounds(bounds.low.min(axis=others), bounds.high.max(axis=others))


def channel_worst_case(layout: Plan, qparams: QParams, step: Step, weights: Weights | None = None) -> Bounds:
    """`worst_case` per channel, of integers that decode as those of the channel's first element do: elements that known
    values are added to differ in where 0 lies, and are brought to one range by what is added to each.

    Args:
        weights: as for `worst_case`.
    """
    axis = channel_axis(layout, step.out)
    worst = worst_case(layout, qparams, step, weights)
    scale, offset = accumulator_decoder(layout, qparams, step, weights)
    by_channel = axis is not None and np.ndim(offset) >= -axis and np.shape(offset)[axis] == np.size(offset)
    if by_channel or np.size(offset) == 1:
        return channel_bounds(worst, axis)  # as of most layers
    scale, offset = (np.broadcast_to(v, step.shape) for v in (scale, offset))
    above = np.round((offset - first_of_channel(offset, axis)) / np.where(scale == 0, 1, scale))
    return channel_bounds(Bounds(worst.low + above, worst.high + above), axis)


def range_bits(affine: Affine, unit: np.ndarray) -> int:
    """Bits that the real range of an accumulator takes: more than its quantizer's where edits made its unit smaller."""
    steps = (affine.qmax - affine.qmin) * affine.scale / np.where(unit == 0, np.inf, np.abs(unit))
    return max(affine_bits(affine), bit_length(float(np.max(np.ceil(steps * (1 - SLACK))))))
