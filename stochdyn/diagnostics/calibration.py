"""Simulation-based calibration of inference in Pyro models: ranks of the truth and coverage."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import pyro
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from pyro.poutine.messenger import Messenger
from torch import Tensor

from stochdyn._checks import check_bool, check_callable, check_positive_int, check_type
from stochdyn.diagnostics.draws import current_device, evaluate_draws
from stochdyn.diagnostics.probe import check_program
from stochdyn.diagnostics.samplers import PosteriorSampler, as_sampler
from stochdyn.diagnostics.sites import Site, read_sites
from stochdyn.diagnostics.uniformity import UniformityTest, binomial_interval, rank_uniformity
from stochdyn.errors import InvalidInputError, NonFiniteError, ShapeError, UnknownSiteError
from stochdyn.run.engine import Resumable, run_to_end
from stochdyn.run.jobs import Jobs, check_executor
from stochdyn.run.randomness import OwnRandomness

__all__ = ["CoverageTable", "SBCResult", "sbc"]

TestFunction = Callable[[Mapping[str, Tensor]], Tensor]


@dataclass(frozen=True)
class CoverageTable:
    """How often central posterior intervals contained the truth.

    Attributes:
        nominal: The exact probability ``(L,)`` of each interval: the level asked for, rounded to what ranks resolve.
        observed: The fraction ``(L,)`` of simulations inside.
        stderr: The binomial standard error ``(L,)`` of that fraction if the nominal probability is right.
        lower: The lower end ``(L,)`` of the 95 % Wilson interval.
        upper: The upper end ``(L,)`` of that interval.
    """

    nominal: np.ndarray
    observed: np.ndarray
    stderr: np.ndarray
    lower: np.ndarray
    upper: np.ndarray


@dataclass(frozen=True)
class SBCResult:
    """Ranks of true values among posterior draws, one per simulation.

    Attributes:
        ranks: For each scalar quantity by name, ``(num_simulations,)`` integers in ``0, ..., num_draws``; uniform if
            inference is exact.
        num_draws: The number of posterior draws that each rank counts.
        seconds: The wall-clock time.
    """

    ranks: dict[str, np.ndarray]
    num_draws: int
    seconds: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int(self.num_draws, "num_draws")

    def uniformity(self, level: float = 0.95) -> dict[str, UniformityTest]:
        """Test each quantity's ranks; ``level`` is that of the simultaneous band."""
        return {name: rank_uniformity(ranks, self.num_draws + 1, level) for name, ranks in self.ranks.items()}

    def pvalue(self) -> float:
        """Return the smallest chi-square p-value, times the number of quantities (Bonferroni)."""
        smallest = min(test.pvalue for test in self.uniformity().values())
        return min(1.0, smallest * len(self.ranks))

    def coverage(self, levels: Sequence[float] = (0.5, 0.8, 0.9, 0.95)) -> dict[str, CoverageTable]:
        """Return how often central intervals of the given levels contained the truth.

        Args:
            levels: The probabilities in (0, 1).

        Returns:
            One table per quantity.

        Raises:
            InvalidInputError: If a level isn't inside (0, 1).
        """
        if not all(0 < level < 1 for level in levels):
            raise InvalidInputError("levels must lie strictly between 0 and 1", got=tuple(levels))
        total = self.num_draws + 1
        tails = [min((total - 1) // 2, max(0, round(total * (1 - level) / 2))) for level in levels]
        nominal = np.array([1 - 2 * tail / total for tail in tails])
        tables = {}
        for name, ranks in self.ranks.items():
            hits = np.array([((ranks >= tail) & (ranks < total - tail)).sum() for tail in tails])
            bounds = np.array([binomial_interval(h, len(ranks)) for h in hits])
            stderr = np.sqrt(nominal * (1 - nominal) / len(ranks))
            tables[name] = CoverageTable(nominal, hits / len(ranks), stderr, bounds[:, 0], bounds[:, 1])
        return tables


def sbc(
    model: Callable[..., Any],
    infer: PosteriorSampler | type[MCMCKernel] | type[AutoGuide],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    num_simulations: int = 100,
    num_draws: int = 99,
    observed: Sequence[str] | None = None,
    parameters: Sequence[str] | None = None,
    test_functions: Mapping[str, TestFunction] | None = None,
    log_joint: bool = False,
    data_args: Callable[[Mapping[str, Tensor]], Sequence[Any]] | None = None,
    seed: int | None = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    executor: Executor | None = None,
) -> SBCResult:
    r"""Simulate truth and data from a model, infer, and rank the truth among the posterior draws.

    With :math:`\theta\sim p(\theta)`, :math:`y\sim p(y\mid\theta)` and :math:`\theta_1,\dots,\theta_L\sim
    p(\theta\mid y)`, for every function :math:`f`

    .. math:: \#\{l: f(\theta_l)<f(\theta)\}\ \text{is uniform on}\ \{0,\dots,L\};

    an overconfident posterior puts too many ranks at the ends, a biased one at one end. By default every
    element of a latent site is ranked; of a path ``x`` its last point ``x(T)`` and its time average
    ``mean x``, one of each per dimension.

    Args:
        model: Pyro model with proper priors.
        infer: The way in which posteriors are drawn: a callable ``(model, args, kwargs, num_draws)`` that returns draws
            of all latent sites, ``(num_draws, *shape)``, such as :class:`MCMCSampler` or :class:`VariationalSampler`;
            or an MCMC kernel (``NUTS``) or autoguide class, for those samplers' defaults.
        args: Positional arguments of the model. Values of observed sites among them only give shapes.
        kwargs: Keyword arguments of the model.
        num_simulations: The number of times that truth and data are simulated, each giving one rank per quantity.
        num_draws: The number ``L`` of posterior draws; one more than it divisible by the bins of a histogram is handy,
            as 99.
        observed: Names of the data sites; by default those that the model observes at ``args``.
        parameters: Names of the sites to rank; by default all latent sites and deterministic paths.
        test_functions: Further quantities by name: functions of the sites' values, each with a leading axis of draws,
            that return ``(draws, ...)``.
        log_joint: Whether to rank the log joint density too, which sees errors that no single parameter
            shows.
        data_args: A function that returns the arguments that belong to simulated data, for guides that read the data
            from their arguments; by default ``args`` for all.
        seed: What all random numbers start from; the global random state is left alone. None draws from that instead.
        progress: Whether to show a bar, which appears after two seconds.
        checkpoint: The directory that is saved to after every simulation.
        resume: Whether to continue the run in ``checkpoint``, with more simulations perhaps.
        executor: An executor of ``concurrent.futures`` for the simulations; this thread if None. Each has a seed of its own, so
            the ranks are the same to the bit. For processes, model, ``infer`` and functions must stand at the top of a module.

    Returns:
        The ranks, with tests of uniformity and coverage.

    Raises:
        UnknownSiteError: If there is no data site, or a named site doesn't exist.
        ShapeError: If ``infer`` or a test function returns another number of draws.
        NonFiniteError: If a draw is NaN.
        Interrupted: After Ctrl-C; its ``result`` holds the ranks so far.

    Example:
        >>> import pyro
        >>> import pyro.distributions as dist
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(rate, 1.0), obs=y)
        >>> def exact(model, args, kwargs, num_draws):
        ...     y = pyro.poutine.trace(model).get_trace(*args).nodes["y"]["value"]
        ...     return {"rate": y / 2 + 0.5**0.5 * torch.randn(num_draws)}
        >>> result = sbc(model, exact, (torch.tensor(0.0),), num_simulations=200)
        >>> result.pvalue() > 0.001
        True

    Reference:
        Talts et al., "Validating Bayesian inference algorithms with simulation-based calibration", 2018;
        Modrák et al., "Simulation-based calibration checking for Bayesian computation: the choice of test
        quantities shapes sensitivity", 2023.
    """
    check_positive_int(num_simulations, "num_simulations")
    check_positive_int(num_draws, "num_draws")
    check_program(model, None, args, kwargs)
    check_bool(log_joint, "log_joint")
    for value, name in ((observed, "observed"), (parameters, "parameters")):
        check_type(value, (list, tuple, type(None)), name, hint="a list of names of sites")
    check_type(test_functions, (Mapping, type(None)), "test_functions")
    for name, function in (test_functions or {}).items():
        check_callable(function, f"test_functions[{name!r}]")
    if data_args is not None:
        check_callable(data_args, "data_args", "a function of the simulated data")
    check_executor(executor)
    own = OwnRandomness(seed, current_device())
    with own:
        simulation = _Simulation(
            model, as_sampler(infer), args, dict(kwargs or {}), num_draws, observed, parameters, test_functions or {},
            log_joint, data_args,
        )  # fmt: skip
    identity = {
        "model": model, "infer": infer, "args": args, "kwargs": kwargs, "num_draws": num_draws, "observed": observed,
        "parameters": parameters, "test_functions": test_functions, "log_joint": log_joint, "data_args": data_args,
        "seed": seed,
    }  # fmt: skip
    assert own.seed is not None
    with Jobs(simulation, range(num_simulations), own.seed, executor, own.device) as jobs:
        return run_to_end(
            _Simulations(jobs, num_draws), "sbc", identity=identity, randomness=own, progress=progress,
            checkpoint=checkpoint, resume=resume,
        )  # fmt: skip


class _Simulation:
    """Truth, data and posterior, once: a function of nothing but random numbers, which returns ranks by name."""

    def __init__(
        self,
        model: Callable[..., Any],
        sampler: PosteriorSampler,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        num_draws: int,
        observed: Sequence[str] | None,
        parameters: Sequence[str] | None,
        test_functions: Mapping[str, TestFunction],
        log_joint: bool,
        data_args: Callable[[Mapping[str, Tensor]], Sequence[Any]] | None,
    ) -> None:
        self.model, self.sampler, self.args, self.kwargs = model, sampler, args, kwargs
        self.num_draws, self.log_joint, self.data_args = num_draws, log_joint, data_args
        with torch.no_grad():
            self.sites = read_sites(poutine.trace(model).get_trace(*args, **kwargs))
        self.data_names = _data_names(self.sites, observed)
        self.quantities = _quantities(self.sites, self.data_names, parameters, test_functions)
        # What a simulation leaves in Pyro's store must not reach the next one.
        self.store = copy.deepcopy(pyro.get_param_store().get_state())

    def __call__(self, number: int) -> dict[str, int]:
        """Simulate truth and data, draw from the posterior, and rank."""
        del number
        with pyro.get_param_store().scope(copy.deepcopy(self.store)):
            return self._ranks()

    def _ranks(self) -> dict[str, int]:
        args, kwargs, sites = self.args, self.kwargs, self.sites
        with torch.no_grad():
            trace = poutine.trace(_Release(self.data_names)(self.model)).get_trace(*args, **kwargs)
        nodes: dict[str, Any] = dict(trace.nodes)
        truth = {name: nodes[name]["value"][None] for name in sites}
        data = {name: truth[name][0] for name in self.data_names}
        conditioned = _Observe(data)(self.model)
        inputs = args if self.data_args is None else self.data_args(data)
        draws = _checked_draws(self.sampler(conditioned, inputs, kwargs, self.num_draws), self.num_draws)
        if self.log_joint or any(site.kind == "deterministic" for site in sites.values()):
            draws = _evaluated(conditioned, draws, inputs, kwargs, self.log_joint)
            if self.log_joint:
                latent = {
                    name: truth[name] for name in draws if name in truth and sites[name].kind == "latent"
                }
                truth[_JOINT] = evaluate_draws(conditioned, latent, inputs, kwargs, seed=None).log_joint
        found: dict[str, int] = {}
        for label, function in self.quantities.items():
            found |= _ranks(label, function(truth), function(draws), self.num_draws)
        if self.log_joint:
            found |= _ranks("log joint", truth[_JOINT], draws[_JOINT], self.num_draws)
        return found


class _Simulations(Resumable[SBCResult]):
    """The simulations in order; the ranks so far are the state."""

    unit = "simulation"

    def __init__(self, jobs: Jobs[dict[str, int]], num_draws: int) -> None:
        self.jobs, self.num_draws = jobs, num_draws
        self.total = len(jobs.items)
        self.ranks: dict[str, list[int]] = {}

    @property
    def finished(self) -> bool:
        """Whether all simulations are done."""
        return self.number >= len(self.jobs.items)

    def step(self) -> None:
        """Take the ranks of the next simulation."""
        for name, rank in self.jobs.result(self.number).items():
            self.ranks.setdefault(name, []).append(rank)

    def state(self) -> dict[str, Any]:
        """Return the ranks so far."""
        return {"ranks": {name: list(values) for name, values in self.ranks.items()}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from ranks."""
        self.ranks = {name: list(values) for name, values in state["ranks"].items()}

    def report(self) -> SBCResult:
        """Return the ranks so far as a result."""
        ranks = {name: np.array(values) for name, values in self.ranks.items()}
        return SBCResult(ranks, self.num_draws, self.seconds)


_JOINT = "_log_joint"


class _Release(Messenger):
    """Let data sites be drawn instead of observed."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = frozenset(names)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.names:
            msg["is_observed"], msg["value"], msg["done"] = False, None, False


class _Observe(Messenger):
    """Put simulated data in the place of whatever the model observes; all other sites stay."""

    def __init__(self, data: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.data = dict(data)

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"] in self.data:
            msg["is_observed"], msg["value"] = True, self.data[msg["name"]]


def _data_names(sites: Mapping[str, Site], observed: Sequence[str] | None) -> list[str]:
    names = [n for n, s in sites.items() if s.kind == "observed"] if observed is None else list(observed)
    missing = [name for name in names if name not in sites]
    if missing or not names:
        raise UnknownSiteError(
            "the model has no such data site" if missing else "the model observes nothing",
            got=", ".join(missing) or None,
            expected=", ".join(sites),
            hint="name the data sites through observed=",
        )
    return names


def _quantities(
    sites: Mapping[str, Site],
    data_names: Sequence[str],
    parameters: Sequence[str] | None,
    test_functions: Mapping[str, TestFunction],
) -> dict[str, TestFunction]:
    if parameters is None:
        names = [
            name
            for name, site in sites.items()
            if name not in data_names
            and site.drives is None
            and (site.kind == "latent" or (site.kind == "deterministic" and site.times is not None))
        ]
    else:
        names = list(parameters)
        missing = [name for name in names if name not in sites]
        if missing:
            raise UnknownSiteError(
                "the model has no such site", got=", ".join(missing), expected=", ".join(sites)
            )
    found: dict[str, TestFunction] = {}
    for name in names:
        if sites[name].times is None:
            found[name] = itemgetter(name)
        else:
            found[f"{name}(T)"] = partial(_last, name)
            found[f"mean {name}"] = partial(_mean, name)
    return {**found, **test_functions}


def _last(name: str, values: Mapping[str, Tensor]) -> Tensor:
    return values[name][..., -1, :]


def _mean(name: str, values: Mapping[str, Tensor]) -> Tensor:
    return values[name].mean(-2)


def _checked_draws(draws: Mapping[str, Tensor], num_draws: int) -> dict[str, Tensor]:
    for name, value in draws.items():
        if value.ndim == 0 or value.shape[0] != num_draws:
            raise ShapeError(
                f"infer returned another number of draws of {name!r}",
                got=f"shape {tuple(value.shape)}",
                expected=f"({num_draws}, ...)",
            )
        if bool(value.isnan().any()):
            raise NonFiniteError(f"infer returned NaN among the draws of {name!r}")
    return dict(draws)


def _evaluated(
    model: Callable[..., Any],
    draws: dict[str, Tensor],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    log_joint: bool,
) -> dict[str, Tensor]:
    evaluated = evaluate_draws(model, draws, args, kwargs, seed=None)
    return {**evaluated.values, **({_JOINT: evaluated.log_joint} if log_joint else {})}


def _ranks(label: str, truth: Tensor, draws: Tensor, num_draws: int) -> dict[str, int]:
    """Rank each element of ``truth (1, ...)`` among ``draws (S, ...)``; ties are broken by chance."""
    if truth.shape[:1] != (1,) or draws.shape[:1] != (num_draws,) or truth.shape[1:] != draws.shape[1:]:
        raise ShapeError(
            f"quantity {label!r} must keep the axis of draws",
            got=f"{tuple(draws.shape)} for draws and {tuple(truth.shape)} for the truth",
            expected=f"({num_draws}, ...) and (1, ...)",
        )
    below = (draws < truth).sum(0)
    ties = (draws == truth).sum(0)
    rank = below + (torch.rand(ties.shape) * (ties.cpu() + 1)).long().to(below.device)
    shape = truth.shape[1:]
    flat = rank.flatten().tolist()
    names = [f"{label}[{', '.join(map(str, i))}]" if shape else label for i in np.ndindex(*shape)]
    return dict(zip(names, flat, strict=True))
