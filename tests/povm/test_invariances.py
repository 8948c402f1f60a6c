"""No answer depends on units, on the order of sites, on repetition, on other output times, on storage or on the form of data."""

from __future__ import annotations

import math
from typing import Any

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

from stochdyn import testing
from stochdyn.povm import (
    TDVP,
    Ansatz,
    AutoregressiveInteractions,
    AutoregressiveTransformer,
    AutoregressiveWindow,
    Combined,
    Descent,
    Fit,
    FullTable,
    Lindbladian,
    MeasurementRecords,
    Newton,
    Pauli6,
    Propagator,
    RecordLaw,
    RecordModel,
    Relaxation,
    SampledCoefficient,
    Tetrahedral,
    Trapezoid,
    capacity,
    classical_fidelity,
    ergotropy,
    evolve,
    exact,
    infer_parameters,
    mean_field,
    observable,
    positivity,
    purity,
    reduced_density,
    simulate_records,
    steady_state,
    total_variation,
    trace_distance,
    trajectories,
    von_neumann_entropy,
)

POVM = Tetrahedral()
F64 = torch.float64


def driven(unit: float = 1.0) -> Lindbladian:
    """Two sites with a drive and a pulse, in a unit of time."""
    return Lindbladian(
        2,
        [
            (0.5 / unit, "ZZ", (0, 1)),
            (lambda t: (math.cos(2 * t / unit) + (0.3 < t / unit < 0.4)) / unit, "X", 0),
        ],
        [(1 / unit, "sigma-", "all"), (lambda t: (1 + math.sin(t / unit)) / unit, "Z", 1)],
    )


def still(unit: float = 1.0) -> Lindbladian:
    return Lindbladian(
        2, [(0.5 / unit, "ZZ", (0, 1)), (0.5 / unit, "X", "all")], [(1 / unit, "sigma-", "all")]
    )


def network(n: int = 2) -> Ansatz:
    torch.manual_seed(0)
    net = AutoregressiveTransformer(n, layers=1, width=8, heads=2).double()
    return net.set_product_state(POVM, "up")


TIMES = torch.tensor([0.0, 0.35, 0.8], dtype=F64)
SOLVERS = {
    "matrix": lambda m, ts: exact.evolve(m, "up", ts, ["X", "ZZ"], backend="matrix").expect,
    "qutip": lambda m, ts: exact.evolve(m, "up", ts, ["X", "ZZ"], backend="qutip").expect,
    "propagate": lambda m, ts: {"p": exact.propagate(m, POVM, "up", ts)},
    "mean field": lambda m, ts: mean_field.evolve(m, "up", ts, ["X", "ZZ"]).expect,
    "propagator": lambda m, ts: {"p": Propagator(m, POVM, "up", ts)()},
    "records": lambda m, ts: {"p": simulate_records(m, POVM, "up", ts, 30, generator=0).outcomes},
    "trajectories": lambda m, ts: trajectories.evolve(
        m, "up", ts, ["X", "ZZ"], num_trajectories=10, generator=0, progress=False).expect,
}  # fmt: skip


@pytest.mark.parametrize("name", SOLVERS)
def test_exact_methods_have_no_unit_of_time(name: str) -> None:
    if name == "qutip":
        pytest.importorskip("qutip")
    testing.check_units(lambda unit: SOLVERS[name](driven(unit), unit * TIMES), (1e-12, 1e12))


METHODS = {"tdvp": TDVP(), "trapezoid": Trapezoid(steps=3), "fit": Fit(max_iterations=1)}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore::stochdyn.errors.ConvergenceWarning")
def test_evolutions_have_no_unit_of_time(name: str) -> None:
    def answer(unit: float) -> dict[str, Tensor]:
        run = evolve(
            network(), driven(unit), POVM, unit * TIMES[:2], METHODS[name], None, ["X", "ZZ"], progress=False
        )
        # a residual may be zero but for rounding
        return {**run.expect, "residual": 1 + run.residual, "t": run.steps["t"] / unit}

    testing.check_units(answer, (1e-12, 1e12), rtol=1e-6)


