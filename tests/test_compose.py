"""Fewer tables by rewriting the graph: composed linear operators, and activations before the maximum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from build_models import model, node
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx.reference import ReferenceEvaluator

import fheq
from fheq.planning.plan import plan
from fheq.rewriting import compose as composing

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")


def weights(*shape: int, low: float = -1.0, high: float = 1.0) -> np.ndarray:
    return np.random.default_rng([1, *shape]).uniform(low, high, shape).astype(np.float32)


def operators(graph: fheq.Graph) -> list[str]:
    """The operators that are planned, without the movement."""
    moves = ("Flatten", "Reshape", "Transpose", "Squeeze")
    return [n.op for n in plan(graph).graph.nodes if n.op not in moves]


def tables(graph: fheq.Graph) -> int:
    """The elements that tables make, comparisons of a maximum not counted."""
    layout = plan(graph)
    return sum(int(np.prod(layout.shape(point))) for point in layout.points)


def assert_same_function(source: onnx.ModelProto, graph: fheq.Graph, shape: Sequence[int]) -> None:
    """The planned graph computes what onnx's reference evaluator computes of the model."""
    x = np.random.default_rng(0).normal(size=(1, *shape)).astype(np.float32)
    wanted = ReferenceEvaluator(source).run(None, {source.graph.input[0].name: x})
    found = fheq.evaluate(plan(graph).graph, x)
    for want, got in zip(wanted, found if isinstance(found, tuple) else (found,), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * max(1.0, float(np.abs(want).max())))


IMAGE = (1, 6, 6)
CONV = node("Conv", ["x", "k"], ["c"])
POOL = {"kernel_shape": [2, 2], "strides": [2, 2]}
KERNEL = {"k": weights(2, 1, 3, 3)}
MORE = {"k2": weights(3, 2, 2, 2), "b2": weights(3)}
ROW = {"w1": weights(4, 5), "w2": weights(5, 3), "w3": weights(3, 2), "b": weights(5)}

