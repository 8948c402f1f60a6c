"""The likelihood of data given the states at their times, with missing values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_callable
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["StateLikelihood"]


class StateLikelihood:
    """The log likelihood of data whose law depends on the state at their time alone.

    Use it as ``log_likelihood`` of :func:`particle_filter`.

    Args:
        observe: The function from states ``(..., d)`` to the distribution of an observation, with batch ``(...)``.
        y: The data ``(*batch, T, *event)`` of any kind, NaN where missing.

    Raises:
        InvalidInputError: If ``observe`` isn't a function, or a vector of one law is missing in part.

    Example:
        >>> data = StateLikelihood(lambda x: dist.Poisson(x.exp()).to_event(1), [[3.0], [float("nan")]])
        >>> data(0, torch.zeros(5, 1)).shape, bool((data(1, torch.zeros(5, 1)) == 0).all())
        (torch.Size([5]), True)
    """

    def __init__(self, observe: Callable[[Tensor], Any], y: Any) -> None:
        check_callable(observe, "observe", "a function from states to the distribution of an observation")
        if isinstance(observe, torch.distributions.Distribution):
            raise InvalidInputError(
                "observe must be a function from states to a distribution", got=type(observe).__name__
            )
        self.observe = observe
        data = as_tensor(y, "y", missing=True)
        self.seen = ~torch.isnan(data)
        # Something in the support of the law stands where nothing was seen.
        known = data[self.seen]
        self._any = bool(known.numel())
        self.values = torch.where(self.seen, data, known[0] if self._any else torch.zeros_like(data))
        self._whole = bool(self.seen.all())
        self._events: tuple[int, int] | None = None

    def __call__(self, step: int, x: Tensor) -> Tensor:
        """Return the log likelihood ``(...)`` of observation ``step`` at states ``x (..., d)``."""
        law = self.observe(x)
        size = len(law.event_shape)
        value = self.values.movedim(-1 - size, 0)[step].to(x)
        if self._whole:
            return self._fitting(law, value)
        base, events = law, 0
        while isinstance(base, dist.Independent | torch.distributions.Independent):
            events += base.reinterpreted_batch_ndims
            base = base.base_dist
        inner = len(base.event_shape)
        seen = self.seen.movedim(-1 - size, 0)[step]
        if inner:
            whole = seen.flatten(-inner)
            if self._events is None:
                self._check_vectors(inner)
                self._events = size, inner
            seen = whole.all(-1)
        pointwise = self._fitting(base, value)
        kept = torch.where(seen, pointwise, torch.zeros_like(pointwise))
        return kept.sum(tuple(range(-events, 0))) if events else kept

    def _check_vectors(self, inner: int) -> None:
        whole = self.seen.flatten(-inner)
        if bool((whole.any(-1) & ~whole.all(-1)).any()):
            raise InvalidInputError(
                "a vector can't be missing in part", hint="observe its components one by one"
            )

    @staticmethod
    def _fitting(law: Any, value: Tensor) -> Tensor:
        try:
            return law.log_prob(value)
        except (RuntimeError, ValueError) as error:
            raise ShapeError(
                "y doesn't fit the distribution of the observations",
                got=f"an observation of shape {tuple(value.shape)}: {str(error).splitlines()[0][:80]}",
                expected=f"batch {tuple(law.batch_shape)}, event {tuple(law.event_shape)}",
            ) from error
