"""Draws of a Pyro model from its prior, data included."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyro
from pyro import poutine
from torch import Tensor

from stochdyn._checks import check_positive_int
from stochdyn.diagnostics.draws import draw_posterior

__all__ = ["draw_prior"]


def draw_prior(
    model: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_draws: int = 500,
    seed: int | None = 0,
) -> dict[str, Tensor]:
    """Draw all sites of a model from the prior: latent and deterministic ones, and data.

    Distributions aren't asked whether they allow their parameters, since paths drawn from a prior may run anywhere; a number
    that isn't finite is NaN or infinity in the draws.

    Args:
        model: A Pyro model.
        args: The positional arguments of the model.
        kwargs: The keyword arguments of the model.
        num_draws: The number of draws.
        seed: The seed of the draws; the global random state is left as it was. None draws from the global state.

    Returns:
        The draws ``(S, *shape)`` of latent, deterministic and observed sites by name.

    Raises:
        InvalidInputError: If ``num_draws`` isn't a positive integer.

    Example:
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(rate, 1.0), obs=y)
        >>> {n: tuple(v.shape) for n, v in draw_prior(model, (torch.tensor(1.0),), num_draws=5).items()}
        {'rate': (5,), 'y': (5,)}
    """
    check_positive_int(num_draws, "num_draws")
    # What the model draws before it sees data is a guide like any other: its latent sites under their priors.
    guide = poutine.block(model, hide_fn=lambda site: site["type"] == "sample" and site["is_observed"])
    with pyro.validation_enabled(False):
        draws = draw_posterior(model, guide, args, kwargs, num_draws=num_draws, seed=seed, predictive=True)
    return {**draws.values, **draws.predictive}
