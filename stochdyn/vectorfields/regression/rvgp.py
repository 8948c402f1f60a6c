"""Gaussian-process regression of tangent vector fields on a point cloud."""

from __future__ import annotations

import math
import os
import warnings
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    check_bool,
    check_choice,
    check_finite,
    check_nonempty,
    check_positive,
    check_positive_int,
    check_real,
)
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import ApproximationWarning, InvalidInputError, ShapeError, UnavailableError
from stochdyn.run.engine import run_to_end
from stochdyn.run.identity import digest
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.geometry.surface import TangentDiffusion, TangentDrift
from stochdyn.vectorfields.regression._input import as_float_tensor, as_vectors
from stochdyn.vectorfields.regression.ambient import AmbientKernel
from stochdyn.vectorfields.regression.engines import Engine, Observations
from stochdyn.vectorfields.regression.kernels import ConnectionMatern, ProjectedMatern
from stochdyn.vectorfields.regression.paths import path_observations, quadratic_variation
from stochdyn.vectorfields.regression.precision import PrecisionEngine
from stochdyn.vectorfields.regression.selection import Best, Choice, KernelSearch, make_engine
from stochdyn.vectorfields.regression.sites import Sites

__all__ = ["RVGP"]

_NAMES = ("connection", "projected", "ambient", "auto")
#: Normal components above this share of the square of the data deserve a warning.
_LOST = 0.05


