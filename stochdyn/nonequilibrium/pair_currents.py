"""Currents of many like particles, as sums over particles and pairs, for estimates from trajectories alone."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn._checks import check_positive_int, check_real
from stochdyn.errors import InvalidInputError
from stochdyn.nonequilibrium.particles import as_particles, nearest_image

__all__ = ["PairCurrents"]


class PairCurrents:
    r"""The coefficients of currents that are alike for all particles, each with a position :math:`r_i` and a heading :math:`g_i`.

    .. math::
        \sum_iu_i\cdot dr_i,\quad\sum_iu_i\cdot dg_i,\qquad
        u_i\in\Big\{r_i,\ g_i,\ \sum_{j\ne i}w_m\,e_{ij},\ \sum_jw_m(g_i\cdot e_{ij})\,e_{ij},\ \sum_jw_m(g_j\cdot e_{ij})\,e_{ij},\
        \sum_jw_m\,g_i,\ \sum_jw_m\,g_j\Big\}

    with the direction :math:`e_{ij}` from j to i and weights :math:`w_m(|r_{ij}|)` that are one at the m-th of equal distances within the cutoff and
    fall to zero at its neighbours. These are all vectors of a pair that are linear in the headings, whatever the interaction. Their number
    doesn't depend on the number of particles, and every particle adds to what is known of each.

    Give it to :func:`short_time_entropy` as ``features``, with one group of components per particle in ``by`` for the rate of each.

    Args:
        num_extra: The number of variables of a particle beside its position: ``dim`` where it has a heading, or 0, which leaves out the terms with
            :math:`g`.
        cutoff: The distance beyond which particles don't feel each other.
        dim: The number of dimensions of space, of the position and of the heading.
        num_shells: The number of distances M. A third of the length over which forces change, or less, is a good distance between two.
        box: The side of a periodic box, at least twice the cutoff; positions themselves are no features then. None for a trap around the origin.

    A state holds particle after particle, position before heading: ``(..., N * (dim + num_extra))``.

    Raises:
        InvalidInputError: If a length isn't positive, the cutoff is more than half the box, or a heading has another dimension than space.

    Example:
        >>> features = PairCurrents(num_extra=2, cutoff=3.0, num_shells=5)
        >>> features(torch.randn(7, 16 * 4)).shape
        torch.Size([7, 54, 64])
    """

    def __init__(
        self, num_extra: int, cutoff: float, dim: int = 2, num_shells: int = 8, box: float | None = None
    ) -> None:
        check_positive_int(num_extra, "num_extra", 0)
        check_real(cutoff, "cutoff", above=0.0)
        check_positive_int(dim, "dim")
        check_positive_int(num_shells, "num_shells")
        if num_extra not in (0, dim):
            raise InvalidInputError(
                "num_extra must be 0, or the dimension of space for a heading",
                got=num_extra,
                expected=f"0 or {dim}",
            )
        if box is not None:
            check_real(box, "box", minimum=2 * float(cutoff))
        self.num_extra, self.cutoff, self.dim, self.num_shells = num_extra, float(cutoff), dim, num_shells
        self.box = None if box is None else float(box)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the coefficients of ``K`` currents at states ``(..., d)``, ``(..., K, d)``.

        Raises:
            ShapeError: If a state doesn't hold whole particles.
        """
        particles = as_particles(x, self.dim + self.num_extra)
        r, g = particles[..., : self.dim], particles[..., self.dim :]
        gap = nearest_image(r.unsqueeze(-2) - r.unsqueeze(-3), self.box)
        distance = gap.norm(dim=-1)
        # A particle isn't its own neighbour, and two at one place have no direction.
        apart = distance > 0
        toward = gap / torch.where(apart, distance, 1.0).unsqueeze(-1)
        step = self.cutoff / (self.num_shells + 1)
        vectors = [] if self.box is not None else [r]
        vectors += [g] if self.num_extra else []
        for m in range(1, self.num_shells + 1):
            # cos² between neighbouring distances: the weights add up to one
            near = (distance / step - m).clamp(-1, 1)
            weight = torch.where(apart, 0.5 + 0.5 * (torch.pi * near).cos(), 0.0)
            vectors.append((weight.unsqueeze(-1) * toward).sum(-2))
            if self.num_extra:
                for along in ((g.unsqueeze(-2) * toward).sum(-1), (g.unsqueeze(-3) * toward).sum(-1)):
                    vectors.append(((weight * along).unsqueeze(-1) * toward).sum(-2))
                vectors += [weight.sum(-1, keepdim=True) * g, weight @ g]
        each = torch.stack(vectors, -3)
        if not self.num_extra:
            return each.flatten(-2)
        still = torch.zeros_like(each)
        fields = torch.cat([torch.cat([each, still], -1), torch.cat([still, each], -1)], -3)
        return fields.flatten(-2)
