"""Paths with a known start: the start is pinned and everything else is free."""

from __future__ import annotations

import pytest
import torch
from torch.distributions import biject_to, transform_to

from stochdyn.core import SDE
from stochdyn.infer import DiffusionPath
from stochdyn.infer.constraints import PinnedPath, PinStart


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
@pytest.mark.parametrize("register", [biject_to, transform_to])
def test_free_points_and_paths_go_round(register, batch):
    start = torch.randn(*batch, 2)
    transform = register(PinnedPath(start))
    free = torch.randn(*batch, 4, 2)
    path = transform(free)
    assert path.shape == (*batch, 5, 2)
    assert torch.equal(path[..., 0, :], start)
    assert torch.equal(transform.inv(path), free)
    assert torch.equal(transform.log_abs_det_jacobian(free, path), torch.zeros(batch))
    assert bool(PinnedPath(start).check(path).all())


def test_shapes_are_told_before_the_transform_runs():
    transform = PinStart(torch.zeros(2))
    assert transform.forward_shape(torch.Size((7, 4, 2))) == (7, 5, 2)
    assert transform.inverse_shape(torch.Size((7, 5, 2))) == (7, 4, 2)


@pytest.mark.parametrize(("start", "free"), [((2,), (3, 4, 2)), ((3, 2), (4, 2)), ((3, 1, 2), (5, 4, 2))])
def test_start_and_free_points_broadcast(start, free):
    path = PinStart(torch.ones(start))(torch.zeros(free))
    assert path.shape == (*torch.broadcast_shapes(start[:-1], free[:-2]), 5, 2)
    assert torch.equal(path[..., 0, :], torch.ones_like(path[..., 0, :]))


def test_check_finds_another_start_and_nan():
    pinned = PinnedPath(torch.ones(2, 1))
    path = torch.ones(2, 3, 1)
    path[1, 0] = 1.1
    assert pinned.check(path).tolist() == [True, False]
    path[1, 0], path[0, 2] = 1.0, torch.nan
    assert pinned.check(path).tolist() == [False, True]


def test_cached_transform_is_the_same_transform():
    transform = PinStart(torch.zeros(1))
    assert transform.with_cache(0) is transform
    cached = transform.with_cache(1)
    free = torch.randn(3, 1)
    assert cached.inv(cached(free)) is free


@pytest.mark.parametrize("random", [True, False])
def test_unconstrained_size_of_a_path(random):
    start = torch.distributions.Normal(torch.zeros(2), 1.0) if random else None
    law = torch.distributions.Independent(start, 1) if start is not None else torch.zeros(2)
    path = DiffusionPath(SDE(lambda t, x: -x, 1.0), law, torch.linspace(0, 1, 6))
    free = biject_to(path.support).inv(path.sample())
    assert free.shape == ((6, 2) if random else (5, 2))
