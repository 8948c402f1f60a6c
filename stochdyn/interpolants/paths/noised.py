"""Exact marginals of a noising process started from a mixture of Gaussians: the truth to test against."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    check_event_size,
    check_floating,
    check_ndim,
    check_positive,
    check_real,
)
from stochdyn.core.forward.flow import MarginalFlow, as_time
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.errors import ShapeError, SingularDiffusionError
from stochdyn.interpolants.paths.gaussian_mixture import mixture_parts
from stochdyn.interpolants.paths.processes import AffineProcess, check_process

__all__ = ["NoisedMixture"]


class NoisedMixture(MarginalFlow):
    r"""Marginals of an affine process whose start is a mixture of Gaussians.

    .. math:: p_t=\sum_kw_kN\big(\mu+a_t(m_k-\mu),\ a_t^2C_k+\sigma_t^2I\big)

    Every covariance is diagonalised once, so a time costs no factorisation, and everything is in the log
    domain.

    Args:
        process: The noising process.
        weights: The weights of the components, ``(K,)``, positive; they are normalised.
        means: The means of the components, ``(K, d)``.
        covariances: ``(K, d, d)``, ``(K, d)`` variances, or ``(K,)`` of multiples of the identity. Singular ones are
            allowed (points have variance 0), and have a density from any positive time on.

    Raises:
        ShapeError: If sizes don't fit.
        InvalidInputError: If a weight isn't positive.
        SingularDiffusionError: If a covariance has a negative eigenvalue.

    Example:
        >>> from stochdyn.interpolants import OU
        >>> truth = NoisedMixture(OU(), torch.ones(2), torch.tensor([[-1.0], [1.0]]), torch.full((2,), 0.1))
        >>> truth.score(0.5, torch.zeros(1, 1)).abs()
        tensor([[0.]])
    """

    log_weights: Tensor
    means: Tensor
    eigenvalues: Tensor
    eigenvectors: Tensor

    def __init__(self, process: AffineProcess, weights: Tensor, means: Tensor, covariances: Tensor) -> None:
        super().__init__()
        self.process = check_process(process)
        weights, means, covariances = (
            as_tensor(value, name)
            for name, value in (("weights", weights), ("means", means), ("covariances", covariances))
        )
        check_ndim(means, 2, "means", "(K, d)")
        check_positive(weights, "weights")
        k, d = means.shape
        for value, name in ((weights, "weights"), (covariances, "covariances")):
            if value.ndim == 0 or value.shape[0] != k:
                raise ShapeError(f"{name} need one entry per component", got=tuple(value.shape), expected=k)
        check_ndim(weights, 1, "weights", "(K,)")
        check_ndim(covariances, (1, 2, 3), "covariances", "(K, d, d), (K, d) or (K,)")
        if covariances.ndim == 3:
            values, vectors = torch.linalg.eigh(covariances.expand(k, d, d))
        else:
            values = covariances.reshape(k, -1).expand(k, d)
            vectors = torch.eye(d, dtype=means.dtype, device=means.device).expand(k, d, d)
        if bool((values < -1e-6 * values.abs().amax()).any()):
            raise SingularDiffusionError(
                "covariances must have no negative eigenvalue", got=values.min().item()
            )
        self.register_buffer("log_weights", (weights / weights.sum()).log().to(means))
        self.register_buffer("means", means)
        self.register_buffer("eigenvalues", values.clamp(min=0).to(means))
        self.register_buffer("eigenvectors", vectors.to(means))

    @classmethod
    def of_law(cls, process: AffineProcess, law: Any) -> NoisedMixture:
        """Return the marginals from a :class:`GaussianMixture`, or a Gaussian or mixture of torch's distributions."""
        return cls(process, *mixture_parts(law, "law"))

    def _components(self, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return coordinates along the axes and variances ``(..., K, d)``, and the log joint ``(..., K)``."""
        x = as_tensor(x, "x", like=self.means, finite=False)
        check_event_size(x, self.means.shape[1], "x")
        check_floating(x)
        time = as_time(t, x).to(x.dtype)
        self.process.check_times(time)
        leading = time.unsqueeze(-1) if time.ndim else time
        means, vectors = self.means.to(x.dtype), self.eigenvectors.to(x.dtype)
        # component k at time t is N(mu + a (m_k - mu), V_k diag(a^2 l_k + sigma^2) V_k^T): in its own axes all is diagonal
        shift = x.unsqueeze(-2) - self.process.location(leading, means)
        along = (shift.unsqueeze(-2) @ vectors).squeeze(-2)
        variance = self.process.scale(leading).square() * self.eigenvalues.to(x.dtype)
        variance = (variance + self.process.variance(leading)).expand_as(along)
        logs = -0.5 * (along.square() / variance + variance.log()).sum(-1)
        joint = logs + self.log_weights.to(x.dtype) - 0.5 * x.shape[-1] * math.log(2 * math.pi)
        return along, variance, joint

    def log_prob(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the log density ``(...)`` of the law at a time, at points ``(..., d)``."""
        return self._components(t, x)[2].logsumexp(-1)

    def score(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the score ``(..., d)`` of the law at a time, at points ``(..., d)``."""
        along, variance, joint = self._components(t, x)
        # s = -sum_k p(k | x) C_k^{-1} (x - m_k)
        pull = self.eigenvectors.to(x.dtype) @ (along / variance).unsqueeze(-1)
        return -(pull.squeeze(-1) * joint.softmax(-1).unsqueeze(-1)).sum(-2)

    def sample(
        self, t: Tensor | float, sample_shape: SampleShape = (), generator: Generator = None
    ) -> Tensor:
        """Draw points from the law at a time."""
        own = as_sample_shape(sample_shape)
        if not isinstance(t, Tensor):
            check_real(t, "t")
        time = t if isinstance(t, Tensor) else torch.tensor(float(t))
        generator = as_generator(generator, self.means.device)
        shape = (*time.shape, math.prod(own))
        device = self.means.device
        pick = torch.multinomial(
            self.log_weights.exp(), math.prod(shape), replacement=True, generator=generator
        ).reshape(shape)
        d = self.means.shape[1]
        dtype = torch.promote_types(self.means.dtype, time.dtype)
        normal = torch.randn(*shape, d, dtype=dtype, device=device, generator=generator)
        noise = torch.randn(*shape, d, dtype=dtype, device=device, generator=generator)
        root = self.eigenvectors.to(dtype) * self.eigenvalues.to(dtype).sqrt().unsqueeze(-2)
        x0 = self.means.to(dtype)[pick] + (root[pick] @ normal.unsqueeze(-1)).squeeze(-1)
        leading = time.to(dtype)[..., None, None] if time.ndim else time.to(dtype)
        return self.process.perturb(leading, x0, noise).reshape(*time.shape, *own, d)
