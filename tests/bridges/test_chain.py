"""Pinned linear chains and relinearised transitions against dense Gaussian algebra and exact processes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from stochdyn.bridges import LinearDrift, LotkaVolterra
from stochdyn.bridges.laws import (
    AffineTransition,
    LinearisedTransition,
    panel_rule,
    transition,
)
from stochdyn.core.gaussian import cholesky, inverse, log_det, mm, mt, mv, quadratic

F64 = torch.float64
SPREAD = torch.tensor([[0.3, 0.05], [0.05, 0.2]], dtype=F64)


def _linear() -> LinearDrift:
    family = LinearDrift(2).double()
    with torch.no_grad():
        family.weight.copy_(torch.tensor([[-0.5, 0.8, 0.3], [-0.7, 0.2, 0.1]]))
    return family


def _volterra() -> LotkaVolterra:
    family = LotkaVolterra().double()
    with torch.no_grad():
        family.theta.copy_(torch.tensor([1.0, 0.4, 0.4, 0.1]))
    return family


def _pairs(n: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, generator=g, dtype=F64), torch.randn(n, 2, generator=g, dtype=F64)


@pytest.mark.parametrize("size", [1, 2, 3, 6])
def test_small_matrices_agree_with_the_usual_layout(size: int) -> None:
    g = torch.Generator().manual_seed(size)
    a, b = (torch.randn(4, 7, size, size, generator=g, dtype=F64) for _ in range(2))
    v = torch.randn(4, 7, size, generator=g, dtype=F64)
    spd = a @ a.mT + torch.eye(size, dtype=F64)

    def last(m: Tensor) -> Tensor:
        return m.movedim(1, -1)

    torch.testing.assert_close(mm(last(a), last(b)), last(a @ b))
    torch.testing.assert_close(mv(last(a), last(v)), last((a @ v[..., None]).squeeze(-1)))
    torch.testing.assert_close(mt(last(a)), last(a.mT))
    torch.testing.assert_close(inverse(last(spd)), last(torch.linalg.inv(spd)))
    torch.testing.assert_close(log_det(last(spd)), torch.logdet(spd).movedim(1, -1))
    torch.testing.assert_close(cholesky(last(spd)), last(torch.linalg.cholesky(spd)))
    torch.testing.assert_close(quadratic(last(v), last(spd)), torch.einsum("...i,...ij,...j->...", v, spd, v))


def test_the_factor_of_a_vanishing_matrix_is_zero() -> None:
    assert not cholesky(torch.zeros(2, 2, 3, dtype=F64)).any()


def test_a_covariance_that_rounding_made_indefinite_is_inverted_on_its_range() -> None:
    flat = torch.ones(3, 3, dtype=F64) - 1e-15 * torch.eye(3, dtype=F64)
    inverted = inverse(flat[..., None])[..., 0]
    assert bool(torch.isfinite(inverted).all())
    vector = torch.ones(3, dtype=F64)
    torch.testing.assert_close(vector @ inverted @ vector, torch.tensor(1.0, dtype=F64), atol=1e-3, rtol=0)


@pytest.mark.parametrize("step", [0.3, 0.1])
def test_the_quadrature_has_no_node_at_the_ends_and_is_of_fourth_order(step: float) -> None:
    ts, weights = panel_rule(1.0, 2.5, step)
    assert ts[0] == 1.0
    assert ts[-1] == 2.5
    assert bool((ts.diff() > 0).all())
    for power in range(4):
        exact = (2.5 ** (power + 1) - 1) / (power + 1)
        assert float((weights * ts[1:-1] ** power).sum()) == pytest.approx(exact, rel=1e-13)
    errors = [
        abs(float((w * t[1:-1].exp()).sum()) - (math.exp(2.5) - math.e))
        for t, w in (panel_rule(1.0, 2.5, s) for s in (0.125, 0.0625))
    ]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.1)


def test_pinned_moments_are_those_of_the_dense_joint_gaussian() -> None:
    part = AffineTransition(_linear(), SPREAD, 0.5, 1.5, 0.2)
    x, y = _pairs(3)
    chain = part.chain(x, y)
    steps = len(part.ts) - 1
    # the joint law of all states after the first, by unrolling
    mean, blocks = [x[0]], torch.zeros(2 * steps, 2 * steps, dtype=F64)
    for k in range(steps):
        a, c, q = chain.matrix[k, :, :, 0], chain.shift[k, :, 0], chain.noise[k, :, :, 0]
        mean.append(a @ mean[-1] + c)
        now = slice(2 * k, 2 * k + 2)
        if k:
            blocks[now, : 2 * k] = a @ blocks[2 * k - 2 : 2 * k, : 2 * k]
            blocks[: 2 * k, now] = blocks[now, : 2 * k].mT
            blocks[now, now] = a @ blocks[2 * k - 2 : 2 * k, 2 * k - 2 : 2 * k] @ a.mT
        blocks[now, now] += q
    joint = torch.cat(mean[1:])
    gain = blocks[:-2, -2:] @ torch.linalg.inv(blocks[-2:, -2:])
    expected = joint[:-2] + gain @ (y[0] - joint[-2:])
    covariance = blocks[:-2, :-2] - gain @ blocks[-2:, :-2]
    pinned = chain.pin(y.mT)
    torch.testing.assert_close(pinned.mean(x.mT)[1:-1, :, 0].reshape(-1), expected)
    own = torch.stack([covariance[2 * k : 2 * k + 2, 2 * k : 2 * k + 2] for k in range(steps - 1)])
    torch.testing.assert_close(pinned.covariance()[1:-1, :, :, 0], own)
    torch.testing.assert_close(pinned.mean(x.mT)[-1], y.mT)
    law = torch.distributions.MultivariateNormal(joint[-2:], blocks[-2:, -2:])
    torch.testing.assert_close(chain.log_density(x.mT, y.mT)[0], law.log_prob(y[0]))


def test_the_pinned_drift_is_the_limit_of_the_step_to_the_next_state() -> None:
    part = AffineTransition(_linear(), SPREAD, 0.0, 1.0, 0.1)
    x, y = _pairs(2)
    gaps = []
    for h in (1e-3, 5e-4):
        ts = torch.tensor([0.0, 0.4, 0.4 + h, 1.0], dtype=F64)
        pinned = part.chain(x, y, ts).pin(y.mT)
        z = torch.tensor([[0.2, 0.3], [0.1, -0.4]], dtype=F64)
        moved = mv(pinned.matrix[1], z) + pinned.shift[1]
        gaps.append(float(((moved - z) / h - pinned.drift(1, z)).abs().max()))
    assert gaps[1] < 0.01
    assert gaps[0] / gaps[1] == pytest.approx(2, abs=0.1)


def test_draws_of_the_pinned_process_have_its_moments() -> None:
    part = AffineTransition(_linear(), SPREAD, 0.0, 1.0, 0.25)
    x, y = _pairs(1)
    n = 20_000
    pinned = part.chain(x, y).pin(y.mT)
    states, kicks = pinned.sample(x.mT.expand(2, n).contiguous(), torch.Generator().manual_seed(0))
    covariance = pinned.covariance()[..., 0]
    mean = pinned.mean(x.mT)[..., 0]
    for k in range(1, len(part.ts) - 1):
        error = (covariance[k].diagonal() / n).sqrt()
        assert bool(((states[k].mean(-1) - mean[k]).abs() < 4.5 * error).all())
        torch.testing.assert_close(torch.cov(states[k]), covariance[k], rtol=0.06, atol=0.003)
    assert not (states[-1] - y.mT).abs().gt(1e-12).any()
    assert kicks.shape == (len(part.ts) - 1, 2, n)


def test_the_linearised_transition_of_an_affine_drift_tends_to_the_exact_one() -> None:
    """Fourth order in the spacing."""
    x, y = _pairs(6)
    exact = AffineTransition(_linear(), SPREAD, 0.0, 1.0, 0.01).log_kernel(x, y)
    errors = []
    for step in (0.25, 0.125):
        close = LinearisedTransition(_linear(), SPREAD, 0.0, 1.0, step).log_kernel(x, y)
        errors.append(float((close - exact).abs().max()))
    assert errors[1] < 1e-3
    assert math.log2(errors[0] / errors[1]) == pytest.approx(4, abs=0.5)


def test_an_affine_drift_gets_the_exact_transition() -> None:
    assert isinstance(transition(_linear(), SPREAD, 0.0, 1.0, 0.1), AffineTransition)
    assert isinstance(transition(_volterra(), SPREAD, 0.0, 1.0, 0.1), LinearisedTransition)


def test_the_relinearised_density_is_that_of_simulated_paths_at_small_noise() -> None:
    """Mean and covariance of simulated end points against the kernel, as a density on a grid about them."""
    family, spread = _volterra(), 0.01 * torch.eye(2, dtype=F64)
    part = LinearisedTransition(family, spread, 0.0, 1.0, 0.02)
    start, n, steps = torch.tensor([[5.0, 4.0]], dtype=F64), 40_000, 400
    g = torch.Generator().manual_seed(0)
    z, t = start.repeat(n, 1), torch.tensor(0.0, dtype=F64)
    with torch.no_grad():
        for _ in range(steps):
            noise = torch.randn(n, 2, generator=g, dtype=F64)
            middle = z + 0.5 / steps * family(t, z)
            z = z + family(t, middle) / steps + 0.1 / math.sqrt(steps) * noise
        width = z.std(0)
        axes = [torch.linspace(-5, 5, 41, dtype=F64) * w + m for w, m in zip(width, z.mean(0), strict=True)]
        grid = torch.cartesian_prod(*axes)
        density = part.log_kernel(start, grid)[0].exp() * float(
            (axes[0][1] - axes[0][0]) * (axes[1][1] - axes[1][0])
        )
    assert float(density.sum()) == pytest.approx(1, abs=0.02)
    density = density / density.sum()
    mean = density @ grid
    centred = grid - mean
    covariance = centred.mT @ (density[:, None] * centred)
    assert bool(((z.mean(0) - mean).abs() < 4.5 * width / math.sqrt(n) + 2e-3).all())
    torch.testing.assert_close(covariance, z.mT.cov(), rtol=0.04, atol=1e-3)


def test_many_pairs_are_linearised_by_rows() -> None:
    """Near where partners are expected, one nominal path per row is as good as one per pair."""
    family = LotkaVolterra().double()
    with torch.no_grad():
        family.theta.copy_(torch.tensor([1.0, 0.4, 0.4, 0.1]))
    g = torch.Generator().manual_seed(0)
    x = torch.tensor([5.0, 4.0], dtype=F64) + 0.1 * torch.randn(6, 2, generator=g, dtype=F64)
    part = LinearisedTransition(family, 0.01 * torch.eye(2, dtype=F64), 0.0, 0.5, 0.05)
    path = x
    for _ in range(500):
        path = path + 0.001 * family(torch.tensor(0.0), path)
    y = path + 0.1 * torch.randn(6, 2, generator=g, dtype=F64)
    torch.testing.assert_close(part.log_kernel_by_rows(x, y), part.log_kernel(x, y), atol=0.15, rtol=0.05)
