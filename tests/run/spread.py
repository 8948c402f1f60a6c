"""What the tests of executors give to other processes: functions that pickle can name."""

from __future__ import annotations

import os
import warnings

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from stochdyn.bridges import SchrodingerBridge, Snapshots


def noisy(x: float) -> tuple[float, float]:
    """Draw from the global generator."""
    return x, float(torch.rand(()))


def refuse(x: float) -> float:
    """Fail for one item."""
    if x == 2.0:
        raise ArithmeticError("two")
    return x


def die(x: float) -> float:
    """End the process, as the kernel does where memory is short."""
    os._exit(1)


def warn(x: float) -> torch.dtype:
    """Warn, and say what the default precision is."""
    warnings.warn(f"item {x:g}", UserWarning, stacklevel=1)
    return torch.zeros(()).dtype


def model(y: Tensor) -> None:
    """A normal mean, with an observation."""
    mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
    pyro.sample("y", dist.Normal(mean, 1.0), obs=y)


def guide(y: Tensor) -> None:
    """A guide that keeps its parameter in Pyro's store and goes on from there."""
    loc = pyro.param("loc", torch.zeros(()))
    pyro.sample("mean", dist.Normal(loc, 0.7))


def trained(model, args, kwargs, num_draws):  # type: ignore[no-untyped-def]
    """Train the guide a little and draw from it."""
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), pyro.infer.Trace_ELBO())
    for _ in range(3):
        svi.step(*args)
    return {"mean": pyro.param("loc").detach() + 0.7 * torch.randn(num_draws)}


def bridge(train: Snapshots) -> SchrodingerBridge:
    """A method for leave_one_out whose noise is drawn."""
    return SchrodingerBridge(train, diffusion=0.3 + 0.2 * float(torch.rand(()))).solve()


def filtered(panel) -> Tensor:  # type: ignore[no-untyped-def]
    """The evidence of some series of a panel by particles."""
    import stochdyn as sd

    data = sd.infer.StateLikelihood(lambda x: dist.Normal(x[..., 0], 0.3), panel.values[..., 0])
    law = sd.SDE(lambda t, x: -x, 0.5)
    return sd.infer.particle_filter(law, torch.zeros(1), panel.times, data, 50, dt=0.5).log_evidence
