"""The whole loop against its exact iteration for one-dimensional Ornstein-Uhlenbeck processes, and on models it should find."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.bridges import Adam, LinearDrift, LotkaVolterra, Sinkhorn, Snapshots, refine

F64 = torch.float64

# Exact iteration for dX = (aX + b)dt + 0.5 dW, truth (-0.8, 0.8), X_0 ~ N(3, 0.04), snapshots at 0, .75, 1.5, 2.25, 3.
TABLE = {
    1: (-0.72474, 0.68409),
    2: (-0.78852, 0.78186),
    3: (-0.79821, 0.79717),
    5: (-0.79996, 0.79993),
    10: (-0.80000, 0.80000),
}
DIVERGENCES = (3.576, 1.255e-2, 2.784e-4)


def _ou_snapshots(times: list[float], n: int = 81) -> tuple[Snapshots, float]:
    """Exact Gaussian marginals as weighted grids, and the sum of their entropies but for the first."""
    grid = torch.linspace(-7, 7, n, dtype=F64)
    weights = torch.exp(-0.5 * grid**2)
    points, entropy = [], 0.0
    for t in times:
        decay = math.exp(-0.8 * t)
        mean, variance = 1 + 2 * decay, 0.04 * decay**2 + 0.25 * -math.expm1(-1.6 * t) / 1.6
        points.append((mean + math.sqrt(variance) * grid)[:, None])
        entropy += 0.5 * math.log(2 * math.pi * math.e * variance) if t > 0 else 0.0
    return Snapshots(times, points, [weights] * len(times)), entropy


@pytest.fixture(scope="module")
def ou() -> tuple[sd.bridges.Refinement, float]:
    snaps, entropy = _ou_snapshots([0.0, 0.75, 1.5, 2.25, 3.0])
    method = Sinkhorn(tolerance=1e-12, num_nodes=4_000_000)
    fit = refine(snaps, LinearDrift(1), diffusion=0.5, dt=0.05, tolerance=1e-30, method=method)
    return fit, entropy


def test_iterations_are_those_of_the_exact_ornstein_uhlenbeck_table(ou) -> None:
    fit, _ = ou
    matrix, shift = fit.history.parameters["matrix"].flatten(), fit.history.parameters["shift"].flatten()
    for k, (a, b) in TABLE.items():
        assert float(matrix[k - 1]) == pytest.approx(a, abs=1.1e-5)
        assert float(shift[k - 1]) == pytest.approx(b, abs=1.1e-5)


def test_divergences_are_those_of_the_exact_table(ou) -> None:
    fit, entropy = ou
    exact = fit.history.objective - entropy
    for value, known in zip(exact, DIVERGENCES, strict=False):
        assert float(value) == pytest.approx(known, rel=5e-4, abs=2e-7)
    assert abs(float(exact[-1])) < 1e-6


def test_the_objective_falls_with_every_half_step(ou) -> None:
    fit, _ = ou
    assert float(fit.history.trace.diff().max()) < 1e-6
    assert float(fit.history.trace[1] - fit.history.trace[0]) < -3


def test_three_snapshots_have_their_own_table() -> None:
    snaps, _ = _ou_snapshots([0.0, 1.5, 3.0])
    fit = refine(
        snaps,
        LinearDrift(1),
        diffusion=0.5,
        dt=0.05,
        tolerance=1e-30,
        method=Sinkhorn(tolerance=1e-12, num_nodes=4000000),
    )
    assert float(fit.parameters["matrix"]) == pytest.approx(-0.79977, abs=1.1e-5)
    assert float(fit.parameters["shift"]) == pytest.approx(0.79964, abs=1.1e-5)


def test_gauss_newton_and_least_squares_take_the_same_step() -> None:
    snaps, _ = _ou_snapshots([0.0, 1.5, 3.0], 41)

    class Same(sd.bridges.DriftFamily):
        def __init__(self) -> None:
            super().__init__(1)
            self.rate, self.level = nn.Parameter(torch.zeros(())), nn.Parameter(torch.zeros(()))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.rate * x + self.level

    first = refine(snaps, LinearDrift(1), diffusion=0.5, max_iterations=1, dt=0.1)
    second = refine(snaps, Same(), diffusion=0.5, max_iterations=1, dt=0.1)
    assert float(second.parameters["rate"]) == pytest.approx(float(first.parameters["matrix"]), abs=1e-7)
    assert float(second.parameters["level"]) == pytest.approx(float(first.parameters["shift"]), abs=1e-7)


def test_the_loop_stops_when_the_parameters_stand_still() -> None:
    """It stops at the first iterate that is nearer to the limit than the tolerance, in standard errors were paths seen."""
    snaps, _ = _ou_snapshots([0.0, 1.5, 3.0], 41)

    def run(max_iterations: int, tolerance: float) -> sd.bridges.Refinement:
        method = Sinkhorn(population=1.0)
        return refine(
            snaps, LinearDrift(1), diffusion=0.5, max_iterations=max_iterations, dt=0.1, tolerance=tolerance, method=method
        )  # fmt: skip

    fit, limit = run(30, 1e-3), run(60, 1e-7)
    assert "stand still" in fit.history.stopped
    response = sd.bridges.LinearResponse(limit)

    def distance(other: sd.bridges.Refinement) -> float:
        gap = torch.cat([p.detach().flatten() - q.detach().flatten() for p, q in zip(
            other.family.parameters(), limit.family.parameters(), strict=True)])  # fmt: skip
        return float(gap.double() @ response.observed.double() @ gap.double()) ** 0.5

    # What is observed is less than what paths would tell, by a share that isn't below the least one: a distance of the tolerance for
    # each of two parameters is at most sqrt(2) of it in these units, and at least the root of that share.
    assert distance(fit) < 2**0.5 * 1e-3
    assert distance(run(len(fit.history) - 1, 1e-3)) > float(response.information_kept[0]) ** 0.5 * 1e-3
    assert float(-fit.history.objective.diff()[-1]) < 1e-3
    capped = refine(snaps, LinearDrift(1), diffusion=0.5, max_iterations=2, dt=0.1, tolerance=1e-12)
    assert len(capped.history) == 2
    assert "largest number" in capped.history.stopped


def _simulate(
    family: sd.bridges.DriftFamily, diffusion: float, start: Tensor, times: list[float], seed: int
) -> Snapshots:
    """Fresh particles for every snapshot, by Euler's scheme with fine steps."""
    g = torch.Generator().manual_seed(seed)
    clouds, step = [], 0.005
    with torch.no_grad():
        for time in times:
            x, t = start + 0.1 * torch.rand(start.shape, generator=g, dtype=F64), torch.tensor(0.0)
            for _ in range(round(time / step)):
                noise = torch.randn(x.shape, generator=g, dtype=F64)
                x = x + step * family(t, x) + diffusion * math.sqrt(step) * noise
            clouds.append(x)
    return Snapshots(times, clouds)


