"""Linear operators without a form of their own, as products with known matrices (rules of `fheq.rewriting.decompose`)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

import numpy as np
from jax.experimental import enable_x64

from fheq.affine import Affine
from fheq.graph import Node
from fheq.ops.arguments import MAX_ELEMENTS
from fheq.ops.linear import col2im_places
from fheq.ops.resize import axis_matrices, interpolates
from fheq.ops.sampling import grid_taps, roi_taps
from fheq.ops.spectra import dft_axis
from fheq.ops.table import lookup
from fheq.rewriting.edit import CODES, Draft

FINEST = 1024
LARGEST = 255


def exact_constant(draft: Draft, base: str, value: np.ndarray, dtype: np.dtype) -> str:
    """A known tensor; of small multiples of one number, it gets the quantizer that makes them its integers.

    Weights such as 0 and 1 (a selection) or 1/4 and 3/4 (an interpolation) then make no accumulator wider than need be.
    """
    name = draft.constant(base, value, dtype)
    values = np.asarray(value, np.float64)
    top = np.max(np.abs(values), initial=0)
    for parts in range(1, FINEST + 1):
        whole = np.round(values * parts)
        if top * parts > LARGEST:
            break
        if np.all(np.abs(whole - values * parts) < 1e-6 * parts):
            zero = np.zeros(())
            high = max(float(np.max(np.abs(whole), initial=0)), 1.0)
            draft.pinned[name] = Affine(zero + 1 / parts, zero, zero - high, zero + high, zero, signed=True)
            break
    return name


def _mapped(draft: Draft, node: Node, x: str, axes: Sequence[int], matrix: np.ndarray, sizes: Sequence[int]) -> None:
    """The product over `axes` of x with a matrix (their elements, those of the result), whose axes have `sizes` then."""
    shape, out = draft.types[x].shape, node.outputs[0]
    rest = [a for a in range(len(shape)) if a not in axes]
    order = (*rest, *axes)
    last = order == tuple(range(len(shape)))
    moved = x if last else draft.apply(node, "Transpose", x, perm=order)
    flat = draft.constant(f"{out}/shape", [-1, len(matrix)], np.dtype(np.int64))
    rows = draft.apply(node, "Reshape", moved, flat, allowzero=0)
    product = draft.apply(node, "MatMul", rows, exact_constant(draft, f"{out}/matrix", matrix, draft.types[x].dtype))
    full = draft.constant(f"{out}/shape", [*(shape[a] for a in rest), *sizes], np.dtype(np.int64))
    wide = draft.apply(node, "Reshape", product, full, out=out if last else "", allowzero=0)
    if not last:
        draft.apply(node, "Transpose", wide, out=out, perm=tuple(int(i) for i in np.argsort(order)))


def _resize(draft: Draft, node: Node) -> bool:
    """Resize and Upsample that interpolate: one matrix for all the axes that change."""
    x, shape = node.inputs[0], draft.types[node.inputs[0]].shape
    if not interpolates(node) or any(n not in draft.constants for n in node.inputs[1:] if n):
        return False
    if draft.types[x].dtype.kind in "iu":
        real = draft.fresh(f"{node.outputs[0]}/real")
        draft.write(replace(node, inputs=(draft.cast(node, x, np.float32), *node.inputs[1:]), outputs=(real,)))
        draft.apply(node, "Cast", real, to=CODES[draft.types[x].dtype], out=node.outputs[0])
        return True
    found = axis_matrices(node, shape, [draft.constants.get(n) for n in node.inputs[1:]])
    if found is None:
        return False
    axes = [axis for axis in range(len(shape)) if axis in found]
    if not axes or np.prod([float(found[a].size) for a in axes]) > MAX_ELEMENTS:
        return False
    matrix = reduce(np.kron, [found[a] for a in axes]).T
    _mapped(draft, node, x, axes, matrix, [len(found[a]) for a in axes])
    return True


def _col2im(draft: Draft, node: Node) -> bool:
    """Col2Im: every place of the image adds up the places of blocks that lie on it."""
    image, block = (draft.constants[name] for name in node.inputs[1:3])
    places, _ = col2im_places(node, image, block)
    samples, rows, blocks = draft.types[node.inputs[0]].shape
    size, shape = int(np.prod(block)), draft.types[node.outputs[0]].shape
    area = int(np.prod(shape[2:]))
    matrix = np.zeros((size * blocks, area))
    matrix[np.flatnonzero(places >= 0), places[places >= 0]] = 1
    target = draft.constant(f"{node.outputs[0]}/shape", [samples, rows // size, size * blocks], np.dtype(np.int64))
    wide = draft.apply(node, "Reshape", node.inputs[0], target, allowzero=0)
    _mapped(draft, node, wide, [2], matrix, shape[2:])
    return True


def _fourier(draft: Draft, node: Node) -> bool:
    """DFT and STFT: what they make of unit vectors is their matrix."""
    x, shape, known = node.inputs[0], draft.types[node.inputs[0]].shape, [draft.constants.get(n) for n in node.inputs[1:]]
    axis = dft_axis(node, len(shape), known[1] if len(known) > 1 else None) if node.op == "DFT" else 1
    sizes = (
        [size for i, size in enumerate(draft.types[node.outputs[0]].shape) if i >= axis]
        if node.op == "STFT"
        else [draft.types[node.outputs[0]].shape[i] for i in (axis, -1)]
    )
    elements = shape[axis] * shape[-1]
    if elements * np.prod([float(size) for size in sizes]) > MAX_ELEMENTS:
        return False
    units = np.eye(elements).reshape(elements, shape[axis], shape[-1])
    along = replace(node, attrs={**node.attrs, "axis": 1}, version=17)
    with enable_x64():
        values = np.asarray(lookup(along).evaluate(along, units, *(known[:1] if node.op == "DFT" else known)))
    _mapped(draft, node, x, [axis, len(shape) - 1], values.reshape(elements, -1), sizes)
    return True


def _grid_sample(draft: Draft, node: Node) -> bool:
    """GridSample: one matrix for all pixels; of nearest ones a choice of elements."""
    x, shape, grid = node.inputs[0], draft.types[node.inputs[0]].shape, draft.constants[node.inputs[1]]
    out, kept = draft.types[node.outputs[0]].shape, len(grid) == 1
    spatial, whole = int(np.prod(shape[2:])), shape[0]
    found = [grid_taps(node, shape[2:], points) for points in grid.reshape(len(grid), -1, grid.shape[-1])]
    if kept and found[0].places.shape[1] == 1:
        pads = draft.constant(f"{node.outputs[0]}/pads", [0] * 5 + [1], np.dtype(np.int64))
        padded = draft.apply(node, "Pad", draft.reshape(node, x, (*shape[:2], spatial)), pads, mode="constant")
        places = np.where(found[0].places < 0, spatial, found[0].places)[:, 0]
        chosen = draft.apply(node, "Gather", padded, draft.constant(f"{node.outputs[0]}/places", places), axis=-1)
        draft.reshape(node, chosen, out, out=node.outputs[0])
        return True
    sums = [taps.matrix(spatial) for taps in found]
    area = sums[0].shape[1]
    if kept:
        matrix = sums[0]
    else:
        matrix = np.zeros((whole, spatial, whole, area))
        for sample, part in enumerate(sums):
            matrix[sample, :, sample] = part
        matrix = matrix.reshape(whole * spatial, whole * area)
    axes = [*([] if kept else [0]), *range(2, len(shape))]
    _mapped(draft, node, x, axes, matrix, [out[a] for a in axes])
    return True


def _roi_align(draft: Draft, node: Node) -> bool:
    """RoiAlign of known regions: one matrix for all samples and pixels."""
    x, shape, out = node.inputs[0], draft.types[node.inputs[0]].shape, draft.types[node.outputs[0]].shape
    taps = roi_taps(node, shape, *(draft.constants[name] for name in node.inputs[1:]))
    _mapped(draft, node, x, [0, 2, 3], taps.weights.T, [out[0], *out[2:]])
    return True


def _vector_product(draft: Draft, node: Node) -> bool:
    """MatMul of a known vector, or of a known matrix and a computed vector, as one of two matrices: its result then has an
    axis for the output channels, of which there is one."""
    a, b = node.inputs
    ranks = [len(draft.types[name].shape) for name in node.inputs]
    if draft.depends(a, b) or 1 not in ranks or (ranks[0] == 1 and a not in draft.constants and ranks[1] > 1):
        return False
    sides = []
    for name, rank, shape, axis in ((a, ranks[0], (1, -1), -1), (b, ranks[1], (-1, 1), -2)):
        if rank > 1:
            sides.append(name)
        elif name not in draft.constants:
            sides.append(draft.reshape(node, name, shape))
        else:
            sides.append(draft.constant(f"{name}/matrix", draft.constants[name].reshape(shape)))
            if name in draft.pinned:
                stated = draft.pinned[name]
                draft.pinned[sides[-1]] = replace(stated, axis=None if stated.axis is None else axis)
    product = draft.fresh(f"{node.outputs[0]}/MatMul")
    draft.write(replace(node, inputs=tuple(sides), outputs=(product,)))
    draft.reshape(node, product, draft.types[node.outputs[0]].shape, out=node.outputs[0])
    return True


RULES = {
    "MatMul": _vector_product,
    "Col2Im": _col2im,
    "DFT": _fourier,
    "GridSample": _grid_sample,
    "RoiAlign": _roi_align,
    "STFT": _fourier,
    "Resize": _resize,
    "Upsample": _resize,
}
