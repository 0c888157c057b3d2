"""Attribution: stages add up to the quantized model, and a quantizer made worse is the one that is named."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import prepared

import fheq
from fheq import Rounding, Spec, scores
from fheq.attribute import switch
from fheq.encryption.table_noise import draws, missed
from fheq.planning.plan import plan

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
GEMM = "gemm_with_alpha_beta_and_transposes"
SEVERAL = (
    GEMM,
    "concat_of_different_scales",
    "matmul_of_two_encrypted",
    "residual_with_different_scales",
    "results_added_to_the_residual_and_to_each_other",
)


def switched(graph: fheq.Graph, q: fheq.QParams, on: bool) -> fheq.QParams:
    parts = ("tensors", "weights", "accumulators")
    q = jax.tree.map(jnp.float32, q)
    return switch(plan(graph), q, {part: dict.fromkeys(getattr(q, part), jnp.asarray(on)) for part in parts})


@pytest.mark.parametrize("name", SEVERAL)
def test_all_off_is_the_float_model_and_all_on_the_quantized_one(name: str) -> None:
    """Float32 keeps 24 bits; a few layers lose some of them."""
    found = prepared(name)
    q = fheq.fit(found.graph, found.stats, Spec(4, rounding=Rounding(5)))
    exact = fheq.evaluate(found.graph, *found.data)
    nothing = fheq.fake_quant(found.graph, switched(found.graph, q, False), *found.data)
    np.testing.assert_allclose(nothing, exact, atol=2.0**-18 * np.max(np.abs(exact)))
    for a, b in zip(jax.tree.leaves(switched(found.graph, q, True)), jax.tree.leaves(q), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_the_last_stage_is_the_quantized_model() -> None:
    """And of quantizers that are off, a rounding that is on removes as much as in the quantized model."""
    found = prepared(GEMM)
    q = fheq.fit(found.graph, found.stats, Spec(4, rounding=Rounding(4)))
    labels = np.arange(len(found.data[0])) % 2
    result = fheq.attribute(found.graph, q, *found.data, scores={"accuracy": scores.accuracy}, targets=labels)
    exact, y = fheq.evaluate(found.graph, *found.data), np.asarray(fheq.fake_quant(found.graph, q, *found.data))
    wanted = 10 * np.log10(np.mean(exact**2) / np.mean((y - exact) ** 2))
    np.testing.assert_allclose(result.outputs[-2:], wanted, atol=0.1)  # at a p_error of 1e-5 no table misses here
    right = [np.mean(np.argmax(v, axis=1) == labels) for v in (exact, y)]
    np.testing.assert_allclose(result.scores["accuracy"][[0, -2]], right, atol=1.01 / len(labels))  # one tie
    assert result.outputs[0] > result.outputs[-2]
    parts = np.nansum(result.alone)  # independent noises add up, nearly
    assert abs(10 * np.log10(parts) + result.outputs[-1]) < 2 and result.alone[result.names.index("h"), 2] > 1e-4
    assert all(name in str(result) for name in (*result.names, "accuracy"))


@pytest.mark.parametrize(
    ("part", "name", "stage"), [("tensors", "x", 0), ("weights", "w2", 1), ("accumulators", "h", 2)], ids=str
)
def test_the_quantizer_that_was_made_coarse_is_named(part: str, name: str, stage: int) -> None:
    """Of quantizers of 10 bits, one is given steps 64 times as wide: noise as of 4 bits, far above all others."""
    found = prepared(GEMM)
    q = fheq.fit(found.graph, found.stats, Spec(10, accumulators=fheq.AccumulatorRange.WORST_CASE))
    key = next(k for k in getattr(q, part) if k.startswith(name))
    affine = getattr(q, part)[key]
    if part == "accumulators":
        worse = replace(affine, lsbs=np.log2(affine.qmax[0] + 1) - 4)
    else:
        worse = replace(affine, scale=affine.scale * 64, zero_point=np.round(affine.zero_point / 64))
    changed = replace(q, **{part: {**getattr(q, part), key: worse}})
    result = fheq.attribute(found.graph, changed, *found.data)
    row, column = np.unravel_index(np.nanargmax(result.alone), result.alone.shape)
    owner = {"tensors": "x", "weights": "y", "accumulators": "h"}[part]
    assert (result.names[row], column) == (owner, stage)
    assert result.alone[row, column] > 0.5 * np.nansum(result.alone)


def test_tables_that_miss_are_a_stage_and_miss_as_often_as_they_should() -> None:
    """Whole cells away, a binomial share of the time (5 standard deviations)."""
    found = prepared(GEMM)
    q = fheq.fit(found.graph, found.stats, Spec(5, rounding=Rounding(5)))
    p_error = 0.05
    result = fheq.attribute(found.graph, q, *found.data, p_error=p_error)
    row = result.alone[result.names.index("h")]
    assert row[3] > 1e-3 and result.outputs[3] < result.outputs[2] - 1
    assert np.isnan(result.alone[result.names.index("x"), 3])
    noise = fheq.table_noise(found.graph, q, p_error)
    layout = plan(found.graph)
    step = next(s for s in layout.steps if s.out == "h")
    many = jax.vmap(lambda key: missed(noise, draws(layout, key), step, jnp.zeros(step.shape)))(
        jax.random.split(jax.random.PRNGKey(1), 4000)
    )
    share = np.mean(np.asarray(many) != 0)
    deviation = np.sqrt(p_error * (1 - p_error) / many.size)
    assert abs(share - p_error) < 5 * deviation
    cells = np.asarray(many) / np.asarray(noise.width["h"])
    np.testing.assert_allclose(cells, np.round(cells), atol=1e-5)


def test_p_error_is_swept_as_any_leaf() -> None:
    found = prepared(GEMM)
    q = fheq.fit(found.graph, found.stats, Spec(6, rounding=Rounding(6)))
    chances = np.array([0.0, 1e-3, 1e-2, 1e-1])
    data = [np.tile(x, (50, *(1,) * (x.ndim - 1))) for x in found.data]  # so many that some tables miss at each of them
    noise = jax.vmap(lambda p: fheq.table_noise(found.graph, q, p))(chances)
    result = fheq.sweep(found.graph, fheq.stack([q] * 4), *data, scores={"snr": scores.snr}, noise=noise)
    quiet = fheq.sweep(found.graph, fheq.stack([q]), *data, scores={"snr": scores.snr})
    np.testing.assert_allclose(result.scores["snr"][0], quiet.scores["snr"][0], rtol=1e-5)
    assert np.all(np.diff(result.scores["snr"]) < 0)
    with pytest.raises(fheq.FheqError, match=r"noise\.deviation"):
        fheq.sweep(found.graph, fheq.stack([q] * 3), *found.data, scores={}, noise=noise)


@pytest.mark.parametrize("p_error", [-0.1, 1.5, np.nan, "a", {"h": 2.0}, {"h": 0.1, "nothing": 0.1}])
def test_probabilities_that_are_none_are_refused(p_error: Any) -> None:
    found = prepared(GEMM)
    q = fheq.fit(found.graph, found.stats, 4)
    unknown = isinstance(p_error, dict) and "nothing" in p_error
    with pytest.raises(fheq.FheqError, match="'nothing'.*there are 'h'" if unknown else "must be a probability"):
        fheq.table_noise(found.graph, q, p_error)
    if not isinstance(p_error, dict):
        with pytest.raises(ValueError, match="must be a probability"):
            fheq.attribute(found.graph, q, *found.data, p_error=p_error)


def test_it_is_plotted(tmp_path) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    found = prepared(GEMM)
    result = fheq.attribute(found.graph, fheq.fit(found.graph, found.stats, Spec(4, rounding=Rounding(4))), *found.data)
    ax = result.plot()
    assert [label.get_text() for label in ax.get_yticklabels()] == list(result.names)
    widths = np.array([[bar.get_width() for bar in bars] for bars in ax.containers])
    shares = np.nan_to_num(result.alone)
    ends = np.finfo(np.float64).eps * shares.sum(axis=1).max()  # a bar's width is the difference of its ends
    np.testing.assert_allclose(widths.T / 100, shares, rtol=1e-6, atol=2 * ends)
    ax.figure.savefig(tmp_path / "attribution.png")
