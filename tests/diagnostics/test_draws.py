"""Draws carry the densities that the model and the guide give them, however they are computed."""

from __future__ import annotations

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoGuideList,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)

from stochdyn.diagnostics import draw_posterior, evaluate_draws
from stochdyn.diagnostics.draws import seeded
from stochdyn.errors import InvalidInputError, ShapeError, StochdynWarning, UnknownSiteError

Y = torch.tensor([0.3, -1.2, 0.8, 2.1, 0.0], dtype=torch.float64)


def normal(loc, scale):
    return dist.Normal(torch.as_tensor(loc, dtype=torch.float64), torch.as_tensor(scale, dtype=torch.float64))


def conjugate(y=Y):
    mean = pyro.sample("mean", normal(0.0, 2.0))
    with pyro.plate("record", len(y)):
        pyro.sample("y", normal(mean, 1.0), obs=y)


def conjugate_posterior(y=Y):
    precision = 1 / 4 + len(y)
    pyro.sample("mean", normal(y.sum() / precision, precision**-0.5))


def conjugate_evidence(y=Y):
    covariance = torch.eye(len(y), dtype=y.dtype) + 4.0
    return dist.MultivariateNormal(torch.zeros_like(y), covariance).log_prob(y)


def hierarchical(y):
    mean = pyro.sample("mean", normal(0.0, 1.0))
    scale = pyro.sample("scale", dist.LogNormal(mean.new_zeros(()), 0.5))
    pyro.deterministic("variance", scale**2)
    with pyro.plate("group", 3, dim=-1):
        level = pyro.sample("level", dist.Normal(mean, scale))
        pyro.deterministic("square", level**2)
        with pyro.plate("record", 4, dim=-2):
            pyro.sample("y", dist.Normal(level, 0.7), obs=y)
    pyro.factor("soft", -(mean**2))


def hierarchical_log_joint(values, y):
    mean, scale, level = values["mean"], values["scale"], values["level"]
    prior = normal(0.0, 1.0).log_prob(mean) + dist.LogNormal(mean.new_zeros(()), 0.5).log_prob(scale)
    levels = dist.Normal(mean[:, None], scale[:, None]).log_prob(level).sum(-1)
    likelihood = dist.Normal(level[:, None, :], 0.7).log_prob(y).sum((-1, -2))
    return prior + levels + likelihood - mean**2


@pytest.fixture
def table():
    return torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 3)


def test_the_exact_posterior_has_the_evidence_for_every_weight():
    draws = draw_posterior(conjugate, conjugate_posterior, num_draws=50)
    torch.testing.assert_close(draws.log_weights, conjugate_evidence().expand(50), rtol=0, atol=1e-12)
    assert draws.vectorised


@pytest.mark.parametrize(
    "guide_type",
    [AutoNormal, AutoDiagonalNormal, AutoMultivariateNormal, AutoLowRankMultivariateNormal, AutoIAFNormal],
)
def test_log_joint_is_that_of_the_drawn_values_for_every_autoguide(guide_type, table):
    guide = guide_type(hierarchical)
    guide(table)
    draws = draw_posterior(hierarchical, guide, (table,), num_draws=20)
    assert draws.vectorised
    torch.testing.assert_close(
        draws.log_joint, hierarchical_log_joint(draws.values, table), rtol=0, atol=1e-5
    )


def test_log_guide_includes_the_jacobian_of_constrained_sites(table):
    guide = AutoNormal(hierarchical)
    guide(table)
    draws = draw_posterior(hierarchical, guide, (table,), num_draws=20)
    values = draws.values
    locs, scales = guide.locs, guide.scales
    by_hand = (
        dist.Normal(locs.mean, scales.mean).log_prob(values["mean"])
        + dist.LogNormal(locs.scale, scales.scale).log_prob(values["scale"])
        + dist.Normal(locs.level, scales.level).log_prob(values["level"]).sum(-1)
    ).double()
    torch.testing.assert_close(draws.log_guide, by_hand, rtol=0, atol=1e-5)


def test_the_mean_weight_is_the_elbo(table):
    guide = AutoMultivariateNormal(hierarchical)
    guide(table)
    draws = draw_posterior(hierarchical, guide, (table,), num_draws=4000)
    elbo = -torch.tensor(
        [Trace_ELBO(num_particles=2000, vectorize_particles=True).loss(hierarchical, guide, table)]
    )
    error = draws.log_weights.std() * (1 / 4000 + 1 / 2000) ** 0.5
    assert (draws.log_weights.mean() - elbo).abs() < 5 * error


