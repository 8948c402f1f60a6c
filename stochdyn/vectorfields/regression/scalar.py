"""Gaussian-process regression of functions on a point cloud, by the machine of vector fields."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from gpytorch.kernels import Kernel
from torch import Tensor

from stochdyn._checks import check_bool, check_event_size, check_finite, check_ndim
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.errors import ApproximationWarning, InvalidInputError
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.regression._input import as_float_tensor
from stochdyn.vectorfields.regression.process import FieldProcess, as_variances

__all__ = ["ScalarGP"]

_NAMES = ("graph", "ambient", "auto")


class ScalarGP(FieldProcess):
    r"""A Gaussian process over functions on the manifold of a point cloud: potentials, temperatures, densities.

    .. math:: y_i=f(x_i)+\varepsilon_i,\qquad f\sim GP(0,\sigma^2K),\quad\varepsilon_i\sim N(0,\tau^2r_i)

    Functions are fields of the trivial line bundle, whose connection Laplacian is the Laplacian of the graph, so kernels,
    backends, readers between the nodes and choice by evidence are those of :class:`RVGP`. The prior has mean zero: subtract
    a level first.

    Args:
        cloud: The points that sample the manifold.
        kernel: The prior. ``"graph"``, the default, for functions that are smooth along the manifold; ``"ambient"`` for those
            that are smooth in the surrounding space; any gpytorch kernel of rows of ``cloud.functions()``; or
            ``"auto"``: of these the one with the highest evidence.
        backend: Which representation computes the answer: ``"spectral"``, in feature space, or ``"precision"``, all modes by
            sparse algebra, for rough functions and for tens of thousands of points.
        num_eigenpairs: The number of modes of ``"graph"``; by default 600, or all if there are fewer.
        nu: The smoothness; by default 5/2, of the ambient kernel 3/2, and of the precision backend, where it must be whole, 3.

    Attributes:
        candidates: The evidence of every kernel tried by ``"auto"``, best first; ``chosen`` names the best.
        labels: The conditions whose functions were fitted, in the order of the batch; None where no labels were given.

    Raises:
        InvalidInputError: If a name is unknown, or an option would be ignored.

    Example:
        >>> angle = torch.arange(40, dtype=torch.float64) * 2 * torch.pi / 40
        >>> circle = PointCloud(torch.stack([angle.cos(), angle.sin()], -1), num_neighbors=4, dim=1)
        >>> wave = (2 * angle).sin()
        >>> mean, variance = ScalarGP(circle).fit(range(0, 40, 2), wave[::2]).predict(range(1, 40, 2))
        >>> bool((mean - wave[1::2]).abs().max() < 0.05), tuple(variance.shape)
        (True, (20,))

    Reference:
        Borovitskiy, Azangulov, Terenin, Mostowsky, Deisenroth and Durrande, "Matérn Gaussian processes on graphs", 2021.
    """

    _axes = ("site",)

    def __init__(
        self,
        cloud: PointCloud,
        kernel: str | Kernel = "graph",
        backend: str = "spectral",
        *,
        num_eigenpairs: int | None = None,
        nu: float | None = None,
    ) -> None:
        if not isinstance(cloud, PointCloud):
            raise InvalidInputError("cloud must be a PointCloud", got=type(cloud).__name__)
        bundle = cloud if cloud.of_functions else cloud.functions()
        super().__init__(bundle, _NAMES, kernel, backend, num_eigenpairs, nu)

    def fit(
        self,
        index: Any,
        values: Any,
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
    ) -> ScalarGP:
        """Condition on values at some nodes or points, and learn the hyper-parameters.

        Args:
            index: The observed nodes (whole numbers, a boolean mask, a slice), or points ``(q, D)``.
            values: The values ``(q,)``, or ``(*batch, q)`` for many functions that share sites and hyper-parameters. NaN is a
                missing value.
            variances: The noise variances ``(q,)``, exact if ``learn_noise`` is off and up to a common factor otherwise;
                equal if None.
            labels: The condition of every value, ``q`` of them, for values ``(q,)``. Each condition gets a function of its own;
                the hyper-parameters are common. The functions come in the order in which the conditions first appear.
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
            InvalidInputError: If sites lie outside the cloud, or if labels don't name the condition of every value.
            ShapeError, NonFiniteError: If the values don't fit.

        Warns:
            ApproximationWarning: If values lie far from zero for their spread, against the prior's mean.
        """
        for name, flag in (("optimize", optimize), ("learn_noise", learn_noise)):
            check_bool(flag, name)
        sites = self.cloud.sites(index)
        y = as_float_tensor(values, "values")
        check_ndim(y, tuple(range(1, 12)), "values", "(*batch, number of sites)")
        check_event_size(y, len(sites), "values")
        relative = as_variances(variances, len(sites)).to(self.cloud.device)
        shape, dtype = y.shape, y.dtype
        y = y.detach().to(self.cloud.device, torch.float64).reshape(-1, len(sites))
        missing = torch.isnan(y)
        check_finite(y[~missing], "values")
        _warn_of_a_level(y, missing)
        components = sites.to_tangent(y.masked_fill(missing, 0.0)[..., None])

        def after() -> None:
            self._dtype = dtype

        self._condition_on(
            sites,
            components,
            relative,
            missing,
            shape[:-1],
            after,
            thing="value",
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

    def predict(
        self, where: Any, *, with_noise: bool = False, variances: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Return the posterior function at nodes or, read off them, at new points.

        Args:
            where: The nodes or points ``(q, D)`` where the function is wanted.
            with_noise: Whether the noise variance of new observations is added.
            variances: The noise variances ``(q,)`` of the new observations, up to the same factor as those given to
                :meth:`fit`; equal if None.

        Returns:
            Means ``(*batch, q)``, and variances ``(q,)``, the same for all functions; ``(*batch, q)`` where functions were
            observed at different places.
        """
        self._fitted()
        sites = self.cloud.sites(where)
        return self.predict_mean(sites), self._covariances(sites, with_noise, variances)[..., 0, 0].to(
            self._dtype
        )

    def predict_mean(self, where: Any) -> Tensor:
        """Return posterior means ``(*batch, q)`` alone, which cost least.

        Args:
            where: The nodes or points ``(q, D)`` where the function is wanted.
        """
        engine, sites = self._fitted(), self.cloud.sites(where)
        mean = sites.to_ambient(engine.mean(sites))[..., 0]
        return mean.reshape(*self._batch, len(sites)).to(self._dtype)

    def sample(
        self, sample_shape: SampleShape = (), where: Any = None, generator: Generator = None
    ) -> Tensor:
        """Draw functions from the joint posterior.

        Args:
            sample_shape: The shape of independent draws, an integer or a tuple.
            where: The nodes or points ``(q, D)``; all nodes if None.
            generator: A ``torch.Generator``, a seed, or None for torch's global source of randomness.

        Returns:
            ``(*sample, *batch, q)``.
        """
        self._fitted()
        sites = self.cloud.sites(slice(None) if where is None else where)
        return sites.to_ambient(self._draws(sample_shape, sites, generator))[..., 0].to(self._dtype)


#: Values whose mean is so many of their standard deviations have a level that the prior knows nothing of.
_FAR = 3.0


def _warn_of_a_level(y: Tensor, missing: Tensor) -> None:
    """Warn where values ``(B, q)`` lie far from zero for their spread."""
    count = (~missing).sum(-1)
    mean = y.masked_fill(missing, 0.0).sum(-1) / count.clamp(min=1)
    square = ((y - mean[:, None]) ** 2).masked_fill(missing, 0.0).sum(-1)
    spread = (square / (count - 1).clamp(min=1)).sqrt()
    far = (count > 2) & (mean.abs() > _FAR * spread) & (spread > 0)
    if bool(far.any()):
        level, width = float(mean[far][0]), float(spread[far][0])
        warnings.warn(
            f"Values lie around {level:.3g} and spread by {width:.2g}, while the prior has mean zero: between the data the answer is "
            "drawn towards zero. Subtract the level first, and add it to predictions.",
            ApproximationWarning,
            stacklevel=3,
        )
