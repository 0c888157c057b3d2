"""Weight quantizers that a model states, for the weight as its step uses it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fheq.affine import LEAVES, Affine
from fheq.forms import used_weight
from fheq.integers import along_inputs, input_channels, operand_axis, operand_decoder
from fheq.plan import Plan
from fheq.qparams import QParams
from fheq.steps import Linear

NOISE = 1e-6  # relative; stated scales are float32


def stated_weight(layout: Plan, qparams: QParams, step: Linear) -> Affine | None:
    """The quantizer that the model states for the weight of a step, scales of input channels multiplied in.

    A scale per input channel, per block or per element has an integer form only where the scales of the step's input undo
    it: the products of both may vary along the output channels alone.

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
    ratio = input_channels(step, operand_decoder(layout, qparams, step.x, operand_axis(step)))[1]
    alpha = step.node.attrs.get("alpha", 1.0) if step.node.op == "Gemm" else 1.0
    factor = alpha * np.broadcast_to(along_inputs(step, ratio), step.weight.shape)
    if np.any(factor < 0):  # integers change their sign with the weight
        if np.any(leaves["zero_point"]):
            return None
        reach = np.maximum(-leaves["qmin"], leaves["qmax"])
        leaves["qmin"], leaves["qmax"] = -reach, reach
    leaves["scale"] = leaves["scale"] * np.abs(factor)
    channels = lambda v: np.moveaxis(v, step.weight_axis, 0).reshape(v.shape[step.weight_axis], -1)
    rows, size = {leaf: channels(v) for leaf, v in leaves.items()}, channels(np.abs(factor))
    matters, top = size > 0, np.argmax(size, axis=1)
    first = {leaf: np.take_along_axis(v, top[:, None], axis=1) for leaf, v in rows.items()}
    apart = [np.abs(rows[leaf] - first[leaf]) > NOISE * np.abs(first[leaf]) for leaf in LEAVES]
    if np.any(np.stack(apart) & matters) or np.any(first["scale"] <= 0):
        return None
    one = all(np.ndim(getattr(stated, leaf)) == 0 for leaf in LEAVES) and all(np.all(v == v[0]) for v in first.values())
    axis = None if one else step.weight_axis
    fitting: dict[str, Any] = {leaf: v[0, 0] if one else v[:, 0] for leaf, v in first.items()}
    return replace(stated, **fitting, axis=axis)
