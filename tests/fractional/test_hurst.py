"""infer_hurst: the Nile, exact posteriors by quadrature, recovery and coverage on exact series."""

from __future__ import annotations

import math
import warnings
from typing import Any

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.optim import ClippedAdam
from scipy.linalg import toeplitz
from scipy.stats import binom, chi2
from torch import Tensor

from stochdyn.datasets import nile_minima
from stochdyn.errors import InvalidInputError, NonFiniteError, ShapeError, TooFewDrawsError
from stochdyn.fractional import (
    HurstGuide,
    HurstLikelihood,
    fgn_autocovariance,
    fit_fgn,
    hurst_model,
    infer_hurst,
    sample_fgn,
)

F64 = torch.float64


def cramer_rao(hurst: float, n: int) -> float:
    """Standard deviation bound of H with the scale unknown: I_ab = tr(R^-1 R_a R^-1 R_b) / 2."""
    h = torch.tensor(hurst, dtype=F64)
    r, slope = torch.func.jvp(lambda v: fgn_autocovariance(n, v), (h,), (torch.ones_like(h),))
    ratio = torch.linalg.solve(torch.as_tensor(toeplitz(r.numpy())), torch.as_tensor(toeplitz(slope.numpy())))
    # log scale has the derivative 2 R
    information = 0.5 * (ratio * ratio.T).sum() - ratio.trace() ** 2 / (2 * n)
    return float(information) ** -0.5


def exact_posterior(y: Tensor, dt: float = 1.0) -> dict[str, tuple[float, float]]:
    """Means and deviations by brute force: inverse matrices on a grid of H, prior 1 / scale, flat mean."""
    n, one = len(y), torch.ones(len(y), dtype=F64)
    h = torch.linspace(0.002, 0.998, 250, dtype=F64)
    rows = []
    for row in fgn_autocovariance(n, h, dt):
        r = torch.as_tensor(toeplitz(row.numpy()))
        p, mu = one @ torch.linalg.solve(r, one), 0.0
        mu = float(one @ torch.linalg.solve(r, y) / p)
        q = (y - mu) @ torch.linalg.solve(r, y - mu)
        rows.append(
            (float(-0.5 * torch.logdet(r) - 0.5 * p.log() - 0.5 * (n - 1) * q.log()), mu, float(q), float(p))
        )
    log_p, mu_h, q_h, p_h = torch.tensor(rows, dtype=F64).T
    weight = torch.softmax(log_p, 0)
    # sigma^2 = q / chi^2 with n - 1 degrees of freedom; the mean is Student given H
    k = n - 1
    scale1 = (q_h / 2).sqrt() * math.exp(math.lgamma((k - 1) / 2) - math.lgamma(k / 2))
    scale2 = q_h / (k - 2)

    def moments(first: Tensor, second: Tensor) -> tuple[float, float]:
        m = float(weight @ first)
        return m, float(weight @ second - m * m) ** 0.5

    return {
        "hurst": moments(h, h**2),
        "scale": moments(scale1, scale2),
        "mean": moments(mu_h, mu_h**2 + q_h / (k - 2) / p_h),
    }


def assert_agrees(idata: Any, exact: dict[str, tuple[float, float]], draws: int) -> None:
    """Means within 5 standard errors plus 2 % of a deviation, deviations within 5 of theirs."""
    for name, (mean, deviation) in exact.items():
        found = idata.posterior[name]
        assert abs(float(found.mean()) - mean) < (5 / math.sqrt(draws) + 0.02) * deviation, name
        assert float(found.std()) == pytest.approx(deviation, rel=0.02 + 5 / math.sqrt(draws)), name


@pytest.fixture(scope="module")
def nile() -> Any:
    return infer_hurst(nile_minima().level, num_draws=4000, seed=0)


def test_nile_posterior_agrees_with_the_published_fit(nile: Any) -> None:
    hurst = nile.posterior["hurst"]
    assert abs(float(hurst.mean()) - 0.8315) < 0.015
    assert abs(float(hurst.std()) / 0.0246 - 1) < 0.1
    assert abs(float(nile.posterior["mean"].mean()) - 1149.9) < 20


def test_nile_posterior_agrees_with_brute_force(nile: Any) -> None:
    assert_agrees(nile, exact_posterior(nile_minima().level.double()), 4000)


@pytest.mark.parametrize(("hurst", "n"), [(0.95, 20), (0.05, 20), (0.5, 9), (0.7, 120)])
@pytest.mark.filterwarnings("ignore:.*of the posterior of the Hurst index")
def test_short_series_and_indices_near_the_edges(hurst: float, n: int) -> None:
    y = sample_fgn(hurst, n, dt=0.5, generator=torch.Generator().manual_seed(3))
    exact = exact_posterior(y, 0.5)
    exact.pop("mean")  # of infinite variance next to 1
    assert_agrees(infer_hurst(y, dt=0.5, num_draws=4000), exact, 4000)


