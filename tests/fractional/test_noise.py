"""Markov noise: its steps have exactly the law of its closed-form covariance, and that law is nearly fBM."""

from __future__ import annotations

import copy
import itertools
import math
import warnings

import mpmath as mp
import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.errors import ApproximationWarning, HurstRangeError, InvalidInputError, TimeGridError
from stochdyn.fractional import (
    MarkovNoise,
    default_speeds,
    fbm_covariance,
    geometric_speeds,
    optimal_weights,
    variance_constant,
)

F64 = torch.float64
CPU = torch.device("cpu")


def covariance_of_steps(noise: MarkovNoise, ts: Tensor) -> Tensor:
    """Propagate the covariance of (Z, Y) through the recursion that NoiseSteps describes."""
    steps = noise.steps(ts, dtype=F64)
    factor = noise.initial_factor(dtype=F64, device=CPU)
    k = noise.num_states
    scale = torch.ones(k, dtype=F64) if factor is None else (2 * noise.speeds).sqrt()
    cov = torch.zeros(k + 1, k + 1, dtype=F64)
    if factor is not None:
        cov[1:, 1:] = (factor * scale).T @ (factor * scale)
    out = torch.zeros(len(ts), len(ts), dtype=F64)
    columns = cov[:, :1]
    for n in range(len(ts) - 1):
        a = torch.diag(torch.cat([torch.ones(1, dtype=F64), steps.decay[n]]))
        a[0, 1:] = steps.recall[n] / scale
        root = (
            torch.cat([steps.gain[n][:, None], steps.load[n] * scale], dim=1)
            * steps.variance[n][:, None].sqrt()
        )
        cov = a @ cov @ a.T + root.T @ root
        columns = torch.cat([a @ columns, cov[:, :1]], dim=1)
        out[n + 1, : n + 2] = out[: n + 2, n + 1] = columns[0]
    return out


