"""How a refined reference responds to a change of the snapshots' weights, to first order, without refining again."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn.bridges.families.base import DriftFamily
from stochdyn.bridges.laws.hidden import HiddenStateBridge
from stochdyn.bridges.laws.hidden_chain import HiddenChain
from stochdyn.bridges.laws.linearised import Transition
from stochdyn.bridges.laws.nodes import bridge_nodes
from stochdyn.bridges.laws.schrodinger import SchrodingerBridge
from stochdyn.bridges.refinement.projection import whitening
from stochdyn.core.transport.entropic import TransportPlan, sinkhorn
from stochdyn.errors import InvalidInputError

if TYPE_CHECKING:
    from stochdyn.bridges.refinement.refinement import Refinement

__all__ = [
    "CouplingsMap",
    "DrawsMap",
    "IterationMap",
    "LinearResponse",
    "flatten",
    "iteration_jacobian",
    "moments_of",
    "pair_moments",
    "parameter_jacobian",
    "solve_scaled",
    "with_coordinates",
]

_MAX_PARAMETERS = 60
_MAX_PAIRS = 40_000
_CHUNK = 2**21
_DROPPED = 1e-9
# Pairs of draws per particle that stand for a coupling, with their least and largest number, and the times that each is seen at: what
# they leave to chance is to be less than what particles do.
_PAIRS, _TIMES = (50, 1000, 20_000), 6
# Bootstrap replicates whose messages are passed together.
_BATCH = 50


class LinearResponse:
    r"""The fixed point of a refinement as a function of the snapshots' weights, linearised about the fit.

    One iteration maps parameters to :math:`T(w,\theta)`: the bridge through snapshots of weights :math:`w` on the reference of
    :math:`\theta`, then the projection of that bridge. The refinement solves :math:`\theta=T(w,\theta)`, so

    .. math::
        \theta(w)\approx\hat\theta+(I-J)^{-1}\big[T(w,\hat\theta)-\hat\theta\big],\qquad J=\partial_\theta T .

    On the fitted reference the log kernels and, for every pair of particles, the moments of the projection don't depend on the weights,
    so :math:`T(w,\hat\theta)` is a Sinkhorn problem and a weighted sum. :math:`J` is the share of the information that is missing because
    paths weren't seen: :math:`I_c(I-J)` is the curvature of the profile objective, where :math:`I_c` is that of the projection.

    Args:
        fit: The refinement, as :func:`stochdyn.bridges.refine` returned it, of a family with at most sixty parameters and no
            prior.
        ignore_prior: Whether a prior is left out; else it is an error.

    Attributes:
        estimate: The fit's parameters as one vector, ``(P,)``.
        complete: The information :math:`I_c` of one particle whose path is seen, ``(P, P)``.
        jacobian: The Jacobian :math:`J` of an iteration, ``(P, P)``.
        converged: The parameters that the iterations would have gone on to from the fit, ``(P,)``.

    Raises:
        InvalidInputError: If there are more parameters, or a prior.

    Reference: Louis (1982), Finding the observed information matrix when using the EM algorithm; Efron (1992),
    Jackknife-after-bootstrap standard errors and influence functions.
    """

    def __init__(self, fit: Refinement, ignore_prior: bool = False) -> None:
        self.fit, self.family = fit, fit.family
        self.estimate = flatten(self.family)
        if self.estimate.numel() > _MAX_PARAMETERS:
            raise InvalidInputError(
                "the family has too many parameters for a linear response",
                got=self.estimate.numel(),
                expected=f"at most {_MAX_PARAMETERS}",
                hint="method='bootstrap' with refit='full' works for any family",
            )
        if self.family.log_prior() is not None and not ignore_prior:
            raise InvalidInputError("a family with a prior has no linear response", hint="use refit='full'")
        if isinstance(fit.measure, HiddenStateBridge):
            self._map: IterationMap = DrawsMap(fit.measure, self.family)
        else:
            self._map = CouplingsMap(fit.bridge, self.family)
        gram, moment = self._map.moments()
        self.complete = gram
        self.jacobian = iteration_jacobian(self._map, self.estimate, gram, fit.snapshots.mean_count)
        self.converged = self._fixed_point(solve_scaled(gram, moment)[None])[0]

    @property
    def observed(self) -> Tensor:
        """:math:`I_c(I-J)`, ``(P, P)``, symmetric: curvature of the objective per particle."""
        value = self.complete @ (torch.eye(len(self.estimate)).to(self.complete) - self.jacobian)
        return 0.5 * (value + value.mT)

    @property
    def information_kept(self) -> Tensor:
        """``(P,)`` shares, ascending, of the information in paths that the snapshots hold: zero for what they can't tell."""
        # eigenvalues of I_c^{-1/2} (observed) I_c^{-1/2}, the shares of the complete information
        factor = torch.linalg.cholesky(self.complete)
        half = torch.linalg.solve_triangular(factor, self.observed, upper=False)
        white = torch.linalg.solve_triangular(factor, half.mT, upper=False)
        return torch.linalg.eigvalsh(0.5 * (white + white.mT))

    def weakest(self) -> tuple[float, Tensor, float]:
        r"""Return the direction of the parameters that the snapshots tell least about.

        Returns:
            The share of the information of paths that is kept along it; the direction ``(P,)``, whose largest entry is one, in units of the
            parameters; and the standard deviation of the parameters along it, :math:`(Nv^\top Iv)^{-1/2}` for a cohort of the mean size of a
            snapshot.
        """
        factor = torch.linalg.cholesky(self.complete)
        half = torch.linalg.solve_triangular(factor, self.observed, upper=False)
        shares, vectors = torch.linalg.eigh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
        direction = torch.linalg.solve_triangular(factor.mT, vectors[:, :1], upper=True)[:, 0]
        direction = direction / direction[direction.abs().argmax()]
        information = float(self.fit.snapshots.mean_count * (direction @ self.observed @ direction))
        return float(shares[0]), direction, information**-0.5 if information > 0 else math.inf

    def __call__(self, weights: Sequence[Tensor]) -> Tensor:
        """Return parameters ``(B, P)`` for weights of each snapshot, ``(B, n_i)`` normalised."""
        return self._fixed_point(torch.cat([solve_scaled(*part) for part in self._map.reweighted(weights)]))

    def _fixed_point(self, step: Tensor) -> Tensor:
        # theta = hat + (I - J)^{-1} (T - hat): the sum of all further iterations
        keep = torch.eye(len(self.estimate)).to(step) - self.jacobian
        return self.estimate + torch.linalg.solve(keep, step.mT).mT


