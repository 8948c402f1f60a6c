"""Tests of the small tables of real data."""

import math

import pytest
import torch

from stochdyn import datasets


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("hudson_bay", 21, ["year", "hare", "lynx"]),
        ("rio_negro", 1080, ["year", "month", "height"]),
        ("single_molecules", 5071, ["track", "frame", "x", "y"]),
        ("school_influenza", 14, ["day", "in_bed", "convalescent"]),
        ("stock_indices", 1860, ["day", "DAX", "SMI", "CAC", "FTSE"]),
        ("sunspots", 309, ["year", "number"]),
        ("sitka_spruces", 395, ["tree", "day", "ozone", "size"]),
        ("theophylline", 132, ["subject", "weight", "dose", "time", "concentration"]),
    ],
)
def test_a_table_has_its_rows_and_a_number_in_each_cell(name, rows, columns):
    table = getattr(datasets, name)()
    assert list(table) == columns
    assert all(len(values) == rows and all(map(math.isfinite, values)) for values in table.values())


def test_a_brain_has_28_regions_and_250_scans():
    table = datasets.brain_at_rest()
    assert len(table) == 29
    assert all(len(values) == 250 and all(map(math.isfinite, values)) for values in table.values())
    assert table["seconds"][-1] == pytest.approx(1.89 * 249)


def test_muscle_cells_have_ten_genes_and_four_days():
    table = datasets.muscle_cells()
    assert len(table) == 11
    assert all(len(values) == 271 and all(v >= 0 for v in values) for values in table.values())
    assert sorted(set(table["hours"])) == [0, 24, 48, 72]


def test_months_of_the_river_are_measured_from_their_own_mean():
    height = torch.tensor(datasets.rio_negro()["height"]).reshape(90, 12)
    assert float(height.mean(0).abs().max()) < 1e-3


def test_molecules_are_seen_in_frames_that_follow_one_another():
    table = {name: torch.tensor(values) for name, values in datasets.single_molecules().items()}
    same = table["track"].diff() == 0
    assert bool((table["frame"].diff()[same] == 1).all())
    assert len(table["track"].unique()) == 1000
    assert float(torch.stack([table["x"], table["y"]]).min()) > 0
    assert float(table["x"].diff()[same].abs().max()) < 2


def test_pairs_of_photons_are_those_that_were_published():
    counts = datasets.photon_pairs()
    assert len(counts) == 16
    assert sum(counts[s] for s in ("HH", "HV", "VV", "VH")) == 71322


def test_totals_are_those_of_the_sources():
    assert sum(datasets.sitka_spruces()["ozone"]) == 54 * 5
    assert sum(datasets.school_influenza()["in_bed"]) == 1559
    assert max(datasets.school_influenza()["convalescent"]) == 176
    assert max(datasets.sunspots()["number"]) == 190.2
    assert sum(datasets.hudson_bay()["lynx"]) == pytest.approx(423.5)
