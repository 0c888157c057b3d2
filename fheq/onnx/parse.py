"""A checked `ModelProto` as nodes, inputs and known tensors; functions of the model are inlined."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx

from fheq.errors import FheqError, ModelError, UnsupportedError, describe
from fheq.graph import Node
from fheq.onnx.attributes import check_arity, read_attributes, schema_of
from fheq.onnx.loading import normal_domain, opsets
from fheq.onnx.subgraphs import Subgraph, captured, outer_reads
from fheq.onnx.tensors import dtype_of, to_array, to_dense
from fheq.stated_accumulators import states_accumulator

MAX_NODES = 200_000
MAX_DEPTH = 32
CONTROL_FLOW = ("If", "Loop", "Scan")
WITH_SUBGRAPHS = (*CONTROL_FLOW, "SequenceMap")

Report = Callable[[FheqError], None]
Functions = Mapping[tuple[str, str, str], onnx.FunctionProto]


@dataclass(frozen=True)
class Input:
    """A model input as declared: each dim a size, a symbol, or None when unknown; `dims` is None without a rank.

    Strings have the dtype object.
    """

    name: str
    dtype: np.dtype
    dims: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class Parsed:
    """The parts of a model. `nodes` are those that an output depends on, in topological order."""

    nodes: tuple[Node, ...]
    inputs: tuple[Input, ...]
    outputs: tuple[str, ...]
    constants: dict[str, np.ndarray]


@dataclass(frozen=True)
class Scope:
    """What the nodes of one graph or function are read with.

    Args:
        versions: domain to opset.
        bound: attributes of the call, in a function's body.
        path: the functions around it.
        names: the graph's name of a tensor of a function's body.
    """

    functions: Functions
    versions: Mapping[str, int]
    bound: Mapping[str, Any] | None = None
    path: tuple[Any, ...] = ()
    names: Callable[[str], str] = str


def parse(model: onnx.ModelProto, report: Report | None = None) -> Parsed:
    """Reads a model.

    Args:
        report: takes the errors of single nodes instead of raising them.

    Raises:
        ModelError: names used twice, missing or in a cycle; nodes that do not fit their schema; bad tensors.
        UnsupportedError: subgraphs of other operators than If, Loop, Scan and SequenceMap; inputs that are sequences.
    """
    graph = model.graph
    constants = _constants(graph)
    inputs = tuple(_input(value) for value in graph.input if value.name not in constants)
    outputs = tuple(value.name for value in graph.output)
    _no_doubles([i.name for i in inputs], "input")
    _no_doubles(outputs, "output")
    functions = {(normal_domain(f.domain), f.name, f.overload): f for f in model.functions}
    known = {*constants, *(i.name for i in inputs)}
    versions = opsets(model.opset_import)
    ordered = _live(_sort(graph.node, known, versions), outputs, known)
    nodes: list[Node] = []
    for node, proto in ordered:
        try:
            nodes += _read(node, proto, Scope(functions, versions))
            if len(nodes) > MAX_NODES:
                raise ModelError(f"{describe(node)}: the model's functions expand to more than {MAX_NODES} nodes")
        except FheqError as error:
            if report is None:
                raise
            report(error)
    return Parsed(tuple(nodes), inputs, outputs, constants)


def inline(
    function: onnx.FunctionProto,
    call: Node,
    functions: Functions | None = None,
    path: tuple[Any, ...] = (),
) -> list[Node]:
    """The nodes of a function's body, with the names and attributes of a call.

    Raises:
        ModelError: the function calls itself, or the call does not fit it.
    """
    where = describe(call)
    if len(path) >= MAX_DEPTH:
        raise ModelError(f"{where}: functions call each other more than {MAX_DEPTH} deep; does one call itself?")
    if len(call.inputs) > len(function.input) or len(call.outputs) > len(function.output):
        raise ModelError(f"{where} gives more inputs or outputs than the function {function.name!r} has")
    defaults = read_attributes(function.attribute_proto, None, where)
    bound = {**defaults, **call.attrs}
    passed = dict(zip(function.input, (*call.inputs, *[""] * len(function.input))))
    results = dict(zip(function.output, call.outputs))
    prefix = f"{call.name or next((o for o in call.outputs if o), call.op)}/{function.name}"
    names = {**{k: v for k, v in results.items() if v and k not in passed}, **passed, "": ""}

    def rename(name: str) -> str:
        return names.setdefault(name, f"{prefix}/{name}")

    versions = opsets(function.opset_import)
    body = _sort(function.node, set(passed), versions)
    nodes: list[Node] = []
    for node, proto in _live(body, [k for k, v in results.items() if v], set(passed)):
        renamed = replace(
            node,
            name=f"{prefix}/{node.name or node.op}",
            inputs=_trimmed(tuple(map(rename, node.inputs))),
            outputs=tuple(map(rename, node.outputs)),
        )
        nodes += _read(renamed, proto, Scope(functions or {}, versions, bound, path, rename))
    for inner, outer in results.items():
        if outer and inner in passed:
            nodes.append(
                Node(f"{prefix}/{inner}", "Identity", (passed[inner],), (outer,), {}, "", versions.get("", call.version))
            )
    return nodes


def _read(node: Node, proto: onnx.NodeProto, scope: Scope) -> list[Node]:
    """A node with its attributes, or the body of the model's function that it calls."""
    where = describe(node)
    function = scope.functions.get((node.domain, node.op, proto.overload))
    schema = None if function is not None else schema_of(node.op, node.version, node.domain)
    if schema is not None and schema.deprecated:
        raise ModelError(f"{where}: {node.op} is no operator of opset {node.version} any more; declare an older opset")

    def subgraph(graph: onnx.GraphProto) -> Subgraph:
        return _subgraph(graph, scope).with_outer(scope.names)

    reader = subgraph if node.op in WITH_SUBGRAPHS and not node.domain else None
    attrs = read_attributes(proto.attribute, schema, where, scope.bound, reader)
    node = replace(node, attrs=MappingProxyType(attrs))
    if function is not None and not states_accumulator(node):
        return inline(function, node, scope.functions, (*scope.path, node.op))
    if schema is not None:
        check_arity(schema, node.inputs, node.outputs, where)
    return [node]


