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
from stochdyn.core.law.girsanov import ESTIMATORS
from stochdyn.core.law.initial import DistributionStart
from stochdyn.errors import InvalidInputError, UnknownSiteError
from stochdyn.infer.capture import likelihood_quadratic, site_distribution, site_frames
from stochdyn.infer.distributions import DiffusionPath, PathIncrements, start_of
from stochdyn.infer.feedback import Feedback
from stochdyn.infer.mode import fit_linearised
from stochdyn.infer.posterior import IncrementPosterior, PathPosterior
from stochdyn.infer.recomputed import RecomputedSite
from stochdyn.infer.site import PathSite
from stochdyn.infer.start import GaussianStart, StartPosterior, StickingStart, is_unconstrained
from stochdyn.infer.view import SiteView, driven_path, view_site

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
    series cost nothing. With ``feedback="recomputed"`` they are computed anew for every draw of the other
    sites instead, which then may be as dependent on the path as they like: a linear-Gaussian path is
    integrated out exactly. It costs a backward pass over the grid for each draw.

    Args:
        model: Pyro model with sites made by :func:`sample_path`, :class:`DiffusionPath` or
            :class:`NoiseReparam`.
        rest: guide for the other latent sites, a callable from a model to an AutoGuide.
        hidden: widths of the control network's hidden layers; empty for linear feedback alone.
        feedback: ``"fitted"``, or ``"recomputed"`` for each draw of the other sites, around the most probable
            path at their medians. Use it with a dependent law of the other sites
            (``rest=AutoMultivariateNormal``) where their uncertainty matters.
        amortised: read the feedback from an encoder (True) or fit it freely (False); by default True if a
            plate of the path is subsampled.
        context: size of the encoder's summary.
        start: ``"linearised"`` or ``"prior"``, where free feedback starts.
        estimator: gradient of the divergence: ``"stl"``, ``"rate"`` or ``"density"``; by default the first, and
            the last if the feedback is recomputed. The value reported is always exact.
        create_plates: as for Pyro's AutoGuides, for subsampling.

    Raises:
        UnknownSiteError: on the first call, if the model has no path site.
        InvalidInputError: on the first call, if a path in a subsampled plate is to be fitted freely, or if a
            path in state space has a random start of constrained support.
        NonFiniteError: on the first call, if the model can't be linearised.

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
        feedback: str = "fitted",
        amortised: bool | None = None,
        context: int = 32,
        start: str = "linearised",
        estimator: str | None = None,
        create_plates: Callable[..., Any] | None = None,
    ) -> None:
        check_choice(start, ("linearised", "prior"), "start")
        check_choice(feedback, ("fitted", "recomputed"), "feedback")
        if estimator is None:
            # The gradient in the other sites passes through the feedback too, where it is recomputed.
            estimator = "stl" if feedback == "fitted" else "density"
        check_choice(estimator, ESTIMATORS, "estimator")
        if feedback == "recomputed" and (amortised or start != "linearised"):
            raise InvalidInputError("recomputed feedback leaves amortised and start no say")
        super().__init__(model, create_plates=create_plates)
        self._make_rest = rest
        self._options: dict[str, Any] = {"hidden": tuple(hidden), "context": context}
        self._amortised = amortised
        self._start = start
        self.estimator = estimator
        self.recomputed = feedback == "recomputed"
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
        try:
            self._setup_sites(args, kwargs)
        except BaseException:
            # Half a guide must not pass for a whole one on the next call.
            self.prototype_trace = None
            raise

    def _setup_sites(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
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
            values = self._centre(self._rest_values(args, kwargs), args, kwargs)
        self.sites = PyroModule("sites")
        for index, name in enumerate(paths):
            self._add_site(index, name, values, args, kwargs)

    def _create_plates(self, *args: Any, **kwargs: Any) -> Any:
        """Create the plates; where an encoder reads the data, of the sizes that the model gives them this time."""
        if self.create_plates is None and any(map(self._is_amortised, self._path_sites)):
            for name in self._path_sites:
                frames = {f.name: f for f in site_frames(self.model, name, args, kwargs)}
                self._prototype_frames = {**self._prototype_frames, **frames}
        return super()._create_plates(*args, **kwargs)

    def _own_start(self, name: str, latent: dict[str, Any]) -> tuple[str, ...]:
        """Return the sites of a random start that are treated together with the increments site ``name``."""
        site = latent[name]
        if not isinstance(site["fn"], PathIncrements):
            return ()
        path, frames = self._path_name(name), {f.name for f in site["cond_indep_stack"]}
        own = []
        for start in (f"{path}_0", f"{path}_past"):
            together = start in latent and {f.name for f in latent[start]["cond_indep_stack"]} == frames
            if together and is_unconstrained(latent[start]["fn"]):
                own.append(start)
        return tuple(own)

    def _is_subsampled(self, name: str) -> bool:
        frames = self._nodes[name]["cond_indep_stack"]
        return any(f.full_size is not None and f.full_size != f.size for f in frames)

    def _is_amortised(self, name: str) -> bool:
        subsampled = self._is_subsampled(name)
        if subsampled and self.recomputed:
            raise InvalidInputError(
                "feedback can't be recomputed for a path in a subsampled plate", got=f"site {name!r}"
            )
        if subsampled and self._amortised is False:
            raise InvalidInputError("a path in a subsampled plate needs amortised=True", got=f"site {name!r}")
        return subsampled if self._amortised is None else self._amortised

    def _path_name(self, name: str) -> str:
        """Return the site that holds the path: this one, or the one that its increments drive."""
        site = self._nodes[name]
        if not isinstance(site["fn"], PathIncrements):
            return name
        return site["infer"].get("path", name.removesuffix("_dw"))

    def _view(
        self, name: str, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> SiteView:
        """Return a path site as the model presents it."""
        return view_site(site_distribution(self.model, name, values, args, kwargs), self._path_name(name))

    def _view_whole(
        self, name: str, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> SiteView:
        """Return a path site together with its random start, which is put to its prior mean in ``values``."""
        laws = {}
        for start in self._owned[name]:
            law = laws[start] = site_distribution(self.model, start, values, args, kwargs)
            values[start] = start_of(DistributionStart(law)) if len(law.event_shape) == 1 else law.mean
        fn = site_distribution(self.model, name, values, args, kwargs)
        path = self._path_name(name)
        return view_site(fn, path, laws.get(f"{path}_0"), f"{path}_past" in laws)

    def _rest_values(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        values: dict[str, Tensor] = {}
        for name, plate in self.plates.items():
            with plate as indices:
                values[name] = indices
        if self.rest is not None:
            values |= {n: v for n, v in self.rest(*args, **kwargs).items() if isinstance(v, Tensor)}
        return values

    def _centre(
        self, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the medians of the other sites, or the given draws where there are none."""
        centre = {n: v.detach() for n, v in values.items()}
        if self.rest is None:
            return centre
        with poutine.block(), torch.no_grad():
            try:
                medians = self.rest.median(*args, **kwargs)
            except NotImplementedError:
                return centre
        # The medians of a subsampled plate are those of all its members.
        return centre | {n: v for n, v in medians.items() if n in centre and not self._is_subsampled(n)}

    def _add_site(
        self,
        index: int,
        name: str,
        values: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> None:
        amortised = self._is_amortised(name)
        with torch.no_grad():
            view = self._view_whole(name, values, args, kwargs)
        start = None
        if self._start == "linearised" and not amortised:
            start = fit_linearised(view, lambda x: self._quadratic(name, x, values, args, kwargs))
        # Sites further on are linearised around this path.
        values[name] = view.value() if start is None else start.value(view)
        if self.recomputed and start is not None:
            setattr(self.sites, f"site_{index}", RecomputedSite(view, start))
            return
        setattr(self.sites, f"site_{index}", PathSite(view, start, amortised=amortised, **self._options))

    def _quadratic(
        self,
        name: str,
        x: Tensor,
        values: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        keep_graph: bool = False,
    ) -> Any:
        given = dict(values)
        if not keep_graph:
            given = {n: v.detach() if isinstance(v, Tensor) else v for n, v in values.items()}
        path_name = self._path_name(name)
        prior = {name, path_name, f"{path_name}_0", f"{path_name}_past"}
        if path_name != name:
            # The increments themselves are replaced by the path that they would drive.
            given[name] = x.new_zeros(*x.shape[1:-1], *self._nodes[name]["fn"].event_shape)
        return likelihood_quadratic(self.model, name, path_name, x, prior, given, args, kwargs, keep_graph)

    def _follow(
        self, values: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[list[tuple[Feedback, StartPosterior | None]], dict[str, Tensor]]:
        """Return the law of every path site, and the values of all sites along the mean paths.

        What encoders read is taken at these values and not at the draws, so no gradient passes through it.
        """
        centre = self._centre(values, args, kwargs)
        laws = []
        for index, name in enumerate(self._path_sites):
            site: PathSite | RecomputedSite = getattr(self.sites, f"site_{index}")
            with torch.no_grad():
                view = self._view_whole(name, centre, args, kwargs)
            if isinstance(site, RecomputedSite):
                laws.append(self._recompute(site, name, centre, args, kwargs, False))
            elif site.amortised:
                reference = view.reference()
                data = self._quadratic(name, reference[..., : view.dim], centre, args, kwargs)
                laws.append(site.read(view, reference, data))
            else:
                laws.append((site.free_feedback(view.scale), site.free_start()))
            feedback, start = laws[-1]
            with torch.no_grad():
                mean = None if start is None else start.loc
                e, z = view.follow(feedback, mean)
                if view.start is not None and mean is not None:
                    parts = [p for p in view.start.split(mean) if p is not None]
                    centre |= dict(zip(self._owned[name], parts, strict=False))
            x = z[..., : view.dim].movedim(0, -2)
            centre[view.path_name] = x
            centre[name] = x if view.path_name == name else e.movedim(0, -2)
        return laws, centre

    def _recompute(
        self,
        site: RecomputedSite,
        name: str,
        values: dict[str, Tensor],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        keep_graph: bool,
    ) -> tuple[Feedback, StartPosterior | None]:
        """Return the law of a path site that belongs to the given values of the others."""
        given = dict(values)
        view = self._view_whole(name, given, args, kwargs)
        with torch.set_grad_enabled(keep_graph):
            return site.solve(view, lambda x: self._quadratic(name, x, given, args, kwargs, keep_graph))

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample all latent sites; returns their values, and the paths under their own names."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        self._create_plates(*args, **kwargs)
        values = self._rest_values(args, kwargs)
        result = {n: v for n, v in values.items() if n not in self.plates}
        sites: list[PathSite | RecomputedSite] = [
            getattr(self.sites, f"site_{i}") for i in range(len(self._path_sites))
        ]
        laws = self._follow(values, args, kwargs)[0] if any(s.amortised for s in sites) else None
        for index, (name, site) in enumerate(zip(self._path_sites, sites, strict=True)):
            feedback, start = (None, None) if laws is None else laws[index]
            if isinstance(site, RecomputedSite):
                feedback, start = self._recompute(site, name, values, args, kwargs, torch.is_grad_enabled())
            elif laws is None:
                start = site.free_start()
            with self._plates_of(name):
                values |= self._sample_start(name, start)
            view = self._view(name, values, args, kwargs)
            if feedback is None:
                assert isinstance(site, PathSite)
                feedback = site.free_feedback(view.scale)
            with self._plates_of(name):
                values[name] = pyro.sample(name, self._posterior(view, feedback, start))
            result |= {n: values[n] for n in (*self._owned[name], name)}
            if view.path_name != name:
                result[view.path_name] = driven_path(view, values[name])
        return result

    def _plates_of(self, name: str) -> ExitStack:
        """Return the plates of a site, entered."""
        stack = ExitStack()
        for frame in self._nodes[name]["cond_indep_stack"]:
            stack.enter_context(self.plates[frame.name])
        return stack

    def _sample_start(self, name: str, start: StartPosterior | None) -> dict[str, Tensor]:
        """Sample the random start that belongs to an increments site: one Gaussian, split into its sites."""
        owned = self._owned[name]
        if not owned or start is None:
            return {}
        law = StickingStart if self.estimator == "stl" else GaussianStart
        joint = law(start.loc, scale_tril=start.scale_tril)
        rest = pyro.sample(f"{self._path_name(name)}_start", joint, infer={"is_auxiliary": True})
        values = {}
        for start_name in owned:
            event = self._nodes[start_name]["fn"].event_shape
            part, rest = rest[..., : event.numel()], rest[..., event.numel() :]
            value = part.reshape(*part.shape[:-1], *event)
            values[start_name] = pyro.sample(start_name, dist.Delta(value, event_dim=len(event)))
        return values

    def _posterior(
        self, view: SiteView, feedback: Feedback, start: StartPosterior | None
    ) -> IncrementPosterior | PathPosterior:
        if isinstance(view.fn, PathIncrements):
            return IncrementPosterior(view.fn, feedback, self.estimator)
        return PathPosterior(view.fn, feedback, self.estimator, start)

    def median(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Return the medians of the other sites and the path along the mean feedback."""
        with torch.no_grad(), poutine.block():
            if self.prototype_trace is None:
                self._setup_prototype(*args, **kwargs)
            self._create_plates(*args, **kwargs)
            centre = self._follow(self._rest_values(args, kwargs), args, kwargs)[1]
        return {n: v for n, v in centre.items() if n not in self.plates}
