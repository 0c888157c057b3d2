"""Integer tensors inside a graph (QDQ and integer operators) as the real values that they stand for.

Between QuantizeLinear and DequantizeLinear a model may move, clip or compare integers. Each integer tensor on a known grid
has a *twin*, the float tensor that it stands for; readers that know the grid read the twin.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from fheq.affine import Affine
from fheq.errors import UnsupportedError
from fheq.graph import Node, describe, is_float
from fheq.ops.arguments import DTYPES
from fheq.ops.resize import interpolates
from fheq.ops.table import Kind, Op, lookup, register
from fheq.rewriting.edit import CODES, Draft
from fheq.stated.grids import Grid, is_integer, linear_grid, write_fake_quant

# Whole: a float tensor that holds whole numbers, as the integers that an operator of the model declares.
register(Op("Whole", 1, Kind.ELEMENTWISE, lambda node, x: jnp.round(x).astype(jnp.int32), domain="fheq"))

_UNIT = Grid(np.ones(()), np.zeros(()), -(2**31), 2**31 - 1, None)
_WIDEST_INPUT = 16  # bits of integer inputs whose whole range is taken


@dataclass(frozen=True)
class Twin:
    """The real values of an integer tensor.

    Args:
        grid: where they lie.
        name: the float tensor; "" until a reader wants it.
        source: what a FakeQuant node makes it from.
        node: the node that states the grid.
    """

    grid: Grid
    name: str
    source: str
    node: Node


class Twins:
    """The twins of the integer tensors of a draft, found node by node."""

    def __init__(self, draft: Draft):
        self.draft = draft
        self.found: dict[str, Twin] = {}

    def write(self, node: Node) -> bool:
        """Writes what stands for a node that makes or reads integers; says whether the node itself is not needed."""
        if node.domain == "fheq" and node.op == "Whole":
            self.found[node.outputs[0]] = Twin(_UNIT, node.inputs[0], "", node)
            return False
        if node.domain:
            return False
        if node.op == "QuantizeLinear":
            self.begin(node)
        elif node.op == "DequantizeLinear":
            return self.decode(node)
        elif node.op == "Cast":
            return self.cast(node)
        elif node.op in ("Clip", "Relu", "Max", "Min") and node.inputs[0] in self.found:
            self.clip(node)
        elif lookup(node).kind in (Kind.MOVEMENT, Kind.MAX) or node.op == "Identity":
            self.move(node)
        return False

    def real(self, tensor: str, name: str = "") -> str:
        """The float tensor of an integer one, made now if it has none yet (under the given name)."""
        twin = self.found[tensor]
        if not twin.name:
            name = name or self.draft.fresh(f"{tensor}/real")
            write_fake_quant(self.draft, twin.node, twin.source, twin.grid, name)
            twin = self.found[tensor] = replace(twin, name=name)
        return twin.name

    def begin(self, node: Node) -> None:
        """QuantizeLinear."""
        x, dtype = node.inputs[0], self.draft.types[node.outputs[0]].dtype
        precision = node.attrs.get("precision", 0)
        if precision and DTYPES[precision] not in (np.float32, np.float64):
            kind = np.dtype(DTYPES[precision])
            raise UnsupportedError(
                f"{describe(node)}: fheq does not round quotients to {kind}; omit the attribute precision, or make it FLOAT"
            )
        if all(name in self.draft.constants for name in node.inputs[1:] if name):
            grid = linear_grid(node, self.draft.constants, dtype, self.draft.types[x].shape)
            self.found[node.outputs[0]] = Twin(grid, "", x, node)

    def decode(self, node: Node) -> bool:
        """DequantizeLinear: its input's twin, where both state one grid."""
        draft, q = self.draft, node.inputs[0]
        if not all(name in draft.constants for name in node.inputs[1:] if name):
            return False
        kind = draft.types[q]
        if q not in self.found:
            self.whole_range(q)
            return False
        grid = linear_grid(node, draft.constants, kind.dtype, kind.shape)
        if not _same(grid, self.found[q].grid):
            self.decode_otherwise(node, grid)
            return True
        self.alias(node, q)
        return True

    def decode_otherwise(self, node: Node, grid: Grid) -> None:
        """The integers of a twin on another grid than the one that made them: an affine function of it."""
        draft, held, out = self.draft, self.found[node.inputs[0]].grid, node.outputs[0]
        dtype, steps = draft.types[out].dtype, held.zero_point - grid.zero_point
        scaled = draft.apply(node, "Cast", self.real(node.inputs[0]), to=CODES[dtype])
        scaled = draft.apply(node, "Mul", scaled, draft.constant(f"{out}/ratio", grid.scale / held.scale, dtype))
        draft.apply(node, "Add", scaled, draft.constant(f"{out}/offset", steps * grid.scale, dtype), out=out)
        affine = grid.with_range(held.qmin, held.qmax).affine
        if affine is not None:
            draft.pinned[out] = affine

    def whole_range(self, q: str) -> None:
        """An integer input of the model that is dequantized takes every integer of its type."""
        dtype = self.draft.types[q].dtype
        if any(port.name == q for port in self.draft.graph.inputs) and is_integer(dtype):
            limits = ml_dtypes.iinfo(dtype)
            if limits.bits <= _WIDEST_INPUT:
                low, high = (np.asarray(float(v)) for v in (limits.min, limits.max))
                affine = Affine(np.ones(()), np.zeros(()), low, high, np.zeros(()), signed=limits.min < 0)
                self.draft.pinned.setdefault(q, affine)

    def cast(self, node: Node) -> bool:
        """Cast of integers to wider ones and back, and of those on the grid of whole numbers to float."""
        q, kind = node.inputs[0], self.draft.types[node.outputs[0]].dtype
        if q in self.found and is_integer(kind) and self.found[q].grid.within(kind):
            self.found[node.outputs[0]] = self.found[q]
            return False
        to_float = is_float(self.draft.types[node.outputs[0]].dtype)
        if q not in self.found or not to_float or not _same(self.found[q].grid, _UNIT):
            return False
        self.alias(node, q)
        return True

    def alias(self, node: Node, q: str) -> None:
        """Makes a node's output the twin of an integer tensor."""
        out = node.outputs[0]
        if self.draft.types[out].dtype != self.type_of(q):
            self.draft.apply(node, "Cast", self.real(q), to=CODES[self.draft.types[out].dtype], out=out)
            return
        name = self.real(q, out)
        if name != out:
            self.draft.write(replace(node, op="Identity", inputs=(name,), attrs=MappingProxyType({})))

    def type_of(self, q: str) -> np.dtype:
        """The type of a twin."""
        return self.draft.types[self.found[q].name or self.found[q].source].dtype

    def clip(self, node: Node) -> None:
        """Clip, Relu, and Max and Min with known integers: fewer integers on the same grid."""
        q = node.inputs[0]
        twin, bounds = self.found[q], self.bounds(node)
        if twin.grid.affine is None or bounds is None:
            return
        grid = twin.grid.between(*bounds)
        if grid is not None:
            self.found[node.outputs[0]] = Twin(grid, "", twin.source or self.real(q), node)

    def bounds(self, node: Node) -> tuple[np.ndarray | None, np.ndarray | None] | None:
        """What a node clips its first input to; None where it is computed."""
        names = [*node.inputs[1:], "", ""]
        if not all(name in self.draft.constants for name in node.inputs[1:] if name):
            return None
        values = [np.asarray(self.draft.constants[n], np.float64) if n else None for n in names[:2]]
        if node.op == "Relu":
            return np.zeros(()), None
        if node.op in ("Max", "Min"):
            if len(node.inputs) != 2:
                return None
            return (values[0], None) if node.op == "Max" else (None, values[0])
        stated = [node.attrs.get(label) for label in ("min", "max")]
        low, high = (np.asarray(s, np.float64) if v is None and s is not None else v for v, s in zip(values, stated))
        return low, high

    def move(self, node: Node) -> None:
        """Movement and maxima of integers on one grid per tensor."""
        op, draft = lookup(node), self.draft
        data = [n for i, n in enumerate(node.inputs) if n and not op.is_static(i)]
        twins = [self.found[n] for n in data if n in self.found]
        first = twins[0] if twins else None
        if first is None or (first.grid.affine is not None and first.grid.affine.axis is not None):
            return
        if not all(n in self.found or n in draft.constants for n in data) or any(
            not _same(t.grid, first.grid) for t in twins
        ):
            return
        if any(draft.types[name].dtype != draft.types[data[0]].dtype for name in node.outputs if name):
            return  # MaxPool with indices
        names = {n: self.real(n) if n in self.found else self.decoded(node, n, first.grid) for n in data}
        inputs = [names.get(name, name) for name in node.inputs]
        if node.op == "Pad" and not "".join(node.inputs[2:3]):  # absent: the integer 0
            inputs[2:3] = [self.decoded(node, "", first.grid)]
        outs = [draft.fresh(f"{name}/real") if name else "" for name in node.outputs]
        between = node.op in ("Resize", "Upsample") and interpolates(node)
        if between and draft.types[data[0]].dtype.kind != "u":
            return  # cut off toward the integer 0, which need not stand for the real one
        draft.write(replace(node, inputs=tuple(inputs), outputs=tuple(outs)))
        for q, real in zip(node.outputs, outs):
            if q:
                cut = replace(first.grid, rounding="FLOOR")
                self.found[q] = Twin(cut, "", real, node) if between else Twin(first.grid, real, "", node)

    def decoded(self, node: Node, name: str, grid: Grid) -> str:
        """A known integer tensor as real values; the integer 0 without a name."""
        integers = self.draft.constants[name].astype(np.float64) if name else np.zeros(())
        value = ((integers - grid.zero_point) * grid.scale).reshape(integers.shape)
        return self.draft.constant(f"{node.outputs[0]}/{name or 'zero'}", value, np.dtype(np.float32))


def _same(a: Grid, b: Grid) -> bool:
    """Whether integers mean the same real values."""
    return all(x.shape == y.shape and np.array_equal(x, y) for x, y in ((a.scale, b.scale), (a.zero_point, b.zero_point)))
