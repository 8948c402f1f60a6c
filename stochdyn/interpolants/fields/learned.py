"""What score matching learns: a potential or a score, with its conditions and a process whose mean may differ by item."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import check_callable
from stochdyn.core.forward.flow import LearnedFlow, as_time
from stochdyn.core.forward.fokker_planck import FokkerPlanck
from stochdyn.errors import DtypeMismatchError, InvalidInputError, ShapeError, UnavailableError
from stochdyn.interpolants.fields.conditions import SeenConditions
from stochdyn.interpolants.fields.networks import FieldNetwork
from stochdyn.interpolants.fields.potential import FunctionPotential, Potential, PotentialNetwork
from stochdyn.interpolants.fields.preconditioned import About, PreconditionedScore
from stochdyn.interpolants.paths.processes import AffineProcess

__all__ = ["LearnedScore"]

Field = Callable[..., Tensor]


class LearnedScore(nn.Module):
    """A learned score or potential of a process.

    Args:
        process: The noising process.
        source: A :class:`Potential`, or a score ``score(t, x) -> (..., d)`` or ``score(t, x, condition)``.
        conditions: What it was trained with; nothing yet if None.
    """

    def __init__(
        self, process: AffineProcess, source: Potential | Field, conditions: SeenConditions | None = None
    ) -> None:
        super().__init__()
        check_callable(source, "score", "a Potential or a score, score(t, x)")
        self.process, self.source = process, source
        self.conditions = SeenConditions() if conditions is None else conditions

    def check_absent(self) -> None:
        """Raise where a condition is left out of what was always trained with one; a network of the user's own knows what it does."""
        if isinstance(self.source, FieldNetwork | PotentialNetwork):
            self.conditions.check_absent()

    @property
    def potential(self) -> Potential:
        """The potential.

        Raises:
            UnavailableError: If a score was given in its place.
        """
        if not isinstance(self.source, Potential):
            raise UnavailableError("a score network knows no log density", hint="train a potential")
        return self.source

    @property
    def has_potential(self) -> bool:
        """Whether there is a log density."""
        return isinstance(self.source, Potential)

    def given(self, condition: Any = None, mean: Tensor | None = None) -> LearnedScore:
        """Return the same score for one condition, and one mean of the process, per point.

        Raises:
            InvalidInputError: If the source takes no condition.
        """
        if condition is None and mean is None:
            return self
        process = self.process if mean is None else self.process.with_mean(mean)
        source: Any = self.source
        if isinstance(source, PotentialNetwork):
            if condition is not None:
                raise InvalidInputError(
                    "a PotentialNetwork has no input for a condition",
                    got=f"a condition of shape {tuple(condition.shape)}",
                    hint="pass a function potential(t, x, condition) or a score network",
                )
            source = FunctionPotential(process, source)
        elif isinstance(source, FunctionPotential):
            inner = source.function
            function = inner if condition is None else _Conditioned(inner, condition)
            source = FunctionPotential(process, function, source.reference)
        elif isinstance(source, PreconditionedScore) and mean is not None:
            source = About(source, process)
        if condition is not None and not isinstance(self.source, Potential):
            source = _Conditioned(source, condition)
        return LearnedScore(process, source)

    def forward(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the score ``(..., d)`` at ``x (..., d)``."""
        if isinstance(self.source, Potential):
            return self.source.score(t, x)
        time = as_time(t, x).to(x.dtype).expand(*x.shape[:-1], 1)
        try:
            value = self.source(time, x)
        except RuntimeError as error:
            own = [p.dtype for p in self.parameters() if p.is_floating_point()]
            if own and own[0] != x.dtype and not torch.is_autocast_enabled(x.device.type):
                raise DtypeMismatchError(
                    "the score network and the points have different precisions",
                    got=f"{own[0]} and {x.dtype}",
                    hint="convert the data with .to(dtype), or the network",
                ) from error
            raise
        if not isinstance(value, Tensor) or value.shape != x.shape:
            raise ShapeError(
                "the score has the wrong shape",
                got=tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__,
                expected=tuple(x.shape),
            )
        return value

    def flow(self) -> LearnedFlow:
        """Return the learned marginals as a :class:`stochdyn.LearnedFlow`."""
        if isinstance(self.source, Potential):
            return LearnedFlow(self.source)
        return LearnedFlow(self.source, predicts="score")

    def operator(self) -> FokkerPlanck:
        """Return the forward operator of the process."""
        return FokkerPlanck(self.process.sde())

    def velocity(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the velocity of the probability-flow ODE on the clock of the process, ``(..., d)``."""
        return self.process.drift(t, x) - 0.5 * self.process.squared_diffusion(t) * self(t, x)

    def smooth(self) -> LearnedScore:
        """Return one whose divergence can be differentiated again; the jets of a potential network can't."""
        if not isinstance(self.source, PotentialNetwork):
            return self
        return LearnedScore(self.process, FunctionPotential(self.process, self.source))


class _Conditioned(nn.Module):
    """A function of time, state and condition, at a condition."""

    def __init__(self, function: Field, condition: Any) -> None:
        super().__init__()
        self.function, self.condition = function, condition

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return self.function(t, x, self.condition)