def quiet(*args: object, **kwargs: object) -> MarkovNoise:
    """A noise whose approximation error is beside the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        return MarkovNoise(*args, **kwargs)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "k"), [("II", 8), ("I", 12), ("I", 24)])
@pytest.mark.parametrize("hurst", [0.1, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("regular", [True, False])
def test_steps_reproduce_the_closed_form_covariance(kind: str, k: int, hurst: float, regular: bool) -> None:
    if regular:
        ts = torch.linspace(0, 2, 41, dtype=F64)
    else:
        gaps = torch.rand(30, generator=torch.Generator().manual_seed(0), dtype=F64) ** 3 + 1e-4
        ts = torch.cat([torch.zeros(1, dtype=F64), gaps.cumsum(0)]) * 2 / gaps.sum()
    noise = quiet(hurst, k, horizon=2.0, dt=0.05, kind=kind)
    exact = noise.covariance(ts)
    assert (covariance_of_steps(noise, ts) - exact).abs().max() < 1e-9 * exact.max()


@pytest.mark.parametrize("kind", ["I", "II"])
def test_closed_form_covariance_by_its_definition(kind: str) -> None:
    """Sum over pairs of states of E[(Y_i(s) - Y_i(0)) (Y_j(t) - Y_j(0))]."""
    noise = quiet(0.7, speeds=[0.2, 3.0, 40.0], horizon=2.0, kind=kind)
    w, g, (s, t) = noise.weights, noise.speeds, (0.4, 1.3)
    total = g[:, None] + g[None, :]
    if kind == "II":
        pair = torch.exp(-g * (t - s)) * -torch.expm1(-total * s) / total
    else:
        pair = torch.exp(-g * (t - s)) - torch.exp(-g * s)[:, None] - torch.exp(-g * t)[None, :] + 1
        pair = pair / total
    value = noise.covariance(torch.tensor([s, t], dtype=F64))[0, 1]
    assert float(value) == pytest.approx(float(w @ pair @ w), rel=1e-12)


@pytest.mark.parametrize("dt", [1e-9, 1e-3, 1.0, 1e3])
def test_conditional_covariance_of_the_states_given_the_brownian_increment(dt: float) -> None:
    """For speed times step from 1e-10 to 1e7, against 50 digits."""
    speeds = [0.1, 2.0, 50.0, 1e4]
    noise = quiet(0.4, speeds=speeds, horizon=2 * dt)
    steps = noise.steps(torch.tensor([0.0, dt], dtype=F64), dtype=F64)
    load, variance = steps.load[0], steps.variance[0]
    assert variance[0] == pytest.approx(dt, rel=1e-15)
    with mp.workdps(50):
        for i, gi in enumerate(speeds):
            # covariance with dW, then the whole covariance
            with_dw = -mp.expm1(-mp.mpf(gi) * mp.mpf(dt)) / gi
            assert float(load[0, i] * variance[0]) == pytest.approx(float(with_dw), rel=1e-12)
            for j, gj in enumerate(speeds):
                total = mp.mpf(gi) + mp.mpf(gj)
                exact = float(-mp.expm1(-total * mp.mpf(dt)) / total)
                # what is left out has a standard deviation of at most 1e-5 of that of dW
                assert float((load[:, i] * variance) @ load[:, j]) == pytest.approx(
                    exact, rel=1e-12, abs=3e-10 * dt
                )


def test_steps_far_beyond_eulers_stability_stay_exact() -> None:
    noise = quiet(0.3, speeds=geometric_speeds(8, 0.1, 1e6), horizon=1.0)
    ts = torch.tensor([0.0, 0.1, 1.0], dtype=F64)  # speed times step up to 1e6
    exact = noise.covariance(ts)
    assert (covariance_of_steps(noise, ts) - exact).abs().max() < 1e-7


def test_type_one_starts_its_states_at_their_stationary_law() -> None:
    noise = quiet(0.8, 16, horizon=1.0, dt=1e-2, kind="I")
    factor = noise.initial_factor(dtype=F64, device=CPU)
    assert factor is not None
    g = noise.speeds
    exact = 1 / (g[:, None] + g[None, :])
    assert ((factor.T @ factor - exact) / exact).abs().max() < 1e-9
    assert factor.shape[0] == 16
    assert MarkovNoise(0.8).initial_factor(dtype=F64, device=CPU) is None


# ------------------------------------------------------------------------------------ nearly fBM in law


def bridge(cov: Tensor, obs_variance: float = 0.01) -> tuple[Tensor, float]:
    """Posterior deviations given that the last value is observed to be 0, and the log evidence."""
    total = cov[-1, -1] + obs_variance
    deviation = (cov.diagonal() - cov[:, -1] ** 2 / total).sqrt()
    return deviation, float(-0.5 * torch.log(2 * math.pi * total))


@pytest.mark.parametrize(
    ("hurst", "coded", "normalised", "wide"),
    [
        (0.1, (1.3369, -1.4959), (0.7134, -0.8700), (0.7928, -0.9391)),
        (0.3, (0.9146, -1.2822), (0.7780, -1.1209), (0.7897, -1.1295)),
        (0.5, (0.6945, -1.2300), (0.6945, -1.2300), (0.7081, -1.2674)),
        (0.7, (0.5454, -1.2586), (0.5467, -1.2610), (0.5824, -1.3959)),
        (0.9, (0.4171, -1.3114), (0.3022, -0.9847), (0.3554, -1.3707)),
    ],
)
def test_published_bridges(
    hurst: float, coded: tuple[float, float], normalised: tuple[float, float], wide: tuple[float, float]
) -> None:
    """Bridge of the approximation from 0 to y(2) = 0, at its middle; weights on a horizon of 6."""
    ts = torch.tensor([1.0, 2.0], dtype=F64)
    narrow = quiet(hurst, speeds=geometric_speeds(5, 0.05, 20.0), horizon=6.0, kind="I").covariance(ts)
    wider = quiet(hurst, speeds=geometric_speeds(10, 1e-3, 1e3), horizon=6.0, kind="I").covariance(ts)
    for cov, (deviation, evidence) in (
        (narrow * variance_constant(hurst, "I"), coded),
        (narrow, normalised),
        (wider, wide),
    ):
        found, log_evidence = bridge(cov)
        assert float(found[0]) == pytest.approx(deviation, abs=6e-5)
        assert log_evidence == pytest.approx(evidence, abs=6e-5)


@pytest.mark.parametrize(
    ("hurst", "evidences"),
    [
        (0.2, (-4.8764, -5.0037, -5.0276)),
        (0.3, (-4.1571, -4.1880, -4.1898)),
        (0.5, (-3.2073, -3.2074, -3.2072)),
        (0.7, (-2.9287, -2.9353, -2.9347)),
        (0.9, (-3.3476, -3.3620, -3.3597)),
    ],
)
def test_published_five_observation_evidence(hurst: float, evidences: tuple[float, float, float]) -> None:
    ts = torch.tensor([0.25, 0.5, 1.0, 1.5, 2.0], dtype=F64)
    y = torch.tensor([0.3, -0.1, 0.4, 0.8, 0.5], dtype=F64)
    grids = ((5, 0.05, 20.0), (8, 0.1, 1e3), (16, 0.1, 1e5))
    for grid, evidence in zip(grids, evidences, strict=True):
        noise = quiet(hurst, speeds=geometric_speeds(*grid), horizon=2.0)
        cov = noise.covariance(ts) * variance_constant(hurst, "II") + 0.01 * torch.eye(5, dtype=F64)
        law = torch.distributions.MultivariateNormal(torch.zeros(5, dtype=F64), cov)
        assert float(law.log_prob(y)) == pytest.approx(evidence, abs=6e-5)


HURSTS = [0.05, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8, 0.9, 0.95]


def divergences(kind: str, n: int, num_states: int | None = None, horizon: float = 1.0) -> list[float]:
    """Nats per 100 steps of the default noise for each of HURSTS."""
    ts = torch.linspace(0, horizon, n + 1, dtype=F64)
    return [
        100 * quiet(h, num_states, horizon=horizon, dt=horizon / n, kind=kind).divergence(ts).per_step
        for h in HURSTS
    ]


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("n", [100, 400])
def test_default_noise_loses_less_than_a_twentieth_of_a_nat_per_100_steps(kind: str, n: int) -> None:
    assert max(divergences(kind, n)) < 0.03


@pytest.mark.parametrize("kind", ["I", "II"])
def test_more_states_are_never_worse(kind: str) -> None:
    rows = [divergences(kind, 100, k) for k in (4, 5, 8, 12, 16, 24)]
    for fewer, more in itertools.pairwise(rows):
        assert all(b <= a + 2e-3 for a, b in zip(fewer, more, strict=True))


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("horizon", [1e-12, 1e-3, 1e12])
def test_the_divergence_has_no_unit_of_time(kind: str, horizon: float) -> None:
    for here, there in zip(divergences(kind, 50), divergences(kind, 50, horizon=horizon), strict=True):
        assert there == pytest.approx(here, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("hurst", [0.1, 0.6, 0.9])
def test_the_divergence_is_that_of_two_gaussian_laws(kind: str, hurst: float) -> None:
    """An irregular grid, from its own start; the oracle is torch's, on the levels of the path."""
    ts = 3 + torch.tensor([0.0, 0.1, 0.15, 0.4, 0.9, 1.0], dtype=F64)
    noise = quiet(hurst, 4, horizon=2.0, dt=0.05, kind=kind)
    zero = torch.zeros(5, dtype=F64)
    times = ts[1:] - 3
    p, q = (
        torch.distributions.MultivariateNormal(zero, c)
        for c in (fbm_covariance(times, hurst, kind), noise.covariance(times))  # type: ignore[arg-type]
    )
    found = noise.divergence(ts)
    assert found.per_path == pytest.approx(float(torch.distributions.kl_divergence(p, q)), rel=1e-6)
    assert found.per_step == pytest.approx(found.per_path / 5)


