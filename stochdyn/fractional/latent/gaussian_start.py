"""Where a Gaussian posterior starts: the posterior of the model linearised around its most probable path."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochdyn.core.law.initial import DistributionStart
from stochdyn.core.law.path import PathSample
from stochdyn.core.law.transition import time_column
from stochdyn.infer.distributions import PathIncrements
from stochdyn.infer.linearise import Quadratic, expand_likelihood
from stochdyn.infer.mode import fit_linearised
from stochdyn.infer.view import view_site

if TYPE_CHECKING:
    from stochdyn.fractional.latent.gaussian_posterior import GaussianPosterior

__all__ = ["set_linearised"]


def set_linearised(
    posterior: GaussianPosterior, likelihood: Callable[[PathSample, Any], Tensor], batch: Any = None
) -> None:
    """Put the parameters of a posterior there; see :meth:`GaussianPosterior.linearise`."""
    sde, ts = posterior.prior.sde, posterior.ts
    initial = posterior.prior.initial
    law = initial.distribution if isinstance(initial, DistributionStart) else None
    with torch.no_grad():
        x0 = posterior._start_prior()
        point = x0.mean[..., : posterior.dim] if law is not None else x0.origin[..., : posterior.dim]
        point = point.expand(*posterior.batch_shape, posterior.dim)
        fn = PathIncrements(sde, point, ts).expand(posterior.batch_shape)
        past = sde.noise.initial_factor(dtype=point.dtype, device=point.device) is not None
        view = view_site(fn, "x", law, past)

        def quadratic(x: Tensor) -> Quadratic:
            return expand_likelihood(
                lambda leaf: likelihood(
                    PathSample(ts, leaf.movedim(0, -2), leaf[1:, ..., :0].movedim(0, -2)), batch
                ),
                x,
            )

        found = fit_linearised(view, quadratic)
        dtype = posterior.offset.dtype
        feedback = found.posterior.law
        pull = (feedback.gain @ found.states[:-1].double().unsqueeze(-1)).squeeze(-1)
        posterior.offset.copy_((feedback.offset + pull).to(dtype))
        posterior.gain.copy_((feedback.gain * posterior.width).to(dtype))
        factor = feedback.factor.to(dtype)
        posterior.log_diagonal.copy_(factor.diagonal(dim1=-2, dim2=-1).log())
        if posterior.lower is not None:
            posterior.lower.copy_(factor.tril(-1))
        if posterior.start_mean is not None and found.start_mean is not None:
            assert found.start_factor is not None
            assert posterior.start_log_diagonal is not None and posterior.start_lower is not None
            posterior.start_mean.copy_(found.start_mean)
            posterior.start_log_diagonal.copy_(found.start_factor.diagonal(dim1=-2, dim2=-1).log())
            posterior.start_lower.copy_(found.start_factor.tril(-1))
        if posterior.drift_matrix is not None and posterior.drift_offset is not None:
            x = found.states[:-1, ..., : posterior.dim]
            t = time_column(ts[:-1], x)
            slopes = []
            for j in range(posterior.dim):
                direction = torch.zeros_like(x)
                direction[..., j] = 1.0
                value, slope = torch.func.jvp(lambda x_: sde.drift(t, x_), (x,), (direction,))[:2]
                slopes.append(slope.expand_as(x))
            matrix = torch.stack(slopes, -1)
            posterior.drift_matrix.copy_(matrix)
            posterior.drift_offset.copy_(value - (matrix @ x.unsqueeze(-1)).squeeze(-1))
