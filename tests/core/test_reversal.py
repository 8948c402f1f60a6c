"""Time reversal with parities and controls: the entropy that a law produces, against exact values."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

import stochdyn as sd
from stochdyn.errors import DiffusionMismatchError, InvalidInputError
from tests.core.laws import F64

PARITY = (1.0, -1.0)


def oscillator(noise: float = 2**0.5) -> sd.DiffusionMeasure:
    """A damped oscillator in equilibrium: it produces no entropy, but only if its velocity is odd."""
    start = MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    matrix = torch.tensor([[0.0], [noise]], dtype=F64)
    return sd.DiffusionMeasure(
        start, sd.SDE(lambda t, z: torch.stack([z[..., 1], -z[..., 0] - z[..., 1]], -1), matrix)
    )


def score(t: Tensor, x: Tensor) -> Tensor:
    return -x


def test_an_equilibrium_with_odd_velocities_produces_no_entropy() -> None:
    law = oscillator()
    reverse = law.reverse(score, 1.0, law.initial, PARITY)
    backward = law.backward(1.0, law.initial, PARITY)
    x = torch.randn(5, 2, dtype=F64)
    torch.testing.assert_close(reverse.drift(0.3, x), backward.drift(0.3, x))
    ts = torch.linspace(0, 1, 51, dtype=F64)
    assert abs(float(reverse.kl(backward, ts, 100, 0).mean)) < 1e-12
    observed = law.sample(ts, 50, 0).reversed(PARITY)
    assert float(reverse.log_rn(observed, backward).abs().max()) < 1e-9


def test_parity_is_needed_where_noise_reaches_the_velocity_alone() -> None:
    law = oscillator()
    even = law.reverse(score, 1.0, law.initial)
    with pytest.raises(DiffusionMismatchError, match="without noise"):
        even.kl(law.backward(1.0, law.initial), torch.linspace(0, 1, 11, dtype=F64), 10, 0)


@pytest.mark.parametrize("controlled", [False, True])
def test_a_rotating_law_produces_the_entropy_of_its_current(controlled: bool) -> None:
    """sigma = 2 w^2 for dX = (-X + w J X) dt + sqrt(2) dW, whether the rotation is drift or control."""
    w = 1.5

    def rotation(t: Tensor, x: Tensor) -> Tensor:
        return w * torch.stack([x[..., 1], -x[..., 0]], -1)

    start = MultivariateNormal(torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64))
    if controlled:
        base = sd.DiffusionMeasure(start, sd.SDE(lambda t, x: -x, 2**0.5))
        law = base.controlled(lambda t, x: rotation(t, x) / 2**0.5)
    else:
        law = sd.DiffusionMeasure(start, sd.SDE(lambda t, x: -x + rotation(t, x), 2**0.5))
    reverse, backward = law.reverse(score, 1.0, law.initial), law.backward(1.0, law.initial)
    estimate = reverse.kl(backward, torch.linspace(0, 1, 201, dtype=F64), 4000, 0)
    # The Euler law of step h has a variance larger by 1 + O(h), and its entropy with it.
    assert abs(float(estimate.mean) - 2 * w**2) < 5 * float(estimate.stderr) + 0.1


def test_the_reflected_start_is_the_law_of_the_reflected_state() -> None:
    centre = torch.tensor([1.0, 2.0], dtype=F64)
    start = MultivariateNormal(centre, torch.eye(2, dtype=F64))
    law = sd.DiffusionMeasure(start, oscillator().sde).backward(1.0, start, PARITY)
    x = law.initial.draw((2000,), torch.Generator().manual_seed(0))
    signs = torch.tensor(PARITY, dtype=F64)
    assert bool(((x.mean(0) - centre * signs).abs() < 5 / 2000**0.5).all())
    torch.testing.assert_close(law.initial.log_prob(x), start.log_prob(x * signs))


def test_bad_parities_are_refused() -> None:
    law = oscillator()
    for bad in ((1.0, 0.5), (1.0,), (1.0, -1.0, 1.0), "odd"):
        with pytest.raises(InvalidInputError, match="parity"):
            law.reverse(score, 1.0, law.initial, bad)
    mixed = sd.DiffusionMeasure(law.initial, sd.SDE(score, torch.tensor([[1.0, 0.5], [0.0, 1.0]], dtype=F64)))
    with pytest.raises(InvalidInputError, match="both directions"):
        mixed.reverse(score, 1.0, law.initial, PARITY)