def test_container_has_the_groups_that_arviz_asks_for(nile: Any) -> None:
    assert set(nile.posterior.data_vars) == {"hurst", "mean", "scale"}
    assert dict(nile.posterior.sizes) == {"chain": 1, "draw": 4000}
    assert nile.log_likelihood["series"].shape == (1, 4000, 663)
    assert nile.posterior_predictive["series"].shape == (1, 4000, 663)
    assert np.array_equal(nile.observed_data["series"].values, nile_minima().level.numpy())
    total = nile.log_likelihood["series"].sum("time").values[0]
    h, m, s = (torch.as_tensor(nile.posterior[k].values[0]) for k in ("hurst", "mean", "scale"))
    exact = HurstLikelihood(nile_minima().level)(h, m, s).numpy()
    # interpolated between nodes
    assert np.abs(total - exact).max() < 0.005
    # replicated series look like the data: mean and deviation inside the spread of the replications
    replicated = nile.posterior_predictive["series"].values[0]
    for statistic in (np.mean, np.std):
        values = statistic(replicated, axis=-1)
        assert np.quantile(values, 1e-3) < statistic(nile_minima().level.numpy()) < np.quantile(values, 0.999)


@pytest.mark.parametrize("moved", ["drift", "unit", "float32", "list", "pandas", "numpy"])
def test_the_answer_has_no_unit_origin_or_container(moved: str) -> None:
    y = sample_fgn(0.7, 150, generator=torch.Generator().manual_seed(1))
    forms: dict[str, Any] = {
        "drift": y + 100 * float(y.std()), "unit": 1e-9 * y, "float32": y.float(), "list": y.tolist(),
        "numpy": y.numpy(),
    }  # fmt: skip
    if moved == "pandas":
        forms["pandas"] = pytest.importorskip("pandas").Series(y.numpy())
    here, there = (infer_hurst(x, num_draws=200).posterior["hurst"].values for x in (y, forms[moved]))
    assert np.abs(here - there).max() < (1e-4 if moved == "float32" else 1e-7)


def test_missing_values_are_integrated_out() -> None:
    """The same posterior by free coefficients on the grid as by the covariance of what was observed."""
    y = sample_fgn(0.75, 90, generator=torch.Generator().manual_seed(5))
    y[[3, 4, 50, 89]] = math.nan
    seen = ~torch.isnan(y)
    gaps = infer_hurst(y, num_draws=500)
    times = infer_hurst(y[seen], times=torch.arange(90)[seen], num_draws=500)
    for name in ("hurst", "scale"):
        assert np.allclose(gaps.posterior[name].values, times.posterior[name].values, rtol=1e-6)
    assert np.isnan(gaps.posterior_predictive["series"].values[0, :, 3]).all()


def test_several_series_share_an_index_and_their_order_says_nothing() -> None:
    g = torch.Generator().manual_seed(6)
    rows = [scale * sample_fgn(0.7, n, generator=g) for n, scale in ((5, 1.0), (40, 10.0), (80, 0.1))]
    one, other = infer_hurst(rows, num_draws=4000), infer_hurst(rows[::-1], num_draws=4000)
    assert one.posterior["scale"].shape == (1, 4000, 3)
    a, b = (i.posterior["hurst"].values for i in (one, other))
    assert abs(a.mean() - b.mean()) < 5 * a.std() * math.sqrt(2 / 4000)
    # and with copies of one series, components or list alike, the posterior tightens
    twice = torch.stack([rows[2], rows[2]], 1)
    c, d = (infer_hurst(x, num_draws=1000).posterior["hurst"].values for x in (twice, [rows[2], rows[2]]))
    assert np.allclose(c, d)
    assert c.std() < 0.85 * infer_hurst(rows[2], num_draws=1000).posterior["hurst"].values.std()


def test_a_hierarchy_shrinks_towards_its_centre() -> None:
    g = torch.Generator().manual_seed(7)
    rows = [sample_fgn(h, 80, generator=g) for h in (0.3, 0.5, 0.5, 0.7, 0.9)]
    idata = infer_hurst(rows, hierarchy=True, num_draws=2000)
    hurst = idata.posterior["hurst"].values[0]
    assert hurst.shape == (2000, 5)
    alone = np.array([infer_hurst(r, num_draws=2000).posterior["hurst"].values.mean() for r in rows])
    assert np.ptp(hurst.mean(0)) < np.ptp(alone)
    assert np.corrcoef(hurst.mean(0), alone)[0, 1] > 0.95
    assert {"hurst_center", "hurst_width"} <= set(idata.posterior.data_vars)