class RVGP:
    r"""A Gaussian process over vector fields that are tangent to the manifold of a point cloud.

    .. math:: v(x_i)=T_i\big(f(x_i)+\varepsilon_i\big),\qquad f\sim GP(0,\sigma^2K),\quad\varepsilon_i\sim N(0,\tau^2r_iI_m)

    in tangent coordinates, with hyper-parameters at the maximum of the marginal likelihood times their priors.

    Args:
        cloud: The points that sample the manifold.
        kernel: The prior. ``"connection"`` (:class:`ConnectionMatern`), the default, for fields that are smooth along the
            manifold, however that bends in space; ``"projected"`` (:class:`ProjectedMatern`) for fields that are the shadow of
            a smooth field of the surrounding space; ``"ambient"`` (:class:`AmbientKernel`) for the same with few data and
            no folds; any gpytorch kernel of rows, sums and products included; or ``"auto"``: of these and, on spheres, the
            divergence-free and the Hodge-compositional kernel, the one with the highest evidence, where nothing is known
            and a minute can be spent.
        backend: Which representation computes the answer. ``"spectral"``, in feature space, for all kernels (those
            without features get a dense covariance) and for many evaluations on one cloud; ``"precision"``, the connection Matérn
            kernel with all its modes by sparse algebra, for rough fields and for clouds of tens of thousands of points.
        num_eigenpairs: The number of modes of the named kernels.
        nu: The smoothness of the named kernels; by default 3/2, and 2 for the precision backend, where it must be whole.

    Attributes:
        candidates: The evidence of every kernel tried by ``"auto"``, best first; ``chosen`` names the best.
        lost_share: The share of the square of the data that was normal to the tangent spaces, and dropped.

    Raises:
        InvalidInputError: If a name is unknown, or an option would be ignored.

    Example:
        >>> angle = torch.arange(40, dtype=torch.float64) * 2 * torch.pi / 40
        >>> points = torch.stack([angle.cos(), angle.sin()], -1)
        >>> field = torch.stack([-angle.sin(), angle.cos()], -1)
        >>> gp = RVGP(PointCloud(points, num_neighbors=4, dim=1), num_eigenpairs=20)
        >>> mean, cov = gp.fit(range(0, 40, 2), field[::2]).predict(range(1, 40, 2))
        >>> bool((mean - field[1::2]).norm() < 0.05 * field[1::2].norm()), tuple(cov.shape)
        (True, (20, 1, 1))

    Reference:
        Peach et al., "Implicit Gaussian process representation of vector fields over arbitrary latent manifolds", 2024.
    """

    def __init__(
        self,
        cloud: PointCloud,
        kernel: str | Kernel = "connection",
        backend: str = "spectral",
        *,
        num_eigenpairs: int | None = None,
        nu: float | None = None,
    ) -> None:
        if not isinstance(cloud, PointCloud):
            raise InvalidInputError("cloud must be a PointCloud", got=type(cloud).__name__)
        check_choice(backend, ("spectral", "precision"), "backend")
        if isinstance(kernel, str):
            check_choice(kernel, _NAMES, "kernel")
        elif not isinstance(kernel, Kernel):
            raise InvalidInputError("kernel must be a name or a gpytorch kernel", got=type(kernel).__name__)
        _check_options(kernel, backend, num_eigenpairs, nu)
        self.cloud = cloud
        self.backend = backend
        self._kernel: Kernel | None = None
        self.nu = nu
        self._auto = isinstance(kernel, str) and kernel == "auto"
        self.candidates: list[Choice] = []
        self.chosen = kernel if isinstance(kernel, str) else type(kernel).__name__
        if self._auto:
            pass
        elif backend == "precision":
            self._check_precision(kernel, nu)
        else:
            smooth = 1.5 if nu is None else nu
            made = _named(cloud, kernel, num_eigenpairs, smooth) if isinstance(kernel, str) else kernel
            self._kernel = made.double().to(cloud.device)
        self.engine: Engine | None = None
        self.lost_share = 0.0
        self._of_paths = False
        self._batch: torch.Size = torch.Size()
        self._dtype = torch.float64

    @property
    def kernel(self) -> Kernel:
        """The kernel with its present hyper-parameters; of the precision backend the connection Matérn kernel that it has in full.

        Raises:
            UnavailableError: Before a fit of ``"auto"``, since no kernel is chosen yet.
        """
        if self.backend == "precision":
            kernel = (
                ConnectionMatern(self.cloud, float(self.nu or 2.0)) if self._kernel is None else self._kernel
            )
            if isinstance(self.engine, PrecisionEngine):
                kernel.lengthscale = self.engine.lengthscale
            self._kernel = kernel
            return kernel
        if self._kernel is None:
            raise UnavailableError("there is no kernel yet", hint="kernel='auto' is chosen by fit(...)")
        return self._kernel

    def __repr__(self) -> str:
        if self.engine is None:
            return f"RVGP({self.chosen} on {self.cloud!r}, not fitted)"
        sites = len(self.engine.data.sites)
        scales = f"amplitude {self.amplitude**0.5:.3g}, noise {self.noise_variance**0.5:.3g}"
        return f"RVGP({self.chosen} on {self.cloud!r}, fitted at {sites} sites: {scales})"

    def _check_precision(self, kernel: str | Kernel, nu: float | None) -> None:
        """Take a connection kernel for the sparse engine, which has it in full."""
        if isinstance(kernel, ConnectionMatern) and not kernel.trainable_nu:
            self._kernel = kernel
            self.nu = kernel.nu if nu is None else nu
        elif kernel != "connection":
            raise InvalidInputError(
                "the precision backend knows the connection Matérn kernel of fixed smoothness only",
                got=kernel if isinstance(kernel, str) else type(kernel).__name__,
            )
        self.nu = 2.0 if self.nu is None else self.nu

    # ------------------------------------------------------------------------------------------- fitting

    def fit(
        self,
        index: Any,
        vectors: Any,
        variances: Any = None,
        *,
        optimize: bool = True,
        learn_noise: bool = True,
        noise_variance: float | None = None,
        steps: int = 100,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> RVGP:
        """Condition on vectors at some nodes or points, and learn the hyper-parameters.

        Args:
            index: The observed nodes (whole numbers, a boolean mask, a slice), or points ``(q, D)``.
            vectors: Ambient vectors ``(q, D)``, or ``(*batch, q, D)`` for many fields that share sites, hyper-parameters
                and the one factorisation. Parts normal to the tangent spaces are dropped, see ``lost_share``. NaN is a
                missing vector.
            variances: The noise variances ``(q,)`` of a component, exact if ``learn_noise`` is off and up to a common
                factor otherwise; equal if None.
            optimize: Whether the hyper-parameters are learnt; otherwise they stay as they are.
            learn_noise: Whether the noise variance, or the common factor, is learnt.
            noise_variance: The start for the noise variance, or its value if it isn't learnt.
            steps: The largest number of updates of the optimiser.
            progress: Whether to show a bar while kernels are tried, where that takes more than two seconds.
            checkpoint: The directory where the search of ``kernel="auto"`` is kept, a kernel at a time.
            resume: Whether to continue the search that is kept there.

        Returns:
            The same object.

        Raises:
            InvalidInputError: If sites lie outside the cloud.
            ShapeError, NonFiniteError: If the vectors don't fit.
        """
        for name, flag in (("optimize", optimize), ("learn_noise", learn_noise)):
            check_bool(flag, name)
        sites = self.cloud.sites(index)
        v = as_vectors(vectors, len(sites), self.cloud.ambient_dim, missing=True)
        relative = _variances(variances, len(sites))
        missing = torch.isnan(v).any(-1)
        if bool(missing.any()):
            sites, v, relative = _without_missing(sites, v, relative, missing)
        self._dtype, self._batch = v.dtype, v.shape[:-2]
        v = v.detach().to(self.cloud.device, torch.float64)
        components = sites.to_tangent(v)
        total = float((v**2).sum())
        self.lost_share = max(0.0, 1.0 - float((components**2).sum()) / total) if total > 0 else 0.0
        if self.lost_share > _LOST:
            warnings.warn(
                f"{self.lost_share:.0%} of the square of the vectors is normal to the tangent spaces and was dropped. "
                "Are they tangent vectors of this manifold, in these coordinates?",
                ApproximationWarning,
                stacklevel=2,
            )
        data = Observations(
            sites, components.reshape(-1, *components.shape[-2:]), relative.to(self.cloud.device)
        )
        self._condition(data, optimize, learn_noise, noise_variance, steps, progress, checkpoint, resume)
        self._of_paths = False
        return self

    def fit_paths(
        self,
        paths: Any,
        diffusion: float | None = None,
        *,
        stride: int = 1,
        optimize: bool = True,
        steps: int = 100,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> RVGP:
        r"""Condition the field, as the drift of an SDE, on trajectories; exact, see :func:`~.paths.path_observations`.

        Args:
            paths: A :class:`~stochdyn.PathSample`, ``(ts, x)`` with ``ts (T,)`` and ``x (*sample, T, D)``, or a list of
                such, each trial on a grid of its own; NaN is a missing state.
            diffusion: The strength σ of the noise in the tangent spaces; learnt with the other hyper-parameters if None.
            stride: The interval between the states that are used: every state whose number is a multiple of this one.
            optimize: Whether the hyper-parameters are learnt.
            steps: The largest number of updates of the optimiser.
            progress: Whether to show a bar while kernels are tried, where that takes more than two seconds.
            checkpoint: The directory where the search of ``kernel="auto"`` is kept, a kernel at a time.
            resume: Whether to continue the search that is kept there.

        Returns:
            The same object; ``diffusion`` holds σ, given or learnt.
        """
        data = path_observations(self.cloud, paths, stride)
        if diffusion is not None:
            check_positive(diffusion, "diffusion")
        self._dtype, self._batch, self.lost_share = torch.float64, torch.Size(), 0.0
        guess = quadratic_variation(data)[0] if diffusion is None else float(diffusion)
        if diffusion is None and not optimize:
            raise InvalidInputError("with optimize off the diffusion must be given")
        self._condition(data, optimize, diffusion is None, guess**2, steps, progress, checkpoint, resume)
        self._of_paths = True
        return self

    @property
    def diffusion(self) -> float:
        """Strength σ of the noise of the SDE whose drift was fitted by :meth:`fit_paths`, in length / √time.

        Raises:
            UnavailableError: After :meth:`fit`, whose noise is an error of measurement and no diffusion.
        """
        self._fitted()
        if not self._of_paths:
            raise UnavailableError(
                "the noise of vectors is an error of measurement, not a diffusion",
                hint="give as_sde(diffusion=...), or fit trajectories with fit_paths",
            )
        return math.sqrt(self.noise_variance)

    def as_drift(
        self, dt: float | None = None, *, draw: bool = False, generator: Generator = None
    ) -> TangentDrift:
        """Return the posterior mean field, or a draw, as a drift ``(t, x)`` for :class:`stochdyn.SDE` in ambient coordinates.

        Args:
            dt: The step of the time grid; if given, every Euler step first projects the state back to the manifold.
            draw: Whether a field is drawn from the posterior instead of taking the mean.
            generator: The source of randomness of the draw.
        """
        if self._batch != torch.Size():
            raise InvalidInputError(
                "many fields were fitted at once", hint="fit the one that should become a drift"
            )
        nodes = slice(None)
        vectors = self.sample((), generator=generator) if draw else self.predict_mean(nodes)
        return TangentDrift(self.cloud, vectors.double(), dt)

    def as_sde(self, diffusion: float | None = None, dt: float | None = None) -> SDE:
        """Return the SDE on the manifold with the posterior mean as drift and isotropic tangent noise.

        Args:
            diffusion: The strength σ of the noise; by default what :meth:`fit_paths` found.
            dt: The step of the time grid, as in :meth:`as_drift`.
        """
        strength = self.diffusion if diffusion is None else diffusion
        return SDE(self.as_drift(dt), TangentDiffusion(self.cloud, strength))

    def measure(
        self, initial: Any, diffusion: float | None = None, dt: float | None = None
    ) -> DiffusionMeasure:
        """Return the law of paths on the manifold whose drift is the posterior mean field.

        Args:
            initial: Where paths start: a distribution with event ``(D,)``, or points ``(*batch, D)``.
            diffusion: The strength σ of the noise; by default what :meth:`fit_paths` found.
            dt: The step of the time grid, as in :meth:`as_drift`.
        """
        return DiffusionMeasure(initial, self.as_sde(diffusion, dt))

    def _condition(
        self,
        data: Observations,
        optimize: bool,
        learn_noise: bool,
        noise_variance: float | None,
        steps: int,
        progress: bool,
        checkpoint: str | os.PathLike[str] | None,
        resume: bool,
    ) -> None:
        searched = self._auto and optimize
        if not searched and (checkpoint is not None or resume):
            raise InvalidInputError(
                f"{'checkpoint' if checkpoint is not None else 'resume'} does nothing unless kernels are tried",
                hint="kernel='auto' with optimize=True tries them",
            )
        check_positive_int(steps, "steps")
        if noise_variance is not None:
            check_real(noise_variance, "noise_variance", above=0.0)

        def prepare(engine: Engine) -> None:
            if noise_variance is not None:
                engine.log_noise.data.fill_(math.log(noise_variance))
            elif not learn_noise:
                engine.log_noise.data.fill_(0.0)
            if optimize:
                engine.optimise(steps, learn_noise)
            elif self.engine is not None:
                engine.log_amplitude.data.copy_(self.engine.log_amplitude.data)
                if noise_variance is None and learn_noise:
                    engine.log_noise.data.copy_(self.engine.log_noise.data)

        if not searched:
            engine = make_engine(self.cloud, data, self._kernel, self.backend, float(self.nu or 2.0))
            prepare(engine)
            self._take(engine)
            return

        def finish(best: Best | None, record: list[Choice]) -> RVGP:
            self.candidates = record
            if best is not None:
                self._kernel, candidate = best.kernel, best.candidate
                self.backend, self.nu, self.chosen = candidate.backend, candidate.nu, candidate.name
                self._take(best.engine)
            return self

        identity = {
            "cloud": digest(self.cloud), "observations": digest(data), "learn_noise": learn_noise,
            "noise_variance": noise_variance, "steps": steps,
        }  # fmt: skip
        run_to_end(
            KernelSearch(self.cloud, data, prepare, finish), "kernels", identity=identity, progress=progress,
            checkpoint=checkpoint, resume=resume,
        )  # fmt: skip

    def _take(self, engine: Engine) -> None:
        """Take an engine and compute its posterior."""
        engine.condition()
        self.engine = engine

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
        """Return the log density of the tangent components of the data, summed over fields."""
        with torch.no_grad():
            return self._fitted().evidence()

    def predict(
        self, where: Any, *, covariance: str = "tangent", with_noise: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Return the posterior field at nodes or, at new points.

        Args:
            where: The nodes or points ``(q, D)`` where the field is wanted.
            covariance: The coordinates of covariances: ``"tangent"`` in the frames of :meth:`frames`, or ``"ambient"``.
            with_noise: Whether the (common) noise variance of a new observation is added.

        Returns:
            Means ``(*batch, q, D)`` in ambient coordinates, and covariances ``(q, m, m)`` or ``(q, D, D)``, the same for all
            fields.
        """
        check_choice(covariance, ("tangent", "ambient"), "covariance")
        engine, sites = self._fitted(), self.cloud.sites(where)
        mean = self.predict_mean(sites)
        cov = engine.covariance(sites)
        white = engine.missing_variance(sites) + (engine.noise.detach() if with_noise else 0.0)
        cov = cov + white[:, None, None] * torch.eye(cov.shape[-1], dtype=cov.dtype, device=cov.device)
        if covariance == "ambient":
            cov = sites.frames @ cov @ sites.frames.mT
        return mean, cov.to(self._dtype)

    def predict_mean(self, where: Any) -> Tensor:
        """Return posterior means ``(*batch, q, D)`` alone, which cost least."""
        sites = self.cloud.sites(where)
        mean = sites.to_ambient(self._fitted().mean(sites)).reshape(*self._batch, len(sites), -1)
        return mean.to(self._dtype)

    def frames(self, where: Any) -> Tensor:
        """Return the tangent frames ``(q, D, m)`` in which covariances at these nodes or points are given."""
        return self.cloud.sites(where).frames.to(self._dtype)

    def sample(
        self, sample_shape: SampleShape = (), where: Any = None, generator: Generator = None
    ) -> Tensor:
        """Draw fields from the joint posterior.

        Args:
            sample_shape: The shape of independent draws, an integer or a tuple.
            where: The nodes or points ``(q, D)``; all nodes if None.
            generator: A ``torch.Generator``, a seed, or None for torch's global source of randomness.

        Returns:
            ``(*sample, *batch, q, D)`` in ambient coordinates.
        """
        shape, source = as_sample_shape(sample_shape), as_generator(generator, self.cloud.device)
        n = math.prod(shape)
        sites = self.cloud.sites(slice(None) if where is None else where)
        engine = self._fitted()
        drawn = engine.sample(n, sites, source)
        if not sites.are_nodes:  # what the nodes don't tell is independent from point to point
            spread = engine.missing_variance(sites).sqrt()[:, None]
            noise = torch.randn(drawn.shape, generator=source, dtype=drawn.dtype, device=drawn.device)
            drawn = drawn + spread * noise
        return sites.to_ambient(drawn).reshape(*shape, *self._batch, len(sites), -1).to(self._dtype)


def _check_options(kernel: str | Kernel, backend: str, num_eigenpairs: int | None, nu: float | None) -> None:
    """Refuse options that would be ignored."""
    if kernel == "auto" and (backend != "spectral" or num_eigenpairs is not None or nu is not None):
        raise InvalidInputError(
            "kernel='auto' chooses backend, num_eigenpairs and nu itself",
            hint="leave them out, or name a kernel",
        )
    if num_eigenpairs is not None and (backend == "precision" or kernel not in ("connection", "projected")):
        raise InvalidInputError(
            "num_eigenpairs is for the named kernels 'connection' and 'projected' of the spectral backend",
            got=f"kernel={kernel if isinstance(kernel, str) else type(kernel).__name__}, backend={backend}",
        )
    if isinstance(kernel, Kernel) and backend == "spectral" and nu is not None:
        raise InvalidInputError("nu is for named kernels", hint="give it to the kernel itself")


def _named(cloud: PointCloud, name: str, num_eigenpairs: int | None, nu: float) -> Kernel:
    counts: dict[str, Any] = {} if num_eigenpairs is None else {"num_eigenpairs": num_eigenpairs}
    if name == "ambient":
        return AmbientKernel(cloud, nu)
    return (ConnectionMatern if name == "connection" else ProjectedMatern)(cloud, nu, **counts)


def _without_missing(
    sites: Sites, vectors: Tensor, relative: Tensor, missing: Tensor
) -> tuple[Sites, Tensor, Tensor]:
    """Leave out the sites whose vectors are missing, in all fields alike."""
    lacking = missing.reshape(-1, missing.shape[-1])
    seen = ~lacking.all(0)
    if bool(lacking[:, seen].any()):
        raise InvalidInputError(
            "fields that are fitted together must miss the same vectors",
            hint="fit fields with other missing vectors one by one",
        )
    check_nonempty(seen.nonzero(), "the vectors that aren't missing")
    return sites.take(seen.to(sites.points.device)), vectors[..., seen, :], relative[seen]


def _variances(variances: Any, rows: int) -> Tensor:
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
