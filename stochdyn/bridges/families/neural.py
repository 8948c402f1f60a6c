"""Drift families of networks: free ones, gradients of a smooth potential, and sums of families."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stochdyn._checks import (
    as_sequence,
    as_tensor,
    check_nonempty,
    check_positive,
    check_positive_int,
    check_real,
    check_type,
    is_real,
)
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.families.base import DriftFamily
from stochdyn.core.networks import MLP
from stochdyn.errors import ShapeError

__all__ = ["NeuralDrift", "PotentialDrift", "SumDrift"]


class _Scaled(DriftFamily):
    """What both networks share: units of the state and of time, in which they see numbers around one."""

    centre: Tensor
    scale: Tensor

    def __init__(
        self,
        dim: int,
        width: int = 64,
        time: bool = False,
        *,
        centre: Tensor | None = None,
        scale: Tensor | float | None = None,
        horizon: float | None = None,
        start_time: float | None = None,
    ) -> None:
        super().__init__(dim)
        check_positive_int(width, "width")
        self._awaits_units = centre is None and scale is None and horizon is None and start_time is None
        scale = 1.0 if scale is None else scale if is_real(scale) else as_tensor(scale, "scale")
        centre = None if centre is None else as_tensor(centre, "centre", 1, "(d,)")
        horizon = 1.0 if horizon is None else horizon
        start_time = 0.0 if start_time is None else start_time
        check_positive(scale, "scale")
        check_positive(horizon, "horizon")
        check_real(start_time, "start_time")
        like = centre if centre is not None else scale if isinstance(scale, Tensor) else torch.zeros(())
        middle = like.new_zeros(dim) if centre is None else centre
        unit = torch.as_tensor(scale, dtype=like.dtype, device=like.device).expand(dim).clone()
        if middle.shape != (dim,):
            raise ShapeError("centre doesn't fit", got=tuple(middle.shape), expected=(dim,))
        self.register_buffer("centre", middle)
        self.register_buffer("scale", unit)
        self.horizon, self.start_time = float(horizon), float(start_time)
        self.time = time
        self._make_layers(dim, width, time)

    @abstractmethod
    def _make_layers(self, dim: int, width: int, time: bool) -> None:
        """Make the parameters, of the precision and on the device of ``centre``."""

    @classmethod
    def for_snapshots(cls, snapshots: Snapshots, width: int = 64, time: bool = False) -> Self:
        """Return a drift in the units of given snapshots."""
        _, centre, scale = snapshots.standardised()
        start, end = float(snapshots.times[0]), float(snapshots.times[-1])
        return cls(
            snapshots.dim, width, time, centre=centre, scale=scale, horizon=end - start, start_time=start
        )

    def take_units(self, snapshots: Snapshots) -> None:
        """Take the units of snapshots, unless units were given or the drift was trained in those that it has.

        Args:
            snapshots: The snapshots.
        """
        if not self._awaits_units or snapshots.dim != self.dim:
            return
        x = torch.cat(list(snapshots.samples)).to(self.centre)
        if bool(self(torch.as_tensor(self.start_time).to(x), x).any()):
            return
        _, centre, scale = snapshots.standardised()
        self.centre.copy_(centre)
        self.scale.copy_(scale)
        self.start_time = float(snapshots.times[0])
        self.horizon = float(snapshots.times[-1]) - self.start_time
        self._awaits_units = False

    def get_extra_state(self) -> Tensor:
        """Return the units of time, which belong to the weights."""
        return torch.tensor([self.horizon, self.start_time], dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """Take the units of time of loaded weights."""
        self.horizon, self.start_time = (float(value) for value in state)
        self._awaits_units = False

    def _inputs(self, t: Tensor, x: Tensor) -> Tensor:
        state = (x - self.centre) / self.scale
        if not self.time:
            return state
        clock = (torch.as_tensor(t, device=x.device) - self.start_time) / self.horizon
        clock = clock.to(x.dtype).expand(*x.shape[:-1], 1)
        return torch.cat((state, clock), -1)

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights anew, the last layer's included, a tenth of the usual size."""
        with torch.no_grad():
            for value in self.parameters():
                bound = 0.1 / max(value.shape[-1], 1) ** 0.5
                noise = torch.rand(value.shape, generator=generator, dtype=value.dtype, device=value.device)
                value.copy_((2 * noise - 1) * (bound if value.ndim < 2 else 10 * bound))


