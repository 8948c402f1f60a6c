"""Data-parallel training under ``torchrun``: who is who, sums over ranks, and the wrapped objective."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from stochdyn.errors import InvalidInputError

__all__ = ["World", "connect"]


# What gloo says of a peer whose process has ended; its errors have no class of their own.
_GONE = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")


@dataclass(frozen=True)
class World:
    """The group of processes that train together; the defaults are one process alone.

    Attributes:
        rank: The number of this process, from 0.
        size: The number of processes.
        options: Keyword arguments of DistributedDataParallel.
    """

    rank: int = 0
    size: int = 1
    options: Mapping[str, Any] | None = None

    @property
    def is_main(self) -> bool:
        """Whether this process writes checkpoints and shows the progress bar."""
        return self.rank == 0

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module under DistributedDataParallel; the module itself in a single process."""
        if self.size == 1:
            return module
        return DistributedDataParallel(module, **dict(self.options or {}))

    def synchronise(self, module: nn.Module) -> None:
        """Give every rank the parameters and buffers of rank 0."""
        if self.size > 1:
            for tensor in (*module.parameters(), *module.buffers()):
                dist.broadcast(tensor.detach(), src=0)

    def is_lost(self, error: Exception) -> bool:
        """Return whether an error says that another rank has gone away."""
        kinds = (dist.DistBackendError, dist.DistNetworkError) if dist.is_available() else ()
        found = isinstance(error, RuntimeError) and any(text in str(error) for text in _GONE)
        return self.size > 1 and (found or isinstance(error, kinds))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over ranks of a tensor; the tensor itself in a single process."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
            values /= self.size
        return values

    def maximum(self, flag: Tensor) -> Tensor:
        """Elementwise maximum over ranks, on the device of ``flag`` (integers)."""
        if self.size > 1:
            dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        return flag

    def agree(self, code: int, device: torch.device) -> int:
        """Return the largest ``code`` any rank has; every rank must call this at the same step."""
        if self.size == 1:
            return code
        return int(self.maximum(torch.tensor([code], device=device)).item())

    def gather_bytes(self, values: bytes, device: torch.device) -> list[bytes]:
        """Return what every rank gave, in the order of ranks; lengths may differ."""
        if self.size == 1:
            return [values]
        length = self.agree(len(values), device)
        mine = torch.zeros(8 + length, dtype=torch.uint8)
        packed = len(values).to_bytes(8, "little") + values
        mine[: len(packed)] = torch.frombuffer(bytearray(packed), dtype=torch.uint8)
        received = [torch.empty_like(mine, device=device) for _ in range(self.size)]
        dist.all_gather(received, mine.to(device))
        whole = [r.cpu().numpy().tobytes() for r in received]
        return [w[8 : 8 + int.from_bytes(w[:8], "little")] for w in whole]


def connect(distributed: bool | Mapping[str, Any] | None, device: torch.device) -> World:
    """Join the process group that ``torchrun`` or the caller set up.

    Args:
        distributed: None joins a group where there is one (already initialised, or announced by the
            environment variables of ``torchrun``), True demands one, False ignores it, and a mapping demands
            one and goes to DistributedDataParallel as keyword arguments.
        device: What decides between the backends ``nccl`` (CUDA) and ``gloo`` if the group isn't initialised yet.

    Raises:
        InvalidInputError: If a group is demanded and there is none.
    """
    if distributed is False:
        return World()
    options = distributed if isinstance(distributed, Mapping) else None
    available = dist.is_available()
    announced = {"RANK", "WORLD_SIZE"} <= os.environ.keys()
    wanted = announced and (distributed is not None or int(os.environ["WORLD_SIZE"]) > 1)
    if available and wanted and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        atexit.register(_disconnect)
    if available and dist.is_initialized():
        return World(dist.get_rank(), dist.get_world_size(), options)
    if distributed is not None:
        raise InvalidInputError(
            "distributed training needs a process group",
            got="no RANK and WORLD_SIZE in the environment",
            hint="start with torchrun --nproc-per-node=N, or call torch.distributed.init_process_group",
        )
    return World()


def _disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
