"""Dwell times, first passages, habits of Markov state models and what a panel can't tell, against exact answers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stochdyn.errors import InvalidInputError
from stochdyn.jumps import (
    AmortisedRates,
    JumpMeasure,
    PanelData,
    RateMatrix,
    chapman_kolmogorov,
    fit_rates,
    implied_time_scales,
    plot_chapman_kolmogorov,
    plot_time_scales,
    transition,
)

D = torch.float64


def channel() -> RateMatrix:
    """Colquhoun and Hawkes' five states, in 1/s: the first two are open."""
    q = torch.zeros(5, 5, dtype=D)
    q[0, 1], q[0, 3] = 50.0, 3000.0
    q[1, 0], q[1, 2] = 2.0 / 3.0, 500.0
    q[2, 1], q[2, 3] = 15000.0, 4000.0
    q[3, 0], q[3, 2], q[3, 4] = 15.0, 50.0, 2000.0
    q[4, 3] = 10.0
    return RateMatrix(q)


def test_open_times_of_a_channel_are_the_published_ones() -> None:
    """Mean open time 1.8765432 ms; the density is a mixture of exponentials of rates 500.65359142 and 3050.01307525 per second."""
    q = channel()
    t = torch.linspace(0, 0.06, 6001, dtype=D)
    f = q.dwell_density([0, 1], t)
    assert float(torch.trapezoid(f, t)) == pytest.approx(1.0, abs=1e-4)
    assert float(torch.trapezoid(t * f, t)) == pytest.approx(1.8765432e-3, rel=1e-4)
    a, b = 500.65359142, 3050.01307525
    modes = torch.stack([a * torch.exp(-a * t), b * torch.exp(-b * t)], -1)
    share = torch.linalg.lstsq(modes, f[:, None]).solution
    torch.testing.assert_close((modes @ share)[:, 0], f, rtol=1e-7, atol=1e-7)
    assert float(share.sum()) == pytest.approx(1.0, rel=1e-7)


@pytest.mark.parametrize(
    ("v", "uniform", "stationary"),
    [
        (0.0, 0.0, 0.0),
        (1.0, 0.564151036035826, 0.4479840709722773),
        (2.0, 1.868135810063571, 1.4141179353775883),
    ],
)
def test_a_transient_produces_entropy_of_its_own(v: float, uniform: float, stationary: float) -> None:
    """The flashing ratchet on [0, 2.5] from the uniform law, against values by an independent quadrature."""
    q = np.zeros((6, 6))
    for i in range(3):
        for j in range(3):
            if i != j:
                q[i, j], q[3 + i, 3 + j] = math.exp(-v * (j - i) / 2), 1.0
        q[i, 3 + i] = q[3 + i, i] = 1.0
    rates = RateMatrix(torch.as_tensor(q))
    law = JumpMeasure(torch.full((6,), 1 / 6, dtype=D), rates)
    assert float(law.entropy_production(2.5)) == pytest.approx(uniform, rel=1e-9, abs=1e-12)
    steady = JumpMeasure(rates.stationary(), rates)
    assert float(steady.entropy_production(2.5)) == pytest.approx(stationary, rel=1e-9, abs=1e-12)
    # two stretches of time produce what the whole does
    later = JumpMeasure(law.marginal(1.0).probs, rates)
    parts = law.entropy_production(1.0) + later.entropy_production(1.5)
    assert float(parts) == pytest.approx(float(law.entropy_production(2.5)), rel=1e-9, abs=1e-12)


