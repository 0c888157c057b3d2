"""Derivatives of elementwise functions that stay numbers.

Quantizers clip what is infinite, and tables have 0 where a value leaves the domain of its function; the derivative of that
is 0. The chain rule has 0 times infinity there, which is no number, and spoils the gradient of all weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

Array = Any


def with_finite_slopes(f: Callable[..., Array]) -> Callable[..., Array]:
    """An elementwise function of arrays of floats with the derivative 0 where its own is infinite or none."""
    wrapped = jax.custom_jvp(f)

    @wrapped.defjvp
    def _(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Array, Array]:
        y = f(*primals)
        tangent = jnp.zeros_like(y)
        for i, (x, direction) in enumerate(zip(primals, tangents)):
            of_one = lambda v, i=i: f(*primals[:i], v, *primals[i + 1 :])
            slope = jax.jvp(of_one, (x,), (jnp.ones_like(x),))[1]
            tangent = tangent + jnp.where(jnp.isfinite(slope), slope, 0) * direction
        return y, tangent

    return wrapped
