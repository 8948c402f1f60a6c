"""The engine keeps what a run did, whatever ends it, and resumes it to the same bits; runs in threads don't meet."""

from __future__ import annotations

import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import stochdyn.run.engine as engine_module
import stochdyn.run.progress as progress_module
from stochdyn import SDE, DiffusionMeasure
from stochdyn.errors import (
    CheckpointError,
    CheckpointInUseError,
    CheckpointWriteError,
    DamagedCheckpointError,
    ForeignCheckpointError,
    InvalidInputError,
)
from stochdyn.run import Interrupted, OwnRandomness, Resumable, fit, progress_bar, run_to_end, save_weights
from stochdyn.run.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from stochdyn.run.folder import claimed
from tests.run.toys import Quadratic


class Walk(Resumable[list[float]]):
    """A random walk from the global generators of torch and NumPy, with a history that grows in place."""

    def __init__(self, length: int, fails_at: int = 0, interrupts_at: tuple[int, int] = (0, 0)) -> None:
        self.total = length
        self.place = torch.zeros(2)
        self.history: list[float] = []
        self.fails_at, self.interrupts_at = fails_at, interrupts_at
        self.calls: list[str] = []

    @property
    def finished(self) -> bool:
        return len(self.history) >= int(self.total or 0)

    def start(self) -> None:
        self.calls.append("start")

    def end(self) -> None:
        self.calls.append("end")

    def step(self) -> None:
        self.place += torch.randn(2) + float(np.random.randn())
        self.history.append(float(self.place.sum()))
        step, times = self.interrupts_at
        if len(self.history) == step:
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
        if len(self.history) == self.fails_at:
            raise ArithmeticError("no")

    def state(self) -> dict[str, Any]:
        return {"place": self.place, "history": self.history}

    def load_state(self, state: dict[str, Any]) -> None:
        self.place, self.history = state["place"], state["history"]

    def describe(self) -> dict[str, str]:
        return {"at": f"{self.place[0]:.2f}"}

    def report(self) -> list[float]:
        return list(self.history)


def walk(length: int = 9, folder: Path | None = None, job: Walk | None = None, **kwargs: Any) -> list[float]:
    kwargs = {"identity": {"kind": "walk"}, "checkpoint": folder, **kwargs}
    return run_to_end(Walk(length) if job is None else job, "walk", **kwargs)


class TestResumption:
    def test_to_the_same_bits_in_many_pieces(self, tmp_path: Path) -> None:
        for length in (1, 2, 5, 9):
            found = walk(length, tmp_path, resume=True)
        assert found == walk()

    def test_a_finished_run_is_reported_without_a_step(self, tmp_path: Path) -> None:
        job = Walk(9)
        walk(9, tmp_path)
        assert walk(9, tmp_path, job, resume=True) == walk()
        assert job.calls == ["start", "end"]

    def test_stop_ends_a_run_that_can_go_on(self, tmp_path: Path) -> None:
        assert len(walk(9, tmp_path, stop=lambda job: job.number == 4)) == 4
        assert walk(9, tmp_path, resume=True) == walk()

    def test_saves_come_as_often_as_asked_and_at_the_end(self, tmp_path: Path, monkeypatch: Any) -> None:
        steps: list[int] = []
        real = engine_module.write_checkpoint

        def note(path: Any, content: Checkpoint) -> None:
            steps.append(content.step)
            real(path, content)

        monkeypatch.setattr(engine_module, "write_checkpoint", note)
        walk(9, tmp_path, checkpoint_every=4)
        assert steps == [4, 8, 9]


