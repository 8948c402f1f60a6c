"""Populations: an unseen one goes where it should, for every order of its points, in any unit, and nothing crosses over."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn import errors
from stochdyn.datasets import GaussianDenoising
from stochdyn.interpolants import (
    FieldNetwork,
    GraphEncoder,
    KernelMeans,
    OwnUnits,
    PopulationRegression,
    Populations,
    SetEncoder,
    compare_populations,
    population_baselines,
    population_table,
    populations_from_anndata,
)

SIGMA = 0.5


def family(
    count: int, size: int, seed: int, scale: float = 1.0
) -> tuple[Populations, list[tuple[Tensor, Tensor]]]:
    """Random Gaussian populations with noise, to be carried to those without: paired points."""
    g = torch.Generator().manual_seed(seed)
    starts, targets, laws = [], [], []
    for _ in range(count):
        mean = 4 * torch.rand(2, generator=g) - 2
        turn = torch.linalg.qr(torch.randn(2, 2, generator=g))[0]
        root = turn * 0.2 * 10 ** torch.rand(2, generator=g)
        x1 = mean + torch.randn(size, 2, generator=g) @ root.mT
        starts.append(scale * (x1 + SIGMA * torch.randn(size, 2, generator=g)))
        targets.append(scale * x1)
        laws.append((mean, root @ root.mT))
    return Populations(starts, targets), laws


def exact_velocity(t: float, x: Tensor, law: tuple[Tensor, Tensor]) -> Tensor:
    r""":math:`v=-(1-t)\sigma^2(S+(1-t)^2\sigma^2)^{-1}(x-m)`."""
    mean, cov = law
    return (
        -(1 - t)
        * SIGMA**2
        * torch.linalg.solve(cov + (1 - t) ** 2 * SIGMA**2 * torch.eye(2), (x - mean).mT).mT
    )


def trained(scale: float = 1.0, steps: int = 500) -> PopulationRegression:
    data, _ = family(120, 150, 0, scale)
    torch.manual_seed(0)
    objective = PopulationRegression(2, SetEncoder(2), num_points=64)
    sd.fit(objective, data, steps=steps, batch_size=12, lr=3e-3, progress=False,
           scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, steps))  # fmt: skip
    return objective


def test_unseen_populations_go_where_they_should() -> None:
    """The error of the velocity on populations that were held out, against knowing nothing of the population."""
    model = trained().generator()
    unseen, laws = family(15, 400, 1)
    found, blind = [], []
    anyone = torch.cat([unseen.starts[i] for i in range(15)])
    for x0, x1, law in zip(unseen.starts, unseen.targets, laws, strict=True):
        for t in (0.1, 0.5, 0.8):
            x = torch.lerp(x0, x1, t)
            exact = exact_velocity(t, x, law)
            found.append((model.velocity(t, x, population=x0) - exact).detach().square().sum(-1).mean())
            blind.append((model.velocity(t, x, population=anyone) - exact).detach().square().sum(-1).mean())
    assert float(torch.stack(found).mean()) < 0.5 * float(torch.stack(blind).mean())
    x0 = unseen.starts[0]
    torch.testing.assert_close(model.sample(x0.flip(0)), model.sample(x0).flip(0), rtol=0, atol=1e-4)
    assert model.sample(x0, 5, trajectory=True).shape == (6, 400, 2)
    predicted = [model.sample(x) for x in unseen.starts]
    better, identity = (
        compare_populations(predicted, unseen.targets),
        compare_populations(unseen.starts, unseen.targets),
    )
    assert float(better.excess.mean) < 0.6 * float(identity.excess.mean)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
def test_units_of_the_data(scale: float) -> None:
    plain, other = trained(steps=8).generator(), trained(scale, 8).generator()
    x0 = family(1, 50, 3)[0].starts[0]
    torch.testing.assert_close(other.sample(scale * x0) / scale, plain.sample(x0), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("coupling", ["paired", "independent", "ot"])
def test_no_pair_crosses_populations(coupling: str) -> None:
    """Populations far apart: every pair of a step is of one of them."""
    torch.manual_seed(0)
    shift = 1000.0 * torch.arange(8)[:, None, None]
    starts, targets = (list(torch.randn(8, 20, 2) + shift) for _ in range(2))
    objective = PopulationRegression(2, SetEncoder(2), coupling, num_points=16)
    batch = torch.utils.data.default_collate([Populations(starts, targets)[i] for i in range(8)])
    a, b = objective._draw(batch["x0"], batch["x1"], batch["count0"], batch["count1"])
    assert float((a - b).abs().max()) < 100
    rows = ((starts[0][:, None] == a[0]).all(-1)).float().argmax(0)
    if coupling == "paired":
        assert torch.equal(targets[0][rows], b[0])
    if coupling == "ot":
        assert float((a - b).square().sum(-1).mean()) < float((a - b.roll(1, 1)).square().sum(-1).mean())


def test_embedding_depends_on_the_empirical_law_alone() -> None:
    torch.manual_seed(0)
    encoder, x = SetEncoder(3, out=5), torch.randn(4, 20, 3)
    torch.testing.assert_close(encoder(x.repeat(1, 3, 1)), encoder(x), rtol=0, atol=1e-6)
    with pytest.raises(errors.InvalidInputError, match="a point with a weight"):
        encoder(x, torch.zeros(4, 20))


def test_treatments_ragged_samples_and_storage(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    sizes = (30, 50, 20, 40)
    starts = [torch.randn(n, 2, generator=g).tolist() for n in sizes]
    targets = [torch.randn(n + 5, 2, generator=g).numpy() for n in sizes]
    data = Populations(starts, targets, treatments=torch.eye(4)[:, :3])
    torch.manual_seed(0)
    objective = PopulationRegression(2, SetEncoder(2), "independent", treatment_dim=3, num_points=10)
    sd.fit(objective, data, steps=4, batch_size=2, progress=False, checkpoint=tmp_path / "run")
    model = objective.generator()
    x0, dose = torch.randn(9, 2, generator=g), [1.0, 0.0, 0.0]
    drawn = model.sample(x0, 4, treatment=dose)
    sd.save(model, tmp_path / "model")
    assert torch.equal(sd.load(tmp_path / "model").sample(x0, 4, treatment=dose), drawn)
    assert torch.equal(copy.deepcopy(model).sample(x0, 4, treatment=dose), drawn)
    again = PopulationRegression(2, SetEncoder(2), "independent", treatment_dim=3, num_points=10)
    sd.fit(again, data, steps=4, batch_size=2, progress=False, checkpoint=tmp_path / "run", resume=True)
    assert torch.equal(again.generator().sample(x0, 4, treatment=dose), drawn)
    assert model.double().sample(x0.double(), 4, treatment=dose).dtype == torch.float64
    train, held = data.split(0.25, seed=1)
    assert (len(train), len(held)) == (3, 1)
    with pytest.raises(errors.InvalidInputError, match="trained with treatments"):
        model.sample(x0)


def test_subjects_stay_together() -> None:
    """Ten patients under three treatments: held out are all populations of a patient, or none; their names come along."""
    owners = [f"patient {i // 3}" for i in range(30)]
    data = Populations(
        [torch.full((4, 1), float(i)) for i in range(30)],
        [torch.ones(4, 1)] * 30,
        torch.eye(3).repeat(10, 1),
        owners,
    )
    for seed in range(5):
        train, held = data.split(0.2, seed)
        assert (len(train), len(held)) == (24, 6)
        assert not set(train.subjects or []) & set(held.subjects or [])
        for part in (train, held):
            assert [owners[int(x[0])] for x in part.starts] == part.subjects
            assert part.treatments is not None
            rows = [int(x[0]) % 3 for x in part.starts]
            assert torch.equal(part.treatments, torch.eye(3)[rows])
    with pytest.raises(errors.InvalidInputError, match="1 subjects"):
        Populations([torch.ones(2, 1)] * 2, [torch.ones(2, 1)] * 2, subjects=["a", "a"]).split()
    with pytest.raises(errors.ShapeError, match="one subject per population"):
        Populations([torch.ones(2, 1)], [torch.ones(2, 1)], subjects=[1, 2])


def test_comparison_has_a_floor() -> None:
    g = torch.Generator().manual_seed(0)
    target = [torch.randn(300, 2, generator=g) for _ in range(12)]
    same = compare_populations([torch.randn(300, 2, generator=g) for _ in range(12)], target)
    assert abs(float(same.excess.mean)) < 4 * float(same.excess.stderr)
    off = compare_populations([x + 1.0 for x in target], target)
    assert float(off.excess.mean) > 1.0
    assert "floor" in str(off)


def test_bad_input() -> None:
    x = torch.randn(5, 2)
    for call, error, message in (
        (lambda: Populations([x], [x, x]), errors.ShapeError, "one target per start"),
        (lambda: Populations([], []), errors.EmptyDataError, "starts"),
        (lambda: Populations([x[:0]], [x]), errors.EmptyDataError, r"starts\[0\]"),
        (lambda: Populations([x * float("nan")], [x]), errors.NonFiniteError, r"starts\[0\]"),
        (lambda: Populations([x], [x[:, :1]]), errors.ShapeError, r"targets\[0\]"),
        (lambda: Populations([x], [x], torch.ones(2, 1)), errors.ShapeError, "one treatment per population"),
        (lambda: PopulationRegression(2, SetEncoder(3)), errors.ShapeError, "another dimension"),
        (lambda: PopulationRegression(2, SetEncoder(2), "optimal"), errors.InvalidInputError, "coupling"),
        (lambda: PopulationRegression(2, SetEncoder(2))(x), errors.InvalidInputError, "one of Populations"),
        (
            lambda: PopulationRegression(2, SetEncoder(2))(Populations([x], [x[:3]])),
            errors.ShapeError,
            "paired samples",
        ),
        (
            lambda: PopulationRegression(2, SetEncoder(2)).generator().sample(x * float("nan")),
            errors.NonFiniteError,
            "x0",
        ),
        (lambda: compare_populations([x], [x, x]), errors.ShapeError, "one prediction per target"),
        (lambda: SetEncoder(0), errors.InvalidInputError, "dim"),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize("make", [SetEncoder, GraphEncoder])
def test_encoders_read_samples_of_any_size(make: Any) -> None:
    """Padding, order and repetition of a call change nothing; one point has no neighbour and is a sample all the same."""
    torch.manual_seed(0)
    encoder, x = make(3, out=5), torch.randn(4, 20, 3)
    code = encoder(x)
    torch.testing.assert_close(encoder(x[:, torch.randperm(20)]), code, rtol=0, atol=1e-6)
    padded = torch.cat([x, torch.full((4, 7, 3), float("nan"))], 1)
    weights = torch.cat([torch.ones(4, 20), torch.zeros(4, 7)], 1)
    torch.testing.assert_close(encoder(padded, weights), code, rtol=0, atol=1e-6)
    assert encoder(x[:, :1]).shape == (4, 5)
    assert not torch.allclose(encoder(2 * x), code, atol=1e-3)


def test_graph_encoder_sees_what_lies_around_a_point() -> None:
    """Populations with the same moments, half of them made of near pairs: neighbours tell them apart, moments don't."""
    g = torch.Generator().manual_seed(0)

    def batch(count: int) -> tuple[Tensor, Tensor]:
        label = torch.arange(count) % 2
        x = torch.randn(count, 40, 2, generator=g)
        twins = x[:, :20] + 0.02 * torch.randn(count, 20, 2, generator=g)
        return torch.where(label[:, None, None] == 1, torch.cat([x[:, :20], twins], 1), x), label

    shares = []
    for encoder in (GraphEncoder(2, 2, 16, num_neighbors=1), SetEncoder(2, 2, 16)):
        torch.manual_seed(0)
        optimizer = torch.optim.Adam(encoder.parameters(), 1e-2)
        for _ in range(150):
            x, label = batch(32)
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(encoder(x), label).backward()
            optimizer.step()
        x, label = batch(400)
        shares.append(float((encoder(x).argmax(-1) == label).double().mean()))
    assert shares[0] > 0.95
    assert shares[1] < 0.7


