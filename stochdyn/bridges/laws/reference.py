"""What a reference process may be given as, its noise, and the law of a snapshot as its start."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import constraints

from stochdyn._checks import as_tensor, check_finite
from stochdyn.bridges.data.snapshots import Snapshot, Snapshots
from stochdyn.bridges.families.base import DriftFamily
from stochdyn.bridges.families.neural import NeuralDrift, PotentialDrift
from stochdyn.bridges.families.pyro_family import as_family, named_defaults, required_arguments
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.sde.coefficients import Coefficient, Scalar, as_coefficient
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import DiffusionError, ShapeError, UnavailableError

__all__ = ["EmpiricalLaw", "FixedDrift", "as_reference", "default_diffusion", "fitted_family", "spread_of"]


class FixedDrift(DriftFamily):
    """A drift without parameters, given as a function ``(t, x)``."""

    def __init__(self, function: Any, dim: int) -> None:
        super().__init__(dim)
        self.function = function

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(*batch, d)`` at times ``t`` and states ``x (*batch, d)``."""
        return self.function(t, x)


def fitted_family(drift: Any, snapshots: Snapshots, dim: int | None = None) -> DriftFamily:
    """Return a copy of ``drift`` as a family in the precision and on the device of the snapshots, checked on its particles.

    Raises:
        ShapeError: If its value isn't like the state.
        InvalidInputError: If it is no drift.
        NonFiniteError: If it isn't finite where the particles are.
    """
    dim = snapshots.dim if dim is None else dim
    plain = callable(drift) and not isinstance(drift, nn.Module) and required_arguments(drift) == 2
    plain = plain and not named_defaults(drift)
    family = FixedDrift(drift, dim) if plain else as_family(copy.deepcopy(drift), dim)
    family = family.to(device=snapshots.device, dtype=snapshots.dtype)
    for part in family.modules():
        if isinstance(part, NeuralDrift | PotentialDrift):
            with torch.no_grad():
                part.take_units(snapshots)
    x = snapshots.samples[0][:3]
    x = torch.cat((x, x.new_ones(len(x), dim - x.shape[1])), -1)
    with torch.no_grad():
        value = family(snapshots.times[0].to(x), x)
    if not isinstance(value, Tensor) or value.shape != x.shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise ShapeError("the drift has another shape than the state", got=got, expected=tuple(x.shape))
    check_finite(value, "drift")
    return family


def as_reference(reference: Any, snapshots: Snapshots) -> tuple[DriftFamily | None, Coefficient | None]:
    """Return drift and, where the reference has one, diffusion."""
    if reference is None:
        return None, None
    sde = reference.sde if isinstance(reference, DiffusionMeasure) else reference
    if not isinstance(sde, SDE):
        return fitted_family(reference, snapshots), None
    if sde.state_dependent or sde.noise.num_states or sde.control is not None:
        raise UnavailableError(
            "a reference needs constant noise without memory and without control",
            hint="transform the state so that its noise is constant",
        )
    x = snapshots.samples[0]
    return fitted_family(sde.drift, snapshots), sde.diffusion(snapshots.times[0].to(x), x)


def default_diffusion(snapshots: Snapshots) -> Tensor:
    r"""Return the noise by which independent partners of neighbouring snapshots are as far apart as the noise carries them.

    .. math:: \sigma^2=\frac1I\sum_i\frac{|m_{i+1}-m_i|^2+\mathrm{tr}\,S_i+\mathrm{tr}\,S_{i+1}}{d\,(t_{i+1}-t_i)}

    Raises:
        DiffusionError: If all particles coincide.
    """
    # E |x - y|^2 of independent partners, per component and unit of time
    means = torch.stack([snap.mean for snap in snapshots])
    traces = torch.stack([snap.covariance.diagonal().sum() for snap in snapshots])
    squares = means.diff(dim=0).square().sum(-1) + traces[1:] + traces[:-1]
    sigma = (squares / snapshots.durations.to(squares)).mean().div(snapshots.dim).sqrt()
    if not float(sigma) > 0:
        raise DiffusionError("diffusion is needed where all particles coincide", hint="give diffusion=...")
    return sigma


def spread_of(diffusion: Any, snapshots: Snapshots, dim: int | None = None, reach: bool = False) -> Tensor:
    """Return the covariance rate ``G G^T (d, d)`` of a constant diffusion, in the precision of the snapshots.

    Args:
        diffusion: The noise, a number, ``(d,)``, a matrix or a coefficient.
        snapshots: The snapshots whose precision and device count.
        dim: The number of components of the state; that of the snapshots if None.
        reach: Whether the noise may reach some components through the drift only, as that of a velocity reaches positions.

    Raises:
        DiffusionError: If it isn't positive, or singular where it mustn't be.
    """
    if callable(diffusion) and not isinstance(diffusion, Coefficient):
        raise UnavailableError("a reference needs constant noise", got="a diffusion that is a function")
    if not isinstance(diffusion, Coefficient):
        diffusion = as_tensor(
            diffusion, "diffusion", (0, 1, 2), "a number, (d,) or (d, d)", like=snapshots.samples[0]
        )
    coefficient = as_coefficient(diffusion)
    coefficient.check()
    dim = snapshots.dim if dim is None else dim
    coefficient.check_dim(dim)
    if coefficient.value.ndim > 2 or (isinstance(coefficient, Scalar) and coefficient.value.ndim):
        raise ShapeError("the diffusion must be one for all", got=tuple(coefficient.value.shape))
    spread = coefficient.covariance(dim).detach().to(snapshots.samples[0])
    if reach and float(spread.diagonal().max()) > 0:
        return spread
    smallest = float(torch.linalg.eigvalsh(spread.double())[0])
    if not smallest > 1e-12 * float(spread.diagonal().max()):
        raise DiffusionError(
            "the diffusion must reach every component",
            got=f"smallest eigenvalue {smallest:.3g} of its covariance",
            hint="a state that is seen only in part needs a momentum reference",
        )
    return spread


class EmpiricalLaw(torch.distributions.Distribution):
    """Weighted particles as a distribution with event ``(d,)``; it has samples and no density.

    Args:
        sample: The particles, ``(n, d)``.
        weights: The weights of the particles, ``(n,)``.
    """

    arg_constraints: dict[str, Any] = {}  # noqa: RUF012, torch's own convention
    support = constraints.independent(constraints.real, 1)

    def __init__(self, sample: Tensor, weights: Tensor) -> None:
        self.particles, self.weights = sample, weights
        super().__init__(event_shape=sample.shape[1:], validate_args=False)

    @staticmethod
    def of(snapshot: Snapshot) -> EmpiricalLaw:
        """Return the law of a snapshot."""
        return EmpiricalLaw(snapshot.sample, snapshot.weights)

    @property
    def mean(self) -> Tensor:
        """``(d,)``."""
        return self.weights @ self.particles

    @property
    def variance(self) -> Tensor:
        """``(d,)``."""
        return self.weights @ (self.particles - self.mean).square()

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Draw ``(*sample, d)``."""
        shape = torch.Size(sample_shape)
        index = torch.multinomial(self.weights, max(shape.numel(), 1), replacement=True)
        return self.particles[index[: shape.numel()]].reshape(*shape, -1)

    def log_prob(self, value: Tensor) -> Tensor:
        """Raise: particles have no density."""
        raise UnavailableError("the law of a snapshot has no density")
