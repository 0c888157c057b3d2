"""`fheq.check`: every problem of a model, with its node, cause and remedy."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import build_models
import numpy as np
import onnx
import pytest
from build_models import model, node
from models import prepared

import fheq
from fheq.check import problem, survey
from fheq.errors import FheqError, ModelError, UnsupportedError
from fheq.planning.plan import plan
from fheq.planning.prediction import predicted_tables, tables_by_node


@pytest.mark.parametrize("build", [build_models.mlp, build_models.cnn])
def test_good_models_have_no_problems(build: Any, tmp_path):
    proto = build()
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    for form in (proto, proto.SerializeToString(), path, str(path), fheq.import_onnx(proto)):
        assert fheq.check(form) == []


NAN = np.array([1.0, np.nan], np.float32)
CASES = {
    "unknown op": (
        model([node("Unique", ["x"], ["y"])], {"x": ["N", 2]}, ["y"]),
        [("node 'make_y' (Unique, output 'y')", "no row", "rewrite")],
    ),
    "op without an integer form": (
        model([node("Mod", ["x", "z"], ["y"], fmod=1)], {"x": ["N", 3], "z": ["N", 3]}, ["y"]),
        [("node 'make_y' (Mod, output 'y')", "no integer form", "rewrite")],
    ),
    "two of them": (
        model(
            [node("Mod", ["x", "z"], ["i"], fmod=1), node("Relu", ["x"], ["r"]), node("Mod", ["z", "r"], ["j"], fmod=1)],
            {"x": ["N", 3], "z": ["N", 3]},
            ["i", "j"],
        ),
        [
            ("node 'make_i' (Mod, output 'i')", "no integer form", "rewrite"),
            ("node 'make_j' (Mod, output 'j')", "no integer form", "rewrite"),
        ],
    ),
    "NaN in a weight": (
        model([node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 2]}, ["y"], {"w": np.stack([NAN, NAN])}),
        [("the model", "initializer 'w' contains NaN", "train")],
    ),
    "NaN in a bias": (
        model([node("Relu", ["x"], ["r"]), node("Add", ["r", "b"], ["y"])], {"x": ["N", 2]}, ["y"], {"b": NAN}),
        [("the model", "initializer 'b' contains NaN", "train")],
    ),
    "operators on integers behind one that failed": (
        model(
            [
                node("QuantizeLinear", ["x", "s", "z"], ["q"]),
                node("Unknown", ["q"], ["u"], domain="own"),
                node("QLinearMatMul", ["u", "s", "z", "w", "s", "z", "s", "z"], ["y"]),
            ],
            {"x": ["N", 2]},
            ["y"],
            {"s": np.float32(0.1), "z": np.uint8(0), "w": np.ones((2, 2), np.uint8)},
            domains={"own": 1},
        ),
        [("node 'make_u' (own.Unknown, output 'u')", "no row", "rewrite")],
    ),
    "outputs of constants alone": (
        model([node("Relu", ["k"], ["z"])], {"x": ["N", 2]}, ["z"], {"k": np.ones(2)}),
        [("the model", "'z' does not depend on the inputs", "drop it")],
    ),
    "places that are secret": (
        model([node("GridSample", ["x", "g"], ["y"])], {"x": ["N", 1, 2, 2], "g": ["N", 2, 2, 2]}, ["y"]),
        [("node 'make_y' (GridSample, output 'y')", "'g'", "constant of the model")],
    ),
    "open shape": (
        model([node("Relu", ["x"], ["y"])], {"x": ["N", "width"]}, ["y"]),
        [("the model", "width", "dims")],
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_problems(case: str):
    proto, expected = CASES[case]
    found = fheq.check(proto)
    assert len(found) == len(expected), [str(p) for p in found]
    for p, (where, cause, remedy) in zip(found, expected):
        assert p.node == where
        assert cause in p.cause
        assert remedy in p.remedy
        assert str(p) == f"{p.node}: {p.cause}; {p.remedy}"


def test_nan_in_a_graph_names_the_reader():
    graph = fheq.import_onnx(build_models.mlp())
    (found,) = fheq.check(graph.replace(constants={**graph.constants, "b2": NAN}))
    assert found.node == "node 'make_y' (Add, output 'y')"
    assert "NaN" in found.cause


def test_open_dims_can_be_given():
    assert fheq.check(CASES["open shape"][0], dims={"width": 3}) == []


@pytest.mark.parametrize("what", [b"", b"no model", "no/such/file.onnx", build_models.mlp().SerializeToString()[:-40]])
def test_unreadable_models(what: Any):
    found = fheq.check(what)
    assert found
    assert all(p.cause and p.remedy for p in found)


def test_problems_are_plain_frozen_data():
    p = fheq.Problem("n", "c", "r")
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.cause = "other"  # type: ignore[misc]
    assert {p, fheq.Problem("n", "c", "r")} == {p}


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UnsupportedError("node 'a' (Op, output 'b'): bad; do this"), ("node 'a' (Op, output 'b')", "bad", "do this")),
        (
            UnsupportedError("node (unnamed) (d.Op, output 'b') has bad"),
            ("node (unnamed) (d.Op, output 'b')", "has bad", "rewrite"),
        ),
        (ModelError("the model: bad"), ("the model", "bad", "export it again")),
    ],
)
def test_errors_taken_apart(error: FheqError, expected: tuple[str, str, str]):
    found = problem(error)
    assert (found.node, found.cause) == expected[:2]
    assert expected[2] in found.remedy


@pytest.mark.parametrize(
    "name", ["activation_with_branches", "product_of_two_inputs", "max_and_min_of_two", "residual_with_different_scales"]
)
def test_predicted_tables_are_those_of_the_program(name: str):
    ready = prepared(name)
    program = fheq.lower(ready.graph, fheq.fit(ready.graph, ready.stats, 4))
    applied = sum(math.prod(program.values[lookup.out].shape) for lookup in program.lookups)
    tables = survey(ready.proto).tables
    assert tables is not None and sum(tables.values()) == applied


def test_the_heaviest_node_is_named_with_what_needs_fewer_tables():
    """A table compares a computed index with each of 9 rows; choosing 2 of 6 elements takes 15 comparisons, and more."""
    known = {"rows": np.eye(9, 6, dtype=np.float32), "w": np.ones((6, 4), np.float32), "k": np.array([2])}
    look_up = [node("Add", ["x", "z"], ["i"]), node("Gather", ["rows", "i"], ["e"])]
    look_up += [node("MatMul", ["e", "w"], ["h"]), node("Relu", ["h"], ["y"])]
    kinds = dict.fromkeys("xz", onnx.TensorProto.INT64)
    found = survey(model(look_up, {"x": ["N"], "z": ["N"]}, ["y"], known, kinds=kinds)).heaviest
    assert found is not None and (found.node, found.tables) == ("node 'make_e' (Gather, output 'e')", 9)
    assert "make the rows an input" in found.remedy
    best = [node("TopK", ["x", "k"], ["v", "i"]), node("Tanh", ["v"], ["t"]), node("MatMul", ["t", "u"], ["y"])]
    found = survey(model(best, {"x": ["N", 6]}, ["y"], {"k": known["k"], "u": known["w"][:2]})).heaviest
    assert found is not None and found.node == "node 'make_v' (TopK, output 'v')" and "fewer elements" in found.remedy


@pytest.mark.parametrize("name", ["product_of_two_inputs", "max_and_min_of_two", "residual_with_different_scales"])
def test_every_table_is_that_of_a_node(name: str):
    ready = prepared(name)
    layout = plan(ready.graph)
    by_node = tables_by_node(layout, fheq.import_onnx(ready.proto).nodes)
    assert sum(count for _, count in by_node) == sum(predicted_tables(layout).values())


def test_a_survey_of_a_bad_model_says_what_it_takes():
    found = survey(CASES["open shape"][0])
    assert found.inputs == (("x", "float32", ("N", "width")),)
    assert (found.outputs, dict(found.ops), found.tables) == ((), {"Relu": 1}, None)
    assert len(found.problems) == 1
