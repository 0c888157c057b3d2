"""Quantizers of weights, fitted to their extremes."""

from __future__ import annotations

import numpy as np

from fheq.affine import Affine, as_float32
from fheq.errors import describe
from fheq.integer_weights import Reading
from fheq.spec import BitsError, Granularity, Spec, Symmetry
from fheq.steps import Linear


def fit_weight(read: Reading, step: Linear, spec: Spec) -> Affine:
    """The quantizer of a weight, fitted to its extremes."""
    override = spec.override(step.weight_name, step.out, step.node.name)
    granularity = override.granularity or spec.weights
    if override.n_bits is None and spec.n_bits is None:
        where = f"weight {step.weight_name!r} of {describe(step.node)}"
        raise BitsError(f"{where} has no quantizer in the model: give n_bits, or quantize it there")
    bits = override.n_bits or spec.bits()["op_weights"]
    weight = read.absorbed(step)
    axis: int | None = step.weight_axis
    rows = np.moveaxis(weight, step.weight_axis, 0).reshape(weight.shape[step.weight_axis], -1)
    if granularity is Granularity.PER_TENSOR:
        rows, axis = rows.reshape(1, -1), None
    leaves = weight_quantizer(rows, bits, spec.symmetry)
    if axis is None:
        leaves = tuple(leaf[0] for leaf in leaves)
    return Affine(*leaves, np.zeros_like(leaves[0]), axis, signed=True)


def weight_quantizer(
    rows: np.ndarray, bits: int, symmetry: Symmetry
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scale, zero point, qmin and qmax of each row `(C, n)`."""
    low = np.minimum(rows.min(axis=1), 0)
    high = np.maximum(rows.max(axis=1), 0)
    top = np.maximum(np.maximum(-low, high), 1e-30)
    half = max(2.0 ** (bits - 1) - 1, 1.0)
    symmetric = (as_float32(top / half), np.zeros_like(top), np.full_like(top, -half), np.full_like(top, half))
    if symmetry is Symmetry.SYMMETRIC:
        return symmetric
    step = as_float32(np.maximum(high - low, 1e-30) / (2.0**bits - 1))
    qmin = np.full_like(top, -(2.0 ** (bits - 1)))
    asymmetric = (step, qmin - np.round(low / step), qmin, qmin + 2.0**bits - 1)
    if symmetry is Symmetry.ASYMMETRIC:
        return asymmetric
    better = _row_error(rows, asymmetric) < _row_error(rows, symmetric)
    return tuple(np.where(better, a, s) for a, s in zip(asymmetric, symmetric))  # type: ignore[return-value]


def _row_error(rows: np.ndarray, quantizer: tuple[np.ndarray, ...]) -> np.ndarray:
    scale, zero, qmin, qmax = (leaf[:, None] for leaf in quantizer)
    moved = rows / scale
    np.rint(moved, out=moved)
    np.minimum(np.maximum(moved, qmin - zero, out=moved), qmax - zero, out=moved)
    moved *= scale
    moved -= rows
    return np.sum(np.square(moved, out=moved), axis=1)
