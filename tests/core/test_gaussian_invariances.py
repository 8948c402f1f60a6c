"""What answers of Gaussian laws don't depend on: units, company, question, precision, device, storage, form of data."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from stochdyn import testing
from stochdyn.core import (
    EndPotential,
    GaussianPathMeasure,
    LinearGaussianMeasure,
    PathSample,
    PinnedProcess,
    TiltedMeasure,
)
from stochdyn.fractional import FractionalOU

F64 = torch.float64
TS = torch.tensor([0.0, 0.1, 0.35, 0.6, 0.9, 1.0], dtype=F64)
SEEN = torch.tensor([0.2, 0.5, 0.8], dtype=F64)
Y = torch.tensor([[0.3, -0.1], [0.4, 0.6], [-0.5, 0.2]], dtype=F64)


def _rates(dtype: torch.dtype) -> Tensor:
    return torch.tensor([[-1.0, 0.7], [-0.5, -0.3]], dtype=dtype)


def constant(dtype: torch.dtype = F64, length: float = 1.0, time: float = 1.0) -> LinearGaussianMeasure:
    return LinearGaussianMeasure(
        _rates(dtype) / time,
        length * torch.tensor([0.2, 0.1], dtype=dtype) / time,
        length * torch.tensor([[0.5, 0.1], [0.0, 0.8]], dtype=dtype) / time**0.5,
        length * torch.tensor([1.0, -1.0], dtype=dtype),
        length**2 * 0.3 * torch.eye(2, dtype=dtype),
    )


def varying(dtype: torch.dtype = F64, length: float = 1.0, time: float = 1.0) -> LinearGaussianMeasure:
    def season(t: Tensor) -> Tensor:
        return torch.cos(9 * t / time)[:, None, None]

    noise = length * torch.tensor([[0.5, 0.1], [0.0, 0.8]], dtype=dtype) / time**0.5
    return LinearGaussianMeasure(
        lambda t: _rates(t.dtype) * (1 + 0.5 * season(t)) / time,
        lambda t: length * torch.tensor([0.2, 0.1], dtype=t.dtype) * season(t)[..., 0] / time,
        lambda t: noise.to(t.dtype) * (1 + 0.3 * season(t)),
        length * torch.tensor([1.0, -1.0], dtype=dtype),
        length**2 * 0.3 * torch.eye(2, dtype=dtype),
    )


def pinned(dtype: torch.dtype = F64, length: float = 1.0, time: float = 1.0) -> PinnedProcess:
    start, end = (length * torch.tensor(v, dtype=dtype) for v in ([0.0, 0.5], [1.0, -0.5]))
    return PinnedProcess(start, end, 1.3 / time, 0.2 * length, 0.7 * length / time**0.5, end_time=1.1 * time)


def tilted(dtype: torch.dtype = F64, length: float = 1.0, time: float = 1.0) -> TiltedMeasure:
    law = constant(dtype, length, time)
    precision = torch.tensor([[2.0, 0.3], [0.3, 0.5]], dtype=dtype) / length**2
    potential = EndPotential.information(precision, torch.tensor([1.0, -0.5], dtype=dtype) / length)
    return TiltedMeasure(law, 1.1 * time, potential, law.initial_mean, law.initial_cov)


def given(dtype: torch.dtype = F64, length: float = 1.0, time: float = 1.0) -> GaussianPathMeasure:
    return constant(dtype, length, time).conditioned(SEEN * time, length * Y.to(dtype), 0.2 * length)


LAWS: dict[str, Callable[..., Any]] = {
    "constant": constant, "varying": varying, "pinned": pinned, "tilted": tilted, "conditioned": given,
}  # fmt: skip


@pytest.mark.parametrize("unit", ["length", "time"])
@pytest.mark.parametrize("name", LAWS)
def test_units(name: str, unit: str) -> None:
    def answer(factor: float) -> dict[str, Tensor]:
        length, time = (factor, 1.0) if unit == "length" else (1.0, factor)
        law = LAWS[name](F64, length, time)
        path = law.sample(TS * time, 3, 0)
        out = {
            "mean": law.mean(TS * time) / length,
            "covariance": law.covariance(TS * time) / length**2,
            "joint": law.joint_covariance(TS * time) / length**2,
            "x": path.x / length,
            "drift": law.drift(0.3 * time, path.x[:, 2]) * time / length,
            "density": law.log_prob(path).diff(),
        }
        if name in ("constant", "varying"):
            seen = SEEN * time, length * Y, 0.2 * length
            out["evidence"] = law.log_evidence(*seen) + Y.numel() * torch.tensor(length, dtype=F64).log()
            out["kl"] = law.path_kl(law, TS * time)
        return out

    testing.check_units(answer)


@pytest.mark.parametrize("kind", ["constant", "varying"])
@pytest.mark.parametrize("single", [True, False], ids=["fixed-beside-random-starts", "random-starts"])
def test_company(kind: str, single: bool) -> None:
    """A member's answers beside members of lengths a million times larger or smaller, also where only one start is fixed."""

    def answer(size: Tensor) -> dict[str, Tensor]:
        cov = 0.3 * size.square()[..., None]
        if single:
            cov = cov * (size == 1)[..., None]

        def noise(t: Tensor) -> Tensor:
            return (1 + 0.5 * torch.sin(9 * t))[:, None, None, None] * size[..., None]

        rate = torch.full((len(size), 1, 1), -1.3, dtype=F64)
        diffusion = size[..., None] if kind == "constant" else noise
        law = LinearGaussianMeasure(rate, 0.2 * size, diffusion, size, cov)
        other = LinearGaussianMeasure(0.7 * rate, 0.1 * size, diffusion, size, cov)
        unit = torch.tensor([0.3, -0.2, 0.5], dtype=F64)[:, None]
        path = PathSample.of_states(TS, size[:, None] * torch.linspace(1, 0.5, 6, dtype=F64)[:, None])
        return {
            "covariance": law.covariance(TS),
            "evidence": law.log_evidence(SEEN, size[:, None] * unit, 0.1 * size[:, None]),
            "posterior": law.posterior(SEEN, size[:, None] * unit, 0.1 * size[:, None], TS).mean,
            "density": law.log_prob(path),
            "ratio": law.log_rn(path, other),
            "kl": law.kl(other, TS),
            "path_kl": law.path_kl(other, TS),
        }

    testing.check_company(answer, torch.ones(1, dtype=F64))