def test_kernel_means_are_scores_of_the_sample() -> None:
    """The way to the mean is h² times the slope of the log density; order, place and pieces of the work change nothing."""
    torch.manual_seed(0)
    means = KernelMeans(2, num_scales=3).double()
    x, sample = torch.randn(3, 7, 2, dtype=torch.float64), torch.randn(3, 40, 2, dtype=torch.float64)
    found = means(x, sample).unflatten(-1, (3, 3))
    for k, width in enumerate(means.log_widths.detach().exp()):
        y = x.clone().requires_grad_()
        kernels = -0.5 * ((y.unsqueeze(-2) - sample.unsqueeze(-3)) / width).square().sum(-1)
        log_density = kernels.logsumexp(-1) - math.log(40)
        (score,) = torch.autograd.grad(log_density.sum(), y)
        shift = width**2 * score
        wanted = shift / (width**2 + shift.square().sum(-1, keepdim=True)).sqrt()
        torch.testing.assert_close(found[..., k, :2], wanted)
        torch.testing.assert_close(found[..., k, 2], (log_density / 4).tanh())
    torch.testing.assert_close(means(x, sample[:, torch.randperm(40)]), means(x, sample))
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr("stochdyn.interpolants.populations.around._ENTRIES", 3 * 40 * 2)
        torch.testing.assert_close(means(x, sample), found.flatten(-2))
    single = KernelMeans(2, num_scales=3)
    far = single(x.float() + 1e3, sample.float() + 1e3)
    torch.testing.assert_close(far, single(x.float(), sample.float()), rtol=0, atol=2e-2)
    assert bool(single(1e4 * x.float(), sample.float()).isfinite().all())
    for call, message in (
        (lambda: means(x[..., :1], sample), "x"),
        (lambda: means(x, sample[..., :1]), "population"),
        (lambda: PopulationRegression(3, None, around=KernelMeans(2)), "around is of another dimension"),
    ):
        with pytest.raises(errors.ShapeError, match=message):
            call()


