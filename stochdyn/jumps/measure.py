"""Jump laws: sampling, densities, divergences, marginals, and the law given observations, which is again a jump law."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    as_time_grid,
    check_callable,
    check_choice,
    check_real,
    check_type,
)
from stochdyn._transforms import ordinarily, recording
from stochdyn.core.law.girsanov import ESTIMATORS
from stochdyn.core.law.marginals import Generator, Marginal, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import Path
from stochdyn.errors import InvalidInputError, NonFiniteError, ShapeError, TimeGridError, UnavailableError
from stochdyn.jumps.filtering import (
    Filtered,
    Prepared,
    filter_with,
    prepare,
    run_filter,
    transitions,
    viterbi,
)
from stochdyn.jumps.generator import JumpGenerator, RateMatrix
from stochdyn.jumps.integrals import integrate
from stochdyn.jumps.observations import Observation
from stochdyn.jumps.record import JumpRecord
from stochdyn.jumps.simulate import bridge_records, direct_records, thinned_records
from stochdyn.jumps.uniformisation import _transition, paired_transition

#: Nodes of the quadrature of exit rates within a stay, and numbers that are held at once.
_ORDER, _CHUNK = 8, 8_000_000

__all__ = ["ConditionedJumps", "JumpLaw", "JumpMarginal", "JumpMeasure", "log_evidence"]


class JumpMarginal(Marginal):
    """The law of the state at one time.

    Attributes:
        probs: The probabilities of the states, ``(*batch, S)``.
    """

    def __init__(self, probs: Tensor) -> None:
        self.probs = probs

    def _states(self) -> Tensor:
        return torch.arange(self.probs.shape[-1], dtype=self.probs.dtype, device=self.probs.device)

    def sample(self, sample_shape: SampleShape = (), generator: Generator = None) -> Tensor:
        """Draw states as numbers, ``(*sample, *batch, 1)``."""
        shape = as_sample_shape(sample_shape)
        source = as_generator(generator, self.probs.device)
        flat = self.probs.detach().reshape(-1, self.probs.shape[-1])
        drawn = torch.multinomial(flat, max(1, math.prod(shape)), replacement=True, generator=source)
        out = (
            drawn.mT.reshape(*shape, *self.probs.shape[:-1])
            if shape
            else drawn[:, 0].reshape(self.probs.shape[:-1])
        )
        return out.to(self.probs.dtype).unsqueeze(-1)

    @property
    def mean(self) -> Tensor:
        """The mean of the state's number, ``(*batch, 1)``."""
        return (self.probs * self._states()).sum(-1, keepdim=True)

    @property
    def covariance(self) -> Tensor:
        """The variance of the state's number, ``(*batch, 1, 1)``."""
        gap = self._states() - self.mean
        return (self.probs * gap**2).sum(-1)[..., None, None]

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log probability of states ``x (..., 1)``."""
        # the state is taken first: an impossible other one has no part in the derivative
        return self.probs.expand(*x.shape[:-1], -1).gather(-1, x.long())[..., 0].log()


class JumpLaw(PathMeasure):
    """What jump laws share: grids, records, and log ratios along records."""

    num_states: int
    start_time: float
    batch_shape = torch.Size()

    def sample_record(
        self, horizon: float, sample_shape: SampleShape = (), generator: Generator = None
    ) -> JumpRecord:
        """Draw whole paths from the start of the law to ``horizon``, exactly.

        Args:
            horizon: The time at which the records end.
            sample_shape: The shape of independent draws, an integer or a tuple.
            generator: The source of randomness.
        """
        check_real(horizon, "horizon", fixed=True)
        if not float(horizon) > self.start_time:
            raise TimeGridError(
                "horizon must lie after the start", got=float(horizon), expected=f"> {self.start_time:g}"
            )
        ts = torch.tensor([self.start_time, float(horizon)], dtype=torch.float64)
        return self._read(ts, as_sample_shape(sample_shape), as_generator(generator))

    def sample(self, ts: object, sample_shape: SampleShape = (), generator: Generator = None) -> JumpRecord:
        """Draw paths, read at the times ``ts (T,)``; see :meth:`stochdyn.PathMeasure.sample`."""
        grid = as_time_grid(ts, min_points=1, like=torch.empty((), dtype=torch.float64))
        shape, source = as_sample_shape(sample_shape), as_generator(generator)
        if float(grid[0]) < self.start_time:
            raise TimeGridError(
                "ts starts before the law", got=float(grid[0]), expected=f">= {self.start_time:g}"
            )
        return self._read(grid, shape, source)

    def _read(self, ts: Tensor, shape: tuple[int, ...], source: torch.Generator | None) -> JumpRecord:
        shape = (*shape, *self.batch_shape)
        times, states, count = self._records(float(ts[-1]), math.prod(shape), source)
        return JumpRecord(
            times.reshape(*shape, -1),
            states.reshape(*shape, -1),
            count.reshape(shape),
            ts,
            self.num_states,
            self,
            self.start_time,
        )

    def _records(
        self, end: float, lanes: int, source: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return jump times and states ``(lanes, K)`` and numbers of jumps ``(lanes,)`` from the law's start to ``end``."""
        raise NotImplementedError

    def log_rn(
        self, path: Path, other: PathMeasure, estimator: str = "density", *, recorded: bool = False
    ) -> Tensor:
        r"""Return :math:`\log dQ/dP` on jump records.

        .. math:: \log\frac{\pi^Q}{\pi^P}(s_0)+\sum_k\log\frac{q_{s_{k-1}s_k}}{p_{s_{k-1}s_k}}(t_k)-\int(q_{X_t}-p_{X_t})\,dt

        Minus infinity where this law forbids what the other allows. ``"rate"`` puts the mean rate of jumps in place of
        jumps, which has less variance on paths of Q; ``"stl"`` is the same as ``"density"``, since jumps can't be
        differentiated.
        """
        check_choice(estimator, ESTIMATORS, "estimator")
        check_type(path, JumpRecord, "path", "a jump law weighs the records that jump laws draw")
        check_type(other, JumpLaw, "other", "jump laws are compared with jump laws")
        record, second = cast(JumpRecord, path), cast(JumpLaw, other)
        if record.num_states != self.num_states or second.num_states != self.num_states:
            raise ShapeError("the laws have other states", got=f"{self.num_states} and {second.num_states}")
        if estimator == "rate":
            return self._rate(record, second)
        for law in (self, second):
            law._check_start(record)
        mine, theirs = self._log_density(record), second._log_density(record)
        both = torch.isinf(mine) & torch.isinf(theirs)
        return torch.where(both, torch.zeros_like(mine), mine - theirs)

    def _log_density(self, record: JumpRecord) -> Tensor:
        """Return the log density with respect to counting times Lebesgue, ``(*shape,)``."""
        raise NotImplementedError

    def _check_start(self, record: JumpRecord) -> None:
        first, last = record.ends.tolist()
        if abs(first - self.start_time) > 1e-9 * max(last - first, abs(first)):
            raise TimeGridError(
                "the record starts at another time than the law", got=first, expected=self.start_time
            )

    def _rate(self, record: JumpRecord, other: JumpLaw) -> Tensor:
        raise UnavailableError(f"{type(self).__name__} has no estimator='rate'", hint="use 'density'")


