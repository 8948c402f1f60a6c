"""Checkpoints on disk: safetensors beside one JSON manifest, replaced atomically and never pickled.

A checkpoint is a directory::

    checkpoint.json                          the manifest, replaced last
    tensors-000000500-1f0c9a2b.safetensors   all tensors; the name carries the step and a digest of the
    content

The manifest names the tensor file with its size and SHA-256, and carries a SHA-256 of itself. A new tensor
file never overwrites the one in use; only after the new manifest is on the disk is the old tensor file
removed. So a crash at any moment leaves one whole checkpoint: the old or the new.

Manifest fields: ``format`` (``"stochdyn-checkpoint"``), ``version``, ``library``, ``kind`` (``"training"`` or
``"weights"``), ``step``, ``fingerprint`` (names, shapes and dtypes of the objective's state), ``tensors``
(``file``, ``bytes``, ``sha256``), ``state`` (see :mod:`stochdyn.run.encoding`) and ``sha256`` of all the
rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from stochdyn._version import __version__
from stochdyn.errors import (
    CheckpointError,
    CheckpointWriteError,
    DamagedCheckpointError,
    ForeignCheckpointError,
)
from stochdyn.run.encoding import decode, encode

__all__ = [
    "Checkpoint",
    "check_fingerprint",
    "fingerprint",
    "prepare_folder",
    "read_checkpoint",
    "write_checkpoint",
]

FORMAT = "stochdyn-checkpoint"
VERSION = 1
MANIFEST = "checkpoint.json"
_NOTHING_YET = "first save in progress"


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint: ``state`` is the nested state, with its tensors on the CPU."""

    kind: str
    step: int
    fingerprint: dict[str, str]
    state: dict[str, Any]


def fingerprint(module: nn.Module) -> dict[str, str]:
    """Return shape and dtype of every parameter and buffer by name.

    Example:
        >>> fingerprint(nn.Linear(2, 1))
        {'weight': 'float32 (1, 2)', 'bias': 'float32 (1,)'}
    """
    described = {}
    for name, value in module.state_dict().items():
        is_tensor = isinstance(value, Tensor)
        described[name] = f"{str(value.dtype)[6:]} {tuple(value.shape)}" if is_tensor else "extra state"
    return described


def check_fingerprint(path: Path, found: Mapping[str, str], expected: Mapping[str, str]) -> None:
    """Raise ForeignCheckpointError, with the names that differ, unless a checkpoint fits a module.

    Args:
        path: of the checkpoint, for the message.
        found: fingerprint in the checkpoint.
        expected: fingerprint of the module, or of whatever else must agree.
    """
    differences = []
    for name in dict.fromkeys([*expected, *found]):
        if name not in found:
            differences.append(f"{name} is missing")
        elif name not in expected:
            differences.append(f"{name} is unknown here")
        elif found[name] != expected[name]:
            differences.append(f"{name} is {found[name]} instead of {expected[name]}")
    if differences:
        more = f" and {len(differences) - 8} more" if len(differences) > 8 else ""
        raise ForeignCheckpointError(
            f"the checkpoint {path} belongs to another run",
            got="; ".join(differences[:8]) + more,
            hint="build the objective and call fit as in that run, or choose another directory",
        )


def write_checkpoint(path: str | os.PathLike[str], content: Checkpoint) -> None:
    """Write a checkpoint into the directory ``path``, made if need be; atomic.

    Raises:
        CheckpointWriteError: if the disk is full or refuses; the previous checkpoint is then still whole.
        CheckpointError: if the state holds something that is neither a tensor nor plain data.
    """
    tensors: dict[str, Tensor] = {}
    state = encode(content.state, "state", tensors)
    payload = safetensors.torch.save(tensors)
    digest = hashlib.sha256(payload).hexdigest()
    name = f"tensors-{content.step:09d}-{digest[:8]}.safetensors"
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "library": __version__,
        "kind": content.kind,
        "step": content.step,
        "fingerprint": content.fingerprint,
        "tensors": {"file": name, "bytes": len(payload), "sha256": digest},
        "state": state,
    }
    manifest["sha256"] = _manifest_digest(manifest)
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).exists():
            # So that a crash in the very first save isn't taken for a lost manifest.
            _replace(folder / MANIFEST, json.dumps({"format": FORMAT, "kind": _NOTHING_YET}).encode())
        _replace(folder / name, payload)
        _replace(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode())
    except OSError as error:
        _withdraw(folder, name)
        raise CheckpointWriteError(
            f"the checkpoint of step {content.step} couldn't be written to {folder}",
            got=error,
            hint="the previous checkpoint, if there was one, is untouched",
        ) from error
    _remove_leftovers(folder, keep=name)


