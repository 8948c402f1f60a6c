"""Posteriors over the parameters of a refined reference: by bootstrap, or by variational inference with latent paths."""

from __future__ import annotations

import os
import warnings
from concurrent.futures import Executor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_seed,
    check_bool,
    check_choice,
    check_positive_int,
    check_type,
)
from stochdyn.bridges.data.snapshots import Snapshots, redrawn_weights
from stochdyn.bridges.families.base import DriftFamily
from stochdyn.bridges.laws.hidden import HiddenStateBridge
from stochdyn.bridges.refinement.identifiability import (
    check_information,
    rotation_invariance,
    warn_if_invariant,
)
from stochdyn.bridges.refinement.linear_response import LinearResponse, flatten, with_coordinates
from stochdyn.bridges.refinement.methods import Messages, Method, Sinkhorn
from stochdyn.errors import (
    ApproximationWarning,
    InvalidInputError,
    NonFiniteError,
    StochdynError,
    UnknownSiteError,
)
from stochdyn.run.engine import Resumable, run_to_end
from stochdyn.run.jobs import Jobs, check_executor
from stochdyn.run.randomness import seed_of

if TYPE_CHECKING:
    from stochdyn.bridges.refinement.refinement import Refinement

__all__ = ["FullRefit", "bootstrap", "families_of", "posterior"]

COORDINATES = "coordinates"
_MAX_LINEAR = 30


@dataclass(frozen=True)
class FullRefit:
    """Repeat the refinement for every redrawn data set, from the fit.

    Use it for families with a prior, where the noise is learnt, and for small snapshots of skewed clouds; elsewhere the linear
    response takes milliseconds per draw.

    Args:
        max_iterations: The largest number of iterations for each data set.
        num_nodes: The largest number of states that a projection sees; that of the fit if None.

    Example:
        >>> FullRefit(max_iterations=3)
        FullRefit(max_iterations=3, num_nodes=40000)
    """

    max_iterations: int = 5
    num_nodes: int | None = 40_000

    def __post_init__(self) -> None:
        check_positive_int(self.max_iterations, "max_iterations")
        if self.num_nodes is not None:
            check_positive_int(self.num_nodes, "num_nodes")


def posterior(
    fit: Refinement,
    num_draws: int = 100,
    method: str = "bootstrap",
    seed: int = 0,
    progress: bool = True,
    **options: Any,
) -> Any:
    r"""Return an ArviZ posterior over the parameters of a refined reference.

    Two answers of different meaning; the container's attribute ``estimator`` says which was asked for:

    - ``"bootstrap"``: particles of every snapshot are redrawn with replacement, and the refinement follows (:func:`bootstrap`). It
      shows how estimates scatter over data sets, whatever the model's errors.
    - ``"svi"``: variational inference of the parameters with the law of the paths as latent variable
      (:class:`~stochdyn.bridges.refinement.profile.BridgeProfile`), put through :func:`stochdyn.to_inference_data`, densities and weights
      included; priors act.

    Paths are latent in both. A regression on the bridge's paths as if they had been seen would be overconfident.

    Args:
        fit: The refinement, as :func:`stochdyn.bridges.refine` returned it.
        num_draws: The number of draws.
        method: The estimator, ``"bootstrap"`` or ``"svi"``.
        seed: The seed of the draws.
        progress: Whether to show a progress bar, after two seconds.
        options: Further arguments of :func:`bootstrap` or of :func:`stochdyn.bridges.refinement.profile.fit_profile`.

    Returns:
        ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with ArviZ 1.x. ``posterior`` holds the parameters by name and, as
        ``coordinates``, the raw values that :func:`families_of` reads.

    Raises:
        InvalidInputError: If the method is unknown, or can't take so many parameters.
        UnavailableError: If the refinement has no couplings, as that by :class:`IPF`.

    Warns:
        ApproximationWarning: If the marginals leave a rotation undetermined, or hold hardly any information on a combination of
            parameters.

    Example:
        >>> from stochdyn.bridges import LinearDrift, Snapshots, refine
        >>> clouds = [torch.linspace(-1, 1, 9)[:, None] * 0.5**i + i for i in range(3)]
        >>> fit = refine(Snapshots([0.0, 1.0, 2.0], clouds), LinearDrift(1), diffusion=0.3)
        >>> idata = posterior(fit, num_draws=50)
        >>> idata.attrs["estimator"], dict(idata.posterior["matrix"].sizes)["draw"]
        ('bootstrap', 50)
    """
    check_positive_int(num_draws, "num_draws")
    check_choice(method, ("bootstrap", "svi"), "method")
    _check_response(fit)
    if not isinstance(fit.measure, HiddenStateBridge):
        warn_if_invariant(rotation_invariance(fit.snapshots), stacklevel=4)
    if method == "svi":
        from stochdyn.bridges.refinement.profile import fit_profile

        return fit_profile(fit, seed=seed, progress=progress, **options).posterior(num_draws, seed)
    return bootstrap(fit, num_draws, seed, progress, **options)


