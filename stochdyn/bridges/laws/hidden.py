"""Mechanisms of which only some components are seen: bridges under a nonlinear reference with hidden components."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_tensor,
    check_positive,
    check_positive_definite,
)
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.families.base import DriftFamily
from stochdyn.bridges.laws.hidden_chain import HiddenChain, log_normal
from stochdyn.bridges.laws.linearised import LinearisedTransition, Transition, transition
from stochdyn.bridges.laws.nodes import DriftNodes, bridge_nodes, choose_pairs
from stochdyn.bridges.laws.reference import fitted_family, spread_of
from stochdyn.bridges.laws.sampling import _merged, _pinned_paths
from stochdyn.core.gaussian.small import psd_factor
from stochdyn.errors import DiffusionError, NonFiniteError, ShapeError

__all__ = ["HiddenStateBridge"]

# Time points of the inner grid in the shortest interval, unless given.
_POINTS = 10
# The ensemble by which the first draws of hidden components are proposed, and how much wider than it they are.
_ENSEMBLE, _WIDER = 500, 1.5


class _Weights:
    """Weights of pairs of draws, as a coupling."""

    def __init__(self, weights: Tensor) -> None:
        self._weights = weights

    @property
    def shape(self) -> torch.Size:
        return self._weights.shape

    @property
    def mass(self) -> Tensor:
        return self._weights.sum()

    def plan(self) -> Tensor:
        return self._weights

    def blocks(self) -> Any:
        yield slice(None), self._weights


class HiddenStateBridge(HiddenChain):
    r"""The law nearest to a nonlinear reference whose *seen* components have the snapshots for marginals.

    .. math:: \min_q\mathrm{KL}(q\,\|\,p)\quad\text{with}\quad (X_{t_i})_{1..p}\sim\pi_i,\ i=1,\dots,I

    As in :class:`PartialBridge`, hidden components are weighted draws for every particle, and potentials of the snapshots follow from
    messages over the whole chain; transition densities are those of the reference linearised about its path without noise from each draw, and
    paths between draws those of :mod:`stochdyn.bridges.laws.linearised`. The first draws are proposed by an ensemble of the reference that
    is regressed on each snapshot in turn, further rounds draw around those that proved likely.

    Use it for species that aren't measured, and for positions without velocities; under a linear reference :class:`PartialBridge`
    needs no linearisation.

    Args:
        snapshots: The snapshots of the first ``p`` components.
        reference: The drift of the whole state, a :class:`DriftFamily`, an ``nn.Module`` or a callable ``(t, x)``.
        diffusion: The noise of the reference, a number, ``(d,)`` or ``(d, m)``, which must reach every component, directly or
            through the drift, as that of a velocity reaches positions.
        initial_mean: The mean of the reference at the first snapshot, ``(d,)``.
        initial_cov: The covariance of the reference at the first snapshot, ``(d, d)``, positive definite.
        dt: The spacing of the inner time grid; a tenth of the shortest interval if None.
        num_hidden: The number of draws of the hidden components per particle.
        num_rounds: The number of times that the hidden components are drawn; 1 keeps the first draws.
        tolerance: The largest L1 error of a snapshot's marginal.
        max_iterations: The largest number of sweeps over the snapshots in each round; forth and back count as two.
        seed: The seed of the draws.

    Raises:
        ShapeError: If the first law doesn't have more components than the snapshots.
        DiffusionError: If the noise doesn't reach every component.
        NonFiniteError: If the reference explodes before the next snapshot.

    Warns:
        ConvergenceWarning: If ``max_iterations`` didn't suffice.
        ApproximationWarning: If a snapshot rests on few draws.

    Example:
        >>> clouds = [torch.linspace(-1, 1, 9)[:, None].double() + k for k in range(3)]
        >>> def drift(t, x):  # the second component drives the first one
        ...     return torch.stack((x[..., 1], -torch.sin(x[..., 1])), -1)
        >>> start = torch.tensor([0.0, 1.0]).double()
        >>> law = HiddenStateBridge(Snapshots([0.0, 1.0, 2.0], clouds), drift, 0.5, start, torch.eye(2).double())
        >>> law.marginal(1.0).sample(5).shape
        torch.Size([5, 2])
    """

    initial_mean: Tensor
    initial_cov: Tensor
    spread: Tensor

    _derived_ = ("_parts",)

    def __init__(
        self,
        snapshots: Snapshots,
        reference: Any,
        diffusion: Any,
        initial_mean: Tensor,
        initial_cov: Tensor,
        *,
        dt: float | None = None,
        num_hidden: int = 10,
        num_rounds: int = 2,
        tolerance: float = 1e-4,
        max_iterations: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(snapshots, num_hidden, num_rounds, tolerance, max_iterations, seed)
        if dt is not None:
            check_positive(dt, "dt")
        like = snapshots.samples[0]
        mean = as_tensor(initial_mean, "initial_mean", 1, "(d,)", like=like).to(like)
        cov = as_tensor(initial_cov, "initial_cov", 2, "(d, d)", like=like).to(like)
        self.dim = len(mean)
        if self.dim <= self.seen or cov.shape != (self.dim, self.dim):
            raise ShapeError(
                "initial_mean and initial_cov must be of the whole state", got=f"{tuple(mean.shape)} and {tuple(cov.shape)}",
                expected=f"(d,) and (d, d) with d > {self.seen}",
            )  # fmt: skip
        check_positive_definite(cov, "initial_cov")
        self.family: DriftFamily = fitted_family(reference, snapshots, self.dim)
        self.diffusion = diffusion
        self.register_buffer("spread", spread_of(diffusion, snapshots, self.dim, reach=True))
        self.register_buffer("initial_mean", mean)
        self.register_buffer("initial_cov", cov)
        self.dt = float(snapshots.durations.min()) / _POINTS if dt is None else float(dt)
        self._parts: list[Transition] | None = None
        self._check_reached()
        with torch.no_grad():
            generator = torch.Generator(like.device).manual_seed(self.seed)
            self._solve(*self._draw_around(*self._first_laws(generator), generator), generator)

    @property
    def _transitions(self) -> list[Transition]:
        if self._parts is None:
            times = self.snapshots.times.tolist()
            self._parts = [
                transition(self.family, self.spread, a, b, self.dt) for a, b in itertools.pairwise(times)
            ]
        return self._parts

    def _check_reached(self) -> None:
        """Raise unless the noise reaches every component until the second snapshot, directly or through the drift."""
        x = self.initial_mean[None]
        noise = self._transitions[0].chain(x, x).end_noise[0, ..., 0]
        size = noise.diagonal().clamp_min(torch.finfo(noise.dtype).tiny).rsqrt()
        smallest = float(torch.linalg.eigvalsh(size[:, None] * noise * size)[0])
        if not smallest > 1e-10:
            raise DiffusionError(
                "the noise must reach every component, directly or through the drift",
                got=f"smallest eigenvalue {smallest:.3g} of the correlations of the noise at the second snapshot",
                hint="give a diffusion for the components that it misses",
            )

    def _first_laws(self, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden components regressed on what is seen, over an ensemble that follows the reference from snapshot to snapshot."""
        s, like = self.seen, self.snapshots.samples[0]
        white = torch.randn(_ENSEMBLE, self.dim, dtype=like.dtype, device=like.device, generator=generator)
        ensemble = self.initial_mean + white @ torch.linalg.cholesky(self.initial_cov).mT
        noise, centres, factors = psd_factor(self.spread), [], []
        for k, cloud in enumerate(self.snapshots.samples):
            if k:
                grid = self._transitions[k - 1].ts.tolist()
                for start, end in itertools.pairwise(grid):
                    drift = self.family(
                        torch.as_tensor(start, dtype=like.dtype, device=like.device), ensemble
                    )
                    white = torch.randn(
                        ensemble.shape, dtype=like.dtype, device=like.device, generator=generator
                    )
                    ensemble = ensemble + (end - start) * drift + (end - start) ** 0.5 * white @ noise.mT
                if not bool(torch.isfinite(ensemble).all()):
                    raise NonFiniteError(
                        f"the reference explodes before t={float(self.snapshots.times[k]):g}",
                        hint="give other values of its parameters, or a smaller dt",
                    )
            # the regression of hidden components on those that are seen: E[h | s] = m_h + C_hs C_ss^{-1} (s - m_s)
            mean, cov = ensemble.mean(0), torch.cov(ensemble.mT)
            gain = torch.linalg.lstsq(cov[:s, :s], cov[:s, s:]).solution.mT
            rest = cov[s:, s:] - gain @ cov[:s, s:]
            # never narrower than what the noise alone does between snapshots
            span = float(self.snapshots.durations[max(k - 1, 0)])
            rest = rest + 0.1 * span * self.spread[s:, s:]
            factors.append(_WIDER * torch.linalg.cholesky(rest))
            centre = mean[s:] + (cloud - mean[:s]) @ gain.mT
            centres.append(centre)
            # the ensemble goes on from what was seen
            own = torch.multinomial(
                self.snapshots.weights[k], _ENSEMBLE, replacement=True, generator=generator
            )
            white = torch.randn(
                _ENSEMBLE, self.dim - s, dtype=like.dtype, device=like.device, generator=generator
            )
            ensemble = torch.cat((cloud[own], centre[own] + white @ psd_factor(rest).mT), -1)
        return centres, factors

    def _log_kernel(self, k: int, a: Tensor, b: Tensor) -> Tensor:
        part = self._transitions[k]
        if isinstance(part, LinearisedTransition):
            kernel = part.log_kernel_by_rows(a, b)
        else:
            kernel = part.log_kernel(a, b)
        # a state from which the grid can't follow the drift goes nowhere
        return torch.where(torch.isfinite(kernel), kernel, torch.full_like(kernel, -1e30))

    def _log_start(self, x: Tensor) -> Tensor:
        return log_normal(x, self.initial_mean, self.initial_cov)

    def _between(self, k: int, ts: Tensor, a: Tensor, b: Tensor, generator: torch.Generator | None) -> Tensor:
        part, slack = self._transitions[k], 1e-9 * float(self.snapshots.durations.sum())
        inside = (ts > part.start + slack) & (ts < part.end - slack)
        out = a.new_empty(len(a), len(ts), self.dim)
        out[:, ts <= part.start + slack] = a[:, None]
        out[:, ts >= part.end - slack] = b[:, None]
        if bool(inside.any()):
            grid, places = _merged(part, ts[inside])
            states = _pinned_paths(part, a, b, grid, generator)[0]
            out[:, inside] = states[places].permute(2, 0, 1)
        return out

    def _chosen_pairs(
        self, k: int, num_pairs: int, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return indices and weights ``(S,)`` of pairs of draws that stand for the coupling of snapshot ``k`` and the next."""
        # the joint weights of draws at neighbouring snapshots: message from before, kernel, message from after
        log = self._alpha[k] + self._potential(k) + self._tops[k]
        later = self._beta[k + 1] + self._potential(k + 1)
        weights = torch.exp(log - log.max())[:, None] * self._kernels[k] * torch.exp(later - later.max())
        return choose_pairs(_Weights(weights / weights.sum()), num_pairs, generator)

    @torch.no_grad()
    def nodes(self, num_nodes: int = 200_000, generator: torch.Generator | int | None = None) -> DriftNodes:
        """Return about ``num_nodes`` weighted states and drifts that stand for the bridge; see :class:`DriftNodes`."""
        generator = as_generator(generator, self.snapshots.device)
        parts = []
        copies = 2 * self.dim if self.dim <= 8 else 2
        for k, part in enumerate(self._transitions):
            budget = max(num_nodes // ((len(self.snapshots) - 1) * copies), 64)
            first, second, weight = self._chosen_pairs(k, max(budget // len(part.quadrature), 64), generator)
            x, y = self._states[k][first], self._states[k + 1][second]
            parts.append(bridge_nodes(part, x, y, weight, generator))
        return DriftNodes.join(parts)

    def _refresh(self) -> None:
        self._parts = None
        super()._refresh()

    def _moved(self, family: DriftFamily) -> HiddenStateBridge:
        """Return the law on the same draws under another drift, from the present potentials on."""
        other = copy.copy(self)
        other._modules = {**self._modules, "family": family}
        other._parts, other._phi = None, [phi.clone() for phi in self._phi]
        with torch.no_grad():
            other._weigh_pairs()
            other._iterate()
        return other
