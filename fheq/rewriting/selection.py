"""ArgMax, ArgMin, Hardmax and TopK of encrypted tensors, by comparisons (rules of `fheq.rewriting.decompose`).

All are exact on integers of one scale, and of equal values the first one comes first. For an axis of n elements ArgMax
takes some 3 n tables: n for the maximum, n to compare with it, n to see which elements come before the first hit; Hardmax
takes n more, to be 0 and 1 exactly.
The values of TopK take n - 1, n - 2, ... exchanges of two tables for each of the k rounds in which the pool of the
remaining ones loses its maximum. Its indices take n (n - 1) / 2 comparisons of pairs and k n tables that read ranks, or, of
a long axis, the values and 2 n tables for each of them.
"""

from __future__ import annotations

import numpy as np

from fheq.affine import Affine
from fheq.graph import Node
from fheq.rewriting.edit import CODES, Draft
from fheq.rewriting.matrices import exact_constant

FLOAT, INT64 = np.dtype(np.float32), np.dtype(np.int64)
BY_PAIRS = 3
"""Longest axis of which ArgMax compares all pairs, which then takes fewer tables."""


def _extreme_index(draft: Draft, node: Node) -> bool:
    """ArgMax and ArgMin: the number of elements before the first extreme one, or of those after the last one."""
    x, out, shape = node.inputs[0], node.outputs[0], draft.types[node.inputs[0]].shape
    axis = node.attrs["axis"] % len(shape)
    largest, last = node.op == "ArgMax", bool(node.attrs.get("select_last_index", 0))
    if shape[axis] <= BY_PAIRS:
        x = _last_axis(draft, node, x, axis)
        index = _indices(draft, node, _ranks(draft, node, x, largest, last), 1, shape[axis])
    else:
        before = _before_extreme(draft, node, x, axis, largest, last)
        axes = draft.constant(f"{out}/axes", [axis], INT64)
        index = draft.apply(node, "ReduceSum", before, axes, keepdims=1, noop_with_empty_axes=0)
        if last:
            index = draft.apply(node, "Sub", draft.constant(f"{out}/top", shape[axis] - 1, FLOAT), index)
    index = _reshape(draft, node, index, draft.types[out].shape)
    _as_integers(draft, node, index, out, shape[axis])
    return True


def _before_extreme(draft: Draft, node: Node, x: str, axis: int, largest: bool, last: bool) -> str:
    """1 at each element up to which there is no extreme one (from the end if `last`).

    The last of them is left out: up to it there is one.
    """
    count = draft.types[x].shape[axis]
    axes = draft.constant(f"{node.outputs[0]}/axes", [axis], INT64)
    op = "ReduceMax" if largest else "ReduceMin"
    extreme = draft.apply(node, op, x, axes, keepdims=1, noop_with_empty_axes=0)
    part = _slice(draft, node, x, axis, 1 if last else 0, count if last else count - 1)
    hit = draft.apply(node, "GreaterOrEqual" if largest else "LessOrEqual", part, extreme)
    along = draft.constant(f"{node.outputs[0]}/axis", axis, INT64)
    hits = draft.apply(node, "CumSum", _float(draft, node, hit), along, reverse=int(last), exclusive=0)
    return _float(draft, node, draft.apply(node, "Less", hits, draft.constant(f"{node.outputs[0]}/half", 0.5, FLOAT)))


def _hardmax(draft: Draft, node: Node) -> bool:
    """Hardmax: 1 where the elements before the first maximum end."""
    x, out, kind = node.inputs[0], node.outputs[0], draft.types[node.inputs[0]]
    axis = node.attrs["axis"] % len(kind.shape)
    if node.version < 13:
        x = _reshape(draft, node, x, (*kind.shape[:axis], int(np.prod(kind.shape[axis:]))))
    shape = draft.types[x].shape
    one, zero = (
        draft.constant(f"{out}/{label}", np.full((*shape[:axis], 1, *shape[axis + 1 :]), value), FLOAT)
        for label, value in (("one", 1), ("zero", 0))
    )
    if shape[axis] == 1:
        hot = _float(draft, node, draft.apply(node, "GreaterOrEqual", x, x))
    else:
        before = _before_extreme(draft, node, x, axis, True, False)
        up, down = (draft.apply(node, "Concat", *pair, axis=axis) for pair in ((one, before), (before, zero)))
        hot = draft.apply(node, "Sub", up, down)
    whole = draft.fresh(f"{out}/whole")
    _as_integers(draft, node, hot, whole, 2)
    whole = whole if node.version >= 13 else _reshape(draft, node, whole, kind.shape)
    draft.apply(node, "Cast", whole, out=out, to=CODES[kind.dtype])
    return True


