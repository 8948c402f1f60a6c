"""Finite-rank kernels of tangent vector fields for gpytorch: connection Matérn and projected scalar Matérn."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from gpytorch.constraints import Positive
from gpytorch.kernels import Kernel
from gpytorch.models import exact_prediction_strategies
from gpytorch.priors import LogNormalPrior
from linear_operator.operators import MatmulLinearOperator
from torch import Tensor

from stochdyn._checks import (
    check_positive,
    check_type,
    is_real,
)
from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields.geometry.cloud import PointCloud
from stochdyn.vectorfields.geometry.operators import DenseCovariance, FeatureCovariance
from stochdyn.vectorfields.regression._input import as_count
from stochdyn.vectorfields.regression.rows import decode
from stochdyn.vectorfields.regression.sites import Sites, lost_variance, variogram

__all__ = ["ConnectionMatern", "FeatureKernel", "ProjectedMatern", "SpectralKernel"]


#: Modes by default. With fewer modes than the data resolve, what is cut off is taken for noise, and bands are too narrow.
_CONNECTION_MODES, _SCALAR_MODES = 600, 300
#: Numbers of a block of features that are held at once.
_CHUNK = 16_000_000


class FeatureKernel(Kernel):
    r"""A kernel of tangent fields with finitely many features, :math:`K(x,x')=\Phi(x)\,\mathrm{diag}(s)\,\Phi(x')^\top`.

    ``Φ(x) (m, k)`` holds components in the tangent frame at x and doesn't depend on hyper-parameters; the spectral
    weights ``s (k,)`` do. Subclasses implement :meth:`features` and :meth:`spectral_weights`. Inputs are rows, see
    :meth:`PointCloud.rows`. With gpytorch's exact models all solves take the low-rank path.

    Args:
        cloud: The points that sample the manifold.
    """

    is_stationary = False
    has_lengthscale = True

    def __init__(self, cloud: PointCloud, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.cloud = cloud
        self.double().to(cloud.device)

    def features(self, sites: Sites) -> Tensor:
        """Return ``Φ (q, m, k)`` at the sites, in double precision."""
        raise NotImplementedError

    def spectral_weights(self) -> Tensor:
        """Return ``s (k,)``, differentiable in the hyper-parameters; the prior variance averages to one."""
        raise NotImplementedError

    def missing_variance(self, sites: Sites) -> Tensor:
        """Return the prior variance ``(q,)`` of a component that the features leave out at the sites.

        Zero where the features are exact. Features that are read off the nodes lose, between the nodes and away from
        them, what the nodes don't tell; a posterior adds it, so that its prior is the same everywhere.
        """
        return torch.zeros(len(sites), dtype=torch.float64, device=sites.points.device)

    def row_features(self, x: Tensor) -> Tensor:
        r"""Return :math:`\sqrt s\,\Phi^\top t` of every row ``(x, t)``, ``(N, k)``."""
        sites, along = decode(self.cloud, x)
        return torch.einsum("na,nak->nk", along, self.features(sites)) * self.spectral_weights().sqrt()

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> Any:
        """Return the kernel between rows; see :class:`gpytorch.kernels.Kernel`."""
        same = x1.shape == x2.shape and torch.equal(x1, x2)
        z1 = self.row_features(x1)
        z2 = z1 if same else self.row_features(x2)
        if diag:
            return (z1 * z2).sum(-1)
        if not same:
            return MatmulLinearOperator(z1, z2.mT)
        return FeatureCovariance(z1) if z1.shape[-1] < z1.shape[-2] else DenseCovariance(z1 @ z1.mT)

    def prediction_strategy(
        self, train_inputs: Any, train_prior_dist: Any, train_labels: Any, likelihood: Any
    ) -> Any:
        """Return gpytorch's strategy for low-rank kernels, whose variances are exact."""
        parts = (train_inputs, train_prior_dist, train_labels, likelihood)
        # later versions of gpytorch choose by the number of features
        choose = getattr(exact_prediction_strategies, "select_prediction_strategy", None)
        if choose is not None:
            return choose(self.spectral_weights().shape[0], *parts)
        if self.spectral_weights().shape[0] < train_labels.shape[-1]:
            return exact_prediction_strategies.LinearPredictionStrategy(*parts)
        return super().prediction_strategy(*parts)

    def __mul__(self, other: Kernel) -> Kernel:
        if isinstance(other, FeatureKernel):
            raise InvalidInputError(
                "two kernels of vector fields have no product: it would depend on the frames",
                hint="multiply by a scalar kernel, stochdyn.vectorfields.ScalarFactor(cloud, kernel)",
            )
        return super().__mul__(other)


