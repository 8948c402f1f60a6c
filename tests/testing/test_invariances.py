"""Every checker of an invariance passes what keeps it and catches what doesn't."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stochdyn import testing
from tests.core.laws import F64

X = torch.tensor([3.0, -4.0, 2.0], dtype=F64)


class Keeps(nn.Module):
    """All its state is registered."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("a", torch.ones(2))

    def forward(self, x: Any) -> Tensor:
        return x + self.a


class Forgets(nn.Module):
    """A tensor in a list, and a buffer that no state has."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = [torch.ones(2)]
        self.register_buffer("a", torch.ones(2), persistent=False)

    def forward(self, x: Any) -> Tensor:
        return x + self.a


class _Counter:
    calls = 0

    def __call__(self) -> Tensor:
        self.calls += 1
        return torch.tensor(float(self.calls))


GOOD: dict[str, Callable[[], None]] = {
    "units": lambda: testing.check_units(lambda c: {"mean": (c * X).mean() / c}),
    "company": lambda: testing.check_company(lambda x: x.abs() / x.abs().amax(-1, keepdim=True), X),
    "order": lambda: testing.check_order(lambda x: x.sum(0), X),
    "equivariance": lambda: testing.check_order(lambda x: x - x.mean(), X, equivariant=True),
    "repetition": lambda: testing.check_repetition(lambda: (X, 1.0)),
    "question": lambda: testing.check_question(torch.sin, torch.linspace(0, 1, 7)),
    "precision": lambda: testing.check_precision(lambda dtype: torch.ones(2, dtype=dtype).exp()),
    "device": lambda: testing.check_device(Keeps()),
    "storage": lambda: testing.check_storage(Keeps(), lambda m: m(torch.zeros(2))),
    "forms": lambda: testing.check_forms(lambda x: torch.tensor(np.asarray(x, dtype=float)), X[:, None]),
    "gradients": lambda: testing.check_gradients(torch.sin, X),
}
BAD: dict[str, Callable[[], None]] = {
    "units": lambda: testing.check_units(lambda c: (c * X + 1e-8).mean() / c),
    "company": lambda: testing.check_company(lambda x: x.clamp(max=1e-6 * x.abs().max()), X),
    "order": lambda: testing.check_order(lambda x: x[0] + x.sum(), X),
    "equivariance": lambda: testing.check_order(lambda x: x.cumsum(0), X, equivariant=True),
    "repetition": lambda: testing.check_repetition(_Counter()),
    "question": lambda: testing.check_question(lambda ts: ts.cumsum(0), torch.linspace(0, 1, 7)),
    "precision": lambda: testing.check_precision(lambda dtype: torch.ones(2, dtype=F64)),
    "device": lambda: testing.check_device(Forgets()),
    "storage": lambda: testing.check_storage(Forgets(), lambda m: m(torch.zeros(2))),
    "forms": lambda: testing.check_forms(lambda x: x.sum(dim=0), X),
    "gradients": lambda: testing.check_gradients(lambda x: x.detach() * x, X),
}


@pytest.mark.parametrize("case", GOOD)
def test_what_keeps_an_invariance_passes(case: str) -> None:
    GOOD[case]()


@pytest.mark.parametrize("case", BAD)
def test_what_breaks_an_invariance_is_caught(case: str) -> None:
    with pytest.raises(AssertionError):
        BAD[case]()


def test_lost_gradients_are_named() -> None:
    with pytest.raises(AssertionError, match=r"no gradient reaches inputs \[1\]"):
        testing.check_gradients(lambda x, y: x * y.detach(), X, X)
