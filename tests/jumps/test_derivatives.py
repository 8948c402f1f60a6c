"""Derivatives of jump laws: of what a law says, and of its derivatives in turn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stochdyn.jumps import Exact, ExactEntry, GaussianLevels, JumpMeasure, Misclassified, log_evidence
from stochdyn.testing import check_gradients

D = torch.float64
RATES = torch.tensor([[0.0, 1.0, 0.5], [0.3, 0.0, 0.7], [0.2, 0.4, 0.0]], dtype=D)
START = torch.tensor([0.5, 0.3, 0.2], dtype=D)
TIMES = torch.tensor([0.0, 0.5, 1.2, 3.0], dtype=D)
CONFUSION = torch.tensor([[0.9, 0.05, 0.05], [0.1, 0.8, 0.1], [0.05, 0.1, 0.85]], dtype=D)
STATES, LEVELS = [0, 1, 1, 2], [0.1, 0.9, 1.1, 2.0]


def law(log_rates: Tensor) -> JumpMeasure:
    return JumpMeasure(START, RATES * log_rates.exp())


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "evidence": lambda r: log_evidence(law(r), TIMES, STATES, Misclassified(CONFUSION)),
    "evidence of several series": lambda r: log_evidence(
        law(r),
        TIMES * torch.tensor([[1.0], [2.0]], dtype=D),
        [STATES, STATES[::-1]],
        Misclassified(CONFUSION),
    ),
    "evidence of an entry": lambda r: log_evidence(law(r), TIMES, STATES, ExactEntry([2], Exact(3))),
    "posterior of a state": lambda r: (
        law(r).conditioned(TIMES, STATES, Misclassified(CONFUSION)).marginal(0.7).probs
    ),
    "tilted rates": lambda r: law(r).conditioned(TIMES, STATES, Misclassified(CONFUSION)).rates(0.7),
    "smoothed states": lambda r: law(r).conditioned(TIMES, STATES, Misclassified(CONFUSION)).smooth(),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_first_and_second_derivatives_in_the_rates(name: str) -> None:
    check_gradients(FUNCTIONS[name], torch.zeros(3, 3, dtype=D))


def test_first_and_second_derivatives_in_the_observation_and_the_start() -> None:
    prior = JumpMeasure(START, RATES)
    levels, scale = torch.tensor([0.0, 1.0, 2.0], dtype=D), torch.tensor(0.3, dtype=D)
    check_gradients(lambda m, s: log_evidence(prior, TIMES, LEVELS, GaussianLevels(m, s)), levels, scale)
    check_gradients(
        lambda p: log_evidence(JumpMeasure(p / p.sum(), RATES), TIMES, STATES, Misclassified(CONFUSION)),
        START,
    )


def test_the_posterior_follows_an_observation_that_is_changed_later() -> None:
    observation = Misclassified(CONFUSION)
    post = JumpMeasure(START, RATES).conditioned(TIMES, STATES, observation)
    before = post.marginal(0.7).probs
    observation.load_state_dict({name: torch.eye(3, dtype=D) for name in observation.state_dict()})
    exact = JumpMeasure(START, RATES).conditioned(TIMES, STATES, Exact(3)).marginal(0.7).probs
    torch.testing.assert_close(post.marginal(0.7).probs, exact)
    assert not torch.allclose(before, exact)
