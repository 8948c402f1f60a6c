"""Autoregressive laws sum to one, are sampled as they are scored, are symmetric where claimed, and know their scores."""

from __future__ import annotations

import pytest
import torch

import stochdyn as sd
from stochdyn.core import all_configurations, encode
from stochdyn.errors import InvalidInputError, ShapeError, ZeroProbabilityError
from stochdyn.povm import (
    Ansatz,
    AutoregressiveTransformer,
    FourPauli,
    FullTable,
    Strings,
    Tetrahedral,
)
from tests.povm.laws import STRINGS, fisher_p_value, interactions, stirred, table, transformer

EVERY = all_configurations(4, 4)


@pytest.mark.parametrize("strings", STRINGS)
@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_probabilities_sum_to_one_at_every_depth_and_symmetrisation(depth: int, strings: str) -> None:
    net = transformer(depth, STRINGS[strings])
    assert abs(float(net.probabilities().sum()) - 1) < 1e-10
    assert abs(float(net.log_prob(EVERY).detach().exp().sum()) - 1) < 1e-10


def test_six_sites_sum_to_one() -> None:
    net = transformer(2, Strings.translations(6) @ Strings.relabelling(6, (3, 2, 1, 0)), sites=6)
    assert abs(float(net.probabilities().sum()) - 1) < 1e-10


@pytest.mark.parametrize("make", [transformer, interactions])
@pytest.mark.parametrize("strings", STRINGS)
def test_evaluation_by_prefixes_is_that_of_whole_strings(make, strings: str) -> None:
    net = make(3, STRINGS[strings])
    a = EVERY[torch.randint(256, (90,), generator=torch.Generator().manual_seed(1))]
    whole = net.log_prob(a).detach()
    with torch.no_grad():
        assert torch.allclose(net.log_prob(a), whole, rtol=0, atol=1e-12)
    net.memory = 64 * net.bytes_per_row  # in parts of 64 strings
    with torch.no_grad():
        assert torch.allclose(net.log_prob(a), whole, rtol=0, atol=1e-12)


def test_long_strings_are_evaluated_by_prefixes_too() -> None:
    net = transformer(2, None, sites=70)
    a, log_p = net.sample(40, generator=torch.Generator().manual_seed(2))
    a = torch.cat([a, a[:5]])
    assert torch.allclose(log_p, net.log_prob(a)[:40].detach(), rtol=0, atol=1e-10)
    with torch.no_grad():
        assert torch.allclose(net.log_prob(a)[40:], log_p[:5], rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("make", "depth", "strings"),
    [
        (transformer, 1, "natural"),
        (transformer, 2, "natural"),
        (transformer, 3, "snakes"),
        (transformer, 4, "everything"),
        (transformer, 2, "translations"),
        (interactions, 2, "turn about z"),
    ],
)
def test_samples_follow_the_law_that_log_prob_gives(make, depth: int, strings: str) -> None:
    """False-alarm rate 1e-4 a case; a causal mask left out of sampling fails it at depth 2 by far."""
    assert fisher_p_value(make(depth, STRINGS[strings]), 4000, 5, seed=depth) > 1e-4


def test_the_table_is_sampled_as_it_is_scored() -> None:
    assert fisher_p_value(table(), 4000, 5, seed=5) > 1e-4


def test_a_sampler_of_another_law_is_found_out() -> None:
    net = transformer(2)

    class Shifted(AutoregressiveTransformer):
        def sample(self, n, generator=None, *, stratified=False):
            a, log_p = super().sample(n, generator)
            return a.roll(1, 1), log_p

    other = Shifted(4, layers=2, width=8, heads=2).double()
    other.load_state_dict(net.state_dict())
    assert fisher_p_value(other, 4000, 5, seed=1) < 1e-8


