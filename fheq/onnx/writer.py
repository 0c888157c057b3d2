"""`Writer`: the nodes and constants of an ONNX model while it is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper, version_converter

from fheq.errors import UnsupportedError
from fheq.estimators.features import without_strings
from fheq.graph import Node, Port, TensorType, describe
from fheq.onnx.attributes import schema_of
from fheq.stated.grids import DOMAIN

OPSET = 21


class Writer:
    """Collects the nodes and constants of a model of opset 21.

    Args:
        types: of the tensors that copied nodes read and make.
    """

    def __init__(self, types: Mapping[str, TensorType]):
        self.types = types
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}
        self.opsets: dict[str, int] = {"": OPSET}

    def emit(self, op: str, inputs: list[str], out: str, **attrs: Any) -> str:
        """Adds a node of one output, of the domain among its attributes; gives the output's name."""
        self.opsets.setdefault(attrs.get("domain", ""), 1)
        self.nodes.append(helper.make_node(op, inputs, [out], name=f"{out}/{op}", **attrs))
        return out

    def constant(self, name: str, value: Any) -> str:
        """Adds a known tensor; gives its name."""
        self.constants[name] = np.asarray(value)
        return name

    def copy(self, node: Node, inputs: list[str], outputs: list[str]) -> None:
        """Adds a node of a graph in the opset that is written, converted where its operator has changed since its own.

        Operators of another domain get the latest opset that one of them has; those of fheq's own are functions of the
        model. What fheq notes on a node beside its attributes is left out.

        Raises:
            UnsupportedError: the opset has no such operator.
        """
        if node.domain == DOMAIN:
            attrs = {name: _attribute(value) for name, value in node.attrs.items()}
            self.nodes.append(helper.make_node(node.op, inputs, outputs, name=outputs[0], domain=DOMAIN, **attrs))
            return
        if (node.domain, node.op) in (("ai.onnx.ml", "LabelEncoder"), ("ai.onnx.ml", "CategoryMapper")):
            node = without_strings(node)
        opset = self.opsets[node.domain] = OPSET if not node.domain else max(node.version, self.opsets.get(node.domain, 1))
        then, now = (schema_of(node.op, version, node.domain) for version in (node.version, opset))
        if then is None or now is None or (node.domain and then.since_version != now.since_version):
            where = f"the opset {opset} of {node.domain}" if node.domain else f"ONNX' opset {opset}"
            raise UnsupportedError(f"{describe(node)}: {node.op} is no operator of {where}, which a QDQ model is written in")
        attrs = {k: _attribute(v) for k, v in node.attrs.items() if v is not None and k in then.attributes}
        if node.op == "Cast":
            attrs["to"] = helper.np_dtype_to_tensor_dtype(self.types[node.outputs[0]].dtype)
        proto = helper.make_node(node.op, inputs, outputs, name=outputs[0], domain=node.domain, **attrs)
        if then.since_version == now.since_version:
            self.nodes.append(proto)
        else:
            self.nodes += self._converted(node, proto)

    def _converted(self, node: Node, proto: onnx.NodeProto) -> list[onnx.NodeProto]:
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

    def model(
        self, inputs: Sequence[Port], outputs: Sequence[Port], functions: Sequence[onnx.FunctionProto] = ()
    ) -> onnx.ModelProto:
        """The model between some ports, without what no output depends on.

        Args:
            functions: those that nodes may call.

        Raises:
            UnsupportedError: a tensor of the model is named as what is written for another one.
        """
        # Import takes a first axis of 1 for the samples; any other has to be named.
        named = any(p.batch_axis for p in (*inputs, *outputs))

        def info(p: Port) -> onnx.ValueInfoProto:
            shape = tuple("N" if named and i == p.batch_axis else d for i, d in enumerate(p.type.shape))
            return helper.make_tensor_value_info(p.name, helper.np_dtype_to_tensor_dtype(p.type.dtype), shape)

        nodes = self._live({port.name for port in outputs})
        made = [*self.constants, *(p.name for p in inputs), *(name for node in self.nodes for name in node.output if name)]
        for name in (name for name, count in Counter(made).items() if count > 1):
            other = name.rsplit("/", 1)[0]
            raise UnsupportedError(f"tensor {name!r} is named as what is written here for {other!r}: rename it")
        used = {name for node in nodes for name in node.input}
        tensors = [numpy_helper.from_array(v, k) for k, v in self.constants.items() if k in used]
        proto = helper.make_graph(nodes, "quantized", [info(p) for p in inputs], [info(p) for p in outputs], tensors)
        called = [f for f in functions if any((node.domain, node.op_type) == (f.domain, f.name) for node in nodes)]
        opsets = {d: v for d, v in self.opsets.items() if not d or any(node.domain == d for node in nodes)}
        imports = [helper.make_opsetid(d, v) for d, v in (opsets | {f.domain: 1 for f in called}).items()]
        return helper.make_model(proto, opset_imports=imports, ir_version=10, functions=called)

    def _live(self, wanted: set[str]) -> list[onnx.NodeProto]:
        """The nodes that some tensors depend on."""
        wanted, kept = set(wanted), []
        for node in reversed(self.nodes):
            if wanted & set(node.output):
                wanted.update(node.input)
                kept.append(node)
        return kept[::-1]


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