# What it shows, the nodes, known tensors, shape of a sample, the operators left, the tables left.
CASES: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray], tuple[int, ...], list[str], int]] = {
    "dense layers without an activation": (
        [
            node("Gemm", ["x", "w1", "b"], ["h"], alpha=0.5),
            node("MatMul", ["h", "w2"], ["m"]),
            node("Gemm", ["m", "w3"], ["y"]),
        ],
        ROW,
        (4,),
        ["Gemm"],
        0,
    ),
    "tokens": (
        [
            node("MatMul", ["x", "w1"], ["h"]),
            node("Add", ["b", "h"], ["a"]),
            node("MatMul", ["a", "w2"], ["m"]),
            node("Tanh", ["m"], ["t"]),
            node("MatMul", ["t", "w3"], ["y"]),
        ],
        ROW,
        (3, 4),
        ["MatMul", "Add", "Tanh", "MatMul"],
        9,
    ),
    "a skip connection, whose weight 1 would spoil the precision of the others": (
        [
            node("Gemm", ["x", "w1"], ["h"]),
            node("Relu", ["h"], ["r"]),
            node("Gemm", ["r", "v"], ["m"]),
            node("Add", ["m", "r"], ["a"]),
            node("Relu", ["a"], ["y"]),
        ],
        {"w1": ROW["w1"], "v": weights(5, 5)},
        (4,),
        ["Gemm", "Relu", "Gemm", "Add", "Relu"],
        10,
    ),
    "two linear layers of one tensor, added": (
        [
            node("Gemm", ["x", "w1"], ["h"]),
            node("Relu", ["h"], ["r"]),
            node("Gemm", ["r", "v"], ["m"]),
            node("Gemm", ["r", "u"], ["n"]),
            node("Add", ["m", "n"], ["a"]),
            node("Relu", ["a"], ["y"]),
        ],
        {"w1": ROW["w1"], "v": weights(5, 5), "u": weights(5, 5, low=-0.5)},
        (4,),
        ["Gemm", "Relu", "Gemm", "Relu"],
        10,
    ),
    "a pool before an activation": (
        [
            CONV,
            node("AveragePool", ["c"], ["p"], **POOL),
            node("Relu", ["p"], ["r"]),
            node("Conv", ["r", "k2", "b2"], ["y"]),
        ],
        KERNEL | MORE,
        IMAGE,
        ["Conv", "Relu", "Conv"],
        8,
    ),
    "a pool after an activation": (
        [
            CONV,
            node("Relu", ["c"], ["r"]),
            node("AveragePool", ["r"], ["p"], **POOL),
            node("Flatten", ["p"], ["f"]),
            node("Gemm", ["f", "v", "b"], ["y"], transB=1),
        ],
        KERNEL | {"v": weights(5, 8), "b": ROW["b"]},
        IMAGE,
        ["Conv", "Relu", "Gemm"],
        32,
    ),
    "pools, means and padding without any activation": (
        [
            node("Conv", ["x", "k"], ["c"], pads=[1, 1, 1, 1], auto_pad="NOTSET"),
            node("AveragePool", ["c"], ["p"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], count_include_pad=0),
            node("Pad", ["p", "pads", "half"], ["q"]),
            node("Transpose", ["q"], ["t"], perm=[0, 2, 3, 1]),
            node("ReduceMean", ["t"], ["m"], axes=[1], keepdims=0),
            node("Flatten", ["m"], ["f"]),
            node("Gemm", ["f", "v"], ["y"]),
        ],
        KERNEL | {"v": weights(14, 3), "pads": np.array([0, 0, 1, 0, 0, 0, 0, 1]), "half": np.float32(0.5)},
        IMAGE,
        ["Gemm"],
        0,
    ),
    "depthwise and pointwise convolutions": (
        [
            node("Relu", ["x"], ["r"]),
            node("Conv", ["r", "d"], ["c"], group=2, pads=[1, 1, 1, 1], strides=[2, 1], dilations=[1, 2]),
            node("Mul", ["c", "scale"], ["s"]),
            node("Conv", ["s", "p", "b2"], ["q"]),
            node("Relu", ["q"], ["y"]),
        ],
        {"d": weights(4, 1, 3, 3), "scale": weights(4, 1, 1), "p": weights(3, 4, 1, 1), "b2": MORE["b2"]},
        (2, 8, 8),
        ["Relu", "Conv", "Relu"],
        128 + 3 * 4 * 6,
    ),
    "groups that stay groups": (
        [
            node("Relu", ["x"], ["r"]),
            node("AveragePool", ["r"], ["c"], kernel_shape=[2, 2]),
            node("Conv", ["c", "d"], ["q"], group=2),
            node("Relu", ["q"], ["y"]),
        ],
        {"d": weights(4, 2, 2, 2)},
        (4, 5, 5),
        ["Relu", "Conv", "Relu"],
        100 + 4 * 9,
    ),
    "a mean over so much that the precision costs more than its tables": (
        [
            CONV,
            node("Relu", ["c"], ["r"]),
            node("GlobalAveragePool", ["r"], ["p"]),
            node("Flatten", ["p"], ["f"]),
            node("Gemm", ["f", "v"], ["y"]),
        ],
        KERNEL | {"v": weights(2, 3)},
        IMAGE,
        ["Conv", "Relu", "GlobalAveragePool", "Gemm"],
        32 + 2,
    ),
    "a layer joined with an activation": (
        [
            node("Gemm", ["x", "w1", "b"], ["h"], alpha=0.5),
            node("Gemm", ["x", "w1"], ["g"]),
            node("Sigmoid", ["g"], ["s"]),
            node("Concat", ["h", "s"], ["j"], axis=-1),
            node("Gemm", ["j", "wide", "b3"], ["y"], transB=1, beta=0.5),
        ],
        ROW | {"wide": weights(3, 10), "b3": weights(3)},
        (4,),
        ["Gemm", "Sigmoid", "Concat", "MatMul", "Add"],
        5,
    ),
    "joined rows whose weights would be too many": (
        [
            node("Gemm", ["x", "u"], ["h"]),
            node("Sigmoid", ["x"], ["s"]),
            node("Concat", ["h", "s"], ["j"], axis=1),
            node("Gemm", ["j", "wide"], ["y"]),
        ],
        {"u": weights(128, 1), "wide": weights(129, 64)},
        (128,),
        ["Gemm", "Sigmoid", "Concat", "Gemm"],
        1 + 128,
    ),
    "a bottleneck that is cheaper as it is": (
        [node("Gemm", ["x", "u"], ["h"]), node("Gemm", ["h", "v"], ["y"])],
        {"u": weights(128, 1), "v": weights(1, 128)},
        (128,),
        ["Gemm", "Gemm"],
        1,
    ),
    "a result that somebody else reads": (
        [
            node("Gemm", ["x", "w1"], ["h"]),
            node("Relu", ["h"], ["z"]),
            node("Gemm", ["h", "w2"], ["y"]),
        ],
        ROW,
        (4,),
        ["Gemm", "Relu", "Gemm"],
        5 + 5,
    ),
}


