"""What every objective must satisfy."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, get_args

import torch

from stochdyn.objectives.base import Bound, Objective, ObjectiveValue
from stochdyn.testing.asynchrony import check_asynchronous

__all__ = ["ObjectiveSuite"]


class ObjectiveSuite(ABC):
    """Tests of a :class:`stochdyn.Objective`; subclasses implement :meth:`make`.

    Attributes:
        differentiates_its_loss: Whether the gradient is that of the reported loss with the random numbers
            held fixed. False for estimators that report one number and differentiate another.
        slope_tolerance: The relative tolerance of the directional derivative.
        unseen: Names of trainable parameters that the loss rightly doesn't depend on.
        on_host: A part of the path of files that compute on the host on purpose.
    """

    differentiates_its_loss: bool = True
    slope_tolerance: float = 1e-4
    unseen: tuple[str, ...] = ()
    on_host: str = ""

    @abstractmethod
    def make(self) -> tuple[Objective, Any]:
        """Return an objective in float64 and a batch for it (None if it needs none)."""

    def _evaluate(self, objective: Objective, batch: Any) -> ObjectiveValue:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(11)
            return objective(batch)

    def test_value_keeps_the_contract(self) -> None:
        """The loss is one finite number, the terms are detached numbers, the bound is one of the four."""
        objective, batch = self.make()
        value = self._evaluate(objective, batch)
        assert isinstance(value, ObjectiveValue)
        assert value.loss.shape == ()
        assert bool(torch.isfinite(value.loss))
        assert value.bound in get_args(Bound)
        for name, term in value.terms.items():
            assert term.shape == (), f"term {name} isn't a scalar"
            assert not term.requires_grad, f"term {name} isn't detached"
        if value.bound == "evidence_lower":
            assert "elbo" in value.terms

    def test_randomness_comes_from_the_global_generator(self) -> None:
        """The same seed gives the same loss to the last bit."""
        objective, batch = self.make()
        losses = [self._evaluate(objective, batch).loss.detach() for _ in range(2)]
        assert torch.equal(losses[0], losses[1])

    def test_a_step_never_waits_for_the_device(self) -> None:
        """After the first step nothing reads a number of a tensor: on a GPU that would cost the time that runs ahead."""
        objective, batch = self.make()
        torch.manual_seed(11)
        check_asynchronous(lambda: objective(batch).loss.backward(), self.on_host)

    def test_gradients_reach_every_trainable_parameter(self) -> None:
        """After one backward pass every parameter has a finite gradient."""
        objective, batch = self.make()
        self._evaluate(objective, batch).loss.backward()
        for name, parameter in objective.named_parameters():
            if parameter.requires_grad and name not in self.unseen:
                assert parameter.grad is not None, f"no gradient reaches {name}"
                assert bool(torch.isfinite(parameter.grad).all()), f"the gradient of {name} isn't finite"

    def test_state_dict_carries_the_whole_state(self) -> None:
        """A copy with other parameters that loads the state dict gives the same loss."""
        objective, batch = self.make()
        other = copy.deepcopy(objective)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(0.1)
        other.load_state_dict(objective.state_dict())
        first, second = self._evaluate(objective, batch).loss, self._evaluate(other, batch).loss
        assert torch.equal(first.detach(), second.detach())

    def test_gradient_is_the_slope_of_the_loss(self) -> None:
        """The directional derivative agrees with a central difference in a random direction."""
        objective, batch = self.make()
        parameters = [p for p in objective.parameters() if p.requires_grad]
        if not self.differentiates_its_loss or not parameters:
            return
        generator = torch.Generator().manual_seed(3)
        directions = [torch.randn(p.shape, dtype=p.dtype, generator=generator) for p in parameters]
        grads = torch.autograd.grad(self._evaluate(objective, batch).loss, parameters, materialize_grads=True)
        slope = float(sum((g * v).sum() for g, v in zip(grads, directions, strict=True)))
        h, sides = 1e-5, []
        with torch.no_grad():
            for sign in (1, -2):
                for p, v in zip(parameters, directions, strict=True):
                    p.add_(sign * h * v)
                sides.append(float(self._evaluate(objective, batch).loss))
        difference = (sides[0] - sides[1]) / (2 * h)
        scale = max(abs(slope), abs(difference), 1e-3)
        assert abs(slope - difference) < self.slope_tolerance * scale, (
            f"slope {slope}, difference {difference}"
        )
