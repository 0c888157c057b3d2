"""`TensorProto` to numpy, its sizes being checked before any memory is taken."""

from __future__ import annotations

import math

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from fheq.errors import ModelError, UnsupportedError

MAX_ELEMENTS = 2**28
_PACKED = {
    TensorProto.INT4: 2,
    TensorProto.UINT4: 2,
    TensorProto.FLOAT4E2M1: 2,
    **{getattr(TensorProto, name): 4 for name in ("INT2", "UINT2") if hasattr(TensorProto, name)},
}


def dtype_of(elem_type: int, what: str) -> np.dtype:
    """The numpy dtype of an ONNX element type.

    Raises:
        ModelError: no such type.
        UnsupportedError: strings or complex numbers.
    """
    if elem_type not in TensorProto.DataType.values() or elem_type == TensorProto.UNDEFINED:
        raise ModelError(f"{what} has the unknown element type {elem_type}")
    if elem_type in (TensorProto.STRING, TensorProto.COMPLEX64, TensorProto.COMPLEX128):
        name = TensorProto.DataType.Name(elem_type).lower()
        raise UnsupportedError(f"{what} holds {name} elements; fheq computes on real numbers, integers and booleans only")
    return np.dtype(helper.tensor_dtype_to_np_dtype(elem_type))


def to_array(tensor: TensorProto, what: str, *, strings: bool = False, nan: bool = False) -> np.ndarray:
    """A tensor as numpy; strings, as an array of objects, and NaN only where they are asked for.

    Raises:
        ModelError: a size that does not match the data, external data that was not loaded, NaN.
    """
    if tensor.data_location == TensorProto.EXTERNAL and not tensor.HasField("raw_data"):
        raise ModelError(f"{what} keeps its values in another file, which is not loaded; give import_onnx the model's path")
    if strings and tensor.data_type == TensorProto.STRING:
        return np.asarray([s.decode() for s in tensor.string_data], dtype=object).reshape(tuple(tensor.dims))
    dtype = dtype_of(tensor.data_type, what)
    count = _count(tensor.dims, what)
    per_byte = _PACKED.get(tensor.data_type, 1)
    if tensor.HasField("raw_data"):
        have, need = len(tensor.raw_data), math.ceil(count / per_byte) if per_byte > 1 else count * dtype.itemsize
        unit = "bytes"
    else:
        field = getattr(tensor, helper.tensor_dtype_to_field(tensor.data_type))
        have, need, unit = len(field), math.ceil(count / per_byte), "values"
    if have != need:
        raise ModelError(f"{what} has shape {tuple(tensor.dims)}, which takes {need} {unit}, but holds {have}")
    array = np.asarray(numpy_helper.to_array(tensor)).astype(dtype, copy=False).reshape(tuple(tensor.dims))
    return array if nan else refuse_nan(array, what)


def to_dense(sparse: onnx.SparseTensorProto, what: str) -> np.ndarray:
    """A sparse tensor as a dense array.

    Raises:
        ModelError: indices outside the shape, or a wrong number of them.
    """
    count = _count(sparse.dims, what)
    if count > MAX_ELEMENTS:
        raise ModelError(f"{what} has shape {tuple(sparse.dims)}, which is more than {MAX_ELEMENTS} elements")
    values, indices = to_array(sparse.values, what), to_array(sparse.indices, what)
    shape = tuple(sparse.dims)
    if values.ndim != 1 or indices.shape not in {(len(values),), (len(values), len(shape))}:
        raise ModelError(f"{what} has {values.shape} sparse values with indices of shape {indices.shape}")
    limits = np.array(shape if indices.ndim == 2 else [count])
    if np.any(indices < 0) or np.any(indices.reshape(len(values), -1) >= limits):
        raise ModelError(f"{what} has sparse indices outside its shape {shape}")
    dense = np.zeros(shape, values.dtype)
    if indices.ndim == 2:
        dense[tuple(indices.T)] = values
    else:
        dense.reshape(-1)[indices] = values
    return dense


def refuse_nan(array: np.ndarray, what: str) -> np.ndarray:
    """The array, unless it holds NaN.

    Raises:
        ModelError: it does.
    """
    with np.errstate(invalid="ignore"):
        if array.dtype.kind not in "biuO" and np.any(np.isnan(array.astype(np.float64, copy=False))):
            raise ModelError(f"{what} contains NaN; train or export the model again")
    return array


def _count(dims, what: str) -> int:
    if any(d < 0 for d in dims):
        raise ModelError(f"{what} has a negative size in its shape {tuple(dims)}")
    return math.prod(dims)
