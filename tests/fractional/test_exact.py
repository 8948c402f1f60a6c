"""Exact covariances and samplers of fractional processes."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chi2

from stochdyn.errors import HurstRangeError, InvalidInputError, TimeGridError
from stochdyn.fractional import (
    fbm_covariance,
    fgn_autocovariance,
    fou_autocovariance,
    hurst_log_likelihood,
    multifractional_covariance,
    sample_fbm,
    sample_fgn,
    variance_constant,
)
from stochdyn.testing import check_gradients

F64 = torch.float64
FIVE = torch.tensor([0.25, 0.5, 1.0, 1.5, 2.0], dtype=F64)
DATA = torch.tensor([0.3, -0.1, 0.4, 0.8, 0.5], dtype=F64)


def log_evidence(cov: torch.Tensor) -> float:
    total = cov + 0.01 * torch.eye(5, dtype=F64)
    return float(torch.distributions.MultivariateNormal(torch.zeros(5, dtype=F64), total).log_prob(DATA))


@pytest.mark.parametrize(
    ("hurst", "type1", "type2"),
    [
        (0.2, -3.876325, -5.031989),
        (0.3, -3.640527, -4.189953),
        (0.5, -3.207240, -3.207240),
        (0.7, -3.026656, -2.934830),
        (0.9, -4.030619, -3.360160),
    ],
)
def test_published_five_observation_evidence(hurst: float, type1: float, type2: float) -> None:
    assert log_evidence(fbm_covariance(FIVE, hurst)) == pytest.approx(type1, abs=1.1e-6)
    unnormalised = fbm_covariance(FIVE, hurst, "II") * variance_constant(hurst, "II")
    assert log_evidence(unnormalised) == pytest.approx(type2, abs=1.1e-6)


@pytest.mark.parametrize(
    ("hurst", "deviations", "evidence"),
    [
        (0.1, [0.8258, 0.8458, 0.8270, 0.0996], -0.9926),
        (0.3, [0.7260, 0.7897, 0.7287, 0.0997], -1.1302),
        (0.5, [0.6129, 0.7089, 0.6169, 0.0998], -1.2680),
        (0.7, [0.4802, 0.5854, 0.4856, 0.0998], -1.4060),
        (0.9, [0.2856, 0.3632, 0.2945, 0.0999], -1.5442),
    ],
)
def test_published_fbm_bridges(hurst: float, deviations: list[float], evidence: float) -> None:
    cov = fbm_covariance(torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=F64), hurst)
    total = cov[-1, -1] + 0.01
    found = (cov.diagonal() - cov[-1] ** 2 / total).sqrt()
    assert torch.allclose(found, torch.tensor(deviations, dtype=F64), atol=5.1e-5)
    assert float(-0.5 * torch.log(2 * math.pi * total)) == pytest.approx(evidence, abs=5.1e-5)


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("hurst", [0.05, 0.4, 0.5, 0.95])
def test_both_kinds_have_unit_variance_and_scale(kind: str, hurst: float) -> None:
    ts = torch.tensor([0.0, 1e-3, 0.4, 1.0, 3.0], dtype=F64)
    cov = fbm_covariance(ts, hurst, kind)
    assert torch.allclose(cov.diagonal(), ts ** (2 * hurst), rtol=1e-10)
    assert torch.allclose(fbm_covariance(7 * ts, hurst, kind), 7 ** (2 * hurst) * cov, rtol=1e-9)
    assert torch.linalg.eigvalsh(cov).min() > -1e-12


@pytest.mark.parametrize("hurst", [0.2, 0.8])
def test_type_two_covariance_is_the_integral_of_its_kernel(hurst: float) -> None:
    e = mp.mpf(hurst) - mp.mpf("0.5")
    cov = fbm_covariance(FIVE, hurst, "II")
    for i, j in ((0, 1), (1, 4), (3, 4)):
        s, t = float(FIVE[i]), float(FIVE[j])
        # u = s - v^4 tames the end point
        integral = mp.quad(lambda v, s=s, t=t: 4 * v**3 * v ** (4 * e) * (t - s + v**4) ** e, [0, s**0.25])
        assert float(cov[i, j]) == pytest.approx(float(2 * hurst * integral), rel=1e-9)


def test_increments_have_the_autocovariance_of_the_noise() -> None:
    step, hurst = 0.3, 0.2
    cov = fbm_covariance(torch.arange(9, dtype=F64) * step, hurst)
    increments = cov[1:, 1:] - cov[:-1, 1:] - cov[1:, :-1] + cov[:-1, :-1]
    assert torch.allclose(increments[0], fgn_autocovariance(8, hurst, step), atol=1e-12)


def test_autocovariance_at_long_lags() -> None:
    """r(k) tends to H (2H - 1) k^(2H - 2), where naive differences have lost all digits."""
    for hurst in (0.1, 0.7):
        r = float(fgn_autocovariance(1_000_001, hurst)[-1])
        assert r == pytest.approx(hurst * (2 * hurst - 1) * 1e6 ** (2 * hurst - 2), rel=1e-6)


def test_gradients_of_the_exact_laws() -> None:
    h = torch.tensor([0.3, 0.8], dtype=F64, requires_grad=True)
    check_gradients(fbm_covariance, FIVE, h.detach(), second=False)
    assert torch.autograd.gradcheck(lambda v: fgn_autocovariance(6, v, 0.5), h)

    def draw(v: torch.Tensor) -> torch.Tensor:
        return sample_fgn(v, 5, generator=torch.Generator().manual_seed(0))

    assert torch.autograd.gradcheck(draw, h)


@pytest.mark.parametrize("hurst", [0.05, 0.3, 0.5, 0.75, 0.97])
def test_samples_have_the_exact_covariance(hurst: float) -> None:
    """Whitened draws are standard normal: sums of squares by chi-square, p-values above 1e-4."""
    n, draws = 16, 4000
    x = sample_fbm(hurst, n, horizon=2.0, sample_shape=draws, generator=torch.Generator().manual_seed(11))
    assert torch.equal(x[:, 0], torch.zeros(draws, dtype=F64))
    ts = torch.linspace(0, 2, n + 1, dtype=F64)[1:]
    factor = torch.linalg.cholesky(fbm_covariance(ts, hurst))
    white = torch.linalg.solve_triangular(factor, x[:, 1:].T, upper=False)
    # total, per coordinate, and the mean
    assert 1e-4 < chi2.cdf(float((white**2).sum()), n * draws) < 1 - 1e-4
    per = torch.as_tensor(chi2.cdf((white**2).sum(1).numpy(), draws))
    assert float(per.min()) > 1e-4 / n
    assert float(per.max()) < 1 - 1e-4 / n
    assert chi2.sf(float((white.mean(1) ** 2).sum() * draws), n) > 1e-4
    # off-diagonal correlations: sum of squares over n(n-1)/2 pairs
    corr = white @ white.T / draws
    off = corr[~torch.eye(n, dtype=torch.bool)]
    assert chi2.sf(float((off**2).sum() * draws / 2), n * (n - 1) / 2) > 1e-4


@pytest.mark.parametrize("hurst", [0.3, 0.7])
def test_sampler_and_its_peer_have_one_law(hurst: float) -> None:
    """Covariances of torchfbm's and our paths agree within 5 standard errors (false alarms: 1 in 10 000)."""
    peer = pytest.importorskip("torchfbm")
    draws, n = 4000, 12
    theirs = peer.fbm(n, hurst, size=(draws,), dtype=F64, seed=1).reshape(draws, n + 1)[:, 1:]
    ours = sample_fbm(hurst, n, float(n), draws, torch.Generator().manual_seed(2))[:, 1:]
    exact = fbm_covariance(torch.arange(1, n + 1, dtype=F64), hurst)
    error = ((exact.diagonal()[:, None] * exact.diagonal() + exact**2) * 2 / draws).sqrt()
    assert ((theirs.T @ theirs - ours.T @ ours) / draws / error).abs().max() < 5


