"""Operators that are linear in their first input once the others are known."""

from __future__ import annotations

from string import ascii_letters, digits
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.errors import UnsupportedError
from fheq.graph import Node, describe
from fheq.ops.arguments import bounded, integers
from fheq.ops.table import Kind, Op, register
from fheq.ops.windows import per_axis, same_pads, window_of

Array = Any
_EXACT = jax.lax.Precision.HIGHEST


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=_EXACT)


def _times(factor: float, x: Array) -> Array:
    return x if factor == 1 else (factor * x).astype(x.dtype)


def _gemm(node: Node, a: Array, b: Array, c: Array | None = None) -> Array:
    """ONNX Gemm."""
    if a.ndim != 2 or b.ndim != 2:
        raise ValueError(f"Gemm takes matrices, not shapes {a.shape} and {b.shape}")
    a = a.T if node.attrs["transA"] else a
    b = b.T if node.attrs["transB"] else b
    y = _times(node.attrs["alpha"], _matmul(a, b))
    return y if c is None else y + _times(node.attrs["beta"], c)


def _with_bias(y: Array, bias: Array | None) -> Array:
    """Adds one value per channel of (N, C, ...)."""
    return y if bias is None else y + jnp.reshape(bias, (1, -1) + (1,) * (y.ndim - 2))


def _conv(node: Node, x: Array, w: Array, bias: Array | None = None) -> Array:
    """ONNX Conv over any number of spatial axes."""
    window = window_of(node, x.shape[2:], node.attrs.get("kernel_shape", w.shape[2:]))
    if window.kernel != w.shape[2:]:
        raise ValueError(f"attribute kernel_shape is {window.kernel}, but the weights have shape {w.shape}")
    y = jax.lax.conv_general_dilated(
        x,
        w,
        window_strides=window.strides,
        padding=window.padding,
        rhs_dilation=window.dilations,
        feature_group_count=node.attrs["group"],
        precision=_EXACT,
    )
    return _with_bias(y, bias)


def transposed_pads(node: Node, sizes: tuple[int, ...], strides: tuple[int, ...], spans: list[int]) -> list[tuple[int, int]]:
    """What ConvTranspose crops from its full result at both ends of each axis (negative: what it adds)."""
    count = len(sizes)
    extra = per_axis(node, "output_padding", count, 0, least=0)
    full = [stride * (size - 1) + span for size, stride, span in zip(sizes, strides, spans)]
    auto_pad = node.attrs.get("auto_pad", "NOTSET")
    if "output_shape" in node.attrs:
        wanted = bounded(per_axis(node, "output_shape", count, 1))
    elif auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        wanted = tuple(size * stride for size, stride in zip(sizes, strides))
    else:
        flat = per_axis(node, "pads", 2 * count, 0, least=0) if auto_pad == "NOTSET" else (0,) * (2 * count)
        return [(begin, end - more) for begin, end, more in zip(flat[:count], flat[count:], extra)]
    begins = [same_pads(node, max(size + more - want, 0))[0] for size, more, want in zip(full, extra, wanted)]
    return [(begin, size - want - begin) for begin, size, want in zip(begins, full, wanted)]


