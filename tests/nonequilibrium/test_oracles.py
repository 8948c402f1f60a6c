"""Vectors from closed forms, one by one: linear states, momenta, relaxations, jumps, and what a recording can hold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.errors import InvalidInputError, UnavailableError
from stochdyn.nonequilibrium import (
    LinearSteadyState,
    SteadyCurrent,
    entropy_production_rate,
    hatano_sasa,
    short_time_entropy,
    sum_rule,
)
from stochdyn.testing import check_units

D = torch.float64
GYRATOR = ([[-2.0, -1.0], [-1.0, -2.0]], [[2**0.5, 0.0], [0.0, 6**0.5]])
TURN = ([[-1.0, 1.5], [-1.5, -1.0]], [[2**0.5, 0.0], [0.0, 2**0.5]])


def close(value: Tensor, wanted: object, atol: float = 1e-9) -> None:
    torch.testing.assert_close(value, torch.as_tensor(np.asarray(wanted, dtype=float)), rtol=0, atol=atol)


def beads(number: int, cold: float = 1.0, hot: float = 10.0) -> LinearSteadyState:
    near = torch.diag(torch.ones(number - 1, dtype=D), 1)
    force = near + near.mT - 2 * torch.eye(number, dtype=D)
    return LinearSteadyState(force, torch.diag((2 * torch.linspace(cold, hot, number, dtype=D)).sqrt()))


def design(covariance: Tensor) -> Tensor:
    """Return points whose second moments are exactly a covariance, so that means of quadratic forms are exact."""
    root = torch.linalg.cholesky(covariance).mT * len(covariance) ** 0.5
    return torch.cat([root, -root])


def test_gyrator() -> None:
    state = LinearSteadyState(*GYRATOR)
    x = torch.tensor([1.0, -0.5], dtype=D)
    close(state.covariance, [[5 / 6, -2 / 3], [-2 / 3, 11 / 6]])
    close(state.velocity(x), [-0.1153846154, 0.6923076923])
    close(state.local(x), 0.1730769231)  # type: ignore[arg-type]
    assert state.rate == pytest.approx(1 / 3, abs=1e-12)


def test_rotation() -> None:
    state = LinearSteadyState(*TURN)
    x = torch.tensor([0.7, -1.2], dtype=D)
    close(state.covariance, np.eye(2))
    close(state.local(x), 2.25 * float(x.square().sum()))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("number", "cold", "rate", "error"),
    [
        (2, 1.0, 2.025, 1e-10), (5, 1.0, 0.6298172795, 1e-10), (8, 1.0, 0.3844255741, 1e-10), (16, 1.0, 0.1974424276, 1e-10),
        (32, 1.0, 0.1042302721, 1e-10), (64, 1.0, 0.0550591937, 1e-10), (128, 1.0, 0.0288033395, 1e-10),
        (8, 0.416997, 1.000001, 1e-6), (16, 0.20768, 0.999995, 1e-6), (32, 0.10358, 1.000018, 1e-6), (64, 0.05171, 1.000067, 1e-6),
        (128, 0.02583, 1.000177, 1e-6),
    ],
)  # fmt: skip
def test_chains(number: int, cold: float, rate: float, error: float) -> None:
    assert beads(number, cold).rate == pytest.approx(rate, abs=error)


def test_chains_of_two_and_five_in_detail() -> None:
    close(beads(2).covariance, [[17 / 12, 11 / 6], [11 / 6, 71 / 12]])
    five = beads(5)
    close(five.covariance.diagonal(), [1.6196969697, 5.1515151515, 8.25, 9.5151515152, 7.5469696970])
    close(
        five.velocity(torch.eye(5, dtype=D))[:, 0],
        [-0.4464486827, 0.3612084137, -0.0319540278, -0.0083642821, -0.0019170718],
    )
    rates = torch.linalg.eigvalsh(-five.drift_matrix)
    close(rates, [0.268, 1, 2, 3, 3.732], 1e-3)
    # the published form k (T1 - T2)² (111 T1² + 430 T1 T2 + 111 T2²) / (495 T1 T2 (3 T1 + T2) (T1 + 3 T2))
    for cold, hot in ((1.0, 10.0), (2.0, 3.0), (0.1, 7.0)):
        closed = (cold - hot) ** 2 * (111 * cold**2 + 430 * cold * hot + 111 * hot**2)
        closed /= 495 * cold * hot * (3 * cold + hot) * (cold + 3 * hot)
        assert beads(5, cold, hot).rate == pytest.approx(closed, rel=1e-12)
    # the standard deviation of the local rate, of a quadratic form in Gaussian states
    form = five.velocity(torch.eye(5, dtype=D))
    dual = form / torch.linspace(1, 10, 5, dtype=D)
    square = form @ dual.mT @ five.covariance
    assert float((2 * (square @ square).trace()).sqrt()) == pytest.approx(0.6288932656, abs=1e-9)


@pytest.mark.parametrize("state", [LinearSteadyState(*GYRATOR), LinearSteadyState(*TURN), beads(5)])
def test_score_and_sum_rule_on_a_design(state: LinearSteadyState) -> None:
    """On points with exactly the steady second moments both rates are exact, parts of the heat baths too."""
    x = design(state.covariance)
    current = SteadyCurrent(state.sde, state.score)
    assert float(entropy_production_rate(current, x)) == pytest.approx(state.rate, abs=1e-9)  # type: ignore[arg-type]
    for base in (None, state.score, lambda y: -3 * y):
        assert float(sum_rule(state.sde, x, base=base)) == pytest.approx(state.rate, abs=1e-9)
    if len(state.covariance) == 5:
        medium = current.medium(x, by={str(i): [i] for i in range(5)})
        heat = torch.tensor([0.6727272727, 0.1363636364, 0.0, -0.1363636364, -0.6727272727], dtype=D)
        means = torch.stack([part.mean() for part in medium.values()])  # type: ignore[union-attr]
        close(means * torch.linspace(1, 10, 5, dtype=D), heat)


def test_momenta_take_heat_from_one_bath_to_the_other() -> None:
    a = [[0, 0, 1, 0], [0, 0, 0, 1], [-2, 1, -1, 0], [1, -2, 0, -1]]
    g = torch.zeros(4, 2, dtype=D)
    g[2, 0], g[3, 1] = math.sqrt(2.0), 2.0
    parity = [1, 1, -1, -1]
    state = LinearSteadyState(np.asarray(a, dtype=float), g, parity)
    c = state.covariance
    close(torch.stack([c[2, 2], c[3, 3], c[0, 3], c[0, 1]]), [7 / 6, 11 / 6, -1 / 6, 0.5])
    x = design(c)
    current = SteadyCurrent(state.sde, state.score, parity)
    medium = current.medium(x, by={"1": [2], "2": [3]})
    close(torch.stack([part.mean() for part in medium.values()]), [1 / 6, -1 / 12])  # type: ignore[union-attr]
    assert float(sum_rule(state.sde, x, parity=parity)) == pytest.approx(1 / 12, abs=1e-9)
    # the divergence of the two ends' laws is not part of the rate, though it is larger
    mirrored = torch.as_tensor(parity, dtype=D)[:, None] * c * torch.as_tensor(parity, dtype=D)
    ends = 0.5 * (torch.linalg.solve(mirrored, c).trace() - 4)
    assert float(ends) == pytest.approx(0.1074249605, abs=1e-9)
    assert state.rate == pytest.approx(1 / 12, abs=1e-10)


@pytest.mark.parametrize(
    ("t", "total", "housekeeping", "excess"),
    [
        (0.0, 7.1228260870, 6.075, 1.0478260870),
        (0.25, 5.8635723045, 5.4552857890, 0.4082865154),
        (1.0, 4.7391220547, 4.7131530711, 0.0259689836),
    ],
)
def test_hatano_and_sasa_in_closed_form(t: float, total: float, housekeeping: float, excess: float) -> None:
    turn = torch.tensor(TURN[0], dtype=D)
    eye = torch.eye(2, dtype=D)
    move = torch.linalg.matrix_exp(turn * t)
    c = eye + move @ (torch.tensor([[2, 0.5], [0.5, 0.7]], dtype=D) - eye) @ move.mT
    precision = torch.linalg.inv(c)
    sde = sd.SDE(lambda t, x: x @ turn.mT, math.sqrt(2.0))
    split = hatano_sasa(sde, lambda y: -y @ precision, lambda y: -y, design(c), t)
    assert float(split.total) == pytest.approx(total, abs=1e-9)
    assert float(split.housekeeping) == pytest.approx(housekeeping, abs=1e-9)
    assert float(split.excess) == pytest.approx(excess, abs=1e-9)


def test_reversal_of_a_rotation_has_its_rate() -> None:
    state = LinearSteadyState(*TURN)
    rho = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=D), state.covariance)
    law, ts = sd.DiffusionMeasure(rho, state.sde), torch.linspace(0, 1, 201, dtype=D)
    back = law.reverse(lambda t, x: state.score(x), 1.0, rho)
    kl = back.kl(law.backward(1.0, rho), ts, num_samples=4000, estimator="rate", generator=0)
    assert abs(float(kl) - 4.5) < 3 * float(kl.stderr) + 0.01 * 4.5
    # the same from paths of the law itself, under the two laws of reversed paths
    path = law.sample(ts, 4000, 1)
    ratio = law.log_rn(path, back)
    assert abs(float(ratio.mean()) - 4.5) < 4.5 * float(ratio.std()) / 4000**0.5 + 0.01 * 4.5


@pytest.mark.parametrize(
    ("lag", "rate"),
    [(0.01, 2.9563), (0.05, 2.0136), (0.1, 1.2576), (0.2, 0.4931), (0.5, 0.0259)],
)
def test_jumps_seen_at_a_lag_lose_most_of_it(lag: float, rate: float) -> None:
    """The divergence of pairs of states from reversed pairs, over the lag, is far below the rate: rates have to be fitted first."""
    q = sd.jumps.RateMatrix(torch.tensor([[0, 2, 0.5], [1, 0, 4], [3, 0.5, 0]], dtype=D))
    pairs = q.stationary()[:, None] * torch.linalg.matrix_exp(lag * q.matrix)
    seen = float((pairs * (pairs / pairs.mT).log()).sum()) / lag
    assert seen == pytest.approx(rate, abs=1e-3)
    assert float(q.entropy_production()) == pytest.approx(3.2602487082, abs=1e-10)


def test_what_a_recording_holds() -> None:
    """The Cramér-Rao bound by automatic differentiation of the rate in the drift matrix, and in any units."""
    for state in (beads(5), LinearSteadyState(*GYRATOR), LinearSteadyState(*TURN)):
        half = 0.5 * state.diffusion @ state.diffusion.mT
        eye = torch.eye(len(half), dtype=D)
        a = state.drift_matrix.clone().requires_grad_()
        c = torch.linalg.solve(torch.kron(a, eye) + torch.kron(eye, a), -2 * half.flatten()).view_as(half)
        rate = (a.mT @ torch.linalg.inv(half) @ a @ c).trace() + a.trace()
        assert float(rate.detach()) == pytest.approx(state.rate, rel=1e-12)
        (slope,) = torch.autograd.grad(rate, a)
        information = 1000 * torch.kron(torch.linalg.inv(2 * half).contiguous(), c.detach().contiguous())
        variance = slope.flatten() @ torch.linalg.solve(information, slope.flatten())
        assert state.smallest_stderr(1000.0) == pytest.approx(float(variance) ** 0.5, rel=1e-9)
    assert beads(5).smallest_stderr(1000.0) == pytest.approx(0.0726, abs=5e-5)
    # along A = -k + w J the rate is 2 w² / k, and w and k have the information T each: (4 w)² + (2 w²)² over T
    assert LinearSteadyState(*TURN).smallest_stderr(100.0) == pytest.approx(0.75, rel=1e-12)

    def answer(unit: float) -> Tensor:
        scale = torch.tensor([unit, 1.0, 1 / unit], dtype=D)
        three = beads(3)
        other = LinearSteadyState(
            scale[:, None] * three.drift_matrix / scale / unit, scale[:, None] * three.diffusion / unit**0.5
        )
        return torch.tensor([unit * other.smallest_stderr(50.0 * unit)], dtype=D)

    check_units(answer, rtol=1e-8)
    odd = LinearSteadyState([[0.0, 1.0], [-1.0, -1.0]], [[0.0], [2**0.5]], [1, -1])
    with pytest.raises(UnavailableError, match="even"):
        odd.smallest_stderr(1.0)
    with pytest.raises(InvalidInputError, match="horizon"):
        beads(2).smallest_stderr(0.0)


@pytest.mark.slow
def test_trajectories_alone_come_near_the_bound() -> None:
    """Forty series of a thousand time units scatter within a quarter of the least possible, and in sample they are 2 p / T too high."""
    state = beads(5)
    found = [
        short_time_entropy(state.law.sample(0.01 * torch.arange(100_000, dtype=D), generator=seed).x, 0.01)
        for seed in range(40)
    ]
    rates = torch.tensor([f.rate for f in found])
    least = state.smallest_stderr(1000.0)
    # the standard deviation of forty is known to one part in nine
    assert abs(float(rates.std()) - least) < (0.25 + 3 / 80**0.5) * least
    first = torch.tensor([f.in_sample - f.per_lag[1] for f in found])
    assert abs(float(first.mean()) - 2 * 10 / 1000) < 4.5 * float(first.std()) / 40**0.5 + 0.25 * 0.02
