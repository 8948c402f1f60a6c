"""The Euler density of paths is the product of its Gaussian transition densities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

import stochdyn as sd
from stochdyn.core import steps_of, time_column
from stochdyn.errors import SingularDiffusionError
from tests.core.laws import F64, ExactMemory

TS = torch.tensor([0.0, 0.1, 0.25, 0.6], dtype=F64)


def drift(t: Tensor, x: Tensor) -> Tensor:
    return torch.sin(x).flip(-1) - t


DIFFUSIONS: dict[str, Any] = {
    "number": 0.7,
    "diagonal": torch.tensor([0.5, 1.5], dtype=F64),
    "square": torch.tensor([[0.5, 0.2], [0.4, -1.0]], dtype=F64),
    "wide": torch.tensor([[0.5, 0.2, 0.3], [0.4, -1.0, 0.1]], dtype=F64),
    "of the state": lambda t, x: 1 + 0.5 * torch.sin(x + t),
    "matrix of the state": lambda t, x: torch.stack([1 + x**2, x * torch.tensor([1.0, -1.0], dtype=F64)], -1),
}


def _by_hand(law: sd.DiffusionMeasure, x: Tensor) -> Tensor:
    """Return the sum of multivariate normal log densities of one path ``(T, d)``."""
    total = law.initial.log_prob(x[0])
    for n, (t, dt) in enumerate(zip(TS[:-1], TS[1:] - TS[:-1], strict=True)):
        now = x[n : n + 1]
        g = law.sde.diffusion(t, now).matrix(2).expand(1, 2, -1)[0]
        mean = (now + law.sde.drift(t, now) * dt)[0]
        scale = torch.ones(g.shape[-1], dtype=F64)
        if law.sde.control is not None:
            u, precision = law.sde.control.at(t, now)
            if u is not None:
                mean = mean + g @ u[0] * dt
            if precision is not None:
                scale = 1 / (1 + precision[0] * dt)
        total = total + MultivariateNormal(mean, (g * scale) @ g.T * dt).log_prob(x[n + 1])
    return total


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_density_is_that_of_the_gaussian_steps(diffusion: str, random_start: bool) -> None:
    one = torch.ones(2, dtype=F64)
    initial = Independent(Normal(one, 0.5), 1) if random_start else one
    law = sd.DiffusionMeasure(initial, sd.SDE(drift, DIFFUSIONS[diffusion]))
    path = law.sample(TS, (3, 2))
    value = law.log_prob(path)
    assert value.shape == (3, 2)
    torch.testing.assert_close(value[1, 1], _by_hand(law, path.x[1, 1]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("diffusion", ["number", "diagonal", "square", "of the state", "matrix of the state"])
@pytest.mark.parametrize("parts", ["drift", "precision", "both"])
def test_density_of_a_controlled_law(diffusion: str, parts: str) -> None:
    law = sd.DiffusionMeasure(torch.ones(2, dtype=F64), sd.SDE(drift, DIFFUSIONS[diffusion])).controlled(
        None if parts == "precision" else lambda t, z: torch.cos(z + t),
        None if parts == "drift" else lambda t, z: z**2,
    )
    path = law.sample(TS, (3,))
    torch.testing.assert_close(law.log_prob(path)[0], _by_hand(law, path.x[0]), rtol=1e-11, atol=1e-11)


def test_density_integrates_to_one() -> None:
    """One step from a fixed start, summed over a fine grid of ends."""
    law = sd.DiffusionMeasure(
        torch.ones(1, dtype=F64), sd.SDE(lambda t, x: -x, lambda t, x: 0.5 + x**2)
    ).controlled(lambda t, z: z, lambda t, z: 3 * z)
    ends = torch.linspace(-8, 10, 4001, dtype=F64)
    x = torch.stack([torch.ones_like(ends), ends], -1).unsqueeze(-1)
    path = sd.PathSample(torch.tensor([0.0, 0.5], dtype=F64), x, torch.zeros(4001, 1, 1, dtype=F64))
    assert torch.trapezoid(law.log_prob(path).exp(), ends).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("sde", "message"),
    [
        (sd.SDE(drift, torch.tensor([[1.0], [0.5]], dtype=F64)), "2 x 1 matrix"),
        (sd.SDE(drift, torch.tensor([[1.0, 2.0], [0.5, 1.0]], dtype=F64)), "smallest singular value"),
        (sd.SDE(drift, 1.0, ExactMemory([0.5], [1.0])), "memory"),
    ],
)
def test_singular_laws_have_no_density(sde: sd.SDE, message: str) -> None:
    law = sd.DiffusionMeasure(torch.zeros(2, dtype=F64), sde)
    with pytest.raises(SingularDiffusionError, match=message):
        law.log_prob(law.sample(TS))


def test_density_where_states_do_not_show_all_the_noise() -> None:
    law = sd.DiffusionMeasure(torch.zeros(2, dtype=F64), sd.SDE(drift, DIFFUSIONS["wide"])).controlled(
        lambda t, z: torch.cos(z[..., :1] + torch.arange(3)), lambda t, z: z[..., :1] ** 2 + torch.arange(3)
    )
    path = law.sample(TS)
    torch.testing.assert_close(law.log_prob(path), _by_hand(law, path.x), rtol=1e-10, atol=1e-10)


def test_times_become_columns_and_steps_keep_the_grid_precision() -> None:
    like = torch.zeros(3, 5, 2)
    assert time_column(TS[:-1], like).shape == (3, 1, 1)
    assert time_column(TS[:-1], like).dtype == torch.float32
    late = TS + 1e7
    torch.testing.assert_close(
        steps_of(late, like).flatten(), (TS[1:] - TS[:-1]).float(), rtol=1e-6, atol=1e-8
    )
