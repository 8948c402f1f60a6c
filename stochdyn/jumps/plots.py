"""Plots of jump processes on Matplotlib axes: states with their rates, posteriors of states, and tests of Markov state models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from stochdyn._checks import (
    as_sequence,
    as_tensor,
    as_time_grid,
    check_type,
)
from stochdyn.diagnostics.figures import add_legend, as_axes
from stochdyn.errors import ShapeError
from stochdyn.jumps.generator import RateMatrix
from stochdyn.jumps.markov_state import ChapmanKolmogorov, TimeScales
from stochdyn.jumps.measure import ConditionedJumps

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_chapman_kolmogorov", "plot_state_posterior", "plot_states", "plot_time_scales"]


def plot_states(rates: RateMatrix, labels: Sequence[Any] | None = None, ax: Axes | None = None) -> Axes:
    """Draw the states on a circle, with arrows as wide as their rates on a logarithmic scale.

    Args:
        rates: The generator.
        labels: The names of the states; 0, 1, 2, ... if None.
        ax: Where to draw; new axes if None.

    Returns:
        The axes.

    Example:
        >>> ax = plot_states(RateMatrix([[0.0, 0.7], [1.9, 0.0]]), ["closed", "open"])
        >>> sorted(text.get_text() for text in ax.texts if text.get_text())
        ['0.7', '1.9', 'closed', 'open']
    """
    check_type(rates, RateMatrix, "rates")
    if rates.batch_shape:
        raise ShapeError("one matrix at a time", got=f"batch {tuple(rates.batch_shape)}")
    size, matrix = rates.num_states, rates.matrix.detach().double()
    names = (
        [str(k) for k in range(size)]
        if labels is None
        else [str(name) for name in as_sequence(labels, "labels", "one name per state")]
    )
    if len(names) != size:
        raise ShapeError("labels must name every state", got=len(names), expected=size)
    ax = as_axes(ax)
    angle = [math.pi / 2 - 2 * math.pi * k / size for k in range(size)]
    place = [(math.cos(a), math.sin(a)) for a in angle]
    largest = float(matrix.clamp(min=0).max()) or 1.0
    for i in range(size):
        for j in range(size):
            rate = float(matrix[i, j])
            if i == j or rate <= 0:
                continue
            width = 0.6 + 2.4 * max(0.0, 1 + math.log10(rate / largest) / 3)
            (x0, y0), (x1, y1) = place[i], place[j]
            ax.annotate(
                "",
                (x1, y1),
                (x0, y0),
                arrowprops={
                    "arrowstyle": "-|>",
                    "connectionstyle": "arc3,rad=0.18",
                    "shrinkA": 18,
                    "shrinkB": 18,
                    "linewidth": width,
                    "color": "0.4",
                },
            )
            # on the outer side of the arc
            dx, dy = x1 - x0, y1 - y0
            ax.text(
                (x0 + x1) / 2 + 0.16 * dy,
                (y0 + y1) / 2 - 0.16 * dx,
                f"{rate:.2g}",
                ha="center",
                va="center",
                fontsize=8,
            )
    for (x, y), name in zip(place, names, strict=True):
        ax.text(
            x,
            y,
            name,
            ha="center",
            va="center",
            bbox={"boxstyle": "circle,pad=0.45", "fc": "white", "ec": "C0"},
        )
    ax.set_xlim(-1.4, 1.4)
    ax.set_ylim(-1.4, 1.4)
    ax.set_aspect("equal")
    ax.axis("off")
    return ax


def plot_state_posterior(
    posterior: ConditionedJumps,
    ts: object,
    num_draws: int = 5,
    labels: Sequence[Any] | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the probability of each state over time given observations, and some paths from that posterior.

    Args:
        posterior: The law given observations, from :meth:`JumpMeasure.conditioned`.
        ts: The times ``(T,)`` at which probabilities are drawn; paths run to the last.
        num_draws: The number of paths.
        labels: The names of the states; 0, 1, 2, ... if None.
        ax: Where to draw; new axes if None.

    Returns:
        The axes.

    Example:
        >>> from stochdyn.jumps import GaussianLevels, JumpMeasure
        >>> law = JumpMeasure([0.5, 0.5], [[0.0, 0.7], [1.9, 0.0]])
        >>> seen = law.conditioned([0.5, 1.0], [0.1, 0.9], GaussianLevels([0.0, 1.0], 0.3))
        >>> ax = plot_state_posterior(seen, torch.linspace(0, 2, 9))
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['0', '1']
    """
    check_type(posterior, ConditionedJumps, "posterior")
    grid = as_time_grid(ts, like=torch.empty((), dtype=torch.float64)).double()
    ax = as_axes(ax)
    probs = torch.stack([posterior.marginal(t).probs for t in grid]).detach()
    size = posterior.num_states
    edges = torch.cat([grid[:1], 0.5 * (grid[1:] + grid[:-1]), grid[-1:]])
    ax.pcolormesh(
        edges.numpy(), torch.arange(size + 1).numpy() - 0.5, probs.mT.numpy(), cmap="Blues", vmin=0, vmax=1
    )
    if num_draws:
        record = posterior.sample_record(float(grid[-1]), num_draws, 0)
        shift = torch.linspace(-0.15, 0.15, num_draws) if num_draws > 1 else torch.zeros(1)
        for k in range(num_draws):
            count = int(record.num_jumps[k])
            t = torch.cat([record.ends[:1], record.times[k, :count], record.ends[1:]])
            s = torch.cat([record.states[k, : count + 1], record.states[k, count : count + 1]]) + shift[k]
            ax.step(t.numpy(), s.numpy(), where="post", linewidth=0.8, color=f"C{k + 1}")
    ax.set_yticks(
        range(size), [str(k) for k in range(size)] if labels is None else [str(name) for name in labels]
    )
    ax.set_xlabel("time")
    ax.set_ylabel("state")
    return ax


