"""The Feynman-Kac identity, its bound and the energy identity, against a Fokker-Planck equation solved on a grid."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.linalg import solve_banded
from torch import Tensor

from stochdyn.errors import EmptyDataError, InvalidInputError, ShapeError
from stochdyn.interpolants import (
    OU,
    FunctionPotential,
    NoisedMixture,
    PotentialNetwork,
    ScoreMatching,
    energy_identity,
    evidence_bound,
    feynman_kac_log_density,
)
from tests.interpolants.laws import F64

EDGES = torch.linspace(-5, 5, 801, dtype=F64)
CENTERS = 0.5 * (EDGES[1:] + EDGES[:-1])
WIDTH = float(EDGES[1] - EDGES[0])


def crooked() -> FunctionPotential:
    """A mixture's log density with an error that changes in time, and so drives ODE and SDE apart."""
    process = OU(rate=0.7, diffusion=1.3, horizon=3.0, start=0.05).double()
    truth = NoisedMixture(
        process,
        torch.tensor([0.4, 0.6], dtype=F64),
        torch.tensor([[-1.5], [1.0]], dtype=F64),
        torch.tensor([0.1, 0.3], dtype=F64),
    )

    def error(t: Tensor, x: Tensor) -> Tensor:
        return (0.3 * torch.sin(2 * x + t) * torch.exp(-t)).squeeze(-1)

    return FunctionPotential(process, lambda t, x: truth.log_prob(t, x) + error(t, x))


def solve_on_grid(phi: FunctionPotential, steps: int = 400) -> tuple[Tensor, Tensor]:
    """Density of the reverse SDE at the start, and the energy of the score's error along the way."""
    process = phi.process
    times = process.grid(steps)
    prior = process.prior(torch.zeros(1, dtype=F64))
    p = prior.log_prob(CENTERS[:, None]).exp()
    energy = torch.zeros((), dtype=F64)

    def mismatch(t: Tensor, p: Tensor) -> Tensor:
        inner = EDGES[1:-1, None]
        slope = (p[1:] / p[:-1]).log() / WIDTH - phi.score(t, inner)[:, 0]
        weight = 0.5 * (p[1:] + p[:-1]) * WIDTH
        return 0.5 * process.squared_diffusion(t) * (weight * slope.square())[p[1:] > 1e-12].sum()

    before = mismatch(times[0], p)
    for t, s in itertools.pairwise(times):
        middle, h = 0.5 * (t + s), t - s
        d = 0.5 * process.squared_diffusion(middle)
        v = 2 * d * phi.score(middle, EDGES[1:-1, None]) - process.drift(middle, EDGES[1:-1, None])
        peclet = v[:, 0] * WIDTH / d
        b = peclet / torch.expm1(peclet)
        left, right = d / WIDTH**2 * (b + peclet), d / WIDTH**2 * b
        flow = left * p[:-1] - right * p[1:]
        rate = torch.nn.functional.pad(flow, (1, 0)) - torch.nn.functional.pad(flow, (0, 1))
        zero = torch.zeros(1, dtype=F64)
        out = -torch.cat([left, zero]) - torch.cat([zero, right])
        bands = -0.5 * h * torch.stack([torch.cat([zero, right]), out, torch.cat([left, zero])])
        bands[1] += 1
        p = torch.from_numpy(solve_banded((1, 1), bands.numpy(), (p + 0.5 * h * rate).numpy()))
        after = mismatch(s, p)
        energy, before = energy + 0.5 * h * (before + after), after
    return p, energy


@pytest.fixture(scope="module")
def solved() -> tuple[FunctionPotential, Tensor, Tensor]:
    """The crooked potential with the solution of its equation."""
    phi = crooked()
    with torch.no_grad():
        return phi, *solve_on_grid(phi)


