"""Noise in simulation, against the Gaussian's law and concrete's own simulation.

Rates are compared within 5 standard deviations of the binomial (or of two): a right program fails one in a million times.
"""

from __future__ import annotations

import jax
import numpy as np
import pytest
from build_models import model, node
from test_cost import calibrated, program

import fheq
from fheq.errors import ArgumentError
from fheq.form import form_of
from fheq.optimizer.noise import failure, quantile
from fheq.program import MatMul
from fheq.simulate import _simulate, element_spread

KEY = jax.random.key(0)
SIGMAS = 5


def data(built: fheq.IntProgram, samples: int, seed: int = 0) -> np.ndarray:
    (entry,) = built.inputs
    rng = np.random.default_rng(seed)
    return rng.integers(0, int(np.max(entry.affine.qmax)) + 1, size=(samples, *entry.shape))


def test_tables_fail_as_often_as_the_gaussian_says() -> None:
    """The rate at which exact cells are left, by samples of one table whose entries tell neighbours apart."""
    from fheq.encryption.failures import Ciphertexts

    built = program("mlp", "none")
    (lookup,) = built.lookups
    deviation, draws = 0.3, 200_000
    noise, inside = deviation * jax.random.normal(KEY, (draws,)), (1 << lookup.bits) // 2
    cells = np.asarray(Ciphertexts.cell(jax.numpy.full(draws, inside), 0, lookup.bits, noise)) - inside
    expected = failure(deviation**2, 0.25, 1.0)
    assert abs(np.mean(cells != 0) - expected) < SIGMAS * np.sqrt(expected / draws)
    assert set(np.unique(cells)) <= {-2, -1, 0, 1, 2}


@pytest.mark.parametrize("rounding", ["none", "approximate", "outputs", "exact"])
@pytest.mark.parametrize("p_error", [0.1, 1e-5])
def test_noise_is_within_its_bound_and_is_what_the_report_has(rounding: str, p_error: float) -> None:
    built = program("residual", rounding)
    found = fheq.noise(built, p_error)
    bound = 1 / (2 * quantile(p_error))
    assert found == fheq.cost(built, p_error).noise
    assert set(found.tables) == {t.args[0] for t in built.lookups}
    assert all(0 < v <= bound * (1 + 1e-9) for v in [*found.tables.values(), *found.outputs])


@pytest.mark.parametrize("kind, rounding", [("deep", "approximate"), ("average", "exact")])
def test_elements_that_add_up_less_have_less_noise(kind: str, rounding: str) -> None:
    """In proportion to the 2-norms of their weights."""
    built = program(kind, rounding)
    found = element_spread(built)
    (entry,) = built.outputs
    last = [i for i in built.instructions if isinstance(i, MatMul)][-1]
    norms = np.sum(last.weight.astype(float) ** 2, axis=0)
    np.testing.assert_allclose(found[entry.value][0], norms / np.max(norms), rtol=1e-6)
    assert len(set(norms)) > 1 and all(np.max(v) == 1 for v in found.values())


def test_keys_decide_and_samples_are_independent() -> None:
    built = program("mlp", "approximate")
    q = data(built, 100)
    noisy = lambda key, x: fheq.simulate(built, x, p_error=0.1, key=key)
    first = noisy(KEY, q)
    np.testing.assert_array_equal(first, noisy(KEY, q))
    np.testing.assert_array_equal(first, fheq.simulate(built, q, noise=fheq.noise(built, 0.1), key=KEY))
    np.testing.assert_array_equal(first[:7], noisy(KEY, q[:7]))  # whatever the size of the batch
    np.testing.assert_array_equal(noisy(jax.random.PRNGKey(3), q), noisy(jax.random.PRNGKey(3), q))
    assert np.any(first != noisy(jax.random.key(1), q))
    same = noisy(KEY, np.repeat(q[:1], 100, axis=0))
    assert len(np.unique(same, axis=0)) > 1


def test_other_noise_compiles_nothing() -> None:
    built = program("mlp", "approximate")
    q = data(built, 10)
    fheq.simulate(built, q, p_error=0.1, key=KEY)
    form, _ = form_of(built, noisy=True)
    before = _simulate.compiled(form)._cache_size()
    for p_error in (1e-2, 1e-3, 2.0**-40):
        fheq.simulate(built, q, p_error=p_error, key=jax.random.key(5))
    assert _simulate.compiled(form)._cache_size() == before > 0


