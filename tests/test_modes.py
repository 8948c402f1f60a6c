"""Answers are the same in every mode of torch: derivatives along the way don't depend on whether the caller records."""

import functools
import re
from functools import cache
from pathlib import Path

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import stochdyn as sd
from stochdyn import bridges, fractional, interpolants, jumps, povm, vectorfields
from stochdyn.core import FokkerPlanck, divergence, gradient, laplacian
from stochdyn.errors import InvalidInputError

D = torch.float64


def _network(d=2):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(d, 8), nn.Tanh(), nn.Linear(8, d)).double()


NET = _network()
X = torch.randn(4, 2, dtype=D, generator=torch.Generator().manual_seed(1))
TIMES = torch.linspace(0, 0.2, 4, dtype=D)


@cache
def _generator():
    base = torch.distributions.MultivariateNormal(torch.zeros(2, dtype=D), torch.eye(2, dtype=D))
    it = interpolants.Interpolant((lambda t: 1 - t**2, lambda t: t**2), "brownian")
    fields = {"velocity": lambda t, x: NET(x) * t, "score": lambda t, x: -x}
    return interpolants.InterpolantRegression(it, base=base, **fields).generator()


@cache
def _mixture():
    law = interpolants.GaussianMixture(torch.tensor([0.5, 0.5], dtype=D), X[:2], 0.3)
    return interpolants.GaussianMixtureInterpolant(interpolants.Interpolant("linear"), None, law)


@cache
def _diffusion():
    torch.manual_seed(0)
    potential = interpolants.PotentialNetwork(interpolants.VP(), 2, 8, 1, zero_last=False).double()
    return interpolants.ScoreMatching(interpolants.VP(), potential=potential)


@cache
def _multiplicative():
    sde = sd.SDE(lambda t, x: NET(x) - x, lambda t, x: sd.Diagonal(1 + x.square()))
    return sd.DiffusionMeasure(torch.zeros(2, dtype=D), sde, method="milstein")


@cache
def _stratonovich():
    sde = sd.SDE(lambda t, x: NET(x) - x, lambda t, x: sd.Diagonal(1 + x.square()), stratonovich=True)
    return sd.DiffusionMeasure(torch.zeros(2, dtype=D), sde)


@cache
def _jumps():
    law = jumps.JumpMeasure(torch.tensor([0.5, 0.5], dtype=D), [[0.0, 1.0], [2.0, 0.0]])
    return law.conditioned([0.1, 0.5], [0, 1], jumps.Exact(2))


@cache
def _potential_drift():
    torch.manual_seed(0)
    drift = bridges.PotentialDrift(2).double()
    return sd.DiffusionMeasure(torch.zeros(2, dtype=D), sd.SDE(drift, 0.5))


@cache
def _schedule():
    return interpolants.CustomSchedule(lambda t: t**3)


