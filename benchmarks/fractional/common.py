"""What the benchmarks of this folder share: the machine, and timing by processor time."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

__all__ = ["best_time", "machine", "race"]


def machine() -> dict[str, Any]:
    """Describe where the numbers come from."""
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":")[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    versions = {}
    for package in ("torch", "torchsde", "pyro-ppl", "jax", "diffrax"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **versions,
        "clock": "time.process_time",
    }


def best_time(run: Callable[[], Any], repeats: int) -> float:
    """Return the least processor seconds of several runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times)


def race(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the least processor seconds of each contender, taken in turn so that a busy moment hits all alike."""
    for run in contenders.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(repeats):
        for name, run in contenders.items():
            start = time.process_time()
            run()
            times[name].append(time.process_time() - start)
    return {name: min(values) for name, values in times.items()}
