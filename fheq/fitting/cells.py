"""Weights scaled so that accumulators fill the cells that rounding leaves, or the widest table.

Rounding to P bits cuts an accumulator's range into 2^P cells whose width is a power of two. A channel whose range is just
above such a width uses little more than half of them. Coarser weights bring it under: a little weight noise for up to twice
the resolution. The trade is made per layer, by the expected error of both.

Without rounding concrete evaluates tables of up to 16 bits, and none of so many bits beside a rounding or a wider value. A
program that rounds nothing, and has an accumulator that is a little wider, compiles with coarser weights alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fheq.affine import Affine, as_float32
from fheq.fitting.accumulator_ranges import chosen_bounds
from fheq.fitting.accumulators import Weighed, aligned, removable, rounding_of, table_bits, weighed
from fheq.fitting.weight_quantizers import fit_weight, is_exact
from fheq.integers.bounds import Bounds, channel_bounds
from fheq.integers.integer_weights import Reading
from fheq.observing.statistics import Stats
from fheq.planning.granularity import channel_axis
from fheq.planning.plan import Plan
from fheq.qparams import QParams
from fheq.spec import MAX_TABLE_BITS, Spec
from fheq.steps import Linear, counts_decisions

DEPTH = 3  # how many bits fewer are tried
ATTEMPTS = 3
SPARE = 1.25  # of the observed range and its margin: a value beyond the range of a table that rounds nothing costs most
CLEARLY = 1.25  # times less error is expected of weights on steps of their own: few integers to a cell are mostly rounded up
COARSEST = 4.0  # how many times the scale of weights may grow for the sake of a table that exists


def fill_cells(
    layout: Plan,
    stats: Stats,
    spec: Spec,
    qparams: QParams,
    step: Linear,
    affine: Affine,
    known: Weighed,
    narrow: bool,
) -> Affine:
    """The weight quantizer of a step, its scales enlarged where that lowers the error of rounding or makes a table possible.

    Args:
        qparams: has the quantizer of the step's input.
        affine: the quantizer of its weight.
        known: the step with the weight that it gives.
        narrow: whether to make weights coarser for the sake of tables that exist.
    """
    rounding = rounding_of(layout, spec, step)
    axis = channel_axis(layout, step.out)
    if rounding is None:
        wanted = narrow and rounds_nothing(spec)
        return _within_table(layout, stats, spec, qparams, step, affine, known) if wanted else affine
    if affine.axis is None or axis is None or counts_decisions(step):
        return affine
    if stats[step.out].squares is None:  # the trade needs variances
        return affine
    read = known.weights.reading
    exact = _exact(step, affine, read)
    filled, error = _filled(layout, stats, spec, qparams, step, affine, known, rounding.n_bits, exact)
    if error == 0 or not np.any(exact):
        return filled
    plain = fit_weight(read, step, spec, own=False)
    weighed_plainly = weighed(layout, replace(qparams, weights={step.weight_name: plain}), step, read)
    other, other_error = _filled(
        layout, stats, spec, qparams, step, plain, weighed_plainly, rounding.n_bits, np.zeros_like(exact)
    )
    return other if other_error < CLEARLY * error else filled


def _filled(
    layout: Plan,
    stats: Stats,
    spec: Spec,
    qparams: QParams,
    step: Linear,
    affine: Affine,
    known: Weighed,
    bits: int,
    exact: np.ndarray,
) -> tuple[Affine, float]:
    """The quantizer of a weight with the scales that fill the cells best, and the error to expect, 0 where nothing is
    rounded. Channels whose weights are `exact` keep their scales: coarser ones would miss all weights by as much."""
    weights, worst = known
    bounds = chosen_bounds(layout, qparams, stats, step, spec, worst, weights)
    least = removable(bounds, bits)
    if least == 0:
        return affine, 0.0
    axis = channel_axis(layout, step.out)
    variance = channel_variance(stats, step)
    unit = np.broadcast_to(weights.scale, step.shape)
    unit = channel_bounds(Bounds(unit, unit), axis).high
    noise = np.where(exact, 0.0, input_power(stats, weights.reading, step))
    tried = range(least if np.any(exact) else max(least - DEPTH, 0), least + 1)
    error, factor = min((candidate(bounds, lsbs, bits, unit, noise, variance, exact) for lsbs in tried), key=lambda f: f[0])
    return affine if np.all(factor == 1) else replace(affine, scale=as_float32(affine.scale * factor)), error


def _exact(step: Linear, affine: Affine, read: Reading) -> np.ndarray:
    """By output channel, whether the weights lie on their grid."""
    return is_exact(step.rows(read.absorbed(step)), affine.scale)


def rounds_nothing(spec: Spec) -> bool:
    """Whether no accumulator is rounded."""
    own = (override.rounding for override in spec.overrides.values())
    return not any((spec.rounding, spec.output_rounding, *own))


def too_wide(qparams: QParams) -> bool:
    """Whether an accumulator lost low bits, or has more than tables of concrete read."""
    accumulators = qparams.accumulators.values()
    return any(np.any(a.lsbs > 0) or np.max(a.qmax - a.qmin) >= 2.0**MAX_TABLE_BITS for a in accumulators)


def _within_table(
    layout: Plan, stats: Stats, spec: Spec, qparams: QParams, step: Linear, affine: Affine, known: Weighed
) -> Affine:
    """Scales with which 16 bits hold the worst case of the accumulator, or somewhat more than what was seen in calibration.

    They are as they were where that takes more than two bits of the weight.
    """
    seen = lambda known: chosen_bounds(layout, qparams, stats, step, spec, known.worst, known.weights)
    limit = table_bits(len(known.worst.low))
    if not layout.points or counts_decisions(step) or aligned(seen(known), 0)[1] <= limit:
        return affine
    each = affine.axis is not None and channel_axis(layout, step.out) is not None
    fitted, found, coarser = affine, known, np.ones(())
    for _ in range(ATTEMPTS):  # other weights have another worst case
        worst, least = (
            coarser * (bounds.high - bounds.low) / (2.0**limit - 8)  # ends are rounded outwards
            for bounds in (found.worst, seen(found))
        )
        wanted = np.minimum(worst, SPARE * least)
        coarser = np.maximum(coarser, wanted if each else np.max(wanted))  # from 1 on
        if np.max(coarser) > COARSEST:
            return affine
        fitted = replace(affine, scale=as_float32(affine.scale * coarser))
        found = weighed(layout, replace(qparams, weights={step.weight_name: fitted}), step, known.weights.reading)
        if aligned(found.worst, 0)[1] <= limit:
            return fitted
    return fitted if aligned(seen(found), 0)[1] <= limit else affine


def candidate(
    bounds: Bounds, lsbs: int, bits: int, unit: np.ndarray, noise: np.ndarray, variance: np.ndarray, kept: np.ndarray
) -> tuple[float, np.ndarray]:
    """Expected error relative to each channel's variance, and the factor of each channel's weight scale, 1 where it is
    `kept`."""
    cell = 2.0**lsbs
    room = 2.0 ** (bits + lsbs) - 1 - 2 * cell - cell / 2
    factor = np.where(kept, 1.0, np.maximum(1.0, (bounds.high - bounds.low) / max(room, 1.0)))
    error = (unit * factor) ** 2 * (cell**2 + noise) / 12
    return float(np.sum(error / variance)), factor


def channel_variance(stats: Stats, step: Linear) -> np.ndarray:
    """Variance of each channel of a step's result, never quite 0."""
    found = stats[step.out]
    mean = found.total / found.count
    spread = found.squares / found.count - mean**2
    return np.maximum(spread, 1e-9 * np.max(np.abs(spread)) + 1e-30)


def input_power(stats: Stats, read: Reading, step: Linear) -> float:
    """Expected sum of squares of the integers that one output of a step reads."""
    terms = step.weight.size / step.weight.shape[step.weight_axis]
    key = step.x.key
    if key not in stats:
        return terms * float(np.mean(((read.x.high - read.x.low) / 2) ** 2))
    found = stats[key]
    return terms * float(np.sum(found.squares) / np.sum(found.count)) / float(read.unit) ** 2
