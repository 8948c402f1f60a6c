"""AutoPathGuide as a Pyro guide: gradients, global sites, encoders, parameters, errors."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, AutoNormal

from stochdyn.core import SDE, Scalar
from stochdyn.errors import InvalidInputError, UnknownSiteError
from stochdyn.infer import AutoPathGuide, DiffusionPath, sample_path
from stochdyn.infer.spread import spread_of_paths
from stochdyn.infer.view import view_site
from tests.infer.exact import F64, TwoStates, linear_path
from tests.infer.test_guides_exact import bounds

TS = torch.linspace(0, 2, 11, dtype=F64)
SEEN = torch.tensor([2, 5, 8, 10])
Y = torch.tensor([0.9, 0.2, -0.7, -0.4], dtype=F64)
ONE = torch.ones(1, dtype=F64)
ESTIMATORS = ("density", "rate", "stl")


def well(y, noise_space=None, start=ONE):
    """A nonlinear path."""
    sde = SDE(lambda t, x: x - x**3, lambda t, x: 0.6 + 0.2 * torch.cos(x))
    x = sample_path("x", sde, start, TS, noise_space=noise_space)
    pyro.sample("y", dist.Normal(x[..., SEEN, 0], 0.3).to_event(1), obs=y)


def ou_with_parameters(y):
    """A path with a global rate and scale."""
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(-0.5, dtype=F64), 0.3))
    sde = SDE(lambda t, x: -rate[..., None] * x, Scalar(scale))
    x = sample_path("x", sde, ONE, TS)
    pyro.sample("y", dist.Normal(x[..., SEEN, 0], 0.2).to_event(1), obs=y)


def shake(guide, size=0.1):
    """Move all parameters off their start."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    return guide


def gradient(guide, model, args, estimator, seed, particles=50, names=None):
    """Return the loss and its gradient as one vector."""
    guide.estimator = estimator
    torch.manual_seed(seed)
    guide.zero_grad()
    elbo = Trace_ELBO(num_particles=particles, vectorize_particles=True, max_plate_nesting=1)
    loss = elbo.loss_and_grads(model, guide, *args)
    grads = [p.grad for n, p in guide.named_parameters() if names is None or n in names]
    return loss, torch.cat([g.flatten() for g in grads if g is not None])


RANDOM = dist.Normal(ONE, 0.5).to_event(1)
FORMS = {
    "path": {},
    "increments": {"noise_space": True},
    "path, random start": {"start": RANDOM},
    "increments, random start": {"noise_space": True, "start": RANDOM},
}


class TestEstimators:
    @staticmethod
    def make(form, hidden=(4,)):
        def model(y):
            well(y, **FORMS[form])

        guide = AutoPathGuide(model, hidden=hidden)
        guide(Y)
        return model, shake(guide)

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_all_report_one_value(self, form):
        model, guide = self.make(form)
        values = [gradient(guide, model, (Y,), e, seed=1)[0] for e in ESTIMATORS]
        assert values[0] == values[1] == values[2]

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_density_is_the_derivative_of_the_bound_at_common_random_numbers(self, form):
        model, guide = self.make(form)
        got = gradient(guide, model, (Y,), "density", seed=2)[1]
        direction = torch.randn(got.shape, dtype=F64)
        step = 1e-5

        def moved(sign):
            at = 0
            with torch.no_grad():
                for parameter in guide.parameters():
                    change = direction[at : at + parameter.numel()].reshape(parameter.shape)
                    parameter += sign * step * change
                    at += parameter.numel()

        assert got.numel() == sum(p.numel() for p in guide.parameters())
        moved(1)
        up = gradient(guide, model, (Y,), "density", seed=2)[0]
        moved(-2)
        down = gradient(guide, model, (Y,), "density", seed=2)[0]
        assert (up - down) / (2 * step) == pytest.approx(float(got @ direction), rel=1e-5)

    # The forms with a random start have all that the others have.
    @pytest.mark.parametrize("form", ["path, random start", "increments, random start"])
    @pytest.mark.parametrize("estimator", ["rate", "stl"])
    def test_mean_gradients_agree(self, form, estimator):
        model, guide = self.make(form)
        rows = []
        for seed in range(30):
            want = gradient(guide, model, (Y,), "density", seed)[1]
            rows.append(gradient(guide, model, (Y,), estimator, seed)[1] - want)
        rows = torch.stack(rows)
        error = rows.std(0) / 30**0.5
        noisy = error > 1e-10
        assert float(rows.abs().max()) > 1e-3
        # about 90 numbers of t(29) under 5: a false alarm once in 500 seeds
        assert float((rows.mean(0) / error)[noisy].abs().max()) < 5
        torch.testing.assert_close(rows[:, ~noisy], torch.zeros_like(rows[:, ~noisy]), atol=1e-7, rtol=0)

    def test_sticking_the_landing_is_quiet_near_the_optimum(self):
        def model(y):
            x = sample_path("x", SDE(lambda t, x: -x, 0.7), ONE, TS)
            pyro.sample("y", dist.Normal(x[..., SEEN, 0], 0.3).to_event(1), obs=y)

        guide = AutoPathGuide(model, hidden=())
        guide(Y)
        shake(guide, 0.01)
        noise = {}
        for estimator in ESTIMATORS:
            rows = torch.stack(
                [gradient(guide, model, (Y,), estimator, s, particles=10)[1] for s in range(20)]
            )
            noise[estimator] = float(rows.var(0).sum())
        assert 100 * noise["stl"] < min(noise["rate"], noise["density"])


