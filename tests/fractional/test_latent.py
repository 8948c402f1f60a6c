"""Latent SDEs: every posterior's bound is that of its weighted draws; evidence, forecasts, comparison."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import stochdyn as sd
from stochdyn.errors import HurstRangeError, InvalidInputError, ShapeError, TimeGridError
from stochdyn.fractional import (
    AffineDrift,
    ControlMethod,
    FractionalNoise,
    FractionalOU,
    GaussianDecoder,
    GaussianMethod,
    LatentSDE,
    LinearisedMethod,
    MarkovNoise,
    MatchingMethod,
    MultifractionalNoise,
    Series,
    TightMethod,
    compare_models,
    evidence,
    fbm_covariance,
    forecast,
    posterior_paths,
    predict,
)

pytestmark = pytest.mark.filterwarnings("ignore::stochdyn.errors.ApproximationWarning")
TS = torch.linspace(0, 1, 21)
KINDS = ("control", "tight", "gaussian", "linearised", "matching")


def _series(seed: int = 0, count: int = 4) -> Series:
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(count, 6, 2, generator=g)
    values[0, 2] = float("nan")
    values[1, :, 0] = float("nan")
    return Series.regular(TS[::4] + 0.007 * (TS[::4] < 0.9), values)


def _method(posterior: str, context: int = 6, num_particles: int = 2, hidden: int = 8, **options: Any) -> Any:
    """Return a posterior of small networks."""
    if posterior == "matching":
        return MatchingMethod((hidden,), context, num_particles)
    if posterior == "gaussian":
        return GaussianMethod(context, num_particles)
    if posterior == "linearised":
        return LinearisedMethod(2, num_particles)
    made = {"control": ControlMethod, "tight": TightMethod}[posterior]
    return made((hidden,), context, num_particles, **options)


def _model(posterior: Any, num_particles: int = 2, **options: Any) -> LatentSDE:
    torch.manual_seed(0)
    learnt = FractionalNoise(torch.tensor([0.3, 0.5, 0.8]), num_states=4)
    defaults: dict[str, Any] = {
        "posterior": _method(posterior, num_particles=num_particles)
        if isinstance(posterior, str)
        else posterior,
        "noise": "brownian" if posterior == "matching" else learnt,
        "drift": (8,),
        "obs_scale": 0.5,
    }
    model = LatentSDE(2, 3, TS, **(defaults | options))
    with torch.no_grad():
        for p in model.posterior.parameters():
            p.add_(0.03 * torch.randn(p.shape))
    return model


@pytest.mark.parametrize("posterior", KINDS)
def test_the_bound_is_the_mean_log_weight(posterior: str) -> None:
    """The trained divergence and the exact density ratios of draws agree."""
    model, series = _model(posterior, num_particles=50), _series()
    with torch.no_grad():
        torch.manual_seed(1)
        losses = torch.stack([model(series).loss for _ in range(30)])
        draws = posterior_paths(model, series, 1500, seed=2)
    mean = draws.log_weight.mean(1)
    error = math.hypot(float(losses.std()) / math.sqrt(30), float(mean.std()) / math.sqrt(1500))
    # the matched law is that of continuous time, the draws are on a grid of 20 steps
    slack = 0.05 * abs(float(mean.mean())) if posterior == "matching" else 0.0
    assert error < 0.05 * abs(float(mean.mean()))
    assert abs(float(losses.mean() + mean.mean())) < 4.5 * error + slack


@pytest.mark.parametrize("posterior", KINDS)
def test_every_parameter_is_trained(posterior: str) -> None:
    model = _model(posterior)
    model(_series()).loss.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("posterior", KINDS[:-1])
def test_the_increments_of_draws_drive_them_under_the_prior(posterior: str) -> None:
    noise = FractionalNoise(torch.tensor([0.3, 0.5, 0.8]), kind="I", num_states=12)
    model = _model(posterior, noise=noise)
    with torch.no_grad():
        path = posterior_paths(model, _series(), 3, seed=0).path
        dw = torch.cat([path.dw, path.aux["residual"]], -1).movedim(-2, 0)
        law = sd.DiffusionMeasure(path.x[..., 0, :], model.sde)
        again = law.drive(TS, path.x[..., 0, :], dw, path.aux["memory"][..., 0, :, :])
    torch.testing.assert_close(again.x, path.x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("posterior", ["control", "tight", "gaussian"])
def test_importance_weights_give_the_exact_evidence_of_a_linear_model(posterior: str) -> None:
    """A fixed fractional Ornstein-Uhlenbeck model with two observations, whatever the posterior's parameters."""
    torch.manual_seed(0)
    model = LatentSDE(
        1, 1, TS, noise=FractionalNoise(0.7, num_states=4), drift=AffineDrift(-torch.eye(1)), diffusion=1.0,
        decoder=lambda x: x, obs_scale=1.0, posterior=_method(posterior, num_particles=1),
    )  # fmt: skip
    with torch.no_grad():
        model.start_log_scale.fill_(-3.0)
    series = Series.regular(TS[[10, 20]], torch.tensor([[[0.5], [-0.3]]]))
    found = evidence(model, series, 20000)
    noise = model.sde.noise
    hurst = float(noise.hurst[0].detach())
    start = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), math.exp(-3.0))
    law = FractionalOU(1.0, 0.0, 1.0, hurst, initial=start, method="euler", noise=_same(noise))
    mask = torch.zeros(21, dtype=torch.bool)
    mask[[10, 20]] = True
    y = torch.zeros(21, dtype=torch.float64)
    y[[10, 20]] = torch.tensor([0.5, -0.3], dtype=torch.float64)
    exact = float(law.log_evidence(TS.double(), y, 1.0, mask=mask))
    assert float(found.stderr) < 0.03
    assert abs(float(found.log_evidence) - exact) < 4.5 * float(found.stderr)
    assert float(found.khat) < 0.7


