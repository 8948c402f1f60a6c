"""Snapshots of a part of the state, such as positions without velocities: messages over all snapshots."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_positive, check_positive_int, check_real
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.laws.hidden_chain import HiddenChain, log_normal
from stochdyn.bridges.laws.partial_gaussian import PartialGaussianBridge
from stochdyn.core._distance import distance_between
from stochdyn.core.gaussian.conditioning import EndPotential, TiltedMeasure, reachable
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.errors import ConvergenceWarning, InvalidInputError, ShapeError

__all__ = ["PartialBridge", "momentum"]


def momentum(dim: int, friction: float = 0.0, diffusion: float = 1.0) -> tuple[Tensor, Tensor]:
    r"""Return drift matrix and diffusion of a reference with momentum, for states (position, velocity).

    .. math:: dx=v\,dt,\qquad dv=-\gamma v\,dt+\sigma\,dW

    Args:
        dim: The number of components of a position.
        friction: The friction :math:`\gamma`, in 1/time.
        diffusion: The noise :math:`\sigma` of the velocity, in units of velocity per root of time.

    Returns:
        ``(2 dim, 2 dim)`` and ``(2 dim, dim)``, in double precision.

    Example:
        >>> matrix, diffusion = momentum(1, friction=0.3)
        >>> matrix.tolist(), diffusion.tolist()
        ([[0.0, 1.0], [0.0, -0.3]], [[0.0], [1.0]])
    """
    check_positive_int(dim, "dim")
    check_real(friction, "friction")
    check_positive(diffusion, "diffusion")
    eye, zero = torch.eye(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)
    matrix = torch.cat((torch.cat((zero, eye), 1), torch.cat((zero, -friction * eye), 1)))
    return matrix, torch.cat((zero, diffusion * eye))


class PartialBridge(HiddenChain):
    r"""The law nearest to a linear reference whose *seen* components have the snapshots for marginals.

    .. math:: \min_q\mathrm{KL}(q\,\|\,p)\quad\text{with}\quad (X_{t_i})_{1..p}\sim\pi_i,\ i=1,\dots,I

    What isn't seen ties the past of a snapshot to its future, so pairs can't be solved one by one. The optimum weighs the reference by one
    potential a snapshot, a function of what is seen there, and iterative proportional fitting finds them one after the other, forth and back,
    with messages over the whole chain. Hidden components are represented by weighted draws for every particle, first from the bridge
    through the snapshots' Gaussian approximations, then anew around those that proved likely.

    Use it for positions without velocities, and for species that aren't measured, under a linear reference; where the snapshots are known by
    two moments only, :class:`PartialGaussianBridge` is exact. States have ``d`` components, of which the first ``p`` are those of the
    snapshots; scores against a snapshot compare these.

    Args:
        snapshots: The snapshots of the first ``p`` components.
        drift_matrix: The matrix of the reference's drift, ``(d, d)`` with ``d > p``, in 1/time.
        diffusion: The noise of the reference, a number, ``(d,)`` or ``(d, m)``, which must reach every component through the
            drift.
        initial_mean: The mean of the reference at the first snapshot, ``(d,)``.
        initial_cov: The covariance of the reference at the first snapshot, ``(d, d)``. The law depends on it through what is
            hidden. Where they are None, they are those of :func:`~stochdyn.bridges.laws.unit_information`: what is hidden gets
            the size that the displacements between snapshots have.
        num_hidden: The number of draws of the hidden components per particle.
        num_rounds: The number of times that the hidden components are drawn; 1 keeps the first draws.
        tolerance: The largest L1 error of a snapshot's marginal.
        max_iterations: The largest number of sweeps over the snapshots in each round; forth and back count as two.
        seed: The seed of the draws.

    Attributes:
        marginal_errors: The L1 errors of the snapshots' marginals, ``(I,)``, of the law as it is.
        sweeps: The number of sweeps in the last round.

    Raises:
        ShapeError: If the drift doesn't fit.
        InvalidInputError: If the first law is left out and snapshots say nothing about some hidden component.
        SingularDiffusionError: If noise doesn't reach every component.

    Warns:
        ConvergenceWarning: If ``max_iterations`` didn't suffice.
        ApproximationWarning: If a snapshot rests on few draws.

    Example:
        >>> clouds = [torch.randn(30, 1).double() + 2 * k for k in range(3)]
        >>> law = PartialBridge(Snapshots([0.0, 1.0, 2.0], clouds), *momentum(1, diffusion=2.0))
        >>> law.sample(torch.linspace(0, 2, 5, dtype=torch.float64), 10).x.shape
        torch.Size([10, 5, 2])

    Reference: Chen et al. (2023), Deep momentum multi-marginal Schrödinger bridge; Hong, Shi & Niles-Weed (2025), Trajectory
    inference with smooth Schrödinger bridges (message passing with sampled velocities).
    """

    def __init__(
        self,
        snapshots: Snapshots,
        drift_matrix: Tensor,
        diffusion: Coefficient | Tensor | float,
        initial_mean: Tensor | None = None,
        initial_cov: Tensor | None = None,
        *,
        num_hidden: int = 20,
        num_rounds: int = 2,
        tolerance: float = 1e-4,
        max_iterations: int = 500,
        seed: int = 0,
    ) -> None:
        super().__init__(snapshots, num_hidden, num_rounds, tolerance, max_iterations, seed)
        drift_matrix = as_tensor(drift_matrix, "drift_matrix", 2, "(d, d)", like=snapshots.samples[0])
        seen, dim = snapshots.dim, drift_matrix.shape[-1]
        if drift_matrix.shape != (dim, dim) or dim <= seen:
            raise ShapeError(
                "drift_matrix doesn't fit", got=tuple(drift_matrix.shape), expected=f"(d, d) with d > {seen}"
            )
        self.dim = dim
        like = snapshots.samples[0]
        if isinstance(diffusion, Tensor):
            diffusion = diffusion.to(like)
        initial_mean, initial_cov = (
            v.to(like) if isinstance(v, Tensor) else v for v in (initial_mean, initial_cov)
        )
        observe = torch.eye(seen, dim).to(like)
        means = torch.stack([snap.mean for snap in snapshots])
        covs = torch.stack([snap.covariance for snap in snapshots])
        # relative to all that the snapshots spread and move, so that clouds of one particle have a Gaussian approximation too
        size = covs.diagonal(dim1=-2, dim2=-1).mean(0) + means.var(0, correction=0)
        if not bool((size > 0).all()):
            raise InvalidInputError("snapshots neither move nor spread in some component", got=size.tolist())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # it only says where to draw
            gauss = PartialGaussianBridge(
                snapshots.times, means, covs + 1e-6 * torch.diag(size), observe,
                drift_matrix.to(like), diffusion, initial_mean, initial_cov, tolerance=1e-6,
            )  # fmt: skip
        self.reference = gauss.reference
        generator = torch.Generator(like.device).manual_seed(self.seed)
        self._solve(*self._draw_around(*self._first_laws(gauss), generator), generator)

    def _first_laws(self, gauss: PartialGaussianBridge) -> tuple[list[Tensor], list[Tensor]]:
        """Hidden components given what is seen, under the Gaussian bridge made half as wide again."""
        centres, factors = [], []
        for x, mean, cov in zip(self.snapshots.samples, *gauss.states(), strict=True):
            s = self.seen
            # hidden given seen under a Gaussian: mean m_h + C_hs C_ss^{-1} (s - m_s), covariance C_hh - C_hs C_ss^{-1} C_sh
            gain = torch.linalg.solve(cov[:s, :s], cov[:s, s:]).mT
            factors.append(1.5 * torch.linalg.cholesky(cov[s:, s:] - gain @ cov[:s, s:]))
            centres.append(mean[s:] + (x - mean[:s]) @ gain.mT)
        return centres, factors

    def _log_kernel(self, k: int, a: Tensor, b: Tensor) -> Tensor:
        span = self.snapshots.durations[k : k + 1].to(self.reference.like.dtype)
        phi, shift = (part[0] for part in self.reference.transition(torch.zeros_like(span), span)[:2])
        # log N(b; Phi a + c, Q) by distances in coordinates where Q is the identity
        factor = reachable(self.reference, float(span))
        expected = torch.linalg.solve_triangular(factor, (a @ phi.mT + shift).mT, upper=False).mT
        reached = torch.linalg.solve_triangular(factor, b.mT, upper=False).mT
        distance = distance_between(expected, reached)
        return (
            -0.5 * distance.square() - factor.diagonal().log().sum() - 0.5 * self.dim * math.log(2 * math.pi)
        )

    def _log_start(self, x: Tensor) -> Tensor:
        return log_normal(x, self.reference.initial_mean, self.reference.initial_cov)

    def _between(self, k: int, ts: Tensor, a: Tensor, b: Tensor, generator: torch.Generator | None) -> Tensor:
        """Draw the reference at times ``ts (T,)`` after snapshot ``k``, between states ``a`` and ``b (n, d)``: ``(n, T, d)``."""
        if not ts.numel():
            return a[:, None][:, :0]
        span, clock = float(self.snapshots.durations[k]), ts - self.snapshots.times[k]
        still = torch.zeros(self.dim, self.dim, dtype=a.dtype, device=a.device)
        pinned = TiltedMeasure(self.reference, span, EndPotential.pinned(b), a, still)
        return pinned.sample(clock.to(a.dtype).clamp(0.0, span), (), generator).x
