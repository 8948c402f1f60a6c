"""Long series are filtered in blocks: the same numbers as one observation after the other, whatever was seen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from stochdyn.errors import ZeroProbabilityError
from stochdyn.jumps import Exact, GaussianLevels, JumpMeasure, Misclassified, log_evidence
from stochdyn.jumps import filtering as filtering_module
from stochdyn.jumps.observations import Observation

D = torch.float64
CYCLE = torch.tensor([[0.0, 1.0, 0.3], [0.4, 0.0, 2.0], [0.8, 0.5, 0.0]], dtype=D)
START = torch.tensor([0.5, 0.3, 0.2], dtype=D)


def of(kind: str) -> tuple[torch.Tensor, Observation]:
    """Three series of 150 observations each, some of them missing."""
    source = torch.Generator().manual_seed(0)
    path = JumpMeasure(START, CYCLE).sample(0.3 * torch.arange(150), 3, source).x[..., 0].double()
    noise = torch.randn(3, 150, dtype=D, generator=source)
    y, seen = {
        "exact": (path, Exact(3)),
        "labels": (path, Misclassified([[0.9, 0.1, 0.0], [0.05, 0.9, 0.05], [0.0, 0.1, 0.9]])),
        "levels": (path + 0.5 * noise, GaussianLevels(torch.arange(3, dtype=D), 0.5)),
        # each observation all but rules out two states
        "sharp": (path + 0.02 * noise, GaussianLevels(torch.arange(3, dtype=D), 0.02)),
    }[kind]
    y = y.clone()
    y[0, 40:70], y[2, 0], y[1, -1] = math.nan, math.nan, math.nan
    return y, seen


@pytest.mark.parametrize("kind", ["exact", "labels", "levels", "sharp"])
@pytest.mark.parametrize("laws", ["one", "several"])
def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch, kind: str, laws: str) -> None:
    y, seen = of(kind)
    times = 0.3 * torch.arange(150, dtype=D)
    each = torch.stack([CYCLE, 0.7 * CYCLE, 1.2 * CYCLE])
    rates = (CYCLE.clone() if laws == "one" else each).requires_grad_()

    def job() -> tuple[Any, ...]:
        value = log_evidence(JumpMeasure(START, rates), times, y, seen)
        return value.detach(), torch.autograd.grad(value.sum(), rates)[0]

    assert filtering_module._pays_in_blocks(150, 3, 3)
    blocks = job()
    monkeypatch.setattr(filtering_module, "_LONG", 10**9)
    for found, known in zip(blocks, job(), strict=True):
        torch.testing.assert_close(found, known, rtol=1e-11, atol=1e-11)


def test_posteriors_by_blocks_are_those_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    y, seen = of("levels")
    times = torch.rand(150, dtype=D, generator=torch.Generator().manual_seed(1)).mul(0.6).cumsum(0)
    post = JumpMeasure(START, CYCLE).conditioned(times, y[0], seen)
    blocks = post.smooth(), post.rates(10.1), post.marginal(5.0).probs
    torch.testing.assert_close(blocks[0].sum(-1), torch.ones(150, dtype=D), rtol=1e-12, atol=0)
    monkeypatch.setattr(filtering_module, "_LONG", 10**9)
    for found, known in zip(blocks, (post.smooth(), post.rates(10.1), post.marginal(5.0).probs), strict=True):
        torch.testing.assert_close(found, known, rtol=1e-11, atol=1e-300)


def test_impossible_data_of_a_long_series_are_named() -> None:
    one_way = JumpMeasure([1.0, 0.0], [[0.0, 0.8], [0.0, 0.0]])
    y = torch.zeros(2, 150)
    y[1, 90:] = 1.0
    y[1, 101] = 0.0
    with pytest.raises(ZeroProbabilityError, match="series 1 at time 101"):
        log_evidence(one_way, torch.arange(150), y, Exact(2))
