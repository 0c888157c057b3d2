"""One layer's inputs and weights under the optimal brain surgeon (Hassibi and Stork, NeurIPS 1992).

When a weight is fixed, at 0 or at a quantized value, the weights that are still free make up for it by least squares, on the
inputs that calibration data give the layer. Whole channels are removed so by `fheq.prune` (Optimal Brain Compression, arXiv
2208.11580), and weights are quantized so, one input after the other, by `fheq.round_weights` (GPTQ, arXiv 2210.17323).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.fake_quant import operand_values
from fheq.qparams import QParams
from fheq.steps import Linear

CHUNK = 64  # samples whose inputs are multiplied out together
RIDGE = 1e-4  # of the mean variance of a layer's inputs: what keeps few samples from fitting noise
STILL = 1e-12  # of their mean square: far above what float64 leaves of the variances of inputs that never change


def one_matrix(step: Linear) -> bool:
    """Whether all inputs of a step meet one matrix of weights: no groups, no stack of matrices."""
    return step.options.get("group", 1) == 1 and (step.form == "conv" or (step.form == "matmul" and step.weight.ndim == 2))


EXACT = QParams({}, {}, {})


def features(step: Linear, env: Mapping[str, Any], qparams: QParams = EXACT) -> Any:
    """The operand of a step for every sample, `(n, *operand shape)`, quantized if there are quantizers."""
    return jax.vmap(lambda value: operand_values(qparams, step.x, {step.x.key: value}))(env[step.x.key])


def _rows(step: Linear, x: Any) -> np.ndarray:
    """The inputs of a step's outputs, `(positions, features)`, the features of a channel side by side."""
    if step.form == "conv":
        patches = jax.lax.conv_general_dilated_patches(
            x.reshape(-1, *x.shape[2:]),
            step.weight.shape[2:],
            step.options["strides"],
            "VALID",
            rhs_dilation=step.options["dilations"],
        )
        x = jnp.moveaxis(patches, 1, -1)
    return np.asarray(x).reshape(-1, x.shape[-1])


def weight_matrix(step: Linear) -> np.ndarray:
    """The weights of a step, `(features, outputs)`."""
    return step.weight if step.form == "matmul" else step.weight.reshape(len(step.weight), -1).T


@dataclass(frozen=True)
class Reader:
    """A layer whose inputs are being pruned.

    Args:
        weight: `(channels, features per channel, outputs)`, in units of each output's standard deviation.
        inverse: inverse covariance of the inputs, `(channels * features, channels * features)`.
        units: standard deviation of each output.
        mean: means of the inputs; target: means of the outputs.
        importance: what an error of one standard deviation of each output costs.
    """

    step: Linear
    weight: np.ndarray
    inverse: np.ndarray
    units: np.ndarray
    mean: np.ndarray
    target: np.ndarray
    importance: np.ndarray

    @staticmethod
    def observe(step: Linear, exact: Any, pruned: Any, effect: np.ndarray | None = None) -> Reader:
        """The layer with the weights that give the model's results from the pruned copy's inputs, by least squares.

        Args:
            effect: what a squared error of each output costs; by default all count alike, in units of their variances.
        """
        own = weight_matrix(step)
        size, count = len(own), 0
        shapes = (size,), own.shape[1:], (size, size), own.shape, own.shape[1:]
        sums: list[np.ndarray] = [np.zeros(shape) for shape in shapes]
        for at in range(0, len(exact), CHUNK):
            y = _rows(step, exact[at : at + CHUNK]) @ own
            x = _rows(step, pruned[at : at + CHUNK])
            count += len(x)
            for i, term in enumerate((x.sum(0), y.sum(0), x.T @ x, x.T @ y, (y**2).sum(0))):
                sums[i] = sums[i] + term
        mean, target, square, cross, power = (s / count for s in sums)
        covariance = square - np.outer(mean, mean)
        ridge = max(RIDGE * np.trace(covariance) / size, STILL * np.trace(square) / size, 1e-30)
        inverse = np.linalg.inv(covariance + ridge * np.eye(size))
        fitted = own + inverse @ (cross - np.outer(mean, target) - covariance @ own)
        variance = np.maximum(power - target**2, 0)
        units = np.sqrt(np.maximum(variance, 1e-6 * variance.max() + 1e-30))
        rows = size // (step.weight.shape[0] if step.form == "matmul" else step.weight.shape[1])
        importance = np.full(len(units), 1 / len(units)) if effect is None else effect * units**2
        return Reader(step, (fitted / units).reshape(-1, rows, len(units)), inverse, units, mean, target, importance)

    @property
    def channels(self) -> int:
        """Input channels."""
        return len(self.weight)

    def errors(self) -> np.ndarray:
        """The error that the removal of each channel adds, the outputs weighed by their importance."""
        rows = self.weight.shape[1]
        blocks = self.inverse.reshape(self.channels, rows, self.channels, rows)
        own = blocks[np.arange(self.channels), :, np.arange(self.channels)]
        gone = np.trace(own, axis1=1, axis2=2) == 0
        # Inverses of these small blocks: `solve` takes ten times as long for as many right-hand sides as there are outputs.
        solved = np.linalg.inv(np.where(gone[:, None, None], np.eye(rows), own)) @ self.weight
        return np.einsum("kro,kro,o->k", self.weight, solved, self.importance)

    def without(self, channel: int) -> Reader:
        """The layer without a channel, the others making up for it."""
        rows = self.weight.shape[1]
        return self.fixed(slice(channel * rows, (channel + 1) * rows), np.zeros((rows, len(self.units))))

    def fixed(self, mine: slice, values: np.ndarray) -> Reader:
        """The layer with some inputs' weights at given values, `(inputs, outputs)`, the free ones making up for it."""
        flat = self.weight.reshape(len(self.inverse), -1)
        gain = self.inverse[:, mine] @ np.linalg.inv(self.inverse[mine, mine])
        weight, inverse = flat - gain @ (flat[mine] - values), self.inverse - gain @ self.inverse[mine]
        weight[mine], inverse[mine], inverse[:, mine] = values, 0, 0
        return replace(self, weight=weight.reshape(self.weight.shape), inverse=inverse)

    def pruned(self, alive: np.ndarray) -> Linear:
        """The step with its new weight and bias."""
        weight = np.where(alive[:, None, None], self.weight, 0) * self.units
        matrix = weight.reshape(len(self.inverse), -1)
        bias = self.target - self.mean @ matrix
        if self.step.form == "matmul":
            return replace(self.step, weight=matrix, bias=self.step.bias + bias)
        shape = self.step.weight.shape
        offset = (np.ravel(self.step.bias) + bias).reshape(-1, *(1,) * (len(shape) - 2))
        return replace(self.step, weight=matrix.T.reshape(shape), bias=offset)
