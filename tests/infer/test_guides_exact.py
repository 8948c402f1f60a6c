"""AutoPathGuide begins at the exact posterior of a linear-Gaussian model: every draw bears the evidence."""

from __future__ import annotations

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO

from stochdyn.core import SDE, Matrix, NoiseProcess, NoiseSteps, Scalar
from stochdyn.fractional import MarkovNoise
from stochdyn.infer import AutoPathGuide, DiffusionPath, NoiseReparam, khat, sample_path
from tests.infer.exact import F64, TwoStates, linear_path

TS = torch.cat([torch.linspace(0, 0.5, 11, dtype=F64), torch.linspace(0.6, 2.0, 8, dtype=F64)])
SEEN = torch.tensor([2, 7, 8, 15, 18])
SD = 0.2
A1, G1 = torch.tensor([[-0.7]], dtype=F64), torch.tensor([[0.8]], dtype=F64)
A2 = torch.tensor([[-0.5, 1.5], [-1.0, -0.3]], dtype=F64)
G2 = torch.tensor([[0.6, 0.2], [0.0, 0.4]], dtype=F64)
WIDE = torch.tensor([[0.6, 0.2, 0.3], [0.0, 0.4, -0.5]], dtype=F64)
THIN = torch.tensor([[0.0], [0.7]], dtype=F64)
MEAN2 = torch.tensor([0.5, -1.0], dtype=F64)
COV2 = torch.tensor([[1.0, 0.3], [0.3, 0.5]], dtype=F64)
EMISSION = torch.tensor([1.0, 0.5], dtype=F64)


def long_past():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return MarkovNoise(0.7, num_states=6, horizon=2.0, dt=0.1, kind="I")


CASES = {
    # name: (A, G, noise, covariance of the start, noise_space)
    "one component": (A1, G1, None, None, None),
    "in noise space": (A1, G1, None, None, True),
    "random start": (A1, G1, None, torch.tensor([[0.6]], dtype=F64), None),
    "random start in noise space": (A1, G1, None, torch.tensor([[0.6]], dtype=F64), True),
    "two coupled": (A2, G2, None, None, None),
    "two coupled, random start": (A2, G2, None, COV2, None),
    "two coupled in noise space": (A2, G2, None, COV2, True),
    "more channels than components": (A2, WIDE, None, None, None),
    "noise on one component": (A2, THIN, None, None, None),
    "noise on one component, random start": (A2, THIN, None, COV2, None),
    "memory": (A1, G1, TwoStates, None, None),
    "memory, random start": (A1, G1, TwoStates, torch.tensor([[0.6]], dtype=F64), None),
    "memory with a past": (A1, G1, lambda: TwoStates(past=True), None, None),
    "memory with a past, random start": (A2, G2, lambda: TwoStates(past=True), COV2, None),
    "memory on one component": (A2, THIN, lambda: TwoStates(past=True), COV2, None),
    "fractional": (A1, G1, lambda: MarkovNoise(0.3, num_states=5, horizon=2.0, dt=0.1), None, None),
    "fractional with a past": (A1, G1, long_past, torch.tensor([[0.6]], dtype=F64), None),
}


def build(case):
    """Return a model, its observations and its exact law."""
    a, g, make_noise, cov, noise_space = CASES[case]
    dim = a.shape[0]
    noise = None if make_noise is None else make_noise()
    mean = MEAN2[:dim]
    emission = EMISSION[:dim]
    law = linear_path(a, g, TS, mean, cov, noise)
    y = torch.randn(len(SEEN), dtype=F64)
    initial = mean if cov is None else dist.MultivariateNormal(mean, cov)

    def model(y):
        sde = SDE(lambda t, x: x @ a.T, Scalar(0.8) if g is G1 else g, noise)
        x = sample_path("x", sde, initial, TS, noise_space=noise_space)
        pyro.sample("y", dist.Normal(x[..., SEEN, :] @ emission, SD).to_event(1), obs=y)

    return model, y, law, emission


