"""Quantizers that a model states itself (Brevitas, QONNX, QDQ) as pinned `Affine`s.

A quantizer of a known tensor becomes the tensor's values on the grid; a quantizer of a computed tensor becomes one node
`fheq.FakeQuant`. Both leave their `Affine` in `Graph.pinned`.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fheq.affine import Affine, dequantize, integers_of
from fheq.errors import UnsupportedError
from fheq.graph import Graph, Node, describe
from fheq.ops.arguments import dtype_of
from fheq.ops.quantizers import QUANT_DOMAINS
from fheq.rewriting.edit import Draft
from fheq.rewriting.fold import fold
from fheq.stated.grids import (
    DOMAIN,
    MAX_BITS,
    STATED,
    Grid,
    affine_of,
    bit_width,
    is_integer,
    known_grid,
    limits,
    parameter,
    quant_grid,
    rounding_mode,
    stated_grid,
    write_fake_quant,
)
from fheq.stated.qdq import Twins

ON_GRID = 1e-3
BIAS_READERS = ("Conv", "ConvTranspose", "Gemm")


def normalise_quantizers(graph: Graph) -> Graph:
    """Quantizer nodes as pinned constants, and as one FakeQuant node each on computed tensors.

    Raises:
        UnsupportedError: a scale, zero point or width that depends on data, or that has no per-channel form.
    """
    graph = fold(graph, constant_quantizer)
    draft = Draft(graph)
    twins = Twins(draft)
    for node in graph.nodes:
        if _is(node, "Quant", "IntQuant"):
            grid = quant_grid(node, graph.constants, len(graph.types[node.inputs[0]].shape))
            write_fake_quant(draft, node, node.inputs[0], grid, node.outputs[0])
        elif _is(node, "Trunc"):
            _write_trunc(draft, node)
        elif _is(node, "BipolarQuant"):
            grid = bipolar_grid(node, graph.constants, len(graph.types[node.inputs[0]].shape))
            write_fake_quant(draft, node, node.inputs[0], grid, node.outputs[0])
        elif node.domain == DOMAIN and node.op in STATED:
            grid = stated_grid(node, graph.constants, len(graph.types[node.inputs[0]].shape))
            write_fake_quant(draft, node, node.inputs[0], grid, node.outputs[0])
        elif not twins.write(node):
            draft.write(node)
    return _without_bias_pins(draft.finish())


def constant_quantizer(node: Node, known: Mapping[str, np.ndarray]) -> tuple[np.ndarray, Affine | None] | None:
    """Value and quantizer of a quantizer node on a known tensor; None for other nodes."""
    if _is(node, "Quant", "IntQuant"):
        x = known[node.inputs[0]]
        grid = _widened(quant_grid(node, known, x.ndim), x)
        steps = np.asarray(x, np.float64) / grid.scale
        q = np.clip(integers_of(grid.rounding, steps, grid.zero_point), grid.qmin, grid.qmax)
        return np.asarray((q - grid.zero_point) * grid.scale).astype(x.dtype), grid.affine
    if _is(node, "BipolarQuant"):
        x = known[node.inputs[0]]
        grid = bipolar_grid(node, known, x.ndim)
        return np.where(x >= 0, grid.scale, -grid.scale).astype(x.dtype), grid.affine
    if node.op == "DequantizeLinear" and not node.domain:
        q = known[node.inputs[0]]
        if q.dtype == np.int32 or not is_integer(q.dtype):
            return None  # biases: plain values
        integers, affine = known_grid(node, known, q)
        code = node.attrs.get("output_dtype", 0)
        dtype = dtype_of(node, code) if code else known[node.inputs[1]].dtype
        return dequantize(affine, integers).astype(dtype), affine
    return None


def _widened(grid: Grid, x: np.ndarray) -> Grid:
    """The grid that a known tensor really lies on: Brevitas 0.10 declares signed weights unsigned and narrow."""
    steps = x.astype(np.float64) / grid.scale + grid.zero_point
    q = np.round(steps)
    clipped = q.size and (q.min() < grid.qmin or q.max() > grid.qmax)
    if not clipped or np.any(np.abs(steps - q) > ON_GRID) or grid.bits is None or np.abs(q).max() > 2.0**MAX_BITS:
        return grid
    qmin = min(-(2 ** (grid.bits - 1)), int(q.min()))
    qmax = max(2 ** (grid.bits - 1) - 1, int(q.max()))
    return grid.with_range(qmin, qmax)


def bipolar_grid(node: Node, known: Mapping[str, np.ndarray], ndim: int) -> Grid:
    """The integers -1 and 1 of a BipolarQuant node (0 is in the range, but no value of the tensor)."""
    scale, zero = parameter(node, 1, known), np.zeros(())
    return Grid(scale, zero, -1, 1, affine_of(node, scale, zero, -1, 1, ndim), "SIGN")


def _write_trunc(draft: Draft, node: Node) -> None:
    """A Trunc of a computed tensor: its integers, a FakeQuant that drops their low bits, and their scale."""
    source, output, known = node.inputs[0], node.outputs[0], draft.constants
    scale, zero_point = (parameter(node, i, known) for i in (1, 2))
    if scale.size != 1 or zero_point.size != 1:
        raise UnsupportedError(f"{describe(node)}: Trunc with a scale per channel is not supported; use one per tensor")
    width = bit_width(node, len(node.inputs) - 1, known)
    if len(node.inputs) > 5:  # version 2 states the new scale, and clips
        cell = 2.0 ** np.round(np.log2(parameter(node, 4, known) / scale)).item()
        step, shifted = parameter(node, 4, known), zero_point / cell
        qmin, qmax = limits(width, bool(node.attrs.get("signed", 1)), bool(node.attrs.get("narrow", 0)))
    else:
        cell, step, shifted = 2.0 ** (bit_width(node, 3, known) - width), scale, zero_point
        qmin, qmax = limits(width, True, False)[0], limits(width, False, False)[1]
    dtype = draft.types[source].dtype
    constant = lambda label, value: draft.constant(f"{output}/{label}", np.reshape(value, ()), dtype)
    x = draft.apply(node, "Div", source, constant("scale", scale))
    x = draft.apply(node, "Round", draft.apply(node, "Add", x, constant("zero", zero_point)))
    whole = affine_of(node, np.asarray(cell), np.zeros(()), qmin, qmax, 0)
    grid = Grid(np.asarray(cell), np.zeros(()), qmin, qmax, whole, rounding_mode(node, "FLOOR"))
    kept = draft.fresh(f"{output}/kept")
    write_fake_quant(draft, node, x, grid, kept)
    del draft.pinned[kept]
    x = draft.apply(node, "Sub", draft.apply(node, "Div", kept, constant("cell", cell)), constant("shifted", shifted))
    draft.apply(node, "Mul", x, constant("step", step), out=output)
    if shifted == np.round(shifted):
        draft.pinned[output] = affine_of(node, step, shifted, qmin, qmax, 0)


def _without_bias_pins(graph: Graph) -> Graph:
    """Known biases stay plain values: their precision is the accumulator's."""
    readers = graph.consumers()

    def is_bias(name: str) -> bool:
        users = readers.get(name, [])
        return bool(users) and all(n.op in BIAS_READERS and n.inputs.index(name) == 2 for n in users)

    pinned = {n: a for n, a in graph.pinned.items() if not (n in graph.constants and is_bias(n))}
    return graph.replace(pinned=pinned)


def _is(node: Node, *ops: str) -> bool:
    return node.op in ops and node.domain in QUANT_DOMAINS
