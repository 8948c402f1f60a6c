"""Heavy-tailed noise: the Student-t kernel that turns a diffusion sampler into PFGM++."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    check_floating,
    check_nonempty,
    check_positive,
    check_real,
)

__all__ = ["StudentKernel"]


class StudentKernel:
    r"""Perturbation kernel of an electric field in ``D`` extra dimensions: a multivariate Student-t.

    .. math::
        p_r(x\mid y)\propto\big(|x-y|^2+r^2\big)^{-(N+D)/2},\quad r=\sigma\sqrt D
        \iff x=y+\sigma z\Big/\sqrt{\chi^2_D/D}

    with ``z`` standard normal: ``D`` degrees of freedom at scale ``sigma``. ``D = 1`` is the Poisson flow, ``D`` to infinity
    Gaussian diffusion.

    Args:
        degrees: The degrees of freedom D, positive; ``math.inf`` for the Gaussian.

    Raises:
        InvalidInputError: If the number isn't positive.

    Example:
        >>> StudentKernel(4.0).perturb(torch.zeros(3, 2), 0.5, torch.Generator().manual_seed(0)).shape
        torch.Size([3, 2])

    Reference:
        Xu et al., "PFGM++: unlocking the potential of physics-inspired generative models", 2023, equation 3 and
        appendix B.
    """

    def __init__(self, degrees: float) -> None:
        if not (isinstance(degrees, float) and math.isinf(degrees) and degrees > 0):
            check_real(degrees, "degrees", above=0.0)
        self.degrees = float(degrees)

    def perturb(
        self, y: Tensor, sigma: Tensor | float, generator: torch.Generator | int | None = None
    ) -> Tensor:
        """Draw a perturbed point for every ``y (..., d)``; ``sigma`` broadcasts to ``y[..., :1]``."""
        check_floating(y, "y")
        check_nonempty(y, "y")
        check_positive(sigma, "sigma")
        generator = as_generator(generator, y.device)
        z = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator)
        return y + sigma * z * self._stretch(y, generator)

    def _stretch(self, y: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return ``1 / sqrt(chi2_D / D)`` for every point, ``(..., 1)``."""
        shape = (*y.shape[:-1], 1)
        if math.isinf(self.degrees):
            return y.new_ones(shape)
        half = torch.full(shape, 0.5 * self.degrees, dtype=y.dtype, device=y.device)
        gamma = torch._standard_gamma(half, generator=generator)  # chi2 = 2 gamma(D / 2)
        return (gamma / half).clamp(min=torch.finfo(y.dtype).tiny).rsqrt()

    def log_prob(self, x: Tensor, y: Tensor, sigma: Tensor | float) -> Tensor:
        """Return the log density ``(...)`` of ``x`` given ``y``, both ``(..., d)``."""
        n, d = x.shape[-1], self.degrees
        scale = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        scale = scale.squeeze(-1) if scale.ndim else scale
        squared = ((x - y).square().sum(-1)) / scale.square()
        if math.isinf(d):
            return -0.5 * squared - n * scale.log() - 0.5 * n * math.log(2 * math.pi)
        constant = math.lgamma(0.5 * (n + d)) - math.lgamma(0.5 * d) - 0.5 * n * math.log(d * math.pi)
        return constant - n * scale.log() - 0.5 * (n + d) * torch.log1p(squared / d)

    def score(self, x: Tensor, y: Tensor, sigma: Tensor | float) -> Tensor:
        r"""Return :math:`-(N+D)(x-y)/(|x-y|^2+\sigma^2D)`, the gradient of the log density, ``(..., d)``."""
        scale = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
        shift, n = x - y, x.shape[-1]
        if math.isinf(self.degrees):
            return -shift / scale.square()
        return (
            -(n + self.degrees)
            * shift
            / (shift.square().sum(-1, keepdim=True) + scale.square() * self.degrees)
        )
