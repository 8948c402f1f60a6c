"""The fractional Ornstein-Uhlenbeck process: published evidence, closed forms, dense algebra, resonance."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from stochdyn import testing
from stochdyn.errors import (
    ApproximationWarning,
    HurstRangeError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    TimeGridError,
)
from stochdyn.fractional import (
    FractionalOU,
    MarkovNoise,
    fbm_covariance,
    fou_autocovariance,
    geometric_speeds,
    variance_constant,
)
from stochdyn.fractional.noise import divided_exponential, exact_step, impulse_response
from stochdyn.infer import LinearObservations

F64 = torch.float64
FIVE = torch.tensor([0.25, 0.5, 1.0, 1.5, 2.0], dtype=F64)
DATA = torch.tensor([0.3, -0.1, 0.4, 0.8, 0.5], dtype=F64)
END = torch.tensor([2.0], dtype=F64)


def quiet(*args: object, **kwargs: object) -> MarkovNoise:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        return MarkovNoise(*args, **kwargs)  # type: ignore[arg-type]


def reference_noise(hurst: float, horizon: float = 2.0, kind: str = "II") -> MarkovNoise:
    return quiet(hurst, speeds=geometric_speeds(5, 0.05, 20.0), horizon=horizon, kind=kind)


# ------------------------------------------------------------------------------------- published numbers


@pytest.mark.parametrize(
    ("hurst", "evidence", "tolerance"),
    [
        (0.2, -3.5533, 0.02),
        (0.3, -3.2113, 1e-3),
        (0.5, -2.62508, 1e-5),
        (0.7, -2.34787, 3e-3),
        (0.9, -3.31038, 3e-3),
    ],
)
def test_published_evidence_of_the_exact_process(hurst: float, evidence: float, tolerance: float) -> None:
    """X(0) = 0, unit type I noise; the tolerance is the error of the default Markov approximation."""
    ou = FractionalOU(rate=1.0, mean=0.0, scale=1.0, hurst=hurst)
    assert float(ou.log_evidence(FIVE, DATA, 0.1)) == pytest.approx(evidence, abs=tolerance)


def test_exact_process_by_a_linear_map_of_fbm() -> None:
    """X = B - theta int e^(-theta (t-s)) B_s ds on a fine grid; its evidence is the published one."""
    n, theta, hurst = 800, 1.0, 0.7
    ts = torch.arange(1, n + 1, dtype=F64) * 2 / n
    kernel = torch.exp(-theta * (ts[:, None] - ts)).tril()
    weight = kernel * (2 / n)
    weight[range(n), range(n)] /= 2  # trapezoid
    mapped = torch.eye(n, dtype=F64) - theta * weight
    cov = mapped @ fbm_covariance(ts, hurst) @ mapped.T
    index = (FIVE * n / 2).round().long() - 1
    law = MultivariateNormal(torch.zeros(5, dtype=F64), cov[index][:, index] + 0.01 * torch.eye(5, dtype=F64))
    exact = float(law.log_prob(DATA))
    assert exact == pytest.approx(-2.34787, abs=1e-4)
    noise = quiet(hurst, speeds=geometric_speeds(40, 1e-12, 1e5), horizon=2.0, kind="I")
    assert float(FractionalOU(theta, 0.0, 1.0, hurst, noise).log_evidence(FIVE, DATA, 0.1)) == pytest.approx(
        exact, abs=1e-3
    )


@pytest.mark.parametrize(("rate", "deviation", "evidence"), [(1.0, 0.5282, -0.6416), (2.0, 0.4274, -0.2126)])
def test_published_bridges_of_the_exact_process(rate: float, deviation: float, evidence: float) -> None:
    post = FractionalOU(rate, 0.0, 1.0, 0.7).posterior(END, torch.zeros(1, dtype=F64), 0.1, END / 2)
    assert float(post.variance.sqrt()) == pytest.approx(deviation, abs=2e-4)
    assert float(post.log_evidence) == pytest.approx(evidence, abs=2e-4)


@pytest.mark.parametrize(
    ("rate", "k", "low", "high", "coded", "deviation", "evidence"),
    [
        (2.0, 5, 0.05, 20.0, True, 0.3874, -0.0871),
        (2.0, 5, 0.05, 20.0, False, 0.3884, -0.0894),
        (1.0, 10, 1e-3, 1e3, False, 0.5250, -0.6321),
        (2.0, 10, 1e-3, 1e3, False, 0.4243, -0.2039),
    ],
)
def test_published_bridges_of_approximations(
    rate: float, k: int, low: float, high: float, coded: bool, deviation: float, evidence: float
) -> None:
    noise = quiet(0.7, speeds=geometric_speeds(k, low, high), horizon=6.0, kind="I")
    scale = float(variance_constant(0.7, "I")) ** 0.5 if coded else 1.0
    post = FractionalOU(rate, 0.0, scale, 0.7, noise).posterior(END, torch.zeros(1, dtype=F64), 0.1, END / 2)
    assert float(post.variance.sqrt()) == pytest.approx(deviation, abs=6e-5)
    assert float(post.log_evidence) == pytest.approx(evidence, abs=6e-5)


@pytest.mark.parametrize("steps", [50, 200])
def test_worked_case_and_the_law_of_its_euler_scheme(steps: int) -> None:
    """H = 0.3, theta = 0.7, one observation 0.8 at time 2: evidence -1.1960, and Euler's converges to it."""
    y = torch.tensor([0.8], dtype=F64)
    exact = float(FractionalOU(0.7, 0.0, 1.0, 0.3, reference_noise(0.3)).log_evidence(END, y, 0.1))
    assert exact == pytest.approx(-1.1960, abs=5e-5)
    ts = torch.linspace(0, 2, steps + 1, dtype=F64)
    data, mask = torch.zeros(steps + 1, dtype=F64), torch.zeros(steps + 1, dtype=torch.bool)
    data[-1], mask[-1] = 0.8, True
    euler = FractionalOU(0.7, 0.0, 1.0, 0.3, reference_noise(0.3), method="euler")
    assert float(euler.log_evidence(ts, data, 0.1, mask=mask)) == pytest.approx(exact, abs=0.015 / steps)
    assert float(euler.log_evidence(ts, data, 0.1, mask=mask)) != pytest.approx(exact, abs=1e-6)


