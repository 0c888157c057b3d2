"""Sweeps: what the vectorised evaluation gives is what a loop over configurations gives, from one compiled function."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import as_tuple, prepared
from sklearn import metrics

import fheq
from fheq import Rounding, Score, Spec, scores
from fheq.errors import DataError

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
GEMM = "gemm_with_alpha_beta_and_transposes"
SEVERAL = (GEMM, "conv2d_group_stride_dilation_uneven_pad", "concat_of_different_scales", "two_inputs_and_three_outputs")


def fitted(name: str, specs: list[Spec]) -> list[fheq.QParams]:
    return [fheq.fit(prepared(name).graph, prepared(name).stats, spec) for spec in specs]


SPECS = fheq.grid(n_bits=(3, 5, 8), rounding=(None, Rounding(4), Rounding(5, approximate=True)))


@pytest.mark.parametrize(("name", "chunk"), [(GEMM, 1), (GEMM, 4), *((name, 64) for name in SEVERAL)])
def test_a_sweep_is_a_loop(name: str, chunk: int) -> None:
    """Averages over samples, whatever the chunks and blocks; ties that float32 decides otherwise move single samples."""
    found = prepared(name)
    each = fitted(name, SPECS)
    result = fheq.sweep(found.graph, fheq.stack(each), *found.data, scores={"mse": scores.mse}, chunk=chunk, batch_size=37)
    exact = as_tuple(fheq.evaluate(found.graph, *found.data))
    for swept, i in zip(jax.tree.leaves(result.scores["mse"]), range(len(exact)), strict=True):
        loop = [np.mean((as_tuple(fheq.fake_quant(found.graph, q, *found.data))[i] - exact[i]) ** 2) for q in each]
        np.testing.assert_allclose(swept, loop, rtol=0.03, atol=1e-7 * np.ptp(exact[i]) ** 2)


def test_one_compilation_serves_every_value() -> None:
    found = prepared(GEMM)
    traced = []

    def measure(y: jax.Array, exact: jax.Array, target: None) -> jax.Array:
        traced.append(y)  # Python runs it while a sweep is compiled, and not again
        return scores.agreement(y, exact, target)

    run = lambda q: fheq.sweep(found.graph, q, *found.data, scores={"agreement": measure}, chunk=4)
    run(fheq.stack(fitted(GEMM, SPECS)))
    once = len(traced)
    assert once
    run(fheq.stack(fitted(GEMM, fheq.grid(observer=(fheq.MinMax(), fheq.Percentile(99.0)), margin=(0.1, 0.2, 0.3)))))
    run(jax.vmap(lambda factor: jax.tree.map(lambda v: jnp.float32(v) * factor, fitted(GEMM, SPECS)[0]))(jnp.arange(1.0, 9)))
    assert len(traced) == once


def test_edits_are_mapped_over_to_make_configurations() -> None:
    """One leaf swept by `jax.vmap`, the others repeated: removing low bits costs more the more are removed."""
    found = prepared(GEMM)
    (q,) = fitted(GEMM, [Spec(6)])
    (name,) = (key for key, a in q.accumulators.items() if key in ("h",))

    def edit(lsbs: jax.Array) -> fheq.QParams:
        return replace(q, accumulators={**q.accumulators, name: replace(q.accumulators[name], lsbs=lsbs)})

    lsbs = np.arange(0, 12, 2)
    result = fheq.sweep(found.graph, jax.vmap(edit)(lsbs), *found.data, scores={"snr": scores.snr, "r2": scores.r2_to_float})
    snr = result.scores["snr"]  # what two bits cost is lost among the errors of other quantizers
    assert np.all(np.diff(snr[2:]) < 0) and np.all(snr[:2] > snr[3]) and result.scores["snr"][0] > 20
    rows = result.rows(lsbs=lsbs)
    assert [row["lsbs"] for row in rows] == list(lsbs) and rows[0]["r2"] == result.scores["r2"][0]
    assert len(result.table(lsbs=lsbs).splitlines()) == len(lsbs) + 2


def test_scores_are_those_of_scikit_learn() -> None:
    found = prepared(GEMM)
    each = fitted(GEMM, fheq.grid(n_bits=(2, 4)))
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, len(found.data[0]))
    values = fheq.evaluate(found.graph, *found.data) + rng.normal(size=(len(labels), 2))
    y = [np.asarray(fheq.fake_quant(found.graph, q, *found.data)) for q in each]
    measures = {"accuracy": lambda y, exact, target: scores.accuracy(y, exact, target["label"])}
    measures["r2"] = scores.r2.of(lambda y, exact, target: (y, exact, target["value"]))
    measures["own r2"] = Score(lambda y, exact, target: scores.r2.measure(y, exact, target["value"]), scores.r2.finish)
    targets = {"label": labels, "value": np.asarray(values)}
    result = fheq.sweep(found.graph, fheq.stack(each), *found.data, scores=measures, targets=targets)
    wanted = [metrics.accuracy_score(labels, v.argmax(1)) for v in y]
    np.testing.assert_allclose(result.scores["accuracy"], wanted, atol=1.01 / len(labels))  # one tie
    wanted = [metrics.r2_score(values, v, multioutput="variance_weighted") for v in y]
    for name in ("r2", "own r2"):
        np.testing.assert_allclose(result.scores[name], wanted, rtol=1e-2)


@pytest.mark.parametrize("mean", [0.0, 1e5])
def test_r2_does_not_cancel_far_from_zero(mean: float) -> None:
    """Float32 outputs of that mean are 2^-7 apart, a hundredth of their spread."""
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(400, 5)).astype(np.float32), rng.normal(size=(5, 2)).astype(np.float32)
    graph = fheq.from_jax(lambda v: jnp.maximum(v, 0) @ weight + np.float32(mean), x)
    each = fheq.fit_each(graph, fheq.calibrate(graph, x), fheq.grid(n_bits=(3, 5)))
    exact = np.asarray(fheq.evaluate(graph, x), np.float64)
    measures = {"r2": scores.r2, "r2_to_float": scores.r2_to_float}
    result = fheq.sweep(graph, fheq.stack(each), x, scores=measures, targets=exact, batch_size=150)
    y = [np.asarray(fheq.fake_quant(graph, q, x), np.float64) for q in each]
    wanted = [metrics.r2_score(exact, v, multioutput="variance_weighted") for v in y]
    assert 0.5 < wanted[0] < wanted[1]
    for found in result.scores.values():
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    staged = fheq.attribute(graph, each[0], x, scores=measures, targets=exact)
    np.testing.assert_allclose([v[-1] for v in staged.scores.values()], wanted[0], atol=1e-3)


def test_several_outputs_are_scored_together() -> None:
    """Numbers, labels, decisions and an output that never varies."""
    rng = np.random.default_rng(0)
    exact = rng.normal(size=(50, 2)).astype(np.float32), rng.integers(0, 3, (50, 1)), rng.random(50) < 0.5, np.ones((50, 1))
    y = exact[0] + 0.1, np.roll(exact[1], 1, axis=0), ~exact[2], np.ones((50, 1))
    means = jax.tree.map(lambda v: v.mean(axis=0), jax.vmap(scores.r2_to_float.measure, (0, 0, None))(y, exact, None))
    flat = [tuple(np.asarray(v, float).reshape(50, -1) for v in pair) for pair in zip(exact, y)]
    wanted = np.mean([metrics.r2_score(*pair, multioutput="variance_weighted") for pair in flat])
    np.testing.assert_allclose(scores.r2_to_float.finish(means), wanted, rtol=1e-4)
    with pytest.raises(fheq.FheqError, match="the model has 4"):
        scores.agreement(y, exact, None)


def test_tensors_inside_the_model_are_scored_by_name() -> None:
    found = prepared(GEMM)
    result = fheq.sweep(
        found.graph,
        fheq.stack(fitted(GEMM, [Spec(4), Spec(8)])),
        *found.data,
        scores={"snr": scores.snr},
        tensors=["h", "s"],
    )
    assert set(result.scores["snr"]) == {"h", "s"}
    for value in result.scores["snr"].values():
        assert value[1] > value[0] + 12  # four bits more are 24 dB, of which clipping and other layers take some
    with pytest.raises(fheq.FheqError, match="'nothing'"):
        fheq.sweep(found.graph, fheq.stack(fitted(GEMM, [Spec(4)])), *found.data, scores={}, tensors=["nothing"])


def test_what_does_not_fit_is_refused() -> None:
    found = prepared(GEMM)
    (q,) = fitted(GEMM, [Spec(4)])
    with pytest.raises(fheq.FheqError, match="leading axis"):
        fheq.sweep(found.graph, q, *found.data, scores={})
    with pytest.raises(fheq.FheqError, match="granularity"):
        fheq.stack(fitted(GEMM, [Spec(4), Spec(4, activations=fheq.Granularity.PER_TENSOR)]))
    with pytest.raises(fheq.FheqError, match="at least one"):
        fheq.stack([])
    with pytest.raises(fheq.FheqError, match="targets"):
        fheq.sweep(found.graph, fheq.stack([q]), *found.data, scores={}, targets=np.zeros(3))
    count = len(found.data[0])
    for wrong in (
        *({"chunk": 0}, {"chunk": 2.5}, {"chunk": True}, {"batch_size": -1}),
        *({"scores": {}}, {"scores": [scores.mse]}, {"scores": scores.mse}, {"tensors": "h"}, {"tensors": []}),
        *({"targets": np.array(["a"] * count)}, {"targets": np.full(count, np.nan)}, {"targets": {"a": [np.inf] * count}}),
    ):
        with pytest.raises(DataError, match=next(iter(wrong))):
            fheq.sweep(found.graph, fheq.stack([q]), *found.data, **{"scores": {"one": lambda y, _, t: 1.0}, **wrong})
    for wrong in (1.0, "mse"):
        with pytest.raises(DataError, match="must be a function"):
            fheq.sweep(found.graph, fheq.stack([q]), *found.data, scores={"one": wrong})
    with pytest.raises(DataError, match="give class numbers"):
        one_hot = np.eye(2)[np.arange(count) % 2]
        fheq.sweep(found.graph, fheq.stack([q]), *found.data, scores={"accuracy": scores.accuracy}, targets=one_hot)
    with pytest.raises(fheq.FheqError, match="no field"):
        fheq.grid(bits=(2, 3))
    mixed = fheq.stack(fitted(GEMM, [Spec(4, rounding=Rounding(4)), Spec(4, rounding=Rounding(4, approximate=True))]))
    with pytest.raises(fheq.FheqError, match="mixed"):
        fheq.lower(found.graph, jax.tree.map(lambda v: v[0], mixed))


def test_noise_is_that_of_the_failure_probability() -> None:
    """Errors of a noisy sweep are those of noisy simulation, configuration by configuration.

    Sweeps take every layer's noise at its bound, which simulated noise reaches in the layer that bounds it alone.
    """
    found = prepared(GEMM)
    spec = Spec(4, rounding=Rounding(4, approximate=True))
    qparams, p_errors = fheq.fit(found.graph, found.stats, spec), [1e-9, 0.1, 0.3, 0.6]
    program, stacked = fheq.lower(found.graph, qparams), fheq.stack([qparams] * len(p_errors))
    noise = jax.vmap(partial(fheq.table_noise, found.graph))(stacked, jnp.asarray(p_errors))
    swept = fheq.sweep(found.graph, stacked, *found.data, scores={"mse": scores.mse}, noise=noise).scores["mse"]
    exact = np.asarray(fheq.evaluate(found.graph, *found.data))
    q = program.quantize(*found.data)
    noisy = [fheq.simulate(program, *q, p_error=p, key=jax.random.key(1)) for p in p_errors]
    simulated = np.asarray([np.mean((program.dequantize(y)[0] - exact) ** 2) for y in noisy])
    assert np.all(np.diff(swept) > 0) and np.all(np.diff(simulated) > 0)
    assert np.all(swept > 0.5 * simulated) and np.all(swept < 2 * simulated)


def test_many_fits_at_once_are_those_of_each_spec() -> None:
    graph, stats = prepared(SEVERAL[1]).graph, prepared(SEVERAL[1]).stats
    specs = fheq.grid(n_bits=(3, 6), rounding=(None, fheq.Rounding(4), fheq.Rounding(5)), margin=(0.1, 0.3))
    for spec, found in zip(specs, fheq.fit_each(graph, stats, specs), strict=True):
        assert jax.tree.all(jax.tree.map(np.array_equal, found, fheq.fit(graph, stats, spec)))
