"""Stochastic variational inference in one call, on the training loop of the library."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from pyro.optim.clipped_adam import ClippedAdam
from pyro.poutine.util import prune_subsample_sites
from torch import Tensor, nn

from stochdyn._checks import (
    as_sequence,
    check_callable,
    check_positive,
    check_positive_int,
    check_type,
    values_are_checked,
)
from stochdyn.diagnostics.explosions import drawn_anew, warn_of_explosions
from stochdyn.diagnostics.probe import reason_of
from stochdyn.errors import ExplosionError, NonFiniteError, ShapeError, StochdynError, StochdynWarning
from stochdyn.run.callbacks import Callback
from stochdyn.run.randomness import fork_random_state
from stochdyn.run.result import FitResult
from stochdyn.run.state import FitState
from stochdyn.run.trainer import fit

__all__ = ["fit_guide"]

#: The learning rate of the last update over that of the first, so that the noise of the gradient averages out.
_DECAY = 0.01
_MOST_STEPS = 5000


#: The number of updates between two looks at the bound, how often the learning rate falls before the end, and by what.
_LOOK = 20
_FALLS = 2
_FALL = 0.2
#: A gain of the bound in nats between two looks that nobody needs.
_NEGLIGIBLE = 0.02


class _UntilSettled(Callback):
    """Let the learning rate fall where the bound gains no more than its own noise, and stop after a few falls.

    The mean bound of the updates since the last look is compared with that before it, by their standard errors.
    """

    def __init__(self) -> None:
        self.falls = 0
        self.since = 0

    def on_step(self, state: FitState) -> None:
        if state.step % _LOOK or state.step - self.since < 2 * _LOOK:
            return
        before, now = state.losses[-2 * _LOOK : -_LOOK].double(), state.losses[-_LOOK:].double()
        noise = float(((before.var() + now.var()) / _LOOK).sqrt())
        if float(before.mean() - now.mean()) > max(noise, _NEGLIGIBLE):
            return
        self.falls, self.since = self.falls + 1, state.step - _LOOK
        if self.falls > _FALLS:
            state.request_stop()
        for group in state.optimizer.param_groups:
            group["lr"] *= _FALL

    def state_dict(self) -> dict[str, Any]:
        return {"falls": self.falls, "since": self.since}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.falls, self.since = state["falls"], state["since"]


class _Bound(nn.Module):
    """The negative evidence lower bound of a model and a guide with their arguments bound."""

    def __init__(
        self, bound: nn.Module, guide: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        super().__init__()
        self.guide = guide
        self._call = (bound, args, kwargs)
        #: How many evaluations there were, and how many had a path that exploded.
        self.count, self.lost = 0, 0

    def forward(self) -> Tensor:
        bound, args, kwargs = self._call
        found: list[Tensor] = []

        def draw() -> Tensor:
            found.clear()
            found.append(bound(*args, **kwargs))
            if values_are_checked() and not bool(torch.isfinite(found[0].detach())):
                raise ExplosionError("a draw has no finite density")
            return found[0]

        try:
            value, lost = drawn_anew(draw)
        except NonFiniteError:
            if found:
                return found[0]  # for the run to refuse
            raise
        self.count, self.lost = self.count + 1 + lost, self.lost + lost
        return value


def fit_guide(
    model: Callable[..., Any],
    guide: nn.Module,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    steps: int | None = None,
    lr: float = 0.01,
    num_particles: int = 8,
    seed: int | None = 0,
    progress: bool = True,
    checkpoint: str | os.PathLike[str] | None = None,
    resume: bool = False,
) -> FitResult:
    r"""Fit a guide to the posterior of a Pyro model, in place.

    It maximises the evidence lower bound

    .. math:: E_{q}\big[\log p(y, z) - \log q(z)\big]

    over the parameters of the guide by Adam with clipped gradients. The learning rate falls to a hundredth over a given number
    of steps. Without one it falls when the bound gains no more than its own noise, and the run ends when that happens a third time.
    Use it where the defaults of stochastic variational inference will do; Pyro's ``SVI`` serves every other need.

    Args:
        model: A Pyro model. One that can't be run on many draws at once is run draw by draw.
        guide: Its guide, a module.
        args: The positional arguments of model and guide.
        kwargs: The keyword arguments of model and guide.
        steps: The number of updates of the parameters; None trains until the bound has settled, and at most 5000.
        lr: The learning rate of the first update.
        num_particles: The number of draws in each estimate of the bound.
        seed: The seed of the run; the global random state is left as it was. None draws from the global state.
        progress: Whether to show a bar.
        checkpoint: The directory for checkpoints.
        resume: Whether to continue the run in ``checkpoint``.

    Returns:
        The result of :func:`stochdyn.fit`: ``losses`` are negative bounds.

    Raises:
        InvalidInputError: For arguments that can't work, before any step.
        NonFiniteLossError: If a bound isn't finite.
        ExplosionError: If paths explode in every draw.

    Warns:
        StochdynWarning: If the model mixes draws or fails when it is run on many at once.
        ApproximationWarning: If paths exploded, and were drawn anew. The bound is then too large by minus the logarithm of the
            share of draws that don't explode, which :func:`stochdyn.diagnostics.draw_posterior` counts.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from pyro.infer.autoguide import AutoNormal
        >>> def model(y):
        ...     rate = pyro.sample("rate", dist.Normal(0.0, 1.0))
        ...     pyro.sample("y", dist.Normal(rate, 1.0), obs=y)
        >>> guide = AutoNormal(model)
        >>> result = fit_guide(model, guide, (torch.tensor(1.0),), steps=300, lr=0.05)
        >>> bool(abs(guide.median()["rate"] - 0.5) < 0.1)
        True
    """
    check_callable(model, "model", "a Pyro model")
    check_type(guide, nn.Module, "guide")
    if steps is not None:
        check_positive_int(steps, "steps")
    check_positive_int(num_particles, "num_particles")
    check_positive(lr, "lr")
    args = tuple(as_sequence(args, "args", "positional arguments of the model"))
    kwargs = dict(kwargs or {})
    parameter = next(guide.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    with fork_random_state(seed, device), torch.random.fork_rng(), poutine.block():
        # An automatic guide has its parameters only once it has run.
        drawn_anew(lambda: guide(*args, **kwargs))
        with torch.no_grad():
            (drawn, single), _ = drawn_anew(lambda: _traces(model, guide, args, kwargs))
            depth = max(_plate_depth(drawn), _plate_depth(single))
            obstacle = _obstacle_to_many_draws(model, guide, args, kwargs, depth, single)
    if obstacle is not None:
        warnings.warn(
            "the model can't be run on many draws at once, so it runs once per draw, which is slow. Declare batch axes with "
            f"pyro.plate and give parameters their axes from the right, as in k[..., None]. What went wrong: {obstacle}",
            StochdynWarning,
            stacklevel=2,
        )
    elbo: Any = Trace_ELBO(
        num_particles=num_particles, vectorize_particles=obstacle is None, max_plate_nesting=depth
    )
    bound = _Bound(elbo(model, guide), guide, args, kwargs)
    result = fit(
        bound,
        steps=_MOST_STEPS if steps is None else steps,
        lr=lr,
        seed=seed,
        progress=progress,
        checkpoint=checkpoint,
        resume=resume,
        optimizer=ClippedAdam if steps is None else partial(ClippedAdam, lrd=_DECAY ** (1 / steps)),
        callbacks=[_UntilSettled()] if steps is None else [],
    )
    warn_of_explosions(bound.lost, bound.count, "evaluations of the bound")
    return result


def _traces(
    model: Callable[..., Any], guide: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[poutine.Trace, poutine.Trace]:
    """Return a run of the guide, and one of the model on its draw."""
    drawn = poutine.trace(guide).get_trace(*args, **kwargs)
    return drawn, poutine.trace(poutine.replay(model, trace=drawn)).get_trace(*args, **kwargs)


def _plate_depth(trace: poutine.Trace) -> int:
    """Return how many batch axes the plates of a program take."""
    frames = [
        f for site in trace.nodes.values() if site["type"] == "sample" for f in site["cond_indep_stack"]
    ]
    return max((-f.dim for f in frames if f.dim is not None), default=0)


def _obstacle_to_many_draws(
    model: Callable[..., Any],
    guide: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    depth: int,
    single: poutine.Trace,
) -> str | None:
    """Return why a model and its guide can't be run on two draws at once, or None if they can.

    An axis of draws that meets an axis of data gives densities of every draw with every other one: a number of them that isn't
    twice that of one draw, ``single``, and a bound of another model.
    """
    one = _densities(single)

    def plated(program: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with pyro.plate("_stochdyn_draws", 2, dim=-depth - 1):
                return program(*args, **kwargs)

        return run

    try:
        drawn = poutine.trace(plated(guide)).get_trace(*args, **kwargs)
        two = _densities(poutine.trace(poutine.replay(plated(model), trace=drawn)).get_trace(*args, **kwargs))
    except ShapeError as error:
        return str(error)
    except StochdynError:
        return None  # of these two draws, as of any others
    except Exception as error:  # whatever a model may raise on axes that it wasn't written for
        return reason_of(error)
    for name, number in one.items():
        if two[name] != 2 * number:
            return f"site {name!r} has {two[name]} densities on two draws, where {2 * number} were due"
    return None


def _densities(trace: poutine.Trace) -> dict[str, int]:
    """Return how many densities the sites of a model have."""
    trace = prune_subsample_sites(trace)
    trace.compute_log_prob()
    return {n: site["log_prob"].numel() for n, site in trace.nodes.items() if site["type"] == "sample"}
