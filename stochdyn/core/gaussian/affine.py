"""Linear-Gaussian steps of an equation with an affine drift: path and memory as one linear recursion."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn.core.sde.coefficients import Coefficient
from stochdyn.core.sde.noise import NoiseSteps
from stochdyn.core.sde.solvers import full_state, remember

__all__ = ["LinearSteps", "affine_steps", "by_channel", "by_column"]


@dataclass(frozen=True)
class LinearSteps:
    r"""The recursion :math:`z_{n+1}=A_nz_n+c_n+B_n\epsilon_n`, :math:`\epsilon_n\sim N(0,I)`.

    ``z`` is the path and the memory states of its noise, ``epsilon`` the increments in units of their standard
    deviation.

    Attributes:
        transition: The matrices of the steps, ``A (N, *B, Z, Z)``.
        load: ``B (N, *B, Z, M)``.
        offset: The constant parts of the steps, ``c (N, *B, Z)``.
    """

    transition: Tensor
    load: Tensor
    offset: Tensor


def affine_steps(
    steps: NoiseSteps, coefficient: Coefficient, dt: Tensor, matrix: Tensor, offset: Tensor
) -> LinearSteps:
    """Return the Euler steps of ``dX = (A X + a) dt + G dZ`` with the memory of Z.

    Args:
        steps: The noise on the grid.
        coefficient: The constant G.
        dt: The sizes ``(N,)`` of the steps.
        matrix: The matrices ``A (N or 1, *B, d, d)``.
        offset: The constant parts of the steps, ``a (N or 1, *B, d)``.
    """
    dim = matrix.shape[-1]
    channels = coefficient.noise_dim(dim)
    states, innovations = steps.load.shape[-1], steps.load.shape[-2]
    size, width = channels * states, channels * innovations
    batch = torch.broadcast_shapes(
        steps.parameter_batch,
        matrix.shape[1:-2],
        offset.shape[1:-1],
        coefficient.apply(steps.load.new_zeros(channels)).shape[:-1],
    )
    lead = (1,) * len(batch)
    # z = (x, y) with the memory states y: z_{n+1} = [[I + A dt, G R], [0, D]] z_n + (a dt, 0) + B e_n. The noise is linear in
    # memory and innovations, so its columns are the images of the basis vectors.
    basis = torch.eye(size + width, dtype=steps.load.dtype, device=steps.load.device)
    basis = basis.reshape(1, -1, *lead, size + width).expand(dt.shape[0], *(-1,) * (2 + len(lead)))
    dz, memory = remember(
        steps, slice(None), basis[..., :size].unflatten(-1, (channels, states)), basis[..., size:], channels
    )
    g_dz = coefficient.apply(dz)
    shape = (*torch.broadcast_shapes(g_dz.shape[:-1], (*dz.shape[:2], *batch)),)
    image = full_state(g_dz.expand(*shape, dim), memory.expand(*shape, channels, states)).movedim(1, -1)
    lag = dt.reshape(-1, *lead, 1, 1)
    eye = torch.eye(dim, dtype=lag.dtype, device=lag.device)
    stay = (eye + matrix * lag).expand(*image.shape[:-2], dim, dim)
    left = torch.cat([stay, stay.new_zeros(*stay.shape[:-2], size, dim)], -2)
    scale = by_column(steps.variance.sqrt()[:, None, :].expand(-1, channels, -1))
    shift = (offset * lag[..., 0]).expand(*image.shape[:-2], dim)
    return LinearSteps(
        torch.cat([left, image[..., :size]], -1),
        image[..., size:] * scale.reshape(-1, *lead, 1, width),
        torch.nn.functional.pad(shift, (0, size)),
    )


def by_column(x: Tensor) -> Tensor:
    """Lay out innovations ``(..., m, R)`` as increments ``(..., m R)``: Brownian ones first."""
    return torch.cat([x[..., 0], x[..., 1:].flatten(-2)], -1)


def by_channel(x: Tensor, channels: int) -> Tensor:
    """Lay out increments ``(..., m R)`` as innovations ``(..., m, R)``: the inverse of :func:`by_column`."""
    first, rest = x[..., :channels, None], x[..., channels:]
    return first if rest.shape[-1] == 0 else torch.cat([first, rest.unflatten(-1, (channels, -1))], -1)
