"""A posterior in one call, and what is asked of it: draws, predictions, forecasts, a picture."""

from __future__ import annotations

import functools
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
from stochdyn._transforms import recording
from stochdyn.core.sde.intervention import Intervention
from stochdyn.diagnostics.draws import ChainDraws
from stochdyn.diagnostics.explosions import drawn_anew
from stochdyn.errors import ConvergenceWarning, InvalidInputError, UnknownSiteError
from stochdyn.infer.distributions import DiffusionPath, PathIncrements
from stochdyn.infer.fitting import fit_guide
from stochdyn.infer.guides import AutoPathGuide
from stochdyn.infer.hierarchical import AutoHierarchicalNormal
from stochdyn.infer.laplace import start_at_mode
from stochdyn.infer.panel import Panel
from stochdyn.infer.particle_site import ParticlesInSites
from stochdyn.infer.path_law import PosteriorPath
from stochdyn.infer.pmmh import ChainRun, PMMHMethod, run_chains
from stochdyn.infer.predictive import PathDraws, predict_path
from stochdyn.infer.reweighting import draw_weighted, learn_from_weights
from stochdyn.infer.skewed import AutoSkewedNormal
from stochdyn.run.randomness import fork_random_state
from stochdyn.run.storage import save

__all__ = ["GuideMethod", "LaplaceMethod", "NUTSMethod", "Posterior", "fit_posterior"]

_MIN_DRAWS_FOR_KHAT = 100
_PRIOR_DRAWS = 200
# The share of the draws that look beyond what the guide was trained to.
_WIDE_SHARE = 0.1
# Iterations of the search for the mode before training, which goes on from wherever it ends.
_SEARCH = 15


@dataclass(frozen=True)
class LaplaceMethod:
    """The Laplace approximation of the parameters, with paths integrated out around their most probable one.

    Use it for a first look: it takes seconds.

    Attributes:
        num_starts: The number of draws of the prior whose bounds are compared first; more than 0 where there may be several
            modes.
        max_iterations: The largest number of iterations of the search for the mode.
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

    Draws are taken by their importance weights, with which the law of the parameters has been mended where its tails were cut
    off, so their mean and spread are those of the posterior as long as k-hat is below 0.7.

    Attributes:
        steps: The number of updates of the guide; None trains until the bound gains no more than its own noise.
        lr: The learning rate of the first update.
        num_particles: The number of draws in each estimate of the bound.
        num_starts: The number of draws of the prior whose bounds are compared first; more than 0 where there may be several
            modes.
        rounds: The largest number of times that the law of the parameters learns from its weights; 0 leaves it as trained.
        proposals: The number of draws of the guide for each draw that is taken by its weight.
    """

    steps: int | None = None
    lr: float = 0.03
    num_particles: int = 8
    num_starts: int = 0
    rounds: int = 3
    proposals: int = 2

    def __post_init__(self) -> None:
        if self.steps is not None:
            check_positive_int(self.steps, "steps")
        check_positive_int(self.rounds, "rounds", 0)
        check_positive_int(self.proposals, "proposals")
        check_positive(self.lr, "lr")
        check_positive_int(self.num_particles, "num_particles")
        check_positive_int(self.num_starts, "num_starts", 0)


@dataclass(frozen=True)
class NUTSMethod:
    """The no-U-turn sampler on parameters and paths together.

    Use it to check the other two on a small model: long paths make it slow.

    Attributes:
        warmup: The number of steps of each chain that adapt the sampler and are thrown away.
        num_chains: The number of chains.
    """

    warmup: int = 300
    num_chains: int = 1

    def __post_init__(self) -> None:
        check_positive_int(self.warmup, "warmup")
        check_positive_int(self.num_chains, "num_chains")


_METHODS: dict[str, Any] = {
    "guide": GuideMethod,
    "laplace": LaplaceMethod,
    "nuts": NUTSMethod,
    "pmmh": PMMHMethod,
}


