"""What a graph of a model declares: its inputs, and its known tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from fheq.errors import ModelError, UnsupportedError
from fheq.onnx.tensors import dtype_of, to_array, to_dense


@dataclass(frozen=True)
class Input:
    """A model input as declared: each dim a size, a symbol, or None when unknown; `dims` is None without a rank.

    Strings have the dtype object.
    """

    name: str
    dtype: np.dtype
    dims: tuple[int | str | None, ...] | None


def read_input(value: onnx.ValueInfoProto) -> Input:
    """An input of a model.

    Raises:
        ModelError: it has no name, or an element type that ONNX does not have.
        UnsupportedError: it is no tensor, or holds what fheq does not compute with.
    """
    what = f"input {value.name!r}"
    if not value.name:
        raise ModelError("an input of the model has no name")
    if value.type.WhichOneof("value") != "tensor_type":
        kind = value.type.WhichOneof("value") or "no type"
        raise UnsupportedError(
            f"{what} is no tensor ({kind}); fheq takes dense tensors: give each element as an input of its own"
        )
    tensor = value.type.tensor_type
    dims = tuple(_dim(d) for d in tensor.shape.dim) if tensor.HasField("shape") else None
    dtype = np.dtype(object) if tensor.elem_type == onnx.TensorProto.STRING else dtype_of(tensor.elem_type, what)
    return Input(value.name, dtype, dims)


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value) if dim.dim_value > 0 else None
    return dim.dim_param or None


def known_tensors(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """The initializers of a graph, sparse ones as dense.

    Raises:
        ModelError: a name twice or none, or a bad tensor.
    """
    constants: dict[str, np.ndarray] = {}
    for tensor in graph.initializer:
        _check_new(tensor.name, constants)
        constants[tensor.name] = to_array(tensor, f"initializer {tensor.name!r}", strings=True)
    for sparse in graph.sparse_initializer:
        _check_new(sparse.values.name, constants)
        constants[sparse.values.name] = to_dense(sparse, f"initializer {sparse.values.name!r}")
    return constants


def _check_new(name: str, constants: Mapping[str, np.ndarray]) -> None:
    if not name or name in constants:
        raise ModelError(f"initializer {name!r} is there twice" if name else "an initializer has no name")


def no_doubles(names: Sequence[str], what: str) -> None:
    """Refuses a name that is there twice.

    Raises:
        ModelError: there is one.
    """
    for name in names:
        if names.count(name) > 1:
            raise ModelError(f"{what} {name!r} is there twice; names must be unique")
