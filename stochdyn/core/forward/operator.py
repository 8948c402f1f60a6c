"""The contract of forward operators: the right-hand side of the equation that densities obey."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from stochdyn.core.forward.flow import MarginalFlow

__all__ = ["ForwardOperator"]


class ForwardOperator(nn.Module, ABC):
    r"""The operator :math:`L^*` of a forward equation :math:`\partial_t\rho=L^*\rho`."""

    @abstractmethod
    def residual(self, flow: MarginalFlow, t: Tensor | float, x: Tensor, **options: Any) -> Tensor:
        """Return how far the flow is from solving the equation at ``x``, zero for a solution."""

    @abstractmethod
    def residual_probes(self, flow: MarginalFlow, t: Tensor | float, x: Tensor, **options: Any) -> Tensor:
        """Return ``(K, ...)`` independent unbiased residuals; ``K = 1`` where the residual is exact."""