class NeuralDrift(_Scaled):
    r"""A network without structure, beside a linear part.

    .. math:: b(t,x)=\frac{\varsigma}{T}\big(A\hat x+c+\mathrm{net}(\hat x)\big),\qquad \hat x=(x-m)/\varsigma

    It starts as zero. Its units are those of the data: what it is first used with gives them, where none are given here, and
    :meth:`for_snapshots` takes them from snapshots.
    Identifiability ends here: many drifts carry the same marginals, and the refinement finds the one nearest
    to where it started. Use it to interpolate and to forecast where no mechanism is known; to read a field off, use
    :class:`PotentialDrift`.

    Args:
        dim: The number ``d`` of components of the state.
        width: The width of the two hidden layers.
        time: Whether the drift may change with time.
        centre: The middle :math:`m` of the data, ``(d,)``. If this and the next three are None, they are those of the snapshots
            that the drift is first used with, as long as it is zero; otherwise the middle is zero.
        scale: The size :math:`\varsigma` of the data, a number or ``(d,)``; one if None beside others that are given.
        horizon: The time :math:`T` over which particles move by about their scale; one if None beside others that are given.
        start_time: The time that counts as zero; zero if None beside others that are given.

    Example:
        >>> NeuralDrift(2, width=16)(torch.zeros(()), torch.ones(3, 2)).abs().max().item()
        0.0
    """

    def _make_layers(self, dim: int, width: int, time: bool) -> None:
        self.linear = nn.Linear(dim + time, dim).to(self.centre)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.net = MLP((dim + time, width, width, dim), zero_last=True).to(self.centre)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(*batch, d)`` at times ``t`` and states ``x (*batch, d)``."""
        inputs = self._inputs(t, x)
        return (self.linear(inputs) + self.net(inputs)) * (self.scale / self.horizon)

    def linearise(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the drift ``(*batch, d)`` and its Jacobian ``(*batch, d, d)``, written out."""
        inputs = self._inputs(t, x)
        hidden, layers = [inputs], [layer for layer in self.net.layers if isinstance(layer, nn.Linear)]
        for layer in layers[:-1]:
            hidden.append(torch.tanh(layer(hidden[-1])))
        # chain rule from the last layer back: W_L diag(1 - h^2) W_{L-1} ... W_1, for all outputs at once
        slope = layers[-1].weight.expand(*x.shape, -1)
        for layer, own in zip(reversed(layers[:-1]), reversed(hidden[1:]), strict=True):
            slope = F.linear(slope * (1 - own.square()).unsqueeze(-2), layer.weight.mT)
        value = (self.linear(inputs) + layers[-1](hidden[-1])) * (self.scale / self.horizon)
        jacobian = (slope + self.linear.weight)[..., : self.dim]
        return value, jacobian * (self.scale[:, None] / (self.scale * self.horizon))


