"""Integrals along paths as components of the state, and data that are gains over intervals, against dense answers."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from torch import Tensor
from torch.distributions import MultivariateNormal

import stochdyn as sd
from stochdyn import testing
from stochdyn.core import Interpolation
from stochdyn.infer import LinearObservations
from tests.core.laws import F64, within

TIMES = torch.tensor([0.4, 1.0, 2.5, 3.0], dtype=F64)
WEIGHTS = torch.tensor([[1.0, 0.5]], dtype=F64)


def oscillator(
    scale: float = 1.0, time: float = 1.0, batch: tuple[int, ...] = ()
) -> sd.LinearGaussianMeasure:
    a = torch.tensor([[-0.3, 1.0], [-1.0, -0.2]], dtype=F64) / time
    b = scale * torch.tensor([0.4, -0.1], dtype=F64) / time
    g = scale * torch.tensor([[0.5, 0.0], [0.2, 0.3]], dtype=F64) / time**0.5
    mean = scale * torch.ones(*batch, 2, dtype=F64)
    return sd.LinearGaussianMeasure(a, b, g, mean, 0.2 * scale**2 * torch.eye(2, dtype=F64))


def dense(law: sd.LinearGaussianMeasure, times: Tensor, read: Tensor, obs_scale: float) -> MultivariateNormal:
    """The joint law of gains of ``read`` times the state, from the moments of the law at all times at once."""
    ts = torch.cat([torch.zeros(1, dtype=F64), times])
    mean, cov = law.mean(ts), law.joint_covariance(ts)
    n, d = mean.shape
    step = torch.zeros(n - 1, n, dtype=F64)
    for i in range(n - 1):
        step[i, i], step[i, i + 1] = -1.0, 1.0
    whole = torch.kron(step, read.contiguous())
    noise = obs_scale**2 * torch.eye(whole.shape[0], dtype=F64)
    return MultivariateNormal(whole @ mean.reshape(n * d), whole @ cov @ whole.mT + noise)


def test_integrals_of_brownian_motion_are_exact() -> None:
    law = sd.LinearGaussianMeasure.brownian(diffusion=torch.tensor(2.0, dtype=F64)).with_integral(
        torch.ones(1, 1, dtype=F64)
    )
    t = torch.tensor([0.5, 3.0], dtype=F64)
    wanted = 4 * torch.stack([torch.stack([t, t**2 / 2], -1), torch.stack([t**2 / 2, t**3 / 3], -1)], -2)
    torch.testing.assert_close(law.covariance(t), wanted)


def test_an_integral_is_the_sum_of_the_means() -> None:
    """By quadrature of the exact mean, with coefficients that vary in time too."""
    u = Interpolation([0.0, 4.0], torch.tensor([0.0, 2.0], dtype=F64))
    varying = sd.LinearGaussianMeasure(-torch.eye(1, dtype=F64), u.at, 0.3, torch.ones(1, dtype=F64))
    for law, weights in ((oscillator(), WEIGHTS), (varying, torch.ones(1, 1, dtype=F64))):
        ts = torch.linspace(0, 3, 3001, dtype=F64)
        value = (law.mean(ts) @ weights.mT)[:, 0]
        wanted = torch.trapezoid(value, ts)
        found = law.with_integral(weights).mean(ts[[-1]])[0, -1]
        assert abs(float(found - wanted)) < 1e-6


@pytest.mark.parametrize("read", [[[0.0, 0.0, 1.0]], [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]])
def test_gains_have_the_dense_density(read: Any) -> None:
    law, matrix = oscillator().with_integral(WEIGHTS), torch.tensor(read, dtype=F64)
    truth = dense(law, TIMES, matrix, 0.1)
    y = torch.randn(4, len(read), dtype=F64, generator=torch.Generator().manual_seed(0))
    site = LinearObservations(law, TIMES, 0.1, matrix, increments=True)
    torch.testing.assert_close(site.log_prob(y), truth.log_prob(y.reshape(-1)), rtol=1e-9, atol=1e-9)
    gap = y.clone()
    gap[1] = torch.nan
    keep = ~gap.reshape(-1).isnan()
    marginal = MultivariateNormal(truth.mean[keep], truth.covariance_matrix[keep][:, keep])
    torch.testing.assert_close(
        site.log_prob(gap), marginal.log_prob(gap.reshape(-1)[keep]), rtol=1e-9, atol=1e-9
    )


def test_draws_of_gains_have_their_density() -> None:
    law, matrix = oscillator().with_integral(WEIGHTS), torch.tensor([[0.0, 0.0, 1.0]], dtype=F64)
    truth = dense(law, TIMES, matrix, 0.1)
    torch.manual_seed(0)
    y = LinearObservations(law, TIMES, 0.1, matrix, increments=True).sample((4000,))[..., 0]
    assert within(y.mean(0), truth.mean, y.std(0) / 4000**0.5)
    gap = torch.cov(y.mT) - truth.covariance_matrix
    spread = truth.variance.sqrt()
    assert float((gap / spread[:, None] / spread).abs().max()) < 5 * (2 / 4000) ** 0.5


def test_series_with_their_own_times_and_a_time_at_the_start() -> None:
    law, matrix = oscillator(batch=(2,)).with_integral(WEIGHTS), torch.tensor([[0.0, 0.0, 1.0]], dtype=F64)
    times = torch.stack([TIMES, TIMES + 0.3])
    y = torch.randn(2, 4, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    whole = LinearObservations(law, times, 0.1, matrix, increments=True).log_prob(y)
    one = oscillator().with_integral(WEIGHTS)
    parts = [
        LinearObservations(one, t, 0.1, matrix, increments=True).log_prob(v)
        for t, v in zip(times, y, strict=True)
    ]
    torch.testing.assert_close(whole, torch.stack(parts))
    # Nothing is gained by the time of the start.
    first = LinearObservations(one, torch.tensor([0.0, 1.0], dtype=F64), 0.1, matrix, increments=True)
    later = LinearObservations(one, torch.tensor([1.0], dtype=F64), 0.1, matrix, increments=True)
    start = torch.distributions.Normal(torch.zeros((), dtype=F64), 0.1).log_prob(y[0, 0, 0])
    torch.testing.assert_close(first.log_prob(y[0, :2]), start + later.log_prob(y[0, 1:2]))


def test_units_and_gradients_of_gains() -> None:
    matrix = torch.tensor([[0.0, 0.0, 1.0]], dtype=F64)
    y = torch.tensor([[0.3], [1.0], [2.0], [0.2]], dtype=F64)

    def in_units(length: float, time: float) -> Tensor:
        unit = length * time
        law = oscillator(length, time).with_integral(WEIGHTS)
        site = LinearObservations(law, time * TIMES, 0.1 * unit, matrix, increments=True)
        return site.log_prob(unit * y) + 4 * torch.log(torch.tensor(unit, dtype=F64))

    testing.check_units(lambda c: in_units(c, 1.0))
    testing.check_units(lambda c: in_units(1.0, c))

    def value(rate: Tensor, scale: Tensor) -> Tensor:
        law = sd.LinearGaussianMeasure.ornstein_uhlenbeck(
            rate, 0.2, scale, initial_mean=torch.ones(1, dtype=F64)
        )
        joint = law.with_integral(torch.ones(1, 1, dtype=F64))
        return LinearObservations(
            joint, TIMES, 0.1, torch.tensor([[0.0, 1.0]], dtype=F64), increments=True
        ).log_prob(y)

    testing.check_gradients(value, torch.tensor(0.8, dtype=F64), torch.tensor(0.5, dtype=F64))


# Equations.


def test_paths_carry_their_integrals() -> None:
    """The added component is the sum of what it integrates, step by step, whatever the noise."""
    diffusions: dict[str, Any] = {
        "number": 0.5,
        "vector": torch.tensor([0.5, 0.3], dtype=F64),
        "matrix": torch.tensor([[0.5], [0.1]], dtype=F64),
        "state": lambda t, x: 0.2 * x,
    }
    ts = torch.linspace(0, 1, 21, dtype=F64)
    for name, diffusion in diffusions.items():
        sde = sd.SDE(lambda t, x: -x, diffusion)
        law = sd.DiffusionMeasure(torch.ones(2, dtype=F64), sde)
        wide = sde.with_integral(lambda t, x: (x**2).sum(-1, keepdim=True) + t, dim=2)
        both = sd.DiffusionMeasure(torch.tensor([1.0, 1.0, 0.0], dtype=F64), wide)
        x, z = law.sample(ts, 5, 0).x, both.sample(ts, 5, 0).x
        torch.testing.assert_close(z[..., :2], x, msg=name)
        wanted = ((x**2).sum(-1) + ts)[..., :-1].cumsum(-1) / 20
        torch.testing.assert_close(z[..., 1:, 2], wanted)
        push = torch.ones(1 if name == "matrix" else 2, dtype=F64)
        moved, plain = (p.controlled(lambda t, z, v=push: v.expand(*z.shape[:-1], -1)) for p in (both, law))
        torch.testing.assert_close(
            moved.log_rn(both.sample(ts, 5, 0), both), plain.log_rn(law.sample(ts, 5, 0), law)
        )


def test_the_dimension_is_told_by_the_noise_or_asked_for() -> None:
    vector = sd.SDE(lambda t, x: -x, torch.tensor([0.5, 0.3])).with_integral(lambda t, x: x)
    assert vector.drift(torch.tensor(0.0), torch.ones(4)).tolist() == [-1, -1, 1, 1]
    with pytest.raises(sd.errors.InvalidInputError, match="dim must be given"):
        sd.SDE(lambda t, x: -x, 0.5).with_integral(lambda t, x: x)
    with pytest.raises(sd.errors.ShapeError, match="one value per integral"):
        sd.SDE(lambda t, x: -x, 0.5).with_integral(lambda t, x: x[..., 0], dim=1)
    with pytest.raises(sd.errors.ShapeError, match="followed by its integrals"):
        sd.SDE(lambda t, x: -x, 0.5).with_integral(lambda t, x: x, dim=1).drift(
            torch.tensor(0.0), torch.ones(1)
        )


@pytest.mark.parametrize("feedback", ["fitted", "recomputed"])
def test_a_guide_integrates_out_a_linear_path_seen_by_its_averages(feedback: str) -> None:
    """The bound of sums over intervals is their exact evidence on the grid, by dense algebra."""
    pyro.set_rng_seed(0)
    ts = torch.linspace(0, 1, 21, dtype=F64)
    y = torch.tensor([0.1, -0.3, 0.4, 0.2], dtype=F64)
    sde = sd.SDE(lambda t, x: -x, 0.7).with_integral(lambda t, x: x, dim=1)

    def model() -> None:
        x = sd.infer.sample_path("x", sde, torch.tensor([0.5, 0.0], dtype=F64), ts)
        gains = x[..., 5::5, 1] - x[..., :-1:5, 1]
        pyro.sample("y", dist.Normal(gains, 0.05).to_event(1), obs=y)

    guide = sd.infer.AutoPathGuide(model, hidden=(), feedback=feedback)
    bound = -Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0).loss(model, guide)
    # Euler's path is linear in its increments: x = m + L e.
    step = torch.zeros(21, 20, dtype=F64)
    mean = torch.zeros(21, dtype=F64)
    mean[0] = 0.5
    for n in range(20):
        mean[n + 1] = 0.95 * mean[n]
        step[n + 1] = 0.95 * step[n]
        step[n + 1, n] += 0.7 * 0.05**0.5
    read = torch.zeros(4, 21, dtype=F64)
    for k in range(4):
        read[k, 5 * k : 5 * k + 5] = 0.05
    whole = read @ step
    truth = MultivariateNormal(read @ mean, whole @ whole.mT + 0.05**2 * torch.eye(4, dtype=F64)).log_prob(y)
    assert abs(bound - float(truth)) < 1e-6
