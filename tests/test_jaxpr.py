"""JAX functions as graphs, against the functions themselves."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import as_tuple

import fheq
from fheq.errors import DataError, UnsupportedError

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
RNG = np.random.default_rng(0)
NHWC = ("NHWC", "HWIO", "NHWC")


def weights(*shape: int) -> np.ndarray:
    fan = np.prod(shape[:-1])
    return (np.random.default_rng(sum(shape)).normal(size=shape) / np.sqrt(fan)).astype(np.float32)


def mlp(x):
    h = jax.nn.gelu(x @ weights(5, 8) + 0.1)
    return jax.nn.softplus(h @ weights(8, 3))


def network_on_images(x):
    y = jax.nn.relu(lax.conv_general_dilated(x, weights(3, 3, 2, 4), (1, 1), "SAME", dimension_numbers=NHWC))
    y = lax.reduce_window(y, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    options = {"dimension_numbers": NHWC, "feature_group_count": 2}
    y = jax.nn.silu(lax.conv_general_dilated(y, weights(3, 3, 2, 4), (1, 1), [(0, 1), (1, 0)], **options))
    y = lax.reduce_window(y, 0.0, lax.add, (1, 2, 2, 1), (1, 1, 1, 1), "SAME") / 4
    return y.reshape(y.shape[0], -1) @ weights(16, 3)


def attention(x):
    q, k, v = (x @ weights(4, 4, n)[..., 0] for n in (1, 2, 3))
    scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", q, k) / 2, axis=-1)
    return jnp.einsum("bqk,bkd->bqd", scores, v) @ weights(4, 2)


def layer_norm(x):
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) * lax.rsqrt(variance + 1e-5) * weights(6) + 0.5


def recurrent(x):
    def step(h, xt):
        h = jnp.tanh(xt @ weights(3, 4) + h @ weights(4, 4))
        return h, h

    last, every = lax.scan(step, jnp.zeros((x.shape[0], 4)), jnp.swapaxes(x, 0, 1))
    return last, jnp.swapaxes(every, 0, 1)


def backwards(x):
    every = lax.scan(lambda h, xt: (h + xt[:, 0], h), jnp.zeros(x.shape[0]), jnp.swapaxes(x, 0, 1), reverse=True)[1]
    return every.T


def movement(x):
    y = jnp.flip(x, 1)[:, jnp.array([0, 2, 1])]
    y = jnp.roll(jnp.pad(y, ((0, 0), (1, 2)), constant_values=0.5), 1, axis=1)
    y = lax.pad(y.at[:, 1].set(2.0), -1.0, ((0, 0, 0), (0, 1, 1)))
    a, b = jnp.split(y, [4], axis=1)
    return {"stacked": jnp.stack([y, y**2], 1), "tiled": jnp.tile(a, (1, 2)), "moved": lax.dynamic_slice_in_dim(b, 1, 2, 1)}


def elementwise(x):
    y = jnp.where(x > 0, jnp.log1p(jnp.abs(x)), jnp.expm1(x))
    y = y + jnp.round(x) * jnp.sign(x) - jnp.clip(x, -0.5, 0.5) ** 3 + jnp.exp2(x) * jnp.cbrt(x)
    return y + jnp.where((x < 1) & ~(x < -1), jnp.minimum(x, 0.2), jax.nn.elu(x)) + jax.scipy.special.erfc(x)


def reductions(x):
    every = (x > -3).all(1) | (x > 1).any(1)
    return x.max(1), x.min(1, keepdims=True), jnp.cumsum(x, 1), jnp.where(every, x.prod(1), x.mean(1))


def mapped_over_samples(x):
    return jax.vmap(lambda s: jax.nn.elu(weights(3, 5) @ s) + jnp.cumsum(s)[:3])(x)


def classifier(x):
    scores = x @ weights(5, 4)
    return jnp.argmax(scores, -1), jax.nn.log_softmax(scores)


def embedding(tokens):
    return jnp.asarray(weights(7, 3))[tokens].reshape(tokens.shape[0], -1) @ weights(12, 2)


def transposed_convolution(x):
    return lax.conv_transpose(x, weights(3, 3, 2, 3), (2, 2), "SAME", dimension_numbers=NHWC)


def with_keys(x):
    """Random weights of a known key are constants; so is a branch that is known."""
    y = x @ jax.random.normal(jax.random.key(0), (5, 2))
    return lax.cond(jnp.array(True), lambda v: v * 2, lambda v: v, y)


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(size=shape).astype(np.float32)


FUNCTIONS = {
    mlp: normal(60, 5),
    network_on_images: normal(60, 6, 6, 2),
    attention: normal(60, 3, 4),
    layer_norm: normal(60, 6),
    recurrent: normal(60, 3, 3),
    backwards: normal(60, 4, 2),
    movement: normal(60, 3),
    elementwise: normal(60, 4),
    reductions: normal(60, 3),
    mapped_over_samples: normal(60, 5),
    classifier: normal(60, 5),
    embedding: RNG.integers(0, 7, (60, 4)).astype(np.int32),
    transposed_convolution: normal(10, 3, 3, 2),
    with_keys: normal(60, 5),
}


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_a_function_is_imported_as_it_computes(fn) -> None:
    x = FUNCTIONS[fn]
    graph = fheq.from_jax(fn, x)
    assert (graph.inputs[0].type.shape, graph.inputs[0].batch_axis) == ((1, *x.shape[1:]), 0)
    want = jax.tree.leaves(fn(x))
    for got, exact in zip(as_tuple(fheq.evaluate(graph, x)), want, strict=True):
        np.testing.assert_allclose(got, exact, atol=1e-5)


@pytest.mark.parametrize("fn", [network_on_images, attention, layer_norm], ids=lambda fn: fn.__name__)
def test_the_integers_of_a_function_are_close_to_it(fn) -> None:
    """At 7 bits."""
    x = FUNCTIONS[fn]
    graph = fheq.from_jax(fn, x)
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, x), 7))
    (simulated,) = program.dequantize(fheq.simulate(program, *program.quantize(x)))
    want = np.asarray(fn(x))
    assert np.mean((simulated - want) ** 2) < 0.01 * np.var(want)


def test_softmax_that_is_spelled_out_is_one_node() -> None:
    plain = lambda x: jnp.exp(x) / jnp.exp(x).sum(1, keepdims=True)
    found = [[n.op for n in fheq.from_jax(fn, normal(3, 4)).nodes] for fn in (jax.nn.softmax, jax.nn.log_softmax, plain)]
    assert found[:2] == [["Softmax"], ["LogSoftmax"]]
    other = lambda x: jnp.exp(x) / jnp.exp(2 * x).sum(1, keepdims=True)
    assert "Softmax" not in [n.op for n in fheq.from_jax(other, normal(3, 4)).nodes]


def test_two_inputs() -> None:
    a, b = normal(9, 3), normal(9, 3)
    graph = fheq.from_jax(lambda x, y: (x * y, x), a, b)
    assert [port.name for port in (*graph.inputs, *graph.outputs)] == ["x0", "x1", "y0", "y1"]
    product, same = fheq.evaluate(graph, a, b)
    np.testing.assert_allclose(product, a * b, rtol=1e-6)
    np.testing.assert_array_equal(same, a)


@pytest.mark.parametrize(
    ("fn", "cause"),
    [
        (lambda x: jnp.sort(x, axis=1), r"'sort' at .*test_jaxpr.py:\d+.*no form"),
        (lambda x: lax.while_loop(lambda v: v.sum() < 9, lambda v: v + 1, x), "'while'"),
        (lambda x: x[:, jnp.argmax(x[0])], "'(gather|dynamic_slice)'.*(depends|depend) on data"),
    ],
)
def test_what_has_no_form_is_refused_with_its_primitive_and_line(fn, cause) -> None:
    with pytest.raises(UnsupportedError, match=cause):
        fheq.from_jax(fn, normal(1, 3))


def test_samples_must_not_depend_on_each_other() -> None:
    with pytest.raises(DataError, match="depends on the other samples"):
        fheq.from_jax(lambda x: x - x.mean(0), normal(4, 3))
    with pytest.raises(DataError, match="give as many"):
        fheq.from_jax(lambda a, b: a + b, normal(4, 3), normal(3, 3))
    with pytest.raises(DataError, match="give example inputs"):
        fheq.from_jax(lambda: 1)
