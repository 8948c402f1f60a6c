"""Gaussian snapshots of the whole state: the exact bridge through all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from stochdyn._checks import as_tensor, as_time_grid
from stochdyn.bridges.laws.gaussian import GaussianBridge
from stochdyn.core.gaussian.conditioning import PiecewiseMeasure
from stochdyn.core.gaussian.constant_steps import Transition
from stochdyn.core.gaussian.measure import LinearGaussianMeasure
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.errors import ShapeError

__all__ = ["GaussianChainBridge"]


class GaussianChainBridge(PiecewiseMeasure):
    r"""The law nearest to a linear reference whose marginals at several times are given Gaussians.

    The reference is Markov and snapshots are of its full state, so the bridge is Markov too: bridges of
    neighbouring snapshots, glued (:class:`~stochdyn.bridges.laws.gaussian.GaussianBridge`). The precision matrix of its
    values at the snapshots is block tridiagonal.

    Use it where snapshots are known by their first two moments; for two of them there is :class:`GaussianBridge`.

    Args:
        times: The times of the snapshots, ``(I,)``.
        means: The means of the snapshots, ``(I, d)``.
        covs: The covariances of the snapshots, ``(I, d, d)``.
        diffusion: The noise of the reference, as in :class:`~stochdyn.bridges.GaussianBridge`.
        drift_matrix: The matrix of the reference's drift, ``(d, d)`` in 1/time; None for zero.
        drift_offset: The offset of the reference's drift, ``(d,)``; None for zero.

    Raises:
        TimeGridError, ShapeError, InvalidInputError: If arguments don't fit one another.

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
        self.dim, self.batch_shape = links[0].dim, torch.Size()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GaussianChainBridge:
        super()._apply(fn, recurse)
        self.times = self.times.to(self.like.device)  # times keep their precision
        return self

    @property
    def like(self) -> Tensor:
        """A tensor of the precision and on the device of all answers."""
        return self.bridges[0].mean0

    @property
    def bridges(self) -> list[GaussianBridge]:
        """The bridges between neighbouring snapshots."""
        return list(self._links)  # type: ignore[arg-type]

    def step(self, index: int, start: Tensor, stop: Tensor) -> Transition:
        """Return the transition between two times after snapshot ``index``, within its interval."""
        dtype = self.like.dtype
        return self.bridges[index].transition(start.to(dtype), stop.to(dtype))

    def start_of(self, index: int) -> tuple[Tensor, Tensor]:
        """Return mean ``(d,)`` and covariance ``(d, d)`` of the state at snapshot ``index``."""
        return self.bridges[index].mean0, self.bridges[index].cov0

    def affine_drift_in(self, index: int, elapsed: Tensor) -> tuple[Tensor, Tensor]:
        """Return matrix and offset of the drift at times after snapshot ``index``, within its interval."""
        return self.bridges[index].affine_drift(elapsed.to(self.like.dtype))

    @property
    def driven(self) -> LinearGaussianMeasure:
        """The reference."""
        return self.bridges[0].reference

    def as_diffusion(self) -> DiffusionMeasure:
        """Return the same law as an SDE with this drift, from the first snapshot on."""
        start = self.bridges[0].as_diffusion().initial
        return DiffusionMeasure(start, self.to_sde(), start_time=float(self.times[0]))

    def snapshot_covariance(self) -> Tensor:
        """Return the covariance ``(I d, I d)`` of the values at all snapshots."""
        return self.joint_covariance(self.times)

    def kl(self) -> Tensor:
        """Return the divergence from the reference that starts from the first snapshot, in nats."""
        return torch.stack([b.kl() for b in self.bridges]).sum()
