"""Steps from nodes: each operator is brought to one of the few integer forms of `fheq.steps`."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from fheq.errors import UnsupportedError
from fheq.graph import Node, describe
from fheq.interpret import run_node
from fheq.ops.linear import transposed_pads
from fheq.ops.reductions import axes_of
from fheq.ops.windows import Window, per_axis, window_of
from fheq.planning.alternatives import alternatives
from fheq.planning.operands import operand, summand
from fheq.planning.walk import Walk
from fheq.regions import broadcast_elements, in_float64
from fheq.steps import Add, Linear, Maximum, Operand, Product, Step, Sum, varies_only_along


def build_linear(walk: Walk, node: Node) -> Step:
    """A linear op whose other inputs are known."""
    builders = {
        "MatMul": _matmul,
        "Gemm": _gemm,
        "Conv": _conv,
        "ConvTranspose": _conv_transpose,
        "AveragePool": _pool,
        "GlobalAveragePool": _reduce,
        "ReduceSum": _reduce,
        "ReduceMean": _reduce,
        "CumSum": _cumsum,
    }
    if node.op not in builders:
        raise UnsupportedError(f"{describe(node)}: {node.op} of an encrypted tensor has no integer form")
    step = builders[node.op](walk, node)
    if isinstance(step, Linear):
        _refuse_uneven_channels(step)
    return step


def _refuse_uneven_channels(step: Linear) -> None:
    """Known channels have one value each; `fheq.rewriting.known_parts` takes out others that are joined right before."""
    axis = {"matmul": -1, "left": -2, "conv": 1}[step.form]
    rows = lambda v: np.moveaxis(v.reshape(step.x.shape), axis, 0).reshape(step.x.shape[axis], -1)
    fill, known = rows(step.x.fill), np.all(rows(step.x.elements) < 0, axis=1)
    if np.any(known & (fill.max(axis=1) != fill.min(axis=1))):
        raise UnsupportedError(
            f"{describe(step.node)}: it reads a known channel of several values; join known channels right before it, by "
            "one Concat along its channels"
        )


def pairwise(walk: Walk, node: Node) -> Step:
    """Add, Sub, Mul, Max or Min of two encrypted tensors, broadcast against each other."""
    out = node.outputs[0]
    shape = walk.graph.types[out].shape
    operands = []
    for name in node.inputs:
        read = summand(walk, name, node) if node.op in ("Add", "Sub", "Sum") else operand(walk, name)
        operands.append(read.take(broadcast_elements(read.shape, shape), shape))
    a, b = operands
    if node.op == "Mul":
        return Product(out, node, shape, a, b, contract=False)
    if node.op in ("Max", "Min"):
        column = (*shape, 1)
        xs = tuple(x.take(np.arange(int(np.prod(shape))), column) for x in (a, b))
        return Maximum(out, node, shape, xs, 1 if node.op == "Max" else -1)
    return Add(out, node, shape, a, b, -1 if node.op == "Sub" else 1)


def build_product(walk: Walk, node: Node) -> Step:
    """A matrix product of two encrypted operands: elementwise products, summed over the last axis."""
    if node.op == "Gemm" and (node.attrs.get("alpha", 1.0) != 1.0 or (len(node.inputs) > 2 and node.inputs[2])):
        raise UnsupportedError(f"{describe(node)}: Gemm of two encrypted matrices; use MatMul, Mul and Add instead")
    if node.op not in ("MatMul", "Gemm"):
        raise UnsupportedError(f"{describe(node)}: both operands are encrypted; {node.op} needs known weights")
    a, b = (operand(walk, name) for name in node.inputs[:2])
    i, j = (np.arange(len(x.elements)).reshape(x.shape) for x in (a, b))
    if node.attrs.get("transA", 0):
        i = i.T
    if node.attrs.get("transB", 0):
        j = j.T
    i = i[None, :] if i.ndim == 1 else i
    j = j[:, None] if j.ndim == 1 else j
    i, j = np.broadcast_arrays(i[..., :, None, :], np.swapaxes(j, -1, -2)[..., None, :, :])
    shape = walk.graph.types[node.outputs[0]].shape
    full = (*shape, i.shape[-1])
    return Product(node.outputs[0], node, shape, a.take(i, full), b.take(j, full), contract=True)


def build_maximum(walk: Walk, node: Node) -> Step:
    """Max-pooling and ReduceMax / ReduceMin."""
    shape = walk.graph.types[node.outputs[0]].shape
    x = operand(walk, node.inputs[0])
    if node.op in ("MaxPool", "GlobalMaxPool"):
        elements = _pool_windows(node, x.shape, shape) if node.op == "MaxPool" else _reduced(walk, node, x.shape)
    else:
        elements = _reduced(walk, node, x.shape)
    valid = np.argmax(elements >= 0, axis=-1)[..., None]
    inside = np.take_along_axis(elements, valid, axis=-1)
    elements = np.where(elements >= 0, elements, inside)  # padding never wins: repeat an element of the window
    full = (*shape, elements.shape[-1])
    return Maximum(node.outputs[0], node, shape, (x.take(elements, full),), -1 if node.op == "ReduceMin" else 1)


def along(axis: int) -> Callable[[np.ndarray], bool]:
    """A reader that absorbs functions which differ along one axis only."""
    return lambda labels: varies_only_along(labels, axis)


def alike(labels: np.ndarray) -> bool:
    """A reader that absorbs one function for all elements."""
    return len(np.unique(labels[labels >= 0])) <= 1


def _constant(walk: Walk, node: Node, position: int) -> np.ndarray:
    name = node.inputs[position]
    if name not in walk.graph.constants:
        raise UnsupportedError(f"{describe(node)}: input {position} ({name!r}) must be known, but it is encrypted")
    return np.asarray(walk.graph.constants[name], np.float64)


def _bias(walk: Walk, node: Node) -> np.ndarray:
    if len(node.inputs) < 3 or not node.inputs[2]:
        return np.zeros(())
    return _constant(walk, node, 2)


def used_weight(node: Node, position: int, stored: np.ndarray) -> np.ndarray:
    """The known matrix or kernel of a linear node (its input at `position`), moved as its form reads it."""
    if node.op == "Gemm" and node.attrs.get(("transA", "transB")[position], 0):
        return stored.T
    if node.op == "ConvTranspose":
        flipped = np.flip(stored, axis=tuple(range(2, stored.ndim)))
        group, kernel = int(node.attrs.get("group", 1)), stored.shape[2:]
        blocks = flipped.reshape(group, stored.shape[0] // group, stored.shape[1], *kernel)
        return np.swapaxes(blocks, 1, 2).reshape(-1, stored.shape[0] // group, *kernel)
    return stored


def _matmul(walk: Walk, node: Node) -> Step:
    out, shape = node.outputs[0], walk.graph.types[node.outputs[0]].shape
    if node.inputs[0] in walk.regions:
        weight = used_weight(node, 1, _constant(walk, node, 1))
        x = operand(walk, node.inputs[0], along(-1))
        stated = {name: node.attrs[name] for name in ("exact", "exclusive") if name in node.attrs}
        options = {**_alternatives(walk, x), **stated}
        return Linear(out, node, shape, x, "matmul", node.inputs[1], weight, np.zeros(()), -1, options)
    weight = used_weight(node, 0, _constant(walk, node, 0))
    x = operand(walk, node.inputs[1], along(-2))
    return Linear(out, node, shape, x, "left", node.inputs[0], weight, np.zeros(()), -2)


def _gemm(walk: Walk, node: Node) -> Step:
    out, shape = node.outputs[0], walk.graph.types[node.outputs[0]].shape
    alpha, beta = node.attrs.get("alpha", 1.0), node.attrs.get("beta", 1.0)
    bias = beta * _bias(walk, node)
    data = 0 if node.inputs[0] in walk.regions else 1
    flips = [bool(node.attrs.get(name, 0)) for name in ("transA", "transB")]
    x = operand(walk, node.inputs[data], along(-1 if data == flips[data] else -2))
    if flips[data]:
        x = x.take(np.arange(len(x.elements)).reshape(x.shape).T, x.shape[::-1])
    weight = alpha * used_weight(node, 1 - data, _constant(walk, node, 1 - data))
    form, channel = ("matmul", -1) if data == 0 else ("left", -2)
    options = _alternatives(walk, x) if data == 0 else {}
    return Linear(out, node, shape, x, form, node.inputs[1 - data], weight, bias, channel, options)


def _alternatives(walk: Walk, x: Operand) -> dict[str, np.ndarray]:
    """The option of a product with one-hot rows."""
    groups = alternatives(walk, x)
    return {} if groups is None else {"exclusive": groups}


def _channel_bias(bias: np.ndarray, rank: int) -> np.ndarray:
    return bias.reshape(-1, *(1,) * (rank - 2)) if bias.ndim == 1 else bias


def _conv(walk: Walk, node: Node) -> Step:
    out, shape = node.outputs[0], walk.graph.types[node.outputs[0]].shape
    weight = _constant(walk, node, 1)
    x = operand(walk, node.inputs[0], along(1))
    rank, kernel = weight.ndim, weight.shape[2:]
    window = window_of(node, x.shape[2:], kernel)
    elements = np.arange(len(x.elements)).reshape(x.shape)
    elements = np.pad(elements, ((0, 0), (0, 0), *window.pads), constant_values=-1)
    options = {"strides": window.strides, "dilations": window.dilations, "group": int(node.attrs.get("group", 1))}
    bias = _channel_bias(_bias(walk, node), rank)
    padded = x.take(elements, elements.shape)
    return Linear(out, node, shape, padded, "conv", node.inputs[1], weight, bias, 1 - rank, options)


def _conv_transpose(walk: Walk, node: Node) -> Step:
    """A transposed convolution is a convolution of the input with zeros between its elements and the kernel flipped."""
    out, shape = node.outputs[0], walk.graph.types[node.outputs[0]].shape
    weight = _constant(walk, node, 1)
    x = operand(walk, node.inputs[0], along(1))
    rank, kernel = weight.ndim, weight.shape[2:]
    strides, dilations = (per_axis(node, name, rank - 2, 1) for name in ("strides", "dilations"))
    group = int(node.attrs.get("group", 1))
    reaches = [dilation * (k - 1) for k, dilation in zip(kernel, dilations)]
    crops = transposed_pads(node, x.shape[2:], strides, [reach + 1 for reach in reaches])
    elements = np.arange(len(x.elements)).reshape(x.shape)
    for axis, (reach, stride, (begin, _)) in enumerate(zip(reaches, strides, crops), start=2):
        positions = np.arange(shape[axis] + reach) - (reach - begin)
        inside = (positions >= 0) & (positions % stride == 0) & (positions // stride < elements.shape[axis])
        moved = np.take(elements, np.where(inside, positions // stride, 0), axis=axis)
        mask = inside.reshape(-1, *(1,) * (elements.ndim - axis - 1))
        elements = np.where(mask, moved, -1)
    weight = used_weight(node, 1, weight)
    options = {"strides": (1,) * (rank - 2), "dilations": dilations, "group": group}
    bias = _channel_bias(_bias(walk, node), rank)
    padded = x.take(elements, elements.shape)
    return Linear(out, node, shape, padded, "conv", node.inputs[1], weight, bias, 1 - rank, options)


def _pool_windows(node: Node, shape: tuple[int, ...], out: tuple[int, ...]) -> np.ndarray:
    spatial = _window_elements(window_of(node, shape[2:], node.attrs["kernel_shape"]), shape[2:], out[2:])
    area = int(np.prod(shape[2:]))
    planes = np.arange(shape[0] * shape[1]).reshape(*shape[:2], *(1,) * spatial.ndim) * area
    return np.where(spatial >= 0, planes + spatial, -1)


def _window_elements(window: Window, spatial: tuple[int, ...], out: tuple[int, ...]) -> np.ndarray:
    """Flat spatial index under every place of every window, -1 outside of the input; shape `(*out, K)`."""
    rank, shape = len(spatial), (*out, *window.kernel)
    flat, valid = np.zeros(shape, np.int64), np.ones(shape, bool)
    for axis in range(rank):
        position = window.places(axis, out[axis])
        view = [1] * (2 * rank)
        view[axis], view[rank + axis] = position.shape
        position = position.reshape(view)
        valid &= (position >= 0) & (position < spatial[axis])
        flat = flat * spatial[axis] + position
    return np.where(valid, flat, -1).reshape(*out, -1)


def _sum(walk: Walk, node: Node, x: Operand, elements: np.ndarray) -> Step:
    shape = walk.graph.types[node.outputs[0]].shape
    ones = np.ones(x.shape)
    total = in_float64(lambda: run_node(node, lambda _: ones, walk.graph.constants)[0])
    count = np.sum(elements >= 0, axis=-1)
    moved = x.take(elements, (*shape, elements.shape[-1]))
    return Sum(node.outputs[0], node, shape, moved, total / np.maximum(count, 1))


def _summed(walk: Walk, node: Node) -> Operand:
    """What a sum reads; of falling functions a table's integers, since those of a sum are to rise with it."""
    x = operand(walk, node.inputs[0], alike)
    return x if x.slope is None or np.all(x.slope > 0) else operand(walk, node.inputs[0])


