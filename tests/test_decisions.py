"""Functions of one decision cost its comparison alone, whatever is computed of it before the next sum."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
import pytest
from build_models import model, node, reference
from onnx import TensorProto

import fheq
from fheq.planning.plan import plan
from fheq.rewrites import decompose, settle_decisions

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
X = np.random.default_rng(0).uniform(-2, 2, (200, 6)).astype(np.float32)
FINE = {"op_inputs": 8, "op_weights": 16, "model_inputs": 6, "model_outputs": 16}
KNOWN = {
    "limits": np.float32([-1.5, -0.5, 0.0, 0.2, 0.7, 1.5]),
    "zero": np.float32(0),
    "two": np.float32(2),
    "ones": np.ones(6, np.float32),
    "minus": -np.ones(6, np.float32),
    "a": np.float32([1, -2, 3, 0.5, 0, 4]),
    "b": np.float32([-1, 2, 0.25, 0.5, 1, -4]),
    "numbers": np.arange(6)[None],
    "last": np.full((1, 6), 5),
    "table": np.float32([3, 1, 4, 1, 5, 9]),
    "w": np.random.default_rng(1).normal(size=(6, 3)).astype(np.float32),
    "axes": np.int64([1]),
    "image": np.int64([0, 1, 6]),
    "kernel": np.random.default_rng(2).normal(size=(2, 1, 3)).astype(np.float32),
    "column": np.int64([6, 1]),
    "columns": np.random.default_rng(3).normal(size=(6, 4)).astype(np.float32),
    "square": np.random.default_rng(4).normal(size=(2, 6)).astype(np.float32),
}
DECISION = node("Less", ["x", "limits"], ["d"])
BITS = node("Cast", ["d"], ["bits"], to=TensorProto.FLOAT)


def weighed(*middle: onnx.NodeProto) -> list[onnx.NodeProto]:
    return [DECISION, *middle, node("MatMul", ["t", "w"], ["y"])]


def convolved(values: str, **pads: list[int]) -> list[onnx.NodeProto]:
    choice = node("Where", ["d", values, "minus" if values == "ones" else "zero"], ["t"])
    flat = node("Reshape", ["t", "image"], ["i"])
    return [DECISION, choice, flat, node("Conv", ["i", "kernel"], ["y"], **pads)]


@dataclass(frozen=True)
class Case:
    """Nodes from x `(N, 6)` to y.

    Args:
        tables: applications for one row.
        settled: whether the rewrite changes the graph.
    """

    nodes: list[onnx.NodeProto]
    tables: int = 6
    settled: bool = True


CASES = {
    "a choice before weights": Case(weighed(node("Where", ["d", "ones", "minus"], ["t"]))),
    "a choice by element": Case(weighed(node("Where", ["d", "a", "b"], ["t"])), tables=5),  # one is 0.5 either way
    "several nodes and branches": Case(
        weighed(
            BITS,
            node("Mul", ["bits", "a"], ["p"]),
            node("Exp", ["p"], ["e"]),
            node("Where", ["d", "b", "a"], ["c"]),
            node("Sub", ["e", "c"], ["t"]),
        )
    ),
    "a sum of chosen numbers": Case(
        [DECISION, node("Where", ["d", "a", "b"], ["t"]), node("ReduceSum", ["t", "axes"], ["y"], keepdims=0)], tables=5
    ),
    "an index that is looked up": Case(
        [
            DECISION,
            BITS,
            node("Where", ["d", "numbers", "last"], ["i"]),
            node("Gather", ["table", "i"], ["g"]),
            node("Mul", ["g", "bits"], ["t"]),
            node("ReduceSum", ["t", "axes"], ["y"], keepdims=1),
        ]
    ),
    "an index beside something encrypted": Case(
        [
            DECISION,
            node("Where", ["d", "numbers", "last"], ["i"]),
            node("Gather", ["table", "i"], ["t"]),
            node("Mul", ["t", "x"], ["y"]),
        ],
        settled=False,
    ),
    "a matrix of functions": Case(
        [
            DECISION,
            node("Reshape", ["d", "column"], ["up"]),
            node("Cast", ["up"], ["u"], to=TensorProto.FLOAT),
            node("Mul", ["u", "columns"], ["m"]),
            node("MatMul", ["square", "m"], ["y"]),
        ]
    ),
    "two readers": Case(
        [
            DECISION,
            node("Where", ["d", "a", "b"], ["t"]),
            node("MatMul", ["t", "w"], ["u"]),
            node("ReduceSum", ["t", "axes"], ["v"], keepdims=1),
            node("Add", ["u", "v"], ["y"]),
        ],
        tables=5,
    ),
    "padding of 0 that is none of the values": Case(convolved("ones", pads=[1, 1])),
    "padding of 0 that is one of them": Case(convolved("two", pads=[1, 1])),
    "a reader with no weights": Case(
        [*weighed(node("Where", ["d", "a", "b"], ["t"]))[:-1], node("Mul", ["t", "x"], ["y"])], settled=False
    ),
    "a decision itself": Case([DECISION, BITS, node("MatMul", ["bits", "w"], ["y"])], settled=False),
}


def graph_of(case: Case) -> tuple[onnx.ModelProto, fheq.Graph]:
    used = {name for n in case.nodes for name in n.input}
    proto = model(case.nodes, {"x": [1, 6]}, ["y"], {k: v for k, v in KNOWN.items() if k in used})
    return proto, fheq.import_onnx(proto)


def lowered(graph: fheq.Graph) -> fheq.IntProgram:
    return fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, X), FINE))


def answers(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """The program's, and those of onnxruntime on what the encrypted integers stand for."""
    proto, graph = graph_of(case)
    program = lowered(graph)
    (q,) = program.quantize(X[:60])
    x = program.inputs[0].affine.dequantize(q).astype(np.float32)
    got = program.dequantize(fheq.simulate(program, q))
    return got, np.concatenate([reference(proto, row[None])[0] for row in x]).reshape(np.shape(got))


