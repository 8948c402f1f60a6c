"""The square-root process of Feller, or Cox, Ingersoll and Ross: exact paths, marginals and densities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    as_time_grid,
    check_event_size,
    check_finite,
    check_points,
    check_positive,
    check_real,
    check_time_broadcast,
    check_type,
)
from stochdyn.core.law.marginals import GaussianMarginal, Generator, Marginal, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.noncentral import noncentral_chi2_log_density
from stochdyn.core.law.path import Path, PathSample
from stochdyn.core.sde.coefficients import Diagonal
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError, ShapeError, TimeGridError

if TYPE_CHECKING:
    from stochdyn.core.forward.fokker_planck import FokkerPlanck

__all__ = ["SquareRootProcess"]


class SquareRootProcess(PathMeasure):
    r"""The law of positive states whose noise is a square root, exact on every grid.

    .. math:: dX=k(m-X)\,dt+s\sqrt X\,dW,\qquad X_{t+h}\mid X_t=x\ \sim\ c\,\chi'^2_\nu(xe^{-kh}/c),\quad
        c=\tfrac{s^2}{4k}(1-e^{-kh}),\ \nu=\tfrac{4km}{s^2}

    Use it for rates, variances and abundances that may come near zero or touch it (:math:`2km<s^2`), where Euler steps leave the
    positive numbers and steps in logarithms explode. Components are independent. Densities can be differentiated in all parameters;
    draws carry no gradient.

    Args:
        rate: The rate k of relaxation, positive, a number or ``(*B, d)``, in 1/time.
        mean: The mean m, positive, likewise, in units of the state.
        diffusion: The noise strength s, positive, likewise, in roots of the unit of the state over time.
        initial: The fixed start ``(*B, d)``, none negative; None for the stationary law, :math:`\Gamma(2km/s^2,\,2k/s^2)`.
        initial_time: The time of the start.

    Raises:
        InvalidInputError: If a parameter isn't positive, or a start is negative.
        ShapeError: If parameters and start don't fit each other.

    Example:
        >>> law = SquareRootProcess(rate=2.0, mean=1.0, diffusion=2.0, initial=torch.tensor([0.3]))
        >>> law.marginal(1.0).mean, bool((law.sample([0.0, 0.5, 1.0], 100, 0).x >= 0).all())
        (tensor([0.9053]), True)

    Reference:
        J. C. Cox, J. E. Ingersoll and S. A. Ross, A theory of the term structure of interest rates, 1985, equation 18.
    """

    rate: Tensor
    mean_level: Tensor
    diffusion: Tensor
    initial: Tensor | None

    def __init__(
        self,
        rate: Tensor | float,
        mean: Tensor | float,
        diffusion: Tensor | float,
        initial: Tensor | None = None,
        *,
        initial_time: float = 0.0,
    ) -> None:
        super().__init__()
        check_real(initial_time, "initial_time", fixed=True)
        named = {"rate": rate, "mean": mean, "diffusion": diffusion, "initial": initial}
        tensors = [x for x in named.values() if isinstance(x, Tensor)]
        like = tensors[0] if tensors else torch.zeros(())
        given = {
            name: as_tensor(x, name, like=like)
            for name, x in named.items()
            if x is not None or name != "initial"
        }
        for name in ("rate", "mean", "diffusion"):
            check_positive(given[name].detach(), name)
        try:
            shape = torch.broadcast_shapes((1,), *(x.shape for x in given.values()))
        except RuntimeError as error:
            got = ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
            raise ShapeError("parameters and start don't fit each other", got=got) from error
        if initial is not None:
            check_finite(given["initial"].detach(), "initial")
            if bool((given["initial"].detach() < 0).any()):
                raise InvalidInputError(
                    "initial must not be negative", got=f"minimum {given['initial'].min():g}"
                )
        self.batch_shape, self.dim, self.initial_time = shape[:-1], shape[-1], float(initial_time)
        for name, key in (
            ("rate", "rate"),
            ("mean_level", "mean"),
            ("diffusion", "diffusion"),
            ("initial", "initial"),
        ):
            self._keep(name, given.get(key))

    def _keep(self, name: str, value: Tensor | None) -> None:
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        else:
            # A copy, so that loading a state doesn't write into the user's tensor.
            self.register_buffer(
                name, value if value is None or value.requires_grad else value.detach().clone()
            )

    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw exact paths ``(*sample, *B, T, d)`` at ``ts (T,)`` or ``(*B, T)``; see :meth:`PathMeasure.sample`."""
        ts, gaps, shape = *self._gaps(ts), as_sample_shape(sample_shape)
        source = as_generator(generator, self.rate.device)
        batch = torch.broadcast_shapes(self.batch_shape, ts.shape[:-1])
        with torch.no_grad():
            x = self._start((*shape, *batch, self.dim), source)
            states = []
            for gap in gaps.unbind(0):
                x = self._push(x, gap, source)
                states.append(x)
        return PathSample.of_states(ts, torch.stack(states, -2).to(self.rate.dtype), self)

    def marginal(self, t: Tensor | float) -> Marginal:
        """Return the exact law of the state at one time.

        Raises:
            TimeGridError: If the time lies before the start.
        """
        check_real(t, "t")
        gap = torch.as_tensor(t, dtype=torch.float64, device=self.rate.device) - self.initial_time
        if float(gap.detach()) < 0:
            raise TimeGridError(
                "the law begins later", got=f"t={float(t):g}", expected=f"at least {self.initial_time:g}"
            )
        if self.initial is not None and float(gap.detach()) == 0:
            point = self.initial.expand(*self.batch_shape, self.dim)
            return GaussianMarginal(point, point.new_zeros(*point.shape, self.dim))
        return _SquareRootMarginal(self, gap)

    def log_prob(self, path: Path) -> Tensor:
        """Return the exact log density ``(*sample, *B)`` of the states of paths at their times; minus infinity below zero.

        A path's first state counts unless it is the fixed start itself.
        """
        check_type(path, Path, "path")
        ts, gaps = self._gaps(path.ts)
        check_event_size(path.x, self.dim, "path.x")
        check_event_size(path.x, ts.shape[-1], "path.x", axis=-2)
        check_finite(path.x.detach(), "path.x")
        batch = torch.broadcast_shapes(path.x.shape[:-2], self.batch_shape)
        states = path.x.expand(*batch, *path.x.shape[-2:]).movedim(-2, 0)
        lead = gaps[1:].reshape(gaps.shape[0] - 1, *(1,) * (states.ndim - gaps.ndim), *gaps.shape[1:])
        steps = self._log_transition(states[:-1], states[1:], lead).sum(0)
        return steps + self._log_start(states[0], gaps[0])

    def random_points(self, ts: Tensor) -> Tensor:
        """Return ``(T, *B)``, True for the points of a grid that :meth:`log_prob` is a density of: all but a fixed start."""
        points = super().random_points(ts)
        if self.initial is not None:
            points[0] = ts.movedim(-1, 0)[0] > self.initial_time
        return points

    def to_sde(self) -> SDE:
        """Return the equation, for filters, guides and plots; its Euler steps take zero for what is below."""
        return SDE(_Pull(self), _Spread(self))

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the drift ``k (m - x) (..., d)`` at ``x (..., d)``."""
        x = as_tensor(x, "x", like=self.rate)
        check_event_size(x, self.dim, "x")
        check_time_broadcast(as_tensor(t, "t", like=x).to(x), x)
        return self.rate * (self.mean_level - x)

    def forward(self) -> FokkerPlanck:
        """Return the Fokker-Planck operator."""
        from stochdyn.core.forward.fokker_planck import FokkerPlanck

        return FokkerPlanck(self.to_sde())

    def _gaps(self, ts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the grid, and the time ``(T, *B, 1)`` from the start or the point before to each of its points."""
        ts = as_time_grid(ts, like=self.rate, batch=True)
        lead = ts.movedim(-1, 0).unsqueeze(-1).double()
        gaps = torch.cat([lead[:1] - self.initial_time, lead[1:] - lead[:-1]])
        if bool((gaps[0].detach() < 0).any()):
            raise TimeGridError(
                "ts begins before the law does",
                got=f"{float(ts.detach().min()):g}",
                expected=f"at least {self.initial_time:g}",
            )
        return ts, gaps

    def _scale(self, gap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scale c, degrees of freedom and what is left of the state after a time."""
        rate, mean, strength = (x.double() for x in (self.rate, self.mean_level, self.diffusion))
        scale = strength.square() / (4 * rate) * -torch.expm1(-rate * gap)
        return scale, 4 * rate * mean / strength.square(), torch.exp(-rate * gap)

    def _start(self, shape: tuple[int, ...], source: torch.Generator | None) -> Tensor:
        if self.initial is not None:
            return self.initial.double().expand(shape)
        _, degrees, _ = self._scale(self.rate.new_zeros(()).double())
        return self._gamma((0.5 * degrees).expand(shape), source) * (self.mean_level / (0.5 * degrees))

    def _push(self, x: Tensor, gap: Tensor, source: torch.Generator | None) -> Tensor:
        """Draw the states after a time: a Poisson mixture of gamma laws."""
        scale, degrees, kept = self._scale(torch.where(gap > 0, gap, torch.ones_like(gap)))
        count = torch.poisson(0.5 * x * kept / scale, source)
        moved = 2 * scale * self._gamma(0.5 * degrees + count, source)
        return torch.where(gap > 0, moved, x)

    @staticmethod
    def _gamma(shape: Tensor, source: torch.Generator | None) -> Tensor:
        return torch._standard_gamma(shape.contiguous(), source)

    def _log_transition(self, before: Tensor, after: Tensor, gap: Tensor) -> Tensor:
        """Return the log density ``(...)`` of states after a time, given those before."""
        scale, degrees, kept = self._scale(gap)
        density = noncentral_chi2_log_density(after / scale, degrees, before * kept / scale)
        return (density - scale.log()).sum(-1).to(after.dtype)

    def _log_start(self, x: Tensor, gap: Tensor) -> Tensor:
        if self.initial is None:
            rate, mean, strength = (v.double() for v in (self.rate, self.mean_level, self.diffusion))
            slope = 2 * rate / strength.square()
            law = torch.distributions.Gamma(slope * mean, slope, validate_args=False)
            inside = x > 0
            density = law.log_prob(torch.where(inside, x, torch.ones_like(x)).double())
            return torch.where(inside, density, torch.full_like(density, -torch.inf)).sum(-1).to(x.dtype)
        later = gap > 0
        found = self._log_transition(self.initial, x, torch.where(later, gap, torch.ones_like(gap)))
        return torch.where(later.squeeze(-1), found, torch.zeros_like(found))


class _SquareRootMarginal(Marginal):
    """The exact law of the state at a time after the start."""

    def __init__(self, law: SquareRootProcess, gap: Tensor) -> None:
        self.law, self.gap = law, gap

    def sample(self, sample_shape: SampleShape = (), generator: Generator = None) -> Tensor:
        """Draw ``(*sample, *B, d)`` independent states, without gradients."""
        law, source = self.law, as_generator(generator, self.law.rate.device)
        with torch.no_grad():
            x = law._start((*as_sample_shape(sample_shape), *law.batch_shape, law.dim), source)
            # The stationary law stays as it is.
            x = x if law.initial is None else law._push(x, self.gap, source)
        return x.to(law.rate.dtype)

    @property
    def mean(self) -> Tensor:
        """The mean, ``(*B, d)``."""
        law = self.law
        if law.initial is None:
            return law.mean_level.expand(*law.batch_shape, law.dim)
        kept = torch.exp(-law.rate * self.gap)
        mean = law.mean_level + (law.initial - law.mean_level) * kept
        return mean.to(law.rate.dtype).expand(*law.batch_shape, law.dim)

    @property
    def covariance(self) -> Tensor:
        """The covariance, ``(*B, d, d)``."""
        law = self.law
        unit = law.diffusion.square() / law.rate
        if law.initial is None:
            variance = 0.5 * law.mean_level * unit
        else:
            lost, kept = -torch.expm1(-law.rate * self.gap), torch.exp(-law.rate * self.gap)
            variance = unit * lost * (law.initial * kept + 0.5 * law.mean_level * lost)
        return torch.diag_embed(variance.to(law.rate.dtype).expand(*law.batch_shape, law.dim))

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log density ``(...)`` at ``x (..., d)``; minus infinity below zero."""
        check_points(x)
        check_event_size(x, self.law.dim, "x")
        return self.law._log_start(x, self.gap.reshape(1))


class _Pull(nn.Module):
    """The drift."""

    def __init__(self, law: SquareRootProcess) -> None:
        super().__init__()
        self.law = law

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.law.rate * (self.law.mean_level - x)


class _Spread(nn.Module):
    """The diffusion, zero below zero."""

    def __init__(self, law: SquareRootProcess) -> None:
        super().__init__()
        self.law = law

    def forward(self, t: Tensor, x: Tensor) -> Diagonal:
        return Diagonal(self.law.diffusion * x.clamp_min(0).sqrt())
