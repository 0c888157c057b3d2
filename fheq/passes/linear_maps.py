"""The linear instructions of a program on the host: applied to numbers, and traced back from outputs to inputs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from fheq.program import Convolution, MatMul

LinearMap = MatMul | Convolution


def apply_weight(instruction: LinearMap, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """What the instruction makes of `x` with another weight of the same shape, in float64: exact below 2^53."""
    x, weight = x.astype(np.float64), weight.astype(np.float64)
    if isinstance(instruction, MatMul):
        return np.matmul(weight, x) if instruction.left else np.matmul(x, weight)
    spatial = _out_spatial(instruction, x.shape)
    grouped = _by_group(instruction, weight)
    y = np.zeros((x.shape[0], instruction.group, grouped.shape[1], int(np.prod(spatial))))
    for place, window in enumerate(_windows(instruction, spatial)):
        block = x[(slice(None), slice(None), *window)].reshape(x.shape[0], instruction.group, grouped.shape[2], -1)
        y += np.matmul(grouped[..., place], block)
    return y.reshape(x.shape[0], len(weight), *spatial)


def elements_read(instruction: LinearMap, live: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Which elements of its argument, of the given shape, enter the live results with a weight that is not zero."""
    used, wanted = (instruction.weight != 0).astype(np.float32), live.astype(np.float32)
    if isinstance(instruction, MatMul):
        return _matmul_reads(instruction, used, wanted, shape)
    grouped = np.swapaxes(_by_group(instruction, used), 1, 2)
    wanted = wanted.reshape(live.shape[0], instruction.group, grouped.shape[2], -1)
    read = np.zeros(shape, bool)
    for place, window in enumerate(_windows(instruction, live.shape[2:])):
        here = np.matmul(grouped[..., place], wanted) > 0
        view = read[(slice(None), slice(None), *window)]
        view |= here.reshape(view.shape)
    return read


def _matmul_reads(instruction: MatMul, used: np.ndarray, wanted: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if instruction.left:
        read = np.matmul(np.swapaxes(used, -1, -2), wanted) > 0
    else:
        read = np.matmul(wanted, np.swapaxes(used, -1, -2)) > 0
    while read.ndim > len(shape):
        read = read.any(axis=0)
    spread = tuple(a for a, n in enumerate(shape) if n == 1 and read.shape[a] != 1)
    return read.any(axis=spread, keepdims=True)


def _by_group(instruction: Convolution, weight: np.ndarray) -> np.ndarray:
    """(groups, outputs per group, inputs per group, places of the kernel)."""
    return weight.reshape(instruction.group, len(weight) // instruction.group, weight.shape[1], -1)


def _out_spatial(instruction: Convolution, shape: tuple[int, ...]) -> tuple[int, ...]:
    kernel = instruction.weight.shape[2:]
    sizes = zip(shape[2:], kernel, instruction.strides, instruction.dilations)
    return tuple((size - d * (k - 1) - 1) // s + 1 for size, k, s, d in sizes)


def _windows(instruction: Convolution, out: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """The slices of the input that each place of the kernel meets."""
    for place in np.ndindex(*instruction.weight.shape[2:]):
        starts = [p * d for p, d in zip(place, instruction.dilations)]
        yield tuple(slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, out, instruction.strides))
