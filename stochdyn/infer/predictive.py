"""Draws of a path from its posterior, in one call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_seed, check_positive_int
from stochdyn.core.sde.intervention import Intervention
from stochdyn.infer.path_law import PosteriorPath, Source

__all__ = ["PathDraws", "predict_path"]


@dataclass(frozen=True, repr=False)
class PathDraws:
    """Draws of a path from its posterior.

    Attributes:
        ts: ``(T,)`` times, or ``(*batch, T)`` with a grid per series.
        x: ``(num_draws, *batch, T, d)`` states.
        num_fitted: How many of the times lie on or before the end of the fitted grid, the fewest over series; the others
            are forecasts.
    """

    ts: Tensor
    x: Tensor
    num_fitted: int

    def __repr__(self) -> str:
        span = f"{float(self.ts.min()):g} to {float(self.ts.max()):g}"
        return f"PathDraws(x {tuple(self.x.shape)}, times {span}, num_fitted={self.num_fitted})"

    @property
    def mean(self) -> Tensor:
        """The mean path, ``(*batch, T, d)``."""
        return self.x.mean(0)

    def quantile(self, q: float | Tensor) -> Tensor:
        """Return quantiles of the state at each time, ``(*batch, T, d)`` or led by an axis for several levels."""
        return self.x.quantile(torch.as_tensor(q, dtype=self.x.dtype, device=self.x.device), 0)


def predict_path(
    model: Callable[..., Any],
    guide: Source,
    name: str,
    ts: Tensor | None = None,
    *,
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
    num_draws: int = 1000,
    seed: int | None = None,
    do: Intervention | None = None,
) -> PathDraws:
    """Draw a path from its posterior on a grid of your choice.

    These are draws of :class:`~stochdyn.infer.PosteriorPath`: those of the guide or the sampler on the fitted grid, bridges
    between its points, and forecasts beyond its end in steps of the same size.

    Args:
        model: Pyro model; one that broadcasts over a leading batch of draws (as ``Predictive(parallel=True)`` needs) is much faster.
        guide: The fitted guide of the model, a ``pyro.infer.MCMC`` that has run, or a dictionary of its draws by site.
        name: The path's site.
        ts: ``(T,)`` strictly increasing times, or ``(*batch, T)`` where every series has its own, none before the fitted grid;
            the fitted grid if None.
        args: The arguments of model and guide.
        kwargs: The keyword arguments of model and guide.
        num_draws: The number of draws.
        do: An intervention: what would have happened to each draw, or will, with the noise that drove it.
        seed: The seed of the draws; the global random state is left as it was. None draws from the global state.

    Returns:
        The draws.

    Raises:
        UnknownSiteError: If the model has no path of that name.
        TimeGridError: If a time lies before the fitted grid, or beyond the horizon that the noise was made for.
        InvalidInputError: For a sampler that hasn't run.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from stochdyn import SDE
        >>> from stochdyn.infer import AutoPathGuide, sample_path
        >>> def model(ts, y):
        ...     x = sample_path("x", SDE(lambda t, x: -x, 1.0), torch.zeros(1), ts)
        ...     pyro.sample("y", dist.Normal(x[..., -1, 0], 0.1), obs=y)
        >>> guide, args = AutoPathGuide(model, hidden=()), (torch.linspace(0, 1, 11), torch.tensor(0.5))
        >>> draws = predict_path(model, guide, "x", torch.linspace(0.5, 2, 4), args=args, num_draws=100)
        >>> draws.x.shape, draws.num_fitted
        (torch.Size([100, 4, 1]), 2)
    """
    check_positive_int(num_draws, "num_draws")
    law = PosteriorPath(model, guide, name, args, kwargs, do)
    fitted = law.fitted_times()
    path = law.sample(fitted if ts is None else ts, num_draws, None if seed is None else as_seed(seed))
    return PathDraws(path.ts, path.x, int((path.ts <= fitted[..., -1:]).sum(-1).min()))
