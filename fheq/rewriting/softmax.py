"""Softmax and LogSoftmax that a model spells out, as one node each: they then get the form that takes fewest tables."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fheq.graph import Graph, Node
from fheq.rewriting.edit import VERSION, Draft
from fheq.rewriting.prune import prune

_KEEPS_ORDER = ("Reshape", "Unsqueeze", "Squeeze", "Flatten", "Identity")


def recognise_softmax(graph: Graph) -> Graph:
    """Rewrites exp(x - m) / sum(exp(x - m)) and (x - m) - log(sum(exp(x - m))), where m is one number along the axis of the
    sum (any: it does not change the result) or absent.
    """
    made = graph.producers()
    draft = Draft(graph)
    for node in graph.nodes:
        draft.write(_softmax(graph, made, node) or _log_softmax(graph, made, node) or node)
    return prune(draft.finish())


def _softmax(graph: Graph, made: Mapping[str, Node], node: Node) -> Node | None:
    if node.op != "Div" or node.domain:
        return None
    top, bottom = node.inputs
    axis = _summed_axis(graph, made, bottom, top)
    exponential = made.get(top)
    if axis is None or exponential is None or exponential.op != "Exp":
        return None
    return _named(graph, made, node, "Softmax", exponential.inputs[0], axis)


def _log_softmax(graph: Graph, made: Mapping[str, Node], node: Node) -> Node | None:
    if node.op != "Sub" or node.domain:
        return None
    x, total = node.inputs
    log = _origin(made, total)
    if log is None or log.op != "Log":
        return None
    sum_ = _origin(made, log.inputs[0])
    exponential = made.get(sum_.inputs[0]) if sum_ is not None and sum_.op == "ReduceSum" else None
    if exponential is None or exponential.op != "Exp" or exponential.inputs[0] != x:
        return None
    axis = _summed_axis(graph, made, log.inputs[0], exponential.outputs[0])
    if axis is None or graph.types[total].shape != _kept(graph.types[x].shape, axis):
        return None
    return _named(graph, made, node, "LogSoftmax", x, axis)


def _named(graph: Graph, made: Mapping[str, Node], node: Node, op: str, shifted: str, axis: int) -> Node:
    x, shape, before = shifted, graph.types[shifted].shape, made.get(shifted)
    if before is not None and before.op == "Sub":
        source, shift = before.inputs
        if graph.types[source].shape == shape and _one_along(graph.types[shift].shape, shape, axis):
            x = source
    return Node(node.name, op, (x,), node.outputs, MappingProxyType({"axis": axis}), "", VERSION)


def _origin(made: Mapping[str, Node], name: str) -> Node | None:
    """The node that computes a tensor, but for a change of its shape."""
    node = made.get(name)
    while node is not None and node.op in _KEEPS_ORDER:
        node = made.get(node.inputs[0])
    return node


def _summed_axis(graph: Graph, made: Mapping[str, Node], total: str, terms: str) -> int | None:
    """The axis over which one tensor is the sum of another, as it broadcasts against it."""
    node = _origin(made, total)
    if node is None or node.op != "ReduceSum" or node.inputs[0] != terms:
        return None
    shape = graph.types[terms].shape
    axes = graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else node.attrs.get("axes")
    if axes is None or len(axes) != 1:
        return None
    axis = int(axes[0]) % len(shape)
    return axis if graph.types[total].shape == _kept(shape, axis) else None


def _kept(shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    return (*shape[:axis], 1, *shape[axis + 1 :])


def _one_along(shift: tuple[int, ...], shape: tuple[int, ...], axis: int) -> bool:
    return len(shift) == 0 or (len(shift) == len(shape) and shift[axis] == 1)
