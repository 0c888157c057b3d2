"""What the commands of the command line do."""

from __future__ import annotations

import json
import textwrap
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np

from fheq.batching import check_arrays, join
from fheq.converters.quantized_module import QuantizedModule
from fheq.converters.rounding_search import distance
from fheq.display.console import number, shorten, show_table, span, working
from fheq.evaluate import evaluate
from fheq.graph import Graph
from fheq.post_training import PostTrainingAffineQuantization, PostTrainingQATImporter
from fheq.program import IntProgram
from fheq.terminal.data_files import Chosen, choose, choose_samples, load_arrays

COMPARED = 256  # calibration samples that the quantized model is compared with the float model on


def check(args: Namespace) -> int:
    """`fheq check`."""
    from fheq.check import survey

    found = survey(args.model, dims=dict(args.dim))
    problems = found.problems
    if args.json:
        rows = [{"node": p.node, "cause": p.cause, "remedy": p.remedy} for p in problems]
        described = {
            key: [{"name": name, "dtype": dtype, "shape": list(shape)} for name, dtype, shape in getattr(found, key)]
            for key in ("inputs", "outputs")
        }
        counts = {"operators": dict(found.ops), "tables": found.tables, "largest_sum": found.terms}
        counts["heaviest"] = asdict(found.heaviest) if found.heaviest else None
        _print_json({"model": args.model, "ok": not problems, **described, **counts, "problems": rows})
        return 1 if problems else 0
    for label, ports in (("input", found.inputs), ("output", found.outputs)):
        for name, dtype, shape in ports:
            print(f"{label:<11}{name}: {dtype} ({', '.join(map(str, shape))})")
    _print_filled("operators", ", ".join(f"{op} {count}" for op, count in sorted(found.ops.items())))
    if found.tables is not None:
        kinds = ", ".join(f"{kind} {count:,}" for kind, count in found.tables.items() if count)
        _print_filled("tables", f"{sum(found.tables.values()):,} for one sample" + (f" ({kinds})" if kinds else ""))
        if (heavy := found.heaviest) is not None:
            _print_filled("most for", f"{heavy.node}: {heavy.tables:,}" + (f"; {heavy.remedy}" if heavy.remedy else ""))
        extra = max(found.terms - 1, 0).bit_length()
        _print_filled("widths", f"up to 2 n + {extra} bits at n bits: sums have up to {found.terms:,} terms")
        print("no problems found")
    for i, p in enumerate(problems, 1):
        print(f"{i}. {p.node}")
        for label, text in (("problem", p.cause), ("remedy", p.remedy)):
            print(textwrap.fill(f"{label}: {text}", 78, initial_indent="   ", subsequent_indent="      "))
    return 1 if problems else 0


def _print_filled(label: str, text: str) -> None:
    """A labelled line, wrapped."""
    if text:
        print(textwrap.fill(text, 78, initial_indent=f"{label:<11}", subsequent_indent=" " * 11))


def quantize(args: Namespace) -> int:
    """`fheq quantize`."""
    graph, chosen, module = _quantized(args)
    summary = _summary(args, graph, chosen, module)
    if args.report:
        from fheq.cost import cost

        report = cost(module.program)
        summary["report"] = report.as_dict()
    if args.output:
        from fheq.saving import save_quantizers

        summary["saved"] = str(save_quantizers(args.output, module.program, module.qparams))
    if args.qdq:
        from fheq.onnx.export import export_qdq
        from fheq.saving import write_whole

        summary["qdq"] = str(write_whole(args.qdq, export_qdq(module.graph, module.qparams).SerializeToString()))
    if args.json:
        _print_json(summary)
        return 0
    _print_summary(summary)
    if args.report:
        print(report)
    else:
        _print_tables(module.program)
    if args.output:
        print(f"quantizers written to {args.output}")
    if args.qdq:
        print(f"quantized model written to {args.qdq}")
    return 0


