"""Projection of a bridge on a family of references: the member whose drift is nearest, by least squares."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import check_positive_int, check_real
from stochdyn._transforms import recording
from stochdyn.bridges.families.base import DriftFamily, LinearFamily, SharedFeatures
from stochdyn.bridges.laws.nodes import DriftNodes
from stochdyn.errors import ApproximationWarning, InvalidInputError, NonFiniteError
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = [
    "Adam",
    "DriftMatching",
    "GaussNewton",
    "LeastSquares",
    "Projection",
    "as_projection",
    "drift_at",
    "drift_shift",
    "path_gain",
    "project_drift",
    "whitening",
]

_CHUNK = 2**18
_MAX_GAUSS_NEWTON = 60
_SINGULAR = 1e-10


class Projection(ABC):
    """A way to set the parameters of a family to those whose drift is nearest to that of a bridge."""

    @abstractmethod
    def check(self, family: DriftFamily) -> None:
        """Raise InvalidInputError if the family can't be fitted like this."""

    @abstractmethod
    def fit(
        self, family: DriftFamily, nodes: DriftNodes, white: Tensor, population: float, seed: int
    ) -> None:
        """Change the parameters; ``white (r, d)`` is the inverse of the diffusion matrix, see :func:`whitening`."""


@dataclass(frozen=True)
class LeastSquares(Projection):
    """The exact projection on a family that is linear in its parameters; it has no options. Use it wherever the family allows."""

    def check(self, family: DriftFamily) -> None:
        """Raise InvalidInputError unless the family is linear in its parameters."""
        if not isinstance(family, LinearFamily | SharedFeatures):
            raise InvalidInputError(
                "least squares needs a family that is linear in its parameters",
                got=type(family).__name__,
                hint="GaussNewton() and Adam() fit any family",
            )

    def fit(
        self, family: DriftFamily, nodes: DriftNodes, white: Tensor, population: float, seed: int
    ) -> None:
        """Set the parameters of the family to those whose drift is nearest to the nodes."""
        _least_squares(family, nodes, white)


@dataclass(frozen=True)
class GaussNewton(Projection):
    """Levenberg-Marquardt steps, for families of up to a few hundred parameters.

    Use it for mechanisms: it costs one forward derivative per parameter and converges in a few steps.

    Args:
        max_iterations: The largest number of steps.
    """

    max_iterations: int = 50

    def __post_init__(self) -> None:
        check_positive_int(self.max_iterations, "max_iterations")

    def check(self, family: DriftFamily) -> None:
        """Accept any family: this projection needs nothing but a drift."""

    def fit(
        self, family: DriftFamily, nodes: DriftNodes, white: Tensor, population: float, seed: int
    ) -> None:
        """Set the parameters of the family to those whose drift is nearest to the nodes."""
        _gauss_newton(family, nodes, white, population, self.max_iterations)


@dataclass(frozen=True)
class Adam(Projection):
    """Stochastic gradient steps, for networks.

    Use it where there are too many parameters for a matrix of curvatures.

    Args:
        steps: The number of steps per projection.
        lr: The first learning rate, which falls to a twentieth.
        batch_size: The number of nodes per step.
    """

    steps: int = 300
    lr: float = 1e-2
    batch_size: int = 4096

    def __post_init__(self) -> None:
        check_positive_int(self.steps, "steps")
        check_real(self.lr, "lr", above=0.0)
        check_positive_int(self.batch_size, "batch_size")

    def check(self, family: DriftFamily) -> None:
        """Accept any family: this projection needs nothing but a drift."""

    def fit(
        self, family: DriftFamily, nodes: DriftNodes, white: Tensor, population: float, seed: int
    ) -> None:
        """Set the parameters of the family to those whose drift is nearest to the nodes."""
        _adam(family, nodes, white, population, self, seed)