def test_regression_and_short_memory_are_told_from_long() -> None:
    g = torch.Generator().manual_seed(8)
    t = torch.arange(400, dtype=F64)
    y = sample_fgn(0.6, 400, generator=g)
    wave = 2 * torch.sin(2 * math.pi * t / 50)
    moved = infer_hurst(y + wave + 0.02 * t, season=50.0, trend=True, num_draws=500)
    plain = infer_hurst(y, season=50.0, trend=True, num_draws=500)
    assert np.abs(moved.posterior["hurst"].values - plain.posterior["hurst"].values).max() < 1e-7
    slope = moved.posterior["coefficients"].values[0]
    assert abs(slope[:, 0].mean() - 0.02) < 5 * slope[:, 0].std()
    assert abs(slope[:, 2].mean() - 2) < 5 * slope[:, 2].std()
    x = torch.zeros(500, dtype=F64)
    e = torch.randn(500, generator=torch.Generator().manual_seed(5), dtype=F64)
    for k in range(1, 500):
        x[k] = 0.6 * x[k - 1] + e[k]
    idata = infer_hurst(x, short_memory="ar1", num_draws=500)
    for name, truth in (("hurst", 0.5), ("phi", 0.6)):
        draws = idata.posterior[name]
        assert abs(float(draws.mean()) - truth) < 3 * float(draws.std())
    noisy = sample_fgn(0.8, 400, generator=g) + torch.randn(400, generator=g, dtype=F64)
    white = infer_hurst(noisy, short_memory="white", num_draws=500).posterior
    assert abs(float(white["hurst"].mean()) - 0.8) < 3 * float(white["hurst"].std())
    assert abs(float(white["white_scale"].mean()) - 1) < 3 * float(white["white_scale"].std())


def _wrong(kind: str) -> Tensor:
    g = torch.Generator().manual_seed(5)
    y = sample_fgn(0.6, 500, generator=g)
    if kind == "cycle":
        return y + torch.sin(2 * math.pi * torch.arange(500) / 100)
    if kind == "outlier":
        y[77] = 30.0
        return y
    if kind == "within 0.02 of 1":
        return y.cumsum(0)
    x, e = (
        torch.zeros(500, dtype=F64),
        torch.randn(500, generator=torch.Generator().manual_seed(5), dtype=F64),
    )
    for k in range(1, 500):
        x[k] = 0.6 * x[k - 1] + e[k]
    return x


