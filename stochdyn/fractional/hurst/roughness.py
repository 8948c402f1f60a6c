"""The roughness of a path that is observed with noise, such as the logarithm of a realised variance."""

from __future__ import annotations

import warnings
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoLaplaceApproximation, AutoMultivariateNormal, init_to_value
from torch import Tensor
from torch.distributions import biject_to

from stochdyn._checks import (
    check_finite,
    check_ndim,
    check_nonempty,
    check_positive,
    check_positive_int,
)
from stochdyn.diagnostics.container import from_draws
from stochdyn.diagnostics.draws import draw_posterior, seeded
from stochdyn.diagnostics.psis import pareto_smooth
from stochdyn.errors import ConvergenceWarning, InvalidInputError, TooFewDrawsError
from stochdyn.fractional.exact.fbm import fgn_autocovariance
from stochdyn.fractional.exact.likelihood import HURST_LIMITS

__all__ = [
    "averaged_autocovariance",
    "infer_roughness",
    "roughness_model",
]

_MIN_LENGTH = 30
#: Hurst indices to climb from: with errors and averages the posterior can have a second mode next to 0.
_STARTS = (0.12, 0.5)
# Times that the proposals take on the moments of weighted draws, and the k-hat that ends it.
_ROUNDS, _TRUSTED = 5, 0.7


def averaged_autocovariance(n: int, hurst: Tensor | float, step: float = 1.0) -> Tensor:
    r"""Return the autocovariance of the increments of fractional Brownian motion that is averaged over each step.

    With :math:`Y_i=\frac1\Delta\int_{(i-1)\Delta}^{i\Delta}B^H_s\,ds`,

    .. math::
        \mathrm{Cov}(Y_{i+1}-Y_i,Y_{i+k+1}-Y_{i+k})=\tfrac12\Delta^{2H}\,\delta^4g(k),\qquad
        g(x)=\frac{|x|^{2H+2}}{(2H+1)(2H+2)},

    where :math:`\delta^4g(k)=g(k+2)-4g(k+1)+6g(k)-4g(k-1)+g(k-2)`: averaging is a convolution of the autocovariance with a
    triangle, whose second derivative is a second difference.

    Args:
        n: lags, 0 to n - 1.
        hurst: Hurst index, ``(*batch)``.
        step: time between observations, and the length of each average.

    Returns:
        ``(*batch, n)``, float64, differentiable in the Hurst index.

    Example:
        >>> averaged_autocovariance(2, 0.5)  # Brownian motion: 2/3 and 1/6
        tensor([0.6667, 0.1667], dtype=torch.float64)
    """
    h = torch.as_tensor(hurst, dtype=torch.float64)[..., None]
    lags = torch.arange(-2, n + 2, dtype=torch.float64, device=h.device).abs()
    # The second derivative of 0^p in p is NaN in torch: leave the base 0 out.
    power = torch.where(lags > 0, lags.clamp_min(1.0) ** (2 * h + 2), 0.0)
    g = power / ((2 * h + 1) * (2 * h + 2))
    difference = g[..., 4:] - 4 * g[..., 3:-1] + 6 * g[..., 2:-2] - 4 * g[..., 1:-3] + g[..., :-4]
    return 0.5 * step ** (2 * h) * difference


def roughness_model(
    increments: Tensor, step: float = 1.0, noise_scale: float | None = None, averaged: bool = False
) -> None:
    r"""Pyro model of the differences of a fractional Brownian path that is observed with independent errors.

    .. math::
        y_n=\mu n+\sigma B^H_{n\Delta}+\eta\,\epsilon_n,\qquad
        \mathrm{Cov}(y_{i+1}-y_i,\,y_{j+1}-y_j)=\sigma^2\gamma_H(i-j)+\eta^2(2\delta_{ij}-\delta_{|i-j|=1}),

    with :math:`\gamma_H` the autocovariance of fractional Gaussian noise (or, for averages over the steps,
    :func:`averaged_autocovariance`), and weak priors relative to the spread of the increments.

    Args:
        increments: ``(n,)`` differences of the observed path.
        step: time between observations.
        noise_scale: standard deviation :math:`\eta` of the errors; None makes it a latent site, 0 leaves it out.
        averaged: whether each observation is the average of the path over the step that ends there.
    """
    series = increments.double()
    spread = series.std()
    # Uniform on (0, 1). As a normal probability the index has a posterior with normal tails, even where it piles up at 0.
    probit = pyro.sample("hurst_probit", dist.Normal(series.new_tensor(0.0), 1.0))
    hurst = pyro.deterministic("hurst", _hurst_of(probit))
    deviation = pyro.sample("deviation", dist.LogNormal(spread.log(), 1.5))
    if noise_scale is None:
        noise = pyro.sample("noise_scale", dist.LogNormal(spread.log() - 1.0, 1.0))
    else:
        noise = series.new_tensor(float(noise_scale))
    n = len(series)
    lags = torch.arange(n)
    autocovariance = averaged_autocovariance if averaged else fgn_autocovariance
    row = autocovariance(n, hurst, step)
    # The spread of the increments and the index are nearly independent a posteriori; scale and index aren't.
    row = row * (deviation.unsqueeze(-1) / row[..., :1].sqrt()) ** 2
    errors = series.new_zeros(n)
    errors[0], errors[1] = 2.0, -1.0
    # A drift of prior N(0, spread^2) a step is integrated out: it adds the same number to every entry. Left in, its
    # width would follow the index, and the posterior were far from normal.
    row = row + errors * noise.unsqueeze(-1) ** 2 + spread**2
    factor = torch.linalg.cholesky(row[..., (lags[:, None] - lags).abs()])
    mean = series.new_zeros(()).expand(row.shape)
    pyro.sample(
        "increments", dist.MultivariateNormal(mean, scale_tril=factor, validate_args=False), obs=series
    )


