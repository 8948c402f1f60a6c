"""Gaussian laws on paths: what follows, for each of them, from the linear chain that it is on a grid."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    as_time_grid,
    check_choice,
    check_event_size,
    check_finite,
    check_ndim,
    check_same_device,
    check_same_dtype,
    check_type,
)
from stochdyn.core.forward.fokker_planck import FokkerPlanck
from stochdyn.core.forward.operator import ForwardOperator
from stochdyn.core.gaussian.chain import GaussianChain
from stochdyn.core.gaussian.density import (
    Conditionals,
    chain_conditionals,
    check_common_events,
    same_covariance,
)
from stochdyn.core.gaussian.observations import Observations, as_observations, union_of
from stochdyn.core.gaussian.recursion import align
from stochdyn.core.law import girsanov
from stochdyn.core.law.marginals import GaussianMarginal, Generator, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import Path, PathSample
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import DiffusionMismatchError, ShapeError, UnavailableError

if TYPE_CHECKING:
    from stochdyn.core.gaussian.conditioned import ConditionedMeasure
    from stochdyn.core.law.diffusion import DiffusionMeasure

__all__ = ["GaussianPathMeasure", "GaussianPathPosterior"]


@dataclass(frozen=True)
class GaussianPathPosterior:
    """The law of a Gaussian path given observations, at the times asked for.

    Attributes:
        ts: The times ``(T,)`` of the answer.
        mean: The mean ``(*B, T, d)``.
        covariance: The covariances ``(*B, T, d, d)`` of the marginals.
        log_evidence: The log density ``(*B,)`` of the observations.
        law: The posterior as a law on paths, from which to draw and which answers at other times.
    """

    ts: Tensor
    mean: Tensor
    covariance: Tensor
    log_evidence: Tensor
    law: ConditionedMeasure

    @property
    def variance(self) -> Tensor:
        """``(*B, T, d)`` marginal variances, clipped at zero."""
        return self.covariance.diagonal(dim1=-2, dim2=-1).clamp_min(0.0)


class GaussianPathMeasure(PathMeasure):
    r"""A law under which the values at any times are jointly Gaussian, as a linear function of a Markov chain.

    .. math:: X_{t_n}=Hz_n+h,\qquad z_{n+1}=A_nz_n+c_n+e_n,\quad e_n\sim N(0,Q_n).

    A subclass says what the chain is on a grid (:meth:`chain`) and, where the path isn't the whole state of the chain,
    how it is read (:meth:`read`). Moments, draws, densities, the evidence of observations and the posterior follow.

    Attributes:
        dim: The number of components d of a path.
        batch_shape: The shape ``*B`` of a batch of laws.
    """

    dim: int
    batch_shape: torch.Size
    #: Whether grids may be ``(*B, T)``, one for every series.
    series_grids = False

    @abstractmethod
    def chain(self, ts: Tensor) -> GaussianChain:
        """Return the chain of the law at times ``ts (T,)``.

        Raises:
            TimeGridError: If the grid doesn't increase strictly, or leaves the span of the law.
        """

    @property
    @abstractmethod
    def like(self) -> Tensor:
        """A tensor of the precision and on the device of the law."""

    def read(self) -> tuple[Tensor | None, Tensor | None]:
        """Return :math:`H (d, z)` and :math:`h (*B, d)`, None for the identity and for zero."""
        return None, None

    def dtype_at(self, ts: Tensor) -> torch.dtype:
        """Return the precision of answers at times ``ts``."""
        return self.like.dtype

    def mean(self, ts: Tensor) -> Tensor:
        """Return the means ``(*B, T, d)`` at times ``ts (T,)``."""
        return self._moments(ts)[0].movedim(0, -2)

    def covariance(self, ts: Tensor) -> Tensor:
        """Return the marginal covariances ``(*B, T, d, d)`` at times ``ts (T,)``."""
        return self._moments(ts)[1].movedim(0, -3)

    def joint_covariance(self, ts: Tensor) -> Tensor:
        """Return the covariance ``(*B, T d, T d)`` of the path, flattened with time leading."""
        ts = self._grid(ts)
        return self.chain(ts).joint_covariance(self.read()[0]).to(self.dtype_at(ts))

    def marginal(self, t: Tensor | float) -> GaussianMarginal:
        """Return the law ``N(mean, covariance)`` of the state at one time.

        Raises:
            TimeGridError: If the time lies outside the span of the law.
        """
        t = as_tensor(t, "t", 0, "one time", like=self.like)
        mean, cov = self._moments(t[None])
        return GaussianMarginal(mean[0], cov[0])

    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw exact paths ``(*sample, *B, T, d)`` at times ``ts (T,)``, reparametrised; see :meth:`PathMeasure.sample`."""
        ts, shape = self._grid(ts), as_sample_shape(sample_shape)
        z = self.chain(ts).sample(shape, as_generator(generator, self.like.device))
        x = self._read_states(z, len(shape) + 1)
        return PathSample.of_states(ts, x.movedim(len(shape), -2).to(self.dtype_at(ts)), self)

    def log_prob(self, path: Path) -> Tensor:
        """Return the exact log density ``(*sample, *B)`` of the values of paths ``x (*sample, *B, T, d)`` at their times.

        Values that are certain, such as a fixed start on the grid, are not part of the event: the density is then that
        of the other points given these.

        Raises:
            SingularDiffusionError: If a transition has no density.
        """
        self._check_path(path)
        return self._density(path)[0]

    def log_rn(
        self, path: Path, other: PathMeasure, estimator: str = "density", *, recorded: bool = False
    ) -> Tensor:
        r"""Return :math:`\log dQ/dP` of the values at the times of the paths, ``(*sample, *B)``; see :meth:`PathMeasure.log_rn`.

        It is exact where both laws are Gaussian: a ratio of products of Gaussian densities, of every point given the points
        before it. ``"rate"`` is the sum of the divergences of these, on the path's past. Otherwise, both laws are taken by
        their Euler transitions, as between two :class:`~stochdyn.DiffusionMeasure` s.

        Raises:
            DiffusionMismatchError: If the laws are mutually singular.
            UnavailableError: If the densities of the other law aren't known.
        """
        check_choice(estimator, girsanov.ESTIMATORS, "estimator")
        check_type(other, PathMeasure, "other")
        self._check_path(path)
        if not isinstance(other, GaussianPathMeasure):
            return self.as_diffusion().log_rn(path, other, estimator, recorded=recorded)
        other._check_path(path)
        self.check_comparable(other, path.ts)
        if estimator == "density":
            (mine, kept), (theirs, other_kept) = self._density(path), other._density(path)
            check_common_events(kept, other_kept)
            return mine - theirs
        here, there = self.conditionals(path), other.conditionals(path)
        check_common_events(here.keep, there.keep)
        if estimator == "rate":
            return here.divergence(there)
        return self.conditionals(path, stop=True).log_prob() - there.log_prob()

    def check_comparable(self, other: GaussianPathMeasure, ts: Tensor) -> None:
        """Raise unless the path laws can have a density with respect to each other: diffusions must share their noise.

        Raises:
            ShapeError: If the states differ in size.
            DiffusionMismatchError: If the laws are mutually singular.
        """
        if self.dim != other.dim:
            raise ShapeError("the laws have states of different size", got=f"{self.dim} and {other.dim}")
        try:
            mine, theirs = self.covariance_rate(ts.detach()), other.covariance_rate(ts.detach())
        except UnavailableError:
            return
        batch = torch.broadcast_shapes(mine.shape[1:-2], theirs.shape[1:-2])
        if not bool(same_covariance(align(mine, 1, 2, batch), align(theirs, 1, 2, batch)).all()):
            raise DiffusionMismatchError(
                "the laws have different diffusions, so their path laws are mutually singular",
                hint="densities of the values at some times are log_prob(path) of each",
            )

    def conditionals(self, path: Path, stop: bool = False) -> Conditionals:
        """Return the laws of every point of a path given the points before it; ``stop`` cuts off the law's own gradient."""
        emission, offset = self.read()
        chain = self.chain(path.ts)
        if stop:
            chain = chain.detach()
            emission, offset = (None if v is None else v.detach() for v in (emission, offset))
        x = path.x.to(chain.transition.dtype)
        x = x if offset is None else x - offset[..., None, :]
        return chain_conditionals(chain, x, emission, self.certain(chain, path.ts))

    def certain(self, chain: GaussianChain, ts: Tensor) -> Tensor:
        """Return ``(T, *B)``, True for points known beforehand, which are no part of the event: a fixed start."""
        fixed = (chain.initial_cov == 0).all(-1).all(-1)
        out = torch.zeros(ts.shape[-1], *fixed.shape, dtype=torch.bool, device=fixed.device)
        out[0] = fixed
        return out

    def random_points(self, ts: Tensor) -> Tensor:
        """Return ``(T, *B)``, True for the points of a grid that :meth:`log_prob` is a density of: none that is certain."""
        return ~self.certain(self.chain(ts), ts)

    def covariance_rate(self, t: Tensor) -> Tensor:
        r"""Return :math:`GG^\top (n, *B, d, d)` of a diffusion at times ``t (n,)``.

        Raises:
            UnavailableError: If the law isn't a diffusion in its state alone.
        """
        self._refuse("covariance_rate", "it isn't a diffusion in its state alone")

    def to_sde(self) -> SDE:
        """Return the equation of a diffusion, for simulation and control.

        Raises:
            UnavailableError: If the law isn't a diffusion in its state alone.
        """
        self._refuse("equation", "it isn't a diffusion in its state alone")

    def forward(self) -> ForwardOperator:
        """Return the Fokker-Planck operator of a diffusion.

        Raises:
            UnavailableError: If the law isn't a diffusion in its state alone.
        """
        return FokkerPlanck(self.to_sde())

    def as_diffusion(self) -> DiffusionMeasure:
        """Return the law as a :class:`~stochdyn.DiffusionMeasure`, which is simulated step by step.

        Raises:
            UnavailableError: If it isn't a diffusion in its state alone.
        """
        self._refuse("equation", "it isn't a diffusion in its state alone")

    # ------------------------------------------------------------------------------- observations

    def log_evidence(
        self,
        times: Tensor,
        y: Tensor,
        obs_scale: Tensor | float,
        emission: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        r"""Return the ``(*B,)`` log density of observations :math:`y_i=CX_{t_i}+\sigma_i\epsilon_i`.

        Args:
            times: The strictly increasing times ``(T,)`` of the observations, none before the law starts; ``(*B, T)``
                where every series has its own (of a linear law; fill short series up with later times and NaN).
            y: The observed values ``(*B, T, p)``; NaN where a value is missing.
            obs_scale: The standard deviation of the noise: a number, ``(p,)``, ``(T, p)`` or ``(*B, T, p)``; zero for
                exact observations.
            emission: The matrix that maps states to observations, :math:`C`, ``(p, d)`` or ``(*B, T, p, d)``; None for
                the identity.
            mask: True where observed: ``(T,)``, ``(*B, T)`` or, with as many axes as ``y``, ``(*B, T, p)``; None if only
                NaN is missing.

        Raises:
            TimeGridError, ShapeError, NonFiniteError, InvalidInputError: On arguments that don't fit.
            SingularDiffusionError: If the observations have no density.

        Example:
            >>> from stochdyn import LinearGaussianMeasure
            >>> times, y = torch.tensor([1.0, 2.0]), torch.tensor([[0.3], [0.1]])
            >>> LinearGaussianMeasure.brownian().log_evidence(times, y, obs_scale=0.1)
            tensor(-1.9163)
        """
        seen = self.observations(times, y, obs_scale, emission, mask)
        return self.chain(seen.times).log_evidence(**seen.on(seen.times)).to(self.dtype_at(seen.times))  # type: ignore[arg-type]

    def conditioned(
        self,
        times: Tensor,
        y: Tensor,
        obs_scale: Tensor | float,
        emission: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> ConditionedMeasure:
        """Return the law given observations, again a law on paths; the arguments are those of :meth:`log_evidence`.

        Example:
            >>> from stochdyn import LinearGaussianMeasure
            >>> walk = LinearGaussianMeasure.brownian(initial_mean=torch.zeros(1))
            >>> bridge = walk.conditioned(torch.tensor([2.0]), torch.tensor([[1.0]]), obs_scale=0.0)
            >>> bridge.mean(torch.tensor([1.0])), bridge.covariance(torch.tensor([1.0])).flatten()
            (tensor([[0.5000]]), tensor([0.5000]))
        """
        from stochdyn.core.gaussian.conditioned import ConditionedMeasure

        return ConditionedMeasure(self, self.observations(times, y, obs_scale, emission, mask))

    def posterior(
        self,
        times: Tensor,
        y: Tensor,
        obs_scale: Tensor | float,
        ts: Tensor | None = None,
        emission: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> GaussianPathPosterior:
        """Return moments of the path given observations, and its law.

        Args:
            times: The times of the observations, as in :meth:`log_evidence`.
            y: The observations.
            obs_scale: The standard deviation of the noise of the observations.
            ts: The times ``(T,)`` at which the posterior is wanted, before, between or after the observations; the
                times of the observations if None.
            emission: The matrix by which the state is observed.
            mask: Which values are observed.
        """
        law = self.conditioned(times, y, obs_scale, emission, mask)
        return law.summary(law.seen.times if ts is None else ts)

    def observations(
        self, times: object, y: object, obs_scale: object, emission: object, mask: object
    ) -> Observations:
        """Check observations of the path, and express them in the state of the chain."""
        seen = as_observations(
            times, y, obs_scale, emission, mask, self.dim, self._state_like(times), self.series_grids
        )
        read, offset = self.read()
        values, through = seen.y, seen.emission
        if offset is not None:
            shift = through @ offset.unsqueeze(-1)  # (T or nothing, *B, p, 1)
            values = values - shift.squeeze(-1)
        if read is not None:
            through = through @ read
        return Observations(seen.times, values, through, seen.obs_cov, seen.mask)

    # ----------------------------------------------------------------------------------- machinery

    def _density(self, path: Path) -> tuple[Tensor, Tensor]:
        """Return the log density of paths, and which points ``(T, b)`` it is of."""
        conditionals = self.conditionals(path)
        return conditionals.log_prob().to(self.dtype_at(path.ts)), conditionals.keep

    def _state_like(self, times: object) -> Tensor:
        return self.like

    def _grid(self, ts: object) -> Tensor:
        ts = as_time_grid(ts, "ts", 1, like=self.like, batch=self.series_grids)
        check_same_device(ts=ts, law=self.like)
        return ts

    def _moments(self, ts: Tensor) -> tuple[Tensor, Tensor]:
        """Return means ``(T, *B, d)`` and covariances ``(T, *B, d, d)``."""
        ts = self._grid(ts)
        return self._read_moments(self.chain(ts).moments(), ts)

    def _read_moments(self, moments: tuple[Tensor, Tensor], ts: Tensor) -> tuple[Tensor, Tensor]:
        mean, cov = moments
        emission, _ = self.read()
        mean = self._read_states(mean, 1)
        if emission is not None:
            cov = emission @ cov @ emission.mT
        dtype = self.dtype_at(ts)
        return mean.to(dtype), cov.to(dtype)

    def _read_states(self, z: Tensor, lead: int) -> Tensor:
        """Return ``X (*lead, *B, d)`` of states ``z (*lead, *B, z)``."""
        emission, offset = self.read()
        x = z if emission is None else z @ emission.mT
        if offset is None:
            return x
        gap = x.ndim - lead - 1 - (offset.ndim - 1)
        return x + offset if gap >= 0 else x.reshape(*x.shape[:lead], *(1,) * -gap, *x.shape[lead:]) + offset

    def _check_path(self, path: Path) -> None:
        check_type(path, Path, "path")
        self._grid(path.ts)
        check_ndim(path.x, tuple(range(2, 13)), "path.x", "(*sample, *B, T, d)")
        check_event_size(path.x, self.dim, "path.x")
        check_event_size(path.x, path.ts.shape[-1], "path.x", axis=-2)
        check_same_device(path=path.x, law=self.like)
        check_same_dtype(path=path.x, law=self.like.to(self.dtype_at(path.ts)))
        check_finite(path.x.detach(), "path.x")


def union_grid(seen: Observations, ts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the times of observations and of ``ts`` together, and where each of the two are among them.

    Where series have their own times, a time of both stands twice.
    """
    times = seen.times.to(torch.promote_types(seen.times.dtype, ts.dtype))
    if times.ndim == ts.ndim == 1:
        nodes = union_of(times, ts)
        known = nodes.detach()
        return (
            nodes,
            torch.searchsorted(known, times.detach()),
            torch.searchsorted(known, ts.detach().to(nodes.dtype)),
        )
    batch = torch.broadcast_shapes(times.shape[:-1], ts.shape[:-1])
    every = torch.cat((times.expand(*batch, -1), ts.to(times.dtype).expand(*batch, -1)), -1)
    order = torch.argsort(every.detach(), dim=-1, stable=True)
    places = torch.argsort(order, -1)
    return every.gather(-1, order), places[..., : times.shape[-1]], places[..., times.shape[-1] :]


def pick(x: Tensor, where: Tensor, event: int) -> Tensor:
    """Return rows ``where (S,)`` or ``(*B, S)`` of ``x (M, *B, *event)``."""
    if where.ndim == 1:
        return x.index_select(0, where)
    batch = x.shape[1 : x.ndim - event]
    index = align(where.movedim(-1, 0), 1, 0, torch.broadcast_shapes(batch, where.shape[:-1]))
    full = align(x, 1, event, index.shape[1:])
    index = index.reshape(*index.shape, *(1,) * event)
    return full.gather(0, index.expand(*index.shape[: index.ndim - event], *full.shape[full.ndim - event :]))
