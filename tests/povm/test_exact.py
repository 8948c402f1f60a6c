"""Exact methods against shipped numbers, QuTiP, each other and closed forms."""

from __future__ import annotations

import math

import pytest
import torch

from stochdyn.datasets import open_systems
from stochdyn.errors import (
    ConvergenceWarning,
    InvalidInputError,
    LindbladianError,
    ShapeError,
    SystemSizeError,
    TimeGridError,
)
from stochdyn.povm import (
    FourPauli,
    Lindbladian,
    QutritSIC,
    SiteFrames,
    Tetrahedral,
    exact,
    observables,
    ring,
    systems,
)
from stochdyn.povm.frames import partial_trace
from stochdyn.povm.master import DensityGenerator, initial_density

F64, C128 = torch.float64, torch.complex128
NAMES = ["X", "Y", "Z", "XX", "YY", "ZZ"]
FRAMES = [Tetrahedral(), Tetrahedral(rotated=False), FourPauli()]
SMALL = [
    ("ising_ring", 4, {}),
    ("xyz_ring", 4, {"initial": "y-"}),
    ("xyz_ring", 4, {"initial": "z+"}),
    ("dephasing_ring", 4, {}),
    ("commuting_ring", 5, {"dephasing": 0.0}),
    ("commuting_ring", 4, {"dephasing": 0.25}),
    ("free_sites", 2, {}),
]


def deviation(expect, run) -> float:
    names = [n for n in NAMES if n in run.expect]
    return max(float((expect[n] - run.expect[n]).abs().max()) for n in names)


def names_of(run) -> list[str]:
    return [n for n in NAMES if n in run.expect]


@pytest.mark.parametrize(("system", "n", "which"), SMALL)
def test_the_density_matrix_follows_the_shipped_numbers(system, n, which) -> None:
    model, run = systems.reference(system, n, **which)
    mine = exact.evolve(model, run.initial, run.times, names_of(run), backend="matrix")
    assert deviation(mine.expect, run) < 1e-10


@pytest.mark.parametrize("povm", FRAMES, ids=lambda f: f.name)
@pytest.mark.parametrize(("system", "n", "which"), SMALL)
def test_outcome_probabilities_follow_the_shipped_numbers(system, n, which, povm) -> None:
    model, run = systems.reference(system, n, **which)
    p = exact.propagate(model, povm, run.initial, run.times)
    expect = observables(names_of(run), n, bonds=model.bonds)
    assert deviation({name: o.mean(povm, p) for name, o in expect.items()}, run) < 1e-10
    assert float((p.sum(1) - 1).abs().max()) < 1e-12


@pytest.mark.parametrize(("system", "n", "which"), [s for s in SMALL if s[0] != "free_sites"])
def test_qutip_agrees_state_by_state(system, n, which) -> None:
    pytest.importorskip("qutip")
    model, run = systems.reference(system, n, **which)
    times = run.times[:5]
    theirs = exact.evolve(model, run.initial, times, names_of(run), backend="qutip", keep_states=True)
    assert theirs.backend == "qutip"
    p = exact.propagate(model, Tetrahedral(), run.initial, times)
    mine = torch.stack([Tetrahedral().probabilities(rho) for rho in theirs.states])
    assert float((p - mine).abs().max()) < 1e-10


@pytest.mark.slow
@pytest.mark.parametrize("povm", FRAMES, ids=lambda f: f.name)
@pytest.mark.parametrize(
    ("system", "initial"), [("ising_ring", "up"), ("xyz_ring", "y-"), ("commuting_ring", "x+")]
)
def test_six_sites(system, initial, povm) -> None:
    model, run = systems.reference(system, 6, initial=initial)
    p = exact.propagate(model, povm, run.initial, run.times)
    expect = observables(NAMES, 6, bonds=model.bonds)
    assert deviation({name: o.mean(povm, p) for name, o in expect.items()}, run) < 1e-10


