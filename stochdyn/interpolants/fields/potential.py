"""Log densities of a noised law as networks, which know their score and Fokker-Planck residual in one sweep."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_tensor,
    check_choice,
    check_event_size,
    check_nonempty,
    check_positive,
    check_positive_int,
)
from stochdyn._transforms import recording
from stochdyn.core.forward.divergences import (
    attach,
    divergence_probes,
    exact_divergence,
    laplacian,
    pull_back,
    release,
    sample_probes,
)
from stochdyn.core.forward.flow import MarginalFlow, as_time
from stochdyn.core.networks import MLP
from stochdyn.core.sde.jets import network_jet
from stochdyn.errors import ShapeError, TooFewDrawsError
from stochdyn.interpolants.paths.processes import AffineProcess, check_process

__all__ = ["FunctionPotential", "Potential", "PotentialNetwork", "ScoreAndResidual"]

Trace = Literal["exact", "forward", "hutchinson"]


class ScoreAndResidual(NamedTuple):
    """Score ``(..., d)`` and Fokker-Planck residuals ``(K, ...)``: ``K = 1`` exact, or one per probe."""

    score: Tensor
    residuals: Tensor


class Potential(nn.Module, ABC):
    r"""A learned log density :math:`\Phi(t,x)` of a process, up to a constant.

    Args:
        process: The process whose marginals it is to be.
    """

    def __init__(self, process: AffineProcess) -> None:
        super().__init__()
        self.process = check_process(process)

    @abstractmethod
    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return ``Phi (...)`` at ``x (..., d)``."""

    @abstractmethod
    def score(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the gradient of ``Phi`` in space, ``(..., d)``."""

    @abstractmethod
    def score_and_residual(
        self, t: Tensor | float, x: Tensor, method: Trace = "exact", num_probes: int = 2
    ) -> ScoreAndResidual:
        r"""Return the score and the residual of the Fokker-Planck equation in its log form.

        .. math:: R=\partial_t\Phi+\nabla\cdot f+f\cdot\nabla\Phi-\tfrac12g^2(\Delta\Phi+|\nabla\Phi|^2)

        Args:
            t: The times that broadcast to ``x[..., :1]``.
            x: The points, ``(..., d)``.
            method: How the Laplacian is computed: ``"exact"`` by reverse passes, ``"forward"`` in one pass, or ``"hutchinson"`` by random probes.
            num_probes: The number of residuals that ``"hutchinson"`` returns, independent given the point.
        """


class FunctionPotential(Potential):
    r"""Any function of time and state as a potential, by automatic differentiation.

    Args:
        process: The noising process.
        function: The log density, ``function(t, x) -> (...)`` or ``(..., 1)``, twice differentiable; ``t`` comes expanded to
            ``x[..., :1]``.
        reference: A flow whose log density is added.

    Example:
        >>> from stochdyn.interpolants import OU
        >>> stationary = FunctionPotential(OU(), lambda t, x: -x.square().sum(-1))
        >>> stationary.score_and_residual(0.5, torch.ones(1, 2)).residuals.tolist()
        [[0.0]]
    """

    def __init__(
        self,
        process: AffineProcess,
        function: Callable[[Tensor, Tensor], Tensor],
        reference: MarginalFlow | None = None,
    ) -> None:
        super().__init__(process)
        self.function, self.reference = function, reference

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the log density up to a constant, ``(...)``."""
        time = as_time(t, x).to(x.dtype).expand(*x.shape[:-1], 1)
        value = self.function(time, x)
        value = value.squeeze(-1) if value.ndim == x.ndim else value
        if value.shape != x.shape[:-1]:
            raise ShapeError(
                "a potential returns one number per point",
                got=tuple(value.shape),
                expected=tuple(x.shape[:-1]),
            )
        return value if self.reference is None else value + self.reference.log_prob(time, x)

    def score(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the gradient of the log density, ``(..., d)``."""
        keep = torch.is_grad_enabled()
        with recording():
            y = attach(x)
            result = pull_back(self(t, y), y, create_graph=keep)
        return release(result, keep, (x, y))

    def score_and_residual(
        self, t: Tensor | float, x: Tensor, method: Trace = "exact", num_probes: int = 2
    ) -> ScoreAndResidual:
        """Return the score and residuals of the Fokker-Planck equation from one evaluation."""
        check_choice(method, ("exact", "forward", "hutchinson"), "method")
        keep = torch.is_grad_enabled()
        time = as_time(t, x).to(x.dtype).expand(*x.shape[:-1], 1)
        with recording():
            y, s = attach(x), attach(time)
            value = self(s, y)
            change, score = torch.autograd.grad(
                value, (s, y), torch.ones_like(value), create_graph=True, materialize_grads=True
            )
            if method == "exact":
                curvature = exact_divergence(score, y, keep)[None]
            elif method == "forward":
                curvature = laplacian(lambda z: self(s, z), y, "forward")[None]
            else:
                curvature = divergence_probes(score, y, sample_probes(y, num_probes), keep)
            rate = self.process.rate(time).squeeze(-1)
            half = 0.5 * self.process.squared_diffusion(time).squeeze(-1)
            carried = rate * (x.shape[-1] + ((y - self.process.center(y)) * score).sum(-1))
            residual = change.squeeze(-1) + carried - half * (curvature + score.square().sum(-1))
        pairs = ((x, y), (time, s))
        return ScoreAndResidual(release(score, keep, *pairs), release(residual, keep, *pairs))


class PotentialNetwork(Potential):
    r"""A Gaussian that solves the equation, times the exponential of a network.

    .. math::
        \Phi(t,x)=\log N\big(x;\,m_t,\,\mathrm{diag}\,V_t\big)+N_\theta(\lambda_t,\,\tilde y),\qquad
        \tilde y=\frac{x-m_t}{\sqrt{V_t}},\qquad V_t=a_t^2v+\sigma_t^2

    with mean :math:`m_0` and variances ``v`` of the data. The network sees the whitened state and the log
    signal-to-noise ratio, scaled to [-1, 1]. In these coordinates the residual is

    .. math::
        R=\dot\lambda\,\partial_\lambda N+\sum_i\kappa_i\big(\tilde y_i\,\partial_iN-\partial_i^2N-(\partial_iN)^2\big),
        \qquad \kappa=\frac{g^2}{2V_t},

    free of the large terms that cancel between a Gaussian's own derivatives.

    Args:
        process: The noising process.
        dim: The number d of components of a point.
        width: The width of the hidden layers.
        depth: The number of hidden layers.
        mean: The mean of the data, a number or ``(d,)``.
        variance: The variances of the data, a number or ``(d,)``.
        zero_last: Whether the potential starts as that of the Gaussian with these moments.

    Raises:
        InvalidInputError: If a size or a variance isn't positive.

    Example:
        >>> from stochdyn.interpolants import OU
        >>> phi = PotentialNetwork(OU(), 2)
        >>> phi.score_and_residual(0.5, torch.ones(3, 2)).residuals.shape
        torch.Size([1, 3])
    """

    data_mean: Tensor
    data_variance: Tensor
    log_snr_range: Tensor

    def __init__(
        self,
        process: AffineProcess,
        dim: int,
        width: int = 64,
        depth: int = 3,
        mean: Tensor | float = 0.0,
        variance: Tensor | float = 1.0,
        zero_last: bool = True,
    ) -> None:
        super().__init__(process)
        for size, name in ((dim, "dim"), (width, "width"), (depth, "depth")):
            check_positive_int(size, name)
        check_positive(variance, "variance")
        self.dim = dim
        self.network = MLP((dim + 1, *[width] * depth, 1), zero_last)
        self.network.layers[-1].bias.requires_grad_(
            False
        )  # a constant, which neither score nor residual sees
        self.register_buffer("data_mean", _vector(mean, dim, "mean"))
        self.register_buffer("data_variance", _vector(variance, dim, "variance"))
        ends = process.log_snr(torch.tensor([process.horizon, process.start], dtype=torch.float64))
        self.register_buffer("log_snr_range", ends.to(self.data_mean.dtype))

    @classmethod
    def from_data(
        cls, process: AffineProcess, data: Tensor, width: int = 64, depth: int = 3, zero_last: bool = True
    ) -> PotentialNetwork:
        """Return a potential whose Gaussian has the moments of ``data (n, d)``."""
        data = as_tensor(data, "data", 2, "(n, d)")
        if len(data) < 2:
            raise TooFewDrawsError(
                "data have too few points for moments", got=len(data), expected="at least 2"
            )
        made = cls(process, data.shape[-1], width, depth, data.mean(0), data.var(0), zero_last)
        return made.to(data)

    def _coordinates(self, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Flatten, and return network inputs ``(n, d + 1)``, variances ``V (n, d)`` and times ``(n, 1)``."""
        check_event_size(x, self.dim, "x")
        check_nonempty(x, "x")
        time = as_time(t, x).to(x.dtype).expand(*x.shape[:-1], 1).reshape(-1, 1)
        flat = x.reshape(-1, self.dim)
        variance = self.process.scale(time).square() * self.data_variance + self.process.variance(time)
        y = (flat - self.process.location(time, self.data_mean)) * variance.rsqrt()
        low, high = self.log_snr_range
        snr = (self.process.log_snr(time) - 0.5 * (low + high)) * (2 / (high - low))
        return torch.cat([y, snr], -1), variance, time

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the log density up to a constant, ``(...)``."""
        u, variance, _ = self._coordinates(t, x)
        # log N(x; m_t, V_t) + network: the Gaussian of the moments of the data, noised, and a correction
        gauss = -0.5 * (u[:, :-1].square() + variance.log()).sum(-1) - 0.5 * self.dim * math.log(2 * math.pi)
        return (gauss + self.network(u).squeeze(-1)).reshape(x.shape[:-1])

    def score(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the gradient of the log density, ``(..., d)``; differentiable once, in parameters and points."""
        u, variance, _ = self._coordinates(t, x)
        slope = network_jet(self.network, u).slope[:, :-1]
        return ((slope - u[:, :-1]) * variance.rsqrt()).reshape(x.shape)

    def score_and_residual(
        self, t: Tensor | float, x: Tensor, method: Trace = "exact", num_probes: int = 2
    ) -> ScoreAndResidual:
        """Return the score and residuals from one evaluation; both exact methods are the same here."""
        check_choice(method, ("exact", "forward", "hutchinson"), "method")
        u, variance, time = self._coordinates(t, x)
        y = u[:, :-1]
        g2 = self.process.squared_diffusion(time)
        # R = d_t Phi + div f + f . grad Phi - g^2 / 2 (Delta Phi + |grad Phi|^2). The Gaussian solves the equation, so of Phi = log N + N_theta
        # only terms with N_theta stay: its time derivative, g^2 / 2V (y - grad_y N).grad_y N, and -g^2 / 2V Delta_y N
        root = (0.5 * g2 / variance).sqrt()
        probing = method == "hutchinson"
        if probing:
            probes = sample_probes(root, num_probes) * root
        else:
            probes = torch.eye(self.dim, dtype=u.dtype, device=u.device)[:, None] * root
        directions = torch.nn.functional.pad(probes, (0, 1))  # nothing moves along the time coordinate
        jet = network_jet(self.network, u, directions, each=probing)
        slope, curvature = jet.slope[:, :-1], jet.curvature
        assert curvature is not None
        low, high = self.log_snr_range
        clock = -g2 / self.process.variance(time) / (high - low)
        flat = (
            clock.squeeze(-1) * jet.slope[:, -1] + (root.square() * slope * (y - slope)).sum(-1) - curvature
        )
        score = ((slope - y) * variance.rsqrt()).reshape(x.shape)
        return ScoreAndResidual(score, flat.reshape(-1, *x.shape[:-1]))

    def log_density_curvature(self, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return score ``(..., d)`` and Laplacian ``(...)`` of the log density, exactly."""
        u, variance, _ = self._coordinates(t, x)
        eye = torch.eye(self.dim, dtype=u.dtype, device=u.device)[:, None] * variance.rsqrt()
        jet = network_jet(self.network, u, torch.nn.functional.pad(eye, (0, 1)))
        assert jet.curvature is not None
        score = (jet.slope[:, :-1] - u[:, :-1]) * variance.rsqrt()
        return score.reshape(x.shape), (jet.curvature - (1 / variance).sum(-1)).reshape(x.shape[:-1])


def _vector(value: Tensor | float, dim: int, name: str) -> Tensor:
    vector = as_tensor(value, name)
    vector = vector.detach().expand(dim) if vector.ndim == 0 else vector.detach()
    if tuple(vector.shape) != (dim,):
        raise ShapeError(f"{name} is a number or (d,)", got=tuple(vector.shape), expected=(dim,))
    return vector.clone()
