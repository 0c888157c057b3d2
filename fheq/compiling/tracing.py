"""Emission of an integer program through concrete-python's tracer, with the range of every value passed on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

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


class Tracing:
    """Traces a program and remembers which range each traced node has.

    concrete sizes every node from bounds that it measures on an inputset. `bounds` replaces them by what lowering knows, so
    that neither an unlucky nor an extreme sample decides a width. What a linear op makes before its offset wraps around
    harmlessly, so it is given the range of what follows and does not widen it.

    Args:
        clear: names of inputs that are not encrypted.
        multiplied: whether elements are picked by products with 0 and 1. concrete indexes for nothing, but cannot by arrays
            where it evaluates tables on residues.
    """

    def __init__(self, program: IntProgram, clear: frozenset[str], multiplied: bool = False):
        self.program = program
        self.clear = clear
        self.multiplied = multiplied
        self.ranges: dict[Any, tuple[int, int]] = {}
        self.sizes = {name: (value.low, value.high) for name, value in program.values.items()}
        readers = Counter(name for instruction in program.instructions for name in set(instruction.args))
        ends = {entry.value for entry in (*program.inputs, *program.outputs)}
        made = {i.out for i in program.instructions if isinstance(i, Lookup | Round)}
        self.kept = ends | made | {name for name, count in readers.items() if count > 1}
        for instruction in reversed(program.instructions):
            self._widen_nothing(instruction)

    def _widen_nothing(self, instruction: Instruction) -> None:
        """Gives the arguments of leveled arithmetic the range of its result, where theirs is negative, or wider and of sums
        that nothing else reads."""
        if isinstance(instruction, (Shift, Scale, Plus, Gather, SumLast)):
            low, high = self.sizes[instruction.out]
            moved = isinstance(instruction, (Gather, SumLast))
            for arg in instruction.args:
                wider = arg not in self.kept and self.sizes[arg][1].bit_length() > max(high, 1).bit_length()
                if self.sizes[arg][0] < 0 or wider:
                    self.sizes[arg] = (low, high) if moved else (0, max(high, 1))

    def function(self) -> Callable[..., Any]:
        """The function to trace; its parameters are x0, x1, ..."""
        names = [f"x{i}" for i in range(len(self.program.inputs))]
        space: dict[str, Any] = {"run": self._run}
        exec(f"def program({', '.join(names)}):\n    return run({', '.join(names)})", space)
        return space["program"]

    def _run(self, *inputs: Any) -> Any:
        from concrete import fhe

        env: dict[str, Any] = {}
        for entry, x in zip(self.program.inputs, inputs):
            self._note(entry.value, x)
            if entry.name in self.clear:  # a trivial encryption: everything after it is uniform
                x = self._note(entry.value, x + self._note(entry.value, fhe.zeros(entry.port.type.shape)))
            env[entry.value] = x
        for instruction in self.program.instructions:
            args = [env[a] for a in instruction.args]
            env[instruction.out] = self._note(instruction.out, self._emit(instruction, args))
        outputs = [env[entry.value] for entry in self.program.outputs]
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _note(self, name: str, traced: Any) -> Any:
        low, high = self.sizes[name]
        if hasattr(traced, "computation"):
            self.ranges[traced.computation] = (low, high)
        return traced

    def bounds(self, measured: dict[Any, dict[str, Any]]) -> dict[Any, dict[str, Any]]:
        """Measured bounds with the known ranges in their place."""
        known = {
            node: {"min": np.int64(self.ranges[node][0]), "max": np.int64(self.ranges[node][1])}
            for node in measured
            if node in self.ranges
        }
        return {**measured, **known}

    def size_unread_inputs(self, graph: Any) -> None:
        """Gives inputs that nothing reads their ranges, without which concrete refuses what is encrypted for them."""
        for node in graph.input_nodes.values():
            if node not in graph.graph:
                node.output.dtype.update_to_represent(np.array(self.ranges[node]))

    def _emit(self, instruction: Instruction, args: list[Any]) -> Any:
        from concrete import fhe

        x = args[0]
        if isinstance(instruction, Gather):
            return self._gather(instruction, args)
        if isinstance(instruction, MatMul):
            return instruction.weight @ x if instruction.left else x @ instruction.weight
        if isinstance(instruction, Convolution):
            return self._convolution(instruction, x)
        if isinstance(instruction, SumLast):
            return np.sum(x, axis=len(x.shape) - 1)
        if isinstance(instruction, Shift):
            return x + instruction.amount
        if isinstance(instruction, Scale):
            return x * instruction.factor
        if isinstance(instruction, Plus):
            return x + args[1] if instruction.sign > 0 else x - args[1]
        if isinstance(instruction, Round):
            return self._round(instruction, x)
        assert isinstance(instruction, Lookup)
        table, group = instruction.table.astype(np.int64), instruction.group
        lsbs, mask = instruction.lsbs, (1 << instruction.bits) - 1
        if len(table) == 1:
            return fhe.univariate(lambda v: table[0][(v >> lsbs) & mask])(x)
        return fhe.univariate(lambda v: table[group, (v >> lsbs) & mask])(x)

    def _round(self, instruction: Round, x: Any) -> Any:
        from concrete import fhe

        if instruction.approximate:
            return fhe.round_bit_pattern(
                x, lsbs_to_remove=instruction.lsbs, overflow_protection=False, exactness=fhe.Exactness.APPROXIMATE
            )
        half = self._note(instruction.args[0], x + (1 << instruction.lsbs >> 1))
        return fhe.truncate_bit_pattern(half, lsbs_to_remove=instruction.lsbs)

    def _gather(self, instruction: Gather, args: list[Any]) -> Any:
        from concrete import fhe

        shape = self.program.values[instruction.out].shape
        if instruction.index is None:
            return _reshaped(args[0], shape)
        flats = [self._note(name, x.reshape((_size(x.shape),))) for name, x in zip(instruction.args, args)]
        index = instruction.index
        if len(flats) == 1 and flats[0].shape == (1,) and index.ndim and instruction.fill is None:
            return flats[0] + np.zeros(shape, np.int64)  # concrete's compiler aborts where one element is indexed
        if instruction.fill is not None:
            hole = index < 0
            fills = np.unique(instruction.fill[hole])
            total = sum(_size(x.shape) for x in args)
            place = total + np.searchsorted(fills, instruction.fill)
            index = np.where(hole, place, index)
            constant = self._note(instruction.args[0], fhe.zeros((len(fills),)))
            flats.append(self._note(instruction.out, constant + fills) if np.any(fills) else constant)
        flat = flats[0] if len(flats) == 1 else self._note(instruction.out, np.concatenate(tuple(flats)))
        moved = self._pick(instruction.out, flat, index.ravel()) if flat.shape != (1,) or index.size != 1 else flat
        return moved if moved.shape == shape else _reshaped(self._note(instruction.out, moved), shape)

    def _pick(self, name: str, flat: Any, index: np.ndarray) -> Any:
        """Elements of a vector, whose range is that of the value `name`."""
        if not self.multiplied:
            return flat[index]
        places = (np.arange(flat.shape[0])[:, None] == index.ravel()).astype(np.int64)
        return self._note(name, flat @ places).reshape(index.shape)

    def _convolution(self, instruction: Convolution, x: Any) -> Any:
        """2-D natively, 1-D with a unit axis, 3-D as a matrix product over patches."""
        from concrete import fhe

        weight, rank = instruction.weight, instruction.weight.ndim - 2
        out = self.program.values[instruction.out].shape
        if rank == 1:
            x = self._note(instruction.args[0], x.reshape((*x.shape[:2], 1, x.shape[2])))
            weight = weight[:, :, None, :]
        if rank <= 2:
            unit = (1,) * (2 - rank)
            y = fhe.conv(
                x,
                weight,
                strides=unit + instruction.strides,
                dilations=unit + instruction.dilations,
                group=instruction.group,
            )
            return y if rank == 2 else self._note(instruction.out, y).reshape(out)
        return self._patches(instruction, x, out)

    def _patches(self, instruction: Convolution, x: Any, out: tuple[int, ...]) -> Any:
        weight, group = instruction.weight, instruction.group
        offsets = np.stack(np.meshgrid(*[np.arange(k) for k in weight.shape[2:]], indexing="ij"), -1).reshape(
            -1, len(out) - 2
        )
        starts = np.stack(np.meshgrid(*[np.arange(n) for n in out[2:]], indexing="ij"), -1).reshape(-1, len(out) - 2)
        places = starts[:, None, :] * instruction.strides + offsets[None, :, :] * instruction.dilations
        spatial = np.ravel_multi_index(tuple(np.moveaxis(places, -1, 0)), x.shape[2:])
        area, channels = _size(x.shape[2:]), weight.shape[1]
        flat = self._note(instruction.args[0], x.reshape((_size(x.shape),)))
        parts = []
        for g in range(group):
            plane = (np.arange(channels) + g * channels) * area
            index = (plane[None, :, None] + spatial[:, None, :]).reshape(len(starts), -1)
            patches = self._note(instruction.args[0], self._pick(instruction.args[0], flat, index))
            rows = weight[g * len(weight) // group : (g + 1) * len(weight) // group].reshape(-1, channels * len(offsets))
            parts.append(self._note(instruction.out, np.transpose(self._note(instruction.out, patches @ rows.T))))
        joined = parts[0] if group == 1 else self._note(instruction.out, np.concatenate(tuple(parts), axis=0))
        return joined.reshape(out)


def _reshaped(x: Any, shape: tuple[int, ...]) -> Any:
    """A traced value in another shape; concrete fails to make a scalar by a reshape."""
    return x.reshape(shape) if shape else np.sum(x)


def _size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64))


def bare_outputs() -> Any:
    """A graph processor for concrete's compiler: approximately rounded outputs are decrypted as they are.

    concrete puts an identity table after a rounding that no table reads, to bring the bits that are left back to their
    place. Decryption does that for nothing.
    """
    from concrete.fhe.representation import GraphProcessor

    class BareOutputs(GraphProcessor):
        def apply(self, graph: Any) -> None:
            for i, node in list(graph.output_nodes.items()):
                made_from = graph.ordered_preds_of(node)
                if node.properties.get("name") != "reinterpret" or len(made_from) != 1:
                    continue
                if made_from[0].properties.get("name") == "round_bit_pattern":
                    graph.output_nodes[i] = made_from[0]
                    if not list(graph.graph.successors(node)):
                        graph.graph.remove_node(node)

    return BareOutputs()
