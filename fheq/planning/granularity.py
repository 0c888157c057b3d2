"""Which tensors can have a quantizer per channel, and which must share one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from fheq.planning.plan import Plan
from fheq.steps import Add, Join, Linear, Maximum, Operand, Product, Step, Sum, varies_only_along


@lru_cache(maxsize=64)
def _axes(layout: Plan) -> dict[str, int | None]:
    axes: dict[str, int | None] = {}
    for step in layout.steps:  # what a convolution reads has channels on axis 1
        if isinstance(step, Linear) and step.form == "conv":
            rank = len(layout.shape(step.x.key))
            if rank == len(step.x.shape):
                axes[step.x.key] = 1 - rank
    made = {step.out: step for step in layout.steps}

    def visit(name: str) -> int | None:
        if name not in axes:
            axes[name] = _default_axis(layout, name, made, visit)
        return axes[name]

    for name in [*layout.inputs, *made, *layout.points]:
        visit(name)
    return axes


def _default_axis(layout: Plan, name: str, made: Mapping[str, Step], visit) -> int | None:
    rank = len(layout.shape(name))
    if rank == 0:
        return None
    step = made.get(name)
    if isinstance(step, Linear):
        return step.channel if rank >= -step.channel else None
    before = layout.points.get(name) if step is None else step.operands[0].key
    if before is not None and before != name and len(layout.shape(before)) == rank:
        return visit(before)
    return -1


def channel_axis(layout: Plan, name: str) -> int | None:
    """The channel axis of an observed tensor, counted from the end; None for a scalar."""
    return _axes(layout)[name]


def channel_numbers(shape: tuple[int, ...], axis: int | None) -> np.ndarray:
    """The channel of each element of a tensor, flat; 0 without a channel axis."""
    if axis is None:
        return np.zeros(int(np.prod(shape)), np.int64)
    view = [1] * len(shape)
    view[axis] = shape[axis]
    return np.broadcast_to(np.arange(shape[axis]).reshape(view), shape).ravel()


def first_of_channel(v: np.ndarray, axis: int | None) -> np.ndarray:
    """The first element of each channel, with the other axes kept as 1."""
    index = tuple(slice(None) if axis is not None and i == axis % v.ndim else slice(0, 1) for i in range(v.ndim))
    return v[index]


def varies_in_channel(v: np.ndarray, axis: int | None) -> bool:
    """Whether elements of a channel differ by more than scales do that are the same in float32."""
    first = first_of_channel(v, axis)
    return bool(np.any(np.abs(v - first) > 1e-6 * np.abs(first)))


@dataclass(frozen=True)
class Sharing:
    """Granularity of the quantized tensors.

    Args:
        axis: by quantized tensor (points and inputs): its channel axis, or None for one quantizer.
        group: by quantized tensor: tensors of equal number share their scale.
        exact: groups whose members must have the very same scale (their integers are summed as they are).
        identical: groups whose members share the whole quantizer (a maximum compares them, or a product with weights reads
            them in one channel).
    """

    axis: Mapping[str, int | None]
    group: Mapping[str, int]
    exact: frozenset[int]
    identical: frozenset[int]


def share(layout: Plan, wanted: Mapping[str, bool]) -> Sharing:
    """Resolves granularity.

    Args:
        wanted: by quantized tensor, whether a quantizer per channel is wanted.

    Returns:
        Per-channel axes where every reader can absorb the scales, and the groups of tensors that must agree.
    """
    return _Resolver(layout, wanted).result()


class _Resolver:
    def __init__(self, layout: Plan, wanted: Mapping[str, bool]):
        self.layout = layout
        self.keys = [*layout.inputs, *layout.points]
        self.axis = {k: channel_axis(layout, k) if wanted[k] else None for k in self.keys}
        self.parent = {k: k for k in self.keys}
        self.steps = {step.out: step for step in layout.steps}
        self.exact: set[str] = set()
        self.full: set[str] = set()
        self.sources: dict[str, list[str]] = {}
        self.numbers: dict[tuple[str, bool, tuple[int | None, ...]], np.ndarray] = {}

    def result(self) -> Sharing:
        while self.one_pass():
            pass
        roots = {k: self.find(k) for k in self.keys}
        numbers = {root: i for i, root in enumerate(dict.fromkeys(roots.values()))}
        exact, identical = (frozenset(numbers[self.find(k)] for k in keys) for keys in (self.exact, self.full))
        return Sharing(self.axis, {k: numbers[r] for k, r in roots.items()}, exact, identical)

    def find(self, key: str) -> str:
        while self.parent[key] != key:
            key = self.parent[key]
        return key

    def unite(self, keys: list[str]) -> bool:
        roots = {self.find(k) for k in keys}
        first = self.find(keys[0])
        for root in roots:
            self.parent[root] = first
        return len(roots) > 1

    def one_pass(self) -> bool:
        """Applies every reader's constraint once; says whether anything changed."""
        changed = False
        for step in self.layout.steps:
            if isinstance(step, (Add, Maximum)):
                changed |= len(self.tensors(step)) > 1 - isinstance(step, Maximum) and self.align(step)
            else:
                changed |= self.leave_weight(step)
                for operand in step.operands:
                    if not self.absorbs(step, self.labels(operand)):
                        origins = self.origins(operand)
                        changed |= self.flatten(origins)
                        if isinstance(step, Linear) and len(origins) > 1:  # which takes one offset for each channel
                            self.full.update(origins)
        for key in self.keys:  # a group is per channel as a whole or not at all
            root = self.find(key)
            if self.axis[key] is None and self.axis[root] is not None:
                self.axis[root], changed = None, True
        for key in self.keys:
            if self.axis[self.find(key)] is None and self.axis[key] is not None:
                self.axis[key], changed = None, True
        return changed

    def flatten(self, keys: list[str]) -> bool:
        changed = any(self.axis[k] is not None for k in keys)
        for k in keys:
            self.axis[k] = None
        if not changed and len(keys) > 1:
            self.exact.update(keys)
            return self.unite(keys)
        return changed

    def leave_weight(self, step: Step) -> bool:
        """Gives what multiplies a weight on a stated grid one scale each: a scale per channel would move the grid."""
        if not isinstance(step, Linear) or step.weight_name not in self.layout.graph.pinned:
            return False
        free = [k for k in self.origins(step.x) if k not in self.layout.graph.pinned and k not in self.layout.adopted]
        changed = any(self.axis[k] is not None for k in free)
        for k in free:
            self.axis[k] = None
        return changed

    def align(self, step: Step) -> bool:
        if isinstance(step, Maximum) and self.is_of_channels(step):
            return False
        operands = self.tensors(step)
        origins = [k for operand in operands for k in self.origins(operand)]
        changed = self.unite(origins)
        if isinstance(step, Maximum):
            self.full.update(origins)
        channels = [self.channels(operand) for operand in operands]
        if isinstance(step, Maximum):
            channels = [c.reshape(*step.shape, -1) for c in channels]
            agree = all(varies_only_along(c.reshape(-1, c.shape[-1]), 0) for c in channels)
            channels = [c[..., :1] for c in channels]
        else:
            agree = True
        sizes = {self.layout.shape(k)[self.axis[k]] for k in origins if self.axis[k] is not None}  # type: ignore[index]
        agree &= len(sizes) <= 1
        agree &= all(np.array_equal(channels[0], c) for c in channels[1:])
        if not agree:
            changed |= any(self.axis[k] is not None for k in origins)
            for k in origins:
                self.axis[k] = None
        return changed

    def is_of_channels(self, step: Maximum) -> bool:
        """Whether each maximum is one of elements that share a quantizer as they are: pools of one channel each."""
        labels = np.concatenate([self.labels(x).reshape(*step.shape, -1) for x in step.xs], axis=-1)
        return varies_only_along(labels.reshape(-1, labels.shape[-1]), 0)

    def absorbs(self, step: Step, labels: np.ndarray) -> bool:
        if isinstance(step, Linear):
            return varies_only_along(labels, {"matmul": labels.ndim - 1, "left": labels.ndim - 2, "conv": 1}[step.form])
        if isinstance(step, Sum) or (isinstance(step, Product) and step.contract):
            return varies_only_along(labels.reshape(-1, labels.shape[-1]), 0)
        return isinstance(step, (Join, Product))

    def origins(self, operand: Operand) -> list[str]:
        """The quantized tensors (points and inputs) whose integers an operand holds."""
        return self.sources_of(operand.key)

    def sources_of(self, key: str) -> list[str]:
        if key not in self.sources:  # kept: a tournament of maxima and minima reaches each of its inputs by 2^depth ways
            step = None if key in self.parent else self.steps.get(key)
            found = [key] if step is None else [k for o in self.tensors(step) for k in self.sources_of(o.key)]
            self.sources[key] = list(dict.fromkeys(found))
        return self.sources[key]

    def tensors(self, step: Step) -> list[Operand]:
        """The operands that are quantized tensors; of a sum, the sums of such too, whose steps are theirs."""
        return [operand for operand in step.operands if operand.key not in self.layout.summed or self.is_sum(operand.key)]

    def is_sum(self, key: str) -> bool:
        return isinstance(self.steps[key], Add) and bool(self.tensors(self.steps[key]))

    def labels(self, operand: Operand) -> np.ndarray:
        """A number per scale at each element of an operand; -1 at fillers."""
        return self._numbers(operand, numbered=True)

    def channels(self, operand: Operand) -> np.ndarray:
        """The channel of the scale at each element of an operand."""
        return self._numbers(operand, numbered=False)

    def _numbers(self, operand: Operand, numbered: bool) -> np.ndarray:
        whole = self._of_key(operand.key, numbered)
        moved = np.where(operand.elements < 0, -1, whole[np.maximum(operand.elements, 0)])
        return moved.reshape(operand.shape)

    def _of_key(self, key: str, numbered: bool) -> np.ndarray:
        """The numbers of a whole tensor, flat; kept for the axes that they depend on, as its sources are."""
        if key in self.parent:
            return self._of_quantized(key, numbered)
        of = key, numbered, tuple(self.axis[k] for k in self.sources_of(key))
        if of not in self.numbers:
            self.numbers[of] = self._of_step(self.steps[key], numbered)
        return self.numbers[of]

    def _of_quantized(self, key: str, numbered: bool) -> np.ndarray:
        number = channel_numbers(self.layout.shape(key), self.axis[key])
        return number + (self.keys.index(key) << 32 if numbered else 0)

    def _of_step(self, step: Step, numbered: bool) -> np.ndarray:
        if isinstance(step, Maximum):
            return self._numbers(step.xs[0], numbered).reshape(*step.shape, -1)[..., 0].ravel()
        if isinstance(step, Add):
            return self._numbers(self.tensors(step)[0], numbered).ravel()
        assert isinstance(step, Join)
        out = np.full(int(np.prod(self.layout.shape(step.out))), -1, np.int64)
        for i, piece in enumerate(step.pieces):
            here = step.which == i
            out[here] = self._numbers(piece, numbered).ravel()[step.element[here]]
        return out
