"""The evidence bound as an objective: tight at the truth, below it elsewhere, and it trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import stochdyn as sd
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.interpolants import OU, DiffusionEvidence, PotentialNetwork, ScoreMatching
from stochdyn.objectives import Objective
from stochdyn.testing import ObjectiveSuite
from tests.interpolants.laws import F64


def model(variance: float) -> tuple[PotentialNetwork, Any]:
    """A Gaussian potential of given variance, and its own prior."""
    torch.manual_seed(0)
    process = OU(horizon=3.0, start=0.05).double()
    phi = PotentialNetwork(process, 1, 8, 1, 0.0, variance).double()
    return phi, ScoreMatching(process, phi).generator().prior


class TestEvidence(ObjectiveSuite):
    """The contract of objectives."""

    def make(self) -> tuple[Objective, Any]:
        """Return the bound of a small network on a few data."""
        torch.manual_seed(0)
        process = OU(horizon=3.0, start=0.05).double()
        phi = PotentialNetwork(process, 1, 8, 2, zero_last=False).double()
        return DiffusionEvidence(phi, process.prior(torch.zeros(1, dtype=F64))), torch.randn(16, 1, dtype=F64)


def test_it_is_the_likelihood_at_a_solution() -> None:
    phi, prior = model(0.3)
    x = torch.randn(50, 1, dtype=F64)
    value = DiffusionEvidence(phi, prior)(x)
    torch.testing.assert_close(value.terms["elbo"], phi(phi.process.start, x).mean())


def test_training_raises_the_bound_towards_the_entropy() -> None:
    """Data of another variance than the potential's Gaussian: their entropy is what the bound can reach."""
    phi, prior = model(1.0)
    std = 0.5
    torch.manual_seed(1)
    data = std * torch.randn(4000, 1, dtype=F64)
    entropy = 0.5 * (1 + torch.tensor(2 * torch.pi * std**2).log())
    objective = DiffusionEvidence(phi, prior, num_draws=4)
    with torch.no_grad():
        before = objective(data).terms["elbo"]
    sd.fit(objective, data, steps=150, batch_size=128, lr=2e-2, progress=False)
    with torch.no_grad():
        after = torch.stack([objective(data).terms["elbo"] for _ in range(8)])
    assert before < -entropy - 0.15
    # Sampling error of the data's own entropy: the log density has standard deviation 1 / sqrt(2).
    assert after.mean() < -entropy + 5 * (0.5**0.5) / 4000**0.5 + 5 * after.std()
    assert after.mean() > before + 0.7 * (-entropy - before)


def test_bad_input() -> None:
    phi, prior = model(1.0)
    with pytest.raises(InvalidInputError, match="Potential"):
        DiffusionEvidence(lambda t, x: x, prior)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="num_draws"):
        DiffusionEvidence(phi, prior, 1)
    with pytest.raises(InvalidInputError, match="batch"):
        DiffusionEvidence(phi, prior)(None)
    with pytest.raises(ShapeError):
        DiffusionEvidence(phi, prior)(torch.zeros(3, dtype=F64))
