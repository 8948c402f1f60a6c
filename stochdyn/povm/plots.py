"""Figures of evolutions and of steady states over a parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stochdyn.diagnostics.figures import add_legend, as_axes
from stochdyn.errors import InvalidInputError

if TYPE_CHECKING:
    from stochdyn.povm.dynamics.evolution import Evolution

__all__ = ["plot_evolution", "plot_phase_diagram"]


def plot_evolution(run: Evolution, exact: Any = None, axes: Sequence[Any] | None = None) -> Any:
    """Draw the observables of an evolution over time, with two standard errors, and below them the residual.

    Args:
        run: The result of :func:`stochdyn.povm.evolve`.
        exact: A result with ``times`` and ``expect``, such as from :func:`stochdyn.povm.exact.evolve`, drawn as lines
            behind the points; None for none.
        axes: Two Matplotlib axes to draw on; new ones if None.

    Returns:
        The figure.

    Raises:
        InvalidInputError: If ``axes`` aren't two.
    """
    if axes is None:
        import matplotlib.pyplot as plt

        _, axes = plt.subplots(2, 1, sharex=True, figsize=(6, 5), height_ratios=(3, 1), layout="constrained")
    if len(axes) != 2:
        raise InvalidInputError("two axes are needed", got=len(axes))
    top, bottom = axes
    lines = {} if exact is None else _drawn(exact.expect)
    found = [(part, values, name) for name in run.expect for part, values in _parts(name, run.expect[name])]
    for i, (part, values, name) in enumerate(found):
        colour = f"C{i}"
        if part in lines:
            top.plot(exact.times, lines[part], color=colour, lw=1)
        style = {"ls": "none" if exact is not None else "-", "marker": "o", "ms": 3, "color": colour}
        top.errorbar(run.times, values, 2 * run.stderr[name], label=part, capsize=2, **style)
    top.set_ylabel("expectation")
    add_legend(top)
    bottom.plot(run.steps["t"], run.steps["residual"], ".-", color="0.3", lw=0.8, ms=3)
    bottom.set_ylabel("residual")
    bottom.set_xlabel("time")
    return top.figure


def plot_phase_diagram(
    parameter: Tensor | Sequence[float],
    expect: Mapping[str, Tensor | Sequence[float]],
    errors: Mapping[str, Tensor | Sequence[float]] | None = None,
    exact: Mapping[str, Tensor | Sequence[float]] | None = None,
    xlabel: str = "field",
    axes: Any = None,
) -> Any:
    """Draw observables of the steady state over a parameter of the model.

    Args:
        parameter: The values ``(n,)`` of the parameter.
        expect: The mean ``(n,)`` of every observable by name.
        errors: The half lengths of the error bars by name; None for none.
        exact: The exact means by name, drawn as lines; None for none.
        xlabel: The name of the parameter, as the axis shows it.
        axes: The Matplotlib axes to draw on; new ones if None.

    Returns:
        The figure.

    Raises:
        InvalidInputError: If an observable hasn't one value for each parameter.
    """
    x = np.asarray(parameter)
    for name, values in expect.items():
        if len(values) != len(x):
            raise InvalidInputError(
                f"{name} must have one value for each parameter", got=len(values), expected=len(x)
            )
    axes = as_axes(axes, (6, 4))
    lines = {} if exact is None else _drawn(exact)
    found = [(part, values, name) for name in expect for part, values in _parts(name, expect[name])]
    for i, (part, values, name) in enumerate(found):
        if part in lines:
            axes.plot(x, lines[part], color=f"C{i}", lw=1)
        bars = None if errors is None or name not in errors else errors[name]
        axes.errorbar(x, values, bars, ls="none", marker="o", ms=4, color=f"C{i}", label=part, capsize=2)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("expectation in the steady state")
    add_legend(axes)
    return axes.figure


def _parts(name: str, values: Any) -> list[tuple[str, Tensor]]:
    """Return the means of an observable as what can be drawn: themselves, or real and imaginary part of complex ones."""
    own = values if isinstance(values, Tensor) else torch.as_tensor(np.array(values))
    return [(f"Re {name}", own.real), (f"Im {name}", own.imag)] if own.is_complex() else [(name, own)]


def _drawn(expect: Mapping[str, Any]) -> dict[str, Tensor]:
    return dict(part for name, values in expect.items() for part in _parts(name, values))
