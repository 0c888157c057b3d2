"""Whether the integers that a step sums or compares are in equal units."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from fheq.errors import QuantizationError
from fheq.graph import describe
from fheq.integers.decoders import Decoder, operand_axis, operand_decoder
from fheq.planning.plan import Plan
from fheq.qparams import QParams
from fheq.steps import Linear, Maximum, Product, Step, Sum

TOLERANCE = 1e-6  # relative; stated scales are float32
OFFSET = 256.0  # steps of an offset to which the tolerance holds


def check_alignment(layout: Plan, qparams: QParams) -> None:
    """Checks the quantizers of tensors against the steps that read them. Those of `fit` hold; a model or an edit may state
    scales that a step cannot undo.

    Raises:
        QuantizationError: naming the node and the tensors.
    """
    read = partial(operand_decoder, layout, qparams, found={})
    for step in layout.steps:
        if not _aligned(read, step):
            names = " and ".join(repr(operand.tensor) for operand in step.operands)
            raise QuantizationError(
                f"{describe(step.node)} sums or compares integers of {names} that have different scales there: quantize "
                "them alike (with one scale, the same for what is compared), or along an axis that the node keeps apart"
            )


def _aligned(read: Callable[..., Decoder], step: Step) -> bool:
    if isinstance(step, Linear):
        axis = operand_axis(step)
        assert axis is not None
        x = read(step.x, axis)
        rows = lambda v: np.moveaxis(v, axis, 0).reshape(v.shape[axis], -1)
        return _equal(rows(x.scale)) and _equal(rows(x.offset), rows(x.scale))
    if isinstance(step, Sum):
        scale = read(step.x).scale
        valid = (step.x.elements >= 0).reshape(step.x.shape)
        at = np.argmax(valid, axis=-1)[..., None]
        return _equal(np.where(valid, scale, np.take_along_axis(scale, at, -1)))
    if isinstance(step, Product) and step.contract:
        a, b = (read(o).scale for o in step.operands)
        return _equal(a * b)
    if isinstance(step, Maximum):
        parts = [read(x) for x in step.xs]
        whole = Decoder(*(np.concatenate(column, axis=-1) for column in zip(*parts)))
        return _equal(whole.scale) and _equal(whole.offset, whole.scale)
    return True


def _equal(values: np.ndarray, unit: np.ndarray | None = None) -> bool:
    """Whether rows hold one value each, to a small part of the unit (by default, of the value)."""
    if not values.size:
        return True
    first = values[..., :1]
    return bool(np.all(np.abs(values - first) <= TOLERANCE * np.abs(first if unit is None else OFFSET * unit)))
