"""The command line: exit codes, JSON, and one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import build_models
import jax
import numpy as np
import onnx
import pytest

import fheq
from fheq.cli import main
from fheq.display.console import shorten, text_table
from fheq.errors import DataError
from fheq.saving import write_whole
from fheq.terminal.data_files import choose, choose_samples

RNG = np.random.default_rng(2)
X = RNG.normal(size=(60, 2)).astype(np.float32)
SMALL = ["--n-bits", "op_inputs=2,op_weights=2,model_inputs=2,model_outputs=2", "--rounding", "3"]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("cli")
    nodes = [build_models.node("MatMul", ["x", "w"], ["h"]), build_models.node("Relu", ["h"], ["y"])]
    w = np.array([[1.0, -0.5], [0.25, 1.0]], np.float32)
    onnx.save(build_models.model(nodes, {"x": ["N", 2]}, ["y"], {"w": w}), folder / "m.onnx")
    bad = [build_models.node("NonZero", ["x"], ["y"])]
    onnx.save(build_models.model(bad, {"x": ["N", 2]}, ["y"], kinds={"y": onnx.TensorProto.INT64}), folder / "bad.onnx")
    np.savez(folder / "d.npz", x_train=X, x_test=X[::-1], y_train=np.zeros(60))
    np.savez(folder / "wrong.npz", a=X, b=X)
    np.savez(folder / "nan.npz", x_train=X * np.nan)
    (folder / "text.npz").write_text("no arrays")
    found = {path.name: str(path) for path in folder.iterdir()}
    return {**found, "folder": str(folder)}


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


def test_check(files: dict[str, str], capsys):
    code, out, err = run(capsys, "check", files["m.onnx"])
    assert (code, err) == (0, "")
    assert out.splitlines() == [
        "input      x: float32 (N, 2)",
        "output     y: float32 (N, 2)",
        "operators  MatMul 1, Relu 1",
        "tables     2 for one sample (activations 2)",
        "most for   node 'make_y' (Relu, output 'y'): 2",
        "widths     up to 2 n + 1 bits at n bits: sums have up to 2 terms",
        "no problems found",
    ]
    code, out, _ = run(capsys, "check", files["bad.onnx"])
    assert code == 1
    assert out.startswith("input      x: float32 (N, 2)\n")
    assert "operators  NonZero 1\n1. node 'make_y' (NonZero, output 'y')\n   problem: " in out
    assert "   remedy: " in out
    assert max(map(len, out.splitlines())) <= 80


def test_check_json(files: dict[str, str], capsys):
    code, out, _ = run(capsys, "check", files["m.onnx"], "--json")
    assert (code, json.loads(out)) == (
        0,
        {
            "model": files["m.onnx"],
            "ok": True,
            "inputs": [{"name": "x", "dtype": "float32", "shape": ["N", 2]}],
            "outputs": [{"name": "y", "dtype": "float32", "shape": ["N", 2]}],
            "operators": {"MatMul": 1, "Relu": 1},
            "tables": {"activations": 2, "products": 0, "maxima": 0},
            "largest_sum": 2,
            "heaviest": {"node": "node 'make_y' (Relu, output 'y')", "tables": 2, "remedy": ""},
            "problems": [],
        },
    )
    code, out, _ = run(capsys, "check", "--json", files["bad.onnx"])
    assert code == 1
    (found,) = json.loads(out)["problems"]
    assert set(found) == {"node", "cause", "remedy"}
    code, out, _ = run(capsys, "check", "--json", "missing.onnx")
    assert code == 1
    assert "missing.onnx" in json.loads(out)["problems"][0]["cause"]


def test_quantize(files: dict[str, str], capsys, tmp_path: Path):
    target = tmp_path / "deep" / "q.json"
    argv = ["quantize", files["m.onnx"], "--data", files["d.npz"], *SMALL, "-o", str(target)]
    code, out, err = run(capsys, *argv)
    assert (code, err) == (0, "")
    assert "calibrated on x_train of the data: 60 samples" in out
    assert max(map(len, out.splitlines()[:-1])) <= 80  # the last line is a path
    saved = json.loads(target.read_text())
    assert [entry["name"] for entry in saved["inputs"]] == ["x"]
    assert saved["inputs"][0]["quantizer"]["qmax"] is not None
    assert set(saved["qparams"]["weights"]) == {"w"}


def test_quantize_writes_a_quantized_model(files: dict[str, str], capsys, tmp_path: Path):
    target = tmp_path / "qdq.onnx"
    code, out, _ = run(capsys, "quantize", files["m.onnx"], "--data", files["d.npz"], "--n-bits", "3", "--qdq", str(target))
    assert (code, out.splitlines()[-1]) == (0, f"quantized model written to {target}")
    assert fheq.import_onnx(target).pinned


def test_quantize_json(files: dict[str, str], capsys):
    code, out, _ = run(
        capsys, "quantize", files["m.onnx"], "--data", files["d.npz"], "--n-bits", "6", "--rounding", "auto", "--json"
    )
    assert code == 0
    found = json.loads(out)
    assert found["n_bits"] == {"op_inputs": 6, "op_weights": 6, "model_inputs": 6, "model_outputs": 6}
    assert found["calibrated_on"] == {"arrays": ["x_train"], "samples": 60}
    assert found["r2"] > 0.95
    assert found["widths"]["x"] == {"range": [0, 63], "bitwidth": 6}


def test_quantize_report(files: dict[str, str], capsys):
    argv = ["quantize", files["m.onnx"], "--data", files["d.npz"], *SMALL, "--report"]
    code, out, _ = run(capsys, *argv)
    assert (code, "bits" in out) == (0, True)
    code, out, _ = run(capsys, *argv, "--json")
    assert code == 0
    assert json.loads(out)["report"]


def test_compile(files: dict[str, str], capsys, tmp_path: Path):
    argv = ["compile", files["m.onnx"], "--data", files["d.npz"], *SMALL, "--p-error", "0.01", "--json"]
    code, out, _ = run(capsys, *argv, "-o", str(tmp_path / "out"))
    assert code == 0
    found = json.loads(out)
    assert (found["p_error"], found["global_p_error"], found["bootstraps"]) == (0.01, None, 2)
    assert found["complexity"] > 0
    assert set(found["key_bytes"]) == {"secret", "bootstrap", "switching"}
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["client.zip", "quantizers.json", "server.zip"]
    assert json.loads((tmp_path / "out" / "quantizers.json").read_text())["outputs"][0]["name"] == "y"


def test_run(files: dict[str, str], capsys):
    argv = ["run", files["m.onnx"], "--data", files["d.npz"], *SMALL, "--samples", "2"]
    code, out, _ = run(capsys, *argv)
    assert code == 0
    assert "y of x_test" in out
    code, out, _ = run(capsys, *argv, "--json")
    samples = json.loads(out)["ran"]["samples"]
    assert len(samples) == 2
    assert set(samples[0]) == {"float", "quantized"}
    wanted = np.asarray(fheq.evaluate(fheq.import_onnx(files["m.onnx"]), X[::-1][:2]))
    np.testing.assert_allclose([s["float"][0] for s in samples], wanted, atol=1e-6)


FAILURES = [
    (["check"], 2, ""),
    ([], 2, ""),
    (["nonsense"], 2, ""),
    (["quantize", "m.onnx"], 2, "--data"),
    (["quantize", "m.onnx", "--data", "d.npz", "--n-bits", "x"], 2, "'x' is no integer"),
    (["quantize", "m.onnx", "--data", "d.npz", "--n-bits", "ops=3"], 2, "unknown keys"),
    (["quantize", "m.onnx", "--data", "d.npz", "--n-bits", "op_inputs=3,op_weights=3,op_inputs=4"], 2, "twice"),
    (["quantize", "m.onnx", "--data", "d.npz", "--rounding", "few"], 2, "no integer"),
    (["quantize", "m.onnx", "--data", "d.npz", "--dim", "N"], 2, "'N' is not of the form NAME=SIZE"),
    (["quantize", "m.onnx", "--data", "d.npz", "-o", "folder"], 2, "is a folder; give a file"),
    (["compile", "m.onnx", "--data", "d.npz", "-o", "m.onnx"], 2, "is a file; give a folder"),
    (["compile", "m.onnx", "--data", "d.npz", "--p-error", "2"], 2, "between 0 and 1"),
    (["compile", "m.onnx", "--data", "d.npz", "--p-error", "0.1", "--global-p-error", "0.1"], 2, "not allowed"),
    (["run", "m.onnx", "--data", "d.npz", "--samples", "0"], 2, "at least 1"),
    (["quantize", "m.onnx", "--data", "d.npz", "--n-bits", "0"], 1, "at least 1"),
    (["quantize", "m.onnx", "--data", "d.npz", "--n-bits", "op_inputs=3"], 1, "op_weights"),
    (["quantize", "m.onnx", "--data", "d.npz", "--rounding", "9"], 1, "from 2 to 8"),
    (["quantize", "m.onnx", "--data", "d.npz", "--qat"], 1, "no quantizer reaches tensor 'x'"),
    (["quantize", "m.onnx", "--data", "absent.npz"], 1, "does not exist"),
    (["quantize", "m.onnx", "--data", "text.npz"], 1, "cannot be read"),
    (["quantize", "m.onnx", "--data", "wrong.npz"], 1, "needs 'x' or 'x_train' or 'in0'"),
    (["quantize", "m.onnx", "--data", "nan.npz"], 1, "NaN"),
    (["quantize", "bad.onnx", "--data", "d.npz"], 1, "NonZero"),
    (["quantize", "absent.onnx", "--data", "d.npz"], 1, "does not exist"),
]


@pytest.mark.parametrize(("argv", "code", "words"), FAILURES, ids=lambda v: " ".join(v)[:60] if isinstance(v, list) else "")
def test_failures(files: dict[str, str], capsys, argv: list[str], code: int, words: str):
    argv = [files.get(arg, arg) for arg in argv]
    if code == 2:
        with pytest.raises(SystemExit) as caught:
            main(argv)
        assert caught.value.code == 2
        assert words in capsys.readouterr().err
        return
    found, out, err = run(capsys, *argv)
    assert (found, out) == (1, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert words in err
    found, out, _ = run(capsys, *argv, "--json")
    assert found == 1
    assert words in json.loads(out)["error"]


def test_as_a_program(files: dict[str, str]):
    done = subprocess.run([sys.executable, "-m", "fheq.cli", "check", files["bad.onnx"]], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    done = subprocess.run([sys.executable, "-m", "fheq.cli", "--help"], capture_output=True, text=True, check=True)
    assert all(name in done.stdout for name in ("check", "quantize", "compile", "run", "demo"))


def test_labels_are_shown_and_saved(tmp_path: Path, capsys):
    """A classifier with string labels through the commands: the client's part is in what is saved."""
    classifier = build_models.node(
        "LinearClassifier",
        ["x"],
        ["label", "scores"],
        domain="ai.onnx.ml",
        coefficients=[1.0, -1.0, -1.0, 1.0],
        intercepts=[0.0, 0.1],
        classlabels_strings=["left", "right"],
        post_transform="SOFTMAX",
    )
    kinds = {"label": onnx.TensorProto.STRING}
    onnx.save(
        build_models.model([classifier], {"x": ["N", 2]}, ["label", "scores"], kinds=kinds, domains={"ai.onnx.ml": 1}),
        tmp_path / "m.onnx",
    )
    np.savez(tmp_path / "d.npz", x_train=X)
    argv = ["--data", str(tmp_path / "d.npz"), "--n-bits", "4"]
    code, out, err = run(capsys, "run", str(tmp_path / "m.onnx"), *argv)
    assert (code, err) == (0, "") and ("left" in out or "right" in out)
    code, out, _ = run(capsys, "run", str(tmp_path / "m.onnx"), *argv, "--rounding", "auto", "--json")
    labels = [sample["quantized"][0] for sample in json.loads(out)["ran"]["samples"]]
    assert code == 0 and set(np.ravel(labels)) <= {"left", "right"}
    code, _, _ = run(capsys, "quantize", str(tmp_path / "m.onnx"), *argv, "-o", str(tmp_path / "q.json"))
    client = json.loads((tmp_path / "q.json").read_text())["client"]
    assert code == 0 and client["outputs"][0]["labels"] == ["left", "right"]
    assert {"ArgMax", "Softmax"} <= {node["op"] for node in client["nodes"]}


