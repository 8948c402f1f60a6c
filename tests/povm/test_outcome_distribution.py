"""A state as a Pyro distribution: shapes, law, enumeration, and its place in a model."""

from __future__ import annotations

import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO

from stochdyn.core import all_configurations, encode
from stochdyn.errors import ShapeError
from tests.povm.laws import table, transformer


def test_shapes_and_log_probabilities() -> None:
    net = transformer(1)
    law = net.distribution()
    assert (law.batch_shape, law.event_shape) == (torch.Size(), torch.Size([4]))
    x = law.expand([3]).sample((5,))
    assert x.shape == (5, 3, 4)
    assert torch.allclose(law.log_prob(x).reshape(-1), net.log_prob(x.reshape(-1, 4)))
    assert law.expand([3]).log_prob(x).shape == (5, 3)
    assert law.sample((0,)).shape == (0, 4)
    with pytest.raises(ShapeError, match="one outcome for each site"):
        law.log_prob(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="within the support"):
        law.log_prob(torch.full((2, 4), 7))


def test_enumeration_lists_the_whole_law() -> None:
    law = transformer(2).distribution()
    every = law.enumerate_support()
    assert every.shape == (256, 4)
    assert float(law.log_prob(every).exp().sum().detach()) == pytest.approx(1.0, abs=1e-10)
    assert law.expand([2]).enumerate_support(expand=False).shape == (256, 1, 4)


def test_samples_under_pyro_s_seed_follow_the_law() -> None:
    net = transformer(1)
    pyro.set_rng_seed(0)
    x = net.distribution().sample((20000,))
    counts = torch.bincount(encode(x, 4), minlength=256).double() / 20000
    p = net.probabilities()
    assert float(((counts - p).abs() / (p / 20000).sqrt()).max()) < 5.5


def test_an_ansatz_is_fitted_to_measurement_records_by_pyro() -> None:
    """Maximum likelihood by SVI brings the divergence from the records' law down to what their number allows."""
    torch.manual_seed(0)
    truth = transformer(1)
    records = truth.sample(4000, generator=torch.Generator().manual_seed(1))[0]
    net = table()

    def model(x):
        pyro.module("state", net)
        with pyro.plate("records", len(x)):
            pyro.sample("outcomes", net.distribution(), obs=x)

    svi = SVI(model, lambda x: None, pyro.optim.Adam({"lr": 0.05}), Trace_ELBO())
    losses = [svi.step(records) for _ in range(300)]
    assert losses[-1] < losses[0]
    p, q = truth.probabilities(), net.probabilities()
    divergence = float((p * (p / q).log()).sum())
    assert divergence < 3 * 255 / (2 * 4000)
    assert all_configurations(4, 4).shape[0] == 256
