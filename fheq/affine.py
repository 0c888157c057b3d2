"""The affine quantizer: the one convention of this project.

    real = scale * (q - zero_point),   qmin <= q <= qmax (both included)

Values round half to even, as ONNX QuantizeLinear does, unless a model states another of `MODES`. Accumulators, which are
integers already, lose their low bits with `round_accumulator`, as concrete's `round_bit_pattern` does (half up).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.arrays.namespace import array_namespace
from fheq.errors import QuantizationError

Array = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Affine:
    """An affine quantizer.

    Invariants (checked by `validate`): scale > 0; qmin <= qmax; scale, zero_point, qmin, qmax and lsbs are arrays of shape
    `()` (per tensor) or `(C,)` (per channel along `axis`). They are pytree leaves, so changing them recompiles nothing.

    Args:
        scale: real width of one step.
        zero_point: the integer that stands for 0 (for a decoder of program outputs it may be fractional).
        qmin, qmax: smallest and largest integer, inclusive.
        lsbs: low bits removed from an accumulator before its table; 0 elsewhere.
        axis: channel axis of the quantized tensor, counted from the end (-1 is the last, so that it means the same with
            and without a leading batch axis); None when per tensor.
        signed: whether the integers are meant as signed.
        rounding: how an accumulator loses its `lsbs`, "exact" or "approximate"; "exact" elsewhere.
        mode: how the steps `real / scale` become integers, one of `MODES`.
        origin: what is added to an integer to have the one that the model states: modes may look at its sign or parity.
    """

    scale: Array
    zero_point: Array
    qmin: Array
    qmax: Array
    lsbs: Array = 0
    axis: int | None = field(default=None, metadata={"static": True})
    signed: bool = field(default=False, metadata={"static": True})
    rounding: str = field(default="exact", metadata={"static": True})
    mode: str = field(default="ROUND", metadata={"static": True})
    origin: int = field(default=0, metadata={"static": True})

    def quantize(self, x: Array) -> Array:
        """See `quantize`."""
        return quantize(self, x)

    def dequantize(self, q: Array) -> Array:
        """See `dequantize`."""
        return dequantize(self, q)

    def _expand(self, leaf: Array, ndim: int) -> Array:
        """A leaf in a shape that broadcasts against a tensor of `ndim` axes."""
        if np.ndim(leaf) != 1 or self.axis is None:
            return leaf
        axis = self.axis % ndim
        xp = array_namespace(leaf)
        return xp.reshape(leaf, (1,) * axis + (-1,) + (1,) * (ndim - axis - 1))

    def expanded(self, ndim: int) -> Affine:
        """The same quantizer with leaves that broadcast against a tensor of `ndim` axes."""
        if self.axis is None or all(np.ndim(getattr(self, name)) != 1 for name in LEAVES):
            return self
        leaves = {name: self._expand(getattr(self, name), ndim) for name in LEAVES}
        return replace(self, **leaves)


def varying(leaves: Mapping[str, Array]) -> Affine:
    """A quantizer from leaves in its tensor's shape, which become `()`, or `(C,)` along an axis, where nothing is lost."""
    whole: dict[str, Any] = {name: np.asarray(leaf, np.float64) for name, leaf in leaves.items()}
    ndim = np.ndim(whole["scale"])
    signed = bool(np.any(whole["qmin"] < 0))
    for axis in (None, *range(ndim)):
        first = tuple(slice(None) if a == axis else slice(0, 1) for a in range(ndim))
        if all(np.all(leaf == leaf[first]) for leaf in whole.values()):
            parts = {name: leaf[first].reshape(() if axis is None else -1) for name, leaf in whole.items()}
            return Affine(**parts, axis=None if axis is None else axis - ndim, signed=signed)
    return Affine(**whole, signed=signed)


ACCUMULATOR_ROUNDINGS = ("exact", "approximate")
MAX_LSBS = 62  # of what int64 holds
LEAVES = ("scale", "zero_point", "qmin", "qmax", "lsbs")


def as_float32(scale: Array) -> Array:
    """The nearest scales that float32 has, as ONNX states them, in float64: a model that is exported says them exactly."""
    return np.asarray(scale, np.float32).astype(np.float64)


