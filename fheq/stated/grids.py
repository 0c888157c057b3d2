"""Grids: the quantizers that a model states, as their nodes state them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fheq.affine import ROUNDINGS, Affine, integers_of
from fheq.errors import ModelError, UnsupportedError
from fheq.graph import Node, describe
from fheq.ops.table import Kind, Op, register
from fheq.rewriting.edit import Draft

MAX_BITS = 32


@dataclass(frozen=True)
class Grid:
    """A quantizer as a model states it.

    Args:
        scale, zero_point: in the shape that broadcasts against the tensor.
        affine: the same for `Graph.pinned`; None for a grid that is not to be kept.
        rounding: one of `fheq.affine.MODES`.
        bits: the width of a Quant node; None for other quantizers.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    qmin: Any
    qmax: Any
    affine: Affine | None
    rounding: str = "ROUND"
    bits: int | None = None

    def between(self, low: np.ndarray | None, high: np.ndarray | None) -> Grid | None:
        """The grid of integers that are clipped to [low, high]; None where those vary along another axis than the scale."""
        qmin = np.asarray(self.qmin) if low is None else np.minimum(np.maximum(self.qmin, np.ceil(low)), self.qmax)
        qmax = np.asarray(self.qmax) if high is None else np.maximum(np.minimum(self.qmax, np.floor(high)), qmin)
        for bound in (qmin, qmax):
            if bound.size > 1 and bound.shape[bound.ndim - self.scale.ndim :] != self.scale.shape:
                return None
        return self.with_range(qmin, qmax)

    def with_range(self, qmin: Any, qmax: Any) -> Grid:
        """The grid of integers from qmin to qmax (as the scale is shaped, or one for all)."""
        low, high = (np.asarray(v, np.float64) for v in (qmin, qmax))
        low, high = (v.reshape(-1) if v.size > 1 else v.reshape(()) for v in (low, high))
        affine = self.affine and replace(self.affine, qmin=low, qmax=high, signed=bool(np.any(low < 0)))
        return replace(self, qmin=qmin, qmax=qmax, affine=affine)

    def within(self, dtype: np.dtype) -> bool:
        """Whether an integer type holds all of its integers."""
        extremes = ml_dtypes.iinfo(dtype)
        return bool(np.all(self.qmin >= extremes.min) and np.all(self.qmax <= extremes.max))


def fake_quant_row(node: Node, x: Any, scale: Any, zero_point: Any, qmin: Any, qmax: Any) -> Any:
    """fheq.FakeQuant: the values that the integers of a stated quantizer stand for."""
    steps = integers_of(node.attrs["rounding_mode"], x / scale, zero_point)
    return (scale * (jnp.clip(steps, qmin, qmax) - zero_point)).astype(x.dtype)


DOMAIN = "fheq"
register(Op("FakeQuant", 1, Kind.ELEMENTWISE, fake_quant_row, domain=DOMAIN))

STATED = {f"Quantizer{mode}": mode for mode in ("ROUND", "HALF_EVEN", "FLOOR", "CEIL", "SIGN")}
"""Quantizers that an exported model states by functions of its own, with their rounding modes."""

PARAMETERS = ("scale", "zero_point", "qmin", "qmax")
"""What they take beside the tensor; these broadcast against it."""


def _stated_row(mode: str) -> Callable[..., Any]:
    return lambda node, x, *leaves: fake_quant_row(replace(node, attrs={"rounding_mode": mode}), x, *leaves)


for _op, _mode in STATED.items():
    register(Op(_op, 1, Kind.ELEMENTWISE, _stated_row(_mode), domain=DOMAIN))


def stated_grid(node: Node, known: Mapping[str, np.ndarray], ndim: int) -> Grid:
    """The grid of a quantizer of `STATED`.

    Raises:
        UnsupportedError: computed parameters.
    """
    mode = STATED[node.op]
    scale, zero_point, qmin, qmax = np.broadcast_arrays(*(parameter(node, i, known) for i in range(1, 5)))
    affine = affine_of(node, scale, zero_point, 0, 0, ndim, fractional=mode != "ROUND")
    return Grid(scale, zero_point, 0, 0, affine, mode).with_range(qmin, qmax)


