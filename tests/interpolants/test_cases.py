"""Inputs that are used or refused, never dropped: conditions, starts, events of any shape, networks of any form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stochdyn as sd
from stochdyn import errors
from stochdyn.interpolants import (
    OU,
    VP,
    CoupledBatches,
    ExactCoupling,
    FieldNetwork,
    Interpolant,
    InterpolantRegression,
    MeanReverting,
    NetworkAdapter,
    PotentialNetwork,
    ScoreMatching,
    WhitenedField,
    time_grid,
)

X1 = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(40) % 3


@pytest.mark.parametrize(
    "call",
    {
        "labels of a network without labels": lambda: InterpolantRegression(
            Interpolant("one-sided-linear"), velocity=FieldNetwork(2)
        )({"x1": X1, "condition": LABELS}),
        "contexts of a network without contexts": lambda: InterpolantRegression(
            Interpolant("one-sided-linear"), velocity=FieldNetwork(2)
        )({"x1": X1, "condition": X1}),
        "labels of a whitened field without labels": lambda: InterpolantRegression(
            Interpolant(), velocity=WhitenedField.from_data(Interpolant(), "velocity", X1)
        )({"x1": X1, "condition": LABELS}),
        "conditions of a potential": lambda: ScoreMatching(OU(), potential=PotentialNetwork(OU(), 2))(
            (X1, LABELS)
        ),
        "labels of a score without labels": lambda: ScoreMatching(OU(), score=FieldNetwork(2))((X1, LABELS)),
        "starts on a one-sided path": lambda: InterpolantRegression(
            Interpolant("one-sided-linear"), velocity=FieldNetwork(2)
        )((X1, X1)),
        "pairs made ahead on a one-sided path": lambda: InterpolantRegression(
            Interpolant("one-sided-linear"), velocity=FieldNetwork(2)
        )(next(iter(CoupledBatches(X1, X1)))),
        "images and labels as a pair": lambda: InterpolantRegression(Interpolant(), velocity=FieldNetwork(2))(
            (X1, LABELS)
        ),
        "labels that are fractions": lambda: FieldNetwork(2, num_classes=3)(X1[:, :1], X1, X1[:, 0]),
        "a word with two meanings": lambda: InterpolantRegression(Interpolant(), denoiser=FieldNetwork(2)),
        "steps and a grid": lambda: (
            InterpolantRegression(Interpolant(), velocity=FieldNetwork(2))
            .generator()
            .push(X1, 5, ts=[0.0, 1.0])
        ),
        "splitting without noise": lambda: (
            InterpolantRegression(Interpolant(), velocity=FieldNetwork(2))
            .generator()
            .sample(40, method="strang", x0=X1)
        ),
        "an adaptive method with noise": lambda: (
            InterpolantRegression(Interpolant("one-sided-linear"), velocity=FieldNetwork(2))
            .generator()
            .sample(40, 0.5, method="dopri5", x0=X1)
        ),
    }.items(),
    ids=lambda row: row[0],
)
def test_nothing_is_dropped_silently(call: Any) -> None:
    with pytest.raises((errors.InvalidInputError, errors.ShapeError)):
        call[1]()


def test_precisions_that_differ_are_named() -> None:
    for objective in (
        InterpolantRegression(Interpolant(), velocity=FieldNetwork(2)),
        ScoreMatching(OU(), score=FieldNetwork(2)),
    ):
        with pytest.raises(errors.DtypeMismatchError, match="different precisions"):
            objective(X1.double())


def test_data_of_any_kind() -> None:
    objective = InterpolantRegression(Interpolant(), velocity=FieldNetwork(2, num_classes=3))
    batch = {"x1": np.asarray(X1), "condition": LABELS.tolist()}
    assert bool(torch.isfinite(objective(batch).loss))
    model = objective.generator()
    one = model.sample(5, num_steps=2, condition=1, generator=3)
    torch.testing.assert_close(one, model.sample(5, num_steps=2, condition=[1] * 5, generator=3))
    assert model.sample((2, 3), num_steps=2, condition=np.zeros((2, 3), dtype=int)).shape == (2, 3, 2)
    with pytest.raises(errors.ShapeError, match="one condition per point"):
        model.sample(5, num_steps=2, condition=[1, 2])


@pytest.mark.parametrize("path", ["linear", "one-sided-linear"])
def test_couplings_respect_labels_by_default(path: str) -> None:
    """Within labels starts and ends are coupled; across labels they aren't."""
    x1 = X1 + 10.0 * LABELS[:, None]
    objective = InterpolantRegression(
        Interpolant(path), velocity=FieldNetwork(2, num_classes=3), coupling="ot"
    )
    g = torch.Generator().manual_seed(1)
    x0 = torch.randn(40, 2, generator=g)
    partner = objective.coupling.pair(x0, x1, LABELS)
    assert torch.equal(LABELS[partner], LABELS)
    blind = ExactCoupling(0.0).pair(x0, x1, LABELS)
    assert not torch.equal(LABELS[blind], LABELS)


