"""The arithmetic of quantized steps: what integers a step computes and what real values they stand for.

One implementation serves `fake_quant` (in JAX, traced) and `fit` and `lower` (in numpy, float64): it uses the namespace that
fits the quantizers' leaves.

An integer tensor is decoded by `real = scale * q + offset`, elementwise. With clear weights the scales and offsets of the
inputs fold into the weights and into a constant (arXiv 1712.05877, eq. 7, with the zero point of the weight inside the
integer weight).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fheq.affine import LEAVES, Affine, straight_through
from fheq.convolution import convolve
from fheq.plan import Plan
from fheq.qparams import QParams
from fheq.steps import Add, Join, Linear, Maximum, Operand, Product, Step, Sum

Array = Any
SUM_ERROR = 1 / 16
SUM_MULTIPLIER = 128


def namespace(*affines: Affine) -> Any:
    """jax.numpy when any leaf of the quantizers is a JAX array, else numpy."""
    leaves = (getattr(a, name) for a in affines for name in LEAVES)
    return jnp if any(isinstance(leaf, jax.Array) for leaf in leaves) else np


def array_namespace(*arrays: Array) -> Any:
    """jax.numpy when any array is a JAX array, else numpy."""
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


class Decoder(NamedTuple):
    """`real = scale * q + offset` for integers in [low, high]; arrays of the tensor's shape."""

    scale: Array
    offset: Array
    low: Array
    high: Array


def decoder(affine: Affine, shape: tuple[int, ...]) -> Decoder:
    """The decoder of a quantized tensor."""
    a = affine.expanded(len(shape))
    xp = namespace(a)
    dtype = jnp.result_type(float) if xp is jnp else np.float64
    leaves = (a.scale, -a.scale * a.zero_point, a.qmin, a.qmax)
    return Decoder(*(xp.broadcast_to(xp.asarray(leaf, dtype), shape) for leaf in leaves))


def key_decoder(layout: Plan, qparams: QParams, key: str, found: dict[str, Decoder] | None = None) -> Decoder:
    """The decoder of a quantized tensor: a point, an input, a join or a maximum.

    Args:
        found: decoders by key, which grows: joins of maxima of joins reach the same tensor in many ways.
    """
    found = {} if found is None else found
    if key not in found:
        found[key] = _found_decoder(layout, qparams, key, found)
    return found[key]


def _found_decoder(layout: Plan, qparams: QParams, key: str, found: dict[str, Decoder]) -> Decoder:
    shape = layout.shape(key)
    if key in qparams.tensors:
        return decoder(qparams.tensors[key], shape)
    step = step_of(layout, key)
    if isinstance(step, Maximum):
        first = operand_decoder(layout, qparams, step.xs[0], found=found)
        return Decoder(*(leaf.reshape(*shape, -1)[..., 0] for leaf in first))
    assert isinstance(step, Join)
    parts = [operand_decoder(layout, qparams, piece, found=found) for piece in step.pieces]
    fillers = (1.0, step.fill, 0.0, 0.0)
    return Decoder(*(join_pieces(step, list(column), filler) for column, filler in zip(zip(*parts), fillers)))


def join_pieces(step: Join, pieces: list[Array], filler: Array) -> Array:
    """The elements of a join from those of its pieces."""
    xp = array_namespace(*pieces)
    starts = np.concatenate([[0], np.cumsum([len(p.elements) for p in step.pieces])])
    flat = xp.concatenate([p.ravel() for p in pieces])[starts[np.maximum(step.which, 0)] + step.element]
    return xp.where(step.which < 0, filler, flat).reshape(step.shape)


def step_of(layout: Plan, name: str) -> Step:
    """The step that makes a tensor."""
    return next(step for step in layout.steps if step.out == name)


def representative(operand: Operand, axis: int | None) -> np.ndarray:
    """For each element, an element of equal scale that is no filler (itself, or one along the other axes than `axis`)."""
    flat = operand.elements
    own = np.arange(len(flat))
    if np.all(flat >= 0):
        return own
    if axis is None or not operand.shape:
        return np.where(flat >= 0, own, int(np.argmax(flat >= 0)))
    rows = np.moveaxis(own.reshape(operand.shape), axis, 0).reshape(operand.shape[axis], -1)
    valid = flat[rows] >= 0
    first = rows[np.arange(len(rows)), np.argmax(valid, axis=1)]
    spread = np.zeros(len(flat), np.int64)
    spread[rows] = first[:, None]
    return np.where(flat >= 0, own, spread)


