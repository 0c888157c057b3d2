"""Weights and biases of linear steps as an exported model stores them, and what is added to what they make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from fheq.affine import Affine
from fheq.errors import UnsupportedError
from fheq.graph import Node, describe
from fheq.integers.integer_weights import along_inputs, along_outputs, quantize_weight
from fheq.onnx.quantizers import container, write_parameters
from fheq.onnx.writer import Writer
from fheq.planning.forms import used_weight
from fheq.planning.plan import Plan
from fheq.qparams import QParams
from fheq.steps import Linear


def write_weight(writer: Writer, layout: Plan, qparams: QParams, step: Linear, position: int) -> str:
    """A weight as the model stores it: integers, DequantizeLinear, and the scales of the input's channels undone.

    Args:
        position: of the weight among the inputs of the step's node.
    """
    name, node = step.weight_name, step.node
    affine = qparams.weights[name]
    shape = layout.graph.constants[name].shape
    place = used_weight(node, position, np.arange(int(np.prod(shape))).reshape(shape))

    def stored(used: Any) -> np.ndarray:
        values = np.empty(int(np.prod(shape)))
        values[place.ravel()] = np.broadcast_to(np.asarray(used, np.float64), step.weight.shape).ravel()
        return values.reshape(shape)

    found = quantize_weight(layout, qparams, step)
    expanded = affine.expanded(step.weight.ndim)
    ratio = stored(along_inputs(step, np.where(found.ratio == 0, 1.0, found.ratio)))
    alpha = node.attrs.get("alpha", 1.0) if node.op == "Gemm" else 1.0
    integers = stored(np.round(found.integers)) * np.sign(alpha * ratio)
    scale, zero = stored(expanded.scale) / abs(alpha), stored(expanded.zero_point)
    axis = _common_axis(scale, zero)
    if axis == -1 or np.any(alpha * ratio < 0):
        zero = np.zeros_like(zero)
        axis = _common_axis(scale)
    q = integers + zero
    factor = np.abs(ratio)
    # onnxruntime makes MatMulNBits or QGemm of a product with 8-bit weights, which round what they multiply.
    bits = 16 if node.op in ("Gemm", "MatMul") and np.all(factor == 1) else 8
    dtype = container(name, float(min(q.min(), zero.min())), float(max(q.max(), zero.max())), bits)
    values = writer.constant(f"{name}/q", q.astype(dtype))
    if axis == -1:  # channels along several stored axes
        factor, scale, axis = factor / scale, np.ones_like(scale), None
    none = np.zeros(())
    channel = None if axis is None else axis - len(shape)
    plain = Affine(_along(scale, axis), _along(zero, axis), none, none, none, channel)
    names, at = write_parameters(writer, f"{name}/real", plain, dtype, len(shape))
    real = writer.emit("DequantizeLinear", [values, *names], f"{name}/real", **at)
    if np.all(factor == 1):
        return real
    return writer.emit("Div", [real, writer.constant(f"{name}/ratio", factor.astype(np.float32))], f"{name}/scaled")


def write_bias(writer: Writer, node: Node, name: str) -> tuple[Node, str]:
    """A linear node and its known bias, in a form that onnxruntime does not round to steps of the accumulator: twice the
    bias of a Gemm, which halves it; another one as integers in steps of powers of two, which are exactly itself."""
    value = writer.constants[name]
    if node.op == "Gemm":
        node = replace(node, attrs={**node.attrs, "beta": node.attrs["beta"] / 2})
        return node, writer.constant(f"{name}/doubled", 2 * value)
    significand, exponent = np.frexp(value.astype(np.float32))
    exponent = np.maximum(exponent, -100)
    integers = np.ldexp(significand, 24).astype(np.int32)
    steps = np.ldexp(np.float32(1), exponent - 24)
    names = [writer.constant(f"{name}/{label}", v) for label, v in (("q", integers), ("scale", steps))]
    return node, writer.emit("DequantizeLinear", names, f"{name}/real", axis=0)


def known_part(layout: Plan, qparams: QParams, step: Linear) -> np.ndarray | None:
    """What input channels of known values add to a step's result, and what its weights' rounding lacks; None for nothing."""
    found = quantize_weight(layout, qparams, step)
    correction, known = found.correction, np.where(found.ratio == 0, found.reading.offset, 0)
    if not np.any(known):
        return correction if np.any(correction) else None
    if step.weight.ndim > 2 and step.form != "conv":
        raise UnsupportedError(f"{describe(step.node)}: constant channels before stacked matrices have no QDQ form")
    contribution = step.weight * along_inputs(step, known)
    axes = tuple(a for a in range(step.weight.ndim) if a != step.weight_axis % step.weight.ndim)
    return np.asarray(along_outputs(step, contribution.sum(axis=axes))) + correction


def _common_axis(*arrays: np.ndarray) -> int | None:
    """The one axis along which arrays of one shape vary; None where none does, -1 where there are several."""
    axes = (None, *range(arrays[0].ndim))
    return next((axis for axis in axes if all(_varies_along(values, axis) for values in arrays)), -1)


def _varies_along(values: np.ndarray, axis: int | None) -> bool:
    """Whether values vary along one axis at most."""
    return bool(np.all(values == values[tuple(slice(None) if a == axis else slice(0, 1) for a in range(values.ndim))]))


def _along(values: np.ndarray, axis: int | None) -> np.ndarray:
    if axis is None:
        return values.reshape(-1)[0]
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)[:, 0]
