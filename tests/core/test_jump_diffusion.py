"""Diffusions with jumps: the exact density of Merton's model by Fourier inversion, simulation, gradients, what is refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Independent, Laplace, MultivariateNormal, Normal

import stochdyn as sd
from stochdyn import testing
from stochdyn.core import JumpDiffusionMeasure
from tests.core.laws import F64, within

RATE, MU, DELTA, SIGMA, DRIFT = 3.0, -0.3, 0.2, 0.25, 0.1


def merton(rate: Any = RATE, unit: float = 1.0, time: float = 1.0, **options: Any) -> JumpDiffusionMeasure:
    """A log price with Gaussian jumps, its lengths and times in other units."""
    sizes = Independent(Normal(torch.tensor([MU * unit], dtype=F64), DELTA * unit), 1)
    sde = sd.SDE(lambda t, x: torch.full_like(x, DRIFT * unit / time), SIGMA * unit / time**0.5)
    rate = rate / time if isinstance(rate, float) else rate
    return JumpDiffusionMeasure(torch.zeros(1, dtype=F64), sde, rate, sizes, **options)


def exact_density(x: Tensor, t: float) -> Tensor:
    """Invert the characteristic function exp(t (i u a - s^2 u^2 / 2 + rate (E e^{i u xi} - 1)))."""
    u = torch.linspace(-150, 150, 60_001, dtype=F64)
    jump = torch.exp(-(DELTA**2) * u**2 / 2) * torch.exp(1j * u * MU)
    log_phi = t * (1j * u * DRIFT - SIGMA**2 * u**2 / 2 + RATE * (jump - 1))
    return torch.trapezoid((torch.exp(log_phi) * torch.exp(-1j * u * x[:, None])).real, u) / (2 * math.pi)


@pytest.mark.parametrize("t", [0.05, 1.0, 4.0])
def test_the_density_of_merton_is_that_of_its_characteristic_function(t: float) -> None:
    x = torch.linspace(-2, 0.8, 15, dtype=F64)
    path = sd.PathSample(
        torch.tensor([0.0, t], dtype=F64), torch.stack([torch.zeros_like(x), x], -1)[..., None]
    )
    found = merton().log_prob(path).exp()
    torch.testing.assert_close(found, exact_density(x, t), rtol=1e-7, atol=1e-9)


def test_far_steps_take_as_many_jumps_as_they_need() -> None:
    """A step of thirty mean jumps, where one expects a tenth: the best number of jumps decides, not the first few."""
    path = sd.PathSample(torch.tensor([0.0, 0.03], dtype=F64), torch.tensor([[[0.0], [30 * MU]]], dtype=F64))
    best = max(
        k * math.log(0.09) - 0.09 - math.lgamma(k + 1)
        + float(Normal(0.003 + k * MU, (SIGMA**2 * 0.03 + k * DELTA**2) ** 0.5).log_prob(torch.tensor(30 * MU)))
        for k in range(60)
    )  # fmt: skip
    assert best < float(merton().log_prob(path)) < best + 3


def test_paths_have_the_law_of_the_density() -> None:
    """States at the end by the distribution function of the exact mixture; jumps by their own law."""
    path = merton().sample(torch.linspace(0, 1, 6, dtype=F64), 4000, 0)
    k = torch.arange(40, dtype=F64)
    weight = torch.distributions.Poisson(RATE).log_prob(k).exp().numpy()

    def cdf(x: Any) -> Any:
        spread = (SIGMA**2 + k.numpy() * DELTA**2) ** 0.5
        return (weight * stats.norm.cdf(x[:, None], DRIFT + k.numpy() * MU, spread)).sum(-1)

    assert stats.kstest(path.x[:, -1, 0].numpy(), cdf).statistic < 1.63 / 4000**0.5
    counts = path.aux["counts"]
    assert within(counts.mean(0), torch.full((5,), RATE / 5, dtype=F64), counts.std(0) / 4000**0.5)
    moved = path.x[:, 1:, 0] - path.x[:, :-1, 0]
    torch.testing.assert_close(moved, DRIFT / 5 + SIGMA * path.dw[..., 0] + path.aux["jumps"][..., 0])


def test_vectors_matrices_and_rates_over_time() -> None:
    """Two components that jump together at a rate that changes: mean and covariance of the increments."""
    sizes = MultivariateNormal(
        torch.tensor([1.0, -0.5], dtype=F64), torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=F64)
    )
    sde = sd.SDE(lambda t, x: torch.zeros_like(x), torch.tensor([[0.3, 0.0], [0.1, 0.2]], dtype=F64))
    law = JumpDiffusionMeasure(torch.zeros(2, dtype=F64), sde, lambda t: 1 + t, sizes)
    ts = torch.linspace(0, 1, 11, dtype=F64)
    x = law.sample(ts, 8000, 0).x[:, -1]
    count = float((0.1 * (1 + ts[:-1])).sum())
    second = sizes.covariance_matrix + sizes.mean[:, None] * sizes.mean
    wanted = count * second + torch.tensor([[0.09, 0.03], [0.03, 0.05]], dtype=F64)
    assert within(x.mean(0), count * sizes.mean, x.std(0) / 8000**0.5)
    assert float((torch.cov(x.mT) / wanted - 1).abs().max()) < 0.12
    assert law.log_prob(law.sample(ts, 3, 0)).shape == (3,)


def test_without_jumps_it_is_the_diffusion() -> None:
    ts = torch.linspace(0, 1, 6, dtype=F64)
    plain = sd.DiffusionMeasure(torch.zeros(1, dtype=F64), merton().sde)
    path = plain.sample(ts, 3, 0)
    torch.testing.assert_close(merton(0.0).log_prob(path), plain.log_prob(path))
    assert torch.equal(merton(0.0).sample(ts, 3, 0).aux["counts"], torch.zeros(3, 5, dtype=F64))


def test_a_batch_of_rates_is_as_each_rate_alone() -> None:
    rates, ts = torch.tensor([0.5, 3.0, 9.0], dtype=F64), torch.linspace(0, 1, 6, dtype=F64)
    one = merton().sample(ts, generator=0)
    alone = torch.stack([merton(float(r)).log_prob(one) for r in rates])
    torch.testing.assert_close(merton(rates).log_prob(one), alone)
    torch.testing.assert_close(
        merton(rates).log_prob(sd.PathSample(ts, one.x.expand(2, 3, 6, 1))), alone.expand(2, 3)
    )
    assert merton(rates).sample(ts, 4, 0).x.shape == (4, 3, 6, 1)


@pytest.mark.parametrize("unit", ["length", "time"])
def test_units_of_jumps(unit: str) -> None:
    def answer(c: float) -> dict[str, Tensor]:
        length, time = (c, 1.0) if unit == "length" else (1.0, c)
        law = merton(RATE, length, time)
        path = law.sample(time * torch.linspace(0, 1, 6, dtype=F64), 3, 0)
        return {"x": path.x / length, "density": law.log_prob(path) + 5 * math.log(length)}

    testing.check_units(answer)


def test_company_and_gradients_of_the_density() -> None:
    ts = torch.linspace(0, 1, 4, dtype=F64)
    testing.check_company(
        lambda x: merton().log_prob(sd.PathSample(ts, x)),
        torch.tensor([[0.0], [0.1], [-0.5], [0.2]], dtype=F64),
        factors=(0.0, 1.0, 10.0),
    )
    seen = merton().sample(ts, 2, 0)

    def value(rate: Tensor, mean: Tensor, scale: Tensor, strength: Tensor) -> Tensor:
        sizes = Independent(Normal(mean.reshape(1), scale.reshape(1)), 1)
        law = JumpDiffusionMeasure(
            torch.zeros(1, dtype=F64), sd.SDE(lambda t, x: -x, sd.Scalar(strength)), rate, sizes
        )
        return law.log_prob(sd.PathSample(ts, seen.x))

    numbers = [torch.tensor(v, dtype=F64) for v in (RATE, MU, DELTA, SIGMA)]
    testing.check_gradients(value, *numbers)


def test_maximum_likelihood_finds_the_rate_of_jumps() -> None:
    """From daily states alone: the estimate lies within four of its own standard errors."""
    path = merton().sample(torch.linspace(0, 20, 2001, dtype=F64), generator=0)
    seen = sd.PathSample(path.ts, path.x)
    rate = torch.tensor(math.log(1.0), dtype=F64, requires_grad=True)
    for _ in range(12):
        loss = -merton(rate.exp()).log_prob(seen)
        (slope,) = torch.autograd.grad(loss, rate, create_graph=True)
        (curvature,) = torch.autograd.grad(slope, rate)
        step = slope.detach() / curvature.abs()
        rate = (rate.detach() - step.clamp(-1, 1)).requires_grad_()
    assert abs(float(step)) < 1e-6
    assert abs(float(rate.detach()) - math.log(RATE)) < 4 / float(curvature) ** 0.5


SIZES = Independent(Normal(torch.zeros(1), 1.0), 1)


def jumping(rates: Any, jumps: Any) -> JumpDiffusionMeasure:
    return JumpDiffusionMeasure(torch.zeros(1), sd.SDE(lambda t, x: x, 1.0), rates, jumps)


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: merton(-1.0), sd.errors.InvalidInputError, "rates"),
        (
            lambda: jumping(1.0, Independent(Normal(torch.zeros(3), 1.0), 1)),
            sd.errors.ShapeError,
            "sizes of jumps",
        ),
        (lambda: jumping(1.0, "normal"), sd.errors.InvalidInputError, "jumps"),
        (
            lambda: jumping(lambda t: torch.ones(()), SIZES).sample([0.0, 1.0]),
            sd.errors.ShapeError,
            "one row per time",
        ),
    ],
)
def test_bad_jumps_are_refused(build: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()


def test_other_sizes_are_drawn_but_have_no_density() -> None:
    sizes = Independent(Laplace(torch.zeros(1, dtype=F64), 0.5), 1)
    law = JumpDiffusionMeasure(torch.zeros(1, dtype=F64), merton().sde, 5.0, sizes)
    path = law.sample(torch.linspace(0, 1, 6, dtype=F64), 4000, 0)
    end = path.x[:, -1, 0] - DRIFT
    assert within(
        end.square().mean(), torch.tensor(SIGMA**2 + 5 * 0.5, dtype=F64), end.square().std() / 4000**0.5
    )
    with pytest.raises(sd.errors.UnavailableError, match="Gaussian sizes"):
        law.log_prob(path)
