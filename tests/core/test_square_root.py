"""The square-root process has the exact law of continuous time, near zero too."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.core import SquareRootProcess
from stochdyn.core.law.noncentral import _mixture, _uniform, noncentral_chi2_log_density
from stochdyn.errors import InvalidInputError, ShapeError, TimeGridError
from stochdyn.testing import check_gradients, check_precision, check_storage, check_units

F64 = torch.float64
RATE, MEAN = 2.0, 1.0


def law(strength: float = 2.0, start: float | None = 0.3, dtype: torch.dtype = F64) -> SquareRootProcess:
    initial = None if start is None else torch.tensor([start], dtype=dtype)
    return SquareRootProcess(torch.tensor(RATE, dtype=dtype), MEAN, strength, initial)


def exact(strength: float, start: float, t: float) -> scipy.stats.rv_continuous:
    """Return the law at a time, from SciPy."""
    c = strength**2 / (4 * RATE) * -math.expm1(-RATE * t)
    degrees = 4 * RATE * MEAN / strength**2
    return scipy.stats.ncx2(degrees, start * math.exp(-RATE * t) / c, scale=c)


# 2 k m / s^2 from 4, where zero is far away, to 0.5 and 0.1, where paths touch it
STRENGTHS = [1.0, 8**0.5, 40**0.5]


@pytest.mark.parametrize("strength", STRENGTHS)
def test_paths_have_the_law_of_continuous_time_on_every_grid(strength: float) -> None:
    """By Kolmogorov's test: a false alarm in a thousand."""
    for ts in ([0.0, 1.0], [0.0, 0.01, 0.3, 1.0]):
        x = law(strength).sample(ts, 20_000, generator=1).x
        assert bool((x >= 0).all())
        assert scipy.stats.kstest(x[:, -1, 0].numpy(), exact(strength, 0.3, 1.0).cdf).pvalue > 1e-3


@pytest.mark.parametrize("strength", STRENGTHS)
def test_densities_are_those_of_scipy(strength: float) -> None:
    for t in (0.1, 1.0):
        want = exact(strength, 0.3, t)
        y = torch.tensor(want.ppf(np.linspace(0.2, 0.999, 9)), dtype=F64)
        found = law(strength).marginal(t).log_prob(y[:, None])
        np.testing.assert_allclose(found, want.logpdf(y.numpy()), rtol=1e-8, atol=1e-8)
        assert float(law(strength).marginal(t).mean) == pytest.approx(want.mean())
        assert float(law(strength).marginal(t).covariance) == pytest.approx(want.var())


def test_both_ways_to_the_density_agree_where_both_hold() -> None:
    """The uniform expansion and the sum over Poisson counts, where the square of order and argument is between 30 and 40."""
    degrees = torch.tensor([0.1, 1.0, 2.0, 9.0, 50.0], dtype=F64)
    a = 0.5 * degrees - 1
    for radius in (30.0, 40.0):
        z = (radius**2 - a.square()).sqrt()
        for ratio in (0.3, 1.0, 2.0):
            u, lam = z * ratio, z / ratio
            torch.testing.assert_close(_uniform(u, lam, a), _mixture(u, lam, a), rtol=0, atol=1e-11)


@pytest.mark.parametrize("degrees", [0.1, 1.0, 3.0, 70.0])
def test_densities_hold_in_all_ranges(degrees: float) -> None:
    for noncentrality in (0.0, 1e-3, 5.0, 899.0, 901.0, 1e5):
        known = scipy.stats.ncx2(degrees, noncentrality) if noncentrality else scipy.stats.chi2(degrees)
        u = torch.tensor(known.mean() + known.std() * np.linspace(-2, 3, 6), dtype=F64)
        u = u[u > 0]
        found = noncentral_chi2_log_density(
            u, *(torch.tensor(v, dtype=F64) for v in (degrees, noncentrality))
        )
        np.testing.assert_allclose(found, known.logpdf(u.numpy()), rtol=1e-8, atol=1e-8)


