"""The law of a path at one time: what every marginal offers, and the Gaussian and the simulated one."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stochdyn._checks import as_generator, as_sample_shape, as_tensor, check_event_size, check_points
from stochdyn.core.gaussian.small import psd_factor
from stochdyn.errors import SingularDiffusionError, UnavailableError

__all__ = ["GaussianMarginal", "Generator", "Marginal", "SampleShape", "SampledMarginal"]

#: The shape of independent draws: a number of them, or a shape.
SampleShape = int | Sequence[int]
#: The source of randomness of a sampler: a generator, a seed, or None for torch's global one.
Generator = torch.Generator | int | None
_Draw = Callable[[tuple[int, ...], Generator], Tensor]


class Marginal(ABC):
    """The law of a path at one time, an event of ``d`` components."""

    @abstractmethod
    def sample(self, sample_shape: SampleShape = (), generator: Generator = None) -> Tensor:
        """Draw ``(*sample, *batch, d)`` independent states."""

    @property
    @abstractmethod
    def mean(self) -> Tensor:
        """The mean, ``(*batch, d)``."""

    @property
    @abstractmethod
    def covariance(self) -> Tensor:
        """The covariance, ``(*batch, d, d)``."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density ``(...)`` at ``x (..., d)``.

        Raises:
            UnavailableError: If the density isn't known.
        """
        raise UnavailableError(f"the density of a {type(self).__name__} isn't known")


class GaussianMarginal(Marginal):
    """A Gaussian, singular ones included.

    Use it for Gaussian laws: moments and density are exact.

    Args:
        mean: The mean ``(*batch, d)``.
        covariance: The covariance ``(*batch, d, d)``, positive semi-definite.

    Example:
        >>> marginal = GaussianMarginal(torch.zeros(1), 4 * torch.eye(1))
        >>> marginal.log_prob(torch.zeros(3, 1))
        tensor([-1.6121, -1.6121, -1.6121])
    """

    def __init__(self, mean: Tensor, covariance: Tensor) -> None:
        self._mean, self._covariance = mean, covariance

    @property
    def mean(self) -> Tensor:
        """The mean, ``(*batch, d)``."""
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """The covariance, ``(*batch, d, d)``."""
        return self._covariance

    def sample(self, sample_shape: SampleShape = (), generator: Generator = None) -> Tensor:
        """Draw ``(*sample, *batch, d)`` independent states, differentiable in mean and covariance."""
        shape, source = as_sample_shape(sample_shape), as_generator(generator, self._mean.device)
        factor = psd_factor(self._covariance)
        batch = torch.broadcast_shapes(self._mean.shape[:-1], self._covariance.shape[:-2])
        noise = torch.randn(
            *shape,
            *batch,
            self._mean.shape[-1],
            dtype=self._mean.dtype,
            device=self._mean.device,
            generator=source,
        )
        return self._mean + (factor @ noise.unsqueeze(-1)).squeeze(-1)

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density ``(...)`` at ``x (..., d)``.

        Raises:
            SingularDiffusionError: If the covariance is singular.
        """
        x = as_tensor(x, "x", like=self._mean, finite=False)
        check_points(x)
        check_event_size(x, self._mean.shape[-1], "x")
        factor, info = torch.linalg.cholesky_ex(self._covariance)
        if bool(info.any()):
            raise SingularDiffusionError("the Gaussian is singular, so it has no density")
        white = torch.linalg.solve_triangular(factor, (x - self._mean).unsqueeze(-1), upper=False).squeeze(-1)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * white.square().sum(-1) - log_det - 0.5 * x.shape[-1] * math.log(2 * math.pi)


class SampledMarginal(Marginal):
    """The marginal of a law that is known by its samples alone: moments come from ``num_samples`` draws.

    Use it for laws that can be drawn from and no more.

    Args:
        draw: A function ``draw(sample_shape, generator)`` that returns ``(*sample, *batch, d)`` independent states.
        num_samples: The number of draws that the mean and the covariance are taken over, with a fixed seed, so that they
            are the same at every call.
    """

    def __init__(self, draw: _Draw, num_samples: int = 4096) -> None:
        self._draw, self.num_samples = draw, num_samples

    def sample(self, sample_shape: SampleShape = (), generator: Generator = None) -> Tensor:
        """Draw ``(*sample, *batch, d)`` independent states."""
        return self._draw(as_sample_shape(sample_shape), generator)

    @property
    def mean(self) -> Tensor:
        """The mean over ``num_samples`` draws, ``(*batch, d)``."""
        return self._draw((self.num_samples,), 0).mean(0)

    @property
    def covariance(self) -> Tensor:
        """The covariance over ``num_samples`` draws, ``(*batch, d, d)``."""
        x = self._draw((self.num_samples,), 0)
        x = x - x.mean(0)
        return torch.einsum("n...i,n...j->...ij", x, x) / (self.num_samples - 1)
