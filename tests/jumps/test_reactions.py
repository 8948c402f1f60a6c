"""Reaction networks against exact laws: immigration and death, a gene that switches, an epidemic."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom, poisson

import stochdyn as sd
from stochdyn.errors import InvalidInputError, ShapeError, SystemSizeError
from stochdyn.jumps import ReactionNetwork

LAM, MU, START, T = 3.0, 0.5, 7, 1.3


def immigration() -> ReactionNetwork:
    return ReactionNetwork(["0 -> A", "A -> 0"], [LAM, MU], {"A": START})


def gene() -> ReactionNetwork:
    reactions = ["Off -> On", "On -> Off", "On -> On + P", "P -> 0"]
    return ReactionNetwork(reactions, [0.6, 1.4, 12.0, 1.0], {"Off": 1})


def exact_moments(t: float) -> tuple[float, float]:
    stay = math.exp(-MU * t)
    mean = LAM / MU * (1 - stay)
    return START * stay + mean, START * stay * (1 - stay) + mean


def test_immigration_and_death_is_a_binomial_plus_a_poisson() -> None:
    law = immigration().truncate({"A": 80}).marginal(T)
    stay = math.exp(-MU * T)
    for n in (0, 5, 7, 15):
        exact = sum(
            binom.pmf(k, START, stay) * poisson.pmf(n - k, LAM / MU * (1 - stay))
            for k in range(min(n, START) + 1)
        )
        assert float(law.probs[n]) == pytest.approx(exact, rel=1e-10)
    assert law.lost_mass < 1e-12
    assert float(law.log_prob(torch.tensor([5.0]))) == pytest.approx(math.log(float(law.probs[5])))
    assert float(law.log_prob(torch.tensor([500.0]))) == -math.inf


def test_paths_have_the_exact_moments_at_every_time() -> None:
    ts = [0.0, 0.3, 1.3, 4.0]
    x = immigration().sample(ts, 20_000, 0).x[..., 0]
    assert (x[:, 0] == START).all()
    for k, t in enumerate(ts[1:], 1):
        mean, variance = exact_moments(t)
        assert abs(float(x[:, k].mean()) - mean) < 4.5 * (variance / 20_000) ** 0.5
        assert abs(float(x[:, k].var()) - variance) < 0.05 * variance


def test_linear_noise_is_exact_for_linear_propensities() -> None:
    law = immigration().linear_noise(3.0)
    mean, variance = exact_moments(T)
    assert float(law.mean([T])) == pytest.approx(mean, abs=1e-8)
    assert float(law.covariance([T])) == pytest.approx(variance, abs=1e-8)


def test_a_switching_gene() -> None:
    law = gene().truncate({"Off": 1, "On": 1, "P": 80}).marginal(40.0)
    assert float(law.mean[2]) == pytest.approx(3.6, rel=1e-10)
    assert float(law.covariance[2, 2]) == pytest.approx(13.68, rel=1e-10)
    zero = law.probs.sum((0, 1))[0]
    assert float(zero) == pytest.approx(0.24846028673202294, rel=1e-11)
    drift = gene().langevin().drift(torch.tensor(0.0), torch.tensor([[1.0, 0.0, 3.0]]).double())
    torch.testing.assert_close(drift, torch.tensor([[-0.6, 0.6, -3.0]]).double())


def test_the_langevin_equation_has_the_moments_of_many_molecules() -> None:
    network = ReactionNetwork(["0 -> A", "A -> 0"], [300.0, 0.5], {"A": 700})
    law = sd.DiffusionMeasure(torch.tensor([700.0]).double(), network.langevin())
    x = law.sample(torch.linspace(0, 1.3, 200).double(), 4000, 0).x[:, -1, 0]
    stay = math.exp(-0.65)
    mean, variance = 700 * stay + 600 * (1 - stay), 700 * stay * (1 - stay) + 600 * (1 - stay)
    assert abs(float(x.mean()) - mean) < 4.5 * (variance / 4000) ** 0.5 + 0.5
    assert float(x.var()) == pytest.approx(variance, rel=0.12)


def test_an_epidemic_seen_at_four_times() -> None:
    network = ReactionNetwork(["S + I -> 2 I", "I -> R"], [0.3 / 20, 0.1], {"S": 19, "I": 1})
    truncated = network.truncate({"S": 20, "I": 20, "R": 20})
    seen = truncated.log_likelihood([5.0, 10.0, 15.0, 25.0], {"I": [2, 5, 6, 3]})
    assert float(seen) == pytest.approx(-7.933741777579925, rel=1e-12)


def test_a_truncation_that_leaks_says_how_much() -> None:
    whole = immigration().truncate({"A": 80}).marginal(T).probs
    small = immigration().truncate({"A": 9}).marginal(T)
    error = float((whole[:10] - small.probs).abs().sum() + whole[10:].sum())
    assert 0 < error <= 2 * small.lost_mass
    assert float((whole[:10] - small.probs).clamp(max=0).sum()) > -1e-12


def test_mass_action_is_combinatorial() -> None:
    network = ReactionNetwork(["2 A -> B", "A + B -> 0"], [2.0, 3.0], {"A": 5})
    x = torch.tensor([[5.0, 4.0], [1.0, 2.0], [0.0, 0.0]]).double()
    torch.testing.assert_close(
        network.propensities(x), torch.tensor([[20.0, 60.0], [0.0, 6.0], [0.0, 0.0]]).double()
    )
    own = ReactionNetwork(["A -> 0"], [lambda x: x[..., 0] / (1 + x[..., 0])], {"A": 5})
    assert float(own.propensities(torch.tensor([4.0]).double())) == pytest.approx(0.8)


def test_time_may_be_in_any_unit() -> None:
    fast = ReactionNetwork(["0 -> A", "A -> 0"], [LAM * 1e9, MU * 1e9], {"A": START})
    a, b = immigration().truncate({"A": 60}).marginal(T), fast.truncate({"A": 60}).marginal(T * 1e-9)
    torch.testing.assert_close(a.probs, b.probs, rtol=1e-10, atol=1e-15)


def test_bad_input() -> None:
    with pytest.raises(InvalidInputError, match="has one arrow"):
        ReactionNetwork(["A"], [1.0], {"A": 1})
    with pytest.raises(InvalidInputError, match="can't be read"):
        ReactionNetwork(["2A+ -> B"], [1.0], {"A": 1})
    with pytest.raises(InvalidInputError, match="must change something"):
        ReactionNetwork(["A -> A"], [1.0], {"A": 1})
    with pytest.raises(InvalidInputError, match=r"rates\[0\]"):
        ReactionNetwork(["A -> 0"], [-1.0], {"A": 1})
    with pytest.raises(ShapeError, match="one rate per reaction"):
        ReactionNetwork(["A -> 0"], [1.0, 2.0], {"A": 1})
    with pytest.raises(InvalidInputError, match="no reaction has"):
        ReactionNetwork(["A -> 0"], [1.0], {"B": 1})
    with pytest.raises(SystemSizeError):
        gene().truncate({"Off": 1000, "On": 1000, "P": 1000})
    with pytest.raises(InvalidInputError, match="outside the bounds"):
        immigration().truncate({"A": 3})
