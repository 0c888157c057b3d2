"""Quantizers that a model states itself (Brevitas, QONNX, QDQ) as pinned `Affine`s.

A quantizer of a known tensor becomes the tensor's values on the grid; a quantizer of a computed tensor becomes one node
`fheq.FakeQuant`. Both leave their `Affine` in `Graph.pinned`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fheq.affine import Affine, dequantize
from fheq.errors import ModelError, UnsupportedError, describe
from fheq.graph import Graph, Node
from fheq.ops.quantizers import QUANT_DOMAINS, ROUNDINGS
from fheq.ops.table import Kind, Op, register
from fheq.rewriting.edit import Draft
from fheq.rewriting.fold import fold

ON_GRID = 1e-3
BIAS_READERS = ("Conv", "ConvTranspose", "Gemm")
MAX_BITS = 32


@dataclass(frozen=True)
class Grid:
    """A quantizer as a model states it.

    Args:
        scale, zero_point: in the shape that broadcasts against the tensor.
        affine: the same for `Graph.pinned`; None where it has no per-tensor or per-channel form.
        rounding: one of QONNX's modes.
        bits: the width of a Quant node; None for other quantizers.
    """

    scale: np.ndarray
    zero_point: np.ndarray
    qmin: int
    qmax: int
    affine: Affine | None
    rounding: str = "ROUND"
    bits: int | None = None


def fake_quant_row(node: Node, x: Any, scale: Any, zero_point: Any, qmin: Any, qmax: Any) -> Any:
    """fheq.FakeQuant: the values that the integers of a stated quantizer stand for."""
    mode = node.attrs["rounding_mode"]
    steps = x / scale
    steps = jnp.round(steps) + zero_point if mode == "ROUND" else ROUNDINGS[mode](steps + zero_point)
    return (scale * (jnp.clip(steps, qmin, qmax) - zero_point)).astype(x.dtype)


register(Op("FakeQuant", 1, Kind.ELEMENTWISE, fake_quant_row, domain="fheq"))


def normalise_quantizers(graph: Graph) -> Graph:
    """Quantizer nodes as pinned constants, and as one FakeQuant node each on computed tensors.

    A BipolarQuant of a computed tensor becomes GreaterOrEqual and Where, and its output is pinned.

    Raises:
        UnsupportedError: a scale, zero point or width that depends on data, or that has no per-channel form.
    """
    graph = fold(graph, constant_quantizer)
    producers = graph.producers()
    draft = Draft(graph)
    for node in graph.nodes:
        source = node.inputs[0] if node.inputs else ""
        first = producers.get(source)
        if _is(node, "Quant"):
            rank = len(graph.types[source].shape)
            _write_fake_quant(draft, node, source, quant_grid(node, graph.constants, rank))
        elif _is(node, "BipolarQuant"):
            _write_bipolar(draft, node)
        elif node.op == "DequantizeLinear" and not node.domain and first is not None and _pair(first, node, graph.constants):
            integers, rank = graph.types[source].dtype, len(graph.types[source].shape)
            _write_fake_quant(draft, node, first.inputs[0], linear_grid(first, graph.constants, integers, rank))
        else:
            draft.write(node)
    return _without_bias_pins(draft.finish())


def constant_quantizer(node: Node, known: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Affine | None] | None:
    """Value and quantizer of a quantizer node on a known tensor; None for other nodes."""
    if _is(node, "Quant"):
        x = known[node.inputs[0]]
        grid = _widened(quant_grid(node, known, x.ndim), x)
        steps = np.asarray(ROUNDINGS[grid.rounding](x.astype(np.float64) / grid.scale + grid.zero_point))
        q = np.clip(steps, grid.qmin, grid.qmax)
        return np.asarray((q - grid.zero_point) * grid.scale).astype(x.dtype), grid.affine
    if _is(node, "BipolarQuant"):
        x, scale = known[node.inputs[0]], _parameter(node, 1, known)
        return np.where(x >= 0, scale, -scale).astype(x.dtype), bipolar_affine(node, scale, x.ndim)
    if node.op == "DequantizeLinear" and not node.domain:
        q = known[node.inputs[0]]
        if q.dtype == np.int32 or not _is_integer(q.dtype) or node.attrs.get("block_size", 0):
            return None  # biases and blocks: plain values
        affine = linear_grid(node, known, q.dtype, q.ndim).affine
        dtype = known[node.inputs[1]].dtype
        return None if affine is None else (dequantize(affine, q.astype(np.int64)).astype(dtype), affine)
    return None


def quant_grid(node: Node, known: Mapping[str, np.ndarray], ndim: int) -> Grid:
    """The grid of a Quant node of Brevitas or QONNX.

    Raises:
        UnsupportedError: computed or fractional parameters, a width outside 1..32.
    """
    scale, zero_point, bits = (_parameter(node, i, known) for i in (1, 2, 3))
    if bits.size != 1 or bits.item() != int(bits.item()) or not 1 <= bits.item() <= MAX_BITS:
        raise UnsupportedError(
            f"{describe(node)}: bit width {bits.tolist()}; one whole number from 1 to {MAX_BITS} is supported"
        )
    width, signed, narrow = int(bits.item()), bool(node.attrs.get("signed", 1)), bool(node.attrs.get("narrow", 0))
    qmin = -(2 ** (width - 1)) + narrow if signed else 0
    qmax = 2 ** (width - 1) - 1 if signed else 2**width - 1 - narrow
    mode = str(node.attrs.get("rounding_mode", "ROUND")).upper()
    if mode not in ROUNDINGS:
        raise UnsupportedError(f"{describe(node)}: rounding mode {mode!r}; use one of {', '.join(sorted(ROUNDINGS))}")
    mode = "ROUND" if mode == "HALF_EVEN" else mode
    affine = _affine(node, scale, zero_point, qmin, qmax, ndim)
    return Grid(scale, zero_point, qmin, qmax, affine, mode, width)


def linear_grid(node: Node, known: Mapping[str, np.ndarray], dtype: np.dtype, ndim: int) -> Grid:
    """The grid of QuantizeLinear or DequantizeLinear with integers of `dtype` for a tensor of `ndim` axes."""
    scale = _parameter(node, 1, known)
    zero_point = _parameter(node, 2, known) if len(node.inputs) > 2 else np.zeros(())
    limits = ml_dtypes.iinfo(dtype)
    scale, zero_point = (p if p.size == 1 else _along(node, p, ndim) for p in (scale, zero_point))
    qmin, qmax = int(limits.min), int(limits.max)
    return Grid(scale, zero_point, qmin, qmax, _affine(node, scale, zero_point, qmin, qmax, ndim))


def bipolar_affine(node: Node, scale: np.ndarray, ndim: int) -> Affine | None:
    """The integers -1 and 1 (0 is in the range, but no value of the tensor)."""
    return _affine(node, scale, np.zeros(()), -1, 1, ndim)


def _affine(node: Node, scale: np.ndarray, zero_point: np.ndarray, qmin: int, qmax: int, ndim: int) -> Affine | None:
    """A quantizer with leaves of shape () or (C,), or None when the parameters vary along several axes."""
    if not np.all(np.isfinite(scale)) or np.any(scale <= 0):
        raise ModelError(f"{describe(node)}: its scale must be positive and finite")
    if np.any(zero_point != np.round(zero_point)):
        raise UnsupportedError(f"{describe(node)}: its zero point is not whole; quantize with integer zero points")
    leaves, axes = [], set()
    for value in (scale, zero_point):
        if value.ndim > ndim:
            value = value.reshape(value.shape[value.ndim - ndim :] if value.size > 1 else ())
        wide = [i - value.ndim for i, d in enumerate(value.shape) if d != 1]
        axes.update(wide)
        leaves.append(value.astype(np.float64).reshape(-1) if wide else value.astype(np.float64).reshape(()))
    if len(axes) > 1 or any(leaf.ndim and len(axes) != 1 for leaf in leaves):
        return None
    low, high = np.asarray(float(qmin)), np.asarray(float(qmax))
    axis = next(iter(axes), None)
    return Affine(leaves[0], leaves[1], low, high, np.zeros(()), axis=axis, signed=qmin < 0)


def _widened(grid: Grid, x: np.ndarray) -> Grid:
    """The grid that a known tensor really lies on: Brevitas 0.10 declares signed weights unsigned and narrow."""
    steps = x.astype(np.float64) / grid.scale + grid.zero_point
    q = np.round(steps)
    clipped = q.size and (q.min() < grid.qmin or q.max() > grid.qmax)
    if not clipped or np.any(np.abs(steps - q) > ON_GRID) or grid.bits is None or np.abs(q).max() > 2.0**MAX_BITS:
        return grid
    qmin = min(-(2 ** (grid.bits - 1)), int(q.min()))
    qmax = max(2 ** (grid.bits - 1) - 1, int(q.max()))
    affine = grid.affine and replace(
        grid.affine, qmin=np.asarray(float(qmin)), qmax=np.asarray(float(qmax)), signed=qmin < 0
    )
    return replace(grid, qmin=qmin, qmax=qmax, affine=affine)


def _write_fake_quant(draft: Draft, node: Node, source: str, grid: Grid) -> None:
    """One FakeQuant node in place of a quantizer."""
    if grid.affine is None:
        raise UnsupportedError(f"{describe(node)}: a scale per block or per element of a computed tensor is not supported")
    output, dtype = node.outputs[0], draft.types[source].dtype
    parts = (("scale", grid.scale), ("zero_point", grid.zero_point), ("qmin", grid.qmin), ("qmax", grid.qmax))
    shaped = [(label, np.reshape(value, ()) if np.size(value) == 1 else value) for label, value in parts]
    names = [draft.constant(f"{output}/{label}", value, dtype) for label, value in shaped]
    attrs = MappingProxyType({"rounding_mode": grid.rounding})
    draft.write(Node(node.name, "FakeQuant", (source, *names), node.outputs[:1], attrs, "fheq", 1))
    draft.pinned[output] = grid.affine


def _write_bipolar(draft: Draft, node: Node) -> None:
    """A BipolarQuant of a computed tensor as a comparison and a choice between two known values."""
    source, output = node.inputs[0], node.outputs[0]
    scale, dtype = _parameter(node, 1, draft.constants), draft.types[source].dtype
    affine = bipolar_affine(node, scale, len(draft.types[source].shape))
    if affine is None:
        raise UnsupportedError(f"{describe(node)}: a scale per block or per element is not supported")
    zero, high, low = (
        draft.constant(f"{output}/{label}", value, dtype)
        for label, value in (("zero", np.zeros(())), ("high", scale), ("low", -scale))
    )
    draft.apply(node, "Where", draft.apply(node, "GreaterOrEqual", source, zero), high, low, out=output)
    draft.pinned[output] = affine


def _pair(first: Node, second: Node, constants: Mapping[str, np.ndarray]) -> bool:
    """Whether QuantizeLinear and DequantizeLinear use the same scale and zero point."""
    if first.op != "QuantizeLinear" or first.domain:
        return False
    same = first.attrs.get("block_size", 0) == second.attrs.get("block_size", 0) == 0
    for position in (1, 2):
        a, b = (_parameter(n, position, constants) if len(n.inputs) > position else np.zeros(()) for n in (first, second))
        same = same and a.size == b.size and np.array_equal(a.ravel(), b.ravel())
        same = same and (a.size == 1 or first.attrs.get("axis", 1) == second.attrs.get("axis", 1))
    return same


def _parameter(node: Node, position: int, known: Mapping[str, np.ndarray]) -> np.ndarray:
    name = node.inputs[position] if position < len(node.inputs) else ""
    if name not in known:
        raise UnsupportedError(
            f"{describe(node)}: its input {position} ({name!r}) is {'computed from data' if name else 'absent'}; fheq takes "
            "quantizers with known scale, zero point and bit width"
        )
    return known[name].astype(np.float64)


def _along(node: Node, parameter: np.ndarray, ndim: int) -> np.ndarray:
    axis = node.attrs.get("axis", 1)
    if parameter.ndim != 1 or not -ndim <= axis < ndim:
        raise UnsupportedError(f"{describe(node)}: parameters of shape {parameter.shape} on axis {axis} are not supported")
    return parameter.reshape((-1,) + (1,) * (ndim - axis % ndim - 1))


def _without_bias_pins(graph: Graph) -> Graph:
    """Known biases stay plain values: their precision is the accumulator's."""
    readers = graph.consumers()

    def is_bias(name: str) -> bool:
        users = readers.get(name, [])
        return bool(users) and all(n.op in BIAS_READERS and n.inputs.index(name) == 2 for n in users)

    pinned = {n: a for n, a in graph.pinned.items() if not (n in graph.constants and is_bias(n))}
    return graph.replace(pinned=pinned)


def _is(node: Node, op: str) -> bool:
    return node.op == op and node.domain in QUANT_DOMAINS


def _is_integer(dtype: np.dtype) -> bool:
    try:
        return bool(ml_dtypes.iinfo(dtype)) or True
    except ValueError:
        return False
