"""What callbacks see of a running ``fit``."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stochdyn.objectives.base import ObjectiveValue

if TYPE_CHECKING:
    from stochdyn.run.training import Training

__all__ = ["FitState"]


class FitState:
    """A run of :func:`stochdyn.fit` in progress, as callbacks see it.

    It holds nothing itself: every attribute is read from the run at the moment of asking.

    Example:
        >>> from stochdyn.run import fit
        >>> class Square(nn.Linear):
        ...     def forward(self):
        ...         return self.weight.square().sum()
        >>> seen = []
        >>> result = fit(Square(3, 1), steps=4, callbacks=[lambda state: seen.append((state.step, state.steps))])
        >>> seen
        [(1, 4), (2, 4), (3, 4), (4, 4)]
    """

    def __init__(self, run: Training) -> None:
        self._run = run

    @property
    def objective(self) -> nn.Module:
        """The objective, as it was given."""
        return self._run.objective

    @property
    def optimizer(self) -> Optimizer:
        """The optimiser."""
        return self._run.optimizer

    @property
    def scheduler(self) -> LRScheduler | None:
        """The learning-rate scheduler, or None."""
        return self._run.scheduler

    @property
    def step(self) -> int:
        """The number of updates done, those before a resumption included."""
        return self._run.number

    @property
    def steps(self) -> int:
        """The number of updates wanted."""
        return self._run.options.steps

    @property
    def value(self) -> ObjectiveValue | None:
        """The :class:`~stochdyn.ObjectiveValue` of the last step, detached, on the device; None before the first."""
        return self._run.value

    @property
    def device(self) -> torch.device:
        """Where the run computes."""
        return self._run.device

    @property
    def is_main(self) -> bool:
        """Whether this process should print and write."""
        return self._run.world.is_main

    @property
    def losses(self) -> Tensor:
        """Losses of all steps so far on the CPU; waits for the device. All ranks must ask at one step."""
        self._run.gather()
        return self._run.log.losses

    @property
    def terms(self) -> dict[str, Tensor]:
        """Terms of all steps so far on the CPU; waits for the device."""
        self._run.gather()
        return self._run.log.terms

    @property
    def lr(self) -> float:
        """Learning rate of the first parameter group."""
        return float(self.optimizer.param_groups[0]["lr"])

    @property
    def ema(self) -> dict[str, Tensor] | None:
        """Averaged parameters by name; None without ``ema``."""
        return None if self._run.average is None else self._run.average.values

    @property
    def seconds(self) -> float:
        """Wall-clock time of the run so far, earlier parts of a resumed run included."""
        return self._run.seconds

    @property
    def stop_requested(self) -> bool:
        """Whether a callback has asked to stop."""
        return self._run.stop_requested

    def request_stop(self) -> None:
        """End the run after this step (under data-parallel training, when losses are next gathered)."""
        self._run.stop_requested = True
