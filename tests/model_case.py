"""What a small model of the tests is, and how its tables of models register it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from build_models import model, node


def weights(*shape: int, low: float = -1.0, high: float = 1.0, seed: int = 0) -> np.ndarray:
    """Random float32 values that depend on the arguments alone, so that a case is the same whichever tests run."""
    rng = np.random.default_rng([seed, *shape])
    return rng.uniform(low, high, shape).astype(np.float32)


def normal(*shape: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Makes `(n, *shape)` standard normal values."""
    return lambda rng, n: rng.normal(size=(n, *shape)).astype(np.float32)


def tokens(count: int, *shape: int) -> Callable[[np.random.Generator, int], np.ndarray]:
    """Makes `(n, *shape)` integers below `count`."""
    return lambda rng, n: rng.integers(0, count, size=(n, *shape))


@dataclass(frozen=True)
class Case:
    """A model and its inputs.

    Args:
        build: makes the model.
        inputs: by name, makes n samples of each input.
        lookups: table instructions that the program may have; None where the case does not say.
        r2: bound on the R2 of the 8-bit program against the float model; see `tests/test_integer.py`.
        bits: n_bits of the program that is compiled.
    """

    build: Callable[[], onnx.ModelProto]
    inputs: Mapping[str, Callable[[np.random.Generator, int], np.ndarray]]
    lookups: int | None = None
    r2: float = 0.995
    bits: int = 3

    def data(self, n: int, seed: int = 0) -> tuple[np.ndarray, ...]:
        """n samples of every input."""
        rng = np.random.default_rng(seed)
        return tuple(make(rng, n) for make in self.inputs.values())


CASES: dict[str, Case] = {}


def case(**options: Any) -> Callable[[Callable[[], onnx.ModelProto]], Callable[[], onnx.ModelProto]]:
    """Registers a model under the name of the function that builds it."""

    def register(build: Callable[[], onnx.ModelProto]) -> Callable[[], onnx.ModelProto]:
        CASES[build.__name__] = Case(build, **options)
        return build

    return register


def batch_norm(x: str, out: str, channels: int) -> tuple[onnx.NodeProto, dict[str, np.ndarray]]:
    """A BatchNormalization node and its parameters."""
    known = {
        f"{out}_gamma": weights(channels, low=0.5, seed=1),
        f"{out}_beta": weights(channels, seed=2),
        f"{out}_mean": weights(channels, seed=3),
        f"{out}_var": weights(channels, low=0.5, seed=4),
    }
    return node("BatchNormalization", [x, *known], [out]), known


def chain(
    nodes: Sequence[onnx.NodeProto], shape: Sequence[int], known: Mapping[str, np.ndarray], **options: Any
) -> onnx.ModelProto:
    """A model from x (N, *shape) to y."""
    return model(nodes, {"x": ["N", *shape]}, ["y"], known, **options)
