"""Bridge matching: Schrödinger bridges by regression of drifts, for dimensions in which transport kernels fail."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    check_choice,
    check_positive,
    check_positive_int,
    check_real,
    check_type,
)
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.bridges.laws.kernel_drift import owner
from stochdyn.bridges.laws.learned import LearnedBridge
from stochdyn.bridges.laws.matching_regression import MatchingRegression
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.errors import DiffusionError, InvalidInputError, UnavailableError
from stochdyn.run.engine import Resumable, run_to_end
from stochdyn.run.randomness import fork_random_state
from stochdyn.run.result import FitResult

__all__ = ["BridgeMatching"]

_LAST_RENEWALS = 10
# The first learning rate of the networks.
_RATE = 2e-3


class _Renewals(Resumable[FitResult]):
    """Without networks there is nothing to train: only couplings and affine parts are renewed in turn."""

    unit = "renewal"

    def __init__(self, regression: MatchingRegression, steps: int) -> None:
        self.regression = regression
        self.total = self.num_renewals = -(-steps // regression.refresh)
        self.losses: list[Tensor] = []

    @property
    def finished(self) -> bool:
        """Whether all renewals are done."""
        return self.number >= self.num_renewals

    def step(self) -> None:
        """Renew, and leave out the steps of an optimiser until the next renewal."""
        self.losses.append(self.regression(None).loss.detach().cpu())
        self.regression.calls += self.regression.refresh - 1

    def state(self) -> dict[str, Any]:
        """Return the pairs, the affine parts and the losses."""
        return {"regression": dict(self.regression.state_dict()), "losses": self.losses}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from pairs and affine parts."""
        self.regression.load_state_dict(state["regression"])
        self.losses = list(state["losses"])

    def report(self) -> FitResult:
        """Return the losses so far."""
        losses = torch.stack(self.losses) if self.losses else torch.empty(0)
        return FitResult(
            losses, self.regression, self.seconds, steps=self.number, interrupted=self.interrupted
        )


