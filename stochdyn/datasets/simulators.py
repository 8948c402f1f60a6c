"""Simulators whose posteriors are known exactly, for simulation-based inference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stochdyn._checks import as_generator, as_tensor, check_event_size, check_positive_int
from stochdyn.errors import UnavailableError

__all__ = ["TwoMoons"]


class TwoMoons:
    r"""A simulator whose posterior has the shape of two crescents.

    .. math::
        x=\begin{pmatrix}r\cos a+\tfrac14\\ r\sin a\end{pmatrix}+\frac1{\sqrt2}\begin{pmatrix}-|\theta_1+\theta_2|\\-\theta_1+\theta_2\end{pmatrix},
        \qquad a\sim U(-\tfrac\pi2,\tfrac\pi2),\quad r\sim N(0.1,0.01^2),\quad\theta\sim U[-1,1]^2

    Given x and the noise, the parameters are one of two points, so exact posterior draws are as easy as simulations.

    Example:
        >>> task = TwoMoons()
        >>> theta = task.prior(5, generator=0)
        >>> task.simulate(theta, generator=0).shape, task.posterior(torch.zeros(2), 100, generator=0).shape
        (torch.Size([5, 2]), torch.Size([100, 2]))

    Reference:
        Greenberg et al., "Automatic posterior transformation for likelihood-free inference", 2019; Lueckmann et al.,
        "Benchmarking simulation-based inference", 2021, task T.8.
    """

    def prior(self, n: int, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw ``(n, 2)`` parameters from the prior, uniform on [-1, 1] in both components."""
        check_positive_int(n, "n")
        return 2 * torch.rand(n, 2, generator=as_generator(generator)) - 1

    def simulate(self, theta: Tensor, generator: torch.Generator | int | None = None) -> Tensor:
        """Return data ``(n, 2)`` for parameters ``(n, 2)``."""
        theta = as_tensor(theta, "theta", 2, "(n, 2)")
        check_event_size(theta, 2, "theta")
        noise = _crescent(len(theta), as_generator(generator)).to(theta)
        first, second = theta.unbind(-1)
        return noise + torch.stack([-(first + second).abs(), second - first], -1) / 2**0.5

    def posterior(self, x: Tensor, n: int, generator: torch.Generator | int | None = None) -> Tensor:
        """Draw ``(n, 2)`` parameters from the exact posterior given one observation ``(2,)``.

        The noise is drawn from its law and one of the two parameters that it leaves is taken by a fair coin; what lies outside
        the prior is drawn again. Both maps from noise to parameters have the same constant Jacobian, so this is exact.

        Args:
            x: The observation.
            n: The number of draws.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Raises:
            UnavailableError: If the observation can hardly come from the simulator, so that no draws are found.
        """
        check_positive_int(n, "n")
        seen = as_tensor(x, "x", 1, "(2,)").float()
        check_event_size(seen, 2, "x")
        source = as_generator(generator)
        found, have = [], 0
        for _ in range(1000):
            moved = seen - _crescent(n, source)
            # x - noise = (-|s|, d) / sqrt 2 with s and d the sum and the difference of the parameters
            sign = torch.where(torch.rand(n, generator=source) < 0.5, -1.0, 1.0)
            total, difference = sign * moved[:, 0] * 2**0.5, moved[:, 1] * 2**0.5
            theta = 0.5 * torch.stack([total - difference, total + difference], -1)
            theta = theta[(moved[:, 0] <= 0) & (theta.abs() <= 1).all(-1)]
            found.append(theta)
            have += len(theta)
            if have >= n:
                return torch.cat(found)[:n]
        raise UnavailableError(
            "no posterior draws were found", got=seen.tolist(), hint="observe task.simulate(...)"
        )


def _crescent(n: int, generator: torch.Generator | None) -> Tensor:
    angle = math.pi * (torch.rand(n, generator=generator) - 0.5)
    radius = 0.1 + 0.01 * torch.randn(n, generator=generator)
    return torch.stack([radius * angle.cos() + 0.25, radius * angle.sin()], -1)
