"""The one training loop: ``fit``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from stochdyn._checks import check_bool, check_choice, check_not_frozen, check_positive_int, check_type
from stochdyn._transforms import as_ordinary, recording
from stochdyn.errors import InvalidInputError
from stochdyn.run.callbacks import Callback
from stochdyn.run.data import make_batches
from stochdyn.run.distributed import connect
from stochdyn.run.engine import as_folder, run_to_end
from stochdyn.run.randomness import OwnRandomness
from stochdyn.run.result import FitResult
from stochdyn.run.setup import Options, ParameterWatch, choose_device, materialise
from stochdyn.run.state import FitState
from stochdyn.run.training import Training

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
    accumulate: int = 1,
    precision: Literal["bfloat16"] | None = None,
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
        objective: An :class:`stochdyn.Objective`, Pyro's ``Trace_ELBO()(model, guide)``, or any module that
            returns a scalar loss. A plain module is called with the batch as its arguments (``*batch`` for a
            tuple or list, ``**batch`` for a dict). Only what ``objective.parameters()`` lists is trained, so
            bare ``pyro.param`` statements are not: use PyroModules.
        data: None; a tensor, an array or a list of numbers, or a tuple, list, dict or dataclass of them whose first
            axis counts items; a Dataset; a DataLoader. Whole numbers, such as labels, stay whole.
        steps: The total number of updates, those of a resumed run included.
        lr: The learning rate.
        batch_size: The number of items of a batch (on each rank); None makes the whole data the batch. Batches follow
            one random permutation per epoch and all have this size: items left over wait for another epoch.
        seed: What Python's, NumPy's and torch's generators, which are the run's own while it lasts, and the permutations
            start from (rank r of data-parallel training has its own); None draws a seed from torch's generator.
        device: Where the run computes, such as ``"cuda"``; the objective and the data are moved there. None takes the objective's.
        progress: Whether to show a bar with the loss, which appears after two seconds.
        checkpoint: The directory for checkpoints, made if need be. One that is there already is replaced at the first
            save unless ``resume`` is set.
        resume: Whether to continue the run in ``checkpoint`` to the same bits as if it had never stopped; a fresh run
            if there is none. Everything but ``steps`` and the callbacks must be as in that run
            (:mod:`stochdyn.run.identity` says what is compared): another optimiser option is refused, and so is a
            schedule with another end.
        callbacks: :class:`Callback` objects, or functions called with the :class:`FitState` after every step.
        optimizer: A function that is called as ``optimizer(parameters, lr=lr)``; Adam if None.
        scheduler: A function that is called as ``scheduler(optimizer)``; steps after every update.
        clip_norm: The bound on the 2-norm of all gradients together.
        ema: The decay of an exponential average of the parameters, which becomes ``result.ema``.
        accumulate: The number of batches whose mean gradient makes one update, which equals one batch of that many times the
            size in the memory of one.
        precision: The precision of products: ``"bfloat16"`` evaluates the objective with matrix products in that
            precision (torch's autocast), with parameters and updates in their own; None in the precision of the
            parameters.
        checkpoint_every: The number of steps between saves; the end of the run is saved always.
        log_every: The number of steps between looks at the losses (and, on a GPU, at the watch for NaN).
        distributed: None uses DistributedDataParallel under ``torchrun`` or in an initialised process group,
            True demands it, False forbids it; a mapping demands it and gives its keyword arguments. Without
            ``batch_size`` all ranks see the whole data and differ in their random numbers. Ranks must share
            the file system for ``resume``.
        on_interrupt: After Ctrl-C the current step is finished and the checkpoint saved; then ``"raise"`` raises
            :class:`Interrupted` (a KeyboardInterrupt that holds the result), ``"return"`` returns the result. A second
            Ctrl-C stops at once, with the result of the steps before.

    Returns:
        Losses and terms of all steps, the objective, the averaged parameters, and how the run ended.

    Raises:
        InvalidInputError: For arguments that can't work; before any step.
        NonFiniteLossError: If a loss or a gradient isn't finite; the message names the step and the term or parameter;
            its ``result`` holds the run before it.
        CheckpointInUseError: If another run has the checkpoint's directory.
        CheckpointWriteError: If a checkpoint can't be written; the previous one is whole.
        DamagedCheckpointError: If the checkpoint to resume was cut short or altered.
        ForeignCheckpointError: If it belongs to another run; the message names what differs.
        LostProcessError: If another rank has died; the last checkpoint is whole.
        Interrupted: After Ctrl-C.

    An exception of the objective or of a callback goes through; the checkpoint then holds the last whole step, and the
    exception's ``result`` the run so far.

    Example:
        >>> from stochdyn.objectives import Objective, ObjectiveValue
        >>> class Fit(Objective):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.mean = nn.Parameter(torch.zeros(()))
        ...     def forward(self, batch=None):
        ...         return ObjectiveValue((batch - self.mean).square().mean())
        >>> result = fit(Fit(), torch.full((8,), 3.0), steps=200, lr=0.1)
        >>> round(result.objective.mean.item(), 2)
        3.0
    """
    options = Options(steps, lr, batch_size, seed, clip_norm, ema, accumulate, precision, log_every)
    check_positive_int(checkpoint_every, "checkpoint_every")
    check_choice(on_interrupt, ("raise", "return"), "on_interrupt")
    check_bool(progress, "progress")
    check_bool(resume, "resume")
    check_type(distributed, (bool, Mapping, type(None)), "distributed")
    as_folder(checkpoint, resume)
    if not isinstance(objective, nn.Module):
        raise InvalidInputError(
            "objective must be a torch.nn.Module",
            got=type(objective).__name__,
            hint="subclass stochdyn.Objective, or use Trace_ELBO()(model, guide)",
        )
    check_not_frozen(objective.parameters())
    place = choose_device(objective, device)
    world = connect(distributed, place)
    own = OwnRandomness(seed, place)
    with recording(), own:
        # Ranks must draw one permutation, so without a seed they agree on one.
        assert own.seed is not None
        shared = world.agree(own.seed, place) if seed is None else seed
        batches = make_batches(as_ordinary(data), batch_size, shared, world, place)
        watch = ParameterWatch(objective)
        objective.to(place)
        materialise(objective, batches)
        objective.to(place)
        world.synchronise(objective)
        own.reseed(shared + world.rank * _RANK_STRIDE)
        run = Training(objective, batches, callbacks, optimizer, scheduler, options, world, place, watch)
        return run_to_end(
            run,
            "fit",
            identity=None if checkpoint is None else run.identity(),
            randomness=own,
            progress=progress,
            checkpoint=checkpoint,
            resume=resume,
            checkpoint_every=checkpoint_every,
            on_interrupt=on_interrupt,
        )
