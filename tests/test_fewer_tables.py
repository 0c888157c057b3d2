"""Fewer tables: what is joined, summed, contracted or blended is quantized once, or not at all."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build_models import model, node
from onnx.reference import ReferenceEvaluator

import fheq
from fheq.client.outputs import rejoined
from fheq.fitting.shared_steps import FINER
from fheq.planning.plan import plan
from fheq.steps import Add

N = 5
SAMPLES = 300


def weights(*shape: int) -> np.ndarray:
    return (np.random.default_rng([2, *shape]).uniform(-1, 1, shape) / np.sqrt(shape[0])).astype(np.float32)


def dense(x: str, y: str, w: str = "w") -> onnx.NodeProto:
    return node("MatMul", [x, w], [y])


def images(x: str, y: str, w: str) -> onnx.NodeProto:
    return node("Conv", [x, w], [y], pads=[1, 1, 1, 1])


SQUARE = dict(zip("wvu", np.sqrt(3 / N).astype(np.float32) * weights(3, N, N)))
HALVES = [node("Add", ["h", "g"], ["s"]), node("Mul", ["s", "half"], ["m"]), dense("m", "y", "u")]
ROW, IMAGE = ("N", N), ("N", 2, 3, 4)
KERNELS = {"k": weights(2, 2, 3, 3), "l": weights(3, 2, 1, 1), "m": weights(2, 2, 3, 3)[::-1]}

# What it shows: the nodes, known tensors, inputs' shapes, the elements that tables make.
CASES: dict[str, tuple[list[onnx.NodeProto], dict[str, np.ndarray], dict[str, tuple[str | int, ...]], int]] = {
    "a function of what is joined": (
        [dense("x", "a"), dense("z", "b", "v"), node("Concat", ["a", "b"], ["c"], axis=1), node("Relu", ["c"], ["y"])],
        SQUARE,
        {"x": ROW, "z": ROW},
        2 * N,
    ),
    "functions per channel, of two nodes, of what is joined with known numbers": (
        [
            images("x", "a", "k"),
            node("Conv", ["x", "l"], ["b"]),
            node("Concat", ["a", "known", "b"], ["c"], axis=1),
            node("Mul", ["c", "gain"], ["g"]),
            node("Sigmoid", ["g"], ["s"]),
            node("Mul", ["g", "s"], ["r"]),
            node("ReduceMean", ["r"], ["y"], axes=[2, 3]),
        ],
        {**KERNELS, "known": np.ones((1, 1, 3, 4), np.float32), "gain": weights(6, 1, 1) + 2},
        {"x": IMAGE},
        5 * 12,
    ),
    "joins of joins": (
        [
            *(dense("x", name, w) for name, w in zip("abc", "wvu")),
            node("Concat", ["a", "b"], ["d"], axis=1),
            node("Concat", ["d", "c"], ["e"], axis=1),
            node("Tanh", ["e"], ["y"]),
        ],
        SQUARE,
        {"x": ROW},
        3 * N,
    ),
    "two functions of what is joined: it is quantized once": (
        [
            dense("x", "a"),
            dense("z", "b", "v"),
            node("Concat", ["a", "b"], ["c"], axis=1),
            *(node(op, ["c"], [op]) for op in ("Relu", "Tanh")),
        ],
        SQUARE,
        {"x": ROW, "z": ROW},
        3 * 2 * N,
    ),
    "heads of one output": (
        [
            dense("x", "h"),
            node("Relu", ["h"], ["r"]),
            dense("r", "a", "v"),
            dense("r", "b", "u"),
            node("Concat", ["a", "b"], ["c"], axis=1),
            node("Mul", ["c", "gain"], ["y"]),
        ],
        {**SQUARE, "gain": weights(2 * N) + 2},
        {"x": ROW},
        N,
    ),
    "a head with a function beside one without": (
        [dense("x", "a"), node("Sigmoid", ["a"], ["s"]), dense("x", "b", "v"), node("Concat", ["s", "b"], ["y"], axis=1)],
        SQUARE,
        {"x": ROW},
        N,
    ),
    "layers that add to what they read": (
        [
            dense("x", "a"),
            node("Relu", ["a"], ["p"]),
            node("Add", ["x", "p"], ["h"]),
            dense("h", "b", "v"),
            node("Relu", ["b"], ["q"]),
            node("Sub", ["h", "q"], ["g"]),
            dense("g", "y", "u"),
        ],
        SQUARE,
        {"x": ROW},
        2 * N,
    ),
    "images that are added, a mean of them, and weights after movement": (
        [
            images("x", "a", "k"),
            node("Relu", ["a"], ["p"]),
            node("Add", ["x", "p"], ["h"]),
            images("h", "b", "m"),
            node("Tanh", ["b"], ["q"]),
            node("Add", ["h", "q"], ["s"]),
            node("Flatten", ["s"], ["f"]),
            node("Gemm", ["f", "head", "bias"], ["y"], transB=1, alpha=0.5),
        ],
        {**KERNELS, "head": weights(3, 24), "bias": weights(3)},
        {"x": IMAGE},
        2 * 24,
    ),
    "linear bottlenecks of rows": (
        [
            dense("x", "a"),
            node("Relu", ["a"], ["r"]),
            dense("r", "b", "v"),
            node("Add", ["b", "bias"], ["h"]),
            dense("h", "c", "u"),
            node("Tanh", ["c"], ["p"]),
            node("Gemm", ["p", "v", "bias"], ["d"], beta=0.5),
            node("Sub", ["h", "d"], ["s"]),
            node("Gemm", ["s", "u", "bias"], ["e"], transB=1, alpha=0.5),
            node("Relu", ["e"], ["y"]),
        ],
        {**SQUARE, "bias": weights(N)},
        {"x": ROW},
        3 * N,
    ),
    "linear bottlenecks of images": (
        [
            images("x", "a", "k"),
            node("Relu", ["a"], ["r"]),
            node("Conv", ["r", "n", "bias"], ["h"]),
            node("Conv", ["h", "l"], ["b"]),
            node("Relu", ["b"], ["p"]),
            node("Conv", ["p", "o", "bias"], ["c"]),
            node("Add", ["h", "c"], ["s"]),
            node("Conv", ["s", "m"], ["d"]),
            node("Relu", ["d"], ["y"]),
        ],
        {**KERNELS, "n": weights(2, 2, 1, 1), "o": weights(2, 3, 1, 1), "bias": weights(2)},
        {"x": IMAGE},
        2 * 12 + 3 * 12 + 2 * 2,
    ),
    "two functions of one layer are one table before they are added": (
        [dense("x", "a"), node("Relu", ["a"], ["h"]), node("Tanh", ["a"], ["g"]), *HALVES],
        {**SQUARE, "half": np.float32(0.5)},
        {"x": ROW},
        N,
    ),
    "a mean over places of what is added": (
        [
            images("x", "a", "k"),
            node("Relu", ["a"], ["p"]),
            node("Conv", ["x", "l"], ["b"]),
            node("Slice", ["b", "zero", "two", "one"], ["c"]),
            node("Tanh", ["c"], ["q"]),
            node("Sub", ["p", "q"], ["s"]),
            node("Sub", ["s", "q"], ["t"]),
            node("GlobalAveragePool", ["t"], ["y"]),
        ],
        {**KERNELS, "zero": np.array([0]), "two": np.array([2]), "one": np.array([1])},
        {"x": IMAGE},
        2 * 24,
    ),
    "a mean of functions": (
        [dense("x", "a"), node("Relu", ["a"], ["h"]), dense("x", "b", "v"), node("Tanh", ["b"], ["g"]), *HALVES],
        {**SQUARE, "half": np.float32(0.5)},
        {"x": ROW},
        2 * N,
    ),
    "a sum that a maximum compares too": (
        [
            dense("x", "a"),
            node("Relu", ["a"], ["p"]),
            node("Add", ["x", "p"], ["h"]),
            dense("h", "y", "v"),
            node("ReduceMax", ["h"], ["z"], axes=[1]),
        ],
        SQUARE,
        {"x": ROW},
        2 * N,
    ),
    "similarity of two rows": (
        [dense("x", "a"), dense("z", "b", "v"), node("Mul", ["a", "b"], ["p"]), node("ReduceMean", ["p"], ["y"], axes=[-1])],
        SQUARE,
        {"x": ROW, "z": ROW},
        2 * N,
    ),
    "rows weighed by numbers of their own, and added up": (
        [node("Mul", ["x", "z"], ["p"]), node("ReduceSum", ["p", "rows"], ["y"], keepdims=0)],
        {"rows": np.array([1])},
        {"x": ("N", 3, N), "z": ("N", 3, 1)},
        0,
    ),
    "known weights of an input": (
        [node("Mul", ["gain", "x"], ["p"]), node("ReduceSum", ["p", "last"], ["y"])],
        {"gain": weights(3, N), "last": np.array([-1])},
        {"x": ("N", 3, N)},
        0,
    ),
    "a weighted sum of inputs": (
        [
            node("Mul", ["x", "low"], ["a"]),
            node("Transpose", ["z"], ["t"], perm=[0, 2, 1]),
            node("Div", ["t", "gain"], ["b"]),
            node("Add", ["b", "half"], ["c"]),
            node("Sub", ["c", "a"], ["y"]),
        ],
        {"low": np.float32(-0.3), "half": np.float32(0.5), "gain": weights(3, N) + 2},
        {"x": ("N", 3, N), "z": ("N", N, 3)},
        0,
    ),
    "a part of an input beside a layer of it": (
        [node("Mul", ["x", "half"], ["p"]), dense("x", "a"), node("Add", ["a", "p"], ["y"])],
        {**SQUARE, "half": np.float32(0.5)},
        {"x": ROW},
        0,
    ),
    "multiples that are sums, joined and added": (
        [
            node("Mul", ["x", "half"], ["p"]),
            node("Add", ["x", "p"], ["m"]),
            node("Concat", ["m", "z"], ["c"], axis=1),
            node("Relu", ["c"], ["r"]),
            node("Add", ["m", "z"], ["s"]),
        ],
        {"half": np.float32(0.5)},
        {"x": ROW, "z": ROW},
        3 * N,
    ),
    "a function of a weighted sum": (
        [node("Mul", ["x", "half"], ["p"]), node("Add", ["p", "z"], ["s"]), node("Relu", ["s"], ["y"])],
        {"half": np.float32(0.3)},
        {"x": ROW, "z": ROW},
        2 * N,
    ),
    "inputs brought to one range, joined before weights": (
        [
            node("Sub", ["x", "low"], ["a"]),
            node("Div", ["a", "gain"], ["b"]),
            node("Mul", ["z", "half"], ["c"]),
            node("Concat", ["b", "c"], ["d"], axis=1),
            dense("d", "y", "tall"),
        ],
        {"low": np.float32(-0.3), "half": np.float32(0.5), "gain": weights(N) + 2, "tall": weights(2 * N, 3)},
        {"x": ROW, "z": ROW},
        0,
    ),
    "weights of an activation and a part of an input": (
        [
            dense("x", "a"),
            node("Sigmoid", ["a"], ["b"]),
            node("Mul", ["a", "b"], ["p"]),
            node("Mul", ["x", "half"], ["q"]),
            node("Add", ["p", "q"], ["h"]),
            dense("h", "y", "v"),
        ],
        {**SQUARE, "half": np.float32(0.3)},
        {"x": ROW},
        N,
    ),
    "differences of all pairs before weights": (
        [
            node("Unsqueeze", ["x", "one"], ["a"]),
            node("Unsqueeze", ["x", "two"], ["b"]),
            node("Sub", ["a", "b"], ["d"]),
            node("Reshape", ["d", "row"], ["r"]),
            dense("r", "h", "wide"),
            node("Relu", ["h"], ["y"]),
        ],
        {"one": np.array([1]), "two": np.array([2]), "row": np.array([-1, N * N]), "wide": weights(N * N, 3)},
        {"x": ROW},
        3,
    ),
    "a blend": (
        [
            dense("x", "a"),
            node("Sigmoid", ["a"], ["t"]),
            dense("x", "b", "v"),
            node("Tanh", ["b"], ["h"]),
            node("Sub", ["one", "t"], ["rest"]),
            node("Mul", ["rest", "x"], ["p"]),
            node("Mul", ["t", "h"], ["q"]),
            node("Add", ["p", "q"], ["y"]),
        ],
        {**SQUARE, "one": np.float32(1)},
        {"x": ROW},
        3 * N,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_same_function_with_so_many_tables(case):
    nodes, known, shapes, tables = CASES[case]
    made = {name for n in nodes for name in n.output} - {name for n in nodes for name in n.input}
    source = model(nodes, shapes, sorted(made), known)
    graph = fheq.import_onnx(source)
    layout = plan(graph)
    assert sum(int(np.prod(layout.shape(point))) for point in layout.points) == tables
    planned = plan(rejoined(graph, layout.graph))
    assert planned.points == layout.points
    assert [step.out for step in planned.steps] == [step.out for step in layout.steps]
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=(SAMPLES, *shape[1:])).astype(np.float32) for shape in shapes.values()]
    reference = ReferenceEvaluator(source)
    each = [reference.run(None, {name: a[i : i + 1] for name, a in zip(shapes, arrays)}) for i in range(SAMPLES)]
    wanted = [np.concatenate(column) for column in zip(*each)]
    for want, got in zip(wanted, listed(fheq.evaluate(rejoined(graph, layout.graph), *arrays)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, *arrays), 8))
    found = program.dequantize(*listed(fheq.simulate(program, *program.quantize(*arrays))))
    for want, got in zip(wanted, found, strict=True):
        assert np.mean((np.asarray(got).reshape(want.shape) - want) ** 2) < 1e-3 * np.var(want)


def test_single_weights_are_rounded_alone():
    graph = fheq.import_onnx(model([dense("x", "y")], {"x": ("N", 1)}, ["y"], {"w": np.full((1, 1), 0.3, np.float32)}))
    x = np.random.default_rng(0).normal(size=(SAMPLES, 1)).astype(np.float32)
    rounded = fheq.round_weights(graph, fheq.fit(graph, fheq.calibrate(graph, x), 5), x)
    np.testing.assert_allclose(fheq.evaluate(rounded, x), 0.3 * x, atol=0.3 * np.ptp(x) / 31 / 2)  # of the input's steps


def test_small_parts_beside_great_numbers_keep_their_digits():
    nodes = [node("Mul", ["x", "a"], ["m"]), node("Add", ["m", "b"], ["n"]), node("Add", ["n", "z"], ["y"])]
    known = {"a": np.float32(1e-3), "b": np.float32(1e3)}
    planned = plan(fheq.import_onnx(model(nodes, {"x": ROW, "z": ROW}, ["y"], known))).graph
    (product,) = (n for n in planned.nodes if n.op == "MatMul")
    np.testing.assert_allclose(planned.constants[product.inputs[1]], known["a"])


def test_thousands_of_scaled_inputs_are_joined():
    """The matrix of what is done to each alone would have millions of elements."""
    nodes = [node("Mul", ["x", "gain"], ["m"]), node("Concat", ["m", "z"], ["c"], axis=1), dense("c", "y")]
    many = 4200
    known = {"gain": np.linspace(1, 2, many, dtype=np.float32), "w": np.ones((many + N, 1), np.float32)}
    graph = fheq.import_onnx(model(nodes, {"x": ("N", many), "z": ROW}, ["y"], known))
    assert not plan(graph).points
    x, z = np.ones((2, many), np.float32), np.zeros((2, N), np.float32)
    np.testing.assert_allclose(fheq.evaluate(rejoined(graph, plan(graph).graph), x, z), 1.5 * many, rtol=1e-5)


def listed(found):
    return found if isinstance(found, tuple | list) else (found,)


def test_stated_quantizers_move_with_the_functions_that_they_follow():
    """Behind a join and a function, one quantizer is one table of each part, and needs no bits of the user's."""
    scale, zero = np.float32(0.02), np.uint8(0)
    quantized = lambda x, y: [
        node("QuantizeLinear", [x, "scale", "zero"], [f"{y}/q"]),
        node("DequantizeLinear", [f"{y}/q", "scale", "zero"], [y]),
    ]
    known = {"scale": scale, "zero": zero, "w": np.round(weights(N, N) / 0.02).astype(np.int8), "ws": np.float32(0.02)}
    nodes = [
        *quantized("x", "i"),
        node("DequantizeLinear", ["w", "ws"], ["wd"]),
        dense("i", "a", "wd"),
        node("Neg", ["i"], ["j"]),
        node("MatMul", ["j", "wd"], ["b"]),
        node("Concat", ["a", "b"], ["c"], axis=1),
        node("Relu", ["c"], ["r"]),
        *quantized("r", "y"),
    ]
    source = model(nodes, {"x": ROW}, ["y"], known, opset=21)
    graph = fheq.import_onnx(source)
    x = np.random.default_rng(0).uniform(0, 5, (SAMPLES, N)).astype(np.float32)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x)))
    found = program.dequantize(*listed(fheq.simulate(program, *program.quantize(x))))[0]
    (wanted,) = ReferenceEvaluator(source).run(None, {"x": x})
    assert sum(int(np.prod(plan(graph).shape(p))) for p in plan(graph).points) == 2 * N
    assert np.mean(np.abs(found - wanted) > scale / 2) < 0.01  # ties of float products


def test_the_terms_of_a_long_sum_share_their_steps():
    """A sum of n tensors of b bits, with steps that are parts of one, is no wider than n times the finest of them."""
    depth, bits = 6, 6
    layers = [
        part
        for i in range(depth)
        for part in (
            dense(f"h{i}", f"a{i}", f"w{i}"),
            node("Relu", [f"a{i}"], [f"r{i}"]),
            node("Add", [f"h{i}", f"r{i}"], [f"h{i + 1}"]),
        )
    ]
    known = {f"w{i}": w for i, w in enumerate(np.sqrt(depth / N).astype(np.float32) * weights(depth, N, N))}
    graph = fheq.import_onnx(model([node("Identity", ["x"], ["h0"]), *layers], {"x": ROW}, [f"h{depth}"], known))
    x = np.random.default_rng(0).normal(size=(SAMPLES, N)).astype(np.float32)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), bits)
    sums = [qparams.accumulators[step.out] for step in plan(graph).steps if isinstance(step, Add)]
    assert len(sums) == depth
    assert max(np.max(a.qmax - a.qmin) for a in sums) < (depth + 1) * FINER * 2**bits
