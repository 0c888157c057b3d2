"""ONNX's own operator cases: which ones fheq runs, and the page that says so.

`python -m benchmarks.op_cases [PAGE]` runs every case in float and rewrites the page (benchmarks/OPS.md).
"""

from __future__ import annotations

import re
import sys
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import onnx
from onnx import defs, helper, numpy_helper
from onnx.backend.test.loader import load_model_tests

import fheq
from fheq.errors import FheqError
from fheq.graph import Node
from fheq.onnx.qoperators import ONNX_RULES
from fheq.onnx.sequences import OPS as SEQUENCE_OPS
from fheq.onnx.subgraphs import CONTROL_FLOW
from fheq.ops import find
from fheq.ops.quantizers import QUANT_DOMAINS

OLDEST = 7
NEWEST = defs.onnx_opset_version()
PAGE = Path(__file__).parent / "OPS.md"

# A processor with half-precision arithmetic rounds after every operation of a function, one without it after the last;
# this many roundings apart is still the same value.
HALF_ROUNDINGS = 4

# Cases of ONNX that are not run: a pattern of their names, and the reason.
EXCLUDED = {
    r"float8|float4|e8m0|e4m3|e5m2": "floats of 8 bits or less are not supported",
    r"cast.*_to_u?int2|^test_quantizelinear_u?int2": "integers of 2 bits are not supported",
    r"BFLOAT16_to": "a tensor of bfloat16 must be an initializer, and these hold NaN, which is refused",
    r"training": "training mode is refused: it is random, or learns",
    r"maxpool_with_argmax": "the Indices output of MaxPool is refused",
    r"roialign_mode_max": "maxima of weighted pixels are refused",
    r"attention.*bf16": "bfloat16 products are rounded in another order than in the cases",
    r"test_bernoulli": "its result is random",
    r"dynamicquantizelinear": "its integers stand for the values themselves, for which calibration finds a static quantizer",
}


@dataclass(frozen=True)
class Case:
    """A model of one node, after those that hold its inputs in sequences, with inputs and expected outputs (None: those of
    another runtime)."""

    name: str
    model: onnx.ModelProto
    inputs: Sequence[np.ndarray]
    outputs: Sequence[np.ndarray] | None
    rtol: float = 1e-3
    atol: float = 1e-7

    @property
    def node(self) -> Node:
        """The node, without its attributes."""
        proto = self.model.graph.node[-1]
        versions = {entry.domain: entry.version for entry in self.model.opset_import}
        return Node("", proto.op_type, tuple(proto.input), tuple(proto.output), {}, proto.domain, versions[proto.domain])


def is_supported(node: Node) -> bool:
    """Whether the operator has a row, is unrolled or unpacked, or has a function of its schema that import can inline."""
    if find(node) is not None or (not node.domain and node.op in (*CONTROL_FLOW, *ONNX_RULES, *SEQUENCE_OPS)):
        return True
    if node.domain or not defs.has(node.op):
        return False
    schema = defs.get_schema(node.op, node.version)
    return schema.has_function or schema.has_context_dependent_function


def excluded(name: str) -> str:
    """Why a case of this name is not run; empty where it is."""
    return next((reason for pattern, reason in EXCLUDED.items() if re.search(pattern, name, re.IGNORECASE)), "")


def at_opset(model: onnx.ModelProto, version: int) -> onnx.ModelProto:
    """The model with ai.onnx at another opset, its nodes as they are."""
    others = [entry for entry in model.opset_import if entry.domain]
    return helper.make_model(model.graph, opset_imports=[*others, helper.make_opsetid("", version)], ir_version=10)


def _arrays(values: Sequence[Any]) -> list[Any]:
    """Arrays in place of tensors; the elements of sequences one by one, and nothing for an absent optional."""
    whole = [v for value in values for v in (value if isinstance(value, list) else [value]) if v is not None]
    return [numpy_helper.to_array(v) if isinstance(v, onnx.TensorProto) else np.asarray(v) for v in whole]


def with_tensors(model: onnx.ModelProto, values: Sequence[Any]) -> onnx.ModelProto:
    """The model with an input for each element of a sequence or optional, which nodes before its own put together."""
    if all(info.type.WhichOneof("value") == "tensor_type" for info in model.graph.input):
        return model
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.input[:], changed.graph.node[:]
    for info, value in zip(model.graph.input, values):
        parts, kind = _arrays([value]), info.type.WhichOneof("value")
        names = [info.name] if kind == "tensor_type" else [f"{info.name}/{i}" for i in range(len(parts))]
        changed.graph.input.extend(
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(part.dtype), part.shape)
            for name, part in zip(names, parts)
        )
        if kind == "tensor_type":
            continue
        empty = "SequenceEmpty" if kind == "sequence_type" else "Optional"
        full = "SequenceConstruct" if isinstance(value, list) else "Optional"
        changed.graph.node.append(helper.make_node(full if parts else empty, names, [info.name]))
    changed.graph.node.extend(model.graph.node)
    return changed


