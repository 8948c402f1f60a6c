"""What Gaussian processes of vector fields and of functions on a cloud have in common: prior, fit, posterior, storage."""

from __future__ import annotations

import math
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    check_bool,
    check_choice,
    check_finite,
    check_positive,
    check_positive_int,
    check_real,
)
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.diagnostics.container import from_draws
from stochdyn.errors import ApproximationWarning, InvalidInputError, ShapeError, UnavailableError
from stochdyn.run.engine import run_to_end
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.regression._input import as_float_tensor
from stochdyn.vectorfields.regression.ambient import AmbientKernel
from stochdyn.vectorfields.regression.engines import Engine
from stochdyn.vectorfields.regression.hyper import hyper_parameters, set_hyper_parameters
from stochdyn.vectorfields.regression.kernels import ConnectionMatern, ProjectedMatern
from stochdyn.vectorfields.regression.observations import (
    Groups,
    Observations,
    as_labels,
    by_condition,
    by_pattern,
)
from stochdyn.vectorfields.regression.selection import Best, Choice, KernelSearch, candidates, make_engine
from stochdyn.vectorfields.regression.sites import Sites

__all__ = ["FieldProcess"]

#: The smoothness by default, and of the precision backend. Rougher priors take noise for signal; smoother ones trust the
#: graph's own eigenfields more than its points allow.
_NU, _WHOLE_NU = 2.5, 3.0


