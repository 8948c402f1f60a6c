"""Short examples run to their end and say what is true."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("dose_concentrations", r"elimination +(?P<value>[\d.]+) \((?P<low>[\d.]+) to (?P<high>[\d.]+)\), truly (?P<truth>[\d.]+)"),
        ("epidemic_incidence", r"infection (?P<value>[\d.]+) \((?P<low>[\d.]+) to (?P<high>[\d.]+)\), truly (?P<truth>[\d.]+)"),
    ],
)  # fmt: skip
def test_an_example_finds_the_rate_that_it_simulated(
    name: str,
    pattern: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    picture = tmp_path / "picture.png"
    monkeypatch.setattr(sys, "argv", [name, "--draws", "60", "--out", str(picture)])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    found = re.search(pattern, capsys.readouterr().out)
    assert found is not None
    numbers = {key: float(value) for key, value in found.groupdict().items()}
    # Within two widths of the interval of 90 %, and narrower than the prior by far.
    width = numbers["high"] - numbers["low"]
    assert abs(numbers["value"] - numbers["truth"]) < width
    assert width < 0.4 * numbers["truth"]
    assert picture.stat().st_size > 10_000
