"""Currents, splits and path functionals against exact answers, in any units."""

from __future__ import annotations

import math

import pytest
import torch

import stochdyn as sd
from stochdyn.datasets import bead_chain, brownian_gyrator, driven_ring
from stochdyn.errors import (
    ApproximationWarning,
    DiffusionMismatchError,
    InvalidInputError,
    ShapeError,
    UnavailableError,
)
from stochdyn.nonequilibrium import (
    LinearSteadyState,
    SteadyCurrent,
    detailed_theorem,
    dissipation,
    entropy_production_rate,
    hatano_sasa,
    integral_theorem,
    mismatch,
    sum_rule,
)
from stochdyn.testing import check_forms, check_order, check_units

D = torch.float64


def rotation(speed: float = 1.5) -> tuple[sd.SDE, torch.Tensor]:
    turn = torch.tensor([[-1.0, speed], [-speed, -1.0]], dtype=D)
    return sd.SDE(lambda t, x: x @ turn.to(x).mT, math.sqrt(2.0)), turn


def test_a_linear_state_in_three_dimensions() -> None:
    a = torch.tensor([[-1, 0.5, 0], [-0.3, -2, 0.7], [0.2, -0.4, -1.5]], dtype=D)
    d = torch.tensor([[1, 0.2, 0], [0.2, 0.5, 0.1], [0, 0.1, 0.8]], dtype=D)
    state = LinearSteadyState(a, torch.linalg.cholesky(2 * d))
    x = torch.tensor([1.0, -1.0, 0.5], dtype=D)
    assert state.rate == pytest.approx(0.7769751472, abs=1e-10)
    torch.testing.assert_close(
        state.velocity(x),
        torch.tensor([-1.2444828942, 0.0512727706, 0.9170486858], dtype=D),
        rtol=0,
        atol=1e-10,
    )
    assert float(state.local(x)) == pytest.approx(2.6768866783, abs=1e-10)
    assert float(state.covariance[1, 2]) == pytest.approx(0.1252275857, abs=1e-10)


def test_every_bead_has_its_part() -> None:
    state = bead_chain()
    exact = LinearSteadyState(
        [[-2.0, 1, 0, 0, 0], [1, -2, 1, 0, 0], [0, 1, -2, 1, 0], [0, 0, 1, -2, 1], [0, 0, 0, 1, -2]],
        torch.diag((2 * torch.linspace(1, 10, 5, dtype=D)).sqrt()),
    )
    parts = torch.tensor([0.2262785901, 0.2831809391, 0.0800421300, 0.0328250116, 0.0074906087], dtype=D)
    torch.testing.assert_close(exact.component_rates, parts, rtol=0, atol=1e-9)
    assert state.entropy_production == pytest.approx(0.6298172795, abs=1e-10)
    x = exact.sample(20_000, 0)
    rates = entropy_production_rate(
        SteadyCurrent(exact.sde, exact.score), x, by={str(i): [i] for i in range(5)}
    )
    for i in range(5):
        assert abs(float(rates[str(i)]) - float(parts[i])) < 4.5 * float(rates[str(i)].stderr)  # type: ignore[index]
    # heat that each bath takes, over its temperature, and what the beads exchange
    current = SteadyCurrent(exact.sde, exact.score)
    beads = {str(i): [i] for i in range(5)}
    heat = torch.tensor([0.6727272727, 0.1363636364, 0.0, -0.1363636364, -0.6727272727], dtype=D)
    medium, system = (torch.stack(list(part(x, beads).values())) for part in (current.medium, current.system))
    wanted = heat / torch.linspace(1, 10, 5, dtype=D)
    assert bool(((medium.mean(1) - wanted).abs() < 4.5 * medium.std(1) / len(x) ** 0.5).all())
    torch.testing.assert_close(medium + system, torch.stack(list(current.local(x, beads).values())))
    torch.testing.assert_close(medium.sum(0), current.medium(x))


