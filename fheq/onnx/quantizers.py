"""Quantizers as the nodes of an exported model: QuantizeLinear and DequantizeLinear, or plain operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from fheq.affine import Affine
from fheq.errors import QuantizationError, UnsupportedError
from fheq.onnx.writer import Writer

_CONTAINERS = (np.uint8, np.int8, np.uint16, np.int16)
_ROUNDERS = {"FLOOR": "Floor", "CEIL": "Ceil", "HALF_EVEN": "Round"}


def write_quantizer(writer: Writer, tensor: str, affine: Affine, shape: tuple[int, ...], out: str) -> None:
    """A tensor of a shape on the grid of a quantizer of any mode."""
    if affine.mode == "ROUND":
        write_pair(writer, tensor, affine, shape, out)
        return
    a = affine.expanded(len(shape))
    leaves = (np.asarray(v, np.float32) for v in (a.scale, a.zero_point, a.qmin, a.qmax))
    write_rounded(writer, tensor, affine.mode, tuple(leaves), out)


def write_pair(writer: Writer, source: str, affine: Affine, shape: tuple[int, ...], out: str) -> None:
    """QuantizeLinear and DequantizeLinear, with a clip between them where the container has more integers.

    The integers are unsigned, and of 16 bits where scales differ by channel: onnxruntime rewrites signed ones and fuses
    those of 8 bits, and fails at what it has made.
    """
    zero = np.asarray(affine.zero_point)
    moved = -np.minimum(np.min(affine.qmin), np.min(zero))
    affine = replace(affine, zero_point=zero + moved, qmin=affine.qmin + moved, qmax=affine.qmax + moved)
    low, high, zero = (np.asarray(v, np.float64) for v in (affine.qmin, affine.qmax, affine.zero_point))
    several = affine.axis is not None and np.size(affine.scale) > 1
    dtype = np.uint16 if several else container(out, 0.0, float(max(high.max(), zero.max())))
    names, axis = write_parameters(writer, out, affine, dtype, len(shape))
    q = writer.emit("QuantizeLinear", [source, *names], f"{out}/q", **axis)
    limits = np.iinfo(dtype)
    if np.all(low == limits.min) and np.all(high == limits.max):
        clipped = q
    elif limits.bits == 8 and low.min() == low.max() and high.min() == high.max():
        bounds = [writer.constant(f"{out}/{n}", dtype(v.min())) for n, v in (("low", low), ("high", high))]
        clipped = writer.emit("Clip", [q, *bounds], f"{out}/clipped")
    else:  # onnxruntime compares per channel in 32 bits alone
        expanded = affine.expanded(len(shape))
        ends = [np.asarray(v).astype(np.int32) for v in (expanded.qmin, expanded.qmax)]
        wide = writer.emit("Cast", [q], f"{out}/wide", to=TensorProto.INT32)
        wide = writer.emit("Max", [wide, writer.constant(f"{out}/low", ends[0])], f"{out}/not_below")
        wide = writer.emit("Min", [wide, writer.constant(f"{out}/high", ends[1])], f"{out}/within")
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        clipped = writer.emit("Cast", [wide], f"{out}/clipped", to=kind)
    writer.emit("DequantizeLinear", [clipped, *names], out, **axis)


def write_rounded(writer: Writer, tensor: str, mode: str, leaves: tuple[np.ndarray, ...], out: str) -> None:
    """A quantizer whose mode QuantizeLinear does not have.

    Args:
        leaves: scale, zero point, qmin and qmax, broadcasting against the tensor.
    """
    scale, zero, low, high = (
        writer.constant(f"{out}/{label}", value) for label, value in zip(("scale", "zero", "low", "high"), leaves)
    )
    if mode == "SIGN":
        above = writer.emit("GreaterOrEqual", [tensor, writer.constant(f"{out}/none", np.float32(0))], f"{out}/above")
        writer.emit("Where", [above, scale, writer.constant(f"{out}/below", -leaves[0])], out)
        return
    if mode not in _ROUNDERS:
        raise UnsupportedError(f"quantizer of {out!r}: QDQ has no form for the rounding mode {mode}; use ROUND")
    steps = writer.emit("Add", [writer.emit("Div", [tensor, scale], f"{out}/steps"), zero], f"{out}/moved")
    q = writer.emit(_ROUNDERS[mode], [steps], f"{out}/whole")
    q = writer.emit("Min", [writer.emit("Max", [q, low], f"{out}/not_below"), high], f"{out}/integers")
    writer.emit("Mul", [writer.emit("Sub", [q, zero], f"{out}/centred"), scale], out)


def write_parameters(writer: Writer, out: str, affine: Affine, dtype: Any, ndim: int) -> tuple[list[str], dict[str, int]]:
    """Names of the scale and zero point of QuantizeLinear or DequantizeLinear, and its axis."""
    scale, zero = np.asarray(affine.scale, np.float32), np.asarray(affine.zero_point)
    scale, zero = np.broadcast_arrays(scale, zero)
    if np.any(zero != np.round(zero)):
        raise QuantizationError(f"quantizer of {out!r}: its zero point is not whole, so QDQ cannot state it")
    axis = {"axis": affine.axis % ndim} if affine.axis is not None and scale.ndim else {}
    parts = (("scale", scale), ("zero_point", zero.astype(dtype)))
    return [writer.constant(f"{out}/{label}", np.ascontiguousarray(v)) for label, v in parts], axis


def container(name: str, low: float, high: float) -> Any:
    """The smallest integer type of 8 or 16 bits that holds a range."""
    for dtype in _CONTAINERS:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    raise QuantizationError(f"quantizer of {name!r}: integers or a zero point from {low:g} to {high:g} do not fit 16 bits")
