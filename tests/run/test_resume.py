"""A run that stops and is resumed ends in the same bits as one that never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from stochdyn.objectives import Objective, ObjectiveValue
from stochdyn.run import FitResult, FitState, Interrupted, fit
from stochdyn.run.checkpoint import read_checkpoint
from tests.run.toys import Noisy, Quadratic, Regression, regression_data, same_bits, weights

N = 17

SCHEDULERS: dict[str, Callable[..., Any]] = {
    "none": lambda o: lr_scheduler.ConstantLR(o, 1.0),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=2 * N),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [5, 20], gamma=0.3),
    "sequence": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 2 * N)], [6]
    ),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
}

OPTIMIZERS = {
    "adam": torch.optim.Adam,
    "amsgrad": partial(torch.optim.AdamW, amsgrad=True, weight_decay=0.1),
    "fused": partial(torch.optim.Adam, fused=True),
    "momentum": partial(torch.optim.SGD, momentum=0.9, nesterov=True),
    "rmsprop": partial(torch.optim.RMSprop, centered=True, momentum=0.5),
}


def run(steps: int, folder: Path | None = None, **kwargs: Any) -> tuple[FitResult, dict[str, Tensor]]:
    """Everything at once: dropout, Python's and NumPy's numbers, buffers, averages, clipping, schedules."""
    objective = Noisy()
    settings: dict[str, Any] = {
        "lr": 0.01,
        "batch_size": 3,
        "scheduler": SCHEDULERS["onecycle"],
        "clip_norm": 0.5,
        "ema": 0.95,
        "seed": 3,
        "progress": False,
        "data": regression_data(),
        **kwargs,
    }
    result = fit(objective, steps=steps, checkpoint=folder, **settings)
    return result, weights(objective)


def assert_same(a: tuple[FitResult, dict[str, Tensor]], b: tuple[FitResult, dict[str, Tensor]]) -> None:
    assert torch.equal(a[0].losses, b[0].losses)
    assert torch.equal(a[0].terms["error"], b[0].terms["error"])
    assert same_bits(a[1], b[1])
    assert (a[0].ema is None) == (b[0].ema is None)
    if a[0].ema is not None and b[0].ema is not None:
        assert same_bits(a[0].ema, b[0].ema)


class Breaks(Noisy):
    """Fails in its 25th evaluation, halfway, where memory is little."""

    def forward(self, batch: Any = None) -> ObjectiveValue:
        value = super().forward(batch)
        if self.calls == 25 and os.environ["MEMORY"] == "little":
            raise RuntimeError("no more memory")
        return value


class TestSameBits:
    @pytest.mark.parametrize("scheduler", SCHEDULERS)
    def test_with_every_kind_of_schedule(self, tmp_path: Path, scheduler: str) -> None:
        make = SCHEDULERS[scheduler]
        run(N, tmp_path, scheduler=make)
        assert_same(run(2 * N, tmp_path, scheduler=make, resume=True), run(2 * N, scheduler=make))

    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_with_every_kind_of_optimizer(self, tmp_path: Path, optimizer: str) -> None:
        chosen = {"optimizer": OPTIMIZERS[optimizer], "scheduler": None}
        run(N, tmp_path, **chosen)
        assert_same(run(2 * N, tmp_path, resume=True, **chosen), run(2 * N, **chosen))

    @pytest.mark.parametrize("workers", [0, 1])
    def test_with_a_shuffling_loader_in_mid_epoch(self, tmp_path: Path, workers: int) -> None:
        def loader() -> DataLoader[Any]:
            context = "fork" if workers else None
            data = TensorDataset(*regression_data())
            return DataLoader(
                data, batch_size=3, shuffle=True, num_workers=workers, multiprocessing_context=context
            )

        def go(steps: int, folder: Path | None = None, resume: bool = False) -> Any:
            return run(steps, folder, data=loader(), batch_size=None, resume=resume)

        go(N, tmp_path)
        assert_same(go(2 * N, tmp_path, resume=True), go(2 * N))

    def test_in_many_pieces_of_any_length(self, tmp_path: Path) -> None:
        for stop in (1, 2, 9, 10, 23):
            run(stop, tmp_path, resume=True)  # the first starts fresh: there is nothing to resume
        assert_same(run(2 * N, tmp_path, resume=True), run(2 * N))

    def test_saving_and_logging_often_change_nothing(self, tmp_path: Path) -> None:
        assert_same(run(2 * N, tmp_path, checkpoint_every=1, log_every=3), run(2 * N))

    def test_from_the_last_step_after_an_error_of_a_callback(self, tmp_path: Path) -> None:
        def fail(state: FitState) -> None:
            if state.step == 25:
                raise RuntimeError("power cut")

        with pytest.raises(RuntimeError, match="power cut") as caught:
            run(2 * N, tmp_path, checkpoint_every=10, callbacks=[fail])
        assert caught.value.result.steps == 25  # type: ignore[attr-defined]
        assert_same(run(2 * N, tmp_path, resume=True), run(2 * N))

    @pytest.mark.parametrize("loader", [False, True])
    def test_from_the_last_step_after_an_error_of_the_objective(
        self, tmp_path: Path, loader: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The failed evaluation has drawn numbers, taken a batch and changed a buffer: all of that is undone."""
        settings: dict[str, Any] = {"steps": 2 * N, "lr": 0.01, "batch_size": 3, "progress": False}
        settings["data"] = regression_data()
        if loader:
            settings["data"] = DataLoader(TensorDataset(*regression_data()), batch_size=3, shuffle=True)
            settings["batch_size"] = None
        monkeypatch.setenv("MEMORY", "little")
        broken, again, whole = Breaks(), Breaks(), Breaks()
        with pytest.raises(RuntimeError, match="no more memory") as caught:
            fit(broken, checkpoint=tmp_path, **settings)
        assert caught.value.result.steps == 24  # type: ignore[attr-defined]
        assert "step 24 of 34; the checkpoint" in caught.value.__notes__[0]
        assert broken.calls == 24
        monkeypatch.setenv("MEMORY", "enough")
        resumed = fit(again, checkpoint=tmp_path, resume=True, **settings)
        assert torch.equal(resumed.losses, fit(whole, **settings).losses)
        assert same_bits(weights(again), weights(whole))

    def test_callbacks_see_every_step_once_after_an_error_among_them(self, tmp_path: Path) -> None:
        seen: list[tuple[str, int]] = []
        faulty = [True]

        def first(state: FitState) -> None:
            seen.append(("first", state.step))

        def second(state: FitState) -> None:
            if state.step == 3 and faulty[0]:
                raise KeyError("plot")
            seen.append(("second", state.step))

        with pytest.raises(KeyError):
            run(5, tmp_path, callbacks=[first, second])
        faulty[0] = False
        run(5, tmp_path, callbacks=[first, second], resume=True)
        assert seen == [(name, step) for step in range(1, 6) for name in ("first", "second")]

    def test_without_a_seed(self, tmp_path: Path) -> None:
        def plain(steps: int, folder: Path | None = None, resume: bool = False) -> FitResult:
            objective = Regression(dropout=0.5)
            torch.manual_seed(77 if resume else 5)
            settings: dict[str, Any] = {
                "seed": None,
                "batch_size": 3,
                "progress": False,
                "checkpoint": folder,
            }
            return fit(objective, regression_data(), steps=steps, resume=resume, **settings)

        plain(N, tmp_path)
        assert torch.equal(plain(2 * N, tmp_path, resume=True).losses, plain(2 * N).losses)


