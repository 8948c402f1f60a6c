"""Evolutions follow the exact answer by every method, resume to the same bits, and refuse what can't be."""

from __future__ import annotations

import math
import os
import signal
import warnings
from functools import partial

import pytest
import torch
from torch import nn

import stochdyn as sd
from stochdyn.errors import (
    ConvergenceWarning,
    ForeignCheckpointError,
    InvalidInputError,
    LindbladianError,
    SystemSizeError,
    TimeGridError,
)
from stochdyn.povm import TDVP, Fit, Trapezoid, evolve, exact
from stochdyn.povm.systems import ising, reference

POVM = sd.povm.Tetrahedral()
RING = "translations+reflections"


def net(
    sites: int, strings: str | None = RING, state: str = "up", **sizes: int
) -> sd.povm.AutoregressiveTransformer:
    torch.manual_seed(0)
    shape = {"layers": 1, "width": 12, "heads": 2, **sizes}
    made = sd.povm.AutoregressiveTransformer(sites, strings=strings, **shape).double()
    return made.set_product_state(POVM, state)


def errors(run: sd.povm.Evolution, model: sd.povm.Lindbladian, state: str) -> torch.Tensor:
    truth = exact.evolve(model, state, run.times, list(run.expect)).expect
    return torch.stack([(run.expect[name] - truth[name]).abs() for name in run.expect])


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        ("tdvp", 5e-3),
        (TDVP(dt=0.05), 5e-3),
        ("fit", 5e-3),
        (Trapezoid(dt=0.15, steps=80), 2e-2),
        (Trapezoid(dt=0.15, steps=80, norm="l2"), 2e-2),
    ],
)
def test_full_summation_follows_the_exact_evolution(method: str | TDVP | Trapezoid, bound: float) -> None:
    """Two sites in transit; without any randomness, so a second run gives the same numbers."""
    model = ising(2)
    times = [0.0, 0.15, 0.3]
    run = evolve(net(2), model, POVM, times, method, None, progress=False)
    assert float(errors(run, model, "up").max()) < bound
    if not isinstance(method, Trapezoid):
        again = evolve(net(2), model, POVM, times, method, None, progress=False, seed=5)
        assert all(torch.equal(run.expect[name], again.expect[name]) for name in "XYZ")
    assert all(float(v.max()) == 0 for v in run.stderr.values())


@pytest.mark.parametrize("method", ["tdvp", "fit"])
@pytest.mark.parametrize("strings", [None, RING])
def test_sampling_follows_the_exact_evolution(method: str, strings: str | None) -> None:
    """Four sites, 1000 draws: errors of a hundredth at most, as the sampling allows."""
    model = ising(4)
    run = evolve(net(4, strings), model, POVM, [0.0, 0.25, 0.5], method, 1000, progress=False)
    assert float(errors(run, model, "up").max()) < 1.2e-2
    assert float(run.stderr["Z"].max()) < 0.02
    assert run.residual[0] == 0
    assert 0 < float(run.residual[-1]) < 0.3


def test_a_product_ansatz_is_exact_without_couplings() -> None:
    """Sites that don't interact stay a product, which the head's bias alone can follow, at any number of sites."""
    model, known = reference("free_sites", 8)
    run = evolve(net(8, None), model, POVM, [0.0, 0.5], TDVP(tolerance=3e-3), 300, progress=False)
    for i, t in enumerate((0.0, 0.5)):
        place = known.times.tolist().index(t)
        for name in "YZ":
            bound = 5 * float(run.stderr[name][i]) + 5e-3
            assert abs(float(run.expect[name][i] - known.expect[name][place])) < bound


def test_coefficients_that_depend_on_time() -> None:
    model = sd.povm.Lindbladian(
        2, [(1.0, "ZZ", (0, 1)), (lambda t: torch.cos(3 * t), "X", "all")], [(1.0, "sigma-", "all")]
    )
    run = evolve(net(2, None), model, POVM, [0.0, 0.5, 1.0], num_samples=None, progress=False)
    assert float(errors(run, model, "up").max()) < 5e-3


