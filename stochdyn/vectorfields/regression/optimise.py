"""Maximisation of a differentiable log posterior over the hyper-parameters of a model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from stochdyn._checks import check_not_frozen
from stochdyn._transforms import as_leaf, recording
from stochdyn.errors import ConvergenceWarning

__all__ = ["log_prior", "maximise"]

#: How far a logarithm may move from its start.
_REACH = 8.0


def log_prior(module: nn.Module) -> Tensor:
    """Return the sum of the log densities of all priors registered with gpytorch on a module."""
    total = torch.zeros((), dtype=torch.float64)
    for _, owner, prior, closure, _ in module.named_priors():  # type: ignore[operator]
        total = total + prior.log_prob(closure(owner)).sum().cpu()
    return total


def maximise(
    value: Callable[[], Tensor],
    modules: Sequence[nn.Module],
    parameters: dict[str, nn.Parameter],
    steps: int = 100,
    tolerance: float = 1e-7,
) -> float:
    """Maximise by L-BFGS in place, and return the value reached.

    Parameters that gpytorch constrains to be positive are searched in the logarithm of their value, not in the raw
    coordinate that gpytorch stores, which is a logarithm for small values and linear for large ones: so the search is
    the same in every unit. A trial step where the value can't be computed, because a factorisation fails or overflows,
    counts as minus infinity.

    Args:
        value: A function that returns what to maximise, differentiable in the parameters.
        modules: The gpytorch modules whose trainable parameters are searched.
        parameters: Further parameters by name, which are logarithms already.
        steps: The largest number of iterations.
        tolerance: The relative change of the value at which to stop.

    Warns:
        ConvergenceWarning: If the steps run out, or a parameter ends at the bound of the search.
    """
    coordinates = [_Coordinate(name, p, None) for name, p in parameters.items()]
    for module in modules:
        for name, parameter, constraint in module.named_parameters_and_constraints():  # type: ignore[operator]
            if parameter.requires_grad:
                coordinates.append(
                    _Coordinate(name.rpartition(".")[2].removeprefix("raw_"), parameter, constraint)
                )
    check_not_frozen(c.parameter for c in coordinates)
    sizes = [c.parameter.numel() for c in coordinates]

    def cost(flat: np.ndarray) -> tuple[float, np.ndarray]:
        parts = np.split(flat, np.cumsum(sizes)[:-1])
        slopes_within = [c.load(part) for c, part in zip(coordinates, parts, strict=True)]
        try:
            with recording():
                loss = -value()
                slopes = torch.autograd.grad(loss, [c.parameter for c in coordinates], allow_unused=True)
        except torch.linalg.LinAlgError:
            return 1e25, np.zeros_like(flat)
        gradient = np.concatenate(
            [
                np.zeros(size) if g is None else g.detach().cpu().double().numpy().ravel() * inner
                for g, inner, size in zip(slopes, slopes_within, sizes, strict=True)
            ]
        )
        if not np.isfinite(loss.item()) or not np.isfinite(gradient).all():
            return 1e25, np.zeros_like(flat)
        return loss.item(), gradient

    start = np.concatenate([c.start() for c in coordinates])
    # In logarithms: no parameter moves by more than a factor e^8 either way from where it began.
    bounds = [(v - _REACH, v + _REACH) for v in start]
    found = minimize(
        cost, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": steps, "ftol": tolerance}
    )
    for c, part in zip(coordinates, np.split(found.x, np.cumsum(sizes)[:-1]), strict=True):
        c.load(part)
    variances = {*parameters, "outputscale"}
    names = np.repeat([c.name for c in coordinates], sizes)
    # A variance at its bound is an answer (no noise, or a part of a sum that isn't there); a length isn't.
    stuck = [str(name) for name in names[np.abs(found.x - start) > _REACH - 1e-6] if name not in variances]
    if stuck:
        warnings.warn(
            f"The search ended at its bound for {', '.join(sorted(set(stuck)))}: the data don't determine it, or the "
            "start was far off. Give the kernel another start or a prior.",
            ConvergenceWarning,
            stacklevel=4,
        )
    if found.status == 1:
        warnings.warn(
            f"The hyper-parameters were still improving after {steps} steps.",
            ConvergenceWarning,
            stacklevel=4,
        )
    return -float(found.fun)


class _Coordinate:
    """One parameter as the search sees it: the logarithm of its value where it is constrained to be positive."""

    def __init__(self, name: str, parameter: nn.Parameter, constraint: Any) -> None:
        self.name, self.parameter, self.constraint = name, parameter, constraint
        self.positive = constraint is not None and float(constraint.lower_bound) == 0.0

    def start(self) -> np.ndarray:
        """Return where the search begins."""
        value = self.parameter.detach()
        if self.positive:
            value = self.constraint.transform(value).log()
        return value.cpu().double().numpy().ravel()

    def load(self, part: np.ndarray) -> np.ndarray:
        """Set the parameter, and return the slope of its raw value in the coordinate of the search."""
        z = torch.as_tensor(part).reshape(self.parameter.shape)
        if not self.positive:
            with torch.no_grad():
                self.parameter.copy_(z)
            return np.ones(part.shape)
        with recording():
            z = as_leaf(z)
            raw = self.constraint.inverse_transform(z.exp())
            slope = torch.autograd.grad(raw.sum(), z)[0]
        with torch.no_grad():
            self.parameter.copy_(raw)
        return slope.numpy().ravel()
