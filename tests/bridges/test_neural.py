"""Network families: gradients by hand against automatic ones, units, sums."""

from __future__ import annotations

import pytest
import torch

import stochdyn as sd
from stochdyn.bridges import (
    DriftFamily,
    LambOseen,
    LinearDrift,
    NeuralDrift,
    PotentialDrift,
    Snapshots,
    SumDrift,
)

F64 = torch.float64


def wild(family, seed=0):
    family.reset(torch.Generator().manual_seed(seed))
    return family


def snapshots(dtype=F64):
    g = torch.Generator().manual_seed(0)
    clouds = [
        torch.randn(50, 3, dtype=dtype, generator=g) * torch.tensor([1.0, 5.0, 0.1], dtype=dtype) + 2
        for _ in range(3)
    ]
    return Snapshots([1.0, 2.0, 5.0], clouds)


@pytest.mark.parametrize("time", [False, True])
def test_the_drift_is_minus_the_gradient_of_the_potential(time):
    family = wild(PotentialDrift.for_snapshots(snapshots(), width=8, time=time))
    x = (2 + torch.randn(7, 3, dtype=F64)).requires_grad_()
    t = torch.linspace(1, 5, 7, dtype=F64)[:, None]
    gradient = torch.autograd.grad(family.potential(t, x).sum(), x)[0]
    drift = family(t, x)
    assert drift.abs().max() > 0.05
    assert torch.allclose(drift, -gradient, atol=1e-10)


def test_the_jacobian_of_a_gradient_is_symmetric():
    family = wild(PotentialDrift.for_snapshots(snapshots(), width=8))
    _, jacobian = family.linearise(torch.zeros((), dtype=F64), 2 + torch.randn(5, 3, dtype=F64))
    assert torch.allclose(jacobian, jacobian.mT, atol=1e-9)
    assert jacobian.abs().max() > 0.01


@pytest.mark.parametrize("time", [False, True])
def test_the_jacobian_of_a_network_is_that_of_its_derivatives(time):
    family = wild(NeuralDrift.for_snapshots(snapshots(), width=8, time=time))
    with torch.no_grad():
        family.linear.weight.normal_(generator=torch.Generator().manual_seed(1))
    t, x = torch.linspace(1, 5, 12, dtype=F64).reshape(3, 4, 1), 2 + torch.randn(3, 4, 3, dtype=F64)
    for own, other in zip(family.linearise(t, x), DriftFamily.linearise(family, t, x), strict=True):
        assert own.abs().max() > 0.1
        assert torch.allclose(own, other, atol=1e-12)


@pytest.mark.parametrize("kind", [NeuralDrift, PotentialDrift])
def test_both_start_at_rest_and_reset_moves_them(kind):
    family = kind(2, width=8)
    x = torch.randn(4, 2)
    assert family(torch.zeros(()), x).abs().max() == 0
    assert wild(family)(torch.zeros(()), x).abs().max() > 0


@pytest.mark.parametrize("kind", [NeuralDrift, PotentialDrift])
def test_units_of_the_snapshots(kind):
    # the same weights on data in other units give the same drift in those units
    snaps = snapshots()
    changed = Snapshots(3 * snaps.times, [10 * x - 4 for x in snaps.samples])
    one, other = wild(kind.for_snapshots(snaps, width=8)), wild(kind.for_snapshots(changed, width=8))
    x = 2 + torch.randn(5, 3, dtype=F64)
    now = torch.zeros((), dtype=F64)
    assert torch.allclose(other(now, 10 * x - 4), one(now, x) * 10 / 3, atol=1e-10)


def test_a_network_of_time():
    family = wild(NeuralDrift.for_snapshots(snapshots(), width=8, time=True))
    x = torch.randn(4, 3, dtype=F64)
    early, late = (family(torch.tensor(t, dtype=F64), x) for t in (1.0, 4.0))
    assert (early - late).abs().max() > 1e-3


def test_a_sum_of_families():
    linear, net = LinearDrift(2), wild(NeuralDrift(2, width=8))
    with torch.no_grad():
        linear.weight.copy_(torch.randn(2, 3))
    both = SumDrift([linear, net])
    x, now = torch.randn(4, 2), torch.zeros(())
    assert torch.allclose(both(now, x), linear(now, x) + net(now, x))
    slope = both.linearise(now, x)[1]
    assert torch.allclose(slope, linear.linearise(now, x)[1] + net.linearise(now, x)[1])
    assert both.affine() is None
    assert SumDrift([linear, linear]).affine()[0].shape == (2, 2)
    assert both.log_prior() is None
    assert "0.matrix" in both.named_values()


def test_bad_input():
    with pytest.raises(sd.errors.ShapeError, match="dimension"):
        SumDrift([LinearDrift(3), LambOseen()])
    with pytest.raises(sd.errors.EmptyDataError):
        SumDrift([])
    with pytest.raises(sd.errors.InvalidInputError, match="width"):
        NeuralDrift(2, width=0)
    with pytest.raises(sd.errors.InvalidInputError, match="scale"):
        PotentialDrift(2, scale=0.0)
    with pytest.raises(sd.errors.ShapeError, match="centre"):
        PotentialDrift(2, centre=torch.zeros(3))


@pytest.mark.parametrize("kind", [NeuralDrift, PotentialDrift])
def test_a_drift_at_rest_takes_the_units_of_what_it_is_used_with(kind):
    snaps = snapshots()
    given = kind.for_snapshots(snaps, 8)
    used = sd.bridges.SchrodingerBridge(snaps, kind(3, 8), 1.0).family
    torch.testing.assert_close(used.centre, given.centre)
    torch.testing.assert_close(used.scale, given.scale)
    assert (used.horizon, used.start_time) == (given.horizon, given.start_time)


@pytest.mark.parametrize("kind", [NeuralDrift, PotentialDrift])
def test_units_are_given_stored_or_kept(kind):
    given = wild(kind.for_snapshots(snapshots(), 8, time=True))
    loaded = kind(3, 8, time=True).double()
    loaded.load_state_dict(given.state_dict())
    t, x = torch.tensor(1.7, dtype=F64), snapshots().samples[1][:4]
    torch.testing.assert_close(loaded(t, x), given(t, x), rtol=0, atol=0)
    trained = wild(kind(3, 8).double())
    used = sd.bridges.SchrodingerBridge(snapshots(), trained, 1.0).family
    torch.testing.assert_close(used(t, x), trained(t, x), rtol=0, atol=0)
