"""What a quantized model says, from integers to integers, in float64: a referee between onnxruntime and an imported program.

Every integer tensor of the model is read back from both. A *stage* makes one of them from others; its value before it is
rounded is worked out from integers that either side had itself, so that a difference is judged where it arises, not where it
is passed on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

OPSET = 21
# Operators on integers: the float operator, where (value, scale, zero point) triples begin, where the result's pair is.
INTEGER_OPS = {
    "QLinearConv": ("Conv", (0, 3), 6),
    "QLinearMatMul": ("MatMul", (0, 3), 6),
    "QGemm": ("Gemm", (0, 3), 7),
    "QLinearAdd": ("Add", (0, 3), 6),
    "QLinearMul": ("Mul", (0, 3), 6),
    "QLinearAveragePool": ("AveragePool", (0,), 3),
    "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,), 3),
    "QLinearSigmoid": ("Sigmoid", (0,), 3),
    "QLinearLeakyRelu": ("LeakyRelu", (0,), 3),
    "QLinearSoftmax": ("Softmax", (0,), 3),
}
_ITS_BIAS = {"QLinearConv": 8, "QGemm": 6}
_NOT_FLOAT = ("opset", "channels_last")


@dataclass(frozen=True)
class Stage:
    """What makes an integer tensor.

    Args:
        tensor: its name.
        node: the node that makes it.
        scale, zero: names of its quantizer's parameters.
    """

    tensor: str
    node: onnx.NodeProto
    scale: str
    zero: str


class Referee:
    """The stages of a quantized model, and their values before rounding."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.known = {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        self.producers = {name: node for node in proto.graph.node for name in node.output}
        (self.input,) = (port.name for port in proto.graph.input)
        self.stages = []
        for node in proto.graph.node:
            if node.op_type == "QuantizeLinear":
                self.stages.append(Stage(node.output[0], node, *node.input[1:3]))
            elif node.op_type in INTEGER_OPS and (at := INTEGER_OPS[node.op_type][2]) < len(node.input):
                self.stages.append(Stage(node.output[0], node, *node.input[at : at + 2]))
            elif node.op_type == "QLinearConcat":
                self.stages.append(Stage(node.output[0], node, *node.input[:2]))

    def integers(self, x: np.ndarray, *, optimised: bool) -> dict[str, np.ndarray]:
        """The integers of every stage in onnxruntime, on integer kernels or (not optimised) in float32 node by node."""
        proto = onnx.ModelProto.FromString(self.proto.SerializeToString())
        del proto.graph.output[:]
        for stage in self.stages:
            kind = helper.np_dtype_to_tensor_dtype(self.known[stage.zero].dtype)
            proto.graph.output.append(helper.make_tensor_value_info(stage.tensor, kind, None))
        options = onnxruntime.SessionOptions()
        if not optimised:
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options)
        names = [stage.tensor for stage in self.stages]
        runs = [session.run(names, {self.input: part}) for part in self.parts(x)]
        return {name: np.concatenate(parts).astype(np.int64) for name, parts in zip(names, zip(*runs))}

    def parts(self, x: np.ndarray) -> list[np.ndarray]:
        """Samples as the model takes them: together, or one by one where its batch is fixed."""
        return [x] if self.proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param else list(x[:, None])

    def nearest(self, stage: Stage, x: np.ndarray, integers: dict[str, np.ndarray]) -> np.ndarray:
        """The integers that the values of a stage round to, by ONNX' definition."""
        zero = self.known[stage.zero]
        limits = ml_dtypes.iinfo(zero.dtype)
        return np.clip(np.round(self.steps(stage, x, integers)) + zero.astype(np.float64), limits.min, limits.max)

    def judged(self, stage: Stage, x: np.ndarray, integers: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Whether each integer of a stage is another than its value rounds to, and how far that value is from a tie."""
        steps = self.steps(stage, x, integers)
        return integers[stage.tensor] != self.nearest(stage, x, integers), np.abs(np.abs(steps - np.floor(steps)) - 0.5)

    def tapped(self) -> onnx.ModelProto:
        """The model with the real values of every stage as further outputs."""
        proto = onnx.ModelProto.FromString(self.proto.SerializeToString())
        for stage in self.stages:
            name = f"{stage.tensor}/tap"
            proto.graph.node.append(helper.make_node("DequantizeLinear", [stage.tensor, stage.scale, stage.zero], [name]))
            proto.graph.output.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, None))
        return proto

    def steps(self, stage: Stage, x: np.ndarray, integers: dict[str, np.ndarray]) -> np.ndarray:
        """The value of a stage before rounding, in steps of its scale without the zero point, from the given integers."""
        return self.by_parts(lambda *part: self._real(stage, *part), x, integers) / np.float64(self.known[stage.scale])

    def output(self, x: np.ndarray, integers: dict[str, np.ndarray]) -> np.ndarray:
        """The model's output from the given integers."""
        return self.by_parts(lambda *part: self.value(self.proto.graph.output[0].name, *part), x, integers)

    def by_parts(self, compute: Callable[..., np.ndarray], x: np.ndarray, integers: dict[str, np.ndarray]) -> np.ndarray:
        """What is computed from samples, and integers of them, as the model takes them."""
        columns = zip(self.parts(x), *(self.parts(v) for v in integers.values()))
        return np.concatenate([compute(part, dict(zip(integers, rest))) for part, *rest in columns])

    def _real(self, stage: Stage, x: np.ndarray, integers: dict[str, np.ndarray]) -> np.ndarray:
        node = stage.node
        if node.op_type in INTEGER_OPS:
            op, starts, _ = INTEGER_OPS[node.op_type]
            inputs = [self.real(node, at, integers, x) for at in starts]
            bias = _ITS_BIAS.get(node.op_type)
            if bias is not None and bias < len(node.input) and node.input[bias]:
                scale = np.float64(self.known[node.input[1]]) * np.float64(self.known[node.input[4]])
                inputs.append(self.known[node.input[bias]] * scale)
            return _float64(op, inputs, node)
        if node.op_type == "QLinearConcat":
            parts = [self.real(node, at, integers, x) for at in range(2, len(node.input), 3)]
            return _float64("Concat", parts, node)
        return self.value(node.input[0], x, integers)

    def real(self, node: onnx.NodeProto, at: int, integers: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
        """What the integers at an input of a node stand for; channels of a weight are its first or last axis."""
        q = self.value(node.input[at], x, integers)
        scale, zero = (np.asarray(self.known[name], np.float64) for name in node.input[at + 1 : at + 3])
        if scale.size > 1:
            first = node.op_type == "QLinearConv" or any(a.name == "transB" and a.i for a in node.attribute)
            view = (-1, *(1,) * (q.ndim - 1)) if first else (-1,)
            scale, zero = scale.reshape(view), zero.reshape(view)
        return (q - zero) * scale

    def value(self, name: str, x: np.ndarray, integers: dict[str, np.ndarray]) -> np.ndarray:
        """A tensor in float64: known, the input, integers of a stage, or computed from those."""
        if name in integers:
            return integers[name].astype(np.float64)
        if name in self.known:
            value = self.known[name]
            return value if value.dtype == np.int64 else value.astype(np.float64)
        if name == self.input:
            return x.astype(np.float64)
        node = self.producers[name]
        if node.op_type == "DequantizeLinear":
            q = self.value(node.input[0], x, integers)
            scale, zero = (self.known[n].astype(np.float64) for n in (*node.input[1:], node.input[1])[:2])
            zero = zero if len(node.input) > 2 else np.zeros_like(scale)
            if scale.ndim == 1 and scale.size > 1:
                axis = next((a.i for a in node.attribute if a.name == "axis"), 1) % q.ndim
                scale, zero = (v.reshape(-1, *(1,) * (q.ndim - axis - 1)) for v in (scale, zero))
            return (q - zero) * scale
        return _float64(node.op_type, [self.value(n, x, integers) if n else None for n in node.input], node)


def _float64(op: str, inputs: list[np.ndarray | None], node: onnx.NodeProto) -> np.ndarray:
    """A float operator of ONNX, by onnx.reference in float64."""
    names = [f"i{i}" if v is not None else "" for i, v in enumerate(inputs)]
    made = helper.make_node(op, names, ["y"])
    made.attribute.extend(a for a in node.attribute if a.name not in _NOT_FLOAT)
    infos = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
        for n, v in zip(names, inputs)
        if v is not None
    ]
    graph = helper.make_graph([made], "g", infos, [helper.make_tensor_value_info("y", TensorProto.DOUBLE, None)])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    return ReferenceEvaluator(proto).run(None, {n: v for n, v in zip(names, inputs) if v is not None})[0]