def bootstrap(
    fit: Refinement,
    num_draws: int = 100,
    seed: int = 0,
    progress: bool = True,
    *,
    refit: Literal["auto", "linear", "full"] | FullRefit = "auto",
    centre: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    executor: Executor | None = None,
) -> Any:
    r"""Redraw the particles of every snapshot with replacement and follow the refinement.

    Args:
        fit: The refinement, as :func:`stochdyn.bridges.refine` returned it.
        num_draws: The number of redrawn data sets.
        seed: The seed of the redrawing.
        progress: Whether to show a progress bar, after two seconds.
        refit: The way in which the refinement follows. ``"full"``: it is repeated from the fit, at a few bridges per draw;
            :class:`FullRefit` has the options.
            ``"linear"``: by its linear response to the weights
            (:class:`~stochdyn.bridges.refinement.linear_response.LinearResponse`), at a few bridges per *parameter* and
            milliseconds per draw, for families without prior. ``"auto"``: linear where it can be, up to thirty parameters and
            with known diffusion.
        checkpoint: The directory that the run is saved to after every data set, with full refits.
        resume: Whether to continue the run in ``checkpoint``.
        executor: An executor of ``concurrent.futures`` for the full refits; this thread if None. The answer is the same to the bit.
        centre: Whether to correct for the bias that noise causes: redrawing adds it once more, so draws are moved by twice
            their mean deviation from the fit.

    Returns:
        The container that :func:`posterior` describes. Where the noise was learnt, so does its strength as ``diffusion``, one for all or
        one per component, or the whole matrix :math:`GG^\top` as ``covariance_rate``. ``sample_stats`` holds ``objective`` for full
        refits; attributes are ``refit`` and ``failed``, the number of data sets that no bridge could be built on.

    Raises:
        InvalidInputError: If more than half of the data sets fail, or a linear response isn't to be had.

    Reference: Efron & Tibshirani (1993), An Introduction to the Bootstrap, chapters 6 and 10.
    """
    check_positive_int(num_draws, "num_draws")
    if not isinstance(refit, FullRefit):
        check_choice(refit, ("auto", "linear", "full"), "refit")
    check_bool(centre, "centre")
    check_executor(executor)
    seed = as_seed(seed)
    _check_response(fit)
    generator = torch.Generator(fit.snapshots.device).manual_seed(seed)
    size = flatten(fit.family).numel()
    simple = size <= _MAX_LINEAR and fit.family.log_prior() is None and not fit.options["learn_diffusion"]
    if refit == "linear" or (refit == "auto" and simple):
        if fit.options["learn_diffusion"]:
            raise InvalidInputError(
                "the response of a learned diffusion isn't known", hint="use refit='full'"
            )
        if checkpoint is not None or resume or executor is not None:
            raise InvalidInputError(
                "checkpoint and executor do nothing for a linear response, which takes seconds",
                hint="use refit='full'",
            )
        response = LinearResponse(fit)
        check_information(response, stacklevel=4)
        draws, centre_at = response(redrawn_weights(fit.snapshots, num_draws, generator)), response.converged
        extra: dict[str, Tensor] = {}
        stats: dict[str, Tensor] = {}
        failed, how = 0, "linear"
    else:
        draws, extra, stats, failed = _refits(
            fit,
            num_draws,
            seed,
            refit if isinstance(refit, FullRefit) else FullRefit(),
            progress,
            checkpoint,
            resume,
            executor,
        )
        centre_at, how = flatten(fit.family), "full"
    if centre:
        draws = draws - 2 * (draws.mean(0) - centre_at)
    return _container(fit, draws, extra, stats, {"seed": seed, "failed": failed, "refit": how})