def test_svi_with_global_sites_comes_near_the_exact_posterior():
    logs = torch.linspace(-2.0, 2.0, 31, dtype=F64)
    table = torch.empty(31, 31, dtype=F64)
    for i, rate in enumerate(logs.exp()):
        law = linear_path(-rate.reshape(1, 1), ONE[:, None], TS, ONE)
        mean, cov = law.observed(SEEN)
        for j, scale in enumerate((0.6 * logs - 0.5).exp()):
            noisy = scale**2 * cov + 0.04 * torch.eye(4, dtype=F64)
            table[i, j] = torch.distributions.MultivariateNormal(mean, noisy).log_prob(Y)
    table += dist.Normal(0.0, 0.5).log_prob(logs)[:, None] + dist.Normal(0.0, 0.3).log_prob(0.6 * logs)
    cell = math.log(float(logs[1] - logs[0]) ** 2 * 0.6)
    evidence = float(table.flatten().logsumexp(0)) + cell
    weight = (table + cell - evidence).exp()
    exact = {}
    for name, marginal, at in (("rate", weight.sum(1), logs), ("scale", weight.sum(0), 0.6 * logs - 0.5)):
        mean = float(marginal @ at)
        exact[name] = (mean, float(marginal @ at**2 - mean**2) ** 0.5)

    guide = AutoPathGuide(ou_with_parameters, rest=AutoMultivariateNormal, hidden=())
    elbo = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(ou_with_parameters, guide, pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.985}), elbo)
    first = bounds(ou_with_parameters, guide, Y, particles=2000).mean()
    for _ in range(150):
        svi.step(Y)
    got = bounds(ou_with_parameters, guide, Y, particles=2000)
    gap = evidence - float(got.mean())
    assert -4.5 * float(got.std()) / 2000**0.5 < gap < 0.5
    assert float(got.mean()) > float(first)
    with pyro.plate("draws", 4000), torch.no_grad():
        draws = guide(Y)
    for name, (mean, sd) in exact.items():
        # Feedback that doesn't answer to the parameters narrows them a little.
        assert abs(float(draws[name].log().mean()) - mean) < 0.3 * sd
        assert 0.65 * sd < float(draws[name].log().std()) < 1.2 * sd


def test_any_autoguide_takes_the_rest():
    for rest in (AutoNormal, AutoMultivariateNormal, AutoDelta):
        pyro.clear_param_store()
        guide = AutoPathGuide(ou_with_parameters, rest=rest, hidden=(4,))
        elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=0)
        svi = SVI(ou_with_parameters, guide, pyro.optim.Adam({"lr": 0.01}), elbo)
        assert all(math.isfinite(svi.step(Y)) for _ in range(3))
        assert set(guide(Y)) == {"rate", "scale", "x"}


