"""Sites of observations: data with missing values, and data of a linear-Gaussian law with the path integrated out."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn._checks import as_mask, as_tensor, as_time_grid, check_bool, check_positive, check_type
from stochdyn.core.gaussian.gains import gain_log_evidence, times_with_start
from stochdyn.core.gaussian.law import GaussianPathMeasure
from stochdyn.core.gaussian.measure import LinearGaussianMeasure
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.infer.law_distribution import LawDistribution

__all__ = ["LinearObservations", "observe"]


def observe(name: str, distribution: Any, values: Any, mask: Any = None) -> Tensor:
    """Observe data in a Pyro model, with values that may be missing.

    A missing value leaves the likelihood as it is, counts nowhere, and stays NaN in ``to_inference_data``.

    Args:
        name: The site's name.
        distribution: The law of the data, as ``pyro.sample`` takes it: elements of one event are declared by ``to_event``.
        values: The data, of any form, NaN where missing.
        mask: The mask of what was observed, True where it was; None if only NaN is missing.

    Returns:
        The values, with something in the support of the law where they are missing.

    Raises:
        ShapeError: if values and distribution don't fit each other.
        InvalidInputError: if a vector of one law is missing in part.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        ...     observe("y", dist.Normal(mean[..., None].expand(*mean.shape, 3), 0.5).to_event(1), y)
        >>> y = torch.tensor([0.3, float("nan"), 0.1])
        >>> trace = pyro.poutine.trace(pyro.condition(model, {"mean": torch.tensor(0.0)})).get_trace(y)
        >>> trace.compute_log_prob()
        >>> bool(trace.nodes["y"]["log_prob"] == dist.Normal(0.0, 0.5).log_prob(y[[0, 2]]).sum())
        True
    """
    check_type(name, str, "name")
    check_type(distribution, torch.distributions.Distribution, "distribution")
    data = as_tensor(values, "values", missing=True)
    shape = distribution.event_shape
    try:
        torch.broadcast_shapes(data.shape, distribution.shape())
    except RuntimeError:
        raise ShapeError(
            "values don't fit the distribution",
            got=f"shape {tuple(data.shape)}",
            expected=f"one that broadcasts with {tuple(distribution.shape())}",
        ) from None
    if data.shape[data.ndim - len(shape) :] != shape:
        raise ShapeError(
            "values don't fit the event of the distribution",
            got=f"shape {tuple(data.shape)}",
            expected=f"(..., {', '.join(map(str, shape))})",
        )
    seen = ~torch.isnan(data)
    if mask is not None:
        seen = seen & as_mask(mask).to(data.device)
    base, events = distribution, 0
    while isinstance(base, dist.Independent):
        events += base.reinterpreted_batch_ndims
        base = base.base_dist
    if base.event_dim:
        whole = seen.flatten(-base.event_dim)
        if bool((whole.any(-1) & ~whole.all(-1)).any()):
            raise InvalidInputError(
                "a vector can't be missing in part",
                got=type(base).__name__,
                hint="observe its components one by one",
            )
        seen = whole.all(-1)
    if bool(seen.all()) and mask is None:
        return pyro.sample(name, distribution, obs=data)
    inside = seen.reshape((*seen.shape, *(1,) * base.event_dim))
    known = data[inside.expand_as(data)]
    filler = (
        known[0]
        if known.numel() and not base.event_dim
        else torch.zeros((), dtype=data.dtype, device=data.device)
    )
    if base.event_dim and bool(seen.any()):
        filler = data[seen][0]
    filled = torch.where(inside, data, filler)
    return pyro.sample(name, base.mask(seen).to_event(events), obs=filled)


class LinearObservations(LawDistribution):
    r"""Noisy observations of a linear-Gaussian law, as a distribution with event ``(T, p)``; the path is integrated out.

    .. math:: y_i = C X_{t_i} + \sigma_i\epsilon_i

    The density is the exact evidence by a Kalman filter, differentiable in all that the law and the noise are made of, so
    that samplers move through the parameters alone. Use it in place of a path site where the law is linear; data may hold
    NaN where they are missing.

    Args:
        law: The law of the path; its batch axes are those of the distribution.
        times: The strictly increasing times of the data, ``(T,)``, or ``(*batch, T)`` where every series has its own.
        obs_scale: The standard deviation of the noise: a number, ``(p,)``, ``(T, p)`` or ``(*batch, T, p)``.
        emission: The matrix :math:`C`, ``(p, d)``; None for the identity.
        increments: Whether a datum is what :math:`CX` has gained since the time before (since the start of the law for the first
            one) and not what it is: cases over a week or averages over an interval, as gains of ``law.with_integral(...)``. The law
            is then a :class:`~stochdyn.LinearGaussianMeasure`.

    Raises:
        TimeGridError: if the times don't increase strictly.
        InvalidInputError: for another kind of law, or a scale that isn't positive.

    Example:
        >>> import stochdyn as sd
        >>> law = sd.LinearGaussianMeasure.ornstein_uhlenbeck(rate=1.0, diffusion=1.0, initial_mean=torch.zeros(1))
        >>> y = LinearObservations(law, [0.5, 1.0], 0.1)
        >>> y.event_shape, y.log_prob(torch.zeros(2, 1))
        (torch.Size([2, 1]), tensor(-0.7226))
    """

    support = constraints.independent(constraints.real, 2)
    has_rsample = True
    _carried = ("law", "times", "obs_scale", "emission", "increments")

    def __init__(
        self,
        law: GaussianPathMeasure,
        times: Any,
        obs_scale: Tensor | float,
        emission: Tensor | None = None,
        increments: bool = False,
        validate_args: bool | None = None,
    ) -> None:
        check_bool(increments, "increments")
        check_type(law, LinearGaussianMeasure if increments else GaussianPathMeasure, "law")
        check_positive(obs_scale, "obs_scale")
        self.increments = increments
        self.law, self.obs_scale, self.emission = law, obs_scale, emission
        self.times = as_time_grid(times, "times", min_points=1, batch=True)
        size = law.dim if emission is None else emission.shape[-2]
        batch = torch.broadcast_shapes(law.batch_shape, self.times.shape[:-1])
        if isinstance(obs_scale, Tensor) and obs_scale.ndim > 2:
            batch = torch.broadcast_shapes(batch, obs_scale.shape[:-2])
        super().__init__(batch, torch.Size((self.times.shape[-1], size)), validate_args=validate_args)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw ``(*sample, *batch, T, p)``."""
        shape = self._extended_shape(torch.Size(sample_shape))
        own = max(len(self.law.batch_shape), self.times.ndim - 1)
        draws = shape[: len(shape) - 2 - own]
        if isinstance(self.law, LinearGaussianMeasure) and self.increments:
            # A time at which the law starts stands twice, which the chain takes and a grid wouldn't.
            chain = self.law.chain(times_with_start(self.law, self.times))
            x = chain.sample(draws, None).movedim(len(draws), -2)
            x = x[..., 1:, :] - x[..., :-1, :]
        else:
            x = self.law.sample(self.times, draws).x
        x = x if self.emission is None else x @ self.emission.mT
        return x + self.obs_scale * torch.randn(shape, dtype=x.dtype, device=x.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log evidence ``(*batch,)`` of ``value (..., T, p)``; NaN is missing."""
        check_type(value, Tensor, "value")
        if value.shape[-2:] != self.event_shape:
            raise ShapeError(
                "the data don't fit the times and components of the law",
                got=f"shape {tuple(value.shape)}",
                expected=f"(..., {self.event_shape[0]}, {self.event_shape[1]})",
            )
        emission = self.emission
        if emission is None:
            # Said, since scalar laws take series without an axis of components where nothing is said.
            emission = torch.eye(self.event_shape[-1], dtype=value.dtype, device=value.device)
        if isinstance(self.law, LinearGaussianMeasure) and self.increments:
            evidence = gain_log_evidence(self.law, self.times, value, self.obs_scale, emission)
        else:
            evidence = self.law.log_evidence(self.times, value, self.obs_scale, emission)
        return evidence.expand(torch.broadcast_shapes(evidence.shape, self.batch_shape))