class PotentialDrift(_Scaled):
    r"""Descent in a smooth landscape: minus the gradient of a potential network.

    .. math::
        b(t,x)=-\nabla V(x),\qquad V(x)=\frac{|\varsigma|^2}{dT}\Big(w^\top\tanh\big(W_2\tanh(W_1\hat x+b_1)+b_2\big)
            +\tfrac12\hat x^\top\mathrm{diag}(\kappa)\hat x+h^\top\hat x\Big)

    The gradient is written out, so it is smooth (a ReLU potential would have a
    piecewise constant drift) and costs two passes. Among drifts with the same marginals a gradient is the one without
    circulation, so this family is identifiable where free networks aren't. Use it for cells that go down a landscape; it can't oscillate.

    Args:
        dim: The number ``d`` of components of the state.
        width: The width of the two hidden layers.
        time: Whether the landscape may change with time.
        centre: The middle :math:`m` of the data, ``(d,)``. If this and the next three are None, they are those of the snapshots
            that the drift is first used with, as long as it is zero; otherwise the middle is zero.
        scale: The size :math:`\varsigma` of the data, a number or ``(d,)``; one if None beside others that are given.
        horizon: The time :math:`T` over which particles move by about their scale; one if None beside others that are given.
        start_time: The time that counts as zero; zero if None beside others that are given.

    Example:
        >>> landscape = PotentialDrift(2, width=16)
        >>> landscape(torch.zeros(()), torch.ones(3, 2)).shape
        torch.Size([3, 2])

    Reference: Lavenant, Zhang, Kim & Schiebinger (2024), Toward a mathematical theory of trajectory inference
    (gradient drifts are identifiable from marginals).
    """

    def _make_layers(self, dim: int, width: int, time: bool) -> None:
        self.first = nn.Linear(dim + time, width).to(self.centre)
        self.second = nn.Linear(width, width).to(self.centre)
        self.last = nn.Parameter(self.centre.new_zeros(width))
        self.curvature = nn.Parameter(self.centre.new_zeros(dim))
        self.slope = nn.Parameter(self.centre.new_zeros(dim))

    def potential(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the landscape ``(*batch,)``, in units of state squared per time."""
        inputs = self._inputs(t, x)
        state = inputs[..., : self.dim]
        hidden = torch.tanh(self.second(torch.tanh(self.first(inputs))))
        smooth = 0.5 * (self.curvature * state.square()).sum(-1) + state @ self.slope
        return (hidden @ self.last + smooth) * self._unit()

    def _unit(self) -> Tensor:
        return self.scale.square().mean() / self.horizon

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(*batch, d)`` at times ``t`` and states ``x (*batch, d)``."""
        inputs = self._inputs(t, x)
        state = inputs[..., : self.dim]
        below = torch.tanh(self.first(inputs))
        above = torch.tanh(self.second(below))
        # chain rule through both layers: grad V = W1^T [tanh'(.) * W2^T (tanh'(.) * w)] + kappa x + h, in the units of the data
        inner = F.linear((1 - above.square()) * self.last, self.second.weight.mT)
        gradient = F.linear((1 - below.square()) * inner, self.first.weight[:, : self.dim].mT)
        return -(gradient + self.curvature * state + self.slope) * (self._unit() / self.scale)


class SumDrift(DriftFamily):
    r"""The sum of families: a mechanism, and a network for what it leaves out.

    .. math:: b(t,x)=\sum_j b_j(t,x)

    Use it where a mechanism is known but for a part.

    Args:
        families: The families that are added, at least one, of the same dimension.

    Raises:
        EmptyDataError, ShapeError: If there is no family, or they differ in dimension.

    Example:
        >>> from stochdyn.bridges import LambOseen
        >>> family = SumDrift([LambOseen(), NeuralDrift(2, width=8)])
        >>> sorted(family.named_values())[0]
        '0.centres'
    """

    def __init__(self, families: Sequence[DriftFamily]) -> None:
        families = as_sequence(families, "families", "drift families")
        check_nonempty(families, "families")
        for k, family in enumerate(families):
            check_type(family, DriftFamily, f"families[{k}]")
        dims = {family.dim for family in families}
        if len(dims) > 1:
            raise ShapeError("families must share a dimension", got=sorted(dims))
        super().__init__(families[0].dim)
        self.families = nn.ModuleList(families)

    def _members(self) -> list[DriftFamily]:
        return list(self.families)  # type: ignore[arg-type]

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(*batch, d)`` at times ``t`` and states ``x (*batch, d)``."""
        return torch.stack([family(t, x) for family in self._members()]).sum(0)

    def linearise(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the drift ``(*batch, d)`` and its Jacobian ``(*batch, d, d)``, written out."""
        values, slopes = zip(*(family.linearise(t, x) for family in self._members()), strict=True)
        return torch.stack(values).sum(0), torch.stack(slopes).sum(0)

    def affine(self) -> tuple[Tensor, Tensor] | None:
        """Return matrix ``(d, d)`` and shift ``(d,)`` of the sum if all members are affine now, else None."""
        parts = [family.affine() for family in self._members()]
        known = [part for part in parts if part is not None]
        if len(known) < len(parts):
            return None
        return torch.stack([a for a, _ in known]).sum(0), torch.stack([c for _, c in known]).sum(0)

    def named_values(self) -> dict[str, Tensor]:
        """Return the members' values, with the number of the member before each name."""
        return {
            f"{j}.{name}": value
            for j, family in enumerate(self._members())
            for name, value in family.named_values().items()
        }

    def log_prior(self) -> Tensor | None:
        """Return the sum of the members' log prior densities, or None if none has any."""
        known = [p for p in (family.log_prior() for family in self._members()) if p is not None]
        return torch.stack(known).sum() if known else None

    def reset(self, generator: torch.Generator | None = None) -> None:
        """Reset every member."""
        for family in self._members():
            family.reset(generator)