@pytest.fixture(scope="module")
def volterra() -> Snapshots:
    family = LotkaVolterra().double()
    with torch.no_grad():
        family.theta.copy_(torch.tensor([1.0, 0.4, 0.4, 0.1]))
    return _simulate(
        family, 0.1, torch.tensor([[5.0, 4.0]], dtype=F64).expand(60, 2), [0.0, 2.0, 4.0, 6.0, 8.0], 5
    )


def test_lotka_volterra_is_found_from_no_drift_at_all(volterra: Snapshots) -> None:
    """Tolerances are four standard deviations of the estimates over simulated data sets of this size."""
    fit = refine(volterra, LotkaVolterra(), diffusion=0.1, max_iterations=5, dt=0.16)
    spreads = {"alpha": (1.0, 0.012), "beta": (0.4, 0.005), "gamma": (0.4, 0.012), "delta": (0.1, 0.0042)}
    for name, (truth, spread) in spreads.items():
        assert float(fit.parameters[name]) == pytest.approx(truth, abs=4 * spread)
    falls = -fit.history.objective.diff()
    assert float(falls[0]) > 100
    assert float(falls.min()) > -1e-3
    assert fit.reference.sample(torch.linspace(0, 1, 11, dtype=F64), (3,)).x.shape == (3, 11, 2)


def test_the_family_given_is_left_alone_and_runs_repeat_to_the_same_bits(volterra: Snapshots) -> None:
    family = LotkaVolterra()
    first, second = (
        refine(
            volterra, family, diffusion=0.1, max_iterations=2, dt=0.2, seed=3, method=Sinkhorn(num_nodes=2000)
        )
        for _ in range(2)
    )
    assert not family.theta.detach().any()
    assert torch.equal(first.family.theta, second.family.theta)


def test_priors_of_a_pyro_model_act() -> None:
    """A rate with a normal prior of the right width moves the estimate by the precision-weighted mean."""
    import pyro
    import pyro.distributions as dist

    snaps, _ = _ou_snapshots([0.0, 1.5, 3.0], 41)
    width = 0.05

    def model():
        rate = pyro.sample("rate", dist.Normal(torch.tensor(-1.0, dtype=F64), width))
        return lambda t, x: rate * (x - 1)

    loose = refine(
        snaps, model, diffusion=0.5, max_iterations=1, dt=0.1, method=Sinkhorn(population=1000000000.0)
    )
    tight = refine(snaps, model, diffusion=0.5, max_iterations=1, dt=0.1, method=Sinkhorn(population=1e-09))
    assert float(tight.parameters["rate"]) == pytest.approx(-1.0, abs=1e-4)
    nodes = sd.bridges.SchrodingerBridge(snaps, diffusion=0.5, dt=0.1).solve().nodes(200_000)
    curvature = float((nodes.weight * (nodes.x[:, 0] - 1) ** 2).sum()) / 0.25
    between = refine(snaps, model, diffusion=0.5, max_iterations=1, dt=0.1, method=Sinkhorn(population=100.0))
    data, prior = 100 * curvature, 1 / width**2
    expected = (data * float(loose.parameters["rate"]) - prior) / (data + prior)
    assert float(between.parameters["rate"]) == pytest.approx(expected, abs=1e-3)


