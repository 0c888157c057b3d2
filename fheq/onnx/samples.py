"""A model that was written for one sample, for any number of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import jax.numpy as jnp
import numpy as np
import onnx
from onnx import helper, numpy_helper

from fheq.errors import FheqError
from fheq.graph import Node, Port, TensorType
from fheq.interpret import run_node
from fheq.onnx.functions import expand
from fheq.onnx.parse import parse
from fheq.ops.table import Kind, lookup
from fheq.qat import constant_quantizer
from fheq.rewriting.evaluation import output_types, type_of
from fheq.rewriting.fold import infer

SYMBOL = "N"
_ANYWHERE = ("Einsum", "Gemm", "MatMul")  # take samples along any axis that they do not sum over, as ReduceSum does
_AXIS = {"CumSum": 1, "DFT": 2}  # the input that is an axis
_QUANTIZERS = ("DequantizeLinear", "QuantizeLinear")
_ROWS = ("Gemm", "MatMul")
EVERY = np.iinfo(np.int64).max
_ALIKE = ("Concat", "GatherElements", "ScatterElements")  # their known inputs say something of every sample


class _OneSampleError(Exception):
    """Some node is made for one sample."""


def for_any_number(model: onnx.ModelProto, ports: Sequence[Port]) -> onnx.ModelProto:
    """The model with an open batch axis, where each of its nodes computes samples on their own; else itself.

    The shapes that Reshape states, and what Concat and the like join to samples, are written for any number; of every other
    node the shapes say whether it takes several samples, and its operator whether it keeps them apart.

    Args:
        model: as `Writer.model` gives it.
        ports: its inputs.
    """
    if all(port.batch_axis is None for port in ports):
        return model
    try:
        batch = _batched(model, ports)
    except (FheqError, _OneSampleError):  # what it holds is right for one sample
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    _rewrite(changed.graph, batch)
    for value in (*changed.graph.input, *changed.graph.output):
        axis = batch.axes.get(value.name)
        if axis is not None:
            dim = value.type.tensor_type.shape.dim[axis]
            dim.CopyFrom(onnx.TensorShapeProto.Dimension(dim_param=SYMBOL) if dim.dim_value == 1 else type(dim)())
    return changed


@dataclass
class _Batch:
    """What is found of a model for `count` samples.

    Args:
        count: a size that no axis has for one sample.
        stated: the outputs of the model's own nodes.
        known: tensors that do not depend on inputs.
        one, several: types by name, for one sample and for `count`.
        axes: where the samples of a tensor are joined; of those alone that depend on samples.
        inner: of these, the tensors whose axis runs through the samples for each of its places, and not the other way round.
        stated_anew: an input of a node that is written for any number, by the node's output: its position and value.
        repeated: of an operator in `_ALIKE`, by its output: a tensor of samples, their axis, and what each of them gets.
    """

    count: int
    stated: set[str]
    known: dict[str, np.ndarray]
    one: Mapping[str, TensorType]
    several: dict[str, TensorType]
    axes: dict[str, int]
    inner: set[str] = field(default_factory=set)
    stated_anew: dict[str, tuple[int, np.ndarray]] = field(default_factory=dict)
    repeated: dict[str, tuple[str, int, list[str]]] = field(default_factory=dict)

    def joined(self, name: str, parts: Sequence[np.ndarray], inner: bool) -> np.ndarray:
        """A tensor of several samples from those of each."""
        axis = self.axes[name]
        if not inner:
            return np.concatenate(parts, axis)
        shape = parts[0].shape
        return np.stack(parts, axis + 1).reshape(_times(shape, axis, len(parts)))

    def before(self, name: str) -> int:
        """How many places the axes before the samples of a tensor have."""
        return math.prod(self.one[name].shape[: self.axes[name] + (name in self.inner)])

    def written(self, node: Node, position: int, value: Sequence[int]) -> Node:
        """A node with another known input, which is a list of integers."""
        out, name = node.outputs[0], f"{node.outputs[0]}/samples"
        array = np.asarray(value, np.int64)
        self.stated_anew[out], self.known[name] = (position, array), array
        return replace(node, inputs=tuple(name if i == position else n for i, n in enumerate(node.inputs)))


def _batched(model: onnx.ModelProto, ports: Sequence[Port]) -> _Batch:
    parsed = parse(model)
    given = {port.name: port.type for port in ports}
    found = infer(parsed.nodes, given, parsed.constants, expand=expand, quantizer=constant_quantizer)
    sizes = {size for kind in found.types.values() for size in kind.shape}
    count = next(n for n in range(2, len(sizes) + 3) if n not in sizes)
    axes = {port.name: port.batch_axis for port in ports if port.batch_axis is not None}
    grown = {name: TensorType(_times(given[name].shape, axis, count), given[name].dtype) for name, axis in axes.items()}
    stated = {name for node in model.graph.node for name in node.output}
    batch = _Batch(count, stated, dict(found.constants), found.types, {**found.types, **grown}, axes)
    for node in found.nodes:
        read = node.inputs[:1] if node.op == "CastLike" else node.inputs
        if any(name in axes for name in read):
            changed = _for_several(batch, node)
            _add(batch, changed)
            if not _apart(batch, node, changed):
                raise _OneSampleError
    if any(value.name in batch.inner for value in model.graph.output):
        raise _OneSampleError
    return batch


def _times(shape: tuple[int, ...], axis: int, count: int) -> tuple[int, ...]:
    return (*shape[:axis], count * shape[axis], *shape[axis + 1 :])


def _for_several(batch: _Batch, node: Node) -> Node:
    """A node whose known inputs fit any number of samples."""
    source, out = next(name for name in node.inputs if name in batch.axes), node.outputs[0]
    axis, shape = batch.axes[source], batch.one[source].shape
    if node.op == "Reshape":
        return _reshaped(batch, node)
    if node.op == "Slice" and len(node.inputs) > 2 and out in batch.stated:
        return _sliced(batch, node)
    alike = [name for name in dict.fromkeys(node.inputs) if name not in batch.axes]
    if node.op in _ALIKE and alike and shape[axis] == 1 and out in batch.stated:
        if any(name not in batch.known or batch.one[name].shape[axis] != 1 for name in alike):
            raise _OneSampleError
        batch.repeated[out] = (source, axis, alike)
        for name in alike:
            batch.known[f"{out}/{name}"] = np.repeat(batch.known[name], batch.count, axis)
            batch.several[f"{out}/{name}"] = type_of(batch.known[f"{out}/{name}"])
        return replace(node, inputs=tuple(name if name in batch.axes else f"{out}/{name}" for name in node.inputs))
    return node


def _reshaped(batch: _Batch, node: Node) -> Node:
    """Reshape with an open length where the samples come to lie."""
    source, out = node.inputs[0], node.outputs[0]
    shape, target, stated = batch.one[source].shape, list(batch.one[out].shape), batch.known[node.inputs[1]]
    leading = [math.prod(target[:i]) for i in range(len(target) + 1)]
    places = [i for i in range(len(target)) if leading[i] == batch.before(source)]
    merged = [i for i in range(len(target)) if leading[i + 1] == batch.before(source)]
    lone = any(target[i] == 1 for i in places)
    if not lone and merged and len(target) < len(shape):  # rows of all samples, which keep their features
        places = merged
    open_at = [i for i in places if stated[i] == -1 and target[i] == shape[batch.axes[source]]]
    if not places or out not in batch.stated:
        raise _OneSampleError
    target[(open_at or places)[0]] = -1
    return batch.written(node, 1, target)


def _sliced(batch: _Batch, node: Node) -> Node:
    """Slice that takes all samples, if it names their axis."""
    source, known = node.inputs[0], [name for name in node.inputs[1:] if name]
    if any(name not in batch.known for name in known):
        return node
    starts, ends = (np.ravel(batch.known[name]) for name in node.inputs[1:3])
    named = np.ravel(batch.known[node.inputs[3]]) if len(node.inputs) > 3 and node.inputs[3] else np.arange(len(starts))
    axis, shape = batch.axes[source], batch.one[source].shape
    every = (named % len(shape) == axis) & (starts == 0) & (ends >= shape[axis])
    return batch.written(node, 2, np.where(every, EVERY, ends).tolist()) if np.any(every) else node


def _add(batch: _Batch, node: Node) -> None:
    """Notes types and axes of what a node makes of several samples."""
    batch.several.update(output_types(node, batch.known, batch.several))
    for name in filter(None, node.outputs):
        one, several = batch.one[name].shape, batch.several[name].shape
        axis = next((i for i in range(len(one)) if several == _times(one, i, batch.count)), None)
        if axis is None:
            raise _OneSampleError
        batch.axes[name] = axis


def _apart(batch: _Batch, node: Node, changed: Node) -> bool:
    """Whether no sample's results depend on another one, shapes being right.

    Args:
        node, changed: for one sample and for several.
    """
    kind, first = lookup(node).kind, node.inputs[0]
    if kind is Kind.MOVEMENT and (first in batch.axes or node.op == "Concat"):
        return _moves_apart(batch, node, changed)
    if any(name in batch.inner for name in node.inputs) and not _stays_inner(batch, node):
        return False
    if kind in (Kind.ELEMENTWISE, Kind.MOVEMENT) or node.op in _QUANTIZERS:
        return True  # what is looked up in a known tensor is found element by element
    axis, at = batch.axes.get(first, 0), node.attrs.get("axis")
    if node.op == "OneHot" and at is not None:  # its axis is one of the result
        return at % len(batch.one[node.outputs[0]].shape) != batch.axes[node.outputs[0]]
    if node.op in _AXIS:
        stated = batch.known.get(node.inputs[_AXIS[node.op]]) if len(node.inputs) > _AXIS[node.op] else None
        at = axis if stated is None else int(stated)
    if at in (axis, axis - len(batch.one[first].shape)):
        return False
    return at is not None or axis == batch.axes[node.outputs[0]] == 0 or node.op in _ANYWHERE or node.op.startswith("Reduce")


def _stays_inner(batch: _Batch, node: Node) -> bool:
    """Whether a node keeps the order of samples that are the inner part of an axis; notes it of its results."""
    read, out = [name for name in node.inputs if name in batch.axes], node.outputs[0]
    lengths = {batch.one[name].shape[batch.axes[name]] for name in (*read, out)}
    apart = lookup(node).kind is Kind.ELEMENTWISE or node.op in _QUANTIZERS or (node.op in _ROWS and len(read) == 1)
    if not apart or len(lengths) > 1 or any(name not in batch.inner for name in read):
        return False
    batch.inner.update(filter(None, node.outputs))
    return True


def _moves_apart(batch: _Batch, node: Node, changed: Node) -> bool:
    """The same of a movement, by where it puts elements that are numbered."""
    computed = [name for name in dict.fromkeys(node.inputs) if name in batch.axes]
    ends = np.cumsum([1, *(math.prod(batch.one[name].shape) for name in computed)])

    def moved(node: Node, values: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        found = run_node(node, lambda name: jnp.asarray({**batch.known, **values}[name]), batch.known)
        return [np.asarray(value) for value in found]

    samples = [
        {n: (np.arange(a, b) + k * ends[-1]).reshape(batch.one[n].shape) for n, a, b in zip(computed, ends, ends[1:])}
        for k in range(batch.count)
    ]
    joined = {name: batch.joined(name, [sample[name] for sample in samples], name in batch.inner) for name in computed}
    alone = zip(*(moved(node, sample) for sample in samples))
    for name, together, parts in zip(node.outputs, moved(changed, joined), alone):
        if name and not np.array_equal(together, batch.joined(name, parts, inner=False)):
            if not np.array_equal(together, batch.joined(name, parts, inner=True)):
                return False
            batch.inner.add(name)
    return True


def _rewrite(graph: onnx.GraphProto, batch: _Batch) -> None:
    """Writes shapes and known parts for any number of samples into the nodes of a graph."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        out = node.output[0]
        if out in batch.stated_anew:
            position, value = batch.stated_anew[out]
            graph.initializer.append(numpy_helper.from_array(value, f"{out}/samples"))
            node.input[position] = f"{out}/samples"
        if out in batch.repeated:
            source, axis, alike = batch.repeated[out]
            nodes += _repeated(graph, out, source, axis, len(batch.one[out].shape), alike)
            node.input[:] = [f"{out}/{name}" if name in alike else name for name in node.input]
        nodes.append(node)
    del graph.node[:]
    graph.node.extend(nodes)


def _repeated(graph: onnx.GraphProto, out: str, source: str, axis: int, ndim: int, names: list[str]) -> list[onnx.NodeProto]:
    """Nodes that give every sample of `source` known tensors of its own, for the node that makes `out`."""
    parts = [f"{out}/before", f"{out}/count", f"{out}/after"]
    for name, size in ((parts[0], axis), (parts[2], ndim - axis - 1)):
        graph.initializer.append(numpy_helper.from_array(np.ones(size, np.int64), name))
    return [
        helper.make_node("Shape", [source], [parts[1]], start=axis, end=axis + 1),
        helper.make_node("Concat", parts, [f"{out}/ones"], axis=0),
        *(helper.make_node("Expand", [name, f"{out}/ones"], [f"{out}/{name}"]) for name in names),
    ]
