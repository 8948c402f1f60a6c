"""Stochastic differential equations: drift, diffusion, driving noise, and the equations that one makes of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    check_bool,
    check_callable,
    check_positive_int,
    check_same_device,
    check_same_dtype,
)
from stochdyn.core.sde.coefficients import Coefficient, Constant, Diagonal, Matrix, as_coefficient
from stochdyn.core.sde.control import Control, Field
from stochdyn.core.sde.noise import Brownian, NoiseProcess
from stochdyn.errors import DeviceMismatchError, DtypeMismatchError, InvalidInputError, ShapeError

__all__ = ["SDE"]


class SDE(nn.Module):
    r"""An Itô equation driven by Brownian motion or by a process with memory.

    .. math:: dX_t = b(t, X_t)\,dt + G(t, X_t)\,dZ_t

    Args:
        drift: A function ``drift(t, x)`` that returns a tensor like ``x``; a callable or an ``nn.Module``. It is called with
            ``x (*batch, d)`` and ``t`` of no axes, or with time leading: ``x (time, *batch, d)`` and ``t``
            broadcastable to ``x[..., :1]``.
        diffusion: A positive number, ``(d,)`` or ``(d, m)`` data of any kind, :class:`Scalar`, :class:`Diagonal`,
            :class:`Matrix`, or a callable ``(t, x)`` that returns one of them.
        noise: The driving process; Brownian motion if None.
        stratonovich: Whether the equation is meant in Stratonovich's sense. It is then turned into the Itô equation of the same
            process, whose drift is :math:`b+\tfrac12\sum_k(\partial G_k)G_k`; everything else of the library speaks of that.

    Raises:
        DiffusionError: If a constant scalar or diagonal diffusion isn't positive.
        InvalidInputError: If an equation in Stratonovich's sense is driven by noise with memory.

    Example:
        >>> sde = SDE(lambda t, x: -x, 0.5)
        >>> sde.drift(torch.tensor(0.0), torch.ones(3, 2)).shape
        torch.Size([3, 2])
    """

    _derived_ = ("_axes",)  # what a callable diffusion means by its tensors, learnt at the first call

    def __init__(
        self,
        drift: Field,
        diffusion: Coefficient | Tensor | float | Field,
        noise: NoiseProcess | None = None,
        *,
        stratonovich: bool = False,
    ) -> None:
        super().__init__()
        check_bool(stratonovich, "stratonovich")
        if not callable(drift):
            raise InvalidInputError(
                "drift must be callable", got=type(drift).__name__, expected="drift(t, x)"
            )
        if noise is not None and not isinstance(noise, NoiseProcess):
            raise InvalidInputError("noise must be a NoiseProcess", got=type(noise).__name__)
        self.drift = drift
        self.noise: NoiseProcess = noise if noise is not None else Brownian()
        self.control: Control | None = None
        constant = isinstance(diffusion, Coefficient) or not callable(diffusion)
        self._coefficient: Field = Constant(diffusion) if constant else diffusion  # type: ignore[arg-type,assignment]
        if stratonovich and not constant:
            from stochdyn.core.sde._derivatives import ItoDrift

            if self.noise.num_states:
                raise InvalidInputError(
                    "an equation in Stratonovich's sense needs noise without memory", got=type(noise).__name__
                )
            self.drift = ItoDrift(SDE(drift, diffusion))

    @property
    def state_dependent(self) -> bool:
        """Whether the diffusion is a function of time and state rather than a constant."""
        return not isinstance(self._coefficient, Constant)

    @property
    def strength(self) -> float | None:
        """The diffusion where it is a plain number, else None."""
        value = self._coefficient.value if isinstance(self._coefficient, Constant) else None
        return None if value is None or isinstance(value, Tensor) else float(value)

    def diffusion(self, t: Tensor, x: Tensor) -> Coefficient:
        """Return the coefficient at ``t`` and ``x (..., d)``."""
        value = self._coefficient(t, x)
        if isinstance(value, Tensor) and value.ndim > 0:
            coefficient = self._told(value, t, x)
        else:
            coefficient = as_coefficient(value, x)
        coefficient.check_dim(x.shape[-1])
        return coefficient

    def _told(self, value: Tensor, t: Tensor, x: Tensor) -> Coefficient:
        """Return the coefficient that a callable diffusion means by a tensor.

        The number of its axes alone doesn't tell: a constant ``(d, m)`` looks like one diagonal for each of ``d`` states. So the
        callable is asked twice, once for all, and the second time about states with an axis more.
        """
        if "_axes" not in self.__dict__:
            with torch.no_grad():
                now = t.reshape(-1)[0] if isinstance(t, Tensor) else t
                plain, wider = (self._coefficient(now, y) for y in (x.detach(), x.detach().unsqueeze(0)))
            # None for one value per state; else the axes of a value that is the same for all states.
            self._axes = None if wider.ndim > plain.ndim else plain.ndim
        if self._axes is None:
            return as_coefficient(value, x)
        if self._axes == 2:
            return Matrix(value)
        return as_coefficient(value) if self._axes != 1 else Diagonal(value)

    def noise_dim(self, t: Tensor, x: Tensor) -> int:
        """Return ``m``, the number of noise channels."""
        return self.diffusion(t, x).noise_dim(x.shape[-1])

    def check(self, t: Tensor, x: Tensor) -> None:
        """Evaluate drift and diffusion once at ``x (*batch, d)`` and raise a typed error where they don't fit.

        Raises:
            ShapeError: If the drift has another shape than the state, or the diffusion doesn't fit it.
            DiffusionError: If a scalar or diagonal diffusion isn't positive there.
            NonFiniteError: If the diffusion isn't finite.
            DtypeMismatchError, DeviceMismatchError: If state, drift and diffusion differ in precision or device.
        """
        with torch.no_grad():
            b = _evaluate(self.drift, "drift", t, x)
            if b.ndim and b.shape[-1] not in (1, x.shape[-1]):
                raise ShapeError(
                    "the drift doesn't fit the state",
                    got=f"shape {tuple(b.shape)}",
                    expected=f"{tuple(x.shape)}",
                )
            g = self.diffusion(t, x)
            g.check()
            # A tensor without axes takes part in no promotion: a number serves any precision and device.
            strength = g.value if g.value.ndim else None
            check_same_device(state=x, drift=b if b.ndim else None, diffusion=strength)
            check_same_dtype(state=x, drift=b if b.ndim else None, diffusion=strength)
            if self.control is not None:
                self._check_control(t, x, g.noise_dim(x.shape[-1]))

    def _check_control(self, t: Tensor, x: Tensor, channels: int) -> None:
        z = torch.cat([x, x.new_zeros(*x.shape[:-1], channels * self.noise.num_states)], -1)
        for name in ("drift", "precision"):
            field = getattr(self.control, name)
            if field is None:
                continue
            value = _evaluate(field, f"control's {name}", t, z)
            if value.ndim == 0 or value.shape[-1] != channels:
                raise ShapeError(
                    f"the control's {name} must have one component per noise channel",
                    got=f"shape {tuple(value.shape)}",
                    expected=f"(..., {channels})",
                )
            check_same_dtype(state=x, **{f"control {name}": value})

    def controlled(self, u: Field | None = None, precision: Field | None = None) -> SDE:
        """Return the same equation with its driving noise given the drift ``u`` and the extra ``precision``.

        See :class:`Control` for both. Controls add up.
        """
        control = Control(u, precision)
        return self.with_control(control if self.control is None else self.control.then(control))

    def with_control(self, control: Control | None) -> SDE:
        """Return the same equation under ``control`` in place of its own."""
        changed = SDE.__new__(SDE)
        nn.Module.__init__(changed)
        changed.drift, changed.noise, changed._coefficient = self.drift, self.noise, self._coefficient
        if "_axes" in self.__dict__:
            changed._axes = self._axes
        changed.control = control
        return changed

    def uncontrolled(self) -> SDE:
        """Return the equation without its control."""
        return self.with_control(None)

    def shares_base(self, other: SDE) -> bool:
        """Whether both have the same drift, diffusion and noise objects, so that they differ by control alone."""
        return self.drift is other.drift and self._same_diffusion(other) and self._same_noise(other)

    def _same_diffusion(self, other: SDE) -> bool:
        mine, theirs = self._coefficient, other._coefficient
        if isinstance(mine, Constant) and isinstance(theirs, Constant):
            return mine.kind is theirs.kind and (mine.value is theirs.value)
        return mine is theirs

    def _same_noise(self, other: SDE) -> bool:
        brownian = isinstance(self.noise, Brownian) and isinstance(other.noise, Brownian)
        return brownian or self.noise is other.noise

    def transformed(self, transform: object) -> SDE:
        r"""Return the equation of the same process in other coordinates :math:`z=f(x)`, by Itô's formula.

        .. math:: dZ=\big[f'(x)\,(b+Gu)+\tfrac12\textstyle\sum_kf''(x)[G_k,G_k]\big]dt+f'(x)\,G\,dW,\qquad x=f^{-1}(Z)

        A state that must stay positive or between bounds can't leave them in coordinates that reach to infinity. The result is an
        equation like any other: for laws, path sites, guides and filters. Derivatives of ``"log"``, ``"logit"``, their inverses,
        affine maps and what is composed of them are in closed form, all others by automatic differentiation.

        Args:
            transform: The change of variables from ``x`` to ``z``: ``"log"`` for positive states, ``"logit"`` for states
                between 0 and 1, ``"exp"``, ``"sigmoid"``, ``"identity"``, an invertible transform of ``torch.distributions``
                or Pyro, or a list with one of these for each component.

        Raises:
            InvalidInputError: If the transform isn't invertible, or the noise has memory.

        Example:
            >>> growth = SDE(lambda t, x: 0.3 * x, lambda t, x: 0.2 * x)
            >>> growth.transformed("log").drift(torch.tensor(0.0), torch.zeros(1))
            tensor([0.2800])
        """
        from stochdyn.core.sde.coordinates import ChangedEquation, Moved, as_transform

        self._check_markov("transformed")
        change = as_transform(transform)
        changed = ChangedEquation(self.uncontrolled(), change)
        sde = SDE(changed, changed.diffusion)
        if self.control is None:
            return sde
        fields = (self.control.drift, self.control.precision)
        moved = (None if field is None else Moved(field, change.inv) for field in fields)
        return sde.with_control(Control(*moved))

    def untransformed(self) -> SDE:
        """Return the equation in the coordinates that it had before :meth:`transformed`, with its control.

        Raises:
            InvalidInputError: If the equation wasn't made by :meth:`transformed`.
        """
        from stochdyn.core.sde.coordinates import ChangedEquation, Moved

        changed = self.drift
        if not isinstance(changed, ChangedEquation):
            raise InvalidInputError("only an equation made by transformed(...) has coordinates to go back to")
        if self.control is None:
            return changed.sde
        fields = (self.control.drift, self.control.precision)
        moved = (None if field is None else Moved(field, changed.coordinates.transform) for field in fields)
        return changed.sde.with_control(Control(*moved))

    def with_integral(self, integrand: Field, dim: int | None = None) -> SDE:
        r"""Return the equation of the state followed by integrals along its path, :math:`dI_t=h(t,X_t)\,dt`.

        Observations that couple times, such as cases over a week or averages over an interval, are differences of integrals.
        Start them at zero. No noise acts on them, so paths have no density in state space; path sites take noise space by themselves.

        Args:
            integrand: The function h of time and state that is integrated, ``(t, x) -> (..., q)``.
            dim: The number of components of the state; None where the diffusion is a vector or a matrix, which tells it.

        Raises:
            ShapeError: If the integrand returns no axis of components.
            InvalidInputError: If the noise has memory, or nothing tells the size of the state.

        Example:
            >>> sde = SDE(lambda t, x: -x, 0.5).with_integral(lambda t, x: x, dim=1)
            >>> sde.drift(torch.tensor(0.0), torch.tensor([2.0, 0.0]))
            tensor([-2.,  2.])
        """
        from stochdyn.core.sde.integral import IntegralDrift, StateOnly, padded, state_dim

        self._check_markov("integrated")
        check_callable(integrand, "integrand", "a function integrand(t, x)")
        constant = None if self.state_dependent else self._coefficient(torch.zeros(()), torch.zeros(1))
        if dim is not None:
            check_positive_int(dim, "dim")
        size = state_dim(constant) if dim is None else dim
        drift = IntegralDrift(self.uncontrolled(), integrand, size)
        if constant is None or self.strength is not None:
            # A number serves states of any precision, a matrix those of its own.
            sde = SDE(drift, drift.diffusion)
        else:
            sde = SDE(drift, Matrix(padded(constant.matrix(size), drift.num_integrals)))
        if self.control is None:
            return sde
        fields = (self.control.drift, self.control.precision)
        return sde.with_control(
            Control(*(None if field is None else StateOnly(field, size) for field in fields))
        )

    def reverse(self, score: Field, horizon: float = 1.0, parity: Tensor | None = None) -> SDE:
        r"""Return the equation of the time-reversed law, on the clock :math:`\tau=T-t`.

        .. math:: \bar b(\tau, x) = \epsilon\big[-f + \nabla\cdot(GG^\top) + GG^\top\nabla\log\rho\big](T-\tau, \epsilon x),
            \qquad f = b + G u

        A control's drift :math:`u` is part of the drift; its precision plays no part, because it vanishes in continuous time.

        Args:
            score: A function ``score(t, x)``, the gradient of the log density of the forward law, on the forward clock.
            horizon: The time ``T`` of the end.
            parity: The signs :math:`\epsilon`, ``(d,)``, -1 for components that are odd under time reversal; all +1 if
                None.

        Raises:
            InvalidInputError: If the noise has memory (the reversal isn't Markov in ``x``), a control acts on the increments of a
                grid, or the noise isn't even under the parity.

        Reference:
            Anderson, "Reverse-time diffusion equation models", 1982.
        """
        from stochdyn.core.sde.reversal import ReverseDrift

        self._check_markov("reversed")
        if parity is not None and isinstance(self._coefficient, Constant):
            c = self._coefficient.coefficient().covariance(parity.shape[-1])
            unit = c.diagonal(dim1=-2, dim2=-1).sqrt()
            odd = c - parity.to(c).unsqueeze(-1) * c * parity.to(c)
            if bool((odd.abs() > 1e-5 * unit.unsqueeze(-1) * unit.unsqueeze(-2)).any()):
                raise InvalidInputError(
                    "the noise must be the same in both directions of time",
                    got=f"G G^T = {c.tolist()}, which correlates components of unlike parity",
                )
        return SDE(ReverseDrift(self, score, horizon, parity), self._reverse_diffusion(horizon))

    def backward(self, horizon: float) -> SDE:
        r"""Return the same dynamics under the reversed protocol: drift and diffusion at :math:`\tau` are those at :math:`T-\tau`.

        A control's drift is part of the drift.

        Raises:
            InvalidInputError: If the noise has memory, or a control acts on the increments of a grid.
        """
        from stochdyn.core.sde.reversal import BackwardDrift

        self._check_markov("run backward")
        return SDE(BackwardDrift(self, horizon), self._reverse_diffusion(horizon))

    def slope(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift with that of the control, ``b + G u``, for noise without memory."""
        value = self.drift(t, x)
        if self.control is not None and self.control.drift is not None:
            value = value + self.diffusion(t, x).apply(self.control.drift(t, x))
        return value

    def _check_markov(self, what: str) -> None:
        control = self.control
        if self.noise.num_states:
            raise InvalidInputError(f"only an equation driven by Brownian motion can be {what}")
        if control is not None and type(control).shape_increment is not Control.shape_increment:
            raise InvalidInputError(
                f"an equation can't be {what} whose control acts on the increments of a grid",
                got=type(control).__name__,
            )

    def _reverse_diffusion(self, horizon: float) -> Any:
        if isinstance(self._coefficient, Constant):
            return self._coefficient.coefficient()
        return lambda tau, x: self.diffusion(horizon - tau, x)


def _evaluate(field: Field, name: str, t: Tensor, x: Tensor) -> Tensor:
    """Call a user's function and give an error about precisions or devices its type."""
    try:
        value = field(t, x)
    except RuntimeError as error:
        reason = str(error)
        if "dtype" in reason:
            raise DtypeMismatchError(
                f"the {name} doesn't take the state's precision {x.dtype}", got=reason
            ) from error
        if "device" in reason:
            raise DeviceMismatchError(f"the {name} doesn't take a state on {x.device}", got=reason) from error
        if any(word in reason for word in ("size", "shape", "dimension")):
            raise ShapeError(
                f"the {name} doesn't take states {tuple(x.shape)}",
                got=reason,
                hint="batch axes of parameters and of the start must fit each other",
            ) from error
        raise
    if not isinstance(value, Tensor):
        raise ShapeError(f"the {name} must return a tensor", got=type(value).__name__)
    return value
