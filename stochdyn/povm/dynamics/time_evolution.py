"""Evolution of a variational state in time, by any of three methods."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import (
    as_seed,
    check_bool,
    check_callable,
    check_not_frozen,
    check_positive_int,
    check_type,
)
from stochdyn._transforms import recorded
from stochdyn.core.forward.outcomes import all_configurations
from stochdyn.errors import InvalidInputError, NonFiniteError
from stochdyn.povm.ansatz.base import Ansatz
from stochdyn.povm.dynamics.averages import Averages
from stochdyn.povm.dynamics.evolution import Evolution, Record
from stochdyn.povm.dynamics.indicators import look_at_state, warn_of_state, warn_of_steps
from stochdyn.povm.dynamics.methods import Method, Problem, Step, read_method
from stochdyn.povm.frames.lattice_observables import Estimator
from stochdyn.povm.lindblad.lindbladian import Lindbladian
from stochdyn.povm.master.arguments import as_times, check_frame, check_model, read_observables
from stochdyn.povm.master.density import check_bound
from stochdyn.povm.master.schedule import make_schedule
from stochdyn.run.engine import Resumable, run_to_end

__all__ = ["checked_operator", "evolve", "expectations"]

_LISTABLE = 1 << 18
_OBSERVE_SEED = 0x0B5E


@recorded
def evolve(
    net: Ansatz,
    model: Lindbladian,
    povm: Any,
    ts: Tensor | Sequence[float],
    method: str | Method = "tdvp",
    num_samples: int | None = 4096,
    observables: Mapping[str, Any] | Sequence[Any] = ("X", "Y", "Z"),
    *,
    observe_samples: int | None = None,
    max_step: float | None = None,
    breaks: Sequence[float] = (),
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every: int = 20,
    stop: Callable[[dict[str, float]], bool] | None = None,
) -> Evolution:
    r"""Move a variational state along a master equation, :math:`\dot P = LP`, in place.

    Args:
        net: The state at the first time, such as after :meth:`Ansatz.set_product_state`. Put it in float64 for accuracy
            better than about 1e-3.
        model: The Lindbladian, its parameters bound.
        povm: The frame of all sites, or one for each site.
        ts: The output times ``(T,)``, strictly increasing; observables are taken at each, also at the first.
        method: The way to take a step: :class:`~stochdyn.povm.TDVP`, :class:`~stochdyn.povm.Trapezoid` or
            :class:`~stochdyn.povm.Fit` with options of their own, or the name of one, ``"tdvp"``, ``"trapezoid"`` or
            ``"fit"``, with its defaults.
        num_samples: The number of draws for each estimate; None sums over all outcomes, without any randomness, for up
            to 16384 outcomes that symmetry of state and model doesn't relate (7 sites without symmetry).
        observables: The observables by name, each as :func:`stochdyn.povm.observable` takes it: ``"Z"`` is the mean
            over sites, ``"ZZ"`` over the model's bonds, ``("ZZ", (0, 1))`` on two sites. They run along on the progress
            bar.
        observe_samples: The number of draws for observables; four times ``num_samples`` if None, at least 16384.
        max_step: The longest step, for pulses shorter than 1/4096 of the span.
        breaks: The times where coefficients aren't smooth; jumps are found without.
        seed: The seed of all random numbers.
        progress: Whether to show a progress bar.
        checkpoint: A directory for checkpoints, which is made if need be.
        resume: Whether to continue the run in ``checkpoint``, to the same bits as if it had never stopped; a fresh run
            if there is none.
        checkpoint_every: The number of steps between saves.
        stop: A function that is called after every step with what it reports (see ``Evolution.steps``); true ends the
            run there, with the times reached so far.

    Returns:
        Expectations, their errors, residuals and states at the times.

    Raises:
        TimeGridError: If the times don't increase.
        LindbladianError: If a rate is negative at some time, or parameters aren't bound.
        SystemSizeError: If there are too many outcomes for full summation.
        InvalidInputError: If sizes don't fit, or the method is unknown. All before any work.
        NonFiniteError: If a step leaves parameters that aren't finite; the state is that before the step.
        ForeignCheckpointError: If the checkpoint belongs to another run: of another model, frame, observable or method.
        Interrupted: After Ctrl-C, with the result so far; the checkpoint holds the last whole step.

    Warns:
        ConvergenceWarning: If the ansatz can't follow the change (a residual of one), if two-site density matrices have
            negative eigenvalues, or if the strings of the ansatz aren't symmetries of the model.

    Example:
        >>> from stochdyn.povm import AutoregressiveTransformer, Lindbladian, Tetrahedral
        >>> povm, model = Tetrahedral(), Lindbladian(2, [(1.0, "X", "all")], [(1.0, "sigma-", "all")])
        >>> net = AutoregressiveTransformer(2, layers=1, width=8, heads=2).double().set_product_state(povm, "up")
        >>> run = evolve(net, model, povm, [0.0, 0.5], num_samples=None, observables={"z": "Z"}, progress=False)
        >>> [round(z, 2) for z in run.expect["z"].tolist()]
        [1.0, -0.03]

    Reference:
        Luo et al., Phys. Rev. Lett. 128, 090501 (2022); Reh et al., Phys. Rev. Lett. 127, 230501 (2021).
    """
    check_arguments(net, model, povm)
    times = as_times(ts, "ts", 2)
    chosen = read_method(method)
    check_bool(progress, "progress")
    seed = as_seed(seed)
    if observe_samples is not None:
        check_positive_int(observe_samples, "observe_samples", 2)
    if stop is not None:
        check_callable(stop, "stop")
    specs = read_observables(model, observables)
    schedule = make_schedule(model, times, max_step=max_step, breaks=breaks)
    operator = checked_operator(net, model, povm)
    estimators = {name: spec.estimator(povm, device=net.device) for name, spec in specs.items()}
    averages = Averages(net, operator, num_samples, chosen.stratified)
    if observe_samples is None and num_samples is not None:
        observe_samples = max(4 * num_samples, 16384)
    looks = times.tolist() if len(times) > 8 else torch.linspace(times[0], times[-1], 33).tolist()
    problem = Problem(averages, schedule, model.rate_scale(looks), seed, model.is_time_dependent)
    job = _Run(problem, chosen, times, estimators, observe_samples)
    identity = {
        "net": net,
        "model": model,
        "povm": povm,
        "method": chosen,
        "num_samples": num_samples,
        "observe_samples": observe_samples,
        "ts": times,
        "observables": specs,
        "max_step": max_step,
        "breaks": breaks,
        "seed": seed,
    }
    result = run_to_end(
        job,
        "evolve",
        identity=identity,
        randomness=seed,
        device=net.device,
        progress=progress,
        checkpoint=checkpoint,
        resume=resume,
        checkpoint_every=checkpoint_every,
        stop=None if stop is None else lambda run: stop(run.last),
    )
    bonds: list[tuple[int, ...]] = sorted({place for place in model.bonds if len(place) == 2})
    places = bonds or [(i,) for i in range(model.num_sites)]
    result.positivity = look_at_state(net, povm, places, observe_samples, seed)
    warn_of_steps(result, stacklevel=4)
    warn_of_state(result.positivity, stacklevel=4)
    return result


class _Run(Resumable[Evolution]):
    """An evolution under way."""

    unit = "t"

    def __init__(
        self,
        problem: Problem,
        method: Method,
        times: Tensor,
        estimators: Mapping[str, Estimator],
        observe_samples: int | None,
    ) -> None:
        self.net, self.method, self.grid = problem.averages.net, method, times
        self.problem, self.times = problem, times.tolist()
        self.stepper = method.stepper(problem)
        self.record = Record(list(estimators))
        self.estimators, self.observe_samples = estimators, observe_samples
        self.t, self.worst, self.place = self.times[0], 0.0, 0
        self.last: dict[str, float] = {}
        self.total = self.times[-1] - self.times[0]

    @property
    def position(self) -> float:
        """The time that has passed."""
        return self.t - self.times[0]

    @property
    def finished(self) -> bool:
        """Whether the last output time is reached."""
        return len(self.record.residual) == len(self.times)

    def start(self) -> None:
        """Take the observables at the first time."""
        if not self.record.residual:
            self._observe()

    def step(self) -> None:
        """Take one step of the method, to the next output time or break at most."""
        segment = self.problem.schedule.segments[self.place]
        self.t = max(self.t, segment.start)  # a jump of a coefficient has two sides
        number, longest = self.number, segment.end - self.t
        step = self.stepper.step(number, self.t, longest) if longest > 0 else Step(0.0, 0.0, {})
        if not bool(torch.isfinite(self.net.parameter_vector()).all()):
            raise NonFiniteError(
                f"step {number + 1} from t={self.t:g} left parameters that aren't finite",
                hint="take smaller steps, more samples or a larger rcond",
            )
        reached = step.taken >= longest * (1 - 1e-12)
        self.t = segment.end if reached else self.t + step.taken
        self.worst = max(self.worst, step.residual)
        self.last = {"t": self.t, "residual": step.residual, **step.report}
        if longest > 0:
            self.record.add_step(self.last)
        if reached:
            self.place += 1
            if segment.output is not None:
                self._observe()

    def _observe(self) -> None:
        """Take the observables at a time that was reached."""
        index = len(self.record.residual)
        generator = torch.Generator(device=self.net.device)
        generator.manual_seed((self.problem.seed * _OBSERVE_SEED + index + (1 << 61)) % 2**62)
        values = expectations(self.net, self.estimators, self.observe_samples, generator)
        self.record.observe(values, self.worst, self.net.parameter_vector())
        self.worst = 0.0

    def describe(self) -> dict[str, str]:
        """Return the time and the observables, for the progress bar."""
        shown = {name: f"{values[-1]:.4f}" for name, values in self.record.means.items() if values}
        return {"t": f"{self.t:.3g}", **shown}

    def state(self) -> dict[str, Any]:
        """Return everything that a checkpoint needs to go on to the same bits."""
        return {
            "net": dict(self.net.state_dict()),
            "stepper": self.stepper.state_dict(),
            "record": self.record.state_dict(),
            "t": self.t,
            "worst": self.worst,
            "place": self.place,
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state` returned."""
        self.net.load_state_dict(state["net"])
        self.stepper.load_state_dict(state["stepper"])
        self.record.load_state_dict(state["record"])
        self.t, self.worst, self.place = state["t"], state["worst"], state["place"]

    def report(self) -> Evolution:
        """Return the evolution so far."""
        return self.record.result(self.grid, self.net, self.method, self.seconds)


