"""The contract of everything that can be minimised: ``Objective`` in, ``ObjectiveValue`` out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stochdyn.errors import ShapeError

__all__ = ["Bound", "Objective", "ObjectiveValue"]

Bound = Literal["evidence_lower", "kl_upper", "residual", "surrogate"]


@dataclass(frozen=True)
class ObjectiveValue:
    r"""One evaluation of an objective.

    Args:
        loss: The scalar tensor to differentiate and minimise. Its *gradient* is what training follows.
        terms: Named scalar tensors to report; each is detached. By convention the parts of the loss, and for
            ``bound="evidence_lower"`` the value of the bound itself under ``"elbo"``.
        bound: What the number means: ``"evidence_lower"`` (minus the loss bounds the log evidence from
            below), ``"kl_upper"`` (the loss bounds a divergence from above), ``"residual"`` (zero exactly
            at a solution of an equation) or ``"surrogate"`` (a regression with the right minimiser).
    """

    loss: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    bound: Bound = "surrogate"

    def detach(self) -> ObjectiveValue:
        """Return the same numbers without their graph, as scalars of the loss's precision.

        Raises:
            ShapeError: If a term isn't a scalar.
        """
        loss = self.loss.detach()
        terms = {}
        for name, term in self.terms.items():
            term = torch.as_tensor(term, device=None if isinstance(term, Tensor) else loss.device).detach()
            if term.numel() != 1:
                raise ShapeError(
                    f"the objective's term {name!r} must be a scalar", got=f"shape {tuple(term.shape)}"
                )
            terms[name] = term.reshape(()) if term.is_floating_point() else term.reshape(()).to(loss.dtype)
        return ObjectiveValue(loss, terms, self.bound)

    @staticmethod
    def mean(values: Sequence[ObjectiveValue]) -> ObjectiveValue:
        """Return the means of losses and terms over evaluations; a term counts where it is."""
        names = dict.fromkeys(name for v in values for name in v.terms)
        terms = {n: torch.stack([v.terms[n] for v in values if n in v.terms]).mean() for n in names}
        return ObjectiveValue(torch.stack([v.loss for v in values]).mean(), terms, values[-1].bound)


class Objective(nn.Module, ABC):
    """A number to minimise over the parameters of a module.

    Subclasses implement :meth:`forward`, which takes one batch (whatever the data loader yields; ``None``
    when there is no data) and returns an :class:`ObjectiveValue`. As an ``nn.Module`` it has parameters,
    a device and a state dict, so :func:`stochdyn.fit`, DistributedDataParallel and checkpoints need
    nothing else. Randomness comes from torch's global generator, which belongs to the run
    while :func:`stochdyn.fit` trains.
    """

    @abstractmethod
    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate the objective on one batch."""