def quant_grid(node: Node, known: Mapping[str, np.ndarray], ndim: int) -> Grid:
    """The grid of a Quant (or IntQuant) node of Brevitas or QONNX.

    Raises:
        UnsupportedError: computed or fractional parameters, a width outside 1..32.
    """
    scale, zero_point = (parameter(node, i, known) for i in (1, 2))
    width = bit_width(node, 3, known)
    qmin, qmax = limits(width, bool(node.attrs.get("signed", 1)), bool(node.attrs.get("narrow", 0)))
    mode = rounding_mode(node, "ROUND")
    if mode == "ROUND" and np.any(zero_point % 2):
        mode = "HALF_EVEN"  # rounds after the zero point is added: ties fall to other integers
    affine = affine_of(node, scale, zero_point, qmin, qmax, ndim)
    return Grid(scale, zero_point, qmin, qmax, affine, mode, width)


def bit_width(node: Node, position: int, known: Mapping[str, np.ndarray]) -> int:
    """A known bit width."""
    bits = parameter(node, position, known)
    if bits.size != 1 or bits.item() != int(bits.item()) or not 1 <= bits.item() <= MAX_BITS:
        raise UnsupportedError(
            f"{describe(node)}: bit width {bits.tolist()}; one whole number from 1 to {MAX_BITS} is supported"
        )
    return int(bits.item())


def limits(width: int, signed: bool, narrow: bool) -> tuple[int, int]:
    """Smallest and largest integer of a width."""
    if signed:
        return -(2 ** (width - 1)) + narrow, 2 ** (width - 1) - 1
    return 0, 2**width - 1 - narrow


def rounding_mode(node: Node, default: str) -> str:
    """A mode of `ROUNDINGS`; HALF_EVEN is ROUND."""
    mode = str(node.attrs.get("rounding_mode", default)).upper()
    if mode not in ROUNDINGS:
        raise UnsupportedError(f"{describe(node)}: rounding mode {mode!r}; use one of {', '.join(sorted(ROUNDINGS))}")
    return "ROUND" if mode == "HALF_EVEN" else mode


def linear_grid(node: Node, known: Mapping[str, np.ndarray], dtype: np.dtype, shape: tuple[int, ...]) -> Grid:
    """The grid of QuantizeLinear or DequantizeLinear with integers of `dtype` for a tensor of `shape`."""
    scale, zero_point = linear_parameters(node, known, shape)
    qmin, qmax = _extremes(dtype)
    return Grid(scale, zero_point, qmin, qmax, affine_of(node, scale, zero_point, qmin, qmax, len(shape)))


