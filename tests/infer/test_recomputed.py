"""Feedback that is recomputed for every draw integrates a linear-Gaussian path out exactly."""

from __future__ import annotations

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoMultivariateNormal, init_to_median, init_to_value
from torch import Tensor

import stochdyn as sd
from stochdyn.core import Scalar
from stochdyn.errors import InvalidInputError
from stochdyn.fractional import FractionalOU, MarkovNoise
from stochdyn.infer import AutoPathGuide, sample_path, start_at_mode
from tests.infer.exact import linear_path

D = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore::stochdyn.errors.ApproximationWarning")
TS = torch.linspace(0, 2, 21, dtype=D)
Y = torch.tensor([0.2, 0.1, 0.4, 0.7, 0.5, 0.9, 0.4, 0.2, 0.3, 0.6], dtype=D)


def _noise(hurst: Tensor) -> MarkovNoise:
    return MarkovNoise(hurst, 4, 2.0, 0.1)


def _model() -> None:
    hurst = pyro.sample("hurst", dist.Uniform(torch.tensor(0.0, dtype=D), 1.0))
    scale = pyro.sample("scale", dist.LogNormal(torch.tensor(0.0, dtype=D), 1.0))
    sde = sd.SDE(lambda t, x: -x, Scalar(scale), _noise(hurst))
    x = sample_path("x", sde, torch.zeros(1, dtype=D), TS)
    pyro.sample("y", dist.Normal(x[..., 2::2, 0], 0.1).to_event(1), obs=Y)


def _guide(rest: object = None) -> AutoPathGuide:
    make = rest or (
        lambda m: AutoMultivariateNormal(m, init_loc_fn=init_to_median(num_samples=1), init_scale=0.1)
    )
    return AutoPathGuide(_model, hidden=(), feedback="recomputed", rest=make)


def _evidence(hurst: Tensor, scale: Tensor) -> Tensor:
    law = FractionalOU(1.0, 0.0, scale, hurst, noise=_noise(hurst), method="euler")
    mask = torch.zeros(21, dtype=torch.bool)
    mask[2::2] = True
    y = torch.zeros(21, dtype=D)
    y[2::2] = Y
    return law.log_evidence(TS, y.expand(*hurst.shape, 21), 0.1, mask=mask)


def test_the_path_is_integrated_out_for_every_draw() -> None:
    """log p(y, x, theta) - log q(x | theta) is log p(y, theta), whatever theta and x."""
    pyro.set_rng_seed(0)
    guide = _guide()
    guide()
    with pyro.plate("particles", 5, dim=-1):
        drawn = pyro.poutine.trace(guide).get_trace()
        model = pyro.poutine.trace(pyro.poutine.replay(_model, drawn)).get_trace()
    model.compute_log_prob()
    drawn.compute_log_prob()
    hurst, scale = (model.nodes[n]["value"] for n in ("hurst", "scale"))
    own = drawn.nodes["x_dw"]["log_prob"]
    weight = model.nodes["y"]["log_prob"] + model.nodes["x_dw"]["log_prob"] - own
    assert float(hurst.detach().std()) > 0.005
    torch.testing.assert_close(weight, _evidence(hurst, scale), rtol=0, atol=1e-8)


def test_gradients_in_the_other_sites_have_no_noise() -> None:
    """The bound's gradient is that of the evidence, for every draw of the path."""
    pyro.set_rng_seed(1)
    guide = _guide(AutoDelta)
    guide()
    gradients = []
    for seed in range(2):
        pyro.set_rng_seed(seed)
        loss = Trace_ELBO().differentiable_loss(_model, guide)
        gradients.append(torch.stack(torch.autograd.grad(loss, list(guide.parameters()))))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-8)
    values = {n: guide.rest.median()[n].detach().requires_grad_() for n in ("hurst", "scale")}
    joint = _evidence(values["hurst"], values["scale"]) + dist.LogNormal(0.0, 1.0).log_prob(values["scale"])
    slope = torch.autograd.grad(joint, list(values.values()))
    # AutoDelta optimises unconstrained values
    h, s = values["hurst"].detach(), values["scale"].detach()
    expected = torch.stack([slope[0] * h * (1 - h), slope[1] * s])
    torch.testing.assert_close(-gradients[0], expected, rtol=1e-5, atol=1e-7)


