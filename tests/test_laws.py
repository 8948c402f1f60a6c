"""Every law of the package passes the suite of laws; a new one fails here until it has a factory."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor
from torch.distributions import Independent, MultivariateNormal, Normal

import stochdyn as sd
from stochdyn.core import PathMeasure
from stochdyn.interpolants import (
    GaussianMixture,
    GaussianMixtureInterpolant,
    Interpolant,
    InterpolantRegression,
    ReverseDiffusion,
)
from stochdyn.testing import PathMeasureSuite
from tests.bridges.laws import NAMES, solved
from tests.interpolants.laws import gaussian, processes

F64 = torch.float64
ZERO, ONE = torch.zeros(2, dtype=F64), torch.ones(2, dtype=F64)


@dataclass(frozen=True)
class Case:
    """A law, how it is made, and what the suite has to know about it.

    Attributes:
        make: returns the law, ready to be sampled.
        ts: the ends of the grid on which it is sampled, and the number of times.
        other: returns an equivalent law.
        outside: a time at which the law doesn't live.
        bias: see :class:`stochdyn.testing.PathMeasureSuite`, as the others.
    """

    make: Callable[[], PathMeasure]
    ts: tuple[float, float, int] = (0.0, 1.0, 21)
    other: Callable[[], PathMeasure] | None = None
    outside: float | None = None
    bias: float = 0.05
    forward_error: float = 1e-3
    batch: tuple[int, ...] = ()


def decay(t: Tensor, x: Tensor) -> Tensor:
    return -x


def diffusion() -> sd.DiffusionMeasure:
    start = MultivariateNormal(ONE, 0.1 * torch.eye(2, dtype=F64))
    return sd.DiffusionMeasure(start, sd.SDE(decay, 0.5), start_time=0.0)


def ornstein_uhlenbeck(rate: float = 1.3, mean: float = 0.3) -> sd.LinearGaussianMeasure:
    return sd.LinearGaussianMeasure.ornstein_uhlenbeck(rate * ONE, mean, 0.8)


def fractional(hurst: float, rate: float = 1.3) -> sd.fractional.FractionalOU:
    return sd.fractional.FractionalOU(rate, 0.3, 0.8, hurst, initial=1.0)


def posterior_path(noise_space: bool | None = None, y: float = 0.0) -> PathMeasure:
    """The law of a guide that is the exact posterior of a linear model."""
    ts = torch.linspace(0, 1, 21, dtype=F64)
    sde = sd.SDE(decay, 0.5)

    def model() -> None:
        x = sd.infer.sample_path(
            "x", sde, MultivariateNormal(ONE, 0.1 * torch.eye(2, dtype=F64)), ts, noise_space=noise_space
        )
        pyro.sample("y", pyro.distributions.Normal(x[..., 10, :], 0.3).to_event(1), obs=ZERO + y)

    with torch.random.fork_rng():
        guide = sd.infer.AutoPathGuide(model, hidden=())
        guide()
    return guide.path_law("x")


def latent_path(posterior: Any, noise: Any) -> PathMeasure:
    """The posterior of two series under a model whose parameters aren't trained."""
    fractional, ts = sd.fractional, torch.linspace(0, 1, 21, dtype=F64)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = fractional.LatentSDE(
            1, 2, ts, posterior=posterior, noise=noise, drift=(8,), obs_scale=0.5
        ).double()
    values = torch.tensor([[0.5, 1.0, 0.2], [-0.5, 0.0, 1.0]], dtype=F64)
    return model.path_law(fractional.Series.regular(ts[::10], values[..., None]))


def positive(pull: float = 0.0) -> PathMeasure:
    """The law of a positive state, simulated in logarithms."""
    sde = sd.SDE(lambda t, x: 2 * (1 - x), lambda t, x: 0.3 * x).transformed("log")
    start = Independent(Normal(ZERO, 0.2), 1)
    inner = sd.DiffusionMeasure(start, sde, start_time=0.0)
    return (inner.controlled(lambda t, z: pull - z) if pull else inner).transformed("exp")


