"""Partitions of a program's tables and the noise constraints of each: the problem that `parameters.search` solves.

Sources: see `leveled.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fheq.leveled import Leveled
from fheq.parameters import Constraint, Pair, Problem


@dataclass(frozen=True)
class Partitioned:
    """A problem, and which of its operations each table uses.

    Args:
        own: partition of every table node.
        switch: pair of every table node's key switch.
        conversion: pair of the conversion that follows a table node, if there is one.
    """

    problem: Problem
    own: dict[int, int]
    switch: dict[int, Pair]
    conversion: dict[int, Pair]


def partition(program: Leveled) -> Partitioned:
    """Partitions the tables by the width that they read."""
    widths = sorted({node.reads for node in program.nodes if node.kind == "table"}) or [0]
    own = {i: widths.index(node.reads) for i, node in enumerate(program.nodes) if node.kind == "table"}
    blocks = _blocks(program)
    home = _homes(program, blocks, own)
    conversion = {i: (p, home[blocks[i]]) for i, p in own.items() if p != home[blocks[i]]}
    switch = {}
    for i, p in own.items():
        source = program.nodes[i].args[0]
        switch[i] = (own[source] if source in own else home[blocks[source]], p)
    noises = _noises(program, len(widths), blocks, home, own, conversion)
    constraints = []
    for i in own:
        source = program.nodes[i].args[0]
        fresh, boot, conv = noises[source] if source not in own else _bootstrap(len(widths), own[source])
        constraints.append(_constraint(fresh, boot, conv, switch[i], program.nodes[i].reads, program.nodes[i].size))
    for i in program.outputs:
        fresh, boot, conv = noises[i] if i not in own else _bootstrap(len(widths), own[i])
        constraints.append(_constraint(fresh, boot, conv, None, program.nodes[i].bits, program.nodes[i].size))
    boots = [sum(program.nodes[i].size for i, p in own.items() if p == q) for q in range(len(widths))]
    problem = Problem(tuple(boots), _count(program, switch), _count(program, conversion), tuple(constraints))
    return Partitioned(problem, own, switch, conversion)


Noise = tuple[np.ndarray, np.ndarray, dict[Pair, float]]


def _count(program: Leveled, pairs: dict[int, Pair]) -> tuple[tuple[Pair, int], ...]:
    counts: dict[Pair, int] = {}
    for i, pair in pairs.items():
        counts[pair] = counts.get(pair, 0) + program.nodes[i].size
    return tuple(sorted(counts.items()))


def _blocks(program: Leveled) -> list[int]:
    """The block of every node: what leveled operations connect."""
    parent = list(range(len(program.nodes)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    for i, node in enumerate(program.nodes):
        if node.kind in ("linear", "max"):
            for a in node.args:
                parent[root(i)] = root(a)
    return [root(i) for i in range(len(program.nodes))]


def _homes(program: Leveled, blocks: list[int], own: dict[int, int]) -> dict[int, int]:
    """The partition of every block: that of the tables that make it, else of those that read it; the narrowest if several."""
    made: dict[int, set[int]] = {b: set() for b in blocks}
    read: dict[int, set[int]] = {b: set() for b in blocks}
    for i, p in own.items():
        made[blocks[i]].add(p)
        read[blocks[program.nodes[i].args[0]]].add(p)
    home = {}
    for b in made:
        if made[b]:
            home[b] = min(made[b])
        else:
            home[b] = next(iter(read[b])) if len(read[b]) == 1 else 0
    return home


def _bootstrap(count: int, p: int) -> Noise:
    boot = np.zeros(count)
    boot[p] = 1
    return np.zeros(count), boot, {}


def _noises(program: Leveled, count: int, blocks: list[int], home: dict[int, int], own, conversion) -> list[Noise]:
    """The noise of every node under its block's key, as squared norms of independent noises."""
    out: list[Noise] = []
    for i, node in enumerate(program.nodes):
        if node.kind == "input":
            fresh = np.zeros(count)
            fresh[home[blocks[i]]] = 1
            out.append((fresh, np.zeros(count), {}))
        elif node.kind == "table":
            fresh, boot, _ = _bootstrap(count, own[i])
            out.append((fresh, boot, {conversion[i]: 1.0} if i in conversion else {}))
        elif node.kind == "zero":
            out.append((np.zeros(count), np.zeros(count), {}))
        else:
            out.append(_combine([out[a] for a in node.args], node.weights))
    return out


def _combine(parts: list[Noise], weights: tuple[float, ...]) -> Noise:
    """A weighted sum of independent noises; without weights, the largest of each."""
    join = (lambda values: sum(w * w * v for w, v in zip(weights, values))) if weights else max
    pairs = {pair for _, _, conv in parts for pair in conv}
    if weights:
        fresh, boot = (np.sum([w * w * p[k] for w, p in zip(weights, parts)], axis=0) for k in (0, 1))
    else:
        fresh, boot = (np.max([p[k] for p in parts], axis=0) for k in (0, 1))
    return fresh, boot, {pair: float(join([conv.get(pair, 0.0) for _, _, conv in parts])) for pair in pairs}


def _constraint(fresh: np.ndarray, boot: np.ndarray, conv: dict[Pair, float], switch: Pair | None, bits: int, count: int):
    return Constraint(tuple(map(float, fresh)), tuple(map(float, boot)), tuple(sorted(conv.items())), switch, bits, count)
