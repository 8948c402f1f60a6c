"""The evidence bound of a reverse SDE as an objective: likelihood training without simulation."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from stochdyn._checks import check_positive_int
from stochdyn.errors import InvalidInputError
from stochdyn.interpolants.densities.evidence import evidence_bound
from stochdyn.interpolants.fields.potential import Potential
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = ["DiffusionEvidence"]


class DiffusionEvidence(Objective):
    r"""Minus the mean of :func:`evidence_bound` over data, a bound on the log evidence of the reverse SDE.

    .. math::
        \ell=-E_{x}\Big[\Phi(t_0,x)+E\Big[\int_{t_0}^TR\,dt+\log\frac{\pi(X_T)}{e^{\Phi(T,X_T)}}\,\Big|\,X_{t_0}=x\Big]\Big]

    A constant in the potential drops out, so nothing has to be normalised. Data should be noised to the start time
    of the process first if they lie on a surface.

    Args:
        potential: The log density, up to a constant.
        prior: The law at the horizon, with event ``(d,)``; such as ``diff.generator().prior``.
        num_draws: The number of draws of time and point per datum and step.

    Raises:
        InvalidInputError: If ``potential`` isn't a :class:`Potential`, or ``num_draws`` isn't at least 2.

    Example:
        >>> import torch
        >>> from stochdyn.interpolants import PotentialNetwork
        >>> from stochdyn.interpolants import OU
        >>> phi = PotentialNetwork(OU(), 1)
        >>> DiffusionEvidence(phi, OU().prior(torch.zeros(1)))(torch.randn(8, 1)).bound
        'evidence_lower'
    """

    def __init__(self, potential: Potential, prior: Any, num_draws: int = 2) -> None:
        super().__init__()
        if not isinstance(potential, Potential):
            raise InvalidInputError(
                "potential must be a Potential",
                got=type(potential).__name__,
                hint="wrap it in FunctionPotential",
            )
        check_positive_int(num_draws, "num_draws", 2)
        self.potential, self.prior, self.num_draws = potential, prior, num_draws

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate on data ``batch (n, d)``.

        Raises:
            InvalidInputError: If the batch isn't a tensor of the right shape.
        """
        if not isinstance(batch, Tensor):
            raise InvalidInputError(
                "a batch is a tensor of data", got=type(batch).__name__, expected="(n, d)"
            )
        bound = evidence_bound(self.potential, batch, self.prior, num_draws=self.num_draws).value.mean()
        return ObjectiveValue(-bound, {"elbo": bound.detach()}, "evidence_lower")
