"""Approximate Kalman evidence: exact on linear models, invariant, differentiable, and Pyro sites like any other."""

from __future__ import annotations

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import MCMC, NUTS, Predictive
from torch import Tensor

import stochdyn as sd
from stochdyn import testing
from stochdyn.errors import InvalidInputError, ShapeError, SingularDiffusionError, TimeGridError
from stochdyn.infer import (
    EnsembleKalman,
    ExtendedKalman,
    LinearObservations,
    NonlinearObservations,
    UnscentedKalman,
)
from tests.core.laws import ExactMemory
from tests.infer.exact import F64

NAN = math.nan
TIMES = torch.tensor([0.3, 0.5, 1.2], dtype=F64)
A = torch.tensor([[-1.0, 0.5], [-0.3, -0.7]], dtype=F64)
B = torch.tensor([0.1, -0.2], dtype=F64)
G = torch.tensor([[0.5, 0.1], [0.0, 0.4]], dtype=F64)
H = torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=F64)
START = torch.distributions.MultivariateNormal(torch.ones(2, dtype=F64), 0.3 * torch.eye(2, dtype=F64))
Y = torch.tensor([[0.2, -0.3], [NAN, NAN], [0.4, NAN]], dtype=F64)
EXACT = ["ekf", "ukf"]


def linear(x: Tensor) -> Tensor:
    return x @ H.mT


