"""A bad step is named exactly, and neither parameters, averages nor checkpoints have seen it."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stochdyn.run.training as training_module
from stochdyn.errors import NonFiniteLossError
from stochdyn.objectives import ObjectiveValue
from stochdyn.run import FitResult, fit
from stochdyn.run.guard import FiniteGuard
from tests.run.toys import Quadratic, Regression, regression_data, same_bits, weights

BAD_STEP = 7

OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "fused": partial(torch.optim.Adam, fused=True),
}


class Breaks(Regression):
    """Goes wrong in one place in evaluation ``BAD_STEP`` and stays well otherwise.

    Where it does is no part of it, so that a run that was well and one that isn't are the same run.
    """

    def __init__(self, where: str) -> None:
        super().__init__()
        os.environ[f"WHERE_{id(self)}"] = where
        self.calls = 0
        self.scale = nn.Parameter(torch.zeros(2))

    def forward(self, batch: Any = None) -> ObjectiveValue:
        self.calls += 1
        bad = self.calls == BAD_STEP
        where = os.environ[f"WHERE_{id(self)}"]
        error = super().forward(batch).loss + self.scale.square().sum()
        penalty = torch.tensor(0.1)
        loss = error + penalty
        if bad and where == "term":
            penalty = penalty * float("nan")
            loss = error + penalty
        elif bad and where == "loss":
            loss = loss + float("inf")
        elif bad and where == "gradient":
            loss = loss + (0 * self.scale).sqrt().sum()  # 0 with the slope 0 * inf
        return ObjectiveValue(loss, {"error": error, "penalty": penalty})


@pytest.fixture(params=["immediate", "deferred"])
def watched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run with the guard as on the CPU, and as on a GPU."""
    if request.param == "deferred":
        monkeypatch.setattr(training_module, "FiniteGuard", partial(FiniteGuard, immediate=False))
    return str(request.param)


def run(objective: nn.Module, steps: int, **kwargs: Any) -> FitResult:
    return fit(
        objective,
        regression_data(),
        **{"steps": steps, "lr": 0.05, "batch_size": 4, "ema": 0.9, "progress": False, **kwargs},
    )


