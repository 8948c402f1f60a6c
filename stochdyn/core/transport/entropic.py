"""Entropic optimal transport by a stabilised Sinkhorn iteration that is never silently wrong."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    check_finite,
    check_nonempty,
    check_points,
    check_positive_int,
    check_real,
    check_same_device,
    check_same_dtype,
)
from stochdyn.core._distance import squared_distance
from stochdyn.core.gaussian.recursion import broadcast_batches
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.core.transport._cost import (
    CostRows,
    DenseCost,
    PointCost,
    row_chunk,
    row_chunks,
)
from stochdyn.core.transport._first_order import first_order
from stochdyn.core.transport._sinkhorn import Problem, kernel_rows, solve
from stochdyn.errors import ConvergenceWarning, InvalidInputError, ShapeError

__all__ = ["TransportPlan", "sinkhorn", "sinkhorn_divergence"]

Cost = Callable[[Tensor, Tensor], Tensor]


# The factor between levels of regularisation.
_ANNEALING = 0.25


@dataclass(frozen=True, eq=False)
class TransportPlan:
    r"""The solution of an entropic transport problem.

    .. math:: P_{ij}=M\,a_ib_j\exp\big((f_i+g_j-C_{ij})/\varepsilon\big)

    with weights :math:`a, b` normalised and :math:`M` their total mass before that.

    Attributes:
        cost: The costs :math:`C`, ``(*B, n, m)``, as rows that can be had one block at a time; all of it is
            :attr:`cost_matrix`.
        weights_x: The weights of the first sample, ``(*B, n)``, as given.
        weights_y: The weights of the second sample, ``(*B, m)``, as given.
        reg: The entropic regularisation of transport, :math:`\varepsilon`, in units of the cost.
        marginal_error: ``(*B,)`` L1 distance of the plan's marginals from the weights, the larger of both, relative
            to the total mass; measured on the plan itself.
        converged: Whether the error is within the tolerance, for every problem of the batch.
        num_iterations: The number of iterations over all levels of the annealing.
        relaxation: The cost of a deviation from the weights, or None where they are exact.
    """

    cost: CostRows
    weights_x: Tensor
    weights_y: Tensor
    reg: float
    marginal_error: Tensor
    converged: bool
    num_iterations: int
    relaxation: float | None
    _f: Tensor
    _g: Tensor

    @property
    def potentials(self) -> tuple[Tensor, Tensor]:
        """Dual potentials :math:`f` ``(*B, n)`` and :math:`g` ``(*B, m)``, in the precision of the cost; constants for differentiation."""
        dtype = self.cost.dtype
        return self._f.to(dtype), self._g.to(dtype)

    @property
    def scaled_potentials(self) -> tuple[Tensor, Tensor]:
        r""":math:`f/\varepsilon` and :math:`g/\varepsilon`, in double precision."""
        return self._f / self.reg, self._g / self.reg

    @property
    def shape(self) -> torch.Size:
        """``(*B, n, m)``."""
        return self.cost.shape

    @property
    def cost_matrix(self) -> Tensor:
        """``(*B, n, m)``, computed if it isn't kept."""
        return self.cost.dense()

    @property
    def status(self) -> str:
        """``"converged"``, or what stopped the iteration."""
        return "converged" if self.converged else f"stopped after {self.num_iterations} iterations"

    def plan(self) -> Tensor:
        """Return the coupling ``(*B, n, m)``, a constant for differentiation."""
        out = torch.empty(self.cost.shape, dtype=self.cost.dtype, device=self.cost.device)
        for rows, block in self.blocks():
            out[..., rows, :] = block
        return out

    @property
    def mass(self) -> Tensor:
        """``(*B,)`` total of the coupling."""
        return torch.stack([block.double().sum((-2, -1)) for _, block in self.blocks()]).sum(0)

    @property
    def transport_cost(self) -> Tensor:
        r"""``(*B,)``: :math:`\langle P,C\rangle`, a constant for differentiation; see :attr:`value`."""
        cost = self.cost.detach()
        parts = [(block * cost.rows(rows)).double().sum((-2, -1)) for rows, block in self.blocks()]
        return torch.stack(parts).sum(0).to(cost.dtype)

    @property
    def value(self) -> Tensor:
        r"""The regularised optimum :math:`\langle P,C\rangle+\varepsilon\,KL(P\,\|\,a\otimes b)`, ``(*B,)``.

        Differentiable in points, cost and weights by the envelope theorem: the plan's own change drops out. That is so for
        first derivatives only; second ones raise an UnavailableError.
        """
        # Dual value <a, f> + <b, g> - eps (sum P - sum a), where relaxed marginals put -rho <a, exp(-f / rho) - 1> for <a, f>.
        a, b = self.weights_x, self.weights_y
        if self.relaxation is None:
            dual = (a * self._f).sum(-1) + (b * self._g).sum(-1)
        else:
            rho = self.relaxation
            dual = -rho * (a * (-self._f / rho).expm1()).sum(-1) - rho * (b * (-self._g / rho).expm1()).sum(
                -1
            )
        excess = -a.detach().double().sum(-1)
        for rows, block in self.blocks():
            excess = excess + block.double().sum((-2, -1))
            if self.cost.requires_grad:
                own = self.cost.rows(rows)
                dual = dual + (block * (own - own.detach())).double().sum((-2, -1))
        return (dual - self.reg * excess).to(self.cost.dtype)

    def barycentric(self, values: Tensor) -> Tensor:
        """Return the mean of ``values (*B, m, k)`` over the partners of every x, ``(*B, n, k)``."""
        values = values if isinstance(values, Tensor) else as_tensor(values, "values")
        check_points(values, "values", "(*B, m, k)")
        values = values.to(self.cost.dtype)
        if values.ndim < 2 or values.shape[-2] != self.shape[-1]:
            expected = f"(*B, {self.shape[-1]}, k)"
            raise ShapeError(
                "values must have one row per target", got=tuple(values.shape), expected=expected
            )
        sums = [block @ values for _, block in self.blocks()]
        mass = [block.sum(-1, keepdim=True) for _, block in self.blocks()]
        return torch.cat(sums, -2) / torch.cat(mass, -2)

    def sample(self, sample_shape: SampleShape = (), generator: Generator = None) -> tuple[Tensor, Tensor]:
        """Draw pairs from the coupling; returns the indices ``(*sample,)`` of both sides. Not for batches.

        Args:
            sample_shape: The shape of independent draws, an integer or a tuple.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
        """
        shape, generator = as_sample_shape(sample_shape), as_generator(generator, self.cost.device)
        n = math.prod(shape)
        if len(self.shape) != 2:
            raise ShapeError("pairs are drawn from one plan only", got=f"shape {tuple(self.shape)}")
        first = torch.multinomial(self.weights_x.detach(), n, replacement=True, generator=generator)
        second = [
            torch.multinomial(self.rows(own), 1, generator=generator).squeeze(-1)
            for own in first.split(row_chunk(self.cost))
        ]
        return first.reshape(shape), torch.cat(second).reshape(shape)

    def rows(self, index: Tensor) -> Tensor:
        """Return the weights ``(k, m)``, up to a factor each, of the partners of ``index (k,)``. Not for batches."""
        return kernel_rows(self.cost.detach(), self._f, self._g, self.reg, index) * self.weights_y.detach()

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the coupling in blocks of rows."""
        cost, a, b = self.cost.detach(), self.weights_x.detach(), self.weights_y.detach()
        b = b / b.sum(-1, keepdim=True)
        step = row_chunk(cost)
        for i in row_chunks(cost):
            rows = slice(i, i + step)
            kernel = kernel_rows(cost, self._f, self._g, self.reg, rows)
            yield rows, kernel.mul_(a[..., rows, None]).mul_(b[..., None, :])


def sinkhorn(
    x: Tensor | None,
    y: Tensor | None,
    reg: float,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
    cost: Cost | Tensor | None = None,
    tolerance: float = 1e-6,
    *,
    max_iterations: int = 10_000,
    annealing: float | None = None,
    warm_start: TransportPlan | tuple[Tensor, Tensor] | None = None,
    relaxation: float | None = None,
    memory: float = 4 * 2**30,
) -> TransportPlan:
    r"""Solve entropic optimal transport between two weighted clouds.

    .. math:: \min_P\ \langle P,C\rangle+\varepsilon\,KL(P\,\|\,a\otimes b)\quad\text{with marginals } a, b.

    Scalings are iterated on a kernel into which the potentials are absorbed whenever they move far; the
    regularisation comes down in steps, each started where the last one ended; slow convergence at the end is
    taken over by Newton steps, after groups of points that the plan hardly joins to the rest (outliers, distant
    clusters) have been balanced exactly. Where the kernel under- or overflows, iterations go on in the log domain.
    Memory is the cost and one kernel; where that is too much, one kernel, or blocks only. The error reported is that
    of the plan that is returned.

    Args:
        x: The points of the first sample, ``(*B, n, d)``; None if ``cost`` is a tensor.
        y: The points of the second sample, ``(*B, m, d)``; None likewise.
        reg: The entropic regularisation of transport, :math:`\varepsilon>0`, in units of the cost. (For squared
            distances and a Brownian reference of scale :math:`\sigma` over time :math:`T`, :math:`2\sigma^2T`).
        weights_x: The weights of the first sample, ``(*B, n)`` or ``(n,)``, nonnegative; equal if None.
        weights_y: The weights of the second sample, ``(*B, m)`` or ``(m,)``, of the same total.
        cost: A function of ``x`` and ``y``, or the matrix ``(*B, n, m)`` itself; squared distance if None.
        tolerance: The largest marginal error, in L1 relative to the mass.
        max_iterations: The largest number of iterations over all levels.
        annealing: The factor between levels of regularisation, in (0, 1]; 1 for none, 0.25 if None.
        warm_start: An earlier plan, or its potentials, to start from, without annealing.
        relaxation: The weight :math:`\rho` of deviations from the marginals, in units of the cost: the marginals may
            deviate at the cost :math:`\rho\,KL(P\mathbf 1\,\|\,a)+\rho\,KL(P^\top\mathbf 1\,\|\,b)`, and totals may
            differ, for populations that grow. Exact marginals if None.
        memory: The number of bytes for matrices. A cost that is a function isn't kept where it and its kernel need
            more, and where the kernel alone needs more, that isn't either: products then compute it anew, block by
            block.

    Returns:
        The plan. If it isn't within the tolerance, ``converged`` is False and a ConvergenceWarning says so.

    Raises:
        ShapeError, NonFiniteError, InvalidInputError, EmptyDataError, DtypeMismatchError,
            DeviceMismatchError: On arguments that don't fit, and on weights of different totals.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        >>> plan = sinkhorn(x, x + 5, reg=0.1)
        >>> plan.plan().round(decimals=3), plan.converged
        (tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64), True)

    Reference: Cuturi (2013); Schmitzer (2019), Stabilized sparse scaling algorithms for entropy regularized
    transport problems.
    """
    check_real(reg, "reg", above=0.0)
    check_real(tolerance, "tolerance", above=0.0)
    check_positive_int(max_iterations, "max_iterations")
    if annealing is not None:
        check_real(annealing, "annealing", above=0.0, maximum=1.0)
        if warm_start is not None:
            raise InvalidInputError(
                "annealing does nothing beside warm_start, which starts at the last level", got=annealing
            )
    check_real(memory, "memory", above=0.0)
    if relaxation is not None:
        check_real(relaxation, "relaxation", above=0.0)
    like = next((z for z in (x, y, cost) if isinstance(z, Tensor)), None)
    x, y = (
        z if z is None or isinstance(z, Tensor) else as_tensor(z, n, like=like)
        for z, n in ((x, "x"), (y, "y"))
    )
    weights_x, weights_y = (
        w if w is None or isinstance(w, Tensor) else as_tensor(w, n, like=like)
        for w, n in ((weights_x, "weights_x"), (weights_y, "weights_y"))
    )
    if cost is not None and not callable(cost):
        cost = as_tensor(cost, "cost")
    x, y, weights_x, weights_y = (
        first_order(z) if isinstance(z, Tensor) else z for z in (x, y, weights_x, weights_y)
    )
    if isinstance(cost, Tensor):
        cost = first_order(cost)
    elif cost is not None:
        given = cost

        def cost(p: Tensor, q: Tensor) -> Tensor:
            return first_order(given(p, q))

    matrix = _cost_rows(x, y, cost, memory)
    a, b = _weights(weights_x, matrix, -2, "weights_x"), _weights(weights_y, matrix, -1, "weights_y")
    batch = broadcast_batches(
        {"cost": tuple(matrix.shape[:-2]), "weights_x": tuple(a.shape[:-1]), "weights_y": tuple(b.shape[:-1])}
    )
    a, b = a.expand(*batch, a.shape[-1]), b.expand(*batch, b.shape[-1])
    if batch != matrix.shape[:-2]:
        whole = matrix.dense()
        matrix = DenseCost(whole.expand(*batch, *whole.shape[-2:]))
    totals = a.detach().sum(-1), b.detach().sum(-1)
    slack = max(1e-9, 100 * torch.finfo(matrix.dtype).eps)
    if relaxation is None and bool(((totals[0] - totals[1]).abs() > slack * totals[0]).any()):
        raise InvalidInputError(
            "weights_x and weights_y must have the same total",
            got=f"{totals[0].flatten()[0].item():g} and {totals[1].flatten()[0].item():g}",
            hint="normalise both, or give a relaxation: the cost of a marginal that deviates",
        )
    log_ratio = (totals[1].double() / totals[0].double()).log()[..., None]
    problem = Problem(
        matrix.detach(),
        (a / totals[0][..., None]).detach(),
        (b / totals[1][..., None]).detach(),
        relaxation,
        log_ratio if relaxation is not None else torch.zeros_like(log_ratio),
        matrix.shape.numel() * _item_size(matrix) <= memory or isinstance(matrix, DenseCost),
    )
    start = _warm(warm_start, a, b)
    solution = solve(
        problem,
        float(reg),
        float(tolerance),
        max_iterations,
        _ANNEALING if annealing is None else annealing,
        start,
    )
    worst = float(solution.error.amax())
    converged = worst <= tolerance
    if not converged:
        warnings.warn(
            f"Sinkhorn stopped after {solution.iterations} iterations with a marginal error of {worst:.1e} "
            f"(tolerance {tolerance:.1e}). Allow more iterations or a larger reg"
            + ("" if matrix.dtype == torch.float64 else ", or compute in float64"),
            ConvergenceWarning,
            stacklevel=2,
        )
    return TransportPlan(
        cost=matrix,
        weights_x=a,
        weights_y=b,
        reg=float(reg),
        marginal_error=solution.error,
        converged=converged,
        num_iterations=solution.iterations,
        relaxation=relaxation,
        _f=solution.f,
        _g=solution.g,
    )


def sinkhorn_divergence(
    x: Tensor,
    y: Tensor,
    reg: float,
    weights_x: Tensor | None = None,
    weights_y: Tensor | None = None,
    cost: Cost | None = None,
    tolerance: float = 1e-6,
    **options: Any,
) -> Tensor:
    r"""Return the debiased divergence ``(*B,)``, zero exactly for equal clouds; differentiable in the points.

    .. math:: S(x,y)=V(x,y)-\tfrac12V(x,x)-\tfrac12V(y,y)

    Args:
        x: The points of the first sample, ``(*B, n, d)``.
        y: The points of the second sample, ``(*B, m, d)``.
        reg: The regularisation, as all other arguments that of :func:`sinkhorn`.
        weights_x: The weights of the first sample, ``(*B, n)`` or ``(n,)``.
        weights_y: The weights of the second sample, ``(*B, m)`` or ``(m,)``.
        cost: A symmetric function of two clouds.
        tolerance: The largest marginal error.
        **options: Further options of :func:`sinkhorn`.

    Example:
        >>> x = torch.tensor([[0.0], [1.0]], dtype=torch.float64)
        >>> round(float(sinkhorn_divergence(x, x + 3, reg=0.1)), 4)
        9.0

    Reference: Feydy et al. (2019), Interpolating between optimal transport and MMD by Sinkhorn divergences.
    """

    def value(p: Tensor, q: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
        return sinkhorn(p, q, reg, a, b, cost, tolerance, **options).value

    own = value(x, x, weights_x, weights_x), value(y, y, weights_y, weights_y)
    return value(x, y, weights_x, weights_y) - 0.5 * (own[0] + own[1])


def _item_size(cost: CostRows) -> int:
    return 8 if cost.dtype == torch.float64 else 4


def _cost_rows(x: Tensor | None, y: Tensor | None, cost: Cost | Tensor | None, memory: float) -> CostRows:
    if isinstance(cost, Tensor):
        if cost.ndim < 2 or not cost.is_floating_point():
            raise ShapeError(
                "cost must be a floating tensor (*B, n, m)", got=f"{cost.dtype} {tuple(cost.shape)}"
            )
        sizes = tuple(None if z is None else z.shape[-2] for z in (x, y))
        if any(n not in (None, m) for n, m in zip(sizes, cost.shape[-2:], strict=True)):
            raise ShapeError("cost doesn't fit x and y", got=tuple(cost.shape), expected=f"(*B, {sizes})")
        check_nonempty(cost, "cost")
        check_finite(cost.detach(), "cost")
        return DenseCost(cost)
    if x is None or y is None:
        raise InvalidInputError("x and y may be None only if cost is a tensor")
    for name, z in (("x", x), ("y", y)):
        if not isinstance(z, Tensor) or z.ndim < 2 or not z.is_floating_point():
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise ShapeError(f"{name} must be a floating tensor (*B, n, d)", got=got)
        check_points(z, name)
        check_nonempty(z, name)
        check_finite(z.detach(), name)
    check_same_dtype(x=x, y=y)
    check_same_device(x=x, y=y)
    broadcast_batches({"x": tuple(x.shape[:-2]), "y": tuple(y.shape[:-2])})
    if cost is None and x.shape[-1] != y.shape[-1]:
        raise ShapeError("x and y have different dimensions", got=f"{tuple(x.shape)} and {tuple(y.shape)}")
    function = squared_distance if cost is None else cost
    points = PointCost(x, y, function)
    large = 2 * points.shape.numel() * _item_size(points) > memory
    probe = function(x[..., :1, :], y) if large else function(x, y)
    if probe.shape[-2:] != (1 if large else x.shape[-2], y.shape[-2]):
        expected = f"(*B, {x.shape[-2]}, {y.shape[-2]})"
        raise ShapeError("cost(x, y) has the wrong shape", got=tuple(probe.shape), expected=expected)
    check_finite(probe.detach(), "cost")
    return points if large else DenseCost(probe)


def _weights(weights: Tensor | None, matrix: CostRows, axis: int, name: str) -> Tensor:
    size = matrix.shape[axis]
    if weights is None:
        return torch.full((size,), 1.0 / size, dtype=matrix.dtype, device=matrix.device)
    like = torch.empty(0, dtype=matrix.dtype, device=matrix.device)
    check_points(weights, name, "(*B, n)")
    check_same_dtype(**{name: weights, "cost": like})
    check_same_device(**{name: weights, "cost": like})
    if weights.ndim < 1 or weights.shape[-1] != size:
        raise ShapeError(f"{name} doesn't fit the points", got=tuple(weights.shape), expected=f"(*B, {size})")
    check_finite(weights.detach(), name)
    if bool((weights < 0).any()) or bool((weights.sum(-1) <= 0).any()):
        raise InvalidInputError(
            f"{name} must be nonnegative and not all zero", got=f"minimum {weights.min():g}"
        )
    return weights


def _warm(
    start: TransportPlan | tuple[Tensor, Tensor] | None, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor] | None:
    if start is None:
        return None
    f, g = (start._f, start._g) if isinstance(start, TransportPlan) else start
    if f.shape != a.shape or g.shape != b.shape:
        got = f"{tuple(f.shape)}, {tuple(g.shape)}"
        raise ShapeError("warm_start doesn't fit", got=got, expected=f"{tuple(a.shape)}, {tuple(b.shape)}")
    check_finite(f, "warm_start")
    check_finite(g, "warm_start")
    return f.detach(), g.detach()
