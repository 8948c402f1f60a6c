r"""Linear equations: their coefficients, constant or in time, and exact transitions :math:`X_{t+h}\mid X_t\sim N(\Phi X_t+c,\;Q)`."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stochdyn._checks import as_tensor, check_finite, check_positive
from stochdyn.core.gaussian.constant_steps import Transition, constant_transition
from stochdyn.core.gaussian.small import standard_deviations, symmetrise
from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.errors import ApproximationWarning, DiffusionError, DtypeMismatchError, ShapeError

__all__ = [
    "TimeFunction",
    "TimeValue",
    "as_noise_matrix",
    "as_time_value",
    "distinct_steps",
    "grid_transition",
    "varying_transition",
]

Coefficients = Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]

_MAX_LEVEL = 10  # of halving: 1024 substeps
_LEAST_SUBSTEPS = 32
# Gauss-Legendre nodes and weights on [0, 1], order 6.
_NODES = (0.5 - math.sqrt(15) / 10, 0.5, 0.5 + math.sqrt(15) / 10)
_WEIGHTS = (5 / 18, 8 / 18, 5 / 18)


TimeFunction = Callable[[Tensor], Tensor]


class TimeValue(nn.Module):
    """A constant ``(*B, *event)`` or a function of times ``(n,)`` that returns ``(n, *B, *event)``.

    What a constant is made of moves with the module and is listed among its parameters if it is one; so is a module that
    serves as the function.

    Args:
        name: The argument's name, for errors.
        event: The sizes of the last axes, None where any will do.
        parts: The tensors of which the constant is made.
        build: What makes the constant of its parts; None if it is the only part.
        function: The function of time, if there are no parts.
    """

    def __init__(
        self,
        name: str,
        event: tuple[int | None, ...],
        parts: tuple[Tensor, ...] = (),
        build: Callable[..., Tensor] | None = None,
        function: TimeFunction | None = None,
    ) -> None:
        super().__init__()
        self.name, self.event, self.build, self.function = name, event, build, function
        self._count = len(parts)
        for i, part in enumerate(parts):
            if isinstance(part, nn.Parameter):
                self.register_parameter(f"part_{i}", part)
            else:
                # A copy, so that loading a state doesn't write into the user's tensor.
                self.register_buffer(f"part_{i}", part if part.requires_grad else part.detach().clone())

    @property
    def constant(self) -> Tensor | None:
        """The value ``(*B, *event)`` if it doesn't depend on time, else None."""
        if self.function is not None:
            return None
        parts = [getattr(self, f"part_{i}") for i in range(self._count)]
        return parts[0] if self.build is None else self.build(*parts)

    def at(self, t: Tensor) -> Tensor:
        """Return the values at ``t (n,)``: ``(n, *B, *event)``."""
        if self.function is None:
            constant = self.constant
            assert constant is not None
            return constant.expand(t.shape[0], *constant.shape)
        value = self.function(t)
        if not isinstance(value, Tensor):
            raise ShapeError(f"{self.name}(t) must return a tensor", got=type(value).__name__)
        if value.ndim < 1 + len(self.event) or value.shape[0] != t.shape[0]:
            raise ShapeError(
                f"{self.name}(t) must lead with time",
                got=f"shape {tuple(value.shape)} for t {tuple(t.shape)}",
                expected=f"({t.shape[0]}, *B, {', '.join(str(n or 'm') for n in self.event)})",
            )
        _check_event(value, self.event, f"{self.name}(t)")
        if value.dtype != t.dtype:
            raise DtypeMismatchError(
                f"{self.name}(t) has another precision than t", got=f"{value.dtype}, {t.dtype}"
            )
        return value

    def batch(self, probe: Tensor) -> tuple[int, ...]:
        """Return ``*B``; ``probe (1,)`` is a time at which a function may be called."""
        with torch.no_grad():
            value = self.at(probe)
        check_finite(value, self.name)
        return tuple(value.shape[1 : value.ndim - len(self.event)])


