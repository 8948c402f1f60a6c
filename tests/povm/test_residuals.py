"""Residuals and their gradients: against finite differences by full summation, and without bias by sampling."""

from __future__ import annotations

import pytest
import torch

from stochdyn.core import all_configurations
from stochdyn.povm import Tetrahedral
from stochdyn.povm.dynamics import (
    Averages,
    GaussNewton,
    ResidualProblem,
    StationaryResidual,
    fit_to_target,
    local_rates,
    minimise,
    rates_and_gradients,
    spectral_gap,
    target_step,
    trapezoid_problem,
)
from stochdyn.povm.systems import ising
from stochdyn.testing import ObjectiveSuite
from tests.povm.laws import STRINGS, table, transformer

POVM = Tetrahedral()
OPERATOR = ising(4).master_operator(POVM)
SMALL = ising(2).master_operator(POVM)


def gradient(problem: ResidualProblem, generator: torch.Generator | None = None) -> torch.Tensor:
    value = problem.evaluate(generator)
    problem.backward(value)
    parameters = [p for _, p in problem.net.trainable()]
    grads = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters])
    for p in parameters:
        p.grad = None
    return grads


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("strings", ["natural", "translations and reflections"])
@pytest.mark.parametrize("steady", [True, False])
def test_gradients_by_full_summation_match_finite_differences(norm: str, strings: str, steady: bool) -> None:
    """The weights 1/P are held fixed in the square, as the estimator does."""
    net = transformer(1, STRINGS[strings])
    if steady:
        problem = ResidualProblem(Averages(net, OPERATOR, None), norm)
    else:
        problem = trapezoid_problem(Averages(net, OPERATOR, None), None, 0.2, norm)
        with torch.no_grad():
            net.head.weight.add_(0.05)
    grads, y = gradient(problem), net.parameter_vector()
    held = net.probabilities()

    def loss(vector: torch.Tensor) -> float:
        net.set_parameter_vector(vector)
        p = net.probabilities()
        source = problem.source.table() if problem.source is not None else 0.0
        residual = problem.kappa * p - problem.tau * OPERATOR.apply(p) - source
        return float(residual.abs().sum() if norm == "l1" else (residual.square() / held).sum())

    assert problem.evaluate().loss == pytest.approx(loss(y), rel=1e-10)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        direction = torch.randn(y.shape, dtype=y.dtype, generator=generator)
        direction /= direction.norm()
        slope = (loss(y + 1e-6 * direction) - loss(y - 1e-6 * direction)) / 2e-6
        assert float(grads @ direction) == pytest.approx(slope, rel=2e-4, abs=1e-6)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("strings", ["natural", "translations and reflections"])
def test_sampled_gradients_have_no_bias(norm: str, strings: str) -> None:
    """On a state near a product, since far from it squares of rates have tails too heavy for a normal tolerance."""
    net = transformer(1, STRINGS[strings])
    with torch.no_grad():
        for p in (net.head.weight, net.head.bias, net.pairs.blocks):
            p.mul_(0.2)
    exact = ResidualProblem(Averages(net, OPERATOR, None), norm)
    wanted, loss = gradient(exact), exact.evaluate().loss
    sampled = ResidualProblem(Averages(net, OPERATOR, 200, stratified=False), norm)
    generator = torch.Generator().manual_seed(1)
    direction = wanted / wanted.norm()
    slopes, losses = [], []
    for _ in range(40):
        losses.append(sampled.evaluate(generator).loss)
        slopes.append(float(gradient(sampled, generator) @ direction))
    for values, mean in ((torch.tensor(slopes), float(wanted.norm())), (torch.tensor(losses), loss)):
        assert abs(float(values.mean()) - mean) < 4.5 * float(values.std()) / 40**0.5


def test_a_step_source_is_the_same_from_a_table_and_from_samples() -> None:
    net = transformer(1)
    problem = trapezoid_problem(Averages(net, OPERATOR, None), None, 0.2)
    a = all_configurations(4, 4)[::7]
    log_p = net.log_prob(a).detach()
    from_table = problem.source.relative(a, log_p)
    problem.source._table = None
    assert torch.allclose(problem.source.relative(a, log_p), from_table, rtol=0, atol=1e-12)


