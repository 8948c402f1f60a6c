"""Outcome probabilities at given times as a differentiable function of a Lindbladian's parameters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stochdyn._transforms import maps_are_active
from stochdyn.errors import (
    ConvergenceWarning,
    SystemSizeError,
    TimeGridError,
    UnavailableError,
    UnknownSiteError,
)
from stochdyn.povm.frames.frame import Measurement
from stochdyn.povm.frames.products import probabilities_of
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.lindblad.coefficients import Coefficient
from stochdyn.povm.lindblad.pauli import OperatorBasis
from stochdyn.povm.master.arguments import as_breaks, as_times, check_measurement, check_model
from stochdyn.povm.master.density import initial_density
from stochdyn.povm.master.magnus import GAUSS, magnus_weights
from stochdyn.povm.master.schedule import Schedule, Segment, make_schedule
from stochdyn.povm.master.superoperators import SuperoperatorSum

if TYPE_CHECKING:
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["Propagator"]

_MAX_INSIDE = 1 << 16
_MAX_OUTCOMES = 1 << 21
_MAX_EXPONENTIAL = 64
_STEP_TOLERANCE = 1e-8
_MAX_HALVINGS, _TOO_LARGE = 8, 1e-5


class Propagator(nn.Module):
    r"""The exact outcome probabilities of a small lattice, given its parameters.

    .. math:: p_\theta(t) = R\,\mathcal T\exp\Bigl(\int_0^tL_\theta\Bigr)q(0),\qquad
        L_\theta(t) = \sum_gc_g(t,\theta)L_g

    The state is kept as its coefficients ``q`` in products of Pauli matrices (Gell-Mann matrices on sites with more
    levels), where a local generator has few entries, and read out at the times, so a measurement with many outcomes, or
    one that doesn't determine the state, costs no more. Coefficients of the model may be any functions of parameters and
    time. Up to three qubits steps are matrix exponentials, beyond Faber series, which apply the generator about as often
    as the fastest frequency has radians in a step; where coefficients move with time, a Magnus method of order four takes
    steps that are halved until the result stands, anew for all values of the parameters, since these may move a pulse (an
    expression in ``t`` is looked at faster than a function). Derivatives in the parameters are exact, but for the place
    of a jump, which has none.

    Args:
        model: The Lindbladian with its named parameters.
        povm: The measurement of all sites, or one for each site; it need not be informationally complete. Imperfect
            detectors are measurements too: with a confusion matrix ``C`` the effects are ``torch.einsum("ab,bij->aij",
            C.to(torch.complex128), frame.effects)``.
        state: The state at time 0, as for :func:`~stochdyn.povm.exact.evolve`.
        ts: The times of the measurements, increasing, from zero on.
        max_step: The longest step, for pulses shorter than 1/4096 of the span.
        breaks: The times where coefficients aren't smooth; jumps are found without.

    Attributes:
        names: The names of the parameters.
        times: The times ``(T,)``, float64.

    Raises:
        SystemSizeError: If there are over 65536 inner outcomes (eight qubits) or over 2**21 outcomes.
        TimeGridError: If the times don't increase, or one is negative.

    Example:
        >>> from stochdyn.povm import Lindbladian, Tetrahedral
        >>> model = Lindbladian(1, [("g", "X", 0)], [("gamma*(n+1)", "sigma-", 0), ("gamma*n", "sigma+", 0)])
        >>> p = Propagator(model, Tetrahedral(), "up", [0.5, 1.0])
        >>> p(g=torch.linspace(0, 1, 3), gamma=1.0, n=0.1).shape
        torch.Size([3, 2, 4])

    Reference:
        Blanes and Moan, Appl. Numer. Math. 56, 1519 (2006), for the Magnus method without commutators; Moret and Novati,
        J. Comput. Appl. Math. 136, 361 (2001), for Faber series of the exponential.
    """

    start: Tensor
    times: Tensor

    def __init__(
        self,
        model: Lindbladian,
        povm: Measurement | SiteFrames,
        state: Any,
        ts: Tensor | Sequence[float],
        *,
        max_step: float | None = None,
        breaks: Sequence[float] = (),
    ) -> None:
        super().__init__()
        check_model(model)
        check_measurement(povm)
        grid = as_times(ts)
        if float(grid[0]) < 0:
            raise TimeGridError("times start at zero, where the state is given", got=float(grid[0]))
        basis = OperatorBasis(model.dim)
        size = basis.num_outcomes**model.num_sites
        if size > _MAX_INSIDE or povm.num_outcomes**model.num_sites > _MAX_OUTCOMES:
            raise SystemSizeError(
                "there are too many outcomes for exact propagation",
                got=f"{povm.num_outcomes}**{model.num_sites}",
                expected=f"at most {_MAX_OUTCOMES}, and {_MAX_INSIDE} of a minimal frame (eight qubits)",
            )
        self.num_sites, self.num_outcomes = model.num_sites, povm.num_outcomes
        self.model, self.povm = model, povm
        self.names = model.parameters
        groups = [(coupling, members) for coupling, members in model.groups(basis) if members]
        self.couplings: list[Coefficient] = [coupling for coupling, _ in groups]
        self.operator = SuperoperatorSum(
            model.num_sites, basis.num_outcomes, [members for _, members in groups]
        )
        self.small = size <= _MAX_EXPONENTIAL
        if self.small:
            self.register_buffer("generators", self.operator.dense())
        rho = initial_density(state, model.num_sites, model.dim)
        self.register_buffer("start", probabilities_of(rho, [basis] * model.num_sites))
        self.register_buffer("times", grid)
        for site in range(model.num_sites):
            # probabilities of the measurement from coefficients in the basis: Tr M_a B_b
            effects = povm.at(site).effects
            matrix = torch.einsum("aij,bji->ab", effects, basis.dual).real.contiguous()
            self.register_buffer(f"readout_{site}", matrix)
        self._max_step, self._breaks = max_step, tuple(as_breaks(breaks))
        self._last: tuple[Any, list[tuple[Segment, int]]] | None = None
        if not self.names:
            self._plan({})  # so that what is wrong with times or coefficients is said before any work

    def forward(self, **parameters: Tensor | float) -> Tensor:
        """Return probabilities ``(*batch, T, K**N)``.

        Args:
            parameters: The parameters by name, numbers or tensors ``(*batch)``.

        Raises:
            UnknownSiteError: If names are missing or unknown.
        """
        return self.read_out(self.inner(**parameters))

    def inner(self, **parameters: Tensor | float) -> Tensor:
        """Return the coefficients ``(*batch, T, d**(2N))`` of the states in a basis of products of operators."""
        self._check_names(parameters)
        values = {
            name: torch.as_tensor(parameters[name], dtype=self.start.dtype).to(self.start.device)
            for name in self.names
        }
        shape = torch.broadcast_shapes(*(value.shape for value in values.values()))
        p = self.start.expand(*shape, -1)
        out = [p] if self.times[0] == 0 else []
        cache: dict[tuple[float, int], Tensor] = {}
        plan = self._plan(values)
        if not self.small and not self.model.is_time_dependent:
            later = self.times[len(out) :].tolist()
            weights = self._weights(self.start.new_zeros(1), values)[0]
            return torch.stack(out + (self.operator.flow(p, weights, later) if later else []), -2)
        pieces = sum(count for _, count in plan) * (2 if self.model.is_time_dependent else 1)
        for segment, count in plan:
            p = self._cross(p, (segment.start, segment.end), count, values, cache, pieces)
            if segment.output is not None:
                out.append(p)
        return torch.stack(out, -2)

    def read_out(self, q: Tensor, confusion: Tensor | None = None) -> Tensor:
        """Return the probabilities ``(*batch, K**N)`` of the measurement from the coefficients of the state.

        Args:
            q: The coefficients ``(*batch, d**(2N))`` of the state, as :meth:`inner` gives them.
            confusion: The matrices ``(*batch, N, K, K)`` of readout errors, from the true outcome to the one read.
        """
        lead, n = q.shape[:-1], self.num_sites
        tensor = q.reshape(-1, *(round(q.shape[-1] ** (1 / n)),) * n)
        errors = None
        if confusion is not None:
            k = confusion.shape[-1]
            errors = confusion.expand(*lead, n, k, k).reshape(-1, n, k, k)
        for site in range(n):
            matrix = self.get_buffer(f"readout_{site}").to(q)
            if errors is None:
                tensor = torch.movedim(tensor.movedim(1 + site, -1) @ matrix.mT, -1, 1 + site)
            else:
                local = errors[:, site] @ matrix
                moved = tensor.movedim(1 + site, -1)
                product = moved.reshape(moved.shape[0], -1, moved.shape[-1]) @ local.mT
                tensor = torch.movedim(product.reshape(*moved.shape[:-1], -1), -1, 1 + site)
        return tensor.reshape(*lead, -1)

    # ---------------------------------------------------------------- steps

    def _plan(self, values: Mapping[str, Tensor]) -> list[tuple[Segment, int]]:
        """Return the segments to cross and the number of Magnus steps for each, for these values of the parameters.

        Raises:
            LindbladianError: If a rate is negative.
        """
        if maps_are_active():  # values can't be looked at inside vmap
            if self._last is None:
                raise UnavailableError("the first values of parameters can't be given under torch.func.vmap")
            return self._last[1]
        shape = torch.broadcast_shapes(*(value.shape for value in values.values()))
        flat = {name: value.detach().expand(shape).reshape(-1) for name, value in values.items()}
        key = tuple((name, tuple(value.tolist())) for name, value in flat.items())
        if self._last is None or self._last[0] != key:
            grid = self.times.tolist()
            times = torch.tensor(grid if grid[0] == 0 else [0.0, *grid], dtype=torch.float64)
            schedule = make_schedule(
                self.model, times, max_step=self._max_step, breaks=self._breaks, values=flat
            )
            counts = self._step_counts(schedule, flat)
            self._last = (key, list(zip(schedule.segments, counts, strict=True)))
        return self._last[1]

    def _step_counts(self, schedule: Schedule, values: Mapping[str, Tensor]) -> list[int]:
        """Return how many Magnus steps each segment takes: as many as it takes for halving to change nothing."""
        if not self.model.is_time_dependent:
            return [1] * len(schedule.segments)
        size = max((len(value) for value in values.values()), default=1)
        counts, worst = [], 0.0
        p = self.start.expand(size, -1) if values else self.start
        with torch.no_grad():
            for segment in schedule.segments:
                span = (segment.start, segment.end)
                count = max(1, math.ceil((span[1] - span[0]) / schedule.longest(span[0])))
                found = self._cross(p, span, count, values, {})
                for _ in range(_MAX_HALVINGS):
                    finer = self._cross(p, span, 2 * count, values, {})
                    change = float((finer - found).abs().max())
                    found, count = finer, 2 * count
                    if change <= _STEP_TOLERANCE:
                        break
                worst = max(worst, change)
                p = found
                # halve the steps until the probabilities change by less than the tolerance
                counts.append(count)
        if worst > _TOO_LARGE:
            warnings.warn(
                f"the steps are too long: halving them changes probabilities by {worst:.2g}; pass breaks or max_step",
                ConvergenceWarning,
                stacklevel=2,
            )
        return counts

    def _cross(
        self,
        p: Tensor,
        span: tuple[float, float],
        count: int,
        values: Mapping[str, Tensor],
        cache: dict[tuple[float, int], Tensor],
        pieces: int = 1,
    ) -> Tensor:
        """Bring the state across a segment, one of so many pieces with constant generators."""
        length = span[1] - span[0]
        if length <= 0:
            return p
        moving = self.model.is_time_dependent
        h, weights = self._pieces(span, count, values)
        if not self.small:
            for part in weights:
                p = self.operator.flow(p, part, [h], pieces)[0]
            return p
        # equal intervals share a matrix exponential where nothing moves
        key = (float(f"{length:.12g}"), count)
        if moving or key not in cache:
            generators = torch.einsum("...g,gij->...ij", weights, self.generators.to(weights))
            cache[key] = torch.matrix_exp(generators * h)
        for step in cache[key]:
            p = (step @ p[..., None])[..., 0]
        return p

    def _pieces(
        self, span: tuple[float, float], count: int, values: Mapping[str, Tensor]
    ) -> tuple[float, Tensor]:
        """Return the length of pieces with a constant generator, and their coefficients ``(pieces, *batch, groups)``."""
        h = (span[1] - span[0]) / count
        if not self.model.is_time_dependent:
            return h, self._weights(self.start.new_tensor([span[0]]), values)
        begin = span[0] + h * torch.arange(count, dtype=self.start.dtype, device=self.start.device)
        first, second = (self._weights((begin + x * h).clamp(max=span[1]), values) for x in GAUSS)
        pairs = torch.stack(magnus_weights(first, second), 1)
        return h / 2, pairs.flatten(0, 1)

    def _weights(self, t: Tensor, values: Mapping[str, Tensor]) -> Tensor:
        """Return the coefficients ``(n, *batch, groups)`` at times ``(n,)``."""
        shape = torch.broadcast_shapes(*(value.shape for value in values.values()))
        lead = t.reshape(-1, *(1,) * len(shape))
        columns = []
        for coupling in self.couplings:
            if not coupling.uses_time:
                column = coupling.relative(t[0], values)
            elif coupling.takes_many_times:
                column = coupling.relative(lead, values)
            else:
                column = torch.stack([coupling.relative(x, values).expand(shape) for x in t])
                column = column.reshape(len(t), *shape)
            columns.append(column.expand(len(t), *shape))
        if not columns:
            return self.start.new_zeros(len(t), 0)
        return torch.stack(columns, -1)

    def _check_names(self, parameters: dict[str, Tensor | float]) -> None:
        missing = [name for name in self.names if name not in parameters]
        unknown = [name for name in parameters if name not in self.names]
        if missing or unknown:
            what = f"no value for parameter {missing[0]!r}" if missing else f"no parameter {unknown[0]!r}"
            raise UnknownSiteError(f"{what}; there are {list(self.names)}")