def jumping(rate: float = 2.0, pull: float = 1.0) -> PathMeasure:
    """A diffusion with jumps."""
    start, sizes = Independent(Normal(ONE, 0.3), 1), Independent(Normal(ZERO + 0.5, 0.3), 1)
    sde = sd.SDE(lambda t, x: -pull * x, 0.5)
    return sd.core.JumpDiffusionMeasure(start, sde, rate, sizes, start_time=0.0)


CASES: dict[str, Case] = {
    "JumpDiffusionMeasure": Case(jumping, other=lambda: jumping(1.5, 0.8), outside=-0.1),
    "IntervenedMeasure": Case(
        lambda: diffusion().do(sd.core.Intervention(0.5, {0: 2.0})),
        outside=-0.1,  # type: ignore[attr-defined]
    ),
    "TransformedMeasure": Case(positive, other=lambda: positive(0.5), outside=-0.1),
    "SquareRootProcess": Case(
        lambda: sd.core.SquareRootProcess(torch.tensor(2.0, dtype=F64), 1.0, 0.8, ONE), outside=-0.1, bias=0.0
    ),
    "stationary SquareRootProcess": Case(
        lambda: sd.core.SquareRootProcess(torch.tensor(2.0, dtype=F64), 1.0, 0.8 * ONE),
        outside=-0.1,
        bias=0.0,
    ),
    "exact TransformedMeasure": Case(
        lambda: ornstein_uhlenbeck().transformed("exp"),
        other=lambda: ornstein_uhlenbeck(0.9, 0.2).transformed("exp"),
        outside=-0.1,
        bias=0.0,
    ),
    **{
        f"LatentPathLaw, {kind}": Case(partial(latent_path, kind, noise), outside=1.5, batch=(2,))
        for kind, noise in (
            ("tight", "fractional"),
            ("gaussian", "fractional"),
            ("linearised", "fractional"),
            ("matching", "brownian"),
        )
    },
    "PosteriorPath": Case(posterior_path, other=lambda: posterior_path(y=0.3), outside=-0.1),
    "PosteriorPath in noise space": Case(
        lambda: posterior_path(True), other=lambda: posterior_path(None, 0.3), outside=-0.1
    ),
    "LinearGaussianMeasure": Case(
        ornstein_uhlenbeck, other=lambda: ornstein_uhlenbeck(0.9, 0.2), outside=-0.1, bias=0.0
    ),
    "PinnedProcess": Case(
        lambda: sd.core.PinnedProcess(ZERO, ONE, 1.3, 0.4, 0.7),
        other=lambda: sd.core.PinnedProcess(ZERO, ONE, 0.2, 0.1, 0.7),
        outside=1.5,
        bias=0.0,
    ),
    "ConditionedMeasure": Case(
        lambda: ornstein_uhlenbeck().conditioned([0.42, 1.4], ONE.expand(2, 2), 0.4),
        other=ornstein_uhlenbeck,
        outside=-0.1,
        bias=0.0,
    ),
    "TiltedMeasure": Case(
        lambda: sd.core.TiltedMeasure(
            ornstein_uhlenbeck(),
            2.0,
            sd.core.EndPotential.information(torch.diag(ONE), ONE),
            ZERO,
            torch.diag(ONE),
        ),
        outside=2.5,
        bias=0.0,
    ),
    "FractionalOU": Case(
        lambda: fractional(0.7), other=lambda: fractional(0.7, 0.9), outside=-0.1, bias=0.01
    ),
    "rough FractionalOU": Case(lambda: fractional(0.2), outside=-0.1),
    "DiffusionMeasure": Case(
        diffusion, other=lambda: diffusion().controlled(lambda t, x: 0.5 - x), outside=-0.1
    ),
}

RATES = torch.tensor([[0, 1.0, 0.3], [0.4, 0, 2.0], [0.8, 0.5, 0]], dtype=F64)


def jumps(speed: float = 1.0) -> sd.jumps.JumpMeasure:
    return sd.jumps.JumpMeasure(torch.tensor([0.5, 0.3, 0.2], dtype=F64), speed * RATES)


def seen_jumps() -> PathMeasure:
    levels = sd.jumps.GaussianLevels(torch.tensor([0.0, 1.0, 2.0], dtype=F64), 0.5)
    return jumps().conditioned([0.2, 0.5, 0.9], [0.1, 0.6, 1.8], levels)


