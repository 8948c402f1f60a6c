"""Callbacks stop where the arithmetic says, keep what was best, and draw no number of the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from stochdyn.errors import InvalidInputError
from stochdyn.run import Callback, EarlyStopping, Every, FitResult, FitState, KeepBest, fit
from tests.run.toys import Quadratic, Regression, Scripted, regression_data, same_bits, weights


def script(losses: list[float], *callbacks: Any, **kwargs: Any) -> FitResult:
    settings = {"steps": len(losses), "lr": 1.0, "optimizer": torch.optim.SGD, "progress": False, **kwargs}
    return fit(Scripted(losses), callbacks=callbacks, **settings)


class TestEarlyStopping:
    def test_stops_after_patience_looks_without_improvement(self) -> None:
        # Means over two steps: 4, 2, 3, 2.5, ... The best comes at step 4; two looks later is step 8.
        stopping = EarlyStopping(patience=2, every=2)
        result = script([4.0, 4.0, 3.0, 1.0, 3.0, 3.0, 2.0, 3.0, 9.0, 9.0], stopping)
        assert result.steps == 8
        assert result.stopped_early
        assert (stopping.best, stopping.best_step) == (2.0, 4)

    def test_improvements_below_min_delta_do_not_count(self) -> None:
        losses = [5.0, 4.9, 4.8, 4.0, 3.95, 3.94, 3.93, 3.92]
        result = script(losses, EarlyStopping(patience=3, every=1, min_delta=0.5))
        # 4.0 improves on 5.0 by more than 0.5 (the first two misses are forgotten); then three misses.
        assert result.steps == 7

    def test_runs_on_while_it_improves(self) -> None:
        result = script([float(9 - i) for i in range(9)], EarlyStopping(patience=1, every=1))
        assert (result.steps, result.stopped_early) == (9, False)

    def test_a_metric_replaces_the_training_loss(self) -> None:
        values = iter([3.0, 1.0, 2.0, 2.0, 0.0])
        result = script([1.0] * 20, EarlyStopping(patience=2, every=3, metric=lambda objective: next(values)))
        assert result.steps == 12

    def test_a_nan_metric_counts_as_no_improvement(self) -> None:
        result = script([1.0] * 9, EarlyStopping(patience=2, every=1, metric=lambda o: float("nan")))
        assert result.steps == 2

    def test_state_survives_a_resume(self, tmp_path: Path) -> None:
        losses = [5.0, 4.0, 4.5, 4.5, 4.5, 4.5, 4.5, 4.5]
        straight = script(losses, EarlyStopping(patience=3, every=1))
        script(losses, EarlyStopping(patience=3, every=1), steps=4, checkpoint=tmp_path)
        again = script(losses, EarlyStopping(patience=3, every=1), checkpoint=tmp_path, resume=True)
        assert again.steps == straight.steps == 5
        assert again.stopped_early
        # A run that stopped early is finished: resuming it does nothing more.
        once_more = script(losses, EarlyStopping(patience=3, every=1), checkpoint=tmp_path, resume=True)
        assert (once_more.steps, once_more.stopped_early) == (5, True)

    @pytest.mark.parametrize("arguments", [{"patience": 0}, {"every": 0}, {"min_delta": -1.0}])
    def test_bad_arguments(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError):
            EarlyStopping(**arguments)


class TestKeepBest:
    def test_puts_the_best_parameters_back(self) -> None:
        keep = KeepBest(every=1)
        result = script([4.0, 1.0, 3.0, 5.0], keep)
        assert (keep.best, keep.best_step) == (1.0, 2)
        assert result.objective.count.item() == 2.0  # SGD with lr 1 counts the steps

    def test_without_restore_it_only_keeps(self) -> None:
        keep = KeepBest(every=1, restore=False)
        result = script([4.0, 1.0, 3.0, 5.0], keep)
        assert result.objective.count.item() == 4.0
        assert keep.parameters["count"].item() == 2.0

    def test_the_checkpoint_goes_on_from_the_last_parameters(self, tmp_path: Path) -> None:
        losses = [4.0, 1.0, 3.0, 5.0, 0.5, 7.0]
        script(losses, KeepBest(every=1), steps=4, checkpoint=tmp_path)
        again = script(losses, KeepBest(every=1), checkpoint=tmp_path, resume=True)
        assert again.losses.tolist() == losses
        assert again.objective.count.item() == 5.0
        finished = script(losses, KeepBest(every=1), checkpoint=tmp_path, resume=True)
        assert finished.objective.count.item() == 5.0


class TestEvery:
    def test_keeps_steps_and_values(self) -> None:
        seen = Every(3, lambda state: state.losses[-1].item())
        script([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], seen)
        assert seen.steps == [3, 6]
        assert seen.values == [3.0, 6.0]

    def test_tensors_are_kept_as_they_were(self) -> None:
        seen = Every(1, lambda state: state.objective.count)
        script([0.0] * 3, seen)
        assert [v.item() for v in seen.values] == [1.0, 2.0, 3.0]

    def test_state_survives_a_resume(self, tmp_path: Path) -> None:
        first, second = (Every(2, lambda state: torch.tensor([state.step])) for _ in range(2))
        script([0.0] * 8, first, steps=5, checkpoint=tmp_path)
        script([0.0] * 8, second, checkpoint=tmp_path, resume=True)
        assert second.steps == [2, 4, 6, 8]
        assert torch.equal(torch.cat(second.values), torch.tensor([2, 4, 6, 8]))

    def test_its_random_numbers_are_its_own(self) -> None:
        def run(*callbacks: Any) -> tuple[FitResult, dict[str, torch.Tensor]]:
            objective = Regression(dropout=0.5)
            result = fit(
                objective, regression_data(), steps=12, batch_size=4, progress=False, callbacks=callbacks
            )
            return result, weights(objective)

        def noisy_metric(objective: nn.Module) -> torch.Tensor:
            return torch.rand(3).sum()

        draws = Every(2, lambda state: torch.rand(()).item())
        with_them = run(draws, EarlyStopping(50, every=3, metric=noisy_metric))
        without = run()
        assert torch.equal(with_them[0].losses, without[0].losses)
        assert same_bits(with_them[1], without[1])
        assert len(set(draws.values)) == 1  # the same numbers at every look, so that looks compare


def test_a_second_run_with_the_same_callbacks_is_like_the_first() -> None:
    def outcome(*callbacks: Any) -> tuple[Any, ...]:
        # The first run of two starts better than the second will ever be.
        result = script([3.0, 2.0, 4.0, 5.0, 6.0, 7.0], *callbacks)
        kept = [(c.best, c.best_step, c.parameters) for c in callbacks if isinstance(c, KeepBest)]
        return result.steps, kept, [c.values for c in callbacks if isinstance(c, Every)]

    def fresh() -> list[Any]:
        return [EarlyStopping(2, every=1), KeepBest(every=1), Every(2, lambda state: state.step)]

    used = fresh()
    script([0.5, 1.0, 2.0], *used)
    assert outcome(*used) == outcome(*fresh())


def test_the_protocol_is_called_in_order_and_sees_the_state() -> None:
    calls: list[tuple[Any, ...]] = []

    class Watch(Callback):
        def on_start(self, state: FitState) -> None:
            calls.append(("start", state.step, state.value))

        def on_step(self, state: FitState) -> None:
            assert state.value is not None
            calls.append((state.step, state.value.loss.item(), state.is_main, state.lr))

        def on_end(self, state: FitState) -> None:
            calls.append(("end", state.step, len(state.losses), dict(state.terms)))

    script([7.0, 8.0], Watch(), lambda state: calls.append(("function", state.step)))
    assert calls == [
        ("start", 0, None),
        (1, 7.0, True, 1.0),
        ("function", 1),
        (2, 8.0, True, 1.0),
        ("function", 2),
        ("end", 2, 2, {}),
    ]


def test_request_stop_ends_after_this_step() -> None:
    def stop(state: FitState) -> None:
        if state.step == 3:
            state.request_stop()

    result = fit(Quadratic(torch.ones(1)), steps=100, progress=False, callbacks=[stop])
    assert (result.steps, result.stopped_early) == (3, True)
    assert "stopped early" in repr(result)


def test_another_callback_in_the_resumed_run_moves_no_state(tmp_path: Path) -> None:
    first = EarlyStopping(patience=100, every=1)
    script([3.0, 2.0, 4.0, 5.0], first, steps=2, checkpoint=tmp_path)
    again, extra = EarlyStopping(patience=100, every=1), KeepBest(every=1)
    script([3.0, 2.0, 4.0, 5.0], extra, again, checkpoint=tmp_path, resume=True)
    assert (again.best, again.best_step, again.misses) == (2.0, 2, 2)
    assert (extra.best, extra.best_step) == (4.0, 3)