def test_two_paths_are_guided_together():
    def model(y):
        u = sample_path("u", SDE(lambda t, x: -x, 0.5), ONE, TS)
        v = sample_path("v", SDE(lambda t, x: -x, 0.5), -ONE, TS, noise_space=True)
        pyro.sample("y", dist.Normal(u[..., SEEN, 0] + v[..., SEEN, 0], 0.3).to_event(1), obs=y)

    guide = AutoPathGuide(model, hidden=())
    values = guide(Y)
    assert {"u", "v", "v_dw"} == set(values)
    law = linear_path(-ONE[:, None], 0.5 * ONE[:, None], TS, ONE)
    mean, cov = law.observed(SEEN)
    evidence = torch.distributions.MultivariateNormal(
        0 * mean, 2 * cov + 0.09 * torch.eye(4, dtype=F64)
    ).log_prob(Y)
    got = bounds(model, guide, Y, particles=500)
    # Independent factors can't match the posterior, whose paths are tied by their sum.
    assert 0.05 < float(evidence - got.mean()) < 3.0
    first = Trace_ELBO(num_particles=8, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), first)
    for _ in range(60):
        svi.step(Y)
    assert float(bounds(model, guide, Y, particles=500).mean()) > float(got.mean())


class TestAmortised:
    """Twelve series, four at a time; an encoder reads them."""

    SERIES = 12

    @classmethod
    def data(cls, count=SERIES, seed=5):
        generator = torch.Generator().manual_seed(seed)
        x = linear_path(-ONE[:, None], 0.7 * ONE[:, None], TS, 0 * ONE, ONE[:, None])
        draws = torch.randn(count, x.factor.shape[-1], generator=generator, dtype=F64) @ x.factor[:, 0].T
        return draws[:, SEEN] + 0.2 * torch.randn(count, 4, generator=generator, dtype=F64)

    @staticmethod
    def model(y, size=None, noise_space=None, rate=None):
        count = y.shape[0]
        if rate is None:
            rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), 0.3))
        with pyro.plate("series", count, subsample_size=size) as index:
            start = dist.Normal(0 * ONE, 1.0).to_event(1)
            sde = SDE(lambda t, x: -rate[..., None] * x, 0.7)
            x = sample_path("x", sde, start, TS, noise_space=noise_space)
            pyro.sample("y", dist.Normal(x[..., SEEN, 0], 0.2).to_event(1), obs=y[index])

    @pytest.mark.parametrize("noise_space", [None, pytest.param(True, marks=pytest.mark.slow)])
    def test_minibatches_train_an_encoder_that_serves_new_series(self, noise_space):
        y, new = self.data(), self.data(seed=6)
        rate = torch.ones((), dtype=F64)
        args = (4, noise_space, rate)
        guide = AutoPathGuide(self.model, hidden=(), context=16)
        guide(y, *args)
        assert guide.sites.site_0.amortised
        before = float(bounds(self.model, guide, new, None, *args[1:], nesting=1, particles=50).mean())
        elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(self.model, guide, pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.98}), elbo)
        for _ in range(100):
            assert math.isfinite(svi.step(y, *args))
        after = float(bounds(self.model, guide, new, None, *args[1:], nesting=1, particles=50).mean())
        law = linear_path(-ONE[:, None], 0.7 * ONE[:, None], TS, 0 * ONE, ONE[:, None])
        exact = float(sum(law.evidence(row, SEEN, 0.2) for row in new))
        assert after < exact
        # 12 series that the encoder has never seen
        assert exact - after < 0.25 * (exact - before)
        assert guide(new[:3], None, *args[1:])["x"].shape == (3, 11, 1)

    def test_minibatch_size_doesn_t_change_what_the_encoder_reads(self):
        y = self.data()
        rate = torch.ones((), dtype=F64)
        guide = shake(self.ready(y, rate))
        with torch.no_grad():
            whole = guide.median(y, None, None, rate)["x"]
            alone = guide.median(y[:4], None, None, rate)["x"]
        torch.testing.assert_close(whole[:4], alone)

    def ready(self, y, rate=None):
        guide = AutoPathGuide(self.model, hidden=(4,), context=8)
        guide(y, 4, None, rate)
        return guide

    def test_gradient_through_global_sites_is_whole(self):
        """At common random numbers the density estimator is the derivative, also in the spread of a global site."""
        y = self.data(4)
        guide = AutoPathGuide(self.model, hidden=(4,), context=8, amortised=True)
        guide(y)
        shake(guide, 0.3)
        name = "rest.scales.rate_unconstrained"
        assert name in dict(guide.named_parameters())
        parameter = dict(guide.named_parameters())[name]
        got = float(gradient(guide, self.model, (y,), "density", 3, particles=5, names=[name])[1])
        step = 1e-5
        losses = []
        for sign in (1, -2):
            with torch.no_grad():
                parameter += sign * step
            losses.append(gradient(guide, self.model, (y,), "density", 3, particles=5)[0])
        assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(got, rel=1e-4)

    @pytest.mark.parametrize("estimator", ESTIMATORS)
    def test_every_parameter_gets_a_finite_gradient(self, estimator):
        y = self.data()
        guide = AutoPathGuide(self.model, hidden=(4,), context=8)
        guide(y, 4)
        shake(guide)
        gradient(guide, self.model, (y, 4), estimator, 1, particles=2)
        for name, parameter in guide.named_parameters():
            assert parameter.grad is not None, name
            assert bool(torch.isfinite(parameter.grad).all()), name
            assert float(parameter.grad.abs().max()) > 0, name

    def test_free_feedback_in_a_subsampled_plate_is_told(self):
        with pytest.raises(InvalidInputError, match="amortised=True"):
            AutoPathGuide(self.model, amortised=False)(self.data(), 4)

    def test_past_of_the_noise_is_read_too(self):
        def model(y, size=None):
            with pyro.plate("series", y.shape[0], subsample_size=size) as index:
                sde = SDE(lambda t, x: -x, 0.7, TwoStates(past=True))
                x = sample_path("x", sde, 0 * ONE, TS)
                pyro.sample("y", dist.Normal(x[..., SEEN, 0], 0.2).to_event(1), obs=y[index])

        y = self.data()
        guide = AutoPathGuide(model, hidden=(), context=8)
        values = guide(y, 4)
        assert guide.rest is None
        assert values["x_past"].shape == (4, 1, 2)
        elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
        svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.03}), elbo)
        losses = torch.tensor([svi.step(y, 4) for _ in range(60)])
        assert float(losses[-10:].mean()) < 0.5 * float(losses[:5].mean())