def _subgraph(graph: onnx.GraphProto, scope: Scope) -> Subgraph:
    """A body or branch, its functions inlined and subgraphs of its own read."""
    constants = _constants(graph)
    inputs = tuple(value.name for value in graph.input)
    outputs = tuple(value.name for value in graph.output)
    known = {*constants, *inputs, *captured(graph)}
    inner = replace(scope, names=str)
    ordered = _live(_sort(graph.node, known, scope.versions), outputs, known)
    nodes = [part for node, proto in ordered for part in _read(node, proto, inner)]
    return Subgraph(tuple(nodes), inputs, outputs, constants)


def _skeleton(proto: onnx.NodeProto, versions: Mapping[str, int]) -> Node:
    """The node without its attributes."""
    domain = normal_domain(proto.domain)
    node = Node(proto.name, proto.op_type, _trimmed(tuple(proto.input)), tuple(proto.output), {}, domain)
    if not proto.op_type:
        raise ModelError(f"{describe(node)} has no operator type")
    if domain == "" and "" not in versions:
        raise ModelError(f"{describe(node)}: its function does not say which opset of ai.onnx it uses")
    return replace(node, version=versions.get(domain, 1))


def _trimmed(names: tuple[str, ...]) -> tuple[str, ...]:
    """The names without absent inputs at the end."""
    while names and not names[-1]:
        names = names[:-1]
    return names