# ------------------------------------------------------------------------------------------ closed forms


def response(r: float, theta: float, g: np.ndarray, w: np.ndarray) -> float:
    """h(r) as published, for theta apart from all speeds."""
    return float((w * (g * np.exp(-g * r) - theta * math.exp(-theta * r)) / (g - theta)).sum())


def test_impulse_response_and_its_resonance() -> None:
    noise = reference_noise(0.7)
    g, w = noise.speeds, noise.weights
    theta, r = torch.tensor(0.7, dtype=F64), torch.tensor(0.9, dtype=F64)
    assert float(impulse_response(r, theta, g, w)) == pytest.approx(
        response(0.9, 0.7, g.numpy(), w.numpy()), rel=1e-12
    )
    one = torch.ones(1, dtype=F64)
    resonant = impulse_response(r, one[0], one, one)
    assert float(resonant) == pytest.approx((1 - 0.9) * math.exp(-0.9), rel=1e-13)
    near = torch.stack(
        [divided_exponential(torch.tensor(1 + e, dtype=F64), one[0], r) for e in (-1e-9, 0.0, 1e-9)]
    )
    assert float((near - 0.9 * math.exp(-0.9)).abs().max()) < 1e-9


def test_one_observation_in_closed_form() -> None:
    """log N(y; e^(-theta T) x0, V(T) + s2) with V = sum c_i c_j (1 - e^(-(l_i + l_j) T)) / (l_i + l_j)."""
    theta, hurst, x0, y = 0.7, 0.4, 1.3, 0.2
    noise = reference_noise(hurst)
    g, w = noise.speeds.numpy(), noise.weights.numpy()
    rates = np.concatenate([[theta], g])
    c = np.concatenate([[-theta * (w / (g - theta)).sum()], w * g / (g - theta)])
    total = rates[:, None] + rates
    variance = (c[:, None] * c * -np.expm1(-total * 2) / total).sum()
    exact = float(Normal(math.exp(-2 * theta) * x0, math.sqrt(variance + 0.01)).log_prob(torch.tensor(y)))
    ou = FractionalOU(theta, 0.0, 1.0, hurst, noise, initial=x0)
    assert float(ou.log_evidence(END, torch.tensor([y], dtype=F64), 0.1)) == pytest.approx(exact, abs=1e-7)


