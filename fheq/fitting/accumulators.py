"""Quantizers of accumulators: how they are rounded, and how many bits enter a table.

An offset brings the range of an accumulator to [0, 2^width). The slack is on both sides, as far as anything can come there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from fheq.affine import Affine, bit_length
from fheq.arrays.namespace import array_namespace
from fheq.errors import QuantizationError
from fheq.fitting.accumulator_ranges import chosen_bounds
from fheq.integers.accumulator_decoders import accumulator_decoder, accumulator_scale, sums_accumulators
from fheq.integers.bounds import Bounds, channel_worst_case
from fheq.integers.cell_thresholds import block_bits, meets_stated_steps, shift_onto_blocks, shift_onto_thresholds
from fheq.integers.integer_weights import Reading, Weights, quantize_weight
from fheq.observing.statistics import Stats
from fheq.planning.granularity import channel_axis, first_of_channel, varies_in_channel
from fheq.planning.plan import Plan
from fheq.qparams import QParams, unsigned
from fheq.spec import MAX_TABLE_BITS, Rounding, Spec
from fheq.stated.accumulators import fits
from fheq.steps import Add, Linear, Step, makes_accumulator

TABLE_BUDGET = 1 << 25  # entries of all channels of one table: what keeps tables of wide accumulators in memory
FINER = 2  # bits that a sum may have more of: with 4 parts of a unit and up, a fifth of the range at most is left unused
FULL = 0.8  # of the range
SPARE = 15 / 16  # of it is filled, for what wraps around costs more than resolution
BLOCKS = 4  # bits of a table that is read in blocks: fewer cost more to reach than they save
WORST_CASE_BITS = 6  # low bits that are given up so that an accumulator too wide for tables can never overflow


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
    return Weighed(weights, channel_worst_case(layout, qparams, step, weights))


def fit_accumulator(
    layout: Plan, stats: Stats, spec: Spec, qparams: QParams, step: Step, known: Weighed | None = None
) -> Affine:
    """The quantizer of the accumulator of a step.

    Args:
        qparams: `unsigned` ones of its tensors and weight.
        known: the step with this weight, where it is known.
    """
    weights, worst = (known or weighed(layout, qparams, step)) if isinstance(step, Linear) else (None, None)
    stated = _stated(layout, qparams, step, weights)
    if stated is not None:
        return stated
    rounding = rounding_of(layout, spec, step)
    added = step if isinstance(step, Add) and sums_accumulators(layout, step) else None
    if added is not None:
        qparams = _in_one_unit(layout, qparams, added)
    if worst is None:
        worst = channel_worst_case(layout, qparams, step)
    bounds = chosen_bounds(layout, qparams, stats, step, spec, worst, weights)
    if rounding is not None and added is not None:
        qparams = _in_smaller_units(layout, qparams, added, bounds, rounding)
        worst = channel_worst_case(layout, qparams, step)
        bounds = chosen_bounds(layout, qparams, stats, step, spec, worst)
    if rounding is not None:
        mode = "approximate" if rounding.approximate else "exact"
        least = removable(bounds, rounding.n_bits)
        first = accumulator_affine(layout, qparams, step, bounds, worst, least, mode, weights)
        if _lies_on_steps(layout, step, first) is not False:
            return first
        roomier = accumulator_affine(layout, qparams, step, bounds, worst, least + 1, mode, weights)
        return roomier if _lies_on_steps(layout, step, roomier) else first
    limit = table_bits(len(worst.low))
    if step.out not in layout.points.values() or aligned(bounds, 0)[1] <= limit:
        return accumulator_affine(layout, qparams, step, bounds, worst, 0, "exact", weights)
    # Too wide for any table: resolution is spent on what can never overflow.
    widest = worst if aligned(worst, 0)[1] <= limit + WORST_CASE_BITS else bounds
    return accumulator_affine(layout, qparams, step, widest, worst, removable(widest, limit), "exact", weights)


def _lies_on_steps(layout: Plan, step: Step, affine: Affine) -> bool | None:
    """Whether an accumulator's cells end at thresholds of stated quantizers; None where they can't."""
    unit, zero_point = np.atleast_1d(affine.scale), np.atleast_1d(affine.zero_point)
    shift = shift_onto_thresholds(layout, step, unit, zero_point, int(np.max(affine.lsbs)))
    return None if shift is None else not np.any(shift)


def _in_smaller_units(layout: Plan, qparams: QParams, step: Add, bounds: Bounds, rounding: Rounding) -> QParams:
    """`qparams` with a unit for a sum of accumulators in which each of its channels fills the cells that rounding leaves.

    Whole parts of the unit that the operands have: the sum takes them as often. Bits that are removed approximately cost
    nothing, and a few more of them bring every channel closer to the ends.
    """
    span = np.maximum(bounds.high - bounds.low, 1)
    for more in range(FINER + 1 if rounding.approximate else 1):
        lsbs = removable(bounds, rounding.n_bits) + more
        room = SPARE * 2.0 ** (rounding.n_bits + lsbs) - 2.5 * 2.0**lsbs
        parts = np.maximum(np.floor(room / span), 1)
        if np.min(parts * span) >= FULL * room:
            break
    scale = np.broadcast_to(accumulator_scale(layout, qparams, step), step.shape)
    unit = np.ravel(first_of_channel(scale, channel_axis(layout, step.out))) / parts
    return _in_units(layout, qparams, step, unit)


def _in_one_unit(layout: Plan, qparams: QParams, step: Add) -> QParams:
    """`qparams` with the least unit of each channel of a sum of accumulators, where those of its elements differ."""
    axis = channel_axis(layout, step.out)
    scale = np.broadcast_to(accumulator_scale(layout, qparams, step), step.shape)
    if not varies_in_channel(scale, axis):
        return qparams
    others = tuple(i for i in range(scale.ndim) if axis is None or i != axis % scale.ndim)
    return _in_units(layout, qparams, step, np.ravel(np.min(scale, axis=others)))


def _in_units(layout: Plan, qparams: QParams, step: Add, unit: np.ndarray) -> QParams:
    """`qparams` with one unit for each channel of a sum of accumulators."""
    axis, zero = channel_axis(layout, step.out), np.zeros_like(unit)
    known = Affine(unit if axis is not None else unit[0], *(zero,) * 4, axis)
    return replace(qparams, accumulators={**qparams.accumulators, step.out: known})


def rounding_of(layout: Plan, spec: Spec, step: Step) -> Rounding | None:
    """How the accumulator of a step is rounded; not at all when what reads it needs every integer, or is a sum.

    Raises:
        QuantizationError: exact rounding of an accumulator that is decrypted, which would take tables and save none.
    """
    if (isinstance(step, Linear) and step.options.get("exact")) or step.out in layout.summed:
        return None
    own = spec.override(step.out, step.node.name).rounding
    if step.out in layout.points.values():
        return own or spec.rounding
    found = own or spec.output_rounding
    if found is not None and not found.approximate:
        raise QuantizationError(f"the accumulator {step.out!r} is decrypted: its rounding must be approximate")
    return found


def _stated(layout: Plan, qparams: QParams, step: Step, weights: Weights | None) -> Affine | None:
    """The accumulator that the model states for a step; None where it states none, or one in other steps than the step's.

    A sum of accumulators takes the steps that are stated.
    """
    found = layout.accumulators.get(step.out)
    if found is None:
        return None
    rows = _rows(found, step.shape, channel_axis(layout, step.out))
    if rows is not None and isinstance(step, Add) and sums_accumulators(layout, step):
        qparams = replace(qparams, accumulators={**qparams.accumulators, step.out: rows})
    return rows if fits(found, accumulator_decoder(layout, qparams, step, weights)[0], step.shape) else None


def _rows(stated: Affine, shape: tuple[int, ...], axis: int | None) -> Affine | None:
    """A stated accumulator with one of each leaf per channel of a tensor; None where it is one of another shape."""
    rows: dict[str, Any] = {}
    for name in ("scale", "zero_point", "qmin", "qmax"):
        try:
            whole = np.broadcast_to(getattr(stated, name), shape)
        except ValueError:
            return None
        row = np.ravel(first_of_channel(whole, axis))
        rows[name] = row[0] if axis is None else row
    return replace(stated, **rows, axis=axis)


def table_bits(channels: int) -> int:
    """The widest table that is tabulated for an accumulator with so many channels."""
    return min(MAX_TABLE_BITS, int(np.log2(TABLE_BUDGET / max(channels, 1))))


def accumulator_affine(
    layout: Plan,
    qparams: QParams,
    step: Step,
    bounds: Bounds,
    worst: Bounds,
    lsbs: int,
    mode: str,
    weights: Weights | None = None,
) -> Affine:
    """The quantizer of an accumulator for a range per channel.

    Args:
        worst: the range that nothing leaves.
    """
    axis = channel_axis(layout, step.out)
    offset, width = aligned(bounds, lsbs)
    cell = 1 << lsbs
    slack = 2.0**width - 1 - (cell >> 1) - (bounds.high + offset)
    below = _share_below(slack, bounds.low - worst.low, worst.high - bounds.high)
    offset = offset + np.floor(below / cell) * cell
    slack = slack - np.floor(below / cell) * cell
    decoded = [np.broadcast_to(v, step.shape) for v in accumulator_decoder(layout, qparams, step, weights)]
    scale, constant = (np.ravel(first_of_channel(v, axis)) for v in decoded)
    scale = np.where(scale == 0, 1.0, np.abs(scale))  # of a constant: any step
    spare = Bounds(bounds.low + offset, slack)
    offset = offset + _onto_steps(layout, step, scale, offset - constant / scale, lsbs, width, spare)
    zero_point = offset - constant / scale  # so that the integers decode to the tensor itself, its bias included
    if axis is None:
        scale, zero_point = scale[0], zero_point[0]
    whole = lambda v: np.full_like(scale, v)
    return Affine(scale, zero_point, whole(0.0), whole(2.0**width - 1), np.asarray(float(lsbs)), axis, rounding=mode)


def _onto_steps(
    layout: Plan, step: Step, unit: np.ndarray, zero_point: np.ndarray, lsbs: int, width: int, slack: Bounds
) -> np.ndarray:
    """What is added to an offset, within its slack, to have cells, or blocks of a table, end at steps of stated quantizers.

    Args:
        slack: below and above.
    """
    bits = lsbs or block_bits(layout, step, unit, width - BLOCKS)
    find = shift_onto_thresholds if lsbs else shift_onto_blocks
    up = find(layout, step, unit, zero_point, bits)
    if up is None:
        return np.zeros(())
    down = up - 2.0**bits
    return np.where(up <= slack.high, up, np.where((lsbs == 0) & (-down <= slack.low), down, 0))


def _share_below(slack: np.ndarray, below: np.ndarray, above: np.ndarray) -> np.ndarray:
    """How much of the slack goes below the range: half of it, but to neither side more than it can use.

    Args:
        below, above: how far values can come beyond the range.
    """
    below, above = np.maximum(below, 0), np.maximum(above, 0)
    spare = slack - below - above
    return np.where(spare >= 0, below + spare / 2, np.minimum(np.maximum(slack / 2, slack - above), below))


def removable(bounds: Bounds, bits: int) -> int:
    """The fewest low bits whose removal leaves `bits`."""
    lsbs = max(0, bit_length(float(np.max(bounds.high - bounds.low))) - bits)  # whatever the offsets
    while aligned(bounds, lsbs)[1] - lsbs > bits:
        lsbs += 1
    return lsbs


def aligned(bounds: Bounds, lsbs: int) -> tuple[np.ndarray, int]:
    """Offsets, multiples of the cell 2^lsbs, that bring each channel to start at 0, and the width that then holds the
    largest value, rounded up by half a cell."""
    cell = 1 << lsbs
    offset = -np.floor(bounds.low / cell) * cell
    return offset, bit_length(float(np.max(bounds.high + offset)) + (cell >> 1))


def same_range(layout: Plan, qparams: QParams) -> QParams:
    """The accumulators brought to the units that the other quantizers now give them, their ranges centred as before.

    For quantizers that were edited after `fit`; leaves may be tracers.
    """
    accumulators = {}
    for step in layout.steps:
        if makes_accumulator(step):
            a, axis = qparams.accumulators[step.out], channel_axis(layout, step.out)
            scale = accumulator_scale(layout, qparams, step)
            xp = array_namespace(scale)
            unit = xp.ravel(first_of_channel(xp.broadcast_to(scale, step.shape), axis)).reshape(np.shape(a.scale))
            unit = xp.maximum(xp.abs(unit), 1e-30)
            middle = (a.qmin + a.qmax) / 2
            accumulators[step.out] = replace(a, scale=unit, zero_point=middle - a.scale * (middle - a.zero_point) / unit)
    return replace(qparams, accumulators=accumulators)


def whole_shift(layout: Plan, step: Step, affine: Affine, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """What is added to a step's integers to have an accumulator that starts at 0: whole cells, lest rounding changes, but
    where cells are to lie on the steps of stated quantizers.

    Args:
        scale, offset: the step's decoder (`accumulator_decoder`), in its shape.
    """
    axis = channel_axis(layout, step.out)
    a = affine.expanded(np.ndim(scale))
    unit = first_of_channel(scale, axis)
    floor = a.scale * (a.qmin - a.zero_point)  # real value at the lower end
    cell = 1.0 if meets_stated_steps(layout, step) else 2.0 ** np.max(a.lsbs)
    return np.asarray(-np.round((floor - offset) / np.where(unit == 0, 1, unit) / cell) * cell)
