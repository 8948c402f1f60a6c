"""Gaussian snapshots of positions under a reference with momentum."""

from __future__ import annotations

import pytest
import torch

import stochdyn as sd
from stochdyn.bridges import GaussianChainBridge, PartialGaussianBridge

F64 = torch.float64
TIMES = torch.arange(4, dtype=F64)
MEANS = torch.tensor([0.0, 1.0, 0.5, 2.0], dtype=F64)[:, None]
COVS = torch.tensor([0.3, 0.2, 0.5, 0.1], dtype=F64)[:, None, None]
MOMENTUM = torch.tensor([[0.0, 1.0], [0.0, -0.3]], dtype=F64)
NOISE = torch.tensor([[0.0], [0.7]], dtype=F64)
POSITION = torch.eye(1, 2, dtype=F64)


def solved(**options):
    start = {"initial_mean": torch.zeros(2, dtype=F64), "initial_cov": torch.eye(2, dtype=F64)}
    return PartialGaussianBridge(TIMES, MEANS, COVS, POSITION, MOMENTUM, NOISE, **{**start, **options})


def test_marginals_of_the_positions_and_their_memory():
    law = solved()
    mean, cov = law.states()
    assert law.converged
    assert torch.allclose(mean[:, :1], MEANS, rtol=0, atol=1e-12)
    assert torch.allclose(cov[:, :1, :1], COVS, rtol=0, atol=1e-12)
    joint = torch.linalg.inv(law.joint_precision())
    positions = torch.linalg.inv(joint[::2, ::2])
    assert abs(positions[0, 2].item() - 5.16) < 0.005  # not Markov: zero if it were
    for k in range(4):
        assert torch.allclose(joint[2 * k : 2 * k + 2, 2 * k : 2 * k + 2], cov[k], atol=1e-11)


def test_only_positions_are_weighted_against_the_reference():
    # log dQ/dR at the snapshots is a sum of functions of one position each
    law = solved()
    reference = sd.LinearGaussianMeasure(
        MOMENTUM, torch.zeros(2, dtype=F64), NOISE, torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)
    )
    change = law.joint_precision() - torch.linalg.inv(reference.joint_covariance(TIMES))
    off = change.clone()
    off[range(0, 8, 2), range(0, 8, 2)] = 0
    assert off.abs().max() < 1e-9
    assert change.abs().max() > 0.1


def test_seeing_the_whole_state_gives_the_chain_of_pairs():
    a = torch.tensor([[-0.2, 0.5], [-0.4, -0.1]], dtype=F64)
    means = torch.tensor([[0.0, 0.3], [1.0, 0.0], [0.5, -0.5]], dtype=F64)
    covs = torch.stack([torch.tensor([[0.3, 0.1], [0.1, 0.2]], dtype=F64) * (1 + k) for k in range(3)])
    eye = torch.eye(2, dtype=F64)
    partial = PartialGaussianBridge(TIMES[:3], means, covs, eye, a, 0.6)
    chain = GaussianChainBridge(TIMES[:3], means, covs, 0.6, a)
    assert torch.allclose(
        torch.linalg.inv(partial.joint_precision()), chain.snapshot_covariance(), rtol=0, atol=1e-9
    )


def test_paths_pass_through_the_snapshots_and_move_by_their_velocity():
    law = solved()
    n = 20000
    ts = torch.linspace(0, 3, 31, dtype=F64)
    x = law.sample(ts, n, generator=torch.Generator().manual_seed(0)).x
    at = x[:, ::10, 0]
    assert ((at.mean(0) - MEANS[:, 0]) / COVS[:, 0, 0].sqrt()).abs().max() < 5 / n**0.5
    assert (at.var(0) / COVS[:, 0, 0] - 1).abs().max() < 5 * 2**0.5 / n**0.5
    # dx = v dt: the trapezoid of the velocity misses it by the noise within a step, of variance 0.49 dt^3 / 12
    miss = x[:, 1:, 0] - x[:, :-1, 0] - 0.05 * (x[:, 1:, 1] + x[:, :-1, 1])
    assert abs(miss.std().item() / (0.49 * 0.1**3 / 12) ** 0.5 - 1) < 0.02
    joint = torch.linalg.inv(law.joint_precision())
    states = law.sample_states(n, torch.Generator().manual_seed(1)).reshape(n, -1)
    scale = joint.diagonal().sqrt()
    assert ((torch.cov(states.mT) - joint) / torch.outer(scale, scale)).abs().max() < 5 * 2**0.5 / n**0.5


def test_too_few_sweeps_are_reported():
    with pytest.warns(sd.errors.ConvergenceWarning, match="sweeps"):
        law = solved(max_iterations=3)
    assert not law.converged


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"observe": torch.zeros(1, 2, dtype=F64)}, sd.errors.InvalidInputError, "rank"),
        ({"means": MEANS[:3]}, sd.errors.ShapeError, "means"),
        ({"covs": torch.zeros_like(COVS)}, sd.errors.SingularDiffusionError, "covs"),
        ({"diffusion": NOISE.flip(0)}, sd.errors.SingularDiffusionError, "reach"),
        ({"times": TIMES.flip(0)}, sd.errors.TimeGridError, "increase"),
        ({"drift_matrix": torch.eye(3, dtype=F64)}, sd.errors.ShapeError, "drift_matrix"),
    ],
)
def test_bad_input(change, error, words):
    good = {
        "times": TIMES, "means": MEANS, "covs": COVS, "observe": POSITION,
        "drift_matrix": MOMENTUM, "diffusion": NOISE,
    }  # fmt: skip
    with pytest.raises(error, match=words):
        PartialGaussianBridge(**{**good, **change})
