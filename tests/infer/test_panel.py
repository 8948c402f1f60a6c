"""Panels: the same one from every form of data, rows filled up without moving anything, grids through all times."""

from __future__ import annotations

import warnings

import numpy as np
import pandas as pd
import pyro
import pyro.distributions as dist
import pytest
import torch

import stochdyn as sd
from stochdyn import testing
from stochdyn.errors import EmptyDataError, InvalidInputError, ShapeError, TimeGridError

FRAME = pd.DataFrame(
    {
        "who": ["b", "a", "a", "b", "b", "c"],
        "when": [0.0, 3.0, 1.0, 0.5, 2.0, 7.0],
        "y": [1.0, 4.0, np.nan, 2.0, 3.0, 5.0],
        "dose": [0.0, 1.0, 1.0, 0.0, 0.0, 2.0],
        "state": ["ill", "well", "ill", "well", None, "ill"],
    }
)
ARRAYS = {
    "times": [[0.0, 0.5, 2.0], [1.0, 3.0], [7.0]],
    "values": [[1.0, 2.0, 3.0], [float("nan"), 4.0], [5.0]],
}


def of_frame(frame=FRAME, **options) -> sd.Panel:
    return sd.Panel(frame, series="who", time="when", values="y", **options)


def contents(panel: sd.Panel) -> dict[str, torch.Tensor]:
    return {"times": panel.times, "values": panel.values, "lengths": panel.lengths}


def same(a: sd.Panel, b: sd.Panel) -> None:
    for name, value in contents(a).items():
        torch.testing.assert_close(contents(b)[name], value, equal_nan=True, check_dtype=False)


def test_a_frame_in_any_order_becomes_series_in_order_of_appearance():
    panel = of_frame(covariates=["dose"])
    assert panel.series == ("b", "a", "c")
    assert panel.lengths.tolist() == [3, 2, 1]
    assert panel.times[0].tolist() == [0.0, 0.5, 2.0]
    assert panel.covariates[1, :2, 0].tolist() == [1.0, 1.0]
    assert panel.seen[..., 0].sum() == 5
    assert panel.coords == {"who": ["b", "a", "c"]}
    assert "1 of 6 values missing" in repr(panel)
    assert bool((panel.times.diff(dim=-1) > 0).all())


def test_every_form_of_data_gives_the_same_panel():
    wanted = of_frame()
    same(wanted, of_frame({name: FRAME[name].tolist() for name in FRAME}))
    same(wanted, sd.Panel.from_arrays(**ARRAYS))
    same(
        wanted,
        sd.Panel.from_arrays(
            [np.array(t) for t in ARRAYS["times"]], [np.array(v)[:, None] for v in ARRAYS["values"]]
        ),
    )
    padded = {
        n: torch.tensor([[*row, *[float("nan")] * (3 - len(row))] for row in rows])
        for n, rows in ARRAYS.items()
    }
    testing.check_forms(
        lambda x: contents(sd.Panel.from_arrays(x, padded["values"]))["times"], padded["times"].double()
    )
    nullable = FRAME.assign(y=FRAME["y"].astype("Float64"))
    same(wanted, of_frame(nullable))


def test_xarray_in_wide_form():
    xarray = pytest.importorskip("xarray")
    values = xarray.DataArray(
        [[1.0, np.nan], [3.0, 4.0]],
        dims=("site", "t"),
        coords={"site": ["u", "v"], "t": [0.0, 2.0]},
        name="y",
    )
    panel = sd.Panel(values, series="site", time="t", values="y")
    assert panel.series == ("u", "v")
    assert panel.values.shape == (2, 2, 1)
    assert panel.seen.sum() == 3


def test_polars():
    polars = pytest.importorskip("polars")
    same(of_frame(), of_frame(polars.from_pandas(FRAME)))


def test_categories_are_read_as_positions():
    panel = sd.Panel(FRAME, "who", "when", ["y", "state"])
    assert panel.labels == {"state": ["ill", "well"]}
    assert panel.values[1, :2, 1].tolist() == [0.0, 1.0]
    assert torch.isnan(panel.values[0, 2, 1])


def test_dates_count_from_the_first_one_and_come_back():
    dates = pd.to_datetime(
        ["2020-01-03", "2020-01-01", "2020-01-02", "2020-02-01", "2020-03-01", "2021-01-01"]
    )
    panel = of_frame(FRAME.assign(when=dates), unit="week")
    assert panel.times[1, :2].tolist() == pytest.approx([0.0, 1 / 7])
    back = panel.dates(panel.times[1, :2])
    assert (back == dates.values[[1, 2]]).all()
    with pytest.raises(InvalidInputError, match="numbers"):
        of_frame().dates([0.0])