MESSAGES = {
    "term": r"term 'penalty' of the objective is not finite at step 7",
    "loss": r"the loss is not finite at step 7",
    "gradient": r"gradient of parameter 'scale' is not finite although the loss is at step 7",
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("where", MESSAGES)
def test_names_step_and_culprit_and_keeps_the_last_finite_state(
    watched: str, where: str, optimizer: str
) -> None:
    good = Breaks("nowhere")
    before = run(good, BAD_STEP - 1, optimizer=OPTIMIZERS[optimizer])
    objective = Breaks(where)
    with pytest.raises(NonFiniteLossError, match=MESSAGES[where]) as caught:
        run(objective, 30, optimizer=OPTIMIZERS[optimizer])
    assert "parameters are those after step 6" in str(caught.value)
    assert caught.value.step == BAD_STEP
    assert same_bits(weights(objective), weights(good))
    result = caught.value.result
    assert isinstance(result, FitResult)
    assert torch.equal(result.losses, before.losses)
    assert result.steps == BAD_STEP - 1
    assert result.ema is not None
    assert before.ema is not None
    # On a device the weight of the average is a tensor, which rounds differently from a number.
    for name, value in result.ema.items():
        torch.testing.assert_close(value, before.ema[name], rtol=1e-6, atol=1e-7)
    # Immediate: not one evaluation more. Deferred: up to the next look at the losses.
    assert objective.calls == (BAD_STEP if watched == "immediate" else 10)


def test_no_checkpoint_holds_a_bad_step(watched: str, tmp_path: Path) -> None:
    objective = Breaks("gradient")
    with pytest.raises(NonFiniteLossError):
        run(objective, 30, checkpoint=tmp_path, checkpoint_every=5, log_every=1000)
    # Immediate: all that was done before it. Deferred: the last one that was sure.
    step = "000000006" if watched == "immediate" else "000000005"
    assert {p.name.split("-")[1] for p in tmp_path.glob("tensors-*")} == {step}
    again = Breaks("nowhere")
    straight = Breaks("nowhere")
    run(again, 12, checkpoint=tmp_path, resume=True)
    run(straight, 12)
    assert same_bits(weights(again), weights(straight))


def test_a_bad_first_step_after_a_resume_is_numbered_from_the_start(watched: str, tmp_path: Path) -> None:
    run(Breaks("nowhere"), 4, checkpoint=tmp_path)
    objective = Breaks("loss")
    objective.calls = 4  # a resumed process counts from where it stood
    with pytest.raises(NonFiniteLossError, match="at step 7") as caught:
        run(objective, 30, checkpoint=tmp_path, resume=True)
    assert isinstance(caught.value.result, FitResult)
    assert len(caught.value.result.losses) == 6


def test_large_but_finite_gradients_pass(watched: str) -> None:
    """Squares of these gradients overflow in single precision; they themselves don't."""

    class Steep(Quadratic):
        def forward(self, batch: Any = None) -> ObjectiveValue:
            return ObjectiveValue((1e30 * self.theta).sum())

    objective = Steep(torch.ones(3))
    fit(objective, steps=2, lr=1e-30, optimizer=torch.optim.SGD, progress=False)
    torch.testing.assert_close(objective.theta.detach(), torch.full((3,), -2.0))


def test_parameters_of_several_precisions_and_sparse_gradients(watched: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(4, 2, sparse=True)
            self.wide = nn.Parameter(torch.ones((), dtype=torch.float64))
            self.calls = 0

        def forward(self) -> torch.Tensor:
            self.calls += 1
            row = self.table(torch.tensor([1, 1])).sum()
            if self.calls == 3:
                row = row + (0 * self.table(torch.tensor([2]))).sqrt().sum()
            return row.double() + 1e300 * self.wide * 1e-300

    module = Mixed()
    with pytest.raises(
        NonFiniteLossError, match=r"'table\.weight' is not finite although the loss is at step 2"
    ):
        fit(module, steps=9, lr=0.1, optimizer=torch.optim.SGD, progress=False)
    # One evaluation was the trial before the first step, so the third is step 2.
    assert module.wide.item() == pytest.approx(0.9)


def test_terms_named_like_parameters_are_told_apart(watched: str) -> None:
    class Namesake(Quadratic):
        calls = 0

        def forward(self, batch: Any = None) -> ObjectiveValue:
            self.calls += 1
            loss = super().forward().loss
            if self.calls == 2:
                loss = loss + (0 * self.theta).sqrt().sum()
            return ObjectiveValue(loss, {"theta": torch.zeros(())})

    with pytest.raises(NonFiniteLossError, match="gradient of parameter 'theta'"):
        fit(Namesake(torch.ones(1)), steps=5, progress=False)


def test_many_bad_parameters_are_counted() -> None:
    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.ParameterList([torch.zeros(()) for _ in range(8)])

        def forward(self) -> torch.Tensor:
            return torch.stack([p.sqrt() * 0 for p in self.p]).sum()

    with pytest.raises(NonFiniteLossError, match=r"'p\.0', .*'p\.4' and 3 more"):
        fit(Wide(), steps=1, progress=False)


def test_a_parameter_without_entries_is_no_obstacle() -> None:
    class WithNothing(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.nothing = nn.Parameter(torch.zeros(0))

        def forward(self, batch: Any = None) -> ObjectiveValue:
            value = super().forward(batch)
            return ObjectiveValue(value.loss + self.nothing.sum(), value.terms, value.bound)

    result = fit(WithNothing(), regression_data(), steps=3, progress=False, ema=0.9, clip_norm=1.0)
    assert torch.isfinite(result.losses).all()
