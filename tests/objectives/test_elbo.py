"""The evidence lower bound of a latent path against the exact evidence of a linear-Gaussian chain."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Independent, MultivariateNormal, Normal

import stochdyn as sd
from stochdyn.core import Euler
from stochdyn.errors import (
    DtypeMismatchError,
    EmptyDataError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    TimeGridError,
    UnavailableError,
)
from tests.core.laws import F64, within

RATE, SCALE, START, SIGMA = 0.8, 0.9, 0.5, 0.3
TIMES = torch.tensor([0.5, 1.0, 1.5, 2.0], dtype=F64)
VALUES = torch.tensor([0.9, 0.1, -0.4, 0.6], dtype=F64)


class Chain:
    """An OU path observed at four times: its evidence on the grid and exact guides, by scalar recursions."""

    def __init__(self, steps: int) -> None:
        self.n = steps
        self.h = 2.0 / steps
        self.ts = torch.linspace(0, 2, steps + 1, dtype=F64)
        self.seen = {round(float(t) / self.h): float(y) for t, y in zip(TIMES, VALUES, strict=True)}
        self.prior = sd.DiffusionMeasure(
            torch.tensor([START], dtype=F64), sd.SDE(lambda t, x: -RATE * x, SCALE)
        )
        self.likelihood = sd.GaussianObservations(self.ts, TIMES, VALUES, SIGMA)
        # log p(what is seen after n | x_n) = -(p_n x^2) / 2 + q_n x + const, backwards in time.
        a, v = 1 - RATE * self.h, SCALE**2 * self.h
        p, q = 0.0, 0.0
        self.p, self.q = [0.0] * (steps + 1), [0.0] * (steps + 1)
        for n in reversed(range(steps)):
            if n + 1 in self.seen:
                p, q = p + 1 / SIGMA**2, q + self.seen[n + 1] / SIGMA**2
            self.p[n], self.q[n] = p, q  # of x_{n+1}, with its own observation
            shrink = 1 / (1 + p * v)
            p, q = a * a * p * shrink, a * q * shrink

    def evidence(self) -> float:
        """Return log p(y), by the covariance of the grid states."""
        a, v = 1 - RATE * self.h, SCALE**2 * self.h
        index = sorted(self.seen)
        covariance = torch.empty(4, 4, dtype=F64)
        for (i, m), (j, n) in itertools.product(enumerate(index), repeat=2):
            covariance[i, j] = sum(a ** (m - k) * a ** (n - k) * v for k in range(1, min(m, n) + 1))
        mean = torch.tensor([START * a**m for m in index], dtype=F64)
        noise = SIGMA**2 * torch.eye(4, dtype=F64)
        return float(MultivariateNormal(mean, covariance + noise).log_prob(VALUES))

    def guide(
        self, tight: bool, gain: Tensor | float = 1.0, shift: Tensor | float = 0.0
    ) -> sd.DiffusionMeasure:
        """Return the exact posterior, or with the prior's spread; ``gain`` and ``shift`` spoil it."""
        p, q = torch.tensor(self.p, dtype=F64), torch.tensor(self.q, dtype=F64)

        def control(t: Tensor, x: Tensor) -> Tensor:
            n = (t / self.h).round().long()
            slope = q[n] - p[n] * (1 - RATE * self.h) * x
            return gain * SCALE * slope / (1 + p[n] * SCALE**2 * self.h) + shift

        def precision(t: Tensor, x: Tensor) -> Tensor:
            return SCALE**2 * p[(t / self.h).round().long()] + 0 * x

        return self.prior.controlled(control, precision if tight else None)

    def elbo(self, guide: sd.DiffusionMeasure, particles: int = 4000, **options: Any) -> sd.PathELBO:
        return sd.PathELBO(self.prior, guide, self.likelihood, particles, **options)


