"""Checkpoints on disk: safetensors beside one JSON manifest, replaced atomically and never pickled.

A checkpoint is a directory::

    checkpoint.json                          the manifest, replaced last
    tensors-000000500-1f0c9a2b.safetensors   all tensors; the name has the step and a digest of the
    content

The manifest names the tensor file with its size and SHA-256, and a SHA-256 of itself. A new tensor
file never overwrites the one in use; only after the new manifest is on the disk is the old tensor file
removed. So a crash at any moment leaves one whole checkpoint: the old or the new.

Manifest fields: ``format`` (``"stochdyn-checkpoint"``), ``version``, ``library``, ``kind`` (which run, or
``"weights"`` or ``"object"``), ``step``, ``identity`` (what the run depends on, see
:mod:`stochdyn.run.identity`), ``tensors`` (``file``, ``bytes``, ``sha256``), ``state`` (see
:mod:`stochdyn.run.encoding`) and ``sha256`` of all the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from stochdyn._version import __version__
from stochdyn.errors import (
    CheckpointError,
    CheckpointWriteError,
    DamagedCheckpointError,
)
from stochdyn.run.encoding import decode, encode
from stochdyn.run.folder import read_file, replace_file

__all__ = ["Checkpoint", "read_checkpoint", "write_checkpoint"]

FORMAT = "stochdyn-checkpoint"
VERSION = 2
MANIFEST = "checkpoint.json"
_TENSOR_FILE = re.compile(r"tensors-\d{9,18}-[0-9a-f]{8}\.safetensors")
# How often a manifest is read again when somebody saves meanwhile.
_PATIENCE = 5
_NOTHING_YET = "first save in progress"


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint: ``state`` is the nested state, with its tensors on the CPU."""

    kind: str
    step: int
    identity: dict[str, str]
    state: dict[str, Any]


def write_checkpoint(path: str | os.PathLike[str], content: Checkpoint) -> None:
    """Write a checkpoint into the directory ``path``, made if need be; atomic.

    Raises:
        CheckpointWriteError: If the disk is full or refuses; the previous checkpoint is then still whole.
        CheckpointError: If the state holds something that is neither a tensor nor plain data.
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
        "identity": content.identity,
        "tensors": {"file": name, "bytes": len(payload), "sha256": digest},
        "state": state,
    }
    manifest["sha256"] = _manifest_digest(manifest)
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / MANIFEST).exists():
            # So that a crash in the very first save isn't taken for a lost manifest.
            replace_file(folder / MANIFEST, json.dumps({"format": FORMAT, "kind": _NOTHING_YET}).encode())
        replace_file(folder / name, payload)
        replace_file(folder / MANIFEST, json.dumps(manifest, indent=1, allow_nan=False).encode())
    except OSError as error:
        _withdraw(folder, name)
        raise CheckpointWriteError(
            f"the checkpoint of step {content.step} couldn't be written to {folder}",
            got=error,
            hint="the previous checkpoint, if there was one, is untouched",
        ) from error
    _remove_leftovers(folder, keep=name)


def _withdraw(folder: Path, name: str) -> None:
    """After a failed save, give back the space of its tensor file unless the manifest names it."""
    with contextlib.suppress(OSError, CheckpointError):
        if name.encode() not in read_file(folder / MANIFEST):
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
        DamagedCheckpointError: If the checkpoint was cut short or altered, or isn't one.
        CheckpointError: If another version of the library wrote it, or the file system refuses to read it.
    """
    folder = Path(path)
    before: bytes | None = None
    for _ in range(_PATIENCE):
        text = _read_manifest(folder)
        manifest = None if text is None else _parse(folder, text)
        if manifest is None:
            return None
        name = manifest["tensors"]["file"]
        try:
            return _decode(folder, manifest, read_file(folder / name))
        except FileNotFoundError as error:
            # Somebody who saves at this moment puts a new manifest in place before the old tensors go.
            if text == before:
                raise DamagedCheckpointError(f"the checkpoint {folder} lacks a file", got=name) from error
            before = text
    raise DamagedCheckpointError(f"the checkpoint {folder} changes while it is read")


def _read_manifest(folder: Path) -> bytes | None:
    """Return the text of the manifest; None if the directory holds no checkpoint."""
    try:
        return read_file(folder / MANIFEST)
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


def _parse(folder: Path, text: bytes) -> dict[str, Any] | None:
    """Return a manifest whose fields are all there and of their kinds; None for the mark of a first save."""
    where = folder / MANIFEST
    try:
        manifest = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DamagedCheckpointError(f"{where} isn't JSON", got=error) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DamagedCheckpointError(f"{where} isn't the manifest of a checkpoint")
    if manifest.get("kind") == _NOTHING_YET:
        return None
    if manifest.get("sha256") != _manifest_digest(manifest):
        raise DamagedCheckpointError(f"{where} was altered: its checksum doesn't fit")
    version = manifest.get("version")
    if isinstance(version, int) and version != VERSION:
        age = "a newer" if version > VERSION else "an older"
        raise CheckpointError(
            f"{age} stochdyn ({manifest.get('library')}) wrote the checkpoint {folder}",
            got=f"format version {version}",
            expected=f"version {VERSION}",
        )
    wrong = [name for name, right in _FIELDS.items() if not right(manifest.get(name))]
    if wrong:
        raise DamagedCheckpointError(
            f"{where} lacks what a checkpoint has, or has it wrong", got=", ".join(wrong)
        )
    return manifest


def _is_count(x: object) -> bool:
    return isinstance(x, int) and not isinstance(x, bool) and x >= 0


def _is_tensor_entry(x: object) -> bool:
    """Whether a manifest names a tensor file: one of this directory, and of the kind that is written here."""
    return (
        isinstance(x, dict)
        and isinstance(x.get("file"), str)
        and _TENSOR_FILE.fullmatch(x["file"]) is not None
        and _is_count(x.get("bytes"))
        and isinstance(x.get("sha256"), str)
    )


_FIELDS: dict[str, Callable[[Any], bool]] = {
    "version": _is_count,
    "kind": lambda x: isinstance(x, str),
    "step": _is_count,
    "identity": lambda x: isinstance(x, dict) and all(isinstance(v, str) for v in x.values()),
    "tensors": _is_tensor_entry,
    "state": lambda x: isinstance(x, dict),
}


def _decode(folder: Path, manifest: dict[str, Any], payload: bytes) -> Checkpoint:
    described = manifest["tensors"]
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
    try:
        state = decode(manifest["state"], tensors)
    except (ValueError, TypeError, AttributeError, RuntimeError, RecursionError) as error:
        raise DamagedCheckpointError(
            f"the state in {folder / MANIFEST} can't be read", got=type(error).__name__
        ) from error
    return Checkpoint(manifest["kind"], manifest["step"], manifest["identity"], state)


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    content = {k: v for k, v in manifest.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
