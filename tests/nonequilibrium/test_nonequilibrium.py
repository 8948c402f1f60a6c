"""Entropy production against closed forms: gyrators, chains between two baths, momenta, rings, jumps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import stochdyn as sd
from stochdyn.errors import ApproximationWarning, DiffusionMismatchError, InvalidInputError, UnavailableError
from stochdyn.nonequilibrium import (
    LinearSteadyState,
    SteadyCurrent,
    dissipation,
    entropy_from_counts,
    entropy_production_rate,
    integral_theorem,
    short_time_bound,
    short_time_entropy,
    sum_rule,
)

D = torch.float64


def tensor(x: object) -> torch.Tensor:
    return torch.as_tensor(np.asarray(x, dtype=float))


def beads(n: int, cold: float = 1.0, hot: float = 10.0) -> LinearSteadyState:
    a = (
        -2 * torch.eye(n, dtype=D)
        + torch.diag(torch.ones(n - 1, dtype=D), 1)
        + torch.diag(torch.ones(n - 1, dtype=D), -1)
    )
    return LinearSteadyState(a, torch.diag((2 * torch.linspace(cold, hot, n, dtype=D)).sqrt()))


def equation(state: LinearSteadyState) -> sd.SDE:
    return sd.SDE(lambda t, x: x @ state.drift_matrix.mT, state.diffusion)


def steady_draws(state: LinearSteadyState, n: int, seed: int = 0) -> torch.Tensor:
    root = torch.linalg.cholesky(state.covariance)
    return torch.randn(n, len(root), dtype=D, generator=torch.Generator().manual_seed(seed)) @ root.mT


@pytest.mark.parametrize(
    ("state", "rate"),
    [
        (
            LinearSteadyState(
                [[-2.0, -1.0], [-1.0, -2.0]], torch.tensor([[2.0, 0], [0, 6.0]]).double().sqrt()
            ),
            1 / 3,
        ),
        (LinearSteadyState(tensor([[-1, 1.5], [-1.5, -1]]), math.sqrt(2) * torch.eye(2, dtype=D)), 4.5),
        (beads(2), 2.025),
        (beads(5), 0.6298172795),
        (beads(16), 0.1974424276),
        (beads(64), 0.0550591937),
    ],
)
def test_closed_forms(state: LinearSteadyState, rate: float) -> None:
    assert state.rate == pytest.approx(rate, rel=1e-8)


def test_momenta_are_odd() -> None:
    a = tensor([[0, 0, 1, 0], [0, 0, 0, 1], [-2, 1, -1, 0], [1, -2, 0, -1]])
    g = torch.zeros(4, 2, dtype=D)
    g[2, 0], g[3, 1] = math.sqrt(2.0), 2.0
    state = LinearSteadyState(a, g, parity=[1, 1, -1, -1])
    assert state.rate == pytest.approx(1 / 12, rel=1e-10)
    x = tensor([0.5, -0.5, 1.0, 0.2])
    torch.testing.assert_close(state.velocity(x)[2:], tensor([0.0208530806, 0.2606635071]), rtol=1e-7, atol=0)
    assert float(state.local(x)) == pytest.approx(0.0344075829, rel=1e-7)
    with pytest.raises(DiffusionMismatchError, match="infinite"):
        LinearSteadyState(a, g)
    current = SteadyCurrent(equation(state), state.score, parity=[1, 1, -1, -1])
    torch.testing.assert_close(current.local(x[None]), state.local(x)[None])
    draws = steady_draws(state, 20_000)
    estimate = sum_rule(equation(state), draws, parity=[1, 1, -1, -1])
    assert abs(float(estimate) - 1 / 12) < 4.5 * float(estimate.stderr)
    with pytest.raises(DiffusionMismatchError):
        sum_rule(equation(state), draws)


def test_local_rates_and_their_parts() -> None:
    state = beads(5)
    x = tensor([1.0, 0, -1, 2, 0.5])
    expected = tensor([-0.432181755, -1.3285222584, 0.0848788548, 0.2759127872, -0.2064285297])
    torch.testing.assert_close(state.velocity(x), expected, rtol=1e-8, atol=0)
    assert float(state.local(x)) == pytest.approx(0.7452433085, rel=1e-9)
    current = SteadyCurrent(equation(state), state.score)
    torch.testing.assert_close(current.velocity(x[None])[0], expected, rtol=1e-8, atol=0)
    parts = current.local(x[None], by={"left": [0, 1], "right": [2, 3, 4]})
    assert float(parts["left"] + parts["right"]) == pytest.approx(0.7452433085, rel=1e-9)
    torch.testing.assert_close(current.medium(x[None]) + current.system(x[None]), current.local(x[None]))


def test_rates_from_draws_with_and_without_the_score() -> None:
    state = beads(5)
    draws = steady_draws(state, 20_000)
    for estimate in (
        entropy_production_rate(SteadyCurrent(equation(state), state.score), draws),
        sum_rule(equation(state), draws),
    ):
        assert abs(float(estimate) - state.rate) < 4.5 * float(estimate.stderr)


def test_the_sum_rule_with_a_base() -> None:
    """With the exact score every draw gives its local rate and a term of mean zero; any gradient leaves the mean alone."""
    state = beads(5)
    draws = steady_draws(state, 20_000)
    plain = sum_rule(equation(state), draws)
    for base in (state.score, lambda x: -2 * x, lambda t, x: torch.ones_like(x)):
        found = sum_rule(equation(state), draws, base=base)
        assert abs(float(found) - state.rate) < 4.5 * float(found.stderr)
    assert float(sum_rule(equation(state), draws, base=state.score).stderr) < 0.2 * float(plain.stderr)
    # momenta, in units of the heat bath: the boundary's divergence doesn't enter
    a = tensor([[0, 0, 1, 0], [0, 0, 0, 1], [-2, 1, -1, 0], [1, -2, 0, -1]])
    g = torch.zeros(4, 2, dtype=D)
    g[2, 0], g[3, 1] = math.sqrt(2.0), 2.0
    under = LinearSteadyState(a, g, parity=[1, 1, -1, -1])
    x = steady_draws(under, 20_000)
    found = sum_rule(equation(under), x, parity=[1, 1, -1, -1], base=under.score)
    assert abs(float(found) - 1 / 12) < 4.5 * float(found.stderr)
    # noise that depends on the state
    ring = sd.datasets.driven_ring(1.0, 1.0, 0.5)
    found = sum_rule(ring.sde, ring.sample(20_000, 0), base=ring.base_score)
    assert abs(float(found) - 1.010361) < 4.5 * float(found.stderr)
    # units of each component, and what isn't a gradient
    unit = tensor([1e-9, 1.0, 1e9, 1e3, 1e-6])
    other = LinearSteadyState(unit[:, None] * state.drift_matrix / unit, unit[:, None] * state.diffusion)
    scaled = sum_rule(equation(other), draws * unit, base=lambda x: -2 * x / unit.square())
    assert float(scaled) == pytest.approx(float(sum_rule(equation(state), draws, base=lambda x: -2 * x)))
    with pytest.raises(InvalidInputError, match="base must be a gradient"):
        sum_rule(equation(state), draws, base=lambda x: x.roll(1, -1))
    with pytest.raises(InvalidInputError, match="base"):
        sum_rule(equation(state), draws, base=3)  # type: ignore[arg-type]


def test_the_sum_rule_keeps_no_graph() -> None:
    """With many components a graph through all the derivatives took gigabytes; what is kept doesn't depend on their number."""
    kept = []
    for dim in (3, 12):
        sizes = []

        def keep(x: torch.Tensor, sizes: list[float] = sizes) -> torch.Tensor:
            sizes.append(x.numel() / x.shape[-1] if x.ndim else 1.0)
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            sum_rule(sd.SDE(lambda t, x: -(x**3), 1.0), torch.randn(5, dim).double())
        kept.append(len(sizes))
    assert kept[0] == kept[1]


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_rates_do_not_depend_on_coordinates_or_units(scale: float) -> None:
    state = beads(3)
    turn = tensor([[1.0, 2.0, 0.0], [0.0, 1.0, -1.0], [0.7, 0.0, 1.0]]) * scale
    inverse = torch.linalg.inv(turn)
    other = LinearSteadyState(turn @ state.drift_matrix @ inverse, turn @ state.diffusion)
    assert other.rate == pytest.approx(state.rate, rel=1e-9)
    faster = LinearSteadyState(state.drift_matrix / scale, state.diffusion / scale**0.5)
    assert faster.rate * scale == pytest.approx(state.rate, rel=1e-9)


