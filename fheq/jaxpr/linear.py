"""Products and convolutions."""

from __future__ import annotations

from string import ascii_lowercase

import numpy as np

from fheq.errors import UnsupportedError
from fheq.jaxpr.equation import Equation


def _dot_general(e: Equation) -> str:
    """MatMul where the operands lie as it reads them, else Einsum."""
    (left, right), (batched_left, batched_right) = e.params["dimension_numbers"]
    a, b = e.inputs
    ranks = [len(e.shape_of(name)) for name in e.inputs]
    plain = not batched_left and ranks[1] == 2 and tuple(right) == (0,) and tuple(left) == (ranks[0] - 1,)
    if plain and ranks[0] >= 1:
        return e.apply("MatMul", a, b)
    letters = iter(ascii_lowercase)
    terms: list[list[str]] = [[""] * rank for rank in ranks]
    for pairs in (zip(batched_left, batched_right), zip(left, right)):
        for i, j in pairs:
            terms[0][i] = terms[1][j] = next(letters)
    terms = [[label or next(letters) for label in term] for term in terms]
    batch = [terms[0][i] for i in batched_left]
    free = [
        term[i]
        for term, taken in zip(terms, ((*left, *batched_left), (*right, *batched_right)))
        for i in range(len(term))
        if i not in taken
    ]
    equation = f"{''.join(terms[0])},{''.join(terms[1])}->{''.join([*batch, *free])}"
    return e.apply("Einsum", a, b, equation=equation)


def _convolution(e: Equation) -> str:
    """Conv, or ConvTranspose for a stretched input."""
    p, (x, kernel) = e.params, e.inputs
    numbers = p["dimension_numbers"]
    if p["batch_group_count"] != 1:
        raise UnsupportedError("batch_group_count other than 1")
    x, kernel = e.transpose(x, numbers.lhs_spec), e.transpose(kernel, numbers.rhs_spec)
    made = _stretched(e, x, kernel) if any(d != 1 for d in p["lhs_dilation"]) else _conv(e, x, kernel)
    return e.transpose(made, np.argsort(numbers.out_spec))


def _conv(e: Equation, x: str, kernel: str) -> str:
    p = e.params
    pads = [low for low, _ in p["padding"]] + [high for _, high in p["padding"]]
    if any(pad < 0 for pad in pads):
        count = len(p["padding"])
        around = [0, 0, *pads[:count], 0, 0, *pads[count:]]
        x, pads = e.apply("Pad", x, e.integers(around), e.number(0, x), mode="constant"), [0] * len(pads)
    shape = e.shape_of(kernel)[2:]
    return e.apply(
        "Conv",
        x,
        kernel,
        auto_pad="NOTSET",
        kernel_shape=shape,
        strides=tuple(p["window_strides"]),
        dilations=tuple(p["rhs_dilation"]),
        pads=tuple(pads),
        group=p["feature_group_count"],
    )


def _stretched(e: Equation, x: str, kernel: str) -> str:
    """A convolution of an input with zeros between its elements: a transposed one with the mirrored kernel."""
    p = e.params
    w, group = e.known(kernel, "the kernel of a transposed convolution"), p["feature_group_count"]
    if any(s != 1 for s in p["window_strides"]):
        raise UnsupportedError("a stretched input and strides at once")
    spans = [(k - 1) * d for k, d in zip(w.shape[2:], p["rhs_dilation"])]
    crops = [(span - low, span - high) for span, (low, high) in zip(spans, p["padding"])]
    extra = [max(0, -high) for _, high in crops]
    if any(low < 0 for low, _ in crops) or any(more >= s for more, s in zip(extra, p["lhs_dilation"])):
        raise UnsupportedError("a stretched input with more padding than its kernel covers")
    mirrored = np.flip(w, axis=tuple(range(2, w.ndim)))
    blocks = mirrored.reshape(group, w.shape[0] // group, *w.shape[1:])
    swapped = np.swapaxes(blocks, 1, 2).reshape(-1, w.shape[0] // group, *w.shape[2:])
    return e.apply(
        "ConvTranspose",
        x,
        e.draft.constant(f"{e.origin.name}/kernel", swapped),
        auto_pad="NOTSET",
        kernel_shape=w.shape[2:],
        strides=tuple(p["lhs_dilation"]),
        dilations=tuple(p["rhs_dilation"]),
        pads=(*(low for low, _ in crops), *(max(high, 0) for _, high in crops)),
        output_padding=tuple(extra),
        group=group,
    )


RULES = {"conv_general_dilated": _convolution, "dot_general": _dot_general}
