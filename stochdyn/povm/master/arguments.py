"""Checks of the arguments that the entrances of this package share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, as_time_grid, check_type
from stochdyn.errors import FrameError
from stochdyn.povm.frames.frame import Frame, Measurement
from stochdyn.povm.frames.lattice_observables import Observable, observables
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["as_breaks", "as_times", "check_frame", "check_measurement", "check_model", "read_observables"]


def check_model(model: object) -> None:
    """Raise unless ``model`` is a Lindbladian."""
    check_type(model, Lindbladian, "model", hint="stochdyn.povm.Lindbladian(num_sites, hamiltonian, jumps)")


def check_frame(povm: object) -> None:
    """Raise unless ``povm`` is a frame, or one for each site."""
    check_type(povm, (Frame, SiteFrames), "povm", hint="such as stochdyn.povm.Tetrahedral()")
    if isinstance(povm, SiteFrames) and not all(isinstance(frame, Frame) for frame in povm.frames):
        raise FrameError("the measurement of each site must be informationally complete", got=repr(povm)[:80])


def check_measurement(povm: object) -> None:
    """Raise unless ``povm`` is a measurement of a site, complete or not, or one for each site."""
    check_type(povm, (Measurement, SiteFrames), "povm", hint="such as stochdyn.povm.Tetrahedral()")


def read_observables(model: Lindbladian, specs: Mapping[str, Any] | Sequence[Any]) -> dict[str, Observable]:
    """Return observables by name, those on two sites averaged over the bonds of the model."""
    return observables(specs, model.num_sites, dim=model.dim, bonds=model.bonds)


def as_breaks(breaks: object) -> list[float]:
    """Return times where coefficients aren't smooth as numbers."""
    return as_tensor(breaks, "breaks", 1, "(n,)", like=torch.empty(0, dtype=torch.float64)).tolist()


def as_times(ts: object, name: str = "ts", min_points: int = 1) -> Tensor:
    """Return increasing times of any kind as a float64 tensor ``(T,)`` on the CPU.

    Raises:
        TimeGridError: If they aren't times, or don't increase.
    """
    like = torch.empty(0, dtype=torch.float64)
    return as_time_grid(ts, name, min_points, like).detach().double().cpu()
