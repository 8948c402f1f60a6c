"""Refinements that stop and go on: to the same bits, and only with the run they belong to."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from stochdyn.bridges import IPF, LinearDrift, LotkaVolterra, Sinkhorn, Snapshots, refine
from stochdyn.bridges.refinement import Attempt
from stochdyn.errors import ForeignCheckpointError, InvalidInputError
from stochdyn.run import Interrupted

F64 = torch.float64


@pytest.fixture(scope="module")
def clouds() -> Snapshots:
    g = torch.Generator().manual_seed(0)
    centres = torch.tensor([[5.0, 4.0], [2.5, 4.6], [1.4, 3.6]], dtype=F64)
    return Snapshots([0.0, 0.5, 1.0], [c + 0.1 * torch.randn(12, 2, generator=g, dtype=F64) for c in centres])


OPTIONS = {"diffusion": 0.3, "dt": 0.1, "tolerance": 1e-9, "method": Sinkhorn(num_nodes=2000)}


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
        (LotkaVolterra(), {"method": Sinkhorn(num_nodes=2000, accelerate=True)}),
        (LinearDrift(2), {"learn_diffusion": True}),
        (LotkaVolterra(), {"method": Sinkhorn(num_nodes=2000, relaxation=20.0, corrections=4)}),
    ],
    ids=["accelerated", "noise learnt", "relaxed and corrected"],
)
def test_a_run_that_stopped_goes_on_to_the_same_bits(clouds, tmp_path, family, more) -> None:
    whole = refine(clouds, family, max_iterations=5, **{**OPTIONS, **more})
    refine(clouds, family, max_iterations=2, checkpoint=tmp_path, **{**OPTIONS, **more})
    rest = refine(clouds, family, max_iterations=5, checkpoint=tmp_path, resume=True, **{**OPTIONS, **more})
    assert len(rest.history) > 2
    same(whole, rest)


def test_restarts_go_on_too_after_an_error(clouds, tmp_path, monkeypatch) -> None:
    more = {**OPTIONS, "max_iterations": 2, "method": Sinkhorn(num_nodes=2000, restarts=2)}
    whole = refine(clouds, LotkaVolterra(), **more)
    plain, count = Attempt.iterate, []

    def failing(self: Attempt) -> None:
        count.append(1)
        if len(count) == 4:
            raise RuntimeError("in the second iteration of the second attempt")
        plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "iterate", failing)
        with pytest.raises(RuntimeError, match="second attempt") as caught:
            refine(clouds, LotkaVolterra(), **more, checkpoint=tmp_path)
    assert len(caught.value.result.history) > 0
    same(whole, refine(clouds, LotkaVolterra(), **more, checkpoint=tmp_path, resume=True))


def test_a_finished_run_is_read_and_not_run_again(clouds, tmp_path, monkeypatch) -> None:
    first = refine(clouds, LotkaVolterra(), max_iterations=2, checkpoint=tmp_path, **OPTIONS)
    monkeypatch.setattr(Attempt, "iterate", lambda self: pytest.fail("it was done already"))
    same(
        first, refine(clouds, LotkaVolterra(), max_iterations=2, checkpoint=tmp_path, resume=True, **OPTIONS)
    )


def test_ctrl_c_waits_for_the_iteration(clouds, tmp_path, monkeypatch) -> None:
    plain = Attempt.iterate

    def interrupted(self: Attempt) -> None:
        if len(self.history) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return plain(self)

    with monkeypatch.context() as patch:
        patch.setattr(Attempt, "iterate", interrupted)
        with pytest.raises(Interrupted) as caught:
            refine(clouds, LotkaVolterra(), max_iterations=4, checkpoint=tmp_path, **OPTIONS)
    assert len(caught.value.result.history) == 2
    rest = refine(clouds, LotkaVolterra(), max_iterations=4, checkpoint=tmp_path, resume=True, **OPTIONS)
    same(refine(clouds, LotkaVolterra(), max_iterations=4, **OPTIONS), rest)


def test_another_run_is_refused(clouds, tmp_path) -> None:
    refine(clouds, LotkaVolterra(), max_iterations=1, checkpoint=tmp_path, **OPTIONS)
    moved = clouds.map(lambda x: x + 1)
    with pytest.raises(ForeignCheckpointError, match="snapshots"):
        refine(moved, LotkaVolterra(), max_iterations=1, checkpoint=tmp_path, resume=True, **OPTIONS)
    other = {**OPTIONS, "diffusion": 0.4}
    with pytest.raises(ForeignCheckpointError, match="diffusion"):
        refine(clouds, LotkaVolterra(), max_iterations=1, checkpoint=tmp_path, resume=True, **other)
    with pytest.raises(ForeignCheckpointError, match="weight"):
        refine(clouds, LinearDrift(2), max_iterations=1, checkpoint=tmp_path, resume=True, **OPTIONS)


def test_bad_input(clouds, tmp_path) -> None:
    with pytest.raises(InvalidInputError, match="resume"):
        refine(clouds, LotkaVolterra(), resume=True, **OPTIONS)
    with pytest.raises(InvalidInputError, match="tolerance does nothing"):
        refine(clouds, LotkaVolterra(), diffusion=0.3, tolerance=0.1, method=IPF())
    with pytest.raises(InvalidInputError, match="learn_diffusion does nothing"):
        refine(clouds, LotkaVolterra(), diffusion=0.3, learn_diffusion=True, method="ipf")
