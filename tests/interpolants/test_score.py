"""Score matching: its minimiser, weights, residuals in every form, schedules and bad input."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.core import ContinuityEquation, FokkerPlanck, LearnedFlow
from stochdyn.errors import EmptyDataError, InvalidInputError, NonFiniteError, ShapeError, UnavailableError
from stochdyn.interpolants import (
    OU,
    VP,
    FieldNetwork,
    FunctionPotential,
    GaussianMixtureInterpolant,
    Interpolant,
    PotentialNetwork,
    ScoreMatching,
    WeightRamp,
)
from stochdyn.objectives import Objective, UniformPoints
from stochdyn.testing import ObjectiveSuite
from tests.interpolants.laws import F64, gaussian, mixture, processes


class ScoreNet(nn.Module):
    """A plain score network."""

    def __init__(self, d: int = 2) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(d + 1, 16), nn.Tanh(), nn.Linear(16, d))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.net(torch.cat([t, x], -1)) - x


class TestPotential(ObjectiveSuite):
    """The contract, with a potential."""

    def make(self) -> tuple[Objective, Any]:
        """Return a regularised objective and a batch."""
        torch.manual_seed(0)
        process = OU().double()
        phi = PotentialNetwork(process, 2, 8, 2, zero_last=False).double()
        return ScoreMatching(process, phi, fp_weight=0.1), torch.randn(16, 2, dtype=F64)


class TestScore(ObjectiveSuite):
    """The contract, with a score and probes."""

    def make(self) -> tuple[Objective, Any]:
        """Return a regularised objective and a batch."""
        torch.manual_seed(0)
        diff = ScoreMatching(OU().double(), score=ScoreNet().double(), fp_weight=0.1, residual="hutchinson")
        return diff, torch.randn(16, 2, dtype=F64)


@pytest.mark.parametrize("weight", ["variance", "likelihood", "none", lambda t: t])
@pytest.mark.parametrize("averaged", [False, True])
def test_the_truth_beats_its_neighbours(weight: Any, averaged: bool) -> None:
    truth = gaussian(processes()["ou"])

    def loss(stretch: float) -> Tensor:
        diff = ScoreMatching(
            truth.process,
            score=lambda t, x: stretch * truth.score(t, x),
            weight=weight,
            averaged_targets=averaged,
        )
        torch.manual_seed(1)
        data = truth.sample(torch.tensor(0.0, dtype=F64), 2000)
        return diff(data).loss

    assert loss(1.0) < loss(0.9)
    assert loss(1.0) < loss(1.1)


def test_averaged_targets_are_conditional_means_given_the_batch() -> None:
    process = OU().double()
    diff = ScoreMatching(process, score=lambda t, x: -x, averaged_targets=True)
    x0 = torch.tensor([[-1.0], [0.5], [2.0]], dtype=F64)
    t, x = torch.full((3, 1), 0.7, dtype=F64), torch.tensor([[0.1], [-0.4], [1.0]], dtype=F64)
    a, std = process.scale(t[0]), process.std(t[0])
    weights = torch.exp(-0.5 * ((x - a * x0.T) / std) ** 2)
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(diff._averaged_noise(t, x, x0), (x - a * (weights @ x0)) / std)


def test_averaged_targets_leave_less_noise() -> None:
    truth = mixture(processes()["ou"])
    torch.manual_seed(0)
    data = truth.sample(torch.tensor(0.0, dtype=F64), 512)
    losses = [
        ScoreMatching(truth.process, score=truth.score, averaged_targets=averaged)(data).loss
        for averaged in (False, True)
    ]
    assert losses[1] < 0.3 * losses[0]


@pytest.mark.parametrize("times", ["log-snr", "uniform"])
def test_times_are_spread_as_asked(times: Any) -> None:
    process = VP(start=0.01).double()
    diff = ScoreMatching(process, score=lambda t, x: -x, times=times)
    t = diff.draw_times(4000, torch.empty(0, dtype=F64)).squeeze(-1).sort().values
    assert process.start <= t[0] < t[-1] <= process.horizon
    value = process.log_snr(t).flip(0) if times == "log-snr" else t
    share = (value - value[0]) / (value[-1] - value[0])
    # One point in each stratum: the empirical distribution is off by at most two strata.
    assert (share - torch.linspace(0, 1, 4000, dtype=F64)).abs().max() < 2 / 4000 + 1e-9


def test_own_times_and_weights() -> None:
    truth = gaussian(processes()["ou"])
    seen: list[Tensor] = []

    def weight(t: Tensor) -> Tensor:
        seen.append(t)
        return torch.ones_like(t)

    diff = ScoreMatching(
        truth.process,
        FunctionPotential(truth.process, truth.log_prob),
        fp_weight=1.0,
        times=lambda n: torch.full((n,), 0.25),
        residual_weight=weight,
    )
    value = diff(torch.randn(6, 2, dtype=F64))
    assert bool((seen[0] == 0.25).all())
    assert value.terms["residual"] < 1e-18


@pytest.mark.parametrize("residual_weight", ["log-snr", "variance", "none"])
def test_the_residual_term_is_the_weighted_square_at_the_noised_data(residual_weight: Any) -> None:
    process = processes()["vp"]
    torch.manual_seed(0)
    phi = PotentialNetwork(process, 2, 8, 2, zero_last=False).double()
    data = torch.randn(5, 2, dtype=F64)
    diff = ScoreMatching(process, phi, fp_weight=0.5, residual_weight=residual_weight)
    torch.manual_seed(7)
    value = diff(data)
    torch.manual_seed(7)
    t = diff.draw_times(5, data)
    x = process.perturb(t, data, torch.randn_like(data))
    r = FokkerPlanck(process.sde()).residual(LearnedFlow(phi), t, x)
    weight = {
        "none": torch.ones(5, dtype=F64),
        "variance": process.variance(t).squeeze(-1) ** 2,
        "log-snr": (2 * process.variance(t) / process.squared_diffusion(t)).squeeze(-1) ** 2,
    }[residual_weight]
    torch.testing.assert_close(value.terms["residual"], (weight * r.square()).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(value.loss, value.terms["score"] + 0.5 * value.terms["residual"])


def test_residual_on_a_box() -> None:
    truth = gaussian(processes()["ou"])
    box = UniformPoints(-torch.ones(2, dtype=F64), torch.ones(2, dtype=F64), 0.1, 2.0, 32)
    diff = ScoreMatching(
        truth.process,
        lambda t, x: truth.log_prob(t, x) + 0.5 * t.squeeze(-1),
        fp_weight=1.0,
        residual_weight="none",
        collocation=box,
    )
    torch.testing.assert_close(
        diff(torch.randn(4, 2, dtype=F64)).terms["residual"], torch.tensor(0.25, dtype=F64)
    )


@pytest.mark.parametrize("residual", ["exact", "hutchinson"])
def test_true_scores_have_no_residual(residual: Any) -> None:
    truth = mixture(processes()["ou"])
    diff = ScoreMatching(truth.process, score=truth.score, fp_weight=1.0, residual=residual)
    torch.manual_seed(0)
    value = diff(truth.sample(torch.tensor(0.0, dtype=F64), 8))
    if residual == "exact":
        assert value.terms["residual"].abs() < 1e-18
    assert diff.fokker_planck_residual(0.5, torch.randn(3, 2, dtype=F64)).abs().max() < 1e-10


def test_residual_in_both_forms() -> None:
    process = processes()["ou"]
    torch.manual_seed(0)
    phi = PotentialNetwork(process, 2, 8, 2, zero_last=False).double()
    diff = ScoreMatching(process, phi)
    x = torch.randn(4, 2, dtype=F64, requires_grad=True)
    general = FokkerPlanck(process.sde()).residual(LearnedFlow(phi), 0.4, x)
    torch.testing.assert_close(diff.fokker_planck_residual(0.4, x), general)
    slope = torch.autograd.grad(general.sum(), x)[0]
    torch.testing.assert_close(diff.fokker_planck_residual(0.4, x, form="score"), slope)
    alone = ScoreMatching(process, score=phi.score)
    with pytest.raises(UnavailableError):
        alone.fokker_planck_residual(0.4, x, form="log")


def test_training_finds_a_gaussian_and_sampling_returns_it() -> None:
    torch.manual_seed(0)
    data = torch.tensor([2.0, -1.0]) + torch.randn(4000, 2) * torch.tensor([0.5, 1.5])
    process = OU()
    diff = ScoreMatching(process, potential=PotentialNetwork(process, 2, 32, 2), fp_weight=0.01)

    def cosine(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 600)

    result = sd.fit(diff, data, steps=600, batch_size=256, lr=1e-2, scheduler=cosine, progress=False)
    rev = result.objective.generator()
    g = torch.Generator().manual_seed(2)
    for method in ("sde", "ode"):
        x = rev.sample(4000, method=method, num_steps=50, generator=g)  # type: ignore[arg-type]
        torch.testing.assert_close(x.mean(0), torch.tensor([2.0, -1.0]), rtol=0, atol=0.15)
        torch.testing.assert_close(x.std(0), torch.tensor([0.5, 1.5]), rtol=0.1, atol=0)
    assert sd.interpolants.ode_sde_gap(rev, 500) < 0.5


def test_any_network_serves() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 16), nn.SiLU(), nn.Linear(16, 1))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.net(torch.cat([t, x], -1)) - x.square().sum(-1, keepdim=True)

    for residual in ("exact", "hutchinson"):
        diff = ScoreMatching(VP(), potential=Net(), fp_weight=0.01, residual=residual)  # type: ignore[arg-type]
        sd.fit(diff, torch.randn(64, 2), steps=3, batch_size=32, progress=False)
        rev = diff.generator()
        assert rev.sample(7, method="ode", num_steps=5).shape == (7, 2)
        assert rev.sample(7, method="sde", num_steps=5).shape == (7, 2)
        assert diff.fokker_planck_residual(0.5, torch.zeros(4, 2)).shape == (4,)
        assert rev.log_prob(torch.zeros(4, 2), num_steps=5).shape == (4,)
        assert sd.interpolants.ode_sde_gap(rev, 20, num_steps=5) > 0


def test_weights_follow_training_and_survive_a_checkpoint(tmp_path: Any) -> None:
    process = OU()

    def make() -> ScoreMatching:
        torch.manual_seed(0)
        phi = PotentialNetwork(process, 1, 8, 1, zero_last=False)
        return ScoreMatching(process, phi, fp_weight=WeightRamp(1.0, 0.1, 2, 6))

    data = torch.randn(64, 1)
    run = {"batch_size": 16, "progress": False}
    whole = sd.fit(make(), data, steps=8, **run)  # type: ignore[arg-type]
    sd.fit(make(), data, steps=4, checkpoint=tmp_path / "run", **run)  # type: ignore[arg-type]
    again = sd.fit(make(), data, steps=8, checkpoint=tmp_path / "run", resume=True, **run)  # type: ignore[arg-type]
    assert torch.equal(whole.losses, again.losses)
    ratio = (whole.losses - whole.terms["score"]) / whole.terms["residual"]
    ramp = torch.tensor([1.0, 1.0, 1.0, 0.1**0.25, 0.1**0.5, 0.1**0.75, 0.1, 0.1])
    torch.testing.assert_close(ratio.float(), ramp, rtol=1e-3, atol=1e-4)


def test_the_same_residual_serves_velocities_and_stationary_laws() -> None:
    """An interpolant's density is carried by its velocity; a stationary law by its drift and noise."""
    truth = mixture(processes()["ou"])
    flow = LearnedFlow(truth.log_prob)
    process, x = truth.process, torch.randn(5, 2, dtype=F64)

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        return process.drift(t, x) - 0.5 * process.squared_diffusion(t) * truth.score(t, x)

    assert ContinuityEquation(velocity).residual(flow, 0.3, x).abs().max() < 1e-10
    it = Interpolant("linear", "brownian")
    ends = (
        (torch.ones(1, dtype=F64), torch.zeros(1, 2, dtype=F64), 1.0),
        (torch.full((2,), 0.5, dtype=F64), x[:2], 0.3),
    )
    between = GaussianMixtureInterpolant(it, *ends)
    assert ContinuityEquation(between.velocity).residual(between, 0.3, x).abs().max() < 1e-10
    forward = sd.SDE(lambda t, x: between.forward_drift(t, x, 0.4), 0.8**0.5)  # the noise is sqrt(2 epsilon)
    assert FokkerPlanck(forward).residual(between, 0.3, x).abs().max() < 1e-10
    # A swimmer whose velocity is an Ornstein-Uhlenbeck process, in a harmonic trap: Gaussian, by Lyapunov's equation.
    a = torch.tensor([[-1.0, 1.0], [0.0, -0.5]], dtype=F64)
    g = torch.tensor([0.3, 1.0], dtype=F64)
    eye = torch.eye(2, dtype=F64)
    lyapunov = torch.kron(a, eye) + torch.kron(eye, a)
    cov = torch.linalg.solve(lyapunov, -torch.diag(g**2).flatten()).reshape(2, 2)
    law = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), cov)
    swimmer = sd.SDE(lambda t, x: x @ a.T, g)
    stationary = LearnedFlow(lambda t, x: law.log_prob(x))
    residual = FokkerPlanck(swimmer).residual(stationary, 0.0, x, stationary=True)
    assert residual.abs().max() < 1e-12
    wrong = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), cov.diag().diag())
    other = LearnedFlow(lambda t, x: wrong.log_prob(x))
    assert FokkerPlanck(swimmer).residual(other, 0.0, x, stationary=True).abs().max() > 0.1


