"""Sequences of known lengths are the tensors that they hold. The oracle is onnxruntime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from build_models import model, node, reference
from models import as_tuple
from onnx import TensorProto, helper

import fheq
from fheq.errors import ModelError, UnsupportedError

X = np.random.default_rng(0).normal(size=(3, 7)).astype(np.float32)
KNOWN = {"sizes": np.array([2, 4, 1]), "three": np.array(3), "first": np.array(0), "last": np.array(-1), "far": np.array(9)}


def of(nodes: list[onnx.NodeProto], outputs: list[str] | None = None) -> onnx.ModelProto:
    return model(nodes, {"x": ["N", 7]}, outputs or ["y"], KNOWN)


@pytest.mark.parametrize(
    ("split", "attributes"),
    [(["sizes"], {}), (["three"], {}), ([], {}), ([], {"keepdims": 0})],
    ids=["sizes", "one size", "ones", "dropped axis"],
)
@pytest.mark.parametrize("new", [0, 1])
def test_parts_that_are_joined_again(split: list[str], attributes: dict[str, int], new: int) -> None:
    if new and split:
        pytest.skip("parts of different sizes do not stack")
    if not new and attributes:
        pytest.skip("vectors do not join along axis 1")
    nodes = [
        node("SplitToSequence", ["x", *split], ["s"], axis=1, **attributes),
        node("SequenceAt", ["s", "last"], ["e"]),
        node("SequenceErase", ["s", "first"], ["t"]),
        node("SequenceInsert", ["t", "e", "first"], ["u"]),
        node("SequenceInsert", ["u", "e"], ["v"]),
        node("ConcatFromSequence", ["v"], ["y"], axis=1, new_axis=new),
    ]
    proto = of(nodes)
    graph = fheq.import_onnx(proto)
    assert {n.op for n in graph.nodes} <= {"Split", "Squeeze", "Unsqueeze", "Concat", "Identity"}
    np.testing.assert_array_equal(fheq.evaluate(graph, X), reference(proto, X)[0])


def test_an_output_that_is_a_sequence_is_one_output_per_element() -> None:
    nodes = [node("Relu", ["x"], ["r"]), node("SequenceConstruct", ["x", "r", "x"], ["y"])]
    proto = of(nodes)
    proto.graph.output[0].type.CopyFrom(
        helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    )
    graph = fheq.import_onnx(proto)
    assert [port.name for port in graph.outputs] == ["y/0", "y/1", "y/2"]
    for got, want in zip(as_tuple(fheq.evaluate(graph, X)), reference(proto, X)[0], strict=True):
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("nodes", "error", "message"),
    [
        ([node("SequenceAt", ["s", "far"], ["y"])], ModelError, "position 9 is outside of a sequence of 7"),
        ([node("Relu", ["s"], ["y"])], UnsupportedError, "take an element with SequenceAt"),
        ([node("Cast", ["x"], ["p"], to=7), node("SequenceAt", ["s", "p"], ["y"])], UnsupportedError, "known positions"),
        ([node("Optional", [], ["o"]), node("OptionalGetElement", ["o"], ["y"])], ModelError, "an optional that has none"),
    ],
    ids=["outside", "a tensor is due", "computed", "absent"],
)
def test_what_cannot_be_is_refused_by_name(nodes: Any, error: type, message: str) -> None:
    proto = of([node("SplitToSequence", ["x"], ["s"], axis=1), *nodes])
    with pytest.raises(error, match=message) as caught:
        fheq.import_onnx(proto)
    assert nodes[-1].op_type in str(caught.value)
    assert len(fheq.check(proto)) == 1


def test_an_input_that_is_a_sequence_is_refused() -> None:
    proto = of([node("SequenceAt", ["x", "first"], ["y"])])
    proto.graph.input[0].type.CopyFrom(
        helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, None))
    )
    with pytest.raises(UnsupportedError, match="give each element as an input of its own"):
        fheq.import_onnx(proto)
