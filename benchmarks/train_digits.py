"""Trains the digits classifier that the package ships: `python -m benchmarks.train_digits [FOLDER]`.

A convolution and a dense layer on scikit-learn's 8x8 digits, trained with plain Adam in JAX. Every seed is fixed, so the
same versions of JAX and scikit-learn write the same files again. Writes digits.onnx and digits.npz, which holds calibration
images (x_train, y_train: part of the training images) and test images (x_test, y_test: seen by no training step).
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

CHANNELS = 8
PIXEL_MAX = 16
TEST, CALIBRATION = 400, 300
EPOCHS, BATCH, RATE, DECAY = 150, 64, 1e-2, 0.3
OPSET, IR_VERSION = 22, 10  # the newest that every onnx the package allows (1.17 and later) knows
DATA = Path(__file__).parent.parent / "fheq" / "data"

Params = dict[str, jax.Array]


def init(key: jax.Array) -> Params:
    """Weights to start from."""
    first, second = jax.random.split(key)
    features = CHANNELS * 16
    return {
        "conv_weight": jax.random.normal(first, (CHANNELS, 1, 3, 3)) * np.sqrt(2 / 9),
        "conv_bias": jnp.zeros(CHANNELS),
        "dense_weight": jax.random.normal(second, (10, features)) * np.sqrt(1 / features),
        "dense_bias": jnp.zeros(10),
    }


def logits(params: Params, pixels: jax.Array) -> jax.Array:
    """Scores of the ten digits for pixels from 0 to 1, (N, 1, 8, 8)."""
    hidden = jax.lax.conv_general_dilated(pixels, params["conv_weight"], (2, 2), [(1, 1), (1, 1)])
    hidden = jax.nn.relu(hidden + params["conv_bias"][:, None, None])
    return hidden.reshape(len(pixels), -1) @ params["dense_weight"].T + params["dense_bias"]


def loss(params: Params, pixels: jax.Array, labels: jax.Array) -> jax.Array:
    """Mean cross entropy, with label smoothing that keeps scores small and so easy to quantize."""
    targets = 0.9 * jax.nn.one_hot(labels, 10) + 0.01
    return -jnp.mean(jnp.sum(targets * jax.nn.log_softmax(logits(params, pixels)), axis=1))


def train(pixels: np.ndarray, labels: np.ndarray, seed: int = 0) -> Params:
    """Adam with a cosine schedule and weight decay."""
    images, targets = jnp.asarray(pixels), jnp.asarray(labels)
    steps = EPOCHS * (len(labels) // BATCH)
    params = init(jax.random.key(seed))
    zeros = jax.tree.map(jnp.zeros_like, params)

    def step(state: tuple[Params, Params, Params], count: jax.Array) -> tuple[tuple[Params, Params, Params], None]:
        params, mean, square = state
        index = jax.random.choice(jax.random.fold_in(jax.random.key(seed + 1), count), len(targets), (BATCH,), replace=False)
        grads = jax.grad(loss)(params, images[index], targets[index])
        mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, mean, grads)
        square = jax.tree.map(lambda s, g: 0.99 * s + 0.01 * g**2, square, grads)
        rate = RATE * 0.5 * (1 + jnp.cos(jnp.pi * count / steps))
        one, two = 1 - 0.9 ** (count + 1), 1 - 0.99 ** (count + 1)
        update = lambda p, m, s: p - rate * (m / one / (jnp.sqrt(s / two) + 1e-8) + DECAY * p)
        return (jax.tree.map(update, params, mean, square), mean, square), None

    (params, _, _), _ = jax.jit(lambda state: jax.lax.scan(step, state, jnp.arange(steps)))((params, zeros, zeros))
    return params


def export(params: Params, path: Path) -> None:
    """Writes the ONNX model: it reads pixels from 0 to 16, as scikit-learn gives them."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    arrays = {name: np.asarray(value, np.float32) for name, value in params.items()}
    arrays["conv_weight"] = arrays["conv_weight"] / PIXEL_MAX
    nodes = [
        helper.make_node(
            "Conv",
            ["image", "conv_weight", "conv_bias"],
            ["conv"],
            name="conv",
            kernel_shape=[3, 3],
            strides=[2, 2],
            pads=[1, 1, 1, 1],
        ),
        helper.make_node("Relu", ["conv"], ["hidden"], name="relu"),
        helper.make_node("Flatten", ["hidden"], ["features"], name="flatten"),
        helper.make_node("Gemm", ["features", "dense_weight", "dense_bias"], ["scores"], name="dense", transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 10])],
        [numpy_helper.from_array(value, name) for name, value in arrays.items()],
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION, producer_name="fheq train_digits"
    )
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString(deterministic=True))


def main(folder: Path = DATA) -> None:
    """Trains, says how accurate the model is, and writes both files."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = digits.images[:, None].astype(np.float32)
    labels = digits.target.astype(np.int64)
    order = np.random.default_rng(0).permutation(len(labels))
    test, rest = order[:TEST], order[TEST:]
    params = train(images[rest] / PIXEL_MAX, labels[rest])
    for name, part in (("training", rest), ("test", test)):
        scores = np.asarray(logits(params, jnp.asarray(images[part] / PIXEL_MAX)))
        print(f"{name}: {np.mean(scores.argmax(axis=1) == labels[part]):.2%} of {len(part)} images")
    folder.mkdir(parents=True, exist_ok=True)
    export(params, folder / "digits.onnx")
    calibration = rest[:CALIBRATION]
    np.savez_compressed(
        folder / "digits.npz",
        x_train=images[calibration],
        y_train=labels[calibration],
        x_test=images[test],
        y_test=labels[test],
    )
    for file in ("digits.onnx", "digits.npz"):
        print(f"{folder / file}: {(folder / file).stat().st_size:,} bytes")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
