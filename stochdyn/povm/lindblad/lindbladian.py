"""Lindbladians of local terms, and the master equations that they become in a measurement frame."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import check_real, check_type
from stochdyn.core.forward.master_terms import SparseMasterEquation
from stochdyn.errors import InvalidInputError, LindbladianError, UnknownSiteError
from stochdyn.povm.frames.frame import Frame
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.frames.sizes import check_size
from stochdyn.povm.lindblad.coefficients import Coefficient, coefficient_value
from stochdyn.povm.lindblad.complete_positivity import physical_jumps
from stochdyn.povm.lindblad.generator import (
    correlation_matrix,
    hamiltonian_matrix,
    jump_matrix,
    merge_terms,
)
from stochdyn.povm.lindblad.pauli import OperatorBasis
from stochdyn.povm.lindblad.terms import CollectiveJump, Term, parse_hamiltonian, parse_jumps

__all__ = ["Lindbladian"]

_MAX_LOCAL_OUTCOMES = 1024
Grouped = list[tuple[Coefficient, list[tuple[tuple[int, ...], Tensor]]]]


class Lindbladian:
    r"""The generator of an open quantum system on a lattice, as a sum of local terms.

    .. math::
        \dot\rho = -i[H,\rho] + \sum_k\gamma_k\Bigl(c_k\rho c_k^\dagger-\tfrac12\{c_k^\dagger c_k,\rho\}\Bigr),
        \qquad \hbar=1

    A term is ``(coefficient, operator, sites)``.

    * **coefficient** (of a jump: its rate): a number; a function of the time, and of parameters by the names of its
      further arguments, ``lambda t, g: g * math.cos(t)``; an expression in parameters and the time ``t``, such as
      ``"g"``, ``"-g/2"``, ``"gamma*(n+1)"`` or ``"g*cos(w*t)"``, whose values come later (:meth:`bind`); a
      :class:`~stochdyn.povm.lindblad.coefficients.SampledCoefficient`; or a list with one for each place. A tensor
      that requires a gradient keeps it.
    * **operator**: a name (``"X"``, ``"ZZ"``, ``"sigma-"``, ``"sigma+ sigma-"``; see
      :func:`~stochdyn.povm.frames.operators.named_operator`), a matrix, a ``Qobj``, or a list with one of these for
      each site.
    * **sites**: a number or a tuple is one place; a list of them repeats the term at many, such as the bonds
      that :func:`~stochdyn.povm.lindblad.graphs.ring` gives; ``"all"`` is every site.

    The rates of a jump at ``n`` places may be a Hermitian positive matrix ``(n, n)``, which correlates them,

    .. math:: \sum_{ij}\gamma_{ij}\Bigl(c_i\rho c_j^\dagger-\tfrac12\{c_j^\dagger c_i,\rho\}\Bigr),

    as collective (superradiant) decay does. A jump operator on many sites must be a sum of operators on one or two of
    them. Single rates may be negative where all constant jumps together are completely positive.

    Args:
        num_sites: The number ``N`` of sites.
        hamiltonian: The terms whose sum is ``H``, each of them Hermitian.
        jumps: The jump operators with their rates.
        dim: The number of levels of a site.

    Raises:
        LindbladianError: If a term isn't Hermitian, rates are negative, or sites repeat or don't exist.

    Example:
        >>> from stochdyn.povm import Tetrahedral, ring
        >>> model = Lindbladian(4, [(0.5, "ZZ", ring(4)), (0.5, "X", "all")], [(1.0, "sigma-", "all")])
        >>> operator = model.master_operator(Tetrahedral())
        >>> rates = operator.connected(torch.zeros(1, 4, dtype=torch.long))[1]
        >>> int((rates != 0).sum())
        37
    """

    def __init__(
        self, num_sites: int, hamiltonian: Iterable[Any] = (), jumps: Iterable[Any] = (), *, dim: int = 2
    ) -> None:
        check_size(num_sites, "num_sites", 1 << 14)
        check_size(dim, "dim", 1 << 10, 2)
        self.num_sites, self.dim = num_sites, dim
        self.hamiltonian: list[Term] = parse_hamiltonian(hamiltonian, num_sites, dim)
        given = parse_jumps(jumps, num_sites, dim)
        self.jumps, shifts = physical_jumps(given, dim)
        self.hamiltonian += shifts

    @classmethod
    def from_qutip(cls, terms: Any, jumps: Iterable[Any] = (), num_sites: int | None = None) -> Lindbladian:
        """Return a Lindbladian from QuTiP's local terms, or from a Hamiltonian and collapse operators of the whole lattice.

        See :func:`~stochdyn.povm.lindblad.qutip_operators.from_qutip`.
        """
        from stochdyn.povm.lindblad.qutip_operators import from_qutip

        return from_qutip(terms, jumps, num_sites)

    @property
    def terms(self) -> list[Term | CollectiveJump]:
        """Hamiltonian terms and jumps."""
        return [*self.hamiltonian, *self.jumps]

    @property
    def bonds(self) -> list[tuple[int, ...]]:
        """Pairs of sites that a two-site term couples, each once."""
        pairs = (tuple(sorted(term.sites)) for term in self.terms if len(term.sites) == 2)
        return list(dict.fromkeys(pairs))

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters that aren't bound yet, in order of appearance."""
        return tuple(dict.fromkeys(name for term in self.terms for name in term.coupling.free))

    @property
    def is_time_dependent(self) -> bool:
        """Whether a coefficient is a function of time."""
        return any(term.coupling.uses_time for term in self.terms)

    def rate_scale(self, times: Sequence[float] = (0.0,)) -> float:
        r"""Return the rate of the fastest term, the unit in which what is slow or small is measured.

        Args:
            times: The times at which coefficients that depend on time are looked at.

        Returns:
            The largest :math:`|f|\,\|h\|` of the Hamiltonian's terms and :math:`\gamma\,\|c\|^2` of the jumps.
        """
        found = 0.0
        for power, terms in ((1, self.hamiltonian), (2, self.jumps)):
            for term in terms:
                norm = sum(float(torch.linalg.matrix_norm(m, 2)) for m, _ in term.parts) ** power
                moments = times if term.coupling.uses_time else times[:1]
                size = max(abs(coefficient_value(term.coupling, t)) for t in moments)
                found = max(found, size * norm)
        return found

    def relaxation_rate(self) -> float:
        r"""Return the least, over the sites that jumps act on, of the jump rates at a site; 0 without jumps.

        Its inverse is the time by which a steady state can be expected to be near.
        """
        at: dict[int, float] = {}
        for term in self.jumps:
            rate = abs(coefficient_value(term.coupling, 0.0))
            for matrix, sites in term.parts:
                for site in sites:
                    at[site] = at.get(site, 0.0) + rate * float(torch.linalg.matrix_norm(matrix, 2)) ** 2
        return min((rate for rate in at.values() if rate > 0), default=0.0)

    def bind(self, **values: float | Tensor) -> Lindbladian:
        """Return the Lindbladian with parameters set; tensors that require a gradient keep it.

        Raises:
            UnknownSiteError: If there is no such parameter.
            LindbladianError: If a rate becomes negative, or a value isn't a finite number.

        Example:
            >>> model = Lindbladian(1, [("g", "X", 0)], [("gamma*(n+1)", "sigma-", 0), ("gamma*n", "sigma+", 0)])
            >>> model.parameters, model.bind(g=0.5, gamma=1.0, n=0.2).jumps[0].coupling.factor
            (('g', 'gamma', 'n'), 1.2)
        """
        unknown = set(values) - set(self.parameters)
        if unknown:
            raise UnknownSiteError(f"no parameter {sorted(unknown)[0]!r}; there are {list(self.parameters)}")
        for name, value in values.items():
            check_real(value, name)
        bound = Lindbladian(self.num_sites, dim=self.dim)
        bound.hamiltonian = [replace(term, coupling=term.coupling.bind(values)) for term in self.hamiltonian]
        bound.jumps = [replace(term, coupling=term.coupling.bind(values)) for term in self.jumps]
        for term in bound.jumps:
            coupling = term.coupling
            if not coupling.free and not coupling.uses_time:
                rate = coefficient_value(coupling, 0.0)
                if rate < 0:
                    raise LindbladianError("a rate is negative", got=f"{rate:g} on sites {term.sites}")
        return bound

    def check_rates(self, times: Iterable[float]) -> None:
        """Raise unless rates that depend on time are positive at given times.

        Raises:
            LindbladianError: If one is negative.
        """
        moving = [term for term in self.jumps if term.coupling.uses_time]
        for t in times if moving else ():
            for term in moving:
                check_rate(coefficient_value(term.coupling, t), t, term.sites)

    def groups(self, povm: Frame | SiteFrames | OperatorBasis) -> Grouped:
        """Return local master-equation matrices, merged bond by bond, one list for each distinct coefficient.

        The first of them is that of the constant terms (possibly empty), the coefficients' factors being part
        of the matrices: the operator is the sum over groups of function, parameter or value times matrices.

        Raises:
            InvalidInputError: If the frame doesn't fit the sites.
        """
        self._check_frame(povm)
        cache: dict[tuple[Any, ...], Tensor] = {}
        found: dict[Any, tuple[Coefficient, list[tuple[tuple[int, ...], Tensor]]]] = {
            Coefficient().key: (Coefficient(), [])
        }

        def add(coupling: Coefficient, sites: tuple[int, ...], matrix: Tensor) -> None:
            group = found.setdefault(coupling.key, (coupling, []))
            group[1].append((sites, coupling.factor * matrix))

        for term in self.hamiltonian:
            add(
                term.coupling,
                term.sites,
                self._local(hamiltonian_matrix, term.matrix, term.sites, povm, cache),
            )
        for jump in self.jumps:
            for i, (matrix, sites) in enumerate(jump.parts):
                add(jump.coupling, sites, self._local(jump_matrix, matrix, sites, povm, cache))
                for other in jump.parts[:i]:
                    add(jump.coupling, *correlation_matrix((matrix, sites), other, povm))
        return [(c, merge_terms(list_, povm.num_outcomes)) for c, list_ in found.values()]

    @staticmethod
    def _local(
        kind: Any,
        matrix: Tensor,
        sites: tuple[int, ...],
        povm: Frame | SiteFrames | OperatorBasis,
        cache: dict[tuple[Any, ...], Tensor],
    ) -> Tensor:
        """Return a local matrix of the master equation, made once for all places that share it."""
        frames = [povm.at(site) for site in sites]
        key = (kind, id(matrix), *map(id, frames))
        if key not in cache:
            cache[key] = kind(matrix, frames)
        return cache[key]

    def master_operator(
        self,
        povm: Frame | SiteFrames,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str | None = None,
    ) -> SparseMasterEquation:
        r"""Return the master equation for the outcome probabilities of a measurement of every site.

        .. math:: \dot p(a)=\sum_bL_{ab}\,p(b),\qquad L_{ab}=\operatorname{Tr}\bigl(M_a\mathcal L[N_b]\bigr)

        Off-diagonal entries may be negative. Functions of time are evaluated when the operator is, so nothing
        is rebuilt from one time to the next.

        Args:
            povm: The frame of all sites, or one for each site.
            dtype: The precision of the entries.
            device: The device on which the entries live.

        Returns:
            ``.apply(p, t)`` on all outcomes (small ``N``); ``.connected(a, t)``, configurations and rates, each
            configuration once and only those that some outcome can feed; ``.local_rate(log_prob, a, t)``.

        Raises:
            LindbladianError: If parameters aren't bound.
            InvalidInputError: If the frame doesn't fit the sites.

        Reference:
            Luo, Chen, Carrasquilla and Clark, Phys. Rev. Lett. 128, 090501 (2022); Reh, Schmitt and Gärttner,
            Phys. Rev. Lett. 127, 230501 (2021).
        """
        if self.parameters:
            raise LindbladianError(
                "parameters must be bound first",
                got=", ".join(self.parameters),
                hint="model.bind(name=value).master_operator(povm)",
            )
        groups = self.groups(povm)
        flat = [(sites, m.to(dtype=dtype, device=device)) for _, members in groups for sites, m in members]
        if not flat:  # nothing changes, as where all rates are zero
            k = povm.num_outcomes
            flat = [((0,), torch.zeros(k, k, dtype=dtype, device=device))]
        place = [i for i, (_, members) in enumerate(groups) for _ in members]
        couplings = [coupling for coupling, _ in groups]
        factors: Any = None
        if any(not coupling.is_constant for coupling in couplings):
            factors = TermFactors(couplings, place, flat[0][1], self.jumps)
            if not self.is_time_dependent:
                factors = factors(flat[0][1].new_zeros(()))
        return SparseMasterEquation(self.num_sites, povm.num_outcomes, flat, factors)

    def _check_frame(self, povm: Frame | SiteFrames | OperatorBasis) -> None:
        check_type(
            povm, (Frame, SiteFrames, OperatorBasis), "povm", hint="such as stochdyn.povm.Tetrahedral()"
        )
        if povm.dim != self.dim:
            raise InvalidInputError(
                f"{povm.name} measures sites of {povm.dim} levels", expected=f"{self.dim} levels"
            )
        sites = getattr(povm, "num_sites", self.num_sites)
        if sites != self.num_sites:
            raise InvalidInputError("one frame for each site is needed", got=sites, expected=self.num_sites)
        largest = max((len(sites) for term in self.terms for _, sites in term.parts), default=1)
        if povm.num_outcomes**largest > _MAX_LOCAL_OUTCOMES:
            raise LindbladianError(
                "a term acts on too many sites", got=largest, hint="write it as a sum of terms on fewer sites"
            )


