"""Quantizers of inputs and activations, from statistics and a specification."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from fheq.affine import Affine, affine_bits, as_float32, bit_length
from fheq.fitting.exact_steps import Range, is_weighed, meets_filler, take_grids, take_whole
from fheq.fitting.product_scales import Interval, steps_in_products
from fheq.fitting.shared_steps import Group, coarser, is_integral
from fheq.fitting.thresholds import on_edges
from fheq.graph import describe, is_float
from fheq.observers import observed_range
from fheq.observing.statistics import Stats, TensorStats, per_tensor
from fheq.origins import copied_from, is_boolean, is_integer
from fheq.planning.granularity import Sharing, share
from fheq.planning.plan import Plan
from fheq.spec import DEFAULT_MODEL_BITS, BitsError, Granularity, Override, Spec
from fheq.steps import Join

TINY = 1e-12  # relative width below which a range counts as a point


def _names(layout: Plan, key: str) -> tuple[str, str]:
    producer = layout.graph.producers().get(key)
    return key, producer.name if producer else ""


def fit_tensors(layout: Plan, stats: Stats, spec: Spec) -> dict[str, Affine]:
    """Quantizers of inputs and points."""
    keys = list(dict.fromkeys([*layout.inputs, *layout.points]))
    joined = {operand.key for step in layout.steps if isinstance(step, Join) for operand in step.operands}
    copied = {k: a for k in keys if (a := _copied(layout, k)) is not None}
    stated = {k: a for k in keys if (a := _stated(layout, k) or (None if k in joined else copied.get(k))) is not None}
    wanted = {}
    for key in keys:
        granularity = spec.override(*_names(layout, key)).granularity or spec.activations
        axis = stated[key].axis if key in stated else (-1 if granularity is Granularity.PER_CHANNEL else None)
        wanted[key] = axis is not None and _divisible(layout, key)
    sharing = share(layout, wanted)
    compared = {sharing.group[key] for key in stated} & sharing.identical  # these take over the stated quantizer
    chosen = spec.n_bits is not None
    if not chosen:
        _check_stated(layout, stats, spec, [key for key in keys if key not in stated and sharing.group[key] not in compared])
        spec = replace(spec, n_bits=DEFAULT_MODEL_BITS, overrides=_whole_numbers(layout, stats, spec))
    coarse = {port.name for port in layout.graph.inputs if chosen and port.labels is None and is_weighed(layout, port.name)}
    ranges = {key: _range(layout, key, stats.get(key), spec, sharing.axis[key], key in coarse) for key in keys}
    whole, steps = take_whole(layout, stats, sharing, ranges, stated)
    alone = [key for key in keys if key in stats and key not in stated and key not in layout.inputs]
    grids = take_grids(layout, stats, sharing, ranges, alone, joined, copied)
    known = {key: Interval(*ranges[key], grids.get(key, _steps(layout, key, *ranges[key]))) for key in keys}
    free = [key for key in keys if key in stats and key not in grids and not _of_whole(layout, key, whole)]
    scales = steps_in_products(layout, known, free)
    scales |= {key: np.where(whole[key], steps[key], scales[key]) for key in steps}
    result: dict[str, Affine] = {}
    for key in keys:
        members = [k for k in keys if sharing.group[k] == sharing.group[key]]
        result[key] = stated[key] if key in stated else _affine(layout, key, members, sharing, ranges, scales, stated, whole)
        if key in whole and len(members) == 1:
            seen = stats[key] if sharing.axis[key] is not None else per_tensor(stats[key])
            result[key] = on_edges(layout, key, result[key], seen, ranges[key][2])
    return result


def _of_whole(layout: Plan, key: str, whole: Mapping[str, np.ndarray]) -> bool:
    """Whether a tensor's steps are given by the whole numbers that it holds."""
    return not _divisible(layout, key) or is_integer(layout.graph, key) or bool(np.any(whole.get(key, False)))


