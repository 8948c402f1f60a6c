"""Sums of local superoperators as sparse matrices, and the action of their exponential on states."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from stochdyn.errors import InvalidInputError
from stochdyn.povm.lindblad.generator import LocalMatrix
from stochdyn.povm.master.faber import Ellipse, faber_coefficients

if TYPE_CHECKING:
    from scipy import sparse

__all__ = ["SuperoperatorSum"]

_FURTHEST, _HIGHEST = 64.0, 10.0
_MAX_PARTS, _MAX_KEPT = 1 << 16, 1 << 25
_MAX_ELEMENTS = 1 << 16


class SuperoperatorSum(nn.Module):
    r"""Superoperators of a lattice as sparse matrices, to be added up with weights and applied to states.

    .. math:: (L_wx)_b = \sum_gw_{bg}\,L_gx_b

    Derivatives of all orders in weights and states are exact.

    Args:
        num_sites: The number ``N`` of sites.
        size: The number ``q`` of operators in the basis of a site.
        groups: For each group the sites and the matrices ``(q**k, q**k)`` of its terms.

    Attributes:
        num_states: The size ``q**N`` of a state.
        num_groups: The number ``G`` of groups.
        num_entries: The number of entries of all matrices, which is what one application to a state costs.
        num_applications: The number of applications to a state so far, transposed ones and those by group included.
    """

    bounds: Tensor
    start: Tensor
    place: Tensor
    group: Tensor
    value: Tensor

    def __init__(self, num_sites: int, size: int, groups: Sequence[Sequence[LocalMatrix]]) -> None:
        from scipy import sparse

        super().__init__()
        n = size**num_sites
        self.num_states, self.num_groups = n, len(groups)
        parts = [_assemble(num_sites, size, members) for members in groups]
        whole = sparse.hstack(parts, "csr") if parts else sparse.csr_matrix((n, 0))
        below = sparse.vstack(parts, "csr") if parts else sparse.csr_matrix((0, n))
        self.num_entries, self.num_applications = int(whole.nnz), 0
        arrays = {
            # the sum of all groups, entry by entry, so that weights turn it into one matrix
            "start": whole.indptr.astype(np.int32),
            "place": (whole.indices % n).astype(np.int32),
            "group": (whole.indices // n).astype(np.int32),
            "value": whole.data.astype(np.float64),
            # one group below the other
            "below_start": below.indptr.astype(np.int32),
            "below_place": below.indices.astype(np.int32),
            "below_value": below.data.astype(np.float64),
        }
        for name, array in arrays.items():
            self.register_buffer(name, torch.from_numpy(array))
        bounds = [torch.stack([_bounds(matrix) for _, matrix in members]).sum(0) for members in groups]
        self.register_buffer(
            "bounds", torch.stack(bounds) if bounds else torch.zeros(0, 3, dtype=torch.float64)
        )

    def dense(self) -> Tensor:
        """Return the matrices ``(G, q**N, q**N)``, for small lattices."""
        n = self.num_states
        return torch.from_numpy(self._below().toarray().reshape(-1, n, n))

    def flow(self, x: Tensor, weights: Tensor, times: Sequence[float], pieces: int = 1) -> list[Tensor]:
        r"""Return :math:`e^{tL_w}x` at several times, exact to rounding.

        Args:
            x: The states ``(*batch, q**N)``.
            weights: The weights ``(*batch, G)``.
            times: The times, increasing and positive.
            pieces: How many such flows a derivative will go through, which decides on what is kept for it.

        Returns:
            For each time the states ``(*batch, q**N)``.

        Raises:
            InvalidInputError: If it would take over 65536 series.
        """
        now = x.reshape(-1, self.num_states)
        w = weights.expand(*x.shape[:-1], -1).reshape(-1, self.num_groups)
        differentiated = torch.is_grad_enabled() and (x.requires_grad or weights.requires_grad)
        most = max(1, _MAX_ELEMENTS // self.num_states)
        if len(now) > most and not differentiated:
            # so few states at a time that they stay in the cache
            pairs = zip(now.split(most), w.split(most), strict=True)
            parts = zip(*(self.flow(few, own, times, pieces) for few, own in pairs), strict=True)
            return [torch.cat(states).reshape(x.shape) for states in parts]
        ellipse = self._ellipse(w)
        # the number of series for a unit of time
        rate = max(ellipse.gamma / _FURTHEST, ellipse.top / _HIGHEST)
        if not rate * times[-1] <= _MAX_PARTS:
            raise InvalidInputError(
                "the evolution is too long to be followed", got=f"over {_MAX_PARTS} series of its exponential"
            )
        matrices = self.merge(w) if x.device.type == "cpu" else None
        act = partial(self.apply_sum, weights=w, matrices=matrices)
        windows = _windows(times, rate)
        terms = sum(4 * ellipse.gamma * offsets[-1] + 40 for offsets, _ in windows)
        lean = differentiated and pieces * terms * now.numel() > _MAX_KEPT
        found: list[Tensor] = []
        for offsets, is_output in windows:
            coefficients = [faber_coefficients(ellipse.scaled(h)).tolist() for h in offsets]
            if lean:
                # the terms of one series at a time are all that the derivative holds, and makes again
                states = cast(
                    "list[Tensor]",
                    checkpoint(_series, now, act, ellipse, coefficients, use_reentrant=False),
                )
            else:
                states = _series(now, act, ellipse, coefficients)
            now = states[-1]
            if is_output:
                found += states
        return [state.reshape(x.shape) for state in found]

    def apply_sum(
        self, x: Tensor, weights: Tensor, matrices: list[sparse.csr_matrix] | None = None
    ) -> Tensor:
        """Return the weighted sums ``(B, q**N)`` applied to states ``(B, q**N)``, for weights ``(B, G)``.

        Args:
            x: The states.
            weights: The weights.
            matrices: The result of :meth:`merge` for these weights, where it is at hand.
        """
        return cast(Tensor, _Sum.apply(x, weights, self, matrices, False))

    def merge(self, weights: Tensor) -> list[sparse.csr_matrix]:
        """Return the sum for each row of weights ``(B, G)`` as one sparse matrix, on the CPU."""
        from scipy import sparse

        start, place, group = (part.numpy() for part in (self.start, self.place, self.group))
        value, shape = self.value.numpy(), (self.num_states, self.num_states)
        return [
            sparse.csr_matrix((value * row[group], place, start), shape=shape, copy=False)
            for row in weights.detach().to(self.value.dtype).numpy()
        ]

    def multiply(self, x: Tensor, weights: Tensor, matrices: Any, transposed: bool) -> Tensor:
        """Return what :meth:`apply_sum` does, by numbers alone, or with the transposed of all matrices."""
        self.num_applications += len(x)
        if x.device.type == "cpu":
            # three to five times faster than torch's own products
            found = [
                torch.from_numpy((m.T if transposed else m) @ row.detach().numpy())
                for m, row in zip(self.merge(weights) if matrices is None else matrices, x, strict=True)
            ]
            return torch.stack(found)
        return self.gathered(x, weights, transposed)

    def gathered(self, x: Tensor, weights: Tensor, transposed: bool) -> Tensor:
        """Return what :meth:`multiply` does, entry by entry, on any device."""
        row, column = self._rows(), self.place.long()
        if transposed:
            row, column = column, row
        products = (self.value * weights.index_select(1, self.group.long())) * x.index_select(1, column)
        return torch.zeros_like(x).index_add(1, row, products)

    def pair(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the products ``(B, G)`` of states ``y`` with every group applied to ``x``, by numbers alone."""
        self.num_applications += len(x)
        if x.device.type == "cpu":
            below = self._below()
            found = [
                torch.from_numpy(below @ right.detach().numpy()).reshape(-1, self.num_states) @ left.detach()
                for left, right in zip(y, x, strict=True)
            ]
            return torch.stack(found)
        return self.gathered_pair(y, x)

    def gathered_pair(self, y: Tensor, x: Tensor) -> Tensor:
        """Return what :meth:`pair` does, entry by entry, on any device."""
        products = self.value * y.index_select(1, self._rows()) * x.index_select(1, self.place.long())
        return x.new_zeros(len(x), self.num_groups).index_add(1, self.group.long(), products)

    def _ellipse(self, weights: Tensor) -> Ellipse:
        """Return an ellipse around the numerical ranges of sums with weights ``(B, G)``."""
        w = weights.detach().to(self.bounds)
        low, high, wide = self.bounds.unbind(1)
        up, down = w.clamp(min=0), w.clamp(max=0)
        least, most = (up @ low + down @ high).min(), (up @ high + down @ low).max()
        return Ellipse.around(*torch.stack([least, most, (w.abs() @ wide).max()]).tolist())

    def _below(self) -> sparse.csr_matrix:
        from scipy import sparse

        arrays = (self.get_buffer(f"below_{part}").numpy() for part in ("value", "place", "start"))
        shape = (self.num_groups * self.num_states, self.num_states)
        return sparse.csr_matrix(tuple(arrays), shape=shape, copy=False)

    def _rows(self) -> Tensor:
        counts = self.start.diff().long()
        return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)


