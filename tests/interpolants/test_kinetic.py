"""Kinetic-optimal schedules: limits in closed form, and less energy than every other schedule tried."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stochdyn.errors import EmptyDataError, InvalidInputError, NonFiniteError, ShapeError
from stochdyn.interpolants import KineticOptimal, explained_share

F64 = torch.float64
ANGLES = torch.linspace(0, math.pi / 2, 129, dtype=F64)


def two_points() -> Tensor:
    """Share explained for points at +1 and -1: E tanh(s (s + z))^2 by quadrature."""
    z = torch.linspace(-8, 8, 4001, dtype=F64)
    weight = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    s = ANGLES[:-1].tan()[:, None]
    share = torch.trapezoid(weight * torch.tanh(s * (s + z)).square(), z)
    return torch.cat([share, share.new_ones(1)])


def energy(alpha: Tensor, beta: Tensor, t: Tensor, share: Tensor) -> float:
    """Kinetic energy a dimension of any schedule, from its definition."""
    da, db = (torch.gradient(v, spacing=(t,))[0] for v in (alpha, beta))
    rate = db - beta * da / alpha.clamp(min=1e-9)
    return float(torch.trapezoid(db**2 + da**2 - rate**2 * (1 - share), t))


def test_explained_data_go_straight() -> None:
    path = KineticOptimal(ANGLES, torch.ones(129, dtype=F64))
    t = torch.linspace(0, 1, 21, dtype=F64)
    torch.testing.assert_close(path.alpha(t), 1 - t, rtol=0, atol=1e-4)
    torch.testing.assert_close(path.beta(t), t, rtol=0, atol=1e-4)
    torch.testing.assert_close(path.alpha_dot(t), -torch.ones(21, dtype=F64), rtol=0, atol=1e-3)
    assert path.energy() == pytest.approx(1.0 + 1.0, abs=1e-3) or path.energy() == pytest.approx(
        2.0, abs=1e-3
    )
    it = path.interpolant()
    assert it.kind == "one-sided"
    torch.testing.assert_close(
        it.sample(0.3, torch.ones(1, 1, dtype=F64), torch.zeros(1, 1, dtype=F64)).item(),
        0.7,
        atol=1e-4,
        rtol=0,
    )


def test_gaussian_data_cost_nothing() -> None:
    """A standard normal explains s^2 / (1 + s^2), the least there is: a rotation carries it for free."""
    path = KineticOptimal(ANGLES, ANGLES.sin().square())
    assert path.energy() < 1e-4
    t = torch.linspace(0, 1, 11, dtype=F64)
    torch.testing.assert_close(
        path.alpha(t) ** 2 + path.beta(t) ** 2, torch.ones(11, dtype=F64), rtol=0, atol=1e-4
    )


def test_two_points_take_less_energy_than_other_schedules() -> None:
    path = KineticOptimal(ANGLES, two_points())
    t = torch.linspace(1e-3, 1 - 1e-3, 4001, dtype=F64)

    def share(alpha: Tensor, beta: Tensor) -> Tensor:
        angle = torch.atan2(beta, alpha)
        i = torch.searchsorted(ANGLES, angle).clamp(1, 128)
        w = (angle - ANGLES[i - 1]) / (ANGLES[i] - ANGLES[i - 1])
        table = two_points()
        return table[i - 1] + w * (table[i] - table[i - 1])

    ours = energy(path.alpha(t), path.beta(t), t, share(path.alpha(t), path.beta(t)))
    assert path.energy() == pytest.approx(ours, rel=0.02)
    others = {
        "straight": (1 - t, t),
        "rotation": ((0.5 * math.pi * t).cos(), (0.5 * math.pi * t).sin()),
        "late": ((1 - t**2), t**2),
    }
    for alpha, beta in others.values():
        assert ours < energy(alpha, beta, t, share(alpha, beta)) - 1e-3


def test_shares_from_data() -> None:
    g = torch.Generator().manual_seed(0)
    signs = torch.where(torch.rand(1500, 1, generator=g, dtype=F64) < 0.5, -1.0, 1.0).double()
    ratios = torch.tensor([0.0, 0.5, 1.0, 3.0], dtype=F64)
    got = explained_share(signs, ratios, num_noises=2000, generator=g)
    z = torch.linspace(-8, 8, 4001, dtype=F64)
    weight = torch.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    s = ratios[:, None]
    want = torch.trapezoid(weight * torch.tanh(s * (s + z)).square(), z)
    torch.testing.assert_close(got, want, rtol=0, atol=5 / 2000**0.5)
    path = KineticOptimal.from_data(signs[:500], 9, g)
    assert path.beta(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0.0, 1.0], abs=1e-6)


def test_derivatives_are_those_of_the_values() -> None:
    path = KineticOptimal(ANGLES, two_points())
    t, h = torch.linspace(0.1, 0.9, 9, dtype=F64), 1e-2
    for value, slope in ((path.alpha, path.alpha_dot), (path.beta, path.beta_dot)):
        torch.testing.assert_close((value(t + h) - value(t - h)) / (2 * h), slope(t), rtol=0.02, atol=0.01)


def test_bad_input() -> None:
    with pytest.raises(ShapeError):
        KineticOptimal(ANGLES, torch.ones(3, dtype=F64))
    with pytest.raises(InvalidInputError, match="angles"):
        KineticOptimal(ANGLES.flip(0), torch.ones(129, dtype=F64))
    with pytest.raises(InvalidInputError, match="angles"):
        KineticOptimal(ANGLES / 2, torch.ones(129, dtype=F64))
    with pytest.raises(InvalidInputError, match="shares"):
        KineticOptimal(ANGLES, 2 * torch.ones(129, dtype=F64))
    ratios = torch.tensor([1.0])
    with pytest.raises(EmptyDataError):
        explained_share(torch.zeros(0, 1), ratios)
    with pytest.raises(NonFiniteError):
        explained_share(torch.full((4, 1), float("nan")), ratios)
    with pytest.raises(InvalidInputError, match="ratios"):
        explained_share(torch.randn(4, 1), -ratios)
