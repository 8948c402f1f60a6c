"""Maximisation of a differentiable log posterior over the hyper-parameters of a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from stochdyn.errors import ConvergenceWarning

__all__ = ["log_prior", "maximise"]


def log_prior(module: nn.Module) -> Tensor:
    """Return the sum of the log densities of all priors registered with gpytorch on a module."""
    total = torch.zeros((), dtype=torch.float64)
    for _, owner, prior, closure, _ in module.named_priors():  # type: ignore[operator]
        total = total + prior.log_prob(closure(owner)).sum().cpu()
    return total


def maximise(
    value: Callable[[], Tensor], parameters: Sequence[nn.Parameter], steps: int = 100, tolerance: float = 1e-7
) -> float:
    """Maximise by L-BFGS in place, and return the value reached.

    A trial step where the value can't be computed, because a factorisation fails or overflows, counts as minus infinity.

    Args:
        value: returns what to maximise; differentiable in the parameters.
        parameters: to change.
        steps: most iterations.
        tolerance: relative change of the value at which to stop.
    """
    sizes = [p.numel() for p in parameters]

    def load(flat: np.ndarray) -> None:
        with torch.no_grad():
            for p, part in zip(parameters, np.split(flat, np.cumsum(sizes)[:-1]), strict=True):
                p.copy_(torch.as_tensor(part).reshape(p.shape))

    def flat_of(tensors: Sequence[Tensor]) -> np.ndarray:
        return np.concatenate([t.detach().cpu().double().numpy().ravel() for t in tensors])

    def cost(flat: np.ndarray) -> tuple[float, np.ndarray]:
        load(flat)
        try:
            loss = -value()
            slopes = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        except torch.linalg.LinAlgError:
            return 1e25, np.zeros_like(flat)
        gradient = flat_of(
            [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, slopes, strict=True)]
        )
        if not np.isfinite(loss.item()) or not np.isfinite(gradient).all():
            return 1e25, np.zeros_like(flat)
        return loss.item(), gradient

    start = flat_of(list(parameters))
    # Steps in log scales: none of more than a factor e^8 either way from where it began.
    bounds = [(v - 8.0, v + 8.0) for v in start]
    found = minimize(
        cost, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps, "ftol": tolerance}
    )
    load(found.x)
    if found.status == 1:
        warnings.warn(
            f"The hyper-parameters were still improving after {steps} steps.",
            ConvergenceWarning,
            stacklevel=4,
        )
    return -float(found.fun)
