"""Small models that bring encrypted tensors together, and forms that exporters and users bring."""

from __future__ import annotations

import numpy as np
import onnx
from build_models import model, node
from model_case import batch_norm, case, chain, normal, tokens, weights
from onnx import TensorProto

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


@case(inputs={"x": normal(3, 6, 6)}, lookups=2)
def two_convolutions_added() -> onnx.ModelProto:
    """The shortcut is a convolution too, as where a residual network changes its size: the sum takes no tables."""
    nodes = [
        node("Conv", ["x", "w1"], ["h"], pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Relu", ["h"], ["r"]),
        node("Conv", ["r", "w2"], ["g"], pads=[1, 1, 1, 1]),
        node("Conv", ["x", "w3"], ["d"], strides=[2, 2]),
        node("Add", ["g", "d"], ["s"]),
        node("Relu", ["s"], ["y"]),
    ]
    known = {"w1": weights(4, 3, 3, 3), "w2": weights(4, 4, 3, 3, seed=1), "w3": weights(4, 3, 1, 1, seed=2)}
    return chain(nodes, (3, 6, 6), known)


@case(inputs={"x": normal(4)}, lookups=2)
def residual_whose_layer_has_a_dead_channel() -> onnx.ModelProto:
    """Weights of 0 have no unit of their own."""
    dead = weights(3, 4, seed=1) * np.array([1, 0, 1e-3, 1], np.float32)
    nodes = [
        node("Gemm", ["x", "w1"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "w2"], ["g"]),
        node("Add", ["g", "b"], ["k"]),
        node("Sub", ["k", "x"], ["s"]),
        node("Relu", ["s"], ["y"]),
    ]
    return chain(nodes, (4,), {"w1": weights(4, 3), "w2": dead, "b": weights(4, seed=2)})


@case(inputs={"x": normal(4)})
def results_added_to_the_residual_and_to_each_other() -> onnx.ModelProto:
    """As the skip connections of WaveNet: small ones, which the residual gives steps that are coarse for their own sum."""
    nodes = []
    for i, of in enumerate(("x", "x1", "x2")):
        nodes += [
            node("MatMul", [of, f"v{i}"], [f"h{i}"]),
            node("Tanh", [f"h{i}"], [f"t{i}"]),
            node("MatMul", [f"t{i}", f"w{i}"], [f"r{i}"]),
            node("Add", [of, f"r{i}"], [f"x{i + 1}"]),
        ]
    nodes[-1:] = [node("Add", ["r0", "r1"], ["s1"]), node("Add", ["s1", "r2"], ["s2"]), node("Relu", ["s2"], ["y"])]
    known = {f"v{i}": weights(4, 4, seed=i) for i in range(3)} | {f"w{i}": 0.1 * weights(4, 4, seed=9 + i) for i in range(3)}
    return chain(nodes, (4,), known)


@case(inputs={"x": normal(4), "z": normal(4)})
def product_and_layer_added() -> onnx.ModelProto:
    nodes = [
        node("Mul", ["x", "z"], ["p"]),
        node("MatMul", ["x", "w"], ["m"]),
        node("Add", ["p", "m"], ["s"]),
        node("Add", ["s", "z"], ["t"]),
        node("Relu", ["t"], ["y"]),
    ]
    return model(nodes, {"x": ["N", 4], "z": ["N", 4]}, ["y"], {"w": weights(4, 4)})


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


@case(inputs={"x": normal(1, 3, 3)})
def known_channels_beside_an_input() -> onnx.ModelProto:
    """Coordinates, and a channel of ones that is padded with zeros; then, in rows, encodings of places."""
    nodes = [
        node("Concat", ["x", "places", "ones"], ["j"], axis=1),
        node("Conv", ["j", "w", "b"], ["c"], pads=[1, 1, 0, 0]),
        node("Relu", ["c"], ["r"]),
        node("Concat", ["rows", "r"], ["k"], axis=-1),
        node("MatMul", ["k", "v"], ["y"]),
    ]
    known = {
        "places": np.linspace(-9, 9, 9, dtype=np.float32).reshape(1, 1, 3, 3),
        "ones": np.ones((1, 1, 3, 3), np.float32),
        "w": weights(2, 3, 2, 2),
        "b": weights(2),
        "rows": np.linspace(-3, 3, 12, dtype=np.float32).reshape(1, 2, 3, 2),
        "v": weights(5, 2),
    }
    return model(nodes, {"x": [1, 1, 3, 3]}, ["y"], known)


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


@case(inputs={"x": tokens(16, 8)}, bits=6)
def rounded_by_powers_of_two() -> onnx.ModelProto:
    """Ties to even: a table for their direction, and one on what is left of the accumulator."""
    nodes = [
        node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        node("MatMul", ["f", "w"], ["h"]),
        node("Div", ["h", "two"], ["d"]),
        node("Round", ["d"], ["r"]),
        node("Clip", ["r", "low", "high"], ["c"]),
        node("MatMul", ["c", "v"], ["g"]),
        node("Relu", ["g"], ["y"]),
    ]
    known = {"w": np.round(weights(8, 4) * 31) / 16, "v": np.round(weights(4, 3) * 7) / 8}
    known |= {"two": np.asarray(2.0), "low": np.asarray(-7.0), "high": np.asarray(8.0)}
    constants = {name: value.astype(np.float32) for name, value in known.items()}
    return model(nodes, {"x": ["N", 8]}, ["y"], constants, kinds={"x": TensorProto.INT64, "y": TensorProto.FLOAT})


@case(inputs={"x": lambda rng, n: rng.integers(0, 256, (n, 2, 4, 4)).astype(np.uint8)}, lookups=1)
def normalized_pixels() -> onnx.ModelProto:
    """Bytes that become floats, as images do: the weights of the convolution take in all that is done to them before."""
    nodes = [
        node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        node("Div", ["f", "most"], ["d"]),
        node("Sub", ["d", "mean"], ["c"]),
        node("Div", ["c", "deviation"], ["n"]),
        node("Conv", ["n", "w"], ["h"]),
        node("Relu", ["h"], ["y"]),
    ]
    channels = lambda *values: np.float32(values).reshape(1, 2, 1, 1)
    known = {"most": np.float32(255), "mean": channels(0.5, 0.4), "deviation": channels(0.2, 0.3), "w": weights(3, 2, 2, 2)}
    return model(nodes, {"x": ["N", 2, 4, 4]}, ["y"], known, kinds={"x": TensorProto.UINT8, "y": TensorProto.FLOAT})


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


@case(inputs={"x": normal(4)})
def zeros_beside_decrypted_activations_that_are_never_0() -> onnx.ModelProto:
    nodes = [node("Sigmoid", ["x"], ["s"]), node("Add", ["s", "three"], ["t"])]
    nodes += [node("Gemm", ["t", "w"], ["z"]), node("Pad", ["t", "pads"], ["y"])]
    known = {"three": np.float32(3), "w": weights(4, 2), "pads": np.array([0, 1, 0, 2])}
    return model(nodes, {"x": ["N", 4]}, ["y", "z"], known)


@case(inputs={"x": normal(2, 4)})
def sums_of_which_one_has_no_terms() -> onnx.ModelProto:
    nodes = [node("CumSum", ["x", "axis"], ["s"], exclusive=1), node("Softmax", ["s"], ["y"])]
    return model(nodes, {"x": ["N", 2, 4]}, ["y"], {"axis": np.array(2)})


@case(inputs={"x": normal(2, 4, 4)})
def pools_of_layers_of_unequal_widths_side_by_side() -> onnx.ModelProto:
    """Each pool sees one channel; those of the two layers have scales of their own."""
    nodes = [
        node("Conv", ["x", "w1"], ["a"]),
        node("Conv", ["x", "w2"], ["b"]),
        node("Relu", ["a"], ["ra"]),
        node("Relu", ["b"], ["rb"]),
        node("Concat", ["ra", "rb"], ["j"], axis=1),
        node("GlobalMaxPool", ["j"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("MatMul", ["f", "w3"], ["y"]),
    ]
    return chain(nodes, (2, 4, 4), {"w1": weights(3, 2, 2, 2), "w2": weights(2, 2, 2, 2, seed=1), "w3": weights(5, 2)})
