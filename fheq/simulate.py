"""Batched evaluation of an integer program in JAX: exact, or with the noise of encrypted runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import enable_x64

from fheq.arrays.compiled import compiled_for
from fheq.arrays.convolution import convolve
from fheq.arrays.taking import take
from fheq.batching import join, split, split_all
from fheq.encryption.failures import Ciphertexts, deviations
from fheq.encryption.noise import Noise
from fheq.encryption.noise import noise as noise_of_parameters
from fheq.encryption.norms import Norms, squared
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
NOISY_REACH = 2  # tables that change the sign of their results at most double what values and partial sums reach


def simulate(
    program: IntProgram,
    *inputs: Array,
    p_error: float | None = None,
    noise: Noise | None = None,
    key: Array | None = None,
) -> np.ndarray | tuple[np.ndarray, ...]:
    """Runs the program on integers, for whole batches: exactly, or with the noise of an encrypted run.

    Without a key it computes what the circuit computes when nothing fails: its clear evaluation. With one, tables read
    neighbouring entries as often as in encrypted runs, and values beyond an accumulator's width change the sign of its table
    (see `fheq.encryption.failures`). Other noise, and another p_error, compile nothing anew.

    Args:
        inputs: integer arrays in the model's layout, each within its entry's [qmin, qmax].
        p_error: probability that one table fails, that parameters are chosen for; needs a key.
        noise: in its place what `fheq.noise` or a report of `fheq.cost` gives, to reuse it; needs a key.
        key: a key of `jax.random`. The same key gives the same results; noise differs by sample and element.

    Returns:
        Integer outputs in the model's layout; noise can drive them out of their quantizers' range.

    Raises:
        DataError: an array of another type or shape, or out of range; the message names the input.
        CompileError: no secure parameters are precise enough for p_error.
        ValueError: a key without p_error or noise, these without a key or together, or a p_error outside of (0, 1).
    """
    if p_error is not None and noise is not None:
        raise ValueError("give either p_error or noise")
    noisy = p_error is not None or noise is not None
    if noisy and key is None:
        raise ValueError("p_error and noise need a key: give key=jax.random.key(seed), or neither to simulate without noise")
    if key is not None and not noisy:
        raise ValueError("key needs p_error (or noise): give p_error=1e-2, or no key to simulate without noise")
    arrays = check_integers(program, inputs)
    if p_error is not None:
        noise = noise_of_parameters(program, p_error)
    with enable_x64():
        tables = tuple(lookup.table for lookup in program.lookups)
        found = None if noise is None else deviations(program, noise, element_spread(program))
        return unwrap([np.asarray(out) for out in _simulate(program, tables, found, key, *arrays)])


def element_spread(program: IntProgram) -> dict[str, np.ndarray]:
    """By value, each element's variance after leveled operations, relative to that of the noisiest."""
    ones = [np.ones(program.values[entry.value].shape, np.int64) for entry in program.inputs]
    with enable_x64():
        found = jax.tree.map(np.asarray, _variances(program, *ones))
    return {name: v / max(np.max(v), 1) for name, v in found.items()}


@compiled_for(1)
def _variances(program: IntProgram, *ones: Array) -> dict[str, Array]:
    """Those of values that tables, or the client, read, relative to an input's."""
    env = sample_values(squared(program), (None,) * len(program.lookups), Norms(program), ones)
    read = {a for i in program.instructions if isinstance(i, (Lookup, Round)) for a in (i.args[0], i.out)}
    return {name: env[name] for name in read | {entry.value for entry in program.outputs}}


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


@compiled_for(1)
def _simulate(
    program: IntProgram,
    tables: tuple[Array, ...],
    deviations: Array | None,
    key: Array | None,
    *inputs: Array,
) -> list[Array]:
    """Tables are arguments: as constants of the compiled function they would make compiling slow."""
    samples = split_all([e.port for e in program.inputs], inputs)
    # by the sample's place, so that a sample's noise does not depend on the size of its batch
    keys = None if key is None else jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(samples[0])))
    parts = jax.vmap(partial(_sample, program, tables, deviations))(keys, *samples)
    return [join(e.port, part) for e, part in zip(program.outputs, parts)]


def _sample(
    program: IntProgram,
    tables: tuple[Array, ...],
    deviations: Array | None,
    key: Array | None,
    *sample: Array,
) -> tuple[Array, ...]:
    ciphertexts = None if deviations is None else Ciphertexts(program, deviations, key)
    env = sample_values(program, tables, ciphertexts, sample)
    outputs = [env[entry.value] for entry in program.outputs]
    if ciphertexts is not None:
        outputs = [ciphertexts.decrypt(i, x) for i, x in enumerate(outputs)]
    return tuple(x.astype(jnp.int64) for x in outputs)


def sample_values(
    program: IntProgram,
    tables: tuple[Array | None, ...],
    ciphertexts: Ciphertexts | Norms | None,
    sample: tuple[Array, ...],
) -> dict[str, Array]:
    """Every value of a program for one sample, by name: exact, or as encrypted runs have them, or their variances."""
    spare = 1 if ciphertexts is None else NOISY_REACH
    limit = 2**31 // spare
    dtype = jnp.int32 if all(v.low > -limit and v.high < limit for v in program.values.values()) else jnp.int64
    env = {entry.value: x.astype(dtype) for entry, x in zip(program.inputs, sample)}
    waiting = iter(tables)
    for instruction in program.instructions:
        args = [env[a] for a in instruction.args]
        if isinstance(instruction, Lookup):
            read = _lookup if ciphertexts is None else ciphertexts.lookup
            result = read(instruction, next(waiting), args[0])
        elif isinstance(instruction, Round) and ciphertexts is not None:
            result = ciphertexts.round(instruction, args[0])
        else:
            if ciphertexts is not None:
                args = [ciphertexts.settle(*pair) for pair in zip(instruction.args, args)]
            result = _run(program, instruction, args, spare)
        env[instruction.out] = result.astype(dtype)
    return env


def _run(program: IntProgram, instruction: Instruction, args: list[Array], spare: int) -> Array:
    x = args[0]
    shape = program.values[instruction.out].shape
    if isinstance(instruction, Gather):
        return _gather(instruction, args, shape)
    if isinstance(instruction, (MatMul, Convolution)):
        return _linear(instruction, x, _float_type(program, instruction, spare))
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
    return take(flat, instruction.index, instruction.fill)


def _float_type(program: IntProgram, instruction: MatMul | Convolution, spare: int) -> Any:
    """The float type in which every partial sum is an exact integer: float products are far faster than integer ones."""
    value = program.values[instruction.args[0]]
    weight = np.abs(instruction.weight)
    if isinstance(instruction, MatMul):
        terms = weight.sum(axis=-1 if instruction.left else -2)
    else:
        terms = weight.reshape(len(weight), -1).sum(axis=1)
    reach = int(terms.max()) * max(abs(value.low), abs(value.high)) * spare
    return jnp.float32 if reach < 2**24 else jnp.float64


def _linear(instruction: MatMul | Convolution, x: Array, dtype: Any) -> Array:
    weight = jnp.asarray(instruction.weight, dtype)
    x = x.astype(dtype)
    if isinstance(instruction, MatMul):
        y = jnp.matmul(weight, x) if instruction.left else jnp.matmul(x, weight)
    else:
        y = convolve(x, weight, instruction.strides, instruction.dilations, instruction.group)
    return y.astype(jnp.int64)
