"""The drift network of bridge matching: an affine part for every interval, and a shared nonlinear one."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stochdyn.core.networks import MLP

__all__ = ["IntervalDrift"]

_BASIS = 6


class IntervalDrift(nn.Module):
    r"""Drifts on several intervals at once, in units of the data's scale over the interval's length.

    .. math:: v_i(s,x)=\sum_k\cos(k\pi s)\,(A_{ik}\hat x+c_{ik})+\mathrm{net}(\hat x,\cos(k\pi s),i),\qquad \hat x=(x-m)/\varsigma

    The affine part alone holds every bridge between Gaussians. It is fitted by least squares (:meth:`refit`); only the network, which
    starts as zero, is trained.

    Args:
        num_intervals: ``I``.
        centre: :math:`m`, ``(d,)``.
        scale: :math:`\varsigma`, ``(d,)``.
        width: of the two hidden layers; zero for the affine part alone.
    """

    centre: Tensor
    scale: Tensor
    affine: Tensor
    gram: Tensor
    moment: Tensor
    label: Tensor

    def __init__(self, num_intervals: int, centre: Tensor, scale: Tensor, width: int) -> None:
        super().__init__()
        dim = centre.shape[-1]
        self.register_buffer("centre", centre)
        self.register_buffer("scale", scale)
        size = (dim + 1) * _BASIS
        self.register_buffer("affine", torch.zeros(num_intervals, size, dim).to(centre))
        self.register_buffer("gram", torch.zeros(num_intervals, size, size).to(centre))
        self.register_buffer("moment", torch.zeros(num_intervals, size, dim).to(centre))
        self.net: MLP | None = None
        if width:
            inputs = dim + _BASIS + (num_intervals if num_intervals > 1 else 0)
            self.net = MLP((inputs, width, width, dim), zero_last=True).to(centre)
        self.register_buffer("label", torch.eye(num_intervals).to(centre), persistent=False)

    def forward(self, s: Tensor, x: Tensor) -> Tensor:
        """Return ``(I, n, d)`` for times ``s`` in ``[0, 1]``, broadcastable to ``(I, n, 1)``, and ``x (I, n, d)``."""
        state, basis = self._inputs(s, x)
        value = _lift(state, basis) @ self.affine
        return value if self.net is None else value + self._residual(state, basis)

    def _inputs(self, s: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        harmonics = torch.pi * torch.arange(_BASIS, dtype=x.dtype, device=x.device)
        return (x - self.centre) / self.scale, torch.cos(s.expand(*x.shape[:-1], 1) * harmonics)

    def _residual(self, state: Tensor, basis: Tensor) -> Tensor:
        assert self.net is not None
        parts = [state, basis]
        if self.label.shape[0] > 1:
            parts.append(self.label[:, None].expand(-1, state.shape[1], -1))
        return self.net(torch.cat(parts, -1))

    @torch.no_grad()
    def forget(self, keep: float) -> None:
        """Scale what :meth:`observe` has gathered by ``keep``."""
        self.gram.mul_(keep)
        self.moment.mul_(keep)

    @torch.no_grad()
    def observe(self, s: Tensor, x: Tensor, target: Tensor, weight: Tensor) -> None:
        """Gather what :meth:`refit` needs from points ``x (I, n, d)``, targets and weights ``(I, n, 1)``."""
        state, basis = self._inputs(s, x)
        lifted = _lift(state, basis)
        rest = target if self.net is None else target - self._residual(state, basis)
        weighted = (lifted * weight).mT
        self.gram += weighted @ lifted
        self.moment += weighted @ rest

    @torch.no_grad()
    def refit(self) -> None:
        """Set the affine part to the least-squares fit of what has been observed, given the network."""
        gram = self.gram.double()
        ridge = 1e-6 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        gram = gram + ridge[:, None, None] * torch.eye(gram.shape[-1]).to(gram)
        self.affine.copy_(torch.linalg.solve(gram, self.moment.double()))


def _lift(state: Tensor, basis: Tensor) -> Tensor:
    lifted = torch.cat((state, torch.ones_like(state[..., :1])), -1)
    return (lifted.unsqueeze(-1) * basis.unsqueeze(-2)).flatten(-2)
