"""A classifier between two samples: chance for one law, certainty for distant ones, the same in any unit."""

from __future__ import annotations

import pytest
import torch

from stochdyn import errors
from stochdyn.diagnostics import c2st

G = torch.Generator().manual_seed(0)
X, Y = torch.randn(80, 2, generator=G), torch.randn(80, 2, generator=G)


def test_one_law_can_not_be_told_apart() -> None:
    score = c2st(X, Y, folds=3)
    assert abs(float(score.mean) - 0.5) < 5 * float(score.stderr)


def test_distant_laws_can_and_the_best_classifier_is_not_beaten() -> None:
    """For a shift of one in one dimension no classifier is right more often than Phi(1/2) = 0.691."""
    assert float(c2st(X, Y + 6, folds=3).mean) > 0.98
    g = torch.Generator().manual_seed(1)
    score = c2st(torch.randn(400, 1, generator=g), torch.randn(400, 1, generator=g) + 1, folds=2)
    assert abs(float(score.mean) - 0.6915) < 4 * float(score.stderr)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_units_do_not_matter(scale: float) -> None:
    x, y = X.double(), Y.double() + 1
    assert float(c2st(scale * x, scale * y, folds=2).mean) == pytest.approx(
        float(c2st(x, y, folds=2).mean), abs=0.02
    )


def test_bad_input() -> None:
    for call, error in (
        (lambda: c2st(X, Y[:, :1]), errors.ShapeError),
        (lambda: c2st(X[:3], Y), errors.TooFewDrawsError),
        (lambda: c2st(X, Y, folds=1), errors.InvalidInputError),
        (lambda: c2st(X * float("nan"), Y), errors.NonFiniteError),
        (lambda: c2st(X, Y, width=0), errors.InvalidInputError),
    ):
        with pytest.raises(error):
            call()
