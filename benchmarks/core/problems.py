"""The same equations for stochdyn and for torchsde, with the very same network modules on both sides."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchsde
from torch import Tensor, nn

import stochdyn as sd
from stochdyn.core import MLP, Euler, NoiseProcess, NoiseSteps

__all__ = ["IndependentStates", "MemoryStates", "Problem", "TrivialDrift", "layered", "tuned_brownian"]

SPEEDS = torch.tensor([0.1, 1.0, 5.0, 20.0])
WEIGHTS = torch.tensor([0.5, 0.3, -0.2, 0.4])


class EulerMemory(NoiseProcess):
    """Four memory states with Euler steps, as torchsde integrates them; the library itself steps them exactly."""

    num_states = 4

    def steps(self, ts: Tensor, *, dtype: torch.dtype) -> NoiseSteps:
        """See :meth:`NoiseProcess.steps`."""
        dt = (ts[1:] - ts[:-1]).to(dtype)[:, None]
        n = dt.shape[0]
        return NoiseSteps(
            dt, WEIGHTS.sum().expand(n, 1), -WEIGHTS * SPEEDS * dt, 1 - SPEEDS * dt, torch.ones(n, 1, 4)
        )

    def initial_factor(self, *, dtype: torch.dtype, device: torch.device) -> Tensor | None:
        """All states start at 0."""
        return None


class Clocked(nn.Module):
    """A network of time and state."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        """Evaluate at ``t`` (no axes, or broadcastable) and ``z (..., d)``."""
        return self.network(torch.cat([t.expand(*z.shape[:-1], 1), z], -1))


def layered(network: MLP) -> nn.Sequential:
    """Return the same function of the same parameters out of torch's own layers."""
    layers: list[nn.Module] = []
    for layer in network.layers:
        layers += [layer, nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def tuned_brownian(batch: int, channels: int, steps: int) -> torchsde.BrownianInterval:
    """Return torchsde's Brownian motion told the step and to keep all it has drawn, its fastest setting here."""
    return torchsde.BrownianInterval(t0=0.0, t1=1.0, size=(batch, channels), dt=1 / steps, cache_size=None)


class _Theirs(nn.Module):
    """An Itô equation as torchsde takes it."""

    sde_type = "ito"

    def __init__(
        self, noise_type: str, drift: Callable[..., Tensor], matrix: Tensor, parts: list[nn.Module]
    ) -> None:
        super().__init__()
        self.noise_type = noise_type
        self.parts = nn.ModuleList(parts)
        self.f = drift
        self.matrix = matrix

    def g(self, t: Tensor, y: Tensor) -> Tensor:
        """Return the constant diffusion."""
        return self.matrix


class Problem:
    """One equation in both libraries.

    ``ours`` and ``theirs`` run the forward pass through the public entry points and return the loss; the
    divergence from the uncontrolled law is part of it.
    """

    name: str
    channels: int
    noise_types: tuple[str, ...]

    def __init__(self, batch: int, steps: int) -> None:
        self.batch = batch
        self.steps = steps
        self.ts = torch.linspace(0, 1, steps + 1)

    def ours(self, checkpoint: bool = False) -> Tensor:
        """Return the loss of freshly drawn paths by stochdyn."""
        raise NotImplementedError

    def theirs(self, noise_type: str, bm: Any = None) -> Tensor:
        """Return the loss of freshly drawn paths by torchsde."""
        raise NotImplementedError

    def parameters(self) -> list[Tensor]:
        """Return what the loss is differentiated in."""
        raise NotImplementedError


class MemoryStates(Problem):
    """One observed state and four memory states that share one Brownian motion; the control sees all five."""

    name = "one state with four memory states"
    channels = 1
    noise_types = ("general", "additive", "scalar")

    def __init__(self, batch: int, steps: int, our_network: nn.Module, their_network: nn.Module) -> None:
        super().__init__(batch, steps)
        self.network = Clocked(our_network)
        self.prior = sd.DiffusionMeasure(
            torch.zeros(batch, 1), sd.SDE(lambda t, x: -0.5 * x, 1.0, EulerMemory())
        )
        self.guide = self.prior.controlled(self.network)
        # torchsde's state: x, Y_1..Y_4 and the running divergence.
        network = Clocked(their_network)
        column = torch.cat([WEIGHTS.sum()[None], torch.ones(4), torch.zeros(1)])

        def drift(t: Tensor, y: Tensor) -> Tensor:
            z = y[:, :5]
            u = network(t, z)
            x, memory = z[:, :1], z[:, 1:]
            dx = -0.5 * x - (memory * (WEIGHTS * SPEEDS)).sum(-1, keepdim=True) + u * WEIGHTS.sum()
            return torch.cat([dx, u - SPEEDS * memory, 0.5 * u * u], -1)

        matrix = column[:, None].expand(batch, 6, 1)
        self.equations = {n: _Theirs(n, drift, matrix, [network]) for n in self.noise_types}

    def ours(self, checkpoint: bool = False) -> Tensor:
        """See :meth:`Problem.ours`."""
        path = self.guide.sample(self.ts, method=Euler(checkpoint=checkpoint))
        divergence = self.guide.log_rn(path, self.prior, "rate", recorded=True)
        return path.x[..., -1, :].square().sum() + divergence.sum()

    def theirs(self, noise_type: str, bm: Any = None) -> Tensor:
        """See :meth:`Problem.theirs`."""
        y0 = torch.zeros(self.batch, 6)
        y = torchsde.sdeint(self.equations[noise_type], y0, self.ts, bm=bm, method="euler", dt=1 / self.steps)
        return y[-1, :, 0].square().sum() + y[-1, :, 5].sum()

    def parameters(self) -> list[Tensor]:
        """See :meth:`Problem.parameters`."""
        return list(self.network.parameters())


class IndependentStates(Problem):
    """Five states, each with its own Brownian motion, and a control of all five."""

    name = "five states with five Brownian motions"
    channels = 5
    noise_types = ("general", "additive", "diagonal")

    def __init__(self, batch: int, steps: int, our_network: nn.Module, their_network: nn.Module) -> None:
        super().__init__(batch, steps)
        self.network = Clocked(our_network)
        self.prior = sd.DiffusionMeasure(torch.zeros(batch, 5), sd.SDE(lambda t, x: -0.5 * x, 1.0))
        self.guide = self.prior.controlled(self.network)
        network = Clocked(their_network)

        def drift(t: Tensor, y: Tensor) -> Tensor:
            x = y[:, :5]
            u = network(t, x)
            return torch.cat([u - 0.5 * x, 0.5 * (u * u).sum(-1, keepdim=True)], -1)

        matrix = torch.eye(6)[:, :5].expand(batch, 6, 5)
        diagonal = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 0.0]).expand(batch, 6)
        self.equations = {
            n: _Theirs(n, drift, diagonal if n == "diagonal" else matrix, [network]) for n in self.noise_types
        }

    ours = MemoryStates.ours

    def theirs(self, noise_type: str, bm: Any = None) -> Tensor:
        """See :meth:`Problem.theirs`."""
        y0 = torch.zeros(self.batch, 6)
        y = torchsde.sdeint(self.equations[noise_type], y0, self.ts, bm=bm, method="euler", dt=1 / self.steps)
        return y[-1, :, :5].square().sum() + y[-1, :, 5].sum()

    parameters = MemoryStates.parameters


