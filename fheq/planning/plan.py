"""The plan: where a graph is quantized, and which integer steps run between the tables.

The plan depends on the graph alone, not on bits, data or parameters. It names

- **points**: tensors that are brought to integers by a table, each from one source;
- **sources**: integer tensors that regions start from: graph inputs and the results of steps;
- **steps**: linear ops, sums, products, maxima and joins of quantized tensors.

Calibration observes the points and sources, `fit` gives them quantizers, `fake_quant` plants them, `lower` emits them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

import jax

from fheq.affine import Affine
from fheq.client.encodings import is_encoding, separate_encodings
from fheq.client.one_hot import is_one_hot
from fheq.client.outputs import split
from fheq.errors import UnsupportedError
from fheq.graph import Graph
from fheq.planning.planner import outputs, walked
from fheq.planning.walk import Region
from fheq.regions import Elements
from fheq.rewrites import (
    activate_before_maximum,
    compose,
    compose_joined,
    decompose,
    quantize_before_movement,
    separate_known_parts,
    settle_decisions,
)
from fheq.rewriting.before_joins import apply_before_joins
from fheq.rewriting.common_factors import rearrange
from fheq.rewriting.distribute import distribute
from fheq.rewriting.edit import bypassed
from fheq.rewriting.equal_nodes import merge_equal_nodes
from fheq.rewriting.pins import is_float_cast
from fheq.rewriting.scaled_inputs import weigh_inputs
from fheq.stated.accumulators import take_accumulators
from fheq.steps import Add, Operand, Step, makes_accumulator


@dataclass(frozen=True, eq=False)
class Plan:
    """See the module's docstring.

    Args:
        graph: the decomposed graph, its linear operators composed, that the names refer to.
        steps: in order of evaluation.
        regions: by computed tensor (and graph input).
        points: point to its source.
        outputs: graph output to the operand that it is, or None where it is an affine function of its source and needs no
            table.
        adopted: graph inputs that take over a quantizer stated by the model.
        accumulators: what the model states of the tensors that steps make (`fheq.stated.accumulators`).
        elements: evaluates regions.
        client: what the client makes of decrypted outputs (`fheq.client.outputs`), None where they are the model's.
    """

    graph: Graph
    steps: tuple[Step, ...]
    regions: Mapping[str, Region]
    points: Mapping[str, str]
    outputs: Mapping[str, Operand | None]
    adopted: Mapping[str, Affine]
    accumulators: Mapping[str, Affine]
    elements: Elements
    client: Graph | None

    @cached_property
    def encoded(self) -> dict[str, str]:
        """Other encodings of inputs, each with the input."""
        return {node.outputs[0]: node.inputs[0] for node in self.graph.nodes if is_encoding(node)}

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Shape of a tensor of the graph, or of a step's result."""
        return self.graph.types[tensor].shape

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of what is encrypted: the graph's inputs, and other encodings of them (`fheq.client.encodings`)."""
        return (*(port.name for port in self.graph.inputs), *self.encoded)

    @cached_property
    def encoded_ahead(self) -> frozenset[str]:
        """Points that say whether an input equals a known number, which the client encrypts (`fheq.client.one_hot`)."""
        makers = self.graph.producers()
        return frozenset(p for p, x in self.points.items() if x in self.inputs and is_one_hot(self.graph, makers, p))

    @cached_property
    def summed(self) -> frozenset[str]:
        """Accumulators that sums read as they are, with no table between."""
        made = {s.out for s in self.steps if makes_accumulator(s)} - self.points.keys()
        return frozenset(o.key for s in self.steps if isinstance(s, Add) for o in s.operands if o.key in made)

    @cached_property
    def unrounded(self) -> frozenset[str]:
        """Accumulators that tables read and outputs hold, and what leads from them to these outputs: the tables read them
        rounded, the client decrypts them as they are."""
        found: set[str] = set()
        shared = {s.out for s in self.steps if makes_accumulator(s)} & set(self.points.values())
        for name in (n for n, operand in self.outputs.items() if operand is None and n in self.regions):
            source, stack = self.regions[name].source, [name]
            while source in shared and stack:
                tensor = stack.pop()
                if tensor in self.regions and self.regions[tensor].source == source and tensor not in found:
                    found.add(tensor)
                    stack += [] if tensor == source else self.graph.producers()[tensor].inputs
        return frozenset(found)


@lru_cache(maxsize=32)
def plan(graph: Graph) -> Plan:
    """Plans a graph.

    Raises:
        UnsupportedError: a node that cannot run on encrypted data, named, or an output without elements.
    """
    for port in graph.outputs:
        if 0 in port.type.shape:
            raise UnsupportedError(f"output {port.name!r} has no elements (shape {port.type.shape}): drop it from the model")
    server, client = split(graph)
    server, stated = take_accumulators(server)
    with jax.ensure_compile_time_eval():  # also where the caller is being traced
        exact = bypassed(server, lambda node: is_float_cast(node, server.types))
        simple = merge_equal_nodes(rearrange(merge_equal_nodes(decompose(quantize_before_movement(exact)))))
        simple = settle_decisions(separate_known_parts(simple))
        simple = apply_before_joins(activate_before_maximum(simple))
        simple = weigh_inputs(compose_joined(compose(distribute(compose(compose_joined(simple))))))
        found = walked(separate_encodings(simple))
        made = outputs(found)  # which may make points
        parts = found.graph, tuple(found.steps), found.regions, found.points, made, found.adopted
        return Plan(*parts, stated, found.evaluator(), client)