def _check_event(value: Tensor, event: tuple[int | None, ...], name: str) -> None:
    own = tuple(value.shape[value.ndim - len(event) :])
    if value.ndim < len(event) or any(want not in (None, got) for want, got in zip(event, own, strict=True)):
        expected = f"(*B, {', '.join(str(n or 'm') for n in event)})"
        raise ShapeError(f"{name} has the wrong shape", got=tuple(value.shape), expected=expected)


def as_time_value(
    value: TimeValue | Tensor | TimeFunction, name: str, event: tuple[int | None, ...], like: Tensor
) -> TimeValue:
    """Wrap data or a callable, checking the shape of data."""
    if isinstance(value, TimeValue):
        return value
    if callable(value) and not isinstance(value, Tensor):
        return TimeValue(name, event, function=value)
    value = as_tensor(value, name, like=like)
    _check_event(value, event, name)
    return TimeValue(name, event, (value,))


def as_noise_matrix(
    value: TimeValue | Coefficient | Tensor | float | TimeFunction, like: Tensor
) -> TimeValue:
    """Wrap the diffusion of a state like ``like (*B, d)``, given in any of the accepted forms."""
    dim = like.shape[-1]
    if isinstance(value, Coefficient):
        value.check()
        value.check_dim(dim)
        value = value.matrix(dim).to(like.dtype)
    elif not callable(value) or isinstance(value, Tensor):
        strength = as_tensor(value, "diffusion", like=like)
        if strength.ndim < 2:
            check_positive(strength, "diffusion", DiffusionError)
            if strength.ndim == 1 and strength.shape[0] != dim:
                raise ShapeError(
                    "diffusion doesn't fit the state", got=tuple(strength.shape), expected=f"({dim},)"
                )
            # a number or one per component
            if isinstance(strength, nn.Parameter):
                ones = torch.ones(dim, dtype=strength.dtype, device=strength.device)
                return TimeValue("diffusion", (dim, None), (strength, ones), _scaled_diagonal)
            value = torch.diag_embed(strength.expand(dim))
    return as_time_value(value, "diffusion", (dim, None), like)  # type: ignore[arg-type]


def _scaled_diagonal(strength: Tensor, ones: Tensor) -> Tensor:
    return torch.diag_embed(strength * ones)


