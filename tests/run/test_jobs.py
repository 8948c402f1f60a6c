"""Independent jobs: the same bits by any executor, and errors, warnings, Ctrl-C and resumption through it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.bridges import FullRefit, LinearDrift, Sinkhorn, Snapshots, bootstrap, leave_one_out, refine
from stochdyn.diagnostics import sbc
from stochdyn.errors import InvalidInputError, LostProcessError
from stochdyn.fractional import GaussianDecoder, LatentSDE, Series, compare_models
from stochdyn.run import Interrupted, run_each
from tests.run import spread


class Backwards(Executor):
    """Does the last job first, when the first result is asked for."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        own = self

        class Late(Future[Any]):
            def result(self, timeout: float | None = None) -> Any:
                while own.waiting:
                    own.waiting.pop()()
                return super().result(timeout)

        future: Future[Any] = Late()
        self.waiting.append(lambda: future.set_result(fn(*args, **kwargs)))
        return future


@pytest.fixture(scope="module")
def processes() -> Iterator[Executor]:
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def threads() -> Iterator[Executor]:
    with ThreadPoolExecutor(3) as pool:
        yield pool


CLOUDS = Snapshots([0.0, 1.0, 2.0, 3.0], [torch.linspace(-1, 1, 9)[:, None] * 0.7**i + i for i in range(4)])
PANEL = sd.Panel.from_arrays(torch.arange(1.0, 4.0), torch.linspace(-1, 1, 12).reshape(4, 3))


def latent(width: int) -> LatentSDE:
    return LatentSDE(1, 1, torch.linspace(0, 1, 6), decoder=GaussianDecoder(torch.nn.Linear(1, width), 1))


def by_sbc(executor: Executor | None) -> Any:
    ranks = sbc(spread.model, spread.trained, (torch.zeros(()),), num_simulations=4, num_draws=9, executor=executor).ranks  # fmt: skip
    return {n: r.tolist() for n, r in ranks.items()}


def by_holding_out(executor: Executor | None) -> Any:
    methods = {"none": None, "drawn": spread.bridge}
    return leave_one_out(CLOUDS, methods, num_samples=50, diffusion=0.3, executor=executor).scores


def by_bootstrap(executor: Executor | None) -> Any:
    fit = refine(CLOUDS, LinearDrift(1), 0.3, max_iterations=2)
    found = bootstrap(fit, 3, refit=FullRefit(1, 200), executor=executor)
    return found.posterior["coordinates"].values.tolist()


def by_restarts(executor: Executor | None) -> Any:
    fit = refine(
        CLOUDS, LinearDrift(1), 0.3, max_iterations=2, method=Sinkhorn(restarts=2), executor=executor
    )
    return {n: v.tolist() for n, v in fit.parameters.items()}, fit.history.objective.tolist()


def by_comparing(executor: Executor | None) -> Any:
    series = Series.regular(
        torch.linspace(0.2, 1, 5), torch.randn(4, 5, 1, generator=torch.Generator().manual_seed(0))
    )
    build = {"a": partial(latent, 1), "b": partial(latent, 1)}
    found = compare_models(build, series, folds=2, num_draws=5, steps=2, executor=executor)
    return {n: v.tolist() for n, v in found.pointwise.items()}


def by_filters(executor: Executor | None) -> Any:
    found = run_each(spread.filtered, [PANEL[k] for k in range(len(PANEL))], executor=executor)
    return torch.cat(found).tolist()


WAYS = [by_sbc, by_holding_out, by_bootstrap, by_restarts, by_comparing, by_filters]


@pytest.mark.parametrize("way", WAYS, ids=[w.__name__ for w in WAYS])
def test_threads_and_another_order_give_the_same_bits(
    way: Callable[[Executor | None], Any], threads: Executor
) -> None:
    before = torch.get_rng_state()
    here = way(None)
    assert way(threads) == here
    assert way(Backwards()) == here
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    "way", [by_sbc, by_filters, *(pytest.param(w, marks=pytest.mark.slow) for w in WAYS[1:-1])]
)
def test_processes_give_the_same_bits(way: Callable[[Executor | None], Any], processes: Executor) -> None:
    assert way(processes) == way(None)


