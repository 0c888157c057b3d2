"""What reconstruction and bias correction learn, and the graph and quantizers with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.arrays.namespace import array_namespace
from fheq.client.outputs import rejoined
from fheq.fitting.accumulators import same_range
from fheq.graph import Graph
from fheq.planning.plan import Plan, plan
from fheq.qparams import QParams
from fheq.rewriting.weights import replaceable, with_weights
from fheq.steps import Linear

Array = Any


def with_learned(graph: Graph, qparams: QParams, learned: Learned) -> tuple[Graph, QParams]:
    """The graph and the quantizers with what `tune` learned for them."""
    layout = plan(graph)
    tuned, qparams = applied(layout, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), qparams), learned)
    changed = {s.out: s for s in tuned.steps if isinstance(s, Linear) and s.out in learned.weights}
    return rejoined(graph, with_weights(layout.graph, changed)) if changed else graph, qparams


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Learned:
    """What is tuned: weights and biases by the tensor that a step makes, and logarithms of factors of points' scales."""

    weights: dict[str, Array]
    biases: dict[str, Array]
    scales: dict[str, Array]


def initial(layout: Plan, qparams: QParams) -> Learned:
    """The model's own weights, no change of biases and scales."""
    steps = [step for step in layout.steps if isinstance(step, Linear) and replaceable(layout.graph, step)]
    bias = lambda s: jnp.zeros((s.weight.shape[s.weight_axis], *(1,) * (-s.channel - 1)))
    free = [name for name in layout.points if name in qparams.tensors and name not in layout.graph.pinned]
    return Learned(
        {s.out: jnp.asarray(s.weight, jnp.float32) for s in steps},
        {s.out: bias(s) for s in steps},
        {name: jnp.zeros(np.shape(qparams.tensors[name].scale)) for name in free},
    )


def applied(layout: Plan, qparams: QParams, learned: Learned) -> tuple[Plan, QParams]:
    """The plan and the quantizers with what was learned."""
    weights, biases = learned.weights, learned.biases
    steps = tuple(
        replace(s, weight=weights[s.out], bias=s.bias + biases[s.out]) if isinstance(s, Linear) and s.out in weights else s
        for s in layout.steps
    )
    xp = array_namespace(*jax.tree.leaves(learned))
    tensors = {
        name: replace(a, scale=a.scale * xp.exp(learned.scales[name])) if name in learned.scales else a
        for name, a in qparams.tensors.items()
    }
    tuned = replace(layout, steps=steps)
    return tuned, same_range(tuned, replace(qparams, tensors=tensors))