def as_projection(projection: object, family: DriftFamily | None = None) -> Projection | None:
    """Return a projection that fits the family, for ``"auto"`` the first of least squares, Gauss-Newton and Adam that can.

    Without a family only the kind is checked, and ``"auto"`` is None.

    Raises:
        InvalidInputError: If it is anything else, or if the family can't be fitted like this.
    """
    if not isinstance(projection, Projection):
        if not isinstance(projection, str) or projection != "auto":
            raise InvalidInputError(
                "projection is unknown",
                got=repr(projection)[:60],
                expected="'auto', LeastSquares(), GaussNewton(...) or Adam(...)",
            )
        if family is None:
            return None
        if isinstance(family, LinearFamily | SharedFeatures):
            return LeastSquares()
        size = sum(value.numel() for value in family.parameters())
        return GaussNewton() if size <= _MAX_GAUSS_NEWTON else Adam()
    if family is not None:
        projection.check(family)
    return projection


def project_drift(
    family: DriftFamily,
    nodes: DriftNodes,
    spread: Tensor,
    *,
    population: float = 1.0,
    projection: str | Projection = "auto",
    seed: int = 0,
) -> None:
    r"""Set the family's parameters to the minimiser of the divergence from the bridge.

    .. math:: \min_\theta\ \tfrac12\,\mathbb E_q\!\int\big|b_\theta(t,X_t)-u_t\big|^2_{(GG^\top)^{-1}}dt
        \;-\;\tfrac1N\log p(\theta)

    Args:
        family: The family, which is changed in place.
        nodes: The nodes that stand for the bridge; see :meth:`SchrodingerBridge.nodes`.
        spread: The covariance rate of the noise, ``(d, d)``.
        population: The number ``N`` of particles that the divergence counts for beside the prior.
        projection: The way in which the family is fitted; in closed form where the drift is linear in its parameters, by
            Gauss-Newton steps for up to sixty parameters, by Adam for more, if ``"auto"``.
        seed: The seed of Adam's batches.

    Raises:
        NonFiniteError: If the drift isn't finite on the bridge.
    """
    chosen = as_projection(projection, family)
    assert chosen is not None
    white = whitening(spread)  # |white v|^2 is the norm above
    chosen.fit(family, nodes, white, population, seed)
    for name, value in family.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError("a parameter left the finite numbers", got=name)


def _chunks(nodes: DriftNodes, size: int = _CHUNK) -> Any:
    fields = (nodes.t, nodes.x, nodes.u, nodes.weight)
    return zip(*(field.split(size) for field in fields), strict=True)


@torch.no_grad()
def drift_at(drift: Any, nodes: DriftNodes) -> Tensor:
    """Return the drift ``(N, d)`` at all nodes."""
    return torch.cat([drift(t, x) for t, x, _, _ in _chunks(nodes)])


def whitening(spread: Tensor) -> Tensor:
    r"""Return a matrix ``(r, d)`` with :math:`|Wv|^2=v^\top(GG^\top)^+v`, for noise of rank ``r``.

    Where noise doesn't reach a component directly, drifts of one law of paths can't differ there, and only the others count.
    """
    factor, info = torch.linalg.cholesky_ex(spread)
    if not bool(info):
        return torch.linalg.inv(factor)
    # eigenvectors in coordinates where driven components have noise one, so that units don't decide what is driven
    size = spread.diagonal().clamp_min(0).sqrt()
    inverse = torch.where(size > 0, 1 / size, torch.zeros_like(size))
    values, vectors = torch.linalg.eigh(inverse[:, None] * spread * inverse)
    kept = values > 1e-10 * values[-1]
    return (vectors[:, kept] / values[kept].sqrt()).mT * inverse


def path_gain(before: Tensor, after: Tensor, nodes: DriftNodes, spread: Tensor) -> Tensor:
    r"""Return by how much the divergence falls when the reference's drift changes, both ``(N, d)`` at the nodes.

    .. math:: \tfrac12\,\mathbb E_q\int\big(|b_{old}-u|^2-|b_{new}-u|^2\big)dt
        =\tfrac12\,\mathbb E_q\int(b_{old}-b_{new})\cdot(b_{old}+b_{new}-2u)\,dt
    """
    white = whitening(spread)
    inner = ((before - after) @ white.mT * ((before + after - 2 * nodes.u) @ white.mT)).sum(-1)
    return 0.5 * (nodes.weight * inner).double().sum()


def drift_shift(before: Tensor, after: Tensor, nodes: DriftNodes, spread: Tensor) -> float:
    r"""Return how far two drifts, both ``(N, d)`` at the nodes, are apart: :math:`\mathbb E_q\int|b_{new}-b_{old}|^2_{(GG^\top)^{-1}}dt`.

    Times the number of particles it is the squared distance of the parameters in units of their standard errors, summed over directions,
    were paths seen.
    """
    gap = (after - before) @ whitening(spread).mT
    return float((nodes.weight * gap.square().sum(-1)).double().sum())


