"""The suite of laws: diffusions and jumps pass it, and each of a list of broken laws is caught."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

import stochdyn as sd
from stochdyn.core import Marginal, PathMeasure
from stochdyn.testing import PathMeasureSuite
from tests.core.laws import F64
from tests.testing.toys import Telegraph

ONE = torch.ones(2, dtype=F64)


def decay(t: Tensor, x: Tensor) -> Tensor:
    return -x


class TestDiffusion(PathMeasureSuite):
    """From a fixed start."""

    def make(self) -> sd.DiffusionMeasure:
        """Return an Ornstein-Uhlenbeck law."""
        return sd.DiffusionMeasure(ONE, sd.SDE(decay, 0.5))

    def other(self) -> PathMeasure:
        """Return it under a control."""
        return self.make().controlled(lambda t, x: torch.ones_like(x))


class TestControlledDiffusion(PathMeasureSuite):
    """With a random start, a start time, a step and noise of the state."""

    bias = 0.05

    def make(self) -> sd.DiffusionMeasure:
        """Return a law that starts before its grid does."""
        start = Independent(Normal(ONE, 0.3), 1)
        sde = sd.SDE(decay, lambda t, x: sd.Diagonal(0.3 + 0.1 * x.sin()))
        law = sd.DiffusionMeasure(start, sde, start_time=-0.5, dt=0.03, method="milstein")
        return law.controlled(lambda t, x: 0.5 - x)

    def outside(self) -> float:
        """Before the start."""
        return -0.6


class TestBatchOfDiffusions(PathMeasureSuite):
    """Single precision, a batch of starts, one noise channel for two components."""

    batch = (3,)

    def make(self) -> sd.DiffusionMeasure:
        """Return an oscillator."""
        start = torch.arange(6.0).reshape(3, 2)
        sde = sd.SDE(lambda t, x: torch.stack([x[..., 1], -x[..., 0]], -1), torch.tensor([[0.0], [0.7]]))
        return sd.DiffusionMeasure(start, sde, start_time=0.0, dt=0.005)

    def other(self) -> PathMeasure:
        """Return it under a control."""
        return self.make().controlled(lambda t, x: 0.1 * x[..., :1])


class TestReversedDiffusion(PathMeasureSuite):
    """Of a stationary law with correlated noise."""

    def make(self) -> sd.DiffusionMeasure:
        """Return the reversal of a stationary law."""
        g = torch.tensor([[1.0, 0.3], [0.0, 0.5]], dtype=F64)
        c = 0.5 * g @ g.mT
        start = MultivariateNormal(torch.zeros(2, dtype=F64), c)
        law = sd.DiffusionMeasure(start, sd.SDE(decay, g))
        inverse = torch.linalg.inv(c)
        return law.reverse(lambda t, x: -x @ inverse, 1.0)


class TestJumps(PathMeasureSuite):
    """Ragged paths without increments."""

    def make(self) -> Telegraph:
        """Return a telegraph process."""
        return Telegraph(1.5, 0.7)

    def other(self) -> PathMeasure:
        """Return one with other rates."""
        return Telegraph(1.0, 1.0, 0.3)

    def outside(self) -> float:
        """Before the start."""
        return -1.0


def test_jump_laws_go_through_the_evidence_bound() -> None:
    """With the prior as posterior the log weights are the log likelihoods; their average is the evidence."""
    ts = torch.linspace(0, 1, 11, dtype=F64)
    prior = Telegraph(1.5, 0.7, 0.4)

    def likelihood(path: sd.core.Path, batch: None) -> Tensor:
        return torch.where(path.x[..., -1, 0] == 1, 0.9, 0.2).log()

    p = float(prior.marginal(1.0).mean.detach())
    exact = torch.tensor(0.9 * p + 0.2 * (1 - p)).log()
    torch.manual_seed(0)
    elbo = sd.PathELBO(prior, Telegraph(2.0, 0.5, 0.5), likelihood, 4000, "density", ts=ts)
    value = elbo(None)
    assert value.bound == "evidence_lower"
    assert -value.loss.item() < float(exact)
    estimate, weights = elbo.evidence(20_000)
    error = weights.exp().std() / 20_000**0.5 / exact.exp()
    assert abs(float(estimate - exact)) < 5 * float(error)


class _Broken(sd.DiffusionMeasure):
    """A law that is right but for what a subclass changes."""

    def __init__(self) -> None:
        super().__init__(ONE, sd.SDE(decay, 0.5))


class _TupleOnly(_Broken):
    def sample(self, ts, sample_shape=(), generator=None):  # type: ignore[no-untyped-def, override]
        return super().sample(ts, tuple(sample_shape), generator)


class _GlobalNoise(_Broken):
    def sample(self, ts, sample_shape=(), generator=None):  # type: ignore[no-untyped-def, override]
        super().sample(ts, sample_shape, generator)
        return super().sample(ts, sample_shape, None)


class _UncheckedGrid(_Broken):
    def sample(self, ts, sample_shape=(), generator=None):  # type: ignore[no-untyped-def, override]
        good = torch.linspace(0, 1, 21, dtype=F64)
        try:
            return super().sample(ts, sample_shape, generator)
        except sd.errors.TimeGridError:
            return super().sample(good, sample_shape, generator)


class _WrongMarginal(_Broken):
    def marginal(self, t: Tensor | float) -> Marginal:
        return super().marginal(1.5 * float(t))


class _WrongDrift(_Broken):
    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        return x


class _WrongWeights(_Broken):
    def log_rn(self, path, other, estimator="density", *, recorded=False):  # type: ignore[no-untyped-def, override]
        return 0.5 * super().log_rn(path, other, estimator, recorded=recorded)


class _LostState(_Broken):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.ones(1, dtype=F64), persistent=False)

    def sample(self, ts, sample_shape=(), generator=None):  # type: ignore[no-untyped-def, override]
        path = super().sample(ts, sample_shape, generator)
        return sd.PathSample(path.ts, path.x + self.shift, path.dw, law=self)


def suite_of(kind: Callable[[], sd.DiffusionMeasure]) -> PathMeasureSuite:
    class Suite(PathMeasureSuite):
        def make(self) -> sd.DiffusionMeasure:
            return kind()

        def other(self) -> PathMeasure:
            return kind().controlled(lambda t, x: torch.ones_like(x))

    return Suite()


@pytest.mark.parametrize(
    ("kind", "test"),
    [
        (_TupleOnly, "test_shapes_are_sample_batch_time_dim"),
        (_GlobalNoise, "test_the_generator_decides_the_paths"),
        (_UncheckedGrid, "test_bad_grids_are_refused"),
        (_WrongMarginal, "test_marginals_are_those_of_the_samples"),
        (_WrongDrift, "test_the_drift_is_that_of_the_paths"),
        (_WrongWeights, "test_weights_have_mean_one"),
        (_LostState, "test_a_copy_is_the_same_law"),
    ],
)
def test_broken_laws_are_caught(kind: Callable[[], sd.DiffusionMeasure], test: str) -> None:
    with pytest.raises((AssertionError, TypeError)):
        getattr(suite_of(kind), test)()
