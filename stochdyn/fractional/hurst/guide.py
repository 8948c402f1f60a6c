"""The Pyro model of a series with unknown Hurst index, and a guide shaped like its exact posterior."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch.distributions.transforms import AffineTransform, PowerTransform, SigmoidTransform

from stochdyn.fractional.exact.fgn import FractionalGaussianNoise
from stochdyn.fractional.exact.likelihood import HURST_LIMITS, FGNFit, HurstLikelihood
from stochdyn.infer.skewed import SinhArcsinh

__all__ = ["HurstGuide", "hurst_model"]

_PRIOR_WIDTH = 10.0
_TAIL = 0.2


def hurst_model(likelihood: HurstLikelihood) -> None:
    r"""Pyro model of a series of stationary increments as fractional Gaussian noise.

    .. math::
        H\sim U(0,1),\quad \mu\sim N(\bar y,(10s)^2),\quad
        \log\sigma\sim N(\log s-\tfrac12\log\Delta,\tau^2),\quad y\sim \mathrm{fGn}(H,\mu,\sigma),

    with :math:`\bar y` and s the sample mean and standard deviation and
    :math:`\tau=1+\tfrac12|\log\Delta|`: weak priors, relative to the data.

    Args:
        likelihood: The tabulated likelihood of the series.

    Example:
        >>> from pyro import poutine
        >>> from stochdyn.datasets import nile_minima
        >>> table = HurstLikelihood(nile_minima().level)
        >>> sorted(poutine.trace(hurst_model).get_trace(table).stochastic_nodes)
        ['hurst', 'mean_standardised', 'scale']
    """
    series = likelihood.series
    center, spread = series.mean(), series.std()
    log_step = math.log(likelihood.dt)
    hurst = pyro.sample("hurst", dist.Uniform(series.new_tensor(HURST_LIMITS[0]), HURST_LIMITS[1]))
    # in units of the spread, so that all coordinates of the guide are of order one
    standard = pyro.sample("mean_standardised", dist.Normal(series.new_tensor(0.0), _PRIOR_WIDTH))
    mean = pyro.deterministic("mean", center + spread * standard)
    scale = pyro.sample("scale", dist.LogNormal(spread.log() - 0.5 * log_step, 1.0 + 0.5 * abs(log_step)))
    law = FractionalGaussianNoise(hurst, mean, scale, len(series), likelihood.dt, likelihood)
    pyro.sample("series", law, obs=series)


class HurstGuide(PyroModule):
    r"""Structured guide of :func:`hurst_model`, factored like the exact posterior.

    .. math::
        \operatorname{logit}H &= a+b\,S(\epsilon_1),\\
        \sigma\mid H &= \hat\sigma(H)\,e^c(1+d\,\epsilon_2)^{-3/2},\\
        \mu\mid H,\sigma &\sim p(\mu\mid H,\sigma,y),

    with standard normal :math:`\epsilon`, S the skewing map :class:`~stochdyn.infer.skewed.SinhArcsinh` with skewness s, and
    :math:`\hat\sigma(H)` the maximum given H. :func:`~stochdyn.fractional.infer_hurst` is exact; take this guide as an example of a
    structured one, or for a model of your own around one series. The first law is
    skewed, which matters near H = 1, and has tails a little heavier than the posterior's on purpose, so that
    importance weights stay bounded; the second is the Wilson-Hilferty form of a gamma precision; the third is
    exact, the model being Gaussian in the mean. So neither the correlation of index and scale nor the width
    of the mean, which grows with the index, is left to be learnt.

    Reference:
        M. C. Jones and A. Pewsey, Sinh-arcsinh distributions, Biometrika 96, 2009.

    Args:
        likelihood: The tabulated likelihood of the series.
        start: The maximum-likelihood fit, where the guide begins, as wide as the Laplace approximation.
    """

    def __init__(self, likelihood: HurstLikelihood, start: FGNFit) -> None:
        super().__init__()
        margin = 1e-3
        hurst = min(max(start.hurst, margin), 1 - margin)
        width = min(max(start.stderr / (hurst * (1 - hurst)), 1e-3), 1.0)
        begin = [
            math.log(hurst / (1 - hurst)),
            math.log(width),
            0.0,
            0.0,
            0.5 * math.log(2 / (9 * len(likelihood.series))),
        ]
        self.unconstrained = torch.nn.Parameter(torch.tensor(begin, dtype=torch.float64))

    def forward(self, likelihood: HurstLikelihood) -> None:
        """Sample all latent sites."""
        a, log_b, skew, c, log_d = self.unconstrained
        low, high = HURST_LIMITS
        to_hurst = [
            SinhArcsinh(skew, _TAIL),
            AffineTransform(a, log_b.exp()),
            SigmoidTransform(),
            AffineTransform(low, high - low),
        ]
        standard = dist.Normal(torch.zeros_like(a), 1.0)
        center, spread, minus_three_halves = (
            likelihood.series.mean(),
            likelihood.series.std(),
            a.new_tensor(-1.5),
        )
        hurst = pyro.sample("hurst", dist.TransformedDistribution(standard, to_hurst))
        best_scale, best_mean, deviation = likelihood.conditional(hurst)
        # 1/sigma^2 is nearly a gamma variable, so its cube root nearly normal (Wilson and Hilferty)
        width = log_d.exp()
        to_scale = [
            AffineTransform(1.0, width),
            PowerTransform(minus_three_halves),
            AffineTransform(0.0, best_scale * c.exp()),
        ]
        scale = pyro.sample("scale", dist.TransformedDistribution(standard, to_scale))
        deviation = deviation * scale / spread
        precision = deviation**-2 + _PRIOR_WIDTH**-2
        pull = (best_mean - center) / spread * deviation**-2 / precision
        pyro.sample("mean_standardised", dist.Normal(pull, precision.rsqrt()))