class Convolution(Objective):
    """A convolution whose weights lie in memory with the channels last."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = torch.nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, batch: Tensor) -> ObjectiveValue:
        loss = (self.layer(batch.contiguous(memory_format=torch.channels_last)) - 1).square().mean()
        return ObjectiveValue(loss, {}, "surrogate")


@pytest.mark.parametrize("fused", [False, True])
def test_moments_keep_the_layout_of_their_parameters(tmp_path: Path, fused: bool) -> None:
    images = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def run(steps: int, folder: Path | None) -> Convolution:
        objective = Convolution()
        fit(
            objective,
            images,
            steps=steps,
            optimizer=partial(torch.optim.Adam, fused=fused),
            checkpoint=folder,
            resume=folder is not None,
            progress=False,
        )
        return objective

    whole = run(12, None)
    run(5, tmp_path)
    assert same_bits(weights(run(12, tmp_path)), weights(whole))


def test_a_finished_run_is_returned_as_it_is(tmp_path: Path) -> None:
    first = run(N, tmp_path)
    again = run(N, tmp_path, resume=True)
    assert_same(first, again)
    assert again[0].steps == N
    stored = read_checkpoint(tmp_path)
    assert stored is not None
    assert again[0].seconds > stored.state["seconds"] > 0


def test_without_resume_a_run_starts_afresh_and_replaces_the_old(tmp_path: Path) -> None:
    run(N, tmp_path)
    assert_same(run(5, tmp_path), run(5))
    assert_same(run(5, tmp_path, resume=True), run(5))


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.run.test_resume import run

def kill(state):
    if state.step == 23:
        os.kill(os.getpid(), signal.SIGKILL)

run(34, Path(sys.argv[1]), checkpoint_every=5, callbacks=[kill])
"""


