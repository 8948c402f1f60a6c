"""Networks of a latent SDE: drift, diagonal diffusion, decoder, heads of posteriors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_tensor,
    check_bool,
    check_callable,
    check_positive,
    check_positive_int,
    check_same_dtype,
)
from stochdyn.core.networks import MLP, StateNetwork
from stochdyn.core.sde.coefficients import Diagonal
from stochdyn.core.sde.noise import NoiseProcess
from stochdyn.fractional.latent.series import Series
from stochdyn.fractional.latent.units import DataUnits
from stochdyn.fractional.noise.markov import MarkovNoise

__all__ = [
    "ConstantDiffusion",
    "ContextHead",
    "GaussianDecoder",
    "StateDiffusion",
    "StateDrift",
    "interpolate",
]

_SMALLEST = 1e-3


class StateDrift(nn.Module):
    r"""A learnt drift that doesn't see the time, :math:`b(x)=N(x)/T`.

    Args:
        dim: The number d of components of the state.
        hidden: The widths of the hidden layers.
        span: The time T in which drifts are counted.
    """

    def __init__(self, dim: int, hidden: Sequence[int], span: float) -> None:
        super().__init__()
        self.net = StateNetwork(dim, hidden=hidden, time=False)
        self.span = span

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift at ``x (..., d)``."""
        drift: Tensor = self.net(t, x) / self.span
        return drift


class _LearntDiffusion(nn.Module):
    r"""A learnt strength in units of :math:`T^{-H}`: how far the noise of index H takes the state in the time T is what is learnt.

    Args:
        noise: The noise, which has the index where it is fractional; 1/2 for all others.
        span: The time T.
    """

    def __init__(self, noise: NoiseProcess | None, span: float) -> None:
        super().__init__()
        # not registered: the noise is the equation's
        self._noise, self.span = (noise,), span

    def _unit(self, strength: Tensor) -> Tensor:
        noise = self._noise[0]
        hurst = noise.hurst.to(strength) if isinstance(noise, MarkovNoise) else 0.5
        return strength * self.span**-hurst


class ConstantDiffusion(_LearntDiffusion):
    r"""A learnt diagonal diffusion that is the same everywhere, :math:`\sigma_i=T^{-H_i}\,\mathrm{softplus}(s_i)`.

    Args:
        dim: The number d of components of the state.
        strength: The strength at the start of training.
        noise: The noise, which has the index H where it is fractional.
        span: The time T in which the strength is counted.
    """

    def __init__(
        self, dim: int, strength: float = 0.5, *, noise: NoiseProcess | None = None, span: float = 1.0
    ) -> None:
        super().__init__(noise, span)
        self.raw = nn.Parameter(torch.full((dim,), strength).expm1().log())

    def forward(self, t: Tensor, x: Tensor) -> Diagonal:
        """Return the coefficient."""
        return Diagonal(self._unit(F.softplus(self.raw).to(x.dtype) + _SMALLEST))


class StateDiffusion(_LearntDiffusion):
    r"""A learnt diagonal diffusion in which each component sees its own state, :math:`\sigma_i(x_i)`.

    This noise commutes, so Heun's and Milstein's schemes serve it. With a noise of instantaneous variance
    :math:`(\sum_kw_k)^2dt` their Itô correction is :math:`\tfrac12\sigma_i\sigma_i'(\sum_kw_k)^2`.

    Args:
        dim: The number d of components of the state.
        width: The number of hidden units per component.
        strength: The strength at the start of training, at all states.
        noise: The noise, which has the index H where it is fractional.
        span: The time T in which the strength is counted, as :math:`T^{-H}`.
    """

    def __init__(
        self,
        dim: int,
        width: int = 16,
        strength: float = 0.5,
        *,
        noise: NoiseProcess | None = None,
        span: float = 1.0,
    ) -> None:
        super().__init__(noise, span)
        self.slope = nn.Parameter(torch.randn(dim, width))
        self.shift = nn.Parameter(torch.randn(dim, width))
        self.out = nn.Parameter(torch.zeros(dim, width))
        self.level = nn.Parameter(torch.full((dim,), strength).expm1().log())

    def forward(self, t: Tensor, x: Tensor) -> Diagonal:
        """Return the coefficient at ``x (..., d)``."""
        hidden = torch.tanh(x.unsqueeze(-1) * self.slope + self.shift)
        return Diagonal(self._unit(F.softplus((hidden * self.out).sum(-1) + self.level) + _SMALLEST))


