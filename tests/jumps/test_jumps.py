"""Jump processes against exact answers: transitions, evidence, posteriors, paths, panels, relabelling and units."""

from __future__ import annotations

import math

import mpmath
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import poisson

from stochdyn.errors import (
    EmptyDataError,
    InvalidInputError,
    ShapeError,
    TimeGridError,
    UnavailableError,
    ZeroProbabilityError,
)
from stochdyn.jumps import (
    AmortisedRates,
    Exact,
    ExactEntry,
    GaussianLevels,
    JumpMeasure,
    JumpRecord,
    Misclassified,
    PanelData,
    PoissonLevels,
    RateMatrix,
    StateSets,
    fit_rates,
    log_evidence,
    propagate,
    transition,
    transition_generator,
)
from stochdyn.testing import check_device, check_storage

D = torch.float64
CYCLE = [[0.0, 1.0, 0.3], [0.4, 0.0, 2.0], [0.8, 0.5, 0.0]]
TIMES, LEVELS = [0.2, 0.5, 1.3, 2.0, 3.1], [0.1, -0.3, 1.2, 1.9, 0.4]


def tensor(x: object) -> torch.Tensor:
    return torch.as_tensor(np.asarray(x, dtype=float))


def three(start: tuple[float, ...] = (0.5, 0.3, 0.2)) -> JumpMeasure:
    return JumpMeasure(tensor(start), tensor(CYCLE))


def levels() -> GaussianLevels:
    return GaussianLevels(tensor([0.0, 1.0, 2.0]), 0.5)


def generator(kind: str) -> torch.Tensor:
    """Generators that break other methods."""
    made = {
        "erlang": [[-2.0, 2, 0, 0], [0, -2, 2, 0], [0, 0, -2, 2], [0, 0, 0, 0]],  # defective
        "degenerate": [[-2.0, 1, 1], [1, -2, 1], [1, 1, -2]],
        "stiff": [[-1e5, 1e5, 0], [3.0, -3.001, 1e-3], [0, 1e-6, -1e-6]],
        "absorbing": [[-0.3, 0.25, 0.05, 0], [1e-3, -0.2, 0.1, 0.099], [0, 0, -1e-4, 1e-4], [0, 0, 0, 0]],
        "reducible": [[-1.0, 1, 0, 0], [2, -2, 0, 0], [0, 0, -3, 3], [0, 0, 1, -1]],
    }[kind]
    return tensor(made)


@pytest.mark.parametrize("kind", ["erlang", "degenerate", "stiff", "reducible", "absorbing"])
@pytest.mark.parametrize("mean", [1e-9, 1e-3, 0.7, 40.0, 1e6, 1e11])
def test_every_transition_probability_has_nine_digits(kind: str, mean: float) -> None:
    """Against sixty digits, from a billionth of a candidate jump to a hundred billion of them, however small the entry."""
    q = generator(kind)
    dt = mean / float(-q.diagonal().min())
    p = transition(q, dt)
    assert (p >= 0).all()
    torch.testing.assert_close(p.sum(-1), torch.ones(len(q), dtype=D), rtol=0, atol=1e-14)
    with mpmath.workdps(60):
        exact_q = mpmath.matrix(len(q))
        for i in range(len(q)):
            for j in range(len(q)):
                exact_q[i, j] = mpmath.mpf(float(q[i, j])) if i != j else mpmath.mpf(0)
            exact_q[i, i] = -mpmath.fsum(exact_q[i, :])
        # halved until the series is short, then squared
        halvings = max(0, math.ceil(math.log2(mean)) + 3)
        short = exact_q * mpmath.mpf(dt) / 2**halvings
        exact = term = mpmath.eye(len(q))
        for k in range(1, 60):
            term = term * short / k
            exact = exact + term
        for _ in range(halvings):
            exact = exact * exact
        known = tensor([[float(exact[i, j]) for j in range(len(q))] for i in range(len(q))])
    torch.testing.assert_close(p, known, rtol=1e-9, atol=1e-300)


def test_an_erlang_chain_has_poisson_transitions() -> None:
    """Entries far below one keep their relative accuracy, for a matrix without a basis of eigenvectors."""
    for dt in (1e-6, 0.01, 1.0, 9.0):
        p = transition(generator("erlang"), dt)[0, :3]
        torch.testing.assert_close(p, tensor(poisson.pmf([0, 1, 2], 2 * dt)), rtol=1e-12, atol=0)


