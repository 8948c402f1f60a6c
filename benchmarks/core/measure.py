"""Interleaved timings, peak memory, and the agreement of both libraries on the same increments."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from problems import Problem, tuned_brownian
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1]))
from _common import machine

__all__ = ["agreement", "machine", "peak_memory", "race"]


def race(problem: Problem, repeats: int, backward: bool) -> dict[str, Any]:
    """Time every contender in turn, again and again, so that a busy moment hits all alike.

    Returns:
        For each contender the least and the median processor seconds of forward and backward pass and of
        their sum; for each of torchsde's the ratio of its least total to ours.
    """
    contenders: dict[str, Callable[[], Tensor]] = {"stochdyn": problem.ours}
    for noise_type in problem.noise_types:
        contenders[f"torchsde, {noise_type}"] = lambda n=noise_type: problem.theirs(n)
    plainest = problem.noise_types[-1]
    channels = _noise_channels(problem, plainest)
    contenders[f"torchsde, {plainest}, tuned Brownian motion"] = lambda: problem.theirs(
        plainest, tuned_brownian(problem.batch, channels, problem.steps)
    )
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for run in contenders.values():
        _once(problem, run, backward)  # warm up
    for _ in range(repeats):
        for name, run in contenders.items():
            times[name].append(_once(problem, run, backward))
    ours = min(a + b for a, b in times["stochdyn"])
    rows = {name: _summary(values) for name, values in times.items()}
    for name, row in rows.items():
        if name != "stochdyn":
            row["ratio"] = row["total"] / ours
    return {"repeats": repeats, "backward": backward, "contenders": rows}


def _noise_channels(problem: Problem, noise_type: str) -> int:
    equation = problem.equations[noise_type]  # type: ignore[attr-defined]
    return int(equation.matrix.shape[-1])


def _once(problem: Problem, run: Callable[[], Tensor], backward: bool) -> tuple[float, float]:
    start = time.process_time()
    with torch.set_grad_enabled(backward):
        loss = run()
    middle = time.process_time()
    if backward:
        torch.autograd.grad(loss, problem.parameters())
    return middle - start, time.process_time() - middle


def _summary(values: list[tuple[float, float]]) -> dict[str, float]:
    totals = sorted(a + b for a, b in values)
    return {
        "forward": min(a for a, _ in values),
        "backward": min(b for _, b in values),
        "total": totals[0],
        "median": totals[len(totals) // 2],
    }


class _Replay:
    """Given increments behind the interface that torchsde asks of a Brownian motion."""

    levy_area_approximation = "none"

    def __init__(self, dw: Tensor, size: int) -> None:
        self.dw = dw
        self.shape = (dw.shape[1], size)
        self.dtype, self.device = dw.dtype, dw.device

    def size(self) -> tuple[int, ...]:
        return self.shape

    def __call__(self, ta: Tensor, tb: Tensor, **_: Any) -> Tensor:
        dw = self.dw[round(float(ta) * self.dw.shape[0])]
        return torch.nn.functional.pad(dw, (0, self.shape[1] - dw.shape[1]))


def agreement(problem: Problem) -> dict[str, float]:
    """Return the relative difference of loss and gradient between the libraries on the same increments."""
    torch.manual_seed(0)
    ours = problem.ours()
    gradient = torch.autograd.grad(ours, problem.parameters())
    torch.manual_seed(0)
    normal = torch.randn(problem.steps, problem.batch, problem.channels)
    dt = problem.ts[1:] - problem.ts[:-1]
    noise_type = problem.noise_types[-1]
    bm = _Replay(normal * dt.sqrt()[:, None, None], _noise_channels(problem, noise_type))
    theirs = problem.theirs(noise_type, bm)
    other = torch.autograd.grad(theirs, problem.parameters())
    gap = torch.cat([(a - b).flatten() for a, b in zip(gradient, other, strict=True)]).norm()
    size = torch.cat([b.flatten() for b in other]).norm()
    return {"loss": float(((ours - theirs) / theirs).detach().abs()), "gradient": float(gap / size)}


# Linux hands ru_maxrss down from the parent process; VmHWM is the process's own.
_CHILD = """
import sys; sys.path.insert(0, {folder!r})
import pathlib, re, resource, torch
torch.set_num_threads(1)
from run import problem_of
problem = problem_of({case!r}, {batch}, {steps})
status = pathlib.Path("/proc/self/status")
def peak():
    if status.exists():
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
small = problem_of({case!r}, 8, 4)
for checkpoint in (False, True):
    torch.autograd.grad(small.ours(checkpoint), small.parameters())
before = peak()
torch.autograd.grad(problem.ours({checkpoint}), problem.parameters())
print((peak() - before) / 1024)
"""


def peak_memory(case: str, batch: int, steps: int) -> dict[str, float]:
    """Return the growth of the peak resident memory in MiB by one forward and backward pass, plain and checkpointed.

    Each is measured in a process of its own, after a small pass that loads what is loaded once.
    """
    sizes = {}
    for name, checkpoint in (("plain", False), ("checkpointed", True)):
        code = _CHILD.format(
            folder=str(Path(__file__).parent), case=case, batch=batch, steps=steps, checkpoint=checkpoint
        )
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        sizes[name] = float(out.stdout)
    return {**sizes, "ratio": sizes["checkpointed"] / sizes["plain"]}
