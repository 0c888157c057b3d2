"""Convolution as products of matrices is XLA's convolution, of NumPy and JAX arrays, mapped over inputs and weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fheq.arrays.convolution import PLACES, convolve

# input channels, output channels, groups, spatial sizes, kernel, strides, dilations
CASES = {
    "one axis": (3, 4, 1, (7,), (3,), (2,), (1,)),
    "strided and dilated": (4, 6, 1, (9, 8), (3, 2), (2, 1), (1, 2)),
    "grouped": (4, 6, 2, (9, 8), (3, 2), (2, 1), (1, 2)),
    "depthwise": (4, 8, 4, (6, 6), (3, 3), (1, 1), (1, 1)),
    "one channel": (1, 5, 1, (6, 5), (2, 3), (1, 2), (2, 1)),
    "three axes": (2, 3, 1, (4, 5, 6), (2, 2, 3), (1, 1, 2), (1, 2, 1)),
    "a large kernel": (2, 2, 1, (PLACES + 3,), (PLACES + 1,), (1,), (1,)),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_a_convolution(name: str) -> None:
    """On small integers, where every order of summation is exact."""
    inputs, outputs, groups, sizes, kernel, strides, dilations = CASES[name]
    rng = np.random.default_rng(0)
    x = rng.integers(-5, 6, (3, inputs, *sizes)).astype(np.float32)
    w = rng.integers(-5, 6, (outputs, inputs // groups, *kernel)).astype(np.float32)
    options = {"window_strides": strides, "rhs_dilation": dilations, "feature_group_count": groups}
    wanted = jax.lax.conv_general_dilated(x, w, padding="VALID", **options)
    run = lambda x, w: convolve(x, w, strides, dilations, groups)
    np.testing.assert_array_equal(run(x, w), wanted)
    assert isinstance(run(x, w), np.ndarray)
    sample = lambda x, w: run(x[None], w)[0]
    mapped = jax.jit(jax.vmap(jax.vmap(sample, (0, None)), (None, 0)))(x, jnp.stack([w, 2 * w]))
    np.testing.assert_array_equal(mapped, [wanted, 2 * wanted])
