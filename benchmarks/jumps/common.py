"""What the benchmarks of jump processes share: data as panels, a clock, and the exact answers they are held against."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from stochdyn.jumps import PanelData

sys.path.insert(0, str(Path(__file__).parents[1]))
from _common import best_time, machine, write_table

__all__ = ["best_time", "machine", "panel_of", "write_table"]


def panel_of(states: np.ndarray, dt: float, num_states: int) -> PanelData:
    """Return a panel of series ``(K, L)`` of states seen at intervals of ``dt``."""
    series, length = states.shape
    frame = {
        "series": np.repeat(np.arange(series), length),
        "time": np.tile(np.arange(length) * dt, series),
        "state": states.reshape(-1),
    }
    return PanelData(frame, "series", "time", "state", labels=range(num_states))
