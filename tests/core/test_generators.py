"""Fokker-Planck and continuity equations: flows that solve them, and flows that miss by a known amount."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stochdyn.core import (
    SDE,
    Brownian,
    ContinuityEquation,
    Control,
    Diagonal,
    FokkerPlanck,
    GaussianFlow,
    LearnedFlow,
    LinearGaussianMeasure,
    Matrix,
    MixtureFlow,
    NoiseProcess,
    Scalar,
    covariance_divergence,
    spatial_divergence,
    unbiased_square,
)
from stochdyn.core.forward.divergences import attach
from stochdyn.errors import InvalidInputError, ShapeError, UnavailableError

F64 = torch.float64
EXACT = 1e-10


def largest(residual: Tensor) -> float:
    return float(residual.detach().abs().max())


def linear_case(d: int, mean0: float = 0.5) -> tuple[GaussianFlow, SDE, Tensor, Tensor]:
    """A linear SDE with full matrices, its exact flow, times and points where it has mass."""
    a = 0.4 * torch.randn(d, d, dtype=F64) / d**0.5 - torch.eye(d, dtype=F64)
    b, g = torch.randn(d, dtype=F64), torch.randn(d, d, dtype=F64)
    start = torch.full((d,), mean0, dtype=F64)
    flow = GaussianFlow.from_measure(LinearGaussianMeasure(a, b, g, start, 0.5 * torch.eye(d, dtype=F64)))
    t = 0.1 + torch.rand(20, 1, dtype=F64)
    return flow, SDE(lambda s, x: x @ a.mT + b, g), t, flow.sample(t[:, 0], 1)[:, 0]


@pytest.mark.parametrize("d", [1, 3, 10])
def test_linear_flow_solves_its_equation_in_every_form(d: int) -> None:
    flow, sde, t, x = linear_case(d)
    operator = FokkerPlanck(sde)
    assert largest(operator.residual(flow, t, x)) < EXACT
    assert largest(operator.residual(flow, t, x, form="score")) < EXACT
    density = flow.log_prob(t, x).exp()
    relative = operator.residual(flow, t, x, form="density") / density
    assert largest(relative) < EXACT


def test_score_network_needs_no_density() -> None:
    flow, sde, t, x = linear_case(3)
    blind = LearnedFlow(lambda s, y: flow.score(s, y), predicts="score")
    assert largest(FokkerPlanck(sde).residual(blind, t, x, form="score")) < EXACT
    with pytest.raises(UnavailableError):
        FokkerPlanck(sde).residual(blind, t, x)


def test_constant_in_the_log_density_is_invisible_but_a_drifting_one_is_not() -> None:
    flow, sde, t, x = linear_case(2)
    shifted = LearnedFlow(lambda s, y: 7.0 + 0 * s[..., 0], reference=flow)
    assert largest(FokkerPlanck(sde).residual(shifted, t, x)) < EXACT
    drifting = LearnedFlow(lambda s, y: 3.0 * s[..., 0], reference=flow)
    torch.testing.assert_close(FokkerPlanck(sde).residual(drifting, t, x), torch.full((20,), 3.0, dtype=F64))


def test_mixture_of_solutions_is_a_solution() -> None:
    torch.manual_seed(1)
    first, sde, t, x = linear_case(2, 2.0)
    torch.manual_seed(1)
    second, _, _, y = linear_case(2, -2.0)
    mixture = MixtureFlow([first, second], torch.tensor([0.3, 0.7], dtype=F64))
    points = torch.cat([x, y, 0.5 * (x + y)])
    times = torch.cat([t, t, t])
    for form in ("log", "score"):
        assert largest(FokkerPlanck(sde).residual(mixture, times, points, form=form)) < EXACT


def test_wrong_drift_leaves_the_closed_form_residual() -> None:
    flow, sde, t, x = linear_case(3)
    c = torch.tensor([0.3, -1.0, 2.0], dtype=F64)
    moved = SDE(lambda s, y: sde.drift(s, y) + c, sde.diffusion(t, x))
    # R = div(c) + c . score, and its gradient c . grad(score)
    truth = flow.score(t, x) @ c
    torch.testing.assert_close(FokkerPlanck(moved).residual(flow, t, x), truth)
    precision = torch.linalg.inv(flow.covariance(t[:, 0]))
    torch.testing.assert_close(FokkerPlanck(moved).residual(flow, t, x, form="score"), -(precision @ c))
    density = flow.log_prob(t, x).exp()
    torch.testing.assert_close(FokkerPlanck(moved).residual(flow, t, x, form="density"), truth * density)


@pytest.mark.parametrize("kind", ["scalar", "diagonal", "matrix"])
def test_all_kinds_of_constant_coefficient_agree(kind: str) -> None:
    s = 0.7
    coefficient = {
        "scalar": s,
        "diagonal": torch.full((3,), s, dtype=F64),
        "matrix": s * torch.eye(3, dtype=F64),
    }
    flow, x = linear_case(3)[0], torch.randn(4, 5, 3, dtype=F64)
    t = 0.5 + torch.rand(4, 1, 1, dtype=F64)
    rates = FokkerPlanck(SDE(lambda _, y: -y, coefficient[kind])).log_rate(flow.score, t, x)
    score = flow.score(t, x)
    trace = -torch.linalg.inv(flow.covariance(t[..., 0])).diagonal(dim1=-2, dim2=-1).sum(-1)
    truth = 3 + (x * score).sum(-1) + 0.5 * s**2 * (trace + score.square().sum(-1))
    torch.testing.assert_close(rates, truth)


def black_scholes(t: Tensor, x: Tensor) -> Tensor:
    """Log density of dX = mu X dt + s X dW from X = 1, components independent."""
    mu, s = 0.3, 0.5
    z = (x.log() - (mu - 0.5 * s**2) * t) / (s * t.sqrt())
    return (-0.5 * z.square() - x.log() - (s * t.sqrt()).log() - 0.5 * math.log(2 * math.pi)).sum(-1)


def geometric(t: Tensor, x: Tensor) -> Tensor:
    return 0.3 * x


@pytest.mark.parametrize("form", ["log", "score", "density"])
@pytest.mark.parametrize(
    "diffusion",
    [lambda t, x: Diagonal(0.5 * x), lambda t, x: Matrix(torch.diag_embed(0.5 * x))],
    ids=["diagonal", "matrix"],
)
@pytest.mark.parametrize("d", [1, 3])
def test_geometric_brownian_motion_with_state_dependent_diffusion(form, diffusion, d: int) -> None:
    flow = LearnedFlow(black_scholes)
    t, x = 0.5 + torch.rand(10, 1, dtype=F64), 0.5 + torch.rand(10, d, dtype=F64)
    residual = FokkerPlanck(SDE(geometric, diffusion)).residual(flow, t, x, form=form)
    assert largest(residual) < EXACT


def test_scalar_state_dependent_diffusion_in_one_dimension() -> None:
    sde = SDE(geometric, lambda t, x: Scalar(0.5 * x[..., 0]))
    t, x = 0.5 + torch.rand(10, 1, dtype=F64), 0.5 + torch.rand(10, 1, dtype=F64)
    assert largest(FokkerPlanck(sde).residual(LearnedFlow(black_scholes), t, x)) < EXACT


def test_square_root_process_is_stationary_under_its_gamma_law() -> None:
    k, m, s = 1.5, 0.8, 0.6
    gamma = LearnedFlow(lambda t, x: ((2 * k * m / s**2 - 1) * x.log() - 2 * k / s**2 * x).sum(-1))
    sde = SDE(lambda t, x: k * (m - x), lambda t, x: Diagonal(s * x.sqrt()))
    x = 0.2 + torch.rand(10, 2, dtype=F64)
    for form in ("log", "score"):
        residual = FokkerPlanck(sde).residual(gamma, 0.0, x, form=form, stationary=True)
        assert largest(residual) < EXACT


def correlated(t: Tensor, x: Tensor) -> Matrix:
    """A non-diagonal, rectangular, state-dependent diffusion."""
    u, v = x[..., 0], x[..., 1]
    rows = [torch.stack([1 + u * v, v, u.sin()], -1), torch.stack([u.square(), v.cos(), 0 * u + 0.5], -1)]
    return Matrix(torch.stack(rows, -2))


def expanded_rate(sde: SDE, log_prob: Callable[[Tensor], Tensor], t: Tensor, x: Tensor) -> Tensor:
    """The textbook expansion of L* rho / rho at one point, with every derivative from torch.func."""
    jac, hess = torch.func.jacrev, torch.func.hessian

    def cov(y: Tensor) -> Tensor:
        return sde.diffusion(t, y).covariance(2)

    s, h = torch.func.grad(log_prob)(x), hess(log_prob)(x)
    d, dd, d2 = cov(x), jac(cov)(x), hess(cov)(x)
    spread = (
        torch.einsum("ijij->", d2) + 2 * torch.einsum("ijj,i->", dd, s) + (d * (h + s[:, None] * s)).sum()
    )
    return -jac(lambda y: sde.drift(t, y))(x).trace() - sde.drift(t, x) @ s + 0.5 * spread


def test_general_matrix_diffusion_matches_the_textbook_expansion() -> None:
    sde = SDE(lambda t, x: torch.stack([x[..., 1].sin(), -x[..., 0] * x[..., 1]], -1), correlated)
    x, t = torch.randn(6, 2, dtype=F64), torch.tensor(0.0, dtype=F64)

    def log_prob(y: Tensor) -> Tensor:
        return -(y.pow(4).sum(-1)) + y[..., 0] * y[..., 1]

    rates = FokkerPlanck(sde).log_rate(LearnedFlow(lambda s, y: log_prob(y)).score, t, x)
    truth = torch.stack([expanded_rate(sde, log_prob, t, p) for p in x])
    torch.testing.assert_close(rates, truth, rtol=1e-10, atol=1e-10)


def test_density_form_takes_signed_functions() -> None:
    sde = SDE(lambda t, x: -x, 1.0)
    x = torch.linspace(-2, 2, 9, dtype=F64)[:, None]
    # the first excited state of the OU operator: L* (x e^{-x^2}) = - x e^{-x^2}
    excited = lambda t, y: (y * (-y.square()).exp()).squeeze(-1)  # noqa: E731
    torch.testing.assert_close(FokkerPlanck(sde).density_rate(excited, 0.0, x), -excited(0.0, x))


def test_control_is_part_of_the_drift() -> None:
    flow, sde, t, x = linear_case(2)
    pushed = sde.controlled(lambda s, y: torch.ones_like(y))
    g = sde.diffusion(t, x).matrix(2)
    residual = FokkerPlanck(pushed).residual(flow, t, x)
    torch.testing.assert_close(residual, flow.score(t, x) @ g.sum(-1))


def test_covariance_divergence_agrees_with_forward_mode_and_its_probe_is_unbiased() -> None:
    sde, n = SDE(lambda t, x: -x, correlated), 40_000
    t, x = torch.tensor(0.0, dtype=F64), torch.randn(2, dtype=F64).expand(n, 2)
    y = attach(x[:3])
    truth = spatial_divergence(sde, t, x[:3].clone()).detach()
    torch.testing.assert_close(covariance_divergence(sde.diffusion(t, y), y), truth)
    y = attach(x)
    probe = torch.randn(n, 2, dtype=F64, generator=torch.Generator().manual_seed(2))
    estimate = covariance_divergence(sde.diffusion(t, y), y, probe).detach()
    assert float(((estimate.mean(0) - truth[0]).abs() / (estimate.std(0) / n**0.5)).max()) < 5


@pytest.mark.parametrize("diffusion", [0.7, correlated], ids=["constant", "state-dependent"])
def test_hutchinson_residual_is_unbiased_in_value_and_in_square(diffusion) -> None:
    n, sde = 20_000, SDE(lambda t, x: x.pow(3).flip(-1) - x.pow(3), diffusion)
    flow = LearnedFlow(lambda t, x: -x.pow(4).sum(-1) + t[..., 0] * x[..., 0] * x[..., 1])
    operator, point = FokkerPlanck(sde), torch.tensor([[0.6, -0.8]], dtype=F64)
    truth = float(operator.residual(flow, 0.5, point).detach())
    with torch.no_grad():
        r = operator.residual_probes(
            flow, 0.5, point.expand(n, 2), generator=torch.Generator().manual_seed(8)
        )
    assert r.shape == (2, n)
    assert abs(float(r.mean()) - truth) < 5 * float(r.std()) / (2 * n) ** 0.5
    squares = unbiased_square(r)
    assert abs(float(squares.mean()) - truth**2) < 5 * float(squares.std()) / n**0.5
    # the naive square is off by the variance of one probe
    assert float(r[0].square().mean()) - truth**2 > 0.5 * float(r[0].var())


def test_score_form_with_probes_is_unbiased() -> None:
    n, sde = 20_000, SDE(lambda t, x: -x.pow(3) + x.flip(-1).square(), 0.7)
    flow = LearnedFlow(lambda t, x: -x.pow(4).sum(-1))
    point = torch.randn(1, 2, dtype=F64)
    truth = FokkerPlanck(sde).residual(flow, 0.0, point, form="score").detach()
    with torch.no_grad():
        r = FokkerPlanck(sde).residual_probes(flow, 0.0, point.expand(n, 2), form="score")
    assert r.shape == (2, n, 2)
    error = r.flatten(0, 1).std(0) / (2 * n) ** 0.5
    assert float(((r.mean((0, 1)) - truth[0]).abs() / (error + 1e-12)).max()) < 5


def test_residual_is_differentiable_in_the_parameters_of_flow_and_equation() -> None:
    var = torch.tensor(0.8, dtype=F64, requires_grad=True)
    rate = torch.tensor(1.3, dtype=F64, requires_grad=True)
    sigma = torch.tensor(0.9, dtype=F64, requires_grad=True)
    x = torch.randn(6, 1, dtype=F64)
    flow = LearnedFlow(lambda t, y: (-0.5 * y.square() / var).sum(-1))
    sde = SDE(lambda t, y: -rate * y, lambda t, y: Scalar(sigma))

    def closed(v: Tensor, r: Tensor, s: Tensor) -> Tensor:
        # R = -r + r x^2 / v - s^2/2 (x^2 / v^2 - 1 / v)
        z = x.squeeze(-1).square()
        return -r + r * z / v - 0.5 * s**2 * (z / v**2 - 1 / v)

    ours = FokkerPlanck(sde).residual(flow, 0.0, x, stationary=True)
    torch.testing.assert_close(ours, closed(var, rate, sigma))
    got = torch.autograd.grad(ours.square().mean(), [var, rate, sigma])
    want = torch.autograd.grad(closed(var, rate, sigma).square().mean(), [var, rate, sigma])
    torch.testing.assert_close(got, want)


def test_probability_flow_transports_the_same_density() -> None:
    flow, sde, t, x = linear_case(3)
    operator = FokkerPlanck(sde)
    ode = ContinuityEquation(lambda s, y: operator.velocity(s, y, flow.score(s, y)))
    assert largest(ode.residual(flow, t, x)) < EXACT
    assert largest(ode.residual(flow, t, x, form="density")) < EXACT


@pytest.mark.parametrize("form", ["log", "score", "density"])
def test_graph_is_kept_just_where_something_can_be_trained(form) -> None:
    flow, sde, t, x = linear_case(2)
    assert not FokkerPlanck(sde).residual(flow, t, x, form=form).requires_grad
    assert not FokkerPlanck(sde).log_rate(flow.score, t, x).requires_grad
    scale = torch.ones((), dtype=F64, requires_grad=True)
    pulled = SDE(lambda s, y: scale * sde.drift(s, y), sde.diffusion(t, x))
    assert FokkerPlanck(pulled).residual(flow, t, x, form=form).requires_grad


def test_no_graph_when_gradients_are_off_and_single_precision_stays() -> None:
    flow = LearnedFlow(lambda t, x: -0.5 * x.square().sum(-1))
    operator = FokkerPlanck(SDE(lambda t, x: -0.5 * x, 1.0))
    with torch.no_grad():
        residual = operator.residual(flow, 0.0, torch.randn(3, 2))
    assert residual.dtype == torch.float32
    assert not residual.requires_grad
    assert largest(residual) < 1e-5


class _Memory(Brownian):
    """A process that claims a memory state."""

    num_states = 1


class _GridControl(Control):
    """A control that acts on a grid only."""

    def shape_increment(self, *args, **kwargs):
        raise NotImplementedError


def test_bad_input_raises() -> None:
    flow, sde, t, x = linear_case(2)
    operator = FokkerPlanck(sde)
    with pytest.raises(ShapeError, match="broadcast"):
        operator.residual(flow, t[:, 0], x)
    with pytest.raises(InvalidInputError, match="form is unknown"):
        operator.residual(flow, t, x, form="magic")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="method is unknown"):
        operator.residual(flow, t, x, method="magic")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="density form is exact only"):
        operator.residual(flow, t, x, form="density", method="hutchinson")
    memory: NoiseProcess = _Memory()
    with pytest.raises(InvalidInputError, match="memory"):
        FokkerPlanck(SDE(lambda s, y: -y, 1.0, memory))
    with pytest.raises(InvalidInputError, match="must be an SDE"):
        FokkerPlanck(lambda s, y: -y)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="field must be callable"):
        ContinuityEquation(1.0)  # type: ignore[arg-type]
    sde.control = _GridControl()
    with pytest.raises(InvalidInputError, match="acts on the increments"):
        FokkerPlanck(sde)
