"""Hyper-parameters of an engine as a flat dictionary of tensors, to be stored and set again."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields.regression.engines import Engine

__all__ = ["hyper_parameters", "set_hyper_parameters"]


def hyper_parameters(engine: Engine) -> dict[str, Tensor]:
    """Return copies of all parameters of an engine by name: amplitude, noise and those of the kernel."""
    return {name: value.detach().clone() for name, value in engine.named_parameters()}


def set_hyper_parameters(engine: Engine, values: Mapping[str, Tensor]) -> None:
    """Set all parameters of an engine to what :func:`hyper_parameters` returned of another one.

    Raises:
        InvalidInputError: If the names or shapes are those of another kernel.
    """
    own = dict(engine.named_parameters())
    if set(own) != set(values) or any(own[k].shape != values[k].shape for k in own):
        raise InvalidInputError(
            "the hyper-parameters belong to another kernel or backend",
            got=", ".join(sorted(values)),
            expected=", ".join(sorted(own)),
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(values[name])
