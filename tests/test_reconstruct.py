"""Reconstruction: the integer program comes nearer to the float model on data that it was not tuned on."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import onnx
import pytest
from build_models import model, node, tensor

import fheq
from fheq.digits import load
from fheq.errors import ArgumentError, QuantizationError
from fheq.fitting.accumulator_ranges import OUTSIDE
from fheq.integers.integer_weights import quantize_weight
from fheq.planning.plan import plan
from fheq.steps import Add, Linear

SPEC = fheq.Spec(3, rounding=fheq.Rounding(3, approximate=True))
TRAINING = fheq.Training(steps=150, batch_size=32)


@pytest.fixture(scope="module")
def fitted():
    graph, data = load()
    x = data["x_train"][:400]
    return graph, fheq.fit(graph, fheq.calibrate(graph, x), SPEC), x, data["x_test"]


def simulated(graph, qparams, x):
    program = fheq.lower(graph, qparams)
    return program.dequantize(fheq.simulate(program, *program.quantize(x)))[0]


def unexplained(y, exact):
    return np.mean((np.asarray(y) - exact) ** 2) / np.var(exact)


def test_the_integer_program_comes_nearer_to_the_float_model(fitted):
    graph, qparams, x, unseen = fitted
    exact = np.asarray(fheq.evaluate(graph, unseen))
    tuned = fheq.reconstruct(graph, qparams, x, key=jax.random.key(0), training=TRAINING)
    assert unexplained(simulated(*tuned, unseen), exact) < 0.8 * unexplained(simulated(graph, qparams, unseen), exact)


def test_what_calibration_left_free_of_accumulators_stays_free_for_unseen_data():
    """Of 64,000 values of a layer, ranges may miss `OUTSIDE` of them, one at most but by chance."""
    nodes = [
        node("MatMul", ["x", "a"], ["h"]),
        node("Relu", ["h"], ["r"]),
        node("MatMul", ["r", "b"], ["g"]),
        node("Relu", ["g"], ["s"]),
        node("MatMul", ["s", "c"], ["y"]),
    ]
    graph = fheq.import_onnx(
        model(nodes, {"x": ["N", 10]}, ["y"], {"a": tensor(10, 16), "b": tensor(16, 16), "c": tensor(16, 3)})
    )
    rng = np.random.default_rng(0)
    x, unseen = (rng.normal(size=(n, 10)).astype(np.float32) for n in (200, 4000))
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), SPEC)
    training = fheq.Training(steps=400, batch_size=32)
    tuned = fheq.reconstruct(graph, qparams, x, key=jax.random.key(0), p_error=1e-6, training=training)
    program = fheq.lower(*tuned)
    assert max(row.share for row in fheq.overflow(program, *program.quantize(unseen)).rows) < 10 * OUTSIDE


def encoder() -> onnx.ModelProto:
    """Attention between normalised tokens: sums of tensors that share their steps."""
    nodes = [
        node("LayerNormalization", ["x", "one", "none"], ["n"]),
        *(node("MatMul", ["n", w], [y]) for w, y in (("wq", "q"), ("wk", "k"), ("wv", "v"))),
        node("Transpose", ["k"], ["kt"], perm=[0, 2, 1]),
        node("MatMul", ["q", "kt"], ["scores"]),
        node("Softmax", ["scores"], ["p"]),
        node("MatMul", ["p", "v"], ["a"]),
        node("Add", ["x", "a"], ["s"]),
        node("MatMul", ["s", "w"], ["y"]),
    ]
    known = {"one": np.ones(8, np.float32), "none": np.zeros(8, np.float32), "w": tensor(8, 3)}
    return model(nodes, {"x": ["N", 3, 8]}, ["y"], {**known, **{name: tensor(8, 8) for name in ("wq", "wk", "wv")}})


def test_sums_of_tensors_that_share_their_steps_stay_sums() -> None:
    """Roots and logarithms of noisy values that leave their domain do not spoil it either."""
    graph, x = fheq.import_onnx(encoder()), np.random.default_rng(0).normal(size=(200, 3, 8)).astype(np.float32)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), fheq.Spec(5, rounding=fheq.Rounding(5)))
    training = fheq.Training(steps=100, batch_size=32)
    tuned = fheq.reconstruct(graph, qparams, x, key=jax.random.key(0), p_error=1e-6, training=training)
    exact = np.asarray(fheq.evaluate(graph, x))
    assert unexplained(simulated(*tuned, x), exact) < unexplained(simulated(graph, qparams, x), exact)
    layout, (_, learned) = plan(graph), tuned
    factors = {name: learned.tensors[name].scale / a.scale for name, a in qparams.tensors.items()}
    assert max(float(np.ptp(f)) for f in factors.values()) > 0
    for step in (s for s in layout.steps if isinstance(s, Add)):
        read = [np.unique(factors[o.key]) for o in step.operands if o.key in factors]
        assert all(np.array_equal(read[0], other) for other in read), step.out


def test_the_same_key_gives_the_same_weights_and_the_integers_are_those_of_fake_quantization(fitted):
    graph, qparams, x, unseen = fitted
    training = fheq.Training(steps=20, drop=0.5)
    one, two = (fheq.reconstruct(graph, qparams, x, key=jax.random.key(3), training=training) for _ in range(2))
    assert all(np.array_equal(one[0].constants[name], two[0].constants[name]) for name in one[0].constants)
    jax.tree.map(np.testing.assert_array_equal, one[1], two[1])
    fake, real = np.asarray(fheq.fake_quant(*one, unseen)), simulated(*one, unseen)
    # Float32 decides some ties otherwise than float64; elsewhere the outputs agree to float32's precision.
    assert np.mean(np.abs(fake - real) > 1e-4 * np.ptp(real)) < 0.05


def test_corrected_biases_give_channels_the_means_of_the_float_model(fitted):
    graph, qparams, x, _ = fitted
    exact = np.asarray(fheq.evaluate(graph, x)).mean(axis=0)
    shift = lambda g, q: np.abs(np.asarray(fheq.fake_quant(g, q, x)).mean(axis=0) - exact).max()
    # The outputs are not rounded: what is left is float32's.
    assert shift(*fheq.correct_biases(graph, qparams, x)) < 1e-3 * np.abs(exact).max() < shift(graph, qparams)


@pytest.mark.parametrize("granularity", list(fheq.Granularity))
def test_second_order_rounding_beats_rounding_to_nearest(fitted, granularity):
    graph, _, x, unseen = fitted
    spec = fheq.Spec({"op_inputs": 6, "op_weights": 3}, weights=granularity)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), spec)
    exact = np.asarray(fheq.evaluate(graph, unseen))
    rounded = fheq.round_weights(graph, qparams, x)
    assert unexplained(simulated(rounded, qparams, unseen), exact) < 0.9 * unexplained(
        simulated(graph, qparams, unseen), exact
    )


def test_second_order_rounding_takes_back_no_pruning(fitted):
    """Weights that make up for others' errors leave channels alone that a layer does not read: they would cost tables."""
    graph, _, x, _ = fitted
    pruned = fheq.prune(graph, x, tolerance=0.25)
    qparams = fheq.fit(pruned, fheq.calibrate(pruned, x), fheq.Spec(4, rounding=fheq.Rounding(4, approximate=True)))
    rounded = fheq.round_weights(pruned, qparams, x)
    tables = [sum(row.lookups for row in fheq.cost(fheq.lower(g, qparams)).rows) for g in (pruned, rounded)]
    assert tables[1] <= tables[0]


