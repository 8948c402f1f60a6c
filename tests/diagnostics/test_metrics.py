"""Distances and scores agree with closed forms and with other libraries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stochdyn.diagnostics import (
    crps,
    emd,
    energy_distance,
    interval_coverage,
    mmd,
    negative_log_predictive_density,
    psnr,
    rmse,
)
from stochdyn.errors import EmptyDataError, InvalidInputError, NonFiniteError, ShapeError, TooFewDrawsError
from stochdyn.testing import check_gradients


def points(n: int, d: int, seed: int) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def best_matching(x: torch.Tensor, y: torch.Tensor, p: float) -> float:
    cost = torch.cdist(x, y) ** p
    orders = itertools.permutations(range(len(x)))
    return min(float(cost[range(len(x)), list(order)].mean()) for order in orders) ** (1 / p)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_emd_is_the_best_matching(p):
    x, y = points(6, 2, 0), points(6, 2, 1) + 0.5
    assert emd(x, y, p) == pytest.approx(best_matching(x, y, p), rel=1e-9)


@pytest.mark.parametrize("p", [1, 2])
def test_emd_on_the_line_is_the_best_matching(p):
    x, y = points(6, 1, 0), 2 * points(6, 1, 1)
    assert emd(x, y, p) == pytest.approx(best_matching(x, y, p), rel=1e-9)
    assert emd(x[:, 0], y[:, 0], p) == emd(x, y, p)


def test_emd_on_the_line_agrees_with_scipy_for_weights():
    x, y, a, b = points(7, 1, 0)[:, 0], points(5, 1, 1)[:, 0], torch.rand(7), torch.rand(5)
    expected = scipy.stats.wasserstein_distance(x, y, a, b)
    assert emd(x, y, 1, a, b) == pytest.approx(expected, rel=1e-6)


def test_emd_of_repeated_points_is_that_of_weighted_ones():
    x, y = points(3, 2, 0), points(4, 2, 1)
    repeated = x[torch.tensor([0, 0, 1, 2, 2, 2])]
    assert emd(x, y, 2, torch.tensor([2.0, 1.0, 3.0])) == pytest.approx(emd(repeated, y), rel=1e-9)


@pytest.mark.parametrize("d", [1, 3])
def test_emd_of_a_shift_is_its_length(d):
    x = points(50, d, 0)
    shift = torch.arange(1.0, d + 1, dtype=torch.float64)
    for p in (1, 2):
        assert emd(x, x + shift, p) == pytest.approx(shift.norm().item(), rel=1e-9)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 5), st.sampled_from([1, 2]), st.integers(0, 99))
def test_emd_is_a_metric(n, m, k, p, seed):
    x, y, z = points(n, 2, seed), points(m, 2, seed + 1), points(k, 2, seed + 2)
    assert emd(x, y, p) == pytest.approx(emd(y, x, p), abs=1e-9)
    assert emd(x, x, p) == pytest.approx(0, abs=1e-7)
    assert emd(x, z, p) <= emd(x, y, p) + emd(y, z, p) + 1e-9


def test_the_energy_distance_agrees_with_scipy_on_the_line():
    x, y = points(40, 1, 0)[:, 0], 1.5 * points(30, 1, 1)[:, 0]
    expected = scipy.stats.energy_distance(x, y)
    assert energy_distance(x, y).item() == pytest.approx(expected, rel=1e-9)


def test_the_energy_distance_does_not_depend_on_its_chunks(monkeypatch):
    x, y = points(40, 2, 0), points(30, 2, 1)
    by_hand = 2 * torch.cdist(x, y).mean() - torch.cdist(x, x).mean() - torch.cdist(y, y).mean()
    split = torch.Tensor.split
    monkeypatch.setattr(torch.Tensor, "split", lambda self, size: split(self, 7))
    assert energy_distance(x, y).item() == pytest.approx(by_hand.sqrt().item(), rel=1e-9)


def test_mmd_of_two_gaussians_is_within_its_noise():
    h, shift = 1.0, 1.0
    x, y = points(2000, 1, 0), points(2000, 1, 1) + shift
    # E k(X, Y) with X - Y ~ N(m, 2): h / sqrt(h^2 + 2) exp(-m^2 / (2 (h^2 + 2)))
    width = h**2 + 2
    same = h / math.sqrt(width)
    expected = 2 * same * (1 - math.exp(-(shift**2) / (2 * width)))
    bias = 2 * (1 - same) / 2000  # pairs of a point with itself

    def witness(u: torch.Tensor) -> torch.Tensor:
        kernel = lambda v: torch.exp(-((u - v.T) ** 2) / (2 * h**2)).mean(1)  # noqa: E731
        return kernel(x) - kernel(y)

    error = 2 * ((witness(x).var() + witness(y).var()) / 2000).sqrt().item()
    assert abs(mmd(x, y, bandwidth=h).item() ** 2 - expected - bias) < 4 * error


def test_mmd_of_two_points_is_exact():
    x, y = torch.zeros(1, 2), torch.ones(1, 2)
    assert mmd(x, y, bandwidth=2.0).item() == pytest.approx(math.sqrt(2 - 2 * math.exp(-2 / 8)), rel=1e-12)


@pytest.mark.parametrize("distance", [energy_distance, mmd])
def test_a_sample_has_no_distance_from_itself(distance):
    x = points(20, 3, 0)
    assert distance(x, x).item() == pytest.approx(0, abs=1e-7)
    assert distance(x, x + 2).item() > 0.5


def test_mmd_takes_the_median_distance_for_its_bandwidth():
    x, y = points(9, 2, 0), points(8, 2, 1)
    median = torch.pdist(torch.cat([x, y])).median().item()
    assert mmd(x, y) == mmd(x, y, bandwidth=median)
    assert mmd(torch.zeros(3, 1), torch.zeros(2, 1)) == 0


@pytest.mark.parametrize(
    ("x", "y", "error", "message"),
    [
        (torch.zeros(0, 2), torch.zeros(3, 2), EmptyDataError, "x is empty"),
        (torch.zeros(3, 2), torch.zeros(0, 2), EmptyDataError, "y is empty"),
        (torch.zeros(3, 2), torch.zeros(3, 1), ShapeError, r"y has the wrong size.*\(3, 1\).*expected 2"),
        (torch.zeros(3, 2, 2), torch.zeros(3, 2), ShapeError, "x has the wrong number of axes"),
        (torch.tensor([[math.nan]]), torch.zeros(3, 1), NonFiniteError, r"x\[0, 0\]=nan"),
        (torch.zeros(3, 1), torch.tensor([[0.0], [math.inf]]), NonFiniteError, r"y\[1, 0\]=inf"),
    ],
)
@pytest.mark.parametrize("distance", [emd, energy_distance, mmd])
def test_bad_samples_are_named(distance, x, y, error, message):
    with pytest.raises(error, match=message):
        distance(x, y)


def test_bad_orders_weights_and_bandwidths_are_named():
    x = torch.zeros(3, 1)
    with pytest.raises(InvalidInputError, match=r"p must be at least 1; got 0\.5"):
        emd(x, x, 0.5)
    with pytest.raises(ShapeError, match="weights_x"):
        emd(x, x, 2, torch.ones(2))
    with pytest.raises(InvalidInputError, match="weights_y must be non-negative"):
        emd(x, x, 2, None, torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(NonFiniteError, match="weights_x"):
        emd(x, x, 2, torch.tensor([1.0, math.nan, 1.0]))
    with pytest.raises(InvalidInputError, match="bandwidth"):
        mmd(x, x, bandwidth=0.0)


def test_arrays_of_numpy_are_taken():
    assert emd(np.zeros((3, 2)), np.ones((4, 2))) == pytest.approx(math.sqrt(2))


# ------------------------------------------------------------------------------------------------ scores


@pytest.mark.parametrize("fair", [True, False])
def test_crps_is_its_definition(fair):
    draws, value = points(12, 3, 0), points(1, 3, 1)[0]
    pairs = (draws[:, None] - draws[None]).abs().sum((0, 1)) / (12 * (11 if fair else 12))
    expected = (draws - value).abs().mean(0) - pairs / 2
    torch.testing.assert_close(crps(draws, value, fair=fair), expected)


def test_fair_crps_is_unbiased_for_a_gaussian():
    value = torch.tensor(0.7, dtype=torch.float64)
    density, below = math.exp(-(0.7**2) / 2) / math.sqrt(2 * math.pi), scipy.stats.norm.cdf(0.7)
    exact = 0.7 * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi)
    scores = crps(points(4, 40_000, 0), value.expand(40_000))
    assert abs(scores.mean() - exact) < 4 * scores.std() / 200


def test_coverage_counts_what_is_inside():
    draws = torch.linspace(0, 1, 1001)[:, None].expand(1001, 4)
    estimate = interval_coverage(draws, torch.tensor([0.04, 0.06, 0.94, 0.96]), level=0.9)
    assert estimate.mean == 0.5
    assert estimate.stderr == pytest.approx(math.sqrt(0.9 * 0.1 / 4))


def test_coverage_of_calibrated_draws_is_nominal():
    draws, value = points(4000, 2000, 0), points(1, 2000, 1)[0]
    estimate = interval_coverage(draws, value, level=0.8)
    assert abs(estimate.mean - 0.8) < 4 * estimate.stderr


def test_predictive_density_of_a_gaussian_mixture():
    means = points(50, 1, 0)
    y = torch.tensor([0.0, 1.0], dtype=torch.float64)
    log_likelihood = torch.distributions.Normal(means, 1.0).log_prob(y)
    weights = torch.rand(50, dtype=torch.float64)
    plain = -log_likelihood.exp().mean(0).log()
    weighted = -((weights / weights.sum())[:, None] * log_likelihood.exp()).sum(0).log()
    torch.testing.assert_close(negative_log_predictive_density(log_likelihood), plain)
    torch.testing.assert_close(negative_log_predictive_density(log_likelihood, weights.log()), weighted)


def test_rmse_and_psnr_are_what_they_say():
    x, y = points(4, 5, 0), points(4, 5, 1)
    torch.testing.assert_close(rmse(x, y), ((x - y) ** 2).mean().sqrt())
    torch.testing.assert_close(rmse(x, y, dim=-1), ((x - y) ** 2).mean(-1).sqrt())
    torch.testing.assert_close(psnr(x, y, 255.0), 10 * torch.log10(255.0**2 / ((x - y) ** 2).mean()))
    assert psnr(x, x, 1.0) == math.inf


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: rmse(torch.zeros(0), torch.zeros(0)), EmptyDataError, "prediction is empty"),
        (lambda: rmse(torch.zeros(2), torch.zeros(3)), ShapeError, r"\(2,\) and \(3,\)"),
        (lambda: rmse(torch.zeros(1), torch.tensor([math.nan])), NonFiniteError, "target"),
        (lambda: psnr(torch.zeros(1), torch.zeros(1), 0.0), InvalidInputError, "data_range"),
        (lambda: crps(torch.zeros(1, 2), torch.zeros(2)), TooFewDrawsError, "got 1; expected at least 2"),
        (lambda: crps(torch.zeros(4, 3), torch.zeros(2)), ShapeError, "one more axis"),
        (lambda: crps(torch.full((4, 2), math.nan), torch.zeros(2)), NonFiniteError, "draws"),
        (lambda: interval_coverage(torch.zeros(9, 2), torch.zeros(2)), TooFewDrawsError, "at least 40"),
        (lambda: interval_coverage(torch.zeros(99, 2), torch.zeros(2), 1.0), InvalidInputError, "level"),
        (lambda: negative_log_predictive_density(torch.zeros(0, 2)), EmptyDataError, "log_likelihood"),
        (
            lambda: negative_log_predictive_density(torch.zeros(3, 2), torch.zeros(2)),
            ShapeError,
            "one entry per draw",
        ),
    ],
)
def test_bad_predictions_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# ------------------------------------------------------------------------------------- units and forms of data

LENGTHS = {
    "emd": lambda x, y: emd(x, y),
    "emd in one dimension": lambda x, y: emd(x[:, 0], y[:, 0], p=1),
    "emd of order 3": lambda x, y: emd(x, y, p=3),
    "energy_distance": lambda x, y: energy_distance(x, y) ** 2,
    "crps": lambda x, y: crps(x, y[0]).sum(),
    "rmse": lambda x, y: rmse(x, y[: len(x)]),
}


@pytest.mark.parametrize("unit", [1e-150, 1e-12, 1e12, 1e90])
@pytest.mark.parametrize("metric", LENGTHS)
def test_distances_are_in_the_units_of_the_data(metric, unit):
    x, y = points(12, 2, 0), points(15, 2, 1) + 0.3
    found = float(LENGTHS[metric](unit * x, unit * y)) / unit
    assert found == pytest.approx(float(LENGTHS[metric](x, y)), rel=1e-9)


@pytest.mark.parametrize("unit", [1e-150, 1e-12, 1e12, 1e150])
def test_mmd_and_scores_without_units_do_not_depend_on_them(unit):
    x, y = points(12, 2, 0), points(15, 2, 1) + 0.3
    assert float(mmd(unit * x, unit * y)) == pytest.approx(float(mmd(x, y)), rel=1e-9)
    inside = interval_coverage(unit * points(99, 3, 2), unit * points(3, 1, 3)[:, 0]).mean
    assert inside == interval_coverage(points(99, 3, 2), points(3, 1, 3)[:, 0]).mean


def test_the_bandwidth_of_samples_that_mostly_coincide_is_a_distance():
    x, y = torch.zeros(20, 1), torch.zeros(20, 1)
    assert mmd(x, y) == 0.0
    x[0], y[0] = 1e-9, 3e-9
    assert float(mmd(x, y)) == pytest.approx(float(mmd(1e9 * x, 1e9 * y)), rel=1e-6)
    assert mmd(x, y) > 0


@pytest.mark.parametrize("form", ["lists", "numpy", "pandas", "xarray"])
def test_samples_of_any_form(form):
    import xarray
    from pandas import DataFrame

    make = {
        "lists": lambda v: v.tolist(),
        "numpy": lambda v: v.numpy(),
        "pandas": lambda v: DataFrame(v.numpy()),
        "xarray": lambda v: xarray.DataArray(v.numpy()),
    }[form]
    x, y = points(12, 2, 0), points(12, 2, 1)
    for metric in (emd, energy_distance, mmd, rmse):
        assert float(metric(make(x), make(y))) == pytest.approx(float(metric(x, y)), rel=1e-6)


@pytest.mark.parametrize("metric", [energy_distance, lambda x, y: mmd(x, y, bandwidth=0.8)])
def test_distances_between_samples_have_gradients(metric: Callable[..., torch.Tensor]) -> None:
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, 2, dtype=torch.float64, generator=g) + n / 5 for n in (4, 5))
    check_gradients(metric, x, y, second=False)
    assert mmd(x.requires_grad_(), y).requires_grad