@dataclass(frozen=True, repr=False)
class Posterior:
    """A fitted posterior.

    Attributes:
        model: The Pyro model.
        source: The fitted guide, or the sampler that has run.
        args: The positional arguments of the model.
        idata: An ArviZ container: posterior, prior, prior and posterior predictive draws, log-likelihood, observed and constant
            data.
        khat: The shape of the tail of the importance weights: below 0.7 the draws may be trusted; NaN for a sampler.
        paths: The names of the path sites.
        seed: The seed of the fit and of predictions.
        kwargs: The keyword arguments of the model.
        draws: The draws of the posterior ``(S, *shape)`` by latent site, which predictions come from; None where they come from
            ``source``.
        ess: The number of independent draws that the draws are worth: by their weights for a guide, the smallest of all sites
            for a sampler; NaN where it isn't known.
        rhat: The largest R-hat of all parameters, for a sampler: above 1.01 the chains haven't mixed; NaN for a guide.
        log_evidence: The logarithm of the evidence, for comparing models; NaN for a sampler, for subsampled data, and for fewer
            than 100 draws of ``method="laplace"``.
    """

    model: Callable[..., Any]
    source: Any
    args: tuple[Any, ...]
    idata: Any
    khat: float
    paths: tuple[str, ...]
    seed: int
    kwargs: dict[str, Any] = field(default_factory=dict)
    draws: dict[str, Tensor] | None = None
    ess: float = math.nan
    rhat: float = math.nan
    log_evidence: float = math.nan

    def __repr__(self) -> str:
        named = {"khat": self.khat, "rhat": self.rhat, "ess": self.ess}
        judged = ", ".join(
            f"{n}={v:.0f}" if n == "ess" else f"{n}={v:.2f}" for n, v in named.items() if v == v
        )
        return f"Posterior({type(self.source).__name__}, paths={list(self.paths)}, {judged})"

    @property
    def _drawn(self) -> Any:
        """What predictions are drawn from."""
        return self.source if self.draws is None else self.draws

    def law(self, name: str | None = None) -> PosteriorPath:
        """Return the posterior law of a path; ``name`` may be left out where there is one path."""
        return PosteriorPath(self.model, self._drawn, self._name(name), self.args, self.kwargs)

    def predict(
        self,
        ts: Tensor | None = None,
        name: str | None = None,
        num_draws: int = 1000,
        do: Intervention | None = None,
    ) -> PathDraws:
        """Return draws of a path at times of your choice, or on the fitted grid, under an intervention if one is given; see :func:`predict_path`."""
        return predict_path(
            self.model,
            self._drawn,
            self._name(name),
            ts,
            args=self.args,
            kwargs=self.kwargs,
            num_draws=num_draws,
            seed=self.seed,
            do=do,
        )

    def forecast(
        self, ts: Tensor, name: str | None = None, num_draws: int = 1000, do: Intervention | None = None
    ) -> PathDraws:
        """Return draws of a path at times after the end of the fitted grid, under an intervention if one is given.

        Raises:
            InvalidInputError: If a time isn't after it.
        """
        draws = self.predict(ts, name, num_draws, do)
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
            ts: The times ``(T,)``, forecasts included; the fitted grid if None.
            name: The path's site, where there are several.
            ax: The Matplotlib axes; new ones if None.
            component: The component of the state.

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
            path: The directory, made if need be; what it holds already is replaced.

        Raises:
            UnavailableError: If something inside can't be saved, such as a model inside another function.
            CheckpointWriteError: If the disk is full or refuses; what was there is then still whole.
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
    method: str | GuideMethod | LaplaceMethod | NUTSMethod | PMMHMethod = "guide",
    num_draws: int = 1000,
    seed: int = 0,
    progress: bool = True,
    **kwargs: Any,
) -> Posterior:
    """Fit the posterior of a Pyro model with paths, parameters or both, by a default that a careful user would choose.

    Paths follow every draw of the parameters (``AutoPathGuide(feedback="recomputed")``), and members of a plate the parameters
    that they share (:class:`AutoHierarchicalNormal`), from the Laplace approximation on. Draws are taken by their importance
    weights, so they have the posterior's means and spreads as long as k-hat is below 0.7. Paths in subsampled plates are read
    off the data by an encoder.

    Args:
        model: A Pyro model.
        args: The positional arguments of the model. A :class:`stochdyn.Panel` among them names the axes of ``idata``.
        method: ``"guide"``, ``"laplace"``, ``"nuts"``, ``"pmmh"`` (for :class:`ParticleObservations`), or one of the
            methods as an object with its options.
        num_draws: The number of posterior draws; of each chain for a sampler.
        seed: The seed of the fit and of the draws; the global random state is left as it was.
        progress: Whether to show a bar.
        kwargs: The keyword arguments of the model.

    Returns:
        The posterior.

    Raises:
        InvalidInputError: For arguments that can't work, before any work.

    Warns:
        ConvergenceWarning: If k-hat exceeds 0.7, or R-hat 1.01, with what to do about it.

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
    check_type(method, (GuideMethod, LaplaceMethod, NUTSMethod, PMMHMethod), "method")
    check_positive_int(num_draws, "num_draws")
    from stochdyn.diagnostics.inference_data import to_inference_data
    from stochdyn.diagnostics.psis import importance_evidence

    with fork_random_state(seed, torch.device("cpu")):
        with poutine.block(), pyro.validation_enabled(False), torch.no_grad():
            sites: Any = poutine.trace(model).get_trace(*args, **kwargs).nodes
        latent = {n: s for n, s in sites.items() if s["type"] == "sample" and not s["is_observed"]}
        paths = {
            n: (s["infer"] or {}).get("path", n)
            for n, s in latent.items()
            if isinstance(s["fn"], DiffusionPath | PathIncrements)
        }
        judged: dict[str, Any] = {}
        chains: ChainRun | None = None
        if isinstance(method, PMMHMethod):
            chains = run_chains(model, args, kwargs, method, num_draws, progress)
            source: Any = {n: v.flatten(0, 1) for n, v in chains.draws.items()}
        elif isinstance(method, NUTSMethod):
            source = MCMC(
                NUTS(model, init_strategy=init_to_median(num_samples=20)),
                num_samples=num_draws,
                warmup_steps=method.warmup,
                num_chains=method.num_chains,
                disable_progbar=not progress,
            )
            with recording():
                source.run(*args, **kwargs)
        else:
            assert not isinstance(method, str)
            source = _fit(model, method, latent, paths, args, kwargs, progress)
            if isinstance(method, GuideMethod) and not _is_subsampled(latent):
                count = max(method.proposals * num_draws, _MIN_DRAWS_FOR_KHAT)
                taken = draw_weighted(model, source, args, kwargs, num_draws, count)
                judged = {
                    "draws": taken.values,
                    "khat": taken.khat,
                    "ess": taken.ess,
                    "log_evidence": taken.log_evidence,
                }
    coords = {n: v for a in (*args, *kwargs.values()) if isinstance(a, Panel) for n, v in a.coords.items()}
    idata = to_inference_data(
        # The density of a particle filter is drawn anew at every call: what counts is what the chains kept.
        model if chains is None else _without_estimates(model),
        judged.get("draws", source if chains is None else ChainDraws(source, len(chains.log_joint))),
        args,
        kwargs,
        num_draws=num_draws,
        coords=coords,
        seed=seed,
        num_prior_draws=_PRIOR_DRAWS,
    )
    if chains is not None:
        idata.sample_stats["lp"].values[...] = chains.log_joint.numpy()
        for name, kept in chains.log_likelihood.items():
            idata.log_likelihood[name].values[...] = kept.numpy()
        idata.attrs.update(acceptance=chains.acceptance, num_particles=chains.num_particles)
        judged = {"draws": source, **_mixing(idata)}
        limit, found = 1.05, f", acceptance {chains.acceptance:.2f}"
        remedy = "PMMHMethod with more warmup, more num_draws, or the guided filter in the site"
    elif isinstance(method, NUTSMethod):
        judged = _mixing(idata)
        limit, found = 1.01, ""
        remedy = "NUTSMethod with more warmup and num_chains=4, or put paths into noise space (NoiseReparam)"
    elif not judged and num_draws >= _MIN_DRAWS_FOR_KHAT:
        weights = torch.as_tensor(idata.sample_stats["log_weight"].values).flatten()
        found_by_weights = importance_evidence(weights, smooth=True)
        judged = {
            "khat": float(found_by_weights.khat),
            "ess": float(found_by_weights.effective_sample_size),
        }
        if not _is_subsampled(latent):
            judged["log_evidence"] = float(found_by_weights.log_evidence)
    if isinstance(method, NUTSMethod | PMMHMethod) and judged["rhat"] > limit:
        warnings.warn(
            f"the chains haven't mixed (R-hat {judged['rhat']:.3f}, {judged['ess']:.0f} independent draws{found}): take {remedy}",
            ConvergenceWarning,
            stacklevel=2,
        )
    khat = judged.setdefault("khat", math.nan)
    for name in ("khat", "ess", "rhat", "log_evidence"):
        if math.isfinite(judged.get(name, math.nan)):
            idata.attrs[name] = judged[name]
    if khat > 0.7:
        warnings.warn(
            f"the approximation of the posterior is poor (k-hat {khat:.2f}): look at parameters that the data say little "
            "about, take GuideMethod(num_starts=20) where there may be several modes, more rounds, or method='nuts'",
            ConvergenceWarning,
            stacklevel=2,
        )
    return Posterior(
        model,
        source,
        args,
        idata,
        paths=tuple(dict.fromkeys(paths.values())),
        seed=seed,
        kwargs=kwargs,
        **judged,
    )


def _without_estimates(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a model whose densities by particle filters are left out."""

    @functools.wraps(model)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        with ParticlesInSites(None):
            return model(*args, **kwargs)

    return quiet


