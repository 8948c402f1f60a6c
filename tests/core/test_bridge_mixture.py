"""Mixtures of bridges against direct sums, automatic differentiation and the Fokker-Planck equation."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from stochdyn.core import BridgeMixture, PinnedProcess
from stochdyn.core.gaussian import bridge_mixture
from stochdyn.errors import DtypeMismatchError, InvalidInputError, ShapeError, TimeGridError

F64 = torch.float64
SPAN = {"start_time": 0.5, "end_time": 2.0}


def _flow(rate: float = 0.8, n: int = 6) -> BridgeMixture:
    g = torch.Generator().manual_seed(0)
    starts, ends = (torch.randn(n, 2, dtype=F64, generator=g) for _ in range(2))
    weights = torch.rand(n, dtype=F64, generator=g)
    scale = torch.tensor([0.7, 1.2], dtype=F64)
    return BridgeMixture(starts, ends, weights, rate, 0.3, scale, **SPAN)


def _bridges(flow: BridgeMixture) -> PinnedProcess:
    return PinnedProcess(flow.starts, flow.ends, flow.rate, flow.centre, flow.scale, **SPAN)


def _direct(flow: BridgeMixture, t: float) -> MixtureSameFamily:
    bridges, ts = _bridges(flow), torch.tensor([t], dtype=F64)
    normal = Independent(Normal(bridges.mean(ts)[:, 0], bridges.variance(ts)[:, 0].sqrt()), 1)
    return MixtureSameFamily(Categorical(logits=flow.log_weights), normal)


@pytest.mark.parametrize("rate", [0.0, 0.8])
def test_density_and_score_equal_the_mixture_of_normals(rate: float) -> None:
    flow = _flow(rate)
    x = torch.randn(5, 3, 2, dtype=F64).requires_grad_()
    direct = _direct(flow, 1.1).log_prob(x)
    torch.testing.assert_close(flow.log_prob(1.1, x), direct)
    (score,) = torch.autograd.grad(direct.sum(), x)
    torch.testing.assert_close(flow.score(1.1, x).detach(), score)


@pytest.mark.parametrize("rate", [0.0, 0.8])
def test_drift_is_the_posterior_mean_of_the_bridges_drifts(rate: float) -> None:
    flow, x = _flow(rate), torch.randn(7, 2, dtype=F64)
    bridges, ts = _bridges(flow), torch.tensor([1.1], dtype=F64)
    normal = Independent(Normal(bridges.mean(ts)[:, 0], bridges.variance(ts)[:, 0].sqrt()), 1)
    share = (normal.log_prob(x[:, None]) + flow.log_weights).softmax(-1)
    each = bridges.drift(1.1, x[:, None].expand(7, 6, 2))
    torch.testing.assert_close(flow.drift(1.1, x), (share[..., None] * each).sum(1))


@pytest.mark.parametrize("rate", [0.0, 0.8])
def test_projection_keeps_the_marginals(rate: float) -> None:
    """d/dt rho = -div(drift rho) + 1/2 sigma^2 Laplacian rho, divided by rho, with exact derivatives."""
    flow, x = _flow(rate), torch.randn(4, 2, dtype=F64)
    t = torch.tensor(1.2, dtype=F64, requires_grad=True)
    for point in x:

        def log_density(y: Tensor) -> Tensor:
            return flow.log_prob(t.detach(), y)

        (slope,) = torch.autograd.grad(flow.log_prob(t, point), t)
        score = torch.autograd.functional.jacobian(log_density, point)
        hessian = torch.autograd.functional.hessian(log_density, point)
        jacobian = torch.autograd.functional.jacobian(lambda y: flow.drift(1.2, y), point)
        drift = flow.drift(1.2, point)
        diffusion = 0.5 * flow.scale.square() * (hessian.diagonal() + score**2)
        residual = slope + jacobian.trace() + drift @ score - diffusion.sum()
        assert abs(float(residual)) < 1e-10


def test_times_broadcast_to_points() -> None:
    flow = _flow()
    x, t = torch.randn(3, 4, 2, dtype=F64), torch.tensor([0.6, 1.0, 1.9], dtype=F64)[:, None, None]
    for method in (flow.log_prob, flow.score, flow.drift):
        together = method(t, x)
        for i in range(3):
            torch.testing.assert_close(together[i], method(float(t[i]), x[i]))


def test_chunks_don_t_change_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    flow, x = _flow(), torch.randn(50, 2, dtype=F64)
    whole = flow.log_prob(1.0, x), flow.drift(1.0, x)
    monkeypatch.setattr(bridge_mixture, "_CHUNK", 40)
    torch.testing.assert_close((flow.log_prob(1.0, x), flow.drift(1.0, x)), whole)


def test_samples_have_the_marginal_moments() -> None:
    flow, n = _flow(), 40_000
    times = torch.tensor([0.5, 1.1, 2.0], dtype=F64)
    x = flow.sample(times, n, torch.Generator().manual_seed(0))
    assert x.shape == (3, n, 2)
    paths = flow.sample_paths(times, n, torch.Generator().manual_seed(1)).movedim(-2, 0)
    weights, bridges = flow.log_weights.exp(), _bridges(flow)
    for k in range(3):
        mean, var = bridges.mean(times)[:, k], bridges.variance(times)[:, k]
        first = weights @ mean
        second = weights @ (var + mean**2) - first**2
        for draws in (x[k], paths[k]):
            assert ((draws.mean(0) - first).abs() <= 5 * (second / n).sqrt()).all()
            fourth = ((draws - first) ** 4).mean(0)
            assert ((draws.var(0) - second).abs() <= 5 * ((fourth - second**2) / n).sqrt()).all()


def test_simulated_projection_arrives_at_the_ends() -> None:
    """Two ends, one start: half the paths go to each, though the drift knows only the present."""
    flow = BridgeMixture(torch.zeros(2, 1, dtype=F64), torch.tensor([[-2.0], [2.0]], dtype=F64), scale=0.5)
    g = torch.Generator().manual_seed(0)
    x, ts = torch.zeros(4000, 1, dtype=F64), torch.linspace(0, 1, 201, dtype=F64)
    for t, dt in zip(ts[:-1], ts.diff(), strict=True):
        x = x + flow.drift(t, x) * dt + 0.5 * dt.sqrt() * torch.randn(x.shape, dtype=F64, generator=g)
    assert ((x.abs() - 2).abs() < 5 * 0.5 * math.sqrt(1 / 200)).all()
    assert abs(float((x > 0).double().mean()) - 0.5) <= 5 * 0.5 / math.sqrt(4000)


def test_drift_at_the_start_follows_the_nearest_start() -> None:
    starts = torch.tensor([[0.0], [0.0], [1.0]], dtype=F64)
    ends = torch.tensor([[1.0], [3.0], [10.0]], dtype=F64)
    flow = BridgeMixture(starts, ends, torch.tensor([1.0, 3.0, 5.0], dtype=F64))
    torch.testing.assert_close(flow.drift(0.0, starts[[0, 2]]), torch.tensor([[2.5], [9.0]], dtype=F64))


def test_far_points_stay_finite_in_float32() -> None:
    flow = BridgeMixture(torch.zeros(2, 1), torch.tensor([[-1.0], [1.0]]), scale=0.01)
    x = torch.tensor([[500.0], [-500.0]])
    torch.testing.assert_close(flow.expected_ends(0.5, x)[1], torch.tensor([[1.0], [-1.0]]))
    assert torch.isfinite(flow.score(0.5, x)).all()


ONE = torch.zeros(2, 1, dtype=F64)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BridgeMixture(ONE, ONE[:1]), ShapeError, "pair up"),
        (lambda: BridgeMixture(ONE[:, 0], ONE[:, 0]), ShapeError, "number of axes"),
        (
            lambda: BridgeMixture(ONE, ONE, torch.tensor([1.0, -1.0], dtype=F64)),
            InvalidInputError,
            "nonnegative",
        ),
        (lambda: BridgeMixture(ONE, ONE, torch.ones(3, dtype=F64)), ShapeError, "weights must fit"),
        (lambda: BridgeMixture(ONE, ONE, torch.ones(2)), DtypeMismatchError, "weights torch.float32"),
        (lambda: BridgeMixture(ONE, ONE, scale=0.0), InvalidInputError, "scale must be positive"),
        (lambda: BridgeMixture(ONE, ONE).log_prob(0.0, ONE), TimeGridError, "between the ends"),
        (lambda: BridgeMixture(ONE, ONE).drift(1.0, ONE), TimeGridError, "between the ends"),
        (lambda: BridgeMixture(ONE, ONE).drift(0.5, ONE.expand(2, 3)), ShapeError, "x has the wrong size"),
        (lambda: BridgeMixture(ONE, ONE).sample(1.5, 2), TimeGridError, "inside the span"),
    ],
)
def test_bad_input_is_rejected(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
