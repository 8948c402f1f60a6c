"""Couplings of pairs: one law in scoring and sampling, right scores, and every two-site change within reach."""

from __future__ import annotations

import pytest
import torch

from stochdyn.errors import InvalidInputError
from stochdyn.povm import Ansatz, AutoregressiveTransformer, Tetrahedral
from stochdyn.povm.ansatz import PairCouplings
from stochdyn.povm.dynamics import Averages, tdvp_velocity
from stochdyn.povm.systems import ising
from stochdyn.testing import AnsatzSuite
from tests.povm.laws import STRINGS, stirred


def net(pairs: str | None, strings: str = "natural") -> AutoregressiveTransformer:
    torch.manual_seed(0)
    return AutoregressiveTransformer(4, layers=1, width=8, heads=2, strings=STRINGS[strings], pairs=pairs)


class TestAllPairs(AnsatzSuite):
    """A block for every pair of steps."""

    def make(self) -> Ansatz:
        return stirred(net("all", "reflections"))


class TestDistances(AnsatzSuite):
    """A block for every distance."""

    def make(self) -> Ansatz:
        return stirred(net("distance", "translations"))


@pytest.mark.parametrize("shared", [True, False])
def test_the_matrix_and_the_steps_are_the_sum_of_the_definition(shared: bool) -> None:
    pairs = PairCouplings(4, 3, shared).double()
    with torch.no_grad():
        pairs.blocks.normal_()
    b = torch.randint(3, (6, 4))
    whole = pairs(b)
    for i in range(4):
        wanted = torch.zeros(6, 3, dtype=torch.float64)
        for j in range(i):
            block = pairs.blocks[i - j - 1] if shared else pairs.blocks[i * (i - 1) // 2 + j]
            wanted += block[:, b[:, j]].mT
        assert torch.allclose(whole[:, i], wanted)
        assert torch.allclose(pairs.step(b[:, :i], i), wanted)


@pytest.mark.parametrize("pairs", ["all", "distance"])
def test_the_first_change_of_a_product_state_by_two_site_terms_is_in_reach(pairs: str) -> None:
    """With a block a pair the residual is zero; a ring's closing bond has a distance of its own."""
    model, povm = ising(4, field=0.7), Tetrahedral()
    operator = model.master_operator(povm)
    residuals = {}
    for kind in (pairs, None):
        state = net(kind).double().set_product_state(povm, "x+")
        residuals[kind] = tdvp_velocity(Averages(state, operator, None), rcond=1e-12).residual
    assert residuals[pairs] < (1e-6 if pairs == "all" else 0.05)
    assert residuals[None] > 2 * residuals[pairs]


def test_unknown_pairs_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="pairs is unknown"):
        net("nearest")