def infer_roughness(
    path: Tensor,
    step: float = 1.0,
    noise_scale: float | None = None,
    averaged: bool = False,
    num_draws: int = 500,
    seed: int | None = 0,
) -> Any:
    r"""Return the posterior of the Hurst index of a path that is observed with independent errors.

    Errors roughen a path, so a series whose errors are left out looks as if its index were smaller; averages smooth it, so that it looks
    larger. The logarithm of a realised variance suffers both: it estimates an integral over the day, from M returns with a
    standard error of about :math:`\sqrt{2/M}`.

    The posterior of :func:`roughness_model` is sampled by importance: proposals from a multivariate t law, first around its mode,
    then with its estimated moments (again where the weights don't behave), are weighted by the exact likelihood, the weights Pareto-smoothed,
    and the draws resampled. Attribute ``khat`` says how far
    they can be trusted. Time grows with the cube of the length, to some minutes for 2000 values.

    Args:
        path: ``(n,)`` the observed levels, not their differences; at least 30.
        step: time between observations.
        noise_scale: standard deviation of the errors, if it is known; None learns it, 0 assumes there are none.
        averaged: whether each observation is the average of the path over the step that ends there, as a realised variance is.
        num_draws: draws of the posterior.
        seed: of the draws; the global random state is left alone.

    Returns:
        ArviZ container: ``posterior`` (``hurst``, ``scale`` :math:`\sigma`, ``deviation`` of an increment without its errors,
        and ``noise_scale`` if it was learned), ``sample_stats`` (``lp``),
        ``observed_data`` and the attribute ``khat``.

    Raises:
        EmptyDataError, TooFewDrawsError, NonFiniteError, ShapeError, InvalidInputError: for a path that is empty, shorter than
            30 values, not finite, of more than one axis, or constant; or a negative ``noise_scale``.

    Warns:
        ConvergenceWarning: if k-hat exceeds 0.7.

    Example:
        >>> from stochdyn.fractional import sample_fbm
        >>> path = sample_fbm(0.3, 200, horizon=200.0, generator=torch.Generator().manual_seed(0))
        >>> idata = infer_roughness(path, noise_scale=0.0, num_draws=100)
        >>> bool(abs(idata.posterior["hurst"].mean() - 0.3) < 0.15)
        True
    """
    _check(path, step, noise_scale)
    check_positive_int(num_draws, "num_draws")
    increments = path.detach().cpu().double().diff()
    if float(increments.std()) == 0:
        raise InvalidInputError("the path is constant, or a straight line")
    arguments = (increments, step, noise_scale, averaged)
    with seeded(seed), pyro.get_param_store().scope():
        guide = _laplace(arguments)
        draws = draw_posterior(roughness_model, guide, arguments, num_draws=num_draws, seed=None)
        smoothed = pareto_smooth(draws.log_weights)
        for _ in range(_ROUNDS):
            guide.match(draws.values, smoothed.log_weights)
            draws = draw_posterior(roughness_model, guide, arguments, num_draws=2 * num_draws, seed=None)
            smoothed = pareto_smooth(draws.log_weights)
            if float(smoothed.khat) <= _TRUSTED:
                break
        chosen = _resample(smoothed.log_weights, num_draws)
    khat = float(smoothed.khat)
    attrs: dict[str, str | int | float] = {"estimator": "importance", "khat": khat}
    if seed is not None:
        attrs["seed"] = seed
    if khat > _TRUSTED:
        warnings.warn(
            f"the proposals miss a part of the posterior (k-hat {khat:.2f}); draw more",
            ConvergenceWarning,
            stacklevel=2,
        )
    values = {n: v.reshape(2 * num_draws)[chosen].double() for n, v in draws.values.items()}
    autocovariance = averaged_autocovariance if averaged else fgn_autocovariance
    values["hurst"] = _hurst_of(values.pop("hurst_probit"))
    values["scale"] = values["deviation"] / autocovariance(1, values["hurst"], step)[..., 0].sqrt()
    return from_draws(
        {name: value[None].numpy() for name, value in values.items()},
        observed_data={"path": path.detach().cpu().double().numpy()},
        constant_data={"step": step},
        sample_stats={"lp": draws.log_joint[chosen][None].numpy()},
        dims={"path": ["time"]},
        attrs=attrs,
    )


