r"""Posterior draws: a trained model as the prior, and linear observations of its points.

The law of the data given the point on the path is taken to be Gaussian with the mean and covariance that the model itself implies,

.. math:: E[x_1\mid x_t]=\hat x_1(t,x_t),\qquad \mathrm{Cov}[x_1\mid x_t]=\frac{\sigma_t^2}{\beta_t}\nabla\hat x_1(t,x_t),
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stochdyn._checks import as_tensor, check_event_size, check_positive
from stochdyn._transforms import as_leaf, recording
from stochdyn.errors import EmptyDataError, ShapeError, UnavailableError

if TYPE_CHECKING:
    from stochdyn.interpolants.sampling.generator import InterpolantGenerator

__all__ = ["LinearGuide"]


class LinearGuide:
    r"""What observations :math:`y=Ax_1+s\,\xi` add to the fields of a model.

    .. math::
        \nabla\log p(y\mid x_t)=(AJ)^\top\Big(s^2+\frac{\sigma_t^2}{\beta_t}AJA^\top\Big)^{-1}(y-A\hat x_1),\qquad J=\nabla\hat x_1,

    exact where the data are Gaussian. To the score it is added as it is, to the velocity times
    :math:`\sigma^2\dot\beta/\beta-\tfrac12(\sigma^2)\dot{}`, with :math:`\sigma^2=\alpha^2+\gamma^2`.

    Args:
        model: The generator, which starts in the standard normal.
        y: The observed values, ``(m,)``; NaN is missing.
        operator: The matrix A, ``(m, d)``; None for the identity.
        obs_scale: The standard deviation of the observations, a number or ``(m,)``.

    Raises:
        UnavailableError: If the model doesn't start in the standard normal, or gives no data prediction.
        ShapeError: If the sizes don't fit.
    """

    def __init__(
        self, model: InterpolantGenerator, y: Any, operator: Any, obs_scale: Any, like: Tensor
    ) -> None:
        if not model.starts.is_normal:
            raise UnavailableError(
                "posterior draws need a model that starts in the standard normal",
                hint="train on the ends alone, or on a one-sided path",
            )
        dim = like.shape[-1]
        y = as_tensor(y, "y", missing=True, like=like).to(like).reshape(-1)
        matrix = (
            torch.eye(dim).to(like)
            if operator is None
            else as_tensor(operator, "operator", 2, "(m, d)", like=like).to(like)
        )
        check_event_size(matrix, dim, "operator")
        if len(matrix) != len(y):
            raise ShapeError(
                "there must be one row of the operator per observation", got=len(matrix), expected=len(y)
            )
        scale = as_tensor(obs_scale, "obs_scale", (0, 1), "a number or (m,)", like=like).to(like)
        if scale.ndim and scale.shape != y.shape:
            raise ShapeError(
                "obs_scale must be a number or one per observation",
                got=tuple(scale.shape),
                expected=tuple(y.shape),
            )
        check_positive(scale, "obs_scale")
        seen = ~y.isnan()
        if not bool(seen.any()):
            raise EmptyDataError("y has no observed value", got=f"{len(y)} missing")
        self.y, self.matrix, self.scale = y[seen], matrix[seen], scale.expand(y.shape)[seen]
        self.model = model

    def slope(self, t: Tensor, x: Tensor, condition: Any, guidance: float) -> Tensor:
        """Return the gradient of the log likelihood ``(n, d)`` of the observations at points on the path."""
        it = self.model.interpolant
        with recording():
            at = as_leaf(x)
            mean = self.model.fields("data_prediction", t, at, condition, guidance)
            seen = mean @ self.matrix.mT
            rows = [
                torch.autograd.grad(seen[:, k].sum(), at, retain_graph=True)[0] for k in range(len(self.y))
            ]
        # (A J)(s^2 + sigma_t^2 / beta_t A J A^T)^{-1}(y - A x1_hat), with J the Jacobian of the data prediction
        jacobian = torch.stack(rows, 1)
        ratio = (it.alpha.square(t) + it.gamma.square(t)) / it.beta.value(t)
        spread = ratio * (jacobian @ self.matrix.mT)
        spread = 0.5 * (spread + spread.mT) + torch.diag(self.scale.square())
        weighed = torch.linalg.solve(spread, (self.y - seen.detach()).unsqueeze(-1))
        return (jacobian.mT @ weighed).squeeze(-1)

    def rate(self, t: Tensor) -> Tensor:
        """Return the factor of the gradient in the velocity."""
        it = self.model.interpolant
        # the factor of the score in b = (beta' / beta) x + (sigma^2 beta' / beta - sigma sigma') s, see ``LinearGuide``
        square = it.alpha.square(t) + it.gamma.square(t)
        falling = 0.5 * (it.alpha.square_derivative(t) + it.gamma.square_derivative(t))
        return square * it.beta.derivative(t) / it.beta.value(t) - falling