def test_what_lies_around_a_point_helps_where_no_population_was_alike(tmp_path: Path) -> None:
    """Noise is taken off clusters of one place each; then off a population of two places, which is like none of them."""
    g = torch.Generator().manual_seed(0)
    clean = [4 * torch.rand(1, generator=g) - 2 + 0.05 * torch.randn(80, 1, generator=g) for _ in range(60)]
    data = Populations([x + 0.4 * torch.randn(80, 1, generator=g) for x in clean], clean)
    target = torch.cat([torch.full((200, 1), -1.2), torch.full((200, 1), 1.2)])
    start = target + 0.4 * torch.randn(400, 1, generator=g)
    left = []
    for around in (None, KernelMeans(1, num_scales=3)):
        torch.manual_seed(0)
        size = 8 + (0 if around is None else around.out)
        objective = PopulationRegression(
            1,
            SetEncoder(1, 8, 16),
            around=around,
            velocity=FieldNetwork(1, 32, 2, condition_dim=size),
            num_points=48,
        )
        sd.fit(objective, data, steps=200, batch_size=8, lr=5e-3, progress=False,
               scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 200))  # fmt: skip
        model = objective.generator()
        carried = model.sample(start, 20)
        left.append(float(sd.diagnostics.emd(carried, target, 1)))
    assert left[1] < 0.6 * left[0]
    sd.save(model, tmp_path / "model")
    assert torch.equal(sd.load(tmp_path / "model").sample(start, 20), carried)
    torch.testing.assert_close(model.sample(start[:5], 20, population=start), carried[:5], rtol=0, atol=1e-4)
    own = PopulationRegression(1, None, around=KernelMeans(1), coupling="independent", num_points=8)
    assert bool(torch.isfinite(own(data).loss))


