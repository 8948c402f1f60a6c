"""Regression: the minimisers are the exact fields, signs cancel singularities, batches and conditions."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

import stochdyn as sd
from stochdyn import errors
from stochdyn.interpolants import (
    ExactCoupling,
    FieldNetwork,
    GaussianMixture,
    GaussianMixtureInterpolant,
    Interpolant,
    InterpolantRegression,
)
from stochdyn.testing import ObjectiveSuite
from tests.interpolants.truths import F64


class TestTwoFields(ObjectiveSuite):
    def make(self) -> tuple[InterpolantRegression, Any]:
        g = torch.Generator().manual_seed(0)
        batch = torch.randn(16, 2, dtype=F64, generator=g), torch.randn(16, 2, dtype=F64, generator=g)
        nets = {n: FieldNetwork(2, 8, 1).double() for n in ("velocity", "noise_prediction")}
        return InterpolantRegression(Interpolant(), **nets), batch


class TestScoreWithTransport(ObjectiveSuite):
    on_host = "couplings.py"

    def make(self) -> tuple[InterpolantRegression, Any]:
        g = torch.Generator().manual_seed(0)
        batch = torch.randn(16, 2, dtype=F64, generator=g), torch.randn(16, 2, dtype=F64, generator=g)
        nets = {n: FieldNetwork(2, 8, 1).double() for n in ("path_velocity", "score")}
        return InterpolantRegression(Interpolant("trig"), coupling="ot", **nets), batch


class Affine(nn.Module):
    """A field that is linear in the state and polynomial in time, which is exact for one Gaussian at a fixed time."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, dim, dtype=F64))
        self.bias = nn.Parameter(torch.zeros(dim, dtype=F64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias


class FixedTime(InterpolantRegression):
    """All times of a batch are the same."""

    time = 0.35

    def _times(self, n: int, like: Tensor) -> Tensor:
        return torch.full((n, 1), self.time, dtype=like.dtype)


@pytest.mark.parametrize("path", ["linear", "trig", "one-sided-linear", "mirror"])
@pytest.mark.parametrize(
    "name", ["velocity", "path_velocity", "noise_prediction", "score", "start_prediction", "data_prediction"]
)
def test_the_minimiser_is_the_field(path: str, name: str) -> None:
    """Least squares in closed form: the stationary point of the loss on a large sample, against the exact Gaussian."""
    it = Interpolant(path)
    if it.kind == "mirror" and name in ("path_velocity", "start_prediction"):
        return
    one = torch.ones(1, dtype=F64)
    first = GaussianMixture(
        one, torch.tensor([[0.5, -1.0]], dtype=F64), torch.tensor([[1.0, 0.3], [0.3, 0.8]], dtype=F64)
    )
    second = GaussianMixture(
        one, torch.tensor([[2.0, 1.0]], dtype=F64), torch.tensor([[0.5, -0.2], [-0.2, 0.6]], dtype=F64)
    )
    truth = GaussianMixtureInterpolant(it, None if it.kind == "one-sided" else first, second)
    field = Affine(2)
    objective = FixedTime(it, **{name: field})
    n = 100_000
    g = torch.Generator().manual_seed(1)
    x0 = torch.randn(n, 2, dtype=F64, generator=g) if it.kind == "one-sided" else first.draw(n, g)
    x1 = second.draw(n, g)
    batch = {"x1": x1} if it.starts_normal else {"x0": x0, "x1": x1}
    parameters = [field.weight, field.bias]
    # the loss is quadratic: one Newton step from anywhere is the minimum
    torch.manual_seed(3)

    def gradient() -> Tensor:
        torch.manual_seed(3)
        return torch.cat([p.flatten() for p in torch.autograd.grad(objective(batch).loss, parameters)])

    start = gradient()
    columns = []
    for p in parameters:
        for k in range(p.numel()):
            with torch.no_grad():
                p.view(-1)[k] += 1.0
            columns.append(gradient() - start)
            with torch.no_grad():
                p.view(-1)[k] -= 1.0
    step = torch.linalg.solve(torch.stack(columns, 1), -start)
    with torch.no_grad():
        field.weight.copy_(step[:4].reshape(2, 2))
        field.bias.copy_(step[4:])
        points = truth.sample(FixedTime.time, 200, g)
        t = torch.full((200, 1), FixedTime.time, dtype=F64)
        found, exact = objective.fields.call(name, t, points), getattr(truth, name)(FixedTime.time, points)
    scale = float(exact.std()) + 1.0
    assert float((found - exact).abs().max()) < 0.05 * scale


def _spread(name: str, time: float, antithetic: bool) -> float:
    """Standard deviation of the loss a pair at one time, with the exact field."""
    law = GaussianMixture(
        torch.tensor([0.5, 0.5], dtype=F64), torch.tensor([[-2.0, 0.0], [2.0, 1.0]], dtype=F64), 0.4
    )
    it = Interpolant()
    truth = GaussianMixtureInterpolant(it, None, law)
    g = torch.Generator().manual_seed(0)
    n = 20_000
    x0, x1, z = (
        torch.randn(n, 2, dtype=F64, generator=g),
        law.draw(n, g),
        torch.randn(n, 2, dtype=F64, generator=g),
    )
    t = torch.tensor(time, dtype=F64)
    losses = []
    for sign in (1, -1) if antithetic else (1,):
        value = getattr(truth, name)(t, it.sample(t, x0, x1, sign * z))
        losses.append((value * (0.5 * value - it.target(name, t, x0, x1, sign * z))).sum(-1))
    return float(torch.stack(losses).mean(0).std())


@pytest.mark.parametrize("name", ["score", "velocity"])
def test_both_signs_of_the_latent_remove_the_singularity(name: str) -> None:
    """At t = 1e-4 the variance of the loss falls by a factor of more than a thousand (score) or a hundred (velocity)."""
    ratio = (_spread(name, 1e-4, False) / _spread(name, 1e-4, True)) ** 2
    assert ratio > (1000 if name == "score" else 100)
    assert _spread(name, 1e-4, True) == pytest.approx(_spread(name, 1e-2, True), rel=0.2)


def test_signs_are_chosen_where_they_pay() -> None:
    net = FieldNetwork(2)
    assert InterpolantRegression(Interpolant(), velocity=net).antithetic
    assert InterpolantRegression(Interpolant("linear", "sin2"), score=net).antithetic
    assert not InterpolantRegression(Interpolant("linear", "sin2"), velocity=net).antithetic
    assert not InterpolantRegression(Interpolant(), noise_prediction=net).antithetic
    assert not InterpolantRegression(Interpolant("vp"), velocity=net, antithetic=True).antithetic


@pytest.mark.parametrize("times", ["stratified", "uniform"])
def test_times_are_uniform(times: str) -> None:
    objective = InterpolantRegression(Interpolant(), velocity=FieldNetwork(1), times=times)
    t = torch.stack([objective._times(50, torch.zeros(1, dtype=F64))[:, 0] for _ in range(400)])
    assert float(t.min()) >= 1e-5
    assert float(t.max()) <= 1 - 1e-5
    # every row is uniform by itself, and a batch covers the interval evenly if it is stratified
    assert float((t.mean(0) - 0.5).abs().max()) < 5 * (1 / 12 / 400) ** 0.5
    gaps = t.sort(1).values.diff(dim=1).amax(1)
    assert (float(gaps.max()) < 0.041) == (times == "stratified")


def test_batches_in_all_forms() -> None:
    x0, x1, label = torch.randn(8, 2), torch.randn(8, 2), torch.randint(3, (8,))
    net = FieldNetwork(2, num_classes=3)
    objective = InterpolantRegression(Interpolant(), velocity=net)
    for batch in (
        x1,
        (x0, x1),
        [x0, x1],
        (x0, x1, label),
        {"x1": x1},
        {"x0": x0, "x1": x1, "condition": label},
    ):
        assert bool(torch.isfinite(objective(batch).loss))
    base = torch.distributions.Independent(torch.distributions.Normal(torch.full((2,), 9.0), 0.1), 1)
    given = InterpolantRegression(Interpolant(), velocity=net, base=base)
    assert float(given.pairs(x1)[0].mean()) > 8
    assert float(given.pairs((x0, x1))[0].mean()) < 2


def test_conditions_follow_their_ends_through_a_coupling() -> None:
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(20, 2, generator=g), torch.randn(20, 2, generator=g)
    objective = InterpolantRegression(
        Interpolant(), velocity=FieldNetwork(2, condition_dim=2), coupling=ExactCoupling(0.0)
    )
    _, ends, condition = objective.pairs((x0, x1, x1 * 2))
    assert torch.equal(condition, ends * 2)
    assert not torch.equal(ends, x1)


def test_dropped_conditions_become_the_null_one() -> None:
    seen: list[Tensor] = []

    class Net(FieldNetwork):
        def forward(self, t: Tensor, x: Tensor, condition: Tensor | None = None) -> Tensor:
            assert condition is not None
            seen.append(condition)
            return super().forward(t, x, condition)

    objective = InterpolantRegression(
        Interpolant("vp"),
        velocity=Net(2, num_classes=3),
        condition_dropout=0.25,
        null_condition=torch.tensor(3),
    )
    x1, label = torch.randn(4000, 2), torch.randint(3, (4000,))
    objective({"x1": x1, "condition": label})
    share = float((seen[0] == 3).double().mean())
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 4000) ** 0.5
    assert torch.equal(seen[0][seen[0] < 3], label[seen[0] < 3])


def test_training_finds_the_velocity() -> None:
    law = GaussianMixture(torch.tensor([0.5, 0.5]), torch.tensor([[-1.5], [1.5]]), 0.2)
    it = Interpolant("vp")
    truth = GaussianMixtureInterpolant(it, None, law)
    objective = InterpolantRegression(it, velocity=FieldNetwork(1, 32, 2))
    torch.manual_seed(0)
    sd.fit(objective, law.sample((5000,)), steps=500, lr=5e-3, batch_size=256, progress=False)
    x = truth.sample(0.7, 500)
    with torch.no_grad():
        error = (objective.generator().velocity(0.7, x) - truth.velocity(0.7, x)).square().mean()
    assert float(error) < 0.05 * float(truth.velocity(0.7, x).square().mean())


def test_resumed_training_continues_to_the_same_bits(tmp_path: Any) -> None:
    x0, x1 = torch.randn(64, 2), torch.randn(64, 2) + 1

    def objective() -> InterpolantRegression:
        torch.manual_seed(4)
        net = {"velocity": FieldNetwork(2, 8, 1), "noise_prediction": FieldNetwork(2, 8, 1)}
        return InterpolantRegression(Interpolant(), coupling="entropic", reuse=3, **net)

    whole = sd.fit(objective(), (x0, x1), steps=8, batch_size=16, progress=False)
    folder = str(tmp_path / "run")
    sd.fit(objective(), (x0, x1), steps=4, batch_size=16, progress=False, checkpoint=folder)
    rest = sd.fit(
        objective(), (x0, x1), steps=8, batch_size=16, progress=False, checkpoint=folder, resume=True
    )
    assert torch.equal(whole.losses, rest.losses)


NET = FieldNetwork(2)
X = torch.zeros(4, 2)
BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no field": (lambda: InterpolantRegression(Interpolant()), errors.InvalidInputError, "one or two fields"),
    "three fields": (
        lambda: InterpolantRegression(Interpolant(), velocity=NET, score=NET, start_prediction=NET),
        errors.InvalidInputError,
        "one or two fields",
    ),
    "a field that isn't callable": (
        lambda: InterpolantRegression(Interpolant(), velocity=1.0),  # type: ignore[arg-type]
        errors.InvalidInputError,
        "velocity must be a network",
    ),
    "a score on a coupled one-sided path": (
        lambda: InterpolantRegression(Interpolant("vp"), score=NET, coupling="ot"),
        errors.InvalidInputError,
        "needs the independent coupling",
    ),
    "an unknown coupling": (
        lambda: InterpolantRegression(Interpolant(), velocity=NET, coupling="optimal"),
        errors.InvalidInputError,
        "coupling is unknown",
    ),
    "no reuse": (
        lambda: InterpolantRegression(Interpolant(), velocity=NET, reuse=0),
        errors.InvalidInputError,
        "reuse",
    ),
    "dropout without a null": (
        lambda: InterpolantRegression(Interpolant(), velocity=NET, condition_dropout=0.1),
        errors.InvalidInputError,
        "null_condition",
    ),
    "weights of another field": (
        lambda: InterpolantRegression(Interpolant(), velocity=NET, weights={"score": torch.square}),
        errors.InvalidInputError,
        "aren't learnt",
    ),
    "a base without a vector event": (
        lambda: InterpolantRegression(Interpolant(), velocity=NET, base=torch.distributions.Normal(0.0, 1.0)),
        errors.ShapeError,
        "vector event",
    ),
    "no batch": (
        lambda: InterpolantRegression(Interpolant(), velocity=NET)(),
        errors.InvalidInputError,
        "a batch is",
    ),
    "an empty batch": (
        lambda: InterpolantRegression(Interpolant(), velocity=NET)((X[:0], X[:0])),
        errors.EmptyDataError,
        "x1 is empty",
    ),
    "mismatched dimensions": (
        lambda: InterpolantRegression(Interpolant(), velocity=NET)((X, X[:, :1])),
        errors.ShapeError,
        "axis -1",
    ),
    "unknown parts": (
        lambda: InterpolantRegression(Interpolant(), velocity=NET)({"x1": X, "y": X}),
        errors.InvalidInputError,
        "unknown parts",
    ),
    "conditions of another number": (
        lambda: InterpolantRegression(Interpolant(), velocity=NET)((X, X, X[:2])),
        errors.ShapeError,
        "one condition per point",
    ),
    "a network of another size": (
        lambda: InterpolantRegression(Interpolant(), velocity=FieldNetwork(2, out_dim=3))((X, X)),
        errors.ShapeError,
        "wrong shape",
    ),
}


