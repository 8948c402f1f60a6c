"""Master operators as users have them: local terms on the sites of a lattice, or one matrix."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_finite, check_ndim, check_nonempty, check_positive_int
from stochdyn.core.forward.master import MasterEquation
from stochdyn.core.forward.outcomes import all_configurations, encode
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["MatrixMasterEquation", "SparseMasterEquation"]


class SparseMasterEquation(MasterEquation):
    r"""A sum of local terms, each a matrix on a few sites.

    .. math:: L = \sum_S f_S(t)\,A^{(S)}\otimes 1

    Use it for many sites with local terms, whose matrix over all outcomes would be too large.

    Args:
        num_sites: The number of sites of a lattice, ``N``.
        num_outcomes: The number of outcomes per site, ``q``.
        terms: Pairs of a tuple of sites and a matrix ``(q**k, q**k)`` on them, with ``matrix[a, b]`` the rate from
            ``b`` into ``a`` and the first site slowest. Terms on the same sites are merged.
        coefficients: The factors ``(number of terms,)``, or a function that maps a time ``()`` to them, and times
            ``(n, 1)`` to ``(n, number of terms)``; all ones if None. With it, terms aren't merged. Derivatives in the
            factors are kept.

    Raises:
        ShapeError: If a matrix doesn't fit its sites.
        InvalidInputError: If sites repeat or lie outside, or a column doesn't sum to zero.

    Example:
        >>> flip = torch.tensor([[-1.0, 2.0], [1.0, -2.0]])
        >>> ring = SparseMasterEquation(3, 2, [((i,), flip) for i in range(3)])
        >>> ring.apply(torch.full((8,), 1 / 8)).sum().abs() < 1e-6
        tensor(True)
        >>> ring.connected(torch.zeros(1, 3, dtype=torch.long))[1]
        tensor([[-3.,  2.,  2.,  2.]])
    """

    shifts: Tensor

    def __init__(
        self,
        num_sites: int,
        num_outcomes: int,
        terms: Sequence[tuple[Sequence[int], Tensor]],
        coefficients: Callable[[Tensor], Tensor] | Tensor | None = None,
    ) -> None:
        super().__init__()
        check_positive_int(num_sites, "num_sites")
        check_positive_int(num_outcomes, "num_outcomes", 2)
        check_nonempty(terms, "terms")
        self.num_sites, self.num_outcomes = num_sites, num_outcomes
        self.coefficients = coefficients
        if isinstance(coefficients, Tensor) and coefficients.shape != (len(terms),):
            raise ShapeError(
                "one coefficient per term is needed", got=coefficients.shape, expected=(len(terms),)
            )
        checked = [_sorted_term(s, m.detach(), num_sites, num_outcomes) for s, m in terms]
        self.sites: list[tuple[int, ...]] = []
        matrices: list[Tensor] = []
        for sites, matrix in checked:
            if coefficients is None and sites in self.sites:
                place = self.sites.index(sites)
                matrices[place] = matrices[place] + matrix
            else:
                self.sites.append(sites)
                matrices.append(matrix)
        for i, matrix in enumerate(matrices):
            self.register_buffer(f"matrix_{i}", matrix)
        self._plan_moves()
        self.check_mass(1e3 * torch.finfo(matrices[0].dtype).eps)

    def matrix(self, i: int) -> Tensor:
        """Return the matrix of term ``i``, on the sites ``self.sites[i]``."""
        return self.get_buffer(f"matrix_{i}")

    def mass_defect(self) -> Tensor:
        """Return the largest absolute column sum relative to the largest rate, term by term; zero if mass is conserved."""
        return torch.stack([_defect(self.matrix(i)) for i in range(len(self.sites))]).max()

    def _factors(self, t: Tensor | float | None) -> Tensor | None:
        if self.coefficients is None or isinstance(self.coefficients, Tensor):
            return self.coefficients
        if t is None:
            raise InvalidInputError("this operator depends on time", hint="pass t")
        reference = self.matrix(0)
        time = (
            t
            if isinstance(t, Tensor)
            else torch.tensor(float(t), dtype=reference.dtype, device=reference.device)
        )
        return self.coefficients(time)

    def multiply(self, p: Tensor, t: Tensor | float | None = None) -> Tensor:
        """Return ``L p`` for vectors ``p (*batch, q**N)``; a term on ``k`` sites costs ``q**(N + k)`` operations."""
        return self._contract(p, t, transpose=False)

    def apply_adjoint(self, f: Tensor, t: Tensor | float | None = None) -> Tensor:
        r"""Return :math:`L^\top f`, the rate of change of the mean of an observable ``f (*batch, q**N)``."""
        return self._contract(f, t, transpose=True)

    def _contract(self, p: Tensor, t: Tensor | float | None, transpose: bool) -> Tensor:
        n, q = self.num_sites, self.num_outcomes
        factors = self._factors(t)
        lead = p.ndim - 1
        tensor = p.reshape(*p.shape[:-1], *(q,) * n)
        total = torch.zeros_like(tensor)
        for i, sites in enumerate(self.sites):
            # A term acts on its own axes of the tensor p (q, ..., q) and leaves the others alone.
            axes = [lead + s for s in sites]
            last = list(range(-len(sites), 0))
            moved = tensor.movedim(axes, last)
            matrix = self.matrix(i).to(p.dtype)
            product = moved.reshape(*moved.shape[: -len(sites)], -1) @ (matrix if transpose else matrix.mT)
            term = product.reshape(moved.shape).movedim(last, axes)
            total = total + (term if factors is None else factors[i] * term)
        return total.reshape(p.shape)

    def _plan_moves(self) -> None:
        """List the distinct cyclic shifts of outcomes that terms make, and where each entry goes."""
        n, q = self.num_sites, self.num_outcomes
        moves: dict[tuple[tuple[int, int], ...], int] = {(): 0}
        groups: dict[int, list[int]] = {}
        for i, sites in enumerate(self.sites):
            groups.setdefault(len(sites), []).append(i)
        self._groups: list[list[int]] = list(groups.values())
        for g, members in enumerate(self._groups):
            k = len(self.sites[members[0]])
            local = all_configurations(k, q, self.matrix(0).device)
            feeding = encode((local[:, None] + local[None]) % q, q)
            tables = torch.stack([self.matrix(i).gather(1, feeding) for i in members])
            columns = torch.zeros(len(members), q**k, dtype=torch.long)
            alive = (tables != 0).any(1).tolist()
            steps = local.tolist()
            for j, i in enumerate(members):
                for shift in range(q**k):
                    if not alive[j][shift]:
                        continue
                    key = tuple((s, d) for s, d in zip(self.sites[i], steps[shift], strict=True) if d)
                    columns[j, shift] = moves.setdefault(key, len(moves))
            self.register_buffer(f"table_{g}", tables, persistent=False)
            self.register_buffer(f"columns_{g}", columns.to(tables.device), persistent=False)
            self.register_buffer(
                f"sites_{g}", torch.tensor([self.sites[i] for i in members]), persistent=False
            )
        shifts = torch.zeros(len(moves), n, dtype=torch.long)
        for key, place in moves.items():
            for site, shift in key:
                shifts[place, site] = shift
        self.register_buffer("shifts", shifts.to(self.matrix(0).device), persistent=False)

    def connected(self, a: Tensor, t: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
        """Return every outcome that can feed given ones, each once, with the entries of ``L``.

        ``K`` is 1 plus the number of distinct shifts that the terms make.
        """
        rates = self.rates(a, t)
        return (a[:, None] + self.shifts) % self.num_outcomes, rates

    def rates(self, a: Tensor, t: Tensor | float | None = None) -> Tensor:
        """Return the rates ``(n, K)`` of :meth:`connected` alone, one for each of ``shifts (K, N)``."""
        self._check_outcomes(a)
        factors = self._factors(t)
        rates = self.matrix(0).new_zeros(a.shape[0], self.shifts.shape[0])
        for g, members in enumerate(self._groups):
            tables, columns = self.get_buffer(f"table_{g}"), self.get_buffer(f"columns_{g}")
            index = encode(a[:, self.get_buffer(f"sites_{g}")], self.num_outcomes)
            # Rates from b = a + shift into a: a row of the term's matrix, ordered by the shift.
            entries = tables[torch.arange(len(members), device=a.device), index]
            if factors is not None:
                entries = entries * factors[..., members, None]
            rates = rates.index_add(1, columns.reshape(-1), entries.flatten(1).to(rates.dtype))
        return rates


def _defect(matrix: Tensor) -> Tensor:
    """Return the largest column sum of a term relative to its largest rate."""
    return matrix.sum(0).abs().max() / matrix.abs().max().clamp_min(torch.finfo(matrix.dtype).tiny)


def _sorted_term(
    sites: Sequence[int], matrix: Tensor, num_sites: int, q: int
) -> tuple[tuple[int, ...], Tensor]:
    where = tuple(int(s) for s in sites)
    k = len(where)
    if k == 0 or len(set(where)) != k or min(where) < 0 or max(where) >= num_sites:
        raise InvalidInputError(
            "a term needs distinct sites", got=where, expected=f"within 0..{num_sites - 1}"
        )
    if matrix.shape != (q**k, q**k):
        raise ShapeError(
            "a term's matrix doesn't fit its sites", got=tuple(matrix.shape), expected=(q**k, q**k)
        )
    check_finite(matrix, f"the matrix on sites {where}")
    order = sorted(range(k), key=where.__getitem__)
    axes = (*order, *(k + i for i in order))
    return tuple(sorted(where)), matrix.reshape((q,) * (2 * k)).permute(axes).reshape(q**k, q**k)


class MatrixMasterEquation(MasterEquation):
    r"""A master equation given by one matrix on ``S`` states: a single site with ``S`` outcomes.

    Use it for one system of few states, whose matrix is at hand.

    Args:
        matrix: The matrix ``(S, S)``, dense or ``torch.sparse``, with ``matrix[a, b]`` the rate from ``b`` into ``a``;
            a constant.

    Raises:
        ShapeError: If the matrix isn't square.
        InvalidInputError: If a column doesn't sum to zero.

    Example:
        >>> MatrixMasterEquation(torch.tensor([[-1.0, 2.0], [1.0, -2.0]])).apply(torch.tensor([0.5, 0.5]))
        tensor([ 0.5000, -0.5000])
    """

    table: Tensor
    neighbours: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        matrix = matrix if isinstance(matrix, Tensor) else as_tensor(matrix, "matrix", 2, "(S, S)")
        check_ndim(matrix, 2, "matrix", "(S, S)")
        if not matrix.is_floating_point():
            raise InvalidInputError("matrix must be floating", got=matrix.dtype)
        if matrix.shape[0] != matrix.shape[1]:
            raise ShapeError("a master operator is square", got=tuple(matrix.shape))
        sparse = matrix.detach().to_sparse_coo().coalesce()
        check_finite(sparse.values(), "matrix")
        self.num_sites, self.num_outcomes = 1, matrix.shape[0]
        self.register_buffer("operator", sparse)
        self._list_neighbours(sparse)
        self.check_mass(1e3 * torch.finfo(matrix.dtype).eps)

    def _list_neighbours(self, sparse: Tensor) -> None:
        (row, column), values, size = sparse.indices(), sparse.values(), self.num_outcomes
        own = row == column
        diagonal = values.new_zeros(size).index_add(0, row[own], values[own])
        row, column, values = row[~own], column[~own], values[~own]
        counts = torch.bincount(row, minlength=size)
        width = int(counts.max()) if row.numel() else 0
        place = torch.arange(row.numel(), device=row.device) - (counts.cumsum(0) - counts)[row]
        states = torch.arange(size, device=row.device)[:, None]
        neighbours = states.repeat(1, width + 1)
        table = torch.cat([diagonal[:, None], values.new_zeros(size, width)], 1)
        self.register_buffer("neighbours", neighbours.index_put((row, place + 1), column))
        self.register_buffer("table", table.index_put((row, place + 1), values))

    def multiply(self, p: Tensor, t: Tensor | float | None = None) -> Tensor:
        """Return ``L p`` for vectors ``p (*batch, q**N)`` over all outcomes, without forming ``L``."""
        flat = p.reshape(-1, p.shape[-1])
        return torch.sparse.mm(self.get_buffer("operator").to(p.dtype), flat.mT).mT.reshape(p.shape)

    def connected(self, a: Tensor, t: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
        """Return every outcome that can feed given ones, each once; short rows are filled with themselves at rate 0."""
        self._check_outcomes(a)
        state = a[:, 0]
        return self.neighbours[state][..., None], self.table[state]

    def mass_defect(self) -> Tensor:
        """Return the largest absolute column sum relative to the largest rate; it is zero where mass is conserved."""
        operator = self.get_buffer("operator")
        column = operator.values().new_zeros(self.num_outcomes)
        if not operator.values().numel():
            return column.abs().max()
        sums = column.index_add(0, operator.indices()[1], operator.values()).abs().max()
        return sums / operator.values().abs().max().clamp_min(torch.finfo(sums.dtype).tiny)