@pytest.mark.parametrize("estimator", ["density", "rate", "stl", "auto"])
def test_the_exact_posterior_attains_the_evidence_with_every_path(estimator: str) -> None:
    chain = Chain(20)
    value = chain.elbo(chain.guide(True), 3, estimator=estimator)(None)
    assert value.bound == "evidence_lower"
    assert float(value.terms["elbo"]) == pytest.approx(chain.evidence(), abs=1e-9)
    assert float(-value.loss) == pytest.approx(chain.evidence(), abs=1e-9)
    assert float(value.terms["log_likelihood"] - value.terms["kl"]) == pytest.approx(
        chain.evidence(), abs=1e-9
    )


def test_the_bound_stays_below_the_evidence_and_the_gap_closes_with_the_step() -> None:
    gaps = []
    for steps in (20, 40, 80, 160):
        chain = Chain(steps)
        elbo, log_weights = chain.elbo(chain.guide(False)).evidence(4000)
        gap = chain.evidence() - log_weights.mean()
        assert gap > 4 * log_weights.std() / 4000**0.5
        gaps.append(float(gap))
        assert abs(float(elbo) - chain.evidence()) < 0.2
    assert gaps[0] > 1.6 * gaps[1] > 1.6**2 * gaps[2] > 1.6**3 * gaps[3]


def test_a_spoilt_guide_loses_its_divergence_from_the_posterior() -> None:
    """A shift c of the exact control costs c^2 h / (2 s_n^2) a step, s_n^2 the variance of the posterior."""
    chain, c = Chain(20), 0.3
    cost = sum(0.5 * c * c * chain.h * (1 + SCALE**2 * p * chain.h) for p in chain.p[:-1])
    value = chain.elbo(chain.guide(True, shift=c), 4000, estimator="density")(None)
    log_weights = chain.elbo(chain.guide(True, shift=c)).evidence(4000)[1]
    assert float(value.terms["elbo"]) == pytest.approx(chain.evidence() - cost, abs=0.05)
    assert within(log_weights.mean(), chain.evidence() - cost, log_weights.std() / 4000**0.5)


def _losses(chain: Chain, options: dict[str, Any], repeats: int) -> tuple[Tensor, Tensor]:
    """Return values and gradients in (gain, shift) of repeated evaluations."""
    values, gradients = [], []
    for _ in range(repeats):
        w = torch.tensor([0.8, 0.2], dtype=F64, requires_grad=True)
        value = chain.elbo(chain.guide(True, w[0], w[1]), **options)(None)
        gradients.append(torch.autograd.grad(value.loss, w)[0])
        values.append(value.terms["elbo"])
    return torch.stack(values), torch.stack(gradients)


def test_the_reported_value_is_the_bound_and_the_gradient_the_estimators() -> None:
    chain = Chain(8)
    runs = {e: _losses(chain, {"particles": 200, "estimator": e}, 60) for e in ("density", "rate", "stl")}
    mean = torch.cat([v for v, _ in runs.values()]).mean()
    for values, gradients in runs.values():
        assert within(values.mean(), mean, values.std() / 60**0.5)
        gap = gradients.mean(0) - runs["density"][1].mean(0)
        error = (gradients.var(0) + runs["density"][1].var(0)).sqrt() / 60**0.5
        assert within(gap, torch.zeros(2), error + 1e-12, 4.5)


@pytest.mark.parametrize("estimator", ["density", "rate", "stl"])
def test_the_loss_has_the_value_of_the_bound_and_the_gradient_of_log_rn(estimator: str) -> None:
    chain = Chain(8)
    w = torch.tensor([0.8, 0.2], dtype=F64, requires_grad=True)
    guide = chain.guide(True, w[0], w[1])
    torch.manual_seed(3)
    value = chain.elbo(guide, 5, estimator=estimator)(None)
    torch.manual_seed(3)
    path = guide.sample(chain.ts, (5,))
    by_hand = (guide.log_rn(path, chain.prior, estimator) - chain.likelihood(path)).mean()
    torch.testing.assert_close(torch.autograd.grad(value.loss, w)[0], torch.autograd.grad(by_hand, w)[0])
    weight = chain.likelihood(path) - guide.log_rn(path, chain.prior)
    torch.testing.assert_close(value.terms["elbo"], weight.mean().detach())
    torch.testing.assert_close(value.loss.detach(), -value.terms["elbo"])
    assert not any(term.requires_grad for term in value.terms.values())