def test_reversal_of_a_chain_has_its_rate() -> None:
    """The law backwards in time against the dynamics themselves; and the exact score leaves no residual."""
    exact = LinearSteadyState(
        torch.diag(torch.ones(4, dtype=D), 1)
        + torch.diag(torch.ones(4, dtype=D), -1)
        - 2 * torch.eye(5, dtype=D),
        torch.diag((2 * torch.linspace(1, 10, 5, dtype=D)).sqrt()),
    )
    rho = torch.distributions.MultivariateNormal(torch.zeros(5, dtype=D), exact.covariance)
    law, ts = sd.DiffusionMeasure(rho, exact.sde), torch.linspace(0, 1, 201, dtype=D)
    back = law.reverse(lambda t, x: exact.score(x), 1.0, rho)
    kl = back.kl(law.backward(1.0, rho), ts, num_samples=2000, estimator="rate", generator=0)
    assert abs(float(kl) - exact.rate) < 4.5 * float(kl.stderr) + 0.01 * exact.rate
    flow = sd.core.LearnedFlow(lambda t, x: exact.score(x), "score")
    residual = sd.core.FokkerPlanck(exact.sde).residual(flow, 0.0, exact.sample(100, 0), stationary=True)
    assert float(residual.abs().max()) < 1e-10 * exact.rate


@pytest.mark.parametrize("components", ["one unit", "each its own"])
def test_units_of_the_state_change_nothing(components: str) -> None:
    a = bead_chain(3)
    x = a.sample(200, 0)

    def answer(unit: float) -> torch.Tensor:
        scale = torch.tensor(
            [unit, unit, unit] if components == "one unit" else [unit, 1.0, 1 / unit], dtype=D
        )
        matrix = torch.tensor([[-2.0, 1, 0], [1, -2, 1], [0, 1, -2]], dtype=D)
        noise = torch.diag((2 * torch.linspace(1, 10, 3, dtype=D)).sqrt())
        state = LinearSteadyState(scale[:, None] * matrix / scale, scale[:, None] * noise)
        current = SteadyCurrent(state.sde, state.score)
        return torch.stack(
            [
                torch.tensor(state.rate, dtype=D),
                current.local(x * scale).mean(),  # type: ignore[union-attr]
                sum_rule(state.sde, x * scale).mean,
                state.local(x * scale).mean(),  # type: ignore[union-attr]
            ]
        )

    check_units(answer, rtol=1e-8)


def test_a_curved_change_of_coordinates_changes_nothing() -> None:
    """y = x + 0.3 sin x on a ring whose noise depends on the place: Itô's formula gives the equation, the local rate stays."""
    ring = driven_ring(1.0, 1.0, 0.5)
    assert ring.score is not None
    x = ring.sample(20_000, 0)

    def back(y: torch.Tensor) -> torch.Tensor:
        z = y
        for _ in range(60):
            z = z - (z + 0.3 * z.sin() - y) / (1 + 0.3 * z.cos())
        return z

    def drift(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        z = back(y)
        # h' F + h'' D
        return (1 + 0.3 * z.cos()) * ring.sde.drift(t, z) - 0.3 * z.sin() * (1 + 0.5 * z.cos())

    def diffusion(t: torch.Tensor, y: torch.Tensor) -> sd.Diagonal:
        z = back(y)
        return sd.Diagonal((1 + 0.3 * z.cos()) * (2 + z.cos()).sqrt())

    def score(y: torch.Tensor) -> torch.Tensor:
        z = back(y)
        slope = 1 + 0.3 * z.cos()
        return (ring.score(z) + 0.3 * z.sin() / slope) / slope  # type: ignore[misc]

    y, curved = x + 0.3 * x.sin(), sd.SDE(drift, diffusion)
    torch.testing.assert_close(
        SteadyCurrent(curved, score).local(y), SteadyCurrent(ring.sde, ring.score).local(x), rtol=1e-8, atol=0
    )
    found = sum_rule(curved, y)
    assert abs(float(found) - 1.010361) < 4.5 * float(found.stderr)


def test_momenta_in_any_units_of_length_and_time() -> None:
    a = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 1], [-2, 1, -1, 0], [1, -2, 0, -1]], dtype=D)
    g = torch.zeros(4, 2, dtype=D)
    g[2, 0], g[3, 1] = math.sqrt(2.0), 2.0
    parity = [1, 1, -1, -1]

    def answer(unit: float) -> torch.Tensor:
        scale = torch.tensor([unit, unit, 1.0, 1.0], dtype=D)
        state = LinearSteadyState(scale[:, None] * a / scale, scale[:, None] * g, parity)
        current = SteadyCurrent(state.sde, state.score, parity)
        x = scale * torch.tensor([[0.5, -0.5, 1.0, 0.2]], dtype=D)
        return torch.cat([torch.tensor([state.rate], dtype=D), current.local(x), current.velocity(x)[0, 2:]])  # type: ignore[list-item]

    check_units(answer, rtol=1e-7)
    assert float(answer(1.0)[0]) == pytest.approx(1 / 12, rel=1e-10)