def _divisible(layout: Plan, key: str) -> bool:
    port = next((p for p in layout.graph.inputs if p.name == key), None)
    return (port is None or is_float(port.type.dtype)) and not is_boolean(layout.graph, key)


def _stated(layout: Plan, key: str) -> Affine | None:
    """The quantizer that the model or a rewrite states for a tensor, or for the whole steps that integers are cast from."""
    graph, maker = layout.graph, layout.graph.producers().get(key)
    if maker is not None and maker.op == "Cast" and graph.types[key].dtype.kind in "iu":
        found = graph.pinned.get(maker.inputs[0])
        if found is not None and np.all(found.scale == np.round(found.scale)):
            return found
    return layout.adopted.get(key) or graph.pinned.get(key)


def _copied(layout: Plan, key: str) -> Affine | None:
    """The quantizer that the model or a rewrite states for integers that a tensor copies."""
    found = (layout.graph.pinned.get(n) for n in copied_from(layout.graph, key) if layout.graph.types[n].dtype.kind in "iu")
    return next((affine for affine in found if affine is not None and affine.axis is None), None)


def tensor_bits(layout: Plan, key: str, spec: Spec) -> int:
    """Bits of a quantized tensor."""
    override, stated = spec.override(*_names(layout, key)).n_bits, _stated(layout, key)
    if override is not None:
        return override
    if spec.n_bits is None and stated is not None:
        return affine_bits(stated)
    bits = spec.bits()
    if key in layout.inputs:
        return bits["model_inputs"]
    read = any(o.key == key for step in layout.steps for o in step.operands)
    return bits["op_inputs"] if read else bits["model_outputs"]


def _check_stated(layout: Plan, stats: Stats, spec: Spec, keys: list[str]) -> None:
    """Checks that tensors without a stated quantizer need no bits either: decisions, integers, and inputs that nothing
    reads."""
    read = {operand.key for step in layout.steps for operand in step.operands} | {*layout.points.values()}
    read |= {region.source for name, region in layout.regions.items() if name in layout.outputs}
    for key in keys:
        free = is_integral(layout, key) or (key in layout.inputs and key not in read)
        if key in stats and not free and spec.override(*_names(layout, key)).n_bits is None:
            producer = layout.graph.producers().get(key)
            made = f", made by {describe(producer)}," if producer else ""
            raise BitsError(f"tensor {key!r}{made} has no quantizer in the model: give n_bits, or quantize it there")


def _whole_numbers(layout: Plan, stats: Stats, spec: Spec) -> dict[str, Override]:
    """The overrides of a spec, with the bits that computed integers take."""
    found = dict(spec.overrides)
    for key in layout.points:
        whole = key in stats and layout.graph.types[key].dtype.kind in "iu"
        if whole and spec.override(*_names(layout, key)).n_bits is None:
            span = np.max(stats[key].maximum) - np.min(stats[key].minimum)
            found[key] = replace(found.get(key, Override()), n_bits=bit_length(span))
    return found


