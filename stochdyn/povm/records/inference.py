"""Inference of a Lindbladian's parameters from measurement records, by variational inference or NUTS."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoGuide, init_to_median
from pyro.nn import PyroModule
from torch import Tensor

from stochdyn._checks import check_choice, check_nonempty, check_positive_int
from stochdyn.diagnostics.draws import seeded
from stochdyn.diagnostics.inference_data import to_inference_data
from stochdyn.diagnostics.psis import pareto_smooth
from stochdyn.errors import ConvergenceWarning, ShapeError
from stochdyn.infer.fitting import fit_guide
from stochdyn.infer.skewed import AutoSkewedNormal
from stochdyn.povm.frames.frame import Frame
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.master.propagator import Propagator
from stochdyn.povm.records.measurement import MeasurementRecords, RecordLaw, check_priors

if TYPE_CHECKING:
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["RecordModel", "infer_parameters"]

_PARTICLES = 32
_MIN_DRAWS_FOR_KHAT = 100


class RecordModel(PyroModule):
    r"""The Pyro model of measurement records of a small lattice with unknown parameters.

    .. math:: \theta\sim\text{priors},\qquad a_r\sim p_\theta(t_r)\ \text{independently}

    A latent site for each parameter, and the observed site ``outcomes`` in a plate ``record``. Works with guides,
    ``SVI``, ``NUTS``, ``Predictive`` and :func:`stochdyn.to_inference_data`, also with vectorised particles.

    Args:
        model: with named parameters, constant in time.
        povm: the frame of all sites, or one a site.
        state: at time 0, as for :func:`~stochdyn.povm.exact.evolve`.
        times: of the measurements.
        priors: Pyro distributions by name of parameter, such as ``{"g": LogNormal(0.0, 1.0)}``.

    Raises:
        InvalidInputError: if priors and parameters don't match.
        SystemSizeError: if there are over 1024 outcomes (five qubits).

    Example:
        >>> import pyro.distributions as dist
        >>> from stochdyn.povm import Lindbladian, Tetrahedral, simulate_records
        >>> model = Lindbladian(1, [("g", "X", 0)], [(1.0, "sigma-", 0)])
        >>> records = simulate_records(model.bind(g=0.5), Tetrahedral(), "up", [0.5, 1.0], 10)
        >>> program = RecordModel(model, Tetrahedral(), "up", records.times, {"g": dist.LogNormal(0.0, 1.0)})
        >>> program(records).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        model: Lindbladian,
        povm: Frame | SiteFrames,
        state: Any,
        times: Tensor,
        priors: Mapping[str, Any],
    ) -> None:
        super().__init__()
        check_priors(model, priors)
        self.propagator = Propagator(model, povm, state, times)
        self.priors = {name: priors[name] for name in self.propagator.names}

    def forward(self, records: MeasurementRecords) -> Tensor:
        """Run the model and return the probabilities ``(*batch, T, K**N)``."""
        law = self.propagator
        values = {name: pyro.sample(name, prior) for name, prior in self.priors.items()}
        p = law(**values)
        with pyro.plate("record", len(records), dim=-1):
            pyro.sample(
                "outcomes",
                RecordLaw(p, records.time_index, law.num_sites, law.num_outcomes),
                obs=records.outcomes,
            )
        return p


