"""Ranges of accumulators: the observed one, with a margin for what calibration did not meet, and the one that is used."""

from __future__ import annotations

from typing import Any

import numpy as np

from fheq.integers.accumulator_decoders import accumulator_decoder, multipliers, summands
from fheq.integers.bounds import Bounds, channel_bounds
from fheq.integers.decoders import step_of
from fheq.integers.integer_weights import Weights, quantize_weight
from fheq.observing.clipping import tails
from fheq.observing.statistics import Stats, TensorStats, of_statistics
from fheq.origins import is_boolean
from fheq.planning.granularity import channel_axis, first_of_channel
from fheq.planning.plan import Plan
from fheq.qparams import QParams
from fheq.spec import AccumulatorRange, Spec
from fheq.steps import Add, Linear, Operand, Step, Sum, counts_decisions

OUTSIDE = 1e-5  # share of values that may fall outside of an observed range with its margin
DEVIATIONS = 4.42  # beyond as many standard deviations lies that share of a normal distribution


def observed_bounds(
    layout: Plan, qparams: QParams, stats: Stats, step: Step, margin: float, weights: Weights | None = None
) -> Bounds:
    """Integer range seen in calibration, per channel, widened at both ends by the margin and for the rounding of operands,
    which calibration did not meet: where values hardly vary it is most of what the accumulator will see."""
    axis = channel_axis(layout, step.out)
    scale, offset = (np.broadcast_to(v, step.shape) for v in accumulator_decoder(layout, qparams, step, weights))
    unit, offset = np.where(scale == 0, 1, scale), first_of_channel(offset, axis)  # see `channel_worst_case`
    ends = []
    for real in _widened(stats[step.out], margin):
        view = real.reshape(-1, *(1,) * (-axis - 1)) if axis is not None else real.reshape(())
        ends.append((view - offset) / unit)
    seen = (np.broadcast_to(end, step.shape) for end in (np.minimum(*ends), np.maximum(*ends)))
    low, high = channel_bounds(Bounds(*seen), axis)
    half = (high - low) / 2
    more = np.hypot(half, DEVIATIONS * operand_rounding(layout, qparams, step, weights)) - half
    return Bounds(np.floor(low - more), np.ceil(high + more))


def operand_rounding(layout: Plan, qparams: QParams, step: Step, weights: Weights | None) -> np.ndarray:
    """The standard deviation that the rounding of operands gives an accumulator, in its steps, per channel or `()`.

    Each operand is off by an independent part of its step that is uniform. Not of products of two encrypted tensors, where
    it depends on the values.
    """
    variance: Any = 0.0
    if isinstance(step, Linear) and weights is not None:
        others = tuple(axis for axis in range(-weights.integers.ndim, 0) if axis != step.weight_axis)
        variance = np.sum(np.square(weights.integers), axis=others)
        variance = np.max(variance) if channel_axis(layout, step.out) != step.channel else variance
    elif isinstance(step, Sum):
        variance = step.x.shape[-1]
    elif isinstance(step, Add):
        a, b = (_summand_rounding(layout, qparams, o) for o in step.operands)
        m, n, _ = multipliers(layout, qparams, step, *summands(layout, qparams, step))
        variance = np.max(np.square(m) * a + np.square(n) * b)
    return np.sqrt(np.asarray(variance) / 12)


def _summand_rounding(layout: Plan, qparams: QParams, operand: Operand) -> float:
    """The variance of a summand's rounding, in twelfths of its step."""
    if operand.key not in layout.summed:
        return 1.0
    made = step_of(layout, operand.key)
    weights = quantize_weight(layout, qparams, made) if isinstance(made, Linear) else None
    return float(np.max(12 * operand_rounding(layout, qparams, made, weights) ** 2))


@of_statistics
def _widened(stats: TensorStats, margin: float) -> tuple[np.ndarray, np.ndarray]:
    """The observed extremes, and how far unseen values are to be expected beyond."""
    low, high = np.asarray(stats.minimum, np.float64), np.asarray(stats.maximum, np.float64)
    more = [unseen_reach(tail.excess, stats.count, high - low, margin) for tail in tails(stats)]
    return low - more[0], high + more[1]


def unseen_reach(excess: np.ndarray, count: np.ndarray, span: np.ndarray, margin: float) -> np.ndarray:
    """How far beyond an extreme of `count` values a range must go to miss only a share `OUTSIDE` of unseen ones, `(C,)`.

    Beyond the extreme of n values an exponential tail of mean `excess` holds 1/n of the unseen ones. At least `margin` of
    the observed span is taken, where a thousand values were seen, and at most half of it.
    """
    missed = np.maximum(np.log(1 / (np.maximum(count, 1) * OUTSIDE)), 0)
    least = margin * missed / np.log(1 / (1000 * OUTSIDE)) * span
    return np.clip(excess * missed, least, np.maximum(span / 2, least))


def chosen_bounds(
    layout: Plan,
    qparams: QParams,
    stats: Stats,
    step: Step,
    spec: Spec,
    worst: Bounds,
    weights: Weights | None = None,
) -> Bounds:
    """The range that sizes an accumulator: never wider than the worst case, and all of it for comparisons and for counts,
    which are narrow and where a value that calibration never met (a class without samples) is none the less as likely as
    any."""
    counts = all(o.slope is None and is_boolean(layout.graph, o.key) for o in step.operands)
    counted = decides(layout, step) or counts_decisions(step) or counts
    if spec.accumulators is AccumulatorRange.WORST_CASE or counted:
        return worst
    seen = observed_bounds(layout, qparams, stats, step, spec.margin, weights)
    low = np.clip(seen.low, worst.low, worst.high)
    return Bounds(low, np.clip(seen.high, low, worst.high))


def decides(layout: Plan, step: Step) -> bool:
    """Whether nothing but decisions is made of a difference: one that wraps around would turn them."""
    points = [point for point, source in layout.points.items() if source == step.out]
    return isinstance(step, Add) and bool(points) and all(is_boolean(layout.graph, point) for point in points)
