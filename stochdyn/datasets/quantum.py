"""Exact observables of open quantum spin systems, for testing approximate methods."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import check_choice, check_positive_int, check_real

__all__ = ["OpenSystem", "open_systems"]


@dataclass(frozen=True)
class OpenSystem:
    """Exact means of observables of one system.

    Attributes:
        system: The name of the system: ``"ising_ring"``, ``"xyz_ring"``, ``"xyz_torus"``, ``"dephasing_ring"``,
            ``"commuting_ring"`` or ``"free_sites"``; :func:`stochdyn.povm.systems.build` makes the Lindbladian.
        num_sites: The number of sites, or None where the numbers hold for any (from four on).
        parameters: The parameters of the system by name.
        initial: The product state at the first time, ``"up"``, ``"x+"``, ...; None for a steady state.
        times: The times of data, ``(T,)``; None for a steady state.
        expect: Means ``(T,)`` by name, or ``()`` for a steady state: ``X Y Z``, means over sites; ``XX YY ZZ``, means
            over bonds; ``purity``; ``Sxx_k0``, the mean of XX over all pairs.
        accuracy: The amount by which the numbers may be off.
    """

    system: str
    num_sites: int | None
    parameters: dict[str, float]
    initial: str | None
    times: Tensor | None
    expect: dict[str, Tensor]
    accuracy: float


def open_systems(
    kind: str = "dynamics",
    *,
    system: str | None = None,
    num_sites: int | None = None,
    initial: str | None = None,
    **parameters: float,
) -> list[OpenSystem]:
    r"""Return exact observables of small open quantum systems.

    Spin-½ lattices with :math:`\dot\rho=-i[H,\rho]+\sum_k\gamma_k(c_k\rho c_k^\dagger-\tfrac12\{c_k^\dagger
    c_k,\rho\})`, Pauli matrices (not spins), ``up`` the first basis state. Computed with QuTiP and independently by
    integration of the density matrix and of outcome probabilities.

    Args:
        kind: The kind: ``"dynamics"`` or ``"steady"``.
        system: The name of the only system that is kept.
        num_sites: The only size that is kept; systems that hold for any size are kept.
        initial: The only initial state that is kept.
        parameters: The only values that are kept, such as ``field=1.0``.

    Returns:
        What is on file and fits, possibly nothing.

    Raises:
        InvalidInputError: If ``kind`` is unknown.

    Example:
        >>> from stochdyn.datasets import open_systems
        >>> run = open_systems(system="ising_ring", num_sites=6)[0]
        >>> float(run.expect["Z"][run.times.tolist().index(1.0)].round(decimals=6))
        -0.357637

    Reference:
        The commuting ring in the spirit of Foss-Feig et al., "Nonequilibrium dynamics of arbitrary-range Ising models
        with decoherence", Phys. Rev. A 87, 042101 (2013): its observables don't depend on the number of sites.
    """
    check_choice(kind, ("dynamics", "steady"), "kind")
    if num_sites is not None:
        check_positive_int(num_sites, "num_sites")
    for name, value in parameters.items():
        check_real(value, name)
    found = []
    for row in _load()[kind]:
        fits = (
            system in (None, row["system"])
            and (num_sites is None or row["num_sites"] in (None, num_sites))
            and initial in (None, row.get("initial"))
            and all(row["parameters"].get(name) == value for name, value in parameters.items())
        )
        if fits:
            found.append(_record(row))
    return found


@cache
def _load() -> dict[str, Any]:
    text = files("stochdyn.datasets").joinpath("open_systems.json").read_text(encoding="utf-8")
    data: dict[str, Any] = json.loads(text)
    return data


def _record(row: dict[str, Any]) -> OpenSystem:
    expect = {name: torch.tensor(value, dtype=torch.float64) for name, value in row["expect"].items()}
    times = torch.tensor(row["times"], dtype=torch.float64) if "times" in row else None
    return OpenSystem(
        row["system"],
        row["num_sites"],
        dict(row["parameters"]),
        row.get("initial"),
        times,
        expect,
        row["accuracy"],
    )
