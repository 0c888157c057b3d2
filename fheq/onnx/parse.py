"""A checked `ModelProto` as nodes, inputs and known tensors; functions of the model are inlined."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx

from fheq.errors import FheqError, ModelError
from fheq.graph import Node, describe
from fheq.onnx.attributes import check_arity, read_attributes, schema_of
from fheq.onnx.declarations import Input, known_tensors, no_doubles, read_input
from fheq.onnx.loading import normal_domain, opsets
from fheq.onnx.order import in_order, trimmed
from fheq.onnx.subgraphs import WITH_SUBGRAPHS, Subgraph, captured
from fheq.ops.table import find
from fheq.stated.accumulators import DOMAIN

MAX_NODES = 200_000
MAX_DEPTH = 32

Report = Callable[[FheqError], None]
Functions = Mapping[tuple[str, str, str], onnx.FunctionProto]


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
    constants = known_tensors(graph)
    inputs = tuple(read_input(value) for value in graph.input if value.name not in constants)
    outputs = tuple(value.name for value in graph.output)
    no_doubles([i.name for i in inputs], "input")
    no_doubles(outputs, "output")
    functions = {(normal_domain(f.domain), f.name, f.overload): f for f in model.functions}
    known = {*constants, *(i.name for i in inputs)}
    versions = opsets(model.opset_import)
    nodes: list[Node] = []
    for node, proto in in_order(graph.node, known, outputs, versions):
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
    nodes: list[Node] = []
    for node, proto in in_order(function.node, set(passed), [k for k, v in results.items() if v], versions):
        renamed = replace(
            node,
            name=f"{prefix}/{node.name or node.op}",
            inputs=trimmed(tuple(map(rename, node.inputs))),
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
    schema: Any = None if function is not None else schema_of(node.op, node.version, node.domain)
    if schema is not None and schema.deprecated and not schema.has_context_dependent_function:  # else its body says it all
        raise ModelError(f"{where}: {node.op} is no operator of opset {node.version} any more; declare an older opset")

    def subgraph(graph: onnx.GraphProto) -> Subgraph:
        return _subgraph(graph, scope).with_outer(scope.names)

    reader = subgraph if node.op in WITH_SUBGRAPHS and not node.domain else None
    attrs = read_attributes(proto.attribute, schema, where, scope.bound, reader)
    node = replace(node, attrs=MappingProxyType(attrs))
    if function is not None and not (node.domain == DOMAIN and find(node) is not None):  # one that export_qdq writes
        return inline(function, node, scope.functions, (*scope.path, node.op))
    if schema is not None:
        check_arity(schema, node.inputs, node.outputs, where)
    return [node]


def _subgraph(graph: onnx.GraphProto, scope: Scope) -> Subgraph:
    """A body or branch, its functions inlined and subgraphs of its own read."""
    constants = known_tensors(graph)
    inputs = tuple(value.name for value in graph.input)
    outputs = tuple(value.name for value in graph.output)
    known = {*constants, *inputs, *captured(graph)}
    inner = replace(scope, names=str)
    ordered = in_order(graph.node, known, outputs, scope.versions)
    nodes = [part for node, proto in ordered for part in _read(node, proto, inner)]
    return Subgraph(tuple(nodes), inputs, outputs, constants)