@pytest.mark.parametrize("kind", ["I", "II"])
def test_the_linearised_posterior_of_a_linear_model_is_exact(kind: Any) -> None:
    """Its bound is the evidence of the Kalman filter without noise, its gradient that of the evidence."""
    start = torch.distributions.Normal(torch.tensor(0.1, dtype=torch.float64), 0.2)
    y = torch.full((21,), torch.nan, dtype=torch.float64)
    y[[10, 13, 20]] = torch.tensor([0.5, 0.1, -0.3], dtype=torch.float64)

    def model(hurst: float, diffusion: float) -> LatentSDE:
        made = LatentSDE(
            1, 1, TS.double(), noise=FractionalNoise(hurst, kind=kind), drift=AffineDrift(-torch.eye(1)),
            decoder=GaussianDecoder(lambda x: x, 1, 0.3, learn_obs_scale=False), posterior=LinearisedMethod(1, 500),
        ).double()  # fmt: skip
        with torch.no_grad():
            made.start_mean.fill_(0.1)
            made.start_log_scale.fill_(math.log(0.2))
            _raw(made).fill_(diffusion)
        return made

    def exact(hurst: float, diffusion: float) -> float:
        made = model(hurst, diffusion)
        noise = made.sde.noise
        strength = float(made.strength().detach())
        same = MarkovNoise(hurst, speeds=noise.speeds, horizon=noise.horizon, kind=kind)
        law = FractionalOU(1.0, 0.0, strength, hurst, initial=start, method="euler", noise=same)
        return float(law.log_evidence(TS.double(), y.nan_to_num(), 0.3, mask=~torch.isnan(y)))

    series = Series.regular(TS.double(), y[None, :, None])
    at = model(0.3, 0.4)
    draws = posterior_paths(at, series, 5, seed=0).log_weight
    torch.testing.assert_close(draws, torch.full_like(draws, exact(0.3, 0.4)), rtol=1e-6, atol=1e-6)
    wanted = [
        (exact(0.301, 0.4) - exact(0.299, 0.4)) / 0.002 * 0.3 * 0.7,  # in the logit of the index
        (exact(0.3, 0.401) - exact(0.3, 0.399)) / 0.002,
    ]
    torch.manual_seed(0)
    leaves = [at.sde.noise.hurst_logit, _raw(at)]
    found = torch.tensor(
        [[float(g) for g in torch.autograd.grad(-at(series).loss, leaves)] for _ in range(8)]
    )
    error = found.std(0) / math.sqrt(8)
    assert bool((error < 0.1).all())
    assert bool(((found.mean(0) - torch.tensor(wanted)).abs() < 5 * error + 1e-3).all())


