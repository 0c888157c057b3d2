"""The op table on the operator cases of ONNX, over all the opsets that each row covers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

import jax
import numpy as np
import onnx
import onnxruntime
import pytest
from jax.experimental import enable_x64
from onnx.reference import ReferenceEvaluator
from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors
from own_op_cases import own_cases, versions_of

import fheq
from benchmarks.op_cases import (
    EXCLUDED,
    PAGE,
    Case,
    assert_equal,
    at_opset,
    case_names,
    onnx_cases,
    page,
    with_known_inputs,
)
from fheq.graph import Node
from fheq.interpret import interpret
from fheq.ops import Kind, Op, find, rows

# What onnxruntime raises for types and opsets that it lacks.
LACKS = (ort_errors.Fail, ort_errors.InvalidGraph, ort_errors.InvalidArgument, ort_errors.NotImplemented)


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
    except LACKS:
        return ReferenceEvaluator(model).run(None, feed)


def older_cases() -> Iterator[Case]:
    """For each schema version without a case: the first case of the operator that is also valid there."""
    groups: dict[str, list[Case]] = {row.name: [] for row in rows() if not row.domain}
    for case in onnx_cases():
        if not case.node.domain and case.node.op in groups:
            groups[case.node.op].append(case)
    for name, cases in groups.items():
        covered = {schema_version(case.node) for case in cases}
        for version in (v for v in versions_of(name) if v not in covered):
            models = (at_opset(case.model, version) for case in cases)
            found = next(((case, model) for case, model in zip(cases, models) if _is_valid(model)), None)
            if found is not None:
                yield Case(f"{found[0].name}-opset{version}", found[1], found[0].inputs, None)


def _is_valid(model: onnx.ModelProto) -> bool:
    try:
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
        onnx.checker.check_model(model)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError):
        return False
    return True


ALL = (*onnx_cases(), *older_cases(), *(replace(case, name=f"{case.name}-{i}") for i, case in enumerate(own_cases())))
CASES = {case.name: case for case in ALL}


@pytest.fixture(scope="module", autouse=True)
def quick_compilation() -> Iterator[None]:
    """Each case compiles a program of its own and runs it once."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.parametrize("name", CASES)
def test_case(name: str) -> None:
    case = CASES[name]
    assert_equal(case, expected(case.model, case.inputs) if case.outputs is None else case.outputs)


MOVEMENTS = [row for row in rows() if row.kind is Kind.MOVEMENT]


@pytest.mark.parametrize("row", MOVEMENTS, ids=lambda row: f"{row.name}-{row.since}")
def test_movements_move_indices(row: Op) -> None:
    """A movement of the numbers of the elements (0 is the filler) says where each element goes."""
    case = next(c for c in CASES.values() if find(c.node) == row and "constant" not in c.name)
    model, inputs = with_known_inputs(case)
    graph = fheq.import_onnx(model)
    elements = np.concatenate([[0], *(x.ravel() for x in inputs)])
    ends = np.cumsum([1, *(x.size for x in inputs)])
    numbers = [np.arange(start, start + x.size).reshape(x.shape) for start, x in zip(ends, inputs)]
    names = [port.name for port in graph.inputs]
    with enable_x64():
        moved = interpret(graph, dict(zip(names, numbers)))
        wanted = interpret(graph, dict(zip(names, inputs)))
    for name, result in moved.items():
        assert result.dtype == np.int64
        np.testing.assert_array_equal(elements[np.asarray(result)], wanted[name])


def _key(row: Op) -> tuple[str, str, int]:
    return row.domain, row.name, row.since


def test_every_row_has_a_case() -> None:
    tested = {_key(row) for case in CASES.values() if (row := find(case.node))}
    missing = [_key(row) for row in rows() if _key(row) not in tested and row.domain != "fheq"]
    assert not missing


def test_every_opset_has_a_case() -> None:
    tested = {(case.node.op, schema_version(case.node)) for case in CASES.values() if not case.node.domain}
    names = {row.name for row in rows() if not row.domain}
    missing = [(name, v) for name in sorted(names) for v in versions_of(name) if (name, v) not in tested]
    assert not missing


def test_rows_start_where_their_schema_does() -> None:
    """No row claims an opset in which its operator has another schema, or begins later than the operator."""
    for row in rows():
        if not row.domain:
            assert row.since in versions_of(row.name), row
    for name in {row.name for row in rows() if not row.domain}:
        assert min(row.since for row in rows() if row.name == name) == versions_of(name)[0]


def test_exclusions_match() -> None:
    """The exclusions still exclude something."""
    names = [name for names in case_names().values() for name in names]
    assert [p for p in EXCLUDED if not any(re.search(p, name, re.IGNORECASE) for name in names)] == []


def test_page_lists_every_case() -> None:
    """It is made from the same cases, none of which fails."""
    assert PAGE.read_text(encoding="utf-8") == page({}), "run: python -m benchmarks.op_cases"
