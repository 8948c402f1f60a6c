"""Places where a field is asked for: nodes of a cloud, or new points tied to the nodes around them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Sites"]

#: A mode that varies faster than the graph can tell isn't extended beyond this factor.
_MIN_DENOMINATOR = 0.1
#: Numbers gathered at once when modes are extended.
_CHUNK = 4_000_000


@dataclass(frozen=True)
class Sites:
    r"""Points with tangent frames, and how fields on the nodes extend to them.

    A mode with :math:`Lu=\lambda Mu` satisfies :math:`u_i=(d_i-\lambda M_i)^{-1}\sum_jw_{ij}O_{ij}u_j` at every
    node. Read at a new point, this is its extension (Nyström's). A node is the special case of one neighbour, itself.

    Attributes:
        points: ``(q, D)``.
        frames: ``(q, D, m)``.
        nodes: ``(q, K)`` neighbours.
        weights: ``(q, K)`` of the neighbours.
        maps: ``(q, K, m, m)`` connections from the neighbours, None where every site is a node.
        degree: ``(q,)`` sum of the weights.
        mass: ``(q,)`` masses; 0 at nodes, whose value isn't extended.
    """

    points: Tensor
    frames: Tensor
    nodes: Tensor
    weights: Tensor
    maps: Tensor | None
    degree: Tensor
    mass: Tensor

    def __len__(self) -> int:
        return self.points.shape[0]

    @property
    def are_nodes(self) -> bool:
        """Whether every site is a node."""
        return self.maps is None

    def take(self, chosen: slice | Tensor) -> Sites:
        """Return some of the sites."""
        maps = None if self.maps is None else self.maps[chosen]
        parts = (self.points, self.frames, self.nodes, self.weights, self.degree, self.mass)
        points, frames, nodes, weights, degree, mass = (p[chosen] for p in parts)
        return Sites(points, frames, nodes, weights, maps, degree, mass)

    def extend(self, fields: Tensor, eigenvalues: Tensor | None = None, *, tangent: bool = True) -> Tensor:
        """Extend modes, or plain fields, from the nodes to the sites.

        Args:
            fields: ``(n, f, k)`` with f = m components of tangent fields, or 1 of functions.
            eigenvalues: ``(k,)`` of the modes; None averages the fields of the neighbours.
            tangent: whether the fields are tangent, so that they are carried by the connection, or functions.

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
            total = torch.einsum("qjab,qjbk->qak", self.maps[part], near) if tangent else near.sum(1)
            below = self.degree[part][:, None]
            if eigenvalues is not None:
                below = torch.maximum(
                    below - eigenvalues * self.mass[part][:, None], _MIN_DENOMINATOR * below
                )
            out[part] = total / below[:, None, :]
        return out

    def to_tangent(self, vectors: Tensor) -> Tensor:
        """Return components ``(*batch, q, m)`` of ambient vectors ``(*batch, q, D)``."""
        return torch.einsum("qda,...qd->...qa", self.frames, vectors)

    def to_ambient(self, components: Tensor) -> Tensor:
        """Return ambient vectors ``(*batch, q, D)`` of components ``(*batch, q, m)``."""
        return torch.einsum("qda,...qa->...qd", self.frames, components)
