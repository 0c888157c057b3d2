"""`export_qdq`: a quantized graph as an ONNX model with QuantizeLinear and DequantizeLinear nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, version_converter

from fheq.accumulators import makes_accumulator
from fheq.affine import Affine
from fheq.encodings import is_encoding
from fheq.errors import QuantizationError, UnsupportedError, describe
from fheq.forms import used_weight
from fheq.graph import Graph, Node, Port, TensorType
from fheq.integers import along_inputs, along_outputs, input_channels, operand_axis, operand_decoder, quantize_weight
from fheq.lower import check_complete
from fheq.onnx.accumulator_function import accumulator_call, accumulator_function
from fheq.onnx.attributes import schema_of
from fheq.plan import Plan, plan
from fheq.qparams import QParams
from fheq.stated_accumulators import DOMAIN
from fheq.steps import Linear, Step

OPSET = 21
_CONTAINERS = (np.uint8, np.int8, np.uint16, np.int16)
_ROUNDERS = {"FLOOR": "Floor", "CEIL": "Ceil", "HALF_EVEN": "Round"}


def export_qdq(graph: Graph, qparams: QParams) -> onnx.ModelProto:
    """The quantized model as ONNX, of opset 21, for one sample: it computes what `fake_quant` does.

    Activations get QuantizeLinear and DequantizeLinear, with the integers clipped between them where fewer are used than the
    container (8 or 16 bits) has; weights are integers and DequantizeLinear. Scales are written as float32, as `fit` makes
    them. QDQ has no word for accumulators: after each sum stands a function of the model, `fheq.Accumulator`, that rounds it
    as the circuit does, in plain ONNX, and states its range. `import_onnx` reads all of them back, so that `fit` and `lower`
    give the same program again, whatever their spec is.

    Args:
        graph: what `import_onnx` gives.
        qparams: what `fit` gives, every leaf concrete.

    Raises:
        QuantizationError: a quantizer has more than 16 bits, or a zero point that is not whole.
        UnsupportedError: a node without an ONNX form.
    """
    layout = plan(graph)
    check_complete(layout, qparams)
    return _Export(layout, qparams).model(graph)


class _Export:
    """Emits the nodes of a plan. Points have two forms: the raw one and, for steps and outputs, the quantized one."""

    def __init__(self, layout: Plan, qparams: QParams):
        self.layout, self.qparams = layout, qparams
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.made: dict[str, str] = {}  # tensor to the name of its quantized form
        self.ports = {port.name for port in (*layout.graph.inputs, *layout.graph.outputs)}
        self.producers = layout.graph.producers()
        self.types = {**(layout.client.types if layout.client is not None else {}), **layout.graph.types}

    def model(self, graph: Graph) -> onnx.ModelProto:
        layout = self.layout
        for port in layout.graph.inputs:
            if port.type.dtype.kind == "f":
                self.stated(port.name, self.qparams.tensors[port.name], port.type.shape, self.raw(port.name))
            else:
                self.emit("Identity", [port.name], self.raw(port.name))
        steps = {step.out: step for step in layout.steps}
        for node in layout.graph.nodes:
            self.node(node, steps.get(node.outputs[0]))
        for port in layout.graph.outputs:
            operand = layout.outputs.get(port.name)
            name = self.raw(port.name) if operand is None else self.read(port.name, operand.key)
            self.emit("Identity", [name], port.name)
        self.client(graph)
        # Import takes a first axis of 1 for the samples; any other has to be named.
        named = any(p.batch_axis for p in (*graph.inputs, *graph.outputs))

        def info(p: Port) -> onnx.ValueInfoProto:
            shape = tuple("N" if named and i == p.batch_axis else d for i, d in enumerate(p.type.shape))
            return helper.make_tensor_value_info(p.name, helper.np_dtype_to_tensor_dtype(p.type.dtype), shape)

        nodes = self.live({port.name for port in graph.outputs})
        used = {name for node in nodes for name in node.input}
        tensors = [numpy_helper.from_array(v, k) for k, v in self.constants.items() if k in used]
        ports = [info(p) for p in graph.inputs], [info(p) for p in graph.outputs]
        proto = helper.make_graph(nodes, "quantized", *ports, tensors)
        imports = [helper.make_opsetid("", OPSET)]
        if all(node.domain != DOMAIN for node in nodes):
            return helper.make_model(proto, opset_imports=imports, ir_version=10)
        imports.append(helper.make_opsetid(DOMAIN, 1))
        return helper.make_model(proto, opset_imports=imports, ir_version=10, functions=[accumulator_function()])

    def client(self, graph: Graph) -> None:
        """What the client computes, in floating point."""
        for node in self.layout.client.nodes if self.layout.client is not None else ():
            if node.domain:
                raise UnsupportedError(f"{describe(node)}: operators of {node.domain} have no place in a QDQ model")
            for name in node.inputs:
                if name in graph.constants:
                    self.constant(name, graph.constants[name])
            self.copy(node, list(node.inputs), list(node.outputs))

    def live(self, wanted: set[str]) -> list[onnx.NodeProto]:
        kept = []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                wanted.update(node.input)
                kept.append(node)
        return kept[::-1]

    def emit(self, op: str, inputs: list[str], out: str, **attrs: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [out], name=f"{out}/{op}", **attrs))
        return out

    def constant(self, name: str, value: Any) -> str:
        self.constants[name] = np.asarray(value)
        return name

    def raw(self, tensor: str) -> str:
        """The name of a tensor as its own node makes it."""
        if tensor in self.layout.graph.constants:
            return self.constant(tensor, self.layout.graph.constants[tensor])
        return f"{tensor}/raw" if tensor in self.ports else tensor

    def read(self, tensor: str, key: str) -> str:
        """The quantized form of a tensor that holds the integers of `key`, moved."""
        if key not in self.layout.points or self.layout.graph.types[key].dtype.kind != "f":
            return self.raw(tensor)
        if tensor not in self.made:
            self.made[tensor] = f"{tensor}/quantized"
            if tensor == key:
                shape = self.layout.graph.types[key].shape
                self.pair(self.raw(key), self.qparams.tensors[key], shape, self.made[tensor])
            else:
                node = self.producers[tensor]
                inputs = [self.read(n, key) if n in self.layout.regions else self.raw(n) if n else "" for n in node.inputs]
                self.copy(node, inputs, [f"{o}/quantized" if o else "" for o in node.outputs])
        return self.made[tensor]

    # Nodes

    def node(self, node: Node, step: Step | None) -> None:
        inputs = [self.raw(name) if name else "" for name in node.inputs]
        outputs = [self.raw(name) if name else "" for name in node.outputs]
        for operand in step.operands if step is not None else ():
            at = [i for i, name in enumerate(node.inputs) if name == operand.tensor]
            for i in at:
                inputs[i] = self.read(operand.tensor, operand.key)
        known = None
        if isinstance(step, Linear):
            position = list(node.inputs).index(step.weight_name)
            inputs[position] = self.weight(step, position)
            if node.op in ("Conv", "ConvTranspose", "Gemm") and len(inputs) > 2 and inputs[2]:
                node, inputs[2] = self.with_bias(node, inputs[2])
            known = self.known_channels(step)
        varying = outputs[0] if known is None else f"{outputs[0]}/varying"
        made = step is not None and makes_accumulator(step)
        results = [f"{varying}/sum" if made else varying, *outputs[1:]]
        if node.domain == "fheq":
            self.own(node, inputs, results[0])
        else:
            self.copy(node, inputs, results)
        if step is not None and made:
            call, leaves = accumulator_call(self.layout, self.qparams, step, known, results[0], varying)
            self.nodes.append(call)
            self.constants.update(leaves)
        if known is not None:
            self.emit("Add", [varying, self.constant(f"{outputs[0]}/known", known.astype(np.float32))], outputs[0])

    def with_bias(self, node: Node, name: str) -> tuple[Node, str]:
        """A linear node and its known bias, in a form that onnxruntime does not round to steps of the accumulator: twice the
        bias of a Gemm, which halves it; another one as integers in steps of powers of two, which are exactly itself."""
        value = self.constants[name]
        if node.op == "Gemm":
            node = replace(node, attrs={**node.attrs, "beta": node.attrs["beta"] / 2})
            return node, self.constant(f"{name}/doubled", 2 * value)
        significand, exponent = np.frexp(value.astype(np.float32))
        exponent = np.maximum(exponent, -100)
        integers = np.ldexp(significand, 24).astype(np.int32)
        steps = np.ldexp(np.float32(1), exponent - 24)
        names = [self.constant(f"{name}/{label}", v) for label, v in (("q", integers), ("scale", steps))]
        return node, self.emit("DequantizeLinear", names, f"{name}/real", axis=0)

    def own(self, node: Node, inputs: list[str], out: str) -> None:
        """Nodes of fheq's own domain."""
        if is_encoding(node):
            name, shape = node.outputs[0], self.layout.graph.types[node.outputs[0]].shape
            self.stated(node.inputs[0], self.qparams.tensors[name], shape, out)
            return
        if node.op == "Whole":
            self.emit("Cast", [self.emit("Round", inputs[:1], f"{out}/rounded")], out, to=TensorProto.INT32)
            return
        kind = self.layout.graph.types[node.outputs[0]]
        scale, zero, low, high = (self.constants[name] for name in inputs[1:5])
        axes = lambda v: np.reshape(v, (1,) * (len(kind.shape) - v.ndim) + v.shape)
        affine = self.layout.graph.pinned.get(node.outputs[0])
        mode = node.attrs["rounding_mode"]
        if mode == "ROUND" and affine is not None:
            self.pair(inputs[0], affine, kind.shape, out)
        else:
            self.rounded(inputs[0], mode, (axes(scale), axes(zero), axes(low), axes(high)), out)

    def stated(self, tensor: str, affine: Affine, shape: tuple[int, ...], out: str) -> None:
        """A tensor on the grid of a quantizer of any mode."""
        if affine.mode == "ROUND":
            self.pair(tensor, affine, shape, out)
            return
        a = affine.expanded(len(shape))
        leaves = (np.asarray(v, np.float32) for v in (a.scale, a.zero_point, a.qmin, a.qmax))
        self.rounded(tensor, affine.mode, tuple(leaves), out)

    def rounded(self, tensor: str, mode: str, leaves: tuple[np.ndarray, ...], out: str) -> None:
        """A quantizer whose mode QuantizeLinear does not have."""
        scale, zero, low, high = (
            self.constant(f"{out}/{label}", value) for label, value in zip(("scale", "zero", "low", "high"), leaves)
        )
        if mode == "SIGN":
            above = self.emit("GreaterOrEqual", [tensor, self.constant(f"{out}/none", np.float32(0))], f"{out}/above")
            self.emit("Where", [above, scale, self.constant(f"{out}/below", -leaves[0])], out)
            return
        if mode not in _ROUNDERS:
            raise UnsupportedError(f"quantizer of {out!r}: QDQ has no form for the rounding mode {mode}; use ROUND")
        steps = self.emit("Add", [self.emit("Div", [tensor, scale], f"{out}/steps"), zero], f"{out}/moved")
        q = self.emit(_ROUNDERS[mode], [steps], f"{out}/whole")
        q = self.emit("Min", [self.emit("Max", [q, low], f"{out}/not_below"), high], f"{out}/integers")
        self.emit("Mul", [self.emit("Sub", [q, zero], f"{out}/centred"), scale], out)

    def copy(self, node: Node, inputs: list[str], outputs: list[str]) -> None:
        """A node in the opset of the export; converted where its operator has changed since its own."""
        attrs = {k: _attribute(v) for k, v in node.attrs.items() if v is not None}
        proto = helper.make_node(node.op, inputs, outputs, name=outputs[0], domain=node.domain, **attrs)
        then, now = (schema_of(node.op, version, node.domain) for version in (node.version, OPSET))
        if then is None or now is None:
            raise UnsupportedError(f"{describe(node)}: {node.op} is no operator of ONNX' opset {OPSET}")
        if then.since_version == now.since_version:
            self.nodes.append(proto)
        else:
            self.nodes += self.converted(node, proto)

    def converted(self, node: Node, proto: onnx.NodeProto) -> list[onnx.NodeProto]:
        """A node of an older opset, by ONNX' version converter."""
        types = self.types
        kinds = [(name, types[n]) for name, n in zip(proto.input, node.inputs) if name and name not in self.constants]
        results = [(name, types[n]) for name, n in zip(proto.output, node.outputs) if name]
        known = [numpy_helper.from_array(self.constants[n], n) for n in proto.input if n in self.constants]
        ports = ([_info(*k) for k in dict(kinds).items()], [_info(*k) for k in results])
        small = helper.make_graph([proto], "node", *ports, known)
        made = helper.make_model(small, opset_imports=[helper.make_opsetid("", node.version)])
        new = version_converter.convert_version(made, OPSET).graph
        taken = {name for name, _ in kinds} | {name for name, _ in results} | set(self.constants)
        for tensor in new.initializer:
            if tensor.name not in self.constants:
                self.constants[f"{proto.name}/{tensor.name}"] = numpy_helper.to_array(tensor)
        for part in new.node:
            for names in (part.input, part.output):
                for i, name in enumerate(names):
                    names[i] = name if not name or name in taken else f"{proto.name}/{name}"
        return list(new.node)

    # Quantizers

    def pair(self, source: str, affine: Affine, shape: tuple[int, ...], out: str) -> None:
        """QuantizeLinear and DequantizeLinear, with a clip between them where the container has more integers.

        The integers are unsigned, and of 16 bits where scales differ by channel: onnxruntime rewrites signed ones and fuses
        those of 8 bits, and fails at what it has made.
        """
        zero = np.asarray(affine.zero_point)
        moved = -np.minimum(np.min(affine.qmin), np.min(zero))
        affine = replace(affine, zero_point=zero + moved, qmin=affine.qmin + moved, qmax=affine.qmax + moved)
        low, high, zero = (np.asarray(v, np.float64) for v in (affine.qmin, affine.qmax, affine.zero_point))
        several = affine.axis is not None and np.size(affine.scale) > 1
        dtype = np.uint16 if several else _container(out, 0.0, float(max(high.max(), zero.max())))
        names, axis = self.parameters(out, affine, dtype, len(shape))
        q = self.emit("QuantizeLinear", [source, *names], f"{out}/q", **axis)
        limits = np.iinfo(dtype)
        if np.all(low == limits.min) and np.all(high == limits.max):
            clipped = q
        elif limits.bits == 8 and low.min() == low.max() and high.min() == high.max():
            bounds = [self.constant(f"{out}/{n}", dtype(v.min())) for n, v in (("low", low), ("high", high))]
            clipped = self.emit("Clip", [q, *bounds], f"{out}/clipped")
        else:  # onnxruntime compares per channel in 32 bits alone
            expanded = affine.expanded(len(shape))
            ends = [np.asarray(v).astype(np.int32) for v in (expanded.qmin, expanded.qmax)]
            wide = self.emit("Cast", [q], f"{out}/wide", to=TensorProto.INT32)
            wide = self.emit("Max", [wide, self.constant(f"{out}/low", ends[0])], f"{out}/not_below")
            wide = self.emit("Min", [wide, self.constant(f"{out}/high", ends[1])], f"{out}/within")
            kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
            clipped = self.emit("Cast", [wide], f"{out}/clipped", to=kind)
        self.emit("DequantizeLinear", [clipped, *names], out, **axis)

    def parameters(self, out: str, affine: Affine, dtype: Any, ndim: int) -> tuple[list[str], dict[str, int]]:
        """Names of the scale and zero point, and the axis."""
        scale, zero = np.asarray(affine.scale, np.float32), np.asarray(affine.zero_point)
        scale, zero = np.broadcast_arrays(scale, zero)
        if np.any(zero != np.round(zero)):
            raise QuantizationError(f"quantizer of {out!r}: its zero point is not whole, so QDQ cannot state it")
        axis = {"axis": affine.axis % ndim} if affine.axis is not None and scale.ndim else {}
        parts = (("scale", scale), ("zero_point", zero.astype(dtype)))
        return [self.constant(f"{out}/{label}", np.ascontiguousarray(v)) for label, v in parts], axis

    def weight(self, step: Linear, position: int) -> str:
        """A weight as the model stores it: integers, DequantizeLinear, and the scales of the input's channels undone."""
        name, node = step.weight_name, step.node
        affine = self.qparams.weights[name]
        shape = self.layout.graph.constants[name].shape
        place = used_weight(node, position, np.arange(int(np.prod(shape))).reshape(shape))

        def stored(used: Any) -> np.ndarray:
            values = np.empty(int(np.prod(shape)))
            values[place.ravel()] = np.broadcast_to(np.asarray(used, np.float64), step.weight.shape).ravel()
            return values.reshape(shape)

        found = quantize_weight(self.layout, self.qparams, step)
        expanded = affine.expanded(step.weight.ndim)
        ratio = stored(along_inputs(step, np.where(found.ratio == 0, 1.0, found.ratio)))
        alpha = node.attrs.get("alpha", 1.0) if node.op == "Gemm" else 1.0
        integers = stored(np.round(found.integers)) * np.sign(alpha * ratio)
        scale, zero = stored(expanded.scale) / abs(alpha), stored(expanded.zero_point)
        axis = next((a for a in (None, *range(len(shape))) if _varies_along(scale, a) and _varies_along(zero, a)), -1)
        if axis == -1 or np.any(alpha * ratio < 0):
            zero = np.zeros_like(zero)
        axis = next((a for a in (None, *range(len(shape))) if _varies_along(scale, a)), -1)
        q = integers + zero
        dtype = _container(name, float(min(q.min(), zero.min())), float(max(q.max(), zero.max())))
        values = self.constant(f"{name}/q", q.astype(dtype))
        factor = np.abs(ratio)
        if axis == -1:  # channels along several stored axes
            factor, scale, axis = factor / scale, np.ones_like(scale), None
        none = np.zeros(())
        channel = None if axis is None else axis - len(shape)
        plain = Affine(_along(scale, axis), _along(zero, axis), none, none, none, channel)
        names, at = self.parameters(f"{name}/real", plain, dtype, len(shape))
        real = self.emit("DequantizeLinear", [values, *names], f"{name}/real", **at)
        if np.all(factor == 1):
            return real
        return self.emit("Div", [real, self.constant(f"{name}/ratio", factor.astype(np.float32))], f"{name}/scaled")

    def known_channels(self, step: Linear) -> np.ndarray | None:
        """What input channels of known values add to a step's result; None for nothing."""
        x = operand_decoder(self.layout, self.qparams, step.x, operand_axis(step))
        _, ratio, offset = input_channels(step, x)
        known = np.where(ratio == 0, offset, 0)
        if not np.any(known):
            return None
        if step.weight.ndim > 2 and step.form != "conv":
            raise UnsupportedError(f"{describe(step.node)}: constant channels before stacked matrices have no QDQ form")
        contribution = step.weight * along_inputs(step, known)
        axes = tuple(a for a in range(step.weight.ndim) if a != step.weight_axis % step.weight.ndim)
        return np.asarray(along_outputs(step, contribution.sum(axis=axes)))


def _container(name: str, low: float, high: float) -> Any:
    for dtype in _CONTAINERS:
        if np.iinfo(dtype).min <= low and high <= np.iinfo(dtype).max:
            return dtype
    raise QuantizationError(f"quantizer of {name!r}: integers or a zero point from {low:g} to {high:g} do not fit 16 bits")


def _varies_along(values: np.ndarray, axis: int | None) -> bool:
    """Whether values vary along one axis at most."""
    return bool(np.all(values == values[tuple(slice(None) if a == axis else slice(0, 1) for a in range(values.ndim))]))


def _along(values: np.ndarray, axis: int | None) -> np.ndarray:
    if axis is None:
        return values.reshape(-1)[0]
    return np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)[:, 0]


def _attribute(value: Any) -> Any:
    return (
        numpy_helper.from_array(value)
        if isinstance(value, np.ndarray)
        else list(value)
        if isinstance(value, tuple)
        else value
    )


def _info(name: str, kind: TensorType) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(kind.dtype), kind.shape)
