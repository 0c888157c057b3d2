"""Elementwise primitives."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fheq.errors import UnsupportedError
from fheq.graph import is_float
from fheq.jaxpr.equation import Equation
from fheq.ops.arguments import DTYPES

_CODES = {np.dtype(kind): code for code, kind in DTYPES.items()}
_TO_EVEN = 1  # jax.lax.RoundingMethod.TO_NEAREST_EVEN

_SAME = {
    "abs": "Abs",
    "acos": "Acos",
    "acosh": "Acosh",
    "add": "Add",
    "add_any": "Add",
    "asin": "Asin",
    "asinh": "Asinh",
    "atan": "Atan",
    "atanh": "Atanh",
    "ceil": "Ceil",
    "cos": "Cos",
    "cosh": "Cosh",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "mul": "Mul",
    "neg": "Neg",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sinh": "Sinh",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tan": "Tan",
    "tanh": "Tanh",
}


def _plain(op: str) -> Callable[[Equation], str]:
    return lambda e: e.apply(op, *e.inputs)


def _identity(e: Equation) -> tuple[str, ...]:
    return e.inputs


def _extreme(op: str) -> Callable[[Equation], str]:
    """max or min; of an infinity that is no bound, the other operand."""

    def rule(e: Equation) -> str:
        idle = -np.inf if op == "Max" else np.inf
        for known, other in (e.inputs, e.inputs[::-1]):
            if not e.is_known(known) or not is_float(e.dtype_of(known)) or e.shape_of(other) != e.shape:
                continue
            value = e.known(known, "")
            if np.all(value == idle):
                return other
            if op == "Max" and np.all(value == 0):
                return e.apply("Relu", other)
        return e.apply(op, *e.inputs)

    return rule


def _power(e: Equation) -> str:
    (x,), y = e.inputs, e.params["y"]
    return e.apply("Mul", x, x) if y == 2 else e.apply("Pow", x, e.number(y, x))


def _square(e: Equation) -> str:
    return e.apply("Mul", e.inputs[0], e.inputs[0])


def _not_equal(e: Equation) -> str:
    """Of a tensor and itself (a test for NaN): never."""
    if e.inputs[0] == e.inputs[1]:
        return e.draft.constant(f"{e.origin.name}/false", np.zeros(e.shape, bool))
    return e.apply("Not", e.apply("Equal", *e.inputs))


def _logical(logical: str, bitwise: str) -> Callable[[Equation], str]:
    return lambda e: e.apply(logical if e.dtype_of(e.inputs[0]) == np.bool_ else bitwise, *e.inputs)


def _clamp(e: Equation) -> str:
    low, x, high = e.inputs
    return e.apply("Min", e.apply("Max", x, low), high)


def _round(e: Equation) -> str:
    (x,) = e.inputs
    if int(e.params["rounding_method"]) == _TO_EVEN:
        return e.apply("Round", x)
    up = e.apply("Floor", e.apply("Add", e.apply("Abs", x), e.number(0.5, x)))
    return e.apply("Mul", e.apply("Sign", x), up)


def _cbrt(e: Equation) -> str:
    (x,) = e.inputs
    return e.apply("Mul", e.apply("Sign", x), e.apply("Pow", e.apply("Abs", x), e.number(1 / 3, x)))


def _after(op: str, shift: float) -> Callable[[Equation], str]:
    """op(x) + shift"""
    return lambda e: e.apply("Add", e.apply(op, *e.inputs), e.number(shift, e.inputs[0]))


def _log1p(e: Equation) -> str:
    return e.apply("Log", e.apply("Add", e.inputs[0], e.number(1, e.inputs[0])))


def _exp2(e: Equation) -> str:
    return e.apply("Exp", e.apply("Mul", e.inputs[0], e.number(math.log(2), e.inputs[0])))


def _erfc(e: Equation) -> str:
    return e.apply("Sub", e.number(1, e.inputs[0]), e.apply("Erf", e.inputs[0]))


def _is_finite(e: Equation) -> str:
    return e.apply("Not", e.apply("Or", e.apply("IsNaN", e.inputs[0]), e.apply("IsInf", e.inputs[0], **_BOTH)))


_BOTH = {"detect_positive": 1, "detect_negative": 1}


def _remainder(e: Equation) -> str:
    return e.apply("Mod", *e.inputs, fmod=1)


def _select(e: Equation) -> str:
    which, *cases = e.inputs
    if e.is_known(which):
        value = np.unique(e.known(which, ""))
        if value.size == 1 and e.shape_of(cases[int(value[0])]) == e.shape:
            return cases[int(value[0])]
    if e.dtype_of(which) == np.bool_:
        return e.apply("Where", which, cases[1], cases[0])
    chosen = cases[-1]
    for i in range(len(cases) - 1)[::-1]:
        chosen = e.apply("Where", e.apply("Equal", which, e.number(i, which)), cases[i], chosen)
    return chosen


def _convert(e: Equation) -> str:
    (x,), dtype = e.inputs, np.dtype(e.params["new_dtype"])
    if dtype == e.dtype_of(x):
        return x
    if dtype not in _CODES:
        raise UnsupportedError(f"elements of type {dtype}; use float32, or 4 to 64 bit integers")
    return e.apply("Cast", x, to=_CODES[dtype])


RULES = {
    **{name: _plain(op) for name, op in _SAME.items()},
    **dict.fromkeys(("copy", "copy_p", "optimization_barrier", "reduce_precision", "stop_gradient"), _identity),
    "and": _logical("And", "BitwiseAnd"),
    "cbrt": _cbrt,
    "clamp": _clamp,
    "convert_element_type": _convert,
    "erfc": _erfc,
    "exp2": _exp2,
    "expm1": _after("Exp", -1),
    "integer_pow": _power,
    "is_finite": _is_finite,
    "log1p": _log1p,
    "max": _extreme("Max"),
    "min": _extreme("Min"),
    "ne": _not_equal,
    "not": _logical("Not", "BitwiseNot"),
    "or": _logical("Or", "BitwiseOr"),
    "rem": _remainder,
    "round": _round,
    "rsqrt": lambda e: e.apply("Reciprocal", e.apply("Sqrt", *e.inputs)),
    "select_n": _select,
    "square": _square,
    "xor": _logical("Xor", "BitwiseXor"),
}
