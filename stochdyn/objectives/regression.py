"""Matching a field to targets whose conditional mean it should be: drifts, velocities, scores, denoisers."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = ["Regression"]

Field = Callable[[Tensor, Tensor], Tensor]
Batch = tuple[Tensor, Tensor, Tensor]


class Regression(Objective):
    r"""Mean square distance between a field and targets.

    .. math:: \ell = \mathbb E\left[w(t,x)\,|v(t,x)-y|^2\right]

    The minimiser is :math:`v(t,x)=\mathbb E[y\mid t,x]`. The loss doesn't tend to zero: it exceeds the
    squared error of the field by the conditional variance of the targets.

    Args:
        field: ``v(t, x) -> (..., d)``, a callable or module.
        sampler: gives ``(t, x, y)`` when the objective is called without a batch.
        weight: ``w(t, x) -> (...)`` or ``(..., 1)``; None for 1. With :math:`1/(2\sigma^2)` and a drift for
            the field, the loss is a path divergence a unit of time, up to a constant.

    Example:
        >>> import torch
        >>> value = Regression(lambda t, x: 2 * x)((torch.zeros(4, 1), torch.ones(4, 3), torch.ones(4, 3)))
        >>> value.loss, value.bound
        (tensor(3.), 'surrogate')
    """

    def __init__(
        self, field: Field, sampler: Callable[[], Batch] | None = None, weight: Field | None = None
    ) -> None:
        super().__init__()
        self.field, self.sampler, self.weight = field, sampler, weight

    def forward(self, batch: Batch | None = None) -> ObjectiveValue:
        """Evaluate on ``batch = (t, x, y)``: times, points ``(..., d)``, targets of the shape of the field.

        Raises:
            InvalidInputError: if there are neither targets nor a sampler.
            ShapeError: if field and targets differ in shape.
        """
        if batch is None:
            if self.sampler is None:
                raise InvalidInputError("there are no targets", hint="pass (t, x, target), or give a sampler")
            batch = self.sampler()
        t, x, target = batch
        value = self.field(t, x)
        if value.shape != target.shape:
            raise ShapeError(
                "the field doesn't fit the targets", got=tuple(value.shape), expected=tuple(target.shape)
            )
        squares = (value - target).square().sum(-1)
        weighted = squares
        if self.weight is not None:
            weight = self.weight(t, x)
            weighted = squares * (weight.squeeze(-1) if weight.ndim > squares.ndim else weight)
        loss = weighted.mean()
        terms = {"regression": loss.detach(), "mean_square": squares.detach().mean()}
        return ObjectiveValue(loss, terms, "surrogate")