@pytest.mark.parametrize("rate", [1.0, 0.05, 20.0])
def test_rates_equal_to_a_speed(rate: float) -> None:
    """theta = 1 is a speed of every odd symmetric grid: 0/0 in the published formulas."""
    at, beside = (FractionalOU(r, 0.0, 1.0, 0.7, reference_noise(0.7)) for r in (rate, rate * (1 + 1e-7)))
    assert float(at.log_evidence(FIVE, DATA, 0.1)) == pytest.approx(
        float(beside.log_evidence(FIVE, DATA, 0.1)), abs=1e-5
    )


def test_steps_compose() -> None:
    """Two steps in a row are one step of double length, for stiff and slow states alike."""
    noise = quiet(0.3, speeds=geometric_speeds(6, 1e-3, 1e5), horizon=1.0)
    theta, scale = torch.tensor(3.0, dtype=F64), torch.tensor(0.8, dtype=F64)
    dt = torch.tensor([0.05, 0.1], dtype=F64)
    a, q = exact_step(dt, theta, scale, noise.speeds, noise.weights)
    assert torch.allclose(a[0] @ a[0], a[1], atol=1e-12)
    twice = a[0] @ q[0] @ a[0].T + q[0]
    assert (twice - q[1]).abs().max() < 1e-12 * q[1].abs().max()
    assert torch.linalg.eigvalsh(q).min() > -1e-14 * q.abs().max()


def test_no_drift_leaves_the_noise() -> None:
    noise = reference_noise(0.6)
    cov = FractionalOU(1e-10, 0.0, 2.0, 0.6, noise).joint_covariance(FIVE)
    assert torch.allclose(cov, 4 * noise.covariance(FIVE), rtol=1e-8)


@pytest.mark.parametrize("hurst", [0.3, 0.5, 0.7, 0.9])
def test_stationary_start_has_the_published_autocovariance(hurst: float) -> None:
    lags = torch.tensor([0.0, 0.5, 1.0, 2.0], dtype=F64)
    cov = FractionalOU(1.0, 0.0, 1.0, hurst, initial="stationary").joint_covariance(lags)
    exact = fou_autocovariance(lags, 1.0, hurst)
    assert torch.allclose(cov[0], exact, atol=2.5e-3)
    # the law doesn't move
    assert torch.allclose(cov.diagonal(), cov[0, 0].expand(4), rtol=1e-8)
    assert torch.allclose(cov[1, 2], cov[0, 1], rtol=1e-8)


def test_stationary_law_solves_the_lyapunov_equation() -> None:
    """Cov(X, Y_k) = sigma g_k / (theta + g_k) sum_j w_j / (g_j + g_k), with unscaled states."""
    from stochdyn.fractional.noise import stationary_covariance

    noise = reference_noise(0.8, kind="I")
    g, w = noise.speeds, noise.weights
    cov = stationary_covariance(torch.tensor(0.4, dtype=F64), torch.tensor(1.5, dtype=F64), g, w)
    exact = 1.5 * g / (0.4 + g) * (w / (g[:, None] + g)).sum(-1) * (2 * g).sqrt()
    assert torch.allclose(cov[0, 1:], exact, rtol=1e-9)


# ----------------------------------------------------------------------------------- against dense algebra


@pytest.fixture(scope="module")
def irregular() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    ts = torch.rand(30, generator=g, dtype=F64).sort().values * 3
    at = torch.rand(10, generator=g, dtype=F64).sort().values * 4
    mask = torch.rand(30, generator=g) > 0.3
    y = torch.randn(2, 30, generator=g, dtype=F64)
    y[:, ~mask] = float("nan")
    return ts, at, mask, y


