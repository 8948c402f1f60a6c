"""Jump processes in Pyro models: hidden paths summed out, seen paths, and hidden paths drawn afterwards."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import constraints

from stochdyn._checks import (
    as_generator,
    as_tensor,
    check_event_size,
    check_floating,
    check_nonempty,
    check_positive_int,
    check_real,
    check_type,
)
from stochdyn.core.law.marginals import Generator
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.infer.law_distribution import LawDistribution
from stochdyn.jumps.measure import JumpMeasure, log_evidence
from stochdyn.jumps.observations import Observation
from stochdyn.jumps.record import JumpRecord

__all__ = ["HiddenJumps", "JumpPath", "posterior_paths"]


class HiddenJumps(LawDistribution):
    """Observations of a jump process whose path is hidden, as a Pyro distribution: the path is summed out exactly.

    The log density is differentiable in rates, initial law and observation, so stock SVI and NUTS learn all of them.

    Args:
        law: The law of the hidden state, of constant rates; a batch of laws gives every series rates of its own, as hierarchies
            have them.
        times: The times of the observations, ``(T,)``, or ``(*batch, T)`` where each series has its own.
        observation: The law of an observation given the state.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from stochdyn.jumps import Exact
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
        ...     law = JumpMeasure([0.5, 0.5], torch.stack([torch.stack([-rate, rate]), torch.stack([rate, -rate])]))
        ...     pyro.sample("y", HiddenJumps(law, [0.0, 1.0, 2.0], Exact(2)), obs=y)
        >>> trace = pyro.poutine.trace(model).get_trace(torch.tensor([0.0, 1.0, 1.0]))
        >>> trace.log_prob_sum().shape
        torch.Size([])
    """

    has_rsample = False
    _carried = ("law", "times", "observation")

    def __init__(
        self, law: JumpMeasure, times: object, observation: Observation, validate_args: Any = None
    ) -> None:
        check_type(law, JumpMeasure, "law")
        check_type(observation, Observation, "observation")
        self.law, self.observation = law, observation
        self.times = as_tensor(times, "times", like=torch.empty((), dtype=torch.float64))
        if not self.times.ndim or not self.times.shape[-1]:
            raise ShapeError("times must be (T,) or (*batch, T)", got=tuple(self.times.shape))
        batch = torch.broadcast_shapes(law.batch_shape, self.times.shape[:-1])
        super().__init__(batch, self.times.shape[-1:], validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Any real vector: what an observation may be is checked by the observation itself."""
        return constraints.real_vector

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the evidence of observations ``(*batch, T)``, NaN where missing."""
        times = self.times
        if times.ndim > 1:
            shape = torch.broadcast_shapes(value.shape, times.shape)
            value, times = value.expand(shape), times.expand(shape)
        evidence = log_evidence(self.law, times, value, self.observation)
        return evidence.expand(torch.broadcast_shapes(evidence.shape, self.batch_shape))

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw hidden paths, and observations of them, ``(*sample, *batch, T)``."""
        shape, law = torch.Size(sample_shape) + self.batch_shape, self.law
        axes = len(shape) - len(law.batch_shape)
        extra, own = shape[:axes], shape[axes:]
        if law.generator is not None and own != law.batch_shape:
            # series that share a law have paths of their own
            initial, rates = law.initial.detach(), law.generator.matrix.detach()
            law = JumpMeasure(initial.expand(*own, -1), rates.expand(*own, *rates.shape[-2:]), law.start_time)
        last = self.times.detach().max().reshape(1)
        record = law.sample(torch.cat([last.new_full((1,), law.start_time), last]).unique(), tuple(extra))
        times = self.times.expand(*record.shape, -1)
        index = torch.searchsorted(record.times.contiguous(), times.to(record.times).contiguous(), right=True)
        return self.observation.draw(record.states.gather(-1, index)).to(self.law.initial.dtype)


