"""`rounding_threshold_bits`: what it means, what is refused, and the automatic search."""

from __future__ import annotations

import enum
from typing import Any

import build_models
import numpy as np
import pytest

import fheq
from fheq.converters.rounding_search import AutoRounding, as_rounding, distance
from fheq.post_training import (
    BitsError,
    PostTrainingAffineQuantization,
    PostTrainingQATImporter,
    QuantizedModule,
    RoundingWarning,
)

pytestmark = pytest.mark.filterwarnings("ignore::fheq.CalibrationWarning")
X = np.random.default_rng(1).normal(size=(80, 4)).astype(np.float32)


@pytest.fixture(scope="module")
def graph() -> fheq.Graph:
    """One graph for all tests: what is jitted for it once is not compiled again."""
    return fheq.import_onnx(build_models.mlp())


@pytest.fixture(scope="module")
def module(graph: fheq.Graph) -> QuantizedModule:
    return PostTrainingAffineQuantization(3, graph, {"n_bits": 4, "method": "APPROXIMATE"}).quantize_module(X)


class Exactness(enum.Enum):
    """As concrete's, which is known by its name."""

    EXACT = "exact"
    APPROXIMATE = "approximate"


GOOD_ROUNDING = [
    (None, None),
    (2, fheq.Rounding(2)),
    (8, fheq.Rounding(8)),
    (np.int32(5), fheq.Rounding(5)),
    ({"n_bits": 6}, fheq.Rounding(6)),
    ({"n_bits": 6, "method": "EXACT"}, fheq.Rounding(6)),
    ({"n_bits": 6, "method": "APPROXIMATE"}, fheq.Rounding(6, approximate=True)),
    ({"n_bits": 6, "method": Exactness.EXACT}, fheq.Rounding(6)),
    ({"n_bits": 6, "method": Exactness.APPROXIMATE}, fheq.Rounding(6, approximate=True)),
    ({"n_bits": "auto"}, AutoRounding()),
    ({"n_bits": "auto", "method": "APPROXIMATE"}, AutoRounding(approximate=True)),
]
BAD_ROUNDING = [
    (1, "from 2 to 8"),
    (9, "from 2 to 8"),
    (0, "from 2 to 8"),
    (-4, "from 2 to 8"),
    (True, "from 2 to 8"),
    (4.0, "from 2 to 8"),
    ("auto", "from 2 to 8"),
    ([4], "from 2 to 8"),
    ({}, "lacks the key"),
    ({"method": "EXACT"}, "lacks the key"),
    ({"n_bits": 4, "bits": 4}, "unknown keys"),
    ({"n_bits": 1}, "from 2 to 8 or 'auto'"),
    ({"n_bits": 9, "method": "EXACT"}, "from 2 to 8"),
    ({"n_bits": "AUTO"}, "'auto'"),
    ({"n_bits": None}, "'auto'"),
    ({"n_bits": True}, "'auto'"),
    ({"n_bits": 4, "method": "exact"}, "'EXACT', 'APPROXIMATE'"),
    ({"n_bits": 4, "method": None}, "method"),
    ({"n_bits": 4, "method": 1}, "method"),
]


@pytest.mark.parametrize(("value", "expected"), GOOD_ROUNDING)
def test_rounding_threshold_bits(graph: fheq.Graph, value: Any, expected: Any):
    assert as_rounding(value) == expected
    PostTrainingAffineQuantization(4, graph, value)


@pytest.mark.parametrize(("value", "words"), BAD_ROUNDING)
def test_wrong_rounding_threshold_bits(graph: fheq.Graph, value: Any, words: str):
    for converter in (PostTrainingAffineQuantization, PostTrainingQATImporter):
        with pytest.raises(ValueError, match=words) as caught:
            converter(4, graph, value)
        assert isinstance(caught.value, BitsError)


@pytest.mark.parametrize("tolerance", [-0.1, float("nan"), float("inf"), "0.1", None])
def test_wrong_tolerance(graph: fheq.Graph, tolerance: Any):
    with pytest.raises(ValueError, match="rounding_tolerance"):
        PostTrainingAffineQuantization(4, graph, {"n_bits": "auto"}, rounding_tolerance=tolerance)


def test_rounding_removes_bits(module: QuantizedModule):
    rounded = [a for a in module.program.accumulators.values() if a.lsbs]
    assert rounded
    assert all(a.bits - a.lsbs == 4 and a.approximate for a in rounded)


@pytest.fixture(scope="module")
def rounded(graph: fheq.Graph) -> dict[int | None, np.ndarray]:
    """Outputs by bits of accumulators."""
    found = {}
    for bits in (None, *range(2, 9)):
        found[bits] = PostTrainingAffineQuantization(6, graph, bits).quantize_module(X).forward(X)
    return found


@pytest.mark.parametrize("tolerance", [0.1, 0.01])
def test_auto_rounding_is_the_smallest_within_tolerance(graph: fheq.Graph, rounded: dict, tolerance: float):
    gaps = {bits: distance(graph.outputs, [rounded[None]], [rounded[bits]]) for bits in range(2, 9)}
    smallest = next(bits for bits, gap in gaps.items() if gap <= tolerance)
    converter = PostTrainingAffineQuantization(6, graph, {"n_bits": "auto"}, rounding_tolerance=tolerance)
    module = converter.quantize_module(X)
    assert {a.bits - a.lsbs for a in module.program.accumulators.values() if a.lsbs} == {smallest}
    np.testing.assert_array_equal(module.forward(X), rounded[smallest])


def test_auto_rounding_gives_up_with_a_warning(graph: fheq.Graph):
    converter = PostTrainingAffineQuantization(8, graph, {"n_bits": "auto"}, rounding_tolerance=0.0)
    with pytest.warns(RoundingWarning, match="keep all their bits"):
        module = converter.quantize_module(X)
    assert any(a.bits - a.lsbs > 8 for a in module.program.accumulators.values())
