"""RNN, GRU and LSTM, unrolled over a known number of time steps.

A recurrence is written once, in operators of the table: `Values` applies them to arrays (this gives the rows), and
`fheq.rewriting.recurrent` writes them as nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np

from fheq.arrays.namespace import array_namespace
from fheq.graph import Node
from fheq.ops.activations import Algebra, Value, activations_of
from fheq.ops.arguments import integers
from fheq.ops.recurrent_cells import GATES, Recurrence, Stated
from fheq.ops.table import Kind, Op, lookup, register

Array = Any

VERSION = 18
"""Opset of the operators that cells are made of."""

_DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}


class Values:
    """The algebra of arrays."""

    def known(self, array: Array) -> Array:
        """The array itself."""
        return array

    def weight(self, array: Array, leaves: Mapping[str, Array] | None) -> Array:
        """The array itself."""
        return array

    def apply(self, op: str, *inputs: Array, out: str = "", **attrs: Any) -> Array:
        """The operator's row, evaluated."""
        node = Node("", op, ("x",) * len(inputs), ("y",), MappingProxyType(attrs), "", VERSION)
        return lookup(node).evaluate(node, *inputs)


def unroll(
    algebra: Algebra,
    node: Node,
    x: Value,
    size: tuple[int, int],
    parameters: tuple[Array, Array, Array | None, Array | None],
    lengths: np.ndarray | None,
    states: tuple[Value | None, Value | None],
    names: Sequence[str] = (),
    stated: Stated | None = None,
) -> list[Value]:
    """The outputs Y, Y_h and, of an LSTM, Y_c.

    Args:
        x: `(time, samples, inputs)`; `(samples, time, inputs)` with layout 1, as are all other shapes then.
        size: time and samples.
        parameters: W, R, B and P of the operator.
        lengths: its sequence_lens.
        states: initial_h and initial_c; None is zero.
        names: given to the outputs by position; "" for one that nobody reads, which is left out (None).
        stated: the leaves of the quantizers of W and R, in their shapes.
    """
    time, samples = size
    if not time:
        raise ValueError("the sequence has no time step")
    by_sample = bool(node.attrs.get("layout", 0))
    if by_sample:
        x = algebra.apply("Transpose", x, perm=(1, 0, 2))
        states = tuple(None if s is None else algebra.apply("Transpose", s, perm=(1, 0, 2)) for s in states)  # type: ignore[assignment]
    directions = [
        _one_direction(algebra, cell, x, size, lengths, [_taken(algebra, s, d) for s in states], reverse)
        for d, (cell, reverse) in enumerate(zip(_cells(algebra, node, *parameters, stated or {}), _directions(node)))
    ]
    hidden, count = parameters[1].shape[-1], len(directions)
    every = [y for t in range(time) for y in (d[0][t] for d in directions)]
    results: list[tuple[Any, ...]] = [(every, (samples, time, count, hidden), (1, 2, 0, 3))]
    results += [([d[k] for d in directions], (samples, count, hidden), (1, 0, 2)) for k in range(1, len(_outputs(node)))]
    names = names or ["y"] * len(results)
    return [
        _stacked(algebra, parts, shape, None if by_sample else order, name) if name else None
        for (parts, shape, order), name in zip(results, names)
    ]


def _outputs(node: Node) -> tuple[str, ...]:
    return ("Y", "Y_h", "Y_c") if node.op == "LSTM" else ("Y", "Y_h")


def _directions(node: Node) -> tuple[bool, ...]:
    """Whether each direction is reversed."""
    name = node.attrs["direction"]
    if name not in _DIRECTIONS:
        raise ValueError(f"attribute direction is {name!r}")
    return _DIRECTIONS[name]


