"""Small models whose linear operators and tables read one encrypted tensor."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from build_models import node
from model_case import batch_norm, case, chain, normal, weights

# Linear ops


@case(inputs={"x": normal(4)}, lookups=1)
def gemm_with_alpha_beta_and_transposes() -> onnx.ModelProto:
    nodes = [
        node("Gemm", ["x", "w1", "b1"], ["h"], alpha=0.5, beta=2.0, transB=1),
        node("Sigmoid", ["h"], ["s"]),
        node("Gemm", ["s", "w2"], ["y"], alpha=-1.5),
    ]
    return chain(nodes, (4,), {"w1": weights(5, 4), "b1": weights(5), "w2": weights(5, 2)})


@case(inputs={"x": normal(3, 4)}, lookups=1)
def matmul_on_the_left_and_the_right() -> onnx.ModelProto:
    nodes = [
        node("MatMul", ["w1", "x"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "w2"], ["y"]),
    ]
    return chain(nodes, (3, 4), {"w1": weights(2, 3), "w2": weights(4, 3)})


@case(inputs={"x": normal(4, 9)}, lookups=1)
def conv1d_group_stride_dilation_pad() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c"], group=2, strides=[2], dilations=[2], pads=[1, 2]),
        node("Tanh", ["c"], ["t"]),
        node("Conv", ["t", "w2"], ["y"]),
    ]
    return chain(nodes, (4, 9), {"w1": weights(4, 2, 3), "b1": weights(4), "w2": weights(2, 4, 2)})


@case(inputs={"x": normal(2, 5, 6)}, lookups=1)
def conv2d_group_stride_dilation_uneven_pad() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c"], group=2, strides=[2, 1], dilations=[1, 2], pads=[1, 0, 0, 2]),
        node("Relu", ["c"], ["r"]),
        node("Conv", ["r", "w2"], ["y"], kernel_shape=[2, 2]),
    ]
    return chain(nodes, (2, 5, 6), {"w1": weights(4, 1, 2, 2), "b1": weights(4), "w2": weights(1, 4, 2, 2)})


@case(inputs={"x": normal(1, 5, 4)}, lookups=1)
def conv2d_auto_pad() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w1"], ["c"], auto_pad="SAME_UPPER", strides=[2, 2]),
        node("LeakyRelu", ["c"], ["r"], alpha=0.2),
        node("Conv", ["r", "w2"], ["y"], auto_pad="SAME_LOWER"),
    ]
    return chain(nodes, (1, 5, 4), {"w1": weights(2, 1, 3, 3), "w2": weights(1, 2, 2, 2)})


@case(inputs={"x": normal(2, 3, 3, 4)}, lookups=1)
def conv3d_with_groups() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c"], group=2, strides=[1, 2, 1], pads=[0, 1, 0, 0, 0, 1]),
        node("Relu", ["c"], ["r"]),
        node("Conv", ["r", "w2"], ["y"]),
    ]
    return chain(nodes, (2, 3, 3, 4), {"w1": weights(2, 1, 2, 2, 2), "b1": weights(2), "w2": weights(1, 2, 1, 1, 2)})


@case(inputs={"x": normal(2, 3, 3)}, lookups=1)
def transposed_convolution() -> onnx.ModelProto:
    nodes = [
        node("ConvTranspose", ["x", "w1", "b1"], ["c"], strides=[2, 2], pads=[1, 0, 0, 1], output_padding=[1, 0]),
        node("Relu", ["c"], ["r"]),
        node("Conv", ["r", "w2"], ["y"]),
    ]
    return chain(nodes, (2, 3, 3), {"w1": weights(2, 2, 2, 2), "b1": weights(2), "w2": weights(1, 2, 1, 1)})


# Pools and reductions


@case(inputs={"x": normal(1, 5, 5)})
def average_pool_with_pads_and_ceil() -> onnx.ModelProto:
    options: dict[str, Any] = {"kernel_shape": [2, 2], "strides": [2, 2]}
    nodes = [
        node("Conv", ["x", "w1"], ["c"]),
        node("AveragePool", ["c"], ["p"], pads=[1, 1, 0, 0], ceil_mode=1, **options),
        node("Relu", ["p"], ["r"]),
        node("AveragePool", ["r"], ["y"], count_include_pad=1, pads=[0, 0, 1, 1], **options),
    ]
    return chain(nodes, (1, 5, 5), {"w1": weights(2, 1, 2, 2)})


@case(inputs={"x": normal(1, 4, 4)})
def max_pool_with_pads() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w1"], ["c"], pads=[1, 1, 0, 0]),
        node("MaxPool", ["c"], ["p"], kernel_shape=[2, 2], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Conv", ["p", "w2"], ["y"]),
    ]
    return chain(nodes, (1, 4, 4), {"w1": weights(2, 1, 2, 2), "w2": weights(1, 2, 2, 2)})


@case(inputs={"x": normal(3, 4)})
def reduce_sum_and_mean() -> onnx.ModelProto:
    nodes = [
        node("MatMul", ["x", "w1"], ["h"]),
        node("ReduceSum", ["h", "axes"], ["s"], keepdims=1),
        node("Relu", ["s"], ["r"]),
        node("ReduceMean", ["r"], ["y"], axes=[2], keepdims=0),
    ]
    return chain(nodes, (3, 4), {"w1": weights(4, 3), "axes": np.array([1])})


@case(inputs={"x": normal(1, 4, 4)})
def global_average_pool() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w1"], ["c"]),
        node("Relu", ["c"], ["r"]),
        node("GlobalAveragePool", ["r"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "w2", "b2"], ["y"]),
    ]
    return chain(nodes, (1, 4, 4), {"w1": weights(3, 1, 2, 2), "w2": weights(3, 2), "b2": weights(2)})


# Elementwise regions


@case(inputs={"x": normal(2, 3, 3)}, lookups=1)
def batch_norm_before_and_after_and_bias_and_clip() -> onnx.ModelProto:
    before, known = batch_norm("x", "n1", 2)
    after, more = batch_norm("c", "n2", 3)
    nodes = [
        before,
        node("Conv", ["n1", "w1", "b1"], ["c"]),
        after,
        node("Mul", ["n2", "gain"], ["g"]),
        node("Add", ["g", "shift"], ["a"]),
        node("Clip", ["a", "low", "high"], ["k"]),
        node("Conv", ["k", "w2"], ["y"]),
    ]
    known |= more | {"w1": weights(3, 2, 2, 2), "b1": weights(3), "w2": weights(2, 3, 1, 1)}
    known |= {"gain": weights(3, 1, 1, low=0.5), "shift": weights(3, 1, 1)}
    known |= {"low": np.float32(-0.5), "high": np.float32(1.5)}
    return chain(nodes, (2, 3, 3), known)


@case(inputs={"x": normal(4)}, lookups=1)
def activation_with_branches() -> onnx.ModelProto:
    nodes = [
        node("Gemm", ["x", "w1", "b1"], ["h"]),
        node("Sigmoid", ["h"], ["s"]),
        node("Mul", ["h", "s"], ["silu"]),
        node("Add", ["silu", "half"], ["a"]),
        node("Gemm", ["a", "w2"], ["y"]),
    ]
    return chain(nodes, (4,), {"w1": weights(4, 4), "b1": weights(4), "half": np.float32([0.5]), "w2": weights(4, 2)})


@case(inputs={"x": normal(4)}, lookups=1)
def movement_between_layers() -> onnx.ModelProto:
    nodes = [
        node("Gemm", ["x", "w1"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("Reshape", ["r", "s234"], ["a"]),
        node("Transpose", ["a"], ["b"], perm=[0, 2, 1]),
        node("Pad", ["b", "pads"], ["c"]),
        node("Slice", ["c", "starts", "ends", "axes", "steps"], ["d"]),
        node("Gather", ["d", "picks"], ["e"], axis=1),
        node("Tile", ["e", "repeats"], ["f"]),
        node("Unsqueeze", ["f", "axis1"], ["g"]),
        node("Expand", ["g", "wide"], ["i"]),
        node("Squeeze", ["k", "axis1"], ["l"]),
        node("Split", ["i"], ["k", "unused"], axis=1, num_outputs=2),
        node("MatMul", ["l", "w2"], ["y"]),
    ]
    nodes[10], nodes[11] = nodes[11], nodes[10]
    known = {
        "w1": weights(4, 6),
        "s234": np.array([-1, 2, 3]),
        "pads": np.array([0, 1, 0, 0, 0, 1]),
        "starts": np.array([3]),
        "ends": np.array([-5]),
        "axes": np.array([1]),
        "steps": np.array([-1]),
        "picks": np.array([0, 2, 3, 1]),
        "repeats": np.array([1, 1, 2]),
        "axis1": np.array([1]),
        "wide": np.array([1, 2, 4, 6]),
        "w2": weights(6, 2),
    }
    return chain(nodes, (4,), known, opset=18)


@case(inputs={"x": normal(5)})
def output_without_table() -> onnx.ModelProto:
    return chain([node("Gemm", ["x", "w", "b"], ["y"])], (5,), {"w": weights(5, 3), "b": weights(3)})


@case(inputs={"x": normal(2, 3)}, lookups=0)
def movement_alone() -> onnx.ModelProto:
    nodes = [node("Transpose", ["x"], ["t"], perm=[0, 2, 1]), node("Flatten", ["t"], ["y"])]
    return chain(nodes, (2, 3), {})


@case(inputs={"x": normal(4)}, lookups=1)
def one_table_alone() -> onnx.ModelProto:
    return chain([node("Tanh", ["x"], ["y"])], (4,), {})


@case(inputs={"x": normal(4)}, lookups=1)
def choice_of_functions_of_one_tensor() -> onnx.ModelProto:
    """What is not chosen may be no number."""
    nodes = [
        node("Gemm", ["x", "w1"], ["h"]),
        node("Greater", ["h", "limit"], ["c"]),
        node("Sqrt", ["h"], ["r"]),
        node("Where", ["c", "r", "h"], ["t"]),
        node("Gemm", ["t", "w2"], ["y"]),
    ]
    return chain(nodes, (4,), {"w1": weights(4, 5), "limit": np.float32(1), "w2": weights(5, 2)})


@case(inputs={"x": normal(4)})
def one_source_split_and_joined() -> onnx.ModelProto:
    nodes = [
        node("Gemm", ["x", "w1"], ["h"]),
        node("Split", ["h"], ["a", "b"], axis=1, num_outputs=2),
        node("Relu", ["a"], ["ra"]),
        node("Tanh", ["b"], ["tb"]),
        node("Concat", ["tb", "ra"], ["j"], axis=1),
        node("Gemm", ["j", "w2"], ["y"]),
    ]
    return chain(nodes, (4,), {"w1": weights(4, 4), "w2": weights(4, 2)}, opset=18)
