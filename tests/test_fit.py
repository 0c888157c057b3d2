"""What `fit` promises: granularity, symmetry, overrides, rounding, ranges of accumulators, and a structure without bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from build_models import model, node
from models import CASES, as_tuple, prepared, weights

import fheq
from fheq import AccumulatorRange, Granularity, Override, Rounding, Spec, Symmetry
from fheq.affine import LEAVES, Affine
from fheq.errors import QuantizationError
from fheq.observing.statistics import TensorStats

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
CONV = "conv2d_group_stride_dilation_uneven_pad"
GEMM = "gemm_with_alpha_beta_and_transposes"


def fitted(name: str, spec: int | Spec) -> fheq.QParams:
    return fheq.fit(prepared(name).graph, prepared(name).stats, spec)


def every(qparams: fheq.QParams) -> dict[str, Affine]:
    return {**qparams.tensors, **qparams.weights, **qparams.accumulators}


def levels(a: Affine) -> int:
    """Most integers that a quantizer has."""
    return int(np.max(np.asarray(a.qmax) - np.asarray(a.qmin))) + 1


# Granularity


def test_per_channel_leaves_have_a_value_per_channel() -> None:
    q = fitted(CONV, 4)
    assert q.tensors["x"].scale.shape == (2,) and q.tensors["x"].axis == -3
    assert q.tensors["r"].scale.shape == (4,) and q.tensors["r"].axis == -3
    assert q.weights["w1"].scale.shape == (4,) and q.weights["w1"].axis == -4
    assert q.accumulators["c"].scale.shape == (4,)


def test_per_tensor_leaves_are_scalars() -> None:
    q = fitted(CONV, Spec(4, activations=Granularity.PER_TENSOR, weights=Granularity.PER_TENSOR))
    for name, a in {**q.tensors, **q.weights}.items():
        assert np.shape(a.scale) == () and a.axis is None, name


@pytest.mark.parametrize("granularity", list(Granularity))
def test_ranges_of_all_channels_lie_in_the_range_of_the_tensor(granularity: Granularity) -> None:
    spec = Spec(6, activations=granularity, input_observer=fheq.MinMax())
    a = fitted(CONV, spec).tensors["x"]
    x = prepared(CONV).data[0]
    low, high = a.scale * (a.qmin - a.zero_point), a.scale * (a.qmax - a.zero_point)
    over = (0, 2, 3) if granularity is Granularity.PER_CHANNEL else None
    # The grid goes through zero, so its ends are within a step of the extremes.
    assert np.all(np.abs(low - x.min(axis=over)) <= a.scale) and np.all(np.abs(high - x.max(axis=over)) <= a.scale)


def test_what_is_added_shares_a_scale() -> None:
    q = fitted("residual_with_different_scales", 5)
    assert "g" not in q.tensors  # a layer's result, which is added as it is
    np.testing.assert_array_equal(q.tensors["x"].scale, q.tensors["t"].scale)


def test_what_is_compared_shares_a_quantizer() -> None:
    q = fitted("max_and_min_of_two", 5)
    for leaf in LEAVES:
        np.testing.assert_array_equal(getattr(q.tensors["x"], leaf), getattr(q.tensors["z"], leaf))


def test_what_is_joined_keeps_its_scales() -> None:
    """The next linear op absorbs them."""
    q = fitted("concat_of_different_scales", 5)
    assert q.tensors["x"].scale.shape == (3,)
    assert np.max(q.tensors["r"].scale) > 1.5 * np.min(q.tensors["z"].scale)


# Weights


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_symmetric_weights_have_zero_in_their_middle(bits: int) -> None:
    for a in fitted(GEMM, Spec(bits, symmetry=Symmetry.SYMMETRIC)).weights.values():
        assert np.all(a.zero_point == 0) and np.all(a.qmin == -a.qmax)
        assert levels(a) <= max(2**bits, 3)


@pytest.mark.parametrize("bits", [1, 2, 3, 7])
def test_asymmetric_weights_use_every_integer(bits: int) -> None:
    """The grid spans [min, max], widened to 0."""
    weight = weights(5, 4)
    spec = Spec(bits, symmetry=Symmetry.ASYMMETRIC, activations=Granularity.PER_TENSOR)
    a = fitted(GEMM, spec).weights["w1"]
    assert levels(a) == 2**bits
    span = np.maximum(weight.max(axis=1), 0) - np.minimum(weight.min(axis=1), 0)
    np.testing.assert_allclose(a.scale * (2**bits - 1), 0.5 * span, rtol=1e-6)  # alpha is 0.5; float32 weights


def test_weights_are_coarser_where_a_table_of_16_bits_needs_it() -> None:
    """Without rounding no table is wider; then nothing is rounded, and what was not seen in calibration is held too."""
    q = fitted(GEMM, 8)
    assert max(map(levels, q.accumulators.values())) == 2**16
    assert all(np.all(a.lsbs == 0) for a in q.accumulators.values())
    program = fheq.lower(prepared(GEMM).graph, q)
    unseen = program.quantize(*CASES[GEMM].data(2000, seed=1))
    assert all(row.share == 0 for row in fheq.overflow(program, *unseen).rows)


def weight_error(symmetry: Symmetry) -> float:
    """Squared error of the first weight, in float64. Scales of activations are 1 for all, so none is multiplied in."""
    a = fitted(GEMM, Spec(3, symmetry=symmetry, activations=Granularity.PER_TENSOR)).weights["w1"]
    weight = 0.5 * weights(5, 4).T.astype(np.float64)
    return float(np.sum((a.dequantize(a.quantize(weight)) - weight) ** 2))


def test_automatic_weights_are_the_better_of_both() -> None:
    best = min(weight_error(Symmetry.SYMMETRIC), weight_error(Symmetry.ASYMMETRIC))
    assert weight_error(Symmetry.AUTOMATIC) <= best * (1 + 1e-12)


# Overrides


@pytest.mark.parametrize("name", ["r", "make_r"], ids=["tensor", "node"])
def test_a_tensor_or_its_node_overrides_bits(name: str) -> None:
    q = fitted(CONV, Spec(6, overrides={name: Override(n_bits=2)}))
    assert levels(q.tensors["r"]) <= 4 < levels(q.tensors["x"])
    assert levels(q.weights["w2"]) > 8


@pytest.mark.parametrize("name", ["w1", "c", "make_c"], ids=["weight", "result", "node"])
def test_a_weight_or_its_node_overrides_bits(name: str) -> None:
    q = fitted(CONV, Spec(6, overrides={name: Override(n_bits=2)}))
    assert levels(q.weights["w1"]) <= 4 < levels(q.weights["w2"])


def test_overrides_of_the_other_options() -> None:
    overrides = {
        "x": Override(granularity=Granularity.PER_TENSOR, observer=fheq.MinMax()),
        "w2": Override(granularity=Granularity.PER_TENSOR),
        "c": Override(rounding=Rounding(3, approximate=True)),
    }
    q = fitted(CONV, Spec(5, overrides=overrides))
    assert q.tensors["x"].axis is None and q.weights["w2"].axis is None and q.weights["w1"].axis == -4
    assert q.accumulators["c"].rounding == "approximate"
    assert np.max(q.accumulators["c"].lsbs) > 0


@pytest.mark.parametrize("name", ["nothing", "", "X"])
def test_an_override_of_nothing_is_refused(name: str) -> None:
    with pytest.raises(QuantizationError, match=f"override '{name}' names no"):
        fitted(CONV, Spec(5, overrides={name: Override(n_bits=3)}))


def test_statistics_of_another_graph_are_refused() -> None:
    with pytest.raises(QuantizationError, match="calibrate this graph"):
        fheq.fit(prepared(CONV).graph, prepared("product_of_two_inputs").stats, 4)


# Observers


def test_observers_change_ranges_as_they_say() -> None:
    x = prepared(GEMM).data[0]
    for observer, low in ((fheq.MinMax(), x.min(axis=0)), (fheq.Percentile(90), np.percentile(x, 5, axis=0))):
        a = fitted(GEMM, Spec(8, input_observer=observer)).tensors["x"]
        # Within a step of the grid and a bin (1/16) of the histogram.
        assert np.all(np.abs(a.scale * (a.qmin - a.zero_point) - low) <= a.scale + np.abs(low) / 16 + 0.05)


# Accumulators


@pytest.mark.parametrize("ranges", list(AccumulatorRange))
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounding_leaves_as_many_bits_as_asked(ranges: AccumulatorRange, bits: int) -> None:
    for name in (CONV, GEMM, "average_pool_with_pads_and_ceil", "product_of_two_inputs"):
        found = prepared(name)
        q = fheq.fit(found.graph, found.stats, Spec(7, rounding=Rounding(bits), accumulators=ranges))
        program = fheq.lower(found.graph, q)
        for table in program.lookups:
            if table.accumulator:
                acc = program.accumulators[table.accumulator]
                assert table.bits == acc.bits - acc.lsbs <= bits


def test_rounding_removes_no_more_than_it_must() -> None:
    q = fitted(GEMM, Spec(8, rounding=Rounding(8), accumulators=AccumulatorRange.WORST_CASE))
    acc = q.accumulators["h"]
    assert int(np.max(acc.qmax)).bit_length() - int(np.max(acc.lsbs)) == 8


@pytest.mark.parametrize("name", [CONV, GEMM, "residual_with_different_scales", "matmul_of_two_encrypted"])
def test_worst_case_ranges_contain_the_observed_ones(name: str) -> None:
    observed, worst = (fitted(name, Spec(4, accumulators=ranges)).accumulators for ranges in AccumulatorRange)
    for key in observed:
        assert levels(observed[key]) <= levels(worst[key]), key


def test_a_margin_widens_the_observed_range() -> None:
    narrow, wide = (fitted(GEMM, Spec(8, margin=margin)).accumulators["h"] for margin in (0.0, 0.5))
    assert levels(narrow) <= levels(wide)


def test_no_calibration_sample_wraps() -> None:
    """The observed range has a margin of 5% for what quantization adds: at 8 bits no calibration sample leaves it."""
    for name in (CONV, GEMM, "activation_with_branches"):
        found = prepared(name)
        program = fheq.lower(found.graph, fitted(name, 8))
        worst = fheq.lower(found.graph, fitted(name, Spec(8, accumulators=AccumulatorRange.WORST_CASE)))
        q = program.quantize(*found.data)
        real = [p.dequantize(*as_tuple(fheq.simulate(p, *q))) for p in (program, worst)]
        span = np.ptp(real[1][0])
        assert np.max(np.abs(real[0][0] - real[1][0])) < 0.1 * span  # a wrap is a jump of the whole range


# Structure


@pytest.mark.parametrize("name", CASES)
def test_the_structure_does_not_depend_on_bits(name: str) -> None:
    one, other = (fitted(name, bits) for bits in (2, 9))
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other)):
        assert np.shape(a) == np.shape(b)


@pytest.mark.parametrize("name", CASES)
def test_every_quantizer_is_valid_and_holds_its_bits(name: str) -> None:
    from fheq.affine import validate

    for bits in (1, 5):
        q = fitted(name, bits)
        for key, a in every(q).items():
            validate(a, key)
        exact = {p.name for p in prepared(name).graph.inputs if p.type.dtype.kind != "f"}
        for key, a in q.tensors.items():
            if key not in exact:
                assert levels(a) <= 2 ** max(bits, 5), key


def test_edited_leaves_are_what_is_lowered() -> None:
    """An input quantizer replaced by hand becomes the program's; a coarser one gives fewer integers."""
    found = prepared(GEMM)
    q = fitted(GEMM, 6)
    mine = replace(q.tensors["x"], scale=q.tensors["x"].scale * 4, zero_point=np.full(4, 8.0), qmax=np.full(4, 15.0))
    edited = replace(q, tensors={**q.tensors, "x": mine})
    (entry,) = fheq.lower(found.graph, edited).inputs
    for leaf in LEAVES:
        np.testing.assert_array_equal(getattr(entry.affine, leaf), getattr(mine, leaf))
    assert q.tensors["x"].scale is not mine.scale


