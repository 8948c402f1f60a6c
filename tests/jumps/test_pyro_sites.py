"""Jump processes in Pyro: rates of their own in a plate, seen paths, and paths drawn afterwards."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

from stochdyn.errors import InvalidInputError, ShapeError, UnavailableError
from stochdyn.jumps import (
    Exact,
    GaussianLevels,
    HiddenJumps,
    JumpMeasure,
    JumpPath,
    JumpRecord,
    StateSets,
    log_evidence,
    posterior_paths,
    transition,
)

D = torch.float64
CYCLE = torch.tensor([[0.0, 1.0, 0.3], [0.4, 0.0, 2.0], [0.8, 0.5, 0.0]], dtype=D)
START = torch.tensor([0.5, 0.3, 0.2], dtype=D)
TIMES = torch.tensor([0.2, 0.5, 1.3], dtype=D)


def levels() -> GaussianLevels:
    return GaussianLevels(torch.tensor([0.0, 1.0, 2.0], dtype=D), 0.5)


def test_series_with_rates_of_their_own_are_each_alone() -> None:
    law = JumpMeasure(START, torch.stack([CYCLE, 2 * CYCLE]))
    y = torch.tensor([[0.1, -0.3, 1.2], [0.2, 0.9, 1.1]], dtype=D)
    alone = torch.stack(
        [log_evidence(JumpMeasure(START, (k + 1) * CYCLE), TIMES, y[k], levels()) for k in range(2)]
    )
    torch.testing.assert_close(log_evidence(law, TIMES, y, levels()), alone, rtol=1e-12, atol=0)
    own_times = torch.stack([TIMES, TIMES + 0.4])
    site = HiddenJumps(law, own_times, levels())
    assert site.batch_shape == (2,)
    second = log_evidence(JumpMeasure(START, 2 * CYCLE), TIMES + 0.4, y[1], levels())
    assert float(site.log_prob(y)[1]) == pytest.approx(float(second), rel=1e-12)
    assert site.sample((4,)).shape == (4, 2, 3)


def test_a_batch_of_laws_is_sampled_and_has_marginals() -> None:
    law = JumpMeasure(START, torch.stack([CYCLE, 5 * CYCLE]))
    path = law.sample([0.0, 0.4], 20_000, 0)
    for k in range(2):
        p = START @ transition((k + 1 + 3 * k) * CYCLE, 0.4)
        torch.testing.assert_close(law.marginal(0.4).probs[k], p, rtol=1e-12, atol=0)
        share = torch.stack([(path.x[:, k, 1, 0] == s).double().mean() for s in range(3)])
        assert ((share - p).abs() < 4.5 * (p * (1 - p) / 20_000).sqrt()).all()
    with pytest.raises(ShapeError, match="one law at a time"):
        law.conditioned([0.5], [0], Exact(3))


def test_a_hierarchy_has_the_gradient_of_its_parts() -> None:
    """Rates of subjects in a plate: the trace's log density is the prior's plus every subject's evidence."""
    y = torch.tensor([[0, 1, 1], [1, 0, 1], [0, 0, 1]], dtype=D)

    def model() -> None:
        centre = pyro.sample("centre", dist.Normal(torch.zeros((), dtype=D), 1.0))
        with pyro.plate("subjects", 3):
            rate = pyro.sample("log_rate", dist.Normal(centre, 0.5)).exp()
            zero = torch.zeros_like(rate)
            rates = torch.stack([torch.stack([zero, rate], -1), torch.stack([2 * rate, zero], -1)], -2)
            law = JumpMeasure(torch.tensor([0.5, 0.5], dtype=D), rates)
            pyro.sample("y", HiddenJumps(law, TIMES, Exact(2)), obs=y)

    log_rate = torch.tensor([-0.3, 0.2, 0.6], dtype=D, requires_grad=True)
    data = {"centre": torch.tensor(0.1, dtype=D), "log_rate": log_rate}
    trace = pyro.poutine.trace(pyro.poutine.condition(model, data=data)).get_trace()
    trace.compute_log_prob()
    evidence = trace.nodes["y"]["log_prob"]
    for k in range(3):
        rate = float(log_rate[k].detach().exp())
        law = JumpMeasure(
            torch.tensor([0.5, 0.5], dtype=D), torch.tensor([[0.0, rate], [2 * rate, 0.0]], dtype=D)
        )
        assert float(evidence[k].detach()) == pytest.approx(
            float(log_evidence(law, TIMES, y[k], Exact(2))), rel=1e-12
        )
    slope = torch.autograd.grad(evidence.sum(), log_rate)[0]
    assert (slope != 0).all()


