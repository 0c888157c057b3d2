"""GridSample and RoiAlign at known places: each result element is a weighted sum of a few elements of the image."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from fheq.errors import UnsupportedError
from fheq.graph import Node, describe
from fheq.ops.arguments import bounded, integers
from fheq.ops.table import Kind, Op, register

Array = Any
KEYS = -0.75  # the coefficient of the cubic convolution that GridSample prescribes


class Taps(NamedTuple):
    """Weighted sums of elements.

    places: `(P, K)` flat elements, -1 for a zero beside the image; weights: `(P, K)`.
    """

    places: np.ndarray
    weights: np.ndarray

    def matrix(self, elements: int) -> np.ndarray:
        """The matrix `(elements, P)` of the sums."""
        bounded((elements + 1, len(self.places)))
        found = np.zeros((elements + 1, len(self.places)))
        np.add.at(found, (self.places, np.arange(len(self.places))[:, None]), self.weights)
        return found[:-1]


def _along(coordinates: np.ndarray, mode: str) -> Taps:
    """Neighbours on one axis of an endless image, and what each contributes."""
    first = np.floor(coordinates)
    if mode == "nearest":
        return Taps(np.rint(coordinates)[:, None].astype(np.int64), np.ones((len(coordinates), 1)))
    reach = np.arange(0, 2) if mode == "linear" else np.arange(-1, 3)
    away = np.abs((coordinates - first)[:, None] - reach)
    if mode == "linear":
        return Taps((first[:, None] + reach).astype(np.int64), 1 - away)
    near = ((KEYS + 2) * away - (KEYS + 3)) * away**2 + 1
    far = ((away - 5) * away + 8) * away * KEYS - 4 * KEYS
    return Taps((first[:, None] + reach).astype(np.int64), np.where(away <= 1, near, far))


def _reflected(x: np.ndarray, low: float, high: float) -> np.ndarray:
    span = max(high - low, 1e-12)
    distance = np.abs(x - low) % (2 * span)
    return np.where((x < low) | (x > high), low + np.minimum(distance, 2 * span - distance), x)


def _inside(x: np.ndarray, size: int, padding: str, corners: bool) -> np.ndarray:
    """Coordinates outside of an axis brought inside, as `padding_mode` says."""
    if padding == "border":
        return np.clip(x, 0, size - 1)
    if padding == "reflection":
        return _reflected(x, *((0.0, size - 1.0) if corners else (-0.5, size - 0.5)))
    return x


def grid_taps(node: Node, sizes: tuple[int, ...], grid: np.ndarray) -> Taps:
    """The taps of GridSample for the points `(P, D)` of a grid, in an image of these spatial sizes."""
    mode = {"bilinear": "linear", "bicubic": "cubic"}.get(node.attrs["mode"], node.attrs["mode"])
    padding, corners = node.attrs["padding_mode"], bool(node.attrs["align_corners"])
    if mode not in ("nearest", "linear", "cubic") or padding not in ("zeros", "border", "reflection"):
        raise ValueError(f"attributes mode {node.attrs['mode']!r} and padding_mode {padding!r}")
    places, weights = np.zeros((len(grid), 1), np.int64), np.ones((len(grid), 1))
    bounded((len(grid), {"nearest": 1, "linear": 2, "cubic": 4}[mode] ** len(sizes)))
    for axis, size in enumerate(sizes):
        at = np.asarray(grid[:, len(sizes) - 1 - axis], np.float32)
        at = (
            (at + np.float32(1)) / np.float32(2) * np.float32(size - 1) if corners else ((at + 1) * np.float32(size) - 1) / 2
        )
        at = np.rint(at) if mode == "nearest" else at
        at = at if mode == "cubic" else _inside(at, size, padding, corners)  # as onnxruntime and PyTorch do
        found = _along(at.astype(np.float64), mode)
        near = np.trunc(_inside(found.places, size, padding, corners)).astype(np.int64)
        lost = (near < 0) | (near >= size)
        wide = places[:, :, None] * size + np.where(lost, 0, near)[:, None, :]
        wide = np.where((places < 0)[:, :, None] | lost[:, None, :], -1, wide)
        places, weights = (
            wide.reshape(len(grid), -1),
            (weights[:, :, None] * found.weights[:, None, :]).reshape(len(grid), -1),
        )
    return Taps(places, weights)


def _grid_sample(node: Node, x: Array, grid: np.ndarray) -> Array:
    """ONNX GridSample at known points; a grid for one sample is that of each."""
    grid = np.asarray(grid)
    if grid.shape[-1] != x.ndim - 2 or len(grid) not in (1, x.shape[0]):
        raise ValueError(f"a grid of shape {grid.shape} does not fit an image of shape {x.shape}")
    flat = jnp.reshape(x, (*x.shape[:2], -1))
    found = []
    for sample, points in enumerate(grid.reshape(len(grid), -1, grid.shape[-1])):
        image = flat if len(grid) == 1 else flat[sample : sample + 1]
        found.append(_summed(image, grid_taps(node, tuple(x.shape[2:]), points)))
    return jnp.concatenate(found).reshape(*x.shape[:2], *grid.shape[1:-1])


def _summed(x: Array, taps: Taps) -> Array:
    """The sums of taps over the last axis."""
    zero = jnp.zeros((*x.shape[:-1], 1), x.dtype)
    near = jnp.concatenate([x, zero], axis=-1)[..., taps.places]
    if taps.places.shape[1] == 1:
        return near[..., 0]
    return jnp.sum(near * taps.weights.astype(x.dtype), axis=-1)


def roi_taps(node: Node, shape: tuple[int, ...], rois: np.ndarray, samples: np.ndarray) -> Taps:
    """The taps of RoiAlign's averages: places in the samples and pixels of an input of this `shape`, channels left out."""
    if node.attrs["mode"] != "avg":
        raise UnsupportedError(f"{describe(node)}: RoiAlign takes maxima of weighted pixels; use mode 'avg'")
    ratio, sizes = node.attrs["sampling_ratio"], (node.attrs["output_height"], node.attrs["output_width"])
    half = node.attrs.get("coordinate_transformation_mode", "output_half_pixel") == "half_pixel"
    rows = []
    for (left, top, right, bottom), sample in zip(np.asarray(rois, np.float64), integers(samples)):
        axes = []
        for size, count, start, end in zip(shape[2:], sizes, (top, left), (bottom, right)):
            start, end = (v * node.attrs["spatial_scale"] - 0.5 * half for v in (start, end))
            span = end - start if half else max(end - start, 1.0)
            parts = ratio if ratio > 0 else int(np.ceil(span / count))
            bounded((count, max(parts, 0), *shape[2:]))
            at = start + (np.arange(count)[:, None] + (np.arange(parts) + 0.5) / max(parts, 1)) * span / count
            weight = np.zeros((count, size))
            low = np.clip(np.floor(np.maximum(at, 0)), 0, size - 1).astype(np.int64)
            share = np.where(low >= size - 1, 0, np.maximum(at, 0) - low)
            kept = ((at >= -1) & (at <= size)) / max(parts, 1)
            row = np.arange(count)[:, None]
            np.add.at(weight, (row, low), (1 - share) * kept)
            np.add.at(weight, (row, np.minimum(low + 1, size - 1)), share * kept)
            axes.append(weight)
        whole = np.zeros((np.prod(sizes), shape[0], shape[2] * shape[3]))
        whole[:, sample] = np.einsum("ij,kl->ikjl", *axes).reshape(int(np.prod(sizes)), -1)
        rows.append(whole.reshape(len(whole), -1))
    weights = np.concatenate(rows) if rows else np.zeros((0, shape[0] * shape[2] * shape[3]))
    return Taps(np.broadcast_to(np.arange(weights.shape[1]), weights.shape), weights)


def _roi_align(node: Node, x: Array, rois: np.ndarray, samples: np.ndarray) -> Array:
    """ONNX RoiAlign of known regions."""
    taps = roi_taps(node, x.shape, rois, samples)
    flat = jnp.reshape(jnp.moveaxis(x, 1, 0), (x.shape[1], -1))
    found = jnp.matmul(flat, taps.weights.T.astype(x.dtype), precision="highest")
    sizes = (node.attrs["output_height"], node.attrs["output_width"])
    return jnp.moveaxis(found.reshape(x.shape[1], len(rois), *sizes), 0, 1)


register(
    Op("GridSample", 16, Kind.LINEAR, _grid_sample, static=(1,)),
    Op("RoiAlign", 10, Kind.LINEAR, _roi_align, static=(1, 2)),
)