def test_lowering_takes_jax_leaves() -> None:
    """Scales are float32 there: programs may differ where a weight is at a tie, results by a few steps."""
    found = prepared(GEMM)
    q = fitted(GEMM, 5)
    programs = [fheq.lower(found.graph, p) for p in (q, jax.tree.map(jax.numpy.asarray, q))]
    real = [p.dequantize(fheq.simulate(p, *p.quantize(*found.data)))[0] for p in programs]
    assert np.mean(np.abs(real[0] - real[1])) < 0.01 * np.std(real[0])


@pytest.mark.parametrize("part", ["tensors", "weights", "accumulators"])
def test_a_missing_quantizer_is_named(part: str) -> None:
    q = fitted(GEMM, 5)
    name = next(iter(getattr(q, part)))
    short = {k: v for k, v in getattr(q, part).items() if k != name}
    with pytest.raises(QuantizationError, match=f"qparams.{part} lacks '{name}'"):
        fheq.lower(prepared(GEMM).graph, replace(q, **{part: short}))


def test_a_broken_quantizer_is_named() -> None:
    q = fitted(GEMM, 5)
    broken = replace(q, tensors={**q.tensors, "s": replace(q.tensors["s"], scale=-q.tensors["s"].scale)})
    with pytest.raises(QuantizationError, match="'s': scale must be positive"):
        fheq.lower(prepared(GEMM).graph, broken)


