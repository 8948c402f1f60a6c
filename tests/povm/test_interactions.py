"""The interaction ansatz: every law at full order, only few-site interactions below it."""

from __future__ import annotations

import itertools

import pytest
import torch

import stochdyn as sd
from stochdyn.core import all_configurations
from stochdyn.errors import InvalidInputError, SystemSizeError
from stochdyn.povm import AutoregressiveInteractions
from stochdyn.povm.dynamics import Averages, fisher_matrix, tdvp_velocity
from stochdyn.povm.systems import ising
from tests.povm.laws import fisher_p_value, interactions, stirred

POVM = sd.povm.Tetrahedral()


def test_logits_are_the_sum_of_the_definition() -> None:
    net = AutoregressiveInteractions(4, bodies=3, num_outcomes=3).double()
    with torch.no_grad():
        net.couplings.normal_(generator=torch.Generator().manual_seed(0))
    b = torch.randint(3, (40, 4), generator=torch.Generator().manual_seed(1))
    whole = net.logits(b).detach()
    # the last site: itself, three earlier ones and their pairs, each a block without outcome 0
    rows = {0: 1, 1: 2, 2: 4}
    assert net.couplings.shape[0] == sum(
        rows[size] * len(list(itertools.combinations(range(i), size))) for i in range(4) for size in range(3)
    )
    quiet = (b[:, :3] == 0).all(1)
    alone = whole[quiet][:, 3]
    assert torch.equal(alone, alone[:1].expand_as(alone))
    assert float(whole[..., 0].abs().max()) == 0
    for i in range(4):
        assert torch.allclose(net.next_logits(None, b[:, :i], i, len(b)), whole[:, i])


def test_without_redundancy_and_complete() -> None:
    """With all bodies there are as many independent parameters as free probabilities, so the law follows anything."""
    net = stirred(AutoregressiveInteractions(3, bodies=3), scale=0.3)
    every, p = all_configurations(3, 4), net.probabilities()
    scores = net.scores(every)[1]
    assert scores.shape[1] == 63
    assert int(torch.linalg.matrix_rank(fisher_matrix(scores, p), hermitian=True)) == 63
    operator = ising(3).master_operator(POVM)
    velocity = tdvp_velocity(Averages(net, operator, None), rcond=1e-13)
    assert torch.allclose(p * (scores @ velocity.direction), operator.apply(p), atol=1e-9)


def test_fewer_bodies_than_sites_leave_a_residual() -> None:
    operator = ising(4).master_operator(POVM)
    residuals = []
    for bodies in (2, 3, 4):
        net = AutoregressiveInteractions(4, bodies=bodies).double().set_product_state(POVM, "up")
        sd.povm.evolve(net, ising(4), POVM, [0.0, 0.3], num_samples=None, observables=["Z"], progress=False)
        residuals.append(tdvp_velocity(Averages(net, operator, None)).residual)
    assert residuals[0] > 3 * residuals[1] > 3 * residuals[2]


@pytest.mark.parametrize("bodies", [1, 3])
def test_normalised_and_sampled_by_its_law(bodies: int) -> None:
    net = interactions(bodies)
    assert float(net.probabilities().sum()) == pytest.approx(1, abs=1e-10)
    assert fisher_p_value(net, 4000, 4, seed=bodies) > 1e-4


def test_shared_interactions_and_short_windows() -> None:
    net = AutoregressiveInteractions(12, bodies=3, order=3, periodic=False, shared=True)
    assert net.couplings.shape[0] == 1 + 3 * 3 + 3 * 9
    a = torch.zeros(2, 12, dtype=torch.long)
    a[1, 0] = 2  # seen by the next three sites, and no further
    changed = (stirred(net).logits(a).diff(dim=0)[0].abs() > 0).any(1)
    assert changed.tolist() == [False] + [True] * 3 + [False] * 8


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="bodies must be"):
        AutoregressiveInteractions(4, bodies=0)
    with pytest.raises(SystemSizeError, match="too many interactions"):
        AutoregressiveInteractions(40, bodies=5)
