"""Programs of users that once went wrong, with what they now get."""

from __future__ import annotations

import warnings

import torch

import stochdyn as sd


def test_a_drift_in_a_path_does_not_change_its_roughness() -> None:
    n = 200
    path = sd.fractional.sample_fbm(0.3, n, horizon=float(n), generator=torch.Generator().manual_seed(0))
    moved = path + 100.0 * torch.arange(n + 1.0, dtype=torch.float64)
    a, b = (sd.fractional.infer_roughness(x, num_draws=300).posterior["hurst"].values for x in (path, moved))
    assert abs(a.mean() - b.mean()) < 1e-3
    assert abs(a.std() - b.std()) < 1e-3


def test_short_memory_is_not_taken_for_long_without_a_word() -> None:
    e = torch.randn(500, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    x = torch.zeros(500, dtype=torch.float64)
    for k in range(1, 500):
        x[k] = 0.6 * x[k - 1] + e[k]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        idata = sd.fractional.infer_hurst(x, num_draws=400)
    assert any("short_memory='ar1'" in str(w.message) for w in caught)
    assert idata.attrs["check_memory"] < 1e-3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hurst = sd.fractional.infer_hurst(x, short_memory="ar1", num_draws=400).posterior["hurst"].values
    assert hurst.min() < 0.5 < hurst.max()
