"""Saving and loading the weights of an objective (or any module) without the rest of a run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from stochdyn._checks import check_bool, check_type
from stochdyn.errors import CheckpointError, DamagedCheckpointError, InvalidInputError
from stochdyn.run.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from stochdyn.run.engine import as_folder
from stochdyn.run.folder import claimed
from stochdyn.run.identity import check_same_run, fingerprint

__all__ = ["load_weights", "save_weights"]


def save_weights(objective: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the parameters and buffers of a module into a directory: safetensors and JSON, atomically.

    Args:
        objective: Any module.
        path: The directory, made if need be; weights that it holds already are replaced.

    Raises:
        CheckpointInUseError: If a run writes to the directory.
        CheckpointWriteError: If the disk is full or refuses; what was there is then still whole.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> net, other = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> save_weights(net, folder)
        >>> load_weights(folder, other)
        >>> torch.equal(net.weight, other.weight)
        True
    """
    check_type(objective, nn.Module, "objective")
    as_folder(path, resume=True, name="path")
    content = Checkpoint("weights", 0, fingerprint(objective), {"objective": dict(objective.state_dict())})
    with claimed(path):
        write_checkpoint(path, content)


def load_weights(path: str | os.PathLike[str], objective: nn.Module, *, ema: bool = False) -> None:
    """Load weights into a module, in place; from :func:`save_weights` or from a checkpoint of ``fit``.

    Args:
        path: The directory.
        objective: A module with the same names, shapes and dtypes. Its device is kept.
        ema: Whether to take the averaged parameters of a training checkpoint instead of the last ones.

    Raises:
        CheckpointError: If there is nothing at ``path``.
        DamagedCheckpointError: If the files were cut short or altered.
        ForeignCheckpointError: If they belong to another model; the message names what differs.
        InvalidInputError: If ``ema=True`` and the checkpoint keeps no average.
    """
    check_type(objective, nn.Module, "objective")
    check_bool(ema, "ema")
    as_folder(path, resume=True, name="path")
    content = read_checkpoint(path)
    if content is None:
        raise CheckpointError(
            "there are no weights to load", got=os.fspath(path), expected="a checkpoint directory"
        )
    values, average = _weights_in(Path(path), content)
    found, expected = fingerprint(values), fingerprint(objective)
    lacking = all(n in found and text in (found[n], "not made yet") for n, text in expected.items())
    hint = "the module may make its parameters in its first call (Pyro's guides, lazy layers): call it once before"
    check_same_run(Path(path), found, expected, hint if lacking else None)
    if ema:
        if average is None:
            raise InvalidInputError(
                f"the checkpoint {path} keeps no average", hint="train with fit(..., ema=0.999)"
            )
        values.update(average)
    objective.load_state_dict(values)


def _weights_in(folder: Path, content: Checkpoint) -> tuple[dict[str, Any], Mapping[str, Any] | None]:
    """Return the weights, and their average if there is one, from weights alone or from a run of ``fit``."""
    check_same_run(folder, {"kind": content.kind}, {"kind": "fit" if content.kind == "fit" else "weights"})
    try:
        state = content.state["job"] if content.kind == "fit" else content.state
        average = None if state.get("ema") is None else dict(state["ema"]["values"])
        return dict(state["objective"]), average
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedCheckpointError(f"the checkpoint {folder} lacks its weights", got=repr(error)) from error