# The rounding modes of QONNX and Brevitas.
ROUNDINGS: dict[str, Callable[[Array], Array]] = {
    "ROUND": lambda x: array_namespace(x).round(x),
    "HALF_EVEN": lambda x: array_namespace(x).round(x),
    "CEIL": lambda x: array_namespace(x).ceil(x),
    "FLOOR": lambda x: array_namespace(x).floor(x),
    "ROUND_TO_ZERO": lambda x: array_namespace(x).trunc(x),
    "DOWN": lambda x: array_namespace(x).trunc(x),
    "UP": lambda x: array_namespace(x).sign(x) * array_namespace(x).ceil(abs(x)),
    "HALF_UP": lambda x: array_namespace(x).sign(x) * array_namespace(x).floor(abs(x) + 0.5),
    "HALF_DOWN": lambda x: array_namespace(x).sign(x) * array_namespace(x).ceil(abs(x) - 0.5),
}
# SIGN is BipolarQuant: -1 or 1. ROUND rounds before the zero point is added, all others after.
MODES: dict[str, Callable[[Array], Array]] = {**ROUNDINGS, "SIGN": lambda x: array_namespace(x).where(x >= 0, 1.0, -1.0)}
DIRECTED = ("CEIL", "FLOOR", "ROUND_TO_ZERO", "DOWN", "UP")
SNAP = 2.0**-22  # relative error of float32 scales and quotients


def integers_of(mode: str, steps: Array, zero_point: Array) -> Array:
    """The integers, not clipped, of values in units of the scale.

    A directed mode would turn the error of a float32 scale into a whole step: values that are on the grid stay.
    """
    if mode == "ROUND":
        return MODES[mode](steps) + zero_point
    if mode in DIRECTED:
        nearest = MODES["ROUND"](steps)
        steps = array_namespace(steps).where(abs(steps - nearest) <= SNAP * abs(nearest), nearest, steps)
    return MODES[mode](steps + zero_point)


def quantize(affine: Affine, x: Array) -> Array:
    """Real values to integers, saturated to [qmin, qmax], ties to even or as `affine.mode` says.

    JAX arrays keep their dtype; anything else is computed in float64 on the host and returned as int64.
    """
    a = affine.expanded(np.ndim(x))
    if isinstance(x, jax.Array):
        return jnp.clip(_whole(a, x / a.scale), a.qmin, a.qmax)
    return np.clip(_whole(a, np.asarray(x, np.float64) / a.scale), a.qmin, a.qmax).astype(np.int64)


def _whole(a: Affine, steps: Array) -> Array:
    return integers_of(a.mode, steps, a.zero_point + a.origin) - a.origin


def dequantize(affine: Affine, q: Array) -> Array:
    """Integers to real values (float64 on the host unless `q` is a JAX array)."""
    a = affine.expanded(np.ndim(q))
    if isinstance(q, jax.Array):
        return a.scale * (q - a.zero_point)
    return np.asarray(a.scale * (np.asarray(q, np.float64) - a.zero_point))


@jax.custom_jvp
def straight_through(exact: Array, surrogate: Array) -> Array:
    """The value of `exact` with the gradient of `surrogate`, of its shape and type (arXiv 1308.3432).

    Without gradients nothing computes the surrogate.
    """
    return exact


