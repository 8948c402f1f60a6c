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
        ("theophylline", 132, ["subject", "weight", "dose", "time", "concentration"]),
    ],
)
def test_a_table_has_its_rows_and_a_number_in_each_cell(name, rows, columns):
    table = getattr(datasets, name)()
    assert list(table) == columns
    assert all(len(values) == rows and all(map(math.isfinite, values)) for values in table.values())


def test_totals_are_those_of_the_sources():
    assert sum(datasets.school_influenza()["in_bed"]) == 1559
    assert max(datasets.school_influenza()["convalescent"]) == 176
    assert max(datasets.sunspots()["number"]) == 190.2
    assert sum(datasets.hudson_bay()["lynx"]) == pytest.approx(423.5)
