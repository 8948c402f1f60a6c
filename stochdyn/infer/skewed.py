"""A guide for a few global parameters: correlated, skewed, and with tails that keep importance weights bounded."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.infer.autoguide import AutoContinuous, AutoLaplaceApproximation, init_to_median
from pyro.infer.autoguide.guides import AutoGuide
from pyro.nn import PyroParam
from torch import Tensor, nn
from torch.distributions.transforms import ComposeTransform, Transform

from stochdyn._checks import check_callable, check_positive
from stochdyn.infer.naming import fresh_name, rename

__all__ = ["AutoSkewedNormal", "SinhArcsinh"]

_TAIL = 0.2


class SinhArcsinh(Transform):
    r"""Skewness and tail weight for a standard normal variable, with the median and the slope there kept.

    .. math:: y = \frac{\sinh\bigl(e^{\tau}\operatorname{arsinh}x+s\bigr)-\sinh s}{e^{\tau}\cosh s}

    Args:
        skew: ``s``, to the right if positive.
        tail: ``τ``; positive ones make tails heavier than normal.

    Example:
        >>> x = torch.linspace(-2, 2, 5)
        >>> bool((SinhArcsinh(torch.zeros(()), 0.0)(x) - x).abs().max() < 1e-6)
        True

    Reference:
        M. C. Jones and A. Pewsey, Sinh-arcsinh distributions, Biometrika 96, 2009; centred here, so that location, scale
        and shape can be learnt apart.
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign = 1

    def __init__(self, skew: Tensor, tail: float) -> None:
        super().__init__()
        self.skew, self.stretch = skew, math.exp(tail)

    def _call(self, x: Tensor) -> Tensor:
        raised = torch.sinh(self.stretch * torch.asinh(x) + self.skew)
        return (raised - torch.sinh(self.skew)) / (self.stretch * torch.cosh(self.skew))

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.sinh((torch.asinh(self._raise(y)) - self.skew) / self.stretch)

    def _raise(self, y: Tensor) -> Tensor:
        return y * (self.stretch * torch.cosh(self.skew)) + torch.sinh(self.skew)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the logarithm of the slope."""
        slope = torch.log1p(self._raise(y).square()) - torch.log1p(x.square())
        return 0.5 * slope - torch.cosh(self.skew).log()


class AutoSkewedNormal(AutoContinuous):
    r"""A full-rank guide over all latent sites on their unconstrained scale, skewed along each of its axes.

    .. math:: z = m + L\,S_s(\epsilon),\qquad \epsilon\sim N(0,1),

    with the transform :math:`S_s` of :class:`SinhArcsinh` for each coordinate. Like
    ``AutoMultivariateNormal``, with a skewness :math:`s` for each axis and tails a little heavier on purpose: where data
    are plenty the posterior of a few parameters is nearly normal, but a cubic term in its logarithm is enough to give
    the weights of a normal guide a heavy tail.

    Args:
        model: Pyro model.
        init_loc_fn: The function that says where the guide starts, site by site.
        init_scale: The width at the start, on the unconstrained scale.

    Example:
        >>> import pyro
        >>> def model():
        ...     pyro.sample("x", dist.LogNormal(0.0, 1.0))
        >>> guide = AutoSkewedNormal(model)
        >>> sorted(guide())
        ['x']

    Reference:
        The transform is that of Jones and Pewsey, Biometrika 96, 2009.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        init_loc_fn: Callable[..., Any] = init_to_median,
        init_scale: float = 0.1,
    ) -> None:
        check_callable(model, "model", "a Pyro model")
        check_positive(init_scale, "init_scale")
        self._init_scale = init_scale
        super().__init__(model, init_loc_fn=init_loc_fn)
        self._pyro_name = fresh_name(type(self).__name__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        rename(self, type(self).__name__)

    def _setup_prototype(self, *args: Any, **kwargs: Any) -> None:
        super()._setup_prototype(*args, **kwargs)
        self.loc = nn.Parameter(self._init_loc())
        self.skew = nn.Parameter(torch.zeros_like(self.loc))
        self.scale: Any = PyroParam(
            torch.full_like(self.loc, self._init_scale), constraints.softplus_positive
        )
        unit = torch.eye(self.latent_dim, dtype=self.loc.dtype, device=self.loc.device)
        self.scale_tril: Any = PyroParam(unit, constraints.unit_lower_cholesky)

    def start_at_mode(
        self, *args: Any, steps: int = 300, lr: float = 0.05, **kwargs: Any
    ) -> AutoSkewedNormal:
        """Put the guide at the mode of the posterior, as wide as the Laplace approximation there.

        Args:
            args: The positional arguments of the model.
            steps: The number of Adam's updates towards the mode.
            lr: The step size of Adam, which falls to a hundredth of itself.
            kwargs: The keyword arguments of the model.

        Returns:
            The guide itself. If the curvature at the mode isn't that of a maximum, only its place is taken.
        """
        from pyro.infer import SVI, Trace_ELBO
        from pyro.optim import ClippedAdam

        self(*args, **kwargs)
        finder = AutoLaplaceApproximation(self.model)
        finder._pyro_name = fresh_name(type(finder).__name__ + "_of_skewed")
        finder(*args, **kwargs)
        with torch.no_grad():
            finder.loc.copy_(self.loc)
        svi = SVI(self.model, finder, ClippedAdam({"lr": lr, "lrd": 0.01 ** (1 / steps)}), Trace_ELBO())
        for _ in range(steps):
            svi.step(*args, **kwargs)
        with torch.no_grad():
            self.loc.copy_(finder.loc)
        try:
            laplace: AutoGuide = finder.laplace_approximation(*args, **kwargs)
        except torch.linalg.LinAlgError:
            return self
        factor = (laplace.scale[:, None] * laplace.scale_tril).detach()
        if bool(torch.isfinite(factor).all()):
            width = factor.diagonal()
            self.scale = width.clone()
            self.scale_tril = factor / width[:, None]
        return self

    def get_base_dist(self) -> Any:
        """Return the standard normal law before the transform."""
        return dist.Normal(torch.zeros_like(self.loc), torch.ones_like(self.loc)).to_event(1)

    def get_transform(self, *args: Any, **kwargs: Any) -> Transform:
        """Return skewness first, then scale and correlation."""
        lower = self.scale[..., None] * self.scale_tril
        affine = dist.transforms.LowerCholeskyAffine(self.loc, scale_tril=lower)
        return ComposeTransform([SinhArcsinh(self.skew, _TAIL), affine])
