"""Networks quantized by PyTorch's export flow (PT2E) with torchao: writes `data/pt2e.npz`,
which `test_quantized_networks.py` reads.

Run it with torchao 0.18, onnxscript, onnx and torch 2.13: `python tests/pt2e_models.py`. For each network the file holds the
QDQ model that torch exports, inputs, and what the converted network itself answers.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
    X86InductorQuantizer,
    get_default_x86_inductor_quantization_config,
)

FILE = Path(__file__).parent / "data" / "pt2e.npz"
IMAGES = nn.Sequential(
    nn.Conv2d(1, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 2, 2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(18, 3)
)
NETWORKS = {"dense": (nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)), (4,)), "convolutions": (IMAGES, (1, 6, 6))}


def quantized(network: nn.Module, shape: tuple[int, ...]) -> nn.Module:
    """Weights of 8 bits with a scale per channel, activations of 8 bits, as calibrated on random inputs."""
    sample = torch.randn(1, *shape)
    exported = torch.export.export(network.eval(), (sample,)).module()
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    prepared = prepare_pt2e(exported, quantizer)
    for _ in range(200):
        prepared(torch.randn(1, *shape))
    return convert_pt2e(prepared)


def main() -> None:
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    arrays: dict[str, np.ndarray] = {}
    for name, (network, shape) in NETWORKS.items():
        made = quantized(network, shape)
        x = torch.randn(40, *shape)
        with torch.no_grad():
            y = torch.cat([made(row[None]) for row in x])
        proto = torch.onnx.export(made, (x[:1],), dynamo=True).model_proto
        for node in proto.graph.node:
            del node.metadata_props[:]
        arrays |= {f"{name}/model": np.frombuffer(proto.SerializeToString(), np.uint8), f"{name}/x": x, f"{name}/y": y}
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
