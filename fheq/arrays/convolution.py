"""Convolution as products of matrices.

XLA's own convolution is slow on CPUs inside of loops and with weights that are mapped over (as in a sweep), in float64 and
with one channel; and there a sample's result depends on its place in the batch. A product of matrices has none of that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.arrays.namespace import array_namespace

Array = Any
PLACES = 128  # kernels with more places are left to XLA: each place is a slice in the program


def convolve(x: Array, weight: Array, strides: Sequence[int], dilations: Sequence[int], groups: int) -> Array:
    """ONNX Conv without padding and bias, of NumPy or JAX arrays.

    Args:
        x: `(N, C, *S)`.
        weight: `(O, C / groups, *K)`.

    Returns:
        `(N, O, *R)`, `R = (S - (K - 1) * dilation - 1) // stride + 1` along each axis.
    """
    xp = array_namespace(x, weight)
    kernel = weight.shape[2:]
    if xp is jnp and np.prod(kernel) > PLACES:
        return _by_xla(x, weight, strides, dilations, groups)
    out, inner = weight.shape[:2]
    sizes = [(n - (k - 1) * d - 1) // s + 1 for n, k, d, s in zip(x.shape[2:], kernel, dilations, strides)]
    last = xp.moveaxis(x, 1, -1).reshape(len(x), *x.shape[2:], groups, inner)
    parts = [_moved(last, at, sizes, strides, dilations) for at in np.ndindex(*kernel)]
    matrices = xp.moveaxis(weight.reshape(groups, out // groups, inner, len(parts)), (3, 2), (0, 2))  # (K, g, inner, O / g)
    if inner == 1:  # a product would have one term for each place: nothing for matrices to gain
        y = sum(part * matrix[:, 0] for part, matrix in zip(parts, matrices))
    elif groups == 1:
        y = _matmul(xp, xp.concatenate(parts, axis=-1)[..., 0, :], matrices.reshape(-1, out))
    else:
        rows = xp.moveaxis(xp.concatenate(parts, axis=-1), -2, 0).reshape(groups, -1, len(parts) * inner)
        y = xp.moveaxis(_matmul(xp, rows, xp.moveaxis(matrices, 1, 0).reshape(groups, -1, out // groups)), 0, 1)
    return xp.moveaxis(y.reshape(len(x), *sizes, out), -1, 1)


def _matmul(xp: Any, a: Array, b: Array) -> Array:
    return np.matmul(a, b) if xp is np else jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)


def _moved(x: Array, at: Sequence[int], sizes: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> Array:
    """What the kernel's place `at` reads for every result, the spatial axes of `x` being the second and following."""
    starts = [i * d for i, d in zip(at, dilations)]
    return x[(slice(None), *(slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, sizes, strides)))]


def _by_xla(x: Array, weight: Array, strides: Sequence[int], dilations: Sequence[int], groups: int) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        weight,
        tuple(strides),
        [(0, 0)] * (weight.ndim - 2),
        rhs_dilation=tuple(dilations),
        feature_group_count=groups,
        precision=jax.lax.Precision.HIGHEST,
    )