class JumpMeasure(JumpLaw):
    r"""The law of a Markov jump process.

    Args:
        initial: The probabilities of the states at the start, ``(*batch, S)``.
        rates: A :class:`RateMatrix` or its matrix ``(*batch, S, S)``, rows summing to zero, in 1/time; or for rates that change
            a function of times ``(n,)`` that returns ``(n, S, S)``. A batch of laws can be sampled, has marginals, and is what
            :class:`HiddenJumps` and :func:`log_evidence` take for series with rates of their own; all else is one law's.
        start_time: The time at which the law starts.
        bound: For rates that change, a number above every exit rate at all times, which exact simulation by thinning needs.

    Raises:
        InvalidInputError: If probabilities don't sum to one, or rates aren't a generator.
        ShapeError: If the two don't fit.

    Example:
        >>> law = JumpMeasure([1.0, 0.0], [[0.0, 0.7], [1.9, 0.0]])
        >>> law.marginal(0.8).probs
        tensor([0.7644, 0.2356])
    """

    _initial: Tensor

    def __init__(
        self, initial: object, rates: Any, start_time: float = 0.0, bound: float | None = None
    ) -> None:
        super().__init__()
        check_real(start_time, "start_time", fixed=True)
        self.start_time = float(start_time)
        self.generator: RateMatrix | None = None
        self._function: Callable[[Tensor], Tensor] | None = None
        start = as_tensor(initial, "initial")
        if not start.ndim or (start.ndim > 1 and callable(rates) and not isinstance(rates, RateMatrix)):
            raise ShapeError("initial must be probabilities (S,)", got=tuple(start.shape))
        self.batch_shape = torch.Size()
        if callable(rates) and not isinstance(rates, RateMatrix):
            check_callable(rates, "rates")
            check_real(bound, "bound", above=0.0)
            self._function, self.bound = rates, float(cast(float, bound))
        else:
            self.generator = rates if isinstance(rates, RateMatrix) else RateMatrix(rates)
            if self.generator.num_states != start.shape[-1]:
                raise ShapeError(
                    "initial and rates have other states",
                    got=f"{start.shape[-1]} and {self.generator.num_states}",
                )
            self.batch_shape = torch.broadcast_shapes(self.generator.batch_shape, start.shape[:-1])
            start = start.expand(*self.batch_shape, -1)
        self.num_states = start.shape[-1]
        if bool((start.detach() < 0).any()) or float((start.detach().sum(-1) - 1).abs().max()) > 1e-5:
            raise InvalidInputError(
                "initial must be probabilities that sum to one", got=start.detach().tolist()[:8]
            )
        if isinstance(initial, nn.Parameter):
            self.register_parameter("_initial", initial)
        else:
            self.register_buffer("_initial", start if start.requires_grad else start.detach().clone())

    @property
    def initial(self) -> Tensor:
        """The probabilities of the states at the start, ``(*batch, S)``, as they are now."""
        start = self._initial.expand(*self.batch_shape, -1)
        return start / start.sum(-1, keepdim=True)

    def _matrix(self) -> Tensor:
        """Return the generator of a law that has a constant one and no batch."""
        if self.batch_shape:
            raise ShapeError("this takes one law at a time", got=f"a batch {tuple(self.batch_shape)}")
        return self._matrices()

    def _matrices(self) -> Tensor:
        if self.generator is None:
            raise UnavailableError("this needs constant rates")
        return self.generator.matrix.expand(*self.batch_shape, -1, -1)

    def rates(self, t: Tensor | float) -> Tensor:
        """Return the generator ``(S, S)`` at a time."""
        if self._function is None:
            return self._matrix()
        at = t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)
        return self._at(at.reshape(1))[0]

    def _at(self, t: Tensor) -> Tensor:
        """Return generators ``(n, S, S)`` at times ``(n,)``, with their diagonals."""
        if self._function is None:
            return self._matrix().double().expand(len(t), -1, -1)
        value = self._function(t.double())
        if value.shape != (len(t), self.num_states, self.num_states):
            raise ShapeError(
                "rates(t) has the wrong shape",
                got=tuple(value.shape),
                expected=f"(n, {self.num_states}, {self.num_states})",
            )
        off = value.double() - torch.diag_embed(value.double().diagonal(dim1=-2, dim2=-1))
        if bool((off < 0).any()):
            bad = int((off < 0).flatten(1).any(1).nonzero()[0, 0])
            raise InvalidInputError(
                "a rate is negative", got=f"{float(off[bad].detach().min()):g} at t={float(t[bad]):g}"
            )
        return off - torch.diag_embed(off.sum(-1))

    def marginal(self, t: Tensor | float) -> JumpMarginal:
        """Return the law of the state at a time; for rates that change by small exact steps of frozen rates."""
        time = self._time(t)
        dtype = self.initial.dtype
        span = time - self.start_time
        if self._function is None:
            p = self.initial.double()
            p = (p.unsqueeze(-2) @ _transition(self._matrices().double(), span.reshape(1))[0]).squeeze(-2)
        else:
            p = self._evolve(span)
        p = p.clamp(min=0)
        return JumpMarginal((p / p.sum(-1, keepdim=True)).to(dtype))

    def _steps(self, span: Tensor) -> tuple[Tensor, Tensor]:
        """Return the midpoints ``(n,)`` of short steps over a span, and their length: short beside any stay."""
        steps = max(200, math.ceil(20 * self._fastest() * float(span.detach())))
        return (torch.arange(steps, dtype=torch.float64) + 0.5) / steps * span + self.start_time, span / steps

    def _moves(self, middles: Tensor, dt: Tensor) -> Iterator[Tensor]:
        """Yield the transition matrices of the steps around midpoints, in stacks ``(k, S, S)``."""
        most = max(1, _CHUNK // (60 * self.num_states**2))  # a step needs some sixty powers of its generator
        for part in middles.split(most):
            yield paired_transition(self._at(part), dt.expand(1, len(part)))[0]

    def _fastest(self) -> float:
        """Return a number that no exit rate exceeds."""
        return self.bound if self._function is not None else float(-self._matrix().detach().diagonal().min())

    def _evolve(self, span: Tensor) -> Tensor:
        """Return the marginal after a span of changing rates: midpoint steps, of second order, short beside any stay."""
        middles, dt = self._steps(span)
        p = self.initial.double()
        for moves in self._moves(middles, dt):
            while len(moves) > 1:  # neighbouring steps become one, so that a tape stays short
                last = moves[-1:] if len(moves) % 2 else moves[:0]
                moves = torch.cat([moves[0 : len(moves) - 1 : 2] @ moves[1::2], last])
            p = p @ moves[0]
        return p

    def _divergence(self, other: JumpMeasure, horizon: float) -> Tensor:
        """Return the integral of the mean divergence of rates that change, by the steps of :meth:`_evolve`."""
        middles, dt = self._steps(torch.tensor(horizon - self.start_time, dtype=torch.float64))
        p = [self.initial.double()]
        for moves in self._moves(middles, dt):
            for move in moves.unbind():
                p.append(p[-1] @ move)
        there = 0.5 * (torch.stack(p[1:]) + torch.stack(p[:-1]))
        rates = divergence_rates(self._at(middles), other._at(middles))
        return dt * torch.where(there > 0, there * rates, torch.zeros_like(rates)).sum()

    def _time(self, t: Tensor | float) -> Tensor:
        if isinstance(t, bool) or not isinstance(t, Tensor | float | int):
            raise InvalidInputError("t must be a time", got=repr(t)[:60])
        time = (
            t.double().reshape(()) if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)
        )
        if not bool(torch.isfinite(time)):
            raise NonFiniteError("t must be finite", got=float(time))
        if float(time.detach()) < self.start_time:
            raise TimeGridError(
                "t lies before the law's start", got=float(time), expected=f">= {self.start_time:g}"
            )
        return time

    def forward(self) -> JumpGenerator:
        """Return the master equation of the law, differentiable in its rates."""
        if self.generator is not None:
            return JumpGenerator(self.generator)
        return JumpGenerator(lambda t: self._at(t.reshape(1))[0], self.num_states)

    def _records(
        self, end: float, lanes: int, source: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        start = self.initial.detach().double().reshape(-1, self.num_states)
        count = lanes // len(start)
        if not count:
            first = torch.zeros(0, dtype=torch.long)
        else:
            first = torch.multinomial(start, count, replacement=True, generator=source).mT.reshape(-1)
        if self._function is None:
            q = self._matrices().detach().double().reshape(-1, self.num_states, self.num_states)
            return direct_records(q, first, self.start_time, end, source)
        return thinned_records(self._at, self.bound, first, self.start_time, end, source)

    def log_prob(self, path: Path) -> Tensor:
        r"""Return :math:`\log\pi_0(s_0)+\sum_k\log Q_{s_{k-1}s_k}-\int q_{X_t}dt` of records from the law's start on, ``(*shape,)``."""
        check_type(path, JumpRecord, "path")
        assert isinstance(path, JumpRecord)
        self._check_start(path)
        return self._log_density(path)

    def _log_density(self, record: JumpRecord) -> Tensor:
        first = record.states[..., :1]
        shape = torch.broadcast_shapes(record.shape, self.batch_shape)
        start = self.initial.double().expand(*shape, -1).gather(-1, first.expand(*shape, 1))[..., 0].log()
        if self._function is None:
            q = self._matrices().double()
            counts, dwell = record.counts.double(), record.dwell.double()
            # jumps that didn't happen have no part, nor one in the derivative, whatever their rates
            happened = counts > 0
            log_q = torch.where(happened, q, torch.ones_like(q)).log()
            exits = q.diagonal(dim1=-2, dim2=-1)
            return start + (counts * log_q).sum((-2, -1)) + (dwell * exits).sum(-1)
        lanes = record.num_jumps.reshape(-1)
        times = record.times.reshape(len(lanes), -1).double()
        states = record.states.reshape(len(lanes), -1)
        per_lane = ((states.shape[1] + record.duration * self.bound) * _ORDER) * self.num_states**2
        step = max(1, int(_CHUNK / per_lane))
        out = [
            self._along(times[i : i + step], states[i : i + step], lanes[i : i + step], record.ends)
            for i in range(0, len(lanes), step)
        ]
        return start + torch.cat(out).reshape(record.shape)

    def _along(self, times: Tensor, states: Tensor, count: Tensor, ts: Tensor) -> Tensor:
        """Return log rates of the jumps less the integral of the exit rates, ``(L,)``, for rates that change."""
        real = torch.arange(times.shape[1]) < count[:, None]
        at = torch.where(real, times, ts[-1].double())
        rates = self._at(at.reshape(-1)).reshape(*at.shape, self.num_states, self.num_states)
        rows = rates.gather(-2, states[:, :-1, None, None].expand(-1, -1, 1, self.num_states))[..., 0, :]
        jumps = torch.where(real, rows.gather(-1, states[:, 1:, None])[..., 0], 1.0).log().sum(-1)
        exits = _integral(lambda t: self._at(t).diagonal(dim1=-2, dim2=-1), at, states, ts, self._fastest())
        return jumps + exits

    def _rate(self, record: JumpRecord, other: JumpLaw) -> Tensor:
        if not isinstance(other, JumpMeasure):
            return super()._rate(record, other)
        begin = record.states[..., 0]
        first = self.initial.double()[begin].log() - other.initial.double()[begin].log()
        if self._function is None and other._function is None:
            rates = divergence_rates(self._matrix(), other._matrix())
            return first + (record.dwell.double() * rates).sum(-1)
        lanes = record.num_jumps.reshape(-1)
        states = record.states.reshape(len(lanes), -1)
        times = record.times.reshape(len(lanes), -1).double().clamp(max=float(record.ends[1]))
        fastest = max(self._fastest(), other._fastest())
        per_lane = (states.shape[1] + record.duration * fastest) * _ORDER * self.num_states**2
        step = max(1, int(_CHUNK / per_lane))
        out = [
            _integral(
                lambda t: divergence_rates(self._at(t), other._at(t)),
                times[i : i + step],
                states[i : i + step],
                record.ends,
                fastest,
            )
            for i in range(0, len(lanes), step)
        ]
        return first + torch.cat(out).reshape(record.shape)

    def kl(self, other: JumpMeasure, horizon: float) -> Tensor:
        r"""Return the divergence of the laws of whole paths up to ``horizon``.

        .. math:: KL(\pi^Q\|\pi^P)+\int\sum_im_i(t)\sum_{j\ne i}\Big[q_{ij}\log\frac{q_{ij}}{p_{ij}}-q_{ij}+p_{ij}\Big]dt

        with the marginals m of this law; infinite where the other law forbids what this one allows. Where rates change the integral
        is a sum over short steps, of second order, as in :meth:`marginal`.

        Args:
            other: The law P.
            horizon: The time at which the paths end.
        """
        check_type(other, JumpMeasure, "other")
        check_real(horizon, "horizon", above=self.start_time, fixed=True)
        if other.num_states != self.num_states:
            raise ShapeError("the laws have other states", got=f"{self.num_states} and {other.num_states}")
        p, theirs = self.initial.double(), other.initial.double()
        possible = p > 0  # other states have no part, nor one in the derivative
        ratio = torch.where(possible, p, 1.0).log() - torch.where(possible, theirs, 1.0).log()
        start = torch.where(possible, p * ratio, torch.zeros_like(p)).sum()
        if self._function is not None or other._function is not None:
            return (start + self._divergence(other, horizon)).to(self.initial.dtype)
        q = self._matrix().double()
        occupied = p @ integrate(q, q.new_tensor([horizon - self.start_time]), None)[0]
        rates = divergence_rates(q, other._matrix())
        rates = torch.where(occupied > 0, rates, torch.zeros_like(rates))
        return (start + (occupied * rates).sum()).to(self.initial.dtype)

    def entropy_production(self, horizon: float) -> Tensor:
        r"""Return the total entropy production from the start to ``horizon``, which is the divergence of paths from their reversal.

        .. math:: \int\sum_{i<j}(p_iQ_{ij}-p_jQ_{ji})\log\frac{p_iQ_{ij}}{p_jQ_{ji}}\,dt
            =\sum_{ij}\tau_iQ_{ij}\log\frac{Q_{ij}}{Q_{ji}}+H(p_T)-H(p_0)

        with the marginals p, their entropies H and the expected times τ in each state. It includes what relaxation to the steady state
        produces; :meth:`RateMatrix.entropy_production` is the rate that remains. Infinite where a jump that happens has no reverse.

        Args:
            horizon: The time at which the paths end.

        Example:
            >>> law = JumpMeasure([1.0, 0.0], [[0.0, 2.0], [2.0, 0.0]])
            >>> law.entropy_production(5.0)  # one of two alike states becomes either: log 2
            tensor(0.6931)
        """
        check_real(horizon, "horizon", above=self.start_time, fixed=True)
        p, q = self.initial.double(), self._matrix().double()
        span = horizon - self.start_time
        flow = (p @ integrate(q, q.new_tensor([span]), None)[0])[:, None] * q
        happens = ~torch.eye(len(q), dtype=torch.bool, device=q.device) & (flow > 0)
        ratio = torch.where(happens, q, 1.0).log() - torch.where(happens, q.mT, 1.0).log()
        exchanged = torch.where(happens, flow * ratio, torch.zeros_like(q)).sum()
        last = p @ _transition(q, q.new_tensor([span]))[0]
        total = exchanged + _entropy(last) - _entropy(p)
        return total.to(self.initial.dtype)

    def conditioned(self, times: object, y: object, observation: Observation) -> ConditionedJumps:
        """Return the law given observations: again a jump law, with tilted rates.

        Args:
            times: The times of the observations, ``(T,)``, not decreasing.
            y: The observations ``(T,)``, NaN where missing.
            observation: The law of an observation given the state.

        Raises:
            ZeroProbabilityError: If the observations are impossible.
        """
        return ConditionedJumps(self, times, y, observation)


class ConditionedJumps(JumpLaw):
    r"""The exact posterior of a jump process given observations.

    Its rates are :math:`q_{ij}(t)=Q_{ij}\beta_j(t)/\beta_i(t)`, with β the likelihood of all later observations; paths are drawn
    exactly, states at the observations first and then bridges between them.

    Args:
        law: The law before the observations, with constant rates.
        times: The times of the observations, ``(T,)``, not decreasing.
        y: The observations ``(T,)``, NaN where missing.
        observation: The law of an observation given the state.

    Attributes:
        log_evidence: The log density of the observations.
    """

    _times: Tensor
    _y: Tensor
    _entries: Tensor

    def __init__(self, law: JumpMeasure, times: object, y: object, observation: Observation) -> None:
        super().__init__()
        check_type(law, JumpMeasure, "law")
        law._matrix()  # one law, of constant rates
        self.prior, self.observation = law, observation
        self.num_states, self.start_time = law.num_states, law.start_time
        data = prepare(times, y, observation, law.start_time)
        if len(data.shape):
            raise ShapeError("one series at a time", got=f"y of shape {(*data.shape, data.log_b.shape[0])}")
        if observation.num_states != law.num_states:
            raise ShapeError(
                "the observation has other states", got=observation.num_states, expected=law.num_states
            )
        value = as_tensor(y, "y", missing=True, like=data.times).to(data.times)
        for name, what in (("_times", data.times), ("_y", value), ("_entries", data.entries)):
            self.register_buffer(name, what)

    @property
    def data(self) -> Prepared:
        """The observations as the filter reads them, with the law of an observation as it is now."""
        log_b = self.observation.log_likelihood(self._y[None]).movedim(-2, 0)
        return Prepared(self._times.double(), log_b, self._entries, torch.Size())

    def _filtered(self) -> Filtered:
        return run_filter(self.prior.initial, self.prior._matrix(), self.data, self.start_time, taped=True)

    @property
    def log_evidence(self) -> Tensor:
        """The log density of the observations, differentiable."""
        known = run_filter(self.prior.initial, self.prior._matrix(), self.data, self.start_time)
        return known.log_evidence[0].to(self.prior.initial.dtype)

    def _message(self, t: Tensor, known: Filtered) -> tuple[Tensor, Tensor]:
        """Return filtered probabilities and (scaled) likelihoods of later observations at times ``(n,)``, each ``(n, S)``."""
        q, data = self.prior._matrix().double(), self.data
        at = data.times[0]
        index = torch.searchsorted(at, t.contiguous(), right=True)
        begins = torch.cat([at.new_full((1,), self.start_time), at])
        states = torch.cat([self.prior.initial.double()[None], known.alpha[:, 0]])
        alpha = (states[index][:, None] @ _transition(q, t - begins[index]))[:, 0]
        later = index < len(at)
        nxt = index.clamp(max=len(at) - 1)
        b = data.log_b[nxt, 0]
        weight = (b - b.amax(-1, keepdim=True)).exp() * known.beta[nxt, 0]
        entered = data.entries[nxt, 0]
        off = q - torch.diag_embed(q.diagonal())
        into = torch.where((entered >= 0)[:, None], (off @ weight[..., None])[..., 0], weight)
        gap = torch.where(later, at[nxt] - t, torch.zeros_like(t))
        beta = (_transition(q, gap.clamp(min=0)) @ into[..., None])[..., 0]
        return alpha, torch.where(later[:, None], beta, torch.ones_like(beta))

    def marginal(self, t: Tensor | float) -> JumpMarginal:
        """Return the posterior of the state at a time, before, between or after the observations."""
        time = self.prior._time(t)
        alpha, beta = self._message(time.reshape(1), self._filtered())
        p = (alpha * beta)[0]
        return JumpMarginal((p / p.sum()).to(self.prior.initial.dtype))

    def rates(self, t: Tensor | float) -> Tensor:
        """Return the tilted generator ``(S, S)`` at a time; it grows without bound just before an exact observation."""
        time = self.prior._time(t)
        _, beta = self._message(time.reshape(1), self._filtered())
        q = self.prior._matrix()
        here = beta[0][:, None]
        # from where the observations can't come about there is no path, and no rate
        possible = here > 0
        ratio = torch.where(possible, beta[0][None, :] / torch.where(possible, here, 1.0), 0.0).to(q)
        off = q * ratio
        off = off - torch.diag_embed(off.diagonal())
        return off - torch.diag_embed(off.sum(-1))

    def forward(self) -> JumpGenerator:
        """Return the master equation with the tilted rates."""
        return JumpGenerator(self.rates, self.num_states)

    def smooth(self) -> Tensor:
        """Return the posterior of the state at the times of the observations, ``(T, S)``."""
        known = self._filtered()
        return (known.alpha * known.beta)[:, 0]

    def most_probable_states(self) -> Tensor:
        """Return the most probable states at the observations, jointly (Viterbi), ``(T,)``."""
        return viterbi(self.prior.initial, self.prior._matrix(), self.data, self.start_time)[0]

    @ordinarily
    def expected_statistics(self, horizon: float | None = None) -> tuple[Tensor, Tensor]:
        r"""Return the posterior means of the time in each state ``(S,)`` and of the numbers of jumps ``(S, S)``.

        By Fisher's identity: derivatives of the evidence in the generator's entries, taken as independent.

        Args:
            horizon: The time up to which time and jumps are counted, given all observations, later ones too; that of the
                last observation if None.
        """
        if horizon is not None:
            check_real(horizon, "horizon", above=self.start_time, fixed=True)
        return expected_statistics(self.prior, self.data, self._y, self.observation, horizon)

    def _records(
        self, end: float, lanes: int, source: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        return bridge_records(
            self.prior.initial.detach().double(),
            self.prior._matrix().detach().double(),
            self.data,
            self.start_time,
            end,
            lanes,
            source,
        )

    def _log_density(self, record: JumpRecord) -> Tensor:
        """Return the prior's density times the likelihood of the observations on the record, over their evidence."""
        data = self.data
        at = data.times[0]
        if float(at[-1]) > float(record.ends[1]):
            raise TimeGridError(
                "the record ends before the last observation",
                got=float(record.ends[1]),
                expected=f">= {float(at[-1]):g}",
            )
        if bool((data.entries >= 0).any()):
            raise UnavailableError("densities given exact times of entry aren't known")
        seen = record.at(at)
        log_b = data.log_b[:, 0]
        likelihood = log_b.expand(*seen.shape, -1).gather(-1, seen[..., None])[..., 0].sum(-1)
        return self.prior._log_density(record) + likelihood - self._filtered().log_evidence[0]


def log_evidence(law: JumpMeasure, times: object, y: object, observation: Observation) -> Tensor:
    """Return the log density of observations under a jump law, exactly.

    Args:
        law: The law, of constant rates, or a batch of laws that broadcasts against the series.
        times: The times of the observations, ``(T,)``, or ``(*series, T)`` where each series has its own; not decreasing.
        y: The observations ``(*series, T)``, NaN where missing.
        observation: The law of an observation given the state.

    Returns:
        The log densities ``(*series,)``, differentiable in rates, initial law and observation, by one forward and one
        backward pass.

    Raises:
        ZeroProbabilityError: If the observations of a series are impossible; it names series and time.

    Example:
        >>> law = JumpMeasure([0.5, 0.5], [[0.0, 0.7], [1.9, 0.0]])
        >>> from stochdyn.jumps import Exact
        >>> log_evidence(law, [0.0, 0.8, 0.8], [0, 1, 1], Exact(2))
        tensor(-2.1388)
    """
    check_type(law, JumpMeasure, "law")
    data = prepare(times, y, observation, law.start_time)
    if observation.num_states != law.num_states:
        raise ShapeError(
            "the observation has other states", got=observation.num_states, expected=law.num_states
        )
    if not law.batch_shape:
        total = run_filter(law.initial, law._matrix(), data, law.start_time).log_evidence
        return total.reshape(data.shape).to(law.initial.dtype)
    # one law per series: series and laws broadcast against each other
    shape = torch.broadcast_shapes(data.shape, law.batch_shape)
    count, size = shape.numel(), law.num_states
    index = torch.arange(data.shape.numel()).reshape(data.shape).expand(shape).reshape(-1)
    times = data.times[index] if len(data.times) > 1 else data.times
    spread = Prepared(times, data.log_b[:, index], data.entries[:, index], shape)
    start = law.initial.expand(*shape, size).reshape(count, size)
    q = law._matrices().expand(*shape, size, size).reshape(count, size, size)
    return run_filter(start, q, spread, law.start_time).log_evidence.reshape(shape).to(law.initial.dtype)


def expected_statistics(
    law: JumpMeasure, data: Prepared, y: Tensor, observation: Observation, horizon: float | None
) -> tuple[Tensor, Tensor]:
    """Return posterior mean dwell times ``(S,)`` and jump numbers ``(S, S)``; see :meth:`ConditionedJumps.expected_statistics`."""
    at = data.times[0]
    end = float(at[-1]) if horizon is None else float(horizon)
    q = law._matrix().detach().double().clone().requires_grad_()
    place = int(torch.searchsorted(at, at.new_tensor(end), right=True))
    if horizon is not None:  # nothing is observed there, but what is counted ends
        at = torch.cat([at[:place], at.new_tensor([end]), at[place:]])
        seen = torch.cat([y[:place], y.new_tensor([math.nan]), y[place:]])
        data = prepare(at, seen, observation, law.start_time)
        place += 1
    with recording():
        counted = transitions(q, data.times, law.start_time, data.entries)
        matrices = torch.cat([counted[:place], counted[place:].detach()])
        total = filter_with(law.initial.detach(), matrices, data).log_evidence.sum()
        slope = torch.autograd.grad(total, q)[0]
    jumps = q.detach() * slope
    return slope.diagonal().clone(), jumps - torch.diag_embed(jumps.diagonal())


def _integral(
    rates: Callable[[Tensor], Tensor], at: Tensor, states: Tensor, ends: Tensor, fastest: float
) -> Tensor:
    """Return the integral ``(L,)`` along paths of what accrues in each state, by Gauss-Legendre nodes within every stay.

    Args:
        rates: What accrues at times ``(n,)`` in each state, ``(n, S)``.
        at: The times of the jumps, padded with the end, ``(L, N)``.
        states: The states before and after them, ``(L, N + 1)``.
        ends: The times at which the paths start and end, ``(2,)``.
        fastest: The largest exit rate: longer stays than its inverse are cut, since rates may have changed within them.
    """
    first, last = ends.double()
    cuts = max(1, math.ceil(float(last - first) * fastest))
    grid = torch.linspace(0, 1, cuts + 1, dtype=torch.float64) * (last - first) + first
    edges = torch.cat([grid.expand(len(at), -1), at], -1).sort(-1).values
    here = states.gather(-1, torch.searchsorted(at.contiguous(), edges[:, :-1].contiguous(), right=True))
    x, w = (torch.as_tensor(part) for part in np.polynomial.legendre.leggauss(_ORDER))
    half = 0.5 * (edges[:, 1:] - edges[:, :-1])[..., None]
    nodes = 0.5 * (edges[:, 1:] + edges[:, :-1])[..., None] + half * x
    value = rates(nodes.reshape(-1)).reshape(*nodes.shape, -1)
    stay = value.gather(-1, here[..., None, None].expand(-1, -1, _ORDER, 1))[..., 0]
    return (half * w * stay).sum((-2, -1))


def _entropy(p: Tensor) -> Tensor:
    """Return the entropy of probabilities; those of zero have no part, nor one in the derivative."""
    return -torch.where(p > 0, p * torch.where(p > 0, p, 1.0).log(), torch.zeros_like(p)).sum()


def divergence_rates(q: Tensor, p: Tensor) -> Tensor:
    """Return the rates ``(S,)`` at which the divergence grows in each state, infinite where P forbids a jump of Q."""
    a, b = q.double(), p.double()
    off = ~torch.eye(a.shape[-1], dtype=torch.bool, device=a.device)
    both = off & (a > 0) & (b > 0)
    ratio = torch.where(both, a, 1.0).log() - torch.where(both, b, 1.0).log()
    part = torch.where(off, a * ratio - a + b, torch.zeros_like(a))
    return torch.where(off & (a > 0) & (b <= 0), torch.inf, part).sum(-1)
