"""Nothing that repeats waits for the device: every time loop, and a step of training of every objective of the package."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.bridges import BridgeMatching, LinearDrift, Snapshots
from stochdyn.bridges.refinement.projection import DriftMatching
from stochdyn.core import draw_increments
from stochdyn.core.sde.grids import step_sizes
from stochdyn.core.sde.solvers import run_loop
from stochdyn.fractional import (
    GaussianELBO,
    GaussianPosterior,
    LatentSDE,
    MarkovNoise,
    Series,
    VideoModel,
    VideoNetworks,
)
from stochdyn.infer import AutoPathGuide, sample_path
from stochdyn.interpolants import (
    OU,
    VP,
    AugmentedDiffusion,
    DiffusionEvidence,
    FieldNetwork,
    ForecastRegression,
    Interpolant,
    InterpolantRegression,
    MaxMinBridge,
    PointSource,
    PopulationRegression,
    Populations,
    PotentialNetwork,
    ScoreMatching,
    SetEncoder,
    exponential_ode,
    exponential_sde,
    integrate_ode,
    integrate_sde,
    time_grid,
)
from stochdyn.nonequilibrium import NEEP, CurrentNetwork, ShortTimeTUR, SteadyScore, SteadyScoreMatching
from stochdyn.objectives import ForwardResidual, GaussianObservations, Objective, PathELBO
from stochdyn.testing import check_asynchronous
from tests.core.laws import F64, ExactMemory

TS = torch.linspace(0, 1, 11)


# ---------------------------------------------------------------------------------------------- time loops
@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("control", ["none", "drift", "precision"])
@pytest.mark.parametrize("noise", ["Brownian", "memory"])
@pytest.mark.parametrize(
    ("method", "diffusion"),
    [("euler", 0.5), ("heun", 0.5), ("euler", torch.sin), ("heun", torch.sin), ("milstein", torch.sin)],
)
def test_the_time_loop_reads_no_values(
    method: str, diffusion: Any, noise: str, control: str, differentiated: bool
) -> None:
    g = diffusion if isinstance(diffusion, float) else lambda t, x: 2 + diffusion(x)
    memory = ExactMemory([1.0], [0.5]) if noise == "memory" else None
    sde = sd.SDE(lambda t, x: -x, g, memory)
    if control != "none":
        u = lambda t, z: z[..., :2]  # noqa: E731
        sde = sde.controlled(u, (lambda t, z: 1 + z[..., :2] ** 2) if control == "precision" else None)
    ts = torch.linspace(0, 1, 5, dtype=F64)
    x0 = torch.ones(3, 2, dtype=F64, requires_grad=differentiated)
    dw, memory0 = draw_increments(sde, x0, ts)
    dt = step_sizes(ts, F64)

    def run() -> None:
        x = run_loop(sde, x0, ts, dt, dw, memory0, method, False).x
        if differentiated:
            torch.autograd.grad(x.square().sum(), x0)

    check_asynchronous(run)


def flow(t: Tensor, x: Tensor) -> Tensor:
    return -x


@pytest.mark.parametrize("method", ["euler", "midpoint", "heun", "rk4"])
@pytest.mark.parametrize("inside", [(False, False), (True, True)])
def test_a_flow_reads_its_grid_alone(method: str, inside: tuple[bool, bool]) -> None:
    x = torch.ones(3, 2)
    places = waits(lambda: integrate_ode(flow, x, time_grid(6), method, inside=inside))
    assert places == waits(lambda: integrate_ode(flow, x, time_grid(12), method, inside=inside))


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_a_reverse_sde_reads_its_grid_alone(method: Any) -> None:
    x = torch.ones(3, 2)
    places = waits(lambda: integrate_sde(flow, 0.3, x, time_grid(6), method))
    assert places == waits(lambda: integrate_sde(flow, 0.3, x, time_grid(12), method))


@pytest.mark.parametrize("run", [exponential_ode, exponential_sde])
def test_an_exponential_integrator_reads_its_grid_alone(run: Callable[..., Tensor]) -> None:
    x, process = torch.ones(3, 2), VP()
    places = waits(lambda: run(process, flow, x, process.grid(6)))
    assert places == waits(lambda: run(process, flow, x, process.grid(12)))


def waits(function: Callable[[], object]) -> str:
    """Return where a computation waits, in words."""
    try:
        check_asynchronous(function)
    except AssertionError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------ steps of training
class Net(nn.Module):
    """A small network of time and state."""

    def __init__(self, out: int = 2) -> None:
        super().__init__()
        self.layers = nn.Linear(3, out)

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.layers(torch.cat([t.expand(*x.shape[:-1], 1), x], -1)).tanh()


def path_elbo(**options: Any) -> PathELBO:
    prior = sd.DiffusionMeasure(torch.zeros(2), sd.SDE(lambda t, x: -x, 0.5), **options)
    net = Net()
    posterior = prior.controlled(net)
    posterior.net = net
    likelihood = GaussianObservations(TS, torch.tensor([0.5, 1.0]), torch.zeros(2, 2), 0.3)
    return PathELBO(posterior, prior, likelihood)


def forward_residual(method: Any) -> ForwardResidual:
    class Mean(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Parameter(torch.ones(1))

        def forward(self, t: Tensor) -> Tensor:
            return self.start * torch.exp(-t)[..., None]

    learnt = sd.core.GaussianFlow(Mean(), lambda t: 0.5 * torch.eye(1).expand(*t.shape, 1, 1))
    return ForwardResidual(learnt, sd.FokkerPlanck(sd.SDE(lambda t, x: -x, 1.0)), method=method)


def latent(posterior: Any) -> tuple[Objective, Any]:
    noise: Any = "brownian" if posterior == "matching" else "fractional"
    model = LatentSDE(1, 2, TS, posterior=posterior, noise=noise, drift=(8,), obs_scale=0.5)
    return model, Series.regular(TS[::5], torch.randn(2, 3, 1))


def gaussian_elbo() -> tuple[Objective, Any]:
    drift = sd.fractional.AffineDrift(-torch.eye(1))
    prior = sd.DiffusionMeasure(torch.zeros(1), sd.SDE(drift, 1.0, MarkovNoise(0.7, 5, horizon=1.0, dt=0.05)))
    data = GaussianObservations(TS, TS[-1:], torch.tensor([0.5]), 0.1)
    return GaussianELBO(GaussianPosterior(prior, TS), data), None


def matching(coupling: str) -> tuple[Objective, Any]:
    clouds = Snapshots([0.0, 1.0, 2.0], [torch.randn(20, 2) + k for k in range(3)])
    bridge = BridgeMatching(
        clouds, 0.5, width=8, num_pairs=32, batch_size=16, refresh=100, num_steps=4, coupling=coupling
    )
    return bridge.regression, None


def populations() -> tuple[Objective, Any]:
    data = Populations([torch.randn(30, 2) for _ in range(4)], [torch.randn(30, 2) for _ in range(4)])
    return PopulationRegression(2, SetEncoder(2), "independent"), next(
        iter(torch.utils.data.DataLoader(data, 4))
    )


def steady_score(method: str, noise_level: float | None = None) -> tuple[Objective, Any]:
    score = SteadyScore(PLANE, hidden=(8,))
    return SteadyScoreMatching(
        sd.SDE(lambda t, x: -x, 2**0.5), score, 0.1, method, noise_level=noise_level
    ), PLANE


PLANE = torch.randn(8, 2)
PAIRS = torch.randn(8, 2, 2)

OBJECTIVES: dict[str, Callable[[], tuple[Objective, Any]]] = {
    "PathELBO": lambda: (path_elbo(), None),
    "PathELBO with a start": lambda: (path_elbo(start_time=0.0), None),
    "PathELBO with steps of its own": lambda: (path_elbo(dt=0.05), None),
    "ForwardResidual": lambda: (forward_residual("exact"), (torch.tensor(0.5), torch.randn(8, 1))),
    "ForwardResidual by probes": lambda: (
        forward_residual("hutchinson"),
        (torch.tensor(0.5), torch.randn(8, 1)),
    ),
    "LatentSDE, tight": lambda: latent("tight"),
    "LatentSDE, gaussian": lambda: latent("gaussian"),
    "LatentSDE, linearised": lambda: latent("linearised"),
    "LatentSDE, matching": lambda: latent("matching"),
    "GaussianELBO": gaussian_elbo,
    "VideoModel": lambda: (
        VideoModel(
            4, size=16, networks=VideoNetworks(latents=2, content=8, features=8, widths=(4, 8), hidden=(16,))
        ),
        sd.datasets.moving_digits(2, num_frames=4, size=16),
    ),
    "InterpolantRegression": lambda: (
        InterpolantRegression(Interpolant(), velocity=Net(), score=Net()),
        (PLANE, PLANE.flip(0)),
    ),
    "ScoreMatching": lambda: (ScoreMatching(OU(), score=Net()), PLANE),
    "ScoreMatching with a residual": lambda: (
        ScoreMatching(OU(), PotentialNetwork(OU(), 2), fp_weight=0.1, residual="hutchinson"),
        PLANE,
    ),
    "MaxMinBridge": lambda: (
        MaxMinBridge(FieldNetwork(2), FieldNetwork(2, condition_dim=2), 0.1),
        (PLANE, PLANE.flip(0)),
    ),
    "ForecastRegression": lambda: (
        ForecastRegression(PointSource(0.5), FieldNetwork(2, condition_dim=2)),
        (PLANE, PLANE.flip(0)),
    ),
    "AugmentedDiffusion": lambda: (AugmentedDiffusion(FieldNetwork(2), 2, degrees=16.0), PLANE),
    "DiffusionEvidence": lambda: (
        DiffusionEvidence(PotentialNetwork(OU(), 2), OU().prior(torch.zeros(2))),
        PLANE,
    ),
    "PopulationRegression": populations,
    "MatchingRegression": lambda: matching("independent"),
    "NEEP": lambda: (NEEP(CurrentNetwork(PLANE, (8,)), 0.01), PAIRS),
    "ShortTimeTUR": lambda: (ShortTimeTUR(CurrentNetwork(PLANE, (8,)), 0.01), PAIRS),
    "SteadyScoreMatching": lambda: steady_score("exact"),
    "SteadyScoreMatching by probes": lambda: steady_score("hutchinson"),
    "SteadyScoreMatching by denoising": lambda: steady_score("exact", 0.1),
    "DriftMatching": lambda: (
        DriftMatching(LinearDrift(2), torch.eye(2), 1.0, 8.0),
        (torch.rand(8, 1), PLANE, PLANE.flip(0), torch.full((8,), 0.125)),
    ),
}

#: Objectives whose work is done on the host on purpose.
ON_HOST = {
    "AmortisedRates": "panels are simulated jump by jump until the last jump, whose number isn't known beforehand",
    "StationaryResidual": "strings of outcomes are told apart on the host, and their number decides shapes",
    "TrajectoryELBO": "the place of every point among the nodes of a cloud is searched on the host",
}


def objectives() -> Iterator[type[Objective]]:
    """Find all objectives of the package."""
    for module in pkgutil.walk_packages(sd.__path__, "stochdyn."):
        if "testing" in module.name:
            continue
        for thing in vars(importlib.import_module(module.name)).values():
            own = inspect.isclass(thing) and issubclass(thing, Objective) and thing.__module__ == module.name
            if own and not inspect.isabstract(thing):
                yield thing


def test_no_objective_is_forgotten() -> None:
    named = {name.split(",")[0].split(" ")[0] for name in OBJECTIVES} | set(ON_HOST)
    assert {kind.__name__ for kind in objectives()} <= named


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_of_training_does_not_wait(name: str) -> None:
    torch.manual_seed(0)
    objective, batch = OBJECTIVES[name]()
    # The size of an embedding is drawn on the CPU whatever the device.
    skip = "populations/regression.py" if name == "PopulationRegression" else ""
    check_asynchronous(lambda: objective(batch).loss.backward(), skip)


@pytest.mark.parametrize("feedback", ["learnt", "recomputed"])
def test_a_step_of_a_path_guide_does_not_wait(feedback: str) -> None:
    def model(ts: Tensor, y: Tensor) -> None:
        rate = pyro.sample("rate", dist.LogNormal(0.0, 0.3))
        x = sample_path("x", sd.SDE(lambda t, x: -rate * x, 1.0), torch.zeros(1), ts)
        pyro.sample("y", dist.Normal(x[..., -1, 0], 0.1), obs=y)

    options = {} if feedback == "learnt" else {"feedback": feedback, "rest": AutoNormal}
    bound = Trace_ELBO()(model, AutoPathGuide(model, hidden=(), **options))
    y = torch.tensor(0.5)
    check_asynchronous(lambda: bound(TS, y).backward())


def test_the_checker_sees_what_waits() -> None:
    x = torch.randn(3)
    for wait in (
        lambda: x.tolist(), lambda: float(x.sum()), lambda: x[x > 0], lambda: x.cpu(), lambda: bool((x > 0).all()),
        lambda: torch.linalg.cholesky(torch.eye(2)), lambda: x.nonzero(), lambda: torch.unique(x),
        lambda: torch.repeat_interleave(x, torch.tensor([1, 2, 3])),
    ):  # fmt: skip
        assert waits(wait).startswith("it waits for the device"), inspect.getsource(wait)
    assert not waits(lambda: torch.where(x > 0, x, 0.0).cumsum(0))
