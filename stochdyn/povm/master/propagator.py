"""Outcome probabilities at given times as a differentiable function of a Lindbladian's parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stochdyn._checks import check_time_grid
from stochdyn.core.forward.master_terms import SparseMasterEquation
from stochdyn.errors import LindbladianError, SystemSizeError, UnavailableError, UnknownSiteError
from stochdyn.povm.frames.frame import Frame
from stochdyn.povm.frames.site_frames import SiteFrames
from stochdyn.povm.master.propagation import initial_probabilities

if TYPE_CHECKING:
    from stochdyn.povm.lindblad.lindbladian import Lindbladian

__all__ = ["Propagator"]

_MAX_OUTCOMES = 1024
_MAX_EXPONENTIAL = 64
_DEGREE = 18


class Propagator(nn.Module):
    r"""The exact outcome probabilities of a small lattice, given its parameters.

    .. math:: p_\theta(t) = e^{L_\theta t}\,p(0),\qquad L_\theta = L_0+\sum_j\theta_jL_j

    Local matrices are worked out once; a call costs a matrix exponential for every distinct interval (up to 64 outcomes)
    or its action on the probabilities. Derivatives in the parameters are exact.

    Args:
        model: with named parameters, constant in time.
        povm: the frame of all sites, or one a site. Imperfect detectors are frames too: with a confusion matrix
            ``C`` the effects are ``torch.einsum("ab,bij->aij", C.to(torch.complex128), frame.effects)``.
        state: at time 0, as for :func:`~stochdyn.povm.exact.evolve`.
        times: increasing, from zero on.

    Attributes:
        names: of the parameters.
        times: ``(T,)`` float64.

    Raises:
        SystemSizeError: if there are over 1024 outcomes (five qubits).
        TimeGridError: if times don't increase.
        UnavailableError: if the model depends on time.

    Example:
        >>> from stochdyn.povm import Lindbladian, Tetrahedral
        >>> model = Lindbladian(1, [("g", "X", 0)], [(1.0, "sigma-", 0)])
        >>> p = Propagator(model, Tetrahedral(), "up", [0.5, 1.0])
        >>> p(g=torch.linspace(0, 1, 3)).shape
        torch.Size([3, 2, 4])
    """

    generators: Tensor
    start: Tensor
    times: Tensor

    def __init__(
        self,
        model: Lindbladian,
        povm: Frame | SiteFrames,
        state: Any,
        times: Tensor | Sequence[float],
    ) -> None:
        super().__init__()
        if model.is_time_dependent:
            raise UnavailableError(
                "exact propagation with parameters needs coefficients that are constant in time",
                hint="split the time axis where they change, or use stochdyn.povm.exact.propagate",
            )
        grid = torch.as_tensor(times, dtype=torch.float64)
        check_time_grid(grid, "times", min_points=1)
        if float(grid[0]) < 0:
            raise LindbladianError("times start at zero, where the state is given", got=float(grid[0]))
        size = povm.num_outcomes**model.num_sites
        if size > _MAX_OUTCOMES:
            raise SystemSizeError(
                "there are too many outcomes for a dense propagator",
                got=f"{povm.num_outcomes}**{model.num_sites}",
                expected=f"at most {_MAX_OUTCOMES}",
            )
        self.num_sites, self.num_outcomes = model.num_sites, povm.num_outcomes
        self.names = model.parameters
        matrices = torch.zeros(1 + len(self.names), size, size, dtype=torch.float64)
        for coupling, members in model.groups(povm):
            if not members:
                continue
            place = 0 if coupling.parameter is None else 1 + self.names.index(coupling.parameter)
            factor = 1.0 if coupling.value is None else float(coupling.value.detach())
            operator = SparseMasterEquation(model.num_sites, povm.num_outcomes, members)
            matrices[place] += factor * operator.to_sparse().to_dense()
        self.register_buffer("generators", matrices)
        self.register_buffer("start", initial_probabilities(povm, state, model.num_sites))
        self.register_buffer("times", grid)
        spans = torch.diff(grid, prepend=grid.new_zeros(1))
        self._spans = [round(span, 12) for span in spans.tolist()]

    def forward(self, **parameters: Tensor | float) -> Tensor:
        """Return probabilities ``(*batch, T, K**N)``.

        Args:
            parameters: numbers or tensors ``(*batch)``, one for each name.

        Raises:
            UnknownSiteError: if names are missing or unknown.
        """
        self._check_names(parameters)
        values = [
            torch.as_tensor(parameters[name], dtype=self.start.dtype).to(self.start.device)
            for name in self.names
        ]
        generator = self.generators[0]
        for value, matrix in zip(values, self.generators[1:], strict=True):
            generator = generator + value[..., None, None] * matrix
        p = self.start.expand(*generator.shape[:-2], -1)
        small = generator.shape[-1] <= _MAX_EXPONENTIAL
        steps: dict[float, Tensor] = {}
        out = []
        for span in self._spans:
            if span > 0 and small:
                if span not in steps:
                    steps[span] = torch.matrix_exp(generator * span)
                p = (steps[span] @ p[..., None])[..., 0]
            elif span > 0:
                p = _act(generator, p, span)
            out.append(p)
        return torch.stack(out, -2)

    def _check_names(self, parameters: dict[str, Tensor | float]) -> None:
        missing = [name for name in self.names if name not in parameters]
        unknown = [name for name in parameters if name not in self.names]
        if missing or unknown:
            what = f"no value for parameter {missing[0]!r}" if missing else f"no parameter {unknown[0]!r}"
            raise UnknownSiteError(f"{what}; there are {list(self.names)}")


def _act(generator: Tensor, p: Tensor, span: float) -> Tensor:
    """The action of the exponential: Taylor polynomials on parts so short that they are exact to rounding."""
    norm = float(generator.detach().abs().sum(-2).max()) * span
    parts = max(1, int(norm) + 1)
    step = span / parts
    for _ in range(parts):
        term = p
        for k in range(1, _DEGREE + 1):
            term = (generator @ term[..., None])[..., 0] * (step / k)
            p = p + term
    return p
