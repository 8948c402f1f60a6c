"""A score for many like particles: local, and equivariant under permutations."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stochdyn._checks import check_callable, check_positive_int, check_real
from stochdyn.core.networks import MLP
from stochdyn.errors import ShapeError

__all__ = ["ParticleScore", "as_particles", "nearest_image"]


def as_particles(x: Tensor, size: int) -> Tensor:
    """Return states ``(..., N * size)`` as particles ``(..., N, size)``.

    Raises:
        ShapeError: If a state doesn't hold whole particles.
    """
    if x.shape[-1] % size:
        raise ShapeError(
            "a state must hold whole particles",
            got=f"{x.shape[-1]} numbers",
            expected=f"a multiple of {size}",
        )
    return x.unflatten(-1, (-1, size))


def nearest_image(gap: Tensor, side: float | None) -> Tensor:
    """Return the ways to the nearest images in a periodic box of that side; None is open space."""
    return gap if side is None else gap - side * (gap / side).round()


class ParticleScore(nn.Module):
    r"""The score of a steady state of like particles with positions :math:`r_i` and further variables :math:`g_i`.

    .. math::
        s_i=s_{0,i}+\phi\Big(r_i,g_i,\sum_{j\ne i}w(|r_{ij}|)\,\psi(r_{ij},|r_{ij}|,g_i,g_j)\Big),\qquad w(r)=\big(1-(r/r_c)^2\big)^3_+

    The weight and its first two derivatives vanish at the cutoff, so divergences are smooth. In a periodic box :math:`r_{ij}` goes to the
    nearest image, and :math:`\phi` doesn't see :math:`r_i`.

    Args:
        num_extra: The number of variables of a particle beside its position, such as a propulsion.
        cutoff: The distance :math:`r_c` beyond which particles don't feel each other's correlations.
        dim: The number of dimensions of space.
        width: The width of the hidden layers.
        depth: The number of hidden layers of each of the two networks. Where particles touch, the current turns within a small part of their
            size, which one layer follows badly in a crowd.
        box: The side of a periodic box, at least twice the cutoff; None for a trap in open space.
        base: A score to start from: a function of states ``(..., N * (dim + num_extra))``, such as force over temperature.
        scale: The length and the size of the further variables, in which the network sees them; a length of about the particles' size.
        num_neighbors: The number of nearest others that a particle sees at most, for many particles, where all pairs would take long; choose it above
            the number that fits within the cutoff. None for all.

    A state holds particle after particle, each with its position and then its further variables:
    ``(..., N * (dim + num_extra))`` for any ``N``.

    Raises:
        InvalidInputError: If a length isn't positive, or the cutoff is more than half the box.

    Reference:
        N. M. Boffi and E. Vanden-Eijnden, "Deep learning probability flows and entropy production rates in active matter", 2024.
    """

    def __init__(
        self,
        num_extra: int,
        cutoff: float,
        dim: int = 2,
        width: int = 64,
        depth: int = 2,
        box: float | None = None,
        base: Callable[[Tensor], Tensor] | None = None,
        scale: tuple[float, float] = (1.0, 1.0),
        num_neighbors: int | None = None,
    ) -> None:
        super().__init__()
        check_positive_int(num_extra, "num_extra", 0)
        check_real(cutoff, "cutoff", above=0.0)
        check_positive_int(dim, "dim")
        check_positive_int(width, "width")
        check_positive_int(depth, "depth")
        if box is not None:
            check_real(box, "box", minimum=2 * float(cutoff))
        if base is not None:
            check_callable(base, "base")
        for value in scale:
            check_real(value, "scale", above=0.0)
        self.num_extra, self.cutoff, self.dim, self.box, self.base = num_extra, float(cutoff), dim, box, base
        if num_neighbors is not None:
            check_positive_int(num_neighbors, "num_neighbors")
        self.scale, self.num_neighbors = (float(scale[0]), float(scale[1])), num_neighbors
        extra = num_extra
        own = extra + (dim if box is None else 0)
        layers = (width,) * depth
        self.pair = MLP((dim + 1 + 2 * extra, *layers, width), activation="silu")
        self.head = MLP((own + width, *layers, dim + extra), zero_last=True, activation="silu")

    def forward(self, x: Tensor) -> Tensor:
        """Return the score ``(..., N * (dim + num_extra))``."""
        particles = as_particles(x, self.dim + self.num_extra)
        length, strength = self.scale
        r, g = particles[..., : self.dim] / length, particles[..., self.dim :] / strength
        gap, mine, theirs, other = self._pairs(r, g)
        square = gap.square().sum(-1)
        # The root has no derivative at zero, where a particle meets itself or another: it is taken of one there.
        apart = (square > 0) & other
        distance = torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)
        reach = self.cutoff / length
        weight = torch.where(other, (1 - square / reach**2).clamp(min=0) ** 3, 0.0)
        seen = self.pair(torch.cat([gap, distance.unsqueeze(-1), mine, theirs], -1))
        around = (weight.unsqueeze(-1) * seen).sum(-2)
        own = g if self.box is not None else torch.cat([r, g], -1)
        out = self.head(torch.cat([own, around], -1))
        unit = out.new_tensor([length] * self.dim + [strength] * self.num_extra)
        score = (out / unit).flatten(-2)
        return score if self.base is None else score + self.base(x)

    def _pairs(self, r: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return ways from each particle to those it sees, ``(..., N, K, dim)``, further variables of both, and where a pair is of two."""
        number = r.shape[-2]
        theirs = g.unsqueeze(-3).expand(*g.shape[:-2], number, number, self.num_extra)
        side = None if self.box is None else self.box / self.scale[0]
        gap = nearest_image(r.unsqueeze(-3) - r.unsqueeze(-2), side)
        other = ~torch.eye(number, dtype=torch.bool, device=r.device).expand(gap.shape[:-1])
        if self.num_neighbors is not None and self.num_neighbors < number - 1:
            with torch.no_grad():
                far = torch.where(other, gap.square().sum(-1), torch.inf)
                near = far.topk(self.num_neighbors, largest=False).indices
            gap, theirs = (
                y.gather(-2, near.unsqueeze(-1).expand(*near.shape, y.shape[-1])) for y in (gap, theirs)
            )
            other = torch.ones_like(near, dtype=torch.bool)
        mine = g.unsqueeze(-2).expand(*gap.shape[:-1], self.num_extra)
        return gap, mine, theirs, other
