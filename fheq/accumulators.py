"""Ranges and rounding of accumulators: what enters a table, and how many bits of it.

Two ranges are known of every accumulator: the worst case, from integer weights and input ranges, and the observed one, from
calibration, with a margin. An offset brings the chosen range to [0, 2^width), centred so that the slack is on both sides.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from fheq.affine import Affine
from fheq.clipping import tails
from fheq.errors import QuantizationError
from fheq.granularity import channel_axis
from fheq.integers import (
    Reading,
    Weights,
    accumulator_decoder,
    add_multipliers,
    apply_form,
    array_namespace,
    operand_decoder,
    quantize_weight,
)
from fheq.plan import Plan
from fheq.qparams import QParams, unsigned
from fheq.regions import is_boolean
from fheq.spec import MAX_TABLE_BITS, AccumulatorRange, Rounding, Spec
from fheq.stated_accumulators import fits
from fheq.stated_weights import stated_weight
from fheq.statistics import Stats, TensorStats, of_statistics
from fheq.steps import Add, Join, Linear, Maximum, Product, Step, Sum, counts_decisions

TABLE_BUDGET = 1 << 25  # entries of all channels of one table: what keeps tables of wide accumulators in memory
OUTSIDE = 1e-5  # share of values that may fall outside of an observed range with its margin
WORST_CASE_BITS = 6  # low bits that are given up so that an accumulator too wide for tables can never overflow


class Bounds(NamedTuple):
    """Smallest and largest integer of an accumulator; arrays of the step's shape, or per channel."""

    low: np.ndarray
    high: np.ndarray


def makes_accumulator(step: Step) -> bool:
    """Whether a step makes an accumulator (the others pass quantized values on)."""
    return not isinstance(step, (Maximum, Join))


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
        middle = apply_form(step, (x.low + x.high) / 2, w)
        reach = apply_form(step, (x.high - x.low) / 2, np.abs(w))
        return middle - reach, middle + reach
    if isinstance(step, Sum):
        x = operand_decoder(layout, qparams, step.x)
        valid = (step.x.elements >= 0).reshape(step.x.shape)
        return tuple(np.sum(np.where(valid, v, 0), axis=-1) for v in (x.low, x.high))
    a, b = (operand_decoder(layout, qparams, o) for o in step.operands)
    if isinstance(step, Add):
        m, n, _ = add_multipliers(a, b)
        n_low, n_high = (n * b.low, n * b.high) if step.sign > 0 else (-n * b.high, -n * b.low)
        low, high = m * a.low + n_low, m * a.high + n_high
        extreme = from_its_extreme(layout, step)
        return (low, np.minimum(high, 0)) if extreme > 0 else (np.maximum(low, 0), high) if extreme < 0 else (low, high)
    assert isinstance(step, Product)
    p, r = (np.round(d.offset / d.scale) for d in (a, b))
    corners = [i * j for i in (a.low + p, a.high + p) for j in (b.low + r, b.high + r)]
    low, high = np.min(np.stack(corners), axis=0), np.max(np.stack(corners), axis=0)
    return (np.sum(low, -1), np.sum(high, -1)) if step.contract else (low, high)


def from_its_extreme(layout: Plan, step: Add) -> int:
    """1 for differences of elements from a maximum that they take part in (never above 0), -1 from a minimum, else 0."""
    made = next((s for s in layout.steps if s.out == step.b.key), None)
    if step.sign > 0 or not isinstance(made, Maximum) or any(x.key != step.a.key for x in made.xs):
        return 0
    if step.a.slope is not None or step.b.slope is not None or np.any(step.b.elements < 0):
        return 0
    windows = np.concatenate([x.elements.reshape(-1, x.shape[-1]) for x in made.xs], axis=1)[step.b.elements]
    return made.sign if np.all(np.any(windows == step.a.elements[:, None], axis=1)) else 0


def decides(layout: Plan, step: Step) -> bool:
    """Whether nothing but decisions is made of a difference: one that wraps around would turn them."""
    points = [point for point, source in layout.points.items() if source == step.out]
    return isinstance(step, Add) and bool(points) and all(is_boolean(layout.graph, point) for point in points)


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


