"""Elementwise regions: which source element each tensor element depends on, and its value as a function of it.

Between two linear layers a model has elementwise ops and movement, in any order and with any branches. Each element of a
tensor in there is a function of **one** element of one integer tensor, the region's source. This module finds that element
and evaluates that function; `fheq.planning.planner` decides where regions begin and end, `fheq.tables` tabulates them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental import enable_x64

from fheq.errors import UnsupportedError
from fheq.graph import Graph, Node
from fheq.interpret import run_node
from fheq.ops.table import lookup

FILLER = -1
RESHAPES = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
"""Movements that keep the order of elements."""
COPIES = (*RESHAPES, "DepthToSpace", "Expand", "Gather", "Slice", "SpaceToDepth", "Split", "Tile", "Transpose")
"""Movements that put no known values beside what they move."""


@dataclass(frozen=True)
class Movement:
    """Where each element of a moved tensor comes from (all arrays are flat, one entry per output element).

    Args:
        inputs: names of the inputs that carry data.
        which: position in `inputs`, or FILLER for an element that is no copy.
        element: flat index into that input.
        filler: real value of the elements that are no copies (0 elsewhere).
    """

    inputs: tuple[str, ...]
    which: np.ndarray
    element: np.ndarray
    filler: np.ndarray


def movements(graph: Graph, node: Node) -> dict[str, Movement]:
    """The movement of each output of a MOVEMENT node, found by moving element numbers."""
    op = lookup(node)
    names = tuple(dict.fromkeys(n for i, n in enumerate(node.inputs) if n and not op.is_static(i)))
    sizes = [int(np.prod(graph.types[n].shape)) for n in names]
    starts = np.concatenate([[0], np.cumsum(sizes)])
    total = int(starts[-1])

    def run(base: int) -> list[np.ndarray]:
        numbers = {
            name: jnp.arange(base + starts[i], base + starts[i + 1], dtype=jnp.int32).reshape(graph.types[name].shape)
            for i, name in enumerate(names)
        }
        return [np.asarray(v) for v in run_node(node, numbers.__getitem__, graph.constants)]

    # A copied number shifts with the base, a filler does not.
    moved = {}
    for name, low, high in zip(node.outputs, run(1), run(1 + total)):
        copied = (high - low).ravel() == total
        number = np.where(copied, low.ravel() - 1, 0)
        which = np.where(copied, np.searchsorted(starts, number, side="right") - 1, FILLER)
        element = np.where(copied, number - starts[np.maximum(which, 0)], 0)
        filler = np.where(copied, 0.0, low.ravel())
        moved[name] = Movement(names, which, element, filler)
    return moved


def broadcast_elements(shape: tuple[int, ...], out: tuple[int, ...]) -> np.ndarray:
    """For each element of the shape `out`, the flat index of the element of `shape` that broadcasts to it."""
    return np.broadcast_to(np.arange(int(np.prod(shape))).reshape(shape), out).ravel()


class Elements:
    """Evaluates chosen elements of the tensors of one graph as functions of source elements.

    Args:
        graph: the decomposed graph.
        moves: the `Movement` of every tensor that a MOVEMENT node makes, or a quantizer of what is on its grid already.
        sources: tensors at which the recursion stops.
    """

    def __init__(self, graph: Graph, moves: Mapping[str, Movement], sources: frozenset[str]):
        self._graph = graph
        self._moves = moves
        self._sources = sources
        self._producers = graph.producers()

    def evaluate(self, tensor: str, need: np.ndarray, source: Callable[[str, np.ndarray], Any]) -> Any:
        """Values of the elements `need` of `tensor`, shape `(len(need), V)` or `(len(need), 1)`.

        Args:
            tensor: name of a tensor in a region.
            need: flat indices, shape `(G,)`.
            source: gives the real values `(G, V)` of elements `(G,)` of a source tensor.

        Raises:
            UnsupportedError: the operators in the region are too many for Python's stack.
        """
        memo: dict[tuple[str, bytes], Any] = {}

        def visit(name: str, need: np.ndarray) -> Any:
            key = name, need.tobytes()
            if key not in memo:
                memo[key] = self._value(name, need, source, visit)
            return memo[key]

        try:
            return visit(tensor, np.asarray(need, np.int64))
        except RecursionError:
            raise UnsupportedError(
                f"tensor {tensor!r}: hundreds of operators follow one another between two layers; fuse them, or raise "
                "Python's limit (sys.setrecursionlimit)"
            ) from None

    def _value(self, name: str, need: np.ndarray, source: Callable, visit: Callable) -> Any:
        if name in self._graph.constants:
            return jnp.asarray(np.asarray(self._graph.constants[name]).ravel()[need][:, None])
        if name in self._sources:
            return source(name, need)
        node = self._producers[name]
        if name in self._moves:
            return _gather_pieces(self._moves[name], need, visit)
        out = self._graph.types[name].shape

        def read(operand: str) -> Any:
            return visit(operand, broadcast_elements(self._shape(operand), out)[need])

        return run_node(node, read, {})[node.outputs.index(name)]

    def _shape(self, name: str) -> tuple[int, ...]:
        if name in self._graph.constants:
            return self._graph.constants[name].shape
        return self._graph.types[name].shape

    def signature(self, tensor: str, source: Callable[[str, np.ndarray], np.ndarray]) -> np.ndarray:
        """Group of each element of `tensor`, shape `(size,)`: equal groups are equal functions of their source element.

        Args:
            source: gives columns `(n, k)` of what distinguishes source elements (scale and offset).
        """
        size = int(np.prod(self._graph.types[tensor].shape))
        columns: list[np.ndarray] = []
        seen: set[tuple[str, bytes, bytes]] = set()

        def visit(name: str, need: np.ndarray, at: np.ndarray) -> None:
            key = name, need.tobytes(), at.tobytes()  # the same elements may be read again for other places
            if key in seen:
                return
            seen.add(key)

            def add(values: np.ndarray) -> None:
                column = np.full(size, -1, np.int64)
                column[at] = np.unique(values, return_inverse=True, axis=0)[1].ravel()
                columns.append(column)

            if name in self._graph.constants:
                add(np.asarray(self._graph.constants[name]).ravel()[need])
            elif name in self._sources:
                add(source(name, need))
            elif name in self._moves:
                move = self._moves[name]
                add(np.stack([move.which[need].astype(np.float64), move.filler[need]], axis=1))
                for i, operand in enumerate(move.inputs):
                    here = move.which[need] == i
                    if np.any(here):
                        visit(operand, move.element[need][here], at[here])
            else:
                out = self._graph.types[name].shape
                for operand in filter(None, dict.fromkeys(self._producers[name].inputs)):
                    visit(operand, broadcast_elements(self._shape(operand), out)[need], at)

        visit(tensor, np.arange(size), np.arange(size))
        varying = [c for c in columns if np.any(c != c[0])]
        if not varying:
            return np.zeros(size, np.int64)
        return np.unique(np.stack(varying, axis=1), axis=0, return_inverse=True)[1].ravel()


def _gather_pieces(move: Movement, need: np.ndarray, visit: Callable) -> Any:
    which = move.which[need]
    present = np.unique(which)
    if len(present) == 1 and present[0] != FILLER:
        return visit(move.inputs[int(present[0])], move.element[need])
    parts = []
    for i in present:
        here = np.flatnonzero(which == i)
        if i == FILLER:
            values = jnp.asarray(move.filler[need][here][:, None])
        else:
            values = visit(move.inputs[int(i)], move.element[need][here])
        parts.append((here, values))
    width = max(v.shape[1] for _, v in parts)
    out = jnp.zeros((len(need), width), jnp.result_type(*(v.dtype for _, v in parts)))
    for here, values in parts:
        out = out.at[here].set(jnp.broadcast_to(values, (len(here), width)))
    return out


def in_float64(fn: Callable[[], Any]) -> np.ndarray:
    """Runs `fn` with 64-bit JAX types and gives its result as a numpy array."""
    with enable_x64():
        return np.asarray(fn())
