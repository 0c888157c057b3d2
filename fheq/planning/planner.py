"""The walk over a graph that finds its regions, points and steps: see `fheq.planning.plan`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from fheq.affine import Affine
from fheq.client.encodings import is_encoding
from fheq.errors import FheqError, UnsupportedError
from fheq.graph import Graph, Node, describe
from fheq.ops.table import Kind, lookup
from fheq.planning.forms import build_linear, build_maximum, build_product, pairwise
from fheq.planning.operands import operand
from fheq.planning.walk import Region, Walk
from fheq.regions import FILLER, Movement, broadcast_elements, movements
from fheq.steps import Join, Operand


def walked(graph: Graph, report: Callable[[FheqError], None] | None = None) -> Walk:
    """Visits the nodes once.

    Args:
        report: takes the errors of single nodes instead of raising them; their results are then as new inputs.
    """
    walk = Walk(graph)
    for node in graph.nodes:
        try:
            _visit(walk, node)
        except FheqError as error:
            if report is None:
                raise
            report(error)
            for out in filter(None, node.outputs):
                walk.begin(out, quantized=True)
    return walk


def outputs(walk: Walk) -> dict[str, Operand | None]:
    """The operand that each graph output is; None for an affine function of its source."""
    found: dict[str, Operand | None] = {}
    for port in walk.graph.outputs:
        if port.name in walk.regions:
            affine = walk.regions[port.name].affine
            found[port.name] = None if affine else operand(walk, port.name)
    return found


def _visit(walk: Walk, node: Node) -> None:
    op = lookup(node)
    dynamic = [name for name in dict.fromkeys(node.inputs) if name in walk.regions]
    if is_encoding(node):
        walk.inputs.append(node.outputs[0])
        walk.begin(node.outputs[0], quantized=True)
    elif op.kind is Kind.MOVEMENT:
        _move(walk, node, dynamic)
    elif op.kind is Kind.ELEMENTWISE:
        _elementwise(walk, node, dynamic)
    elif op.kind is Kind.LINEAR:
        both = len([name for name in node.inputs[:2] if name in walk.regions]) == 2
        walk.add(build_product(walk, node) if both else build_linear(walk, node))
    elif op.kind is Kind.MAX:
        walk.add(build_maximum(walk, node), quantized=True)
    else:
        raise UnsupportedError(f"{describe(node)}: {node.op} of an encrypted tensor has no integer form")


def _move(walk: Walk, node: Node, dynamic: list[str]) -> None:
    for name, move in movements(walk.graph, node).items():
        if not name:
            continue
        walk.moves[name] = move
        sources = {walk.regions[d].source for d in dynamic if _reads(move, d)}
        if len(sources) <= 1:
            walk.regions[name] = _moved_region(walk, move, dynamic)
        else:
            _join(walk, node, name, move)


def _reads(move: Movement, name: str) -> bool:
    return bool(np.any(move.which == move.inputs.index(name)))


def _known(walk: Walk, move: Movement) -> np.ndarray:
    """Real values of the elements that come from no computed tensor."""
    fill = move.filler.copy()
    for i, name in enumerate(move.inputs):
        if name in walk.graph.constants:
            here = move.which == i
            fill[here] = np.asarray(walk.graph.constants[name], np.float64).ravel()[move.element[here]]
    return fill


def _moved_region(walk: Walk, move: Movement, dynamic: list[str]) -> Region:
    read = [d for d in dynamic if _reads(move, d)] or dynamic[:1]
    regions = [walk.regions[d] for d in read]
    size = len(move.which)
    elements, moved = np.full(size, FILLER), np.full(size, FILLER)
    fill = _known(walk, move)
    for name, region in zip(read, regions):
        here = move.which == move.inputs.index(name)
        at = move.element[here]
        elements[here], moved[here], fill[here] = region.elements[at], region.moved[at], region.fill[at]
    first = regions[0]
    if any(r.root != first.root for r in regions):
        # Branches of one source side by side: the result itself is the place to quantize.
        name = next(n for n, m in walk.moves.items() if m is move)
        everything = np.arange(size)
        return Region(first.source, elements, name, everything, np.zeros(size), all(r.affine for r in regions))
    return Region(first.source, elements, first.root, moved, fill, all(r.affine for r in regions))


def _join(walk: Walk, node: Node, name: str, move: Movement) -> None:
    pieces = tuple(operand(walk, d) if d in walk.regions else None for d in move.inputs)
    kept = [i for i, piece in enumerate(pieces) if piece is not None]
    position = np.array([kept.index(i) if i in kept else FILLER for i in range(len(pieces))] + [FILLER])
    step = Join(
        name,
        node,
        walk.graph.types[name].shape,
        tuple(p for p in pieces if p is not None),
        position[move.which],
        move.element,
        _known(walk, move),
    )
    walk.add(step, quantized=True)


def _elementwise(walk: Walk, node: Node, dynamic: list[str]) -> None:
    out = node.outputs[0]
    shape = walk.graph.types[out].shape
    spread = {d: broadcast_elements(walk.graph.types[d].shape, shape) for d in dynamic}
    regions = [walk.regions[d] for d in dynamic]
    seen = [r.elements[spread[d]] for d, r in zip(dynamic, regions)]
    fused = len({r.source for r in regions}) == 1 and all(np.array_equal(seen[0], s) for s in seen[1:])
    if not fused:
        _pair(walk, node, dynamic)
    elif _same_quantizer(walk, node, regions[0]) or _same_numbers(walk, node, regions[0]):
        walk.regions[out] = regions[0]
        nothing = np.zeros(len(seen[0]), np.int64)  # a copy, also of values between the grid's
        walk.moves[out] = Movement((node.inputs[0],), nothing, np.arange(len(nothing)), np.zeros(len(nothing)))
    else:
        everything = np.arange(len(seen[0]))
        affine = all(r.affine for r in regions) and walk.is_affine(node)
        walk.regions[out] = Region(regions[0].source, seen[0], out, everything, np.zeros(len(everything)), affine)


def _same_quantizer(walk: Walk, node: Node, region: Region) -> bool:
    """Whether a stated quantizer meets integers that are on its grid already (it then needs no table).

    A graph input that meets a quantizer adopts it.
    """
    stated = walk.graph.pinned.get(node.outputs[0])
    if node.op != "FakeQuant" or stated is None or region.root != region.source:
        return False
    if region.source not in walk.quantized:
        return False
    unmoved = np.array_equal(region.moved, np.arange(len(region.moved)))
    if region.source in walk.inputs and region.source not in walk.adopted and (stated.axis is None or unmoved):
        walk.adopted[region.source] = replace(stated, mode=node.attrs["rounding_mode"])
        return True
    held = _held(walk, region.source)
    return held is not None and stated.axis is None and _same(held, stated)


def _same_numbers(walk: Walk, node: Node, region: Region) -> bool:
    """Whether a Cast keeps the numbers of a quantized source: integers that become floats, or floats on a whole grid."""
    if node.op != "Cast" or region.source not in walk.quantized or region.root != region.source:
        return False
    given, made = (walk.graph.types[name].dtype.kind for name in (node.inputs[0], node.outputs[0]))
    held = _held(walk, region.source)
    whole = held is not None and all(np.all(np.mod(v, 1) == 0) for v in (held.scale, held.scale * held.zero_point))
    return (given in "iu" and made == "f") or (whole and made in "iu")


def _held(walk: Walk, source: str) -> Affine | None:
    """The stated quantizer of all of a quantized source, if there is one."""
    if source in walk.inputs:
        return walk.adopted.get(source)
    step = next((s for s in walk.steps if s.out == source), None)
    held = [walk.graph.pinned.get(o.key) or _held(walk, o.key) for o in step.operands] if step else []
    first = held[0] if held else None
    return first if first is not None and all(h is not None and _same(h, first) for h in held) else None


def _pair(walk: Walk, node: Node, dynamic: list[str]) -> None:
    """An op of two encrypted tensors that are functions of different elements."""
    if node.op in ("Add", "Sub", "Sum", "Mul", "Max", "Min") and len(node.inputs) == 2:
        walk.add(pairwise(walk, node), quantized=node.op in ("Max", "Min"))
        return
    raise UnsupportedError(
        f"{describe(node)}: {node.op} of {len(dynamic)} different encrypted tensors has no integer form; "
        "rewrite it with Add, Sub, Mul, Max, Min, MatMul or comparisons of two tensors"
    )


def _same(a: Affine, b: Affine) -> bool:
    leaves = ("scale", "zero_point", "qmin", "qmax")
    return all(np.array_equal(np.asarray(getattr(a, n)), np.asarray(getattr(b, n))) for n in leaves)
