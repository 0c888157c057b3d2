"""The digits that the package ships: a classifier, its images, and pictures of them as text."""

from __future__ import annotations

from importlib.resources import files
from io import BytesIO

import numpy as np

from fheq.graph import Graph

PIXEL_MAX = 16
SHADES, ASCII_SHADES = " ░▒▓█", " .:*#"


def load() -> tuple[Graph, dict[str, np.ndarray]]:
    """The classifier and its images: x_train, y_train (to calibrate on), x_test, y_test.

    Trained by `benchmarks/train_digits.py` on scikit-learn's digits, without the test images.
    """
    from fheq.onnx import import_onnx

    folder = files("fheq") / "data"
    with np.load(BytesIO((folder / "digits.npz").read_bytes()), allow_pickle=False) as arrays:
        return import_onnx((folder / "digits.onnx").read_bytes()), dict(arrays)


def picture(pixels: np.ndarray, shades: str = SHADES) -> list[str]:
    """An image as lines of text, two characters per pixel."""
    levels = np.round(np.asarray(pixels).squeeze() * (len(shades) - 1) / PIXEL_MAX).astype(int)
    return ["".join(shades[level] * 2 for level in row) for row in levels]


def shades_for(encoding: str | None) -> str:
    """Blocks where the encoding of an output has them, else ASCII."""
    try:
        SHADES.encode(encoding or "utf-8")
    except UnicodeEncodeError:
        return ASCII_SHADES
    return SHADES


def pick(labels: np.ndarray, samples: int) -> list[int]:
    """Positions of the first image of each digit, then of the second of each, and so on."""
    rank = np.empty_like(labels)
    for digit in np.unique(labels):
        members = np.flatnonzero(labels == digit)
        rank[members] = np.arange(len(members))
    return np.lexsort((labels, rank))[:samples].tolist()