def _range(layout: Plan, key: str, stats: TensorStats | None, spec: Spec, axis: int | None, coarse: bool) -> Range:
    """Lowest and highest value to represent, `()` or `(C,)`, and the bits for it.

    Args:
        coarse: whether integers may lose low bits.
    """
    if stats is None:  # decisions
        return np.zeros(()), np.ones(()), 1
    port = next((p for p in layout.graph.inputs if p.name == key), None)
    exact = port is not None and port.type.dtype.kind in "iub"
    bits = tensor_bits(layout, key, spec)
    seen = stats if axis is not None else per_tensor(stats)
    if exact:  # integers stand for themselves
        low, high = seen.minimum, seen.maximum
        if port is not None and port.labels is not None:  # categories that calibration lacks, and unknown ones
            low, high = np.zeros_like(low), np.full_like(high, len(port.labels))
        needed = max(1, int(np.ceil(np.log2(np.max(high) - np.min(low) + 1))))
        step = 2.0 ** max(needed - bits, 0) if coarse else 1.0
        low = np.floor(np.min(low, keepdims=True) / step) * step
        bits = max(1, int(np.ceil(np.log2((np.max(high) - np.max(low)) // step + 1))))
        high = low + step * (2.0**bits - 1)
    elif is_integer(layout.graph, key) and np.max(seen.maximum) - np.min(seen.minimum) < 2.0**bits:
        low = np.min(seen.minimum, keepdims=True)
        high = low + 2.0**bits - 1
    else:
        option, observer = "an override's observer", spec.override(*_names(layout, key)).observer
        if observer is None:
            option = "input_observer" if key in layout.inputs else "observer"
            observer = getattr(spec, option)
        low, high = observed_range(observer, seen, bits, f"{option} of tensor {key!r}")
        if meets_filler(layout, key):
            low, high = np.minimum(low, 0), np.maximum(high, 0)
    if axis is None:
        low, high = np.min(low), np.max(high)
    return np.asarray(low, np.float64), np.asarray(high, np.float64), bits


def _steps(layout: Plan, key: str, low: np.ndarray, high: np.ndarray, bits: int) -> np.ndarray:
    """Steps of which `bits` hold a range; whole ones for integers, which stay integers."""
    scale = _scale(low, high, bits)
    return np.ceil(scale) if layout.graph.types[key].dtype.kind in "iu" and np.all(scale > 1) else scale


def _scale(low: np.ndarray, high: np.ndarray, bits: int) -> np.ndarray:
    span = high - low
    size = np.maximum(np.maximum(np.abs(low), np.abs(high)), 1e-30)
    span = np.where(span <= TINY * size, np.where(size > 1e-29, size, 1.0), span)  # a constant: any step of its size
    return span / (2.0**bits - 1)


def _affine(
    layout: Plan,
    key: str,
    members: list[str],
    sharing: Sharing,
    ranges: Mapping[str, Range],
    scales: Mapping[str, np.ndarray],
    stated: Mapping[str, Affine],
    whole: Mapping[str, np.ndarray],
) -> Affine:
    axis, number = sharing.axis[key], sharing.group[key]
    low, high, bits = ranges[key]
    given = next((stated[m] for m in members if m in stated), None)
    if given is not None and (given.axis is None or axis is not None):
        if number in sharing.identical:
            return replace(given, axis=axis, mode="ROUND")
        scale = np.broadcast_to(np.asarray(given.scale, np.float64), low.shape)
        if number in sharing.exact:
            bits = _holding(low, high, scale, bits)
        else:
            scale = scale * coarser(scale, scales[key])
    elif len(members) == 1:
        scale = scales[key]
    elif number in sharing.identical or number in sharing.exact:
        group = Group.of(layout, members, ranges, scales, whole)
        scale = group.coarsest
        if number in sharing.identical:
            low = np.min([ranges[m][0] for m in members], axis=0)
            high = np.max([ranges[m][1] for m in members], axis=0)
            bits = max(ranges[m][2] for m in members)
            scale = _scale(low, high, bits)
        scale = group.together(scale)
        bits = _holding(low, high, scale, bits)
    else:
        scale = Group.of(layout, members, ranges, scales, whole).in_sum(key)
    return affine_between(low, high, scale, bits, axis)


def _holding(low: np.ndarray, high: np.ndarray, scale: np.ndarray, bits: int) -> int:
    """The bits given, or as many as a range has steps."""
    return max(bits, int(np.max(np.ceil(np.log2((high - low) / scale + 1) - TINY))))


def affine_between(low: np.ndarray, high: np.ndarray, scale: np.ndarray, bits: int, axis: int | None) -> Affine:
    """Unsigned integers for [low, high] in steps of `scale` (as float32 has it); no more than 2^bits of them."""
    scale = as_float32(scale)
    zero_point = -np.round(low / scale)
    qmax = np.clip(np.round(high / scale) + zero_point, 1, 2.0**bits - 1)
    return Affine(scale, zero_point, np.zeros_like(scale), qmax, np.zeros_like(scale), axis)
