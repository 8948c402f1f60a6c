"""Autoregressive laws: conditionals read along one or more strings, sampled exactly, evaluated by shared prefixes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import check_positive_int, check_type
from stochdyn._transforms import recording, version_of
from stochdyn.core.forward.outcomes import encode
from stochdyn.errors import ShapeError
from stochdyn.povm.ansatz.base import Ansatz, as_strings
from stochdyn.povm.ansatz.prefixes import evaluate_prefixes, unique_strings
from stochdyn.povm.ansatz.strings import Strings
from stochdyn.povm.dynamics.scores import Tape

__all__ = ["AutoregressiveAnsatz"]

_ORBIT_BITS = 62


class AutoregressiveAnsatz(Ansatz):
    r"""A product of conditionals, averaged over strings.

    .. math::
        P_{\mathrm{AR}}(b) = \prod_i p_i(b_i\mid b_{<i}),\qquad
        p_i(\cdot\mid b_{<i}) = \operatorname{softmax}\bigl(r_i + \lambda_i(b_{<i})\bigr)

    with ``r`` the log probabilities of a product state, to which the law reduces exactly for logits
    :math:`\lambda=0`. Subclasses give the logits: of whole strings (:meth:`logits`, where gradients are wanted) and step
    by step with a cache (:meth:`start`, :meth:`next_logits`, :meth:`branch`, for sampling and fast evaluation).

    Without gradients :meth:`log_prob` evaluates each distinct prefix once (:mod:`stochdyn.povm.ansatz.prefixes`).

    Args:
        num_sites: The number ``N`` of sites.
        num_outcomes: The number ``K`` of outcomes of a site.
        strings: The order in which the sites are read, or a set of orders to average over: None for the natural order,
            ``"translations"`` (of a ring, or a torus if ``shape`` is given), ``"translations+reflections"``,
            ``"reflections"``, ``"snake"`` (one path to and fro through a square lattice), ``"snakes"`` (all eight) or
            :class:`Strings`.
        shape: The sizes of the lattice, for strings that need them.
        memory: The number of bytes that caches may use at a time; larger evaluations are done in parts.
    """

    reference: Tensor
    _derived_: tuple[str, ...] = ("_read_references",)

    def __init__(
        self,
        num_sites: int,
        num_outcomes: int,
        strings: Strings | str | None = None,
        shape: Sequence[int] | None = None,
        memory: int = 1 << 27,
    ) -> None:
        super().__init__(num_sites, num_outcomes)
        check_positive_int(memory, "memory", 1 << 16)
        self.memory = memory
        self.strings = as_strings(strings, num_sites, shape)
        if self.strings.relabellings is not None and self.strings.relabellings.shape[1] != num_outcomes:
            raise ShapeError(
                "relabellings and ansatz differ in their number of outcomes",
                got=self.strings.relabellings.shape[1],
                expected=num_outcomes,
            )
        self._is_group = self.strings.is_group
        uniform = torch.full((num_sites, num_outcomes), 1 / num_outcomes).log()
        self.register_buffer("reference", uniform)
        self._read_references: tuple[Any, Tensor, bool] | None = None

    # ---------------------------------------------------------------- what subclasses give

    @abstractmethod
    def logits(self, b: Tensor, tape: Tape | None = None) -> Tensor:
        """Return the logits ``(m, N, K)`` of whole strings ``(m, N)``, without the reference."""

    @abstractmethod
    def clear(self) -> None:
        """Make all logits zero."""

    @abstractmethod
    def start(self, rows: int) -> Any:
        """Return an empty cache for ``rows`` strings."""

    @abstractmethod
    def next_logits(self, cache: Any, b: Tensor, step: int, rows: int) -> Tensor:
        """Return the logits ``(rows, K)`` of a step after the outcomes ``b (rows, step)``, without the reference."""

    @abstractmethod
    def branch(self, cache: Any, source: Tensor, target: slice, steps: int) -> None:
        """Copy the first ``steps`` steps of the cache from rows ``source`` to the rows ``target``."""

    @property
    @abstractmethod
    def bytes_per_row(self) -> int:
        """Memory that a string needs in a cache."""

    # ---------------------------------------------------------------- product states and symmetry

    def set_site_probabilities(self, p: Tensor) -> None:
        """Take a product of single-site laws: the reference takes it, and all logits become zero."""
        check_type(p, Tensor, "p")
        if p.shape != self.reference.shape:
            raise ShapeError(
                "probabilities must be (N, K)", got=tuple(p.shape), expected=tuple(self.reference.shape)
            )
        with torch.no_grad():
            # with all logits zero, softmax(r + 0) is the site law p_i itself: the product state exactly
            self.reference.copy_(p.log())
            self.clear()

    def _references(self) -> tuple[Tensor, bool]:
        """Return the reference as every string reads it ``(S, N, K)``, and whether all read the same."""
        key = (version_of(self.reference), self.reference.data_ptr(), self.reference.dtype)
        uncounted = self.reference.is_inference()
        if uncounted or self._read_references is None or self._read_references[0] != key:
            # string s reads site pi_s(i) at step i, and outcome a there as sigma_s(a): r_s(i, sigma_s(a)) =
            # r(pi_s(i), a)
            read = self.reference[self.strings.orders.to(self.device)]
            if self.strings.relabellings is not None:
                inverse = self.strings.relabellings.argsort(1).to(self.device)
                read = read.gather(2, inverse[:, None].expand_as(read))
            same = bool(torch.allclose(read, read[:1].expand_as(read), rtol=0, atol=1e-12))
            self._read_references = (key, read, same)
        return self._read_references[1:]

    @property
    def symmetry(self) -> Strings | None:
        """The strings, if they are a group and the reference doesn't distinguish them."""
        if len(self.strings) == 1 or not self._is_group or not self._references()[1]:
            return None
        return self.strings

    def representatives(self, a: Tensor) -> Tensor:
        """Return for every string ``(n, N)`` the first one of its orbit under the symmetry."""
        symmetry = self.symmetry
        if symmetry is None or self.num_sites * (self.num_outcomes - 1).bit_length() > _ORBIT_BITS:
            return a
        # the first of the orbit in lexicographic order: the least code over all strings
        best, code = a, encode(a, self.num_outcomes)
        for s in range(len(symmetry)):
            read = a[:, symmetry.orders[s].to(a.device)]
            if symmetry.relabellings is not None:
                read = symmetry.relabellings[s].to(a.device)[read]
            other = encode(read, self.num_outcomes)
            best, code = torch.where((other < code)[:, None], read, best), torch.minimum(code, other)
        return best

    # ---------------------------------------------------------------- evaluation

    def log_prob(self, a: Tensor) -> Tensor:
        """Return log probabilities ``(*batch)`` of outcomes ``(*batch, N)``; several times faster under ``torch.no_grad()``.

        Raises:
            InvalidInputError: If outcomes aren't integers in range.
            ShapeError: If there isn't one outcome for each site.
        """
        rows, batch = self.rows_of(a)
        differentiable = torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())
        if rows.shape[0] == 0:
            return self.reference.new_zeros(batch)
        return (self._whole(rows, None) if differentiable else self._by_prefixes(rows)).reshape(batch)

    def _whole(self, a: Tensor, tape: Tape | None) -> Tensor:
        read = self.strings.arrange(a)
        n, count, sites = read.shape
        b = read.reshape(n * count, sites)
        reference, same = self._references()
        logits = self.logits(b, tape) + (reference[0] if same else reference.repeat(n, 1, 1))
        each = logits.log_softmax(-1).gather(-1, b[..., None])[..., 0].sum(-1).reshape(n, count)
        if count == 1:
            return each[:, 0]
        # P(a) = (1/S) sum_s P_AR(b^(s)): probabilities are averaged, not their logarithms
        return each.logsumexp(1) - torch.tensor(float(count), dtype=each.dtype).log()

    def _by_prefixes(self, a: Tensor) -> Tensor:
        unique, place = unique_strings(self.representatives(a), self.num_outcomes)
        read = self.strings.arrange(unique)
        reference, same = self._references()
        rows = max(64, self.memory // self.bytes_per_row)
        m, count, sites = read.shape
        if count == 1:
            # the read order may differ from the order of the sites
            b, index = unique_strings(read[:, 0], self.num_outcomes)
            return evaluate_prefixes(self, b, reference[0], rows)[index][place]
        if same:
            b, index = unique_strings(read.reshape(m * count, sites), self.num_outcomes)
            each = evaluate_prefixes(self, b, reference[0], rows)[index].reshape(m, count)
        else:
            columns = []
            for s in range(count):
                b, index = unique_strings(read[:, s], self.num_outcomes)
                columns.append(evaluate_prefixes(self, b, reference[s], rows)[index])
            each = torch.stack(columns, 1)
        # P(a) = (1/S) sum_s P_AR(b^(s)), as in _whole
        return (each.logsumexp(1) - torch.tensor(float(count), dtype=each.dtype).log())[place]

    def scores(self, a: Tensor) -> tuple[Tensor, Tensor]:
        """Return log probabilities and scores, by one backward pass rather than one pass per sample."""
        self.check_outcomes(a)
        named = dict(self.trainable())
        rows = max(16, self.memory // (len(self.strings) * self.bytes_per_row * 8))
        values, rows_of_scores = [], []
        for part in a.split(rows):
            with recording():
                tape = Tape(part.shape[0])
                value = self._whole(part, tape)
                rows_of_scores.append(tape.scores(value, named))
            values.append(value.detach())
        return torch.cat(values), torch.cat(rows_of_scores)

    def combined_scores(self, a: Tensor, coefficients: Tensor) -> Tensor:
        """Return weighted sums of scores; the sums are taken in the backward pass, so no single score is kept."""
        named = dict(self.trainable())
        _, k, sites = a.shape
        size = max(1, self.memory // (k * len(self.strings) * self.bytes_per_row * 8))
        found = []
        for part, c in zip(a.split(size), coefficients.split(size), strict=True):
            with recording():
                tape = Tape(part.shape[0])
                value = self._whole(part.reshape(-1, sites), tape).reshape(c.shape)
                found.append(tape.scores((value * c.to(value.dtype)).sum(1), named))
        return torch.cat(found)

    def draw(self, n: int, generator: torch.Generator | None, stratified: bool) -> tuple[Tensor, Tensor]:
        """Draw outcomes site by site; what earlier sites gave is kept, so each site costs one step for all draws."""
        kind = {"dtype": torch.float64, "device": self.device}
        u = torch.rand(n, generator=generator, **kind)  # type: ignore[call-overload]
        if stratified:
            u = (torch.arange(n, **kind) + u) / n  # type: ignore[call-overload]
        count = len(self.strings)
        # the leading digits of u choose the string, what is left of u is uniform again and draws the outcomes
        string = (u * count).long().clamp(max=count - 1)
        u = u * count - string
        reference, same = self._references()
        b = torch.empty(n, self.num_sites, dtype=torch.long, device=self.device)
        total = self.reference.new_zeros(n)
        rows = max(64, self.memory // self.bytes_per_row)
        for first in range(0, n, rows):
            part = slice(first, min(first + rows, n))
            own = reference[0].expand(part.stop - first, -1, -1) if same else reference[string[part]]
            total[part] = self._draw(b[part], u[part], own, generator, stratified)
        a = self.strings.restore(b, string)
        return a, (total if count == 1 else self.log_prob(a))

    def _draw(
        self, b: Tensor, u: Tensor, reference: Tensor, generator: torch.Generator | None, stratified: bool
    ) -> Tensor:
        """Fill ``b`` by inverting the conditional distribution functions, and return the log probabilities.

        A stratified number is used for as many sites as it has digits for: what is left of it after one site is
        uniform again given the outcome.
        """
        rows = b.shape[0]
        cache = self.start(rows)
        total = self.reference.new_zeros(rows)
        digits = 1.0 / rows
        for i in range(self.num_sites):
            logits = self.next_logits(cache, b[:, :i], i, rows)
            conditional = (logits + reference[:, i]).log_softmax(-1)
            upper = conditional.double().exp().cumsum(-1)
            upper[:, -1] = 1.0
            # inversion: the outcome k with F(k-1) <= u < F(k)
            b[:, i] = (u[:, None] >= upper[:, :-1]).sum(-1)
            chosen = b[:, i, None]
            total += conditional.gather(1, chosen)[:, 0]
            digits *= self.num_outcomes**2
            if stratified and digits < 1e9:
                # (u - F(k-1)) / (F(k) - F(k-1)) is uniform given the outcome k
                low = torch.cat([torch.zeros_like(upper[:, :1]), upper[:, :-1]], 1).gather(1, chosen)[:, 0]
                high = upper.gather(1, chosen)[:, 0]
                u = ((u - low) / (high - low)).clamp(0, 1 - 1e-12)
            else:
                u = torch.rand(rows, generator=generator, dtype=torch.float64, device=b.device)
        return total

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._read_references = None
        self.strings = self.strings.mapped(fn)
        return super()._apply(fn, recurse)
