"""Weights whose accumulators sums read: in units that the sum can bring together by small whole multipliers.

A sum takes each of its operands by a whole number of times. Where a layer's result is added to a tensor, a little coarser
weights make one step of the tensor a whole number of those of the layer. Where two layers are added, the one of finer steps
gets coarser ones, of which a whole number makes a step of the other: its error stays the lesser one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fheq.accumulator_decoders import summands, sums_accumulators
from fheq.accumulators import first_of_channel, rounding_of
from fheq.affine import Affine, as_float32
from fheq.decoders import step_of
from fheq.granularity import channel_axis
from fheq.plan import Plan
from fheq.qparams import QParams
from fheq.spec import Spec
from fheq.stated_weights import stated_weight
from fheq.steps import Add, Linear

MOST = 256.0  # parts of a step that are told apart in what is added to it
PARTS = 4  # steps of a layer that make one of what is added to it, at least: no weight gets more than a quarter coarser


def fit_sums(layout: Plan, spec: Spec, qparams: QParams) -> dict[str, Affine]:
    """The quantizers of weights that sums ask to be changed, in the order of sums.

    Args:
        qparams: with quantizers of tensors (`unsigned`) and of all weights.
    """
    changed: dict[str, Affine] = {}
    for step in layout.steps:
        if isinstance(step, Add) and sums_accumulators(layout, step):
            rounding = spec.rounding if step.out in layout.summed else rounding_of(layout, spec, step)
            wide = rounding is not None and rounding.approximate
            changed |= _align(layout, replace(qparams, weights={**qparams.weights, **changed}), step, wide)
    return changed


def _free(layout: Plan, qparams: QParams, step: Add) -> list[Linear | None]:
    """The layers whose accumulators a sum reads as they lie, channel by channel, and whose weights are theirs alone."""
    found: list[Linear | None] = []
    for operand in step.operands:
        made = step_of(layout, operand.key) if operand.key in layout.summed else None
        free = (
            isinstance(made, Linear)
            and operand.in_order
            and operand.shape == made.shape
            and made.channel == channel_axis(layout, step.out)
            and qparams.weights[made.weight_name].axis is not None
            and sum(isinstance(s, Linear) and s.weight_name == made.weight_name for s in layout.steps) == 1
            and stated_weight(layout, qparams, made) is None
        )
        found.append(made if free and isinstance(made, Linear) else None)
    return found


def _align(layout: Plan, qparams: QParams, step: Add, wide: bool) -> dict[str, Affine]:
    """The weights of the layers that a sum adds, in units that it can bring together.

    Args:
        wide: whether bits of the sum cost nothing, as those that are removed approximately.
    """
    changed: dict[str, Affine] = {}
    axis = channel_axis(layout, step.out)
    for i, made in enumerate(_free(layout, qparams, step)):
        if made is None:
            continue
        parts = summands(layout, replace(qparams, weights={**qparams.weights, **changed}), step)
        ratio = parts[1 - i].scale / parts[i].scale
        first = np.broadcast_to(first_of_channel(ratio, axis), ratio.shape)
        layers = step.operands[1 - i].key in layout.summed
        least = 1.0 if layers else PARTS
        ratio = np.ravel(first_of_channel(ratio, axis)) * (np.abs(ratio - first) <= 1e-6 * first).all()
        times = np.where(ratio >= 1, np.ceil(least / np.maximum(ratio, 1)), 0) * ratio
        whole = np.floor(np.clip(times, 1, MOST) + 1e-6) if wide or not layers else 1.0
        factor = np.where(times >= 1, times / whole, 1.0)
        changed[made.weight_name] = _coarser(qparams, made, factor)
    return changed


def _coarser(qparams: QParams, made: Linear, factor: np.ndarray) -> Affine:
    affine = qparams.weights[made.weight_name]
    return replace(affine, scale=as_float32(affine.scale * factor))
