"""Training: one loop for every objective, with checkpoints that resume to the same bits."""

from __future__ import annotations

from stochdyn.training.callbacks import Callback, EarlyStopping, Every, KeepBest
from stochdyn.training.interrupt import FitInterrupted
from stochdyn.training.result import FitResult
from stochdyn.training.state import FitState
from stochdyn.training.trainer import fit
from stochdyn.training.weights import load_weights, save_weights

__all__ = [
    "Callback",
    "EarlyStopping",
    "Every",
    "FitInterrupted",
    "FitResult",
    "FitState",
    "KeepBest",
    "fit",
    "load_weights",
    "save_weights",
]
