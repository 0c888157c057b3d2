"""The search: a front that can be trusted, resumed and repeated."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fheq
from fheq.digits import load
from fheq.errors import ArgumentError, QuantizationError
from fheq.fit import fit_each
from fheq.scores import accuracy, as_score, kl, mse, noise_to_signal, r2, r2_to_float
from fheq.searching import memory
from fheq.searching.allocate import Change, allocations
from fheq.searching.front import spaced, undominated
from fheq.searching.judge import Candidate, Judge

SPACE = fheq.Space(
    tolerances=(0.0, 0.3),
    rounding_bits=(3, 5),
    weight_bits=(5,),
    spare_bits=(0,),
    p_errors=(0.1,),
    finalists=4,
    reconstructions=1,
    trainings=(fheq.Training(steps=20),),
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    graph, data = load()
    x, y = data["x_train"][:200], data["y_train"][:200]
    folder = tmp_path_factory.mktemp("search")
    run = lambda key=0, **options: fheq.search(graph, x, key=jax.random.key(key), space=SPACE, **options)
    return run, run(folder=folder), folder, (graph, x, y)


def test_dearer_points_are_better_and_their_costs_are_those_of_their_programs(found):
    front = found[1]
    costs, scores = [p.complexity for p in front.points], [p.score for p in front.points]
    assert len(front) > 1 and costs == sorted(costs) and scores == sorted(scores)
    for point in front.points:
        assert fheq.cost(point.program, p_error=point.p_error).complexity == pytest.approx(point.complexity)
        again = fheq.lower(point.graph, point.qparams)
        assert fheq.cost(again, p_error=point.p_error).complexity == pytest.approx(point.complexity)
    assert "score" in str(front) and len(str(front).splitlines()) == len(front) + 2


def test_points_are_chosen_by_score_or_budget(found):
    front = found[1]
    assert front.cheapest(front[1].score) is front[1]
    assert front.best(front[0].complexity) is front[0]
    with pytest.raises(fheq.FheqError, match="no point reaches"):
        front.cheapest(2.0)
    with pytest.raises(fheq.FheqError, match="no point costs"):
        front.best(1.0)


def test_a_stopped_run_goes_on_and_gives_the_same_answer(found, monkeypatch):
    run, front, folder, _ = found
    monkeypatch.setattr(sys.modules["fheq.search"], "tune", lambda *a, **k: pytest.fail("reconstructed again"))
    monkeypatch.setattr(sys.modules["fheq.searching.judge"], "simulate", lambda *a, **k: pytest.fail("simulated again"))
    resumed = run(folder=folder)
    assert [(p.complexity, p.score, p.settings) for p in resumed.points] == [
        (p.complexity, p.score, p.settings) for p in front.points
    ]


def test_a_folder_of_another_search_is_refused(found):
    run, _, folder, _ = found
    for other in ({"key": 1}, {"score": lambda y, exact, target: -jnp.sum((y - exact) ** 2)}):
        with pytest.raises(fheq.FheqError, match="another model"):
            run(folder=folder, **other)


def test_a_budget_is_kept_and_an_impossible_one_is_refused(found):
    run, front, folder, _ = found
    within = run(budget=front[0].complexity * 1.01, folder=folder)
    assert max(p.complexity for p in within.points) <= front[0].complexity * 1.01
    with pytest.raises(fheq.FheqError, match="at most"):
        run(budget=1.0, folder=folder)


def test_the_front_is_confirmed_by_compiling(found):
    front = found[1]
    few = fheq.Front(front.points[:2], front.float_score)
    compiled = few.compiled(executor=ThreadPoolExecutor(1))
    for point, before in zip(compiled.points, few.points, strict=True):
        assert before.compiled is None and point.compiled == pytest.approx(point.complexity, rel=0.03)
    assert "compiled" in str(compiled) and "compiled" not in str(few)


def test_own_scores_have_targets(found):
    run, _, _, (_, _, y) = found
    front = run(score=accuracy, targets=y, target=0.5)
    assert 0 <= front[0].score <= 1 and front.float_score > 0.9


@pytest.mark.parametrize(
    ("samples", "options", "message"),
    [
        (40, {"score": accuracy}, "compares with targets"),
        (40, {"score": accuracy, "targets": np.zeros(30)}, "must have 40 samples"),
        (40, {"score": lambda y, exact, target: y - exact}, r"one number, and this one is \(10,\)"),
        (40, {"score": lambda y, exact, target: {"a": jnp.mean(y)}}, "one number, and this one is {'a'"),
        (40, {"score": lambda y, exact, target: jnp.nan}, "finite"),
        (40, {"score": "r2"}, "must be a function"),
        *((40, {"score": error}, "must be high when outputs are good") for error in (mse, kl, noise_to_signal)),
        (40, {"score": r2, "targets": np.full((40, 10), np.nan)}, "targets contains NaN"),
        (40, {"score": accuracy, "targets": np.eye(10)[np.arange(40) % 10]}, "give class numbers"),
        (40, {"space": replace(SPACE, rounding_bits=())}, "no quantization to try"),
        (4, {}, "less than 2 to score"),
    ],
)
def test_scores_that_cannot_be_computed_are_refused(samples, options, message):
    graph, data = load()
    with pytest.raises(fheq.FheqError, match=message):
        fheq.search(graph, data["x_train"][:samples], key=jax.random.key(0), **{"space": SPACE, **options})


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("finalists", (0, -1, 2.5, None)),
        ("reconstructions", (-1, 1.5)),
        ("p_errors", (0.1, (0.0,), (1.0,), (np.nan,), "a", ("a",))),
        ("rounding_bits", (5, (1,), (9,), (5.5,), None)),
        ("weight_bits", (5, (0,), (25,), (True,))),
        ("spare_bits", (0, (0.5,))),
        ("input_bits", (0, 25, "a")),
        ("output_bits", (0, 9, 6.5)),
        ("tolerances", (0.1, (-0.1,), (np.nan,))),
        ("approximate", (True, ("yes",))),
        ("trainings", (fheq.Training(), (20,))),
        ("held_out", (0.0, 1.0, np.nan)),
        ("spec", (5,)),
    ],
)
def test_spaces_that_cannot_be_are_refused(name, values):
    for value in values:
        with pytest.raises(QuantizationError, match=rf"space\.{name}"):
            fheq.Space(**{name: value})


@pytest.mark.parametrize("key", [0, None, "a"])
def test_keys_that_are_none_are_refused(key):
    graph, data = load()
    with pytest.raises(ArgumentError, match="key"):
        fheq.search(graph, data["x_train"][:40], key=key, space=SPACE)


def test_candidates_are_spread_over_what_their_scores_miss():
    """A tenth of the loss is as far from a hundredth as one is from a tenth; what nobody would want is left out."""
    scores = [-3.0, -1.0, 0.3, *(1 - np.logspace(-0.5, -2.5, 41))]
    chosen = spaced(scores, 1.0, np.linspace(0, 1, 5))
    np.testing.assert_allclose(np.log10(1 - np.asarray(scores)[chosen]), [-0.155, -0.75, -1.35, -1.9, -2.5], atol=0.06)
    assert spaced([0.5, 0.9, 1.1], 1.0, np.linspace(0, 1, 3))[-1] == 2, "some quantized models beat the float one"
    assert spaced([0.5], 1.0, np.array([0.5])) == [0]
    assert spaced([1.0], 1.0, np.array([0.5])) == [0]


def test_damaged_results_are_named(tmp_path):
    kept = memory.Memory(tmp_path / "one", "a")
    kept.arrays("x", lambda: {"y": np.zeros(3)})
    (file,) = (tmp_path / "one").glob("*.npz")
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(fheq.FheqError, match=f"{file.name}' is damaged"):
        kept.arrays("x", dict)
    (tmp_path / "one" / memory.RESULTS).write_text("{}\n{'x'\n{}\n")
    with pytest.raises(fheq.FheqError, match=f"{memory.RESULTS} in .*one' is damaged"):
        memory.Memory(tmp_path / "one", "a")
    with pytest.raises(fheq.FheqError, match="is a file"):
        memory.Memory(file, "a")


def test_results_are_whole_or_absent(tmp_path):
    kept = memory.Memory(tmp_path, "a")
    with pytest.raises(ZeroDivisionError):
        kept.value("x", lambda: 1 / 0)
    assert kept.value("y", lambda: 2) == 2
    kept.value("z", lambda: 3)
    path = tmp_path / memory.RESULTS
    path.write_bytes(path.read_bytes()[:-2])  # stopped while it was written
    resumed = memory.Memory(tmp_path, "a")
    assert resumed.values == {"fingerprint": "a", "y": 2}
    assert resumed.value("z", lambda: 4) == 4
    assert memory.Memory(tmp_path, "a").values == {"fingerprint": "a", "y": 2, "z": 4}


def test_costs_that_are_not_predicted_leave_the_front_as_it_is():
    """Against the front of all candidates' costs."""
    graph, data = load()
    x = data["x_train"][:200]
    space = fheq.Space(weight_bits=(5, 8), spare_bits=(0,))
    judge = Judge(graph, (x,), jax.random.key(0), as_score(r2_to_float), None, space, None, False)
    stats, specs = fheq.calibrate(graph, *judge.data), space.specs()
    pairs = list(zip(specs, fit_each(graph, stats, specs), strict=True))
    candidates = [Candidate(str(n), p, graph, stats, s, q) for n, (s, q) in enumerate(pairs) for p in space.p_errors]
    every, few = judge.swept(candidates), judge.rivals(candidates, [])
    front = lambda pool: [pool[i] for i in undominated([c.complexity for c in pool], [c.score for c in pool])]
    assert [(c.score, c.complexity) for c in front(few)] == [(c.score, c.complexity) for c in front(every)]
    assert len(few) < 0.9 * len(every)


def test_allocations_are_the_best_sets_for_their_cost():
    """Against all subsets, where effects add up."""
    rng = np.random.default_rng(0)
    changes = [Change(layer, table_bits=bits) for layer in "abcd" for bits in (3, 5)]
    costs = np.where([c.table_bits == 3 for c in changes], -1, 1) * rng.uniform(1, 3, len(changes))
    losses = -np.sign(costs) * rng.uniform(0, 1, len(changes))
    every = [()]
    for layer in "abcd":
        every = [(*s, *extra) for s in every for extra in [(), *((i,) for i, c in enumerate(changes) if c.layer == layer)]]
    total = {s: (sum(costs[i] for i in s), sum(losses[i] for i in s)) for s in every}
    for chosen in allocations(changes, losses, costs):
        cost, loss = total[tuple(sorted(changes.index(c) for c in chosen))]
        assert loss <= min(other for c, other in total.values() if c <= cost) + 1e-9