def test_sampler_shapes_types_and_reproducibility() -> None:
    g = torch.Generator().manual_seed(0)
    assert sample_fbm(0.7, 10, sample_shape=(2, 3), generator=g).shape == (2, 3, 11)
    assert sample_fbm(0.7, 1, generator=g).shape == (2,)
    assert sample_fgn(torch.tensor([0.2, 0.8]), 10, sample_shape=4, generator=g).shape == (4, 2, 10)
    assert sample_fbm(0.7, 10, generator=g, dtype=torch.float32).dtype == torch.float32
    a, b = (sample_fbm(0.4, 50, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a, b)


def test_a_long_path_is_cheap() -> None:
    x = sample_fbm(0.3, 1_000_000, generator=torch.Generator().manual_seed(0))
    # quadratic variation: n^(1 - 2H) with relative standard deviation below 2 / sqrt(n)
    assert float((x.diff() ** 2).sum()) == pytest.approx(1e6**0.4, rel=0.01)


@pytest.mark.parametrize(
    ("hurst", "rate", "value"),
    [
        (0.6, 1.0, 0.275737),
        (0.7, 1.0, 0.394475),
        (0.9, 1.0, 0.744768),
        (0.6, 2.0, 0.061110),
        (0.7, 2.0, 0.095394),
        (0.9, 2.0, 0.188535),
    ],
)
def test_published_fou_autocovariance(hurst: float, rate: float, value: float) -> None:
    r = fou_autocovariance(torch.tensor([0.0, 1.0], dtype=F64), rate, hurst)
    assert float(r[0]) == pytest.approx(math.gamma(2 * hurst + 1) / (2 * rate ** (2 * hurst)), rel=1e-12)
    assert float(r[1]) == pytest.approx(value, abs=5.1e-7)


@pytest.mark.parametrize("hurst", [0.15, 0.4, 0.5, 0.85])
def test_fou_autocovariance_is_the_transform_of_its_spectrum(hurst: float) -> None:
    constant = math.gamma(2 * hurst + 1) * math.sin(math.pi * hurst) / math.pi
    for lag in (0.3, 4.0, 49.0, 51.0):
        # x = u^8 tames the end point at 0; the tail by a quadrature for oscillating integrands
        near = quad(
            lambda u, lag=lag: math.cos(lag * u**8) * 8 * u ** (7 + 8 * (1 - 2 * hurst)) / (1 + u**16),
            0,
            1,
            epsabs=1e-13,
            limit=500,
        )[0]
        far = quad(
            lambda x: x ** (1 - 2 * hurst) / (1 + x**2),
            1,
            math.inf,
            weight="cos",
            wvar=lag,
            epsabs=1e-12,
            limlst=200,
        )[0]
        found = float(fou_autocovariance(torch.tensor(lag, dtype=F64), 1.0, hurst))
        assert found == pytest.approx(constant * (near + far), abs=2e-10)


@pytest.mark.parametrize("name", ["ts", "hurst"])
def test_what_has_no_gradient_says_so(name: str) -> None:
    ts, hurst = FIVE.clone(), torch.tensor(0.3, dtype=F64)
    {"ts": ts, "hurst": hurst}[name].requires_grad_()
    with pytest.raises(InvalidInputError, match=f"isn't differentiable in {name}"):
        fbm_covariance(ts, hurst, "II")
    with pytest.raises(InvalidInputError, match=f"isn't differentiable in {name}"):
        multifractional_covariance(ts, hurst)
    with torch.no_grad():
        assert torch.equal(fbm_covariance(ts, hurst, "II"), fbm_covariance(FIVE, 0.3, "II"))
    if name == "hurst":
        with pytest.raises(InvalidInputError, match="isn't differentiable in hurst"):
            hurst_log_likelihood(hurst, torch.randn(20))
        with pytest.raises(InvalidInputError, match="isn't differentiable in hurst"):
            fou_autocovariance(FIVE, 1.0, hurst)  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    with pytest.raises(HurstRangeError):
        fbm_covariance(FIVE, 1.0)
    with pytest.raises(HurstRangeError):
        sample_fbm(0.0, 10)
    with pytest.raises(TimeGridError):
        fbm_covariance(FIVE.flip(0), 0.3)
    with pytest.raises(InvalidInputError, match="not be negative"):
        fbm_covariance(FIVE - 1, 0.3)
    with pytest.raises(InvalidInputError, match="num_steps must be an integer"):
        sample_fgn(0.3, 0)
    with pytest.raises(InvalidInputError, match="horizon"):
        sample_fbm(0.3, 10, horizon=-1.0)
    with pytest.raises(InvalidInputError, match="rate"):
        fou_autocovariance(FIVE, 0.0, 0.3)
