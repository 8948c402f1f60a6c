"""A fitted model becomes a container whose numbers, axes and coordinates are the model's."""

from __future__ import annotations

import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import AutoDelta, AutoNormal

import stochdyn as sd
from stochdyn.diagnostics import draw_posterior, to_inference_data
from stochdyn.errors import InvalidInputError, ShapeError, UnknownSiteError
from stochdyn.infer import DiffusionPath, NoiseReparam, sample_path

Y = torch.linspace(-1, 1, 12).reshape(4, 3)


def model(y, scale):
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.deterministic("double", 2 * mean)
    with pyro.plate("group", 3, dim=-1):
        level = pyro.sample("level", dist.Normal(mean, 1.0))
        with pyro.plate("record", 4, dim=-2):
            pyro.sample("y", dist.Normal(level, scale), obs=y)
    pyro.factor("soft", -(mean**2))


@pytest.fixture
def guide():
    guide = AutoNormal(model)
    guide(Y, torch.tensor(0.5))
    return guide


@pytest.fixture
def idata(guide):
    return to_inference_data(model, guide, (Y,), {"scale": torch.tensor(0.5)}, num_draws=60, seed=4)


def test_there_are_all_groups_with_all_variables(idata):
    found = {
        group: set(idata[group].data_vars)
        for group in (
            "posterior",
            "posterior_predictive",
            "log_likelihood",
            "observed_data",
            "constant_data",
            "sample_stats",
        )
    }
    assert found == {
        "posterior": {"mean", "double", "level"},
        "posterior_predictive": {"y"},
        "log_likelihood": {"y"},
        "observed_data": {"y"},
        "constant_data": {"scale"},
        "sample_stats": {"lp", "log_q", "log_weight"},
    }


def test_axes_are_named_by_their_plates(idata):
    assert idata["posterior"]["level"].dims == ("chain", "draw", "group")
    for group in ("posterior_predictive", "log_likelihood"):
        assert idata[group]["y"].dims == ("chain", "draw", "record", "group")
        assert idata[group]["y"].shape == (1, 60, 4, 3)
    np.testing.assert_array_equal(idata["observed_data"]["y"].values, Y.numpy())


def test_the_numbers_are_those_of_the_draws(idata, guide):
    draws = draw_posterior(model, guide, (Y, torch.tensor(0.5)), num_draws=60, seed=4, predictive=True)
    posterior, stats = idata["posterior"], idata["sample_stats"]
    np.testing.assert_array_equal(posterior["level"].values[0], draws.values["level"].numpy())
    np.testing.assert_array_equal(stats["lp"].values[0], draws.log_joint.numpy())
    np.testing.assert_array_equal(stats["log_q"].values[0], draws.log_guide.numpy())
    np.testing.assert_allclose(stats["log_weight"].values, (stats["lp"] - stats["log_q"]).values)
    np.testing.assert_array_equal(posterior["double"].values, 2 * posterior["mean"].values)
    by_hand = dist.Normal(draws.values["level"][:, None], 0.5).log_prob(Y).numpy()
    np.testing.assert_allclose(idata["log_likelihood"]["y"].values[0], by_hand, rtol=1e-5)


def test_attributes_say_what_made_it(idata):
    attrs = idata["posterior"].attrs
    assert attrs["inference_library"] == "stochdyn"
    assert attrs["inference_library_version"] == sd.__version__
    assert (attrs["estimator"], attrs["seed"]) == ("AutoNormal", 4)


def test_the_same_seed_gives_the_same_bits(guide, idata):
    args = (Y, torch.tensor(0.5))
    again = to_inference_data(model, guide, args, num_draws=60, seed=4)
    other = to_inference_data(model, guide, args, num_draws=60, seed=5)
    for group, name in (("posterior", "level"), ("posterior_predictive", "y")):
        np.testing.assert_array_equal(again[group][name].values, idata[group][name].values)
        assert not np.array_equal(other[group][name].values, idata[group][name].values)


def test_names_and_coordinates_can_be_replaced(guide):
    idata = to_inference_data(
        model,
        guide,
        (Y, torch.tensor(0.5)),
        num_draws=10,
        coords={"school": ["a", "b", "c"]},
        dims={"level": ["school"]},
    )
    assert idata["posterior"]["level"].dims[-1] == "school"
    assert idata["posterior"]["school"].values.tolist() == ["a", "b", "c"]
    assert idata["log_likelihood"]["y"].dims[-1] == "group"