@pytest.mark.parametrize("make", [lambda: transformer(2), lambda: transformer(2, STRINGS["snakes"]), table])
def test_stratified_draws_have_the_law_and_vary_less(make) -> None:
    """Counts of stratified draws stay within a few units of what is expected; those of independent ones don't."""
    net = make()
    p = net.probabilities()
    n = 2000
    function = torch.cos(encode(EVERY, 4).double())
    exact = float(p @ function)
    errors = {}
    for stratified in (True, False):
        generator = torch.Generator().manual_seed(11)
        means = []
        for _ in range(40):
            a, _ = net.sample(n, generator=generator, stratified=stratified)
            means.append(function[encode(a, 4)].mean() - exact)
        errors[stratified] = torch.stack(means)
    independent = float((p @ (function - exact).square() / n).sqrt())
    assert abs(float(errors[True].mean())) < 5 * float(errors[True].std()) / 40**0.5
    assert float(errors[True].std()) < 0.5 * independent
    assert 0.5 * independent < float(errors[False].std()) < 2 * independent


@pytest.mark.parametrize("strings", STRINGS)
def test_scores_are_the_gradients_of_single_samples(strings: str) -> None:
    for net in (transformer(2, STRINGS[strings]), interactions(2, STRINGS[strings])):
        a = EVERY[: 7 * 30 : 30]
        log_p, scores = net.scores(a)
        by_functorch = Ansatz.scores(net, a)
        assert torch.allclose(log_p, by_functorch[0], rtol=0, atol=1e-12)
        assert torch.allclose(scores, by_functorch[1], rtol=0, atol=1e-11)
        gradient = torch.autograd.grad(net.log_prob(a)[3], [p for _, p in net.trainable()])
        assert torch.allclose(scores[3], torch.cat([g.reshape(-1) for g in gradient]), rtol=0, atol=1e-11)


def test_scores_leave_out_frozen_parameters() -> None:
    net = transformer(1)
    net.positions.requires_grad_(False)
    assert net.scores(EVERY[:3])[1].shape == (3, len(net.parameter_vector()))


def test_scores_have_mean_zero_under_the_law() -> None:
    for net in (transformer(2, STRINGS["translations"]), table()):
        log_p, scores = net.scores(EVERY)
        assert float((log_p.exp() @ scores).abs().max()) < 1e-12


@pytest.mark.parametrize("strings", ["translations", "everything", "turn about z"])
def test_groups_make_the_law_invariant(strings: str) -> None:
    net = transformer(2, STRINGS[strings])
    assert net.symmetry is not None
    read = STRINGS[strings].arrange(EVERY)
    log_p = net.log_prob(EVERY).detach()
    for s in range(read.shape[1]):
        assert torch.allclose(net.log_prob(read[:, s]).detach(), log_p, rtol=0, atol=1e-12)
    assert transformer(2, None).symmetry is None


@pytest.mark.parametrize("state", ["up", "x+", "y-", torch.tensor([[0.7, 0.2j], [-0.2j, 0.3]])])
@pytest.mark.parametrize("strings", ["natural", "everything"])
def test_product_states_are_exact(state, strings: str) -> None:
    povm = Tetrahedral()
    for net in (transformer(2, STRINGS[strings]), interactions(2, STRINGS[strings]), table()):
        net.set_product_state(povm, state)
        p = povm.probabilities(state)
        joint = torch.einsum("a,b,c,d->abcd", p, p, p, p).reshape(-1)
        assert torch.allclose(net.probabilities(), joint, rtol=0, atol=1e-14)


@pytest.mark.parametrize("strings", STRINGS)
def test_inhomogeneous_product_states_are_exact_under_every_mixture(strings: str) -> None:
    povm = Tetrahedral()
    states = ["up", "x+", "down", "y-"]
    net = transformer(2, STRINGS[strings]).set_product_state(povm, states)
    joint = torch.einsum("a,b,c,d->abcd", *(povm.probabilities(s) for s in states)).reshape(-1)
    assert torch.allclose(net.probabilities(), joint, rtol=0, atol=1e-14)
    if strings != "natural":
        assert net.symmetry is None
    with torch.no_grad():  # conditionals away from the product law still make one law
        net.head.weight.normal_()
    assert abs(float(net.probabilities().sum()) - 1) < 1e-12
    assert fisher_p_value(net, 4000, 3, seed=4) > 1e-4