def test_blind_flow_knows_no_population() -> None:
    data, _ = family(4, 60, 0)
    torch.manual_seed(0)
    objective = PopulationRegression(2, None, num_points=20)
    sd.fit(objective, data, steps=3, batch_size=2, progress=False)
    model = objective.generator()
    x0 = torch.randn(5, 2)
    torch.testing.assert_close(model.sample(x0, 4), model.sample(x0, 4, population=x0 + 3.0), rtol=0, atol=0)
    assert model.embed(x0) is None
    treated = PopulationRegression(2, None, treatment_dim=2)
    assert treated.generator().sample(x0, 2, treatment=[1.0, 0.0]).shape == (5, 2)


def test_baselines_are_what_they_say() -> None:
    g = torch.Generator().manual_seed(0)
    starts = [torch.randn(200, 2, generator=g) * s + m for s, m in ((1.0, 0.0), (1.0, 5.0), (3.0, 5.0))]
    treatments = torch.tensor([[0.0], [1.0], [1.0]])
    data = Populations(starts, [x + d for x, d in zip(starts, (1.0, 2.0, 4.0), strict=True)], treatments)
    x0 = torch.randn(50, 2, generator=g) * 3.0 + 5.0
    found = population_baselines(data, x0, [1.0])
    assert torch.equal(found["identity"], x0)
    torch.testing.assert_close(found["mean shift"], x0 + 3.0, rtol=0, atol=1e-4)
    assert torch.equal(found["nearest"], data.targets[2])
    for call, error in (
        (lambda: population_baselines(data, x0), errors.InvalidInputError),
        (lambda: population_baselines(data, x0, [7.0]), errors.EmptyDataError),
        (lambda: population_baselines(data, x0[:, :1], [1.0]), errors.ShapeError),
        (lambda: population_baselines(Populations(starts, starts), x0, [1.0]), errors.InvalidInputError),
    ):
        with pytest.raises(error):
            call()


