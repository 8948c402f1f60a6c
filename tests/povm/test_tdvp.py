"""The velocity of the variational principle: least squares in the Fisher metric, in both forms, and its filters."""

from __future__ import annotations

import pytest
import torch

from stochdyn.core import all_configurations
from stochdyn.errors import SystemSizeError
from stochdyn.povm import Strings, Tetrahedral
from stochdyn.povm.ansatz import irreducible_terms, is_invariant
from stochdyn.povm.dynamics import (
    Averages,
    controlled_step,
    fisher_matrix,
    local_rates,
    plain_step,
    solve_velocity,
    tdvp_velocity,
)
from stochdyn.povm.systems import ising, xyz
from tests.povm.laws import STRINGS, table, transformer

EVERY = all_configurations(4, 4)
OPERATOR = ising(4).master_operator(Tetrahedral())


def problem(m: int, p: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(m, p, dtype=torch.float64, generator=generator)
    rates = torch.randn(m, dtype=torch.float64, generator=generator)
    weights = torch.rand(m, dtype=torch.float64, generator=generator)
    return scores, rates, weights / weights.sum()


def test_the_fisher_matrix_is_the_covariance_of_the_scores() -> None:
    net = transformer(1)
    log_p, scores = net.scores(EVERY)
    p = log_p.exp()
    mean = p @ scores
    covariance = (scores.mT * p) @ scores - torch.outer(mean, mean)
    assert torch.allclose(fisher_matrix(scores, p), covariance, rtol=0, atol=1e-13)


def test_the_fisher_matrix_is_the_curvature_of_the_divergence() -> None:
    net = table(2)
    every = all_configurations(2, 4)
    log_p, scores = net.scores(every)
    y = net.parameter_vector()
    delta = 1e-3 * torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    net.set_parameter_vector(y + delta)
    forward = (log_p.exp() * (log_p - net.log_prob(every).detach())).sum()
    net.set_parameter_vector(y - delta)
    backward = (log_p.exp() * (log_p - net.log_prob(every).detach())).sum()
    wanted = delta @ fisher_matrix(scores, log_p.exp()) @ delta
    assert torch.allclose(forward + backward, wanted, rtol=1e-5)


@pytest.mark.parametrize(("m", "p"), [(60, 12), (12, 60)])
def test_the_velocity_is_the_least_squares_solution_in_both_forms(m: int, p: int) -> None:
    scores, rates, weights = problem(m, p)
    found = solve_velocity(scores, rates, weights, rcond=1e-10)
    root = weights.sqrt()[:, None]
    matrix = (scores - weights @ scores) * root
    right = (rates - weights @ rates) * root[:, 0]
    wanted = torch.linalg.pinv(matrix) @ right
    assert torch.allclose(found.direction, wanted, rtol=1e-7, atol=1e-9)
    left = right - matrix @ wanted
    assert found.residual == pytest.approx(float(left.norm() / right.norm()), abs=1e-6)
    assert found.rate_norm == pytest.approx(float(right.norm()))


def test_both_forms_agree() -> None:
    scores, rates, weights = problem(20, 19)
    wide = torch.cat([scores, scores @ torch.randn(19, 30, dtype=torch.float64)], 1)
    narrow = solve_velocity(scores, rates, weights, rcond=1e-12)
    broad = solve_velocity(wide, rates, weights, rcond=1e-12)
    centred = lambda s: s - weights @ s  # noqa: E731
    assert torch.allclose(centred(scores) @ narrow.direction, centred(wide) @ broad.direction, atol=1e-6)


def test_a_table_follows_the_equation_exactly() -> None:
    """A table can make every change, so the residual is zero and the probabilities change by LP."""
    net = table(3)
    operator = ising(3).master_operator(Tetrahedral())
    velocity = tdvp_velocity(Averages(net, operator, None), rcond=1e-13)
    assert velocity.residual < 1e-6
    assert abs(velocity.mean_rate) < 1e-12
    p, y, h = net.probabilities(), net.parameter_vector(), 1e-5
    net.set_parameter_vector(y + h * velocity.direction)
    after = net.probabilities()
    net.set_parameter_vector(y - h * velocity.direction)
    change = (after - net.probabilities()) / (2 * h)
    assert torch.allclose(change, operator.apply(p), rtol=0, atol=1e-7)


def test_sampled_velocities_approach_the_exact_one() -> None:
    """The error falls with the number of draws, by far where draws are many."""
    net = transformer(1)
    with torch.no_grad():
        net.head.weight.mul_(0.2)
    wanted = tdvp_velocity(Averages(net, OPERATOR, None), rcond=1e-6)
    errors = []
    for n in (300, 30000):
        draws = Averages(net, OPERATOR, n, stratified=False)
        found = tdvp_velocity(draws, generator=torch.Generator().manual_seed(3), rcond=1e-6)
        errors.append(float(wanted.metric.norm(found.direction - wanted.direction)))
    assert errors[1] < 0.3 * errors[0]


def test_the_noise_filter_fades_out_what_is_noise() -> None:
    """Rates that are pure noise leave next to nothing; a clear force passes."""
    scores, _, _ = problem(400, 10)
    weights = torch.full((400,), 1 / 400, dtype=torch.float64)
    noise = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    free = solve_velocity(scores, noise, weights, 400)
    filtered = solve_velocity(scores, noise, weights, 400, min_snr=4.0)
    assert float(filtered.metric.norm(filtered.direction)) < 0.05 * float(free.metric.norm(free.direction))
    clear = scores @ torch.ones(10, dtype=torch.float64) + 0.1 * noise
    kept = solve_velocity(scores, clear, weights, 400, min_snr=4.0)
    assert torch.allclose(kept.direction, torch.ones(10, dtype=torch.float64), atol=0.05)


@pytest.mark.parametrize(
    ("strings", "invariant"),
    [
        (Strings.translations(4), True),
        (Strings.translations(4) @ Strings.relabelling(4, (3, 2, 1, 0)), False),
        (Strings.snakes((2, 2)), False),
    ],
)
def test_symmetries_of_the_ising_ring_are_recognised(strings: Strings, invariant: bool) -> None:
    """The field breaks the turn about z, and a snake through a plaquette doesn't keep the bonds of the ring."""
    assert is_invariant(OPERATOR, strings) is invariant


def test_the_turn_about_z_is_a_symmetry_of_xyz_and_one_lost_bond_is_noticed() -> None:
    turn = Strings.relabelling(5, (3, 2, 1, 0))
    both = Strings.translations(5) @ turn
    assert is_invariant(xyz(5, 0.9, 1.6, 1.0, 0.3).master_operator(Tetrahedral()), both)
    open_chain = xyz(5, 0.9, 1.6, 1.0, bonds=[(i, i + 1) for i in range(4)])
    assert not is_invariant(open_chain.master_operator(Tetrahedral()), Strings.translations(5))
    assert is_invariant(open_chain.master_operator(Tetrahedral()), Strings.reflection(5) @ turn)


def test_irreducible_terms_add_up_to_the_operator() -> None:
    terms = irreducible_terms(OPERATOR)
    assert sorted(len(sites) for sites in terms) == [1, 1, 1, 1, 2, 2, 2, 2] or () in terms
    p = torch.rand(256, dtype=torch.float64)
    total = torch.zeros_like(p)
    for sites, matrix in terms.items():
        shaped = (
            p.reshape(4, 4, 4, 4).movedim(list(sites), list(range(-len(sites), 0)))
            if sites
            else p.reshape(4, 4, 4, 4)
        )
        moved = shaped.reshape(*shaped.shape[: 4 - len(sites)], -1)
        out = (moved @ matrix.mT if sites else moved * matrix).reshape(shaped.shape)
        total += (out.movedim(list(range(-len(sites), 0)), list(sites)) if sites else out).reshape(-1)
    assert torch.allclose(total, OPERATOR.apply(p), rtol=0, atol=1e-13)


def test_sums_over_orbits_are_sums_over_all_outcomes() -> None:
    net = transformer(1, STRINGS["translations and reflections"])
    averages = Averages(net, OPERATOR, None)
    assert averages.symmetric
    batch = averages.draw()
    assert batch.outcomes.shape[0] == 55  # bracelets of four colours
    rates = local_rates(net, OPERATOR, batch.outcomes)
    p = net.probabilities()
    whole = OPERATOR.apply(p) / p
    assert torch.allclose(batch.weights @ rates.square(), p @ whole.square(), rtol=1e-10)


def test_heun_is_of_second_order_and_its_control_keeps_the_tolerance() -> None:
    operator = ising(2).master_operator(Tetrahedral())
    net = table(2).set_product_state(Tetrahedral(), "up")
    averages = Averages(net, operator, None)

    def field(t, y):
        net.set_parameter_vector(y)
        return tdvp_velocity(averages, rcond=1e-12)

    start = net.parameter_vector()
    matrix = operator.to_sparse().to_dense()
    exact = torch.linalg.matrix_exp(0.4 * matrix) @ net.probabilities()
    errors = []
    for n in (8, 16):
        y = start
        for i in range(n):
            y = plain_step(field, 0.4 * i / n, y, 0.4 / n).parameters
        net.set_parameter_vector(y)
        errors.append(float((net.probabilities() - exact).abs().sum()))
    assert 3.3 < errors[0] / errors[1] < 4.8
    y, t, h = start, 0.0, 0.4
    while t < 0.4 - 1e-12:
        step = controlled_step(field, t, y, h, 0.4 - t, 1e-4)
        assert step.error <= 1e-4
        y, t, h = step.parameters, t + step.taken, step.proposed
    net.set_parameter_vector(y)
    assert float((net.probabilities() - exact).abs().sum()) < 2e-3


def test_full_summation_of_too_many_outcomes_is_refused() -> None:
    net = transformer(1, sites=8)
    with pytest.raises(SystemSizeError, match="num_samples"):
        Averages(net, ising(8).master_operator(Tetrahedral()), None)


def test_more_parameters_than_samples_don_t_hide_what_is_missed() -> None:
    """Rates of pure noise are met on every sample by 60 parameters, and the residual still says that nothing was learnt."""
    generator = torch.Generator().manual_seed(7)
    scores = torch.randn(40, 60, dtype=torch.float64, generator=generator)
    noise = torch.randn(40, dtype=torch.float64, generator=generator)
    weights = torch.full((40,), 1 / 40, dtype=torch.float64)
    met = solve_velocity(scores, noise, weights, None)
    assert met.residual < 1e-6
    found = solve_velocity(scores, noise, weights, 40)
    assert found.residual > 0.5
    filtered = solve_velocity(scores, noise, weights, 40, min_snr=3.0)
    assert float(filtered.metric.norm(filtered.direction)) < 0.5 * float(met.metric.norm(met.direction))
