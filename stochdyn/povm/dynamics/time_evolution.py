"""Evolution of a variational state in time, by any of three methods."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from stochdyn._checks import check_positive_int, check_time_grid
from stochdyn.core.forward.outcomes import all_configurations
from stochdyn.errors import InvalidInputError, NonFiniteError
from stochdyn.povm.ansatz.base import Ansatz
from stochdyn.povm.dynamics.averages import Averages
from stochdyn.povm.dynamics.evolution import Evolution, EvolutionInterrupted, Record
from stochdyn.povm.dynamics.options import read_options
from stochdyn.povm.dynamics.steppers import Stepper, make_stepper
from stochdyn.povm.frames.lattice_observables import Estimator
from stochdyn.povm.frames.lattice_observables import observables as read_observables
from stochdyn.povm.lindblad.lindbladian import Lindbladian
from stochdyn.run.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from stochdyn.run.folder import prepare_folder
from stochdyn.run.identity import check_same_run, fingerprint
from stochdyn.run.interrupt import DeferredInterrupt

__all__ = ["checked_operator", "evolve", "expectations"]

_LISTABLE = 1 << 18
_OBSERVE_SEED = 0x0B5E
_CLOSE = 1e-9


def evolve(
    net: Ansatz,
    model: Lindbladian,
    povm: Any,
    times: Tensor | Sequence[float],
    method: str = "tdvp",
    num_samples: int | None = 4096,
    observables: Mapping[str, Any] | Sequence[Any] = ("X", "Y", "Z"),
    *,
    observe_samples: int | None = None,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    checkpoint_every: int = 20,
    stop: Callable[[dict[str, float]], bool] | None = None,
    **options: Any,
) -> Evolution:
    r"""Move a variational state along a master equation, :math:`\dot P = LP`, in place.

    * ``"tdvp"``: the time-dependent variational principle, :math:`S\dot\theta = F` with the Fisher metric
      (:func:`~stochdyn.povm.dynamics.tdvp.solve_velocity`), by Heun's method with its step controlled in that metric.
      The method to begin with.
    * ``"trapezoid"``: the forward-backward trapezoid method of the paper, every step a minimisation of the residual
      of :math:`(1-\tfrac h2L)P_{t+h} = (1+\tfrac h2L)P_t` in the 1-norm or weighted 2-norm.
    * ``"fit"``: explicit steps of second order, each fitted to its target by a weighted divergence.

    Args:
        net: the state at ``times[0]``, such as after :meth:`Ansatz.set_product_state`. Put it in float64 for accuracy
            better than about 1e-3.
        model: the Lindbladian.
        povm: the frame, or one a site.
        times: ``(T,)`` strictly increasing; observables are taken at each, also at the first.
        method: ``"tdvp"``, ``"trapezoid"`` or ``"fit"``.
        num_samples: draws for each estimate; None sums over all outcomes, without any randomness, for up to 16384
            outcomes that symmetry of state and model doesn't relate (7 sites without symmetry).
        observables: by name, see :func:`stochdyn.povm.observable`: ``"Z"`` is the mean over sites, ``"ZZ"`` over the
            model's bonds, ``("ZZ", (0, 1))`` on two sites. They run along on the progress bar.
        observe_samples: draws for observables; four times ``num_samples`` if None, at least 16384.
        seed: of all random numbers.
        progress: show a bar.
        checkpoint: directory for checkpoints, made if need be.
        resume: continue the run in ``checkpoint`` to the same bits as if it had never stopped; a fresh run if there
            is none.
        checkpoint_every: steps between saves; each of the times is saved too.
        stop: called after every step with what it reports (see ``Evolution.steps``); true ends the run there, with the
            times reached so far.
        options: of the method: :class:`~stochdyn.povm.dynamics.options.TDVPOptions`,
            :class:`~stochdyn.povm.dynamics.options.TrapezoidOptions`, :class:`~stochdyn.povm.dynamics.options.FitOptions`.

    Returns:
        Expectations, their errors, residuals and states at the times.

    Raises:
        TimeGridError: if the times don't increase.
        LindbladianError: if a rate that depends on time is negative at one of them.
        SystemSizeError: if there are too many outcomes for full summation.
        InvalidInputError: if sizes don't fit, or method or options are unknown. All before any work.
        NonFiniteError: if a step leaves parameters that aren't finite; the state is that before the step.
        ForeignCheckpointError: if the checkpoint belongs to another run.
        EvolutionInterrupted: after Ctrl-C, with the result so far; the checkpoint holds the last whole step.

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
    ts = torch.as_tensor(times, dtype=torch.float64)
    check_time_grid(ts, "times")
    model.check_rates(ts.tolist())
    check_positive_int(checkpoint_every, "checkpoint_every")
    chosen = read_options(method, options)
    operator = checked_operator(net, model, povm)
    specs = read_observables(observables, model.num_sites, dim=model.dim, bonds=model.bonds)
    estimators = {name: spec.estimator(povm, device=net.device) for name, spec in specs.items()}
    averages = Averages(net, operator, num_samples, chosen.stratified)
    if observe_samples is None and num_samples is not None:
        observe_samples = max(4 * num_samples, 16384)
    if resume and checkpoint is None:
        raise InvalidInputError("resume=True needs the directory of the run", hint="pass checkpoint=...")
    stepper = make_stepper(chosen, net, operator, averages, seed, model.is_time_dependent)
    run = _Run(net, ts, stepper, Record(list(estimators)), estimators, observe_samples, seed, stop)
    if checkpoint is not None:
        identity = {
            "method": method,
            "options": repr(chosen),
            "num_samples": repr(num_samples),
            "observe_samples": repr(observe_samples),
            "times": repr(ts.tolist()),
            "observables": repr(list(estimators)),
            "seed": repr(seed),
        }
        run.open_checkpoint(Path(checkpoint), identity, resume, checkpoint_every)
    with DeferredInterrupt() as interrupt:
        finished = run.go(progress, interrupt)
    result = run.record.result(ts, net, method, chosen)
    if not finished:
        raise EvolutionInterrupted(f"stopped at t={run.t:g} after step {run.number}", result)
    return result


