"""Ways to draw a posterior from a conditioned model, one call each, for calibration."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pyro
from pyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.infer.mcmc.mcmc_kernel import MCMCKernel
from torch import Tensor

from stochdyn._checks import check_positive, check_positive_int
from stochdyn.diagnostics.draws import draw_posterior
from stochdyn.errors import InvalidInputError

__all__ = ["MCMCSampler", "PosteriorSampler", "VariationalSampler", "as_sampler"]


class PosteriorSampler(Protocol):
    """Draws the posterior of a conditioned model."""

    def __call__(
        self, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], num_draws: int, /
    ) -> Mapping[str, Tensor]:
        """Return by latent site ``(num_draws, *shape)``, nearly independent."""


@dataclass(frozen=True)
class MCMCSampler:
    """Draw by Markov chain Monte Carlo.

    Use it to calibrate MCMC itself, or a model whose posterior is small enough for it.

    Args:
        kernel: What makes a kernel of a model.
        warmup: The number of steps of adaptation.
        thinning: The number of draws of the chain per draw that is kept; ranks need nearly independent ones.
        options: Keyword arguments of the kernel.

    Example:
        >>> import pyro.distributions as dist, torch
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(rate, 1.0), obs=y)
        >>> MCMCSampler(warmup=10, thinning=1)(model, (torch.tensor(1.0),), {}, 5)["rate"].shape
        torch.Size([5])
    """

    kernel: Callable[..., Any] = NUTS
    warmup: int = 200
    thinning: int = 3
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_positive_int(self.warmup, "warmup", minimum=0)
        check_positive_int(self.thinning, "thinning")

    def __call__(
        self, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], num_draws: int
    ) -> dict[str, Tensor]:
        """Return draws of the posterior by latent site, ``(num_draws, *shape)``, nearly independent."""
        run = MCMC(
            self.kernel(model, **self.options),
            num_samples=num_draws * self.thinning,
            warmup_steps=self.warmup,
            disable_progbar=True,
        )
        run.run(*args, **kwargs)
        return {name: value[self.thinning - 1 :: self.thinning] for name, value in run.get_samples().items()}


@dataclass(frozen=True)
class VariationalSampler:
    """Fit a guide by stochastic variational inference and draw from it; the parameter store is left alone.

    Use it to find out whether a guide is wide enough for a model.

    Args:
        guide: What makes a guide of a model.
        steps: The number of updates of the optimiser.
        lr: The learning rate of Adam, which falls to a hundredth of itself over the run.
        num_particles: The number of draws per step.

    Example:
        >>> import pyro.distributions as dist, torch
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(rate, 1.0), obs=y)
        >>> VariationalSampler(steps=10)(model, (torch.tensor(1.0),), {}, 5)["rate"].shape
        torch.Size([5])
    """

    guide: Callable[..., Any] = AutoNormal
    steps: int = 1000
    lr: float = 0.02
    num_particles: int = 1

    def __post_init__(self) -> None:
        check_positive_int(self.steps, "steps")
        check_positive(self.lr, "lr")
        check_positive_int(self.num_particles, "num_particles")

    def __call__(
        self, model: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any], num_draws: int
    ) -> dict[str, Tensor]:
        """Return draws of the posterior by latent site, ``(num_draws, *shape)``, nearly independent."""
        with pyro.get_param_store().scope():
            guide = self.guide(model)
            optimiser = pyro.optim.ClippedAdam({"lr": self.lr, "lrd": 0.01 ** (1 / self.steps)})
            svi = SVI(model, guide, optimiser, Trace_ELBO(num_particles=self.num_particles))
            for _ in range(self.steps):
                svi.step(*args, **kwargs)
            draws = draw_posterior(model, guide, args, kwargs, num_draws=num_draws, seed=None)
        return {name: value for name, value in draws.values.items() if draws.sites[name].kind == "latent"}


def as_sampler(infer: Any) -> PosteriorSampler:
    """Return ``infer``, or the sampler with the defaults for an MCMC kernel or autoguide class."""
    if inspect.isclass(infer) and issubclass(infer, MCMCKernel):
        return MCMCSampler(infer)
    if inspect.isclass(infer) and issubclass(infer, AutoGuide):
        return VariationalSampler(infer)
    if not callable(infer):
        raise InvalidInputError(
            "infer can't be called", got=type(infer).__name__, expected="a sampler or a class"
        )
    return infer