@pytest.mark.slow
def test_the_torus() -> None:
    """The shipped numbers of nine sites are good to 1e-7."""
    model, run = systems.reference("xyz_torus", 9)
    keep = run.times <= 0.5
    mine = exact.evolve(model, run.initial, run.times[keep], NAMES, backend="matrix", rtol=1e-9, atol=1e-11)
    assert max(float((mine.expect[n] - run.expect[n][keep]).abs().max()) for n in NAMES) < 1e-7
    qutip = exact.evolve(model, run.initial, run.times[keep], NAMES, rtol=1e-9, atol=1e-11)
    assert max(float((mine.expect[n] - qutip.expect[n]).abs().max()) for n in NAMES) < 1e-7


@pytest.mark.slow
def test_the_torus_in_outcome_space_is_that_of_qutip() -> None:
    pytest.importorskip("qutip")
    model, _ = systems.reference("xyz_torus", 9)
    theirs = exact.evolve(model, "up", [0.0, 0.16], NAMES, backend="qutip")
    p = exact.propagate(model, Tetrahedral(), "up", [0.0, 0.16])
    for name, o in observables(NAMES, 9, bonds=model.bonds).items():
        assert abs(float(o.mean(Tetrahedral(), p[1]) - theirs.expect[name][1])) < 1e-10


def test_propagation_without_a_matrix_is_that_with_one(monkeypatch) -> None:
    model = systems.xyz(4, 1.0, 0.3, -0.5, field=0.2)
    times = [0.0, 0.5, 2.0]
    with_matrix = exact.propagate(model, FourPauli(), "x+", times)
    monkeypatch.setattr("stochdyn.povm.master.propagation._MAX_MATRIX", 1)
    without = exact.propagate(model, FourPauli(), "x+", times)
    torch.testing.assert_close(without, with_matrix, atol=1e-13, rtol=0)


@pytest.mark.parametrize("field", [0.5, 1.0, 2.0, 4.0])
def test_steady_states_are_the_shipped_ones(field: float) -> None:
    model, run = systems.reference("ising_ring", 4, steady=True, field=field)
    found = exact.steady_state(model, NAMES)
    assert deviation(found.expect, run) < 1e-10
    assert found.residual < 1e-11


def test_the_steady_state_by_evolution_is_that_of_the_solve() -> None:
    model = systems.xyz(3, 2.0, 0.5, 1.0, field=1.0)
    solved = exact.steady_state(model, NAMES)
    from stochdyn.povm.exact import _evolve_to_rest

    rho = _evolve_to_rest(DensityGenerator(model), model, 1e-9, 100.0)
    torch.testing.assert_close(rho, solved.state, atol=1e-8, rtol=0)


def test_a_single_site_is_the_bloch_equation() -> None:
    """Reiter: decay and drive of one spin, whose mean obeys a linear equation with a closed matrix exponential."""
    g, rate = 1.3, 0.7
    model = Lindbladian(1, [(g / 2, "X", 0)], [(rate, "sigma-", 0)])
    times = torch.linspace(0, 3, 7, dtype=F64)
    run = exact.evolve(model, "y+", times, ["X", "Y", "Z"], backend="matrix")
    a = torch.tensor([[-rate / 2, 0, 0], [0, -rate / 2, -g], [0, g, -rate]], dtype=F64)
    b = torch.tensor([0, 0, -rate], dtype=F64)
    rest = torch.linalg.solve(a, -b)
    for i, t in enumerate(times):
        spin = torch.matrix_exp(a * t) @ (torch.tensor([0, 1.0, 0], dtype=F64) - rest) + rest
        mine = torch.stack([run.expect[n][i] for n in "XYZ"])
        torch.testing.assert_close(mine, spin, atol=1e-10, rtol=0)


def test_dephasing_with_a_field_is_the_closed_form() -> None:
    """H = 3X, dephasing of rate 1, from y+."""
    w = math.sqrt(35)
    times = torch.linspace(0, 2, 9, dtype=F64)
    model = Lindbladian(1, [(3.0, "X", 0)], [(1.0, "Z", 0)])
    run = exact.evolve(model, "y+", times, ["Y", "Z"], backend="matrix")
    decay = torch.exp(-times)
    torch.testing.assert_close(run.expect["Y"], (torch.cos(w * times) - torch.sin(w * times) / w) * decay)
    torch.testing.assert_close(run.expect["Z"], 6 / w * torch.sin(w * times) * decay)


