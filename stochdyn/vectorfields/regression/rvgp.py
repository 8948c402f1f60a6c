"""Gaussian-process regression of tangent vector fields on a point cloud."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from stochdyn._checks import check_bool, check_choice, check_positive
from stochdyn.core.law.diffusion import DiffusionMeasure
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import ApproximationWarning, InvalidInputError, UnavailableError
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.geometry.surface import TangentDiffusion, TangentDrift
from stochdyn.vectorfields.regression._input import as_vectors
from stochdyn.vectorfields.regression.observations import (
    Groups,
    as_labels,
)
from stochdyn.vectorfields.regression.paths import path_observations, quadratic_variation, trials_of
from stochdyn.vectorfields.regression.process import FieldProcess, as_variances

__all__ = ["RVGP"]

_NAMES = ("connection", "projected", "ambient", "auto")
#: Normal components above this share of the square of the data deserve a warning.
_LOST = 0.05


class RVGP(FieldProcess):
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
        nu: The smoothness of the named kernels; by default 5/2, of the ambient kernel 3/2, and of the precision backend,
            where it must be whole, 3. A kernel object with ``trainable_nu=True`` learns it.

    Attributes:
        candidates: The evidence of every kernel tried by ``"auto"``, best first; ``chosen`` names the best.
        labels: The conditions whose fields were fitted, in the order of the batch; None where no labels were given.
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

    _axes = ("site", "coordinate")

    def __init__(
        self,
        cloud: PointCloud,
        kernel: str | Kernel = "connection",
        backend: str = "spectral",
        *,
        num_eigenpairs: int | None = None,
        nu: float | None = None,
    ) -> None:
        super().__init__(cloud, _NAMES, kernel, backend, num_eigenpairs, nu)
        if cloud.of_functions:
            raise InvalidInputError("functions are no vector fields", hint="use ScalarGP(cloud)")

    # ------------------------------------------------------------------------------------------- fitting

    def fit(
        self,
        index: Any,
        vectors: Any,
        variances: Any = None,
        *,
        labels: Sequence[object] | None = None,
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
            labels: The condition of every vector, ``q`` of them, for vectors ``(q, D)``. Each condition gets a field of its
                own; the hyper-parameters are common. The fields come in the order in which the conditions first appear.
            optimize: Whether the hyper-parameters are learnt; otherwise they stay as they are.
            learn_noise: Whether the noise variance, or the common factor, is learnt.
            noise_variance: The start for the noise variance, or its value if it isn't learnt.
            steps: The largest number of updates of the optimiser.
            progress: Whether to show a bar while kernels are tried, where that takes more than two seconds.
            checkpoint: The directory of the checkpoints of ``kernel="auto"``, one per kernel tried.
            resume: Whether to go on from the checkpoint, to the same bits as if the trial had never stopped.

        Returns:
            The same object.

        Raises:
            InvalidInputError: If sites lie outside the cloud, or if labels don't name the condition of every vector.
            Interrupted: After Ctrl-C while kernels are tried; its ``result`` is this object with the best kernel so far.
            ShapeError, NonFiniteError: If the vectors don't fit.
        """
        for name, flag in (("optimize", optimize), ("learn_noise", learn_noise)):
            check_bool(flag, name)
        sites = self.cloud.sites(index)
        v = as_vectors(vectors, len(sites), self.cloud.value_dim, missing=True)
        relative = as_variances(variances, len(sites)).to(self.cloud.device)
        shape, dtype = v.shape, v.dtype
        v = v.detach().to(self.cloud.device, torch.float64).reshape(-1, *v.shape[-2:])
        missing = torch.isnan(v).any(-1)
        v = v.masked_fill(missing[..., None], 0.0)
        components = sites.to_tangent(v)
        lost = self._warn_of_normal_parts(v, components)

        def after() -> None:
            self._dtype, self.lost_share, self._of_paths = dtype, lost, False

        self._condition_on(
            sites,
            components,
            relative,
            missing,
            shape[:-2],
            after,
            thing="vector",
            labels=labels,
            optimize=optimize,
            learn_noise=learn_noise,
            noise_variance=noise_variance,
            steps=steps,
            progress=progress,
            checkpoint=checkpoint,
            resume=resume,
        )
        return self

    def _warn_of_normal_parts(self, vectors: Tensor, components: Tensor) -> float:
        """Return the share of the square of the vectors that is normal to the tangent spaces; warn where it is large."""
        total = float((vectors**2).sum())
        lost = max(0.0, 1.0 - float((components**2).sum()) / total) if total > 0 else 0.0
        if lost > _LOST:
            warnings.warn(
                f"{lost:.0%} of the square of the vectors is normal to the tangent spaces and was dropped. "
                "Are they tangent vectors of this manifold, in these coordinates?",
                ApproximationWarning,
                stacklevel=3,
            )
        return lost

    def fit_paths(
        self,
        paths: Any,
        diffusion: float | None = None,
        *,
        labels: Sequence[object] | None = None,
        stride: int = 1,
        optimize: bool = True,
        steps: int = 100,
        progress: bool = True,
        checkpoint: str | os.PathLike[str] | None = None,
        resume: bool = False,
    ) -> RVGP:
        r"""Condition the field, as the drift of an SDE, on trajectories; exact, see :func:`~.paths.path_observations`.

        Args:
            paths: A :class:`~stochdyn.PathSample`, ``(ts, x)`` with ``ts (T,)`` and ``x (*sample, T, D)``, or a list of such,
                each trial on a grid of its own; NaN is a missing state.
            diffusion: The strength σ of the noise in the tangent spaces; learnt with the other hyper-parameters if None.
            labels: The condition of every trial of the list. Each condition gets a field of its own; amplitude, length scale
                and diffusion are common. The fields come in the order in which the conditions first appear.
            stride: The interval between the states that are used: every state whose number is a multiple of this one.
            optimize: Whether the hyper-parameters are learnt.
            steps: The largest number of updates of the optimiser.
            progress: Whether to show a bar while kernels are tried, where that takes more than two seconds.
            checkpoint: The directory of the checkpoints of ``kernel="auto"``, one per kernel tried.
            resume: Whether to go on from the checkpoint.

        Returns:
            The same object; ``diffusion`` holds σ, given or learnt.

        Raises:
            InvalidInputError: If the paths aren't such, or if labels don't name the condition of every trial.
        """
        trials = trials_of(paths)
        if diffusion is not None:
            check_positive(diffusion, "diffusion")
        check_bool(optimize, "optimize")
        if diffusion is None and not optimize:
            raise InvalidInputError("with optimize off the diffusion must be given")
        names: list[object] | None = None
        if labels is None:
            groups, batch = (
                Groups([path_observations(self.cloud, trials, stride)], [torch.tensor([0])]),
                torch.Size(),
            )
        else:
            each = as_labels(labels, len(trials), "trial")
            names = list(dict.fromkeys(each))
            parts = [
                path_observations(
                    self.cloud, [t for t, own in zip(trials, each, strict=True) if own == name], stride
                )
                for name in names
            ]
            groups = Groups(parts, [torch.tensor([i]) for i in range(len(parts))])
            batch = torch.Size([len(names)])
        # The pooled quadratic variation starts the search for σ².
        guess = sum(quadratic_variation(part)[0] ** 2 * part.rows for part in groups.parts)
        guess = guess / sum(part.rows for part in groups.parts) if diffusion is None else diffusion**2

        def after() -> None:
            self._dtype, self.lost_share, self._of_paths = torch.float64, 0.0, True

        self._condition(
            groups,
            batch,
            names,
            after,
            optimize=optimize,
            learn_noise=diffusion is None,
            noise_variance=guess,
            steps=steps,
            progress=progress,
            checkpoint=checkpoint,
            resume=resume,
        )
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
        self,
        dt: float | None = None,
        *,
        field: object = None,
        draw: bool = False,
        generator: Generator = None,
    ) -> TangentDrift:
        """Return the posterior mean field, or a draw, as a drift ``(t, x)`` for :class:`stochdyn.SDE` in ambient coordinates.

        Args:
            dt: The step of the time grid; if given, every Euler step first projects the state back to the manifold.
            field: Which field, where many were fitted: the label of a condition, or a number or tuple of numbers in the batch.
            draw: Whether a field is drawn from the posterior instead of taking the mean.
            generator: The source of randomness of the draw.

        Raises:
            InvalidInputError: If many fields were fitted and none is named, or if there is no such field.
        """
        self._fitted()
        at = self._number(field)
        vectors = self.sample((), generator=generator) if draw else self.predict_mean(slice(None))
        return TangentDrift(self.cloud, vectors[at].double(), dt)

    def _number(self, field: object) -> tuple[int, ...]:
        """Return the place of a field in the batch."""
        if self._batch == torch.Size():
            if field is not None:
                raise InvalidInputError("one field was fitted, and field names one of many", got=repr(field))
            return ()
        if field is None:
            raise InvalidInputError(
                "many fields were fitted at once",
                hint="name one by field=..."
                + ("" if self.labels is None else f", one of {', '.join(map(repr, self.labels))}"),
            )
        if self.labels is not None:
            if field not in self.labels:
                raise InvalidInputError("there is no such condition", got=repr(field), expected=self.labels)
            return (self.labels.index(field),)
        at = field if isinstance(field, tuple) else (field,)
        if len(at) != len(self._batch) or not all(
            isinstance(i, int) and not isinstance(i, bool) and -n <= i < n
            for i, n in zip(at, self._batch, strict=False)
        ):
            raise InvalidInputError(
                "field must be the place of a field in the batch",
                got=repr(field),
                expected=f"whole numbers within {tuple(self._batch)}",
            )
        return at

    def as_sde(self, diffusion: float | None = None, dt: float | None = None, *, field: object = None) -> SDE:
        """Return the SDE on the manifold with the posterior mean as drift and isotropic tangent noise.

        Args:
            diffusion: The strength σ of the noise; by default what :meth:`fit_paths` found.
            dt: The step of the time grid, as in :meth:`as_drift`.
            field: Which field, where many were fitted, as in :meth:`as_drift`.
        """
        strength = self.diffusion if diffusion is None else diffusion
        return SDE(self.as_drift(dt, field=field), TangentDiffusion(self.cloud, strength))

    def measure(
        self,
        initial: Any,
        diffusion: float | None = None,
        dt: float | None = None,
        *,
        field: object = None,
    ) -> DiffusionMeasure:
        """Return the law of paths on the manifold whose drift is the posterior mean field.

        Args:
            initial: Where paths start: a distribution with event ``(D,)``, or points ``(*batch, D)``.
            diffusion: The strength σ of the noise; by default what :meth:`fit_paths` found.
            dt: The step of the time grid, as in :meth:`as_drift`.
            field: Which field, where many were fitted, as in :meth:`as_drift`.
        """
        return DiffusionMeasure(initial, self.as_sde(diffusion, dt, field=field))

    # ---------------------------------------------------------------------------------------- the answer

    def predict(
        self, where: Any, *, covariance: str = "tangent", with_noise: bool = False, variances: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return the posterior field at nodes or, read off them, at new points.

        Args:
            where: The nodes or points ``(q, D)`` where the field is wanted.
            covariance: The coordinates of covariances: ``"tangent"`` in the frames of :meth:`frames`, or ``"ambient"``.
            with_noise: Whether the noise variance of new observations is added.
            variances: The noise variances ``(q,)`` of the new observations, up to the same factor as those given to
                :meth:`fit`; equal if None.

        Returns:
            Means ``(*batch, q, D)`` in ambient coordinates, and covariances ``(q, m, m)`` or ``(q, D, D)``, the same for all
            fields; ``(*batch, q, m, m)`` or ``(*batch, q, D, D)`` where fields were observed at different places.
        """
        check_choice(covariance, ("tangent", "ambient"), "covariance")
        self._fitted()
        sites = self.cloud.sites(where)
        mean, cov = self.predict_mean(sites), self._covariances(sites, with_noise, variances)
        if covariance == "ambient":
            cov = sites.frames @ cov @ sites.frames.mT
        return mean, cov.to(self._dtype)

    def predict_mean(self, where: Any) -> Tensor:
        """Return posterior means ``(*batch, q, D)`` alone, which cost least.

        Args:
            where: The nodes or points ``(q, D)`` where the field is wanted.
        """
        engine, sites = self._fitted(), self.cloud.sites(where)
        mean = sites.to_ambient(engine.mean(sites)).reshape(*self._batch, len(sites), -1)
        return mean.to(self._dtype)

    def frames(self, where: Any) -> Tensor:
        """Return the tangent frames ``(q, D, m)`` in which covariances at these nodes or points are given.

        Args:
            where: The nodes or points ``(q, D)``.
        """
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
        self._fitted()
        sites = self.cloud.sites(slice(None) if where is None else where)
        return sites.to_ambient(self._draws(sample_shape, sites, generator)).to(self._dtype)

    def _extra_state(self) -> dict[str, Any]:
        return {"of_paths": self._of_paths, "lost_share": self.lost_share}

    def _load_extra_state(self, state: Mapping[str, Any]) -> None:
        self._of_paths = bool(state.get("of_paths", False))
        self.lost_share = float(state.get("lost_share", 0.0))