@pytest.mark.parametrize("row", BAD)
def test_bad_input(row: str) -> None:
    call, error, message = BAD[row]
    with pytest.raises(error, match=message):
        call()


def test_predictions_are_held_to_what_they_must_be_at_an_end() -> None:
    """An error of one per cent is one of one per cent in the density, whatever is learnt; exact fields stay as they are."""
    law = GaussianMixture(torch.ones(1, dtype=F64), torch.ones(1, 1, dtype=F64), 0.25)
    it = Interpolant("one-sided-linear")
    truth = GaussianMixtureInterpolant(it, None, law)
    x = 1.0 + torch.linspace(-1, 1, 9, dtype=F64)[:, None]
    base = torch.distributions.Independent(
        torch.distributions.Normal(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)), 1
    )
    for name, bound in (("velocity", 0.06), ("data_prediction", 0.1), ("noise_prediction", 0.1)):
        exact = getattr(truth, name)
        model = InterpolantRegression(
            it, **{name: lambda t, y, f=exact: 1.01 * f(t, y)}, base=base
        ).generator()
        assert float((model.log_prob(x, num_steps=50) - law.log_prob(x)).abs().max()) < bound, name
        plain = InterpolantRegression(it, **{name: exact}, base=base).generator()
        t = torch.rand(9, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(plain.fields.call(name, t, x), exact(t, x))
    assert not InterpolantRegression(it, velocity=truth.velocity).weights
    assert (
        "noise_prediction"
        not in InterpolantRegression(
            Interpolant(), velocity=truth.velocity, noise_prediction=truth.noise_prediction
        ).weights
    )


def test_predictions_learn_as_well_as_velocities() -> None:
    """Two modes: the divergence of the flow from the data, by quadrature, with the same network and training."""
    law = GaussianMixture(torch.tensor([0.5, 0.5]), torch.tensor([[-2.0], [2.0]]), 0.09)
    torch.manual_seed(0)
    data = law.sample((10_000,))
    grid = torch.linspace(-4, 4, 201)[:, None]
    log_prob, found = law.log_prob(grid), {}
    for name in ("velocity", "data_prediction", "noise_prediction"):
        torch.manual_seed(1)
        objective = InterpolantRegression(Interpolant("one-sided-linear"), **{name: FieldNetwork(1)})
        sd.fit(objective, data, steps=1000, batch_size=256, lr=3e-3, progress=False,
               scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 1000))  # fmt: skip
        with torch.no_grad():
            model = objective.generator().log_prob(grid, num_steps=20)
        found[name] = float((log_prob.exp() * (log_prob - model)).sum() * 0.04)
    assert max(found.values()) < 0.12, found
    assert max(found.values()) < 3 * found["velocity"] + 0.05, found


