"""Post-training quantization and import of quantization-aware models, as converters.

The same functions as the rest of fheq (`calibrate`, `fit`, `lower`) behind the interface of earlier tools, as frozen
dataclasses: no method changes its object.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from fheq.calibrate import calibrate
from fheq.converters.op_maps import ONNX_OPS_TO_JAX_IMPL as ONNX_OPS_TO_JAX_IMPL
from fheq.converters.op_maps import ONNX_OPS_TO_NUMPY_IMPL as ONNX_OPS_TO_NUMPY_IMPL
from fheq.converters.op_maps import ONNX_OPS_TO_QUANTIZED_IMPL as ONNX_OPS_TO_QUANTIZED_IMPL
from fheq.converters.quantized_module import NotCompiledError as NotCompiledError
from fheq.converters.quantized_module import QuantizedModule as QuantizedModule
from fheq.converters.rounding_search import DEFAULT_TOLERANCE, AutoRounding, as_rounding, smallest_rounding
from fheq.converters.rounding_search import RoundingWarning as RoundingWarning
from fheq.converters.stated import MissingQuantizerError as MissingQuantizerError
from fheq.converters.stated import carry_quantizers, check_quantized
from fheq.errors import QuantizationError
from fheq.fit import fit
from fheq.graph import Graph
from fheq.lower import lower
from fheq.planning.plan import plan
from fheq.spec import DEFAULT_MODEL_BITS as DEFAULT_MODEL_BITS
from fheq.spec import BitsError as BitsError
from fheq.spec import Rounding, Spec
from fheq.spec import get_n_bits_dict as get_n_bits_dict


@dataclass(frozen=True, eq=False)
class ONNXConverter:
    """What all converters share.

    Args:
        n_bits: see `get_n_bits_dict`; held as the mapping that it gives.
        model: path, bytes, `onnx.ModelProto` or `Graph`; held as the `Graph`.
        rounding_threshold_bits: bits of accumulators before tables: None (all), an int from 2 to 8 (rounded exactly), or
            `{"n_bits": int | "auto", "method": "EXACT" | "APPROXIMATE"}` (or concrete's `fhe.Exactness`); see
            `fheq.converters.rounding_search.as_rounding`. "auto" is the smallest number of bits that the tolerance allows.
        rounding_tolerance: for "auto", the largest `1 - R2` of a rounded output against the unrounded one on the calibration
            data, of the worst output: 0.01 keeps R2 at 0.99 or more.
        spec: every other option of the quantization; its n_bits and rounding are not used.

    Raises:
        BitsError: (a ValueError) n_bits or rounding_threshold_bits break their rules.
        FheqError: the model cannot be imported.
    """

    n_bits: int | Mapping[str, int]
    model: Any = field(repr=False)
    rounding_threshold_bits: Any = None
    rounding_tolerance: float = DEFAULT_TOLERANCE
    spec: Spec = field(default_factory=Spec, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "n_bits", MappingProxyType(get_n_bits_dict(self.n_bits)))
        as_rounding(self.rounding_threshold_bits)
        if isinstance(self.rounding_threshold_bits, Mapping):
            object.__setattr__(self, "rounding_threshold_bits", MappingProxyType(dict(self.rounding_threshold_bits)))
        number = isinstance(self.rounding_tolerance, int | float) and not isinstance(self.rounding_tolerance, bool)
        if not number or not 0 <= self.rounding_tolerance < float("inf"):
            raise BitsError(f"rounding_tolerance must be a number not below 0, got {self.rounding_tolerance!r}")
        object.__setattr__(self, "model", _graph(self.model))

    @property
    def graph(self) -> Graph:
        """The float model."""
        return self.model

    @property
    def n_bits_model_inputs(self) -> int:
        """Bits of the model's inputs."""
        return self._bits("model_inputs")

    @property
    def n_bits_model_outputs(self) -> int:
        """Bits of the model's outputs."""
        return self._bits("model_outputs")

    @property
    def n_bits_op_inputs(self) -> int:
        """Bits of what linear ops and products read."""
        return self._bits("op_inputs")

    @property
    def n_bits_op_weights(self) -> int:
        """Bits of weights."""
        return self._bits("op_weights")

    def _bits(self, key: str) -> int:
        assert isinstance(self.n_bits, Mapping)
        return self.n_bits[key]

    def prepare(self) -> Graph:
        """The graph to quantize, checked for what the converter demands of it."""
        raise NotImplementedError("use PostTrainingAffineQuantization or PostTrainingQATImporter")

    def quantize_module(self, *calibration_data: Any) -> QuantizedModule:
        """Calibrates, fits quantizers and lowers.

        Args:
            calibration_data: one array per model input, in the model's layout; some hundreds of samples do.

        Raises:
            DataError: no data, NaN or infinity, a wrong shape or dtype.
            QuantizationError: the model cannot be quantized this way.
            UnsupportedError: a node that cannot run on encrypted data.
        """
        graph = self.prepare()
        rounding = as_rounding(self.rounding_threshold_bits)
        fixed = rounding if isinstance(rounding, Rounding) else None
        spec = replace(self.spec, n_bits=self.n_bits, rounding=fixed)
        stats = calibrate(graph, *calibration_data)
        qparams = fit(graph, stats, spec)
        if isinstance(rounding, AutoRounding):
            qparams, _ = smallest_rounding(
                graph, stats, spec, qparams, calibration_data, rounding.approximate, self.rounding_tolerance
            )
        return QuantizedModule(graph, qparams, lower(graph, qparams))


@dataclass(frozen=True, eq=False)
class PostTrainingAffineQuantization(ONNXConverter):
    """Quantizes a float model; quantizers that the model states are kept."""

    def prepare(self) -> Graph:
        """The graph as it is."""
        return self.graph


@dataclass(frozen=True, eq=False)
class PostTrainingQATImporter(ONNXConverter):
    """Imports a quantization-aware model (`onnx.brevitas` or `qonnx` Quant nodes, or QDQ).

    Bit-widths, scales, signedness and narrow range are those of the nodes, carried through movement ops, maxima, Relu and
    affine ops that fold into weights. `n_bits` sizes what the model leaves open: "model_inputs" an input that only feeds
    sums, products or activations, "op_inputs" such tensors inside, "op_weights" weights without a quantizer.

    Every input of a linear op (product with weights or of two encrypted matrices, average pool) needs a quantizer, the
    model's own float inputs included: `quantize_module` raises a `MissingQuantizerError` (a ValueError) that names the
    tensor and the node where none reaches it.
    """

    def prepare(self) -> Graph:
        """The graph with its quantizers carried on, and no linear op without."""
        graph = carry_quantizers(self.graph)
        check_quantized(plan(graph))
        return graph


def _graph(model: Any) -> Graph:
    if isinstance(model, Graph):
        return model
    if model is None:
        raise QuantizationError("model is None; give a path, bytes, an onnx.ModelProto or a fheq Graph")
    from fheq.onnx import import_onnx

    return import_onnx(model)
