"""Engines: the dense density and its slopes, and what is too large for it."""

from __future__ import annotations

import pytest
import torch

from stochdyn.errors import InvalidInputError
from stochdyn.testing import check_gradients
from stochdyn.vectorfields import RVGP, PointCloud
from stochdyn.vectorfields.regression.engines import _GaussianLogDensity
from tests.vectorfields.shapes import fibonacci_sphere


def test_dense_density_and_its_slopes() -> None:
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(6, 6, generator=generator, dtype=torch.float64).requires_grad_()
    y = torch.randn(6, 3, generator=generator, dtype=torch.float64).requires_grad_()

    def density(root: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return _GaussianLogDensity.apply(root @ root.mT + torch.eye(6).double(), y)

    law = torch.distributions.MultivariateNormal(
        torch.zeros(6).double(), root @ root.mT + torch.eye(6).double()
    )
    torch.testing.assert_close(density(root, y), law.log_prob(y.mT).sum())
    check_gradients(density, root.detach(), y.detach())


def test_too_many_rows_for_a_dense_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stochdyn.vectorfields.regression.engines.MAX_DENSE_ROWS", 100)
    cloud = PointCloud(fibonacci_sphere(60), 8, dim=2)
    with pytest.raises(InvalidInputError, match=r"120 components.*at most 100.*kernel with features"):
        RVGP(cloud, "ambient").fit(range(60), torch.zeros(60, 3), optimize=False)
