"""Schrödinger bridges by optimising the interpolant itself: a saddle-point problem, on any coupling."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from stochdyn._checks import check_positive, check_real
from stochdyn.errors import InvalidInputError
from stochdyn.interpolants.fields.networks import Network
from stochdyn.interpolants.paths.interpolant import Interpolant, check_pair
from stochdyn.interpolants.paths.latents import BrownianLatent
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = ["MaxMinBridge"]


class _Reversed(torch.autograd.Function):
    """The identity, whose gradient is turned round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        return -slope


class MaxMinBridge(Objective):
    r"""Find the Schrödinger bridge between two samples by a game of drift and interpolant.

    .. math:: \max_{\hat I}\min_{\hat u}\int_0^1E\left[\tfrac12|\hat u(t,x_t)|^2-\big(\partial_t\hat I+(\dot\gamma-\varepsilon/\gamma)z\big)
              \cdot\hat u(t,x_t)\right]dt,\qquad x_t=\hat I(t,x_0,x_1)+\gamma(t)z

    For a given interpolant the drift becomes :math:`b+\varepsilon s`; the interpolant then moves to where the kinetic energy of that
    drift is least. At the saddle point :math:`dX=\hat u\,dt+\sqrt{2\varepsilon}\,dW` is the Schrödinger bridge with the reference
    :math:`\sqrt{2\varepsilon}\,dW`. It needs no coupling but that of the batch. Where batches can be coupled, the entropic coupling
    with the Brownian latent (``InterpolantRegression(..., coupling="entropic")``) gets there by a plain regression, and
    is much to be preferred: the game converges slowly, if the rate is small enough, and tells nobody when it doesn't.
    Train it with its own learning rates:
    ``sd.fit(game, pairs, optimizer=lambda _, lr: torch.optim.Adam(game.parameter_groups(lr)))``.

    Args:
        drift: The network for u, ``net(t, x)`` with ``t (n, 1)``.
        correction: The network ``(t, x0, x1) -> (n, d)`` that bends the path, see :class:`Interpolant`; such as
            ``StateNetwork(d, context=d, zero_last=True)`` of :mod:`stochdyn.core`, which starts without a bend.
        epsilon: Half the squared diffusion of the reference, :math:`\varepsilon`.
        rate: The learning rate of the interpolant relative to that of the drift, in :meth:`parameter_groups`. Small rates keep
            the drift near its optimum.
        gamma: The scale of the Brownian latent; :math:`\sqrt{2\varepsilon}`, that of the bridges of the reference, if None.

    Raises:
        InvalidInputError: If epsilon or the rate isn't positive, or a network isn't callable.

    Reference:
        Albergo, Boffi and Vanden-Eijnden, "Stochastic interpolants", 2023, theorem 3.5.
    """

    def __init__(
        self,
        drift: Network,
        correction: Network,
        epsilon: float,
        rate: float = 0.3,
        gamma: float | None = None,
    ) -> None:
        super().__init__()
        check_real(epsilon, "epsilon", above=0.0)
        check_real(rate, "rate", above=0.0)
        if gamma is not None:
            check_real(gamma, "gamma", above=0.0)
        if not callable(drift) or not callable(correction):
            raise InvalidInputError("drift and correction must be callable")
        scale = (2 * epsilon) ** 0.5 if gamma is None else gamma
        self.epsilon, self.rate = float(epsilon), float(rate)
        self.drift, self.correction = drift, correction
        self.gamma = BrownianLatent(scale)
        self._check = Interpolant("linear", self.gamma)

    def interpolant(self) -> Interpolant:
        """Return the interpolant as it is now."""
        return Interpolant("linear", self.gamma, correction=self.correction)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Return the parameters with their learning rates, for an optimiser: ``lr`` for the drift, ``rate * lr`` for the path.

        A factor on the gradient would not do, since Adam and its like are blind to it.

        Raises:
            InvalidInputError: If the learning rate isn't positive.
        """
        check_positive(lr, "lr")
        parts = ((self.drift, lr), (self.correction, self.rate * lr))
        return [{"params": list(m.parameters()), "lr": own} for m, own in parts if isinstance(m, nn.Module)]

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate on ``(x0, x1)``; the gradient ascends in the correction and descends in the drift.

        Raises:
            InvalidInputError: If the batch has another form.
        """
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            raise InvalidInputError("a batch is (x0, x1)", got=type(batch).__name__)
        x0, x1 = batch
        check_pair(x0, x1)
        n = len(x1)
        t = (
            (
                torch.arange(n, dtype=x1.dtype, device=x1.device)
                + torch.rand(n, dtype=x1.dtype, device=x1.device)
            )
            / n
        )[:, None]
        t = t.clamp(1e-3, 1 - 1e-3)
        z = torch.randn_like(x1, memory_format=torch.contiguous_format)

        def bend(s: Tensor) -> Tensor:
            return s * (1 - s) * self.correction(s, x0, x1)

        bent, slope = cast(tuple[Tensor, Tensor], torch.func.jvp(bend, (t,), (torch.ones_like(t),)))
        bent, slope = _Reversed.apply(bent), _Reversed.apply(slope)
        middle, rate = torch.lerp(x0, x1, t) + bent, x1 - x0 + slope
        gamma = self.gamma.value(t)
        rate_of_noise = self.gamma.derivative(t) - self.epsilon / gamma
        # both signs of the latent: the singular part of the target cancels
        times = torch.cat([t, t])
        u = self.drift(times, torch.cat([middle + gamma * z, middle - gamma * z]))
        target = torch.cat([rate + rate_of_noise * z, rate - rate_of_noise * z])
        loss = (u * (0.5 * u - target)).sum(-1).mean()
        energy = u.detach().square().sum(-1).mean()
        return ObjectiveValue(loss, {"kinetic": 0.5 * energy}, "surrogate")
