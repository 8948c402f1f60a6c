"""Points may be arrays, tables and lists wherever laws, fields and estimates are asked for their values there."""

from __future__ import annotations

from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from stochdyn import bridges, interpolants
from stochdyn.core import conservativity
from stochdyn.testing import check_forms

F64 = torch.float64
POINTS = torch.randn(6, 2, dtype=F64, generator=torch.Generator().manual_seed(0))
NORMAL = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))


def _swirl(t, x):
    return x @ torch.tensor([[-1.0, 1.0], [-1.0, -2.0]], dtype=x.dtype)


@cache
def _bridge():
    return bridges.SchrodingerBridge(
        bridges.Snapshots([0.0, 1.0], [POINTS, POINTS + 1]), diffusion=1.0
    ).solve()


@cache
def _trend():
    return bridges.DensityTrend(bridges.Snapshots([0.0, 1.0], [POINTS, POINTS + 1])).fit()


@cache
def _model():
    it = interpolants.Interpolant("linear")
    return interpolants.InterpolantRegression(it, velocity=_swirl, score=lambda t, x: -x, base=NORMAL)


@cache
def _mixture():
    law = interpolants.GaussianMixture([0.5, 0.5], [[0.0, 1.0], [1.0, 0.0]], 0.3)
    return interpolants.GaussianMixtureInterpolant(interpolants.Interpolant("linear"), None, law).double()


@cache
def _potential():
    torch.manual_seed(0)
    return interpolants.PotentialNetwork(interpolants.VP(), 2, 8, 1, zero_last=False).double()


@cache
def _diffusion():
    return interpolants.ScoreMatching(interpolants.VP(), potential=_potential())


def _gaussian():
    zero, eye = torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)
    return bridges.GaussianBridge(zero, eye, zero + 1, eye, 0.5, 1.0)


def _drawn(axes):
    return torch.as_tensor(axes.collections[0].get_offsets().data)


@pytest.fixture(autouse=True)
def double():
    """Lists have the precision of torch's default, that of the laws here."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(F64)
    yield
    torch.set_default_dtype(before)


ANSWERS = {
    "drift of a bridge": lambda x: _bridge().drift(0.3, x),
    "velocity of a bridge": lambda x: _bridge().velocity(0.3, x),
    "growth of a bridge": lambda x: _bridge().growth_rate(0.3, x),
    "density of a bridge": lambda x: _bridge().marginal(0.3).log_prob(x),
    "drift between Gaussians": lambda x: _gaussian().drift(0.3, x),
    "density between Gaussians": lambda x: _gaussian().marginal(0.3).log_prob(x),
    "trend": lambda x: _trend().log_ratio(x, 1.0, 0.0),
    "rate of a trend": lambda x: _trend().rate(x, 0.5),
    "drift of a generator": lambda x: _model().generator().drift(0.3, x, 0.1),
    "bound of a generator": lambda x: _model().kl_bound(x, x, 0.5, generator=0).mean,
    "point on a path": lambda x: _model().interpolant.sample(0.3, x, x, x),
    "partners": lambda x: interpolants.ExactCoupling().pair(x, x),
    "exact density": lambda x: _mixture().log_prob(0.3, x),
    "exact velocity": lambda x: _mixture().velocity(0.3, x),
    "exact noise": lambda x: _mixture().noise_prediction(0.3, x),
    "score": lambda x: _diffusion().score(0.3, x),
    "residual": lambda x: _diffusion().fokker_planck_residual(0.3, x),
    "flow of a diffusion": lambda x: _diffusion().generator().flow(x, num_steps=3),
    "evidence": lambda x: (
        interpolants.evidence_bound(_potential(), x, NORMAL, num_draws=2, generator=0).value
    ),
    "density by paths": lambda x: (
        interpolants.feynman_kac_log_density(
            _potential(), x, NORMAL, num_steps=3, num_particles=2, generator=0
        ).value
    ),
    "conservativity": lambda x: conservativity(_swirl, 0.3, x, generator=0).share,
    "dimension": lambda x: interpolants.intrinsic_dimension(_swirl, 0.3, x, 1.0),
    "gauge": lambda x: interpolants.gauge_residual(_swirl, lambda t, x: -x, 0.3, x),
    "distance of histograms": lambda x: interpolants.histogram_w2(x, POINTS + 0.5, bins=8),
    "picture of paths": lambda x: _drawn(interpolants.plot_trajectories(np.stack([np.asarray(x)] * 2))),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_points_of_any_form_give_the_same_answer(name: str) -> None:
    check_forms(lambda x: torch.as_tensor(ANSWERS[name](x)), POINTS)
    plt.close("all")


@pytest.mark.parametrize(
    "make",
    [
        lambda form: (
            interpolants.GaussianMixture(form([0.3, 0.7]), form([[0.0], [1.0]]), form([0.1, 0.2])).means
        ),
        lambda form: (
            interpolants.WhitenedField(
                interpolants.Interpolant("linear"),
                "velocity",
                form([0.0]),
                form([1.0]),
                form([2.0]),
                form([1.0]),
            ).mean1
        ),
        lambda form: bridges.LambOseen(2, form([[0.0, 0.0], [1.0, 1.0]])).centres,
        lambda form: bridges.NeuralDrift(2, 4, centre=form([0.0, 1.0]), scale=form([1.0, 2.0])).scale,
    ],
    ids=["mixture", "whitened", "vortices", "network"],
)
def test_parameters_of_any_form_make_the_same_object(make) -> None:
    wanted = make(torch.tensor)
    torch.testing.assert_close(make(lambda v: v), wanted)
    torch.testing.assert_close(make(lambda v: torch.tensor(v).numpy()), wanted)
