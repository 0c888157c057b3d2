"""Normalizations: rows of zeros, and rows much smaller than others, leave the inverses of norms their steps."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from build_models import model, node

import fheq
from fheq.interpret import interpret
from fheq.planning.plan import plan
from fheq.steps import Product

ROWS, FEATURES = 1200, 6
NORM = [node("ReduceL2", ["x", "axes"], ["l"])]
VARIANCE = [
    node("ReduceMean", ["x", "axes"], ["m"]),
    node("Sub", ["x", "m"], ["c"]),
    node("Mul", ["c", "c"], ["q"]),
    node("ReduceMean", ["q", "axes"], ["v"]),
]
FORMS: dict[str, list[onnx.NodeProto]] = {
    "LayerNormalization": [node("LayerNormalization", ["x", "gain"], ["y"], axis=-1)],
    "LpNormalization": [node("LpNormalization", ["x"], ["y"], axis=-1, p=2)],
    "L2, at least epsilon": [*NORM, node("Max", ["l", "epsilon"], ["n"]), node("Div", ["x", "n"], ["y"])],
    "L1, and epsilon": [
        node("ReduceL1", ["x", "axes"], ["l"]),
        node("Add", ["l", "epsilon"], ["n"]),
        node("Div", ["x", "n"], ["y"]),
    ],
    "maximum": [
        node("Abs", ["x"], ["s"]),
        node("ReduceMax", ["s", "axes"], ["l"]),
        node("Add", ["l", "epsilon"], ["n"]),
        node("Div", ["x", "n"], ["y"]),
    ],
    "root mean square": [
        node("Mul", ["x", "x"], ["q"]),
        node("ReduceMean", ["q", "axes"], ["v"]),
        node("Add", ["v", "epsilon"], ["e"]),
        node("Sqrt", ["e"], ["n"]),
        node("Reciprocal", ["n"], ["r"]),
        node("Mul", ["x", "r"], ["y"]),
    ],
    "power": [
        *VARIANCE,
        node("Add", ["v", "epsilon"], ["e"]),
        node("Pow", ["e", "power"], ["r"]),
        node("Mul", ["c", "r"], ["y"]),
    ],
    "at most a bound": [
        *NORM,
        node("Add", ["l", "epsilon"], ["n"]),
        node("Reciprocal", ["n"], ["r"]),
        node("Min", ["bound", "r"], ["i"]),
        node("Mul", ["x", "i"], ["y"]),
    ],
    "after a product": [
        *NORM,
        node("Add", ["l", "epsilon"], ["n"]),
        node("MatMul", ["x", "w"], ["p"]),
        node("Div", ["p", "n"], ["y"]),
    ],
}
INVERSE = [node("Add", ["v", "epsilon"], ["e"]), node("Sqrt", ["e"], ["n"]), node("Reciprocal", ["n"], ["r"])]
FAST = [
    node("ReduceSum", ["x", "axes"], ["t"]),
    node("Mul", ["t", "share"], ["m"]),
    node("Pow", ["x", "two"], ["xx"]),
    node("ReduceMean", ["xx", "axes"], ["s"], keepdims=0),
    node("Mul", ["m", "m"], ["mm"]),
    node("Squeeze", ["mm", "axes"], ["f"]),
    node("Sub", ["s", "f"], ["d"]),
    node("Relu", ["d"], ["p"]),
    node("Unsqueeze", ["p", "axes"], ["v"]),
]
WRITTEN = {
    "squares less the square of the mean": [*FAST, *INVERSE, node("Sub", ["x", "m"], ["c"]), node("Mul", ["c", "r"], ["y"])],
    "the gain before the deviation": [
        *VARIANCE,
        *INVERSE,
        node("Mul", ["r", "gains"], ["g"]),
        node("Mul", ["c", "g"], ["z"]),
        node("Add", ["z", "gains"], ["y"]),
    ],
    "two products": [
        *VARIANCE,
        *INVERSE,
        node("Mul", ["r", "gains"], ["g"]),
        node("Neg", ["m"], ["k"]),
        node("Mul", ["k", "g"], ["b"]),
        node("Add", ["b", "gains"], ["o"]),
        node("Mul", ["x", "g"], ["z"]),
        node("Add", ["z", "o"], ["y"]),
    ],
    "the mean twice": [
        *VARIANCE,
        *INVERSE,
        node("ReduceMean", ["x", "axes"], ["m2"]),
        node("Sub", ["x", "m2"], ["c2"]),
        node("Mul", ["c2", "r"], ["y"]),
    ],
}
FORMS |= WRITTEN
KNOWN = {
    "gain": np.ones(FEATURES, np.float32),
    "axes": np.array([-1]),
    "epsilon": np.float32(1e-6),
    "bound": np.float32(100),
    "power": np.float32(-0.5),
    "two": np.float32(2),
    "share": np.float32(1 / FEATURES),
    "gains": np.linspace(0.5, 1.5, FEATURES, dtype=np.float32),
    "w": np.random.default_rng(1).normal(size=(FEATURES, 3)).astype(np.float32),
}


def imported(form: str, features: int = FEATURES) -> fheq.Graph:
    nodes = FORMS[form]
    known = {name: value for name, value in KNOWN.items() if any(name in n.input for n in nodes)}
    known = {name: value[:features] if name == "gain" else value for name, value in known.items()}
    return fheq.import_onnx(model(nodes, {"x": ["N", features]}, ["y"], known, opset=18))


def error(graph: fheq.Graph, seen: np.ndarray, x: np.ndarray, bits: int) -> float:
    """Of integers fitted on `seen`, as a part of the size of what the model makes of x."""
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, seen), bits))
    want = np.asarray(fheq.evaluate(graph, x), np.float64)
    (got,) = program.dequantize(fheq.simulate(program, *program.quantize(x)))
    return float(np.sqrt(np.mean((got - want) ** 2) / np.mean(want**2)))


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_zeros_take_no_steps(form: str) -> None:
    """As padding and dead channels are; their norm's inverse is a thousand or a million, and multiplies zeros."""
    x = np.random.default_rng(0).normal(size=(ROWS, FEATURES)).astype(np.float32)
    padded = np.concatenate([x, np.zeros_like(x[: ROWS // 2])])
    graph = imported(form)
    alone, beside = (error(graph, seen, x, 6) for seen in (x, padded))
    assert alone < 0.15
    assert beside < 1.25 * alone


@pytest.mark.parametrize("form", WRITTEN)
def test_however_it_is_written_it_is_one_product(form: str) -> None:
    """Of deviations and the inverse of one row, as LayerNormalization is; the planned graph computes the same."""
    graph = imported(form)
    planned, reference = plan(graph), plan(imported("LayerNormalization"))
    assert [type(step) for step in planned.steps] == [type(step) for step in reference.steps]
    (product,) = (step for step in planned.steps if isinstance(step, Product))
    assert planned.shape(product.b.key) == (1, 1)
    x = np.random.default_rng(0).normal(3, 1, (1, FEATURES)).astype(np.float32)
    (name,) = planned.outputs
    found = interpret(planned.graph, {"x": x}, targets=[name])[name]
    np.testing.assert_allclose(found, fheq.evaluate(graph, x), rtol=0, atol=1e-5)


@pytest.mark.parametrize("features", [2, 3, FEATURES])
def test_small_rows_do_not_outweigh_the_others(features: int) -> None:
    """Where all squares of a row round to 0, its inverse is that of a row of squares that do, and no larger."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(ROWS, features)) * np.exp(rng.normal(size=(ROWS, 1)))).astype(np.float32)
    graph = imported("LayerNormalization", features)
    errors = [error(graph, x, x, bits) for bits in (4, 6, 8)]
    assert max(errors) < 1  # an answer of zeros
    assert errors[2] < errors[1] < errors[0]


@pytest.mark.parametrize("bound", [1.0, 0.5, 2.0])
def test_means_of_what_is_present(bound: float) -> None:
    """Divided by how many there are, at least 1: of a row of one the inverse is as large as that of a row of none."""
    nodes = [
        node("Unsqueeze", ["mask", "axes"], ["m"]),
        node("Mul", ["x", "m"], ["h"]),
        node("ReduceSum", ["h", "one"], ["s"], keepdims=0),
        node("ReduceSum", ["mask", "one"], ["c"]),
        node("Max", ["c", "bound"], ["n"]),
        node("Div", ["s", "n"], ["y"]),
    ]
    known = {"axes": np.array([-1]), "one": np.array([1]), "bound": np.float32(bound)}
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 5, 3], "mask": ["N", 5]}, ["y"], known, opset=18))
    rng = np.random.default_rng(0)
    x, count = rng.uniform(0, 1, (ROWS, 5, 3)).astype(np.float32), rng.integers(1, 6, ROWS)
    mask = (np.arange(5) < count[:, None]).astype(np.float32)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x, mask), 8))
    (got,) = program.dequantize(fheq.simulate(program, *program.quantize(x, mask)))
    wanted = (x * mask[:, :, None]).sum(axis=1) / np.maximum(count, bound)[:, None]
    for n in range(1, 6):
        np.testing.assert_allclose(got[count == n], wanted[count == n], atol=0.05)