@pytest.mark.parametrize("block, alike", [(0, False), (1, True), (2, False)])
def test_a_block_is_tuned_for_its_own_results_alone(fitted, block, alike):
    graph, qparams, x, _ = fitted
    first, second, *_ = (step for step in plan(graph).steps if isinstance(step, Linear))
    later = qparams.weights[second.weight_name]
    coarse = replace(qparams, weights={**qparams.weights, second.weight_name: replace(later, scale=2 * later.scale)})
    training = fheq.Training(steps=5, block=block)
    one, two = (fheq.reconstruct(graph, q, x, key=jax.random.key(0), training=training)[0] for q in (qparams, coarse))
    assert np.array_equal(one.constants[first.weight_name], two.constants[first.weight_name]) == alike


def test_bits_and_roundings_stay(fitted):
    graph, qparams, x, _ = fitted
    _, tuned = fheq.reconstruct(graph, qparams, x, key=jax.random.key(0), training=fheq.Training(steps=2))
    for name, accumulator in qparams.accumulators.items():
        assert np.array_equal(tuned.accumulators[name].lsbs, accumulator.lsbs)
    for name, affine in qparams.tensors.items():
        assert np.array_equal(tuned.tensors[name].qmax, affine.qmax)


def test_adaptive_rounding_leaves_every_weight_beside_its_place(fitted):
    """Each is one of the two neighbours on its grid, some the further one, and the program comes nearer all the same."""
    graph, qparams, x, unseen = fitted
    training = replace(TRAINING, adaptive=True)
    tuned, moved = fheq.reconstruct(graph, qparams, x, key=jax.random.key(0), training=training)
    steps = {step.out: step for step in plan(graph).steps if isinstance(step, Linear)}
    further = 0
    for step in (s for s in plan(tuned).steps if isinstance(s, Linear)):
        before, after = (
            quantize_weight(plan(g), q, s).integers for g, q, s in ((graph, qparams, steps[step.out]), (tuned, moved, step))
        )
        assert np.max(np.abs(after - before)) <= 1
        further += int(np.sum(after != before))
    assert further > 0
    exact = np.asarray(fheq.evaluate(graph, unseen))
    assert unexplained(simulated(tuned, moved, unseen), exact) < unexplained(simulated(graph, qparams, unseen), exact)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        *((name, (0, -4, 2.5, True, "a", None)) for name in ("steps", "batch_size")),
        ("learning_rate", (0.0, -1.0, np.nan, np.inf, "a")),
        ("hints", (-1.0, np.nan, None)),
        ("drop", (-1.0, 1.0, 2.0, np.nan)),
        ("block", (-1, 1.5)),
    ],
)
def test_training_that_cannot_be_is_refused(name, values):
    for value in values:
        with pytest.raises(QuantizationError, match=rf"training\.{name}"):
            fheq.Training(**{name: value})


@pytest.mark.parametrize(("name", "values"), [("p_error", (-0.1, 2.0, np.nan, "a", None)), ("key", (0, None, np.zeros(3)))])
def test_probabilities_and_keys_that_are_none_are_refused(fitted, name, values):
    graph, qparams, x, _ = fitted
    for value in values:
        with pytest.raises(ArgumentError, match=name):
            fheq.reconstruct(graph, qparams, x, **{"key": jax.random.key(0), name: value})


@pytest.mark.parametrize("op", ["Flatten", "ReduceMax"])
def test_models_with_nothing_to_learn_are_left_as_they_are(op):
    graph = fheq.import_onnx(model([node(op, ["x"], ["y"])], {"x": ["N", 6]}, ["y"], {}))
    x = np.random.default_rng(0).normal(size=(100, 6)).astype(np.float32)
    qparams = fheq.fit(graph, fheq.calibrate(graph, x), SPEC)
    tuned = fheq.reconstruct(graph, qparams, x, key=jax.random.key(0), training=fheq.Training(steps=3, batch_size=8))
    np.testing.assert_array_equal(simulated(*tuned, x), simulated(graph, qparams, x))
