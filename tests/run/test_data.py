"""Batches: every item once an epoch, the same parts for the same seed, shards that make up the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from stochdyn.errors import EmptyDataError, InvalidInputError
from stochdyn.run.data import Batches, make_batches
from stochdyn.run.distributed import World

CPU = torch.device("cpu")


def make(data: Any, batch_size: int | None = None, seed: int = 0, world: World | None = None) -> Batches:
    return make_batches(data, batch_size, seed, world or World(), CPU)


class Numbers(Dataset[Tensor]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> Tensor:
        return torch.tensor(i)


class Stream(IterableDataset[Tensor]):
    def __init__(self, n: int) -> None:
        self.n = n

    def __iter__(self) -> Iterator[Tensor]:
        return (torch.tensor(i) for i in range(self.n))


@dataclass(frozen=True)
class Series:
    times: Tensor
    values: Tensor
    name: str = "series"


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("kind", ["tensor", "dataset", "tensor dataset"])
def test_batches_partition_an_epoch_and_leftovers_change(kind: str) -> None:
    x = torch.arange(11)
    data = {"tensor": x, "dataset": Numbers(11), "tensor dataset": TensorDataset(x)}[kind]
    batches = make(data, batch_size=3)
    missed = set()
    for _ in range(40):
        epoch = [batches.next() for _ in range(3)]
        drawn = torch.cat([b[0] if isinstance(b, tuple) else b for b in epoch]).tolist()
        assert len(drawn) == len(set(drawn)) == 9
        missed |= set(range(11)) - set(drawn)
    # Two of 11 are left out each time; that one never is, in 40 epochs, has chance 11 (9/11)^40 = 0.4 %.
    assert missed == set(range(11))


def test_permutations_are_uniform_and_depend_on_seed_and_epoch() -> None:
    first = Counter(int(make(torch.arange(5), 1, seed=s).next()) for s in range(500))
    # chi-squared with 4 degrees of freedom; 23.5 has the false-alarm rate 1e-4.
    assert sum((first[i] - 100) ** 2 / 100 for i in range(5)) < 23.5
    a, b = make(torch.arange(50), 50, seed=1), make(torch.arange(50), 50, seed=2)
    orders = [tuple(s.next().tolist()) for s in (a, a, b, b)]
    assert len(set(orders)) == 4


def test_the_shards_of_the_ranks_make_up_the_batch_of_one_process() -> None:
    x = torch.arange(30)
    whole = make(x, batch_size=6)
    shards = [make(x, batch_size=2, world=World(rank, 3)) for rank in range(3)]
    for _ in range(12):
        assert torch.equal(whole.next(), torch.cat([s.next() for s in shards]))


def test_a_batch_larger_than_the_data_is_the_data() -> None:
    assert sorted(make(torch.arange(4), batch_size=100).next().tolist()) == [0, 1, 2, 3]
    with pytest.raises(EmptyDataError, match="every rank needs an item; got 2 items on 3 ranks"):
        make(torch.arange(2), batch_size=1, world=World(0, 3))


def test_nested_data_stays_together() -> None:
    x = torch.arange(12)
    tree = {"s": Series(x, 10 * x), "p": [Pair(x, -x), (x,)], "label": "kept"}
    batch = make(tree, batch_size=5).next()
    assert isinstance(batch["s"], Series)
    assert isinstance(batch["p"][0], Pair)
    index = batch["s"].times
    assert torch.equal(batch["s"].values, 10 * index)
    assert torch.equal(batch["p"][0].y, -index)
    assert torch.equal(batch["p"][1][0], index)
    assert (batch["label"], batch["s"].name) == ("kept", "series")


def test_without_a_batch_size_the_whole_data_comes_in_order() -> None:
    x, y = torch.arange(5), torch.arange(3)
    assert make((x, y)).next() == (x, y) or torch.equal(make((x, y)).next()[0], x)
    assert torch.equal(make(Numbers(4)).next(), torch.arange(4))
    assert make(None).next() is None


@pytest.mark.parametrize("kind", ["shuffled", "dataset", "loader", "own generator", "stream"])
def test_the_place_can_be_saved_and_found_again(kind: str) -> None:
    def build() -> Batches:
        x = torch.arange(10)
        match kind:
            case "shuffled":
                return make(x, 3, seed=4)
            case "dataset":
                return make(Numbers(10), 3, seed=4)
            case "stream":
                return make(Stream(10), 3)
            case "own generator":
                g = torch.Generator().manual_seed(8)
                return make(DataLoader(TensorDataset(x), batch_size=3, shuffle=True, generator=g))
            case _:
                return make(DataLoader(TensorDataset(x), batch_size=3, shuffle=True))

    def value(batch: Any) -> list[int]:
        return (batch[0] if isinstance(batch, (list, tuple)) else batch).tolist()

    for done in (0, 1, 4, 7, 8):  # among them the end of an epoch of 4 (or 3) batches
        torch.manual_seed(1)
        straight = build()
        for _ in range(done):
            straight.next()
        place, random_state = straight.state_dict(), torch.get_rng_state()
        expected = [value(straight.next()) for _ in range(6)]
        torch.manual_seed(99)
        again = build()
        again.load_state_dict(place)
        torch.set_rng_state(random_state)
        assert [value(again.next()) for _ in range(6)] == expected


def test_a_loader_goes_round_and_first_takes_nothing() -> None:
    torch.manual_seed(0)
    loader = make(DataLoader(TensorDataset(torch.arange(6)), batch_size=2, shuffle=True))
    before = torch.get_rng_state()
    loader.first()
    assert torch.equal(before, torch.get_rng_state())
    drawn = [loader.next()[0].tolist() for _ in range(9)]
    for epoch in (drawn[:3], drawn[3:6], drawn[6:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(6))


def test_a_distributed_sampler_hears_of_the_epoch() -> None:
    from torch.utils.data import DistributedSampler

    data = TensorDataset(torch.arange(8))
    sampler: DistributedSampler[Any] = DistributedSampler(data, num_replicas=2, rank=0)
    loader = make(DataLoader(data, batch_size=4, sampler=sampler))
    assert loader.next()[0].tolist() != loader.next()[0].tolist()


@pytest.mark.parametrize(
    "data",
    [DataLoader(TensorDataset(torch.zeros(0))), Numbers(0), Stream(0), TensorDataset(torch.zeros(0))],
    ids=["loader", "dataset", "stream", "tensor dataset"],
)
def test_empty_data_is_refused(data: Any) -> None:
    with pytest.raises(EmptyDataError):
        make(data, None).next()


def test_a_loader_has_its_own_batch_size() -> None:
    with pytest.raises(InvalidInputError, match="got a DataLoader, which makes its own batches"):
        make(DataLoader(Numbers(3)), batch_size=2)
