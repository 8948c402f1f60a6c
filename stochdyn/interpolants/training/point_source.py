"""Interpolants that leave a point: probabilistic forecasts of what follows a given state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    check_callable,
    check_choice,
    check_nonempty,
    check_real,
    check_type,
)
from stochdyn.core.forward.flow import as_time
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.interpolants.fields.networks import evaluating
from stochdyn.interpolants.paths.interpolant import as_points, check_pair, check_times
from stochdyn.interpolants.sampling.samplers import integrate_sde, time_grid
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = ["ForecastRegression", "Forecaster", "PointSource"]

Network = Callable[..., Tensor]


class PointSource(nn.Module):
    r"""An interpolant from a point to a random one.

    .. math:: x_t=(1-t)x_0+\beta(t)x_1+\sigma(1-t)W_t,\qquad \beta(t)=t^p

    Given :math:`x_0` the process :math:`dX=b\,dt+\sigma(1-t)\,dW` with :math:`b(t,x,x_0)=E[\dot x_t\mid x_t=x,x_0]`, started in the
    point itself, has the law of :math:`x_t` at every time, and so that of :math:`x_1` given
    :math:`x_0` at the end. Its drift is regular on the whole of [0, 1].

    Args:
        scale: The strength :math:`\sigma` of the noise, of the order of the spread of :math:`x_1` given :math:`x_0`.
        power: The power p, 1 or 2. With 2 the noise that minimises the divergence on paths is regular as well.

    Raises:
        InvalidInputError: If the scale isn't positive, or the power is another.

    Example:
        >>> PointSource(1.0).sample(1.0, torch.zeros(1, 2), torch.ones(1, 2))
        tensor([[1., 1.]])

    Reference:
        Chen, Goldstein, Hua, Albergo, Boffi and Vanden-Eijnden, "Probabilistic forecasting with stochastic interpolants and Föllmer
        processes", 2024.
    """

    def __init__(self, scale: float = 1.0, power: int = 2) -> None:
        super().__init__()
        check_real(scale, "scale", above=0.0)
        check_choice(power, (1, 2), "power")  # type: ignore[arg-type]
        self.scale, self.power = float(scale), power

    def _beta(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return (t, torch.ones_like(t)) if self.power == 1 else (t.square(), 2 * t)

    def sample(
        self,
        t: Tensor | float,
        x0: Tensor,
        x1: Tensor,
        z: Tensor | None = None,
        generator: torch.Generator | int | None = None,
    ) -> Tensor:
        """Return ``x_t (..., d)``; latents ``z`` are drawn if None.

        Raises:
            TimeGridError: If a time is outside [0, 1].
            ShapeError: If the points don't fit together.
        """
        x0, x1, z = as_points(x0, x1, z)
        check_pair(x0, x1, z)
        time = as_time(t, x1)
        check_times(time)
        if z is None:
            source = as_generator(generator, x1.device)
            z = torch.randn(x1.shape, dtype=x1.dtype, device=x1.device, generator=source)
        return (1 - time) * x0 + self._beta(time)[0] * x1 + self.scale * (1 - time) * time.sqrt() * z

    def target(self, t: Tensor, x0: Tensor, x1: Tensor, z: Tensor) -> Tensor:
        r"""Return the rate whose conditional mean is the drift, :math:`-x_0+\dot\beta x_1-\sigma\sqrt t\,z`."""
        return self._beta(t)[1] * x1 - x0 - self.scale * t.sqrt() * z

    def score(self, t: Tensor | float, x: Tensor, x0: Tensor, drift: Tensor) -> Tensor:
        r"""Return :math:`\nabla\log\rho_t(x\mid x_0)` from the drift; infinite at both ends of [0, 1].

        .. math:: s=\frac{\beta b-\dot\beta x-(\beta\dot\alpha-\dot\beta\alpha)x_0}{t\,\sigma^2(1-t)\,(\beta+\dot\beta(1-t))}
        """
        time = as_time(t, x)
        beta, rate = self._beta(time)
        determinant = self.scale**2 * time * (1 - time) * (beta + rate * (1 - time))
        return (beta * drift - rate * x + (beta + rate * (1 - time)) * x0) / determinant

    def optimal_noise(self, t: Tensor) -> Tensor:
        r"""Return the noise g that minimises the divergence on paths of a model with errors, of Föllmer's process.

        The score is affine in the drift with slope :math:`A\beta`, so an error :math:`\delta b` of the drift becomes
        :math:`(1+\tfrac12(g^2-\sigma_t^2)A\beta)\,\delta b`, and its square over :math:`g^2` is least at
        :math:`g^2=2/(A\beta)-\sigma_t^2`.
        """
        beta, rate = self._beta(t)
        own = self.scale**2 * (1 - t).square()
        ratio = (
            rate / beta.clamp(min=torch.finfo(t.dtype).tiny) if self.power == 1 else 2 / t.clamp(min=1e-30)
        )
        inverse = self.scale**2 * t * (1 - t) * (1 + ratio * (1 - t))
        return (2 * inverse - own).clamp(min=0).sqrt()


class ForecastRegression(Objective):
    r"""Learn the drift of a point-source interpolant.

    .. math:: \ell=\int_0^1E\left[\tfrac12|\hat b(t,x_t,x_0)|^2-\dot x_t\cdot\hat b(t,x_t,x_0)\right]dt

    Args:
        source: The interpolant.
        drift: The network, called as ``net(t, x, context)`` with ``t (n, 1)`` and the start, joined with further context where there
            is any, as context.

    Batches are ``(x0, x1)``, ``(x0, x1, condition)`` or a dict of these names: states ``(n, d)``, their successors, and ``(n, c)``.

    Example:
        >>> from stochdyn.interpolants import FieldNetwork
        >>> objective = ForecastRegression(PointSource(0.5), FieldNetwork(2, condition_dim=2))
        >>> objective((torch.randn(8, 2), torch.randn(8, 2))).bound
        'surrogate'
    """

    def __init__(self, source: PointSource, drift: Network) -> None:
        super().__init__()
        check_type(source, PointSource, "source")
        check_callable(drift, "drift", "a network, net(t, x, context)")
        self.source, self.drift = source, drift

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate on a batch.

        Raises:
            InvalidInputError: If the batch has another form.
            ShapeError: If its parts don't fit together.
        """
        if isinstance(batch, Mapping) and {"x0", "x1"} <= set(batch) <= {"x0", "x1", "condition"}:
            batch = [batch[k] for k in ("x0", "x1", "condition") if k in batch]
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            raise InvalidInputError(
                "a batch is (x0, x1), (x0, x1, condition) or a dict of these", got=type(batch).__name__
            )
        x0, x1 = batch[0], batch[1]
        check_pair(x0, x1)
        t = torch.rand(len(x1), 1, dtype=x1.dtype, device=x1.device)
        z = torch.randn_like(x1, memory_format=torch.contiguous_format)
        beta = self.source._beta(t)[0]
        x = (1 - t) * x0 + beta * x1 + self.source.scale * (1 - t) * t.sqrt() * z
        value = self.drift(t, x, _context(x0, batch[2] if len(batch) == 3 else None))
        target = self.source.target(t, x0, x1, z)
        loss = (value * (0.5 * value - target)).sum(-1).mean()
        return ObjectiveValue(loss, {"drift": loss.detach()}, "surrogate")

    def forecaster(self) -> Forecaster:
        """Return the model that forecasts; it shares the network."""
        return Forecaster(self.source, self.drift)