def test_the_low_noise_gradient_vanishes_at_the_optimum() -> None:
    chain = Chain(8)
    noise = {}
    for estimator in ("density", "rate", "stl"):
        w = torch.tensor([1.0, 0.0], dtype=F64, requires_grad=True)
        loss = chain.elbo(chain.guide(True, w[0], w[1]), 4, estimator=estimator)(None).loss
        noise[estimator] = float(torch.autograd.grad(loss, w)[0].norm())
    assert noise["stl"] < 1e-10
    assert min(noise["density"], noise["rate"]) > 0.01


def test_importance_weighting_tightens_the_bound() -> None:
    chain = Chain(20)
    options = {"estimator": "density"}
    means, errors = [], []
    for particles in (1, 5, 50):
        values = torch.stack(
            [
                chain.elbo(chain.guide(False), particles, importance_weighted=True, **options)(None).terms[
                    "elbo"
                ]
                for _ in range(150)
            ]
        )
        means.append(float(values.mean()))
        errors.append(float(values.std()) / 150**0.5)
    assert means[0] + 4 * errors[0] < means[1] - 4 * errors[1]
    assert means[1] < means[2] < chain.evidence() + 4 * errors[2]


def test_the_gradient_of_the_importance_weighted_bound() -> None:
    chain = Chain(8)
    w = torch.tensor([0.8, 0.2], dtype=F64, requires_grad=True)
    guide = chain.guide(True, w[0], w[1])
    torch.manual_seed(3)
    value = chain.elbo(guide, 5, importance_weighted=True)(None)
    torch.manual_seed(3)
    path = guide.sample(chain.ts, (5,))
    bound = torch.logsumexp(chain.likelihood(path) - guide.log_rn(path, chain.prior), 0) - math.log(5)
    torch.testing.assert_close(value.loss.detach(), -bound.detach())
    torch.testing.assert_close(torch.autograd.grad(value.loss, w)[0], torch.autograd.grad(-bound, w)[0])


def test_auto_takes_the_rate_first_and_the_low_noise_gradient_once_the_weights_agree() -> None:
    chain = Chain(8)

    def gradient(objective: sd.PathELBO, w: Tensor) -> Tensor:
        torch.manual_seed(5)
        return torch.autograd.grad(objective(None).loss, w)[0]

    w = torch.tensor([0.9, 0.1], dtype=F64, requires_grad=True)
    guide = chain.guide(True, w[0], w[1])
    auto = chain.elbo(guide, 50, estimator="auto")
    rate, stl = (gradient(chain.elbo(guide, 50, estimator=e), w) for e in ("rate", "stl"))
    assert not torch.allclose(rate, stl)
    torch.testing.assert_close(gradient(auto, w), rate)
    torch.testing.assert_close(gradient(auto, w), stl)
    # Weights that never agree keep the rate.
    far = chain.elbo(guide, 50, estimator="auto", auto_threshold=1e-6)
    for _ in range(3):
        torch.testing.assert_close(gradient(far, w), rate)