def case(name: str) -> tuple[onnx.ModelProto, fheq.Graph]:
    nodes, known, shape, *_ = CASES[name]
    read = {n for made in nodes for n in made.input}
    outputs = [out for made in nodes for out in made.output if out not in read]
    source = model(nodes, {"x": [1, *shape]}, outputs, {k: v for k, v in known.items() if k in read}, opset=13)
    return source, fheq.import_onnx(source)


@pytest.mark.parametrize("name", CASES)
def test_no_table_stands_between_linear_operators_where_that_pays(name: str) -> None:
    source, graph = case(name)
    shape, wanted, left = CASES[name][2:]
    assert operators(graph) == wanted
    assert tables(graph) == left
    assert_same_function(source, graph, shape)


@pytest.mark.parametrize("name", CASES)
def test_composing_twice_changes_nothing(name: str) -> None:
    graph = plan(case(name)[1]).graph
    assert composing.compose(graph) is graph


def test_groups_are_kept() -> None:
    conv = next(n for n in plan(case("groups that stay groups")[1]).graph.nodes if n.op == "Conv")
    assert conv.attrs["group"] == 2


@pytest.mark.parametrize("name", ["a pool before an activation"])
def test_composed_programs_are_what_the_circuit_computes(name: str) -> None:
    _, graph = case(name)
    data = np.random.default_rng(0).normal(size=(60, *CASES[name][2])).astype(np.float32)
    graph = fheq.import_onnx(case(name)[0])
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, data), 3))
    circuit = fheq.compile(program)
    for x in data[:3]:
        (q,) = program.quantize(x[None])
        want = fheq.simulate(program, q)
        np.testing.assert_array_equal(circuit.concrete.graph(q), want)


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_chains_of_convolutions_and_pools_compute_the_same(draw: st.DataObject) -> None:
    """Kernels, strides, dilations, groups, padding and affine maps per channel in any order, as one operator."""
    rng = np.random.default_rng(draw.draw(st.integers(0, 2**32 - 1)))
    nodes: list[onnx.NodeProto] = []
    known: dict[str, np.ndarray] = {}
    shape, name = (int(rng.choice([2, 4])), 9, 9), "x"
    for i in range(draw.draw(st.integers(2, 4))):
        kernel = [int(k) for k in rng.integers(1, 3, 2)]
        out, kind = f"t{i}", draw.draw(st.sampled_from(["Conv", "AveragePool", "Mul"]))
        options: dict[str, Any] = {"strides": [int(s) for s in rng.integers(1, 3, 2)]}
        options["pads"] = [int(p) for p in rng.integers(0, 2 if draw.draw(st.booleans()) else 1, 4)]
        if kind == "Conv":
            group = int(rng.choice([1, 2, shape[0]]))
            known[f"k{i}"] = rng.normal(size=(4, shape[0] // group, *kernel)).astype(np.float32)
            nodes.append(node("Conv", [name, f"k{i}"], [out], group=group, **options))
            shape = (4, *shape[1:])
        elif kind == "AveragePool":
            options["pads"] = [min(p, k - 1) for p, k in zip(options["pads"], kernel * 2)]
            nodes.append(node("AveragePool", [name], [out], kernel_shape=kernel, **options))
        else:
            known[f"k{i}"] = rng.normal(size=(shape[0], 1, 1)).astype(np.float32)
            nodes.append(node("Mul", [name, f"k{i}"], [out]))
        name = out
    source = model(nodes, {"x": [1, *shape_of(nodes, known)]}, [name], known, opset=13)
    graph = fheq.import_onnx(source)
    linear = [n for n in nodes if n.op_type != "Mul"]
    assert len(linear) < 2 or sum(op in ("Conv", "Gemm", "AveragePool") for op in operators(graph)) == 1
    assert_same_function(source, graph, shape_of(nodes, known))


def shape_of(nodes: list[onnx.NodeProto], known: dict[str, np.ndarray]) -> tuple[int, int, int]:
    """The images that a chain of nodes takes."""
    first = next((n for n in nodes if n.op_type != "AveragePool"), None)
    if first is None:
        return (2, 9, 9)
    weight = known[first.input[1]]
    group = next((a.i for a in first.attribute if a.name == "group"), 1)
    return ((weight.shape[1] * group if first.op_type == "Conv" else weight.shape[0]), 9, 9)


# Activations and the maximum


def pooled(*after: onnx.NodeProto, before: str = "Conv") -> onnx.ModelProto:
    first = CONV if before == "Conv" else node("Identity", ["x"], ["c"])
    nodes = [first, node("MaxPool", ["c"], ["p"], **POOL), *after]
    read = {name for made in nodes for name in made.input}
    known = KERNEL | {
        "k2": weights(3, 2 if before == "Conv" else 1, 2, 2),
        "s": weights(2, 1, 1, low=0.5),
        "n": -weights(2, 1, 1),
    }
    return model(nodes, {"x": [1, *IMAGE]}, ["y"], {k: v for k, v in known.items() if k in read}, opset=13)


def read_by_conv(*ops: tuple[str, list[str], dict[str, Any]]) -> list[onnx.NodeProto]:
    names = ["p", *(f"a{i}" for i in range(len(ops)))]
    made = [node(op, [names[i], *more], [names[i + 1]], **attrs) for i, (op, more, attrs) in enumerate(ops)]
    return [*made, node("Conv", [names[-1], "k2"], ["y"])]


@pytest.mark.parametrize(
    ("ops", "moves"),
    [
        ([("Relu", [], {})], True),
        ([("LeakyRelu", [], {"alpha": 0.1})], True),
        ([("LeakyRelu", [], {"alpha": -0.1})], False),
        ([("Mul", ["s"], {}), ("Sigmoid", [], {})], True),
        ([("Mul", ["n"], {}), ("Sigmoid", [], {})], False),
        ([("Abs", [], {})], False),
        ([("Neg", [], {}), ("Relu", [], {})], False),
        ([("Mul", ["s"], {})], False),
    ],
)
def test_a_maximum_is_taken_over_activations_where_they_do_not_decrease(ops: list[Any], moves: bool) -> None:
    source = pooled(*read_by_conv(*ops))
    graph = fheq.import_onnx(source)
    planned = operators(graph)
    assert (planned.index("MaxPool") > planned.index(ops[-1][0])) is moves
    assert_same_function(source, graph, IMAGE)
    if moves:
        assert tables(graph) == 2 * 4 * 4  # none after the maximum


def test_an_activation_stays_behind_a_maximum_of_quantized_values() -> None:
    """It would need a table per pixel there."""
    graph = fheq.import_onnx(pooled(*read_by_conv(("Relu", [], {})), before="input"))
    assert tables(graph) == 3 * 3