@pytest.mark.parametrize("kind", ["short memory", "cycle", "outlier", "within 0.02 of 1"])
def test_what_is_not_fractional_noise_is_named(kind: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        infer_hurst(_wrong(kind), num_draws=200)
    assert any(kind in str(w.message) for w in caught)


def test_fractional_noise_passes_its_checks() -> None:
    """60 p-values of true models: none below 1e-4 (a false alarm in 170 runs), and not all of them large."""
    found = []
    for seed in range(20):
        y = sample_fgn([0.2, 0.5, 0.8][seed % 3], 150, generator=torch.Generator().manual_seed(seed))
        attrs = infer_hurst(y, num_draws=10, predictive=False).attrs
        found += [attrs[f"check_{k}"] for k in ("memory", "season", "outlier")]
    assert 1e-4 < min(found) < 0.2


def test_a_long_series_is_exact_and_the_longest_take_the_whittle_likelihood() -> None:
    y = sample_fgn(0.7, 2500, generator=torch.Generator().manual_seed(0))
    fit, idata = fit_fgn(y), infer_hurst(y, num_draws=2000)
    draws = idata.posterior["hurst"]
    assert abs(float(draws.mean()) - fit.hurst) < 0.3 * fit.stderr
    assert float(draws.std()) == pytest.approx(fit.stderr, rel=0.1)
    y = sample_fgn(0.7, 40_000, generator=torch.Generator().manual_seed(0))
    idata = infer_hurst(y, num_draws=1000)
    assert idata.attrs["likelihood"] == "whittle"
    draws = idata.posterior["hurst"]
    assert abs(float(draws.mean()) - 0.7) < 4 * float(draws.std())
    assert float(draws.std()) == pytest.approx(cramer_rao(0.7, 1000) * math.sqrt(1000 / 40_000), rel=0.1)


def test_reproducible_and_without_side_effects() -> None:
    y = sample_fgn(0.6, 60, generator=torch.Generator().manual_seed(2))
    pyro.get_param_store()["mine"] = torch.tensor(1.0)
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    a, b, c = (infer_hurst(y, num_draws=100, seed=seed, predictive=False) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    assert list(pyro.get_param_store().keys()) == ["mine"]
    assert np.array_equal(a.posterior["hurst"].values, b.posterior["hurst"].values)
    assert not np.array_equal(a.posterior["hurst"].values, c.posterior["hurst"].values)
    assert "posterior_predictive" not in a
    assert a.attrs["seed"] == 1


def test_steps_set_the_unit_of_the_scale() -> None:
    """A path of unit fBM on [0, 1] in n steps: scale is 1, not n^-H."""
    n = 300
    y = sample_fgn(0.7, n, dt=1 / n, generator=torch.Generator().manual_seed(4))
    idata = infer_hurst(y, dt=1 / n, num_draws=500)
    scale = idata.posterior["scale"]
    assert abs(math.log(float(scale.mean()))) < 4 * float(np.log(scale).std())


def test_cramer_rao_bound_is_the_published_one() -> None:
    """n = 200, scale unknown: 0.040, 0.044 and 0.045."""
    for hurst, bound in ((0.3, 0.040), (0.5, 0.044), (0.7, 0.045)):
        assert cramer_rao(hurst, 200) == pytest.approx(bound, abs=6e-4)


@pytest.mark.slow
def test_intervals_cover_at_the_right_rate() -> None:
    """50 series of 1000 values, ten for each of five indices.

    The number of 90 % intervals that cover is binomial, the squared errors over the Cramer-Rao variance are
    chi-square; both within their central 99.9 %.
    """
    covered, squares = 0, 0.0
    for hurst in (0.15, 0.3, 0.5, 0.7, 0.9):
        bound = cramer_rao(hurst, 1000)
        for seed in range(10):
            y = sample_fgn(hurst, 1000, generator=torch.Generator().manual_seed(1000 + seed))
            idata = infer_hurst(y, num_draws=1000, predictive=False)
            draws = idata.posterior["hurst"].values
            low, high = np.quantile(draws, [0.05, 0.95])
            covered += bool(low < hurst < high)
            squares += (draws.mean() - hurst) ** 2 / bound**2
    assert binom.ppf(5e-4, 50, 0.9) <= covered <= binom.ppf(1 - 5e-4, 50, 0.9)
    assert chi2.ppf(5e-4, 50) < squares < chi2.ppf(1 - 5e-4, 50)


@pytest.mark.parametrize(
    ("series", "error", "message"),
    [
        (torch.empty(0, dtype=F64), TooFewDrawsError, "too short"),
        (torch.randn(4), TooFewDrawsError, "too short"),
        ([torch.randn(9), torch.randn(4)], TooFewDrawsError, r"series\[1\] is too short"),
        (torch.full((30,), float("nan")), TooFewDrawsError, "0 observed values"),
        (torch.tensor([1.0, float("inf")] * 10), NonFiniteError, "inf"),
        (torch.ones(30), InvalidInputError, "series is constant"),
        (torch.randn(30, 2, 2), ShapeError, "wrong number of axes"),
        ("series", InvalidInputError, "series"),
        (None, InvalidInputError, "series"),
        ([torch.randn(9), torch.randn(9, 2)], ShapeError, "number of components"),
    ],
)
def test_bad_series(series: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        infer_hurst(series)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"num_draws": 0}, {"dt": -1.0}, {"dt": "x"}, {"seed": -1}, {"short_memory": "arma"}, {"season": 0.0},
        {"trend": "yes"}, {"hierarchy": True}, {"regressors": torch.ones(30)}, {"regressors": torch.ones(7)},
        {"times": torch.zeros(30)}, {"times": torch.arange(30), "short_memory": "ar1"},
    ],
)  # fmt: skip
def test_bad_options(kwargs: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        infer_hurst(torch.randn(30), **kwargs)


def test_the_variational_way_agrees_with_the_exact_one() -> None:
    """The structured guide, fitted with stock SVI, against quadrature."""
    y = sample_fgn(0.7, 200, generator=torch.Generator().manual_seed(4))
    table = HurstLikelihood(y)
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    guide = HurstGuide(table, fit_fgn(y))
    elbo = Trace_ELBO(num_particles=32, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(hurst_model, guide, ClippedAdam({"lr": 0.02, "lrd": 0.99}), elbo)
    for _ in range(300):
        svi.step(table)
    with pyro.plate("draws", 2000):
        draws = pyro.poutine.trace(guide).get_trace(table).nodes["hurst"]["value"].detach()
    mean, deviation = exact_posterior(y)["hurst"]
    assert abs(float(draws.mean()) - mean) < 0.2 * deviation
    assert float(draws.std()) == pytest.approx(deviation, rel=0.15)
