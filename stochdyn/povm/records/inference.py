"""Inference of a Lindbladian's parameters from measurement records, by variational inference or NUTS."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import pyro
import torch
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoGuide, init_to_median, init_to_value
from pyro.infer.mcmc.util import initialize_model
from pyro.nn import PyroModule
from torch import Tensor

from stochdyn._checks import check_bool, check_choice, check_nonempty, check_positive_int, check_type
from stochdyn._transforms import recorded, recording
from stochdyn.diagnostics.draws import seeded
from stochdyn.diagnostics.inference_data import to_inference_data
from stochdyn.diagnostics.psis import pareto_smooth
from stochdyn.errors import ConvergenceWarning, InvalidInputError, ShapeError
from stochdyn.infer.fitting import fit_guide
from stochdyn.infer.skewed import AutoSkewedNormal
from stochdyn.povm.frames.frame import Measurement
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.master.arguments import check_measurement, check_model
from stochdyn.povm.master.propagator import Propagator
from stochdyn.povm.records.goodness import goodness_of_fit, warn_of_chains, warn_of_fit
from stochdyn.povm.records.measurement import (
    MeasurementRecords,
    Preparations,
    RecordLaw,
    check_priors,
    check_unused,
)
from stochdyn.run.progress import progress_bar

if TYPE_CHECKING:
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["ReadoutError", "RecordModel", "infer_parameters"]

_PARTICLES, _LARGEST = 32, 1 << 15
_TABLES, _VALUES = 1 << 22, 1 << 23
_MIN_DRAWS_FOR_KHAT, _MODE_STEPS = 100, 60


@dataclass(frozen=True)
class ReadoutError:
    """Unknown probabilities of reading a wrong bit, as parameters of a model of records.

    For measurements whose outcomes are pairs of bits, such as :class:`~stochdyn.povm.Pauli6` and
    :class:`~stochdyn.povm.Basis`: outcomes ``2 k`` and ``2 k + 1`` are read for each other.

    Args:
        up: The name of the probability of reading 1 for 0.
        down: The name of the probability of reading 0 for 1; the same parameter if None.

    Example:
        >>> ReadoutError("flip").names
        ('flip',)
    """

    up: str = "readout_error"
    down: str | None = None

    def __post_init__(self) -> None:
        check_type(self.up, str, "up")
        if self.down is not None:
            check_type(self.down, str, "down")

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return (self.up,) if self.down in (None, self.up) else (self.up, str(self.down))

    def confusion(self, values: Mapping[str, Tensor], num_outcomes: int) -> Tensor:
        """Return the matrices ``(*batch, K, K)`` from true outcomes to those read."""
        up = torch.as_tensor(values[self.up], dtype=torch.float64)
        down = torch.as_tensor(values[self.down or self.up], dtype=torch.float64)
        up, down = torch.broadcast_tensors(up, down)
        # columns: the true bit, rows: the one that is read
        block = torch.stack([torch.stack([1 - up, down], -1), torch.stack([up, 1 - down], -1)], -2)
        eye = torch.eye(num_outcomes // 2, dtype=block.dtype, device=block.device)
        whole = torch.einsum("kl,...ab->...kalb", eye, block)
        return whole.reshape(*block.shape[:-2], num_outcomes, num_outcomes)


class RecordModel(PyroModule):
    r"""The Pyro model of measurement records of a small lattice with unknown parameters.

    .. math:: \theta\sim\text{priors},\qquad a_r\sim p_\theta(t_r)\ \text{independently}

    A latent site for each parameter, and the observed site ``outcomes`` in a plate ``record``. Works with guides,
    ``SVI``, ``NUTS``, ``Predictive`` and :func:`stochdyn.to_inference_data`, also with vectorised particles.

    Args:
        model: The Lindbladian with its named parameters, which may enter in any way and depend on time.
        povm: The measurement of all sites, or one for each site, complete or not.
        state: The state at time 0, as for :func:`~stochdyn.povm.exact.evolve`, or :class:`~stochdyn.povm.Preparations`.
        times: The times of the measurements.
        priors: The Pyro distributions of the parameters by name, such as ``{"g": LogNormal(0.0, 1.0)}``.
        readout: The unknown readout errors: one :class:`ReadoutError`, the same on all sites, or a list with one for each
            site, None where there is none; None for none beyond those of ``povm``.
        max_step: The longest step, for pulses shorter than 1/4096 of the span.
        breaks: The times where coefficients aren't smooth; jumps are found without.

    Raises:
        InvalidInputError: If priors and parameters don't match, or readout errors don't suit the measurement.
        SystemSizeError: If there are over 65536 outcomes of a minimal frame (eight qubits).

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
        povm: Measurement | SiteFrames,
        state: Any,
        times: Any,
        priors: Mapping[str, Any],
        readout: ReadoutError | Sequence[ReadoutError | None] | None = None,
        *,
        max_step: float | None = None,
        breaks: Sequence[float] = (),
    ) -> None:
        super().__init__()
        check_model(model)
        check_measurement(povm)
        self.readout = _each_site(readout, model.num_sites)
        if any(self.readout) and povm.num_outcomes % 2:
            raise InvalidInputError(
                "readout errors of bits need outcomes in pairs", got=f"{povm.num_outcomes} outcomes"
            )
        unknown = [name for one in self.readout if one is not None for name in one.names]
        names = tuple(dict.fromkeys([*model.parameters, *unknown]))
        check_priors(names, priors)
        states = state.states if isinstance(state, Preparations) else [state]
        self.propagators = torch.nn.ModuleList(
            Propagator(model, povm, one, times, max_step=max_step, breaks=breaks) for one in states
        )
        self.propagator = cast(Propagator, self.propagators[0])
        self.priors = {name: priors[name] for name in names}
        self._memory: _Memory | None = None

    @property
    def _table_size(self) -> int:
        """The number of probabilities at given parameters, ``P * T * K**N``."""
        law = self.propagator
        return len(self.propagators) * len(law.times) * law.num_outcomes**law.num_sites

    @contextmanager
    def _remembering(self, bar: Any = None) -> Iterator[None]:
        """Keep the last probabilities that no derivative was asked of, for replicated data ask for them once more.

        Args:
            bar: A progress bar that counts at how many parameters they were worked out.
        """
        self._memory = _Memory(bar)
        try:
            yield
        finally:
            self._memory = None

    def probabilities(self, values: Mapping[str, Any]) -> Tensor:
        """Return the probabilities ``(*batch, P * T, K**N)`` of all outcomes, preparations slowest."""
        if self._memory is None or torch.is_grad_enabled():
            return self._probabilities(values)
        return self._memory(self._probabilities, values)

    def _probabilities(self, values: Mapping[str, Any]) -> Tensor:
        confusion, k = None, self.propagator.num_outcomes
        if any(self.readout):
            perfect = torch.eye(k, dtype=torch.float64)
            sites = [perfect if one is None else one.confusion(values, k) for one in self.readout]
            confusion = torch.stack(torch.broadcast_tensors(*sites), -3)[..., None, :, :, :]
        inner = {name: values[name] for name in self.propagator.names}
        parts = []
        for law in cast("Iterable[Propagator]", self.propagators):
            q = law.inner(**inner)
            if confusion is not None and q.ndim - 2 < confusion.ndim - 4:
                q = q.expand(*confusion.shape[:-4], *q.shape[-2:])
            parts.append(law.read_out(q, confusion))
        return torch.cat(parts, -2)

    def forward(self, records: MeasurementRecords) -> Tensor:
        """Run the model and return the probabilities ``(*batch, P * T, K**N)``."""
        law = self.propagator
        values = {name: pyro.sample(name, prior) for name, prior in self.priors.items()}
        p = self.probabilities(values)
        with pyro.plate("record", len(records), dim=-1):
            pyro.sample(
                "outcomes",
                RecordLaw(p, records.cell, law.num_sites, law.num_outcomes),
                obs=records.outcomes,
            )
        return p