def bounds(model, guide, *args, particles=4, vectorized=True, nesting=0):
    """Return the evidence bound of every draw by itself."""
    elbo = Trace_ELBO(max_plate_nesting=nesting)
    if not vectorized:
        return torch.tensor([-elbo.loss(model, guide, *args) for _ in range(particles)], dtype=F64)
    with pyro.plate("particles", particles, dim=-1 - nesting):
        q = poutine.trace(guide).get_trace(*args)
        p = poutine.trace(poutine.replay(model, q)).get_trace(*args)
    p.compute_log_prob()
    q.compute_log_prob()

    def total(trace):
        return sum(
            s["log_prob"].reshape(particles, -1).sum(-1)
            for s in trace.nodes.values()
            if s["type"] == "sample" and s["log_prob"].numel() >= particles
        )

    return (total(p) - total(q)).detach()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_draw_bears_the_evidence(case):
    model, y, law, emission = build(case)
    evidence = law.evidence(y, SEEN, SD, emission)
    guide = AutoPathGuide(model, hidden=())
    for vectorized in (True, False):
        got = bounds(model, guide, y, vectorized=vectorized, particles=3)
        torch.testing.assert_close(got, evidence.expand(3), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "case", ["two coupled", "random start", "memory with a past", "noise on one component"]
)
def test_draws_and_median_are_those_of_the_smoother(case):
    model, y, law, emission = build(case)
    guide = AutoPathGuide(model, hidden=())
    mean, cov = law.observed(SEEN, emission)
    cross = torch.einsum("tdr,sr->tds", law.factor, torch.einsum("e,ter->tr", emission, law.factor[SEEN]))
    gain = cross @ torch.linalg.inv(cov + SD**2 * torch.eye(len(SEEN), dtype=F64))
    want = law.mean + gain @ (y - mean)
    sd = ((law.factor**2).sum(-1) - (gain * cross).sum(-1)).clamp_min(0).sqrt()
    median = guide.median(y)
    torch.testing.assert_close(median["x"], want, rtol=1e-6, atol=1e-7)
    n = 3000
    with pyro.plate("draws", n), torch.no_grad():
        x = guide(y)["x"]
    # up to 38 means and 38 variances at 5 standard errors
    assert bool(((x.mean(0) - want).abs() <= 5 * sd / n**0.5 + 1e-9).all())
    assert bool(((x.var(0) - sd**2).abs() <= 5 * sd**2 * (2 / n) ** 0.5 + 1e-9).all())
    again = poutine.condition(model, {k: v for k, v in median.items() if k in guide.prototype_trace.nodes})
    torch.testing.assert_close(poutine.trace(again).get_trace(y).nodes["x"]["value"], median["x"])


@pytest.mark.parametrize("noise_space", [None, True])
def test_series_of_a_plate_with_their_own_gaps_and_grids_of_times(noise_space):
    y = torch.randn(3, len(SEEN), dtype=F64)
    seen = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 0, 1, 0], [0, 0, 1, 1, 1]], dtype=torch.bool)
    start = torch.tensor([[0.0], [1.0], [-1.0]], dtype=F64)

    def model(y, seen):
        with pyro.plate("series", 3):
            x = sample_path("x", SDE(lambda t, x: -0.7 * x, 0.8), start, TS, noise_space=noise_space)
            pyro.sample("y", dist.Normal(x[..., SEEN, 0], SD).mask(seen).to_event(1), obs=y)

    want = sum(linear_path(A1, G1, TS, start[i]).evidence(y[i, seen[i]], SEEN[seen[i]], SD) for i in range(3))
    guide = AutoPathGuide(model, hidden=())
    got = bounds(model, guide, y, seen, nesting=1)
    torch.testing.assert_close(got, want.expand(4), rtol=1e-8, atol=1e-8)
    assert guide(y, seen)["x"].shape == (3, len(TS), 1)