WAYS = {
    "combined": Combined(newton=Newton(4)),
    "newton": Newton(4),
    "tdvp": Relaxation(),
    "descent": Descent(steps=10),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in ("combined", "tdvp") else []) for name in WAYS],
)
@pytest.mark.filterwarnings("ignore::stochdyn.errors.ConvergenceWarning")
def test_steady_states_have_no_unit_of_time(name: str) -> None:
    def answer(unit: float) -> dict[str, Any]:
        way = WAYS[name]
        if isinstance(way, Relaxation):
            way = Relaxation(3.0 * unit)
        found = steady_state(network(), still(unit), POVM, way, None, ["X", "ZZ"], progress=False)
        return {
            **found.expect, "residual": found.residual * unit, "gap": found.gap * unit,
            "error": found.error_estimate,
        }  # fmt: skip

    testing.check_units(answer, (1e-12, 1e12), rtol=1e-5)


@pytest.mark.slow
def test_parameters_are_inferred_in_any_unit_of_time() -> None:
    model = Lindbladian(1, [("g", "X", 0)], [("decay", "sigma-", 0)])
    truth = simulate_records(model.bind(g=1.0, decay=0.5), POVM, "up", [0.3, 0.7], 500, generator=0)

    def answer(unit: float) -> dict[str, float]:
        records = MeasurementRecords(unit * truth.times, truth.time_index, truth.outcomes, 4)
        shift = math.log(unit)
        priors = {name: dist.LogNormal(torch.tensor(-shift, dtype=F64), 1.0) for name in ("g", "decay")}
        idata = infer_parameters(
            records, model, POVM, "up", priors, steps=20, num_draws=100, predictive=False, progress=False
        )
        return {name: unit * float(idata.posterior[name].mean()) for name in priors}

    testing.check_units(answer, (1e-12, 1e12), rtol=1e-6)


def test_work_is_in_the_unit_of_energy() -> None:
    m = torch.randn(4, 4, dtype=torch.complex128)
    rho, h = m @ m.mH / (m @ m.mH).diagonal().sum(), m + m.mH
    testing.check_units(lambda unit: [ergotropy(rho, unit * h) / unit, capacity(rho, unit * h) / unit])


FIELDS, RATES = torch.tensor([0.3, 1.1, 0.6], dtype=F64), torch.tensor([0.2, 0.5, 0.9], dtype=F64)


@pytest.mark.parametrize("name", ["matrix", "mean field", "trajectories"])
def test_sites_may_be_in_any_order(name: str) -> None:
    """A triangle whose sites differ: numbered otherwise, every site keeps its answer."""

    def answer(sites: Tensor) -> Tensor:
        bonds = [(0, 1), (1, 2), (2, 0)]
        model = Lindbladian(
            3,
            [(0.4, "ZZ", bonds), (sites[:, 0].tolist(), "X", "all")],
            [(sites[:, 1].tolist(), "sigma-", "all")],
        )
        specs = {str(i): ("Z", i) for i in range(3)}
        if name == "trajectories":
            run: Any = trajectories.evolve(
                model, "up", [0.0, 0.5], specs, num_trajectories=2000, generator=0, progress=False
            )
        elif name == "matrix":
            run = exact.evolve(model, "up", [0.0, 0.5], specs, backend="matrix")
        else:
            run = mean_field.evolve(model, "up", [0.0, 0.5], specs)
        return torch.stack([run.expect[str(i)][-1] for i in range(3)])

    # of 2000 trajectories the means differ by sampling: five standard errors of a difference are 0.15
    rtol = 0.2 if name == "trajectories" else 1e-9
    testing.check_order(answer, torch.stack([FIELDS, RATES], 1), equivariant=True, rtol=rtol)