def prepare_folder(path: str | os.PathLike[str]) -> None:
    """Make the directory and see that it can be written to.

    Raises:
        CheckpointWriteError: if not.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{MANIFEST}.probe"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise CheckpointWriteError(f"checkpoints can't be written to {folder}", got=error) from error


def _replace(path: Path, payload: bytes) -> None:
    """Put ``payload`` at ``path`` so that a crash leaves the old content or the new one."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        with open(temporary, "wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if os.name == "posix":
        # The new name itself reaches the disk only when the directory does.
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _withdraw(folder: Path, name: str) -> None:
    """After a failed save, give back the space of its tensor file unless the manifest names it."""
    with contextlib.suppress(OSError):
        if name.encode() not in (folder / MANIFEST).read_bytes():
            (folder / name).unlink()


def _remove_leftovers(folder: Path, keep: str) -> None:
    for pattern in ("tensors-*.safetensors", ".tensors-*.partial", f".{MANIFEST}.partial"):
        for old in folder.glob(pattern):
            if old.name != keep:
                with contextlib.suppress(OSError):
                    old.unlink()


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint | None:
    """Read the checkpoint in the directory ``path``; None if there is none.

    Raises:
        DamagedCheckpointError: if the checkpoint was cut short or altered, or isn't one.
        CheckpointError: if a newer version of the library wrote it, or the file system refuses to read it.
    """
    folder = Path(path)
    try:
        text = _read(folder / MANIFEST)
    except FileNotFoundError:
        if folder.is_dir() and any(folder.glob("tensors-*.safetensors")):
            raise DamagedCheckpointError(
                f"the checkpoint {folder} lacks its manifest", got="only tensor files"
            ) from None
        return None
    except NotADirectoryError as error:
        raise DamagedCheckpointError(
            "a checkpoint is a directory", got=f"the file {folder}", hint="name the directory that holds it"
        ) from error
    manifest = _parse(folder, text)
    if manifest is None:
        return None
    described = manifest["tensors"]
    try:
        payload = _read(folder / described["file"])
    except FileNotFoundError as error:
        raise DamagedCheckpointError(
            f"the checkpoint {folder} lacks a file", got=described["file"]
        ) from error
    if len(payload) != described["bytes"] or hashlib.sha256(payload).hexdigest() != described["sha256"]:
        raise DamagedCheckpointError(
            f"the tensor file of the checkpoint {folder} was cut short or altered",
            got=f"{len(payload)} bytes",
            expected=f"{described['bytes']} bytes with the checksum in {MANIFEST}",
        )
    try:
        tensors = safetensors.torch.load(payload)
    except SafetensorError as error:
        raise DamagedCheckpointError(f"the tensor file of {folder} isn't safetensors", got=error) from error
    state = decode(manifest["state"], tensors)
    return Checkpoint(manifest["kind"], manifest["step"], manifest["fingerprint"], state)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise CheckpointError(f"{path} can't be read", got=error) from error


def _parse(folder: Path, text: bytes) -> dict[str, Any] | None:
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise DamagedCheckpointError(f"{folder / MANIFEST} isn't JSON", got=error) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedCheckpointError(f"{folder / MANIFEST} isn't the manifest of a checkpoint")
    if manifest.get("kind") == _NOTHING_YET:
        return None
    version = manifest.get("version")
    if isinstance(version, int) and version > VERSION:
        raise CheckpointError(
            f"a newer stochdyn ({manifest.get('library')}) wrote the checkpoint {folder}",
            got=f"format version {version}",
            expected=f"at most {VERSION}",
        )
    if manifest.get("sha256") != _manifest_digest(manifest):
        raise DamagedCheckpointError(f"{folder / MANIFEST} was altered: its checksum doesn't fit")
    return manifest


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    content = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
