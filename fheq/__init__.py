"""fheq quantizes ONNX models and compiles them to run on encrypted data.

`import fheq` loads neither onnx nor concrete nor torch: they are imported when a model is read or a circuit made.
"""

from __future__ import annotations

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING

from fheq import post_training as post_training
from fheq.affine import Affine as Affine
from fheq.attribute import Attribution as Attribution
from fheq.attribute import attribute as attribute
from fheq.calibrate import CalibrationWarning as CalibrationWarning
from fheq.calibrate import calibrate as calibrate
from fheq.check import Problem as Problem
from fheq.check import check as check
from fheq.circuit import Circuit as Circuit
from fheq.circuit import compile as compile
from fheq.cost import Report as Report
from fheq.cost import cost as cost
from fheq.encryption.noise import Noise as Noise
from fheq.encryption.noise import noise as noise
from fheq.encryption.table_noise import TableNoise as TableNoise
from fheq.encryption.table_noise import table_noise as table_noise
from fheq.errors import FheqError as FheqError
from fheq.evaluate import evaluate as evaluate
from fheq.fake_quant import fake_quant as fake_quant
from fheq.fit import fit as fit
from fheq.fit import fit_each as fit_each
from fheq.frameworks import from_keras as from_keras
from fheq.frameworks import from_sklearn as from_sklearn
from fheq.frameworks import from_torch as from_torch
from fheq.graph import Graph as Graph
from fheq.jaxpr import from_jax as from_jax
from fheq.lower import lower as lower
from fheq.many import Compiled as Compiled
from fheq.many import compile_many as compile_many
from fheq.observers import MeanSquaredError as MeanSquaredError
from fheq.observers import MinMax as MinMax
from fheq.observers import Percentile as Percentile
from fheq.observing.entropy import Entropy as Entropy
from fheq.overflow import Overflow as Overflow
from fheq.overflow import overflow as overflow
from fheq.program import IntProgram as IntProgram
from fheq.qparams import QParams as QParams
from fheq.reconstruct import Training as Training
from fheq.reconstruct import reconstruct as reconstruct
from fheq.rewriting.maxima import maxima_as_sums as maxima_as_sums
from fheq.scores import Score as Score
from fheq.search import search as search
from fheq.searching.front import Front as Front
from fheq.searching.front import Point as Point
from fheq.searching.space import Space as Space
from fheq.simulate import simulate as simulate
from fheq.spec import AccumulatorRange as AccumulatorRange
from fheq.spec import Granularity as Granularity
from fheq.spec import Override as Override
from fheq.spec import Rounding as Rounding
from fheq.spec import Spec as Spec
from fheq.spec import Symmetry as Symmetry
from fheq.sweep import sweep as sweep
from fheq.sweeping.configurations import grid as grid
from fheq.sweeping.configurations import stack as stack
from fheq.sweeping.sweep_results import Results as Results
from fheq.tuning.balance import balance as balance
from fheq.tuning.bias_correction import correct_biases as correct_biases
from fheq.tuning.edits import chain as chain
from fheq.tuning.edits import masked as masked
from fheq.tuning.edits import partition as partition
from fheq.tuning.edits import select as select
from fheq.tuning.prune import prune as prune
from fheq.tuning.round_weights import round_weights as round_weights

if TYPE_CHECKING:
    from onnx import ModelProto


def import_onnx(model: str | PathLike | bytes | ModelProto, *, dims: Mapping[str, int] | None = None) -> Graph:
    """Reads an ONNX model as the graph of one sample: see `fheq.onnx.import_onnx`."""
    from fheq.onnx import import_onnx as read

    return read(model, dims=dims)


def export_qdq(graph: Graph, qparams: QParams) -> ModelProto:
    """Writes the quantized model as ONNX with QuantizeLinear and DequantizeLinear: see `fheq.onnx.export.export_qdq`."""
    from fheq.onnx.export import export_qdq as write

    return write(graph, qparams)
