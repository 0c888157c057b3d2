"""Resize and Upsample: each axis takes its elements, or weighted averages of them, at positions of the input.

With mode "nearest" they are movements. The other modes compute with the values, so they refuse integers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import enable_x64

from fheq.errors import UnsupportedError
from fheq.graph import Node, describe, is_float
from fheq.ops.arguments import axis_of, bounded, integers
from fheq.ops.table import Kind, Op, register

Array = Any

_NEAREST: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "floor": np.floor,
    "ceil": np.ceil,
    "round_prefer_floor": lambda x: np.ceil(x - 0.5),
    "round_prefer_ceil": lambda x: np.floor(x + 0.5),
}


def _positions(
    mode: str, size: int, length: int, scale: float, roi: tuple[float, float] | None, nearest: bool
) -> np.ndarray:
    """Where in an axis of `size` elements the `length` elements of the result are taken (ONNX Resize gives the formulas)."""
    # nearest: in float32, where the quotient by a scale such as 0.6 is the whole number that was meant
    i: np.ndarray = np.arange(length, dtype=np.float32 if nearest else np.float64)
    exact = scale * size
    if mode == "half_pixel":
        return (i + 0.5) / scale - 0.5
    if mode == "half_pixel_symmetric":
        return size / 2 * (1 - length / exact) + (i + 0.5) / scale - 0.5
    if mode == "pytorch_half_pixel":
        return (i + 0.5) / scale - 0.5 if length > 1 else i - 0.5
    if mode == "align_corners":
        return i * (size - 1) / (exact - 1) if exact != 1 else i * 0
    if mode == "asymmetric":
        return i / scale
    if mode == "tf_crop_and_resize" and roi is not None:
        start, end = (bound * (size - 1) for bound in roi)
        return start + i * (end - start) / (exact - 1) if exact != 1 else (start + end) / 2 + i
    raise ValueError(f"attribute coordinate_transformation_mode is {mode!r}")


def _kernel(node: Node, x: np.ndarray) -> np.ndarray:
    """The interpolation kernel: a triangle for "linear", the cubic convolution of Keys for "cubic"."""
    x = np.abs(x)
    if node.attrs["mode"] in ("linear", "bilinear"):
        return np.maximum(1 - x, 0)
    a = node.attrs["cubic_coeff_a"]
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((x - 5) * x + 8) * x * a - 4 * a
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _weights(node: Node, positions: np.ndarray, size: int, scale: float) -> np.ndarray:
    """The matrix that interpolates an axis: one row per position, one column per input element."""
    stretch = min(scale, 1.0) if node.attrs.get("antialias", 0) else 1.0
    reach = int(np.ceil((1 if node.attrs["mode"] in ("linear", "bilinear") else 2) / stretch))
    bounded((len(positions), max(size, 2 * reach)))
    taps = np.floor(positions).astype(np.int64)[:, None] + np.arange(1 - reach, reach + 1)
    values = _kernel(node, (taps - positions[:, None]) * stretch)
    if node.attrs.get("exclude_outside", 0):
        values = np.where((taps >= 0) & (taps < size), values, 0)
    matrix = np.zeros((len(positions), size))
    np.add.at(matrix, (np.arange(len(positions))[:, None], np.clip(taps, 0, size - 1)), values)
    return matrix / matrix.sum(axis=1, keepdims=True)


def _resize_axis(node: Node, x: Array, axis: int, length: int, scale: float, roi: tuple[float, float] | None) -> Array:
    size = x.shape[axis]
    mode = node.attrs["mode"]
    coordinates = node.attrs.get("coordinate_transformation_mode", "asymmetric")
    if coordinates != "tf_crop_and_resize" and length == size and scale == 1:
        return x
    positions = _positions(coordinates, size, length, scale, roi, mode == "nearest")
    if mode == "nearest":
        # before opset 11: the element before when the axis grows, the one after when it shrinks
        choose = _NEAREST[node.attrs.get("nearest_mode", "floor" if scale >= 1 else "ceil")]
        y = jnp.take(x, np.clip(choose(positions), 0, size - 1).astype(np.int64), axis=axis, mode="clip")
    elif mode not in ("linear", "bilinear", "cubic"):
        raise UnsupportedError(f"{describe(node)}: mode {mode!r} is not known; use nearest, linear or cubic")
    else:
        matrix = _weights(node, positions, size, scale).astype(x.dtype)
        y = jnp.moveaxis(jnp.matmul(jnp.moveaxis(x, axis, -1), matrix.T, precision=jax.lax.Precision.HIGHEST), -1, axis)
    if coordinates != "tf_crop_and_resize":
        return y
    outside = ((positions < 0) | (positions > size - 1)).reshape((-1,) + (1,) * (x.ndim - axis - 1))
    return jnp.where(outside, jnp.asarray(node.attrs["extrapolation_value"], x.dtype), y)


def _lengths(node: Node, shape: list[int], sizes: tuple[int, ...]) -> tuple[list[int], list[float]]:
    """The lengths and scales of axes with this `shape` that ask for these sizes."""
    ratios = [size / length for size, length in zip(sizes, shape, strict=True)]
    policy = node.attrs.get("keep_aspect_ratio_policy", "stretch")
    if policy == "stretch":
        return list(sizes), ratios
    scale = {"not_larger": min, "not_smaller": max}[policy](ratios)
    return [int(scale * length + 0.5) for length in shape], [scale] * len(ratios)


Change = tuple[int, int, float, tuple[float, float] | None]


def _changes(node: Node, shape: tuple[int, ...], roi: Any, scales: Any, sizes: Any) -> list[Change]:
    """The axes that a node names, each with its length afterwards, its scale, and the part of it that is kept."""
    axes = [axis_of(axis, len(shape)) for axis in integers(node.attrs.get("axes", range(len(shape))))]
    chosen = [shape[axis] for axis in axes]
    if sizes is not None and np.size(sizes):
        lengths, factors = _lengths(node, chosen, integers(sizes))
    else:
        single = np.ravel(np.asarray(scales, np.float32))
        if not np.all(np.isfinite(single)):
            raise ValueError(f"scales {single} are not finite")
        factors = [float(scale) for scale in single]
        lengths = [int(size * scale) for size, scale in zip(chosen, single, strict=True)]
    bounded((dict(enumerate(shape)) | dict(zip(axes, lengths))).values())
    if min(factors) <= 0:
        raise ValueError(f"scales {factors} are not positive")
    spans = [None] * len(axes) if roi is None or not np.size(roi) else np.reshape(roi, (2, len(axes))).T.tolist()
    return list(zip(axes, lengths, factors, spans))


def _resize(node: Node, x: Array, roi: Any, scales: Any, sizes: Any) -> Array:
    """ONNX Resize, one axis after the other; integers that are interpolated are cut off toward 0."""
    kind = x.dtype
    x = x.astype(jnp.result_type(float)) if interpolates(node) and not is_float(kind) else x
    for axis, length, factor, span in _changes(node, x.shape, roi, scales, sizes):
        x = _resize_axis(node, x, axis, length, factor, span)
    return x.astype(kind)


def interpolates(node: Node) -> bool:
    """Whether a Resize or Upsample makes new values."""
    return node.attrs.get("mode", "nearest") != "nearest"


def axis_matrices(node: Node, shape: tuple[int, ...], known: Sequence[np.ndarray | None]) -> dict[int, np.ndarray] | None:
    """By axis that changes, the matrix (length afterwards, length) that a Resize or Upsample node applies.

    None where it fills places outside of the input with another value than 0.

    Args:
        known: the node's inputs after the first.
    """
    crops = node.attrs.get("coordinate_transformation_mode") == "tf_crop_and_resize"
    if crops and node.attrs["extrapolation_value"]:
        return None
    roi, scales, sizes = (None, *known, None)[:3] if len(known) < 2 else (*known, None)[:3]
    changes = _changes(node, shape, roi, node.attrs["scales"] if not known else scales, sizes)
    with enable_x64():
        matrices = {
            axis: np.asarray(_resize_axis(node, jnp.eye(shape[axis]), 0, length, factor, span))
            for axis, length, factor, span in changes
        }
    return {a: m for a, m in matrices.items() if m.shape[0] != m.shape[1] or not np.array_equal(m, np.eye(len(m)))}


def _by_scales(node: Node, x: Array, scales: np.ndarray) -> Array:
    return _resize(node, x, None, scales, None)


register(
    Op("Resize", 10, Kind.MOVEMENT, _by_scales, static=(1,)),
    Op(
        "Resize",
        11,
        Kind.MOVEMENT,
        lambda node, x, roi=None, scales=None, sizes=None: _resize(node, x, roi, scales, sizes),
        static=(-1,),
    ),
    Op("Upsample", 7, Kind.MOVEMENT, lambda node, x: _by_scales(node, x, node.attrs["scales"])),
    Op("Upsample", 9, Kind.MOVEMENT, _by_scales, static=(1,)),
)
