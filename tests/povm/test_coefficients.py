"""Coefficients as users write them, jumps that are correlated or collective, and what QuTiP's solvers take."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn.errors import LindbladianError
from stochdyn.povm import Lindbladian, Tetrahedral, all_to_all, exact, mean_field, named_operator
from stochdyn.povm.frames import full_operator, probabilities_of
from stochdyn.povm.lindblad import coefficient_value, read_coefficient, to_qutip
from stochdyn.povm.master import DensityGenerator, make_schedule

C128 = torch.complex128
VALUES = {"g": 0.7, "gamma": 2.0, "n": 0.25, "w": 3.0}
EXPRESSIONS = {
    "g": 0.7,
    "-g": -0.7,
    "2g": 1.4,
    "2 g": 1.4,
    "g*0.5": 0.35,
    "g/2": 0.35,
    "-0.5*g": -0.35,
    "gamma*(n+1)": 2.5,
    "1e1*g": 7.0,
    "g*cos(w*t)": 0.7 * math.cos(1.5),
    "exp(-t)": math.exp(-0.5),
    "2*pi": 2 * math.pi,
    "g**2 - n": 0.24,
    "sqrt(gamma)/g": math.sqrt(2) / 0.7,
}


@pytest.mark.parametrize("text", EXPRESSIONS)
def test_expressions_are_read(text) -> None:
    bound = read_coefficient(text, "a term").bind(VALUES)
    assert coefficient_value(bound, 0.5) == pytest.approx(EXPRESSIONS[text], rel=1e-12)


@pytest.mark.parametrize(
    "text", ["g h", "", "__import__('os')", "g.real", "[g]", "lambda: 1", "foo(g)", "'g'", "1/0*g"]
)
def test_other_code_is_refused(text) -> None:
    with pytest.raises(LindbladianError, match=r"can.t be read|finite"):
        read_coefficient(text, "a term")


@pytest.mark.parametrize(
    "function", [np.cos, math.cos, torch.cos, lambda t: np.cos(t), lambda t: [1, -1][int(t > 1)]]
)
def test_functions_of_any_library_are_called_without_warnings(function) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert coefficient_value(read_coefficient(function, "a term"), 0.3) == pytest.approx(
            float(function(torch.tensor(0.3, dtype=torch.float64) if function is torch.cos else 0.3))
        )


def test_functions_take_parameters_by_name() -> None:
    model = Lindbladian(1, [(lambda t, g, w: g * torch.cos(w * t), "X", 0)], [("gamma*(n+1)", "sigma-", 0)])
    assert model.parameters == ("g", "w", "gamma", "n")
    bound = model.bind(**VALUES)
    assert coefficient_value(bound.hamiltonian[0].coupling, 0.5) == pytest.approx(0.7 * math.cos(1.5))
    with pytest.raises(LindbladianError, match="bound first"):
        exact.evolve(model, "up", [0.0, 1.0])
    with pytest.raises(LindbladianError, match="a rate is negative"):
        model.bind(g=1.0, w=1.0, gamma=-1.0, n=0.0)


def test_a_coefficient_that_isn_t_finite_is_named() -> None:
    model = Lindbladian(1, [(lambda t: float("nan") if t > 0.5 else 1.0, "X", 0)])
    for backend in ("matrix", "qutip"):
        with pytest.raises(LindbladianError, match="finite"):
            exact.evolve(model, "up", [0.0, 1.0], backend=backend)


# ------------------------------------------------------------------ correlated and collective jumps


def dissipator(gamma: Tensor, operators: list[Tensor], rho: Tensor) -> Tensor:
    total = torch.zeros_like(rho)
    for i, a in enumerate(operators):
        for j, b in enumerate(operators):
            square = b.mH @ a
            total += gamma[i, j] * (a @ rho @ b.mH - 0.5 * (square @ rho + rho @ square))
    return total


def random_state(size: int) -> Tensor:
    m = torch.randn(size, size, dtype=C128)
    return m @ m.mH / (m @ m.mH).diagonal().sum()


@pytest.mark.parametrize("name", ["sigma-", "X", "P1"])
def test_correlated_rates_are_the_double_sum(name) -> None:
    n = 3
    root = torch.randn(n, n, dtype=C128)
    gamma = root @ root.mH
    model = Lindbladian(n, [(0.3, "XX", (0, 1))], [(gamma, name, [0, 1, 2]), (0.4, "Z", 1)])
    places = [torch.from_numpy(full_operator(named_operator(name), (i,), n, 2).toarray()) for i in range(n)]
    z = torch.from_numpy(full_operator(named_operator("Z"), (1,), n, 2).toarray())
    h = 0.3 * torch.from_numpy(full_operator(named_operator("XX"), (0, 1), n, 2).toarray())
    rho = random_state(8)
    expected = -1j * (h @ rho - rho @ h) + dissipator(gamma, places, rho) + 0.4 * (z @ rho @ z - rho)
    frames = [Tetrahedral()] * n
    change = model.master_operator(Tetrahedral()).apply(probabilities_of(rho, frames))
    torch.testing.assert_close(change, probabilities_of(expected, frames), atol=1e-12, rtol=0)

    torch.testing.assert_close(
        torch.from_numpy(DensityGenerator(model)(0.0, rho.numpy())), expected, atol=1e-12, rtol=0
    )


def collective(n: int) -> Lindbladian:
    return Lindbladian(n, [], [(torch.ones(n, n), "sigma-", list(range(n)))])


def test_superradiance_in_every_form_is_one_model() -> None:
    n = 6
    total = sum(
        torch.from_numpy(full_operator(named_operator("sigma-"), (i,), n, 2).toarray()) for i in range(n)
    )
    pairs = named_operator("- I") + named_operator("I -")
    forms = {
        "rates": collective(n),
        "operator": Lindbladian(n, [], [(1.0, total, tuple(range(n)))]),
        "pairs": Lindbladian(n, [], [(1.0, pairs, all_to_all(n)), (-(n - 2.0), "sigma-", "all")]),
    }
    found = {}
    for name, model in forms.items():
        p = exact.propagate(model, Tetrahedral(), "up", [0.0, 0.5])
        found[name] = float(exact.evolve(model, "up", [0.0, 0.5], ["Z"], backend="matrix").expect["Z"][-1])
        mean = float(p[-1].reshape(4, -1).sum(1) @ Tetrahedral().coefficients("Z"))
        assert mean == pytest.approx(found[name], abs=1e-9)
    # the symmetric ladder: dP_m/dt with rates (J+m)(J-m+1), J = 3
    j = n / 2
    m = torch.arange(j, -j - 1, -1, dtype=torch.float64)
    out = (j + m) * (j - m + 1)
    ladder = torch.diag(-out) + torch.diag(out[:-1], -1)
    truth = float((torch.matrix_exp(0.5 * ladder)[:, 0] * m).sum() * 2 / n)
    assert found == pytest.approx(dict.fromkeys(forms, truth), abs=1e-8)


def test_negative_rates_must_be_physical_together() -> None:
    with pytest.raises(LindbladianError, match="aren't completely positive"):
        Lindbladian(2, [], [(1.0, "X", 0), (-0.1, "sigma-", 0)])
    with pytest.raises(LindbladianError, match="must be positive"):
        Lindbladian(2, [], [([[1.0, 2.0], [2.0, 1.0]], "sigma-", [0, 1])])
    with pytest.raises(LindbladianError, match="isn't Hermitian"):
        Lindbladian(2, [], [([[1.0, 0.5], [0.2, 1.0]], "sigma-", [0, 1])])
    with pytest.raises(LindbladianError, match="each pair"):
        Lindbladian(3, [], [([[1.0, 0.5], [0.5, 1.0]], "sigma-", [0, 1, 2])])
    with pytest.raises(LindbladianError, match="sum of operators on one or two"):
        Lindbladian(6, [], [(1.0, named_operator("------"), tuple(range(6)))])
    # X and Y jumps at rate 1 minus sigma- at rate 1 are sigma+ at rate 1 and a shift: written with an identity
    model = Lindbladian(1, [], [(1.0, "X", 0), (1.0, "Y", 0), (-1.0, "sigma-", 0)])
    rho = random_state(2)
    plain = {"X": 1.0, "Y": 1.0, "sigma-": -1.0}
    expected = sum(r * dissipator(torch.ones(1, 1), [named_operator(k)], rho) for k, r in plain.items())
    change = model.master_operator(Tetrahedral()).apply(Tetrahedral().probabilities(rho))
    torch.testing.assert_close(Tetrahedral().reconstruct(change), expected, atol=1e-12, rtol=0)


def test_identities_in_a_jump_only_shift_the_hamiltonian() -> None:
    c = named_operator("sigma-") + 0.3j * named_operator("I")
    model = Lindbladian(1, [], [(2.0, c, 0), (-0.5, "sigma-", 0)])
    rho = random_state(2)
    expected = 2 * dissipator(torch.ones(1, 1), [c], rho)
    expected = expected - 0.5 * dissipator(torch.ones(1, 1), [named_operator("sigma-")], rho)
    change = model.master_operator(Tetrahedral()).apply(Tetrahedral().probabilities(rho))
    torch.testing.assert_close(Tetrahedral().reconstruct(change), expected, atol=1e-12, rtol=0)


# ------------------------------------------------------------------ QuTiP


def test_lists_and_functions_of_qutip_are_models() -> None:
    qutip = pytest.importorskip("qutip")
    z, x = qutip.tensor(qutip.sigmaz(), qutip.sigmaz()), qutip.tensor(qutip.sigmax(), qutip.qeye(2))
    c = qutip.tensor(qutip.qeye(2), qutip.sigmam())
    ts = [0.0, 0.5, 1.5]
    start = qutip.tensor(qutip.basis(2, 0), qutip.basis(2, 0))
    forms = [
        ([0.5 * z, [x, lambda t: math.cos(2 * t)]], [c]),
        ([0.5 * z, [x, "cos(2*t)"]], [[c, lambda t: 1 + t]]),
        (qutip.QobjEvo([0.5 * z, [x, lambda t: math.cos(2 * t)]]), [qutip.QobjEvo([c, lambda t: 1 + t])]),
        (0.5 * z, [c, x]),
    ]
    for h, collapse in forms:
        model = Lindbladian.from_qutip(h, collapse)
        theirs = (
            [h[0], [x, lambda t: math.cos(2 * t)]] if isinstance(h, list) else h
        )  # strings would be compiled
        right = qutip.mesolve(
            theirs, start, ts, collapse, e_ops=[x], options={"rtol": 1e-10, "atol": 1e-12}
        ).expect[0]
        mine = exact.evolve(model, start, ts, {"x": ("X", 0)}, backend="matrix").expect["x"]
        np.testing.assert_allclose(mine.numpy(), right, atol=1e-7)
        if isinstance(h, qutip.Qobj):
            again = Lindbladian.from_qutip(*to_qutip(model))
            assert again.bonds == model.bonds
    whole = sum(
        qutip.tensor([qutip.sigmam() if i == k else qutip.qeye(2) for i in range(6)]) for k in range(6)
    )
    assert len(Lindbladian.from_qutip(0 * whole, [whole]).jumps) == 1


def test_mean_field_follows_correlated_decay() -> None:
    """For two atoms that start in the same state the pair rates act as a Rabi field of the other's coherence."""
    run = mean_field.evolve(collective(2), "up", [0.0, 1.0], ["Z"])
    alone = mean_field.evolve(Lindbladian(1, [], [(1.0, "sigma-", 0)]), "up", [0.0, 1.0], ["Z"])
    torch.testing.assert_close(run.expect["Z"], alone.expect["Z"], atol=1e-7, rtol=0)


