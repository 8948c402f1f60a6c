"""Particle filters: unbiased evidence, exact moments within their error, no waiting, and one guided filter that is exact."""

from __future__ import annotations

import math
import warnings

import pyro.distributions as dist
import pytest
import torch
from torch import Tensor

import stochdyn as sd
from stochdyn import testing
from stochdyn._checks import values_unchecked
from stochdyn.core.particles import ParticleModel, effective_size, run_particles, systematic, take_particles
from stochdyn.errors import (
    ApproximationWarning,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    TimeGridError,
    UnavailableError,
)
from stochdyn.infer import (
    BootstrapFilter,
    GuidedFilter,
    NonlinearObservations,
    StateLikelihood,
    particle_filter,
)
from tests.core.laws import ExactMemory
from tests.infer.exact import F64

NAN = math.nan
TIMES = torch.tensor([0.3, 0.5, 1.2], dtype=F64)
A = torch.tensor([[-1.0, 0.5], [-0.3, -0.7]], dtype=F64)
G = torch.tensor([[0.5, 0.1], [0.0, 0.4]], dtype=F64)
H = torch.tensor([[1.0, 0.5]], dtype=F64)
START = torch.distributions.MultivariateNormal(torch.ones(2, dtype=F64), 0.3 * torch.eye(2, dtype=F64))
Y = torch.tensor([[0.2], [NAN], [0.4]], dtype=F64)
LINEAR = sd.SDE(lambda t, x: x @ A.mT, sd.Matrix(G))
DATA = StateLikelihood(lambda x: dist.Normal(x @ H.mT, 0.2).to_event(1), Y)
EXACT = NonlinearObservations(LINEAR, START, TIMES, lambda x: x @ H.mT, 0.2, dt=0.1)


# ---------------------------------------------------------------------------------------------- resampling
def test_systematic_draws_take_every_point_as_often_as_its_weight_says_up_to_one():
    g = torch.Generator().manual_seed(0)
    log_weights = torch.randn(50, 3, generator=g, dtype=F64)
    share = log_weights.softmax(0)
    counts = torch.zeros(50, 3, dtype=F64)
    for _ in range(400):
        index = systematic(log_weights, 30, g)
        assert bool((index[1:] >= index[:-1]).all())
        count = torch.stack([index[:, k].bincount(minlength=50) for k in range(3)], 1)
        assert bool(((count - 30 * share).abs() < 1.0).all())
        counts += count / 400
    # A count takes one of two neighbouring values, so its variance is at most a quarter.
    assert float((counts - 30 * share).abs().max()) < 5 * 0.5 / 400**0.5


def test_weights_beyond_all_measure_and_single_precision():
    index = systematic(torch.tensor([-1e30, 0.0, -math.inf]), 5, 0)
    assert index.tolist() == [1] * 5
    many = systematic(torch.zeros(100_000), None, 0)
    assert torch.equal(many, torch.arange(100_000))
    assert float(effective_size(torch.tensor([0.0, 0.0, -math.inf]))) == pytest.approx(2.0)
    x = torch.arange(12.0).reshape(3, 2, 2)
    taken = take_particles(x, torch.tensor([[0, 2], [1, 1]]))
    assert taken.tolist() == [[[0.0, 1.0], [10.0, 11.0]], [[4.0, 5.0], [6.0, 7.0]]]


def test_many_draws_are_those_of_a_search():
    """Indices of many points come from counts, without a search; a part of the same teeth comes from one."""
    log_weights = torch.randn(3000, 2, generator=torch.Generator().manual_seed(0), dtype=F64) * 3
    log_weights[:7] = log_weights[-5:] = -math.inf
    for draws in (1000, 3000, 7000):
        index = systematic(log_weights, draws, 1)
        offset = torch.rand(2, 1, dtype=F64, generator=torch.Generator().manual_seed(1))
        edges = log_weights.softmax(0).mT.cumsum(-1)
        comb = (torch.arange(draws, dtype=F64) + offset) / draws
        assert torch.equal(index.mT, torch.searchsorted(edges / edges[:, -1:], comb, right=True))


