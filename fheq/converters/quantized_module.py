"""A quantized model as one object: float in, float out, in the clear, in simulation or encrypted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fheq.batching import check_arrays, split_all
from fheq.circuit import Circuit
from fheq.circuit import compile as compile_program
from fheq.errors import ArgumentError, FheqError
from fheq.evaluate import unwrap
from fheq.graph import Graph
from fheq.program import IntProgram, Value
from fheq.qparams import QParams
from fheq.simulate import simulate

MODES = ("disable", "simulate", "execute")

Array = Any


class NotCompiledError(FheqError):
    """A module was asked for what only a compiled one can do."""


@dataclass(frozen=True, eq=False)
class QuantizedModule:
    """A quantized model. No method changes it: `compile` gives another one.

    Args:
        graph: the float model.
        qparams: its quantizers.
        program: what they lower to.
        circuit: the compiled program; None until `compile`.
    """

    graph: Graph
    qparams: QParams
    program: IntProgram
    circuit: Circuit | None = None

    def __str__(self) -> str:
        names = [entry.name for entry in (*self.program.inputs, *self.program.outputs)]
        state = "not compiled" if self.circuit is None else str(self.circuit)
        return f"QuantizedModule({', '.join(names)}; {len(self.program.lookups)} tables; {state})"

    def forward(self, *x: Array, fhe: str = "disable") -> Array:
        """The model's outputs in real numbers, by quantized arithmetic.

        Args:
            x: one array per model input, in the model's layout, with any number of samples.
            fhe: "disable" computes in exact integers without encryption; "simulate" has concrete simulate the encrypted run
                with its noise; "execute" encrypts, runs and decrypts, making keys if there are none.

        Returns:
            The outputs (float64) in the model's layout: an array, or a tuple where the model has several outputs.

        Raises:
            DataError: an array does not fit its input.
            NotCompiledError: "simulate" or "execute" before `compile`.
            ArgumentError: (a ValueError) another value of `fhe`.
        """
        self._require(fhe)
        q = self.quantized_forward(*_several(self.quantize_input(*x)), fhe=fhe)
        return self.dequantize_output(*_several(q))

    def quantize_input(self, *x: Array) -> Array:
        """Real inputs to integers: an array, or a tuple where the program has several inputs.

        Raises:
            DataError: an array does not fit its input.
        """
        return unwrap(list(self.program.quantize(*x)))

    def quantized_forward(self, *q: Array, fhe: str = "disable") -> Array:
        """Integer inputs to integer outputs; `fhe` and errors as in `forward`."""
        circuit = self._require(fhe)
        if fhe == "disable" or circuit is None:
            return simulate(self.program, *q)
        if fhe == "simulate":
            return circuit.simulate(*q, quantized=True)
        circuit.keygen()
        return circuit(*q, quantized=True)

    def dequantize_output(self, *q: Array) -> Array:
        """Integer outputs to real numbers.

        Raises:
            DataError: an array does not fit its output.
        """
        ports = [entry.port for entry in self.program.outputs]
        if len(q) != len(ports):
            split_all(ports, [np.asarray(v) for v in q], "output")
        return unwrap(list(self.program.dequantize(*q)))

    def _require(self, fhe: str) -> Circuit | None:
        if fhe not in MODES:
            raise ArgumentError(f"fhe must be one of {list(MODES)}, got {fhe!r}")
        if fhe != "disable" and self.circuit is None:
            raise NotCompiledError(f"the module is not compiled: call compile() and use fhe={fhe!r} on what it returns")
        return self.circuit

    def bitwidth_and_range_report(self) -> dict[str, dict[str, Any]]:
        """Range and width of the integers of every input, accumulator, table result and output, by tensor name.

        Known before compiling. Accumulators are given as they enter their table, before low bits are removed.

        Returns:
            `{"name": {"range": (low, high), "bitwidth": bits}}`, in order of evaluation.
        """
        values = self.program.values
        found = {entry.name: values[entry.value] for entry in self.program.inputs}
        known = self.program.accumulators
        for name, a in known.items():
            found[name] = Value((), max(a.low, 0), min(a.high, 2**a.bits - 1))
        report = {name: _row(value) for name, value in found.items()}
        for name, a in known.items():
            report[name]["bitwidth"] = a.bits
        for table in self.program.lookups:
            report.setdefault(table.origin, _row(values[table.out]))
        for entry in self.program.outputs:
            report.setdefault(entry.name, _row(values[entry.value]))
        return report

    def compile(self, *inputs: Array, p_error: float | None = None, global_p_error: float | None = None) -> QuantizedModule:
        """The same module with a circuit.

        Args:
            inputs: not needed, since ranges are known; given, they are checked against the model.
            p_error, global_p_error: as for `fheq.compile`.

        Raises:
            CompileError: concrete-python refuses the program.
            DataError: `inputs` do not fit the model.
            ArgumentError: (a ValueError) a probability outside of (0, 1), or both.
        """
        if inputs:
            check_arrays(self.program.given, inputs)
        return replace(self, circuit=compile_program(self.program, p_error, global_p_error))


def _several(values: Array) -> tuple[Array, ...]:
    return values if isinstance(values, tuple) else (values,)


def _row(value: Value) -> dict[str, Any]:
    return {"range": (int(value.low), int(value.high)), "bitwidth": value.bits}
