"""A table of small models: one per form that the integer side takes.

Each is made from `onnx.helper` nodes; `CASES` says what to feed it. The names of the cases are what they cover.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import onnx
from build_models import model, node
from onnx import TensorProto

import fheq


def weights(*shape: int, low: float = -1.0, high: float = 1.0, seed: int = 0) -> np.ndarray:
    """Random float32 values that depend on the arguments alone, so that a case is the same whichever tests run."""
    rng = np.random.default_rng([seed, *shape])
    return rng.uniform(low, high, shape).astype(np.float32)


def normal(*shape: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Makes `(n, *shape)` standard normal values."""
    return lambda rng, n: rng.normal(size=(n, *shape)).astype(np.float32)


def tokens(count: int, *shape: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Makes `(n, *shape)` integers below `count`."""
    return lambda rng, n: rng.integers(0, count, size=(n, *shape))


@dataclass(frozen=True)
class Case:
    """A model and its inputs.

    Args:
        build: makes the model.
        inputs: by name, makes n samples of each input.
        lookups: table instructions that the program may have; None where the case does not say.
        r2: bound on the R2 of the 8-bit program against the float model; see `tests/test_integer.py`.
        bits: n_bits of the program that is compiled.
    """

    build: Callable[[], onnx.ModelProto]
    inputs: Mapping[str, Callable[[np.random.Generator, int], np.ndarray]]
    lookups: int | None = None
    r2: float = 0.995
    bits: int = 3

    def data(self, n: int, seed: int = 0) -> tuple[np.ndarray, ...]:
        """n samples of every input."""
        rng = np.random.default_rng(seed)
        return tuple(make(rng, n) for make in self.inputs.values())


CASES: dict[str, Case] = {}


def case(**options: Any) -> Callable[[Callable[[], onnx.ModelProto]], Callable[[], onnx.ModelProto]]:
    """Registers a model under the name of the function that builds it."""

    def register(build: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
        CASES[build.__name__] = Case(build, **options)
        return build

    return register


def batch_norm(x: str, out: str, channels: int) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
    """A BatchNormalization node and its parameters."""
    known = {
        f"{out}_gamma": weights(channels, low=0.5, seed=1),
        f"{out}_beta": weights(channels, seed=2),
        f"{out}_mean": weights(channels, seed=3),
        f"{out}_var": weights(channels, low=0.5, seed=4),
    }
    return node("BatchNormalization", [x, *known], [out]), known


def chain(
    nodes: Sequence[onnx.NodeProto], shape: Sequence[int], known: Mapping[str, np.ndarray], **options: Any
) -> onnx.ModelProto:
    """A model from x (N, *shape) to y."""
    return model(nodes, {"x": ["N", *shape]}, ["y"], known, **options)


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


# Several encrypted tensors


@case(inputs={"x": normal(4)})
def residual_with_different_scales() -> onnx.ModelProto:
    nodes = [
        node("Gemm", ["x", "w1"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("Gemm", ["r", "w2"], ["g"]),
        node("Add", ["g", "x"], ["s"]),
        node("Tanh", ["s"], ["t"]),
        node("Sub", ["x", "t"], ["y"]),
    ]
    return chain(nodes, (4,), {"w1": weights(4, 3), "w2": weights(3, 4, seed=1)})


@case(inputs={"x": normal(4), "z": normal(4)})
def product_of_two_inputs() -> onnx.ModelProto:
    nodes = [node("Mul", ["x", "z"], ["p"]), node("Relu", ["p"], ["y"])]
    return model(nodes, {"x": ["N", 4], "z": ["N", 4]}, ["y"])


@case(inputs={"x": normal(2, 3)}, r2=0.99)
def matmul_of_two_encrypted() -> onnx.ModelProto:
    nodes = [
        node("MatMul", ["x", "w1"], ["q"]),
        node("MatMul", ["x", "w2"], ["k"]),
        node("Transpose", ["k"], ["t"], perm=[0, 2, 1]),
        node("MatMul", ["q", "t"], ["y"]),
    ]
    return chain(nodes, (2, 3), {"w1": weights(3, 2), "w2": weights(3, 2, seed=1)})


@case(inputs={"x": normal(4), "z": normal(4)})
def max_and_min_of_two() -> onnx.ModelProto:
    nodes = [
        node("Gemm", ["x", "w1"], ["h"]),
        node("Max", ["h", "z"], ["m"]),
        node("Min", ["m", "x"], ["n"]),
        node("Gemm", ["n", "w2"], ["y"]),
    ]
    return model(nodes, {"x": ["N", 4], "z": ["N", 4]}, ["y"], {"w1": weights(4, 4), "w2": weights(4, 2)})


@case(inputs={"x": normal(3), "z": normal(3)}, r2=0.9)
def comparison_and_where_of_two() -> onnx.ModelProto:
    nodes = [
        node("Greater", ["x", "z"], ["c"]),
        node("Where", ["c", "x", "zero"], ["a"]),
        node("Gemm", ["a", "w"], ["y"]),
    ]
    return model(nodes, {"x": ["N", 3], "z": ["N", 3]}, ["y"], {"zero": np.float32([0.25]), "w": weights(3, 2)})


@case(inputs={"x": normal(3), "z": normal(2)})
def concat_of_different_scales() -> onnx.ModelProto:
    nodes = [
        node("Gemm", ["x", "w1"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("Mul", ["z", "ten"], ["t"]),
        node("Concat", ["r", "z", "known", "t"], ["j"], axis=1),
        node("Gemm", ["j", "w2"], ["y"]),
    ]
    nodes.insert(0, node("Expand", ["one", "shape"], ["known"]))
    known = {
        "w1": weights(3, 3, low=-4, high=4),
        "ten": np.float32([10]),
        "one": np.float32([[0.7]]),
        "shape": np.array([1, 1]),
        "w2": weights(8, 2),
    }
    return model(nodes, {"x": [1, 3], "z": [1, 2]}, ["y"], known)


@case(inputs={"x": normal(3), "z": normal(3)})
def two_inputs_and_three_outputs() -> onnx.ModelProto:
    nodes = [
        node("Gemm", ["x", "w1"], ["h"]),
        node("Add", ["h", "z"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Gemm", ["b", "w2"], ["c"]),
    ]
    return model(nodes, {"x": ["N", 3], "z": ["N", 3]}, ["a", "b", "c"], {"w1": weights(3, 3), "w2": weights(3, 2)})


@case(inputs={"x": normal(1, 2, 2)})
def nearest_resize() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w1"], ["c"]),
        node("Relu", ["c"], ["r"]),
        node("Resize", ["r", "", "scales"], ["u"], mode="nearest"),
        node("Conv", ["u", "w2"], ["y"]),
    ]
    known = {"w1": weights(2, 1, 1, 1), "scales": np.float32([1, 1, 2, 2]), "w2": weights(1, 2, 2, 2)}
    return chain(nodes, (1, 2, 2), known)


@case(inputs={"x": tokens(7, 3)})
def embedding_of_tokens() -> onnx.ModelProto:
    nodes = [
        node("Gather", ["table", "x"], ["e"], axis=0),
        node("Flatten", ["e"], ["f"]),
        node("Gemm", ["f", "w"], ["y"]),
    ]
    known = {"table": weights(7, 2), "w": weights(6, 2)}
    proto = model(nodes, {"x": ["N", 3]}, ["y"], known, kinds={"x": TensorProto.INT64, "y": TensorProto.FLOAT})
    return proto


@case(inputs={"x": normal(1, 3, 3)}, lookups=1)
def exported_with_a_batch_of_one() -> onnx.ModelProto:
    nodes = [
        node("Conv", ["x", "w1", "b1"], ["c"]),
        node("Relu", ["c"], ["r"]),
        node("Reshape", ["r", "shape"], ["f"]),
        node("Gemm", ["f", "w2"], ["y"]),
    ]
    known = {"w1": weights(2, 1, 2, 2), "b1": weights(2), "shape": np.array([1, 8]), "w2": weights(8, 2)}
    return model(nodes, {"x": [1, 1, 3, 3]}, ["y"], known)


@case(inputs={"x": normal(4)})
def maximum_over_an_axis() -> onnx.ModelProto:
    nodes = [
        node("Gemm", ["x", "w1"], ["h"]),
        node("Reshape", ["h", "shape"], ["m"]),
        node("ReduceMax", ["m"], ["y"], axes=[2], keepdims=0),
    ]
    return chain(nodes, (4,), {"w1": weights(4, 6), "shape": np.array([-1, 2, 3])})


@case(inputs={"x": normal(3), "z": normal(3)}, r2=0.99)
def quotient_of_two() -> onnx.ModelProto:
    nodes = [node("Exp", ["z"], ["e"]), node("Div", ["x", "e"], ["y"])]
    return model(nodes, {"x": ["N", 3], "z": ["N", 3]}, ["y"])


# Forms that exporters and users bring


@case(inputs={"x": normal(3, 4)})
def products_with_vectors() -> onnx.ModelProto:
    nodes = [
        node("MatMul", ["x", "v"], ["a"]),
        node("Relu", ["a"], ["r"]),
        node("MatMul", ["w", "x"], ["b"]),
        node("Tanh", ["b"], ["t"]),
        node("Concat", ["r", "t"], ["c"], axis=1),
        node("MatMul", ["c", "u"], ["y"]),
    ]
    return chain(nodes, (3, 4), {"v": weights(4), "w": weights(3, seed=1), "u": weights(7, 2)})


@case(inputs={"x": normal(3, 2)}, r2=0.95)
def attention_with_a_known_mask() -> onnx.ModelProto:
    nodes = [
        node("MatMul", ["x", "wk"], ["k"]),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["x", "kt"], ["s"]),
        node("Where", ["seen", "s", "never"], ["m"]),
        node("Softmax", ["m"], ["p"], axis=-1),
        node("Add", ["s", "far"], ["m2"]),
        node("Softmax", ["m2"], ["p2"], axis=-1),
        node("Add", ["p", "p2"], ["pp"]),
        node("MatMul", ["pp", "w"], ["y"]),
    ]
    seen = np.tril(np.ones((3, 3), bool))
    known = {"wk": weights(2, 2), "seen": seen, "never": np.float32(-np.inf), "w": weights(3, 2)}
    return chain(nodes, (3, 2), known | {"far": np.where(seen, np.float32(0.5), np.float32(-1e4))})


@case(inputs={"x": normal(2, 4)})
def pads_after_a_shift() -> onnx.ModelProto:
    before, known = batch_norm("x", "n", 2)
    nodes = [
        before,
        node("Conv", ["n", "w1"], ["c"], pads=[1, 1]),
        node("Relu", ["c"], ["r"]),
        node("Conv", ["r", "w2"], ["y"]),
    ]
    return chain(nodes, (2, 4), known | {"w1": weights(2, 2, 3), "w2": weights(1, 2, 2)})


@case(inputs={"x": normal(4)})
def rows_of_different_tensors() -> onnx.ModelProto:
    nodes = [
        node("Gemm", ["x", "w1"], ["a"]),
        node("Tanh", ["a"], ["t"]),
        node("Gemm", ["x", "w2"], ["b"]),
        node("Sigmoid", ["b"], ["s"]),
        node("Concat", ["t", "s"], ["c"], axis=1),
        node("Reshape", ["c", "rows"], ["r"]),
        node("MatMul", ["r", "w3"], ["y"]),
    ]
    known = {"w1": weights(4, 3), "w2": weights(4, 3, seed=1), "rows": np.array([-1, 2, 3]), "w3": weights(3, 2)}
    return chain(nodes, (4,), known)


@case(inputs={"x": normal(2), "z": normal(2, 2)})
def contraction_with_known_elements() -> onnx.ModelProto:
    nodes = [
        node("Mul", ["x", "uneven"], ["u"]),
        node("Tanh", ["u"], ["t"]),
        node("Reshape", ["t", "column"], ["c"]),
        node("Concat", ["c", "known"], ["k"], axis=2),
        node("Unsqueeze", ["k", "last"], ["b"]),
        node("Unsqueeze", ["z", "before"], ["a"]),
        node("MatMul", ["a", "b"], ["y"]),
    ]
    known = {"uneven": np.float32([0.2, 2]), "column": np.array([1, 2, 1]), "known": weights(1, 2, 1)}
    known |= {"last": np.array([3]), "before": np.array([2])}
    return model(nodes, {"x": [1, 2], "z": [1, 2, 2]}, ["y"], known)


@case(inputs={"x": normal(4)})
def decrypted_and_read_by_a_table() -> onnx.ModelProto:
    nodes = [
        node("Gemm", ["x", "w1", "b1"], ["h"]),
        node("Add", ["h", "shift"], ["code"]),
        node("Relu", ["code"], ["r"]),
        node("Gemm", ["r", "w2"], ["y"]),
    ]
    known = {"w1": weights(4, 3), "b1": weights(3), "shift": weights(3, seed=1), "w2": weights(3, 2)}
    return model(nodes, {"x": ["N", 4]}, ["code", "y"], known)


class Prepared(NamedTuple):
    """A case, imported and calibrated."""

    case: Case
    proto: onnx.ModelProto
    graph: fheq.Graph
    data: tuple[np.ndarray, ...]
    stats: Mapping[str, Any]


@cache
def prepared(name: str) -> Prepared:
    """A case imported and calibrated on 200 samples, once for all tests: what is jitted for it is not compiled again."""
    case = CASES[name]
    proto = case.build()
    graph = fheq.import_onnx(proto)
    data = case.data(200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fheq.CalibrationWarning)
        return Prepared(case, proto, graph, data, fheq.calibrate(graph, *data))


def as_tuple(value: Any) -> tuple[Any, ...]:
    """One output or several, as a tuple."""
    return value if isinstance(value, tuple) else (value,)
