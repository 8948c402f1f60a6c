"""The conformance suites: our own classes pass them, and each of a list of broken classes is caught."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stochdyn.core import (
    Brownian,
    Coefficient,
    Diagonal,
    GaussianFlow,
    MarginalFlow,
    Matrix,
    NoiseProcess,
    NoiseSteps,
    Scalar,
)
from stochdyn.objectives import Objective, ObjectiveValue
from stochdyn.testing import CoefficientSuite, MarginalFlowSuite, NoiseProcessSuite, ObjectiveSuite

F64 = torch.float64


def positive(*shape: int) -> Tensor:
    return 0.5 + torch.rand(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(1))


class TestScalar(CoefficientSuite):
    """One strength for all."""

    def make(self) -> Coefficient:
        """Return a scalar."""
        return Scalar(torch.tensor(0.7, dtype=F64))


class TestBatchedScalar(CoefficientSuite):
    """One strength a series."""

    def make(self) -> Coefficient:
        """Return four strengths."""
        return Scalar(positive(4))


class TestDiagonal(CoefficientSuite):
    """One strength a component."""

    def make(self) -> Coefficient:
        """Return three strengths."""
        return Diagonal(positive(3))


class TestBatchedDiagonal(CoefficientSuite):
    """One strength a component and series."""

    def make(self) -> Coefficient:
        """Return strengths for a batch."""
        return Diagonal(positive(4, 3))


class TestSquareMatrix(CoefficientSuite):
    """As many channels as components."""

    def make(self) -> Coefficient:
        """Return a square matrix."""
        return Matrix(normal(3, 3))


class TestBatchedMatrix(CoefficientSuite):
    """A matrix a series."""

    def make(self) -> Coefficient:
        """Return a batch of matrices."""
        return Matrix(normal(4, 3, 3))


class TestTallMatrix(CoefficientSuite):
    """Fewer channels than components."""

    def make(self) -> Coefficient:
        """Return a tall matrix."""
        return Matrix(normal(3, 2))


class TestWideMatrix(CoefficientSuite):
    """More channels than components."""

    def make(self) -> Coefficient:
        """Return a batch of wide matrices."""
        return Matrix(normal(4, 3, 5))


class TestBrownian(NoiseProcessSuite):
    """Brownian motion."""

    def make(self) -> NoiseProcess:
        """Return Brownian motion."""
        return Brownian()

    def variance(self, ts: Tensor) -> Tensor:
        """Var W_t = t."""
        return ts


class _Markov(NoiseProcess):
    """An OU process with one memory state: dY = -lam Y dt + dW, Z = W - lam int Y = Y."""

    num_states = 1
    lam = 2.0

    def num_innovations(self, ts: Tensor) -> int:
        return 2

    def _noise(self, dt: Tensor) -> tuple[Tensor, Tensor]:
        # regression of the exact increment of Y on the Brownian one, and what remains
        slope = (1 - (-self.lam * dt).exp()) / (self.lam * dt)
        rest = (1 - (-2 * self.lam * dt).exp()) / (2 * self.lam) - slope.square() * dt
        return slope, rest

    def steps(self, ts: Tensor, *, dtype: torch.dtype) -> NoiseSteps:
        dt = ts[1:] - ts[:-1]
        slope, rest = self._noise(dt)
        decay = (-self.lam * dt).exp()[:, None]
        gain = torch.stack([slope, torch.ones_like(slope)], 1)
        parts = (torch.stack([dt, rest], 1), gain, decay - 1, decay, gain[..., None])
        return NoiseSteps(*(p.to(dtype) for p in parts))

    def initial_factor(self, *, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        return None


class TestMemory(NoiseProcessSuite):
    """A process with memory and two innovations a step."""

    def make(self) -> NoiseProcess:
        """Return an exact OU recursion."""
        return _Markov()

    def variance(self, ts: Tensor) -> Tensor:
        """The variance of an OU process from zero."""
        return (1 - (-4 * ts).exp()) / 4


class _Square(Objective):
    """A noisy square."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([0.5, -1.0], dtype=F64))

    def forward(self, batch: Any = None) -> ObjectiveValue:
        loss = (self.weight - torch.randn(2, dtype=F64)).square().sum()
        return ObjectiveValue(loss, {"square": loss.detach()}, "surrogate")


class TestObjective(ObjectiveSuite):
    """A right objective."""

    def make(self) -> tuple[Objective, Any]:
        """Return the noisy square."""
        return _Square(), None


# ---- what is wrong must fail -------------------------------------------------------------------------


class _LongSolve(Scalar):
    def solve(self, v: Tensor) -> Tensor:
        return v * self._strength()


class _HalfLogDet(Scalar):
    def log_det(self, dim: int) -> Tensor:
        return self._value.log()


class _TransposedApply(Matrix):
    def apply(self, dz: Tensor) -> Tensor:
        return dz @ self._value


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (lambda: _LongSolve(positive(4)), "test_solve_is_the_pseudo_inverse"),
        (lambda: _HalfLogDet(torch.tensor(0.5, dtype=F64)), "test_log_det_is_half_that_of_the_covariance"),
        (lambda: _TransposedApply(normal(3, 3)), "test_apply_is_multiplication_by_the_matrix"),
    ],
)
def test_broken_coefficients_are_caught(broken: Any, test: str) -> None:
    suite = type("Suite", (CoefficientSuite,), {"make": lambda self: broken()})()
    with pytest.raises(AssertionError):
        getattr(suite, test)()


