"""Physical tomography, and how records agree with a model."""

from __future__ import annotations

import pytest
import torch

from stochdyn.errors import ConvergenceWarning, InvalidInputError, ShapeError, SystemSizeError
from stochdyn.povm import (
    Basis,
    Lindbladian,
    MeasurementRecords,
    Pauli6,
    Propagator,
    Tetrahedral,
    fidelity,
    goodness_of_fit,
    named_operator,
    simulate_records,
    systems,
    tomography,
)

C128 = torch.complex128


def bell(count: int, flips: float = 0.0) -> MeasurementRecords:
    state = torch.zeros(4, dtype=C128)
    state[0] = state[3] = 0.5**0.5
    still = Lindbladian(2, [(1.0, "Z", "all")])
    return simulate_records(still, Pauli6(flips), state, [0.0], count, generator=0)


BELL = torch.zeros(4, 4, dtype=C128)
BELL[0, 0] = BELL[0, 3] = BELL[3, 0] = BELL[3, 3] = 0.5


def test_the_most_likely_state_is_physical_and_certified() -> None:
    found = tomography(bell(3000, 0.04), Pauli6(0.04), progress=False)
    assert float(torch.linalg.eigvalsh(found.state)[0]) > -1e-12
    assert float(found.state.diagonal().sum().real) == pytest.approx(1)
    assert float(fidelity(found.state, BELL)) > 0.97
    assert found.gap < 0.01
    assert found.goodness.p_value > 0.005


def test_records_that_no_state_explains_are_noticed() -> None:
    """With the signs of Y confused on one site a Bell state looks like its partial transpose, which is no state."""
    given = bell(3000)
    outcomes = given.outcomes.clone()
    outcomes[:, 0] = torch.tensor([0, 1, 3, 2, 4, 5])[outcomes[:, 0]]
    with pytest.warns(ConvergenceWarning, match="don't look as|impossible"):
        tomography(outcomes, Pauli6(), progress=False)


def test_the_posterior_covers_the_truth() -> None:
    records = simulate_records(Lindbladian(1, [(1.0, "X", 0)]), Tetrahedral(), "y+", [0.0], 400, generator=1)
    found = tomography(records, Tetrahedral(), method="posterior", num_draws=100, warmup=60, progress=False)
    assert found.draws.shape == (100, 2, 2)
    for name, truth in (("X", 0.0), ("Y", 1.0), ("Z", 0.0)):
        mean, error = found.expectation(named_operator(name))
        assert abs(mean - truth) < 5 * error
        assert 0.01 < error < 0.2
    assert bool((torch.linalg.eigvalsh(found.draws)[:, 0] >= -1e-12).all())


def test_the_p_value_is_uniform_under_the_model_and_small_beside_it() -> None:
    model = systems.ising(2)
    p = Propagator(model, Tetrahedral(), "up", [0.5, 1.0])()
    values = []
    for seed in range(40):
        records = simulate_records(model, Tetrahedral(), "up", [0.5, 1.0], 100, generator=seed)
        values.append(goodness_of_fit(records, p, num_simulations=60).p_value)
    mean = torch.tensor(values).mean()
    assert abs(float(mean) - 0.5) < 4.5 * (1 / 12 / 40) ** 0.5
    wrong = Propagator(systems.ising(2, field=2.0), Tetrahedral(), "up", [0.5, 1.0])()
    records = simulate_records(model, Tetrahedral(), "up", [0.5, 1.0], 1000, generator=0)
    assert goodness_of_fit(records, wrong).p_value < 0.01


def test_impossible_records_are_counted() -> None:
    records = MeasurementRecords.of([0.0], [torch.tensor([[0], [0], [1]])], 2)
    fit = goodness_of_fit(records, torch.tensor([[1.0, 0.0]]))
    assert fit.impossible == 1
    assert fit.worst == (0, (0,), (1,))


def test_bad_input_is_refused() -> None:
    several = simulate_records(systems.ising(2), Pauli6(), "up", [0.0, 0.5], 10)
    with pytest.raises(InvalidInputError, match="one time"):
        tomography(several, Pauli6())
    with pytest.raises(ShapeError, match="another measurement"):
        tomography(bell(10), Basis("Z"))
    with pytest.raises(SystemSizeError, match="too large"):
        tomography(torch.zeros(4, 7, dtype=torch.long), Tetrahedral())
    with pytest.raises(InvalidInputError, match="method is unknown"):
        tomography(bell(10), Pauli6(), method="inversion")
    with pytest.raises(InvalidInputError, match="outcomes must be integers"):
        tomography(torch.rand(4, 2), Tetrahedral())