def test_a_run_killed_in_the_middle_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """In another process, on purpose: nothing but the directory is left."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    steps: list[int] = []
    resumed = run(2 * N, tmp_path, resume=True, callbacks=[lambda state: steps.append(state.step)])
    assert steps[0] == 21
    assert_same(resumed, run(2 * N))


class TestInterrupt:
    @staticmethod
    def press(step: int, times: int = 1) -> Callable[[FitState], None]:
        def callback(state: FitState) -> None:
            if state.step == step:
                for _ in range(times):
                    os.kill(os.getpid(), signal.SIGINT)

        return callback

    def test_ctrl_c_saves_a_whole_step_and_hands_over_the_result(self, tmp_path: Path) -> None:
        with pytest.raises(
            Interrupted, match=f"fit interrupted after step 13 of {2 * N}.*holds it"
        ) as caught:
            run(2 * N, tmp_path, callbacks=[self.press(13)])
        result = caught.value.result
        assert (result.steps, len(result.losses), result.interrupted) == (13, 13, True)
        assert not result.stopped_early
        assert isinstance(caught.value, KeyboardInterrupt)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert_same(run(2 * N, tmp_path, resume=True), run(2 * N))

    def test_ctrl_c_may_return_instead(self) -> None:
        result, _ = run(2 * N, on_interrupt="return", callbacks=[self.press(13)])
        assert (result.steps, result.interrupted) == (13, True)
        assert "interrupted" in repr(result)

    def test_a_second_ctrl_c_stops_at_once(self, tmp_path: Path) -> None:
        with pytest.raises(Interrupted) as caught:
            run(2 * N, tmp_path, callbacks=[self.press(13, times=2)], checkpoint_every=5)
        assert caught.value.result.steps == 13
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert_same(run(2 * N, tmp_path, resume=True), run(2 * N))

    def test_a_handler_of_the_program_is_respected(self) -> None:
        pressed: list[int] = []
        before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(number))
        try:
            result = fit(Quadratic(torch.ones(1)), steps=9, progress=False, callbacks=[self.press(4)])
        finally:
            signal.signal(signal.SIGINT, before)
        assert pressed == [signal.SIGINT]
        assert result.steps == 9

    def test_other_threads_can_train(self) -> None:
        import threading

        results: list[FitResult] = []
        thread = threading.Thread(
            target=lambda: results.append(fit(Quadratic(torch.ones(1)), steps=3, progress=False))
        )
        thread.start()
        thread.join()
        assert results[0].steps == 3