def test_transitions_agree_with_the_matrix_exponential_and_its_derivative() -> None:
    dt = tensor([0.0, 0.1, 0.7, 2.5]).requires_grad_()
    q = RateMatrix(tensor(CYCLE)).matrix.clone().requires_grad_()
    weight = torch.randn(4, 3, 3, dtype=D)
    ours = torch.autograd.grad((transition(q, dt) * weight).sum(), (q, dt))
    theirs = torch.autograd.grad((torch.matrix_exp(q * dt[:, None, None]) * weight).sum(), (q, dt))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("unit", [1e-12, 1e12])
def test_time_may_be_in_any_unit(unit: float) -> None:
    q = RateMatrix(tensor(CYCLE)).matrix
    torch.testing.assert_close(transition(q / unit, 0.8 * unit), transition(q, 0.8), rtol=1e-12, atol=0)
    slow, fast = RateMatrix(tensor(CYCLE) / unit), RateMatrix(tensor(CYCLE))
    torch.testing.assert_close(slow.stationary(), fast.stationary(), rtol=1e-12, atol=0)
    torch.testing.assert_close(slow.relaxation_times() / unit, fast.relaxation_times(), rtol=1e-10, atol=0)
    torch.testing.assert_close(
        slow.entropy_production() * unit, fast.entropy_production(), rtol=1e-12, atol=0
    )
    scaled = JumpMeasure(tensor([0.5, 0.3, 0.2]), tensor(CYCLE) / unit)
    torch.testing.assert_close(
        log_evidence(scaled, tensor(TIMES) * unit, LEVELS, levels()),
        log_evidence(three(), TIMES, LEVELS, levels()),
        rtol=1e-12,
        atol=0,
    )


def test_a_slow_batch_member_is_as_good_beside_a_fast_one() -> None:
    q = RateMatrix(tensor(CYCLE)).matrix
    both = transition(torch.stack([q, 1e6 * q]), tensor([1e-3, 2.0]))
    torch.testing.assert_close(both[:, 0], transition(q, tensor([1e-3, 2.0])), rtol=1e-12, atol=0)


def test_the_telegraph() -> None:
    q = RateMatrix(tensor([[0, 0.7], [1.9, 0]]))
    expected = tensor([[0.7644042878996183, 0.23559571210038163], [0.639474075701036, 0.360525924298964]])
    torch.testing.assert_close(transition(q, 0.8), expected, rtol=1e-13, atol=0)
    assert float(q.relaxation_times()) == pytest.approx(1 / 2.6, rel=1e-13)
    assert float(q.correlation([0.0, 1.0], 0.8)) == pytest.approx(0.024579464826052, rel=1e-11)
    torch.testing.assert_close(q.mean_first_passage(1), tensor([1 / 0.7, 0.0]), rtol=1e-13, atol=0)
    torch.testing.assert_close(propagate([1.0, 0.0], q, [0.0, 0.8])[1], expected[0], rtol=1e-13, atol=0)


def test_a_cycle_out_of_equilibrium() -> None:
    q = RateMatrix(tensor(CYCLE))
    torch.testing.assert_close(
        q.stationary(),
        tensor([0.33704292527821933, 0.23052464228934813, 0.4324324324324321]),
        rtol=1e-13,
        atol=0,
    )
    assert float(q.entropy_production()) == pytest.approx(0.8038884090379788, rel=1e-13)
    assert float(q.fluxes()[0, 1]) == pytest.approx(0.2448330683624801, rel=1e-13)
    torch.testing.assert_close(
        q.mean_first_passage(0), tensor([0.0, 1.5566037735849056, 1.3679245283018868]), rtol=1e-13, atol=0
    )
    one_way = RateMatrix(tensor([[0, 1.0, 0], [0, 0, 1.0], [1.0, 0, 0]]))
    assert math.isinf(float(one_way.entropy_production()))
    balanced = RateMatrix.reversible(tensor([[0, 1, 2], [1, 0, 3], [2, 3, 0.0]]), tensor([0.2, 0.5, 0.3]))
    torch.testing.assert_close(balanced.stationary(), tensor([0.2, 0.5, 0.3]), rtol=1e-13, atol=0)
    assert abs(float(balanced.entropy_production())) < 1e-14
    committor = q.committor(0, 2)
    assert committor[[0, 2]].tolist() == [0, 1]
    assert float(committor[1]) == pytest.approx(2.0 / 2.4, rel=1e-13)


