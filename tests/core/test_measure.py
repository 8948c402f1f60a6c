"""Path measures: sampling, divergences in closed form, time reversal, and laws that can't be compared."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

import stochdyn as sd
from stochdyn.core import PathMeasure
from stochdyn.errors import (
    DiffusionMismatchError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    SingularDiffusionError,
    TimeGridError,
)
from tests.core.laws import F64, ExactMemory, log_log_slope, within

ZERO = torch.zeros(1, dtype=F64)


def ou(rate: float, scale: float, start: Any = ZERO, mean: float = 0.0) -> sd.DiffusionMeasure:
    return sd.DiffusionMeasure(start, sd.SDE(lambda t, x: rate * (mean - x), scale))


def euler_gaussian(rate: float, scale: float, mean: float, start: Normal, ts: Tensor) -> MultivariateNormal:
    """Return the law of a whole Euler path of an OU process, by dense algebra."""
    n = ts.shape[0]
    mu, s0 = start.mean.to(F64), start.stddev.to(F64)
    loading = torch.zeros(n, n, dtype=F64)
    loading[0, 0] = s0
    centre = [mu]
    for k, h in enumerate(ts[1:] - ts[:-1]):
        loading[k + 1] = (1 - rate * h) * loading[k]
        loading[k + 1, k + 1] = scale * h.sqrt()
        centre.append(centre[-1] + rate * (mean - centre[-1]) * h)
    return MultivariateNormal(torch.stack(centre), scale_tril=loading)


def test_a_measure_is_a_path_measure_and_a_module() -> None:
    law = ou(1.0, 0.5)
    assert isinstance(law, PathMeasure)
    assert isinstance(law, torch.nn.Module)


@pytest.mark.parametrize("sample_shape", [(), (3,), (3, 4)])
@pytest.mark.parametrize("batch", [(), (5,)])
def test_shapes(sample_shape: tuple[int, ...], batch: tuple[int, ...]) -> None:
    law = sd.DiffusionMeasure(torch.zeros(*batch, 2), sd.SDE(lambda t, x: -x, torch.ones(2, 3)))
    path = law.sample(torch.linspace(0, 1, 6), sample_shape)
    assert path.x.shape == (*sample_shape, *batch, 6, 2)
    assert path.dw.shape == (*sample_shape, *batch, 5, 3)
    assert path.x.dtype == torch.float32
    assert law.controlled(lambda t, x: torch.ones(3)).log_rn(path, law).shape == (*sample_shape, *batch)


def test_the_generator_decides_the_paths() -> None:
    law = ou(1.0, 0.5, Independent(Normal(ZERO, 1.0), 1))
    ts = torch.linspace(0, 1, 6)
    state = torch.get_rng_state()
    a, b, c = (law.sample(ts, (3,), torch.Generator().manual_seed(s)).x for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(7)
    first = law.sample(ts).x
    torch.manual_seed(7)
    assert torch.equal(first, law.sample(ts).x)


def test_moments_of_the_ornstein_uhlenbeck_law() -> None:
    start = Normal(torch.tensor(0.5, dtype=F64), 0.7)
    law = ou(1.3, 0.8, Independent(Normal(start.loc.reshape(1), 0.7), 1), mean=0.4)
    ts = torch.tensor([0.0, 0.2, 0.3, 0.7, 1.0], dtype=F64)
    x = law.sample(ts, (20_000,)).x[..., 0]
    exact = euler_gaussian(1.3, 0.8, 0.4, start, ts)
    assert within(x.mean(0), exact.mean, x.std(0) / 20_000**0.5)
    centred = x - exact.mean
    products = centred[:, :, None] * centred[:, None, :]
    assert within(products.mean(0), exact.covariance_matrix, products.std(0) / 20_000**0.5, 4.5)


@pytest.mark.parametrize("estimator", ["rate", "density", "stl"])
def test_divergence_of_two_ornstein_uhlenbeck_laws_on_a_grid(estimator: str) -> None:
    ts = torch.tensor([0.0, 0.2, 0.3, 0.7, 1.0], dtype=F64)
    start_q, start_p = Normal(torch.tensor(0.5, dtype=F64), 0.7), Normal(torch.tensor(0.0, dtype=F64), 1.0)
    q = ou(1.3, 0.8, Independent(Normal(start_q.loc.reshape(1), 0.7), 1), mean=0.4)
    p = ou(0.3, 0.8, Independent(Normal(start_p.loc.reshape(1), 1.0), 1), mean=-0.2)
    exact = torch.distributions.kl_divergence(
        euler_gaussian(1.3, 0.8, 0.4, start_q, ts), euler_gaussian(0.3, 0.8, -0.2, start_p, ts)
    )
    estimate = q.kl(p, ts, num_samples=20_000, estimator=estimator)
    assert within(estimate.mean, exact, estimate.stderr)
    assert estimate.stderr < 0.02


def test_the_rate_is_the_quietest_estimator_of_a_divergence() -> None:
    ts = torch.linspace(0, 1, 21, dtype=F64)
    errors = {
        e: float(ou(1.0, 0.5, mean=1.0).kl(ou(1.0, 0.5), ts, 2000, estimator=e).stderr)
        for e in ("rate", "density")
    }
    # The drifts differ by a constant, so the rate has no noise at all.
    assert errors["rate"] < 1e-12 < 0.01 < errors["density"]


def test_divergence_tends_to_its_continuous_limit() -> None:
    """Stationary Q: KL = KL(q0 || p0) + (b - a)^2 T / (4 a), reached with order 1."""
    a, b, s, horizon = 1.0, 2.5, 0.9, 2.0
    variance_q, variance_p = s**2 / (2 * a), s**2 / (2 * b)
    start_q = Normal(torch.tensor(0.0, dtype=F64), variance_q**0.5)
    start_p = Normal(torch.tensor(0.0, dtype=F64), variance_p**0.5)
    limit = float(torch.distributions.kl_divergence(start_q, start_p)) + (b - a) ** 2 * horizon / (4 * a)
    counts = (8, 16, 32, 64, 128)
    errors = []
    for n in counts:
        ts = torch.linspace(0, horizon, n + 1, dtype=F64)
        grid = torch.distributions.kl_divergence(
            euler_gaussian(a, s, 0, start_q, ts), euler_gaussian(b, s, 0, start_p, ts)
        )
        errors.append(abs(float(grid) - limit))
    assert abs(log_log_slope([1 / n for n in counts], errors) - 1) < 0.15
    q = ou(a, s, Independent(Normal(ZERO, variance_q**0.5), 1))
    p = ou(b, s, Independent(Normal(ZERO, variance_p**0.5), 1))
    estimate = q.kl(p, torch.linspace(0, horizon, 129, dtype=F64), num_samples=4000)
    assert within(estimate.mean, limit, estimate.stderr + errors[-1] / 4)


def test_a_controlled_law_is_the_one_with_the_shifted_drift() -> None:
    matrix = torch.tensor([[0.5, 0.2], [0.4, -1.0]], dtype=F64)
    law = sd.DiffusionMeasure(torch.zeros(2, dtype=F64), sd.SDE(lambda t, x: -x, matrix))
    q = law.controlled(lambda t, x: torch.sin(x + t))
    shifted = sd.DiffusionMeasure(
        torch.zeros(2, dtype=F64), sd.SDE(lambda t, x: -x + torch.sin(x + t) @ matrix.T, matrix)
    )
    ts = torch.linspace(0, 1, 6, dtype=F64)
    path = q.sample(ts, (10,))
    torch.testing.assert_close(q.log_prob(path), shifted.log_prob(path))
    assert q.log_rn(path, shifted).abs().max() < 1e-12
    torch.testing.assert_close(shifted.log_rn(path, law), q.log_rn(path, law))


def test_degenerate_noise_works_in_noise_space() -> None:
    """A damped oscillator kicked in its velocity: no density, but exact weights and a known divergence."""
    kick = torch.tensor([[0.0], [0.7]], dtype=F64)
    law = sd.DiffusionMeasure(
        torch.zeros(2, dtype=F64), sd.SDE(lambda t, x: torch.stack([x[..., 1], -x[..., 0]], -1), kick)
    )
    q = law.controlled(lambda t, x: torch.ones_like(x[..., :1]) * 0.5)
    ts = torch.linspace(0, 1, 11, dtype=F64)
    assert float(q.kl(law, ts, 16).mean) == pytest.approx(0.5 * 0.25)
    with pytest.raises(SingularDiffusionError):
        q.log_prob(q.sample(ts))
    # The same law written with its own drift: the gap lies in the direction of the noise.
    shifted = sd.DiffusionMeasure(
        torch.zeros(2, dtype=F64),
        sd.SDE(lambda t, x: torch.stack([x[..., 1], 0.35 - x[..., 0]], -1), kick),
    )
    path = q.sample(ts, (10,))
    torch.testing.assert_close(
        shifted.log_rn(shifted.sample(ts, (10,)), law, "rate"), q.log_rn(path, law, "rate")
    )
    # An observed path says what drove it where noise acts, and is impossible where it moves without noise.
    observed = sd.PathSample(ts, path.x, path.dw)
    torch.testing.assert_close(shifted.log_rn(observed, law), q.log_rn(path, law))
    moved = path.x + torch.stack([3 * ts, 0 * ts], -1)
    with pytest.raises(DiffusionMismatchError, match="impossible under both"):
        shifted.log_rn(sd.PathSample(ts, moved, path.dw), law)


OTHERS: dict[str, tuple[Any, str]] = {
    "another strength": (sd.SDE(lambda t, x: -x, 0.6), "largest difference"),
    "another strength of one component": (
        sd.SDE(lambda t, x: -x, torch.tensor([0.5, 0.6], dtype=F64)),
        "largest",
    ),
    "a strength of the state": (
        sd.SDE(lambda t, x: -x, lambda t, x: 0.5 + 0.1 * x**2),
        "different diffusions",
    ),
    "noise with memory": (sd.SDE(lambda t, x: -x, 0.5, ExactMemory([1.0], [1.0])), "different noise"),
    "turned channels": (
        sd.SDE(lambda t, x: -x, 0.5 * torch.tensor([[0.6, -0.8], [0.8, 0.6]], dtype=F64)),
        "arrange their noise channels",
    ),
}


@pytest.mark.parametrize("case", OTHERS)
def test_laws_with_other_noise_are_not_compared(case: str) -> None:
    sde, message = OTHERS[case]
    law = sd.DiffusionMeasure(torch.zeros(2, dtype=F64), sd.SDE(lambda t, x: -2 * x, 0.5))
    strange = sd.DiffusionMeasure(torch.zeros(2, dtype=F64), sde)
    ts = torch.linspace(0, 1, 4, dtype=F64)
    for q, p in ((law, strange), (strange, law)):
        with pytest.raises(DiffusionMismatchError, match=message):
            q.kl(p, ts, 4)
        with pytest.raises(DiffusionMismatchError, match=message):
            q.log_rn(q.sample(ts), p)


@pytest.mark.parametrize(
    "same",
    [
        0.5,
        torch.full((2,), 0.5, dtype=F64),
        0.5 * torch.eye(2, dtype=F64),
        lambda t, x: 0.5 + 0 * x,
        sd.Scalar(0.5),
    ],
)
def test_equal_diffusions_may_be_written_in_any_way(same: Any) -> None:
    law = sd.DiffusionMeasure(torch.zeros(2, dtype=F64), sd.SDE(lambda t, x: -2 * x, 0.5))
    other = sd.DiffusionMeasure(torch.zeros(2, dtype=F64), sd.SDE(lambda t, x: -x, same))
    path = law.sample(torch.linspace(0, 1, 4, dtype=F64), (5,))
    torch.testing.assert_close(law.log_rn(path, other), law.log_prob(path) - other.log_prob(path))


def test_drifts_may_differ_only_where_noise_acts() -> None:
    kick = torch.tensor([[0.0], [0.7]], dtype=F64)
    q = sd.DiffusionMeasure(torch.zeros(2, dtype=F64), sd.SDE(lambda t, x: 1.0 - x, kick))
    p = sd.DiffusionMeasure(torch.zeros(2, dtype=F64), sd.SDE(lambda t, x: -x, kick))
    with pytest.raises(DiffusionMismatchError, match="direction without noise"):
        q.kl(p, torch.linspace(0, 1, 4, dtype=F64), 4)


def test_starts_must_be_comparable() -> None:
    ts = torch.linspace(0, 1, 4, dtype=F64)
    with pytest.raises(DiffusionMismatchError, match="fixed starts"):
        ou(1.0, 0.5).kl(ou(1.0, 0.5, ZERO + 1), ts, 4)
    with pytest.raises(DiffusionMismatchError, match="fixed and a random"):
        ou(1.0, 0.5).kl(ou(1.0, 0.5, Independent(Normal(ZERO, 1.0), 1)), ts, 4)


class _Alien(PathMeasure):
    def sample(self, ts: Tensor, sample_shape: Any = (), generator: Any = None) -> sd.PathSample:
        x = torch.zeros(*sample_shape, ts.shape[0], 1, dtype=F64)
        return sd.PathSample(ts, x, x[..., 1:, :], law=self)

    def marginal(self, t: Any) -> Any:
        raise NotImplementedError

    def log_rn(self, path: sd.PathSample, other: PathMeasure) -> Tensor:  # type: ignore[override]
        return torch.zeros(path.shape)


def test_only_diffusions_are_compared_but_paths_may_come_from_anywhere() -> None:
    ts = torch.linspace(0, 1, 4, dtype=F64)
    q, p = ou(1.0, 0.5), ou(2.0, 0.5)
    with pytest.raises(DiffusionMismatchError, match="two DiffusionMeasures"):
        q.log_rn(q.sample(ts), _Alien())
    path = _Alien().sample(ts, (3,))
    torch.testing.assert_close(q.log_rn(path, p), q.log_prob(path) - p.log_prob(path))


def test_a_control_of_unknown_form_is_refused() -> None:
    class Doubling(sd.core.sde.Control):
        def shape_increment(
            self, n: int, t: Tensor, dt: float, z: Tensor, e: Tensor, channels: int
        ) -> Tensor:
            return 2 * e

    law = ou(1.0, 0.5)
    q = sd.DiffusionMeasure(ZERO, law.sde.with_control(Doubling()))
    path = q.sample(torch.linspace(0, 1, 4, dtype=F64))
    with pytest.raises(InvalidInputError, match="drift and precision only; got Doubling"):
        q.log_rn(path, law)


def test_recorded_controls_belong_to_the_moment_of_sampling() -> None:
    """By default a law is evaluated as it is now; recorded=True takes it as it was."""
    gain = torch.tensor(1.0, dtype=F64)
    law = ou(1.0, 0.5)
    q = law.controlled(lambda t, x: gain * torch.ones_like(x))
    path = q.sample(torch.linspace(0, 1, 4, dtype=F64), (3,))
    before = q.log_rn(path, law, "rate")
    gain.fill_(3.0)
    torch.testing.assert_close(q.log_rn(path, law, "rate", recorded=True), before)
    torch.testing.assert_close(q.log_rn(path, law, "rate"), torch.full((3,), 4.5, dtype=F64))


def test_a_recorded_control_spares_its_evaluation() -> None:
    calls = []

    def u(t: Tensor, x: Tensor) -> Tensor:
        calls.append(x.shape)
        return torch.sin(x)

    law = ou(1.0, 0.5)
    q = law.controlled(u)
    path = q.sample(torch.linspace(0, 1, 4, dtype=F64), (3,))
    calls.clear()
    for estimator in ("rate", "density"):
        q.log_rn(path, law, estimator, recorded=True)
    assert not calls
    q.log_rn(path, law)
    assert calls


def test_functions_that_grow_axes_when_time_leads_are_refused() -> None:
    """A table with a row a step: right in the loop, where t has no axes, and wrong where time leads."""
    table = torch.randn(3, 1, dtype=F64)
    law = ou(1.0, 0.5)
    ts = torch.linspace(0, 3, 4, dtype=F64)
    for q in (
        law.controlled(lambda t, x: table[t.long()] * x),
        law.controlled(None, lambda t, x: table[t.long()] ** 2 + 0 * x),
    ):
        path = q.sample(ts, (5,))
        with pytest.raises(ShapeError, match=r"when time leads.*t\.squeeze"):
            q.log_rn(path, law)
    other = sd.DiffusionMeasure(ZERO, sd.SDE(lambda t, x: table[t.long()] * x, 0.5))
    with pytest.raises(ShapeError, match="when time leads"):
        law.log_rn(law.sample(ts, (5,)), other)
    right = law.controlled(lambda t, x: table[t.long().squeeze(-1)] * x)
    path = right.sample(ts, (5,))
    torch.testing.assert_close(right.log_rn(path, law), right.log_rn(path, law, recorded=True))


# ------------------------------------------------------------------------------------------- time reversal


def _gaussian_marginals(a: Tensor, g: Tensor, m0: Tensor, p0: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and covariance of dX = A X dt + G dW at time t (Van Loan 1978)."""
    grow = torch.matrix_exp(a * t)
    d = a.shape[0]
    block = torch.zeros(2 * d, 2 * d, dtype=F64)
    block[:d, :d], block[:d, d:], block[d:, d:] = -a, g @ g.T, a.T
    e = torch.matrix_exp(block * t)
    noise = e[d:, d:].T @ e[:d, d:]
    return grow @ m0, grow @ p0 @ grow.T + noise


