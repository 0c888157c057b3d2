"""Operators whose every output element is a copy of an input element, or a known filler. They take any dtype."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.graph import Node
from fheq.ops.arguments import axis_of, bounded, integers, wrapped_indices
from fheq.ops.table import Kind, Op, register

Array = Any


def _reshape(node: Node, x: Array, shape: np.ndarray) -> Array:
    """ONNX Reshape: 0 copies a size (unless `allowzero`), -1 is what remains."""
    sizes = list(integers(shape))
    if not node.attrs.get("allowzero", 0):
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return jnp.reshape(x, sizes)


def _flatten(node: Node, x: Array) -> Array:
    """ONNX Flatten."""
    axis = node.attrs["axis"]
    axis = axis if axis == x.ndim else axis_of(axis, x.ndim)
    return jnp.reshape(x, (int(np.prod(x.shape[:axis], dtype=np.int64)), int(np.prod(x.shape[axis:], dtype=np.int64))))


def _squeeze(node: Node, x: Array, axes: np.ndarray | None = None) -> Array:
    """ONNX Squeeze; the axes are an attribute before opset 13."""
    axes = node.attrs.get("axes") if axes is None else axes
    return jnp.squeeze(x, axis=None if axes is None else integers(axes))


def _unsqueeze(node: Node, x: Array, axes: np.ndarray | None = None) -> Array:
    """ONNX Unsqueeze; the axes are an attribute before opset 13."""
    return jnp.expand_dims(x, integers(node.attrs["axes"] if axes is None else axes))


def _expand(node: Node, x: Array, shape: np.ndarray) -> Array:
    """ONNX Expand: both shapes broadcast."""
    return jnp.broadcast_to(x, bounded(np.broadcast_shapes(x.shape, bounded(integers(shape)))))


def _tile(node: Node, x: Array, repeats: np.ndarray) -> Array:
    """ONNX Tile."""
    counts = integers(repeats)
    if len(counts) != x.ndim:
        raise ValueError(f"repeats {counts} do not fit a tensor of {x.ndim} axes")
    bounded(size * count for size, count in zip(x.shape, counts))
    return jnp.tile(x, counts)


def _slice(x: Array, starts: Any, ends: Any, axes: Any, steps: Any) -> Array:
    """ONNX Slice, which is numpy's with bounds that clamp."""
    starts, ends = integers(starts), integers(ends)
    axes = range(len(starts)) if axes is None else integers(axes)
    steps = (1,) * len(starts) if steps is None else integers(steps)
    index = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        axis = axis_of(axis, x.ndim)
        if index[axis] != slice(None):
            raise ValueError(f"axis {axis} is sliced twice")
        chosen = range(*slice(start, end, step).indices(x.shape[axis]))
        stop = chosen.stop if chosen.stop >= 0 else None
        index[axis] = slice(chosen.start, stop, step) if chosen else slice(0, 0)
    return x[tuple(index)]


