"""Compilation with concrete-python, and encrypted runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from threading import Lock
from typing import Any

import numpy as np

from fheq.batching import join, split_all
from fheq.compiling.signals import broken_pipes_raise
from fheq.compiling.tracing import Tracing, bare_outputs
from fheq.display.progress import track
from fheq.encryption.decryption import centred, decrypted_bits, removed_bits
from fheq.encryption.noise import failure_probabilities
from fheq.errors import ArgumentError, CompileError, DataError
from fheq.evaluate import as_tuple, unwrap
from fheq.optimizer.leveled import WIDEST_CAST
from fheq.optimizer.solve import solve
from fheq.program import IntProgram
from fheq.simulate import check_integers


@dataclass(frozen=True, eq=False)
class Circuit:
    """A compiled program.

    Args:
        program: what was compiled.
        p_error: probability that one table fails, as asked for (None when global_p_error was given).
        global_p_error: probability that any table of a run fails, as asked for.
        concrete: concrete-python's own `Circuit`, for what is not wrapped here.
    """

    program: IntProgram
    p_error: float | None
    global_p_error: float | None
    concrete: Any

    def __str__(self) -> str:
        error = f"p_error={self.p_error:g}" if self.p_error is not None else f"global_p_error={self.global_p_error:g}"
        return f"Circuit({error}, complexity={self.complexity:.4g}, bootstraps={self.bootstraps})"

    @property
    def complexity(self) -> float:
        """concrete's estimate of the work of one run, in elementary operations."""
        return float(self.concrete.complexity)

    @property
    def bootstraps(self) -> int:
        """Programmable bootstraps of one run."""
        return int(self.concrete.programmable_bootstrap_count)

    def keygen(self, force: bool = False) -> None:
        """Generates the keys, once unless forced."""
        self.concrete.keygen(force)

    def encrypt(self, *inputs: Any, quantized: bool = False) -> list[tuple[Any, ...]]:
        """Encrypts a batch.

        Args:
            inputs: real arrays in the model's layout (integers of the program when `quantized`).

        Returns:
            One tuple of ciphertexts per sample.

        Raises:
            DataError: an array does not fit its input.
        """
        samples = self._samples(inputs, quantized)
        return [as_tuple(self.concrete.encrypt(*sample)) for sample in samples]

    def run(self, encrypted: Sequence[tuple[Any, ...]], progress: bool | None = None) -> list[tuple[Any, ...]]:
        """Runs the circuit on every encrypted sample."""
        with broken_pipes_raise():
            return [as_tuple(self.concrete.run(*sample)) for sample in track(encrypted, "running encrypted", progress)]

    def decrypt(self, encrypted: Sequence[tuple[Any, ...]], quantized: bool = False) -> Any:
        """Decrypts results to real arrays in the model's layout (to integers when `quantized`)."""
        return self._outputs([self._integers(as_tuple(self.concrete.decrypt(*s))) for s in encrypted], quantized)

    def __call__(self, *inputs: Any, quantized: bool = False, progress: bool | None = None) -> Any:
        """Encrypts, runs and decrypts a batch; makes keys if there are none."""
        return self.decrypt(self.run(self.encrypt(*inputs, quantized=quantized), progress), quantized)

    @cached_property
    def _decryption(self) -> list[tuple[int, int]]:
        """Width and removed low bits of each output's ciphertext."""
        return list(zip(decrypted_bits(self.program), removed_bits(self.program)))

    def _integers(self, sample: tuple[Any, ...]) -> tuple[np.ndarray, ...]:
        """The program's outputs from what concrete decrypts."""
        found = zip(sample, self._decryption)
        return tuple(centred(np.asarray(v, np.int64), bits) << lsbs for v, (bits, lsbs) in found)

    def evaluate(self, *inputs: Any, quantized: bool = False) -> Any:
        """The circuit's clear evaluation by concrete, without encryption or noise."""
        return self._outputs([as_tuple(self.concrete.graph(*s)) for s in self._samples(inputs, quantized)], quantized)

    def simulate(self, *inputs: Any, quantized: bool = False) -> Any:
        """concrete's simulation of the encrypted run, noise included; it needs no keys, and its results vary.

        Args:
            inputs: real arrays in the model's layout (integers of the program when `quantized`).

        Returns:
            Real outputs in the model's layout (integers when `quantized`).
        """
        self.concrete.enable_fhe_simulation()
        samples = self._samples(inputs, quantized)
        with broken_pipes_raise():
            results = [self._integers(as_tuple(self.concrete.simulate(*s))) for s in samples]
        return self._outputs(results, quantized)

    def _samples(self, inputs: Sequence[Any], quantized: bool) -> list[tuple[np.ndarray, ...]]:
        ports = [entry.port for entry in self.program.inputs]
        if not quantized:
            inputs = self.program.quantize(*inputs)
        parts = split_all(ports, check_integers(self.program, tuple(inputs)))
        if len(parts[0]) == 0:
            raise DataError(f"input {ports[0].name!r} holds no samples")
        return list(zip(*parts))

    def _outputs(self, samples: list[tuple[Any, ...]], quantized: bool) -> Any:
        columns = []
        for entry, column in zip(self.program.outputs, zip(*samples)):
            values = np.stack([np.asarray(v, np.int64).reshape(entry.port.type.shape) for v in column])
            columns.append(join(entry.port, values))
        return unwrap(columns if quantized else list(self.program.dequantize(*columns)))


