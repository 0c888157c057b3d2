"""Decoders: what real values the integers of quantized tensors stand for.

An integer tensor is decoded by `real = scale * q + offset`, elementwise. One implementation serves `fake_quant` (in JAX,
traced) and `fit` and `lower` (in numpy, float64): it uses the namespace that fits the quantizers' leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fheq.affine import LEAVES, Affine
from fheq.arrays.namespace import array_namespace
from fheq.arrays.taking import take
from fheq.planning.plan import Plan
from fheq.qparams import QParams
from fheq.steps import Join, Linear, Maximum, Operand, Step

Array = Any
ON_GRID = 1e-6  # of a step: error of float64 arithmetic, and far below a unit of any product


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
        parts = [operand_decoder(layout, qparams, x, found=found) for x in step.xs]
        scale, offset = (leaf.reshape(*shape, -1)[..., 0] for leaf in parts[0][:2])
        xp = array_namespace(*parts[0])
        end = xp.max if step.sign > 0 else xp.min
        beside = lambda ends: end(xp.concatenate([v.reshape(*shape, -1) for v in ends], axis=-1), axis=-1)
        return Decoder(scale, offset, beside([part.low for part in parts]), beside([part.high for part in parts]))
    assert isinstance(step, Join)
    parts = [operand_decoder(layout, qparams, piece, found=found) for piece in step.pieces]
    fillers = (1.0, step.fill, 0.0, 0.0)
    return Decoder(*(join_pieces(step, list(column), filler) for column, filler in zip(zip(*parts), fillers)))


def join_pieces(step: Join, pieces: list[Array], filler: Array) -> Array:
    """The elements of a join from those of its pieces."""
    xp = array_namespace(*pieces)
    starts = np.concatenate([[0], np.cumsum([len(p.elements) for p in step.pieces])])
    whole, index = xp.concatenate([p.ravel() for p in pieces]), starts[np.maximum(step.which, 0)] + step.element
    flat = take(whole, index) if xp is jnp else whole[index]
    return xp.where(step.which < 0, filler, flat).reshape(step.shape)


def step_of(layout: Plan, name: str) -> Step:
    """The step that makes a tensor."""
    return next(step for step in layout.steps if step.out == name)


def representative(operand: Operand, axis: int | None) -> np.ndarray:
    """For each element, an element of equal scale that is no filler: itself, or one along the other axes than `axis`.

    Without that axis, one along the last axis, which sums and maxima go over, where there is one, or along the one before.
    """
    flat = operand.elements
    own = np.arange(len(flat))
    if np.all(flat >= 0):
        return own
    found = np.where(flat >= 0, own, -1)
    for rows in _lines(operand.shape, axis):
        first = rows[np.arange(len(rows)), np.argmax(found[rows] >= 0, axis=1)]
        found[rows] = np.where(found[rows] < 0, found[first][:, None], found[rows])
    if axis is None:
        return np.where(found < 0, int(np.argmax(flat >= 0)), found)
    return np.where(found < 0, own, found)


def _lines(shape: tuple[int, ...], axis: int | None) -> Iterator[np.ndarray]:
    """The elements of a shape in rows: along all other axes than one, or along each axis, the last one first."""
    whole = np.arange(prod(shape)).reshape(shape)
    if axis is not None:
        yield np.moveaxis(whole, axis, 0).reshape(shape[axis], -1)
        return
    for along in reversed(range(len(shape))):
        yield np.moveaxis(whole, along, -1).reshape(-1, shape[along])


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


def offset_with_fillers(operand: Operand, d: Decoder) -> Array:
    """The offsets of an operand's integers, those of fillers such that these stand for them exactly, beyond the range too.

    Args:
        d: the decoder of the operand.
    """
    hole = (operand.elements < 0).reshape(operand.shape)
    xp = array_namespace(d.scale)
    lacks = xp.where(hole, operand.fill.reshape(operand.shape) - d.offset - d.scale * xp.round(d.low), 0)
    return xp.where(abs(lacks) > ON_GRID * abs(d.scale), d.offset + lacks, d.offset)


def operand_axis(step: Step) -> int | None:
    """The axis of a step's operand along which scales may differ."""
    if isinstance(step, Linear):
        rank = len(step.x.shape)
        return {"matmul": rank - 1, "left": rank - 2, "conv": 1}[step.form]
    return None
