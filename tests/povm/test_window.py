"""The window ansatz: what it looks at, ratios by lookup, exact rates of short marginals, and long chains."""

from __future__ import annotations

import pytest
import torch

import stochdyn as sd
from stochdyn.core import all_configurations, encode
from stochdyn.errors import InvalidInputError, ShapeError, SystemSizeError
from stochdyn.povm import TDVP, AutoregressiveWindow, Fit, Strings
from stochdyn.povm.dynamics import Averages, Problem, local_rates, tdvp_velocity
from stochdyn.povm.master import make_schedule
from stochdyn.povm.systems import ising, reference
from tests.povm.laws import fisher_p_value, stirred, window

POVM = sd.povm.Tetrahedral()


def test_the_bulk_shares_a_table_and_the_ends_of_a_ring_see_each_other() -> None:
    ring = AutoregressiveWindow(8, order=2)
    assert ring.neighbours[2:7].tolist() == [[i - 1, i - 2] for i in range(2, 7)]
    assert len(set(ring.offsets[2:7].tolist())) == 1
    assert sorted(ring.neighbours[7].tolist()) == [0, 6]
    chain = AutoregressiveWindow(8, order=2, periodic=False)
    assert chain.neighbours[7].tolist() == [6, 5]
    assert chain.tables.shape[0] == 1 + 4 + 16
    own = AutoregressiveWindow(8, order=2, periodic=False, shared=False)
    assert own.tables.shape[0] == 1 + 4 + 6 * 16


def test_on_a_lattice_the_nearest_earlier_sites_are_those_beside_and_above() -> None:
    torus = AutoregressiveWindow(16, order=2, shape=(4, 4))
    assert sorted(torus.neighbours[10].tolist()) == [6, 9]
    assert sorted(torus.neighbours[15].tolist()) in ([3, 11], [3, 12], [3, 14], [11, 14], [12, 14])


@pytest.mark.parametrize("order", [1, 3])
def test_normalised_and_sampled_by_its_law(order: int) -> None:
    net = window(order)
    assert float(net.probabilities().sum()) == pytest.approx(1, abs=1e-10)
    assert fisher_p_value(net, 4000, 4, seed=order) > 1e-4


@pytest.mark.parametrize("initial", ["up", ["up", "x+", "down", "y-", "x-", "up"]])
@pytest.mark.parametrize("strings", [None, Strings([[3, 1, 0, 5, 4, 2]])])
def test_rates_by_lookup_are_those_of_whole_strings(initial, strings) -> None:
    net = AutoregressiveWindow(6, order=2, strings=strings).double().set_product_state(POVM, initial)
    with torch.no_grad():
        net.tables.normal_(generator=torch.Generator().manual_seed(0))
    operator = ising(6, field=0.7).master_operator(POVM)
    a = net.sample(50, generator=torch.Generator().manual_seed(1))[0]
    assert net.log_ratios(a, operator.shifts) is not None
    assert torch.allclose(local_rates(net, operator, a), operator.local_rate(net.log_prob, a), atol=1e-11)


def test_rates_of_mixtures_are_those_of_whole_strings() -> None:
    net = window(2, "translations", sites=5)
    operator = ising(5).master_operator(POVM)
    a = net.sample(20, generator=torch.Generator().manual_seed(1))[0]
    assert torch.allclose(local_rates(net, operator, a), operator.local_rate(net.log_prob, a), atol=1e-11)


def test_marginals_within_a_window_move_at_their_exact_rates() -> None:
    """With a table a site: those of order + 1 neighbours do, those of more don't."""
    bonds = sd.povm.chain(5)
    operator = ising(5, field=0.8, bonds=bonds).master_operator(POVM)
    net = stirred(AutoregressiveWindow(5, order=2, periodic=False, shared=False), scale=0.2)
    every = all_configurations(5, 4)
    p = net.probabilities()
    velocity = tdvp_velocity(Averages(net, operator, None), rcond=1e-13).direction
    moves = p * (net.scores(every)[1] @ velocity)
    wanted = operator.apply(p)

    def off(first: int, size: int) -> float:
        code = encode(every[:, first : first + size], 4)
        return float(torch.zeros(4**size, dtype=p.dtype).index_add_(0, code, moves - wanted).abs().max())

    assert max(off(i, 3) for i in range(3)) < 1e-9
    assert max(off(i, 4) for i in range(2)) > 1e-5


@pytest.mark.parametrize(("draws", "wanted"), [(148, 2.0), (149, 0.0), (None, 0.0)])
def test_draws_decide_on_the_noise_filter(draws: int | None, wanted: float) -> None:
    """Weak directions left out add up to a bias, which more draws than parameters needn't suffer."""
    net = AutoregressiveWindow(5, order=2).double()
    assert net.parameter_vector().numel() == 148
    operator = ising(5).master_operator(POVM)
    averages = Averages(net, operator, draws)
    schedule = make_schedule(ising(5), torch.tensor([0.0, 1.0], dtype=torch.float64))
    problem = Problem(averages, schedule, 1.0, 0, False)
    for method in (TDVP, Fit):
        assert method().stepper(problem).min_snr == wanted
        assert method(min_snr=1.5).stepper(problem).min_snr == 1.5


def test_a_ring_of_sixteen_against_its_exact_answer() -> None:
    povm = sd.povm.Tetrahedral(rotated=False)
    model, known = reference("commuting_ring", 16, dephasing=0.0)
    times = known.times[known.times <= 0.5]
    net = AutoregressiveWindow(16, order=2).double().set_product_state(povm, "x+")
    run = sd.povm.evolve(net, model, povm, times, TDVP(dt=0.05), 1000, progress=False)
    for name in "XYZ":
        off = (run.expect[name] - known.expect[name][: len(times)]).abs()
        assert float(off.max()) < 2e-2, name


def test_bad_input_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="order must be"):
        AutoregressiveWindow(4, order=0)
    with pytest.raises(ShapeError, match="another number of sites"):
        AutoregressiveWindow(8, shape=(3, 3))
    with pytest.raises(SystemSizeError, match="tables are too large"):
        AutoregressiveWindow(20, order=12)
