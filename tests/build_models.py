"""Small ONNX models for the tests."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

# One source for each module that draws: what a test sees does not depend on which others are collected or run with it.
SOURCES: dict[str, np.random.Generator] = {}


def tensor(*shape: int, low: float = -1.0, high: float = 1.0) -> np.ndarray:
    """Random float32 values, the next of the calling module."""
    source = SOURCES.setdefault(sys._getframe(1).f_globals["__name__"], np.random.default_rng(0))
    return source.uniform(low, high, shape).astype(np.float32)


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attrs: Any) -> onnx.NodeProto:
    """A node, named after its first output."""
    return helper.make_node(op, list(inputs), list(outputs), name=f"make_{outputs[0]}", **attrs)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Sequence[int | str | None] | None],
    outputs: Sequence[str],
    known: Mapping[str, np.ndarray] | None = None,
    *,
    opset: int = 17,
    kinds: Mapping[str, int] | None = None,
    domains: Mapping[str, int] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
) -> onnx.ModelProto:
    """A model; inputs are float unless `kinds` says otherwise."""
    kinds = kinds or {}
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, kinds.get(n, TensorProto.FLOAT), None) for n in outputs],
        [numpy_helper.from_array(np.asarray(v), n) for n, v in (known or {}).items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in (domains or {}).items())]
    return helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=8)


def mlp() -> onnx.ModelProto:
    """Two dense layers: x (N, 4) to y (N, 2)."""
    nodes = [
        node("Gemm", ["x", "w1", "b1"], ["h"], transB=1),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "w2"], ["m"]),
        node("Add", ["m", "b2"], ["y"]),
    ]
    known = {"w1": tensor(5, 4), "b1": tensor(5), "w2": tensor(5, 2), "b2": tensor(2)}
    return model(nodes, {"x": ["N", 4]}, ["y"], known)


def cnn() -> onnx.ModelProto:
    """Convolution, batch normalization, pooling and a reshape through Shape: x (N, 1, 6, 6) to y (N, 3)."""
    nodes = [
        node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("BatchNormalization", ["c", "gamma", "beta", "mean", "var"], ["n"]),
        node("Relu", ["n"], ["r"]),
        node("MaxPool", ["r"], ["p"], kernel_shape=[2, 2], strides=[2, 2]),
        node("Shape", ["p"], ["s"]),
        node("Slice", ["s", "zero", "one"], ["n_samples"]),
        node("Concat", ["n_samples", "minus"], ["target"], axis=0),
        node("Reshape", ["p", "target"], ["f"]),
        node("Gemm", ["f", "v"], ["y"]),
    ]
    known = {
        "w": tensor(2, 1, 3, 3),
        "gamma": tensor(2, low=0.5),
        "beta": tensor(2),
        "mean": tensor(2),
        "var": tensor(2, low=0.5),
        "zero": np.array([0]),
        "one": np.array([1]),
        "minus": np.array([-1]),
        "v": tensor(18, 3),
    }
    return model(nodes, {"x": ["N", 1, 6, 6]}, ["y"], known)


def reference(proto: onnx.ModelProto, *inputs: np.ndarray) -> list[np.ndarray]:
    """The outputs that onnxruntime gives."""
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return session.run(None, dict(zip([i.name for i in session.get_inputs()], inputs)))
