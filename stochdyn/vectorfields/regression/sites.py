"""Places where a field is asked for: nodes of a cloud, or new points tied to the nodes around them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sites", "lost_variance", "variogram"]

#: Numbers gathered at once when modes are extended.
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Sites:
    r"""Points with tangent frames, and how fields on the nodes are read there.

    .. math:: u(x)=\sum_jc_jO_{xj}u_j

    with the weights of :func:`~stochdyn.vectorfields.geometry.extension.tie`. A node is the special case of one
    neighbour, itself.

    Attributes:
        points: The places ``(q, D)``.
        frames: The tangent frames ``(q, D, m)`` there.
        nodes: The neighbours ``(q, K)`` of every place.
        weights: The weights ``(q, K)`` of the neighbours.
        maps: The connections ``(q, K, m, m)`` from the neighbours, None where every site is a node.
        open: The share ``(q,)`` of a field's variance that no reading can tell: from 0 between the nodes to 1 far from all
            of them.
        doubt: The share ``(q,)`` of the variance that the reader itself leaves out, 0 at nodes.
    """

    points: Tensor
    frames: Tensor
    nodes: Tensor
    weights: Tensor
    maps: Tensor | None
    open: Tensor
    doubt: Tensor

    def __len__(self) -> int:
        return self.points.shape[0]

    @property
    def are_nodes(self) -> bool:
        """Whether every site is a node."""
        return self.maps is None

    def take(self, chosen: slice | Tensor) -> Sites:
        """Return some of the sites."""
        maps = None if self.maps is None else self.maps[chosen]
        parts = (self.points, self.frames, self.nodes, self.weights)
        points, frames, nodes, weights = (p[chosen] for p in parts)
        return Sites(points, frames, nodes, weights, maps, self.open[chosen], self.doubt[chosen])

    def extend(self, fields: Tensor, *, tangent: bool = True) -> Tensor:
        """Read fields on the nodes at the sites.

        Args:
            fields: The fields ``(n, f, k)`` with f = m components of tangent fields, or 1 of functions.
            tangent: Whether the fields are tangent, so that they are carried by the connection, or functions.

        Returns:
            ``(q, f, k)`` in the frames of the sites.
        """
        if self.maps is None:
            return fields[self.nodes[:, 0]]
        q, count = self.nodes.shape
        _, fibre, k = fields.shape
        step = max(1, _CHUNK // (count * fibre * k))
        out = fields.new_empty(q, fibre, k)
        for start in range(0, q, step):
            part = slice(start, start + step)
            near = fields[self.nodes[part]] * self.weights[part][..., None, None]
            out[part] = torch.einsum("qjab,qjbk->qak", self.maps[part], near) if tangent else near.sum(1)
        return out

    def to_tangent(self, vectors: Tensor) -> Tensor:
        """Return components ``(*batch, q, m)`` of ambient vectors ``(*batch, q, D)``."""
        return torch.einsum("qda,...qd->...qa", self.frames, vectors)

    def to_ambient(self, components: Tensor) -> Tensor:
        """Return ambient vectors ``(*batch, q, D)`` of components ``(*batch, q, m)``."""
        return torch.einsum("qda,...qa->...qd", self.frames, components)


def variogram(levels: Sequence[Sites], residuals: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    r"""Return how rough fields of a prior are, from what they differ at nodes from what is read of them from other nodes.

    .. math:: E|u_i-\hat u_i|^2\approx s\,d_i+\eta\,(1+|c_i|^2)

    with the reader's doubt d and weights c, averaged over nodes at each level, by least squares of relative errors with
    :math:`s,\eta\ge0`.

    Args:
        levels: The nodes as they are read from others, from nearer and from farther ones.
        residuals: The prior's mean square differences at them, ``(q,)`` per level.

    Returns:
        The factor s, by which fields of the prior are rougher than the reader's, and the variance η of noise of the nodes: what of a
        graph's fields has no correlation from node to node, and comes from the graph rather than from the manifold.
    """
    found = torch.stack([r.mean() for r in residuals]).clamp(min=torch.finfo(torch.float64).tiny)
    doubt = torch.stack([level.doubt.mean() for level in levels]).to(found) / found
    noise = torch.stack([(1.0 + level.weights.square().sum(-1)).mean() for level in levels]).to(found) / found
    aa, ab, bb, a, b = (v.sum() for v in (doubt**2, doubt * noise, noise**2, doubt, noise))
    if len(levels) == 1:
        return a / aa, torch.zeros_like(a)  # too few nodes to tell noise from roughness
    determinant = aa * bb - ab**2
    # the two normal equations; on the border of the quadrant, the one of them that is left
    s, eta = (bb * a - ab * b) / determinant, (aa * b - ab * a) / determinant
    none = torch.zeros_like(s)
    s, eta = torch.where(eta >= 0, s, a / aa), eta.clamp(min=0.0)
    return torch.where(s >= 0, s, none), torch.where(s >= 0, eta, b / bb)


def lost_variance(sites: Sites, at_nodes: Tensor, scale: Tensor | float, noise: Tensor | float) -> Tensor:
    r"""Return the prior variance that reading a field off the nodes leaves out at new points, ``(q,)``.

    .. math:: (1-o)\,\big(s\,d(x)+\eta\,(1-|c|^2)\big)+o\,w,\qquad w=a+o\,(1-a)

    Between the nodes it is the reader's own doubt d times a factor s, which says how much rougher or smoother than the
    reader's the fields of the prior are, and what the weights c, of length one at most, don't carry of the noise η of the nodes;
    :func:`variogram` tells both. Away from all nodes, as o goes to one, it is all of the variance: from the neighbours' own, a, to the
    amplitude, one.

    Args:
        sites: The new points.
        at_nodes: The prior variance ``(n,)`` of a component at every node, one on average.
        scale: The factor s.
        noise: The variance η of noise of the nodes.
    """
    share = sites.weights.abs()
    around = (at_nodes[sites.nodes] * share).sum(-1) / share.sum(-1).clamp(min=1e-300)
    whole = around + sites.open * (1.0 - around)
    uncarried = (1.0 - sites.weights.square().sum(-1)).clamp(min=0.0)
    inside = torch.minimum(scale * sites.doubt + noise * uncarried, whole)
    return inside + sites.open * (whole - inside)