def _cells(
    algebra: Algebra, node: Node, w: Array, r: Array, b: Array | None, p: Array | None, stated: Stated
) -> list[Recurrence]:
    count, gates, hidden = len(_directions(node)), GATES[node.op], r.shape[-1]
    if w.ndim != 3 or w.shape[:2] != (count, gates * hidden) or r.shape != (count, gates * hidden, hidden):
        raise ValueError(f"weights of shapes {w.shape} and {r.shape} for {count} directions and {gates} gates")
    xp = array_namespace(w)
    both = xp.zeros((count, 2 * gates * hidden), w.dtype) if b is None else b
    both = both.reshape(count, 2, gates, hidden)
    by_gate = lambda v, d: None if v is None else v[d].reshape(gates, hidden, -1)
    return [
        Recurrence(
            algebra,
            node,
            chosen,
            by_gate(w, d),
            by_gate(r, d),
            both[d, 0],
            both[d, 1],
            None if p is None else p[d].reshape(3, hidden),
            {leaf: (by_gate(a, d), by_gate(b, d)) for leaf, (a, b) in stated.items()},
        )
        for d, chosen in enumerate(activations_of(node, len(_directions(node))))
    ]


def _one_direction(
    algebra: Algebra,
    cell: Recurrence,
    x: Value,
    size: tuple[int, int],
    lengths: np.ndarray | None,
    states: Sequence[Value | None],
    reverse: bool,
) -> tuple[list[Value], Value, Value]:
    """h at each time step, and the last h and c, each `(samples, hidden)`; samples of one length run together."""
    time, samples = size
    ends = np.broadcast_to(time if lengths is None else lengths, (samples,))
    if np.any(ends < 0) or np.any(ends > time):
        raise ValueError(f"sequence_lens {ends.tolist()} for {time} time steps")
    slices = [_taken(algebra, x, t) for t in range(time)]
    runs, groups = [], [np.flatnonzero(ends == end) for end in np.unique(ends)]
    for group in groups:
        end = int(ends[group[0]])
        rows = lambda value, group=group: value if len(group) == samples else _taken(algebra, value, group)
        order = range(end)[::-1] if reverse else range(end)
        every, h, c = cell.run([rows(slices[t]) for t in order], *(None if s is None else rows(s) for s in states))
        zero = algebra.known(np.zeros((len(group), cell.r.shape[-1]), cell.w.dtype))
        every = [*(every[::-1] if reverse else every), *[zero] * (time - end)]
        runs.append([*every, zero if h is None else h, zero if c is None else c])
    if len(runs) > 1:
        back = np.argsort(np.concatenate(groups))
        merged = [_taken(algebra, algebra.apply("Concat", *parts, axis=0), back) for parts in zip(*runs)]
    else:
        merged = runs[0]
    return merged[:time], merged[time], merged[time + 1]


def _taken(algebra: Algebra, value: Value | None, index: Any) -> Value | None:
    """Elements of a value along its first axis."""
    if value is None:
        return None
    return algebra.apply("Gather", value, algebra.known(np.asarray(index, np.int64)), axis=0)


def _stacked(
    algebra: Algebra, parts: Sequence[Value], shape: tuple[int, ...], order: tuple[int, ...] | None, name: str
) -> Value:
    """The parts of each sample one after the other, in a shape that begins with samples, and moved to an order."""
    joined = algebra.apply("Concat", *parts, axis=1)
    target = algebra.known(np.asarray(shape, np.int64))
    whole = algebra.apply("Reshape", joined, target, allowzero=0, out="" if order else name)
    return algebra.apply("Transpose", whole, perm=order, out=name) if order else whole


def sizes_of(node: Node, shape: tuple[int, ...]) -> tuple[int, int]:
    """Time and samples of the first input."""
    if len(shape) != 3:
        raise ValueError(f"its first input has shape {shape}; three axes are due")
    return (shape[1], shape[0]) if node.attrs.get("layout", 0) else (shape[0], shape[1])


def _evaluate(
    node: Node,
    x: Array,
    w: Array,
    r: Array,
    b: Array | None = None,
    lengths: np.ndarray | None = None,
    h: Array | None = None,
    c: Array | None = None,
    p: Array | None = None,
) -> tuple[Array, ...]:
    """ONNX RNN, GRU or LSTM."""
    known = None if lengths is None else np.asarray(integers(lengths))
    results = unroll(Values(), node, x, sizes_of(node, x.shape), (w, r, b, p), known, (h, c))
    return tuple(jnp.asarray(result) for result in results)


register(*(Op(name, 7, Kind.COMPOSITE, _evaluate, static=(4,)) for name in GATES))
