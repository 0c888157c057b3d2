"""numpy or jax.numpy, by what the arrays are."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def array_namespace(*arrays: Any) -> Any:
    """jax.numpy when any array is a JAX array, else numpy."""
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np
