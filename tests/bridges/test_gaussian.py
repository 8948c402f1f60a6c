"""The Gaussian bridge against its published formula, its optimality conditions and an independent quadrature."""

from __future__ import annotations

import math

import pytest
import torch

import stochdyn as sd
from stochdyn.bridges import GaussianBridge
from stochdyn.core import LinearGaussianMeasure
from stochdyn.testing import check_forms, check_gradients

F64 = torch.float64
HORIZON = 1.3
SPAN = torch.zeros(1, dtype=F64), torch.tensor([HORIZON], dtype=F64)


def spd(d, seed):
    a = torch.randn(d, d, dtype=F64, generator=torch.Generator().manual_seed(seed))
    return a @ a.mT + 0.1 * torch.eye(d, dtype=F64)


def vector(d, seed):
    return torch.randn(d, dtype=F64, generator=torch.Generator().manual_seed(seed))


def brownian(d=3, scale=0.7):
    return GaussianBridge(vector(d, 0), spd(d, 1), vector(d, 2), spd(d, 3), scale, HORIZON)


def linear(d=3, scale=0.7):
    a = 0.5 * torch.stack([vector(d, 10 + i) for i in range(d)])
    return GaussianBridge(vector(d, 0), spd(d, 1), vector(d, 2), spd(d, 3), scale, HORIZON, a, vector(d, 4))


def root(m):
    values, vectors = torch.linalg.eigh(m)
    return (vectors * values.sqrt()) @ vectors.mT


def test_the_published_formula_of_the_brownian_coupling():
    bridge = brownian()
    s2 = 0.49 * HORIZON
    half = root(bridge.cov0)
    inner = root(4 * half @ bridge.cov1 @ half + s2**2 * torch.eye(3, dtype=F64))
    expected = 0.5 * (half @ inner @ torch.linalg.inv(half) - s2 * torch.eye(3, dtype=F64))
    assert torch.allclose(bridge.cross_covariance, expected, rtol=0, atol=1e-12)


def test_the_published_formula_of_the_brownian_marginals_and_drift():
    bridge = brownian()
    t = torch.tensor(0.4, dtype=F64)
    lam, cross = t / HORIZON, bridge.cross_covariance
    spread = 0.49 * t * (HORIZON - t) / HORIZON * torch.eye(3, dtype=F64)
    cov = (1 - lam) ** 2 * bridge.cov0 + lam**2 * bridge.cov1 + lam * (1 - lam) * (cross + cross.mT) + spread
    assert torch.allclose(bridge.covariance(t), cov, rtol=0, atol=1e-12)
    ahead = (1 - lam) * cross + lam * bridge.cov1
    gain = (ahead.mT - cov) / (HORIZON - t) @ torch.linalg.inv(cov)
    assert torch.allclose(gain, gain.mT, atol=1e-12)
    x = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(5))
    drift = (bridge.mean1 - bridge.mean0) / HORIZON + (x - bridge.mean(t)) @ gain.mT
    assert torch.allclose(bridge.drift(t, x), drift, rtol=0, atol=1e-11)


def test_one_dimension_of_dsbm():
    one = torch.ones(1, 1, dtype=F64)
    bridge = GaussianBridge(-0.1 * one[0], one, 0.1 * one[0], one, 1.0, 1.0)
    assert abs(bridge.cross_covariance.item() - (math.sqrt(5) - 1) / 2) < 1e-14


