"""Refinements that stop and go on: to the same bits, and only with the run they belong to."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from stochdyn.bridges import LinearDrift, LotkaVolterra, RefinementInterrupted, Snapshots, refine
from stochdyn.bridges.refinement import Loop
from stochdyn.errors import ForeignCheckpointError, InvalidInputError, UnavailableError

F64 = torch.float64


@pytest.fixture(scope="module")
def clouds() -> Snapshots:
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[5.0, 4.0], [2.5, 4.6], [1.4, 3.6]], dtype=F64)
    return Snapshots([0.0, 0.5, 1.0], [c + 0.1 * torch.randn(12, 2, generator=g, dtype=F64) for c in centres])


OPTIONS = {"diffusion": 0.3, "step": 0.1, "tolerance": 1e-9, "nodes": 2000}


def same(one, other) -> None:
    assert one.parameters.keys() == other.parameters.keys()
    assert all(torch.equal(one.parameters[k], other.parameters[k]) for k in one.parameters)
    assert torch.equal(one.history.objective, other.history.objective)
    assert one.history.final_objective == other.history.final_objective
    draws = [fit.measure.marginal(0.3).sample(50, torch.Generator().manual_seed(0)) for fit in (one, other)]
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("family", "more"),
    [
        (LotkaVolterra(), {"accelerate": True}),
        (LinearDrift(2), {"learn_diffusion": True}),
        (LotkaVolterra(), {"relaxation": 20.0, "corrections": 4}),
    ],
    ids=["accelerated", "noise learnt", "relaxed and corrected"],
)
def test_a_run_that_stopped_goes_on_to_the_same_bits(clouds, tmp_path, family, more) -> None:
    whole = refine(clouds, family, outer=5, **OPTIONS, **more)
    refine(clouds, family, outer=2, checkpoint=tmp_path, **OPTIONS, **more)
    rest = refine(clouds, family, outer=5, checkpoint=tmp_path, resume=True, **OPTIONS, **more)
    assert len(rest.history) > 2
    same(whole, rest)


def test_restarts_go_on_too(clouds, tmp_path) -> None:
    more = {**OPTIONS, "restarts": 2, "outer": 2}
    whole = refine(clouds, LotkaVolterra(), **more)
    refine(clouds, LotkaVolterra(), **{**more, "restarts": 1}, checkpoint=tmp_path)
    same(whole, refine(clouds, LotkaVolterra(), **more, checkpoint=tmp_path, resume=True))


def test_a_finished_run_is_read_and_not_run_again(clouds, tmp_path, monkeypatch) -> None:
    first = refine(clouds, LotkaVolterra(), outer=2, checkpoint=tmp_path, **OPTIONS)
    monkeypatch.setattr(Loop, "iterate", lambda self: pytest.fail("it was done already"))
    same(first, refine(clouds, LotkaVolterra(), outer=2, checkpoint=tmp_path, resume=True, **OPTIONS))


def test_ctrl_c_waits_for_the_iteration(clouds, tmp_path, monkeypatch) -> None:
    plain = Loop.iterate

    def interrupted(self: Loop) -> float:
        if len(self.history) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(Loop, "iterate", interrupted)
        with pytest.raises(RefinementInterrupted) as caught:
            refine(clouds, LotkaVolterra(), outer=4, checkpoint=tmp_path, **OPTIONS)
    assert len(caught.value.result.history) == 2
    rest = refine(clouds, LotkaVolterra(), outer=4, checkpoint=tmp_path, resume=True, **OPTIONS)
    same(refine(clouds, LotkaVolterra(), outer=4, **OPTIONS), rest)


def test_another_run_is_refused(clouds, tmp_path) -> None:
    refine(clouds, LotkaVolterra(), outer=1, checkpoint=tmp_path, **OPTIONS)
    moved = clouds.map(lambda x: x + 1)
    with pytest.raises(ForeignCheckpointError, match="snapshots"):
        refine(moved, LotkaVolterra(), outer=1, checkpoint=tmp_path, resume=True, **OPTIONS)
    other = {**OPTIONS, "diffusion": 0.4}
    with pytest.raises(ForeignCheckpointError, match="diffusion"):
        refine(clouds, LotkaVolterra(), outer=1, checkpoint=tmp_path, resume=True, **other)
    with pytest.raises(ForeignCheckpointError, match="weight"):
        refine(clouds, LinearDrift(2), outer=1, checkpoint=tmp_path, resume=True, **OPTIONS)


def test_bad_input(clouds, tmp_path) -> None:
    with pytest.raises(InvalidInputError, match="resume"):
        refine(clouds, LotkaVolterra(), resume=True, **OPTIONS)
    with pytest.raises(UnavailableError, match="checkpoints"):
        refine(clouds, LotkaVolterra(), solver="ipf-gp", checkpoint=tmp_path, **OPTIONS)
