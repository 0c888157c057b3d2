"""Value numbering: which elements of a value are equal because the same is computed of the same.

Source: Alpern, Wegman, Zadeck, "Detecting equality of variables in programs", POPL 1988.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fheq.passes.rows import distinct
from fheq.program import (
    Convolution,
    Gather,
    Instruction,
    IntProgram,
    Lookup,
    MatMul,
    Plus,
    Round,
    Scale,
    Shift,
)

ELEMENTWISE = (Shift, Scale, Plus, Round, Lookup)


def first_equals(
    program: IntProgram, known: Mapping[str, np.ndarray], integers: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """For each element, flat, the first one in its value that is equal to it whatever the inputs are.

    Args:
        known: elements whose integer is known, and `integers` those integers.
    """
    first: dict[str, np.ndarray] = {}
    numbers: dict[str, np.ndarray] = {}
    count = 0
    for entry in program.inputs:
        size = int(np.prod(program.values[entry.value].shape))
        numbers[entry.value] = _numbered(count + np.arange(size), known[entry.value], integers[entry.value])
        first[entry.value] = np.arange(size)
        count += size
    for instruction in program.instructions:
        args = [numbers[a] for a in instruction.args]
        shape = program.values[instruction.out].shape
        if isinstance(instruction, Gather):
            found = _gathered(instruction, args)
            first[instruction.out] = np.arange(len(found))
        elif isinstance(instruction, ELEMENTWISE) and any(map(_all_different, args)):
            first[instruction.out] = np.arange(args[0].size)
            found = count + first[instruction.out]
            count += len(found)
        else:
            keys = _keys(instruction, args, shape, program.values[instruction.args[0]].shape)
            at, which = distinct(keys)
            first[instruction.out] = at[which]
            found = count + which
            count += len(at)
        numbers[instruction.out] = _numbered(found, known[instruction.out], integers[instruction.out])
    return first


def _all_different(numbers: np.ndarray) -> bool:
    """Whether the unknown elements are plainly different, as those of an input or of a product whose weights all differ."""
    unknown = numbers[numbers >= 0]
    return bool(np.all(unknown[1:] > unknown[:-1]))


def _numbered(found: np.ndarray, known: np.ndarray, integers: np.ndarray) -> np.ndarray:
    """Numbers of elements; a known one has a negative number that stands for its integer."""
    value = integers.ravel()
    return np.where(known.ravel(), np.where(value >= 0, -2 * value - 1, 2 * value), found)


def _gathered(instruction: Gather, args: list[np.ndarray]) -> np.ndarray:
    flat = np.concatenate(args)
    return flat if instruction.index is None else flat[np.maximum(instruction.index.ravel(), 0)]  # fillers are known


def _keys(
    instruction: Instruction, args: list[np.ndarray], shape: tuple[int, ...], arg_shape: tuple[int, ...]
) -> np.ndarray:
    """For each element of the result, a row that says what is computed of what."""
    own = lambda array: np.broadcast_to(array, shape).ravel()
    if isinstance(instruction, (Shift, Scale)):
        return np.stack([args[0], own(instruction.amount if isinstance(instruction, Shift) else instruction.factor)], 1)
    if isinstance(instruction, (Plus, Round)):
        return np.stack(args, 1)
    if isinstance(instruction, Lookup):
        return np.stack([args[0], own(instruction.group)], 1)
    if isinstance(instruction, Convolution):
        return _convolution_keys(instruction, shape)
    x = args[0].reshape(arg_shape)
    if isinstance(instruction, MatMul):
        return _matmul_keys(instruction, x, shape)
    return x.reshape(-1, arg_shape[-1])


def _matmul_keys(instruction: MatMul, x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    if instruction.weight.ndim > 2 or x.ndim < 2:
        return np.arange(int(np.prod(shape)))[:, None]
    weight = instruction.weight if instruction.left else instruction.weight.T
    rows = np.swapaxes(x, -1, -2) if instruction.left else x
    column = _classes(weight)
    row = _classes(rows.reshape(-1, rows.shape[-1])).reshape(rows.shape[:-1])
    keys = np.stack(np.broadcast_arrays(row[..., None], column), -1)
    return (np.swapaxes(keys, -2, -3) if instruction.left else keys).reshape(-1, 2)


def _convolution_keys(instruction: Convolution, shape: tuple[int, ...]) -> np.ndarray:
    """Channels of one group with equal weights are equal, place by place."""
    channels = shape[1]
    group = np.repeat(np.arange(instruction.group), channels // instruction.group)
    channel = _classes(np.concatenate([group[:, None], instruction.weight.reshape(channels, -1)], axis=1))
    place = np.arange(int(np.prod(shape))).reshape(shape)[:, :1]
    return np.stack(np.broadcast_arrays(channel.reshape(-1, *(1,) * (len(shape) - 2)), place), -1).reshape(-1, 2)


def _classes(rows: np.ndarray) -> np.ndarray:
    """The class of each row; equal rows are of one class."""
    return distinct(rows)[1]