def test_the_default_level_has_the_right_variance() -> None:
    """Within 1 % at all times for type II, whose level is fitted too, and 4 % for type I."""
    ts = torch.linspace(0.01, 1, 100, dtype=F64)
    for kind, share in (("II", 0.012), ("I", 0.04)):
        for hurst in HURSTS:
            found = quiet(hurst, horizon=1.0, dt=0.01, kind=kind).covariance(ts).diagonal()
            assert float((found / ts ** (2 * hurst) - 1).abs().max()) < share, (kind, hurst)


def test_default_speeds_span_horizon_and_step() -> None:
    for k in (1, 2, 3, 5, 8, 16, 24):
        for dt in (0.2, 1e-4):
            grid = default_speeds(k, 1.0, dt)
            assert grid.shape == (k,)
            if k > 3:
                assert float(grid[0]) <= 0.4
                assert float(grid[-2]) >= 0.99 / dt
                assert float((grid[1:] / grid[:-1]).min()) > 2.4  # else numerically dependent
            if k > 2:
                assert float(grid[-1]) == pytest.approx(1e7 * float(grid[-2]), rel=1e-6)
            past = default_speeds(k, 1.0, dt, "I")
            assert k < 8 or float(past[0]) <= 1e-6
    assert default_speeds().shape == (8,)
    assert default_speeds(kind="I").shape == (10,)
    assert default_speeds(dt=1e-4).shape == (10,)


