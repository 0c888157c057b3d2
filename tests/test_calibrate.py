"""Statistics are a monoid, whatever the batches; they agree with numpy; bad data are refused by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import reduce
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from build_models import model, node
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental import enable_x64
from models import prepared, weights

import fheq
from fheq.calibrate import FEW_SAMPLES, TILE, CalibrationWarning, _observe
from fheq.digits import load
from fheq.errors import DataError
from fheq.observing.statistics import PARTS, TensorStats, bin_of, centres, init, merge, per_tensor, update

quiet = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
RNG = np.random.default_rng(0)
NOISY = (RNG.normal(size=(TILE + 45, 4)) * [1, 10, 0.1, 3] + [0, 5, 0, -40]).astype(np.float32)
X = np.round(NOISY * 16) / 16  # with weights like these, float32 is exact in any order: laws hold to the last bit
W = np.round(weights(4, 3) * 16) / 16
RESOLUTION = 1 / 16  # the widest bin relative to its lower edge


@pytest.fixture(scope="module")
def graph() -> fheq.Graph:
    nodes = [node("Gemm", ["x", "w"], ["h"]), node("Relu", ["h"], ["r"]), node("Gemm", ["r", "v"], ["y"])]
    return fheq.import_onnx(model(nodes, {"x": ["N", 4]}, ["y"], {"w": W, "v": np.round(weights(3, 2) * 16) / 16}))


@pytest.fixture(scope="module")
def stats(graph: fheq.Graph) -> dict[str, TensorStats]:
    return fheq.calibrate(graph, X)


def assert_same(a: TensorStats, b: TensorStats) -> None:
    """Equal but for the order in which float64 moments were summed: n terms differ by at most n * 2^-52 of their sum of
    magnitudes (itself below sqrt(n * squares))."""
    for name in ("count", "minimum", "maximum", "histogram"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    n = np.maximum(a.count, 1)
    magnitude = np.sqrt(n * np.asarray(a.squares))
    assert np.all(np.abs(a.total - b.total) <= n * 2.0**-52 * magnitude)
    assert np.all(np.abs(a.squares - b.squares) <= n * 2.0**-52 * np.asarray(a.squares))


def assert_all_same(a: dict[str, TensorStats], b: dict[str, TensorStats]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert_same(a[name], b[name])


ROWS_AT_ONCE = 8
UPDATE = jax.jit(update)


def updated(stats: TensorStats, values: np.ndarray) -> TensorStats:
    """By few rows at once, the last ones masked: one compilation for any number."""
    with enable_x64():
        for start in range(0, len(values), ROWS_AT_ONCE):
            rows = values[start : start + ROWS_AT_ONCE]
            padded = np.resize(rows, (ROWS_AT_ONCE, *rows.shape[1:]))
            stats = UPDATE(stats, padded, np.arange(ROWS_AT_ONCE) < len(rows))
        return jax.tree.map(np.asarray, stats)


# The monoid

ROWS = st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4), min_size=1, max_size=4)


@settings(max_examples=30)
@given(ROWS, ROWS)
def test_merging_is_updating_with_both(a: list[list[float]], b: list[list[float]]) -> None:
    left, right = (np.float32(rows).reshape(-1, 2, 2) for rows in (a, b))
    both = updated(init(2), np.concatenate([left, right]))
    assert_same(merge(updated(init(2), left), updated(init(2), right)), both)
    assert_same(updated(updated(init(2), left), right), both)
    assert_same(merge(init(2), both), both)


def test_one_channel_of_all_is_the_merge_of_the_channels() -> None:
    values = np.float32(RNG.normal(size=(9, 3, 4)))
    assert_same(per_tensor(updated(init(3), values)), updated(init(1), values.reshape(9, 1, 12)))


def test_masked_samples_count_for_nothing() -> None:
    values = np.float32(RNG.normal(size=(6, 2, 3)))
    keep = np.array([1, 0, 1, 1, 0, 0], bool)
    with enable_x64():
        masked = UPDATE(init(2), values, keep)
    assert_same(jax.tree.map(np.asarray, masked), updated(init(2), values[keep]))


# Batches


@quiet
@pytest.mark.parametrize("batch_size", [1, 7, 32, 1000])
def test_the_batch_size_changes_nothing(graph: fheq.Graph, stats: dict[str, TensorStats], batch_size: int) -> None:
    assert_all_same(fheq.calibrate(graph, X, batch_size=batch_size), stats)


@quiet
def test_the_order_of_samples_changes_nothing(graph: fheq.Graph, stats: dict[str, TensorStats]) -> None:
    assert_all_same(fheq.calibrate(graph, X[np.random.default_rng(1).permutation(len(X))]), stats)


@quiet
def test_no_order_and_no_batches_change_what_any_floats_give() -> None:
    """Neither extremes nor histograms of a trained convolutional network, to the last bit."""
    graph, data = load()
    x = data["x_train"][:700]
    stats = fheq.calibrate(graph, x)
    shuffled = x[np.random.default_rng(2).permutation(len(x))]
    for other in (fheq.calibrate(graph, shuffled, batch_size=7), fheq.calibrate(graph, batches=np.array_split(x, 9))):
        assert_all_same(other, stats)


@quiet
def test_what_no_observer_reads_is_not_collected(graph: fheq.Graph, stats: dict[str, TensorStats]) -> None:
    """And what is left serves the observer as well as all does."""
    extremes = fheq.calibrate(graph, X, observers=[fheq.MinMax()])
    counted = fheq.calibrate(graph, X, observers=[fheq.MinMax(), fheq.Percentile(99)])
    for name, found in extremes.items():
        assert found.total is None and found.squares is None and found.histogram is None
        assert counted[name].total is None
        for leaf in ("count", "minimum", "maximum"):
            np.testing.assert_array_equal(getattr(found, leaf), getattr(stats[name], leaf))
        np.testing.assert_array_equal(counted[name].histogram, stats[name].histogram)
    spec = fheq.Spec(4, observer=fheq.MinMax(), input_observer=fheq.MinMax(), rounding=fheq.Rounding(4))
    few, all_ = fheq.fit(graph, extremes, spec), fheq.fit(graph, stats, spec)
    for name, affine in all_.tensors.items():
        np.testing.assert_array_equal(few.tensors[name].scale, affine.scale)
    with pytest.raises(fheq.FheqError, match="no histograms"):
        fheq.fit(graph, extremes, 4)
    half = merge(extremes["x"], stats["x"])
    assert half.histogram is None and half.count[0] == 2 * len(X)


@quiet
@pytest.mark.parametrize("size", [1, 13, 256, 300])
def test_streams_give_what_arrays_give(graph: fheq.Graph, stats: dict[str, TensorStats], size: int) -> None:
    def stream() -> Iterator[Any]:
        for i in range(0, len(X), size):
            yield X[i : i + size] if i % 2 else (X[i : i + size],)

    assert_all_same(fheq.calibrate(graph, batches=stream(), progress=False), stats)


@quiet
def test_parts_merge_to_the_whole(graph: fheq.Graph, stats: dict[str, TensorStats]) -> None:
    parts = [fheq.calibrate(graph, part) for part in np.array_split(X, 5)]
    whole = reduce(lambda a, b: {name: merge(a[name], b[name]) for name in a}, parts)
    assert_all_same(whole, stats)


@quiet
def test_no_number_of_samples_retraces(graph: fheq.Graph, stats: dict[str, TensorStats]) -> None:
    before = _observe.compiled(graph, PARTS, None)._cache_size()
    for n in (1, 2, 32, TILE, TILE + 1, len(X)):
        fheq.calibrate(graph, X[:n])
    assert _observe.compiled(graph, PARTS, None)._cache_size() == before > 0


# Against numpy


@quiet
def test_statistics_are_numpys(stats: dict[str, TensorStats]) -> None:
    """Float32 is exact on these data; 557 float64 sums are within 557 * 2^-52 < 2e-13 of the sum of magnitudes."""
    data = X.astype(np.float64)
    for name, want in (("x", data), ("h", data @ W)):
        found = stats[name]
        assert np.all(found.count == len(X))
        np.testing.assert_array_equal([found.minimum, found.maximum], [want.min(axis=0), want.max(axis=0)])
        np.testing.assert_allclose(found.total, want.sum(axis=0), rtol=0, atol=2e-13 * np.abs(want).sum())
        np.testing.assert_allclose(found.squares, np.sum(want**2, axis=0), rtol=2e-13)


@quiet
@pytest.mark.parametrize(
    "limits, clipped",
    [
        (None, lambda v: np.maximum(v, 0)),
        ((-1.3, 2.7), lambda v: np.clip(v, np.float32(-1.3), np.float32(2.7))),
        ((0.3, None), lambda v: np.maximum(v, np.float32(0.3))),
        ((None, -0.7), lambda v: np.minimum(v, np.float32(-0.7))),
    ],
)
@pytest.mark.parametrize("observers", [None, [fheq.MinMax()]], ids=["all", "extremes"])
def test_statistics_of_what_is_clipped_are_those_of_its_values(
    limits: Any, clipped: Callable[[np.ndarray], np.ndarray], observers: Any
) -> None:
    """They are not collected from the values, but follow from those of what is clipped."""
    ends = {end: np.float32(v) for end, v in zip("ab", limits or ()) if v is not None}
    clip = (
        node("Clip", ["h", *[end if end in ends else "" for end in "ab"]], ["r"]) if limits else node("Relu", ["h"], ["r"])
    )
    nodes = [node("Gemm", ["x", "w"], ["h"]), clip, node("Gemm", ["r", "v"], ["y"])]
    other = fheq.import_onnx(model(nodes, {"x": ["N", 4]}, ["y"], {"w": W, "v": weights(3, 2), **ends}))
    found = fheq.calibrate(other, X, observers=observers)["r"]
    parts = PARTS if observers is None else ()
    with enable_x64():
        want = UPDATE(init(3, parts), clipped(X @ W)[:, :, None], np.ones(len(X), bool))
    want = jax.tree.map(np.asarray, want)
    if observers is None:
        return assert_same(found, want)
    for leaf in ("count", "minimum", "maximum"):
        np.testing.assert_array_equal(getattr(found, leaf), getattr(want, leaf))


@quiet
def test_batches_of_any_floats_change_nothing_but_float32_noise(graph: fheq.Graph) -> None:
    """4 products of at most 60 each: sums in another order differ by at most 4 * 240 * 2^-24 < 6e-5."""
    a, b = (fheq.calibrate(graph, NOISY, batch_size=size) for size in (32, 5))
    assert_same(a["x"], b["x"])
    for name in ("minimum", "maximum"):
        np.testing.assert_allclose(getattr(a["h"], name), getattr(b["h"], name), rtol=0, atol=6e-5)
    np.testing.assert_allclose(a["h"].total, b["h"].total, rtol=0, atol=6e-5 * len(NOISY))


def test_histograms_are_numpys(stats: dict[str, TensorStats]) -> None:
    """Counted by numpy between the centres that lie halfway (in value) between the places of two bins."""
    value = centres()
    for channel in range(4):
        counts = stats["x"].histogram[channel]
        assert counts.sum() == len(X)
        nearest = value[np.asarray(bin_of(jnp.asarray(X[:, channel])))]
        # A value is within half a bin of its centre, and a bin is at most 1/16 of its lower edge wide.
        assert np.all(np.abs(nearest - X[:, channel]) <= RESOLUTION / 2 * np.abs(X[:, channel]) + 2.0**-41)
        np.testing.assert_array_equal(np.unique(nearest), value[counts > 0])


@given(st.floats(-(2.0**23), 2.0**23, width=32))
def test_bins_are_ordered_and_fine(x: float) -> None:
    place = int(bin_of(jnp.float32(x)))
    assert abs(centres()[place] - x) <= RESOLUTION / 2 * abs(x) + 2.0**-40
    assert int(bin_of(jnp.float32(-x))) == len(centres()) - 1 - place
    assert place <= int(bin_of(jnp.float32(x + abs(x) + 1)))


@pytest.mark.parametrize("percent", [50, 90, 99, 100])
@pytest.mark.parametrize("make", [lambda r: r.normal(size=5000), lambda r: r.exponential(size=5000) * 30 - 3])
def test_percentiles_are_numpys_within_a_bin(percent: float, make: Callable[[np.random.Generator], np.ndarray]) -> None:
    """Within one bin (1/16 of the value), and the one sample by which definitions of quantiles differ."""
    x = make(np.random.default_rng(3)).astype(np.float32)
    found = fheq.Percentile(percent).range(updated(init(1), x.reshape(ROWS_AT_ONCE, 1, -1)), 8)
    tail = (100 - percent) / 2
    step = 100 / len(x)
    for got, at in zip(found, (tail, 100 - tail)):
        low, high = np.percentile(x, np.clip([at - step, at + step], 0, 100))
        assert low - RESOLUTION * abs(low) <= got[0] <= high + RESOLUTION * abs(high)


def test_minmax_is_exact_and_the_others_stay_near(stats: dict[str, TensorStats]) -> None:
    low, high = fheq.MinMax().range(stats["x"], 4)
    np.testing.assert_array_equal([low, high], [X.min(axis=0), X.max(axis=0)])
    inner = fheq.Percentile(99).range(stats["x"], 4)
    assert np.all(inner[0] >= low) and np.all(inner[1] <= high)


def test_the_squared_error_observer_beats_the_extremes_on_outliers() -> None:
    """Its range has a smaller true error than the observed one where a single outlier is far out, at few bits."""
    x = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    x[0] = 40
    stats = updated(init(1), x.reshape(ROWS_AT_ONCE, 1, -1))

    def error(low: float, high: float, bits: int = 4) -> float:
        step = (high - low) / (2**bits - 1)
        return float(np.mean((np.clip(np.round((x - low) / step), 0, 2**bits - 1) * step + low - x) ** 2))

    ours = error(*(float(v[0]) for v in fheq.MeanSquaredError().range(stats, 4)))
    assert ours < error(*(float(v[0]) for v in fheq.MinMax().range(stats, 4)))
    best = min(error(low, high) for low in np.linspace(-4, -1, 31) for high in np.linspace(1, 41, 81))
    # Of the full grid's error: candidates are 1.65% of the range apart (0.7 on 40, a fifth of the step in use), bins 6%.
    assert ours < 1.5 * best


def test_the_entropy_observer_loses_least_information() -> None:
    """By scipy's divergence of the samples themselves: less than the extremes lose, and most ranges of a grid."""
    x = np.random.default_rng(0).laplace(size=20_000).astype(np.float32)
    x[0] = 40
    stats = updated(init(1), x.reshape(ROWS_AT_ONCE, 1, -1))
    cells = np.linspace(x.min(), x.max(), 513)

    def lost(low: float, high: float, bits: int = 4) -> float:
        """From the clipped samples to what is left when each step's samples are spread evenly over its used cells."""
        inside = cells[(cells >= low) & (cells <= high)]
        p, q = (np.histogram(v, inside)[0].astype(float) for v in (np.clip(x, inside[0], inside[-1]), x))
        for level in np.array_split(np.arange(len(q)), 2**bits):
            used = level[q[level] > 0]
            q[used] = q[level].sum() / max(len(used), 1)
        return float(scipy.stats.entropy(p, np.maximum(q, 1e-4 * len(x) / len(q))))

    low, high = (float(v[0]) for v in fheq.Entropy().range(stats, 4))
    assert x.min() <= low < 0 < high < 20
    ours, extremes = lost(low, high), lost(x.min(), x.max())
    others = [lost(a, b) for a in np.linspace(x.min(), -1, 16) for b in np.linspace(1, 40, 40)]
    assert ours < extremes / 5 and ours < np.quantile(others, 0.25)
    exact = fheq.Entropy().range(stats, 12)
    np.testing.assert_array_equal(np.ravel(exact), [x.min(), x.max()])