ANSWERS = {
    "divergence": lambda x: divergence(NET, x),
    "probed divergence": lambda x: divergence(NET, x, "hutchinson", generator=0),
    "gradient": lambda x: gradient(lambda y: NET(y).square().sum(-1), x),
    "laplacian": lambda x: laplacian(lambda y: NET(y).square().sum(-1), x),
    "residual of a flow": lambda x: _mixture().residual(
        torch.tensor(0.4, dtype=D), x, FokkerPlanck(sd.SDE(lambda t, y: NET(y), 0.3))
    ),
    "derivative of a schedule": lambda x: _schedule().derivative(x),
    "paths of multiplicative noise": lambda x: _multiplicative().sample(TIMES, 3, generator=0).x,
    "paths in a potential": lambda x: _potential_drift().sample(TIMES, 3, generator=0).x,
    "density of a flow": lambda x: _generator().log_prob(x, num_steps=3),
    "draws of a flow": lambda x: _generator().sample(4, epsilon=0.3, num_steps=3, x0=x, generator=0),
    "density of an SDE": lambda x: _generator().sde_log_prob(x, 0.5, num_steps=3, generator=0).log_prob,
    "a noise distribution": lambda x: _generator().distribution(num_steps=3).log_prob(x),
    "a residual": lambda x: _diffusion().fokker_planck_residual(torch.tensor(0.4, dtype=D), x),
    "density of a diffusion": lambda x: _diffusion().generator().log_prob(x, num_steps=3),
    "draws of a diffusion": lambda x: _diffusion().generator().sample(4, num_steps=3, generator=0),
    "score of a learned flow": lambda x: _diffusion().flow().score(torch.tensor(0.4, dtype=D), x),
    "paths in Stratonovich's sense": lambda x: _stratonovich().sample(TIMES, 3, generator=0).x,
    "posterior jumps": lambda x: _jumps().expected_statistics(1.0)[0],
    "a fitted Hurst index": lambda x: torch.tensor(
        fractional.fit_fgn(x.repeat(3, 1).flatten()).hurst, dtype=D
    ),
    "gauge residual": lambda x: interpolants.gauge_residual(lambda t, y: NET(y), lambda t, y: -y, 0.4, x),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_inference_mode_changes_no_answer(name):
    answer = ANSWERS[name]
    expected = answer(X).detach()
    with torch.no_grad():
        torch.testing.assert_close(answer(X), expected)
    with torch.inference_mode():
        torch.testing.assert_close(answer(X), expected)
        made_inside = X * 1
        torch.testing.assert_close(answer(made_inside), expected)
    with torch.no_grad():  # torch itself refuses such tensors wherever weights are recorded
        torch.testing.assert_close(answer(made_inside), expected)


def _sphere():
    points = nn.functional.normalize(
        torch.randn(60, 3, dtype=D, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    return points, torch.linalg.cross(torch.tensor([[0.0, 0.0, 1.0]], dtype=D).expand_as(points), points)


def _field():
    points, vectors = _sphere()
    cloud = vectorfields.PointCloud(points, dim=2)
    return vectorfields.RVGP(cloud).fit(range(60), vectors, progress=False).predict_mean([0, 1])


def _state():
    model = povm.Lindbladian(1, [(1.0, "X", 0)], [(1.0, "sigma-", 0)])
    records = povm.simulate_records(model, povm.Pauli6(), "up", [0.5], 200, generator=0)
    return povm.tomography(records, povm.Pauli6(), progress=False).state


def _rates():
    table = {"id": [0] * 4 + [1] * 4, "t": [0.0, 1, 2, 3] * 2, "s": [0, 1, 1, 0, 0, 0, 1, 1]}
    panel = jumps.PanelData(table, subject="id", time="t", state="s")
    return torch.as_tensor(np.asarray(jumps.fit_rates(panel).rates))


@pytest.mark.parametrize("fitted", [_field, _state, pytest.param(_rates, marks=pytest.mark.slow)])
def test_fits_work_where_nothing_is_recorded(fitted):
    with torch.no_grad():
        found = fitted()
    torch.testing.assert_close(found, fitted(), rtol=1e-5, atol=1e-8)


def _evolution():
    frame, model = povm.Tetrahedral(), povm.Lindbladian(1, [(1.0, "X", 0)], [(1.0, "sigma-", 0)])
    return povm.FullTable(1).double().set_product_state(frame, "up"), model, frame


def _evolved(net, model, frame):
    return povm.evolve(net, model, frame, [0.0, 0.2], num_samples=None, progress=False).expect["Z"]


def _steady(net, model, frame):
    found = povm.steady_state(net, model, frame, num_samples=None, progress=False)
    return torch.tensor(found.expect["Z"])


def _inferred():
    model = povm.Lindbladian(1, [("g", "X", 0)])
    records = povm.simulate_records(model.bind(g=0.5), povm.Tetrahedral(), "up", [0.5, 1.0], 100, generator=0)
    prior = {"g": dist.LogNormal(0.0, 1.0)}
    return lambda: torch.as_tensor(
        povm.infer_parameters(
            records, model, povm.Tetrahedral(), "up", prior, steps=10, num_draws=100, progress=False
        ).posterior["g"].values
    )  # fmt: skip


def _refined():
    torch.manual_seed(0)
    snaps = bridges.Snapshots([0.0, 1.0], [X[:, :1], X[:, 1:] + 1])
    family = bridges.NeuralDrift(1, 4)
    return lambda: bridges.refine(
        snaps, family, diffusion=1.0, max_iterations=1, method=bridges.Sinkhorn(projection=bridges.Adam(steps=2)), progress=False
    ).measure.marginal(0.5).mean  # fmt: skip


def _trend():
    trend = bridges.DensityTrend(bridges.Snapshots([0.0, 1.0], [X, X + 1]), length=1.0)
    return lambda: trend.fit().weight


@pytest.mark.parametrize(
    "prepared",
    [
        lambda: functools.partial(_evolved, *_evolution()),
        lambda: functools.partial(_steady, *_evolution()),
        _inferred,
        _refined,
        _trend,
    ],
    ids=["evolve", "steady_state", "infer_parameters", "refine", "trend"],
)
def test_fits_work_in_inference_mode(prepared):
    run = prepared()
    with torch.inference_mode():
        found = run()
    torch.testing.assert_close(found, prepared()(), rtol=1e-5, atol=1e-8)


def test_a_state_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        state = _evolution()
    with pytest.raises(InvalidInputError, match="inference mode"):
        _evolved(*state)


def test_what_was_made_in_inference_mode_is_not_trained_in_silence():
    with torch.inference_mode():
        net = interpolants.FieldNetwork(2)
        objective = interpolants.InterpolantRegression(
            interpolants.Interpolant("one-sided-linear"), velocity=net
        )
    with pytest.raises(InvalidInputError, match="inference mode"):
        sd.fit(objective, X.float(), steps=1, progress=False)


def test_derivatives_are_taken_in_one_way():
    root = Path(sd.__file__).parent
    found = [
        str(path.relative_to(root))
        for path in root.rglob("*.py")
        if re.search(r"torch\.enable_grad\(\)", path.read_text())
    ]
    # ``recording`` does the same where there is no inference mode, and works there too
    assert found == ["_transforms.py"]