def _raw(model: LatentSDE) -> Any:
    """Return the parameter of a constant diffusion."""
    return next(p for n, p in model.named_parameters() if n.endswith("raw"))


def _same(noise: Any) -> Any:
    return MarkovNoise(float(noise.hurst[0].detach()), speeds=noise.speeds, horizon=noise.horizon)


@pytest.mark.slow
@pytest.mark.parametrize("posterior", ["tight", "gaussian"])
def test_training_closes_the_gap_that_the_control_posterior_leaves(posterior: str) -> None:
    """Precise observations on a coarse grid: the shared variance costs nats, the free one doesn't."""
    options: dict[str, Any] = {
        "noise": FractionalNoise(0.4, learn_hurst=False, num_states=3),
        "drift": AffineDrift(-torch.eye(1)),
        "diffusion": 1.0,
        "decoder": GaussianDecoder(lambda x: x, 1, 0.05, learn_obs_scale=False),
    }
    series = Series.regular(TS[[7, 14, 20]], torch.tensor([[[0.5], [-0.3], [0.2]]]))
    bounds = {}
    for kind in ("control", posterior):
        torch.manual_seed(0)
        model = LatentSDE(1, 1, TS, posterior=_method(kind, 16, 4, 32), **options)
        for p in (model.start_mean, model.start_log_scale):
            p.requires_grad_(False)
        sd.fit(model, series, steps=1500, lr=5e-3, progress=False)
        bounds[kind] = float(evidence(model, series, 2000).elbo)
    assert bounds[posterior] > bounds["control"] + 1.0


def test_heun_corrects_the_noise_of_a_diffusion_that_depends_on_the_state() -> None:
    model = _model(_method("tight", method="heun"), diffusion="state")
    assert bool(torch.isfinite(model(_series()).loss))
    model(_series()).loss.backward()


def test_checkpointing_gives_the_same_gradient() -> None:
    gradients = []
    for checkpoint in (False, True):
        model = _model(_method("tight", method=sd.core.Euler(checkpoint=checkpoint)))
        torch.manual_seed(3)
        model(_series()).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_hurst_index_that_varies_in_time() -> None:
    noise = MultifractionalNoise(
        lambda t: (0.3 + 0.4 * t)[:, None].expand(-1, 3), 4, 1.0, 0.05, per_channel=True
    )
    model = _model("gaussian", noise=noise)
    assert bool(torch.isfinite(model(_series()).loss))


def test_minibatches_and_resumption(tmp_path: Any) -> None:
    series = _series(count=6)
    whole = sd.fit(_model("tight"), series, steps=6, batch_size=2, progress=False)
    sd.fit(_model("tight"), series, steps=3, batch_size=2, progress=False, checkpoint=tmp_path)
    resumed = sd.fit(
        _model("tight"), series, steps=6, batch_size=2, progress=False, checkpoint=tmp_path, resume=True
    )
    assert whole.losses[-1] == resumed.losses[-1]


