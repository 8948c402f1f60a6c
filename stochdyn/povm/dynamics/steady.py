"""Steady states: by long evolution, by minimising the residual, by Gauss-Newton steps, and by their combination."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from stochdyn._checks import check_choice, check_positive, check_positive_int
from stochdyn.errors import InvalidInputError
from stochdyn.povm.ansatz.base import Ansatz
from stochdyn.povm.dynamics.averages import Averages, local_rates
from stochdyn.povm.dynamics.newton import GaussNewton
from stochdyn.povm.dynamics.stationary import StationaryResidual, spectral_gap
from stochdyn.povm.dynamics.time_evolution import checked_operator, evolve, expectations
from stochdyn.povm.frames.lattice_observables import observables as read_observables
from stochdyn.povm.lindblad.lindbladian import Lindbladian
from stochdyn.run.callbacks import KeepBest
from stochdyn.run.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from stochdyn.run.folder import prepare_folder
from stochdyn.run.identity import check_same_run, fingerprint
from stochdyn.run.trainer import fit

__all__ = ["SteadyState", "steady_state"]

_METHODS = ("combined", "tdvp", "newton", "trapezoid")
_MAX_GAP_OUTCOMES = 4096


@dataclass
class SteadyState:
    r"""The result of :func:`stochdyn.povm.steady_state`.

    Attributes:
        expect: by name, means of the observables.
        stderr: by name, their standard errors given the state; zero by full summation.
        residual: :math:`\|LP\|_1 = E|\ell|`, which is zero in the steady state only.
        gap: relaxation rate of the slowest mode, or NaN if unknown.
        gap_source: ``"given"``, ``"spectrum"``, ``"relaxation"`` (the decay of the rates over the last part of a long
            evolution, which may be that of a faster mode) or ``"unknown"``.
        history: of what was minimised or watched, by phase.
        net: the ansatz, in the steady state.
        seconds: processor time.
    """

    expect: dict[str, float]
    stderr: dict[str, float]
    residual: float
    gap: float
    gap_source: str
    history: dict[str, Tensor]
    net: Ansatz
    seconds: float
    options: Any = field(default=None, repr=False)

    @property
    def error_estimate(self) -> float:
        r"""Estimated distance :math:`\|P-P_\infty\|_1\approx\|LP\|_1/\mathrm{gap}` from the steady state.

        If all that is off were in the slowest mode it would be this; faster modes add less. An estimate, not a bound: the
        generator isn't normal.
        """
        return self.residual / self.gap


def steady_state(
    net: Ansatz,
    model: Lindbladian,
    povm: Any,
    method: str = "combined",
    num_samples: int | None = 4096,
    observables: Mapping[str, Any] | Sequence[Any] = ("X", "Y", "Z"),
    *,
    duration: float | None = None,
    rate_tolerance: float = 1e-6,
    iterations: int | None = None,
    norm: str = "l1",
    lr: float = 5e-3,
    gap: float | None = None,
    observe_samples: int | None = None,
    seed: int = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    **options: Any,
) -> SteadyState:
    r"""Find the steady state :math:`LP=0` of a Lindbladian, in place.

    * ``"tdvp"``: evolution by the variational principle for a time ``duration``, or until the rates
      :math:`\sqrt{E\ell^2}` fall below ``rate_tolerance``.
    * ``"newton"``: damped Gauss-Newton steps on :math:`E\ell^2` (:class:`~stochdyn.povm.dynamics.newton.GaussNewton`). From a
      product state it usually needs 20 to 30 steps, hundreds of times fewer than gradient descent.
    * ``"combined"``: a short evolution, from which Gauss-Newton steps can't miss, and then those.
    * ``"trapezoid"``: gradient descent (:func:`stochdyn.fit` with Adam) on the stationary residual of the
      forward-backward trapezoid method, in the 1-norm or weighted 2-norm. The best iterate is kept.

    Args:
        net: where to start.
        model: constant in time.
        povm: the frame, or one a site.
        method: ``"combined"``, ``"tdvp"``, ``"newton"`` or ``"trapezoid"``.
        num_samples: draws for each estimate; None sums over all outcomes, see :func:`stochdyn.povm.evolve`.
        observables: by name, see :func:`stochdyn.povm.observable`.
        duration: of the evolution; 20 for ``"tdvp"``, 1 for ``"combined"`` if None.
        rate_tolerance: rates at which evolution or Newton steps stop.
        iterations: Newton steps (30 if None) or gradient steps (600 if None).
        norm: ``"l1"`` or ``"l2"``, of ``"trapezoid"``.
        lr: learning rate of ``"trapezoid"``, which falls along a cosine.
        gap: of the generator, for the error estimate. If None it is computed for up to 4096 outcomes, and else taken from
            the relaxation where there was a long evolution.
        observe_samples: draws for observables and the residual; four times ``num_samples`` if None, at least 16384.
        seed: of all random numbers.
        progress: show bars.
        checkpoint: directory; evolution and refinement each keep a checkpoint in it.
        resume: continue from there, to the same bits.
        options: of the evolution, see :class:`~stochdyn.povm.dynamics.options.TDVPOptions`.

    Returns:
        Observables, the residual, and an estimate of the distance that is left.

    Raises:
        InvalidInputError: if the model depends on time, sizes don't fit or an option is unknown. Before any work.
        SystemSizeError: if there are too many outcomes for full summation.

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
    check_choice(method, _METHODS, "method")
    check_choice(norm, ("l1", "l2"), "norm")
    for name, value in (("duration", duration), ("lr", lr), ("gap", gap), ("rate_tolerance", rate_tolerance)):
        if value is not None:
            check_positive(value, name)
    if iterations is not None:
        check_positive_int(iterations, "iterations")
    if model.is_time_dependent:
        raise InvalidInputError("a model that depends on time has no steady state", hint="use evolve")
    operator = checked_operator(net, model, povm)
    specs = read_observables(observables, model.num_sites, dim=model.dim, bonds=model.bonds)
    estimators = {name: spec.estimator(povm, device=net.device) for name, spec in specs.items()}
    averages = Averages(net, operator, num_samples)
    if observe_samples is None and num_samples is not None:
        observe_samples = max(4 * num_samples, 16384)
    folder = None if checkpoint is None else Path(checkpoint)
    clock = time.process_time()
    history: dict[str, Tensor] = {}
    relaxation = math.nan
    if method in ("tdvp", "combined"):
        length = duration if duration is not None else (20.0 if method == "tdvp" else 1.0)
        if method == "combined" and num_samples is None:
            options.setdefault("tolerance", 1e-2)
        marks = torch.linspace(0, length, max(2, round(2 * length) + 1), dtype=torch.float64)
        run = evolve(
            net, model, povm, marks, "tdvp", num_samples, observables, observe_samples=256, seed=seed,
            progress=progress, checkpoint=None if folder is None else folder / "evolution", resume=resume,
            stop=lambda report: report.get("rate", math.inf) < rate_tolerance, **options,
        )  # fmt: skip
        history["t"], history["rate"] = run.steps["t"], run.steps["rate"]
        relaxation = _decay(run.steps["t"], run.steps["rate"]) if method == "tdvp" else math.nan
    elif options:
        raise InvalidInputError(f"method {method!r} has no option {sorted(options)[0]!r}")
    if method in ("newton", "combined"):
        place = None if folder is None else folder / "newton"
        history["mean_square"] = _newton(
            net, operator, averages, iterations or 30, rate_tolerance, seed, progress, place, resume
        )
    if method == "trapezoid":
        place = None if folder is None else folder / "descent"
        history["loss"] = _descend(
            StationaryResidual(net, operator, averages, norm),
            iterations or 600,
            lr,
            seed,
            progress,
            place,
            resume,
        )
    generator = torch.Generator(device=net.device).manual_seed((seed + 0x57EAD) % 2**62)
    found = expectations(net, estimators, observe_samples, generator)
    residual = _residual(net, operator, averages, generator)
    value, source = _gap(gap, operator, relaxation)
    return SteadyState(
        {name: mean for name, (mean, _) in found.items()},
        {name: error for name, (_, error) in found.items()},
        residual,
        value,
        source,
        history,
        net,
        time.process_time() - clock,
        {"method": method, "num_samples": num_samples, "seed": seed},
    )


