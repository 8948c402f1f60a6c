"""The tables of the documentation are what the measurements say, and every part of the benchmark runs."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks" / "interpolants"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("interpolants_benchmark_table", FOLDER / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_tables_are_what_the_measurements_say(table: ModuleType) -> None:
    reports = table.read()
    assert reports
    assert not any(report["smoke"] for report in reports.values())
    assert table.TABLE.read_text(encoding="utf-8") == table.render(reports)


@pytest.mark.slow
def test_a_quick_run_measures_everything(table: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("torchcfm.conditional_flow_matching")
    run = [sys.executable, str(FOLDER / "run.py"), "--smoke", "--out", str(tmp_path)]
    subprocess.run(run, check=True, capture_output=True, timeout=600)
    reports = table.read(tmp_path)
    assert set(reports) == set(table.PARTS)
    assert json.dumps(reports)
    assert table.render(reports).count("\n| ") > 40
    for row in reports["coupling"]["rows"]:
        assert row["stochdyn"]["marginal error"] < 1e-3
        assert row["stochdyn"]["distinct sources"] == 256
