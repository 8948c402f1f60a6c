"""Time loops don't wait for the host: no value of a tensor is read inside them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import stochdyn as sd
from stochdyn.core import draw_increments
from stochdyn.core.sde.grids import step_sizes
from stochdyn.core.sde.solvers import run_loop
from tests.core.laws import F64, ExactMemory

HOST = ("_local_scalar_dense", "nonzero", "is_nonzero", "item")


class NoHost(TorchDispatchMode):
    """Refuse everything that a device would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[-1]
        assert name not in HOST, f"{name} waits for the device"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("control", ["none", "drift", "precision"])
@pytest.mark.parametrize("noise", ["Brownian", "memory"])
@pytest.mark.parametrize(
    ("method", "diffusion"),
    [("euler", 0.5), ("heun", 0.5), ("euler", torch.sin), ("heun", torch.sin), ("milstein", torch.sin)],
)
def test_the_time_loop_reads_no_values(
    method: str, diffusion: Any, noise: str, control: str, differentiated: bool
) -> None:
    g = diffusion if isinstance(diffusion, float) else lambda t, x: 2 + diffusion(x)
    memory = ExactMemory([1.0], [0.5]) if noise == "memory" else None
    sde = sd.SDE(lambda t, x: -x, g, memory)
    if control != "none":
        u = lambda t, z: z[..., :2]  # noqa: E731
        sde = sde.controlled(u, (lambda t, z: 1 + z[..., :2] ** 2) if control == "precision" else None)
    ts = torch.linspace(0, 1, 5, dtype=F64)
    x0 = torch.ones(3, 2, dtype=F64, requires_grad=differentiated)
    dw, memory0 = draw_increments(sde, x0, ts)
    dt = step_sizes(ts, F64)
    sde.diffusion(ts[0], x0)  # what the diffusion means is asked once
    with NoHost():
        x = run_loop(sde, x0, ts, dt, dw, memory0, method, False).x
        if differentiated:
            torch.autograd.grad(x.square().sum(), x0)
