"""Read the tables that come with the package."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from importlib.resources import files

__all__ = ["read_columns"]


def read_columns(name: str, columns: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Return columns of ``NAME.csv`` beside this file, all by default, NaN where a cell is empty."""
    text = files("stochdyn.datasets").joinpath(f"{name}.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(line for line in text.splitlines() if line and not line.startswith("#")))
    return {column: [float(row[column] or math.nan) for row in rows] for column in columns or rows[0]}