def test_weights_follow_from_the_speeds() -> None:
    for kind in ("I", "II"):
        noise = quiet(0.3, horizon=5.0, dt=0.02, kind=kind)
        again = quiet(0.3, speeds=noise.speeds, horizon=5.0, kind=kind)
        assert torch.allclose(noise.weights, again.weights, rtol=1e-9)


def test_brownian_motion_is_recovered_exactly() -> None:
    noise = MarkovNoise(0.5, speeds=[0.0], horizon=3.0)
    assert noise.relative_error < 1e-7
    ts = torch.tensor([0.0, 0.1, 0.7, 3.0], dtype=F64)
    steps = noise.steps(ts, dtype=F64)
    assert noise.num_innovations(ts) == 1
    assert torch.allclose(steps.gain, torch.ones(3, 1, dtype=F64))
    assert torch.equal(steps.recall, torch.zeros(3, 1, dtype=F64))


# ------------------------------------------------------------------------------------------- as a module


def test_simulated_paths_have_the_covariance_of_the_approximation() -> None:
    """4000 paths, every entry within 5 of its own standard errors (false alarms: about 1 in 30 000)."""
    noise = MarkovNoise(0.75, 6, horizon=1.0, dt=0.1)
    ts = torch.linspace(0, 1, 6, dtype=F64)
    sde = sd.SDE(lambda t, x: torch.zeros_like(x), 1.0, noise=noise)
    law = sd.DiffusionMeasure(torch.zeros(2, dtype=F64), sde)
    path = law.sample(ts, sample_shape=(4000,), generator=torch.Generator().manual_seed(5))
    exact = noise.covariance(ts[1:])
    for channel in range(2):
        x = path.x[:, 1:, channel]
        found = x.T @ x / 4000
        error = ((exact.diagonal()[:, None] * exact.diagonal() + exact**2) / 4000).sqrt()
        assert ((found - exact) / error).abs().max() < 5
    cross = path.x[:, 1:, 0].T @ path.x[:, 1:, 1] / 4000
    assert (cross / (exact.diagonal()[:, None] * exact.diagonal() / 4000).sqrt()).abs().max() < 5


def test_single_precision_agrees_with_double() -> None:
    """Slow type I states have large weights that cancel: they must do so before the cast."""
    noise = quiet(0.9, 24, horizon=1.0, dt=1e-2, kind="I")
    ts = torch.linspace(0, 1, 101)
    single, double = noise.steps(ts, dtype=torch.float32), noise.steps(ts, dtype=F64)
    assert noise.weights.abs().max() > 1e4
    for name in ("variance", "gain", "recall", "decay", "load"):
        a, b = getattr(single, name), getattr(double, name)
        assert a.dtype == torch.float32
        assert torch.allclose(a.double(), b, rtol=1e-6, atol=1e-12)


def test_learnt_hurst_is_a_parameter_with_a_gradient() -> None:
    noise = MarkovNoise(0.3, 5, horizon=1.0, dt=0.01, learn_hurst=True)
    assert [name for name, _ in noise.named_parameters()] == ["hurst_logit"]
    assert noise.hurst.item() == pytest.approx(0.3, rel=1e-6)
    ts = torch.linspace(0, 1, 11, dtype=F64)

    def variance_at_one(h: float) -> float:
        return float(MarkovNoise(h, 5, horizon=1.0, dt=0.01).covariance(ts[1:])[4, 4])

    noise.covariance(ts[1:])[4, 4].backward()
    slope = (variance_at_one(0.3001) - variance_at_one(0.2999)) / 2e-4
    assert noise.hurst_logit is not None
    assert noise.hurst_logit.grad is not None
    assert float(noise.hurst_logit.grad) == pytest.approx(slope * 0.3 * 0.7, rel=1e-4)
    steps = noise.steps(ts, dtype=torch.float32)
    (grad,) = torch.autograd.grad(steps.gain.sum() + steps.recall.sum(), noise.hurst_logit)
    assert math.isfinite(float(grad))
    assert float(grad) != 0.0
    assert copy.deepcopy(noise).hurst.item() == noise.hurst.item()


