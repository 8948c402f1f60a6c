"""The support of paths with a known start: the first point is pinned, the others are free."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Transform, biject_to, constraints, transform_to

__all__ = ["PinStart", "PinnedPath"]


class PinnedPath(constraints.Constraint):
    """Paths ``(..., T, d)`` whose first point is ``start (*batch, d)``."""

    event_dim = 2

    def __init__(self, start: Tensor) -> None:
        self.start = start

    def check(self, value: Tensor) -> Tensor:
        """Return whether paths are finite and begin at the start."""
        first = value[..., 0, :]
        # To rounding in the scale of the path: what a solver leaves of a start that it was given.
        scale = torch.maximum(value.abs().amax(-2), self.start.abs())
        near = (first - self.start).abs() <= 1e-5 * scale
        return near.all(-1) & torch.isfinite(value).all(-1).all(-1)


class PinStart(Transform):
    """Put the known start before the free points: ``(..., T-1, d) -> (..., T, d)``, of unit Jacobian."""

    domain = constraints.independent(constraints.real, 2)
    bijective = True

    def __init__(self, start: Tensor, cache_size: int = 0) -> None:
        super().__init__(cache_size=cache_size)
        self.start = start

    @property
    def codomain(self) -> PinnedPath:  # type: ignore[override]
        """Paths that begin at the start."""
        return PinnedPath(self.start)

    def with_cache(self, cache_size: int = 1) -> PinStart:
        """Return the transform that remembers the last ``cache_size`` values."""
        return self if self._cache_size == cache_size else PinStart(self.start, cache_size)

    def _call(self, x: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(x[..., :1, :].shape, self.start.unsqueeze(-2).shape)
        start = self.start.unsqueeze(-2).expand(shape)
        return torch.cat([start, x.expand(*shape[:-2], *x.shape[-2:])], -2)

    def _inverse(self, y: Tensor) -> Tensor:
        return y[..., 1:, :]

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Zero: nothing is stretched."""
        return x.new_zeros(torch.broadcast_shapes(x.shape[:-2], y.shape[:-2]))

    def forward_shape(self, shape: torch.Size) -> torch.Size:
        """One point more."""
        return torch.Size((*shape[:-2], shape[-2] + 1, shape[-1]))

    def inverse_shape(self, shape: torch.Size) -> torch.Size:
        """One point less."""
        return torch.Size((*shape[:-2], shape[-2] - 1, shape[-1]))


@biject_to.register(PinnedPath)
@transform_to.register(PinnedPath)
def _pin(constraint: PinnedPath) -> PinStart:
    return PinStart(constraint.start)
