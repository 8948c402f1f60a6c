"""A directory of a run on disk: whole files or none, no link followed, one writer at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from stochdyn.errors import (
    CheckpointError,
    CheckpointInUseError,
    CheckpointWriteError,
    DamagedCheckpointError,
)

try:
    import fcntl
except ImportError:  # Windows: files are replaced as safely there, but two processes aren't kept apart
    fcntl = None  # type: ignore[assignment]

__all__ = ["claimed", "prepare_folder", "read_file", "replace_file"]

LOCK = ".lock"
# Flags that other systems lack are zero there.
_NO_LINK = getattr(os, "O_NOFOLLOW", 0)
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)
_BINARY = getattr(os, "O_BINARY", 0)
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS}


def read_file(path: Path) -> bytes:
    """Return the content of a regular file.

    Raises:
        FileNotFoundError, NotADirectoryError: If there is none.
        DamagedCheckpointError: If it is a link, a pipe, a device or a directory.
        CheckpointError: If the file system refuses.
    """
    try:
        # Without waiting: to open a pipe would otherwise block until somebody writes to it.
        handle = os.open(path, os.O_RDONLY | _NO_LINK | _NO_WAIT | _BINARY)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):
            raise DamagedCheckpointError(f"{path} must be a regular file", got="a link or a pipe") from error
        raise CheckpointError(f"{path} can't be read", got=error) from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise DamagedCheckpointError(f"{path} must be a regular file", got="a pipe, a device or a directory")
    with os.fdopen(handle, "rb") as file:
        try:
            return file.read()
        except OSError as error:
            raise CheckpointError(f"{path} can't be read", got=error) from error


def replace_file(path: Path, payload: bytes) -> None:
    """Put ``payload`` at ``path`` so that a crash leaves the old content or the new one; links aren't followed."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        _create(temporary, payload)
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


def _create(path: Path, payload: bytes) -> None:
    """Write a new file; whatever has its name, a link too, is taken away first and not written through."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_LINK | _BINARY, 0o666)
    with os.fdopen(handle, "wb") as file:
        file.write(payload)
        file.flush()
        os.fsync(file.fileno())


def prepare_folder(path: str | os.PathLike[str]) -> None:
    """Make the directory and see that it can be written to.

    Raises:
        CheckpointWriteError: If not.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        _create(probe, b"")
        probe.unlink()
    except OSError as error:
        raise CheckpointWriteError(f"checkpoints can't be written to {folder}", got=error) from error


@contextmanager
def claimed(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep a directory, made if need be, for the block alone; a process that ends, however it does, gives it back.

    Raises:
        CheckpointInUseError: If another process, or another run in this one, has it.
        CheckpointWriteError: If it can't be written to.
    """
    folder = Path(path)
    prepare_folder(folder)
    handle = None if fcntl is None else _lock(folder)
    try:
        yield
    finally:
        # Taken away while still held, so that nobody gets hold of a file that has no name any more.
        if handle is not None:
            with contextlib.suppress(OSError):
                (folder / LOCK).unlink()
            os.close(handle)


def _lock(folder: Path) -> int:
    path = folder / LOCK
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK | _NO_WAIT, 0o666)
        except OSError as error:
            raise CheckpointWriteError(f"checkpoints can't be written to {folder}", got=error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return handle
            owner = os.read(handle, 20).decode(errors="replace").strip()
            os.close(handle)
            raise CheckpointInUseError(
                f"the directory {folder} is in use by another run",
                got=f"process {owner}" if owner.isdigit() else "a running process",
                hint="wait for its end, or choose another directory",
            ) from None
        own = os.fstat(handle)
        if not stat.S_ISREG(own.st_mode):
            os.close(handle)
            raise CheckpointWriteError(
                f"checkpoints can't be written to {folder}", got=f"{path}, which is no file"
            )
        with contextlib.suppress(FileNotFoundError):
            there = os.stat(path, follow_symlinks=False)
            if (there.st_dev, there.st_ino) == (own.st_dev, own.st_ino):
                os.ftruncate(handle, 0)
                os.write(handle, str(os.getpid()).encode())
                return handle
        # The one before took the file away between our opening and our locking it.
        os.close(handle)
