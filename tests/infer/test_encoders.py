"""Networks of path guides: what the encoder sees, and a control that is zero before training."""

from __future__ import annotations

import pytest
import torch

from stochdyn.infer.encoders import LikelihoodEncoder

TS = torch.tensor([0.0, 0.2, 0.5, 1.0, 1.1])


def data(batch=(), dim=2):
    reference = torch.randn(5, *batch, dim)
    precision = torch.diag_embed(torch.rand(5, *batch, dim))
    return reference, precision, torch.randn(5, *batch, dim)


@pytest.mark.parametrize("batch", [(), (3,), (4, 3)])
def test_one_summary_a_time_and_series(batch):
    encoder = LikelihoodEncoder(2, 7)
    reference, precision, linear = data(batch)
    summary = encoder(TS, reference, precision, linear)
    assert summary.shape == (5, *batch, 7)
    if batch:
        first = (slice(None),) + (0,) * len(batch)
        alone = encoder(TS, reference[first], precision[first], linear[first])
        torch.testing.assert_close(alone, summary[first])


def test_summary_knows_what_follows_and_nothing_before():
    encoder = LikelihoodEncoder(2, 7)
    reference, precision, linear = data()
    before = encoder(TS, reference, precision, linear)
    linear = linear.clone()
    linear[2] += 1.0
    after = encoder(TS, reference, precision, linear)
    changed = ~torch.isclose(before, after, atol=1e-7).all(-1)
    assert changed.tolist() == [True, True, True, False, False]


def test_times_without_data_say_nothing():
    encoder = LikelihoodEncoder(1, 4)
    reference = torch.randn(5, 1)
    nothing = torch.zeros(5, 1, 1), torch.zeros(5, 1)
    other = encoder(TS, reference + 3.0, *nothing)
    torch.testing.assert_close(encoder(TS, reference, *nothing), other)


def test_data_enter_as_their_distance_from_the_reference():
    encoder = LikelihoodEncoder(1, 4)
    reference, y, precision = torch.randn(5, 1), torch.randn(5, 1), torch.full((5, 1, 1), 4.0)
    moved = encoder(TS, reference + 2.0, precision, 4.0 * (y + 2.0))
    torch.testing.assert_close(encoder(TS, reference, precision, 4.0 * y), moved, rtol=1e-4, atol=1e-5)
