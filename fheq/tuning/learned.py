"""What reconstruction and bias correction learn, and the graph and quantizers with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.arrays.namespace import array_namespace
from fheq.client.outputs import rejoined
from fheq.fitting.accumulators import same_range
from fheq.graph import Graph
from fheq.origins import is_boolean, is_integer
from fheq.planning.granularity import share
from fheq.planning.plan import Plan
from fheq.planning.quantizers import plan_for
from fheq.qparams import QParams
from fheq.rewriting.weights import replaceable, takes_bias, with_weights
from fheq.steps import Linear

Array = Any


def with_learned(graph: Graph, qparams: QParams, learned: Learned) -> tuple[Graph, QParams]:
    """The graph and the quantizers with what `tune` learned for them."""
    layout = plan_for(graph, qparams)
    tuned, qparams = applied(layout, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), qparams), learned)
    changed = {s.out: s for s in tuned.steps if isinstance(s, Linear) and s.out in learned.weights}
    return rejoined(graph, with_weights(layout.graph, changed)) if changed else graph, qparams


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Learned:
    """What is tuned: weights and biases by the tensor that a step makes, and logarithms of factors of scales by the first of
    the points that are `tied`."""

    weights: dict[str, Array]
    biases: dict[str, Array]
    scales: dict[str, Array]


def initial(layout: Plan, qparams: QParams) -> Learned:
    """The model's own weights, no change of biases and scales."""
    steps = [step for step in layout.steps if isinstance(step, Linear) and replaceable(layout.graph, step)]
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for name, first in tied(layout, qparams).items():
        shapes.setdefault(first, set()).add(np.shape(qparams.tensors[name].scale))
    return Learned(
        {s.out: jnp.asarray(s.weight, jnp.float32) for s in steps},
        {s.out: zero_bias(s) for s in steps if takes_bias(layout.graph, layout.points, s)},
        {first: jnp.zeros(found.pop() if len(found) == 1 else ()) for first, found in shapes.items()},
    )


def zero_bias(step: Linear) -> Array:
    """No change of a bias, by output channel."""
    return jnp.zeros((step.weight.shape[step.weight_axis], *(1,) * (-step.channel - 1)))


def tied(layout: Plan, qparams: QParams) -> Mapping[str, str]:
    """The points whose scales may change, each with the first of those that must keep their ratio to its: tensors that are
    summed or compared with each other."""
    return _tied(layout, frozenset(name for name, a in qparams.tensors.items() if a.axis is not None))


@lru_cache(maxsize=32)
def _tied(layout: Plan, per_channel: frozenset[str]) -> Mapping[str, str]:
    keys = dict.fromkeys([*layout.inputs, *layout.points])
    groups: dict[int, list[str]] = {}
    for key, group in share(layout, {key: key in per_channel for key in keys}).group.items():
        groups.setdefault(group, []).append(key)
    whole = lambda key: is_integer(layout.graph, key) or is_boolean(layout.graph, key)
    fixed = lambda key: key in layout.inputs or key in layout.graph.pinned or whole(key)
    return {key: members[0] for members in groups.values() if not any(map(fixed, members)) for key in members}


def applied(layout: Plan, qparams: QParams, learned: Learned) -> tuple[Plan, QParams]:
    """The plan and the quantizers with what was learned."""
    weights, biases = learned.weights, learned.biases
    steps = tuple(
        replace(s, weight=weights[s.out], bias=s.bias + biases.get(s.out, 0))
        if isinstance(s, Linear) and s.out in weights
        else s
        for s in layout.steps
    )
    xp = array_namespace(*jax.tree.leaves(learned))
    factors = {name: xp.exp(learned.scales[first]) for name, first in tied(layout, qparams).items()}
    tensors = {n: replace(a, scale=a.scale * factors[n]) if n in factors else a for n, a in qparams.tensors.items()}
    changed = replace(layout, steps=steps)
    return changed, same_range(changed, replace(qparams, tensors=tensors))
