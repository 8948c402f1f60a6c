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
        self._rows: tuple[Any, tuple[Tensor, ...]] | None = None

    def __call__(self, step: int, x: Tensor) -> Tensor:
        """Return the log likelihood ``(...)`` of observation ``step`` at states ``x (..., d)``."""
        law = self.observe(x)
        size = len(law.event_shape)
        value = self._row(step, size, x)
        if self._whole:
            return self._fitting(law, value)
        return self._where_seen(law, value, self.seen.movedim(-1 - size, 0)[step])

    def along(self, x: Tensor) -> Tensor:
        """Return the log likelihoods ``(T, ...)`` of all observations at states ``x (T, ..., d)`` at their times."""
        law = self.observe(x)
        size = len(law.event_shape)
        value, seen = (v.movedim(-1 - size, 0) for v in (self.values.to(x), self.seen))
        # Axes that the data don't have stand between time and theirs; axes of size one that states don't have are no axes.
        more = x.ndim - 1 - (value.ndim - size)
        lead = (1,) * more
        value, seen = (v.reshape(len(v), *lead, *v.shape[1 + max(0, -more) :]) for v in (value, seen))
        return self._fitting(law, value) if self._whole else self._where_seen(law, value, seen)

    def _where_seen(self, law: Any, value: Tensor, seen: Tensor) -> Tensor:
        """Return the log likelihood of what was seen."""
        size = len(law.event_shape)
        base, events = law, 0
        while isinstance(base, dist.Independent | torch.distributions.Independent):
            events += base.reinterpreted_batch_ndims
            base = base.base_dist
        inner = len(base.event_shape)
        if inner:
            whole = seen.flatten(-inner)
            if self._events is None:
                self._check_vectors(inner)
                self._events = size, inner
            seen = whole.all(-1)
        pointwise = self._fitting(base, value)
        kept = torch.where(seen, pointwise, torch.zeros_like(pointwise))
        return kept.sum(tuple(range(-events, 0))) if events else kept

    def _row(self, step: int, size: int, like: Tensor) -> Tensor:
        """Return observation ``step`` in the precision of the states; all are converted at the first call."""
        key = size, like.dtype, like.device
        if self._rows is None or self._rows[0] != key:
            self._rows = key, self.values.to(like).movedim(-1 - size, 0).unbind(0)
        return self._rows[1][step]

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