def operand_decoder(
    layout: Plan, qparams: QParams, operand: Operand, axis: int | None = None, found: dict[str, Decoder] | None = None
) -> Decoder:
    """The decoder of an operand; a filler has the decoder of its neighbours and its own integer as low and high.

    Args:
        axis: the axis along which decoders may differ, where there are fillers.
        found: as for `key_decoder`.
    """
    whole = key_decoder(layout, qparams, operand.key, found)
    if operand.slope is None and operand.in_order and len(operand.elements) == whole.scale.size:
        return Decoder(*(leaf.reshape(operand.shape) for leaf in whole))
    like = representative(operand, axis)
    at = np.maximum(operand.elements[like], 0)
    scale, offset, low, high = (leaf.ravel()[at] for leaf in whole)
    if operand.slope is not None:
        slope, intercept = (np.asarray(v)[like] for v in (operand.slope, operand.intercept))
        scale, offset = scale * slope, offset * slope + intercept
    hole = operand.elements < 0
    xp = array_namespace(scale)
    if np.any(hole):
        filler = xp.clip(xp.round((operand.fill - offset) / xp.where(scale == 0, 1, scale)), low, high)
        low, high = xp.where(hole, filler, low), xp.where(hole, filler, high)
    return Decoder(*(leaf.reshape(operand.shape) for leaf in (scale, offset, low, high)))


def operand_axis(step: Step) -> int | None:
    """The axis of a step's operand along which scales may differ."""
    if isinstance(step, Linear):
        rank = len(step.x.shape)
        return {"matmul": rank - 1, "left": rank - 2, "conv": 1}[step.form]
    return None


def apply_form(step: Linear, x: Array, weight: Array) -> Array:
    """The linear form itself, without bias, reshaped to the step's shape."""
    xp = array_namespace(x, weight)
    if step.form == "matmul":
        return xp.matmul(x, weight).reshape(step.shape)
    if step.form == "left":
        return xp.matmul(weight, x).reshape(step.shape)
    options = step.options
    return convolve(x, weight, options["strides"], options["dilations"], options["group"]).reshape(step.shape)


class Reading(NamedTuple):
    """What a linear step reads.

    x: the decoder of its operand; unit: the largest scale of its channels; ratio, offset: `(K,)` scale of each channel
    relative to the largest (signed), and its offset. A channel of known values has ratio 0, and its value as the offset.
    """

    x: Decoder
    unit: Array
    ratio: Array
    offset: Array

    def absorbed(self, step: Linear) -> Array:
        """The weight with the relative scales of its input multiplied in."""
        return step.weight * along_inputs(step, self.ratio)


def reading(layout: Plan, qparams: QParams, step: Linear) -> Reading:
    """What a linear step reads, from the quantizers of tensors."""
    x = operand_decoder(layout, qparams, step.x, operand_axis(step))
    return Reading(x, *input_channels(step, x))


class Weights(NamedTuple):
    """A quantized weight and what it makes of its input.

    integers: as the form uses them; scale, offset: decoder of the accumulator, broadcasting against the step's shape;
    reading: its input.
    """

    integers: Array
    scale: Array
    offset: Array
    reading: Reading

    @property
    def ratio(self) -> Array:
        """`(K,)` scale of each input channel relative to the largest."""
        return self.reading.ratio


