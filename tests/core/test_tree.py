"""A Brownian tree: the same path on every grid and in every batch, with the law of Brownian motion."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchsde

import stochdyn as sd
from stochdyn import testing
from stochdyn.core import BrownianTree
from tests.core.laws import F64, log_log_slope, within


def grid(n: int, end: float = 1.0) -> torch.Tensor:
    return torch.linspace(0, end, n + 1, dtype=F64)


def test_finer_grids_refine_the_same_path() -> None:
    tree = BrownianTree(0.0, 2.0, seed=1)
    fine = tree.increments(grid(256, 2.0), (3,), 2)
    for n in (1, 2, 8, 64):
        torch.testing.assert_close(tree.increments(grid(n, 2.0), (3,), 2), fine.reshape(n, -1, 3, 2).sum(1))
    odd = torch.tensor([0.1, 0.37, 1.99], dtype=F64)
    more = torch.tensor([0.0, 0.1, 0.2, 0.37, 1.0, 1.5, 1.99, 2.0], dtype=F64)
    torch.testing.assert_close(tree.values(odd, (3,)), tree.values(more, (3,))[[1, 3, 6]])


def test_a_path_does_not_depend_on_how_many_others_there_are() -> None:
    tree = BrownianTree(0.0, 1.0, seed=1)
    many = tree.values(grid(10), (5, 7), 2)
    torch.testing.assert_close(tree.values(grid(10), (2, 3), 2), many[:, :2, :3])
    assert torch.equal(tree.values(grid(10), 3), tree.values(grid(10), (5,))[:, :3])
    # The generator of a sampler does: this is what the tree is for.
    law = sd.DiffusionMeasure(torch.zeros(1, dtype=F64), sd.SDE(lambda t, x: -x, 1.0))
    assert not torch.equal(law.sample(grid(10), 2, 0).x, law.sample(grid(10), 4, 0).x[:2])


def test_paths_have_the_law_of_brownian_motion() -> None:
    """Covariances min(s, t) at dyadic and at other times, increments without memory, channels and seeds apart."""
    ts = torch.tensor([0.1, 0.5, 0.52, 0.77, 1.0], dtype=F64)
    w = torch.cat([BrownianTree(0.0, 1.0, seed=k).values(ts, 2000, 2) for k in range(2)], 1)
    flat = w.permute(2, 0, 1).reshape(10, 4000)
    wanted = torch.minimum(ts[:, None], ts[None])
    wanted = torch.block_diag(wanted, wanted)
    spread = (wanted.diagonal()[:, None] * wanted.diagonal()[None] + wanted**2).sqrt() / 4000**0.5
    assert bool(((flat @ flat.T / 4000 - wanted).abs() < 5 * spread).all())
    assert within(w.mean(1), torch.zeros(5, 2, dtype=F64), w.std(1) / 4000**0.5)
    torch.testing.assert_close(
        BrownianTree(3.0, 4.0, 1).values(ts + 3, 2), BrownianTree(0.0, 1.0, 1).values(ts, 2)
    )


def test_strong_orders_on_one_path() -> None:
    """Euler's error on the same noise halves with the step for additive noise."""
    tree, law = (
        BrownianTree(0.0, 1.0),
        sd.DiffusionMeasure(torch.zeros(1, dtype=F64), sd.SDE(lambda t, x: torch.cos(3 * x), 0.5)),
    )
    x0 = torch.zeros(100, 1, dtype=F64)

    def end(level: int) -> torch.Tensor:
        ts = grid(2**level)
        return law.drive(ts, x0, tree.increments(ts, 100)).x[:, -1]

    truth, levels = end(11), (4, 5, 6, 7)
    errors = [float((end(n) - truth).square().mean().sqrt()) for n in levels]
    assert abs(log_log_slope([2.0**-n for n in levels], errors) - 1) < 0.15


def test_units_of_trees() -> None:
    testing.check_units(lambda c: BrownianTree(0.0, c, 2).increments(c * grid(7), 3) / c**0.5)


def test_torchsdes_tree_refines_one_path_and_its_batches_differ() -> None:
    """Its tree is one stream for a whole batch, so a path there depends on the size of the batch; hence one of our own."""

    def theirs(size: int, n: int) -> torch.Tensor:
        tree = torchsde.BrownianTree(0.0, torch.zeros(size, 1, dtype=F64), 1.0, entropy=1, tol=1e-4)
        return torch.stack([tree(grid(n)[0], t) for t in grid(n)[1:]])

    torch.testing.assert_close(theirs(2, 4), theirs(2, 8)[1::2])
    assert not torch.allclose(theirs(20, 4), theirs(30, 4)[:, :20])


@pytest.mark.parametrize(
    ("build", "kind", "message"),
    [
        (lambda: BrownianTree(1.0, 1.0), sd.errors.InvalidInputError, "horizon"),
        (lambda: BrownianTree(0.0, 1.0, depth=0), sd.errors.InvalidInputError, "depth"),
        (lambda: BrownianTree(0.0, 1.0, seed="x"), sd.errors.InvalidInputError, "seed"),  # type: ignore[arg-type]
        (lambda: BrownianTree(0.0, 1.0).values([0.5, 1.5]), sd.errors.TimeGridError, "span of the tree"),
    ],
)
def test_bad_trees_are_refused(build: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        build()
