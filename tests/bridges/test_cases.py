"""Faults that practitioners met, as small programs: one test per kind, over everything that it applies to."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from stochdyn.bridges import (
    IPF,
    Adam,
    BridgeMatching,
    BridgeProfile,
    FeatureDrift,
    GaussNewton,
    GrowingBridge,
    IPFBridge,
    LeastSquares,
    LinearDrift,
    LinearResponse,
    NeuralDrift,
    PartialBridge,
    PartialGaussianBridge,
    SchrodingerBridge,
    Sinkhorn,
    Snapshots,
    fit_profile,
    momentum,
    refine,
)
from stochdyn.errors import ApproximationWarning, ForeignCheckpointError, StochdynError, UnavailableError

F64 = torch.float64


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def branches(counts: list[tuple[int, int]], spread: float = 0.2, apart: float = 2.0) -> Snapshots:
    g = gen(0)

    def cloud(n: int, centre: float) -> Tensor:
        return torch.randn(n, 1, generator=g, dtype=F64) * spread + centre

    clouds = [torch.cat((cloud(a, -apart), cloud(b, apart))) for a, b in counts]
    return Snapshots([float(k) for k in range(len(counts))], clouds)


# ------------------------------------------------------------------------------------------- one law per object
@pytest.mark.parametrize("kind", ["relaxed", "growing", "growing by half"])
def test_growth_is_in_the_paths_and_in_the_marginals(kind: str) -> None:
    snaps = branches([(100, 100), (40, 160), (20, 180)])
    law = {
        "relaxed": lambda: SchrodingerBridge(snaps, diffusion=0.5, relaxation=0.5),
        "growing": lambda: GrowingBridge(snaps, diffusion=0.5),
        "growing by half": lambda: GrowingBridge(snaps, 0.5, diffusion=0.5),
    }[kind]().solve()
    ts = torch.tensor([0.0, 0.5, 0.99, 1.0, 1.01, 1.5, 2.0], dtype=F64)
    n = 10_000
    drawn = (law.sample(ts, n, 1).x[..., 0] > 0).double().mean(0)
    said = torch.stack([(law.marginal(t).sample(n, 2)[:, 0] > 0).double().mean() for t in ts])
    assert (drawn - said).abs().max() < 5 * (0.5 / n) ** 0.5
    assert said.diff()[2:4].abs().max() < 0.03  # no jump at a snapshot
    assert (drawn[[0, 3, 6]] - torch.tensor([0.5, 0.8, 0.9])).abs().max() < 5 * 0.5 / n**0.5


def test_a_relaxed_fit_has_a_relaxed_posterior() -> None:
    snaps = branches([(20, 20), (12, 28), (6, 34)], 0.3, 1.0)
    for relaxation, corrections in ((None, 0), (0.3, 0), (0.3, 4)):
        method = Sinkhorn(relaxation=relaxation, corrections=corrections)
        fit = refine(snaps, LinearDrift(1), 0.5, dt=0.1, max_iterations=30, tolerance=1e-3, method=method)
        response = LinearResponse(fit)
        same = response([w[None] for w in snaps.weights])[0]
        assert (same - response.converged).abs().max() < 0.01


# ------------------------------------------------------------------------------------------------------- units
UNITS = [(1 / 3600, 1.0), (1e3, 1.0), (1.0, 100.0), (1e12, 1e-12), (1e-12, 1e12)]


@pytest.mark.parametrize(("time", "length"), UNITS)
def test_partial_bridges_do_not_depend_on_units(time: float, length: float) -> None:
    clouds = [torch.randn(15, 1, generator=gen(i)).double() * 0.3 + m for i, m in enumerate((0, 1, 0, -1))]

    def means(time: float, length: float) -> tuple[Tensor, Tensor]:
        matrix, noise = momentum(1, friction=0.3 / time, diffusion=length / time**1.5)
        times = [t * time for t in (0.0, 1.0, 2.0, 3.0)]
        wanted = time * torch.tensor([0.5, 1.5, 2.5], dtype=F64)
        law = PartialBridge(Snapshots(times, [length * x for x in clouds]), matrix, noise, num_hidden=8)
        exact = PartialGaussianBridge(
            torch.tensor(times, dtype=F64), torch.stack([length * x.mean(0) for x in clouds]),
            torch.stack([length**2 * x.var(0)[None] for x in clouds]), torch.eye(1, 2, dtype=F64), matrix, noise,
        )  # fmt: skip
        return law.sample(wanted, 500, 1).x[:, :, 0].mean(0) / length, exact.mean(wanted)[:, 0] / length

    for one, other in zip(means(1.0, 1.0), means(time, length), strict=True):
        torch.testing.assert_close(one, other, atol=0.02, rtol=0)


@pytest.mark.parametrize(("time", "length"), UNITS)
@pytest.mark.parametrize("kind", ["sinkhorn", "function", "relaxed", "learnt", "matrix", "ipf"])
def test_refinements_do_not_depend_on_units(time: float, length: float, kind: str) -> None:
    clouds = [torch.randn(12, 1, generator=gen(i)).double() * 0.3 + 2 * math.exp(-0.8 * i) for i in range(3)]

    def drift(t: Tensor, x: Tensor, rate: float = 0.5, level: float = 0.1) -> Tensor:
        return -rate * x / time + level * length / time

    def fitted(time: float, length: float, drift: object) -> Tensor:
        snaps = Snapshots([0.0, time, 2 * time], [length * x for x in clouds])
        more = {
            "relaxed": {"method": Sinkhorn(relaxation=1.0)}, "learnt": {"learn_diffusion": True},
            "matrix": {"learn_diffusion": "matrix"}, "ipf": {"method": IPF(max_iterations=1), "dt": 0.2 * time},
        }.get(kind, {})  # fmt: skip
        family = drift if kind == "function" else LinearDrift(1)
        fit = refine(snaps, family, 0.5 * length / time**0.5, max_iterations=3, **more)
        if kind == "function":
            return torch.stack([fit.parameters["rate"], fit.parameters["level"]])
        return torch.stack(
            [time * fit.parameters["matrix"][0, 0], time / length * fit.parameters["shift"][0]]
        )

    def plain(t: Tensor, x: Tensor, rate: float = 0.5, level: float = 0.1) -> Tensor:
        return -rate * x + level

    torch.testing.assert_close(fitted(1.0, 1.0, plain), fitted(time, length, drift), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("time", "length"), UNITS)
@pytest.mark.parametrize("kind", ["default", "growing", "nonlinear", "network"])
def test_laws_of_snapshots_do_not_depend_on_units(time: float, length: float, kind: str) -> None:
    clouds = [torch.randn(10, 2, generator=gen(i)).double() * 0.3 + i for i in range(3)]

    def mean(time: float, length: float) -> Tensor:
        snaps = Snapshots([0.0, time, 2 * time], [length * x for x in clouds])
        noise = 0.5 * length / time**0.5
        if kind == "default":
            law = SchrodingerBridge(snaps).solve()
        elif kind == "growing":
            law = GrowingBridge(snaps, diffusion=noise).solve()
        elif kind == "nonlinear":
            law = SchrodingerBridge(snaps, lambda t, x: -x * (x / length).square() / time, noise).solve()
        else:
            torch.manual_seed(0)
            family = NeuralDrift.for_snapshots(snaps, 8)
            family.reset(gen(3))
            law = SchrodingerBridge(snaps, family, noise).solve()
        x = length * torch.tensor([[0.3, 0.8]], dtype=F64)
        moments = law.marginal(0.7 * time)
        return torch.cat(
            (
                moments.mean / length,
                moments.covariance.flatten() / length**2,
                (time / length) * law.velocity(0.7 * time, x)[0],
            )
        )

    torch.testing.assert_close(mean(1.0, 1.0), mean(time, length), atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------- company and order
def test_the_order_of_particles_and_their_repetition_change_nothing() -> None:
    x, y = (torch.randn(n, 2, generator=gen(n), dtype=F64) for n in (12, 15))
    one = refine(Snapshots([0.0, 1.0], [x, y]), LinearDrift(2), 0.7, max_iterations=2)
    turned = Snapshots([0.0, 1.0], [x[torch.randperm(12, generator=gen(0))], y.flip(0)])
    twice = Snapshots([0.0, 1.0], [torch.cat((x, x)), torch.cat((y, y))])
    for other in (turned, twice):
        found = refine(other, LinearDrift(2), 0.7, max_iterations=2)
        torch.testing.assert_close(one.parameters["matrix"], found.parameters["matrix"], atol=1e-5, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------- velocity
@pytest.mark.parametrize("kind", ["brownian", "relaxed", "growing", "matching", "ipf"])
def test_cells_have_velocities_at_every_day(kind: str) -> None:
    g = gen(0)
    clouds = [torch.randn(60, 2, generator=g).double() * 0.3 + 2.0 * k for k in range(3)]
    snaps = Snapshots([0.0, 1.0, 2.0], clouds)
    law = {
        "brownian": lambda: SchrodingerBridge(snaps, diffusion=0.5).solve(),
        "relaxed": lambda: SchrodingerBridge(snaps, diffusion=0.5, relaxation=100.0).solve(),
        "growing": lambda: GrowingBridge(snaps, diffusion=0.5).solve(),
        "matching": lambda: BridgeMatching(snaps, 0.5, width=0, num_pairs=500, refresh=20).solve(
            400, progress=False
        ),
        "ipf": lambda: IPFBridge(snaps, None, 0.5, dt=0.25, max_iterations=2).solve(),
    }[kind]()
    for t, cloud in zip((0.0, 1.0, 2.0), clouds, strict=True):
        assert (law.velocity(t, cloud).mean(0) - 2).abs().max() < 0.5
    middle = law.velocity(0.5, clouds[0] + 1.0).mean(0)
    assert (middle - 2).abs().max() < 0.5


# ------------------------------------------------------------------------------------------ Monte Carlo and stop
def test_few_nodes_neither_move_the_answer_nor_stop_the_loop() -> None:
    g = gen(1)
    decay = [math.exp(-0.8 * t) for t in (0.0, 1.0, 2.0)]
    clouds = [
        2 * c + (0.04 * c**2 + 0.25 * (1 - c**2) / 1.6) ** 0.5 * torch.randn(40, 1, generator=g).double()
        for c in decay
    ]
    snaps = Snapshots([0.0, 1.0, 2.0], clouds)
    exact = refine(snaps, LinearDrift(1), diffusion=0.5)
    for seed in range(3):
        fit = refine(snaps, LinearDrift(1), diffusion=0.5, seed=seed, method=Sinkhorn(num_nodes=5_000))
        assert (fit.parameters["matrix"] - exact.parameters["matrix"]).abs() < 0.05
        assert fit.history.stopped == "the parameters stand still"


def test_a_noisy_projection_says_so() -> None:
    snaps = Snapshots([0.0, 1.0], [torch.randn(300, 2, generator=gen(i)).double() + i for i in range(2)])
    with pytest.warns(ApproximationWarning, match="num_nodes"):
        refine(snaps, LinearDrift(2), 1.0, max_iterations=1, method=Sinkhorn(num_nodes=300))


def test_it_stops_where_the_parameters_stand_still() -> None:
    snaps = branches([(20, 20), (15, 25), (12, 28)], 0.3, 1.0)
    found = [refine(snaps, LinearDrift(1), 0.7, max_iterations=60, tolerance=t) for t in (1e-1, 1e-4)]
    assert all(fit.history.stopped == "the parameters stand still" for fit in found)
    assert len(found[0].history) <= len(found[1].history)
    response = LinearResponse(found[1])
    error = torch.linalg.inv(40 * response.observed).diagonal().sqrt()
    gap = (found[0].family.weight - found[1].family.weight).detach().flatten()
    assert bool((gap.abs() < 0.5 * error).all())


# --------------------------------------------------------------------------------------------------- identified
@pytest.mark.parametrize("alike", [True, False])
def test_one_particle_identifies_nothing_and_that_is_said(alike: bool) -> None:
    clouds = [torch.full((5 if alike else 1, 1), float(m), dtype=F64) for m in (0.0, 1.0, 0.5)]
    with pytest.warns(ApproximationWarning, match="2 parameters are to be told from 2 different numbers"):
        refine(Snapshots([0.0, 1.0, 2.0], clouds), LinearDrift(1), 1.0)


# ------------------------------------------------------------------------------------------------ near-disconnected
def test_couplings_survive_outliers_and_name_them() -> None:
    g = gen(0)
    clouds = [0.3 * torch.randn(n, 10, generator=g, dtype=F64) + 0.5 * k for k, n in enumerate((300, 240))]
    for cloud, n in zip(clouds, (3, 2), strict=True):
        cloud[:n] += 8 * torch.randn(n, 10, generator=g, dtype=F64)
    law = SchrodingerBridge(Snapshots([0.0, 1.0], clouds), diffusion=0.4).solve()
    assert law.converged
    assert [own.tolist() for own in law.outliers()] == [[0, 1, 2], [0, 1]]


# ---------------------------------------------------------------------------------------------------------- growth
def test_growth_is_an_estimate_and_counts_the_whole() -> None:
    times = [0.0, 1.0, 2.0, 3.0]
    moving = [
        torch.randn(100, 2, generator=gen(i)).double() * 0.5 + torch.tensor([t, 0.0])
        for i, t in enumerate(times)
    ]
    law = GrowingBridge(Snapshots(times, moving), diffusion=0.3).solve()
    rate = torch.cat([law.growth_rate(t, x) for t, x in zip(times, moving, strict=True)])
    assert rate.std() < 0.3  # nobody is born
    weights = [torch.full((100,), 2.0**k / 100) for k in range(4)]
    law = GrowingBridge(Snapshots(times, moving, weights), diffusion=0.3).solve()
    for t, x in zip(times[1:-1], moving[1:-1], strict=True):
        assert abs(float(law.growth_rate(t, x).mean()) - math.log(2)) < 0.1
    logit = [torch.sigmoid(torch.tensor(t - 1.5)) for t in times]
    still = branches([(round(200 * float(1 - p)), round(200 * float(p))) for p in logit])
    law = GrowingBridge(still, diffusion=0.3).solve()
    ends = law.growth_rate(1.5, torch.tensor([[-2.0], [2.0]], dtype=F64))
    assert abs(float(ends[1] - ends[0]) - 1) < 0.25  # odds grow by one nat per unit of time


# --------------------------------------------------------------------------------------------------------- methods
def small() -> Snapshots:
    clouds = [
        0.5 * torch.randn(20, 1, generator=gen(k), dtype=F64) + m for k, m in enumerate((1.0, 0.5, 0.2))
    ]
    return Snapshots([0.0, 0.5, 1.0], clouds)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: {"method": "sinkhorm"}, lambda: {"method": 3}, lambda: {"method": Adam()},
        lambda: {"method": Sinkhorn(projection="least-squares")}, lambda: {"method": Sinkhorn(population=0)},
        lambda: {"method": Sinkhorn(population=-3)}, lambda: {"method": Sinkhorn(population=math.nan)},
        lambda: {"method": Sinkhorn(projection=Adam(steps=-5))}, lambda: {"method": Sinkhorn(projection=Adam(lr=-1.0))},
        lambda: {"method": Sinkhorn(projection=Adam(steps=2.5))}, lambda: {"method": Sinkhorn(restarts=-1)},
        lambda: {"method": Sinkhorn(relaxation=0.0)}, lambda: {"method": Sinkhorn(num_nodes=math.inf)},
        lambda: {"method": Sinkhorn(accelerate="no")}, lambda: {"method": IPF(learner="forest")},
        lambda: {"method": IPF(), "learn_diffusion": True}, lambda: {"method": IPF(), "tolerance": 0.1},
        lambda: {"learn_diffusion": "no"}, lambda: {"dt": -1.0}, lambda: {"dt": math.nan}, lambda: {"tolerance": math.nan},
        lambda: {"max_iterations": 2.5}, lambda: {"seed": "x"}, lambda: {"seed": -1}, lambda: {"progress": "yes"},
        lambda: {"resume": True}, lambda: {"diffusion": math.nan}, lambda: {"diffusion": "x"},
    ],
)  # fmt: skip
def test_options_are_refused_before_any_work(bad, monkeypatch) -> None:
    monkeypatch.setattr(SchrodingerBridge, "solve", lambda *_: pytest.fail("work has begun"))
    monkeypatch.setattr(IPFBridge, "solve", lambda *_: pytest.fail("work has begun"))
    with pytest.raises(StochdynError):
        refine(small(), LinearDrift(1), **{"diffusion": 0.5, **bad()})


def test_a_projection_that_cannot_fit_the_family_is_refused() -> None:
    with pytest.raises(StochdynError, match="linear in its parameters"):
        refine(small(), NeuralDrift(1, 4), 0.5, method=Sinkhorn(projection=LeastSquares()))
    by_steps, exact = (
        refine(small(), LinearDrift(1), 0.5, max_iterations=2, method=Sinkhorn(projection=p)).parameters[
            "matrix"
        ]
        for p in (GaussNewton(), LeastSquares())
    )
    torch.testing.assert_close(by_steps, exact, atol=1e-5, rtol=1e-5)


def test_a_simulated_bridge_says_what_it_lacks() -> None:
    fit = refine(small(), LinearDrift(1), 0.5, max_iterations=1, dt=0.1, method=IPF(max_iterations=1))
    assert fit.measure.drift(0.3, torch.zeros(2, 1, dtype=F64)).shape == (2, 1)
    fit.measure.as_diffusion()
    for call in (
        lambda: fit.posterior(4),
        lambda: BridgeProfile(fit),
        lambda: LinearResponse(fit),
        lambda: fit_profile(fit),
        lambda: fit.bridge,
    ):
        with pytest.raises(UnavailableError, match="couplings"):
            call()


# ------------------------------------------------------------------------------------------------------- identity
def test_a_checkpoint_of_other_features_is_refused(tmp_path) -> None:
    snaps = Snapshots([0.0, 1.0, 2.0], [torch.randn(30, 1, generator=gen(i)) * 0.7**i + i for i in range(3)])
    linear, cubic = (
        lambda x: torch.cat((x, torch.ones_like(x)), -1),
        lambda x: torch.cat((x**3, x), -1),
    )

    class Other(FeatureDrift):
        def regressors(self, t: Tensor, x: Tensor) -> Tensor:
            return 2 * super().regressors(t, x)

    run = {"diffusion": 0.3, "max_iterations": 2, "checkpoint": tmp_path}
    refine(snaps, FeatureDrift(linear, 1), **run)
    for family in (FeatureDrift(cubic, 1), Other(linear, 1)):
        with pytest.raises(ForeignCheckpointError):
            refine(snaps, family, **run, resume=True)
    for more in ({"seed": 1}, {"method": Sinkhorn(num_nodes=999)}, {"dt": 0.1}, {"learn_diffusion": True}):
        with pytest.raises(ForeignCheckpointError):
            refine(snaps, FeatureDrift(linear, 1), **run, **more, resume=True)


def test_an_error_of_the_user_keeps_checkpoint_and_result(tmp_path) -> None:
    count: list[int] = []
    allowed = 8  # two iterations of the five that the run takes

    class Breaks(LinearDrift):
        def regressors(self, t: Tensor, x: Tensor) -> Tensor:
            if len(count) > allowed:
                raise RuntimeError("mine")
            count.append(1)
            return super().regressors(t, x)

    with pytest.raises(RuntimeError, match="mine") as caught:
        refine(small(), Breaks(1), 0.5, tolerance=1e-9, checkpoint=tmp_path)
    assert len(caught.value.result.history) > 0
    count.clear()
    allowed = 6  # enough for one more, too few to get to the end
    with pytest.raises(RuntimeError, match="mine") as again:
        refine(small(), Breaks(1), 0.5, tolerance=1e-9, checkpoint=tmp_path, resume=True)
    assert len(again.value.result.history) > len(caught.value.result.history)


def test_a_solution_is_stored_and_moves() -> None:
    law = SchrodingerBridge(small(), diffusion=0.5).solve()
    other = SchrodingerBridge(small(), diffusion=0.5)
    other.load_state_dict(law.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(other.sample([0.1, 0.7], 5, 0).x, law.sample([0.1, 0.7], 5, 0).x)
    assert other.converged
    assert float(other.objective) == float(law.objective)