class TrivialDrift(Problem):
    """Five states with the drift ``-x`` and nothing else: what is left is the loop and the noise."""

    def __init__(self, batch: int, steps: int, channels: int) -> None:
        super().__init__(batch, steps)
        self.channels = channels
        self.name = f"five states, drift -x, {channels} Brownian motion{'s' if channels > 1 else ''}"
        self.noise_types = ("general", "additive", "diagonal" if channels == 5 else "scalar")
        self.start = nn.Parameter(torch.zeros(batch, 5))
        diffusion: Any = 1.0 if channels == 5 else torch.ones(5, 1)
        self.law = sd.DiffusionMeasure(self.start, sd.SDE(lambda t, x: -x, diffusion))
        matrix = torch.eye(5) if channels == 5 else torch.ones(5, 1)
        self.equations = {
            n: _Theirs(
                n,
                lambda t, y: -y,
                torch.ones(batch, 5) if n == "diagonal" else matrix.expand(batch, 5, -1),
                [],
            )
            for n in self.noise_types
        }

    def ours(self, checkpoint: bool = False) -> Tensor:
        """See :meth:`Problem.ours`."""
        return self.law.sample(self.ts, method=Euler(checkpoint=checkpoint)).x[..., -1, :].square().sum()

    def theirs(self, noise_type: str, bm: Any = None) -> Tensor:
        """See :meth:`Problem.theirs`."""
        equation = self.equations[noise_type]
        y = torchsde.sdeint(equation, self.start, self.ts, bm=bm, method="euler", dt=1 / self.steps)
        return y[-1].square().sum()

    def parameters(self) -> list[Tensor]:
        """See :meth:`Problem.parameters`."""
        return [self.start]
