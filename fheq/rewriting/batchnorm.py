"""BatchNormalization folded into the linear operator before or after it, or else as Mul and Add."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from fheq.graph import Graph, Node
from fheq.interpret import run_node
from fheq.rewriting.channels import channel_numbers, numbers_along
from fheq.rewriting.edit import Draft

LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
MOVES_WITHOUT_FILLER = ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")

Change = tuple[list[Node], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Linear:
    """A linear node with known weights, and the Add of a known bias that follows a MatMul.

    Args:
        weight: shape (groups, outputs per group, inputs per group, *kernel), in float64.
        bias: one value per output, in float64.
        last: the node that gives the result.
    """

    node: Node
    last: Node
    weight: np.ndarray
    bias: np.ndarray


def fold_batch_norms(graph: Graph) -> Graph:
    """Removes every BatchNormalization with known parameters.

    It is folded in float64 into a Conv, ConvTranspose, Gemm or MatMul that it alone reads, else into a Conv without
    padding, Gemm or MatMul that alone reads it (reshapes in between allowed), else written as Mul and Add. Weights with a
    quantizer of their own stay as they are.
    """
    while True:
        node = next((n for n in graph.nodes if _is_known(graph, n)), None)
        if node is None:
            return graph
        scale, shift = _scale_and_shift(graph, node)
        graph = (
            _into_previous(graph, node, scale, shift)
            or _into_next(graph, node, scale, shift)
            or _as_mul_add(graph, node, scale, shift)
        )


def _is_known(graph: Graph, node: Node) -> bool:
    if node.op != "BatchNormalization" or node.domain or not all(n in graph.constants for n in node.inputs[1:5]):
        return False
    shape = graph.types[node.inputs[0]].shape
    return len(shape) > 1 and all(graph.constants[n].shape == shape[1:2] for n in node.inputs[1:5])


def _scale_and_shift(graph: Graph, node: Node) -> tuple[np.ndarray, np.ndarray]:
    gamma, beta, mean, variance = (graph.constants[n].astype(np.float64) for n in node.inputs[1:5])
    scale = gamma / np.sqrt(variance + node.attrs["epsilon"])
    return scale, beta - mean * scale


def _into_previous(graph: Graph, node: Node, scale: np.ndarray, shift: np.ndarray) -> Graph | None:
    """y = scale * (W x + b) + shift, where nobody else reads W x + b."""
    linear = _linear_before(graph, node.inputs[0])
    if linear is None or linear.bias.size != scale.size:
        return None
    if linear.node.op == "MatMul" and len(graph.types[linear.node.outputs[0]].shape) > 2:
        return None  # its channels lie along the last axis
    groups, per_group = linear.weight.shape[:2]
    weight = linear.weight * scale.reshape(groups, per_group, *[1] * (linear.weight.ndim - 2))
    return _with_linear(graph, linear, weight, scale * linear.bias + shift, node.outputs[0], drop=(node,))


def _into_next(graph: Graph, node: Node, scale: np.ndarray, shift: np.ndarray) -> Graph | None:
    """y = W (scale * x + shift) + b, where nobody else reads scale * x + shift."""
    first = _only_reader(graph, node.outputs[0])
    path, reader, tensor = [], first, node.outputs[0]
    while reader is not None and reader.op in MOVES_WITHOUT_FILLER and not reader.domain:
        path.append(reader)
        tensor = reader.outputs[0]
        reader = _only_reader(graph, tensor)
    if first is None or reader is None or reader.inputs[0] != tensor or reader.inputs.count(tensor) > 1:
        return None
    linear = _linear(graph, reader)
    order = None if linear is None else _input_channels(graph, node, path, reader)
    if linear is None or order is None:
        return None
    groups, _, per_group = linear.weight.shape[:3]
    tail = (groups, 1, per_group, *[1] * (linear.weight.ndim - 3))
    alpha = reader.attrs.get("alpha", 1.0) if reader.op == "Gemm" else 1.0
    moved = (linear.weight * shift[order].reshape(tail)).sum(axis=tuple(range(2, linear.weight.ndim))).ravel()
    weight = linear.weight * scale[order].reshape(tail)
    bypass = replace(first, inputs=tuple(node.inputs[0] if n == node.outputs[0] else n for n in first.inputs))
    if reader is first:
        linear = replace(linear, node=bypass, last=bypass if linear.last is reader else linear.last)
    changes = {id(first): bypass}
    result = linear.last.outputs[0]
    return _with_linear(graph, linear, weight, linear.bias + alpha * moved, result, drop=(node, reader), changes=changes)


def _as_mul_add(graph: Graph, node: Node, scale: np.ndarray, shift: np.ndarray) -> Graph:
    shape = graph.types[node.inputs[0]].shape
    dtype = graph.types[node.outputs[0]].dtype
    column = (-1,) + (1,) * (len(shape) - 2)
    draft = Draft(graph)
    for other in graph.nodes:
        if other is not node:
            draft.write(other)
            continue
        names = [
            draft.constant(f"{node.outputs[0]}/{label}", value.reshape(column), dtype)
            for label, value in (("scale", scale), ("shift", shift))
        ]
        product = draft.apply(node, "Mul", node.inputs[0], names[0])
        draft.apply(node, "Add", product, names[1], out=node.outputs[0])
    return draft.finish()


def _with_linear(
    graph: Graph,
    linear: Linear,
    weight: np.ndarray,
    bias: np.ndarray,
    result: str,
    drop: tuple[Node, ...],
    changes: Mapping[int, Node] | None = None,
) -> Graph:
    """The graph with new weights in a linear node, whose result takes the name `result`."""
    draft = Draft(graph)
    old, skipped = linear.node, {id(n) for n in (*drop, linear.node, linear.last)}
    anchor = max(i for i, n in enumerate(graph.nodes) if n.name == linear.last.name and n.outputs == linear.last.outputs)
    for index, node in enumerate(graph.nodes):
        if index == anchor:
            kind = graph.constants[old.inputs[1]]
            w = draft.constant(f"{old.inputs[1]}/folded", _as_stored(old, weight, kind.shape), kind.dtype)
            b = draft.constant(f"{result}/bias", bias, kind.dtype)
            if old.op == "MatMul":
                product = draft.fresh(f"{result}/MatMul")
                draft.write(replace(old, inputs=(old.inputs[0], w), outputs=(product,)))
                draft.apply(old, "Add", product, b, out=result)
            else:
                attrs = MappingProxyType({**old.attrs, "beta": 1.0}) if old.op == "Gemm" else old.attrs
                draft.write(replace(old, inputs=(old.inputs[0], w, b), outputs=(result,), attrs=attrs))
        elif id(node) not in skipped:
            draft.write((changes or {}).get(id(node), node))
    return draft.finish()


def _linear_before(graph: Graph, tensor: str) -> Linear | None:
    """The linear operator that gives `tensor` to one reader alone."""
    if _only_reader(graph, tensor) is None:
        return None
    producers = graph.producers()
    node = producers.get(tensor)
    if node is not None and node.op == "Add":
        product = next((producers[n] for n in node.inputs if n in producers and producers[n].op == "MatMul"), None)
        linear = None if product is None else _linear(graph, product)
        return linear if linear is not None and linear.last is node else None
    linear = None if node is None else _linear(graph, node)
    return linear if linear is not None and linear.last is node else None


def _linear(graph: Graph, node: Node) -> Linear | None:
    """A node as `Linear`, or None where its weights are not known, are pinned, or have another form."""
    if node.op not in LINEAR_OPS or node.domain or len(node.inputs) < 2:
        return None
    name = node.inputs[1]
    stored = graph.constants.get(name)
    if stored is None or name in graph.pinned or node.attrs.get("transA", 0) or node.inputs[0] in graph.constants:
        return None
    if node.op == "MatMul" and (stored.ndim != 2 or len(graph.types[node.outputs[0]].shape) < 2):
        return None
    weight = _as_matrix(node, stored.astype(np.float64))
    size = weight.shape[0] * weight.shape[1]
    last, bias = node, np.zeros(size)
    if node.op == "MatMul":
        last, bias = _added_bias(graph, node, size)
    elif len(node.inputs) > 2 and node.inputs[2]:
        value = graph.constants.get(node.inputs[2])
        if value is None or value.size not in (1, size) or (value.ndim and value.shape[-1] != value.size):
            return None
        bias = bias + node.attrs.get("beta", 1.0) * value.astype(np.float64).ravel()
    return Linear(node, last, weight, bias)


def _added_bias(graph: Graph, node: Node, size: int) -> tuple[Node, np.ndarray]:
    """The Add of a known bias after a MatMul; the MatMul itself and zeros where there is none."""
    reader = _only_reader(graph, node.outputs[0])
    if reader is not None and reader.op == "Add" and not reader.domain:
        value = next((graph.constants[n] for n in reader.inputs if n in graph.constants), None)
        same = graph.types[reader.outputs[0]].shape == graph.types[node.outputs[0]].shape
        if value is not None and same and value.size in (1, size) and (not value.ndim or value.shape[-1] == value.size):
            return reader, np.zeros(size) + value.astype(np.float64).ravel()
    return node, np.zeros(size)


def _input_channels(graph: Graph, node: Node, path: list[Node], reader: Node) -> np.ndarray | None:
    """For each input of the linear `reader`, the channel of the BatchNormalization that it belongs to."""
    if reader.op == "ConvTranspose" or (reader.op == "Conv" and _may_pad(reader)):
        return None
    numbers = channel_numbers(graph.types[node.outputs[0]].shape, 1)
    for move in path:
        (numbers,) = (np.asarray(r) for r in run_node(move, {move.inputs[0]: numbers}.__getitem__, graph.constants))
    return numbers_along(numbers, 1 if reader.op == "Conv" else numbers.ndim - 1)


def _may_pad(node: Node) -> bool:
    return node.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID") or any(node.attrs.get("pads", ()))


def _only_reader(graph: Graph, tensor: str) -> Node | None:
    """The node that alone reads a tensor which is no output of the graph and has no quantizer."""
    readers = graph.consumers().get(tensor, [])
    hidden = tensor not in graph.pinned and all(tensor != port.name for port in graph.outputs)
    return readers[0] if hidden and len(readers) == 1 else None


def _as_matrix(node: Node, stored: np.ndarray) -> np.ndarray:
    """Weights in the shape (groups, outputs per group, inputs per group, *kernel)."""
    groups = node.attrs.get("group", 1)
    if node.op in ("Conv", "ConvTranspose"):
        split = stored.reshape(groups, -1, *stored.shape[1:])
        return split if node.op == "Conv" else split.swapaxes(1, 2)
    return (stored if node.attrs.get("transB", 0) else stored.T)[None]


def _as_stored(node: Node, weight: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `_as_matrix`."""
    if node.op in ("Conv", "ConvTranspose"):
        return (weight if node.op == "Conv" else weight.swapaxes(1, 2)).reshape(shape)
    return weight[0] if node.attrs.get("transB", 0) else weight[0].T
