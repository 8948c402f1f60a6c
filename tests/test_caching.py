"""Results that are kept are of use to any later call, whatever mode of torch the first one ran in."""

import pytest
import torch

import stochdyn as sd
from stochdyn._caching import cached
from stochdyn.fractional import FractionalOU, MarkovNoise


@cached(4)
def _kept(n: int) -> torch.Tensor:
    return torch.arange(float(n))


def _equation(a, noise=None):
    # Time stands in the drift, so that what is kept of the grid is part of the graph.
    return sd.SDE(lambda t, x: -a * x * t, 1.0, noise=noise)


def test_a_kept_answer_is_an_ordinary_tensor_on_the_cpu():
    with torch.inference_mode(), torch.device("meta"):
        value = _kept(3)
    assert not value.is_inference()
    assert value.device.type == "cpu"
    assert _kept(3) is value


def test_a_grid_that_was_divided_in_inference_mode_can_be_trained_on():
    ts, a = torch.linspace(0, 1, 5), torch.ones(1, requires_grad=True)
    law = sd.DiffusionMeasure(torch.ones(1), _equation(a), dt=0.05)
    with torch.inference_mode():
        law.sample(ts, 3)
    law.sample(ts, 3).x.sum().backward()
    assert torch.isfinite(a.grad).all()
    assert a.grad.abs() > 0


@pytest.mark.parametrize("kind", ["I", "II"])
def test_noise_that_was_built_in_inference_mode_can_be_learnt(kind):
    # A horizon of its own, so that nothing is known of it yet.
    options = {"horizon": 1.2345 + (kind == "I"), "dt": 0.1, "kind": kind, "learn_hurst": True}
    ts = torch.linspace(0, 1, 11)
    with torch.inference_mode():
        law = sd.DiffusionMeasure(torch.zeros(1), _equation(torch.ones(1), MarkovNoise(0.3, **options)))
        law.sample(ts, 3)
    noise = MarkovNoise(0.3, **options)
    sd.DiffusionMeasure(torch.zeros(1), _equation(torch.ones(1), noise)).sample(
        ts, 3
    ).x.square().sum().backward()
    assert torch.isfinite(noise.hurst_logit.grad)


def test_evidence_that_was_computed_in_inference_mode_can_be_differentiated():
    times, y = torch.linspace(0, 0.987, 7), torch.zeros(7)
    hurst = torch.tensor(0.2345, requires_grad=True)
    with torch.inference_mode():
        FractionalOU(1.0, 0.0, 1.0, 0.2345).log_evidence(times, y, 0.1)
    FractionalOU(1.0, 0.0, 1.0, hurst).log_evidence(times, y, 0.1).backward()
    assert torch.isfinite(hurst.grad)


def test_a_grid_made_in_inference_mode_may_change():
    with torch.inference_mode():
        ts = torch.linspace(0, 1, 5)
        law = sd.DiffusionMeasure(torch.ones(1), sd.SDE(lambda t, x: -x, 1e-9), dt=0.01)
        law.sample(ts)
        ts.mul_(2)
        assert float(law.sample(ts).x[-1]) == pytest.approx(2.718281828**-2, rel=0.02)
