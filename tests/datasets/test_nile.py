"""The shipped series is the published one."""

from __future__ import annotations

import torch

from stochdyn.datasets import nile_minima


def test_nile_is_complete_and_yearly() -> None:
    years, level = nile_minima()
    assert years.shape == level.shape == (663,)
    assert torch.equal(years, torch.arange(622, 1285, dtype=torch.float64))


def test_nile_digits() -> None:
    level = nile_minima().level
    assert level.dtype == torch.float64
    assert level[:4].tolist() == [1157.0, 1088.0, 1169.0, 1169.0]
    assert level[-1] == 1097.0
    assert level.sum() == 761207.0
    assert abs(float(level.std()) - 88.7473) < 1e-4
