"""Plots of vector fields on clouds: arrows in space or the plane, maps of the globe, trajectories."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import (
    as_tensor,
    check_event_size,
)
from stochdyn.diagnostics.figures import as_axes
from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields.geometry.sphere import sphere_of
from stochdyn.vectorfields.regression._input import as_count, as_points, as_vectors

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from stochdyn.vectorfields.singularities import Singularities

__all__ = ["plot_field", "plot_globe", "plot_trajectories"]


def _axes(dim: int, ax: Any) -> Any:
    if ax is None and dim == 3:
        import matplotlib.pyplot as plt

        return plt.figure(figsize=(6, 6), layout="constrained").add_subplot(projection="3d")
    return as_axes(ax, (6, 6))


def _array(x: Tensor) -> np.ndarray:
    return x.detach().cpu().double().numpy()


def plot_field(
    points: Any,
    vectors: Any,
    *,
    values: Any = None,
    every: int = 1,
    scale: float | None = None,
    colour: str = "C0",
    label: str = "",
    zeros: Singularities | None = None,
    ax: Any = None,
) -> Axes:
    """Draw a field as arrows at points of the plane or of space.

    Args:
        points: The points ``(n, D)`` with D = 2 or 3.
        vectors: The vectors ``(n, D)`` at the points.
        values: Numbers ``(n,)`` to colour the points by, such as the posterior's spread.
        every: The interval between the points that get an arrow: 2 draws every other one.
        scale: The length of an arrow for a vector of length one; by default the longest arrow is a fifteenth of the extent.
        colour: The colour of the arrows.
        label: The label of the colour bar of the values.
        zeros: What :func:`~stochdyn.vectorfields.singularities.find_singularities` returned, to be marked: crosses for the
            mean field, dots for the draws, red for index 1, blue for -1.
        ax: The axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        InvalidInputError: If the points have another dimension.

    Example:
        >>> axes = plot_field(torch.rand(20, 2), torch.rand(20, 2), values=torch.rand(20))
        >>> len(axes.collections)  # points and arrows
        2
    """
    x = as_points(points)
    if x.shape[1] not in (2, 3):
        raise InvalidInputError(
            "points must lie in the plane or in space to be drawn", got=f"{x.shape[1]} coordinates"
        )
    v = as_vectors(vectors, x.shape[0], x.shape[1])
    every = as_count(every, "every")
    if values is not None:
        check_event_size(as_tensor(values, "values", 1, "(n,)", missing=True), len(x), "values")
    at, arrows = _array(x), _array(v)
    longest = float(np.linalg.norm(arrows, axis=1).max())
    factor = scale if scale is not None else float(np.ptp(at, axis=0).max()) / (15.0 * max(longest, 1e-300))
    ax = _axes(x.shape[1], ax)
    if values is not None:
        shades = _array(as_tensor(values, "values", 1, "(n,)", like=x, missing=True))
        drawn = ax.scatter(*at.T, c=shades, s=12, cmap="viridis")
        ax.figure.colorbar(drawn, ax=ax, shrink=0.7, label=label)
    if x.shape[1] == 3:
        ax.quiver(*at[::every].T, *(factor * arrows[::every]).T, color=colour, linewidth=0.7)
        ax.set_box_aspect(np.ptp(at, axis=0))
    else:
        ax.quiver(
            *at[::every].T,
            *(factor * arrows[::every]).T,
            angles="xy",
            scale_units="xy",
            scale=1,
            color=colour,
        )
        ax.set_aspect("equal")
    if zeros is not None:
        _mark(ax, zeros, _array)
    return ax


def plot_globe(
    points: Any,
    vectors: Any,
    *,
    values: Any = None,
    every: int = 1,
    scale: float | None = None,
    label: str = "",
    zeros: Singularities | None = None,
    ax: Any = None,
) -> Axes:
    """Draw a tangent field of a sphere as a map: longitude across, latitude up, arrows to the east and north.

    Args:
        points: The points ``(n, 3)`` on a sphere.
        vectors: The vectors ``(n, 3)`` at the points.
        values: Numbers ``(n,)`` to colour the points by; the lengths of the vectors if None.
        every: The interval between the points that get an arrow: 2 draws every other one.
        scale: Matplotlib's ``scale`` of the arrows: the number of vector units per width of the map.
        label: The label of the colour bar.
        zeros: The zeros to be marked, as in :func:`plot_field`.
        ax: The axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        InvalidInputError: If the points don't lie on a sphere.
    """
    x = as_points(points, dim=3)
    found = sphere_of(x)
    if found is None:
        raise InvalidInputError(
            "the points don't lie on a sphere in three dimensions",
            hint="of WGS 84 points take those of vectorfields.EARTH at the same coordinates",
        )
    v = as_vectors(vectors, x.shape[0], 3)
    every = as_count(every, "every")
    at = _array(torch.nn.functional.normalize(x.double() - found[0], dim=-1))
    arrows = _array(v)
    longitude, latitude = np.radians(_on_map(x, found[0]).T)
    east = np.stack([-np.sin(longitude), np.cos(longitude), np.zeros(len(at))], 1)
    north = np.cross(at, east)
    ax = as_axes(ax, (9, 4.5))
    shades = np.linalg.norm(arrows, axis=1) if values is None else _array(torch.as_tensor(values))
    drawn = ax.scatter(np.degrees(longitude), np.degrees(latitude), c=shades, s=14, cmap="viridis")
    ax.figure.colorbar(drawn, ax=ax, shrink=0.8, label=label)
    ax.quiver(
        np.degrees(longitude)[::every],
        np.degrees(latitude)[::every],
        (arrows * east).sum(1)[::every],
        (arrows * north).sum(1)[::every],
        scale=scale,
        width=0.0015,
    )
    if zeros is not None:
        _mark(ax, zeros, lambda places: _on_map(places, found[0]))
    ax.set(xlim=(-180, 180), ylim=(-90, 90), xlabel="longitude", ylabel="latitude")
    return ax


def _on_map(points: Tensor, centre: Tensor) -> np.ndarray:
    """Longitude and latitude in degrees, ``(n, 2)``."""
    at = _array(torch.nn.functional.normalize(points.double() - centre, dim=-1))
    return np.degrees(np.stack([np.arctan2(at[:, 1], at[:, 0]), np.arcsin(at[:, 2].clip(-1, 1))], 1))


def _mark(ax: Any, zeros: Singularities, place: Callable[[Tensor], np.ndarray]) -> None:
    """Mark zeros of the draws by dots and of the mean field by crosses, red where the index is positive."""
    drawn = zeros.draw_index[zeros.draw_index != 0]
    places, index = zeros.positions()
    for at, kind, style in (
        (zeros.draw_places, drawn, {"marker": ".", "s": 4, "alpha": 0.25}),
        (places, index, {"marker": "x", "s": 40}),
    ):
        colours = np.where(_array(kind) > 0, "red", "blue")
        ax.scatter(*place(at).T, c=colours, zorder=3, **style)


def plot_trajectories(x: Any, *, colour: str = "C1", num_paths: int = 20, ax: Any = None) -> Axes:
    """Draw trajectories ``(*sample, T, D)`` in the plane or in space, and their starts as dots.

    Args:
        x: The states ``(*sample, T, D)`` with D = 2 or 3.
        colour: The colour of the lines.
        num_paths: The largest number of trajectories that are drawn.
        ax: The axes to draw on; new ones if None.
    """
    paths = torch.as_tensor(x)
    check_event_size(paths, paths.shape[-1] if paths.shape[-1] in (2, 3) else 3, "x")
    lines = _array(paths.reshape(-1, *paths.shape[-2:])[:num_paths])
    ax = _axes(lines.shape[-1], ax)
    for line in lines:
        ax.plot(*line.T, color=colour, linewidth=0.8)
    ax.scatter(*lines[:, 0].T, color=colour, s=8)
    return ax