@torch.no_grad()
def _least_squares(family: DriftFamily, nodes: DriftNodes, white: Tensor) -> None:
    gram, moment = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    gram, moment = gram.to(white.device), moment.to(white.device)
    if isinstance(family, SharedFeatures):
        for t, x, u, w in _chunks(nodes):
            # normal equations E[psi psi^T] W^T = E[psi (u - b_0)^T]: the metric of the noise drops out, since all components share psi
            psi = family.regressors(t, x)
            weighted = psi * w[:, None]
            gram = gram + (weighted.mT @ psi).double()
            moment = moment + (weighted.mT @ (u - family.offset(t, x))).double()
        family.weight.copy_(_solve(gram, moment).mT)
        return
    assert isinstance(family, LinearFamily)
    for t, x, u, w in _chunks(nodes):
        # normal equations E[phi^T a^{-1} phi] theta = E[phi^T a^{-1} (u - b_0)], with a^{-1} = white^T white
        phi = white @ family.features(t, x)  # (N, d, K)
        target = (u - family.offset(t, x)) @ white.mT
        flat = (phi * w[:, None, None]).flatten(0, 1)
        gram = gram + (flat.mT @ phi.flatten(0, 1)).double()
        moment = moment + (flat.mT @ target.reshape(-1, 1)).double()
    family.theta.copy_(_solve(gram, moment).squeeze(-1))


def _solve(gram: Tensor, moment: Tensor) -> Tensor:
    """Solve scaled normal equations; directions that the bridge doesn't see stay at zero, with a warning."""
    # in coordinates where every regressor has size one, so that what counts as unseen doesn't depend on units
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


def _gauss_newton(
    family: DriftFamily, nodes: DriftNodes, white: Tensor, population: float, max_iterations: int
) -> None:
    """Levenberg-Marquardt steps; the curvature is that of the drift's square, and of the prior where positive."""
    flat = _Flat(family)
    theta, damping = flat.get().double(), 1e-3
    value, gram, slope = _expand(flat, theta, nodes, white, population)
    for _ in range(max_iterations):
        scale = torch.where(gram.diagonal() > 0, gram.diagonal(), torch.ones_like(theta))
        improved = False
        for _ in range(8):
            # Levenberg-Marquardt: (J^T J + damping diag) step = -gradient
            step = torch.linalg.solve(gram + damping * torch.diag(scale), -slope)
            # No parameter moves by more than half its size, or some of its standard errors from one path, at once: beyond
            # that the expansion means little.
            reach = 0.5 * theta.abs() + 5 * scale.rsqrt()
            step = step / (step.abs() / reach).amax().clamp_min(1.0)
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
            # residuals r = sqrt(w) G^{-1} (b - u) and their Jacobian, one forward derivative per parameter
            jacobian = torch.stack([(c @ white.mT * root).reshape(-1) for c in columns], -1)
            residual = (gap * root).reshape(-1)
            gram += (jacobian.mT @ jacobian).double()
            slope += (jacobian.mT @ residual).double()
            total += 0.5 * residual.square().double().sum()
    with recording():
        point = own.clone().requires_grad_()
        prior = _prior(flat, point)
        if prior is not None:
            # minus the prior's Hessian where it is positive, so that steps stay descents
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
        family: The drift.
        white: The inverse of the diffusion matrix, ``(r, d)``; see :func:`whitening`.
        total: The length of the time span.
        population: The number of particles that the divergence counts for beside the prior.
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
    family: DriftFamily, nodes: DriftNodes, white: Tensor, population: float, options: Adam, seed: int
) -> None:
    from stochdyn.run.trainer import fit

    objective = DriftMatching(family, white, float(nodes.weight.sum()), population)
    data = (nodes.t, nodes.x, nodes.u, nodes.weight)
    batch = min(options.batch_size, len(nodes))

    def cosine(optimizer: Any) -> Any:
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, options.steps, eta_min=0.05 * options.lr)

    fit(objective, data, options.steps, options.lr, batch, seed, progress=False, scheduler=cosine)
