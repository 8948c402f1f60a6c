"""Open quantum systems as probabilities over the outcomes of local measurements."""

from __future__ import annotations

from stochdyn.povm import exact, mean_field, systems, trajectories
from stochdyn.povm.ansatz import Ansatz
from stochdyn.povm.autoregressive import AutoregressiveAnsatz
from stochdyn.povm.evolution import Evolution, EvolutionInterrupted
from stochdyn.povm.evolve import evolve
from stochdyn.povm.frames import FourPauli, Frame, QutritSIC, Tetrahedral
from stochdyn.povm.graphs import all_to_all, chain, ring, square_lattice
from stochdyn.povm.gru import AutoregressiveGRU
from stochdyn.povm.inference import RecordModel, infer_parameters
from stochdyn.povm.interactions import AutoregressiveInteractions
from stochdyn.povm.lindblad import Lindbladian
from stochdyn.povm.observables import Observable, observable, observables
from stochdyn.povm.operators import named_operator, spin_matrices
from stochdyn.povm.physicality import (
    Positivity,
    classical_fidelity,
    positivity,
    purity,
    reduced_density,
    total_variation,
    trace_distance,
)
from stochdyn.povm.plots import plot_evolution, plot_phase_diagram
from stochdyn.povm.propagator import Propagator
from stochdyn.povm.records import MeasurementRecords, RecordLaw, simulate_records
from stochdyn.povm.site_frames import SiteFrames
from stochdyn.povm.steady import SteadyState, steady_state
from stochdyn.povm.strings import Strings
from stochdyn.povm.table import FullTable
from stochdyn.povm.transformer import AutoregressiveTransformer
from stochdyn.povm.window import AutoregressiveWindow

__all__ = [
    "Ansatz",
    "AutoregressiveAnsatz",
    "AutoregressiveGRU",
    "AutoregressiveInteractions",
    "AutoregressiveTransformer",
    "AutoregressiveWindow",
    "Evolution",
    "EvolutionInterrupted",
    "FourPauli",
    "Frame",
    "FullTable",
    "Lindbladian",
    "MeasurementRecords",
    "Observable",
    "Positivity",
    "Propagator",
    "QutritSIC",
    "RecordLaw",
    "RecordModel",
    "SiteFrames",
    "SteadyState",
    "Strings",
    "Tetrahedral",
    "all_to_all",
    "chain",
    "classical_fidelity",
    "evolve",
    "exact",
    "infer_parameters",
    "mean_field",
    "named_operator",
    "observable",
    "observables",
    "plot_evolution",
    "plot_phase_diagram",
    "positivity",
    "purity",
    "reduced_density",
    "ring",
    "simulate_records",
    "spin_matrices",
    "square_lattice",
    "steady_state",
    "systems",
    "total_variation",
    "trace_distance",
    "trajectories",
]
