"""Gaussian snapshots of the whole state: the exact bridge through all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    as_time_grid,
    check_event_size,
)
from stochdyn.bridges.laws.gaussian import GaussianBridge
from stochdyn.core.forward.fokker_planck import FokkerPlanck
from stochdyn.core.gaussian.small import psd_factor, symmetrise
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.marginals import GaussianMarginal, Generator, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import Path, PathSample
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import ShapeError, TimeGridError

__all__ = ["GaussianChainBridge"]


class GaussianChainBridge(PathMeasure):
    r"""The law nearest to a linear reference whose marginals at several times are given Gaussians.

    The reference is Markov and snapshots are of its full state, so the bridge is Markov too: bridges of
    neighbouring snapshots, glued (:class:`~stochdyn.bridges.laws.gaussian.GaussianBridge`). The precision matrix of its
    values at the snapshots is block tridiagonal.

    Use it where snapshots are known by their first two moments; for two of them there is :class:`GaussianBridge`.

    Args:
        times: the times of the snapshots, ``(I,)``.
        means: their means, ``(I, d)``.
        covs: their covariances, ``(I, d, d)``.
        diffusion: the noise of the reference, as in :class:`~stochdyn.bridges.GaussianBridge`.
        drift_matrix: the matrix of the reference's drift, ``(d, d)`` in 1/time; None for zero.
        drift_offset: the offset of its drift, ``(d,)``; None for zero.

    Raises:
        TimeGridError, ShapeError, InvalidInputError: on arguments that don't fit.

    Example:
        >>> times = torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
        >>> law = GaussianChainBridge(times, torch.zeros(3, 1).double(), torch.ones(3, 1, 1).double(), 1.0)
        >>> law.covariance(1.0).item()
        1.0
    """

    def __init__(
        self,
        times: Tensor,
        means: Tensor | Sequence[Tensor],
        covs: Tensor | Sequence[Tensor],
        diffusion: Coefficient | Tensor | float,
        drift_matrix: Tensor | None = None,
        drift_offset: Tensor | None = None,
    ) -> None:
        super().__init__()
        times = as_time_grid(times, "times")
        means, covs = as_tensor(means, "means", 2, "(I, d)"), as_tensor(covs, "covs", 3, "(I, d, d)")
        if not len(means) == len(covs) == times.shape[0]:
            raise ShapeError(
                "there must be one mean and one covariance per time",
                got=f"{len(means)} and {len(covs)}",
                expected=times.shape[0],
            )
        self.times = times
        links = [
            GaussianBridge(
                means[i], covs[i], means[i + 1], covs[i + 1], diffusion,
                float(times[i + 1] - times[i]), drift_matrix, drift_offset,
            )
            for i in range(times.shape[0] - 1)
        ]  # fmt: skip
        self._links = nn.ModuleList(links)
        self.dim = links[0].dim

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GaussianChainBridge:
        super()._apply(fn, recurse)
        self.times = self.times.to(self.bridges[0].mean0.device)  # times keep their precision
        return self

    @property
    def bridges(self) -> list[GaussianBridge]:
        """The bridges between neighbouring snapshots."""
        return list(self._links)  # type: ignore[arg-type]

    def _place(self, t: Tensor | float, after: bool = False) -> tuple[Tensor, Tensor]:
        """Interval and time since its start of every ``t``; snapshots count to the interval before, or after."""
        clock = as_tensor(t, "t", like=self.times).to(self.times)
        low, high = float(self.times[0]), float(self.times[-1])
        slack = 1e-6 * (high - low)
        if bool(((clock < low - slack) | (clock > high + slack)).any()):
            raise TimeGridError(
                "t must lie inside the snapshots", got=clock.tolist(), expected=f"[{low:g}, {high:g}]"
            )
        index = (
            torch.searchsorted(self.times, clock.contiguous(), right=after).clamp(1, len(self.bridges)) - 1
        )
        return index, clock - self.times[index]

    def _gather(
        self, t: Tensor | float, moment: Callable[[GaussianBridge, Tensor], Tensor], event: int
    ) -> Tensor:
        index, elapsed = self._place(t)
        like = self.bridges[0].mean0
        out = like.new_empty(*index.shape, *(self.dim,) * event)
        for i in index.unique().tolist():
            here = index == i
            out[here] = moment(self.bridges[i], elapsed[here].to(like.dtype))
        return out

    def mean(self, ts: Tensor | float) -> Tensor:
        """Return the means ``(*s, d)`` at times ``ts (*s,)``."""
        return self._gather(ts, GaussianBridge.mean, 1)

    def covariance(self, ts: Tensor | float) -> Tensor:
        """Return the covariances ``(*s, d, d)`` at times ``ts (*s,)``."""
        return self._gather(ts, GaussianBridge.covariance, 2)

    def marginal(self, t: Tensor | float) -> GaussianMarginal:
        """Return the law at times ``t (*s,)``, with batch shape ``(*s,)``."""
        return GaussianMarginal(self.mean(t), self.covariance(t))

    def joint_covariance(self, ts: Tensor) -> Tensor:
        """Return the covariance ``(T d, T d)`` of the values at ``ts (T,)``, flattened with time leading.

        The law is Markov, so that the values at two times are independent given that at a snapshot between them.
        """
        grid = as_time_grid(ts, min_points=1, like=self.times).to(self.times)
        index, elapsed = self._place(grid)
        dim, count, like = self.dim, len(grid), self.bridges[0].mean0
        blocks = like.new_zeros(count, count, dim, dim)
        # the covariance with the next snapshot, and the slope of later values on it, interval by interval
        for i, bridge in enumerate(self.bridges):
            mine = (index == i).nonzero()[:, 0].tolist()
            if not mine:
                continue
            clock = torch.cat((elapsed[index == i], elapsed.new_tensor([bridge.horizon]))).to(like.dtype)
            inner = clock.clamp(0.0, bridge.horizon)
            inner, repeated = inner[:-1], float(clock[-2]) >= bridge.horizon
            whole = bridge.joint_covariance(inner if repeated else torch.cat((inner, clock[-1:])))
            size = len(inner) + (not repeated)
            own = whole.reshape(size, dim, size, dim).permute(0, 2, 1, 3)
            for a, j in enumerate(mine):
                for b, k in enumerate(mine):
                    blocks[j, k] = own[a, b]
                ahead = own[a, -1]  # with the snapshot at the end of the interval
                for later in range(i + 1, len(self.bridges)):
                    nxt = self.bridges[later]
                    inverse = torch.linalg.pinv(nxt.cov0)
                    for k in (index == later).nonzero()[:, 0].tolist():
                        blocks[j, k] = ahead @ inverse @ nxt.from_start(elapsed[k].to(like.dtype))
                        blocks[k, j] = blocks[j, k].mT
                    ahead = ahead @ inverse @ nxt.cross_covariance
        return symmetrise(blocks.permute(0, 2, 1, 3).reshape(count * dim, count * dim))

    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw exact paths ``(*sample, T, d)`` at times ``ts (T,)`` within the snapshots.

        What drove them isn't known, so ``dw`` is empty, ``(*sample, T-1, 0)``.
        """
        grid = as_time_grid(ts, min_points=1, like=self.times)
        shape, source = as_sample_shape(sample_shape), as_generator(generator, self.times.device)
        joint = self.joint_covariance(grid)
        noise = torch.randn(*shape, joint.shape[-1], dtype=joint.dtype, device=joint.device, generator=source)
        paths = (noise @ psd_factor(joint).mT).reshape(*shape, len(grid), self.dim)
        return PathSample(grid, self.mean(grid) + paths, paths.new_empty(*shape, len(grid) - 1, 0), {}, self)

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the drift ``(..., d)`` at times ``t`` that broadcast to ``x[..., :1]``; at a snapshot that of the interval after it."""
        check_event_size(x, self.dim, "x")
        time = as_tensor(t, "t", like=self.times).to(self.times)
        if time.numel() == 1:
            index, elapsed = self._place(time.reshape(()), after=True)
            return self.bridges[int(index)].drift(float(elapsed), x)
        index, elapsed = self._place(time.expand(*x.shape[:-1], 1)[..., 0], after=True)
        out = torch.empty_like(x)
        for i in index.unique().tolist():
            here = index == i
            out[here] = self.bridges[i].drift(elapsed[here].to(x.dtype)[:, None], x[here])
        return out

    def as_diffusion(self) -> DiffusionMeasure:
        """Return the same law as an SDE with this drift."""
        first = self.bridges[0]
        return DiffusionMeasure(first.as_diffusion().initial, SDE(self.drift, first.diffusion))

    def forward(self) -> FokkerPlanck:
        """Return the forward operator of the bridge as a diffusion."""
        return FokkerPlanck(SDE(self.drift, self.bridges[0].diffusion))

    def log_rn(
        self, path: Path, other: PathMeasure, estimator: str = "density", *, recorded: bool = False
    ) -> Tensor:
        """Raise: paths are exact and come without increments; :meth:`as_diffusion` has a density on the paths that it draws."""
        self._refuse("log_rn", "its paths are exact and have no increments; use as_diffusion() on both sides")

    def snapshot_covariance(self) -> Tensor:
        """Return the covariance ``(I d, I d)`` of the values at all snapshots."""
        steps = [b.cross_covariance.mT @ torch.linalg.pinv(b.cov0) for b in self.bridges]
        covs = [b.cov0 for b in self.bridges] + [self.bridges[-1].cov1]
        rows = []
        for i, cov in enumerate(covs):
            row, block = [cov], cov
            for step in steps[i:]:
                block = block @ step.mT
                row.append(block)
            rows.append(row)
        count = len(covs)
        blocks = [
            [rows[i][j - i] if j >= i else rows[j][i - j].mT for j in range(count)] for i in range(count)
        ]
        return torch.cat([torch.cat(row, -1) for row in blocks])

    def kl(self) -> Tensor:
        """Return the divergence from the reference that starts from the first snapshot, in nats."""
        return torch.stack([b.kl() for b in self.bridges]).sum()
