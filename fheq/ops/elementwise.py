"""Elementwise operators: each is a plain function of its inputs with numpy broadcasting."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.errors import UnsupportedError
from fheq.graph import Node, describe
from fheq.ops.arguments import checked, dtype_of
from fheq.ops.table import Evaluate, Kind, Op, register

Array = Any

ANY_POSITION = tuple(range(256))
"""Positions of a variadic operator."""


def _plain(function: Callable[..., Array]) -> Evaluate:
    """An operator without attributes."""
    return lambda node, *inputs: function(*inputs)


def _variadic(function: Callable[[Array, Array], Array]) -> Callable[..., Array]:
    return lambda *inputs: functools.reduce(function, inputs)


def _exponential_below_zero(x: Array, alpha: float, width: float = 1.0) -> Array:
    """x above zero, alpha * (exp(x / width) - 1) below: the common form of Elu, Celu and Selu."""
    return jnp.where(x > 0, x, alpha * jnp.expm1(jnp.minimum(x, 0) / width))


def _gelu(node: Node, x: Array) -> Array:
    """ONNX Gelu."""
    if node.attrs["approximate"] == "tanh":
        return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _shrink(node: Node, x: Array) -> Array:
    """ONNX Shrink."""
    bias, lambd = node.attrs["bias"], node.attrs["lambd"]
    return jnp.where(x < -lambd, x + bias, jnp.where(x > lambd, x - bias, 0)).astype(x.dtype)


def _div(a: Array, b: Array) -> Array:
    """ONNX Div: integers truncate toward zero."""
    if jnp.issubdtype(jnp.result_type(a, b), jnp.integer):
        return jax.lax.div(*jnp.broadcast_arrays(a, b))
    return a / b


def _pow(x: Array, y: Array) -> Array:
    """ONNX Pow: the result has the type of the base."""
    return jnp.power(x, y).astype(x.dtype)


def _mod(node: Node, a: Array, b: Array) -> Array:
    """ONNX Mod: the sign of the divisor, or of the dividend when fmod is set."""
    return jnp.fmod(a, b) if node.attrs["fmod"] else jnp.remainder(a, b)


def _bit_shift(node: Node, x: Array, count: Array) -> Array:
    """ONNX BitShift; bits that leave the type are lost, and the sign stays."""
    shifts = {"LEFT": jnp.left_shift, "RIGHT": jnp.right_shift}
    return shifts[node.attrs["direction"]](*jnp.broadcast_arrays(x, count))


def _clip(x: Array, low: Array | None = None, high: Array | None = None) -> Array:
    """ONNX Clip: the upper bound wins when the bounds cross."""
    x = x if low is None else jnp.maximum(x, low)
    return x if high is None else jnp.minimum(x, high)


def _isinf(node: Node, x: Array) -> Array:
    """ONNX IsInf."""
    positive, negative = bool(node.attrs["detect_positive"]), bool(node.attrs["detect_negative"])
    return (jnp.isposinf(x) & positive) | (jnp.isneginf(x) & negative)


def _converted(x: Array, dtype: np.dtype) -> Array:
    """`x` as another type; integers wrap around."""
    narrow = jnp.issubdtype(dtype, jnp.integer) and jnp.iinfo(dtype).bits < 8
    dtype = jax.dtypes.canonicalize_dtype(dtype)  # 64 bits where they are enabled
    return x.astype(np.int8).astype(dtype) if narrow else x.astype(dtype)


def _dropout(node: Node, x: Array, ratio: np.ndarray | None = None, training: np.ndarray | None = None) -> Array:
    """ONNX Dropout in inference: the identity, with a mask of True."""
    if training is not None and np.any(training) and (ratio is None or np.any(ratio)):
        raise UnsupportedError(f"{describe(node)}: Dropout in training mode is random; export the model in evaluation mode")
    mask = jnp.ones(jnp.shape(x), bool if node.version >= 10 else x.dtype)
    return (x, mask) if len(node.outputs) > 1 else x


# Operators without attributes: name, first opset, function.
_PLAIN: tuple[tuple[str, int, Callable[..., Array]], ...] = (
    ("Abs", 7, jnp.abs),
    ("Acos", 7, jnp.arccos),
    ("Acosh", 9, jnp.arccosh),
    ("And", 7, jnp.logical_and),
    ("Asin", 7, jnp.arcsin),
    ("Asinh", 9, jnp.arcsinh),
    ("Atan", 7, jnp.arctan),
    ("Atanh", 9, jnp.arctanh),
    ("BitwiseAnd", 18, jnp.bitwise_and),
    ("BitwiseNot", 18, jnp.bitwise_not),
    ("BitwiseOr", 18, jnp.bitwise_or),
    ("BitwiseXor", 18, jnp.bitwise_xor),
    ("Ceil", 7, jnp.ceil),
    ("Clip", 11, _clip),
    ("Cos", 7, jnp.cos),
    ("Cosh", 9, jnp.cosh),
    ("Equal", 7, jnp.equal),
    ("Erf", 9, jax.lax.erf),
    ("Exp", 7, jnp.exp),
    ("Floor", 7, jnp.floor),
    ("Greater", 7, jnp.greater),
    ("GreaterOrEqual", 12, jnp.greater_equal),
    ("HardSwish", 14, lambda x: x * jnp.clip(x / 6 + 0.5, 0, 1)),
    ("IsNaN", 9, jnp.isnan),
    ("Less", 7, jnp.less),
    ("LessOrEqual", 12, jnp.less_equal),
    ("Log", 7, jnp.log),
    ("Max", 7, _variadic(jnp.maximum)),
    ("Min", 7, _variadic(jnp.minimum)),
    ("Mish", 18, lambda x: x * jnp.tanh(jax.nn.softplus(x))),
    ("Not", 7, jnp.logical_not),
    ("Or", 7, jnp.logical_or),
    ("PRelu", 7, lambda x, slope: jnp.where(x < 0, slope * x, x)),
    ("Pow", 7, _pow),
    ("Reciprocal", 7, lambda x: 1 / x),
    ("Relu", 7, lambda x: jnp.maximum(x, 0)),
    ("Round", 11, jnp.round),
    ("Sigmoid", 7, jax.nn.sigmoid),
    ("Sign", 9, jnp.sign),
    ("Sin", 7, jnp.sin),
    ("Sinh", 9, jnp.sinh),
    ("Softplus", 7, jax.nn.softplus),
    ("Softsign", 7, lambda x: x / (1 + jnp.abs(x))),
    ("Sqrt", 7, jnp.sqrt),
    ("Tan", 7, jnp.tan),
    ("Tanh", 7, jnp.tanh),
    ("Where", 9, jnp.where),
    ("Xor", 7, jnp.logical_xor),
)

# Operators that are affine in some inputs once the others are known: name, affine positions, function.
_AFFINE: tuple[tuple[str, tuple[int, ...], Callable[..., Array]], ...] = (
    ("Add", (0, 1), jnp.add),
    ("Div", (0,), _div),
    ("Mean", ANY_POSITION, lambda *inputs: functools.reduce(jnp.add, inputs) / len(inputs)),
    ("Mul", (0, 1), jnp.multiply),
    ("Neg", (0,), jnp.negative),
    ("Sub", (0, 1), jnp.subtract),
    ("Sum", ANY_POSITION, _variadic(jnp.add)),
)

# Operators with attributes: name, first opset, function of the node and its inputs.
_WITH_ATTRIBUTES: tuple[tuple[str, int, Evaluate], ...] = (
    ("BitShift", 11, _bit_shift),
    ("Cast", 7, lambda node, x: _converted(x, dtype_of(node, node.attrs["to"]))),
    ("CastLike", 15, lambda node, x, like: _converted(x, checked(node, like.dtype))),
    ("Celu", 12, lambda node, x: _exponential_below_zero(x, node.attrs["alpha"], node.attrs["alpha"])),
    ("Clip", 7, lambda node, x: _clip(x, node.attrs["min"], node.attrs["max"])),
    ("Elu", 7, lambda node, x: _exponential_below_zero(x, node.attrs["alpha"])),
    ("Gelu", 20, _gelu),
    ("HardSigmoid", 7, lambda node, x: jnp.clip(node.attrs["alpha"] * x + node.attrs["beta"], 0, 1)),
    ("IsInf", 10, _isinf),
    ("LeakyRelu", 7, lambda node, x: jnp.where(x < 0, node.attrs["alpha"] * x, x)),
    ("Mod", 10, _mod),
    ("Selu", 7, lambda node, x: node.attrs["gamma"] * _exponential_below_zero(x, node.attrs["alpha"])),
    ("Shrink", 9, _shrink),
    ("Swish", 24, lambda node, x: x * jax.nn.sigmoid(node.attrs["alpha"] * x)),
    ("ThresholdedRelu", 10, lambda node, x: jnp.where(x > node.attrs["alpha"], x, 0)),
)

register(
    *(Op(name, since, Kind.ELEMENTWISE, _plain(function)) for name, since, function in _PLAIN),
    *(Op(name, 7, Kind.ELEMENTWISE, _plain(function), affine=positions) for name, positions, function in _AFFINE),
    *(Op(name, since, Kind.ELEMENTWISE, function) for name, since, function in _WITH_ATTRIBUTES),
    Op("Dropout", 7, Kind.ELEMENTWISE, _dropout, static=(1, 2), affine=(0,)),
    Op(
        "Binarizer",
        1,
        Kind.ELEMENTWISE,
        lambda node, x: (x > node.attrs["threshold"]).astype(x.dtype),
        domain="ai.onnx.ml",
    ),
)
