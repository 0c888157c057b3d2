"""CDist and Solve of the domain com.microsoft, which skl2onnx writes for neighbours, kernels and Gaussian processes."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from fheq.errors import UnsupportedError
from fheq.graph import Node, describe
from fheq.ops.table import Kind, Op, register

Array = Any
METRICS = {
    **dict.fromkeys(("cityblock", "manhattan", "l1"), 1.0),
    **dict.fromkeys(("cosine", "euclidean", "l2", "sqeuclidean"), 2.0),
    "minkowski": None,
}
"""Metrics by the power that they sum."""


def metric_of(node: Node) -> tuple[str, float]:
    """The metric of a CDist (its names are those of scipy) and its power, infinite for chebyshev.

    Raises:
        UnsupportedError: another metric.
    """
    metric = node.attrs.get("metric", "sqeuclidean")
    if metric in ("chebyshev", "infinity"):
        return "chebyshev", float("inf")
    if metric not in METRICS:
        raise UnsupportedError(
            f"{describe(node)}: the metric {metric!r}; fit the estimator with one of chebyshev, {', '.join(METRICS)}"
        )
    power = METRICS[metric]
    return metric, float(node.attrs.get("p", 2.0)) if power is None else power


def _cdist(node: Node, a: Array, b: Array) -> Array:
    """com.microsoft CDist: distances `(N, M)` of rows `(N, F)` and `(M, F)`."""
    metric, power = metric_of(node)
    if metric == "cosine":
        a, b = (x / jnp.sqrt(jnp.sum(x * x, axis=-1, keepdims=True)) for x in (a, b))
        return (1 - a @ b.T).astype(a.dtype)
    apart = jnp.abs(a[:, None] - b[None])
    if metric == "chebyshev":
        return jnp.max(apart, axis=-1)
    total = jnp.sum(apart**power, axis=-1)
    return total if metric == "sqeuclidean" else (total ** (1 / power)).astype(a.dtype)


register(
    Op("CDist", 1, Kind.COMPOSITE, _cdist, domain="com.microsoft"),
    Op("Solve", 1, Kind.COMPOSITE, lambda node, a, y: jnp.linalg.solve(a, y), domain="com.microsoft"),
)