def expectations(
    net: Ansatz,
    estimators: Mapping[str, Estimator],
    num_samples: int | None,
    generator: torch.Generator | None = None,
) -> dict[str, tuple[complex, float]]:
    """Return mean and standard error of observables in a state.

    Args:
        net: The variational state.
        estimators: The functions of outcomes whose means are wanted, by name.
        num_samples: The number of stratified draws, whose standard error is that of independent ones and so an upper
            bound; None sums over all outcomes.
        generator: The source of randomness.
    """
    with torch.no_grad():
        if num_samples is None:
            net.check_listable(_LISTABLE)
            every = all_configurations(net.num_sites, net.num_outcomes, net.device)
            p = net.log_prob(every).double().exp()
            values = {name: estimator(every) for name, estimator in estimators.items()}
            # <O> = sum_a P(a) o(a)
            return {name: ((p.to(v.dtype) @ v).item(), 0.0) for name, v in values.items()}
        a, _ = net.sample(num_samples, generator=generator, stratified=True)
        found: dict[str, tuple[complex, float]] = {}
        for name, estimator in estimators.items():
            values_at = estimator(a)
            found[name] = (values_at.mean().item(), float(values_at.std() / num_samples**0.5))
        return found


def check_arguments(net: object, model: object, povm: object) -> None:
    """Raise unless state, model and frame are what their names say, with all parameters bound."""
    check_type(net, Ansatz, "net", hint="such as stochdyn.povm.AutoregressiveTransformer(num_sites)")
    check_model(model)
    check_frame(povm)
    assert isinstance(net, Ansatz)
    check_not_frozen(net.parameters())
    assert isinstance(model, Lindbladian)
    check_bound(model)


def checked_operator(net: Ansatz, model: Lindbladian, povm: Any) -> Any:
    """Return the master equation of a model, on the device of the ansatz, if all fit together.

    Raises:
        InvalidInputError: If numbers of sites or outcomes differ.
    """
    if net.num_sites != model.num_sites:
        raise InvalidInputError(
            "ansatz and model differ in their number of sites", got=net.num_sites, expected=model.num_sites
        )
    operator = model.master_operator(povm)
    if operator.num_outcomes != net.num_outcomes:
        raise InvalidInputError(
            "ansatz and frame differ in their number of outcomes",
            got=net.num_outcomes,
            expected=operator.num_outcomes,
            hint="give num_outcomes to the ansatz",
        )
    return operator.to(net.device)