@pytest.mark.parametrize(
    ("k", "coupling", "friction", "temperatures", "rate"),
    [(1, 1, 1, (1, 2), 1 / 12), (1, 1, 0.5, (1, 4), 0.375), (1, 0.5, 2, (3, 1), 4 / 75)],
)
def test_underdamped_pairs(
    k: float, coupling: float, friction: float, temperatures: tuple[float, float], rate: float
) -> None:
    s = k + coupling
    a = torch.tensor(
        [[0, 0, 1, 0], [0, 0, 0, 1], [-s, coupling, -friction, 0], [coupling, -s, 0, -friction]], dtype=D
    )
    g = torch.zeros(4, 2, dtype=D)
    g[2, 0], g[3, 1] = (math.sqrt(2 * friction * t) for t in temperatures)
    parity = [1, 1, -1, -1]
    state = LinearSteadyState(a, g, parity)
    assert state.rate == pytest.approx(rate, rel=1e-10)
    # The reversed law against the backward one: the same number from the definition, without the boundary's divergence.
    rho = torch.distributions.MultivariateNormal(torch.zeros(4, dtype=D), state.covariance)
    law = sd.DiffusionMeasure(rho, state.sde)
    horizon, ts = 1.0, torch.linspace(0, 1, 101, dtype=D)
    back = law.reverse(lambda t, x: state.score(x), horizon, rho, parity)
    kl = back.kl(law.backward(horizon, rho, parity), ts, num_samples=4000, estimator="rate", generator=0)
    assert abs(float(kl) - rate * horizon) < 4.5 * float(kl.stderr) + 0.02 * rate
    # Along paths the trapezoid rule has the same mean.
    s_path = dissipation(law.sample(ts, 4000, 1), None, SteadyCurrent(state.sde, state.score, parity))
    assert abs(float(s_path.mean()) - rate) < 4.5 * float(s_path.std()) / 4000**0.5 + 0.03 * rate


def test_parity_misused_is_refused() -> None:
    a = torch.tensor([[0.0, 1.0], [-1.0, -1.0]], dtype=D)
    g = torch.tensor([[0.0], [2**0.5]], dtype=D)
    state = LinearSteadyState(a, g, [1, -1])
    assert state.rate == pytest.approx(0.0, abs=1e-12)
    x = torch.tensor([[1.0, 0.5]], dtype=D)
    even = SteadyCurrent(state.sde, state.score)
    with pytest.raises(DiffusionMismatchError, match="infinite"):
        even.local(x)
    # the part of the component that has noise is finite
    assert even.local(x, by={"momentum": [1]})["momentum"].isfinite().all()  # type: ignore[call-overload]
    with pytest.raises(sd.StochdynError):
        SteadyCurrent(state.sde, state.score, parity=[1, 1, 1]).local(x)
    current = SteadyCurrent(state.sde, state.score, parity=[1, -1])
    ts = torch.linspace(0, 1, 3, dtype=D)
    with pytest.raises(UnavailableError, match="even"):
        dissipation(torch.zeros(3, 2, dtype=D), ts, current, method="girsanov")
    with pytest.raises(UnavailableError, match="even"):
        mismatch(torch.zeros(3, 2, dtype=D), ts, current)
    with pytest.raises(UnavailableError, match="even"):
        hatano_sasa(state.sde, state.score, state.score, torch.randn(5, 2).double(), parity=[1, -1])