@pytest.mark.parametrize("name", ["matrix", "propagate", "mean field", "propagator"])
def test_an_answer_depends_on_its_own_time_alone(name: str) -> None:
    ts = torch.linspace(0, 0.8, 5, dtype=F64)
    testing.check_question(
        lambda ts: next(iter(SOLVERS[name](driven(), ts).values())),
        ts,
        rtol=1e-7,
    )


@pytest.mark.slow
def test_a_network_is_where_it_is_whatever_else_was_asked() -> None:
    def answer(ts: Tensor) -> Tensor:
        return evolve(
            network(), driven(), POVM, ts, TDVP(tolerance=1e-5), None, ["Z"], progress=False
        ).expect["Z"]

    testing.check_question(answer, torch.linspace(0, 0.6, 5, dtype=F64), rtol=1e-4)


@pytest.mark.parametrize("name", SOLVERS)
def test_a_call_may_be_repeated(name: str) -> None:
    if name == "qutip":
        pytest.importorskip("qutip")
    model = driven()
    testing.check_repetition(lambda: SOLVERS[name](model, TIMES))


def test_a_sampled_run_may_be_repeated() -> None:
    model = driven()
    testing.check_repetition(
        lambda: evolve(network(), model, POVM, [0.0, 0.2], "tdvp", 50, ["Z"], progress=False).parameters
    )


def test_the_propagator_has_no_memory() -> None:
    """Parameters seen first, slow ones, must not decide on the steps for fast ones; nor where a pulse begins."""
    model = Lindbladian(1, [("g*cos(w*t)", "X", 0), (lambda t, s: 2.0 * (s < t < 1.5 * s), "Y", 0)])
    fast = {"g": 3.0, "w": 40.0, "s": 0.4}
    alone = Propagator(model, POVM, "up", [0.5, 1.0])(**fast)
    law = Propagator(model, POVM, "up", [0.5, 1.0])
    law(g=0.1, w=0.1, s=0.9)
    torch.testing.assert_close(law(**fast), alone, atol=1e-7, rtol=0)
    expected = exact.propagate(model.bind(**fast), POVM, "up", [0.0, 0.5, 1.0])[1:]
    torch.testing.assert_close(alone, expected, atol=1e-6, rtol=0)


def test_draws_of_parameters_don_t_depend_on_their_company() -> None:
    model = Lindbladian(1, [("g*cos(w*t)", "X", 0)], [("k", "sigma-", 0)])

    def answer(draws: Tensor) -> Tensor:
        law = Propagator(model, POVM, "up", [0.5, 1.0])
        return law(g=draws[:, 0], w=draws[:, 1], k=draws[:, 2])

    testing.check_company(answer, torch.tensor([1.0, 2.0, 0.3], dtype=F64), (1e-3, 1.0, 20.0), rtol=1e-6)


ANSATZE = {
    "table": lambda: FullTable(3),
    "transformer": lambda: AutoregressiveTransformer(3, layers=1, width=8, heads=2, strings="translations"),
    "window": lambda: AutoregressiveWindow(4, order=2),
    "interactions": lambda: AutoregressiveInteractions(3, bodies=3),
}


@pytest.mark.parametrize("name", ANSATZE)
def test_networks_can_be_stored_and_moved(name: str) -> None:
    net = ANSATZE[name]().double().set_product_state(POVM, "x+")
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    a = torch.randint(0, 4, (20, net.num_sites))

    def answer(net: Ansatz) -> list[Tensor]:
        drawn = net.sample(5, generator=0)[0]
        return [
            net.log_prob(a).detach(),
            drawn,
            net.representatives(a) if hasattr(net, "representatives") else drawn,
        ]

    testing.check_storage(net, answer)
    testing.check_device(ANSATZE[name]())


