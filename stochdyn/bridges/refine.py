"""Refinement of the reference: bridge and projection in turn, until the divergence between them falls no more."""

from __future__ import annotations

import copy
import time
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import check_choice, check_positive, check_positive_int
from stochdyn.bridges.acceleration import Anderson, get_vector, set_vector
from stochdyn.bridges.bridge import SchrodingerBridge
from stochdyn.bridges.families import DriftFamily, ZeroDrift
from stochdyn.bridges.history import History, Iteration
from stochdyn.bridges.ipf import IPFBridge
from stochdyn.bridges.projection import Method, drift_at, path_gain, project_drift
from stochdyn.bridges.reference import fitted_family, spread_of
from stochdyn.bridges.snapshots import Snapshots
from stochdyn.core.coefficients import Matrix
from stochdyn.core.measure import DiffusionMeasure
from stochdyn.errors import ConvergenceWarning, DiffusionError, InvalidInputError, NonFiniteError

__all__ = ["Refinement", "refine"]


@dataclass(frozen=True, eq=False)
class Refinement:
    """A refined reference and the bridge built on it.

    Attributes:
        family: the chosen drift.
        measure: the bridge, a law on paths: ``.sample(ts, n)``, ``.marginal(t)``, ``.drift(t, x)``.
        history: what happened in every iteration.
        snapshots: the data.
        options: arguments of :func:`refine`, for repeating it on other data.
    """

    family: DriftFamily
    measure: SchrodingerBridge
    history: History
    snapshots: Snapshots
    options: dict[str, Any]

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The refined parameters by name."""
        return self.family.named_values()

    @property
    def diffusion(self) -> Tensor:
        """``(d, d)`` covariance rate of the noise."""
        return self.measure.spread

    @property
    def objective(self) -> float:
        """The divergence between bridge and reference; see :attr:`SchrodingerBridge.objective`."""
        return self.history.final_objective

    @property
    def reference(self) -> DiffusionMeasure:
        """The refined reference process, started from the first snapshot's particles."""
        return self.measure.reference

    def posterior(self, num_draws: int = 100, **options: Any) -> Any:
        """Return an ArviZ posterior over the parameters; see :func:`stochdyn.bridges.posterior`."""
        import stochdyn.bridges as room

        return room.posterior(self, num_draws, **options)