def test_observables_on_places_and_states_at_times() -> None:
    model = ising(3)
    run = evolve(
        net(3, None), model, POVM, [0.0, 0.2], num_samples=None, progress=False,
        observables={"z": "Z", "zz": ("ZZ", (0, 1))},
    )  # fmt: skip
    p = run.state(0).probabilities()
    assert torch.allclose(p, net(3, None).probabilities(), atol=1e-12)
    assert float(run.expect["zz"][0]) == pytest.approx(1.0)
    later = run.state(-1)
    assert torch.allclose(later.probabilities(), run.net.probabilities())
    with pytest.raises(InvalidInputError, match="no such time"):
        run.state(2)


@pytest.mark.parametrize(
    "method", ["tdvp", Fit(dt=0.1), Trapezoid(dt=0.1, steps=10)], ids=["tdvp", "fit", "trapezoid"]
)
def test_a_run_resumes_to_the_same_bits(tmp_path, method: str | Fit | Trapezoid) -> None:
    model, times = ising(3), [0.0, 0.15, 0.3]
    whole = evolve(net(3), model, POVM, times, method, 200, progress=False)
    calls = []
    part = net(3)
    evolve(
        part, model, POVM, times, method, 200, progress=False, checkpoint=tmp_path, checkpoint_every=1,
        stop=lambda report: calls.append(report) or len(calls) == 2,
    )  # fmt: skip
    fresh = net(3)
    resumed = evolve(fresh, model, POVM, times, method, 200, progress=False, checkpoint=tmp_path, resume=True)
    for name in "XYZ":
        assert torch.equal(resumed.expect[name], whole.expect[name])
    assert torch.equal(resumed.parameters, whole.parameters)
    assert torch.equal(resumed.steps["residual"], whole.steps["residual"])
    with pytest.raises(ForeignCheckpointError, match="num_samples"):
        evolve(net(3), model, POVM, times, method, 300, checkpoint=tmp_path, resume=True)


def test_an_interrupt_keeps_the_whole_step(tmp_path, request) -> None:
    """Ctrl-C in the second step: the result so far comes with the exception, and the run goes on from there."""
    model, times = ising(3), [0.0, 0.1, 0.4]
    # a process started in the background ignores Ctrl-C unless told otherwise
    request.addfinalizer(partial(signal.signal, signal.SIGINT, signal.getsignal(signal.SIGINT)))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    seen = []

    def press(report: dict[str, float]) -> bool:
        seen.append(report)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return False

    with pytest.raises(sd.run.Interrupted) as caught:
        evolve(
            net(3),
            model,
            POVM,
            times,
            TDVP(dt=0.05),
            200,
            progress=False,
            checkpoint=tmp_path,
            stop=press,
        )
    assert len(caught.value.result.times) >= 1
    rest = evolve(
        net(3),
        model,
        POVM,
        times,
        TDVP(dt=0.05),
        200,
        progress=False,
        checkpoint=tmp_path,
        resume=True,
    )
    whole = evolve(net(3), model, POVM, times, TDVP(dt=0.05), 200, progress=False)
    assert torch.equal(rest.parameters, whole.parameters)


def test_float32_and_other_ansatzes_evolve_too() -> None:
    model = ising(3)
    for made in (
        net(3).float(),
        sd.povm.FullTable(3).double().set_product_state(POVM, "up"),
    ):
        run = evolve(made, model, POVM, [0.0, 0.3], num_samples=None, progress=False)
        assert float(errors(run, model, "up").max()) < 1e-2


def fading() -> sd.povm.Lindbladian:
    return sd.povm.Lindbladian(1, [], [(lambda t: 1 - t, "sigma-", 0)])