def _pool(walk: Walk, node: Node) -> Step:
    x = _summed(walk, node)
    shape = walk.graph.types[node.outputs[0]].shape
    return _sum(walk, node, x, _pool_windows(node, x.shape, shape))


def _reduced(walk: Walk, node: Node, shape: tuple[int, ...]) -> np.ndarray:
    """Elements of the input by output element and place in its reduction, shape `(*out, K)`."""
    axes = axes_of(node, len(shape), walk.graph.constants)
    if axes is None:
        raise UnsupportedError(f"{describe(node)}: its axes ({node.inputs[1]!r}) must be known, but they are encrypted")
    kept = tuple(a for a in range(len(shape)) if a not in axes)
    elements = np.arange(int(np.prod(shape))).reshape(shape).transpose(kept + axes)
    out = walk.graph.types[node.outputs[0]].shape
    return elements.reshape(*out, int(np.prod([shape[a] for a in axes], dtype=int)))


def _reduce(walk: Walk, node: Node) -> Step:
    x = _summed(walk, node)
    return _sum(walk, node, x, _reduced(walk, node, x.shape))


def _cumsum(walk: Walk, node: Node) -> Step:
    x = _summed(walk, node)
    axis = int(_constant(walk, node, 1)) % len(x.shape)
    elements = np.moveaxis(np.arange(len(x.elements)).reshape(x.shape), axis, -1)
    n = x.shape[axis]
    i, j = np.arange(n)[:, None], np.arange(n)[None, :]
    if node.attrs.get("reverse", 0):
        mask = j > i if node.attrs.get("exclusive", 0) else j >= i
    else:
        mask = j < i if node.attrs.get("exclusive", 0) else j <= i
    windows = np.where(mask, elements[..., None, :], -1)
    return _sum(walk, node, x, np.moveaxis(windows, -2, axis))