def _sort(
    protos: Iterable[onnx.NodeProto], known: set[str], versions: Mapping[str, int]
) -> list[tuple[Node, onnx.NodeProto]]:
    """The nodes in topological order, otherwise in the given one.

    Raises:
        ModelError: a tensor made twice or by nobody, or a cycle.
    """
    pairs = [(_skeleton(proto, versions), proto) for proto in protos]
    maker: dict[str, int] = {}
    for index, (node, _) in enumerate(pairs):
        for name in filter(None, node.outputs):
            if name in maker or name in known:
                other = describe(pairs[maker[name]][0]) if name in maker else "an input or initializer"
                raise ModelError(
                    f"{describe(node)} makes the tensor {name!r}, which {other} makes too; names must be unique"
                )
            maker[name] = index
    readers: list[list[int]] = [[] for _ in pairs]
    waiting = [0] * len(pairs)
    for index, (node, proto) in enumerate(pairs):
        for name in {n for n in _reads(node, proto) if n and n not in known}:
            if name not in maker:
                raise ModelError(f"{describe(node)} reads the tensor {name!r}, which no node, input or initializer gives")
            readers[maker[name]].append(index)
            waiting[index] += 1
    ready = [index for index, count in enumerate(waiting) if count == 0]
    order = []
    while ready:
        index = heapq.heappop(ready)
        order.append(pairs[index])
        for reader in readers[index]:
            waiting[reader] -= 1
            if waiting[reader] == 0:
                heapq.heappush(ready, reader)
    if len(order) < len(pairs):
        stuck = next(node for (node, _), count in zip(pairs, waiting) if count)
        raise ModelError(f"{describe(stuck)} depends on itself: the graph has a cycle")
    return order


def _reads(node: Node, proto: onnx.NodeProto) -> set[str]:
    """The tensors that a node reads, also inside its subgraphs."""
    return {*node.inputs, *outer_reads(proto.attribute)}


def _live(
    pairs: Sequence[tuple[Node, onnx.NodeProto]], outputs: Iterable[str], known: set[str]
) -> list[tuple[Node, onnx.NodeProto]]:
    """The nodes that an output depends on; control flow without the outputs that nobody reads.

    Raises:
        ModelError: nobody makes an output.
    """
    wanted = set(outputs)
    missing = wanted - known - {name for node, _ in pairs for name in node.outputs}
    if missing or "" in wanted:
        raise ModelError(f"output {min(missing or {''})!r} is given by no node, input or initializer")
    kept = []
    for node, proto in reversed(pairs):
        if any(name in wanted for name in node.outputs if name):
            if node.op in (*WITH_SUBGRAPHS, "MaxPool"):  # without its indices
                node = replace(node, outputs=tuple(name if name in wanted else "" for name in node.outputs))
            wanted.update(_reads(node, proto))
            kept.append((node, proto))
    return kept[::-1]


def _constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    constants: dict[str, np.ndarray] = {}
    for tensor in graph.initializer:
        _check_new(tensor.name, constants)
        constants[tensor.name] = to_array(tensor, f"initializer {tensor.name!r}", strings=True)
    for sparse in graph.sparse_initializer:
        _check_new(sparse.values.name, constants)
        constants[sparse.values.name] = to_dense(sparse, f"initializer {sparse.values.name!r}")
    return constants


def _check_new(name: str, constants: Mapping[str, np.ndarray]) -> None:
    if not name or name in constants:
        raise ModelError(f"initializer {name!r} is there twice" if name else "an initializer has no name")


def _input(value: onnx.ValueInfoProto) -> Input:
    what = f"input {value.name!r}"
    if not value.name:
        raise ModelError("an input of the model has no name")
    if value.type.WhichOneof("value") != "tensor_type":
        kind = value.type.WhichOneof("value") or "no type"
        raise UnsupportedError(
            f"{what} is no tensor ({kind}); fheq takes dense tensors: give each element as an input of its own"
        )
    tensor = value.type.tensor_type
    dims = tuple(_dim(d) for d in tensor.shape.dim) if tensor.HasField("shape") else None
    dtype = np.dtype(object) if tensor.elem_type == onnx.TensorProto.STRING else dtype_of(tensor.elem_type, what)
    return Input(value.name, dtype, dims)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value > 0 else None
    return dim.dim_param or None


def _no_doubles(names: Sequence[str], what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ModelError(f"{what} {name!r} is there twice; names must be unique")
