"""Value, gradient and curvature of a scalar tanh network in one sweep, cheaper than nested reverse passes."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stochdyn._checks import check_event_size, check_ndim, check_points, check_same_dtype, check_type
from stochdyn.core.networks import MLP
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["Jet", "network_jet"]


class Jet(NamedTuple):
    """What :func:`network_jet` returns.

    Attributes:
        value: The output ``(n,)``.
        slope: The gradient ``(n, in)`` in the input.
        curvature: The sum ``(n,)`` of second derivatives along the directions, or ``(k, n)`` each; None without any.
    """

    value: Tensor
    slope: Tensor
    curvature: Tensor | None


def network_jet(network: MLP, u: Tensor, directions: Tensor | None = None, each: bool = False) -> Jet:
    r"""Value, gradient and second derivatives along given directions of a network with one output.

    .. math:: f(u),\qquad \nabla f(u),\qquad \sum_k e_k^\top\,\nabla^2 f(u)\,e_k

    Values, first and second derivatives along the directions go forward through the layers together (Taylor
    mode), and one more sweep backward that reuses their slopes gives the gradient. In all this costs ``k + 3``
    evaluations of the network, against ``2 k + 2`` or so and a graph twice as deep by nested reverse passes. With the
    unit vectors as directions the sum is the Laplacian; with random ones of unit covariance it is
    Hutchinson's estimate.

    Args:
        network: A network whose output has one component.
        u: The inputs ``(n, in)``.
        directions: The vectors along which a derivative is taken, ``(k, n, in)``, or ``(k, 1, in)`` if shared; None for
            no second derivatives.
        each: Whether to return the second derivative along every direction in place of their sum.

    Returns:
        A :class:`Jet`, differentiable any number of times in inputs, directions and parameters.

    Raises:
        ShapeError: If the network has more than one output, or shapes don't fit.

    Example:
        >>> net = MLP((2, 8, 1)).double()
        >>> u, unit = torch.ones(3, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
        >>> network_jet(net, u, unit[:, None]).curvature.shape
        torch.Size([3])

    Reference:
        Griewank and Walther, "Evaluating derivatives", 2008, chapter 13; Li et al., "A computational framework
        for neural network-based variational Monte Carlo with forward Laplacian", 2024.
    """
    check_type(network, MLP, "network")
    if network.activation != "tanh":
        raise InvalidInputError("a jet is of a tanh network", got=f"activation {network.activation!r}")
    weights: list[tuple[Tensor, Tensor]] = [(m.weight, m.bias) for m in network.layers]  # type: ignore[misc]
    check_points(u, "u", "(n, in)")
    if not u.is_floating_point() or (isinstance(directions, Tensor) and not directions.is_floating_point()):
        raise InvalidInputError("u and directions must be floating", got=u.dtype)
    check_ndim(u, 2, "u", "(n, in)")
    if directions is not None:
        check_type(directions, Tensor, "directions")
    check_same_dtype(u=u, network=weights[0][0], directions=directions)
    check_event_size(u, weights[0][0].shape[1], "u")
    if weights[-1][0].shape[0] != 1:
        raise ShapeError("a jet is of a network with one output", got=f"{weights[-1][0].shape[0]} outputs")
    if directions is not None:
        check_points(directions, "directions")
        check_ndim(directions, 3, "directions", "(k, n, in)")
        check_event_size(directions, u.shape[1], "directions")
    h, dh, s = u, directions, None
    slopes: list[Tensor] = []
    for weight, bias in weights[:-1]:
        z = F.linear(h, weight, bias)
        if dh is None:
            h, p = _Activation.apply(z)
        else:
            dz = F.linear(dh, weight).expand(-1, z.shape[0], -1)
            s = None if s is None else F.linear(s, weight)
            h, p, dh, s = _CurvedActivation.apply(z, dz, s, each)
        slopes.append(p)
    last = weights[-1][0][0]
    value = h @ last + weights[-1][1][0]
    back = last * slopes[-1]
    for i in range(len(slopes) - 1, 0, -1):
        back = (back @ weights[i][0]) * slopes[i - 1]
    return Jet(value, back @ weights[0][0], None if s is None else s @ last)


def _tanh_(z: Tensor) -> Tensor:
    """Turn a buffer into its tanh in place: several times faster than torch.tanh on the CPU."""
    return z.mul_(2.0).sigmoid_().mul_(2.0).sub_(1.0)


class _Activation(torch.autograd.Function):
    """``z -> tanh z`` and its derivative."""

    @staticmethod
    def forward(ctx: Any, z: Tensor) -> tuple[Tensor, Tensor]:
        h = _tanh_(z.clone())
        p = torch.addcmul(torch.ones((), dtype=z.dtype, device=z.device), h, h, value=-1)
        ctx.save_for_backward(h, p)
        return h, p

    @staticmethod
    def backward(ctx: Any, gh: Tensor, gp: Tensor) -> Tensor:
        h, p = ctx.saved_tensors  # outputs, so that the derivative has derivatives of its own
        return torch.addcmul(gh, gp, h, value=-2).mul_(p)


class _CurvedActivation(torch.autograd.Function):
    r"""tanh and its derivative, and what it makes of first and second derivatives along directions.

    :math:`\dot h_k = p\,\dot z_k` and :math:`s' = p\,s + q\sum_k\dot z_k^2`, with :math:`p = 1-h^2` and
    :math:`q = -2hp` the first two derivatives of tanh; the third is :math:`p(6h^2-2)`.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Tensor, dz: Tensor, s: Tensor | None, each: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        h = _tanh_(z.clone())
        p = torch.addcmul(torch.ones((), dtype=z.dtype, device=z.device), h, h, value=-1)
        q = (h * p).mul_(-2.0)
        squares = dz.square()
        squares = squares if each else squares.sum(0)
        curved = q * squares
        if s is not None:
            curved.addcmul_(p, s)
        ctx.each = each
        ctx.save_for_backward(h, p, q, dz, squares, s)
        return h, p, p * dz, curved

    @staticmethod
    def backward(
        ctx: Any, gh: Tensor, gp: Tensor, gd: Tensor, gs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None, None]:
        h, p, q, dz, squares, s = ctx.saved_tensors
        # derivatives of the derivative may be wanted: what was computed on the way is redone on tape
        if torch.is_grad_enabled():
            q = -2.0 * h * p
            squares = dz.square() if ctx.each else dz.square().sum(0)
        third = (h.square().mul_(6.0).sub_(2.0)).mul_(p)
        bent = gs * q
        through = third * squares
        if s is not None:
            through.addcmul_(q, s)
        through.mul_(gs)
        gz = torch.addcmul(gh * p, gp, q).add_(through.sum(0) if ctx.each else through)
        gz.addcmul_((gd * dz).sum(0), q)
        gdz = torch.addcmul(gd * p, bent, dz, value=2.0)
        return gz, gdz, None if s is None else gs * p, None
