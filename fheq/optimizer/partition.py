"""Partitions of a program's tables and the noise constraints of each: the problem that `parameters.search` solves.

Sources: see `leveled.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from fheq.optimizer.leveled import Leveled

Pair = tuple[int, int]


@dataclass(frozen=True)
class Constraint:
    """Noise at a table's input or at an output.

    Args:
        fresh, boot: squared 2-norms of the noise of inputs and bootstraps, by partition.
        conv: the same of conversions, by pair.
        switch: the pair of the table's key switch; None at an output.
        bits: width of the message.
        count: how many elements must be right.
    """

    fresh: tuple[float, ...]
    boot: tuple[float, ...]
    conv: tuple[tuple[Pair, float], ...]
    switch: Pair | None
    bits: int
    count: int = field(default=1, compare=False)

    def dominates(self, other: Constraint) -> bool:
        """Whether the other holds wherever this one does."""
        conv, theirs = dict(self.conv), dict(other.conv)
        return (
            self.switch == other.switch
            and self.bits >= other.bits
            and all(a >= b for a, b in zip(self.fresh + self.boot, other.fresh + other.boot))
            and all(conv.get(pair, 0.0) >= v for pair, v in theirs.items())
        )


@dataclass(frozen=True)
class Problem:
    """Operations to pay for and noise to bound; conversions and key switches by pair, with their numbers."""

    boots: tuple[int, ...]
    switches: tuple[tuple[Pair, int], ...]
    conversions: tuple[tuple[Pair, int], ...]
    constraints: tuple[Constraint, ...]

    def undominated(self) -> Problem:
        """The same with the constraints that matter alone."""
        kept: list[Constraint] = []
        for c in sorted(set(self.constraints), key=lambda c: (-c.bits, -sum(c.boot), -sum(c.fresh))):
            if not any(k.dominates(c) for k in kept):
                kept.append(c)
        return replace(self, constraints=tuple(kept))

    def merged(self) -> Problem:
        """The same with one partition."""
        constraints = tuple(
            Constraint((sum(c.fresh),), (sum(c.boot),), (), (0, 0) if c.switch else None, c.bits) for c in self.constraints
        )
        return Problem((sum(self.boots),), (((0, 0), sum(n for _, n in self.switches)),), (), constraints).undominated()


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
    """The partition of every block: that of the tables that make it, else that read it; the narrowest of several."""
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
    if weights:
        join = lambda values: sum(w**2 * v for w, v in zip(weights, values))
    else:
        join = lambda values: np.max(values, axis=0)
    pairs = {pair for _, _, conv in parts for pair in conv}
    conversions = {pair: float(join([conv.get(pair, 0.0) for _, _, conv in parts])) for pair in pairs}
    return join([fresh for fresh, _, _ in parts]), join([boot for _, boot, _ in parts]), conversions


def _constraint(fresh: np.ndarray, boot: np.ndarray, conv: dict[Pair, float], switch: Pair | None, bits: int, count: int):
    return Constraint(tuple(map(float, fresh)), tuple(map(float, boot)), tuple(sorted(conv.items())), switch, bits, count)