class ContextHead(nn.Module):
    """Reads coefficients of a posterior off the context: a linear map and a network on top, zero at the start.

    Close to an observation most coefficients are nearly linear in what the encoder tells of the time that is left.

    Args:
        context: The size of the context.
        size: The number of coefficients.
        width: The number of hidden units.
    """

    def __init__(self, context: int, size: int, width: int = 64) -> None:
        super().__init__()
        self.net = MLP((context, width, size), zero_last=True)
        self.skip = nn.Linear(context, size, bias=False)
        nn.init.zeros_(self.skip.weight)

    def forward(self, context: Tensor) -> Tensor:
        """Return coefficients ``(..., size)`` for contexts ``(..., C)``."""
        return self.net(context) + self.skip(context)


class GaussianDecoder(nn.Module):
    r"""Observations :math:`y\sim N(f(x),\mathrm{diag}\,s^2)` of the state.

    Args:
        mean: The function f from states ``(..., d)`` to means ``(..., p)``.
        obs_dim: The number p of components of an observation.
        obs_scale: The standard deviation s, at the start of training where it is learnt.
        learn_obs_scale: Whether s is a parameter, one per component.

    Attributes:
        units: The units of the data in which ``obs_scale`` was given; None for those of the observations themselves.

    Raises:
        InvalidInputError: If the mean isn't a function, or a size or scale isn't positive.

    Example:
        >>> decoder = GaussianDecoder(torch.nn.Linear(2, 3), 3, obs_scale=0.2, learn_obs_scale=False)
        >>> decoder.sample(torch.zeros(5, 2)).shape
        torch.Size([5, 3])
    """

    def __init__(
        self,
        mean: Callable[[Tensor], Tensor],
        obs_dim: int,
        obs_scale: float = 0.1,
        learn_obs_scale: bool = True,
    ) -> None:
        super().__init__()
        check_callable(mean, "mean", "a function of the state")
        check_positive_int(obs_dim, "obs_dim")
        check_positive(obs_scale, "obs_scale")
        check_bool(learn_obs_scale, "learn_obs_scale")
        self.mean, self.obs_dim = mean, obs_dim
        self.units: DataUnits | None = None
        relative = torch.full((obs_dim,), float(obs_scale)).log()
        self.relative_log_scale = nn.Parameter(relative, requires_grad=learn_obs_scale)

    @property
    def log_scale(self) -> Tensor:
        """The logarithms ``(p,)`` of the standard deviations of the noise, in units of the observations."""
        relative = self.relative_log_scale
        return relative if self.units is None else relative + self.units.scale.log()

    @property
    def obs_scale(self) -> Tensor:
        """The standard deviations ``(p,)`` of the noise, in units of the observations."""
        return self.log_scale.exp()

    def log_prob(self, x: Tensor, series: Series) -> Tensor:
        """Return log densities ``(n, S, B)`` of the observations, given the states ``x (n, S, B, d)`` at their times."""
        law = torch.distributions.Normal(self.mean(x), self.obs_scale, validate_args=False)
        terms = law.log_prob(series.values.movedim(1, 0).unsqueeze(1))
        seen = series.mask.movedim(1, 0).unsqueeze(1)
        return torch.where(seen, terms, torch.zeros_like(terms)).sum(-1)

    def sample(self, x: Tensor, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw observations ``(..., p)`` of states ``(..., d)``."""
        x = as_tensor(x, "x", like=self.relative_log_scale)
        check_same_dtype(x=x, decoder=self.relative_log_scale)
        mean = self.mean(x)
        source = as_generator(generator, mean.device)
        noise = torch.randn(mean.shape, generator=source, dtype=mean.dtype, device=mean.device)
        return mean + self.obs_scale * noise


def interpolate(x: Tensor, ts: Tensor, times: Tensor) -> Tensor:
    """Return paths ``x (T, S, B, d)`` at each series' own times ``(B, n)``, linear between grid points: ``(n, S, B, d)``."""
    # counted from the first one, before precision may be lost
    grid, when = (ts - ts[0]).to(x.dtype), (times - ts[0]).to(x.dtype)
    right = torch.searchsorted(grid, when.contiguous()).clamp(1, ts.shape[0] - 1)
    weight = ((when - grid[right - 1]) / (grid[right] - grid[right - 1])).clamp(0.0, 1.0)
    shape = (*x.shape[1:3], x.shape[3])

    def at(index: Tensor) -> Tensor:
        return x.gather(0, index.T[:, None, :, None].expand(-1, *shape))

    return torch.lerp(at(right - 1), at(right), weight.T[:, None, :, None])
