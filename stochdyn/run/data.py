"""Batches for the training loop: nested tensors, datasets and loaders, in an order that can be resumed."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from stochdyn._checks import as_tensor, check_positive_int, copied
from stochdyn.errors import EmptyDataError, InvalidInputError, ShapeError
from stochdyn.run.distributed import World
from stochdyn.run.encoding import map_tensors
from stochdyn.run.randomness import global_state, set_global_state

__all__ = ["Batches", "make_batches"]


@runtime_checkable
class _Movable(Protocol):
    """What knows by itself how to go to another device, as a panel does."""

    def to(self, device: torch.device, /) -> Any: ...


def _move(tree: Any, device: torch.device) -> Any:
    if isinstance(tree, _Movable) and not isinstance(tree, Tensor):
        return tree.to(device)
    if type(tree) in (tuple, list):
        return type(tree)(_move(v, device) for v in tree)
    return map_tensors(lambda x: x.to(device, non_blocking=x.is_pinned()), tree)


class Batches(ABC):
    """An endless sequence of batches whose place can be saved and found again.

    Attributes:
        items: The number of items in the data; None where it has none or can't be known.
        source: What the batches are made of, for the identity of a run.
    """

    items: int | None = None
    source: Any = None

    @abstractmethod
    def next(self) -> Any:
        """Return the next batch, on the device of the run."""

    @abstractmethod
    def first(self) -> Any:
        """Return some batch without moving on."""

    def state_dict(self) -> dict[str, Any]:
        """The place in the sequence."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to the place that :meth:`state_dict` noted."""
        del state


class _Whole(Batches):
    """The same batch in every step."""

    def __init__(self, batch: Any, items: int | None) -> None:
        self._batch, self.items = batch, items

    def next(self) -> Any:
        return self._batch

    def first(self) -> Any:
        return self._batch


