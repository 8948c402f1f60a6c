"""Choice by evidence: it finds the kernel that made the data, and keeps the record."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from stochdyn.errors import ForeignCheckpointError, InvalidInputError, UnavailableError
from stochdyn.run import Interrupted
from stochdyn.vectorfields import RVGP, PointCloud
from stochdyn.vectorfields.regression import KernelSearch, candidates
from tests.vectorfields.shapes import fibonacci_sphere, random_sphere, torus


def test_a_smooth_shadow_is_given_to_an_ambient_kernel_and_a_rotation_to_the_divergence_free() -> None:
    cloud = PointCloud(fibonacci_sphere(150), 10, dim=2)
    x = cloud.points
    sites = cloud.sites(slice(None))
    shadow = sites.to_ambient(
        sites.to_tangent(torch.stack([torch.sin(3 * x[:, 1]), x[:, 2] ** 2, torch.cos(2 * x[:, 0])], -1))
    )
    gp = RVGP(cloud, "auto").fit(range(0, 150, 2), shadow[::2])
    assert gp.chosen.startswith("ambient")
    assert [c.log_evidence for c in gp.candidates] == sorted(
        (c.log_evidence for c in gp.candidates), reverse=True
    )
    assert gp.candidates[0].name == gp.chosen
    assert gp.candidates[0].log_evidence == pytest.approx(float(gp.log_marginal_likelihood()))
    assert (gp.predict_mean(slice(None)) - shadow).norm() < 0.02 * shadow.norm()
    height = x[:, 2] * x[:, 0] + 0.5 * x[:, 1]
    gradient = torch.stack([x[:, 2], torch.full_like(height, 0.5), x[:, 0]], -1)
    rotation = torch.linalg.cross(x, gradient)
    gp.fit(range(0, 150, 3), rotation[::3])
    assert gp.chosen in ("divergence-free", "Hodge compositional")
    assert (gp.predict_mean(slice(None)) - rotation).norm() < 0.02 * rotation.norm()


def test_off_spheres_and_before_fitting() -> None:
    points = random_sphere(300, 1)
    cloud = PointCloud(points[np.argsort(np.arctan2(points[:, 1], points[:, 0]))][::3], 14, dim=1)
    n = len(cloud)
    gp = RVGP(cloud, "auto")
    with pytest.raises(UnavailableError, match="Call fit"):
        gp.predict([0])
    turn = torch.stack([-cloud.points[:, 1], cloud.points[:, 0]], -1)
    gp.fit(range(0, n, 3), turn[::3])
    names = {c.name for c in gp.candidates}
    assert {"connection, all modes", "projected", "ambient Matérn 3/2"} <= names
    assert "divergence-free" not in names
    assert (gp.predict_mean(slice(None)) - turn).norm() < 0.05 * turn.norm()


def test_a_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Ctrl-C leaves the best kernel so far, fitted; resumption gives the posterior of a search that never stopped."""
    cloud = PointCloud(fibonacci_sphere(60), 10, dim=2)
    axis = torch.tensor([[0.2, 0.1, 1.0]], dtype=torch.float64)
    turn = torch.linalg.cross(axis.expand_as(cloud.points), cloud.points)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 2, generator=generator, dtype=torch.float64)
    data = (range(0, 60, 2), (turn + 0.1 * cloud.sites(slice(None)).to_ambient(noise))[::2])
    whole = RVGP(cloud, "auto").fit(*data)

    asked = KernelSearch.step

    def interrupted(self: KernelSearch[RVGP]) -> None:
        asked(self)
        if self.number == 1:
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KernelSearch, "step", interrupted)
        with pytest.raises(Interrupted) as stopped:
            RVGP(cloud, "auto").fit(*data, checkpoint=tmp_path)
    assert isinstance(stopped.value.result, RVGP)
    assert len(stopped.value.result.candidates) == 2
    assert stopped.value.result.predict_mean([1]).isfinite().all()

    again = RVGP(cloud, "auto").fit(*data, checkpoint=tmp_path, resume=True)
    assert [c.log_evidence for c in again.candidates] == [c.log_evidence for c in whole.candidates]
    assert torch.equal(again.predict(range(30))[0], whole.predict(range(30))[0])
    assert torch.equal(again.predict(range(30))[1], whole.predict(range(30))[1])
    with pytest.raises(ForeignCheckpointError, match="observations"):
        RVGP(cloud, "auto").fit(data[0], 2 * data[1], checkpoint=tmp_path, resume=True)
    with pytest.raises(InvalidInputError, match="for the trial of several kernels"):
        RVGP(cloud).fit(*data, checkpoint=tmp_path)


def test_modes_are_truncated_only_where_all_cost_too_much() -> None:
    cloud = PointCloud(torus(1100), 12, dim=2)
    names = [[c.name for c in candidates(cloud, rows)] for rows in (100, 2000)]
    assert names[0] == names[1]  # 2200 modes are too many however few the rows
    assert names[0][0] == "connection"
    assert names[0][-2:] == ["connection, full rank, ν = 3", "connection + ambient Matérn 3/2"]
    assert candidates(cloud, 2600)[-1].name == "connection, full rank, ν = 3"  # too many rows for a sum
    small = PointCloud(torus(700), 12, dim=2)
    assert [candidates(small, rows)[0].name for rows in (100, 1400)] == [
        "connection, all modes",
        "connection",
    ]
    assert not any("full rank" in c.name for c in candidates(small, 100))
