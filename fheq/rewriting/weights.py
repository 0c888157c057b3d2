"""Other weights and biases in the linear nodes of a graph."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TypeGuard

import numpy as np

from fheq.graph import Graph, Node
from fheq.rewriting.edit import Draft
from fheq.steps import Linear, Step


def replaceable(graph: Graph, step: Step) -> TypeGuard[Linear]:
    """Whether `with_weights` can change the weight and bias of a step.

    It can for an ordinary MatMul, Gemm or Conv whose weight nothing else reads and the model has not quantized.
    """
    if not isinstance(step, Linear) or step.weight_name in graph.pinned or step.node.op not in ("MatMul", "Gemm", "Conv"):
        return False
    readers = sum(step.weight_name in node.inputs for node in graph.nodes)
    plain = step.form == "conv" or (step.form == "matmul" and not step.node.attrs.get("transA", 0))
    if readers != 1 or not plain or not graph.constants[step.weight_name].ndim == step.weight.ndim >= 2:
        return False
    return _takes_bias(graph, step.node) or step.out not in {port.name for port in graph.outputs}


def takes_bias(graph: Graph, points: Container[str], step: Linear) -> bool:
    """Whether `with_weights` can change the bias of a replaceable step and leave the quantizers of a plan in place: those of
    a product of stacked matrices that is quantized as it is would be of the sum behind it."""
    return _takes_bias(graph, step.node) or step.out not in points


def _takes_bias(graph: Graph, node: Node) -> bool:
    return node.op != "MatMul" or len(graph.types[node.inputs[0]].shape) == 2


def with_weights(graph: Graph, steps: Mapping[str, Linear]) -> Graph:
    """The graph with other weights and biases; tensors that quantizers name keep their names.

    Args:
        graph: a decomposed graph (`plan(graph).graph`).
        steps: replaceable steps of its plan by the tensor that each makes, whose `weight` (in the step's own form) and
            `bias` were changed.
    """
    draft = Draft(graph)
    renamed: dict[str, str] = {}
    for node in graph.nodes:
        node = replace(node, inputs=tuple(renamed.get(name, name) for name in node.inputs))
        step = steps.get(node.outputs[0])
        if step is None:
            draft.write(node)
        else:
            _write(draft, node, step, renamed)
    return draft.finish()


def _write(draft: Draft, node: Node, step: Linear, renamed: dict[str, str]) -> None:
    dtype, base = draft.graph.constants[step.weight_name].dtype, node.outputs[0]
    channels = step.weight.shape[step.weight_axis]
    if step.form == "conv":
        bias = np.broadcast_to(np.ravel(step.bias), (channels,))
    else:
        bias = np.broadcast_to(step.bias, np.broadcast_shapes(np.shape(step.bias), (channels,)))
    del draft.constants[step.weight_name], draft.types[step.weight_name]
    weight = draft.constant(step.weight_name, step.weight, dtype)
    if not _takes_bias(draft.graph, node):
        draft.write(replace(node, inputs=(node.inputs[0], weight)))
        if np.any(bias):
            renamed[base] = draft.apply(node, "Add", base, draft.constant(f"{base}/bias", bias, dtype))
        return
    offset = draft.constant(f"{base}/bias", bias, dtype)
    op = "Conv" if node.op == "Conv" else "Gemm"
    plain = {} if op == "Conv" else {"alpha": 1.0, "beta": 1.0, "transA": 0, "transB": 0}
    attrs = MappingProxyType({**node.attrs, **plain})
    draft.write(replace(node, op=op, inputs=(node.inputs[0], weight, offset), attrs=attrs, version=max(node.version, 13)))
