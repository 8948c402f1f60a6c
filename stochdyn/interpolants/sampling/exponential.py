"""Exponential integrators for the reversal of affine processes: the linear part exactly, the network at few points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    check_callable,
    check_choice,
    check_finite,
    check_time_grid,
    check_type,
)
from stochdyn._transforms import ordinarily
from stochdyn.errors import InvalidInputError
from stochdyn.interpolants.paths.processes import AffineProcess, check_process

__all__ = ["ExponentialODE", "ExponentialSDE", "exponential_ode", "exponential_sde"]

Field = Callable[[Tensor, Tensor], Tensor]
Prediction = Literal["data", "noise"]


@dataclass(frozen=True)
class _Exponential:
    order: int = 2
    prediction: Prediction = "data"

    def __post_init__(self) -> None:
        check_choice(self.prediction, ("data", "noise"), "prediction")
        if isinstance(self.order, bool) or self.order not in (1, 2):
            raise InvalidInputError("order must be 1 or 2", got=repr(self.order)[:60])


class ExponentialODE(_Exponential):
    """The probability-flow ODE by an exponential integrator: few steps, and the same noise gives the same sample.

    Take it for ten to thirty steps, for densities, and where draws are to depend smoothly on their noise.

    Args:
        order: The order of the method, 1 or 2, at the same cost.
        prediction: The mean that is taken to vary slowly, ``"data"`` or ``"noise"``; see :func:`exponential_ode`.
    """


class ExponentialSDE(_Exponential):
    """The reverse SDE by an exponential integrator: noise on the way corrects errors of the score.

    Take it from fifty steps on, where the score is learnt and its errors are larger than those of the steps.

    Args:
        order: The order of the method, 1 or 2, at the same cost.
        prediction: The mean that is taken to vary slowly, ``"data"`` or ``"noise"``; see :func:`exponential_ode`.
    """


@ordinarily
def exponential_ode(
    process: AffineProcess,
    score: Field,
    x: Tensor,
    times: Tensor,
    *,
    order: int = 2,
    prediction: Prediction = "data",
) -> Tensor:
    r"""Integrate the probability-flow ODE along falling times, in the log signal-to-noise ratio.

    With :math:`y=x-\mu`, :math:`h=\lambda_i-\lambda_{i-1}` and the predicted start :math:`\hat y_0`,

    .. math::
        y_i=\frac{\sigma_i}{\sigma_{i-1}}\,y_{i-1}-a_i\big(\varphi_1\hat y_0-\varphi_2 D_1\big),\qquad
        \varphi_1=e^{-h}-1,\quad \varphi_2=\varphi_1/h+1,

    exact for a constant prediction, and :math:`D_1=(\hat y_0^{(i-1)}-\hat y_0^{(i-2)})/r`, :math:`r=h_{i-1}/h`, from the step before
    (order 2 at one evaluation per step). A shift by ``mu`` is all that mean reversion adds.

    Args:
        process: The noising process.
        score: The score as a function ``score(t, x) -> (..., d)``.
        x: The points at ``times[0]``, ``(..., d)``.
        times: The times of the steps, ``(N + 1,)``, strictly falling.
        order: The order of the method, 1 or 2, at the same cost.
        prediction: The mean that is taken to vary slowly, ``"data"`` or ``"noise"``. The data are steadier at few steps.

    Returns:
        ``(..., d)`` at ``times[-1]``.

    Raises:
        TimeGridError: If the times don't fall strictly.
        InvalidInputError: If the order or the prediction is another.

    Example:
        >>> from stochdyn.interpolants import VP
        >>> exponential_ode(VP(), lambda t, x: -x, torch.ones(2, 1), VP().grid(50)).flatten()
        tensor([1.0040, 1.0040])

    Reference:
        Lu et al., "DPM-Solver++", 2022, algorithm 2; Li et al., "MaRS", 2025, propositions 1 to 4.
    """
    return _integrate(process, score, x, times, order, prediction, None)


@ordinarily
def exponential_sde(
    process: AffineProcess,
    score: Field,
    x: Tensor,
    times: Tensor,
    *,
    order: int = 2,
    prediction: Prediction = "data",
    generator: torch.Generator | int | None = None,
) -> Tensor:
    r"""Integrate the reverse SDE along falling times, in the log signal-to-noise ratio.

    .. math::
        y_i=\frac{\sigma_i}{\sigma_{i-1}}e^{-h}y_{i-1}+a_i\big(\varphi_1\hat y_0+\varphi_2D_1\big)+\sigma_i\sqrt{1-e^{-2h}}\,\xi,\qquad
        \varphi_1=1-e^{-2h},\quad \varphi_2=1-\frac{\varphi_1}{2h}.

    Arguments and errors as :func:`exponential_ode`, and a ``generator`` of the noise.
    """
    source = as_generator(generator, None)
    return _integrate(process, score, x, times, order, prediction, source or torch.default_generator)


def _integrate(
    process: AffineProcess,
    score: Field,
    x: Tensor,
    times: Tensor,
    order: int,
    prediction: str,
    noise: torch.Generator | None,
) -> Tensor:
    check_process(process)
    check_callable(score, "score", "a function of time and state")
    check_type(x, Tensor, "x")
    if not x.is_floating_point() or x.ndim < 1:
        raise InvalidInputError(
            "x must be floating states (..., d)", got=f"{x.dtype} of shape {tuple(x.shape)}"
        )
    check_finite(x.detach(), "x")
    check_type(times, Tensor, "times")
    check_time_grid(-times, "-times")
    check_choice(prediction, ("data", "noise"), "prediction")
    check_choice(order, (1, 2), "order")  # type: ignore[arg-type]
    t64 = times.double()
    log_scale, std = process.log_scale(t64), process.std(t64)
    log_snr = log_scale - std.log()
    scale, h = log_scale.exp(), log_snr.diff()
    # All coefficients at once and as numbers, so that nothing in the loop waits for a device.
    coefficients = _coefficients(scale, std, h, prediction, noise is not None)
    center = process.center(x)
    y, before = x - center, None
    at = times.to(x.dtype)
    scales, stds = scale.tolist(), std.tolist()
    for i, (keep, first, second, noise_std) in enumerate(coefficients):
        # E[x_0 | x] = (y + sigma^2 s) / a and E[z | x] = -sigma s, about the mean of the process
        s = score(at[i], y + center)
        guess = (y + stds[i] ** 2 * s) / scales[i] if prediction == "data" else -stds[i] * s
        y = keep * y + first * guess
        if before is not None and order == 2:
            y = y + second * (guess - before)
        if noise is not None:
            y = y + noise_std * torch.randn(x.shape, dtype=x.dtype, device=x.device, generator=_of(noise, x))
        before = guess
    return y + center


def _of(noise: torch.Generator, x: Tensor) -> torch.Generator | None:
    return noise if noise.device.type == x.device.type else None


def _coefficients(
    scale: Tensor, std: Tensor, h: Tensor, prediction: str, stochastic: bool
) -> list[tuple[float, ...]]:
    """Factors of the state, of the prediction, of its change since the step before, and of the noise."""
    a, a0, s, s0 = scale[1:], scale[:-1], std[1:], std[:-1]
    spread = torch.zeros_like(h)
    if prediction == "data":
        # phi_1 = 1 - e^{-h} and phi_2 = 1 - phi_1 / h for the ODE, with 2h in place of h for the SDE
        twice = 2 * h if stochastic else h
        phi = -torch.expm1(-twice)
        keep = s / s0 * (-h).exp() if stochastic else s / s0
        first, second = a * phi, a * (1 - phi / twice)
        if stochastic:
            spread = s * phi.sqrt()
    else:
        # noise prediction: a_i / a_{i-1} of the state, and -sigma_i (e^h - 1) of the noise, twice that for the SDE
        keep = a / a0
        grow = torch.expm1(h)
        factor = 2.0 if stochastic else 1.0
        first, second = -factor * s * grow, -factor * s * (grow / h - 1)
        if stochastic:
            spread = s * torch.expm1(2 * h).sqrt()
    ratio = torch.ones_like(h)
    ratio[1:] = h[1:] / h[:-1]  # 1 / r
    rows = torch.stack([keep, first, second * ratio, spread], -1)
    return [tuple(row) for row in rows.tolist()]