@cache
def node_cases() -> tuple[Any, ...]:
    """All operator cases of the onnx package; it takes many seconds to make them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuple(load_model_tests(kind="node"))


def _single() -> tuple[Any, ...]:
    """Those of one node; expansions of functions are left out."""
    return tuple(c for c in node_cases() if len(c.model.graph.node) == 1 and "_expanded" not in c.name)


@cache
def case_names() -> Mapping[str, tuple[str, ...]]:
    """Names of all cases by operator, with the domain unless that is ai.onnx."""
    names: dict[str, list[str]] = {}
    for case in _single():
        names.setdefault(_operator(case.model), []).append(case.name)
    return {op: tuple(names[op]) for op in sorted(names, key=lambda op: ("." in op, op))}


def _operator(model: onnx.ModelProto) -> str:
    node = model.graph.node[-1]
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


@cache
def onnx_cases() -> tuple[Case, ...]:
    """The cases of the onnx package that are run."""
    cases = []
    for case in _single():
        version = {entry.domain: entry.version for entry in case.model.opset_import}.get("", NEWEST)
        model = at_opset(case.model, max(version, OLDEST))
        if excluded(case.name) or not is_supported(Case("", model, [], None).node):
            continue
        for i, (inputs, outputs) in enumerate(case.data_sets):
            name = f"{case.name.removeprefix('test_')}{f'-{i}' if i else ''}"
            cases.append(Case(name, with_tensors(model, inputs), _arrays(inputs), _arrays(outputs), case.rtol, case.atol))
    return tuple(cases)


def with_known_inputs(case: Case, integers: bool = False) -> tuple[onnx.ModelProto, list[np.ndarray]]:
    """The model with inputs made initializers where they cannot be data, and the inputs that remain.

    Those are the inputs that a row needs to know, parameters of quantizers, empty tensors, types that numpy lacks, and all
    `integers` and booleans where asked for.
    """
    row = find(case.node)
    static = set() if row is None else {n for i, n in enumerate(case.node.inputs) if row.is_static(i)}
    if row is not None and row.domain in QUANT_DOMAINS:
        static.update(case.node.inputs[1:])
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    del model.graph.input[:]
    remaining = []
    for value, array in zip(case.model.graph.input, case.inputs):
        known = value.name in static or array.size == 0 or array.dtype.kind not in "biuf"
        if known or (integers and array.dtype.kind in "biu"):
            model.graph.initializer.append(numpy_helper.from_array(array, value.name))
        else:
            model.graph.input.append(value)
            remaining.append(array)
    return model, remaining


def results_of(case: Case) -> list[np.ndarray]:
    """What the float model gives; integers and conditions are known where an operator needs them to be."""
    model, inputs = with_known_inputs(case)
    try:
        graph = fheq.import_onnx(model)
    except FheqError:
        if find(case.node) is not None:
            raise
        model, inputs = with_known_inputs(case, integers=True)
        graph = fheq.import_onnx(model)
    results = fheq.evaluate(graph, *inputs)
    return [np.asarray(r) for r in (results if isinstance(results, tuple) else (results,))]


def assert_equal(case: Case, wanted: Sequence[np.ndarray]) -> None:
    """Runs a case and compares types, shapes and values."""
    results = results_of(case)
    assert len(results) == len(wanted)
    for got, want in zip(results, map(np.asarray, wanted)):
        assert got.shape == want.shape
        assert got.dtype == want.dtype or want.dtype.kind == "U"
        if want.dtype.kind in "OU":
            np.testing.assert_array_equal(got, want)
            continue
        if got.dtype.kind == "V":
            got, want = got.astype(np.float32), want.astype(np.float32)
        np.testing.assert_allclose(got, want, rtol=max(case.rtol, HALF_ROUNDINGS * _half_step(got)), atol=case.atol)


def _half_step(array: np.ndarray) -> float:
    """Relative distance of neighbours in half precision, 0 for other types."""
    return float(np.finfo(array.dtype).eps) if array.dtype == np.float16 else 0.0


def _failures() -> dict[str, list[tuple[str, str]]]:
    """Cases that fail, by operator, with the first line of the error."""
    failed: dict[str, list[tuple[str, str]]] = {}
    for case in onnx_cases():
        assert case.outputs is not None
        try:
            assert_equal(case, case.outputs)
        except (FheqError, AssertionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            failed.setdefault(_operator(case.model), []).append((case.name, reason))
    return failed


def page(failed: Mapping[str, Sequence[tuple[str, str]]]) -> str:
    """The page; `failed` are the cases that were run and failed."""
    run = Counter(_operator(case.model) for case in onnx_cases())
    lines = [
        "# Operators and ONNX's own cases",
        "",
        "Made by `python -m benchmarks.op_cases`, which runs the float model of every case of one node in "
        f"`onnx.backend.test` of onnx {onnx.__version__}; the tests run them too, over all opsets that an operator has.",
        "",
        "| operator | passed | not run, or failed |",
        "|---|---|---|",
    ]
    without = []
    for op, names in case_names().items():
        reasons = Counter(filter(None, map(excluded, names)))
        if not run[op] and not reasons:
            without.append(f"{op} ({len(names)})")
            continue
        notes = [f"{count}: {reason}" for reason, count in reasons.items()]
        notes += [f"{name} fails: {reason}" for name, reason in failed.get(op, ())]
        lines.append(f"| {op} | {run[op] - len(failed.get(op, ()))} | {'; '.join(notes)} |")
    lines += ["", "Operators without a row in the op table, and how many cases they have: " + ", ".join(without) + "."]
    return "\n".join(lines) + "\n"


def main(path: Path = PAGE) -> None:
    """Runs every case and rewrites the page."""
    jax.config.update("jax_disable_most_optimizations", True)
    path.write_text(page(_failures()), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
