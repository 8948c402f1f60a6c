"""Calibration passes exact inference, and finds out inference that is wrong in a known way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import NUTS
from pyro.infer.autoguide import AutoNormal
from torch import Tensor

import stochdyn as sd
import stochdyn.run.progress as progress_module
from stochdyn.diagnostics import MCMCSampler, SBCResult, VariationalSampler, sbc
from stochdyn.diagnostics.samplers import as_sampler
from stochdyn.errors import (
    ForeignCheckpointError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    UnknownSiteError,
)
from stochdyn.infer import DiffusionPath

Y = torch.zeros(2, 3)


def model(y):
    with pyro.plate("group", 3, dim=-1):
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        with pyro.plate("record", 2, dim=-2):
            pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def data_of(conditioned, *args):
    return poutine.trace(conditioned).get_trace(*args).nodes["y"]["value"]


def sampler(shift=0.0, stretch=1.0, ignore_data=False):
    def infer(conditioned, args, kwargs, num_draws):
        y = data_of(conditioned, *args)
        precision = 1 / 4 + 2
        centre, scale = y.sum(0) / precision, precision**-0.5
        if ignore_data:
            centre, scale = torch.zeros(3), 2.0
        return {"mean": centre + shift + stretch * scale * torch.randn(num_draws, 3)}

    return infer


def test_exact_inference_passes():
    result = sbc(model, sampler(), (Y,), num_simulations=300)
    assert set(result.ranks) == {"mean[0]", "mean[1]", "mean[2]"}
    assert result.pvalue() > 1e-3
    assert sum(test.inside for test in result.uniformity(0.999).values()) == 3
    for table in result.coverage().values():
        assert (abs(table.observed - table.nominal) < 4 * table.stderr).all()
        assert (table.lower <= table.observed).all()
        assert (table.observed <= table.upper).all()


@pytest.mark.parametrize(
    ("infer", "covered"),
    [
        (sampler(stretch=0.6), lambda observed, nominal: observed < nominal - 0.1),
        (sampler(stretch=1.7), lambda observed, nominal: observed > nominal + 0.1),
        (sampler(shift=0.6), lambda observed, nominal: observed < nominal - 0.05),
    ],
    ids=["too narrow", "too wide", "biased"],
)
def test_wrong_inference_fails_in_its_own_way(infer, covered):
    result = sbc(model, infer, (Y,), num_simulations=300)
    assert result.pvalue() < 1e-6
    for test in result.uniformity().values():
        assert not test.inside
    for table in result.coverage(levels=(0.7,)).values():
        assert covered(table.observed[0], table.nominal[0])


def test_a_posterior_that_ignores_the_data_is_seen_by_the_joint_density_only():
    result = sbc(model, sampler(ignore_data=True), (Y,), num_simulations=120, log_joint=True)
    tests = result.uniformity(0.999)
    assert all(tests[f"mean[{i}]"].inside for i in range(3))
    assert not tests["log joint"].inside
    exact = sbc(model, sampler(), (Y,), num_simulations=120, log_joint=True)
    assert exact.uniformity(0.999)["log joint"].inside


def test_ranks_count_the_draws_below_the_truth():
    seen = []

    def infer(conditioned, args, kwargs, num_draws):
        return {"mean": torch.arange(num_draws).float()[:, None].expand(num_draws, 3) / 10 - 5}

    def record(values):
        if values["mean"].shape[0] == 1:
            seen.append(values["mean"][0].clone())
        return values["mean"]

    result = sbc(
        model, infer, (Y,), num_simulations=5, num_draws=101, parameters=[], test_functions={"m": record}
    )
    below = torch.arange(101) / 10 - 5
    expected = [int((below < truth[1]).sum()) for truth in seen]
    assert result.ranks["m[1]"].tolist() == expected


def test_ties_are_broken_evenly():
    def coin(y):
        pyro.sample("side", dist.Bernoulli(0.5))
        pyro.sample("y", dist.Normal(torch.zeros(()), 1.0), obs=y)

    def infer(conditioned, args, kwargs, num_draws):
        return {"side": torch.randint(0, 2, (num_draws,)).float()}

    result = sbc(coin, infer, (torch.zeros(()),), num_simulations=400, num_draws=19)
    assert result.pvalue() > 1e-3


def test_nuts_is_calibrated():
    def scale_model(y):
        scale = pyro.sample("scale", dist.LogNormal(0.0, 0.5))
        with pyro.plate("record", 4):
            pyro.sample("y", dist.Normal(torch.zeros(()), scale), obs=y)

    nuts = MCMCSampler(NUTS, warmup=30, thinning=2, options={"jit_compile": False})
    result = sbc(scale_model, nuts, (torch.zeros(4),), num_simulations=15, num_draws=9)
    assert result.pvalue() > 1e-3
    assert result.uniformity(0.999)["scale"].inside


def test_mean_field_is_found_too_narrow_where_parameters_are_correlated():
    def sum_model(y):
        left = pyro.sample("left", dist.Normal(0.0, 1.0))
        right = pyro.sample("right", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(left + right, 0.1), obs=y)

    guide = VariationalSampler(AutoNormal, steps=80, lr=0.2)
    result = sbc(
        sum_model,
        guide,
        (torch.zeros(()),),
        num_simulations=8,
        num_draws=99,
        test_functions={"difference": lambda values: values["left"] - values["right"]},
    )
    # the truth left - right has variance 2, mean field gives it 2 / (1 + 1 / 0.01): 80 % of the ranks are
    # extreme, and 2 or fewer of 8 come with probability 1e-3
    assert np.isin(result.ranks["difference"], (0, 99)).sum() > 2


def test_classes_of_kernels_and_guides_are_taken_too():
    assert as_sampler(NUTS) == MCMCSampler(NUTS)
    assert as_sampler(AutoNormal) == VariationalSampler(AutoNormal)
    infer = sampler()
    assert as_sampler(infer) is infer


def test_the_variational_sampler_leaves_the_parameter_store_alone():
    pyro.param("mine", torch.ones(2))
    VariationalSampler(steps=3)(model, (Y,), {}, 5)
    assert list(pyro.get_param_store().keys()) == ["mine"]


def test_mcmc_keeps_one_draw_of_so_many():
    draws = MCMCSampler(NUTS, warmup=5, thinning=4)(model, (Y,), {}, 6)
    assert draws["mean"].shape == (6, 3)


# ------------------------------------------------------------------------------------------------ data, paths


def test_data_that_a_guide_reads_from_its_arguments_are_handed_over():
    def infer(conditioned, args, kwargs, num_draws):
        assert torch.equal(args[0], data_of(conditioned, *args))
        return sampler()(conditioned, args, kwargs, num_draws)

    sbc(model, infer, (Y,), num_simulations=3, data_args=lambda data: (data["y"],))
    with pytest.raises(AssertionError):
        sbc(model, infer, (Y,), num_simulations=3)


def test_data_sites_of_a_generative_model_are_named():
    def generative():
        mean = pyro.sample("mean", dist.Normal(0.0, 2.0))
        return pyro.sample("y", dist.Normal(mean, 1.0))

    def infer(conditioned, args, kwargs, num_draws):
        return {"mean": data_of(conditioned) * 0.8 + 0.8**0.5 * torch.randn(num_draws)}

    result = sbc(generative, infer, num_simulations=200, observed=["y"])
    assert list(result.ranks) == ["mean"]
    assert result.pvalue() > 1e-3
    with pytest.raises(UnknownSiteError, match=r"observes nothing.*observed="):
        sbc(generative, infer)


TS = torch.linspace(0.0, 1.0, 5)
SDE = sd.SDE(lambda t, x: -x, 1.0)


def test_a_path_is_ranked_by_its_end_and_its_mean():
    def path_model(y):
        x = pyro.sample("x", DiffusionPath(SDE, torch.zeros(2), TS))
        pyro.sample("y", dist.Normal(x[..., -1, :], 0.5).to_event(1), obs=y)

    def infer(conditioned, args, kwargs, num_draws):
        # importance resampling from the prior, exact in the limit
        y = data_of(conditioned, *args)
        x = DiffusionPath(SDE, torch.zeros(2), TS).sample((4000,))
        weight = dist.Normal(x[:, -1], 0.5).log_prob(y).sum(-1).softmax(0)
        return {"x": x[torch.multinomial(weight, num_draws)]}

    result = sbc(path_model, infer, (torch.zeros(2),), num_simulations=150, num_draws=39)
    assert set(result.ranks) == {"x(T)[0]", "x(T)[1]", "mean x[0]", "mean x[1]"}
    assert result.pvalue() > 1e-3


def test_a_path_that_noise_drives_is_ranked_and_not_its_increments():
    from stochdyn.infer import sample_path

    def driven(y):
        x = sample_path("x", SDE, torch.zeros(1), TS, noise_space=True)
        pyro.sample("y", dist.Normal(x[..., -1, 0], 0.5), obs=y)

    def infer(conditioned, args, kwargs, num_draws):
        return {"x_dw": 0.5 * torch.randn(num_draws, 4, 1)}  # the prior: right for ranks of the path alone

    result = sbc(driven, infer, (torch.zeros(()),), num_simulations=200, num_draws=39)
    assert set(result.ranks) == {"x(T)[0]", "mean x[0]"}
    assert result.pvalue() > 1e-3


@pytest.mark.slow
def test_nuts_is_calibrated_for_a_latent_ornstein_uhlenbeck_process():
    ts = torch.linspace(0.0, 3.0, 7)

    def latent(y):
        rate = pyro.sample("rate", dist.LogNormal(0.0, 0.4))
        start = dist.Normal(torch.zeros(1), 0.5).to_event(1)
        x = pyro.sample("x", DiffusionPath(sd.SDE(lambda t, x: -rate[..., None] * x, 0.7), start, ts))
        pyro.sample("y", dist.Normal(x[..., ::2, 0], 0.2).to_event(1), obs=y)

    nuts = MCMCSampler(NUTS, warmup=60, thinning=3)
    result = sbc(latent, nuts, (torch.zeros(4),), num_simulations=40, num_draws=19, log_joint=True)
    assert set(result.ranks) == {"rate", "x(T)[0]", "mean x[0]", "log joint"}
    assert result.pvalue() > 1e-3
    assert all(test.inside for test in result.uniformity(0.9999).values())


# ------------------------------------------------------------------------------------------------ contract


def test_the_seed_decides_and_the_global_state_is_left_alone():
    before = torch.random.get_rng_state()
    first = sbc(model, sampler(), (Y,), num_simulations=5, seed=3).ranks["mean[0]"]
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sbc(model, sampler(), (Y,), num_simulations=5, seed=3).ranks["mean[0]"].tolist() == first.tolist()
    assert sbc(model, sampler(), (Y,), num_simulations=5, seed=4).ranks["mean[0]"].tolist() != first.tolist()


def test_coverage_is_exact_in_what_ranks_resolve():
    result = SBCResult({"a": np.arange(100)}, num_draws=99)
    table = result.coverage(levels=(0.5, 0.8, 0.9))["a"]
    assert table.nominal.tolist() == [0.5, 0.8, 0.9]
    assert table.observed.tolist() == [0.5, 0.8, 0.9]
    coarse = SBCResult({"a": np.arange(10)}, num_draws=9).coverage(levels=(0.85,))["a"]
    assert coarse.nominal.tolist() == [0.8]
    np.testing.assert_allclose(coarse.stderr, np.sqrt(0.8 * 0.2 / 10))


def test_a_bar_is_shown_when_it_takes_long(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "DELAY", 0.0)
    sbc(model, sampler(), (Y,), num_simulations=2)
    assert "sbc" in capsys.readouterr().err
    sbc(model, sampler(), (Y,), num_simulations=2, progress=False)
    assert capsys.readouterr().err == ""


def test_what_infer_returns_is_checked():
    def short(conditioned, args, kwargs, num_draws):
        return {"mean": torch.zeros(num_draws - 1, 3)}

    def poisoned(conditioned, args, kwargs, num_draws):
        return {"mean": torch.full((num_draws, 3), torch.nan)}

    with pytest.raises(ShapeError, match="another number of draws of 'mean'"):
        sbc(model, short, (Y,), num_simulations=1)
    with pytest.raises(NonFiniteError, match="NaN among the draws of 'mean'"):
        sbc(model, poisoned, (Y,), num_simulations=1)
    with pytest.raises(ShapeError, match="quantity 'f' must keep the axis"):
        sbc(model, sampler(), (Y,), num_simulations=1, test_functions={"f": lambda v: v["mean"].mean()})


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_simulations": 0}, InvalidInputError, "num_simulations"),
        ({"num_draws": 0}, InvalidInputError, "num_draws"),
        ({"observed": ["z"]}, UnknownSiteError, "no such data site; got z"),
        ({"parameters": ["slope"]}, UnknownSiteError, "no such site; got slope"),
        ({"infer": 3}, InvalidInputError, "infer can't be called"),
    ],
)
def test_bad_input_is_named(options, error, message):
    with pytest.raises(error, match=message):
        sbc(**{"model": model, "infer": sampler(), "args": (Y,), **options})


def test_levels_lie_inside_the_unit_interval():
    with pytest.raises(InvalidInputError, match="levels"):
        SBCResult({"a": np.arange(10)}, 9).coverage(levels=(1.0,))


def test_simulations_go_on_where_they_stopped(tmp_path: Path) -> None:
    """More simulations from a checkpoint give the ranks of one long run; another model's checkpoint is refused."""

    def model(y: Tensor) -> None:
        rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        pyro.sample("y", dist.Normal(rate, 1.0), obs=y)

    def exact(model: Any, args: Any, kwargs: Any, num_draws: int) -> dict[str, Tensor]:
        y = pyro.poutine.trace(model).get_trace(*args).nodes["y"]["value"]
        return {"rate": y / 2 + 0.5**0.5 * torch.randn(num_draws)}

    y = torch.tensor(0.0)
    whole = sbc(model, exact, (y,), num_simulations=20, progress=False)
    sbc(model, exact, (y,), num_simulations=7, progress=False, checkpoint=tmp_path)
    again = sbc(model, exact, (y,), num_simulations=20, progress=False, checkpoint=tmp_path, resume=True)
    assert (again.ranks["rate"] == whole.ranks["rate"]).all()
    with pytest.raises(ForeignCheckpointError, match="num_draws"):
        sbc(model, exact, (y,), num_draws=9, checkpoint=tmp_path, resume=True, progress=False)
