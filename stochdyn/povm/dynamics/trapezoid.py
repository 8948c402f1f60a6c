"""The forward-backward trapezoid method: each step is an optimisation of the residual of an implicit rule."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from stochdyn.povm.ansatz.base import Ansatz
from stochdyn.povm.dynamics.averages import Averages
from stochdyn.povm.dynamics.residuals import ResidualProblem, StepSource

__all__ = ["Minimum", "minimise", "trapezoid_problem"]

_LOOK_SEED = 0x5EED


def trapezoid_problem(
    averages: Averages,
    t: float | None,
    step: float,
    norm: str = "l1",
) -> ResidualProblem:
    r"""Return the residual of one step from the present state.

    .. math:: R = \bigl(1-\tfrac h2L\bigr)P_\theta - \bigl(1+\tfrac h2L\bigr)P_t

    Args:
        averages: The state, a frozen copy of which becomes :math:`P_t`, the master equation, and what means are taken
            over.
        t: The time before the step; None if the equation doesn't depend on it.
        step: The length ``h`` of the whole step (the reference code's ``dt`` is half of it).
        norm: The norm of the residual, ``"l1"`` or ``"l2"``.
    """
    frozen = copy.deepcopy(averages.net)
    source = StepSource(frozen, averages.operator, step / 2, t)
    later = None if t is None else t + step
    return ResidualProblem(averages, norm, 1.0, step / 2, source, later)


class Minimum:
    """The best iterate of a minimisation.

    Attributes:
        loss: The norm of the residual of the best iterate.
        parameters: The parameters ``(P,)`` of the best iterate.
        losses: The norm of the residual at every iteration.
    """

    def __init__(self) -> None:
        self.loss = math.inf
        self.parameters: Tensor | None = None
        self.losses: list[float] = []

    def look(self, loss: float, net: Ansatz) -> None:
        """Keep the present parameters if they are the best so far."""
        if loss < self.loss:
            self.loss, self.parameters = loss, net.parameter_vector()


def minimise(
    problem: ResidualProblem,
    steps: int,
    lr: float,
    generator: torch.Generator | None = None,
    looks: int = 4,
) -> Minimum:
    """Minimise a residual by Adam with a learning rate that falls along a cosine, and put the best iterate in place.

    By sampling, iterates are compared on the same random numbers: at the start and at ``looks`` places in the last
    half. By full summation every iterate is compared.

    Args:
        problem: The residual to minimise.
        steps: The number of gradient steps.
        lr: The learning rate at the start.
        generator: The source of randomness of the draws.
        looks: The number of comparisons of iterates.
    """
    best = Minimum()
    for _ in iterate(problem, steps, lr, best, generator, looks):
        pass
    return best


def iterate(
    problem: ResidualProblem,
    steps: int,
    lr: float,
    best: Minimum,
    generator: torch.Generator | None = None,
    looks: int = 4,
) -> Iterator[int]:
    """Do as :func:`minimise`, yielding the number of the iteration after each."""
    net = problem.net
    exact = problem.averages.num_samples is None
    optimiser = torch.optim.Adam([p for _, p in net.trainable()], lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    places = {steps // 2 + (steps - steps // 2) * (k + 1) // looks for k in range(looks)} | {0}
    for i in range(steps):
        value = problem.evaluate(generator)
        best.losses.append(value.loss)
        if exact:
            best.look(value.loss, net)
        elif i in places:
            best.look(_loss_on_fixed_numbers(problem), net)
        optimiser.zero_grad()
        problem.backward(value)
        optimiser.step()
        schedule.step()
        yield i
    best.look(problem.evaluate(generator).loss if exact else _loss_on_fixed_numbers(problem), net)
    optimiser.zero_grad(set_to_none=True)
    if best.parameters is not None:
        net.set_parameter_vector(best.parameters)


def _loss_on_fixed_numbers(problem: ResidualProblem) -> float:
    generator = torch.Generator(device=problem.net.device).manual_seed(_LOOK_SEED)
    return problem.evaluate(generator).loss
