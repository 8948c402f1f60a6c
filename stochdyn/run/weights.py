"""Saving and loading the weights of an objective (or any module) without the rest of a run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from stochdyn.errors import CheckpointError, InvalidInputError
from stochdyn.run.checkpoint import (
    Checkpoint,
    check_fingerprint,
    fingerprint,
    read_checkpoint,
    write_checkpoint,
)

__all__ = ["load_weights", "save_weights"]


def save_weights(objective: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the parameters and buffers of a module into a directory: safetensors and JSON, atomically.

    Args:
        objective: any module.
        path: the directory, made if need be; weights that it holds already are replaced.

    Raises:
        CheckpointWriteError: if the disk is full or refuses; what was there is then still whole.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> net, other = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> save_weights(net, folder)
        >>> load_weights(folder, other)
        >>> torch.equal(net.weight, other.weight)
        True
    """
    content = Checkpoint("weights", 0, fingerprint(objective), {"objective": dict(objective.state_dict())})
    write_checkpoint(path, content)


def load_weights(path: str | os.PathLike[str], objective: nn.Module, *, ema: bool = False) -> None:
    """Load weights into a module, in place; from :func:`save_weights` or from a checkpoint of ``fit``.

    Args:
        path: the directory.
        objective: a module with the same names, shapes and dtypes. Its device is kept.
        ema: take the averaged parameters of a training checkpoint instead of the last ones.

    Raises:
        CheckpointError: if there is nothing at ``path``.
        DamagedCheckpointError: if the files were cut short or altered.
        ForeignCheckpointError: if they belong to another model; the message names what differs.
        InvalidInputError: if ``ema=True`` and the checkpoint keeps no average.
    """
    content = read_checkpoint(path)
    if content is None:
        raise CheckpointError(
            "there are no weights to load", got=os.fspath(path), expected="a checkpoint directory"
        )
    check_fingerprint(Path(path), content.fingerprint, fingerprint(objective))
    values: dict[str, Any] = dict(content.state["objective"])
    if ema:
        average = content.state.get("ema")
        if average is None:
            raise InvalidInputError(
                f"the checkpoint {path} keeps no average", hint="train with fit(..., ema=0.999)"
            )
        values.update(average["values"])
    objective.load_state_dict(values)