def _top_k(draft: Draft, node: Node) -> bool:
    """TopK, sorted in any case."""
    x, shape = node.inputs[0], draft.types[node.inputs[0]].shape
    axis, largest = node.attrs["axis"] % len(shape), bool(node.attrs.get("largest", 1))
    count = draft.types[next(o for o in node.outputs if o)].shape[axis]
    values_out, indices_out = (*node.outputs, "")[:2]
    moved, size = _last_axis(draft, node, x, axis), shape[axis]
    by_pairs = size * (size - 1) // 2 + count * size <= 2 * count * size + 2 * count * (size - 1) * (not values_out)
    if count and (values_out or not by_pairs):
        values = _largest(draft, node, moved, count, largest)
        if values_out:
            _move_last(draft, node, values, axis, values_out)
    if indices_out and count:
        if by_pairs:
            indices = _indices(draft, node, _ranks(draft, node, moved, largest, False), count, size)
        else:
            indices = _places(draft, node, moved, values, largest)
        back = _move_last(draft, node, indices, axis)
        _as_integers(draft, node, back, indices_out, size)
    return bool(count)


def _ranks(draft: Draft, node: Node, x: str, largest: bool, last: bool) -> str:
    """How many elements of the last axis come before each one in descending (or ascending) order."""
    count = draft.types[x].shape[-1]
    left, right = np.triu_indices(count, 1)
    if last:
        left, right = right, left
    places = [draft.constant(f"{node.outputs[0]}/{label}", v, INT64) for label, v in (("left", left), ("right", right))]
    a, b = (draft.apply(node, "Gather", x, place, axis=-1) for place in places)
    wins = _float(draft, node, draft.apply(node, "GreaterOrEqual" if largest else "LessOrEqual", a, b))
    numbers, pairs = np.arange(count), np.arange(len(left))
    change = np.zeros((len(left), count))
    change[pairs, left], change[pairs, right] = -1, 1
    ranks = draft.apply(node, "MatMul", wins, exact_constant(draft, f"{node.outputs[0]}/changes", change, FLOAT))
    start = np.sum(left[:, None] == numbers, axis=0)
    return draft.apply(node, "Add", ranks, draft.constant(f"{node.outputs[0]}/start", start, FLOAT))


def _indices(draft: Draft, node: Node, ranks: str, count: int, size: int) -> str:
    """The places of the ranks 0 .. count - 1, on the last axis."""
    last = draft.constant(f"{node.outputs[0]}/last", [-2], INT64)
    wanted = draft.constant(f"{node.outputs[0]}/wanted", np.arange(count)[:, None], FLOAT)
    away = draft.apply(node, "Abs", draft.apply(node, "Sub", draft.apply(node, "Unsqueeze", ranks, last), wanted))
    hit = draft.apply(node, "Less", away, draft.constant(f"{node.outputs[0]}/half", 0.5, FLOAT))
    places = exact_constant(draft, f"{node.outputs[0]}/places", np.arange(size)[:, None], FLOAT)
    index = draft.apply(node, "MatMul", _float(draft, node, hit), places)
    return _reshape(draft, node, index, draft.types[index].shape[:-1])


