"""Batch axes and static shapes of the inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from fheq.batching import doubled_axis
from fheq.errors import ShapeError
from fheq.graph import Port, TensorType
from fheq.onnx.declarations import Input
from fheq.onnx.tensors import MAX_ELEMENTS

Types = Mapping[str, TensorType]


def input_ports(inputs: Sequence[Input], dims: Mapping[str, int] | None = None) -> tuple[Port, ...]:
    """The inputs for one sample.

    Sizes come from `dims` first (by symbol, or as "input[axis]" for an axis without one). Then axis 0 is the batch axis if
    its size is still open, else the first open axis. Without any open axis, an axis 0 of size 1 is the batch axis.

    Raises:
        ShapeError: another size is open, or `dims` does not fit; naming the input, the axis and the remedy.
    """
    dims = dict(dims or {})
    _check_dims(dims, inputs)
    shapes = {value.name: _fixed(value, dims) for value in inputs}
    any_open = any(not isinstance(d, int) for shape in shapes.values() for d in shape)
    ports = []
    for value in inputs:
        shape = shapes[value.name]
        if any_open:
            axis = next((i for i, d in enumerate(shape) if not isinstance(d, int)), None)
        else:
            axis = 0 if shape and shape[0] == 1 else None
        static = tuple(_size(value, shape, i, axis) for i in range(len(shape)))
        if math.prod(static) > MAX_ELEMENTS:
            raise ShapeError(f"input {value.name!r} has shape {static}: more than {MAX_ELEMENTS} elements")
        ports.append(Port(value.name, TensorType(static, value.dtype), axis))
    return tuple(ports)


def grown(ports: Iterable[Port], symbolic: bool, size: int) -> dict[str, TensorType] | None:
    """The input types for a batch of `size`, or None where the model states a batch of 1 or has none."""
    if not symbolic:
        return None
    types = {}
    for port in ports:
        shape, axis = port.type.shape, port.batch_axis
        if axis is not None:
            shape = (*shape[:axis], size, *shape[axis + 1 :])
        types[port.name] = TensorType(shape, port.type.dtype)
    return types


def output_ports(names: Iterable[str], types: Types, types_of_two: Types | None) -> tuple[Port, ...]:
    """The outputs: the batch axis is the one axis that doubles with a batch of two.

    Where that is not known (`types_of_two` is None), it is axis 0 if its size is 1.
    """
    ports = []
    for name in names:
        shape = types[name].shape
        axis: int | None
        if types_of_two is None:
            axis = 0 if shape and shape[0] == 1 else None
        else:
            axis = doubled_axis(shape, types_of_two[name].shape)
        ports.append(Port(name, types[name], axis))
    return tuple(ports)


def is_symbolic(inputs: Sequence[Input], dims: Mapping[str, int] | None) -> bool:
    """Whether an axis of an input stays open."""
    return any(not isinstance(d, int) for value in inputs for d in _fixed(value, dict(dims or {})))


def _fixed(value: Input, dims: Mapping[str, int]) -> tuple[int | str | None, ...]:
    if value.dims is None:
        raise ShapeError(
            f"input {value.name!r} has no shape; export the model with input shapes (a symbolic batch axis is fine)"
        )
    return tuple(
        d if isinstance(d, int) else dims.get(d or "", dims.get(f"{value.name}[{i}]", d)) for i, d in enumerate(value.dims)
    )


def _size(value: Input, shape: Sequence[int | str | None], index: int, batch: int | None) -> int:
    dim = shape[index]
    if isinstance(dim, int):
        return dim
    if index == batch:
        return 1
    symbol = dim or f"{value.name}[{index}]"
    if batch is not None and dim is not None and dim == shape[batch]:
        raise ShapeError(
            f"input {value.name!r}: axis {index} has the size {dim!r}, which is the batch (axis {batch}); fheq maps "
            f"models over the samples of a batch, so state this size: dims={{{symbol!r}: 32}}"
        )
    raise ShapeError(
        f"input {value.name!r}: axis {index} has no static size ({dim or 'unknown'}); state it: "
        f"import_onnx(model, dims={{{symbol!r}: 32}})"
    )


def _check_dims(dims: Mapping[str, int], inputs: Sequence[Input]) -> None:
    symbols = {d or f"{v.name}[{i}]" for v in inputs for i, d in enumerate(v.dims or ()) if not isinstance(d, int)}
    for name, size in dims.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ShapeError(f"dims: {name!r} is {size!r}; a size must be a positive integer")
        if name not in symbols:
            raise ShapeError(f"dims: no input has a dim {name!r}; the open dims are {', '.join(sorted(symbols)) or 'none'}")
