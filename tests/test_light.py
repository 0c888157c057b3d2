"""The convolutional networks that ship with the onnx package (weights made by ConstantOfShape, 224 by 224 images)."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest
from build_models import reference

import fheq
from fheq.check import survey

FOLDER = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
NAMES = sorted(path.stem for path in FOLDER.glob("light_*.onnx"))
QUICK = ("light_shufflenet", "light_squeezenet")

pytestmark = pytest.mark.skipif(not NAMES, reason="this onnx package ships no models")


@pytest.mark.parametrize("name", QUICK)
def test_supported_and_evaluated_as_by_onnxruntime(name: str) -> None:
    path = FOLDER / f"{name}.onnx"
    found = survey(path)
    assert found.problems == ()
    assert found.tables is not None and found.tables["activations"] > 10_000
    proto = without_softmax(onnx.load(path))
    graph = fheq.import_onnx(proto)
    x = np.random.default_rng(0).uniform(size=graph.inputs[0].type.shape).astype(np.float32)
    (want,) = reference(proto, x)
    np.testing.assert_allclose(fheq.evaluate(graph, x), want, rtol=1e-4)


def without_softmax(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model up to its logits: as all weights are alike they reach 1e10, where one rounding decides a softmax."""
    last = proto.graph.node[-1]
    if last.op_type == "Softmax":
        proto.graph.output[0].name = last.input[0]
        proto.graph.output[0].type.tensor_type.ClearField("shape")
        proto.graph.node.remove(last)
    return proto


@pytest.mark.skipif(not os.environ.get("SLOW_TESTS"), reason="takes minutes; set SLOW_TESTS=1")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in QUICK])
def test_the_larger_ones(name: str) -> None:
    test_supported_and_evaluated_as_by_onnxruntime(name)
