"""Exact steps of linear equations: very many at once are what each is alone, stiff ones and their derivatives too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stochdyn.core.gaussian import constant_steps, constant_transition
from stochdyn.testing import check_gradients

F64 = torch.float64


@pytest.fixture(autouse=True)
def _many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any number of steps over the base counts as very many."""
    monkeypatch.setattr(constant_steps, "_MANY", 0)


def _law(*batch: int, dim: int, rate: float) -> tuple[Tensor, Tensor, Tensor]:
    source = torch.Generator().manual_seed(0)
    a, b, g = (torch.randn(*batch, dim, n, generator=source, dtype=F64) for n in (dim, 1, dim))
    stable = a - a.mT - 0.1 * a @ a.mT - torch.eye(dim, dtype=F64)
    return rate * stable, b.squeeze(-1), g @ g.mT


@pytest.mark.parametrize("rate", [0.01, 1.0, 1e6])
@pytest.mark.parametrize(
    ("batch", "series", "dim"), [((), (), 2), ((), (3,), 2), ((4, 3), (3,), 3), ((3,), (3,), 5)]
)
def test_very_many_steps_are_what_each_is_alone(
    batch: tuple[int, ...], series: tuple[int, ...], dim: int, rate: float
) -> None:
    a, b, s = _law(*batch, dim=dim, rate=rate)
    dt = torch.rand(18, *series, generator=torch.Generator().manual_seed(1), dtype=F64)
    dt[0] = 0.0
    together = constant_transition(a, b, s, dt, F64)
    each = [constant_transition(a, b, s, step[None], F64) for step in dt]
    for name, got, want in zip(["phi", "c", "q"], together, zip(*each, strict=True), strict=True):
        alone = torch.cat(want)
        scale = 1.0 if name == "phi" else float(alone.abs().max())
        assert got.shape == alone.shape
        torch.testing.assert_close(got, alone, rtol=1e-11, atol=4e-15 * scale)


def test_speeds_of_twelve_orders_of_magnitude_keep_full_accuracy() -> None:
    """Entry ij of the covariance of states that one Brownian motion drives is (1 - exp(-(g_i + g_j) t)) / (g_i + g_j)."""
    g = torch.tensor([1e-8, 1e-3, 1.0, 1e4], dtype=F64)
    dt = torch.logspace(-5, 4, 40, dtype=F64)
    q = constant_transition(torch.diag(-g), torch.zeros(4, dtype=F64), torch.ones(4, 4, dtype=F64), dt, F64)[
        2
    ]
    pair = g[:, None] + g
    expected = -torch.expm1(-pair * dt[:, None, None]) / pair
    assert float(((q - expected) / expected).abs().max()) < 1e-13
    assert bool((q == q.mT).all())


@pytest.mark.parametrize("learn_times", [False, True])
def test_very_many_steps_have_first_and_second_derivatives(learn_times: bool) -> None:
    a, b, s = _law(2, dim=2, rate=3.0)
    dt = torch.rand(17, 2, generator=torch.Generator().manual_seed(2), dtype=F64) + 0.1
    weights = torch.randn(17 * 2 * 10, generator=torch.Generator().manual_seed(3), dtype=F64)

    def moments(factors: Tensor) -> Tensor:
        own = dt * factors[3] if learn_times else dt
        parts = constant_transition(factors[0] * a, factors[1] * b, factors[2] * s, own, F64)
        return weights @ torch.cat([x.flatten() for x in parts])

    check_gradients(moments, torch.tensor([1.1, 0.7, 1.3, 0.9], dtype=F64)[: 3 + learn_times])


def test_a_matrix_that_is_no_number_gives_steps_that_are_none() -> None:
    a, b, s = _law(dim=2, rate=1.0)
    assert bool(
        torch.isnan(constant_transition(a * torch.nan, b, s, torch.rand(20, dtype=F64), F64)[0]).all()
    )
