"""Networks quantized by Brevitas, with its own outputs: writes `data/brevitas.npz` for `test_quantized_networks.py`.

Run it with brevitas 0.13.4, qonnx 1.0.0, onnx and torch 2.13 (they do not go with what fheq needs: use an environment of
their own): `python tests/brevitas_models.py`. For each network the file holds the QONNX model that Brevitas exports (of some
the QCDQ model too), inputs, and what the network itself answers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import brevitas.nn as qnn
import numpy as np
import onnx
import torch
from brevitas.export import export_qonnx
from brevitas.export.onnx.standard.qcdq.manager import StdQCDQONNXManager
from brevitas.quant import (
    Int8ActPerTensorFixedPoint,
    Int8ActPerTensorFloat,
    Int8WeightPerChannelFloat,
    Int8WeightPerTensorFixedPoint,
    Int16Bias,
    ShiftedUint8ActPerTensorFloat,
    ShiftedUint8WeightPerChannelFloat,
    SignedBinaryActPerTensorConst,
    SignedBinaryWeightPerTensorConst,
    SignedTernaryWeightPerTensorConst,
    TruncTo8bit,
    Uint8ActPerTensorFixedPoint,
    Uint8ActPerTensorFloat,
)
from torch import nn

FILE = Path(__file__).parent / "data" / "brevitas.npz"
CALIBRATION, SAMPLES = 20, 40


def linear(inputs: int, outputs: int, bits: int = 3, **options) -> qnn.QuantLinear:
    return qnn.QuantLinear(inputs, outputs, **{"bias": True, "weight_bit_width": bits, **options})


def dense(entering: nn.Module, inner: nn.Module, **options) -> nn.Module:
    """Two dense layers around an activation, from 5 values to 3."""
    return nn.Sequential(entering, linear(5, 6, **options), inner, linear(6, 3, **options))


def rounded(base: type, mode: str) -> type:
    return type(f"{base.__name__}By{mode}", (base,), {"float_to_int_impl_type": mode})


def identity(quantizer: type, bits: int = 4, **options) -> qnn.QuantIdentity:
    return qnn.QuantIdentity(act_quant=quantizer, bit_width=bits, **options)


class Residual(nn.Module):
    """A sum of two tensors on one grid, and a sum of tensors on different ones."""

    def __init__(self) -> None:
        super().__init__()
        self.entering, self.shared = identity(Int8ActPerTensorFloat), identity(Int8ActPerTensorFloat)
        self.first, self.second, self.last = linear(5, 5), linear(5, 5), linear(5, 2)
        self.sum = qnn.QuantEltwiseAdd(bit_width=4)
        self.act = qnn.QuantReLU(bit_width=3)

    def forward(self, x):
        x = self.entering(x)
        return self.last(self.act(self.shared(self.second(self.act(self.first(x)))) + x))


def convolutions(entering: nn.Module, weights: type, bits: int, **options) -> nn.Module:
    """Padding, strides, groups and max-pooling, from (2, 6, 6) to 3."""
    kernel = {"weight_quant": weights, "weight_bit_width": bits}
    return nn.Sequential(
        entering,
        qnn.QuantConv2d(2, 4, 3, padding=1, bias=True, **kernel, **options),
        qnn.QuantReLU(bit_width=4),
        nn.MaxPool2d(2),
        qnn.QuantConv2d(4, 4, 2, groups=2, bias=False, **kernel),
        qnn.QuantReLU(bit_width=3),
        nn.Flatten(),
        qnn.QuantLinear(16, 3, bias=True, **kernel),
    )


def truncated(rounding: str) -> nn.Module:
    """Average-pooling that keeps integers: its sum loses low bits."""
    return nn.Sequential(
        identity(Int8ActPerTensorFloat, return_quant_tensor=True),
        qnn.QuantConv2d(2, 3, 3, bias=False, weight_bit_width=3),
        qnn.QuantReLU(bit_width=4, return_quant_tensor=True),
        qnn.TruncAvgPool2d(2, bit_width=4, trunc_quant=TruncTo8bit, float_to_int_impl_type=rounding),
        nn.Flatten(),
        qnn.QuantLinear(12, 2, bias=True, weight_bit_width=3),
    )


def binary() -> nn.Module:
    """Signs between dense layers of signs, the input's among them."""
    act = lambda: qnn.QuantIdentity(act_quant=SignedBinaryActPerTensorConst, bit_width=1, scaling_init=0.5)
    signs = {"weight_quant": SignedBinaryWeightPerTensorConst, "weight_bit_width": 1, "weight_scaling_init": 0.25}
    layer = lambda *size: qnn.QuantLinear(*size, bias=False, **signs)
    return nn.Sequential(act(), layer(5, 7), nn.BatchNorm1d(7), act(), layer(7, 3))


