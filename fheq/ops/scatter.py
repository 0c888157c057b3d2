"""Scattering, selection and reversal by known indices."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from fheq.graph import Node
from fheq.ops.arguments import axis_of, bounded, integers, wrapped_indices
from fheq.ops.table import Kind, Op, register
from fheq.ops.windows import per_axis

Array = Any


def scatter_places(node: Node, shape: tuple[int, ...], indices: np.ndarray) -> np.ndarray:
    """For each update of a ScatterElements or ScatterND node, flat: the flat element of the data that it is for."""
    numbers = np.arange(int(np.prod(shape))).reshape(shape)
    if node.op == "ScatterND":
        columns = tuple(wrapped_indices(indices[..., i], shape[i]) for i in range(indices.shape[-1]))
        return numbers[columns].ravel()
    axis = axis_of(node.attrs.get("axis", 0), len(shape))
    grid = list(np.indices(indices.shape, sparse=True))
    grid[axis] = wrapped_indices(indices, shape[axis])
    return numbers[tuple(grid)].ravel()


def _scatter(node: Node, x: Array, indices: np.ndarray, updates: Array) -> Array:
    """ONNX ScatterElements or ScatterND, with any reduction; without one the last update of a place wins."""
    places = scatter_places(node, x.shape, indices)
    updates, flat = jnp.ravel(updates), jnp.ravel(x)
    if len(updates) != len(places):
        raise ValueError(f"{len(updates)} updates do not fit indices of shape {indices.shape}")
    reduction = node.attrs.get("reduction", "none")
    if reduction == "none":
        last = len(places) - 1 - np.unique(places[::-1], return_index=True)[1]
        return flat.at[places[last]].set(updates[last]).reshape(x.shape)
    target = flat.at[places]
    change = {"add": target.add, "mul": target.multiply, "max": target.max, "min": target.min}[reduction]
    return change(updates).reshape(x.shape)


def _tensor_scatter(node: Node, cache: Array, update: Array, starts: np.ndarray | None = None) -> Array:
    """ONNX TensorScatter: a part of a cache overwritten, from a place per batch entry."""
    axis = axis_of(node.attrs["axis"], cache.ndim)
    length, count = cache.shape[axis], update.shape[axis]
    starts = np.zeros(cache.shape[0], np.int64) if starts is None else np.asarray(starts)
    places = starts[:, None] + np.arange(count)
    if node.attrs["mode"] == "circular":
        places = places % length
    elif places.min(initial=0) < 0 or places.max(initial=0) >= length:
        raise IndexError(f"an update of {count} places from {starts} is outside of {length}")
    grid: list[np.ndarray] = list(np.indices(update.shape, sparse=True))
    grid[axis] = places.reshape(-1, *(count if i == axis else 1 for i in range(1, cache.ndim)))
    return jnp.asarray(cache).at[tuple(grid)].set(update)


def _max_unpool(node: Node, x: Array, indices: np.ndarray, shape: np.ndarray | None = None) -> Array:
    """ONNX MaxUnpool with known places, flat in the whole tensor that the kernel, strides and pads imply."""
    kernel = integers(node.attrs["kernel_shape"])
    strides, pads = per_axis(node, "strides", len(kernel), 1), per_axis(node, "pads", 2 * len(kernel), 0, least=0)
    axes = zip(x.shape[2:], kernel, strides, pads[: len(kernel)], pads[len(kernel) :], strict=True)
    implied = bounded((*x.shape[:2], *((size - 1) * step + k - begin - end for size, k, step, begin, end in axes)))
    places = wrapped_indices(np.ravel(indices), int(np.prod(implied)))
    last = len(places) - 1 - np.unique(places[::-1], return_index=True)[1]
    y = jnp.zeros(int(np.prod(implied)), x.dtype).at[places[last]].set(jnp.ravel(x)[last]).reshape(implied)
    wanted = implied if shape is None else bounded(integers(shape))
    return jnp.pad(y, [(0, want - size) for size, want in zip(implied, wanted, strict=True)])


def _compress(node: Node, x: Array, condition: np.ndarray) -> Array:
    """ONNX Compress: the elements where a known condition holds."""
    kept = np.flatnonzero(condition)
    if "axis" not in node.attrs:
        return jnp.ravel(x)[kept]
    return jnp.take(x, kept, axis=axis_of(node.attrs["axis"], x.ndim), mode="clip")


def _reverse_sequence(node: Node, x: Array, lengths: np.ndarray) -> Array:
    """ONNX ReverseSequence: the first elements along the time axis reversed, as many as each batch entry says."""
    batch, time = (axis_of(node.attrs[name], x.ndim) for name in ("batch_axis", "time_axis"))
    count = x.shape[time]
    sizes = np.asarray(integers(lengths))[:, None]
    steps = np.arange(count)[None, :]
    source = np.where(steps < sizes, sizes - 1 - steps, steps)
    grid = list(np.indices(x.shape, sparse=True))
    grid[time] = source[grid[batch], grid[time]]
    return x[tuple(grid)]


register(
    Op("Compress", 9, Kind.MOVEMENT, _compress, static=(1,)),
    Op("MaxUnpool", 9, Kind.MOVEMENT, _max_unpool, static=(1, 2)),
    Op("ReverseSequence", 10, Kind.MOVEMENT, _reverse_sequence, static=(1,)),
    Op("Scatter", 9, Kind.MOVEMENT, _scatter, static=(1,)),
    Op("ScatterElements", 11, Kind.MOVEMENT, _scatter, static=(1,)),
    Op("ScatterND", 11, Kind.MOVEMENT, _scatter, static=(1,)),
    Op("TensorScatter", 24, Kind.MOVEMENT, _tensor_scatter, static=(2,)),
)
