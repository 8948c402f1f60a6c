"""Families: every drift agrees with its features, its Jacobian and its names."""

from __future__ import annotations

import pytest
import torch

import stochdyn as sd
from stochdyn.bridges import DriftFamily, LinearDrift, LinearFamily, LotkaVolterra, SharedFeatures, ZeroDrift


def _families() -> list[DriftFamily]:
    generator = torch.Generator().manual_seed(3)
    made = [LinearDrift(3), LinearDrift(2, shift=False), LotkaVolterra(), ZeroDrift(2)]
    for family in made:
        for value in family.parameters():
            value.data = torch.randn(value.shape, generator=generator)
    return [family.double() for family in made]


@pytest.mark.parametrize("family", _families(), ids=lambda f: type(f).__name__)
class TestEveryFamily:
    def test_points_are_treated_one_by_one_with_time_leading(self, family: DriftFamily) -> None:
        x = torch.randn(4, 5, family.dim, dtype=torch.float64)
        t = torch.linspace(0, 1, 4, dtype=torch.float64)[:, None, None]
        together = family(t, x)
        assert together.shape == x.shape
        torch.testing.assert_close(together[2, 3], family(t[2, 0, 0], x[2, 3]))

    def test_the_jacobian_is_that_of_the_drift(self, family: DriftFamily) -> None:
        x, t = torch.randn(5, family.dim, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
        value, jacobian = family.linearise(t, x)
        default_value, default_jacobian = DriftFamily.linearise(family, t, x)
        torch.testing.assert_close(value, family(t, x))
        torch.testing.assert_close(value, default_value)
        torch.testing.assert_close(jacobian, default_jacobian)

    def test_an_affine_drift_says_so(self, family: DriftFamily) -> None:
        affine = family.affine()
        if affine is None:
            return
        x, t = torch.randn(5, family.dim, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
        matrix, shift = (a.double() for a in affine)
        torch.testing.assert_close(family(t, x), x @ matrix.mT + shift)

    def test_features_times_parameters_are_the_drift(self, family: DriftFamily) -> None:
        x, t = torch.randn(5, family.dim, dtype=torch.float64), torch.tensor(0.3, dtype=torch.float64)
        if isinstance(family, LinearFamily):
            torch.testing.assert_close(
                family.features(t, x) @ family.theta + family.offset(t, x), family(t, x)
            )
        if isinstance(family, SharedFeatures):
            drift = family.regressors(t, x) @ family.weight.mT + family.offset(t, x)
            torch.testing.assert_close(drift, family(t, x))

    def test_reported_values_are_copies(self, family: DriftFamily) -> None:
        x, t = torch.ones(1, family.dim, dtype=torch.float64), torch.tensor(0.0)
        before = family(t, x).detach().clone()
        for value in family.named_values().values():
            assert not value.requires_grad
            value += 1
        torch.testing.assert_close(family(t, x), before)

    def test_a_restart_moves_parameters_and_follows_its_generator(self, family: DriftFamily) -> None:
        before = [p.detach().clone() for p in family.parameters()]
        family.reset(torch.Generator().manual_seed(0))
        moved = [p.detach().clone() for p in family.parameters()]
        assert all(not torch.equal(a, b) for a, b in zip(before, moved, strict=True))


def test_lotka_volterra_has_its_textbook_form() -> None:
    family = LotkaVolterra()
    with torch.no_grad():
        family.theta.copy_(torch.tensor([1.0, 0.4, 0.5, 0.1]))
    drift = family(torch.tensor(0.0), torch.tensor([5.0, 4.0]))
    torch.testing.assert_close(drift, torch.tensor([1.0 * 5 - 0.4 * 20, 0.1 * 20 - 0.5 * 4]))
    assert family.named_values()["gamma"].item() == pytest.approx(0.5)
    with pytest.raises(sd.errors.ShapeError):
        family(torch.tensor(0.0), torch.ones(3))
