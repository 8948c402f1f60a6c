"""Lindbladians of local terms, and the master equations that they become in a measurement frame."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import check_positive_int
from stochdyn.core.forward.master_terms import SparseMasterEquation
from stochdyn.errors import InvalidInputError, LindbladianError, UnknownSiteError
from stochdyn.povm.frames.frame import Frame
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.lindblad.generator import hamiltonian_matrix, jump_matrix, merge_terms
from stochdyn.povm.lindblad.terms import Term, TermCoefficient, coupling_value, parse_terms

__all__ = ["Lindbladian"]

_MAX_LOCAL_OUTCOMES = 1024
Grouped = list[tuple[TermCoefficient, list[tuple[tuple[int, ...], Tensor]]]]


class Lindbladian:
    r"""The generator of an open quantum system on a lattice, as a sum of local terms.

    .. math::
        \dot\rho = -i[H,\rho] + \sum_k\gamma_k\Bigl(c_k\rho c_k^\dagger-\tfrac12\{c_k^\dagger c_k,\rho\}\Bigr),
        \qquad \hbar=1

    A term is ``(coefficient, operator, sites)``.

    * **coefficient** (of a jump: its rate): a number; a function of time; the name of a parameter to be bound
      later, ``"g"`` or ``"0.5*g"``; or a list, one for each place. A tensor that requires a gradient keeps it.
    * **operator**: a name (``"X"``, ``"ZZ"``, ``"sigma-"``, ``"sigma+ sigma-"``; see
      :func:`~stochdyn.povm.frames.operators.named_operator`), a matrix, a ``Qobj``, or a list of these, one a site.
    * **sites**: a number or a tuple is one place; a list of them repeats the term at many, such as the bonds
      that :func:`~stochdyn.povm.lindblad.graphs.ring` gives; ``"all"`` is every site.

    Args:
        num_sites: ``N``.
        hamiltonian: terms whose sum is ``H``, each Hermitian.
        jumps: jump operators with their rates.
        dim: levels of a site.

    Raises:
        LindbladianError: if a term isn't Hermitian, a rate is negative, or sites repeat or don't exist.

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
        check_positive_int(num_sites, "num_sites")
        check_positive_int(dim, "dim", 2)
        self.num_sites, self.dim = num_sites, dim
        self.hamiltonian: list[Term] = parse_terms(hamiltonian, num_sites, dim, "hamiltonian")
        self.jumps: list[Term] = parse_terms(jumps, num_sites, dim, "jump")

    @classmethod
    def from_qutip(cls, terms: Any, jumps: Iterable[Any] = (), num_sites: int | None = None) -> Lindbladian:
        """Return a Lindbladian from QuTiP's local terms, or from a Hamiltonian and collapse operators of the whole lattice.

        See :func:`~stochdyn.povm.lindblad.qutip_operators.from_qutip`.
        """
        from stochdyn.povm.lindblad.qutip_operators import from_qutip

        return from_qutip(terms, jumps, num_sites)

    @property
    def terms(self) -> list[Term]:
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
        names = (term.coupling.parameter for term in self.terms)
        return tuple(dict.fromkeys(name for name in names if name is not None))

    @property
    def is_time_dependent(self) -> bool:
        """Whether a coefficient is a function of time."""
        return any(term.coupling.function is not None for term in self.terms)

    def bind(self, **values: float | Tensor) -> Lindbladian:
        """Return the Lindbladian with parameters set; tensors that require a gradient keep it.

        Raises:
            UnknownSiteError: if there is no such parameter.
            LindbladianError: if a rate becomes negative.

        Example:
            >>> model = Lindbladian(1, [("g", "X", 0)], [(1.0, "sigma-", 0)])
            >>> model.parameters, model.bind(g=0.5).parameters
            (('g',), ())
        """
        unknown = set(values) - set(self.parameters)
        if unknown:
            raise UnknownSiteError(f"no parameter {sorted(unknown)[0]!r}; there are {list(self.parameters)}")
        bound = Lindbladian(self.num_sites, dim=self.dim)
        bound.hamiltonian = [_bind(term, values) for term in self.hamiltonian]
        bound.jumps = [_bind(term, values) for term in self.jumps]
        for term in bound.jumps:
            coupling = term.coupling
            value = 1.0 if coupling.value is None else float(coupling.value.detach())
            if coupling.factor * value < 0:
                raise LindbladianError("a rate is negative", got=f"{coupling.factor * value:g}")
        return bound

    def check_rates(self, times: Iterable[float]) -> None:
        """Raise unless rates that depend on time are positive at given times.

        Raises:
            LindbladianError: if one is negative.
        """
        moving = [term for term in self.jumps if term.coupling.function is not None]
        for t in times if moving else ():
            for term in moving:
                rate = coupling_value(term.coupling, t)
                if rate < 0:
                    raise LindbladianError(
                        f"a rate becomes negative at time {t:g}",
                        got=f"{rate:g} on sites {term.sites}",
                        expected="at least 0",
                    )

    def groups(self, povm: Frame | SiteFrames) -> Grouped:
        """Return local master-equation matrices, merged bond by bond, one list for each distinct coefficient.

        The first of them is that of the constant terms (possibly empty), the coefficients' factors being part
        of the matrices: the operator is the sum over groups of function, parameter or value times matrices.

        Raises:
            InvalidInputError: if the frame doesn't fit the sites.
        """
        self._check_frame(povm)
        cache: dict[tuple[Any, ...], Tensor] = {}
        found: dict[Any, tuple[TermCoefficient, list[tuple[tuple[int, ...], Tensor]]]] = {
            TermCoefficient().key: (TermCoefficient(), [])
        }
        for kind, terms in ((hamiltonian_matrix, self.hamiltonian), (jump_matrix, self.jumps)):
            for term in terms:
                frames = [povm.at(site) for site in term.sites]
                key = (kind, id(term.matrix), *map(id, frames))
                if key not in cache:
                    cache[key] = kind(term.matrix, frames)
                group = found.setdefault(term.coupling.key, (term.coupling, []))
                group[1].append((term.sites, term.coupling.factor * cache[key]))
        return [(c, merge_terms(list_, povm.num_outcomes)) for c, list_ in found.values()]

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
            povm: the frame of all sites, or one a site.
            dtype: of the entries.
            device: where they live.

        Returns:
            ``.apply(p, t)`` on all outcomes (small ``N``); ``.connected(a, t)``, configurations and rates, each
            configuration once and only those that some outcome can feed; ``.local_rate(log_prob, a, t)``.

        Raises:
            LindbladianError: if parameters aren't bound, or there are no terms.
            InvalidInputError: if the frame doesn't fit the sites.

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
        if not flat:
            raise LindbladianError("there are no terms", hint="give a Hamiltonian or jumps")
        place = [i for i, (_, members) in enumerate(groups) for _ in members]
        couplings = [coupling for coupling, _ in groups]
        factors: Any = None
        if any(not coupling.is_constant for coupling in couplings):
            factors = _Factors(couplings, place, flat[0][1])
            if not self.is_time_dependent:
                factors = factors(flat[0][1].new_zeros(()))
        return SparseMasterEquation(self.num_sites, povm.num_outcomes, flat, factors)

    def _check_frame(self, povm: Frame | SiteFrames) -> None:
        if povm.dim != self.dim:
            raise InvalidInputError(
                f"{povm.name} measures sites of {povm.dim} levels", expected=f"{self.dim} levels"
            )
        sites = getattr(povm, "num_sites", self.num_sites)
        if sites != self.num_sites:
            raise InvalidInputError("one frame a site is needed", got=sites, expected=self.num_sites)
        largest = max((len(term.sites) for term in self.terms), default=1)
        if povm.num_outcomes**largest > _MAX_LOCAL_OUTCOMES:
            raise LindbladianError(
                "a term acts on too many sites", got=largest, hint="write it as a sum of terms on fewer sites"
            )