class _Memory:
    """The last values of a function of named tensors."""

    def __init__(self, bar: Any) -> None:
        self.bar = bar
        self.values: dict[str, Tensor] | None = None
        self.result = torch.empty(0)

    def __call__(self, function: Callable[[Mapping[str, Any]], Tensor], values: Mapping[str, Any]) -> Tensor:
        now = {name: torch.as_tensor(value) for name, value in values.items()}
        before = self.values
        if before is None or any(
            name not in before or not torch.equal(now[name], before[name]) for name in now
        ):
            self.values, self.result = now, function(values)
            if self.bar is not None:
                self.bar.update(min(self.result[..., 0, 0].numel(), self.bar.total - self.bar.n))
        return self.result


@recorded
def infer_parameters(
    records: MeasurementRecords,
    model: Lindbladian,
    povm: Measurement | SiteFrames,
    state: Any,
    priors: Mapping[str, Any],
    *,
    method: str = "svi",
    readout: ReadoutError | Sequence[ReadoutError | None] | None = None,
    steps: int | None = None,
    num_draws: int = 1000,
    warmup: int | None = None,
    num_chains: int | None = None,
    guide: AutoGuide | None = None,
    max_step: float | None = None,
    breaks: Sequence[float] = (),
    seed: int | None = 0,
    predictive: bool = True,
    progress: bool = True,
) -> Any:
    """Return the posterior of a Lindbladian's parameters given measurement records.

    Args:
        records: The measurement records.
        model: The Lindbladian with its named parameters, which may enter in any way and depend on time.
        povm: The measurement of all sites, or one for each site, complete or not.
        state: The state at time 0, as for :func:`~stochdyn.povm.exact.evolve`, or :class:`~stochdyn.povm.Preparations`.
        priors: The Pyro distributions of the parameters by name; rates need positive ones, readout errors such below
            one half.
        method: The method: ``"svi"``, with a correlated and skewed guide on the unconstrained scale, or ``"nuts"``.
        readout: The unknown readout errors, as parameters of their own: the same on all sites, or a list with one for
            each site.
        steps: The number of updates of the guide, with ``"svi"``; None goes on until the bound has settled, which takes
            some hundred from the mode where it starts.
        num_draws: The number of draws from the posterior; with ``"nuts"``, from each chain.
        warmup: The number of steps before the draws of each chain, with ``"nuts"``; 300 if None.
        num_chains: The number of chains, with ``"nuts"``, 4 if None; Pyro runs them in processes of their own where there
            are cores.
        guide: A guide of a :class:`RecordModel`, with ``"svi"``, in place of
            :class:`stochdyn.infer.skewed.AutoSkewedNormal`.
        max_step: The longest step, for pulses shorter than 1/4096 of the span.
        breaks: The times where coefficients aren't smooth; jumps are found without.
        seed: The seed of fit and draws; the global random state is left alone. None draws from that instead.
        predictive: Whether to draw replicated records too.
        progress: Whether to show a progress bar.

    Returns:
        ArviZ container (see :func:`stochdyn.to_inference_data`). Its attributes ``fit_p_value`` and
        ``impossible_records`` say how the records agree with the posterior mean (:func:`~stochdyn.povm.goodness_of_fit`);
        with ``"svi"`` ``khat`` says how far the approximation can be trusted.

    Raises:
        InvalidInputError: If priors and parameters don't match, or an option doesn't belong to the method.
        ShapeError: If the records are of another lattice, frame, or number of preparations.
        SystemSizeError: If there are over 65536 outcomes of a minimal frame (eight qubits).

    Warns:
        ConvergenceWarning: If k-hat exceeds 0.7, if chains haven't mixed (R-hat over 1.1), if records are impossible
            under the model (probability zero), or if they don't look as the fitted model says.

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
    check_type(records, MeasurementRecords, "records")
    check_choice(method, ("svi", "nuts"), "method")
    of_chains, of_guides = {"warmup": warmup, "num_chains": num_chains}, {"steps": steps, "guide": guide}
    check_unused(method, of_chains if method == "svi" else of_guides)
    warmup = 300 if warmup is None else warmup
    num_chains = 4 if num_chains is None else num_chains
    if steps is not None:
        check_positive_int(steps, "steps")
    for value, name in (
        (num_draws, "num_draws"),
        (warmup, "warmup"),
        (num_chains, "num_chains"),
    ):
        check_positive_int(value, name)
    check_bool(predictive, "predictive")
    check_bool(progress, "progress")
    check_nonempty(records.outcomes, "records")
    check_model(model)
    check_measurement(povm)
    if (records.num_sites, records.num_outcomes) != (model.num_sites, povm.num_outcomes):
        raise ShapeError(
            "the records are of another lattice or frame",
            got=f"{records.num_sites} sites with {records.num_outcomes} outcomes",
            expected=f"{model.num_sites} sites with {povm.num_outcomes} outcomes",
        )
    prepared = len(state.states) if isinstance(state, Preparations) else 1
    if records.num_preparations > prepared:
        raise ShapeError(
            "the records name more preparations than there are states",
            got=records.num_preparations,
            expected=prepared,
            hint="state=Preparations([...])",
        )
    program = RecordModel(
        model, povm, state, records.times, priors, readout, max_step=max_step, breaks=breaks
    )
    with seeded(seed), pyro.get_param_store().scope():
        if method == "nuts":
            chains = MCMC(
                NUTS(program, init_strategy=init_to_median(num_samples=50)),
                num_samples=num_draws,
                warmup_steps=warmup,
                num_chains=num_chains,
                disable_progbar=not progress,
            )
            with recording():
                chains.run(records)
            posterior: Any = chains
        else:
            if guide is None:
                guide = _start(program, records)
            size = program.propagator.start.shape[0]
            fit_guide(
                program, guide, (records,), steps=steps, lr=0.005, seed=seed, progress=progress,
                num_particles=max(2, min(_PARTICLES, _LARGEST // size)),
            )  # fmt: skip
            posterior = guide
        total = num_draws * (num_chains if method == "nuts" else 1)
        with (
            progress_bar(total, "densities of draws", progress, unit="draw") as bar,
            program._remembering(bar),
        ):
            idata = to_inference_data(
                program, posterior, (records,), num_draws=num_draws, seed=seed, predictive=predictive,
                chunk_size=max(1, min(_TABLES // program._table_size, _VALUES // records.outcomes.numel())),
            )  # fmt: skip
    means = {name: float(idata.posterior[name].mean()) for name in program.priors}
    with torch.no_grad():
        fit = goodness_of_fit(_padded(records, prepared), program.probabilities(means), generator=seed)
    idata.attrs["fit_p_value"], idata.attrs["impossible_records"] = fit.p_value, fit.impossible
    warn_of_fit(fit, stacklevel=4)
    if method == "nuts":
        chains_of = {name: torch.as_tensor(idata.posterior[name].values) for name in program.priors}
        warn_of_chains(chains_of, stacklevel=4)
        return idata
    weights = torch.as_tensor(idata.sample_stats["log_weight"].values).flatten()
    khat = float(pareto_smooth(weights).khat) if num_draws >= _MIN_DRAWS_FOR_KHAT else math.nan
    idata.attrs["khat"] = khat
    if khat > 0.7:
        warnings.warn(
            f"the variational approximation of the posterior is poor (k-hat {khat:.2f}); "
            "weight the draws by sample_stats.log_weight, run more steps, or use method='nuts'",
            ConvergenceWarning,
            stacklevel=3,
        )
    return idata


@recorded
def _start(program: RecordModel, records: MeasurementRecords) -> AutoSkewedNormal:
    """Return a guide at the mode of the posterior, as wide as the Laplace approximation there.

    The potential is smooth and has few dimensions, so a quasi-Newton search needs some twenty gradients.
    """
    start, potential, transforms, _ = initialize_model(
        program, (records,), init_strategy=init_to_median(num_samples=50)
    )
    point = {name: value.detach().clone().requires_grad_(True) for name, value in start.items()}
    search = torch.optim.LBFGS(list(point.values()), max_iter=_MODE_STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        search.zero_grad()
        value: Tensor = potential(point)
        value.backward()
        return value

    search.step(closure)
    found = {name: transforms[name].inv(value.detach()) for name, value in point.items()}
    if not all(bool(torch.isfinite(value).all()) for value in found.values()):
        return AutoSkewedNormal(program, init_to_median(num_samples=50)).start_at_mode(records)
    # the place is known, so that only the widths are left to find
    return AutoSkewedNormal(program, init_to_value(values=found)).start_at_mode(records, steps=1, lr=1e-9)


def _each_site(readout: object, num_sites: int) -> list[ReadoutError | None]:
    """Return the readout errors of each site, None for none.

    Raises:
        ShapeError: If a list has another length.
    """
    if isinstance(readout, list | tuple):
        if len(readout) != num_sites:
            raise ShapeError(
                "readout must have one entry for each site", got=len(readout), expected=num_sites
            )
        each = list(readout)
    else:
        each = [readout] * num_sites
    for one in each:
        if one is not None:
            check_type(one, ReadoutError, "readout")
    return each


def _padded(records: MeasurementRecords, prepared: int) -> MeasurementRecords:
    """Return records of which some preparations may have none, so that tables have a row for each."""
    if records.num_preparations == prepared:
        return records
    return _OfPreparations(
        records.times,
        records.time_index,
        records.outcomes,
        records.num_outcomes,
        records.preparation,
        prepared,
    )


@dataclass(frozen=True)
class _OfPreparations(MeasurementRecords):
    prepared: int = 1

    @property
    def num_preparations(self) -> int:
        """The number of initial states, those without records too."""
        return self.prepared