def plot_time_scales(result: TimeScales, reference: object = None, ax: Axes | None = None) -> Axes:
    """Draw implied time scales against lag; below the grey line they are shorter than the lag and mean nothing.

    Args:
        result: From :func:`implied_time_scales`.
        reference: Relaxation times ``(k,)`` of a fitted rate matrix, drawn as lines.
        ax: Where to draw; new axes if None.

    Returns:
        The axes.
    """
    check_type(result, TimeScales, "result")
    ax = as_axes(ax)
    for k in range(result.times.shape[1]):
        ax.plot(result.lags.numpy(), result.times[:, k].numpy(), "o-", markersize=3, color=f"C{k}")
    if reference is not None:
        for k, value in enumerate(as_tensor(reference, "reference", 1, "(k,)").detach().tolist()):
            ax.axhline(value, color=f"C{k}", linestyle="--", linewidth=0.8)
    ax.plot(result.lags.numpy(), result.lags.numpy(), color="0.6", linewidth=1)
    ax.set_yscale("log")
    ax.set_xlabel("lag")
    ax.set_ylabel("time scale")
    return ax


def plot_chapman_kolmogorov(result: ChapmanKolmogorov, state: int = 0, ax: Axes | None = None) -> Axes:
    """Draw predicted transition probabilities out of one state as lines, and the shares in the data with two standard errors.

    Args:
        result: From :func:`chapman_kolmogorov`.
        state: The state that transitions start from.
        ax: Where to draw; new axes if None.

    Returns:
        The axes.
    """
    check_type(result, ChapmanKolmogorov, "result")
    ax = as_axes(ax)
    for j in range(result.predicted.shape[-1]):
        ax.plot(result.lags.numpy(), result.predicted[:, state, j].numpy(), color=f"C{j}", label=f"to {j}")
        ax.errorbar(
            result.lags.numpy(),
            result.observed[:, state, j].numpy(),
            2 * result.error[:, state, j].numpy(),
            fmt="o",
            markersize=3,
            color=f"C{j}",
        )
    ax.set_xlabel("lag")
    ax.set_ylabel(f"probability from {state}")
    add_legend(ax)
    return ax
