"""Optimal weights: published test vectors, error tables, and optimality itself."""

from __future__ import annotations

import pytest
import torch

from stochdyn.errors import ApproximationWarning, HurstRangeError, InvalidInputError
from stochdyn.fractional import (
    cross_moments,
    geometric_speeds,
    gram_matrix,
    optimal_weights,
    variance_constant,
)
from stochdyn.fractional.noise import weight_solver

REFERENCE_GRID = geometric_speeds(5, 0.05, 20.0)


@pytest.mark.parametrize(
    ("kind", "hurst", "horizon", "b", "omega", "error"),
    [
        (
            "II",
            0.3,
            1.0,
            [0.58806278, 0.56030962, 0.45969941, 0.24819542, 0.087387082],
            [28.174122, -38.351106, 13.262473, -2.2915061, 1.7723464],
            0.088101,
        ),
        (
            "II",
            0.7,
            1.0,
            [0.40491214, 0.37989039, 0.29127587, 0.12192213, 0.025816173],
            [-0.93484, 3.26805, -1.77131, 0.11563, -0.31547],
            0.011581,
        ),
        (
            "I",
            0.3,
            6.0,
            [14.762989, 12.59473, 6.917363, 2.5840605, 0.8657472],
            [0.78370837, -0.092883332, 0.47869105, 0.069077186, 1.2041003],
            0.132879,
        ),
        (
            "I",
            0.7,
            6.0,
            [16.812076, 10.173437, 2.6049724, 0.16772294, -0.06396039],
            [2.297977, -1.6984796, 0.37682553, -0.69423607, 0.076882553],
            0.522667,
        ),
    ],
)
def test_published_vectors(
    kind: str, hurst: float, horizon: float, b: list[float], omega: list[float], error: float
) -> None:
    found = cross_moments(REFERENCE_GRID, hurst, horizon, kind, unit=False)
    # their type I moments carry the error of a five-term continued fraction, up to 1e-5
    assert torch.allclose(found, torch.tensor(b, dtype=torch.float64), rtol=2e-6, atol=4e-8)
    w, e = optimal_weights(hurst, REFERENCE_GRID, horizon, kind)
    unnormalised = w * variance_constant(hurst, kind).sqrt()
    assert torch.allclose(unnormalised, torch.tensor(omega, dtype=torch.float64), rtol=1e-5, atol=1e-5)
    assert float(e) == pytest.approx(error, abs=1e-6)


TABLE_HURSTS = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kind", "k", "slowest", "fastest", "horizon", "row"),
    [
        ("II", 2, 0.05, 20.0, 1.0, [0.490, 0.232, 0.106, 0.041, 0.059, 0.111, 0.166, 0.219]),
        ("II", 3, 0.05, 20.0, 1.0, [0.490, 0.225, 0.092, 0.028, 0.010, 0.012, 0.011, 0.009]),
        ("II", 5, 0.05, 20.0, 1.0, [0.479, 0.217, 0.088, 0.027, 0.010, 0.012, 0.010, 0.008]),
        ("II", 7, 0.05, 20.0, 1.0, [0.463, 0.203, 0.080, 0.024, 0.008, 0.010, 0.008, 0.006]),
        ("II", 5, 0.1, 1e3, 1.0, [0.334, 0.105, 0.030, 0.007, 0.003, 0.004, 0.004, 0.005]),
        ("II", 8, 0.1, 1e3, 1.0, [0.331, 0.104, 0.029, 0.006, 0.001, 0.001, 0.0005, 0.0003]),
        ("II", 10, 0.1, 1e4, 1.0, [0.263, 0.065, 0.015, 0.002, 0.0003, 0.0002, 0.0001, 0.0001]),
        ("II", 16, 0.1, 1e5, 1.0, [0.206, 0.040, 0.007, 0.001, 0.0001, 0.0, 0.0, 0.0]),
        ("I", 5, 0.05, 20.0, 1.0, [0.554, 0.283, 0.129, 0.074, 0.193, 0.313, 0.484, 0.714]),
        ("I", 5, 0.05, 20.0, 6.0, [0.465, 0.207, 0.133, 0.180, 0.384, 0.523, 0.680, 0.844]),
        ("I", 5, 1e-3, 100.0, 1.0, [0.474, 0.207, 0.081, 0.028, 0.049, 0.114, 0.245, 0.509]),
        ("I", 12, 1e-6, 1e3, 1.0, [0.377, 0.131, 0.040, 0.009, 0.004, 0.014, 0.058, 0.246]),
        ("I", 20, 1e-8, 1e4, 1.0, [0.298, 0.082, 0.020, 0.004, 0.001, 0.003, 0.022, 0.153]),
    ],
)
def test_published_errors(
    kind: str, k: int, slowest: float, fastest: float, horizon: float, row: list[float]
) -> None:
    _, error = optimal_weights(TABLE_HURSTS, geometric_speeds(k, slowest, fastest), horizon, kind)
    assert torch.allclose(error, torch.tensor(row, dtype=torch.float64), atol=6e-4)


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("horizon", [0.3, 7.0])
def test_weights_are_optimal_and_the_error_is_the_quadratic_form(kind: str, horizon: float) -> None:
    hurst = 0.35
    speeds = geometric_speeds(6, 0.02, 300.0)
    w, error = optimal_weights(hurst, speeds, horizon, kind)
    a, b = gram_matrix(speeds, horizon, kind), cross_moments(speeds, hurst, horizon, kind)
    c = horizon ** (2 * hurst + 1) / (2 * hurst + 1)

    def relative(v: torch.Tensor) -> float:
        return float((v @ a @ v - 2 * b @ v + c) / c)

    assert float(error) ** 2 == pytest.approx(relative(w), abs=1e-10)  # rounding of the large terms
    assert (a @ w - b).abs().max() < 1e-9 * b.abs().max()
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        moved = w + 1e-3 * w.abs().max() * torch.randn(6, generator=generator, dtype=torch.float64)
        assert relative(moved) > relative(w)