def test_bad_input() -> None:
    process, phi = OU(), PotentialNetwork(OU(), 2, 4, 1)
    for make in (
        lambda: ScoreMatching(process),
        lambda: ScoreMatching(process, phi, ScoreNet()),
        lambda: ScoreMatching("vp", phi),  # type: ignore[arg-type]
        lambda: ScoreMatching(process, 3.0),  # type: ignore[arg-type]
        lambda: ScoreMatching(VP(), phi),
        lambda: ScoreMatching(process, phi, fp_weight=-1.0),
        lambda: ScoreMatching(process, phi, fp_weight=float("nan")),
        lambda: ScoreMatching(process, phi, residual="both"),  # type: ignore[arg-type]
        lambda: ScoreMatching(process, phi, residual="hutchinson", num_probes=1),
        lambda: ScoreMatching(process, phi, times="log"),  # type: ignore[arg-type]
        lambda: ScoreMatching(process, phi, weight="snr"),  # type: ignore[arg-type]
        lambda: ScoreMatching(process, phi, residual_weight="snr"),  # type: ignore[arg-type]
        lambda: ScoreMatching(process, score=ScoreNet(), residual="forward"),
        lambda: ScoreMatching(process, score=ScoreNet()).generator(),
        lambda: WeightRamp(1.0, -0.1, 0, 10),
        lambda: WeightRamp(1.0, 0.1, 10, 10),
    ):
        with pytest.raises(InvalidInputError):
            make()
    diff = ScoreMatching(process, phi)
    with pytest.raises(ShapeError):
        diff(torch.zeros(4))
    with pytest.raises(ShapeError):
        diff(torch.zeros(4, 3))
    with pytest.raises(EmptyDataError):
        diff(torch.zeros(0, 2))
    with pytest.raises(NonFiniteError):
        diff(torch.full((4, 2), float("nan")))
    with pytest.raises(InvalidInputError, match="floating"):
        diff(torch.zeros(4, 2, dtype=torch.long))
    with pytest.raises(InvalidInputError, match="a batch is"):
        diff(None)
    with pytest.raises(ShapeError, match="times"):
        ScoreMatching(process, phi, times=lambda n: torch.zeros(n, 1))(torch.zeros(4, 2))
    with pytest.raises(ShapeError, match="broadcast"):
        diff.fokker_planck_residual(torch.zeros(3), torch.zeros(4, 2))


def test_a_score_of_conditions_is_not_asked_without_one():
    objective = ScoreMatching(VP(), score=FieldNetwork(2, 8, 1, num_classes=2))
    sd.fit(objective, {"x1": torch.randn(20, 2), "condition": torch.arange(20) % 2}, steps=2, progress=False)
    model = objective.generator()
    for ask in (
        lambda: model.sample(3),
        lambda: model.log_prob(torch.zeros(3, 2)),
        lambda: model.score(0.5, torch.zeros(3, 2)),
    ):
        with pytest.raises(InvalidInputError, match="trained with conditions alone"):
            ask()
    assert model.sample(3, condition=1, num_steps=2).shape == (3, 2)
