"""`fheq.Accumulator` as a function of an exported model: what a circuit makes of a sum, in plain ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fheq.fitting.accumulators import whole_shift
from fheq.integers.accumulator_decoders import accumulator_decoder
from fheq.onnx.writer import OPSET
from fheq.planning.granularity import channel_axis, first_of_channel
from fheq.planning.plan import Plan
from fheq.qparams import QParams
from fheq.stated.accumulators import DOMAIN, INPUTS, NAME, STILL
from fheq.steps import Step

NOISE = 1e-9  # relative, of float64


def accumulator_call(
    layout: Plan, qparams: QParams, step: Step, known: np.ndarray | None, source: str, out: str
) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
    """The call for the accumulator of a step, and its parameters by name.

    Args:
        known: what is still to be added to the tensor `source`; None for nothing.
    """
    a, axis = qparams.accumulators[step.out], channel_axis(layout, step.out)
    decoded = accumulator_decoder(layout, qparams, step)
    scale, offset = (np.broadcast_to(np.asarray(v, np.float64), step.shape) for v in decoded)
    shift, unit, constant = (_by_channel(v, axis) for v in (whole_shift(layout, step, a, scale, offset), scale, offset))
    unit = np.where(unit == 0, STILL, unit)
    zero_point = shift - (constant - (0.0 if known is None else known)) / unit
    nearest = np.round(zero_point)  # a tensor that is 0 is to stay it
    zero_point = np.where(np.abs(zero_point - nearest) <= NOISE * (np.abs(nearest) + 1), nearest, zero_point)
    whole = a.expanded(len(step.shape))
    span = np.asarray(whole.qmax, np.float64) - whole.qmin
    leaves = unit, zero_point, np.zeros_like(span), span, 2.0 ** np.max(a.lsbs)
    known_leaves = {f"{out}/{label}": np.asarray(v, np.float64) for label, v in zip(INPUTS[1:], leaves)}
    call = helper.make_node(NAME, [source, *known_leaves], [out], name=out, domain=DOMAIN, rounding=a.rounding)
    return call, known_leaves


def _by_channel(values: np.ndarray, axis: int | None) -> np.ndarray:
    """Values of a tensor's shape, one for each channel where they do not vary otherwise."""
    first = first_of_channel(values, axis)
    return first if np.all(values == first) else values


def accumulator_function() -> onnx.FunctionProto:
    """`fheq.Accumulator` in plain ONNX; see `fheq.stated.accumulators`."""
    scalar = lambda name, value: helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.asarray(value)))
    chain: list[tuple[str, list[str], str, dict[str, Any]]] = [
        ("Cast", ["x"], "wide", {"to": TensorProto.DOUBLE}),
        ("Div", ["wide", "scale"], "steps", {}),
        ("Add", ["steps", "zero_point"], "shifted", {}),
        ("Round", ["shifted"], "acc", {}),
        ("Div", ["acc", "cell"], "cells", {}),
        ("Add", ["cells", "half"], "above", {}),
        ("Floor", ["above"], "kept", {}),
        ("Mul", ["kept", "cell"], "rounded", {}),
        ("Sub", ["rounded", "zero_point"], "centred", {}),
        ("Mul", ["centred", "scale"], "real", {}),
        ("CastLike", ["real", "x"], "y", {}),
    ]
    nodes = [scalar("half", 0.5), *(helper.make_node(op, inputs, [out], **attrs) for op, inputs, out, attrs in chain)]
    return helper.make_function(DOMAIN, NAME, INPUTS, ["y"], nodes, [helper.make_opsetid("", OPSET)], ["rounding"])