def test_impossible_outcomes_name_a_frame() -> None:
    with pytest.raises(ZeroProbabilityError, match="Tetrahedral"):
        transformer(1).set_product_state(FourPauli(), "down")


def test_parameters_as_a_vector_and_back() -> None:
    net, other = transformer(2), transformer(3)
    vector = net.parameter_vector()
    net.set_parameter_vector(vector + 1)
    assert torch.allclose(net.parameter_vector(), vector + 1)
    with pytest.raises(ShapeError, match="wrong length"):
        other.set_parameter_vector(vector)


def test_state_dicts_carry_the_product_state() -> None:
    net = transformer(2).set_product_state(Tetrahedral(), ["up", "x+", "up", "y-"])
    other = transformer(2)
    other.probabilities()
    other.load_state_dict(net.state_dict())
    assert torch.allclose(other.probabilities(), net.probabilities(), rtol=0, atol=1e-15)


def test_float32_agrees_with_float64() -> None:
    net = transformer(2, sites=16)
    a, log_p = net.sample(50, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(net.float().log_prob(a).double(), log_p, rtol=0, atol=1e-4)


def test_bad_input_is_named() -> None:
    net = transformer(1)
    with pytest.raises(InvalidInputError, match="integers"):
        net.log_prob(torch.zeros(2, 4))
    with pytest.raises(ShapeError, match=r"\(n, N\)"):
        net.log_prob(torch.zeros(2, 5, dtype=torch.long))
    with pytest.raises(InvalidInputError, match="out of range"):
        net.log_prob(torch.full((2, 4), 4))
    with pytest.raises(InvalidInputError, match="heads must divide"):
        AutoregressiveTransformer(4, width=9, heads=2)
    with pytest.raises(InvalidInputError, match="strings is unknown"):
        AutoregressiveTransformer(4, strings="snail")
    with pytest.raises(InvalidInputError, match="shape of the lattice"):
        AutoregressiveTransformer(6, strings="snake")
    with pytest.raises(ShapeError, match="don't fit"):
        AutoregressiveTransformer(4, strings=Strings.identity(5))
    with pytest.raises(InvalidInputError, match="one state for each site"):
        net.set_product_state(Tetrahedral(), ["up"])
    with pytest.raises(InvalidInputError, match="number of outcomes"):
        AutoregressiveTransformer(4, num_outcomes=9).set_product_state(Tetrahedral(), "up")
    with pytest.raises(InvalidInputError, match="too many outcomes"):
        AutoregressiveTransformer(12).probabilities()
    with pytest.raises(InvalidInputError, match="too many outcomes"):
        FullTable(9)
    with pytest.raises(InvalidInputError, match="at least 1"):
        net.sample(0)


def test_the_public_names_are_there() -> None:
    net = sd.povm.AutoregressiveTransformer(4, layers=2, width=8, heads=2, strings="snake")
    net.set_product_state(sd.povm.Tetrahedral(rotated=True), "up")
    a, log_p = net.sample(16, generator=torch.Generator().manual_seed(0))
    assert a.shape == (16, 4)
    assert torch.allclose(net.log_prob(a).detach(), log_p, atol=1e-5)
    assert isinstance(stirred(sd.povm.FullTable(2)), Ansatz)


@pytest.mark.parametrize("make", [transformer, interactions, table])
def test_batches_of_any_shape_and_form_are_scored(make) -> None:
    net = table() if make is table else make(2)
    a, log_p = net.sample((2, 3), generator=0)
    for graded in (torch.enable_grad, torch.no_grad):
        with graded():
            torch.testing.assert_close(net.log_prob(a).detach(), log_p)
            torch.testing.assert_close(net.log_prob(a[0, 0]).detach(), log_p[0, 0])
            assert net.log_prob(a[:0]).shape == (0, 3)
            for form in (a.tolist(), a.numpy(), a.int()):
                torch.testing.assert_close(net.log_prob(form).detach(), log_p)
