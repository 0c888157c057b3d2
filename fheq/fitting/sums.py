"""Weights whose accumulators sums read: in units that the sum can bring together by small whole multipliers.

A sum takes each of its operands by a whole number of times. Where a layer's result is added to a tensor, a little coarser
weights make one step of the tensor a whole number of those of the layer. Where two layers are added, the one of finer steps
gets coarser ones, of which a whole number makes a step of the other: its error stays the lesser one. Where the channels of
what is added lie otherwise than the sum's, all steps are powers of two of one.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fheq.affine import Affine, as_float32
from fheq.fitting.accumulators import rounding_of
from fheq.fitting.stated_weights import stated_weight
from fheq.integers.accumulator_decoders import Summand, accumulator_scale, add_multipliers, summands, sums_accumulators
from fheq.integers.decoders import step_of
from fheq.observing.statistics import Stats, TensorStats
from fheq.planning.granularity import channel_axis, channel_numbers, first_of_channel, varies_in_channel
from fheq.planning.plan import Plan
from fheq.qparams import QParams
from fheq.spec import Spec
from fheq.steps import Add, Linear, Operand, Product

NOISE = 1e-6  # relative; scales are float32
MOST = 256.0  # parts of a step that are told apart in what is added to it
PARTS = 4  # steps of a layer that make one of what is added to it, at least: no weight gets more than a quarter coarser


def fit_sums(layout: Plan, stats: Stats, spec: Spec, qparams: QParams) -> dict[str, Affine]:
    """The quantizers of weights that sums ask to be changed, in the order of sums.

    Args:
        qparams: with quantizers of tensors (`unsigned`) and of all weights.
    """
    changed: dict[str, Affine] = {}
    for step in layout.steps:
        if isinstance(step, Add) and sums_accumulators(layout, step):
            rounding = spec.rounding if step.out in layout.summed else rounding_of(layout, spec, step)
            wide = rounding is not None and rounding.approximate
            changed |= _align(layout, stats, replace(qparams, weights={**qparams.weights, **changed}), step, wide)
    return changed


def _layer(layout: Plan, qparams: QParams, operand: Operand) -> Linear | None:
    """The layer whose accumulator a sum reads, if its weights are the model's to change and its alone."""
    made = step_of(layout, operand.key) if operand.key in layout.summed else None
    if not isinstance(made, Linear) or stated_weight(layout, qparams, made) is not None:
        return None
    users = sum(isinstance(s, Linear) and s.weight_name == made.weight_name for s in layout.steps)
    return made if users == 1 else None


def _free(layout: Plan, qparams: QParams, step: Add) -> list[Linear | None]:
    """The layers whose accumulators a sum reads channel by channel, and whose weights are theirs alone."""
    found: list[Linear | None] = []
    channels = channel_numbers(step.shape, channel_axis(layout, step.out))
    for operand in step.operands:
        made = _layer(layout, qparams, operand)
        numbers = None if made is None else channel_numbers(made.shape, made.channel)
        lies = numbers is not None and np.array_equal(numbers[operand.elements], channels)
        found.append(made if numbers is not None and lies and np.max(numbers) == np.max(channels) else None)
    return found


def _align(layout: Plan, stats: Stats, qparams: QParams, step: Add, wide: bool) -> dict[str, Affine]:
    """The weights of the layers that a sum adds, in units that it can bring together.

    Args:
        wide: whether bits of the sum cost nothing, as those that are removed approximately.
    """
    changed: dict[str, Affine] = {}
    axis = channel_axis(layout, step.out)
    lying = summands(layout, qparams, step)
    if any(varies_in_channel(part.scale, axis) for part in lying):
        return _in_powers_of_two(layout, qparams, step, lying)
    free = _free(layout, qparams, step)
    for i, made in enumerate(free):
        if made is None:
            continue
        parts = summands(layout, replace(qparams, weights={**qparams.weights, **changed}), step)
        ratio = parts[1 - i].scale / parts[i].scale
        ratio = np.ravel(first_of_channel(ratio, axis))
        if _in_steps_of_a_tensor(layout, step.operands[1 - i]):
            factor = _parts_of_a_step(
                ratio, np.ones_like(ratio) if wide else _span(stats[step.out]) / _span(stats[made.out])
            )
        else:
            factor = np.where(ratio >= 1, ratio / (np.floor(np.clip(ratio, 1, MOST) + NOISE) if wide else 1.0), 1.0)
            if free[1 - i] is None:  # which keeps the steps that it has
                factor = np.where(ratio >= 1, factor, _whole_number(parts[i], parts[1 - i], axis))
        changed[made.weight_name] = _coarser(qparams, made, factor)
    return changed


