"""Projection of a bridge on a family of references: the member whose drift is nearest, by least squares."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stochdyn.bridges.families.base import DriftFamily, LinearFamily, SharedFeatures
from stochdyn.bridges.laws.nodes import DriftNodes
from stochdyn.errors import ApproximationWarning, NonFiniteError
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = ["DriftMatching", "Method", "drift_at", "path_gain", "project_drift"]

Method = Literal["auto", "least_squares", "gauss_newton", "adam"]

_CHUNK = 2**18
_MAX_GAUSS_NEWTON = 60
_SINGULAR = 1e-10


def project_drift(
    family: DriftFamily,
    nodes: DriftNodes,
    spread: Tensor,
    *,
    population: float = 1.0,
    method: Method = "auto",
    steps: int = 300,
    lr: float = 1e-2,
    batch_size: int = 4096,
    seed: int = 0,
) -> None:
    r"""Set the family's parameters to the minimiser of the divergence from the bridge.

    .. math:: \min_\theta\ \tfrac12\,\mathbb E_q\!\int\big|b_\theta(t,X_t)-u_t\big|^2_{(GG^\top)^{-1}}dt
        \;-\;\tfrac1N\log p(\theta)

    In closed form where the drift is linear in its parameters, by Gauss-Newton steps for up to sixty
    parameters, by Adam for more.

    Args:
        family: changed in place.
        nodes: the bridge; see :meth:`SchrodingerBridge.nodes`.
        spread: ``(d, d)`` covariance rate of the noise.
        population: ``N``, number of particles that the divergence counts for beside the prior.
        method: ``"auto"`` for the above choice, or one of them.
        steps: of Adam; Gauss-Newton stops by itself after at most fifty.
        lr: learning rate of Adam.
        batch_size: nodes a step of Adam.
        seed: of Adam's batches.

    Raises:
        NonFiniteError: if the drift isn't finite on the bridge.
    """
    chosen = method if method != "auto" else _choose(family)
    white = torch.linalg.inv(torch.linalg.cholesky(spread))  # |white v|^2 is the norm above
    if chosen == "least_squares":
        _least_squares(family, nodes, white)
    elif chosen == "gauss_newton":
        _gauss_newton(family, nodes, white, population)
    else:
        _adam(family, nodes, white, population, steps, lr, batch_size, seed)
    for name, value in family.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError("a parameter left the finite numbers", got=name)


def _choose(family: DriftFamily) -> str:
    if isinstance(family, LinearFamily | SharedFeatures):
        return "least_squares"
    size = sum(value.numel() for value in family.parameters())
    return "gauss_newton" if size <= _MAX_GAUSS_NEWTON else "adam"


def _chunks(nodes: DriftNodes, size: int = _CHUNK) -> Any:
    fields = (nodes.t, nodes.x, nodes.u, nodes.weight)
    return zip(*(field.split(size) for field in fields), strict=True)


@torch.no_grad()
def drift_at(drift: Any, nodes: DriftNodes) -> Tensor:
    """Return the drift ``(N, d)`` at all nodes."""
    return torch.cat([drift(t, x) for t, x, _, _ in _chunks(nodes)])


def path_gain(before: Tensor, after: Tensor, nodes: DriftNodes, spread: Tensor) -> Tensor:
    r"""Return by how much the divergence falls when the reference's drift changes, both ``(N, d)`` at the nodes.

    .. math:: \tfrac12\,\mathbb E_q\int\big(|b_{old}-u|^2-|b_{new}-u|^2\big)dt
        =\tfrac12\,\mathbb E_q\int(b_{old}-b_{new})\cdot(b_{old}+b_{new}-2u)\,dt
    """
    inner = ((before - after) @ torch.linalg.inv(spread) * (before + after - 2 * nodes.u)).sum(-1)
    return 0.5 * (nodes.weight * inner).double().sum()


@torch.no_grad()
def _least_squares(family: DriftFamily, nodes: DriftNodes, white: Tensor) -> None:
    gram, moment = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    gram, moment = gram.to(white.device), moment.to(white.device)
    if isinstance(family, SharedFeatures):
        for t, x, u, w in _chunks(nodes):
            psi = family.regressors(t, x)
            weighted = psi * w[:, None]
            gram = gram + (weighted.mT @ psi).double()
            moment = moment + (weighted.mT @ (u - family.offset(t, x))).double()
        family.weight.copy_(_solve(gram, moment).mT)
        return
    assert isinstance(family, LinearFamily)
    for t, x, u, w in _chunks(nodes):
        phi = white @ family.features(t, x)  # (N, d, K)
        target = (u - family.offset(t, x)) @ white.mT
        flat = (phi * w[:, None, None]).flatten(0, 1)
        gram = gram + (flat.mT @ phi.flatten(0, 1)).double()
        moment = moment + (flat.mT @ target.reshape(-1, 1)).double()
    family.theta.copy_(_solve(gram, moment).squeeze(-1))


def _solve(gram: Tensor, moment: Tensor) -> Tensor:
    """Solve scaled normal equations; directions that the bridge doesn't see stay at zero, with a warning."""
    size = gram.diagonal().clamp_min(torch.finfo(gram.dtype).tiny).rsqrt()
    scaled = size[:, None] * gram * size
    values, vectors = torch.linalg.eigh(scaled)
    seen = values > _SINGULAR * values[-1]
    if not bool(seen.all()):
        _warn_unseen(int((~seen).sum()), float(values[0] / values[-1]))
    inverse = torch.where(seen, 1 / values.clamp_min(torch.finfo(gram.dtype).tiny), torch.zeros_like(values))
    return size[:, None] * (vectors @ (inverse[:, None] * (vectors.mT @ (size[:, None] * moment))))


