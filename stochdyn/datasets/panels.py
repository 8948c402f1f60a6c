"""Two simulated analyses with reference posteriors: subjects that relax at rates of their own, and counted predators and prey."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, NamedTuple

from stochdyn.datasets._csv import read_columns

__all__ = ["SimulatedPanel", "ou_subjects", "predator_prey_counts"]


class SimulatedPanel(NamedTuple):
    """A table, the exact posterior of its model, and what it was simulated with.

    Attributes:
        frame: The columns of the table by name, NaN where a value is missing.
        reference: The mean and the standard deviation of the exact posterior, by parameter.
        truth: The values that the table was simulated with, by parameter.
    """

    frame: dict[str, list[float]]
    reference: dict[str, dict[str, Any]]
    truth: dict[str, Any]


def ou_subjects() -> SimulatedPanel:
    r"""Return 8 subjects, each seen at 12 times of its own in [0, 5], with columns ``subject``, ``time`` and ``y``.

    .. math::
        dx=r_i(1-x)\,dt+\sigma\,dW,\quad x(0)=2,\quad y\sim N(x, 0.15^2),\quad r_i=e^{\mu+\tau z_i},\ z_i\sim N(0,1),

    with :math:`\mu\sim N(0,1)`, :math:`\tau` half-normal of scale 0.5 and :math:`\log\sigma\sim N(-0.5,0.5^2)`.

    Returns:
        The table, the posterior by 64 Metropolis chains on the exact likelihood, and the truth.

    Example:
        >>> data = ou_subjects()
        >>> len(data.frame["y"]), sorted(data.reference)
        (96, ['mu', 'rate', 'sigma', 'tau'])
    """
    return _read("ou_subjects")


def predator_prey_counts() -> SimulatedPanel:
    r"""Return 20 counts of prey and predators, with columns ``time``, ``prey`` and ``predators``.

    The model is in logarithms from (log 4, log 2), in Euler steps of 0.25, with counts at times 1 to 20,

    .. math::
        du=(a-0.4e^v-\tfrac12s^2)\,dt+s\,dW_1,\quad dv=(-0.4+0.1e^u-\tfrac12s^2)\,dt+s\,dW_2,\quad
        y\sim\mathrm{Poisson}(5e^{u}),\ \mathrm{Poisson}(5e^{v}),

    with :math:`\log a\sim N(0,0.5^2)` and :math:`\log s\sim N(-1.5,0.5^2)`.

    Returns:
        The table, the posterior by 24 particle-marginal Metropolis-Hastings chains, and the truth.

    Example:
        >>> predator_prey_counts().frame["prey"][:3]
        [17.0, 16.0, 20.0]
    """
    return _read("predator_prey_counts")


def _read(name: str) -> SimulatedPanel:
    folder = files("stochdyn.datasets")
    known = json.loads(folder.joinpath(f"{name}.json").read_text(encoding="utf-8"))
    return SimulatedPanel(read_columns(name), known["reference"], known["truth"])
