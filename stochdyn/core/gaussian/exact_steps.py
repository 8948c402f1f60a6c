"""The equation whose Euler steps on a grid are the exact steps of a linear equation."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from stochdyn.core.gaussian.constant_steps import constant_transition
from stochdyn.core.gaussian.transition import distinct_steps
from stochdyn.core.law.transition import check_has_density
from stochdyn.core.sde.affine_field import AffineField
from stochdyn.core.sde.coefficients import Matrix
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import first_time
from stochdyn.core.sde.noise import Brownian
from stochdyn.errors import InvalidInputError, SingularDiffusionError

__all__ = ["exact_steps", "takes_exact_steps"]


class _StepField(nn.Module):
    """The drift and the diffusion of every step, found by its first time; of each series where they have grids ``(*G, T)`` of their own."""

    def __init__(self, ts: Tensor, matrix: Tensor, offset: Tensor, spread: Tensor) -> None:
        super().__init__()
        # halfway between two grid points the nearer one changes
        self.edges = ts[..., 1:-1] - 0.5 * (ts[..., 1:-1] - ts[..., :-2])
        self.matrix, self.offset, self.spread = matrix, offset, spread

    def _step(self, t: Tensor) -> Tensor:
        """Return the number of the step that holds each time."""
        times = t.detach().reshape(-1, *self.edges.shape[:-1]).movedim(0, -1).contiguous()
        return torch.searchsorted(self.edges.to(t).contiguous(), times).movedim(-1, 0)

    def _at(self, part: Tensor, event: int, step: Tensor, t: Tensor, x: Tensor) -> Tensor:
        """Return ``part (N, *B, *event)`` in the steps that hold ``t``, to stand beside states ``x``."""
        own = self.edges.shape[:-1]
        found = _rows(part, step, event)
        # One time has no axis before those of the grids, and where each series has its own, one of length one after them.
        if t.ndim == (len(own) + 1 if own else 0):
            return found[0]
        # time leads: the axes of the batch of A stand at its right, as those of the state do
        fill = (1,) * (x.ndim - 1 - (found.ndim - event))
        return found.reshape(found.shape[0], *fill, *found.shape[1:])

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        step = self._step(t)
        matrix, offset = self._at(self.matrix, 2, step, t, x), self._at(self.offset, 1, step, t, x)
        return (matrix @ x.unsqueeze(-1)).squeeze(-1) + offset

    def diffusion(self, t: Tensor, x: Tensor) -> Matrix:
        return Matrix(self._at(self.spread, 2, self._step(t), t, x))


def _rows(part: Tensor, index: Tensor, event: int) -> Tensor:
    """Return the rows ``index (n, *G)`` of ``part (N, *B, *event)``, where the axes G are the last of B."""
    if index.ndim == 1:
        return part[index]
    lead = (1,) * (part.ndim - event - index.ndim)
    place = index.reshape(index.shape[0], *lead, *index.shape[1:], *(1,) * event)
    return torch.take_along_dim(part, place, 0)


class _Step(AffineField):
    """The drift of steps that are all equally long."""

    def __init__(self, matrix: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.parts = matrix, offset

    def affine(self) -> tuple[Tensor, Tensor]:
        return self.parts


def takes_exact_steps(sde: SDE, ts: Tensor, x0: Tensor) -> bool:
    """Return whether :func:`exact_steps` has an answer by the form of the equation, whatever its values are.

    Args:
        sde: The equation.
        ts: The grid of times, ``(T,)`` or ``(*batch, T)``.
        x0: A start ``(*batch, d)``.
    """
    if not isinstance(sde.drift, AffineField) or not isinstance(sde.noise, Brownian) or sde.state_dependent:
        return False
    return ts.shape[-1] > 1 and sde.noise_dim(first_time(ts, x0), x0) == x0.shape[-1]


def exact_steps(sde: SDE, ts: Tensor) -> SDE:
    r"""Return the equation whose Euler steps on the grid ``ts`` have the exact law of a linear one.

    A step of the length :math:`\Delta` of :math:`dX=(AX+a)\,dt+G\,dW` is :math:`\Phi x+c+Q^{1/2}\epsilon`, so the drift is
    :math:`((\Phi-1)x+c)/\Delta` and the diffusion the root of :math:`Q/\Delta` that tends to G with the step:
    :math:`\mathrm{chol}(Q/\Delta)\,\mathrm{chol}(GG^\top)^{-1}G`. A control acts on the increments of these steps.

    Args:
        sde: The equation, whose drift says that it is affine.
        ts: The grid of times ``(T,)``, or ``(*batch, T)`` where every series has its own.

    Raises:
        InvalidInputError: If the drift isn't an :class:`AffineField`, the diffusion isn't constant, or the noise has memory.
        SingularDiffusionError: If noise doesn't reach every component by a channel of its own.
    """
    field = sde.drift
    if not isinstance(field, AffineField):
        raise InvalidInputError(
            "exact steps need a drift that says that it is affine", got=type(field).__name__,
            hint="derive it from core.AffineField, or take another method",
        )  # fmt: skip
    if not isinstance(sde.noise, Brownian):
        raise InvalidInputError(
            "exact steps are those of Brownian noise", got=type(sde.noise).__name__,
            hint="method='euler', in which the memory of the noise is exact",
        )  # fmt: skip
    if sde.state_dependent:
        raise InvalidInputError("exact steps need a constant diffusion", got="a function of time and state")
    matrix, offset = field.affine()
    dim = matrix.shape[-1]
    g = sde.diffusion(first_time(ts, offset), offset).matrix(dim).double()
    if g.shape[-1] != dim:
        raise SingularDiffusionError(
            "in an exact step noise reaches every component, so each needs a channel", got=f"{g.shape[-1]} channels",
            expected=f"{dim}", hint="method='euler', or a LinearGaussianMeasure where the law alone is wanted",
        )  # fmt: skip
    check_has_density(sde, Matrix(g), dim)
    covariance = g @ g.mT
    root = torch.linalg.cholesky(covariance)
    times = ts.movedim(-1, 0)
    dt, where = distinct_steps(times[:-1], times[1:])
    phi, c, q = constant_transition(matrix.double(), offset.double(), covariance, dt, torch.float64)
    lag = dt.double().reshape(len(dt), *(1,) * (phi.ndim - 2 - dt.ndim), *dt.shape[1:], 1, 1)
    slope = (phi - torch.eye(dim, dtype=phi.dtype, device=phi.device)) / lag
    shift = c / lag.squeeze(-1)
    turn = torch.linalg.solve_triangular(root, g, upper=False)
    spread = torch.linalg.cholesky(q / lag) @ turn
    slope, shift, spread = (part.to(matrix) for part in (slope, shift, spread))
    if len(dt) == 1:
        steps = SDE(_Step(slope[0], shift[0]), Matrix(spread[0]))
    else:
        if where is not None:
            slope, shift, spread = slope[where], shift[where], spread[where]
        found = _StepField(ts, slope, shift, spread)
        steps = SDE(found, found.diffusion)
    return steps if sde.control is None else steps.with_control(sde.control)