class Forecaster(nn.Module):
    """Draws successors of given states.

    Args:
        source: The interpolant.
        drift: The trained network.
    """

    def __init__(self, source: PointSource, drift: Network) -> None:
        super().__init__()
        check_type(source, PointSource, "source")
        check_callable(drift, "drift", "a network, net(t, x, context)")
        self.source, self.drift = source, drift

    def sample(
        self,
        x0: Any,
        sample_shape: SampleShape = (),
        num_steps: int = 50,
        method: str = "heun",
        *,
        condition: Any = None,
        noise: str = "interpolant",
        generator: Generator = None,
    ) -> Tensor:
        r"""Draw successors of every state.

        Args:
            x0: The states, ``(m, d)``.
            sample_shape: The shape of independent draws for every state, an integer or a tuple.
            num_steps: The number of steps of the integrator.
            method: How to take a step: ``"heun"``, of order 2, or ``"euler"``, of order 1.
            condition: The contexts ``(m, c)`` that are joined to the states as in training.
            noise: The strength of the noise in time: ``"interpolant"`` for :math:`\sigma(1-t)`, or ``"optimal"`` for Föllmer's, which
                minimises the divergence on paths.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Returns:
            ``(*sample_shape, m, d)``.

        Raises:
            InvalidInputError: If an option doesn't exist.
        """
        shape = as_sample_shape(sample_shape)
        x0 = as_tensor(x0, "x0", 2, "(m, d)")
        check_nonempty(x0, "x0")
        check_choice(noise, ("interpolant", "optimal"), "noise")
        check_choice(method, ("heun", "euler"), "method")
        ts = time_grid(num_steps, like=x0)
        extra = None if condition is None else as_tensor(condition, "condition", 2, "(m, c)", like=x0)
        joined = _context(x0, extra)
        start, joined = (v.expand(*shape, *v.shape).reshape(-1, v.shape[-1]) for v in (x0, joined))
        source = self.source
        own = source.scale

        def drift(t: Tensor, x: Tensor) -> Tensor:
            if noise == "interpolant":
                return self.drift(t.expand(len(x), 1), x, joined)
            # network and coefficients see the same time; at the start the score is singular, and so little noise was added
            # that any will do
            inner = t.clamp(1e-3, 1 - 1e-3)
            b = self.drift(inner.expand(len(x), 1), x, joined)
            excess = 0.5 * (source.optimal_noise(inner).square() - (own * (1 - inner)).square())
            return b + torch.where(t > 0, excess, torch.zeros_like(excess)) * source.score(inner, x, start, b)

        level = (lambda t: own * (1 - t)) if noise == "interpolant" else source.optimal_noise
        with torch.no_grad(), evaluating(self):
            source_of_noise = as_generator(generator, start.device)
            out = integrate_sde(drift, level, start, ts, method, generator=source_of_noise)  # type: ignore[arg-type]
        return out.reshape(*shape, *x0.shape)


def _context(x0: Tensor, condition: Tensor | None) -> Tensor:
    if condition is None:
        return x0
    if condition.ndim != 2 or condition.shape[0] != x0.shape[0]:
        raise ShapeError(
            "there must be one condition per state", got=tuple(condition.shape), expected=f"({len(x0)}, c)"
        )
    return torch.cat([x0, condition.to(x0)], -1)
