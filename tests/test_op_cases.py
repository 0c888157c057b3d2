"""The op table on the operator cases of ONNX, over all the opsets that each row covers."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import defs, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests
from onnx.reference import ReferenceEvaluator

import fheq
from fheq.graph import Node
from fheq.ops import Op, find, rows

OLDEST = 7
NEWEST = defs.onnx_opset_version()

# Cases of ONNX that are not run: a pattern of their names, and the reason.
EXCLUDED = {
    r"FLOAT8|FLOAT4|e8m0|e4m3|e5m2|float4": "floats of 8 bits or less are not supported",
    r"training": "training mode is refused: it is random, or learns",
    r"equal_string": "strings are not supported",
    r"identity_sequence|identity_opt": "sequences and optionals are not supported",
    r"maxpool_with_argmax": "the Indices output of MaxPool is refused",
}


@dataclass(frozen=True)
class Case:
    """A model of one node with inputs and expected outputs (None: those of another runtime)."""

    name: str
    model: onnx.ModelProto
    inputs: Sequence[np.ndarray]
    outputs: Sequence[np.ndarray] | None
    rtol: float = 1e-3
    atol: float = 1e-7

    @property
    def node(self) -> Node:
        """The node, without its attributes."""
        proto = self.model.graph.node[0]
        versions = {entry.domain: entry.version for entry in self.model.opset_import}
        return Node("", proto.op_type, tuple(proto.input), tuple(proto.output), {}, proto.domain, versions[proto.domain])


def _arrays(values: Sequence[Any]) -> list[Any]:
    return [numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else np.asarray(v) for v in values]


def _at_opset(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """The model with ai.onnx at another opset, its nodes as they are."""
    others = [entry for entry in model.opset_import if entry.domain]
    return helper.make_model(model.graph, opset_imports=[*others, helper.make_opsetid("", version)], ir_version=10)


@cache
def onnx_cases() -> tuple[Case, ...]:
    """The operator cases of the onnx package for operators with a row."""
    names = {(row.domain, row.name) for row in rows()}
    cases = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = load_model_tests(kind="node")
    for case in found:
        nodes = case.model.graph.node
        if len(nodes) != 1 or (nodes[0].domain, nodes[0].op_type) not in names:
            continue
        if any(re.search(pattern, case.name) for pattern in EXCLUDED):
            continue
        version = {entry.domain: entry.version for entry in case.model.opset_import}.get("", NEWEST)
        model = _at_opset(case.model, max(version, OLDEST))
        for i, (inputs, outputs) in enumerate(case.data_sets):
            name = f"{case.name.removeprefix('test_')}{f'-{i}' if i else ''}"
            cases.append(Case(name, model, _arrays(inputs), _arrays(outputs), case.rtol, case.atol))
    return tuple(cases)


def versions_of(name: str) -> list[int]:
    """The opsets from 7 on at which the schema of an ai.onnx operator changes, its first one included."""
    schemas = (s for s in defs.get_all_schemas_with_history() if s.name == name and not s.domain and not s.deprecated)
    return sorted({max(schema.since_version, OLDEST) for schema in schemas})


def schema_version(node: Node) -> int:
    """The opset from 7 on at which the schema of the node starts."""
    return max(v for v in versions_of(node.op) if v <= node.version)


def expected(model: onnx.ModelProto, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The outputs of onnxruntime, or of ONNX's reference for types and opsets that it lacks."""
    feed = dict(zip([value.name for value in model.graph.input], inputs))
    try:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return session.run(None, feed)
    except Exception:
        return ReferenceEvaluator(model).run(None, feed)


def older_cases() -> Iterator[Case]:
    """For each schema version without a case: the first case of the operator that is also valid there."""
    seen: dict[str, set[int]] = {}
    for case in onnx_cases():
        seen.setdefault(case.node.op, set()).add(schema_version(case.node) if not case.node.domain else 0)
    for name in sorted({row.name for row in rows() if not row.domain}):
        for version in set(versions_of(name)) - seen.get(name, set()):
            for case in onnx_cases():
                model = _at_opset(case.model, version)
                if case.node.op == name and _is_valid(model):
                    yield Case(f"{case.name}-opset{version}", model, case.inputs, None)
                    break


def _is_valid(model: onnx.ModelProto) -> bool:
    try:
        onnx.checker.check_model(model, full_check=True)
    except Exception:
        return False
    return True