# ---------------------------------------------------------------------------------------------- evidence
@pytest.mark.parametrize("threshold", [0.5, 1.0])
def test_a_look_at_the_weights_changes_no_bit(threshold):
    """On the host the loop sees when nobody has to resample, and elsewhere it doesn't look."""
    y = torch.tensor([[[0.2], [NAN], [0.4]], [[0.9], [0.3], [8.0]], [[NAN], [NAN], [NAN]]], dtype=F64)
    noise = lambda x: dist.Normal(x @ H.mT, 0.2).to_event(1)  # noqa: E731

    def run():
        data = StateLikelihood(noise, y)
        return particle_filter(
            LINEAR, START, TIMES, data, 40, method=BootstrapFilter(threshold), dt=0.1, generator=0
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        seen = run()
    with values_unchecked():
        blind = run()
    for name in ("log_evidence", "ess", "states", "log_weights", "ancestors"):
        assert torch.equal(getattr(seen, name), getattr(blind, name)), name
    assert int((seen.ancestors[:, 1, 2] != torch.arange(40)).sum()) > 0


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("count", [5, 50])
def test_the_evidence_is_unbiased_whatever_is_resampled(threshold, count):
    exact = EXACT.log_prob(Y)
    # Independent filters on a batch axis: likelihoods of 4000 series that hold the same data.
    data = StateLikelihood(lambda x: dist.Normal(x @ H.mT, 0.2).to_event(1), Y.expand(4000, 3, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        run = particle_filter(
            LINEAR, START, TIMES, data, count, method=BootstrapFilter(threshold), dt=0.1, generator=0
        )
    ratio = (run.log_evidence - exact).exp()
    assert abs(float(ratio.mean()) - 1.0) < 5 * float(ratio.std()) / 4000**0.5
    assert float(ratio.std()) > 0.05


def test_the_guided_filter_is_exact_with_two_particles_for_linear_models():
    for start in (START, torch.ones(2, dtype=F64)):
        site = NonlinearObservations(LINEAR, start, TIMES, lambda x: x @ H.mT, 0.2, dt=0.1)
        run = particle_filter(LINEAR, start, TIMES, DATA, 2, method="guided", dt=0.1, generator=0)
        torch.testing.assert_close(run.log_evidence, site.log_prob(Y), rtol=1e-9, atol=0)
        torch.testing.assert_close(run.ess, torch.full((3,), 2.0, dtype=F64))


def test_the_guided_filter_knows_noise_with_memory_and_a_control():
    memory = ExactMemory([1.0, 4.0], [0.5, 0.3])
    y = torch.tensor([[0.5], [0.1], [-0.2]], dtype=F64)
    data = StateLikelihood(lambda x: dist.Normal(x, 0.3).to_event(1), y)
    x0 = torch.ones(1, dtype=F64)
    for sde in (
        sd.SDE(lambda t, x: -x, 0.7, memory),
        sd.SDE(lambda t, x: -x, 0.7).controlled(lambda t, z: 0.5 - z, lambda t, z: torch.full_like(z, 0.3)),
    ):
        site = NonlinearObservations(sde, x0, TIMES, lambda x: x, 0.3, dt=0.1)
        run = particle_filter(sde, x0, TIMES, data, 10, method="guided", dt=0.1, generator=0)
        torch.testing.assert_close(run.log_evidence, site.log_prob(y), rtol=1e-8, atol=0)
        free = particle_filter(sde, x0, TIMES, data, 20000, dt=0.1, generator=0)
        assert abs(float(free.log_evidence - run.log_evidence)) < 0.06


def test_both_filters_agree_on_a_nonlinear_model_and_the_guided_one_needs_fewer_particles():
    """Counts of a logistic population: means of many runs agree within five of their errors."""
    sde = sd.SDE(lambda t, x: 1 - 0.1 * x.exp() - 0.02, 0.2)
    y = torch.tensor([6.0, 9.0, 15.0, 11.0], dtype=F64)
    times = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=F64)
    data = StateLikelihood(lambda x: dist.Poisson(x.exp()).to_event(1), y[:, None].expand(300, 4, 1))
    x0 = torch.full((1,), 1.0, dtype=F64)
    runs = {
        m: particle_filter(sde, x0, times, data, 100, method=m, dt=0.1, generator=1).log_evidence
        for m in ("bootstrap", "guided")
    }
    means = {m: (r - r.max()).exp() for m, r in runs.items()}
    logs = {
        m: (float(v.mean().log() + runs[m].max()), float(v.std() / v.mean()) / 300**0.5)
        for m, v in means.items()
    }
    assert abs(logs["bootstrap"][0] - logs["guided"][0]) < 5 * math.hypot(
        logs["bootstrap"][1], logs["guided"][1]
    )
    assert float(runs["guided"].var()) < 0.1 * float(runs["bootstrap"].var())


@pytest.mark.parametrize(("method", "count"), [("bootstrap", 20_000), ("guided", 2000)])
def test_filtered_moments_and_paths_are_those_of_the_exact_filter_and_smoother(method, count):
    run = particle_filter(LINEAR, START, TIMES, DATA, count, method=method, dt=0.1, generator=0)
    exact, smooth = EXACT.filter(Y), EXACT.smooth(Y)
    if method == "bootstrap":
        error = 5 * (exact.variance / run.ess[:, None]).sqrt()
        assert bool(((run.mean - exact.mean).abs() < error).all())
        torch.testing.assert_close(run.covariance, exact.covariance, rtol=0.1, atol=0.01)
    paths = run.paths
    assert paths.shape == (count, 3, 2)
    error = 5 * (smooth.variance / run.num_lines[:, None]).sqrt()
    assert bool(((paths.mean(0) - smooth.mean).abs() < error).all())
    torch.testing.assert_close(
        paths[:, 1].T.cov(), smooth.covariance[1], rtol=5 * (2 / float(run.num_lines[1])) ** 0.5, atol=0.005
    )
    assert run.draw_paths(7).shape == (7, 3, 2)


# ---------------------------------------------------------------------------------------------- invariances
def scaled(unit: float, clock: float, dtype: torch.dtype = F64, method: str = "bootstrap") -> Tensor:
    sde = sd.SDE(lambda t, x: -(x + (x / unit) ** 3 * unit) / clock, 0.5 * unit / clock**0.5)
    x0 = torch.full((1,), 0.5 * unit, dtype=dtype)
    times = torch.tensor([0.4, 0.8, 1.6], dtype=dtype) * clock
    y = torch.tensor([[0.3], [NAN], [0.1]], dtype=dtype) * unit
    data = StateLikelihood(lambda x: dist.Normal(x, 0.3 * unit).to_event(1), y)
    run = particle_filter(sde, x0, times, data, 200, method=method, dt=0.2 * clock, generator=0)
    return run.log_evidence + 2 * math.log(unit)


@pytest.mark.parametrize("method", ["bootstrap", "guided"])
class TestInvariances:
    def test_units(self, method):
        testing.check_units(lambda u: scaled(u, 1.0, method=method))
        testing.check_units(lambda u: scaled(1.0, u, method=method))

    def test_precision_and_repetition(self, method):
        # Draws of the two precisions differ, and so do estimates of 200 particles.
        single, double = (scaled(1.0, 1.0, d, method) for d in (torch.float32, F64))
        assert single.dtype == torch.float32
        assert abs(float(single) - float(double)) < 0.2
        testing.check_repetition(lambda: scaled(1.0, 1.0, method=method))

    def test_times_without_data_change_nothing_but_the_draws(self, method):
        sde, x0 = LINEAR, torch.ones(2, dtype=F64)

        def evidence(times, y):
            data = StateLikelihood(lambda x: dist.Normal(x @ H.mT, 0.2).to_event(1), y)
            return particle_filter(
                sde, x0, times, data, 5000, method=method, dt=0.1, generator=0
            ).log_evidence

        few = evidence([0.2, 0.4], [[0.7], [0.5]])
        more = evidence([0.1, 0.2, 0.3, 0.4, 0.5], [[NAN], [0.7], [NAN], [0.5], [NAN]])
        assert abs(float(few - more)) < (1e-9 if method == "guided" else 0.1)

    def test_series_and_parameters_at_once_have_the_evidence_that_they_have_alone(self, method):
        rate = torch.tensor([0.5, 1.5], dtype=F64)
        times = torch.tensor([[0.1, 0.5, 2.0], [0.3, 0.4, 0.9]], dtype=F64)
        y = torch.tensor([[[0.3], [NAN], [0.1]], [[0.2], [0.5], [-0.4]]], dtype=F64)
        x0 = torch.ones(1, dtype=F64)

        def evidence(rate, times, y):
            sde = sd.SDE(lambda t, x: -rate[..., None] * x, 0.5)
            data = StateLikelihood(lambda x: dist.Normal(x, 0.3).to_event(1), y)
            return particle_filter(
                sde, x0, times, data, 4000, method=method, dt=math.inf, generator=0
            ).log_evidence

        whole = evidence(rate.expand(3, 2), times, y)
        assert whole.shape == (3, 2)
        for k in range(2):
            alone = evidence(rate[k], times[k], y[k])
            assert float((whole[:, k] - alone).abs().max()) < (1e-9 if method == "guided" else 0.15)

    def test_the_loop_never_waits_for_the_device(self, method):
        from stochdyn.infer.particles import as_filter, particles_of
        from stochdyn.infer.seen import SeenEquation

        model = particles_of(SeenEquation.at(LINEAR, START, TIMES, 0.0, 0.1), DATA, as_filter(method))
        testing.check_asynchronous(lambda: run_particles(model, 200))


def test_series_of_their_own_times_may_need_different_numbers_of_steps():
    times = torch.tensor([[0.1, 0.5], [0.3, 2.0]], dtype=F64)
    y = torch.tensor([[[0.3], [0.1]], [[0.2], [-0.4]]], dtype=F64)
    sde, x0 = sd.SDE(lambda t, x: -(x**3), 0.5), torch.ones(1, dtype=F64)

    def evidence(times, y):
        data = StateLikelihood(lambda x: dist.Normal(x, 0.3).to_event(1), y)
        return particle_filter(sde, x0, times, data, 20_000, dt=0.1, generator=0).log_evidence

    whole = evidence(times, y)
    for k in range(2):
        assert abs(float(whole[k] - evidence(times[k], y[k]))) < 0.06
    data = StateLikelihood(lambda x: dist.Normal(x, 0.3).to_event(1), y)
    with pytest.raises(UnavailableError, match="guided"):
        particle_filter(sde, x0, times, data, 10, method="guided", dt=0.1)


# ---------------------------------------------------------------------------------------------- likelihoods
@pytest.mark.parametrize(
    ("observe", "y"),
    [
        (lambda x: dist.Poisson(x.exp()).to_event(1), [[3.0, NAN], [NAN, NAN]]),
        (lambda x: dist.Normal(x[..., 0], 1.0), [0.3, NAN]),
        (lambda x: dist.MultivariateNormal(x, torch.eye(2, dtype=F64)), [[0.3, 0.1], [NAN, NAN]]),
    ],
)
def test_missing_values_of_any_law_count_nowhere(observe, y):
    data = StateLikelihood(observe, torch.tensor(y, dtype=F64))
    x = torch.tensor([[0.1, 0.2], [0.5, -0.4]], dtype=F64)
    assert data(1, x).tolist() == [0.0, 0.0]
    first = torch.tensor(y, dtype=F64)[0]
    law = observe(x)
    if first.ndim and bool(first.isnan().any()):
        want = law.base_dist.log_prob(first.nan_to_num())[:, 0]
    else:
        want = law.log_prob(first)
    torch.testing.assert_close(data(0, x), want)


@pytest.mark.parametrize("missing", [False, True])
@pytest.mark.parametrize("batch", [(), (1,), (3,), (2, 3)])
def test_all_times_at_once_are_those_one_by_one(batch, missing):
    g = torch.Generator().manual_seed(0)
    y = torch.randn(*batch, 4, 2, generator=g, dtype=F64)
    if missing:
        y[..., 1, 0] = y[..., 2, :] = NAN
    data = StateLikelihood(lambda x: dist.Normal(x, 0.3).to_event(1), y)
    axes = () if batch == (1,) else batch  # an axis of size one may be missing in the states
    x = torch.randn(4, *axes, 2, generator=g, dtype=F64)
    want = torch.stack([data(k, x[k]).reshape(axes) for k in range(4)])
    torch.testing.assert_close(data.along(x), want)
    # and data without the axes of the states
    alone = StateLikelihood(lambda x: dist.Normal(x, 0.3).to_event(1), y.reshape(-1, 4, 2)[0])
    wide = torch.randn(4, 5, 3, 2, generator=g, dtype=F64)
    torch.testing.assert_close(alone.along(wide), torch.stack([alone(k, wide[k]) for k in range(4)]))


def test_a_vector_missing_in_part_and_data_that_do_not_fit_are_told():
    normal = lambda x: dist.MultivariateNormal(x, torch.eye(2, dtype=F64))  # noqa: E731
    with pytest.raises(InvalidInputError, match="in part"):
        StateLikelihood(normal, [[0.3, NAN]])(0, torch.zeros(4, 2, dtype=F64))
    with pytest.raises(ShapeError, match="y"):
        StateLikelihood(lambda x: dist.Normal(x, 1.0).to_event(1), [[0.3, 0.1, 0.2]])(0, torch.zeros(4, 2))
    with pytest.raises(InvalidInputError, match="observe"):
        StateLikelihood(dist.Normal(0.0, 1.0), [1.0])


def test_collapse_is_told_with_the_place_and_the_remedy():
    data = StateLikelihood(
        lambda x: dist.Normal(x @ H.mT, 0.3).to_event(1), torch.tensor([[0.2], [9.0], [0.4]], dtype=F64)
    )
    with pytest.warns(ApproximationWarning, match="observation 1.*guided"):
        particle_filter(LINEAR, START, TIMES, data, 100, generator=0)


def test_impossible_data_have_no_evidence_and_the_filter_goes_on():
    def log_likelihood(k: int, x: Tensor) -> Tensor:
        return torch.full(x.shape[:-1], -math.inf, dtype=F64) if k == 1 else x[..., 0] * 0

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        run = particle_filter(LINEAR, START, TIMES, log_likelihood, 20, generator=0)
    assert float(run.log_evidence) == -math.inf
    assert bool(torch.isfinite(run.states).all())


def test_wrong_arguments_are_told_by_name():
    x0 = torch.ones(2, dtype=F64)
    with pytest.raises(InvalidInputError, match="method"):
        particle_filter(LINEAR, x0, TIMES, DATA, method="smoother")
    with pytest.raises(InvalidInputError, match="log_likelihood"):
        particle_filter(LINEAR, x0, TIMES, "likelihood")
    with pytest.raises(InvalidInputError, match="num_particles"):
        particle_filter(LINEAR, x0, TIMES, DATA, 0)
    with pytest.raises(TimeGridError, match="start_time"):
        particle_filter(LINEAR, x0, TIMES, DATA, start_time=1.0)
    with pytest.raises(ShapeError, match="one value per particle"):
        particle_filter(LINEAR, x0, TIMES, lambda k, x: x)
    with pytest.raises(InvalidInputError, match="threshold"):
        BootstrapFilter(threshold=2.0)
    with pytest.raises(InvalidInputError, match="max_iterations"):
        GuidedFilter(max_iterations=0)
    with pytest.raises(NonFiniteError, match="guided"):
        particle_filter(LINEAR, x0, TIMES, lambda k, x: x[..., 0] * math.inf, method="guided")
    with pytest.raises(UnavailableError, match="start"):
        particle_filter(LINEAR, x0, [0.0], lambda k, x: x[..., 0], method="guided")


def test_a_model_of_ones_own():
    """A random walk on the integers, by an exact sum over its two steps."""

    class Walk(ParticleModel):
        num_times = 2

        def start(self, num_particles, generator):
            return torch.zeros(num_particles, 3000, 1), torch.zeros(num_particles, 3000)

        def advance(self, step, z, generator):
            z = z + 2 * torch.bernoulli(torch.full_like(z, 0.5), generator=generator) - 1
            return z, -0.5 * (z[..., 0] - 1) ** 2

    run = run_particles(Walk(), 20, generator=0)
    one, two = math.exp(0.0), math.exp(-2.0)
    exact = 0.25 * (one * (math.exp(-0.5) + math.exp(-0.5)) + two * (math.exp(-0.5) + math.exp(-4.5)))
    ratio = run.log_evidence.exp() / exact
    assert abs(float(ratio.mean()) - 1) < 5 * float(ratio.std()) / 3000**0.5


# ---------------------------------------------------------------------------------------------- even noise
RELAXING = sd.SDE(lambda t, x: -x, 0.7)
LINE_START = dist.Normal(torch.zeros(1, dtype=F64), 0.5).to_event(1)
LINE_TIMES = torch.tensor([0.0, 0.2, 0.4, 0.5, 0.9], dtype=F64)
LINE_DATA = torch.tensor([[0.3], [NAN], [0.5], [0.1], [-0.4]], dtype=F64)


def line_runs(count: int, runs: int, threshold: float | None, dtype: torch.dtype = F64, even: bool = True):
    """Return log evidences of independent filters over the exact one."""
    from stochdyn.infer.particles import particles_of, threshold_of
    from stochdyn.infer.seen import SeenEquation

    exact = NonlinearObservations(RELAXING, LINE_START, LINE_TIMES, lambda x: x, 0.2, dt=0.1)
    data = StateLikelihood(lambda x: dist.Normal(x, 0.2).to_event(1), LINE_DATA.to(dtype).expand(runs, 5, 1))
    start = dist.Normal(torch.zeros(1, dtype=dtype), 0.5).to_event(1)
    way = BootstrapFilter(threshold)
    model = particles_of(SeenEquation.at(RELAXING, start, LINE_TIMES.to(dtype), 0.0, 0.1), data, way)
    model.ordered = even
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        run = run_particles(model, count, threshold_of(way, model), 0)
    return run.log_evidence.double() - exact.log_prob(LINE_DATA)


@pytest.mark.parametrize("threshold", [None, 0.0, 1.0])
@pytest.mark.parametrize("count", [3, 40])
def test_even_noise_leaves_the_evidence_unbiased(threshold, count):
    ratio = line_runs(count, 20_000, threshold).exp()
    assert abs(float(ratio.mean()) - 1.0) < 5 * float(ratio.std()) / 20_000**0.5
    assert float(ratio.std()) > 0.001


def test_even_noise_takes_most_of_the_variance_and_all_the_more_with_more_particles():
    variance = {
        (count, even): float(line_runs(count, 400, None, even=even).var())
        for count in (50, 500)
        for even in (False, True)
    }
    gains = [variance[n, False] / variance[n, True] for n in (50, 500)]
    assert gains[0] > 5.0
    assert gains[1] > 2 * gains[0]
    assert float(line_runs(500, 400, None, torch.float32).var()) < 3 * variance[500, True]


def test_even_normals_are_normal_and_independent_of_the_comb():
    from stochdyn.core.particles.lattice import even_normals, even_shares

    like = torch.zeros((), dtype=F64)
    g = torch.Generator().manual_seed(0)
    x = torch.stack(list(even_normals(7, (16, 4000), like, g)))
    error = 5 / 4000**0.5
    # of each particle and each step, over runs
    assert float(x.mean(-1).abs().max()) < error
    assert float((x.square().mean(-1) - 1).abs().max()) < error * 2**0.5
    assert float((x[1:] * x[:-1]).mean(-1).abs().max()) < error
    # Neighbours that share a step are worth far more than independent ones.
    assert float(x.mean(1).var()) < 0.3 / 16
    share = even_shares((8, 3), like, g)
    assert torch.equal((8 * share).floor()[:, 0], torch.arange(8.0, dtype=F64))


def test_a_guide_that_misses_a_mode_is_left_aside_and_the_others_are_kept():
    """Squares tell nothing of the sign: a guide along one sign is worse than none."""
    length = 20
    sde = sd.SDE(lambda t, x: 25 * x / (1 + x * x) - 0.5 * x + 8 * torch.cos(1.2 * (t + 1)), 10**0.5)
    start = dist.Normal(torch.zeros(1, dtype=F64), 1.4).to_event(1)
    times = torch.arange(length, dtype=F64)
    g = torch.Generator().manual_seed(1)
    x = [torch.randn(1, generator=g, dtype=F64)]
    for t in times[:-1]:
        x.append(x[-1] + sde.drift(t, x[-1]) + 10**0.5 * torch.randn(1, generator=g, dtype=F64))
    y = torch.cat(x).square() / 20 + torch.randn(length, generator=g, dtype=F64)
    data = StateLikelihood(lambda x: dist.Normal(x[..., 0] ** 2 / 20, 1.0), y.expand(200, length))
    runs = {}
    for method in ("bootstrap", "guided"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ApproximationWarning)
            runs[method] = particle_filter(
                sde, start, times, data, 200, method=method, dt=1.0, generator=1
            ).log_evidence
    assert float(runs["guided"].var()) < 2 * float(runs["bootstrap"].var())
    gap = runs["guided"].exp().mean().log() - runs["bootstrap"].exp().mean().log()
    error = sum(float((r - r.mean()).exp().var()) for r in runs.values()) / 200
    assert abs(float(gap)) < 5 * error**0.5


@pytest.mark.parametrize("method", ["bootstrap", "guided"])
def test_particles_that_explode_are_impossible_and_all_of_them_are_an_error(method):
    """Distributions that refuse states that aren't numbers don't end a filter."""
    sde = sd.SDE(lambda t, x: -(x**3), 0.5)
    times, y = torch.arange(1.0, 9.0, dtype=F64), torch.zeros(8, 1, dtype=F64)
    data = StateLikelihood(lambda x: dist.Normal(x, 1.0, validate_args=True).to_event(1), y)
    wide = dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ApproximationWarning)
        run = particle_filter(sde, wide, times, data, 300, method=method, dt=1.0, generator=0)
    assert bool(torch.isfinite(run.log_evidence))
    with pytest.raises(NonFiniteError, match=r"explode|no path"):
        particle_filter(sde, torch.full((1,), 50.0, dtype=F64), times, data, 30, method=method, dt=1.0)