def euler_oracle(y: Tensor, dt: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return evidence and smoothed moments of the Euler chain by the joint Gaussian of all its states."""
    counts = [math.ceil(h / dt - 1e-9) for h in torch.diff(TIMES, prepend=TIMES.new_zeros(1)).tolist()]
    gaps = [
        h / n for h, n in zip(torch.diff(TIMES, prepend=TIMES.new_zeros(1)).tolist(), counts, strict=True)
    ]
    steps = [h for h, n in zip(gaps, counts, strict=True) for _ in range(n)]
    mean, cov = [START.mean], [[START.covariance_matrix]]
    eye = torch.eye(2, dtype=F64)
    for h in steps:
        f = eye + A * h
        mean.append(f @ mean[-1] + B * h)
        last = cov[-1]
        row = [f @ c for c in last]
        row.append(f @ last[-1] @ f.mT + G @ G.mT * h)
        cov.append(row)
    index = torch.tensor(counts).cumsum(0).tolist()
    joint = torch.cat(
        [torch.cat([cov[max(i, j)][min(i, j)] if i >= j else cov[j][i].mT for j in index], 1) for i in index]
    )
    m = torch.cat([mean[i] for i in index])
    emission = torch.block_diag(*[H] * 3)
    keep = ~y.flatten().isnan()
    e = emission[keep]
    s = e @ joint @ e.mT + 0.04 * torch.eye(int(keep.sum()), dtype=F64)
    law = torch.distributions.MultivariateNormal(e @ m, s)
    gain = joint @ e.mT @ torch.linalg.inv(s)
    post = joint - gain @ e @ joint
    found = m + gain @ (y.flatten()[keep] - e @ m)
    blocks = torch.stack([post[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] for k in range(3)])
    return law.log_prob(y.flatten()[keep]), found.reshape(3, 2), blocks


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("dt", [math.inf, 0.1])
def test_linear_models_have_the_exact_evidence_and_smoother_of_their_chain(method: str, dt: float) -> None:
    site = NonlinearObservations(
        sd.SDE(lambda t, x: x @ A.mT + B, sd.Matrix(G)), START, TIMES, linear, 0.2, method, dt=dt
    )
    evidence, mean, cov = euler_oracle(Y, min(dt, 10.0))
    torch.testing.assert_close(site.log_prob(Y), evidence)
    found = site.smooth(Y)
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.covariance, cov)
    torch.testing.assert_close(found.variance, cov.diagonal(dim1=-2, dim2=-1))


def test_fine_steps_lead_to_the_evidence_of_continuous_time_at_first_order() -> None:
    law = sd.LinearGaussianMeasure(A, B, G, START.mean, START.covariance_matrix)
    exact = LinearObservations(law, TIMES, 0.2, H).log_prob(Y)
    sde = sd.SDE(lambda t, x: x @ A.mT + B, sd.Matrix(G))
    errors = [
        (NonlinearObservations(sde, START, TIMES, linear, 0.2, dt=dt).log_prob(Y) - exact).abs().item()
        for dt in (0.02, 0.01, 0.005)
    ]
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert all(abs(order - 1.0) < 0.15 for order in orders)


def test_the_ensemble_tends_to_the_exact_answer_within_its_own_error() -> None:
    evidence, mean, _ = euler_oracle(Y, 0.1)
    sde = sd.SDE(lambda t, x: x @ A.mT + B, sd.Matrix(G))

    def runs(count: int) -> Tensor:
        sites = [
            NonlinearObservations(sde, START, TIMES, linear, 0.2, EnsembleKalman(count, seed), dt=0.1)
            for seed in range(12)
        ]
        return torch.stack([site.log_prob(Y) for site in sites])

    for count in (200, 3200):
        found = runs(count)
        # The bias is of the order of the variance, 1/N, and so is what is left of it here.
        assert abs(float(found.mean() - evidence)) < 4 * float(found.std()) / 12**0.5 + 20 / count
    assert float(runs(3200).std()) < 0.5 * float(runs(200).std())
    smooth = NonlinearObservations(sde, START, TIMES, linear, 0.2, EnsembleKalman(20000), dt=0.1).smooth(Y)
    torch.testing.assert_close(smooth.mean, mean, atol=0.03, rtol=0)


@pytest.mark.parametrize("method", EXACT)
def test_noise_with_memory_counts(method: str) -> None:
    """The chain of path and memory is linear, so the evidence is that of the feedback law's exact chain."""
    memory = ExactMemory([1.0, 4.0], [0.5, 0.3])
    sde = sd.SDE(lambda t, x: -x, 0.7, memory)
    ts = torch.linspace(0, 1, 6, dtype=F64)
    y = torch.tensor([[0.5], [0.1], [NAN], [0.2], [-0.1]], dtype=F64)
    site = NonlinearObservations(sde, torch.ones(1, dtype=F64), ts[1:], lambda x: x, 0.3, method, dt=math.inf)

    # The path is linear in the increments: its joint covariance is that of its images of unit vectors.
    from stochdyn.core import increment_scale, integrate

    scale = increment_scale(sde, ts, 1, F64).flatten()
    width = scale.numel()
    units = (
        torch.cat([torch.zeros(1, width, dtype=F64), torch.diag(scale)])
        .reshape(width + 1, 5, -1)
        .movedim(0, 1)
    )
    x = integrate(sde, torch.ones(width + 1, 1, dtype=F64), ts, units).x[1:, :, 0]
    mean, load = x[:, 0], x[:, 1:] - x[:, :1]
    keep = ~y[:, 0].isnan()
    cov = (load @ load.mT)[keep][:, keep] + 0.09 * torch.eye(4, dtype=F64)
    exact = torch.distributions.MultivariateNormal(mean[keep], cov).log_prob(y[keep, 0])
    torch.testing.assert_close(site.log_prob(y), exact)


def well(
    unit: float = 1.0, clock: float = 1.0, dtype: torch.dtype = F64, **options: object
) -> NonlinearObservations:
    """Return observations of a wide well, in other units."""
    sde = sd.SDE(
        lambda t, x: -(x + (x / unit) ** 3 * unit) / clock,
        lambda t, x: sd.Diagonal((0.5 * unit + 0.1 * x.abs()) / clock**0.5),
    )
    start = dist.Normal(torch.full((1,), 0.5 * unit, dtype=dtype), 0.3 * unit).to_event(1)
    times = torch.tensor([0.4, 0.8, 1.6], dtype=dtype) * clock
    noise = options.pop("obs_scale", lambda x: 0.2 * unit + 0.1 * x.abs())
    return NonlinearObservations(
        sde, start, times, lambda x: x + x**2 / unit, noise, dt=0.2 * clock, **options
    )


DATA = torch.tensor([[0.3], [NAN], [0.1]], dtype=F64)
METHODS = [ExtendedKalman(), UnscentedKalman(), EnsembleKalman(50)]


@pytest.mark.parametrize("method", METHODS, ids=["ekf", "ukf", "enkf"])
class TestInvariances:
    def test_units(self, method) -> None:
        # Densities of two data change by the logarithm of the unit.
        testing.check_units(lambda u: well(u, method=method).log_prob(DATA * u) + 2 * math.log(u))
        testing.check_units(lambda u: well(1.0, u, method=method).log_prob(DATA))
        testing.check_units(lambda u: well(u, method=method).smooth(DATA * u).mean / u)

    def test_precision_and_repetition(self, method) -> None:
        testing.check_precision(lambda d: well(dtype=d, method=method).log_prob(DATA.to(d)), rtol=1e-4)
        testing.check_repetition(lambda: well(method=method).log_prob(DATA))

    def test_company_and_order(self, method) -> None:
        site = well(method=method)
        testing.check_company(site.log_prob, DATA, factors=(1e-6, 1.0, 5.0), rtol=1e-9)
        many = torch.stack([DATA, 2 * DATA, DATA - 1])
        testing.check_order(site.log_prob, many, equivariant=True, rtol=1e-9)

    def test_forms_of_data(self, method) -> None:
        site = well(method=method)
        testing.check_forms(lambda y: site.smooth(y).mean, DATA)

    def test_times_without_data_change_nothing(self, method) -> None:
        sde = sd.SDE(lambda t, x: -(x**3), 0.5)

        def evidence(times, y) -> Tensor:
            x0 = torch.ones(1, dtype=F64)
            return NonlinearObservations(sde, x0, times, lambda x: x, 0.2, method, dt=0.1).filter(y)

        few = evidence([0.2, 0.4], [[0.7], [0.5]])
        more = evidence([0.1, 0.2, 0.3, 0.4, 0.5], [[NAN], [0.7], [NAN], [0.5], [NAN]])
        torch.testing.assert_close(more.log_evidence, few.log_evidence, rtol=1e-9, atol=0)
        torch.testing.assert_close(more.mean[[1, 3]], few.mean, rtol=1e-9, atol=0)

    def test_gradients_agree_with_differences(self, method) -> None:
        def evidence(rate: Tensor, scale: Tensor, noise: Tensor, first: Tensor) -> Tensor:
            sde = sd.SDE(lambda t, x: -rate * torch.sin(x), sd.Scalar(scale))
            site = NonlinearObservations(sde, first, TIMES, lambda x: x + 0.2 * x**2, noise, method, dt=0.3)
            return site.log_prob(Y[:, :1])

        values = [torch.tensor(v, dtype=F64) for v in (1.2, 0.5, 0.3)]
        testing.check_gradients(evidence, *values, torch.tensor([0.8], dtype=F64))

    def test_values_never_make_the_device_wait(self, method) -> None:
        site = well(method=method)
        testing.check_asynchronous(lambda: site.log_prob(DATA))


def test_an_empty_start_of_data_and_precise_data_keep_their_digits() -> None:
    """Data at the very start, and noise a million times below the belief, in single precision."""
    sde = sd.SDE(lambda t, x: -x, 1.0)
    start = dist.Normal(torch.zeros(1), 1.0).to_event(1)
    y = torch.tensor([[0.5], [0.3]])
    for method in EXACT[:1]:
        site = NonlinearObservations(sde, start, [0.0, 0.5], lambda x: x, 1e-4, method)
        wide = NonlinearObservations(
            sd.SDE(lambda t, x: -x, 1.0),
            dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1),
            [0.0, 0.5],
            lambda x: x,
            1e-4,
            method,
        )
        torch.testing.assert_close(site.log_prob(y).double(), wide.log_prob(y.double()), rtol=1e-4, atol=0)


