"""Exact fractional Brownian motion: covariances, and sampling by circulant embedding."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    as_time_grid,
    check_choice,
    check_hurst,
    check_no_gradient,
    check_positive,
    check_positive_int,
)
from stochdyn.errors import InvalidInputError
from stochdyn.fractional.noise.weights import Kind

__all__ = [
    "fbm_covariance",
    "fgn_autocovariance",
    "fou_autocovariance",
    "sample_fbm",
    "sample_fgn",
]

_LARGE = 50.0


def _hurst64(hurst: Tensor | float, device: torch.device | None = None) -> Tensor:
    check_hurst(hurst)
    return torch.as_tensor(hurst, dtype=torch.float64, device=device)


def fbm_covariance(ts: Tensor, hurst: Tensor | float, kind: Kind = "I") -> Tensor:
    r"""Return the covariance matrix of unit fractional Brownian motion at the times ``ts``.

    .. math::
        K_{\mathrm I}(s,t)=\tfrac12\left(s^{2H}+t^{2H}-|t-s|^{2H}\right),\qquad
        K_{\mathrm{II}}(s,t)=\frac{2H}{a}\,s^at^{a-1}\,{}_2F_1(1-a,1;a+1;s/t),\quad s\le t,\ a=H+\tfrac12 .

    Both have variance :math:`t^{2H}`.

    Args:
        ts: The times ``(T,)``, not negative and increasing; differentiable for type I only.
        hurst: Hurst index in (0, 1), ``(*batch)``; differentiable for type I only.
        kind: The type of the motion: ``"I"`` (Mandelbrot-Van Ness, stationary increments) or ``"II"`` (Riemann-Liouville).

    Returns:
        ``(*batch, T, T)`` in the dtype of ``ts``, computed in float64.

    Raises:
        HurstRangeError: If ``hurst`` lies outside (0, 1).
        TimeGridError: If the times don't increase.
        InvalidInputError: If a time is negative, or a gradient is wanted of type II.

    Example:
        >>> fbm_covariance(torch.tensor([0.5, 1.0]), 0.5).tolist()
        [[0.5, 0.5], [0.5, 1.0]]

    Reference:
        B. Mandelbrot and J. Van Ness, SIAM Review 10(4), 1968; D. Marinucci and P. Robinson,
        J. Statist. Plann. Inference 80, 1999 (type II).
    """
    check_choice(kind, ("I", "II"), "kind")
    ts = as_time_grid(ts, "ts", min_points=1)
    if bool(ts[0] < 0):
        raise InvalidInputError(
            "ts must not be negative", got=f"ts[0]={ts[0].item():g}", hint="the process starts at 0"
        )
    h = _hurst64(hurst, ts.device)[..., None, None]
    t = ts.to(torch.float64)
    late, early = torch.maximum(t[:, None], t[None, :]), torch.minimum(t[:, None], t[None, :])
    if kind == "I":
        # Both times of a diagonal element move together: the difference stays zero, whatever its power's slope there.
        apart = late > early
        lag = torch.where(apart, late - early, 1.0) ** (2 * h)
        covariance = 0.5 * (early ** (2 * h) + late ** (2 * h) - torch.where(apart, lag, 0.0))
        return covariance.to(ts.dtype)
    hint = "take type I, or FractionalOU, whose noise has memory states and gradients"
    check_no_gradient(ts, "ts", "the covariance of type II", hint)
    check_no_gradient(h, "hurst", "the covariance of type II", hint)
    from scipy.special import hyp2f1

    a = h.detach() + 0.5
    ratio = early / torch.where(late > 0, late, torch.ones_like(late))
    a_host, ratio_host = a.cpu().numpy(), ratio.cpu().numpy()
    series = torch.as_tensor(hyp2f1(1 - a_host, 1.0, a_host + 1, ratio_host), device=ts.device)
    # s^a t^(a-1) = t^(2H) (s/t)^a stays finite at the origin
    return (2 * (a - 0.5) / a * late ** (2 * a - 1) * ratio**a * series).to(ts.dtype)


def fgn_autocovariance(num_lags: int, hurst: Tensor | float, dt: float = 1.0) -> Tensor:
    r"""Return the autocovariance of fractional Gaussian noise, the increments of unit fBM, at lags 0 to n-1.

    .. math:: r(k)=\tfrac12\Delta^{2H}\left(|k+1|^{2H}-2|k|^{2H}+|k-1|^{2H}\right).

    Args:
        num_lags: The number of lags, from 0 on.
        hurst: Hurst index in (0, 1), ``(*batch)``; differentiable.
        dt: The time between the ends of an increment.

    Returns:
        float64 ``(*batch, n)``.

    Raises:
        HurstRangeError: If ``hurst`` lies outside (0, 1).

    Example:
        >>> fgn_autocovariance(3, 0.5).tolist()
        [1.0, 0.0, 0.0]
    """
    check_positive_int(num_lags, "num_lags")
    check_positive(dt, "dt")
    h = _hurst64(hurst)[..., None]
    unit = torch.ones_like(h)
    if num_lags == 1:
        return unit * dt ** (2 * h)
    near = torch.exp2(2 * h - 1) - 1
    # k^(2H) [(1 + 1/k)^(2H) + (1 - 1/k)^(2H) - 2] / 2 with expm1, since the terms cancel at long lags
    k = torch.arange(2, num_lags, dtype=torch.float64, device=h.device)
    bracket = torch.expm1(2 * h * torch.log1p(1 / k)) + torch.expm1(2 * h * torch.log1p(-1 / k))
    far = 0.5 * torch.exp(2 * h * torch.log(k)) * bracket
    return torch.cat([unit, near, far], dim=-1) * dt ** (2 * h)


def sample_fgn(
    hurst: Tensor | float,
    num_steps: int,
    dt: float = 1.0,
    sample_shape: int | Sequence[int] = (),
    generator: torch.Generator | int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    r"""Draw fractional Gaussian noise exactly, in :math:`O(n\log n)`, by circulant embedding.

    The circulant of the autocovariances at lags 0, 1, ..., n, n-1, ..., 1 has no negative eigenvalue for any
    Hurst index, so the law of the draws is exact up to rounding. Draws are differentiable in ``hurst``.

    Args:
        hurst: Hurst index in (0, 1), ``(*batch)``.
        num_steps: The number of increments.
        dt: The time between the ends of an increment; its variance is ``dt ** (2 * hurst)``.
        sample_shape: The shape of independent draws, an int or a tuple.
        generator: The source of randomness, on the device of ``hurst``, or its seed.
        dtype: The precision of the result; computed in float64.

    Returns:
        ``(*sample_shape, *batch, num_steps)``.

    Raises:
        HurstRangeError: If ``hurst`` lies outside (0, 1).

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> sample_fgn(0.8, 100, sample_shape=5, generator=g).shape
        torch.Size([5, 100])

    Reference:
        R. Davies and D. Harte, Biometrika 74, 1987; C. Dietrich and G. Newsam, SIAM J. Sci. Comput. 18, 1997;
        P. Craigmile, J. Time Series Anal. 24, 2003 (eigenvalues for H < 1/2).
    """
    shape = as_sample_shape(sample_shape)
    check_positive_int(num_steps, "num_steps")
    n = num_steps
    r = fgn_autocovariance(n + 1, hurst, dt)
    generator = as_generator(generator, r.device)
    circulant = torch.cat([r, r[..., 1:-1].flip(-1)], dim=-1)
    # an eigenvalue that is 0 but for rounding must not be negative, nor its root have derivative inf
    spectrum = torch.fft.rfft(circulant).real.clamp_min(1e-300)
    z = torch.randn(
        *shape, *r.shape[:-1], 2, n + 1, generator=generator, dtype=torch.float64, device=r.device
    )
    z[..., 1:n] *= math.sqrt(0.5)
    z[..., 1, 0] = 0.0
    z[..., 1, n] = 0.0
    noise = torch.complex(z[..., 0, :], z[..., 1, :])
    return torch.fft.irfft(spectrum.sqrt() * noise, n=2 * n, norm="ortho")[..., :n].to(dtype)


def sample_fbm(
    hurst: Tensor | float,
    num_steps: int,
    horizon: float = 1.0,
    sample_shape: int | Sequence[int] = (),
    generator: torch.Generator | int | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    r"""Draw exact paths of unit fractional Brownian motion (type I) on ``num_steps`` equal steps of ``[0, horizon]``.

    Args:
        hurst: Hurst index in (0, 1), ``(*batch)``.
        num_steps: The number of steps.
        horizon: The last time; :math:`\operatorname{Var}B(t)=t^{2H}`.
        sample_shape: The shape of independent draws, an int or a tuple.
        generator: The source of randomness, on the device of ``hurst``, or its seed.
        dtype: The precision of the result; computed in float64.

    Returns:
        ``(*sample_shape, *batch, num_steps + 1)``, the first column 0.

    Raises:
        HurstRangeError: If ``hurst`` lies outside (0, 1).

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> path = sample_fbm(0.7, 1000, generator=g)
        >>> path.shape, float(path[0])
        (torch.Size([1001]), 0.0)
    """
    check_positive_int(num_steps, "num_steps")
    check_positive(horizon, "horizon")
    increments = sample_fgn(hurst, num_steps, horizon / num_steps, sample_shape, generator)
    start = torch.zeros_like(increments[..., :1])
    return torch.cat([start, increments.cumsum(-1)], dim=-1).to(dtype)


def fou_autocovariance(lags: Tensor, rate: float, hurst: float, scale: float = 1.0) -> Tensor:
    r"""Return the autocovariance of the stationary fractional Ornstein-Uhlenbeck process (unit type I noise).

    .. math::
        R(t)=\sigma^2\frac{\Gamma(2H+1)\sin\pi H}{\pi}\int_0^\infty\frac{\cos(tx)\,x^{1-2H}}{\theta^2+x^2}\,dx
        =\sigma^2\frac{\Gamma(2H+1)}{4\theta^{2H}}\left\{e^{z}Q(2H,z)+e^{-z}\left[1-M(z)\right]\right\},

    with :math:`z=\theta t`, Q the regularised upper incomplete gamma function and
    :math:`M(z)=\frac1{\Gamma(2H)}\int_0^zu^{2H-1}e^u\,du`.

    Args:
        lags: The times, any shape; their absolute values count.
        rate: The mean reversion :math:`\theta`, 1 / time.
        hurst: Hurst index in (0, 1).
        scale: The strength :math:`\sigma` of the noise, in units of the process per unit time to the power H.

    Returns:
        float64, the shape of ``lags``. Not differentiable.

    Raises:
        HurstRangeError: If ``hurst`` lies outside (0, 1).
        InvalidInputError: If a gradient is wanted.

    Example:
        >>> [round(v, 6) for v in fou_autocovariance(torch.tensor([0.0, 1.0]), 1.0, 0.7).tolist()]
        [0.621085, 0.394475]

    Reference:
        P. Cheridito, H. Kawaguchi and M. Maejima, Fractional Ornstein-Uhlenbeck processes,
        Electron. J. Probab. 8, 2003.
    """
    from scipy.special import gamma, gammaincc, hyp1f1

    check_hurst(hurst)
    check_positive(rate, "rate")
    check_positive(scale, "scale")
    for name, value in (("lags", lags), ("rate", rate), ("hurst", hurst), ("scale", scale)):
        check_no_gradient(value, name, "this autocovariance", "FractionalOU has gradients")
    lags = as_tensor(lags, "lags")
    b = 2 * float(hurst)
    z = (lags.detach().to(torch.float64).abs() * rate).cpu()
    near = z.clamp_max(_LARGE).numpy()
    rising = torch.as_tensor(near**b / gamma(b + 1) * hyp1f1(1.0, b + 1, -near))  # e^-z M(z)
    inside = torch.exp(torch.as_tensor(near)) * torch.as_tensor(gammaincc(b, near)) - rising
    inside = inside + torch.exp(-torch.as_tensor(near))
    # beyond z = 50 both are asymptotic series; even terms cancel, odd ones double
    far = z.clamp_min(_LARGE)
    tail, term = torch.zeros_like(far), torch.ones_like(far)
    for n in range(1, 40):
        term = term * (b - n) / far
        if n % 2 == 1:
            tail = tail + 2 * term
    tail = tail * far ** (b - 1) / gamma(b)
    curly = torch.where(z <= _LARGE, inside, tail)
    return (scale**2 * gamma(b + 1) / (4 * rate**b) * curly).to(lags.device)
