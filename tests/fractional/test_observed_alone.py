"""Pointwise log-likelihoods of series with missing values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stochdyn.errors import NonFiniteError
from stochdyn.fractional import infer_hurst, sample_fgn

F64 = torch.float64


def _series(length: int = 120) -> np.ndarray:
    return sample_fgn(0.7, length, generator=1, dtype=F64).numpy()


def test_missing_values_are_no_observations() -> None:
    x = _series()
    x[[4, 5, 60]] = np.nan
    data = infer_hurst(x, num_draws=50, seed=0)
    found = data.log_likelihood["series"]
    assert found.shape[-1] == np.isfinite(x).sum()
    assert np.isfinite(found.values).all()
    assert set(found[f"{found.dims[-1]}"].values.tolist()) == set(np.flatnonzero(np.isfinite(x)).tolist())


def test_the_end_cut_off_leaves_the_others_as_they_were() -> None:
    # values missing at the end say nothing: densities of the others are those of the shorter series
    x = _series()
    padded = np.concatenate([x, np.full(7, np.nan)])
    short, long = (
        infer_hurst(v, num_draws=1000, seed=0).log_likelihood["series"].values[0] for v in (x, padded)
    )
    assert short.shape == long.shape
    error = np.sqrt((short.var(0) + long.var(0)) / len(short))
    assert (np.abs(short.mean(0) - long.mean(0)) < 5 * error + 1e-9).all()


def test_a_regressor_may_miss_where_the_series_does() -> None:
    x = _series()
    z = np.linspace(-1.0, 1.0, len(x)) ** 2
    z[10] = np.nan
    with pytest.raises(NonFiniteError, match="regressors"):
        infer_hurst(x, regressors=z, num_draws=20, seed=0)
    x[10] = np.nan
    assert np.isfinite(infer_hurst(x, regressors=z, num_draws=20, seed=0).posterior["hurst"].values).all()