def test_time_scaling() -> None:
    """B^H(cT) and the states scale as c^H and c^(1/2), so weights do as c^(H - 1/2) when speeds do as 1/c."""
    for kind in ("I", "II"):
        # powers of two, so that the grids differ by no rounding
        w1, e1 = optimal_weights(0.7, REFERENCE_GRID, 1.0, kind)
        w2, e2 = optimal_weights(0.7, REFERENCE_GRID / 64.0, 64.0, kind)
        assert torch.allclose(w2, w1 * 64**0.2, rtol=1e-9)
        assert float(e2) == pytest.approx(float(e1), rel=1e-9)


@pytest.mark.parametrize("kind", ["I", "II"])
def test_gradient_in_hurst(kind: str) -> None:
    h = torch.tensor([0.15, 0.5, 0.8], dtype=torch.float64, requires_grad=True)
    speeds = geometric_speeds(5, 0.1, 1e3)  # well conditioned, as finite differences need
    assert torch.autograd.gradcheck(lambda v: optimal_weights(v, speeds, 1.0, kind)[0], h)


def test_batches_match_single_indices() -> None:
    h = torch.tensor([[0.2, 0.4], [0.6, 0.8]], dtype=torch.float64)
    w, e = optimal_weights(h, REFERENCE_GRID, 2.0, "I")
    assert w.shape == (2, 2, 5)
    assert e.shape == (2, 2)
    one, _ = optimal_weights(0.6, REFERENCE_GRID, 2.0, "I")
    assert torch.allclose(w[1, 0], one, rtol=1e-10)


def test_brownian_motion_is_a_single_state_of_speed_zero() -> None:
    for kind in ("I", "II"):
        w, error = optimal_weights(0.5, torch.zeros(1), 3.0, kind)
        assert w.item() == pytest.approx(1.0, rel=1e-14)
        assert float(error) < 1e-7


def test_very_slow_states_of_type_one_stay_accurate() -> None:
    """Large Hurst indices need speeds of 1e-20 / T, where the plain Gram matrix is singular in float64."""
    speeds = geometric_speeds(28, 1e-20, 1e4)
    assert weight_solver(tuple(speeds.tolist()), 1.0, "I").truncated == 0
    assert torch.linalg.matrix_rank(gram_matrix(speeds, 1.0, "I")) < 28
    assert float(optimal_weights(0.9, speeds, 1.0, "I")[1]) < 0.02


def test_nearly_dependent_speeds_warn_and_stay_close_to_the_optimum() -> None:
    """Exact arithmetic gives 0.076 for K = 8 and 0.064 for K = 12 at H = 0.3."""
    with pytest.warns(ApproximationWarning, match="nearly dependent"):
        _, error = optimal_weights(0.3, geometric_speeds(12, 0.05001, 20.0), 1.0)
    assert 0.064 < float(error) < 0.0802


def test_bad_arguments() -> None:
    with pytest.raises(HurstRangeError):
        optimal_weights(1.2, REFERENCE_GRID, 1.0)
    with pytest.raises(InvalidInputError, match="increase strictly"):
        optimal_weights(0.3, REFERENCE_GRID.flip(0), 1.0)
    with pytest.raises(InvalidInputError, match="not negative"):
        optimal_weights(0.3, -REFERENCE_GRID, 1.0)
    with pytest.raises(InvalidInputError, match="horizon"):
        optimal_weights(0.3, REFERENCE_GRID, 0.0)