def test_jobs_differ_and_depend_on_seed_and_number_alone() -> None:
    found = run_each(spread.noisy, [1.0, 1.0, 1.0])
    assert len({u for _, u in found}) == 3
    assert run_each(spread.noisy, [1.0, 2.0, 1.0])[2] == found[2]
    assert run_each(spread.noisy, [1.0], seed=1) != found[:1]


def test_precision_and_warnings_pass_between_processes(processes: Executor) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.warns(UserWarning, match="item 3"):
            assert run_each(spread.warn, [3.0], executor=processes) == [torch.float64]
    finally:
        torch.set_default_dtype(before)


def test_an_error_goes_through_with_the_results_before_it(processes: Executor, threads: Executor) -> None:
    for executor in (None, threads, processes):
        with pytest.raises(ArithmeticError, match="two") as stopped:
            run_each(spread.refuse, [0.0, 1.0, 2.0, 3.0], executor=executor)
        assert stopped.value.result == [0.0, 1.0]  # type: ignore[attr-defined]


def test_what_cannot_be_sent_is_refused_before_any_work(processes: Executor) -> None:
    with pytest.raises(InvalidInputError, match=r"can't be sent to another process.*top of a module"):
        run_each(lambda x: x, [1.0], executor=processes)
    with pytest.raises(InvalidInputError, match=r"sent to another process"):
        sbc(lambda y: spread.model(y), spread.trained, (torch.zeros(()),), executor=processes)
    with pytest.raises(InvalidInputError, match=r"executor has the wrong type; got int"):
        run_each(spread.noisy, [1.0], executor=4)  # type: ignore[arg-type]


def test_an_executor_that_would_do_nothing_is_refused(threads: Executor) -> None:
    with pytest.raises(InvalidInputError, match="executor does nothing without restarts"):
        refine(CLOUDS, LinearDrift(1), 0.3, executor=threads)
    fit = refine(CLOUDS, LinearDrift(1), 0.3, max_iterations=1)
    with pytest.raises(InvalidInputError, match="linear response"):
        bootstrap(fit, 3, executor=threads)


@pytest.mark.slow
def test_a_dead_process_is_told() -> None:
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with pool, pytest.raises(LostProcessError, match=r"has died.*memory"):
        run_each(spread.die, [1.0], executor=pool)


def test_ctrl_c_keeps_what_is_done_and_cancels_the_rest() -> None:
    begun: list[float] = []

    def work(x: float) -> float:
        begun.append(x)
        if x == 1.0:
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.02)
        return x

    with ThreadPoolExecutor(1) as pool, pytest.raises(Interrupted, match="jobs interrupted") as stopped:
        run_each(work, [float(x) for x in range(60)], executor=pool)
    assert stopped.value.result == [float(x) for x in range(len(stopped.value.result))]
    assert 1 <= len(stopped.value.result) < 60
    assert len(begun) < 60


def test_a_run_goes_on_with_another_executor(tmp_path: Any, threads: Executor) -> None:
    def stop(x: float) -> tuple[float, Tensor]:
        if x == 3.0 and not (tmp_path / "on").exists():
            (tmp_path / "on").touch()
            raise RuntimeError("stop here")
        return x, torch.rand(2)

    with pytest.raises(RuntimeError, match="stop here"):
        run_each(stop, [0.0, 1.0, 2.0, 3.0, 4.0], executor=threads, checkpoint=tmp_path / "run")
    again = run_each(stop, [0.0, 1.0, 2.0, 3.0, 4.0], checkpoint=tmp_path / "run", resume=True)
    straight = run_each(stop, [0.0, 1.0, 2.0, 3.0, 4.0])
    assert all(torch.equal(a[1], b[1]) for a, b in zip(again, straight, strict=True))
