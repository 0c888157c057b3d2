"""Primitives whose every result element is a copy of an operand's element."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import numpy as np
from jax import lax

from fheq.errors import UnsupportedError
from fheq.jaxpr.equation import Equation


def _reshape(e: Equation) -> str:
    x, order = e.inputs[0], e.params["dimensions"]
    return e.reshape(x if order is None else e.transpose(x, order), e.shape)


def _broadcast_in_dim(e: Equation) -> str:
    (x,), places = e.inputs, e.params["broadcast_dimensions"]
    narrow = [1] * len(e.shape)
    for size, place in zip(e.shape_of(x), places):
        narrow[place] = size
    x = e.reshape(x, narrow)
    return x if tuple(narrow) == e.shape else e.apply("Expand", x, e.integers(e.shape))


def _slice(e: Equation) -> str:
    starts, ends = e.params["start_indices"], e.params["limit_indices"]
    steps = e.params["strides"] or (1,) * len(starts)
    axes = range(len(starts))
    return e.apply("Slice", e.inputs[0], *(e.integers(list(v)) for v in (starts, ends, axes, steps)))


def _split(e: Equation) -> list[str]:
    edges = np.cumsum([0, *e.params["sizes"]])
    axis, one = e.integers([e.params["axis"]]), e.integers([1])
    return [e.apply("Slice", e.inputs[0], e.integers([low]), e.integers([high]), axis, one) for low, high in pairwise(edges)]


def _pad(e: Equation) -> str:
    x, value = e.inputs
    config = e.params["padding_config"]
    if any(inner for _, _, inner in config) or not e.is_known(value):
        return _copied(lax.pad_p, (0, 1))(e)
    pads = [low for low, _, _ in config] + [high for _, high, _ in config]
    return e.apply("Pad", x, e.integers(pads), value, mode="constant") if any(pads) else x


def _copied(primitive: Any, data: Sequence[int] = (0,)) -> Callable[[Equation], str]:
    """A primitive that copies elements: applied to the numbers of the elements, it says which go where.

    Args:
        data: positions of the operands that it copies from; the others must be known.
    """

    def rule(e: Equation) -> str:
        sizes = {i: int(np.prod(e.shape_of(e.inputs[i]))) for i in data if i < len(e.inputs)}
        starts = dict(zip(sizes, np.cumsum([0, *sizes.values()])))
        operands = [
            starts[i] + np.arange(sizes[i], dtype=np.int32).reshape(e.shape_of(name))
            if i in sizes
            else e.known(name, f"its operand {i}")
            for i, name in enumerate(e.inputs)
        ]
        params = {**e.params, "fill_value": -1} if "fill_value" in e.params else e.params
        subfuns, params = primitive.get_bind_params(params)
        with jax.ensure_compile_time_eval():
            places = np.asarray(primitive.bind(*subfuns, *(np.asarray(v).astype(v.dtype) for v in operands), **params))
        if np.any(places < 0):
            raise UnsupportedError("an index is out of bounds")
        flat = [e.reshape(e.inputs[i], (-1,) if sizes[i] else (0,)) for i in sizes]
        whole = flat[0] if len(flat) == 1 else e.apply("Concat", *flat, axis=0)
        return e.apply("Gather", whole, e.integers(places.ravel(), places.shape), axis=0)

    return rule


def _gather(e: Equation) -> str:
    """Known indices; or rows of a tensor by computed ones."""
    x, indices = e.inputs
    if e.is_known(indices):
        return _copied(lax.gather_p)(e)
    numbers, shape = e.params["dimension_numbers"], e.shape_of(x)
    (axis,) = numbers.start_index_map if len(numbers.start_index_map) == 1 else (-1,)
    whole = tuple(1 if i == axis else size for i, size in enumerate(shape))
    leading = tuple(range(len(e.shape_of(indices)) - 1))
    inner = tuple(i for i in range(len(e.shape)) if i not in numbers.offset_dims)
    expected = tuple(range(axis, axis + len(leading)))
    rows = numbers.collapsed_slice_dims == (axis,) and tuple(e.params["slice_sizes"]) == whole and inner == expected
    if axis < 0 or not rows or numbers.operand_batching_dims:
        raise UnsupportedError("its indices depend on data, and it takes other than whole rows along one axis")
    return e.rows(x, e.reshape(indices, e.shape_of(indices)[:-1]), int(axis))


RULES = {
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": lambda e: e.apply("Concat", *e.inputs, axis=int(e.params["dimension"])),
    "dynamic_slice": _copied(lax.dynamic_slice_p),
    "dynamic_update_slice": _copied(lax.dynamic_update_slice_p, (0, 1)),
    "expand_dims": lambda e: e.reshape(e.inputs[0], e.shape),
    "gather": _gather,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _copied(lax.rev_p),
    "scatter": _copied(lax.scatter_p, (0, 2)),
    "slice": _slice,
    "split": _split,
    "squeeze": lambda e: e.reshape(e.inputs[0], e.shape),
    "transpose": lambda e: e.transpose(e.inputs[0], e.params["permutation"]),
}