def driven() -> Lindbladian:
    return Lindbladian(
        2,
        [
            (lambda t: 1 + torch.sin(3 * torch.as_tensor(t)), "X", "all"),
            (0.7, "ZZ", (0, 1)),
            ("0.5*h", "Y", 1),
        ],
        [(lambda t: 0.5 + 0.2 * torch.as_tensor(t), "sigma-", "all")],
    ).bind(h=0.8)


def test_time_dependent_coefficients() -> None:
    times = [0.0, 0.3, 1.0, 2.0]
    mine = exact.evolve(driven(), ["up", "x-"], times, ["X", "ZZ"], backend="matrix", keep_states=True)
    p = exact.propagate(driven(), Tetrahedral(), ["up", "x-"], times)
    other = torch.stack([Tetrahedral().probabilities(rho) for rho in mine.states])
    assert float((p - other).abs().max()) < 1e-10
    pytest.importorskip("qutip")
    theirs = exact.evolve(driven(), ["up", "x-"], times, ["X", "ZZ"], backend="qutip")
    for name in ("X", "ZZ"):
        torch.testing.assert_close(mine.expect[name], theirs.expect[name], atol=1e-9, rtol=0)


def test_three_levels_and_frames_by_site() -> None:
    model = Lindbladian(2, [(0.5, "Sz Sz", (0, 1)), (0.3, "Sx", "all")], [(0.8, "S-", "all")], dim=3)
    start = [torch.tensor([1.0, 0, 0]), torch.tensor([0.6, 0.8, 0])]
    run = exact.evolve(model, start, [0.0, 1.0], ["Sz"], keep_states=True)
    p = exact.propagate(model, QutritSIC(), start, [0.0, 1.0])
    torch.testing.assert_close(QutritSIC().probabilities(run.states[1]), p[1], atol=1e-10, rtol=0)
    model, reference = systems.reference("ising_ring", 4)
    povm = SiteFrames([Tetrahedral(), FourPauli()] * 2)
    p = exact.propagate(model, povm, "up", reference.times[:4])
    mean = observables(["Z"], 4)["Z"].mean(povm, p)
    assert float((mean - reference.expect["Z"][:4]).abs().max()) < 1e-10


def test_initial_states() -> None:
    rho = initial_density(["up", torch.tensor([1.0, 1.0]), "mixed"], 3)
    torch.testing.assert_close(partial_trace(rho, (1,)).real, torch.full((2, 2), 0.5, dtype=F64))
    bell = torch.tensor([1.0, 0, 0, 1.0])
    torch.testing.assert_close(initial_density(bell, 2).real[0], torch.tensor([0.5, 0, 0, 0.5], dtype=F64))
    p = torch.full((16,), 1 / 16, dtype=F64)
    q = exact.propagate(systems.ising(2), Tetrahedral(), p, [0.0, 1.0])
    torch.testing.assert_close(q[1], exact.propagate(systems.ising(2), Tetrahedral(), "mixed", [0.0, 1.0])[1])


