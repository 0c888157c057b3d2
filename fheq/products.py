"""Products of two encrypted tensors, by tables of squares on sums.

`a b = floor((a + b)^2 / 4) - floor((a - b)^2 / 4)` takes two tables for each product. Where elements meet several others, as
rows and columns of a matrix product do, `2 a b = (a + b)^2 - a^2 - b^2` takes one, and one for each element, on a bit less.
It is exact for twice the product only, whose low bit an approximate rounding removes for nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from fheq.emit import Emitter


class Factor(NamedTuple):
    """An operand: `value + zero` are its integers with their zero point taken off.

    same: flat, a number from 0 on for each element, equal for copies of one.
    """

    value: str
    zero: np.ndarray
    same: np.ndarray

    @classmethod
    def of(cls, value: str, zero: np.ndarray, elements: np.ndarray, fill: np.ndarray) -> Factor:
        """An operand from what it copies (see `Operand`)."""
        copied = np.stack([elements, fill, zero.ravel()], axis=1)
        return cls(value, zero, np.unique(copied, axis=0, return_inverse=True)[1].ravel())

    @property
    def distinct(self) -> int:
        """How many elements are no copies of others."""
        return int(self.same.max()) + 1


def product(emit: Emitter, x: Factor, y: Factor, contract: bool, twice: bool, origin: str) -> tuple[str, int]:
    """The product, and how many times it that is: once or twice.

    A product with a bit takes one table as wide, on the other number and the bit above it.

    Args:
        contract: whether to sum over the last axis.
        twice: whether twice the product is as good.
    """
    total = emit.sum_last if contract else lambda value: value
    for number, bit in ((x, y), (y, x)):
        if emit.values[bit.value].high <= 1:
            return total(emit.chosen(number.value, bit.value, number.zero, bit.zero, origin)), 1
    if twice and x.distinct + y.distinct < len(np.unique(x.same * y.distinct + y.same)):
        return _by_own_squares(emit, x, y, contract, origin), 2
    plus, minus = (total(emit.squares(*_combined(emit, x, y, sign), 4, origin)) for sign in (1, -1))
    return emit.plus(plus, minus, -1), 1


def _by_own_squares(emit: Emitter, x: Factor, y: Factor, contract: bool, origin: str) -> str:
    """Twice the product, from squares of each operand and of their sum or difference, whichever reaches less far."""
    sign = min((1, -1), key=lambda sign: _reach(emit, x, y, sign))
    both = emit.squares(*_combined(emit, x, y, sign), 1, origin)
    both = emit.sum_last(both) if contract else both
    a, b = (_own_squares(emit, factor, contract, origin) for factor in (x, y))
    return emit.plus(emit.plus(a, b, 1), both, -1) if sign < 0 else emit.plus(emit.plus(both, a, -1), b, -1)


def _own_squares(emit: Emitter, factor: Factor, contract: bool, origin: str) -> str:
    """The squares of an operand's elements, or their sums over the last axis; of copies once."""
    shape = emit.values[factor.value].shape
    first = np.unique(factor.same, return_index=True)[1]
    squares = emit.squares(emit.gather((factor.value,), first, None, first.shape), factor.zero.ravel()[first], 1, origin)
    if not contract:
        return emit.gather((squares,), factor.same, None, shape)
    rows, row = np.unique(factor.same.reshape(-1, shape[-1]), axis=0, return_inverse=True)
    return emit.gather((emit.sum_last(emit.gather((squares,), rows, None, rows.shape)),), row, None, shape[:-1])


def _combined(emit: Emitter, x: Factor, y: Factor, sign: int) -> tuple[str, np.ndarray]:
    """The sum or difference of two operands, from 0 on, and what is to be added to it."""
    value, zero = emit.plus(x.value, y.value, sign), x.zero + sign * y.zero
    if sign > 0:
        return value, zero
    top = emit.values[y.value].high
    return emit.shift(value, np.asarray(top)), zero - top


def _reach(emit: Emitter, x: Factor, y: Factor, sign: int) -> int:
    """The largest size of a sum or difference."""
    zero, (a, b) = x.zero + sign * y.zero, (emit.values[f.value].high for f in (x, y))
    ends = (0, a + b) if sign > 0 else (-b, a)
    return int(max(np.max(np.abs(zero + end)) for end in ends))