def test_deterministic_sites_follow_their_parents(table):
    guide = AutoNormal(hierarchical)
    guide(table)
    values = draw_posterior(hierarchical, guide, (table,), num_draws=7).values
    assert values["square"].shape == (7, 3)
    torch.testing.assert_close(values["square"], values["level"] ** 2)
    torch.testing.assert_close(values["variance"], values["scale"] ** 2)


def test_chunks_change_nothing_but_the_memory(table):
    draws = draw_posterior(conjugate, conjugate_posterior, num_draws=50, chunk_size=7, predictive=True)
    assert draws.values["mean"].shape == (50,)
    assert draws.predictive["y"].shape == draws.log_likelihood["y"].shape == (50, 5)
    torch.testing.assert_close(draws.log_weights, conjugate_evidence().expand(50), rtol=0, atol=1e-12)
    assert draws.values["mean"].unique().numel() == 50


def subsampled(y):
    with pyro.plate("record", 10, subsample_size=4) as index:
        z = pyro.sample("z", normal(0.0, 1.0))
        pyro.sample("y", normal(z, 1.0), obs=y[index])


def subsampled_posterior(y):
    with pyro.plate("record", 10, subsample_size=4) as index:
        pyro.sample("z", normal(y[index] / 2, 0.5**0.5))


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_subsampling_scales_the_weights_and_all_draws_share_one_minibatch(chunk_size):
    y = torch.linspace(-2, 2, 10, dtype=torch.float64)
    draws = draw_posterior(subsampled, subsampled_posterior, (y,), num_draws=11, chunk_size=chunk_size)
    index = draws.subsamples["record"]
    assert index.unique().numel() == 4
    minibatch = normal(0.0, 2**0.5).log_prob(y[index]).sum()
    torch.testing.assert_close(draws.log_weights, (10 / 4 * minibatch).expand(11), rtol=0, atol=1e-12)
    pointwise = normal(draws.values["z"], 1.0).log_prob(y[index])
    torch.testing.assert_close(draws.log_likelihood["y"], pointwise)  # unscaled


def test_masked_data_weigh_nothing_and_have_likelihood_zero():
    mask = torch.tensor([True, True, False, True, False])

    def masked(y=Y):
        mean = pyro.sample("mean", normal(0.0, 2.0))
        with pyro.plate("record", len(y)), poutine.mask(mask=mask):
            pyro.sample("y", normal(mean, 1.0), obs=y)

    def posterior():
        conjugate_posterior(Y[mask])

    draws = draw_posterior(masked, posterior, num_draws=9)
    torch.testing.assert_close(draws.log_weights, conjugate_evidence(Y[mask]).expand(9), rtol=0, atol=1e-12)
    assert (draws.log_likelihood["y"][:, ~mask] == 0).all()
    assert (draws.log_likelihood["y"][:, mask] < 0).all()


def test_tempering_scales_the_joint_but_not_the_pointwise_likelihood():
    def tempered():
        with poutine.scale(scale=0.25):
            conjugate()

    draws = draw_posterior(tempered, conjugate_posterior, num_draws=4)
    full = draw_posterior(conjugate, conjugate_posterior, num_draws=4)
    torch.testing.assert_close(draws.log_joint, full.log_joint / 4)
    torch.testing.assert_close(draws.log_likelihood["y"], full.log_likelihood["y"])


def test_predictive_draws_have_the_posterior_predictive_moments():
    draws = draw_posterior(conjugate, conjugate_posterior, num_draws=20_000, predictive=True)
    precision = 1 / 4 + 5
    mean, variance = Y.sum() / precision, 1 + 1 / precision
    replica = draws.predictive["y"]
    assert ((replica.mean(0) - mean).abs() < 5 * (variance / 20_000) ** 0.5).all()
    assert ((replica.var(0) - variance).abs() < 5 * variance * (2 / 20_000) ** 0.5).all()
    assert abs(torch.corrcoef(replica.T)[0, 1] - 1 / precision / variance) < 5 / 20_000**0.5


def test_predictive_draws_of_an_autoregression_run_on_their_own_past():
    y = torch.tensor([10.0, 10.0, 10.0])

    def model():
        rate = pyro.sample("rate", dist.Normal(0.5, 0.01))
        last = torch.zeros(())
        for i in range(3):
            last = pyro.sample(f"y{i}", dist.Normal(rate * last, 0.1), obs=y[i])

    def guide():
        pyro.sample("rate", dist.Normal(0.5, 0.01))

    draws = draw_posterior(model, guide, num_draws=200, predictive=True)
    assert draws.predictive["y2"].abs().max() < 2  # given the data's past it would be near 5


