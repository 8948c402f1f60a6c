"""Sphinx extension: the chart of the page "Which one do I want?", drawn whenever the documentation is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

#: What one has, with what one then asks, and what to take for each answer.
CHART = [
    (
        "the same thing,\nseen over time",
        [
            ("an equation you can write", "sample_path, fit_posterior"),
            ("a linear one", "LinearGaussianMeasure, LinearObservations"),
            ("nobody knows the equation", "fractional.LatentSDE"),
            ("is there long memory?", "fractional.infer_hurst, infer_roughness"),
            ("states that switch", "jumps.fit_rates, HiddenJumps"),
            ("counts of molecules, cells, cases", "jumps.ReactionNetwork"),
            ("how far from equilibrium?", "nonequilibrium.short_time_entropy"),
        ],
    ),
    (
        "strangers,\nat a few times",
        [
            ("where they were between", "bridges.SchrodingerBridge"),
            ("what moved them", "bridges.refine"),
            ("they divide and die", "bridges.GrowingBridge"),
            ("many samples, each a population", "interpolants.PopulationRegression"),
        ],
    ),
    (
        "samples\nof one law",
        [
            ("more of them, densities, conditions", "interpolants.InterpolantRegression"),
            ("a score, its equation kept", "interpolants.ScoreMatching"),
        ],
    ),
    ("arrows at\npoints of a surface", [("the field everywhere, with bands", "vectorfields.RVGP")]),
    (
        "a Hamiltonian\nwith losses",
        [
            ("up to about eight spins", "povm.exact"),
            ("more, or a steady state", "povm.evolve, steady_state"),
            ("records of measurements", "povm.infer_parameters"),
        ],
    ),
]


def setup(app: Any) -> dict[str, bool]:
    """Register with Sphinx."""
    app.connect(
        "builder-inited", lambda app: draw(Path(app.srcdir) / "reference" / "generated" / "choosing.png")
    )
    return {"parallel_read_safe": True}


def draw(path: Path) -> None:
    """Draw the chart from left to right: what one has, what one asks, what to take."""
    rows = sum(len(answers) for _, answers in CHART)
    figure, ax = plt.subplots(figsize=(9.0, 0.36 * rows))
    y = 0.0
    for have, answers in CHART:
        centre = y - (len(answers) - 1) / 2
        _box(ax, 0.0, centre, have, "#0072B2", "white")
        for asks, take in answers:
            ax.plot([0.15, 0.22], [centre, y], color="0.6", linewidth=0.8)
            ax.text(0.23, y, asks, va="center", fontsize=8.5)
            ax.plot([0.485, 0.515], [y, y], color="0.6", linewidth=0.8)
            _box(ax, 0.53, y, take, "white", "black")
            y -= 1.0
    ax.set_xlim(0, 1)
    ax.set_ylim(-rows + 0.4, 0.6)
    ax.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    plt.close(figure)


def _box(ax: Any, x: float, y: float, text: str, face: str, ink: str) -> None:
    ax.text(
        x,
        y,
        text,
        va="center",
        fontsize=8.5,
        color=ink,
        bbox={"boxstyle": "round", "fc": face, "ec": "#0072B2"},
    )
