"""The trained model of populations: where an unseen one goes, from its starts and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import as_tensor, check_bool, check_event_size, check_nonempty
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.interpolants.fields.networks import evaluating
from stochdyn.interpolants.populations.regression import PopulationField
from stochdyn.interpolants.sampling.methods import FLOW_METHODS, FlowMethod, as_method
from stochdyn.interpolants.sampling.samplers import integrate_ode, time_grid

__all__ = ["PopulationGenerator"]


class PopulationGenerator(nn.Module):
    """Carries populations along the learnt flow.

    Args:
        field: The velocity that knows a population.
        treatment_dim: The number of components of a treatment, 0 for none.
    """

    def __init__(self, field: PopulationField, treatment_dim: int = 0) -> None:
        super().__init__()
        self.field, self.treatment_dim = field, treatment_dim

    def _points(self, x: Any, name: str) -> Tensor:
        value = as_tensor(x, name, 2, "(n, d)", like=self.field.center).to(self.field.center)
        check_nonempty(value, name)
        check_event_size(value, self.field.dim, name)
        return value

    def embed(self, x0: Any, treatment: Any = None) -> Tensor | None:
        """Return the embedding ``(c,)`` of a population ``(n, d)``, with its treatment ``(t,)`` joined to it.

        It is None for a model without encoder and treatments.

        Raises:
            InvalidInputError: If a treatment is missing, or the model knows none.
        """
        population = self._points(x0, "x0")
        if (treatment is None) != (self.treatment_dim == 0):
            raise InvalidInputError(
                "the model was trained with treatments"
                if self.treatment_dim
                else "the model knows no treatments",
                got="none" if treatment is None else "a treatment",
            )
        given = None
        if treatment is not None:
            given = as_tensor(treatment, "treatment", 1, "(t,)", like=population).to(population)
            if len(given) != self.treatment_dim:
                raise ShapeError(
                    "the treatment has another size", got=len(given), expected=self.treatment_dim
                )
        with evaluating(self):
            return self.field.embed(population, given)

    def velocity(self, t: Tensor | float, x: Any, population: Any, treatment: Any = None) -> Tensor:
        """Return the velocity ``(n, d)`` at points, for a population ``(m, d)``.

        Args:
            t: A time in [0, 1], or ``(n, 1)``.
            x: The points, ``(n, d)``.
            population: The starts of the population, ``(m, d)``.
            treatment: What is done to it, ``(t,)``.
        """
        points = self._points(x, "x")
        context = self.embed(population, treatment)
        time = torch.as_tensor(t, dtype=points.dtype, device=points.device).expand(len(points), 1)
        with evaluating(self):
            return self.field(time, points, context, self._points(population, "population"))

    def sample(
        self,
        x0: Any,
        num_steps: int = 50,
        method: str | FlowMethod = "midpoint",
        *,
        population: Any = None,
        treatment: Any = None,
        trajectory: bool = False,
    ) -> Tensor:
        """Carry a population to where it goes.

        Args:
            x0: The starts, all of one population, ``(n, d)``.
            num_steps: The number of steps of the flow.
            method: How to take a step: one of the methods of :meth:`stochdyn.interpolants.InterpolantGenerator.push`.
            population: The starts ``(m, d)`` from which the population is known; those in ``x0`` if None.
            treatment: What is done to it, ``(t,)``.
            trajectory: Whether to return all states, ``(num_steps + 1, n, d)``.

        Returns:
            ``(n, d)``, row by row what becomes of the starts.

        Raises:
            ShapeError, EmptyDataError, NonFiniteError: If the points don't fit.
        """
        check_bool(trajectory, "trajectory")
        chosen = as_method(method, FLOW_METHODS, "flows")
        x = self._points(x0, "x0")
        with torch.no_grad():
            known = x if population is None else self._points(population, "population")
            context = self.embed(known, treatment)

            def velocity(t: Tensor, y: Tensor) -> Tensor:
                return self.field(t.expand(len(y), 1), y, context, known)

            with evaluating(self):
                return integrate_ode(velocity, x, time_grid(num_steps, like=x), chosen, trajectory=trajectory)
