"""Masked softmax: elements that a model sets to minus infinity, or far below all others.

A quantizer that reaches from such a number to the scores would leave those one step. Where a known mask hides elements, each
of them reads a score of its own row instead, which is free and changes no maximum, and its power is multiplied by 0. A mask
that is computed becomes a tensor of its own that is added to the scores.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from fheq.graph import Node
from fheq.rewriting.edit import Draft

FAR, CERTAIN = -100.0, -9e3
"""What masks: exp(-100) is 0 in float32; beside other numbers than 0, which may be biases, only what no score is like."""
_SAME_VALUES = ("Cast", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_SAME_ORDER = ("Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


class Masked(NamedTuple):
    """Scores `x` in which every masked element is another one of its row, and `kept`: 1, or 0 where the mask is."""

    x: str
    kept: str


def masked(draft: Draft, node: Node, axes: tuple[int, ...]) -> Masked | None:
    """The scores of a softmax over `axes` without their known mask; None where there is none, or it hides a whole row."""
    found = _unmasked(draft, node, node.inputs[0])
    if found is None:
        return None
    scores, hidden = found
    rest = [axis for axis in range(hidden.ndim) if axis not in axes]
    order = (*rest, *axes)
    places = np.arange(hidden.size).reshape(hidden.shape).transpose(order)
    rows = places.reshape(int(np.prod([hidden.shape[a] for a in rest])), -1)
    covered = hidden.ravel()[rows]
    if not hidden.any() or np.any(covered.all(axis=1)):
        return None
    stand_in = np.take_along_axis(rows, np.argmin(covered, axis=1)[:, None], axis=1)
    index = np.where(covered, stand_in, rows).reshape(places.shape).transpose(np.argsort(order))
    kept = draft.constant(f"{node.outputs[0]}/kept", ~hidden, draft.types[scores].dtype)
    return Masked(draft.pick(node, scores, index), kept)


def bounded(draft: Draft, node: Node, name: str) -> str:
    """The scores of a softmax with a mask that is computed: what it adds is `FAR` at the least, never minus infinity, and
    scores that it replaces are a sum with it. So it has a quantizer of its own, of whose range `fit` keeps what matters
    (`fheq.fitting.negligible`). A row that it hides whole keeps its scores."""
    maker = draft.graph.producers().get(name)
    if maker is None or maker.domain:
        return name
    added = _added(draft, node, maker) if maker.op == "Where" else ""
    if added:
        return added
    held = [maker.inputs[at] for at in _holds_values(draft, maker)]
    changed = _without_far(draft, [source for source in held if source in draft.constants])
    changed |= {source: bounded(draft, node, source) for source in held if source not in draft.constants}
    inputs = tuple(changed.get(source, source) for source in maker.inputs)
    if inputs == tuple(maker.inputs):
        return name
    out = draft.fresh(f"{name}/bounded")
    draft.write(replace(maker, inputs=inputs, outputs=(out,)))
    return out


def _hides(value: np.ndarray) -> np.ndarray:
    """Where a known tensor that is added hides scores. One that is far below all in every place hides none."""
    far = value <= FAR
    far = far if np.all(value[~far] == 0) else value <= CERTAIN
    return far & ~np.all(far)


def _without_far(draft: Draft, names: list[str]) -> dict[str, str]:
    """Known tensors of one mask, by name, to those with `FAR` where they hide."""
    if not names:
        return {}
    values = [draft.constants[name] for name in names]
    hides = np.split(_hides(np.concatenate([v.ravel() for v in values])), np.cumsum([v.size for v in values])[:-1])
    return {
        name: draft.constant(f"{name}/bounded", np.where(far.reshape(v.shape), FAR, v), v.dtype) if far.any() else name
        for name, v, far in zip(names, values, hides)
    }


def _holds_values(draft: Draft, maker: Node) -> tuple[int, ...]:
    """The inputs of a node in which a number far below all makes its output one."""
    if maker.op in _SAME_VALUES:
        return (0,)
    if maker.op == "Mul":
        factors = [draft.constants.get(name) for name in reversed(maker.inputs)]
        return tuple(at for at, factor in enumerate(factors) if factor is not None and np.all(factor >= 1))
    return {"Add": (0, 1), "Where": (1, 2)}.get(maker.op, ())


def _added(draft: Draft, node: Node, maker: Node) -> str:
    """A choice between scores and a number that hides them as their sum with a mask; "" where it is no such choice."""
    condition, *branches = maker.inputs
    known = [branch in draft.constants for branch in branches]
    hides = [name in draft.constants and bool(np.all(draft.constants[name] <= FAR)) for name in branches]
    if sum(hides) != 1 or all(known) or not draft.depends(condition):
        return ""
    scores, dtype = branches[hides.index(False)], draft.types[maker.outputs[0]].dtype
    ends = [draft.constant(f"{maker.outputs[0]}/added", FAR if hidden else 0, dtype) for hidden in hides]
    return draft.apply(node, "Add", bounded(draft, node, scores), draft.apply(node, "Where", condition, *ends))


def _unmasked(draft: Draft, node: Node, name: str) -> tuple[str, np.ndarray] | None:
    """A tensor without what masks it, 0 in place of that, and where it is."""
    maker, shape = draft.graph.producers().get(name), draft.types[name].shape
    if maker is None or maker.domain:
        return None
    if maker.op in _SAME_ORDER:
        found = _unmasked(draft, node, maker.inputs[0])
        return None if found is None else (draft.reshape(node, found[0], shape), found[1].reshape(shape))
    known = [n for n in maker.inputs[-2:] if n in draft.constants]
    if (
        len(known) != 1
        or (maker.op == "Where" and maker.inputs[0] not in draft.constants)
        or maker.op not in ("Add", "Where")
    ):
        return None
    value = draft.constants[known[0]]
    far = value <= FAR if maker.op == "Where" else _hides(value)
    if not far.any():
        return None
    near = draft.constant(f"{node.outputs[0]}/near", np.where(far, 0, value), value.dtype)
    hidden = far
    if maker.op == "Where":
        condition = draft.constants[maker.inputs[0]]
        hidden = far & (condition if known[0] == maker.inputs[1] else ~condition)
    inputs = [near if n == known[0] else n for n in maker.inputs]
    return draft.apply(node, maker.op, *inputs), np.broadcast_to(hidden, shape)
