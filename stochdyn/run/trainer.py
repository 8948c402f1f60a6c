"""The one training loop: ``fit``."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stochdyn.errors import InvalidInputError
from stochdyn.run.callbacks import Callback
from stochdyn.run.data import make_batches
from stochdyn.run.distributed import connect
from stochdyn.run.interrupt import DeferredInterrupt
from stochdyn.run.loop import Run
from stochdyn.run.randomness import fork_random_state, seed_everything
from stochdyn.run.result import FitResult
from stochdyn.run.setup import Options, ParameterWatch, choose_device, materialise
from stochdyn.run.state import FitState

__all__ = ["fit"]

# Distance between the seeds of neighbouring ranks: far from the small seeds people choose.
_RANK_STRIDE = 0x9E3779B1


def fit(
    objective: nn.Module,
    data: Any = None,
    steps: int = 2000,
    lr: float = 1e-3,
    batch_size: int | None = None,
    seed: int | None = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
    callbacks: Sequence[Callback | Callable[[FitState], Any]] = (),
    *,
    optimizer: Callable[..., Optimizer] | None = None,
    scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    clip_norm: float | None = None,
    ema: float | None = None,
    checkpoint_every: int = 500,
    log_every: int = 10,
    distributed: bool | Mapping[str, Any] | None = None,
    on_interrupt: Literal["raise", "return"] = "raise",
) -> FitResult:
    r"""Minimise an objective over its parameters, in place.

    Every step draws a batch, evaluates the objective, and lets the optimiser follow the gradient,

    .. math::
        \theta_{n+1} = \theta_n - \mathrm{step}\bigl(\nabla_\theta\,L(\theta_n;\ \mathrm{batch}_n)\bigr).

    Losses stay on the device and come to the host every ``log_every`` steps. A step whose loss, terms or
    gradients aren't finite raises, with the parameters of the last good step in place. The module's
    ``train``/``eval`` mode is left as it is. The global random state of the caller is put back at the end.

    Args:
        objective: an :class:`stochdyn.Objective`, Pyro's ``Trace_ELBO()(model, guide)``, or any module that
            returns a scalar loss. A plain module is called with the batch as its arguments (``*batch`` for a
            tuple or list, ``**batch`` for a dict). Only what ``objective.parameters()`` lists is trained, so
            bare ``pyro.param`` statements are not: use PyroModules.
        data: None; a tensor, or a tuple, list, dict or dataclass of tensors whose first axis counts items; a
            Dataset; a DataLoader.
        steps: total number of steps, those of a resumed run included.
        lr: learning rate.
        batch_size: items of a batch (on each rank); None makes the whole data the batch. Batches follow one
            random permutation an epoch and all have this size: items left over wait for another epoch.
        seed: seeds Python, NumPy, torch and the permutations for this run (rank r of data-parallel training
            its own); None draws from the caller's generators instead.
        device: such as ``"cuda"``; the objective and the data are moved there. None takes the objective's.
        progress: show a bar with the loss.
        checkpoint: directory for checkpoints, made if need be. One that is there already is replaced at the
            first save unless ``resume`` is set.
        resume: continue the run in ``checkpoint`` to the same bits as if it had never stopped; a fresh run if
            there is none. Arguments other than ``steps`` must be those of that run.
        callbacks: :class:`Callback` objects, or functions called with the :class:`FitState` after every step.
        optimizer: called as ``optimizer(parameters, lr=lr)``; Adam if None.
        scheduler: called as ``scheduler(optimizer)``; steps after every step.
        clip_norm: bound on the 2-norm of all gradients together.
        ema: decay of an exponential average of the parameters, which becomes ``result.ema``.
        checkpoint_every: steps between saves; the end of the run is saved always.
        log_every: steps between looks at the losses (and, on a GPU, at the watch for NaN).
        distributed: None uses DistributedDataParallel under ``torchrun`` or in an initialised process group,
            True demands it, False forbids it; a mapping demands it and gives its keyword arguments. Without
            ``batch_size`` all ranks see the whole data and differ in their random numbers. Ranks must share
            the file system for ``resume``.
        on_interrupt: after Ctrl-C the current step is finished and the checkpoint saved; then ``"raise"``
            raises :class:`FitInterrupted` (a KeyboardInterrupt that holds the result), ``"return"`` returns
            the result. A second Ctrl-C stops at once.

    Returns:
        Losses and terms of all steps, the objective, the averaged parameters, and how the run ended.

    Raises:
        InvalidInputError: for arguments that can't work; before any step.
        NonFiniteLossError: naming the step and the term or parameter; its ``result`` holds the run before it.
        CheckpointWriteError: if a checkpoint can't be written; the previous one is whole.
        DamagedCheckpointError: if the checkpoint to resume was cut short or altered.
        ForeignCheckpointError: if it belongs to another model, optimiser or data size.
        FitInterrupted: after Ctrl-C.

    Example:
        >>> from stochdyn.objectives import Objective, ObjectiveValue
        >>> class Fit(Objective):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mean = nn.Parameter(torch.zeros(()))
        ...     def forward(self, batch=None):
        ...         return ObjectiveValue((batch - self.mean).square().mean())
        >>> result = fit(Fit(), torch.full((8,), 3.0), steps=200, lr=0.1, progress=False)
        >>> round(result.objective.mean.item(), 2)
        3.0
    """
    options = Options(
        steps, lr, batch_size, seed, progress, None if checkpoint is None else Path(checkpoint),
        clip_norm, ema, checkpoint_every, log_every, on_interrupt,
    )  # fmt: skip
    if not isinstance(objective, nn.Module):
        raise InvalidInputError(
            "objective must be a torch.nn.Module",
            got=type(objective).__name__,
            hint="subclass stochdyn.Objective, or use Trace_ELBO()(model, guide)",
        )
    if resume and options.folder is None:
        raise InvalidInputError("resume=True needs the directory of the run", hint="pass checkpoint=...")
    place = choose_device(objective, device)
    world = connect(distributed, place)
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.enable_grad())
        stack.enter_context(fork_random_state(seed, place))
        # Ranks must draw one permutation, so without a seed they agree on one.
        order_seed = world.agree(int(torch.randint(2**62, ())), place) if seed is None else seed
        batches = make_batches(data, batch_size, order_seed, world, place)
        watch = ParameterWatch(objective)
        objective.to(place)
        materialise(objective, batches)
        objective.to(place)
        world.synchronise(objective)
        if seed is not None:
            seed_everything((seed + world.rank * _RANK_STRIDE) % 2**63, place)
        run = Run(objective, batches, callbacks, optimizer, scheduler, options, world, place, watch)
        if options.folder is not None:
            run.open_checkpoint(options.folder, resume)
        return run.train(stack.enter_context(DeferredInterrupt()))
