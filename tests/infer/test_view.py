"""A path site as the model presents it: sizes, start, and noise that the path can tell apart."""

from __future__ import annotations

import pyro.distributions as dist
import pytest
import torch

from stochdyn.core import SDE, Matrix
from stochdyn.errors import InvalidInputError
from stochdyn.infer import AutoPathGuide, DiffusionPath, PathIncrements, sample_path
from stochdyn.infer.view import view_site
from tests.infer.exact import F64, TwoStates

TS = torch.linspace(0, 1, 6, dtype=F64)
WIDE = torch.tensor([[0.6, 0.2, 0.3], [0.0, 0.4, -0.5]], dtype=F64)


def test_sizes_of_a_path_with_memory():
    sde = SDE(lambda t, x: -x, WIDE, TwoStates())
    view = view_site(PathIncrements(sde, torch.ones(2, dtype=F64), TS).expand([4]), "x")
    assert (view.dim, view.state_size, view.batch()) == (2, 2 + 3 * 2, (4,))
    assert view.zero_increments().shape == (5, 4, 3)
    assert view.reference().shape == (6, 4, 8)
    assert view.value().shape == (4, 5, 3)
    assert view.start is None


@pytest.mark.parametrize("varying", [False, True])
def test_wide_noise_is_squared_without_changing_the_law(varying):
    diffusion = (lambda t, x: Matrix(WIDE * (1 + x[..., :1, None] ** 2))) if varying else WIDE
    path = DiffusionPath(SDE(lambda t, x: -x, diffusion), torch.ones(2, dtype=F64), TS).expand([3])
    square = view_site(path, "x").fn
    assert square is not path
    assert square.sde.noise_dim(TS[0], torch.ones(2, dtype=F64)) == 2
    x = path.sample((4,))
    torch.testing.assert_close(square.log_prob(x), path.log_prob(x))


def test_narrower_noise_is_left_alone():
    path = DiffusionPath(SDE(lambda t, x: -x, WIDE[:, :2]), torch.ones(2, dtype=F64), TS)
    assert view_site(path, "x").fn is path


def model(noise_space):
    start = dist.LogNormal(torch.zeros(1, dtype=F64), 0.3).to_event(1)
    x = sample_path("x", SDE(lambda t, x: -x, 1.0), start, TS, noise_space=noise_space)
    return x


def test_constrained_start_in_state_space_is_told():
    with pytest.raises(InvalidInputError, match="noise_space=True"):
        AutoPathGuide(model)(None)


def test_constrained_start_in_noise_space_is_left_to_the_rest():
    guide = AutoPathGuide(model, hidden=())
    values = guide(True)
    assert bool(values["x_0"] > 0)
    assert "x_0" in guide.rest.prototype_trace.nodes
    torch.testing.assert_close(values["x"][0], values["x_0"])
