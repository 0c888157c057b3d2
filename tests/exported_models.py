"""Models that are exported with their quantizers, each for what its export takes."""

from __future__ import annotations

import numpy as np
import onnx
from build_models import cnn, mlp, model, node, tensor
from models import CASES, weights


def residual() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w"], ["c"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        node("Relu", ["c"], ["r"]),
        node("ConvTranspose", ["r", "u"], ["d"], kernel_shape=[1, 1], group=2),
        node("Add", ["d", "r"], ["s"]),
        node("Sigmoid", ["s"], ["e"]),
        node("GlobalAveragePool", ["e"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "v", "b"], ["y"], transB=1, alpha=0.5),
    ]
    known = {"w": weights(4, 1, 3, 3), "u": weights(4, 2, 1, 1), "v": weights(3, 4), "b": weights(3)}
    return model(nodes, {"x": ["N", 1, 4, 4]}, ["y"], known)


def joined() -> onnx.ModelProto:
    nodes = [
        node("MatMul", ["x", "w"], ["h"]),
        node("Tanh", ["h"], ["t"]),
        node("Concat", ["t", "x"], ["j"], axis=1),
        node("MatMul", ["j", "v"], ["y"]),
    ]
    return model(nodes, {"x": ["N", 4]}, ["y"], {"w": tensor(4, 3), "v": tensor(7, 2)}, opset=11)


def looked_up() -> onnx.ModelProto:
    """Encrypted indices of rows of a table."""
    nodes = [
        node("Gather", ["table", "x"], ["e"]),
        node("Flatten", ["e"], ["f"]),
        node("MatMul", ["f", "w"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "v"], ["y"]),
    ]
    known = {"table": tensor(5, 3), "w": tensor(6, 4), "v": tensor(4, 2)}
    return model(nodes, {"x": ["N", 2]}, ["y"], known, kinds={"x": onnx.TensorProto.INT64})


def several_forms() -> onnx.ModelProto:
    """Scales that vary within a channel (of the product), a split read twice, an accumulator that is decrypted and read by a
    table, pads after a shift."""
    nodes = [
        node("Mul", ["x", "x"], ["s"]),
        node("Mul", ["s", "x"], ["p"]),
        node("Conv", ["p", "w"], ["c"], pads=[1, 1, 1, 1]),
        node("Split", ["c"], ["a", "b"], axis=1, num_outputs=2),
        node("Relu", ["a"], ["r"]),
        node("MatMul", ["r", "v"], ["m"]),
        node("MatMul", ["b", "v"], ["n"]),
        node("Concat", ["m", "n", "c"], ["y"], axis=1),
    ]
    return model(nodes, {"x": ["N", 1, 4, 4]}, ["y"], {"w": tensor(2, 1, 3, 3), "v": tensor(4, 4)}, opset=18)


def opposite_columns() -> onnx.ModelProto:
    """The scores of two classes: weights of one scale, and another zero point in each column."""
    w = np.linspace(0.2, 1, 4, dtype=np.float32)[:, None]
    return model([node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 4]}, ["y"], {"w": np.concatenate([w, -w], axis=1)})


