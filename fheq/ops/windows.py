"""Sliding windows over spatial axes: what Conv and the pools have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fheq.graph import Node
from fheq.ops.arguments import bounded, integers


@dataclass(frozen=True)
class Window:
    """A sliding window, one entry per spatial axis.

    Args:
        pads: elements before and after the input, as the model states them or `auto_pad` implies.
        overhang: further elements after it, which the last window of `ceil_mode` covers.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    overhang: tuple[int, ...]

    @property
    def padding(self) -> tuple[tuple[int, int], ...]:
        """All the elements before and after the input."""
        return tuple((begin, end + over) for (begin, end), over in zip(self.pads, self.overhang))

    def places(self, axis: int, count: int) -> np.ndarray:
        """`(count, kernel)`, the elements under each window along an axis; those in pads are below 0 or beyond the input."""
        start = np.arange(count)[:, None] * self.strides[axis] - self.pads[axis][0]
        return start + np.arange(self.kernel[axis]) * self.dilations[axis]


def per_axis(node: Node, name: str, count: int, default: int, least: int = 1) -> tuple[int, ...]:
    """A list attribute with one integer per spatial axis, none below `least`."""
    values = integers(node.attrs.get(name, (default,) * count))
    if len(values) != count or any(value < least for value in values):
        raise ValueError(f"attribute {name} is {values}; it needs {count} integers, none below {least}")
    return values


def same_pads(node: Node, total: int) -> tuple[int, int]:
    """A total padding split over both ends: the odd element goes to the end only for SAME_UPPER."""
    small = total // 2
    return (small, total - small) if node.attrs.get("auto_pad") == "SAME_UPPER" else (total - small, small)


def window_of(node: Node, sizes: tuple[int, ...], kernel: Any) -> Window:
    """The window of a Conv or pool node (`kernel`: its sizes) over an input with these spatial sizes."""
    count = len(sizes)
    kernel = bounded(integers(kernel))
    if len(kernel) != count or count == 0 or 0 in kernel:
        raise ValueError(f"a kernel of shape {kernel} does not fit an input of spatial shape {sizes}")
    strides, dilations = (per_axis(node, name, count, 1) for name in ("strides", "dilations"))
    spans = [(k - 1) * d + 1 for k, d in zip(kernel, dilations)]
    auto_pad = node.attrs.get("auto_pad", "NOTSET")
    overhang = (0,) * count
    if auto_pad in ("SAME_UPPER", "SAME_LOWER"):
        outputs = [-(-size // stride) for size, stride in zip(sizes, strides)]
        totals = [max((o - 1) * s + span - size, 0) for o, s, span, size in zip(outputs, strides, spans, sizes)]
        pads = tuple(same_pads(node, total) for total in totals)
    elif auto_pad == "VALID":
        pads = ((0, 0),) * count
    elif auto_pad == "NOTSET":
        flat = per_axis(node, "pads", 2 * count, 0, least=0)
        pads = tuple(zip(flat[:count], flat[count:]))
        if node.attrs.get("ceil_mode", 0):
            overhang = tuple(map(_overhang, sizes, spans, strides, pads))
    else:
        raise ValueError(f"attribute auto_pad is {auto_pad!r}")
    padded = bounded(size + begin + end for size, (begin, end) in zip(sizes, pads))
    if any(span > size for span, size in zip(spans, padded)):
        raise ValueError(f"a window that spans {spans} does not fit an input padded to {padded}")
    return Window(kernel, strides, dilations, pads, overhang)


def _overhang(size: int, span: int, stride: int, pads: tuple[int, int]) -> int:
    """Elements that the last window of ceil_mode covers beyond the padding; it may not start in the end padding."""
    padded = size + sum(pads)
    last = -(-(padded - span) // stride) * stride
    if last >= size + pads[0]:
        last -= stride
    return max(last + span - padded, 0)


def covered(window: Window, sizes: tuple[int, ...], include_pads: bool) -> np.ndarray:
    """How many elements of the input (and of the pads, if included) each window covers."""
    count = np.ones((), np.int64)
    axes = zip(sizes, window.kernel, window.strides, window.dilations, window.pads, window.overhang)
    for size, kernel, stride, dilation, (begin, end), over in axes:
        steps = (begin + size + end + over - (kernel - 1) * dilation - 1) // stride + 1
        bounded((steps, kernel))
        bounded((*count.shape, steps))
        positions = np.arange(steps)[:, None] * stride + np.arange(kernel) * dilation - begin
        low, high = (-begin, size + end) if include_pads else (0, size)
        inside = np.sum((positions >= low) & (positions < high), axis=1)
        count = count[..., None] * inside
    return count
