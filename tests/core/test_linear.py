"""LinearGaussianMeasure against closed forms and dense Gaussian algebra."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from stochdyn.core import LinearGaussianMeasure, PathSample
from stochdyn.core.gaussian import constant_transition
from stochdyn.core.gaussian.transition import _integrate
from stochdyn.errors import (
    ApproximationWarning,
    DiffusionError,
    DiffusionMismatchError,
    DtypeMismatchError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    SingularDiffusionError,
    TimeGridError,
)
from stochdyn.testing import check_gradients

F64 = torch.float64
IRREGULAR = torch.tensor([0.0, 0.1, 0.15, 0.9, 1.0, 2.7], dtype=F64)


def _t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


def _ou(rate=1.3, mean=0.4, diffusion=0.7, **kwargs) -> LinearGaussianMeasure:
    return LinearGaussianMeasure.ornstein_uhlenbeck(_t(rate), mean, diffusion, **kwargs)


def _oscillator(initial_cov: Tensor | None = None) -> LinearGaussianMeasure:
    """A damped oscillator whose noise enters one component only."""
    return LinearGaussianMeasure(
        torch.tensor([[0.0, 1.0], [-2.0, -0.5]], dtype=F64),
        _t(0.2, 0.1),
        torch.tensor([[0.0], [0.8]], dtype=F64),
        _t(1.0, -1.0),
        initial_cov,
    )


def _log_prob(law: LinearGaussianMeasure, ts: Tensor, x: Tensor) -> Tensor:
    return law.log_prob(PathSample.of_states(ts, x))


def _varying() -> LinearGaussianMeasure:
    def a(t: Tensor) -> Tensor:
        rows = torch.stack([torch.cos(t), t], -1), torch.stack([-torch.exp(-t), torch.sin(3 * t)], -1)
        return torch.stack(rows, -2)

    return LinearGaussianMeasure(
        a,
        lambda t: torch.stack([t, torch.cos(t)], -1),
        lambda t: torch.stack([1 + 0 * t, torch.sin(t)], -1)[..., None],
        _t(1.0, -1.0),
        0.3 * torch.eye(2, dtype=F64),
    )


def test_ornstein_uhlenbeck_moments_on_an_irregular_grid() -> None:
    rate, mean, scale, start = 1.3, 0.4, 0.7, 2.0
    law = _ou(rate, mean, scale, initial_mean=_t(start))
    ts = IRREGULAR
    decay = torch.exp(-rate * ts)
    torch.testing.assert_close(law.mean(ts)[:, 0], mean + (start - mean) * decay, rtol=1e-13, atol=1e-14)
    variance = scale**2 / (2 * rate) * (1 - decay**2)
    torch.testing.assert_close(law.covariance(ts)[:, 0, 0], variance, rtol=1e-13, atol=1e-14)
    joint = torch.exp(-rate * (ts[:, None] - ts).abs()) * torch.minimum(variance[:, None], variance)
    torch.testing.assert_close(law.joint_covariance(ts), joint, rtol=1e-13, atol=1e-14)


def test_stationary_start_stays_stationary() -> None:
    law = _ou(2.0, 1.5, 0.6)
    ts = IRREGULAR + 0.5
    torch.testing.assert_close(law.mean(ts)[:, 0], torch.full_like(ts, 1.5))
    expected = 0.6**2 / 4 * torch.exp(-2 * (ts[:, None] - ts).abs())
    torch.testing.assert_close(law.joint_covariance(ts), expected)


def test_brownian_covariance_is_the_earlier_time() -> None:
    law = LinearGaussianMeasure.brownian(2, _t(1.0, 3.0), initial_time=-1.0)
    joint = law.joint_covariance(IRREGULAR).reshape(6, 2, 6, 2)
    earlier = torch.minimum(IRREGULAR[:, None], IRREGULAR) + 1
    for i, scale in enumerate((1.0, 3.0)):
        torch.testing.assert_close(joint[:, i, :, i], scale**2 * earlier)
    assert not joint[:, 0, :, 1].any()


def test_joint_covariance_agrees_with_transitions_of_a_coupled_system() -> None:
    law = _oscillator(torch.tensor([[0.5, 0.2], [0.2, 0.4]], dtype=F64))
    ts = IRREGULAR + 0.3
    joint, cov = law.joint_covariance(ts).reshape(6, 2, 6, 2), law.covariance(ts)
    torch.testing.assert_close(joint, joint.permute(2, 3, 0, 1))
    for i in range(6):
        torch.testing.assert_close(joint[i, :, i], cov[i])
        for j in range(i + 1, 6):
            phi = torch.linalg.matrix_exp(law.drift_matrix.constant * (ts[j] - ts[i]))
            torch.testing.assert_close(joint[j, :, i], phi @ cov[i], rtol=1e-12, atol=1e-13)


def test_moments_solve_the_lyapunov_equation() -> None:
    """dP/dt = AP + PA' + GG', held by a fourth-order difference quotient."""
    law, h = _oscillator(), 1e-2
    ts = 1.0 + h * torch.arange(-2, 3, dtype=F64)
    cov, mean = law.covariance(ts), law.mean(ts)
    a, b, s = (x[0] for x in law.coefficients(ts[:1]))

    def slope(x: Tensor) -> Tensor:
        return (x[0] - 8 * x[1] + 8 * x[3] - x[4]) / (12 * h)

    torch.testing.assert_close(slope(cov), a @ cov[2] + cov[2] @ a.T + s, rtol=0, atol=1e-8)
    torch.testing.assert_close(slope(mean), a @ mean[2] + b, rtol=0, atol=1e-8)


def test_stiff_collinear_states_keep_full_accuracy() -> None:
    """Speeds from 1e-8 to 1e4 driven by one Brownian motion: entry ij is (1-exp(-(g_i+g_j)t))/(g_i+g_j)."""
    g = torch.logspace(-8, 4, 9, dtype=F64)
    zero = torch.zeros(9, dtype=F64)
    law = LinearGaussianMeasure(torch.diag(-g), zero, torch.ones(9, 1, dtype=F64), zero)
    for t in (1e-3, 1.0, 40.0, 1e4):
        pair = g[:, None] + g
        expected = -torch.expm1(-pair * t) / pair
        got = law.covariance(_t(t))[0]
        assert float(((got - expected) / expected).abs().max()) < 1e-13


def test_time_varying_transition_has_order_six_and_the_right_limit() -> None:
    law = _varying()
    start, dt = _t(0.0), _t(2.0)
    grid = torch.linspace(0, 2, 20001, dtype=F64)
    mid, h = 0.5 * (grid[1:] + grid[:-1]), 1e-4
    a, b, s = law.coefficients(mid)
    phi, c, q = constant_transition(a, b, s, _t(h), F64)
    limit = [torch.eye(2, dtype=F64), torch.zeros(2, dtype=F64), torch.zeros(2, 2, dtype=F64)]
    for p, o, n in zip(phi[0], c[0], q[0], strict=True):
        limit = [p @ limit[0], p @ limit[1] + o, p @ limit[2] @ p.T + n]
    exact = law.transition(start, dt)
    for got, want in zip(exact, limit, strict=True):
        torch.testing.assert_close(
            got[0], want, rtol=1e-6, atol=1e-6
        )  # the midpoint limit itself errs by h^2
    steps = (4, 8, 16, 32)
    reference = _integrate(law.coefficients, start, dt, 512)[0]
    errors = [
        max(
            float((x - y).abs().max())
            for x, y in zip(_integrate(law.coefficients, start, dt, n)[0], reference, strict=True)
        )
        for n in steps
    ]
    slope = -math.log(errors[-1] / errors[0]) / math.log(steps[-1] / steps[0])
    assert abs(slope - 6) < 0.4
    for got, want in zip(exact, reference, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_callable_constants_equal_constants() -> None:
    plain = _oscillator()
    a, b, g = (v.constant for v in (plain.drift_matrix, plain.drift_offset, plain.diffusion))
    varying = LinearGaussianMeasure(
        lambda t: a.expand(len(t), 2, 2), b, lambda t: g.expand(len(t), 2, 1), plain.initial_mean
    )
    torch.testing.assert_close(
        varying.covariance(IRREGULAR), plain.covariance(IRREGULAR), rtol=1e-9, atol=1e-10
    )
    torch.testing.assert_close(varying.mean(IRREGULAR), plain.mean(IRREGULAR), rtol=1e-9, atol=1e-10)


def test_jumping_coefficients_warn_unless_the_jump_is_on_the_grid() -> None:
    law = LinearGaussianMeasure(
        _t(0.0)[None], _t(0.0), lambda t: torch.where(t < 1 / 3, 1.0, 2.0).to(F64)[:, None, None], _t(0.0)
    )
    with pytest.warns(ApproximationWarning, match="jump"):
        law.covariance(_t(0.0, 1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        variance = law.covariance(_t(0.0, 1 / 3, 1.0))[:, 0, 0]
    torch.testing.assert_close(variance, _t(0.0, 1 / 3, 1 / 3 + 4 * 2 / 3))


@pytest.mark.parametrize("varying", [False, True], ids=["constant", "time-varying"])
@pytest.mark.parametrize("at_start", [True, False], ids=["observed-at-the-start", "observed-later"])
def test_evidence_and_posterior_equal_dense_conditioning(varying: bool, at_start: bool) -> None:
    law = _varying() if varying else _oscillator(torch.tensor([[0.5, 0.2], [0.2, 0.4]], dtype=F64))
    obs_ts = IRREGULAR if at_start else IRREGULAR + 0.2
    at = torch.unique(torch.cat((_t(0.0, 0.05, 0.55, 3.5), obs_ts[1:3])))
    h = torch.tensor([[1.0, 0.5]], dtype=F64)
    g = torch.Generator().manual_seed(3)
    y = torch.randn(6, 1, dtype=F64, generator=g)
    scale = 0.2 + torch.rand(6, 1, dtype=F64, generator=g)
    mask = torch.tensor([True, True, False, True, True, False])
    posterior = law.posterior(obs_ts, torch.where(mask[:, None], y, torch.nan), scale, at, h, mask)

    every = torch.unique(torch.cat((obs_ts, at)))
    mean, cov = law.mean(every).flatten(), law.joint_covariance(every)
    lift = torch.zeros(6, len(every), 2, dtype=F64)
    lift[torch.arange(6), torch.searchsorted(every, obs_ts)] = h
    lift = lift.reshape(6, -1)[mask]
    s = lift @ cov @ lift.T + torch.diag(scale[mask, 0] ** 2)
    data = MultivariateNormal(lift @ mean, s)
    torch.testing.assert_close(posterior.log_evidence, data.log_prob(y[mask, 0]), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        law.log_evidence(obs_ts, y, scale, emission=h, mask=mask),
        posterior.log_evidence,
        rtol=1e-10,
        atol=1e-10,
    )
    gain = torch.linalg.solve(s, lift @ cov).T
    exact_mean = (mean + gain @ (y[mask, 0] - lift @ mean)).reshape(-1, 2)
    exact_cov = (cov - gain @ lift @ cov).reshape(len(every), 2, len(every), 2)
    where = torch.searchsorted(every, at)
    torch.testing.assert_close(posterior.mean, exact_mean[where], rtol=1e-9, atol=1e-9)
    blocks = torch.stack([exact_cov[i, :, i] for i in where.tolist()])
    torch.testing.assert_close(posterior.covariance, blocks, rtol=1e-9, atol=1e-9)

    draws = posterior.law.sample(at, 20_000, torch.Generator().manual_seed(1)).x
    assert draws.shape == (20_000, len(at), 2)
    centred = (draws - posterior.mean).flatten(1)
    own = exact_cov[where][:, :, where].reshape(2 * len(at), 2 * len(at))
    var = own.diagonal().clamp_min(0)
    assert (centred.mean(0).abs() <= 5 * (var / 20_000).sqrt() + 1e-9).all()
    stderr = ((var[:, None] * var + own**2) / 20_000).sqrt()
    assert ((centred.T @ centred / 20_000 - own).abs() <= 5 * stderr + 1e-9).all()


def test_component_mask_and_batches_of_series() -> None:
    law = _oscillator(torch.eye(2, dtype=F64))
    g = torch.Generator().manual_seed(5)
    y = torch.randn(3, 6, 2, dtype=F64, generator=g)
    mask = torch.rand(3, 6, 2, generator=g) > 0.4
    together = law.log_evidence(IRREGULAR, y, _t(0.3, 0.5), mask=mask)
    joint, mean = law.joint_covariance(IRREGULAR), law.mean(IRREGULAR).flatten()
    noise = torch.diag(_t(0.3, 0.5).square().repeat(6))
    for i in range(3):
        keep = mask[i].flatten()
        data = MultivariateNormal(mean[keep], (joint + noise)[keep][:, keep])
        torch.testing.assert_close(together[i], data.log_prob(y[i].flatten()[keep]))


def test_batched_parameters_equal_single_laws() -> None:
    rate, mean = (
        torch.tensor([[0.5], [2.0], [3.0]], dtype=F64),
        torch.tensor([[0.0], [1.0], [-1.0]], dtype=F64),
    )
    law = LinearGaussianMeasure.ornstein_uhlenbeck(rate, mean, 0.7)
    y = torch.randn(6, 1, dtype=F64)
    assert law.batch_shape == (3,)
    assert law.sample(IRREGULAR, 4).x.shape == (4, 3, 6, 1)
    posterior = law.posterior(IRREGULAR, y, 0.3)
    assert posterior.law.sample(IRREGULAR, 4).x.shape == (4, 3, 6, 1)
    for i in range(3):
        alone = LinearGaussianMeasure.ornstein_uhlenbeck(rate[i], mean[i], 0.7)
        torch.testing.assert_close(law.joint_covariance(IRREGULAR)[i], alone.joint_covariance(IRREGULAR))
        torch.testing.assert_close(law.mean(IRREGULAR)[i], alone.mean(IRREGULAR))
        torch.testing.assert_close(
            law.log_evidence(IRREGULAR, y, 0.3)[i], alone.log_evidence(IRREGULAR, y, 0.3)
        )
        torch.testing.assert_close(posterior.mean[i], alone.posterior(IRREGULAR, y, 0.3).mean)


def test_exact_observations_pin_the_path() -> None:
    """Noise of scale zero turns the posterior into the Brownian bridge."""
    law = LinearGaussianMeasure.brownian(initial_mean=_t(0.0))
    at = _t(0.5, 1.0, 1.5)
    bridge = law.posterior(_t(2.0), _t(1.0)[:, None], 0.0, at)
    torch.testing.assert_close(bridge.mean[:, 0], at / 2)
    torch.testing.assert_close(bridge.variance[:, 0], at * (2 - at) / 2)


def test_sample_and_log_prob_share_a_law() -> None:
    law = _oscillator(torch.tensor([[0.5, 0.2], [0.2, 0.4]], dtype=F64))
    ts = IRREGULAR + 0.1
    x = law.sample(ts, 20_000, torch.Generator().manual_seed(0)).x
    exact = MultivariateNormal(law.mean(ts).flatten(), law.joint_covariance(ts))
    torch.testing.assert_close(
        _log_prob(law, ts, x[:50]), exact.log_prob(x[:50].flatten(1)), rtol=1e-7, atol=1e-7
    )
    entropy, values = exact.entropy(), -_log_prob(law, ts, x)
    assert (values.mean() - entropy).abs() <= 5 * values.std() / math.sqrt(20_000)


def test_log_prob_of_a_fixed_start_is_conditional_on_it() -> None:
    law = _ou(initial_mean=_t(2.0))
    x = law.sample(IRREGULAR, 3).x
    exact = MultivariateNormal(law.mean(IRREGULAR[1:]).flatten(), law.joint_covariance(IRREGULAR[1:]))
    torch.testing.assert_close(_log_prob(law, IRREGULAR, x), exact.log_prob(x[:, 1:, 0]))
    torch.testing.assert_close(_log_prob(law, IRREGULAR[1:], x[:, 1:]), exact.log_prob(x[:, 1:, 0]))


def test_log_prob_of_batched_laws() -> None:
    rate = torch.tensor([[0.5], [2.0]], dtype=F64)
    law = LinearGaussianMeasure.ornstein_uhlenbeck(rate)
    x = law.sample(IRREGULAR, 3).x
    got = _log_prob(law, IRREGULAR, x)
    assert got.shape == (3, 2)
    for i in range(2):
        alone = LinearGaussianMeasure.ornstein_uhlenbeck(rate[i])
        torch.testing.assert_close(got[:, i], _log_prob(alone, IRREGULAR, x[:, i]))


def _dense_kl(p: LinearGaussianMeasure, q: LinearGaussianMeasure, ts: Tensor) -> Tensor:
    laws = [MultivariateNormal(x.mean(ts).flatten(), x.joint_covariance(ts)) for x in (p, q)]
    return torch.distributions.kl_divergence(*laws)


@pytest.mark.parametrize("later", [True, False], ids=["grid-after-the-start", "grid-from-the-start"])
def test_grid_kl_equals_the_dense_gaussian_divergence(later: bool) -> None:
    p, q = _oscillator(0.5 * torch.eye(2, dtype=F64)), _varying()
    ts = IRREGULAR + (0.2 if later else 0.0)
    torch.testing.assert_close(p.kl(q, ts), _dense_kl(p, q, ts), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(p.kl(p, ts), torch.zeros((), dtype=F64), rtol=0, atol=1e-10)


def test_grid_kl_from_a_fixed_start() -> None:
    p, q = _ou(1.0, 0.0, 1.0, initial_mean=_t(0.5)), _ou(2.0, 0.5, 1.2, initial_mean=_t(0.5))
    torch.testing.assert_close(p.kl(q, IRREGULAR), _dense_kl(p, q, IRREGULAR[1:]), rtol=1e-10, atol=1e-10)


def _ou_path_kl(
    theta: float, mu: float, theta2: float, mu2: float, sigma: float, x0: float, horizon: float
) -> float:
    """1/2 int E[(theta (mu-X) - theta2 (mu2-X))^2] dt / sigma^2 for dX = theta (mu-X) dt + sigma dW.

    X has mean mu + (x0-mu) e^{-theta t} and variance sigma^2 (1-e^{-2 theta t})/(2 theta).
    """
    a, k, d = theta2 - theta, theta * mu - theta2 * mu2, x0 - mu
    one, two = -math.expm1(-theta * horizon) / theta, -math.expm1(-2 * theta * horizon) / (2 * theta)
    base = a * mu + k
    mean_square = base**2 * horizon + 2 * base * a * d * one + (a * d) ** 2 * two
    variance = a**2 * sigma**2 / (2 * theta) * (horizon - two)
    return 0.5 * (mean_square + variance) / sigma**2


def test_path_kl_of_two_ornstein_uhlenbeck_processes() -> None:
    arguments = (1.0, 0.3, 2.5, -0.4, 0.7, 1.1, 2.7)
    theta, mu, theta2, mu2, sigma, x0, horizon = arguments
    p, q = _ou(theta, mu, sigma, initial_mean=_t(x0)), _ou(theta2, mu2, sigma, initial_mean=_t(x0))
    exact = _ou_path_kl(*arguments)
    assert math.isclose(float(p.path_kl(q, _t(0.0, horizon))), exact, rel_tol=1e-10)
    grids = [float(p.kl(q, torch.linspace(0, horizon, n, dtype=F64))) for n in (11, 41, 161, 641)]
    gaps = [exact - g for g in grids]
    assert all(g > 0 for g in gaps)  # a grid sees less than the whole path
    # Bridges between grid points depend on the rate through its square only: the rest is of second order.
    assert math.isclose(gaps[-2] / gaps[-1], 16, rel_tol=0.05)


def test_path_kl_with_noise_in_one_component_and_random_starts() -> None:
    cov = 0.5 * torch.eye(2, dtype=F64)
    p = _oscillator(cov)
    a = p.drift_matrix.constant.clone()
    a[1] += _t(0.3, -0.2)
    q = LinearGaussianMeasure(a, _t(0.2, 0.5), p.diffusion.constant, _t(0.8, -1.0), 2 * cov)
    start = torch.distributions.kl_divergence(
        MultivariateNormal(p.initial_mean, cov), MultivariateNormal(q.initial_mean, 2 * cov)
    )
    ts = torch.linspace(0, 1.5, 3001, dtype=F64)
    mean, second = p.mean(ts), p.covariance(ts)
    gap = mean @ _t(0.3, -0.2) + 0.4
    integrand = (gap**2 + torch.einsum("i,nij,j->n", _t(0.3, -0.2), second, _t(0.3, -0.2))) / 0.8**2
    exact = start + 0.5 * torch.trapezoid(integrand, ts)
    torch.testing.assert_close(p.path_kl(q, _t(0.0, 1.5)), exact, rtol=1e-6, atol=1e-7)


def test_gradients_reach_every_parameter_and_the_times() -> None:
    y = torch.tensor([[0.3], [-0.1], [0.4]], dtype=F64)

    def evidence(rate, mean, scale, obs_scale, ts, data):
        law = LinearGaussianMeasure.ornstein_uhlenbeck(rate, mean, scale)
        return law.log_evidence(ts, data, obs_scale)

    inputs = [_t(1.2), _t(0.3), _t(0.8), _t(0.2), _t(0.1, 0.5, 1.7), y]
    assert torch.autograd.gradcheck(evidence, [x.requires_grad_() for x in inputs])

    def posterior(a, b, g):
        law = LinearGaussianMeasure(a, b, g, _t(1.0, -1.0))
        p = law.posterior(
            _t(0.5, 1.0), torch.ones(2, 1, dtype=F64), 0.3, emission=torch.ones(1, 2, dtype=F64)
        )
        return p.mean, p.covariance

    o = _oscillator()
    values = [v.constant.clone().requires_grad_() for v in (o.drift_matrix, o.drift_offset, o.diffusion)]
    assert torch.autograd.gradcheck(posterior, values)


def test_gradients_through_time_varying_coefficients_and_divergences() -> None:
    def evidence(k):
        law = LinearGaussianMeasure(lambda t: (-k * (1 + t))[:, None, None], _t(0.0), 1.0, _t(0.0))
        return law.log_evidence(_t(0.5, 1.0), torch.ones(2, 1, dtype=F64), 0.3)

    assert torch.autograd.gradcheck(evidence, [_t(0.7).requires_grad_()], atol=1e-4)

    def divergence(rate, mean):
        p, q = (
            LinearGaussianMeasure.ornstein_uhlenbeck(rate, mean, initial_mean=_t(0.5)),
            _ou(diffusion=1.0, initial_mean=_t(0.5)),
        )
        return p.kl(q, IRREGULAR), p.path_kl(q, IRREGULAR)

    assert torch.autograd.gradcheck(divergence, [_t(0.9).requires_grad_(), _t(0.1).requires_grad_()])


def test_sde_and_measure_simulate_the_same_law() -> None:
    law = _oscillator(0.5 * torch.eye(2, dtype=F64))
    sde = law.to_sde()
    x = torch.randn(4, 3, 2, dtype=F64)
    expected = x @ law.drift_matrix.constant.T + law.drift_offset.constant
    torch.testing.assert_close(sde.drift(torch.tensor(0.0, dtype=F64), x), expected)
    ts = torch.linspace(0, 1, 65, dtype=F64)
    paths = law.as_diffusion().sample(ts, (4000,), generator=torch.Generator().manual_seed(0)).x
    last = paths[:, -1]
    mean, cov = law.mean(ts[-1:])[0], law.covariance(ts[-1:])[0]
    # Euler's weak error at step 1/64 is below 0.03 here (the moments of its linear recursion).
    assert ((last.mean(0) - mean).abs() <= 0.03 + 5 * (cov.diagonal() / 4000).sqrt()).all()
    assert ((last.var(0) / cov.diagonal() - 1).abs() <= 0.06 + 5 * math.sqrt(2 / 4000)).all()


def test_time_varying_sde_evaluates_at_its_time_with_and_without_leading_time() -> None:
    law = _varying()
    sde, ts = law.to_sde(), IRREGULAR
    x = torch.randn(6, 5, 2, dtype=F64)
    a, b, _ = law.coefficients(ts)
    expected = (a[:, None] @ x[..., None]).squeeze(-1) + b[:, None]
    together = sde.drift(ts[:, None, None], x)
    torch.testing.assert_close(together, expected)
    for n in range(6):
        torch.testing.assert_close(sde.drift(ts[n], x[n]), expected[n])
    matrix = sde.diffusion(ts[:, None, None], x).apply(torch.ones(6, 5, 1, dtype=F64))
    torch.testing.assert_close(matrix, law.diffusion.at(ts).sum(-1)[:, None].expand(6, 5, 2))


def test_sdes_of_batched_laws_align_with_draws_and_leading_time() -> None:
    rate = torch.tensor([[0.5], [2.0], [3.0]], dtype=F64)
    x, ts = torch.randn(6, 4, 3, 1, dtype=F64), IRREGULAR
    constant = LinearGaussianMeasure.ornstein_uhlenbeck(rate, 0.4).to_sde()
    torch.testing.assert_close(constant.drift(ts[:, None, None, None], x), rate * (0.4 - x))
    varying = LinearGaussianMeasure(
        lambda t: -rate[..., None] * (1 + t)[:, None, None, None],
        _t(0.0),
        lambda t: (1 + t)[:, None, None, None] * rate[..., None],
        torch.zeros(3, 1, dtype=F64),
    ).to_sde()
    clock = (1 + ts)[:, None, None, None]
    torch.testing.assert_close(varying.drift(ts[:, None, None, None], x), -rate * clock * x)
    noise = varying.diffusion(ts[:, None, None, None], x).apply(torch.ones_like(x))
    torch.testing.assert_close(noise, (rate * clock).expand_as(x))
    torch.testing.assert_close(varying.drift(ts[2], x[2]), -rate * (1 + ts[2]) * x[2])


def test_float32_law_with_float64_times() -> None:
    law = LinearGaussianMeasure.ornstein_uhlenbeck(torch.tensor([1.3]), 0.4, 0.7)
    y = torch.randn(6, 1)
    got = law.log_evidence(IRREGULAR, y, 0.3)
    assert got.dtype == torch.float32
    torch.testing.assert_close(
        got.double(), _ou().log_evidence(IRREGULAR, y.double(), 0.3), rtol=1e-4, atol=1e-4
    )


Y = torch.zeros(2, 1, dtype=F64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda law: law.mean(_t(0.0, 0.0)), TimeGridError, "increase strictly"),
        (lambda law: law.mean(_t(-1.0, 0.0)), TimeGridError, "before the initial law"),
        (lambda law: law.mean("now"), TimeGridError, "must be times"),
        (lambda law: law.transition(_t(1.0), _t(0.5)), TimeGridError, "before its start"),
        (lambda law: law.log_evidence(_t(1.0, 0.5), Y, 0.1), TimeGridError, "times must increase"),
        (lambda law: law.log_evidence(_t(1.0, 2.0), Y + torch.inf, 0.1), NonFiniteError, "y must be finite"),
        (lambda law: law.log_evidence(_t(1.0, 2.0), Y[:1], 0.1), ShapeError, "one row per time"),
        (lambda law: law.log_evidence(_t(1.0, 2.0), Y[:, 0], 0.1), ShapeError, "scalar series is y"),
        (lambda law: law.log_evidence(_t(1.0, 2.0), Y.expand(2, 3), 0.1), ShapeError, "emission"),
        (
            lambda law: law.log_evidence(_t(1.0, 2.0), Y, -0.1),
            InvalidInputError,
            "obs_scale must not be negative",
        ),
        (lambda law: law.log_evidence(_t(1.0, 2.0), Y, _t(0.1, 0.2)), ShapeError, "obs_scale"),
        (lambda law: law.log_evidence(_t(1.0, 2.0), Y.float(), 0.1), DtypeMismatchError, "y torch.float32"),
        (lambda law: law.log_evidence(_t(0.0), Y[:1], 0.0), SingularDiffusionError, "observation 0"),
        (
            lambda law: law.posterior(_t(1.0, 2.0), Y, 0.1, _t(-0.5)),
            TimeGridError,
            "before the initial law",
        ),
        (lambda law: law.log_evidence(_t(1.0, 2.0), Y, 0.1, mask=_t(1.0, 1.0)), ShapeError, "mask"),
        (lambda law: _log_prob(law, _t(1.0, 2.0), Y.expand(2, 2)), ShapeError, "path.x has the wrong size"),
        (
            lambda law: law.kl(_ou(diffusion=0.7, initial_mean=_t(5.0)), IRREGULAR),
            DiffusionMismatchError,
            "fixed points",
        ),
        (lambda law: law.kl(_ou(), IRREGULAR), DiffusionMismatchError, "fixed and a random"),
        (
            lambda law: law.path_kl(_ou(diffusion=0.8, initial_mean=_t(0.0)), IRREGULAR),
            DiffusionMismatchError,
            "different diff",
        ),
        (lambda law: law.kl(_oscillator(), IRREGULAR), ShapeError, "different size"),
    ],
)
def test_bad_calls_are_rejected(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(_ou(initial_mean=_t(0.0)))


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: _ou(diffusion=-1.0), InvalidInputError, "diffusion must be positive"),
        (lambda: _ou(rate=-1.0), InvalidInputError, "rate must be positive"),
        (lambda: LinearGaussianMeasure.brownian(diffusion=0.0), DiffusionError, "diffusion must be positive"),
        (lambda: LinearGaussianMeasure(_t(1.0), _t(0.0), 1.0, _t(0.0)), ShapeError, "drift_matrix"),
        (
            lambda: LinearGaussianMeasure(_t(1.0)[None], _t(0.0, 1.0), 1.0, _t(0.0)),
            ShapeError,
            "drift_offset",
        ),
        (
            lambda: LinearGaussianMeasure(_t(1.0)[None], _t(0.0), _t(1.0, 2.0), _t(0.0)),
            ShapeError,
            "diffusion",
        ),
        (
            lambda: LinearGaussianMeasure(_t(math.nan)[None], _t(0.0), 1.0, _t(0.0)),
            NonFiniteError,
            "drift_matrix",
        ),
        (
            lambda: LinearGaussianMeasure(torch.ones(1, 1), _t(0.0), 1.0, _t(0.0)),
            DtypeMismatchError,
            "drift_matrix",
        ),
        (lambda: LinearGaussianMeasure(lambda t: t, _t(0.0), 1.0, _t(0.0)), ShapeError, "lead with time"),
    ],
)
def test_bad_laws_are_rejected(build, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        build()


def test_singular_transitions_have_no_density() -> None:
    collinear = LinearGaussianMeasure(
        torch.zeros(2, 2, dtype=F64), _t(0.0, 0.0), torch.ones(2, 1, dtype=F64), _t(0.0, 0.0)
    )
    with pytest.raises(SingularDiffusionError, match="transition"):
        _log_prob(collinear, IRREGULAR, torch.zeros(6, 2, dtype=F64))
    with pytest.raises(SingularDiffusionError, match="transition"):
        collinear.kl(collinear, IRREGULAR)


def test_drifts_that_differ_where_no_noise_acts_are_singular() -> None:
    p = _oscillator()
    q = LinearGaussianMeasure(p.drift_matrix.constant, _t(0.3, 0.1), p.diffusion.constant, p.initial_mean)
    with pytest.raises(DiffusionMismatchError, match="no noise"):
        p.path_kl(q, IRREGULAR)


@pytest.mark.parametrize("rate", [0.0, -1e-9, 1e-3, -0.0999, -0.1001, 0.7, -3.0, -40.0, -1e4])
def test_one_component_steps_as_one_of_two_does(rate: float) -> None:
    """The closed form of one component against the series and doublings of a matrix that holds it, stiff or still."""
    a, b, s = (torch.tensor(v, dtype=F64) for v in ([[rate]], [0.6], [[0.3]]))
    dt = torch.tensor([0.0, 1e-6, 0.3, 1.0, 2.5], dtype=F64)
    wide = (torch.block_diag(a, a), b.repeat(2), torch.block_diag(s, s))
    one, two = constant_transition(a, b, s, dt, F64), constant_transition(*wide, dt, F64)
    for alone, beside in zip(one, two, strict=True):
        kept = beside[..., :1] if beside.ndim == 2 else beside[..., :1, :1]
        torch.testing.assert_close(alone, kept, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rate", [0.0, -0.05, -0.15, -2.0])
def test_steps_of_one_component_have_second_derivatives(rate: float) -> None:
    def moments(a: Tensor, b: Tensor, s: Tensor, dt: Tensor) -> Tensor:
        phi, c, q = constant_transition(a, b, s, dt, F64)
        return torch.cat([phi.flatten(), c.flatten(), q.flatten()])

    values = ([[[rate]], [[2 * rate]]], [[0.6], [0.1]], [[0.3]], [[0.5, 0.7], [1.0, 0.2], [2.0, 0.1]])
    check_gradients(moments, *(torch.tensor(v, dtype=F64) for v in values))
