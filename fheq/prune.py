"""Structured pruning: channels that a model can do without, removed with their tables.

A channel between two linear layers costs a table for each of its elements. Where the other channels can stand in for it, the
weights that read it become 0 and the other weights of the reading layers make up for it by least squares: the optimal brain
surgeon (Hassibi and Stork, NeurIPS 1992; blockwise in Optimal Brain Compression, arXiv 2208.11580), with whole channels as
units. Lowering then drops the tables that nothing reads.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import enable_x64

from fheq.batching import check_arrays
from fheq.calibrate import wide
from fheq.client import rejoined
from fheq.errors import DataError
from fheq.fake_quant import operand_values
from fheq.graph import Graph, Node
from fheq.integers import apply_form
from fheq.interpret import run_node
from fheq.plan import Plan, plan
from fheq.qparams import QParams
from fheq.rewriting.weights import replaceable, with_weights
from fheq.steps import Linear

CHUNK = 64  # samples whose inputs are multiplied out together
RIDGE = 1e-4  # of the mean variance of a layer's inputs: what keeps few samples from fitting noise


def prune(graph: Graph, *inputs: Any, tolerance: float) -> Graph:
    """The graph without the channels that it can do without, on the data given.

    A channel is removed while the relative squared error that this adds to the results of the layers that read it is no
    more than `tolerance` times the share of the model's tables that it takes. The weights of removed channels are 0.

    Args:
        graph: what `import_onnx` gives.
        inputs: calibration data, as for `evaluate`; no labels.
        tolerance: relative squared error of a layer for all of the model's tables; 0 removes only what is never used.

    Raises:
        DataError: the data do not fit, or the tolerance is negative.
    """
    if not tolerance >= 0:
        raise DataError(f"tolerance must be at least 0, got {tolerance}")
    arrays = check_arrays(graph.inputs, inputs)
    layout = plan(graph)
    groups = _groups(layout)
    if not groups:
        return graph
    with enable_x64():
        changed = _Walk(layout, groups, tolerance).run(arrays)
    return rejoined(graph, with_weights(layout.graph, changed)) if changed else graph


@dataclass(frozen=True)
class Group:
    """A tensor whose channels may go, and the layers that read it.

    Args:
        readers: linear steps; the inputs of all have the same channels.
        share: share of the model's tables that one channel takes.
    """

    key: str
    readers: tuple[Linear, ...]
    share: float


def _groups(layout: Plan) -> list[Group]:
    """The tensors that linear steps alone read, all with the same channels."""
    readers: dict[str, list[Any]] = {}
    for step in layout.steps:
        for operand in step.operands:
            readers.setdefault(operand.key, []).append(step)
    kept = {operand.key for operand in layout.outputs.values() if operand is not None}
    tables = sum(int(np.prod(layout.shape(point))) for point in layout.points)
    found = []
    for key, steps in readers.items():
        if key in layout.inputs or key in kept or not all(_prunable(layout, step) for step in steps):
            continue
        first, *others = (_channels(step) for step in steps)
        alike = all(len(s) == len(first) and all(map(np.array_equal, s, first)) for s in others)
        if alike and _disjoint(first):
            found.append(Group(key, tuple(steps), max(map(len, first)) / tables))
    return found


def _prunable(layout: Plan, step: Any) -> bool:
    plain = isinstance(step, Linear) and replaceable(layout.graph, step) and step.x.slope is None
    return plain and step.options.get("group", 1) == 1 and (step.form == "conv" or step.weight.ndim == 2)


def _channels(step: Linear) -> list[np.ndarray]:
    """The elements of the key that each input channel holds."""
    axis = len(step.x.shape) - 1 if step.form == "matmul" else 1
    rows = np.moveaxis(step.x.elements.reshape(step.x.shape), axis, 0).reshape(step.x.shape[axis], -1)
    return [np.unique(row[row >= 0]) for row in rows]


def _disjoint(sets: list[np.ndarray]) -> bool:
    everything = np.concatenate(sets)
    return len(np.unique(everything)) == len(everything)


class _Walk:
    """Runs the model and its pruned copy side by side, node by node; a group is pruned when its first reader comes."""

    def __init__(self, layout: Plan, groups: list[Group], tolerance: float):
        self.layout = layout
        self.graph = wide(layout.graph)
        self.tolerance = tolerance
        self.groups = {group.readers[0].out: group for group in groups}
        self.changed: dict[str, Linear] = {}

    def run(self, arrays: list[np.ndarray]) -> dict[str, Linear]:
        """The changed steps, by the tensor that each makes."""
        exact: dict[str, Any] = {name: jnp.asarray(wide_array(a)) for name, a in zip(self.layout.inputs, arrays)}
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

        return jax.vmap(one)(*(env[name] for name in computed))

    def solve(self, group: Group, exact: dict[str, Any], pruned: dict[str, Any]) -> None:
        readers = [Reader.observe(step, features(step, exact), features(step, pruned)) for step in group.readers]
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


def wide_array(a: np.ndarray) -> np.ndarray:
    """Float arrays in float64."""
    return a.astype(np.float64) if a.dtype.kind == "f" else a


def features(step: Linear, env: dict[str, Any]) -> Any:
    """The operand of a step for every sample, `(n, *operand shape)`."""
    nothing = QParams({}, {}, {})
    return jax.vmap(lambda value: operand_values(nothing, step.x, {step.x.key: value}))(env[step.x.key])


def _apply(step: Linear, x: Any) -> Any:
    return apply_form(step, x, jnp.asarray(step.weight)) + step.bias


def _rows(step: Linear, x: Any) -> np.ndarray:
    """The inputs of a step's outputs, `(positions, features)`, the features of a channel side by side."""
    if step.form == "conv":
        patches = jax.lax.conv_general_dilated_patches(
            x.reshape(-1, *x.shape[2:]),
            step.weight.shape[2:],
            step.options["strides"],
            "VALID",
            rhs_dilation=step.options["dilations"],
        )
        x = jnp.moveaxis(patches, 1, -1)
    return np.asarray(x).reshape(-1, x.shape[-1])