def linear_parameters(node: Node, known: Mapping[str, np.ndarray], shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of QuantizeLinear or DequantizeLinear, broadcasting against a tensor of `shape`."""
    scale = parameter(node, 1, known)
    zero_point = parameter(node, 2, known) if len(node.inputs) > 2 else np.zeros(())
    spread = [p if p.size == 1 else _spread(node, p, shape) for p in (scale, zero_point)]
    return spread[0], spread[1]


def known_grid(node: Node, known: Mapping[str, np.ndarray], q: np.ndarray) -> tuple[np.ndarray, Affine]:
    """The integers of a DequantizeLinear of known ones, and their quantizer.

    Scales below 0 (which onnxruntime gives blocks whose largest weight is negative) become positive ones: their integers
    change the sign.
    """
    scale, zero_point = linear_parameters(node, known, q.shape)
    qmin, qmax = _extremes(q.dtype)
    sign = np.where(scale < 0, -1, 1)
    if np.any(sign < 0):
        qmin, qmax = min(qmin, -qmax), max(qmax, -qmin)
    return sign * q.astype(np.int64), affine_of(node, np.abs(scale), sign * zero_point, qmin, qmax, q.ndim)


def _extremes(dtype: np.dtype) -> tuple[int, int]:
    found = ml_dtypes.iinfo(dtype)
    return int(found.min), int(found.max)


def affine_of(
    node: Node, scale: np.ndarray, zero_point: np.ndarray, qmin: int, qmax: int, ndim: int, *, fractional: bool = False
) -> Affine:
    """A quantizer with leaves of shape () or (C,), or with the tensor's axes where they vary along several of them.

    Args:
        fractional: whether the zero point need not be whole.
    """
    if not np.all(np.isfinite(scale)) or np.any(scale <= 0):
        raise ModelError(f"{describe(node)}: its scale must be positive and finite")
    if not fractional and np.any(zero_point != np.round(zero_point)):
        raise UnsupportedError(f"{describe(node)}: its zero point is not whole; quantize with integer zero points")
    whole = [_with_axes(value.astype(np.float64), ndim) for value in (scale, zero_point)]
    axes = {i - ndim for value in whole for i, d in enumerate(value.shape) if d != 1}
    if len(axes) <= 1:
        whole = [value.reshape(-1) if value.size > 1 else value.reshape(()) for value in whole]
    axis = next(iter(axes)) if len(axes) == 1 else None
    low, high = np.asarray(float(qmin)), np.asarray(float(qmax))
    return Affine(whole[0], whole[1], low, high, np.zeros(()), axis=axis, signed=qmin < 0)


def _with_axes(value: np.ndarray, ndim: int) -> np.ndarray:
    """An array with `ndim` axes that broadcasts as the given one does."""
    if value.ndim > ndim:
        return value.reshape(value.shape[value.ndim - ndim :] if value.size > 1 else (1,) * ndim)
    return value.reshape((1,) * (ndim - value.ndim) + value.shape)


def write_fake_quant(draft: Draft, node: Node, source: str, grid: Grid, output: str) -> None:
    """One FakeQuant node in place of a quantizer, its output pinned."""
    affine = grid.affine
    if affine is None or (affine.axis is None and max(np.ndim(affine.scale), np.ndim(affine.zero_point)) > 0):
        raise UnsupportedError(f"{describe(node)}: a scale per block or per element of a computed tensor is not supported")
    dtype = draft.types[source].dtype
    parts = (("scale", grid.scale), ("zero_point", grid.zero_point), ("qmin", grid.qmin), ("qmax", grid.qmax))
    shaped = [(label, np.reshape(value, ()) if np.size(value) == 1 else value) for label, value in parts]
    names = [draft.constant(f"{output}/{label}", value, dtype) for label, value in shaped]
    attrs = MappingProxyType({"rounding_mode": grid.rounding})
    draft.write(Node(node.name, "FakeQuant", (source, *names), (output,), attrs, "fheq", 1))
    draft.pinned[output] = affine


def parameter(node: Node, position: int, known: Mapping[str, np.ndarray]) -> np.ndarray:
    """A known input of a quantizer, in float64."""
    name = node.inputs[position] if position < len(node.inputs) else ""
    if name not in known:
        raise UnsupportedError(
            f"{describe(node)}: its input {position} ({name!r}) is {'computed from data' if name else 'absent'}; fheq takes "
            "quantizers with known scale, zero point and bit width"
        )
    return known[name].astype(np.float64)


def _spread(node: Node, value: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """A scale or zero point per axis or per block, broadcasting against the tensor."""
    axis, block, ndim = node.attrs.get("axis", 1), node.attrs.get("block_size", 0), len(shape)
    if -ndim <= axis < ndim and not block and value.ndim == 1:
        return value.reshape((-1,) + (1,) * (ndim - axis % ndim - 1))
    if -ndim <= axis < ndim and block > 0 and value.ndim == ndim and value.shape[axis] * block >= shape[axis]:
        return np.take(value, np.arange(shape[axis]) // block, axis=axis)
    raise UnsupportedError(
        f"{describe(node)}: parameters of shape {value.shape} on axis {axis} in blocks of {block} do not fit shape {shape}"
    )


def is_integer(dtype: np.dtype) -> bool:
    """Whether a dtype is one of integers, those of 2 and 4 bits included."""
    try:
        return bool(ml_dtypes.iinfo(dtype)) or True
    except ValueError:
        return False
