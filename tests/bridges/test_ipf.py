"""Iterative proportional fitting against the closed form, and in the loop."""

from __future__ import annotations

import math

import pytest
import torch

import stochdyn as sd
from stochdyn.bridges import IPF, IPFBridge, LinearDrift, Snapshots, refine
from stochdyn.bridges.laws import GaussianProcessDrift, NetworkDrift

F64 = torch.float64


def _quantiles(mean: float, variance: float, n: int) -> torch.Tensor:
    """A sample whose moments are nearly those of the law."""
    p = (torch.arange(n, dtype=F64) + 0.5) / n
    z = math.sqrt(2) * torch.erfinv(2 * p - 1)
    return (mean + math.sqrt(variance) * z / z.std(correction=0))[:, None]


@pytest.fixture(scope="module")
def snaps() -> Snapshots:
    return Snapshots([0.0, 1.0], [_quantiles(-0.1, 1.0, 100), _quantiles(0.1, 1.0, 100)])


@pytest.mark.parametrize(
    "learner",
    ["gp", pytest.param(lambda: NetworkDrift(1, 16, steps=80), marks=pytest.mark.slow)],
    ids=["gp", "network"],
)
def test_half_bridges_come_to_the_closed_form(snaps: Snapshots, learner) -> None:
    """Moments of ends and middle, averaged over six runs of 100 paths each; tolerances from the spread of the runs."""
    moments = []
    for seed in range(6):
        bridge = IPFBridge(snaps, diffusion=1.0, dt=0.2, max_iterations=4, learner=learner, seed=seed).solve()
        path = bridge.sample(torch.tensor([0.0, 0.5, 1.0], dtype=F64), 2000, torch.Generator().manual_seed(0))
        first, middle, last = path.x[..., 0].unbind(-1)
        moments.append(
            [float(torch.cov(torch.stack((first, last)))[0, 1]), float(middle.var()), float(last.var())]
        )
    values = torch.tensor(moments, dtype=F64)
    covariance = (math.sqrt(5) - 1) / 2
    exact = torch.tensor([covariance, 0.5 + 0.5 * covariance + 0.25, 1.0], dtype=F64)
    error = values.std(0) / math.sqrt(6)
    assert bool(error.max() < 0.12)
    # a step of 0.2 and regression on 500 increments leave a bias of a few per cent
    assert bool(((values.mean(0) - exact).abs() < 4.5 * error + 0.08).all())
    assert bridge.marginal(0.5).mean.item() == pytest.approx(0.0, abs=0.25)


@pytest.mark.parametrize("drift", [GaussianProcessDrift(variance=1.0), NetworkDrift(1, 16)])
def test_regressions_find_a_smooth_drift(drift) -> None:
    g = torch.Generator().manual_seed(0)
    x = 2 * torch.rand(300, 1, generator=g, dtype=F64) - 1
    t = torch.rand(300, 1, generator=g, dtype=F64)
    noise = 0.01
    drift.fit(t, x, torch.sin(2 * x) + math.sqrt(noise) * torch.randn(300, 1, generator=g, dtype=F64), noise)
    z = torch.linspace(-0.8, 0.8, 9, dtype=F64)[:, None]
    with torch.no_grad():
        torch.testing.assert_close(drift(torch.tensor(0.5), z), torch.sin(2 * z), atol=0.15, rtol=0)


def test_a_prior_mean_is_kept_where_there_are_no_data() -> None:
    drift = GaussianProcessDrift(variance=1.0, mean=lambda t, x: 3 * x)
    x = torch.zeros(3, 1, dtype=F64)
    drift.fit(x, x, x, 0.1)
    far = torch.full((1, 1), 100.0, dtype=F64)
    torch.testing.assert_close(drift(torch.tensor(0.0), far), 3 * far)


def test_stitched_trajectories_go_through_every_particle() -> None:
    clouds = [_quantiles(i, 0.2, 12) for i in range(3)]
    bridge = IPFBridge(Snapshots([0.0, 1.0, 2.0], clouds), diffusion=0.5, dt=0.25, max_iterations=1).solve()
    ts, paths = bridge.stitched(torch.Generator().manual_seed(0))
    assert paths.shape == (36, 9, 1)
    assert ts.tolist() == [0.25 * k for k in range(9)]
    for i, cloud in enumerate(clouds):
        torch.testing.assert_close(paths[12 * i : 12 * i + 12, 4 * i], cloud)


def test_the_loop_runs_with_this_solver() -> None:
    """Ornstein-Uhlenbeck from exact marginals: the estimate comes near, with the noise of few paths."""
    decay = [math.exp(-0.8 * t) for t in (0.0, 0.75, 1.5)]
    clouds = [_quantiles(1 + 2 * c, 0.04 * c**2 + 0.25 * (1 - c**2) / 1.6, 25) for c in decay]
    fit = refine(
        Snapshots([0.0, 0.75, 1.5], clouds),
        LinearDrift(1),
        0.5,
        max_iterations=3,
        dt=0.15,
        method=IPF(max_iterations=4),
    )
    assert float(fit.parameters["matrix"]) == pytest.approx(-0.8, abs=0.35)
    assert float(fit.history.objective[-1]) < 0.3 * float(fit.history.objective[0])
    assert fit.measure.sample(torch.tensor([0.0, 0.3], dtype=F64), 5).x.shape == (5, 2, 1)


def test_bad_input_is_refused(snaps: Snapshots) -> None:
    with pytest.raises(sd.errors.InvalidInputError, match="learner"):
        IPFBridge(snaps, learner="magic")
    with pytest.raises(sd.errors.UnavailableError, match="solve"):
        IPFBridge(snaps).stitched()
    with pytest.raises(sd.errors.UnavailableError, match="one strength"):
        IPFBridge(Snapshots([0.0, 1.0], torch.zeros(2, 3, 2)), diffusion=torch.tensor([1.0, 2.0]))