class TermFactors:
    """Coefficients of all terms at a time: what differs from a constant, spread over the terms that share it.

    Rates that depend on time are looked at whenever they are evaluated, so whatever integrates meets a negative one.
    """

    def __init__(
        self,
        couplings: list[Coefficient],
        place: list[int],
        like: Tensor,
        jumps: Sequence[Term | CollectiveJump] = (),
    ) -> None:
        self.couplings, self.like = couplings, like
        self.place = torch.tensor(place, device=like.device)
        keys = [coupling.key for coupling in couplings]
        moving = [jump for jump in jumps if jump.coupling.uses_time]
        self.rates = [(keys.index(j.coupling.key), j.coupling.factor, j.sites) for j in moving]

    def __call__(self, t: Tensor) -> Tensor:
        """Return ``(terms,)`` for a time ``()``, and ``(n, terms)`` for times ``(n, 1)``."""
        time = t.detach().cpu().double()
        columns = [coupling.relative(time) for coupling in self.couplings]
        for index, factor, sites in self.rates:
            lowest, at = (factor * columns[index].detach()).reshape(-1).min(0)
            check_rate(float(lowest), float(time.reshape(-1)[at]), sites)
        joined = torch.stack(columns, -1) if time.ndim == 0 else torch.cat(columns, -1)
        return joined.to(self.like)[..., self.place]


def check_rate(rate: float, t: float, sites: Sequence[int]) -> None:
    """Raise unless the rate of a jump is at least zero at a time.

    Raises:
        LindbladianError: If it is negative.
    """
    if rate < 0:
        raise LindbladianError(
            f"a rate becomes negative at time {t:g}",
            got=f"{rate:g} on sites {tuple(sites)}",
            expected="at least 0",
        )
