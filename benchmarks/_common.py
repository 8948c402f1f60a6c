"""What all benchmarks share: a description of the machine, and the program that turns measurements into a table."""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["best_time", "machine", "markdown_table", "write_table"]


def machine(*packages: str) -> dict[str, Any]:
    """Describe where numbers come from: processor, load, and the versions of torch and of ``packages``, None if absent."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "system": platform.system(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **{name: _version(name) for name in packages},
        "clock": "time.process_time",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.processor() or platform.machine() or "unknown"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def best_time(run: Callable[[], Any], repeats: int = 5) -> float:
    """Return the least processor seconds of several runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def markdown_table(rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return the lines of a table whose first row is its head, and an empty line."""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    lines.insert(1, "|" + " --- |" * len(rows[0]))
    return [*lines, ""]


def write_table(render: Callable[[Path], str], results: Path, table: Path, description: str | None) -> None:
    """Write the page that ``render`` makes of results, a file or a folder; both places can be given on the command line."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--results", type=Path, default=results)
    parser.add_argument("--out", type=Path, default=table)
    options = parser.parse_args()
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(render(options.results), encoding="utf-8")
    print(f"wrote {options.out}")
