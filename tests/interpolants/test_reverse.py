"""The reverse SDE and the probability-flow ODE: densities against closed forms and samples against densities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.errors import InvalidInputError, ShapeError, UnavailableError
from stochdyn.interpolants import (
    ExponentialSDE,
    FunctionPotential,
    PotentialNetwork,
    ReverseDiffusion,
    ScoreMatching,
)
from tests.interpolants.laws import F64, gaussian, mixture, processes

KINDS = ["ou", "vp", "ve", "reverting"]


def exact_model(kind: str) -> tuple[ReverseDiffusion, sd.MarginalFlow]:
    """The reversal of a Gaussian with its exact score and prior."""
    process = processes()[kind]
    truth = gaussian(process)
    phi = PotentialNetwork(process, 2, 4, 1, truth.means[0], 0.2).double()  # starts as the Gaussian itself
    return ScoreMatching(process, phi).generator(), truth


@pytest.mark.parametrize("kind", KINDS)
def test_density_of_the_ode(kind: str) -> None:
    rev, truth = exact_model(kind)
    x = truth.sample(torch.tensor(rev.process.start, dtype=F64), 6, torch.Generator().manual_seed(0))
    want = truth.log_prob(rev.process.start, x)
    torch.testing.assert_close(rev.log_prob(x, num_steps=200), want, rtol=0, atol=2e-5)
    plain = ReverseDiffusion(rev.process, truth.score, 2, x, rev.prior)
    torch.testing.assert_close(plain.log_prob(x, num_steps=200), want, rtol=0, atol=2e-5)


def test_density_of_the_ode_of_a_mixture_integrates_to_one() -> None:
    truth = mixture(processes()["ou"], 1)
    rev = ReverseDiffusion(truth.process, truth.score, 1, torch.empty(0, dtype=F64))
    reach = float(truth.means.abs().max() + 6 * (truth.eigenvalues.max() + 0.1).sqrt())
    x = torch.linspace(-reach, reach, 1001, dtype=F64)[:, None]
    mass = torch.trapezoid(rev.log_prob(x, num_steps=150).exp(), x[:, 0])
    assert abs(mass.item() - 1) < 1e-4


def test_probes_estimate_the_trace_without_bias() -> None:
    torch.manual_seed(0)
    phi = PotentialNetwork(processes()["ou"], 2, 8, 1, zero_last=False).double()
    rev = ScoreMatching(phi.process, phi).generator()
    x = torch.tensor([[0.3, -0.5]], dtype=F64)
    exact = rev.log_prob(x, num_steps=40).detach()
    draws = rev.log_prob(x.expand(2000, 2), num_steps=40, exact=False).detach()
    assert (draws.mean() - exact).abs() < 5 * draws.std() / 2000**0.5
    assert draws.std() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["ode", "sde"])
def test_samples_follow_the_truth(kind: str, method: Any) -> None:
    rev, truth = exact_model(kind)
    n = 20_000
    x = rev.sample(n, method, 100, denoise=False, generator=torch.Generator().manual_seed(1))
    t = torch.tensor(rev.process.start, dtype=F64)
    mean = rev.process.location(t, truth.means[0])
    var = float(rev.process.scale(t) ** 2 * 0.2 + rev.process.variance(t))
    assert (x.mean(0) - mean).abs().max() < 5 * (var / n) ** 0.5 + 2e-3
    assert (x.var(0) - var).abs().max() < 5 * var * (2 / n) ** 0.5 + 0.02 * var
    assert (torch.cov(x.T)[0, 1]).abs() < 5 * var / n**0.5


def test_denoising_ends_with_the_posterior_mean() -> None:
    rev, truth = exact_model("ou")
    g = [torch.Generator().manual_seed(1) for _ in range(2)]
    noisy = rev.sample(5, "ode", 20, denoise=False, generator=g[0])
    clean = rev.sample(5, "ode", 20, generator=g[1])
    t = torch.tensor(rev.process.start, dtype=F64)
    torch.testing.assert_close(clean, rev.process.denoised(t, noisy, truth.score(t, noisy)))


def test_measure_is_the_reverse_law() -> None:
    rev, truth = exact_model("ou")
    span = rev.process.horizon - rev.process.start
    P = rev.measure()
    assert isinstance(P, sd.DiffusionMeasure)
    path = P.sample(torch.linspace(0, span, 400, dtype=F64), (4000,), torch.Generator().manual_seed(0))
    t = torch.tensor(rev.process.start, dtype=F64)
    want = rev.process.scale(t) ** 2 * 0.2 + rev.process.variance(t)
    end = path.x[:, -1]
    assert (end.mean(0) - rev.process.location(t, truth.means[0])).abs().max() < 0.04
    assert (end.var(0) / want - 1).abs().max() < 0.15
    coarse = P.sample(torch.tensor([0.0, span], dtype=F64), 4000, 0).x[:, -1]
    assert (coarse.mean(0) - rev.process.location(t, truth.means[0])).abs().max() < 0.04
    assert (coarse.var(0) / want - 1).abs().max() < 0.15
    # The law that another score drives differs by a path divergence in closed form: constant shift c of the score.
    other = ReverseDiffusion(rev.process, lambda t, x: truth.score(t, x) + 0.3, 2, end, rev.prior).measure()
    grid = torch.linspace(0, span, 200, dtype=F64)
    kl = P.kl(other, grid, num_samples=64)
    assert kl.mean.item() == pytest.approx(0.5 * 2 * 0.3**2 * 1.3**2 * span, rel=1e-3)


def test_batches_bound_the_memory_only() -> None:
    rev, _ = exact_model("vp")
    whole = rev.sample(7, "ode", 10, generator=torch.Generator().manual_seed(0))
    parts = rev.sample(7, "ode", 10, generator=torch.Generator().manual_seed(0), batch_size=3)
    torch.testing.assert_close(whole, parts)


def test_density_is_differentiable() -> None:
    torch.manual_seed(0)
    phi = PotentialNetwork(processes()["ou"], 1, 6, 1, zero_last=False).double()
    rev = ScoreMatching(phi.process, phi).generator()
    x = torch.tensor([[0.4]], dtype=F64)
    weight = phi.network.layers[0].weight
    slope = torch.autograd.grad(rev.log_prob(x, num_steps=20).sum(), weight)[0][0, 0]
    with torch.no_grad():
        values = []
        for step in (1e-5, -2e-5):
            weight[0, 0] += step
            values.append(rev.log_prob(x, num_steps=20).sum())
    probed = rev.log_prob(x, num_steps=20, exact=False)  # one dimension: signs as probes are exact
    with pytest.raises(InvalidInputError, match="num_probes does nothing"):
        rev.log_prob(x, num_steps=20, num_probes=2)
    again = torch.autograd.grad(probed.sum(), weight)[0][0, 0]
    assert again.item() == pytest.approx(slope.item(), rel=1e-4)
    assert slope.item() == pytest.approx(((values[0] - values[1]) / 2e-5).item(), rel=1e-5)


def test_prior_may_be_any_distribution() -> None:
    process = processes()["ou"]
    law = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    rev = ReverseDiffusion(process, lambda t, x: -x, 2, torch.empty(0, dtype=F64), law)
    draws = [rev.sample(3, num_steps=5, generator=torch.Generator().manual_seed(4)) for _ in range(2)]
    assert torch.equal(draws[0], draws[1])


def test_bad_input() -> None:
    rev, truth = exact_model("ou")
    for call in (
        lambda: rev.sample(0),
        lambda: rev.sample(3, "heun"),  # type: ignore[arg-type]
        lambda: rev.sample(3, num_steps=0),
        lambda: rev.sample(3, spacing="cosine"),
        lambda: ExponentialSDE(order=4),
        lambda: rev.log_prob(torch.zeros(2, 2, dtype=F64), "fpe"),  # type: ignore[arg-type]
        lambda: ReverseDiffusion(rev.process, truth.score, 0),
    ):
        with pytest.raises(InvalidInputError):
            call()
    with pytest.raises(ShapeError):
        rev.log_prob(torch.zeros(2, 3, dtype=F64))
    with pytest.raises(UnavailableError, match="log density"):
        ReverseDiffusion(rev.process, truth.score, 2).log_prob(torch.zeros(2, 2), "sde")
    assert isinstance(
        FunctionPotential(rev.process, truth.log_prob)(0.5, torch.zeros(1, 2, dtype=F64)), Tensor
    )