def test_the_posterior_of_coupled_sites_has_the_right_width() -> None:
    """Held against the exact evidence on a grid: the Laplace start, and the normal law fitted from it."""
    pyro.set_rng_seed(2)
    guide = _guide()
    start_at_mode(guide)
    logit = torch.linspace(-7, 6, 53, dtype=D)
    log_scale = torch.linspace(-2, 1.6, 41, dtype=D)
    u, v = torch.meshgrid(logit, log_scale, indexing="ij")
    h = torch.sigmoid(u)
    log_joint = _evidence(h.flatten(), v.exp().flatten()).reshape(u.shape)
    log_joint = log_joint + dist.Normal(0.0, 1.0).log_prob(v) + torch.log(h * (1 - h))
    mode = guide.rest.loc.detach()
    peak = log_joint.argmax()
    assert abs(float(mode[0] - u.flatten()[peak])) < 0.3
    assert abs(float(mode[1] - v.flatten()[peak])) < 0.15
    cell = float((logit[1] - logit[0]) * (log_scale[1] - log_scale[0]))
    log_evidence = float(torch.logsumexp(log_joint.flatten(), 0)) + math.log(cell)
    elbo = Trace_ELBO(num_particles=16, vectorize_particles=True, max_plate_nesting=0)
    svi = SVI(_model, guide, pyro.optim.ClippedAdam({"lr": 0.03, "lrd": 0.97}), elbo)
    bounds = [-svi.step() for _ in range(80)]
    gap = log_evidence - sum(bounds[-20:]) / 20
    # what a normal law leaves to a skewed posterior, and not more
    assert -0.1 < gap < 0.35
    weights = torch.softmax(log_joint.flatten(), 0)
    mean = (weights * v.flatten()).sum()
    sd_exact = float((weights * (v.flatten() - mean) ** 2).sum().sqrt())
    covariance = (guide.rest.scale[:, None] * guide.rest.scale_tril).detach()
    sd_fit = float((covariance @ covariance.T)[1, 1].sqrt())
    assert 0.8 < sd_fit / sd_exact < 1.15


def test_the_higher_of_two_modes_is_found_from_several_starts() -> None:
    """Two narrow modes at 2 and -2, the second exp(3) times as high; the guide starts at the first."""

    def two_modes() -> None:
        u = pyro.sample("u", dist.Normal(torch.tensor(0.0, dtype=D), 3.0))
        humps = torch.stack([-((u - 2) ** 2) / 0.02, 3 - (u + 2) ** 2 / 0.02])
        pyro.factor("humps", torch.logsumexp(humps, 0))
        x = sample_path("x", sd.SDE(lambda t, x: -x, 0.5), torch.zeros(1, dtype=D), TS)
        pyro.sample("y", dist.Normal(x[..., 2::2, 0], 0.1).to_event(1), obs=Y)

    def found(starts: int) -> float:
        pyro.set_rng_seed(0)
        near = init_to_value(values={"u": torch.tensor(1.9, dtype=D)})
        guide = AutoPathGuide(
            two_modes,
            hidden=(),
            feedback="recomputed",
            rest=lambda m: AutoMultivariateNormal(m, init_loc_fn=near, init_scale=0.1),
        )
        return float(start_at_mode(guide, num_starts=starts))

    # the prior moves the modes by 2 * 0.01 / 9 towards zero
    assert abs(found(0) - 2) < 0.01
    assert abs(found(20) + 2) < 0.01


def test_bad_choices_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="no say"):
        AutoPathGuide(_model, feedback="recomputed", start="prior")
    with pytest.raises(InvalidInputError, match="feedback"):
        AutoPathGuide(_model, feedback="other")
    with pytest.raises(InvalidInputError, match="recomputed"):
        start_at_mode(AutoPathGuide(_model))
    with pytest.raises(InvalidInputError, match="normal law"):
        start_at_mode(_guide(AutoDelta))
    with pytest.raises(InvalidInputError, match="num_starts"):
        start_at_mode(_guide(), num_starts=-1)


@pytest.mark.parametrize("noise_space", [None, True])
def test_a_site_that_only_the_likelihood_knows_is_followed_draw_by_draw(noise_space: bool | None) -> None:
    """The path's equation is the same for all draws, its data are not: each draw has a path law of its own."""

    def model() -> None:
        sd_obs = pyro.sample("sd", dist.LogNormal(torch.tensor(-1.5, dtype=D), 0.7))
        x = sample_path(
            "x", sd.SDE(lambda t, x: -x, 0.5), torch.zeros(1, dtype=D), TS, noise_space=noise_space
        )
        pyro.sample("y", dist.Normal(x[..., 2::2, 0], sd_obs[..., None]).to_event(1), obs=Y)

    pyro.set_rng_seed(0)
    guide = AutoPathGuide(model, hidden=(), feedback="recomputed", rest=AutoMultivariateNormal)
    guide()
    with pyro.plate("particles", 6, dim=-1), torch.no_grad():
        drawn = pyro.poutine.trace(guide).get_trace()
        trace = pyro.poutine.trace(pyro.poutine.replay(model, drawn)).get_trace()
    trace.compute_log_prob()
    drawn.compute_log_prob()
    site = "x_dw" if noise_space else "x"
    weight = trace.nodes["y"]["log_prob"] + trace.nodes[site]["log_prob"] - drawn.nodes[site]["log_prob"]
    a, g = -torch.ones(1, 1, dtype=D), 0.5 * torch.ones(1, 1, dtype=D)
    law = linear_path(a, g, TS, torch.zeros(1, dtype=D))
    times = torch.arange(2, 21, 2)
    exact = torch.stack([law.evidence(Y, times, float(s)) for s in trace.nodes["sd"]["value"].flatten()])
    torch.testing.assert_close(weight, exact, rtol=0, atol=1e-8)
