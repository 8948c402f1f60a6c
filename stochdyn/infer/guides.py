"""AutoPathGuide: a variational posterior for models with path sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoGuide, AutoNormal
from pyro.nn import PyroModule
from torch import Tensor

from stochdyn._checks import (
    as_sequence,
    check_choice,
    check_positive_int,
)
from stochdyn._transforms import as_leaf, recording
from stochdyn.core.law.girsanov import ESTIMATORS
from stochdyn.core.law.initial import DistributionStart
from stochdyn.core.law.measure import PathMeasure
from stochdyn.errors import InvalidInputError, UnavailableError, UnknownSiteError
from stochdyn.infer.coupling import CouplingPlan
from stochdyn.infer.distributions import DiffusionPath, PathIncrements, is_degenerate, start_of
from stochdyn.infer.feedback import Feedback
from stochdyn.infer.mode import fit_linearised
from stochdyn.infer.model_call import Given, ModelCall, still_increments
from stochdyn.infer.naming import fresh_name, rename
from stochdyn.infer.posterior import IncrementPosterior, PathPosterior
from stochdyn.infer.recomputed import RecomputedSite
from stochdyn.infer.site import PathSite
from stochdyn.infer.start import GaussianStart, StartPosterior, StickingStart, is_unconstrained
from stochdyn.infer.view import SiteView, view_site

__all__ = ["AutoPathGuide"]


class _Shape(NamedTuple):
    """What is kept of a distribution in storage."""

    batch_shape: torch.Size
    event_shape: torch.Size


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
        rest: The guide for the other latent sites, a callable from a model to an AutoGuide.
        hidden: The widths of the control network's hidden layers; empty for linear feedback alone.
        feedback: ``"fitted"``, or ``"recomputed"`` for each draw of the other sites, around the most probable
            path at their medians. Use it with a dependent law of the other sites
            (``rest=AutoMultivariateNormal``) where their uncertainty matters.
        amortised: Read the feedback from an encoder (True) or fit it freely (False); by default True if a
            plate of the path is subsampled.
        context: The size of the encoder's summary.
        start: ``"linearised"`` or ``"prior"``, where free feedback starts.
        estimator: The gradient of the divergence: ``"stl"``, ``"rate"`` or ``"density"``; by default the first, and
            the last if the feedback is recomputed. The value reported is always exact.
        create_plates: The function that makes the plates of a model that subsamples, as for Pyro's AutoGuides.

    Raises:
        UnknownSiteError: On the first call, if the model has no path site.
        InvalidInputError: On the first call, if a path in a subsampled plate is to be fitted freely, or if a
            path in state space has a random start of constrained support.
        NonFiniteError: On the first call, if the model can't be linearised.

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
        layers = as_sequence(hidden, "hidden", "widths of hidden layers")
        for k, width in enumerate(layers):
            check_positive_int(width, f"hidden[{k}]")
        check_choice(feedback, ("fitted", "recomputed"), "feedback")
        if estimator is None:
            # The gradient in the other sites passes through the feedback too, where it is recomputed.
            estimator = "stl" if feedback == "fitted" else "density"
        check_choice(estimator, ESTIMATORS, "estimator")
        if feedback == "recomputed" and (amortised or start != "linearised"):
            raise InvalidInputError("recomputed feedback leaves amortised and start no say")
        super().__init__(model, create_plates=create_plates)
        self._pyro_name = fresh_name(type(self).__name__)
        self._make_rest = rest
        self._options: dict[str, Any] = {"hidden": tuple(layers), "context": context}
        self._amortised = amortised
        self._start = start
        self.estimator = estimator
        self.recomputed = feedback == "recomputed"
        self._path_sites: list[str] = []
        self._driven_by: dict[str, str] = {}
        self._late_plates: frozenset[str] = frozenset()
        self._pending: dict[str, Tensor] | None = None
        self._plans: dict[str, CouplingPlan | None] = {}

    @property
    def _trace(self) -> Any:
        """The prototype trace, once there is one."""
        return self.prototype_trace

    @property
    def _nodes(self) -> Any:
        return self._trace.nodes

    # Storage. A guide keeps its model, and a copy has parameters of its own in Pyro's store.

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "master": None, "plates": {}}
        if self.prototype_trace is not None:
            # Equations are made of functions, which pickle may refuse; of the first run only shapes are needed any more.
            state["prototype_trace"] = trace = self._trace.copy()
            for name in (*self._path_sites, *(n for names in self._owned.values() for n in names)):
                fn = trace.nodes[name]["fn"]
                trace.nodes[name] = {**trace.nodes[name], "fn": _Shape(fn.batch_shape, fn.event_shape)}
            state["_make_rest"] = None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        rename(self, type(self).__name__)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        """Load what fits; before the first call, keep it until the parameters are there."""
        if self.prototype_trace is None:
            self._pending = {n[len(prefix) :]: v for n, v in state_dict.items() if n.startswith(prefix)}
            return
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    # Set-up, on the first call.

    # The parent guide of `rest` is asked whether it agrees with its view of the model.
    def _check_prototype(self, part_trace: Any) -> None:
        return

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        # A path drawn from the prior may run where the likelihood isn't defined; nobody asks for its density here.
        with pyro.validation_enabled(False):
            super()._setup_prototype(*args, **kwargs)
        try:
            self._setup_sites(ModelCall(self.model, args, kwargs))
        except BaseException:
            # Half a guide must not pass for a whole one on the next call.
            self.prototype_trace = None
            raise
        if self._pending is not None:
            state, self._pending = self._pending, None
            self.load_state_dict(state)

    def _setup_sites(self, call: ModelCall) -> None:
        latent = dict(self._trace.iter_stochastic_nodes())
        paths = [n for n, site in latent.items() if isinstance(site["fn"], DiffusionPath | PathIncrements)]
        if not paths:
            raise UnknownSiteError(
                "the model has no path site",
                got=f"latent sites {sorted(latent)}",
                hint="sample paths with stochdyn.infer.sample_path or DiffusionPath",
            )
        self._path_sites = paths
        self._driven_by = {
            n: latent[n]["infer"].get("path", n.removesuffix("_dw"))
            for n in paths
            if isinstance(latent[n]["fn"], PathIncrements)
        }
        self._owned = {n: self._own_start(n, latent) for n in paths}
        hidden = paths + [n for names in self._owned.values() for n in names]
        self.rest = None
        if len(latent) > len(hidden):
            self.rest = self._make_rest(poutine.block(self.model, hide=hidden))
        # The guide of the other sites runs the model once, and a path of the prior may run where the likelihood isn't defined.
        with poutine.block(), torch.no_grad(), pyro.validation_enabled(False):
            self._create_plates(*call.args, **call.kwargs)
            values = self._centre(self._draw_others(call), call)
        self.sites = PyroModule("sites")
        for index, name in enumerate(paths):
            self._add_site(index, name, values, call)
        self._late_plates = self._find_late_plates()

    def _own_start(self, name: str, latent: dict[str, Any]) -> tuple[str, ...]:
        """Return the sites of a random start that are treated together with the increments site ``name``."""
        site = latent[name]
        if not isinstance(site["fn"], PathIncrements):
            return ()
        path, frames = self._path_name(name), {f.name for f in site["cond_indep_stack"]}
        own = []
        for start in (f"{path}_0", f"{path}_past"):
            if start not in latent or (latent[start]["infer"] or {}).get("path") != path:
                continue
            together = {f.name for f in latent[start]["cond_indep_stack"]} == frames
            if together and is_unconstrained(latent[start]["fn"]):
                own.append(start)
        return tuple(own)

    def _add_site(self, index: int, name: str, values: dict[str, Tensor], call: ModelCall) -> None:
        amortised = self._is_amortised(name)
        with torch.no_grad():
            view = self._view(name, call, values)
        start = None
        if self._start == "linearised" and not amortised:
            path, prior = self._path_name(name), self._prior_sites(name)
            plan = call.coupling(name, path, prior, values, view.reference()[..., : view.dim])
            start = fit_linearised(view, lambda x: call.likelihood(name, path, prior, values, x, plan))
            self._plans[name] = plan
        # Sites further on are linearised around this path.
        values[name] = view.value() if start is None else start.value(view)
        if self.recomputed and start is not None:
            setattr(self.sites, f"site_{index}", RecomputedSite(view, start))
            return
        setattr(self.sites, f"site_{index}", PathSite(view, start, amortised=amortised, **self._options))

    # What the sites are.

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
        return self._driven_by.get(name, name)

    def _prior_sites(self, name: str) -> set[str]:
        """Return the sites whose density belongs to the prior of the path."""
        path = self._path_name(name)
        return {name, path, f"{path}_0", f"{path}_past"}

    def _site(self, name: str) -> PathSite | RecomputedSite:
        return getattr(self.sites, f"site_{self._path_sites.index(name)}")

    # Plates.

    def _find_late_plates(self) -> frozenset[str]:
        """Return the plates that are entered only when the model has said their sizes, which may change from call to call.

        These are the plates of amortised paths, unless the user makes them or other sites share them.
        """
        if self.create_plates is not None:
            return frozenset()
        late = {
            f.name
            for name in self._path_sites
            if self._is_amortised(name)
            for f in self._nodes[name]["cond_indep_stack"]
        }
        if self.rest is not None:
            rest: Any = self.rest
            for _, site in rest.prototype_trace.iter_stochastic_nodes():
                late -= {f.name for f in site["cond_indep_stack"]}
        return frozenset(late)

    def _create_plates(self, *args: Any, **kwargs: Any) -> Any:
        frames = self._prototype_frames
        self._prototype_frames = {n: f for n, f in frames.items() if n not in self._late_plates}
        try:
            return super()._create_plates(*args, **kwargs)
        finally:
            self._prototype_frames = frames

    def _enter_late_plates(self, name: str, run: Mapping[str, Any]) -> dict[str, Tensor]:
        """Make the plates of an amortised path as the model made them; return their indices."""
        indices: dict[str, Any] = {}
        for frame in run[name]["cond_indep_stack"]:
            if frame.name not in self._late_plates or frame.name in self.plates:
                continue
            drawn = run[frame.name]["value"] if frame.name in run else None
            plate = pyro.plate(frame.name, frame.full_size or frame.size, subsample=drawn, dim=frame.dim)
            self.plates[frame.name] = plate
            with plate as indices[frame.name]:
                pass
        return indices

    def _plates_of(self, name: str) -> ExitStack:
        """Return the plates of a site, entered."""
        stack = ExitStack()
        for frame in self._nodes[name]["cond_indep_stack"]:
            stack.enter_context(self.plates[frame.name])
        return stack

    # The other sites.

    def _draw_others(self, call: ModelCall) -> dict[str, Tensor]:
        """Draw the sites beside the paths, and the indices of the plates."""
        self._create_plates(*call.args, **call.kwargs)
        values: dict[str, Tensor] = {}
        for name, plate in self.plates.items():
            with plate as indices:
                values[name] = indices
        if self.rest is not None:
            drawn = self.rest(*call.args, **call.kwargs)
            values |= {n: v for n, v in drawn.items() if isinstance(v, Tensor)}
        return values

    def _centre(self, values: dict[str, Tensor], call: ModelCall) -> dict[str, Tensor]:
        """Return the medians of the other sites, or the given draws where there are none."""
        centre = {n: v.detach() for n, v in values.items()}
        if self.rest is None:
            return centre
        with poutine.block(), torch.no_grad():
            try:
                medians = self.rest.median(*call.args, **call.kwargs)
            except NotImplementedError:
                return centre
        # The medians of a subsampled plate are those of all its members.
        return centre | {n: v for n, v in medians.items() if n in centre and not self._is_subsampled(n)}

    def _draws_shape(self, values: Mapping[str, Tensor]) -> torch.Size:
        """Return the batch axes that draws of the other sites have beyond those of the model."""
        shapes = []
        for name, value in values.items():
            if name in self._nodes and name not in self.plates:
                site = self._nodes[name]
                extra = value.ndim - site["value"].ndim
                if extra > 0:
                    shapes.append((*value.shape[:extra], *(1,) * len(site["fn"].batch_shape)))
        return torch.broadcast_shapes(*shapes) if shapes else torch.Size()

    # The laws of the paths.

    def _start_at_mean(self, laws: dict[str, Any], name: str) -> Given:
        """Return what notes the law of a random start, and puts the start to its mean."""

        def mean(msg: Any) -> Tensor:
            law = laws[name] = msg["fn"]
            return start_of(DistributionStart(law)) if len(law.event_shape) == 1 else law.mean

        return mean

    def _view_of(self, name: str, fn: Any, laws: Mapping[str, Any], values: Mapping[str, Tensor]) -> SiteView:
        path = self._path_name(name)
        draws = self._draws_shape(values)
        return view_site(fn, path, laws.get(f"{path}_0"), f"{path}_past" in laws, draws)

    def _view(self, name: str, call: ModelCall, values: dict[str, Tensor]) -> SiteView:
        """Return a path site together with its random start, which is put to its prior mean in ``values``."""
        laws: dict[str, Any] = {}
        given: dict[str, Given] = dict(values)
        given |= {n: self._start_at_mean(laws, n) for n in self._owned[name]}
        fn = call.site(name, given)["fn"]
        view = self._view_of(name, fn, laws, values)
        if view.start is not None:
            parts = [p for p in view.start.split(view.start.mean) if p is not None]
            values |= dict(zip(self._owned[name], parts, strict=False))
        return view

    def _read(
        self, name: str, call: ModelCall, values: dict[str, Tensor], keep_graph: bool
    ) -> tuple[SiteView, Feedback, StartPosterior | None]:
        """Return the law of a path that is read off the likelihood, in one run of the model.

        The model is given the path at which the likelihood is expanded as soon as it has told the path's equation.
        """
        site, path = self._site(name), self._path_name(name)
        laws: dict[str, Any] = {}
        met: dict[str, Any] = {}

        def at_path(msg: Any) -> Tensor:
            view = self._view_of(name, msg["fn"], laws, values)
            with torch.set_grad_enabled(keep_graph):
                reference = site.reference(view)
            leaf = reference[..., : view.dim]
            if not leaf.requires_grad:
                leaf = as_leaf(leaf)
            met.update(view=view, reference=reference, leaf=leaf)
            return leaf.movedim(0, -2) if path == name else still_increments(msg["fn"], view.batch())

        given: dict[str, Given] = dict(values)
        if not keep_graph:
            given = {n: v.detach() for n, v in values.items()}
        given |= {n: self._start_at_mean(laws, n) for n in self._owned[name]}
        given[name] = at_path
        # Far-off paths are judged by their density alone, whatever the checks of distributions say to them.
        with recording(), pyro.validation_enabled(False):
            run = call.run(given, {path: lambda: met["leaf"].movedim(0, -2)})
            plan = self._plans.get(name)
            data = run.quadratic(met["leaf"], name, self._prior_sites(name), keep_graph, plan)
        indices = self._enter_late_plates(name, run.sites)
        if any(not torch.equal(i, run.sites[n]["value"]) for n, i in indices.items() if n in run.sites):
            # Somebody else has chosen the members of the plate.
            values |= indices
            return self._read(name, call, values, keep_graph)
        values |= indices
        with torch.set_grad_enabled(keep_graph):
            feedback, start = site.read(met["view"], met["reference"], data, keep_graph)
        return met["view"], feedback, start

    def _law(
        self, name: str, call: ModelCall, values: dict[str, Tensor]
    ) -> tuple[SiteView, Feedback, StartPosterior | None]:
        """Return the law of a path for given values of the other sites, from the mean of a random start."""
        site = self._site(name)
        if site.reads_likelihood:
            return self._read(name, call, values, False)
        assert isinstance(site, PathSite)
        view = self._view(name, call, values)
        return view, site.free_feedback(view.scale), site.free_start()

    def _draw_path(self, name: str, call: ModelCall, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sample a path site and its random start; ``values`` gets them too."""
        site = self._site(name)
        feedback = None
        if site.reads_likelihood:
            view, feedback, start = self._read(name, call, values, torch.is_grad_enabled())
            with self._plates_of(name):
                values |= self._sample_start(name, start)
            if self._owned[name]:
                path = self._path_name(name)
                view = view.starting_at(values.get(f"{path}_0"), values.get(f"{path}_past"))
        else:
            assert isinstance(site, PathSite)
            start = site.free_start()
            with self._plates_of(name):
                values |= self._sample_start(name, start)
            # What is random at the start has its value by now.
            view = self._view_of(name, call.site(name, values)["fn"], {}, values)
            feedback = site.free_feedback(view.scale)
        law = self._posterior(view, feedback, start)
        infer: dict[str, Any] = {"path": view.path_name}
        if isinstance(law, IncrementPosterior):
            infer["driven"] = law.driven
        with self._plates_of(name):
            values[name] = pyro.sample(name, law, infer=infer)  # type: ignore[arg-type]
        result = {n: values[n] for n in (*self._owned[name], name)}
        if isinstance(law, IncrementPosterior):
            result[view.path_name] = law.path(values[name])
        return result

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample all latent sites; returns their values, and the paths under their own names."""
        if self.prototype_trace is None:
            self._setup_prototype(*args, **kwargs)
        call = ModelCall(self.model, args, kwargs)
        values = self._draw_others(call)
        result = {n: v for n, v in values.items() if n not in self.plates}
        for name in self._path_sites:
            result |= self._draw_path(name, call, values)
        return result

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
            call = ModelCall(self.model, args, kwargs)
            centre = self._centre(self._draw_others(call), call)
            for name in self._path_sites:
                view, feedback, start = self._law(name, call, centre)
                mean = None if start is None else start.loc
                e, z = view.follow(feedback, mean)
                if view.start is not None and mean is not None:
                    parts = [p for p in view.start.split(mean) if p is not None]
                    centre |= dict(zip(self._owned[name], parts, strict=False))
                x = z[..., : view.dim].movedim(0, -2)
                centre[view.path_name] = x
                centre[name] = x if view.path_name == name else e.movedim(0, -2)
        return {n: v for n, v in centre.items() if n not in self.plates}

    def path_law(self, name: str, *args: Any, **kwargs: Any) -> PathMeasure:
        """Return the posterior law of a path, a :class:`~stochdyn.infer.PosteriorPath`.

        Args:
            name: The path's site.
            args: The arguments of the model.
            kwargs: The keyword arguments of the model.
        """
        from stochdyn.infer.path_law import PosteriorPath

        return PosteriorPath(self.model, self, name, args, kwargs)

    def path_density(self, name: str, *args: Any, **kwargs: Any) -> tuple[PathPosterior, DiffusionPath]:
        """Return posterior and prior of a path as distributions over its states on the fitted grid.

        Raises:
            UnavailableError: If there are further latent sites, or no density in state space.
            UnknownSiteError: If the guide has no such path.
        """
        with poutine.block():
            if self.prototype_trace is None:
                self._setup_prototype(*args, **kwargs)
            sites = {self._path_name(n): n for n in self._path_sites}
            if name not in sites:
                raise UnknownSiteError(
                    "the guide has no such path", got=repr(name), expected=f"one of {sorted(sites)}"
                )
            if self.rest is not None or len(sites) > 1:
                raise UnavailableError("a path beside other latent sites has no density known by itself")
            call = ModelCall(self.model, args, kwargs)
            view, feedback, start = self._law(sites[name], call, self._draw_others(call))
        fn = view.fn
        if isinstance(fn, PathIncrements):
            if is_degenerate(fn.sde, fn.x0, fn.ts) or fn.method.name != "euler":
                raise UnavailableError("this path has no density in state space, or none that is known")
            fn = DiffusionPath(fn.sde, view.start_law or fn.x0, fn.ts).expand(fn.batch_shape)
        return PathPosterior(fn, feedback, "density", start), fn
