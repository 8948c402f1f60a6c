"""Initial laws: fixed points, distributions, simulated marginals."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pyro.distributions as pyro_dist
import pytest
import torch
from torch import nn
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

import stochdyn as sd
from stochdyn.core import DistributionStart, FixedStart, SimulatedMarginal, as_initial
from stochdyn.errors import (
    DiffusionMismatchError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    SingularDiffusionError,
)
from tests.core.laws import F64, within

WIDE = Independent(Normal(torch.zeros(2, dtype=F64), 2.0), 1)
NARROW = Independent(Normal(torch.ones(2, dtype=F64), 0.5), 1)


def test_a_fixed_start_is_no_part_of_the_event() -> None:
    start = as_initial(torch.tensor([1.0, 2.0]))
    assert isinstance(start, FixedStart)
    x0 = start.draw((3, 4), None)
    assert x0.shape == (3, 4, 2)
    assert (x0 == torch.tensor([1.0, 2.0])).all()
    assert start.log_prob(x0).shape == (3, 4)
    assert not start.log_prob(x0).any()
    assert start.dim == 2


def test_a_batch_of_fixed_starts() -> None:
    assert as_initial(torch.zeros(5, 2)).draw((3,), None).shape == (3, 5, 2)


def test_a_fixed_start_moves_with_the_law_and_a_learnt_one_is_a_parameter() -> None:
    assert as_initial(torch.zeros(2)).double().draw((), None).dtype == F64
    point = nn.Parameter(torch.zeros(2))
    law = sd.DiffusionMeasure(point, sd.SDE(lambda t, x: -x, 1.0))
    assert dict(law.named_parameters()) == {"initial.point": point}
    law.sample(torch.linspace(0, 1, 3)).x[-1].sum().backward()
    torch.testing.assert_close(point.grad, torch.full((2,), 0.25))


@pytest.mark.parametrize("law", [WIDE, pyro_dist.Normal(torch.zeros(2, dtype=F64), 2.0).to_event(1)])
def test_a_distribution_gives_draws_and_densities(law: torch.distributions.Distribution) -> None:
    start = as_initial(law)
    assert isinstance(start, DistributionStart)
    x0 = start.draw((4000,), torch.Generator().manual_seed(1))
    assert within(x0.mean(0), 0.0, torch.tensor(2 / 4000**0.5))
    assert within(x0.var(0), 4.0, torch.tensor(4 * (2 / 4000) ** 0.5))
    torch.testing.assert_close(start.log_prob(x0), law.log_prob(x0))


def test_the_generator_decides_the_draws_and_the_global_one_is_left_alone() -> None:
    state = torch.get_rng_state()
    draws = [as_initial(WIDE).draw((3,), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert torch.equal(state, torch.get_rng_state())
    generator = torch.Generator().manual_seed(1)
    assert not torch.equal(as_initial(WIDE).draw((3,), generator), as_initial(WIDE).draw((3,), generator))


def test_draws_without_a_generator_follow_the_global_one() -> None:
    torch.manual_seed(5)
    first = as_initial(WIDE).draw((3,), None)
    torch.manual_seed(5)
    assert torch.equal(first, as_initial(WIDE).draw((3,), None))


def test_draws_are_differentiable_where_the_law_is() -> None:
    loc = torch.zeros(2, dtype=F64, requires_grad=True)
    as_initial(Independent(Normal(loc, 1.0), 1)).draw((3,), None).sum().backward()
    assert loc.grad is not None
    assert loc.grad.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("estimator", ["density", "stl"])
def test_the_ratio_of_densities(estimator: str) -> None:
    q, p = as_initial(NARROW), as_initial(WIDE)
    x0 = torch.randn(5, 2, dtype=F64)
    torch.testing.assert_close(q.log_ratio(p, x0, estimator), NARROW.log_prob(x0) - WIDE.log_prob(x0))
    torch.testing.assert_close(q.log_ratio(p, x0, estimator), -p.log_ratio(q, x0, estimator))
    assert not q.log_ratio(q, x0, estimator).any()


def test_the_rate_of_a_start_is_its_divergence() -> None:
    x0 = torch.randn(5, 2, dtype=F64)
    rate = as_initial(NARROW).log_ratio(as_initial(WIDE), x0, "rate")
    expected = torch.distributions.kl_divergence(NARROW, WIDE)
    torch.testing.assert_close(rate, expected.expand(5))


def test_the_rate_falls_back_on_the_ratio_where_no_divergence_is_known() -> None:
    mixture = MixtureSameFamily(
        Categorical(torch.ones(2, dtype=F64)), Independent(Normal(torch.eye(2, dtype=F64), 1.0), 1)
    )
    x0 = torch.randn(5, 2, dtype=F64)
    torch.testing.assert_close(
        as_initial(mixture).log_ratio(as_initial(WIDE), x0, "rate"), mixture.log_prob(x0) - WIDE.log_prob(x0)
    )


def test_two_fixed_starts_agree_or_are_singular() -> None:
    x0 = torch.zeros(3, 2)
    same = as_initial(torch.zeros(2)).log_ratio(as_initial(torch.zeros(2)), x0, "density")
    assert same.tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(DiffusionMismatchError, match="different fixed starts"):
        as_initial(torch.zeros(2)).log_ratio(as_initial(torch.ones(2)), x0, "density")


@pytest.mark.parametrize("estimator", ["density", "rate", "stl"])
def test_a_fixed_and_a_random_start_are_singular(estimator: str) -> None:
    with pytest.raises(DiffusionMismatchError, match="fixed and a random start"):
        as_initial(torch.zeros(2)).log_ratio(as_initial(WIDE), torch.zeros(3, 2), estimator)


def test_a_simulated_marginal_has_draws_but_no_density() -> None:
    law = sd.DiffusionMeasure(WIDE, sd.SDE(lambda t, x: -x, 0.6), dt=0.01)
    start = SimulatedMarginal(law, horizon=1.0)
    x = start.draw((4000,), torch.Generator().manual_seed(1))
    h = 0.01
    decay = (1 - h) ** 200
    variance = 4 * decay + 0.36 * h * (1 - decay) / (1 - (1 - h) ** 2)
    assert within(x.var(0), variance, torch.tensor(variance * (2 / 4000) ** 0.5))
    with pytest.raises(SingularDiffusionError, match="simulated"):
        start.log_prob(x)


@pytest.mark.parametrize(
    ("initial", "error", "message"),
    [
        (0.0, InvalidInputError, "distribution or a tensor"),
        (torch.tensor(0.0), ShapeError, "initial"),
        (torch.zeros(2, dtype=torch.long), InvalidInputError, "floating"),
        (torch.tensor([0.0, float("nan")]), NonFiniteError, r"initial\[1\]"),
        (Normal(torch.zeros(2), 1.0), ShapeError, r"vector event.*to_event"),
        (Independent(Normal(torch.zeros(2, 2), 1.0), 2), ShapeError, "vector event"),
    ],
)
def test_bad_starts(initial: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        sd.DiffusionMeasure(initial, sd.SDE(lambda t, x: -x, 1.0))


def test_threads_that_draw_starts_get_the_numbers_of_their_own_seeds() -> None:
    start = as_initial(Independent(Normal(torch.zeros(1), 1.0), 1))
    wanted = [start.marginal().sample(200, seed) for seed in range(2)]

    def same(number: int) -> bool:
        return all(
            torch.equal(start.marginal().sample(200, number % 2), wanted[number % 2]) for _ in range(50)
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(same, range(8)))