def _residual(net: Ansatz, operator: Any, averages: Averages, generator: torch.Generator) -> float:
    """The 1-norm of the rate of change, over fresh outcomes."""
    batch = averages.draw(generator)
    return float(batch.weights @ local_rates(net, operator, batch.outcomes).abs())


def _gap(given: float | None, operator: Any, relaxation: float) -> tuple[float, str]:
    if given is not None:
        return given, "given"
    if operator.num_states <= _MAX_GAP_OUTCOMES:
        return spectral_gap(operator), "spectrum"
    return (relaxation, "relaxation") if math.isfinite(relaxation) else (math.nan, "unknown")


def _decay(t: Tensor, rate: Tensor) -> float:
    """The slope of the logarithm of the rates over the last half of the time in which they fall, or NaN if they don't.

    By sampling the rates end on a floor of what the ansatz can't follow, which says nothing about the relaxation.
    """
    floor = rate[t > 0.75 * t[-1]].median()
    above = ((rate > 4 * floor) & (rate > 0)).nonzero()[:, 0]
    if len(above) == 0:
        return math.nan
    end = t[above[-1]]
    late = (t > end / 2) & (t <= end) & (rate > 0)
    if int(late.sum()) < 4:
        return math.nan
    x, y = t[late] - t[late].mean(), rate[late].log()
    slope = float((x * (y - y.mean())).sum() / x.square().sum())
    return -slope if slope < 0 else math.nan