ISING = systems.ising(2)
BAD = {
    "times that don't increase": (
        lambda: exact.evolve(ISING, "up", [0.0, 1.0, 1.0]), TimeGridError, r"ts\[2\]=1 after ts\[1\]=1"),
    "times that fall": (
        lambda: exact.propagate(ISING, Tetrahedral(), "up", [1.0, 0.0]), TimeGridError, "increase strictly"),
    "an observable on a missing site": (
        lambda: exact.evolve(ISING, "up", [0.0, 1.0], {"z": ("Z", 2)}), LindbladianError, "sites 0 to 1"),
    "too many sites": (
        lambda: exact.evolve(systems.ising(20), "up", [0.0, 1.0]), SystemSizeError, "too large for exact"),
    "too many outcomes": (
        lambda: exact.propagate(systems.ising(11), Tetrahedral(), "up", [0.0, 1.0]), SystemSizeError, r"4\*\*11"),
    "a list of outcomes that is too long": (
        lambda: systems.ising(16).master_operator(Tetrahedral()).to_sparse(), SystemSizeError, "too many outcomes"),
    "a state of another lattice": (
        lambda: exact.evolve(ISING, torch.eye(8) / 8, [0.0, 1.0]), ShapeError, "2 or 4 levels"),
    "too few states": (lambda: exact.evolve(ISING, ["up"], [0.0, 1.0]), InvalidInputError, "one state for each site"),
    "an unknown state": (lambda: exact.evolve(ISING, "left", [0.0, 1.0]), InvalidInputError, "unknown state"),
    "probabilities of another lattice": (
        lambda: exact.propagate(ISING, Tetrahedral(), torch.ones(4) / 4, [0.0, 1.0]), ShapeError, "expected 16"),
    "an unbound parameter": (
        lambda: exact.evolve(Lindbladian(1, [("g", "X", 0)]), "up", [0.0, 1.0], ["Z"], backend="matrix"),
        LindbladianError, "bound first; got g"),
    "a rate that becomes negative": (
        lambda: exact.evolve(Lindbladian(1, [], [(lambda t: 1 - t, "sigma-", 0)]), "up", [0.0, 1.0, 2.0], ["Z"]),
        LindbladianError, "negative at time 2"),
    "an unknown backend": (
        lambda: exact.evolve(ISING, "up", [0.0, 1.0], backend="cray"), InvalidInputError, "backend is unknown"),
    "several steady states": (
        lambda: exact.steady_state(Lindbladian(2, [(1.0, "ZZ", ring(2))], [(1.0, "Z", "all")])),
        InvalidInputError, "isn't unique"),
    "an unknown system": (lambda: systems.build("graphene", 4), InvalidInputError, "system is unknown"),
    "a size that isn't on file": (
        lambda: systems.reference("ising_ring", 5), InvalidInputError, "no exact numbers"),
}  # fmt: skip


@pytest.mark.parametrize("row", BAD.values(), ids=BAD.keys())
def test_bad_input(row) -> None:
    with pytest.raises(row[1], match=row[2]):
        row[0]()


def test_a_steady_state_that_isn_t_reached_warns() -> None:
    model = Lindbladian(1, [(0.5, "Sx", 0)], [(1e-3, "S-", 0)], dim=3)
    with pytest.warns(ConvergenceWarning, match="isn't reached"):
        exact.steady_state(model, ["Sz"], horizon=5.0)


def test_every_system_on_file_can_be_built() -> None:
    for kind in ("dynamics", "steady"):
        for run in open_systems(kind):
            model = systems.build(run.system, run.num_sites or 4, **run.parameters)
            assert model.num_sites == (run.num_sites or 4)


@pytest.mark.slow
def test_the_steady_state_of_seven_free_qubits_is_that_of_one() -> None:
    def solve(n: int) -> dict[str, torch.Tensor]:
        model = Lindbladian(n, [(0.5, "X", "all")], [(1.0, "sigma-", "all")])
        return exact.steady_state(model, ["X", "Y", "Z"]).expect

    for seven, one in zip(solve(7).values(), solve(1).values(), strict=True):
        assert abs(float(seven - one)) < 1e-8


def test_several_steady_states_of_seven_qubits_are_noticed() -> None:
    """Dephasing alone keeps every population."""
    with pytest.raises(InvalidInputError, match="isn't unique"):
        exact.steady_state(Lindbladian(7, [(1.0, "ZZ", ring(7))], [(1.0, "Z", "all")]))


def test_steady_states_of_qutrits_are_solved_for() -> None:
    """A driven ladder of three levels, against a long evolution."""
    model = Lindbladian(2, [(1.0, "Sx", "all"), (0.4, "Sz Sz", (0, 1))], [(1.0, "S-", "all")], dim=3)
    steady = exact.steady_state(model, ["Sz"])
    late = exact.evolve(model, "mixed", [0.0, 60.0], ["Sz"], backend="matrix").expect["Sz"][-1]
    assert abs(float(steady.expect["Sz"] - late)) < 1e-8
