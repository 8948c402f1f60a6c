"""The field as a Bayesian linear model in Pyro: standard normal weights, any likelihood, any inference."""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from stochdyn.errors import InvalidInputError
from stochdyn.vectorfields.regression.kernels import SpectralKernel

__all__ = ["LinearField", "sample_field"]


class LinearField:
    r"""A Gaussian field at fixed places as a linear map of standard normal weights.

    .. math:: v(x_i)=T_i\,\sigma\,\Phi(x_i)\,\mathrm{diag}(s)^{1/2}\,w,\qquad w\sim N(0,I_k)

    The features Φ are computed once; s depends on the length scale and smoothness, which may be random too.

    Args:
        kernel: A spectral kernel, such as :class:`~stochdyn.vectorfields.regression.kernels.ConnectionMatern`.
        where: The nodes or points ``(q, D)`` where the field is wanted.

    Raises:
        InvalidInputError: If the kernel has no eigenvalues.

    Example:
        >>> from stochdyn.vectorfields import ConnectionMatern, PointCloud
        >>> angle = torch.arange(40, dtype=torch.float64) * 2 * torch.pi / 40
        >>> circle = PointCloud(torch.stack([angle.cos(), angle.sin()], -1), num_neighbors=4, dim=1)
        >>> field = LinearField(ConnectionMatern(circle, num_eigenpairs=9), range(5))
        >>> field(torch.zeros(7, 9, dtype=torch.float64)).shape
        torch.Size([7, 5, 1])
    """

    def __init__(self, kernel: SpectralKernel, where: Any) -> None:
        if not isinstance(kernel, SpectralKernel):
            raise InvalidInputError("the kernel must be a spectral one", got=type(kernel).__name__)
        self.kernel = kernel
        self.sites = kernel.cloud.sites(where)
        with torch.no_grad():
            self.features = kernel.features(self.sites)

    @property
    def num_weights(self) -> int:
        """k, the number of weights."""
        return self.features.shape[-1]

    def weights_law(self) -> Any:
        """Return the prior of the weights, a Pyro distribution with event ``(k,)``."""
        zero = torch.zeros((), dtype=self.features.dtype, device=self.features.device)
        return dist.Normal(zero, 1.0).expand([self.num_weights]).to_event(1)

    def __call__(
        self,
        weights: Tensor,
        lengthscale: Tensor | float | None = None,
        amplitude: Tensor | float = 1.0,
        nu: Tensor | float | None = None,
    ) -> Tensor:
        """Return tangent components ``(*batch, q, m)``.

        Args:
            weights: The standard normal weights ``(*batch, k)``.
            lengthscale: The length scale κ ``(*batch)``; the kernel's if None.
            amplitude: The standard deviation σ of a component, ``(*batch)``.
            nu: The smoothness ν ``(*batch)``; the kernel's if None.
        """
        # σ Φ diag(s)^½ w for every weight vector of the batch.
        s = self.kernel.weights_at(lengthscale, nu)
        scaled = weights * s.sqrt() * torch.as_tensor(amplitude, dtype=s.dtype, device=s.device)[..., None]
        return (scaled @ self.features.flatten(0, 1).mT).unflatten(-1, self.features.shape[:2])

    def ambient(self, components: Tensor) -> Tensor:
        """Return ambient vectors ``(*batch, q, D)`` of components."""
        return self.sites.to_ambient(components)


def sample_field(
    name: str,
    field: LinearField,
    lengthscale: Tensor | float | None = None,
    amplitude: Tensor | float = 1.0,
    nu: Tensor | float | None = None,
) -> Tensor:
    """Sample a field inside a Pyro model: the weights as site ``{name}_weights``, the components as deterministic ``name``.

    Args:
        name: The name of the field's sites in the model.
        field: The places where the field is wanted, with its kernel.
        lengthscale: The length scale κ, possibly sampled before; the kernel's if None.
        amplitude: The standard deviation σ of a component, possibly sampled before.
        nu: The smoothness ν, possibly sampled before; the kernel's if None.

    Returns:
        Tangent components ``(*batch, q, m)``.
    """
    weights = pyro.sample(f"{name}_weights", field.weights_law())
    value: Tensor = pyro.deterministic(name, field(weights, lengthscale, amplitude, nu), event_dim=2)
    return value
