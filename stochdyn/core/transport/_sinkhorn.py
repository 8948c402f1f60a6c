r"""The Sinkhorn iteration: scalings on an absorbed kernel, annealed, groups balanced, finished by Newton steps.

Plans are written :math:`P_{ij}=a_ib_j\exp((f_i+g_j-C_{ij})/\varepsilon)`. Potentials are kept in float64, one kernel
of the size of the cost in the precision of the data, or, where memory is short, no matrix at all: then blocks of rows
are computed from the points in every product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.core.transport._cost import CostRows, row_chunk, row_chunks
from stochdyn.core.transport._groups import balanced_shifts, find_groups, log_flows
from stochdyn.errors import InvalidInputError

__all__ = ["Problem", "Solution", "kernel_rows", "solve"]

_CHECK_EVERY = 10
_SUM = 512
_STAGE_TOLERANCE = 1e-3
_STAGE_ITERATIONS = 500
_PATIENCE = 60
_MAX_GRADIENTS = 1000
# Exponents (f + g - C) / reg are known to about one over this at the least regularisation.
_LEAST_REG = 10.0


@dataclass(frozen=True)
class Solution:
    """Potentials ``(*B, n)``, ``(*B, m)`` in float64, and the L1 marginal error ``(*B,)`` of their plan."""

    f: Tensor
    g: Tensor
    error: Tensor
    iterations: int


def kernel_rows(cost: CostRows, f: Tensor, g: Tensor, reg: float, rows: slice | Tensor) -> Tensor:
    """Return ``exp((f + g - C) / reg)`` on a block of rows, its exponent rounded in float64 only."""
    exponent = f[..., rows, None] + g[..., None, :] - cost.rows(rows)
    # Two points of weight zero that are far from all others may be as near to each other as they like: with a finite kernel
    # they still have nothing to move.
    return (exponent / reg).clamp_(max=math.log(torch.finfo(cost.dtype).max) - 1).exp_().to(cost.dtype)


def _soft_min(cost: CostRows, potential: Tensor, log_weights: Tensor, reg: float) -> Tensor:
    """Return ``-reg * log sum_j w_j exp((potential_j - C_ij) / reg)`` for all rows, ``(*B, n)``."""
    offset = (potential / reg + log_weights)[..., None, :]
    step = row_chunk(cost)
    parts = [
        torch.logsumexp(offset - cost.rows(slice(i, i + step)).double() / reg, -1)
        for i in range(0, cost.shape[-2], step)
    ]
    return -reg * torch.cat(parts, -1)


def _product(kernel: Tensor, weights: Tensor) -> Tensor:
    """Return ``kernel @ weights``; in float32 by blocks, whose sums a tolerance of 1e-6 can rely on."""
    if kernel.dtype == torch.float64:
        return (kernel @ weights[..., None]).squeeze(-1)
    total = torch.zeros((), dtype=torch.float64, device=kernel.device)
    for i in range(0, kernel.shape[-1], _SUM):
        part = kernel[..., i : i + _SUM] @ weights[..., i : i + _SUM, None]
        total = total + part.squeeze(-1)
    return total.to(kernel.dtype)


@dataclass(frozen=True)
class Problem:
    """What is to be solved.

    Attributes:
        cost: The costs ``(*B, n, m)``.
        a: The weights ``(*B, n)`` that sum to one.
        b: The weights ``(*B, m)`` of the second sample, likewise.
        relaxation: The weight of deviations from the marginals, in units of the cost; None where they are exact.
        log_ratio: The logarithm ``(*B, 1)`` of the mass that the columns should have, relative to the rows'; only with
            a relaxation.
        stored: Whether the kernel is kept in memory.
    """

    cost: CostRows
    a: Tensor
    b: Tensor
    relaxation: float | None
    log_ratio: Tensor
    stored: bool


class _Stage:
    """One level of regularisation: a kernel, and scalings that stay near one."""

    def __init__(self, problem: Problem, kernel: Tensor | None, reg: float) -> None:
        self.cost, self.a, self.b, self.kernel, self.reg = problem.cost, problem.a, problem.b, kernel, reg
        self.log_a, self.log_b = self.a.double().log(), self.b.double().log()
        self.relaxation, self.log_ratio = problem.relaxation, problem.log_ratio
        self.damping = 1.0 if self.relaxation is None else self.relaxation / (self.relaxation + reg)
        # Entries of the kernel below the least float are lost; scalings within this range can't revive them.
        self.limit = 20.0 if self.cost.dtype == torch.float64 else 7.0

    def rebuild(self, f: Tensor, g: Tensor) -> None:
        self.f, self.g = f, g
        if self.kernel is not None:
            step = row_chunk(self.cost)
            for i in row_chunks(self.cost):
                rows = slice(i, i + step)
                self.kernel[..., rows, :] = kernel_rows(self.cost, f, g, self.reg, rows)
        self.u, self.v = torch.ones_like(self.a), torch.ones_like(self.b)
        if self.relaxation is not None:
            back = self.relaxation + self.reg
            self.pull_f = (-f / back).exp().to(self.a)
            self.pull_g = (-g / back + self.damping * self.log_ratio).exp().to(self.b)

    def sweep(self, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """One iteration in the log domain, which can't underflow."""
        # g <- -d eps log sum_i a_i exp((f_i - C_ij) / eps), then f likewise; d = rho / (rho + eps), 1 for exact marginals.
        g = _soft_min(self.cost.transposed(), f, self.log_a, self.reg) + self.reg * self.log_ratio
        g = self.damping * g
        return self.damping * _soft_min(self.cost, g, self.log_b, self.reg), g

    def rows(self, v: Tensor) -> Tensor:
        """Row sums of the kernel, columns weighted by ``b v``."""
        if self.kernel is not None:
            return _product(self.kernel, self.b * v)
        weights = self.b * v
        return torch.cat([_product(block, weights) for _, block in self.blocks()], -1)

    def columns(self, u: Tensor) -> Tensor:
        """Column sums of the kernel, rows weighted by ``a u``."""
        if self.kernel is not None:
            return _product(self.kernel.mT, self.a * u)
        weights, total = self.a * u, torch.zeros_like(self.b, dtype=torch.float64)
        for rows, block in self.blocks():
            total = total + _product(block.mT, weights[..., rows]).double()
        return total.to(self.b.dtype)

    def blocks(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield the absorbed kernel in blocks of rows, computed on the way."""
        step = row_chunk(self.cost)
        for i in row_chunks(self.cost):
            rows = slice(i, i + step)
            if self.kernel is not None:
                yield rows, self.kernel[..., rows, :]
            else:
                yield rows, kernel_rows(self.cost, self.f, self.g, self.reg, rows)

    def iterate(self, count: int) -> None:
        """Alternate ``count`` times; the columns are exact afterwards."""
        if self.relaxation is not None:
            for _ in range(count):
                # u <- (K b v)^{-d} exp(-f / (rho + eps)) with the potentials f, g that K = exp((f + g - C) / eps) holds already.
                self.u = self.rows(self.v).pow(-self.damping) * self.pull_f
                self.v = self.columns(self.u).pow(-self.damping) * self.pull_g
                self._shift()
            return
        for _ in range(count):
            # u <- 1 / (K b v), v <- 1 / (K^T a u).
            self.u = self.rows(self.v).reciprocal()
            self.v = self.columns(self.u).reciprocal()

    def _shift(self) -> None:
        """Move a constant from one potential to the other, the best one, which plain iterations find slowly.

        Reference: Séjourné, Vialard & Peyré (2022), Faster unbalanced optimal transport: translation invariant Sinkhorn.
        """
        assert self.relaxation is not None
        f, g = self.absorbed()
        rows = torch.logsumexp(self.log_a - f / self.relaxation, -1, keepdim=True)
        columns = torch.logsumexp(self.log_b - g / self.relaxation, -1, keepdim=True) + self.log_ratio
        move = 0.5 * self.relaxation * (rows - columns) / self.reg
        self.u, self.v = self.u * move.exp().to(self.u), self.v * (-move).exp().to(self.v)

    def newton(self, error: float, tolerance: float, max_iterations: int) -> tuple[bool, int]:
        r"""Take one damped Newton step on the semi-dual; returns whether it helped, and the products used.

        With exact rows and columns :math:`c`,

        .. math:: (\mathrm{diag}(c)-P^\top\mathrm{diag}(a)^{-1}P)\,w=b-c

        is solved by conjugate gradients, and :math:`v\to v e^w`. An iteration costs as much as one of
        Sinkhorn's, and about the square root of their number is needed.

        Reference: Brauer, Clason, Lorenz & Wirth (2017), A Sinkhorn-Newton method for entropic optimal
        transport.
        """
        # With u eliminated the dual is concave in log v, its gradient b - m, its Hessian minus the matrix above the solver.
        u, v = self.rows(self.v).reciprocal(), self.v
        marginal = self.b * v * self.columns(u)
        accuracy = max(0.3 * tolerance / error, min(0.1, math.sqrt(error)))
        step, used = self._conjugate_gradients(u, v, marginal, accuracy, max_iterations)
        damping = min(1.0, 10.0 / max(float(step.abs().amax()), 1e-30))
        for _ in range(5):
            v = self.v * torch.exp(damping * step)
            u = self.rows(v).reciprocal()
            used += 1
            after = float((self.b * (v * self.columns(u) - 1)).abs().double().sum(-1).amax())
            if after < (1 - 0.1 * damping) * error:
                self.u, self.v = u, v
                return True, used
            damping *= 0.25
        return False, used

    def balance(self, active: Tensor) -> bool:
        """Balance the mass between groups that the plan hardly joins; returns whether there are any.

        Scalings must have been absorbed. Kernels may underflow between groups, so their potentials are made anew.

        Args:
            active: The problems of the batch to look at, ``(*B,)``.
        """
        n, m = self.cost.shape[-2:]
        a, b = self.a.reshape(-1, n), self.b.reshape(-1, m)
        f, g = self.f.reshape(-1, n).clone(), self.g.reshape(-1, m).clone()
        found = False
        for item in active.reshape(-1).nonzero()[:, 0].tolist():

            def plan(item: int = item) -> Iterator[tuple[slice, Tensor]]:
                for rows, block in self.blocks():
                    yield rows, a[item, rows, None] * block.reshape(-1, *block.shape[-2:])[item] * b[item]

            def log_plan(item: int = item) -> Iterator[tuple[slice, Tensor]]:
                for i in row_chunks(self.cost):
                    rows = slice(i, i + row_chunk(self.cost))
                    cost = self.cost.rows(rows)
                    own = cost.reshape(-1, *cost.shape[-2:])[item].double()
                    exponent = (f[item, rows, None] + g[item] - own) / self.reg
                    yield rows, exponent + a[item, rows, None].double().log() + b[item].double().log()

            rows, columns, count = find_groups(plan, a[item], b[item])
            if count == 1:
                continue
            found = True
            excess = a.new_zeros(count, dtype=torch.float64).index_add_(0, rows, a[item].double())
            excess = excess.index_add_(0, columns, -b[item].double())
            shifts = self.reg * balanced_shifts(log_flows(log_plan, rows, columns, count), excess)
            f[item] += shifts[rows]
            g[item] -= shifts[columns]
        if found:
            self.rebuild(*self.sweep(f.reshape(self.f.shape), g.reshape(self.g.shape)))
        return found

    def _conjugate_gradients(
        self, u: Tensor, v: Tensor, marginal: Tensor, accuracy: float, max_iterations: int
    ) -> tuple[Tensor, int]:
        # Conjugate gradients on (diag(m) - P^T diag(1 / a) P) x = b - m, P the plan and m its column marginal, preconditioned by
        # the diagonal.
        scale = torch.where(marginal > 0, 1 / marginal, torch.zeros_like(marginal))
        # Constants are in the null space of the system: rounding must not leave any in the right-hand side.
        residual = self.b - marginal
        residual = residual - marginal * (residual.sum(-1, keepdim=True) / marginal.sum(-1, keepdim=True))
        solution, direction = torch.zeros_like(residual), scale * residual
        power = (residual * direction).sum(-1, keepdim=True)
        goal = accuracy * residual.abs().sum(-1, keepdim=True)
        for k in range(max_iterations):
            # A problem that has arrived stands still until the next look at all of them.
            active = residual.abs().sum(-1, keepdim=True) > goal
            if k % _CHECK_EVERY == 0 and not bool(active.any()):
                return solution, k
            inner = u * self.rows(v * direction)
            image = marginal * direction - self.b * v * self.columns(u * inner)
            image = image - marginal * image.sum(-1, keepdim=True)
            curvature = (direction * image).sum(-1, keepdim=True)
            active = active & (curvature > 0)
            length = torch.where(active, power / curvature, torch.zeros_like(power))
            solution = solution + length * direction
            residual = residual - length * image
            conditioned = scale * residual
            last, power = power, (residual * conditioned).sum(-1, keepdim=True)
            direction = conditioned + torch.where(active, power / last, torch.zeros_like(power)) * direction
        return solution, max_iterations

    def error(self) -> Tensor:
        r"""L1 error of both marginals, the larger one, ``(*B,)``.

        With a relaxation it is that from the marginals :math:`a\,e^{-f/\rho}` that the potentials imply.
        """
        rows: Tensor | float = 1.0
        columns: Tensor | float = 1.0
        if self.relaxation is not None:
            f, g = self.absorbed()
            rows = (-f / self.relaxation).exp().to(self.a)
            columns = (-g / self.relaxation + self.log_ratio).exp().to(self.b)
        by_rows = (self.a * (self.u * self.rows(self.v) - rows)).abs().double().sum(-1)
        by_columns = (self.b * (self.v * self.columns(self.u) - columns)).abs().double().sum(-1)
        return torch.maximum(by_rows, by_columns)

    def absorbed(self) -> tuple[Tensor, Tensor]:
        return self.f + self.reg * self.u.double().log(), self.g + self.reg * self.v.double().log()

    def excursion(self) -> float:
        """Largest |log scaling|, infinite if one under- or overflowed."""
        logs = torch.maximum(self.u.log().abs().amax(), self.v.log().abs().amax())
        return float(torch.nan_to_num(logs, nan=math.inf, posinf=math.inf))


@torch.no_grad()
def solve(
    problem: Problem,
    reg: float,
    tolerance: float,
    max_iterations: int,
    annealing: float,
    warm: tuple[Tensor, Tensor] | None,
) -> Solution:
    """Run the iteration."""
    cost = problem.cost
    kernel = torch.empty(cost.shape, dtype=cost.dtype, device=cost.device) if problem.stored else None
    level = reg
    if warm is None:
        f, g = (torch.zeros(w.shape, dtype=torch.float64, device=w.device) for w in (problem.a, problem.b))
        spread = cost.spread()
        least = _LEAST_REG * torch.finfo(cost.dtype).eps * spread
        if reg < least:
            raise InvalidInputError(
                f"reg is below what {cost.dtype} can tell of a cost that spreads over {spread:.3g}",
                got=f"{reg:g}",
                expected=f"at least {least:.2g}",
                hint="use a larger one, double precision, or exact transport",
            )
        while level < spread and annealing < 1:
            level /= annealing
    else:
        f, g = (p.double() for p in warm)
    iterations, in_kernel = 0, False
    while level > reg * (1 + 1e-9):
        stage = _Stage(problem, kernel, level)
        count = min(_STAGE_ITERATIONS, max(max_iterations - iterations, 1))
        f, g, _, used = _run(stage, f, g, _STAGE_TOLERANCE, count, in_kernel)
        iterations += used
        level, in_kernel = max(reg, level * annealing), True
    final = _Stage(problem, kernel, reg)
    f, g, error, used = _run(final, f, g, tolerance, max(max_iterations - iterations, 1), in_kernel)
    return Solution(f, g, error, iterations + used)


def _run(
    stage: _Stage, f: Tensor, g: Tensor, tolerance: float, max_iterations: int, in_kernel: bool
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Iterate one stage to its tolerance; returned are potentials, the error of their plan, iterations.

    It begins with an iteration in the log domain. ``in_kernel`` spares it where the potentials are those of a larger regularisation:
    in all rows and columns of their kernel some exponent isn't negative, and stays so.
    """
    iterations, patience, slow = 0 if in_kernel else 1, 0, False
    unbalanced, joined, stuck = True, False, math.inf
    if in_kernel:
        stage.rebuild(f, g)
    else:
        stage.rebuild(*stage.sweep(f, g))
    in_kernel = True
    error = stage.error()
    absorbed = True  # the scalings are one, so the error is that of the potentials themselves
    while True:
        worst = float(error.amax())
        if worst <= tolerance or iterations >= max_iterations:
            if absorbed:
                return stage.f, stage.g, error, iterations
            stage.rebuild(*stage.absorbed())
            error, absorbed = stage.error(), True
            continue
        count = min(_CHECK_EVERY, max_iterations - iterations)
        if not in_kernel:
            f, g = stage.f, stage.g
            for _ in range(count):
                f, g = stage.sweep(f, g)
            stage.rebuild(f, g)
            error, absorbed, in_kernel = stage.error(), True, True
            iterations += count
            continue
        if slow and unbalanced:
            # a step of Newton's stays in what is joined; what is hardly joined is balanced first
            stage.rebuild(*stage.absorbed())
            unbalanced = False
            joined = not stage.balance(error > tolerance)
            stage.iterate(count - 1)
            iterations += count
        elif slow:
            budget = min(_MAX_GRADIENTS, max_iterations - iterations)
            slow, used = stage.newton(worst, tolerance, budget)
            iterations += used
            if not slow:
                stuck = worst
            patience = 0 if slow else _PATIENCE
            unbalanced = not (slow and joined)
        else:
            stage.iterate(count)
            iterations += count
            patience -= count
        absorbed = False
        error = stage.error()
        excursion = stage.excursion()
        if not math.isfinite(excursion) or not bool(torch.isfinite(error).all()):
            # Under- or overflow: back to the last sound potentials, and on in the log domain.
            stage.rebuild(stage.f, stage.g)
            error, absorbed, in_kernel, slow = stage.error(), True, False, False
            continue
        if not slow and patience <= 0 and stage.relaxation is None:
            # where such steps have failed they fail again, until something has changed
            slow = float(error.amax()) < 0.5 * stuck and _is_slow(
                float(error.amax()), worst, tolerance, count
            )
        if excursion > stage.limit:
            stage.rebuild(*stage.absorbed())
            absorbed = True


def _is_slow(error: float, before: float, tolerance: float, count: int) -> bool:
    """Whether plain iterations, at the present rate, would need many more."""
    if not tolerance < error < 0.2:
        return False
    rate = math.log(before / error) / count
    return rate <= 0 or math.log(error / tolerance) / rate > _PATIENCE