def test_auto_takes_the_density_of_laws_that_know_nothing_else() -> None:
    """A law conditioned on the data is the exact posterior, of a diffusion as of a jump process: every path has the evidence."""
    ts = torch.linspace(0, 2, 9, dtype=F64)
    rate = nn.Parameter(torch.tensor(RATE, dtype=F64))
    prior = sd.LinearGaussianMeasure.ornstein_uhlenbeck(rate, 0.0, SCALE)
    seen = TIMES, VALUES[:, None], SIGMA
    elbo = sd.PathELBO(prior, prior.conditioned(*seen), sd.GaussianObservations(ts, *seen))
    evidence = prior.log_evidence(*seen)
    for _ in range(2):
        rate.grad = None
        loss = elbo().loss
        loss.backward()
        torch.testing.assert_close(-loss, evidence, rtol=1e-9, atol=1e-9)
        assert rate.grad is not None
        assert bool(rate.grad.isfinite())
    chain = sd.jumps.JumpMeasure([0.5, 0.5], [[0.0, 1.0], [2.0, 0.0]])
    label = torch.tensor([[0.8, 0.2], [0.3, 0.7]])
    after = chain.conditioned([0.3], [1], sd.jumps.Misclassified(label))
    bound = sd.PathELBO(chain, after, lambda path, batch: label[path.at([0.3])[..., 0], 1].log(), ts=ts)
    assert float(-bound().loss) == pytest.approx(float(after.log_evidence), rel=1e-5)
    fixed = sd.PathELBO(
        chain, after, lambda path, batch: label[path.at([0.3])[..., 0], 1].log(), 8, "rate", ts=ts
    )
    with pytest.raises(UnavailableError, match="rate"):
        fixed()


def test_what_auto_has_seen_is_saved_with_the_parameters() -> None:
    chain = Chain(8)
    first = chain.elbo(chain.guide(True), 10, estimator="auto")
    first(None)
    second = chain.elbo(chain.guide(True), 10, estimator="auto")
    assert second._choose() == "rate"
    second.load_state_dict(first.state_dict())
    assert first._choose() == second._choose() == "stl"
    first.eval()
    before = first._spread.clone()
    first(None)
    assert torch.equal(first._spread, before)


