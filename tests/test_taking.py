"""Taking elements by a constant index is indexing, however it is done."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fheq.arrays.taking import strided, take

MOVES = {
    "transpose": lambda a: a.T,
    "swap": lambda a: np.swapaxes(a, 0, -1),
    "cut": lambda a: a[tuple(slice(size > 1, None) for size in a.shape)],
    "first": lambda a: a[..., :1],
    "every other": lambda a: a[::2],
    "backwards": lambda a: a[..., ::-1],
    "repeat": lambda a: np.broadcast_to(a[:, None], (a.shape[0], 2, *a.shape[1:])),
    "join": lambda a: np.concatenate([a, a], axis=-1),
    "flatten": lambda a: a.reshape(-1),
    "pad": lambda a: np.pad(a, 1, constant_values=-1),
}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 4), min_size=1, max_size=3),
    st.lists(st.sampled_from(sorted(MOVES)), max_size=4),
    st.integers(0, 2),
)
def test_it_is_indexing(shape: list[int], moves: list[str], more: int) -> None:
    index = np.arange(np.prod(shape)).reshape(shape)
    for move in moves:
        if index.ndim < 5:
            index = MOVES[move](index)
    values = np.arange(np.prod(shape) + more, dtype=np.float32) + 7
    fill = -np.arange(index.size, dtype=np.float64).reshape(index.shape)
    expected = np.where(index < 0, fill, values[index])
    np.testing.assert_array_equal(take(jnp.asarray(values), index, fill), expected)


@pytest.mark.parametrize("move", ["transpose", "swap", "cut", "first", "every other", "repeat", "flatten"])
def test_movements_are_views(move: str) -> None:
    assert strided(MOVES[move](np.arange(24).reshape(4, 2, 3)), 24) is not None


@pytest.mark.parametrize("index", [[0, 2, 3], [2, 1, 0], [[0, 1], [1, 2]], [[], []]])
def test_other_indices_are_none(index: list) -> None:
    assert strided(np.array(index, int), 4) is None
