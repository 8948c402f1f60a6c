"""Every Gaussian law of the core passes the suite of laws."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stochdyn.core import LinearGaussianMeasure, PathMeasure, PinnedProcess
from stochdyn.testing import PathMeasureSuite

F64 = torch.float64


def _t(*values: float) -> Tensor:
    return torch.tensor(values, dtype=F64)


class TestStationary(PathMeasureSuite):
    bias = 0.0

    def make(self) -> PathMeasure:
        return LinearGaussianMeasure.ornstein_uhlenbeck(_t(1.3, 0.4), _t(0.3, -1.0), _t(0.8, 2.0))

    def other(self) -> PathMeasure:
        return LinearGaussianMeasure.ornstein_uhlenbeck(_t(0.9, 0.5), _t(0.2, -0.6), _t(0.8, 2.0))

    def outside(self) -> float:
        return -1.0


class TestBatchFromFixedPoints(PathMeasureSuite):
    batch = (2,)

    def make(self) -> PathMeasure:
        start = torch.tensor([[0.3], [-1.0]], dtype=F64)
        return LinearGaussianMeasure.ornstein_uhlenbeck(
            torch.tensor([[1.0], [0.2]], dtype=F64), 0.3, initial_mean=start
        )

    def other(self) -> PathMeasure:
        return LinearGaussianMeasure.brownian(initial_mean=torch.tensor([[0.3], [-1.0]], dtype=F64))


class TestNoiseInOneComponentVaryingInTime(PathMeasureSuite):
    def make(self) -> PathMeasure:
        return LinearGaussianMeasure(
            lambda t: torch.stack(
                [torch.stack([0 * t, 1 + 0 * t], -1), torch.stack([-2 - t, -0.5 + 0 * t], -1)], -2
            ),
            _t(0.2, 0.1),
            torch.tensor([[0.0], [0.8]], dtype=F64),
            _t(1.0, -1.0),
            0.3 * torch.eye(2, dtype=F64),
        )


class TestPinned(PathMeasureSuite):
    def make(self) -> PathMeasure:
        return PinnedProcess(_t(0.5, 2.0), _t(-1.0, 1.0), 1.3, 0.4, _t(0.7, 3.0))

    def other(self) -> PathMeasure:
        return PinnedProcess(_t(0.5, 2.0), _t(-1.0, 1.0), 0.2, 0.1, _t(0.7, 3.0))

    def outside(self) -> float:
        return 1.5


class TestConditioned(PathMeasureSuite):
    def make(self) -> PathMeasure:
        law = LinearGaussianMeasure.ornstein_uhlenbeck(_t(1.3), 0.3, 0.8)
        return law.conditioned(_t(0.4, 0.55, 1.4), _t(1.0, torch.nan, -0.5)[:, None], 0.4)

    def other(self) -> PathMeasure:
        return LinearGaussianMeasure.ornstein_uhlenbeck(_t(1.3), 0.3, 0.8)


class TestConditionedExactlyAtTheEnd(PathMeasureSuite):
    def make(self) -> PathMeasure:
        law = LinearGaussianMeasure.brownian(2, initial_mean=_t(0.5, -0.5))
        return law.conditioned(_t(1.0), _t(1.0, 0.0)[None], 0.0)

    def other(self) -> PathMeasure:
        return PinnedProcess(_t(0.5, -0.5), _t(1.0, 0.0), _t(0.1, 0.3))


def test_conditioning_weighs_paths_by_the_density_of_the_data() -> None:
    law = LinearGaussianMeasure.ornstein_uhlenbeck(_t(1.3), 0.3, 0.8)
    ts, y = torch.linspace(0, 2, 9, dtype=F64), _t(1.0, -0.5)[:, None]
    given = law.conditioned(ts[[2, 5]], y, 0.4)
    path = law.sample(ts, 5, 0)
    data = torch.distributions.Normal(path.x[:, [2, 5], 0], 0.4).log_prob(y[:, 0]).sum(-1)
    torch.testing.assert_close(given.log_rn(path, law), data - law.log_evidence(ts[[2, 5]], y, 0.4))


def test_joint_covariance_of_a_conditioned_law_is_that_of_dense_algebra() -> None:
    law = LinearGaussianMeasure.ornstein_uhlenbeck(_t(1.3, 0.2), 0.3, _t(0.8, 2.0))
    ts = torch.linspace(0, 2, 9, dtype=F64)
    emission = torch.tensor([[1.0, 0.5]], dtype=F64)
    given = law.conditioned(ts[[2, 5]], _t(1.0, -0.5)[:, None], 0.4, emission)
    prior = law.joint_covariance(ts)
    lift = torch.zeros(2, 9, 2, dtype=F64)
    lift[[0, 1], [2, 5]] = emission[0]
    lift = lift.reshape(2, 18)
    gain = torch.linalg.solve(lift @ prior @ lift.T + 0.16 * torch.eye(2, dtype=F64), lift @ prior)
    torch.testing.assert_close(given.joint_covariance(ts), prior - (lift @ prior).T @ gain)
    apart = given.joint_covariance(ts[[1, 7]])
    torch.testing.assert_close(apart, given.joint_covariance(ts)[[2, 3, 14, 15]][:, [2, 3, 14, 15]])


@pytest.mark.parametrize("estimator", ["density", "rate", "stl"])
def test_ratios_of_laws_have_the_divergence_as_their_mean(estimator: str) -> None:
    q = LinearGaussianMeasure.ornstein_uhlenbeck(_t(1.3), 0.3, 0.8)
    p = LinearGaussianMeasure.ornstein_uhlenbeck(_t(0.7), -0.2, 0.8)
    ts = torch.linspace(0, 2, 9, dtype=F64)
    values = q.log_rn(q.sample(ts, 4000, 0), p, estimator)
    assert abs(values.mean() - q.kl(p, ts)) <= 5 * values.std() / 4000**0.5


def test_learnt_parameters_are_listed_and_differentiable_at_every_step() -> None:
    rate, diffusion = torch.nn.Parameter(_t(0.5)), torch.nn.Parameter(_t(1.0))
    law = LinearGaussianMeasure.ornstein_uhlenbeck(rate, 0.0, diffusion)
    assert {id(p) for p in law.parameters()} == {id(rate), id(diffusion)}
    ts, y = torch.linspace(0, 2, 9, dtype=F64), torch.ones(9, 1, dtype=F64)
    slopes = []
    for _ in range(2):
        rate.grad = None
        law.log_evidence(ts, y, 0.1).backward()
        slopes.append(rate.grad.clone())  # type: ignore[union-attr]
    assert slopes[0] == slopes[1] != 0


def test_laws_move_with_all_they_hold() -> None:
    laws = [
        LinearGaussianMeasure.ornstein_uhlenbeck(_t(1.0)).float(),
        PinnedProcess(_t(0.0), _t(1.0), 1.3).float(),
        LinearGaussianMeasure.brownian(initial_mean=_t(0.0)).conditioned(_t(1.0), _t(1.0)[None], 0.1).float(),
    ]
    for law in laws:
        assert law.sample(torch.linspace(0, 1, 3), 2, 0).x.dtype == torch.float32
        assert law.mean(torch.linspace(0, 1, 3)).dtype == torch.float32
        assert all(x.device.type == "meta" for x in (*law.to("meta").buffers(), law.like))
