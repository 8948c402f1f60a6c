"""Divergences and Laplacians against closed forms, and the laws of their random estimates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stochdyn.core import (
    divergence,
    divergence_probes,
    gradient,
    jacobian_contraction,
    laplacian,
    sample_probes,
    unbiased_square,
    value_and_divergence,
)
from stochdyn.core.forward.divergences import attach
from stochdyn.errors import InvalidInputError, ShapeError

F64 = torch.float64
EXACT = ("exact", "forward")


def _matrix(d: int) -> Tensor:
    return torch.randn(d, d, dtype=F64)


def _cubic(a: Tensor):
    """A field with divergence ``tr A + 3 |x|^2``."""
    return lambda x: x @ a.mT + x.pow(3)


@pytest.mark.parametrize("method", EXACT)
@pytest.mark.parametrize("shape", [(3,), (5, 3), (4, 5, 3), (2, 4, 5, 1)])
def test_divergence_matches_closed_form_on_any_leading_axes(method: str, shape: tuple[int, ...]) -> None:
    a, x = _matrix(shape[-1]), torch.randn(shape, dtype=F64)
    value, div = value_and_divergence(_cubic(a), x, method)
    torch.testing.assert_close(value, _cubic(a)(x))
    torch.testing.assert_close(div, a.trace() + 3 * x.square().sum(-1))


@pytest.mark.parametrize("method", EXACT)
def test_repeated_points_may_share_memory(method: str) -> None:
    x = torch.randn(3, dtype=F64).expand(4, 3)
    torch.testing.assert_close(divergence(lambda y: y.pow(3), x, method), 3 * x.square().sum(-1))


@pytest.mark.parametrize("method", EXACT)
def test_laplacian_matches_the_hessian_of_a_network(method: str) -> None:
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.randn(6, 3, dtype=F64)
    hessians = torch.func.vmap(torch.func.hessian(lambda y: net(y).squeeze(-1)))(x)
    truth = torch.einsum("nii->n", hessians)
    torch.testing.assert_close(laplacian(lambda y: net(y).squeeze(-1), x, method), truth)


@pytest.mark.parametrize("method", EXACT)
def test_laplacian_is_differentiable_in_parameters(method: str) -> None:
    scale = torch.tensor(0.7, dtype=F64, requires_grad=True)
    x = torch.randn(5, 2, dtype=F64)
    value = laplacian(lambda y: scale * y.pow(4).sum(-1), x, method).sum()
    (slope,) = torch.autograd.grad(value, scale)
    torch.testing.assert_close(slope, 12 * x.square().sum())


def test_divergence_is_differentiable_in_the_points_through_their_own_graph() -> None:
    z = torch.randn(4, 2, dtype=F64, requires_grad=True)
    value = divergence(lambda x: x.pow(3), 2 * z).sum()
    torch.testing.assert_close(torch.autograd.grad(value, z)[0], 6 * (2 * z) * 2)


def test_gradients_off_means_no_graph_and_the_same_value() -> None:
    x, field = torch.randn(4, 2, dtype=F64), _cubic(_matrix(2))
    with torch.no_grad():
        quiet = divergence(field, x)
        slope = gradient(lambda y: y.square().sum(-1), x)
    assert not quiet.requires_grad
    assert not slope.requires_grad
    torch.testing.assert_close(quiet, divergence(field, x))


@pytest.mark.parametrize("method", [*EXACT, "hutchinson"])
def test_graph_is_kept_just_where_something_can_be_trained(method: str) -> None:
    x, scale = torch.randn(4, 2, dtype=F64), torch.tensor(2.0, dtype=F64, requires_grad=True)
    fixed = scale.detach()
    assert not laplacian(lambda y: fixed * y.pow(4).sum(-1), x, method).requires_grad
    assert not divergence(lambda y: fixed * y.pow(3), x, method).requires_grad
    assert not gradient(lambda y: fixed * y.pow(4).sum(-1), x).requires_grad
    assert laplacian(lambda y: scale * y.pow(4).sum(-1), x, method).requires_grad
    assert divergence(lambda y: scale * y.pow(3), x, method).requires_grad
    assert gradient(lambda y: scale * y.pow(4).sum(-1), x).requires_grad
    assert gradient(lambda y: fixed * y.pow(4).sum(-1), x.requires_grad_()).requires_grad


@pytest.mark.parametrize("method", [*EXACT, "hutchinson"])
def test_constant_field_has_zero_divergence(method: str) -> None:
    x = torch.randn(4, 3)
    assert torch.equal(divergence(lambda y: torch.ones(3), x, method), torch.zeros(4))


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_probes_have_zero_mean_and_unit_covariance(distribution: str) -> None:
    n = 20_000
    e = sample_probes(torch.zeros(n, 2, dtype=F64), 1, distribution)[0]  # type: ignore[arg-type]
    # false alarm under 1e-5: five standard errors of four averages
    assert float(e.mean(0).abs().max()) < 5 / n**0.5
    second = e.T @ e / n
    assert float((second - torch.eye(2)).abs().max()) < 5 * 2**0.5 / n**0.5


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_hutchinson_is_unbiased_in_value_and_in_square(distribution: str) -> None:
    d, n = 4, 40_000
    a, c = _matrix(d), 1.7
    x = torch.randn(d, dtype=F64).expand(n, d)
    y = attach(x)
    field = _cubic(a)(y)
    probes = sample_probes(x, 2, distribution, torch.Generator().manual_seed(4))  # type: ignore[arg-type]
    estimates = divergence_probes(field, y, probes, create_graph=False) + c
    truth = a.trace() + 3 * x[0].square().sum() + c
    mean, error = estimates.mean(), estimates.std() / (2 * n) ** 0.5
    assert abs(float(mean - truth)) < 5 * float(error)
    squares = unbiased_square(estimates)
    assert abs(float(squares.mean() - truth**2)) < 5 * float(squares.std() / n**0.5)
    naive = estimates[0].square()
    excess = float((naive.mean() - truth**2) / (naive.std() / n**0.5))
    assert excess > 20, "the naive square is biased by the variance, or this test could not fail"


def test_unbiased_square_uses_all_pairs() -> None:
    r = torch.randn(4, 3, dtype=F64)
    pairs = sum(r[i] * r[j] for i in range(4) for j in range(4) if i != j) / 12
    torch.testing.assert_close(unbiased_square(r), pairs)


def test_same_generator_same_probes() -> None:
    x = torch.zeros(3, 2)
    first = sample_probes(x, 2, generator=torch.Generator().manual_seed(1))
    assert torch.equal(first, sample_probes(x, 2, generator=torch.Generator().manual_seed(1)))
    assert first.dtype == x.dtype


def test_jacobian_contraction_matches_forward_mode() -> None:
    x = torch.randn(3, 2, dtype=F64)
    u = torch.randn(4, 3, 2, dtype=F64)

    def array(y: Tensor) -> Tensor:
        return y[..., :, None] * y.square()[..., None, :]

    y = attach(x)
    truth = torch.stack([torch.func.jvp(array, (x,), (v,))[1] for v in u])
    torch.testing.assert_close(jacobian_contraction(array(y), y, u), truth)
    constant = torch.ones(3, 2, 2, dtype=F64)
    assert torch.equal(jacobian_contraction(constant, y, u), torch.zeros(4, 3, 2, 2, dtype=F64))


def test_divergence_of_a_field_that_differentiates_inside_itself() -> None:
    x = torch.randn(5, 3, dtype=F64)
    field = divergence(lambda y: gradient(lambda z: z.pow(4).sum(-1), y), x)
    torch.testing.assert_close(field, 12 * x.square().sum(-1))


def test_bad_input_raises_before_any_work() -> None:
    x = torch.zeros(2, 2)
    with pytest.raises(InvalidInputError, match="method is unknown"):
        divergence(lambda y: y, x, "magic")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="distribution is unknown"):
        sample_probes(x, 1, "uniform")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="num_probes must be an integer"):
        sample_probes(x, 0)
    with pytest.raises(ShapeError, match="at least two independent estimates"):
        unbiased_square(torch.zeros(1, 3))


class _Square(torch.autograd.Function):
    """A function of the old style, without a forward derivative."""

    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, slope):  # type: ignore[no-untyped-def]
        return 2 * ctx.saved_tensors[0] * slope


@pytest.mark.parametrize(
    "field",
    [
        _Square.apply,
        lambda x: (
            torch.exp(-(torch.cdist(x, torch.ones(3, 2, dtype=x.dtype)) ** 2))
            @ torch.ones(3, 2, dtype=x.dtype)
        ),
    ],
)
def test_fields_without_forward_derivatives_are_taken_in_reverse(field: Any) -> None:
    x = torch.randn(5, 2, dtype=torch.float64)
    torch.testing.assert_close(divergence(field, x, "forward"), divergence(field, x))
