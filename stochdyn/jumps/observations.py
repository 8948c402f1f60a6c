"""How the state of a jump process is observed: exactly, with errors, through levels or counts, or in part."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from stochdyn._checks import as_tensor, check_positive, check_positive_int, check_type
from stochdyn.errors import InvalidInputError, ShapeError, UnavailableError

__all__ = [
    "Exact",
    "ExactEntry",
    "GaussianLevels",
    "Misclassified",
    "Observation",
    "PoissonLevels",
    "StateSets",
]


class Observation(nn.Module, ABC):
    """The law of an observation given the state. NaN is a missing observation.

    Use :class:`Exact` where the state itself is seen, :class:`Misclassified` where its label may be wrong, :class:`GaussianLevels` for
    currents and other noisy levels, :class:`PoissonLevels` for photons and other counts, :class:`StateSets` where several states look
    alike or some are censored, and :class:`ExactEntry` around one of these where the moment of entry is known, as of deaths.
    """

    num_states: int

    @abstractmethod
    def log_likelihood(self, y: Tensor) -> Tensor:
        """Return ``log p(y | state) (*y.shape, S)``; zero where ``y`` is NaN."""

    def entries(self, y: Tensor) -> Tensor:
        """Return the states that are entered at the very moment of the observation, ``(*y.shape,)``, or -1."""
        return torch.full(y.shape, -1, dtype=torch.long, device=y.device)

    def draw(self, states: Tensor) -> Tensor:
        """Return observations drawn given the states ``(...)``, of their shape.

        Raises:
            UnavailableError: If the law doesn't say what is seen of a state; a class of your own says so here.
        """
        raise UnavailableError(
            f"{type(self).__name__} can't be drawn: it doesn't say what is seen of a state",
            hint="give it a method draw(states)",
        )


def _labels(y: Tensor, count: int, what: str) -> tuple[Tensor, Tensor]:
    """Return labels as whole numbers, zero where missing, and which are missing."""
    missing = torch.isnan(y)
    whole = torch.where(missing, torch.zeros_like(y), y)
    if bool((whole != whole.round()).any()) or bool((whole < 0).any()) or bool((whole >= count).any()):
        bad = whole[(whole != whole.round()) | (whole < 0) | (whole >= count)][0]
        raise InvalidInputError(f"y must hold {what} from 0 to {count - 1}", got=float(bad))
    return whole.long(), missing


class Exact(Observation):
    """The state itself.

    Args:
        num_states: The number of states S.
    """

    def __init__(self, num_states: int) -> None:
        super().__init__()
        check_positive_int(num_states, "num_states", 2)
        self.num_states = int(num_states)

    def log_likelihood(self, y: Tensor) -> Tensor:
        """Return zero for the observed state and minus infinity for others, ``(*y.shape, S)``."""
        label, missing = _labels(y, self.num_states, "states")
        seen = torch.nn.functional.one_hot(label, self.num_states).to(y.dtype).log()
        return torch.where(missing[..., None], torch.zeros_like(seen), seen)

    def draw(self, states: Tensor) -> Tensor:
        """Return the states themselves."""
        return states.double()


class Misclassified(Observation):
    """Labels that may be wrong.

    Args:
        matrix: The probability of each label given each state, ``(S, L)``; rows sum to one.
    """

    matrix: Tensor

    def __init__(self, matrix: object) -> None:
        super().__init__()
        value = as_tensor(matrix, "matrix", 2, "(S, L)")
        if bool((value < 0).any()) or float((value.detach().sum(-1) - 1).abs().max()) > 1e-5:
            raise InvalidInputError("the rows of matrix must be probabilities")
        self.num_states = value.shape[0]
        _keep(self, "matrix", value)

    def log_likelihood(self, y: Tensor) -> Tensor:
        """Return the log probability of the label in every state, ``(*y.shape, S)``."""
        label, missing = _labels(y, self.matrix.shape[1], "labels")
        chance = self.matrix.to(y.dtype).mT[label]
        # an impossible label has no part in the derivative
        seen = torch.where(chance > 0, torch.where(chance > 0, chance, 1.0).log(), -math.inf)
        return torch.where(missing[..., None], torch.zeros_like(seen), seen)

    def draw(self, states: Tensor) -> Tensor:
        """Draw the labels."""
        flat = torch.multinomial(self.matrix.detach()[states.reshape(-1)], 1)[:, 0]
        return flat.reshape(states.shape).double()


class GaussianLevels(Observation):
    """A level for each state, with Gaussian noise.

    Args:
        levels: The level of each state, ``(S,)``.
        scale: The standard deviation of the noise: a number, or one per state ``(S,)``.
    """

    levels: Tensor
    scale: Tensor

    def __init__(self, levels: object, scale: object) -> None:
        super().__init__()
        level = as_tensor(levels, "levels", 1, "(S,)")
        width = as_tensor(scale, "scale", (0, 1), "a number or (S,)", like=level)
        check_positive(width.detach(), "scale")
        if width.ndim and width.shape != level.shape:
            raise ShapeError(
                "scale must be one number per state", got=tuple(width.shape), expected=tuple(level.shape)
            )
        self.num_states = len(level)
        _keep(self, "levels", level)
        _keep(self, "scale", width)

    def log_likelihood(self, y: Tensor) -> Tensor:
        """Return the Gaussian log density of the value in every state, ``(*y.shape, S)``."""
        missing = torch.isnan(y)
        at = torch.where(missing, torch.zeros_like(y), y)[..., None]
        scale = self.scale.to(y.dtype)
        seen = (
            -0.5 * ((at - self.levels.to(y.dtype)) / scale) ** 2 - scale.log() - 0.5 * math.log(2 * math.pi)
        )
        return torch.where(missing[..., None], torch.zeros_like(seen), seen)

    def draw(self, states: Tensor) -> Tensor:
        """Draw the values."""
        scale = self.scale.expand_as(self.levels)
        return torch.normal(self.levels.detach()[states], scale.detach()[states])


class PoissonLevels(Observation):
    """Counts whose mean depends on the state, such as photons per frame.

    Args:
        means: The positive mean of the count in each state, ``(S,)``.
    """

    means: Tensor

    def __init__(self, means: object) -> None:
        super().__init__()
        value = as_tensor(means, "means", 1, "(S,)")
        check_positive(value.detach(), "means")
        self.num_states = len(value)
        _keep(self, "means", value)

    def log_likelihood(self, y: Tensor) -> Tensor:
        """Return the Poisson log probability of the count in every state, ``(*y.shape, S)``."""
        missing = torch.isnan(y)
        at = torch.where(missing, torch.zeros_like(y), y)[..., None]
        if bool((at < 0).any()) or bool((at != at.round()).any()):
            raise InvalidInputError("y must hold counts", got=float(at[(at < 0) | (at != at.round())][0]))
        mean = self.means.to(y.dtype)
        seen = at * mean.log() - mean - torch.lgamma(at + 1)
        return torch.where(missing[..., None], torch.zeros_like(seen), seen)

    def draw(self, states: Tensor) -> Tensor:
        """Draw the counts."""
        return torch.poisson(self.means.detach()[states])


class StateSets(Observation):
    """Labels of sets of states: censored states, or classes such as open and shut.

    Args:
        sets: The states behind each label.
        num_states: The number of states S.
    """

    member: Tensor

    def __init__(self, sets: Sequence[Sequence[int]], num_states: int) -> None:
        super().__init__()
        check_positive_int(num_states, "num_states", 2)
        self.num_states = int(num_states)
        member = torch.zeros(len(sets), num_states, dtype=torch.bool)
        for k, states in enumerate(sets):
            if not len(states) or min(states) < 0 or max(states) >= num_states:
                raise InvalidInputError(f"sets[{k}] must hold states", got=list(states))
            member[k, list(states)] = True
        self.register_buffer("member", member)

    def log_likelihood(self, y: Tensor) -> Tensor:
        """Return zero for the states of the label and minus infinity for others, ``(*y.shape, S)``."""
        label, missing = _labels(y, len(self.member), "labels of sets")
        seen = self.member[label].to(y.dtype).log()
        return torch.where(missing[..., None], torch.zeros_like(seen), seen)


class ExactEntry(Observation):
    r"""Observations of which some states are entered at the very time of their observation, such as death.

    The factor is then :math:`\sum_kP_{ik}(\Delta)Q_{kd}`, a density in time, and not the probability to be found dead.

    Args:
        states: The states whose entry is seen exactly.
        observation: The law of the observation of all other states; these states must be observed as their own label.
    """

    def __init__(self, states: Sequence[int], observation: Observation) -> None:
        super().__init__()
        check_type(observation, Observation, "observation")
        self.observation, self.num_states = observation, observation.num_states
        self.states = [int(s) for s in states]
        if not self.states or min(self.states) < 0 or max(self.states) >= self.num_states:
            raise InvalidInputError(
                "states must be states", got=list(states), expected=f"0 to {self.num_states - 1}"
            )

    def log_likelihood(self, y: Tensor) -> Tensor:
        """Return ``log p(y | state)``: an entered state isn't misclassified."""
        at = self.entries(y)
        entered = at >= 0
        inner = self.observation.log_likelihood(torch.where(entered, torch.full_like(y, math.nan), y))
        exact = torch.nn.functional.one_hot(at.clamp(min=0), self.num_states).to(y.dtype).log()
        return torch.where(entered[..., None], exact, inner)

    def entries(self, y: Tensor) -> Tensor:
        """Return the states that are entered at the moment of the observation, ``(*y.shape,)``, or -1."""
        out = torch.full(y.shape, -1, dtype=torch.long, device=y.device)
        for state in self.states:
            out = torch.where(y == state, torch.full_like(out, state), out)
        return out


def _keep(module: nn.Module, name: str, value: Tensor) -> None:
    """Register a tensor as the parameter that it is, or as a buffer."""
    if isinstance(value, nn.Parameter):
        setattr(module, name, value)
    else:
        module.register_buffer(name, value)