def refine(
    snapshots: Snapshots,
    family: Any,
    diffusion: Any = 0.1,
    outer: int = 10,
    solver: str = "sinkhorn",
    step: float | None = None,
    seed: int = 0,
    learn_diffusion: bool = False,
    *,
    accelerate: bool = False,
    start: str = "brownian",
    tolerance: float = 0.1,
    restarts: int = 0,
    projection: Method = "auto",
    projection_steps: int = 300,
    projection_lr: float = 1e-2,
    nodes: int = 1_000_000,
    population: float | None = None,
    relaxation: float | None = None,
    corrections: int = 0,
    sinkhorn_tolerance: float = 1e-6,
    max_iterations: int = 10_000,
    ipf_sweeps: int = 10,
    progress: bool = False,
) -> Refinement:
    r"""Find the reference process of a family, and the bridge on it, that are nearest to one another.

    .. math:: \min_{\theta}\ \min_{q:\,q_{t_i}=\pi_i}\ \mathrm{KL}(q\,\|\,p_\theta)

    by turns: the Schrödinger bridge :math:`q^k` for :math:`\theta^{k-1}`, then the :math:`\theta^k` whose drift is nearest to
    that of :math:`q^k`. The divergence falls with every half step. It stops when ``population`` times the objective falls by less than ``tolerance``.

    Args:
        snapshots: the data.
        family: a :class:`DriftFamily`, any ``nn.Module`` with ``forward(t, x)``, or a Pyro model without arguments that
            returns a drift, whose priors then act. A copy is refined; the original is left alone.
        diffusion: a number, ``(d,)`` or ``(d, d)``: the noise, known or, with ``learn_diffusion``, a first guess.
        outer: largest number of iterations.
        solver: ``"sinkhorn"``; or ``"ipf-gp"`` or ``"ipf-neural"``, iterative proportional fitting with drifts
            regressed by Gaussian processes or networks, as published, for comparison.
        step: spacing of the inner time grid; a twenty-fifth of the shortest interval if None.
        seed: of all randomness.
        learn_diffusion: estimate the overall strength of the noise from the couplings.
        accelerate: extrapolate from the last iterations where that makes the objective fall more; for families of at most
            sixty parameters. Worth it where parameters are strongly correlated.
        start: ``"brownian"``: the first bridge has no drift, whatever the family's parameters; ``"family"``: they are used.
        tolerance: fall of the objective, in nats of the whole population, that counts as none: with 0.1 the parameters still move by a
            fraction of their standard error.
        restarts: further attempts from parameters drawn by the family's ``reset``; the best one is returned.
        projection: how parameters are fitted; see :func:`stochdyn.bridges.projection.project_drift`.
        projection_steps: steps of Adam an iteration, for families of many parameters.
        projection_lr: its learning rate.
        nodes: number of states that a fit sees.
        population: ``N``, particles that the divergence counts for, since seeing these snapshots has the probability
            :math:`e^{-N\min_q\mathrm{KL}}` (Sanov); the mean size of a snapshot if None.
        relaxation: price of deviations from the snapshots' weights and masses; see :class:`SchrodingerBridge`.
        corrections: paths a pair for importance weights of what linearisation leaves out; see :class:`SchrodingerBridge`.
        sinkhorn_tolerance: largest marginal error of the couplings, in L1.
        max_iterations: of each coupling.
        ipf_sweeps: pairs of half-bridges, for the solvers by iterative proportional fitting.
        progress: show a bar.

    Returns:
        Parameters, the bridge, the refined reference, and the history.

    Raises:
        InvalidInputError: for a family without parameters or options that can't work; before any work.
        ShapeError: if the drift doesn't fit the particles.
        DiffusionError: if the noise is so weak that no path reaches the next snapshot.

    Example:
        >>> from stochdyn.bridges import LinearDrift, Snapshots
        >>> clouds = [torch.linspace(-1, 1, 9)[:, None] * 0.5**i + i for i in range(3)]
        >>> fit = refine(Snapshots([0.0, 1.0, 2.0], clouds), LinearDrift(1), diffusion=0.3)
        >>> sorted(fit.parameters), bool(fit.history.objective.diff().max() < 1e-4)
        (['matrix', 'shift'], True)

    Reference: Shen, Berlinghieri & Broderick (2025), Multi-marginal Schrödinger bridges with iterative reference
    refinement, AISTATS, algorithm 1.
    """
    check_positive_int(outer, "outer")
    check_positive_int(restarts, "restarts", 0)
    check_positive_int(nodes, "nodes")
    check_choice(solver, ("sinkhorn", "ipf-gp", "ipf-neural"), "solver")
    check_positive_int(ipf_sweeps, "ipf_sweeps")
    check_choice(start, ("brownian", "family"), "start")
    check_positive(tolerance, "tolerance")
    if not isinstance(snapshots, Snapshots):
        raise InvalidInputError("snapshots must be Snapshots", got=type(snapshots).__name__)
    options = {
        "diffusion": diffusion, "outer": outer, "solver": solver, "step": step, "seed": seed,
        "learn_diffusion": learn_diffusion, "accelerate": accelerate, "start": start, "tolerance": tolerance, "restarts": restarts,
        "projection": projection, "projection_steps": projection_steps, "projection_lr": projection_lr,
        "nodes": nodes, "population": population,
        "relaxation": relaxation, "corrections": corrections, "sinkhorn_tolerance": sinkhorn_tolerance, "max_iterations": max_iterations,
        "ipf_sweeps": ipf_sweeps,
    }  # fmt: skip
    original = fitted_family(family, snapshots)
    if not any(p.requires_grad for p in original.parameters()):
        raise InvalidInputError("the family has no parameters to refine", got=type(family).__name__)
    spread_of(diffusion, snapshots)
    if solver != "sinkhorn":
        return _refine_by_ipf(snapshots, original, options, progress)
    generator = torch.Generator(snapshots.device).manual_seed(seed)
    best: Refinement | None = None
    for attempt in range(restarts + 1):
        own = copy.deepcopy(original)
        if attempt:
            own.reset(generator)
        fit = _refine_once(snapshots, own, options, attempt > 0, progress)
        if best is None or fit.objective < best.objective:
            best = fit
    assert best is not None
    return best


