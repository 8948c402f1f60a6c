"""What a refinement records of every iteration, and its picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

__all__ = ["History", "Iteration"]


@dataclass(frozen=True)
class Iteration:
    r"""One iteration: the bridge for the present reference, then the reference for this bridge.

    Attributes:
        objective: The divergence :math:`F(q^k,\theta^{k-1})` of the bridge from the reference that it was built on, less what
            the snapshots alone determine (:attr:`SchrodingerBridge.objective`).
        projected: The divergence :math:`F(q^k,\theta^k)` of the same bridge from the reference that was chosen next.
        marginal_error: The largest L1 error of a coupling's marginals.
        parameters: The parameters :math:`\theta^k` by name.
        diffusion: The overall strength of the noise, the root of the mean diagonal of its covariance rate.
        seconds: The processor time of the iteration.
    """

    objective: float
    projected: float
    marginal_error: float
    parameters: dict[str, Tensor]
    diffusion: float
    seconds: float


@dataclass
class History:
    """The iterations of a refinement, in order.

    Attributes:
        iterations: The records of the iterations, in order.
        final_objective: The divergence of the last bridge from the last reference.
        stopped: The reason why the loop ended; empty while it runs.
    """

    iterations: list[Iteration] = field(default_factory=list)
    final_objective: float = float("nan")
    stopped: str = ""

    @classmethod
    def of_records(cls, records: Sequence[Mapping[str, Any]], stopped: str = "") -> History:
        """Return the history that :meth:`records` was taken of."""
        return cls([Iteration(**own) for own in records], stopped=stopped)

    def records(self) -> list[dict[str, Any]]:
        """Return the iterations as plain dicts, for a checkpoint."""
        return [{f.name: getattr(own, f.name) for f in fields(own)} for own in self]

    def __len__(self) -> int:
        return len(self.iterations)

    def __getitem__(self, index: int) -> Iteration:
        return self.iterations[index]

    def __iter__(self) -> Iterator[Iteration]:
        return iter(self.iterations)

    @property
    def objective(self) -> Tensor:
        """``(K+1,)``: the profile objective before every iteration, and at the end. It doesn't increase."""
        return torch.tensor([i.objective for i in self] + [self.final_objective], dtype=torch.float64)

    @property
    def trace(self) -> Tensor:
        """``(2K+1,)``: the objective after every half step, bridge and reference in turn."""
        halves = [value for i in self for value in (i.objective, i.projected)]
        return torch.tensor([*halves, self.final_objective], dtype=torch.float64)

    @property
    def marginal_errors(self) -> Tensor:
        """The largest L1 error of a coupling's marginals in every iteration, ``(K,)``."""
        return torch.tensor([i.marginal_error for i in self], dtype=torch.float64)

    @property
    def seconds(self) -> Tensor:
        """The processor time of every iteration, ``(K,)``."""
        return torch.tensor([i.seconds for i in self], dtype=torch.float64)

    @property
    def diffusion(self) -> Tensor:
        """The strength of the noise after every iteration, ``(K,)``."""
        return torch.tensor([i.diffusion for i in self], dtype=torch.float64)

    @property
    def parameters(self) -> dict[str, Tensor]:
        """Every parameter over the iterations, ``(K, *shape)``."""
        if not self.iterations:
            return {}
        return {name: torch.stack([i.parameters[name] for i in self]) for name in self[0].parameters}

    def plot(self, **options: Any) -> Any:
        """Draw objective and parameters over the iterations; see :func:`stochdyn.bridges.plots.plot_history`."""
        from stochdyn.bridges.plots import plot_history

        return plot_history(self, **options)