def raises_on_batches(y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=y.dtype), 1.0).to_event(1))
    first, second = w
    pyro.sample("y", dist.Normal(first * second, 1.0), obs=y)


def couples_batches(y):
    w = pyro.sample("w", dist.Normal(torch.zeros(2, dtype=y.dtype), 1.0).to_event(1))
    pyro.sample("y", dist.Normal(w.sum(), 1.0), obs=y)


@pytest.mark.parametrize(
    ("model", "mean"), [(raises_on_batches, lambda w: w.prod(-1)), (couples_batches, lambda w: w.sum(-1))]
)
def test_models_that_only_run_on_one_draw_are_run_on_one(model, mean):
    def guide(y):
        pyro.sample("w", dist.Normal(torch.ones(2, dtype=y.dtype), 0.5).to_event(1))

    y = torch.tensor(0.4, dtype=torch.float64)
    with pytest.warns(StochdynWarning, match=r"once per draw.*pyro\.plate"):
        draws = draw_posterior(model, guide, (y,), num_draws=12, predictive=True)
    assert not draws.vectorised
    w = draws.values["w"]
    by_hand = normal(0.0, 1.0).log_prob(w).sum(-1) + normal(mean(w), 1.0).log_prob(y)
    torch.testing.assert_close(draws.log_joint, by_hand)
    assert draws.predictive["y"].unique().numel() == 12


def test_batch_axes_that_no_plate_declares_are_still_told_from_draws():
    def model():
        z = pyro.sample("z", normal(torch.zeros(3), 1.0))
        pyro.sample("y", normal(z, 1.0), obs=torch.ones(3, dtype=torch.float64))

    def guide():
        pyro.sample("z", normal(torch.full((3,), 0.5), 0.5**0.5))

    evidence = 3 * normal(0.0, 2**0.5).log_prob(torch.ones(()))
    draws = draw_posterior(model, guide, num_draws=3)  # as many draws as axes hold
    torch.testing.assert_close(draws.log_weights, evidence.expand(3).double(), rtol=0, atol=1e-6)


def test_the_seed_decides_and_the_global_state_is_left_alone():
    before = torch.random.get_rng_state()
    first = draw_posterior(conjugate, conjugate_posterior, num_draws=5, seed=1).values["mean"]
    assert torch.equal(torch.random.get_rng_state(), before)
    again = draw_posterior(conjugate, conjugate_posterior, num_draws=5, seed=1).values["mean"]
    other = draw_posterior(conjugate, conjugate_posterior, num_draws=5, seed=2).values["mean"]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_without_a_seed_draws_come_from_the_global_state():
    with seeded(5):
        first = draw_posterior(conjugate, conjugate_posterior, num_draws=5, seed=None).values["mean"]
        second = draw_posterior(conjugate, conjugate_posterior, num_draws=5, seed=None).values["mean"]
    assert not torch.equal(first, second)


def test_no_gradient_is_kept(table):
    guide = AutoNormal(hierarchical)
    guide(table)
    draws = draw_posterior(hierarchical, guide, (table,), num_draws=3)
    assert not draws.log_joint.requires_grad
    assert not draws.values["mean"].requires_grad


@pytest.mark.parametrize(
    "make",
    [
        AutoDelta,
        lambda model: _listed(model, AutoDelta(poutine.block(model, expose=["scale"]))),
    ],
    ids=["AutoDelta", "AutoDelta of one site"],
)
def test_a_point_mass_has_no_weights(make, table):
    guide = make(hierarchical)
    guide(table)
    draws = draw_posterior(hierarchical, guide, (table,), num_draws=6)
    assert draws.log_weights.isnan().all()
    assert draws.log_joint.isfinite().all()


def _listed(model, delta):
    guide = AutoGuideList(model)
    guide.append(delta)
    guide.append(AutoNormal(poutine.block(model, hide=["scale"])))
    return guide


def test_evaluated_draws_have_the_same_densities_as_drawn_ones(table):
    guide = AutoNormal(hierarchical)
    guide(table)
    drawn = draw_posterior(hierarchical, guide, (table,), num_draws=10)
    latent = {name: drawn.values[name] for name in ("mean", "scale", "level")}
    evaluated = evaluate_draws(hierarchical, latent, (table,), chunk_size=4)
    torch.testing.assert_close(evaluated.log_joint, drawn.log_joint)
    torch.testing.assert_close(evaluated.values["square"], drawn.values["square"])
    torch.testing.assert_close(evaluated.log_likelihood["y"], drawn.log_likelihood["y"])
    assert evaluated.log_guide is None
    assert evaluated.log_weights.isnan().all()


