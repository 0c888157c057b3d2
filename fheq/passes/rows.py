"""Equal rows of integer matrices."""

from __future__ import annotations

import numpy as np

FEW = 8  # columns: more of them seldom fit a single number


def distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index of the first of each distinct row `(n,)`, and which of them each row is `(rows,)`.

    Rows are compared as single numbers where they fit, which is many times faster than numpy's own comparison.
    """
    if len(rows) == 1:
        return np.zeros(1, np.int64), np.zeros(1, np.int64)
    if rows.shape[1] > FEW:
        return _distinct_by_hash(rows)
    low = rows.min(axis=0)
    spans = [int(s) for s in rows.max(axis=0) - low + 1]
    room = 1
    for span in spans:
        room *= span
    if room >= 1 << 62:
        return _distinct_by_hash(rows)
    key = np.zeros(len(rows), np.int64)
    for column, start, span in zip(rows.T, low, spans):
        key = key * span + (column - start)
    _, at, which = np.unique(key, return_index=True, return_inverse=True)
    return at, which.ravel()


def _distinct_by_hash(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    factors = np.random.default_rng(0).integers(-(1 << 62), 1 << 62, rows.shape[1])
    _, at, which = np.unique(rows.astype(np.int64) @ factors, return_index=True, return_inverse=True)  # modulo 2^64
    if np.array_equal(rows[at[which]], rows):
        return at, which
    _, at, which = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    return at, which.ravel()