def test_posterior_of_a_batch_on_an_irregular_grid(irregular: tuple[Tensor, ...]) -> None:
    """Kalman smoother against conditioning of the joint law, with missing data, forecasts and two parameter sets."""
    ts, at, mask, y = irregular
    rate, mean = torch.tensor([0.5, 2.0], dtype=F64), torch.tensor([0.1, -0.2], dtype=F64)
    ou = FractionalOU(rate, mean, 0.7, 0.6, MarkovNoise(0.6, 12, horizon=4.0, dt=0.05, kind="I"), initial=1.5)
    post = ou.posterior(ts, y, 0.2, at, mask=mask)
    union = torch.cat([ts, at]).sort().values
    prior_mean, cov = ou.mean(union)[..., 0], ou.joint_covariance(union)
    assert torch.allclose(ou.covariance(union)[..., 0, 0], cov.diagonal(dim1=-2, dim2=-1), rtol=1e-10)
    seen, here = torch.searchsorted(union, ts[mask]), torch.searchsorted(union, at)
    total = cov[:, seen][:, :, seen] + 0.04 * torch.eye(len(seen), dtype=F64)
    gain = torch.linalg.solve(total, cov[:, seen][:, :, here]).mT
    residual = y[:, mask] - prior_mean[:, seen]
    expected = prior_mean[:, here] + (gain @ residual[..., None])[..., 0]
    expected_cov = cov[:, here][:, :, here] - gain @ cov[:, seen][:, :, here]
    evidence = MultivariateNormal(prior_mean[:, seen], total).log_prob(y[:, mask])
    assert torch.allclose(post.mean[..., 0], expected, atol=1e-8)
    assert torch.allclose(post.variance[..., 0], expected_cov.diagonal(dim1=-2, dim2=-1), atol=1e-8)
    assert torch.allclose(post.law.joint_covariance(at), expected_cov, atol=1e-8)
    assert torch.allclose(post.log_evidence, evidence, rtol=1e-9)
    assert torch.allclose(ou.log_evidence(ts, y, 0.2, mask=mask), evidence, rtol=1e-9)


def test_posterior_samples_have_the_posterior_law(irregular: tuple[Tensor, ...]) -> None:
    ts, at, mask, y = irregular
    ou = FractionalOU(0.5, 0.1, 0.7, 0.6, MarkovNoise(0.6, 6, horizon=4.0, dt=0.05))
    post = ou.posterior(ts, y[0], 0.2, at, mask=mask)
    draws = post.law.sample(at, 4000, torch.Generator().manual_seed(4)).x[..., 0]
    assert draws.shape == (4000, 10)
    factor = torch.linalg.cholesky(post.law.joint_covariance(at))
    white = torch.linalg.solve_triangular(factor, (draws - post.mean[..., 0]).T, upper=False)
    assert (white.mean(1) * math.sqrt(4000)).abs().max() < 5
    assert ((white @ white.T / 4000 - torch.eye(10, dtype=F64)) * math.sqrt(4000 / 2)).abs().max() < 5


def test_prior_samples_of_a_batch_are_independent() -> None:
    """Series that differ in their means only share a covariance, not their noise."""
    ou = FractionalOU(1.0, torch.tensor([0.0, 5.0], dtype=F64), 1.0, 0.7, reference_noise(0.7))
    x = ou.sample(FIVE, 4000, torch.Generator().manual_seed(0)).x[..., 0]
    assert x.shape == (4000, 2, 5)
    mean, variance = ou.mean(FIVE)[..., 0], ou.covariance(FIVE)[..., 0, 0]
    assert (((x.mean(0) - mean) / (variance / 4000).sqrt()).abs() < 5).all()
    assert (((x.var(0) - variance) / (variance * math.sqrt(2 / 4000))).abs() < 5).all()
    a, b = (x - mean)[:, 0, -1], (x - mean)[:, 1, -1]
    assert abs(float((a * b).mean() / variance[0, -1])) * math.sqrt(4000) < 5


def test_per_observation_noise_and_a_gaussian_start() -> None:
    noise = reference_noise(0.6)
    spread = torch.tensor([0.1, 0.2, 0.1, 0.4, 0.3], dtype=F64)
    ou = FractionalOU(0.8, 0.2, 1.1, 0.6, noise, initial=Normal(torch.tensor(0.5), torch.tensor(0.3)))
    mean, cov = ou.mean(FIVE)[:, 0], ou.joint_covariance(FIVE)
    decay = torch.exp(-0.8 * FIVE)
    fixed = FractionalOU(0.8, 0.2, 1.1, 0.6, noise, initial=0.5)
    assert torch.allclose(mean, 0.2 + 0.3 * decay, atol=1e-7)
    assert torch.allclose(cov, fixed.joint_covariance(FIVE) + 0.09 * decay * decay[:, None], atol=1e-7)
    exact = MultivariateNormal(mean, cov + torch.diag(spread**2)).log_prob(DATA)
    assert float(ou.log_evidence(FIVE, DATA, spread)) == pytest.approx(float(exact), abs=1e-9)