class _Factors:
    """Coefficients of all terms at a time: what differs from a constant, spread over the terms that share it."""

    def __init__(self, couplings: list[TermCoefficient], place: list[int], like: Tensor) -> None:
        self.couplings, self.like = couplings, like
        self.place = torch.tensor(place, device=like.device)

    def __call__(self, t: Tensor) -> Tensor:
        """Return ``(terms,)`` for a time ``()``, and ``(n, terms)`` for times ``(n, 1)``."""
        time = t.to(self.like)
        columns = []
        for coupling in self.couplings:
            value = torch.ones_like(time)
            if coupling.function is not None:
                value = value * torch.as_tensor(coupling.function(t), dtype=self.like.dtype).to(
                    self.like.device
                )
            if coupling.value is not None:
                value = value * coupling.value.to(self.like)
            columns.append(value)
        joined = torch.stack(columns, -1) if time.ndim == 0 else torch.cat(columns, -1)
        return joined[..., self.place]


def _bind(term: Term, values: Mapping[str, float | Tensor]) -> Term:
    coupling = term.coupling
    if coupling.parameter is None or coupling.parameter not in values:
        return term
    value = values[coupling.parameter]
    if isinstance(value, Tensor) and value.requires_grad:
        new = TermCoefficient(coupling.factor, coupling.function, None, value.reshape(()))
    else:
        new = TermCoefficient(coupling.factor * float(value), coupling.function)
    return Term(new, term.matrix, term.sites)
