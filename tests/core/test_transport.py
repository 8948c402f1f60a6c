"""Sinkhorn against POT, the closed form for Gaussians and exact transport."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from stochdyn.core import TransportPlan, sinkhorn, sinkhorn_divergence
from stochdyn.core.transport import _cost, _sinkhorn
from stochdyn.core.transport._groups import balanced_shifts
from stochdyn.errors import (
    ConvergenceWarning,
    DtypeMismatchError,
    EmptyDataError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    UnavailableError,
)

F64 = torch.float64


def _clouds(
    n: int, m: int, dim: int = 2, shift: float = 3.0, batch: tuple[int, ...] = ()
) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(*batch, n, dim, dtype=F64, generator=g)
    y = torch.randn(*batch, m, dim, dtype=F64, generator=g)
    y[..., 0] += shift
    return x, y


def _weights(n: int, seed: int) -> Tensor:
    w = 0.1 + torch.rand(n, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return w / w.sum()


def _check_marginals(plan: TransportPlan, tolerance: float) -> None:
    """The reported error is the true one, and within the tolerance."""
    p = plan.plan().double()
    a, b = plan.weights_x.double(), plan.weights_y.double()
    mass = a.sum(-1)
    by_rows, by_columns = (p.sum(-1) - a).abs().sum(-1), (p.sum(-2) - b).abs().sum(-1)
    true = torch.maximum(by_rows, by_columns) / mass
    rounding = 3 * torch.finfo(plan.cost_matrix.dtype).eps
    torch.testing.assert_close(plan.marginal_error, true, rtol=1e-6, atol=rounding)
    assert plan.converged
    assert float(true.amax()) <= tolerance + rounding


@pytest.mark.parametrize("reg", [0.1, 0.5, 5.0])
def test_plan_equals_pot_in_the_log_domain(reg: float) -> None:
    ot = pytest.importorskip("ot")
    x, y = _clouds(40, 30)
    a, b = _weights(40, 1), _weights(30, 2)
    plan = sinkhorn(x, y, reg, a, b, tolerance=1e-12)
    cost = ot.dist(x.numpy(), y.numpy())
    options = {"method": "sinkhorn_log", "stopThr": 1e-13, "numItermax": 20_000, "warn": False}
    reference = torch.from_numpy(ot.sinkhorn(a.numpy(), b.numpy(), cost, reg, **options))
    torch.testing.assert_close(plan.plan(), reference, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(
        plan.transport_cost, (reference * torch.from_numpy(cost)).sum(), rtol=1e-9, atol=0
    )
    _check_marginals(plan, 1e-12)


@pytest.mark.parametrize("sigma2", [0.1, 1.0, 10.0])
def test_gaussians_on_a_line_have_the_closed_form(sigma2: float) -> None:
    """Covariance of the coupling (sqrt(4 s0 s1 + sigma^4) - sigma^2)/2, and the optimum with its entropy.

    The trapezoid rule is exact to rounding for Gaussians on a fine grid; reg = 2 sigma^2 for this cost.
    """
    s0, s1, shift = 1.5, 0.6, 2.0
    grid = torch.linspace(-9, 9, 181, dtype=F64)[:, None]
    a, b = (torch.exp(-0.5 * grid[:, 0] ** 2 / s) for s in (s0, s1))
    plan = sinkhorn(grid, grid + shift, 2 * sigma2, a / a.sum(), b / b.sum(), tolerance=1e-12)
    exact = 0.5 * (math.sqrt(4 * s0 * s1 + sigma2**2) - sigma2)
    covariance = grid[:, 0] @ plan.plan() @ grid[:, 0]
    assert math.isclose(float(covariance), exact, rel_tol=1e-8)
    value = shift**2 + s0 + s1 - 2 * exact - sigma2 * math.log(1 - exact**2 / (s0 * s1))
    assert math.isclose(float(plan.value), value, rel_tol=1e-8)
    # The dual potential is quadratic, and the barycentric map linear with slope covariance / s0.
    inner = slice(40, -40)
    torch.testing.assert_close(
        plan.barycentric(grid + shift)[inner], shift + exact / s0 * grid[inner], rtol=1e-7, atol=1e-7
    )


def test_correlated_gaussians_in_the_plane_have_the_closed_form() -> None:
    """C = (S0^1/2 D S0^-1/2 - sigma^2)/2, D = (4 S0^1/2 S1 S0^1/2 + sigma^4)^1/2."""
    first = torch.tensor([[1.0, 0.4], [0.4, 0.7]], dtype=F64)
    second = torch.tensor([[0.6, -0.2], [-0.2, 1.1]], dtype=F64)
    sigma2, axis = 0.8, torch.linspace(-5.2, 5.2, 27, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    a, b = (torch.exp(-0.5 * ((grid @ torch.linalg.inv(s)) * grid).sum(-1)) for s in (first, second))
    plan = sinkhorn(grid, grid, 2 * sigma2, a / a.sum(), b / b.sum(), tolerance=1e-10)

    def root(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix)
        return vectors * values.sqrt() @ vectors.T

    half = root(first)
    d = root(4 * half @ second @ half + sigma2**2 * torch.eye(2, dtype=F64))
    exact = 0.5 * (half @ d @ torch.linalg.inv(half) - sigma2 * torch.eye(2, dtype=F64))
    torch.testing.assert_close(grid.T @ plan.plan() @ grid, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_tiny_regularisation_reaches_exact_transport(dtype: torch.dtype) -> None:
    """0 <= <P,C> - min <= reg log n for the entropic plan; the spread of the cost is 1e5 times the reg."""
    ot = pytest.importorskip("ot")
    n, reg = 60, 4e-4
    x, y = _clouds(n, n)
    exact = ot.emd2([], [], ot.dist(x.numpy(), y.numpy()))
    plan = sinkhorn(x.to(dtype), y.to(dtype), reg)
    _check_marginals(plan, 1e-6)
    rounding = 1e-6 * float(plan.cost_matrix.max())
    assert -rounding <= float(plan.transport_cost) - exact <= reg * math.log(n) + rounding


def test_slow_convergence_is_finished_by_newton_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _clouds(150, 150)
    fast = sinkhorn(x, y, 0.02)
    monkeypatch.setattr(_sinkhorn, "_is_slow", lambda *_: False)
    slow = sinkhorn(x, y, 0.02, max_iterations=100_000)
    _check_marginals(fast, 1e-6)
    torch.testing.assert_close(fast.value, slow.value, rtol=1e-7, atol=0)
    assert fast.num_iterations < 0.2 * slow.num_iterations


@pytest.mark.parametrize("memory", [4 * 2**30, 1.0])
def test_outliers_hardly_joined_to_the_rest_are_balanced(memory: float) -> None:
    """Pairs of outliers exchange 1e-9 of their mass with the rest and less, at which rate plain iterations move them."""
    g = torch.Generator().manual_seed(2)
    clouds = []
    for _ in range(2):
        cloud = 0.5 * torch.randn(200, 20, dtype=F64, generator=g)
        cloud[:30] += 8 * torch.randn(30, 20, dtype=F64, generator=g)
        clouds.append(cloud)
    weights = torch.ones(200, dtype=F64)
    weights[-5:] = 0  # points without mass belong nowhere
    plan = sinkhorn(*clouds, 0.5, weights / 195, memory=memory, max_iterations=2000)
    _check_marginals(plan, 1e-6)
    f, g_ = plan.potentials
    kernel = (f[:, None] - plan.cost_matrix) / 0.5 + (weights / 195).log()[:, None]
    torch.testing.assert_close(g_, -0.5 * torch.logsumexp(kernel, 0), rtol=0, atol=1e-3)


def test_shifts_of_groups_and_of_groups_of_groups_balance_them() -> None:
    """Two pairs of groups, joined by e^-60 between them: what leaves each group less what enters it is its excess."""
    strength = torch.full((4, 4), -60.0, dtype=F64)
    strength[:2, :2] = strength[2:, 2:] = -7
    flows = strength + torch.randn(4, 4, dtype=F64, generator=torch.Generator().manual_seed(0))
    excess = torch.tensor([1e-4, -2e-4, -1e-4, 2e-4], dtype=F64)
    shifts = balanced_shifts(flows, excess)
    moved = (flows + shifts[:, None] - shifts).fill_diagonal_(-torch.inf).exp()
    out, into = moved.sum(1), moved.sum(0)
    pair_out, pair_in = moved[2:, :2].sum(), moved[:2, 2:].sum()
    torch.testing.assert_close(pair_out - pair_in, torch.tensor(1e-4, dtype=F64), rtol=0.2, atol=0)
    scale = torch.maximum(out, into)
    torch.testing.assert_close((out - into) / scale, excess / scale, rtol=0, atol=0.1)


@pytest.mark.parametrize("annealing", [1.0, 0.5])
def test_underflow_falls_back_to_the_log_domain(annealing: float) -> None:
    """Without annealing, or from senseless potentials, the kernel underflows; the answer stays right."""
    x, y = _clouds(30, 30, shift=30.0)
    good = sinkhorn(x, y, 0.5, tolerance=1e-9)
    plain = sinkhorn(x, y, 0.5, tolerance=1e-9, annealing=annealing)
    g = torch.Generator().manual_seed(0)
    wild = tuple(1e4 * torch.randn(30, dtype=F64, generator=g) for _ in range(2))
    for plan in (plain, sinkhorn(x, y, 0.5, tolerance=1e-9, warm_start=wild)):
        _check_marginals(plan, 1e-9)
        torch.testing.assert_close(plan.plan(), good.plan(), rtol=1e-5, atol=1e-9)


def test_stopping_early_warns_and_says_the_true_error() -> None:
    x, y = _clouds(50, 50)
    with pytest.warns(ConvergenceWarning, match="marginal error"):
        plan = sinkhorn(x, y, 0.01, max_iterations=20)
    assert not plan.converged
    p = plan.plan()
    true = max(float((p.sum(-1) - 1 / 50).abs().sum()), float((p.sum(-2) - 1 / 50).abs().sum()))
    assert math.isclose(float(plan.marginal_error), true, rel_tol=1e-6)
    assert true > 1e-6


@pytest.mark.parametrize("reg", [0.05, 2.0])
def test_batches_equal_single_problems(reg: float) -> None:
    x, y = _clouds(20, 25, batch=(2, 3))
    a = torch.stack([_weights(20, s) for s in range(6)]).reshape(2, 3, 20)
    plan = sinkhorn(x, y, reg, weights_x=a, tolerance=1e-10)
    assert plan.plan().shape == (2, 3, 20, 25)
    assert plan.marginal_error.shape == plan.value.shape == plan.transport_cost.shape == (2, 3)
    _check_marginals(plan, 1e-10)
    for i in range(2):
        for j in range(3):
            alone = sinkhorn(x[i, j], y[i, j], reg, weights_x=a[i, j], tolerance=1e-10)
            torch.testing.assert_close(plan.plan()[i, j], alone.plan(), rtol=1e-6, atol=1e-10)
            torch.testing.assert_close(plan.value[i, j], alone.value)


def test_weights_of_zero_and_totals_other_than_one() -> None:
    x, y = _clouds(12, 10)
    a = _weights(12, 1)
    a[[0, 5]] = 0.0
    a, b = 3 * a / a.sum(), 3 * _weights(10, 2)
    plan = sinkhorn(x, y, 0.3, a, b, tolerance=1e-10)
    _check_marginals(plan, 1e-10)
    assert not plan.plan()[[0, 5]].any()
    kept = a > 0
    smaller = sinkhorn(x[kept], y, 0.3, a[kept], b, tolerance=1e-10)
    torch.testing.assert_close(plan.plan()[kept], smaller.plan(), rtol=1e-6, atol=1e-10)
    unit = sinkhorn(x, y, 0.3, a / 3, b / 3, tolerance=1e-10)
    torch.testing.assert_close(plan.value, 3 * unit.value)


def test_costs_may_be_functions_or_matrices_of_any_sign() -> None:
    x, y = _clouds(15, 18)
    base = sinkhorn(x, y, 0.3, tolerance=1e-10).plan()
    matrix = torch.cdist(x, y) ** 2 - 50 + 7 * x[:, :1]
    for plan in (
        sinkhorn(None, None, 0.3, cost=matrix, tolerance=1e-10),
        sinkhorn(x, y, 0.3, cost=lambda p, q: torch.cdist(p, q) ** 2, tolerance=1e-10),
    ):
        torch.testing.assert_close(plan.plan(), base, rtol=1e-6, atol=1e-10)


def test_potentials_give_the_plan_and_satisfy_both_equations() -> None:
    x, y = _clouds(15, 18)
    a, b = _weights(15, 1), _weights(18, 2)
    plan = sinkhorn(x, y, 0.3, a, b, tolerance=1e-12)
    f, g = plan.potentials
    exponent = (f[:, None] + g - torch.cdist(x, y) ** 2) / 0.3
    torch.testing.assert_close(plan.plan(), a[:, None] * b * exponent.exp(), rtol=1e-9, atol=1e-13)
    torch.testing.assert_close(
        torch.logsumexp(exponent + b.log(), 1), torch.zeros(15, dtype=F64), atol=1e-9, rtol=0
    )


def test_value_is_primal_as_well_as_dual() -> None:
    x, y = _clouds(15, 18)
    a, b = _weights(15, 1), _weights(18, 2)
    plan = sinkhorn(x, y, 0.3, a, b, tolerance=1e-12)
    p = plan.plan()
    divergence = (p * (p / (a[:, None] * b)).clamp_min(1e-300).log()).sum()
    torch.testing.assert_close(plan.value, plan.transport_cost + 0.3 * divergence, rtol=1e-9, atol=0)


def test_warm_start_saves_iterations() -> None:
    x, y = _clouds(60, 60)
    cold = sinkhorn(x, y, 0.05)
    moved = x + 1e-3 * torch.randn(x.shape, dtype=F64, generator=torch.Generator().manual_seed(3))
    warm = sinkhorn(moved, y, 0.05, warm_start=cold)
    fresh = sinkhorn(moved, y, 0.05)
    _check_marginals(warm, 1e-6)
    assert warm.num_iterations < fresh.num_iterations
    torch.testing.assert_close(warm.value, fresh.value, rtol=1e-6, atol=0)
    assert sinkhorn(x, y, 0.05, warm_start=cold.potentials).num_iterations <= 2


def test_gradients_by_the_envelope_theorem() -> None:
    x, y = (z.requires_grad_() for z in _clouds(5, 6, shift=0.5))
    logits = torch.zeros(5, dtype=F64, requires_grad=True)

    def value(x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        return sinkhorn(x, y, 0.7, logits.softmax(0), tolerance=1e-12).value

    assert torch.autograd.gradcheck(value, (x, y, logits), atol=1e-6)
    assert torch.autograd.gradcheck(
        lambda x, y: sinkhorn_divergence(x, y, 0.7, tolerance=1e-12), (x, y), atol=1e-6
    )


@pytest.mark.parametrize("memory", [4 * 2**30, 1.0])
def test_second_derivatives_are_refused(memory: float) -> None:
    """They would count the plan as a constant; of points, weights and a cost that was given."""
    x, y = (z.requires_grad_() for z in _clouds(6, 5))
    w = _weights(6, 1).requires_grad_()
    cost = torch.cdist(*_clouds(6, 5)).requires_grad_()
    for value, own in (
        (sinkhorn(x, y, 0.5, w, memory=memory).value, (x, y, w)),
        (sinkhorn(None, None, 0.5, w, cost=cost).value, (w, cost)),
        (sinkhorn_divergence(x, y, 0.5, memory=memory), (x,)),
    ):
        for argument in own:
            (slope,) = torch.autograd.grad(value.square(), argument, create_graph=True)
            with pytest.raises(UnavailableError, match="first derivatives only"):
                slope.sum().backward(retain_graph=True)


def test_divergence_is_zero_between_equal_clouds_and_sees_a_shift() -> None:
    x, _ = _clouds(20, 20)
    assert abs(float(sinkhorn_divergence(x, x.clone(), 0.5, tolerance=1e-10))) < 1e-9
    # Shifting a cloud by s adds |s|^2 to the squared cost of every coupling, whatever the reg.
    shifted = sinkhorn_divergence(x, x + torch.tensor([2.0, 1.0], dtype=F64), 0.5, tolerance=1e-11)
    assert math.isclose(float(shifted), 5.0, rel_tol=1e-7)


def test_sampled_pairs_follow_the_plan() -> None:
    """Chi-square over the cells expected at least five times; 5 sigma above its mean."""
    x, y = _clouds(4, 5)
    plan = sinkhorn(x, y, 2.0, _weights(4, 1), _weights(5, 2), tolerance=1e-10)
    n = 50_000
    i, j = plan.sample(n, torch.Generator().manual_seed(0))
    counts = torch.bincount(i * 5 + j, minlength=20).double()
    expected = n * plan.plan().flatten()
    big = expected >= 5
    chi2 = float(((counts - expected)[big] ** 2 / expected[big]).sum())
    cells = int(big.sum())
    assert chi2 < cells + 5 * math.sqrt(2 * cells)


def test_float32_keeps_its_dtype_and_the_tolerance_on_larger_clouds() -> None:
    x, y = _clouds(700, 800)
    plan = sinkhorn(x.float(), y.float(), 0.1)
    assert plan.plan().dtype == plan.potentials[0].dtype == plan.value.dtype == torch.float32
    _check_marginals(plan, 1e-6)
    torch.testing.assert_close(plan.value.double(), sinkhorn(x, y, 0.1).value, rtol=1e-5, atol=0)


def test_blocks_of_rows_don_t_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = _clouds(30, 20)
    whole = sinkhorn(x, y, 0.1, tolerance=1e-10)
    values = whole.plan(), whole.value, whole.transport_cost, whole.barycentric(y)
    monkeypatch.setattr(_cost, "_CHUNK", 70)
    monkeypatch.setattr(_sinkhorn, "_SUM", 7)
    again = sinkhorn(x, y, 0.1, tolerance=1e-10)
    torch.testing.assert_close(
        (again.plan(), again.value, again.transport_cost, again.barycentric(y)), values
    )
    single = sinkhorn(x.float(), y.float(), 0.1)
    torch.testing.assert_close(single.plan().double(), values[0], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("memory", [30 * 20 * 8, 1])
def test_costs_that_are_not_kept_give_the_same_answer(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clouds whose cost and kernel are more than the memory, or whose kernel alone is."""
    x, y = _clouds(30, 20)
    whole = sinkhorn(x, y, 0.1, tolerance=1e-10)
    monkeypatch.setattr(_cost, "_CHUNK", 70)
    plan = sinkhorn(x, y, 0.1, tolerance=1e-10, memory=memory)
    assert isinstance(plan.cost, _cost.PointCost)
    _check_marginals(plan, 1e-10)
    torch.testing.assert_close(plan.plan(), whole.plan(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close((plan.value, plan.transport_cost), (whole.value, whole.transport_cost))
    index = torch.tensor([3, 3, 29])
    torch.testing.assert_close(plan.rows(index), whole.rows(index))
    single = sinkhorn(x.float(), y.float(), 0.1, memory=1)
    torch.testing.assert_close(single.plan().double(), whole.plan(), rtol=1e-3, atol=1e-7)


def test_gradients_where_the_cost_is_not_kept() -> None:
    x, y = (z.requires_grad_() for z in _clouds(5, 6, shift=0.5))
    gradients = []
    for memory in (1e9, 1):
        x.grad = None
        sinkhorn(x, y, 0.7, tolerance=1e-12, memory=memory).value.backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("rho", [0.05, 1.0, 50.0])
@pytest.mark.parametrize("memory", [1e9, 1])
def test_relaxed_marginals_agree_with_pot(rho: float, memory: float) -> None:
    ot = pytest.importorskip("ot")
    x, y = _clouds(20, 25, shift=1.0)
    a, b = 1.5 * _weights(20, 1), _weights(25, 2)
    plan = sinkhorn(x, y, 0.2, a, b, relaxation=rho, tolerance=1e-11, memory=memory)
    cost = ot.dist(x.numpy(), y.numpy())
    options = {"reg_type": "kl", "c": (a[:, None] * b).numpy(), "numItermax": 100_000, "stopThr": 1e-14}
    reference = torch.from_numpy(
        ot.unbalanced.sinkhorn_unbalanced(a.numpy(), b.numpy(), cost, 0.2, rho, **options)
    )
    torch.testing.assert_close(plan.plan(), reference, rtol=1e-5, atol=1e-9)
    assert plan.status == "converged"

    def divergence(p: Tensor, q: Tensor) -> Tensor:
        return (p * (p / q).log() - p + q).sum()

    p = plan.plan()
    value = (p * torch.from_numpy(cost)).sum() + 0.2 * divergence(p, a[:, None] * b)
    value = value + rho * divergence(p.sum(1), a) + rho * divergence(p.sum(0), b)
    torch.testing.assert_close(plan.value, value, rtol=1e-7, atol=0)


def test_a_high_price_of_deviation_is_the_balanced_problem() -> None:
    x, y = _clouds(20, 25, shift=1.0)
    exact = sinkhorn(x, y, 0.2, tolerance=1e-10)
    relaxed = sinkhorn(x, y, 0.2, relaxation=1e7, tolerance=1e-9)
    torch.testing.assert_close(relaxed.plan(), exact.plan(), rtol=1e-4, atol=1e-9)


X, Y = _clouds(4, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weights_x": torch.ones(4, dtype=F64)}, InvalidInputError, "same total"),
        ({"weights_x": torch.tensor([0.5, 0.5, 0.5, -0.5], dtype=F64)}, InvalidInputError, "nonnegative"),
        ({"weights_y": torch.ones(4, dtype=F64)}, ShapeError, "weights_y doesn't fit"),
        ({"weights_y": torch.full((5,), torch.nan, dtype=F64)}, NonFiniteError, "weights_y"),
        ({"weights_y": torch.full((5,), 0.2)}, DtypeMismatchError, "weights_y torch.float32"),
        ({"x": X.float()}, DtypeMismatchError, "x torch.float32"),
        ({"x": X * torch.inf}, NonFiniteError, "x must be finite"),
        ({"x": X[:0]}, EmptyDataError, "x is empty"),
        ({"x": X[:, 0]}, ShapeError, r"x must be a floating tensor"),
        ({"y": Y[:, :1]}, ShapeError, "different dimensions"),
        ({"x": None}, InvalidInputError, "only if cost is a tensor"),
        ({"cost": torch.zeros(5, 4, dtype=F64)}, ShapeError, "cost doesn't fit"),
        ({"cost": lambda x, y: x @ y.mT * torch.nan}, NonFiniteError, "cost"),
        ({"cost": lambda x, y: x}, ShapeError, "cost\\(x, y\\)"),
        ({"reg": 0.0}, InvalidInputError, "reg must be greater than 0"),
        ({"reg": 1e-16}, InvalidInputError, "reg is below what torch.float64 can tell"),
        ({"x": X.float(), "y": Y.float(), "reg": 1e-8}, InvalidInputError, "reg is below what torch.float32"),
        ({"tolerance": -1.0}, InvalidInputError, "tolerance must be greater than 0"),
        ({"max_iterations": 0}, InvalidInputError, "max_iterations"),
        ({"annealing": 0.0}, InvalidInputError, "annealing"),
        (
            {"annealing": 0.5, "warm_start": (torch.zeros(4, dtype=F64), torch.zeros(5, dtype=F64))},
            InvalidInputError,
            "annealing does nothing beside warm_start",
        ),
        ({"relaxation": 0.0}, InvalidInputError, "relaxation"),
        ({"memory": -1.0}, InvalidInputError, "memory"),
        ({"warm_start": (torch.zeros(5), torch.zeros(5))}, ShapeError, "warm_start"),
        ({"x": X.expand(2, 4, 2), "y": Y.expand(3, 5, 2)}, ShapeError, "batch shapes don't broadcast"),
    ],
)
def test_bad_input_is_rejected(change: dict, error: type[Exception], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(error, match=message):
            sinkhorn(**{"x": X, "y": Y, "reg": 0.5, **change})


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_points_of_weight_zero_far_from_all_others_change_nothing(dtype: torch.dtype) -> None:
    x, y = X.to(dtype), Y.to(dtype)
    far = torch.full((2, 2), 80.0, dtype=dtype)
    a, b = (torch.cat([torch.ones(n), torch.zeros(2)]).to(dtype) / n for n in (4, 5))
    plan = sinkhorn(torch.cat([x, far]), torch.cat([y, far]), 0.3, a, b)
    assert plan.converged
    torch.testing.assert_close(plan.value, sinkhorn(x, y, 0.3).value, rtol=1e-4, atol=1e-5)
    assert plan.plan()[4:].abs().max() == 0


def test_levels_may_be_far_apart() -> None:
    # potentials of one level enter the kernel of the next without an iteration in the log domain; points of hardly any weight and none
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(30, 2, generator=g, dtype=torch.float64) + torch.tensor([m, 0.0]) for m in (0.0, 3.0))
    light = torch.ones(30, dtype=torch.float64)
    light[:3], light[3] = 1e-12, 0.0
    plans = [
        sinkhorn(x, y, 0.05, light * (30 / light.sum()), 1 + 0 * light, annealing=a)
        for a in (1.0, 0.25, 1e-2, 1e-4)
    ]
    for plan in plans:
        assert plan.converged
        assert float(plan.value) == pytest.approx(float(plans[0].value), abs=1e-5)