def _whole_number(own: Summand, other: Summand, axis: int | None) -> np.ndarray:
    """How much coarser, or a little finer, a layer's weights become, `(C,)`, that the sum's multipliers miss nothing."""
    *_, unit = add_multipliers(own, other)
    times = np.ravel(first_of_channel(own.scale / unit, axis))
    return np.round(times) / times


def _in_powers_of_two(layout: Plan, qparams: QParams, step: Add, parts: tuple[Summand, Summand]) -> dict[str, Affine]:
    """The weights of the layers that a sum adds, where channels do not lie as the sum's do: no two steps of one channel are
    then in a ratio that whole multipliers miss."""
    layers = [_layer(layout, qparams, operand) if operand.slope is None else None for operand in step.operands]
    given = [part.scale for part, made in zip(parts, layers) if made is None]
    base = np.max([np.max(scale) for scale in given or [part.scale for part in parts]])
    powers = np.concatenate([np.ravel(np.log2(scale / base)) for scale in given]) if given else np.zeros(0)
    if np.any(np.abs(powers - np.round(powers)) > NOISE):
        return {}  # weights alone cannot mend that
    changed = {}
    for made in (layer for layer in layers if layer is not None):
        whole = np.broadcast_to(accumulator_scale(layout, qparams, made), made.shape)
        scale = np.ravel(first_of_channel(whole, channel_axis(layout, made.out)))
        power = 2.0 ** np.ceil(np.log2(scale / base) - NOISE)
        changed[made.weight_name] = _coarser(qparams, made, base * power / scale)
    return changed


def _in_steps_of_a_tensor(layout: Plan, operand: Operand) -> bool:
    """Whether one step is as much as an operand is off by, as of a quantized tensor, its multiple or a sum with one; the
    accumulators of products are off by many of theirs."""
    if operand.key not in layout.summed:
        return True
    made = step_of(layout, operand.key)
    if isinstance(made, Linear) and made.fan_in == 1:
        return True
    return not isinstance(made, (Linear, Product)) and any(_in_steps_of_a_tensor(layout, o) for o in made.operands)


def _parts_of_a_step(ratio: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """How much coarser a layer's weights become for a tensor of `ratio` times their accumulator's step.

    Args:
        reach: of the sum, in ranges of the layer: where its bits cost something, one that is far wider needs no finer steps.
    """
    coarser = np.clip(np.minimum(reach / 2, np.sqrt(reach)), 1, np.maximum(ratio / PARTS, 1))
    times = np.where(ratio >= 1, np.ceil(PARTS / np.maximum(ratio / coarser, 1)), 0) * ratio / coarser
    return np.where(times >= 1, coarser * times / np.floor(np.clip(times, 1, MOST) + NOISE), 1.0)


def _span(stats: TensorStats) -> np.ndarray:
    """The observed range of each channel, never quite 0."""
    span = np.ravel(np.asarray(stats.maximum, np.float64) - stats.minimum)
    return np.maximum(span, np.max(span) / MOST + 1e-30)


def _coarser(qparams: QParams, made: Linear, factor: np.ndarray) -> Affine:
    affine = qparams.weights[made.weight_name]
    if affine.axis is None:  # where channels ask for different scales, the sum's multipliers miss a part
        factor = np.max(factor)
    return replace(affine, scale=as_float32(affine.scale * factor))