def _series(
    x: Tensor, act: Callable[[Tensor], Tensor], ellipse: Ellipse, coefficients: list[list[float]]
) -> list[Tensor]:
    """Add up Faber series at several times, from one run through the polynomials."""
    totals = [factors[0] * x for factors in coefficients]
    scale = 1 / ellipse.gamma if ellipse.gamma else 0.0
    shift, ratio = ellipse.centre * scale, ellipse.delta * scale
    before, now = x, x
    for k in range(1, max(map(len, coefficients))):
        # F_{k+1} = (A - c)/gamma F_k - delta/gamma F_{k-1}, for F_2 twice as much of the latter
        following = torch.add(scale * act(now), now, alpha=-shift)
        if k > 1:
            following = torch.add(following, before, alpha=-ratio if k > 2 else -2 * ratio)
        before, now = now, following
        for i, factors in enumerate(coefficients):
            if k < len(factors):
                totals[i] = torch.add(totals[i], now, alpha=factors[k])
    return totals


def _windows(times: Sequence[float], rate: float) -> list[tuple[list[float], bool]]:
    """Part times into series: for each its times from its own start on, and whether these are asked for."""
    windows: list[tuple[list[float], bool]] = []
    at, i = 0.0, 0
    while i < len(times):
        inside = [t - at for t in times[i:] if rate * (t - at) <= 1]
        if inside:
            windows.append((inside, True))
            i += len(inside)
            at = times[i - 1]
        else:
            count = math.ceil(rate * (times[i] - at))
            windows += [([(times[i] - at) / count], False)] * (count - 1)
            at += (times[i] - at) * (count - 1) / count
            windows.append(([times[i] - at], True))
            at, i = times[i], i + 1
    return windows