class _Run:
    """An evolution under way."""

    def __init__(
        self,
        net: Ansatz,
        times: Tensor,
        stepper: Stepper,
        record: Record,
        estimators: Mapping[str, Estimator],
        observe_samples: int | None,
        seed: int,
        stop: Callable[[dict[str, float]], bool] | None,
    ) -> None:
        self.stop = stop
        self.net, self.times, self.stepper, self.record = net, times.tolist(), stepper, record
        self.estimators, self.observe_samples, self.seed = estimators, observe_samples, seed
        self.t, self.number, self.worst = self.times[0], 0, 0.0
        self.folder: Path | None = None
        self.every = 0

    def open_checkpoint(self, folder: Path, identity: dict[str, str], resume: bool, every: int) -> None:
        """Make sure that saving will succeed, and continue from what is there if asked to."""
        prepare_folder(folder)
        self.folder, self.every = folder, every
        self.identity = {**identity, **fingerprint(self.net)}
        content = read_checkpoint(folder) if resume else None
        if content is None:
            return
        check_same_run(folder, {"kind": content.kind}, {"kind": "evolution"})
        check_same_run(folder, content.identity, self.identity)
        state = content.state
        self.net.load_state_dict(state["net"])
        self.stepper.load_state_dict(state["stepper"])
        self.record.load_state_dict(state["record"])
        self.t, self.number, self.worst = state["t"], content.step, state["worst"]

    def save(self) -> None:
        """Write a checkpoint, if there is to be one."""
        if self.folder is None:
            return
        state = {
            "net": dict(self.net.state_dict()),
            "stepper": self.stepper.state_dict(),
            "record": self.record.state_dict(),
            "t": self.t,
            "worst": self.worst,
        }
        write_checkpoint(self.folder, Checkpoint("evolution", self.number, self.identity, state))

    def observe(self) -> None:
        """Take the observables at a time that was reached."""
        index = len(self.record.residual)
        generator = torch.Generator(device=self.net.device)
        generator.manual_seed((self.seed * _OBSERVE_SEED + index + (1 << 61)) % 2**62)
        values = expectations(self.net, self.estimators, self.observe_samples, generator)
        self.record.observe(values, self.worst, self.net.parameter_vector())
        self.worst = 0.0

    def go(self, progress: bool, interrupt: DeferredInterrupt) -> bool:
        """Run to the end; return False if interrupted before."""
        clock = time.process_time()
        spent = self.record.seconds
        first, last = self.times[0], self.times[-1]
        with tqdm(total=last - first, disable=not progress, unit="t", bar_format=_BAR) as bar:
            bar.update(self.t - first)
            if not self.record.residual:
                self.observe()
            while len(self.record.residual) < len(self.times):
                target = self.times[len(self.record.residual)]
                report = self._advance(target)
                reached = target - self.t <= _CLOSE * max(1.0, abs(target))
                if reached:
                    self.t = target
                    self.observe()
                self.record.seconds = spent + time.process_time() - clock
                bar.n = self.t - first
                bar.set_postfix({n: f"{v[-1]:.4f}" for n, v in self.record.means.items()}, refresh=True)
                if reached or (self.every and self.number % self.every == 0) or interrupt.requested:
                    self.save()
                if self.stop is not None and self.stop(report):
                    self.save()
                    break
                if interrupt.requested and len(self.record.residual) < len(self.times):
                    return False
        return True

    def _advance(self, target: float) -> dict[str, float]:
        before = self.net.parameter_vector()
        step = self.stepper.step(self.number, self.t, target - self.t)
        if not bool(torch.isfinite(self.net.parameter_vector()).all()):
            self.net.set_parameter_vector(before)
            raise NonFiniteError(
                f"step {self.number + 1} from t={self.t:g} left parameters that aren't finite",
                hint="take smaller steps, more samples or a larger rcond",
            )
        self.number += 1
        self.t += step.taken
        self.worst = max(self.worst, step.residual)
        report = {"t": self.t, "residual": step.residual, **step.report}
        self.record.add_step(report)
        return report


_BAR = "{l_bar}{bar}| t={n:.3g} of {total:.3g} [{elapsed}<{remaining}{postfix}]"


def expectations(
    net: Ansatz,
    estimators: Mapping[str, Estimator],
    num_samples: int | None,
    generator: torch.Generator | None = None,
) -> dict[str, tuple[float, float]]:
    """Return mean and standard error of observables in a state.

    Args:
        net: the state.
        estimators: by name.
        num_samples: stratified draws, whose standard error is that of independent ones and so an upper bound; None
            sums over all outcomes.
        generator: source of randomness.
    """
    with torch.no_grad():
        if num_samples is None:
            net.check_listable(_LISTABLE)
            every = all_configurations(net.num_sites, net.num_outcomes, net.device)
            p = net.log_prob(every).double().exp()
            return {name: (float(p @ estimator(every)), 0.0) for name, estimator in estimators.items()}
        a, _ = net.sample(num_samples, generator=generator, stratified=True)
        found = {}
        for name, estimator in estimators.items():
            values = estimator(a)
            found[name] = (float(values.mean()), float(values.std() / num_samples**0.5))
        return found


def checked_operator(net: Ansatz, model: Lindbladian, povm: Any) -> Any:
    """Return the master equation of a model, on the device of the ansatz, if all fit together.

    Raises:
        InvalidInputError: if numbers of sites or outcomes differ.
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