class SpectralKernel(FeatureKernel):
    r"""A kernel whose spectral weights are a function of Laplacian eigenvalues.

    .. math:: a(\lambda)=\Big(\frac{2\nu}{\kappa^2}+\lambda\Big)^{-\nu},\qquad
        a(\lambda)=e^{-\kappa^2\lambda/2}\ \text{ for }\nu=\infty

    Args:
        cloud: The points that sample the manifold.
        eigenvalues: The eigenvalues ``(k,)`` of a Laplacian in 1 / length².
        power: The mean square of each feature over nodes and components, ``(k,)``.
        nu: The smoothness ν > 0, or ``math.inf`` for the squared exponential.
        trainable_nu: Whether ν is learnt, from the given value on.
    """

    eigenvalues: Tensor
    power: Tensor

    def __init__(
        self,
        cloud: PointCloud,
        eigenvalues: Tensor,
        power: Tensor,
        nu: float = 1.5,
        trainable_nu: bool = False,
        lengthscale_prior: Any = "default",
        **kwargs: Any,
    ) -> None:
        if not is_real(nu) or math.isnan(nu) or nu <= 0:
            raise InvalidInputError("nu must be positive, or infinite", got=nu)
        if trainable_nu and math.isinf(nu):
            raise InvalidInputError(
                "an infinite nu can't be learnt", hint="start from a finite one, such as 1.5"
            )
        # a wave that the graph resolves well: the length at which the likelihood has something to say
        resolved = float(eigenvalues[min(10, eigenvalues.shape[0] - 1)])
        # (a graph of so few modes that all are constant falls back on its own size)
        least = 1e-9 * float(cloud.spacing) ** -2
        start = math.sqrt((2.0 * nu if math.isfinite(nu) else 2.0) / max(resolved, least))
        prior = LogNormalPrior(math.log(start), 1.5) if lengthscale_prior == "default" else lengthscale_prior
        super().__init__(cloud, lengthscale_prior=prior, **kwargs)
        self.register_buffer("eigenvalues", eigenvalues)
        self.register_buffer("power", power)
        self.trainable_nu = trainable_nu
        self._nu = float(nu)
        if trainable_nu:
            self.register_parameter("raw_nu", torch.nn.Parameter(torch.zeros((), dtype=torch.float64)))
            self.register_constraint("raw_nu", Positive())
            self.register_prior("nu_prior", LogNormalPrior(math.log(1.5), 0.7), _nu_of, _set_nu)
            self.nu = nu
        self.double().to(cloud.device)
        self.lengthscale = start

    @property
    def nu(self) -> Any:
        """Smoothness ν: a number, or a tensor if it is learnt."""
        return self.raw_nu_constraint.transform(self.raw_nu) if self.trainable_nu else self._nu

    @nu.setter
    def nu(self, value: Tensor | float) -> None:
        if not self.trainable_nu:
            self._nu = float(value)
            return
        check_positive(value, "nu")
        raw = torch.as_tensor(value, dtype=torch.float64, device=self.raw_nu.device)
        self.initialize(raw_nu=self.raw_nu_constraint.inverse_transform(raw))

    def spectral_weights(self) -> Tensor:
        """Return the weights at the kernel's own hyper-parameters, ``(k,)``."""
        return self.weights_at()

    def weights_at(
        self, lengthscale: Tensor | float | None = None, nu: Tensor | float | None = None
    ) -> Tensor:
        """Return the weights ``(*batch, k)`` at given hyper-parameters ``(*batch)``; the kernel's own where None."""
        own = torch.as_tensor(self.lengthscale).reshape(()) if lengthscale is None else lengthscale
        values = self.eigenvalues
        kappa = torch.as_tensor(own, dtype=values.dtype, device=values.device)[..., None]
        smooth = self.nu if nu is None else nu
        # log a(λ), so that extreme length scales don't overflow; then s = a / Σ a p, a prior of mean variance one.
        if not isinstance(smooth, Tensor) and math.isinf(smooth):
            log_weight = -0.5 * kappa**2 * values
        else:
            power = torch.as_tensor(smooth, dtype=values.dtype, device=values.device)[..., None]
            log_weight = -power * torch.log(2.0 * power / kappa**2 + values)
        weight = torch.exp(log_weight - log_weight.max(-1, keepdim=True).values)
        return self._repeat(weight / (weight * self.power).sum(-1, keepdim=True))

    def _repeat(self, weight: Tensor) -> Tensor:
        """Spread the weights of eigenvalues over features that share them."""
        return weight