def compile_(args: Namespace) -> int:
    """`fheq compile`."""
    graph, chosen, module = _quantized(args)
    start = time.perf_counter()
    module = _compiled(args, module)
    summary = {**_summary(args, graph, chosen, module), **_circuit(module), "compile_seconds": _since(start)}
    if args.output:
        from fheq.saving import save_circuit

        with working("saving", _shown(args)):
            summary["saved"] = str(save_circuit(args.output, module.circuit))  # type: ignore[arg-type]
    if args.json:
        _print_json(summary)
        return 0
    _print_summary(summary)
    _print_tables(module.program)
    error = next(f"{k} {summary[k]:g}" for k in ("p_error", "global_p_error") if summary[k] is not None)
    print(f"compiled in {summary['compile_seconds']} s with {error}")
    print(f"complexity      {summary['complexity'] / 1e6:,.0f} M operations")
    print(f"bootstraps      {summary['bootstraps']:,}")
    for name, size in summary["key_bytes"].items():
        print(f"{name + ' keys':<16}{size / 1e6:,.1f} MB")
    if args.output:
        print(f"server.zip, client.zip and quantizers.json written to {args.output}")
    return 0


def run(args: Namespace) -> int:
    """`fheq run`."""
    graph, chosen, module = _quantized(args)
    arrays = choose_samples(load_arrays(args.data), graph.inputs)
    parts = check_arrays(graph.inputs, arrays.arrays)
    samples = [join(port, part[: args.samples]) for port, part in zip(graph.inputs, parts)]
    results = {"float": _as_list(evaluate(graph, *samples)), "quantized": _as_list(module.forward(*samples))}
    summary = {**_summary(args, graph, chosen, module), "ran": {"arrays": list(arrays.keys)}}
    if args.execute:
        seconds: dict[str, float] = {}
        results["encrypted"] = _execute(args, module, samples, seconds)
        summary |= {**_circuit(module), "seconds": seconds}
    count = min(args.samples, len(parts[0]))
    rows = _per_sample(graph, results, count)
    if args.json:
        summary["ran"]["samples"] = [{k: [v.tolist() for v in outputs] for k, outputs in row.items()} for row in rows]
        _print_json(summary)
        return 0
    _print_summary(summary)
    cells = [[str(i), *(_brief(outputs[0]) for outputs in row.values())] for i, row in enumerate(rows)]
    show_table(f"{shorten(graph.outputs[0].name)} of {arrays.keys[0]}", ("sample", *results), cells)
    if args.execute:
        print("; ".join(f"{name} {value} s" for name, value in summary["seconds"].items()))
    return 0


COMMANDS: dict[str, Callable[[Namespace], int]] = {"check": check, "quantize": quantize, "compile": compile_, "run": run}


# Steps


def _shown(args: Namespace) -> bool | None:
    return False if args.no_progress or args.json else None


def _quantized(args: Namespace) -> tuple[Graph, Chosen, QuantizedModule]:
    from fheq.onnx import import_onnx

    arrays = load_arrays(args.data)
    graph = import_onnx(args.model, dims=dict(args.dim))
    chosen = choose(arrays, graph.inputs)
    method = "EXACT" if args.exact else "APPROXIMATE"
    rounding = None if args.rounding is None else {"n_bits": args.rounding, "method": method}
    converter = PostTrainingQATImporter if args.qat else PostTrainingAffineQuantization
    with working("calibrating and quantizing", _shown(args)):
        return graph, chosen, converter(args.n_bits, graph, rounding).quantize_module(*chosen.arrays)


def _compiled(args: Namespace, module: QuantizedModule) -> QuantizedModule:
    with working("compiling", _shown(args)):
        return module.compile(p_error=args.p_error, global_p_error=args.global_p_error)


def _execute(args: Namespace, module: QuantizedModule, samples: list[Any], seconds: dict[str, float]) -> list[np.ndarray]:
    start = time.perf_counter()
    circuit = _compiled(args, module).circuit
    assert circuit is not None
    seconds["compile"] = _since(start)
    start = time.perf_counter()
    with working("making keys", _shown(args)):
        circuit.keygen()
    seconds["keys"] = _since(start)
    start = time.perf_counter()
    results = circuit(*samples, progress=_shown(args))
    seconds["run"] = _since(start)
    return _as_list(results)


# Results as data


def _as_list(values: Any) -> list[np.ndarray]:
    return [np.asarray(v) for v in (values if isinstance(values, tuple) else (values,))]


