"""``fit`` does what a loop by hand does, takes what users bring, and refuses what can't work at once."""

from __future__ import annotations

import random
from functools import partial
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import Trace_ELBO
from pyro.infer.autoguide import AutoNormal
from pyro.nn import PyroModule, PyroParam
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import stochdyn.run.progress as progress_module
import stochdyn.run.training as training_module
from stochdyn.errors import (
    DeviceMismatchError,
    DtypeMismatchError,
    EmptyDataError,
    InvalidInputError,
    ShapeError,
)
from stochdyn.objectives import Objective, ObjectiveValue
from stochdyn.run import FitResult, fit
from stochdyn.run.guard import FiniteGuard
from tests.run.toys import Quadratic, Regression, regression_data, same_bits, weights


def quiet(*args: Any, **kwargs: Any) -> FitResult:
    return fit(*args, **{"progress": False, **kwargs})


class TestTheLoop:
    def test_equals_a_loop_by_hand(self) -> None:
        data = regression_data()
        by_hand = Regression()
        adam = torch.optim.Adam(by_hand.parameters(), lr=0.01)
        losses = []
        for _ in range(25):
            adam.zero_grad()
            loss = by_hand(data).loss
            loss.backward()
            adam.step()
            losses.append(loss.detach())
        objective = Regression()
        result = quiet(objective, data, steps=25, lr=0.01)
        assert torch.equal(result.losses, torch.stack(losses))
        assert same_bits(weights(objective), weights(by_hand))
        assert torch.equal(result.terms["error"], result.losses)
        assert (result.steps, result.stopped_early, result.interrupted) == (25, False, False)
        assert result.objective is objective
        assert result.seconds > 0

    def test_minibatches_come_from_a_permutation_of_each_epoch(self) -> None:
        seen: list[int] = []

        class Watch(Quadratic):
            def forward(self, batch: Any = None) -> ObjectiveValue:
                seen.extend(batch.tolist())
                return super().forward()

        quiet(Watch(torch.ones(1)), torch.arange(12), steps=6, batch_size=4)
        first, second = seen[:12], seen[12:]
        assert sorted(first) == sorted(second) == list(range(12))
        assert first != second
        assert first != sorted(first)

    def test_clip_norm_bounds_the_step(self) -> None:
        objective = Quadratic(torch.tensor([3.0, 4.0]))
        quiet(objective, steps=1, lr=1.0, optimizer=torch.optim.SGD, clip_norm=0.5)
        torch.testing.assert_close(objective.theta.detach(), torch.tensor([0.3, 0.4]))

    def test_scheduler_steps_with_the_optimizer(self) -> None:
        objective = Quadratic(torch.ones(1))
        rates: list[float] = []
        quiet(
            objective,
            steps=3,
            lr=1.0,
            optimizer=torch.optim.SGD,
            scheduler=lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.1),
            callbacks=[lambda state: rates.append(state.lr)],
        )
        assert rates == pytest.approx([0.1, 0.01, 0.001])
        # Errors shrink by the factors 1 - 1, 1 - 0.1, 1 - 0.01 of gradient descent on a quadratic.
        assert objective.theta.item() == 1.0

    def test_frozen_parameters_stay(self) -> None:
        objective = Regression()
        objective.net[0].weight.requires_grad_(False)
        before = weights(objective)
        quiet(objective, regression_data(), steps=3)
        after = weights(objective)
        assert torch.equal(before["net.0.weight"], after["net.0.weight"])
        assert not torch.equal(before["net.3.weight"], after["net.3.weight"])

    def test_double_precision_is_kept(self) -> None:
        objective = Regression(dtype=torch.float64)
        result = quiet(objective, regression_data(dtype=torch.float64), steps=3, ema=0.9)
        assert result.losses.dtype == torch.float64
        assert result.ema is not None
        assert {v.dtype for v in result.ema.values()} == {torch.float64}

    def test_mode_of_the_modules_and_grad_mode_are_left(self) -> None:
        objective = Regression(dropout=0.5)
        objective.net[2].eval()
        with torch.no_grad():
            result = quiet(objective, regression_data(), steps=60, lr=0.01)
            assert not torch.is_grad_enabled()
        assert objective.training
        assert not objective.net[2].training
        assert result.losses[-1] < result.losses[0]

    def test_terms_that_come_and_go_are_padded_with_nan(self) -> None:
        class Odd(Quadratic):
            calls = 0

            def forward(self, batch: Any = None) -> ObjectiveValue:
                self.calls += 1
                terms = {"odd": torch.tensor(self.calls)} if self.calls % 2 else {}
                return ObjectiveValue(super().forward().loss, terms, "residual")

        result = quiet(Odd(torch.ones(1)), steps=5, log_every=2)
        nan = float("nan")
        torch.testing.assert_close(result.terms["odd"], torch.tensor([1, nan, 3, nan, 5]), equal_nan=True)
        assert result.bound == "residual"

    @pytest.mark.parametrize("log_every", [1, 7, 1000])
    def test_log_every_changes_no_number(self, log_every: int) -> None:
        runs = [
            quiet(Regression(), regression_data(), steps=23, batch_size=4, log_every=n)
            for n in (10, log_every)
        ]
        assert torch.equal(runs[0].losses, runs[1].losses)