class TestWhateverEndsIt:
    def test_an_error_keeps_the_steps_before_it(self, tmp_path: Path) -> None:
        job = Walk(9, fails_at=5)
        with pytest.raises(ArithmeticError) as caught:
            walk(9, tmp_path, job, checkpoint_every=100)
        assert caught.value.result == walk()[:4]  # type: ignore[attr-defined]
        assert "stopped after step 4 of 9; the checkpoint" in caught.value.__notes__[0]
        assert "end" not in job.calls
        assert walk(9, tmp_path, resume=True) == walk()

    @pytest.mark.parametrize("first", [2, 6, 8])
    def test_generators_that_are_used_late_are_put_back_or_not_trusted(
        self, tmp_path: Path, first: int
    ) -> None:
        """NumPy's and Python's generators aren't copied while no step draws from them; a resumption is right anyway."""

        class Late(Walk):
            def step(self) -> None:
                self.place = self.place + torch.randn(2)
                self.history.append(float(self.place.sum()))
                if len(self.history) >= first:
                    self.history[-1] += random.random() + float(np.random.rand())
                if len(self.history) == self.fails_at:
                    raise ArithmeticError("no")

        def go(folder: Path | None, fails_at: int = 0, **kwargs: Any) -> list[float]:
            job = Late(12)
            job.fails_at = fails_at
            return walk(12, folder, job, checkpoint_every=5, **kwargs)

        with pytest.raises(ArithmeticError):
            go(tmp_path, fails_at=9)
        assert go(tmp_path, resume=True) == go(None)

    def test_an_error_in_stop_keeps_the_step_it_saw(self, tmp_path: Path) -> None:
        def stop(job: Walk) -> bool:
            return bool(1 // (4 - job.number)) and False

        with pytest.raises(ZeroDivisionError) as caught:
            walk(9, tmp_path, stop=stop, checkpoint_every=100)
        assert len(caught.value.result) == 4  # type: ignore[attr-defined]
        assert walk(9, tmp_path, resume=True) == walk()

    def test_an_error_before_the_first_step_costs_no_older_checkpoint(self, tmp_path: Path) -> None:
        walk(9, tmp_path)
        with pytest.raises(ArithmeticError):
            walk(9, tmp_path, Walk(9, fails_at=1))
        assert walk(9, tmp_path, resume=True) == walk()

    @pytest.mark.parametrize(("times", "done"), [(1, 5), (2, 4)])
    def test_ctrl_c_once_ends_after_the_step_and_twice_at_once(
        self, tmp_path: Path, times: int, done: int
    ) -> None:
        with pytest.raises(Interrupted, match=f"walk interrupted after step {done} of 9; the che") as caught:
            walk(9, tmp_path, Walk(9, interrupts_at=(5, times)), checkpoint_every=100)
        assert caught.value.result == walk()[:done]
        assert walk(9, tmp_path, resume=True) == walk()

    def test_an_error_at_the_end_and_in_saving_keep_the_result(
        self, tmp_path: Path, monkeypatch: Any
    ) -> None:
        class Ends(Walk):
            def end(self) -> None:
                raise ArithmeticError("plot")

        with pytest.raises(ArithmeticError) as caught:
            walk(9, tmp_path, Ends(9))
        assert caught.value.result == walk()  # type: ignore[attr-defined]
        assert walk(9, tmp_path, resume=True) == walk()

        def full(*arguments: Any) -> None:
            raise CheckpointWriteError("full")

        monkeypatch.setattr(engine_module, "write_checkpoint", full)
        with pytest.raises(CheckpointWriteError) as refused:
            walk(9, tmp_path, checkpoint_every=4)
        assert refused.value.result == walk()[:4]  # type: ignore[attr-defined]

    def test_ctrl_c_may_return(self) -> None:
        assert walk(9, job=Walk(9, interrupts_at=(5, 1)), on_interrupt="return") == walk()[:5]

    def test_ctrl_c_in_the_last_step_is_no_interruption(self) -> None:
        assert walk(9, job=Walk(9, interrupts_at=(9, 1))) == walk()


class TestOfAnotherRun:
    def test_is_refused_by_what_differs(self, tmp_path: Path) -> None:
        walk(3, tmp_path)
        for identity in ({"kind": "other"}, {}, {"kind": "walk", "more": 1}):
            with pytest.raises(ForeignCheckpointError, match=r"belongs to another run.*(kind|more)"):
                walk(9, tmp_path, resume=True, identity=identity)
        with pytest.raises(ForeignCheckpointError, match="kind is walk instead of stroll"):
            run_to_end(Walk(9), "stroll", checkpoint=tmp_path, resume=True)

    def test_a_state_that_does_not_fit_is_damage(self, tmp_path: Path) -> None:
        walk(3, tmp_path)
        content = read_checkpoint(tmp_path)
        assert content is not None
        for state in ({}, {"job": {}, "seconds": 1.0}, {**content.state, "random": [{}]}):
            write_checkpoint(tmp_path, Checkpoint("walk", 3, content.identity, state))
            job = Walk(9)
            with pytest.raises(DamagedCheckpointError, match="doesn't hold the state of this run"):
                walk(9, tmp_path, job, resume=True)
            assert (job.history, job.number) == ([], 0)


class TestDirectory:
    def test_belongs_to_one_run_at_a_time(self, tmp_path: Path) -> None:
        def other(job: Walk) -> bool:
            with pytest.raises(
                CheckpointInUseError, match=f"in use by another run; got process {os.getpid()}"
            ):
                walk(2, tmp_path)
            return False

        assert walk(3, tmp_path, stop=other) == walk(3)
        assert walk(3, tmp_path, resume=True) == walk(3)  # free again
        assert sorted(p.name[:10] for p in tmp_path.iterdir()) == ["checkpoint", "tensors-00"]

    def test_of_another_process_is_refused_by_its_number(self, tmp_path: Path) -> None:
        ready, done = os.pipe(), os.pipe()
        child = os.fork()
        if child == 0:
            with claimed(tmp_path):
                os.write(ready[1], b"x")
                os.read(done[0], 1)
            os._exit(0)
        os.read(ready[0], 1)
        try:
            with pytest.raises(CheckpointInUseError, match=f"got process {child}"):
                walk(3, tmp_path)
            with pytest.raises(CheckpointInUseError, match=f"got process {child}"):
                save_weights(torch.nn.Linear(1, 1), tmp_path)
        finally:
            os.write(done[1], b"x")
            os.waitpid(child, 0)
        assert walk(3, tmp_path) == walk(3)

    def test_of_a_process_that_was_killed_is_free(self, tmp_path: Path) -> None:
        child = os.fork()
        if child == 0:
            walk(3, tmp_path, stop=lambda job: os.kill(os.getpid(), signal.SIGKILL) is None)
            os._exit(0)
        os.waitpid(child, 0)
        assert (tmp_path / ".lock").exists()
        assert walk(3, tmp_path) == walk(3)
        assert not (tmp_path / ".lock").exists()

    @pytest.mark.parametrize("name", [".checkpoint.json.partial", ".lock", "checkpoint.json"])
    def test_no_link_is_followed(self, tmp_path: Path, name: str) -> None:
        own, folder = tmp_path / "thesis.txt", tmp_path / "run"
        own.write_text("precious")
        folder.mkdir()
        (folder / name).symlink_to(own)
        if name == ".lock":
            with pytest.raises(CheckpointError):
                walk(3, folder)
        else:
            walk(3, folder)
            assert walk(3, folder, resume=True) == walk(3)
        assert own.read_text() == "precious"

    @pytest.mark.parametrize("name", ["checkpoint.json", "tensors", ".lock"])
    def test_pipes_and_links_are_refused_at_once(self, tmp_path: Path, name: str) -> None:
        walk(3, tmp_path)
        path = next(tmp_path.glob("tensors*")) if name == "tensors" else tmp_path / name
        for make in (os.mkfifo, lambda p: os.symlink("/dev/zero", p), os.mkdir):
            if path.exists():
                path.unlink()
            make(path)
            with pytest.raises(CheckpointError):
                walk(9, tmp_path, resume=True)
            path.rmdir() if path.is_dir() else path.unlink()


class TestThreads:
    def test_two_runs_give_what_each_gives_alone(self) -> None:
        found: dict[int, list[float]] = {}

        def go(seed: int) -> None:
            found[seed] = walk(300, randomness=seed)

        alone = {seed: walk(300, randomness=seed) for seed in (0, 1)}
        threads = [threading.Thread(target=go, args=(seed,)) for seed in (0, 1)]
        torch.manual_seed(7)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == alone
        assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))

    def test_runs_inside_runs_in_threads(self) -> None:
        class Outer(Walk):
            def step(self) -> None:
                fit(Quadratic(torch.ones(2)), steps=3)
                inner = walk(4, randomness=3)
                super().step()
                self.history[-1] += sum(inner)

        def go() -> None:
            found.append(walk(20, job=Outer(20)))

        alone = walk(20, job=Outer(20))
        found: list[list[float]] = []
        threads = [threading.Thread(target=go) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert found == [alone, alone]

    def test_a_fit_with_dropout_beside_another(self) -> None:
        """Made before the threads begin: what a thread draws outside of runs is nobody's."""

        def make() -> _Sum:
            torch.manual_seed(2)
            net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))
            return _Sum(net)

        def go(k: int) -> None:
            losses[k] = fit(nets[k], torch.ones(5, 2), steps=100, batch_size=2).losses

        losses: dict[int, Tensor] = {}
        nets = [make() for _ in range(3)]
        go(0)
        threads = [threading.Thread(target=go, args=(k,)) for k in (1, 2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert torch.equal(losses[0], losses[1])
        assert torch.equal(losses[0], losses[2])

    def test_draws_of_a_law_beside_a_run(self) -> None:
        """A distribution of torch draws from the global generator alone, which is the run's for the time of a step."""
        start = torch.distributions.Independent(torch.distributions.StudentT(torch.full((2,), 3.0)), 1)
        law, ts = DiffusionMeasure(start, SDE(lambda t, x: -x, 1.0)), torch.tensor([0.0, 0.1])

        def draw() -> Tensor:
            return law.sample(ts, 500, generator=5).x

        class Noisy(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = torch.nn.Parameter(torch.zeros(()))

            def forward(self) -> Tensor:
                return sum((self.a - torch.randn(20_000)).square().mean() for _ in range(5))  # type: ignore[return-value]

        def train() -> None:
            losses.append(fit(Noisy(), steps=150, progress=False).losses)

        losses: list[Tensor] = []
        train()
        alone = draw()
        thread = threading.Thread(target=train)
        thread.start()
        beside = []
        while thread.is_alive():
            beside.append(draw())
        thread.join()
        assert len(beside) > 5
        assert all(torch.equal(x, alone) for x in beside)
        assert torch.equal(losses[0], losses[1])


class _Sum(torch.nn.Module):
    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return (self.net(x) - 1).square().mean()


class TestOwnRandomness:
    def test_without_a_seed_it_follows_the_callers(self) -> None:
        torch.manual_seed(3)
        first, second = walk(randomness=None), walk(randomness=None)
        torch.manual_seed(3)
        assert (first, second) == (walk(randomness=None), walk(randomness=None))
        assert first != second

    def test_an_error_leaves_the_callers_generators(self) -> None:
        torch.manual_seed(5)
        with pytest.raises(ArithmeticError):
            walk(job=Walk(9, fails_at=3))
        with pytest.raises(TypeError), OwnRandomness(1):
            torch.rand("one")  # type: ignore[call-overload]
        assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(5)))


class TestProgress:
    def test_a_bar_that_appears_says_what_and_where(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        walk()
        assert sum(progress_bar(range(4), "adding")) == 6
        assert capsys.readouterr().err == ""
        monkeypatch.setattr(progress_module, "DELAY", 0.0)
        walk()
        written = capsys.readouterr().err
        assert "walk" in written
        assert "9/9" in written
        assert "at=" in written
        walk(progress=False)
        list(progress_bar(range(4), "adding", progress=False))
        assert capsys.readouterr().err == ""

    def test_what_is_no_bool_is_refused(self) -> None:
        with pytest.raises(InvalidInputError, match="progress must be True or False"):
            progress_bar(3, "x", progress="no")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"checkpoint_every": 0}, "checkpoint_every must be"),
        ({"resume": True}, "needs the directory"),
        ({"resume": 1}, "resume must be True or False"),
        ({"checkpoint": 7}, "checkpoint must be the path"),
        ({"on_interrupt": "sulk"}, "on_interrupt is unknown"),
        ({"stop": 3}, "stop must be"),
        ({"randomness": -1}, "seed must be a whole number"),
        ({"randomness": "x"}, "seed must be a whole number"),
    ],
)
def test_bad_input_is_refused_before_any_work(arguments: dict[str, Any], message: str) -> None:
    job = Walk(3)
    with pytest.raises(InvalidInputError, match=message):
        walk(job=job, **arguments)  # type: ignore[arg-type]
    assert job.history == []