def test_couplings_respect_contexts_in_any_unit() -> None:
    g = torch.Generator().manual_seed(1)
    context = torch.randn(200, 1, generator=g)
    x1 = 2 * context + 0.3 * torch.randn(200, 1, generator=g)
    x0 = torch.randn(200, 1, generator=g)
    partner = ExactCoupling().pair(x0, x1, context)
    # a start knows next to nothing of the context of its partner beyond its own
    assert float((context[partner] - context).square().mean().sqrt()) < 0.2
    for scale in (2.0**-30, 2.0**30):
        assert torch.equal(ExactCoupling().pair(scale * x0, scale * x1, context), partner)
        assert torch.equal(ExactCoupling().pair(x0, x1, scale * context), partner)


class Images(nn.Module):
    """A network of images, called as ``net(x, timesteps, y=labels)`` with times ``(n,)``."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None) -> Tensor:
        assert timesteps.shape == x.shape[:1]
        plane = timesteps[:, None, None, None].expand(-1, 1, *x.shape[2:]) / 1000
        return self.inner(torch.cat([x, plane], 1))


def test_events_of_any_shape_and_networks_of_any_form() -> None:
    torch.manual_seed(0)
    data = torch.randn(30, 2, 4, 4)
    nets = {
        n: NetworkAdapter(Images(), time_first=False, time="flat", time_scale=1000.0, condition="y")
        for n in ("velocity", "noise_prediction")
    }
    objective = InterpolantRegression(Interpolant(), **nets, coupling="ot")  # type: ignore[arg-type]
    sd.fit(objective, {"x1": data, "condition": torch.arange(30)}, steps=3, batch_size=10, progress=False)
    model = objective.generator()
    x = model.sample((2, 3), 0.5, 4, condition=torch.zeros(2, 3, dtype=torch.long))
    assert x.shape == (2, 3, 2, 4, 4)
    assert model.push(data, 3, trajectory=True).shape == (4, 30, 2, 4, 4)
    assert model.log_prob(data[:2], exact=False, num_steps=2).shape == (2,)
    assert model.velocity(0.5, data).shape == data.shape
    assert model.score(torch.rand(30), data).shape == data.shape
    law = model.distribution(num_steps=2)
    assert law.event_shape == (2, 4, 4)
    assert law.log_prob(law.sample((2,))).shape == (2,)
    with pytest.raises(errors.ShapeError, match="events of another shape"):
        model.push(torch.randn(3, 32))
    with pytest.raises(errors.ShapeError, match="another shape than before"):
        objective(torch.randn(4, 2, 4, 5))


def test_bits_per_dimension_of_uniform_data_are_those_of_the_bins() -> None:
    """Under the standard normal, which a still flow leaves as it is: -log2 of the density times the bin, per dimension."""
    base = torch.distributions.Independent(torch.distributions.Normal(torch.zeros(3), torch.ones(3)), 1)
    model = InterpolantRegression(Interpolant(), velocity=lambda t, x: 0 * x, base=base).generator()
    x = torch.zeros(1, 3)
    expected = 0.5 * np.log2(2 * np.pi) + 8.0
    assert float(model.bits_per_dim(x, 1 / 256, num_steps=1)) == pytest.approx(expected, rel=1e-5)


def test_times_of_training_and_grids_of_sampling_are_arguments() -> None:
    seen: list[Tensor] = []

    def net(t: Tensor, x: Tensor) -> Tensor:
        seen.append(t)
        return 0 * x

    late = InterpolantRegression(Interpolant(), velocity=net, times=lambda n: 0.75 + 0.25 * torch.rand(n))
    late(X1)
    assert float(seen[-1].min()) >= 0.74
    grid = time_grid(6, shift=3.0)
    assert float(grid[1]) < 1 / 6
    model = late.generator()
    assert model.push(X1, ts=grid, trajectory=True).shape == (7, 40, 2)
    with pytest.raises(errors.TimeGridError, match="from 0 to 1"):
        model.push(X1, ts=[0.1, 1.0])
    with pytest.raises(errors.ShapeError, match="one time per point"):
        InterpolantRegression(Interpolant(), velocity=net, times=lambda n: torch.rand(n, 1))(X1)
    with pytest.raises(errors.TimeGridError):
        InterpolantRegression(Interpolant(), velocity=net, times=lambda n: 2 + torch.rand(n))(X1)


def test_score_diffusion_with_conditions_and_one_mean_per_item() -> None:
    """Restoration: the score sees the degraded item, and the process reverts to it."""
    torch.manual_seed(0)
    degraded = torch.randn(400, 1)
    clean = degraded + torch.where(torch.rand(400, 1) < 0.5, 2.0, -2.0)
    process = MeanReverting(0.0, spread=0.5)
    diff = ScoreMatching(process, score=FieldNetwork(1, condition_dim=1))
    sd.fit(
        diff, {"x1": clean, "condition": degraded, "mean": degraded}, steps=20, batch_size=100, progress=False
    )
    rev = diff.generator()
    where = torch.tensor([[100.0], [-100.0]])
    x = rev.sample(
        (500, 2), num_steps=5, mean=where.expand(500, 2, 1), condition=(0 * where).expand(500, 2, 1)
    )
    assert x.shape == (500, 2, 1)
    # starts are drawn around every item's own mean
    start = rev.start((4000,), 0, torch.full((4000, 1), 100.0))
    assert abs(float(start.mean()) - 100.0) < 5 * 0.5 / 4000**0.5
    assert bool(
        torch.isfinite(rev.log_prob(clean[:3], num_steps=5, condition=degraded[:3], mean=degraded[:3])).all()
    )
    assert rev.distribution(5, condition=degraded[:3]).sample().shape == (3, 1)
    assert rev.measure(condition=degraded[0]).sample(torch.linspace(0, 0.9, 4), 2).x.shape == (2, 4, 1)
    whole = MeanReverting(degraded)
    assert whole.perturb(torch.full((400, 1), 1.0), clean, 0 * clean).shape == (400, 1)
    with pytest.raises(errors.ShapeError, match="means of the process"):
        whole.center(clean[:3])
    for batch in ((clean, torch.arange(400) % 3), {"x1": clean, "condition": torch.arange(400) % 3}):
        assert bool(torch.isfinite(ScoreMatching(VP(), score=FieldNetwork(1, num_classes=3))(batch).loss))
    function = ScoreMatching(VP(), potential=lambda t, y, c: -(y - c).square().sum(-1), fp_weight=0.1)
    assert bool(torch.isfinite(function({"x1": clean, "condition": degraded}).loss))
