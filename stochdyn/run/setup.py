"""Before the first step: settings, devices, calling conventions, optimisers, and what each must be."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.optim import LBFGS, Adam, Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from stochdyn._checks import as_seed, check_callable, check_choice, check_positive_int, check_real
from stochdyn.errors import DeviceMismatchError, DtypeMismatchError, InvalidInputError, ShapeError
from stochdyn.objectives.base import Objective, ObjectiveValue
from stochdyn.run.data import Batches
from stochdyn.run.encoding import map_tensors
from stochdyn.run.identity import held_by

__all__ = [
    "SPEED_OPTIONS",
    "Call",
    "Options",
    "ParameterWatch",
    "check_loss",
    "choose_device",
    "describe_optimizer",
    "describe_scheduler",
    "make_optimizer",
    "make_scheduler",
    "materialise",
]


#: Options of optimisers that decide about speed only, and that follow the device.
SPEED_OPTIONS = ("foreach", "fused", "capturable")
_PRECISIONS = {"bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Options:
    """The plain settings of a run, checked."""

    steps: int
    lr: float
    batch_size: int | None
    seed: int | None
    clip_norm: float | None
    ema: float | None
    accumulate: int
    precision: str | None
    log_every: int

    def __post_init__(self) -> None:
        check_positive_int(self.steps, "steps")
        check_real(self.lr, "lr", above=0.0)
        if self.batch_size is not None:
            check_positive_int(self.batch_size, "batch_size")
        if self.seed is not None:
            as_seed(self.seed)
        if self.clip_norm is not None:
            check_real(self.clip_norm, "clip_norm", above=0.0)
        if self.ema is not None:
            check_real(self.ema, "ema", above=0.0, below=1.0)
        check_positive_int(self.accumulate, "accumulate")
        check_positive_int(self.log_every, "log_every")
        if self.precision == "float16":
            raise InvalidInputError(
                "precision='float16' needs scaled losses, which fit doesn't do", hint="use 'bfloat16'"
            )
        if self.precision is not None:
            check_choice(self.precision, tuple(_PRECISIONS), "precision")

    @property
    def dtype(self) -> torch.dtype | None:
        """The precision of matrix products, or None for that of their factors."""
        return None if self.precision is None else _PRECISIONS[self.precision]


def describe_optimizer(optimizer: Optimizer) -> dict[str, object]:
    """Return class and options of a fresh optimiser, for the identity of a run."""
    found: dict[str, object] = {"optimizer": type(optimizer).__name__}
    several = len(optimizer.param_groups) > 1
    for i, group in enumerate(optimizer.param_groups):
        prefix = f"optimizer.{i}" if several else "optimizer"
        found[f"{prefix}.number of parameters"] = len(group["params"])
        for name, value in group.items():
            if name != "params" and name not in SPEED_OPTIONS:
                found[f"{prefix}.{name}"] = value
    return found


def describe_scheduler(scheduler: LRScheduler | None) -> dict[str, object]:
    """Return class and options of a fresh scheduler, such as where it ends, for the identity of a run."""
    if scheduler is None:
        return {"scheduler": None}
    return {
        "scheduler": type(scheduler).__name__,
        **{f"scheduler.{n}": v for n, v in held_by(scheduler).items()},
    }


class Call(nn.Module):
    """One calling convention for objectives and plain modules."""

    def __init__(self, objective: nn.Module) -> None:
        super().__init__()
        self.objective = objective

    def forward(self, batch: Any) -> ObjectiveValue:
        """Return the value of one batch."""
        try:
            value = self._value(batch)
        except RuntimeError as error:
            ours = {p.dtype for p in self.objective.parameters() if p.is_floating_point()}
            found: list[Tensor] = []
            map_tensors(lambda x: found.append(x) or x, batch)  # type: ignore[func-returns-value]
            theirs = {x.dtype for x in found if x.is_floating_point()}
            if "dtype" not in str(error) or not theirs or theirs <= ours:
                raise
            raise DtypeMismatchError(
                "the objective doesn't take the precision of the data",
                got=f"data {', '.join(sorted(map(str, theirs)))} and parameters {', '.join(sorted(map(str, ours)))}: {error}",
                hint="convert the data with .to(dtype), or the objective",
            ) from error
        if isinstance(value, Tensor):
            return ObjectiveValue(value)
        if isinstance(value, ObjectiveValue):
            return value
        raise InvalidInputError(
            "the objective must return an ObjectiveValue or a scalar tensor", got=type(value).__name__
        )

    def _value(self, batch: Any) -> Any:
        if isinstance(self.objective, Objective) or batch is None:
            return self.objective() if batch is None else self.objective(batch)
        if isinstance(batch, (tuple, list)):
            return self.objective(*batch)
        return self.objective(**batch) if isinstance(batch, Mapping) else self.objective(batch)


def check_loss(loss: Any) -> None:
    """Raise unless a loss is a differentiable real scalar."""
    if not isinstance(loss, Tensor) or loss.numel() != 1 or loss.ndim != 0:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ShapeError("the loss must be a scalar tensor", got=got, hint="sum or average it over the batch")
    if not loss.is_floating_point():
        raise InvalidInputError("the loss must be real and floating", got=loss.dtype)
    if not loss.requires_grad:
        raise InvalidInputError(
            "the loss doesn't depend on any trainable parameter",
            got="a tensor without a gradient",
            hint="look for .detach(), .item() or torch.no_grad() inside the objective",
        )


def choose_device(objective: nn.Module, device: str | torch.device | None) -> torch.device:
    """Return the device of a run: the one asked for, or the one the objective is on.

    ``"cuda"`` without a number is the GPU that ``torchrun`` means for this process, else the current one.

    Raises:
        InvalidInputError: If the device isn't one, or CUDA isn't there.
        DeviceMismatchError: If the objective is spread over devices and none is given.
    """
    if device is None:
        found = {t.device for t in (*objective.parameters(), *objective.buffers())}
        if len(found) > 1:
            raise DeviceMismatchError(
                "the objective is spread over devices", got=sorted(map(str, found)), hint="give device=..."
            )
        return found.pop() if found else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InvalidInputError(
            "device is unknown", got=repr(device), expected="such as 'cpu' or 'cuda'"
        ) from error
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise InvalidInputError(
                "device is not available", got=str(chosen), hint="this torch sees no CUDA device"
            )
        if chosen == torch.device("cuda"):
            chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", torch.cuda.current_device())))
    return chosen


def materialise(objective: nn.Module, batches: Batches) -> None:
    """Evaluate once if parameters may come with the first call (Pyro's autoguides, lazy layers).

    Buffers that were there before, such as running means, are put back.
    """
    parameters = list(objective.parameters())
    lazy = any(isinstance(p, UninitializedParameter) for p in parameters)
    if isinstance(objective, Objective) and parameters and not lazy:
        return
    before = {n: b.detach().clone() for n, b in objective.named_buffers()}
    Call(objective)(batches.first())
    with torch.no_grad():
        for name, buffer in objective.named_buffers():
            if name in before and before[name].shape == buffer.shape:
                buffer.copy_(before[name])


class ParameterWatch:
    """Finds, at the first step, parameters that would silently stay untrained.

    Args:
        objective: What is trained; made before anything evaluates it.
    """

    def __init__(self, objective: nn.Module) -> None:
        self._objective = objective
        self._marks = _gradient_marks()

    def check(self, trained: Mapping[str, nn.Parameter]) -> None:
        """After a backward pass, raise if it reached a parameter that isn't ``trained``."""
        late = [n for n, p in self._objective.named_parameters() if p.requires_grad and n not in trained]
        if late:
            raise InvalidInputError(
                "the objective makes parameters in its first evaluation, too late to train them",
                got=", ".join(late[:5]),
                hint="evaluate the objective once before fit",
            )
        owned = {id(p) for p in trained.values()}
        bare = [
            name
            for name, (tensor, mark) in _gradient_marks().items()
            if tensor not in owned and mark is not None and self._marks.get(name, (0, None))[1] != mark
        ]
        if bare:
            raise InvalidInputError(
                "the model has pyro.param statements outside its modules, which fit can't train",
                got=", ".join(bare[:5]),
                hint="make them PyroParam attributes of a PyroModule",
            )


def _gradient_marks() -> dict[str, tuple[int, tuple[int, int] | None]]:
    """Identity of every tensor in Pyro's global store, and a mark that changes when its gradient does."""
    pyro = sys.modules.get("pyro")
    if pyro is None or not hasattr(pyro, "get_param_store"):
        return {}
    stored = pyro.get_param_store().named_parameters()
    return {n: (id(p), None if p.grad is None else (id(p.grad), p.grad._version)) for n, p in stored}


def make_optimizer(
    factory: Callable[..., Optimizer] | None, parameters: Sequence[nn.Parameter], lr: float
) -> Optimizer:
    """Return the optimiser: what the factory makes, or Adam (fused on CUDA)."""
    if factory is None:
        # not on the CPU, where PyTorch's fused Adam takes gradients of another memory format for something else
        fused = all(p.is_cuda and p.is_floating_point() for p in parameters)
        return Adam(parameters, lr=lr, fused=True) if fused else Adam(parameters, lr=lr)
    if not callable(factory):
        raise InvalidInputError(
            "optimizer must be a class or function",
            got=type(factory).__name__,
            expected="such as torch.optim.AdamW",
        )
    made = factory(parameters, lr=lr)
    if not isinstance(made, Optimizer) or isinstance(made, LBFGS):
        hint = (
            "LBFGS evaluates several times per step"
            if isinstance(made, LBFGS)
            else "Pyro optimisers go with SVI"
        )
        raise InvalidInputError("optimizer must make a torch optimiser", got=type(made).__name__, hint=hint)
    return made


def make_scheduler(
    factory: Callable[[Optimizer], LRScheduler] | None, optimizer: Optimizer
) -> LRScheduler | None:
    """Return what the factory makes; None without one."""
    if factory is None:
        return None
    check_callable(factory, "scheduler", "a class or function of an optimiser")
    made = factory(optimizer)
    if not isinstance(made, LRScheduler) or isinstance(made, ReduceLROnPlateau):
        raise InvalidInputError(
            "scheduler must make a torch scheduler that steps without a metric", got=type(made).__name__
        )
    return made
