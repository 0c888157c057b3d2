"""From statistics and a specification to quantizers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import numpy as np

from fheq.affine import Affine
from fheq.errors import QuantizationError
from fheq.fitting.accumulators import fit_accumulator, weighed
from fheq.fitting.cells import fill_cells, rounds_nothing, too_wide
from fheq.fitting.fillers import with_fillers
from fheq.fitting.inverse_norms import ceilings_of
from fheq.fitting.negligible import floors_of, limited
from fheq.fitting.stated_weights import stated_weight
from fheq.fitting.sums import fit_sums
from fheq.fitting.tensor_quantizers import fit_tensors, tensor_bits
from fheq.fitting.weight_quantizers import fit_weight
from fheq.graph import Graph
from fheq.integers.alignment import check_alignment
from fheq.integers.integer_weights import reading
from fheq.observing.observed import check_stats
from fheq.observing.statistics import Stats
from fheq.planning.plan import Plan, plan
from fheq.qparams import QParams, unsigned
from fheq.spec import AccumulatorRange, Spec, as_spec
from fheq.steps import Linear, makes_accumulator


def fit(graph: Graph, stats: Stats, spec: int | Mapping[str, int] | Spec | None = None) -> QParams:
    """Quantizers for a graph.

    Args:
        graph: what `import_onnx` gives.
        stats: what `calibrate` gives for it.
        spec: bits as `get_n_bits_dict` takes them, or a `Spec`. Quantizers that the model states itself are kept; without
            bits it must state all that are needed.

    Returns:
        A pytree of Affines. Its structure depends on the graph and on the spec's granularities, never on bits.

    Raises:
        QuantizationError: an override names no tensor of the graph, the statistics are of another graph, or there are no
            bits for a tensor or weight that the model does not quantize (a `BitsError`, which names it).
    """
    return fit_each(graph, stats, [spec])[0]


def fit_each(graph: Graph, stats: Stats, specs: Iterable[int | Mapping[str, int] | Spec | None]) -> list[QParams]:
    """`fit` for each of many specs, in a fraction of the time: what specs share is worked out once.

    Specs that differ in rounding, margin or accumulators alone share the quantizers of tensors and weights.

    Args:
        graph, stats: as for `fit`.
        specs: such as `grid` gives.
    """
    wanted = [as_spec(spec) for spec in specs]
    layout = plan(graph)
    check_stats(layout, stats)
    groups: list[tuple[Spec, list[int]]] = []
    for i, spec in enumerate(wanted):
        _check_overrides(graph, layout, spec)
        alike = _of_tensors(spec)
        group = next((members for shared, members in groups if shared == alike), None)
        if group is None:
            groups.append((alike, [i]))
        else:
            group.append(i)
    found: dict[int, QParams] = {}
    for _, members in groups:
        found.update(zip(members, _fit_alike(layout, stats, [wanted[i] for i in members])))
    return [found[i] for i in range(len(wanted))]


def _of_tensors(spec: Spec) -> Spec:
    """What a spec says of tensors, and of weights before they fill the cells of accumulators; the rest by default."""
    return replace(spec, rounding=None, output_rounding=None, accumulators=AccumulatorRange.OBSERVED, margin=0.0)


def _fit_alike(layout: Plan, stats: Stats, specs: list[Spec]) -> list[QParams]:
    """`fit` for specs of equal `_of_tensors`."""
    bits = lambda key: tensor_bits(layout, key, specs[0])
    floors, ceilings = floors_of(layout, stats, bits), ceilings_of(layout, stats, bits)
    tensors = fit_tensors(layout, with_fillers(layout, limited(stats, floors.tensors, ceilings)), specs[0])
    check_alignment(layout, QParams(tensors, {}, {}))
    reached = limited(stats, floors.accumulators, {})
    found = _with_tensors(layout, reached, specs, tensors, True)
    vain = [i for i, spec in enumerate(specs) if rounds_nothing(spec) and too_wide(found[i])]
    for i, qparams in zip(vain, _with_tensors(layout, reached, [specs[i] for i in vain], tensors, False) if vain else ()):
        found[i] = qparams  # weights are not made coarser for a program that has no tables all the same
    return found


def _with_tensors(layout: Plan, stats: Stats, specs: list[Spec], tensors: dict[str, Affine], narrow: bool) -> list[QParams]:
    """The quantizers of weights and accumulators for each spec, beside those of tensors."""
    encrypted = unsigned(QParams(tensors, {}, {})).tensors
    moved = any(np.any(a.qmin != 0) for a in tensors.values())
    found = [QParams(dict(tensors), {}, {}) for _ in specs]
    readers: dict[str, list[Linear]] = {}
    for step in layout.steps:
        if isinstance(step, Linear):
            readers.setdefault(step.weight_name, []).append(step)
    for name, steps in readers.items():
        _fit_product(layout, stats, specs, found, encrypted, moved, name, steps, narrow)
    for spec, qparams in zip(specs, found):
        fitted, whole = qparams.accumulators, QParams(encrypted, qparams.weights, qparams.accumulators)
        changed = fit_sums(layout, stats, spec, whole)
        qparams.weights.update(changed)
        for step in layout.steps:
            if makes_accumulator(step):
                known = fitted.pop(step.out, None)  # in the order of steps
                kept = None if getattr(step, "weight_name", "") in changed else known
                fitted[step.out] = kept or fit_accumulator(layout, stats, spec, whole, step)
    return found


def _fit_product(
    layout: Plan,
    stats: Stats,
    specs: list[Spec],
    found: list[QParams],
    encrypted: dict[str, Affine],
    moved: bool,
    name: str,
    steps: list[Linear],
    narrow: bool,
) -> None:
    """Sets the weight `name` of `found`, one for each spec, and the accumulators of the steps that use it.

    Args:
        encrypted: the quantizers of tensors, `unsigned`.
        moved: whether that changed any.
        narrow: as for `fill_cells`.
    """
    last = steps[-1]
    read = reading(layout, found[0], last)
    stated = stated_weight(layout, found[0], last)
    affine = stated or fit_weight(read, last, specs[0])
    known = weighed(layout, replace(found[0], weights={name: affine}), last, read)
    for spec, qparams in zip(specs, found):
        filled = affine if stated else fill_cells(layout, stats, spec, qparams, last, affine, known, narrow)
        qparams.weights[name] = filled
        whole = QParams(encrypted, {name: filled}, {})
        own = None if moved else known if filled is affine else weighed(layout, whole, last, read)
        for step in steps:
            accumulator = fit_accumulator(layout, stats, spec, whole, step, own if step is last else None)
            qparams.accumulators[step.out] = accumulator


def _check_overrides(graph: Graph, layout: Plan, spec: Spec) -> None:
    steps = {name for s in layout.steps for name in (s.out, s.node.name, getattr(s, "weight_name", ""))}
    producers = layout.graph.producers()
    known = steps | set(layout.inputs) | set(layout.points) | {producers[p].name for p in layout.points if p in producers}
    for name in spec.overrides:
        if name not in known:
            near = ", ".join(sorted(known - {""})[:8])
            merged = {n for node in graph.nodes for n in (node.name, *node.inputs, *node.outputs)}
            if name in merged:
                raise QuantizationError(
                    f"override {name!r} names a part of the model that has no integers of its own: it was composed with the "
                    f"next layer, or is inside of a table; override what it became (there are {near}, ...)"
                )
            raise QuantizationError(f"override {name!r} names no quantized tensor, weight or node (there are {near}, ...)")
