"""Paths under Pyro's own machinery: plates, particles, Predictive, NUTS, stock guides and bounds, scales and masks."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Predictive, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoMultivariateNormal,
    AutoNormal,
    init_to_median,
)
from pyro.ops.stats import effective_sample_size

from stochdyn.core import SDE, Scalar
from stochdyn.errors import DiffusionError
from stochdyn.fractional import MarkovNoise
from stochdyn.infer import AutoPathGuide, NoiseReparam, sample_path
from tests.infer.exact import F64, TwoStates, linear_path

TS = torch.linspace(0, 1, 6, dtype=F64)
SEEN = torch.tensor([2, 5])
Y = torch.tensor([0.9, 0.2], dtype=F64)
ONE = torch.ones(1, dtype=F64)


def single(y, noise_space=None, dtype=F64):
    """One path, with a global rate."""
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=dtype), 0.5))
    sde = SDE(lambda t, x: -rate[..., None] * x, 0.7)
    x = sample_path("x", sde, ONE.to(dtype), TS.to(dtype), noise_space=noise_space)
    return pyro.sample("y", dist.Normal(x[..., SEEN, 0], 0.3).to_event(1), obs=y)


def several(y, size=None, noise_space=None, noise=None):
    """Paths in a plate, with a global rate and scale."""
    rate = pyro.sample("rate", dist.LogNormal(torch.zeros((), dtype=F64), 0.5))
    scale = pyro.sample("scale", dist.LogNormal(torch.zeros((), dtype=F64), 0.3))
    start = dist.Normal(0 * ONE, 1.0).to_event(1)
    with pyro.plate("series", 6, subsample_size=size) as index:
        sde = SDE(lambda t, x: -rate[..., None] * x, Scalar(scale), noise)
        x = sample_path("x", sde, start, TS, noise_space=noise_space)
        data = None if y is None else y[index]
        return pyro.sample("y", dist.Normal(x[..., SEEN, 0], 0.3).to_event(1), obs=data)


DATA = torch.tensor([[0.9, 0.2], [0.1, -0.4], [-1.0, -0.2], [0.0, 0.5], [0.4, 0.3], [-0.6, -1.0]], dtype=F64)
FORMS = {"path": {}, "increments": {"noise_space": True}, "memory": {"noise": TwoStates(past=True)}}
GUIDES = [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoDelta, AutoPathGuide]


def step_losses(model, guide, elbo, args, kwargs=None, steps=3, lr=0.02):
    svi = SVI(model, guide, pyro.optim.Adam({"lr": lr}), elbo)
    return [svi.step(*args, **(kwargs or {})) for _ in range(steps)]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("make", GUIDES)
@pytest.mark.parametrize("vectorized", [False, True])
def test_stock_guides_and_bounds_take_paths(make, form, vectorized):
    guide = make(several)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=vectorized, max_plate_nesting=1)
    losses = step_losses(several, guide, elbo, (DATA,), FORMS[form], steps=2)
    assert all(math.isfinite(loss) for loss in losses)
    assert bool(torch.isfinite(guide.median(DATA, **FORMS[form])["rate"]).all())


@pytest.mark.parametrize("form", ["path", "increments"])
@pytest.mark.parametrize("make", [AutoNormal, AutoMultivariateNormal, AutoPathGuide])
@pytest.mark.parametrize(
    ("elbo", "retain"),
    [(Trace_ELBO, True), (TraceMeanField_ELBO, None), (TraceMeanField_ELBO, True), (TraceGraph_ELBO, None)],
)
def test_bounds_agree_on_the_value(make, form, elbo, retain):
    guide = make(several)
    guide(DATA, **FORMS[form])
    vectorized = elbo is not TraceGraph_ELBO
    options = {"vectorize_particles": vectorized, "max_plate_nesting": 1, "retain_graph": retain}
    particles = 5 if vectorized else 1

    def losses(kind):
        bound = kind(num_particles=particles, **options)
        return torch.tensor([bound.loss(several, guide, DATA, **FORMS[form]) for _ in range(10)])

    want, got = losses(Trace_ELBO), losses(elbo)
    error = (want.var() / 10 + got.var() / 10).sqrt()
    # t with about 18 degrees of freedom: 5.5 is a false alarm once in 30 000 seeds
    assert abs(float(want.mean() - got.mean())) < 5.5 * float(error)
    assert math.isfinite(
        elbo(num_particles=particles, **options).loss_and_grads(several, guide, DATA, **FORMS[form])
    )
    for parameter in guide.parameters():
        assert bool(torch.isfinite(parameter.grad).all())


def test_particles_in_a_row_and_at_once_have_one_law():
    guide = AutoPathGuide(several, hidden=())
    guide(DATA)
    losses = {}
    for vectorized in (True, False):
        elbo = Trace_ELBO(num_particles=10, vectorize_particles=vectorized, max_plate_nesting=1)
        losses[vectorized] = torch.tensor([elbo.loss(several, guide, DATA) for _ in range(10)])
    error = sum(v.var() / 10 for v in losses.values()).sqrt()
    assert abs(float(losses[True].mean() - losses[False].mean())) < 5.5 * float(error)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_minibatches_of_a_subsampled_plate_are_unbiased(form):
    """The density of a part of the series, scaled up, has the mean of the whole."""
    kwargs = FORMS[form]
    whole = poutine.trace(several).get_trace(DATA, **kwargs)
    fixed = {n: whole.nodes[n]["value"] for n in poutine.util.prune_subsample_sites(whole).stochastic_nodes}
    parts = []
    for first in range(3):
        index = torch.tensor([first, first + 3])
        given = {n: v if v.ndim == 0 else v[index] for n, v in fixed.items()}
        guide = poutine.trace(lambda g=given, i=index: _sites(g, i)).get_trace()
        trace = poutine.trace(poutine.replay(several, guide)).get_trace(DATA, size=2, **kwargs)
        parts.append(float(trace.log_prob_sum()))
    local = sum(parts) / 3
    assert local == pytest.approx(float(whole.log_prob_sum()))


def _sites(values, index):
    """Stand for a guide that has drawn these values for these series."""
    plate = pyro.plate("series", 6, subsample=index)
    for name, value in values.items():
        law = dist.Delta(value, event_dim=0 if value.ndim == 0 else value.ndim - 1)
        if value.ndim == 0:
            pyro.sample(name, law)
        else:
            with plate:
                pyro.sample(name, law)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_subsampled_plates_train(form):
    guide = AutoNormal(several)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
    losses = step_losses(several, guide, elbo, (DATA, 2), FORMS[form], steps=5)
    assert all(math.isfinite(loss) for loss in losses)
    site = "x_dw" if form != "path" else "x"
    assert guide(DATA, 2, **FORMS[form])[site].shape[0] == 2


class TestPredictive:
    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("parallel", [True, False])
    def test_prior_draws(self, form, parallel):
        draws = Predictive(several, num_samples=7, parallel=parallel)(None, **FORMS[form])
        # Deterministic sites of a plate keep its axis in place.
        assert draws["x"].shape == (7, 6, 6, 1)
        assert draws["y"].shape == (7, 6, 2)
        assert len(torch.unique(draws["x"][..., -1, 0])) == 42

    @pytest.mark.parametrize("form", FORMS, ids=str)
    @pytest.mark.parametrize("make", [AutoNormal, AutoPathGuide])
    def test_posterior_draws_belong_together(self, form, make):
        guide = make(several)
        guide(DATA, **FORMS[form])
        sites = ("rate", "scale", "x", "x_dw", "x_0", "x_past")
        for parallel in (True, False):
            with torch.no_grad():
                draws = Predictive(
                    several, guide=guide, num_samples=5, parallel=parallel, return_sites=sites
                )(DATA, **FORMS[form])
            x = draws["x"].reshape(5, 6, 6, 1)
            if form == "path":
                assert len(torch.unique(x[..., -1, 0])) == 30
                continue
            # The path drawn is the one that its own increments, start, past and parameters drive.
            for i in range(5):
                given = {n: v[i] for n, v in draws.items() if n != "x"}
                given = {n: v.reshape(()) if n in ("rate", "scale") else v for n, v in given.items()}
                model = poutine.condition(several, given)
                again = poutine.trace(model).get_trace(DATA, **FORMS[form]).nodes["x"]["value"]
                torch.testing.assert_close(again, x[i])

    def test_parallel_and_serial_draws_have_one_law(self):
        n = 1500
        ends = {}
        for parallel in (True, False):
            draws = Predictive(single, num_samples=n if parallel else 300, parallel=parallel)(None)
            ends[parallel] = draws["x"].reshape(-1, 6)[:, -1]
        error = sum(float(e.var()) / len(e) for e in ends.values()) ** 0.5
        assert abs(float(ends[True].mean() - ends[False].mean())) < 4.5 * error


def exact_posterior(y):
    """Return mean and sd of log rate and of the path's end, by quadrature over the rate."""
    logs = torch.linspace(-2.5, 2.5, 201, dtype=F64)
    rows = []
    for rate in logs.exp():
        law = linear_path(-rate.reshape(1, 1), 0.7 * ONE[:, None], TS, ONE)
        post, sd = law.smooth(y, SEEN, 0.3)
        rows.append(torch.stack([law.evidence(y, SEEN, 0.3), post[-1, 0], sd[-1, 0]]))
    table = torch.stack(rows)
    weight = torch.softmax(table[:, 0] + dist.Normal(0.0, 0.5).log_prob(logs), 0)
    mean = [float(weight @ logs), float(weight @ table[:, 1])]
    second = [float(weight @ logs**2), float(weight @ (table[:, 1] ** 2 + table[:, 2] ** 2))]
    return mean, [(s - m**2) ** 0.5 for m, s in zip(mean, second, strict=True)]


