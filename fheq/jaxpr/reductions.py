"""Reductions over axes and over windows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fheq.errors import UnsupportedError
from fheq.jaxpr.equation import Equation

_INT32 = 6  # TensorProto.INT32
_BOOL = 9


def _reduce(op: str) -> Callable[[Equation], str]:
    def rule(e: Equation) -> str:
        (x,), axes = e.inputs, e.params["axes"]
        return e.apply(op, x, e.integers(list(axes)), keepdims=0, noop_with_empty_axes=0) if axes else x

    return rule


def _all_or_any(op: str) -> Callable[[Equation], str]:
    def rule(e: Equation) -> str:
        (x,), axes = e.inputs, e.params["axes"]
        if e.dtype_of(x) != np.bool_:
            raise UnsupportedError("bits of integers; reduce booleans")
        number = e.apply("Cast", x, to=_INT32)
        return e.apply("Cast", e.apply(op, number, e.integers(list(axes)), keepdims=0, noop_with_empty_axes=0), to=_BOOL)

    return rule


def _index(op: str) -> Callable[[Equation], str]:
    def rule(e: Equation) -> str:
        (axis,) = e.params["axes"]
        return e.apply("Cast", e.apply(op, e.inputs[0], axis=int(axis), keepdims=0, select_last_index=0), to=_INT32)

    return rule


def _cumulative_sum(e: Equation) -> str:
    axis = e.integers([e.params["axis"]], ())
    return e.apply("CumSum", e.inputs[0], axis, exclusive=0, reverse=int(e.params["reverse"]))


def _window(op: str) -> Callable[[Equation], str]:
    """A pool over the axes that windows span; the others are moved before them."""

    def rule(e: Equation) -> str:
        p, x = e.params, e.inputs[0]
        if any(d != 1 for d in p["base_dilation"]):
            raise UnsupportedError("a stretched input")
        shape = e.shape_of(x)
        options = zip(p["window_dimensions"], p["window_strides"], p["window_dilation"], p["padding"])
        still = [tuple(o[:3]) == (1, 1, 1) and tuple(o[3]) == (0, 0) for o in options]
        outer = [i for i, s in enumerate(still) if s]
        inner = [i for i, s in enumerate(still) if not s]
        if not inner:
            return x
        order = [*outer, *inner]
        x = e.transpose(x, order)
        x = e.reshape(x, (1, int(np.prod([shape[i] for i in outer])), *(shape[i] for i in inner)))
        pick: Callable[[str], tuple[Any, ...]] = lambda name: tuple(p[name][i] for i in inner)
        kernel, dilations, padding = pick("window_dimensions"), pick("window_dilation"), pick("padding")
        attrs = {
            "auto_pad": "NOTSET",
            "ceil_mode": 0,
            "kernel_shape": kernel,
            "strides": pick("window_strides"),
            "dilations": dilations,
            "pads": (*(low for low, _ in padding), *(high for _, high in padding)),
        }
        if op == "AveragePool":
            mean = e.apply(op, x, count_include_pad=1, **attrs)
            made = e.apply("Mul", mean, e.number(int(np.prod(kernel)), mean))
        elif op == "MinPool":
            made = e.apply("Neg", e.apply("MaxPool", e.apply("Neg", x), storage_order=0, **attrs))
        else:
            made = e.apply(op, x, storage_order=0, **attrs)
        made = e.reshape(made, [e.shape[i] for i in order])
        return e.transpose(made, np.argsort(order))

    return rule


RULES = {
    "argmax": _index("ArgMax"),
    "argmin": _index("ArgMin"),
    "cumsum": _cumulative_sum,
    "reduce_and": _all_or_any("ReduceMin"),
    "reduce_max": _reduce("ReduceMax"),
    "reduce_min": _reduce("ReduceMin"),
    "reduce_or": _all_or_any("ReduceMax"),
    "reduce_prod": _reduce("ReduceProd"),
    "reduce_sum": _reduce("ReduceSum"),
    "reduce_window_max": _window("MaxPool"),
    "reduce_window_min": _window("MinPool"),
    "reduce_window_sum": _window("AveragePool"),
}