def with_a_token() -> onnx.ModelProto:
    """A token of its own before those of a sample, attention with a known mask, and rows of all samples in one product."""
    causal = np.where(np.tri(4, dtype=bool), 0, -1e9).astype(np.float32)
    nodes = [
        node("Concat", ["token", "x"], ["j"], axis=1),
        node("Transpose", ["j"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["j", "t"], ["scores"]),
        node("Add", ["scores", "mask"], ["a"]),
        node("Softmax", ["a"], ["p"], axis=-1),
        node("MatMul", ["p", "j"], ["m"]),
        node("Reshape", ["m", "rows"], ["f"]),
        node("Gemm", ["f", "w"], ["g"]),
        node("Reshape", ["g", "back"], ["y"]),
    ]
    known = {
        "token": tensor(1, 1, 2),
        "w": tensor(2, 3),
        "mask": causal,
        "rows": np.array([-1, 2]),
        "back": np.array([-1, 4, 3]),
    }
    return model(nodes, {"x": ["N", 3, 2]}, ["y"], known)


def recurrent() -> onnx.ModelProto:
    nodes = [
        node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        node("LSTM", ["t", "w", "r"], ["", "h"], hidden_size=2, direction="bidirectional"),
        node("Transpose", ["h"], ["s"], perm=[1, 0, 2]),
        node("Flatten", ["s"], ["f"]),
        node("MatMul", ["f", "v"], ["y"]),
    ]
    return model(nodes, {"x": ["N", 2, 3]}, ["y"], {"w": tensor(2, 8, 3), "r": tensor(2, 8, 2), "v": tensor(4, 2)})


def whole_results() -> onnx.ModelProto:
    """Integers that have more values than bits count: their steps are whole numbers."""
    nodes = [
        node("MatMul", ["x", "w"], ["m"]),
        node("Mul", ["m", "k"], ["s"]),
        node("Cast", ["s"], ["y"], to=onnx.TensorProto.INT64),
    ]
    kinds = {"y": onnx.TensorProto.INT64}
    return model(nodes, {"x": ["N", 4]}, ["y"], {"w": tensor(4, 3), "k": np.float32(300)}, kinds=kinds)


def quantized_by_the_client() -> onnx.ModelProto:
    """A softmax that the client computes, with the quantizer of the model behind it."""
    nodes = [
        node("MatMul", ["x", "w"], ["m"]),
        node("Softmax", ["m"], ["p"]),
        node("QuantizeLinear", ["p", "s", "z"], ["q"]),
        node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    known = {"w": tensor(4, 3), "s": np.float32(1 / 255), "z": np.uint8(0)}
    return model(nodes, {"x": ["N", 4]}, ["y"], known)


def sign_of_a_difference() -> onnx.ModelProto:
    """Of 0 as well, which float noise must not turn: the offset of the difference is some whole units."""
    nodes = [
        node("Split", ["x"], ["a", "b"], axis=1),
        node("Mul", ["a", "k"], ["c"]),
        node("Mul", ["b", "l"], ["d"]),
        node("Add", ["c", "d"], ["s"]),
        node("Sub", ["s", "b"], ["e"]),
        node("Sign", ["e"], ["y"]),
    ]
    return model(nodes, {"x": ["N", 2]}, ["y"], {"k": np.float32(0.7), "l": np.float32(0.3)}, opset=13)


def choice_of_functions() -> onnx.ModelProto:
    """Of one input: one table, with 0 where a function has no value, as for an input that is quantized to 0."""
    nodes = [
        node("Mul", ["x", "x"], ["s"]),
        node("Reciprocal", ["s"], ["r"]),
        node("Mul", ["r", "r"], ["p"]),
        node("Sub", ["p", "r"], ["d"]),
        node("Clip", ["d", "low", "high"], ["c"]),
        node("Greater", ["x", "k"], ["g"]),
        node("Where", ["g", "x", "c"], ["t"]),
        node("MatMul", ["t", "w"], ["y"]),
    ]
    known = {"k": np.float32(0.5), "low": np.float32(-2), "high": np.float32(2), "w": tensor(4, 3)}
    return model(nodes, {"x": ["N", 4]}, ["y"], known)


def heads() -> onnx.ModelProto:
    """Behind layers that add to what they read; the client joins what one table and what no table makes, and scales it."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Relu", ["a"], ["p"]),
        node("Add", ["x", "p"], ["h"]),
        node("MatMul", ["h", "v"], ["b"]),
        node("Sigmoid", ["b"], ["s"]),
        node("MatMul", ["h", "u"], ["c"]),
        node("Concat", ["s", "c"], ["j"], axis=1),
        node("Mul", ["j", "k"], ["y"]),
    ]
    known = {"w": tensor(4, 4), "v": tensor(4, 2), "u": tensor(4, 3), "k": tensor(5, low=0.5, high=2.0)}
    return model(nodes, {"x": ["N", 4]}, ["y"], known)


def functions_of_joined_layers() -> onnx.ModelProto:
    """One table of each part, whose products with one more input are added up."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("MatMul", ["x", "v"], ["b"]),
        node("Concat", ["a", "b"], ["j"], axis=1),
        node("Mul", ["j", "k"], ["m"]),
        node("Tanh", ["m"], ["t"]),
        node("Mul", ["t", "x"], ["p"]),
        node("ReduceSum", ["p", "last"], ["y"], keepdims=0),
    ]
    known = {"w": tensor(4, 2), "v": tensor(4, 2), "k": tensor(4, low=0.5, high=2.0), "last": np.array([1])}
    return model(nodes, {"x": ["N", 4]}, ["y"], known)


def weighed_inputs() -> onnx.ModelProto:
    """Of one input, added to a layer's result for the output alone."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        node("Mul", ["t", "k"], ["m"]),
        node("Add", ["a", "m"], ["y"]),
    ]
    return model(nodes, {"x": ["N", 3, 3]}, ["y"], {"w": tensor(3, 3), "k": tensor(3, low=0.5, high=2.0)})


def negated_sums() -> onnx.ModelProto:
    """Of an input whose range is not about 0: their integers fall where the sums rise."""
    nodes = [
        node("Div", ["x", "k"], ["d"]),
        node("Sub", ["d", "l"], ["e"]),
        node("ReduceSum", ["e", "last"], ["s"]),
        node("Relu", ["s"], ["y"]),
    ]
    known = {"k": np.float32(-0.77), "l": np.float32(1.5), "last": np.array([2])}
    return model(nodes, {"x": ["N", 2, 4]}, ["y"], known)


def bottlenecks() -> onnx.ModelProto:
    """Linear ones, whose sum is read by weights alone."""
    nodes = [
        node("MatMul", ["x", "w"], ["a"]),
        node("Relu", ["a"], ["r"]),
        node("Gemm", ["r", "v", "b"], ["h"]),
        node("MatMul", ["h", "w"], ["c"]),
        node("Sigmoid", ["c"], ["p"]),
        node("MatMul", ["p", "v"], ["d"]),
        node("Add", ["h", "d"], ["s"]),
        node("MatMul", ["s", "u"], ["e"]),
        node("Relu", ["e"], ["y"]),
    ]
    known = {"w": tensor(4, 5), "v": tensor(5, 4), "b": tensor(4), "u": tensor(4, 3)}
    return model(nodes, {"x": ["N", 4]}, ["y"], known)


def pooled() -> onnx.ModelProto:
    """A maximum of a layer's results as sums of its accumulators, which several sums read."""
    nodes = [
        node("Conv", ["x", "w"], ["c"]),
        node("Gather", ["c", "even"], ["a"], axis=3),
        node("Gather", ["c", "odd"], ["b"], axis=3),
        node("Sub", ["a", "b"], ["d"]),
        node("Relu", ["d"], ["r"]),
        node("Add", ["b", "r"], ["m"]),
        node("Sigmoid", ["m"], ["s"]),
        node("GlobalAveragePool", ["s"], ["y"]),
    ]
    known = {"w": tensor(3, 1, 3, 3), "even": np.array([0, 2]), "odd": np.array([1, 3])}
    return model(nodes, {"x": ["N", 1, 6, 6]}, ["y"], known)


MODELS = {
    "pooled": (pooled(), (1, 6, 6)),
    "bottlenecks": (bottlenecks(), (4,)),
    "negated sums": (negated_sums(), (2, 4)),
    "heads": (heads(), (4,)),
    "functions of joined layers": (functions_of_joined_layers(), (4,)),
    "weighed inputs": (weighed_inputs(), (3, 3)),
    "mlp": (mlp(), (4,)),
    "cnn": (cnn(), (1, 6, 6)),
    "residual": (residual(), (1, 4, 4)),
    "joined": (joined(), (4,)),
    "looked up": (looked_up(), (2,)),
    "opposite columns": (opposite_columns(), (4,)),
    "several forms": (several_forms(), (1, 4, 4)),
    "layers added": (CASES["two_convolutions_added"].build(), (3, 6, 6)),
    "dead channel": (CASES["residual_whose_layer_has_a_dead_channel"].build(), (4,)),
    "skips": (CASES["results_added_to_the_residual_and_to_each_other"].build(), (4,)),
    "decrypted": (CASES["decrypted_and_read_by_a_table"].build(), (4,)),
    "pads": (CASES["pads_after_a_shift"].build(), (2, 4)),
    "known channels": (CASES["known_channels_beside_an_input"].build(), (1, 3, 3)),
    "pixels": (CASES["normalized_pixels"].build(), (2, 4, 4)),
    "token": (with_a_token(), (3, 2)),
    "recurrent": (recurrent(), (2, 3)),
    "whole results": (whole_results(), (4,)),
    "choice of functions": (choice_of_functions(), (4,)),
    "quantized by the client": (quantized_by_the_client(), (4,)),
    "sign of a difference": (sign_of_a_difference(), (2,)),
}