def test_gradients_in_all_parameters() -> None:
    def evidence(rate: Tensor, mean: Tensor, scale: Tensor, hurst: Tensor) -> Tensor:
        noise = MarkovNoise(hurst, speeds=geometric_speeds(4, 0.2, 30.0), horizon=2.0)
        return FractionalOU(rate, mean, scale, hurst, noise).log_evidence(FIVE, DATA, 0.1)

    values = [1.0, 0.2, 0.9, 0.6]  # the rate close to no speed, and then equal to one
    for rate in (1.0, float(geometric_speeds(4, 0.2, 30.0)[1])):
        inputs = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (rate, *values[1:])]
        assert torch.autograd.gradcheck(evidence, inputs, rtol=1e-4)


def test_start_times_and_precision() -> None:
    noise = reference_noise(0.6)
    shifted = FractionalOU(1.0, 0.0, 1.0, 0.6, noise, start_time=100.0)
    plain = FractionalOU(1.0, 0.0, 1.0, 0.6, noise)
    assert torch.allclose(shifted.log_evidence(FIVE + 100, DATA, 0.1), plain.log_evidence(FIVE, DATA, 0.1))
    single = plain.log_evidence(FIVE.float(), DATA.float(), 0.1)
    assert single.dtype == torch.float32
    assert float(single) == pytest.approx(float(plain.log_evidence(FIVE, DATA, 0.1)), rel=1e-6)
    # a first observation at the start itself
    ts = torch.tensor([0.0, 1.0], dtype=F64)
    start = FractionalOU(1.0, 0.0, 1.0, 0.6, noise, initial=0.4)
    assert torch.allclose(start.mean(ts)[:, 0], torch.tensor([0.4, 0.4 * math.exp(-1)], dtype=F64))
    assert float(start.covariance(ts)[0]) == 0.0


# ------------------------------------------------------------------------------------------------ errors


def test_bad_parameters() -> None:
    for rate, scale, name in ((-1.0, 1.0, "rate must not be negative"), (1.0, 0.0, "scale must be positive")):
        with pytest.raises(InvalidInputError, match=name):
            FractionalOU(rate, 0.0, scale, 0.7)
    with pytest.raises(HurstRangeError):
        FractionalOU(1.0, 0.0, 1.0, 1.0)
    with pytest.raises(InvalidInputError, match=r"hurst=noise\.hurst"):
        FractionalOU(1.0, 0.0, 1.0, 0.6, reference_noise(0.7))
    with pytest.raises(InvalidInputError, match="stationary increments"):
        FractionalOU(1.0, 0.0, 1.0, 0.7, reference_noise(0.7), initial="stationary")
    with pytest.raises(InvalidInputError, match="initial is unknown"):
        FractionalOU(1.0, 0.0, 1.0, 0.7, initial="equilibrium")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="method is unknown"):
        FractionalOU(1.0, 0.0, 1.0, 0.7, method="heun")  # type: ignore[arg-type]


def test_bad_data() -> None:
    ou = FractionalOU(1.0, 0.0, 1.0, 0.7, reference_noise(0.7))
    with pytest.raises(NonFiniteError, match=r"y\[1, 0\]"):
        ou.log_evidence(FIVE, torch.tensor([0.0, float("inf"), 0.0, 0.0, 0.0], dtype=F64), 0.1)
    with pytest.raises(ShapeError, match="one row per time"):
        ou.log_evidence(FIVE, DATA[:4], 0.1)
    with pytest.raises(TimeGridError, match="increase strictly"):
        ou.log_evidence(FIVE.flip(0), DATA, 0.1)
    with pytest.raises(TimeGridError, match="before the start"):
        ou.log_evidence(FIVE - 1, DATA, 0.1)
    with pytest.raises(TimeGridError, match="horizon"):
        ou.log_evidence(FIVE * 2, DATA, 0.1)
    with pytest.raises(InvalidInputError, match="obs_scale must not be negative"):
        ou.log_evidence(FIVE, DATA, -0.1)
    with pytest.raises(InvalidInputError, match="mask must be a boolean"):
        ou.log_evidence(FIVE, DATA, 0.1, mask=torch.ones(5))