class IterationMap(ABC):
    """One iteration of a refinement near its fixed point: normal equations for a change of the parameters.

    Attributes:
        family: The drift whose parameters are changed.
    """

    family: DriftFamily

    @abstractmethod
    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the normal equations ``(P, P)`` and ``(P,)`` at the fit."""

    @abstractmethod
    def moved(self, family: DriftFamily) -> tuple[Tensor, Tensor]:
        """Return those of the bridge on another drift, for changes from the fit's parameters."""

    @abstractmethod
    def reweighted(self, weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield those of bridges through other weights ``(B, n_i)`` of the particles, ``(b, P, P)`` and ``(b, P)`` for a part of them each."""


class CouplingsMap(IterationMap):
    """The iteration of a refinement with exact couplings.

    Args:
        bridge: The solved bridge on the fit's drift.
        family: The fit's drift.
    """

    def __init__(self, bridge: SchrodingerBridge, family: DriftFamily) -> None:
        self.bridge, self.family = bridge, family
        self._white = whitening(bridge.spread)
        self._pairs = [
            pair_moments(bridge, i, part, plan, family, self._white)
            for i, (part, plan) in enumerate(zip(bridge._transitions, bridge.plans, strict=True))
        ]

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the normal equations at the fit."""
        gram, moment = self._sum([(plan.plan() / plan.mass)[None] for plan in self.bridge.plans])
        return gram[0], moment[0]

    def _sum(self, couplings: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Normal equations ``(B, P, P)`` and ``(B, P)`` for couplings ``(B, n, m)`` of each interval."""
        gram = torch.zeros((), dtype=torch.float64, device=self.bridge.spread.device)
        moment = torch.zeros_like(gram)
        for (first, second, grams, moments), plan in zip(self._pairs, couplings, strict=True):
            mass = plan[:, first, second].double()
            gram = gram + torch.einsum("bs,sij->bij", mass, grams)
            moment = moment + mass @ moments
        return gram, moment

    def moved(self, family: DriftFamily) -> tuple[Tensor, Tensor]:
        """Solve the bridge on another drift; its projection is on the drifts linearised about the fit."""
        old = self.bridge
        bridge = old.like(reference=family).solve(old)
        gram = torch.zeros((), dtype=torch.float64, device=old.spread.device)
        moment = torch.zeros_like(gram)
        for i, (part, plan) in enumerate(zip(bridge._transitions, bridge.plans, strict=True)):
            first, second, grams, moments = pair_moments(bridge, i, part, plan, self.family, self._white)
            mass = (plan.plan() / plan.mass)[first, second].double()
            gram = gram + torch.einsum("s,sij->ij", mass, grams)
            moment = moment + mass @ moments
        return gram, moment

    def reweighted(self, weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Solve the couplings of other weights, with the kernels as they are."""
        plans = self.bridge.plans
        size = max(1, _CHUNK // max(plan.shape.numel() for plan in plans))
        for parts in zip(*(w.split(size) for w in weights), strict=True):
            couplings = []
            for i, plan in enumerate(plans):
                count = len(parts[i])
                f, g = plan.potentials
                # totals of both ends, which count where marginals are relaxed
                a, b = parts[i] * plan.weights_x.sum(), parts[i + 1] * plan.weights_y.sum()
                again = sinkhorn(
                    None, None, plan.reg, a.to(f), b.to(f), plan.cost_matrix.expand(count, -1, -1),
                    tolerance=max(self.bridge.tolerance, 1e-5),
                    max_iterations=self.bridge.max_iterations,
                    warm_start=(f.expand(count, -1).contiguous(), g.expand(count, -1).contiguous()),
                    relaxation=plan.relaxation,
                )  # fmt: skip
                own = again.plan()
                couplings.append(own / own.sum((-2, -1), keepdim=True))
            yield self._sum(couplings)


class DrawsMap(IterationMap):
    """The iteration of a refinement with hidden components, on the draws of one bridge and a sample of their pairs.

    Draws and pairs stay as they are, and count by how likely they become: so the map is a smooth function of the parameters.

    Args:
        bridge: The bridge on the fit's drift.
        family: The fit's drift.
        num_pairs: The number of pairs of draws that stand for a coupling; fifty per particle if None, within bounds.
    """

    def __init__(self, bridge: HiddenStateBridge, family: DriftFamily, num_pairs: int | None = None) -> None:
        self.bridge, self.family = bridge, family
        self._white = whitening(bridge.spread)
        source = torch.Generator(bridge.spread.device).manual_seed(bridge.seed)
        if num_pairs is None:
            num_pairs = int(min(max(_PAIRS[0] * bridge.snapshots.mean_count, _PAIRS[1]), _PAIRS[2]))
        with torch.no_grad():
            self._pairs = [
                bridge._chosen_pairs(k, num_pairs, source) for k in range(len(bridge.snapshots) - 1)
            ]
            self._logs = [bridge._joint(k, *own[:2]) for k, own in enumerate(self._pairs)]
            self._sums = self._of_pairs(bridge)

    def _of_pairs(self, bridge: HiddenStateBridge) -> list[tuple[Tensor, Tensor]]:
        """What each chosen pair adds to the normal equations, with the paths of this bridge's reference between its ends."""
        found = []
        for k, (part, (first, second, _)) in enumerate(zip(bridge._transitions, self._pairs, strict=True)):
            x, y = bridge._states[k][first], bridge._states[k + 1][second]
            found.append(moments_of(part, x, y, self.family, self._white, _TIMES))
        return found

    def _masses(self, bridge: HiddenChain, k: int) -> Tensor:
        """The weights ``(*batch, S)`` of the chosen pairs under another law on the same draws."""
        first, second, weight = self._pairs[k]
        ratio = (bridge._joint(k, first, second) - self._logs[k]).double()
        return torch.softmax(ratio + weight.double().log(), -1)

    def moments(self) -> tuple[Tensor, Tensor]:
        """Return the normal equations at the fit."""
        return self._sum(self.bridge, self._sums)

    def _sum(self, law: HiddenChain, sums: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        masses = [self._masses(law, k) for k in range(len(sums))]
        gram = torch.stack(
            [torch.einsum("...s,sij->...ij", w, g) for w, (g, _) in zip(masses, sums, strict=True)]
        )
        moment = torch.stack([w @ m for w, (_, m) in zip(masses, sums, strict=True)])
        return gram.sum(0), moment.sum(0)

    @torch.no_grad()
    def moved(self, family: DriftFamily) -> tuple[Tensor, Tensor]:
        """Weigh the draws by another drift; its projection is on the drifts linearised about the fit."""
        law = self.bridge._moved(family)
        return self._sum(law, self._of_pairs(law))

    @torch.no_grad()
    def reweighted(self, weights: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Find the potentials of other weights on the same draws."""
        for parts in zip(*(w.split(_BATCH) for w in weights), strict=True):
            yield self._sum(self.bridge._reweighted(list(parts)), self._sums)


def iteration_jacobian(step: IterationMap, theta: Tensor, complete: Tensor, particles: float) -> Tensor:
    """Return the Jacobian ``(P, P)`` of an iteration at parameters ``theta (P,)``, by central differences of about a standard error each."""
    reach = (torch.linalg.inv(complete).diagonal() / particles).clamp_min(0).sqrt()
    columns = []
    for k in range(len(theta)):
        delta = torch.zeros_like(theta)
        delta[k] = 0.5 * reach[k]
        ahead, back = (
            solve_scaled(*step.moved(with_coordinates(step.family, theta + sign * delta)))
            for sign in (1.0, -1.0)
        )
        columns.append((ahead - back) / (2 * delta[k]))
    return torch.stack(columns, -1)


def pair_moments(
    bridge: SchrodingerBridge,
    i: int,
    part: Transition,
    plan: TransportPlan,
    family: DriftFamily,
    white: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Indices of the pairs that matter, and what each adds to the normal equations for a change of the parameters."""
    x, y = bridge.snapshots.samples[i : i + 2]
    mass = plan.plan()
    relative = mass / (plan.weights_x[:, None] * plan.weights_y + 1e-300)
    share = mass.flatten().sort(descending=True)
    floor = share.values[min(_MAX_PAIRS, share.values.numel()) - 1]
    first, second = ((relative > _DROPPED) & (mass >= floor)).nonzero(as_tuple=True)
    return first, second, *moments_of(part, x[first], y[second], family, white)


def moments_of(
    part: Transition,
    x: Tensor,
    y: Tensor,
    family: DriftFamily,
    white: Tensor,
    times_per_pair: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what pairs of ends ``x, y (S, d)`` add to the normal equations for a change of the parameters, ``(S, P, P)`` and ``(S, P)``.

    They are seen at all times of the quadrature, or at so many each; see :func:`~stochdyn.bridges.laws.bridge_nodes`.
    """
    size = sum(p.numel() for p in family.parameters())
    rows = max(1, _CHUNK // (8 * len(part.ts) * x.shape[1] ** 2 * size))
    grams, moments = [], []
    for a, b in zip(x.split(rows), y.split(rows), strict=True):
        nodes = bridge_nodes(part, a, b, x.new_ones(len(a)), None, times_per_pair)
        value, slope = parameter_jacobian(family, nodes.t, nodes.x)
        phi = white @ slope  # (N, d, P)
        target = (nodes.u - value) @ white.mT
        weighted = phi * nodes.weight[:, None, None]
        shape = (-1, len(a))
        # E int phi^T phi dt and E int phi^T (u - b) dt along the bridge of each pair
        gram = torch.einsum("ndi,ndj->nij", weighted, phi).reshape(*shape, size, size).sum(0)
        moment = torch.einsum("ndi,nd->ni", weighted, target).reshape(*shape, size).sum(0)
        grams.append(gram.double())
        moments.append(moment.double())
    return torch.cat(grams), torch.cat(moments)


def solve_scaled(gram: Tensor, moment: Tensor) -> Tensor:
    """Solve normal equations ``(*batch, P, P)`` and ``(*batch, P)`` in coordinates where every parameter has information one."""
    scale = gram.diagonal(dim1=-2, dim2=-1).clamp_min(1e-300).rsqrt()
    scaled = scale[..., :, None] * gram * scale[..., None, :]
    scaled = scaled + 1e-12 * torch.eye(gram.shape[-1]).to(gram)
    return scale * torch.linalg.solve(scaled, (scale * moment)[..., None]).squeeze(-1)


def parameter_jacobian(family: DriftFamily, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the drift ``(N, d)`` and its derivative in every parameter ``(N, d, P)`` at ``x (N, d)``."""
    names = [name for name, _ in family.named_parameters()]
    values = [p.detach() for p in family.parameters()]

    def drift(*parameters: Tensor) -> Tensor:
        return torch.func.functional_call(family, dict(zip(names, parameters, strict=True)), (t, x))

    with torch.no_grad():
        value = family(t, x)
        columns = []
        for j, own in enumerate(values):
            for k in range(own.numel()):
                tangents = [torch.zeros_like(v) for v in values]
                tangents[j].view(-1)[k] = 1.0
                columns.append(torch.func.jvp(drift, tuple(values), tuple(tangents))[1])
    return value, torch.stack(columns, -1)


def flatten(family: DriftFamily) -> Tensor:
    """Return all parameters of a family as one vector, in double precision."""
    return torch.cat([p.detach().double().flatten() for p in family.parameters()])


def with_coordinates(family: DriftFamily, values: Tensor) -> DriftFamily:
    """Return a copy of a family whose parameters are ``values (P,)``."""
    import copy

    copied, place = copy.deepcopy(family), 0
    with torch.no_grad():
        for p in copied.parameters():
            p.copy_(values[place : place + p.numel()].reshape(p.shape))
            place += p.numel()
    return copied
