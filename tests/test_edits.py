"""Edits combine as functions do, and touch what they name alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from build_models import model, node
from models import CASES, prepared

import fheq
from fheq import Override, Spec
from fheq.affine import Affine
from fheq.client.outputs import rejoined
from fheq.errors import DataError, QuantizationError
from fheq.planning.plan import plan
from fheq.tuning.edits import chain, masked, partition, select

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
GEMM = "gemm_with_alpha_beta_and_transposes"


def double(affine: Affine) -> Affine:
    return replace(affine, scale=affine.scale * 2)


def halve(affine: Affine) -> Affine:
    return replace(affine, scale=affine.scale / 2)


def factors(before: fheq.QParams, after: fheq.QParams) -> dict[tuple[str, str], float]:
    """By part and name, what the scale was multiplied with, where it changed."""
    return {
        (part, name): float(np.max(getattr(after, part)[name].scale / a.scale))
        for part in ("tensors", "weights", "accumulators")
        for name, a in getattr(before, part).items()
        if not np.array_equal(getattr(after, part)[name].scale, a.scale)
    }


@pytest.mark.parametrize("name", CASES)
def test_what_was_planned_is_planned_alike(name: str) -> None:
    """Edits of weights give the graph as it was planned, and keep its quantizers."""
    first = plan(prepared(name).graph)
    again = plan(rejoined(prepared(name).graph, first.graph))
    assert again.points == first.points
    assert [step.out for step in again.steps] == [step.out for step in first.steps]


def test_masked_edits_what_it_names() -> None:
    found = prepared(GEMM)
    q = fheq.fit(found.graph, found.stats, 4)
    assert factors(q, masked(double, {"x"})(q)) == {("tensors", "x"): 2}
    assert factors(q, masked(double, lambda name: name == "h")(q)) == {("accumulators", "h"): 2}
    gemms = masked(double, select(found.graph, op="Gemm"), parts=["weights"])(q)
    assert factors(q, gemms) == {("weights", name): 2 for name in q.weights} and len(q.weights) == 2
    assert factors(q, chain(masked(double, {"x"}), masked(halve, {"x", "h"}))(q)) == {("accumulators", "h"): 0.5}


@pytest.mark.parametrize(
    ("where", "parts", "message"),
    [
        ("x", None, "give {'x'}"),
        ({"xx"}, None, r"\['xx'\] name no quantizer.*there are 'x'"),
        ({"x"}, ["weights"], "name no quantizer in \\['weights'\\]"),
        ([], None, "name no quantizer"),
        ({"x"}, ["biases"], "no parts"),
    ],
)
def test_names_of_no_quantizer_are_refused(where: Any, parts: Any, message: str) -> None:
    found = prepared(GEMM)
    with pytest.raises(QuantizationError, match=message):
        masked(double, where, *([] if parts is None else [parts]))(fheq.fit(found.graph, found.stats, 4))


def test_partition_has_an_edit_per_label() -> None:
    found = prepared(GEMM)
    q = fheq.fit(found.graph, found.stats, 4)
    label = lambda name: "in" if name == "x" else "rest"
    changed = partition({"in": double, "rest": halve}, label, ["tensors"])(q)
    assert factors(q, changed) == {("tensors", name): 2 if name == "x" else 0.5 for name in q.tensors}
    with pytest.raises(fheq.FheqError, match="'rest'"):
        partition({"in": double}, label)(q)
    with pytest.raises(fheq.FheqError, match="parts"):
        partition({"in": double}, label, ["biases"])


def test_selected_names_are_keys_of_overrides_and_edits_map_over_values() -> None:
    found = prepared(GEMM)
    spec = Spec(4, overrides=dict.fromkeys(select(found.graph, op="Sigmoid"), Override(n_bits=2)))
    q = fheq.fit(found.graph, found.stats, spec)
    assert {name for name, a in q.tensors.items() if np.max(a.qmax) == 3} == set(select(found.graph, op="Sigmoid"))
    stretch = lambda factor: masked(lambda a: replace(a, scale=a.scale * factor), {"x"})(q)
    swept = jax.vmap(stretch)(np.array([1.0, 2.0]))
    np.testing.assert_allclose(swept.tensors["x"].scale[1], 2 * q.tensors["x"].scale, rtol=1e-6)
    with pytest.raises(fheq.FheqError, match="'Softmax'"):
        select(found.graph, op="Softmax")


def edited(qparams: fheq.QParams, part: str, name: str, **leaves: Any) -> fheq.QParams:
    affines = getattr(qparams, part)
    return replace(qparams, **{part: {**affines, name: replace(affines[name], **leaves)}})


@pytest.mark.parametrize("mode", ["CEIL", "FLOOR", "HALF_DOWN", "HALF_UP", "ROUND_TO_ZERO"])
@pytest.mark.parametrize("name", ["x", "r"])
def test_programs_round_as_an_edited_mode_says(name: str, mode: str) -> None:
    graph, x = network()
    qparams = edited(fheq.fit(graph, fheq.calibrate(graph, x), 4), "tensors", name, mode=mode)
    program = fheq.lower(graph, qparams)
    (got,) = program.dequantize(fheq.simulate(program, *program.quantize(x)))
    want = np.asarray(fheq.fake_quant(graph, qparams, x))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.std(want))
    nearest = fheq.fake_quant(graph, edited(qparams, "tensors", name, mode="ROUND"), x)
    assert mode.startswith("HALF") or np.any(want != nearest)


@pytest.mark.parametrize(
    ("part", "name", "leaf"),
    [("tensors", "x", "zero_point"), ("tensors", "r", "qmin"), ("tensors", "r", "lsbs"), ("weights", "w", "zero_point")],
)
def test_what_makes_no_integers_is_refused(part: str, name: str, leaf: str) -> None:
    graph, x = network()
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 4)
    moved = getattr(getattr(qparams, part)[name], leaf) + (1 if leaf == "lsbs" else 0.5)
    with pytest.raises(QuantizationError, match=f"{name}.*{leaf}"):
        fheq.lower(graph, edited(qparams, part, name, **{leaf: moved}))


def test_tables_of_absurd_widths_are_refused() -> None:
    """Before they take all memory."""
    graph, x = network()
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), 4)
    first = next(iter(qparams.accumulators))
    with pytest.raises(QuantizationError, match=rf"'r' would read 4\d bits of '{first}'"):
        fheq.lower(graph, edited(qparams, "accumulators", first, qmax=qparams.accumulators[first].qmax * 0 + 2.0**40))


def test_what_cannot_be_encrypted_is_refused_by_quantize() -> None:
    graph, x = network()
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), 4))
    for wrong in ((), (x, x), (x[:, :2],), (x * np.nan,), (x.astype(int),), (x[:0],)):
        with pytest.raises(DataError):
            program.quantize(*wrong)


def network() -> tuple[fheq.Graph, np.ndarray]:
    rng = np.random.default_rng(0)
    nodes = [
        node("MatMul", ["x", "w"], ["p"]),
        node("Add", ["p", "b"], ["h"]),  # so that none is at 0, where errors of float32 decide
        node("Tanh", ["h"], ["r"]),
        node("MatMul", ["r", "v"], ["y"]),
    ]
    known = {name: rng.normal(size=shape).astype(np.float32) for name, shape in (("w", (5, 6)), ("b", 6), ("v", (6, 4)))}
    return fheq.import_onnx(model(nodes, {"x": ["N", 5]}, ["y"], known)), rng.normal(size=(300, 5)).astype(np.float32)
