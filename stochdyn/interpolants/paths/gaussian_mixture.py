"""Gaussian mixtures as distributions: the ends of interpolants whose every density is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, MultivariateNormal, Normal

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    check_finite,
    check_nonempty,
    check_same_device,
    check_same_dtype,
)
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.errors import InvalidInputError, ShapeError, SingularDiffusionError

__all__ = ["GaussianMixture", "mixture_parts"]


class GaussianMixture(MixtureSameFamily):
    r"""A mixture of Gaussians with full covariances.

    .. math:: \rho(x)=\sum_kp_k\,N(x;m_k,C_k)

    Args:
        weights: The weights of the components, ``(K,)``, not negative, with sum one.
        means: The means of the components, ``(K, d)``.
        covariances: ``(K, d, d)``; ``(d, d)`` for one that all share; a number or ``(K,)`` for multiples of the
            identity, or ``(K, d)`` for diagonals.

    Raises:
        InvalidInputError: If the weights don't sum to one, or one is negative.
        ShapeError: If shapes don't fit together.
        SingularDiffusionError: If a covariance isn't symmetric and positive definite.

    Example:
        >>> law = GaussianMixture(torch.tensor([0.5, 0.5]), torch.tensor([[-2.0], [2.0]]), 0.1)
        >>> law.sample((3,)).shape
        torch.Size([3, 1])
    """

    def __init__(self, weights: Tensor, means: Tensor, covariances: Tensor | float) -> None:
        weights, means, full = _checked(weights, means, covariances)
        super().__init__(
            Categorical(weights, validate_args=False),
            MultivariateNormal(means, full, validate_args=False),
            validate_args=False,
        )
        self.weights, self.means, self.covariances = weights, means, full

    def sample(self, sample_shape: SampleShape = ()) -> Tensor:
        """Draw ``(*sample_shape, d)`` from torch's global source of randomness."""
        return super().sample(torch.Size(as_sample_shape(sample_shape)))

    def draw(self, sample_shape: SampleShape = (), generator: Generator = None) -> Tensor:
        """Draw ``(*sample_shape, d)``, from a source of randomness of its own: a ``torch.Generator``, a seed, or None."""
        shape, source = as_sample_shape(sample_shape), as_generator(generator, self.means.device)
        count = torch.Size(shape).numel()
        pick = torch.multinomial(self.weights, count, replacement=True, generator=source).reshape(shape)
        noise = torch.randn(
            *shape,
            self.means.shape[-1],
            1,
            dtype=self.means.dtype,
            device=self.means.device,
            generator=source,
        )
        # the covariances share one Cholesky factor per component, drawn from by index
        factor = self.component_distribution.scale_tril  # type: ignore[attr-defined]
        return self.means[pick] + (factor[pick] @ noise).squeeze(-1)


def _checked(weights: Tensor, means: Tensor, covariances: Tensor | float) -> tuple[Tensor, Tensor, Tensor]:
    for name, value in (("weights", weights), ("means", means)):
        if isinstance(value, Tensor) and not value.is_floating_point():
            raise InvalidInputError(f"{name} must be floating", got=value.dtype)
    means = as_tensor(means, "means", 2, "(K, d)", finite=False)
    weights = as_tensor(weights, "weights", 1, "(K,)", like=means, finite=False)
    check_nonempty(means, "means")
    check_finite(means, "means")
    check_finite(weights, "weights")
    count, dim = means.shape
    if weights.shape[0] != count:
        raise ShapeError("a mixture needs one weight per mean", got=weights.shape[0], expected=count)
    total = float(weights.sum())
    if bool((weights < 0).any()) or abs(total - 1) > 1e-5:
        raise InvalidInputError(
            "weights must be non-negative and sum to one",
            got=f"sum {total:.6g}, minimum {float(weights.min()):g}",
            hint="divide them by their sum",
        )
    if not isinstance(covariances, Tensor):
        covariances = as_tensor(covariances, "covariances", like=means).to(means)
    elif not covariances.is_floating_point():
        raise InvalidInputError("covariances must be floating", got=covariances.dtype)
    full = _full(covariances, count, dim)
    check_same_dtype(weights=weights, means=means, covariances=full)
    check_same_device(weights=weights, means=means, covariances=full)
    check_finite(full, "covariances")
    symmetric = bool((full - full.mT).abs().amax() <= 1e-5 * full.abs().amax())
    if not symmetric or bool((torch.linalg.cholesky_ex(full).info != 0).any()):
        raise SingularDiffusionError(
            "covariances must be symmetric and positive definite",
            got=f"least eigenvalue {float(torch.linalg.eigvalsh(full).amin()):.3g}",
            hint="a law on a subspace has no density: add a small multiple of the identity",
        )
    return weights / weights.sum(), means, full


def _full(covariances: Tensor, count: int, dim: int) -> Tensor:
    eye = torch.eye(dim, dtype=covariances.dtype, device=covariances.device)
    shape = tuple(covariances.shape)
    if shape in ((), (count,)):
        return (covariances[..., None, None] * eye).expand(count, dim, dim)
    if shape == (count, dim) and shape != (dim, dim):
        return torch.diag_embed(covariances)
    if shape in ((dim, dim), (count, dim, dim)):
        return covariances.expand(count, dim, dim)
    raise ShapeError(
        "covariances don't fit the means",
        got=f"shape {shape}",
        expected=f"({count}, {dim}, {dim}), ({dim}, {dim}), ({count},) or a number",
    )


def mixture_parts(law: Any, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights ``(K,)``, means ``(K, d)`` and covariances ``(K, d, d)`` of a Gaussian or a mixture of them.

    Args:
        law: A :class:`GaussianMixture`; torch's ``MultivariateNormal``, ``Independent(Normal)``, or
            ``MixtureSameFamily`` of these, without batch axes; or a triple of tensors.
        name: The name of the argument, for the error.

    Raises:
        InvalidInputError: If the law is none of these.
    """
    if isinstance(law, GaussianMixture):
        return law.weights, law.means, law.covariances
    if isinstance(law, tuple | list) and len(law) == 3:
        made = GaussianMixture(*law)
        return made.weights, made.means, made.covariances
    weights, part = None, law
    if isinstance(law, MixtureSameFamily):
        weights, part = law.mixture_distribution.probs, law.component_distribution
    covariance: Tensor | None = None
    if isinstance(part, MultivariateNormal):
        covariance = part.covariance_matrix
    elif isinstance(part, Independent) and isinstance(part.base_dist, Normal) and len(part.event_shape) == 1:
        covariance = torch.diag_embed(part.base_dist.variance)
    if covariance is None:
        raise InvalidInputError(
            f"{name} must be a Gaussian or a mixture of Gaussians",
            got=type(law).__name__,
            expected="GaussianMixture, MultivariateNormal, Independent(Normal) or MixtureSameFamily of them",
        )
    means = part.mean
    if weights is None:
        weights, means, covariance = means.new_ones(1), means[None], covariance[None]
    made = GaussianMixture(weights, means, covariance)
    return made.weights, made.means, made.covariances
