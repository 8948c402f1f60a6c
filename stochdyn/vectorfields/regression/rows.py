r"""Rows of Gaussian-process inputs: a place and a tangent direction, of which the field's component is one number."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.vectorfields.regression.sites import Sites

if TYPE_CHECKING:
    from stochdyn.vectorfields.geometry.cloud import PointCloud

__all__ = ["decode", "rows_of"]


def rows_of(sites: Sites) -> Tensor:
    """Return the rows ``(q m, 1 + 2 D)`` of all components at the sites: node (or -1), point, direction.

    Of functions, whose direction is the number one, ``(q, 2 + D)``.
    """
    q, value, m = sites.frames.shape
    node = sites.nodes[:, :1].to(sites.points) if sites.are_nodes else sites.points.new_full((q, 1), -1.0)
    place = torch.cat([node, sites.points], -1)
    where = place[:, None].expand(q, m, place.shape[1])
    return torch.cat([where, sites.frames.mT], -1).reshape(q * m, place.shape[1] + value)


def decode(cloud: PointCloud, x: Tensor) -> tuple[Sites, Tensor]:
    """Return the sites of rows, and their directions in the frames there, ``(N, m)``.

    Args:
        cloud: The points that sample the manifold.
        x: The rows ``(N, 1 + 2 D)`` as :func:`rows_of` makes them, or numbers of components ``(N, 1)``: node times m plus
            component.

    Raises:
        ShapeError: If the rows have another length.
        InvalidInputError: If a component lies outside the cloud.
    """
    m, ambient = cloud.dim, cloud.ambient_dim
    width = 1 + ambient + cloud.value_dim
    if x.ndim != 2 or x.shape[-1] not in (1, width):
        raise ShapeError(
            "rows don't fit the cloud",
            got=f"shape {tuple(x.shape)}",
            expected=f"(N, {width}), as cloud.rows(...) returns, or (N, 1)",
        )
    if x.shape[-1] == 1:
        component = x[:, 0].long()
        if int(component.min()) < 0 or int(component.max()) >= m * len(cloud):
            raise InvalidInputError(
                "components lie outside the cloud",
                got=f"{int(component.min())} to {int(component.max())}",
                expected=f"0 to {m * len(cloud) - 1}",
            )
        along = torch.eye(m, dtype=torch.float64, device=x.device)[component % m]
        return cloud.sites(component // m), along
    node = x[:, 0].long()
    if bool((node >= 0).all()):
        sites = cloud.sites(node)
    else:
        sites = cloud.sites(x[:, 1 : 1 + ambient].detach())
    return sites, torch.einsum("nd,nda->na", x[:, 1 + ambient :].double(), sites.frames)
