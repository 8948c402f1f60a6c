"""Draws of a fitted field in the container that ArviZ reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from stochdyn.diagnostics.container import from_draws
from stochdyn.vectorfields.regression.process import FieldProcess

__all__ = ["as_inference_data"]


def as_inference_data(process: FieldProcess, drawn: Tensor, axes: Sequence[str]) -> Any:
    """Return draws as one chain of a variable ``field``.

    Args:
        process: The fitted process.
        drawn: The draws ``(num_draws, *batch, *shape)``.
        axes: The names of the axes of ``shape``.
    """
    batch = [f"field_{i}" for i in range(drawn.ndim - 1 - len(axes))]
    coords: dict[str, Any] = {}
    if process.labels is not None:
        batch, coords = ["condition"], {"condition": np.asarray(process.labels)}
    return from_draws(
        {"field": drawn.detach().cpu().numpy()[None]},
        coords=coords,
        dims={"field": [*batch, *axes]},
        attrs={
            "kernel": process.chosen,
            "amplitude": process.amplitude,
            "noise_variance": process.noise_variance,
            "log_marginal_likelihood": float(process.log_marginal_likelihood()),
        },
    )
