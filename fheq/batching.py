"""Batches of samples around the graph of one sample.

An array given by a caller has the samples along its port's batch axis (or along a new leading axis when the graph has
none). Inside, samples always lead: shape `(B, *port.type.shape)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fheq.arrays.namespace import array_namespace
from fheq.errors import DataError
from fheq.graph import Port, is_float

Array = Any


def split(port: Port, array: Array, what: str = "input") -> Array:
    """An array in the caller's layout to `(B, *port.type.shape)`.

    Raises:
        DataError: wrong rank or shape, naming the input.
    """
    shape, axis = port.type.shape, port.batch_axis
    got = np.shape(array)
    if axis is None:
        if got == shape:
            return array[None]
        if got[1:] == shape and len(got) == len(shape) + 1:
            return array
        raise DataError(f"{what} {port.name!r} has shape {got}; expected {shape} or (samples, *{shape})")
    if len(got) != len(shape) or (*got[:axis], 1, *got[axis + 1 :]) != shape:
        expected = tuple("N" if i == axis else d for i, d in enumerate(shape))
        raise DataError(f"{what} {port.name!r} has shape {got}; expected {_show(expected)}")
    moved = array_namespace(array).moveaxis(array, axis, 0)
    return moved.reshape(got[axis], *shape)


def join(port: Port, values: Array) -> Array:
    """Per-sample outputs `(B, *port.type.shape)` to the layout that the model gives for a batch."""
    axis = port.batch_axis
    if axis is None:
        return values
    xp = array_namespace(values)
    shape = port.type.shape
    moved = xp.moveaxis(values, 0, axis)
    return moved.reshape(*shape[:axis], values.shape[0] * shape[axis], *shape[axis + 1 :])


def doubled_axis(one: tuple[int, ...], two: tuple[int, ...]) -> int | None:
    """The one axis that is twice as long for two samples as it is for one."""
    if len(one) != len(two):
        return None
    changed = [i for i, (a, b) in enumerate(zip(one, two)) if a != b]
    return changed[0] if len(changed) == 1 and two[changed[0]] == 2 * one[changed[0]] else None


def example_arrays(example: Sequence[Any]) -> list[np.ndarray]:
    """Example inputs as numpy, float64 as float32.

    Raises:
        DataError: no inputs, no samples, a scalar, or different numbers of samples.
    """
    if not example:
        raise DataError("give example inputs: their shapes are those of the model")
    arrays = [np.asarray(x.detach().cpu() if hasattr(x, "detach") else x) for x in example]
    for i, array in enumerate(arrays):
        if array.ndim < 1 or array.shape[0] < 1:
            raise DataError(f"example input {i} has shape {array.shape}; samples are due along axis 0, one at least")
    counts = [array.shape[0] for array in arrays]
    if len(set(counts)) > 1:
        raise DataError(f"example inputs have {counts} samples; give as many of each")
    return [a.astype(np.float32) if a.dtype == np.float64 else a for a in arrays]


def split_all(ports: Sequence[Port], arrays: Sequence[Array], what: str = "input") -> list[Array]:
    """`split` for all ports, with equal numbers of samples.

    What is given once for an input without a batch axis, in the model's own shape, holds for every sample of the others.

    Raises:
        DataError: a wrong number of arrays, a wrong shape, or unequal numbers of samples.
    """
    if len(arrays) != len(ports):
        names = ", ".join(repr(p.name) for p in ports)
        raise DataError(f"the model takes {len(ports)} {what}s ({names}), but {len(arrays)} arrays were given")
    parts = [split(port, array, what) for port, array in zip(ports, arrays)]
    once = [port.batch_axis is None and np.shape(array) == port.type.shape for port, array in zip(ports, arrays)]
    count = max((len(part) for part, one in zip(parts, once) if not one), default=1)
    parts = [_repeated(part, count) if one else part for part, one in zip(parts, once)]
    sizes = {part.shape[0] for part in parts}
    if len(sizes) > 1:
        counts = ", ".join(f"{p.name!r}: {part.shape[0]}" for p, part in zip(ports, parts))
        raise DataError(f"{what}s have different numbers of samples ({counts})")
    return parts


def _repeated(part: Array, count: int) -> Array:
    return array_namespace(part).broadcast_to(part, (count, *part.shape[1:]))


def numbered(port: Port, values: Array) -> Array:
    """Numbers in place of strings (see `Port.labels`); one that the model does not know is the number after the last.

    Numbers stay as they are.
    """
    if port.labels is None or np.asarray(values).dtype.kind in "biuf":
        return values
    known, texts = np.asarray((*port.labels, ""), str), np.asarray(values, str)
    at = np.searchsorted(known[:-1], texts)
    return np.where(known[at] == texts, at, len(port.labels))


def filled(port: Port, values: Array) -> Array:
    """What stands for NaN in its place (see `Port.missing`)."""
    if port.missing is None or values.shape[-1:] != port.type.shape[-1:]:
        return values
    known = np.array([np.nan if v is None else v for v in port.missing], values.dtype).reshape(port.type.shape)
    xp = array_namespace(values)
    return xp.where(xp.isnan(values), known, values)


def check_arrays(ports: Sequence[Port], arrays: Sequence[Array]) -> list[np.ndarray]:
    """Arrays of real data, validated and in the inner layout.

    Raises:
        DataError: no samples, NaN or inf, a wrong dtype or shape; the message names the input.
    """
    checked = []
    for port, array in zip(ports, arrays):
        try:
            array = numbered(port, np.asarray(array))
        except ValueError as error:
            raise DataError(f"input {port.name!r} is not an array: {error}") from error
        want = port.type.dtype
        if is_float(want) and not is_float(array.dtype):
            raise DataError(f"input {port.name!r} has dtype {array.dtype}; expected floating point ({want})")
        if np.issubdtype(want, np.integer) and not np.issubdtype(array.dtype, np.integer):
            raise DataError(f"input {port.name!r} has dtype {array.dtype}; expected integers ({want})")
        if want == np.bool_ and array.dtype != np.bool_:
            raise DataError(f"input {port.name!r} has dtype {array.dtype}; expected bool")
        if is_float(array.dtype):
            array = filled(port, array)
            if not np.all(np.isfinite(array)):
                raise DataError(
                    f"input {port.name!r} contains NaN or infinity, which cannot be encrypted; clean the data, or impute it "
                    "by the first steps of the pipeline, before"
                )
        checked.append(array.astype(want, copy=False))
    if len(arrays) != len(ports):
        checked = list(arrays)
    parts = split_all(ports, checked)
    if parts and parts[0].shape[0] == 0:
        raise DataError(f"input {ports[0].name!r} holds no samples")
    return parts


def check_targets(targets: Any, count: int) -> None:
    """Checks targets of samples: a pytree of arrays.

    Raises:
        DataError: they are not as many as the samples, no numbers, or not finite.
    """
    for path, leaf in jax.tree_util.tree_flatten_with_path(targets)[0]:
        name, kind = f"targets{jax.tree_util.keystr(path)}", np.asarray(leaf).dtype
        if np.shape(leaf)[:1] != (count,):
            raise DataError(f"{name} must have {count} samples along the first axis, as the inputs; got {np.shape(leaf)}")
        if not (jnp.issubdtype(kind, jnp.number) or jnp.issubdtype(kind, np.bool_)):
            raise DataError(f"{name} must be numbers, got {kind}")
        if not np.all(np.isfinite(leaf)):
            raise DataError(f"{name} contains NaN or infinity: leave these samples out")


def over_samples(fn: Callable[..., Sequence[Array]], ports: Sequence[Port], arrays: Sequence[Array]) -> list[Array]:
    """Maps `fn`, from per-sample inputs to a sequence of per-sample outputs, over the samples of the arrays."""
    parts = split_all(ports, arrays)
    return list(jax.vmap(lambda *sample: tuple(fn(*sample)))(*parts))


def _show(shape: Sequence[Any]) -> str:
    return "(" + ", ".join(str(d) for d in shape) + ("," if len(shape) == 1 else "") + ")"
