"""Products of two encrypted tensors."""

from __future__ import annotations

import numpy as np
import pytest
from build_models import model, node

import fheq
from fheq.planning.plan import plan


@pytest.mark.parametrize("granularity", fheq.Granularity)
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_a_factor_that_hardly_varies_costs_no_bits(size: float, granularity: fheq.Granularity) -> None:
    """In steps of its own small range it would lie thousands of them away from 0. The product loses little by coarser ones:
    most of what it is off by comes from the other factor."""
    graph = fheq.import_onnx(model([node("Mul", ["x", "z"], ["y"])], {"x": ["N", 3], "z": ["N", 3]}, ["y"]))
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (2000, 3)).astype(np.float32)
    still = (size * rng.uniform(0.99, 1, (2000, 3))).astype(np.float32)
    lively = (size * rng.uniform(-1, 1, (2000, 3))).astype(np.float32)
    widths, errors = [], []
    for z in (still, lively):
        program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x, z), fheq.Spec(6, activations=granularity)))
        answers = program.dequantize(fheq.simulate(program, *program.quantize(x, z)))[0]
        widths.append(np.log2(np.max(program.outputs[0].affine.qmax) + 1))
        errors.append(np.sqrt(np.mean((answers - x * z) ** 2)))
    assert widths[0] <= widths[1] + 1  # its values all have one sign
    step = 2 / 63  # of x, whose size is 1; half of it is a step of the still factor, as a part of its size
    assert errors[0] < size * step / np.sqrt(12) * np.hypot(1, 1 / 2) * 1.03  # of 6,000 values: known to 1 %


COSINES = {
    "root of a product": ([("Mul", "aa", "bb"), ("Sqrt", "t0"), ("Max", "t1", "eps"), ("Div", "d", "t2")], 2),
    "guard inside": ([("Mul", "aa", "bb"), ("Add", "t0", "eps"), ("Sqrt", "t1"), ("Div", "d", "t2")], 2),
    "product of roots": ([("Sqrt", "aa"), ("Sqrt", "bb"), ("Mul", "t0", "t1"), ("Div", "d", "t2")], 2),
    "reciprocal": ([("Mul", "aa", "bb"), ("Sqrt", "t0"), ("Reciprocal", "t1"), ("Mul", "d", "t2")], 2),
    "of what may be negative": (
        [("Mul", "p", "q"), ("Abs", "t0"), ("Mul", "t1", "q"), ("Sqrt", "t2"), ("Div", "d", "t3")],
        1,
    ),
    "of a square": ([("Mul", "aa", "aa"), ("Sqrt", "t0"), ("Div", "d", "t1")], 1),
    "with a large constant": ([("Mul", "aa", "bb"), ("Sqrt", "t0"), ("Max", "t1", "one"), ("Div", "d", "t2")], 1),
}


@pytest.mark.parametrize("name", COSINES)
def test_denominators_are_taken_apart_into_factors(name: str) -> None:
    written, reciprocals = COSINES[name]
    nodes = [node("MatMul", ["x", "u"], ["p"]), node("MatMul", ["z", "v"], ["q"])]
    nodes += [node("Mul", [a, b], [f"{a}{b}"]) for a, b in (("p", "p"), ("q", "q"), ("p", "q"))]
    nodes += [node("ReduceSum", [a, "axes"], [b]) for a, b in (("pp", "aa"), ("qq", "bb"), ("pq", "d"))]
    nodes += [node(op, names, [f"t{i}"]) for i, (op, *names) in enumerate(written)]
    rng = np.random.default_rng(0)
    known = {"u": rng.normal(size=(4, 3)), "v": rng.normal(size=(4, 3)), "eps": 1e-8, "one": 1.0}
    known = {k: np.asarray(v, np.float32) for k, v in known.items() if any(k in n.input for n in nodes)}
    proto = model(nodes, {"x": ["N", 4], "z": ["N", 4]}, [f"t{len(written) - 1}"], {**known, "axes": np.array([-1])})
    planned = plan(fheq.import_onnx(proto)).graph
    assert sum(n.op == "Reciprocal" for n in planned.nodes) == reciprocals


def test_a_cosine_keeps_its_precision_where_norms_vary() -> None:
    """The product of two squared norms spans 10,000 times what is smallest of it; a factor spans a hundredth of that."""
    nodes = [node("Mul", [a, b], [f"{a}{b}"]) for a, b in (("x", "x"), ("z", "z"), ("x", "z"))]
    nodes += [node("ReduceSum", [a, "axes"], [b]) for a, b in (("xx", "aa"), ("zz", "bb"), ("xz", "d"))]
    nodes += [node("Mul", ["aa", "bb"], ["m"]), node("Sqrt", ["m"], ["r"]), node("Div", ["d", "r"], ["y"])]
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 4], "z": ["N", 4]}, ["y"], {"axes": np.array([-1])}))
    rng = np.random.default_rng(0)
    x, z = (rng.normal(size=(2000, 4)) * rng.uniform(0.5, 1.5, (2000, 1)) for _ in range(2))
    x, z = x.astype(np.float32), z.astype(np.float32)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x, z), fheq.Spec(8, rounding=fheq.Rounding(8))))
    got = program.dequantize(fheq.simulate(program, *program.quantize(x, z)))[0]
    want = (
        np.sum(x * z, 1, keepdims=True) / np.linalg.norm(x, axis=1, keepdims=True) / np.linalg.norm(z, axis=1, keepdims=True)
    )
    want = want.reshape(got.shape)
    assert 1 - np.sum((got - want) ** 2) / np.sum((want - want.mean()) ** 2) > 0.95


def test_factors_that_hardly_vary_leave_the_other_channels_their_cells():
    """Saturated gates: a channel in which both are almost constant is as wide as the others, not 5 bits wider."""
    bits, channels = 6, 4
    rng = np.random.default_rng(0)
    x, z = (rng.uniform(0.1, 1, (400, channels)).astype(np.float32) for _ in range(2))
    for factor in (x, z):
        factor[:, 0] = 0.9 + 0.01 * factor[:, 0]
    nodes = [
        *(node("Sigmoid", [name], [f"{name}/s"]) for name in "xz"),
        node("Mul", ["x/s", "z/s"], ["p"]),
        node("Relu", ["p"], ["y"]),
    ]
    graph = fheq.import_onnx(model(nodes, {"x": ["N", channels], "z": ["N", channels]}, ["y"]))
    spec = fheq.Spec(bits, rounding=fheq.Rounding(bits, True))
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x, z), spec))
    (known,) = program.accumulators.values()
    assert known.bits <= 2 * bits + 1
    (report,) = fheq.overflow(program, *program.quantize(x, z)).rows
    assert report.share == 0
