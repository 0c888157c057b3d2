"""Fake quantization: every parameter is a leaf; it maps, differentiates, and is what the integers compute."""

from __future__ import annotations

import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import as_tuple, prepared

import fheq
from fheq import Rounding, Spec
from fheq.arrays.slopes import with_finite_slopes
from fheq.digits import load

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
GEMM = "gemm_with_alpha_beta_and_transposes"
SEVERAL = (
    "conv2d_group_stride_dilation_uneven_pad",
    "average_pool_with_pads_and_ceil",
    "matmul_of_two_encrypted",
    "max_and_min_of_two",
    "concat_of_different_scales",
    "batch_norm_before_and_after_and_bias_and_clip",
    "pads_after_a_shift",
    "decrypted_and_read_by_a_table",
    "sums_of_which_one_has_no_terms",
    "zeros_beside_decrypted_activations_that_are_never_0",
)


def fitted(name: str, spec: int | Spec) -> fheq.QParams:
    return fheq.fit(prepared(name).graph, prepared(name).stats, spec)


def compilations(graph: fheq.Graph) -> int:
    """Functions that `fake_quant` has compiled for a graph (`fheq.fake_quant` is the function, hence `sys.modules`)."""
    return sys.modules["fheq.fake_quant"]._fake_quant.compiled(graph)._cache_size()


@pytest.mark.parametrize("name", [GEMM, "max_and_min_of_two"])
def test_changing_any_value_recompiles_nothing(name: str) -> None:
    """n_bits, ranges, observers and rounding bits are values; so is every leaf edited by hand."""
    found = prepared(name)
    graph, data = found.graph, found.data
    run = lambda spec: fheq.fake_quant(graph, fitted(name, spec), *data)
    run(Spec(4, rounding=Rounding(4)))
    before = compilations(graph)
    for bits in (1, 2, 8, 16, {"op_inputs": 3, "op_weights": 5, "model_inputs": 7, "model_outputs": 9}):
        run(bits)
    run(Spec(5, rounding=Rounding(6), observer=fheq.MinMax(), accumulators=fheq.AccumulatorRange.WORST_CASE))
    run(Spec(5, symmetry=fheq.Symmetry.SYMMETRIC))
    q = fitted(name, 6)
    leaves, structure = jax.tree.flatten(q)
    for i in range(len(leaves)):
        changed = [leaf * 1.5 + 1 if j == i else leaf for j, leaf in enumerate(leaves)]
        fheq.fake_quant(graph, jax.tree.unflatten(structure, changed), *data)
    assert compilations(graph) == before > 0


@pytest.mark.parametrize("name", [GEMM, "average_pool_with_pads_and_ceil"])
def test_mapping_over_stacked_parameters_is_a_loop(name: str) -> None:
    """One step of the grid at most where a fused product rounds float32 differently: few entries, by few steps."""
    found = prepared(name)
    data = tuple(jnp.asarray(x[:40]) for x in found.data)
    each = [fitted(name, bits) for bits in (3, 5, 8)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack([jnp.asarray(v, jnp.float32) for v in leaves]), *each)
    mapped = jax.vmap(lambda q: fheq.fake_quant(found.graph, q, *data))(stacked)
    for i, q in enumerate(each):
        one = np.asarray(fheq.fake_quant(found.graph, jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), q), *data))
        far = np.abs(np.asarray(mapped[i]) - one) > 1e-4 * np.ptp(one)
        assert np.mean(far) < 0.02


@pytest.mark.parametrize("name", SEVERAL)
def test_gradients_reach_scales(name: str) -> None:
    """Finite everywhere; nonzero for the scales of all weights and of all tensors but those that stay inside of integers."""
    found = prepared(name)
    q = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), fitted(name, 4))

    def loss(q: fheq.QParams) -> jax.Array:
        outputs = as_tuple(fheq.fake_quant(found.graph, q, *found.data))
        wanted = as_tuple(fheq.evaluate(found.graph, *found.data))
        return sum(jnp.mean((a - b) ** 2) for a, b in zip(outputs, wanted))

    slopes = jax.jit(jax.grad(loss))(q)
    for part in (slopes.tensors, slopes.weights):
        for key, slope in part.items():
            assert np.all(np.isfinite(slope.scale)), key
            integers = key in q.tensors and any(p.name == key and p.type.dtype.kind != "f" for p in found.graph.inputs)
            if not integers:
                assert np.any(np.asarray(slope.scale) != 0), key


def test_a_step_against_the_gradient_lowers_the_loss() -> None:
    found = prepared(GEMM)
    q = jax.tree.map(lambda v: jnp.asarray(v, jnp.float32), fitted(GEMM, Spec(3, observer=fheq.MinMax())))
    wanted = fheq.evaluate(found.graph, *found.data)

    def loss(scale: jax.Array) -> jax.Array:
        changed = replace(q, tensors={**q.tensors, "x": replace(q.tensors["x"], scale=scale)})
        return jnp.mean((fheq.fake_quant(found.graph, changed, *found.data) - wanted) ** 2)

    wide = q.tensors["x"].scale * 1.7
    value, slope = jax.value_and_grad(loss)(wide)
    assert min(loss(wide - rate * slope) for rate in (0.003, 0.01, 0.03, 0.1)) < value


