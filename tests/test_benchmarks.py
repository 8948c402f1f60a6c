"""The benchmark of the core runs, and the documentation's tables are what the measurements say."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks" / "core"
SCRIPTS = sorted(FOLDER.parent.glob("*/*table*.py"))

# What a script would write, against what is there; nothing is written.
_DRY_RUN = """
import pathlib, runpy, sys
script = sys.argv[1]
sys.argv, sys.path[0] = [script], str(pathlib.Path(script).parent)
written = {}
pathlib.Path.write_text = lambda self, text, **options: written.update({self: text})
runpy.run_path(script, run_name="__main__")
stale = [str(path) for path, text in written.items() if path.read_text(encoding="utf-8") != text]
sys.exit(f"stale: {stale}" if stale else 0 if written else f"{script} wrote nothing")
"""


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


def test_the_gpu_table_is_what_was_measured(tmp_path: Path) -> None:
    """Where there is no device nothing is measured, and the table says so; every case runs on the processor."""
    gpu = FOLDER.parent / "gpu.py"
    out = tmp_path / "gpu.json"
    run = [sys.executable, str(gpu), "--smoke", "--out", str(out)]
    subprocess.run(run, check=True, capture_output=True, timeout=120)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert len(rows) == 5
    assert all(row["cpu"] > 0 for row in rows.values())
    kept = (gpu.parent / "results" / "gpu.json").read_text(encoding="utf-8")
    render = "import json, sys; sys.path.insert(0, sys.argv[1]); import gpu; print(gpu.render(json.load(sys.stdin)), end='')"
    command = [sys.executable, "-c", render, str(gpu.parent)]
    page = subprocess.run(command, input=kept, text=True, capture_output=True, check=True).stdout
    table = FOLDER.parents[1] / "docs" / "generated" / "gpu_benchmarks.md"
    assert page == table.read_text(encoding="utf-8")


def test_attractors_are_scored_for_every_method_and_results_are_kept(tmp_path: Path) -> None:
    script, out = FOLDER.parent / "fractional" / "attractors.py", tmp_path / "attractors.json"
    run = [sys.executable, str(script), "--smoke", "--only", "rossler", "--out", str(out)]
    subprocess.run(run, check=True, capture_output=True, timeout=120)
    found = json.loads(out.read_text(encoding="utf-8"))["systems"]["rossler"]
    assert set(found) == {"truth", "persistence", "linear", "latent"}
    for row in found.values():
        assert row["state space divergence"] > 0
        assert 0 < row["power spectrum distance"] < 1
    assert found["truth"]["error after 5 readings"] == 0
    again = out.read_text(encoding="utf-8")
    subprocess.run(run, check=True, capture_output=True, timeout=120)  # nothing is left to do
    assert out.read_text(encoding="utf-8") == again


def test_calibration_goes_on_where_it_was_and_counts_what_is_covered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER.parent))
    shared = importlib.import_module("_calibration")
    out, drawn = tmp_path / "calibration.json", []

    def kind(g: torch.Generator) -> dict[str, float]:
        drawn.append(g.initial_seed())
        rank = shared.posterior_rank(torch.arange(100.0), 10 * len(drawn) + 0.5)
        return {"rate": rank, "khat": 0.1}

    for count in ("2", "3", "3"):
        monkeypatch.setattr(sys, "argv", ["calibration.py", "--count", count, "--out", str(out)])
        shared.run_calibration({"kind": kind}, out, None)
    assert len(drawn) == len(set(drawn)) == 3
    found = json.loads(out.read_text(encoding="utf-8"))["kind"]
    assert [row["rate"] for row in found["rows"]] == [0.11, 0.21, 0.31]
    summary = found["summary"]["rate"]
    assert [summary[level] for level in ("50%", "80%", "95%")] == pytest.approx([1 / 3, 1.0, 1.0])
    assert summary["50% off"] == pytest.approx((1 / 3 - 0.5) / (0.25 / 3) ** 0.5)
    assert "| rate | 3 | 33 % (-0.6) |" in "\n".join(
        shared.coverage_table({"kind": found}, {"kind": "a kind"}, "model")
    )


@pytest.mark.slow
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


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_no_table_is_older_than_its_measurements(script: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", _DRY_RUN, str(script)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