@straight_through.defjvp
def _straight_through(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple[Array, Array]:
    return primals[0], tangents[1]


def affine_bits(affine: Affine) -> int:
    """Bits of the integers of a concrete quantizer, all channels counted from their qmin."""
    return bit_length(np.max(np.asarray(affine.qmax, np.float64) - np.asarray(affine.qmin, np.float64)))


def bit_length(span: float) -> int:
    """Bits of an unsigned integer up to `span`."""
    return max(1, int(span).bit_length())


def fake_quant(affine: Affine, x: Array) -> Array:
    """`dequantize(quantize(x))`, differentiable in x straight through and in scale as LSQ (arXiv 1902.08153)."""
    a = affine.expanded(jnp.ndim(x))
    low, high = a.qmin - a.zero_point, a.qmax - a.zero_point
    steps = x / a.scale
    inside = (steps >= low) & (steps <= high)
    whole = _whole(a, jnp.clip(steps, low, high)) - a.zero_point  # the bounds are integers: clip, then round
    # One use of the scale: every reduction of gradients takes long to compile. Of x where it is finite.
    beside_x = jnp.where(inside, jax.lax.stop_gradient(whole - steps), jnp.where(steps < low, low, high))
    return straight_through(a.scale * whole, jnp.where(inside, x, 0) + a.scale * beside_x)


def round_accumulator(acc: Array, lsbs: Array) -> Array:
    """Removes `lsbs` low bits, half up, keeping the magnitude: concrete's `round_bit_pattern` on integers in any dtype."""
    if jnp.issubdtype(acc.dtype, jnp.floating):
        size = cell(lsbs, acc.dtype)
        return jnp.floor(acc / size + 0.5 * (size > 1)) * size
    whole = jnp.ones((), acc.dtype) << lsbs
    return (acc + (whole >> 1)) >> lsbs << lsbs


def cell(lsbs: Array, dtype: Any) -> Array:
    """2^lsbs in floating point, exact, which XLA's exp2 is not."""
    return jnp.ldexp(jnp.ones((), dtype), jnp.asarray(lsbs).astype(jnp.int32))


def validate(affine: Affine, name: str, integral: bool = False, shape: tuple[int, ...] | None = None) -> None:
    """Checks the invariants of a concrete (not traced) quantizer.

    Args:
        shape: of the quantized tensor, where it is known.
        integral: whether it makes integers: limits, and a zero point that is added after rounding, are whole numbers, and no
            bits are removed.

    Raises:
        QuantizationError: naming the tensor and the broken invariant.
    """
    leaves = {leaf: np.asarray(getattr(affine, leaf), np.float64) for leaf in LEAVES}
    for leaf, value in leaves.items():
        if not np.all(np.isfinite(value)):
            raise QuantizationError(f"quantizer of {name!r}: {leaf} is not finite")
        if value.ndim > 1 or (value.ndim == 1 and affine.axis is None):
            raise QuantizationError(f"quantizer of {name!r}: {leaf} has shape {value.shape}; use () or (C,) with an axis")
    lengths = {leaf: len(value) for leaf, value in leaves.items() if value.ndim}
    if len(set(lengths.values())) > 1:
        raise QuantizationError(f"quantizer of {name!r}: leaves have different lengths {lengths}")
    if lengths and shape is not None and affine.axis is not None:
        count = shape[affine.axis] if -len(shape) <= affine.axis < len(shape) else None
        if count not in lengths.values() and max(lengths.values()) > 1:  # one for all channels broadcasts
            got = f"leaves have {max(lengths.values())} channels along axis {affine.axis}"
            raise QuantizationError(f"quantizer of {name!r}: {got}, where the tensor has shape {shape}")
    for field_name, known in (("rounding", ACCUMULATOR_ROUNDINGS), ("mode", tuple(MODES))):
        if getattr(affine, field_name) not in known:
            given = getattr(affine, field_name)
            raise QuantizationError(f"quantizer of {name!r}: {field_name} is {given!r}; it must be one of {known}")
    if np.any(leaves["lsbs"] != np.clip(np.round(leaves["lsbs"]), 0, MAX_LSBS)):
        raise QuantizationError(f"quantizer of {name!r}: lsbs must be whole numbers from 0 to {MAX_LSBS}")
    if np.any(leaves["scale"] <= 0):
        raise QuantizationError(f"quantizer of {name!r}: scale must be positive")
    added = ("zero_point",) if affine.mode == "ROUND" else ()  # after rounding, and before it in the other modes
    for leaf in (*added, "qmin", "qmax") if integral else ():
        if np.any(leaves[leaf] != np.round(leaves[leaf])):
            raise QuantizationError(f"quantizer of {name!r}: {leaf} must be whole numbers")
    if integral and np.any(leaves["lsbs"]):
        raise QuantizationError(f"quantizer of {name!r}: lsbs must be 0; low bits are removed from accumulators alone")
    if np.any(leaves["qmin"] > leaves["qmax"]):
        raise QuantizationError(f"quantizer of {name!r}: qmin is above qmax")