@dataclass(frozen=True)
class Reader:
    """A layer whose inputs are being pruned.

    Args:
        weight: `(channels, features per channel, outputs)`, in units of each output's standard deviation.
        inverse: inverse covariance of the inputs, `(channels * features, channels * features)`.
        units: standard deviation of each output.
        mean: means of the inputs; target: means of the outputs.
    """

    step: Linear
    weight: np.ndarray
    inverse: np.ndarray
    units: np.ndarray
    mean: np.ndarray
    target: np.ndarray

    @staticmethod
    def observe(step: Linear, exact: Any, pruned: Any) -> Reader:
        """The layer with the weights that give the model's results from the pruned copy's inputs, by least squares."""
        matrix = step.weight if step.form == "matmul" else step.weight.reshape(len(step.weight), -1).T
        size, count = len(matrix), 0
        shapes = (size,), matrix.shape[1:], (size, size), matrix.shape, matrix.shape[1:]
        sums: list[np.ndarray] = [np.zeros(shape) for shape in shapes]
        for at in range(0, len(exact), CHUNK):
            y = _rows(step, exact[at : at + CHUNK]) @ matrix
            x = _rows(step, pruned[at : at + CHUNK])
            count += len(x)
            for i, term in enumerate((x.sum(0), y.sum(0), x.T @ x, x.T @ y, (y**2).sum(0))):
                sums[i] = sums[i] + term
        mean, target, square, cross, power = (s / count for s in sums)
        covariance = square - np.outer(mean, mean)
        ridge = RIDGE * max(np.trace(covariance) / size, 1e-30)
        inverse = np.linalg.inv(covariance + ridge * np.eye(size))
        fitted = matrix + inverse @ (cross - np.outer(mean, target) - covariance @ matrix)
        variance = power - target**2
        units = np.sqrt(np.maximum(variance, 1e-6 * variance.max() + 1e-30))
        rows = size // (step.weight.shape[0] if step.form == "matmul" else step.weight.shape[1])
        return Reader(step, (fitted / units).reshape(-1, rows, len(units)), inverse, units, mean, target)

    @property
    def channels(self) -> int:
        """Input channels."""
        return len(self.weight)

    def errors(self) -> np.ndarray:
        """Relative squared error, averaged over the outputs, that the removal of each channel adds."""
        rows = self.weight.shape[1]
        blocks = self.inverse.reshape(self.channels, rows, self.channels, rows)
        own = blocks[np.arange(self.channels), :, np.arange(self.channels)]
        gone = np.trace(own, axis1=1, axis2=2) == 0
        solved = np.linalg.solve(np.where(gone[:, None, None], np.eye(rows), own), self.weight)
        return np.einsum("kro,kro->k", self.weight, solved) / len(self.units)

    def without(self, channel: int) -> Reader:
        """The layer without a channel, the others making up for it."""
        rows, flat = self.weight.shape[1], self.weight.reshape(len(self.inverse), -1)
        mine = slice(channel * rows, (channel + 1) * rows)
        gain = np.linalg.solve(self.inverse[mine, mine], self.inverse[mine]).T
        weight, inverse = flat - gain @ flat[mine], self.inverse - gain @ self.inverse[mine]
        weight[mine], inverse[mine], inverse[:, mine] = 0, 0, 0
        return replace(self, weight=weight.reshape(self.weight.shape), inverse=inverse)

    def pruned(self, alive: np.ndarray) -> Linear:
        """The step with its new weight and bias."""
        weight = np.where(alive[:, None, None], self.weight, 0) * self.units
        matrix = weight.reshape(len(self.inverse), -1)
        bias = self.target - self.mean @ matrix
        if self.step.form == "matmul":
            return replace(self.step, weight=matrix, bias=self.step.bias + bias)
        shape = self.step.weight.shape
        offset = (np.ravel(self.step.bias) + bias).reshape(-1, *(1,) * (len(shape) - 2))
        return replace(self.step, weight=matrix.T.reshape(shape), bias=offset)
