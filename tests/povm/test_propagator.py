"""The differentiable propagator against exact propagation, finite differences and closed forms."""

from __future__ import annotations

import pytest
import torch

from stochdyn.errors import (
    InvalidInputError,
    SystemSizeError,
    TimeGridError,
    UnknownSiteError,
)
from stochdyn.povm import (
    Basis,
    FourPauli,
    Frame,
    Lindbladian,
    Pauli6,
    Propagator,
    SiteFrames,
    Tetrahedral,
    Unmeasured,
    exact,
    ring,
    systems,
)

F64 = torch.float64
TIMES = [0.3, 0.6, 1.0]


def model(n: int = 2) -> Lindbladian:
    return Lindbladian(
        n,
        [("0.5*field", "X", "all"), (0.4, "ZZ", ring(n)), ("field", "Y", 0)],
        [("decay", "sigma-", "all"), (0.1, "Z", 1)],
    )


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("times", [TIMES, [0.0, 0.5, 2.0]])
def test_it_is_exact_propagation(n: int, times: list[float]) -> None:
    """Four sites go by the action of the exponential, two by the exponential itself."""
    law = Propagator(model(n), FourPauli(), "x+", times)
    assert law.names == ("field", "decay")
    p = law(field=0.9, decay=0.7)
    padded = times if times[0] == 0 else [0.0, *times]
    expected = exact.propagate(model(n).bind(field=0.9, decay=0.7), FourPauli(), "x+", padded)
    torch.testing.assert_close(p, expected[-len(times) :], atol=1e-12, rtol=0)


def test_batches() -> None:
    law = Propagator(model(), Tetrahedral(), "up", TIMES)
    field, decay = torch.rand(5, 1, dtype=F64), torch.rand(3, dtype=F64)
    p = law(field=field, decay=decay)
    assert p.shape == (5, 3, 3, 16)
    torch.testing.assert_close(p[4, 2], law(field=field[4, 0], decay=decay[2]))


@pytest.mark.parametrize("n", [1, 4])
def test_derivatives(n: int) -> None:
    couplings = [(0.3, "ZZ", ring(n))] if n > 1 else []
    small = Lindbladian(n, [("g", "X", "all"), *couplings], [("decay", "sigma-", "all")])
    law = Propagator(small, Tetrahedral(), "up", [0.4, 1.1])

    def mean(g: torch.Tensor, decay: torch.Tensor) -> torch.Tensor:
        return law(g=g, decay=decay)[:, :4]

    point = [torch.tensor(v, dtype=F64, requires_grad=True) for v in (0.8, 0.5)]
    assert torch.autograd.gradcheck(mean, point)


def test_imperfect_detectors_are_frames() -> None:
    """A detector that calls a tenth of outcomes by another name."""
    confusion = 0.9 * torch.eye(4, dtype=F64) + 0.025
    effects = torch.einsum("ab,bij->aij", confusion.to(torch.complex128), Tetrahedral().effects)
    noisy = Propagator(Lindbladian(1, [("g", "X", 0)]), Frame(effects), "up", [0.5])
    clean = Propagator(Lindbladian(1, [("g", "X", 0)]), Tetrahedral(), "up", [0.5])
    torch.testing.assert_close(noisy(g=1.0), clean(g=1.0) @ confusion.T)


def test_fixed_values_stay_in() -> None:
    bound = model().bind(decay=torch.tensor(0.7, dtype=F64, requires_grad=True))
    law = Propagator(bound, Tetrahedral(), "up", TIMES)
    torch.testing.assert_close(
        law(field=0.9), Propagator(model(), Tetrahedral(), "up", TIMES)(field=0.9, decay=0.7)
    )


DRIVEN = [("g*cos(w*t)", "X", "all"), (0.3, "ZZ", (0, 1)), (lambda t, g: g * (0.31 < t < 0.57), "Y", 0)]


def test_drives_with_parameters_and_pulses_are_followed() -> None:
    small = Lindbladian(2, DRIVEN, [("gamma*(n+1)", "sigma-", "all"), ("gamma*n", "sigma+", "all")])
    law = Propagator(small, Pauli6(), "up", TIMES)
    values = {"g": 1.3, "w": 2.0, "gamma": 0.5, "n": 0.4}
    bound = small.bind(**values)
    expected = exact.propagate(bound, Pauli6(), "up", [0.0, *TIMES])[1:]
    torch.testing.assert_close(law(**values), expected, atol=1e-7, rtol=0)
    point = [torch.tensor(v, dtype=F64, requires_grad=True) for v in values.values()]
    assert torch.autograd.gradcheck(
        lambda g, w, gamma, n: law(g=g, w=w, gamma=gamma, n=n)[:, :3], point, eps=1e-5, atol=1e-5
    )


def test_measurements_need_not_be_complete() -> None:
    """Of two sites one is measured in one basis and the other not at all; a third of Pauli-6 is a basis."""
    small = model()
    values = {"field": 0.9, "decay": 0.7}
    partial = Propagator(small, SiteFrames([Basis("Z"), Unmeasured()]), "up", TIMES)(**values)
    whole = Propagator(small, Pauli6(), "up", TIMES)(**values).reshape(-1, 6, 6)
    torch.testing.assert_close(partial.reshape(-1, 2, 2)[..., 0], 3 * whole[:, 4:].sum(2))
    assert float(partial.reshape(-1, 2, 2)[..., 1].abs().max()) == 0


BAD = {
    "a missing value": (
        lambda: Propagator(model(), Tetrahedral(), "up", TIMES)(field=1.0), UnknownSiteError, "no value.*'decay'"),
    "an unknown value": (
        lambda: Propagator(model(), Tetrahedral(), "up", TIMES)(field=1.0, decay=1.0, g=1.0),
        UnknownSiteError, "no parameter 'g'"),
    "too many sites": (
        lambda: Propagator(systems.ising(9), Tetrahedral(), "up", TIMES), SystemSizeError, "eight qubits"),
    "no frame": (lambda: Propagator(systems.ising(2), "tetra", "up", TIMES), InvalidInputError, "povm has the wrong type"),
    "no model": (lambda: Propagator("m", Tetrahedral(), "up", TIMES), InvalidInputError, "model has the wrong type"),
    "times that fall": (
        lambda: Propagator(model(), Tetrahedral(), "up", [1.0, 0.5]), TimeGridError, "increase strictly"),
    "a time before the start": (
        lambda: Propagator(model(), Tetrahedral(), "up", [-1.0, 0.5]), TimeGridError, "start at zero"),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD.values(), ids=BAD.keys())
def test_bad_input(row) -> None:
    with pytest.raises(row[1], match=row[2]):
        row[0]()
