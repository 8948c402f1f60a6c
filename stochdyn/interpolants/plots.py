"""Pictures of interpolants: densities side by side, and paths of samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_nonempty, check_positive_int
from stochdyn.diagnostics.figures import as_axes
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["plot_densities", "plot_trajectories"]


def plot_densities(
    laws: Mapping[str, Tensor | Callable[[Tensor], Tensor]],
    extent: tuple[float, float, float, float],
    bins: int = 100,
    axes: Any = None,
) -> Any:
    """Draw densities on the plane side by side, on one colour scale.

    Args:
        laws: What to draw, by title: samples ``(n, 2)``, of which a histogram is drawn, or a log density ``(n, 2) -> (n,)``.
        extent: The corners of the picture, ``(left, right, bottom, top)``.
        bins: The number of cells per side.
        axes: A sequence of matplotlib axes, one per law; made if None.

    Returns:
        The axes.

    Raises:
        InvalidInputError: If there are no laws.
        ShapeError: If samples aren't on the plane.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> axes = plot_densities({"normal": torch.randn(1000, 2)}, (-3, 3, -3, 3), bins=20)
        >>> axes[0].get_title()
        'normal'
    """
    check_nonempty(list(laws), "laws")
    check_positive_int(bins, "bins")
    left, right, bottom, top = extent
    if not (left < right and bottom < top):
        raise InvalidInputError("extent must be (left, right, bottom, top)", got=extent)
    images = {title: _image(law, extent, bins) for title, law in laws.items()}
    if axes is None:
        import matplotlib.pyplot as plt

        _, grid = plt.subplots(
            1, len(laws), figsize=(3.2 * len(laws), 3.4), squeeze=False, layout="constrained"
        )
        axes = grid[0]
    largest = max(float(image.max()) for image in images.values())
    for ax, (title, image) in zip(axes, images.items(), strict=True):
        ax.imshow(
            image.T.numpy(),
            origin="lower",
            extent=extent,
            vmin=0.0,
            vmax=largest,
            aspect="equal",
            cmap="magma",
        )
        ax.set_title(title)
        ax.set_xticks([])
        ax.set_yticks([])
    return axes


def _image(law: Any, extent: tuple[float, float, float, float], bins: int) -> Tensor:
    left, right, bottom, top = extent
    if callable(law):
        x, y = (a + (torch.arange(bins) + 0.5) * (b - a) / bins for a, b in ((left, right), (bottom, top)))
        points = torch.cartesian_prod(x, y)
        with torch.no_grad():
            return torch.as_tensor(law(points)).exp().reshape(bins, bins).detach().cpu()
    law = as_tensor(law, "samples", 2, "(n, 2)", finite=False)
    check_nonempty(law, "samples")
    if law.shape[1] != 2:
        raise ShapeError("samples must lie on the plane", got=tuple(law.shape), expected="(n, 2)")
    counts = torch.histogramdd(
        law.detach().cpu().double(), [bins, bins], range=[left, right, bottom, top]
    ).hist
    cell = (right - left) * (top - bottom) / bins**2
    return counts / (len(law) * cell)


def plot_trajectories(path: Tensor, ax: Any = None, num_paths: int = 200) -> Any:
    """Draw the paths of samples on the plane, from their starts (dark) to their ends (bright).

    Args:
        path: The states ``(T, n, 2)``, as ``push(..., trajectory=True)`` returns them.
        ax: The Matplotlib axes to draw on; new ones if None.
        num_paths: The number of paths that are drawn.

    Returns:
        The axes.

    Raises:
        ShapeError: If the path has another shape.

    Example:
        >>> import matplotlib; matplotlib.use("Agg")
        >>> ax = plot_trajectories(torch.randn(5, 10, 2))
        >>> len(ax.collections)
        2
    """
    path = as_tensor(path, "path", 3, "(T, n, 2)", finite=False)
    if path.shape[-1] != 2:
        raise ShapeError("paths must lie on the plane", got=tuple(path.shape), expected="(T, n, 2)")
    check_positive_int(num_paths, "num_paths")
    ax = as_axes(ax, (4, 4))
    x = path[:, :num_paths].detach().cpu().numpy()
    ax.plot(x[..., 0], x[..., 1], color="0.7", linewidth=0.5, zorder=1)
    ax.scatter(x[0, :, 0], x[0, :, 1], s=4, color="black", zorder=2)
    ax.scatter(x[-1, :, 0], x[-1, :, 1], s=4, color="tab:orange", zorder=3)
    ax.set_aspect("equal")
    return ax
