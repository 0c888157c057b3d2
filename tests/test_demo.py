"""The shipped digits and the demo."""

from __future__ import annotations

import json

import numpy as np
import onnxruntime
import pytest

import fheq
from fheq.digits import ASCII_SHADES, load, pick, picture, shades_for
from fheq.terminal.demo import SPEC, Outcome, Prediction, main, needed, predict


@pytest.fixture(scope="module")
def shipped():
    return load()


def test_the_float_model_is_accurate(shipped):
    graph, data = shipped
    assert np.mean(predict(fheq.evaluate(graph, data["x_test"])) == data["y_test"]) >= 0.98


def test_float_scores_are_those_of_onnxruntime(shipped):
    from importlib.resources import files

    graph, data = shipped
    session = onnxruntime.InferenceSession((files("fheq") / "data" / "digits.onnx").read_bytes())
    (scores,) = session.run(None, {"image": data["x_test"]})
    np.testing.assert_allclose(fheq.evaluate(graph, data["x_test"]), scores, atol=1e-4)


def test_the_quantized_model_is_accurate(shipped):
    graph, data = shipped
    program = fheq.lower(graph, fheq.fit(graph, fheq.calibrate(graph, data["x_train"]), SPEC))
    scores = program.dequantize(fheq.simulate(program, *program.quantize(data["x_test"])))[0]
    assert np.mean(predict(scores) == data["y_test"]) >= 0.97


def test_the_images_are_digits_of_all_kinds_and_none_is_in_both_sets(shipped):
    _, data = shipped
    assert set(data) == {"x_train", "y_train", "x_test", "y_test"}
    for part in ("train", "test"):
        images, labels = data[f"x_{part}"], data[f"y_{part}"]
        assert images.shape == (len(labels), 1, 8, 8) and images.dtype == np.float32
        assert images.min() == 0 and images.max() == 16
        assert set(labels) == set(range(10))
    seen = {image.tobytes() for image in data["x_train"]}
    assert not any(image.tobytes() in seen for image in data["x_test"])


def test_the_shipped_files_are_small():
    from importlib.resources import files

    assert (
        sum(len(file.read_bytes()) for file in (files("fheq") / "data").iterdir() if file.name.startswith("digits"))
        < 200_000
    )


def test_a_picture_has_two_characters_per_pixel():
    lines = picture(np.full((1, 8, 8), 16.0))
    assert lines == ["█" * 16] * 8
    assert picture(np.zeros((8, 8)), ASCII_SHADES) == [" " * 16] * 8


@pytest.mark.parametrize(("encoding", "first"), [("utf-8", "█"), (None, "█"), ("ascii", "#"), ("latin-1", "#")])
def test_pictures_use_what_the_output_can_show(encoding, first):
    assert shades_for(encoding)[-1] == first


def test_the_images_to_encrypt_are_one_of_each_digit_first(shipped):
    labels = shipped[1]["y_test"]
    chosen = pick(labels, 20)
    assert labels[chosen].tolist() == [*range(10), *range(10)]
    assert len(set(chosen)) == 20
    assert sorted(pick(labels, 10**6)) == list(range(len(labels)))


def test_needed_agreements():
    assert needed(10, 1.0) == 10
    assert needed(1, 0.99) == 1
    assert 7 <= needed(10, 0.99) <= 9
    assert needed(100, 0.5) < 40


def test_an_outcome_fails_where_too_few_agree():
    right = [Prediction(i, 3, 3, 3, 3, 1.0) for i in range(6)]
    wrong = [Prediction(i, 3, 3, 3, 5, 1.0) for i in range(4)]
    assert not Outcome((*right, *wrong), {}, 1.0, 8, {}).ok
    assert Outcome(tuple(right), {}, 1.0, 5, {}).agree == 6


@pytest.mark.parametrize("samples", ["0", "-1", "two"])
def test_a_wrong_number_of_samples_is_a_usage_error(samples, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--samples", samples])
    assert stop.value.code == 2
    assert "at least 1" in capsys.readouterr().err


@pytest.mark.encrypted
def test_the_demo_runs_without_a_terminal(capsys):
    assert main(["--samples", "1"]) == 0
    out, err = capsys.readouterr()
    assert "1 of 1 encrypted predictions equal the simulated ones" in out
    assert "█" in out and "\x1b" not in out
    assert "pkg_resources" not in err


@pytest.mark.encrypted
def test_the_demo_prints_json(capsys):
    assert main(["--samples", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and len(found["predictions"]) == 1 and found["accuracy"]["simulated"] >= 0.97