class NodalKernel(SpectralKernel):
    """A spectral kernel whose features are modes on the nodes, which are read at all other sites.

    Args:
        cloud: The points that sample the manifold.
        values: The eigenvalues ``(k,)`` of a Laplacian in 1 / length².
        modes: The modes ``(n, f, k)`` on the nodes.
        options: The smoothness, whether it is learnt, and the prior, as :class:`SpectralKernel` takes them.
    """

    modes: Tensor

    def __init__(
        self, cloud: PointCloud, values: Tensor, modes: Tensor, *options: Any, **kwargs: Any
    ) -> None:
        # The weights make the variance of a component one on average: a mode counts with its mean square.
        super().__init__(cloud, values, (modes**2).mean((0, 1)), *options, **kwargs)
        self.register_buffer("modes", modes, persistent=False)

    def missing_variance(self, sites: Sites) -> Tensor:
        """Return what reading the modes off the nodes lost at the sites, ``(q,)``.

        The prior variance there shall be the neighbours', and one, its mean over the cloud, far from all nodes.
        """
        if sites.are_nodes:
            return super().missing_variance(sites)
        weights = self.spectral_weights()
        at_nodes = self._variances(self.cloud.sites(slice(None)), weights)
        rough, noise = variogram(self.cloud.left_out[1], [r @ weights for r in self.residuals])
        return lost_variance(sites, at_nodes, rough, noise)

    @functools.cached_property
    def residuals(self) -> list[Tensor]:
        """The mean squares ``(1, k)`` of every feature less what is read of it from other nodes, nearer and farther ones."""
        itself, levels = self.cloud.left_out
        own = self.features(itself)
        return [(own - self.features(read)).square().mean((0, 1))[None] for read in levels]

    def _variances(self, sites: Sites, weights: Tensor) -> Tensor:
        """Return the variance of a component at the sites, averaged over components, ``(q,)``."""
        step = max(1, _CHUNK // (weights.shape[0] * self.cloud.dim))
        parts = [sites.take(slice(i, i + step)) for i in range(0, len(sites), step)]
        return torch.cat([(self.features(part).square() @ weights).mean(-1) for part in parts])


class ConnectionMatern(NodalKernel):
    r"""Matérn kernel of vector fields, from the eigenpairs of the connection Laplacian.

    .. math:: K(x_i,x_j)=\sum_l s_l\,u_l(i)\,u_l(j)^\top,\qquad s_l\propto\Big(\frac{2\nu}{\kappa^2}+\lambda_l\Big)^{-\nu},

    with :math:`e^{-\kappa^2\lambda_l/2}` in place of the power for ν = ∞, and s scaled so that the prior variance, averaged
    over nodes and components, is one. It doesn't depend on the choice of frames. Fields have about ν - m/2 derivatives on a
    manifold of dimension m.

    Args:
        cloud: The points that sample the manifold.
        nu: The smoothness ν, such as 0.5, 1.5, 2.5 or ``math.inf`` (squared exponential).
        num_eigenpairs: The number of modes; by default 600, or all if there are fewer. Truncation costs accuracy long
            before it saves time: take hundreds.
        trainable_nu: Whether ν is learnt too.
        lengthscale_prior: The prior of the length scale κ. The likelihood is flat in κ above the size of the manifold, so
            by default a wide log-normal one; None for none.

    Raises:
        InvalidInputError: If ν isn't positive, or if there are fewer eigenpairs than asked for.

    Example:
        >>> angle = torch.arange(40, dtype=torch.float64) * 2 * torch.pi / 40
        >>> circle = PointCloud(torch.stack([angle.cos(), angle.sin()], -1), num_neighbors=4, dim=1)
        >>> kernel = ConnectionMatern(circle, nu=1.5, num_eigenpairs=20)
        >>> x = circle.rows(range(40))
        >>> round(kernel(x, diag=True).mean().item(), 6)
        1.0

    Reference:
        Peach et al., "Implicit Gaussian process representation of vector fields over arbitrary latent manifolds",
        2024, section 3.3; Borovitskiy et al., "Matérn Gaussian processes on graphs", 2021, equation 13.
    """

    def __init__(
        self,
        cloud: PointCloud,
        nu: float = 1.5,
        num_eigenpairs: int | None = None,
        trainable_nu: bool = False,
        lengthscale_prior: Any = "default",
        **kwargs: Any,
    ) -> None:
        check_type(cloud, PointCloud, "cloud")
        most = cloud.dim * len(cloud)
        count = (
            min(_CONNECTION_MODES, most)
            if num_eigenpairs is None
            else as_count(num_eigenpairs, "num_eigenpairs")
        )
        values, modes = cloud.modes(count)
        super().__init__(cloud, values, modes, nu, trainable_nu, lengthscale_prior, **kwargs)

    def features(self, sites: Sites) -> Tensor:
        """Return the modes at the sites, carried there by the connection, ``(q, m, k)``."""
        return sites.extend(self.modes)


class ProjectedMatern(NodalKernel):
    r"""Independent scalar graph-Matérn fields in every ambient coordinate, projected to the tangent spaces.

    .. math:: K(x_i,x_j)=T_i^\top T_j\,k(x_i,x_j),\qquad k(x_i,x_j)=\sum_ls_lf_l(i)f_l(j)

    with the eigenpairs of the Laplacian of functions. Strong where the field is the shadow of a smooth field of the
    surrounding space.

    Args:
        cloud: The points that sample the manifold.
        nu: The smoothness ν as in :class:`ConnectionMatern`.
        num_eigenpairs: The number of modes of functions, by default 300, or all if there are fewer; there are D features
            for each.
        trainable_nu: Whether ν is learnt too.
        lengthscale_prior: The prior of the length scale, as in :class:`ConnectionMatern`.

    Reference:
        Hutchinson, Terenin, Borovitskiy, Takao, Teh and Deisenroth, "Vector-valued Gaussian processes on Riemannian
        manifolds via gauge independent projected kernels", 2021, section 3.
    """

    def __init__(
        self,
        cloud: PointCloud,
        nu: float = 1.5,
        num_eigenpairs: int | None = None,
        trainable_nu: bool = False,
        lengthscale_prior: Any = "default",
        **kwargs: Any,
    ) -> None:
        check_type(cloud, PointCloud, "cloud")
        count = (
            min(_SCALAR_MODES, len(cloud))
            if num_eigenpairs is None
            else as_count(num_eigenpairs, "num_eigenpairs")
        )
        values, modes = cloud.modes(count, "scalar")
        # a frame holds m of the D unit vectors, so that each component sees each mode with total strength one
        super().__init__(cloud, values, modes, nu, trainable_nu, lengthscale_prior, **kwargs)

    def features(self, sites: Sites) -> Tensor:
        """Return the modes of functions times the projected unit vectors of the surrounding space, ``(q, m, D k)``."""
        waves = sites.extend(self.modes, tangent=False)[:, 0]
        return torch.einsum("qda,qk->qadk", sites.frames, waves).flatten(2)

    def _repeat(self, weight: Tensor) -> Tensor:
        return torch.cat([weight] * self.cloud.value_dim, -1)


def _nu_of(kernel: Any) -> Any:
    return kernel.nu


def _set_nu(kernel: Any, value: Any) -> None:
    kernel.nu = value
