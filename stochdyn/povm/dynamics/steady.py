"""Steady states: by long evolution, by minimising the residual, by Gauss-Newton steps, and by their combination."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_seed, check_bool, check_positive_int, check_real
from stochdyn._transforms import recorded
from stochdyn.errors import ConvergenceWarning, InvalidInputError
from stochdyn.povm.ansatz.base import Ansatz
from stochdyn.povm.dynamics.averages import Averages, local_rates
from stochdyn.povm.dynamics.indicators import look_at_state, warn_of_state
from stochdyn.povm.dynamics.methods import TDVP
from stochdyn.povm.dynamics.newton import GaussNewton
from stochdyn.povm.dynamics.stationary import StationaryResidual, spectral_gap
from stochdyn.povm.dynamics.steady_methods import (
    Combined,
    Descent,
    Newton,
    Relaxation,
    SteadyMethod,
    read_steady_method,
)
from stochdyn.povm.dynamics.time_evolution import check_arguments, checked_operator, evolve, expectations
from stochdyn.povm.lindblad.lindbladian import Lindbladian
from stochdyn.povm.master.arguments import read_observables
from stochdyn.povm.master.physicality import Positivity
from stochdyn.run.callbacks import KeepBest
from stochdyn.run.engine import Resumable, as_folder, run_to_end
from stochdyn.run.trainer import fit

__all__ = ["SteadyState", "relaxation_of", "steady_state"]

_MAX_GAP_OUTCOMES = 4096
_OUTPUTS = 41
_FAR = 0.3


@dataclass
class SteadyState:
    r"""The result of :func:`stochdyn.povm.steady_state`.

    Attributes:
        expect: The mean of every observable by name.
        stderr: The standard error of every mean by name, given the state; zero by full summation.
        residual: The rate :math:`\|LP\|_1 = E|\ell|`, which is zero in the steady state only.
        gap: The relaxation rate of the slowest mode, or NaN if unknown.
        gap_source: The origin of the gap: ``"given"``, ``"spectrum"``, ``"relaxation"`` (the decay of the rates over
            the last part of a long evolution, which may be that of a faster mode) or ``"unknown"``.
        history: The series that were minimised or watched, by phase.
        net: The ansatz, in the steady state.
        seconds: The processor time in seconds.
        method: The method by which it was found, with its options.
        positivity: The lowest eigenvalues of two-site density matrices, on the bonds of the model.
    """

    expect: dict[str, complex]
    stderr: dict[str, float]
    residual: float
    gap: float
    gap_source: str
    history: dict[str, Tensor]
    net: Ansatz
    seconds: float
    method: SteadyMethod
    positivity: Positivity | None = field(default=None, repr=False)

    @property
    def error_estimate(self) -> float:
        r"""Estimated distance :math:`\|P-P_\infty\|_1\approx\|LP\|_1/\mathrm{gap}` from the steady state.

        If all that is off were in the slowest mode it would be this; faster modes add less. An estimate, not a bound: the
        generator isn't normal.
        """
        return self.residual / self.gap if self.gap else math.inf


@recorded
def steady_state(
    net: Ansatz,
    model: Lindbladian,
    povm: Any,
    method: str | SteadyMethod | TDVP = "combined",
    num_samples: int | None = 4096,
    observables: Mapping[str, Any] | Sequence[Any] = ("X", "Y", "Z"),
    *,
    gap: float | None = None,
    observe_samples: int | None = None,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> SteadyState:
    r"""Find the steady state :math:`LP=0` of a Lindbladian, in place.

    Args:
        net: The state from which the search starts.
        model: The Lindbladian, constant in time, its parameters bound.
        povm: The frame of all sites, or one for each site.
        method: The way to find it: :class:`~stochdyn.povm.Combined`, :class:`~stochdyn.povm.Relaxation`,
            :class:`~stochdyn.povm.Newton` or :class:`~stochdyn.povm.Descent` with options of their own; or the name of
            one, ``"combined"``, ``"tdvp"``, ``"newton"`` or ``"trapezoid"``, with its defaults.
        num_samples: The number of draws for each estimate; None sums over all outcomes, as in
            :func:`stochdyn.povm.evolve`.
        observables: The observables by name, each as :func:`stochdyn.povm.observable` takes it.
        gap: The relaxation rate of the generator, for the error estimate. If None it is computed for up to 4096
            outcomes, and else taken from the relaxation where there was a long evolution.
        observe_samples: The number of draws for observables and the residual; four times ``num_samples`` if None, at
            least 16384.
        seed: The seed of all random numbers.
        progress: Whether to show progress bars.
        checkpoint: A directory in which evolution and refinement each keep a checkpoint.
        resume: Whether to continue from the checkpoint, to the same bits.

    Returns:
        Observables, the residual, and an estimate of the distance that is left.

    Raises:
        InvalidInputError: If the model depends on time, sizes don't fit or an option is unknown. Before any work.
        LindbladianError: If parameters aren't bound.
        SystemSizeError: If there are too many outcomes for full summation.
        Interrupted: After Ctrl-C, with the result so far of the phase that it came in.

    Warns:
        ConvergenceWarning: If the state is far from standing still, unphysical, or not unique.

    Example:
        >>> from stochdyn.povm import AutoregressiveTransformer, Lindbladian, Tetrahedral
        >>> povm, model = Tetrahedral(), Lindbladian(2, [(1.0, "X", "all")], [(1.0, "sigma-", "all")])
        >>> net = AutoregressiveTransformer(2, layers=1, width=8, heads=2).double().set_product_state(povm, "up")
        >>> found = steady_state(net, model, povm, num_samples=None, observables={"z": "Z"}, progress=False)
        >>> round(found.expect["z"], 4)
        -0.1111

    Reference:
        Luo et al., Phys. Rev. Lett. 128, 090501 (2022) for the residual in the 1-norm.
    """
    check_arguments(net, model, povm)
    chosen = read_steady_method(method)
    if gap is not None:
        check_real(gap, "gap", above=0.0)
    if observe_samples is not None:
        check_positive_int(observe_samples, "observe_samples", 2)
    check_bool(progress, "progress")
    check_bool(resume, "resume")
    seed = as_seed(seed)
    folder = as_folder(checkpoint, resume)
    if model.is_time_dependent:
        raise InvalidInputError("a model that depends on time has no steady state", hint="use evolve")
    scale, slowest = model.rate_scale(), model.relaxation_rate()
    if not slowest > 0:
        raise InvalidInputError("without jumps there is no single steady state", hint="add jumps")
    operator = checked_operator(net, model, povm)
    specs = read_observables(model, observables)
    estimators = {name: spec.estimator(povm, device=net.device) for name, spec in specs.items()}
    averages = Averages(net, operator, num_samples)
    if observe_samples is None and num_samples is not None:
        observe_samples = max(4 * num_samples, 16384)
    clock = time.process_time()
    history: dict[str, Tensor] = {}
    long = _long_run(chosen, slowest, num_samples is None)
    newton = chosen if isinstance(chosen, Newton) else getattr(chosen, "newton", None)
    identity = {"net": net, "model": model, "povm": povm, "num_samples": num_samples, "seed": seed}
    relaxation = math.nan
    if long is not None:
        assert long.horizon is not None
        bound = long.tolerance * scale
        with warnings.catch_warnings():
            # what is said of the way is said of its end below
            warnings.simplefilter("ignore", ConvergenceWarning)
            run = evolve(
                net, model, povm, torch.linspace(0, long.horizon, _OUTPUTS, dtype=torch.float64), long.evolution,
                num_samples, observables, observe_samples=256, seed=seed, progress=progress,
                checkpoint=None if folder is None else folder / "evolution", resume=resume,
                stop=lambda report: report.get("rate", math.inf) < bound,
            )  # fmt: skip
        history["t"], history["rate"] = run.steps["t"], run.steps["rate"]
        if isinstance(chosen, Relaxation):
            relaxation = relaxation_of(run.steps["t"], run.steps["rate"])
    if newton is not None:
        job = _NewtonRun(averages, newton, newton.tolerance * scale, seed)
        place = None if folder is None else folder / "newton"
        history["mean_square"] = run_to_end(
            job, "newton", identity={**identity, "tolerance": newton.tolerance}, randomness=seed, device=net.device,
            progress=progress, checkpoint=place, resume=resume,
        )  # fmt: skip
    if isinstance(chosen, Descent):
        place = None if folder is None else folder / "descent"
        objective = StationaryResidual(averages, chosen.norm, 1 / scale)
        history["loss"] = _descend(objective, chosen, seed, progress, place, resume)
    generator = torch.Generator(device=net.device).manual_seed((seed + 0x57EAD) % 2**62)
    found = expectations(net, estimators, observe_samples, generator)
    value, source = _gap(gap, operator, relaxation)
    bonds: list[tuple[int, ...]] = sorted({place for place in model.bonds if len(place) == 2})
    places = bonds or [(i,) for i in range(model.num_sites)]
    result = SteadyState(
        {name: mean for name, (mean, _) in found.items()},
        {name: error for name, (_, error) in found.items()},
        _residual(net, operator, averages, generator),
        value,
        source,
        history,
        net,
        time.process_time() - clock,
        chosen,
        look_at_state(net, povm, places, observe_samples, seed),
    )
    _warn(result, scale, slowest)
    return result


def _long_run(chosen: SteadyMethod, slowest: float, exact: bool) -> Relaxation | None:
    """Return the evolution that a method takes, its length filled in; None if it takes none."""
    if isinstance(chosen, Relaxation):
        return replace(chosen, horizon=chosen.horizon if chosen.horizon is not None else 20 / slowest)
    if not isinstance(chosen, Combined):
        return None
    if chosen.relaxation is None:
        return Relaxation(1 / slowest, evolution=TDVP(tolerance=1e-2 if exact else None))
    horizon = chosen.relaxation.horizon
    return replace(chosen.relaxation, horizon=horizon if horizon is not None else 1 / slowest)


def _warn(found: SteadyState, scale: float, slowest: float) -> None:
    """Say what a steady state is known to be off by.

    Warns:
        ConvergenceWarning: If it is unphysical, far from standing still, or not the only one.
    """
    warn_of_state(found.positivity, stacklevel=5)
    if found.gap_source == "spectrum" and found.gap < 1e-9 * scale:
        said = f"the steady state isn't unique: the slowest mode relaxes at a rate of {found.gap:.1g}"
    elif math.isfinite(found.error_estimate) and found.error_estimate > _FAR:
        said = f"the state is some {found.error_estimate:.2g} from the steady one (residual over gap)"
    elif not math.isfinite(found.error_estimate) and found.residual > _FAR * slowest:
        said = (
            f"the state doesn't stand still: its residual is {found.residual / slowest:.2g} times the jump rate, "
            "and no error can be estimated"
        )
    else:
        return
    warnings.warn(
        f"{said}; take more samples, a longer horizon, more iterations, or another ansatz",
        ConvergenceWarning,
        stacklevel=4,
    )


def _residual(net: Ansatz, operator: Any, averages: Averages, generator: torch.Generator) -> float:
    """The 1-norm of the rate of change, over fresh outcomes."""
    batch = averages.draw(generator)
    return float(batch.weights @ local_rates(net, operator, batch.outcomes).abs())


def _gap(given: float | None, operator: Any, relaxation: float) -> tuple[float, str]:
    if given is not None:
        return float(given), "given"
    if operator.num_states <= _MAX_GAP_OUTCOMES:
        return spectral_gap(operator), "spectrum"
    return (relaxation, "relaxation") if math.isfinite(relaxation) else (math.nan, "unknown")


def relaxation_of(t: Tensor, rate: Tensor) -> float:
    """Return how fast rates fall, the slope of their logarithm over the last half of the time in which they do, or NaN.

    By sampling the rates end on a floor of what the ansatz can't follow, which says nothing about the relaxation.

    Args:
        t: The times ``(n,)`` of the steps.
        rate: The rate of change ``(n,)`` of the state at each of them.
    """
    # what the rates end on; only times well above it say how fast they fall
    floor = rate[t > 0.75 * t[-1]].median()
    above = ((rate > 4 * floor) & (rate > 0)).nonzero()[:, 0]
    if len(above) == 0:
        return math.nan
    end = t[above[-1]]
    late = (t > end / 2) & (t <= end) & (rate > 0)
    if int(late.sum()) < 4:
        return math.nan
    # least squares for the slope of log rate over time
    x, y = t[late] - t[late].mean(), rate[late].log()
    slope = float((x * (y - y.mean())).sum() / x.square().sum())
    return -slope if slope < 0 else math.nan


class _NewtonRun(Resumable[Tensor]):
    """Newton steps until the rates are small; random numbers of each follow from the seed and its number."""

    def __init__(self, averages: Averages, method: Newton, bound: float, seed: int) -> None:
        self.averages, self.net, self.bound, self.seed = averages, averages.net, bound, seed
        self.total = method.max_iterations
        self.solver = GaussNewton(averages)
        self.history: list[float] = []
        self.best, self.best_y = math.inf, self.net.parameter_vector()
        self.refused, self.mean_absolute = 0, math.nan

    @property
    def finished(self) -> bool:
        """Whether the rates are small, the steps are used up, or several in a row were refused."""
        enough = 2 if self.averages.num_samples is None else 4
        small = bool(self.history) and self.history[-1] < self.bound**2
        assert self.total is not None
        return self.number >= self.total or small or self.refused == enough

    def step(self) -> None:
        """Take one Newton step, and keep the parameters before it if their rates were the smallest so far."""
        before = self.net.parameter_vector()
        generator = torch.Generator(device=self.net.device)
        generator.manual_seed((self.seed + 7919 * len(self.history)) % 2**62)
        step = self.solver.step(generator)
        self.history.append(step.mean_square)
        if step.mean_square < self.best:
            self.best, self.best_y = step.mean_square, before
        self.mean_absolute = step.mean_absolute
        self.refused = 0 if step.accepted else self.refused + 1

    def describe(self) -> dict[str, str]:
        """Return the residual, for the progress bar."""
        return {"residual": f"{self.mean_absolute:.3g}"}

    def state(self) -> dict[str, Any]:
        """Return everything that a checkpoint needs to go on to the same bits."""
        return {
            "net": dict(self.net.state_dict()),
            "history": list(self.history),
            "damping": self.solver.damping,
            "best": self.best,
            "best_y": self.best_y,
            "refused": self.refused,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.net.load_state_dict(state["net"])
        self.history, self.solver.damping = list(state["history"]), state["damping"]
        self.best, self.best_y = state["best"], state["best_y"].to(self.net.device)
        self.refused = state["refused"]

    def report(self) -> Tensor:
        """Return the history; by full summation the best iterate is put in place."""
        if self.averages.num_samples is None:
            final = self.averages.draw()
            rates = local_rates(self.net, self.averages.operator, final.outcomes)
            if float(final.weights @ rates.square()) > self.best:
                self.net.set_parameter_vector(self.best_y)
        return torch.tensor(self.history, dtype=torch.float64)


def _descend(
    objective: StationaryResidual,
    method: Descent,
    seed: int,
    progress: bool,
    folder: Path | None,
    resume: bool,
) -> Tensor:
    """Minimise the residual by the common training loop, and keep the best iterate."""
    looks = KeepBest(every=max(1, method.steps // 60), metric=lambda o: o().loss)
    result = fit(
        objective, None, method.steps, method.lr, seed=seed, progress=progress, checkpoint=folder, resume=resume,
        callbacks=[looks], optimizer=_Adam(), scheduler=_Cosine(method.steps), distributed=False,
    )  # fmt: skip
    return torch.as_tensor(result.losses).double()


class _Adam:
    """The optimiser of the paper's code."""

    def __call__(self, parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.98), eps=1e-9)


class _Cosine:
    """A learning rate that falls to zero along a cosine."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def __call__(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
