"""The integer steps of a plan: plain data that says what is computed from which quantized tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from fheq.graph import Node


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor that a step reads as integers.

    Args:
        tensor: its name in the graph.
        key: the quantized tensor whose integers it copies (a point, a graph input, a join or a maximum), or, of a sum, the
            accumulator (see `Plan.summed`).
        shape: its shape.
        elements: flat, the element of `key` that each of its elements copies, or -1 for a known filler.
        fill: real values of the fillers (0 elsewhere).
        slope, intercept: flat; its real value is `slope * copied + intercept`, an affine fold of ops such as a
            normalisation. None where it is the copied value itself.
    """

    tensor: str
    key: str
    shape: tuple[int, ...]
    elements: np.ndarray
    fill: np.ndarray
    slope: np.ndarray | None = None
    intercept: np.ndarray | None = None

    @cached_property
    def in_order(self) -> bool:
        """Whether it copies the first elements of `key`, as they lie."""
        return np.array_equal(self.elements, np.arange(len(self.elements)))

    def take(self, elements: np.ndarray, shape: tuple[int, ...]) -> Operand:
        """The operand moved again: `elements` index this operand, -1 being a real 0."""
        flat = np.asarray(elements).ravel()
        hole = flat < 0
        at = np.maximum(flat, 0)
        slope = None if self.slope is None else self.slope[at]
        intercept = None if self.intercept is None else self.intercept[at]
        elements, fill = np.where(hole, -1, self.elements[at]), np.where(hole, 0.0, self.fill[at])
        return Operand(self.tensor, self.key, shape, elements, fill, slope, intercept)


@dataclass(frozen=True, eq=False)
class Step:
    """Makes the integer tensor `out`, the source of the region that follows."""

    out: str
    node: Node
    shape: tuple[int, ...]

    @property
    def operands(self) -> tuple[Operand, ...]:
        """What it reads."""
        return ()


@dataclass(frozen=True, eq=False)
class Linear(Step):
    """`real(out) = form(x, weight) + bias` with a clear weight.

    Args:
        form: "matmul" (x @ weight), "left" (weight @ x) or "conv" (x already padded).
        weight_name: the weight's name, the key of its quantizer.
        weight: float64, as the form uses it.
        bias: broadcasts against `out`.
        options: strides, dilations and group of a convolution. Of a product with rows of bits: `exact`, what follows needs
            every integer of it; `exclusive`, a number per bit (feature), of those with equal numbers at most one being 1.
        channel: output channel axis, from the end.
    """

    x: Operand
    form: str
    weight_name: str
    weight: np.ndarray
    bias: np.ndarray
    channel: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.x,)

    @property
    def weight_axis(self) -> int:
        """The output channel axis of `weight`, from the end."""
        return {"matmul": -1, "left": -2, "conv": -self.weight.ndim}[self.form]

    @property
    def fan_in(self) -> int:
        """How many elements of `x` each element of `out` is a sum of."""
        shape = self.weight.shape
        return prod({"matmul": shape[-2:-1], "left": shape[-1:], "conv": shape[1:]}[self.form])

    def rows(self, weight: np.ndarray) -> np.ndarray:
        """An array in the weight's shape as `(C, n)`, a row for each output channel."""
        return np.moveaxis(weight, self.weight_axis, 0).reshape(weight.shape[self.weight_axis], -1)


@dataclass(frozen=True, eq=False)
class Sum(Step):
    """`real(out) = coefficient * sum over the last axis of x`, for pools and reductions.

    Args:
        x: shape `(*out.shape, K)`; fillers count as 0.
        coefficient: shape of `out`.
    """

    x: Operand
    coefficient: np.ndarray

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.x,)


@dataclass(frozen=True, eq=False)
class Add(Step):
    """`a + sign * b`, both encrypted, brought to one scale: quantized tensors, or accumulators that go nowhere else."""

    a: Operand
    b: Operand
    sign: int

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.a, self.b)


@dataclass(frozen=True, eq=False)
class Product(Step):
    """`a * b`, both encrypted, elementwise; `contract` sums the last axis (a matrix product)."""

    a: Operand
    b: Operand
    contract: bool

    @property
    def operands(self) -> tuple[Operand, ...]:
        return (self.a, self.b)


@dataclass(frozen=True, eq=False)
class Maximum(Step):
    """The maximum (sign 1) or minimum (sign -1) over the last axis of the operands put side by side.

    Args:
        xs: operands of shapes `(*out.shape, K_i)`, brought to one quantizer.
    """

    xs: tuple[Operand, ...]
    sign: int

    @property
    def operands(self) -> tuple[Operand, ...]:
        return self.xs


@dataclass(frozen=True, eq=False)
class Join(Step):
    """Movement over several quantized tensors (Concat).

    Args:
        pieces: operands; element i of `out` copies element `element[i]` of piece `which[i]` (-1: the filler).
    """

    pieces: tuple[Operand, ...]
    which: np.ndarray
    element: np.ndarray
    fill: np.ndarray

    @property
    def operands(self) -> tuple[Operand, ...]:
        return self.pieces


def makes_accumulator(step: Step) -> bool:
    """Whether a step makes an accumulator (the others pass quantized values on)."""
    return not isinstance(step, (Maximum, Join))


def counts_decisions(step: Step) -> bool:
    """Whether a step counts or weighs decisions: its worst case is tight, and any input may reach it."""
    return isinstance(step, Linear) and ("exact" in step.node.attrs or "exclusive" in step.node.attrs)


def varies_only_along(labels: np.ndarray, axis: int) -> bool:
    """Whether labels (-1 matches anything) are equal along every axis but `axis`."""
    rows = np.moveaxis(labels, axis, 0).reshape(labels.shape[axis], -1)
    top = rows.max(axis=1, keepdims=True)
    return bool(np.all((rows == top) | (rows < 0)))