def test_nested_plates_and_series_with_equations_of_their_own():
    rate = torch.tensor([[0.5], [1.5]], dtype=F64)
    scale = torch.tensor([0.4, 0.8, 1.2], dtype=F64)
    y = torch.randn(2, 3, dtype=F64)

    def model(y):
        with pyro.plate("outer", 2, dim=-2), pyro.plate("inner", 3, dim=-1):
            sde = SDE(lambda t, x: -rate[..., None] * x, Scalar(scale))
            x = pyro.sample("x", DiffusionPath(sde, torch.zeros(1, dtype=F64), TS))
            pyro.sample("y", dist.Normal(x[..., -1, 0], SD), obs=y)

    want = 0.0
    for i in range(2):
        for j in range(3):
            law = linear_path(-rate[i].reshape(1, 1), scale[j].reshape(1, 1), TS, torch.zeros(1, dtype=F64))
            want = want + law.evidence(y[i, j : j + 1], torch.tensor([18]), SD)
    got = bounds(model, AutoPathGuide(model, hidden=()), y, nesting=2)
    torch.testing.assert_close(got, want.expand(4), rtol=1e-8, atol=1e-8)


def test_wide_noise_that_varies_in_time():
    def strength(t, x):
        return Matrix(WIDE * (1 + t[..., None]))

    def model():
        x = sample_path("x", SDE(lambda t, x: x @ A2.T, strength), MEAN2, TS)
        pyro.sample("y", dist.Normal(x[..., -1, 0], SD), obs=torch.zeros((), dtype=F64))

    got = bounds(model, AutoPathGuide(model, hidden=()))
    rows = [torch.zeros(2, 3 * 18, dtype=F64)]
    mean = MEAN2
    for n in range(18):
        dt = TS[n + 1] - TS[n]
        row = rows[-1] + A2 @ rows[-1] * dt
        row[:, 3 * n : 3 * n + 3] = WIDE * (1 + TS[n]) * dt.sqrt()
        rows.append(row)
        mean = mean + A2 @ mean * dt
    sd = ((rows[-1][0] ** 2).sum() + SD**2).sqrt()
    want = torch.distributions.Normal(mean[0], sd).log_prob(torch.zeros((), dtype=F64))
    torch.testing.assert_close(got, want.expand(4), rtol=1e-8, atol=1e-8)


def test_reparametrised_models_are_served_too():
    model, y, law, emission = build("two coupled, random start")
    noisy = poutine.reparam(model, {"x": NoiseReparam()})
    guide = AutoPathGuide(noisy, hidden=())
    want = law.evidence(y, SEEN, SD, emission)
    torch.testing.assert_close(bounds(noisy, guide, y), want.expand(4), rtol=1e-8, atol=1e-8)
    assert {"x_0", "x_dw", "x"} <= set(guide(y))


def test_single_precision_is_near():
    y = torch.randn(len(SEEN))
    ts = TS.float()

    def model(y):
        x = sample_path("x", SDE(lambda t, x: -0.7 * x, 0.8), torch.ones(1), ts)
        pyro.sample("y", dist.Normal(x[..., SEEN, 0], SD).to_event(1), obs=y)

    want = linear_path(A1, G1, ts.double(), torch.ones(1, dtype=F64)).evidence(y.double(), SEEN, SD)
    guide = AutoPathGuide(model, hidden=())
    got = bounds(model, guide, y)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want.expand(4), rtol=1e-4, atol=1e-3)


def test_stationary_start_that_depends_on_a_parameter():
    """The law of the start is that at the medians of the other sites, not at a stray draw."""
    y = torch.randn(len(SEEN), dtype=F64)

    def model(y):
        rate = pyro.sample("rate", dist.LogNormal(torch.tensor(0.3, dtype=F64), 0.5))
        sd = 0.8 / (2 * rate).sqrt()
        start = dist.Normal(torch.zeros(1, dtype=F64), sd[..., None]).to_event(1)
        x = sample_path("x", SDE(lambda t, x: -rate[..., None] * x, 0.8), start, TS, noise_space=True)
        pyro.sample("y", dist.Normal(x[..., SEEN, 0], SD).to_event(1), obs=y)

    guide = AutoPathGuide(model, hidden=())
    median = guide.median(y)
    rate = median["rate"].reshape(1, 1)
    law = linear_path(-rate, G1, TS, torch.zeros(1, dtype=F64), 0.64 / (2 * rate))
    mean, cov = law.observed(SEEN)
    rows = law.factor[SEEN][:, 0]
    weight = torch.linalg.solve(cov + SD**2 * torch.eye(len(SEEN), dtype=F64), y - mean)
    torch.testing.assert_close(
        median["x_0"], law.mean[0] + law.factor[0] @ rows.T @ weight, rtol=1e-7, atol=1e-9
    )