def test_absorbing_and_reducible_chains() -> None:
    disease = RateMatrix(tensor([[0, 1.0, 0.2], [0.5, 0, 0.7], [0, 0, 0]]))
    torch.testing.assert_close(disease.stationary(), tensor([0.0, 0.0, 1.0]), rtol=0, atol=1e-13)
    assert torch.isinf(disease.mean_first_passage(0)[2])
    apart = RateMatrix(generator("reducible"))
    with pytest.raises(InvalidInputError, match="isn't unique"):
        apart.stationary()
    # which part it is in the chain remembers for ever, and from the other part neither end of a passage is reached
    torch.testing.assert_close(apart.relaxation_times(), tensor([math.inf, 1 / 3, 1 / 4]), rtol=1e-12, atol=0)
    assert apart.committor(0, 1).tolist() == [0.0, 1.0, 0.0, 0.0]
    assert apart.mean_first_passage(0)[2:].tolist() == [math.inf, math.inf]
    fork = RateMatrix(tensor([[0, 1.0, 0.5, 0.1], [0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]))
    torch.testing.assert_close(fork.committor(1, 2)[0], tensor(0.5 / 1.6), rtol=1e-12, atol=0)


def test_like_channels_are_counted() -> None:
    one = RateMatrix(tensor([[0, 0.7], [1.9, 0]]))
    many, occupation = one.replicate(5)
    p = transition(many, 0.8)
    start = occupation.tolist().index([5, 0])
    closed = float(transition(one, 0.8)[0, 0])
    for k, (a, b) in enumerate(occupation.tolist()):
        assert float(p[start, k]) == pytest.approx(math.comb(5, b) * closed**a * (1 - closed) ** b, rel=1e-12)


def test_hidden_states_have_their_exact_evidence_and_posterior() -> None:
    law, times, y = three(), TIMES, LEVELS
    assert float(log_evidence(law, times, y, levels())) == pytest.approx(-5.3286682320000605, rel=1e-13)
    post = law.conditioned(times, y, levels())
    exact = {
        0.0: (0.872215676282, 0.069752398806, 0.058031924912),
        0.9: (0.493955234770, 0.343421198706, 0.162623566524),
        1.65: (0.063762997750, 0.341374423787, 0.594862578463),
        3.5: (0.477016733284, 0.281228657692, 0.241754609024),
    }
    for t, p in exact.items():
        torch.testing.assert_close(post.marginal(t).probs, tensor(p), rtol=1e-10, atol=0)
    tilted = post.rates(0.9)
    assert float(tilted[0, 1]) == pytest.approx(2.056958028651, rel=1e-11)
    assert float(tilted[2, 0]) == pytest.approx(0.631054171100, rel=1e-11)
    dwell, jumps = post.expected_statistics(3.5)
    torch.testing.assert_close(
        dwell, tensor([1.535229206325, 0.864278572468, 1.100492221207]), rtol=1e-11, atol=0
    )
    assert float(jumps[1, 2]) == pytest.approx(1.577859000033, rel=1e-11)


def test_the_gradient_of_the_evidence_is_that_of_fisher() -> None:
    log_q = tensor(CYCLE).clamp(min=1e-9).log().requires_grad_()
    off = log_q.exp() * (1 - torch.eye(3, dtype=D))
    law = JumpMeasure(tensor([0.5, 0.3, 0.2]), off)
    times = [*TIMES, 3.5]
    slope = torch.autograd.grad(log_evidence(law, times, [*LEVELS, math.nan], levels()), log_q)[0]
    for (i, j), value in {(0, 1): -0.035868352497, (1, 2): -0.150698144903, (2, 0): 0.234439653648}.items():
        assert float(slope[i, j]) == pytest.approx(value, rel=1e-9)


def test_split_gaps_missing_values_and_ties_change_nothing() -> None:
    whole = log_evidence(three(), TIMES, LEVELS, levels())
    times = sorted([*TIMES, 0.31, 1.0, 2.9])
    y = [LEVELS[TIMES.index(t)] if t in TIMES else math.nan for t in times]
    torch.testing.assert_close(log_evidence(three(), times, y, levels()), whole, rtol=1e-13, atol=0)
    torch.testing.assert_close(
        log_evidence(three(), [0.2, *TIMES], [math.nan, *LEVELS], levels()), whole, rtol=1e-13, atol=0
    )
    series = log_evidence(three(), tensor([TIMES, TIMES]), tensor([LEVELS, LEVELS]), levels())
    torch.testing.assert_close(series, whole.expand(2), rtol=1e-13, atol=0)


def test_relabelling_the_states_relabels_the_answer() -> None:
    order = [2, 0, 1]
    rates, start = tensor(CYCLE)[order][:, order], tensor([0.5, 0.3, 0.2])[order]
    other = JumpMeasure(start, rates)
    shuffled = GaussianLevels(tensor([0.0, 1.0, 2.0])[order], 0.5)
    torch.testing.assert_close(
        log_evidence(other, TIMES, LEVELS, shuffled),
        log_evidence(three(), TIMES, LEVELS, levels()),
        rtol=1e-13,
        atol=0,
    )
    a = other.conditioned(TIMES, LEVELS, shuffled).marginal(0.9).probs
    torch.testing.assert_close(
        a, three().conditioned(TIMES, LEVELS, levels()).marginal(0.9).probs[order], rtol=1e-12, atol=0
    )


def test_ways_to_observe() -> None:
    law, times, states = three(), [0.0, 0.5, 1.4], [0, 1, 2]
    p = transition(law.generator, 0.5)[0, 1] * transition(law.generator, 0.9)[1, 2] * 0.5
    exact = log_evidence(law, times, states, Exact(3))
    assert float(exact) == pytest.approx(math.log(float(p)), rel=1e-12)
    torch.testing.assert_close(log_evidence(law, times, states, Misclassified(torch.eye(3, dtype=D))), exact)
    sets = StateSets([[0], [1], [2], [0, 1, 2]], 3)
    torch.testing.assert_close(log_evidence(law, times, states, sets), exact)
    torch.testing.assert_close(
        log_evidence(law, times, [0, 3, 2], sets), log_evidence(law, times, [0, math.nan, 2], Exact(3))
    )
    counts = log_evidence(law, times, [3, 0, 9], PoissonLevels(tensor([1.0, 2.0, 9.0])))
    assert math.isfinite(float(counts))
    # entry seen exactly: a density, which integrates to the probability of being there
    disease = JumpMeasure(tensor([1.0, 0.0]), tensor([[0, 0.8], [0.0, 0]]))
    seen = ExactEntry([1], Exact(2))
    at = float(log_evidence(disease, [1.3], [1], seen))
    assert at == pytest.approx(math.log(0.8) - 0.8 * 1.3, rel=1e-12)


def test_impossible_observations_name_series_and_time() -> None:
    law = JumpMeasure(tensor([1.0, 0.0]), tensor([[0, 0.8], [0.0, 0]]))
    with pytest.raises(ZeroProbabilityError, match="series 1 at time 2"):
        log_evidence(law, [0.0, 1.0, 2.0], tensor([[0, 0, 1], [0, 1, 0]]), Exact(2))


def test_two_laws_and_their_divergence() -> None:
    p = JumpMeasure(tensor([0.5, 0.3, 0.2]), tensor(CYCLE))
    r = JumpMeasure(tensor([1, 1, 1]) / 3, tensor([[0, 0.5, 0.6], [0.8, 0, 1.0], [0.4, 1.0, 0]]))
    assert float(p.kl(r, 2.0)) == pytest.approx(0.7678061292741027, rel=1e-13)
    path = JumpRecord.of([0.4, 1.1, 1.7], [0, 1, 2, 0], horizon=2.0, num_states=3)
    assert float(p.log_rn(path, r)) == pytest.approx(1.9849066497880004, rel=1e-13)
    record = p.sample_record(2.0, 100_000, 0)
    density, rate = p.log_rn(record, r), p.log_rn(record, r, "rate")
    for values in (density, rate):
        assert abs(float(values.mean()) - 0.7678061292741027) < 4 * float(values.std()) / 100_000**0.5
    weight = (-density).exp()
    assert abs(float(weight.mean()) - 1) < 4 * float(weight.std()) / 100_000**0.5
    assert rate.var() < 0.3 * density.var()
    never = JumpMeasure(tensor([0.5, 0.3, 0.2]), tensor([[0, 0.0, 0.3], [0.4, 0, 2.0], [0.8, 0.5, 0]]))
    assert float(never.log_rn(path, p)) == -math.inf
    assert math.isinf(float(p.kl(never, 2.0)))


def test_posterior_paths_have_the_exact_statistics() -> None:
    post = three().conditioned(TIMES, LEVELS, levels())
    record = post.sample_record(3.5, 20_000, 0)
    dwell, jumps = post.expected_statistics(3.5)
    for seen, exact in ((record.dwell, dwell), (record.counts, jumps)):
        error = seen.std(0) / 20_000**0.5
        assert ((seen.mean(0) - exact).abs() <= 4.5 * error + 1e-12).all()
    exact_states = three().conditioned([0.0, 0.7, 1.5], [0, 2, 1], Exact(3)).sample_record(2.0, 500, 1)
    assert (exact_states.at([0.0, 0.7, 1.5]) == torch.tensor([0, 2, 1])).all()


def test_simulated_paths_have_the_exact_marginals() -> None:
    x = three().sample([0.0, 0.4, 2.0], 20_000, 0).x[..., 0]
    for k, t in enumerate((0.0, 0.4, 2.0)):
        p = three().marginal(t).probs
        share = torch.stack([(x[:, k] == s).double().mean() for s in range(3)])
        assert ((share - p).abs() < 4.5 * (p * (1 - p) / 20_000).sqrt()).all()


def test_rates_that_change_in_time() -> None:
    """A two-state law whose rates grow together keeps its stationary law and mixes by the integral of its rates."""
    base = RateMatrix(tensor([[0, 0.7], [1.9, 0]])).matrix

    def rates(t: torch.Tensor) -> torch.Tensor:
        return base * (1 + t)[:, None, None]

    law = JumpMeasure(tensor([1.0, 0.0]), rates, bound=1.9 * 3)
    exact = transition(base, 1.5 + 1.5**2 / 2)[0]
    torch.testing.assert_close(law.marginal(1.5).probs, exact, rtol=1e-5, atol=0)
    record = law.sample_record(1.5, 20_000, 0)
    share = (record.at(1.5) == 1).double().mean()
    assert abs(share - exact[1]) < 4.5 * float((exact[0] * exact[1] / 20_000).sqrt())
    still = JumpMeasure(tensor([1.0, 0.0]), base)
    weight = (-law.log_rn(record, still)).exp()
    assert abs(float(weight.mean()) - 1) < 4.5 * float(weight.std()) / 20_000**0.5
    # with mean rates in place of jumps: less variance, the same mean
    density, rate = law.log_rn(record, still), law.log_rn(record, still, "rate")
    assert abs(float((density - rate).mean())) < 4.5 * float((density - rate).std()) / 20_000**0.5
    assert rate.var() < 0.5 * density.var()
    # the divergence is the mean log ratio; between laws whose rates change by one factor it is that of a longer time
    assert (
        abs(float(law.log_rn(record, still).mean() - law.kl(still, 1.5)))
        < 4.5 * float(law.log_rn(record, still).std()) / 20_000**0.5
    )
    other = JumpMeasure(
        tensor([1.0, 0.0]), lambda t: tensor([[0, 1.4], [1.0, 0]]) * (1 + t)[:, None, None], bound=4.0
    )
    longer = still.kl(JumpMeasure(tensor([1.0, 0.0]), tensor([[0, 1.4], [1.0, 0]])), 1.5 + 1.5**2 / 2)
    torch.testing.assert_close(law.kl(other, 1.5), longer, rtol=1e-4, atol=0)
    with pytest.raises(InvalidInputError, match="exceeds the bound"):
        JumpMeasure(tensor([1.0, 0.0]), rates, bound=0.1).sample_record(1.0, 200, 0)


def test_rates_that_turn_negative_are_refused_where_they_are_used() -> None:
    law = JumpMeasure([1.0, 0.0, 0.0], lambda t: tensor(CYCLE) * torch.cos(t)[:, None, None], bound=5.0)
    for ask in (lambda: law.marginal(6.28), lambda: law.sample([0.0, 6.28], 50, 0), lambda: law.rates(3.0)):
        with pytest.raises(InvalidInputError, match="a rate is negative"):
            ask()


def test_densities_of_changing_rates_see_changes_within_a_long_stay() -> None:
    """A stay of twenty, in which the rate swings twenty times: its integral is known."""

    def strength(t: torch.Tensor) -> torch.Tensor:
        return 0.1 * (1 + torch.sin(7 * t))

    law = JumpMeasure([1.0, 0.0, 0.0], lambda t: tensor(CYCLE) * strength(t)[:, None, None], bound=0.5)
    stay = JumpRecord.of([19.0], [0, 1], 20.0, 3)

    def integral(t: float) -> float:
        return 0.1 * (t + (1 - math.cos(7 * t)) / 7)

    exact = math.log(strength(tensor(19.0))) - 1.3 * integral(19.0) - 2.4 * (integral(20.0) - integral(19.0))
    assert float(law.log_prob(stay)) == pytest.approx(exact, rel=1e-6)


def test_a_record_on_a_late_grid_is_the_whole_record() -> None:
    law, other = three(), JumpMeasure([0.5, 0.3, 0.2], 2 * tensor(CYCLE))
    late, early = law.sample([1.0, 2.0], 50, 0), law.sample([0.0, 2.0], 50, 0)
    for ask in (lambda r: r.dwell, lambda r: r.counts, lambda r: law.log_rn(r, other), law.log_prob):
        torch.testing.assert_close(ask(late), ask(early))
    assert (late.dwell >= 0).all()
    assert late.duration == pytest.approx(2.0)
    with pytest.raises(TimeGridError, match="another time than the law"):
        JumpMeasure([1.0, 0.0, 0.0], tensor(CYCLE), start_time=1.0).log_prob(early)


def test_statistics_are_counted_up_to_the_horizon_given_all_observations() -> None:
    post = three().conditioned(TIMES, LEVELS, levels())
    record = post.sample_record(TIMES[-1], 4000, 0)
    early = JumpRecord(record.times, record.states, record.num_jumps, tensor([0.0, 0.8]), 3)
    dwell, _ = post.expected_statistics(0.8)
    draws = early.dwell.clamp(min=0.0)
    assert float(dwell.sum()) == pytest.approx(0.8, rel=1e-9)
    assert bool(((draws.mean(0) - dwell).abs() < 4.5 * draws.std(0) / 4000**0.5).all())
    whole = post.expected_statistics()
    for part, total in zip(whole, post.expected_statistics(TIMES[-1]), strict=True):
        torch.testing.assert_close(part, total)


def test_conditioned_laws_move_with_their_data() -> None:
    check_device(three().conditioned(TIMES, LEVELS, levels()))
    check_storage(three().conditioned(TIMES, LEVELS, levels()), lambda law: law.marginal(0.7).probs)


def test_loading_the_shipped_network_draws_nothing() -> None:
    before = torch.get_rng_state()
    AmortisedRates.load()
    assert torch.equal(before, torch.get_rng_state())


def test_mean_first_passages_between_all_states() -> None:
    q = RateMatrix(tensor(CYCLE))
    whole = q.mean_first_passage()
    for j in range(3):
        torch.testing.assert_close(whole[:, j], q.mean_first_passage(j))


def test_the_forward_equation_is_solved_by_the_marginals_and_differentiable() -> None:
    from stochdyn.core import LearnedFlow

    law = three()
    flow = LearnedFlow(lambda t, a: _log_marginal(law, t, a))
    residual = law.forward().residual(flow, tensor(0.6), torch.tensor([[0], [1], [2]]))
    assert residual.abs().max() < 1e-8
    rates = tensor(CYCLE).requires_grad_()
    moving = JumpMeasure(tensor([0.5, 0.3, 0.2]), rates)
    moving.forward().vector_residual(tensor([0.5, 0.3, 0.2])).square().sum().backward()
    assert rates.grad is not None
    assert rates.grad.abs().sum() > 0


def _log_marginal(law: JumpMeasure, t: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    p = law.initial.double() @ transition(law.generator, t.reshape(-1)[0])
    return p.log()[a[..., 0].long()]


def test_what_sampling_at_an_interval_cannot_tell() -> None:
    s, d = 6.0, 5.0
    other = 5 - 4 * math.pi / math.sqrt(3)
    q = RateMatrix(
        tensor([[0, (s + d) / 2, (s - d) / 2], [(s - d) / 2, 0, (s + d) / 2], [(s + d) / 2, (s - d) / 2, 0]])
    )
    with pytest.warns(UserWarning, match="same transition probabilities"):
        report = q.embedding_report(1.0)
    assert any(abs(float(a[0, 1]) - (s + other) / 2) < 1e-9 for a in report["aliases"])
    for alias in report["aliases"]:
        torch.testing.assert_close(transition(alias, 1.0), transition(q, 1.0), rtol=1e-10, atol=1e-12)
    with pytest.raises(InvalidInputError, match="no jump process"):
        transition_generator([[0.1, 0.9], [0.8, 0.2]], 1.0)
    with pytest.raises(InvalidInputError, match="isn't a generator"):
        transition_generator([[0.7, 0.28, 0.02], [0.05, 0.7, 0.25], [0.3, 0.05, 0.65]], 1.0)


def simulated_panel(seed: int = 0) -> PanelData:
    law = JumpMeasure(tensor([0.6, 0.3, 0.1]), tensor([[0, 0.5, 0.0], [0.2, 0, 0.4], [0, 0, 0]]))
    rows: dict[str, list] = {"who": [], "when": [], "state": []}
    r = np.random.default_rng(seed)
    record = law.sample_record(12.0, 80, seed)
    for k in range(80):
        times = np.sort(r.uniform(0, 12, 7))
        for t in times:
            rows["who"].append(k)
            rows["when"].append(t)
            rows["state"].append("abc"[int(record.at(torch.tensor([t]))[k, 0])])
    return PanelData(rows, "who", "when", "state")


def test_rates_of_a_panel() -> None:
    panel = simulated_panel()
    assert panel.labels == ["a", "b", "c"]
    mask = [[False, True, False], [True, False, True], [False, False, False]]
    fit = fit_rates(panel, mask, num_draws=500)
    log_rates = fit.draws
    truth = tensor([0.5, 0.2, 0.4]).log()
    z = (log_rates.mean(0) - truth) / log_rates.std(0)
    assert z.abs().max() < 3.5
    assert fit.khat < 0.7
    assert "from" in fit.report()
    assert fit.rate_draws.shape == (500, 3, 3)
    assert float(fit.rates.sum(-1).abs().max()) < 1e-12
    again = fit_rates(panel, mask, num_draws=500)
    assert torch.equal(again.draws, fit.draws)


def test_rates_in_other_units_are_the_same_rates() -> None:
    rows = {"id": [1, 1, 1, 1, 2, 2, 2, 2], "t": [0.0, 1, 2, 3, 0, 1, 2, 3], "s": [0, 0, 1, 1, 1, 1, 1, 0]}
    one = fit_rates(PanelData(rows, "id", "t", "s"), num_draws=50)
    rows["t"] = [t * 1e9 for t in rows["t"]]
    other = fit_rates(PanelData(rows, "id", "t", "s"), num_draws=50)
    torch.testing.assert_close(other.rates * 1e9, one.rates, rtol=1e-10, atol=0)
    assert other.log_likelihood == pytest.approx(one.log_likelihood, abs=1e-9)


def test_rows_may_come_in_any_order_and_lack_a_state() -> None:
    t, s = [0.0, 1.0, 2.5, 4.0, 0.0, 2.0, 3.0], ["well", "ill", "ill", "well", "well", "well", "ill"]
    plain = PanelData({"id": [1] * 4 + [2] * 3, "t": t, "s": s}, "id", "t", "s")
    order = [4, 3, 7, 0, 6, 8, 1, 5, 2]
    mixed = {
        "id": [([1] * 4 + [2] * 3 + [1, 2])[k] for k in order],
        "t": [[*t, 0.5, 2.5][k] for k in order],
        "s": [[*s, None, None][k] for k in order],
    }
    other = PanelData(mixed, "id", "t", "s")
    assert other.labels == plain.labels
    for a, b in ((plain, other), (plain, PanelData(pd.DataFrame(mixed), "id", "t", "s"))):
        key = [
            sorted(zip(*(c.tolist() for c in (p.gaps.before, p.gaps.after, p.gaps.dt)), strict=True))
            for p in (a, b)
        ]
        assert key[0] == key[1]
    with pytest.raises(EmptyDataError, match="every state"):
        PanelData({"id": [1, 1], "t": [0.0, 1.0], "s": [None, None]}, "id", "t", "s")


def test_panels_refuse_what_makes_no_sense() -> None:
    rows = {"id": [1, 1, 2, 2], "t": [0.0, 1.0, 2.0, 2.0], "s": [0, 1, 0, 1]}
    with pytest.raises(TimeGridError, match="twice in series 2"):
        PanelData(rows, "id", "t", "s")
    with pytest.raises(InvalidInputError, match="isn't a column"):
        PanelData(rows, "name", "t", "s")
    rows["t"] = [0.0, 1.0, 2.0, 3.0]
    with pytest.raises(InvalidInputError, match="never occur"):
        PanelData(rows, "id", "t", "s", exact_entry=[7])
    with pytest.raises(ZeroProbabilityError, match="subject 1 from 0 at 0 to 1 at 1"):
        fit_rates(PanelData(rows, "id", "t", "s"), mask=[[False, False], [True, False]])
    rows = {"id": [1, 1, 1, 2, 2, 2], "t": [0.0, 1.0, 2.0, 0.0, 1.0, 4.0], "s": [0, 1, 2, 0, 0, 3]}
    deaths = PanelData(rows, "id", "t", "s", exact_entry=[3])
    mask = np.zeros((4, 4), dtype=bool)
    mask[0, 1] = mask[1, 2] = True
    with pytest.raises(ZeroProbabilityError, match="subject 2 from 0 at 1 to 3 at 4"):
        fit_rates(deaths, mask)
    mask[2, 3] = True
    assert math.isfinite(fit_rates(deaths, mask, num_draws=0).log_likelihood)


def test_bad_input() -> None:
    with pytest.raises(InvalidInputError, match="must not be negative"):
        RateMatrix([[0.0, -1.0], [1.0, 0.0]])
    with pytest.raises(InvalidInputError, match="sum to zero"):
        RateMatrix([[-1.0, 2.0], [1.0, -2.0]])
    with pytest.raises(ShapeError, match="must be square"):
        RateMatrix([[0.0, 1.0, 2.0]])
    with pytest.raises(InvalidInputError, match="sum to one"):
        JumpMeasure([0.5, 0.2], [[0.0, 1.0], [1.0, 0.0]])
    with pytest.raises(InvalidInputError, match="dt must not be negative"):
        transition([[0.0, 1.0], [1.0, 0.0]], -1.0)
    with pytest.raises(InvalidInputError, match="y must hold states"):
        log_evidence(three(), [0.0], [5], Exact(3))
    with pytest.raises(TimeGridError, match="must not decrease"):
        log_evidence(three(), [1.0, 0.0], [0, 1], Exact(3))
    with pytest.raises(UnavailableError):
        three().drift(0.0, torch.zeros(1))
    assert torch.isfinite(
        transition(torch.tensor(CYCLE).float() - torch.diag(torch.tensor(CYCLE).sum(1)), 3e5)
    ).all()


def test_rates_of_hidden_jumps_are_learnt_by_stock_svi() -> None:
    import pyro
    import pyro.distributions as dist
    from pyro.infer import SVI, Trace_ELBO
    from pyro.infer.autoguide import AutoNormal

    from stochdyn.jumps import HiddenJumps

    times = torch.linspace(0, 12, 60, dtype=D)
    seen = GaussianLevels(tensor([0.0, 1.0]), 0.3)

    def law(rate: torch.Tensor) -> JumpMeasure:
        zero = torch.zeros_like(rate)
        return JumpMeasure(
            tensor([0.5, 0.5]), torch.stack([torch.stack([zero, rate]), torch.stack([2 * rate, zero])])
        )

    def model(y: torch.Tensor) -> None:
        rate = pyro.sample("rate", dist.LogNormal(tensor(0.0), tensor(1.0)))
        with pyro.plate("series", len(y)):
            pyro.sample("y", HiddenJumps(law(rate), times, seen), obs=y)

    pyro.set_rng_seed(0)
    y = HiddenJumps(law(tensor(0.6)), times, seen).sample((20,))
    y[0, 3] = math.nan
    guide = AutoNormal(model)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    for _ in range(80):
        svi.step(y)
    assert float(guide.median(y)["rate"]) == pytest.approx(0.6, rel=0.25)
