"""The contract of everything that can be minimised: ``Objective`` in, ``ObjectiveValue`` out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

__all__ = ["Bound", "Objective", "ObjectiveValue"]

Bound = Literal["evidence_lower", "kl_upper", "residual", "surrogate"]


@dataclass(frozen=True)
class ObjectiveValue:
    r"""One evaluation of an objective.

    Args:
        loss: scalar tensor to differentiate and minimise. Its *gradient* is what training follows.
        terms: named scalar tensors to report; each is detached. By convention the parts of the loss,
            and for ``bound="evidence_lower"`` the value of the bound itself under ``"elbo"``.
        bound: what the number means: ``"evidence_lower"`` (minus the loss bounds the log evidence from
            below), ``"kl_upper"`` (the loss bounds a divergence from above), ``"residual"`` (zero exactly
            at a solution of an equation) or ``"surrogate"`` (a regression with the right minimiser).
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    bound: Bound = "surrogate"


class Objective(nn.Module, ABC):
    """A number to minimise over the parameters of a module.

    Subclasses implement :meth:`forward`, which takes one batch (whatever the data loader yields; ``None``
    when there is no data) and returns an :class:`ObjectiveValue`. As an ``nn.Module`` it has parameters,
    a device and a state dict, so :func:`stochdyn.fit`, DistributedDataParallel and checkpoints need
    nothing else. Randomness comes from torch's global generator, which :func:`stochdyn.fit` seeds,
    saves and restores.
    """

    @abstractmethod
    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate the objective on one batch."""