def test_quantizers_print_as_a_table_with_every_name() -> None:
    q = fitted(CONV, 5)
    text = str(q)
    assert all(any(line.startswith(f"{name} ") for line in text.splitlines()) for name in every(q))


# Degenerate data


@pytest.mark.parametrize("value", [0.0, 3.0, -1e-20, 1e20])
@pytest.mark.parametrize("granularity", list(Granularity))
def test_constant_data_lower_and_decode_to_themselves(value: float, granularity: Granularity) -> None:
    """Every channel but one is constant: the program is finite, and the constant is met to a step of its size."""
    nodes = [node("Mul", ["x", "k"], ["h"]), node("Relu", ["h"], ["r"]), node("Gemm", ["r", "w"], ["y"])]
    w = np.float32([[1, 0], [0, 1], [0, 0]])
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 3]}, ["y"], {"k": np.float32([1, 1, 1]), "w": w}))
    x = np.random.default_rng(0).uniform(0, 1, (60, 3)).astype(np.float32)
    x[:, 0] = value
    spec = Spec(8, activations=granularity)
    q = fheq.fit(graph, fheq.calibrate(graph, x), spec)
    program = fheq.lower(graph, q)
    (real,) = program.dequantize(fheq.simulate(program, *program.quantize(x)))
    assert np.all(np.isfinite(real))
    step = max(abs(value), 1.0) / 50
    np.testing.assert_allclose(real[:, 0], max(value, 0), atol=step)
    if granularity is Granularity.PER_CHANNEL:
        np.testing.assert_allclose(real[:, 1], x[:, 1], atol=0.05)


