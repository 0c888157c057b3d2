"""Cells of RNN, GRU and LSTM: one time step, in the operators of an algebra.

Inputs and state are joined before one matrix product, so that on encrypted data each gate takes one table; sums of products
are one contraction.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fheq.arrays.namespace import array_namespace
from fheq.graph import Node
from fheq.ops.activations import Activation, Algebra, Value

Array = Any
Stated = Mapping[str, tuple[Array | None, Array | None]]

GATES = {"RNN": 1, "GRU": 3, "LSTM": 4}
_LSTM_I, _LSTM_O, _LSTM_F, _LSTM_C = range(4)
_GRU_Z, _GRU_R, _GRU_H = range(3)


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
        xp, hidden = array_namespace(self.w), self.r.shape[-1]
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