class TestNUTS:
    @pytest.mark.parametrize(
        ("form", "draws"),
        [
            ("path", 100),
            pytest.param("path", 500, marks=pytest.mark.slow),
            pytest.param("increments", 500, marks=pytest.mark.slow),
            pytest.param("reparam", 500, marks=pytest.mark.slow),
        ],
    )
    def test_posterior_of_path_and_parameter_is_exact(self, form, draws):
        model = {
            "path": single,
            "increments": lambda y: single(y, noise_space=True),
            "reparam": poutine.reparam(single, {"x": NoiseReparam()}),
        }[form]
        kernel = NUTS(model, max_tree_depth=4)
        mcmc = MCMC(kernel, num_samples=draws, warmup_steps=40 + draws // 4, disable_progbar=True)
        mcmc.run(Y)
        got = mcmc.get_samples()
        if form == "path":
            assert torch.equal(got["x"][:, 0], torch.ones(draws, 1, dtype=F64))
            end = got["x"][:, -1, 0]
        else:
            end = Predictive(model, got)(Y)["x"].reshape(draws, 6)[:, -1]
        mean, sd = exact_posterior(Y)
        for i, values in enumerate((got["rate"].log(), end)):
            effective = float(effective_sample_size(values[None], 0, 1).clamp(max=draws))
            assert effective > draws / 10
            assert abs(float(values.mean()) - mean[i]) < 4.5 * sd[i] / effective**0.5
            assert abs(float(values.std()) / sd[i] - 1) < 4.5 / (2 * effective) ** 0.5

    @pytest.mark.parametrize("form", FORMS, ids=str)
    def test_wild_proposals_of_the_warm_up_are_survived(self, form):
        """The first search for a step size tries scales of zero and infinity."""
        kernel = NUTS(several, step_size=100.0, max_tree_depth=2)
        mcmc = MCMC(kernel, num_samples=2, warmup_steps=4, disable_progbar=True)
        mcmc.run(DATA, **FORMS[form])
        shapes = {n: tuple(v.shape) for n, v in mcmc.get_samples().items()}
        want = {"rate": (2,), "scale": (2,), "x": (2, 6, 6, 1)}
        if form != "path":
            want = {"rate": (2,), "scale": (2,), "x_0": (2, 6, 1), "x_dw": (2, 6, 5, 1)}
        if form == "memory":
            want["x_past"] = (2, 6, 1, 2)
        assert shapes == want

    def test_values_are_checked_again_afterwards(self):
        with pyro.validation_enabled(False):
            SDE(lambda t, x: -x, torch.tensor(0.0))
        with pytest.raises(DiffusionError):
            SDE(lambda t, x: -x, torch.tensor(0.0))

    def test_chains_start_where_the_path_is_pinned(self):
        kernel = NUTS(single)
        kernel.setup(1, Y)
        assert kernel.initial_params["x"].shape == (5, 1)


class TestScaleAndMask:
    @pytest.mark.parametrize("make", [AutoNormal, AutoPathGuide])
    def test_scaled_models_train(self, make):
        scaled = poutine.scale(several, scale=0.5)
        guide = make(scaled)
        elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=1)
        assert all(math.isfinite(v) for v in step_losses(scaled, guide, elbo, (DATA,)))

    def test_scale_and_mask_act_on_the_density_of_a_path(self):
        seen = torch.tensor([True, False, True])
        start = torch.zeros(3, 1, dtype=F64)

        def model():
            with pyro.plate("series", 3), poutine.scale(scale=2.0), poutine.mask(mask=seen):
                sample_path("x", SDE(lambda t, x: -x, 1.0), start, TS)

        site = poutine.trace(model).get_trace()
        site.compute_log_prob()
        x = site.nodes["x"]
        want = 2.0 * torch.where(seen, x["fn"].log_prob(x["value"]), torch.zeros(3, dtype=F64))
        torch.testing.assert_close(x["log_prob"], want)

    def test_masked_observations_say_nothing(self):
        def model(y, seen):
            with pyro.plate("series", 6):
                x = sample_path("x", SDE(lambda t, x: -x, 1.0), torch.zeros(6, 1, dtype=F64), TS)
                with poutine.mask(mask=seen):
                    pyro.sample("y", dist.Normal(x[..., SEEN, 0], 0.3).to_event(1), obs=y)

        seen = torch.tensor([True, True, False, True, False, False])
        guide = AutoPathGuide(model, hidden=())
        x = guide.median(DATA, seen)["x"]
        assert float(x[~seen].abs().max()) == 0.0
        assert float(x[seen].abs().amax((1, 2)).min()) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("make", [AutoNormal, AutoPathGuide])