def observed_bounds(
    layout: Plan, qparams: QParams, stats: Stats, step: Step, margin: float, weights: Weights | None = None
) -> Bounds:
    """Integer range seen in calibration, widened at both ends by the margin, per channel."""
    axis = channel_axis(layout, step.out)
    scale, offset = accumulator_decoder(layout, qparams, step, weights)
    unit = np.where(scale == 0, 1, scale)
    ends = []
    for real in _widened(stats[step.out], margin):
        view = real.reshape(-1, *(1,) * (-axis - 1)) if axis is not None else real.reshape(())
        ends.append((view - offset) / unit)
    low, high = np.floor(np.minimum(*ends)), np.ceil(np.maximum(*ends))
    return channel_bounds(Bounds(*(np.broadcast_to(end, step.shape) for end in (low, high))), axis)


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


def bit_length(span: float) -> int:
    """Bits of an unsigned integer up to `span`."""
    return max(1, int(span).bit_length())


def aligned(bounds: Bounds, lsbs: int) -> tuple[np.ndarray, int]:
    """Offsets, multiples of the cell 2^lsbs, that bring each channel to start at 0, and the width that then holds the
    largest value, rounded up by half a cell."""
    cell = 1 << lsbs
    offset = -np.floor(bounds.low / cell) * cell
    return offset, bit_length(float(np.max(bounds.high + offset)) + (cell >> 1))


def removable(bounds: Bounds, bits: int) -> int:
    """The fewest low bits whose removal leaves `bits`."""
    lsbs = max(0, bit_length(float(np.max(bounds.high - bounds.low))) - bits)  # whatever the offsets
    while aligned(bounds, lsbs)[1] - lsbs > bits:
        lsbs += 1
    return lsbs


def fit_accumulators(layout: Plan, stats: Stats, spec: Spec, qparams: QParams) -> QParams:
    """Sets the accumulators of `qparams` from its other quantizers: call it after editing those.

    Args:
        layout: `plan(graph)`.
    """
    encrypted = unsigned(qparams)  # sums of unequal numbers of terms (pools with pads) differ in where 0 lies
    accumulators = {
        step.out: fit_accumulator(layout, stats, spec, encrypted, step) for step in layout.steps if makes_accumulator(step)
    }
    return replace(qparams, accumulators=accumulators)


def rounding_of(layout: Plan, spec: Spec, step: Step) -> Rounding | None:
    """How the accumulator of a step is rounded; not at all when what reads it needs every integer.

    Raises:
        QuantizationError: exact rounding of an accumulator that is decrypted, which would take tables and save none.
    """
    if isinstance(step, Linear) and step.options.get("exact"):
        return None
    own = spec.override(step.out, step.node.name).rounding
    if step.out in layout.points.values():
        return own or spec.rounding
    found = own or spec.output_rounding
    if found is not None and not found.approximate:
        raise QuantizationError(f"the accumulator {step.out!r} is decrypted: its rounding must be approximate")
    return found


class Weighed(NamedTuple):
    """A linear step with a quantized weight, and the worst case of its accumulator per channel."""

    weights: Weights
    worst: Bounds


def weighed(layout: Plan, qparams: QParams, step: Linear, read: Reading | None = None) -> Weighed:
    """The step with the weight as `qparams` quantizes it.

    Args:
        read: what `reading` gives, where it is known.
    """
    weights = quantize_weight(layout, qparams, step, read)
    return Weighed(weights, channel_bounds(worst_case(layout, qparams, step, weights), channel_axis(layout, step.out)))


def fit_accumulator(
    layout: Plan, stats: Stats, spec: Spec, qparams: QParams, step: Step, known: Weighed | None = None
) -> Affine:
    """The quantizer of the accumulator of a step.

    Args:
        qparams: `unsigned` ones of its tensors and weight.
        known: the step with this weight, where it is known.
    """
    if isinstance(step, Linear):
        weights, worst = known or weighed(layout, qparams, step)
    else:
        weights, worst = None, channel_bounds(worst_case(layout, qparams, step), channel_axis(layout, step.out))
    stated = _stated(layout, qparams, step, weights)
    if stated is not None:
        return stated
    rounding = rounding_of(layout, spec, step)
    bounds = chosen_bounds(layout, qparams, stats, step, spec, worst, weights)
    if rounding is not None:
        mode = "approximate" if rounding.approximate else "exact"
        return accumulator_affine(layout, qparams, step, bounds, removable(bounds, rounding.n_bits), mode, weights)
    if step.out not in layout.points.values():
        return accumulator_affine(layout, qparams, step, bounds, 0, "exact", weights)
    limit = table_bits(len(worst.low))
    # Too wide for any table: resolution is spent on what can never overflow, unless the model's own integers would be lost.
    kept = isinstance(step, Linear) and stated_weight(layout, qparams, step) is not None
    if aligned(worst, 0)[1] <= limit or (kept and aligned(bounds, 0)[1] <= limit):
        return accumulator_affine(layout, qparams, step, bounds, 0, "exact", weights)
    widest = worst if aligned(worst, 0)[1] <= limit + WORST_CASE_BITS else bounds
    return accumulator_affine(layout, qparams, step, widest, removable(widest, limit), "exact", weights)


