"""What quantization learns: a pytree of Affines."""

from __future__ import annotations

from dataclasses import dataclass, replace

import jax
import numpy as np

from fheq.affine import Affine, affine_bits
from fheq.display.console import shorten, span, text_table

PARTS = ("tensors", "weights", "accumulators")
"""The fields of `QParams`."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QParams:
    """The quantizers of a graph. It is a pytree whose leaves are the leaves of its Affines.

    Args:
        tensors: quantizers of the model's inputs and of the tensors that tables make, by tensor name.
        weights: quantizers of weights, by weight name. A weight is quantized after the scales of the input channels that it
            reads, relative to the largest, have been multiplied in; the axis is that of the matrix as it is used (input
            features by output features) or of the convolution kernel.
        accumulators: integers before tables, by the name of the tensor that a linear op (or a sum or product of two
            encrypted tensors) makes: `scale * (acc - zero_point)` is the tensor, its bias included, for acc in [qmin, qmax];
            `lsbs` low bits of acc are removed. The zero point may be fractional. Lowering takes the real range and `lsbs`
            from here.
    """

    tensors: dict[str, Affine]
    weights: dict[str, Affine]
    accumulators: dict[str, Affine]

    def __str__(self) -> str:
        """Every quantizer on a line."""
        parts = (("tensor", self.tensors), ("weight", self.weights), ("accumulator", self.accumulators))
        rows = [_row(shorten(name), kind, affine) for kind, part in parts for name, affine in part.items()]
        return text_table(("name", "kind", "bits", "qs", "lsbs", "scale"), rows)


def unsigned(qparams: QParams) -> QParams:
    """The same real grids with integers from 0: what is encrypted is never negative."""

    def shifted(a: Affine) -> Affine:
        scale, zero_point, qmin, qmax = (np.asarray(v, np.float64) for v in (a.scale, a.zero_point, a.qmin, a.qmax))
        low = qmin if a.mode == "ROUND" else np.min(qmin)
        origin = a.origin if a.mode == "ROUND" else a.origin + int(low)
        moved = replace(a, zero_point=zero_point - low, qmin=qmin - low, qmax=qmax - low)
        return replace(moved, scale=scale, signed=False, origin=origin)

    host = lambda part: jax.tree.map(lambda v: np.asarray(v, np.float64), part)
    tensors = {name: shifted(a) for name, a in qparams.tensors.items()}
    return QParams(tensors, host(qparams.weights), host(qparams.accumulators))


def _row(name: str, kind: str, affine: Affine) -> list[str]:
    leaves = (affine.scale, affine.qmin, affine.qmax, affine.lsbs)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return [name, kind, *["traced"] * 4]
    scales = np.size(affine.scale)
    count = str(scales) if affine.axis is not None else "1"
    return [name, kind, str(affine_bits(affine)), count, span(affine.lsbs), span(affine.scale)]