@pytest.mark.parametrize("noise_space", [None, True])
def test_both_precisions_train(dtype, make, noise_space):
    def model(y):
        return single(y, noise_space, dtype)

    guide = make(model)
    elbo = Trace_ELBO(num_particles=2, vectorize_particles=True, max_plate_nesting=0)
    assert all(math.isfinite(v) for v in step_losses(model, guide, elbo, (Y.to(dtype),)))
    values = guide(Y.to(dtype))
    assert {v.dtype for v in values.values()} == {dtype}
    assert {p.dtype for p in guide.parameters()} == {dtype}


def test_noise_form_helps_a_mean_field_guide_where_data_are_few():
    """Far from data the prior of a path is far from mean-field; its increments' isn't."""
    y = torch.tensor([0.2], dtype=F64)
    ts = torch.linspace(0, 1, 21, dtype=F64)

    def model(noise_space):
        x = sample_path("x", SDE(lambda t, x: -x, 1.0), ONE, ts, noise_space=noise_space)
        pyro.sample("y", dist.Normal(x[..., -1:, 0], 0.5).to_event(1), obs=y)

    law = linear_path(-ONE[:, None], ONE[:, None], ts, ONE)
    evidence = float(law.evidence(y, torch.tensor([20]), 0.5))
    gaps = {}
    for noise_space in (None, True):
        pyro.clear_param_store()
        guide = AutoNormal(lambda flag: model(flag), init_loc_fn=init_to_median, init_scale=0.2)
        elbo = Trace_ELBO(num_particles=4, vectorize_particles=True, max_plate_nesting=0)
        step_losses(model, guide, elbo, (noise_space,), steps=100, lr=0.08)
        final = Trace_ELBO(num_particles=1000, vectorize_particles=True, max_plate_nesting=0)
        gaps[noise_space] = evidence + final.loss(model, guide, noise_space)
    assert 0 < gaps[True] < 0.5 * gaps[None]


