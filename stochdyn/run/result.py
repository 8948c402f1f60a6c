"""What a run of ``fit`` records and returns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn.errors import InvalidInputError
from stochdyn.objectives.base import ObjectiveValue

__all__ = ["FitResult", "LossLog"]


@dataclass
class FitResult:
    """The outcome of :func:`stochdyn.fit`.

    Attributes:
        losses: The loss ``(steps,)`` of every step, on the CPU; under data-parallel training the mean over ranks.
        objective: The objective that was given, trained in place.
        seconds: The wall-clock time of training, summed over resumed runs.
        terms: The tensors ``(steps,)`` of the objective's reported terms, NaN where a step had no such term.
        steps: The number of steps done, ``len(losses)``.
        bound: What the loss means, as in :class:`stochdyn.ObjectiveValue`.
        stopped_early: Whether a callback asked to stop.
        interrupted: Whether Ctrl-C stopped the run.
        ema: The averaged parameters by name; None if ``ema`` wasn't asked for.
    """

    losses: Tensor
    objective: nn.Module
    seconds: float
    terms: dict[str, Tensor] = field(default_factory=dict)
    steps: int = 0
    bound: str = "surrogate"
    stopped_early: bool = False
    interrupted: bool = False
    ema: dict[str, Tensor] | None = None

    @cached_property
    def ema_objective(self) -> nn.Module:
        """A copy of the objective that has the averaged parameters.

        Raises:
            InvalidInputError: If the run kept no average.
        """
        if self.ema is None:
            raise InvalidInputError(
                "this run kept no average of its parameters", hint="pass ema=0.999 to fit"
            )
        averaged = copy.deepcopy(self.objective)
        with torch.no_grad():
            for name, parameter in averaged.named_parameters():
                if name in self.ema:
                    parameter.copy_(self.ema[name])
        return averaged

    def __repr__(self) -> str:
        last = f"{self.losses[-1].item():.6g}" if len(self.losses) else "none"
        ending = ", stopped early" if self.stopped_early else ", interrupted" if self.interrupted else ""
        return f"FitResult(steps={self.steps}, last loss={last}, seconds={self.seconds:.1f}{ending})"


class _Series:
    """A growing one-dimensional tensor on the CPU."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._data = torch.empty(256, dtype=dtype)
        self.size = 0

    def extend(self, values: Tensor) -> None:
        needed = self.size + len(values)
        if needed > len(self._data):
            grown = torch.empty(max(needed, 2 * len(self._data)), dtype=self._data.dtype)
            grown[: self.size] = self._data[: self.size]
            self._data = grown
        self._data[self.size : needed] = values
        self.size = needed

    def pad(self, size: int) -> None:
        """Fill with NaN up to ``size``."""
        self.extend(torch.full((size - self.size,), float("nan"), dtype=self._data.dtype))

    @property
    def values(self) -> Tensor:
        return self._data[: self.size]


class LossLog:
    """Losses and terms of all steps: kept on the device step by step, brought to the host in chunks."""

    def __init__(self) -> None:
        self.bound = "surrogate"
        self._pending: list[ObjectiveValue] = []
        self._losses: _Series | None = None
        self._terms: dict[str, _Series] = {}

    @property
    def pending(self) -> int:
        """Number of steps not yet on the host."""
        return len(self._pending)

    @property
    def losses(self) -> Tensor:
        """Losses on the host so far."""
        return torch.empty(0) if self._losses is None else self._losses.values

    @property
    def terms(self) -> dict[str, Tensor]:
        """Terms on the host so far."""
        return {name: series.values for name, series in self._terms.items()}

    def add(self, value: ObjectiveValue) -> None:
        """Note one step, by its detached value; nothing leaves the device."""
        self._pending.append(value)

    def gather(self, reduce: Callable[[Tensor], Tensor], limit: int | None = None) -> None:
        """Bring the noted steps, at most ``limit`` of them, to the host through ``reduce``."""
        batch = self._pending if limit is None else self._pending[:limit]
        self._pending = []
        if not batch:
            return
        self.bound = batch[-1].bound
        losses = reduce(torch.stack([v.loss for v in batch])).cpu()
        if self._losses is None:
            self._losses = _Series(losses.dtype)
        start = self._losses.size
        self._losses.extend(losses)
        for name in dict.fromkeys(name for v in batch for name in v.terms):
            filled = [v.terms[name] if name in v.terms else v.loss.new_full((), float("nan")) for v in batch]
            values = reduce(torch.stack([f.to(batch[0].loss.device) for f in filled])).cpu()
            if name not in self._terms:
                self._terms[name] = _Series(values.dtype)
                self._terms[name].pad(start)
            self._terms[name].extend(values)
        for series in self._terms.values():
            series.pad(self._losses.size)

    def state_dict(self) -> dict[str, object]:
        """Everything gathered so far."""
        return {"losses": self.losses, "terms": self.terms, "bound": self.bound}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        losses, terms = state["losses"], state["terms"]
        self.bound = str(state["bound"])
        self._losses = _Series(losses.dtype)
        self._losses.extend(losses)
        for name, values in terms.items():
            self._terms[name] = _Series(values.dtype)
            self._terms[name].extend(values)
