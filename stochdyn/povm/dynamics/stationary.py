"""The stationary residual as an objective of the common training loop, and the relaxation rate that scales it."""

from __future__ import annotations

import torch
from torch import Tensor

from stochdyn.core.forward.master_terms import SparseMasterEquation
from stochdyn.errors import SystemSizeError
from stochdyn.objectives.base import Objective, ObjectiveValue
from stochdyn.povm.dynamics.averages import Averages
from stochdyn.povm.dynamics.residuals import ResidualProblem

__all__ = ["StationaryResidual", "spectral_gap"]

_MAX_SPECTRUM = 1 << 16


class StationaryResidual(Objective):
    r"""How far a state is from standing still, :math:`\|LP\|_1=E|\ell|` or :math:`E\ell^2`.

    For :func:`stochdyn.fit`; its gradient is that of :class:`~stochdyn.povm.dynamics.residuals.ResidualProblem`, part by part
    in bounded memory.

    Args:
        averages: The state, the master equation, constant in time, and what means are taken over.
        norm: The norm of the residual, ``"l1"`` or ``"l2"``.
        unit: A time by which rates are multiplied, so that the optimiser's constants have no dimension.

    Example:
        >>> from stochdyn.povm import AutoregressiveTransformer, Lindbladian, Tetrahedral
        >>> povm, model = Tetrahedral(), Lindbladian(2, [], [(1.0, "sigma-", "all")])
        >>> operator = model.master_operator(povm)
        >>> net = AutoregressiveTransformer(2, layers=1, width=8, heads=2).double().set_product_state(povm, "down")
        >>> StationaryResidual(Averages(net, operator, None))().loss.item() < 1e-12
        True
    """

    def __init__(self, averages: Averages, norm: str = "l1", unit: float = 1.0) -> None:
        super().__init__()
        self.net = averages.net
        # kept out of the module's own state: a checkpoint needs the ansatz alone
        self._problem = [ResidualProblem(averages, norm, tau=unit)]

    def forward(self, batch: None = None) -> ObjectiveValue:
        """Return the norm; random numbers come from torch's global generator."""
        value = self._problem[0].evaluate()
        loss = torch.tensor(value.loss, dtype=self.net.dtype, device=self.net.device)
        terms = {"residual": loss.clone()}
        if torch.is_grad_enabled():
            parameters = [p for _, p in self.net.trainable()]
            kept = [p.grad for p in parameters]
            for p in parameters:
                p.grad = None
            self._problem[0].backward(value)
            slopes = [p.grad for p in parameters]
            for p, grad in zip(parameters, kept, strict=True):
                p.grad = grad
            # a function with this value and this gradient
            for p, slope in zip(parameters, slopes, strict=True):
                if slope is not None:
                    loss = loss + ((p - p.detach()) * slope).sum()
        return ObjectiveValue(loss, terms, "residual")


def spectral_gap(operator: SparseMasterEquation) -> float:
    r"""Return how fast the slowest mode of a small system relaxes, minus the largest real part but zero of the spectrum.

    Args:
        operator: The master equation, constant in time.

    Raises:
        SystemSizeError: If there are over 65536 outcomes.

    Example:
        >>> from stochdyn.povm import Lindbladian, Tetrahedral
        >>> operator = Lindbladian(2, [], [(1.0, "sigma-", "all")]).master_operator(Tetrahedral())
        >>> round(spectral_gap(operator), 6)
        0.5
    """
    from scipy.sparse.linalg import LinearOperator, eigs

    size = operator.num_states
    if size > _MAX_SPECTRUM:
        raise SystemSizeError(
            "there are too many outcomes to find the gap",
            got=size,
            expected=f"at most {_MAX_SPECTRUM}",
            hint="pass gap=..., or leave it to the relaxation seen on the way",
        )
    reference = operator.matrix(0)
    # the eigenvalue 0 is the steady state; the next one by real part is the slowest mode
    if size <= 256:
        matrix = operator.apply(torch.eye(size, dtype=reference.dtype, device=reference.device)).mT
        values = torch.linalg.eigvals(matrix).real.sort(descending=True)[0]
        return float(-values[1])

    def multiply(x: Tensor) -> Tensor:
        p = torch.as_tensor(x.reshape(-1), dtype=reference.dtype, device=reference.device)
        return operator.apply(p).cpu().numpy()

    linear = LinearOperator((size, size), matvec=multiply, dtype="float64")
    start = torch.linspace(1, 2, size, dtype=torch.float64).numpy()
    found = eigs(linear, k=4, which="LR", v0=start, ncv=60, tol=1e-6, return_eigenvectors=False)
    return float(-sorted(found.real)[-2])