VECTOR, IMAGE = (5,), (2, 6, 6)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "scales per channel": (
        lambda: dense(
            identity(Int8ActPerTensorFloat), qnn.QuantReLU(bit_width=4), weight_quant=Int8WeightPerChannelFloat, bits=4
        ),
        VECTOR,
    ),
    "zero points of activations": (
        lambda: dense(identity(ShiftedUint8ActPerTensorFloat), identity(ShiftedUint8ActPerTensorFloat, 3)),
        VECTOR,
    ),
    "zero points of weights per channel": (
        lambda: dense(
            identity(Int8ActPerTensorFloat), qnn.QuantReLU(bit_width=4), weight_quant=ShiftedUint8WeightPerChannelFloat
        ),
        VECTOR,
    ),
    "powers of two and quantized biases": (
        lambda: dense(
            identity(Int8ActPerTensorFixedPoint, return_quant_tensor=True),
            qnn.QuantReLU(act_quant=Uint8ActPerTensorFixedPoint, bit_width=3, return_quant_tensor=True),
            weight_quant=Int8WeightPerTensorFixedPoint,
            bias_quant=Int16Bias,
        ),
        VECTOR,
    ),
    "ternary weights": (
        lambda: dense(
            identity(Int8ActPerTensorFloat),
            qnn.QuantReLU(bit_width=3),
            weight_quant=SignedTernaryWeightPerTensorConst,
            weight_scaling_init=0.4,
            bits=2,
        ),
        VECTOR,
    ),
    "sigmoid and tanh": (
        lambda: nn.Sequential(
            identity(Int8ActPerTensorFloat),
            linear(5, 4),
            qnn.QuantTanh(bit_width=3),
            linear(4, 4),
            qnn.QuantSigmoid(bit_width=3),
            linear(4, 2),
        ),
        VECTOR,
    ),
    **{
        f"rounding by {mode}": (
            lambda mode=mode: dense(
                identity(rounded(Int8ActPerTensorFloat, mode)),
                qnn.QuantReLU(act_quant=rounded(Uint8ActPerTensorFloat, mode), bit_width=3),
            ),
            VECTOR,
        )
        for mode in ("FLOOR", "CEIL")
    },
    "rounding down with zero points": (
        lambda: dense(
            identity(rounded(ShiftedUint8ActPerTensorFloat, "FLOOR")),
            identity(rounded(ShiftedUint8ActPerTensorFloat, "ROUND_TO_ZERO"), 3),
        ),
        VECTOR,
    ),
    "signs": (binary, VECTOR),
    "residual": (Residual, VECTOR),
    "convolutions, per channel, shifted input": (
        lambda: convolutions(identity(ShiftedUint8ActPerTensorFloat), Int8WeightPerChannelFloat, 4),
        IMAGE,
    ),
    "truncating average-pooling": (lambda: truncated("FLOOR"), IMAGE),
}


# QCDQ states neither other roundings nor signs: these are the ones that it takes.
AS_QCDQ = (
    "zero points of weights per channel",
    "powers of two and quantized biases",
    "convolutions, per channel, shifted input",
)


def trained(build: Callable[[], nn.Module], shape: tuple[int, ...], seed: int) -> nn.Module:
    """A network whose activation scales are those of a few batches."""
    torch.manual_seed(seed)
    network = build()
    network.train()
    with torch.no_grad():
        for _ in range(CALIBRATION):
            network(torch.randn(16, *shape))
    return network.eval()


def qcdq(network: nn.Module, x: torch.Tensor) -> onnx.ModelProto:
    with TemporaryDirectory() as directory:
        path = str(Path(directory) / "model.onnx")
        StdQCDQONNXManager.export(network, args=x, export_path=path, dynamo=False, opset_version=13)
        return onnx.load(path)


def packed(proto: onnx.ModelProto) -> np.ndarray:
    for node in proto.graph.node:
        del node.metadata_props[:]
    return np.frombuffer(proto.SerializeToString(), np.uint8)


def main() -> None:
    warnings.filterwarnings("ignore")
    arrays: dict[str, np.ndarray] = {}
    for seed, (name, (build, shape)) in enumerate(NETWORKS.items()):
        network = trained(build, shape, seed)
        x = torch.randn(SAMPLES, *shape)
        with torch.no_grad():
            y = network(x)
        data = {"x": x.numpy(), "y": getattr(y, "value", y).numpy()}
        exported = export_qonnx(network, args=x[:1], dynamo=bool(seed % 2))  # both of torch's exporters
        forms = {"QONNX": exported} | ({"QCDQ": qcdq(network, x[:1])} if name in AS_QCDQ else {})
        for form, proto in forms.items():
            arrays |= {f"{name}, {form}/{k}": v for k, v in (data | {"model": packed(proto)}).items()}
    FILE.parent.mkdir(exist_ok=True)
    np.savez_compressed(FILE, **arrays)


if __name__ == "__main__":
    main()
