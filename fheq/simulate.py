"""Exact, batched evaluation of an integer program in JAX."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import enable_x64

from fheq.batching import join, over_samples, split
from fheq.errors import DataError
from fheq.evaluate import unwrap
from fheq.program import (
    Convolution,
    Gather,
    Instruction,
    IntProgram,
    Lookup,
    MatMul,
    Plus,
    Round,
    Scale,
    Shift,
    SumLast,
)

Array = Any


def simulate(program: IntProgram, *inputs: Array) -> np.ndarray | tuple[np.ndarray, ...]:
    """Runs the program on integers: what the circuit computes without noise, for whole batches.

    Args:
        inputs: integer arrays in the model's layout, each within its entry's [qmin, qmax].

    Returns:
        Integer outputs in the model's layout.

    Raises:
        DataError: an array of another type or shape, or out of range; the message names the input.
    """
    arrays = check_integers(program, inputs)
    with enable_x64():
        tables = tuple(lookup.table for lookup in program.lookups)
        return unwrap([np.asarray(out) for out in _simulate(program, tables, *arrays)])


def check_integers(program: IntProgram, inputs: tuple[Array, ...]) -> list[np.ndarray]:
    """Integer inputs of a program, validated."""
    if len(inputs) != len(program.inputs):
        names = ", ".join(repr(e.name) for e in program.inputs)
        raise DataError(f"the program takes {len(program.inputs)} inputs ({names}), but {len(inputs)} arrays were given")
    arrays = []
    for entry, q in zip(program.inputs, inputs):
        q = np.asarray(q)
        if not np.issubdtype(q.dtype, np.integer):
            raise DataError(f"input {entry.name!r} has dtype {q.dtype}; expected integers (see program.quantize)")
        split(entry.port, q)
        affine = entry.affine.expanded(q.ndim)
        if np.any(q < affine.qmin) or np.any(q > affine.qmax):
            raise DataError(f"input {entry.name!r} has integers outside of its quantizer's [qmin, qmax]")
        arrays.append(q.astype(np.int64))
    return arrays


@partial(jax.jit, static_argnums=0)
def _simulate(program: IntProgram, tables: tuple[Array, ...], *inputs: Array) -> list[Array]:
    """Tables are arguments: as constants of the compiled function they would make compiling slow."""
    parts = over_samples(partial(_sample, program, tables), [e.port for e in program.inputs], inputs)
    return [join(e.port, part) for e, part in zip(program.outputs, parts)]


def _sample(program: IntProgram, tables: tuple[Array, ...], *sample: Array) -> tuple[Array, ...]:
    dtype = jnp.int32 if all(v.low > -(2**31) and v.high < 2**31 for v in program.values.values()) else jnp.int64
    env = {entry.value: x.astype(dtype) for entry, x in zip(program.inputs, sample)}
    waiting = iter(tables)
    for instruction in program.instructions:
        args = [env[a] for a in instruction.args]
        if isinstance(instruction, Lookup):
            result = _lookup(instruction, next(waiting), args[0])
        else:
            result = _run(program, instruction, args)
        env[instruction.out] = result.astype(dtype)
    return tuple(env[entry.value].astype(jnp.int64) for entry in program.outputs)


def _run(program: IntProgram, instruction: Instruction, args: list[Array]) -> Array:
    x = args[0]
    shape = program.values[instruction.out].shape
    if isinstance(instruction, Gather):
        return _gather(instruction, args, shape)
    if isinstance(instruction, (MatMul, Convolution)):
        return _linear(instruction, x, _float_type(program, instruction))
    if isinstance(instruction, SumLast):
        return jnp.sum(x, axis=-1, dtype=x.dtype)
    if isinstance(instruction, Shift):
        return x + instruction.amount.astype(x.dtype)
    if isinstance(instruction, Scale):
        return x * instruction.factor.astype(x.dtype)
    if isinstance(instruction, Plus):
        return x + instruction.sign * args[1]
    assert isinstance(instruction, Round)
    return (x + (1 << instruction.lsbs >> 1)) >> instruction.lsbs << instruction.lsbs


def _lookup(instruction: Lookup, table: Array, x: Array) -> Array:
    index = (x >> instruction.lsbs) & ((1 << instruction.bits) - 1)
    group = jnp.asarray(instruction.group.astype(np.int32))
    return table[jnp.broadcast_to(group, x.shape), index]


def _gather(instruction: Gather, args: list[Array], shape: tuple[int, ...]) -> Array:
    flat = jnp.concatenate([a.ravel() for a in args]) if len(args) > 1 else args[0].ravel()
    if instruction.index is None:
        return flat.reshape(shape)
    values = flat[np.maximum(instruction.index, 0)]
    if instruction.fill is None:
        return values
    return jnp.where(instruction.index < 0, instruction.fill.astype(values.dtype), values)


def _float_type(program: IntProgram, instruction: MatMul | Convolution) -> Any:
    """The float type in which every partial sum is an exact integer: float products are far faster than integer ones."""
    value = program.values[instruction.args[0]]
    weight = np.abs(instruction.weight)
    if isinstance(instruction, MatMul):
        terms = weight.sum(axis=-1 if instruction.left else -2)
    else:
        terms = weight.reshape(len(weight), -1).sum(axis=1)
    reach = int(terms.max()) * max(abs(value.low), abs(value.high))
    return jnp.float32 if reach < 2**24 else jnp.float64


def _linear(instruction: MatMul | Convolution, x: Array, dtype: Any) -> Array:
    weight = jnp.asarray(instruction.weight, dtype)
    x = x.astype(dtype)
    if isinstance(instruction, MatMul):
        y = jnp.matmul(weight, x) if instruction.left else jnp.matmul(x, weight)
    else:
        y = jax.lax.conv_general_dilated(
            x,
            weight,
            instruction.strides,
            [(0, 0)] * (weight.ndim - 2),
            rhs_dilation=instruction.dilations,
            feature_group_count=instruction.group,
            precision=jax.lax.Precision.HIGHEST,
        )
    return y.astype(jnp.int64)
