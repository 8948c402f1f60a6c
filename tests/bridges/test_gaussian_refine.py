"""Exact bridges through Gaussian snapshots, and the published iterates of the exact refinement."""

from __future__ import annotations

import pytest
import torch

import stochdyn as sd
from stochdyn.bridges import GaussianChainBridge, refine_gaussian

F64 = torch.float64


def ou_snapshots(times):
    """Moments of dX = (-0.8 X + 0.8) dt + 0.5 dW from N(3, 0.04)."""
    times = torch.tensor(times, dtype=F64)
    decay = torch.exp(-0.8 * times)
    var = 0.04 * decay**2 + 0.25 / 1.6 * (1 - decay**2)
    return times, (1 + 2 * decay)[:, None], var[:, None, None]


def test_every_iterate_of_the_refinement_of_an_ou_reference():
    found = refine_gaussian(*ou_snapshots([0.0, 0.75, 1.5, 2.25, 3.0]), 0.5)
    table = {
        1: (-0.72474, 0.68409),
        2: (-0.78852, 0.78186),
        3: (-0.79821, 0.79717),
        5: (-0.79996, 0.79993),
        10: (-0.80000, 0.80000),
    }
    for k, (a, b) in table.items():
        assert abs(found.drift_matrix[k].item() - a) < 6e-6
        assert abs(found.drift_offset[k].item() - b) < 6e-6
    expected = torch.tensor([3.576, 1.255e-2, 2.784e-4], dtype=F64)
    assert torch.allclose(found.kl[:3], expected, rtol=5e-4, atol=0)
    assert abs(found.kl[4].item() / 1.63e-7 - 1) < 5e-3


def test_fewer_snapshots():
    found = refine_gaussian(*ou_snapshots([0.0, 1.5, 3.0]), 0.5)
    assert abs(found.drift_matrix[-1].item() + 0.79977) < 6e-6
    assert abs(found.drift_offset[-1].item() - 0.79964) < 6e-6


def test_the_divergence_never_increases_and_contracts_at_the_square_of_the_parameters():
    found = refine_gaussian(*ou_snapshots([0.0, 0.75, 1.5, 2.25, 3.0]), 0.5, max_iterations=6)
    assert bool((found.kl[1:] < found.kl[:-1]).all())
    error = (found.drift_matrix.flatten() + 0.8).abs()
    rate = (error[5] / error[4]).item()
    assert 0.1 < rate < 0.2
    assert abs((found.kl[5] / found.kl[4]).item() - rate**2) < 0.003


def test_a_system_in_two_dimensions_is_found():
    a = torch.tensor([[-0.5, 1.0], [-1.0, -0.7]], dtype=F64)
    b = torch.tensor([0.3, -0.2], dtype=F64)
    start = torch.tensor([2.0, 0.5], dtype=F64)
    law = sd.LinearGaussianMeasure(a, b, 0.4, start, torch.diag(torch.tensor([0.3, 0.05], dtype=F64)))
    times = torch.linspace(0, 3, 7, dtype=F64)
    found = refine_gaussian(times, law.mean(times), law.covariance(times), 0.4, max_iterations=20)
    assert torch.allclose(found.drift_matrix[-1], a, atol=2e-4)
    assert torch.allclose(found.drift_offset[-1], b, atol=2e-4)


def test_the_chain_is_markov_and_meets_every_snapshot():
    times, means, covs = ou_snapshots([0.0, 0.75, 1.5, 3.0])
    law = GaussianChainBridge(times, means + 0.3, 2 * covs, 0.5, torch.tensor([[-0.4]], dtype=F64))
    assert torch.allclose(law.mean(times), means + 0.3)
    assert torch.allclose(law.covariance(times), 2 * covs)
    precision = torch.linalg.inv(law.snapshot_covariance())
    for i, j in ((0, 2), (0, 3), (1, 3)):
        assert precision[i, j].abs() < 1e-10 * precision.abs().max()
    # the precision beside the diagonal is that of the reference
    decay = torch.exp(torch.tensor(-0.4 * 0.75, dtype=F64))
    q = 0.25 * (1 - decay**2) / 0.8
    assert abs(precision[0, 1] + decay / q) < 1e-9


def test_snapshots_along_a_line_do_not_determine_the_drift_in_the_plane():
    times = torch.tensor([0.0, 1.0], dtype=F64)
    line = torch.ones(2, 2, 2, dtype=F64) + 1e-15 * torch.eye(2, dtype=F64)
    with pytest.raises(sd.errors.InvalidInputError, match="determine"):
        refine_gaussian(times, torch.zeros(2, 2, dtype=F64), line, 1e-8)


def test_bad_input():
    times, means, covs = ou_snapshots([0.0, 0.75, 1.5])
    with pytest.raises(sd.errors.TimeGridError, match="increase"):
        GaussianChainBridge(times.flip(0), means, covs, 0.5)
    with pytest.raises(sd.errors.ShapeError, match="one mean"):
        GaussianChainBridge(times, means[:2], covs, 0.5)
    with pytest.raises(sd.errors.TimeGridError, match="inside"):
        GaussianChainBridge(times, means, covs, 0.5).mean(2.0)
