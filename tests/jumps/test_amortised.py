"""The network for rates: symmetry, units, calibration, the ratchet it has never seen, and data unlike its training."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stochdyn.errors import InvalidInputError, SystemSizeError
from stochdyn.jumps import AmortisedRates, PanelData, transition
from stochdyn.jumps.amortised import WEIGHTS


@pytest.fixture(scope="module")
def network() -> AmortisedRates:
    return AmortisedRates.load()


def simulated(rates: np.ndarray, series: int, length: int, dt: float, seed: int = 0) -> np.ndarray:
    p = transition(torch.as_tensor(rates), dt)
    source = torch.Generator().manual_seed(seed)
    state = torch.randint(len(rates), (series,), generator=source)
    states = [state]
    for _ in range(length - 1):
        state = torch.multinomial(p[state], 1, generator=source)[:, 0]
        states.append(state)
    return torch.stack(states, -1).numpy()


def panel_of(states: np.ndarray, dt: float, num_states: int) -> PanelData:
    series, length = states.shape
    frame = {
        "id": np.repeat(np.arange(series), length),
        "t": np.tile(np.arange(length) * dt, series),
        "s": states.reshape(-1),
    }
    return PanelData(frame, "id", "t", "s", labels=range(num_states))


def ratchet() -> np.ndarray:
    """The discrete flashing ratchet at unit potential, switching and free rates."""
    q = np.zeros((6, 6))
    for i in range(3):
        for j in range(3):
            if i != j:
                q[i, j], q[3 + i, 3 + j] = math.exp(-(j - i) / 2), 1.0
        q[i, 3 + i] = q[3 + i, i] = 1.0
    return q


def test_relabelling_relabels_and_other_units_rescale(network: AmortisedRates) -> None:
    states = simulated(ratchet(), 40, 60, 0.05)
    order = np.array([3, 1, 5, 0, 2, 4])
    one = network.posterior(panel_of(states, 0.05, 6))
    other = network.posterior(panel_of(np.argsort(order)[states], 0.05, 6))
    torch.testing.assert_close(other.log_mean, one.log_mean[order][:, order], rtol=0, atol=1e-5)
    torch.testing.assert_close(other.link_probs, one.link_probs[order][:, order], rtol=0, atol=1e-5)
    slow = network.posterior(panel_of(states, 0.05 * 1e9, 6))
    torch.testing.assert_close(slow.rates * 1e9, one.rates, rtol=1e-4, atol=0)


def test_the_flashing_ratchet_is_recovered_without_training_on_it(network: AmortisedRates) -> None:
    """Root mean square error at most 0.10 over all 30 rates; the published network has 0.165 on such data."""
    truth, off = ratchet(), ~np.eye(6, dtype=bool)
    errors = []
    for seed in range(6):
        panel = panel_of(simulated(truth, 300, 100, 2.5 / 99, seed), 2.5 / 99, 6)
        posterior = network.posterior(panel)
        assert posterior.outside == []
        errors.append((posterior.rates.numpy() - truth)[off])
    assert np.sqrt(np.mean(np.square(errors))) < 0.10


@pytest.mark.parametrize("num_states", [2, 5, 8])
@pytest.mark.parametrize("label_error", [0.0, 0.1, None])
def test_intervals_cover(network: AmortisedRates, num_states: int, label_error: float | None) -> None:
    """At a label error that is told, and over those of the training, drawn for each data set, of which half aren't told."""
    source = torch.Generator().manual_seed(7)
    num = 600 if num_states == 2 else 120
    data = network.prior.sample(num_states, num, source, num_series=100, length=50, label_error=label_error)
    with torch.no_grad():
        out = network.encoder(data.seen)
    z = ((data.log_rates - out.mean) / out.log_std.exp())[data.links]
    for level in (0.5, 0.8, 0.95):
        half = math.sqrt(2) * float(torch.erfinv(torch.tensor(level)))
        share = float((z.abs() < half).double().mean())
        # .03, and three standard errors with an effective number of three rates per data set
        assert abs(share - level) < 0.03 + 3 * math.sqrt(level * (1 - level) / (num * min(3, num_states - 1)))


def test_data_unlike_the_training_are_named(network: AmortisedRates) -> None:
    panel = panel_of(simulated(ratchet(), 3, 30, 0.05), 0.05, 6)
    assert any("series" in text for text in network.posterior(panel).outside)
    coarse = panel_of(simulated(ratchet(), 30, 50, 5.0), 5.0, 6)
    assert any("holds a jump" in text for text in network.posterior(coarse).outside)
    assert "Beware" in network.posterior(coarse).report()
    with pytest.raises(SystemSizeError, match="too many states"):
        network.posterior(panel_of(np.arange(40).reshape(2, 20) % 9, 1.0, 9))
    frame = {"id": [1, 1, 1], "t": [0.0, 1.0, 2.0], "s": [0, 1, 2]}
    with pytest.raises(InvalidInputError, match="exact times"):
        network.posterior(PanelData(frame, "id", "t", "s", exact_entry=[2]))


def test_draws_are_generators(network: AmortisedRates) -> None:
    posterior = network.posterior(panel_of(simulated(ratchet(), 40, 60, 0.05), 0.05, 6))
    draws = posterior.sample(500, 0)
    torch.testing.assert_close(draws.sum(-1), torch.zeros(500, 6, dtype=draws.dtype), rtol=0, atol=1e-10)
    linked = (draws > 0).double().mean(0)
    error = (posterior.link_probs * (1 - posterior.link_probs) / 500).sqrt()
    assert ((linked - posterior.link_probs).abs() < 5 * error + 1e-9).all()


def test_weights_are_small() -> None:
    from importlib.resources import files

    assert len((files("stochdyn.jumps") / WEIGHTS).read_bytes()) < 1_000_000


def test_training_lowers_the_loss() -> None:
    from stochdyn.jumps import JumpPrior, RateEncoder
    from stochdyn.run import fit

    torch.manual_seed(0)
    prior = JumpPrior(num_states=(2, 3), num_series=(5, 20), length=(20, 30))
    network = AmortisedRates(RateEncoder(width=16, num_rounds=1), prior, batch_size=8)
    result = fit(network, steps=60, lr=5e-3, progress=False, log_every=1)
    losses = torch.as_tensor(result.losses, dtype=torch.float64)
    assert losses[-15:].mean() < losses[:15].mean() - 0.2