def test_positive_parameters_of_a_pyro_model_stay_positive() -> None:
    import pyro
    import pyro.distributions as dist

    snaps, _ = _ou_snapshots([0.0, 1.5, 3.0], 41)

    def model():
        rate = pyro.sample("rate", dist.LogNormal(torch.tensor(0.0, dtype=F64), 1.0))
        level = pyro.sample("level", dist.Normal(torch.tensor(0.0, dtype=F64), 5.0))
        return lambda t, x: rate * (level - x)

    fit = refine(snaps, model, diffusion=0.5, max_iterations=8, dt=0.1, method=Sinkhorn(population=1000.0))
    assert float(fit.parameters["rate"]) == pytest.approx(0.8, abs=0.02)
    assert float(fit.parameters["level"]) == pytest.approx(1.0, abs=0.02)


def test_a_network_brings_the_objective_down() -> None:
    snaps, _ = _ou_snapshots([0.0, 1.5, 3.0], 41)

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 1))

        def forward(self, t: Tensor, x: Tensor) -> Tensor:
            return self.net(x)

    torch.manual_seed(0)
    fit = refine(
        snaps,
        Network(),
        diffusion=0.5,
        max_iterations=3,
        dt=0.2,
        method=Sinkhorn(num_nodes=20000, projection=Adam(steps=200)),
    )
    assert float(fit.history.objective[0] - fit.history.objective[-1]) > 0.9 * 3.0
    x = torch.linspace(1.0, 2.5, 5, dtype=F64)[:, None]
    torch.testing.assert_close(fit.family(torch.tensor(0.0), x), 0.8 - 0.8 * x, atol=0.15, rtol=0)


def test_the_strength_of_the_noise_is_learnt() -> None:
    """Exact marginals of the process with noise 0.5, a first guess of 0.8: the only fixed point is the truth."""
    snaps, _ = _ou_snapshots([0.0, 0.75, 1.5, 2.25, 3.0], 61)
    fit = refine(
        snaps, LinearDrift(1), diffusion=0.8, max_iterations=60, dt=0.1, learn_diffusion=True, tolerance=1e-09
    )
    assert float(fit.diffusion.sqrt()) == pytest.approx(0.5, abs=0.01)
    assert float(fit.parameters["matrix"]) == pytest.approx(-0.8, abs=0.02)
    assert float(fit.history.objective.diff().max()) < 1e-6


def test_what_snapshots_cannot_tell_is_said() -> None:
    """Particles that all sit on a line never show the drift across it."""
    g = torch.Generator().manual_seed(0)
    clouds = [torch.randn(20, 1, generator=g, dtype=F64) + i for i in range(3)]

    class Two(sd.bridges.LinearFamily):
        def __init__(self) -> None:
            super().__init__(1, ("one", "same"))

        def features(self, t: Tensor, x: Tensor) -> Tensor:
            return torch.stack((x, 2 * x), -1)

    with pytest.warns(sd.errors.ApproximationWarning, match="can't be told"):
        refine(Snapshots([0.0, 1.0, 2.0], clouds), Two(), diffusion=0.5, max_iterations=1)


def test_restarts_return_the_best_attempt(volterra: Snapshots) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = refine(
            volterra,
            LotkaVolterra(),
            diffusion=0.3,
            max_iterations=2,
            dt=0.2,
            method=Sinkhorn(num_nodes=2000),
        )
        best = refine(
            volterra,
            LotkaVolterra(),
            diffusion=0.3,
            max_iterations=2,
            dt=0.2,
            method=Sinkhorn(num_nodes=2000, restarts=1),
        )
    assert best.objective <= one.objective + 1e-9


SNAPS = Snapshots([0.0, 1.0], [torch.zeros(4, 2), torch.ones(4, 2)])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"snapshots": [1]}, sd.errors.InvalidInputError, "snapshots"),
        ({"family": lambda t, x: x}, sd.errors.InvalidInputError, "no parameters"),
        ({"family": LinearDrift(1)}, sd.errors.ShapeError, "another dimension"),
        ({"family": LinearDrift(3)}, sd.errors.ShapeError, "more components than the snapshots"),
        ({"family": nn.Linear(2, 1)}, TypeError, "positional"),
        ({"max_iterations": 0}, sd.errors.InvalidInputError, "max_iterations"),
        ({"method": "magic"}, sd.errors.InvalidInputError, "method"),
        ({"diffusion": 0.0}, sd.errors.DiffusionError, "positive"),
        ({"diffusion": 1e-5}, sd.errors.DiffusionError, "standard deviations"),
        ({"tolerance": 0.0}, sd.errors.InvalidInputError, "tolerance"),
        ({"dt": float("nan")}, sd.errors.InvalidInputError, "dt"),
    ],
)
def test_bad_input_is_refused(change: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        refine(**{"snapshots": SNAPS, "family": LinearDrift(2), **change})