@pytest.mark.parametrize("name", LAWS)
def test_question(name: str) -> None:
    law = LAWS[name]()
    testing.check_question(lambda ts: {"mean": law.mean(ts), "covariance": law.covariance(ts)}, TS)


@pytest.mark.parametrize("name", LAWS)
def test_precision_device_and_storage(name: str) -> None:
    def answer(dtype: torch.dtype) -> dict[str, Tensor]:
        law = LAWS[name](dtype)
        return {"mean": law.mean(TS), "covariance": law.covariance(TS), "joint": law.joint_covariance(TS)}

    testing.check_precision(answer, rtol=1e-3)
    law = LAWS[name]()
    testing.check_storage(law, lambda law: law.sample(TS, 2, 0).x, pickles=name != "varying")
    if name != "varying":
        testing.check_device(law)


def test_forms_of_data() -> None:
    law = constant()
    testing.check_forms(lambda ts: law.log_evidence(ts, Y, 0.2), SEEN)
    testing.check_forms(lambda y: law.log_evidence(SEEN, y, 0.2), Y)
    testing.check_forms(lambda s: law.log_evidence(SEEN, Y, s), torch.tensor([0.1, 0.3], dtype=F64))


@pytest.mark.parametrize("count", [5, 40], ids=["walked", "scanned"])
def test_gradients_and_second_derivatives_in_parameters_times_and_data(count: int) -> None:
    times = torch.linspace(0.1, 1.9, count, dtype=F64)
    g = torch.Generator().manual_seed(0)
    y = torch.randn(count, 1, dtype=F64, generator=g)

    def evidence(rate: Tensor, diffusion: Tensor, clock: Tensor) -> Tensor:
        law = LinearGaussianMeasure.ornstein_uhlenbeck(rate, 0.1, diffusion, initial_mean=diffusion)
        return law.log_evidence(times * clock, y * clock, 0.3)

    inputs = [torch.tensor([v], dtype=F64) for v in (0.7, 0.9, 1.1)]
    testing.check_gradients(evidence, *inputs)

    def moments(rate: Tensor, clock: Tensor) -> Tensor:
        law = LinearGaussianMeasure.ornstein_uhlenbeck(rate, 0.1, 0.8, initial_mean=rate)
        seen = law.conditioned(times[::2] * clock, y[::2], 0.3)
        return torch.cat(
            [seen.mean(times * clock).flatten()[:3], law.covariance(times * clock).flatten()[-2:]]
        )

    testing.check_gradients(moments, inputs[0], inputs[2])


def test_gradients_of_a_fractional_process_in_its_times() -> None:
    times, y = torch.tensor([0.3, 0.8, 1.7], dtype=F64), torch.tensor([0.3, -0.2, 0.5], dtype=F64)

    def evidence(clock: Tensor) -> Tensor:
        return FractionalOU(0.7, 0.1, 0.9, 0.7).log_evidence(times * clock, y, 0.2)

    testing.check_gradients(evidence, torch.tensor(1.1, dtype=F64), second=False)


def test_times_close_together_beside_far_ones_keep_their_own_lengths() -> None:
    law = LinearGaussianMeasure.brownian(initial_mean=torch.zeros(1, dtype=F64))
    ts = torch.tensor([1e-12, 2e-12, 3.3e-12, 1.0, 1e3], dtype=F64)
    torch.testing.assert_close(law.covariance(ts)[:, 0, 0], ts, rtol=1e-12, atol=0)


def test_components_of_any_size_are_drawn() -> None:
    """A component whose spread is 1e-12 of another's keeps its noise, its density and its divergence."""
    size = torch.tensor([1.0, 1e-12], dtype=F64)
    law = LinearGaussianMeasure.ornstein_uhlenbeck(torch.ones(2, dtype=F64), 0.0, size)
    other = LinearGaussianMeasure.ornstein_uhlenbeck(2 * torch.ones(2, dtype=F64), 0.0, size)
    path = law.sample(TS, 4000, 0)
    spread = path.x[:, -1].std(0) / size
    assert ((spread / 0.5**0.5 - 1).abs() < 5 / (2 * 4000) ** 0.5).all()
    assert torch.isfinite(law.log_prob(path)).all()
    one = LinearGaussianMeasure.ornstein_uhlenbeck(torch.ones(1, dtype=F64))
    two = LinearGaussianMeasure.ornstein_uhlenbeck(2 * torch.ones(1, dtype=F64))
    torch.testing.assert_close(law.path_kl(other, TS), 2 * one.path_kl(two, TS))


def test_a_pulse_between_the_times_asked_for_is_seen() -> None:
    def pulse(t: Tensor) -> Tensor:
        return torch.exp(-0.5 * ((t - 0.37) / 0.02) ** 2)[:, None]

    law = LinearGaussianMeasure(torch.zeros(1, 1, dtype=F64), pulse, 0.1, torch.zeros(1, dtype=F64))
    fine = law.mean(torch.linspace(0, 1, 101, dtype=F64))[-1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(law.mean(torch.tensor([0.0, 1.0], dtype=F64))[-1], fine, rtol=1e-8, atol=0)