@pytest.mark.parametrize("name", CASES)
def test_as_onnxruntime_decides(name: str) -> None:
    """At weights so fine that nothing but decisions could be left of an error."""
    case = CASES[name]
    got, want = answers(case)
    of_8_bits = not case.settled and name != "a decision itself"
    np.testing.assert_allclose(got, want, atol=(2e-2 if of_8_bits else 2e-3) * np.abs(want).max())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.settled])
def test_tables(name: str) -> None:
    case = CASES[name]
    program = lowered(graph_of(case)[1])
    assert sum(int(np.prod(program.values[lookup.out].shape)) for lookup in program.lookups) == case.tables


@pytest.mark.parametrize("name", CASES)
def test_where_no_weights_may_be_made(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Functions that the reader's own weights cannot take in have tables then."""
    monkeypatch.setattr("fheq.rewriting.decisions.MOST_WEIGHTS", 0)
    got, want = answers(CASES[name])
    np.testing.assert_allclose(got, want, atol=2e-2 * np.abs(want).max())


@pytest.mark.parametrize("name", CASES)
def test_rewritten_where_it_pays(name: str) -> None:
    case = CASES[name]
    simple = decompose(graph_of(case)[1])
    settled = settle_decisions(simple)
    assert (settled is not simple and settled.nodes != simple.nodes) == case.settled
    rows = X[:20]
    np.testing.assert_allclose(fheq.evaluate(settled, rows), fheq.evaluate(simple, rows), rtol=1e-5, atol=1e-5)


def test_a_point_is_the_decision() -> None:
    """One bit, so that the sum after it is as narrow as its weights allow."""
    layout = plan(graph_of(CASES["a choice before weights"])[1])
    (step,) = [step for step in layout.steps if step.operands]
    (operand,) = step.operands
    assert set(np.unique(operand.slope)) == {2.0} and set(np.unique(operand.intercept)) == {-1.0}
