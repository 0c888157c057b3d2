"""From a graph and its quantizers to an integer program, in float64 on the host."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fheq.affine import Affine, bit_length, validate
from fheq.client.one_hot import Code
from fheq.emit import Emitter
from fheq.errors import QuantizationError
from fheq.fitting.accumulators import whole_shift
from fheq.graph import Graph, Port, TensorType
from fheq.integers.accumulator_decoders import accumulator_decoder, multipliers, summands
from fheq.integers.alignment import check_alignment
from fheq.integers.bounds import Bounds, channel_bounds, range_bits, worst_case
from fheq.integers.decoders import Decoder, key_decoder, offset_with_fillers, operand_axis, operand_decoder
from fheq.integers.integer_weights import lacking, quantize_weight
from fheq.optimizer.leveled import WIDEST_CAST
from fheq.passes import merge_tables, narrow_wide, read_in_blocks, simplify
from fheq.planning.granularity import channel_axis, first_of_channel
from fheq.planning.plan import Plan
from fheq.planning.quantizers import needed, plan_for
from fheq.program import Accumulator, Entry, IntProgram
from fheq.qparams import QParams, unsigned
from fheq.regions import in_float64
from fheq.spec import MAX_BITS
from fheq.steps import Add, Join, Linear, Maximum, Operand, Product, Step, Sum
from fheq.tables import tabulate

NOTHING = np.zeros(())
BIT = Affine(1.0, 0.0, 0.0, 1.0, 0.0)


def lower(graph: Graph, qparams: QParams) -> IntProgram:
    """Lowers a quantized graph to integers.

    Args:
        graph: what `import_onnx` gives.
        qparams: what `fit` gives, perhaps edited; every leaf concrete.

    Raises:
        QuantizationError: a quantizer is missing or breaks an invariant, named.
    """
    layout = checked(graph, qparams)
    qparams = unsigned(qparams)
    return narrow_wide(read_in_blocks(merge_tables(simplify(_Lowering(layout, qparams).program(graph)))))


def checked(graph: Graph, qparams: QParams) -> Plan:
    """The plan of a graph, each of whose quantizers is there and holds its invariants.

    Raises:
        QuantizationError: naming what is not, or the node that reads scales which it cannot undo.
    """
    layout = plan_for(graph, qparams)
    for part, names in needed(layout).items():
        for name in names:
            shape = layout.shape(name) if part != "weights" else None
            validate(getattr(qparams, part)[name], name, integral=part != "accumulators", shape=shape)
    check_alignment(layout, qparams)
    return layout


class _Lowering:
    """Emits the steps of a plan in order. `held` maps quantized tensors and accumulators to program values."""

    def __init__(self, layout: Plan, qparams: QParams):
        self.layout = layout
        self.qparams = qparams
        self.emit = Emitter()
        self.held: dict[str, str] = {}  # quantized tensors
        self.accs: dict[str, str] = {}  # accumulators, offset included
        self.decoders: dict[str, tuple[np.ndarray, np.ndarray]] = {}  # flat scale, offset of `accs` and quantized sources
        self.accumulators: dict[str, Accumulator] = {}
        self.inputs: dict[str, list[Entry]] = {}  # with the codes that the client encrypts of each
        self.known: dict[str, Decoder] = {}  # of quantized tensors, as they are found

    def program(self, graph: Graph) -> IntProgram:
        ports = {port.name: port for port in graph.inputs}
        for name in self.layout.inputs:
            encodes = self.layout.encoded.get(name, "")
            affine, port = self.qparams.tensors[name], replace(ports[encodes or name], name=name)
            value = self.emit.input(name, port.type.shape, int(np.max(affine.qmax)))
            self.inputs[name] = [Entry(port, value, affine, encodes)]
            self.hold(name, value)
        for step in self.layout.steps:
            self.step(step)
        outputs = tuple(self.output(port) for port in self.layout.graph.outputs)
        emitted = self.emit.finish([o.value for o in outputs])
        read = {a for i in emitted for a in i.args} | {o.value for o in outputs}
        inputs = [e for own in self.inputs.values() for e in own if len(own) == 1 or e.value in read]
        return IntProgram(tuple(inputs), outputs, emitted, self.emit.values, self.accumulators, self.layout.client)

    def hold(self, key: str, value: str) -> None:
        """Registers a quantized source (an input, a join or a maximum)."""
        self.held[key] = value
        if key not in self.layout.points:
            d = key_decoder(self.layout, self.qparams, key, self.known)
            self.decoders[key] = (d.scale.ravel(), d.offset.ravel())

    # Reading

    def quantized(self, key: str) -> str:
        """The program value of a quantized tensor, made by a table when first read."""
        if key not in self.held:
            self.held[key] = self.table(key)
        return self.held[key]

    def decoder(self, operand: Operand, axis: int | None = None) -> Decoder:
        return operand_decoder(self.layout, self.qparams, operand, axis, self.known)

    def read(self, operand: Operand, axis: int | None = None) -> str:
        """The program value of an operand."""
        value = self.quantized(operand.key)
        fill = np.where(operand.elements < 0, np.round(self.decoder(operand, axis).low.ravel()), 0).astype(np.int64)
        return self.emit.gather((value,), operand.elements, fill, operand.shape)

    def summand(self, operand: Operand) -> str:
        """The program value of what a sum reads."""
        if operand.key not in self.layout.summed:
            return self.read(operand)
        return self.emit.gather((self.accs[operand.key],), operand.elements, None, operand.shape)

    def table(self, point: str) -> str:
        """Emits the table of a point."""
        source = self.layout.points[point]
        scale, offset = self.decoders[source]
        affine = self.qparams.tensors[point]
        if source in self.accs:
            known = self.accumulators[source]
            value, lsbs, bits = self.accs[source], known.lsbs, known.bits - known.lsbs
        else:
            value, lsbs = self.held[source], 0
            bits = self.emit.values[value].bits
        if bits > MAX_BITS:
            raise QuantizationError(
                f"the table that makes {point!r} would read {bits} bits of {source!r}, and none reads more than {MAX_BITS}: "
                "narrow its [qmin, qmax], or remove low bits (lsbs)"
            )
        codes = np.arange(1 << bits, dtype=np.float64) * (1 << lsbs)
        found = tabulate(self.layout, point, affine, scale, offset, codes)
        shape = self.layout.shape(point)
        whole = len(found.source) == len(found.place)
        if whole:  # as many applications as elements: in the point's own shape
            source_of, group, at = found.source[found.place], found.group[found.place], shape
        else:
            source_of, group, at = found.source, found.group, (len(found.source),)
        if point in self.layout.encoded_ahead:
            out = self.ahead(point, source, source_of.reshape(at), group.reshape(at), found.table)
            return out if whole else self.emit.gather((out,), found.place, None, shape)
        moved = self.emit.gather((value,), source_of, np.zeros(len(source_of), np.int64), at)
        if source in self.accs:  # after the movement: concrete pays for a table between a rounding and an index
            moved = self.emit.round(moved, lsbs, self.accumulators[source].approximate)
        accumulator = source if source in self.accs else ""
        out = self.emit.lookup(moved, found.table, group.reshape(at), lsbs, bits, point, accumulator)
        return out if whole else self.emit.gather((out,), found.place, None, shape)

    def ahead(self, point: str, source: str, elements: np.ndarray, group: np.ndarray, table: np.ndarray) -> str:
        """Declares what the client encrypts of an input in place of its integers."""
        given = self.inputs[source][0]
        model = replace(given.port, name=given.encodes or given.name)
        code = Code(model, given.affine, np.maximum(elements, 0), group, table)  # what is known is so of any element
        port = Port(point, TensorType(elements.shape, np.dtype(np.int64)), None)
        out = self.emit.input(point, elements.shape, 1)
        self.inputs[source].append(Entry(port, out, BIT, model.name, code))
        return out

    # Steps

    def step(self, step: Step) -> None:
        if isinstance(step, Join):
            self.hold(step.out, self.join(step))
        elif isinstance(step, Maximum):
            self.hold(step.out, self.maximum(step))
        elif isinstance(step, Linear):
            self.finish(step, *self.linear(step))
        elif isinstance(step, Sum):
            x = self.emit.gather((self.quantized(step.x.key),), step.x.elements, None, step.x.shape)  # fillers add nothing
            self.finish(step, self.emit.sum_last(x))
        elif isinstance(step, Add):
            self.finish(step, self.add(step))
        else:
            assert isinstance(step, Product)
            self.finish(step, self.product(step))

    def finish(self, step: Step, value: str, missing: np.ndarray = NOTHING) -> None:
        """Adds the offset that brings an accumulator's range to start at 0, and what its integers lack.

        What a sum reads needs no such range.
        """
        if step.out in self.layout.summed:
            self.accs[step.out] = self.emit.shift(value, missing.astype(np.int64)) if np.any(missing) else value
            return
        affine = self.qparams.accumulators[step.out]
        scale, offset = (np.broadcast_to(v, step.shape) for v in accumulator_decoder(self.layout, self.qparams, step))
        worst = worst_case(self.layout, self.qparams, step)
        axis = channel_axis(self.layout, step.out)
        shift = whole_shift(self.layout, step, affine, scale, offset)
        bits = range_bits(affine, first_of_channel(scale, axis).ravel())
        lsbs = int(np.max(affine.lsbs))
        shift = shift + _inwards(step, worst, shift, bits, 1 << lsbs)
        low, high = int(np.min(worst.low + shift)), int(np.max(worst.high + shift))
        wraps = low < 0 or high + ((1 << lsbs) >> 1) > (1 << bits) - 1
        narrowed = not self.decoded(step.out) and (lsbs > 0 or bits <= WIDEST_CAST)
        shifted = self.emit.offset(value, (shift + missing).astype(np.int64), bits, narrowed)
        shifted = self.emit.gather((shifted,), np.arange(int(np.prod(step.shape))), None, step.shape)
        self.accs[step.out] = shifted
        self.decoders[step.out] = (scale.ravel(), (offset - scale * shift).ravel())
        span = channel_bounds(worst, axis)
        worst_bits = bit_length(np.max(span.high - span.low))
        approximate = affine.rounding == "approximate"
        self.accumulators[step.out] = Accumulator(worst_bits, bits, low, high, lsbs, approximate, wraps)

    def decoded(self, source: str) -> bool:
        """Whether an output holds the integers of an accumulator themselves."""
        plain = [name for name, operand in self.layout.outputs.items() if operand is None]
        return any(self.layout.regions[name].source == source for name in plain)

    def linear(self, step: Linear) -> tuple[str, np.ndarray]:
        """The product of a step, and what it lacks (see `lacking`)."""
        x = self.read(step.x, operand_axis(step))
        weight = np.asarray(quantize_weight(self.layout, self.qparams, step).integers).round().astype(np.int64)
        missing = lacking(step, self.decoder(step.x, operand_axis(step)), weight)
        if step.form == "conv":
            return self.emit.convolution(x, weight, step.options), missing
        product = self.emit.matmul(x, weight, step.form == "left")
        if "exclusive" in step.options:
            self.emit.bound(product, *worst_case(self.layout, self.qparams, step))
        return product, missing

    def add(self, step: Add) -> str:
        m, n, _ = multipliers(self.layout, self.qparams, step, *summands(self.layout, self.qparams, step))
        left = self.emit.scale(self.summand(step.a), m.astype(np.int64))
        right = self.emit.scale(self.summand(step.b), n.astype(np.int64))
        return self.emit.plus(left, right, step.sign)

    def product(self, step: Product) -> str:
        """`a b = floor((a + b)^2 / 4) - floor((a - b)^2 / 4)`: two tables on sums, exact for integers.

        A product with a bit takes one table as wide, on the other number and the bit above it.
        """
        a, b = map(self.decoder, step.operands)
        p, r = (np.round(d.offset / d.scale).astype(np.int64) for d in (a, b))
        x, y = self.read(step.a), self.read(step.b)
        name = step.node.name or step.out
        for number, bit, numbers in ((x, y, (p, r)), (y, x, (r, p))):
            if self.emit.values[bit].high <= 1:
                chosen = self.emit.chosen(number, bit, *numbers, name)
                return self.emit.sum_last(chosen) if step.contract else chosen
        top = self.emit.values[y].high
        plus = self.emit.squares(self.emit.plus(x, y, 1), p + r, name)
        difference = self.emit.shift(self.emit.plus(x, y, -1), np.asarray(top))
        minus = self.emit.squares(difference, p - r - top, name)
        if step.contract:
            plus, minus = self.emit.sum_last(plus), self.emit.sum_last(minus)
        return self.emit.plus(plus, minus, -1)

    def maximum(self, step: Maximum) -> str:
        """A tree of `max(a, b) = relu(a - b) + b`: one table per comparison."""
        parts = [(self.read(x), x.shape[-1]) for x in step.xs]
        value = parts[0][0] if len(parts) == 1 else self.emit.stack_last([v for v, _ in parts], step.shape)
        return self.emit.tree(value, step.shape, sum(k for _, k in parts), step.sign, step.node.name or step.out)

    def join(self, step: Join) -> str:
        values = tuple(self.read(piece) for piece in step.pieces)
        starts = np.concatenate([[0], np.cumsum([len(p.elements) for p in step.pieces])])
        index = np.where(step.which < 0, -1, starts[np.maximum(step.which, 0)] + step.element)
        return self.emit.gather(values, index, np.zeros(len(index), np.int64), step.shape)

    # Outputs

    def output(self, port) -> Entry:
        operand = self.layout.outputs.get(port.name)
        shape = port.type.shape
        if port.name not in self.layout.regions:
            raise QuantizationError(f"output {port.name!r} does not depend on the inputs: drop it from the model")
        if operand is not None:
            d = self.decoder(operand)
            return self.entry(port, self.read(operand), d.scale.ravel(), offset_with_fillers(operand, d).ravel())
        region = self.layout.regions[port.name]
        scale, offset = self.decoders[region.source]
        source = self.accs.get(region.source) or self.held[region.source]
        elements = region.elements
        at = np.maximum(elements, 0)
        ends = [self.affine_output(port.name, scale[at] * v + offset[at]) for v in (0.0, 1.0)]
        slope = np.where(elements < 0, 0.0, ends[1] - ends[0])
        value = self.emit.gather((source,), elements, np.zeros(len(elements), np.int64), shape)
        value = self.emit.orient(value, np.sign(slope).astype(np.int64).reshape(shape))
        top = self.emit.values[source].high
        known = self.accumulators.get(region.source)
        if known is not None and known.lsbs and region.source not in self.layout.points.values():
            value = self.emit.round(value, known.lsbs, known.approximate)
            top += 1  # rounded half up, 2^bits - 1 - q is 2^bits less the rounded q
        size = np.where(slope == 0, 1.0, np.abs(slope))
        # A flipped element is top - q, so its decoder starts at the other end.
        return self.entry(port, value, size, ends[0] + slope * np.where(slope < 0, top, 0))

    def affine_output(self, name: str, real: np.ndarray) -> np.ndarray:
        """The output's elements when its source elements have the given real values (aligned with the output)."""
        size = int(np.prod(self.layout.shape(name)))
        elements = self.layout.regions[name].elements
        lookup = np.zeros(int(max(elements.max(), 0)) + 1)
        lookup[np.maximum(elements, 0)] = real
        source = lambda _, need: lookup[np.maximum(need, 0)][:, None]
        return in_float64(lambda: self.layout.elements.evaluate(name, np.arange(size), source)).astype(np.float64).ravel()

    def entry(self, port, value: str, scale: np.ndarray, offset: np.ndarray) -> Entry:
        shape = port.type.shape
        scale, offset = scale.reshape(shape), offset.reshape(shape)
        axis, scale, zero_point = _compact(scale, -offset / scale)
        top = np.full_like(scale, self.emit.values[value].high)
        return Entry(port, value, Affine(scale, zero_point, top * 0, top, top * 0, axis))


