"""Other weights and biases in the linear nodes of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from fheq.graph import Graph, Node
from fheq.rewriting.edit import Draft
from fheq.steps import Linear, Step


def replaceable(graph: Graph, step: Step) -> bool:
    """Whether `with_weights` can change the weight of a step: that of an ordinary MatMul, Gemm or Conv, not quantized yet."""
    if not isinstance(step, Linear) or step.weight_name in graph.pinned or step.node.op not in ("MatMul", "Gemm", "Conv"):
        return False
    readers = sum(step.weight_name in node.inputs for node in graph.nodes)
    plain = step.form == "conv" or (step.form == "matmul" and not step.node.attrs.get("transA", 0))
    return readers == 1 and plain and graph.constants[step.weight_name].ndim == step.weight.ndim >= 2


def with_weights(graph: Graph, steps: Mapping[str, Linear]) -> Graph:
    """The graph with the weights and biases of `steps`, by the name of the tensor that each makes.

    Args:
        graph: a decomposed graph (`plan(graph).graph`).
        steps: replaceable steps of its plan, whose `weight` (in the step's own form) and `bias` were changed.
    """
    draft = Draft(graph)
    for node in graph.nodes:
        step = steps.get(node.outputs[0])
        if step is None:
            draft.write(node)
        else:
            _write(draft, node, step)
    return draft.finish()


def _write(draft: Draft, node: Node, step: Linear) -> None:
    dtype, base = draft.graph.constants[step.weight_name].dtype, node.outputs[0]
    channels = step.weight.shape[step.weight_axis]
    if step.form == "conv":
        bias = np.broadcast_to(np.ravel(step.bias), (channels,))
    else:
        bias = np.broadcast_to(step.bias, np.broadcast_shapes(np.shape(step.bias), (channels,)))
    weight = draft.constant(f"{base}/weight", step.weight, dtype)
    offset = draft.constant(f"{base}/bias", bias, dtype)
    if node.op == "MatMul":
        draft.apply(node, "Add", draft.apply(node, "MatMul", node.inputs[0], weight), offset, out=base)
        return
    plain = {} if node.op == "Conv" else {"alpha": 1.0, "beta": 1.0, "transB": 0}
    attrs = MappingProxyType({**node.attrs, **plain})
    draft.write(replace(node, inputs=(node.inputs[0], weight, offset), attrs=attrs))