def test_a_weight_of_zeros_lowers() -> None:
    nodes = [node("Gemm", ["x", "w", "b"], ["h"]), node("Relu", ["h"], ["r"]), node("Gemm", ["r", "v"], ["y"])]
    known = {"w": np.zeros((3, 2), np.float32), "b": np.float32([1, -1]), "v": np.float32([[1], [1]])}
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 3]}, ["y"], known))
    x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), 5))
    (real,) = program.dequantize(fheq.simulate(program, *program.quantize(x)))
    np.testing.assert_allclose(real, 1.0, atol=0.1)  # r is (1, 0): on 31 steps, and weights of 1 are exact to 1/15


@pytest.mark.parametrize("name", ["make_h", "w", "h"])
def test_an_override_of_a_layer_that_was_composed_says_so(name: str) -> None:
    nodes = [node("Gemm", ["x", "w"], ["h"]), node("Gemm", ["h", "v"], ["y"])]
    known = {"w": np.eye(4, 3, dtype=np.float32), "v": np.eye(3, 2, dtype=np.float32)}
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 4]}, ["y"], known))
    stats = fheq.calibrate(graph, np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32))
    with pytest.raises(QuantizationError, match=f"{name}.*composed.*override what it became.*v/composed"):
        fheq.fit(graph, stats, Spec(6, overrides={name: Override(n_bits=3)}))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Spec(5, weights="per_tensor"), "weights must be a Granularity"),
        (lambda: Spec(5, accumulators="worst_case"), r"accumulators must be .*AccumulatorRange\.WORST_CASE"),
        (lambda: Spec(5, rounding=4), "rounding must be a Rounding, got 4"),
        (lambda: Spec(5, observer=fheq.MinMax), "observer must be an observer"),
        (lambda: Spec(5, margin="a"), "margin must be between"),
        (lambda: Spec(5, overrides={"h": 3}), r"overrides\['h'\] must be an Override"),
        (lambda: Spec(32), "n_bits must be at most 24, got 32"),
        (lambda: fheq.Override(n_bits=2.5), "override's n_bits must be an integer"),
        (lambda: fheq.Override(granularity="per_tensor"), "granularity must be a Granularity"),
        (lambda: fheq.Percentile(101), "percent must be above 0"),
    ],
)
def test_options_of_another_kind_are_refused_by_name(make, message):
    with pytest.raises(QuantizationError, match=message):
        make()