def _conv_transpose(node: Node, x: Array, w: Array, bias: Array | None = None) -> Array:
    """ONNX ConvTranspose: a convolution of the stretched input with the mirrored kernel."""
    sizes, kernel, groups = x.shape[2:], w.shape[2:], node.attrs["group"]
    strides, dilations = (per_axis(node, name, len(sizes), 1) for name in ("strides", "dilations"))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations)]
    crops = transposed_pads(node, sizes, strides, spans)
    padding = [(span - 1 - begin, span - 1 - end) for span, (begin, end) in zip(spans, crops)]
    bounded(stride * size + sum(pads) for stride, size, pads in zip(strides, sizes, padding))
    channels_in, channels_out = w.shape[:2]
    w = w.reshape(groups, channels_in // groups, channels_out, *kernel)
    w = jnp.swapaxes(w, 1, 2).reshape(groups * channels_out, channels_in // groups, *kernel)
    y = jax.lax.conv_general_dilated(
        x,
        jnp.flip(w, axis=tuple(range(2, w.ndim))),
        window_strides=(1,) * len(sizes),
        padding=padding,
        lhs_dilation=strides,
        rhs_dilation=dilations,
        feature_group_count=groups,
        precision=_EXACT,
    )
    return _with_bias(y, bias)


def _batch_normalization(node: Node, x: Array, scale: Array, bias: Array, mean: Array, variance: Array) -> Array:
    """ONNX BatchNormalization in inference."""
    if node.attrs.get("training_mode", 0) or any(node.outputs[1:]):
        raise UnsupportedError(f"{describe(node)}: BatchNormalization in training mode; export the model in evaluation mode")
    if not node.attrs.get("spatial", 1):
        raise UnsupportedError(f"{describe(node)}: BatchNormalization with spatial=0; use one statistic per channel")
    scale, bias, mean, variance = (jnp.reshape(p, (-1,) + (1,) * (x.ndim - 2)) for p in (scale, bias, mean, variance))
    return (scale * (x - mean) / jnp.sqrt(variance + node.attrs["epsilon"]) + bias).astype(x.dtype)


def einsum_terms(node: Node, ranks: list[int]) -> tuple[list[str], str]:
    """Labels of the axes of each input and of the result; an ellipsis becomes digits, aligned at the end."""
    equation = node.attrs["equation"].replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = left.split(",")
    if len(terms) != len(ranks) or any(not set(t.replace("...", "")) <= set(ascii_letters) for t in (*terms, right)):
        raise ValueError(f"the equation {equation!r} does not fit {len(ranks)} inputs")
    widths = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks)]
    if any((width and "..." not in term) or width < 0 for term, width in zip(terms, widths)):
        raise ValueError(f"the equation {equation!r} does not fit inputs of {ranks} axes")
    wide = digits[: max([w for t, w in zip(terms, widths) if "..." in t], default=0)]
    if not arrow:
        once = sorted(label for label in set(left) - set(",.") if left.count(label) == 1)
        right = ("..." if "..." in left else "") + "".join(once)
    spelled = [term.replace("...", wide[len(wide) - width :]) for term, width in zip(terms, widths)]
    return spelled, right.replace("...", wide)


def _einsum(node: Node, *inputs: Array) -> Array:
    """ONNX Einsum."""
    einsum_terms(node, [jnp.ndim(x) for x in inputs])
    equation = node.attrs["equation"].replace(" ", "")
    return jnp.einsum(equation, *inputs, precision=_EXACT).astype(inputs[0].dtype)


def _col2im(node: Node, x: Array, image: np.ndarray, block: np.ndarray) -> Array:
    """ONNX Col2Im: blocks added up where they lie in an image."""
    places, shape = col2im_places(node, image, block)
    samples, rows = x.shape[:2]
    channels = rows // int(np.prod(block))
    blocks = x.reshape(samples, channels, -1)
    area = int(np.prod(shape))
    flat = jnp.zeros((samples, channels, area + 1), x.dtype)
    return flat.at[..., np.where(places < 0, area, places)].add(blocks)[..., :area].reshape(samples, channels, *shape)


def col2im_places(node: Node, image: np.ndarray, block: np.ndarray) -> tuple[np.ndarray, tuple[int, ...]]:
    """For each place of each block, flat, its flat place in the image or -1 for the padding; and the image's shape."""
    shape, kernel = bounded(integers(image)), bounded(integers(block))
    window = window_of(node, shape, kernel)
    axes = zip(shape, kernel, window.strides, window.dilations, window.pads)
    flat, inside = np.zeros((1, 1), np.int64), np.ones((1, 1), bool)
    for size, k, stride, dilation, (begin, end) in axes:
        steps = (size + begin + end - dilation * (k - 1) - 1) // stride + 1
        position = np.arange(k)[:, None] * dilation + np.arange(steps) * stride - begin
        wide = flat[:, None, :, None] * size + position[None, :, None, :]
        valid = inside[:, None, :, None] & ((position >= 0) & (position < size))[None, :, None, :]
        flat, inside = (v.reshape(v.shape[0] * k, -1) for v in (wide, valid))
    return np.where(inside, flat, -1).ravel(), shape


register(
    Op("BatchNormalization", 7, Kind.LINEAR, _batch_normalization),
    Op("Col2Im", 18, Kind.LINEAR, _col2im, static=(1, 2)),
    Op("Conv", 7, Kind.LINEAR, _conv),
    Op("ConvTranspose", 7, Kind.LINEAR, _conv_transpose),
    Op("Einsum", 12, Kind.LINEAR, _einsum),
    Op("Gemm", 7, Kind.LINEAR, _gemm),
    Op("MatMul", 7, Kind.LINEAR, lambda node, a, b: _matmul(a, b)),
)
