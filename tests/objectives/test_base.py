"""Objectives are modules that return a loss, its terms and what the number means."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

import stochdyn as sd


class Distance(sd.Objective):
    """Squared distance of a parameter from the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.at = nn.Parameter(torch.tensor(1.0))

    def forward(self, batch: Any = None) -> sd.ObjectiveValue:
        loss = (self.at - batch) ** 2
        return sd.ObjectiveValue(loss, {"distance": loss.detach()}, "residual")


def test_an_objective_is_a_module_with_parameters_and_state() -> None:
    objective = Distance()
    value = objective(torch.tensor(3.0))
    value.loss.backward()
    assert objective.at.grad is not None
    assert objective.at.grad.item() == -4.0
    assert value.terms["distance"].item() == 4.0
    assert value.bound == "residual"
    assert list(objective.state_dict()) == ["at"]


def test_an_objective_says_what_it_evaluates() -> None:
    class Nothing(sd.Objective):
        pass

    with pytest.raises(TypeError, match="forward"):
        Nothing()  # type: ignore[abstract]


def test_a_value_is_frozen_and_claims_no_bound_by_default() -> None:
    value = sd.ObjectiveValue(torch.tensor(1.0))
    assert value.bound == "surrogate"
    assert value.terms == {}
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.loss = torch.tensor(2.0)  # type: ignore[misc]