def _since(start: float) -> float:
    return round(time.perf_counter() - start, 2)


def _summary(args: Namespace, graph: Graph, chosen: Chosen, module: QuantizedModule) -> dict[str, Any]:
    parts = check_arrays(graph.inputs, chosen.arrays)
    some = [join(port, part[:COMPARED]) for port, part in zip(graph.inputs, parts)]
    wanted, got = (_as_list(v) for v in (evaluate(graph, *some), module.forward(*some)))
    gap = distance(graph.outputs, wanted, got)
    removed = [{"name": n, "bits": a.bits - a.lsbs} for n, a in module.program.accumulators.items() if a.lsbs]
    return {
        "model": args.model,
        "calibrated_on": {"arrays": list(chosen.keys), "samples": len(parts[0])},
        "n_bits": dict(PostTrainingAffineQuantization(args.n_bits, graph).n_bits),  # type: ignore[arg-type]
        "rounding": args.rounding,
        "rounded": removed,
        "r2": 1 - gap,
        "widths": {
            name: {"range": list(row["range"]), "bitwidth": row["bitwidth"]}
            for name, row in module.bitwidth_and_range_report().items()
        },
    }


def _circuit(module: QuantizedModule) -> dict[str, Any]:
    circuit = module.circuit
    if circuit is None:
        return {}
    concrete = circuit.concrete
    return {
        "complexity": circuit.complexity,
        "bootstraps": circuit.bootstraps,
        "p_error": circuit.p_error,
        "global_p_error": circuit.global_p_error,
        "key_bytes": {
            "secret": int(concrete.size_of_secret_keys),
            "bootstrap": int(concrete.size_of_bootstrap_keys),
            "switching": int(concrete.size_of_keyswitch_keys),
        },
        "ciphertext_bytes": {"inputs": int(concrete.size_of_inputs), "outputs": int(concrete.size_of_outputs)},
    }


def _per_sample(graph: Graph, results: dict[str, list[np.ndarray]], count: int) -> list[dict[str, list[np.ndarray]]]:
    """One dict per sample: kind of result to its outputs."""
    rows: list[dict[str, list[np.ndarray]]] = [{} for _ in range(count)]
    for kind, outputs in results.items():
        for port, values in zip(graph.outputs, outputs):
            pieces = np.split(values, count, axis=port.batch_axis or 0)
            for row, piece in zip(rows, pieces):
                row.setdefault(kind, []).append(piece.squeeze(port.batch_axis or 0) if piece.shape[0] == 1 else piece)
    return rows


# Results as text


def _print_json(data: dict[str, Any]) -> None:
    print(json.dumps(data, indent=1))


def _print_summary(summary: dict[str, Any]) -> None:
    used = summary["calibrated_on"]
    print(f"calibrated on {', '.join(used['arrays'])} of the data: {used['samples']} samples")
    print("n_bits       " + ", ".join(f"{key} {value}" for key, value in summary["n_bits"].items()))
    if summary["rounding"] is not None:
        left = [row["bits"] for row in summary["rounded"]]
        print(f"rounding     {summary['rounding']}: " + (f"tables of {span(left)} bits" if left else "nothing to remove"))
    print(f"R2 of the quantized model against the float one: {summary['r2']:.4f}")


def _print_tables(program: IntProgram) -> None:
    rows = []
    for table in program.lookups:
        accumulator = program.accumulators.get(table.accumulator)
        wide = str(accumulator.bits) if accumulator else str(table.bits)
        count = int(np.prod(program.values[table.out].shape))
        rows.append([shorten(table.origin), wide, str(table.bits), f"{count:,}", str(len(table.table))])
    show_table("Tables", ("result", "acc. bits", "table bits", "applied", "distinct"), rows)


def _brief(values: np.ndarray) -> str:
    """An output in few characters: where its maximum is, or its values."""
    flat = np.ravel(values)
    if flat.dtype == object:  # labels
        return " ".join(map(str, flat[:4]))
    if flat.size > 4:
        return f"max {number(float(flat.max()))} at {int(flat.argmax())}"
    return " ".join(number(float(v)) for v in flat)