def _places(draft: Draft, node: Node, x: str, values: str, largest: bool) -> str:
    """The places on the last axis of the elements that `values` lists in order, each the first that is not taken before.

    With bits h of the elements that reach value t, and bits of the elements before place s for each s < t, element j comes
    before place t where h counted up to j are no more than the places up to j that are taken: h[0] + ... + h[j] = the
    number of s whose bit j is 0. The place is the number of its bits.
    """
    size, count, last = draft.types[x].shape[-1], draft.types[values].shape[-1], len(draft.types[x].shape) - 1
    some = _slice(draft, node, x, last, 0, size - 1)
    axes = draft.constant(f"{node.outputs[-1]}/last", [last], INT64)
    counted = np.triu(np.ones((size - 1, size - 1)))
    before: list[str] = []
    places = []
    for t in range(count):
        reached = draft.apply(
            node, "GreaterOrEqual" if largest else "LessOrEqual", some, _slice(draft, node, values, last, t, t + 1)
        )
        bits = [_float(draft, node, reached), *before]
        matrix = np.concatenate([counted, *[np.eye(size - 1)] * t])
        wide = draft.apply(node, "Concat", *bits, axis=last) if t else bits[0]
        sums = draft.apply(node, "MatMul", wide, exact_constant(draft, f"{node.outputs[-1]}/counted", matrix, FLOAT))
        none = draft.apply(node, "Less", sums, draft.constant(f"{node.outputs[-1]}/half", t + 0.5, FLOAT))
        before.append(_float(draft, node, none))
        places.append(draft.apply(node, "ReduceSum", before[-1], axes, keepdims=1, noop_with_empty_axes=0))
    return draft.apply(node, "Concat", *places, axis=last) if count > 1 else places[0]


def _largest(draft: Draft, node: Node, x: str, count: int, largest: bool) -> str:
    """The `count` largest (or smallest) elements of the last axis, in order."""
    better, worse = ("Max", "Min") if largest else ("Min", "Max")
    chosen = []
    for _ in range(count):
        losers, field, axis = [], x, len(draft.types[x].shape) - 1
        while (size := draft.types[field].shape[axis]) > 1:
            half = size // 2
            a, b = (_slice(draft, node, field, axis, start, start + half) for start in (0, half))
            losers.append(draft.apply(node, worse, a, b))
            best = draft.apply(node, better, a, b)
            rest = [_slice(draft, node, field, axis, size - 1, size)] if size % 2 else []
            field = draft.apply(node, "Concat", best, *rest, axis=axis) if rest else best
        chosen.append(field)
        x = draft.apply(node, "Concat", *losers, axis=axis) if len(losers) > 1 else (losers or [x])[0]
    return draft.apply(node, "Concat", *chosen, axis=-1)


def _as_integers(draft: Draft, node: Node, index: str, out: str, size: int) -> None:
    """Whole floats in [0, size) as integers, which stand for themselves."""
    draft.apply(node, "Cast", draft.apply(node, "Round", index), out=out, to=CODES[INT64])
    zero = np.zeros(())
    draft.pinned[out] = Affine(zero + 1, zero, zero, zero + max(size - 1, 1), zero)


def _float(draft: Draft, node: Node, name: str) -> str:
    return draft.apply(node, "Cast", name, to=CODES[FLOAT])


def _reshape(draft: Draft, node: Node, name: str, shape: tuple[int, ...], out: str = "") -> str:
    target = draft.constant(f"{node.outputs[0]}/shape", np.asarray(shape, np.int64))
    return draft.apply(node, "Reshape", name, target, out=out, allowzero=1)


def _slice(draft: Draft, node: Node, x: str, axis: int, start: int, stop: int) -> str:
    bounds = [
        draft.constant(f"{node.outputs[0]}/{n}", [v], INT64) for n, v in (("from", start), ("to", stop), ("axis", axis))
    ]
    return draft.apply(node, "Slice", x, *bounds)


def _last_axis(draft: Draft, node: Node, x: str, axis: int) -> str:
    """The tensor with one axis moved to the end."""
    rank = len(draft.types[x].shape)
    order = (*(i for i in range(rank) if i != axis), axis)
    return x if axis == rank - 1 else draft.apply(node, "Transpose", x, perm=order)


def _move_last(draft: Draft, node: Node, x: str, axis: int, out: str = "") -> str:
    """The tensor with its last axis moved to `axis`."""
    rank = len(draft.types[x].shape)
    order = list(range(rank - 1))
    order.insert(axis, rank - 1)
    return draft.apply(node, "Transpose", x, out=out, perm=tuple(order))


RULES = {
    "ArgMax": _extreme_index,
    "ArgMin": _extreme_index,
    "Hardmax": _hardmax,
    "TopK": _top_k,
}