# Errors and warnings

BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "empty": (lambda: X[:0], "'x' holds no samples"),
    "nan": (lambda: np.where(np.arange(4) == 2, np.nan, X[:3]).astype(np.float32), "'x' contains NaN"),
    "infinite": (lambda: np.where(np.arange(4) == 2, np.inf, X[:3]).astype(np.float32), "'x' contains NaN or infinity"),
    "rank": (lambda: X[:, :, None], "'x' has shape"),
    "width": (lambda: X[:, :3], r"'x' has shape .*expected \(N, 4\)"),
    "integers": (lambda: X.astype(np.int64), "'x' has dtype int64; expected floating"),
    "text": (lambda: np.array([["a"] * 4]), "'x' has dtype"),
    "ragged": (lambda: [[1.0, 2.0, 3.0, 4.0], [1.0]], "'x' is not an array"),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("streamed", [False, True])
def test_bad_data_are_refused_by_name(graph: fheq.Graph, name: str, streamed: bool) -> None:
    make, words = BAD[name]
    if name == "ragged" and streamed:
        pytest.skip("a list in a stream is a tuple of inputs")
    with pytest.raises(DataError, match=words):
        if streamed:
            fheq.calibrate(graph, batches=[X[:50], make()], progress=False)
        else:
            fheq.calibrate(graph, make())


