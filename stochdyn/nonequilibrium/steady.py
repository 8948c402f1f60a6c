"""Learning the score of a steady state from draws of it and its known equation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import as_tensor, check_callable, check_real, check_type
from stochdyn._transforms import recording
from stochdyn.core.forward.asymmetry import Asymmetry, conservativity
from stochdyn.core.forward.divergences import (
    Hutchinson,
    as_trace_method,
    attach,
    divergence_probes,
    exact_divergence,
    pull_back,
    release,
    unbiased_square,
)
from stochdyn.core.forward.flow import LearnedFlow
from stochdyn.core.forward.fokker_planck import FokkerPlanck
from stochdyn.core.networks import MLP
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.nonequilibrium._noise import HalfCovariance
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = ["SteadyScore", "SteadyScoreMatching"]


class SteadyScore(nn.Module):
    r"""A network for the score of a steady state, on top of a score that is nearly right.

    .. math:: s_\theta(x)=s_0(x)+U^{-1}\,n_\theta(\text{features of }U^{-1}(x-m))

    with the mean :math:`m` and the standard deviations :math:`U` of draws. Without a ``base`` the start :math:`s_0` is the score of the
    Gaussian with the draws' mean and covariance. Periodic components enter by their sine and cosine.

    Args:
        x: Draws of the steady state, ``(n, d)``.
        hidden: The widths of the hidden layers.
        base: A score :math:`s_0(x)` to start from, such as force over temperature.
        periods: The period of each component, ``(d,)``; 0 or infinity where a component isn't periodic. None if none is.
        potential: Whether the network is a potential of which the score is the gradient. A score is a gradient, so this
            is the right restriction; it costs a second differentiation, and pays for up to some fifty components.
        activation: The nonlinearity between the layers, smooth for a potential.

    Raises:
        ShapeError: If draws and periods don't fit each other.
    """

    mean: Tensor
    unit: Tensor
    precision: Tensor
    periods: Tensor
    around: Tensor
    along: Tensor

    def __init__(
        self,
        x: object,
        hidden: Sequence[int] = (64, 64, 64),
        base: Callable[[Tensor], Tensor] | None = None,
        periods: object = None,
        potential: bool = False,
        activation: str = "silu",
    ) -> None:
        super().__init__()
        points = as_tensor(x, "x", 2, "(n, d)").detach()
        check_type(hidden, (tuple, list), "hidden")
        n, dim = points.shape
        if n < 2:
            raise ShapeError("x needs at least two draws", got=n)
        if base is not None:
            check_callable(base, "base")
        period = (
            points.new_zeros(dim)
            if periods is None
            else as_tensor(periods, "periods", 1, "(d,)", like=points, finite=False).to(points)
        )
        if period.shape != (dim,):
            raise ShapeError(
                "periods must have one entry per component", got=tuple(period.shape), expected=f"({dim},)"
            )
        period = torch.where(torch.isfinite(period), period, 0.0)
        unit = points.std(0)
        unit = torch.where(unit > 0, unit, 1.0)
        self.register_buffer("mean", points.mean(0))
        self.register_buffer("unit", unit)
        self.register_buffer("periods", period)
        # A Gaussian start for the components that aren't periodic, in their own units.
        still = period > 0
        # Which components are periodic is asked once, not in every step.
        self.register_buffer("around", still.nonzero()[:, 0], persistent=False)
        self.register_buffer("along", (~still).nonzero()[:, 0], persistent=False)
        z = torch.where(still, 0.0, (points - points.mean(0)) / unit)
        covariance = (z.mT @ z / n).double()
        inverse = torch.linalg.pinv(covariance, rtol=1e-10, hermitian=True).to(points)
        self.register_buffer("precision", inverse)
        self.base, self.potential = base, potential
        inputs = dim + int(still.sum())
        self.network = MLP(
            (inputs, *hidden, 1 if potential else dim), zero_last=True, activation=activation
        ).to(points)

    def _features(self, z: Tensor, x: Tensor) -> Tensor:
        if not self.around.numel():
            return z
        angle = 2 * torch.pi * x[..., self.around] / self.periods[self.around]
        return torch.cat([z[..., self.along], angle.sin(), angle.cos()], -1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the score ``(..., d)`` at ``x (..., d)``."""
        z = (x - self.mean) / self.unit
        start = -(z @ self.precision) / self.unit if self.base is None else self.base(x)
        if not self.potential:
            return start + self.network(self._features(z, x)) / self.unit
        keep = torch.is_grad_enabled()
        with recording():
            y = attach(x)
            energy = self.network(self._features((y - self.mean) / self.unit, y)).squeeze(-1)
            slope = pull_back(energy, y)
        return start + release(slope, keep, (x, y))


