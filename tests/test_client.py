"""What the client computes after decryption takes no tables, and is what the model says of what is decrypted."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from build_models import model, node

import fheq

CENTRES = np.float32([[6, 3, 1, 0], [5, 3, 4, 1], [7, 3, 6, 2]])
RNG = np.random.default_rng(0)
X = np.concatenate([CENTRES, (CENTRES[:, None] + RNG.normal(0, 0.4, (3, 80, 4))).reshape(-1, 4)]).astype(np.float32)


def nearest_centre() -> onnx.ModelProto:
    """The number of the nearest centre and the distances to all, as exporters of k-means write them."""
    nodes = [
        node("ReduceSumSquare", ["x"], ["square"], axes=[1], keepdims=1),
        node("Gemm", ["x", "centres"], ["product"], alpha=-2.0, transB=1),
        node("Add", ["square", "product"], ["rest"]),
        node("Add", ["rest", "norms"], ["squares"]),
        node("ArgMin", ["squares"], ["label"], axis=1, keepdims=0),
        node("Sqrt", ["squares"], ["distances"]),
    ]
    known = {"centres": CENTRES, "norms": np.sum(CENTRES**2, axis=1)}
    kinds = {"label": onnx.TensorProto.INT64}
    return model(nodes, {"x": ["N", 4]}, ["label", "distances"], known, kinds=kinds, opset=13)


@pytest.mark.parametrize("bits", [6, 8])
def test_sums_of_what_is_decrypted_are_the_clients(bits: int) -> None:
    """A table each would quantize the parts of the sum, of which the differences between centres are a hundredth."""
    proto = nearest_centre()
    label, distances = onnxruntime.InferenceSession(proto.SerializeToString()).run(None, {"x": X})
    graph = fheq.import_onnx(proto)
    qparams = fheq.fit(graph, fheq.calibrate(graph, X), bits)
    program = fheq.lower(graph, qparams)
    assert sum(int(np.prod(program.values[table.out].shape)) for table in program.lookups) == X.shape[1]  # the squares
    got = program.dequantize(*fheq.simulate(program, *program.quantize(X)))
    faked = fheq.fake_quant(graph, qparams, X)
    assert got[0].dtype == label.dtype
    np.testing.assert_array_equal(got[0], label)
    np.testing.assert_array_equal(faked[0], label)
    # Half a step of each square and, times what multiplies it, of each feature and of each weight (-2 times a centre).
    x, steps = np.max(np.abs(X), axis=0), 2**bits - 1
    of_features = np.ptp(X, axis=0) / steps * (x + np.max(CENTRES, axis=0))
    of_weights = x * 4 * np.max(CENTRES) / steps / 2
    bound = np.sum(x**2 / steps / 2 + of_features + of_weights)
    assert np.max(np.abs(got[1] ** 2 - distances**2)) < bound
    np.testing.assert_allclose(got[1] ** 2, np.square(faked[1]), atol=1e-3)
    assert np.all(np.isfinite(faked[1]))  # also at the centres, where the root may be of less than 0


def test_as_many_integers_as_the_program_has_outputs_are_decoded() -> None:
    graph = fheq.import_onnx(nearest_centre())
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, X), 6))
    outputs = fheq.simulate(program, *program.quantize(X))
    with pytest.raises(fheq.FheqError, match=r"1 outputs were given, where the program has 2 \(.+, .+\)"):
        program.dequantize(outputs[0])