def test_reversed_ornstein_uhlenbeck_law_has_the_forward_marginals() -> None:
    a, s, horizon, n = 1.0, 1.2, 1.0, 20_000
    law = ou(a, s, Independent(Normal(ZERO + 1.0, 0.3), 1))

    def moments(t: Tensor | float) -> tuple[Any, Any]:
        t = torch.as_tensor(t, dtype=F64)
        decay = torch.exp(-a * t)
        return decay, 0.09 * decay**2 + s**2 * (1 - decay**2) / (2 * a)

    def score(t: Tensor, x: Tensor) -> Tensor:
        mean, variance = moments(t)
        return -(x - mean) / variance

    mean, variance = moments(horizon)
    end = Independent(Normal(mean.reshape(1), variance.sqrt()), 1)
    ts = torch.linspace(0, horizon, 401, dtype=F64)
    x = law.reverse(score, horizon, end).sample(ts, (n,)).x[..., 0]
    for index in (100, 200, 300, 400):
        mean, variance = moments(horizon - ts[index])
        values = x[:, index]
        # Four standard errors and the first-order bias of 400 steps.
        assert abs(float(values.mean() - mean)) < 4 * float(variance / n) ** 0.5 + 0.005
        assert abs(float(values.var() - variance)) < float(variance) * (4 * (2 / n) ** 0.5 + 0.02)


