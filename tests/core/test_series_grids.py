"""Series with times of their own: every answer of a linear law is that of each series alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stochdyn.core import LinearGaussianMeasure
from stochdyn.errors import TimeGridError

F64 = torch.float64
TIMES = torch.tensor([[0.1, 0.5, 1.2, 2.0], [0.3, 0.4, 0.9, 1.1], [0.2, 1.0, 3.0, 5.0]], dtype=F64)
TS = torch.tensor([0.05, 0.4, 1.7], dtype=F64)
Y = torch.randn(3, 4, 1, dtype=F64, generator=torch.Generator().manual_seed(0))


def _law(kind: str, series: int | None = None) -> LinearGaussianMeasure:
    rates = torch.tensor([[0.5], [1.0], [2.0]], dtype=F64)
    rates = rates if series is None else rates[series]

    def season(t: Tensor) -> Tensor:
        return (1 + 0.5 * torch.sin(3 * t)).reshape(-1, *(1,) * (rates.ndim + 1))

    if kind == "constant":
        return LinearGaussianMeasure.ornstein_uhlenbeck(rates, 0.3, 0.8, initial_mean=0.1 + 0 * rates)
    if kind == "one law":
        return LinearGaussianMeasure.ornstein_uhlenbeck(1.3 * torch.ones(1, dtype=F64), 0.3, 0.8)
    return LinearGaussianMeasure(
        lambda t: -rates[..., None] * season(t),
        0.3 * rates,
        lambda t: 0.8 * season(t) + 0 * rates[..., None],
        0.1 + 0 * rates,
    )


@pytest.mark.parametrize("kind", ["constant", "one law", "varying"])
def test_every_series_alone(kind: str) -> None:
    y = Y.clone()
    y[2, 3] = torch.nan  # a short series, filled up
    law = _law(kind)
    evidence, posterior = law.log_evidence(TIMES, y, 0.2), law.posterior(TIMES, y, 0.2)
    ahead = law.posterior(TIMES, y, 0.2, TS)
    path = law.sample(TIMES, 5, 0)
    density, joint = law.log_prob(path), law.joint_covariance(TIMES)
    given = posterior.law.joint_covariance(TS)
    assert path.x.shape == posterior.law.sample(TIMES, 5, 0).x.shape == (5, 3, 4, 1)
    for k in range(3):
        alone = _law(kind, k)
        seen = TIMES[k], y[k], 0.2
        torch.testing.assert_close(evidence[k], alone.log_evidence(*seen))
        torch.testing.assert_close(posterior.mean[k], alone.posterior(*seen).mean)
        torch.testing.assert_close(ahead.mean[k], alone.posterior(*seen, TS).mean)
        torch.testing.assert_close(ahead.covariance[k], alone.posterior(*seen, TS).covariance)
        torch.testing.assert_close(given[k], alone.conditioned(*seen).joint_covariance(TS))
        torch.testing.assert_close(law.mean(TIMES)[k], alone.mean(TIMES[k]))
        torch.testing.assert_close(joint[k], alone.joint_covariance(TIMES[k]))
        part = type(path)(TIMES[k], path.x[:, k], path.dw[:, k])
        torch.testing.assert_close(density[:, k], alone.log_prob(part))


def test_posterior_draws_of_series_have_its_moments() -> None:
    law = _law("constant").conditioned(TIMES, Y, 0.2)
    x = law.sample(TS, 4000, 0).x
    mean, variance = law.mean(TS), law.covariance(TS)[..., 0]
    assert ((x.mean(0) - mean).abs() <= 5 * (variance / 4000).sqrt()).all()
    assert ((x.var(0) / variance - 1).abs() <= 5 * (2 / 4000) ** 0.5).all()


def test_grids_that_decrease_in_one_series_are_refused() -> None:
    with pytest.raises(TimeGridError, match="times must increase"):
        _law("constant").log_evidence(TIMES.flip(-1), Y, 0.2)


def test_a_batch_of_readings_beside_series_on_their_own_grids() -> None:
    # Draws of an error or of an emission, all of the same series: axes that only the observation law has.
    errors = torch.tensor([0.1, 0.4], dtype=F64).reshape(2, 1, 1, 1)
    emission = torch.tensor([1.0, 0.5], dtype=F64).reshape(2, 1, 1, 1, 1).expand(2, 1, 4, 1, 1)
    both = _law("constant").conditioned(TIMES, Y, errors, emission)
    assert both.sample(TS, 5, 0).x.shape == (5, 2, 3, 3, 1)
    for k in range(2):
        alone = _law("constant").conditioned(TIMES, Y, errors[k], emission[k])
        torch.testing.assert_close(both.mean(TS)[k], alone.mean(TS))
        torch.testing.assert_close(both.covariance(TS)[k], alone.covariance(TS))
