"""Quantizers as the nodes of an exported model: QuantizeLinear and DequantizeLinear, or plain operators."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fheq.affine import DIRECTED, SNAP, Affine
from fheq.errors import QuantizationError, UnsupportedError
from fheq.onnx.writer import OPSET, Writer
from fheq.stated.grids import DOMAIN, PARAMETERS, STATED

_CONTAINERS = (np.uint8, np.int8, np.uint16, np.int16)
_ROUNDERS = {"FLOOR": "Floor", "CEIL": "Ceil", "HALF_EVEN": "Round"}


def write_quantizer(writer: Writer, tensor: str, affine: Affine, shape: tuple[int, ...], out: str) -> None:
    """A tensor of a shape on the grid of a quantizer of any mode."""
    if affine.mode == "ROUND":
        write_pair(writer, tensor, affine, shape, out)
        return
    a = affine.expanded(len(shape))
    leaves = (np.asarray(v) for v in (a.scale, a.zero_point, a.qmin, a.qmax))
    write_rounded(writer, tensor, affine.mode, tuple(leaves), out)


def write_pair(writer: Writer, source: str, affine: Affine, shape: tuple[int, ...], out: str) -> None:
    """QuantizeLinear and DequantizeLinear, with a clip between them where the container has more integers.

    The integers are unsigned, and of 16 bits where scales differ by channel: onnxruntime rewrites signed ones and fuses
    those of 8 bits, and fails at what it has made. More bits, as a zero point far from the range has, take a function.
    """
    if not fits_container(affine):
        a = affine.expanded(len(shape))
        write_rounded(writer, source, "ROUND", tuple(map(np.asarray, (a.scale, a.zero_point, a.qmin, a.qmax))), out)
        return
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


def fits_container(affine: Affine) -> bool:
    """Whether 16 bits hold a quantizer's integers and its zero point."""
    low, high = (np.minimum(affine.qmin, affine.zero_point), np.maximum(affine.qmax, affine.zero_point))
    return float(np.max(high)) - float(np.min(low)) <= np.iinfo(np.uint16).max


def write_rounded(writer: Writer, tensor: str, mode: str, leaves: tuple[np.ndarray, ...], out: str) -> None:
    """A quantizer that QuantizeLinear does not have, by its mode or by its integers: a function of the model.

    Args:
        leaves: scale, zero point, qmin and qmax, broadcasting against the tensor.
    """
    if mode not in STATED.values():
        raise UnsupportedError(f"quantizer of {out!r}: QDQ has no form for the rounding mode {mode}; use ROUND")
    names = [writer.constant(f"{out}/given/{n}", np.asarray(v, np.float64)) for n, v in zip(PARAMETERS, leaves)]
    op = next(op for op, stated in STATED.items() if stated == mode)
    writer.nodes.append(helper.make_node(op, [tensor, *names], [out], name=out, domain=DOMAIN))


def quantizer_functions() -> list[onnx.FunctionProto]:
    """The functions that `write_rounded` calls: `fheq.affine.integers_of` in plain ONNX, in double precision."""
    return [_function(op, mode) for op, mode in STATED.items()]


def _function(op: str, mode: str) -> onnx.FunctionProto:
    make = lambda kind, inputs, out, **attrs: helper.make_node(kind, inputs, [out], **attrs)
    known = lambda name, value: make("Constant", [], name, value=numpy_helper.from_array(np.asarray(value, np.float64)))
    nodes = [make("Cast", ["x"], "wide", to=TensorProto.DOUBLE)]
    if mode == "SIGN":
        nodes += [known("none", 0), make("GreaterOrEqual", ["wide", "none"], "above"), make("Neg", ["scale"], "below")]
        nodes += [make("Where", ["above", "scale", "below"], "real")]
    else:
        nodes += [make("Div", ["wide", "scale"], "steps")]
        if mode in DIRECTED:
            nodes += [make("Round", ["steps"], "nearest"), make("Sub", ["steps", "nearest"], "apart")]
            nodes += [make("Abs", ["apart"], "distance"), make("Abs", ["nearest"], "size"), known("error", SNAP)]
            nodes += [make("Mul", ["size", "error"], "near"), make("LessOrEqual", ["distance", "near"], "on_grid")]
            nodes += [make("Where", ["on_grid", "nearest", "steps"], "snapped")]
        steps = "snapped" if mode in DIRECTED else "steps"
        if mode == "ROUND":  # before the zero point is added
            nodes += [make("Round", [steps], "kept"), make("Add", ["kept", "zero_point"], "whole")]
        else:
            nodes += [make("Add", [steps, "zero_point"], "moved"), make(_ROUNDERS[mode], ["moved"], "whole")]
        nodes += [make("Max", ["whole", "qmin"], "not_below"), make("Min", ["not_below", "qmax"], "integers")]
        nodes += [make("Sub", ["integers", "zero_point"], "centred"), make("Mul", ["centred", "scale"], "real")]
    nodes += [make("CastLike", ["real", "x"], "y")]
    return helper.make_function(DOMAIN, op, ["x", *PARAMETERS], ["y"], nodes, [helper.make_opsetid("", OPSET)])


def write_parameters(writer: Writer, out: str, affine: Affine, dtype: Any, ndim: int) -> tuple[list[str], dict[str, int]]:
    """Names of the scale and zero point of QuantizeLinear or DequantizeLinear, and its axis."""
    scale, zero = np.asarray(affine.scale, np.float32), np.asarray(affine.zero_point)
    scale, zero = np.broadcast_arrays(scale, zero)
    if np.any(zero != np.round(zero)):
        raise QuantizationError(f"quantizer of {out!r}: its zero point is not whole, so QDQ cannot state it")
    axis = {"axis": affine.axis % ndim} if affine.axis is not None and scale.ndim else {}
    parts = (("scale", scale), ("zero_point", zero.astype(dtype)))
    return [writer.constant(f"{out}/{label}", np.ascontiguousarray(v)) for label, v in parts], axis


def container(name: str, low: float, high: float, least: int = 8) -> Any:
    """The smallest integer type of 8 or 16 bits, of `least` ones at least, that holds a range."""
    for dtype in _CONTAINERS:
        if np.iinfo(dtype).bits >= least and np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    raise QuantizationError(f"quantizer of {name!r}: integers or a zero point from {low:g} to {high:g} do not fit 16 bits")
