"""Decoders: what real values the integers of quantized tensors stand for.

An integer tensor is decoded by `real = scale * q + offset`, elementwise. One implementation serves `fake_quant` (in JAX,
traced) and `fit` and `lower` (in numpy, float64): it uses the namespace that fits the quantizers' leaves.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fheq.affine import LEAVES, Affine
from fheq.arrays.namespace import array_namespace
from fheq.planning.plan import Plan
from fheq.qparams import QParams
from fheq.steps import Join, Linear, Maximum, Operand, Step

Array = Any


class Decoder(NamedTuple):
    """`real = scale * q + offset` for integers in [low, high]; arrays of the tensor's shape."""

    scale: Array
    offset: Array
    low: Array
    high: Array


def decoder(affine: Affine, shape: tuple[int, ...]) -> Decoder:
    """The decoder of a quantized tensor."""
    a = affine.expanded(len(shape))
    xp = array_namespace(*(getattr(a, name) for name in LEAVES))
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
    """For each element, an element of equal scale that is no filler: itself, or one along the other axes than `axis`.

    Without that axis, one along the last axis, which sums and maxima go over, where there is one.
    """
    flat = operand.elements
    own = np.arange(len(flat))
    if np.all(flat >= 0):
        return own
    if not operand.shape:
        return np.where(flat >= 0, own, int(np.argmax(flat >= 0)))
    if axis is None:
        rows = own.reshape(-1, operand.shape[-1])
    else:
        rows = np.moveaxis(own.reshape(operand.shape), axis, 0).reshape(operand.shape[axis], -1)
    valid = flat[rows] >= 0
    first = rows[np.arange(len(rows)), np.argmax(valid, axis=1)]
    if axis is None:
        first = np.where(valid.any(axis=1), first, int(np.argmax(flat >= 0)))
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