def test_bad_calls_are_refused(graph: fheq.Graph) -> None:
    with pytest.raises(DataError, match=r"takes 1 inputs.*'x'.*2 arrays"):
        fheq.calibrate(graph, X, X)
    with pytest.raises(DataError, match="arrays or as batches"):
        fheq.calibrate(graph)
    with pytest.raises(DataError, match="arrays or as batches"):
        fheq.calibrate(graph, X, batches=[X])
    with pytest.raises(DataError, match="no samples"):
        fheq.calibrate(graph, batches=[])
    with pytest.raises(DataError, match="batch_size"):
        fheq.calibrate(graph, X, batch_size=0)


def test_unequal_numbers_of_samples_are_refused() -> None:
    found = prepared("product_of_two_inputs")
    with pytest.raises(DataError, match=r"'x': 60.*'z': 50"):
        fheq.calibrate(found.graph, found.data[0][:60], found.data[1][:50])


def test_floats_for_integers_are_refused() -> None:
    with pytest.raises(DataError, match="'x' has dtype float32; expected integers"):
        fheq.calibrate(prepared("embedding_of_tokens").graph, np.zeros((60, 3), np.float32))


def test_infinity_inside_of_the_model_is_refused_by_tensor() -> None:
    graph = fheq.import_onnx(model([node("Log", ["x"], ["y"])], {"x": ["N", 2]}, ["y"]))
    with pytest.raises(DataError, match="'y' becomes NaN or infinite"):
        fheq.calibrate(graph, np.float32(np.arange(120).reshape(60, 2)))


