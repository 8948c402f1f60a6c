"""What a population looks like around a point."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from stochdyn._checks import check_event_size, check_nonempty, check_positive_int
from stochdyn.errors import ShapeError

__all__ = ["KernelMeans", "OwnUnits", "Surroundings"]

# Distances held at once where no gradient is taken: 64 MB in single precision.
_ENTRIES = 2**24


# The share of the mean variance that every direction of a population has at least.
_RIDGE = 1e-3


class Surroundings(nn.Module, ABC):
    """What a velocity is told of a population around a point, in units in which the spread of the data is about one.

    :class:`OwnUnits` where populations differ in place, width and orientation, which costs next to nothing; :class:`KernelMeans`
    where they differ in shape.

    Args:
        dim: The number of components of a point.
        out: The number of components of what is returned.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        check_positive_int(dim, "dim")
        check_positive_int(out, "out")
        self.dim, self.out = dim, out

    def forward(self, x: Tensor, population: Tensor) -> Tensor:
        """Return the features ``(..., n, out)`` at points.

        Args:
            x: The points, ``(..., n, dim)``.
            population: The members of the population, ``(..., m, dim)``.

        Raises:
            ShapeError: If points or members have another dimension.
        """
        for name, value in (("x", x), ("population", population)):
            check_event_size(value, self.dim, name)
            check_nonempty(value, name)
            if value.ndim < 2:
                raise ShapeError(f"{name} must hold points", got=tuple(value.shape), expected="(..., n, dim)")
        return self._features(x, population)

    @abstractmethod
    def _features(self, x: Tensor, population: Tensor) -> Tensor:
        """Return the features of points and members whose shapes are right."""


class OwnUnits(Surroundings):
    r"""Where a point lies in its population: its way from the mean, and the score of the Gaussian law with mean and covariance.

    .. math:: x-\bar x,\qquad -\hat\Sigma^{-1}(x-\bar x)

    An embedding of the population (:class:`SetEncoder`) holds the same moments, but a network then has to learn to divide by them. The
    covariance has a thousandth of the mean variance added in all directions, so that flat populations have a score too.

    Args:
        dim: The number of components of a point.

    Attributes:
        out: The number of components of what is returned, ``2 dim``.

    Raises:
        InvalidInputError: If the dimension isn't a positive integer.

    Example:
        >>> OwnUnits(2)(torch.zeros(5, 2), torch.randn(100, 2)).shape
        torch.Size([5, 4])
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, 2 * dim)

    def _features(self, x: Tensor, population: Tensor) -> Tensor:
        mean = population.mean(-2, keepdim=True)
        centred = population - mean
        covariance = centred.mT @ centred / population.shape[-2]
        width = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        # a population of equal points has no width: then that of all data counts, which is one
        ridge = _RIDGE * torch.where(width > 0, width, torch.ones_like(width))
        own = covariance + ridge * torch.eye(self.dim, dtype=x.dtype, device=x.device)
        away = x - mean
        return torch.cat([away, -torch.linalg.solve(own, away.mT).mT], -1)


class KernelMeans(Surroundings):
    r"""The density of a population around a point and the way to its mean there, for Gaussian kernels of several learnt widths.

    .. math::
        \log\hat p_h(x)=\log\tfrac1m\sum_je^{-|x-x_j|^2/2h^2},\qquad
        \delta_h(x)=\sum_jw_j\,x_j-x=h^2\,\nabla\log\hat p_h(x),\qquad w_j\propto e^{-|x-x_j|^2/2h^2}

    An embedding of a whole population (:class:`SetEncoder`) tells a flow which of the populations of the training a new one is
    like, and little of one that is like none. What these means tell is true of every population: at a small width :math:`\delta_h` is the
    score of the sample, which is what removing noise takes. For every width it returns :math:`\delta_h/\sqrt{h^2+|\delta_h|^2}` and
    :math:`\tanh(\tfrac14\log\hat p_h)`, which are bounded, so that points far from the population do no harm.

    They are nonlinear in the sample, and see the noise of a small one: use about as many points as in training, or more. The cost is the
    product of the numbers of points and of members. In many dimensions kernels are empty: use it up to ten or so.

    Args:
        dim: The number of components of a point.
        num_scales: The number of widths, which begin between a tenth and eight tenths of the spread of the data.

    Attributes:
        out: The number of components of what is returned.

    Raises:
        InvalidInputError: If a number isn't a positive integer.

    Example:
        >>> means = KernelMeans(2, num_scales=3)
        >>> means(torch.zeros(5, 2), torch.randn(100, 2)).shape
        torch.Size([5, 9])

    Reference:
        D. Comaniciu and P. Meer, "Mean shift: a robust approach toward feature space analysis", 2002.
    """

    def __init__(self, dim: int, num_scales: int = 4) -> None:
        check_positive_int(dim, "dim")
        check_positive_int(num_scales, "num_scales")
        super().__init__(dim, num_scales * (dim + 1))
        self.log_widths = nn.Parameter(torch.linspace(math.log(0.1), math.log(0.8), num_scales))

    def _features(self, x: Tensor, population: Tensor) -> Tensor:
        rows = max(1, _ENTRIES // population[..., 0].numel())
        if torch.is_grad_enabled() or x.shape[-2] <= rows:
            return self._means(x, population)
        return torch.cat([self._means(part, population) for part in x.split(rows, -2)], -2)

    def _means(self, x: Tensor, sample: Tensor) -> Tensor:
        # From the members' mean on, products lose no digits where a population lies far from the origin.
        centre = sample.mean(-2, keepdim=True)
        x, members = x - centre, sample - centre
        size = x.square().sum(-1, keepdim=True) + members.square().sum(-1).unsqueeze(-2)
        square = (size - 2 * x @ members.mT).clamp(min=0)
        parts = []
        for log_width in self.log_widths:
            width = log_width.exp().square()
            exponent = -0.5 * square / width
            total = exponent.logsumexp(-1, keepdim=True)
            shift = (exponent - total).exp() @ members - x
            parts += [
                shift * (width + shift.square().sum(-1, keepdim=True)).rsqrt(),
                (0.25 * (total - math.log(sample.shape[-2]))).tanh(),
            ]
        return torch.cat(parts, -1)
