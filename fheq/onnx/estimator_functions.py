"""Operators that only fheq has, and estimators become, as functions of an exported model in plain ONNX.

They compute in float32 what `fheq.estimators.outputs` and `fheq.estimators.features` define.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from onnx import AttributeProto, TensorProto, helper, numpy_helper

from fheq.estimators.outputs import LEAST_PROBABILITY, NOT_ZERO, PROBIT, SWEEPS, UNSETTLED
from fheq.onnx.writer import OPSET
from fheq.stated.grids import DOMAIN

_SCALAR = helper.make_tensor_type_proto(TensorProto.INT64, ())
_FLOATS = helper.make_tensor_type_proto(TensorProto.FLOAT, None)


class _Body:
    """The nodes of a function or of a loop under construction; a call adds one and gives its output."""

    def __init__(self, prefix: str = "v") -> None:
        self.prefix = prefix
        self.nodes: list[onnx.NodeProto] = []

    def __call__(self, op: str, *inputs: str, **attrs: Any) -> str:
        out = f"{self.prefix}{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, inputs, [out], **attrs))
        return out

    def known(self, value: Any) -> str:
        """A constant; numbers with a point are float32, others int64."""
        array = np.asarray(value)
        kind = np.int64 if array.dtype.kind in "iu" else np.float32
        return self("Constant", value=numpy_helper.from_array(array.astype(kind)))

    def loop(self, count: str, states: list[str], step: Callable[[_Body, str, list[str]], list[str]]) -> list[str]:
        """`states` after `count` steps; `step(body, number, states)` adds one to a body and gives the new states."""
        prefix = f"{self.prefix}{len(self.nodes)}_"
        body, before = _Body(prefix), [f"{prefix}s{i}" for i in range(len(states))]
        after = step(body, f"{prefix}at", before)
        going = body("Identity", f"{prefix}going")
        values = lambda names: [onnx.ValueInfoProto(name=name, type=_FLOATS) for name in names]
        flags = [helper.make_tensor_value_info(name, TensorProto.BOOL, ()) for name in (f"{prefix}going", going)]
        at = onnx.ValueInfoProto(name=f"{prefix}at", type=_SCALAR)
        graph = helper.make_graph(body.nodes, "step", [at, flags[0], *values(before)], [flags[1], *values(after)])
        outs = [f"{prefix}out{i}" for i in range(len(states))]
        self.nodes.append(helper.make_node("Loop", [count, "", *states], outs, body=graph))
        return outs


def estimator_functions() -> list[onnx.FunctionProto]:
    """SoftmaxZero, Probit, Nearest and PairwiseCoupling."""
    return [
        _function("SoftmaxZero", _softmax_zero),
        _function("Probit", _probit),
        _function("Nearest", _nearest, ["values"]),
        _function("PairwiseCoupling", _pairwise_coupling),
    ]


def _function(name: str, build: Callable[[_Body, str], str], attributes: list[str] | None = None) -> onnx.FunctionProto:
    body = _Body()
    out = build(body, "x")
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_function(DOMAIN, name, ["x"], [out], body.nodes, opset, attributes or [])


def _softmax_zero(f: _Body, x: str) -> str:
    last, zero, one = f.known([-1]), f.known(0.0), f.known(1.0)
    top = f("ReduceMax", x, last)
    counts = f("Greater", f("Abs", x), f.known(NOT_ZERO))
    powers = f("Where", counts, f("Exp", f("Sub", x, top)), f("Mul", x, f("Exp", f("Neg", top))))
    total = f("ReduceSum", powers, last)
    none = f("Equal", total, zero)
    return f("Where", none, f.known(0.5), f("Div", powers, f("Where", none, one, total)))


def _probit(f: _Body, x: str) -> str:
    one = f.known(1.0)
    y = f("Sub", f("Mul", x, f.known(2.0)), one)
    log = f("Log", f("Mul", f("Sub", one, y), f("Add", one, y)))
    half = f("Add", f("Mul", log, f.known(0.5)), f.known(2 / (np.pi * PROBIT)))
    inner = f("Sqrt", f("Sub", f("Mul", half, half), f("Div", log, f.known(PROBIT))))
    return f("Mul", f("Mul", f("Sign", y), f("Sqrt", f("Sub", inner, half))), f.known(2**0.5))


def _nearest(f: _Body, x: str) -> str:
    stated = AttributeProto(name="value_floats", type=AttributeProto.FLOATS, ref_attr_name="values")
    values = f("Constant")
    f.nodes[-1].attribute.append(stated)
    apart = f("Abs", f("Sub", f("Unsqueeze", x, f.known([-1])), values))
    found = f("Gather", values, f("ArgMin", apart, axis=-1, keepdims=0))
    ends = [f("Slice", values, f.known([start]), f.known([stop])) for start, stop in ((1, 2**31), (0, -1))]
    reach = f("Mul", f("ReduceMin", f("Sub", *ends), keepdims=0), f.known(0.5))
    return f("Where", f("Less", f("Abs", f("Sub", x, found)), reach), found, x)


def _pairwise_coupling(f: _Body, r: str) -> str:
    """Rows are the last axis of everything inside; one that is settled no longer changes."""
    one, first = f.known(1.0), f.known([0])
    pairs = f("Cast", f("Gather", f("Shape", r), f.known(1)), to=TensorProto.FLOAT)
    root = f("Sqrt", f("Add", f("Mul", pairs, f.known(8.0)), one))
    real_count = f("Round", f("Mul", f("Add", root, one), f.known(0.5)))
    count = f("Cast", real_count, to=TensorProto.INT64)
    numbers = f("Range", f.known(0), count, f.known(1))
    row, column = f("Unsqueeze", numbers, f.known([1])), f("Unsqueeze", numbers, first)
    cells = f("NonZero", f("Less", row, column))
    r = f("Transpose", f("Clip", r, f.known(LEAST_PROBABILITY), f("Sub", one, f.known(LEAST_PROBABILITY))), perm=[1, 0])
    square = f("Cast", f("Equal", row, column), to=TensorProto.FLOAT)
    same = f("Unsqueeze", square, f.known([2]))
    nothing = f("Mul", same, f("Mul", f("Gather", r, f.known([0])), f.known(0.0)))
    table = f("ScatterND", nothing, f("Transpose", cells, perm=[1, 0]), r)
    mirrored = f("Transpose", f("Gather", cells, f.known([1, 0])), perm=[1, 0])
    table = f("ScatterND", table, mirrored, f("Sub", one, r))
    q = f("Neg", f("Mul", f("Transpose", table, perm=[1, 0, 2]), table))
    q = f("Add", q, f("Mul", same, f("ReduceSum", f("Mul", table, table), first)))
    equal = f("Div", f("Add", f("ReduceSum", nothing, first, keepdims=0), one), real_count)
    limit = f("Div", f.known(UNSETTLED), real_count)

    def products(b: _Body, p: str) -> tuple[str, str]:
        qp = b("ReduceSum", b("Mul", q, b("Unsqueeze", p, first)), b.known([1]), keepdims=0)
        return qp, b("ReduceSum", b("Mul", p, qp), first)

    def change(b: _Body, at: str, state: list[str]) -> list[str]:
        p, qp, total = state
        at = b("Unsqueeze", at, first)
        line = b("Squeeze", b("Gather", q, at), first)
        own, mine = b("Gather", line, at), b("Gather", qp, at)
        step = b("Div", b("Sub", total, mine), own)
        more = b("Add", step, one)
        moved = b("Mul", step, b("Add", b("Mul", step, own), b("Add", mine, mine)))
        added = b("Mul", b("Transpose", b("Gather", square, at), perm=[1, 0]), step)
        return [
            b("Div", b("Add", p, added), more),
            b("Div", b("Add", qp, b("Mul", step, line)), more),
            b("Div", b("Add", total, moved), b("Mul", more, more)),
        ]

    def sweep(b: _Body, _: str, state: list[str]) -> list[str]:
        (p,) = state
        qp, total = products(b, p)
        unsettled = b("GreaterOrEqual", b("ReduceMax", b("Abs", b("Sub", qp, total)), first), limit)
        return [b("Where", unsettled, b.loop(count, [p, qp, total], change)[0], p)]

    (p,) = f.loop(f("Max", count, f.known(SWEEPS)), [equal], sweep)
    return f("Transpose", p, perm=[1, 0])
