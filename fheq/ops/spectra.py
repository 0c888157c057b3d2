"""Fourier transforms, which are linear: products with known matrices on encrypted data."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from fheq.graph import Node
from fheq.ops.arguments import axis_of, bounded, dtype_of, integers
from fheq.ops.table import Kind, Op, register

Array = Any


def dft_axis(node: Node, rank: int, axis: np.ndarray | None) -> int:
    """The axis of a DFT, an attribute before opset 20."""
    (given,) = integers(node.attrs["axis"] if node.version < 20 else -2 if axis is None else axis)
    return axis_of(given, rank)


def _complex(x: Array) -> Array:
    """Complex numbers in the widest type there is: sums of many products that cancel are due to be 0."""
    x = x.astype(jnp.result_type(float))
    return x[..., 0] if x.shape[-1] == 1 else x[..., 0] + 1j * x[..., 1]


def _dft(node: Node, x: Array, length: np.ndarray | None = None, axis: np.ndarray | None = None) -> Array:
    """ONNX DFT of real `(..., 1)` or complex numbers `(..., 2)`; the inverse of a one-sided one is real."""
    along, inverse, half = dft_axis(node, x.ndim, axis), bool(node.attrs["inverse"]), bool(node.attrs["onesided"])
    whole = 2 * (x.shape[along] - 1) if inverse and half else x.shape[along]
    (count,) = bounded(integers(length)) if length is not None else (whole,)
    values = _complex(x)
    if inverse and half:
        return jnp.fft.irfft(values, count, along)[..., None].astype(x.dtype)
    found = jnp.fft.ifft(values, count, along) if inverse else jnp.fft.fft(values, count, along)
    if half:
        found = found[(slice(None),) * along + (slice(0, count // 2 + 1),)]
    return jnp.stack([found.real, found.imag], axis=-1).astype(x.dtype)


def _stft(
    node: Node, x: Array, step: np.ndarray, window: np.ndarray | None = None, length: np.ndarray | None = None
) -> Array:
    """ONNX STFT: transforms `(N, frames, bins, 2)` of the windows of a signal `(N, L, 1 or 2)`."""
    if length is None and window is None:
        raise ValueError("neither a window nor a frame_length says how long a frame is")
    (size,) = integers(length if length is not None else np.size(np.asarray(window)))
    (stride,) = integers(step)
    if not (0 < size <= x.shape[1] and stride > 0):
        raise ValueError(f"frames of {size} by steps of {stride} do not fit a signal of {x.shape[1]}")
    starts = np.arange(0, x.shape[1] - size + 1, stride)
    bounded((len(starts), size))
    frames = x[:, starts[:, None] + np.arange(size)]
    values = _complex(frames)
    found = jnp.fft.fft(values if window is None else values * jnp.asarray(window), axis=-1)
    if node.attrs["onesided"]:
        found = found[..., : size // 2 + 1]
    return jnp.stack([found.real, found.imag], axis=-1).astype(x.dtype)


def _mel_weights(node: Node, bins: np.ndarray, length: np.ndarray, rate: np.ndarray, low: Any, high: Any) -> np.ndarray:
    """ONNX MelWeightMatrix: triangles between steps of the mel scale, in columns."""
    (count,), (size,), (samples,) = (integers(v) for v in (bins, length, rate))
    bounded((size // 2 + 1, count + 2))
    ends = [2595 * np.log10(1 + float(np.reshape(v, ())) / 700) for v in (low, high)]
    mels = ends[0] + np.arange(count + 2) * (ends[1] - ends[0]) / (count + 2)
    places = ((size + 1) * 700 * (10 ** (mels / 2595) - 1) // samples).astype(np.int64)
    rows = np.arange(size // 2 + 1)[:, None]
    left, centre, right = places[:-2], places[1:-1], places[2:]
    rising = np.where(left == centre, rows == centre, (rows - left) / np.maximum(centre - left, 1))
    falling = (right - rows) / np.maximum(right - centre, 1)
    found = np.where((left <= rows) & (rows <= centre), rising, 0)
    found = np.where((centre <= rows) & (rows < right), falling, found)
    return found.astype(dtype_of(node, node.attrs["output_datatype"]))


register(
    Op("DFT", 17, Kind.LINEAR, _dft, static=(1, 2)),
    Op("MelWeightMatrix", 17, Kind.CONSTANT, _mel_weights, static=(0, 1, 2, 3, 4)),
    Op("STFT", 17, Kind.LINEAR, _stft, static=(1, 2, 3)),
)