@pytest.mark.parametrize("make", [brownian, linear])
def test_the_precision_of_the_coupling_is_that_of_the_reference_off_the_diagonal(make):
    bridge = make()
    precision = torch.linalg.inv(bridge.coupling.covariance_matrix)
    phi, _, noise = (p[0] for p in bridge.reference.transition(*SPAN))
    expected = -phi.mT @ torch.linalg.inv(noise)
    assert torch.allclose(precision[:3, 3:], expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("make", [brownian, linear])
def test_the_drift_transports_the_marginals_to_the_ends(make):
    # the linear equation with the bridge's drift, solved by quadrature that knows nothing of bridges
    bridge = make()
    law = LinearGaussianMeasure(
        lambda t: bridge.affine_drift(t)[0],
        lambda t: bridge.affine_drift(t)[1],
        0.7,
        bridge.mean0,
        bridge.cov0,
    )
    ts = torch.linspace(0, HORIZON, 5, dtype=F64)
    assert torch.allclose(law.mean(ts), bridge.mean(ts), rtol=0, atol=1e-9)
    assert torch.allclose(law.covariance(ts), bridge.covariance(ts), rtol=0, atol=1e-9)
    assert torch.allclose(law.joint_covariance(ts), bridge.joint_covariance(ts), rtol=0, atol=1e-9)
    assert torch.allclose(law.covariance(ts)[-1], bridge.cov1, rtol=0, atol=1e-9)
    assert torch.allclose(law.path_kl(bridge.reference, ts), bridge.kl(), rtol=1e-9, atol=0)


def test_the_one_dimensional_ou_bridge():
    a, sigma, big = -0.8, 0.5, 1.5
    fixed = GaussianBridge(
        torch.tensor([3.0], dtype=F64),
        torch.zeros(1, 1, dtype=F64),
        torch.tensor([1.0], dtype=F64),
        torch.zeros(1, 1, dtype=F64),
        sigma,
        big,
        torch.tensor([[a]], dtype=F64),
    )
    for t in (0.2, 0.75, 1.4):
        q = sigma**2 * (math.exp(2 * a * t) - 1) / (2 * a)
        q_end = sigma**2 * (math.exp(2 * a * big) - 1) / (2 * a)
        last = q * math.exp(a * (big - t)) / q_end
        first = math.exp(a * t) - last * math.exp(a * big)
        assert abs(fixed.mean(t).item() - (first * 3 + last * 1)) < 1e-12
        assert abs(fixed.covariance(t).item() - (q - last * math.exp(a * (big - t)) * q)) < 1e-12


def test_no_coupling_with_the_same_ends_is_nearer_to_the_reference():
    bridge = linear()
    phi, c, noise = (p[0] for p in bridge.reference.transition(*SPAN))

    def divergence(cross):
        gain = cross.mT @ torch.linalg.inv(bridge.cov0)
        rest = bridge.cov1 - gain @ cross
        gap = bridge.mean1 - phi @ bridge.mean0 - c
        off = gain - phi
        second = rest + off @ bridge.cov0 @ off.mT + torch.outer(gap, gap)
        log_det = torch.logdet(noise) - torch.logdet(rest)
        return 0.5 * (log_det + torch.trace(torch.linalg.solve(noise, second)) - 3)

    cross = bridge.cross_covariance.clone().requires_grad_()
    best = divergence(cross)
    best.backward()
    assert torch.allclose(best, bridge.kl(), rtol=1e-10)
    assert cross.grad.abs().max() < 1e-10
    for seed in range(5):
        other = bridge.cross_covariance + 0.01 * torch.stack([vector(3, 100 * seed + i) for i in range(3)])
        assert divergence(other) > best


def test_paths_have_the_joint_law():
    bridge = linear(d=2)
    ts = torch.tensor([0.0, 0.5, 1.3], dtype=F64)
    n = 20000
    x = bridge.sample(ts, n, generator=torch.Generator().manual_seed(0)).x
    assert x.shape == (n, 3, 2)
    cov = bridge.joint_covariance(ts)
    scale = cov.diagonal().sqrt()
    centred = (x - bridge.mean(ts)).reshape(n, -1)
    assert (centred.mean(0) / scale).abs().max() < 5 / n**0.5
    gap = (centred.mT @ centred / n - cov) / torch.outer(scale, scale)
    assert gap.abs().max() < 5 * 2**0.5 / n**0.5


def test_noise_on_one_component_reaches_the_other_through_the_drift():
    momentum = torch.tensor([[0.0, 1.0], [0.0, -0.3]], dtype=F64)
    noise = torch.tensor([[0.0], [0.7]], dtype=F64)
    bridge = GaussianBridge(vector(2, 0), spd(2, 1), vector(2, 2), spd(2, 3), noise, HORIZON, momentum)
    slope, offset = bridge.affine_drift(0.5)
    assert torch.equal(slope[0], momentum[0])
    assert offset[0] == 0
    law = LinearGaussianMeasure(
        lambda t: bridge.affine_drift(t)[0],
        lambda t: bridge.affine_drift(t)[1],
        noise,
        bridge.mean0,
        bridge.cov0,
    )
    end = torch.tensor([HORIZON], dtype=F64)
    assert torch.allclose(law.covariance(end)[0], bridge.cov1, rtol=0, atol=1e-8)


def test_vanishing_noise_is_optimal_transport_and_loud_noise_is_independence():
    d = 2
    s0, s1, zero = spd(d, 1), spd(d, 3), torch.zeros(d, dtype=F64)
    quiet = GaussianBridge(zero, s0, zero, s1, 1e-4, 1.0)
    half = root(s0)
    monge = half @ root(half @ s1 @ half) @ torch.linalg.inv(half)
    assert torch.allclose(quiet.cross_covariance, monge, rtol=0, atol=1e-7)
    loud = GaussianBridge(zero, s0, zero, s1, 1e4, 1.0)
    assert loud.cross_covariance.abs().max() < 1e-6


def test_measure_and_flow():
    bridge = linear(d=2)
    ts = torch.linspace(0, HORIZON, 41, dtype=F64)
    path = bridge.as_diffusion().sample(ts, (4000,), generator=torch.Generator().manual_seed(1))
    error = (path.x[:, -1].mean(0) - bridge.mean1) / bridge.cov1.diagonal().sqrt()
    assert error.abs().max() < 5 / 4000**0.5 + 0.02  # and an Euler bias of the order of the step
    x = bridge.sample(torch.tensor([0.7], dtype=F64), 3).x[:, 0]
    assert torch.allclose(bridge.flow.log_prob(0.7, x), bridge.marginal(0.7).log_prob(x))
    residual = bridge.flow.residual(0.7, x, sd.FokkerPlanck(sd.SDE(bridge.drift, 0.7)))
    assert residual.abs().max() < 1e-6


def test_float32_follows_the_inputs():
    one = torch.ones(1, 1)
    bridge = GaussianBridge(-one[0], one, one[0], one, 1.0, 1.0)
    assert bridge.mean(0.5).dtype == torch.float32
    assert abs(bridge.cross_covariance.item() - 0.618034) < 1e-5


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cov0": torch.ones(2, 3)}, sd.errors.ShapeError, "cov0"),
        ({"mean1": torch.ones(3)}, sd.errors.ShapeError, "mean1"),
        ({"cov1": torch.tensor([[1.0, 0.0], [0.0, -1.0]])}, sd.errors.InvalidInputError, "semi-definite"),
        ({"cov1": torch.tensor([[1.0, 0.5], [0.0, 1.0]])}, sd.errors.InvalidInputError, "symmetric"),
        ({"horizon": 0.0}, sd.errors.InvalidInputError, "horizon"),
        ({"diffusion": -1.0}, sd.errors.DiffusionError, "diffusion"),
        ({"diffusion": torch.tensor([[0.0], [1.0]])}, sd.errors.SingularDiffusionError, "reach"),
        ({"mean0": torch.tensor([0.0, float("nan")])}, sd.errors.NonFiniteError, "mean0"),
        ({"drift_matrix": torch.zeros(3, 3)}, sd.errors.ShapeError, "drift_matrix"),
        ({"mean0": torch.zeros(2, dtype=F64)}, sd.errors.DtypeMismatchError, "precision"),
    ],
)
def test_bad_input(change, error, words):
    good = {
        "mean0": torch.zeros(2),
        "cov0": torch.eye(2),
        "mean1": torch.ones(2),
        "cov1": torch.eye(2),
        "diffusion": 1.0,
        "horizon": 1.0,
    }
    with pytest.raises(error, match=words):
        GaussianBridge(**{**good, **change})