class Labels(nn.Module):
    """A classifier: its data are numbers and labels."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(3, 2)
        with torch.no_grad():
            self.net.weight.copy_(torch.arange(6.0).reshape(2, 3) / 7)
            self.net.bias.zero_()

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        assert label.dtype == torch.int64
        return nn.functional.cross_entropy(self.net(x), label)


class TestAccumulationAndPrecision:
    def test_accumulated_batches_are_one_large_batch(self) -> None:
        data = regression_data(24, torch.float64)
        large, small = Regression(dtype=torch.float64), Regression(dtype=torch.float64)
        whole = quiet(large, data, steps=8, lr=0.02, batch_size=12, clip_norm=1.0)
        parts = quiet(small, data, steps=8, lr=0.02, batch_size=4, accumulate=3, clip_norm=1.0)
        torch.testing.assert_close(parts.losses, whole.losses, rtol=1e-12, atol=0)
        torch.testing.assert_close(parts.terms["error"], whole.terms["error"], rtol=1e-12, atol=0)
        torch.testing.assert_close(weights(small), weights(large), rtol=1e-12, atol=0)

    def test_bfloat16_is_that_of_the_products_and_not_of_the_parameters(self) -> None:
        seen: list[torch.dtype] = []

        class Watch(Regression):
            def forward(self, batch: Any = None) -> ObjectiveValue:
                seen.append(self.net(batch[0]).dtype)
                return super().forward(batch)

        objective = Watch()
        result = quiet(objective, regression_data(), steps=40, lr=0.02, precision="bfloat16")
        assert set(seen) == {torch.bfloat16}
        assert {p.dtype for p in objective.parameters()} == {torch.float32}
        assert result.losses[-1] < result.losses[0]

    @pytest.mark.parametrize("kind", ["torch", "numpy", "lists"])
    def test_data_of_any_kind_and_whole_labels(self, kind: str) -> None:
        x, y = torch.arange(12.0).reshape(4, 3).sin(), torch.tensor([0, 1, 1, 0])
        data: Any = (x, y)
        if kind == "numpy":
            data = (x.numpy(), y.numpy())
        elif kind == "lists":
            data = (x.numpy(), y.tolist())
        expected = quiet(Labels(), (x, y), steps=5, lr=0.1, batch_size=2).losses
        assert torch.equal(quiet(Labels(), data, steps=5, lr=0.1, batch_size=2).losses, expected)


class TestNoWaiting:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"accumulate": 2},
            {"precision": "bfloat16"},
            {"optimizer": partial(torch.optim.Adam, fused=True)},
        ],
    )
    def test_nothing_is_read_back_between_looks(
        self, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
    ) -> None:
        """With the guard as it is on a GPU, values cross to the host at the looks only."""
        step = [0]
        reads: list[int] = []

        class Count(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                name = str(func)
                if "_local_scalar_dense" in name or "nonzero" in name:
                    reads.append(step[0])
                return func(*args, **(kwargs or {}))

        def deferred(*args: Any, **kwargs: Any) -> FiniteGuard:
            return FiniteGuard(*args, immediate=False, **kwargs)

        def count(state: Any) -> None:
            step[0] = state.step

        monkeypatch.setattr(training_module, "FiniteGuard", deferred)
        data = regression_data()
        with Count():
            quiet(
                Regression(),
                data,
                steps=30,
                batch_size=5,
                ema=0.9,
                clip_norm=1.0,
                log_every=10,
                callbacks=[count],
                **{"optimizer": torch.optim.SGD, **options},
            )
        during = {s for s in reads if 1 < s < 30}
        assert during == {10, 20}


class TestWhatUsersBring:
    def test_a_plain_module_gets_tuples_dicts_and_tensors_as_arguments(self) -> None:
        class Plain(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.a = nn.Parameter(torch.zeros(()))
                self.calls: list[tuple[int, tuple[str, ...]]] = []

            def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
                self.calls.append((len(args), tuple(kwargs)))
                return self.a.square()

        x = torch.zeros(4)
        for data, expected in [
            (None, (0, ())),
            (x, (1, ())),
            ((x, x), (2, ())),
            ({"u": x}, (0, ("u",))),
        ]:
            module = Plain()
            quiet(module, data, steps=1)
            assert set(module.calls) == {expected}

    def test_pyro_elbo_finds_the_conjugate_posterior(self) -> None:
        y = 2.0 + torch.randn(40, generator=torch.Generator().manual_seed(3))

        def model(y: Tensor) -> None:
            mean = pyro.sample("mean", dist.Normal(0.0, 3.0))
            with pyro.plate("data", len(y)):
                pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

        guide = AutoNormal(model)
        elbo = Trace_ELBO(num_particles=16, vectorize_particles=True)(model, guide)
        result = quiet(
            elbo,
            (y,),
            steps=600,
            lr=0.03,
            scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 600),
        )
        precision = 1 / 9 + len(y)
        assert guide.median()["mean"].item() == pytest.approx((y.sum() / precision).item(), abs=0.02)
        assert guide.scales.mean.item() == pytest.approx(precision**-0.5, rel=0.1)
        evidence = dist.MultivariateNormal(torch.zeros(40), torch.eye(40) + 9 * torch.ones(40, 40)).log_prob(
            y
        )
        # The bound is tight for a conjugate model; 16 particles of it over 100 steps, 5 standard errors.
        last = -result.losses[-100:]
        assert abs(last.mean() - evidence) < 5 * last.std() / 10 + 0.02

    def test_pyro_module_parameters_are_trained_and_bare_ones_refused(self) -> None:
        class Model(PyroModule):
            def __init__(self) -> None:
                super().__init__()
                self.scale = PyroParam(torch.tensor(1.0), constraint=dist.constraints.positive)

            def forward(self, y: Tensor) -> None:
                pyro.sample("y", dist.Normal(0.0, self.scale).expand([len(y)]).to_event(1), obs=y)

        def no_latents(y: Tensor) -> None:
            pass

        def bare(y: Tensor) -> None:
            loc = pyro.param("loc", torch.tensor(0.0))
            pyro.sample("extra", dist.Normal(loc, 1.0), infer={"is_auxiliary": True})

        y = torch.tensor([3.0, -3.0, 3.0])
        model = Model()
        quiet(Trace_ELBO()(model, no_latents), (y,), steps=400, lr=0.05)
        assert model.scale.item() == pytest.approx(3.0, abs=0.02)
        for _ in range(2):  # also when the parameter is in Pyro's store from an earlier run
            with pytest.raises(InvalidInputError, match=r"pyro\.param statements outside its modules.*loc"):
                quiet(Trace_ELBO()(Model(), bare), (y,), steps=1)
        with pytest.raises(InvalidInputError, match="no trainable parameters"):
            quiet(Trace_ELBO()(no_latents, bare), (y,), steps=1)

    def test_lazy_layers_are_made_before_the_optimizer(self) -> None:
        class Lazy(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.net = nn.LazyLinear(1)
                self.norm = nn.BatchNorm1d(3)

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return (self.net(self.norm(x)) - y).square().mean()

        module = Lazy()
        result = quiet(module, regression_data(), steps=200, lr=0.02)
        assert module.net.weight.shape == (1, 3)
        assert result.losses[-1] < 0.6 * result.losses[0]
        assert module.norm.num_batches_tracked.item() == 200  # the trial evaluation left no trace

    def test_parameters_that_come_late_are_refused(self) -> None:
        class Late(Quadratic):
            def forward(self, batch: Any = None) -> ObjectiveValue:
                if not hasattr(self, "extra"):
                    self.extra = nn.Parameter(torch.zeros(()))
                return ObjectiveValue(super().forward().loss + self.extra)

        with pytest.raises(InvalidInputError, match=r"too late to train them.*extra.*once before fit"):
            quiet(Late(torch.ones(1)), steps=2)


class TestRandomness:
    def test_the_seed_decides_and_the_callers_generators_are_left(self) -> None:
        objectives = [Regression(dropout=0.5) for _ in range(3)]

        def run(seed: int) -> Tensor:
            return quiet(objectives.pop(), regression_data(), steps=5, batch_size=4, seed=seed).losses

        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        expected = (torch.rand(2).tolist(), random.random(), np.random.rand())
        torch.manual_seed(1), random.seed(1), np.random.seed(1)
        first = run(7)
        with pytest.raises(InvalidInputError):
            quiet(nn.Identity(), torch.zeros(3), steps=1)
        assert (torch.rand(2).tolist(), random.random(), np.random.rand()) == expected
        assert torch.equal(first, run(7))
        assert not torch.equal(first, run(8))

    def test_without_a_seed_the_callers_generator_goes_on(self) -> None:
        def run() -> Tensor:
            return quiet(Regression(dropout=0.5), regression_data(), steps=5, batch_size=4, seed=None).losses

        torch.manual_seed(3)
        first, second = run(), run()
        assert not torch.equal(first, second)
        torch.manual_seed(3)
        assert torch.equal(first, run())


class TestProgress:
    def test_the_bar_shows_steps_and_loss(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(progress_module, "DELAY", 0.0)
        fit(Quadratic(torch.ones(1)), steps=20, lr=1e-9)
        err = capsys.readouterr().err
        assert "20/20" in err
        assert "loss=0.5" in err

    def test_a_short_run_shows_none(self, capsys: pytest.CaptureFixture[str]) -> None:
        fit(Quadratic(torch.ones(1)), steps=20)
        assert capsys.readouterr() == ("", "")

    def test_without_it_nothing_is_written(self, capsys: pytest.CaptureFixture[str]) -> None:
        quiet(Quadratic(torch.ones(1)), steps=20)
        assert capsys.readouterr() == ("", "")


class NotScalar(Quadratic):
    def forward(self, batch: Any = None) -> Any:
        return ObjectiveValue(self.theta.square())


class Detached(Quadratic):
    def forward(self, batch: Any = None) -> Any:
        return ObjectiveValue(self.theta.detach().sum())


class ReturnsFloat(Quadratic):
    def forward(self, batch: Any = None) -> Any:
        return 3.0


class VectorTerm(Quadratic):
    def forward(self, batch: Any = None) -> Any:
        return ObjectiveValue(self.theta.sum(), {"wide": torch.zeros(2)})


one = torch.ones(1)
five = torch.zeros(5)

BAD = [
    (Quadratic, {"steps": 0}, InvalidInputError, "steps must be an integer of at least 1"),
    (Quadratic, {"steps": 2.5}, InvalidInputError, "steps must be an integer"),
    (Quadratic, {"lr": -1.0}, InvalidInputError, "lr must be greater than 0"),
    (Quadratic, {"lr": "a"}, InvalidInputError, "lr must be a real number; got 'a'"),
    (Quadratic, {"clip_norm": 0.0}, InvalidInputError, "clip_norm must be greater than 0"),
    (Quadratic, {"ema": 1.5}, InvalidInputError, "ema must be less than 1"),
    (Quadratic, {"ema": "0.9"}, InvalidInputError, "ema must be a real number"),
    (Quadratic, {"seed": -1}, InvalidInputError, "seed must be a whole number"),
    (Quadratic, {"seed": "one"}, InvalidInputError, "seed must be a whole number"),
    (Quadratic, {"accumulate": 0}, InvalidInputError, "accumulate must be an integer of at least 1"),
    (Quadratic, {"precision": "half"}, InvalidInputError, "precision is unknown"),
    (Quadratic, {"precision": "float16"}, InvalidInputError, "needs scaled losses.*bfloat16"),
    (Quadratic, {"progress": 3}, InvalidInputError, "progress must be True or False"),
    (Quadratic, {"resume": "yes"}, InvalidInputError, "resume must be True or False"),
    (Quadratic, {"checkpoint": 3}, InvalidInputError, "checkpoint must be the path of a directory"),
    (Quadratic, {"distributed": "yes"}, InvalidInputError, "distributed has the wrong type"),
    (Quadratic, {"callbacks": len}, InvalidInputError, "callbacks has the wrong type.*in a list"),
    (Quadratic, {"log_every": 0}, InvalidInputError, "log_every must be"),
    (Quadratic, {"checkpoint_every": 0}, InvalidInputError, "checkpoint_every must be"),
    (Quadratic, {"on_interrupt": "sulk"}, InvalidInputError, "on_interrupt is unknown"),
    (Quadratic, {"resume": True}, InvalidInputError, "needs the directory"),
    (Quadratic, {"device": "gpu7"}, InvalidInputError, "device is unknown"),
    (Quadratic, {"distributed": True}, InvalidInputError, "needs a process group.*torchrun"),
    (Quadratic, {"callbacks": [3]}, InvalidInputError, "a callback must be a Callback or a function"),
    (Quadratic, {"batch_size": 4}, InvalidInputError, "batch_size has no meaning here; got no data"),
    (Quadratic, {"data": five, "batch_size": 0}, InvalidInputError, "batch_size must be"),
    (Quadratic, {"data": torch.zeros(0, 2)}, EmptyDataError, "data is empty"),
    (Quadratic, {"data": (five, torch.zeros(4)), "batch_size": 2}, ShapeError, r"sizes \[4, 5\]"),
    (Quadratic, {"data": (five, torch.tensor(1.0)), "batch_size": 2}, ShapeError, "a scalar tensor"),
    (Quadratic, {"data": "text", "batch_size": 2}, InvalidInputError, "data made of tensors; got str"),
    (Quadratic, {"optimizer": torch.optim.LBFGS}, InvalidInputError, "LBFGS evaluates several times"),
    (Quadratic, {"optimizer": 3}, InvalidInputError, "optimizer must be a class or function"),
    (
        Quadratic,
        {"optimizer": lambda p, lr: "adam"},
        InvalidInputError,
        "must make a torch optimiser; got str",
    ),
    (
        Quadratic,
        {"scheduler": torch.optim.lr_scheduler.ReduceLROnPlateau},
        InvalidInputError,
        "steps without a metric; got ReduceLROnPlateau",
    ),
    (NotScalar, {}, ShapeError, r"loss must be a scalar tensor; got shape \(1,\)"),
    (Detached, {}, InvalidInputError, "doesn't depend on any trainable parameter"),
    (ReturnsFloat, {}, InvalidInputError, "must return an ObjectiveValue or a scalar tensor; got float"),
    (VectorTerm, {}, ShapeError, "term 'wide' must be a scalar"),
]


@pytest.mark.parametrize(("kind", "arguments", "error", "message"), BAD, ids=[b[3][:40] for b in BAD])
def test_bad_input_is_refused_before_any_work(
    kind: type[Quadratic], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    objective = kind(one)
    with pytest.raises(error, match=message):
        quiet(objective, **{"steps": 3, **arguments})
    assert torch.equal(objective.theta.detach(), torch.zeros(1))


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"must be a torch\.nn\.Module; got function.*Trace_ELBO"):
        quiet(lambda batch: one, steps=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_without_cuda_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="device is not available; got cuda"):
        quiet(Quadratic(one), steps=1, device="cuda")


def test_an_objective_on_two_devices_needs_a_device() -> None:
    objective = Quadratic(one)
    objective.register_buffer("elsewhere", torch.zeros(1, device="meta"))
    with pytest.raises(DeviceMismatchError, match="spread over devices"):
        quiet(objective, steps=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_device_moves_objective_and_data() -> None:
    objective = Regression()
    result = quiet(objective, regression_data(), steps=50, lr=0.01, batch_size=5, device="cuda")
    assert {p.device.type for p in objective.parameters()} == {"cuda"}
    assert result.losses.device.type == "cpu"
    assert result.losses[-1] < result.losses[0]


def test_data_of_another_precision_than_the_network_are_told() -> None:
    class Model(Objective):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 1)

        def forward(self, batch: Any = None) -> ObjectiveValue:
            return ObjectiveValue(self.net(batch["x"]).square().mean())

    data = {"x": torch.zeros(4, 2, dtype=torch.float64), "weights": torch.ones(4, dtype=torch.float64)}
    told = r"data torch\.float64 and parameters torch\.float32"
    with pytest.raises(DtypeMismatchError, match=told):
        fit(Model(), data, steps=2, progress=False)
    fit(Model().double(), data, steps=2, progress=False)
