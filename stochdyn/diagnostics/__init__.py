"""ArviZ containers, importance weights, calibration, metrics and plots, each loaded on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stochdyn.diagnostics.calibration import CoverageTable, SBCResult, sbc
    from stochdyn.diagnostics.calibration_plots import plot_coverage, plot_khat, plot_rank_ecdf
    from stochdyn.diagnostics.container import from_draws
    from stochdyn.diagnostics.draws import PosteriorDraws, draw_posterior, evaluate_draws
    from stochdyn.diagnostics.inference_data import to_inference_data
    from stochdyn.diagnostics.metrics import (
        crps,
        emd,
        energy_distance,
        interval_coverage,
        mmd,
        negative_log_predictive_density,
        psnr,
        rmse,
    )
    from stochdyn.diagnostics.plots import plot_density, plot_paths, plot_training
    from stochdyn.diagnostics.psis import (
        ImportanceEvidence,
        ParetoSmoothed,
        effective_sample_size,
        importance_evidence,
        importance_mean,
        khat,
        pareto_smooth,
    )
    from stochdyn.diagnostics.samplers import MCMCSampler, PosteriorSampler, VariationalSampler
    from stochdyn.diagnostics.uniformity import EcdfBand, UniformityTest, ecdf_band, rank_uniformity

_HOMES = {
    "CoverageTable": "calibration",
    "EcdfBand": "uniformity",
    "ImportanceEvidence": "psis",
    "MCMCSampler": "samplers",
    "ParetoSmoothed": "psis",
    "PosteriorDraws": "draws",
    "PosteriorSampler": "samplers",
    "SBCResult": "calibration",
    "UniformityTest": "uniformity",
    "VariationalSampler": "samplers",
    "crps": "metrics",
    "draw_posterior": "draws",
    "ecdf_band": "uniformity",
    "effective_sample_size": "psis",
    "emd": "metrics",
    "energy_distance": "metrics",
    "evaluate_draws": "draws",
    "from_draws": "container",
    "importance_evidence": "psis",
    "importance_mean": "psis",
    "interval_coverage": "metrics",
    "khat": "psis",
    "mmd": "metrics",
    "negative_log_predictive_density": "metrics",
    "pareto_smooth": "psis",
    "plot_coverage": "calibration_plots",
    "plot_density": "plots",
    "plot_khat": "calibration_plots",
    "plot_paths": "plots",
    "plot_rank_ecdf": "calibration_plots",
    "plot_training": "plots",
    "psnr": "metrics",
    "rank_uniformity": "uniformity",
    "rmse": "metrics",
    "sbc": "calibration",
    "to_inference_data": "inference_data",
}

__all__ = [
    "CoverageTable",
    "EcdfBand",
    "ImportanceEvidence",
    "MCMCSampler",
    "ParetoSmoothed",
    "PosteriorDraws",
    "PosteriorSampler",
    "SBCResult",
    "UniformityTest",
    "VariationalSampler",
    "crps",
    "draw_posterior",
    "ecdf_band",
    "effective_sample_size",
    "emd",
    "energy_distance",
    "evaluate_draws",
    "from_draws",
    "importance_evidence",
    "importance_mean",
    "interval_coverage",
    "khat",
    "mmd",
    "negative_log_predictive_density",
    "pareto_smooth",
    "plot_coverage",
    "plot_density",
    "plot_khat",
    "plot_paths",
    "plot_rank_ecdf",
    "plot_training",
    "psnr",
    "rank_uniformity",
    "rmse",
    "sbc",
    "to_inference_data",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"stochdyn.diagnostics.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'stochdyn.diagnostics' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