class _Shuffled(Batches):
    """Minibatches along a permutation that depends only on the seed and the epoch.

    With ``world.size`` ranks, one step consumes ``world.size * batch_size`` consecutive items of the
    permutation and each rank takes its part, so that the ranks together see the batch one process would.
    Items left over at the end of an epoch are skipped; the next permutation leaves out others.
    """

    def __init__(
        self,
        take: Callable[[Tensor], Any],
        items: int,
        batch_size: int,
        seed: int,
        world: World,
        device: torch.device,
    ) -> None:
        if items < world.size:
            raise EmptyDataError("every rank needs an item", got=f"{items} items on {world.size} ranks")
        self.items = items
        self._take, self._seed, self._world, self._device = take, seed, world, device
        self._size = min(batch_size, items // world.size)
        self._steps = items // (self._size * world.size)
        self._epoch, self._position = 0, 0
        self._order: Tensor | None = None

    def _indices(self) -> Tensor:
        if self._order is None:
            # 0x9E3779B97F4A7C15 (the golden ratio) spreads neighbouring (seed, epoch) over the 64-bit seeds.
            mixed = (self._seed * 0x9E3779B97F4A7C15 + self._epoch) % 2**63
            order = torch.randperm(self.items or 0, generator=torch.Generator().manual_seed(mixed))
            self._order = order.to(self._device)
        start = (self._position * self._world.size + self._world.rank) * self._size
        return self._order[start : start + self._size]

    def first(self) -> Any:
        return self._take(self._indices())

    def next(self) -> Any:
        batch = self._take(self._indices())
        self._position += 1
        if self._position == self._steps:
            self._epoch, self._position, self._order = self._epoch + 1, 0, None
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"seed": self._seed, "epoch": self._epoch, "position": self._position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._seed, self._epoch, self._position = state["seed"], state["epoch"], state["position"]
        self._order = None


class _Loader(Batches):
    """A user's DataLoader, epoch after epoch; resumed by drawing the epoch again from its start."""

    def __init__(self, loader: DataLoader[Any], device: torch.device) -> None:
        self._loader, self._device = loader, device
        self._iterator: Iterator[Any] | None = None
        self._epoch, self._position = 0, 0
        self._start: dict[str, Any] = {}
        self.items = None if isinstance(loader.dataset, IterableDataset) else len(loader.dataset)  # type: ignore[arg-type]

    def _generators(self) -> list[torch.Generator]:
        owners = (self._loader, self._loader.sampler)
        found = [getattr(owner, "generator", None) for owner in owners]
        return [g for g in found if isinstance(g, torch.Generator)]

    def _begin(self) -> None:
        set_epoch = getattr(self._loader.sampler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(self._epoch)
        self._start = {
            "global": global_state(),
            "own": [g.get_state() for g in self._generators()],
        }
        self._iterator = iter(self._loader)

    def first(self) -> Any:
        before = global_state()
        own = [g.get_state() for g in self._generators()]
        batch = next(iter(self._loader), None)
        set_global_state(before)
        for generator, state in zip(self._generators(), own, strict=True):
            generator.set_state(state)
        if batch is None:
            raise EmptyDataError("the data loader yields no batch", got="an empty loader")
        return _move(batch, self._device)

    def next(self) -> Any:
        if self._iterator is None:
            self._begin()
        assert self._iterator is not None
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self._position == 0:
                raise EmptyDataError("the data loader yields no batch", got="an empty loader") from None
            self._epoch, self._position = self._epoch + 1, 0
            self._begin()
            return self.next()
        self._position += 1
        return _move(batch, self._device)

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position, "start": self._start}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._epoch, self._position = state["epoch"], state["position"]
        if not state["start"]:
            self._iterator = None
            return
        set_global_state(state["start"]["global"])
        for generator, start in zip(self._generators(), state["start"]["own"], strict=True):
            generator.set_state(start)
        self._begin()
        assert self._iterator is not None
        for _ in range(self._position):
            next(self._iterator)


def _count_items(data: Any) -> int:
    sizes: set[int] = set()

    def note(x: Tensor) -> Tensor:
        if x.ndim == 0:
            raise ShapeError("a minibatch needs data with a first axis", got="a scalar tensor")
        sizes.add(x.shape[0])
        return x

    map_tensors(note, data)
    if not sizes:
        raise InvalidInputError("batch_size needs data made of tensors", got=type(data).__name__)
    if len(sizes) > 1:
        raise ShapeError(
            "tensors of a minibatched data set must agree in their first axis",
            got=f"sizes {sorted(sizes)}",
            expected="one number of items",
            hint="with batch_size=None the whole data is one batch and the first axes may differ",
        )
    return sizes.pop()


def _refuse_empty(x: Tensor) -> Tensor:
    if x.ndim > 0 and x.shape[0] == 0:
        raise EmptyDataError("data is empty", got=f"shape {tuple(x.shape)}")
    return x


def make_batches(data: Any, batch_size: int | None, seed: int, world: World, device: torch.device) -> Batches:
    """Return the sequence of batches for ``data``, tensors, arrays or lists of numbers in nested containers.

    Args:
        data: None; a tensor or array, or a tuple, list, dict or dataclass of them; a Dataset; a DataLoader.
        batch_size: The number of items of a batch on each rank; None makes the whole data the batch (on every rank).
        seed: What decides the permutations.
        world: The ranks that share the data.
        device: Where batches go. Tensors go there once, at the start.

    Raises:
        EmptyDataError: If there is no item.
        ShapeError: If a minibatch is asked of tensors that differ in their first axis.
        InvalidInputError: If ``batch_size`` comes with ``data=None`` or with a DataLoader.
    """
    data = _as_tensors(data)
    batches = _make_batches(data, batch_size, seed, world, device)
    if isinstance(data, DataLoader):
        batches.source = {
            "dataset": data.dataset,
            "batch_size": data.batch_size,
            "drop_last": data.drop_last,
            "sampler": type(data.sampler),
        }
    else:
        batches.source = tuple(data.tensors) if isinstance(data, TensorDataset) else data
    return batches


def _as_tensors(tree: Any) -> Any:
    """Turn arrays, tables and lists of numbers in nested containers into tensors; whole numbers (labels) stay whole."""
    if isinstance(tree, Tensor | Dataset | DataLoader) or tree is None:
        return tree
    if isinstance(tree, tuple) and not hasattr(tree, "_fields"):
        return tuple(_as_tensors(v) for v in tree)
    if isinstance(tree, list):
        if tree and all(isinstance(v, int | float) for v in tree):
            return torch.tensor(tree)
        return [_as_tensors(v) for v in tree]
    if isinstance(tree, dict):
        return {k: _as_tensors(v) for k, v in tree.items()}
    if isinstance(tree, Mapping) or not hasattr(tree, "__array__"):
        return tree
    array = np.asarray(tree)
    if array.dtype.kind not in "fiubc":
        return as_tensor(tree, "data", finite=False)
    # A copy: arrays may be read-only, and training must not change them.
    return copied(array)


def _make_batches(
    data: Any, batch_size: int | None, seed: int, world: World, device: torch.device
) -> Batches:
    if batch_size is not None:
        check_positive_int(batch_size, "batch_size")
    if data is None or isinstance(data, DataLoader):
        if batch_size is not None:
            kind = "no data" if data is None else "a DataLoader, which makes its own batches"
            raise InvalidInputError("batch_size has no meaning here", got=kind, hint="leave batch_size out")
        return _Whole(None, None) if data is None else _Loader(data, device)
    if isinstance(data, IterableDataset):
        return _Loader(DataLoader(data, batch_size=batch_size), device)
    if isinstance(data, TensorDataset):
        data = tuple(data.tensors)
    if isinstance(data, Dataset):
        return _dataset_batches(data, batch_size, seed, world, device)
    map_tensors(_refuse_empty, data)
    if batch_size is None:
        return _Whole(_move(data, device), data.shape[0] if isinstance(data, Tensor) and data.ndim else None)
    items = _count_items(data)
    on_device = _move(data, device)
    return _Shuffled(
        lambda index: map_tensors(lambda x: x.index_select(0, index), on_device),
        items,
        batch_size,
        seed,
        world,
        device,
    )


def _dataset_batches(
    data: Dataset[Any], batch_size: int | None, seed: int, world: World, device: torch.device
) -> Batches:
    items = len(data)  # type: ignore[arg-type]
    if items == 0:
        raise EmptyDataError("data is empty", got="a dataset of length 0")

    def take(index: Tensor) -> Any:
        return _move(default_collate([data[i] for i in index.tolist()]), device)

    if batch_size is None:
        return _Whole(take(torch.arange(items)), items)
    return _Shuffled(take, items, batch_size, seed, world, torch.device("cpu"))
