"""How a refined reference responds to a change of the snapshots' weights, to first order, without refining again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn.bridges.families.base import DriftFamily
from stochdyn.bridges.laws.linearised import Transition
from stochdyn.bridges.laws.nodes import bridge_nodes
from stochdyn.bridges.laws.schrodinger import SchrodingerBridge
from stochdyn.core.transport.entropic import TransportPlan, sinkhorn
from stochdyn.errors import InvalidInputError

if TYPE_CHECKING:
    from stochdyn.bridges.refinement.refinement import Refinement

__all__ = ["LinearResponse", "flatten", "pair_moments", "parameter_jacobian", "with_coordinates"]

_MAX_PARAMETERS = 60
_MAX_PAIRS = 40_000
_CHUNK = 2**21
_DROPPED = 1e-9


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
        fit: what :func:`stochdyn.bridges.refine` returned, of a family with at most sixty parameters and no prior.
        ignore_prior: leave a prior out rather than raise.

    Attributes:
        estimate: ``(P,)`` the fit's parameters, flattened.
        complete: :math:`I_c`, ``(P, P)``, information of one particle whose path is seen.
        jacobian: :math:`J`, ``(P, P)``.
        converged: ``(P,)`` where the iterations would have gone on to from the fit.

    Raises:
        InvalidInputError: for more parameters, or a prior.

    Reference: Louis (1982), Finding the observed information matrix when using the EM algorithm; Efron (1992),
    Jackknife-after-bootstrap standard errors and influence functions.
    """

    def __init__(self, fit: Refinement, ignore_prior: bool = False) -> None:
        self.fit, self.bridge, self.family = fit, fit.bridge, fit.family
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
        white = torch.linalg.inv(torch.linalg.cholesky(self.bridge.spread))
        self._white = white
        plans, transitions = self.bridge.plans, self.bridge._transitions
        self._pairs = [
            pair_moments(self.bridge, i, part, plan, self.family, white)
            for i, (part, plan) in enumerate(zip(transitions, plans, strict=True))
        ]
        gram, moment = self._moments([(plan.plan() / plan.mass)[None] for plan in plans])
        self.complete = gram[0]
        self.jacobian = self._differences()
        self.converged = self._fixed_point(_solve(gram, moment))[0]

    @property
    def observed(self) -> Tensor:
        """:math:`I_c(I-J)`, ``(P, P)``, symmetric: curvature of the objective per particle."""
        value = self.complete @ (torch.eye(len(self.estimate)).to(self.complete) - self.jacobian)
        return 0.5 * (value + value.mT)

    @property
    def information_kept(self) -> Tensor:
        """``(P,)`` shares, ascending, of the information in paths that the snapshots hold: zero for what they can't tell."""
        factor = torch.linalg.cholesky(self.complete)
        half = torch.linalg.solve_triangular(factor, self.observed, upper=False)
        white = torch.linalg.solve_triangular(factor, half.mT, upper=False)
        return torch.linalg.eigvalsh(0.5 * (white + white.mT))

    def __call__(self, weights: Sequence[Tensor]) -> Tensor:
        """Return parameters ``(B, P)`` for weights of each snapshot, ``(B, n_i)`` normalised."""
        count = weights[0].shape[0]
        largest = max(plan.shape[0] * plan.shape[1] for plan in self.bridge.plans)
        size = max(1, _CHUNK // largest)
        parts = [self._respond([w[k : k + size] for w in weights]) for k in range(0, count, size)]
        return torch.cat(parts)

    def _respond(self, weights: list[Tensor]) -> Tensor:
        couplings = []
        for i, plan in enumerate(self.bridge.plans):
            count = weights[i].shape[0]
            f, g = plan.potentials
            # totals of both ends, which count where marginals are relaxed
            a, b = weights[i] * plan.weights_x.sum(), weights[i + 1] * plan.weights_y.sum()
            again = sinkhorn(
                None, None, plan.reg, a.to(f), b.to(f), plan.cost_matrix.expand(count, -1, -1),
                tolerance=max(self.bridge.tolerance, 1e-5),
                max_iterations=self.bridge.max_iterations,
                warm_start=(f.expand(count, -1).contiguous(), g.expand(count, -1).contiguous()),
                relaxation=plan.relaxation,
            )  # fmt: skip
            own = again.plan()
            couplings.append(own / own.sum((-2, -1), keepdim=True))
        return self._fixed_point(_solve(*self._moments(couplings)))

    def _fixed_point(self, step: Tensor) -> Tensor:
        keep = torch.eye(len(self.estimate)).to(step) - self.jacobian
        return self.estimate + torch.linalg.solve(keep, step.mT).mT

    def _moments(self, couplings: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Normal equations ``(B, P, P)`` and ``(B, P)`` for couplings ``(B, n, m)`` of each interval."""
        gram = torch.zeros((), dtype=torch.float64, device=self.estimate.device)
        moment = torch.zeros_like(gram)
        for (first, second, grams, moments), plan in zip(self._pairs, couplings, strict=True):
            mass = plan[:, first, second].double()
            gram = gram + torch.einsum("bs,sij->bij", mass, grams)
            moment = moment + mass @ moments
        return gram, moment

    def _differences(self) -> Tensor:
        """The Jacobian of an iteration, by central differences of about a standard error each."""
        size = len(self.estimate)
        particles = sum(self.fit.snapshots.sizes) / len(self.fit.snapshots)
        reach = (torch.linalg.inv(self.complete).diagonal() / particles).clamp_min(0).sqrt()
        columns = []
        for k in range(size):
            delta = torch.zeros_like(self.estimate)
            delta[k] = 0.5 * reach[k]
            ahead, back = (self._iterate(self.estimate + sign * delta) for sign in (1.0, -1.0))
            columns.append((ahead - back) / (2 * delta[k]))
        return torch.stack(columns, -1)

    def _iterate(self, theta: Tensor) -> Tensor:
        """One iteration from ``theta``: the bridge there, and its projection on the drifts linearised about the fit."""
        moved = with_coordinates(self.family, theta)
        old = self.bridge
        bridge = old.like(reference=moved).solve(old)
        gram = torch.zeros((), dtype=torch.float64, device=self.estimate.device)
        moment = torch.zeros_like(gram)
        for i, (part, plan) in enumerate(zip(bridge._transitions, bridge.plans, strict=True)):
            first, second, grams, moments = pair_moments(bridge, i, part, plan, self.family, self._white)
            mass = (plan.plan() / plan.mass)[first, second].double()
            gram = gram + torch.einsum("s,sij->ij", mass, grams)
            moment = moment + mass @ moments
        return self.estimate + _solve(gram[None], moment[None])[0]


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
    size = sum(p.numel() for p in family.parameters())
    rows = max(1, _CHUNK // (8 * len(part.ts) * x.shape[1] ** 2 * size))
    grams, moments = [], []
    for a, b in zip(first.split(rows), second.split(rows), strict=True):
        nodes = bridge_nodes(part, x[a], y[b], x.new_ones(len(a)))
        value, slope = parameter_jacobian(family, nodes.t, nodes.x)
        phi = white @ slope  # (N, d, P)
        target = (nodes.u - value) @ white.mT
        weighted = phi * nodes.weight[:, None, None]
        shape = (-1, len(a))
        gram = torch.einsum("ndi,ndj->nij", weighted, phi).reshape(*shape, size, size).sum(0)
        moment = torch.einsum("ndi,nd->ni", weighted, target).reshape(*shape, size).sum(0)
        grams.append(gram.double())
        moments.append(moment.double())
    return first, second, torch.cat(grams), torch.cat(moments)


def _solve(gram: Tensor, moment: Tensor) -> Tensor:
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