def _warn_unseen(count: int, ratio: float) -> None:
    warnings.warn(
        f"{count} combination(s) of parameters can't be told from the snapshots (relative curvature {ratio:.1e}) "
        "and are left at zero. Fix some of them, give a prior, or add snapshots",
        ApproximationWarning,
        stacklevel=5,
    )


class _Flat:
    """The parameters of a module as one vector."""

    def __init__(self, family: nn.Module) -> None:
        self.family = family
        self.names = [name for name, _ in family.named_parameters()]
        self.shapes = [value.shape for _, value in family.named_parameters()]

    def get(self) -> Tensor:
        return torch.cat([value.detach().reshape(-1) for value in self.family.parameters()])

    @torch.no_grad()
    def set(self, vector: Tensor) -> None:
        for value, part in zip(self.family.parameters(), self.split(vector).values(), strict=True):
            value.copy_(part)

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        parts = vector.split([shape.numel() for shape in self.shapes])
        return {n: p.reshape(s) for n, p, s in zip(self.names, parts, self.shapes, strict=True)}

    def call(self, vector: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.family, self.split(vector), (t, x))


def _gauss_newton(family: DriftFamily, nodes: DriftNodes, white: Tensor, population: float) -> None:
    """Levenberg-Marquardt steps; the curvature is that of the drift's square, and of the prior where positive."""
    flat = _Flat(family)
    theta, damping = flat.get().double(), 1e-3
    value, gram, slope = _expand(flat, theta, nodes, white, population)
    for _ in range(50):
        scale = gram.diagonal().clamp_min(1e-12 * gram.diagonal().max()).clamp_min(1e-30)
        improved = False
        for _ in range(8):
            step = torch.linalg.solve(gram + damping * torch.diag(scale), -slope)
            # no parameter moves by more than half its size, or one half, at once: beyond that the expansion means little
            step = step / (2 * (step.abs() / theta.abs().clamp_min(1.0)).amax()).clamp_min(1.0)
            proposal = theta + step
            after = _value(flat, proposal, nodes, white, population)
            if bool(after <= value):
                improved = True
                break
            damping = min(max(10 * damping, 1e-6), 1e8)
        if not improved:
            break
        small = bool(value - after <= 1e-10 * (value.abs() + 1e-12))
        theta, damping = proposal, max(0.2 * damping, 1e-10)
        if small:
            break
        value, gram, slope = _expand(flat, theta, nodes, white, population)
    flat.set(theta)


@torch.no_grad()
def _value(flat: _Flat, theta: Tensor, nodes: DriftNodes, white: Tensor, population: float) -> Tensor:
    own = theta.to(nodes.x)
    total = torch.zeros((), dtype=torch.float64, device=own.device)
    for t, x, u, w in _chunks(nodes):
        gap = (flat.call(own, t, x) - u) @ white.mT
        total = total + 0.5 * (w * gap.square().sum(-1)).double().sum()
    prior = _prior(flat, own)
    return total if prior is None else total - prior.double() / population


