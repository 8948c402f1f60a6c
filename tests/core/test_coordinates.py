"""Equations and laws in other coordinates, and equations in Stratonovich's sense, against exact answers."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from torch.distributions import Independent, LogNormal, Normal, transforms

import stochdyn as sd
from stochdyn import testing
from stochdyn.core import integrate
from tests.core.laws import F64, ExactMemory, log_log_slope, within

TS = torch.linspace(0, 1, 11, dtype=F64)
TIME = torch.tensor(0.3, dtype=F64)


class Growth(nn.Module):
    """A linear drift with a parameter."""

    def __init__(self, rate: float = 0.3) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.tensor(rate, dtype=F64))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.rate * x


class Share(nn.Module):
    """A noise in proportion to the state."""

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return 0.2 * x


def growth(scale: float = 1.0) -> sd.SDE:
    return sd.SDE(lambda t, x: 0.3 * x / scale, lambda t, x: 0.2 * x / scale**0.5)


SOFTPLUS = transforms.SoftplusTransform()
CHANGES: dict[str, Any] = {
    "log": "log",
    "logit": "logit",
    "sqrt": "sqrt",
    "exp": "exp",
    "affine of log": transforms.ComposeTransform(
        [transforms.ExpTransform().inv, transforms.AffineTransform(1.0, 2.0)]
    ),
    "inverse of affine": transforms.AffineTransform(1.0, 2.0).inv,
    "softplus": SOFTPLUS.inv,
    "by component": ["log", "logit"],
    "tanh": transforms.TanhTransform().inv,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("noise", ["diagonal", "matrix", "scalar"])
def test_an_equation_in_other_coordinates_obeys_itos_formula(name: str, noise: str) -> None:
    """Drift and diffusion of z = f(x) are f'b + f'' GG'/2 and f'G, by derivatives of f itself."""
    strengths = {
        "diagonal": lambda t, x: 0.3 + x**2,
        "matrix": lambda t, x: torch.stack([x, 0.1 + 0 * x, x.flip(-1)], -1),
        "scalar": lambda t, x: sd.Scalar(x.sum(-1)),
    }
    sde = sd.SDE(lambda t, x: t - x**3, strengths[noise])
    x = torch.tensor([[0.3, 0.7], [0.2, 0.45]], dtype=F64, requires_grad=True)
    from stochdyn.core.sde.coordinates import as_transform

    f = as_transform(CHANGES[name])
    z = f(x)
    (first,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    second = torch.zeros_like(x)
    if first.requires_grad:
        (second,) = torch.autograd.grad(first.sum(), x)
    g = sde.diffusion(TIME, x).matrix(2)
    drift = first * sde.drift(TIME, x) + 0.5 * second * g.square().sum(-1)
    changed = sde.transformed(CHANGES[name])
    torch.testing.assert_close(changed.drift(TIME, z.detach()), drift.detach(), rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(
        changed.diffusion(TIME, z.detach()).matrix(2),
        (first.unsqueeze(-1) * g).detach(),
        rtol=1e-12,
        atol=0.0,
    )


class Rotation(transforms.Transform):
    """Polar coordinates, to a vector from a vector."""

    domain = torch.distributions.constraints.real_vector
    codomain = torch.distributions.constraints.real_vector
    bijective = True

    def _call(self, x: Tensor) -> Tensor:
        return torch.stack([x.norm(dim=-1), torch.atan2(x[..., 1], x[..., 0])], -1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.stack([y[..., 0] * y[..., 1].cos(), y[..., 0] * y[..., 1].sin()], -1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        return -y[..., 0].log()


def test_a_plane_in_polar_coordinates_has_the_drift_of_a_bessel_process() -> None:
    """Brownian motion in the plane: dr = dt / 2r + dW, dphi = dW' / r."""
    polar = sd.SDE(lambda t, x: torch.zeros_like(x), 1.0).transformed(Rotation())
    z = torch.tensor([[2.0, 0.4], [0.5, -1.0]], dtype=F64)
    wanted = torch.stack([0.5 / z[:, 0], torch.zeros(2, dtype=F64)], -1)
    torch.testing.assert_close(polar.drift(TIME, z), wanted, rtol=0, atol=1e-14)
    covariance = torch.diag_embed(torch.stack([torch.ones(2, dtype=F64), z[:, 0] ** -2], -1))
    torch.testing.assert_close(polar.diffusion(TIME, z).covariance(2), covariance, rtol=1e-13, atol=1e-14)


def test_log_of_geometric_motion_is_exact_on_any_grid() -> None:
    """Constant coefficients in logarithms: mean, density and path ratio are those of the exact law."""
    start = torch.zeros(1, dtype=F64)
    law = sd.DiffusionMeasure(start, growth().transformed("log")).transformed("exp")
    exact = sd.LinearGaussianMeasure(
        torch.zeros(1, 1, dtype=F64), torch.tensor([0.28], dtype=F64), 0.2, start
    ).transformed("exp")
    ts = TS[[0, 3, 10]]
    path = law.sample(ts, 5, 0)
    torch.testing.assert_close(law.log_prob(path), exact.log_prob(path))
    wanted = sum(
        LogNormal(path.x[:, i].log() + 0.28 * h, 0.2 * h**0.5).log_prob(path.x[:, i + 1])
        for i, h in enumerate((ts[1:] - ts[:-1]).tolist())
    )
    torch.testing.assert_close(law.log_prob(path), wanted.squeeze(-1))  # type: ignore[union-attr]
    marginal = exact.marginal(1.0)
    truth = LogNormal(torch.tensor(0.28, dtype=F64), 0.2)
    torch.testing.assert_close(marginal.mean[0], truth.mean)
    torch.testing.assert_close(marginal.covariance[0, 0], truth.variance)
    torch.testing.assert_close(
        marginal.log_prob(torch.full((1,), 1.3, dtype=F64)), truth.log_prob(torch.tensor(1.3).double())
    )
    torch.testing.assert_close(exact.drift(0.5, torch.ones(1, dtype=F64)), torch.full((1,), 0.3, dtype=F64))


def test_paths_simulated_finely_keep_their_density() -> None:
    """A law with steps of its own weighs the fine path, in either coordinates."""
    start = Independent(Normal(torch.zeros(1, dtype=F64), 0.5), 1)
    inner = sd.DiffusionMeasure(start, growth().transformed("log"), start_time=0.0, dt=0.02)
    law = inner.transformed("exp")
    other = inner.controlled(lambda t, z: 0.5 + z).transformed("exp")
    path = law.sample(TS[[0, 5, 10]], 3, 0)
    base = inner.sample(TS[[0, 5, 10]], 3, 0)
    torch.testing.assert_close(path.x, base.x.exp())
    torch.testing.assert_close(
        law.log_prob(path),
        inner.log_prob(base) - base.fine.x.sum((-1, -2)),  # type: ignore[union-attr]
    )
    torch.testing.assert_close(
        other.log_rn(path, law), inner.controlled(lambda t, z: 0.5 + z).log_rn(base, inner)
    )


def test_coordinates_survive_copies_precision_and_storage() -> None:
    z = torch.tensor([[0.2, 0.4]], dtype=F64)
    shift = transforms.AffineTransform(torch.tensor([1.0, 2.0], dtype=F64), 3.0)
    for change in (
        "log",
        ["log", "exp"],
        transforms.ComposeTransform([transforms.ExpTransform().inv, shift]),
    ):
        sde = sd.SDE(Growth(), Share()).transformed(change)
        wanted = sde.drift(TIME, z)
        for twin in (copy.deepcopy(sde), pickle.loads(pickle.dumps(sde))):
            torch.testing.assert_close(twin.drift(TIME, z), wanted, rtol=0, atol=0)
        assert [name for name, _ in sde.named_parameters()] == ["drift.sde.drift.rate"]
        single = copy.deepcopy(sde).float()
        assert single.drift(TIME.float(), z.float()).dtype == torch.float32
        torch.testing.assert_close(
            single.drift(TIME.float(), z.float()).double(), wanted, rtol=1e-4, atol=1e-5
        )
    testing.check_device(sd.SDE(Growth(), Share()).transformed(shift))


@pytest.mark.parametrize("unit", ["length", "time"])
def test_units_of_positive_laws(unit: str) -> None:
    def answer(factor: float) -> dict[str, Tensor]:
        length, time = (factor, 1.0) if unit == "length" else (1.0, factor)
        start = torch.tensor([length], dtype=F64).log()
        sde = sd.SDE(lambda t, x: (length - x) / time, lambda t, x: 0.2 * x / time**0.5).transformed("log")
        law = sd.DiffusionMeasure(start, sde).transformed("exp")
        path = law.sample(TS * time, 3, 0)
        density = law.log_prob(path) + 10 * math.log(length)
        return {
            "x": path.x / length,
            "density": density,
            "drift": law.drift(0.5 * time, path.x[:, 3]) * time / length,
        }

    testing.check_units(answer)


def test_gradients_in_parameters_and_states() -> None:
    def value(rate: Tensor, z: Tensor) -> Tensor:
        sde = sd.SDE(lambda t, x: rate * (1 - x), lambda t, x: 0.3 * x)
        return torch.stack([sde.transformed(c).drift(TIME, z) for c in ("log", "logit", SOFTPLUS.inv)])

    testing.check_gradients(value, torch.tensor(0.7, dtype=F64), torch.tensor([[0.4]], dtype=F64))


def test_controls_go_with_the_coordinates_and_back() -> None:
    sde = growth().controlled(lambda t, x: 2 * x, lambda t, x: x)
    changed = sde.transformed("log")
    z = torch.tensor([[0.3]], dtype=F64)
    torch.testing.assert_close(changed.slope(TIME, z), torch.full((1, 1), 0.28, dtype=F64) + 0.4 * z.exp())
    back = changed.untransformed()
    torch.testing.assert_close(back.slope(TIME, z.exp()), sde.slope(TIME, z.exp()))
    assert back.shares_base(sde)


def test_logits_near_their_ends_keep_their_digits() -> None:
    """Drift and noise of a logit where x is 1 less 1e-20, which float64 can't tell from 1."""
    sde = sd.SDE(lambda t, x: torch.zeros_like(x), lambda t, x: torch.ones_like(x)).transformed("logit")
    z = torch.tensor([[46.0]], dtype=F64)
    slope = math.exp(-46.0)
    torch.testing.assert_close(sde.diffusion(TIME, z).value, torch.full((1, 1), 1 / slope, dtype=F64))
    torch.testing.assert_close(sde.drift(TIME, z), torch.full((1, 1), 0.5 / slope**2, dtype=F64))


def square_root(ratio: float) -> tuple[sd.SDE, Any]:
    """Return a square-root process whose drift at zero is ``ratio / 2`` of its variance rate, and its exact law at time 1."""
    rate, mean, start = 2.0, 1.0, 0.3
    strength = math.sqrt(2 * rate * mean / ratio)
    c = 2 * rate / ((1 - math.exp(-rate)) * strength**2)
    exact = stats.ncx2(4 * rate * mean / strength**2, 2 * c * start * math.exp(-rate), scale=1 / (2 * c))
    return sd.SDE(lambda t, x: rate * (mean - x), lambda t, x: strength * x.clamp_min(0).sqrt()), exact


def distance(x: Tensor, exact: Any) -> float:
    return float(stats.kstest(x.numpy(), exact.cdf).statistic)


def test_a_square_root_process_in_logarithms_has_its_exact_law() -> None:
    """Far from zero: a noncentral chi-square, up to the error of the steps."""
    sde, exact = square_root(8.0)
    start = torch.full((1,), math.log(0.3), dtype=F64)
    law = sd.DiffusionMeasure(start, sde.transformed("log")).transformed("exp")
    x = law.sample(torch.linspace(0, 1, 401, dtype=F64), 4000, 0).x[:, -1, 0]
    assert bool((x > 0).all())
    assert distance(x, exact) < 1.63 / 4000**0.5  # one per cent false alarms
    assert distance(1.1 * x, exact) > 1.63 / 4000**0.5


def test_a_square_root_process_that_touches_zero_is_truncated_there() -> None:
    sde, exact = square_root(1.0)
    law = sd.DiffusionMeasure(torch.full((1,), 0.3, dtype=F64), sde)
    x = law.sample(torch.linspace(0, 1, 1001, dtype=F64), 4000, 0).x[:, -1, 0].clamp_min(0)
    assert distance(x, exact) < 1.63 / 4000**0.5


def test_gene_frequencies_stay_between_bounds() -> None:
    """Wright-Fisher with mutation in logits: exact mean and variance, for dX = a (m - X) dt + s sqrt(X (1 - X)) dW."""
    a, m, s, start = 1.0, 0.4, 0.4, 0.5
    sde = sd.SDE(lambda t, x: a * (m - x), lambda t, x: s * (x * (1 - x)).sqrt())
    law = sd.DiffusionMeasure(torch.zeros(1, dtype=F64), sde.transformed("logit")).transformed("sigmoid")
    x = law.sample(torch.linspace(0, 1, 201, dtype=F64), 4000, 0).x[:, -1, 0]
    assert bool(((x > 0) & (x < 1)).all())
    mean = m + (start - m) * math.exp(-a)
    # d E X^2 / dt = (2 a m + s^2) E X - (2 a + s^2) E X^2.
    b, c = 2 * a * m + s**2, 2 * a + s**2
    second = start**2 * math.exp(-c) + b * (
        m * (1 - math.exp(-c)) / c + (start - m) * (math.exp(-a) - math.exp(-c)) / (c - a)
    )
    assert within(x.mean(), torch.tensor(mean), x.std() / 4000**0.5)
    assert within(x.square().mean(), torch.tensor(second), x.square().std() / 4000**0.5)


# Stratonovich.


@pytest.mark.parametrize(
    "diffusion",
    [
        lambda t, x: 0.4 * x,
        lambda t, x: sd.Scalar(0.4 * x[..., 0]),
        lambda t, x: 0.4 * x.unsqueeze(-1),
        lambda t, x: x.flip(-1),
        lambda t, x: sd.Scalar(x.sum(-1)),
    ],
)
def test_the_conversion_is_half_the_derivative_of_the_noise_along_itself(diffusion: Any) -> None:
    x = torch.tensor([[0.4, 1.3], [2.0, -0.5]], dtype=F64, requires_grad=True)
    sde = sd.SDE(lambda t, x: -x, diffusion, stratonovich=True)
    g = sd.SDE(lambda t, x: -x, diffusion).diffusion(TIME, x).matrix(2)
    term = torch.zeros_like(x)
    for k in range(g.shape[-1]):
        for i in range(2):
            (slope,) = torch.autograd.grad(g[..., i, k].sum(), x, retain_graph=True, allow_unused=True)
            if slope is not None:
                term[..., i] = term[..., i].detach() + 0.5 * (slope * g[..., :, k]).sum(-1).detach()
    torch.testing.assert_close(sde.drift(TIME, x).detach(), (-x + term).detach())


@pytest.mark.parametrize(("method", "theory"), [("euler", 0.5), ("milstein", 1.0), ("heun", 1.0)])
def test_stratonovich_geometric_motion_is_the_exponential_of_the_noise(method: str, theory: float) -> None:
    """dX = a X dt + b X o dW has the solution exp(a t + b W): strong orders against it."""
    finest, paths, levels = 11, 400, (4, 5, 6, 7, 8)
    dw = torch.randn(2**finest, paths, 1, dtype=F64) * 2 ** (-finest / 2)
    truth = torch.exp(0.2 + 0.5 * dw.sum(0))
    sde = sd.SDE(lambda t, x: 0.2 * x, lambda t, x: 0.5 * x, stratonovich=True)
    errors = []
    for level in levels:
        ts = torch.linspace(0, 1, 2**level + 1, dtype=F64)
        coarse = dw.reshape(2**level, -1, paths, 1).sum(1)
        with torch.no_grad():
            x = integrate(sde, torch.ones(paths, 1, dtype=F64), ts, coarse, method=method).x[-1]
        errors.append(float((x - truth).square().mean().sqrt()))
    order = log_log_slope([2.0**-level for level in levels], errors)
    assert abs(order - theory) < 0.15, f"order {order:.3f}, errors {errors}"


def test_the_mean_of_a_stratonovich_motion_has_weak_order_one() -> None:
    """E X = exp(a + b^2 / 2), where Euler's mean is known without sampling."""
    sde = sd.SDE(lambda t, x: 0.2 * x, lambda t, x: 0.5 * x, stratonovich=True)
    errors = []
    for n in (8, 16, 32, 64):
        # The mean of an Euler step of a linear equation is the step without noise.
        ts = torch.linspace(0, 1, n + 1, dtype=F64)
        x = integrate(sde, torch.ones(1, dtype=F64), ts, torch.zeros(n, 1, dtype=F64)).x[-1]
        errors.append(abs(float(x.detach()) - math.exp(0.2 + 0.125)))
    assert abs(log_log_slope([1 / n for n in (8, 16, 32, 64)], errors) - 1) < 0.05


def test_constant_noise_has_no_conversion() -> None:
    drift = Growth()
    assert sd.SDE(drift, 0.5, stratonovich=True).drift is drift


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: growth().transformed("cube"), "transform"),
        (lambda: growth().transformed(lambda x: x), "transform"),
        (lambda: growth().transformed(transforms.AbsTransform()), "invertible"),
        (lambda: growth().transformed([]), "one transform per component"),
        (lambda: growth().transformed(["log"]).drift(TIME, torch.zeros(1, 2)), "per component"),
        (
            lambda: growth().transformed(transforms.StickBreakingTransform()).drift(TIME, torch.zeros(1, 2)),
            "number of components",
        ),
        (lambda: growth().untransformed(), "made by transformed"),
        (
            lambda: sd.SDE(lambda t, x: x, lambda t, x: x, ExactMemory([1.0], [1.0])).transformed("log"),
            "Brownian motion",
        ),
        (lambda: sd.SDE(lambda t, x: x, lambda t, x: x, stratonovich="yes"), "stratonovich"),  # type: ignore[arg-type]
    ],
)
def test_bad_coordinates_are_refused(build: Any, message: str) -> None:
    with pytest.raises(sd.errors.InvalidInputError, match=message):
        build()


def test_laws_in_different_coordinates_are_not_compared() -> None:
    inner = sd.DiffusionMeasure(torch.zeros(1, dtype=F64), growth().transformed("log"))
    path = inner.transformed("exp").sample(TS, 2, 0)
    with pytest.raises(sd.errors.UnavailableError, match="same"):
        inner.transformed("exp").log_rn(path, inner.transformed("sigmoid"))


@pytest.mark.parametrize("method", ["ekf", "ukf"])
def test_kalman_filters_are_exact_in_coordinates_in_which_the_equation_is_linear(method: str) -> None:
    """Logarithms of geometric motion seen with noise: the evidence of the linear law, from the equation of the motion itself."""
    from stochdyn.infer import LinearObservations, NonlinearObservations

    times, y = torch.tensor([0.5, 1.0, 2.0], dtype=F64), torch.tensor([[0.1], [0.5], [0.4]], dtype=F64)
    start = torch.zeros(1, dtype=F64)
    found = NonlinearObservations(growth().transformed("log"), start, times, lambda z: z, 0.1, method)
    law = sd.LinearGaussianMeasure(torch.zeros(1, 1, dtype=F64), torch.tensor([0.28], dtype=F64), 0.2, start)
    exact = LinearObservations(law, times, 0.1)
    torch.testing.assert_close(found.log_prob(y), exact.log_prob(y))