def test_training_reaches_the_evidence() -> None:
    """A learnt linear feedback and precision a step contain the exact posterior; Adam finds it."""
    chain = Chain(8)

    class Feedback(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Parameter(torch.zeros(8, 3, dtype=F64))

        def control(self, t: Tensor, x: Tensor) -> Tensor:
            row = self.rows[(t / chain.h).round().long().squeeze(-1)]
            return row[..., :1] * x + row[..., 1:2]

        def precision(self, t: Tensor, x: Tensor) -> Tensor:
            row = self.rows[(t / chain.h).round().long().squeeze(-1)]
            return nn.functional.softplus(5 * row[..., 2:] + 0 * x)

    feedback = Feedback()
    guide = chain.prior.controlled(feedback.control, feedback.precision)
    objective = chain.elbo(guide, 32, estimator="auto")
    optimiser = torch.optim.Adam(feedback.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, 250)
    for _ in range(250):
        optimiser.zero_grad()
        objective(None).loss.backward()
        optimiser.step()
        schedule.step()
    log_weights = objective.evidence(2000)[1]
    gap = chain.evidence() - float(log_weights.mean())
    assert -4 * float(log_weights.std()) / 2000**0.5 < gap < 0.02


@pytest.mark.parametrize("method", [Euler(checkpoint=True), "heun"])
def test_the_law_decides_how_its_paths_are_simulated(method: Any) -> None:
    chain = Chain(20)
    w = torch.tensor([0.8, 0.2], dtype=F64, requires_grad=True)
    losses = []
    for scheme in ("euler", method):
        prior = sd.DiffusionMeasure(chain.prior.initial, chain.prior.sde, method=scheme)
        guide = chain.guide(True, w[0], w[1])
        posterior = sd.DiffusionMeasure(guide.initial, guide.sde, method=scheme)
        torch.manual_seed(1)
        losses.append(sd.PathELBO(prior, posterior, chain.likelihood, 5)(None).loss)
    same = method != "heun"
    assert torch.equal(*losses) == same
    a, b = (torch.autograd.grad(loss, w)[0] for loss in losses)
    assert torch.equal(a, b) == same


def test_series_in_a_batch_have_their_bounds_added() -> None:
    one = Chain(20)
    values = torch.stack([VALUES, 2 * VALUES])
    prior = sd.DiffusionMeasure(torch.full((2, 1), START, dtype=F64), one.prior.sde)
    # The exact posterior of the first series, for both: the value is the sum over series of their own bounds.
    guide = sd.DiffusionMeasure(prior.initial, one.guide(True).sde)

    def likelihood(path: sd.PathSample, batch: Tensor) -> Tensor:
        states = path.x[..., [5, 10, 15, 20], 0]
        return Normal(states, SIGMA).log_prob(batch).sum(-1)

    value = sd.PathELBO(prior, guide, likelihood, 3, ts=one.ts)(values)
    torch.manual_seed(20240229)
    path = guide.sample(one.ts, (3,))
    assert value.loss.ndim == 0
    weights = likelihood(path, values) - guide.log_rn(path, prior)
    torch.testing.assert_close(weights[:, 0], torch.full((3,), one.evidence(), dtype=F64))


# --------------------------------------------------------------------------------------------- observations


def test_observations_between_grid_points_see_the_interpolated_path() -> None:
    ts = torch.tensor([0.0, 1.0, 3.0], dtype=F64)
    likelihood = sd.GaussianObservations(
        ts, torch.tensor([0.0, 0.25, 2.0, 3.0], dtype=F64), torch.zeros(4, 1, dtype=F64), 0.5
    )
    x = torch.tensor([[[1.0], [3.0], [7.0]]], dtype=F64)
    path = sd.PathSample(ts, x, torch.zeros(1, 2, 1))
    states = torch.tensor([1.0, 1.5, 5.0, 7.0], dtype=F64)
    expected = Independent(Normal(states, 0.5), 1).log_prob(torch.zeros(4, dtype=F64))
    torch.testing.assert_close(likelihood(path)[0], expected)


def test_each_component_and_observation_may_have_its_own_scale() -> None:
    ts = torch.tensor([0.0, 1.0, 2.0])
    scale = nn.Parameter(torch.tensor([[0.5, 2.0], [1.0, 3.0]]))
    likelihood = sd.GaussianObservations(ts, ts[1:], torch.ones(2, 2), scale)
    assert dict(likelihood.named_parameters()) == {"scale": scale}
    path = sd.PathSample(ts, torch.zeros(4, 3, 2), torch.zeros(4, 2, 2))
    value = likelihood(path)
    assert value.shape == (4,)
    torch.testing.assert_close(value[0], Normal(torch.zeros(2, 2), scale).log_prob(torch.ones(2, 2)).sum())


def test_missing_values_have_no_say_and_no_gradient() -> None:
    ts = torch.linspace(0, 2, 5)
    values = torch.tensor([[0.3, math.nan], [math.nan, math.nan], [0.1, -0.2]])
    scale = nn.Parameter(torch.full((3, 2), 0.4))
    likelihood = sd.GaussianObservations(ts, ts[[1, 2, 4]], values, scale)
    x = torch.randn(4, 5, 2, requires_grad=True)
    value = likelihood(sd.PathSample.of_states(ts, x))
    parts = [(1, 0, 0.3), (4, 0, 0.1), (4, 1, -0.2)]
    expected = sum(Normal(x[:, n, i], 0.4).log_prob(torch.tensor(y)) for n, i, y in parts)
    torch.testing.assert_close(value, expected)
    value.sum().backward()
    assert torch.isfinite(x.grad).all()  # type: ignore[arg-type]
    assert torch.isfinite(scale.grad).all()  # type: ignore[arg-type]
    assert torch.equal(scale.grad == 0, torch.isnan(values))  # type: ignore[operator]


@pytest.mark.parametrize("form", ["lists", "numpy", "pandas", "xarray"])
def test_observations_in_any_form(form: str) -> None:
    ts, values = torch.linspace(0, 1, 5), [[0.3, math.nan], [0.1, 0.2]]
    times, scale = [0.5, 1.0], [0.3, 0.4]
    expected = sd.GaussianObservations(ts, torch.tensor(times), torch.tensor(values), torch.tensor(scale))
    path = sd.PathSample.of_states(ts, torch.zeros(3, 5, 2))
    given: Any = values, times, scale
    if form == "numpy":
        given = tuple(map(np.array, given))
    elif form == "pandas":
        pd = pytest.importorskip("pandas")
        given = pd.DataFrame(values), pd.Series(times), pd.Series(scale)
    elif form == "xarray":
        xr = pytest.importorskip("xarray")
        given = tuple(map(xr.DataArray, given))
    found = sd.GaussianObservations(ts.tolist() if form == "lists" else ts, given[1], given[0], given[2])
    torch.testing.assert_close(found(path), expected(path))


def test_observations_follow_their_module_everywhere() -> None:
    seen = sd.GaussianObservations(torch.linspace(0, 1, 3), [0.5], [0.1], 0.2)
    assert {t.device.type for t in (*seen.to("meta").buffers(), *seen.parameters())} == {"meta"}
    again = sd.GaussianObservations(torch.linspace(0, 1, 3), [0.5], [0.4], 0.7)
    again.load_state_dict(sd.GaussianObservations(torch.linspace(0, 1, 3), [0.5], [0.1], 0.2).state_dict())
    assert float(again.scale) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("times", "values", "scale", "error", "message"),
    [
        ([0.5, 2.5], [0.0, 0.0], 1.0, TimeGridError, r"times\[1\]=2.5; expected \[0, 2\]"),
        ([-0.1, 1.0], [0.0, 0.0], 1.0, TimeGridError, r"times\[0\]=-0.1"),
        ([0.5, math.nan], [0.0, 0.0], 1.0, NonFiniteError, "times"),
        ([0.5, 1.0], [0.0, math.inf], 1.0, NonFiniteError, "values must be finite"),
        ([0.5, 1.0], [math.nan, math.nan], 1.0, EmptyDataError, "values has no observation"),
        ([], [], 1.0, EmptyDataError, "values is empty"),
        ([0.5, 1.0], [0.0], 1.0, ShapeError, "2 and 1"),
        ([0.5, 1.0], [0.0, 0.0], 0.0, InvalidInputError, "obs_scale must be positive"),
        ([0.5, 1.0], [0.0, 0.0], "small", InvalidInputError, "obs_scale must be numbers"),
        ([0.5, 1.0], [0.0, 0.0], [1.0] * 3, ShapeError, "obs_scale must broadcast"),
        ([0.5, 1.0], [0.0, 0.0], -1.0, InvalidInputError, "obs_scale must be positive"),
    ],
)
def test_bad_observations(
    times: list[float], values: list[float], scale: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sd.GaussianObservations(torch.linspace(0, 2, 5), torch.tensor(times), torch.tensor(values), scale)


def test_bad_objectives() -> None:
    chain = Chain(8)
    guide = chain.guide(True)
    with pytest.raises(InvalidInputError, match="estimator is unknown; got 'elbo'"):
        chain.elbo(guide, estimator="elbo")
    with pytest.raises(InvalidInputError, match="auto_threshold does nothing"):
        chain.elbo(guide, estimator="rate", auto_threshold=1.0)
    with pytest.raises(InvalidInputError, match="num_particles"):
        chain.elbo(guide, 0)
    with pytest.raises(InvalidInputError, match="no time grid"):
        sd.PathELBO(chain.prior, guide, lambda path, batch: path.x.sum((-1, -2)))
    with pytest.raises(ShapeError, match="one number per path"):
        sd.PathELBO(chain.prior, guide, lambda path, batch: path.x, ts=chain.ts)(None)
    two = sd.DiffusionMeasure(torch.zeros(2, dtype=F64), chain.prior.sde)
    with pytest.raises(ShapeError, match=r"path\.x has the wrong size"):
        sd.PathELBO(two, two, chain.likelihood)(None)
    single = sd.DiffusionMeasure(torch.zeros(1), chain.prior.sde)
    with pytest.raises(DtypeMismatchError, match=r"values torch\.float64"):
        sd.PathELBO(single, single, chain.likelihood)(None)