def along_inputs(step: Linear, v: Array) -> Array:
    """A vector over input channels, broadcasting against the weight."""
    if step.form == "matmul":
        return v[:, None]
    if step.form == "left":
        return v
    group = step.options["group"]
    rows = array_namespace(v).repeat(v.reshape(group, -1), step.weight.shape[0] // group, axis=0)
    return rows.reshape(*rows.shape, *(1,) * (step.weight.ndim - 2))


def along_outputs(step: Linear, v: Array) -> Array:
    """A vector over output channels (or a scalar), broadcasting against the step's shape."""
    if np.ndim(v) == 0 or v.shape[0] == 1:
        return v.reshape(())
    return v.reshape(-1, *(1,) * (-step.channel - 1))


def _sum_inputs(step: Linear, weight: Array) -> Array:
    """Sum of a weight over everything but its output channels."""
    axis = step.weight_axis % weight.ndim
    if step.form in ("matmul", "left") and weight.ndim > 2:
        return weight.sum(axis=-2 if step.form == "matmul" else -1)  # stacked matrices: (..., channels)
    return weight.sum(axis=tuple(a for a in range(weight.ndim) if a != axis))


def input_channels(step: Linear, x: Decoder) -> tuple[Array, Array, Array]:
    """The input's channels: the largest scale, each one's scale relative to it (signed), and its offset.

    A channel of known values has ratio 0, and its value as the offset.
    """
    axis = operand_axis(step)
    xp = array_namespace(x.scale)
    others = tuple(i for i in range(x.scale.ndim) if i != axis)
    still = (x.high - x.low).max(axis=others) == 0
    first = tuple(slice(None) if i == axis else 0 for i in range(x.scale.ndim))
    scale, start, low = (leaf[first] for leaf in (x.scale, x.offset, x.low))
    unit = xp.where(still, 0, abs(scale)).max()
    unit = xp.where(unit == 0, 1, unit)
    return unit, xp.where(still, 0, scale / unit), xp.where(still | (scale == 0), scale * low + start, start)


def quantize_weight(layout: Plan, qparams: QParams, step: Linear, read: Reading | None = None) -> Weights:
    """The integer weight of a linear step.

    Args:
        read: what `reading` gives, where it is known.
    """
    read = read or reading(layout, qparams, step)
    _, unit, ratio, offset = read
    weight = read.absorbed(step)
    a = qparams.weights[step.weight_name].expanded(weight.ndim)
    steps = weight / a.scale
    xp = array_namespace(steps, a.zero_point)
    whole = straight_through(jnp.round(steps), steps) if xp is jnp else np.round(steps)
    q = xp.clip(whole + a.zero_point, a.qmin, a.qmax) - a.zero_point
    flat = ratio == 0  # a channel that does not vary contributes its constant alone
    share = xp.where(flat, 0, offset / xp.where(flat, 1, ratio))
    constant = _sum_inputs(step, q * a.scale * along_inputs(step, share))
    if xp is jnp or np.any(flat):
        constant = constant + _sum_inputs(step, step.weight * along_inputs(step, xp.where(flat, offset, 0)))
    if np.ndim(constant) > 1:
        constant = constant[..., None, :] if step.form == "matmul" else constant[..., :, None]
    else:
        constant = along_outputs(step, constant)
    scale = along_outputs(step, unit * a.scale.ravel()) if np.ndim(a.scale) else unit * a.scale
    return Weights(q, scale, constant + step.bias, read)


def add_multipliers(a: Decoder, b: Decoder) -> tuple[Array, Array, Array]:
    """Integers m, n and a scale s with `m * s = a.scale` and `n * s = b.scale`, for the sum `s * (m * p + n * q)`.

    Equal scales give 1, 1. Unequal ones come from models that state their quantizers: the convergents of the continued
    fraction of their ratio are tried, until one is wrong by less than `SUM_ERROR` of the larger step at the ends of the
    range or the next one has multipliers above `SUM_MULTIPLIER`.
    """
    xp = array_namespace(a.scale, b.scale)
    swapped = a.scale > b.scale
    small, large = xp.minimum(a.scale, b.scale), xp.maximum(a.scale, b.scale)
    reach = xp.where(swapped, a.high - a.low, b.high - b.low) / 2
    ratio = large / small
    before, found = (xp.ones_like(ratio), xp.zeros_like(ratio)), (xp.round(ratio), xp.ones_like(ratio))
    rest = ratio - found[0]
    for _ in range(4):
        rest = 1 / xp.where(abs(rest) < 1e-9, 1e-9, rest)
        term = xp.round(rest)
        after = tuple(term * f + b for f, b in zip(found, before))
        error = abs(found[0] / found[1] / ratio - 1) * reach
        better = (error > SUM_ERROR) & (xp.maximum(abs(after[0]), abs(after[1])) <= SUM_MULTIPLIER)
        before, found = found, tuple(xp.where(better, n, f) for n, f in zip(after, found))
        rest = xp.where(better, rest - term, 0)
    more, fewer = abs(found[0]), abs(found[1])
    return xp.where(swapped, more, fewer), xp.where(swapped, fewer, more), small / fewer


def accumulator_decoder(layout: Plan, qparams: QParams, step: Step, weights: Weights | None = None) -> tuple[Array, Array]:
    """(scale, offset) of the integers that a step makes, broadcasting against its shape.

    Args:
        weights: what `quantize_weight` gives for a linear step, where it is known.
    """
    if isinstance(step, Linear):
        weights = weights or quantize_weight(layout, qparams, step)
        return weights.scale, weights.offset
    if isinstance(step, Sum):
        x = operand_decoder(layout, qparams, step.x)
        valid = (step.x.elements >= 0).reshape(step.x.shape)
        fill = np.sum(step.x.fill.reshape(step.x.shape), axis=-1)
        at = np.argmax(valid, axis=-1)[..., None]
        xp = array_namespace(x.scale)
        scale = step.coefficient * xp.take_along_axis(x.scale, at, -1)[..., 0]
        return scale, step.coefficient * (xp.sum(xp.where(valid, x.offset, 0), axis=-1) + fill)
    if isinstance(step, Add):
        a, b = (operand_decoder(layout, qparams, o) for o in step.operands)
        m, n, scale = add_multipliers(a, b)
        # What the multipliers miss of a scale is least where it counts for nothing in the middle of the range.
        left, right = (x.offset + (x.scale - k * scale) * (x.low + x.high) / 2 for x, k in ((a, m), (b, n)))
        return scale, left + step.sign * right
    assert isinstance(step, Product)
    a, b = (operand_decoder(layout, qparams, o) for o in step.operands)
    scale = a.scale * b.scale
    return (scale[..., 0], np.zeros(step.shape)) if step.contract else (scale, np.zeros(step.shape))
