"""What every diffusion coefficient must satisfy."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.errors import SingularDiffusionError

__all__ = ["CoefficientSuite"]


class CoefficientSuite(ABC):
    """Tests of a :class:`stochdyn.core.Coefficient`; subclasses implement :meth:`make`.

    Attributes:
        dim: The number ``d`` of components of the state.
        batch: The batch axes of the states used.
    """

    dim: int = 3
    batch: tuple[int, ...] = (4,)

    @abstractmethod
    def make(self) -> Coefficient:
        """Return a coefficient in float64 that fits states ``(*batch, dim)``."""

    def _states(self, last: int, *lead: int) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.randn(*lead, *self.batch, last, dtype=torch.float64, generator=generator)

    def test_value_is_admissible(self) -> None:
        """The check of the class accepts it, and it fits its dimension."""
        self.make().check()
        self.make().check_dim(self.dim)

    def test_noise_dim_is_the_number_of_columns(self) -> None:
        """``noise_dim`` and ``matrix`` agree."""
        g = self.make()
        assert g.matrix(self.dim).shape[-2:] == (self.dim, g.noise_dim(self.dim))

    def test_apply_is_multiplication_by_the_matrix(self) -> None:
        """``apply`` equals the dense product, with and without time leading."""
        g = self.make()
        matrix = g.matrix(self.dim)
        for lead in ((), (5,)):
            dz = self._states(g.noise_dim(self.dim), *lead)
            torch.testing.assert_close(g.apply(dz), (matrix @ dz.unsqueeze(-1)).squeeze(-1))

    def test_solve_is_the_pseudo_inverse(self) -> None:
        """``solve`` gives the shortest least-squares solution, with and without time leading."""
        g = self.make()
        inverse = torch.linalg.pinv(g.matrix(self.dim))
        for lead in ((), (5,)):
            v = self._states(self.dim, *lead)
            torch.testing.assert_close(g.solve(v), (inverse @ v.unsqueeze(-1)).squeeze(-1))

    def test_covariance_is_the_matrix_times_its_transpose(self) -> None:
        """``covariance`` is ``G G^T``."""
        matrix = self.make().matrix(self.dim)
        torch.testing.assert_close(self.make().covariance(self.dim), matrix @ matrix.mT)

    def test_log_det_is_half_that_of_the_covariance(self) -> None:
        """``log_det`` follows the covariance, and a singular coefficient says so."""
        g = self.make()
        if g.noise_dim(self.dim) < self.dim:
            try:
                g.log_det(self.dim)
            except SingularDiffusionError:
                return
            raise AssertionError("log_det of a singular diffusion must raise SingularDiffusionError")
        truth = 0.5 * torch.linalg.slogdet(g.covariance(self.dim)).logabsdet
        torch.testing.assert_close(g.log_det(self.dim), truth)

    def test_gradients_reach_the_value(self) -> None:
        """``apply`` and ``solve`` are differentiable in the defining tensor."""
        g = self.make()
        if not g.value.is_leaf:
            return
        g.value.requires_grad_()
        out = (
            g.apply(self._states(g.noise_dim(self.dim))).square().sum()
            + g.solve(self._states(self.dim)).sum()
        )
        (slope,) = torch.autograd.grad(out, g.value)
        assert bool(torch.isfinite(slope).all())
        assert float(slope.abs().sum()) > 0