def _hurst_of(probit: Tensor) -> Tensor:
    return torch.special.ndtr(probit).clamp(*HURST_LIMITS)


def _resample(log_weights: Tensor, size: int) -> Tensor:
    """Return ``(size,)`` indices by systematic resampling, in random order."""
    edges = torch.softmax(log_weights, 0).cumsum(0)
    points = (torch.arange(size, dtype=edges.dtype) + torch.rand((), dtype=edges.dtype)) / size
    return torch.searchsorted(edges, points).clamp(max=len(edges) - 1)[torch.randperm(size)]


def _check(path: Tensor, step: float, noise_scale: float | None) -> None:
    check_nonempty(path, "path")
    check_ndim(path, 1, "path", "(n,)")
    check_finite(path, "path")
    check_positive(step, "step")
    if path.shape[0] < _MIN_LENGTH:
        raise TooFewDrawsError(
            "the path is too short to tell its roughness",
            got=f"{path.shape[0]} values",
            expected=f"at least {_MIN_LENGTH}",
        )
    if noise_scale is not None and not noise_scale >= 0:
        raise InvalidInputError("noise_scale can't be negative", got=noise_scale)


class _HeavyTailed(AutoMultivariateNormal):
    """A multivariate t law with five degrees of freedom, whose tails are heavier than the posterior's."""

    def get_posterior(self, *args: Any, **kwargs: Any) -> Any:
        """Return the law of the unconstrained latents."""
        scale: Any = self.scale
        return dist.MultivariateStudentT(
            self.loc.new_tensor(5.0), self.loc, scale_tril=scale.unsqueeze(-1) * self.scale_tril
        )

    @torch.no_grad()
    def match(self, values: dict[str, Tensor], log_weights: Tensor) -> None:
        """Take on the weighted moments of draws, in unconstrained coordinates."""
        parts = []
        trace: Any = self.prototype_trace
        for name in trace.stochastic_nodes:
            to_real = biject_to(trace.nodes[name]["fn"].support).inv
            parts.append(to_real(values[name].reshape(-1)))
        points, share = torch.stack(parts, -1), torch.softmax(log_weights, 0).unsqueeze(-1)
        center = (share * points).sum(0)
        covariance = (share * (points - center)).mT @ (points - center)
        factor = torch.linalg.cholesky(covariance + 1e-9 * torch.eye(len(center), dtype=points.dtype))
        self.loc.copy_(center)
        self.scale = factor.diagonal().clone()
        self.scale_tril = factor / factor.diagonal().unsqueeze(-1)


def _laplace(arguments: tuple[Any, ...]) -> _HeavyTailed:
    """Return a guide around the highest posterior mode found, as wide as the curvature there says."""
    guide, _ = min((_mode(arguments, hurst) for hurst in _STARTS), key=lambda found: found[1])
    normal = guide.laplace_approximation(*arguments)
    heavy = _HeavyTailed(roughness_model)
    heavy(*arguments)  # sets it up
    with torch.no_grad():
        heavy.loc.copy_(normal.loc)
    heavy.scale, heavy.scale_tril = normal.scale.detach(), normal.scale_tril.detach()
    return heavy


def _mode(arguments: tuple[Any, ...], hurst: float) -> tuple[AutoLaplaceApproximation, float]:
    """Climb to a mode from an index and the spread that fits it; return the guide there and minus the log density."""
    series, _, noise_scale, _ = arguments
    errors = 0.3 * series.std() if noise_scale is None else torch.tensor(float(noise_scale))
    excess = (series.var() - 2 * errors**2).clamp_min(0.1 * series.var())
    start = {
        "hurst_probit": torch.special.ndtri(series.new_tensor(hurst)),
        "deviation": excess.sqrt(),
        "noise_scale": errors,
    }
    guide = AutoLaplaceApproximation(roughness_model, init_loc_fn=init_to_value(values=start))
    guide(*arguments)  # sets it up
    loss = Trace_ELBO().differentiable_loss
    optimizer = torch.optim.LBFGS(
        guide.parameters(), max_iter=100, line_search_fn="strong_wolfe", tolerance_grad=1e-6
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(roughness_model, guide, *arguments)
        value.backward()
        return value

    optimizer.step(closure)
    with torch.no_grad():
        return guide, float(loss(roughness_model, guide, *arguments))
