"""Activations and quantizers before the maximum: f(max(x)) = max(f(x)) where f does not decrease."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from fheq.affine import Affine
from fheq.graph import Graph, Node, is_float
from fheq.ops.table import Kind, find
from fheq.origins import elementwise_source
from fheq.rewriting.edit import Draft
from fheq.rewriting.evaluation import evaluated

_ALWAYS = (
    *("Atan", "Asinh", "Ceil", "Clip", "Erf", "Exp", "Floor", "Identity", "Relu", "Round"),
    *("Sigmoid", "Sign", "Sinh", "Softplus", "Softsign", "Tanh"),
)
_WITH_SIGNS = {  # attributes that must not be negative
    "Celu": ("alpha",),
    "Elu": ("alpha",),
    "HardSigmoid": ("alpha",),
    "LeakyRelu": ("alpha",),
    "Selu": ("alpha", "gamma"),
    "ThresholdedRelu": ("alpha",),
}
_WINDOWS = ("GlobalMaxPool", "MaxPool")


def activate_before_maximum(graph: Graph) -> Graph:
    """The graph with non-decreasing functions of a maximum (or minimum) that nobody else reads moved to what it compares.

    Where the compared tensor needs a table anyway, being no quantized one, the function costs nothing there, the maximum
    compares what the activation leaves of the range, and its result needs no table.
    """
    return _repeated(_exchanged, graph)


def quantize_before_movement(graph: Graph) -> Graph:
    """The graph with each stated quantizer of a maximum, a choice or a join of several tensors moved to those tensors.

    Integers on different grids cannot be compared or joined; those of the grid that follows can, with the same result, since
    a quantizer does not decrease. A tensor that is quantized already takes both quantizers in one table, and an input of the
    model takes over the quantizer itself.
    """
    return _repeated(_quantized_before, graph)


def _repeated(change: Callable[[Graph, Node], Graph | None], graph: Graph) -> Graph:
    """The graph with a change of one node after the other, until there is none to change."""
    while (changed := next((new for node in graph.nodes if (new := change(graph, node)) is not None), None)) is not None:
        graph = changed
    return graph


def _quantized_before(graph: Graph, node: Node) -> Graph | None:
    """The graph with the quantizer that alone reads a node moved to the node's inputs."""
    op = find(node)
    if op is None or node.domain or (op.kind is not Kind.MAX and node.op not in ("Max", "Min", "Concat", "Where")):
        return None
    readers = graph.consumers().get(node.outputs[0], [])
    outputs = {port.name for port in graph.outputs}
    if len(readers) != 1 or readers[0].op != "FakeQuant" or node.outputs[0] in outputs or len(node.outputs) > 1:
        return None
    if elementwise_source(graph, node.outputs[0]) != node.outputs[0]:
        return None  # one table, with the quantizer in it
    quantizer, (x, *parameters) = readers[0], readers[0].inputs
    if x != node.outputs[0] or any(graph.constants[name].size != 1 for name in parameters):
        return None
    affine, draft = graph.pinned.get(quantizer.outputs[0]), Draft(graph)
    data = node.inputs[1:] if node.op == "Where" else node.inputs[:1] if op.kind is Kind.MAX else node.inputs
    if any(not is_float(draft.types[name].dtype) for name in data):
        return None
    for other in graph.nodes:
        if other is node:
            made = {name: _quantized(draft, quantizer, name, affine) for name in dict.fromkeys(data)}
            inputs = tuple(made.get(name, name) for name in node.inputs)
            draft.write(replace(node, inputs=inputs, outputs=quantizer.outputs))
        elif other is not quantizer:
            draft.write(other)
    return draft.finish()


def _quantized(draft: Draft, quantizer: Node, name: str, affine: Affine | None) -> str:
    """A tensor after a quantizer, its value where it is known."""
    out = draft.fresh(f"{quantizer.outputs[0]}/each")
    moved = replace(quantizer, inputs=(name, *quantizer.inputs[1:]), outputs=(out,))
    if name in draft.constants:
        return draft.constant(out, evaluated(moved, draft.constants, draft.types)[out])
    draft.write(moved)
    if affine is not None:
        draft.pinned[out] = affine
    return out


def _exchanged(graph: Graph, node: Node) -> Graph | None:
    op = find(node)
    if op is None or op.kind is not Kind.MAX:
        return None
    readers = graph.consumers()
    if len(readers[node.inputs[0]]) > 1 or not _needs_table(graph, node.inputs[0]):
        return None
    chain = _chain(graph, node, readers)
    if not chain:
        return None
    draft = Draft(graph)
    moved = {id(function) for function in chain}
    for other in graph.nodes:
        if other is node:
            value, read = node.inputs[0], node.outputs[0]
            for function in chain:
                inputs = tuple(value if name == read else name for name in function.inputs)
                read, value = function.outputs[0], draft.fresh(f"{function.outputs[0]}/each")
                draft.write(replace(function, inputs=inputs, outputs=(value,)))
            draft.write(replace(node, inputs=(value, *node.inputs[1:]), outputs=(read, *node.outputs[1:])))
        elif id(other) not in moved:
            draft.write(other)
    return draft.finish()


def _chain(graph: Graph, node: Node, readers: Mapping[str, list[Node]]) -> list[Node]:
    """The non-decreasing functions after a maximum, up to the last one that is not affine."""
    outputs = {port.name for port in graph.outputs}
    tensor, chain, curved = node.outputs[0], [], 0
    while tensor not in outputs and tensor not in graph.pinned and len(readers.get(tensor, [])) == 1:
        (function,) = readers[tensor]
        if not non_decreasing(graph, node, function, tensor):
            break
        chain.append(function)
        tensor = function.outputs[0]
        curved = curved if find(function).affine else len(chain)  # type: ignore[union-attr]
    return chain[:curved]


def non_decreasing(graph: Graph, maximum: Node, node: Node, tensor: str) -> bool:
    """Whether an elementwise node does not decrease in `tensor`, alike for all that the maximum compares."""
    known = [graph.constants[name] for name in node.inputs if name in graph.constants]
    shape, result = graph.types[tensor].shape, graph.types[node.outputs[0]].shape
    spatial = len(shape) - 2 if maximum.op in _WINDOWS else len(shape)
    same = all(math.prod(v.shape[max(v.ndim - spatial, 0) :]) == 1 for v in known)
    alone = [name for name in node.inputs if name and name not in graph.constants] == [tensor]
    if node.domain or not same or not alone or shape != result or node.outputs[0] in graph.pinned:
        return False
    if node.op in _WITH_SIGNS:
        return all(node.attrs[name] >= 0 for name in _WITH_SIGNS[node.op])
    if node.op in ("Mul", "PRelu"):
        return all(np.all(v >= 0) for v in known)
    if node.op in ("Sub", "Div"):
        return node.inputs[0] == tensor and (node.op == "Sub" or all(np.all(v > 0) for v in known))
    return node.op in ("Add", *_ALWAYS)


def _needs_table(graph: Graph, tensor: str) -> bool:
    """Whether what a maximum compares is not quantized already."""
    node = graph.producers().get(tensor)
    if node is None or tensor in graph.pinned:
        return False
    kind = find(node).kind  # type: ignore[union-attr]
    if kind is Kind.MOVEMENT:
        return all(_needs_table(graph, name) for name in node.inputs if name and name not in graph.constants)
    return kind is not Kind.MAX and node.op != "FakeQuant"
