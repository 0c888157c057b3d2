"""The noise of tables in fake quantization: lookups that miss, by a p_error that is a leaf like any other.

A table reads its accumulator to the nearest cell (see `fheq.noise`). Gaussian noise so wide that a value at a cell's centre
leaves it with probability p_error sends it to the next cell, or further. The optimizer chooses parameters whose noise is at
most that, so this is what an encrypted run may lose, without lowering anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fheq.arguments import check_chances, near
from fheq.errors import QuantizationError
from fheq.graph import Graph
from fheq.integers.accumulator_decoders import accumulator_scale
from fheq.planning.plan import Plan
from fheq.planning.quantizers import plan_for
from fheq.qparams import QParams
from fheq.steps import Step, makes_accumulator

Array = Any


class TableNoise(NamedTuple):
    """Noise by the name of the accumulator that a table reads.

    deviation: standard deviation in cells, `()`; width: of a cell in real values, broadcasting against the accumulator;
    between: whether the table reads values between the centres of cells, as those of approximately rounded accumulators.
    """

    deviation: dict[str, Array]
    width: dict[str, Array]
    between: dict[str, Array]


def tabulated(layout: Plan) -> list[Step]:
    """The steps whose accumulators tables read."""
    read = set(layout.points.values())
    return [step for step in layout.steps if makes_accumulator(step) and step.out in read]


def table_noise(graph: Graph, qparams: QParams, p_error: Array | Mapping[str, Array]) -> TableNoise:
    """The noise at which a lookup misses with some probability; a pure function, for `jax.vmap` over all but the graph.

    Args:
        p_error: probability, from 0 to 1; or one by the accumulator's name, 0 where none is given.

    Raises:
        ArgumentError: (a ValueError) a probability outside of [0, 1], where its value is known.
        QuantizationError: a name of no accumulator, or quantizers of another graph.
    """
    check_chances(p_error)
    unknown = [name for name in p_error if name not in qparams.accumulators] if isinstance(p_error, Mapping) else []
    if unknown:
        there = near(unknown[0], qparams.accumulators)
        raise QuantizationError(f"p_error names {unknown[0]!r}, which is no accumulator; there are {there}")
    return noise_at_tables(plan_for(graph, qparams), qparams, p_error)


def noise_at_tables(
    layout: Plan, qparams: QParams, p_error: Array | Mapping[str, Array], scales: Mapping[str, Array] | None = None
) -> TableNoise:
    """`table_noise` of a plan, whose weights may be others than the graph's.

    Args:
        scales: of accumulators, by the tensor, where their decoders are known.
    """
    steps = tabulated(layout)
    chances = jnp.asarray([p_error.get(s.out, 0.0) for s in steps]) if isinstance(p_error, Mapping) else p_error
    # of all at once: it is a long formula
    kappa = -jax.scipy.special.ndtri(jnp.asarray(chances, jnp.result_type(float)) / 2)
    deviations = jnp.broadcast_to(1 / (2 * kappa), (len(steps),))  # 0 where kappa is infinite
    width, between = {}, {}
    for step in steps:
        scale = accumulator_scale(layout, qparams, step) if scales is None else scales[step.out]
        known = qparams.accumulators[step.out]
        width[step.out] = jnp.abs(scale) * 2.0**known.lsbs
        between[step.out] = (known.lsbs > 0) & (known.rounding == "approximate")
    return TableNoise({step.out: deviations[i] for i, step in enumerate(steps)}, width, between)


def draws(layout: Plan, key: Array) -> dict[str, Array]:
    """Standard normals for one sample, by the accumulator that a table reads.

    All at once: a generator for every accumulator would take most of the time to compile.

    Args:
        key: of `jax.random`, the sample's own.
    """
    steps = tabulated(layout)
    ends = np.cumsum([prod(step.shape) for step in steps], dtype=int)
    normals = jax.random.normal(key, (ends[-1] if steps else 0,), jnp.result_type(float))
    return {step.out: part.reshape(step.shape) for step, part in zip(steps, jnp.split(normals, ends[:-1]))}


def missed(noise: TableNoise, drawn: Mapping[str, Array], step: Step, value: Array) -> Array:
    """A real accumulator with the noise that its table reads it through; of whole cells, where it lies at their centres.

    Args:
        drawn: by `draws`.
    """
    if step.out not in noise.deviation:
        return value
    cells = noise.deviation[step.out] * drawn[step.out]
    cells = jnp.where(noise.between[step.out], cells, jnp.round(cells))
    return value + (cells * noise.width[step.out]).reshape(step.shape)
