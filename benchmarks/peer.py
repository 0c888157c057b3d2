"""What the peer (concrete-ml) takes, in its own interpreter: `PYTHON benchmarks/peer.py MODEL.onnx CONFIGURATIONS`.

Prints JSON: for each bit-width seconds of its converter's `quantize_module` on 1,000 samples and of the quantized `forward`
on x_test in the clear; then seconds per sample of its simulation. `benchmarks.throughput` runs this; nothing else does.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import onnx
from concrete.fhe import Configuration
from concrete.ml.quantization import PostTrainingAffineQuantization
from concrete.ml.torch.numpy_module import NumpyModule

CALIBRATION = 1000
SIMULATED = 3


def main(path: str, count: str) -> None:
    """Measures and prints."""
    data = np.load(Path(path).with_suffix(".npz"))
    samples, test = data["x_train"][:CALIBRATION], data["x_test"]
    model = onnx.load(path)
    found = []
    for n_bits in (5, 6, 4, 7, 3, 8)[: int(count)]:
        start = time.perf_counter()
        converter = PostTrainingAffineQuantization(n_bits, NumpyModule(model), rounding_threshold_bits=n_bits)
        module = converter.quantize_module(samples)
        middle = time.perf_counter()
        module.forward(test, fhe="disable")
        end = time.perf_counter()
        found.append({"n_bits": n_bits, "quantize": middle - start, "forward": end - middle})
        if len(found) == 1:
            first = module
    again = []
    for _ in range(3):
        start = time.perf_counter()
        first.forward(test, fhe="disable")
        again.append((time.perf_counter() - start) / len(test))
    module.compile(samples[:100], Configuration(enable_unsafe_features=True), p_error=0.1)
    module.forward(test[:1], fhe="simulate")
    start = time.perf_counter()
    module.forward(test[:SIMULATED], fhe="simulate")
    simulated = (time.perf_counter() - start) / SIMULATED
    print(json.dumps({"sweep": found, "clear": sorted(again)[1], "simulate": simulated}))


if __name__ == "__main__":
    main(*sys.argv[1:])
