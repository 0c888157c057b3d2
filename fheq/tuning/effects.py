"""What the results of linear layers matter to a model's outputs.

An error of a layer's result adds the square of itself times the outputs' derivative to their squared error. The mean of
that square over samples is the diagonal of a Gauss-Newton matrix, and random signs on the outputs estimate it without a
derivative for each of them (Hutchinson; Bekas, Kokiopoulou, Saad, "An estimator for the diagonal of a matrix", 2007).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.arrays.compiled import compiled_for
from fheq.graph import is_float
from fheq.interpret import interpret
from fheq.planning.granularity import channel_axis
from fheq.planning.plan import Plan
from fheq.steps import Linear

BLOCK = 64  # samples at a time
SIGNS = 4  # draws of signs for each sample
_FLAT = (
    *("Ceil", "Equal", "Floor", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual", "Mod", "Nearest"),
    *("Not", "Round", "Sign", "BipolarQuant", "DequantizeLinear", "IntQuant", "Quant", "QuantizeLinear", "Trunc"),
)
"""Operators whose derivative is 0, though their results change."""


def effects(layout: Plan, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """By result of a linear step, what a squared error in each of its channels, `(C,)`, adds to the relative squared error
    of the model's outputs.

    Empty where derivatives do not tell: a model that rounds, compares or decides, or has no float outputs.
    """
    names = [port.name for port in layout.graph.outputs if is_float(port.type.dtype)]
    if not names or any(node.op in _FLAT for node in layout.graph.nodes):
        return {}
    size = min(BLOCK, len(arrays[0]))
    blocks = [[jnp.asarray(a[at : at + size]) for a in arrays] for at in range(0, len(arrays[0]) - size + 1, size)]
    outputs = [np.concatenate(parts) for parts in zip(*(_outputs(layout, *block) for block in blocks))]
    units = [float(1 / np.sqrt(max(np.mean(np.var(y, axis=0)), 1e-12) * y[0].size * len(outputs))) for y in outputs]
    key = jax.random.key(0)
    sums = [_squares(layout, units, jax.random.fold_in(key, at), *block) for at, block in enumerate(blocks)]
    found = {}
    for step in (s for s in layout.steps if isinstance(s, Linear)):
        square = np.mean([np.asarray(total[step.out], np.float64) for total in sums], axis=0) / size
        axis = channel_axis(layout, step.out)
        found[step.out] = square.sum(axis=tuple(i for i in range(square.ndim) if axis is None or i != axis % square.ndim))
    return {name: square for name, square in found.items() if np.all(np.isfinite(square)) and np.any(square > 0)}


def _results(layout: Plan, moved: dict[str, Any], *sample: Any) -> list[Any]:
    """The float outputs for one sample when the results of linear steps are moved."""
    tap = lambda name, value: value + moved[name] if name in moved else value
    found = interpret(layout.graph, dict(zip(layout.inputs, sample)), tap=tap)
    return [found[port.name].astype(jnp.float32) for port in layout.graph.outputs if is_float(port.type.dtype)]


@compiled_for(1)
def _outputs(layout: Plan, *block: Any) -> list[Any]:
    return jax.vmap(lambda *sample: _results(layout, {}, *sample))(*block)


@compiled_for(1)
def _squares(layout: Plan, units: list[float], key: Any, *block: Any) -> dict[str, Any]:
    """The sums over samples of the squared derivatives of randomly signed outputs, these in units of their sizes."""
    still = {s.out: jnp.zeros(layout.shape(s.out), jnp.float32) for s in layout.steps if isinstance(s, Linear)}

    def one(key: Any, *sample: Any) -> dict[str, Any]:
        outputs, back = jax.vjp(lambda moved: _results(layout, moved, *sample), still)

        def drawn(key: Any) -> dict[str, Any]:
            keys = jax.random.split(key, len(outputs))
            signs = [u * jax.random.rademacher(k, y.shape, y.dtype) for k, u, y in zip(keys, units, outputs)]
            return jax.tree.map(jnp.square, back(signs)[0])

        return jax.tree.map(lambda v: v.mean(axis=0), jax.vmap(drawn)(jax.random.split(key, SIGNS)))

    every = jax.vmap(one)(jax.random.split(key, len(block[0])), *block)
    return jax.tree.map(lambda v: v.sum(axis=0), every)
