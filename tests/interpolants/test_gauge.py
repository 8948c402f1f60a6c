"""Conservativity, gauge freedom and intrinsic dimension on fields whose answers are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stochdyn.errors import EmptyDataError, InvalidInputError, ShapeError
from stochdyn.interpolants import (
    OU,
    NoisedMixture,
    PotentialNetwork,
    ReverseDiffusion,
    conservativity,
    gauge_residual,
    intrinsic_dimension,
)
from tests.interpolants.laws import F64, mixture, processes

SWIRL = torch.tensor([[0.0, 1.0, -0.5], [-1.0, 0.0, 2.0], [0.5, -2.0, 0.0]], dtype=F64)
STRETCH = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=F64))


def test_antisymmetric_part_of_a_linear_field() -> None:
    x = torch.zeros(4000, 3, dtype=F64)
    g = torch.Generator().manual_seed(0)
    made = conservativity(lambda t, x: x @ (SWIRL + STRETCH).T, 0.0, x, num_probes=4, generator=g)
    antisymmetric, full = SWIRL.square().sum(), (SWIRL + STRETCH).square().sum()
    assert (made.antisymmetric.mean - antisymmetric).abs() < 5 * made.antisymmetric.stderr
    assert made.share.item() == pytest.approx((antisymmetric / full).item(), rel=0.1)


def test_gradients_are_conservative() -> None:
    truth = mixture(processes()["ou"], 3)
    made = conservativity(truth.score, 0.5, torch.randn(20, 3, dtype=F64))
    assert made.antisymmetric.mean < 1e-25


def test_a_rotation_is_a_gauge_of_the_normal_law_and_a_stretch_is_not() -> None:
    x = torch.randn(50, 3, dtype=F64)

    def normal(t: Tensor, x: Tensor) -> Tensor:
        return -x

    assert gauge_residual(lambda t, x: x @ SWIRL.T - x, normal, 0.0, x).abs().max() < 1e-12
    # r = Sx: div r + r.s = tr S - x.Sx
    want = STRETCH.trace() - torch.einsum("ni,ij,nj->n", x, STRETCH, x)
    got = gauge_residual(lambda t, x: x @ STRETCH.T - x, normal, 0.0, x)
    torch.testing.assert_close(got, want)


def test_a_gauge_leaves_the_law_of_the_ode_alone() -> None:
    """Stationary OU: a rotation added to the score turns the points of the ODE and keeps their density."""
    process = OU(horizon=2.0, start=1e-3).double()

    def turning(t: Tensor, x: Tensor) -> Tensor:
        return -2 * x + 3 * x @ SWIRL.T

    rev = ReverseDiffusion(process, turning, 3, torch.empty(0, dtype=F64))
    x = torch.randn(5, 3, dtype=F64)
    prior = process.prior(torch.zeros(3, dtype=F64))
    # Without the rotation nothing would move at all: half of the score cancels the drift.
    torch.testing.assert_close(rev.log_prob(x, num_steps=300), prior.log_prob(x), rtol=0, atol=1e-4)


@pytest.mark.parametrize("inside", [0, 1, 3])
def test_dimension_of_a_flat_cloud(inside: int) -> None:
    process = processes()["ou"]
    spread = torch.tensor([1.0] * inside + [0.0] * (5 - inside), dtype=F64)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=F64, generator=torch.Generator().manual_seed(1))).Q
    covariance = (turn * spread) @ turn.T
    truth = NoisedMixture(process, torch.ones(1, dtype=F64), torch.zeros(1, 5, dtype=F64), covariance[None])
    t = torch.tensor(0.005, dtype=F64)
    x = truth.sample(t, 8, torch.Generator().manual_seed(0))
    assert intrinsic_dimension(truth.score, t, x, process.std(t).item()).tolist() == [inside] * 8


def test_a_learned_potential_is_conservative_and_has_a_dimension() -> None:
    torch.manual_seed(0)
    phi = PotentialNetwork(processes()["ou"], 3, 8, 2, zero_last=False).double()
    x = torch.randn(6, 3, dtype=F64)
    assert conservativity(phi.score, 0.3, x).antisymmetric.mean < 1e-25
    assert intrinsic_dimension(phi.score, 0.3, x, 0.01).tolist() == [3] * 6
    assert torch.isfinite(gauge_residual(phi.score, lambda t, x: -x, 0.3, x)).all()


def test_bad_input() -> None:
    with pytest.raises(ShapeError):
        conservativity(lambda t, x: x, 0.0, torch.zeros(3))
    with pytest.raises(EmptyDataError):
        intrinsic_dimension(lambda t, x: x, 0.0, torch.zeros(0, 3), 0.1)
    with pytest.raises(InvalidInputError, match="std"):
        intrinsic_dimension(lambda t, x: x, 0.0, torch.zeros(2, 3), 0.0)
    with pytest.raises(InvalidInputError, match="num_probes"):
        conservativity(lambda t, x: x, 0.0, torch.zeros(2, 3), num_probes=0)