def test_dates_of_pandas_of_every_kind_and_columns_in_the_index():
    days = pd.to_datetime(
        ["2020-01-03", "2020-01-01", "2020-01-02", "2020-02-01", "2020-03-01", "2021-01-01"]
    )
    plain = of_frame(FRAME.assign(when=days))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        zoned = [days.tz_localize("Asia/Tokyo"), pd.Index(days.tz_localize("Asia/Tokyo"), dtype=object)]
        for dates in (*zoned, days.to_period("D"), days.to_pydatetime(), days.astype("datetime64[s]")):
            panel = of_frame(FRAME.assign(when=dates))
            torch.testing.assert_close(panel.times, plain.times, equal_nan=True)
        assert torch.equal(
            of_frame(FRAME.assign(when=zoned[0])).times_of(zoned[0][:2]), plain.times_of(days[:2])
        )
    levels = of_frame(FRAME.set_index(["who", "when"]))
    torch.testing.assert_close(levels.values, of_frame(FRAME).values, equal_nan=True)


def test_some_series_are_a_panel_again():
    panel = of_frame()
    some = panel[[2, 0]]
    assert some.series == ("c", "b")
    same(panel[1], panel[torch.tensor([False, True, False])])
    assert panel[1].times.shape == (1, 2)
    assert panel.to(torch.float64).values.dtype == torch.float64


@pytest.mark.parametrize("start", [None, 0.0, [-1.0, 0.0, 7.0]], ids=str)
@pytest.mark.parametrize("dt", [None, 0.25, 0.6])
def test_grids_go_through_all_times_in_equal_steps(dt, start):
    panel = of_frame()
    grid = panel.grid(dt, start)
    read = grid.read(grid.ts.unsqueeze(-1)).squeeze(-1)
    for k, count in enumerate(panel.lengths.tolist()):
        assert torch.equal(read[k, :count], panel.times[k, :count])
        end = int(grid.index[k, count - 1])
        steps = grid.ts[k].diff()
        assert bool((steps > 0).all())
        if dt is not None:
            assert bool((steps[:end] <= dt * (1 + 1e-9)).all())
    if start is not None:
        assert torch.equal(grid.ts[:, 0], torch.as_tensor(start, dtype=torch.float64).expand(3))


def test_the_grid_of_a_series_doesnt_depend_on_the_others_nor_on_units():
    panel = of_frame()
    whole, alone = panel.grid(0.3, 0.0), panel[0].grid(0.3, 0.0)
    size = alone.ts.shape[-1]
    torch.testing.assert_close(whole.ts[:1, :size], alone.ts)

    def in_units(unit: float) -> torch.Tensor:
        return sd.Panel.from_arrays(panel.times[:1] * unit, panel.values[:1]).grid(0.3 * unit, 0.0).ts / unit

    testing.check_units(in_units)


def test_a_panel_is_saved_and_loaded(tmp_path):
    panel = of_frame(FRAME.assign(when=pd.date_range("2020-01-01", periods=6)), covariates="dose")
    sd.save(panel, tmp_path / "panel")
    back = sd.load(tmp_path / "panel")
    same(panel, back)
    assert (back.dates([0.5]) == panel.dates([0.5])).all()


def test_a_model_reads_paths_and_observes_columns_by_the_panel():
    panel = sd.Panel(FRAME, series="who", time="when", values=["y"], covariates=["dose"])
    grid = panel.grid(dt=0.3)
    sde, initial = sd.SDE(lambda t, x: -x, 0.5), dist.Normal(torch.zeros(1), 1.0).to_event(1)

    def model():
        x = sd.infer.sample_path("x", sde, initial, grid)
        panel.observe("y", dist.Normal(panel.at(x)[..., 0], 0.15))

    trace = pyro.poutine.trace(model).get_trace()
    x = trace.nodes["x"]["value"]
    read = grid.read(x)[..., 0]
    expected = dist.Normal(read, 0.15).log_prob(panel.values[..., 0].nan_to_num())[panel.seen[..., 0]].sum()
    trace.compute_log_prob()
    torch.testing.assert_close(trace.nodes["y"]["log_prob"].sum(), expected)


def test_times_are_one_event_within_a_plate_of_the_series():
    panel = of_frame()

    def model():
        with pyro.plate("who", len(panel)):
            panel.observe("y", dist.Normal(torch.zeros(3, 3), 1.0))

    trace = pyro.poutine.trace(model).get_trace()
    trace.compute_log_prob()
    by_hand = dist.Normal(0.0, 1.0).log_prob(panel.values[..., 0].nan_to_num()) * panel.seen[..., 0]
    torch.testing.assert_close(trace.nodes["y"]["log_prob"], by_hand.sum(-1))