def test_batches_of_hurst_indices_align_in_front_of_the_states() -> None:
    hurst = torch.tensor([[0.3], [0.6], [0.8]], dtype=F64, requires_grad=True)
    noise = MarkovNoise(hurst, 5, horizon=1.0, dt=0.1)
    ts = torch.linspace(0, 1, 11, dtype=F64)
    steps = noise.steps(ts, dtype=F64)
    r = noise.num_innovations(ts)
    assert steps.gain.shape == (10, 3, 1, r)
    assert steps.recall.shape == (10, 3, 1, 5)
    assert steps.load.shape == (10, r, 5)
    alone = MarkovNoise(0.6, 5, horizon=1.0, dt=0.1).steps(ts, dtype=F64)
    assert torch.allclose(steps.gain[:, 1, 0], alone.gain, rtol=1e-9)
    assert torch.allclose(steps.recall[:, 1, 0], alone.recall, rtol=1e-9)
    assert noise.covariance(ts[1:]).shape == (3, 1, 10, 10)
    (grad,) = torch.autograd.grad(steps.gain.sum(), hurst)
    assert grad.shape == (3, 1)
    assert bool(torch.isfinite(grad).all())


def test_a_changed_grid_is_noticed() -> None:
    noise = MarkovNoise(0.4, horizon=2.0)
    ts = torch.linspace(0, 1, 5, dtype=F64)
    first = noise.steps(ts, dtype=F64).variance[:, 0]
    ts.mul_(2)
    assert torch.allclose(noise.steps(ts, dtype=F64).variance[:, 0], 2 * first)


def test_attributes() -> None:
    noise = MarkovNoise(0.7, num_states=6, horizon=4.0, dt=0.1)
    assert noise.speeds.shape == noise.weights.shape == (6,)
    assert (noise.horizon, noise.dt, noise.num_states) == (4.0, 0.1, 6)
    own = quiet(0.7, speeds=geometric_speeds(6, 0.1, 50.0), horizon=4.0)
    weights, error = optimal_weights(0.7, own.speeds, 4.0)
    assert torch.equal(own.weights, weights)
    assert own.relative_error == float(error)
    assert "kind='II'" in repr(noise)


# ------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("hurst", [0.0, 1.0, -1.0, 1.5, float("nan"), torch.tensor([0.5, 1.0])])
def test_hurst_outside_the_unit_interval(hurst: object) -> None:
    with pytest.raises(HurstRangeError, match="strictly between 0 and 1"):
        MarkovNoise(hurst)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_states": 0}, "num_states"),
        ({"horizon": 0.0}, "horizon"),
        ({"dt": -0.1}, "dt"),
        ({"num_states": 9, "speeds": [1.0, 2.0]}, "num_states and speeds disagree"),
        ({"learn_hurst": "yes"}, "learn_hurst"),
        ({"kind": "III"}, "kind is unknown"),
        ({"speeds": [1.0, 0.5]}, "increase strictly"),
        ({"speeds": [-1.0, 0.5]}, "not negative"),
        ({"speeds": [1.0, float("inf")]}, "speeds must be finite"),
        ({"speeds": [[1.0]]}, "speeds has the wrong number of axes"),
    ],
)
def test_bad_arguments(kwargs: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        MarkovNoise(0.5, **kwargs)  # type: ignore[arg-type]


def test_a_grid_longer_than_the_horizon() -> None:
    noise = MarkovNoise(0.6, horizon=1.0)
    with pytest.raises(TimeGridError, match=r"horizon=1\.5 or more"):
        noise.steps(torch.tensor([1.0, 2.5], dtype=F64), dtype=F64)
    noise.steps(torch.tensor([1.0, 2.0], dtype=F64), dtype=F64)
    with pytest.raises(TimeGridError, match="increase strictly"):
        noise.steps(torch.tensor([0.0, 0.5, 0.5], dtype=F64), dtype=F64)


def test_a_crude_approximation_warns_with_its_divergence_and_a_cure() -> None:
    with pytest.warns(
        ApproximationWarning, match=r"nats per step at a Hurst index of 0\.2 .*take more states"
    ):
        MarkovNoise(0.2, horizon=1.0, dt=0.01, speeds=geometric_speeds(8, 0.1, 1e3))
    with pytest.warns(ApproximationWarning, match=r"type I, 4 states"):
        MarkovNoise(0.9, 4, horizon=1.0, dt=0.01, kind="I")


@pytest.mark.parametrize("kind", ["I", "II"])
def test_defaults_do_not_warn(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dt in (0.1, 1e-2, 1e-4):
            for hurst in (0.05, 0.3, 0.5, 0.7, 0.95):
                MarkovNoise(hurst, horizon=1.0, dt=dt, kind=kind)  # type: ignore[arg-type]
