"""Tests of the small tables of real data."""

import math

import pytest

from stochdyn import datasets


@pytest.mark.parametrize(
    ("name", "rows", "columns"),
    [
        ("hudson_bay", 21, ["year", "hare", "lynx"]),
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


def test_totals_are_those_of_the_sources():
    assert sum(datasets.sitka_spruces()["ozone"]) == 54 * 5
    assert sum(datasets.school_influenza()["in_bed"]) == 1559
    assert max(datasets.school_influenza()["convalescent"]) == 176
    assert max(datasets.sunspots()["number"]) == 190.2
    assert sum(datasets.hudson_bay()["lynx"]) == pytest.approx(423.5)