def test_stock_nuts_agrees_with_the_exact_posterior() -> None:
    """One rate and one prior: a grid gives the posterior."""
    y = torch.tensor([0, 1, 1, 0, 0, 0, 1, 0, 1, 1], dtype=D)
    times = 0.5 * torch.arange(10, dtype=D)

    def law(rate: torch.Tensor) -> JumpMeasure:
        zero = torch.zeros_like(rate)
        q = torch.stack([torch.stack([zero, rate], -1), torch.stack([rate, zero], -1)], -2)
        return JumpMeasure(torch.tensor([0.5, 0.5], dtype=D), q)

    def model() -> None:
        log_rate = pyro.sample("log_rate", dist.Normal(torch.zeros((), dtype=D), 1.0))
        pyro.sample("y", HiddenJumps(law(log_rate.exp()), times, Exact(2)), obs=y)

    grid = torch.linspace(-4, 4, 801, dtype=D)
    log_post = log_evidence(law(grid.exp()), times, y, Exact(2)) - 0.5 * grid**2
    weights = (log_post - log_post.logsumexp(0)).exp()
    mean = (weights * grid).sum()
    std = (weights * (grid - mean) ** 2).sum().sqrt()
    pyro.set_rng_seed(0)
    mcmc = pyro.infer.MCMC(pyro.infer.NUTS(model), num_samples=120, warmup_steps=40, disable_progbar=True)
    mcmc.run()
    draws = mcmc.get_samples()["log_rate"]
    # some thirty effective draws
    assert abs(float(draws.mean() - mean)) < 4.5 * float(std) / 5.5
    assert 0.6 < float(draws.std() / std) < 1.6


def test_seen_paths_are_sites() -> None:
    law = JumpMeasure(START, CYCLE)
    site = JumpPath(law, horizon=2.0, max_jumps=40)
    pyro.set_rng_seed(0)
    value = site.sample((5,))
    assert value.shape == (5, 82)
    torch.testing.assert_close(site.log_prob(value), law.log_prob(site.decode(value)), rtol=1e-12, atol=0)
    record = JumpRecord.of([0.4, 1.1, 1.7], [0, 1, 2, 0], horizon=2.0, num_states=3)
    assert float(site.log_prob(site.encode(record))) == pytest.approx(float(law.log_prob(record)), rel=1e-12)
    with pytest.raises(InvalidInputError, match="more jumps than max_jumps"):
        JumpPath(law, 2.0, 2).encode(record)
    with pytest.raises(InvalidInputError, match="end at the horizon"):
        JumpPath(law, 3.0, 5).encode(record)


def test_seen_paths_may_have_rates_of_their_own_and_jumps_that_cannot_happen() -> None:
    """Laws of a plate are each as if alone, and rates that are zero by the model have finite derivatives."""
    scale = torch.tensor([1.0, 2.5], dtype=D, requires_grad=True)
    chain = torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 1.0], [0.0, 2.0, 0.0]], dtype=D)
    site = JumpPath(JumpMeasure(START, scale[:, None, None] * chain), 2.0, 6)
    record = JumpRecord.of([0.4, 1.1], [0, 1, 2], horizon=2.0, num_states=3)
    value = site.log_prob(site.encode(record))
    alone = [float(JumpMeasure(START, k * chain).log_prob(record)) for k in (1.0, 2.5)]
    torch.testing.assert_close(value.detach(), torch.tensor(alone, dtype=D), rtol=1e-12, atol=0)
    # two jumps, less the expected number at these rates
    slope = torch.autograd.grad(value.sum(), scale)[0]
    expected = 2 / scale.detach() - (0.4 * 1.0 + 0.7 * 1.5 + 0.9 * 2.0)
    torch.testing.assert_close(slope, expected, rtol=1e-12, atol=0)
    rates = chain.clone().requires_grad_()
    grad = torch.autograd.grad(JumpMeasure(START, rates).log_prob(record), rates)[0]
    assert torch.isfinite(grad).all()
    torch.manual_seed(0)
    many = JumpPath(JumpMeasure(START, scale.detach()[:, None, None] * chain), 2.0, 40)
    draws = many.sample(torch.Size([5]))
    assert many.log_prob(draws).shape == (5, 2)
    # a record that needs a forbidden jump
    leap = JumpRecord.of([0.4], [0, 2], horizon=2.0, num_states=3)
    assert float(JumpMeasure(START, chain).log_prob(leap)) == -math.inf


