"""The posterior of the latent paths of a LatentSDE as a law on paths."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn._checks import as_generator, as_sample_shape, as_time_grid, check_real
from stochdyn._lending import lent
from stochdyn.core.law.marginals import Generator, SampledMarginal, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import PathSample
from stochdyn.errors import TimeGridError
from stochdyn.fractional.latent.networks import interpolate
from stochdyn.fractional.latent.series import Series

if TYPE_CHECKING:
    from stochdyn.fractional.latent.model import LatentSDE

__all__ = ["LatentPathLaw"]


class LatentPathLaw(PathMeasure):
    """The posterior law of the latent path of every series, by the posterior of a :class:`LatentSDE`.

    Its paths are those of :func:`posterior_paths`, linear between the points of the model's grid, as the decoder reads them.

    Use it where a law is asked for: in plots, scores and comparisons. It has the weights of no other law:
    :func:`posterior_paths` has those of its draws.

    Args:
        model: A fitted model, which the law refers to: it changes as the model is trained.
        series: The B series on which the paths are conditioned.

    Example:
        >>> from stochdyn.fractional import LatentSDE, Series
        >>> ts = torch.linspace(0, 1, 11)
        >>> model = LatentSDE(1, 2, ts, drift=(8,))
        >>> law = model.path_law(Series.regular(ts[::5], torch.zeros(4, 3, 1)))
        >>> law.sample([0.25, 0.5], 100, generator=0).x.shape, law.marginal(0.5).mean.shape
        (torch.Size([100, 4, 2, 2]), torch.Size([4, 2]))
    """

    def __init__(self, model: LatentSDE, series: Series) -> None:
        super().__init__()
        model._admit(series)
        self.model = model
        for name in ("times", "values", "mask"):
            self.register_buffer(name, getattr(series, name).clone())

    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw paths ``(*sample, B, T, d)``; see :meth:`stochdyn.PathMeasure.sample`.

        Args:
            ts: The strictly increasing times ``(T,)`` on the grid of the model or between its points.
            sample_shape: The shape of independent draws.
            generator: The source of randomness; inside, it seeds torch's global one, which posteriors draw from.

        Raises:
            TimeGridError: If a time lies outside the grid of the model; see :func:`forecast` for later ones.
        """
        shape, model = as_sample_shape(sample_shape), self.model
        ts = as_time_grid(ts, min_points=1, like=model.ts)
        self._check_within(ts)
        source = None if generator is None else as_generator(generator)
        series = Series(self.get_buffer("times"), self.get_buffer("values"), self.get_buffer("mask"))
        count = torch.Size(shape).numel()
        with lent(source), torch.no_grad():
            x = model.posterior.draw(model, series, max(1, count)).path.x[:count]
        x = interpolate(x.movedim(-2, 0), model.ts, ts.to(x).expand(len(series), -1)).movedim(0, -2)
        x = x.reshape(*shape, *x.shape[1:])
        return PathSample(ts, x, x[..., 1:, :0], law=self)

    def marginal(self, t: Tensor | float) -> SampledMarginal:
        """Return the law ``(B, d)`` of the states at one time.

        Raises:
            TimeGridError: If the time lies outside the grid of the model.
        """
        check_real(t, "t")
        time = torch.as_tensor(t, dtype=self.model.ts.dtype, device=self.model.ts.device).reshape(1)
        self._check_within(time)
        return SampledMarginal(lambda shape, source: self.sample(time, shape, source).x[..., 0, :])

    def _check_within(self, ts: Tensor) -> None:
        grid = self.model.ts
        ts = ts.to(grid)
        if bool((ts[0] < grid[0]) | (ts[-1] > grid[-1])):
            raise TimeGridError(
                "ts leaves the grid of the model",
                got=f"{float(ts[0]):g} to {float(ts[-1]):g}",
                expected=f"times from {float(grid[0]):g} to {float(grid[-1]):g}",
                hint="forecast() goes beyond its end",
            )
