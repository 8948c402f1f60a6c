"""The shipped numbers are the published ones, and obey what holds for every state."""

from __future__ import annotations

import pytest
import torch

from stochdyn.datasets import open_systems
from stochdyn.errors import InvalidInputError


def test_digits() -> None:
    run = open_systems(system="ising_ring", num_sites=6)[0]
    place = run.times.tolist().index(2.0)
    expected = {"X": 0.1715100978, "Y": 0.3247265449, "Z": -0.6368574429, "ZZ": 0.4180810444}
    for name, value in expected.items():
        assert abs(float(run.expect[name][place]) - value) < 1e-9
    steady = open_systems("steady", system="ising_ring", num_sites=10, field=2.0)
    assert len(steady) == 1
    assert abs(float(steady[0].expect["Z"]) + 0.2368672) < 1e-7


@pytest.mark.parametrize("kind", ["dynamics", "steady"])
def test_numbers_are_those_of_states(kind: str) -> None:
    runs = open_systems(kind)
    assert len(runs) == {"dynamics": 14, "steady": 29}[kind]
    for run in runs:
        length = sum(run.expect[n].square() for n in "XYZ")
        assert float(torch.as_tensor(length).max()) <= 1 + 1e-9
        assert all(float(v.abs().max()) <= 1 + 1e-9 for v in run.expect.values())
        if kind == "dynamics":
            assert all(v.shape == run.times.shape for v in run.expect.values())


def test_any_size_is_found_for_any_size() -> None:
    assert open_systems(system="commuting_ring", num_sites=64, dephasing=0.25)[0].num_sites is None
    assert open_systems(system="ising_ring", num_sites=64) == []
    with pytest.raises(InvalidInputError, match="kind is unknown"):
        open_systems("static")
