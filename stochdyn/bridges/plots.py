"""Pictures of a refinement: objective and parameters over the iterations, trajectories through the snapshots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_sample_shape, check_positive_int, check_type
from stochdyn.bridges.data.snapshots import Snapshot, Snapshots
from stochdyn.bridges.refinement.history import History
from stochdyn.core.law.marginals import SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.diagnostics.figures import add_legend, as_axes
from stochdyn.errors import EmptyDataError, ShapeError

__all__ = ["plot_history", "plot_trajectories"]

_MAX_CURVES = 12


def plot_history(history: History, truth: Mapping[str, float] | None = None, axes: Any = None) -> Any:
    """Draw how far the objective is from its last value after every half step, and the parameters per iteration.

    Args:
        history: The history of a refinement.
        truth: The known values of parameters by name, drawn as dashed lines.
        axes: The two matplotlib axes; new ones if None.

    Returns:
        The two axes.

    Raises:
        EmptyDataError: If there was no iteration.
    """
    if not len(history):
        raise EmptyDataError("the history has no iterations")
    if axes is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left, right = axes
    trace = history.trace
    gap = (trace - trace.min())[:-1]  # the last one is zero, or nearly so
    left.semilogy(torch.arange(len(gap)).double() / 2, gap.where(gap > 0, torch.nan), marker=".")
    left.set_xlabel("iteration")
    left.set_ylabel("objective above its least value, nats")
    drawn = 0
    for name, values in history.parameters.items():
        for index, curve in enumerate(values.reshape(len(history), -1).T):
            if drawn == _MAX_CURVES:
                break
            label = name if values[0].numel() == 1 else f"{name}[{index}]"
            (line,) = right.plot(range(1, len(history) + 1), curve, marker=".", label=label)
            if truth is not None and name in truth and values[0].numel() == 1:
                right.axhline(truth[name], color=line.get_color(), linestyle="--", linewidth=0.8)
            drawn += 1
    right.set_xlabel("iteration")
    right.set_ylabel("parameters")
    add_legend(right)
    return axes


def plot_trajectories(
    law: PathMeasure,
    snapshots: Snapshots,
    sample_shape: SampleShape = 50,
    components: tuple[int, int] | None = None,
    num_times: int = 200,
    held_out: Any = (),
    seed: int = 0,
    axis: Any = None,
) -> Any:
    """Draw trajectories of a law and the snapshots they pass through.

    Args:
        law: The law on paths to draw from, over the span of the snapshots.
        snapshots: The snapshots that are drawn, of the first components of the state.
        sample_shape: The number of trajectories.
        components: The two components to draw against one another; against time, the first one, if the snapshots have only one.
        num_times: The number of points of a curve.
        held_out: The snapshots that weren't trained on, one or several, drawn as crosses.
        seed: The seed of the draws.
        axis: The matplotlib axis; a new one if None.

    Returns:
        The axis.

    Raises:
        ShapeError: If a component doesn't exist.
    """
    check_type(law, PathMeasure, "law")
    check_type(snapshots, Snapshots, "snapshots")
    check_positive_int(num_times, "num_times", 2)
    shape, snaps = as_sample_shape(sample_shape), snapshots
    pair = components or ((0, 1) if snaps.dim > 1 else None)
    if pair is not None and max(pair) >= snaps.dim:
        raise ShapeError("there is no such component", got=pair, expected=f"below {snaps.dim}")
    axis = as_axes(axis, (5, 4))
    ts = torch.linspace(float(snaps.times[0]), float(snaps.times[-1]), num_times, dtype=torch.float64)
    x = (
        law.sample(ts.to(snaps.device), shape, torch.Generator(snaps.device).manual_seed(seed))
        .x.detach()
        .cpu()
    )
    x = x.reshape(-1, *x.shape[-2:])
    for path in x:
        first, second = (ts, path[:, 0]) if pair is None else (path[:, pair[0]], path[:, pair[1]])
        axis.plot(first, second, color="0.6", linewidth=0.5, alpha=0.6, zorder=1)

    def scatter(time: float, sample: Tensor, **style: Any) -> None:
        sample = sample.cpu()
        first = torch.full_like(sample[:, 0], time) if pair is None else sample[:, pair[0]]
        axis.scatter(first, sample[:, 0 if pair is None else pair[1]], zorder=2, **style)

    for snap in snaps:
        scatter(snap.time, snap.sample, s=10, label=f"t = {snap.time:g}")
    for snap in [held_out] if isinstance(held_out, Snapshot) else held_out:
        scatter(snap.time, snap.sample, s=14, marker="x", color="black", linewidth=0.7)
    axis.set_xlabel("t" if pair is None else f"component {pair[0] + 1}")
    axis.set_ylabel(f"component {1 if pair is None else pair[1] + 1}")
    add_legend(axis)
    return axis
