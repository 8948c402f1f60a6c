"""Variational inference of the Hurst index of a series, with its exact likelihood."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pyro
from torch import Tensor

from stochdyn._checks import check_positive_int
from stochdyn.diagnostics.container import from_draws
from stochdyn.diagnostics.draws import draw_posterior, seeded
from stochdyn.diagnostics.psis import pareto_smooth
from stochdyn.errors import ConvergenceWarning
from stochdyn.fractional.exact.fgn import FractionalGaussianNoise
from stochdyn.fractional.exact.likelihood import HurstLikelihood, maximise
from stochdyn.fractional.hurst.guide import HurstGuide, hurst_model
from stochdyn.infer.fitting import fit_guide

__all__ = ["infer_hurst"]

_PARTICLES = 32
_MIN_DRAWS_FOR_KHAT = 100


def infer_hurst(
    series: Tensor,
    step: float = 1.0,
    steps: int = 2000,
    num_draws: int = 1000,
    seed: int | None = 0,
    *,
    predictive: bool = True,
    progress: bool = False,
) -> Any:
    r"""Return the variational posterior of Hurst index, mean and scale of a series of stationary increments.

    The series is modelled as fractional Gaussian noise (:func:`hurst_model`) with its exact likelihood, and
    the posterior approximated by a structured guide (:class:`HurstGuide`), fitted by stochastic variational
    inference from the maximum-likelihood point on. The draws carry importance weights, so the approximation
    is checked each time: attribute ``khat`` says how far it can be trusted.

    Args:
        series: ``(n,)`` stationary increments (for a path, take its differences first).
        step: time between the ends of an increment; ``scale`` is per unit time, ``mean`` per increment.
        steps: of stochastic optimisation.
        num_draws: draws of the posterior.
        seed: of optimisation and draws; the global random state is left alone. None draws from that instead.
        predictive: whether to draw replicated series too.
        progress: show a progress bar.

    Returns:
        ArviZ container (``InferenceData`` or ``DataTree``): ``posterior`` (``hurst``, ``mean``, ``scale``),
        ``posterior_predictive`` and ``observed_data`` (``series``), ``log_likelihood`` (``series``: each
        value given those before it), ``sample_stats`` (``lp``, ``log_q``, ``log_weight``); attributes
        ``khat``, the maximum-likelihood fit (``mle_hurst``, ...), ``estimator``, ``seed``.

    Raises:
        EmptyDataError, TooFewDrawsError, NonFiniteError, ShapeError, InvalidInputError: for a series that is
            empty, shorter than 8 values, not finite, of more than one axis, or constant.

    Warns:
        ConvergenceWarning: if k-hat exceeds 0.7.

    Example:
        >>> import torch
        >>> from stochdyn.fractional import sample_fgn
        >>> y = sample_fgn(0.7, 200, generator=torch.Generator().manual_seed(0))
        >>> idata = infer_hurst(y, steps=200, num_draws=200)
        >>> bool(abs(idata.posterior["hurst"].mean() - 0.7) < 0.15)
        True
    """
    check_positive_int(steps, "steps")
    check_positive_int(num_draws, "num_draws")
    table = HurstLikelihood(series, step)
    best = maximise(table)
    with seeded(seed), pyro.get_param_store().scope():
        guide = HurstGuide(table, best)
        with pyro.validation_enabled(False):  # the arguments are ours, and the checks a third of the time
            fit_guide(
                hurst_model,
                guide,
                (table,),
                steps=steps,
                lr=0.02,
                num_particles=_PARTICLES,
                seed=None,
                progress=progress,
            )
        draws = draw_posterior(hurst_model, guide, (table,), num_draws=num_draws, seed=None)
        values = {name: draws.values[name].reshape(num_draws).double() for name in ("hurst", "mean", "scale")}
        replicated = {}
        if predictive:
            law = FractionalGaussianNoise(
                values["hurst"], values["mean"], values["scale"], len(table.series), table.step
            )
            replicated = {"series": law.sample()[None].numpy()}
    weights = draws.log_weights
    khat = float(pareto_smooth(weights).khat) if num_draws >= _MIN_DRAWS_FOR_KHAT else math.nan
    if khat > 0.7:
        warnings.warn(
            f"the variational approximation of the posterior is poor (k-hat {khat:.2f}); "
            "weight the draws by sample_stats.log_weight, or run more steps",
            ConvergenceWarning,
            stacklevel=2,
        )
    assert draws.log_guide is not None
    stats = {"lp": draws.log_joint, "log_q": draws.log_guide, "log_weight": weights}
    attrs: dict[str, str | int | float] = {
        "estimator": "density",
        "khat": khat,
        "mle_hurst": best.hurst,
        "mle_stderr": best.stderr,
        "mle_mean": best.mean,
        "mle_scale": best.scale,
        "mle_log_likelihood": best.log_likelihood,
    }
    if seed is not None:
        attrs["seed"] = seed
    return from_draws(
        {name: value[None].numpy() for name, value in values.items()},
        posterior_predictive=replicated,
        log_likelihood={"series": table.pointwise(**values)[None].numpy()},
        observed_data={"series": table.series.numpy()},
        constant_data={"step": table.step},
        sample_stats={name: value[None].numpy() for name, value in stats.items()},
        dims={"series": ["time"]},
        attrs=attrs,
    )
