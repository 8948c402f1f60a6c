"""Interleaved processor times, and a description of the machine."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import machine

__all__ = ["machine", "race", "seconds", "source"]


def source(file: str) -> str:
    """Return which state of the library and of a programme was run, as git names trees; they survive a rebase."""
    here = Path(file).resolve().parent

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=False
        ).stdout.strip()

    top = Path(ask("rev-parse", "--show-toplevel") or ".")
    trees = [
        ask("rev-parse", "--short", f"HEAD:{p}")
        for p in ("stochdyn/povm", f"benchmarks/povm/{Path(file).name}")
    ]
    changed = ask("status", "--porcelain", "--", str(top / "stochdyn"), file)
    return " ".join(trees) + (" and changes" if changed else "")


def seconds(run: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor time of one call, and its result."""
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def race(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Return the least processor time of each contender, all taking turns so that a busy moment hits all alike."""
    best = dict.fromkeys(contenders, float("inf"))
    for _ in range(repeats):
        for name, run in contenders.items():
            best[name] = min(best[name], seconds(run)[0])
    return best