@pytest.mark.parametrize("metric", ["w1", "w2", "mmd"])
def test_every_distance_has_its_floor(metric: str) -> None:
    """A perfect prediction has no excess, and the discrepancy without bias is zero in the mean; a shift is found."""
    g = torch.Generator().manual_seed(1)
    target = [torch.randn(200, 2, generator=g) for _ in range(20)]
    same = compare_populations([torch.randn(200, 2, generator=g) for _ in range(20)], target, metric)
    assert abs(float(same.excess.mean)) < 4.5 * float(same.excess.stderr)
    if metric == "mmd":
        assert abs(float(same.distance.mean)) < 4.5 * float(same.distance.stderr)
    off = compare_populations([x + 1.0 for x in target], target, metric)
    assert float(off.excess.mean) > 10 * float(same.excess.stderr)
    low, high = off.interval()
    assert low < float(off.excess.mean) < high
    width = (high - low) / (2 * 1.645 * float(off.excess.stderr))
    assert 0.7 < width < 1.3
    gain = same.minus(off)
    assert float(gain.mean) < -10 * float(gain.stderr)
    with pytest.raises(errors.ShapeError, match="same populations"):
        same.minus(compare_populations(target[:3], target[:3], metric))


def test_own_units_are_the_score_of_the_gaussian_law_and_follow_the_population() -> None:
    g = torch.Generator().manual_seed(0)
    root = torch.tensor([[1.5, 0.0], [0.7, 0.3]], dtype=torch.float64)
    population = torch.randn(20_000, 2, generator=g, dtype=torch.float64) @ root.mT + 4.0
    x = torch.randn(7, 2, generator=g, dtype=torch.float64) + 4.0
    features = OwnUnits(2)(x, population)
    law = torch.distributions.MultivariateNormal(torch.full((2,), 4.0, dtype=torch.float64), scale_tril=root)
    at = x.clone().requires_grad_()
    (score,) = torch.autograd.grad(law.log_prob(at).sum(), at)
    # moments of 20 000 points are within a few per cent, and the ridge takes one per cent of the narrow direction
    torch.testing.assert_close(features[:, 2:], score, rtol=0.1, atol=0.1 * float(score.abs().max()))
    moved = OwnUnits(2)(x + 9.0, population + 9.0)
    torch.testing.assert_close(moved, features)
    # one point many times, and one alone
    for flat in (torch.ones(5, 2), torch.ones(1, 2)):
        assert bool(OwnUnits(2)(torch.randn(3, 2), flat).isfinite().all())
    with pytest.raises(errors.ShapeError):
        OwnUnits(2)(torch.zeros(3, 2), torch.zeros(4, 3))
    objective = PopulationRegression(2, SetEncoder(2), around=OwnUnits(2), num_points=8)
    batch = Populations([torch.randn(20, 2)] * 2, [torch.randn(20, 2)] * 2)
    assert bool(objective(batch).loss.isfinite())


