"""The worked examples run, and find what they are there to find."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "examples"))


def test_percentile_sweep() -> None:
    import percentile_sweep

    result = percentile_sweep.main()
    kl = result.scores["kl"].reshape(len(percentile_sweep.BITS), len(percentile_sweep.PERCENTS))
    assert np.all(np.diff(kl, axis=0) < 0), "more bits are nearer"
    clipped = kl[:, 0] / kl.min(axis=1)
    assert clipped[-1] > clipped[0], "the finer the steps, the more clipping counts"


def test_learned_scales() -> None:
    pytest.importorskip("optax")
    import learned_scales

    before, after = learned_scales.main()
    assert after < 0.8 * before


def test_own_observer() -> None:
    import own_observer

    result = own_observer.main()
    assert np.all(result.scores["agreement"] > 0.5) and np.ptp(result.scores["snr"]) > 0
