"""What every bridge can do beside the suite of laws: it is scored, drawn, copied and moved."""

from __future__ import annotations

import copy

import pytest
import torch

from stochdyn import PathMeasure
from stochdyn.bridges import plot_trajectories, score
from stochdyn.testing import check_device
from tests.bridges.laws import NAMES, clouds, solved

F64 = torch.float64


@pytest.mark.parametrize("name", NAMES)
def test_every_bridge_is_scored_drawn_and_copied(name: str) -> None:
    law = solved(name)
    assert isinstance(law, PathMeasure)
    found = score(law, clouds()[1], num_samples=200)
    assert 0 < found.w1 < 2
    assert score(law, clouds()[1], num_samples=200) == found
    axis = plot_trajectories(law, clouds(), 5, num_times=8)
    assert len(axis.lines) == 5


@pytest.mark.parametrize("name", NAMES)
def test_single_and_double_precision_and_back(name: str) -> None:
    law = copy.deepcopy(solved(name)).float()
    assert law.sample(torch.tensor([0.0, 0.5]), 3, 0).x.dtype == torch.float32
    again = law.double().sample(torch.tensor([0.0, 0.5], dtype=F64), 3, 0).x
    torch.testing.assert_close(
        again, solved(name).sample(torch.tensor([0.0, 0.5], dtype=F64), 3, 0).x, atol=1e-2, rtol=1e-2
    )


# The others compute anew from what moved, which takes numbers: the device of the check has none.
@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("hidden", "partial", "partial gaussian")])
def test_all_state_moves_with_a_bridge(name: str) -> None:
    check_device(solved(name))