class TestLatentHurstIndex:
    """A Hurst index drawn in the model batches the noise itself."""

    @staticmethod
    def model(y, kind):
        hurst = pyro.sample("hurst", dist.Beta(torch.tensor(2.0, dtype=F64), 2.0))
        noise = MarkovNoise(hurst, num_states=4, horizon=1.0, dt=0.2, kind=kind)
        with pyro.plate("series", 3):
            x = sample_path("x", SDE(lambda t, x: -x, 0.7, noise), ONE, TS)
            return pyro.sample("y", dist.Normal(x[..., SEEN, 0], 0.3).to_event(1), obs=y)

    @pytest.mark.filterwarnings("ignore::stochdyn.errors.ApproximationWarning")
    @pytest.mark.parametrize("kind", ["I", "II"])
    def test_every_particle_has_noise_of_its_own(self, kind):
        draws = Predictive(self.model, num_samples=5, parallel=True)(None, kind)
        hurst = draws["hurst"].reshape(5)
        for i in range(5):
            given = {n: v[i] for n, v in draws.items() if n in ("x_dw", "x_past")}
            given["hurst"] = hurst[i]
            again = poutine.trace(poutine.condition(self.model, given)).get_trace(None, kind)
            torch.testing.assert_close(draws["x"][i].reshape(3, 6, 1), again.nodes["x"]["value"])

    @pytest.mark.filterwarnings("ignore::stochdyn.errors.ApproximationWarning")
    @pytest.mark.parametrize("make", [AutoNormal, AutoPathGuide])
    @pytest.mark.parametrize("vectorized", [False, True])
    def test_guides_train(self, make, vectorized):
        guide = make(self.model)
        elbo = Trace_ELBO(num_particles=3, vectorize_particles=vectorized, max_plate_nesting=1)
        guide(DATA[:3], "I")
        before = {n: p.detach().clone() for n, p in guide.named_parameters() if "hurst" in n}
        losses = step_losses(self.model, guide, elbo, (DATA[:3], "I"))
        assert all(math.isfinite(loss) for loss in losses)
        # Location and scale of the index are both learned: a constant gradient of zero would leave them.
        after = dict(guide.named_parameters())
        assert len(before) == 2
        assert all(float((after[n] - p).detach().abs()) > 0 for n, p in before.items())

    @pytest.mark.filterwarnings("ignore::stochdyn.errors.ApproximationWarning")
    def test_nuts_runs(self):
        mcmc = MCMC(NUTS(self.model, max_tree_depth=2), num_samples=3, warmup_steps=4, disable_progbar=True)
        mcmc.run(DATA[:3], "II")
        hurst = mcmc.get_samples()["hurst"]
        assert bool(((hurst > 0) & (hurst < 1)).all())
