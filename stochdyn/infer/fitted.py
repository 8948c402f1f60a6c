"""A posterior in one call, and what is asked of it: draws, predictions, forecasts, a picture."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS
from pyro.infer.autoguide import init_to_median
from torch import Tensor

from stochdyn._checks import check_callable, check_choice, check_positive, check_positive_int, check_type
from stochdyn.errors import ConvergenceWarning, InvalidInputError, UnknownSiteError
from stochdyn.infer.distributions import DiffusionPath, PathIncrements
from stochdyn.infer.fitting import fit_guide
from stochdyn.infer.guides import AutoPathGuide
from stochdyn.infer.laplace import start_at_mode
from stochdyn.infer.path_law import PosteriorPath
from stochdyn.infer.predictive import PathDraws, predict_path
from stochdyn.infer.skewed import AutoSkewedNormal
from stochdyn.run.randomness import fork_random_state
from stochdyn.run.storage import save

__all__ = ["GuideMethod", "LaplaceMethod", "NUTSMethod", "Posterior", "fit_posterior"]

_MIN_DRAWS_FOR_KHAT = 100


@dataclass(frozen=True)
class LaplaceMethod:
    """The Laplace approximation of the parameters, with paths integrated out around their most probable one.

    Use it for a first look: it takes seconds.

    Attributes:
        num_starts: number of draws of the prior whose bounds are compared first; more than 0 where there may be several modes.
        max_iterations: bound of the iterations of the search for the mode.
    """

    num_starts: int = 0
    max_iterations: int = 30

    def __post_init__(self) -> None:
        check_positive_int(self.num_starts, "num_starts", 0)
        check_positive_int(self.max_iterations, "max_iterations")


@dataclass(frozen=True)
class GuideMethod:
    """Variational inference from the Laplace approximation on; paths follow every draw of the parameters.

    Use it when in doubt.

    Attributes:
        steps: number of updates of the guide.
        lr: learning rate of the first update.
        num_particles: number of draws in each estimate of the bound.
        num_starts: see :class:`LaplaceMethod`.
    """

    steps: int = 150
    lr: float = 0.03
    num_particles: int = 8
    num_starts: int = 0

    def __post_init__(self) -> None:
        check_positive_int(self.steps, "steps")
        check_positive(self.lr, "lr")
        check_positive_int(self.num_particles, "num_particles")
        check_positive_int(self.num_starts, "num_starts", 0)


@dataclass(frozen=True)
class NUTSMethod:
    """The no-U-turn sampler on parameters and paths together.

    Use it to check the other two on a small model: long paths make it slow.

    Attributes:
        warmup: number of steps of each chain that adapt the sampler and are thrown away.
        num_chains: number of chains.
    """

    warmup: int = 300
    num_chains: int = 1

    def __post_init__(self) -> None:
        check_positive_int(self.warmup, "warmup")
        check_positive_int(self.num_chains, "num_chains")


_METHODS: dict[str, Any] = {"guide": GuideMethod, "laplace": LaplaceMethod, "nuts": NUTSMethod}


@dataclass(frozen=True, repr=False)
class Posterior:
    """A fitted posterior.

    Attributes:
        model: the Pyro model.
        source: the fitted guide, or the sampler that has run.
        args: arguments of the model.
        idata: draws, densities, replicated and observed data, an ArviZ container.
        khat: k-hat of the importance weights: below 0.7 the draws may be trusted or weighted; NaN for a sampler.
        paths: the names of the path sites.
        seed: seed of the fit and of predictions.
    """

    model: Callable[..., Any]
    source: Any
    args: tuple[Any, ...]
    idata: Any
    khat: float
    paths: tuple[str, ...]
    seed: int
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        return f"Posterior({type(self.source).__name__}, paths={list(self.paths)}, khat={self.khat:.2f})"

    def law(self, name: str | None = None) -> PosteriorPath:
        """Return the posterior law of a path; ``name`` may be left out where there is one path."""
        return PosteriorPath(self.model, self.source, self._name(name), self.args, self.kwargs)

    def predict(self, ts: Tensor | None = None, name: str | None = None, num_draws: int = 1000) -> PathDraws:
        """Return draws of a path at times of your choice, or on the fitted grid; see :func:`predict_path`."""
        return predict_path(
            self.model,
            self.source,
            self._name(name),
            ts,
            args=self.args,
            kwargs=self.kwargs,
            num_draws=num_draws,
            seed=self.seed,
        )

    def forecast(self, ts: Tensor, name: str | None = None, num_draws: int = 1000) -> PathDraws:
        """Return draws of a path at times after the end of the fitted grid.

        Raises:
            InvalidInputError: if a time isn't after it.
        """
        draws = self.predict(ts, name, num_draws)
        if draws.num_fitted:
            raise InvalidInputError(
                "a forecast begins after the fitted grid",
                got=f"{draws.num_fitted} times before its end",
                hint="use predict",
            )
        return draws

    def plot(
        self, ts: Tensor | None = None, name: str | None = None, ax: Any = None, component: int = 0
    ) -> Any:
        """Draw the median of a path and its central 50 % and 90 % intervals; see :func:`~stochdyn.diagnostics.plot_paths`.

        Args:
            ts: ``(T,)`` times, forecasts included; the fitted grid if None.
            name: the path's site, where there are several.
            ax: axes of Matplotlib; new ones if None.
            component: the component of the state.

        Returns:
            The axes.
        """
        from stochdyn.diagnostics.plots import plot_paths

        site = self._name(name)
        draws = self.predict(ts, site)
        if draws.x.ndim != 3:
            raise InvalidInputError(
                "a picture shows one series", got=f"draws of shape {tuple(draws.x.shape)}"
            )
        ahead = 0 < draws.num_fitted < draws.ts.shape[-1]
        end = float(draws.ts[draws.num_fitted - 1]) if ahead else None
        return plot_paths(draws.ts, draws.x, component=component, forecast_from=end, label=site, ax=ax)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the posterior into a directory, from which :func:`stochdyn.load` reads it; see :func:`stochdyn.save`.

        The model must be a function at the top of a module, marked by :func:`stochdyn.run.storable`.

        Args:
            path: the directory, made if need be; what it holds already is replaced.

        Raises:
            UnavailableError: if something inside can't be saved, such as a model inside another function.
            CheckpointWriteError: if the disk is full or refuses; what was there is then still whole.
        """
        save(self, path)

    def _name(self, name: str | None) -> str:
        if name is not None:
            return name
        if len(self.paths) == 1:
            return self.paths[0]
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UnknownSiteError(
            "say which path is meant",
            got="no name",
            expected=f"one of {list(self.paths)}" if self.paths else "a path site",
        )