class JumpPath(LawDistribution):
    r"""A path of a jump process that is seen in full, as a Pyro distribution.

    The event is a record written as one vector: the number of jumps, their times (padded with the horizon) and the states
    before and after them (padded with the last one), ``1 + N + (N + 1)`` numbers for at most N jumps. :meth:`encode` writes
    records so. Use it with ``obs=`` for paths without noise, and :class:`HiddenJumps` where the path is hidden: a path is
    discrete, so it has no reparametrised draws, and no sampler of continuous parameters may draw it.

    Args:
        law: The law of the path, of constant or changing rates.
        horizon: The time at which records end.
        max_jumps: The number N of jumps that an event has room for.

    Example:
        >>> from stochdyn.jumps import JumpRecord
        >>> law = JumpMeasure([1.0, 0.0], [[0.0, 0.7], [1.9, 0.0]])
        >>> path = JumpPath(law, horizon=2.0, max_jumps=6)
        >>> record = JumpRecord.of([0.4, 1.1], [0, 1, 0], horizon=2.0, num_states=2)
        >>> path.log_prob(path.encode(record)), law.log_prob(record)
        (tensor(-1.9549), tensor(-1.9549))
    """

    has_rsample = False
    _carried = ("law", "horizon", "max_jumps")

    def __init__(self, law: JumpMeasure, horizon: float, max_jumps: int, validate_args: Any = None) -> None:
        check_type(law, JumpMeasure, "law")
        check_real(horizon, "horizon", above=law.start_time, fixed=True)
        check_positive_int(max_jumps, "max_jumps")
        self.law, self.horizon, self.max_jumps = law, float(horizon), int(max_jumps)
        super().__init__(law.batch_shape, torch.Size([2 * max_jumps + 2]), validate_args=validate_args)

    @constraints.dependent_property(is_discrete=False, event_dim=1)
    def support(self) -> constraints.Constraint:
        """Any real vector: what a record may be is checked when it is read."""
        return constraints.real_vector

    def encode(self, record: JumpRecord) -> Tensor:
        """Write records as events, ``(*shape, 2 N + 2)``.

        Args:
            record: The records, which end at the horizon.

        Raises:
            InvalidInputError: If a record has more jumps than there is room for, or another end.
        """
        check_type(record, JumpRecord, "record")
        if abs(float(record.ends[1]) - self.horizon) > 1e-9 * abs(self.horizon):
            raise InvalidInputError(
                "the record doesn't end at the horizon", got=float(record.ends[1]), expected=self.horizon
            )
        most = int(record.num_jumps.max()) if record.num_jumps.numel() else 0
        if most > self.max_jumps:
            raise InvalidInputError(
                "a record has more jumps than max_jumps", got=most, expected=f"at most {self.max_jumps}"
            )
        times = torch.full((*record.shape, self.max_jumps), self.horizon, dtype=torch.float64)
        times[..., :most] = record.times[..., :most].clamp(max=self.horizon)
        last = record.states[..., most : most + 1]
        states = torch.cat(
            [record.states[..., :most], last.expand(*record.shape, self.max_jumps + 1 - most)], -1
        )
        return torch.cat([record.num_jumps[..., None].double(), times, states.double()], -1)

    def decode(self, value: Tensor) -> JumpRecord:
        """Read events ``(*shape, 2 N + 2)`` as records.

        Args:
            value: The events.

        Raises:
            ShapeError: If they aren't events of this law.
            InvalidInputError: If a number of jumps or a state doesn't exist, or times of jumps don't increase up to the horizon.
        """
        check_floating(value, "value", "(..., 2 N + 2)")
        check_event_size(value, self.event_shape[0], "value")
        count = value[..., 0].round().long()
        times, states = (
            value[..., 1 : self.max_jumps + 1].double(),
            value[..., self.max_jumps + 1 :].round().long(),
        )
        real = torch.arange(self.max_jumps) < count[..., None]
        before = torch.cat([torch.full_like(times[..., :1], self.law.start_time), times], -1)[..., :-1]
        out_of_order = real & ~((times > before) & (times <= self.horizon))
        if bool(
            ((count < 0) | (count > self.max_jumps)).any()
            | ((states < 0) | (states >= self.law.num_states)).any()
        ):
            raise InvalidInputError(
                "value holds a number of jumps or a state that doesn't exist",
                expected=f"at most {self.max_jumps} jumps between states 0 to {self.law.num_states - 1}",
            )
        if bool(out_of_order.any()):
            raise InvalidInputError("times of jumps must increase up to the horizon", got="value")
        times = torch.where(real, times, torch.full_like(times, math.inf))
        ends = torch.tensor([self.law.start_time, self.horizon], dtype=torch.float64)
        return JumpRecord(times, states, count, ends, self.law.num_states, self.law)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of events, with respect to counting times Lebesgue."""
        return self.law.log_prob(self.decode(value)).to(self.law.initial.dtype)

    def sample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw events; more jumps than there is room for are an error."""
        shape = torch.Size(sample_shape) + self.batch_shape
        extra = shape[: len(shape) - len(self.law.batch_shape)]
        return self.encode(self.law.sample_record(self.horizon, tuple(extra)))


def posterior_paths(
    laws: Sequence[JumpMeasure],
    times: object,
    y: object,
    observation: Observation,
    horizon: float,
    generator: Generator = None,
) -> JumpRecord:
    """Draw one hidden path per posterior draw of the rates, given the observations: uncertain rates and paths together.

    Paths after the last observation are forecasts.

    Args:
        laws: One law per posterior draw, all with the same states and start.
        times: The times of the observations, ``(T,)``.
        y: The observations ``(T,)``, NaN where missing.
        observation: The law of an observation given the state.
        horizon: The time at which the paths end.
        generator: The source of randomness.

    Returns:
        Records of shape ``(len(laws),)``.

    Raises:
        ZeroProbabilityError: If the observations are impossible under one of the laws.

    Example:
        >>> from stochdyn.jumps import Exact
        >>> laws = [JumpMeasure([1.0, 0.0], [[0.0, rate], [1.9, 0.0]]) for rate in (0.6, 0.7, 0.8)]
        >>> posterior_paths(laws, [0.5, 1.0], [1, 0], Exact(2), horizon=3.0, generator=0).at([0.5, 1.0]).tolist()
        [[1, 0], [1, 0], [1, 0]]
    """
    check_nonempty(laws, "laws")
    source = as_generator(generator)
    records = []
    for k, law in enumerate(laws):
        check_type(law, JumpMeasure, f"laws[{k}]")
        records.append(law.conditioned(times, y, observation).sample_record(horizon, 1, source))
    most = max(record.times.shape[-1] for record in records)
    waits = [torch.nn.functional.pad(r.times, (0, most - r.times.shape[-1]), value=math.inf) for r in records]
    states = [
        torch.cat([r.states, r.states[:, -1:].expand(-1, most + 1 - r.states.shape[-1])], -1) for r in records
    ]
    return JumpRecord(
        torch.cat(waits),
        torch.cat(states),
        torch.cat([r.num_jumps for r in records]),
        records[0].ts,
        records[0].num_states,
    )
