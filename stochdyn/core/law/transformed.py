"""The law of a path in other coordinates: one that is simulated where nothing can leave its range, and read where it lives."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import transforms
from torch.distributions.transforms import Transform

from stochdyn._checks import as_tensor, check_event_size, check_points, check_time_broadcast, check_type
from stochdyn.core.law.marginals import GaussianMarginal, Generator, Marginal, SampledMarginal, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import Path, PathSample
from stochdyn.core.sde.coordinates import Coordinates, as_transform, check_transform, log_jacobian
from stochdyn.errors import UnavailableError

__all__ = ["TransformedMeasure"]


class TransformedMeasure(PathMeasure):
    r"""The law of :math:`Y_t=f(X_t)`, where X has a law that is known.

    With an equation in coordinates that reach to infinity below and above, and the transform back, it is a law of positive or
    bounded states none of whose paths leaves their range; on a linear-Gaussian law it is exact, as for geometric Brownian motion.
    :meth:`stochdyn.PathMeasure.transformed` makes one.

    Args:
        law: The law of X.
        transform: The change of variables f: ``"exp"``, ``"sigmoid"``, ``"log"``, ``"logit"``, an invertible transform of
            ``torch.distributions`` or Pyro, or a list with one for each component.

    Raises:
        InvalidInputError: If the transform isn't invertible.

    Example:
        >>> from stochdyn import LinearGaussianMeasure
        >>> prices = LinearGaussianMeasure.brownian(diffusion=0.2).transformed("exp")
        >>> prices.marginal(1.0).mean
        tensor([1.0202])
    """

    def __init__(self, law: PathMeasure, transform: object) -> None:
        super().__init__()
        check_type(law, PathMeasure, "law")
        self.law = law
        self.coordinates = Coordinates(as_transform(transform))

    @property
    def transform(self) -> Transform:
        """The change of variables from X to Y."""
        return self.coordinates.transform

    def untransformed(self) -> PathMeasure:
        """Return the law of X."""
        return self.law

    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw paths; see :meth:`stochdyn.PathMeasure.sample`."""
        path = self.law.sample(ts, sample_shape, generator)
        check_type(path, PathSample, "law", "a law whose states are vectors")
        assert isinstance(path, PathSample)
        check_transform(self.transform, path.x.shape[-1])
        return _moved(path, self.transform, self)

    def inverse(self, path: Path) -> PathSample:
        """Return the path of X behind a path of Y."""
        check_type(path, PathSample, "path")
        assert isinstance(path, PathSample)
        source = path.law.law if isinstance(path.law, TransformedMeasure) else None
        return _moved(path, self.transform.inv, source)

    def marginal(self, t: Tensor | float) -> Marginal:
        """Return the law of the state at one time; see :meth:`stochdyn.PathMeasure.marginal`."""
        return _TransformedMarginal(self.law.marginal(t), self.transform)

    def log_rn(
        self, path: Path, other: PathMeasure, estimator: str = "density", *, recorded: bool = False
    ) -> Tensor:
        """Return the log density ratio on paths, that of both laws in the coordinates of X; see :meth:`stochdyn.PathMeasure.log_rn`.

        Raises:
            UnavailableError: If the other law isn't one in the same coordinates.
        """
        check_type(other, PathMeasure, "other")
        if not isinstance(other, TransformedMeasure) or not same_transform(self.transform, other.transform):
            raise UnavailableError(
                "densities in other coordinates are compared with laws in the same ones",
                hint="give both laws the same transform",
            )
        return self.law.log_rn(self.inverse(path), other.law, estimator, recorded=recorded)

    def log_prob(self, path: Path) -> Tensor:
        r"""Return the log density of the states of a path, ``(*sample, *batch)``.

        .. math:: \log p_X\big(f^{-1}(y)\big)-\sum_n\log|\det f'(x_n)|

        over the points that are random: a fixed start adds nothing.
        """
        back = self.inverse(path)
        fine_y, fine_x = _finest(path), _finest(back)  # type: ignore[arg-type]
        volume = log_jacobian(self.transform, fine_x.x, fine_y.x)
        counts = self.law.random_points(fine_x.ts).movedim(0, -1)
        return self.law.log_prob(back) - torch.where(counts, volume, torch.zeros_like(volume)).sum(-1)

    def random_points(self, ts: Tensor) -> Tensor:
        """Return ``(T, *batch)``, True for the points of a grid whose states the density is one of."""
        return self.law.random_points(ts)

    def forward(self) -> Any:
        """Return the Fokker-Planck operator of a diffusion in these coordinates.

        Raises:
            UnavailableError: If the law of X isn't a diffusion in its state alone.
        """
        from stochdyn.core.forward.fokker_planck import FokkerPlanck

        operator = self.law.forward()
        if not isinstance(operator, FokkerPlanck):
            self._refuse("forward", "the law behind it isn't a diffusion")
        return FokkerPlanck(operator.sde.transformed(self.transform))

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the drift ``(..., d)`` at ``x (..., d)`` in these coordinates, with the Itô term."""
        x = as_tensor(x, "x")
        time = as_tensor(t, "t", like=x).to(x)
        check_time_broadcast(time, x)
        slope: Tensor = self.forward().sde.slope(time, x)
        return slope.expand_as(x)


class _TransformedMarginal(SampledMarginal):
    """The law of one state in other coordinates: moments of an exponential of a Gaussian are exact, others are sampled."""

    def __init__(self, base: Any, transform: Transform) -> None:
        super().__init__(lambda shape, source: transform(base.sample(shape, source)))
        self.base, self.transform = base, transform

    @property
    def _lognormal(self) -> bool:
        return isinstance(self.base, GaussianMarginal) and isinstance(self.transform, transforms.ExpTransform)

    @property
    def mean(self) -> Tensor:
        """The mean, ``(*batch, d)``."""
        if not self._lognormal:
            return super().mean
        variance = self.base.covariance.diagonal(dim1=-2, dim2=-1)
        return (self.base.mean + 0.5 * variance).exp()

    @property
    def covariance(self) -> Tensor:
        """The covariance, ``(*batch, d, d)``."""
        if not self._lognormal:
            return super().covariance
        mean = self.mean
        return mean.unsqueeze(-1) * mean.unsqueeze(-2) * self.base.covariance.expm1()

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density ``(...)`` at ``x (..., d)``."""
        check_points(x)
        check_event_size(x, self.base.mean.shape[-1], "x")
        before = self.transform.inv(x)
        density: Tensor = self.base.log_prob(before) - log_jacobian(self.transform, before, x)
        return density


def _moved(path: PathSample, transform: Transform, law: PathMeasure | None) -> PathSample:
    """Return a path with transformed states, and likewise the finer one on which it was simulated."""
    x, fine = transform(path.x), path.fine
    kept = None if fine is None else (_moved(fine, transform, law), x, path.ts)
    return replace(path, x=x, law=law, _fine=kept)


def _finest(path: PathSample) -> PathSample:
    return path if path.fine is None else path.fine


def same_transform(one: Transform, other: Transform) -> bool:
    """Return whether two transforms are the same, their tensors included."""
    if one is other or one == other:
        return True
    if isinstance(one, transforms.CatTransform) and isinstance(other, transforms.CatTransform):
        pairs = zip(one.transforms, other.transforms, strict=False)
        return len(one.transforms) == len(other.transforms) and all(same_transform(*pair) for pair in pairs)
    if isinstance(one.inv, transforms.CatTransform) and isinstance(other.inv, transforms.CatTransform):
        return same_transform(one.inv, other.inv)
    return False
