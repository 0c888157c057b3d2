"""The laws of the affine quantizer, against onnx's QuantizeLinear and concrete's `round_bit_pattern`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from build_models import model, node
from concrete import fhe
from hypothesis import given
from hypothesis import strategies as st
from jax.experimental import enable_x64
from onnx import TensorProto
from onnx.reference import ReferenceEvaluator

from fheq import FheqError
from fheq.affine import Affine, dequantize, fake_quant, quantize, round_accumulator, validate

EPSILON = 2.0**-52  # of float64


@st.composite
def affines(draw: st.DrawFn) -> Affine:
    """Quantizers of 1 to 16 bits; the zero point may lie outside of [qmin, qmax]."""
    bits = draw(st.integers(1, 16))
    qmin = draw(st.sampled_from([0, -(2 ** (bits - 1))]))
    qmax = qmin + 2**bits - 1
    zero_point = draw(st.integers(qmin - 50, qmax + 50))
    scale = draw(st.floats(1e-6, 1e6, allow_subnormal=False))
    return Affine(scale, zero_point, qmin, qmax, signed=qmin < 0)


def ends(a: Affine) -> tuple[float, float]:
    """The real range."""
    return float(a.scale * (a.qmin - a.zero_point)), float(a.scale * (a.qmax - a.zero_point))


def noise(a: Affine, x: Any) -> Any:
    """Float64 error of one division, one subtraction and one product: each below EPSILON times its magnitude."""
    return 4 * EPSILON * (np.abs(x) + a.scale * (np.abs(a.qmin - a.zero_point) + np.abs(a.qmax - a.zero_point)))


@given(affines(), st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_half_a_step_is_lost_at_most_inside_the_range(a: Affine, places: list[float]) -> None:
    low, high = ends(a)
    x = low + np.array(places) * (high - low)
    error = np.abs(x - dequantize(a, quantize(a, x)))
    assert np.all(error <= a.scale / 2 + noise(a, x))


@given(affines(), st.lists(st.floats(-1e9, 1e9), min_size=2, max_size=20))
def test_quantization_is_monotone(a: Affine, x: list[float]) -> None:
    assert np.all(np.diff(quantize(a, np.sort(x))) >= 0)


@given(affines(), st.floats(0, 1e12))
def test_values_beyond_the_range_saturate(a: Affine, beyond: float) -> None:
    low, high = ends(a)
    assert quantize(a, np.array(low - beyond)) == a.qmin
    assert quantize(a, np.array(high + beyond)) == a.qmax


@given(affines(), st.data())
def test_integers_survive_a_round_trip(a: Affine, data: st.DataObject) -> None:
    q = np.array(data.draw(st.lists(st.integers(int(a.qmin), int(a.qmax)), min_size=1, max_size=20)))
    np.testing.assert_array_equal(quantize(a, dequantize(a, q)), q)


def onnx_quantize_linear(x: np.ndarray, scale: np.ndarray, zero: np.ndarray, axis: int) -> list[np.ndarray]:
    """What onnxruntime and onnx's reference give."""
    proto = model(
        [node("QuantizeLinear", ["x", "scale", "zero"], ["y"], axis=axis)],
        {"x": list(x.shape)},
        ["y"],
        {"scale": scale, "zero": zero},
        opset=19,
        kinds={"y": TensorProto.UINT8 if zero.dtype == np.uint8 else TensorProto.INT8},
    )
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    return [session.run(None, {"x": x})[0], ReferenceEvaluator(proto).run(None, {"x": x})[0]]