def test_one_table_has_models_and_baselines_on_the_same_halves() -> None:
    g = torch.Generator().manual_seed(0)
    starts = [torch.randn(80, 2, generator=g) * (1 + i % 3) + i for i in range(10)]
    train, test = (Populations(starts[s], [2 * x for x in starts[s]]) for s in (slice(6), slice(6, 10)))
    table = population_table({"double": lambda x: 2 * x, "worse": lambda x: 2 * x + 3}, train, test)
    assert list(table.comparisons) == ["double", "worse", "identity", "mean shift", "nearest"]
    again = compare_populations(table.predicted["mean shift"], test.targets)
    assert torch.equal(table.comparisons["mean shift"].distances, again.distances)
    assert table.best == "double"
    assert all(float(gap.mean) > 3 * float(gap.stderr) for gap in table.against("double").values())
    lines = str(table).splitlines()
    assert len(lines) == 6
    assert lines[1].startswith("double")
    assert "±" in lines[2].split("  ")[-1]


def test_a_table_gives_models_the_treatment_and_refuses_what_it_cannot_name() -> None:
    x, c = [torch.randn(20, 2) for _ in range(4)], torch.tensor([[0.0], [1.0], [0.0], [1.0]])
    data, seen = Populations(x, x, c), []

    def model(x0: Tensor, treatment: Tensor) -> Tensor:
        seen.append(float(treatment))
        return x0

    population_table({"model": model}, data, data)
    assert seen == [0.0, 1.0, 0.0, 1.0]
    for call, error in (
        (lambda: population_table({}, data, data), errors.EmptyDataError),
        (lambda: population_table({"identity": model}, data, data), errors.InvalidInputError),
        (lambda: population_table({"model": 3}, data, data), errors.InvalidInputError),
        (lambda: population_table({"model": model}, data, Populations(x, x)), errors.InvalidInputError),
        (lambda: population_table({"model": model}, data, data).against("nobody"), errors.InvalidInputError),
    ):
        with pytest.raises(error):
            call()


