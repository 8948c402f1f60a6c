"""A network of whole samples: the same for every order of the points."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stochdyn._checks import check_bool, check_event_size, check_nonempty, check_positive_int
from stochdyn.core.networks import MLP
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["SetEncoder"]


class SetEncoder(nn.Module):
    r"""An embedding of a sample by its mean, its covariance, and means of learnt features.

    .. math:: c=W\Big[\bar x,\ \mathrm{vech}\,\overline{(x-\bar x)(x-\bar x)^\top},\ \overline{\phi_\theta(x)}\Big]

    It depends on the empirical law alone: not on the order of the points, and on their number only through the noise of
    the means. The embedding isn't normalised, since its length says how wide the sample is.

    Args:
        dim: the number of components of a point.
        out: the number of components of the embedding.
        width: the width of the network of the features, and their number.
        depth: the number of hidden layers.
        moments: whether mean and covariance are given as they are.

    Raises:
        InvalidInputError: for sizes that aren't positive integers.

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
        super().__init__()
        for name, size in (("dim", dim), ("out", out), ("width", width), ("depth", depth)):
            check_positive_int(size, name)
        check_bool(moments, "moments")
        self.dim, self.out, self.moments = dim, out, moments
        self.features = MLP((dim, *[width] * depth, width), activation="silu")
        self.head = nn.Linear(width + (dim + dim * (dim + 1) // 2 if moments else 0), out)

    def forward(self, x: Tensor, weights: Tensor | None = None) -> Tensor:
        """Return ``(..., out)`` for samples ``(..., n, dim)``.

        Args:
            x: the samples.
            weights: ``(..., n)``, not negative: the weight of every point, 0 for padding; equal if None.

        Raises:
            ShapeError: if points have another dimension.
            InvalidInputError: if the weights of a sample are all zero.
        """
        check_event_size(x, self.dim, "x")
        check_nonempty(x, "x")
        if x.ndim < 2 or x.dtype != self.head.weight.dtype:
            raise ShapeError(
                "x must be samples (..., n, dim) in the precision of the network",
                got=f"{x.dtype} of shape {tuple(x.shape)}",
            )
        if weights is None:
            share = torch.full_like(x[..., :1], 1.0 / x.shape[-2])
        else:
            total = weights.sum(-1, keepdim=True)
            if not bool((total > 0).all()):
                raise InvalidInputError(
                    "a sample needs a point with a weight", got="weights that are all zero"
                )
            share = (weights / total).unsqueeze(-1).to(x.dtype)
            # padding may hold anything
            x = torch.where(share > 0, x, torch.zeros_like(x))
        pooled = [(share * self.features(x)).sum(-2)]
        if self.moments:
            mean = (share * x).sum(-2)
            centred = x - mean.unsqueeze(-2)
            covariance = (share * centred).mT @ centred
            i, j = torch.triu_indices(self.dim, self.dim, device=x.device)
            pooled += [mean, covariance[..., i, j]]
        return self.head(torch.cat(pooled, -1))