def test_arviz_summarises_compares_and_plots_it(idata, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import arviz

        summary = arviz.summary(idata)
        loo = arviz.loo(idata)
        axes = arviz.plot_trace(idata, var_names=["mean"])
    assert "level[0]" in summary.index
    assert loo.n_data_points == 12
    assert axes is not None


def test_predictive_draws_can_be_left_out(guide):
    idata = to_inference_data(model, guide, (Y, torch.tensor(0.5)), num_draws=10, predictive=False)
    assert "posterior_predictive" not in str(list(idata.groups() if callable(idata.groups) else idata.groups))


def test_a_point_estimate_has_no_weights():
    guide = AutoDelta(model)
    args = (Y, torch.tensor(0.5))
    guide(*args)
    stats = to_inference_data(model, guide, args, num_draws=5)["sample_stats"]
    assert np.isnan(stats["log_weight"].values).all()
    assert np.isfinite(stats["lp"].values).all()


def test_a_vector_of_records_can_be_split_for_leaving_one_out():
    mask = torch.tensor(True)

    def vector(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(mean[..., None], 1.0).expand((*mean.shape, 5)).to_event(1), obs=y)

    y = torch.linspace(-1, 1, 5)
    guide = AutoNormal(vector)
    guide(y)
    whole = to_inference_data(vector, guide, (y,), num_draws=7)["log_likelihood"]["y"]
    split = to_inference_data(vector, guide, (y,), num_draws=7, split_events=True)
    assert whole.dims == ("chain", "draw")
    assert split["log_likelihood"]["y"].shape == (1, 7, 5)
    assert split["log_likelihood"]["y"].dims[-1] == split["observed_data"]["y"].dims[-1]
    np.testing.assert_allclose(split["log_likelihood"]["y"].sum("y_dim_0"), whole, rtol=1e-5)
    by_hand = dist.Normal(torch.as_tensor(split["posterior"]["mean"].values)[..., None], 1.0).log_prob(y)
    np.testing.assert_allclose(split["log_likelihood"]["y"].values, by_hand.numpy(), rtol=1e-5)


def test_chains_of_mcmc_stay_chains():
    def plain(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        pyro.deterministic("double", 2 * mean)
        with pyro.plate("record", len(y)):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    y = torch.tensor([0.2, 0.4])
    mcmc = MCMC(NUTS(plain), num_samples=30, warmup_steps=20, disable_progbar=True)
    mcmc.run(y)
    second = MCMC(NUTS(plain), num_samples=30, warmup_steps=20, disable_progbar=True)
    second.run(y)
    # as a run of two chains leaves them, without two processes
    mcmc._samples = {"mean": torch.cat([mcmc._samples["mean"], second._samples["mean"]])}
    mcmc._diagnostics = [{"divergences": [3]}, {"divergences": [0, 29]}]
    mcmc.num_chains = 2
    idata = to_inference_data(plain, mcmc, (y,))
    np.testing.assert_array_equal(idata["posterior"]["mean"].values, mcmc._samples["mean"].numpy())
    np.testing.assert_array_equal(idata["posterior"]["double"].values, 2 * mcmc._samples["mean"].numpy())
    diverging = idata["sample_stats"]["diverging"].values
    assert [np.flatnonzero(row).tolist() for row in diverging] == [[3], [0, 29]]
    assert "log_weight" not in idata["sample_stats"]
    assert idata["posterior"].attrs["estimator"] == "NUTS"
    mean = mcmc._samples["mean"][1, 7]
    lp = dist.Normal(0.0, 1.0).log_prob(mean) + dist.Normal(mean, 1.0).log_prob(y).sum()
    assert idata["sample_stats"]["lp"].values[1, 7] == pytest.approx(lp.item(), rel=1e-5)


def test_an_mcmc_that_has_not_run_is_named():
    with pytest.raises(InvalidInputError, match=r"no draws.*mcmc\.run"):
        to_inference_data(model, MCMC(NUTS(model), num_samples=3, warmup_steps=3))


def test_a_minibatch_is_labelled_by_its_indices():
    def local(y):
        with pyro.plate("record", 8, subsample_size=3) as index:
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y[index])

    def posterior(y):
        with pyro.plate("record", 8, subsample_size=3) as index:
            pyro.sample("z", dist.Normal(y[index] / 2, 0.5**0.5))

    y = torch.arange(8.0)
    idata = to_inference_data(local, posterior, (y,), num_draws=5)
    index = idata["constant_data"]["record_index"].values
    assert len(set(index)) == 3
    np.testing.assert_array_equal(idata["posterior"]["record"].values, index)
    np.testing.assert_array_equal(idata["observed_data"]["y"].values, index.astype(float))
    np.testing.assert_array_equal(idata["constant_data"]["y_argument"].values, y.numpy())  # what was given


def test_arguments_without_a_name_are_numbered_and_sequences_taken_apart():
    def anonymous(*args):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    args = (torch.ones(2), "text", [torch.zeros(1), torch.zeros(3)])
    idata = to_inference_data(anonymous, anonymous, args, num_draws=3)
    sizes = {name: value.shape for name, value in idata["constant_data"].data_vars.items()}
    assert sizes == {"args_0": (2,), "args_2_0": (1,), "args_2_1": (3,)}


def test_a_guide_without_a_site_is_named():
    with pytest.raises(UnknownSiteError, match="level, mean"):
        to_inference_data(model, lambda y, scale: None, (Y, torch.tensor(0.5)))


def test_a_coordinate_that_does_not_fit_is_named(guide):
    with pytest.raises(ShapeError, match=r"coords\['group'\]"):
        to_inference_data(model, guide, (Y, torch.tensor(0.5)), num_draws=3, coords={"group": [1]})


# ------------------------------------------------------------------------------------------------ paths

TS = torch.linspace(0.0, 2.0, 6)


def path_model(y):
    rate = pyro.sample("rate", dist.LogNormal(0.0, 0.3))
    sde = sd.SDE(lambda t, x: -rate[..., None] * x, 0.5)
    with pyro.plate("series", 2):
        x = pyro.sample("x", DiffusionPath(sde, torch.zeros(1), TS))
        pyro.sample("y", dist.Normal(x[..., -1, 0], 0.1), obs=y)


def path_guide(y):
    pyro.sample("rate", dist.LogNormal(0.0, 0.3))
    sde = sd.SDE(lambda t, x: -x, 0.5)
    with pyro.plate("series", 2):
        pyro.sample("x", DiffusionPath(sde, torch.zeros(1), TS))


def test_a_path_lies_on_its_grid():
    y = torch.tensor([0.1, -0.2])
    idata = to_inference_data(path_model, path_guide, (y,), num_draws=8)
    posterior = idata["posterior"]
    assert posterior["x"].dims == ("chain", "draw", "series", "x_time", "x_dim")
    np.testing.assert_array_equal(posterior["x_time"].values, TS.numpy())
    np.testing.assert_array_equal(idata["constant_data"]["x_ts"].values, TS.numpy())
    assert idata["constant_data"]["x_ts"].dims == ("x_time",)
    at_one = posterior["x"].sel(x_time=1.2, method="nearest")
    np.testing.assert_array_equal(at_one.values, posterior["x"].values[..., 3, :])


def test_weights_of_a_path_are_those_of_girsanov():
    y = torch.tensor([0.1, -0.2])
    draws = draw_posterior(path_model, path_guide, (y,), num_draws=8)
    assert draws.vectorised
    x, rate = draws.values["x"].double(), draws.values["rate"].double()
    dt = 0.4
    start, step = x[..., :-1, 0], x[..., 1:, 0] - x[..., :-1, 0]
    model_rate = rate[:, None, None]
    ratio = ((step + start * dt) ** 2 - (step + model_rate * start * dt) ** 2) / (2 * 0.25 * dt)
    likelihood = dist.Normal(x[..., -1, 0], 0.1).log_prob(y)
    expected = ratio.sum((-1, -2)) + likelihood.sum(-1)
    torch.testing.assert_close(draws.log_weights, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("how", ["increments", "reparametrised"])
def test_a_path_that_noise_drives_lies_on_its_grid_too(how):
    sde = sd.SDE(lambda t, x: -x, 0.5)

    def driven():
        if how == "increments":
            x = sample_path("x", sde, torch.zeros(1), TS, noise_space=True)
        else:
            x = pyro.sample("x", DiffusionPath(sde, torch.zeros(1), TS))
        pyro.sample("y", dist.Normal(x[..., -1, 0], 0.1), obs=torch.tensor(0.3))

    if how == "reparametrised":
        driven = poutine.reparam(driven, {"x": NoiseReparam()})
    guide = AutoNormal(driven)
    guide()
    idata = to_inference_data(driven, guide, num_draws=8)
    posterior = idata["posterior"]
    assert posterior["x"].dims == ("chain", "draw", "x_time", "x_dim")
    assert posterior["x_dw"].dims == ("chain", "draw", "x_dw_time", "x_dw_dim")
    np.testing.assert_array_equal(posterior["x_time"].values, TS.numpy())
    np.testing.assert_array_equal(posterior["x_dw_time"].values, TS[:-1].numpy())
    x, dw = posterior["x"].values, posterior["x_dw"].values
    np.testing.assert_allclose(np.diff(x, axis=-2), -x[..., :-1, :] * 0.4 + 0.5 * dw, atol=1e-6)
    assert "x" not in idata["log_likelihood"]
    assert "x" not in idata["observed_data"]


PANEL = torch.tensor([[0.5, float("nan"), 0.1], [float("nan"), float("nan"), 0.3]])
SEEN = ~PANEL.isnan()


def masked_event(y):
    rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
    with pyro.plate("series", 2):
        base = dist.Normal(rate[..., None] + torch.zeros(2, 3), 0.3)
        pyro.sample("y", base.mask(SEEN).to_event(1), obs=y.nan_to_num())


def masked_inside(y):
    rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
    base = dist.Normal(rate[..., None] + torch.zeros(3), 0.3)
    pyro.sample("y", base.mask(SEEN[0]).to_event(1), obs=y[0].nan_to_num())


def masked_plates(y):
    rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
    with pyro.plate("record", 3, dim=-1), pyro.plate("series", 2, dim=-2), poutine.mask(mask=SEEN):
        pyro.sample("y", dist.Normal(rate, 0.3), obs=y.nan_to_num())


def masked_counts(y):
    rate = pyro.sample("rate", dist.LogNormal(0.0, 1.0))
    with pyro.plate("record", 3, dim=-1), pyro.plate("series", 2, dim=-2), poutine.mask(mask=SEEN):
        pyro.sample("y", dist.Poisson(rate), obs=(10 * y.nan_to_num()).round())


@pytest.mark.parametrize(
    ("program", "split", "count"),
    [
        (masked_event, True, 3),
        (masked_event, False, 2),
        (masked_inside, True, 2),
        (masked_inside, False, 1),
        (masked_plates, False, 3),
        (masked_counts, False, 3),
    ],
)
def test_what_is_masked_is_missing(program, split, count):
    guide = AutoNormal(program)
    guide(PANEL)
    idata = to_inference_data(program, guide, (PANEL,), num_draws=200, split_events=split)
    likelihood = idata["log_likelihood"]["y"]
    assert likelihood.isnull().sum() == 0
    assert likelihood[0, 0].size == count
    data = idata["observed_data"]["y"].values
    shape = SEEN[0] if program is masked_inside else SEEN
    np.testing.assert_array_equal(np.isnan(data), ~shape.numpy())
    if count == shape.sum():
        np.testing.assert_array_equal(likelihood["y_seen"].values, np.flatnonzero(shape.numpy()))
        value = data.flatten()[likelihood["y_seen"].values]
        rate = idata["posterior"]["rate"].values[0]
        law = dist.Poisson if program is masked_counts else lambda r: dist.Normal(r, 0.3)
        expected = law(torch.tensor(rate)[:, None]).log_prob(torch.tensor(value))
        np.testing.assert_allclose(likelihood.values[0], expected, rtol=1e-4)
    if program is not masked_inside and program is not masked_counts:
        assert "y_argument" not in idata["constant_data"] if "constant_data" in idata else True
    import arviz as az

    if count > 1:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert az.loo(idata, pointwise=True).n_data_points == count
