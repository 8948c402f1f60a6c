"""The generator: with exact fields its laws are the exact ones; ends without NaN; guidance; path measures; Pyro."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn
from torch.distributions import Independent, Normal

import stochdyn as sd
from stochdyn import errors
from stochdyn.interpolants import (
    FieldNetwork,
    Fields,
    GaussianMixture,
    GaussianMixtureInterpolant,
    Interpolant,
    InterpolantDistribution,
    InterpolantGenerator,
    InterpolantRegression,
    kl_bound,
    kl_bound_from_losses,
    optimal_epsilon,
)
from stochdyn.interpolants.sampling import Starts
from tests.interpolants.truths import F64, fields_of

LAW = GaussianMixture(
    torch.tensor([0.3, 0.7], dtype=F64), torch.tensor([[-2.0, 0.0], [1.0, 1.0]], dtype=F64), 0.3
)


def normal(dim: int = 2, dtype: torch.dtype = F64) -> Independent:
    return Independent(Normal(torch.zeros(dim, dtype=dtype), torch.ones(dim, dtype=dtype)), 1)


def exact(
    path: str = "linear", names: tuple[str, ...] = ("velocity", "noise_prediction")
) -> InterpolantGenerator:
    flow = GaussianMixtureInterpolant(Interpolant(path), None, LAW)
    return InterpolantGenerator(
        Fields(flow.interpolant, {n: getattr(flow, n) for n in names}), Starts(normal())
    )


def assert_moments(x: Tensor, slack: float) -> None:
    n = len(x)
    assert float((x.mean(0) - LAW.mean).abs().max()) < 5 * float(LAW.variance.max() / n) ** 0.5 + slack
    assert float((x.var(0) - LAW.variance).abs().max()) < 0.06 * float(LAW.variance.max()) + slack
    assert float((x[:, 0] < -0.7).double().mean()) == pytest.approx(0.3, abs=5 * (0.21 / n) ** 0.5 + slack)


@pytest.mark.parametrize(
    "names",
    [
        ("velocity", "noise_prediction"),
        ("path_velocity", "score"),
        ("start_prediction", "data_prediction"),
        ("velocity", "data_prediction"),
    ],
)
@pytest.mark.parametrize("method", ["heun", "euler", "strang"])
def test_samples_have_the_law_whatever_was_learnt(names: tuple[str, str], method: str) -> None:
    model = exact("linear", names)
    steps = 100 if method == "euler" else 30
    x = model.sample(3000, 0.5, steps, method, generator=torch.Generator().manual_seed(0))
    assert_moments(x, 0.05)


@pytest.mark.parametrize("path", ["one-sided-linear", "one-sided-trig", "vp"])
@pytest.mark.parametrize("name", ["velocity", "noise_prediction", "data_prediction"])
def test_one_network_is_enough_on_one_sided_paths(path: str, name: str) -> None:
    model = exact(path, (name,))
    for epsilon in (0.0, "optimal"):
        x = model.sample(3000, epsilon, 50, generator=torch.Generator().manual_seed(0))
        assert_moments(x, 0.07)


@pytest.mark.parametrize("path", ["linear", "trig", "encoder-decoder", "one-sided-linear", "vp", "mirror"])
def test_no_end_gives_nan(path: str) -> None:
    it = Interpolant(path)
    torch.manual_seed(0)
    names = ("noise_prediction",) if it.kind in ("one-sided", "mirror") else ("velocity", "noise_prediction")
    model = InterpolantGenerator(
        Fields(it, {n: FieldNetwork(2) for n in names}), Starts(normal(dtype=torch.float32))
    )
    for method in ("heun", "euler", "strang"):
        for steps in (1, 20):
            x = model.sample(20, 0.7, steps, method)
            assert x.shape == (20, 2)
            assert bool(torch.isfinite(x).all())
    for t in (0.0, 1.0):
        for field in fields_of(
            GaussianMixtureInterpolant(it, None, GaussianMixture(torch.ones(1), torch.zeros(1, 2), 1.0))
        ):
            if field == "path_velocity" or path == "encoder-decoder":
                continue
            assert bool(torch.isfinite(model.field(field, t, x)).all()), field


def test_flow_densities_are_exact() -> None:
    model = exact()
    x = LAW.draw(20, torch.Generator().manual_seed(1))
    assert float((model.log_prob(x, num_steps=40) - LAW.log_prob(x)).abs().max()) < 1e-4
    adaptive = model.log_prob(x[:5], method="dopri5", num_steps=1)
    assert float((adaptive - LAW.log_prob(x[:5])).abs().max()) < 1e-3
    y, log_prob = model.sample_and_log_prob(20, num_steps=40, generator=torch.Generator().manual_seed(1))
    assert float((log_prob - LAW.log_prob(y)).abs().max()) < 1e-4
    back = model.push(model.push(x, 60, "rk4", backward=True), 60, "rk4")
    assert float((back - x).abs().max()) < 1e-5


def test_hutchinson_is_unbiased_for_the_log_density() -> None:
    model = exact()
    x = LAW.draw(5, torch.Generator().manual_seed(1))
    exactly = model.log_prob(x, num_steps=6)
    g = torch.Generator().manual_seed(0)
    draws = torch.stack([model.log_prob(x, exact=False, num_steps=6, generator=g) for _ in range(80)])
    error = draws.std(0) / 80**0.5
    assert bool(((draws.mean(0) - exactly).abs() < 5 * error + 1e-9).all())


def test_densities_are_differentiable_in_points_and_parameters() -> None:
    torch.manual_seed(0)
    net = FieldNetwork(2, 8, 1).double()
    model = InterpolantGenerator(Fields(Interpolant("vp"), {"velocity": net}))
    x = torch.randn(3, 2, dtype=F64, requires_grad=True)
    torch.autograd.gradcheck(lambda y: model.log_prob(y, num_steps=3), x)
    weight = net.layers[0].weight  # type: ignore[union-attr]
    grad = torch.autograd.grad(model.log_prob(x, num_steps=3).sum(), weight)[0]
    h = 1e-6
    with torch.no_grad():
        weight[0, 0] += h
        up = model.log_prob(x, num_steps=3).sum()
        weight[0, 0] -= 2 * h
        down = model.log_prob(x, num_steps=3).sum()
        weight[0, 0] += h
    assert float(grad[0, 0]) == pytest.approx(float((up - down) / (2 * h)), rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("method", ["feynman-kac", "transition"])
def test_densities_of_the_sde(method: str) -> None:
    """With exact fields the density of the SDE sampler is that of the data, and the weights hardly vary."""
    model = exact()
    x = LAW.draw(12, torch.Generator().manual_seed(1))
    weights = model.sde_log_prob(
        x, 0.5, 100, num_particles=32, method=method, generator=torch.Generator().manual_seed(2)
    )
    gap = weights.log_prob - LAW.log_prob(x)
    assert float(gap.abs().mean()) < 0.1
    assert float(weights.effective_size.min()) > 12
    assert bool((weights.bound <= weights.log_prob + 1e-12).all())


def test_transition_weights_are_unbiased_for_the_scheme() -> None:
    """Two coarse Euler steps of a linear equation have a Gaussian law that is known; any proposal gives its density."""
    from stochdyn.interpolants import feynman_kac_log_prob

    ts, g = torch.tensor([0.0, 0.5, 1.0], dtype=F64), 0.8
    x = torch.linspace(-1.5, 1.5, 4, dtype=F64)[:, None]
    variance = 1.0
    for _ in range(2):
        variance = variance * (1 - 0.5 * 0.9) ** 2 + g**2 * 0.5
    exactly = Normal(torch.zeros(1, dtype=F64), math.sqrt(variance)).log_prob(x)[:, 0]
    for score in (lambda t, y: -y, lambda t, y: 0.3 - 0.5 * y, None):
        weights = feynman_kac_log_prob(
            lambda t, y: -0.9 * y, g, normal(1).log_prob, x, ts, score=score, num_particles=40_000, method="transition",
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert bool(((weights.log_prob - exactly).abs() < 5 * weights.stderr + 1e-9).all())


def test_path_measure_has_the_marginals() -> None:
    measure = exact().measure(epsilon=0.5)
    path = measure.sample(torch.linspace(0, 1, 101, dtype=F64), (2000,), torch.Generator().manual_seed(0))
    assert_moments(path.x[:, -1], 0.06)
    scheduled = exact().measure(epsilon=lambda t: 0.2 + t)
    path = scheduled.sample(torch.linspace(0, 1, 101, dtype=F64), (2000,), torch.Generator().manual_seed(0))
    assert_moments(path.x[:, -1], 0.06)


def _perturbed(shift: float, tilt: float) -> InterpolantGenerator:
    flow = GaussianMixtureInterpolant(Interpolant(), None, LAW)
    networks = {
        "velocity": lambda t, x: flow.velocity(t, x) + shift,
        "noise_prediction": lambda t, x: flow.noise_prediction(t, x) + tilt,
    }
    return InterpolantGenerator(Fields(flow.interpolant, networks), Starts(normal()))


def test_girsanov_bound_is_the_divergence_of_path_measures() -> None:
    """The same number by the core's path measures, whose grid stops short of the ends."""
    model, truth_model, epsilon = _perturbed(0.3, 0.05), exact(), 0.5
    flow = GaussianMixtureInterpolant(Interpolant(), None, LAW)
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(2000, 2, dtype=F64, generator=g), LAW.draw(2000, g)
    bound = kl_bound(model, x0, x1, epsilon, flow, num_times=40, margin=0.1, generator=g)
    ts = torch.linspace(0.1, 0.9, 81, dtype=F64)
    start = _Marginal(flow, 0.1)
    laws = [sd.DiffusionMeasure(start, m.measure(epsilon).sde) for m in (truth_model, model)]
    paths = laws[0].kl(laws[1], ts, 1000, g)
    error = float((bound.stderr**2 + paths.stderr**2).sqrt())
    assert abs(float(bound.mean - paths.mean)) < 5 * error + 0.01 * float(paths.mean)


