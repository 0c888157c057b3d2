"""Outputs of which decryption sees the high bits alone: the same integers everywhere, and cheaper tables before them."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from build_models import model, node
from hypothesis import given
from hypothesis import strategies as st

import fheq
from fheq import Override, Rounding, Spec
from fheq.encryption.decryption import centred, decrypted_bits, removed_bits
from fheq.errors import QuantizationError

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(200, 4)).astype(np.float32)
KNOWN = {"w": RNG.normal(size=(4, 6)).astype(np.float32), "v": RNG.normal(size=(6, 3)).astype(np.float32)}
APPROXIMATE = Rounding(4, approximate=True)


def lowered(*last: tuple[str, ...], output_rounding: Rounding | None) -> tuple[fheq.Graph, fheq.QParams, fheq.IntProgram]:
    """Two layers, then nodes (operator, input, output) that the client could as well compute."""
    nodes = [node("MatMul", ["x", "w"], ["m"]), node("Relu", ["m"], ["r"]), node("MatMul", ["r", "v"], ["last"])]
    nodes += [node(kind, [a], [b]) for kind, a, b in last]
    graph = fheq.import_onnx(model(nodes, {"x": ["N", 4]}, (last[-1][2] if last else "last",), KNOWN))
    spec = Spec(4, rounding=APPROXIMATE, output_rounding=output_rounding)
    qparams = fheq.fit(graph, fheq.calibrate(graph, X), spec)
    return graph, qparams, fheq.lower(graph, qparams)


@pytest.mark.parametrize("last", [[], [("Neg", "last", "y")], [("Neg", "last", "n"), ("Flatten", "n", "y")]])
def test_rounded_outputs_are_the_same_integers_everywhere(last: list) -> None:
    """concrete's clear evaluation, the simulation and the fake quantization; negated outputs round as their negation."""
    graph, qparams, program = lowered(*last, output_rounding=APPROXIMATE)
    (lsbs,), (q,) = removed_bits(program), program.quantize(X)
    assert lsbs > 0 and decrypted_bits(program) == [4]
    simulated = fheq.simulate(program, q)
    assert not np.any(simulated & ((1 << lsbs) - 1))
    circuit = fheq.compile(program, p_error=0.1)
    np.testing.assert_array_equal(circuit.evaluate(q[:20], quantized=True), simulated[:20])
    (real,) = program.dequantize(simulated)
    np.testing.assert_allclose(fheq.fake_quant(graph, qparams, X), real, atol=1e-4)
    exact = np.asarray(fheq.evaluate(graph, X))
    whole = program.outputs[0].affine.scale * (1 << lsbs)
    assert np.all(np.std(real - exact, axis=0) < whole) and np.all(np.std(real, axis=0) > whole)


def test_fewer_output_bits_make_the_tables_cheaper() -> None:
    rounded, whole = (lowered(output_rounding=r)[2] for r in (APPROXIMATE, None))
    assert decrypted_bits(whole)[0] > decrypted_bits(rounded)[0]
    costs = [fheq.cost(program, p_error=0.1) for program in (rounded, whole)]
    assert costs[0].complexity < costs[1].complexity and costs[0].bootstraps == costs[1].bootstraps
    assert [report.outputs[0].bits for report in costs] == [decrypted_bits(p)[0] for p in (rounded, whole)]
    compiled = fheq.compile(rounded, p_error=0.1)
    assert compiled.bootstraps == costs[0].bootstraps and compiled.complexity == pytest.approx(costs[0].complexity, rel=0.01)


@pytest.mark.encrypted
@pytest.mark.parametrize("layers", [1, 2])
def test_encrypted_outputs(layers: int) -> None:
    """Without tables nothing but an output's own noise can take it to the neighbouring cell; with tables of 4 bits that
    fail often results are as far from the exact ones as simulated noise says, within 5 deviations."""
    program = lowered(output_rounding=APPROXIMATE)[2]
    if layers == 1:
        graph = fheq.import_onnx(model([node("MatMul", ["x", "w"], ["y"])], {"x": ["N", 4]}, ("y",), {"w": KNOWN["w"]}))
        spec = Spec(4, output_rounding=APPROXIMATE)
        program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, X), spec))
    (q,), (lsbs,) = program.quantize(X[:20]), removed_bits(program)
    circuit = fheq.compile(program, p_error=0.1)
    circuit.keygen()
    off = np.abs((circuit(q, quantized=True, progress=False) >> lsbs) - (fheq.simulate(program, q) >> lsbs))
    assert lsbs > 0
    if layers == 1:
        assert np.max(off) <= 1 and np.mean(off) < 0.5
    else:
        (many,) = program.quantize(X)
        noisy = fheq.simulate(program, many, p_error=0.1, key=jax.random.key(0)) >> lsbs
        expected = np.abs(noisy - (fheq.simulate(program, many) >> lsbs)).mean(axis=1)
        assert abs(off.mean() - expected.mean()) < 5 * expected.std() / np.sqrt(len(q))


@given(st.integers(1, 16), st.data())
def test_what_noise_drives_out_of_range_is_brought_back(bits: int, data: st.DataObject) -> None:
    below = 1 << bits >> 1
    true = data.draw(st.integers(-below, (1 << bits) + below - 1))
    assert centred(true % (2 << bits), bits) == true


def test_exact_rounding_of_what_is_decrypted_is_refused() -> None:
    graph = lowered(output_rounding=None)[0]
    stats = fheq.calibrate(graph, X)
    with pytest.raises(QuantizationError, match="'last' is decrypted"):
        fheq.fit(graph, stats, Spec(4, overrides={"last": Override(rounding=Rounding(4))}))
    with pytest.raises(QuantizationError, match="output_rounding"):
        Spec(4, output_rounding=Rounding(4))