def test_khat_is_zero_where_the_guide_is_exact():
    for case in ("one component", "memory with a past, random start"):
        model, y, *_ = build(case)
        assert khat(model, AutoPathGuide(model, hidden=()), (y,), num_draws=200) < 0.1


def test_training_from_the_prior_closes_the_gap():
    model, y, law, emission = build("one component")
    evidence = float(law.evidence(y, SEEN, SD, emission))
    guide = AutoPathGuide(model, hidden=(), start="prior")
    elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.15, "lrd": 0.975}), elbo)
    first = evidence - float(bounds(model, guide, y, particles=200).mean())
    for _ in range(120):
        svi.step(y)
    last = evidence - float(bounds(model, guide, y, particles=200).mean())
    assert first > 5.0
    assert -1e-3 < last < 0.02 * first


class SlowMemory(NoiseProcess):
    """The Markov noise of the worked case, by Euler steps of its states."""

    num_states = 5

    def __init__(self, noise):
        super().__init__()
        self.speeds, self.weights = noise.speeds, noise.weights

    def steps(self, ts, *, dtype):
        dt = (ts[1:] - ts[:-1])[:, None]
        n = len(dt)
        gain, load = self.weights.sum().expand(n, 1), torch.ones(n, 1, 5, dtype=F64)
        return NoiseSteps(dt, gain, -self.weights * self.speeds * dt, 1 - self.speeds * dt, load)

    def initial_factor(self, *, dtype, device):
        return None


@pytest.mark.filterwarnings("ignore::stochdyn.errors.ApproximationWarning")
class TestWorkedCase:
    """H = 0.3 (type II, five speeds), rate 0.7, y(2) = 0.8 of variance 0.01, 50 steps: evidence -1.196."""

    @pytest.fixture(params=["exact", "euler"])
    def case(self, request):
        ts = torch.linspace(0, 2, 51, dtype=F64)
        speeds = torch.logspace(math.log10(0.05), math.log10(20.0), 5, dtype=F64)
        noise = MarkovNoise(0.3, horizon=2.0, speeds=speeds)
        noise = SlowMemory(noise) if request.param == "euler" else noise

        def model():
            x = sample_path("x", SDE(lambda t, x: -0.7 * x, 1.0, noise), torch.zeros(1, dtype=F64), ts)
            pyro.sample("y", dist.Normal(x[..., -1, 0], 0.1), obs=torch.tensor(0.8, dtype=F64))

        law = linear_path(A1, torch.eye(1, dtype=F64), ts, torch.zeros(1, dtype=F64), noise=noise)
        evidence = law.evidence(torch.tensor([0.8], dtype=F64), torch.tensor([50]), 0.1)
        return request.param, model, evidence

    def test_tight_guide_reaches_the_evidence(self, case):
        _, model, evidence = case
        got = bounds(model, AutoPathGuide(model, hidden=()))
        torch.testing.assert_close(got, evidence.expand(4), rtol=1e-8, atol=1e-8)
        assert float(got[0]) == pytest.approx(-1.196, abs=3e-4)

    def test_the_same_feedback_with_the_priors_spread_is_far_below(self, case):
        steps, model, evidence = case
        guide = AutoPathGuide(model, hidden=())
        guide()
        site = guide.sites.site_0
        factor = site._factor(site.log_diagonal, site.lower).detach()
        precision = torch.linalg.inv(factor @ factor.mT)
        # What is lost is the divergence of the prior's spread from the posterior's, summed over the steps.
        eye = torch.eye(factor.shape[-1], dtype=F64)
        loss = torch.einsum("nii->", precision - eye) - torch.linalg.slogdet(precision).logabsdet.sum()
        want = float(evidence - 0.5 * loss)
        if steps == "euler":
            assert want == pytest.approx(-9.81, abs=0.005)
        with torch.no_grad():
            site.log_diagonal.zero_()
            if site.lower is not None:
                site.lower.zero_()
        got = bounds(model, guide, particles=2000)
        assert abs(float(got.mean()) - want) < 4.5 * float(got.std()) / 2000**0.5
