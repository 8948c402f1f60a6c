"""Jets of tanh networks against nested automatic differentiation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from stochdyn.core import MLP, Jet, network_jet
from stochdyn.errors import ShapeError
from stochdyn.testing import check_gradients

F64 = torch.float64


def network(depth: int) -> tuple[MLP, nn.Sequential]:
    """A network, and the same out of torch's layers."""
    torch.manual_seed(depth)
    fused = MLP((3, *[8] * depth, 1)).double()
    plain: list[nn.Module] = []
    for layer in fused.layers:
        plain += [layer, nn.Tanh()]
    return fused, nn.Sequential(*plain[:-1])


def by_autograd(plain: nn.Sequential, u: Tensor, directions: Tensor) -> Jet:
    def f(point: Tensor) -> Tensor:
        return plain(point).squeeze(-1)

    slope = torch.func.vmap(torch.func.grad(f))(u)
    hessian = torch.func.vmap(torch.func.hessian(f))(u)
    curvature = torch.einsum("kni,nij,knj->kn", directions.expand(-1, u.shape[0], -1), hessian, directions)
    return Jet(f(u), slope, curvature)


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("shared", [False, True])
def test_values_gradients_and_curvatures(depth: int, shared: bool) -> None:
    fused, plain = network(depth)
    u = torch.randn(5, 3, dtype=F64)
    e = torch.randn(4, 1 if shared else 5, 3, dtype=F64)
    want = by_autograd(plain, u, e.expand(4, 5, 3))
    each, summed = network_jet(fused, u, e, each=True), network_jet(fused, u, e)
    for got in (each, summed, network_jet(fused, u)):
        torch.testing.assert_close(got.value, want.value)
        torch.testing.assert_close(got.slope, want.slope)
    torch.testing.assert_close(each.curvature, want.curvature)
    assert want.curvature is not None
    torch.testing.assert_close(summed.curvature, want.curvature.sum(0))


@pytest.mark.parametrize("each", [False, True])
def test_gradients_in_parameters_inputs_and_directions(each: bool) -> None:
    fused, plain = network(3)
    u = torch.randn(5, 3, dtype=F64, requires_grad=True)
    e = torch.randn(2, 5, 3, dtype=F64, requires_grad=True)

    def loss(jet: Jet) -> Tensor:
        assert jet.curvature is not None
        return (0.3 * jet.value + jet.slope.square().sum(-1)).sum() + jet.curvature.square().sum()

    want = by_autograd(plain, u, e)
    if not each:
        assert want.curvature is not None
        want = want._replace(curvature=want.curvature.sum(0))
    at = (*fused.parameters(), u, e)
    got = torch.autograd.grad(loss(network_jet(fused, u, e, each)), at)
    for a, b in zip(got, torch.autograd.grad(loss(want), at), strict=True):
        torch.testing.assert_close(a, b)


def test_derivatives_of_derivatives_with_frozen_weights() -> None:
    """Where no weight has a derivative, a slope that forgets what it depends on would pass for a constant."""
    fused, _ = network(2)
    fused.requires_grad_(False)
    unit = torch.eye(3, dtype=F64)[:, None]

    def laplacian(u: Tensor) -> Tensor:
        curvature = network_jet(fused, u, unit).curvature
        assert curvature is not None
        return curvature

    check_gradients(laplacian, torch.randn(2, 3, dtype=F64))
    check_gradients(lambda u: network_jet(fused, u).slope, torch.randn(2, 3, dtype=F64))
    check_gradients(
        lambda u, e: network_jet(fused, u, e, each=True).curvature,  # type: ignore[arg-type, return-value]
        torch.randn(2, 3, dtype=F64),
        torch.randn(2, 2, 3, dtype=F64),
    )


def test_bad_input() -> None:
    with pytest.raises(ShapeError, match="one output"):
        network_jet(MLP((2, 4, 2)), torch.ones(1, 2))
    with pytest.raises(ShapeError, match="wrong size"):
        network_jet(MLP((2, 4, 1)), torch.ones(1, 3))
    with pytest.raises(ShapeError, match="directions"):
        network_jet(MLP((2, 4, 1)), torch.ones(1, 2), torch.ones(2))
