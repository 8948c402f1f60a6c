"""Moments of the memory states against quadrature, published values and high-precision arithmetic."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
from scipy.integrate import quad

from stochdyn.errors import HurstRangeError, InvalidInputError
from stochdyn.fractional import cross_moments, geometric_speeds, gram_matrix, variance_constant

HURSTS = [0.01, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99]
# small, on both sides of every switch of method, and large
X = [1e-12, 1e-6, 1e-3, 0.1, 1.0, 2.99, 3.01, 10.0, 39.9, 40.1, 1e3, 6e4, 1e7]


def exact_cross(hurst: mp.mpf, x: float, kind: str) -> mp.mpf:
    a, x = hurst + mp.mpf("0.5"), mp.mpf(x)
    if kind == "II":
        if x > 200:
            lower = [mp.gammainc(a + i, 0, x, regularized=True) for i in (0, 1)]
            return x**-a * lower[0] - a * x ** (-a - 1) * lower[1]
        return mp.exp(-x) * mp.hyp1f1(2, a + 2, x) / mp.gamma(a + 2)
    with mp.workdps(80):
        tail = mp.exp(-x) - mp.exp(x) * mp.gammainc(a, x, regularized=True)
        return 2 * x**-a - 1 / (x * mp.gamma(a + 1)) + tail * x ** (-a - 1)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_cross_moments_and_their_derivative_match_high_precision(kind: str) -> None:
    with mp.workdps(40):
        for hurst in HURSTS:
            h = torch.tensor(hurst, dtype=torch.float64, requires_grad=True)
            b = cross_moments(torch.tensor(X, dtype=torch.float64), h, 1.0, kind, unit=False)
            jacobian = torch.autograd.functional.jacobian(
                lambda v, kind=kind: cross_moments(
                    torch.tensor(X, dtype=torch.float64), v, 1.0, kind, unit=False
                ),
                h,
            )
            for i, x in enumerate(X):
                value = exact_cross(mp.mpf(hurst), x, kind)
                assert abs((b[i].item() - value) / value) < 2e-12, (hurst, x)
                slope = mp.diff(lambda v, x=x: exact_cross(v, x, kind), mp.mpf(hurst), h=mp.mpf(10) ** -12)
                assert abs((jacobian[i].item() - slope) / max(abs(slope), abs(value))) < 1e-12, (hurst, x)


def test_derivative_of_the_incomplete_gamma_that_torch_lacks() -> None:
    """Type II, T = 1: b = x^-a P(a, x) - a x^(-a-1) P(a+1, x), and scipy knows P."""
    from scipy.special import gammainc

    def with_scipy(hurst: float, x: float) -> float:
        a = hurst + 0.5
        return float(x**-a * gammainc(a, x) - a * x ** (-a - 1) * gammainc(a + 1, x))

    for x in (0.5, 5.0, 60.0):
        h = torch.tensor(0.37, dtype=torch.float64, requires_grad=True)
        b = cross_moments(torch.tensor([x], dtype=torch.float64), h, unit=False)[0]
        b.backward()
        assert b.item() == pytest.approx(with_scipy(0.37, x), rel=1e-12)
        difference = (with_scipy(0.37 + 1e-5, x) - with_scipy(0.37 - 1e-5, x)) / 2e-5
        assert h.grad is not None
        assert h.grad.item() == pytest.approx(difference, rel=1e-7)


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("unit", [True, False])
def test_gradcheck_in_hurst(kind: str, unit: bool) -> None:
    h = torch.tensor([0.02, 0.3, 0.5, 0.77, 0.98], dtype=torch.float64, requires_grad=True)
    speeds = geometric_speeds(6, 1e-3, 1e4)
    assert torch.autograd.gradcheck(lambda v: cross_moments(speeds, v, 2.0, kind, unit), h)


def test_cross_moments_by_quadrature_of_the_definition() -> None:
    """Type II: b_k = 1/Gamma(a) int_0^T (T-u) u^(a-1) e^(-gamma u) du."""
    hurst, horizon = 0.3, 2.5
    a = hurst + 0.5
    speeds = torch.tensor([0.05, 1.0, 17.0], dtype=torch.float64)
    b = cross_moments(speeds, hurst, horizon, "II", unit=False)
    for g, value in zip(speeds.tolist(), b.tolist(), strict=True):
        integral = quad(
            lambda u, g=g: (horizon - u) * math.exp(-g * u),
            0,
            horizon,
            weight="alg",
            wvar=(a - 1, 0),
            epsabs=1e-13,
        )
        assert value == pytest.approx(integral[0] / math.gamma(a), rel=1e-9)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_gram_matrix_by_quadrature_of_the_covariance(kind: str) -> None:
    speeds = torch.tensor([1e-3, 0.4, 30.0], dtype=torch.float64)
    horizon = 1.7

    def covariance(gi: float, gj: float, t: float) -> float:
        total = gi + gj
        if kind == "II":
            return -math.expm1(-total * t) / total
        return (2 - math.exp(-gi * t) - math.exp(-gj * t)) / total

    a = gram_matrix(speeds, horizon, kind)
    for i, gi in enumerate(speeds.tolist()):
        for j, gj in enumerate(speeds.tolist()):
            value = quad(lambda t, gi=gi, gj=gj: covariance(gi, gj, t), 0, horizon, epsabs=1e-13)[0]
            assert a[i, j].item() == pytest.approx(value, rel=1e-9)


def test_a_state_of_speed_zero_is_brownian_motion() -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    for kind in ("I", "II"):
        assert gram_matrix(zero, 3.0, kind).item() == pytest.approx(4.5)
        # E[B^H(t) W(t)] is the same for both kinds but for the normalisation
        b = cross_moments(zero, 0.8, 3.0, kind, unit=False).item()
        assert b == pytest.approx(3.0**2.3 / math.gamma(3.3), rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "table"),
    [
        ("I", [3.5245, 1.9175, 1.3834, 1.1289, 1.0, 0.9543, 0.9951, 1.1900, 1.9303]),
        ("II", [2.2546, 1.4837, 1.2296, 1.0946, 1.0, 0.9207, 0.8473, 0.7760, 0.7057]),
    ],
)
def test_variance_constants(kind: str, table: list[float]) -> None:
    h = torch.arange(1, 10, dtype=torch.float64) / 10
    assert torch.allclose(variance_constant(h, kind), torch.tensor(table, dtype=torch.float64), atol=5.1e-5)


@pytest.mark.parametrize("hurst", [0.3, 0.75])
def test_variance_constant_of_type_one_is_the_integral_of_its_kernel(hurst: float) -> None:
    """Its past int_0^inf ((1+s)^(a-1) - s^(a-1))^2 ds and its present 1/(2H), over Gamma(a)^2."""
    e = mp.mpf(hurst) - mp.mpf("0.5")
    past = mp.quad(lambda s: ((1 + s) ** e - s**e) ** 2, [0, 1e-6, 1e-3, 1, 10, mp.inf])
    exact = (past + 1 / (2 * mp.mpf(hurst))) / mp.gamma(e + 1) ** 2
    assert float(variance_constant(hurst, "I")) == pytest.approx(float(exact), rel=1e-4)


def test_bad_arguments() -> None:
    speeds = geometric_speeds(3, 0.1, 10.0)
    for hurst in (0.0, 1.0, -0.2, float("nan")):
        with pytest.raises(HurstRangeError, match="strictly between 0 and 1"):
            cross_moments(speeds, hurst)
        with pytest.raises(HurstRangeError):
            variance_constant(hurst)
    with pytest.raises(InvalidInputError, match="kind is unknown"):
        gram_matrix(speeds, 1.0, "III")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="horizon must be positive"):
        cross_moments(speeds, 0.3, -1.0)
