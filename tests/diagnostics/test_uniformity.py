"""Bands hold what they promise, and ranks that aren't uniform are found out."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

from stochdyn.diagnostics import ecdf_band, rank_uniformity
from stochdyn.diagnostics.uniformity import binomial_interval, rank_ecdf, rank_points
from stochdyn.errors import EmptyDataError, InvalidInputError, TooFewDrawsError


def share_inside(band, values: np.ndarray) -> float:
    ecdf = np.stack([(values <= z).mean(1) for z in band.points], 1)
    inside = (ecdf >= band.lower - 1e-12) & (ecdf <= band.upper + 1e-12)
    return inside.all(1).mean()


@pytest.mark.parametrize(("number", "points", "level"), [(20, 10, 0.9), (100, 50, 0.95), (250, 99, 0.5)])
def test_uniform_values_stay_in_the_band_as_often_as_it_says(number, points, level):
    band = ecdf_band(number, points, level)
    values = np.random.default_rng(0).random((20_000, number))
    error = np.sqrt(band.level * (1 - band.level) / 20_000)
    assert abs(share_inside(band, values) - band.level) < 4 * error
    assert level <= band.level < level + 0.05


def test_at_one_point_the_band_is_the_binomial_interval():
    band = ecdf_band(50, np.array([0.3]), 0.95)
    low, high = scipy.stats.binom.ppf(0.025, 50, 0.3), scipy.stats.binom.isf(0.025, 50, 0.3)
    assert (band.lower[0] * 50, band.upper[0] * 50) == (low, high)
    inside = scipy.stats.binom.cdf(high, 50, 0.3) - scipy.stats.binom.cdf(low - 1, 50, 0.3)
    assert band.level == pytest.approx(inside, rel=1e-12)


def test_the_band_is_symmetric_under_reflection():
    band = ecdf_band(80, 20)
    np.testing.assert_allclose(band.lower, 1 - band.upper[::-1], atol=1e-12)


def test_a_simultaneous_band_is_wider_than_a_pointwise_one():
    band = ecdf_band(100, 50)
    pointwise = scipy.stats.binom.interval(0.95, 100, band.points)
    assert (band.lower * 100 <= pointwise[0]).all()
    assert (band.upper * 100 >= pointwise[1]).all()


@pytest.mark.parametrize("num_ranks", [8, 30, 100, 1000])
def test_ranks_have_the_binomial_law_at_every_point(num_ranks):
    points = rank_points(num_ranks)
    assert len(points) <= 100
    np.testing.assert_allclose(points * num_ranks, np.round(points * num_ranks), atol=1e-9)
    every = np.arange(num_ranks)
    np.testing.assert_allclose(rank_ecdf(every, num_ranks, points), points, atol=1e-12)


@pytest.mark.parametrize("num_ranks", [10, 64, 100])
def test_uniform_ranks_pass_at_the_nominal_rate(num_ranks):
    rng = np.random.default_rng(1)
    tests = [rank_uniformity(rng.integers(0, num_ranks, 100), num_ranks) for _ in range(60)]
    rejected = sum(test.pvalue < 0.1 for test in tests)
    outside = sum(not test.inside for test in tests)
    assert rejected <= scipy.stats.binom.isf(1e-4, 60, 0.1)
    assert outside <= scipy.stats.binom.isf(1e-4, 60, 0.05)
    assert scipy.stats.kstest([test.pvalue for test in tests], "uniform").pvalue > 1e-4


@pytest.mark.parametrize(
    "shape",
    [lambda u: u**1.5, lambda u: 0.2 + 0.6 * u, lambda u: scipy.stats.beta.ppf(u, 0.5, 0.5)],
    ids=["biased", "too wide", "too narrow"],
)
def test_ranks_that_are_not_uniform_fail_both_tests(shape):
    ranks = (shape(np.random.default_rng(2).random(400)) * 100).astype(int)
    test = rank_uniformity(ranks, 100)
    assert test.pvalue < 1e-4
    assert not test.inside
    assert test.excess > 0


def test_bins_that_ranks_do_not_divide_evenly_expect_unequal_counts():
    every = np.tile(np.arange(13), 40)  # 13 ranks, fewer bins
    assert rank_uniformity(every[:60], 13).num_bins == 12
    assert rank_uniformity(every, 13).chi2 == pytest.approx(0)


def test_wilsons_interval_agrees_with_scipy():
    interval = scipy.stats.binomtest(17, 50).proportion_ci(0.9, method="wilson")
    assert binomial_interval(17, 50, 0.9) == pytest.approx((interval.low, interval.high))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ecdf_band(10, level=1.0), InvalidInputError, "level"),
        (lambda: ecdf_band(0), InvalidInputError, "num_values"),
        (lambda: ecdf_band(10, np.array([0.5, 0.2])), InvalidInputError, "points must increase"),
        (lambda: ecdf_band(10, np.array([0.0, 0.2])), InvalidInputError, r"inside \(0, 1\)"),
        (lambda: rank_uniformity(np.array([]), 10), EmptyDataError, "ranks is empty"),
        (lambda: rank_uniformity(np.zeros(9), 10), TooFewDrawsError, "got 9"),
        (lambda: rank_uniformity(np.full(20, 10), 10), InvalidInputError, "expected 0 to 9"),
    ],
)
def test_bad_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