def test_the_rate_of_a_seen_path_has_its_conjugate_posterior() -> None:
    """Gamma(a, b) given n jumps in time T is Gamma(a + n, b + T): the log density differs from it by a constant."""
    record = JumpRecord.of([0.4, 1.1, 1.7], [0, 1, 0, 1], horizon=2.5, num_states=2)
    rates = torch.tensor([0.3, 1.0, 2.5], dtype=D)
    values = []
    for rate in rates.tolist():
        law = JumpMeasure(
            torch.tensor([1.0, 0.0], dtype=D), torch.tensor([[0.0, rate], [rate, 0.0]], dtype=D)
        )
        site = JumpPath(law, 2.5, 5)
        values.append(
            float(site.log_prob(site.encode(record)))
            + float(dist.Gamma(2.0, 1.0).log_prob(torch.tensor(rate, dtype=D)))
        )
    exact = dist.Gamma(torch.tensor(5.0, dtype=D), 3.5).log_prob(rates)
    gap = torch.tensor(values, dtype=D) - exact
    torch.testing.assert_close(gap, gap[0].expand(3), rtol=0, atol=1e-6)


def test_paths_of_uncertain_rates_keep_the_observations_and_go_on() -> None:
    laws = [JumpMeasure(START, rate * CYCLE) for rate in (0.8, 1.0, 1.3) for _ in range(80)]
    record = posterior_paths(laws, [0.0, 0.7], [0, 2], Exact(3), horizon=2.0, generator=0)
    assert record.shape == (240,)
    assert (record.at([0.0, 0.7]) == torch.tensor([0, 2])).all()
    late = torch.stack([transition(rate * CYCLE, 1.3)[2] for rate in (0.8, 1.0, 1.3)]).mean(0)
    share = torch.stack([(record.at(2.0) == s).double().mean() for s in range(3)])
    assert ((share - late).abs() < 4.5 * (late * (1 - late) / 240).sqrt()).all()
    assert math.isfinite(float(record.dwell.sum()))


def test_an_observation_of_ones_own_is_drawn_by_its_own_method():
    class Doubled(Exact):
        def draw(self, states):
            return 2.0 * states

    law = JumpMeasure([0.0, 1.0], [[0.0, 1e-9], [1e-9, 0.0]])
    assert HiddenJumps(law, [0.0, 1.0], Doubled(2)).sample((3,)).unique().tolist() == [2.0]
    with pytest.raises(UnavailableError, match="draw"):
        HiddenJumps(law, [0.0, 1.0], StateSets([[0], [1]], 2)).sample()


def test_series_of_a_plate_that_share_a_law_have_paths_of_their_own():
    pyro.set_rng_seed(0)
    laws = JumpMeasure([0.5, 0.5], torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=D).expand(4, 1, 2, 2))
    drawn = HiddenJumps(laws, [0.0, 1.0], Exact(2)).expand([4, 30]).sample((3,))
    assert drawn.shape == (3, 4, 30, 2)
    # the chance that thirty series agree at the start is 2^-29
    assert bool((drawn[..., 0].std(-1) > 0).all())


def test_one_series_in_a_plate_counts_for_each() -> None:
    law = JumpMeasure(START, CYCLE)
    y = torch.tensor([0.0, 1.0, 1.0], dtype=D)
    one = HiddenJumps(law, TIMES, Exact(3))
    three = one.expand(torch.Size([3]))
    assert torch.equal(three.log_prob(y), one.log_prob(y).expand(3))
    assert three.sample((2,)).shape == (2, 3, 3)


@pytest.mark.parametrize("unit", [1e-12, 1e9])
def test_observations_are_drawn_in_any_unit_of_time(unit: float) -> None:
    """Also where the only observation stands at the start, which may be far from zero."""
    pyro.set_rng_seed(0)
    site = HiddenJumps(JumpMeasure(START, CYCLE / unit, start_time=7 * unit), (7 + TIMES) * unit, Exact(3))
    pyro.set_rng_seed(0)
    same = HiddenJumps(JumpMeasure(START, CYCLE, start_time=7.0), 7 + TIMES, Exact(3)).sample((50,))
    pyro.set_rng_seed(0)
    assert torch.equal(site.sample((50,)), same)
    at_start = HiddenJumps(JumpMeasure(START, CYCLE / unit, start_time=7 * unit), [7 * unit], Exact(3))
    assert at_start.sample((5,)).shape == (5, 1)