def test_few_samples_warn(graph: fheq.Graph) -> None:
    with pytest.warns(CalibrationWarning, match=f"{FEW_SAMPLES - 1} calibration samples are few"):
        fheq.calibrate(graph, X[: FEW_SAMPLES - 1])


def test_a_constant_tensor_warns_by_name(graph: fheq.Graph) -> None:
    data = np.zeros((60, 4), np.float32)
    with pytest.warns(CalibrationWarning, match="tensor 'x' is constant .*calibrate on data"):
        fheq.calibrate(graph, data)


@pytest.mark.filterwarnings("error::fheq.CalibrationWarning")
def test_good_data_do_not_warn(graph: fheq.Graph) -> None:
    fheq.calibrate(graph, X[:FEW_SAMPLES])


def test_integer_inputs_are_counted_as_they_are() -> None:
    found = prepared("embedding_of_tokens")
    tokens = found.data[0]
    stats = per_tensor(found.stats["x"])
    assert (stats.minimum[0], stats.maximum[0]) == (tokens.min(), tokens.max())


@pytest.mark.parametrize(
    ("observers", "message"),
    [
        ([fheq.MinMax], "observers must be an observer"),
        (["MinMax"], "observers must be an observer"),
        ("MinMax", "must be a list"),
        (fheq.MinMax(), "must be a list"),
        ([SimpleNamespace(range=max, reads=("bogus",))], r"reads \['bogus'\]; the parts"),
    ],
)
def test_what_is_no_observer_is_refused(graph: fheq.Graph, observers: Any, message: str) -> None:
    with pytest.raises(fheq.FheqError, match=message):
        fheq.calibrate(graph, X, observers=observers)
