"""`import_onnx`: a model as the graph of one sample."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from types import MappingProxyType

import numpy as np
import onnx

from fheq.errors import FheqError, ModelError, describe
from fheq.graph import Graph, TensorType
from fheq.onnx.functions import expand
from fheq.onnx.loading import Source, load, reading
from fheq.onnx.parse import Parsed, Report, parse
from fheq.onnx.shapes import grown, input_ports, is_symbolic, output_ports
from fheq.onnx.strings import number_strings
from fheq.qat import constant_quantizer
from fheq.rewrites import DEFAULT_REWRITES
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
    return _import(load(model), dims, None)


def problems(model: Source, *, dims: Mapping[str, int] | None = None) -> list[FheqError]:
    """Everything that keeps the model from being imported, one error per node where that is possible."""
    found: list[FheqError] = []
    try:
        _import(load(model), dims, found.append)
    except FheqError as error:
        found.append(error)
    return found


def _import(proto: onnx.ModelProto, dims: Mapping[str, int] | None, report: Report | None) -> Graph:
    reported: list[FheqError] = []

    def note(error: FheqError) -> None:
        reported.append(error)
        if report is not None:
            report(error)

    collect = None if report is None else note
    with reading("the model"):
        parsed = parse(proto, collect)
        numbered = number_strings(parsed.nodes, parsed.constants)
    parsed = replace(parsed, nodes=numbered.nodes, constants=numbered.constants)
    graph = _typed(parsed, dims, collect, reported)
    if graph is None:
        return Graph((), (), (), {}, {})
    _refuse_infinite_weights(graph)
    labels = dict.fromkeys(numbered.holders, numbered.strings)
    graph = graph.replace(outputs=tuple(replace(port, labels=labels.get(port.name)) for port in graph.outputs))
    return reduce(lambda g, rewrite: rewrite(g), DEFAULT_REWRITES, graph)


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
    outputs = output_ports(parsed.outputs, found.types, None if two is None else two.types)
    return Graph(
        found.nodes,
        ports,
        outputs,
        MappingProxyType(found.constants),
        MappingProxyType(found.types),
        MappingProxyType(found.pinned),
    )


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
