"""Potentials: scores and residuals in closed form, by automatic differentiation, and by the general operator."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stochdyn.core import FokkerPlanck, LearnedFlow, unbiased_square
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.interpolants import OU, FunctionPotential, PotentialNetwork
from tests.interpolants.laws import F64, gaussian, mixture, processes

KINDS = ["ou", "vp", "ve", "reverting"]


def network(kind: str) -> PotentialNetwork:
    """A small network with weights that matter, on a Gaussian with unequal variances."""
    torch.manual_seed(3)
    mean, variance = torch.tensor([0.3, -0.8], dtype=F64), torch.tensor([0.4, 1.7], dtype=F64)
    return PotentialNetwork(processes()[kind], 2, 12, 2, mean, variance, zero_last=False).double()


def points(kind: str) -> tuple[Tensor, Tensor]:
    process = processes()[kind]
    t = torch.linspace(process.start, process.horizon, 7, dtype=F64)[:, None]
    return t, torch.randn(7, 2, dtype=F64, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("kind", KINDS)
def test_score_and_residual_agree_with_the_general_operator(kind: str) -> None:
    phi, (t, x) = network(kind), points(kind)
    made = phi.score_and_residual(t, x)
    operator, flow = FokkerPlanck(phi.process.sde()), LearnedFlow(phi)
    want = operator.residual(flow, t, x)
    torch.testing.assert_close(
        made.residuals[0], want, rtol=1e-8, atol=1e-9 * float(want.detach().abs().max())
    )
    torch.testing.assert_close(made.score, LearnedFlow(phi).score(t, x))
    torch.testing.assert_close(phi.score(t, x), made.score)
    general = FunctionPotential(phi.process, phi)
    for method in ("exact", "forward"):
        other = general.score_and_residual(t, x, method)  # type: ignore[arg-type]
        torch.testing.assert_close(other.score, made.score)
        torch.testing.assert_close(
            other.residuals[0], want, rtol=1e-8, atol=1e-9 * float(want.detach().abs().max())
        )


@pytest.mark.parametrize("kind", KINDS)
def test_a_gaussian_has_no_residual(kind: str) -> None:
    process = processes()[kind]
    truth = gaussian(process)
    phi = PotentialNetwork(process, 2, 4, 1, truth.means[0], 0.2).double()  # starts as the Gaussian itself
    t, x = points(kind)
    torch.testing.assert_close(phi(t, x), truth.log_prob(t, x))
    torch.testing.assert_close(phi.score(t, x), truth.score(t, x))
    assert phi.score_and_residual(t, x).residuals.abs().max() < 1e-14


def test_a_mixture_has_no_residual_as_a_function() -> None:
    truth = mixture(processes()["ou"])
    phi = FunctionPotential(truth.process, truth.log_prob)
    t, x = points("ou")
    assert phi.score_and_residual(t, x).residuals.abs().max() < 1e-10
    shifted = FunctionPotential(truth.process, lambda t, x: truth.log_prob(t, x) + 3.0)
    assert shifted.score_and_residual(t, x).residuals.abs().max() < 1e-10
    drifting = FunctionPotential(truth.process, lambda t, x: truth.log_prob(t, x) + 2.0 * t.squeeze(-1))
    torch.testing.assert_close(
        drifting.score_and_residual(t, x).residuals[0], torch.full((7,), 2.0, dtype=F64)
    )


@pytest.mark.parametrize("function", [False, True])
def test_two_probes_square_without_bias_and_one_does_not(function: bool) -> None:
    phi: PotentialNetwork | FunctionPotential = network("ou")
    if function:
        phi = FunctionPotential(phi.process, phi)
    t, x = torch.tensor(0.3, dtype=F64), torch.tensor([[0.4, -0.2]], dtype=F64)
    exact = phi.score_and_residual(t, x).residuals[0, 0].detach()
    torch.manual_seed(0)
    n = 4000
    draws = phi.score_and_residual(t, x.expand(n, 2), "hutchinson", 2).residuals.detach()
    assert draws.shape == (2, n)
    squares = unbiased_square(draws)
    stderr = squares.std() / n**0.5
    assert (draws.mean() - exact).abs() < 5 * draws.std() / (2 * n) ** 0.5
    assert (squares.mean() - exact.square()).abs() < 5 * stderr
    assert draws[0].square().mean() - exact.square() > 5 * draws[0].square().std() / n**0.5


def test_gradients_agree_with_plain_automatic_differentiation() -> None:
    phi, (t, x) = network("reverting"), points("reverting")

    def loss(made) -> Tensor:
        return made.score.square().mean() + made.residuals.square().mean()

    at = [p for p in phi.parameters() if p.requires_grad]
    got = torch.autograd.grad(loss(phi.score_and_residual(t, x)), at)
    want = torch.autograd.grad(loss(FunctionPotential(phi.process, phi).score_and_residual(t, x)), at)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9 * float(b.abs().max()))


def test_times_may_lead_or_be_a_number() -> None:
    phi = network("vp")
    x = torch.randn(3, 5, 2, dtype=F64)
    t = torch.tensor([0.1, 0.5, 0.9], dtype=F64)[:, None, None]
    made = phi.score_and_residual(t, x)
    assert made.score.shape == (3, 5, 2)
    assert made.residuals.shape == (1, 3, 5)
    torch.testing.assert_close(phi.score_and_residual(0.5, x[1]).residuals, made.residuals[:, 1])
    torch.testing.assert_close(phi(0.5, x[1]), phi(t, x)[1])


def test_from_data_takes_moments_and_precision() -> None:
    data = torch.randn(50, 3, dtype=F64) * 2 + 1
    phi = PotentialNetwork.from_data(OU(), data)
    torch.testing.assert_close(phi.data_mean, data.mean(0))
    torch.testing.assert_close(phi.data_variance, data.var(0))
    assert next(phi.parameters()).dtype == F64


def test_bad_input() -> None:
    with pytest.raises(InvalidInputError, match="process"):
        PotentialNetwork("ou", 2)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="variance"):
        PotentialNetwork(OU(), 2, variance=0.0)
    with pytest.raises(ShapeError, match="mean"):
        PotentialNetwork(OU(), 2, mean=torch.zeros(3))
    with pytest.raises(ShapeError, match="x"):
        PotentialNetwork(OU(), 2).score(0.5, torch.zeros(4, 3))
    with pytest.raises(ShapeError, match="broadcast"):
        PotentialNetwork(OU(), 2).score(torch.zeros(3), torch.zeros(4, 2))
    with pytest.raises(ShapeError, match="one number per point"):
        FunctionPotential(OU(), lambda t, x: x)(0.5, torch.zeros(4, 2))
    with pytest.raises(InvalidInputError, match="method"):
        PotentialNetwork(OU(), 2).score_and_residual(0.5, torch.zeros(4, 2), "trapezoid")  # type: ignore[arg-type]
