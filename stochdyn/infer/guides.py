"""AutoPathGuide: a variational posterior for models with path sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.nn import PyroModule
from torch import Tensor

from stochdyn._checks import check_choice
from stochdyn.core.girsanov import ESTIMATORS
from stochdyn.errors import InvalidInputError, UnknownSiteError
from stochdyn.infer.capture import likelihood_quadratic, site_distribution
from stochdyn.infer.distributions import DiffusionPath, PathIncrements
from stochdyn.infer.posterior import IncrementPosterior, PathPosterior
from stochdyn.infer.site import PathSite, SiteView, fit_linearised, view_site

__all__ = ["AutoPathGuide"]


class AutoPathGuide(AutoGuide):
    r"""A guide that gives path sites a controlled law, and leaves the other latent sites to a standard guide.

    At each step of a path the increments are Gaussian given the state,

    .. math:: \epsilon_n\mid z_n\sim N\big(k_n+K_n(z_n-c_n)/w+\mathrm{net}(t_n,z_n),\ L_nL_n^\top\big),

    in units of their prior standard deviation; ``z`` is the state with the memory of the noise. The free
    covariance of a step keeps the bound tight at any step size. Where the data of a path are always the
    same, :math:`k, K, L` are free parameters that start at the exact posterior of the model linearised
    around its most probable path (the exact posterior itself where the model given the other sites is
    linear and Gaussian); with subsampled plates an encoder reads them off the likelihood, so that new
    series cost nothing.

    Args:
        model: Pyro model with sites made by :func:`sample_path`, :class:`DiffusionPath` or
            :class:`NoiseReparam`.
        rest: guide for the other latent sites, a callable from a model to an AutoGuide.
        hidden: widths of the control network's hidden layers; empty for linear feedback alone.
        amortised: read the feedback from an encoder (True) or fit it freely (False); by default True if a
            plate of the path is subsampled.
        context: size of the encoder's summary.
        start: ``"linearised"`` or ``"prior"``, where free feedback starts.
        estimator: gradient of the divergence: ``"stl"``, ``"rate"`` or ``"density"``. The value reported is
            always exact.
        create_plates: as for Pyro's AutoGuides, for subsampling.

    Raises:
        UnknownSiteError: on the first call, if the model has no path site.
        InvalidInputError: on the first call, if a path site is wrapped so that it can't be recognised.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from stochdyn import SDE
        >>> from stochdyn.infer import sample_path
        >>> def model(ts, y):
        ...     x = sample_path("x", SDE(lambda t, x: -x, 1.0), torch.zeros(1), ts)
        ...     pyro.sample("y", dist.Normal(x[..., -1, 0], 0.1), obs=y)
        >>> guide = AutoPathGuide(model, hidden=())
        >>> guide(torch.linspace(0, 1, 11), torch.tensor(0.5))["x"].shape
        torch.Size([11, 1])
    """

    def __init__(
        self,
        model: Callable[..., Any],
        *,
        rest: Callable[[Callable[..., Any]], AutoGuide] = AutoNormal,
        hidden: Sequence[int] = (32,),
        amortised: bool | None = None,
        context: int = 32,
        start: str = "linearised",
        estimator: str = "stl",
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        check_choice(start, ("linearised", "prior"), "start")
        check_choice(estimator, ESTIMATORS, "estimator")
        super().__init__(model, create_plates=create_plates)
        self._make_rest = rest
        self._options: dict[str, Any] = {"hidden": tuple(hidden), "context": context}
        self._amortised = amortised
        self._start = start
        self.estimator = estimator
        self._path_sites: list[str] = []

    @property
    def _trace(self) -> Any:
        """The prototype trace, once there is one."""
        return self.prototype_trace

    @property
    def _nodes(self) -> Any:
        return self._trace.nodes

    # The parent guide of `rest` is asked whether it agrees with its view of the model.
    def _check_prototype(self, part_trace: Any) -> None:
        return

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        latent = dict(self._trace.iter_stochastic_nodes())
        paths = [n for n, site in latent.items() if isinstance(site["fn"], DiffusionPath | PathIncrements)]
        if not paths:
            raise UnknownSiteError(
                "the model has no path site",
                got=f"latent sites {sorted(latent)}",
                hint="sample paths with stochdyn.infer.sample_path or DiffusionPath",
            )
        self._path_sites = paths
        self._owned = {n: self._own_start(n, latent) for n in paths}
        hidden = paths + [n for names in self._owned.values() for n in names]
        self.rest = None
        if len(latent) > len(hidden):
            self.rest = self._make_rest(poutine.block(self.model, hide=hidden))
        with poutine.block(), torch.no_grad():
            self._create_plates(*args, **kwargs)
            values = self._rest_values(args, kwargs)
            if self.rest is not None and hasattr(self.rest, "median"):
                values |= {n: v.detach() for n, v in self.rest.median(*args, **kwargs).items()}
        self.sites = PyroModule("sites")
        for index, name in enumerate(paths):
            self._add_site(index, name, latent[name], values, args, kwargs)

    def _own_start(self, name: str, latent: dict[str, Any]) -> tuple[str, ...]:
        """Return the sites of a random start that are treated together with the increments site ``name``."""
        site = latent[name]
        if not isinstance(site["fn"], PathIncrements) or self._is_amortised(site):
            return ()
        path, frames = self._path_name(name), {f.name for f in site["cond_indep_stack"]}
        own = []
        for start in (f"{path}_0", f"{path}_past"):
            if start in latent and {f.name for f in latent[start]["cond_indep_stack"]} == frames:
                own.append(start)
        return tuple(own)

    def _is_amortised(self, site: Any) -> bool:
        frames = site["cond_indep_stack"]
        subsampled = any(f.full_size is not None and f.full_size != f.size for f in frames)
        if subsampled and self._amortised is False:
            raise InvalidInputError(
                "a path in a subsampled plate needs amortised=True", got=f"site {site['name']!r}"
            )
        return subsampled if self._amortised is None else self._amortised

    def _view(
        self,
        name: str,
        values: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        *,
        own: bool = False,
    ) -> SiteView:
        """Return a path site as the model presents it; ``own`` adds the random start treated with it."""
        fn = site_distribution(self.model, name, values, args, kwargs)
        path = self._path_name(name)
        if not own:
            return view_site(fn, path)
        nodes, owned = self._nodes, self._owned[name]
        law = nodes[f"{path}_0"]["fn"] if f"{path}_0" in owned else None
        return view_site(fn, path, law, f"{path}_past" in owned)

    def _rest_values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, plate in self.plates.items():
            with plate as indices:
                values[name] = indices
        if self.rest is not None:
            values |= {n: v for n, v in self.rest(*args, **kwargs).items() if isinstance(v, Tensor)}
        return values

    def _add_site(
        self,
        index: int,
        name: str,
        site: Any,
        values: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        amortised = self._is_amortised(site)
        for start_name in self._owned[name]:
            values[start_name] = _prior_mean(self._nodes[start_name])
        with torch.no_grad():
            view = self._view(name, values, args, kwargs, own=True)
        start = None
        if self._start == "linearised" and not amortised:
            start = fit_linearised(view, lambda x: self._quadratic(name, x, values, args, kwargs))
            # Sites further on are linearised around this path.
            values[name] = start.value(view)
        setattr(self.sites, f"site_{index}", PathSite(view, start, amortised=amortised, **self._options))

    def _path_name(self, name: str) -> str:
        """Return the site that holds the path: this one, or the one that its increments drive."""
        site = self._nodes[name]
        return (
            site["infer"].get("path", name.removesuffix("_dw"))
            if isinstance(site["fn"], PathIncrements)
            else name
        )

    def _quadratic(
        self, name: str, x: Tensor, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        given = {n: v.detach() if isinstance(v, Tensor) else v for n, v in values.items()}
        path_name = self._path_name(name)
        prior = {name, path_name, f"{path_name}_0", f"{path_name}_past"}
        if path_name != name:
            # The increments themselves are replaced by the path that they would drive.
            batch = x.shape[1:-1]
            given[name] = x.new_zeros(*batch, *self._nodes[name]["fn"].event_shape)
        return likelihood_quadratic(self.model, name, path_name, x, prior, given, args, kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample all latent sites; returns their values, and the paths under their own names."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._create_plates(*args, **kwargs)
        values = self._rest_values(args, kwargs)
        result = {n: v for n, v in values.items() if n not in self.plates}
        for index, name in enumerate(self._path_sites):
            site: PathSite = getattr(self.sites, f"site_{index}")
            values |= self._sample_start(name, site)
            result |= {n: values[n] for n in self._owned[name]}
            view = self._view(name, values, args, kwargs)
            posterior = self._posterior(site, view, name, values, args, kwargs)
            with ExitStack() as stack:
                for frame in self._nodes[name]["cond_indep_stack"]:
                    stack.enter_context(self.plates[frame.name])
                values[name] = result[name] = pyro.sample(name, posterior)
            if view.path_name != name:
                driven = values[name]._stochdyn_driven  # type: ignore[attr-defined]
                result[view.path_name] = driven.x.movedim(0, -2)
        return result

    def _sample_start(self, name: str, site: PathSite) -> dict[str, Tensor]:
        """Sample the random start that belongs to an increments site: one Gaussian, split into its sites."""
        owned = self._owned[name]
        if not owned:
            return {}
        nodes, path = self._nodes, self._path_name(name)
        values = {}
        with ExitStack() as stack:
            for frame in nodes[name]["cond_indep_stack"]:
                stack.enter_context(self.plates[frame.name])
            law = site.start_posterior().law
            joint = dist.MultivariateNormal(law.loc, scale_tril=law.scale_tril)
            rest = pyro.sample(f"{path}_start", joint, infer={"is_auxiliary": True})
            for start_name in owned:
                event = nodes[start_name]["fn"].event_shape
                part, rest = rest[..., : event.numel()], rest[..., event.numel() :]
                value = part.reshape(*part.shape[:-1], *event)
                values[start_name] = pyro.sample(start_name, dist.Delta(value, event_dim=len(event)))
        return values

    def _posterior(
        self,
        site: PathSite,
        view: SiteView,
        name: str,
        values: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> IncrementPosterior | PathPosterior:
        if site.amortised:
            reference = view.reference()
            quadratic = self._quadratic(name, reference[..., : view.dim], values, args, kwargs)
            feedback, start = site.read(view, reference, quadratic)
        else:
            feedback, start = site.feedback(view)
        if isinstance(view.fn, PathIncrements):
            return IncrementPosterior(view.fn, feedback, self.estimator)
        return PathPosterior(view.fn, feedback, self.estimator, start)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the medians of the other sites and the path along the mean feedback."""
        with torch.no_grad(), poutine.block():
            if self.prototype_trace is None:
                self._setup_prototype(*args, **kwargs)
            self._create_plates(*args, **kwargs)
            values = self._rest_values(args, kwargs)
            if self.rest is not None:
                values |= self.rest.median(*args, **kwargs)
            for index, name in enumerate(self._path_sites):
                site: PathSite = getattr(self.sites, f"site_{index}")
                values |= {n: _prior_mean(self._nodes[n]) for n in self._owned[name]}
                view = self._view(name, values, args, kwargs, own=True)
                posterior = self._posterior(site, view, name, values, args, kwargs)
                start = None
                if view.start is not None:
                    joint = (
                        posterior.start if isinstance(posterior, PathPosterior) else site.start_posterior()
                    )
                    start = joint.law.mean  # type: ignore[union-attr]
                    parts = [p for p in view.start.split(start) if p is not None]
                    values |= dict(zip(self._owned[name], parts, strict=False))
                e, z = view.follow(posterior.feedback, start)
                x = z[..., : view.dim]
                values[name] = e.movedim(0, -2) if view.path_name != name else x.movedim(0, -2)
                values[view.path_name] = x.movedim(0, -2)
        return {n: v for n, v in values.items() if n not in self.plates}


def _prior_mean(site: Any) -> Tensor:
    """Return the mean of a start site's prior, in the shape of its value."""
    return site["fn"].mean.detach().expand(site["value"].shape)
