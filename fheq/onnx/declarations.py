"""What a graph of a model declares: its inputs, and its known tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx

from fheq.errors import ModelError, UnsupportedError
from fheq.onnx.subgraphs import read_names
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
    """The initializers of a graph that anything reads, or that are values of its inputs; sparse ones as dense.

    Raises:
        ModelError: a name twice or none, or a bad tensor.
    """
    names = [*(tensor.name for tensor in graph.initializer), *(sparse.values.name for sparse in graph.sparse_initializer)]
    if "" in names:
        raise ModelError("an initializer has no name")
    no_doubles(names, "initializer")
    wanted = read_names(graph) | {value.name for value in graph.input}
    dense = {t.name: to_array(t, f"initializer {t.name!r}", strings=True) for t in graph.initializer if t.name in wanted}
    sparse = (sparse for sparse in graph.sparse_initializer if sparse.values.name in wanted)
    return dense | {t.values.name: to_dense(t, f"initializer {t.values.name!r}") for t in sparse}


def no_doubles(names: Sequence[str], what: str) -> None:
    """Refuses a name that is there twice.

    Raises:
        ModelError: there is one.
    """
    for name, count in Counter(names).items():
        if count > 1:
            raise ModelError(f"{what} {name!r} is there twice; names must be unique")
