"""Rewrites keep the values; what they leave is what they promise."""

from __future__ import annotations

import numpy as np
import pytest
from build_models import model, node, reference, tensor
from onnx import TensorProto

import fheq
from fheq.ops import Kind, lookup
from fheq.rewrites import decompose, remove_identities, untie_constants
from fheq.rewriting.prune import prune


def check(proto, *inputs, atol=1e-5):
    """Imports (with all rewrites), compares with onnxruntime, and returns the graph."""
    graph = fheq.import_onnx(proto)
    got = fheq.evaluate(graph, *inputs)
    for a, b in zip(got if isinstance(got, tuple) else (got,), reference(proto, *inputs)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)
    for name, kind in graph.types.items():
        if name in graph.constants:
            assert (graph.constants[name].shape, graph.constants[name].dtype) == (kind.shape, kind.dtype)
    return graph


def ops(graph):
    return [n.op for n in graph.nodes]


def test_identities():
    nodes = [
        node("Identity", ["x"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Dropout", ["b"], ["c"]),
        node("Cast", ["c"], ["d"], to=TensorProto.FLOAT),
        node("Neg", ["d"], ["e"]),
        node("Sum", ["e"], ["f"]),
        node("Identity", ["f"], ["y"]),
    ]
    graph = check(model(nodes, {"x": ["N", 3]}, ["y"]), tensor(4, 3))
    assert ops(graph) == ["Relu", "Neg"]
    assert graph.nodes[-1].outputs == ("y",)


def test_identities_between_inputs_and_outputs_stay():
    nodes = [
        node("Identity", ["x"], ["y"]),
        node("Relu", ["x"], ["z"]),
        node("Identity", ["z"], ["w"]),
        node("Identity", ["w"], ["v"]),
        node("Neg", ["v"], ["u"]),
    ]
    graph = check(model(nodes, {"x": ["N", 3]}, ["y", "z", "w", "u"]), tensor(4, 3))
    assert ops(graph) == ["Identity", "Relu", "Identity", "Neg"]


def test_an_output_that_is_read_again():
    nodes = [
        node("Relu", ["x"], ["a"]),
        node("Identity", ["a"], ["y"]),
        node("Neg", ["a"], ["b"]),
        node("Abs", ["y"], ["z"]),
    ]
    graph = check(model(nodes, {"x": ["N", 3]}, ["y", "b", "z"]), tensor(4, 3))
    assert ops(graph) == ["Relu", "Neg", "Abs"]


def test_untie_constants():
    nodes = [node("MatMul", ["x", "w"], ["a"]), node("MatMul", ["a", "w"], ["b"]), node("Add", ["b", "c"], ["d"])]
    nodes += [node("Mul", ["d", "c"], ["y"])]
    graph = check(model(nodes, {"x": ["N", 3]}, ["y"], {"w": tensor(3, 3), "c": tensor(3)}), tensor(4, 3))
    assert [n.inputs[1] for n in graph.nodes] == ["w", "w@make_b", "c", "c"]
    assert ops(untie_constants(graph)) == ops(graph)


BN = {"g": tensor(4), "be": tensor(4), "m": tensor(4), "v": tensor(4, low=0.2)}


def bn(source, target):
    return node("BatchNormalization", [source, *BN], [target], epsilon=0.01)


LINEAR = {
    "conv": (
        node("Conv", ["x", "w", "b"], ["h"], pads=[1, 1, 1, 1]),
        ["N", 3, 5, 5],
        {"w": tensor(4, 3, 3, 3), "b": tensor(4)},
    ),
    "conv without bias": (node("Conv", ["x", "w"], ["h"]), ["N", 3, 5, 5], {"w": tensor(4, 3, 3, 3)}),
    "grouped conv": (node("Conv", ["x", "w"], ["h"], group=2), ["N", 6, 5, 5], {"w": tensor(4, 3, 2, 2)}),
    "conv transpose": (node("ConvTranspose", ["x", "w"], ["h"]), ["N", 3, 5, 5], {"w": tensor(3, 4, 2, 2)}),
    "grouped transpose": (node("ConvTranspose", ["x", "w"], ["h"], group=2), ["N", 6, 4, 4], {"w": tensor(6, 2, 2, 2)}),
    "gemm": (node("Gemm", ["x", "w", "b"], ["h"], alpha=0.5, beta=2.0), ["N", 3], {"w": tensor(3, 4), "b": tensor(1, 4)}),
    "gemm transposed": (node("Gemm", ["x", "w", "b"], ["h"], transB=1), ["N", 3], {"w": tensor(4, 3), "b": tensor()}),
    "matmul": (node("MatMul", ["x", "w"], ["h"]), ["N", 3], {"w": tensor(3, 4)}),
}


@pytest.mark.parametrize("name", LINEAR)
def test_batch_norm_after_a_linear_operator(name):
    linear, shape, known = LINEAR[name]
    proto = model([linear, bn("h", "n"), node("Relu", ["n"], ["y"])], {"x": shape}, ["y"], {**known, **BN})
    graph = check(proto, tensor(3, *shape[1:]))
    assert ops(graph) == [linear.op_type, "Add", "Relu"] if name == "matmul" else [linear.op_type, "Relu"]


def test_batch_norm_after_matmul_and_add():
    nodes = [node("MatMul", ["x", "w"], ["h"]), node("Add", ["b", "h"], ["a"]), bn("a", "y")]
    known = {"w": tensor(3, 4), "b": tensor(4), **BN}
    assert ops(check(model(nodes, {"x": ["N", 3]}, ["y"], known), tensor(5, 3))) == ["MatMul", "Add"]


@pytest.mark.parametrize("between", [[], [node("Add", ["b", "h"], ["a"])]])
def test_batch_norm_over_rows_after_matmul(between):
    """Its channels are the middle axis, those of the product the last one, though as many."""
    nodes = [node("MatMul", ["x", "w"], ["h"]), *between, bn("a" if between else "h", "y")]
    known = {"w": tensor(3, 4), **({"b": tensor(4)} if between else {}), **BN}
    check(model(nodes, {"x": ["N", 4, 3]}, ["y"], known), tensor(5, 4, 3))


BEFORE = {
    "conv": (node("Conv", ["n", "w", "b"], ["y"]), ["N", 4, 5, 5], {"w": tensor(2, 4, 3, 3), "b": tensor(2)}),
    "grouped conv": (node("Conv", ["n", "w"], ["y"], group=2), ["N", 4, 5, 5], {"w": tensor(6, 2, 3, 3)}),
    "gemm": (node("Gemm", ["n", "w", "b"], ["y"], transB=1, alpha=3.0), ["N", 4], {"w": tensor(2, 4), "b": tensor(2)}),
    "gemm without bias": (node("Gemm", ["n", "w"], ["y"]), ["N", 4], {"w": tensor(4, 2)}),
    "matmul": (node("MatMul", ["n", "w"], ["y"]), ["N", 4], {"w": tensor(4, 2)}),
}


@pytest.mark.parametrize("name", BEFORE)
def test_batch_norm_before_a_linear_operator(name):
    linear, shape, known = BEFORE[name]
    graph = check(model([bn("x", "n"), linear], {"x": shape}, ["y"], {**known, **BN}), tensor(3, *shape[1:]), atol=1e-4)
    assert ops(graph) == (["MatMul", "Add"] if name == "matmul" else [linear.op_type])


def test_batch_norm_before_matmul_and_add():
    nodes = [bn("x", "n"), node("MatMul", ["n", "w"], ["h"]), node("Add", ["h", "b"], ["y"])]
    known = {"w": tensor(4, 2), "b": tensor(2), **BN}
    assert ops(check(model(nodes, {"x": ["N", 4]}, ["y"], known), tensor(5, 4))) == ["MatMul", "Add"]


def test_batch_norm_before_flatten_and_gemm():
    nodes = [bn("x", "n"), node("Transpose", ["n"], ["t"], perm=[0, 2, 1]), node("Flatten", ["t"], ["f"])]
    nodes += [node("Gemm", ["f", "w"], ["y"])]
    graph = check(model(nodes, {"x": ["N", 4, 3]}, ["y"], {"w": tensor(12, 2), **BN}), tensor(5, 4, 3))
    assert ops(graph) == ["Transpose", "Flatten", "Gemm"]


STAYS = {
    "padded": ([bn("x", "n"), node("Conv", ["n", "w"], ["y"], pads=[1, 1, 1, 1])], ["y"], {"w": tensor(2, 4, 3, 3)}),
    "read twice": (
        [bn("x", "n"), node("Conv", ["n", "w"], ["y"]), node("Relu", ["n"], ["z"])],
        ["y", "z"],
        {"w": tensor(2, 4, 3, 3)},
    ),
    "an output": ([node("Conv", ["x", "w"], ["h"]), bn("h", "y")], ["h", "y"], {"w": tensor(4, 4, 1, 1)}),
    "no neighbour": ([node("Relu", ["x"], ["r"]), bn("r", "y")], ["y"], {}),
}


@pytest.mark.parametrize("name", STAYS)
def test_batch_norm_as_mul_and_add(name):
    nodes, outputs, known = STAYS[name]
    graph = check(model(nodes, {"x": ["N", 4, 5, 5]}, outputs, {**known, **BN}), tensor(3, 4, 5, 5))
    assert {"Mul", "Add"} < set(ops(graph))
    assert "BatchNormalization" not in ops(graph)


I64 = TensorProto.INT64
TWO = {"x": ["N", 3, 4], "z": ["N", 3, 4]}
ONE = {"x": ["N", 3, 4]}


def signs(op):
    """x > 0 and z < 0 joined by a logical operator, as numbers."""
    pair = [node("Greater", ["x", "k"], ["a"]), node("Less", ["z", "k"], ["b"])]
    return [*pair, node(op, ["a", "b"], ["c"]), node("Cast", ["c"], ["y"], to=1)]


def compared(op):
    return [node(op, ["x", "z"], ["c"]), node("Cast", ["c"], ["y"], to=1)]


def chosen(a, b):
    return [node("Greater", ["x", "k"], ["c"]), node("Where", ["c", a, b], ["y"])]


NORM_OUTPUTS = [
    node("LayerNormalization", ["x", "s"], ["h", "m", "i"]),
    node("Add", ["m", "i"], ["a"]),
    node("Add", ["a", "h"], ["y"]),
]
CLIPPED = [node("ReduceMean", ["z"], ["m"], keepdims=0, axes=[0, 1, 2]), node("Clip", ["x", "m", "k"], ["y"])]
REDUCTIONS = ("ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSum", "ReduceLogSumExp", "ReduceProd")
COMPARED = ("Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual")
LEVEL = {"k": np.float32(0), "w": tensor(1, 4)}

# Name: nodes from x, z and p = |x| + 0.5 to y, known tensors, opset.
COMPOSITES = {
    "softmax": ([node("Softmax", ["x"], ["y"], axis=1)], {}, 17),
    "softmax of opset 11": ([node("Softmax", ["x"], ["y"], axis=1)], {}, 11),
    "log softmax": ([node("LogSoftmax", ["x"], ["y"])], {}, 17),
    "layer norm": ([node("LayerNormalization", ["x", "s", "b"], ["y"])], {"s": tensor(4), "b": tensor(4)}, 17),
    "layer norm without bias": ([node("LayerNormalization", ["x", "s"], ["y"], axis=1)], {"s": tensor(3, 4)}, 17),
    "layer norm's outputs": (NORM_OUTPUTS, {"s": tensor(4)}, 17),
    "reduce axes as input": ([node("ReduceL2", ["x", "a"], ["y"], keepdims=0)], {"a": np.array([-1])}, 18),
    "reduce nothing": ([node("ReduceL1", ["x"], ["y"], noop_with_empty_axes=1)], {}, 18),
    "div": ([node("Div", ["x", "p"], ["y"])], {}, 17),
    "one over": ([node("Div", ["k", "p"], ["y"])], {"k": np.float32(1)}, 17),
    "broadcast one over": ([node("Div", ["k", "p"], ["y"])], {"k": np.ones((2, 1, 1, 4), np.float32)}, 17),
    "clip": (CLIPPED, {"k": np.float32(0.5)}, 17),
    "prelu": ([node("PRelu", ["x", "z"], ["y"])], {}, 17),
    **{op: ([node(op, ["p"], ["y"], axes=[1, 2])], {}, 12) for op in REDUCTIONS},
    **{op: ([node(op, ["x", "z", "k"], ["y"])], {"k": tensor(4)}, 17) for op in ("Sum", "Mean", "Max", "Min")},
    **{op: (compared(op), {}, 17) for op in COMPARED},
    **{op: (signs(op), LEVEL, 17) for op in ("And", "Or", "Xor")},
    "equal booleans": (signs("Equal"), LEVEL, 17),
    **{f"where {a} {b}": (chosen(a, b), LEVEL, 17) for a, b in ("xz", "zk", "kz", "zw", "wz")},
}


@pytest.mark.parametrize("name", COMPOSITES)
def test_decompose(name):
    nodes, known, opset = COMPOSITES[name]
    nodes = [node("Abs", ["x"], ["q"]), node("Add", ["q", "half"], ["p"]), *nodes]
    graph = fheq.import_onnx(model(nodes, TWO, ["y"], {**known, "half": np.float32(0.5)}, opset=opset))
    simple = decompose(graph)
    x, z = (tensor(5, 3, 4, low=-2, high=2).round(1) for _ in range(2))
    np.testing.assert_allclose(fheq.evaluate(simple, x, z), fheq.evaluate(graph, x, z), rtol=2e-5, atol=1e-5)
    assert ops(simple) != ops(graph)
    assert simple.outputs == graph.outputs
    assert all(lookup(n).kind is not Kind.COMPOSITE for n in simple.nodes)
    assert not {"Div", "And", "Or", "Xor", "Where", "Sum", "Mean", "PRelu", "Clip"} & set(ops(simple))


@pytest.mark.parametrize("axis", [-1, 0, 1])
def test_decompose_one_hot(axis):
    nodes = [node("OneHot", ["i", "d", "v"], ["y"], axis=axis)]
    known = {"d": np.array(5), "v": np.float32([-1, 2])}
    proto = model(nodes, {"i": ["N", 3]}, ["y"], known, kinds={"i": I64})
    graph = fheq.import_onnx(proto)
    simple = decompose(graph)
    i = np.random.default_rng(0).integers(-7, 7, (6, 3))
    np.testing.assert_array_equal(fheq.evaluate(simple, i), fheq.evaluate(graph, i))
    assert "OneHot" not in ops(simple)


def test_decompose_lone_quantizers():
    known = {"s": np.float32([0.1, 0.2, 0.3]), "z": np.int8([0, 3, -2])}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], ["q"], axis=1), node("Transpose", ["q"], ["t"], perm=[0, 2, 1])]
    nodes += [node("DequantizeLinear", ["t", "s", "z"], ["y"], axis=2)]
    graph = fheq.import_onnx(model(nodes, ONE, ["y"], known))
    simple = decompose(graph)
    x = tensor(5, 3, 4, low=-50, high=50)
    np.testing.assert_allclose(fheq.evaluate(simple, x), fheq.evaluate(graph, x), atol=1e-5)
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops(simple))