class _Sum(torch.autograd.Function):
    """The weighted sum of superoperators, or its transposed one, applied to states; linear in states and weights."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weights: Tensor, operator: SuperoperatorSum, matrices: Any, transposed: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.rest = (operator, matrices, transposed)
        return operator.multiply(x, weights, matrices, transposed)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weights = ctx.saved_tensors
        operator, matrices, transposed = ctx.rest
        left, right = (x, gradient) if transposed else (gradient, x)
        needed = ctx.needs_input_grad
        return (
            _Sum.apply(gradient, weights, operator, matrices, not transposed) if needed[0] else None,
            _Pair.apply(left, right, operator) if needed[1] else None,
            None,
            None,
            None,
        )


class _Pair(torch.autograd.Function):
    """Products of states with every superoperator applied to others; the derivative of :class:`_Sum` in weights."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, operator: SuperoperatorSum) -> Tensor:
        ctx.save_for_backward(y, x)
        ctx.operator = operator
        return operator.pair(y, x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        y, x = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (
            _Sum.apply(x, gradient, ctx.operator, None, False) if needed[0] else None,
            _Sum.apply(y, gradient, ctx.operator, None, True) if needed[1] else None,
            None,
        )


def _assemble(num_sites: int, size: int, members: Sequence[LocalMatrix]) -> sparse.csr_matrix:
    """Return the sum of local matrices as a sparse matrix ``(q**N, q**N)``, the first site slowest."""
    from scipy import sparse

    n = size**num_sites
    step = size ** np.arange(num_sites - 1, -1, -1)

    def codes(sites: Sequence[int]) -> np.ndarray:
        return np.indices((size,) * len(sites)).reshape(len(sites), -1).T @ step[list(sites)]

    total = sparse.csr_matrix((n, n))
    for sites, matrix in members:
        inside = codes(sites)
        rest = [site for site in range(num_sites) if site not in sites]
        outside = codes(rest) if rest else np.zeros(1, dtype=np.int64)
        row, column = (part.numpy() for part in matrix.nonzero(as_tuple=True))
        values = np.repeat(matrix[row, column].numpy(), len(outside))
        places = [(inside[part][:, None] + outside).ravel() for part in (row, column)]
        total = total + sparse.coo_matrix((values, (places[0], places[1])), shape=(n, n)).tocsr()
    return total


def _bounds(matrix: Tensor) -> Tensor:
    """Return the range of the symmetric part of a matrix, and the norm of the other part."""
    values = torch.linalg.eigvalsh((matrix + matrix.mT) / 2)
    return torch.stack([values[0], values[-1], torch.linalg.matrix_norm((matrix - matrix.mT) / 2, 2)])
