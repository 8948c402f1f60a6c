"""Anderson acceleration of a fixed-point iteration on parameters."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

__all__ = ["Anderson", "get_vector", "set_vector"]

# Least squares on differences of nearly equal steps: directions below this share of the largest are dropped.
_RANK = 1e-8


def get_vector(module: nn.Module) -> Tensor:
    """Return a copy of all parameters as one vector, in double precision."""
    return parameters_to_vector(module.parameters()).detach().double().clone()


@torch.no_grad()
def set_vector(module: nn.Module, vector: Tensor) -> None:
    """Set all parameters from one vector."""
    like = next(module.parameters())
    vector_to_parameters(vector.to(like), module.parameters())


class Anderson:
    r"""Proposals from the last few pairs of argument and image of a map :math:`M`.

    .. math:: \theta=\sum_jc_jM(\theta_j),\qquad c=\arg\min_{\sum c_j=1}\Big|\sum_jc_j\big(M(\theta_j)-\theta_j\big)\Big|

    Args:
        memory: The number of differences that are kept.

    Example:
        >>> anderson, theta = Anderson(2), torch.tensor([4.0, -2.0], dtype=torch.float64)
        >>> rates = torch.tensor([0.5, 0.9], dtype=torch.float64)
        >>> for _ in range(3):
        ...     theta = anderson.propose(theta, rates * theta)
        >>> bool(theta.abs().max() < 1e-9)
        True

    Reference: Walker & Ni (2011), Anderson acceleration for fixed-point iterations.
    """

    def __init__(self, memory: int) -> None:
        self.memory = memory
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def propose(self, theta: Tensor, image: Tensor) -> Tensor:
        """Return the next argument, given the last one and its image; the image itself while there is only one."""
        self.pairs = [*self.pairs[-self.memory :], (theta, image)]
        if len(self.pairs) == 1:
            return image
        images = torch.stack([own for _, own in self.pairs], -1)
        steps = torch.stack([own - old for old, own in self.pairs], -1)
        changes = steps.diff(dim=-1)
        # parameters of very different size count alike
        scale = theta.abs().maximum(image.abs())[:, None]
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        # the mixture of past steps that is nearest to zero, by least squares on their differences
        inverse = torch.linalg.pinv(changes / scale, rtol=_RANK)
        mix = inverse @ (steps[:, -1:] / scale)
        return image - (images.diff(dim=-1) @ mix).squeeze(-1)

    def forget(self) -> None:
        """Drop all but the last pair, after a proposal that was no good."""
        self.pairs = self.pairs[-1:]