# What it is made of


def ports(*names: str) -> tuple[fheq.graph.Port, ...]:
    kind = fheq.graph.TensorType((1, 2), np.dtype(np.float32))
    return tuple(fheq.graph.Port(name, kind) for name in names)


@pytest.mark.parametrize(
    ("keys", "inputs", "calibrate", "samples"),
    [
        (["x", "x_train", "in0"], ["x"], ["x"], ["x"]),
        (["x_train", "x_test", "y"], ["x"], ["x_train"], ["x_test"]),
        (["in0", "t0", "ref0"], ["x"], ["in0"], ["t0"]),
        (["in0", "in1", "t0", "t1"], ["a", "b"], ["in0", "in1"], ["t0", "t1"]),
        (["b", "a"], ["a", "b"], ["a", "b"], ["a", "b"]),
        (["whatever"], ["x"], ["whatever"], ["whatever"]),
        (["in0", "x_train"], ["a", "b"], None, None),
        (["p", "q"], ["x"], None, None),
        (["p"], ["a", "b"], None, None),
    ],
)
def test_choice_of_arrays(keys: list[str], inputs: list[str], calibrate: Any, samples: Any):
    arrays = dict.fromkeys(keys, X)
    for pick, expected in ((choose, calibrate), (choose_samples, samples)):
        if expected is None:
            with pytest.raises(DataError, match="the model needs"):
                pick(arrays, ports(*inputs))
        else:
            assert list(pick(arrays, ports(*inputs)).keys) == expected


def test_text_tables():
    assert text_table(("name", "n"), [("a", "10"), ("longer", "2")]) == "name     n\n------  --\na       10\nlonger   2"
    assert shorten("a" * 20) == "a" * 20
    assert len(shorten("/layer/" + "a" * 60 + "/out", 30)) == 30
    assert shorten("/layer/" + "a" * 60 + "/out").endswith("/out")


def test_qparams_print(files: dict[str, str]):
    graph = fheq.import_onnx(files["m.onnx"])
    qparams = fheq.fit(graph, fheq.calibrate(graph, X), 3)
    lines = str(qparams).splitlines()
    assert lines[0].split() == ["name", "kind", "bits", "qs", "lsbs", "scale"]
    assert [line.split()[1] for line in lines[2:]] == ["tensor", "tensor", "weight", "accumulator"]
    assert max(map(len, lines)) <= 80
    seen = []
    jax.jit(lambda q: seen.append(str(q)))(qparams)
    assert "traced" in seen[0]


def test_an_end_midway_leaves_the_file_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = write_whole(tmp_path / "q.json", b"first")

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", stop)
    with pytest.raises(KeyboardInterrupt):
        write_whole(target, b"second")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("q.json", b"first")]
