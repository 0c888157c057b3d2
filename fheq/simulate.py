"""Batched evaluation of an integer program in JAX: exact, or with the noise of encrypted runs."""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import enable_x64

from fheq.affine import round_accumulator
from fheq.arguments import check_key
from fheq.arrays.compiled import compiled_for
from fheq.arrays.convolution import convolve
from fheq.arrays.taking import take
from fheq.batching import join, split, split_all
from fheq.encryption.failures import Ciphertexts, Reads, Widths, check_noise, deviations
from fheq.encryption.noise import Noise
from fheq.encryption.noise import noise as noise_of_parameters
from fheq.encryption.norms import Norms, squared
from fheq.errors import ArgumentError, DataError
from fheq.evaluate import unwrap
from fheq.form import Form, Numbers, form_of
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
    (see `fheq.encryption.failures`). Other noise, another p_error, and programs that differ in their numbers alone (see
    `fheq.form`), compile nothing anew.

    Args:
        inputs: integer arrays in the model's layout, each within its entry's [qmin, qmax].
        p_error: probability that one table fails, that parameters are chosen for; needs a key.
        noise: in its place what `fheq.noise` or a report of `fheq.cost` gives, to reuse it; needs a key.
        key: a key of `jax.random`. The same key gives the same results; noise differs by sample and element.

    Returns:
        Integer outputs in the model's layout; noise can drive them out of their quantizers' range.

    Raises:
        DataError: an array of another type or shape, or out of range, the message names the input; or the noise of another
            program.
        CompileError: no secure parameters are precise enough for p_error.
        ArgumentError: (a ValueError) a key without p_error or noise, these without a key or together, or a p_error
            outside of (0, 1).
    """
    if p_error is not None and noise is not None:
        raise ArgumentError("give either p_error or noise")
    noisy = p_error is not None or noise is not None
    if noisy and key is None:
        raise ArgumentError(
            "p_error and noise need a key: give key=jax.random.key(seed), or neither to simulate without noise"
        )
    if key is not None and not noisy:
        raise ArgumentError("key needs p_error (or noise): give p_error=1e-2, or no key to simulate without noise")
    if key is not None:
        check_key(key)
    arrays = check_integers(program, inputs)
    if p_error is not None:
        noise = noise_of_parameters(program, p_error)
    with enable_x64():
        form, numbers = form_of(program, noisy)
        noises = None
        if noise is not None:
            widths = Widths.of(program)
            reads = Reads.of(program, widths)
            check_noise(reads, noise)
            noises = widths, deviations(reads, noise, element_spread(program))
        return unwrap([np.asarray(out) for out in _simulate(form, numbers, noises, key, *arrays)])


@lru_cache(maxsize=4)
def element_spread(program: IntProgram) -> dict[str, np.ndarray]:
    """By value, each element's variance after leveled operations, relative to that of the noisiest."""
    ones = [np.ones(program.values[entry.value].shape, np.int64) for entry in program.inputs]
    with enable_x64():
        form, numbers = form_of(squared(program))
        found = jax.tree.map(np.asarray, _variances(form, numbers, Widths.of(program), *ones))
    return {name: v / max(np.max(v), 1) for name, v in found.items()}


@compiled_for(1)
def _variances(form: Form, numbers: Numbers, widths: Widths, *ones: Array) -> dict[str, Array]:
    """Those of values that tables, or the client, read, relative to an input's."""
    program = form.with_numbers(numbers)
    env = sample_values(program, form.wide, Norms(program, widths), ones)
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
    form: Form, numbers: Numbers, noises: tuple[Widths, Array] | None, key: Array | None, *inputs: Array
) -> list[Array]:
    program = form.with_numbers(numbers)
    samples = split_all([e.port for e in program.inputs], inputs)
    # by the sample's place, so that a sample's noise does not depend on the size of its batch
    keys = None if key is None else jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(len(samples[0])))
    parts = jax.vmap(partial(_sample, program, form.wide, noises))(keys, *samples)
    return [join(e.port, part) for e, part in zip(program.outputs, parts)]


def _sample(
    program: IntProgram, wide: bool, noises: tuple[Widths, Array] | None, key: Array | None, *sample: Array
) -> tuple[Array, ...]:
    ciphertexts = None if noises is None else Ciphertexts(program, *noises, key)
    env = sample_values(program, wide, ciphertexts, sample)
    outputs = [env[entry.value] for entry in program.outputs]
    if ciphertexts is not None:
        outputs = [ciphertexts.decrypt(i, x) for i, x in enumerate(outputs)]
    return tuple(x.astype(jnp.int64) for x in outputs)


def sample_values(
    program: IntProgram, wide: bool, ciphertexts: Ciphertexts | Norms | None, sample: tuple[Array, ...]
) -> dict[str, Array]:
    """Every value of a program for one sample, by name: exact, or as encrypted runs have them, or their variances.

    Args:
        program: by `Form.with_numbers`, as `wide` is of its form.
    """
    dtype = jnp.int64 if wide else jnp.int32
    env = {entry.value: x.astype(dtype) for entry, x in zip(program.inputs, sample)}
    for instruction in program.instructions:
        args = [env[a] for a in instruction.args]
        if isinstance(instruction, Lookup):
            read = _lookup if ciphertexts is None else ciphertexts.lookup
            result = read(instruction, args[0])
        elif isinstance(instruction, Round) and ciphertexts is not None:
            result = ciphertexts.round(instruction, args[0])
        else:
            if ciphertexts is not None:
                args = [ciphertexts.settle(*pair) for pair in zip(instruction.args, args)]
            result = _run(program, instruction, args)
        env[instruction.out] = result.astype(dtype)
    return env


def _run(program: IntProgram, instruction: Instruction, args: list[Array]) -> Array:
    x = args[0]
    shape = program.values[instruction.out].shape
    if isinstance(instruction, Gather):
        return _gather(instruction, args, shape)
    if isinstance(instruction, (MatMul, Convolution)):
        return _linear(instruction, x)
    if isinstance(instruction, SumLast):
        return jnp.sum(x, axis=-1, dtype=x.dtype)
    if isinstance(instruction, Shift):
        return x + instruction.amount.astype(x.dtype)
    if isinstance(instruction, Scale):
        return x * instruction.factor.astype(x.dtype)
    if isinstance(instruction, Plus):
        return x + instruction.sign * args[1]
    assert isinstance(instruction, Round)
    return round_accumulator(x, instruction.lsbs)


def _lookup(instruction: Lookup, x: Array) -> Array:
    index = (x >> instruction.lsbs) & ((1 << instruction.bits) - 1)
    return instruction.table[jnp.broadcast_to(instruction.group, x.shape), index]


def _gather(instruction: Gather, args: list[Array], shape: tuple[int, ...]) -> Array:
    flat = jnp.concatenate([a.ravel() for a in args]) if len(args) > 1 else args[0].ravel()
    if instruction.index is None:
        return flat.reshape(shape)
    return take(flat, instruction.index, instruction.fill)


def _linear(instruction: MatMul | Convolution, x: Array) -> Array:
    weight = instruction.weight
    x = x.astype(weight.dtype)
    if isinstance(instruction, MatMul):
        y = jnp.matmul(weight, x) if instruction.left else jnp.matmul(x, weight)
    else:
        y = convolve(x, weight, instruction.strides, instruction.dilations, instruction.group)
    return y.astype(jnp.int64)