def _inwards(step: Step, worst: Bounds, shift: np.ndarray, bits: int, cell: int) -> np.ndarray:
    """What is added to the shift of elements that are out of an accumulator's range whatever the inputs, as what a mask
    hides is, or may be by the fillers they add, but need not: whole cells. Where they lie is known, whatever is added."""
    low, high = worst.low + shift, worst.high + shift
    top = (1 << bits) - 1 - (cell >> 1)
    filled = [operand.elements.reshape(step.shape) < 0 for operand in step.operands] if isinstance(step, Add) else [False]
    within = np.any(filled, axis=0) & (np.ceil((high - low) / cell) * cell <= top)
    moved = np.ceil(np.maximum(-low, 0) / cell) - np.ceil(np.maximum(high - top, 0) / cell)
    return np.where(within | (high < 0) | (low > top), moved * cell, 0)


def _compact(scale: np.ndarray, zero_point: np.ndarray) -> tuple[int | None, np.ndarray, np.ndarray]:
    """Arrays of a tensor's shape to `()`, or `(C,)` along an axis, where nothing is lost; else as they are."""
    both = np.stack([scale, zero_point])
    if both[0].size and np.all(both == both.reshape(2, -1)[:, :1].reshape(2, *(1,) * scale.ndim)):
        return None, scale.ravel()[0], zero_point.ravel()[0]
    for axis in range(scale.ndim):
        first = both[(slice(None), *(slice(None) if a == axis else slice(0, 1) for a in range(scale.ndim)))]
        if np.all(both == first):
            return axis - scale.ndim, first[0].ravel(), first[1].ravel()
    return None, scale, zero_point
