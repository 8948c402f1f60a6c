"""Diffusion in extra dimensions: heavy-tailed noise in place of Gaussian noise, trained and sampled."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    check_callable,
    check_choice,
    check_nonempty,
    check_positive_int,
    check_real,
    check_type,
)
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.interpolants.fields.networks import evaluating
from stochdyn.interpolants.paths.student import StudentKernel
from stochdyn.objectives.base import Objective, ObjectiveValue

__all__ = ["AugmentedDiffusion", "AugmentedGenerator"]

Field = Callable[[Tensor, Tensor], Tensor]


class _Preconditioned(nn.Module):
    r"""The mean of the data given a noised point, from a network of unit inputs and outputs, in the units of the data.

    .. math:: D(x,\sigma)=\mu+\frac{y+\sigma\,F(\tfrac14\log\sigma,\,y/\sqrt{1+\sigma^2})\sqrt{1+\sigma^2}}{1+\sigma^2},\qquad y=x-\mu

    written for data of unit scale.
    """

    center: Tensor
    scale: Tensor
    ready: Tensor

    def __init__(self, network: Field, dim: int) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self._known = False

    def observe(self, x: Tensor) -> None:
        """Take the units from the first batch."""
        if not self._known and not bool(self.ready):
            spread = x.var(0).mean().sqrt() if len(x) > 1 else torch.ones(())
            self.center.copy_(x.mean(0))
            self.scale.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))
            self.ready.fill_(True)
        self._known = True

    def forward(self, sigma: Tensor, x: Tensor) -> Tensor:
        """Return ``(n, d)`` for levels ``(n, 1)`` in units of the data's own scale."""
        y, root = (x - self.center) / self.scale, (1 + sigma.square()).sqrt()
        inner = self.network(0.25 * sigma.log(), y / root)
        return self.center + self.scale * (y / root + sigma * inner) / root


