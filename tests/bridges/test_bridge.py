"""The bridge: marginals, factorisation, the exact Gaussian solution, drift and trajectories agree with one another."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.bridges import LinearDrift, LotkaVolterra, SchrodingerBridge, Snapshots
from stochdyn.bridges.laws import finite_pairs

F64 = torch.float64


def _gaussian_on_grid(mean: float, variance: float, n: int = 81) -> tuple[Tensor, Tensor]:
    """Points and weights for which the trapezoid rule integrates to rounding."""
    grid = torch.linspace(-7, 7, n, dtype=F64)
    weights = torch.exp(-0.5 * grid**2)
    return (mean + math.sqrt(variance) * grid)[:, None], weights / weights.sum()


def _gaussian_snapshots(times: list[float], means: list[float], variances: list[float]) -> Snapshots:
    points, weights = zip(*map(_gaussian_on_grid, means, variances), strict=True)
    return Snapshots(times, points, weights)


def test_brownian_bridge_between_gaussians_is_the_closed_form() -> None:
    """N(-a, 1) to N(a, 1) with unit noise over unit time: covariance (sqrt 5 - 1) / 2."""
    snaps = _gaussian_snapshots([0.0, 1.0], [-0.1, 0.1], [1.0, 1.0])
    bridge = SchrodingerBridge(snaps, diffusion=1.0, tolerance=1e-12).solve()
    plan = bridge.plans[0].plan()
    x, y = (s[:, 0] for s in snaps.samples)
    covariance = float((x + 0.1) @ plan @ (y - 0.1))
    assert covariance == pytest.approx((math.sqrt(5) - 1) / 2, abs=1e-9)
    for t in (0.2, 0.5, 0.9):
        law = bridge.marginal(t)
        variance = (1 - t) ** 2 + t**2 + 2 * t * (1 - t) * covariance + t * (1 - t)
        assert law.mean.item() == pytest.approx(-0.1 + 0.2 * t, abs=1e-9)
        assert law.covariance.item() == pytest.approx(variance, abs=1e-8)
        z = torch.tensor([[-0.8], [0.3], [1.5]], dtype=F64)
        exact = torch.distributions.Normal(-0.1 + 0.2 * t, math.sqrt(variance))
        torch.testing.assert_close(law.log_prob(z), exact.log_prob(z[:, 0]), atol=1e-6, rtol=0)
        reach = (1 - t) * covariance + t
        slope = (reach - variance) / (1 - t) / variance
        drift = 0.2 + slope * (z - (-0.1 + 0.2 * t))
        torch.testing.assert_close(bridge.drift(t, z), drift, atol=1e-6, rtol=0)


def test_linear_reference_between_gaussians_is_the_closed_form() -> None:
    """In whitened coordinates u = F x / sqrt Q, v = (y - c) / sqrt Q the problem is Brownian with unit noise."""
    a, b, sigma, span = -0.8, 0.5, 0.6, 1.5
    family = LinearDrift(1).double()
    with torch.no_grad():
        family.weight.copy_(torch.tensor([[a, b]]))
    snaps = _gaussian_snapshots([1.0, 1.0 + span], [2.0, 0.5], [0.3, 0.2])
    bridge = SchrodingerBridge(snaps, family, sigma, tolerance=1e-12).solve()
    f, q = math.exp(a * span), sigma**2 * math.expm1(2 * a * span) / (2 * a)
    s0, s1 = f**2 * 0.3 / q, 0.2 / q
    covariance = 0.5 * (math.sqrt(4 * s0 * s1 + 1) - 1) * q / f
    x, y = (s[:, 0] for s in snaps.samples)
    own = float((x - 2.0) @ bridge.plans[0].plan() @ (y - 0.5))
    assert own == pytest.approx(covariance, rel=1e-8)
    # and the divergence is that of two Gaussian joints, once the entropy of the second snapshot is added
    c = b * math.expm1(a * span) / a
    joint = torch.tensor([[0.3, covariance], [covariance, 0.2]], dtype=F64)
    prior = torch.tensor([[0.3, 0.3 * f], [0.3 * f, 0.3 * f**2 + q]], dtype=F64)
    normal = torch.distributions.MultivariateNormal
    kl = torch.distributions.kl_divergence(
        normal(torch.tensor([2.0, 0.5], dtype=F64), joint),
        normal(torch.tensor([2.0, f * 2.0 + c], dtype=F64), prior),
    )
    entropy = 0.5 * math.log(2 * math.pi * math.e * 0.2)
    assert float(bridge.objective) == pytest.approx(float(kl) + entropy, abs=1e-6)


def test_the_bridge_through_three_snapshots_is_the_two_pairwise_ones() -> None:
    """Minimise the divergence over the whole joint law on 6^3 atoms by cyclic scaling, and compare."""
    g = torch.Generator().manual_seed(0)
    clouds = [torch.randn(6, 2, generator=g, dtype=F64) + i for i in range(3)]
    family = LinearDrift(2).double()
    with torch.no_grad():
        family.weight.copy_(torch.tensor([[-0.3, 0.5, 0.2], [-0.4, 0.1, 0.0]]))
    bridge = SchrodingerBridge(Snapshots([0.0, 1.0, 2.5], clouds), family, 0.9, tolerance=1e-13).solve()
    kernels = [
        part.log_kernel(x, y).exp()
        for part, x, y in zip(bridge._transitions, clouds[:-1], clouds[1:], strict=True)
    ]
    joint = torch.einsum("ab,bc->abc", *kernels)
    for _ in range(500):
        for axis in range(3):
            others = [k for k in range(3) if k != axis]
            scale = (1 / 6) / joint.sum(others)
            joint = joint * scale.reshape([-1 if k == axis else 1 for k in range(3)])
    first, second = (plan.plan() for plan in bridge.plans)
    torch.testing.assert_close(joint, torch.einsum("ab,bc->abc", first, second) * 6, atol=1e-10, rtol=0)


@pytest.fixture(scope="module")
def plane() -> SchrodingerBridge:
    g = torch.Generator().manual_seed(0)
    clouds = [torch.randn(n, 2, generator=g, dtype=F64) + i for i, n in enumerate((30, 40, 25))]
    family = LinearDrift(2).double()
    with torch.no_grad():
        family.weight.copy_(torch.tensor([[-0.5, 0.8, 0.3], [-0.7, 0.2, 0.1]]))
    return SchrodingerBridge(Snapshots([0.0, 1.0, 3.0], clouds), family, 0.5).solve()


@pytest.mark.parametrize("t", [0.25, 1.0, 2.0, 2.9, 3.0])
def test_trajectories_have_the_marginals(plane: SchrodingerBridge, t: float) -> None:
    n, ts = 20_000, torch.tensor([0.0, 0.25, 1.0, 2.0, 2.9, 3.0], dtype=F64)
    path = plane.sample(ts, n, torch.Generator().manual_seed(1))
    assert path.x.shape == (n, 6, 2)
    assert path.dw.shape == (n, 5, 2)
    states = path.x[:, int((ts - t).abs().argmin())]
    law = plane.marginal(t)
    error = (law.covariance.diagonal() / n).sqrt()
    assert bool(((states.mean(0) - law.mean).abs() < 4.5 * error).all())
    torch.testing.assert_close(states.mT.cov(), law.covariance, atol=0.05, rtol=0)
    if t in (0.0, 1.0, 3.0):
        seen = plane.snapshots.samples[[0.0, 1.0, 3.0].index(t)]
        assert float((states[:100, None] - seen).abs().amax(-1).amin(-1).max()) < 1e-12


def test_the_drift_is_the_conditional_mean_of_the_pinned_one(plane: SchrodingerBridge) -> None:
    """Regress the drift of pinned pairs on functions of the state at one time, and the kernel formula likewise."""
    nodes = plane.nodes(300_000)
    for t in nodes.t.unique()[[10, 60]].tolist():
        here = nodes.t[:, 0] == t
        x, u, w = nodes.x[here], nodes.u[here], nodes.weight[here, None]
        basis = torch.cat((torch.ones_like(x[:, :1]), x, x.prod(-1, keepdim=True)), -1)
        gram = basis.mT @ (w * basis)
        by_pairs = torch.linalg.solve(gram, basis.mT @ (w * u))
        by_formula = torch.linalg.solve(gram, basis.mT @ (w * plane.drift(t, x)))
        torch.testing.assert_close(by_formula, by_pairs, atol=0.04, rtol=0.03)


def test_the_sde_with_the_bridge_drift_has_the_bridge_marginals(plane: SchrodingerBridge) -> None:
    law = plane.as_diffusion()
    ts = torch.linspace(0, 0.8, 81, dtype=F64)
    n = 1500
    end = law.sample(ts, (n,), torch.Generator().manual_seed(0)).x[:, -1]
    exact = plane.marginal(0.8)
    error = (exact.covariance.diagonal() / n).sqrt()
    assert bool(((end.mean(0) - exact.mean).abs() < 4.5 * error + 0.01).all())
    torch.testing.assert_close(end.mT.cov(), exact.covariance, atol=0.12, rtol=0)


def test_innovations_have_unit_rate_away_from_snapshots(plane: SchrodingerBridge) -> None:
    """Var of an innovation over h, the end r ahead, is h r / (h + r) for Brownian noise; here nearly so."""
    ts = torch.tensor([1.0, 1.01, 1.02], dtype=F64)
    path = plane.sample(ts, 20_000, torch.Generator().manual_seed(0))
    rates = path.dw.var(0) / 0.01
    torch.testing.assert_close(rates, torch.ones_like(rates), atol=0.05, rtol=0)


def test_weights_and_multiplicities_are_the_same_thing() -> None:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(5, 1, generator=g, dtype=F64), torch.randn(4, 1, generator=g, dtype=F64)
    counts = torch.tensor([1, 2, 1, 3, 1])
    weighted = SchrodingerBridge(Snapshots([0.0, 1.0], [x, y], [counts, torch.ones(4)])).solve()
    repeated = SchrodingerBridge(Snapshots([0.0, 1.0], [x.repeat_interleave(counts, 0), y])).solve()
    torch.testing.assert_close(
        weighted.marginal(0.4).covariance, repeated.marginal(0.4).covariance, atol=1e-6, rtol=0
    )


def test_a_nonlinear_reference_gives_a_bridge_that_passes_through_the_snapshots() -> None:
    g = torch.Generator().manual_seed(0)
    family = LotkaVolterra().double()
    with torch.no_grad():
        family.theta.copy_(torch.tensor([1.0, 0.4, 0.4, 0.1]))
    snaps = Snapshots(
        [0.0, 1.0],
        [torch.rand(15, 2, generator=g, dtype=F64) * 0.3 + 4, 3 + torch.rand(12, 2, generator=g, dtype=F64)],
    )
    bridge = SchrodingerBridge(snaps, family, 0.4, dt=0.05).solve()
    path = bridge.sample(torch.tensor([0.0, 0.5, 1.0], dtype=F64), 3000, g)
    torch.testing.assert_close(path.x[:, -1].mean(0), snaps[1].mean, atol=0.03, rtol=0)
    law = bridge.marginal(0.5)
    torch.testing.assert_close(path.x[:, 1].mean(0), law.mean, atol=0.03, rtol=0)
    assert bridge.drift(0.5, path.x[:7, 1]).shape == (7, 2)


def test_a_warm_start_needs_fewer_iterations(plane: SchrodingerBridge) -> None:
    again = SchrodingerBridge(plane.snapshots, plane.family, 0.5).solve(plane)
    assert all(p.num_iterations <= 2 for p in again.plans)


def test_a_population_that_grows_is_coupled_without_moving_far() -> None:
    """Two groups, one of which doubles: exact marginals must carry cells across, relaxed ones let it grow."""
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(30, 1, generator=g, dtype=F64) * 0.1 + c for c in (-2.0, 2.0))
    x, y = torch.cat((left, right)), torch.cat((left, right)) + 0.1
    growing = torch.cat((torch.ones(30), 2 * torch.ones(30))).double()
    snaps = Snapshots([0.0, 1.0], [x, y], [torch.ones(60), growing])
    crossing = {}
    for relaxation in (None, 1.0):
        bridge = SchrodingerBridge(snaps, diffusion=0.7, relaxation=relaxation).solve()
        plan = bridge.plans[0].plan()
        crossing[relaxation] = float(plan[:30, 30:].sum() / plan.sum())
        assert bridge.marginal(0.5).sample(10, g).shape == (10, 1)
    assert crossing[None] > 0.15
    assert crossing[1.0] < 0.02


def test_a_grid_too_coarse_for_the_drift_is_said() -> None:
    snaps = Snapshots([0.0, 1.0], [torch.zeros(3, 1, dtype=F64), torch.ones(3, 1, dtype=F64)])
    with pytest.warns(sd.errors.ApproximationWarning, match="too coarse"):
        SchrodingerBridge(snaps, lambda t, x: -20 * torch.sin(x), 1.0, dt=0.25).solve()


def test_particles_of_no_weight_need_not_be_reached() -> None:
    x = torch.zeros(3, 1, dtype=F64)
    y = torch.tensor([[0.1], [-0.1], [1e6]], dtype=F64)
    weights = [torch.ones(3), torch.tensor([1.0, 1.0, 0.0])]
    law = SchrodingerBridge(Snapshots([0.0, 1.0], [x, y], weights), diffusion=0.5).solve().marginal(0.5)
    assert abs(law.mean.item()) < 1e-9


SNAPS = Snapshots([0.0, 1.0], [torch.zeros(4, 2), torch.ones(4, 2)])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: SchrodingerBridge([1, 2]), sd.errors.InvalidInputError, "snapshots"),
        (lambda: SchrodingerBridge(SNAPS, lambda t, x: x[..., :1]), sd.errors.ShapeError, "another shape"),
        (lambda: SchrodingerBridge(SNAPS, LinearDrift(3)), sd.errors.ShapeError, "another dimension"),
        (lambda: SchrodingerBridge(SNAPS, 3.0), sd.errors.InvalidInputError, "no family of drifts"),
        (lambda: SchrodingerBridge(SNAPS, diffusion=-1.0), sd.errors.DiffusionError, "positive"),
        (lambda: SchrodingerBridge(SNAPS, diffusion=torch.tensor([[1.0], [0.0]])), sd.errors.DiffusionError, "every component"),
        (lambda: SchrodingerBridge(SNAPS, dt=0.0), sd.errors.InvalidInputError, "dt"),
        (lambda: SchrodingerBridge(SNAPS, diffusion=1e-4).solve(), sd.errors.DiffusionError, r"1\.41e\+04 standard deviations"),
        (lambda: SchrodingerBridge(SNAPS).marginal(0.5), sd.errors.UnavailableError, "solve"),
        (lambda: SchrodingerBridge(SNAPS).solve().marginal(1.5), sd.errors.TimeGridError, "inside"),
        (lambda: SchrodingerBridge(SNAPS).solve().marginal(1.0).log_prob(torch.zeros(2)), sd.errors.UnavailableError, "density"),
        (lambda: SchrodingerBridge(SNAPS).solve().sample(torch.tensor([0.0, 2.0])), sd.errors.TimeGridError, "inside"),
    ],
)  # fmt: skip
def test_bad_input_is_refused(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_density_that_is_not_finite_is_an_error_with_its_cause() -> None:
    snaps = Snapshots([0.0, 1.0], [torch.zeros(3, 1, dtype=F64), torch.ones(3, 1, dtype=F64)])
    with pytest.raises(sd.errors.NonFiniteError):
        SchrodingerBridge(snaps, lambda t, x: -1e90 * x**3, 1.0, dt=0.1).solve()


def test_pairs_whose_law_is_not_finite_are_left_out_loudly() -> None:
    means, factors = torch.tensor([[0.0], [1.0], [2.0]]), torch.ones(3, 1, 1)
    means[1] = torch.nan
    with pytest.warns(sd.errors.ApproximationWarning, match=r"1 pairs, 4.00% of the law"):
        kept = finite_pairs(means, factors, torch.tensor([0.48, 0.04, 0.48]), 0.5)
    assert kept[0].flatten().tolist() == [0.0, 2.0]
    assert kept[2].tolist() == [0.5, 0.5]
    with pytest.raises(sd.errors.NonFiniteError, match=r"smaller dt"):
        finite_pairs(means, factors, torch.tensor([0.4, 0.2, 0.4]), 0.5)