class _Timeless(nn.Module):
    """A score of states as one of time and state."""

    def __init__(self, score: nn.Module) -> None:
        super().__init__()
        self.score = score

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.score(x)


class SteadyScoreMatching(Objective):
    r"""Score matching for a steady state whose equation is known, with the stationary Fokker-Planck equation as a second term.

    .. math::
        \frac{E[s\cdot Ds+2\nabla\cdot(Ds)]+w\,E[(\nabla\cdot v+v\cdot s)^2]/\lambda}{\lambda},\qquad
        v=f-Ds,\quad \lambda=E[s_0\cdot Ds_0]

    The first part is, up to a constant, the mean square error of the score in the metric of the noise, so directions without noise,
    which carry no entropy production either, are left alone. The second is zero for the exact score. Both are divided by the rate
    :math:`\lambda` of the first batch, so that the weight has no unit.

    Matching is implicit by default: it takes a divergence of the network, no noise is added to the draws, and the score is that of
    the steady state itself. With a ``noise_level`` :math:`\tau` it is denoising: draws are blurred, and the divergence is replaced by

    .. math:: E\big[s(y)\cdot D(y)\,(y-x)\big]/\tau^2u^2,\qquad y=x\pm\tau u\,z,

    componentwise with the standard deviations u of a batch of draws, over both signs of the same z. That takes two evaluations and no derivative
    of the network, which is quicker for many components. But the score is then that of the *blurred* law: for a Gaussian with covariance C
    it is :math:`-(C+\tau^2u^2)^{-1}x`, and rates have an error of order :math:`\tau^2`, divided by the square of the length over which
    the density changes in units of u. Halve the level and see whether the rate stays, or extrapolate two levels to zero.

    Args:
        sde: The equation, a control included.
        score: A module from states ``(..., d)`` to scores ``(..., d)``, such as a :class:`SteadyScore` or a :class:`ParticleScore`.
        fp_weight: The weight :math:`w` of the stationary Fokker-Planck equation; 0 leaves it out. It makes current and score
            consistent with each other at about twice the cost. A current that vanishes has no residual, so a weight of about one pulls the
            rate down while the network is still far from the score; a tenth hardly does.
        method: How divergences are computed: ``"exact"``, with one derivative per component, or ``"hutchinson"``, with the random probes of
            a :class:`~stochdyn.core.Hutchinson`, for many components. The square of the residual needs two probes or more. Denoising needs it
            for the residual alone.
        noise_level: The standard deviation :math:`\tau` of the noise of denoising, in units of each component's own standard deviation in the
            batch; None for implicit matching. A hundredth to a tenth, less where the density has narrow parts.

    Raises:
        InvalidInputError: If an option is unknown or out of range.

    Example:
        >>> import stochdyn as sd
        >>> draws = torch.randn(500, 1, generator=torch.Generator().manual_seed(0)).double()
        >>> objective = SteadyScoreMatching(sd.SDE(lambda t, x: -x, 2**0.5), SteadyScore(draws, hidden=(8,)))
        >>> objective(draws).bound
        'surrogate'

    Reference:
        A. Hyvärinen, "Estimation of non-normalized statistical models by score matching", 2005; N. M. Boffi and E. Vanden-Eijnden,
        "Deep learning probability flows and entropy production rates in active matter", 2024; denoising: P. Vincent, "A connection between
        score matching and denoising autoencoders", 2011.
    """

    scale: Tensor

    def __init__(
        self,
        sde: SDE,
        score: nn.Module,
        fp_weight: float = 0.0,
        method: str | Hutchinson = "exact",
        noise_level: float | None = None,
    ) -> None:
        super().__init__()
        check_type(sde, SDE, "sde")
        check_type(score, nn.Module, "score")
        check_real(fp_weight, "fp_weight", minimum=0.0)
        if noise_level is not None:
            check_real(noise_level, "noise_level", above=0.0)
        self.method = as_trace_method(method, ("exact", "hutchinson"))
        if fp_weight and isinstance(self.method, Hutchinson) and self.method.num_probes < 2:
            raise InvalidInputError("the square of the residual needs two probes or more", got="num_probes=1")
        self.sde, self.network, self.fp_weight = sde, score, float(fp_weight)
        self.operator = FokkerPlanck(sde)
        self.flow = LearnedFlow(_Timeless(score), "score")
        self.noise_level = None if noise_level is None else float(noise_level)
        self.register_buffer("scale", torch.full((), torch.nan))

    def score(self, x: Tensor) -> Tensor:
        """Return the score ``(..., d)`` that has been learnt."""
        return self.network(x)

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate on draws of the steady state ``(n, d)``."""
        if not isinstance(batch, Tensor) or batch.ndim != 2:
            got = f"shape {tuple(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
            raise ShapeError("a batch must hold draws of the steady state", got=got, expected="(n, d)")
        t = torch.zeros((), dtype=batch.dtype, device=batch.device)
        square, spread = self._implicit(t, batch) if self.noise_level is None else self._denoising(t, batch)
        # The rate of the first batch stays for the whole run, so that the objective doesn't change on the way.
        first = square.detach().mean().to(self.scale)
        self.scale.copy_(torch.where(torch.isnan(self.scale) & (first > 0), first, self.scale))
        scale = torch.where(torch.isnan(self.scale), 1.0, self.scale).to(square)
        matching = (square + 2 * spread).mean() / scale
        terms, loss = {"matching": matching.detach()}, matching
        if self.fp_weight:
            method: Any = self.method
            residuals = self.operator.residual_probes(
                self.flow,
                t,
                batch,
                method=method,
                stationary=True,
            )
            exact = not isinstance(self.method, Hutchinson)
            squares = residuals[0].square() if exact else unbiased_square(residuals)
            residual = squares.mean() / scale.square()
            terms["residual"] = residual.detach()
            loss = loss + self.fp_weight * residual
        return ObjectiveValue(loss, terms)

    def _pulled(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the score ``s`` and ``D s`` at states ``(n, d)``."""
        s = self.network(x)
        return s, HalfCovariance(self.sde.diffusion(t, x), x.shape[-1]).times(s)

    def _implicit(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return :math:`s\cdot Ds` and :math:`\nabla\cdot(Ds)` at draws ``(n, d)``, ``(n,)`` each."""
        keep = torch.is_grad_enabled()
        with recording():
            y = attach(x)
            s, pull = self._pulled(t, y)
            if isinstance(self.method, Hutchinson):
                spread = divergence_probes(pull, y, self.method.sample(y), keep).mean(0)
            else:
                spread = exact_divergence(pull, y, keep)
            return (s * pull).sum(-1), spread

    def _denoising(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        r"""Return the same at blurred draws, without a derivative: for the conditional score :math:`-(y-x)/\tau^2u^2`.

        :math:`\tfrac12E[s\cdot Ds+2s\cdot D(y-x)/\tau^2u^2]` over both signs of the noise. With one sign the variance would grow as the
        noise falls; the difference of the two is a central difference, and stays finite.
        """
        assert self.noise_level is not None
        if len(x) < 2:
            raise ShapeError("denoising needs two draws or more in a batch", got=len(x))
        width = x.std(0)
        width = self.noise_level * torch.where(width > 0, width, 1.0)
        z = torch.randn_like(x, memory_format=torch.contiguous_format)
        s, pull = self._pulled(t, torch.cat([x + width * z, x - width * z]))
        there, back = pull.chunk(2)
        first, second = (s * pull).sum(-1).chunk(2)
        return 0.5 * (first + second), 0.5 * ((there - back) * z / width).sum(-1)

    def conservativity(
        self, x: Tensor, num_probes: int = 4, generator: torch.Generator | int | None = None
    ) -> Asymmetry:
        """Return how far the learnt score is from a gradient, in units of each component's spread, by random probes.

        The exact score is a gradient. What isn't one in the error changes the rate at first order, by its product with the current,
        and no sum over the error's square tells its sign; so a share that isn't small is a reason for ``SteadyScore(potential=True)`` or a
        larger ``fp_weight``.

        Args:
            x: Draws of the steady state, ``(n, d)``, two or more.
            num_probes: The number of pairs of probes per draw.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Raises:
            ShapeError: If ``x`` isn't ``(n, d)`` with two draws or more.
        """
        points = as_tensor(x, "x", 2, "(n, d)").detach()
        if len(points) < 2:
            raise ShapeError("x needs at least two draws", got=len(points))
        return conservativity(
            self.flow.score, 0.0, points, spread=points.std(0), num_probes=num_probes, generator=generator
        )
