"""The benchmark of the core runs, and the documentation's table is what its measurements say."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks" / "core"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("core_benchmark_table", FOLDER / "table.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_measurements_say(table: ModuleType) -> None:
    result = json.loads(table.SOURCE.read_text(encoding="utf-8"))
    assert not result["smoke"]
    assert table.TARGET.read_text(encoding="utf-8") == table.render(result)


def test_a_quick_run_measures_everything(table: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "smoke.json"
    run = [sys.executable, str(FOLDER / "run.py"), "--smoke", "--out", str(out)]
    subprocess.run(run, check=True, capture_output=True, timeout=120)
    result = json.loads(out.read_text(encoding="utf-8"))
    for row in result["speed"]:
        assert set(row["contenders"]["stochdyn"]) == {"forward", "backward", "total", "median"}
        assert sum("ratio" in contender for contender in row["contenders"].values()) == 4
        # Both libraries solve the same problem: on the same increments loss and gradient agree.
        if "agreement" in row:
            assert row["agreement"]["loss"] < 1e-5
            assert row["agreement"]["gradient"] < 1e-4
    assert result["memory"][0]["ratio"] < 0.9
    assert {"processor", "cores", "threads", "torch", "torchsde"} <= set(result["machine"])
    assert table.render(result).count("\n| ") == len(result["speed"]) + len(result["memory"]) + 2