def _refine_once(
    snapshots: Snapshots,
    family: DriftFamily,
    options: dict[str, Any],
    from_family: bool,
    progress: bool,
) -> Refinement:
    from tqdm.auto import tqdm

    population = options["population"] or sum(snapshots.sizes) / len(snapshots)
    diffusion, history = options["diffusion"], History()
    brownian = options["start"] == "brownian" and not from_family
    least = options["tolerance"] / population
    make = {
        "step": options["step"],
        "tolerance": options["sinkhorn_tolerance"],
        "max_iterations": options["max_iterations"],
        "relaxation": options["relaxation"],
        "corrections": options["corrections"],
    }
    clock = time.process_time()
    first = ZeroDrift(snapshots.dim) if brownian else copy.deepcopy(family)
    bridge = SchrodingerBridge(snapshots, first, diffusion, **make).solve()
    small = sum(p.numel() for p in family.parameters()) <= 60
    anderson = Anderson(3) if options["accelerate"] and small else None
    bar = tqdm(range(options["outer"]), disable=not progress, desc="refine")
    for _ in bar:
        generator = torch.Generator(snapshots.device).manual_seed(options["seed"])
        nodes = bridge.nodes(options["nodes"], generator)
        kept = copy.deepcopy(family)
        project_drift(
            family, nodes, bridge.spread, population=population, method=options["projection"],
            steps=options["projection_steps"], lr=options["projection_lr"], seed=options["seed"],
        )  # fmt: skip
        gain = path_gain(drift_at(bridge.family, nodes), drift_at(family, nodes), nodes, bridge.spread)
        if options["learn_diffusion"]:
            diffusion = _learnt_diffusion(bridge, family)
        projected = float(bridge.objective) - float(gain)
        following = None
        if anderson is not None:
            following = _extrapolate(anderson, kept, family, bridge, projected, diffusion, make)
        if following is None:
            following = SchrodingerBridge(snapshots, copy.deepcopy(family), diffusion, **make).solve(bridge)
        else:
            family = copy.deepcopy(following.family)
        now = time.process_time()
        objective = float(bridge.objective)
        history.iterations.append(
            Iteration(
                objective, projected, float(bridge.marginal_errors.max()), family.named_values(),
                float(following.spread.diagonal().mean().sqrt()), now - clock,
            )
        )  # fmt: skip
        clock = now
        fall = objective - float(following.objective)
        bar.set_postfix(objective=f"{float(following.objective):.5g}", fall=f"{fall:.2g}")
        if fall < -least and len(history) > 1:
            # the projection no longer sees what the objective does: the last reference was better
            history.stopped, family = "the objective would rise", kept
            history.iterations.pop()
            break
        bridge = following
        if fall < least:
            history.stopped = "the objective no longer falls"
            break
    else:
        history.stopped = "the largest number of iterations"
    bar.close()
    history.final_objective = float(bridge.objective)
    return Refinement(family, bridge, history, snapshots, options)


def _refine_by_ipf(
    snapshots: Snapshots, family: DriftFamily, options: dict[str, Any], progress: bool
) -> Refinement:
    """Run the published loop: a fixed number of iterations, since the objective of simulated bridges isn't monotone."""
    from tqdm.auto import tqdm

    population = options["population"] or sum(snapshots.sizes) / len(snapshots)
    learner = options["solver"].removeprefix("ipf-")
    history, brownian = History(), options["start"] == "brownian"
    make = {"step": options["step"], "sweeps": options["ipf_sweeps"], "learner": learner}

    def solve(reference: DriftFamily, seed: int) -> IPFBridge:
        return IPFBridge(snapshots, reference, options["diffusion"], seed=seed, **make).solve()

    clock = time.process_time()
    generator = torch.Generator(snapshots.device).manual_seed(options["seed"])
    bridge = solve(ZeroDrift(snapshots.dim) if brownian else copy.deepcopy(family), options["seed"])
    for k in tqdm(range(options["outer"]), disable=not progress, desc="refine"):
        nodes = bridge.nodes(options["nodes"], generator)
        project_drift(
            family, nodes, bridge.spread, population=population, method=options["projection"],
            steps=options["projection_steps"], lr=options["projection_lr"], seed=options["seed"],
        )  # fmt: skip
        objective = float(bridge.divergence(generator))
        gain = path_gain(drift_at(bridge.family, nodes), drift_at(family, nodes), nodes, bridge.spread)
        bridge = solve(copy.deepcopy(family), options["seed"] + k + 1)
        now = time.process_time()
        history.iterations.append(
            Iteration(
                objective,
                objective - float(gain),
                float("nan"),
                family.named_values(),
                bridge.sigma,
                now - clock,
            )
        )
        clock = now
    history.final_objective = float(bridge.divergence(generator))
    history.stopped = "the number of iterations"
    law: Any = bridge  # a PathMeasure of the same shape, without potentials and objective
    return Refinement(family, law, history, snapshots, options)


def _extrapolate(
    anderson: Anderson,
    before: DriftFamily,
    after: DriftFamily,
    bridge: SchrodingerBridge,
    bound: float,
    diffusion: Any,
    make: dict[str, Any],
) -> SchrodingerBridge | None:
    """Return the bridge for extrapolated parameters, if it is better than the projection promises; else None."""
    image = get_vector(after)
    proposal = anderson.propose(get_vector(before), image)
    if torch.equal(proposal, image) or not bool(torch.isfinite(proposal).all()):
        return None
    bold = copy.deepcopy(after)
    set_vector(bold, proposal)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            attempt = SchrodingerBridge(bridge.snapshots, bold, diffusion, **make).solve(bridge)
    except (DiffusionError, NonFiniteError):
        attempt = None
    if attempt is None or not attempt.converged or not float(attempt.objective) <= bound:
        anderson.forget()
        return None
    return attempt


@torch.no_grad()
def _learnt_diffusion(bridge: SchrodingerBridge, family: DriftFamily) -> Matrix:
    """Return the noise whose strength fits the couplings best, the drift being that of ``family``."""
    factor = bridge.mahalanobis(family) / bridge.snapshots.dim
    return Matrix(torch.linalg.cholesky(bridge.spread * factor.to(bridge.spread)))
