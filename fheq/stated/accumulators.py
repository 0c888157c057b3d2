"""Accumulators that a model states: `fheq.Accumulator` nodes, which `export_qdq` writes as a function of plain ONNX.

Such a node follows a product, a sum or a difference. It rounds its integers as the circuit does, and says what range of them
sizes the circuit, so that import finds the program that was exported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from fheq.affine import ACCUMULATOR_ROUNDINGS, Affine
from fheq.errors import ModelError
from fheq.graph import Graph, Node, describe
from fheq.ops.table import Kind, Op, register
from fheq.rewriting.edit import bypassed

DOMAIN, NAME = "fheq", "Accumulator"
INPUTS = ("x", "scale", "zero_point", "qmin", "qmax", "cell")
"""A real sum, and what broadcasts against it: `Affine` leaves of its integers, and 2^lsbs."""

STILL = 1e-30
"""The scale of a sum of nothing."""

UNIT_ERROR = 1e-5  # relative; scales of sums are products of float32 ones


def accumulator_row(node: Node, x: Any, scale: Any, zero_point: Any, qmin: Any, qmax: Any, cell: Any) -> Any:
    """fheq.Accumulator: a sum whose integers have lost their low bits, half up. Its range is not clipped to."""
    acc = jnp.round(x / scale + zero_point)
    return (scale * (jnp.floor(acc / cell + 0.5 * (cell > 1)) * cell - zero_point)).astype(x.dtype)


register(Op(NAME, 1, Kind.ELEMENTWISE, accumulator_row, domain=DOMAIN))


def states_accumulator(node: Node) -> bool:
    """Whether a node is a stated accumulator."""
    return (node.domain, node.op) == (DOMAIN, NAME)


def take_accumulators(graph: Graph) -> tuple[Graph, dict[str, Affine]]:
    """The graph without its stated accumulators, and those by the tensor that they follow.

    Raises:
        ModelError: one whose parameters are no accumulator's.
    """
    found = {node.inputs[0]: _affine(node, graph.constants) for node in graph.nodes if states_accumulator(node)}
    return bypassed(graph, states_accumulator), found


def _affine(node: Node, known: Mapping[str, np.ndarray]) -> Affine:
    """The quantizer of a stated accumulator; its leaves broadcast against the tensor."""
    absent = [label for label, name in zip(INPUTS[1:], node.inputs[1:]) if name not in known]
    if absent or len(node.inputs) != len(INPUTS):
        raise ModelError(f"{describe(node)}: its {', '.join(absent) or 'parameters'} must be known; export the model again")
    scale, zero_point, qmin, qmax, cell = (np.asarray(known[name], np.float64) for name in node.inputs[1:])
    rounding = node.attrs.get("rounding", "exact")
    lsbs = np.log2(np.where(cell > 0, cell, 0.5))
    whole = np.all(lsbs == np.round(lsbs)) and np.all(lsbs >= 0) and np.all(qmin <= qmax) and cell.size == 1
    if not whole or not np.all((scale > 0) & np.isfinite(scale)) or rounding not in ACCUMULATOR_ROUNDINGS:
        raise ModelError(f"{describe(node)}: its parameters are no accumulator's; export the model again")
    return Affine(scale, zero_point, qmin, qmax, lsbs.reshape(()), rounding=rounding)


def fits(stated: Affine, unit: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Whether a stated accumulator, whose scale broadcasts against a shape, counts in steps of `unit`, as the sum does that
    it follows."""
    unit = np.where(unit == 0, STILL, np.abs(unit))
    return bool(np.all(np.abs(np.broadcast_to(stated.scale, shape) - unit) <= UNIT_ERROR * unit))