def fit_posterior(
    model: Callable[..., Any],
    *args: Any,
    method: str | GuideMethod | LaplaceMethod | NUTSMethod = "guide",
    num_draws: int = 1000,
    seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> Posterior:
    """Fit the posterior of a Pyro model with paths, parameters or both, by a default that a careful user would choose.

    Paths follow every draw of the parameters (``AutoPathGuide(feedback="recomputed")`` with a joint, skewed law of the
    parameters, from the Laplace approximation on), so the posterior of the parameters comes out neither too narrow nor too
    wide on account of the paths. Paths in subsampled plates are read off the data by an encoder. A model without paths gets
    a skewed normal guide.

    Args:
        model: Pyro model.
        args: arguments of the model.
        method: ``"guide"``, ``"laplace"``, ``"nuts"``, or one of the methods as an object with its options.
        num_draws: number of posterior draws; of each chain for a sampler.
        seed: seed of the fit and of the draws; the global random state is left as it was.
        progress: whether to show a bar.
        kwargs: keyword arguments of the model.

    Returns:
        The posterior.

    Raises:
        InvalidInputError: for arguments that can't work, before any work.

    Warns:
        ConvergenceWarning: if k-hat exceeds 0.7, with what to do about it.

    Example:
        >>> import pyro.distributions as dist
        >>> from stochdyn import SDE
        >>> from stochdyn.infer import sample_path
        >>> def model(ts, y):
        ...     rate = pyro.sample("rate", dist.LogNormal(0.0, 0.5))
        ...     x = sample_path("x", SDE(lambda t, x: -rate[..., None] * x, 0.5), torch.ones(1), ts)
        ...     pyro.sample("y", dist.Normal(x[..., 1:, 0], 0.1).to_event(1), obs=y)
        >>> ts, y = torch.linspace(0, 1, 6), torch.tensor([0.8, 0.7, 0.5, 0.5, 0.4])
        >>> post = fit_posterior(model, ts, y, method="laplace", num_draws=200)
        >>> post.predict([0.5, 1.0, 2.0]).x.shape
        torch.Size([1000, 3, 1])
    """
    check_callable(model, "model", "a Pyro model")
    if isinstance(method, str):
        check_choice(method, tuple(_METHODS), "method")
        method = _METHODS[method]()
    check_type(method, (GuideMethod, LaplaceMethod, NUTSMethod), "method")
    check_positive_int(num_draws, "num_draws")
    from stochdyn.diagnostics.inference_data import to_inference_data
    from stochdyn.diagnostics.psis import pareto_smooth

    with fork_random_state(seed, torch.device("cpu")):
        with poutine.block(), pyro.validation_enabled(False), torch.no_grad():
            sites: Any = poutine.trace(model).get_trace(*args, **kwargs).nodes
        latent = {n: s for n, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
        paths = {
            n: (s["infer"] or {}).get("path", n)
            for n, s in latent.items()
            if isinstance(s["fn"], DiffusionPath | PathIncrements)
        }
        if isinstance(method, NUTSMethod):
            source: Any = MCMC(
                NUTS(model, init_strategy=init_to_median(num_samples=20)),
                num_samples=num_draws,
                warmup_steps=method.warmup,
                num_chains=method.num_chains,
                disable_progbar=not progress,
            )
            source.run(*args, **kwargs)
        else:
            assert not isinstance(method, str)
            source = _fit(model, method, latent, paths, args, kwargs, progress)
    idata = to_inference_data(model, source, args, kwargs, num_draws=num_draws, seed=seed)
    khat = math.nan
    if not isinstance(method, NUTSMethod) and num_draws >= _MIN_DRAWS_FOR_KHAT:
        weights = torch.as_tensor(idata.sample_stats["log_weight"].values).flatten()
        khat = float(pareto_smooth(weights).khat)
        idata.attrs["khat"] = khat
        if khat > 0.7:
            warnings.warn(
                f"the approximation of the posterior is poor (k-hat {khat:.2f}): weight the draws by "
                "sample_stats.log_weight, take GuideMethod with more steps, or method='nuts'",
                ConvergenceWarning,
                stacklevel=2,
            )
    return Posterior(model, source, args, idata, khat, tuple(dict.fromkeys(paths.values())), seed, kwargs)


def _fit(
    model: Callable[..., Any],
    method: GuideMethod | LaplaceMethod,
    latent: dict[str, Any],
    paths: dict[str, str],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    progress: bool,
) -> Any:
    """Return the fitted guide."""
    subsampled = any(
        f.full_size is not None and f.full_size != f.size
        for n in paths
        for f in latent[n]["cond_indep_stack"]
    )
    guide: Any
    if not paths:
        guide = AutoSkewedNormal(model, init_to_median(num_samples=50)).start_at_mode(*args, **kwargs)
    elif subsampled:
        guide = AutoPathGuide(model)
    else:
        guide = AutoPathGuide(model, hidden=(), feedback="recomputed", rest=AutoSkewedNormal)
        with poutine.block():
            guide(*args, **kwargs)
        if guide.rest is not None:
            iterations = method.max_iterations if isinstance(method, LaplaceMethod) else 30
            start_at_mode(guide, *args, max_iterations=iterations, num_starts=method.num_starts, **kwargs)
    trainable = any(True for _ in guide.parameters()) if not isinstance(method, LaplaceMethod) else False
    if trainable and isinstance(method, GuideMethod):
        fit_guide(
            model,
            guide,
            args,
            kwargs,
            steps=method.steps,
            lr=method.lr,
            num_particles=method.num_particles,
            seed=None,
            progress=progress,
        )
    return guide
