"""Quantizers that a model states itself: QuantizeLinear, DequantizeLinear, and the Quant family of Brevitas and QONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from fheq.affine import ROUNDINGS
from fheq.errors import UnsupportedError
from fheq.graph import Node, describe
from fheq.ops.arguments import axis_of, checked, dtype_of
from fheq.ops.table import Kind, Op, register

Array = Any
QUANT_DOMAINS = ("onnx.brevitas", "qonnx.custom_op.general")


def _spread(node: Node, x: Array, parameter: Array) -> Array:
    """A scale or zero point in a shape that broadcasts against `x`: per tensor, per axis or per block of an axis."""
    if parameter.size == 1:
        return jnp.reshape(parameter, ())
    axis = axis_of(node.attrs.get("axis", 1), x.ndim)
    block = node.attrs.get("block_size", 0)
    if block == 0 and parameter.ndim == 1:
        return jnp.reshape(parameter, (-1,) + (1,) * (x.ndim - axis - 1))
    if block < 1 or parameter.ndim != x.ndim:
        raise ValueError(f"parameters of shape {parameter.shape} with block_size {block} do not fit shape {x.shape}")
    blocks = jnp.arange(x.shape[axis]) // block
    return jnp.take(parameter, blocks, axis=axis, mode="clip")


def _quantize_linear(node: Node, x: Array, scale: Array, zero_point: Array | None = None) -> Array:
    """ONNX QuantizeLinear to integers."""
    code = node.attrs.get("output_dtype", 0)
    dtype = dtype_of(node, code) if code else checked(node, np.uint8 if zero_point is None else zero_point.dtype)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise UnsupportedError(f"{describe(node)}: QuantizeLinear to {dtype}; use an integer type")
    precision = node.attrs.get("precision", 0)
    real = dtype_of(node, precision) if precision else scale.dtype
    y = jnp.round(x.astype(real) / _spread(node, x, scale).astype(real))
    if zero_point is not None:
        y = y + _spread(node, x, zero_point).astype(real)
    limits = jnp.iinfo(dtype)
    return jnp.clip(y, int(limits.min), int(limits.max)).astype(dtype)


def _dequantize_linear(node: Node, x: Array, scale: Array, zero_point: Array | None = None) -> Array:
    """ONNX DequantizeLinear."""
    code = node.attrs.get("output_dtype", 0)
    dtype = dtype_of(node, code) if code else scale.dtype
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise UnsupportedError(f"{describe(node)}: DequantizeLinear from {x.dtype}; use an integer type")
    steps = x.astype(np.int32)
    if zero_point is not None:
        steps = steps - _spread(node, x, zero_point).astype(np.int32)
    return (steps.astype(scale.dtype) * _spread(node, x, scale)).astype(dtype)


def _rounding(node: Node, default: str) -> Callable[[Array], Array]:
    mode = str(node.attrs.get("rounding_mode", default)).upper()
    if mode not in ROUNDINGS:
        raise UnsupportedError(f"{describe(node)}: rounding mode {mode!r}; use one of {', '.join(ROUNDINGS)}")
    return ROUNDINGS[mode]


def _limits(node: Node, bits: Array) -> tuple[Array, Array]:
    """Smallest and largest integer of a Quant or Trunc."""
    narrow = bool(node.attrs.get("narrow", 0))
    if node.attrs.get("signed", 1):
        return narrow - 2.0 ** (bits - 1), 2.0 ** (bits - 1) - 1
    return 0.0 * bits, 2.0**bits - 1 - narrow


def _quant(node: Node, x: Array, scale: Array, zero_point: Array, bits: Array) -> Array:
    """Quant of Brevitas and QONNX: the values that the integers stand for."""
    q = _rounding(node, "ROUND")(jnp.clip(x / scale + zero_point, *_limits(node, bits)))
    return ((q - zero_point) * scale).astype(x.dtype)


def _bipolar_quant(node: Node, x: Array, scale: Array) -> Array:
    """BipolarQuant of Brevitas and QONNX: plus or minus the scale."""
    return jnp.where(x >= 0, scale, -scale).astype(x.dtype)


def _trunc(node: Node, x: Array, scale: Array, zero_point: Array, bits_in: Array, *last: Array) -> Array:
    """Trunc of Brevitas and QONNX: drops low bits of the integers. Its version 2 states the new scale, and clips."""
    q = jnp.round(x / scale + zero_point)
    if len(last) == 1:
        q = _rounding(node, "FLOOR")(q / 2.0 ** (bits_in - last[0]))
        return ((q - zero_point) * scale).astype(x.dtype)
    step, bits = last
    cell = 2.0 ** jnp.round(jnp.log2(step / scale))
    q = _rounding(node, "FLOOR")(jnp.clip(q / cell, *_limits(node, bits)))
    return ((q - zero_point / cell) * step).astype(x.dtype)


register(
    Op("DequantizeLinear", 10, Kind.COMPOSITE, _dequantize_linear),
    Op("QuantizeLinear", 10, Kind.COMPOSITE, _quantize_linear),
    *(
        Op(name, 1, Kind.COMPOSITE, function, domain=domain)
        for domain in QUANT_DOMAINS
        for name, function in (("BipolarQuant", _bipolar_quant), ("IntQuant", _quant), ("Quant", _quant), ("Trunc", _trunc))
    ),
)