def test_targets_are_not_asked_for(tmp_path: Path) -> None:
    """A new population needs its starts alone; another process makes the same of them."""
    data, _ = family(6, 80, 0)
    torch.manual_seed(0)
    objective = PopulationRegression(2, GraphEncoder(2, 8, 16), num_points=20)
    sd.fit(objective, data, steps=5, batch_size=3, progress=False)
    model = objective.generator()
    x0 = torch.randn(30, 2, generator=torch.Generator().manual_seed(3))
    sd.save(model, tmp_path / "model")
    torch.save(x0, tmp_path / "x0.pt")
    code = (
        "import sys, torch, stochdyn as sd\n"
        "model, x0 = sd.load(sys.argv[1] + '/model'), torch.load(sys.argv[1] + '/x0.pt')\n"
        "torch.save(model.sample(x0, 5), sys.argv[1] + '/out.pt')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=300)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), model.sample(x0, 5), rtol=0, atol=1e-6)


def test_turned_populations_are_carried_to_their_own_targets() -> None:
    """The rotated family, for which the best blind field leaves a transport distance of 0.237."""
    g = torch.Generator().manual_seed(0)

    def law(angle: float) -> GaussianDenoising:
        turn = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        return GaussianDenoising([0.0, 0.0], turn @ torch.diag(torch.tensor([1.0, 0.05])) @ turn.mT)

    pairs = [law(math.pi * float(torch.rand((), generator=g))).sample(200, g) for _ in range(100)]
    torch.manual_seed(0)
    objective = PopulationRegression(2, SetEncoder(2), num_points=64)
    data = Populations([a for a, _ in pairs], [b for _, b in pairs])
    sd.fit(objective, data, steps=400, batch_size=16, lr=3e-3, progress=False,
           scheduler=lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 400))  # fmt: skip
    model = objective.generator()
    for angle in (0.0, 0.7, 1.9):
        own = law(angle)
        x = model.sample(own.sample(2000, g)[0], 20).double()
        values, vectors = torch.linalg.eigh(own.cov)
        root = vectors @ torch.diag(values.sqrt()) @ vectors.mT
        cov = torch.cov(x.mT)
        cross = torch.linalg.eigvalsh(root @ cov @ root).clamp(min=0).sqrt().sum()
        w2 = float((x.mean(0).square().sum() + cov.trace() + own.cov.trace() - 2 * cross).clamp(min=0).sqrt())
        assert w2 < 0.06, (angle, w2)


def test_cells_of_samples_and_treatments() -> None:
    """Every sample's untreated cells go with its own treated ones; a sample that lacks either is left out."""

    class Cells:
        obs = {  # noqa: RUF012
            "sample": np.array(["b"] * 6 + ["a"] * 6 + ["c"] * 2),
            "treatment": np.array(["none", "x", "y", "none", "x", "y"] * 2 + ["x", "y"]),
        }
        obsm = {"X_pca": np.arange(28.0).reshape(14, 2)}  # noqa: RUF012

    found = populations_from_anndata(Cells(), "none")
    assert found.samples == ["a", "a", "b", "b"]
    assert found.treatments == ["x", "y", "x", "y"]
    assert found.data.subjects == found.samples
    assert found.data.starts[0][:, 0].tolist() == [12.0, 18.0]
    assert found.data.targets[1][:, 0].tolist() == [16.0, 22.0]
    assert torch.equal(found.data.treatments[1], found.codes["y"])
    assert populations_from_anndata(Cells(), "none", num_components=1).data.dim == 1
    frame = pd.DataFrame(Cells.obs, index=[f"cell {i}" for i in range(14)])
    anndata = pytest.importorskip("anndata")
    same = populations_from_anndata(anndata.AnnData(obs=frame, obsm=Cells.obsm), "none")
    assert all(torch.equal(a, b) for a, b in zip(same.data.starts, found.data.starts, strict=True))
    for call, message in (
        (lambda: populations_from_anndata(Cells(), "nothing"), "untreated"),
        (lambda: populations_from_anndata(Cells(), "none", "patient"), "sample_key"),
        (lambda: populations_from_anndata(Cells(), "none", representation="X"), "representation"),
        (lambda: populations_from_anndata(3, "none"), "sample_key"),
    ):
        with pytest.raises(errors.InvalidInputError, match=message):
            call()
    lonely = type(
        "Lonely", (), {"obs": {k: v[-2:] for k, v in Cells.obs.items()}, "obsm": {"X_pca": np.ones((2, 2))}}
    )
    with pytest.raises(errors.EmptyDataError, match="no sample"):
        populations_from_anndata(lonely(), "x", treatment_key="treatment", sample_key="treatment")