def infer_parameters(
    records: MeasurementRecords,
    model: Lindbladian,
    povm: Frame | SiteFrames,
    state: Any,
    priors: Mapping[str, Any],
    *,
    method: str = "svi",
    steps: int = 400,
    num_draws: int = 1000,
    warmup: int = 300,
    num_chains: int = 1,
    guide: AutoGuide | None = None,
    seed: int | None = 0,
    predictive: bool = False,
    progress: bool = False,
) -> Any:
    """Return the posterior of Hamiltonian and decay parameters given measurement records.

    Args:
        records: what was measured.
        model: a small lattice with named parameters, constant in time.
        povm: the frame that was measured with.
        state: at time 0, as for :func:`~stochdyn.povm.exact.evolve`.
        priors: Pyro distributions by name of parameter; rates need positive ones.
        method: ``"svi"``, with a correlated and skewed guide on the unconstrained scale, or ``"nuts"``.
        steps: of stochastic optimisation, ``"svi"``.
        num_draws: of the posterior; with ``"nuts"``, of each chain.
        warmup: of each chain, ``"nuts"``.
        num_chains: ``"nuts"``; Pyro runs them in processes of their own where there are cores.
        guide: ``"svi"``, in place of :class:`stochdyn.infer.skewed.AutoSkewedNormal`, of a :class:`RecordModel`.
        seed: of fit and draws; the global random state is left alone. None draws from that instead.
        predictive: draw replicated records too.
        progress: show a progress bar.

    Returns:
        ArviZ container (see :func:`stochdyn.to_inference_data`); with ``"svi"`` its attribute ``khat`` says how far the
        approximation can be trusted.

    Raises:
        InvalidInputError: if priors and parameters don't match.
        ShapeError: if the records are of another lattice.
        SystemSizeError: if there are over 1024 outcomes (five qubits).

    Warns:
        ConvergenceWarning: if k-hat exceeds 0.7.

    Example:
        >>> import pyro.distributions as dist
        >>> from stochdyn.povm import Lindbladian, Tetrahedral, simulate_records
        >>> model = Lindbladian(1, [(0.5, "X", 0)], [("decay", "sigma-", 0)])
        >>> generator = torch.Generator().manual_seed(0)
        >>> data = simulate_records(model.bind(decay=1.0), Tetrahedral(), "up", [0.5], 2000, generator=generator)
        >>> prior = {"decay": dist.LogNormal(0.0, 1.0)}
        >>> idata = infer_parameters(data, model, Tetrahedral(), "up", prior, steps=300, num_draws=200)
        >>> bool(abs(idata.posterior["decay"].mean() - 1) < 0.3)
        True
    """
    check_choice(method, ("svi", "nuts"), "method")
    for value, name in (
        (steps, "steps"),
        (num_draws, "num_draws"),
        (warmup, "warmup"),
        (num_chains, "num_chains"),
    ):
        check_positive_int(value, name)
    check_nonempty(records.outcomes, "records")
    if (records.num_sites, records.num_outcomes) != (model.num_sites, povm.num_outcomes):
        raise ShapeError(
            "the records are of another lattice or frame",
            got=f"{records.num_sites} sites with {records.num_outcomes} outcomes",
            expected=f"{model.num_sites} sites with {povm.num_outcomes} outcomes",
        )
    program = RecordModel(model, povm, state, records.times, priors)
    with seeded(seed), pyro.get_param_store().scope():
        if method == "nuts":
            chains = MCMC(
                NUTS(program, init_strategy=init_to_median(num_samples=50)),
                num_samples=num_draws,
                warmup_steps=warmup,
                num_chains=num_chains,
                disable_progbar=not progress,
            )
            chains.run(records)
            return to_inference_data(program, chains, (records,), seed=seed, predictive=predictive)
        if guide is None:
            guide = AutoSkewedNormal(program, init_to_median(num_samples=50)).start_at_mode(records)
        fit_guide(
            program,
            guide,
            (records,),
            steps=steps,
            lr=0.005,
            num_particles=_PARTICLES,
            seed=None,
            progress=progress,
        )
        idata = to_inference_data(
            program, guide, (records,), num_draws=num_draws, seed=seed, predictive=predictive
        )
    weights = torch.as_tensor(idata.sample_stats["log_weight"].values).flatten()
    khat = float(pareto_smooth(weights).khat) if num_draws >= _MIN_DRAWS_FOR_KHAT else math.nan
    idata.attrs["khat"] = khat
    if khat > 0.7:
        warnings.warn(
            f"the variational approximation of the posterior is poor (k-hat {khat:.2f}); "
            "weight the draws by sample_stats.log_weight, run more steps, or use method='nuts'",
            ConvergenceWarning,
            stacklevel=2,
        )
    return idata
