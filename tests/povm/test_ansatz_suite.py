"""Every ansatz passes the conformance suite, and broken ones are caught."""

from __future__ import annotations

import pytest
import torch

from stochdyn.povm import Ansatz, FullTable
from stochdyn.testing import AnsatzSuite
from tests.povm.laws import STRINGS, interactions, table, transformer, window


class TestTransformer(AnsatzSuite):
    """Two layers, one string."""

    def make(self) -> Ansatz:
        return transformer(2)


class TestSymmetricTransformer(AnsatzSuite):
    """A group of strings with relabelled outcomes."""

    def make(self) -> Ansatz:
        return transformer(1, STRINGS["everything"])


class TestWindow(AnsatzSuite):
    """A window that sees the first sites around the ring, and reflections."""

    def make(self) -> Ansatz:
        return window(2, STRINGS["reflections"])


class TestInteractions(AnsatzSuite):
    """Up to three sites, and reflections."""

    def make(self) -> Ansatz:
        return interactions(3, STRINGS["reflections"])


class TestTable(AnsatzSuite):
    """One parameter a string."""

    def make(self) -> Ansatz:
        return table(3)


class PlainTable(Ansatz):
    """The least that an ansatz must have: scores and their sums come from the base class."""

    def __init__(self) -> None:
        super().__init__(3, 4)
        self.inner = table(3)

    def log_prob(self, a):
        return self.inner.log_prob(a)

    def draw(self, n, generator, stratified):
        return self.inner.draw(n, generator, stratified)

    def set_site_probabilities(self, p):
        self.inner.set_site_probabilities(p)


class TestDefaults(AnsatzSuite):
    """What the base class gives."""

    def make(self) -> Ansatz:
        return PlainTable()


class Unnormalised(FullTable):
    def log_prob(self, a):
        return super().log_prob(a) * 1.01


class Biased(FullTable):
    def draw(self, n, generator, stratified):
        a, _ = super().draw(n, generator, stratified)
        a = (a + (torch.arange(n) % 8 == 0)[:, None]) % 4
        return a, self.log_prob(a).detach()


class Doubled(FullTable):
    def scores(self, a):
        log_p, scores = super().scores(a)
        return log_p, 2 * scores


@pytest.mark.parametrize(
    ("broken", "test"),
    [
        (Unnormalised, "test_probabilities_sum_to_one"),
        (Biased, "test_samples_follow_the_law_that_is_scored"),
        (Doubled, "test_scores_are_gradients_of_single_samples"),
    ],
)
def test_broken_ones_are_caught(broken: type[FullTable], test: str) -> None:
    class Suite(AnsatzSuite):
        def make(self) -> Ansatz:
            net = broken(3).double()
            net.load_state_dict(table(3).state_dict())
            return net

    with pytest.raises(AssertionError):
        getattr(Suite(), test)()
