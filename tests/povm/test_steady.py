"""Steady states by every method against the exact ones."""

from __future__ import annotations

import math

import pytest
import torch

import stochdyn as sd
from stochdyn.errors import InvalidInputError
from stochdyn.povm import exact, steady_state
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
    ("method", "options", "bound"),
    [
        ("newton", {}, 1e-4),
        ("combined", {}, 1e-4),
        ("tdvp", {"duration": 12.0}, 1e-3),
        ("trapezoid", {"iterations": 250}, 3e-2),
        ("trapezoid", {"iterations": 250, "norm": "l2"}, 5e-2),
    ],
)
def test_methods_find_the_steady_state(method: str, options: dict, bound: float) -> None:
    model = ising(3)
    found = steady_state(net(3), model, POVM, method, None, progress=False, **options)
    assert error(found, model) < bound
    assert found.gap_source == "spectrum"
    assert found.residual < 10 * bound


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
    found = steady_state(state, model, POVM, "tdvp", None, duration=5.0, progress=False)
    operator = model.master_operator(POVM)
    from stochdyn.povm.master import stationary_probabilities

    off = float((state.probabilities() - stationary_probabilities(operator)).abs().sum())
    assert off / 10 < found.error_estimate < 10 * off


def test_the_gap_can_be_given_or_seen_in_the_relaxation() -> None:
    model = ising(2)
    given = steady_state(net(2), model, POVM, "newton", None, gap=0.5, iterations=5, progress=False)
    assert (given.gap, given.gap_source) == (0.5, "given")
    assert given.error_estimate == pytest.approx(2 * given.residual)
    from stochdyn.povm.dynamics.steady import _decay

    t = torch.linspace(0, 10, 50)
    assert _decay(t, 3 * torch.exp(-0.7 * t)) == pytest.approx(0.7, rel=1e-5)
    assert math.isnan(_decay(t, torch.exp(0.1 * t)))
    # the floor of sampling isn't taken for slow relaxation
    assert _decay(t, 3 * torch.exp(-0.7 * t) + 0.02 + 0.001 * torch.cos(40 * t)) == pytest.approx(
        0.7, rel=0.2
    )


@pytest.mark.parametrize("method", ["newton", "trapezoid"])
def test_refinements_resume_to_the_same_bits(tmp_path, method: str) -> None:
    model = ising(3)
    whole, part, rest = net(3), net(3), net(3)
    more, less = (8, 4) if method == "newton" else (40, 40)
    steady_state(whole, model, POVM, method, 300, iterations=more, progress=False)
    steady_state(part, model, POVM, method, 300, iterations=less, progress=False, checkpoint=tmp_path)
    steady_state(
        rest, model, POVM, method, 300, iterations=more, progress=False, checkpoint=tmp_path, resume=True
    )
    assert torch.equal(whole.parameter_vector(), rest.parameter_vector())


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="method is unknown"):
        steady_state(net(3), ising(3), POVM, "annealing")
    with pytest.raises(InvalidInputError, match="norm is unknown"):
        steady_state(net(3), ising(3), POVM, norm="l3")
    with pytest.raises(InvalidInputError, match="duration must be positive"):
        steady_state(net(3), ising(3), POVM, duration=-1.0)
    with pytest.raises(InvalidInputError, match="no option 'step'"):
        steady_state(net(3), ising(3), POVM, "newton", step=0.1)
    driven = sd.povm.Lindbladian(3, [(lambda t: t, "X", "all")], [(1.0, "sigma-", "all")])
    with pytest.raises(InvalidInputError, match="no steady state"):
        steady_state(net(3), driven, POVM)


@pytest.mark.slow
@pytest.mark.parametrize("field", [0.5, 1.0, 2.0, 4.0])
def test_the_ising_ring_of_six(field: float) -> None:
    model, known = reference("ising_ring", 6, steady=True, field=field)
    found = steady_state(net(6), model, POVM, "newton", None, progress=False)
    assert max(abs(found.expect[name] - float(known.expect[name])) for name in "XYZ") < 5e-3