def test_batches_of_parameters_and_series_with_times_of_their_own() -> None:
    rate = torch.tensor([0.5, 1.5], dtype=F64)
    times = torch.tensor([[0.1, 0.5, 2.0], [0.3, 0.4, 0.9]], dtype=F64)
    y = torch.tensor([[[0.3], [NAN], [0.1]], [[0.2], [0.5], [-0.4]]], dtype=F64)
    x0 = torch.ones(1, dtype=F64)

    def site(rate: Tensor, times: Tensor) -> NonlinearObservations:
        sde = sd.SDE(lambda t, x: -rate[..., None] * x**3, 0.5)
        return NonlinearObservations(sde, x0, times, lambda x: x, 0.2, dt=0.15)

    whole = site(rate.expand(4, 2), times)
    assert (whole.batch_shape, whole.event_shape) == ((4, 2), (3, 1))
    for k in range(2):
        alone = site(rate[k], times[k]).log_prob(y[k])
        torch.testing.assert_close(whole.log_prob(y)[:, k], alone.expand(4))
    assert whole.rsample((3,)).shape == (3, 4, 2, 3, 1)
    assert whole.expand([5, 4, 2]).log_prob(y).shape == (5, 4, 2)
    late = NonlinearObservations(
        sd.SDE(lambda t, x: -x, 0.5),
        x0,
        times + 1,
        lambda x: x,
        0.2,
        start_time=torch.tensor([1.0, 1.0], dtype=F64),
    )
    early = NonlinearObservations(sd.SDE(lambda t, x: -x, 0.5), x0, times, lambda x: x, 0.2)
    torch.testing.assert_close(late.log_prob(y), early.log_prob(y))


