"""Fractional Gaussian noise as a Pyro distribution."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import constraints
from torch import Tensor

from stochdyn._checks import (
    as_tensor,
    check_event_size,
    check_finite,
    check_hurst,
    check_positive,
    check_positive_int,
    values_are_checked,
)
from stochdyn.errors import InvalidInputError
from stochdyn.fractional.exact.fbm import fgn_autocovariance, sample_fgn
from stochdyn.fractional.exact.likelihood import HurstLikelihood
from stochdyn.infer.law_distribution import LawDistribution

__all__ = ["FractionalGaussianNoise"]


class FractionalGaussianNoise(LawDistribution):
    r"""Fractional Gaussian noise: increments of scaled fractional Brownian motion, plus a mean.

    .. math::
        y\sim N(\mu1,\Sigma),\qquad
        \Sigma_{ij}=\tfrac12\sigma^2\Delta^{2H}\left(|i-j+1|^{2H}-2|i-j|^{2H}+|i-j-1|^{2H}\right).

    Samples are drawn exactly by circulant embedding and are differentiable in all parameters. The density is
    exact too: by Cholesky factorisation, :math:`O(n^3)` a Hurst index, or in microseconds for one series
    tabulated beforehand by :class:`~stochdyn.fractional.HurstLikelihood`.

    Args:
        hurst: Hurst index in (0, 1), ``(*batch)``.
        mean: The expectation ``(*batch)`` of one increment.
        scale: The standard deviation of an increment over unit time, ``(*batch)``.
        num_steps: The number n of increments; the event shape is ``(n,)``.
        dt: The time between the ends of an increment.
        likelihood: The table of the observed series. The density of any other value is computed as usual.
        validate_args: Whether arguments are checked; None takes torch's setting.

    Raises:
        HurstRangeError: If ``hurst`` lies outside (0, 1).
        InvalidInputError: If ``scale`` isn't positive, or ``likelihood`` has another length or dt.

    Example:
        >>> noise = FractionalGaussianNoise(0.8, 0.0, 1.0, num_steps=50)
        >>> noise.event_shape, noise.log_prob(torch.zeros(50)).shape
        (torch.Size([50]), torch.Size([]))

    Reference:
        B. Mandelbrot and J. Van Ness, SIAM Review 10(4), 1968.
    """

    arg_constraints = {  # noqa: RUF012 (torch's protocol)
        "hurst": constraints.unit_interval,
        "mean": constraints.real,
        "scale": constraints.positive,
    }
    support = constraints.real_vector
    has_rsample = True
    _carried = ("num_steps", "dt", "likelihood", "_dtype")
    _batched = ("hurst", "mean_value", "scale")

    def __init__(
        self,
        hurst: Tensor | float,
        mean: Tensor | float,
        scale: Tensor | float,
        num_steps: int,
        dt: float = 1.0,
        likelihood: HurstLikelihood | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_hurst(hurst)
        check_positive(scale, "scale")
        check_positive(dt, "dt")
        check_positive_int(num_steps, "num_steps")
        if likelihood is not None and (likelihood.series.shape[0] != num_steps or likelihood.dt != dt):
            raise InvalidInputError(
                "likelihood is the table of another kind of series",
                got=f"num_steps={likelihood.series.shape[0]}, dt={likelihood.dt:g}",
                expected=f"num_steps={num_steps}, dt={dt:g}",
            )
        if values_are_checked():
            check_finite(mean if isinstance(mean, Tensor) else as_tensor(mean, "mean"), "mean")
        given = [v for v in (mean, scale, hurst) if isinstance(v, Tensor) and v.is_floating_point()]
        dtype = given[0].dtype if given else torch.get_default_dtype()
        device = given[0].device if given else None
        # numbers are taken in full precision; results have that of the mean and scale
        tensors = (
            v if isinstance(v, Tensor) else torch.as_tensor(v, dtype=torch.float64, device=device)
            for v in (hurst, mean, scale)
        )
        self.hurst, self.mean_value, self.scale = torch.broadcast_tensors(*tensors)
        self.num_steps, self.dt, self.likelihood, self._dtype = num_steps, dt, likelihood, dtype
        super().__init__(self.hurst.shape, torch.Size([num_steps]), validate_args=validate_args)

    @property
    def mean(self) -> Tensor:
        """``(*batch, n)``."""
        return self.mean_value.to(self._dtype)[..., None].expand(*self.batch_shape, self.num_steps)

    @property
    def variance(self) -> Tensor:
        """``(*batch, n)``."""
        deviation = self.scale * self.dt**self.hurst
        return (deviation**2).to(self._dtype)[..., None].expand(*self.batch_shape, self.num_steps)

    @property
    def covariance_matrix(self) -> Tensor:
        """``(*batch, n, n)`` in float64."""
        lags = torch.arange(self.num_steps, device=self.hurst.device)
        r = fgn_autocovariance(self.num_steps, self.hurst, self.dt)
        return r[..., (lags[:, None] - lags).abs()] * self.scale.double()[..., None, None] ** 2

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw ``(*sample_shape, *batch, n)``, exactly."""
        unit = sample_fgn(self.hurst, self.num_steps, self.dt, torch.Size(sample_shape))
        return (self.mean_value.double()[..., None] + self.scale.double()[..., None] * unit).to(self._dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of ``value (..., n)``."""
        check_event_size(value, self.num_steps, "value")
        if self._validate_args:
            check_finite(value, "value")
        table = self.likelihood
        if table is not None and value.ndim == 1 and torch.equal(value.detach().cpu().double(), table.series):
            return table(self.hurst, self.mean_value, self.scale).to(value.dtype)
        factor = torch.linalg.cholesky(self.covariance_matrix)
        centred = value.double() - self.mean_value.double()[..., None]
        law = torch.distributions.MultivariateNormal(
            torch.zeros_like(centred), scale_tril=factor, validate_args=False
        )
        return law.log_prob(centred).to(value.dtype)
