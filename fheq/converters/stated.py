"""Whether the quantizers that a model states reach every op that needs one."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fheq.affine import Affine
from fheq.errors import QuantizationError
from fheq.graph import Graph, Node, describe
from fheq.ops.table import Kind, lookup
from fheq.origins import is_boolean
from fheq.planning.plan import Plan
from fheq.steps import Join, Linear, Maximum, Operand, Product, Step, Sum


class MissingQuantizerError(QuantizationError, ValueError):
    """A quantization-aware model leaves the input of a linear op without a quantizer."""


def carry_quantizers(graph: Graph) -> Graph:
    """Pins the results of Relu of quantized tensors: they are on the same grid, whatever movement or maximum is between.

    The graph itself where there is none.
    """
    known = dict(graph.pinned)
    pinned = dict(graph.pinned)
    for node in graph.nodes:
        affine = _held(graph, node, known)
        if affine is None:
            continue
        if node.op == "Relu":
            affine = replace(affine, qmin=np.maximum(affine.qmin, np.minimum(affine.zero_point, affine.qmax)))
            pinned.setdefault(node.outputs[0], affine)
        known.update((out, affine) for out in node.outputs if out and out not in known)
    return graph if len(pinned) == len(graph.pinned) else graph.replace(pinned=pinned)


def _held(graph: Graph, node: Node, known: dict[str, Affine]) -> Affine | None:
    """The quantizer of the one computed input of a node that keeps values on their grid."""
    computed = [name for name in node.inputs if name and name not in graph.constants]
    kind = lookup(node).kind
    if len(computed) != 1 or computed[0] not in known:
        return None
    affine = known[computed[0]]
    if node.op == "Relu":
        return affine
    return affine if kind in (Kind.MOVEMENT, Kind.MAX) and affine.axis is None else None


def check_quantized(layout: Plan) -> None:
    """Checks that a quantizer reaches the input of every linear op: products with weights or between encrypted matrices, and
    average pools. Sums and products of two encrypted tensors take the bits that the caller gives.

    Raises:
        MissingQuantizerError: naming every such tensor and its node.
    """
    missing = [
        f"tensor {operand.tensor!r}, input of {describe(step.node)}"
        for step in layout.steps
        if _is_linear(step)
        for operand in step.operands
        if not _reached(layout, operand)
    ]
    if missing:
        raise MissingQuantizerError(
            f"no quantizer reaches {'; '.join(missing)}: put a quantizer (such as Brevitas' QuantIdentity) there, or use "
            "PostTrainingAffineQuantization"
        )


def _is_linear(step: Step) -> bool:
    pool = isinstance(step, Sum) and step.node.op.endswith("AveragePool")
    return isinstance(step, Linear) or pool or (isinstance(step, Product) and step.contract)


def _reached(layout: Plan, operand: Operand) -> bool:
    key = operand.key
    if key in layout.graph.pinned or key in layout.adopted or is_boolean(layout.graph, key):
        return True
    port = next((p for p in layout.graph.inputs if p.name == key), None)
    if port is not None:
        return port.type.dtype.kind in "iub"
    step = next((s for s in layout.steps if s.out == key), None)
    return isinstance(step, Maximum | Join) and all(_reached(layout, o) for o in step.operands)
