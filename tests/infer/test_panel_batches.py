"""Panels larger than memory: every series once per epoch, whatever the row groups, with the bound of the whole panel."""

from __future__ import annotations

import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal
from torch.utils.data import DataLoader

import stochdyn as sd
from stochdyn.errors import EmptyDataError, InvalidInputError, MissingDependencyError
from stochdyn.infer import PanelBatches

F64 = torch.float64


def ou_frame(count: int, seed: int = 0, shortest: int = 3, longest: int = 8) -> dict[str, np.ndarray]:
    """Series of an Ornstein-Uhlenbeck process of rate 0.8 and diffusion 0.6 from zero, with noise 0.2, in long form."""
    rng = np.random.default_rng(seed)
    who, times, values = [], [], []
    for k in range(count):
        t = np.sort(rng.uniform(0.1, 6.0, rng.integers(shortest, longest + 1)))
        x, last = 0.0, 0.0
        for now in t:
            decay = np.exp(-0.8 * (now - last))
            x = decay * x + np.sqrt((1 - decay**2) * 0.36 / 1.6) * rng.standard_normal()
            last = now
            who.append(k)
            times.append(now)
            values.append(x + 0.2 * rng.standard_normal())
    return {"id": np.array(who), "t": np.array(times), "y": np.array(values)}


def write(path: Path, frame: dict[str, Any], rows: int) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table(frame), path, row_group_size=rows)
    return path


def from_parquet(path: Path, batch_size: int) -> PanelBatches:
    return PanelBatches.from_parquet(path, "id", "t", "y", batch_size=batch_size, dtype=F64)


def marginal_model(panel: sd.Panel, total: int) -> None:
    """Parameters alone: paths are integrated out."""
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), 1.0))
    noise = pyro.sample("noise", dist.LogNormal(torch.tensor(-1.0, dtype=F64), 1.0))
    law = sd.LinearGaussianMeasure.ornstein_uhlenbeck(
        rate=rate, diffusion=noise, initial_mean=torch.zeros(1, dtype=F64)
    )
    with pyro.plate("series", total, subsample=torch.arange(len(panel))):
        pyro.sample("y", sd.infer.LinearObservations(law, panel.times, 0.2), obs=panel.values)


@pytest.mark.parametrize("rows", [2, 3, 7, 50, 10_000])
def test_every_series_comes_once_whatever_the_row_groups(tmp_path: Path, rows: int) -> None:
    frame = ou_frame(24)
    whole = sd.Panel(frame, "id", "t", "y", dtype=F64)
    batches = from_parquet(write(tmp_path / "panel.parquet", frame, rows), 6)
    assert batches.num_series == 24
    seen: list[int] = []
    for panel in batches:
        assert len(panel) == 6
        for k, who in enumerate(panel.series):
            n = int(whole.lengths[who])
            assert int(panel.lengths[k]) == n
            assert torch.equal(panel.times[k, :n], whole.times[who, :n])
            assert torch.equal(panel.values[k, :n], whole.values[who, :n])
            assert bool(panel.values[k, n:].isnan().all())
        assert bool((panel.times.diff() > 0).all())
        seen += panel.series
    assert sorted(seen) == list(range(24))


def test_orders_change_with_the_epoch_and_follow_the_global_generator(tmp_path: Path) -> None:
    batches = from_parquet(write(tmp_path / "panel.parquet", ou_frame(10), 12), 3)
    torch.manual_seed(0)
    first, second = ([p.series for p in batches] for _ in range(2))
    assert len(first) == 3
    assert first != second
    torch.manual_seed(0)
    assert [p.series for p in batches] == first


@pytest.mark.slow
def test_workers_share_the_blocks(tmp_path: Path) -> None:
    batches = from_parquet(write(tmp_path / "panel.parquet", ou_frame(24), 30), 2)
    loader = DataLoader(batches, batch_size=None, num_workers=2, multiprocessing_context="spawn")
    seen = [who for panel in loader for who in panel.series]
    assert len(seen) == len(set(seen))
    assert len(seen) >= 22  # each worker may keep one series back


def test_the_mean_bound_of_an_epoch_is_that_of_the_whole_panel(tmp_path: Path) -> None:
    frame = ou_frame(20)
    whole = sd.Panel(frame, "id", "t", "y", dtype=F64)
    batches = from_parquet(write(tmp_path / "panel.parquet", frame, 25), 4)
    model = partial(marginal_model, total=20)
    bound = Trace_ELBO()(model, AutoDelta(model))
    full = bound(whole)
    slope = torch.autograd.grad(full, list(bound.parameters()))
    mean = torch.stack([bound(panel) for panel in batches]).mean()
    torch.testing.assert_close(mean, full, rtol=1e-10, atol=0)
    for a, b in zip(torch.autograd.grad(mean, list(bound.parameters())), slope, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=0)


