"""Mechanisms of which only some components are seen: bridges under a nonlinear reference with hidden components."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_seed, as_tensor, check_positive
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.families.base import DriftFamily
from stochdyn.bridges.laws.hidden_chain import HiddenChain, log_normal, log_standard
from stochdyn.bridges.laws.linearised import LinearisedTransition, Transition, transition
from stochdyn.bridges.laws.nodes import DriftNodes, bridge_nodes, choose_pairs
from stochdyn.bridges.laws.reference import fitted_family, spread_of
from stochdyn.bridges.laws.sampling import _merged, _pinned_paths
from stochdyn.core.gaussian.small import psd_factor
from stochdyn.errors import NonFiniteError, ShapeError

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

    Use it for species that aren't measured; under a linear reference :class:`PartialBridge` needs no linearisation.

    Args:
        snapshots: what was seen of the first ``p`` components.
        reference: the drift of the whole state, a :class:`DriftFamily`, an ``nn.Module`` or a callable ``(t, x)``.
        diffusion: its noise, a number, ``(d,)`` or ``(d, d)``, of full rank.
        initial_mean: the mean of the reference at the first snapshot, ``(d,)``.
        initial_cov: its covariance there, ``(d, d)``, positive definite.
        dt: the spacing of the inner time grid; a tenth of the shortest interval if None.
        num_hidden: the number of draws of the hidden components for each particle.
        num_rounds: how often they are drawn; 1 keeps the first.
        tolerance: the largest marginal error, in L1.
        max_iterations: the largest number of sweeps over the snapshots in each round; forth and back count as two.
        seed: the seed of the draws.

    Raises:
        ShapeError: if the first law doesn't have more components than the snapshots.
        DiffusionError: if the noise doesn't reach every component.
        NonFiniteError: if the reference explodes before the next snapshot.

    Warns:
        ConvergenceWarning: if ``max_iterations`` didn't suffice.
        ApproximationWarning: if a snapshot rests on few draws.

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
        super().__init__()
        self._check_options(snapshots, num_hidden, num_rounds, tolerance, max_iterations)
        if dt is not None:
            check_positive(dt, "dt")
        like = snapshots.samples[0]
        mean = as_tensor(initial_mean, "initial_mean", 1, "(d,)", like=like).to(like)
        cov = as_tensor(initial_cov, "initial_cov", 2, "(d, d)", like=like).to(like)
        self.snapshots, self.seen, self.dim = snapshots, snapshots.dim, len(mean)
        if self.dim <= self.seen or cov.shape != (self.dim, self.dim):
            raise ShapeError(
                "initial_mean and initial_cov must be of the whole state", got=f"{tuple(mean.shape)} and {tuple(cov.shape)}",
                expected=f"(d,) and (d, d) with d > {self.seen}",
            )  # fmt: skip
        self.family: DriftFamily = fitted_family(reference, snapshots, self.dim)
        self.diffusion = diffusion
        self.register_buffer("spread", spread_of(diffusion, snapshots, self.dim))
        self.register_buffer("initial_mean", mean)
        self.register_buffer("initial_cov", cov)
        self.dt = float(snapshots.durations.min()) / _POINTS if dt is None else float(dt)
        self._parts: list[Transition] | None = None
        self.register_load_state_dict_post_hook(_refresh)
        with torch.no_grad():
            generator = torch.Generator(like.device).manual_seed(as_seed(seed))
            hidden, log_q = self._first_draws(num_hidden, generator)
            self._solve(hidden, log_q, num_rounds, tolerance, max_iterations, generator)

    @property
    def _transitions(self) -> list[Transition]:
        if self._parts is None:
            times = self.snapshots.times.tolist()
            self._parts = [
                transition(self.family, self.spread, a, b, self.dt) for a, b in itertools.pairwise(times)
            ]
        return self._parts

    def _first_draws(self, count: int, generator: torch.Generator) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden components regressed on what is seen, over an ensemble that follows the reference from snapshot to snapshot."""
        s, like = self.seen, self.snapshots.samples[0]
        white = torch.randn(_ENSEMBLE, self.dim, dtype=like.dtype, device=like.device, generator=generator)
        ensemble = self.initial_mean + white @ torch.linalg.cholesky(self.initial_cov).mT
        noise, hidden, log_q = torch.linalg.cholesky(self.spread), [], []
        for k, cloud in enumerate(self.snapshots.samples):
            if k:
                grid = self._transitions[k - 1].ts.tolist()
                for start, end in itertools.pairwise(grid):
                    drift = self.family(torch.as_tensor(start).to(like), ensemble)
                    white = torch.randn(
                        ensemble.shape, dtype=like.dtype, device=like.device, generator=generator
                    )
                    ensemble = ensemble + (end - start) * drift + (end - start) ** 0.5 * white @ noise.mT
                if not bool(torch.isfinite(ensemble).all()):
                    raise NonFiniteError(
                        f"the reference explodes before t={float(self.snapshots.times[k]):g}",
                        hint="give other values of its parameters, or a smaller dt",
                    )
            mean, cov = ensemble.mean(0), torch.cov(ensemble.mT)
            gain = torch.linalg.lstsq(cov[:s, :s], cov[:s, s:]).solution.mT
            rest = cov[s:, s:] - gain @ cov[:s, s:]
            # never narrower than what the noise alone does between snapshots
            span = float(self.snapshots.durations[max(k - 1, 0)])
            rest = rest + 0.1 * span * self.spread[s:, s:]
            factor = _WIDER * torch.linalg.cholesky(rest)
            centre = mean[s:] + (cloud - mean[:s]) @ gain.mT
            white = torch.randn(
                len(cloud), count, self.dim - s, dtype=like.dtype, device=like.device, generator=generator
            )
            hidden.append(centre[:, None] + white @ factor.mT)
            log_q.append(log_standard(white) - factor.diagonal().log().sum())
            # the ensemble goes on from what was seen
            own = torch.multinomial(
                self.snapshots.weights[k], _ENSEMBLE, replacement=True, generator=generator
            )
            white = torch.randn(
                _ENSEMBLE, self.dim - s, dtype=like.dtype, device=like.device, generator=generator
            )
            ensemble = torch.cat((cloud[own], centre[own] + white @ psd_factor(rest).mT), -1)
        return hidden, log_q

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

    @torch.no_grad()
    def nodes(self, num_nodes: int = 200_000, generator: torch.Generator | None = None) -> DriftNodes:
        """Return about ``num_nodes`` weighted states and drifts that stand for the bridge; see :class:`DriftNodes`."""
        parts = []
        copies = 2 * self.dim if self.dim <= 8 else 2
        for k, part in enumerate(self._transitions):
            log = self._alpha[k] + self._potential(k) + self._tops[k]
            later = self._beta[k + 1] + self._potential(k + 1)
            weights = torch.exp(log - log.max())[:, None] * self._kernels[k] * torch.exp(later - later.max())
            times = len(part.quadrature)
            budget = max(num_nodes // ((len(self.snapshots) - 1) * copies), 64)
            first, second, weight = choose_pairs(
                _Weights(weights / weights.sum()), max(budget // times, 64), generator
            )
            x, y = self._states[k][first], self._states[k + 1][second]
            parts.append(bridge_nodes(part, x, y, weight, generator))
        return DriftNodes.join(parts)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> HiddenStateBridge:
        self._parts = None
        super()._apply(fn, recurse)
        return self


def _refresh(bridge: HiddenStateBridge, keys: object) -> None:
    bridge._parts = None
    bridge._refresh()