class AugmentedDiffusion(Objective):
    r"""Learn to denoise under heavy-tailed noise, the electric field of the data in ``D`` extra dimensions.

    .. math:: \ell=E\Big[\tfrac{1+\sigma^2}{\sigma^2}\,|D_\theta(x,\sigma)-x_1|^2\Big],\qquad x\sim p_\sigma(\cdot\mid x_1),

    with the Student-t kernel :class:`StudentKernel` and sigma in units of the data's own scale, so the loss has none. Use it where data have
    outliers, or where few steps of a Gaussian diffusion are brittle; ``degrees=math.inf`` is Gaussian diffusion with the
    preconditioning of Karras et al.

    Args:
        network: The network ``net(t, x) -> (n, d)``, with ``t (n, 1)`` a quarter of the logarithm of the level, and states of unit size.
        dim: The number of components of a point.
        degrees: The number D of extra dimensions; fewer are more robust, and the Gaussian is the limit of many.
        sigma_min: The smallest level, in units of the data's own scale.
        sigma_max: The largest noise level, in units of the data.

    Batches are ``x1 (n, d)``.

    Raises:
        InvalidInputError: If a network can't be called, or levels are out of order.

    Example:
        >>> from stochdyn.interpolants import FieldNetwork
        >>> objective = AugmentedDiffusion(FieldNetwork(2), 2, degrees=16.0)
        >>> objective(torch.randn(8, 2)).bound
        'surrogate'

    Reference:
        Xu et al., "PFGM++: unlocking the potential of physics-inspired generative models", 2023; Karras et al., "Elucidating the
        design space of diffusion-based generative models", 2022.
    """

    def __init__(
        self,
        network: Field,
        dim: int,
        degrees: float = 128.0,
        sigma_min: float = 4e-3,
        sigma_max: float = 160.0,
    ) -> None:
        super().__init__()
        check_callable(network, "network", "a network, net(t, x)")
        check_positive_int(dim, "dim")
        check_real(sigma_min, "sigma_min", above=0.0)
        check_real(sigma_max, "sigma_max", above=sigma_min)
        self.kernel = StudentKernel(degrees)
        self.prediction = _Preconditioned(network, dim)
        self.dim, self.sigma_min, self.sigma_max = dim, float(sigma_min), float(sigma_max)

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate on data ``(n, d)``.

        Raises:
            ShapeError, EmptyDataError: If they don't fit.
        """
        if isinstance(batch, tuple | list) and len(batch) == 1:
            batch = batch[0]
        x1 = as_tensor(batch, "x1", 2, "(n, d)", finite=False)
        check_nonempty(x1, "x1")
        if x1.shape[-1] != self.dim:
            raise ShapeError("x1 has another dimension", got=tuple(x1.shape), expected=f"(n, {self.dim})")
        self.prediction.observe(x1.detach())
        # levels are log-normal about three fifths of the data's scale, where there is most to learn
        sigma = (1.2 * torch.randn(len(x1), 1, dtype=x1.dtype, device=x1.device) - 0.5).exp()
        sigma = sigma.clamp(self.sigma_min, self.sigma_max)
        scale = self.prediction.scale
        x = self.kernel.perturb(x1, sigma * scale)
        error = (self.prediction(sigma, x) - x1) / scale
        loss = ((1 + sigma.square()) / sigma.square() * error.square()).sum(-1).mean()
        return ObjectiveValue(loss, {"data_prediction": loss.detach()}, "surrogate")

    def generator(self) -> AugmentedGenerator:
        """Return the model that samples; it shares the network."""
        return AugmentedGenerator(self.prediction, self.kernel, self.dim, self.sigma_min, self.sigma_max)


class AugmentedGenerator(nn.Module):
    r"""Samples along the field lines, from far away to the data.

    .. math:: \frac{dx}{d\sigma}=\frac{x-D(x,\sigma)}{\sigma}

    Args:
        data_prediction: The trained data prediction, ``f(sigma, x)`` with levels ``(n, 1)``.
        kernel: The kernel of the noise.
        dim: The number of components of a point.
        sigma_min: The level at which sampling ends with a step to the mean of the data.
        sigma_max: The level from which it starts.
    """

    def __init__(
        self, data_prediction: Field, kernel: StudentKernel, dim: int, sigma_min: float, sigma_max: float
    ) -> None:
        super().__init__()
        check_callable(data_prediction, "data_prediction", "a function of level and points")
        check_type(kernel, StudentKernel, "kernel")
        check_positive_int(dim, "dim")
        check_real(sigma_min, "sigma_min", above=0.0)
        check_real(sigma_max, "sigma_max", above=sigma_min)
        self.data_prediction, self.kernel, self.dim = data_prediction, kernel, dim
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)

    def sample(
        self,
        sample_shape: SampleShape = (),
        num_steps: int = 32,
        method: str = "heun",
        *,
        generator: Generator = None,
    ) -> Tensor:
        """Draw points.

        Args:
            sample_shape: The shape of independent draws, an integer or a tuple.
            num_steps: The number of steps, shorter towards the data.
            method: How to take a step: ``"heun"``, of order 2, or ``"euler"``, of order 1.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Returns:
            ``(*sample_shape, d)``.

        Raises:
            InvalidInputError: If an option doesn't exist.
        """
        shape = as_sample_shape(sample_shape)
        check_positive_int(num_steps, "num_steps")
        check_choice(method, ("heun", "euler"), "method")
        own = self.data_prediction if isinstance(self.data_prediction, _Preconditioned) else None
        center = torch.zeros(self.dim) if own is None else own.center
        scale = 1.0 if own is None else own.scale
        if own is not None and not bool(own.ready):
            raise InvalidInputError("the model has seen no data yet", hint="fit it first")
        source = as_generator(generator, center.device)
        count = torch.Size(shape).numel()
        # rho = 7: steps shrink towards the data
        u = torch.linspace(0, 1, num_steps + 1, dtype=torch.float64)
        first, last = self.sigma_max ** (1 / 7), self.sigma_min ** (1 / 7)
        levels = ((first + u * (last - first)) ** 7).tolist()
        with torch.no_grad(), evaluating(self):
            x = self.kernel.perturb(center.expand(count, self.dim), self.sigma_max * scale, source)

            def slope(sigma: float, y: Tensor) -> Tensor:
                level = torch.full((len(y), 1), sigma, dtype=y.dtype, device=y.device)
                return (y - self.data_prediction(level, y)) / sigma

            for sigma, after in itertools.pairwise(levels):
                h, k = after - sigma, slope(sigma, x)
                ahead = x + h * k
                x = ahead if method == "euler" else x + 0.5 * h * (k + slope(after, ahead))
            x = x - levels[-1] * slope(levels[-1], x)
        return x.reshape(*shape, self.dim)