@pytest.mark.parametrize(
    "kind, rounding", [("deep", "approximate"), ("average", "outputs"), ("max", "approximate"), ("product", "approximate")]
)
def test_programs_of_one_form_are_compiled_once(kind: str, rounding: str) -> None:
    """What is compiled for one program takes nothing but its form into another's."""
    first, second = (program(kind, rounding, n_bits) for n_bits in (3, 5))
    both = lambda built, q: (fheq.simulate(built, q), fheq.simulate(built, q, p_error=0.1, key=KEY))
    q = data(second, 50)
    _simulate.compiled.cache_clear()
    alone = both(second, q)
    _simulate.compiled.cache_clear()
    both(first, data(first, 50))
    after = both(second, q)
    for a, b in zip(alone, after, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.any(alone[0] != alone[1])
    for noisy in (False, True):
        assert form_of(first, noisy)[0] == form_of(second, noisy)[0]
        assert _simulate.compiled(form_of(second, noisy)[0])._cache_size() == 1


@pytest.mark.parametrize("kind, rounding", [("mlp", "none"), ("residual", "exact")])
def test_without_failures_nothing_changes(kind: str, rounding: str) -> None:
    """Every channel's offset brings it into its width in the padding too: clear and encrypted runs agree."""
    built = program(kind, rounding)
    graph, _ = calibrated(kind)
    q = built.quantize(np.random.default_rng(9).normal(size=(100, *graph.inputs[0].type.shape[1:])).astype(np.float32))
    assert all(row.share == 0 for row in fheq.overflow(built, *q).rows)
    np.testing.assert_array_equal(fheq.simulate(built, *q), fheq.simulate(built, *q, p_error=1e-12, key=KEY))


@pytest.mark.parametrize("rounding, p_error", [("approximate", 0.1), ("outputs", 0.1), ("exact", 1e-5)])
def test_concretes_simulation_errs_as_often(rounding: str, p_error: float) -> None:
    """Out-of-range inputs of accumulators included: the data fill the inputs' ranges. Outputs of a sample are not
    independent, so samples are counted."""
    built = program("mlp", rounding)
    q = data(built, 60)
    exact = fheq.simulate(built, q)
    ours = fheq.simulate(built, q, p_error=p_error, key=KEY)
    theirs = fheq.compile(built, p_error=p_error).simulate(q, quantized=True)
    rates = [np.mean(np.any(got != exact, axis=1)) for got in (ours, theirs)]
    spread = np.sqrt(2 * max(rates[0] * (1 - rates[0]), 1 / len(q)) / len(q))
    assert abs(rates[0] - rates[1]) <= SIGMAS * spread


@pytest.mark.parametrize("rounding", ["none", "approximate"])
def test_overflow_is_counted_and_certified(rounding: str) -> None:
    """Against integer products: random data, and the inputs that drive an accumulator to its ends."""
    built = program("residual", rounding, 2)
    weight, amount = built.instructions[0].weight, built.instructions[1].amount
    (entry,) = built.inputs
    ends = [np.where(sign * weight.T > 0, entry.affine.qmax, entry.affine.qmin) for sign in (1, -1)]
    q = np.concatenate([data(built, 300), *ends]).astype(int)
    known = built.accumulators["m1"]
    read = (q @ weight + amount) % (2 << known.bits)
    outside = read >= (1 << known.bits) - (1 << known.lsbs >> 1)
    row = fheq.overflow(built, q).rows[0]
    assert row.share == np.mean(outside)
    assert row.certified == (not np.any(outside)) == (rounding == "none")


@pytest.mark.parametrize("options", [{"p_error": 0.1}, {"key": KEY}, {"p_error": 2.0, "key": KEY}])
def test_bad_options(options: dict) -> None:
    built = program("mlp", "approximate")
    with pytest.raises(ArgumentError, match="p_error"):
        fheq.simulate(built, data(built, 2), **options)


def test_tables_that_are_merged_into_products_are_not_counted():
    """A product with a bit reads the number beside the bit, in more bits than the product has."""
    nodes = [node("Relu", ["x"], ["r"]), node("Mul", ["r", "m"], ["p"]), node("Tanh", ["p"], ["a"])]
    nodes += [node("MatMul", ["a", "w"], ["y"])]
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 4], "m": ["N", 4]}, ["y"], {"w": np.ones((4, 2), np.float32)}))
    rng = np.random.default_rng(0)
    arrays = rng.normal(size=(200, 4)).astype(np.float32), (rng.random((200, 4)) < 0.6).astype(np.float32)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, *arrays), 8))
    assert len(program.lookups) == 2  # of the activation, and of the product with what follows
    assert all(row.share == 0 for row in fheq.overflow(program, *program.quantize(*arrays)).rows)


@pytest.mark.parametrize(("kind", "rounding"), [("residual", "none"), ("mlp", "exact")])
def test_noise_and_keys_that_do_not_fit_are_refused(kind: str, rounding: str) -> None:
    built = program("mlp", "none")
    other = fheq.noise(program(kind, rounding), 0.1)
    with pytest.raises(fheq.FheqError, match="noise is of another program"):
        fheq.simulate(program("residual", "exact"), data(program("residual", "exact"), 2), noise=other, key=KEY)
    for key in (0, "a", np.zeros(3)):
        with pytest.raises(ArgumentError, match="key must be"):
            fheq.simulate(built, data(built, 2), p_error=0.1, key=key)
