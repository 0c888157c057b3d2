"""Weight quantizers that a model states, for the weight as its step uses it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fheq.affine import LEAVES, Affine, as_float32
from fheq.integers.decoders import operand_axis, operand_decoder
from fheq.integers.integer_weights import along_inputs, input_channels
from fheq.planning.forms import used_weight
from fheq.planning.plan import Plan
from fheq.qparams import QParams
from fheq.steps import Linear

NOISE = 1e-6  # relative; stated scales are float32
MOVED = 1 / 16  # of a weight's own step, by a common grid
FINEST = 8  # parts of the smallest step: half of one is `MOVED`
LARGEST = 128.0  # steps of a common grid to the largest step


def stated_weight(layout: Plan, qparams: QParams, step: Linear) -> Affine | None:
    """The quantizer that the model states for the weight of a step, scales of input channels multiplied in.

    A scale per input channel, per block or per element has the same integers only where the scales of the step's input undo
    it: the products of both may vary along the output channels alone. Elsewhere the weights get the coarsest common grid
    that moves none of them by more than `MOVED` of its own step, or one of `LARGEST` steps to the largest of theirs.

    Returns:
        None where the model states none, or none with an integer form: the weight is then quantized as a plain one.
    """
    stated = layout.graph.pinned.get(step.weight_name)
    if stated is None:
        return None
    stored = layout.graph.constants[step.weight_name].shape
    position = list(step.node.inputs).index(step.weight_name)
    expanded = stated.expanded(len(stored))
    leaves = {}
    for leaf in LEAVES:
        spread = np.broadcast_to(np.asarray(getattr(expanded, leaf), np.float64), stored)
        leaves[leaf] = used_weight(step.node, position, spread)
    unit, ratio, _ = input_channels(step, operand_decoder(layout, qparams, step.x, operand_axis(step)))
    alpha = step.node.attrs.get("alpha", 1.0) if step.node.op == "Gemm" else 1.0
    factor = alpha * np.broadcast_to(along_inputs(step, ratio), step.weight.shape)
    if np.any(factor < 0):  # integers change their sign with the weight
        if np.any(leaves["zero_point"]):
            return None
        reach = np.maximum(-leaves["qmin"], leaves["qmax"])
        leaves["qmin"], leaves["qmax"] = -reach, reach
    leaves["scale"] = leaves["scale"] * np.abs(factor)
    rows, size = {leaf: step.rows(v) for leaf, v in leaves.items()}, step.rows(np.abs(factor))
    matters, top = size > 0, np.argmax(size, axis=1)
    first = {leaf: np.take_along_axis(v, top[:, None], axis=1) for leaf, v in rows.items()}
    apart = [np.abs(rows[leaf] - first[leaf]) > NOISE * np.abs(first[leaf]) for leaf in LEAVES]
    if np.any(np.stack(apart) & matters) or np.any(first["scale"] <= 0):
        sizes = np.where(matters, rows["scale"], np.nan)
        return _common_grid(
            step, step.rows(step.weight * np.broadcast_to(along_inputs(step, ratio), step.weight.shape)), sizes
        )
    one = all(np.ndim(getattr(stated, leaf)) == 0 for leaf in LEAVES) and all(np.all(v == v[0]) for v in first.values())
    first["scale"] = _exactly(layout, step, first["scale"], unit)
    one = one and bool(np.all(first["scale"] == first["scale"][0]))
    fitting: dict[str, Any] = {leaf: v[0, 0] if one else v[:, 0] for leaf, v in first.items()}
    return replace(stated, **fitting, axis=None if one else step.weight_axis)


def _exactly(layout: Plan, step: Linear, scale: np.ndarray, unit: np.ndarray) -> np.ndarray:
    """Scales `(C, 1)` by the stated accumulator of the step, which knows them in float64, where they are those."""
    found = layout.accumulators.get(step.out)
    if found is None:
        return scale
    spread = np.moveaxis(np.broadcast_to(found.scale, step.shape), step.channel, 0)
    exact = spread.reshape(len(spread), -1)[:, :1] / unit
    return np.where(np.abs(exact - scale) <= NOISE * scale, exact, scale) if exact.shape == scale.shape else scale


def _common_grid(step: Linear, rows: np.ndarray, sizes: np.ndarray) -> Affine | None:
    """A grid per output channel for weights that are stated in steps of several sizes.

    Args:
        rows: the weights `(C, n)`.
        sizes: their own steps, NaN for those that multiply known values.

    Returns:
        None where there are none.
    """
    known = ~np.isnan(sizes)
    if not np.all(known.any(axis=1)) or not np.all(sizes[known] > 0):
        return None
    smallest = np.nanmin(sizes, axis=1, keepdims=True)
    scale = smallest / FINEST
    for parts in range(FINEST - 1, 0, -1):
        base = smallest / parts
        moved = np.abs(np.round(rows / base) * base - rows)
        scale = np.where(np.all((moved <= MOVED * sizes) | ~known, axis=1, keepdims=True), base, scale)
    scale = as_float32(np.maximum(scale, np.nanmax(sizes, axis=1, keepdims=True) / LARGEST))
    reach = np.maximum(np.max(np.where(known, np.abs(np.round(rows / scale)), 0), axis=1), 1)
    none = np.zeros_like(reach)
    return Affine(scale[:, 0], none, -reach, reach, none, step.weight_axis, signed=True)
