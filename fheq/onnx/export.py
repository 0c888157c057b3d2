"""`export_qdq`: a quantized graph as an ONNX model with QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from fheq.affine import Affine
from fheq.client.encodings import is_encoding
from fheq.fitting.exact_steps import is_weighed
from fheq.graph import Graph, Node, Port, TensorType, is_float
from fheq.integers.accumulator_decoders import multipliers, summands, sums_accumulators
from fheq.lower import checked
from fheq.onnx.accumulator_function import accumulator_call, accumulator_function
from fheq.onnx.estimator_functions import estimator_functions
from fheq.onnx.quantizers import quantizer_functions, write_pair, write_quantizer, write_rounded
from fheq.onnx.samples import for_any_number
from fheq.onnx.weights import known_part, write_bias, write_weight
from fheq.onnx.writer import Writer
from fheq.origins import is_boolean
from fheq.planning.plan import Plan
from fheq.qparams import QParams
from fheq.steps import Add, Linear, Step, makes_accumulator

ML = "ai.onnx.ml"
WITH_DOMAINS = ("Acos", "Acosh", "Asin", "Atanh", "Div", "Log", "Mod", "Pow", "Reciprocal", "Sqrt")
TAKEN = 1e-6  # relative; scales are float32


def export_qdq(graph: Graph, qparams: QParams) -> onnx.ModelProto:
    """The quantized model as ONNX, of opset 21: it computes what `fake_quant` does.

    It takes any number of samples at once, as far as the plan keeps them apart, and one sample else.

    Activations get QuantizeLinear and DequantizeLinear, with the integers clipped between them where fewer are used than the
    container (8 or 16 bits) has; weights are integers and DequantizeLinear. Scales are written as float32, as `fit` makes
    them. QDQ has no word for accumulators: after each sum stands a function of the model, `fheq.Accumulator`, that rounds it
    as the circuit does, in plain ONNX, and states its range. `import_onnx` reads all of them back, so that `fit` and `lower`
    give the same program again, whatever their spec is. Outputs keep their names; one that is an input itself, NAME, becomes
    NAME/decrypted. Models of other precisions compute in float32.

    Args:
        graph: what `import_onnx` gives.
        qparams: what `fit` gives, every leaf concrete.

    Raises:
        QuantizationError: a quantizer has more than 16 bits, or a zero point that is not whole.
        UnsupportedError: a node without an ONNX form.
    """
    return _Export(checked(graph, qparams), qparams, graph.outputs).model(graph)


class _Export:
    """Writes the nodes of a plan. Points have two forms: the raw one and, for steps and outputs, the quantized one."""

    def __init__(self, layout: Plan, qparams: QParams, outputs: Sequence[Port]):
        self.layout, self.qparams = layout, qparams
        types = {**(layout.client.types if layout.client is not None else {}), **layout.graph.types}
        self.writer = Writer({name: TensorType(kind.shape, _computed_in(kind.dtype)) for name, kind in types.items()})
        self.made: dict[str, str] = {}  # tensor to the name of its quantized form
        self.sums: dict[str, str] = {}  # tensor to its name before any rounding
        self.given = {port.name: port for port in layout.graph.inputs}
        self.taken: dict[str, str] = {}  # inputs to what is quantized of them
        self.outputs = {port.name: port.type.dtype for port in outputs}
        self.ports = {*self.given} | {port.name for port in layout.graph.outputs}
        self.producers = layout.graph.producers()

    def model(self, graph: Graph) -> onnx.ModelProto:
        layout = self.layout
        for port in layout.graph.inputs:
            affine, name = self.qparams.tensors[port.name], port.name
            if is_float(port.type.dtype):
                write_quantizer(self.writer, self.given_in(name), affine, port.type.shape, self.raw(name))
            elif not is_weighed(layout, name) and np.all(affine.scale == 1):
                self.writer.emit("Identity", [name], self.raw(name))
            else:
                self.quantized(port.type, name, affine, self.raw(name))
        steps = {step.out: step for step in layout.steps}
        for node in layout.graph.nodes:
            self.node(node, steps.get(node.outputs[0]))
        for port in layout.graph.outputs:
            operand = layout.outputs.get(port.name)
            name = self.whole(port.name) if operand is None else self.read(port.name, operand.key)
            self.writer.emit("Identity", [name], self.inner(port.name))
        self.client(graph)
        outputs = [replace(port, name=self.output(port.name)) for port in graph.outputs]
        for port, stated in zip(graph.outputs, outputs):
            if self.inner(port.name) != stated.name:
                code = helper.np_dtype_to_tensor_dtype(port.type.dtype)
                self.writer.emit("Cast", [self.inner(port.name)], stated.name, to=code)
        functions = [accumulator_function(), *quantizer_functions(), *estimator_functions()]
        return for_any_number(self.writer.model(graph.inputs, outputs, functions), graph.inputs)

    def output(self, name: str) -> str:
        """The name of an output: another one where it is an input, which it holds quantized."""
        return f"{name}/decrypted" if name in self.given else name

    def inner(self, name: str) -> str:
        """The name of an output, or of what the client reads, as it is computed."""
        stated = self.outputs.get(name)
        return f"{name}/computed" if stated is not None and stated != _computed_in(stated) else self.output(name)

    def given_in(self, name: str) -> str:
        """An input in the precision that it is quantized in, with what stands for missing values."""
        port, kind = self.given[name], _computed_in(self.given[name].type.dtype)
        if name not in self.taken:
            self.taken[name] = name
            if kind != port.type.dtype:
                self.taken[name] = self.writer.emit(
                    "Cast", [name], f"{name}/given", to=helper.np_dtype_to_tensor_dtype(kind)
                )
            if port.missing is not None:
                known = [np.nan if v is None else v for v in port.missing]
                attrs: dict[str, Any] = {"imputed_value_floats": known, "replaced_value_float": np.nan}
                self.taken[name] = self.writer.emit("Imputer", [self.taken[name]], f"{name}/filled", **attrs, domain=ML)
        return self.taken[name]

    def client(self, graph: Graph) -> None:
        """What the client computes, in floating point."""
        if self.layout.client is not None:
            self.client_nodes(self.layout.client)
        for name in (port.name for port in graph.outputs if port.name in graph.constants):
            value = graph.constants[name]
            source = self.writer.constant(f"{name}/known", value.astype(_computed_in(value.dtype), copy=False))
            self.writer.emit("Identity", [source], self.inner(name))

    def client_nodes(self, client: Graph) -> None:
        for node in client.nodes:
            for name in node.inputs:
                if name in client.constants:
                    self.known(name, client.constants[name])
            inputs, outputs = ([self.inner(name) for name in names] for names in (node.inputs, node.outputs))
            self.copy(node, inputs, outputs, client)

    def known(self, name: str, value: np.ndarray) -> str:
        """Adds a known tensor of the model, in the precision that it is computed in."""
        return self.writer.constant(name, value.astype(_computed_in(value.dtype), copy=False))

    def raw(self, tensor: str) -> str:
        """The name of a tensor as its own node makes it."""
        if tensor in self.layout.graph.constants:
            return self.known(tensor, self.layout.graph.constants[tensor])
        return f"{tensor}/raw" if tensor in self.ports else tensor

    def whole(self, tensor: str) -> str:
        """A tensor that is decrypted, before any rounding; see `Plan.unrounded`."""
        if tensor not in self.layout.unrounded:
            return self.raw(tensor)
        if tensor not in self.sums:
            node = self.producers[tensor]
            self.sums.update({name: f"{name}/whole" for name in node.outputs if name})
            inputs = [self.whole(name) if name else "" for name in node.inputs]
            self.writer.copy(node, inputs, [self.sums.get(name, "") for name in node.outputs])
        return self.sums[tensor]

    def read(self, tensor: str, key: str) -> str:
        """The quantized form of a tensor that holds the integers of `key`, moved."""
        graph = self.layout.graph
        if key not in self.layout.points or is_boolean(graph, key) or self.in_ones(key):
            return self.raw(tensor)  # integers and decisions are what they are quantized to
        if tensor not in self.made:
            made = (tensor,) if tensor == key else self.producers[tensor].outputs
            self.made.update({name: f"{name}/quantized" for name in made})
            if tensor == key:
                source = self.number(key) if self.may_be_none(key) else self.raw(key)
                self.quantized(graph.types[key], source, self.qparams.tensors[key], self.made[tensor])
            else:
                node = self.producers[tensor]
                inputs = [self.read(n, key) if n in self.layout.regions else self.raw(n) if n else "" for n in node.inputs]
                self.writer.copy(node, inputs, [f"{o}/quantized" if o else "" for o in node.outputs])
        return self.made[tensor]

    def may_be_none(self, key: str) -> bool:
        """Whether a function that a point ends may leave its domain."""
        graph, sources, stack = self.layout.graph, {*self.layout.points.values()}, [key]
        while stack:
            name = stack.pop()
            node = self.producers.get(name)
            if name in sources or node is None:
                continue
            known = len(node.inputs) > 1 and node.inputs[1] in graph.constants  # a divisor, or an exponent
            if node.op in WITH_DOMAINS and not known and is_float(graph.types[key].dtype):
                return True
            stack += [n for n in node.inputs if n in self.layout.regions]
        return False

    def number(self, key: str) -> str:
        """A point with 0 for what is no number, as tables have it."""
        raw = self.raw(key)
        zero = self.writer.constant(f"{key}/none", np.zeros((), self.writer.types[key].dtype))
        return self.writer.emit("Where", [self.writer.emit("IsNaN", [raw], f"{key}/is_none"), zero, raw], f"{key}/number")

    def in_ones(self, key: str) -> bool:
        """Whether a point holds integers that are quantized in steps of 1."""
        return self.layout.graph.types[key].dtype.kind in "iu" and bool(np.all(self.qparams.tensors[key].scale == 1))

    def quantized(self, kind: TensorType, source: str, affine: Affine, out: str) -> None:
        """A tensor with its quantizer, whose steps are whole numbers where it holds integers."""
        if kind.dtype.kind not in "iu":
            write_pair(self.writer, source, affine, kind.shape, out)
            return
        real = self.writer.emit("Cast", [source], f"{source}/real", to=TensorProto.FLOAT)
        write_quantizer(self.writer, real, affine, kind.shape, f"{out}/rounded")
        self.writer.emit("Cast", [f"{out}/rounded"], out, to=helper.np_dtype_to_tensor_dtype(kind.dtype))

    def node(self, node: Node, step: Step | None) -> None:
        """A node on the quantized forms of what its step reads; a sum with its accumulator and what known channels add."""
        inputs = [self.raw(name) if name else "" for name in node.inputs]
        outputs = [self.raw(name) if name else "" for name in node.outputs]
        for operand in step.operands if step is not None else ():
            at = [i for i, name in enumerate(node.inputs) if name == operand.tensor]
            for i in at:
                inputs[i] = self.read(operand.tensor, operand.key)
        if isinstance(step, Add):
            inputs = self.summed(step, inputs)
        known = None
        if isinstance(step, Linear):
            position = list(node.inputs).index(step.weight_name)
            inputs[position] = write_weight(self.writer, self.layout, self.qparams, step, position)
            if node.op in ("Conv", "ConvTranspose", "Gemm") and len(inputs) > 2 and inputs[2]:
                node, inputs[2] = write_bias(self.writer, node, inputs[2])
            known = known_part(self.layout, self.qparams, step)
        varying = outputs[0] if known is None else f"{outputs[0]}/varying"
        made = step is not None and makes_accumulator(step)
        results = [f"{varying}/sum" if made else varying, *outputs[1:]]
        self.copy(node, inputs, results, self.layout.graph)
        if step is not None and made:
            call, leaves = accumulator_call(self.layout, self.qparams, step, known, results[0], varying)
            self.writer.nodes.append(call)
            self.writer.constants.update(leaves)
            self.sums[node.outputs[0]] = results[0]
        if known is not None:
            offset = self.writer.constant(f"{outputs[0]}/known", known.astype(np.float32))
            self.writer.emit("Add", [varying, offset], outputs[0])
            if node.outputs[0] in self.layout.unrounded:
                self.sums[node.outputs[0]] = self.writer.emit("Add", [results[0], offset], f"{outputs[0]}/whole")

    def summed(self, step: Add, inputs: list[str]) -> list[str]:
        """What a sum with accumulators takes for its inputs, where its whole multipliers miss a ratio of scales."""
        if not sums_accumulators(self.layout, step):
            return inputs
        parts = summands(self.layout, self.qparams, step)
        *times, unit = multipliers(self.layout, self.qparams, step, *parts)
        taken = []
        for i, (name, part, often) in enumerate(zip(inputs, parts, times)):
            known = [np.asarray(v, np.float32) for v in part.multiplied(often, unit)]
            if np.any(np.abs(known[0] - 1) > TAKEN):
                for op, label, value in zip(("Mul", "Add"), ("slope", "intercept"), known):
                    own = self.writer.constant(f"{step.out}/{label}_{i}", value)
                    name = self.writer.emit(op, [name, own], f"{step.out}/{label}_{i}/applied")
            taken.append(name)
        return taken

    def copy(self, node: Node, inputs: list[str], outputs: list[str], graph: Graph) -> None:
        """A node of a graph as it is, those of fheq's own domain in ONNX' operators."""
        if node.domain == "fheq":
            self.own(node, inputs, outputs[0], graph)
        else:
            self.writer.copy(node, inputs, outputs)

    def own(self, node: Node, inputs: list[str], out: str, graph: Graph) -> None:
        """Nodes of fheq's own domain."""
        writer, kind = self.writer, graph.types[node.outputs[0]]
        if is_encoding(node):
            write_quantizer(writer, self.given_in(node.inputs[0]), self.qparams.tensors[node.outputs[0]], kind.shape, out)
            return
        if node.op == "Whole":
            writer.emit("Cast", [writer.emit("Round", inputs[:1], f"{out}/rounded")], out, to=TensorProto.INT32)
            return
        if node.op != "FakeQuant":
            writer.copy(node, inputs, [out])
            return
        affine = graph.pinned.get(node.outputs[0])
        mode = node.attrs["rounding_mode"]
        if mode == "ROUND" and affine is not None:
            write_pair(writer, inputs[0], affine, kind.shape, out)
        else:
            axes = lambda v: np.reshape(v, (1,) * (len(kind.shape) - v.ndim) + v.shape)
            scale, zero, low, high = (axes(writer.constants[name]) for name in inputs[1:5])
            write_rounded(writer, inputs[0], mode, (scale, zero, low, high), out)


def _computed_in(dtype: np.dtype) -> np.dtype:
    """The type that stands for one in an exported model: QuantizeLinear does not take every precision."""
    return np.dtype(np.float32) if is_float(dtype) else dtype
