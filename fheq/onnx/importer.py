"""`import_onnx`: a model as the graph of one sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import reduce
from types import MappingProxyType

import numpy as np

from fheq.client.imputation import state_missing
from fheq.errors import FheqError, ModelError
from fheq.graph import Graph, Node, TensorType, describe
from fheq.onnx.functions import expand
from fheq.onnx.loading import Source, load, reading
from fheq.onnx.parse import Parsed, Report, parse
from fheq.onnx.shapes import grown, input_ports, is_symbolic, output_ports
from fheq.onnx.strings import number_strings
from fheq.qat import constant_quantizer
from fheq.rewrites import DEFAULT_REWRITES
from fheq.rewriting.edit import VERSION
from fheq.rewriting.fold import Inferred, infer

_WEIGHT_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


def import_onnx(model: Source, *, dims: Mapping[str, int] | None = None) -> Graph:
    """A model as the graph of one sample, with static shapes, known tensors folded and quantizers pinned.

    Args:
        model: path, bytes or `onnx.ModelProto`, of any opset from 7 on.
        dims: sizes of symbolic dims other than the batch, by symbol, as in `dims={"height": 32}`.

    Raises:
        ModelError: the model is unreadable or malformed.
        UnsupportedError: an opset, operator or form that fheq does not take.
        ShapeError: a size is open that must be static, or shapes do not fit.
    """
    proto = load(model)
    with reading("the model"):
        parsed = parse(proto)
    graph = _finished(parsed, dims, None)
    assert graph is not None
    return graph


@dataclass(frozen=True)
class Examined:
    """What is known of a model, good or bad: its parts and the graph are None where errors keep them from being made."""

    parsed: Parsed | None
    graph: Graph | None
    errors: list[FheqError]


def examine(model: Source, *, dims: Mapping[str, int] | None = None) -> Examined:
    """A model with everything that keeps it from being imported, one error per node where that is possible."""
    found: list[FheqError] = []
    parsed, graph = None, None
    try:
        proto = load(model)
        with reading("the model"):
            parsed = parse(proto, found.append)
        graph = _finished(parsed, dims, found)
    except FheqError as error:
        found.append(error)
    return Examined(parsed, None if found else graph, found)


def problems(model: Source, *, dims: Mapping[str, int] | None = None) -> list[FheqError]:
    """Everything that keeps the model from being imported, one error per node where that is possible."""
    return examine(model, dims=dims).errors


def _finished(parsed: Parsed, dims: Mapping[str, int] | None, found: list[FheqError] | None) -> Graph | None:
    """The graph after all rewrites. Errors of single nodes are added to `found`, where it is given, and then it is None."""
    with reading("the model"):
        texts = {value.name for value in parsed.inputs if value.dtype == object}
        numbered = number_strings(parsed.nodes, parsed.constants, texts)
    inputs = tuple(replace(v, dtype=np.dtype(np.int64)) if v.name in texts else v for v in parsed.inputs)
    parsed = replace(parsed, nodes=numbered.nodes, inputs=inputs, constants=numbered.constants)
    graph = _typed(parsed, dims, None if found is None else found.append, [] if found is None else found)
    if graph is None:
        return None
    _refuse_infinite_weights(graph)
    labels = dict.fromkeys(numbered.holders, numbered.strings)
    ends = (tuple(replace(port, labels=labels.get(port.name)) for port in ports) for ports in (graph.inputs, graph.outputs))
    graph = graph.replace(**dict(zip(("inputs", "outputs"), ends)))
    return state_missing(reduce(lambda g, rewrite: rewrite(g), DEFAULT_REWRITES, graph))


def _typed(parsed: Parsed, dims: Mapping[str, int] | None, report: Report | None, reported: list[FheqError]) -> Graph | None:
    """The graph before any rewrite; None when errors were reported."""
    ports = input_ports(parsed.inputs, dims)
    two = None
    types = grown(ports, is_symbolic(parsed.inputs, dims), 2)
    if types is not None:
        try:
            two = infer(parsed.nodes, types, parsed.constants, expand=expand, quantizer=constant_quantizer)
        except FheqError:
            two = None  # the model is made for a batch of 1; the pass below says what else may be wrong
    found = _infer_one(parsed, {port.name: port.type for port in ports}, two, report)
    if reported:
        return None
    named = _elements(parsed.outputs, found.sequences)
    outputs = output_ports(named.values(), found.types, None if two is None else two.types)
    of_sequences = [(made, name) for name, made in named.items() if made != name]
    return Graph(
        (*found.nodes, *(Node(name, "Identity", (made,), (name,), {}, "", VERSION) for made, name in of_sequences)),
        ports,
        tuple(replace(port, name=name) for port, name in zip(outputs, named)),
        MappingProxyType(found.constants),
        MappingProxyType({**found.types, **{name: found.types[made] for made, name in of_sequences}}),
        MappingProxyType(found.pinned),
    )


def _elements(outputs: tuple[str, ...], sequences: Mapping[str, tuple[str, ...] | None]) -> dict[str, str]:
    """The outputs by name, each with the tensor that it is; an output that is a sequence has one output per element."""
    found: dict[str, str] = {}
    for name in outputs:
        elements = sequences.get(name, (name,))
        if elements is None:
            raise ModelError(f"output {name!r} is an optional without a value; remove it from the model's outputs")
        found.update({name: name} if name not in sequences else {f"{name}/{i}": e for i, e in enumerate(elements)})
    return found


def _infer_one(parsed: Parsed, types: Mapping[str, TensorType], two: Inferred | None, report: Report | None) -> Inferred:
    """The pass with one sample; each Squeeze keeps the axes that it drops from a batch of two."""
    nodes = parsed.nodes if two is None else two.trace
    return infer(nodes, types, parsed.constants, expand=expand, quantizer=constant_quantizer, reuse=two, report=report)


def _refuse_infinite_weights(graph: Graph) -> None:
    for node in graph.nodes:
        for name in node.inputs if node.op in _WEIGHT_OPS else ():
            value = graph.constants.get(name)
            if value is not None and value.ndim >= 2 and not _finite(value):
                raise ModelError(f"{describe(node)}: its weight {name!r} contains NaN or infinity; train or export again")


def _finite(value: np.ndarray) -> bool:
    return value.dtype.kind in "biu" or bool(np.all(np.isfinite(value.astype(np.float64, copy=False))))
