"""Positions under a reference with momentum: particles against the Gaussian solution, and smooth paths."""

from __future__ import annotations

import pytest
import torch

import stochdyn as sd
from stochdyn.bridges import PartialBridge, PartialGaussianBridge, Snapshots, momentum

F64 = torch.float64
MEANS, COVS = (0.0, 1.0, 0.5, 2.0), (0.3, 0.2, 0.5, 0.1)
MATRIX, NOISE = momentum(1, friction=0.3, diffusion=0.7)


def quantiles(n):
    q = torch.special.ndtri((torch.arange(n, dtype=F64) + 0.5) / n)
    return q / q.square().mean().sqrt()


def snapshots(n=60):
    clouds = [(m + v**0.5 * quantiles(n))[:, None] for m, v in zip(MEANS, COVS, strict=True)]
    return Snapshots([0.0, 1.0, 2.0, 3.0], clouds)


@pytest.fixture(scope="module")
def law():
    zero, one = torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)
    return PartialBridge(snapshots(), MATRIX, NOISE, zero, one, num_hidden=24)


@pytest.fixture(scope="module")
def exact():
    return PartialGaussianBridge(
        torch.arange(4, dtype=F64), torch.tensor(MEANS, dtype=F64)[:, None],
        torch.tensor(COVS, dtype=F64)[:, None, None], torch.eye(1, 2, dtype=F64), MATRIX, NOISE, torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64),
    )  # fmt: skip


def test_marginals_are_met(law):
    assert law.marginal_errors.max() <= 1e-4
    assert law.effective_draws().min() > 5


def test_velocities_are_those_of_the_gaussian_solution(law, exact):
    mean, cov = exact.states()
    for k in range(4):
        slope = cov[k, 1, 0] / cov[k, 0, 0]
        expected = mean[k, 1] + slope * (law.snapshots.samples[k][:, 0] - mean[k, 0])
        found = law.hidden_means(k)[:, 0]
        noise = ((cov[k, 1, 1] - slope * cov[k, 0, 1]) / law.effective_draws()[k]).sqrt()
        inner = slice(10, 50)  # the outermost quantiles stand for tails that sixty points cut off
        assert (found - expected)[inner].abs().max() < 5 * noise
        assert abs((found - expected)[inner].mean()) < 5 * noise / 40**0.5 + 0.03


def test_paths_pass_through_the_particles_and_are_smooth(law):
    ts = torch.linspace(0, 3, 31, dtype=F64)
    x = law.sample(ts, 1000, torch.Generator().manual_seed(0)).x
    for k in range(4):
        at = x[:, 10 * k, 0]
        gap = (at[:, None] - law.snapshots.samples[k][:, 0]).abs().min(1).values
        assert gap.max() < 1e-6
        assert abs(at.mean() - MEANS[k]) < 5 * (COVS[k] / 1000) ** 0.5
    miss = x[:, 1:, 0] - x[:, :-1, 0] - 0.05 * (x[:, 1:, 1] + x[:, :-1, 1])
    assert abs(miss.std().item() / (0.49 * 0.1**3 / 12) ** 0.5 - 1) < 0.05


def test_positions_remember_as_in_the_gaussian_solution(law, exact):
    x = law.sample(torch.arange(4, dtype=F64), 4000, torch.Generator().manual_seed(1)).x[..., 0]
    joint = torch.linalg.inv(exact.joint_precision())[::2, ::2]
    found, want = torch.corrcoef(x.mT), joint / torch.outer(joint.diagonal().sqrt(), joint.diagonal().sqrt())
    assert (found - want).abs().max() < 0.08


def test_crossing_groups_go_straight_on():
    # two groups cross; a reference without momentum would let them turn back, one with momentum doesn't
    g = torch.Generator().manual_seed(0)
    spread = 0.05
    lanes = [
        torch.tensor([-2.0, 2.0]),
        torch.tensor([-1.0, 1.0]),
        torch.tensor([0.0, 0.0]),
        torch.tensor([1.0, -1.0]),
        torch.tensor([2.0, -2.0]),
    ]
    clouds = [(lane.repeat(20) + spread * torch.randn(40, generator=g))[:, None].double() for lane in lanes]
    law = PartialBridge(
        Snapshots([0.0, 1.0, 2.0, 3.0, 4.0], clouds),
        *momentum(1, diffusion=0.3),
        num_hidden=30,
        num_rounds=3,
        max_iterations=2000,
    )
    x = law.sample(torch.arange(5, dtype=F64), 500, torch.Generator().manual_seed(1)).x[..., 0]
    crossed = ((x[:, 0] < 0) == (x[:, 4] > 0)).double().mean()
    assert crossed > 0.9


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"drift_matrix": torch.zeros(1, 1, dtype=F64)}, sd.errors.ShapeError, "drift_matrix"),
        ({"diffusion": torch.tensor([[1.0], [0.0]], dtype=F64)}, sd.errors.SingularDiffusionError, "reach"),
        ({"num_hidden": 1}, sd.errors.InvalidInputError, "num_hidden"),
    ],
)
def test_bad_input(options, error, words):
    with pytest.raises(error, match=words):
        PartialBridge(**{"snapshots": snapshots(5), "drift_matrix": MATRIX, "diffusion": NOISE, **options})


def test_too_few_sweeps_are_reported():
    with pytest.warns(sd.errors.ConvergenceWarning, match="sweeps"):
        PartialBridge(snapshots(10), MATRIX, NOISE, max_iterations=2, num_rounds=1)


def test_the_precision_is_that_of_the_snapshots() -> None:
    g = torch.Generator().manual_seed(0)
    snaps = Snapshots([0.0, 1.0, 2.0], [torch.randn(10, 1, generator=g) + k for k in range(3)])
    law = PartialBridge(snaps, *momentum(1), num_hidden=10, initial_mean=torch.zeros(2, dtype=torch.float64))
    assert law.sample([0.5], 2, generator=0).x.dtype == torch.float32
