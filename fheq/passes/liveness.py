"""Liveness: which elements of each value some output depends on."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fheq.passes.linear_maps import elements_read
from fheq.program import Convolution, Gather, Instruction, IntProgram, MatMul, Scale, SumLast


def live_elements(
    program: IntProgram, known: Mapping[str, np.ndarray], first: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Boolean arrays of the values' shapes: the elements that must be computed.

    Args:
        known: elements whose integer is known, which nobody computes.
        first: flat, for each element the one in its value that is read in its place.
    """
    live = {name: np.zeros(value.shape, bool) for name, value in program.values.items()}

    def mark(name: str, need: np.ndarray) -> None:
        live[name].ravel()[first[name][(need & ~known[name]).ravel()]] = True

    for entry in program.outputs:
        mark(entry.value, np.ones(program.values[entry.value].shape, bool))
    for instruction in reversed(program.instructions):
        if live[instruction.out].any():
            shapes = [program.values[a].shape for a in instruction.args]
            for arg, need in zip(instruction.args, reads(instruction, live[instruction.out], shapes)):
                mark(arg, need)
    return live


def reads(instruction: Instruction, live: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    """The elements of each argument that the live elements of the result depend on."""
    if isinstance(instruction, Gather):
        return _gathered(instruction, live, shapes)
    if isinstance(instruction, (MatMul, Convolution)):
        return [elements_read(instruction, live, shapes[0])]
    if isinstance(instruction, SumLast):
        return [np.broadcast_to(live[..., None], shapes[0])]
    if isinstance(instruction, Scale):
        return [live & (instruction.factor != 0)]
    return [live] * len(instruction.args)


def _gathered(instruction: Gather, live: np.ndarray, shapes: list[tuple[int, ...]]) -> list[np.ndarray]:
    sizes = [int(np.prod(s)) for s in shapes]
    flat = np.zeros(sum(sizes), bool)
    index = np.arange(live.size) if instruction.index is None else instruction.index.ravel()
    flat[index[live.ravel() & (index >= 0)]] = True
    return [part.reshape(s) for part, s in zip(np.split(flat, np.cumsum(sizes)[:-1]), shapes)]
