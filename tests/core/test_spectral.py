"""Drifts given by their eigenvalues: spectrum, stationarity, exact evidence, units."""

from __future__ import annotations

import math

import pytest
import torch

import stochdyn as sd
from stochdyn.core import SpectralDrift
from stochdyn.testing import check_device, check_gradients, check_storage, check_units

D = torch.float64


def modes(learn: bool = False) -> SpectralDrift:
    return SpectralDrift(
        decay_rates=torch.tensor([0.5], dtype=D),
        damping=[0.1, 0.3],
        angular_frequencies=[2.0, 5.0],
        learn=learn,
    )


def test_eigenvalues_are_those_of_the_matrix() -> None:
    drift = modes()
    assert drift.dim == 5
    found = torch.linalg.eigvals(drift.matrix())
    for value in drift.eigenvalues():
        assert float((found - value).abs().min()) < 1e-12
    x = torch.randn(7, 5, dtype=D)
    torch.testing.assert_close(drift(torch.zeros(()), x), x @ drift.matrix().mT)


def test_the_law_is_stationary_with_damped_oscillating_correlations() -> None:
    law = modes().law()
    ts = torch.tensor([0.0, 0.7, 1.9], dtype=D)
    torch.testing.assert_close(law.covariance(ts), torch.eye(5, dtype=D).expand(3, 5, 5))
    joint = law.joint_covariance(ts).reshape(3, 5, 3, 5)
    lag = 1.2
    torch.testing.assert_close(joint[1, 0, 2, 0], torch.tensor(math.exp(-0.5 * lag), dtype=D))
    wave = math.exp(-0.1 * lag) * math.cos(2.0 * lag)
    torch.testing.assert_close(joint[1, 1, 2, 1], torch.tensor(wave, dtype=D))


def test_evidence_is_that_of_the_gaussian_process() -> None:
    """With a sum of the modes as the reading, the series is a Gaussian process with a known kernel."""
    times = torch.tensor([0.0, 0.3, 1.1, 1.15, 4.0], dtype=D)
    y = torch.randn(5, 1, dtype=D, generator=torch.Generator().manual_seed(0))
    emission = torch.tensor([[0.7, 0.4, -0.2, 0.1, 0.9]], dtype=D)
    found = modes().law().log_evidence(times, y, 0.2, emission)
    tau = times[:, None] - times[None, :]
    decay = tau.abs()
    kernel = 0.49 * (-0.5 * decay).exp()
    kernel = kernel + 0.2 * (-0.1 * decay).exp() * (2.0 * decay).cos()
    kernel = kernel + 0.82 * (-0.3 * decay).exp() * (5.0 * decay).cos()
    exact = torch.distributions.MultivariateNormal(
        torch.zeros(5, dtype=D), kernel + 0.04 * torch.eye(5, dtype=D)
    )
    torch.testing.assert_close(found, exact.log_prob(y[:, 0]))


def test_units_of_time_and_derivatives() -> None:
    times = torch.tensor([0.0, 0.3, 1.1, 4.0], dtype=D)
    y = torch.ones(4, 1, dtype=D)
    emission = torch.ones(1, 5, dtype=D)

    def answer(unit: float) -> torch.Tensor:
        drift = SpectralDrift(
            decay_rates=torch.tensor([0.5 / unit], dtype=D),
            damping=[0.1 / unit, 0.3 / unit],
            angular_frequencies=[2.0 / unit, 5.0 / unit],
            learn=True,
        )
        evidence = drift.law().log_evidence(unit * times, y, 0.2, emission)
        return torch.cat([evidence.detach()[None], *torch.autograd.grad(evidence, list(drift.parameters()))])

    check_units(answer, rtol=1e-6)
    drift = modes(learn=True)

    def evidence(log_angular_frequencies: torch.Tensor) -> torch.Tensor:
        state = {**dict(drift.named_parameters()), "log_angular_frequencies": log_angular_frequencies}
        return torch.func.functional_call(
            _Evidence(drift, times, y, emission), {f"drift.{k}": v for k, v in state.items()}, ()
        )

    check_gradients(evidence, drift.log_angular_frequencies.detach(), second=False)


class _Evidence(torch.nn.Module):
    def __init__(self, drift: SpectralDrift, *data: torch.Tensor) -> None:
        super().__init__()
        self.drift, self.data = drift, data

    def forward(self) -> torch.Tensor:
        times, y, emission = self.data
        return self.drift.law().log_evidence(times, y, 0.2, emission)


def test_it_is_stored_and_moved_and_drives_an_equation() -> None:
    drift = modes(learn=True)
    check_device(drift)
    check_storage(drift, lambda d: d.matrix())
    sde = sd.SDE(drift, 0.3)
    assert sd.DiffusionMeasure(torch.zeros(5, dtype=D), sde).sample(
        torch.linspace(0, 1, 5, dtype=D), 2, 0
    ).x.shape == (2, 5, 5)


@pytest.mark.parametrize(
    ("rates", "damping", "frequencies", "word"),
    [
        (None, None, None, "mode"),
        ([0.0], None, None, "decay_rates"),
        ([1.0], [1.0], None, "damping"),
        (None, [1.0], [-1.0], "frequencies"),
        ([[1.0]], None, None, "rates"),
        (["a"], None, None, "rates"),
    ],
)
def test_bad_modes_are_named(rates: object, damping: object, frequencies: object, word: str) -> None:
    with pytest.raises(sd.StochdynError, match=word):
        SpectralDrift(rates, damping, frequencies)
