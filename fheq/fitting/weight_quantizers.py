"""Quantizers of weights, fitted to their extremes.

Weights that are whole multiples of a step of their own, as those of binary, ternary and baked-in quantized networks are,
keep it: they are exact in the smallest integers, and accumulators as narrow as can be.
"""

from __future__ import annotations

import numpy as np

from fheq.affine import Affine, as_float32
from fheq.graph import describe
from fheq.integers.integer_weights import Reading
from fheq.spec import BitsError, Granularity, Spec, Symmetry
from fheq.steps import Linear

MULTIPLE = 2.0**-20  # relative error of what counts as a whole multiple; weights are float32


def fit_weight(read: Reading, step: Linear, spec: Spec, own: bool = True) -> Affine:
    """The quantizer of a weight, fitted to its extremes, or to the steps that are its own."""
    override = spec.override(step.weight_name, step.out, step.node.name)
    granularity = override.granularity or spec.weights
    if override.n_bits is None and spec.n_bits is None:
        where = f"weight {step.weight_name!r} of {describe(step.node)}"
        raise BitsError(f"{where} has no quantizer in the model: give n_bits, or quantize it there")
    bits = override.n_bits or spec.bits()["op_weights"]
    weight = read.absorbed(step)
    axis: int | None = step.weight_axis
    rows = step.rows(weight)
    if granularity is Granularity.PER_TENSOR:
        rows, axis = rows.reshape(1, -1), None
    leaves = weight_quantizer(rows, bits, spec.symmetry)
    leaves = on_own_steps(rows, leaves) if own else leaves
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


def on_own_steps(
    rows: np.ndarray, leaves: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A quantizer of rows `(C, n)` with the steps of those that have their own, where no more integers are needed."""
    scale, zero, qmin, qmax = leaves
    steps = own_steps(rows, np.maximum((qmax - qmin) // 2, 1))
    own = steps > 0
    reach = np.round(np.max(np.abs(rows), axis=1) / np.where(own, steps, 1))
    return (
        np.where(own, as_float32(steps), scale),
        np.where(own, 0, zero),
        np.where(own, -reach, qmin),
        np.where(own, reach, qmax),
    )


def own_steps(rows: np.ndarray, most: np.ndarray) -> np.ndarray:
    """The largest step of which each row `(C, n)` holds multiples, up to `most` `(C,)` of it; 0 where there is none."""
    size = np.abs(rows)
    top = np.max(size, axis=1, initial=0.0)
    size = np.where(size <= MULTIPLE * top[:, None], 0, size)
    least = np.min(np.where(size > 0, size, np.inf), axis=1, initial=np.inf)
    steps = np.zeros(len(rows))
    for parts in range(1, int(np.max(most, initial=0)) + 1):  # of the smallest weight
        tried = np.flatnonzero((steps == 0) & (top > 0) & (parts * top <= (most + 0.5) * least))
        if not len(tried):
            break
        multiple = size[tried] / (least[tried, None] / parts)
        whole = np.round(multiple)
        fits = np.all(np.abs(multiple - whole) <= MULTIPLE * multiple, axis=1)
        exact = np.sum(size[tried] * whole, axis=1) / np.maximum(np.sum(whole * whole, axis=1), 1)  # least squares
        steps[tried[fits]] = exact[fits]
    return _equalled(steps)


def _equalled(steps: np.ndarray) -> np.ndarray:
    """Steps that float32 weights cannot tell apart made equal: what is equal in two channels (a tie of classes) is to stay
    so."""
    order = np.argsort(steps)
    ascending = steps[order]
    group = np.cumsum(np.diff(ascending, prepend=ascending[:1]) > ascending * MULTIPLE)
    found = np.empty_like(steps)
    found[order] = (np.bincount(group, ascending) / np.bincount(group))[group]
    return found


def is_exact(rows: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Whether rows `(C, n)`, not all of zeros, are whole multiples of their scales `(C,)`."""
    multiple = rows / scale[:, None]
    return np.any(rows != 0, axis=1) & np.all(np.abs(multiple - np.round(multiple)) <= MULTIPLE * np.abs(multiple), axis=1)


def _row_error(rows: np.ndarray, quantizer: tuple[np.ndarray, ...]) -> np.ndarray:
    scale, zero, qmin, qmax = (leaf[:, None] for leaf in quantizer)
    moved = rows / scale
    np.rint(moved, out=moved)
    np.minimum(np.maximum(moved, qmin - zero, out=moved), qmax - zero, out=moved)
    moved *= scale
    moved -= rows
    return np.sum(np.square(moved, out=moved), axis=1)