def _check_response(fit: Refinement) -> None:
    """Raise UnavailableError where the law has neither couplings nor draws that respond to weights."""
    from stochdyn.bridges.refinement.refinement import Refinement

    check_type(fit, Refinement, "fit")
    if not isinstance(fit.measure, HiddenStateBridge):
        fit.bridge  # noqa: B018, raises where there is none


@dataclass(frozen=True)
class _Refit:
    """A refinement on redrawn particles, by the number of the data set; the error, if no bridge can be built on it."""

    snapshots: Snapshots
    family: DriftFamily
    options: dict[str, Any]
    seed: int

    def __call__(self, number: int) -> list[Any] | StochdynError:
        from stochdyn.bridges.refinement.refinement import refine

        source = torch.Generator(self.snapshots.device).manual_seed(seed_of(self.seed, number))
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ApproximationWarning)
                found = refine(self.snapshots.resample(source), self.family, **self.options)
        except StochdynError as error:
            return error
        return [flatten(found.family), self._noise(found.diffusion.double()), found.objective]

    def _noise(self, spread: Tensor) -> Tensor:
        """What is learnt of the noise: its strength, that of every component, or the whole covariance rate."""
        learnt = self.options["learn_diffusion"]
        if learnt == "matrix":
            return spread
        own = spread.diagonal().sqrt()
        return own if learnt == "components" else own.square().mean().sqrt()


def _refit_options(fit: Refinement, refit: FullRefit) -> dict[str, Any]:
    """Return the arguments of the refinements of redrawn data."""
    assert isinstance(fit.method, Sinkhorn | Messages)  # only their bridges respond to weights
    nodes = fit.method.num_nodes if refit.num_nodes is None else min(refit.num_nodes, fit.method.num_nodes)
    method: Method = replace(fit.method, num_nodes=nodes)
    diffusion = fit.options["diffusion"]
    if isinstance(fit.measure, HiddenStateBridge) and isinstance(method, Messages):
        method = replace(method, initial_mean=fit.measure.initial_mean, initial_cov=fit.measure.initial_cov)
    elif isinstance(method, Sinkhorn):
        method, diffusion = replace(method, from_family=True, restarts=0), fit.bridge.diffusion
    return {
        **fit.options, "max_iterations": refit.max_iterations, "method": method, "diffusion": diffusion,
        "dt": fit.dt, "progress": False,
    }  # fmt: skip


