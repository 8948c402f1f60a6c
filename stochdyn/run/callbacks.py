"""What may watch and stop a run of ``fit``: early stopping, the best parameters, calls at regular steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stochdyn._checks import check_bool, check_callable, check_positive_int, check_real
from stochdyn.run.randomness import fork_random_state

if TYPE_CHECKING:
    from stochdyn.run.state import FitState

__all__ = ["Callback", "EarlyStopping", "Every", "KeepBest", "Metric"]

Metric = Callable[[nn.Module], "Tensor | float"]


class Callback:
    """The protocol of callbacks: override what you need.

    A plain function is accepted as well and is called as :meth:`on_step`. Under data-parallel training
    callbacks run on every rank; use ``state.is_main`` for what only one process should do.

    Example:
        >>> class Announce(Callback):
        ...     def on_end(self, state):
        ...         print("done after", state.step, "steps")
    """

    def on_start(self, state: FitState) -> None:
        """Before the first step (of this call; a resumed run starts at ``state.step > 0``)."""

    def on_step(self, state: FitState) -> None:
        """After every step. Reading ``state.losses`` waits for the device; ``state.value`` doesn't."""

    def on_end(self, state: FitState) -> None:
        """After the last step, also when it came early or by Ctrl-C; not after an error."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of this callback: plain data and tensors."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        del state


class Every(Callback):
    """Call a function of the state at regular steps and keep what it returns.

    Random numbers that the function draws don't change those of the training.

    Use it to watch a quantity, to plot, or to evaluate on held-out data now and then.

    Args:
        every: The number of steps between calls.
        function: A function that is called with the :class:`FitState`; a result other than None is kept.

    Attributes:
        steps: The steps at which something was kept.
        values: What was kept; floats, tensors or plain data, so that checkpoints can hold it.

    Example:
        >>> from stochdyn.run import Every, fit
        >>> norm = Every(2, lambda state: state.objective.weight.norm().item())
        >>> class Square(nn.Linear):
        ...     def forward(self):
        ...         return self.weight.square().sum()
        >>> result = fit(Square(3, 1), steps=6, progress=False, callbacks=[norm])
        >>> norm.steps
        [2, 4, 6]
    """

    def __init__(self, every: int, function: Callable[[FitState], Any]) -> None:
        check_positive_int(every, "every")
        check_callable(function, "function", "a function of the FitState")
        self.every, self.function = every, function
        self.steps: list[int] = []
        self.values: list[Any] = []

    def on_start(self, state: FitState) -> None:
        """Before the first step: forget what an earlier run left."""
        if state.step == 0:
            self.steps, self.values = [], []

    def on_step(self, state: FitState) -> None:
        """After every step."""
        if state.step % self.every:
            return
        with _own_randomness(state):
            value = self.function(state)
        if value is not None:
            self.steps.append(state.step)
            self.values.append(value.detach().clone() if isinstance(value, Tensor) else value)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of this callback: plain data and tensors."""
        return {"steps": list(self.steps), "values": list(self.values)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.steps, self.values = list(state["steps"]), list(state["values"])


class _Monitor(Callback):
    """Every ``every`` steps: a metric of the objective, or the mean loss since the last look."""

    def __init__(self, every: int, metric: Metric | None) -> None:
        check_positive_int(every, "every")
        if metric is not None:
            check_callable(metric, "metric", "a function of the objective")
        self.every, self.metric = every, metric
        self.forget()

    def forget(self) -> None:
        """Forget what was seen."""
        self.best = math.inf
        self.best_step = 0

    def on_start(self, state: FitState) -> None:
        """Before the first step: forget what an earlier run left."""
        if state.step == 0:
            self.forget()

    def measure(self, state: FitState) -> float | None:
        """Return the number to judge by at this step; None between looks."""
        if state.step % self.every:
            return None
        if self.metric is None:
            return float(state.losses[-self.every :].mean())
        with _own_randomness(state), torch.no_grad():
            return float(self.metric(state.objective))

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of this callback: plain data and tensors."""
        return {"best": self.best, "best_step": self.best_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        self.best, self.best_step = state["best"], state["best_step"]


class EarlyStopping(_Monitor):
    """Stop when nothing improves any more.

    Use it where a run may be longer than it has to be.

    Args:
        patience: The number of looks in a row without improvement that stop the run.
        every: The number of steps between looks.
        min_delta: The improvement that counts, in the units of the loss.
        metric: The function of the objective to judge by, smaller is better such as a validation loss, run without
            gradients; None judges by the mean training loss since the last look. For an evidence bound give a metric
            with many particles: a noisy loss hides small improvements.

    Attributes:
        best: The smallest value seen; best_step: when.
    """

    def __init__(
        self, patience: int = 5, every: int = 100, min_delta: float = 0.0, metric: Metric | None = None
    ) -> None:
        super().__init__(every, metric)
        check_positive_int(patience, "patience")
        check_real(min_delta, "min_delta", minimum=0.0)
        self.patience, self.min_delta = patience, min_delta

    def forget(self) -> None:
        """Forget what was seen."""
        super().forget()
        self.misses = 0

    def on_step(self, state: FitState) -> None:
        """After every step."""
        value = self.measure(state)
        if value is None:
            return
        if value < self.best - self.min_delta:
            self.best, self.best_step, self.misses = value, state.step, 0
            return
        self.misses += 1
        if self.misses >= self.patience:
            state.request_stop()

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of this callback: plain data and tensors."""
        return {**super().state_dict(), "misses": self.misses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.misses = state["misses"]


class KeepBest(_Monitor):
    """Keep the best parameters of the run and put them back at its end.

    Use it where the last parameters needn't be the best, as with held-out data.

    Args:
        every: The number of steps between looks.
        metric: The function of the objective to judge by, as in :class:`EarlyStopping`.
        restore: Whether to put the best parameters into the objective at the end. The checkpoint keeps the last ones,
            from which a resumed run continues.

    Attributes:
        best: The smallest value seen; best_step: when; parameters: parameters and buffers of then, by name.
    """

    def __init__(self, every: int = 100, metric: Metric | None = None, restore: bool = True) -> None:
        super().__init__(every, metric)
        check_bool(restore, "restore")
        self.restore = restore

    def forget(self) -> None:
        """Forget what was seen."""
        super().forget()
        self.parameters: dict[str, Tensor] = {}

    def on_step(self, state: FitState) -> None:
        """After every step."""
        value = self.measure(state)
        if value is not None and value < self.best:
            self.best, self.best_step = value, state.step
            self.parameters = {
                name: value.detach().clone()
                for name, value in state.objective.state_dict().items()
                if isinstance(value, Tensor)
            }

    def on_end(self, state: FitState) -> None:
        """After the last step, also when it came early or by Ctrl-C; not after an error."""
        if self.restore and self.parameters:
            state.objective.load_state_dict(self.parameters, strict=False)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must keep of this callback: plain data and tensors."""
        return {**super().state_dict(), "parameters": dict(self.parameters)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`."""
        super().load_state_dict(state)
        self.parameters = dict(state["parameters"])


def _own_randomness(state: FitState) -> Any:
    """A metric draws the same numbers at every look, and none from the training's stream."""
    return fork_random_state(0, state.device)
