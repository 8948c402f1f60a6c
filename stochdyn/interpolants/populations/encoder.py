"""Networks of whole samples: the same for every order of the points."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from stochdyn._checks import check_bool, check_event_size, check_nonempty, check_positive_int
from stochdyn.core._distance import distance_between
from stochdyn.core.networks import MLP
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["GraphEncoder", "SampleEncoder", "SetEncoder"]


class SampleEncoder(nn.Module, ABC):
    """An embedding of a sample that doesn't depend on the order of its points.

    :class:`SetEncoder` is the one to begin with: it is quick, and the number of points changes nothing but its noise.
    :class:`GraphEncoder` sees what lies around every point as well, for populations that differ in their shape at small
    scale rather than in their moments.

    Args:
        dim: The number of components of a point.
        out: The number of components of the embedding.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        check_positive_int(dim, "dim")
        check_positive_int(out, "out")
        self.dim, self.out = dim, out

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return the embedding ``(..., out)`` of samples ``(..., n, dim)``.

        Args:
            x: The samples.
            weights: The weight of every point, ``(..., n)``, not negative, 0 for padding; None weighs all points alike.

        Raises:
            ShapeError: If points have another dimension, or another precision than the network.
            InvalidInputError: If the weights of a sample are all zero.
        """
        check_event_size(x, self.dim, "x")
        check_nonempty(x, "x")
        own = next(self.parameters()).dtype
        if x.ndim < 2 or x.dtype != own:
            raise ShapeError(
                "x must be samples (..., n, dim) in the precision of the network",
                got=f"{x.dtype} of shape {tuple(x.shape)}",
            )
        if weights is None:
            return self._embed(x, torch.full_like(x[..., :1], 1.0 / x.shape[-2]))
        total = weights.sum(-1, keepdim=True)
        if not bool((total > 0).all()):
            raise InvalidInputError("a sample needs a point with a weight", got="weights that are all zero")
        share = (weights / total).unsqueeze(-1).to(x.dtype)
        # padding may hold anything, NaN too
        return self._embed(torch.where(share > 0, x, torch.zeros_like(x)), share)

    @abstractmethod
    def _embed(self, x: Tensor, share: Tensor) -> Tensor:
        """Return the embedding for weights ``share (..., n, 1)`` that sum to one."""


class SetEncoder(SampleEncoder):
    r"""An embedding of a sample by its mean, its covariance, and means of learnt features.

    .. math:: c=W\Big[\bar x,\ \mathrm{vech}\,\overline{(x-\bar x)(x-\bar x)^\top},\ \overline{\phi_\theta(x)}\Big]

    It depends on the empirical law alone: not on the order of the points, and on their number only through the noise of
    the means. The embedding isn't normalised, since its length says how wide the sample is.

    Args:
        dim: The number of components of a point.
        out: The number of components of the embedding.
        width: The width of the network of the features, and their number.
        depth: The number of hidden layers of that network.
        moments: Whether mean and covariance are given as they are.

    Raises:
        InvalidInputError: If a size isn't a positive integer.

    Example:
        >>> encoder = SetEncoder(2, out=8)
        >>> x = torch.randn(30, 2)
        >>> torch.allclose(encoder(x), encoder(x.flip(0)), atol=1e-5)
        True

    Reference:
        Zaheer et al., "Deep sets", 2017.
    """

    def __init__(
        self, dim: int, out: int = 32, width: int = 64, depth: int = 2, moments: bool = True
    ) -> None:
        super().__init__(dim, out)
        check_positive_int(width, "width")
        check_positive_int(depth, "depth")
        check_bool(moments, "moments")
        self.moments = moments
        self.features = MLP((dim, *[width] * depth, width), activation="silu")
        self.head = nn.Linear(width + (dim + dim * (dim + 1) // 2 if moments else 0), out)

    def _embed(self, x: Tensor, share: Tensor) -> Tensor:
        pooled = [(share * self.features(x)).sum(-2)]
        if self.moments:
            pooled += _moments(x, share)
        return self.head(torch.cat(pooled, -1))


class GraphEncoder(SampleEncoder):
    r"""An embedding of a sample that sees the nearest neighbours of every point.

    .. math::
        c=W\Big[\bar x,\ \mathrm{vech}\,\mathrm{Cov}\,x,\
        \overline{\psi_\theta\big(x_i,\ \tfrac1k\textstyle\sum_{j\in N(i)}\phi_\theta(x_j-x_i)\big)}\Big]

    The distance of a point's neighbours falls with the number of points, so embed about as many as in training:
    :class:`PopulationRegression` draws between half of ``num_points`` and all of them.

    Args:
        dim: The number of components of a point.
        out: The number of components of the embedding.
        width: The width of the two networks.
        num_neighbors: The number k of neighbours of a point, itself not counted; all others where there are fewer.

    Raises:
        InvalidInputError: If a size isn't a positive integer.

    Example:
        >>> encoder = GraphEncoder(2, out=8, num_neighbors=5)
        >>> x = torch.randn(30, 2)
        >>> torch.allclose(encoder(x), encoder(x.flip(0)), atol=1e-5)
        True

    Reference:
        Atanackovic et al., "Meta flow matching", 2024, whose encoder is a graph network as well.
    """

    def __init__(self, dim: int, out: int = 32, width: int = 64, num_neighbors: int = 10) -> None:
        super().__init__(dim, out)
        check_positive_int(width, "width")
        check_positive_int(num_neighbors, "num_neighbors")
        self.num_neighbors = num_neighbors
        self.edges = MLP((dim, width, width), activation="silu")
        self.features = MLP((dim + width, width, width), activation="silu")
        self.head = nn.Linear(width + dim + dim * (dim + 1) // 2, out)

    def _embed(self, x: Tensor, share: Tensor) -> Tensor:
        n = x.shape[-2]
        real = share.squeeze(-1) > 0
        with torch.no_grad():
            # neither a point itself nor padding is a neighbour
            distance = distance_between(x, x) + torch.diag(x.new_full((n,), torch.inf))
            distance = distance.masked_fill(~real.unsqueeze(-2), torch.inf)
            nearest = distance.topk(min(self.num_neighbors, max(n - 1, 1)), largest=False)
            exists = torch.isfinite(nearest.values).unsqueeze(-1).to(x.dtype)
        index = nearest.indices
        rows = x.unsqueeze(-3).expand(*x.shape[:-2], n, n, self.dim)
        near = rows.gather(-2, index.unsqueeze(-1).expand(*index.shape, self.dim))
        messages = self.edges(near - x.unsqueeze(-2)) * exists
        mean = messages.sum(-2) / exists.sum(-2).clamp(min=1.0)
        pooled = (share * self.features(torch.cat([x, mean], -1))).sum(-2)
        return self.head(torch.cat([pooled, *_moments(x, share)], -1))


def _moments(x: Tensor, share: Tensor) -> list[Tensor]:
    """Return the weighted mean ``(..., d)`` and the upper triangle of the covariance of samples ``(..., n, d)``."""
    mean = (share * x).sum(-2)
    centred = x - mean.unsqueeze(-2)
    covariance = (share * centred).mT @ centred
    i, j = torch.triu_indices(x.shape[-1], x.shape[-1], device=x.device)
    return [mean, covariance[..., i, j]]