def test_reversed_gaussian_law_in_two_dimensions() -> None:
    a = torch.tensor([[-0.5, 1.0], [-0.8, -0.3]], dtype=F64)
    g = torch.tensor([[0.9, 0.0], [0.4, 0.6]], dtype=F64)
    m0, p0, n = torch.tensor([1.0, -0.5], dtype=F64), 0.2 * torch.eye(2, dtype=F64), 10_000
    law = sd.DiffusionMeasure(MultivariateNormal(m0, p0), sd.SDE(lambda t, x: x @ a.T, g))

    class Score:
        def score(self, t: Tensor, x: Tensor) -> Tensor:
            mean, covariance = _gaussian_marginals(a, g, m0, p0, t)
            return -torch.linalg.solve(covariance, (x - mean).T).T

    ts = torch.linspace(0, 1, 201, dtype=F64)
    # No law at the horizon given: the forward law is simulated up to there.
    x = law.reverse(Score()).sample(ts, (n,)).x[:, -1]
    assert within(x.mean(0), m0, x.std(0) / n**0.5 + 0.002)
    centred = x - x.mean(0)
    products = centred[:, :, None] * centred[:, None, :]
    assert within(products.mean(0), p0, products.std(0) / n**0.5 + 0.004)


@pytest.mark.parametrize("kind", ["diagonal", "matrix"])
def test_a_reversible_law_is_its_own_reverse(kind: str) -> None:
    """b = (div GG^T + GG^T grad log p) / 2 has p as its law at all times, and no direction of time."""

    def g(t: Tensor, x: Tensor) -> Any:
        if kind == "diagonal":
            return 1 + 0.3 * torch.sin(x)
        first = torch.stack([1 + 0.2 * x[..., 0] * x[..., 1], 0.3 * x[..., 0]], -1)
        return torch.stack([first, torch.stack([x[..., 1] ** 2, torch.cos(x[..., 0])], -1)], -1)

    def score(t: Tensor, x: Tensor) -> Tensor:
        return -(x**3) + 0.5 * x.flip(-1)

    bare = sd.SDE(lambda t, x: -x, g)

    def drift(t: Tensor, x: Tensor) -> Tensor:
        covariance = bare.diffusion(t, x).covariance(2)
        column = lambda y: bare.diffusion(t, y[None]).covariance(2)[0]  # noqa: E731
        divergence = torch.einsum("bijj->bi", torch.func.vmap(torch.func.jacrev(column))(x))
        return 0.5 * (divergence + (covariance @ score(t, x)[..., None])[..., 0])

    law = sd.SDE(drift, g)
    x, tau = torch.randn(6, 2, dtype=F64), torch.tensor(0.3, dtype=F64)
    torch.testing.assert_close(law.reverse(score).drift(tau, x), drift(tau, x))