class BridgeMatching(LearnedBridge):
    r"""Multi-marginal Schrödinger bridge under a Brownian or Ornstein-Uhlenbeck reference, by matching drifts.

    On each interval a coupling of its two snapshots is joined by bridges of the reference, and networks regress the drift of
    that mixture, forward and backward in time (the Markovian projection). Following the networks gives new couplings
    that are nearer to the bridge's, and so on:

    .. math:: b(t,x)=E[\,b^{bridge}(t,x;X_{t_{i+1}})\mid X_t=x\,].

    The only fixed point is the Schrödinger bridge. Training goes on in both directions at once: the forward network learns from
    pairs whose *end* is data, the backward one from pairs whose *start* is, so errors in a marginal don't pile up. A cache
    of pairs is part of the state, so an interrupted :func:`stochdyn.fit` continues to the same bits. Memory and time grow
    linearly in the numbers of particles and of dimensions; where a snapshot has some thousand particles in a few dimensions,
    :class:`~stochdyn.bridges.laws.schrodinger.SchrodingerBridge` is faster and exact.

    Use it in tens of components and for tens of thousands of particles, where the couplings of
    :class:`~stochdyn.bridges.SchrodingerBridge` would need more noise or more memory. The law is ready after :meth:`solve`.

    Args:
        snapshots: The snapshots that the bridge passes through.
        diffusion: The noise :math:`\sigma` of the reference, in units of state per root of time.
        rate: The mean reversion of the reference, in 1/time; zero for Brownian motion.
        mean: The mean of the reference, a number or ``(d,)``.
        width: The width of the networks' hidden layers; zero for drifts that are affine in the state, enough for Gaussians.
        num_pairs: The size of the cache for each interval and direction.
        batch_size: The number of pairs of each interval and direction per step.
        refresh: The number of steps between renewals of the cache.
        num_steps: The number of time steps of the simulation of an interval (Heun's method).
        coupling: The first coupling: ``"independent"``, or ``"sinkhorn"`` of random minibatches of 512.

    Raises:
        DiffusionError: If the diffusion isn't positive.
        InvalidInputError: If a size isn't positive, or the coupling is unknown.

    Example:
        >>> snaps = Snapshots([0.0, 1.0], [torch.randn(200, 2), 1 + torch.randn(200, 2)])
        >>> match = BridgeMatching(snaps, diffusion=1.0, width=0, num_pairs=200, batch_size=64, refresh=20)
        >>> match.solve(steps=40, progress=False).sample(torch.linspace(0, 1, 5), 10).x.shape
        torch.Size([10, 5, 2])

    Reference: Shi, De Bortoli, Campbell & Doucet (2023), Diffusion Schrödinger bridge matching; De Bortoli,
    Korshunova, Mnih & Doucet (2024), Schrödinger bridge flow (training online); Peluchetti (2023), Diffusion bridge
    mixture transports.
    """

    def __init__(
        self,
        snapshots: Snapshots,
        diffusion: float,
        rate: float = 0.0,
        mean: Tensor | float = 0.0,
        *,
        width: int = 128,
        num_pairs: int = 4096,
        batch_size: int = 512,
        refresh: int = 100,
        num_steps: int = 30,
        coupling: str = "independent",
    ) -> None:
        super().__init__()
        check_type(snapshots, Snapshots, "snapshots")
        check_positive(diffusion, "diffusion", DiffusionError)
        check_real(diffusion, "diffusion")
        check_positive_int(width, "width", 0)
        check_real(rate, "rate")
        centre = as_tensor(mean, "mean", (0, 1), "a number or (d,)", like=snapshots.samples[0])
        sizes = {"num_pairs": num_pairs, "batch_size": batch_size, "refresh": refresh, "num_steps": num_steps}
        for name, size in sizes.items():
            check_positive_int(size, name)
        check_choice(coupling, ("independent", "sinkhorn"), "coupling")
        #: what is trained, an :class:`~stochdyn.Objective`
        self.regression = MatchingRegression(
            snapshots, diffusion, rate, centre, width, num_pairs, batch_size, refresh, num_steps, coupling
        )

    @property  # read off what is trained, so that both move together
    def snapshots(self) -> Snapshots:  # type: ignore[override]
        """What the bridge passes through."""
        return self.regression.snapshots

    @property
    def diffusion(self) -> float:
        """The noise of the reference and of the bridge."""
        return self.regression.diffusion

    @property
    def dim(self) -> int:
        """``d``, the number of components of the state."""
        return self.snapshots.dim

    def solve(
        self, steps: int = 3000, lr: float | None = None, seed: int | None = 0, **options: Any
    ) -> BridgeMatching:
        """Train by :meth:`fit`, whose arguments it takes; returns this law."""
        self.fit(steps, lr, seed, **options)
        return self

    def fit(
        self,
        steps: int = 3000,
        lr: float | None = None,
        seed: int | None = 0,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
        **options: Any,
    ) -> FitResult:
        """Train by :func:`stochdyn.fit` with a learning rate that falls to nothing, and keep the average weights.

        Args:
            steps: The number of steps of the optimiser.
            lr: The first learning rate of networks; 0.002 if None.
            seed: The seed of the whole training.
            progress: Whether to show a progress bar, after two seconds.
            checkpoint: The directory that the run is saved to; see :func:`stochdyn.fit`.
            resume: Whether to continue the run that is saved in ``checkpoint``.
            options: Further arguments of :func:`stochdyn.fit`.

        Returns:
            The :class:`~stochdyn.run.result.FitResult`.
        """
        from stochdyn.run.trainer import fit

        check_positive_int(steps, "steps")
        if lr is not None:
            check_positive(lr, "lr")

        if not list(self.regression.parameters()):
            unused = sorted(options) + (["lr"] if lr is not None else [])
            if unused:
                raise InvalidInputError(
                    f"{unused[0]} does nothing for affine drifts, which are found without an optimiser",
                    hint="give a width for networks",
                )
            identity = {"regression": self.regression, "seed": seed}
            return run_to_end(
                _Renewals(self.regression, steps), "fit", identity=identity, randomness=seed,
                device=self.regression.pairs.device, progress=progress, checkpoint=checkpoint, resume=resume,
            )  # fmt: skip

        def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
            return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

        defaults = {"scheduler": schedule, "ema": 0.99, "clip_norm": 10.0}
        result = fit(
            self.regression, steps=steps, lr=_RATE if lr is None else lr, seed=seed, progress=progress, checkpoint=checkpoint, resume=resume,
            **{**defaults, **options},
        )  # fmt: skip
        if result.ema is not None:
            with torch.no_grad():
                for name, parameter in self.regression.named_parameters():
                    parameter.copy_(result.ema[name])
        if not result.interrupted:
            # the affine parts belong to the last weights of the networks, not to their average
            with fork_random_state(seed, self.regression.pairs.device):
                for _ in range(_LAST_RENEWALS):
                    self.regression.renew()
        return result

    def _trained(self) -> MatchingRegression:
        if not int(self.regression.calls):
            raise UnavailableError("the bridge isn't solved yet", hint="call solve() first")
        return self.regression

    def _check_solved(self) -> None:
        self._trained()

    def _learnt_drift(self, backward: bool, i: int, time: float, x: Tensor) -> Tensor:
        start, end = self.snapshots.times[i : i + 2].tolist()
        share = min(max((time - start) / (end - start), 0.0), 1.0)
        return self._trained().drift(int(backward), i, 1 - share if backward else share, x)

    @torch.no_grad()
    def couple(
        self, interval: int, sample_shape: SampleShape, generator: Generator = None
    ) -> tuple[Tensor, Tensor]:
        """Draw pairs ``(*sample, d)``, ``(*sample, d)`` of neighbouring snapshots' states, by the forward network.

        Args:
            interval: The index of the interval, from 0.
            sample_shape: The shape of independent draws, an integer or a tuple.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
        """
        check_positive_int(interval, "interval", 0)
        if interval >= len(self.snapshots) - 1:
            raise InvalidInputError(
                "there is no such interval", got=interval, expected=f"0 to {len(self.snapshots) - 2}"
            )
        shape, source = as_sample_shape(sample_shape), as_generator(generator, self.snapshots.device)
        x = self.snapshots[interval].draw(math.prod(shape), source)
        y = self._trained().follow(interval, x, torch.ones(1), source)[0][0]
        return x.reshape(*shape, -1), y.reshape(*shape, -1)

    def _paths(
        self, ts: Tensor, x: Tensor, generator: torch.Generator | None
    ) -> tuple[list[Tensor], list[Tensor]]:
        regression, times = self._trained(), self.snapshots.times
        owners = [owner(times, t)[0] for t in ts.tolist()]
        states: list[Tensor] = []
        sums: list[Tensor] = []
        total = torch.zeros_like(x)
        for i in range(owners[-1] + 1):
            start, end = times[i : i + 2].tolist()
            inside = [(t - start) / (end - start) for t, k in zip(ts.tolist(), owners, strict=True) if k == i]
            clock = torch.tensor([*(min(max(s, 0.0), 1.0) for s in inside), 1.0], dtype=torch.float64)
            path, driven = regression.follow(i, x, clock, generator)
            states += path[:-1]
            sums += total + driven[:-1]
            x, total = path[-1], total + driven[-1]
        return states, sums
