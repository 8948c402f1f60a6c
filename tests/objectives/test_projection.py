"""Projection on a drift family: it recovers linear equations, and its objective is the path divergence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stochdyn.core import SDE, Brownian, Diagonal, DiffusionMeasure, PathSample
from stochdyn.errors import InvalidInputError, NonFiniteError, ShapeError
from stochdyn.objectives import Objective, PathProjection, project_linear_drift
from stochdyn.testing import ObjectiveSuite

F64 = torch.float64
TRUTH = torch.tensor([[-1.0, 0.5, 0.3], [-0.4, -0.8, -0.2]], dtype=F64)


def affine(t: Tensor, x: Tensor) -> Tensor:
    """Features of an affine drift in two dimensions: ``phi[..., i, 3 i + j] = (x, 1)_j``."""
    ext = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    zero = torch.zeros_like(ext)
    return torch.stack([torch.cat([ext, zero], -1), torch.cat([zero, ext], -1)], -2)


def zero(t: Tensor, x: Tensor) -> Tensor:
    return torch.zeros_like(x)


def drift(t: Tensor, x: Tensor) -> Tensor:
    return x @ TRUTH[:, :2].T + TRUTH[:, 2]


DIFFUSIONS = {
    "scalar": 0.6,
    "diagonal": torch.tensor([0.3, 0.9], dtype=F64),
    "matrix": torch.tensor([[0.5, 0.1], [-0.3, 0.8]], dtype=F64),
    "wide": torch.tensor([[0.5, 0.1, 0.2], [-0.3, 0.8, 0.1]], dtype=F64),
    "state": lambda t, x: Diagonal(0.3 + 0.1 * x.square()),
}


def paths(
    diffusion: Any, n: int = 40, steps: int = 50, horizon: float = 2.0, field: Any = drift
) -> PathSample:
    law = DiffusionMeasure(torch.ones(2, dtype=F64), SDE(field, diffusion))
    ts = torch.linspace(0, horizon, steps + 1, dtype=F64)
    return law.sample(ts, (n,), torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_noise_free_projection_recovers_the_equation_exactly(kind: str) -> None:
    fit = project_linear_drift(paths(DIFFUSIONS[kind]), affine, SDE(zero, DIFFUSIONS[kind]))
    torch.testing.assert_close(fit.parameters, TRUTH.flatten(), rtol=1e-8, atol=1e-8)
    assert abs(float(fit.kl)) < 1e-12


@pytest.mark.parametrize("kind", DIFFUSIONS)
def test_whole_increments_recover_the_equation_within_their_own_error(kind: str) -> None:
    path = paths(DIFFUSIONS[kind], n=200)
    fit = project_linear_drift(path, affine, SDE(zero, DIFFUSIONS[kind]), estimator="density")
    z = (fit.parameters - TRUTH.flatten()) / fit.covariance.diagonal().sqrt()
    # six normal scores: false alarm under 1e-4
    assert float(z.abs().max()) < 4.5
    assert float(z.abs().max()) > 1e-3, "increments carry noise, or this test could not fail"
    assert float(fit.covariance.diagonal().sqrt().max()) < 0.5


def test_offset_is_part_of_the_family() -> None:
    path = paths(0.6)
    fit = project_linear_drift(path, affine, SDE(drift, 0.6))
    assert float(fit.parameters.abs().max()) < 1e-8


def test_minimum_is_the_girsanov_divergence_to_the_projection() -> None:
    bent = lambda t, x: drift(t, x) + x.sin()  # noqa: E731
    path = paths(0.6, n=300, field=bent)
    fit = project_linear_drift(path, affine, SDE(zero, 0.6))
    nearest = DiffusionMeasure(
        torch.ones(2, dtype=F64), SDE(lambda t, x: (affine(t, x) @ fit.parameters[:, None])[..., 0], 0.6)
    )
    rate = path.law.log_rn(path, nearest, estimator="rate")
    torch.testing.assert_close(fit.kl, rate.mean())
    assert float(fit.kl) > 1e-3


def test_projection_is_a_minimum() -> None:
    bent = lambda t, x: drift(t, x) + x.sin()  # noqa: E731
    path = paths(DIFFUSIONS["matrix"], field=bent)
    for estimator in ("rate", "density"):
        fit = project_linear_drift(path, affine, SDE(zero, DIFFUSIONS["matrix"]), estimator=estimator)  # type: ignore[arg-type]
        theta = fit.parameters.clone().requires_grad_()
        family = SDE(lambda t, x, p=theta: (affine(t, x) @ p[:, None])[..., 0], DIFFUSIONS["matrix"])
        value = PathProjection(family, estimator=estimator)(path)  # type: ignore[arg-type]
        torch.testing.assert_close(value.loss.detach(), fit.kl)
        (slope,) = torch.autograd.grad(value.loss, theta)
        assert float(slope.abs().max()) < 1e-10


def test_noise_on_one_component_fits_that_component_alone() -> None:
    g = torch.tensor([[0.0], [0.7]], dtype=F64)

    def oscillator(t: Tensor, x: Tensor) -> Tensor:
        return torch.stack([x[..., 1], -2.0 * x[..., 0] - 0.5 * x[..., 1]], -1)

    def feature(t: Tensor, x: Tensor) -> Tensor:
        return torch.stack([torch.zeros_like(x), x], -2)

    family = SDE(lambda t, x: torch.stack([x[..., 1], 0 * x[..., 1]], -1), g)
    fit = project_linear_drift(paths(g, field=oscillator), feature, family)
    torch.testing.assert_close(fit.parameters, torch.tensor([-2.0, -0.5], dtype=F64))


def test_weights_of_zero_leave_paths_out() -> None:
    path = paths(0.6, field=lambda t, x: drift(t, x) + x.sin())
    keep = torch.arange(40) < 25
    some = PathSample(path.ts, path.x[keep], path.dw[keep])
    whole = project_linear_drift(path, affine, SDE(zero, 0.6), path_weights=keep.double())
    part = project_linear_drift(some, affine, SDE(zero, 0.6))
    torch.testing.assert_close(whole.parameters, part.parameters)
    torch.testing.assert_close(whole.kl, part.kl)


def test_prior_makes_it_bayesian_linear_regression() -> None:
    path = paths(0.6, n=2, steps=10)
    flat = project_linear_drift(path, affine, SDE(zero, 0.6), estimator="density")
    precision, mean = 3.0 * torch.eye(6, dtype=F64), torch.linspace(-1, 1, 6, dtype=F64)
    fit = project_linear_drift(
        path, affine, SDE(zero, 0.6), estimator="density", prior_precision=precision, prior_mean=mean
    )
    truth = torch.linalg.solve(flat.information + precision, flat.information @ flat.parameters + 3.0 * mean)
    torch.testing.assert_close(fit.parameters, truth)
    number = project_linear_drift(path, affine, SDE(zero, 0.6), estimator="density", prior_precision=3.0)
    torch.testing.assert_close(number.information, fit.information)


class Affine(nn.Module):
    """A drift with six parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.linspace(-0.5, 0.5, 6, dtype=F64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return (affine(t, x) @ self.theta[:, None])[..., 0]


class TestPathProjection(ObjectiveSuite):
    """The contract, from driving increments."""

    estimator: Any = "rate"

    def make(self) -> tuple[Objective, Any]:
        """Return a projection on the affine family."""
        return PathProjection(SDE(Affine(), 0.6), estimator=self.estimator), paths(0.6, n=5)


class TestPathProjectionFromIncrements(TestPathProjection):
    """The contract, from whole increments."""

    estimator = "density"


def test_objective_says_what_it_bounds() -> None:
    path = paths(0.6)
    rate = PathProjection(SDE(Affine(), 0.6), lambda: path)()
    assert rate.bound == "kl_upper"
    torch.testing.assert_close(
        rate.loss,
        path.law.log_rn(path, DiffusionMeasure(torch.ones(2, dtype=F64), SDE(Affine(), 0.6)), "rate").mean(),
    )
    assert PathProjection(SDE(Affine(), 0.6), estimator="density")(path).bound == "surrogate"


def test_both_estimators_have_the_same_mean_gradient() -> None:
    n = 4000
    path = paths(0.6, n=n, steps=10)
    slopes = []
    for estimator in ("rate", "density"):

        def loss(theta: Tensor, x: Tensor, dw: Tensor, kind: Any = estimator) -> Tensor:
            family = SDE(lambda t, y: (affine(t, y) @ theta[:, None])[..., 0], 0.6)
            return PathProjection(family, estimator=kind)(PathSample(path.ts, x, dw)).loss

        theta = torch.linspace(-0.5, 0.5, 6, dtype=F64)
        slopes.append(torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(theta, path.x, path.dw))
    gap = slopes[0] - slopes[1]
    assert float((gap.mean(0).abs() / (gap.std(0) / n**0.5)).max()) < 5
    assert float(gap.std(0).min()) > 1e-2


class _Memory(Brownian):
    """A process that claims a memory state."""

    num_states = 1


def test_bad_input_raises() -> None:
    path, family = paths(0.6, n=3, steps=5), SDE(zero, 0.6)
    with pytest.raises(InvalidInputError, match="linearly dependent"):
        project_linear_drift(path, lambda t, x: torch.stack([x, 2 * x], -1), family)
    with pytest.raises(ShapeError, match="features don't fit"):
        project_linear_drift(path, lambda t, x: x, family)
    with pytest.raises(ShapeError, match="one weight a path"):
        project_linear_drift(path, affine, family, path_weights=torch.ones(4, dtype=F64))
    with pytest.raises(ShapeError, match="another number of channels"):
        project_linear_drift(path, affine, SDE(zero, torch.ones(2, 3, dtype=F64)))
    with pytest.raises(InvalidInputError, match="estimator is unknown"):
        project_linear_drift(path, affine, family, estimator="magic")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="noise with memory"):
        project_linear_drift(path, affine, SDE(zero, 0.6, _Memory()))
    with pytest.raises(InvalidInputError, match="there are no paths"):
        PathProjection(family)()
    broken = PathSample(path.ts, path.x.clone(), path.dw)
    broken.x[0, 1, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"path\.x"):
        project_linear_drift(broken, affine, family)
