"""Batches of series with times of their own and missing values, and what the encoder makes of them."""

from __future__ import annotations

import pytest
import torch

from stochdyn.errors import EmptyDataError, InvalidInputError, NonFiniteError, ShapeError, TimeGridError
from stochdyn.fractional import Series
from stochdyn.fractional.latent import SeriesEncoder

NAN = float("nan")


def _two() -> Series:
    return Series.of(
        [
            (torch.tensor([0.1, 0.4, 0.9]), torch.tensor([[1.0, NAN], [2.0, 3.0], [NAN, 4.0]])),
            (torch.tensor([0.5]), torch.tensor([[5.0, 6.0]])),
        ]
    )


def test_series_are_padded_and_masked() -> None:
    series = _two()
    assert len(series) == 2
    assert series.values.shape == (2, 3, 2)
    torch.testing.assert_close(series.times[1], torch.tensor([0.5, 0.5, 0.5]))
    assert series.mask[1].tolist() == [[True, True], [False, False], [False, False]]
    assert bool(torch.isfinite(series.values).all())


def test_the_context_depends_on_later_observations_alone() -> None:
    torch.manual_seed(0)
    encoder, ts = SeriesEncoder(2, 8), torch.linspace(0, 1, 11)
    series = _two()
    context = encoder(series, ts)
    assert context.shape == (11, 2, encoder.width)
    changed = series.values.clone()
    changed[0, 1] += 1.0  # at 0.4
    other = encoder(Series(series.times, changed, series.mask), ts)
    gap = (context - other).detach().abs().amax(-1)
    assert bool((gap[:5, 0] > 1e-6).all())
    assert float(gap[5:, 0].max()) == 0.0
    assert float(gap[:, 1].max()) == 0.0


def test_missing_values_and_padding_are_not_read() -> None:
    torch.manual_seed(0)
    encoder, ts = SeriesEncoder(2, 8), torch.linspace(0, 1, 11)
    series = _two()
    values = torch.where(series.mask, series.values, torch.full_like(series.values, 7.0))
    torch.testing.assert_close(encoder(series, ts), encoder(Series(series.times, values, series.mask), ts))
    alone = Series.of([(torch.tensor([0.5]), torch.tensor([[5.0, 6.0]]))])
    after = ts > 0.5
    torch.testing.assert_close(encoder(series, ts)[after, 1, 8:], encoder(alone, ts)[after, 0, 8:])


def test_gradients_reach_the_encoder() -> None:
    encoder = SeriesEncoder(2, 8)
    encoder(_two(), torch.linspace(0, 1, 11)).sum().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_bad_series() -> None:
    t, v = torch.tensor([0.1, 0.2]), torch.tensor([1.0, 2.0])
    with pytest.raises(EmptyDataError):
        Series.of([])
    with pytest.raises(EmptyDataError, match="no observed value"):
        Series.of([(t, torch.full((2,), NAN))])
    with pytest.raises(NonFiniteError):
        Series.of([(t, torch.tensor([1.0, float("inf")]))])
    with pytest.raises(TimeGridError):
        Series.of([(t.flip(0), v)])
    with pytest.raises(ShapeError, match="length"):
        Series.of([(t, v[:1])])
    with pytest.raises(ShapeError, match="components"):
        Series.of([(t, v), (t, torch.ones(2, 2))])
    with pytest.raises(TimeGridError, match="beyond the grid"):
        Series.of([(t, v)]).check_within(torch.linspace(0, 0.15, 4))
    with pytest.raises(InvalidInputError, match="boolean"):
        Series(t[None], v[None, :, None], torch.ones(1, 2, 1)).check_within(torch.linspace(0, 1, 4))
    with pytest.raises(ShapeError):
        Series.regular(t, torch.zeros(2, 3, 1))


def test_series_take_lists_and_numpy_and_refuse_what_is_not_a_pair() -> None:
    import numpy as np

    times, values = [0.1, 0.5], [[1.0, float("nan")], [2.0, 3.0]]
    here = Series.of([(torch.tensor(times), torch.tensor(values))])
    for there in (Series.of([(times, values)]), Series.of([(np.array(times), np.array(values))])):
        assert torch.equal(here.mask, there.mask)
        assert torch.equal(here.values.double(), there.values.double())
    for wrong in (None, 3, "x", [1.0, 2.0]):
        with pytest.raises(InvalidInputError):
            Series.of(wrong)  # type: ignore[arg-type]
