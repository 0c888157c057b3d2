"""Inputs that are only compared with thresholds: rounding them changes no decision."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from build_models import model, node
from hypothesis import given, settings
from hypothesis import strategies as st

import fheq
from fheq.affine import Affine
from fheq.fitting.thresholds import edges_of, steps_between
from fheq.planning.plan import plan
from fheq.post_training import PostTrainingAffineQuantization

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
RNG = np.random.default_rng(0)
NUMBERS = st.floats(-1000, 1000, width=32)


def quantized(nodes: list, x: np.ndarray, known: dict[str, np.ndarray], bits: Any = 8) -> Any:
    proto = model(nodes, {"x": ["N", *x.shape[1:]]}, [nodes[-1].output[0]], known)
    return PostTrainingAffineQuantization(bits, proto).quantize_module(x)


def around(values: np.ndarray) -> np.ndarray:
    """Numbers, with those next to them on either side."""
    return np.concatenate([values, np.nextafter(values, np.float32(-np.inf)), np.nextafter(values, np.float32(np.inf))])


@pytest.mark.parametrize("n_bits", [2, 8])
@pytest.mark.parametrize("slope", [1.0, -0.25])
@pytest.mark.parametrize(
    ("op", "compare"),
    [("LessOrEqual", np.less_equal), ("Less", np.less), ("Greater", np.greater), ("GreaterOrEqual", np.greater_equal)],
)
def test_two_thresholds_are_met_by_every_number(op: str, compare: Any, slope: float, n_bits: int) -> None:
    """The thresholds themselves and their neighbours in float32 too, behind an affine function or not."""
    nodes = [
        node("Mul", ["x", "slope"], ["h"]),
        node(op, ["h", "t"], ["c"]),
        node("Cast", ["c"], ["f"], to=1),
        node("MatMul", ["f", "w"], ["y"]),
    ]
    t = np.array([0.3, -1.7], np.float32)
    known = {"slope": np.float32(slope), "t": t, "w": np.eye(2, dtype=np.float32)}
    x = RNG.uniform(-8, 8, (200, 1)).astype(np.float32)
    bits = {"op_inputs": n_bits, "op_weights": 8, "model_inputs": n_bits}
    found = quantized(nodes, x, known, bits)
    rows = np.concatenate([x, around(t / np.float32(slope))[:, None]])
    np.testing.assert_array_equal(found.forward(rows) > 0.5, compare(rows * np.float32(slope), t))


@given(st.lists(NUMBERS, min_size=1, max_size=30, unique=True), st.integers(1, 8), st.floats(0.1, 10))
@settings(deadline=None, max_examples=60)
def test_steps_have_edges_at_the_extremes_and_fit_the_bits(values: list[float], bits: int, span: float) -> None:
    edge = np.unique(values)
    scale, zero_point, most = steps_between(edge, bits, span)
    assert scale > 0 and 1 <= most < 2**bits
    place = edge / scale + zero_point - 0.5
    if bits > 1 or len(edge) == 1:
        np.testing.assert_allclose(place[[0, -1]], [0, most - 1], atol=1e-9 * max(1, np.max(np.abs(edge)) / scale))
    if bits > 1 and len(edge) > 1:  # no worse than the most steps, in which no edge is farther than half a step
        assert np.sum(np.abs(place - np.round(place)) * scale) <= np.sum(np.ptp(edge) / (2**bits - 2) / 2) * len(edge) + 1e-3


def test_thresholds_on_a_coarse_grid_take_few_steps() -> None:
    scale, zero_point, most = steps_between(np.array([0.5, 1.5, 3.0]), 8, 10.0)
    assert most == 6 and scale == 0.5
    quantizer = Affine(scale, zero_point, 0.0, most, mode="HALF_EVEN")
    assert quantizer.quantize(np.array([0.4, 0.6, 2.9, 3.1])).tolist() == [0, 1, 5, 6]


def test_what_is_read_otherwise_too_keeps_its_steps() -> None:
    """The first feature is compared and multiplied, the second compared alone, the third not read."""
    nodes = [
        node("Gather", ["x", "first_two"], ["g"], axis=1),
        node("Greater", ["g", "t"], ["c"]),
        node("Cast", ["c"], ["f"], to=1),
        node("Gather", ["x", "first"], ["l"], axis=1),
        node("MatMul", ["l", "v"], ["m"]),
        node("MatMul", ["f", "w"], ["n"]),
        node("Add", ["m", "n"], ["y"]),
    ]
    known = {"first_two": np.array([0, 1]), "first": np.array([0]), "t": np.zeros((1, 2), np.float32)}
    known |= {"v": np.ones((1, 1), np.float32), "w": np.ones((2, 1), np.float32)}
    found = quantized(nodes, RNG.normal(size=(200, 3)).astype(np.float32), known)
    assert edges_of(plan(found.graph), "x").free.tolist() == [False, True, True]
    assert found.program.inputs[0].affine.qmax.tolist() == [255, 1, 1]


def test_a_value_that_goes_on_beside_its_test_is_no_decision() -> None:
    nodes = [
        node("Greater", ["x", "t"], ["c"]),
        node("Where", ["c", "x", "t"], ["k"]),
        node("MatMul", ["k", "w"], ["y"]),
    ]
    known = {"t": np.zeros(3, np.float32), "w": np.ones((3, 1), np.float32)}
    proto = model(nodes, {"x": ["N", 3]}, ["y"], known)
    assert not edges_of(plan(fheq.import_onnx(proto)), "x").free.any()


def test_a_tree_is_as_exact_as_its_leaves() -> None:
    """scikit-learn's result for any rows, as long as no feature has more than two thresholds; for a step of 8 bits a few
    rows in a hundred would fall on the other side of one."""
    tree = pytest.importorskip("sklearn.tree")
    pytest.importorskip("skl2onnx")
    x = RNG.normal(size=(300, 3)).astype(np.float32)
    regressor = tree.DecisionTreeRegressor(max_leaf_nodes=5, random_state=0).fit(x, x[:, 0] + 2 * x[:, 1] * x[:, 2])
    tested, thresholds = regressor.tree_.feature, regressor.tree_.threshold
    assert max(np.sum(tested == i) for i in range(3)) == 2 and len(thresholds[tested >= 0]) == 4
    bits = {"op_inputs": 8, "op_weights": 14, "model_inputs": 8}
    found = PostTrainingAffineQuantization(bits, fheq.from_sklearn(regressor, x)).quantize_module(x)
    rows = np.random.default_rng(1).normal(size=(3000, 3)).astype(np.float32)
    leaves = regressor.tree_.value[tested < 0]
    half = (
        np.ptp(leaves) / 2**14
    )  # a step of the weights, which are the differences from one leaf, is 1/2^13 of their largest
    np.testing.assert_allclose(found.forward(rows).ravel(), regressor.predict(rows), atol=2 * half)