def test_densities_of_paths_are_products_of_transitions_on_grids_of_their_own() -> None:
    batch = SquareRootProcess(
        torch.tensor([[2.0, 1.0], [0.5, 3.0], [1.0, 1.0]], dtype=F64), 1.0, 0.8, torch.ones(2, dtype=F64)
    )
    ts = torch.tensor([[0.0, 0.2, 1.0], [0.0, 0.5, 0.6], [0.1, 0.5, 0.6]], dtype=F64)
    path = batch.sample(ts, 4, generator=0)
    assert path.x.shape == (4, 3, 3, 2)
    found = batch.log_prob(path)
    for k in range(3):
        alone = SquareRootProcess(batch.rate[k], 1.0, 0.8, torch.ones(2, dtype=F64))
        one = sd.core.PathSample.of_states(ts[k], path.x[:, k])
        torch.testing.assert_close(found[:, k], alone.log_prob(one))
    assert batch.random_points(ts)[0].tolist() == [False, False, True]


def test_the_stationary_law_stays() -> None:
    still = law(1.5, None)
    gamma = scipy.stats.gamma(2 * RATE * MEAN / 1.5**2, scale=1.5**2 / (2 * RATE))
    x = still.sample([0.0, 0.2, 3.0], 20_000, generator=3).x
    for k in range(3):
        assert scipy.stats.kstest(x[:, k, 0].numpy(), gamma.cdf).pvalue > 1e-3
    assert float(still.marginal(2.0).mean) == pytest.approx(gamma.mean())
    assert float(still.marginal(2.0).covariance) == pytest.approx(gamma.var())
    y = torch.tensor([[0.2], [1.4]], dtype=F64)
    np.testing.assert_allclose(still.marginal(0.3).log_prob(y), gamma.logpdf(y[:, 0].numpy()))


def test_gradients_in_all_parameters_agree_with_differences() -> None:
    ts = torch.tensor([0.0, 0.01, 0.8], dtype=F64)
    path = sd.core.PathSample.of_states(ts, torch.tensor([[0.3], [0.35], [1.2]], dtype=F64))

    def density(rate: Tensor, mean: Tensor, strength: Tensor, start: Tensor) -> Tensor:
        late = sd.core.PathSample.of_states(ts + 0.5, path.x)
        return SquareRootProcess(rate, mean, strength, start).log_prob(late)

    check_gradients(density, *(torch.tensor(v, dtype=F64) for v in (2.0, 1.0, 0.9, [0.4])))


def test_units_precision_and_storage() -> None:
    ts = torch.tensor([0.0, 0.3, 1.0], dtype=F64)
    x = torch.tensor([[0.3], [0.7], [0.2]], dtype=F64)

    def density(length: float, clock: float = 1.0, dtype: torch.dtype = F64) -> Tensor:
        strength = torch.tensor(2.0 * length**0.5 / clock**0.5, dtype=dtype)
        unit = SquareRootProcess(
            RATE / clock, MEAN * length, strength, torch.tensor([0.3 * length], dtype=dtype)
        )
        path = sd.core.PathSample.of_states((ts * clock).to(dtype), (x * length).to(dtype))
        return unit.log_prob(path) + 2 * math.log(length)

    check_units(density)
    check_units(lambda clock: density(1.0, clock))
    check_precision(lambda dtype: density(1.0, dtype=dtype), rtol=1e-4)
    check_storage(law(), lambda it: it.sample([0.0, 0.5], 3, 0).x)


def test_states_below_zero_are_impossible_and_the_equation_fits() -> None:
    one = law()
    below = sd.core.PathSample.of_states(
        torch.tensor([0.0, 1.0], dtype=F64), torch.tensor([[0.3], [-0.1]], dtype=F64)
    )
    assert float(one.log_prob(below)) == -math.inf
    x = torch.tensor([[0.5], [-0.1]], dtype=F64)
    torch.testing.assert_close(one.to_sde().drift(torch.zeros(()), x), one.drift(0.0, x))
    assert one.to_sde().diffusion(torch.zeros(()), x).value[:, 0].tolist() == [2.0 * 0.5**0.5, 0.0]


def test_wrong_arguments_are_told_by_name() -> None:
    with pytest.raises(InvalidInputError, match="rate"):
        SquareRootProcess(-1.0, 1.0, 1.0)
    with pytest.raises(InvalidInputError, match="mean"):
        SquareRootProcess(1.0, None, 1.0)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="initial"):
        SquareRootProcess(1.0, 1.0, 1.0, torch.tensor([-0.1]))
    with pytest.raises(ShapeError, match="fit"):
        SquareRootProcess(torch.ones(3), 1.0, 1.0, torch.ones(2))
    with pytest.raises(TimeGridError, match="before"):
        SquareRootProcess(1.0, 1.0, 1.0, torch.ones(1), initial_time=1.0).sample([0.0, 1.0])
