"""Derivatives of jump laws: of what a law says, and of its derivatives in turn."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stochdyn.errors import InvalidInputError
from stochdyn.jumps import (
    Exact,
    ExactEntry,
    GaussianLevels,
    JumpMeasure,
    JumpRecord,
    Misclassified,
    RateMatrix,
    ReactionNetwork,
    log_evidence,
)
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


# what can't happen: a start in the first state alone, no jump between the first state and the last, labels that are never wrong
CERTAIN = torch.tensor([1.0, 0.0, 0.0], dtype=D)
CHAIN = torch.tensor([[0.0, 1.0, 0.0], [0.4, 0.0, 2.0], [0.0, 0.5, 0.0]], dtype=D)
SURE = torch.tensor([[0.9, 0.1, 0.0], [0.0, 1.0, 0.0], [0.0, 0.2, 0.8]], dtype=D)
RECORD = JumpRecord.of([0.4, 1.1, 1.7], [0, 1, 2, 1], horizon=2.0, num_states=3)
WITH_ZEROS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "density": lambda p, q, c: JumpMeasure(p, q).log_prob(RECORD),
    "ratio": lambda p, q, c: JumpMeasure(p, q).log_rn(RECORD, JumpMeasure(p, 2 * q)),
    "rate of a ratio": lambda p, q, c: JumpMeasure(p, q).log_rn(RECORD, JumpMeasure(p, 2 * q), "rate"),
    "divergence": lambda p, q, c: JumpMeasure(p, q).kl(JumpMeasure(p, 2 * q), 2.0),
    "divergence from more": lambda p, q, c: JumpMeasure(p, q).kl(JumpMeasure(START, RATES), 2.0),
    "entropy": lambda p, q, c: JumpMeasure(p, q).entropy_production(2.0),
    "probability": lambda p, q, c: JumpMeasure(p, q).marginal(0.0).log_prob(torch.zeros(1, dtype=D)),
    "evidence": lambda p, q, c: log_evidence(JumpMeasure(p, q), TIMES, [0, 1, 1, 2], Misclassified(c)),
}


@pytest.mark.parametrize("name", WITH_ZEROS)
def test_what_cannot_happen_has_no_part_in_derivatives(name: str) -> None:
    given = [x.clone().requires_grad_() for x in (CERTAIN, CHAIN, SURE)]
    value = WITH_ZEROS[name](*given)
    slopes = torch.autograd.grad(value.sum(), given, allow_unused=True)
    assert bool(value.isfinite().all())
    assert all(g is None or bool(g.isfinite().all()) for g in slopes)
    if slopes[1] is not None:  # and what can happen has the slope that differences have
        step = torch.zeros_like(CHAIN)
        step[0, 1] = 1e-6
        up, down = (WITH_ZEROS[name](CERTAIN, CHAIN + s * step, SURE) for s in (1, -1))
        assert torch.allclose(slopes[1][0, 1], (up - down).sum() / 2e-6, rtol=1e-5, atol=1e-8)


def test_times_of_observations_have_derivatives() -> None:
    prior = JumpMeasure(START, RATES)
    check_gradients(
        lambda t: log_evidence(prior, t, STATES, Misclassified(CONFUSION)),
        torch.tensor([0.1, 0.6, 1.1, 3.0], dtype=D),
    )


def test_a_state_that_cannot_lead_to_what_is_seen_later_has_no_rates() -> None:
    trap = torch.tensor([[0.0, 1.0, 0.2], [0.4, 0.0, 2.0], [0.0, 0.0, 0.0]])
    rates = JumpMeasure([1.0, 0.0, 0.0], trap).conditioned([1.0], [0], Exact(3)).rates(0.3)
    assert bool(rates.isfinite().all())
    assert not bool(rates[2].any())
    assert not bool(rates[:2, 2].any())


def learnt() -> dict[str, tuple[list[nn.Parameter], Callable[[], nn.Module], Callable[[nn.Module], Tensor]]]:
    p, q = nn.Parameter(START.clone()), nn.Parameter(RATES.clone())
    even, odd = nn.Parameter(RATES + RATES.mT), nn.Parameter(START.clone())
    born, dies = nn.Parameter(torch.tensor(3.0, dtype=D)), nn.Parameter(torch.tensor(0.5, dtype=D))
    network = ["0 -> A", "A -> 0"]
    y = torch.tensor([[7.0], [6.0], [5.0]], dtype=D)

    def linear_noise() -> nn.Module:
        return ReactionNetwork(network, rates=[born, dies], initial={"A": 7}).linear_noise()

    return {
        "start and rates": ([p, q], lambda: JumpMeasure(p, q), lambda law: log_evidence(law, TIMES, STATES, Exact(3))),
        "balanced rates": ([odd, even], lambda: RateMatrix.reversible(even, odd), lambda m: m.matrix[0, 1] * m.matrix[1, 2]),
        "constants of reactions": ([born, dies], linear_noise, lambda law: law.log_evidence(TIMES[1:], y, 1.0)),
    }  # fmt: skip


@pytest.mark.parametrize("name", learnt())
def test_parameters_are_listed_and_followed_at_every_step(name: str) -> None:
    leaves, make, value = learnt()[name]
    made = make()
    assert {id(x) for x in leaves} <= {id(x) for x in made.parameters()}
    before = value(made)
    for _ in range(2):  # a second step needs a graph of its own
        slopes = torch.autograd.grad(value(made), leaves)
        assert all(bool(g.isfinite().all()) and bool(g.any()) for g in slopes)
    with torch.no_grad():
        leaves[-1].mul_(1.1)
    assert not torch.isclose(value(made), before, rtol=1e-6)
    assert torch.allclose(value(copy.deepcopy(made)), value(made))
    assert torch.allclose(value(make()), value(made), rtol=1e-10)


def test_what_is_not_differentiable_says_so() -> None:
    rate = torch.tensor(0.5, requires_grad=True)
    network = ReactionNetwork(["0 -> A", "A -> 0"], rates=[3.0, rate], initial={"A": 7})
    with pytest.raises(InvalidInputError, match="isn't differentiable in rates"):
        network.truncate({"A": 40})
    with torch.no_grad():
        network.truncate({"A": 40})
    with pytest.raises(InvalidInputError, match="differentiated in horizon"):
        JumpMeasure(START, RATES).kl(JumpMeasure(START, 2 * RATES), torch.tensor(2.0, requires_grad=True))  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="differentiated in start_time"):
        JumpMeasure(START, RATES, start_time=torch.tensor(2.0, requires_grad=True))  # type: ignore[arg-type]
