"""What a variational state says about its own quality, and the warnings that follow."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from stochdyn.errors import ConvergenceWarning
from stochdyn.povm.ansatz.base import Ansatz
from stochdyn.povm.dynamics.evolution import Evolution
from stochdyn.povm.master.physicality import Positivity, positivity

__all__ = ["look_at_state", "warn_of_state", "warn_of_steps"]

_MOST_PLACES = 64
_NEGATIVE, _ERRORS = -0.02, 5.0
_CLIPPED = 0.01
_POSITIVITY_SEED = 0x9051


def look_at_state(
    net: Ansatz, povm: Any, places: Sequence[tuple[int, ...]], num_samples: int | None, seed: int
) -> Positivity:
    """Return the lowest eigenvalues of density matrices on some sites.

    Args:
        net: The variational state.
        povm: The frame of all sites, or one for each site.
        places: The sites of each matrix; evenly chosen ones if there are over 64.
        num_samples: The number of draws; None sums over all outcomes.
        seed: The seed of the draws.
    """
    stride = max(1, len(places) // _MOST_PLACES)
    generator = torch.Generator(device=net.device).manual_seed((seed + _POSITIVITY_SEED) % 2**62)
    with torch.no_grad():
        if num_samples is None:
            outcomes = net.probabilities().double()
        else:
            outcomes, _ = net.sample(num_samples, generator=generator, stratified=True)
        return positivity(povm, outcomes, list(places)[::stride], bootstrap=20, generator=generator)


def warn_of_state(found: Positivity | None, stacklevel: int = 3) -> None:
    """Warn if the state is certainly no quantum state.

    Warns:
        ConvergenceWarning: If a density matrix of few sites has an eigenvalue below zero by five standard errors.
    """
    if found is None:
        return
    sites, lowest, error = found.worst
    if lowest < min(_NEGATIVE, -_ERRORS * error):
        warnings.warn(
            f"the state is unphysical: the density matrix of sites {sites} has an eigenvalue of {lowest:.2g} "
            f"± {error:.1g}; take shorter steps, more samples, or an ansatz that sees more",
            ConvergenceWarning,
            stacklevel=stacklevel,
        )


def warn_of_steps(run: Evolution, stacklevel: int = 3) -> None:
    """Warn if steps of an evolution weren't what was asked of them.

    Warns:
        ConvergenceWarning: If the mean residual of the steps before the last time is one or more, if a step missed its
            tolerance however short it was, or if targets of a fit had negative probabilities that weigh.
    """
    if len(run.times) < 2 or "residual" not in run.steps:
        return
    missed = int((run.steps.get("missed", torch.zeros(1)) > 0).sum())
    if missed:
        warnings.warn(
            f"{missed} steps missed their tolerance, however short they were tried; take more samples, a larger rcond, "
            "or a larger tolerance",
            ConvergenceWarning,
            stacklevel=stacklevel,
        )
    clipped = float(run.steps.get("clipped", torch.zeros(1)).max())
    if clipped > _CLIPPED:
        warnings.warn(
            f"outcomes that weigh {clipped:.2g} had negative probabilities in a target, which count as zero; take a shorter dt",
            ConvergenceWarning,
            stacklevel=stacklevel,
        )
    values = run.steps.get("left_out", run.steps["residual"])
    late = values[run.steps["t"] > run.times[-2]]
    if len(late) and float(late.mean()) >= 1:
        warnings.warn(
            f"the ansatz doesn't follow the change of the state: the residual of the last steps is "
            f"{float(late.mean()):.2g} on draws left out of them; take more samples, or another ansatz",
            ConvergenceWarning,
            stacklevel=stacklevel,
        )