@pytest.mark.parametrize(
    ("function", "value"),
    [
        (lambda t: math.cos(t) + (0.3 < t < 0.4), math.cos(0.35) + 1),
        (lambda t: torch.tensor(0.5) * t**2, 0.5 * 0.35**2),
        (lambda t: torch.exp(-t), math.exp(-0.35)),
        (lambda t: (t > 0.3) * 1.1, 1.1),
    ],
)
def test_functions_of_time_keep_double_precision(function, value) -> None:
    """Rounding to seven digits would be noise that a method of order eight follows with steps of no length."""
    assert coefficient_value(read_coefficient(function, "a term"), 0.35) == pytest.approx(value, rel=1e-14)


def test_a_pulse_beside_a_drive_is_integrated_in_few_steps() -> None:
    model = Lindbladian(1, [(lambda t: math.cos(2 * t) + (0.3 < t < 0.4), "X", 0)], [(0.5, "sigma-", 0)])
    generator, calls = DensityGenerator(model), 0
    plain = DensityGenerator.__call__

    def counted(self, t, rho):
        nonlocal calls
        calls += 1
        return plain(self, t, rho)

    schedule = make_schedule(model, torch.tensor([0.0, 1.0], dtype=torch.float64))
    DensityGenerator.__call__ = counted
    try:
        generator.integrate(
            torch.diag(torch.tensor([1.0, 0.0], dtype=torch.complex128)), schedule, lambda i, r: None
        )
    finally:
        DensityGenerator.__call__ = plain
    assert calls < 3000


def test_models_with_expressions_are_saved(tmp_path) -> None:
    model = Lindbladian(2, [("2*g", "X", "all"), ("g*cos(w*t)", "Z", 0)], [("gamma*(n+1)", "sigma-", "all")])
    sd.save(model, tmp_path / "model")
    values = {"g": 0.7, "w": 2.0, "gamma": 0.1, "n": 0.3}
    one, other = (
        exact.evolve(m.bind(**values), "up", [0.0, 1.0], ["Z"]).expect["Z"]
        for m in (model, sd.load(tmp_path / "model"))
    )
    assert torch.equal(one, other)
    with pytest.raises(ValueError, match="unknown function"):
        type(read_coefficient("g*t", "x").function).from_storage({"text": "print(g)"})
