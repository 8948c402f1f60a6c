"""Data of every form that Python's arrays come in are the same numbers, with NaN where a value is missing."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import stochdyn as sd
from stochdyn._checks import as_tensor
from stochdyn.errors import InvalidInputError, StochdynError

VALUES = [0.3, None, 0.2, 0.5]
NUMBERS = [math.nan if v is None else v for v in VALUES]
FORMS: dict[str, Callable[[], Any]] = {
    "list": lambda: NUMBERS,
    "list with None": lambda: VALUES,
    "tuple": lambda: tuple(NUMBERS),
    "numpy": lambda: np.array(NUMBERS),
    "backwards": lambda: np.array(NUMBERS[::-1])[::-1],
    "strided": lambda: np.stack([NUMBERS, NUMBERS], -1)[:, 0],
    "other byte order": lambda: np.array(NUMBERS, dtype=">f8"),
    "objects": lambda: np.array(VALUES, dtype=object),
    "masked": lambda: np.ma.array([0.3, 77.0, 0.2, 0.5], mask=[False, True, False, False]),
    "series": lambda: pd.Series(NUMBERS, index=[9, 3, 5, 1]),
    "nullable series": lambda: pd.Series(VALUES, dtype="Float64"),
    "nullable array": lambda: pd.array(VALUES, dtype="Float64"),
    "tensor": lambda: torch.tensor(NUMBERS, dtype=torch.float64),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_the_same_numbers(form: str) -> None:
    like = torch.zeros((), dtype=torch.float64)
    found = as_tensor(FORMS[form](), "values", like=like, missing=True)
    torch.testing.assert_close(
        found, torch.tensor(NUMBERS, dtype=torch.float64), rtol=0, atol=0, equal_nan=True
    )


def test_whole_numbers_that_may_be_missing() -> None:
    states = pd.Series([0, 1, None], dtype="Int64")
    found = as_tensor(states, "states", missing=True)
    assert found.dtype == torch.float32
    assert found[:2].tolist() == [0.0, 1.0]
    assert math.isnan(float(found[2]))
    table = pd.DataFrame({"a": [1, 2], "b": [0.5, None]}).convert_dtypes()
    assert math.isnan(float(as_tensor(table, "table", missing=True)[1, 1]))
    counts = np.ma.array([1, 2, 3], mask=[False, True, False])
    assert math.isnan(float(as_tensor(counts, "counts", missing=True)[1]))
    law = sd.jumps.JumpMeasure([0.5, 0.5], [[0.0, 1.0], [2.0, 0.0]])
    seen, plain = (
        sd.jumps.log_evidence(law, [0.1, 0.5, 0.9], y, sd.jumps.Exact(2)) for y in (states, [0, 1, math.nan])
    )
    assert torch.equal(seen, plain)


@pytest.mark.parametrize(
    "bad", [pd.Series(["a", "b"]), pd.Series([1j]), np.array(["2020-01-01"], "M8[D]"), {1: 2}]
)
def test_what_are_no_numbers_is_refused(bad: Any) -> None:
    with pytest.raises(StochdynError, match="values must be"):
        as_tensor(bad, "values")


def test_a_learnt_function_of_time_lists_its_values() -> None:
    values = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    function = sd.core.Interpolation([0.0, 1.0, 2.0], values)
    assert [p for p in function.parameters() if p is values]
    for _ in range(2):
        function.at([0.5, 1.5]).square().sum().backward()
    assert function.values.shape == (3, 1)
    times = torch.tensor([0.0, 1.0, 2.0], requires_grad=True)
    with pytest.raises(InvalidInputError, match="isn't differentiable in times"):
        sd.core.Interpolation(times, [1.0, 2.0, 3.0])


def test_training_takes_arrays_that_run_backwards() -> None:
    class Mean(sd.Objective):
        def __init__(self) -> None:
            super().__init__()
            self.level = nn.Parameter(torch.zeros((), dtype=torch.float64))

        def forward(self, batch: torch.Tensor) -> sd.ObjectiveValue:
            return sd.ObjectiveValue((self.level - batch).square().mean())

    data = np.arange(6.0)
    one, other = (sd.fit(Mean(), x, steps=2, progress=False).losses for x in (data[::-1], data[::-1].copy()))
    assert torch.equal(one, other)


def test_panels_take_time_that_has_passed_and_masked_columns() -> None:
    table = {
        "id": ["a", "a", "b", "b"],
        "t": pd.to_timedelta([0.0, 1.5, 0.0, 2.0], unit="D"),
        "y": np.ma.array([1.0, 77.0, 2.0, 3.0], mask=[False, True, False, False]),
        "s": [0, 1, 1, 0],
    }
    panel = sd.Panel(table, series="id", time="t", values=["y"])
    assert panel.times.flatten().tolist() == [0.0, 1.5, 0.0, 2.0]
    assert math.isnan(float(panel.values[0, 1, 0]))
    assert sd.Panel(table, series="id", time="t", values=["y"], unit="hour").times[1, 1] == 48.0
    counted = sd.jumps.PanelData(table, subject="id", time="t", state="s")
    assert sorted(counted.gaps.dt.tolist()) == [1.5, 2.0]