def test_predictions_and_forecasts() -> None:
    model, series = _model("tight"), _series()
    assert predict(model, series, num_draws=5, seed=0).shape == (5, 4, 6, 2)
    assert predict(model, series, TS[3:5], num_draws=5, seed=0).shape == (5, 4, 2, 2)
    later = torch.tensor([1.05, 1.1, 1.5])
    ahead = forecast(model, series, later, num_draws=5, seed=0)
    assert ahead.shape == (5, 4, 3, 2)
    torch.testing.assert_close(ahead, forecast(model, series, later, num_draws=5, seed=0))
    with pytest.raises(TimeGridError, match="after the grid"):
        forecast(model, series, TS[-2:])
    with pytest.raises(TimeGridError, match="grid of the model"):
        predict(model, series, later)


def test_a_forecast_continues_the_memory_of_the_noise() -> None:
    """Given the path, the mean of the next step is that of the equation with the memory states."""
    model = _model("tight", num_particles=1)
    series = _series(count=2)
    with torch.no_grad():
        torch.manual_seed(0)
        path = posterior_paths(model, series, 4000).path
        torch.manual_seed(0)
        ahead = forecast(model, series, torch.tensor([1.05]), num_draws=4000, noise=False)
        steps = model.sde.noise.steps(torch.tensor([1.0, 1.05]), dtype=torch.float32)
        recall = (path.aux["memory"][..., -1, :, :] * steps.recall[0]).sum(-1)
        last = path.x[..., -1, :]
        expected = last + 0.05 * model.sde.drift(TS[-1], last) + model.strength() * recall
        gap = ahead[..., 0, :] - model.decoder.mean(expected)
    assert bool((gap.mean(0).abs() < 4.5 * gap.std(0) / math.sqrt(4000)).all())


def test_comparison_over_series_finds_the_smoother_noise() -> None:
    """Paths with H = 0.9, seen almost without noise: fixed H = 0.9 beats H = 0.3."""
    from stochdyn.fractional import sample_fbm

    g = torch.Generator().manual_seed(0)
    x = sample_fbm(0.9, 20, sample_shape=(6,), generator=g).to(torch.float32)
    series = Series.regular(TS[1::2], x[:, 1::2, None])

    def build(hurst: float) -> LatentSDE:
        return LatentSDE(
            1, 1, TS, noise=FractionalNoise(hurst, learn_hurst=False), drift=AffineDrift(torch.zeros(1, 1)),
            diffusion=1.0, decoder=GaussianDecoder(lambda x: x, 1, learn_obs_scale=False), posterior=GaussianMethod(8, 4),
        )  # fmt: skip

    found = compare_models(
        {"rough": lambda: build(0.3), "smooth": lambda: build(0.9)},
        series,
        folds=2,
        num_draws=200,
        steps=150,
        lr=0.01,
    )
    assert found.names[0] == "smooth"
    assert found.difference["rough"] < -2 * found.stderr["rough"]


def test_learnt_indices_have_the_shape_of_the_path() -> None:
    model = _model("gaussian")
    assert model.hurst is not None
    torch.testing.assert_close(model.hurst, torch.tensor([0.3, 0.5, 0.8]))
    assert _model("matching").hurst is None


def test_a_method_has_no_option_that_it_does_not_use() -> None:
    with pytest.raises(TypeError, match="hidden"):
        GaussianMethod(hidden=(8,))  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="num_particles"):
        MatchingMethod(num_particles=3)  # type: ignore[call-arg]
    with pytest.raises(InvalidInputError, match="obs_scale has no effect"):
        LatentSDE(1, 1, TS, decoder=GaussianDecoder(lambda x: x, 1), obs_scale=0.2)


@pytest.mark.parametrize(
    ("method", "options", "name"),
    [
        (TightMethod, {"hidden": 8}, "hidden"),
        (TightMethod, {"hidden": (0,)}, "hidden"),
        (ControlMethod, {"method": "euller"}, "method"),
        (ControlMethod, {"num_particles": 0}, "num_particles"),
        (GaussianMethod, {"context": 2.5}, "context"),
        (LinearisedMethod, {"max_iterations": 0}, "max_iterations"),
        (MatchingMethod, {"num_times": 0}, "num_times"),
    ],
)
def test_options_of_methods_are_checked(method: Any, options: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidInputError, match=name):
        method(**options)