def test_draws_of_mcmc_have_the_density_that_the_kernel_moved_in(table):
    mcmc = MCMC(NUTS(conjugate), num_samples=10, warmup_steps=10, disable_progbar=True)
    mcmc.run()
    samples = mcmc.get_samples()
    draws = evaluate_draws(conjugate, samples)
    potential = torch.stack([mcmc.kernel.potential_fn({"mean": m}) for m in samples["mean"]])
    torch.testing.assert_close(draws.log_joint, -potential.detach())


def test_a_trained_guide_reaches_the_evidence():
    guide = AutoNormal(conjugate)
    svi = SVI(
        conjugate,
        guide,
        pyro.optim.ClippedAdam({"lr": 0.05, "lrd": 0.99}),
        Trace_ELBO(num_particles=4, vectorize_particles=True),
    )
    for _ in range(300):
        svi.step()
    draws = draw_posterior(conjugate, guide, num_draws=2000)
    assert draws.log_weights.mean() <= conjugate_evidence() + 5 * draws.log_weights.std() / 2000**0.5
    assert abs(draws.log_weights.logsumexp(0) - torch.tensor(2000.0).log() - conjugate_evidence()) < 0.02


def empty_guide(*args):
    pass


def foreign_guide(y=Y):
    conjugate_posterior(y)
    pyro.sample("extra", normal(0.0, 1.0))


def test_a_guide_without_a_site_of_the_model_is_named():
    with pytest.raises(UnknownSiteError, match=r"the guide lacks sites.*expected mean"):
        draw_posterior(conjugate, empty_guide)


def test_a_guide_with_a_site_that_the_model_lacks_is_named():
    with pytest.raises(UnknownSiteError, match=r"the guide has sites that the model lacks; got extra"):
        draw_posterior(conjugate, foreign_guide)


def test_helper_sites_of_a_guide_count_in_its_density():
    def guide(y=Y):
        pyro.sample("helper", normal(0.0, 1.0), infer={"is_auxiliary": True})
        conjugate_posterior(y)

    draws = draw_posterior(conjugate, guide, num_draws=30)
    assert (draws.log_weights > conjugate_evidence() + 0.9).all()  # minus a standard normal's log density


def test_draws_of_other_sites_or_shapes_are_named():
    with pytest.raises(UnknownSiteError, match="the set of draws lacks sites"):
        evaluate_draws(conjugate, {"slope": torch.zeros(3)})
    with pytest.raises(ShapeError, match=r"draw of 'mean' has the wrong shape; got \(2,\); expected \(\)"):
        evaluate_draws(conjugate, {"mean": torch.zeros(3, 2, dtype=torch.float64)})


@pytest.mark.parametrize("number", [0, -1, 2.5, True])
def test_the_number_of_draws_is_a_positive_integer(number):
    with pytest.raises(InvalidInputError, match="num_draws"):
        draw_posterior(conjugate, conjugate_posterior, num_draws=number)


def test_a_failing_model_fails_with_its_own_error():
    def broken():
        pyro.sample("mean", normal(0.0, 1.0))
        raise KeyError("my own")

    with pytest.raises(KeyError, match="my own"):
        draw_posterior(broken, conjugate_posterior)


def test_nothing_warns_on_the_fast_way(table):
    guide = AutoNormal(hierarchical)
    guide(table)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert draw_posterior(hierarchical, guide, (table,), num_draws=3, predictive=True).vectorised


def test_draws_are_shown_by_their_shapes():
    def model(y):
        rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(rate, 1.0), obs=y)

    def guide(y):
        pyro.sample("rate", dist.Normal(0.0, 1.0))

    assert (
        repr(draw_posterior(model, guide, (torch.tensor(1.0),), num_draws=7))
        == "PosteriorDraws(7 draws of rate ())"
    )


def test_a_draw_that_is_no_number_says_nothing_of_the_others():
    """As a path of the prior that exploded: all draws used to be made one by one then."""

    def model():
        z = pyro.sample("z", normal(0.0, 1.0))
        pyro.deterministic("x", torch.where(z > 1, z.new_tensor(torch.nan), z))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draws = draw_posterior(model, poutine.block(model, expose=["z"]), num_draws=200)
    assert torch.equal(draws.values["x"].isnan(), draws.values["z"] > 1)