def test_draws_have_the_moments_that_the_filter_predicts() -> None:
    site = NonlinearObservations(
        sd.SDE(lambda t, x: x @ A.mT + B, sd.Matrix(G)), START, TIMES, linear, 0.2, dt=0.1
    )
    torch.manual_seed(0)
    y = site.sample((4000,))
    empty = site.filter(torch.full((3, 2), NAN, dtype=F64))
    want = empty.mean @ H.mT
    spread = (H @ empty.covariance @ H.mT).diagonal(dim1=-2, dim2=-1) + 0.04
    assert bool(((y.mean(0) - want).abs() < 5 * (spread / 4000).sqrt()).all())
    torch.testing.assert_close(y.var(0), spread, rtol=5 * (2 / 4000) ** 0.5, atol=0)


def test_nuts_moves_through_the_parameters_alone_and_draws_replicas() -> None:
    def model() -> None:
        rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
        sde = sd.SDE(lambda t, x: -rate[..., None] * x**3, 0.5)
        site = NonlinearObservations(sde, torch.ones(1, dtype=F64), TIMES, lambda x: x, 0.2, "ukf", dt=0.3)
        pyro.sample("y", site, obs=torch.tensor([[0.7], [NAN], [0.2]], dtype=F64))

    pyro.set_rng_seed(0)
    mcmc = MCMC(NUTS(model), num_samples=5, warmup_steps=5, disable_progbar=True)
    mcmc.run()
    assert set(mcmc.get_samples()) == {"rate"}
    assert Predictive(pyro.poutine.uncondition(model), mcmc.get_samples())()["y"].shape == (5, 3, 1)


def test_wrong_arguments_are_told_by_name() -> None:
    sde, x0 = sd.SDE(lambda t, x: -x, 0.5), torch.ones(1, dtype=F64)
    with pytest.raises(InvalidInputError, match="sde"):
        NonlinearObservations("sde", x0, TIMES, lambda x: x, 0.2)
    with pytest.raises(InvalidInputError, match="observe"):
        NonlinearObservations(sde, x0, TIMES, torch.eye(1), 0.2)
    with pytest.raises(InvalidInputError, match="obs_scale"):
        NonlinearObservations(sde, x0, TIMES, lambda x: x, -0.2)
    with pytest.raises(InvalidInputError, match="method"):
        NonlinearObservations(sde, x0, TIMES, lambda x: x, 0.2, "kalman")
    with pytest.raises(TimeGridError, match="start_time"):
        NonlinearObservations(sde, x0, TIMES, lambda x: x, 0.2, start_time=0.4)
    with pytest.raises(TimeGridError, match="times"):
        NonlinearObservations(sde, x0, TIMES.flip(0), lambda x: x, 0.2)
    with pytest.raises(InvalidInputError, match="dt"):
        NonlinearObservations(sde, x0, TIMES, lambda x: x, 0.2, dt=0.0)
    mixture = dist.MixtureSameFamily(
        dist.Categorical(torch.ones(2)), dist.Normal(torch.zeros(2, 1), 1.0).to_event(1)
    )
    with pytest.raises(InvalidInputError, match="start"):
        NonlinearObservations(sd.SDE(lambda t, x: -x, 0.5), mixture, [1.0], lambda x: x, 0.2)
    with pytest.raises(ShapeError):
        NonlinearObservations(sde, x0, TIMES, lambda x: x, 0.2).log_prob(torch.zeros(2, 1, dtype=F64))
    blind = NonlinearObservations(sde, x0, TIMES, lambda x: x, lambda x: 0 * x - 0.0, start_time=0.3)
    with pytest.raises(SingularDiffusionError):
        blind.log_prob(torch.ones(3, 1, dtype=F64))
