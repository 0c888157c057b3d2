"""Integer weights of linear steps, and the form that is applied to them.

With clear weights the scales and offsets of the inputs fold into the weights and into a constant (arXiv 1712.05877, eq. 7,
with the zero point of the weight inside the integer weight). Arrays are of JAX or of numpy, as the quantizers' leaves are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fheq.affine import as_float32, straight_through
from fheq.arrays.convolution import convolve
from fheq.arrays.namespace import array_namespace
from fheq.integers.decoders import ON_GRID, Decoder, operand_axis, operand_decoder
from fheq.planning.plan import Plan
from fheq.qparams import QParams
from fheq.steps import Linear

Array = Any

FLOAT32 = 2.0**-22  # relative error of what float32 stores


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
    correction: the part of the offset that takes back what the rounding of weights makes of inputs far from 0 (see
    `_correction`); reading: its input.
    """

    integers: Array
    scale: Array
    offset: Array
    correction: Array
    reading: Reading

    @property
    def ratio(self) -> Array:
        """`(K,)` scale of each input channel relative to the largest."""
        return self.reading.ratio


def quantize_weight(layout: Plan, qparams: QParams, step: Linear, read: Reading | None = None) -> Weights:
    """The integer weight of a linear step.

    Args:
        read: what `reading` gives, where it is known.
    """
    read = read or reading(layout, qparams, step)
    ratio = read.ratio
    weight = read.absorbed(step)
    a = qparams.weights[step.weight_name].expanded(weight.ndim)
    steps = weight / a.scale
    xp = array_namespace(steps, a.zero_point)
    whole = straight_through(jnp.round(steps), steps) if xp is jnp else np.round(steps)
    q = xp.clip(whole + a.zero_point, a.qmin, a.qmax) - a.zero_point
    flat = ratio == 0  # a channel that does not vary contributes its constant alone
    share = xp.where(flat, 0, read.offset / xp.where(flat, 1, ratio))
    constant = _sum_inputs(step, q * a.scale * along_inputs(step, share))
    if xp is jnp or np.any(flat):
        constant = constant + _sum_inputs(step, step.weight * along_inputs(step, xp.where(flat, read.offset, 0)))
    correction = _correction(step, read, q * a.scale, a.scale)
    offset = _constant(step, constant) + correction + step.bias
    return Weights(q, weighed_scale(qparams, step, read), offset, correction, read)


def weighed_scale(qparams: QParams, step: Linear, read: Reading) -> Array:
    """The scale of the accumulator that a linear step makes, broadcasting against its shape."""
    scale = read.unit * qparams.weights[step.weight_name].scale
    return along_outputs(step, scale) if np.ndim(scale) else scale


def _correction(step: Linear, read: Reading, weight: Array, grid: Array) -> Array:
    """What a step's result lacks by the rounding of its weights at the middle of inputs whose range leaves out 0.

    Years, temperatures and pressures are a great number plus a little: the little is what counts, and errors of weights
    would be multiplied with the great number. Not where pads, which are 0, belong to the range.

    Args:
        weight: quantized, the relative scales of its input multiplied in, in steps of `grid`.
    """
    middle = _middle(step, read)
    xp = array_namespace(middle, weight)
    if xp is np and not np.any(middle):
        return np.zeros(())
    exact = read.absorbed(step)
    lacks = exact - weight
    rounded = xp.abs(lacks) > ON_GRID * grid + FLOAT32 * xp.abs(exact)
    share = xp.where(read.ratio == 0, 0, middle / xp.where(read.ratio == 0, 1, read.ratio))
    found = _constant(step, _sum_inputs(step, xp.where(rounded, lacks, 0) * along_inputs(step, share)))
    return found if xp is jnp else as_float32(found)  # as an exported model states it


def _middle(step: Linear, read: Reading) -> Array:
    """`(K,)` the middle of each input channel's range; 0 where the range holds 0, or ends there but for float noise."""
    axis, x = operand_axis(step), read.x
    xp = array_namespace(x.scale)
    others = tuple(i for i in range(x.scale.ndim) if i != axis % x.scale.ndim)
    ends = [x.scale * end + x.offset for end in (x.low, x.high)]
    low, high = xp.minimum(*ends).min(axis=others), xp.maximum(*ends).max(axis=others)
    near = xp.abs(x.scale).max(axis=others) / 2
    return xp.where((low > near) | (high < -near), (low + high) / 2, 0)


def _constant(step: Linear, summed: Array) -> Array:
    """What `_sum_inputs` gives, broadcasting against the step's shape."""
    if np.ndim(summed) > 1:
        return summed[..., None, :] if step.form == "matmul" else summed[..., :, None]
    return along_outputs(step, summed)


def lacking(step: Linear, x: Decoder, integers: np.ndarray) -> np.ndarray:
    """What a product lacks where fillers are no integers of its operand (pads after a shift, rows that are put before those
    of an activation whose range leaves them out): whole units of it.

    Args:
        x: the decoder of its operand, whose fillers are the nearest integers in range.
    """
    hole = step.x.elements.reshape(step.x.shape) < 0
    if not hole.any() or "exclusive" in step.options:
        return np.zeros(())
    exact = (step.x.fill.reshape(step.x.shape) - x.offset) / np.where(x.scale == 0, 1, x.scale)
    rest = np.where(hole, exact - x.low, 0)
    if np.all(np.abs(rest) < ON_GRID):
        return np.zeros(())
    return np.asarray(np.round(apply_form(step, rest, integers.astype(np.float64))))


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
    known = np.all(step.x.elements.reshape(step.x.shape) < 0, axis=others)  # exactly, wherever the grid lies
    value = xp.where(known, step.x.fill.reshape(step.x.shape)[first], scale * low + start)
    return unit, xp.where(still, 0, scale / unit), xp.where(still | (scale == 0), value, start)


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