def test_training_resumes_to_the_same_bits(tmp_path: Path) -> None:
    batches = from_parquet(write(tmp_path / "panel.parquet", ou_frame(10), 12), 4)

    def go(steps: int, **options: Any) -> torch.Tensor:
        pyro.clear_param_store()
        model = partial(marginal_model, total=10)
        bound = Trace_ELBO()(model, AutoDelta(model))
        return sd.fit(bound, batches, steps=steps, lr=0.05, progress=False, **options).losses

    straight = go(5)
    go(3, checkpoint=tmp_path / "run")
    assert torch.equal(go(5, checkpoint=tmp_path / "run", resume=True), straight)


def test_memory_does_not_grow_with_the_number_of_series(tmp_path: Path) -> None:
    def peak(count: int) -> int:
        t = np.tile(np.arange(5.0), count)
        frame = {"id": np.repeat(np.arange(count), 5), "t": t, "y": t}
        batches = from_parquet(write(tmp_path / f"{count}.parquet", frame, 2000), 100)
        next(iter(batches))
        tracemalloc.start()
        try:
            for _ in batches:
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small, large = peak(1200), peak(9600)
    assert small > 5 * 2000 * 8  # a block is seen
    assert large < 1.2 * small


@pytest.mark.slow
def test_a_fit_in_batches_agrees_with_one_of_all_series() -> None:
    """The mean of the posterior, with all series in every step and with an eighth of them."""
    whole = sd.Panel(ou_frame(120), "id", "t", "y", dtype=F64)
    blocks = [partial(whole.__getitem__, slice(k, k + 40)) for k in (0, 40, 80)]
    found = {}
    for size in (120, 15):
        pyro.clear_param_store()
        model = partial(marginal_model, total=120)
        guide = AutoMultivariateNormal(model)
        steps = 250 if size == 120 else 500
        falling = partial(torch.optim.lr_scheduler.ExponentialLR, gamma=0.01 ** (1 / steps))
        bound = Trace_ELBO()(model, guide)
        batches = PanelBatches(blocks, 120, size)
        sd.fit(bound, batches, steps=steps, lr=0.05, progress=False, scheduler=falling)
        found[size] = guide.quantiles([0.16, 0.5, 0.84])
    for name in ("rate", "noise"):
        (low, middle, high), (_, other, _) = found[120][name], found[15][name]
        assert abs(float(other - middle)) < 0.5 * float(high - low) / 2


def test_a_zarr_array_is_read_chunk_by_chunk(tmp_path: Path) -> None:
    zarr = pytest.importorskip("zarr")
    y = torch.randn(12, 5, generator=torch.Generator().manual_seed(0)).numpy()
    store = zarr.create_array(str(tmp_path / "y.zarr"), shape=y.shape, chunks=(4, 5), dtype=y.dtype)
    store[:] = y
    ts = torch.arange(5.0)

    def read(k: int) -> sd.Panel:
        rows = range(4 * k, 4 * k + 4)
        return sd.Panel.from_arrays(ts, store[4 * k : 4 * k + 4], series=rows)

    seen = {}
    for panel in PanelBatches([partial(read, k) for k in range(3)], 12, 3):
        seen |= {who: panel.values[k, :, 0] for k, who in enumerate(panel.series)}
    assert torch.equal(torch.stack([seen[k] for k in range(12)]), torch.as_tensor(y))


def test_dates_count_from_one_origin(tmp_path: Path) -> None:
    days = np.datetime64("2024-01-01", "ns") + np.arange(12) * np.timedelta64(1, "D")
    frame = {"id": np.arange(12) // 3, "t": days, "y": np.arange(12.0)}
    whole = sd.Panel(frame, "id", "t", "y", dtype=F64)
    for panel in from_parquet(write(tmp_path / "panel.parquet", frame, 3), 2):
        assert panel.origin == whole.origin
        for k, who in enumerate(panel.series):
            torch.testing.assert_close(panel.times[k], whole.times[who])


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = ou_frame(6)
    mixed = {n: v[np.argsort(frame["t"])] for n, v in frame.items()}
    with pytest.raises(InvalidInputError, match=r"must stand together.*Sort the file"):
        list(from_parquet(write(tmp_path / "mixed.parquet", mixed, 100), 2))
    good = write(tmp_path / "good.parquet", frame, 100)
    with pytest.raises(InvalidInputError, match="no such column"):
        PanelBatches.from_parquet(good, "id", "t", "z", batch_size=2)
    with pytest.raises(EmptyDataError, match="fewer series"):
        from_parquet(good, 7)
    words = write(tmp_path / "words.parquet", frame | {"y": np.where(frame["y"] > 0, "up", "down")}, 100)
    with pytest.raises(InvalidInputError, match="must hold numbers"):
        from_parquet(words, 2)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow.parquet", None)
    with pytest.raises(MissingDependencyError, match=r"stochdyn\[parquet\]"):
        from_parquet(good, 2)


def test_blocks_are_functions() -> None:
    with pytest.raises(EmptyDataError, match="no blocks"):
        PanelBatches([], 1, 1)
    with pytest.raises(InvalidInputError, match=r"blocks\[0\]"):
        PanelBatches([1], 1, 1)  # type: ignore[list-item]
