"""A panel of heart-transplant patients: stages of coronary allograft vasculopathy at their yearly visits."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from stochdyn.datasets._csv import read_columns

__all__ = ["HeartTransplants", "heart_transplants"]


class HeartTransplants(NamedTuple):
    """One row per visit, as columns; a mapping of them is ``heart_transplants()._asdict()``.

    Attributes:
        subject: The number ``(2846,)`` of the patient.
        years: The years ``(2846,)`` since the transplant.
        state: The state ``(2846,)``: 1 no, 2 mild and 3 severe disease of the graft's arteries, 4 death.
        donor_age: The age ``(2846,)`` of the donor in years.
    """

    subject: Tensor
    years: Tensor
    state: Tensor
    donor_age: Tensor


def heart_transplants() -> HeartTransplants:
    """Return 2846 visits of 622 patients after a heart transplant, with the exact times of deaths.

    Returns:
        Columns of the panel; subjects and states are whole numbers, times float64.

    Example:
        >>> panel = heart_transplants()
        >>> len(panel.subject.unique()), panel.state.unique().tolist()
        (622, [1, 2, 3, 4])

    Reference:
        Sharples, Jackson, Parameshwar, Wallwork and Large, "Diagnostic accuracy of coronary angiography and risk factors
        for post-heart-transplant cardiac allograft vasculopathy", Transplantation 76, 2003. Data of Papworth Hospital,
        first published with the R package msm; this copy from MSMplus (MIT).
    """
    columns = read_columns("heart_transplants", ("PTNUM", "years", "state", "dage"))
    return HeartTransplants(
        torch.tensor(columns["PTNUM"]).long(),
        torch.tensor(columns["years"], dtype=torch.float64),
        torch.tensor(columns["state"]).long(),
        torch.tensor(columns["dage"], dtype=torch.float64),
    )
