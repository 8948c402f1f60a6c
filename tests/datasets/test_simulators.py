"""Simulators with exact posteriors: the posterior is that of the simulator."""

from __future__ import annotations

import pytest
import torch

from stochdyn import errors
from stochdyn.datasets import TwoMoons


def test_two_moons_have_their_formula() -> None:
    task = TwoMoons()
    theta = torch.tensor([[0.3, -0.5]]).expand(4000, 2)
    x = task.simulate(theta, generator=0)
    noise = x - torch.tensor([-0.2, -0.8]) / 2**0.5
    radius = (noise - torch.tensor([0.25, 0.0])).norm(dim=-1)
    assert float(radius.mean()) == pytest.approx(0.1, abs=5 * 0.01 / 4000**0.5)
    assert float(radius.std()) == pytest.approx(0.01, abs=5 * 0.01 / 8000**0.5)
    assert bool((noise[:, 0] > 0.25 - 0.06).all())


@pytest.mark.parametrize("truth", [(0.3, -0.5), (0.9, 0.95)])
def test_posterior_is_that_of_the_simulator(truth: tuple[float, float]) -> None:
    """Against parameters of the prior whose simulations came near the observation."""
    task = TwoMoons()
    seen = task.simulate(torch.tensor([truth]), generator=3)[0]
    theta = task.prior(2_000_000, generator=4)
    near = (task.simulate(theta, generator=5) - seen).abs().amax(-1) < 0.01
    rough, exact = theta[near], task.posterior(seen, 4000, generator=6)
    assert len(rough) > 50
    for f in (lambda v: v[:, 0] + v[:, 1], lambda v: v[:, 1] - v[:, 0], lambda v: (v[:, 0] + v[:, 1]).abs()):
        a, b = f(rough), f(exact)
        error = float((a.var() / len(a) + b.var() / len(b)).sqrt()) + 0.005
        assert abs(float(a.mean() - b.mean())) < 4.5 * error
    assert float(exact.abs().max()) <= 1


def test_bad_input() -> None:
    task = TwoMoons()
    with pytest.raises(errors.ShapeError):
        task.simulate(torch.zeros(3))
    with pytest.raises(errors.UnavailableError, match="no posterior draws"):
        task.posterior(torch.tensor([50.0, 0.0]), 10)