def test_decompose_leaves_what_one_tensor_decides():
    nodes = [node("Greater", ["x", "k"], ["c"]), node("Where", ["c", "k", "w"], ["a"]), node("Pow", ["k", "a"], ["y"])]
    graph = fheq.import_onnx(model(nodes, ONE, ["y"], {"k": np.float32(2), "w": np.float32(-np.inf)}))
    assert ops(decompose(graph)) == ["Greater", "Where", "Pow"]


def test_power_of_two_computed_tensors():
    graph = fheq.import_onnx(model([node("Pow", ["x", "z"], ["y"])], TWO, ["y"]))
    assert ops(decompose(graph)) == ["Log", "Mul", "Exp"]


def test_rewrites_do_not_change_their_argument():
    graph = fheq.import_onnx(model([node("Softmax", ["x"], ["s"]), node("Div", ["x", "s"], ["y"])], ONE, ["y"]))
    before = (graph.nodes, dict(graph.constants), dict(graph.types))
    for rewrite in (decompose, remove_identities, untie_constants, prune):
        rewrite(graph)
    assert before == (graph.nodes, dict(graph.constants), dict(graph.types))


def test_a_tensor_less_itself_is_known() -> None:
    nodes = [node("Sub", ["x", "x"], ["d"]), node("Cos", ["d"], ["c"]), node("Add", ["c", "x"], ["y"])]
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 3]}, ["y"]))
    assert [n.op for n in graph.nodes] == ["Add"]
    x = np.float32([[1, -2, 3]])
    np.testing.assert_array_equal(fheq.evaluate(graph, x), x + 1)