def test_bad_input_is_refused_before_any_work(tmp_path) -> None:
    model = ising(4)
    with pytest.raises(TimeGridError, match="increase"):
        evolve(net(4), model, POVM, [0.0, 0.2, 0.1])
    with pytest.raises(InvalidInputError, match="method is unknown"):
        evolve(net(4), model, POVM, [0.0, 0.2], "euler")
    with pytest.raises(InvalidInputError, match="dt must be greater"):
        Fit(dt=-0.1)
    with pytest.raises(InvalidInputError, match="tolerance controls the step"):
        TDVP(dt=0.1, tolerance=1e-3)
    for arguments in ((nn.Linear, model, POVM), (net(4), "m", POVM), (net(4), model, "tetra")):
        with pytest.raises(InvalidInputError, match="has the wrong type"):
            evolve(*arguments, [0.0, 0.2])
    with pytest.raises(InvalidInputError, match="number of sites"):
        evolve(net(3), model, POVM, [0.0, 0.2])
    with pytest.raises(SystemSizeError, match="too many outcomes"):
        evolve(net(10, None), ising(10), POVM, [0.0, 0.2], num_samples=None)
    with pytest.raises(LindbladianError, match="doesn't exist"):
        evolve(net(4), model, POVM, [0.0, 0.2], observables={"z": ("Z", 4)})
    with pytest.raises(LindbladianError, match="becomes negative at time"):
        evolve(net(1), fading(), POVM, [0.0, 1.0, 2.0])
    with pytest.raises(InvalidInputError, match="needs the directory"):
        evolve(net(4), model, POVM, [0.0, 0.2], resume=True)
    with pytest.raises(InvalidInputError, match="number of outcomes"):
        evolve(sd.povm.AutoregressiveTransformer(4, num_outcomes=9), model, POVM, [0.0, 0.2])


@pytest.mark.parametrize("unit", [1e-12, 1e-9, 1e12])
@pytest.mark.parametrize("method", ["tdvp", "fit"])
def test_the_unit_of_time_is_of_no_influence(unit: float, method: str) -> None:
    def run(u: float) -> torch.Tensor:
        times = [0.0, 0.1 * u, 0.33 * u]
        return evolve(
            net(2), ising(2, 2 / u, 1 / u, 1 / u), POVM, times, method, None, progress=False
        ).expect["Z"]

    torch.testing.assert_close(run(unit), run(1.0), atol=1e-6, rtol=0)


def test_a_pulse_is_met_by_a_network() -> None:
    pulse = sd.povm.Lindbladian(
        1, [(lambda t: math.pi / 4 if 6 <= t < 7 else 0.0, "X", 0)], [(0.01, "sigma-", 0)]
    )
    run = evolve(net(1, None), pulse, POVM, [0.0, 10.0], num_samples=None, progress=False)
    assert float(errors(run, pulse, "up").max()) < 5e-3


def test_strings_that_aren_t_symmetries_are_pointed_out() -> None:
    uneven = sd.povm.Lindbladian(3, [([1.5, 0, 0], "X", "all")], [(1.0, "sigma-", "all")])
    with pytest.warns(ConvergenceWarning, match="model isn't symmetric"):
        evolve(net(3), uneven, POVM, [0.0, 0.05], num_samples=None, progress=False)
    staggered = net(3, state="up").set_product_state(POVM, ["up", "x+", "up"])
    with pytest.warns(ConvergenceWarning, match="initial state isn't symmetric"):
        evolve(staggered, ising(3), POVM, [0.0, 0.002], num_samples=None, progress=False)
    driven = sd.povm.Lindbladian(3, [(torch.cos, "X", "all")], [(1.0, "sigma-", "all")])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evolve(net(3), driven, POVM, [0.0, 0.05], num_samples=None, progress=False)


def test_complex_observables_and_energies() -> None:
    model = ising(2)
    specs = {"c": ("sigma-", 0), "h": [(0.5, "ZZ", (0, 1)), (0.5, "X", "all")]}
    run = evolve(net(2), model, POVM, [0.0, 0.2], num_samples=500, observables=specs, progress=False)
    truth = exact.evolve(model, "up", run.times, specs).expect
    assert run.expect["c"].is_complex()
    assert not run.expect["h"].is_complex()
    for name in specs:
        assert float((run.expect[name] - truth[name]).abs().max()) < 0.05