def test_a_name_stands_for_the_method_with_its_defaults() -> None:
    named, given = (LatentSDE(1, 1, TS, posterior=p) for p in ("gaussian", GaussianMethod()))
    assert named.posterior.num_particles == given.posterior.num_particles == 1
    shapes = [[p.shape for p in m.parameters()] for m in (named, given)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("posterior", KINDS)
def test_a_fitted_model_is_stored(posterior: str, tmp_path: Any) -> None:
    model, series = _model(posterior, decoder=torch.nn.Linear(3, 2)), _series()
    sd.save(model, tmp_path)
    again = sd.load(tmp_path)
    torch.testing.assert_close(
        predict(again, series, num_draws=3, seed=0), predict(model, series, num_draws=3, seed=0)
    )


@pytest.mark.parametrize(("method", "growth"), [("euler", 0.05**2), ("heun", 0.05**4 / 4)])
def test_paths_are_simulated_by_the_scheme_of_the_posterior(method: str, growth: float) -> None:
    """On a rotation a step h of Euler's method multiplies the square of the radius by 1 + h^2, one of Heun's by 1 + h^4 / 4."""
    torch.manual_seed(0)

    def rotation(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([-x[..., 1], x[..., 0]], -1)

    model = LatentSDE(
        2, 2, torch.linspace(0, 1, 21, dtype=torch.float64), noise="brownian", drift=rotation, diffusion=1e-7,
        decoder=lambda x: x, posterior=MatchingMethod((8,), 6, 2, method=method),
    ).double()  # fmt: skip
    series = Series.regular(TS[::4].double(), torch.randn(2, 6, 2, dtype=torch.float64))
    radius = forecast(model, series, torch.tensor([2.0, 7.0]), 1, seed=0, noise=False)[0].norm(dim=-1)
    ratio = (radius[:, 1] / radius[:, 0]).square()
    torch.testing.assert_close(ratio, torch.full_like(ratio, (1 + growth) ** 100), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("noise", ["fractional", "brownian"])
def test_a_forecast_does_not_depend_on_the_other_times_asked_for(noise: Any) -> None:
    """A drift that a step of the asked length would make unstable."""
    torch.manual_seed(0)
    model = LatentSDE(
        1, 1, TS, noise=noise, drift=lambda t, x: 10 * (1.0 - x), decoder=lambda x: x, posterior=_method("tight"),
    )  # fmt: skip
    data = Series.regular(TS[::4], torch.ones(2, 6, 1))
    alone = forecast(model, data, torch.tensor([1.9]), 2000, seed=0, noise=False)[:, 0, 0, 0]
    among = forecast(model, data, torch.arange(1.1, 1.91, 0.1), 2000, seed=1, noise=False)[:, 0, -1, 0]
    assert abs(float(alone.std() / among.std()) - 1) < 0.1
    assert abs(float(alone.mean() - among.mean())) < 5 * float(alone.std()) * math.sqrt(2 / 2000)


def test_bad_input() -> None:
    with pytest.raises(InvalidInputError, match="constant"):
        _model("gaussian", diffusion="state")
    with pytest.raises(InvalidInputError, match="noise of its own"):
        _model("tight", diffusion=torch.eye(3))
    with pytest.raises(InvalidInputError, match="memory"):
        _model("matching", noise="fractional")
    for other in ("other", 3, TightMethod):
        with pytest.raises(InvalidInputError, match="posterior"):
            LatentSDE(1, 1, TS, posterior=other)  # type: ignore[arg-type]
    for noise in ("white", 0.7, FractionalNoise):
        with pytest.raises(InvalidInputError, match="noise"):
            LatentSDE(1, 1, TS, noise=noise)  # type: ignore[arg-type]
    with pytest.raises(ShapeError, match="hurst"):
        LatentSDE(1, 3, TS, noise=FractionalNoise(torch.tensor([0.3, 0.4])))
    with pytest.raises(InvalidInputError, match="the decoder has"):
        LatentSDE(2, 1, TS, decoder=GaussianDecoder(lambda x: x, 1))
    with pytest.raises(InvalidInputError, match="diffusion"):
        _model("tight", diffusion="other")
    for name in ("drift", "decoder"):
        with pytest.raises(InvalidInputError, match=f"{name} must be hidden widths"):
            _model("tight", **{name: 5})
    with pytest.raises(HurstRangeError):
        FractionalNoise(1.2)
    with pytest.raises(InvalidInputError, match="Series"):
        _model("tight")(torch.zeros(2, 3))
    with pytest.raises(TimeGridError, match="beyond the grid"):
        _model("tight")(Series.regular(torch.tensor([0.5, 1.5]), torch.zeros(2, 2, 2)))
    with pytest.raises(InvalidInputError, match="components"):
        _model("tight")(Series.regular(TS[::4], torch.zeros(2, 6, 3)))
    with pytest.raises(InvalidInputError, match="one series per fold"):
        compare_models({"a": lambda: _model("tight"), "b": lambda: _model("tight")}, _series(), folds=9)


def test_precision_follows_the_parameters() -> None:
    model = _model("gaussian").double()
    series = _series()
    value = model(Series(series.times.double(), series.values.double(), series.mask)).loss
    assert value.dtype == torch.float64


@pytest.mark.parametrize("num_steps", [100, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("hurst", [0.1, 0.7, 0.9])
def test_the_default_noise_does_not_bias_the_index_that_many_series_teach(
    hurst: float, kind: Any, num_steps: int
) -> None:
    """The index at which the default noise of a model fits exact paths best, the scale being free: the limit of infinite data."""
    model = LatentSDE(1, 1, torch.linspace(0, 1, num_steps + 1), noise=FractionalNoise(hurst, kind=kind))
    noise = model.sde.noise
    assert isinstance(noise, MarkovNoise)
    ts = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)[1:]

    def increments(cov: torch.Tensor) -> torch.Tensor:
        cov = cov.diff(dim=0, prepend=torch.zeros_like(cov[:1]))
        return cov.diff(dim=1, prepend=torch.zeros_like(cov[:, :1]))

    exact = torch.linalg.cholesky(increments(fbm_covariance(ts, hurst, kind)))

    def loss(h: float) -> float:
        other = MarkovNoise(h, noise.num_states, noise.horizon, noise.dt, kind)
        factor = torch.linalg.cholesky(increments(other.covariance(ts)))
        ratio = torch.linalg.solve_triangular(factor, exact, upper=False).square().sum() / num_steps
        return float(0.5 * num_steps * ratio.log() + factor.diagonal().log().sum())

    best, width = hurst, 0.02
    for _ in range(3):  # to the lowest point of a parabola, each time a narrower one
        low, middle, high = (loss(best + k * width) for k in (-1, 0, 1))
        best, width = best + 0.5 * width * (low - high) / (low - 2 * middle + high), 0.3 * width
    assert abs(best - hurst) < 0.005
    # Which is decided by the data of no fewer than a hundred series: it is below a nat.
    assert 100 * (loss(hurst) - loss(best)) < 1.0


@pytest.mark.parametrize(
    ("posterior", "noise"), [*((kind, "fractional") for kind in KINDS[:-1]), ("matching", "brownian")]
)
def test_the_unit_of_time_does_not_matter(posterior: str, noise: str) -> None:
    values = torch.randn(3, 6, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    grid = torch.linspace(0, 1, 21, dtype=torch.float64)

    def answer(unit: float) -> list[torch.Tensor]:
        torch.manual_seed(1)
        model = LatentSDE(
            1, 2, grid * unit, noise=noise, drift=(4,), diffusion="constant" if posterior == "gaussian" else "state",
            posterior=_method(posterior),
        ).double()  # fmt: skip
        torch.manual_seed(2)
        loss = model(Series.regular(grid[::4] * unit, values)).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=False)]

    sd.testing.check_units(answer, rtol=1e-5)


@pytest.mark.parametrize("posterior", KINDS)
def test_where_time_begins_changes_nothing(posterior):
    """Days since 1970 or seconds since then, in a precision that holds them: the same fit of values in single precision."""
    values = torch.randn(6, 3, 1, generator=torch.Generator().manual_seed(1))
    times = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)

    def final_loss(start: float) -> float:
        ts = torch.linspace(0, 1, 21, dtype=torch.float64) + start
        torch.manual_seed(0)
        model = LatentSDE(1, 1, ts, posterior=posterior, noise="brownian", drift=(8,))
        series = Series.of([(times + start, v) for v in values])
        assert series.times.dtype == torch.float64
        return float(sd.fit(model, series, steps=6, lr=0.02, progress=False).losses[-1])

    # The walk through the loss amplifies rounding, of single precision and of dates.
    assert final_loss(19e3) == pytest.approx(final_loss(0.0), rel=2e-3)


@pytest.mark.parametrize("posterior", KINDS)
def test_the_unit_and_the_origin_of_the_data_do_not_matter(posterior: str) -> None:
    """Loss, gradients, latent paths, forecasts and noise of data in other units, from another origin, with gaps."""
    values = torch.randn(3, 6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values[0, 2], values[1, :, 0] = torch.nan, torch.nan
    values = values * torch.tensor([1.0, 1e-3]) + torch.tensor([5.0, -2.0])
    grid = torch.linspace(0, 1, 21, dtype=torch.float64)
    seen = int((~torch.isnan(values)).sum()) / len(values)

    def answer(unit: float) -> dict[str, Any]:
        torch.manual_seed(1)
        shift = 0.0 if unit == 1.0 else -3.0 * unit
        model = LatentSDE(
            2, 2, grid, noise="brownian" if posterior == "matching" else "fractional", drift=(4,), decoder=(4,),
            posterior=_method(posterior),
        ).double()  # fmt: skip
        series = Series.regular(grid[::4], values * unit + shift)
        torch.manual_seed(2)
        loss = model(series).loss
        ahead = forecast(model, series, torch.tensor([1.05, 1.2]), 3, seed=3)
        return {
            "loss": loss - seen * math.log(unit),
            "gradients": torch.autograd.grad(loss, list(model.parameters())),
            "paths": posterior_paths(model, series, 3, seed=3).path.x,
            "forecasts": (ahead - shift) / unit,
            "noise": model.decoder.obs_scale / unit,
        }

    sd.testing.check_units(answer, rtol=1e-4)


def test_the_noise_that_is_given_is_in_units_of_the_data() -> None:
    series = Series.regular(TS[::4], 1e3 * torch.randn(4, 6, 2, generator=torch.Generator().manual_seed(0)))
    given = _model("gaussian", obs_scale=20.0)
    given(series)
    torch.testing.assert_close(given.decoder.obs_scale, torch.full((2,), 20.0))
    alone = _model("gaussian", obs_scale=None)
    alone(series)
    torch.testing.assert_close(alone.decoder.obs_scale, 0.1 * series.values.std((0, 1), correction=0))


def test_the_units_of_the_data_are_those_of_the_first_series_and_stored() -> None:
    model, series = _model("gaussian"), _series()
    model(series)
    later = Series(series.times, 100 * series.values, series.mask)
    scale = model.units.scale.clone()
    model(later)
    assert torch.equal(model.units.scale, scale)
    sd.testing.check_storage(model, lambda m: predict(m, series, num_draws=3, seed=0))
    fresh = _model("gaussian")
    fresh(later)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh.units.scale, scale)
    sd.testing.check_device(model)