@pytest.mark.parametrize(
    ("force", "barrier", "modulation", "rate"),
    [
        (1.0, 1.0, 0.0, 0.7747184253032),
        (1.0, 2.0, 0.0, 0.3511868120739),
        (0.5, 2.0, 0.0, 0.0589910502304),
        (3.0, 0.5, 0.0, 8.8872879173653),
        (1.0, 1.0, 0.5, 1.010361),
        (0.0, 1.0, 0.5, 0.0),
    ],
)
def test_rings(force: float, barrier: float, modulation: float, rate: float) -> None:
    ring = driven_ring(force, barrier, modulation)
    assert ring.entropy_production == pytest.approx(rate, rel=1e-10 if modulation == 0 else 1e-5, abs=1e-12)
    assert ring.score is not None
    x = ring.sample(5000, 0)
    current = SteadyCurrent(ring.sde, ring.score)
    by_score, by_rule = entropy_production_rate(current, x), sum_rule(ring.sde, x)
    assert abs(float(by_score) - rate) < 4.5 * float(by_score.stderr) + 1e-5  # type: ignore[arg-type, union-attr]
    assert abs(float(by_rule) - rate) < 4.5 * float(by_rule.stderr) + 1e-5
    # the exact score solves the stationary equation
    ts = torch.linspace(0, 1, 5, dtype=D)
    assert float(mismatch(x[:50].reshape(10, 5, 1), ts, current).abs().max()) < 1e-6


def test_multiplicative_noise_along_euler_paths() -> None:
    """The trapezoid rule is right where the log-ratio of Euler densities is wrong by 0.2 per time."""
    for force, rate in ((0.0, 0.0), (1.0, 1.010361)):
        ring = driven_ring(force, 1.0, 0.5)
        law = sd.DiffusionMeasure(ring.sample(400, 0), ring.sde)
        path = law.sample(torch.arange(0, 10.0, 0.01, dtype=D), generator=1)
        s = dissipation(path, None, SteadyCurrent(ring.sde, ring.score)) / 9.99  # type: ignore[arg-type]
        assert abs(float(s.mean()) - rate) < 4.5 * float(s.std()) / 20 + 0.01
        forth = law.log_prob(path)
        with pytest.warns(ApproximationWarning, match="wrong at order one"):
            ratio = forth - law.log_prob(path.reversed())
        assert float((ratio / 9.99).mean()) > rate + 0.1
    # where the noise is the same everywhere the ratio is right, and so is twice the reversal
    sde, _ = rotation()
    law = sd.DiffusionMeasure(
        torch.distributions.MultivariateNormal(torch.zeros(2, dtype=D), torch.eye(2, dtype=D)), sde
    )
    path = law.sample(torch.linspace(0, 1, 101, dtype=D), 2000, 0)
    ratio = law.log_prob(path) - law.log_prob(path.reversed())
    assert abs(float(ratio.mean()) - 4.5) < 4.5 * float(ratio.std()) / 2000**0.5 + 0.05


def test_the_two_forms_differ_by_the_residual_of_the_score() -> None:
    sde, _ = rotation()
    wrong = torch.tensor([[-1.3, 0.2], [0.1, -1.1]], dtype=D)
    current = SteadyCurrent(sde, lambda x: x @ wrong.to(x).mT)
    rho = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=D), torch.eye(2, dtype=D))
    law = sd.DiffusionMeasure(rho, sde)
    errors = []
    for dt in (0.02, 0.005, 0.00125):
        path = law.sample(torch.arange(0, 1 + dt / 2, dt, dtype=D), 500, 0)
        gap = dissipation(path, None, current) - dissipation(path, None, current, method="girsanov")
        residual = mismatch(path, None, current)
        errors.append(float((gap - residual).square().mean().sqrt()))
        assert float(residual.square().mean().sqrt()) > 0.3
    # order 1/2 or better: a factor of four in the step halves the difference
    assert errors[1] < 0.6 * errors[0]
    assert errors[2] < 0.6 * errors[1]


def test_fluctuation_theorems_hold_on_paths() -> None:
    sde, turn = rotation()
    state = LinearSteadyState(turn, math.sqrt(2.0) * torch.eye(2, dtype=D))
    current = SteadyCurrent(sde, state.score)
    rho = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=D), state.covariance)
    path = sd.DiffusionMeasure(rho, sde).sample(torch.linspace(0, 0.3, 61, dtype=D), 20_000, 0)
    s = dissipation(path, None, current)
    detailed = detailed_theorem(s)
    assert abs(float(detailed.slope) - 1) < 4.5 * float(detailed.slope.stderr) + 0.03
    assert bool(
        ((detailed.log_ratio - detailed.s).abs() < 4.5 * detailed.stderr + 0.05 * detailed.s + 0.05).all()
    )
    # exactly a martingale on Euler paths
    exact = integral_theorem(dissipation(path, None, current, method="girsanov"))
    assert abs(float(exact) - 1) < 4.5 * float(exact.stderr)
    with pytest.warns(ApproximationWarning, match="rare ones"), pytest.raises(ShapeError, match="negative"):
        detailed_theorem(s.abs() * 10)
    check_order(lambda v: detailed_theorem(v).slope.mean, s[:2000], rtol=1e-9)


