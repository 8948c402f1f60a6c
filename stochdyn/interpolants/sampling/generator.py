"""The trained model: samples, densities, path measures and distributions from the fields of an interpolant."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    check_choice,
    check_event_size,
    check_finite,
    check_ndim,
    check_nonempty,
    check_positive_int,
)
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.sde.coefficients import Scalar
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError, UnavailableError
from stochdyn.interpolants.densities.likelihood import (
    PathWeights,
    feynman_kac_log_prob,
    flow_log_prob,
    flow_with_log_density,
)
from stochdyn.interpolants.fields.drift import ForwardDrift
from stochdyn.interpolants.fields.networks import Fields
from stochdyn.interpolants.paths.interpolant import Interpolant
from stochdyn.interpolants.sampling.noise_level import Epsilon, EpsilonLike, as_epsilon
from stochdyn.interpolants.sampling.samplers import (
    SDE_METHODS,
    integrate_ode,
    integrate_sde,
    integrate_strang,
    time_grid,
)
from stochdyn.interpolants.sampling.starts import Starts

if TYPE_CHECKING:
    from stochdyn.interpolants.sampling.distribution import InterpolantDistribution

__all__ = ["InterpolantGenerator"]


class InterpolantGenerator(nn.Module):
    r"""A model of :math:`\rho_1` made of the fields of an interpolant.

    The same networks give three samplers with the same exact marginals: the probability flow :math:`\dot X=b`, the forward
    equation :math:`dX=(b+\varepsilon s)dt+\sqrt{2\varepsilon}\,dW`, and the backward equation with drift
    :math:`b-\varepsilon s` and time reversed.

    Args:
        fields: the networks and their interpolant.
        starts: the law of :math:`\rho_0`.
        taper: width of the ends of [0, 1] in which :meth:`sample` lets epsilon fall to zero.

    Reference:
        Albergo, Boffi and Vanden-Eijnden, "Stochastic interpolants", 2023, section 2.3 and algorithms 4 and 5.
    """

    def __init__(self, fields: Fields, starts: Starts | None = None, taper: float = 0.01) -> None:
        super().__init__()
        if not 0 <= taper < 0.5:
            raise InvalidInputError("taper must lie in [0, 0.5)", got=taper)
        self.fields, self.taper = fields, taper
        self.starts = starts if starts is not None else Starts(None, True)

    @property
    def interpolant(self) -> Interpolant:
        """The path that the networks were trained on."""
        return self.fields.interpolant

    def velocity(self, t: Tensor | float, x: Tensor, condition: Any = None, guidance: float = 1.0) -> Tensor:
        """Return the velocity b, ``(..., d)``."""
        return self.fields("velocity", t, x, condition, guidance)

    def score(self, t: Tensor | float, x: Tensor, condition: Any = None, guidance: float = 1.0) -> Tensor:
        """Return the score, ``(..., d)``.

        Raises:
            UnavailableError: if the networks don't determine it.
        """
        self._need_score()
        return self.fields("score", t, x, condition, guidance)

    def denoiser(self, t: Tensor | float, x: Tensor, condition: Any = None, guidance: float = 1.0) -> Tensor:
        """Return the mean of the latent, ``(..., d)``."""
        return self.fields("denoiser", t, x, condition, guidance)

    def drift(
        self,
        t: Tensor | float,
        x: Tensor,
        epsilon: EpsilonLike = 0.0,
        condition: Any = None,
        guidance: float = 1.0,
    ) -> Tensor:
        r"""Return the forward drift :math:`b+\varepsilon s`, ``(..., d)``."""
        return ForwardDrift(self.fields, as_epsilon(epsilon, self.interpolant), condition, guidance)(t, x)

    def _need_score(self) -> None:
        if not self.fields.has_score:
            raise UnavailableError(
                "these networks give no score",
                got=" and ".join(self.fields.names),
                hint="learn the denoiser beside the velocity (with the independent coupling on one-sided paths), "
                "or sample with epsilon=0",
            )

    def _ends(self) -> tuple[float, float]:
        return (self.taper or self.fields.clip, 1.0) if self.fields.singular_start else (0.0, 1.0)

    def _grid(self, steps: int, like: Tensor, backward: bool = False) -> Tensor:
        start, stop = self._ends()
        # times in double precision: 0.5 + 0.001 n is no number of single precision
        grid = time_grid(steps, stop, start) if backward else time_grid(steps, start, stop)
        return grid.to(like)

    def push(
        self,
        x0: Tensor,
        steps: int = 100,
        method: str = "heun",
        *,
        backward: bool = False,
        condition: Any = None,
        guidance: float = 1.0,
        trajectory: bool = False,
        rtol: float = 1e-5,
        atol: float = 1e-5,
    ) -> Tensor:
        """Carry points along the probability flow from time 0 to 1.

        Args:
            x0: ``(n, d)``.
            steps: of a fixed grid; adaptive methods choose their own.
            method: ``"euler"``, ``"midpoint"``, ``"heun"``, ``"rk4"``, ``"dopri5"`` and torchdiffeq's other adaptive ones.
            backward: go from time 1 to 0.
            condition: labels or context, passed on to the networks.
            guidance: strength of classifier-free guidance; 1 for none.
            trajectory: return all states, ``(steps + 1, n, d)``.
            rtol: of adaptive methods.
            atol: of adaptive methods.

        Returns:
            ``(n, d)``; differentiable in ``x0`` if that requires a gradient.

        Raises:
            ShapeError, EmptyDataError, NonFiniteError: if the points don't fit.
        """
        self._check_points(x0, "x0")
        ts = self._grid(steps, x0, backward)
        with torch.set_grad_enabled(torch.is_grad_enabled() and x0.requires_grad):
            flow = self._velocity(condition, guidance)
            return integrate_ode(flow, x0, ts, method, trajectory=trajectory, rtol=rtol, atol=atol)

    def _velocity(self, condition: Any, guidance: float) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda t, x: self.fields("velocity", t, x, condition, guidance)

    def _check_points(self, x: Tensor, name: str) -> None:
        check_ndim(x, tuple(range(1, 12)), name, "(n, d)")
        check_nonempty(x, name)
        if self.starts.dim is not None:
            check_event_size(x, self.starts.dim, name)
        check_finite(x.detach(), name)

    def sample(
        self,
        n: int,
        epsilon: EpsilonLike = 0.0,
        steps: int = 100,
        method: str = "heun",
        *,
        x0: Tensor | None = None,
        end: str = "taper",
        condition: Any = None,
        guidance: float = 1.0,
        largest: float = 10.0,
        trajectory: bool = False,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Draw from the model.

        Args:
            n: number of points.
            epsilon: strength of the noise: a number, a function of time, or ``"optimal"`` (one-network models); 0 for the
                probability flow.
            steps: number of steps.
            method: ``"heun"`` (weak order 2, two evaluations a step), ``"euler"``, or ``"strang"`` (weak order 2 with a smaller
                constant, six evaluations).
            x0: ``(n, d)`` starts; drawn if None.
            end: ``"taper"`` lets epsilon fall to zero within ``taper`` of the ends; ``"denoise"`` stops short of time 1, by the
                taper or one step, and returns the mean of :math:`x_1` there; ``"none"`` does neither.
            condition: labels ``(n,)`` or context ``(n, c)``.
            guidance: strength of classifier-free guidance; 1 for none.
            largest: cap on ``epsilon="optimal"``.
            trajectory: return all states, ``(steps + 1, n, d)``.
            generator: source of randomness; torch's global one if None.

        Returns:
            ``(n, d)``.

        Raises:
            UnavailableError: if epsilon isn't 0 and the networks give no score, or the starts aren't known.
            InvalidInputError: for options that don't exist.

        Example:
            >>> from stochdyn.interpolants import FieldNetwork
            >>> model = InterpolantGenerator(Fields(Interpolant("one-sided-linear"), {"velocity": FieldNetwork(2)}))
            >>> model.sample(5, epsilon="optimal", steps=10, x0=torch.randn(5, 2)).shape
            torch.Size([5, 2])
        """
        check_positive_int(n, "n")
        check_choice(method, SDE_METHODS, "method")
        check_choice(end, ("taper", "denoise", "none"), "end")
        level = as_epsilon(epsilon, self.interpolant, self.taper if end == "taper" else 0.0, largest)
        if not level.vanishes:
            self._need_score()
        with torch.no_grad():
            x = self.starts.draw(n, generator=generator) if x0 is None else x0
            self._check_points(x, "x0")
            start, stop = self._ends()
            if end == "denoise":
                stop = 1.0 - max(self.taper, 1.0 / steps)
            ts = time_grid(steps, start, stop, like=x)
            out = self._integrate(x, ts, level, method, condition, guidance, trajectory, generator)
            if end != "denoise":
                return out
            last = out[-1] if trajectory else out
            clean = self.fields("eta1", stop, last, condition, guidance)
            return torch.cat([out, clean[None]]) if trajectory else clean

    def _integrate(
        self, x: Tensor, ts: Tensor, level: Epsilon, method: str, condition: Any, guidance: float,
        trajectory: bool, generator: torch.Generator | None,
    ) -> Tensor:  # fmt: skip
        flow = self._velocity(condition, guidance)
        if level.vanishes:
            return integrate_ode(flow, x, ts, "euler" if method == "euler" else "heun", trajectory=trajectory)
        if method == "strang":

            def score(t: Tensor, y: Tensor) -> Tensor:
                return self.fields("score", t, y, condition, guidance)

            return integrate_strang(flow, score, level, x, ts, generator=generator, trajectory=trajectory)
        drift = ForwardDrift(self.fields, level, condition, guidance)
        return integrate_sde(drift, lambda t: (2 * level(t)).sqrt(), x, ts, method,  # type: ignore[arg-type]
                             generator=generator, trajectory=trajectory)  # fmt: skip

    def log_prob(
        self,
        x1: Tensor,
        exact: bool = True,
        steps: int = 50,
        method: str = "rk4",
        *,
        num_probes: int = 1,
        condition: Any = None,
        guidance: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        r"""Return the log density of the probability flow, ``(n,)``; differentiable.

        Args:
            x1: ``(n, d)``.
            exact: exact divergence, or Hutchinson's unbiased estimate of the log density.
            steps: of the fixed grid.
            method: see :meth:`push`.
            num_probes: Hutchinson's probes.
            condition: labels or context.
            guidance: see :meth:`push`.
            generator: source of Hutchinson's probes.

        Raises:
            UnavailableError: if the density of the starts isn't known.
            ShapeError, NonFiniteError: if the points don't fit.
        """
        self._check_points(x1, "x1")
        law = self.starts.law(x1.shape[-1], x1)
        ts = self._grid(steps, x1)
        return flow_log_prob(self._velocity(condition, guidance), law.log_prob, x1, ts, method,
                             exact=exact, num_probes=num_probes, generator=generator)  # fmt: skip

    def sample_and_log_prob(
        self, n: int, steps: int = 50, method: str = "rk4", *, exact: bool = True, num_probes: int = 1,
        condition: Any = None, guidance: float = 1.0, generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Draw from the probability flow, with log densities, in one pass: ``(n, d)`` and ``(n,)``."""
        law = self.starts.law()
        x0 = self.starts.draw(n, generator=generator)
        x1, change = flow_with_log_density(
            self._velocity(condition, guidance), x0, self._grid(steps, x0), method,
            exact=exact, num_probes=num_probes, generator=generator,
        )  # fmt: skip
        return x1, law.log_prob(x0) + change

    def sde_log_prob(
        self,
        x1: Tensor,
        epsilon: EpsilonLike = 0.5,
        steps: int = 100,
        *,
        num_paths: int = 64,
        method: str = "feynman-kac",
        proposal: str = "score",
        condition: Any = None,
        generator: torch.Generator | None = None,
    ) -> PathWeights:
        """Return weighted paths whose mean weight is the density of the SDE sampler at ``x1 (n, d)``; ``.log_prob`` is its log.

        Args:
            x1: ``(n, d)``.
            epsilon: strength of the noise, not zero in any step.
            steps: of the grid.
            num_paths: paths a point.
            method: ``"feynman-kac"`` or ``"transition"``; see :func:`stochdyn.interpolants.densities.likelihood.feynman_kac_log_prob`.
            proposal: ``"score"`` runs back with the reversed drift, ``"drift"`` with the forward one, whose weights vary wildly.
            condition: labels or context ``(n, ...)``.
            generator: source of randomness.

        Raises:
            UnavailableError: if the networks give no score, or the density of the starts isn't known.
        """
        self._need_score()
        self._check_points(x1, "x1")
        check_choice(proposal, ("score", "drift"), "proposal")
        law = self.starts.law(x1.shape[-1], x1)
        level = as_epsilon(epsilon, self.interpolant)
        if condition is not None:
            condition = condition.repeat(num_paths, *[1] * (condition.ndim - 1))
        drift = ForwardDrift(self.fields, level, condition, 1.0)

        def score(t: Tensor, y: Tensor) -> Tensor:
            return self.fields("score", t, y, condition)

        with torch.no_grad():
            return feynman_kac_log_prob(
                drift, lambda t: (2 * level(t)).sqrt(), law.log_prob, x1, self._grid(steps, x1),
                score=score if proposal == "score" else None, num_paths=num_paths, method=method, generator=generator,
            )  # fmt: skip

    def measure(
        self, epsilon: EpsilonLike = 0.5, condition: Any = None, guidance: float = 1.0
    ) -> DiffusionMeasure:
        r"""Return the law of the forward equation :math:`dX=(b+\varepsilon s)dt+\sqrt{2\varepsilon}dW` on [0, 1].

        Epsilon isn't tapered here, since a law without noise at its ends has no densities with respect to others.

        Args:
            epsilon: a positive number, a function of time, or ``"optimal"``.
            condition: labels or context.
            guidance: see :meth:`push`.

        Raises:
            UnavailableError: if the networks give no score, or the law of the starts isn't known.
            InvalidInputError: if epsilon is zero.
        """
        self._need_score()
        level = as_epsilon(epsilon, self.interpolant)
        if level.vanishes:
            raise InvalidInputError(
                "a path measure needs noise", got="epsilon=0", hint="push() is the probability flow"
            )
        drift = ForwardDrift(self.fields, level, condition, guidance)

        def diffusion(t: Tensor, x: Tensor) -> Scalar:
            time = torch.as_tensor(t, dtype=x.dtype, device=x.device)
            strength = (2 * level(time)).sqrt().clamp_min(1e-6)
            return Scalar(strength[..., 0] if strength.ndim else strength)

        constant = level.constant
        return DiffusionMeasure(
            self.starts.law(), SDE(drift, diffusion if constant is None else (2 * constant) ** 0.5)
        )

    def distribution(
        self, steps: int = 50, method: str = "rk4", condition: Any = None
    ) -> InterpolantDistribution:
        """Return the law of the probability flow as a Pyro distribution with event ``(d,)``.

        Args:
            steps: of the grid.
            method: see :meth:`push`.
            condition: one label, or one context vector.

        Raises:
            UnavailableError: if the density of the starts isn't known.
        """
        from stochdyn.interpolants.sampling.distribution import InterpolantDistribution

        return InterpolantDistribution(self, steps, method, condition)
