"""Scans that compute distances to one point after the other, as skl2onnx writes neighbours and kernels, in one CDist."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from fheq.graph import Node, TensorType
from fheq.onnx.subgraphs import Subgraph, constant

METRICS: Mapping[tuple[str, ...], str] = {
    ("Sub", "ReduceSumSquare"): "sqeuclidean",
    ("Sub", "Abs", "ReduceSum"): "cityblock",
    ("Sub", "Abs", "Pow", "ReduceSum"): "minkowski",
    ("Sub", "Abs", "ReduceMax"): "chebyshev",
}
"""By the operators that a body applies to a tensor `(N, F)` and a point `(F,)`."""
_VERSION = 13


def scanned_distances(node: Node, types: Mapping[str, TensorType]) -> list[Node] | None:
    """The nodes in place of a Scan of opset 9 on, or None where it computes something else."""
    body: Subgraph = node.attrs["body"]
    plain = ("scan_input_axes", "scan_input_directions", "scan_output_axes", "scan_output_directions")
    if len(node.inputs) != 2 or len(body.outputs) != 2 or any(any(node.attrs.get(name) or ()) for name in plain):
        return None
    x, points = node.inputs
    if node.attrs["num_scan_inputs"] != 1 or any(len(types[name].shape) != 2 for name in node.inputs):
        return None
    made = {name: n for n in body.nodes for name in n.outputs}
    if _source(made, body.outputs[0]) != body.inputs[0]:
        return None
    chain = _chain(made, body.outputs[1])
    metric = METRICS.get(tuple(n.op for n in chain))
    if metric is None or {_source(made, name) for name in chain[0].inputs} != set(body.inputs):
        return None
    reduction = chain[-1]
    axes = reduction.attrs.get("axes", _known(body, made, reduction.inputs[1]) if len(reduction.inputs) > 1 else None)
    if reduction.attrs.get("keepdims", 1) or axes is None or tuple(np.ravel(axes)) not in ((1,), (-1,)):
        return None
    attrs: dict[str, object] = {"metric": metric}
    rest: list[Node] = []
    found = scan = f"{node.outputs[1]}/distances"
    if metric == "minkowski":  # whose root comes after the Scan
        power = _known(body, made, chain[2].inputs[1])
        if power is None or power.size != 1:
            return None
        attrs["p"] = float(power.reshape(()))
        exponent, found = f"{scan}/power", f"{scan}/powers"
        rest = [
            constant(exponent, power.reshape(()).astype(types[x].dtype)),
            _node("Pow", (scan, exponent), found),
        ]
    distances = Node(scan, "CDist", (x, points), (scan,), MappingProxyType(attrs), "com.microsoft", 1)
    turned = _node("Transpose", (found,), node.outputs[1], perm=(1, 0))
    return [distances, *rest, turned, *([_node("Identity", (x,), node.outputs[0])] if node.outputs[0] else [])]


def _node(op: str, inputs: tuple[str, ...], out: str, **attrs: object) -> Node:
    return Node(f"{out}/{op}", op, inputs, (out,), MappingProxyType(attrs), "", _VERSION)


def _source(made: Mapping[str, Node], name: str) -> str:
    """What a name is a copy of."""
    while name in made and made[name].op == "Identity":
        name = made[name].inputs[0]
    return name


def _chain(made: Mapping[str, Node], name: str) -> list[Node]:
    """The nodes that make a tensor, each by the first input of the next, from the first one on."""
    found: list[Node] = []
    while (name := _source(made, name)) in made:
        found.append(made[name])
        name = found[-1].inputs[0]
    return found[::-1]


def _known(body: Subgraph, made: Mapping[str, Node], name: str) -> np.ndarray | None:
    """The value of a constant of the body."""
    name = _source(made, name)
    if name in made and made[name].op == "Constant":
        return made[name].attrs.get("value")
    return body.constants.get(name)