def _labelled(**options):
    torch.manual_seed(0)
    it = Interpolant("one-sided-linear")
    objective = InterpolantRegression(it, velocity=FieldNetwork(2, 8, 1, num_classes=3), **options)
    x1, label = torch.randn(60, 2), torch.arange(60) % 3
    sd.fit(objective, {"x1": x1, "condition": label}, steps=2, progress=False)
    return objective


@pytest.mark.parametrize("stored", [lambda g: g, copy.deepcopy, lambda g: pickle.loads(pickle.dumps(g))])
def test_a_model_of_conditions_is_not_asked_without_one(stored):
    model = stored(_labelled().generator())
    for ask in (
        lambda: model.sample(3),
        lambda: model.log_prob(torch.zeros(3, 2)),
        lambda: model.velocity(0.5, torch.zeros(3, 2)),
    ):
        with pytest.raises(errors.InvalidInputError, match="trained with conditions alone"):
            ask()
    assert model.sample(3, condition=1, num_steps=2).shape == (3, 2)


def test_no_condition_is_the_null_condition_of_the_training():
    model = _labelled(condition_dropout=0.3, null_condition=2).generator()
    unasked = model.sample(4, num_steps=3, generator=0)
    torch.testing.assert_close(unasked, model.sample(4, num_steps=3, condition=2, generator=0))


