"""What `import fheq` must not load."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("concrete", "torch", "onnx", "rich")


@pytest.mark.parametrize("statement", ["import fheq", "import fheq.post_training", "import fheq.cli"])
def test_imports_load_nothing_heavy(statement: str):
    code = f"{statement}\nimport sys\nprint([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_quantizing_a_graph_needs_no_compiler():
    code = """
import sys, warnings, numpy as np, fheq
from onnx import helper, numpy_helper, TensorProto
warnings.simplefilter("ignore")
w = numpy_helper.from_array(np.ones((3, 2), np.float32), "w")
graph = helper.make_graph(
    [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])], "g",
    [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3])],
    [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], [w])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
from fheq.post_training import PostTrainingAffineQuantization
x = np.random.default_rng(0).normal(size=(60, 3)).astype(np.float32)
module = PostTrainingAffineQuantization(3, model, 4).quantize_module(x)
module.forward(x); module.bitwidth_and_range_report(); str(module.qparams)
print([m for m in ("concrete", "torch") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