@pytest.mark.parametrize("kind", [np.uint8, np.int8])
@pytest.mark.parametrize("axis", [None, 1])
def test_ties_go_to_even_as_in_onnx(kind: type, axis: int | None) -> None:
    """Scales are powers of two, so that every tie is exact in float32 and float64 alike."""
    limits = np.iinfo(kind)
    scale = np.float32(0.5) if axis is None else np.float32([0.5, 2, 0.125])
    zero = np.full(np.shape(scale), limits.min // 2 + 3, kind)
    x = np.broadcast_to(np.arange(-600, 600, dtype=np.float32)[:, None] * 0.25, (1200, 3)) * np.float32([1, 4, 0.25])
    x = x if axis is not None else x[:, :1]
    ours = Affine(
        np.float64(scale), zero.astype(np.float64), float(limits.min), float(limits.max), axis=-1 if axis else None
    )
    for theirs in onnx_quantize_linear(np.ascontiguousarray(x), scale, zero, 1):
        np.testing.assert_array_equal(quantize(ours, x), theirs)
        np.testing.assert_array_equal(np.asarray(quantize(ours, jnp.asarray(x))), theirs)


@given(st.lists(st.integers(-(2**20), 2**20), min_size=20, max_size=20), st.integers(0, 17))
def test_accumulators_round_as_concrete_rounds(values: list[int], lsbs: int) -> None:
    q = np.array(values)
    theirs = q if lsbs == 0 else np.asarray(fhe.round_bit_pattern(q, lsbs_to_remove=lsbs))
    np.testing.assert_array_equal(np.asarray(round_accumulator(jnp.asarray(q), lsbs)), theirs)
    # Floats hold these integers, their halves and the cells exactly.
    np.testing.assert_array_equal(np.asarray(round_accumulator(jnp.asarray(q, jnp.float32), lsbs)), theirs)
    with enable_x64():
        np.testing.assert_array_equal(np.asarray(round_accumulator(jnp.asarray(q, jnp.float64), lsbs)), theirs)


PER_CHANNEL = Affine(
    np.array([0.5, 0.1, 3.0]), np.array([0.0, 7.0, -2.0]), np.zeros(3), np.array([15.0, 31.0, 7.0]), np.zeros(3), -2
)


@pytest.mark.parametrize("a", [Affine(0.37, 5.0, 0.0, 31.0), PER_CHANNEL], ids=["per_tensor", "per_channel"])
def test_jax_and_host_agree(a: Affine) -> None:
    """They may differ by one step where float32 noise moves a value over a tie: keep values off the ties by 1e-3 steps."""
    x = np.random.default_rng(0).uniform(-4, 12, size=(50, 3, 4)).astype(np.float32)
    steps = x / a.expanded(3).scale
    x = x[np.all(np.abs(steps - np.floor(steps) - 0.5) > 1e-3, axis=(1, 2))]
    assert len(x) > 20
    device = jax.tree.map(jnp.asarray, a)
    q = quantize(a, x)
    assert q.dtype == np.int64
    np.testing.assert_array_equal(np.asarray(quantize(device, jnp.asarray(x))), q)
    # One float32 product of at most 100: error below 100 * 2^-23.
    np.testing.assert_allclose(np.asarray(fake_quant(device, jnp.asarray(x))), dequantize(a, q), rtol=1e-6, atol=2e-5)


def test_the_axis_of_a_channel_means_the_same_with_and_without_a_batch() -> None:
    x = np.random.default_rng(0).normal(size=(5, 3, 4))
    np.testing.assert_array_equal(quantize(PER_CHANNEL, x), np.stack([quantize(PER_CHANNEL, sample) for sample in x]))


def test_gradients_pass_straight_through_inside_and_stop_outside() -> None:
    a = Affine(jnp.float32(0.5), jnp.float32(0), jnp.float32(0), jnp.float32(10))
    slope = jax.vmap(jax.grad(lambda x: fake_quant(a, x)))
    np.testing.assert_array_equal(np.asarray(slope(jnp.float32([0.6, 4.3, -1, 7]))), [1, 1, 0, 0])


def test_the_gradient_in_scale_is_that_of_lsq() -> None:
    """Inside: round(x/s) - x/s; beyond: the end of the range (arXiv 1902.08153, eq. 3). Exact in binary fractions."""
    a = Affine(jnp.float32(0.5), jnp.float32(2), jnp.float32(0), jnp.float32(7))
    slope = lambda x: jax.grad(lambda s: fake_quant(replace(a, scale=s), jnp.float32(x)))(a.scale)
    assert [float(slope(x)) for x in (0.625, -0.375, 100.0, -100.0)] == [-0.25, -0.25, 5.0, -2.0]


def test_the_gradient_in_the_zero_point_is_that_of_the_ends() -> None:
    """Inside there is none (arXiv 2004.09576, eq. 4, of its offset)."""
    a = Affine(jnp.float32(0.5), jnp.float32(2), jnp.float32(0), jnp.float32(7))
    slope = lambda x: jax.grad(lambda z: fake_quant(replace(a, zero_point=z), jnp.float32(x)))(a.zero_point)
    assert [float(slope(x)) for x in (0.625, -0.375, 100.0, -100.0, jnp.inf)] == [0, 0, -0.5, -0.5, -0.5]


def test_a_quantizer_is_a_pytree_of_its_arrays() -> None:
    leaves, structure = jax.tree.flatten(PER_CHANNEL)
    assert len(leaves) == 5
    doubled = jax.tree.map(lambda leaf: 2 * leaf, PER_CHANNEL)
    assert doubled.axis == -2
    np.testing.assert_array_equal(doubled.scale, 2 * PER_CHANNEL.scale)
    other = jax.tree.structure(replace(PER_CHANNEL, qmax=PER_CHANNEL.qmax * 8, zero_point=PER_CHANNEL.zero_point + 1))
    assert other == structure


def test_changing_a_leaf_retraces_nothing() -> None:
    traces = []

    @jax.jit
    def run(a: Affine, x: Any) -> Any:
        traces.append(a)
        return fake_quant(a, x)

    x = jnp.ones((2, 3, 4))
    for factor in (1, 2, 3):
        run(jax.tree.map(lambda leaf, k=factor: leaf * k, PER_CHANNEL), x)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scale": 0.0}, "scale must be positive"),
        ({"scale": -1.0}, "scale must be positive"),
        ({"scale": np.nan}, "scale is not finite"),
        ({"zero_point": np.inf}, "zero_point is not finite"),
        ({"qmin": 9.0, "qmax": 8.0}, "qmin is above qmax"),
        ({"scale": np.ones(3)}, "has shape"),
        ({"scale": np.ones((3, 1)), "axis": -1}, "has shape"),
        ({"scale": np.ones(3), "qmax": np.full(4, 15.0), "axis": -1}, "different lengths"),
        ({"scale": np.ones(4), "axis": -1}, "4 channels along axis -1, where the tensor has shape"),
        ({"scale": np.ones(3), "axis": -3}, "3 channels along axis -3, where the tensor has shape"),
    ],
)
def test_a_broken_invariant_is_named(change: dict[str, Any], words: str) -> None:
    good = Affine(1.0, 0.0, 0.0, 15.0)
    validate(good, "t")
    with pytest.raises(FheqError, match=f"'t'.*{words}"):
        validate(replace(good, **change), "t", shape=(2, 3))
