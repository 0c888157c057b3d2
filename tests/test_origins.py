"""What elements are functions of: of one tensor, the same elements, whatever its shape became."""

from __future__ import annotations

import numpy as np
import pytest
from build_models import model, node
from onnx.reference import ReferenceEvaluator

import fheq
from fheq.client.outputs import rejoined
from fheq.origins import elementwise_source, is_boolean, is_function_of_one, is_integer
from fheq.planning.plan import plan
from fheq.steps import Product

KNOWN = {
    "zero": np.float32(0),
    "half": np.float32(0.5),
    "column": np.array([3, 1]),
    "row": np.array([1, 3]),
    "grid": np.arange(9, dtype=np.float32).reshape(3, 3),
    "pads": np.array([0, 1, 0, 1]),
}
SPREAD = [node("Reshape", ["x", "column"], ["c"]), node("Add", ["x", "grid"], ["a"]), node("Sub", ["c", "grid"], ["b"])]
FLAT = [node("Relu", ["x"], ["r"]), node("Reshape", ["r", "column"], ["c"]), node("Reshape", ["c", "row"], ["b"])]

# The nodes, the tensors, whether these are functions of the same elements.
MEET = {
    "one broadcast by rows, one by columns": ([*SPREAD, node("Mul", ["a", "b"], ["y"])], ("a", "b"), False),
    "both broadcast alike": ([*SPREAD, node("Mul", ["a", "x"], ["y"])], ("a", "x"), True),
    "reshaped and back": ([*FLAT, node("Mul", ["b", "x"], ["y"])], ("b", "x"), True),
    "a row and a column": ([*FLAT, node("Mul", ["c", "x"], ["y"])], ("c", "x"), False),
}


def imported(nodes, kinds=None) -> fheq.Graph:
    read = {name for n in nodes for name in n.input}
    known = {name: value for name, value in KNOWN.items() if name in read}
    made = [nodes[-1].output[0]]
    return fheq.import_onnx(model(nodes, {"x": (1, 3)}, made, known, kinds=kinds or {}))


@pytest.mark.parametrize("case", MEET)
def test_the_same_elements_meet(case):
    nodes, names, wanted = MEET[case]
    graph = imported(nodes)
    assert is_function_of_one(graph, names, "y") == wanted
    assert {elementwise_source(graph, name) for name in names} == {"x"}
    assert any(isinstance(step, Product) for step in plan(graph).steps) != wanted


def test_a_choice_of_a_row_and_a_column_of_one_tensor():
    nodes = [
        node("Reshape", ["x", "column"], ["c"]),
        node("Greater", ["x", "zero"], ["g"]),
        node("Where", ["g", "x", "c"], ["y"]),
    ]
    known = {name: KNOWN[name] for name in ("column", "zero")}
    source = model(nodes, {"x": (1, 3)}, ["y"], known)
    graph = fheq.import_onnx(source)
    planned = rejoined(graph, plan(graph).graph)
    for x in np.random.default_rng(0).normal(size=(20, 1, 3)).astype(np.float32):
        np.testing.assert_allclose(fheq.evaluate(planned, x), ReferenceEvaluator(source).run(None, {"x": x})[0], atol=1e-6)


def test_chains_of_many_operators_are_planned():
    many = 900
    nodes = [node("Sigmoid" if i % 2 else "Tanh", [f"t{i}" if i else "x"], [f"t{i + 1}"]) for i in range(many)]
    graph = imported([*nodes, node("Add", [f"t{many - 1}", f"t{many}"], ["y"])])
    assert plan(graph).points == {"y": "x"}


def test_whole_numbers_are_not_told_from_what_is_put_beside_them():
    nodes = [node("Cast", ["x"], ["f"], to=1), node("Pad", ["f", "pads", "half"], ["y"])]
    graph = imported(nodes, {"x": 7})
    assert is_integer(graph, "f") and not is_integer(graph, "y")


def test_copies_of_decisions_hold_nothing_else():
    nodes = [node("Greater", ["x", "zero"], ["g"]), node("Cast", ["g"], ["c"], to=1)]
    moved = [node("Pad", ["c", "pads"], ["p"]), node("Pad", ["p", "pads", "half"], ["h"]), node("Relu", ["h"], ["y"])]
    graph = imported([*nodes, *moved])
    assert [is_boolean(graph, name) for name in "gcphy"] == [True, True, True, False, False]