def _stated(layout: Plan, qparams: QParams, step: Step, weights: Weights | None) -> Affine | None:
    """The accumulator that the model states for a step; None where it states none, or one in other steps than the step's."""
    found = layout.accumulators.get(step.out)
    if found is None or not fits(found, accumulator_decoder(layout, qparams, step, weights)[0], step.shape):
        return None
    axis = channel_axis(layout, step.out)
    rows: dict[str, Any] = {
        name: np.ravel(first_of_channel(np.broadcast_to(getattr(found, name), step.shape), axis))
        for name in ("scale", "zero_point", "qmin", "qmax")
    }
    return replace(found, **{name: row[0] if axis is None else row for name, row in rows.items()}, axis=axis)


def table_bits(channels: int) -> int:
    """The widest table that is tabulated for an accumulator with so many channels."""
    return min(MAX_TABLE_BITS, int(np.log2(TABLE_BUDGET / max(channels, 1))))


def accumulator_affine(
    layout: Plan,
    qparams: QParams,
    step: Step,
    bounds: Bounds,
    lsbs: int,
    mode: str,
    weights: Weights | None = None,
) -> Affine:
    """The quantizer of an accumulator for a range per channel."""
    axis = channel_axis(layout, step.out)
    offset, width = aligned(bounds, lsbs)
    cell = 1 << lsbs
    slack = 2.0**width - 1 - (cell >> 1) - (bounds.high + offset)
    offset = offset + np.floor(slack / 2 / cell) * cell
    decoded = [np.broadcast_to(v, step.shape) for v in accumulator_decoder(layout, qparams, step, weights)]
    scale, constant = (np.ravel(first_of_channel(v, axis)) for v in decoded)
    scale = np.maximum(np.abs(scale), 1e-300)
    zero_point = offset - constant / scale  # so that the integers decode to the tensor itself, its bias included
    if axis is None:
        scale, zero_point = scale[0], zero_point[0]
    whole = lambda v: np.full_like(scale, v)
    return Affine(scale, zero_point, whole(0.0), whole(2.0**width - 1), np.asarray(float(lsbs)), axis, rounding=mode)


def same_range(layout: Plan, qparams: QParams) -> QParams:
    """The accumulators brought to the units that the other quantizers now give them, their ranges centred as before.

    For quantizers that were edited after `fit`; leaves may be tracers.
    """
    accumulators = {}
    for step in layout.steps:
        if makes_accumulator(step):
            a, axis = qparams.accumulators[step.out], channel_axis(layout, step.out)
            scale = accumulator_decoder(layout, qparams, step)[0]
            xp = array_namespace(scale)
            unit = xp.ravel(first_of_channel(xp.broadcast_to(scale, step.shape), axis)).reshape(np.shape(a.scale))
            unit = xp.maximum(xp.abs(unit), 1e-30)
            middle = (a.qmin + a.qmax) / 2
            accumulators[step.out] = replace(a, scale=unit, zero_point=middle - a.scale * (middle - a.zero_point) / unit)
    return replace(qparams, accumulators=accumulators)


def whole_shift(affine: Affine, scale: np.ndarray, offset: np.ndarray, axis: int | None) -> np.ndarray:
    """What is added to a step's integers to have an accumulator that starts at 0: whole cells, lest rounding changes.

    Args:
        scale, offset: the step's decoder (`accumulator_decoder`), in its shape.
    """
    a = affine.expanded(np.ndim(scale))
    unit, constant = (first_of_channel(v, axis) for v in (scale, offset))
    floor = a.scale * (a.qmin - a.zero_point)  # real value at the lower end
    cell = 2.0 ** np.max(a.lsbs)
    return np.asarray(-np.round((floor - constant) / np.where(unit == 0, 1, unit) / cell) * cell)


def first_of_channel(v: np.ndarray, axis: int | None) -> np.ndarray:
    """The first element of each channel, with the other axes kept as 1."""
    index = tuple(slice(None) if axis is not None and i == axis % v.ndim else slice(0, 1) for i in range(v.ndim))
    return v[index]