def test_density_of_the_sde(solved: tuple[FunctionPotential, Tensor, Tensor]) -> None:
    phi, p, _ = solved
    index = torch.tensor([270, 320, 400, 480, 540])
    x, want = CENTERS[index, None], p[index].log()
    prior = phi.process.prior(x[0])
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        made = feynman_kac_log_density(phi, x, prior, num_steps=120, num_particles=4000, generator=g)
        raw = phi(phi.process.start, x)
    assert ((made.value - want).abs() < 5 * made.stderr + 2e-3).all()
    assert made.stderr.max() < 0.02
    assert (raw - want).abs().max() > 0.1  # the potential itself is far off


def test_bound_lies_below_and_near(solved: tuple[FunctionPotential, Tensor, Tensor]) -> None:
    phi, p, _ = solved
    index = torch.tensor([270, 400, 540])
    x, want = CENTERS[index, None], p[index].log()
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        bound = evidence_bound(phi, x, phi.process.prior(x[0]), num_draws=20_000, generator=g)
    assert (bound.value < want + 5 * bound.stderr).all()
    assert (bound.value > want - 0.2).all()


def test_energy_identity(solved: tuple[FunctionPotential, Tensor, Tensor]) -> None:
    phi, _, want = solved
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(0)
    prior = phi.process.prior(torch.zeros(1, dtype=F64))
    energy = energy_identity(phi, prior, num_samples=1000, num_steps=120, num_particles=24, generator=g)
    assert want > 0.02
    assert (energy.mismatch.mean - want).abs() < 5 * energy.mismatch.stderr + 0.02 * want
    total = energy.residual.mean + energy.prior.mean - energy.start.mean
    torch.testing.assert_close(energy.mismatch.mean, total)


def test_without_residual_everything_is_exact() -> None:
    process = OU(horizon=3.0, start=0.05).double()
    phi = PotentialNetwork(process, 2, 4, 1, torch.tensor([1.0, 0.0], dtype=F64), 0.3).double()
    rev = ScoreMatching(process, phi).generator()
    x = torch.randn(4, 2, dtype=F64)
    want = phi(process.start, x)
    for made in (
        feynman_kac_log_density(phi, x, rev.prior, num_steps=5, num_particles=3),
        evidence_bound(phi, x, rev.prior, num_draws=3),
    ):
        torch.testing.assert_close(made.value, want)
        assert made.stderr.max() < 1e-12
    torch.testing.assert_close(rev.log_prob(x, "sde", num_steps=5, num_particles=3), want)
    energy = energy_identity(phi, rev.prior, num_samples=3, num_steps=5, num_particles=2)
    assert all(part.mean.abs() < 1e-10 for part in energy)


def test_bound_is_differentiable_and_unbiased_in_few_draws() -> None:
    torch.manual_seed(0)
    process = OU(horizon=2.0, start=0.05).double()
    phi = PotentialNetwork(process, 1, 6, 1, zero_last=False).double()
    prior = process.prior(torch.zeros(1, dtype=F64))
    x = torch.tensor([[0.4]], dtype=F64)
    with torch.no_grad():
        many = evidence_bound(phi, x, prior, num_draws=40_000)
        few = evidence_bound(phi, x.expand(4000, 1), prior, num_draws=2).value
    assert (few.mean() - many.value).abs() < 5 * (few.std() / 4000**0.5 + many.stderr)
    slopes = torch.autograd.grad(evidence_bound(phi, x, prior).value.sum(), phi.network.layers[0].weight)
    assert torch.isfinite(slopes[0]).all()


def test_bad_input() -> None:
    phi = PotentialNetwork(OU(), 1, 4, 1)
    prior = OU().prior(torch.zeros(1))
    with pytest.raises(ShapeError):
        evidence_bound(phi, torch.zeros(3), prior)
    with pytest.raises(EmptyDataError):
        feynman_kac_log_density(phi, torch.zeros(0, 1), prior)
    with pytest.raises(InvalidInputError, match="num_particles"):
        feynman_kac_log_density(phi, torch.zeros(2, 1), prior, num_particles=1)
    with pytest.raises(InvalidInputError, match="num_draws"):
        evidence_bound(phi, torch.zeros(2, 1), prior, num_draws=1)
    with pytest.raises(InvalidInputError, match="floating"):
        evidence_bound(phi, torch.zeros(2, 1, dtype=torch.long), prior)