def test_the_trapezoid_step_of_a_table_is_the_trapezoid_rule() -> None:
    net = table(2).set_product_state(POVM, "up")
    p0 = net.probabilities()
    problem = trapezoid_problem(Averages(net, SMALL, None), None, 0.1, "l2")
    best = minimise(problem, 500, 0.03)
    matrix = SMALL.to_sparse().to_dense()
    eye = torch.eye(16, dtype=torch.float64)
    wanted = torch.linalg.solve(eye - 0.05 * matrix, (eye + 0.05 * matrix) @ p0)
    assert best.loss < 1e-6
    assert torch.allclose(net.probabilities(), wanted, rtol=0, atol=1e-4)
    assert best.loss <= min(best.losses)


def test_a_fit_reaches_a_target_in_the_family() -> None:
    net, other = table(2), table(2)
    with torch.no_grad():
        other.logits.add_(
            0.3 * torch.randn(16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        )
    batch = Averages(net, SMALL, None).draw()
    before = net.log_prob(batch.outcomes).detach()
    factor = (other.log_prob(batch.outcomes).detach() - before).exp()
    done = fit_to_target(net, batch, before, factor, max_iterations=12, rcond=1e-12)
    assert done.misfit < 1e-6
    assert torch.allclose(net.probabilities(), other.probabilities(), rtol=0, atol=1e-7)


def test_a_target_step_is_of_second_order() -> None:
    errors = []
    matrix = SMALL.to_sparse().to_dense()
    for n in (4, 8):
        net = table(2).set_product_state(POVM, "up")
        exact = torch.linalg.matrix_exp(0.4 * matrix) @ net.probabilities()
        averages = Averages(net, SMALL, None)
        for _ in range(n):
            target_step(averages, None, 0.4 / n, max_iterations=8, rcond=1e-12)
        errors.append(float((net.probabilities() - exact).abs().sum()))
    assert 3.0 < errors[0] / errors[1] < 5.5


@pytest.mark.parametrize("strings", ["natural", "translations and reflections"])
def test_gradients_of_rates_match_finite_differences(strings: str) -> None:
    net = transformer(2, STRINGS[strings])
    a = all_configurations(4, 4)[::23]
    local, slopes = rates_and_gradients(net, OPERATOR, a)
    assert torch.allclose(local, local_rates(net, OPERATOR, a), rtol=1e-10)
    y = net.parameter_vector()
    direction = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(0))
    net.set_parameter_vector(y + 1e-6 * direction)
    after = local_rates(net, OPERATOR, a)
    net.set_parameter_vector(y - 1e-6 * direction)
    change = (after - local_rates(net, OPERATOR, a)) / 2e-6
    assert torch.allclose(slopes @ direction, change, rtol=1e-4, atol=1e-5)


def test_gradients_of_rates_don_t_depend_on_how_they_are_summed(monkeypatch) -> None:
    net = transformer(1, STRINGS["translations"])
    a = all_configurations(4, 4)
    once = rates_and_gradients(net, OPERATOR, a)[1]
    monkeypatch.setattr("stochdyn.povm.dynamics.newton._SCORE_BYTES", 0)
    assert torch.allclose(rates_and_gradients(net, OPERATOR, a)[1], once, rtol=0, atol=1e-10)


def test_newton_steps_bring_a_table_to_the_steady_state() -> None:
    net = table(2).set_product_state(POVM, "up")
    solver = GaussNewton(Averages(net, SMALL, None))
    for _ in range(25):
        solver.step()
    values, vectors = torch.linalg.eig(SMALL.to_sparse().to_dense())
    rest = vectors[:, values.abs().argmin()].real
    assert torch.allclose(net.probabilities(), rest / rest.sum(), rtol=0, atol=1e-8)


def test_the_spectral_gap_by_dense_and_by_iterative_algebra() -> None:
    """Without couplings the slowest mode is that of a single site, however many there are."""
    matrix = OPERATOR.apply(torch.eye(256, dtype=torch.float64)).mT
    wanted = -float(torch.linalg.eigvals(matrix).real.sort(descending=True)[0][1])
    assert spectral_gap(OPERATOR) == pytest.approx(wanted, rel=1e-9)
    one, five = (ising(n, coupling=0.0, bonds=[]).master_operator(POVM) for n in (1, 5))
    assert spectral_gap(five) == pytest.approx(spectral_gap(one), rel=1e-5)


class TestStationaryResidual(ObjectiveSuite):
    on_host = "povm/"
    """The objective keeps the contract; in the 1-norm its gradient is that of its loss."""

    unseen = ("net.positions",)

    def make(self):
        net = transformer(1)
        return StationaryResidual(Averages(net, OPERATOR, None)), None