class _Refits(Resumable[tuple[Tensor, dict[str, Tensor], dict[str, Tensor], int]]):
    """One refinement after the other, until there are as many as asked for."""

    unit = "data set"
    total: int

    def __init__(self, fit: Refinement, num_draws: int, jobs: Jobs[list[Any] | StochdynError]) -> None:
        self.fit, self.total, self.jobs, self.failed = fit, num_draws, jobs, 0
        self.draws: list[list[Any]] = []

    @property
    def finished(self) -> bool:
        """Whether all data sets are done."""
        return len(self.draws) >= self.total

    @property
    def position(self) -> float:
        """The number of data sets that are done."""
        return len(self.draws)

    def step(self) -> None:
        """Take the next data set; one that no bridge can be built on is replaced by another."""
        found = self.jobs.result(self.number, self.total - len(self.draws))
        if not isinstance(found, StochdynError):
            self.draws.append(found)
            return
        self.failed += 1
        if self.failed > self.most_failures(self.total):
            raise InvalidInputError(
                "refinements of redrawn snapshots keep failing",
                got=f"{self.failed} of {self.failed + len(self.draws)}",
            ) from found

    @staticmethod
    def most_failures(total: int) -> int:
        """How many data sets may fail."""
        return max(total // 2, 3)

    def state(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on, as plain data and tensors."""
        return {"draws": self.draws, "failed": self.failed}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.draws, self.failed = [list(row) for row in state["draws"]], state["failed"]

    def report(self) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], int]:
        """Return coordinates, learned diffusion, objectives and failures so far."""
        size = flatten(self.fit.family).numel()
        rows = torch.stack([row[0] for row in self.draws]) if self.draws else torch.empty(0, size)
        learnt = self.fit.options["learn_diffusion"]
        name = "covariance_rate" if learnt == "matrix" else "diffusion"
        extra = {name: torch.stack([row[1] for row in self.draws])} if learnt and self.draws else {}
        return rows, extra, {"objective": torch.tensor([row[2] for row in self.draws])}, self.failed


def _refits(
    fit: Refinement,
    num_draws: int,
    seed: int,
    refit: FullRefit,
    progress: bool,
    checkpoint: str | os.PathLike[str] | None,
    resume: bool,
    executor: Executor | None,
) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], int]:
    options = _refit_options(fit, refit)
    identity = {
        "snapshots": fit.snapshots,
        "start": flatten(fit.family),
        "family": fit.family,
        "seed": seed,
        **options,
    }
    numbers = range(num_draws + _Refits.most_failures(num_draws) + 1)
    with Jobs(
        _Refit(fit.snapshots, fit.family, options, seed), numbers, seed, executor, fit.snapshots.device
    ) as jobs:
        return run_to_end(
            _Refits(fit, num_draws, jobs), "bootstrap", identity=identity, randomness=seed,
            device=fit.snapshots.device, progress=progress, checkpoint=checkpoint, resume=resume,
        )  # fmt: skip


def families_of(
    fit: Refinement, idata: Any, num_draws: int | None = None, generator: torch.Generator | int | None = None
) -> list[DriftFamily]:
    """Return families with parameters drawn from a posterior of :func:`posterior`.

    Args:
        fit: The refinement that the posterior belongs to.
        idata: The container that holds the posterior.
        num_draws: The number of families, drawn with replacement; every draw once if None.
        generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

    Raises:
        UnknownSiteError: If the container has no coordinates.
        InvalidInputError: If they are of another family.
    """
    if COORDINATES not in idata.posterior:
        raise UnknownSiteError(f"the posterior has no variable {COORDINATES!r}: take one of fit.posterior()")
    values = torch.as_tensor(idata.posterior[COORDINATES].values.copy())
    draws = values.reshape(-1, values.shape[-1])
    size = flatten(fit.family).numel()
    if draws.shape[1] != size:
        raise InvalidInputError("the posterior is of another family", got=draws.shape[1], expected=size)
    if num_draws is not None:
        check_positive_int(num_draws, "num_draws")
        source = as_generator(generator)
        draws = draws[torch.randint(len(draws), (num_draws,), generator=source)]
    return [with_coordinates(fit.family, row) for row in draws]


def _container(
    fit: Refinement,
    draws: Tensor,
    extra: dict[str, Tensor],
    stats: dict[str, Tensor],
    attrs: dict[str, str | int | float],
) -> Any:
    from stochdyn.diagnostics.container import from_draws

    if not bool(torch.isfinite(draws).all()):
        raise NonFiniteError("a draw isn't finite", hint="see whether the snapshots determine all parameters")
    rows = [with_coordinates(fit.family, row).named_values() for row in draws]
    variables = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    arrays = {name: value.cpu().numpy()[None] for name, value in {**variables, **extra}.items()}
    arrays[COORDINATES] = draws.cpu().numpy()[None]
    return from_draws(
        arrays,
        sample_stats={name: value.numpy()[None] for name, value in stats.items()},
        constant_data={"times": fit.snapshots.times.cpu().numpy()},
        attrs={"estimator": "bootstrap", **attrs},
    )
