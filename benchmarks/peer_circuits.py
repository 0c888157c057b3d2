"""What circuits of the peer (concrete-ml) cost, in its own interpreter: `PYTHON -m benchmarks.peer_circuits MODEL.onnx`.

Prints a line of JSON for each setting: complexity of the compiled circuit, score of the clear quantized forward on x_test
(accuracy, or R2 where targets are floats), and that of the simulated one on the first samples of it. `benchmarks.workloads`
runs this; nothing else does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import onnx
from concrete import fhe
from concrete.ml.quantization import PostTrainingAffineQuantization
from concrete.ml.torch.numpy_module import NumpyModule

from benchmarks.scoring import accuracy

CALIBRATION, SIMULATED, INPUTSET = 1000, 60, 100
SETTINGS = ((5, 5, 0.1), (6, 6, 0.1), (7, 7, 0.1))  # n_bits, approximate rounding, p_error


def main(path: str) -> None:
    """Measures and prints."""
    data = np.load(Path(path).with_suffix(".npz"))
    samples, test, targets = data["x_train"][:CALIBRATION], data["x_test"], data["y_test"]
    few = slice(0, SIMULATED)
    for n_bits, rounding, p_error in SETTINGS:
        kept = {"n_bits": rounding, "method": fhe.Exactness.APPROXIMATE}
        converter = PostTrainingAffineQuantization(n_bits, NumpyModule(onnx.load(path)), rounding_threshold_bits=kept)
        module = converter.quantize_module(samples)
        module.compile(samples[:INPUTSET], p_error=p_error)
        row = {
            "name": Path(path).stem,
            "n_bits": n_bits,
            "rounding": f"{rounding}A",
            "p_error": p_error,
            "complexity": float(module.fhe_circuit.complexity),
            "score": accuracy(module.forward(test, fhe="disable"), targets),
            "sim_score": accuracy(module.forward(test[few], fhe="simulate"), targets[few]),
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