def test_a_model_without_its_plate_is_told_so_and_fitted_draw_by_draw():
    panel = of_frame()
    grid = panel.grid(dt=0.5)

    def model():
        k = pyro.sample("k", dist.LogNormal(0.0, 0.5))
        initial = dist.Normal(torch.zeros(1), 1.0).to_event(1)
        x = sd.infer.sample_path("x", sd.SDE(lambda t, x: -k[..., None, None] * x, 0.5), initial, grid)
        panel.observe("y", dist.Normal(panel.at(x)[..., 0], 0.15))

    guide = sd.infer.AutoPathGuide(model)
    with pytest.warns(sd.errors.StochdynWarning, match="plate"):
        result = sd.infer.fit_guide(model, guide, steps=3, progress=False)
    assert result.losses.isfinite().all()


def test_a_panel_knows_its_grids_and_no_others(tmp_path):
    panel = of_frame()
    grid = panel.grid(0.3)
    x = torch.randn(3, grid.ts.shape[-1], 2)
    assert torch.equal(panel.at(x), grid.read(x))
    own = torch.randn(3, panel.times.shape[-1], 1)
    assert torch.equal(panel.at(own), own)
    with pytest.raises(ShapeError, match="no grid of this panel"):
        panel.at(x[:, 1:])
    for other in (panel[:2], panel.to(torch.float64)):
        with pytest.raises(ShapeError, match="no grid of this panel"):
            other.at(x)
    sd.save(panel, tmp_path / "panel")
    assert torch.equal(sd.load(tmp_path / "panel").at(x), grid.read(x))
    with pytest.raises(InvalidInputError, match="name is unknown"):
        panel.observe("nothing", dist.Normal(0.0, 1.0))


def test_two_grids_of_one_length_are_not_taken_for_each_other():
    panel = sd.Panel.from_arrays([[0.0, 1.0, 3.0]], [[1.0, 2.0, 3.0]])
    coarse, shifted = panel.grid(1.0), panel.grid(2.0, start=-2.0)
    assert coarse.ts.shape == shifted.ts.shape
    with pytest.raises(InvalidInputError, match="two different grids"):
        panel.at(coarse.ts[..., None])


def test_reading_paths_broadcasts_and_refuses_other_grids():
    grid = of_frame().grid(0.5)
    x = torch.randn(4, 3, grid.ts.shape[-1], 2)
    assert torch.equal(grid.read(x)[1], grid.read(x[1]))
    with pytest.raises(ShapeError, match="grids"):
        grid.read(x[..., 1:, :])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"series": "nobody"}, InvalidInputError, "series isn't a column"),
        ({"time": 3}, InvalidInputError, "time must name"),
        ({"values": []}, InvalidInputError, "at least one"),
        ({"values": ["y", "y"]}, InvalidInputError, "twice"),
        ({"unit": "moon"}, InvalidInputError, "unit"),
        ({"frame": FRAME.iloc[:0]}, EmptyDataError, "no rows"),
        ({"frame": FRAME.assign(when=1.0)}, TimeGridError, "occurs twice in series 'b'"),
        ({"frame": FRAME.assign(when=[np.nan] + [1.0] * 5)}, TimeGridError, "no time"),
        ({"frame": FRAME.assign(who=[None] + ["a"] * 5)}, InvalidInputError, "names no series"),
        ({"frame": FRAME.assign(y=np.inf)}, InvalidInputError, "finite"),
        ({"frame": [1, 2]}, InvalidInputError, "data frame"),
    ],
)
def test_bad_frames_are_refused_by_name(change, error, words):
    options = {"frame": FRAME, "series": "who", "time": "when", "values": "y"} | change
    with pytest.raises(error, match=words):
        sd.Panel(**options)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"times": [[0.0, 1.0]]}, ShapeError),
        ({"times": [[0.0, 0.0, 1.0], [1.0, 3.0], [7.0]]}, TimeGridError),
        ({"times": [[0.0, 1.0], [1.0, 3.0], [7.0]]}, ShapeError),
        ({"values": []}, EmptyDataError),
        ({"series": ["a", "a", "b"]}, InvalidInputError),
        ({"columns": ["a", "b"]}, InvalidInputError),
        ({"values": "abc"}, InvalidInputError),
    ],
)
def test_bad_arrays_are_refused(change, error):
    with pytest.raises(error):
        sd.Panel.from_arrays(**(ARRAYS | change))


def test_a_start_after_the_data_and_a_step_of_zero_are_refused():
    with pytest.raises(TimeGridError, match="start"):
        of_frame().grid(start=0.2)
    with pytest.raises(InvalidInputError, match="dt"):
        of_frame().grid(dt=0.0)
