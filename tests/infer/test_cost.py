"""What a step of inference costs: two runs of the model, and no path that is integrated in vain."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

from stochdyn.core import SDE, Scalar
from stochdyn.infer import AutoPathGuide, sample_path
from tests.infer.exact import F64, TwoStates

TS = torch.linspace(0, 1, 21, dtype=F64)
MODES = {
    "fitted": {},
    "network": {"hidden": (4,)},
    "recomputed": {"feedback": "recomputed"},
    "amortised": {"amortised": True, "context": 3},
}
NOISES = {"state space": (None, None), "noise space": (None, True), "memory": (TwoStates(past=True), None)}


class Drift(nn.Module):
    """A drift that counts how often it is asked for one step of a time loop."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = 0

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        self.steps += int(t.ndim == 0)
        return -x


class Model:
    def __init__(self, noise, noise_space, random_start, latents):
        self.drift, self.runs, self.latents = Drift(), 0, latents
        self.noise, self.noise_space = noise, noise_space
        zero = torch.zeros(1, dtype=F64)
        self.start = dist.Normal(zero, 1.0).to_event(1) if random_start else zero

    def __call__(self, y):
        self.runs += 1
        scale = torch.tensor(0.5, dtype=F64)
        if self.latents:
            scale = pyro.sample("scale", dist.LogNormal(scale, 0.3))
        sde = SDE(self.drift, Scalar(scale), self.noise)
        x = sample_path("x", sde, self.start, TS, noise_space=self.noise_space)
        pyro.sample("y", dist.Normal(x[..., 4::4, 0], 0.1).to_event(1), obs=y)


@pytest.mark.parametrize("latents", [False, True], ids=["path alone", "parameter"])
@pytest.mark.parametrize("random_start", [False, True], ids=["fixed", "random"])
@pytest.mark.parametrize("noise", NOISES, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_a_step_runs_the_model_twice_and_each_path_once(mode, noise, random_start, latents):
    model = Model(*NOISES[noise], random_start, latents)
    guide = AutoPathGuide(model, **{"hidden": (), **MODES[mode]})
    elbo = Trace_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
    y = torch.zeros(5, dtype=F64)
    guide(y)
    model.runs = model.drift.steps = 0
    svi.step(y)
    assert model.runs <= 2
    # The path that is drawn, and for an encoder the one without noise at which it reads the data; the rest are a few
    # single evaluations that look at shapes.
    loops = 2 if mode == "amortised" else 1
    assert model.drift.steps <= loops * 20 + 8
    model.runs = model.drift.steps = 0
    with torch.no_grad():
        guide(y)
    assert model.runs == 1


def test_several_paths_are_asked_for_one_after_the_other():
    runs = []

    def model(y):
        runs.append(1)
        u = sample_path("u", SDE(lambda t, x: -x, 0.5), torch.zeros(1, dtype=F64), TS)
        v = sample_path("v", SDE(lambda t, x: u[..., 0, :] - x, 0.5), torch.zeros(1, dtype=F64), TS)
        pyro.sample("y", dist.Normal(u[..., -1, 0] + v[..., -1, 0], 0.1), obs=y)

    y = torch.tensor(0.3, dtype=F64)
    for options in ({}, {"feedback": "recomputed"}):
        guide = AutoPathGuide(model, hidden=(), **options)
        guide(y)
        runs.clear()
        guide(y)
        assert len(runs) == 2