def test_hatano_and_sasa_split_a_relaxation() -> None:
    """A = -I + 1.5 J, D = I, C(0) = [[2, .5], [.5, .7]]: closed forms at three times."""
    sde, turn = rotation(1.5)
    c0 = torch.tensor([[2, 0.5], [0.5, 0.7]], dtype=D)
    eye = torch.eye(2, dtype=D)
    for t, total, housekeeping in (
        (0.0, 7.1228260870, 6.075),
        (0.25, 5.8635723045, 5.4552857890),
        (1.0, 4.7391220547, 4.7131530711),
    ):
        move = torch.linalg.matrix_exp(turn * t)
        c = eye + move @ (c0 - eye) @ move.mT
        x = (
            torch.randn(20_000, 2, dtype=D, generator=torch.Generator().manual_seed(0))
            @ torch.linalg.cholesky(c).mT
        )
        precision = torch.linalg.inv(c)
        split = hatano_sasa(sde, lambda y, p=precision: -y @ p.to(y), lambda y: -y, x, t)
        for found, wanted in (
            (split.total, total),
            (split.housekeeping, housekeeping),
            (split.excess, total - housekeeping),
        ):
            assert abs(float(found) - wanted) < 4.5 * float(found.stderr)
        assert float(split.total) == pytest.approx(float(split.housekeeping) + float(split.excess), abs=0.2)


def test_scores_in_every_form_give_one_answer() -> None:
    sde, _ = rotation()
    x = torch.tensor([[1.0, 0.0], [0.3, -0.2]], dtype=D)
    flow = sd.core.GaussianFlow(lambda t: torch.zeros(*t.shape, 2, dtype=D), lambda t: torch.eye(2, dtype=D))
    scores = [lambda y: -y, lambda t, y: -y, flow, sd.core.LearnedFlow(lambda t, y: -y, "score")]
    answers = [SteadyCurrent(sde, score).local(x) for score in scores]
    for answer in answers[1:]:
        torch.testing.assert_close(answer, answers[0])
    check_forms(lambda points: SteadyCurrent(sde, scores[0]).local(points), x)  # type: ignore[arg-type]


def test_a_control_is_part_of_the_drift() -> None:
    still = sd.SDE(lambda t, x: -x, math.sqrt(2.0))
    turned = still.controlled(lambda t, x: 1.5 / 2**0.5 * torch.stack([x[..., 1], -x[..., 0]], -1))
    x = torch.tensor([[1.0, 0.5]], dtype=D)
    torch.testing.assert_close(
        SteadyCurrent(turned, lambda y: -y).local(x), SteadyCurrent(rotation()[0], lambda y: -y).local(x)
    )
    assert float(SteadyCurrent(still, lambda y: -y).local(x)) == pytest.approx(0.0, abs=1e-12)  # type: ignore[arg-type]


def test_bad_arguments_are_named() -> None:
    sde, _ = rotation()
    with pytest.raises(ShapeError, match="score"):
        SteadyCurrent(sde, lambda x: x[..., :1]).local(torch.zeros(1, 2, dtype=D) + 1)
    with pytest.raises(InvalidInputError, match=r"by\['z'\]"):
        SteadyCurrent(sde, lambda x: -x).local(torch.ones(1, 2, dtype=D), by={"z": [2]})
    with pytest.raises(InvalidInputError, match="method"):
        dissipation(
            torch.zeros(3, 2, dtype=D),
            torch.linspace(0, 1, 3),
            SteadyCurrent(sde, lambda x: -x),
            method="ito",
        )
    with pytest.raises(ShapeError, match="paths"):
        dissipation(torch.zeros(3, 2, dtype=D), torch.linspace(0, 1, 4), SteadyCurrent(sde, lambda x: -x))
    with pytest.raises(InvalidInputError, match="stiffness"):
        brownian_gyrator([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(InvalidInputError, match="modulation"):
        driven_ring(modulation=1.0)
    assert brownian_gyrator().entropy_production == pytest.approx(1 / 3, rel=1e-12)