class _Marginal(sd.core.InitialLaw):
    """The exact law at one time as a start."""

    def __init__(self, flow: GaussianMixtureInterpolant, t: float) -> None:
        super().__init__()
        self.flow, self.t, self.dim = flow, t, 2

    def draw(self, sample_shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        return self.flow.sample(self.t, math.prod(sample_shape), generator).reshape(*sample_shape, 2)

    def log_prob(self, x0: Tensor) -> Tensor:
        return self.flow.log_prob(self.t, x0)

    def _log_ratio(self, other: sd.core.InitialLaw, x0: Tensor, estimator: str) -> Tensor:
        return torch.zeros_like(x0[..., 0])


def test_the_bound_holds_and_without_truth_it_is_larger() -> None:
    model = _perturbed(1.0, 0.2)
    flow = GaussianMixtureInterpolant(Interpolant(), None, LAW)
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(1000, 2, dtype=F64, generator=g), LAW.draw(1000, g)
    with_truth = model_bound = kl_bound(model, x0, x1, 0.5, flow, generator=g)
    x = LAW.draw(150, g)
    weights = model.sde_log_prob(x, 0.5, 50, num_particles=32, method="transition", generator=g)
    gap = LAW.log_prob(x) - weights.log_prob
    divergence, error = float(gap.mean()), float(gap.std() / 150**0.5)
    assert divergence > 5 * error
    assert divergence - 5 * error < float(model_bound.mean)
    from_samples = kl_bound(model, x0, x1, 0.5, generator=g)
    assert float(from_samples.mean) > float(with_truth.mean) - 5 * float(with_truth.stderr)
    few = kl_bound(model, x0[:100], x1[:100], 0.5, generator=g)
    assert float(few.mean) > float(from_samples.mean)


def test_printed_constants_fail_where_the_corrected_ones_hold() -> None:
    r"""Two Gaussians, errors aligned (:math:`\delta b=\varepsilon\delta s=e/2`), e constant in space: all is known.

    With e(t) proportional to the propagator to time 1 the shift of the mean is the largest that the path divergence
    allows: KL = path KL (1 - memory of the start), and half the path KL is less than that.
    """
    epsilon, n = 1.0, 20_000
    one = torch.ones(1, dtype=F64)
    first = GaussianMixture(one, torch.zeros(1, 1, dtype=F64), 1.0)
    flow = GaussianMixtureInterpolant(
        Interpolant(), first, GaussianMixture(one, torch.full((1, 1), 2.0, dtype=F64), 0.3)
    )
    t = (torch.arange(n, dtype=F64) + 0.5)[:, None, None] / n
    pair = torch.tensor([[0.0], [1.0]], dtype=F64).expand(n, 2, 1)
    drift = flow.forward_drift(t, pair, epsilon)[..., 0]
    slope = drift[:, 1] - drift[:, 0]
    propagator = torch.exp((slope.flip(0).cumsum(0).flip(0) - 0.5 * slope) / n)
    error = 0.4 * propagator
    divergence = float((propagator * error).mean() ** 2 / (2 * 0.3))
    excess = [
        0.5 * float((0.5 * error).square().mean()),
        0.5 * float((0.5 * error / epsilon).square().mean()),
    ]
    corrected = kl_bound_from_losses(excess[0], excess[1], epsilon)
    memory = float(propagator[0]) ** 2 * 1.0 / 0.3
    assert divergence == pytest.approx(corrected * (1 - memory), rel=1e-3)
    assert 0.5 * corrected < divergence < corrected


def test_optimal_noise_balances_the_errors() -> None:
    model = _perturbed(0.3, 0.1)
    flow = GaussianMixtureInterpolant(Interpolant(), None, LAW)
    g = torch.Generator().manual_seed(0)
    x0, x1 = torch.randn(500, 2, dtype=F64, generator=g), LAW.draw(500, g)
    best = optimal_epsilon(model, flow, x0, x1, generator=g)
    t = torch.tensor([0.2, 0.5, 0.8], dtype=F64)
    # db = 0.3, ds = -0.1 / gamma
    torch.testing.assert_close(best(t), 3.0 * (t * (1 - t)).sqrt(), rtol=0.02, atol=0)
    bounds = [float(kl_bound(model, x0, x1, lambda s, c=c: c * best(s), flow).mean) for c in (0.3, 1.0, 3.0)]
    assert bounds[1] < min(bounds[0], bounds[2])


def test_guidance_interpolates_between_two_models() -> None:
    class Net(nn.Module):
        def forward(self, t: Tensor, x: Tensor, condition: Tensor) -> Tensor:
            return torch.where(condition[:, None] == 1, torch.ones_like(x), torch.zeros_like(x))

    fields = Fields(Interpolant("vp"), {"velocity": Net()}, null_condition=torch.tensor(9))
    x, label = torch.zeros(3, 2), torch.ones(3, dtype=torch.long)
    for strength in (0.0, 1.0, 2.5):
        assert float(fields("velocity", 0.5, x, label, strength)[0, 0]) == pytest.approx(strength)
    plain = Fields(Interpolant("vp"), {"velocity": Net()})
    with pytest.raises(errors.InvalidInputError, match="null condition"):
        plain("velocity", 0.5, x, label, 2.0)


def test_labels_steer_samples() -> None:
    torch.manual_seed(0)
    label = torch.randint(2, (4000,))
    x1 = torch.where(label[:, None] == 1, 2.0, -2.0) + 0.3 * torch.randn(4000, 1)
    objective = InterpolantRegression(
        Interpolant("vp"), velocity=FieldNetwork(1, 32, 2, num_classes=2), condition_dropout=0.1,
        null_condition=torch.tensor(2),
    )  # fmt: skip
    sd.fit(objective, {"x1": x1, "condition": label}, steps=400, lr=5e-3, batch_size=256, progress=False)
    model = objective.generator()
    for k in (0, 1):
        x = model.sample(500, num_steps=20, condition=torch.full((500,), k))
        assert abs(float(x.mean()) - (4.0 * k - 2.0)) < 0.25
    mixed = model.sample(1000, num_steps=20, condition=torch.full((1000,), 2))
    assert 0.4 < float((mixed > 0).double().mean()) < 0.6


def test_starts_are_those_of_the_data_unless_their_law_is_stated() -> None:
    """No test decides what they look like: normal starts of the data are starts of the data."""
    g = torch.Generator().manual_seed(0)
    net, x1 = FieldNetwork(2), torch.randn(500, 2, generator=g)
    for x0 in (x1 + 5, torch.randn(500, 2, generator=g)):
        objective = InterpolantRegression(Interpolant(), velocity=net)
        objective((x0, x1))
        model = objective.generator()
        drawn = model.starts.draw(200)
        assert bool((drawn[:, None] == x0).all(-1).any(1).all())
        # their density is that of the Gaussian with their moments
        exactly = torch.distributions.MultivariateNormal(x0.mean(0), torch.cov(x0.mT)).log_prob(x0[:3])
        torch.testing.assert_close(model.starts.law().log_prob(x0[:3]), exactly)
        assert bool(torch.isfinite(model.log_prob(x1[:3], num_steps=2)).all())
        stated = InterpolantRegression(Interpolant(), velocity=net, base=normal(dtype=torch.float32))
        stated((x0, x1))
        assert bool(torch.isfinite(stated.generator().log_prob(x1[:3], num_steps=2)).all())
    alone = InterpolantRegression(Interpolant(), velocity=net)
    alone(x1)
    assert bool(torch.isfinite(alone.generator().log_prob(x1[:3], num_steps=2)).all())


def test_starts_that_are_no_gaussian_are_said_to_be_none() -> None:
    ring = torch.nn.functional.normalize(
        torch.randn(500, 2, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    objective = InterpolantRegression(Interpolant(), velocity=FieldNetwork(2))
    objective((ring, ring))
    with pytest.warns(errors.ApproximationWarning, match="state their law"):
        objective.generator().log_prob(ring[:2], num_steps=2)


def test_measure_starts_where_the_model_does() -> None:
    torch.manual_seed(0)
    x1 = torch.randn(50, 2)
    objective = InterpolantRegression(
        Interpolant(), velocity=FieldNetwork(2), noise_prediction=FieldNetwork(2)
    )
    objective((x1 + 5, x1))
    measure = objective.generator().measure(0.5)
    path = measure.sample(torch.linspace(0, 1, 5), (100,))
    assert bool((path.x[:, 0, None] == x1 + 5).all(-1).any(1).all())
    other = objective.generator().measure(0.5)
    assert measure.log_rn(path, other).abs().max() < 1e-4


def test_distribution_in_pyro() -> None:
    """A trained prior in a model: its posterior mean under a Gaussian likelihood is the exact one."""
    pyro.set_rng_seed(0)
    model = exact("vp", ("velocity",))
    prior = model.distribution(num_steps=12, method="heun")
    assert isinstance(prior, InterpolantDistribution)
    assert prior.event_shape == (2,)
    assert prior.sample((3, 4)).shape == (3, 4, 2)
    value = prior.sample((6,))
    assert float((prior.log_prob(value) - LAW.log_prob(value)).abs().max()) < 0.06
    assert prior.expand((5,)).log_prob(value[:5]).shape == (5,)
    y = torch.tensor([0.6, 0.4], dtype=F64)

    def program() -> None:
        x = pyro.sample("x", prior)
        pyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)

    loc = torch.zeros(2, dtype=F64, requires_grad=True)

    def guide() -> None:
        pyro.sample("x", dist.Normal(pyro.param("loc", loc), 0.3).to_event(1))

    svi = SVI(
        program, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO(num_particles=8, vectorize_particles=True)
    )
    for _ in range(25):
        svi.step()
    # one component has practically all the posterior mass
    precision = 1 / 0.3 + 4
    expected = (torch.tensor([1.0, 1.0], dtype=F64) / 0.3 + 4 * y) / precision
    assert float((pyro.param("loc").detach() - expected).abs().max()) < 0.2


def test_what_models_cannot_do() -> None:
    flow_only = InterpolantGenerator(
        Fields(Interpolant("linear", "zero"), {"velocity": FieldNetwork(2)}),
        Starts(normal(dtype=torch.float32)),
    )
    with pytest.raises(errors.UnavailableError, match="give no score"):
        flow_only.sample(3, epsilon=0.5)
    with pytest.raises(errors.UnavailableError, match="give no score"):
        flow_only.measure(0.5)
    both = exact()
    with pytest.raises(errors.InvalidInputError, match="path measure needs noise"):
        both.measure(0.0)
    with pytest.raises(errors.InvalidInputError, match="depends on the errors"):
        both.sample(3, epsilon="optimal")
    with pytest.raises(errors.InvalidInputError, match="a number, a function or 'optimal'"):
        both.sample(3, epsilon="best")
    with pytest.raises(errors.InvalidInputError, match="epsilon must be at least 0"):
        both.sample(3, epsilon=-1.0)
    with pytest.raises(errors.InvalidInputError, match="milstein"):
        both.sample(3, method="milstein")
    with pytest.raises(errors.ShapeError, match="events of another shape"):
        both.push(torch.zeros(3, 4))
    with pytest.raises(errors.EmptyDataError, match="x0 is empty"):
        both.push(torch.zeros(0, 2))
    with pytest.raises(errors.NonFiniteError, match="x1"):
        both.log_prob(torch.full((1, 2), math.nan))
    with pytest.raises(errors.UnavailableError, match="law of the starts isn't known"):
        InterpolantGenerator(Fields(Interpolant(), {"velocity": FieldNetwork(2)}), Starts()).sample(3)
    coupled = InterpolantRegression(Interpolant("vp"), velocity=FieldNetwork(2), coupling="ot").generator()
    assert not coupled.fields.has_score
    with pytest.raises(errors.InvalidInputError, match="errors of the fields bound no divergence"):
        kl_bound(both, torch.zeros(2, 2, dtype=F64), torch.zeros(2, 2, dtype=F64), 0.0)
    with pytest.raises(errors.InvalidInputError, match="epsilon must be greater than 0"):
        kl_bound_from_losses(0.1, 0.1, 0.0)


def test_the_law_at_a_time_does_not_depend_on_the_grid() -> None:
    """Asked for from a later time on, paths are simulated from the start: the marginal there, not the start itself."""
    measure = exact().measure(epsilon=0.5)
    late = measure.sample(torch.tensor([0.5, 0.75], dtype=F64), 1500, 0).x[:, 0]
    flow = GaussianMixtureInterpolant(Interpolant(), None, LAW)
    mean, covariance = flow.moments(0.5)
    error = (covariance.diagonal() / 1500).sqrt()
    assert bool(((late.mean(0) - mean).abs() < 5 * error + 0.02).all())
    assert measure.marginal(0.5).sample(3, 0).shape == (3, 2)
    # The ends alone are asked for: no single step over all of the path.
    assert_moments(measure.sample(torch.tensor([0.0, 1.0], dtype=F64), 2000, 0).x[:, -1], 0.06)