@pytest.mark.parametrize("factor", [0.5, 0.9, 2.0])
@pytest.mark.parametrize("rounding", [None, Rounding(4)])
def test_edited_steps_of_an_input_keep_the_real_range_of_what_reads_it(factor: float, rounding: Rounding | None) -> None:
    graph, data = load()
    x = data["x_train"][:200]
    q = fheq.fit(graph, fheq.calibrate(graph, x), Spec(4, rounding=rounding))
    (name,) = (port.name for port in graph.inputs)
    edited = replace(q, tensors={**q.tensors, name: replace(q.tensors[name], scale=factor * q.tensors[name].scale)})
    program = fheq.lower(graph, edited)
    integers = program.dequantize(fheq.simulate(program, *program.quantize(x)))[0]
    difference = np.abs(np.asarray(fheq.fake_quant(graph, edited, x)) - integers)
    assert np.mean(difference > 1e-4 * np.ptp(integers)) < 0.05  # ties, which float32 decides otherwise


@pytest.mark.parametrize("lsbs", [-1.0, 1.5, 99.0])
def test_low_bits_that_are_no_number_of_bits_are_refused(lsbs: float) -> None:
    found, q = prepared(GEMM), fitted(GEMM, Spec(4))
    name, accumulator = next(iter(q.accumulators.items()))
    edited = replace(q, accumulators={**q.accumulators, name: replace(accumulator, lsbs=np.asarray(lsbs))})
    with pytest.raises(fheq.FheqError, match=f"{name}.*lsbs"):
        fheq.lower(found.graph, edited)


@pytest.mark.parametrize("name", SEVERAL)
@pytest.mark.parametrize("rounding", [None, Rounding(6)], ids=["unrounded", "rounded"])
def test_it_computes_what_the_integers_compute(name: str, rounding: Rounding | None) -> None:
    """Float32 noise of a value is some 2^-20 of its range, so a value lies that near to a tie of a grid of 2^6 to 2^13 steps
    with a chance below 2 * 2^13 * 2^-20 < 2%; on the way to one output some values do. Such an output moves by a step of
    what follows: a few of 2^-4 of the output's range at 5 bits. All others agree to float32 noise.
    """
    found = prepared(name)
    spec = Spec(5, rounding=rounding, accumulators=fheq.AccumulatorRange.WORST_CASE)  # simulation wraps, this does not
    q = fitted(name, spec)
    program = fheq.lower(found.graph, q)
    integers = program.dequantize(*as_tuple(fheq.simulate(program, *program.quantize(*found.data))))
    for a, b in zip(as_tuple(fheq.fake_quant(found.graph, q, *found.data)), integers, strict=True):
        difference = np.abs(np.asarray(a) - b) / np.ptp(b)
        assert np.mean(difference > 1e-4) < 0.05
        assert np.max(difference) < 4 * 2.0**-4


@pytest.mark.parametrize("name", SEVERAL)
def test_many_bits_are_the_float_model(name: str) -> None:
    """A tensor on 2^18 steps is within 2^-19 of its range; ranges are widened at most twofold by the observer, and a chain
    of at most 10 tensors with gains below 8 keeps this below 10 * 8 * 2 * 2^-19 < 4e-4 of the range. Values that the
    squared-error observer clips are not there: the observer here is the extremes.
    """
    found = prepared(name)
    spec = Spec(18, observer=fheq.MinMax(), input_observer=fheq.MinMax())
    q = jax.tree.map(jnp.asarray, fitted(name, spec))
    q = replace(q, accumulators={k: replace(a, lsbs=jnp.zeros_like(a.lsbs)) for k, a in q.accumulators.items()})
    for a, b in zip(
        as_tuple(fheq.fake_quant(found.graph, q, *found.data)), as_tuple(fheq.evaluate(found.graph, *found.data))
    ):
        assert np.max(np.abs(np.asarray(a) - b)) < 4e-4 * np.ptp(b)


def test_slopes_that_are_no_numbers_are_0() -> None:
    """At the ends of a domain and beyond; elsewhere they are those of the function, forwards and backwards."""
    x, y = jnp.array([-1.0, 0.0, 4.0, 9.0]), jnp.array([1.0, 2.0, 0.0, 2.0])
    f = with_finite_slopes(lambda x, y: jnp.sqrt(x) / y)
    by_x, by_y = np.array([0, 0, 0, 1 / 12]), np.array([0, 0, 0, -3 / 4])
    backwards = jax.grad(lambda x, y: jnp.sum(f(x, y)), (0, 1))(x, y)
    forwards = [jax.jvp(lambda v: f(v, y), (x,), (jnp.ones(4),))[1], jax.jvp(lambda v: f(x, v), (y,), (jnp.ones(4),))[1]]
    for found in (backwards, forwards):
        np.testing.assert_allclose(found, [by_x, by_y])


def test_it_works_inside_other_transforms() -> None:
    found = prepared(GEMM)
    q = fitted(GEMM, 4)
    outside = np.asarray(fheq.fake_quant(found.graph, q, *found.data))
    inside = np.asarray(jax.jit(lambda q, x: fheq.fake_quant(found.graph, q, x))(q, *found.data))
    assert np.mean(np.abs(outside - inside) > 1e-4 * np.ptp(outside)) < 0.02  # a tie, as above


def test_a_graph_may_first_be_seen_inside_a_transform() -> None:
    """Quantizers that were saved, in a new process: nothing has planned the graph before."""
    found = prepared("movement_between_layers")
    q = fitted("movement_between_layers", 4)
    graph = fheq.import_onnx(found.proto)
    inside = jax.jit(lambda x: fheq.fake_quant(graph, q, x))(*found.data)
    np.testing.assert_array_equal(inside, jax.jit(lambda x: fheq.fake_quant(found.graph, q, x))(*found.data))


def test_more_bits_are_nearer() -> None:
    found = prepared(GEMM)
    wanted = fheq.evaluate(found.graph, *found.data)
    error = [np.mean((fheq.fake_quant(found.graph, fitted(GEMM, bits), *found.data) - wanted) ** 2) for bits in (2, 4, 6, 8)]
    assert np.all(np.diff(error) < 0)
