"""Quantizers as JSON, and a compiled program as a directory; files are written as a whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from fheq.affine import LEAVES, Affine
from fheq.circuit import Circuit
from fheq.client.one_hot import Code
from fheq.graph import Graph
from fheq.program import Entry, IntProgram
from fheq.qparams import QParams

FORMAT = 1


def affine_as_dict(affine: Affine) -> dict[str, Any]:
    """A quantizer as plain data: `real = scale * (q - zero_point)`, leaves as numbers or lists."""
    leaves = {leaf: np.asarray(getattr(affine, leaf), np.float64).tolist() for leaf in LEAVES}
    return {**leaves, "axis": affine.axis, "signed": affine.signed, "rounding": affine.rounding}


def _entry(entry: Entry) -> dict[str, Any]:
    port, model = entry.port, entry.code.port if entry.code else entry.port
    shape = {"shape": list(port.type.shape), "batch_axis": port.batch_axis, "dtype": port.type.dtype.name}
    stated = {name: getattr(model, name) for name in ("labels", "missing") if getattr(model, name) is not None}
    encodes = {"encodes": entry.encodes} if entry.encodes else {}
    found = {"name": entry.name, **encodes, **shape, **stated, "quantizer": affine_as_dict(entry.affine)}
    return found if entry.code is None else {**found, "code": _code(entry.code)}


def _code(code: Code) -> dict[str, Any]:
    parts = {name: getattr(code, name).tolist() for name in ("elements", "group", "table")}
    return {**parts, "quantizer": affine_as_dict(code.affine)}


def graph_as_dict(graph: Graph) -> dict[str, Any]:
    """A graph as plain data: nodes in order, known tensors, and outputs with the strings that their numbers stand for."""
    plain = lambda value: value.tolist() if isinstance(value, np.ndarray) else value
    nodes = [
        {
            "op": node.op,
            "domain": node.domain,
            "version": node.version,
            "inputs": list(node.inputs),
            "outputs": list(node.outputs),
            "attributes": {name: plain(value) for name, value in node.attrs.items()},
        }
        for node in graph.nodes
    ]
    known = {name: {"dtype": v.dtype.name, "values": v.tolist()} for name, v in graph.constants.items()}
    return {
        "inputs": [port.name for port in graph.inputs],
        "nodes": nodes,
        "constants": known,
        "outputs": [{"name": port.name, "batch_axis": port.batch_axis, "labels": port.labels} for port in graph.outputs],
    }


def program_as_dict(program: IntProgram) -> dict[str, Any]:
    """What a client needs: names, shapes (a batch axis being 1) and quantizers of inputs and outputs.

    Inputs that have "encodes" are further encodings of the input of that name, by another quantizer, or what a "code" makes
    of it: `table[group, q.ravel()[elements]]` of the integers q that its own quantizer gives for a sample.
    "client" is what it computes from the decoded outputs, as operators of ONNX; null where they are the model's outputs.
    """
    return {
        "format": FORMAT,
        "inputs": [_entry(entry) for entry in program.inputs],
        "outputs": [_entry(entry) for entry in program.outputs],
        "client": None if program.client is None else graph_as_dict(program.client),
    }


def qparams_as_dict(qparams: QParams) -> dict[str, Any]:
    """Every quantizer by name."""
    parts = {"tensors": qparams.tensors, "weights": qparams.weights, "accumulators": qparams.accumulators}
    return {key: {name: affine_as_dict(affine) for name, affine in part.items()} for key, part in parts.items()}


def write_whole(path: str | Path, data: bytes) -> Path:
    """Writes a file through another one beside it: an end midway leaves what was there, never a part of the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        written.write_bytes(data)
        os.replace(written, path)
    finally:
        written.unlink(missing_ok=True)
    return path


def save_quantizers(path: str | Path, program: IntProgram, qparams: QParams) -> Path:
    """Writes the quantizers of inputs, outputs and everything inside as one JSON file."""
    text = json.dumps({**program_as_dict(program), "qparams": qparams_as_dict(qparams)}, indent=1)
    return write_whole(path, f"{text}\n".encode())


def save_circuit(directory: str | Path, circuit: Circuit) -> Path:
    """Writes server.zip and client.zip (concrete's own) and quantizers.json (what the client adds to them)."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    circuit.concrete.server.save(directory / "server.zip")
    circuit.concrete.client.save(directory / "client.zip")
    text = json.dumps(program_as_dict(circuit.program), indent=1)
    write_whole(directory / "quantizers.json", f"{text}\n".encode())
    return directory