def test_a_jump_without_reverse_produces_entropy_without_end_where_it_happens() -> None:
    one_way = [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
    assert float(JumpMeasure([1.0, 0.0, 0.0], one_way).entropy_production(1.0)) == math.inf
    assert float(JumpMeasure([0.0, 1.0, 0.0], one_way).entropy_production(1.0)) == 0.0


def test_first_passage_densities_have_the_mean_first_passage_time() -> None:
    q = RateMatrix(torch.tensor([[0.0, 1.0, 0.3], [0.4, 0.0, 2.0], [0.8, 0.5, 0.0]], dtype=D))
    t = torch.linspace(0, 60, 12_001, dtype=D)
    f = q.first_passage_density(0, t)
    torch.testing.assert_close(
        torch.trapezoid(t[:, None] * f, t, dim=0), q.mean_first_passage(0), rtol=1e-4, atol=1e-9
    )
    assert (f[:, 0] == 0).all()
    with pytest.raises(InvalidInputError, match="leave out"):
        q.dwell_density([0, 1, 2], 1.0)


def series(rates: object, dt: float, length: int, count: int, seed: int = 0) -> PanelData:
    p = transition(rates, dt)
    source = torch.Generator().manual_seed(seed)
    state = torch.zeros(count, dtype=torch.long)
    states = [state]
    for _ in range(length - 1):
        state = torch.multinomial(p[state], 1, generator=source)[:, 0]
        states.append(state)
    frame = {
        "id": np.repeat(np.arange(count), length),
        "t": np.tile(np.arange(length) * dt, count),
        "s": torch.stack(states, -1).reshape(-1).numpy(),
    }
    return PanelData(frame, "id", "t", "s")


def test_a_jump_process_passes_the_tests_of_markov_state_models() -> None:
    q = RateMatrix(torch.tensor([[0.0, 0.7], [1.9, 0.0]], dtype=D))
    panel = series(q, 0.1, 400, 50)
    scales = implied_time_scales(panel, [1, 2, 4, 6])
    torch.testing.assert_close(scales.times[:, 0], torch.full((4,), 1 / 2.6, dtype=D), rtol=0.08, atol=0)
    test = chapman_kolmogorov(panel, q, [1, 3, 9])
    assert ((test.observed - test.predicted).abs() < 4.5 * test.error).all()
    wrong = chapman_kolmogorov(panel, RateMatrix(3 * q.matrix), [1, 3, 9])
    assert ((wrong.observed - wrong.predicted).abs() > 6 * wrong.error).any()
    assert plot_time_scales(scales, q.relaxation_times()).get_yscale() == "log"
    assert plot_chapman_kolmogorov(test).get_xlabel() == "lag"


def test_unequal_intervals_have_no_lags() -> None:
    panel = PanelData({"id": [1, 1, 1], "t": [0.0, 1.0, 2.5], "s": [0, 1, 0]}, "id", "t", "s")
    with pytest.raises(InvalidInputError, match="equal intervals"):
        implied_time_scales(panel, [1])


def test_a_fit_says_what_it_cannot_tell() -> None:
    """Of a cycle seen at one interval another generator has the same transitions; with two intervals none has."""
    s, d = 6.0, 5.0
    up, down = (s + d) / 2, (s - d) / 2
    q = torch.tensor([[0, up, down], [down, 0, up], [up, down, 0]], dtype=D)
    once = fit_rates(series(q, 1.0, 60, 60), num_draws=20)
    assert any("information" in note for note in once.notes)
    assert "information" in once.report()
    exact = PanelData(
        {"id": [1, 1, 1, 1], "t": [0.0, 1.0, 2.0, 3.0], "s": [0, 1, 0, 1]}, "id", "t", "s", labels=[0, 1, 2]
    )
    notes = fit_rates(exact, num_draws=20, prior=(0.0, 1.0)).notes
    assert any("States without data: [2]" in note for note in notes)
    flips = PanelData({"id": [1] * 9, "t": list(range(9)), "s": [0, 1] * 4 + [0]}, "id", "t", "s")
    assert any("determinant" in note for note in fit_rates(flips, num_draws=20, prior=(0.0, 1.0)).notes)


def test_a_network_starts_the_search() -> None:
    panel = series(torch.tensor([[0, 0.5, 0.2], [0.3, 0, 1.0], [0.6, 0.1, 0]], dtype=D), 0.2, 50, 30)
    crude, network = (
        fit_rates(panel, num_draws=20),
        fit_rates(panel, num_draws=20, start=AmortisedRates.load()),
    )
    torch.testing.assert_close(network.rates, crude.rates, rtol=1e-3, atol=1e-5)
    assert math.isclose(network.log_likelihood, crude.log_likelihood, abs_tol=1e-5)