class FieldProcess(ABC):
    """A Gaussian process on a cloud with hyper-parameters at the maximum of the marginal likelihood times their priors.

    The common part of :class:`~stochdyn.vectorfields.RVGP` and :class:`~stochdyn.vectorfields.ScalarGP`, which say what they
    observe and in which coordinates they answer.

    Args:
        cloud: The points, with tangent spaces or, for functions, with the trivial line bundle.
        names: The kernels that have a name.
        kernel: One of these names, or a gpytorch kernel of rows.
        backend: Which representation computes the answer, ``"spectral"`` or ``"precision"``.
        num_eigenpairs: The number of modes of the named kernels.
        nu: The smoothness of the named kernels.
    """

    _kernel: Kernel | None
    #: The names of the axes of an answer, after those of draws and of the batch.
    _axes: tuple[str, ...]

    def __init__(
        self,
        cloud: PointCloud,
        names: Sequence[str],
        kernel: str | Kernel,
        backend: str,
        num_eigenpairs: int | None,
        nu: float | None,
    ) -> None:
        if not isinstance(cloud, PointCloud):
            raise InvalidInputError("cloud must be a PointCloud", got=type(cloud).__name__)
        check_choice(backend, ("spectral", "precision"), "backend")
        if isinstance(kernel, str):
            check_choice(kernel, tuple(names), "kernel")
        elif not isinstance(kernel, Kernel):
            raise InvalidInputError("kernel must be a name or a gpytorch kernel", got=type(kernel).__name__)
        _check_options(kernel, backend, num_eigenpairs, nu)
        self._start(cloud, backend, nu)
        self._auto = isinstance(kernel, str) and kernel == "auto"
        self.chosen = kernel if isinstance(kernel, str) else type(kernel).__name__
        if backend == "precision":
            self._check_precision(kernel, nu)
        elif not self._auto:
            made = _named(cloud, kernel, num_eigenpairs, nu) if isinstance(kernel, str) else kernel
            self._kernel = made.double().to(cloud.device)

    def _start(self, cloud: PointCloud, backend: str, nu: float | None) -> None:
        """Set what an object has before its first fit."""
        self.cloud, self.backend, self.nu = cloud, backend, nu
        self._kernel = None
        self.candidates: list[Choice] = []
        self.engine: Engine | None = None
        self.labels: list[object] | None = None
        self._groups: Groups | None = None
        self._batch: torch.Size = torch.Size()
        self._dtype = torch.float64
        self._load_extra_state({})

    @property
    def kernel(self) -> Kernel:
        """The kernel with its present hyper-parameters; of the precision backend the connection Matérn kernel that it has in full.

        Raises:
            UnavailableError: Before a fit of ``"auto"``, since no kernel is chosen yet.
        """
        if self.backend == "precision":
            found = {} if self.engine is None else hyper_parameters(self.engine)
            values = {name.rpartition(".")[2]: float(value) for name, value in found.items()}
            kernel = self._kernel
            if kernel is None:
                kernel = self._kernel = ConnectionMatern(self.cloud, float(self.nu or _WHOLE_NU))
            if "log_lengthscale" in values:
                kernel.lengthscale = math.exp(values["log_lengthscale"])
            return kernel
        if self._kernel is None:
            raise UnavailableError("there is no kernel yet", hint="kernel='auto' is chosen by fit(...)")
        return self._kernel

    def __repr__(self) -> str:
        name = type(self).__name__
        if self.engine is None:
            return f"{name}({self.chosen} on {self.cloud!r}, not fitted)"
        scales = f"amplitude {self.amplitude**0.5:.3g}, noise {self.noise_variance**0.5:.3g}"
        return f"{name}({self.chosen} on {self.cloud!r}, fitted at {self.engine.num_sites} sites: {scales})"

    def _check_precision(self, kernel: str | Kernel, nu: float | None) -> None:
        """Take a connection kernel for the sparse engine, which has it in full."""
        if isinstance(kernel, ConnectionMatern) and not kernel.trainable_nu:
            self._kernel = kernel
            self.nu = kernel.nu if nu is None else nu
        elif kernel not in ("connection", "graph"):
            raise InvalidInputError(
                "the precision backend knows the connection Matérn kernel of fixed smoothness only",
                got=kernel if isinstance(kernel, str) else type(kernel).__name__,
            )

    # ------------------------------------------------------------------------------------------- fitting

    def _condition_on(
        self,
        sites: Sites,
        components: Tensor,
        relative: Tensor,
        missing: Tensor,
        batch: torch.Size,
        after: Callable[[], None],
        *,
        thing: str,
        labels: Sequence[object] | None,
        **options: Any,
    ) -> None:
        """Condition on what was measured at sites, all of it one field or, where it is labelled, one field per condition.

        Args:
            sites: The ``q`` sites.
            components: The components of the data in the frames of the sites, ``(n, q, m)``.
            relative: The relative noise variances ``(q,)``.
            missing: Where there is none, ``(n, q)``.
            batch: The batch shape of the data.
            after: A function that says what else has become true after the fit.
            thing: The word for what is measured at a site.
            labels: The condition of everything measured, or None.
            options: Those of :meth:`_condition`.
        """
        if labels is None:
            self._condition(by_pattern(sites, components, relative, missing), batch, None, after, **options)
            return
        each = as_labels(labels, len(sites), thing)
        if len(batch):
            raise InvalidInputError(
                f"labels are for one {thing} per row", got=f"{thing}s of batch shape {tuple(batch)}"
            )
        seen = ~missing[0]
        kept = [name for name, there in zip(each, seen.tolist(), strict=True) if there]
        groups, names = by_condition(sites.take(seen), components[:, seen], relative[seen], kept)
        self._condition(groups, torch.Size([len(names)]), names, after, **options)

    def _condition(
        self,
        groups: Groups,
        batch: torch.Size,
        labels: list[object] | None,
        after: Callable[[], None],
        *,
        optimize: bool,
        learn_noise: bool,
        noise_variance: float | None,
        steps: int,
        progress: bool,
        checkpoint: str | os.PathLike[str] | None,
        resume: bool,
    ) -> None:
        """Learn the hyper-parameters and compute the posterior of fields of a batch, with labels or not; ``after`` says what else is then true."""
        check_positive_int(steps, "steps")
        if noise_variance is not None:
            check_real(noise_variance, "noise_variance", above=0.0)
        trial = self._auto and optimize
        if (checkpoint is not None or resume) and not trial:
            raise InvalidInputError(
                "checkpoint and resume are for the trial of several kernels",
                got=f"kernel={self.chosen}, optimize={optimize}",
                hint="kernel='auto'; other fits take seconds",
            )
        if optimize and not any(bool(part.components.any()) for part in groups.parts):
            raise InvalidInputError(
                "what was observed is zero everywhere, so no amplitude is more likely than a smaller one",
                got=f"{sum(part.components.numel() for part in groups.parts)} zeros",
                hint="optimize=False keeps amplitude and noise as they are",
            )
        before = self.engine

        def done() -> None:
            self._batch, self.labels = batch, labels
            after()

        def prepare(engine: Engine) -> None:
            if noise_variance is not None:
                engine.log_noise.data.fill_(math.log(noise_variance))
            elif not learn_noise:
                engine.log_noise.data.fill_(0.0)
            if optimize:
                engine.optimise(steps, learn_noise)
            elif before is not None:
                engine.log_amplitude.data.copy_(before.log_amplitude.data)
                if noise_variance is None and learn_noise:
                    engine.log_noise.data.copy_(before.log_noise.data)

        def take(best: Best | None, record: list[Choice]) -> FieldProcess:
            if best is not None:
                self.backend, self.nu = best.candidate.backend, best.candidate.nu
                self._kernel, self.chosen = best.kernel, best.candidate.name
                self.candidates = record
                self._finish(best.engine, groups, done)
            return self

        if not trial:
            engine = make_engine(self.cloud, groups, self._kernel, self.backend, float(self.nu or _WHOLE_NU))
            prepare(engine)
            self._finish(engine, groups, done)
            return
        identity = {
            "cloud": self.cloud,
            "observations": [(part.sites, part.components, part.relative) for part in groups.parts],
            "fields": groups.fields,
            "options": (learn_noise, noise_variance, steps),
        }
        run_to_end(
            KernelSearch(self.cloud, groups, prepare, take),
            "kernels",
            identity=identity,
            progress=progress,
            checkpoint=checkpoint,
            resume=resume,
        )

    def _finish(self, engine: Engine, groups: Groups, after: Callable[[], None]) -> None:
        engine.condition()
        self.engine, self._groups = engine, groups
        after()

    def _fitted(self) -> Engine:
        if self.engine is None:
            raise UnavailableError("there is no posterior yet", hint="call fit(...) first")
        return self.engine

    # ---------------------------------------------------------------------------------------- the answer

    @property
    def noise_variance(self) -> float:
        """Variance τ² of the noise of a component."""
        return float(self._fitted().noise.detach())

    @property
    def amplitude(self) -> float:
        """Prior variance σ² of a component, averaged over the cloud; scales and sums within the kernel included."""
        engine = self._fitted()
        with torch.no_grad():
            return float(engine.amplitude * engine.mean_variance())

    def log_marginal_likelihood(self) -> Tensor:
        """Return the log density of the components of the data, summed over fields."""
        with torch.no_grad():
            return self._fitted().evidence()

    def _covariances(self, sites: Sites, with_noise: bool, variances: Any) -> Tensor:
        """Return covariances of the components at sites, ``(q, m, m)`` or, where fields differ, ``(*batch, q, m, m)``."""
        check_bool(with_noise, "with_noise")
        engine = self._fitted()
        if variances is not None and not with_noise:
            raise InvalidInputError(
                "variances are those of new observations", hint="pass with_noise=True, or leave them out"
            )
        cov = engine.covariance(sites)
        # What reading the nodes leaves open, and the noise, are independent from component to component.
        white = engine.missing_variance(sites)
        if with_noise:
            white = white + engine.noise.detach() * as_variances(variances, len(sites)).to(white.device)
        cov = cov + white[:, None, None] * torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
        return cov.reshape(*self._batch, *cov.shape[1:]) if cov.ndim == 4 else cov

    @abstractmethod
    def sample(
        self, sample_shape: SampleShape = (), where: Any = None, generator: Generator = None
    ) -> Tensor:
        """Draw from the joint posterior, ``(*sample, *batch, q, ...)``.

        Args:
            sample_shape: The shape of independent draws, an integer or a tuple.
            where: The nodes or points ``(q, D)``; all nodes if None.
            generator: A ``torch.Generator``, a seed, or None for torch's global source of randomness.
        """

    def to_inference_data(self, where: Any = None, num_draws: int = 500, seed: int = 0) -> Any:
        """Return draws from the posterior in the container that ArviZ reads.

        They are the variable ``field``: ``(draw, *batch, site)`` of functions, ``(draw, *batch, site, coordinate)`` of vectors.

        Args:
            where: The nodes or points ``(q, D)``; all nodes if None.
            num_draws: The number of draws.
            seed: The seed of the draws.

        Returns:
            ``arviz.InferenceData`` with ArviZ 0.x, ``xarray.DataTree`` with ArviZ 1.x. Amplitude, noise and evidence are attributes.

        Raises:
            UnavailableError: Before a fit.
            MissingDependencyError: If ArviZ isn't installed.
        """
        check_positive_int(num_draws, "num_draws")
        drawn = self.sample(num_draws, where, seed)
        batch = [f"field_{i}" for i in range(len(self._batch))]
        coords: dict[str, Any] = {}
        if self.labels is not None:
            batch, coords = ["condition"], {"condition": np.asarray(self.labels)}
        return from_draws(
            {"field": drawn.detach().cpu().numpy()[None]},
            coords=coords,
            dims={"field": [*batch, *self._axes]},
            attrs={
                "kernel": self.chosen,
                "amplitude": self.amplitude,
                "noise_variance": self.noise_variance,
                "log_marginal_likelihood": float(self.log_marginal_likelihood()),
            },
        )

    def _draws(self, sample_shape: SampleShape, sites: Sites, generator: Generator) -> Tensor:
        """Draw components from the joint posterior, ``(*sample, *batch, q, m)``."""
        shape, source = as_sample_shape(sample_shape), as_generator(generator, self.cloud.device)
        engine = self._fitted()
        drawn = engine.sample(math.prod(shape), sites, source)
        if not sites.are_nodes:  # what the nodes don't tell is independent from point to point
            spread = engine.missing_variance(sites).sqrt()[:, None]
            noise = torch.randn(drawn.shape, generator=source, dtype=drawn.dtype, device=drawn.device)
            drawn = drawn + spread * noise
        return drawn.reshape(*shape, *self._batch, *drawn.shape[2:])

    # ------------------------------------------------------------------------------------------- storage

    def state_dict(self) -> dict[str, Any]:
        """Return the hyper-parameters and the observations, from which :meth:`load_state_dict` makes the posterior again.

        Tensors by name, numbers, and the labels of the conditions if there are any. The points aren't among them: they
        belong to the cloud. ``sd.save`` writes the whole object.

        Raises:
            UnavailableError: Before a fit.
        """
        engine = self._fitted()
        assert self._groups is not None
        state: dict[str, Any] = {f"parameters.{k}": v for k, v in hyper_parameters(engine).items()}
        for i, (part, fields) in enumerate(zip(self._groups.parts, self._groups.fields, strict=True)):
            sites = part.sites
            where = {"nodes": sites.nodes[:, 0]} if sites.are_nodes else {"points": sites.points}
            values = {"components": part.components, "relative": part.relative, "fields": fields}
            state |= {f"observations.{i}.{name}": value for name, value in (where | values).items()}
        state["batch"] = torch.tensor(list(self._batch), dtype=torch.int64)
        state["single"] = self._dtype == torch.float32
        if self._auto:
            state["chosen"] = self.chosen
        if self.labels is not None:
            state["labels"] = list(self.labels)
        return state | self._extra_state()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state_dict` returned of a process with the same cloud, kernel and backend.

        Args:
            state: What :meth:`state_dict` returned.

        Raises:
            InvalidInputError: If the state belongs to another kernel or backend, or isn't one.
        """
        try:
            groups = self._stored_groups(state)
            kernel, backend, nu = self._kernel, self.backend, self.nu
            if self._auto:
                found = {c.name: c for c in candidates(self.cloud, groups.rows)}[state["chosen"]]
                kernel, backend, nu = found.make(), found.backend, found.nu
            batch, single = torch.Size(state["batch"].tolist()), bool(state["single"])
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise InvalidInputError(
                "state isn't what state_dict() of such a process returns",
                got=f"{type(error).__name__}: {error}",
            ) from error
        engine = make_engine(self.cloud, groups, kernel, backend, float(nu or _WHOLE_NU))
        prefix = "parameters."
        set_hyper_parameters(
            engine, {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        )
        self._kernel, self.backend, self.nu = kernel, backend, nu
        self.chosen = state.get("chosen", self.chosen)
        self.labels = state.get("labels")
        self._batch, self._dtype = batch, torch.float32 if single else torch.float64
        self._finish(engine, groups, lambda: self._load_extra_state(state))

    def to_storage(self) -> dict[str, Any]:
        """Return what ``sd.save``, pickle and deepcopy keep: cloud, kernel and the state of the fit, without factorisations."""
        return {
            "cloud": self.cloud,
            "kernel": self._kernel,
            "auto": self._auto,
            "backend": self.backend,
            "nu": self.nu,
            "chosen": self.chosen,
            "candidates": [(c.name, c.log_evidence, c.seconds) for c in self.candidates],
            "state": None if self.engine is None else self.state_dict(),
        }

    @classmethod
    def from_storage(cls, state: Mapping[str, Any]) -> Self:
        """Return the process that :meth:`to_storage` described."""
        made = cls.__new__(cls)
        made._start(state["cloud"], state["backend"], state["nu"])
        made._kernel, made._auto, made.chosen = state["kernel"], state["auto"], state["chosen"]
        if state["state"] is not None:
            made.load_state_dict(state["state"])
        made.candidates = [Choice(*record) for record in state["candidates"]]
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self).from_storage, (self.to_storage(),)

    def _stored_groups(self, state: Mapping[str, Any]) -> Groups:
        parts: list[Observations] = []
        fields: list[Tensor] = []
        while f"observations.{len(parts)}.fields" in state:
            values = {
                name.rpartition(".")[2]: value
                for name, value in state.items()
                if name.startswith(f"observations.{len(parts)}.")
            }
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ApproximationWarning)  # it was said at the fit
                sites = self.cloud.sites(values["nodes"] if "nodes" in values else values["points"])
            parts.append(Observations(sites, values["components"], values["relative"]))
            fields.append(values["fields"])
        if not parts:
            raise KeyError("observations")
        return Groups(parts, fields)

    def _extra_state(self) -> dict[str, Any]:
        return {}

    def _load_extra_state(self, state: Mapping[str, Any]) -> None:
        return None


def _check_options(kernel: str | Kernel, backend: str, num_eigenpairs: int | None, nu: float | None) -> None:
    """Refuse options that would be ignored."""
    if kernel == "auto" and (backend != "spectral" or num_eigenpairs is not None or nu is not None):
        raise InvalidInputError(
            "kernel='auto' chooses backend, num_eigenpairs and nu itself",
            hint="leave them out, or name a kernel",
        )
    modal = ("connection", "projected", "graph")
    if num_eigenpairs is not None and (backend == "precision" or kernel not in modal):
        raise InvalidInputError(
            "num_eigenpairs is for the named kernels with modes of the spectral backend",
            got=f"kernel={kernel if isinstance(kernel, str) else type(kernel).__name__}, backend={backend}",
        )
    if isinstance(kernel, Kernel) and backend == "spectral" and nu is not None:
        raise InvalidInputError("nu is for named kernels", hint="give it to the kernel itself")


def _named(cloud: PointCloud, name: str, num_eigenpairs: int | None, nu: float | None) -> Kernel:
    if name == "ambient":
        return AmbientKernel(cloud, 1.5 if nu is None else nu)
    counts: dict[str, Any] = {} if num_eigenpairs is None else {"num_eigenpairs": num_eigenpairs}
    kind = ProjectedMatern if name == "projected" else ConnectionMatern
    return kind(cloud, _NU if nu is None else nu, **counts)


def as_variances(variances: Any, rows: int) -> Tensor:
    """Return noise variances ``(rows,)`` as double precision, ones if None."""
    if variances is None:
        return torch.ones(rows, dtype=torch.float64)
    tensor = as_float_tensor(variances, "variances").detach().double()
    if tensor.shape != (rows,):
        raise ShapeError(
            "variances must hold one number per site",
            got=f"shape {tuple(tensor.shape)}",
            expected=f"({rows},)",
        )
    check_finite(tensor, "variances")
    check_positive(tensor, "variances")
    return tensor