def _split(node: Node, x: Array, split: np.ndarray | None = None) -> tuple[Array, ...]:
    """ONNX Split; without sizes the parts are equal (since opset 18 the last one may be smaller)."""
    axis = axis_of(node.attrs["axis"], x.ndim)
    total = x.shape[axis]
    split = node.attrs.get("split") if split is None else split
    if split is not None:
        sizes = integers(split)
    else:
        parts = len(node.outputs)
        part = -(-total // parts)
        sizes = (part,) * (parts - 1) + (total - part * (parts - 1),)
        if node.version < 18 and total % parts:
            raise ValueError(f"{total} elements do not split into {parts} equal parts")
    if len(sizes) != len(node.outputs) or sum(sizes) != total or min(sizes) < 0:
        raise ValueError(f"sizes {sizes} do not split {total} elements into {len(node.outputs)} outputs")
    return tuple(jnp.split(x, np.cumsum(sizes[:-1]), axis=axis))


def _pad(node: Node, x: Array, pads: Any, value: Any, axes: Any) -> Array:
    """ONNX Pad: constant, reflect, edge or wrap; negative pads crop."""
    axes = range(x.ndim) if axes is None else [axis_of(axis, x.ndim) for axis in integers(axes)]
    pads = integers(pads)
    if len(pads) != 2 * len(axes):
        raise ValueError(f"pads {pads} do not fit {len(axes)} axes")
    widths = [(0, 0)] * x.ndim
    for axis, begin, end in zip(axes, pads, pads[len(axes) :]):
        widths[axis] = (begin, end)
    bounded(max(size + begin + end, 0) for size, (begin, end) in zip(x.shape, widths))
    mode = node.attrs["mode"]
    if mode == "constant":
        filler = jnp.zeros((), x.dtype) if value is None else jnp.reshape(jnp.asarray(value), ()).astype(x.dtype)
        return jax.lax.pad(x, filler, [(begin, end, 0) for begin, end in widths])
    for axis, (begin, end) in enumerate(widths):
        if begin or end:
            positions = _reflected(mode, np.arange(-begin, x.shape[axis] + end), x.shape[axis])
            x = jnp.take(x, positions, axis=axis, mode="clip")
    return x


def _reflected(mode: str, positions: np.ndarray, size: int) -> np.ndarray:
    """Positions outside [0, size) brought inside, as the mode of Pad says."""
    if mode == "edge":
        return np.clip(positions, 0, size - 1)
    if mode == "wrap":
        return positions % size
    if mode == "reflect":
        period = max(2 * (size - 1), 1)
        return (size - 1) - np.abs((positions % period) - (size - 1))
    raise ValueError(f"attribute mode is {mode!r}")


def _gather(node: Node, x: Array, indices: np.ndarray) -> Array:
    """ONNX Gather."""
    axis = axis_of(node.attrs["axis"], x.ndim)
    return jnp.take(x, wrapped_indices(indices, x.shape[axis]), axis=axis, mode="clip")


def _gather_elements(node: Node, x: Array, indices: np.ndarray) -> Array:
    """ONNX GatherElements."""
    axis = axis_of(node.attrs["axis"], x.ndim)
    grid = list(np.indices(indices.shape, sparse=True))
    grid[axis] = wrapped_indices(indices, x.shape[axis])
    return x[tuple(grid)]


def _gather_nd(node: Node, x: Array, indices: np.ndarray) -> Array:
    """ONNX GatherND."""
    batch = node.attrs.get("batch_dims", 0)
    grid = np.indices(indices.shape[:-1], sparse=True)[:batch]
    inner = (wrapped_indices(indices[..., i], x.shape[batch + i]) for i in range(indices.shape[-1]))
    return x[(*grid, *inner)]


def _blocks(node: Node, x: Array, deep: bool) -> Array:
    """ONNX DepthToSpace (`deep`) or SpaceToDepth."""
    n, c, h, w = x.shape
    size = node.attrs["blocksize"]
    mode = node.attrs.get("mode", "DCR")
    if size < 1 or mode not in ("DCR", "CRD"):
        raise ValueError(f"blocksize {size} and mode {mode!r}")
    if deep:
        x = x.reshape(n, size, size, -1, h, w) if mode == "DCR" else x.reshape(n, -1, size, size, h, w)
        x = x.transpose(0, 3, 4, 1, 5, 2) if mode == "DCR" else x.transpose(0, 1, 4, 2, 5, 3)
        return x.reshape(n, -1, h * size, w * size)
    x = x.reshape(n, c, h // size, size, w // size, size)
    x = x.transpose(0, 3, 5, 1, 2, 4) if mode == "DCR" else x.transpose(0, 1, 3, 5, 2, 4)
    return x.reshape(n, c * size * size, h // size, w // size)


def _trilu(node: Node, x: Array, k: np.ndarray | None = None) -> Array:
    """ONNX Trilu."""
    (diagonal,) = (0,) if k is None else integers(k)
    diagonal = max(min(diagonal, x.shape[-1]), -x.shape[-2])
    return jnp.triu(x, diagonal) if node.attrs["upper"] else jnp.tril(x, diagonal)


def _array_feature_extractor(node: Node, x: Array, indices: np.ndarray) -> Array:
    """ai.onnx.ml ArrayFeatureExtractor."""
    chosen = jnp.take(x, wrapped_indices(np.ravel(indices), x.shape[-1]), axis=-1, mode="clip")
    return chosen[None] if x.ndim == 1 else chosen


def _concat(node: Node, *inputs: Array) -> Array:
    """ONNX Concat."""
    return jnp.concatenate(inputs, axis=axis_of(node.attrs["axis"], inputs[0].ndim))


register(
    Op("Concat", 7, Kind.MOVEMENT, _concat),
    Op("DepthToSpace", 7, Kind.MOVEMENT, lambda node, x: _blocks(node, x, deep=True)),
    Op("Expand", 8, Kind.MOVEMENT, _expand, static=(1,)),
    Op("Flatten", 7, Kind.MOVEMENT, _flatten),
    Op("Gather", 7, Kind.MOVEMENT, _gather, static=(1,)),
    Op("GatherElements", 11, Kind.MOVEMENT, _gather_elements, static=(1,)),
    Op("GatherND", 11, Kind.MOVEMENT, _gather_nd, static=(1,)),
    Op("Identity", 7, Kind.MOVEMENT, lambda node, x: x),
    Op("Pad", 7, Kind.MOVEMENT, lambda node, x: _pad(node, x, node.attrs["pads"], node.attrs["value"], None)),
    Op(
        "Pad",
        11,
        Kind.MOVEMENT,
        lambda node, x, pads, value=None, axes=None: _pad(node, x, pads, value, axes),
        static=(1, 3),
    ),
    Op("Reshape", 7, Kind.MOVEMENT, _reshape, static=(1,)),
    Op(
        "Slice",
        7,
        Kind.MOVEMENT,
        lambda node, x: _slice(x, node.attrs["starts"], node.attrs["ends"], node.attrs.get("axes"), None),
    ),
    Op(
        "Slice",
        10,
        Kind.MOVEMENT,
        lambda node, x, starts, ends, axes=None, steps=None: _slice(x, starts, ends, axes, steps),
        static=(-1,),
    ),
    Op("SpaceToDepth", 7, Kind.MOVEMENT, lambda node, x: _blocks(node, x, deep=False)),
    Op("Split", 7, Kind.MOVEMENT, _split, static=(1,)),
    Op("Squeeze", 7, Kind.MOVEMENT, _squeeze, static=(1,)),
    Op("Tile", 7, Kind.MOVEMENT, _tile, static=(1,)),
    Op("Transpose", 7, Kind.MOVEMENT, lambda node, x: jnp.transpose(x, node.attrs.get("perm"))),
    Op("Trilu", 14, Kind.MOVEMENT, _trilu, static=(1,)),
    Op("Unsqueeze", 7, Kind.MOVEMENT, _unsqueeze, static=(1,)),
    Op("ArrayFeatureExtractor", 1, Kind.MOVEMENT, _array_feature_extractor, static=(1,), domain="ai.onnx.ml"),
)
