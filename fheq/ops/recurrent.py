"""RNN, GRU and LSTM, unrolled over a known number of time steps.

A cell is written once, in operators of the table: `Values` applies them to arrays (this gives the rows), and
`fheq.rewriting.recurrent` writes them as nodes. Inputs and state are joined before one matrix product, so that on encrypted
data each gate takes one table; sums of products are one contraction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.graph import Node
from fheq.ops.activations import Activation, Algebra, Value, activations_of
from fheq.ops.arguments import integers
from fheq.ops.table import Kind, Op, lookup, register

Array = Any
Stated = Mapping[str, tuple[Array | None, Array | None]]

VERSION = 18
"""Opset of the operators that cells are made of."""

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
_LSTM_I, _LSTM_O, _LSTM_F, _LSTM_C = range(4)
_GRU_Z, _GRU_R, _GRU_H = range(3)


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


@dataclass(frozen=True)
class Recurrence:
    """One direction of a recurrent operator: parameters per gate, in the order of ONNX.

    Args:
        w, r: `(gates, hidden, inputs)` and `(gates, hidden, hidden)`.
        wb, rb: `(gates, hidden)`.
        p: `(3, hidden)`, the peepholes of gates i, o and f; None without.
        stated: by leaf, that of the quantizers of w and of r for each weight, None for one that the model does not quantize.
    """

    algebra: Algebra
    node: Node
    activations: tuple[Activation, ...]
    w: Array
    r: Array
    wb: Array
    rb: Array
    p: Array | None
    stated: Stated

    def activate(self, index: int, x: Value) -> Value:
        return self.activations[index].apply(self.algebra, x, self.w.dtype)

    def clipped(self, x: Value) -> Value:
        limit = self.node.attrs.get("clip")
        if not limit:
            return x
        low, high = (self.algebra.known(np.asarray(v, self.w.dtype)) for v in (-limit, limit))
        return self.algebra.apply("Clip", x, low, high)

    def affine(self, x: Value, joined: Callable[[Array, Array], Array], bias: Array) -> Value:
        """`x @ weight + bias` for a value or several side by side; `joined` makes `(hidden, size)` from w and r."""
        weight = self.algebra.weight(joined(self.w, self.r).T, self._leaves(joined))
        return self.algebra.apply("Gemm", x, weight, self.algebra.known(bias), alpha=1.0, beta=1.0, transA=0, transB=0)

    def _leaves(self, joined: Callable[[Array, Array], Array]) -> dict[str, Array] | None:
        """The quantizer of a joined weight, one entry per weight; None where the model does not state all of it."""
        leaves = {}
        for leaf, (w, r) in self.stated.items():
            absent = [np.full(np.shape(value), np.nan) for value in (self.w, self.r)]
            leaves[leaf] = np.asarray(joined(absent[0] if w is None else w, absent[1] if r is None else r)).T
        return None if not leaves or any(np.any(np.isnan(v)) for v in leaves.values()) else leaves

    def gates(self, which: Sequence[int], x: Value, h: Value | None, peeped: Value | None = None) -> list[Value]:
        """The values that enter the activations of some gates, each `(samples, hidden)`."""
        xp, hidden = _namespace(self.w), self.r.shape[-1]
        rows = lambda array: xp.concatenate([array[g] for g in which])
        p = None if peeped is None else self.p

        def joined(w: Array, r: Array) -> Array:
            blocks = [rows(w)] if h is None else [rows(w), rows(r)]
            if p is not None:
                none = xp.zeros((hidden, hidden), self.w.dtype)
                blocks.append(xp.concatenate([xp.diag(p[g]) if g < 3 else none for g in which]))
            return xp.concatenate(blocks, axis=1)

        parts = [part for part in (x, h, None if p is None else peeped) if part is not None]
        whole = parts[0] if len(parts) == 1 else self.algebra.apply("Concat", *parts, axis=1)
        every = self.clipped(self.affine(whole, joined, rows(self.wb) + rows(self.rb)))
        if len(which) == 1:
            return [every]
        ends = [(i * hidden, (i + 1) * hidden) for i in range(len(which))]
        return [self.algebra.apply("Slice", every, *self._bounds(*end)) for end in ends]

    def _bounds(self, start: int, end: int) -> list[Value]:
        return [self.algebra.known(np.array([v])) for v in (start, end, 1)]

    def products(self, *pairs: tuple[Value, Value | None]) -> Value:
        """The sum of the products of pairs, None being zero."""
        pairs = tuple((a, b) for a, b in pairs if b is not None)
        if len(pairs) == 1:
            return self.algebra.apply("Mul", *pairs[0])
        inner, outer = (self.algebra.known(np.array([axis])) for axis in (2, 3))
        columns = []
        for values in zip(*pairs):
            wide = [self.algebra.apply("Unsqueeze", value, inner) for value in values]
            columns.append(self.algebra.apply("Concat", *wide, axis=2))
        a, b = (self.algebra.apply("Unsqueeze", c, axis) for c, axis in zip(columns, (inner, outer)))
        summed = self.algebra.apply("MatMul", a, b)
        return self.algebra.apply("Squeeze", summed, self.algebra.known(np.array([2, 3])))

    def complement(self, x: Value) -> Value:
        return self.algebra.apply("Sub", self.algebra.known(np.ones((), self.w.dtype)), x)

    def step(self, x: Value, h: Value | None, c: Value | None) -> tuple[Value, Value | None]:
        """The state after one time step: h, and c of an LSTM."""
        return {"RNN": self._rnn, "GRU": self._gru, "LSTM": self._lstm}[self.node.op](x, h, c)

    def _rnn(self, x: Value, h: Value | None, c: Value | None) -> tuple[Value, Value | None]:
        return self.activate(0, self.gates((0,), x, h)[0]), None

    def _gru(self, x: Value, h: Value | None, c: Value | None) -> tuple[Value, Value | None]:
        z, r = (self.activate(0, g) for g in self.gates((_GRU_Z, _GRU_R), x, h))
        if self.node.attrs.get("linear_before_reset", 0):
            kept = self.algebra.known(self.rb[_GRU_H])
            if h is not None:
                kept = self.affine(h, lambda w, r: r[_GRU_H], self.rb[_GRU_H])
            fresh = self.affine(x, lambda w, r: w[_GRU_H], self.wb[_GRU_H])
            entering = self.clipped(self.algebra.apply("Add", fresh, self.algebra.apply("Mul", r, kept)))
        else:
            (entering,) = self.gates((_GRU_H,), x, None if h is None else self.algebra.apply("Mul", r, h))
        new = self.activate(1, entering)
        return self.products((self.complement(z), new), (z, h)), None

    def _lstm(self, x: Value, h: Value | None, c: Value | None) -> tuple[Value, Value | None]:
        coupled, peeped = bool(self.node.attrs.get("input_forget", 0)), self.p is not None
        which = [_LSTM_I, _LSTM_C, *([] if coupled else [_LSTM_F]), *([] if peeped else [_LSTM_O])]
        entering = dict(zip(which, self.gates(which, x, h, c)))
        i = self.activate(0, entering[_LSTM_I])
        f = self.complement(i) if coupled else self.activate(0, entering[_LSTM_F])
        c = self.products((i, self.activate(1, entering[_LSTM_C])), (f, c))
        o = self.gates((_LSTM_O,), x, h, c)[0] if peeped else entering[_LSTM_O]
        return self.algebra.apply("Mul", self.activate(0, o), self.activate(2, c)), c

    def run(self, steps: Sequence[Value], h: Value | None, c: Value | None) -> tuple[list[Value], Value, Value]:
        """h after each of the steps, and the last h and c (None: still zero)."""
        every = []
        for x in steps:
            h, c = self.step(x, h, c)
            every.append(h)
        return every, h, c


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
    results: list[tuple[Any, ...]] = [(every, (time, count, samples, hidden), (2, 0, 1, 3))]
    results += [([d[k] for d in directions], (count, samples, hidden), (1, 0, 2)) for k in range(1, len(_outputs(node)))]
    names = names or ["y"] * len(results)
    return [
        _stacked(algebra, parts, shape, order if by_sample else None, name) if name else None
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
    xp = _namespace(w)
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
    joined = algebra.apply("Concat", *parts, axis=0)
    target = algebra.known(np.asarray(shape, np.int64))
    whole = algebra.apply("Reshape", joined, target, allowzero=0, out="" if order else name)
    return algebra.apply("Transpose", whole, perm=order, out=name) if order else whole


def _namespace(*arrays: Array) -> Any:
    return jnp if any(isinstance(a, jax.Array) for a in arrays) else np


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
