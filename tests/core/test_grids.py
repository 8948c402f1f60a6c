"""Time grids: gradients through them, one per series, and batches that don't depend on the number of paths."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stochdyn as sd
from stochdyn import testing
from stochdyn.core import Euler, draw_increments, integrate, step_everywhere
from stochdyn.errors import InvalidInputError, ShapeError, TimeGridError
from tests.core.laws import F64, ExactMemory

NOISES: dict[str, Any] = {"Brownian": lambda: None, "memory": lambda: ExactMemory([0.3, 2.0], [0.5, -0.7])}
CONTROLS = ("none", "drift", "precision")


def equation(noise: str, control: str, diffusion: Any = 0.5) -> sd.SDE:
    sde = sd.SDE(lambda t, x: -2 * x + torch.sin(t), diffusion, NOISES[noise]())
    if control == "none":
        return sde
    u = lambda t, z: 0.3 * z[..., :2] * t  # noqa: E731
    return sde.controlled(u) if control == "drift" else sde.controlled(u, lambda t, z: 1 + z[..., :2] ** 2)


@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    ("method", "diffusion"),
    [
        ("euler", 0.5),
        (Euler(checkpoint=True), 0.5),
        ("heun", 0.5),
        ("milstein", lambda t, x: 1 + 0.3 * x.sin()),
    ],
)
def test_simulation_is_differentiable_in_its_times(
    method: Any, diffusion: Any, noise: str, control: str
) -> None:
    """First and second derivatives agree with differences, for every time of the grid."""
    law = sd.DiffusionMeasure(torch.ones(2, dtype=F64), equation(noise, control, diffusion), method=method)

    def end(ts: Tensor) -> Tensor:
        return law.sample(ts, 2, 0).x[..., -1, :].square().sum()

    ts = torch.tensor([0.0, 0.3, 0.45, 1.0], dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(end, ts)
    assert torch.autograd.gradgradcheck(end, ts)


@pytest.mark.parametrize("noise", NOISES)
def test_densities_are_differentiable_in_their_times(noise: str) -> None:
    law = sd.DiffusionMeasure(torch.ones(2, dtype=F64), equation(noise, "none"))
    q = law.controlled(lambda t, z: 0.3 * z[..., :2] * t)
    ts = torch.tensor([0.0, 0.3, 0.45, 1.0], dtype=F64)
    path = q.sample(ts, 3, 0)

    def value(times: Tensor) -> Tensor:
        return q.log_rn(sd.PathSample(times, path.x, path.dw, path.aux, q), law).sum()

    assert torch.autograd.gradcheck(value, ts.clone().requires_grad_())


@pytest.mark.parametrize("sample_shape", [(), (4,)])
@pytest.mark.parametrize("control", CONTROLS)
@pytest.mark.parametrize("noise", NOISES)
def test_every_series_may_have_a_grid_of_its_own(
    noise: str, control: str, sample_shape: tuple[int, ...]
) -> None:
    """A series beside others has the path, the weights and the density that it has alone."""
    sde = equation(noise, control)
    grids = torch.tensor([[0.0, 0.3, 0.45, 1.0], [5.0, 5.1, 5.2, 8.0], [0.0, 1e-3, 2e-3, 1.0]], dtype=F64)
    law = sd.DiffusionMeasure(torch.ones(2, dtype=F64), sde)
    path = law.sample(grids, sample_shape, 1)
    assert path.x.shape == (*sample_shape, 3, 4, 2)
    base = sd.DiffusionMeasure(torch.ones(2, dtype=F64), sde.uncontrolled())
    together = law.log_rn(path, base)
    for i, ts in enumerate(grids):
        residual = path.aux.get("residual")
        e = path.dw[..., i, :, :]
        if residual is not None:
            e = torch.cat([e, residual[..., i, :, :]], -1)
        memory = path.aux["memory"][..., i, 0, :, :] if "memory" in path.aux else None
        alone = integrate(sde, torch.ones(2, dtype=F64), ts, e.movedim(-2, 0), memory)
        torch.testing.assert_close(alone.x.movedim(0, -2), path.x[..., i, :, :])
        if noise == "Brownian":
            single = sd.PathSample(ts, path.x[..., i, :, :], path.dw[..., i, :, :], law=None)
            torch.testing.assert_close(law.log_prob(path)[..., i], law.log_prob(single))
            torch.testing.assert_close(together[..., i], law.log_rn(single, base), rtol=1e-8, atol=1e-8)
        z = law.full_state(path)
        dw, _ = draw_increments(sde, torch.ones(3, 2, dtype=F64), grids)
        free = sde.uncontrolled()
        ahead = step_everywhere(free, grids, z[:-1], dw.reshape(3, *(1,) * len(sample_shape), 3, -1))
        assert ahead.shape == z[1:].shape


@pytest.mark.parametrize("n", [1, 3, 5])
def test_parameters_with_a_batch_make_a_batch_of_paths(n: int) -> None:
    """Whatever the number of paths; also where it is that of the parameters."""
    rate = torch.tensor([[1.0], [2.0], [3.0]], dtype=F64)
    law = sd.DiffusionMeasure(torch.ones(1, dtype=F64), sd.SDE(lambda t, x: -rate * x, 1e-9))
    ts = torch.linspace(0, 1, 5, dtype=F64)
    x = law.sample(ts, n, 0).x
    assert x.shape == (n, 3, 5, 1)
    torch.testing.assert_close(x[..., -1, 0], ((1 - rate[:, 0] / 4) ** 4).expand(n, 3), rtol=1e-6, atol=1e-6)
    assert law.marginal(1.0).sample(2, 0).shape == (2, 3, 1)
    with pytest.raises(ShapeError, match=r"doesn.t take states|batch axes"):
        sd.DiffusionMeasure(torch.ones(2, 1, dtype=F64), law.sde).sample(ts, 4)


def test_a_law_with_a_start_and_a_step_does_not_depend_on_the_grid() -> None:
    """A pulse of the drift between two output times is seen, and the densities are those of the fine path."""
    pulse = lambda t, x: 5.0 * ((t > 0.405) & (t < 0.505)).to(x).expand_as(x) - x  # noqa: E731
    law = sd.DiffusionMeasure(torch.zeros(1, dtype=F64), sd.SDE(pulse, 0.1), start_time=0.0, dt=0.01)
    q = law.controlled(lambda t, x: torch.ones_like(x))
    coarse = q.sample(torch.tensor([0.3, 1.0], dtype=F64), 1000, 0)
    fine = q.sample(torch.linspace(0, 1, 101, dtype=F64), 1000, 1)
    a, b = coarse.x[..., -1, 0], fine.x[..., -1, 0]
    assert abs(float(a.mean() - b.mean())) < 5 * float((a.var() / 1000 + b.var() / 1000).sqrt())
    assert abs(float(law.marginal(1.0).mean) - float(law.sample([0.0, 1.0], 4000, 3).x[:, -1].mean())) < 0.02
    # For a constant control of one, the log ratio on the fine grid is W - T/2.
    assert coarse.fine is not None
    want = coarse.fine.dw.sum((-2, -1)) + 0.5
    torch.testing.assert_close(q.log_rn(coarse, law), want)
    torch.testing.assert_close(coarse.dw[..., 0, 0], coarse.fine.dw[..., 30:, 0].sum(-1))
    with pytest.raises(TimeGridError, match="begins before"):
        law.sample([-0.1, 1.0])
    with pytest.raises(TimeGridError, match="from the start"):
        law.log_prob(sd.PathSample(coarse.ts, coarse.x, coarse.dw))


def test_start_and_marginal_times_are_differentiable() -> None:
    """The time at which a law starts, and the one at which it is asked for, also with steps of its own."""

    def value(start: Tensor, t: Tensor, last: Tensor) -> Tensor:
        law = sd.DiffusionMeasure(
            torch.ones(1, dtype=F64),
            sd.SDE(lambda t, x: -x + t, 0.5),
            start_time=nn.Parameter(start) if not start.requires_grad else start,
            dt=0.1,
        )
        ts = torch.stack([last - 0.5, last])
        return law.sample(ts, 2, 0).x.sum() + law.marginal(t).sample(2, 0).square().sum()

    times = [torch.tensor(t, dtype=F64) for t in (0.03, 0.77, 1.21)]
    testing.check_gradients(value, *times)


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e9])
def test_noise_that_does_not_commute_is_found_in_any_unit(scale: float) -> None:
    """A channel that turns the other: refused for Milstein, whatever the size of a state."""

    def turning(t: Tensor, x: Tensor) -> sd.Matrix:
        zero, one = torch.zeros_like(x[..., 0]), torch.ones_like(x[..., 0])
        rows = torch.stack([torch.stack([scale * one, zero], -1), torch.stack([zero, x[..., 0]], -1)], -2)
        return sd.Matrix(rows)

    law = sd.DiffusionMeasure(torch.zeros(3, 2, dtype=F64), sd.SDE(lambda t, x: -x, turning))
    with pytest.raises(InvalidInputError, match="commut"):
        law.sample([0.0, 0.5, 1.0], 2, method="milstein")
    far = torch.tensor([[1.0, 1.0], [1e12, 1.0]], dtype=F64) * scale
    with pytest.raises(InvalidInputError, match="commut"):
        sd.DiffusionMeasure(far, law.sde).sample([0.0, 0.5, 1.0], 2, method="milstein")


@pytest.mark.parametrize("shared", [False, True])
def test_a_grid_that_changes_is_asked_again(shared: bool) -> None:
    """What is known of a grid is forgotten when it changes: by torch, or through the NumPy array whose memory it shares."""
    array = np.array([0.0, 0.5, 1.0])
    ts = torch.from_numpy(array) if shared else torch.tensor(array)
    law = sd.DiffusionMeasure(
        torch.zeros(1, dtype=F64), sd.SDE(lambda t, x: torch.ones_like(x), 1e-9), dt=0.25
    )
    assert law.sample(ts, (), 0).x[-1].item() == pytest.approx(1.0, abs=1e-6)
    if shared:
        array *= 3
    else:
        ts.mul_(3)
    assert law.sample(ts, (), 0).x[-1].item() == pytest.approx(3.0, abs=1e-6)


def test_what_is_known_of_a_grid_does_not_keep_it() -> None:
    law = sd.DiffusionMeasure(
        torch.zeros(1, dtype=F64), sd.SDE(lambda t, x: -x, 0.5), start_time=-1.0, dt=0.25
    )
    ts = torch.linspace(0, 1, 5, dtype=F64)
    law.sample(ts, 2, 0)
    gone = weakref.ref(ts)
    del ts
    gc.collect()
    assert gone() is None
