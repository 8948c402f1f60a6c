"""Steady states by every method against the exact ones."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import stochdyn as sd
from stochdyn.errors import ConvergenceWarning, ForeignCheckpointError, InvalidInputError
from stochdyn.povm import TDVP, Descent, Fit, Newton, Relaxation, exact, steady_state
from stochdyn.povm.dynamics import relaxation_of
from stochdyn.povm.systems import ising, reference

POVM = sd.povm.Tetrahedral()


def net(sites: int, strings: str | None = "translations+reflections") -> sd.povm.AutoregressiveTransformer:
    torch.manual_seed(0)
    made = sd.povm.AutoregressiveTransformer(sites, layers=1, width=12, heads=2, strings=strings).double()
    return made.set_product_state(POVM, "up")


def error(found: sd.povm.SteadyState, model: sd.povm.Lindbladian) -> float:
    truth = exact.steady_state(model, list(found.expect)).expect
    return max(abs(found.expect[name] - float(truth[name])) for name in truth)


@pytest.mark.parametrize(
    ("method", "bound"),
    [
        ("newton", 1e-4),
        ("combined", 1e-4),
        (Relaxation(12.0), 1e-3),
        (Descent(steps=250), 3e-2),
        (Descent("l2", steps=250), 5e-2),
    ],
)
def test_methods_find_the_steady_state(method: str | Relaxation | Descent, bound: float) -> None:
    model = ising(3)
    found = steady_state(net(3), model, POVM, method, None, progress=False)
    assert error(found, model) < bound
    assert found.gap_source == "spectrum"
    assert found.residual < 10 * bound


@pytest.mark.parametrize("method", ["tdvp", "combined"])
@pytest.mark.parametrize("unit", [1e-12, 1e5, 1e12])
def test_the_unit_of_time_is_of_no_influence(method: str, unit: float) -> None:
    found = steady_state(net(2), ising(2, 2 / unit, 1 / unit, 1 / unit), POVM, method, None, progress=False)
    assert error(found, ising(2)) < 1e-3
    assert found.gap * unit == pytest.approx(0.5, rel=0.5)


def test_a_state_that_can_t_be_trusted_is_said_to_be_so() -> None:
    with pytest.warns(ConvergenceWarning, match="from the steady one"):
        steady_state(net(3), ising(3), POVM, Relaxation(0.5), None, progress=False)
    lone = sd.povm.Lindbladian(2, [], [(1.0, "Z", "all")])
    with pytest.warns(ConvergenceWarning, match="isn't unique"):
        steady_state(net(2), lone, POVM, Relaxation(1.0), None, progress=False)


@pytest.mark.parametrize("field", [0.5, 2.0])
def test_four_sites_by_sampling(field: float) -> None:
    model = ising(4, field=field)
    found = steady_state(net(4), model, POVM, "newton", 1000, progress=False)
    assert error(found, model) < 1.2e-2
    assert all(v > 0 for v in found.stderr.values())


def test_the_error_estimate_is_of_the_size_of_the_error() -> None:
    """Stopped early, a steady state says how far off it is, within a factor of ten."""
    model = ising(3)
    state = net(3)
    found = steady_state(state, model, POVM, Relaxation(5.0), None, progress=False)
    operator = model.master_operator(POVM)
    from stochdyn.povm.master import stationary_probabilities

    off = float((state.probabilities() - stationary_probabilities(operator)).abs().sum())
    assert off / 10 < found.error_estimate < 10 * off


def test_the_gap_can_be_given_or_seen_in_the_relaxation() -> None:
    model = ising(2)
    given = steady_state(net(2), model, POVM, Newton(5), None, gap=0.5, progress=False)
    assert (given.gap, given.gap_source) == (0.5, "given")
    assert given.error_estimate == pytest.approx(2 * given.residual)
    t = torch.linspace(0, 10, 50)
    assert relaxation_of(t, 3 * torch.exp(-0.7 * t)) == pytest.approx(0.7, rel=1e-5)
    assert math.isnan(relaxation_of(t, torch.exp(0.1 * t)))
    # the floor of sampling isn't taken for slow relaxation
    assert relaxation_of(t, 3 * torch.exp(-0.7 * t) + 0.02 + 0.001 * torch.cos(40 * t)) == pytest.approx(
        0.7, rel=0.2
    )


@pytest.mark.filterwarnings("ignore::stochdyn.errors.ConvergenceWarning")  # cut short on purpose
@pytest.mark.parametrize(
    ("more", "less"),
    [(Newton(8), Newton(4)), (Descent(steps=40), Descent(steps=40))],
    ids=["newton", "descent"],
)
def test_refinements_resume_to_the_same_bits(tmp_path, more: Newton, less: Newton) -> None:
    model = ising(3)
    whole, part, rest = net(3), net(3), net(3)
    steady_state(whole, model, POVM, more, 300, progress=False)
    steady_state(part, model, POVM, less, 300, progress=False, checkpoint=tmp_path)
    steady_state(rest, model, POVM, more, 300, progress=False, checkpoint=tmp_path, resume=True)
    assert torch.equal(whole.parameter_vector(), rest.parameter_vector())


@pytest.mark.filterwarnings("ignore::stochdyn.errors.ConvergenceWarning")
def test_another_model_isn_t_resumed(tmp_path) -> None:
    steady_state(net(2), ising(2), POVM, Newton(2), None, progress=False, checkpoint=tmp_path)
    with pytest.raises(ForeignCheckpointError, match="model"):
        steady_state(
            net(2),
            ising(2, field=3.0),
            POVM,
            Newton(2),
            None,
            progress=False,
            checkpoint=tmp_path,
            resume=True,
        )


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="method is unknown"):
        steady_state(net(3), ising(3), POVM, "annealing")
    with pytest.raises(InvalidInputError, match="norm is unknown"):
        Descent("l3")
    with pytest.raises(InvalidInputError, match="horizon must be greater"):
        Relaxation(-1.0)
    for method in (nn.Linear(1, 1), 3, None, TDVP, Fit()):
        with pytest.raises(InvalidInputError, match="method"):
            steady_state(net(3), ising(3), POVM, method)
    for arguments in ((nn.Linear, ising(3), POVM), (net(3), "m", POVM), (net(3), ising(3), "tetra")):
        with pytest.raises(InvalidInputError, match="has the wrong type"):
            steady_state(*arguments)
    with pytest.raises(InvalidInputError, match="without jumps"):
        steady_state(net(3), sd.povm.Lindbladian(3, [(1.0, "X", "all")]), POVM)
    driven = sd.povm.Lindbladian(3, [(lambda t: t, "X", "all")], [(1.0, "sigma-", "all")])
    with pytest.raises(InvalidInputError, match="no steady state"):
        steady_state(net(3), driven, POVM)


@pytest.mark.slow
@pytest.mark.parametrize("field", [0.5, 1.0, 2.0, 4.0])
def test_the_ising_ring_of_six(field: float) -> None:
    model, known = reference("ising_ring", 6, steady=True, field=field)
    found = steady_state(net(6), model, POVM, "newton", None, progress=False)
    assert max(abs(found.expect[name] - float(known.expect[name])) for name in "XYZ") < 5e-3
