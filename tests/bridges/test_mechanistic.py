"""Mechanistic families: formulas, Jacobians, limits and bad input."""

from __future__ import annotations

import math

import pytest
import torch

import stochdyn as sd
from stochdyn.bridges import ComponentFeatures, EllipticVortex, FeatureDrift, LambOseen, Repressilator

NOW = torch.zeros(())


def points(n, d, seed=0):
    return torch.rand(n, d, generator=torch.Generator().manual_seed(seed)) + 0.3


def assert_jacobian(family, x):
    value, jacobian = family.linearise(NOW, x)
    assert torch.allclose(value, family(NOW, x), atol=1e-6)
    for i in range(x.shape[0]):
        exact = torch.autograd.functional.jacobian(lambda z: family(NOW, z[None])[0], x[i])
        assert torch.allclose(jacobian[i], exact, atol=1e-5)


def test_the_repressilator_and_its_jacobian():
    family = Repressilator(beta=10.0, n=3.0, k=1.5, gamma=0.8)
    x = points(6, 3)
    before = torch.stack((x[:, 2], x[:, 0], x[:, 1]), -1)
    assert torch.allclose(family(NOW, x), 10 / (1 + (before / 1.5) ** 3) - 0.8 * x, atol=1e-5)
    assert_jacobian(family, x)


def test_the_repressilator_below_zero_represses_as_zero():
    family = Repressilator(beta=10.0, n=3.0)
    x = torch.tensor([[-0.5, 0.2, -1.0]])
    assert abs(family(NOW, x)[0, 0].item() - (10 + 0.5)) < 1e-4
    value, jacobian = family.linearise(NOW, x)
    assert jacobian[0, 0, 2] == 0
    assert torch.isfinite(value).all()
    family(NOW, x).sum().backward()
    assert torch.isfinite(family.log_theta.grad).all()


def test_the_lamb_oseen_vortex_turns_as_a_solid_inside_and_as_a_point_vortex_outside():
    vortex = LambOseen(current=False, core=0.2)
    with torch.no_grad():
        vortex.circulation.fill_(3.0)
        vortex.centres.copy_(torch.tensor([[1.0, -1.0]]))
    near = torch.tensor([[1.001, -1.0], [1.0, -1.0]])
    speed = vortex(NOW, near)
    assert abs(speed[0, 1].item() - 3.0 / (2 * math.pi * 0.04) * 0.001) < 1e-5
    assert torch.equal(speed[1], torch.zeros(2))
    far = torch.tensor([[1.0, 4.0]])
    assert torch.allclose(vortex(NOW, far), torch.tensor([[-3.0 / (2 * math.pi * 5), 0.0]]), atol=1e-6)
    assert_jacobian(vortex, torch.tensor([[1.3, -0.8], [0.9, -1.1]]))
    vortex(NOW, near).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in vortex.parameters())


def test_vortices_are_without_divergence():
    twin = LambOseen(2)
    twin.reset(torch.Generator().manual_seed(0))
    _, jacobian = twin.linearise(NOW, points(10, 2))
    assert jacobian.diagonal(dim1=-2, dim2=-1).sum(-1).abs().max() < 1e-5
    assert jacobian.abs().max() > 0.1


def test_the_elliptic_vortex_is_affine_and_still_at_its_centre():
    vortex = EllipticVortex()
    with torch.no_grad():
        vortex.theta.copy_(torch.tensor([2.0, 0.5, 1.5, -0.3]))
    x = points(5, 2)
    matrix, shift = vortex.affine()
    assert torch.allclose(vortex(NOW, x), x @ matrix.mT + shift, atol=1e-6)
    assert vortex(NOW, vortex.centre[None]).abs().max() < 1e-6


def test_features_of_the_state_alone_and_of_time():
    still = FeatureDrift(lambda x: torch.cat((x, x.square()), -1), 2)
    moving = FeatureDrift(lambda t, x: torch.cat((x, torch.cos(t) * torch.ones_like(x[..., :1])), -1), 2)
    with torch.no_grad():
        still.weight.copy_(torch.arange(8.0).reshape(2, 4))
        moving.weight.copy_(torch.arange(6.0).reshape(2, 3))
    x = points(4, 2)
    expected = torch.cat((x, x.square()), -1) @ still.weight.mT
    assert torch.allclose(still(NOW, x), expected)
    t = torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    assert torch.allclose(moving(t, x), torch.cat((x, torch.cos(t)), -1) @ moving.weight.mT)


def test_features_with_values_in_the_state_space_share_parameters():
    turn = ComponentFeatures(lambda x: torch.stack((x[..., 1], -x[..., 0]), -1)[..., None], 2, ["speed"])
    with torch.no_grad():
        turn.theta.fill_(2.0)
    assert torch.equal(turn(NOW, torch.tensor([[1.0, 3.0]])), torch.tensor([[6.0, -2.0]]))
    assert turn.named_values()["speed"] == 2


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: FeatureDrift(lambda x: x.sum(), 2), sd.errors.ShapeError, "phi"),
        (lambda: FeatureDrift(3.0, 2), sd.errors.InvalidInputError, "function"),
        (lambda: ComponentFeatures(lambda x: x, 2), sd.errors.ShapeError, "phi"),
        (lambda: ComponentFeatures(lambda x: x[..., None], 2, ["a", "b"]), sd.errors.ShapeError, "name"),
        (lambda: Repressilator(beta=-1.0), sd.errors.InvalidInputError, "beta"),
        (lambda: Repressilator(dim=1), sd.errors.InvalidInputError, "dim"),
        (lambda: Repressilator()(NOW, torch.ones(2, 2)), sd.errors.ShapeError, "genes"),
        (lambda: LambOseen(2, torch.zeros(1, 2)), sd.errors.ShapeError, "centres"),
        (lambda: LambOseen(0), sd.errors.InvalidInputError, "num_vortices"),
        (lambda: LambOseen()(NOW, torch.ones(2, 3)), sd.errors.ShapeError, "plane"),
        (lambda: EllipticVortex()(NOW, torch.ones(2, 3)), sd.errors.ShapeError, "plane"),
    ],
)
def test_bad_input(build, error, words):
    with pytest.raises(error, match=words):
        build()