# ----------------------------------------------------------------------------------------------- bad input

GRIDS = {
    "not sorted": (torch.tensor([0.0, 0.5, 0.3]), r"ts\[2\]=0.3 after ts\[1\]=0.5"),
    "repeated": (torch.tensor([0.0, 0.5, 0.5]), "increase strictly"),
    "one time": (torch.tensor([0.0]), "at least 2"),
    "no axis": (torch.tensor(0.5), "one axis"),
    "a batch with one bad grid": (torch.tensor([[0.0, 1.0], [0.5, 0.5]]), r"ts\[1, 1\]=0.5 after"),
    "a word": ("soon", "must be times"),
}


@pytest.mark.parametrize("case", GRIDS)
def test_bad_grids(case: str) -> None:
    grid, message = GRIDS[case]
    law = sd.DiffusionMeasure(torch.zeros(1), sd.SDE(lambda t, x: 1 / 0, 1.0))
    with pytest.raises(TimeGridError, match=message):
        law.sample(grid)  # type: ignore[arg-type]


def test_bad_arguments() -> None:
    law = ou(1.0, 0.5)
    ts = torch.linspace(0, 1, 4, dtype=F64)
    path = law.sample(ts, (3,))
    with pytest.raises(NonFiniteError, match="ts"):
        law.sample(torch.tensor([0.0, math.nan]))
    with pytest.raises(InvalidInputError, match="estimator is unknown"):
        law.log_rn(path, law, "entropy")
    with pytest.raises(InvalidInputError, match="num_samples"):
        law.kl(law, ts, num_samples=1)
    with pytest.raises(InvalidInputError, match="method is unknown"):
        law.sample(ts, method="rk4")
    x = path.x.clone()
    x[0, 1, 0] = math.nan
    for call in (lambda p: law.log_rn(p, law), law.log_prob):
        with pytest.raises(NonFiniteError, match=r"path.x\[0, 1, 0\]"):
            call(sd.PathSample(ts, x, path.dw))
        with pytest.raises(ShapeError, match=r"path\.x"):
            call(sd.PathSample(ts, torch.zeros(3, 4, 2, dtype=F64), path.dw))
        with pytest.raises(ShapeError, match=r"path\.x"):
            call(sd.PathSample(ts, torch.zeros(3, 5, 1, dtype=F64), path.dw))


def test_a_law_may_start_at_a_time_that_single_precision_rounds_up() -> None:
    """A start given as a number is that number: 0.3 isn't 0.3 of float32."""
    law = sd.DiffusionMeasure(torch.ones(1, dtype=F64), sd.SDE(lambda t, x: -x, 0.5), start_time=0.3, dt=0.1)
    path = law.sample(torch.tensor([0.3, 0.5], dtype=F64), 2, 0)
    assert path.fine is not None
    assert path.fine.ts.shape == (3,)
    assert law.marginal(torch.tensor(0.3, dtype=F64)).covariance.abs().max() == 0


def test_a_network_of_another_precision_than_the_path_is_told() -> None:
    law = sd.DiffusionMeasure(torch.zeros(2, dtype=torch.float64), sd.SDE(lambda t, x: -x, 1.0))
    path = law.sample(torch.linspace(0, 1, 3), 2, 0)
    net = torch.nn.Linear(2, 2)
    with pytest.raises(sd.errors.DtypeMismatchError, match="control's drift"):
        law.controlled(lambda t, x: net(x)).log_rn(path, law)