def test_laws_of_records_can_be_stored_and_moved() -> None:
    model = Lindbladian(1, [("g", "X", 0)], [("decay", "sigma-", 0)])
    law = Propagator(model, Pauli6(), "up", [0.3, 0.7])
    testing.check_storage(law, lambda law: law(g=1.0, decay=0.3))
    program = RecordModel(model, Pauli6(), "up", [0.3], {n: dist.LogNormal(0.0, 1.0) for n in ("g", "decay")})
    testing.check_storage(program, lambda m: m.probabilities({"g": 1.0, "decay": 0.3}))


def test_data_may_come_in_any_form() -> None:
    model = still()
    testing.check_forms(lambda ts: exact.evolve(model, "up", ts, ["Z"], backend="matrix").expect["Z"], TIMES)
    testing.check_forms(lambda ts: exact.propagate(model, POVM, "up", ts), TIMES)
    testing.check_forms(lambda ts: mean_field.evolve(model, "up", ts, ["Z"]).expect["Z"], TIMES)
    testing.check_forms(lambda ts: Propagator(model, POVM, "up", ts)(), TIMES)
    testing.check_forms(
        lambda ts: evolve(network(), model, POVM, ts, TDVP(dt=0.4), None, ["Z"], progress=False).expect["Z"],
        TIMES,
    )
    testing.check_forms(
        lambda ts: trajectories.evolve(
            model, "up", ts, ["Z"], num_trajectories=4, generator=0, progress=False
        ).expect["Z"],
        TIMES,
    )
    testing.check_forms(
        lambda v: torch.tensor(SampledCoefficient(TIMES, v)(0.5)), torch.tensor([0.0, 2.0, 1.0])
    )
    outcomes = torch.randint(0, 4, (6, 2))
    testing.check_forms(lambda a: MeasurementRecords.of([0.5], [a]).outcomes, outcomes)
    testing.check_forms(lambda a: MeasurementRecords.from_bits([0.5], ["XZ"] * 6, a).outcomes, outcomes % 2)


def test_derivatives_are_those_of_finite_differences() -> None:
    model = Lindbladian(1, [("g*cos(w*t)", "X", 0)], [("k", "sigma-", 0)])
    law = Propagator(model, POVM, "up", [0.4, 0.9])
    outcomes, times = torch.tensor([[0], [2], [3], [1]]), torch.tensor([0, 0, 1, 1])

    def likelihood(theta: Tensor) -> Tensor:
        return RecordLaw(law(g=theta[0], w=theta[1], k=theta[2]), times, 1).log_prob(outcomes).sum()

    testing.check_gradients(likelihood, torch.tensor([0.8, 1.5, 0.4], dtype=F64))


def test_states_and_samples_may_come_in_any_form() -> None:
    p = exact.propagate(still(), POVM, "up", [0.0, 0.5])[-1]
    a = torch.multinomial(p, 200, True)
    a = torch.stack([a // 4, a % 4], 1)
    rho = torch.diag(torch.tensor([0.7, 0.3], dtype=F64))
    for function in (
        lambda x: reduced_density(POVM, x, [0]),
        lambda x: purity(POVM, x).mean,
        lambda x: positivity(POVM, x, [(0,)], generator=0).lowest,
    ):
        testing.check_forms(function, a)
        testing.check_forms(function, p)
    for function in (
        lambda x: POVM.reconstruct(x).real,
        lambda x: total_variation(x, p),
        lambda x: classical_fidelity(p, x),
        lambda x: observable("ZZ", 2, bonds=[(0, 1)]).mean(POVM, x),
    ):
        testing.check_forms(function, p)
    for function in (
        von_neumann_entropy,
        lambda x: ergotropy(x, x),
        lambda x: trace_distance(x, rho),
        lambda x: observable("Z", 1).expectation(x),
        lambda x: Tetrahedral().probabilities(x),
        lambda x: Tetrahedral().coefficients(x),
    ):
        testing.check_forms(function, rho)
    testing.check_forms(von_neumann_entropy, torch.stack([rho, rho]))
    testing.check_forms(lambda x: observable("ZZ", 2, bonds=[(0, 1)]).estimate(POVM, x).mean, a)
