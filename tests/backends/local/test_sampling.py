"""Tokens are drawn as temperature and nucleus say."""

from __future__ import annotations

import numpy as np
import pytest

from backends.local.sampling import draw


def test_draws_follow_temperature_and_nucleus() -> None:
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))

    def shares(temperature: float, top_p: float) -> np.ndarray:
        rng = np.random.default_rng(0)
        return np.bincount([draw(logits, temperature, top_p, rng) for _ in range(4000)], minlength=3) / 4000

    assert shares(1.0, 1.0) == pytest.approx([0.1, 0.6, 0.3], abs=0.03)
    assert shares(1.0, 0.85) == pytest.approx([0, 0.6 / 0.9, 0.3 / 0.9], abs=0.03)  # 0.6 + 0.3 is the least above 0.85
    assert shares(1.0, 0.6 - 1e-6) == pytest.approx([0, 1, 0], abs=0)
    # At temperature 0.5 the probabilities are squared: .01, .36, .09 over .46.
    assert shares(0.5, 1.0) == pytest.approx([0.01 / 0.46, 0.36 / 0.46, 0.09 / 0.46], abs=0.03)
    assert shares(0, 1.0).tolist() == [0, 1, 0]