class TestParameters:
    def test_param_store_holds_every_parameter(self):
        guide = AutoPathGuide(ou_with_parameters, hidden=(4,))
        elbo = Trace_ELBO()
        SVI(ou_with_parameters, guide, pyro.optim.Adam({"lr": 0.01}), elbo).step(Y)
        stored = {id(p) for _, p in pyro.get_param_store().named_parameters()}
        assert {id(p) for p in guide.parameters()} == stored
        # rate and scale by location and spread; offset, gain and spread of the steps; two layers of the network
        assert len(stored) == 4 + 3 + 4
        assert all(p.numel() for p in guide.parameters())

    @pytest.mark.parametrize("amortised", [False, True])
    def test_svi_moves_every_parameter(self, amortised):
        guide = AutoPathGuide(ou_with_parameters, hidden=(4,), amortised=amortised, context=5)
        guide(Y)
        shake(guide)
        before = {n: p.detach().clone() for n, p in guide.named_parameters()}
        svi = SVI(ou_with_parameters, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
        for _ in range(2):
            svi.step(Y)
        still = [n for n, p in guide.named_parameters() if torch.equal(p, before[n]) and p.numel()]
        assert not still

    def test_state_dict_goes_round(self):
        guide = AutoPathGuide(ou_with_parameters, hidden=(4,))
        guide(Y)
        shake(guide)
        other = AutoPathGuide(ou_with_parameters, hidden=(4,))
        torch.manual_seed(3)
        other(Y + 1)
        other.load_state_dict(guide.state_dict())
        draws = []
        for g in (guide, other):
            torch.manual_seed(4)
            draws.append(g(Y))
        for name in draws[0]:
            assert torch.equal(draws[0][name], draws[1][name])

    def test_parameters_of_the_equation_train_with_the_guide(self):
        def model(y):
            rate = pyro.param("rate", torch.tensor(3.0, dtype=F64))
            x = sample_path("x", SDE(lambda t, x: -rate * x, 0.5), ONE, TS)
            pyro.sample("y", dist.Normal(x[..., SEEN, 0], 0.2).to_event(1), obs=y)

        def evidence(rate):
            law = linear_path(-rate.reshape(1, 1), 0.5 * ONE[:, None], TS, ONE)
            return law.evidence(Y, SEEN, 0.2)

        rates = torch.linspace(0.1, 4, 79, dtype=F64)
        best = rates[torch.stack([evidence(r) for r in rates]).argmax()]
        guide = AutoPathGuide(model, hidden=())
        elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
        svi = SVI(model, guide, pyro.optim.ClippedAdam({"lr": 0.1, "lrd": 0.98}), elbo)
        for _ in range(150):
            svi.step(Y)
        assert float(pyro.param("rate").detach()) == pytest.approx(float(best), abs=0.1)


class TestErrors:
    def test_model_without_a_path_is_told_every_time(self):
        guide = AutoPathGuide(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
        for _ in range(2):
            with pytest.raises(UnknownSiteError, match=r"no path site; got latent sites \['z'\]"):
                guide()

    @pytest.mark.parametrize("option", [{"start": "zero"}, {"estimator": "score"}])
    def test_unknown_options_are_told_at_once(self, option):
        with pytest.raises(InvalidInputError, match=next(iter(option))):
            AutoPathGuide(well, **option)

    def test_observed_path_is_no_site_to_guide(self):
        def model():
            sample_path("x", SDE(lambda t, x: -x, 1.0), ONE, TS)

        observed = poutine.condition(model, {"x": torch.ones(11, 1, dtype=F64)})
        with pytest.raises(UnknownSiteError):
            AutoPathGuide(observed)()


class TestUse:
    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_call_and_median_return_every_site_and_the_path(self, form):
        def model(y):
            well(y, **FORMS[form])

        guide = AutoPathGuide(model, hidden=(4,))
        names = {"x"} | ({"x_dw"} if "increments" in form else set())
        names |= {"x_0"} if form == "increments, random start" else set()
        for values in (guide(Y), guide.median(Y)):
            assert set(values) == names
            assert values["x"].shape == (11, 1)

    def test_median_is_the_same_every_time_and_leaves_no_trace(self):
        guide = AutoPathGuide(ou_with_parameters, hidden=(4,))
        with poutine.trace() as trace:
            first = guide.median(Y)
        assert not trace.trace.nodes
        second = guide.median(Y)
        assert all(torch.equal(first[n], second[n]) for n in first)

    def test_measuring_the_width_leaves_the_random_state_alone(self):
        path = DiffusionPath(SDE(lambda t, x: x - x**3, 0.5), ONE, TS)
        view = view_site(path, "x")
        state = torch.get_rng_state()
        first = spread_of_paths(view, None, view.reference()[:-1])
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(1)
        assert torch.equal(spread_of_paths(view, None, view.reference()[:-1]), first)
        spread = float(path.sample((4000,)).std(0).max())
        assert 0.3 * spread < float(first) < 2 * spread

    def test_conditioned_increments_drive_the_path_returned(self):
        def model(y):
            well(y, noise_space=True)

        guide = AutoPathGuide(model, hidden=(4,))
        dw = torch.randn(10, 1, dtype=F64) * 0.1
        values = poutine.condition(guide, {"x_dw": dw})(Y)
        direct = poutine.trace(poutine.condition(model, {"x_dw": dw})).get_trace(Y).nodes["x"]["value"]
        torch.testing.assert_close(values["x"], direct)

    def test_create_plates_subsamples_by_the_users_index(self):
        y = TestAmortised.data()

        def model(y):
            with pyro.plate("series", 12, subsample_size=4, dim=-1) as index:
                x = sample_path("x", SDE(lambda t, x: -x, 0.7), ONE, TS)
                pyro.sample("y", dist.Normal(x[..., SEEN, 0], 0.2).to_event(1), obs=y[index])

        index = torch.tensor([3, 1, 7, 11])
        guide = AutoPathGuide(
            model, hidden=(), create_plates=lambda y: pyro.plate("series", 12, subsample=index, dim=-1)
        )
        trace = poutine.trace(guide).get_trace(y)
        assert torch.equal(trace.nodes["series"]["value"], index)
        replayed = poutine.trace(poutine.replay(model, trace)).get_trace(y)
        assert torch.equal(replayed.nodes["y"]["value"], y[index])
