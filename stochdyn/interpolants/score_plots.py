"""Pictures of a learned score: its two laws beside the data, and where its residual is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn._checks import (
    as_tensor,
    check_choice,
    check_event_size,
    check_nonempty,
    check_positive_int,
)
from stochdyn.diagnostics.figures import add_legend, as_axes
from stochdyn.interpolants.sampling.reverse import ReverseDiffusion
from stochdyn.interpolants.training.score import ScoreMatching

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_laws", "plot_residual_profile"]

_NAMES = {"data": "data", "ode": "ODE", "sde": "SDE"}


def plot_laws(
    rev: ReverseDiffusion,
    data: Tensor,
    *,
    num_samples: int = 20_000,
    num_steps: int = 100,
    bins: int = 100,
    bound: float | None = None,
    generator: torch.Generator | int | None = None,
    axes: tuple[Axes, Axes, Axes] | None = None,
) -> tuple[Axes, ...]:
    """Draw data, ODE and SDE beside each other: in one dimension as three densities in one picture, in two as maps.

    Args:
        rev: The generative model, in one or two dimensions.
        data: The points of the data, ``(m, d)``.
        num_samples: The number of points of each law.
        num_steps: The number of steps of the integrators.
        bins: The number of cells of a histogram per side.
        bound: The picture reaches from ``-bound`` to ``bound``; 1.05 times the farthest datum if None.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
        axes: Three axes for two dimensions, of which one dimension uses the first; new ones if None.

    Returns:
        The axes used: one, or three.

    Raises:
        ShapeError: If ``data`` isn't ``(m, d)`` with the dimension of the model, or that isn't 1 or 2.
        EmptyDataError: If there are no data.
    """
    data = as_tensor(data, "data", 2, "(m, d)")
    check_nonempty(data, "data")
    check_event_size(data, rev.dim, "data")
    check_choice(str(rev.dim), ("1", "2"), "the dimension")
    check_positive_int(bins, "bins", 2)
    laws = {"data": data.detach().cpu()}
    laws |= {m: rev.sample(num_samples, m, num_steps, generator=generator).cpu() for m in ("ode", "sde")}
    reach = 1.05 * float(data.abs().max()) if bound is None else bound
    if rev.dim == 1:
        ax = as_axes(None if axes is None else axes[0])
        for name, points in laws.items():
            style = {"histtype": "stepfilled", "alpha": 0.3} if name == "data" else {"histtype": "step"}
            ax.hist(
                points[:, 0].numpy(),
                bins=bins,
                range=(-reach, reach),
                density=True,
                label=_NAMES[name],
                **style,
            )
        ax.set(xlabel="x", ylabel="density")
        add_legend(ax)
        return (ax,)
    if axes is None:
        import matplotlib.pyplot as plt

        axes = tuple(plt.subplots(1, 3, figsize=(9, 3.2), sharex=True, sharey=True, layout="constrained")[1])
    for ax, (name, points) in zip(axes, laws.items(), strict=True):
        span = [[-reach, reach], [-reach, reach]]
        first, second = points.T.numpy()
        ax.hist2d(first, second, bins=bins, range=span, density=True, cmap="magma")
        ax.set(title=_NAMES[name], aspect="equal")
    return tuple(axes)


def plot_residual_profile(
    objective: ScoreMatching,
    data: Tensor,
    *,
    num_levels: int = 20,
    label: str = "residual",
    colour: str = "C0",
    ax: Axes | None = None,
) -> Axes:
    """Draw the root mean square residual on noised data against the log signal-to-noise ratio.

    In nats per unit of the log signal-to-noise ratio: its integral along a path is what separates the learned log density
    from that of the reverse SDE.

    Args:
        objective: The trained objective, with a potential.
        data: The points of the data, ``(n, d)``.
        num_levels: The number of noise levels at which the residual is averaged.
        label: The name of the curve in a legend.
        colour: The Matplotlib colour of the curve.
        ax: The Matplotlib axes to draw on; new ones if None.

    Returns:
        The axes.

    Raises:
        ShapeError, EmptyDataError: If ``data`` isn't ``(n, d)`` with points in it.
    """
    data = as_tensor(data, "data", 2, "(n, d)")
    check_nonempty(data, "data")
    check_positive_int(num_levels, "num_levels", 2)
    process = objective.process
    times = process.grid(num_levels - 1, dtype=data.dtype).to(data.device)
    values = []
    for t in times:
        x = process.perturb(t, data, torch.randn_like(data, memory_format=torch.contiguous_format))
        with torch.no_grad():
            r = objective.fokker_planck_residual(t, x, form="log")
        rate = 0.5 * process.squared_diffusion(t) / process.variance(t)
        values.append((r / rate).square().mean().sqrt())
    ax = as_axes(ax)
    ax.semilogy(
        process.log_snr(times).cpu().numpy(), torch.stack(values).cpu().numpy(), color=colour, label=label
    )
    ax.set(xlabel=r"log signal-to-noise ratio $\lambda$", ylabel=r"residual (nats per unit of $\lambda$)")
    add_legend(ax)
    return ax