def _is_subsampled(latent: dict[str, Any]) -> bool:
    frames = [f for site in latent.values() for f in site["cond_indep_stack"]]
    return any(f.full_size is not None and f.full_size != f.size for f in frames)


def _mixing(idata: Any) -> dict[str, float]:
    """Return the largest R-hat and the smallest effective sample size of the posterior, by ArviZ."""
    import arviz

    posterior = idata.posterior
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # A value that never moves, such as a path's fixed start, has no R-hat.
        rhat = [float(v.max(skipna=True)) for v in arviz.rhat(posterior).data_vars.values()]
        ess = [float(v.min(skipna=True)) for v in arviz.ess(posterior).data_vars.values()]
    finite = [r for r in rhat if math.isfinite(r)]
    return {"rhat": max(finite, default=math.nan), "ess": min([e for e in ess if e == e], default=math.nan)}


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
    guide: Any
    law: AutoHierarchicalNormal | None = None
    subsampled = _is_subsampled(latent)
    if subsampled and paths:
        guide = AutoPathGuide(model)
    elif subsampled:
        guide = AutoSkewedNormal(model, init_to_median(num_samples=50))
    elif not paths:
        guide = law = AutoHierarchicalNormal(model, init_to_median(num_samples=50))
    else:
        guide = AutoPathGuide(model, hidden=(), feedback="recomputed", rest=AutoHierarchicalNormal)
    if law is None:
        # An automatic guide has its parameters only once it has run; the search for the mode runs the others.
        with poutine.block():
            drawn_anew(lambda: guide(*args, **kwargs))
    if paths and not subsampled:
        law = guide.rest
    if law is not None:
        iterations = method.max_iterations if isinstance(method, LaplaceMethod) else _SEARCH
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
        if law is not None:
            law.wide_share = _WIDE_SHARE
            learn_from_weights(model, guide, law, args, kwargs, rounds=method.rounds)
    return guide