def test_guidance_without_a_condition_is_refused():
    model = _labelled(condition_dropout=0.3, null_condition=3).generator()
    with pytest.raises(errors.InvalidInputError, match="guidance needs a condition"):
        model.sample(3, guidance=2.0)


@pytest.mark.parametrize("label", [4, -1])
def test_labels_that_do_not_exist_are_refused(label):
    model = _labelled().generator()
    with pytest.raises(errors.InvalidInputError, match="no such label"):
        model.sample(3, condition=label)


def test_the_noise_of_training_does_not_depend_on_how_data_lie_in_memory():
    x1 = torch.randn(60, 2)
    objective = InterpolantRegression(Interpolant("linear"), velocity=FieldNetwork(2, 8, 1))

    def loss(x):
        torch.manual_seed(0)
        return objective((torch.zeros(60, 2), x)).loss

    torch.testing.assert_close(loss(x1.T.contiguous().T), loss(x1))
    torch.testing.assert_close(loss(pd.DataFrame(x1.numpy())), loss(x1))


def test_late_times_crowd_towards_the_data() -> None:
    """The fourth root of what is left of the path is spread evenly."""
    objective = InterpolantRegression(Interpolant("one-sided-linear"), velocity=FieldNetwork(2), times="late")
    torch.manual_seed(0)
    t = objective._times(1000, torch.zeros(1000, 2, dtype=torch.float64))
    assert t.shape == (1000, 1)
    root = (1 - t).pow(0.25).flatten().sort().values
    assert (
        float((root - (torch.arange(1000) + 0.5) / 1000).abs().max()) < 0.06
    )  # 1e-5 of the path is left out
    assert float((root - (torch.arange(1000) + 0.5) / 1000).abs()[100:].max()) < 2e-3


def test_layers_that_add_up_start_near_the_identity_of_their_first() -> None:
    torch.manual_seed(0)
    net = FieldNetwork(2, width=32, depth=6, condition_dim=1, skips=True)
    assert len(net.layers) == 7
    for layer in net.layers[1:-1]:
        torch.nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
        torch.nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    t, x, c = torch.rand(5, 1), torch.randn(5, 2), torch.randn(5, 1)
    first = net.layers[0](torch.cat([t, x, c], -1))
    torch.testing.assert_close(net(t, x, c), net.layers[-1](torch.nn.functional.silu(first)))
