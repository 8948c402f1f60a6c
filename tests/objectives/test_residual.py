"""The forward residual as an objective: zero at solutions, unbiased with probes, and trains to the truth."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from stochdyn.core import (
    SDE,
    FokkerPlanck,
    GaussianFlow,
    Hutchinson,
    LearnedFlow,
    LinearGaussianMeasure,
    SparseMasterEquation,
    all_configurations,
)
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.objectives import FlowPoints, ForwardResidual, Objective, UniformPoints
from stochdyn.testing import ObjectiveSuite

F64 = torch.float64


class Potential(nn.Module):
    """A log density as the start plus time times a network, so that the initial law holds exactly."""

    def __init__(self, d: int, width: int = 24) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(d + 1, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)
        ).double()

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return t.squeeze(-1) * self.net(torch.cat([t, x], -1)).squeeze(-1)


def equation(d: int = 2) -> tuple[SDE, GaussianFlow, GaussianFlow]:
    """An OU equation, its exact flow from N(1, 0.4), and the start held still."""
    lin = LinearGaussianMeasure.ornstein_uhlenbeck(
        1.0, initial_mean=torch.ones(d, dtype=F64), initial_cov=0.4 * torch.eye(d, dtype=F64)
    )
    flow = GaussianFlow.from_measure(lin)
    start = GaussianFlow(
        lambda t: torch.ones(*t.shape, d, dtype=F64),
        lambda t: 0.4 * torch.eye(d, dtype=F64).expand(*t.shape, d, d),
    )
    return SDE(lambda t, x: -x, 1.0), flow, start


class TestExactResidual(ObjectiveSuite):
    """The contract, with exact traces."""

    options: ClassVar[dict[str, Any]] = {}

    def make(self) -> tuple[Objective, Any]:
        """Return a residual of a small network on fixed points."""
        torch.manual_seed(0)
        sde, flow, start = equation()
        learned = LearnedFlow(Potential(2, 8), reference=start)
        points = FlowPoints(flow, 0.0, 1.0, 16, torch.empty(0, dtype=F64))()
        return ForwardResidual(learned, FokkerPlanck(sde), **self.options), points


class TestHutchinsonResidual(TestExactResidual):
    """The contract, with random traces."""

    options: ClassVar[dict[str, Any]] = {"method": "hutchinson"}


class TestScoreResidual(TestExactResidual):
    """The contract, in score form, where a weight alone acts on the sum over components."""

    options: ClassVar[dict[str, Any]] = {"form": "score", "weight": lambda t, x: 1 + t.squeeze(-1)}
    # the score doesn't see a term that depends on time alone
    unseen = ("flow.function.net.4.bias",)


@pytest.mark.parametrize("form", ["log", "score", "density"])
def test_zero_at_the_solution(form) -> None:
    sde, flow, _ = equation()
    points = FlowPoints(flow, 0.1, 1.0, 32, torch.empty(0, dtype=F64))
    value = ForwardResidual(flow, FokkerPlanck(sde), points, form=form)()
    assert float(value.loss.detach()) < 1e-20
    assert value.bound == "residual"


def test_wrong_drift_costs_what_it_should() -> None:
    _, flow, _ = equation()
    moved = SDE(lambda t, x: 0.5 - x, 1.0)
    t, x = torch.full((1, 1), 0.7, dtype=F64), torch.zeros(1, 2, dtype=F64)
    loss = ForwardResidual(flow, FokkerPlanck(moved), weight=lambda t, x: 3.0 * t.squeeze(-1))((t, x)).loss
    torch.testing.assert_close(loss.detach(), 2.1 * (0.5 * flow.score(t, x).sum()).square().detach())


def test_probes_estimate_the_exact_loss_without_bias() -> None:
    torch.manual_seed(2)
    _, flow, start = equation()
    turn = SDE(lambda t, x: x.flip(-1).square() - x, 1.0)
    t, x = FlowPoints(flow, 0.0, 1.0, 4, torch.empty(0, dtype=F64))()
    learned = LearnedFlow(Potential(2, 8), reference=start)
    exact = float(ForwardResidual(learned, FokkerPlanck(turn))((t, x)).loss.detach())
    n = 4000
    objective = ForwardResidual(learned, FokkerPlanck(turn), method=Hutchinson(3))
    with torch.no_grad():
        losses = objective.squares(t.repeat(n, 1), x.repeat(n, 1)).reshape(n, 4).mean(1)
    assert abs(float(losses.mean()) - exact) < 5 * float(losses.std()) / n**0.5


def train(objective: Objective, steps: int, lr: float) -> float:
    """Run Adam with a cosine schedule and return the last loss."""
    optimiser = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        optimiser.zero_grad()
        loss = objective().loss
        loss.backward()
        optimiser.step()
        schedule.step()
    return float(loss.detach())


def test_trains_a_network_to_the_solution_of_the_equation() -> None:
    torch.manual_seed(0)
    sde, flow, start = equation(1)
    learned = LearnedFlow(Potential(1), reference=start)
    points = UniformPoints(-2.5 * torch.ones(1, dtype=F64), 3.5 * torch.ones(1, dtype=F64), 0.0, 1.0, 128)
    objective = ForwardResidual(learned, FokkerPlanck(sde), points)
    before = float(objective().loss.detach())
    train(objective, 600, 1e-2)
    t = torch.tensor([0.25, 0.5, 1.0], dtype=F64)
    x = flow.sample(t, 200, torch.Generator().manual_seed(0))
    with torch.no_grad():
        gap = learned.log_prob(t[:, None, None], x) - flow.log_prob(t[:, None, None], x)
        after = float(ForwardResidual(learned, FokkerPlanck(sde))((t[:, None, None], x)).loss)
    assert float(gap.abs().mean()) < 0.02, "the density, normaliser included, comes from the equation alone"
    assert after < 1e-2 * before


@pytest.mark.parametrize("method", ["exact", "hutchinson"])
def test_trains_a_stationary_covariance_to_the_lyapunov_solution(method) -> None:
    torch.manual_seed(0)
    a = torch.tensor([[-1.0, 0.8], [-0.3, -0.7]], dtype=F64)
    root = nn.Parameter(torch.eye(2, dtype=F64))
    flow = LearnedFlow(lambda t, x: -0.5 * (x @ root).square().sum(-1))
    flow.root = root
    truth = LinearGaussianMeasure(a, torch.zeros(2, dtype=F64), 1.0, torch.zeros(2, dtype=F64))
    covariance = truth.covariance(torch.tensor([60.0], dtype=F64))[0]
    low = -2 * torch.ones(2, dtype=F64)
    operator = FokkerPlanck(SDE(lambda t, x: x @ a.T, 1.0))
    points = UniformPoints(low, -low, 0.0, 1.0, 128)
    objective = ForwardResidual(flow, operator, points, stationary=True, method=method)
    train(objective, 400, 2e-2)
    found = torch.linalg.inv((root @ root.T).detach())
    torch.testing.assert_close(found, covariance, rtol=0.02, atol=0.01)


def test_master_equation_is_an_operator_like_any_other() -> None:
    torch.manual_seed(0)
    flip = torch.tensor([[-1.0, 3.0], [1.0, -3.0]], dtype=F64)
    operator = SparseMasterEquation(3, 2, [((i,), flip) for i in range(3)])
    logits = nn.Parameter(torch.zeros(3, 2, dtype=F64))
    flow = LearnedFlow(lambda t, a: logits.log_softmax(-1)[torch.arange(3), a].sum(-1))
    flow.logits = logits
    a = all_configurations(3, 2)
    objective = ForwardResidual(flow, operator, lambda: (torch.tensor(0.0, dtype=F64), a), stationary=True)
    assert train(objective, 300, 5e-2) < 1e-6
    torch.testing.assert_close(
        logits.softmax(-1).detach(), torch.tensor([0.75, 0.25], dtype=F64).expand(3, 2), rtol=0, atol=1e-3
    )


def test_points_lie_where_they_should() -> None:
    low, high = torch.tensor([0.0, -3.0]), torch.tensor([1.0, -2.0])
    t, x = UniformPoints(low, high, 2.0, 4.0, 500)()
    assert bool(((x >= low) & (x <= high)).all())
    assert bool(((t >= 2) & (t <= 4)).all())
    assert float(t.std()) > 0.4
    _, flow, _ = equation(2)
    t, x = FlowPoints(flow, 0.0, 1.0, 7, torch.empty(0, dtype=F64))()
    assert t.shape == (7, 1)
    assert x.shape == (7, 2)
    assert not x.requires_grad


def test_bad_input_raises() -> None:
    sde, flow, _ = equation()
    operator = FokkerPlanck(sde)
    with pytest.raises(InvalidInputError, match="num_probes must be an integer of at least 2"):
        ForwardResidual(flow, operator, method=Hutchinson(1))
    with pytest.raises(InvalidInputError, match="form is unknown"):
        ForwardResidual(flow, operator, form="magic")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="there are no points"):
        ForwardResidual(flow, operator)()
    with pytest.raises(ShapeError, match="corners of a box"):
        UniformPoints(torch.zeros(2), torch.zeros(3), 0.0, 1.0, 5)
    with pytest.raises(InvalidInputError, match="horizon must be greater than 1"):
        FlowPoints(flow, 1.0, 1.0, 5)
