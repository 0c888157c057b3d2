"""A table of small models: one per form that the integer side takes.

Each is made from `onnx.helper` nodes; `CASES` says what to feed it. The names of the cases are what they cover.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any, NamedTuple

import models_of_one as models_of_one
import models_of_several as models_of_several
import numpy as np
import onnx
from model_case import CASES as CASES
from model_case import Case
from model_case import weights as weights

import fheq


class Prepared(NamedTuple):
    """A case, imported and calibrated."""

    case: Case
    proto: onnx.ModelProto
    graph: fheq.Graph
    data: tuple[np.ndarray, ...]
    stats: Mapping[str, Any]


@cache
def prepared(name: str) -> Prepared:
    """A case imported and calibrated on 200 samples, once for all tests: what is jitted for it is not compiled again."""
    case = CASES[name]
    proto = case.build()
    graph = fheq.import_onnx(proto)
    data = case.data(200)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fheq.CalibrationWarning)
        return Prepared(case, proto, graph, data, fheq.calibrate(graph, *data))


def as_tuple(value: Any) -> tuple[Any, ...]:
    """One output or several, as a tuple."""
    return value if isinstance(value, tuple) else (value,)