class Own:
    """An observer that says what it is told."""

    def __init__(self, ends: Callable[[TensorStats], Any]):
        self.ends = ends

    def range(self, stats: TensorStats, bits: int) -> Any:
        return self.ends(stats)


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (lambda s: (s.maximum, s.minimum - 1), "finite ends in order"),
        (lambda s: (s.minimum * np.nan, s.maximum), "finite ends in order"),
        (lambda s: (s.minimum, s.maximum + np.inf), "finite ends in order"),
        (lambda s: (np.zeros(17), np.ones(17)), r"\(lowest, highest\)"),
        (lambda s: (s.minimum, s.maximum, 1), r"\(lowest, highest\)"),
        (lambda s: s.minimum[:1], r"\(lowest, highest\)"),
        (lambda s: None, r"\(lowest, highest\)"),
        (lambda s: ("a", "b"), r"\(lowest, highest\)"),
    ],
)
def test_what_an_observer_gives_is_checked(ends: Callable[[TensorStats], Any], message: str) -> None:
    with pytest.raises(QuantizationError, match=f"^observer of tensor '[a-z]+', .*Own.*{message}"):
        fitted(GEMM, Spec(4, observer=Own(ends)))
    with pytest.raises(QuantizationError, match=f"^an override's observer of tensor 'x', .*Own.*{message}"):
        fitted(GEMM, Spec(4, overrides={"x": Override(observer=Own(ends))}))


def test_ends_of_all_channels_may_be_one_number() -> None:
    same = [Own(lambda s: (-1.0, 2.0)), Own(lambda s: (np.full_like(s.minimum, -1), np.full_like(s.maximum, 2)))]
    one, other = (fitted(GEMM, Spec(4, input_observer=observer)) for observer in same)
    jax.tree.map(np.testing.assert_array_equal, one, other)


def test_what_the_statistics_lack_is_named() -> None:
    found = prepared(GEMM)
    stats = fheq.calibrate(found.graph, *found.data, observers=[fheq.MinMax()])
    with pytest.raises(QuantizationError, match=r"^input_observer of tensor 'x', MeanSquaredError.* no histograms"):
        fheq.fit(found.graph, stats, Spec(4, observer=fheq.MinMax()))
    with pytest.raises(QuantizationError, match=r"^observer of tensor .*, Percentile.* no histograms"):
        fheq.fit(found.graph, stats, Spec(4, observer=fheq.Percentile(99), input_observer=fheq.MinMax()))