def _prior(flat: _Flat, theta: Tensor) -> Tensor | None:
    return torch.func.functional_call(
        _PriorOf(flat.family), {f"family.{k}": v for k, v in flat.split(theta).items()}, ()
    )


class _PriorOf(nn.Module):
    def __init__(self, family: nn.Module) -> None:
        super().__init__()
        self.family = family

    def forward(self) -> Tensor | None:
        return self.family.log_prior()  # type: ignore[operator]


def _expand(
    flat: _Flat, theta: Tensor, nodes: DriftNodes, white: Tensor, population: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return value, Gauss-Newton matrix and gradient."""
    own, size = theta.to(nodes.x), theta.numel()
    gram = torch.zeros(size, size, dtype=torch.float64, device=own.device)
    slope = torch.zeros(size, dtype=torch.float64, device=own.device)
    total = torch.zeros((), dtype=torch.float64, device=own.device)
    units = torch.eye(size, dtype=own.dtype, device=own.device)
    for t, x, u, w in _chunks(nodes, max(1024, _CHUNK // size)):
        with torch.no_grad():
            columns = [torch.func.jvp(lambda v: flat.call(v, t, x), (own,), (e,))[1] for e in units]  # noqa: B023
            gap = (flat.call(own, t, x) - u) @ white.mT
            root = w.sqrt()[:, None]
            jacobian = torch.stack([(c @ white.mT * root).reshape(-1) for c in columns], -1)
            residual = (gap * root).reshape(-1)
            gram += (jacobian.mT @ jacobian).double()
            slope += (jacobian.mT @ residual).double()
            total += 0.5 * residual.square().double().sum()
    with torch.enable_grad():
        point = own.clone().requires_grad_()
        prior = _prior(flat, point)
        if prior is not None:
            (first,) = torch.autograd.grad(prior, point, create_graph=True)
            rows = [torch.autograd.grad(f, point, retain_graph=True, allow_unused=True)[0] for f in first]
            hessian = torch.stack([torch.zeros_like(own) if r is None else r for r in rows]).double()
            values, vectors = torch.linalg.eigh(-0.5 * (hessian + hessian.mT))
            gram += (vectors * values.clamp_min(0)) @ vectors.mT / population
            slope -= first.detach().double() / population
            total -= prior.detach().double() / population
    return total, gram, slope


class DriftMatching(Objective):
    r"""The divergence of a bridge from a reference, up to what doesn't depend on the reference.

    Called with a batch ``(t, x, u, weight)`` of :class:`DriftNodes`, whose weights are those of the sample.

    Args:
        family: the drift.
        white: ``(d, d)``, the inverse of the diffusion matrix.
        total: length of the time span.
        population: particles that the divergence counts for beside the prior.
    """

    def __init__(self, family: DriftFamily, white: Tensor, total: float, population: float) -> None:
        super().__init__()
        self.family, self.total, self.population = family, total, population
        self.register_buffer("white", white, persistent=False)
        self.white: Tensor

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate on ``(t, x, u, weight)``."""
        t, x, u, weight = batch
        gap = (self.family(t, x) - u) @ self.white.mT
        loss = 0.5 * self.total * (weight * gap.square().sum(-1)).sum() / weight.sum()
        prior = self.family.log_prior()
        if prior is not None:
            loss = loss - prior / self.population
        return ObjectiveValue(loss, {"drift_gap": loss.detach()}, "surrogate")


def _adam(
    family: DriftFamily,
    nodes: DriftNodes,
    white: Tensor,
    population: float,
    steps: int,
    lr: float,
    batch_size: int,
    seed: int,
) -> None:
    from stochdyn.run.trainer import fit

    objective = DriftMatching(family, white, float(nodes.weight.sum()), population)
    data = (nodes.t, nodes.x, nodes.u, nodes.weight)
    batch = min(batch_size, len(nodes))

    def cosine(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=0.05 * lr)

    fit(objective, data, steps, lr, batch, seed, progress=False, scheduler=cosine)
