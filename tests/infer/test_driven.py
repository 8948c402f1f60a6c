"""A path that a guide has integrated is used again only while the equation is the same to the bit."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO

from stochdyn.core import SDE, integrate
from stochdyn.core.sde.solvers import full_state
from stochdyn.infer import AutoPathGuide, PathIncrements, driven, sample_path
from stochdyn.infer.driven import DrivenPath
from tests.infer.exact import F64, TwoStates

TS = torch.linspace(0, 1, 21, dtype=F64)


def remembered_path(handed, sde, ts, x0, memory0, method="euler"):
    """Return the path that is handed on with the increments, for a model that presents the given equation."""
    dw, path = handed
    return path.path(PathIncrements(sde, x0, ts, memory0, method), dw)


def driven_pair(sde, ts=TS, x0=None, dtype=F64, batch=(3,)):
    """Return increments and what goes with them, the start, the memory and the path."""
    x0 = torch.ones(*batch, 1, dtype=dtype) if x0 is None else x0
    dw = torch.randn(*batch, len(ts) - 1, 1, dtype=dtype) * 0.2
    factor = sde.noise.initial_factor(dtype=dtype, device=ts.device)
    memory0 = None if factor is None else torch.randn(*batch, 1, 2, dtype=dtype) @ factor
    run = integrate(sde, x0, ts, dw.movedim(-2, 0), memory0)
    path = DrivenPath()
    path.set(PathIncrements(sde, x0, ts, memory0), dw, run.x, full_state(run.x, run.memory))
    return (dw, path), x0, memory0, run.x


def equation(rate=0.7, scale=0.5, noise=None):
    return SDE(lambda t, x: -rate * x, scale, noise)


@pytest.mark.parametrize("noise", [None, TwoStates(), TwoStates(past=True)], ids=["none", "memory", "past"])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_same_equation_gets_its_path_back(noise, dtype):
    dw, x0, memory0, x = driven_pair(equation(noise=noise), dtype=dtype)
    again = remembered_path(dw, equation(noise=noise), TS, x0, memory0)
    assert again is x
    fresh = integrate(equation(noise=noise), x0, TS, dw[0].movedim(-2, 0), memory0).x
    torch.testing.assert_close(again, fresh, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=1e-7)


def test_start_may_come_without_the_batch():
    dw, _, _, x = driven_pair(equation())
    assert remembered_path(dw, equation(), TS, torch.ones(1, dtype=F64), None) is x


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("part", ["rate", "scale"])
def test_a_slightly_changed_parameter_is_noticed(part, dtype):
    dw, x0, _, _ = driven_pair(equation(), dtype=dtype)
    # a relative change of 1e-5 moves a step of the path by 1e-7, less than a tolerance on states can tell
    near = {"rate": 0.7, "scale": 0.5}
    near[part] *= 1 + 1e-5
    assert remembered_path(dw, equation(**near), TS, x0, None) is None


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_changed_memory_is_noticed(dtype):
    noise = TwoStates(past=True)
    dw, x0, memory0, x = driven_pair(equation(noise=noise), dtype=dtype)
    assert remembered_path(dw, equation(noise=noise), TS, x0, memory0) is x
    assert remembered_path(dw, equation(noise=noise), TS, x0, memory0 * (1 + 1e-5)) is None
    assert remembered_path(dw, equation(noise=noise), TS, x0, None) is None
    other = TwoStates(noise.weights * (1 + 1e-5), past=True)
    assert remembered_path(dw, equation(noise=other), TS, x0, memory0) is None
    assert remembered_path(dw, equation(), TS, x0, None) is None


def test_changed_start_and_grid_are_noticed():
    dw, x0, _, _ = driven_pair(equation())
    assert remembered_path(dw, equation(), TS, x0 + 1e-9, None) is None
    assert remembered_path(dw, equation(), TS * (1 + 1e-9), x0, None) is None
    assert remembered_path(dw, equation(), TS[:-1], x0, None) is None
    assert remembered_path(dw, equation(), TS, torch.ones(3, 2, dtype=F64), None) is None


def test_parameters_changed_in_place_are_noticed():
    rate = torch.tensor(0.7, dtype=F64)
    sde = equation(rate)
    dw, x0, _, x = driven_pair(sde)
    assert remembered_path(dw, sde, TS, x0, None) is x
    rate.add_(0.1)
    assert remembered_path(dw, sde, TS, x0, None) is None


def test_a_path_without_graph_does_not_swallow_gradients():
    rate = torch.tensor(0.7, dtype=F64, requires_grad=True)
    with torch.no_grad():
        dw, x0, _, x = driven_pair(equation(rate))
    assert remembered_path(dw, equation(rate), TS, x0, None) is None
    with torch.no_grad():
        assert remembered_path(dw, equation(rate), TS, x0, None) is x


def test_another_solver_or_another_control_is_noticed():
    handed, x0, _, _ = driven_pair(equation())
    assert remembered_path(handed, equation(), TS, x0, None, "heun") is None
    steered = equation().controlled(lambda t, z: 1.0 + 0 * z[..., :1])
    assert remembered_path(handed, steered, TS, x0, None) is None
    tighter = equation().controlled(None, lambda t, z: 1.0 + 0 * z[..., :1])
    assert remembered_path(handed, tighter, TS, x0, None) is None


def test_other_increments_have_no_path():
    (dw, path), x0, _, x = driven_pair(equation())
    assert remembered_path((dw + 1e-9, path), equation(), TS, x0, None) is None
    # equal numbers will do where no derivative is at stake
    assert remembered_path((dw.clone(), path), equation(), TS, x0, None) is x
    assert remembered_path((dw.clone().requires_grad_(), path), equation(), TS, x0, None) is None


def model(y):
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), 0.3))
    x = sample_path(
        "x", SDE(lambda t, x: -rate[..., None] * x, 0.5), torch.ones(1, dtype=F64), TS, noise_space=True
    )
    pyro.sample("y", dist.Normal(x[..., -1, 0], 0.1), obs=y)


@pytest.fixture
def loops(monkeypatch):
    """Count the time loops that the model runs."""
    count = []

    def counted(*args, **kwargs):
        count.append(1)
        return integrate(*args, **kwargs)

    monkeypatch.setattr(driven, "integrate", counted)
    return count


@pytest.mark.parametrize("vectorized", [True, False])
def test_a_model_replayed_by_its_guide_runs_no_loop(loops, vectorized):
    y = torch.tensor(0.3, dtype=F64)
    guide = AutoPathGuide(model, hidden=())
    guide(y)
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorized, max_plate_nesting=0)
    loops.clear()
    elbo.loss(model, guide, y)
    assert len(loops) == 0
    for parameter in guide.parameters():
        parameter.grad = None
    elbo.loss_and_grads(model, guide, y)
    assert len(loops) == 0


def test_a_conditioned_parameter_changes_the_path(loops):
    y = torch.tensor(0.3, dtype=F64)
    guide = AutoPathGuide(model, hidden=())
    guide(y)
    trace = poutine.trace(guide).get_trace(y)
    other = poutine.condition(model, {"rate": trace.nodes["rate"]["value"] * 1.001})
    loops.clear()
    replayed = poutine.trace(poutine.replay(other, trace)).get_trace(y)
    assert len(loops) == 1
    rate = replayed.nodes["rate"]["value"]
    dw = replayed.nodes["x_dw"]["value"]
    assert dw is trace.nodes["x_dw"]["value"]
    fresh = integrate(equation(rate), torch.ones(1, dtype=F64), TS, dw).x
    torch.testing.assert_close(replayed.nodes["x"]["value"], fresh, rtol=1e-13, atol=1e-13)
    mine = integrate(equation(trace.nodes["rate"]["value"]), torch.ones(1, dtype=F64), TS, dw).x
    assert not torch.allclose(replayed.nodes["x"]["value"], mine, rtol=1e-6)