def test_times_outside_and_ends_without_density():
    zero = torch.zeros(1)
    bridge = GaussianBridge(zero, zero[None], zero, torch.ones(1, 1), 1.0, 1.0)
    with pytest.raises(sd.errors.TimeGridError, match="inside the bridge"):
        bridge.mean(1.5)
    with pytest.raises(sd.errors.SingularDiffusionError, match="density"):
        bridge.marginal(0.0).log_prob(torch.zeros(1))
    with pytest.raises(sd.errors.ShapeError, match="x"):
        bridge.drift(0.5, torch.zeros(3, 2))
    assert bridge.covariance(0.0).item() == 0


def test_derivatives_where_eigenvalues_coincide():
    """Isotropic clouds: the derivative of eigenvectors is infinite there, that of the bridge isn't."""
    zero, one, eye = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64), torch.eye(2, dtype=F64)
    x = torch.tensor([[0.1, 0.2]], dtype=F64)

    def drift(mean1, diffusion, size):
        return GaussianBridge(zero, eye, mean1, size * eye, diffusion, HORIZON).drift(0.4, x)

    check_gradients(drift, one, torch.tensor(0.7, dtype=F64), torch.tensor(2.0, dtype=F64))

    def spread(root0, root1, matrix):
        law = GaussianBridge(
            zero, root0 @ root0.mT + eye, one, root1 @ root1.mT + eye, 0.7, HORIZON, drift_matrix=matrix
        )
        return law.marginal(0.4).covariance

    check_gradients(spread, eye, eye, torch.zeros(2, 2, dtype=F64), second=False)


def test_ends_of_any_form():
    wanted = GaussianBridge(vector(2, 0), spd(2, 1), vector(2, 2), spd(2, 3), 0.7, HORIZON).marginal(0.4).mean
    ends = [vector(2, 0), spd(2, 1), vector(2, 2), spd(2, 3)]
    for k in range(4):

        def answer(x, k=k):
            return GaussianBridge(*ends[:k], x, *ends[k + 1 :], 0.7, HORIZON).marginal(0.4).mean

        if k:
            check_forms(answer, ends[k])
    lists = GaussianBridge(*(e.numpy() for e in ends), 0.7, HORIZON)
    torch.testing.assert_close(lists.marginal(0.4).mean, wanted)