def test_multiplicative_noise_on_a_ring() -> None:
    """Without a force nothing is produced, though the Euler density ratio says 0.19."""
    force = 1.0

    def drift(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return force + torch.sin(x) - 0.5 * torch.sin(x)

    def diffusion(t: torch.Tensor, x: torch.Tensor) -> sd.Diagonal:
        return sd.Diagonal((2 + torch.cos(x)).sqrt())

    sde = sd.SDE(drift, diffusion)
    grid = torch.linspace(0, 2 * math.pi, 4001, dtype=D)[:-1, None]
    # the steady density by quadrature: rho v = J with v = f - D (log rho)'
    x = grid[:, 0]
    noise, f = 1 + 0.5 * torch.cos(x), force + torch.sin(x)
    h = float(x[1] - x[0])
    potential = torch.cumsum(f / noise, 0) * h
    total = float((f / noise).sum() * h)
    kernel = torch.exp(-(potential[None, :] - potential[:, None])) / noise[None, :]
    ahead = torch.where(torch.arange(len(x))[None, :] >= torch.arange(len(x))[:, None], 1.0, math.exp(-total))
    rho = (kernel * ahead).sum(1)
    rho = rho / (rho.sum() * h)
    log_rho = rho.log()
    slope = (torch.roll(log_rho, -1) - torch.roll(log_rho, 1)) / (2 * h)
    local = ((f - noise * slope) ** 2 / noise * rho).sum() * h
    assert float(local) == pytest.approx(1.010361, abs=2e-3)
    draws = grid[torch.multinomial(rho, 20_000, replacement=True, generator=torch.Generator().manual_seed(0))]
    estimate = sum_rule(sde, draws)
    assert abs(float(estimate) - 1.010361) < 4.5 * float(estimate.stderr) + 2e-3


def test_dissipation_along_paths_and_its_fluctuation_theorem() -> None:
    state = LinearSteadyState(tensor([[-1, 1.5], [-1.5, -1]]), math.sqrt(2) * torch.eye(2, dtype=D))
    current = SteadyCurrent(equation(state), state.score)
    ts = torch.linspace(0, 0.3, 61, dtype=D)
    law = sd.DiffusionMeasure(
        torch.distributions.MultivariateNormal(torch.zeros(2, dtype=D), state.covariance), equation(state)
    )
    s = dissipation(law.sample(ts, 20_000, 0).x, ts, current)
    assert abs(float(s.mean()) - 4.5 * 0.3) < 4.5 * float(s.std()) / 20_000**0.5 + 0.03
    theorem = integral_theorem(s)
    assert abs(float(theorem) - 1) < 4.5 * float(theorem.stderr) + 0.03
    with pytest.warns(ApproximationWarning, match="rare ones"):
        integral_theorem(10 * s)


def test_entropy_production_from_trajectories_alone() -> None:
    state = beads(5)
    exact = sd.LinearGaussianMeasure(
        state.drift_matrix,
        torch.zeros(5, dtype=D),
        state.diffusion,
        torch.zeros(5, dtype=D),
        state.covariance,
    )
    x = exact.sample(torch.arange(0, 100.0, 0.01, dtype=D), 10, 0).x
    found = short_time_entropy(x, 0.01)
    assert abs(found.rate - state.rate) < 4 * found.stderr + 0.02
    assert found.stderr < 0.1
    assert found.in_sample > found.per_lag[1] - 2 * found.stderr
    slower = short_time_entropy(x, 10.0)
    assert slower.rate == pytest.approx(found.rate / 1000, rel=1e-9)
    scaled = short_time_entropy(1e6 * x @ torch.diag(tensor([1, 2, 3, 4, 5])), 0.01)
    assert scaled.rate == pytest.approx(found.rate, rel=1e-6)


def test_jumps_are_bounded_and_counted() -> None:
    uniform = sd.jumps.RateMatrix(tensor([[0, 2, 0.5], [0.5, 0, 2], [2, 0.5, 0]]))
    assert float(uniform.entropy_production()) == pytest.approx(1.5 * math.log(4), rel=1e-12)
    assert float(short_time_bound(uniform)) == pytest.approx(1.8, rel=1e-12)
    inhomogeneous = sd.jumps.RateMatrix(tensor([[0, 1, 3], [2, 0, 0.5], [0.5, 4, 0]]).mT)
    assert float(inhomogeneous.entropy_production()) == pytest.approx(3.2602487082, rel=1e-9)
    assert float(short_time_bound(inhomogeneous)) == pytest.approx(2.7420589015, rel=1e-9)
    law = sd.jumps.JumpMeasure(inhomogeneous.stationary(), inhomogeneous)
    found = entropy_from_counts(law.sample_record(300.0, 40, 0))
    assert abs(float(found) - 3.2602487082) < 4.5 * float(found.stderr) + 0.02


def test_bad_input() -> None:
    with pytest.raises(InvalidInputError, match="no steady state"):
        LinearSteadyState([[1.0]], [[1.0]])
    with pytest.raises(InvalidInputError, match="1 or -1"):
        LinearSteadyState([[-1.0]], [[1.0]], parity=[2])
    with pytest.raises(UnavailableError, match="no derivatives"):
        LinearSteadyState(torch.tensor([[-1.0]], requires_grad=True), [[1.0]])
    with pytest.raises(InvalidInputError, match="must be a RateMatrix"):
        short_time_bound(torch.eye(2))


@pytest.mark.parametrize(
    "x",
    [None, "x", math.nan, [[math.nan, 0.0, 0.0]], torch.zeros(0, 3), torch.zeros(2, 2, dtype=D), torch.zeros(2, 3).half()],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["velocity", "local", "score"])
def test_what_is_no_state_is_refused_by_name(verb: str, x: object) -> None:
    state = beads(3)
    for answers in (state, SteadyCurrent(equation(state), state.score)):
        with pytest.raises(sd.StochdynError):
            getattr(answers, verb)(x)


@pytest.mark.parametrize("score", [None, 3, "x", object()])
def test_a_score_is_a_function_or_has_one(score: object) -> None:
    with pytest.raises(InvalidInputError, match="score"):
        SteadyCurrent(equation(beads(3)), score)
