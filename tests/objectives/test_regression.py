"""Regression on targets: its minimiser is the conditional mean, its excess the squared error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.objectives import Objective, Regression
from stochdyn.testing import ObjectiveSuite

F64 = torch.float64


class Line(nn.Module):
    """A field linear in time and state."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.1, dtype=F64))
        self.b = nn.Parameter(torch.tensor(0.2, dtype=F64))

    def forward(self, t, x):
        return self.a * x + self.b * t


def batch(n: int = 50):
    t, x = torch.rand(n, 1, dtype=F64), torch.randn(n, 2, dtype=F64)
    return t, x, 3 * x - 2 * t + 0.1 * torch.randn(n, 2, dtype=F64)


class TestRegression(ObjectiveSuite):
    """The contract, with a weight."""

    def make(self) -> tuple[Objective, Any]:
        """Return a weighted regression."""
        torch.manual_seed(0)
        return Regression(Line(), weight=lambda t, x: 1 + t), batch()


def test_minimiser_is_weighted_least_squares() -> None:
    t, x, y = batch(200)
    objective = Regression(Line(), weight=lambda t, x: (1 + t).squeeze(-1))
    optimiser = torch.optim.LBFGS(
        objective.parameters(),
        max_iter=100,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimiser.zero_grad()
        loss = objective((t, x, y)).loss
        loss.backward()
        return loss

    optimiser.step(closure)
    root = (1 + t).sqrt()
    design = torch.stack([(root * x).flatten(), (root * t).expand(200, 2).flatten()], -1)
    truth = torch.linalg.lstsq(design, (root * y).flatten()[:, None]).solution[:, 0]
    found = torch.stack([objective.field.a, objective.field.b]).detach()
    torch.testing.assert_close(found, truth, rtol=1e-6, atol=1e-6)


def test_loss_exceeds_the_error_of_the_field_by_the_noise() -> None:
    n = 20_000
    t, x = torch.zeros(n, 1, dtype=F64), torch.randn(n, 2, dtype=F64)
    y = x + torch.randn(n, 2, dtype=F64)
    loss = Regression(lambda t, x: 1.5 * x)((t, x, y)).loss
    # E |0.5 x - noise|^2 = 0.25 * 2 + 2, with variance at most 2 * 2 * 1.25^2
    assert abs(float(loss) - 2.5) < 5 * (4 * 1.25**2 / n) ** 0.5


def test_both_shapes_of_weight_agree_and_terms_are_unweighted() -> None:
    t, x, y = batch()
    first = Regression(Line(), weight=lambda t, x: 1 + t)((t, x, y))
    second = Regression(Line(), weight=lambda t, x: (1 + t)[..., 0])((t, x, y))
    torch.testing.assert_close(first.loss, second.loss)
    plain = Regression(Line(), lambda: (t, x, y))()
    torch.testing.assert_close(first.terms["mean_square"], plain.loss.detach())


def test_bad_input_raises() -> None:
    with pytest.raises(InvalidInputError, match="there are no targets"):
        Regression(Line())()
    t, x, y = batch()
    with pytest.raises(ShapeError, match="doesn't fit the targets"):
        Regression(Line())((t, x, y[:, :1]))