class _SlowBrownian(Brownian):
    def steps(self, ts: Tensor, *, dtype: torch.dtype) -> NoiseSteps:
        right = super().steps(ts, dtype=dtype)
        return NoiseSteps(right.variance, 0.9 * right.gain, right.recall, right.decay, right.load)


class _GlobalStep(Brownian):
    def steps(self, ts: Tensor, *, dtype: torch.dtype) -> NoiseSteps:
        right = super().steps(ts, dtype=dtype)
        mean = right.variance.mean() * torch.ones_like(right.variance)
        return NoiseSteps(mean, right.gain, right.recall, right.decay, right.load)


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (_SlowBrownian, "test_variance_of_the_recursion"),
        (_GlobalStep, "test_first_innovation_is_the_brownian_increment"),
        (_GlobalStep, "test_a_step_depends_on_its_ends_alone"),
    ],
)
def test_broken_noise_is_caught(broken: type[NoiseProcess], test: str) -> None:
    members = {"make": lambda self: broken(), "variance": lambda self, ts: ts}
    suite = type("Suite", (NoiseProcessSuite,), members)()
    with pytest.raises(AssertionError):
        getattr(suite, test)()


class _Flow(GaussianFlow):
    """A right flow to break."""

    def __init__(self) -> None:
        eye = torch.eye(2, dtype=F64)
        super().__init__(
            lambda t: t[..., None].expand(*t.shape, 2).to(F64),
            lambda t: (1 + t)[..., None, None].to(F64) * eye,
        )


class _NarrowSamples(_Flow):
    def sample(self, t: Any, n: int, generator: torch.Generator | None = None) -> Tensor:
        return 0.8 * super().sample(t, n, generator)


class _GlobalSamples(_Flow):
    def sample(self, t: Any, n: int, generator: torch.Generator | None = None) -> Tensor:
        return super().sample(t, n, None)


class _WrongScore(_Flow):
    def score(self, t: Any, x: Tensor) -> Tensor:
        return super().score(t, x) + 0.1


class _StillTime(_Flow):
    def time_derivative(self, t: Any, x: Tensor) -> Tensor:
        return 0 * super().time_derivative(t, x)


class _Unnormalised(_Flow):
    def log_prob(self, t: Any, x: Tensor) -> Tensor:
        return super().log_prob(t, x) + 0.5


class _Permissive(_Flow):
    def log_prob(self, t: Any, x: Tensor) -> Tensor:
        return -0.5 * (x - t).square().sum(-1)

    def score(self, t: Any, x: Tensor) -> Tensor:
        return t - x


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (_NarrowSamples, "test_samples_and_density_agree"),
        (_GlobalSamples, "test_generator_decides_the_samples"),
        (_WrongScore, "test_score_is_the_gradient_of_the_log_density"),
        (_StillTime, "test_time_derivative_is_the_limit_of_differences"),
        (_Unnormalised, "test_density_integrates_to_one"),
    ],
)
def test_broken_flows_are_caught(broken: type[MarginalFlow], test: str) -> None:
    suite = type("Suite", (MarginalFlowSuite,), {"make": lambda self: broken()})()
    with pytest.raises(AssertionError):
        getattr(suite, test)()
    right = type("Suite", (MarginalFlowSuite,), {"make": lambda self: _Flow()})()
    getattr(right, test)()


def test_flow_that_broadcasts_times_silently_is_caught() -> None:
    suite = type("Suite", (MarginalFlowSuite,), {"make": lambda self: _Permissive()})()
    with pytest.raises((AssertionError, RuntimeError)):
        suite.test_times_that_do_not_fit_raise()


class _Attached(_Square):
    def forward(self, batch: Any = None) -> ObjectiveValue:
        value = super().forward(batch)
        return ObjectiveValue(value.loss, {"square": value.loss}, "surrogate")


class _OwnGenerator(_Square):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator()

    def forward(self, batch: Any = None) -> ObjectiveValue:
        noise = torch.randn(2, dtype=F64, generator=self.generator)
        return ObjectiveValue((self.weight - noise).square().sum())


class _Unused(_Square):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Parameter(torch.zeros((), dtype=F64))


class _Halved(_Square):
    def forward(self, batch: Any = None) -> ObjectiveValue:
        value = super().forward(batch)
        return ObjectiveValue(0.5 * value.loss + 0.5 * value.loss.detach())


class _HiddenState(_Square):
    def __init__(self) -> None:
        super().__init__()
        self.offset = torch.rand((), dtype=F64)

    def forward(self, batch: Any = None) -> ObjectiveValue:
        return ObjectiveValue(super().forward(batch).loss + self.offset)

    def __deepcopy__(self, memo: Any) -> _HiddenState:
        return _HiddenState()


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (_Attached, "test_value_keeps_the_contract"),
        (_OwnGenerator, "test_randomness_comes_from_the_global_generator"),
        (_Unused, "test_gradients_reach_every_trainable_parameter"),
        (_Halved, "test_gradient_is_the_slope_of_the_loss"),
        (_HiddenState, "test_state_dict_carries_the_whole_state"),
    ],
)
def test_broken_objectives_are_caught(broken: type[Objective], test: str) -> None:
    suite = type("Suite", (ObjectiveSuite,), {"make": lambda self: (broken(), None)})()
    with pytest.raises(AssertionError):
        getattr(suite, test)()