OTHERS = {
    "model": {"model": ising(2, field=3.0)},
    "observables": {"observables": {"Z": "X"}},
    "povm": {"povm": sd.povm.FourPauli()},
    "ts": {"ts": [0.0, 0.1, 0.25]},
    "method": {"method": TDVP(dt=0.02)},
    "seed": {"seed": 1},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_run_isn_t_resumed(tmp_path, name: str) -> None:
    given = {"model": ising(2), "povm": POVM, "ts": [0.0, 0.1, 0.2], "observables": ["Z"], "progress": False}
    options = {"num_samples": None, "checkpoint": tmp_path}
    evolve(net(2, state="x+"), **given, **options, stop=lambda report: report["t"] >= 0.1)
    with pytest.raises(ForeignCheckpointError, match=name):
        evolve(net(2, state="x+"), **{**given, **OTHERS[name]}, **options, resume=True)


def test_an_error_of_the_user_s_keeps_the_checkpoint_and_the_result(tmp_path) -> None:
    def failing(report: dict[str, float]) -> bool:
        if report["t"] > 0.12:
            raise RuntimeError("mine")
        return False

    times, options = [0.0, 0.1, 0.2], {"num_samples": 100, "progress": False}
    with pytest.raises(RuntimeError, match="mine") as caught:
        evolve(net(2), ising(2), POVM, times, **options, checkpoint=tmp_path, stop=failing)
    assert len(caught.value.result.times) == 2
    rest = evolve(net(2), ising(2), POVM, times, **options, checkpoint=tmp_path, resume=True)
    whole = evolve(net(2), ising(2), POVM, times, **options)
    assert torch.equal(rest.parameters, whole.parameters)


@pytest.mark.slow
def test_the_ising_ring_of_four_to_its_steady_state() -> None:
    model = ising(4)
    times = torch.linspace(0, 8, 33, dtype=torch.float64)
    run = evolve(net(4, width=16), model, POVM, times, num_samples=None, progress=False)
    found = errors(run, model, "up")
    assert float(found.max()) < 5e-3
    assert float(found[:, -1].max()) < 1e-4


@pytest.mark.slow
def test_the_ising_ring_of_six_by_sampling() -> None:
    model = ising(6)
    times = torch.linspace(0, 2, 9, dtype=torch.float64)
    run = evolve(net(6, width=16), model, POVM, times, num_samples=2000, progress=False)
    assert float(errors(run, model, "up").max()) < 1e-2


def test_three_level_sites_and_frames_that_differ() -> None:
    """A pair of qutrits measured by nine outcomes each, and a pair of qubits with a frame each."""
    spin = sd.povm.spin_matrices(3)
    model = sd.povm.Lindbladian(
        2,
        [(1.0, [spin["Sz"], spin["Sz"]], (0, 1)), (0.7, spin["Sx"], "all")],
        [(0.5, spin["S-"], "all")],
        dim=3,
    )
    povm = sd.povm.QutritSIC()
    state = torch.diag(torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64))
    torch.manual_seed(0)
    made = sd.povm.AutoregressiveTransformer(2, layers=1, width=12, heads=2, num_outcomes=9).double()
    made.set_product_state(povm, state)
    specs = {"z": spin["Sz"], "x": spin["Sx"]}
    run = evolve(made, model, povm, [0.0, 0.2], num_samples=None, progress=False, observables=specs)
    truth = exact.evolve(model, state, run.times, specs).expect
    assert max(float((run.expect[k] - truth[k]).abs().max()) for k in specs) < 5e-3

    mixed = sd.povm.SiteFrames([sd.povm.Tetrahedral(), sd.povm.FourPauli()])
    made = (
        sd.povm.AutoregressiveTransformer(2, layers=1, width=12, heads=2)
        .double()
        .set_product_state(mixed, "up")
    )
    run = evolve(made, ising(2), mixed, [0.0, 0.2], num_samples=None, progress=False)
    assert float(errors(run, ising(2), "up").max()) < 5e-3