def _newton(
    net: Ansatz,
    operator: Any,
    averages: Averages,
    iterations: int,
    tolerance: float,
    seed: int,
    progress: bool,
    folder: Path | None,
    resume: bool,
) -> Tensor:
    """Take Newton steps until the rates are small; random numbers of each follow from the seed and its number."""
    solver = GaussNewton(net, operator, averages)
    history: list[float] = []
    best, best_y, refused = math.inf, net.parameter_vector(), 0
    identity = {"seed": repr(seed), "num_samples": repr(averages.num_samples), **fingerprint(net)}
    if folder is not None:
        prepare_folder(folder)
        content = read_checkpoint(folder) if resume else None
        if content is not None:
            check_same_run(folder, {"kind": content.kind}, {"kind": "newton"})
            check_same_run(folder, content.identity, identity)
            net.load_state_dict(content.state["net"])
            history, solver.damping = content.state["history"], content.state["damping"]
            best, best_y = content.state["best"], content.state["best_y"].to(net.device)
            refused = content.state["refused"]
    enough = 2 if averages.num_samples is None else 4
    with tqdm(total=iterations, initial=len(history), disable=not progress, unit="step") as bar:
        while len(history) < iterations:
            before = net.parameter_vector()
            generator = torch.Generator(device=net.device).manual_seed((seed + 7919 * len(history)) % 2**62)
            step = solver.step(generator)
            history.append(step.mean_square)
            if step.mean_square < best:
                best, best_y = step.mean_square, before
            bar.update()
            bar.set_postfix(residual=f"{step.mean_absolute:.3g}")
            refused = 0 if step.accepted else refused + 1
            if folder is not None:
                state = {
                    "net": dict(net.state_dict()), "history": history, "damping": solver.damping, "best": best,
                    "best_y": best_y, "refused": refused,
                }  # fmt: skip
                write_checkpoint(folder, Checkpoint("newton", len(history), identity, state))
            if step.mean_square < tolerance**2 or refused == enough:
                break
    if averages.num_samples is None:
        final = averages.draw()
        if float(final.weights @ local_rates(net, operator, final.outcomes).square()) > best:
            net.set_parameter_vector(best_y)
    return torch.tensor(history, dtype=torch.float64)


def _descend(
    objective: StationaryResidual,
    iterations: int,
    lr: float,
    seed: int,
    progress: bool,
    folder: Path | None,
    resume: bool,
) -> Tensor:
    """Minimise the residual by the common training loop, and keep the best iterate."""
    looks = KeepBest(every=max(1, iterations // 60), metric=lambda o: o().loss)
    result = fit(
        objective, None, iterations, lr, seed=seed, progress=progress, checkpoint=folder, resume=resume,
        callbacks=[looks], optimizer=_Adam(), scheduler=_Cosine(iterations), distributed=False,
    )  # fmt: skip
    return torch.as_tensor(result.losses).double()


class _Adam:
    """The optimiser of the paper's code."""

    def __call__(self, parameters: Any, lr: float) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=lr, betas=(0.9, 0.98), eps=1e-9)


class _Cosine:
    """A learning rate that falls to zero along a cosine."""

    def __init__(self, iterations: int) -> None:
        self.iterations = iterations

    def __call__(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.iterations)