def distinct_steps(start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return the different lengths of intervals ``[start, stop]``, each once, and where each interval finds its own.

    Lengths count as equal if they differ by no more than the rounding of their own times. None instead of the places says that
    the lengths are those of the intervals themselves, in their order, as they are where they carry a gradient.
    """
    dt = stop - start
    if dt.requires_grad or dt.numel() < 2 or dt.ndim > 1:
        return dt, None
    resolution = 4 * torch.finfo(dt.dtype).eps * torch.maximum(start.abs(), stop.abs())
    ordered, order = dt.sort()
    fine = resolution[order]
    apart = ordered[1:] - ordered[:-1] > fine[1:] + fine[:-1]
    label = torch.cat((apart.new_zeros(1, dtype=torch.long), apart.cumsum(0)))
    count = int(label[-1]) + 1
    # Of each group, the length that is known best stands for all.
    best = fine.new_zeros(count).scatter_reduce(0, label, fine, "amin", include_self=False)
    chosen = torch.where(fine == best[label], ordered, torch.full_like(ordered, torch.inf))
    lengths = ordered.new_zeros(count).scatter_reduce(0, label, chosen, "amin", include_self=False)
    # A chain of lengths, each near the next, is no group.
    if count == dt.numel() or bool(((ordered - lengths[label]).abs() > 4 * fine).any()):
        return dt, None
    return lengths, torch.empty_like(label).scatter_(0, order, label)


def grid_transition(a: Tensor, b: Tensor, s: Tensor, start: Tensor, stop: Tensor) -> Transition:
    """Return :func:`constant_transition` over ``[start, stop]``, each step length computed once."""
    dt, where = distinct_steps(start, stop)
    phi, c, q = constant_transition(a, b, s, dt, a.dtype)
    return (phi, c, q) if where is None else (phi[where], c[where], q[where])


def varying_transition(
    coefficients: Coefficients, start: Tensor, dt: Tensor, tolerance: float | None = None
) -> Transition:
    r"""Return the transitions over ``[start, start + dt]`` with coefficients that vary in time.

    The propagator is the sixth-order Magnus expansion and the integrals

    .. math:: c=\int\Phi(t+h,u)\,b(u)\,du,\qquad Q=\int\Phi(t+h,u)\,S(u)\,\Phi(t+h,u)^\top du

    three-point Gauss quadrature (positive weights, so :math:`Q` stays positive semi-definite), on substeps
    that are halved until the answer stops changing, for each interval by itself, in each component of each batch
    member relative to its own scale.

    Args:
        coefficients: A function that maps times ``(n,)`` to ``(A, b, S)``, each ``(n, *B, ...)``.
        start: The time before each step ``(N,)``, in the dtype of the state.
        dt: The sizes ``(N,)`` of the steps, likewise.
        tolerance: The relative accuracy; by default 1e-10, and 1e-5 in float32.

    Reference: Blanes, Casas, Oteo & Ros (2009), The Magnus expansion and some of its applications, eq. 257.
    """
    if tolerance is None:
        tolerance = 1e-10 if dt.dtype == torch.float64 else 1e-5
    if not dt.numel():
        return _integrate(coefficients, start, dt, 1)[0]
    with torch.no_grad():
        levels = _needed_levels(coefficients, start.detach(), dt.detach(), tolerance)
    parts: list[Transition] = []
    places = []
    for level in levels.unique().tolist():
        where = (levels == level).nonzero()[:, 0]
        parts.append(_integrate(coefficients, start[where], dt[where], 2**level)[0])
        places.append(where)
    back = torch.argsort(torch.cat(places))
    phi, c, q = (torch.cat(x)[back] for x in zip(*parts, strict=True))
    return phi, c, q


def _needed_levels(coefficients: Coefficients, start: Tensor, dt: Tensor, tolerance: float) -> Tensor:
    """Return ``(N,)`` exponents of two: the number of substeps from which on each interval's answer stays."""
    norm = coefficients(start)[0].abs().sum(-2).flatten(1).amax(1)
    # Few intervals are looked at more finely, so that a pulse between the times asked for is seen.
    least = math.ceil(math.log2(max(1.0, _LEAST_SUBSTEPS / dt.shape[0])))
    levels = (2 * norm * dt).clamp_min(1.0).log2().ceil().long().clamp(least, _MAX_LEVEL - 1)
    done = torch.zeros_like(dt, dtype=torch.bool)
    for level in range(int(levels.min()), _MAX_LEVEL):
        where = ((levels == level) & ~done).nonzero()[:, 0]
        if not where.numel():
            continue
        coarse, _ = _integrate(coefficients, start[where], dt[where], 2**level)
        fine, scales = _integrate(coefficients, start[where], dt[where], 2 ** (level + 1))
        change = torch.stack([_relative_change(*x) for x in zip(coarse, fine, scales, strict=True)]).amax(0)
        # Order six: the finer answer is about 64 times nearer than the change.
        good = change <= 16 * tolerance
        levels[where] = level + 1
        done[where] = good
        if level + 1 == _MAX_LEVEL and not bool(good.all()):
            warnings.warn(
                f"time-varying coefficients: the transition still changes by {float(change.max()):.1e} at "
                f"{2**_MAX_LEVEL} substeps (relative). Put times at which coefficients jump on the grid, or refine it",
                ApproximationWarning,
                stacklevel=5,
            )
    return levels


def _relative_change(x: Tensor, y: Tensor, scale: Tensor) -> Tensor:
    """Return the largest change ``(N,)`` of any entry in units of its scale."""
    gap = (x - y).abs()
    return torch.where(gap > 0, gap / scale, gap).flatten(1).amax(1)


def _integrate(
    coefficients: Coefficients, start: Tensor, dt: Tensor, substeps: int
) -> tuple[Transition, Transition]:
    """Return the transitions by ``substeps`` substeps, and the scale of each of their entries."""
    n = dt.shape[0]
    h = dt / substeps
    left = start[:, None] + h[:, None] * torch.arange(substeps, dtype=dt.dtype, device=dt.device)
    lower = torch.tensor((0.0, *_NODES), dtype=dt.dtype, device=dt.device)
    nodes = torch.tensor(_NODES, dtype=dt.dtype, device=dt.device)
    # Fractions of the substep at which the generator is needed, (4, 3): three nodes on each [lower, 1].
    fractions = lower[:, None] + (1 - lower)[:, None] * nodes
    times = left[..., None, None] + h[:, None, None, None] * fractions
    a = coefficients(times.flatten())[0]
    a = a.reshape(*times.shape, *a.shape[1:])
    length = h[:, None, None] * (1 - lower)
    propagators = torch.linalg.matrix_exp(_magnus(a, length.reshape(n, 1, 4, *(1,) * (a.ndim - 4))))
    inner = left[..., None] + h[:, None, None] * nodes
    _, b, s = (x.reshape(*inner.shape, *x.shape[1:]) for x in coefficients(inner.flatten()))
    # Gauss quadrature of Phi b and Phi S Phi^T over each substep.
    weights = h[:, None, None] * torch.tensor(_WEIGHTS, dtype=dt.dtype, device=dt.device)
    phi, to_end = propagators[:, :, 0], propagators[:, :, 1:]
    shifts = (to_end @ (b * weights.reshape(*weights.shape, *(1,) * (b.ndim - 3)))[..., None]).squeeze(-1)
    c, size_c = shifts.sum(2), shifts.detach().abs().sum(2)
    q = (to_end @ (s * weights.reshape(*weights.shape, *(1,) * (s.ndim - 3))) @ to_end.mT).sum(2)
    # What each component of the state does to another, in absolute value: entries of A h, in units of both.
    rate = (a[:, :, 0].detach().abs().mean(2) * h.detach().reshape(n, *(1,) * (a.ndim - 3))).sum(1)
    while phi.shape[1] > 1:
        first, second = phi[:, ::2], phi[:, 1::2]
        c = (second @ c[:, ::2, ..., None]).squeeze(-1) + c[:, 1::2]
        size_c = (second.detach().abs() @ size_c[:, ::2, ..., None]).squeeze(-1) + size_c[:, 1::2]
        q = second @ q[:, ::2] @ second.mT + q[:, 1::2]
        phi = second @ first
    phi, c, q = phi[:, 0], c[:, 0], symmetrise(q[:, 0])
    unit = standard_deviations(q)
    scales = _propagator_scale(phi.detach(), rate), size_c[:, 0], unit[..., :, None] * unit[..., None, :]
    return (phi, c, q), scales


def _propagator_scale(phi: Tensor, rate: Tensor) -> Tensor:
    """Return the scale of each entry of ``phi``: what would change its row as much as the row's largest entry does.

    Entry ij has the units of component i over those of component j; ``rate`` has them too, and says how strongly
    the two are coupled.
    """
    pattern = torch.eye(phi.shape[-1], dtype=phi.dtype, device=phi.device) + rate + 0.5 * rate @ rate
    unit = pattern.diagonal(dim1=-2, dim2=-1).sqrt()
    pattern = pattern / unit[..., :, None] / unit[..., None, :]
    tiny = torch.finfo(phi.dtype).tiny
    row = (phi.abs() / pattern.clamp_min(tiny)).masked_fill(pattern <= 0, 0.0).amax(-1, keepdim=True)
    return torch.maximum(row * pattern, phi.abs())


def _magnus(a: Tensor, h: Tensor) -> Tensor:
    """Return the sixth-order Magnus exponent; the three Gauss nodes are axis 3 of ``a``."""
    a1, a2, a3 = a.unbind(3)
    x = h * a2
    y = (math.sqrt(15) / 3) * h * (a3 - a1)
    z = (10 / 3) * h * (a3 - 2 * a2 + a1)
    c1 = _commutator(x, y)
    c2 = _commutator(x, 2 * z + c1) / -60
    return x + z / 12 + _commutator(-20 * x - z + c1, y + c2) / 240


def _commutator(x: Tensor, y: Tensor) -> Tensor:
    return x @ y - y @ x