def compile(
    program: IntProgram,
    p_error: float | None = None,
    global_p_error: float | None = None,
    *,
    clear: Iterable[str] = (),
) -> Circuit:
    """Compiles a program to a circuit.

    Args:
        program: what `lower` gives.
        p_error: probability that one table lookup fails; 1e-5 when neither probability is given.
        global_p_error: probability that any table lookup of one run fails.
        clear: names of inputs that are not encrypted.

    Raises:
        CompileError: no cryptographic parameters exist, or concrete-python refuses the program; the message says what to
            change.
        DataError: `program` is something else.
        ArgumentError: (a ValueError) a probability outside of (0, 1), both probabilities, or an unknown name in `clear`.
    """
    if not isinstance(program, IntProgram):
        raise DataError(f"compile takes a program, which lower gives; got {type(program).__name__}")
    p_error, global_p_error = failure_probabilities(p_error, global_p_error)
    clear = frozenset(clear)
    names = [entry.code.port.name if entry.code else entry.name for entry in program.inputs]
    unknown = clear.difference(names)
    if unknown:
        raise ArgumentError(f"clear names unknown inputs {sorted(unknown)}; there are {list(dict.fromkeys(names))}")
    clear = frozenset(entry.name for entry, name in zip(program.inputs, names) if name in clear)
    return Circuit(program, p_error, global_p_error, _compile(program, p_error, global_p_error, clear))


_COMPILING = Lock()  # concrete's compiler, and the solver that it uses, serve one thread at a time


def _set_up_thread() -> None:
    """Gives concrete the state of tracing that it sets up only in the thread that imports it."""
    tag, rounding, truncation = (
        import_module(f"concrete.fhe.extensions.{name}") for name in ("tag", "round_bit_pattern", "truncate_bit_pattern")
    )
    if not hasattr(tag.tag_context, "stack"):
        tag.tag_context.stack = []
    for module in (rounding, truncation):
        if not hasattr(module.local, "_is_adjusting"):
            module.local._is_adjusting = False


def _compile(program: IntProgram, p_error: float | None, global_p_error: float | None, clear: frozenset[str]) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="pkg_resources")  # concrete's own import of it
        from concrete import fhe

    _set_up_thread()
    # What concrete resorts to where no native parameters exist.
    on_residues = bool(program.lookups) and solve(program, p_error, global_p_error).solution.point is None
    tracing = Tracing(program, clear, multiplied=on_residues)
    statuses = {f"x{i}": "clear" if e.name in clear else "encrypted" for i, e in enumerate(program.inputs)}
    configuration = fhe.Configuration(
        p_error=p_error,
        global_p_error=global_p_error,
        show_progress=False,
        dump_artifacts_on_unexpected_failures=False,
        approximate_rounding_config=fhe.ApproximateRoundingConfig(
            logical_clipping=False, approximate_clipping_start_precision=False
        ),
        # Tables on residues read all bits of what is connected; native ones are narrowed to their own.
        optimize_tlu_based_on_original_bit_width=False if on_residues else WIDEST_CAST,
        additional_post_processors=[bare_outputs()],
    )
    sample = tuple(np.zeros(entry.port.type.shape, np.int64) for entry in program.inputs)
    compiler = fhe.Compiler(tracing.function(), statuses)
    try:
        with _COMPILING:
            graph = compiler.trace([sample], configuration)
            measure = graph.measure_bounds
            graph.measure_bounds = lambda inputset: tracing.bounds(measure(inputset))
            tracing.size_unread_inputs(graph)
            return compiler.compile([sample], configuration)
    except (RuntimeError, ValueError, AssertionError, TypeError, LookupError, NotImplementedError) as error:
        raise CompileError(_explain(program, error)) from error


def _explain(program: IntProgram, error: Exception) -> str:
    lines = (str(error) or type(error).__name__).strip().splitlines()
    # Beneath what it cannot compile concrete writes why; else the last line says it.
    reason = " ".join(line.strip(" ^") for line in lines if line.startswith("^")) or lines[-1]
    widest = max(program.lookups, key=lambda t: t.bits, default=None)
    if widest is None:
        return f"concrete-python cannot compile the program: {reason}"
    bits = f"its widest table, of {widest.origin!r}, reads {widest.bits} bits"
    return (
        f"concrete-python cannot compile the program ({bits}): {reason}. "
        "Lower n_bits or round accumulators, for instance rounding=Rounding(6, approximate=True)"
    )
