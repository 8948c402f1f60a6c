"""Paths keep their increments and know where they come from."""

from __future__ import annotations

import torch

import stochdyn as sd
from tests.core.laws import F64, ExactMemory


def test_axes_and_what_a_path_carries() -> None:
    sde = sd.SDE(lambda t, x: -x, torch.ones(2, 3, dtype=F64), ExactMemory([0.5, 3.0], [0.7, 0.2]))
    law = sd.DiffusionMeasure(torch.zeros(4, 2, dtype=F64), sde).controlled(
        lambda t, z: z[..., :3], lambda t, z: z[..., :3] ** 2
    )
    path = law.sample(torch.linspace(0, 1, 6, dtype=F64), (5,))
    assert path.shape == (5, 4)
    assert path.x.shape == (5, 4, 6, 2)
    assert path.dw.shape == (5, 4, 5, 3)
    assert {name: tuple(value.shape) for name, value in path.aux.items()} == {
        "memory": (5, 4, 6, 3, 2),
        "residual": (5, 4, 5, 6),
        "control": (5, 4, 5, 3),
        "precision": (5, 4, 5, 3),
    }
    assert path.law is law
    torch.testing.assert_close(path.leading().movedim(0, -2), path.x)
    assert law.full_state(path).shape == (6, 5, 4, 2 + 3 * 2)


def test_increments_drive_the_same_path_again() -> None:
    law = sd.DiffusionMeasure(torch.ones(2, dtype=F64), sd.SDE(lambda t, x: -x, lambda t, x: 1 + x**2))
    path = law.sample(torch.linspace(0, 1, 6, dtype=F64), (3,))
    again = law.drive(path.ts, path.x[:, 0], path.dw.movedim(-2, 0))
    assert torch.equal(again.x, path.x)


def test_detached_paths_have_no_graph() -> None:
    rate = torch.tensor(1.0, requires_grad=True)
    law = sd.DiffusionMeasure(torch.ones(1), sd.SDE(lambda t, x: -x, 1.0)).controlled(lambda t, x: rate * x)
    path = law.sample(torch.linspace(0, 1, 4), (2,))
    assert path.x.requires_grad
    cut = path.detach()
    assert not any(t.requires_grad for t in (cut.x, cut.dw, *cut.aux.values()))
    assert cut.law is law


def test_an_estimate_is_mean_and_standard_error() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 2.0], [5.0, 2.0]], dtype=F64)
    estimate = sd.Estimate.of(values)
    assert estimate.mean.tolist() == [3.0, 2.0]
    torch.testing.assert_close(estimate.stderr, torch.tensor([2 / 3**0.5, 0.0], dtype=F64))
    assert str(sd.Estimate(torch.tensor(1.5), torch.tensor(0.25))) == "1.5 ± 0.25"
