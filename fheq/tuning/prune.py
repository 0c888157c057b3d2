"""Structured pruning: channels that a model can do without, removed with their tables.

A channel between two linear layers costs a table for each of its elements. Where the other channels can stand in for it, the
weights that read it become 0 and the other weights of the reading layers make up for it by least squares (see
`fheq.tuning.surgeon`). Lowering then drops the tables that nothing reads.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import enable_x64

from fheq.batching import check_arrays
from fheq.client.outputs import rejoined
from fheq.errors import DataError
from fheq.graph import Graph, Node, is_float
from fheq.integers.integer_weights import apply_form
from fheq.interpret import run_node
from fheq.planning.plan import Plan, plan
from fheq.rewriting.weights import with_weights
from fheq.steps import Linear
from fheq.tuning.channel_groups import Group, read_by_linear
from fheq.tuning.effects import effects
from fheq.tuning.surgeon import Reader, features


def prune(graph: Graph, *inputs: Any, tolerance: float) -> Graph:
    """The graph without the channels that it can do without, on the data given.

    A channel is removed while the relative squared error that this adds to the model's outputs is no more than `tolerance`
    times the share of the model's tables that it takes. The error is that of the layers that read it, weighed by derivatives
    of the outputs (see `fheq.tuning.effects`); in a model that rounds or decides, where these say nothing, it is the
    relative error of these layers' results. The weights of removed channels are 0.

    Args:
        graph: what `import_onnx` gives.
        inputs: calibration data, as for `evaluate`; no labels.
        tolerance: relative squared error of the outputs for all of the model's tables; 0 removes only what is never used.

    Raises:
        DataError: the data do not fit, or the tolerance is negative.
    """
    if not tolerance >= 0:
        raise DataError(f"tolerance must be at least 0, got {tolerance}")
    arrays = check_arrays(graph.inputs, inputs)
    layout = plan(graph)
    groups = read_by_linear(layout)
    if not groups:
        return graph
    weighed = effects(layout, arrays)
    with enable_x64():
        changed = _Walk(layout, groups, tolerance, weighed).run(arrays)
    return rejoined(graph, with_weights(layout.graph, changed)) if changed else graph


class _Walk:
    """Runs the model and its pruned copy side by side, node by node; a group is pruned when its first reader comes."""

    def __init__(self, layout: Plan, groups: list[Group], tolerance: float, weighed: Mapping[str, np.ndarray]):
        self.layout, self.weighed = layout, weighed
        self.graph = _wide(layout.graph)
        self.tolerance = tolerance
        self.groups = {group.readers[0].out: group for group in groups}
        self.changed: dict[str, Linear] = {}

    def run(self, arrays: list[np.ndarray]) -> dict[str, Linear]:
        """The changed steps, by the tensor that each makes."""
        exact: dict[str, Any] = {name: _widened(jnp.asarray(a)) for name, a in zip(self.layout.inputs, arrays)}
        pruned = dict(exact)
        last = self.last_uses()
        for i, node in enumerate(self.graph.nodes):
            group = self.groups.get(node.outputs[0])
            if group is not None:
                self.solve(group, exact, pruned)
            exact.update(zip(node.outputs, self.node(node, exact)))
            step = self.changed.get(node.outputs[0])
            values = self.node(node, pruned) if step is None else (jax.vmap(partial(_apply, step))(features(step, pruned)),)
            pruned.update(zip(node.outputs, values))
            for name in last.get(i, ()):
                del exact[name], pruned[name]
        return self.changed

    def last_uses(self) -> dict[int, list[str]]:
        """The computed tensors that nothing after a node needs, by the node's number."""
        steps = {step.out: step for step in self.layout.steps}
        last: dict[str, int] = {}
        for i, node in enumerate(self.graph.nodes):
            step = steps.get(node.outputs[0])
            keys = [operand.key for operand in step.operands] if step is not None else []
            last.update((name, i) for name in (*node.inputs, *keys) if name and name not in self.graph.constants)
        ends: dict[int, list[str]] = {}
        for name, i in last.items():
            ends.setdefault(i, []).append(name)
        return ends

    def node(self, node: Node, env: dict[str, Any]) -> tuple[Any, ...]:
        computed = [name for name in dict.fromkeys(node.inputs) if name in env]

        def one(*values: Any) -> tuple[Any, ...]:
            own = dict(zip(computed, values))
            read = lambda name: own[name] if name in own else jnp.asarray(self.graph.constants[name])
            return run_node(node, read, self.graph.constants)

        return tuple(map(_widened, jax.vmap(one)(*(env[name] for name in computed))))  # a Cast narrows

    def solve(self, group: Group, exact: dict[str, Any], pruned: dict[str, Any]) -> None:
        known = all(step.out in self.weighed for step in group.readers)
        readers = [
            Reader.observe(step, features(step, exact), features(step, pruned), self.weighed[step.out] if known else None)
            for step in group.readers
        ]
        limit = self.tolerance * group.share
        alive = np.ones(readers[0].channels, bool)
        while alive.sum() > 1:
            errors = np.where(alive, sum(reader.errors() for reader in readers), np.inf)
            at = int(np.argmin(errors))
            if errors[at] > limit:
                break
            alive[at] = False
            readers = [reader.without(at) for reader in readers]
        if not alive.all():
            self.changed.update((reader.step.out, reader.pruned(alive)) for reader in readers)


def _apply(step: Linear, x: Any) -> Any:
    return apply_form(step, x, jnp.asarray(step.weight)) + step.bias


@lru_cache(maxsize=32)
def _wide(graph: Graph) -> Graph:
    """The graph in float64."""
    constants = {n: v.astype(np.float64) if v.dtype == np.float32 else v for n, v in graph.constants.items()}
    return graph.replace(constants=constants)


def _widened(value: Any) -> Any:
    """A float array of JAX in float64 (where 64-bit types are enabled)."""
    return value.astype(jnp.float64) if is_float(value.dtype) else value