# ------------------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("initial", ["stationary", None])
def test_units_of_time_and_length(initial: str | None) -> None:
    def answer(factor: float, unit: str) -> dict[str, Tensor]:
        time, length = (factor, 1.0) if unit == "time" else (1.0, factor)
        law = FractionalOU(0.7 / time, 0.3 * length, 1.2 * length / time**0.7, 0.7, initial=initial)
        ts = FIVE * time
        return {
            "mean": law.mean(ts) / length,
            "covariance": law.joint_covariance(ts) / length**2,
            "x": law.sample(ts, 2, 0).x / length,
            "evidence": law.log_evidence(ts, DATA * length, 0.1 * length) + 5 * math.log(length),
        }

    for unit in ("time", "length"):
        testing.check_units(lambda factor, unit=unit: answer(factor, unit))


def test_company_of_laws_and_of_series() -> None:
    def laws(size: Tensor) -> dict[str, Tensor]:
        law = FractionalOU(torch.full_like(size, 0.7), 0.3 * size, 1.2 * size, 0.7, initial="stationary")
        return {
            "covariance": law.joint_covariance(FIVE),
            "evidence": law.log_evidence(FIVE, DATA * size[:, None], 0.1 * size[:, None]),
        }

    testing.check_company(laws, torch.tensor(1.0, dtype=F64))
    law = FractionalOU(0.7, 0.3, 1.2, 0.7, initial="stationary")
    testing.check_company(lambda y: law.posterior(FIVE, y, 0.1).mean, DATA)


def test_the_question_does_not_move_the_law() -> None:
    law = FractionalOU(0.7, 0.3, 1.2, 0.7, reference_noise(0.7), initial=1.0)
    testing.check_question(lambda ts: {"mean": law.mean(ts), "covariance": law.covariance(ts)}, FIVE)
    # The default noise is built for decades of span and step: within them nothing moves.
    law = FractionalOU(0.7, 0.3, 1.2, 0.7, initial=1.0)
    more = torch.tensor([0.25, 0.4, 0.5, 1.0, 1.5, 1.9, 2.0], dtype=F64)
    assert torch.allclose(law.covariance(more)[[0, 2, 3, 4, 6]], law.covariance(FIVE), rtol=1e-9)


@pytest.mark.parametrize("hurst", [0.25, 0.5, 0.7, 0.9])
def test_default_noise_has_no_seams(hurst: float) -> None:
    """Neither where span or step come to another power of ten, nor from one Hurst index to the next."""
    t = torch.linspace(0, 1, 60, dtype=F64)
    y = torch.randn(60, dtype=F64, generator=torch.Generator().manual_seed(0)).cumsum(0) / 60**0.5

    def off(h: float, span: float) -> float:
        """The evidence less that of the exact covariance."""
        law = FractionalOU(2.0 / span, 0.0, span**-h, h, initial="stationary")
        cov = fou_autocovariance((t[:, None] - t).abs(), 2.0, h) + 0.05**2 * torch.eye(60, dtype=F64)
        exact = MultivariateNormal(torch.zeros(60, dtype=F64), cov).log_prob(y)
        return float(law.log_evidence(span * t, y, 0.05) - exact)

    spans = [off(hurst, span) for span in (0.5, 0.59, 0.6, 0.999, 1.001, 2.3)]
    assert max(spans) - min(spans) < 1e-3
    indices = [off(h, 1.0) for h in (hurst - 0.05 - 1e-6, hurst - 0.05 + 1e-6)]
    assert abs(indices[1] - indices[0]) < 1e-3


def test_precision_forms_of_data_and_storage() -> None:
    law = FractionalOU(0.7, 0.3, 1.2, 0.7, initial="stationary")
    testing.check_precision(lambda dtype: law.log_evidence(FIVE.to(dtype), DATA.to(dtype), 0.1))
    testing.check_forms(lambda y: law.log_evidence(FIVE, y, 0.1), DATA)
    testing.check_forms(lambda ts: law.log_evidence(ts, DATA, 0.1), FIVE)
    testing.check_storage(law, lambda law: law.sample(FIVE, 2, 0).x)


def test_a_fractional_process_observed_at_a_site_has_its_kalman_evidence() -> None:
    times = torch.arange(1.0, 6.0, dtype=torch.float64)
    y = torch.tensor([0.3, -0.1, 0.4, 0.8, 0.5], dtype=torch.float64)
    law = FractionalOU(0.7, 0.2, 1.1, 0.7, initial=0.0)
    site = LinearObservations(law, times, 0.3)
    assert site.event_shape == (5, 1)
    torch.testing.assert_close(site.log_prob(y[:, None]), law.log_evidence(times, y, 0.3))
    assert site.sample((4,)).shape == (4, 5, 1)
