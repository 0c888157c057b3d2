"""Quantizers that a model states for known tensors, behind nodes that move or scale them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from fheq.affine import LEAVES, Affine
from fheq.graph import Node, TensorType, is_float
from fheq.interpret import run_node
from fheq.ops.arguments import dtype_of
from fheq.ops.table import Kind, lookup
from fheq.rewriting.channels import channel_axis, channel_numbers
from fheq.rewriting.evaluation import guarded, type_of


def passed_on(
    node: Node, known: Mapping[str, np.ndarray], pins: Mapping[str, Affine], values: Mapping[str, np.ndarray]
) -> dict[str, Affine]:
    """The quantizers of a node's outputs that follow from those of its inputs.

    Args:
        known: its inputs, all of them.
        pins: quantizers of known tensors.
        values: its outputs.
    """
    first = next((name for name in node.inputs if name), "")
    if first in pins and is_float_cast(node, {first: type_of(known[first])}):
        return {node.outputs[0]: pins[first]}
    if first in pins and lookup(node).kind is Kind.MOVEMENT:
        return _moved_pins(node, known, pins[first])
    if node.op in ("Mul", "Div") and not node.domain:
        return _scaled_pins(node, known, pins, values)
    return {}


def is_float_cast(node: Node, types: Mapping[str, TensorType]) -> bool:
    """Whether a node changes the precision of real values alone, which integers on a grid do not notice."""
    if node.op != "Cast" or node.domain or not is_float(types[node.inputs[0]].dtype):
        return False
    return is_float(dtype_of(node, node.attrs["to"]))


def _moved_pins(node: Node, known: Mapping[str, np.ndarray], affine: Affine) -> dict[str, Affine]:
    """The quantizer of a pinned constant after a movement; none where its channels no longer lie along one axis."""
    if affine.axis is None and all(np.ndim(getattr(affine, leaf)) == 0 for leaf in LEAVES):
        return {name: affine for name in node.outputs if name}
    source = next(name for name in node.inputs if name)
    shape = known[source].shape
    if affine.axis is None:  # leaves that vary along several axes move as the tensor does
        leaves = {leaf: np.broadcast_to(getattr(affine, leaf), shape) for leaf in LEAVES}
        moved_leaves: dict[str, Any] = {leaf: _moved(node, known, source, value) for leaf, value in leaves.items()}
        fillers = any(np.any(v <= 0) for v in moved_leaves["scale"])
        rows = {} if fillers else {n: {leaf: v[i] for leaf, v in moved_leaves.items()} for i, n in enumerate(node.outputs)}
        return {name: replace(affine, **leaves) for name, leaves in rows.items() if name}
    moved = {}
    for name, result in zip(node.outputs, _moved(node, known, source, channel_numbers(shape, affine.axis))):
        place = channel_axis(result)
        if name and place is not None:
            axis, order = place
            taken: dict[str, Any] = {leaf: _taken(getattr(affine, leaf), order) for leaf in LEAVES}
            moved[name] = replace(affine, axis=axis - np.ndim(result), **taken)
    return moved


def _moved(node: Node, known: Mapping[str, np.ndarray], source: str, values: np.ndarray) -> list[np.ndarray]:
    """What a movement makes of other values in place of its data."""
    results = guarded(node, lambda: run_node(node, lambda n: values if n == source else jnp.asarray(known[n]), known))
    return [np.asarray(result) for result in results]


def _taken(leaf: Any, order: np.ndarray) -> Any:
    return np.asarray(leaf)[order] if np.ndim(leaf) == 1 else leaf


def _scaled_pins(
    node: Node, known: Mapping[str, np.ndarray], pins: Mapping[str, Affine], values: Mapping[str, np.ndarray]
) -> dict[str, Affine]:
    """The quantizer of a pinned constant times (or by) a positive one: the same integers in other steps."""
    positions = [i for i, name in enumerate(node.inputs) if name in pins]
    if len(positions) != 1 or (node.op == "Div" and positions == [1]):
        return {}
    (name, value), source = next(iter(values.items())), node.inputs[positions[0]]
    factor = known[node.inputs[1 - positions[0]]].astype(np.float64)
    if value.shape != known[source].shape or not np.all(factor > 0):
        return {}
    affine = pins[source].expanded(value.ndim)
    factor = np.reciprocal(factor) if node.op == "Div" else factor
    leaves = {leaf: np.broadcast_to(getattr(affine, leaf), value.shape) for leaf in LEAVES}
    leaves["scale"] = np.asarray(affine.scale) * factor
    scaled: dict[str, Any] = {k: np.broadcast_to(v, value.shape) for k, v in leaves.items()}
    return {name: replace(affine, **scaled, axis=None)}
