"""What tests of models that onnxruntime has quantized share."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
from build_models import node

import fheq

RNG = np.random.default_rng(0)
CALIBRATION = RNG.normal(size=(400, 2, 4, 4)).astype(np.float32)
SAMPLES = RNG.normal(size=(100, 2, 4, 4)).astype(np.float32)


def answers(program: fheq.IntProgram, x: np.ndarray) -> np.ndarray:
    return program.dequantize(fheq.simulate(program, *program.quantize(x)))[0]


def session(proto: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """onnxruntime as the nodes say, without its own fused kernels."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    return onnxruntime.InferenceSession(proto.SerializeToString(), options)


def qdq(source: str, target: str, axis: int = 1) -> list[onnx.NodeProto]:
    return [
        node("QuantizeLinear", [source, "s", "z"], [f"{target}_q"], axis=axis),
        node("DequantizeLinear", [f"{target}_q", "s", "z"], [target], axis=axis),
    ]
