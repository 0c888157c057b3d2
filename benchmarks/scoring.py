"""The score of a workload's outputs, for every interpreter."""

from __future__ import annotations

import numpy as np


def accuracy(y: np.ndarray, targets: np.ndarray) -> float:
    """Accuracy of classes, R2 of float targets."""
    y = np.asarray(y).reshape(len(targets), -1)
    if targets.dtype.kind == "f":
        return float(1 - np.mean((y[:, 0] - targets.ravel()) ** 2) / np.var(targets))
    classes = y.argmax(axis=1) if y.shape[1] > 1 else y[:, 0] > 0.5
    return float(np.mean(classes == targets.ravel()))