CASES |= {
    "JumpMeasure": Case(jumps, other=lambda: jumps(1.5), outside=-0.1, bias=0.0),
    "JumpMeasure of changing rates": Case(
        lambda: sd.jumps.JumpMeasure(
            torch.tensor([0.5, 0.3, 0.2], dtype=F64), lambda t: RATES * (1 + t)[:, None, None], bound=6.0
        ),
        other=jumps,
        outside=-0.1,
        bias=0.001,
    ),
    "ConditionedJumps": Case(seen_jumps, other=jumps, outside=-0.1, bias=0.0),
    "ReactionNetwork": Case(
        lambda: sd.jumps.ReactionNetwork(["0 -> A", "A -> 0"], [3.0, 0.5], {"A": 7}), outside=-0.1, bias=0.01
    ),
}


def interpolated(epsilon: float = 0.5) -> PathMeasure:
    """The law of a generator whose fields are exactly those of a mixture of Gaussians."""
    it = Interpolant("linear")
    first = GaussianMixture(torch.ones(1, dtype=F64), ZERO[None], 1.0)
    last = GaussianMixture(
        torch.tensor([0.4, 0.6], dtype=F64), torch.tensor([[-1.0, 0.5], [1.0, 0.0]], dtype=F64), 0.5
    )
    truth = GaussianMixtureInterpolant(it, first, last)
    fit = InterpolantRegression(
        it, velocity=truth.velocity, score=truth.score, base=Independent(Normal(ZERO, ONE), 1)
    )
    return fit.generator().measure(epsilon)


def reversed_in_time() -> PathMeasure:
    """The law of the reverse equation with the exact score of Gaussian data and its exact prior."""
    process = processes()["ou"]
    truth = gaussian(process)
    end = torch.tensor(process.horizon, dtype=F64)
    spread = (0.2 * process.scale(end).square() + process.variance(end)).sqrt() * ONE
    prior = Independent(Normal(process.location(end, truth.means[0]), spread), 1)
    return ReverseDiffusion(process, truth.score, 2, torch.empty(0, dtype=F64), prior).measure()


# Drifts with rates of about two, in Euler steps of a twentieth at most: a twentieth in a moment.
CASES |= {
    "InterpolantGenerator": Case(interpolated, ts=(0.0, 1.0, 41), outside=-0.1),
    "ReverseDiffusion": Case(reversed_in_time, ts=(0.0, 3.5, 71), outside=-0.1),
}
# On a reference that isn't linear a bridge is pieced together from linearised ones.
LINEARISED = {"nonlinear": 0.4, "corrected": 0.4}
CASES |= {
    f"{name} bridge": Case(
        partial(solved, name), outside=1.5, bias=0.03, forward_error=LINEARISED.get(name, 1e-3)
    )
    for name in NAMES
}


def laws() -> list[type[PathMeasure]]:
    """Return the concrete laws that the package defines."""
    for module in pkgutil.walk_packages(sd.__path__, "stochdyn."):
        importlib.import_module(module.name)

    def below(kind: type[PathMeasure]) -> Iterator[type[PathMeasure]]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    found = {
        k for k in below(PathMeasure) if k.__module__.startswith("stochdyn.") and not inspect.isabstract(k)
    }
    return sorted(found, key=lambda kind: kind.__name__)


def suite(case: Case) -> PathMeasureSuite:
    class Suite(PathMeasureSuite):
        bias, forward_error, batch = case.bias, case.forward_error, case.batch

        def make(self) -> PathMeasure:
            return case.make()

        def ts(self) -> Tensor:
            return torch.linspace(*case.ts, dtype=F64)

        def other(self) -> PathMeasure | None:
            return None if case.other is None else case.other()

        def outside(self) -> float | None:
            return case.outside

    return Suite()


CHECKS = [name for name in dir(PathMeasureSuite) if name.startswith("test_")]


def test_every_law_has_a_factory() -> None:
    kinds = {type(case.make()) for case in CASES.values()}
    missing = [f"{kind.__module__}.{kind.__name__}" for kind in laws() if kind not in kinds]
    assert not missing, f"laws without a factory: {missing}"


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", CASES)
def test_laws(name: str, check: str) -> None:
    getattr(suite(CASES[name]), check)()
