"""The families of posteriors of a LatentSDE, each with the options that it has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stochdyn._checks import check_choice, check_positive_int
from stochdyn.core.sde.methods import Method, as_method
from stochdyn.errors import InvalidInputError
from stochdyn.fractional.latent.base import LatentPosterior
from stochdyn.fractional.latent.control import ControlPosterior
from stochdyn.fractional.latent.encoded import AmortisedGaussianPosterior
from stochdyn.fractional.latent.linearised import LinearisedPosterior
from stochdyn.fractional.latent.matching import MatchingPosterior

if TYPE_CHECKING:
    from stochdyn.fractional.latent.model import LatentSDE

__all__ = [
    "ControlMethod",
    "GaussianMethod",
    "LinearisedMethod",
    "MatchingMethod",
    "PosteriorMethod",
    "TightMethod",
    "as_posterior_method",
]


class PosteriorMethod(ABC):
    """How the posterior of the latent paths is made. Subclasses are frozen dataclasses of options."""

    @abstractmethod
    def build(self, model: LatentSDE) -> LatentPosterior:
        """Return the posterior for a model whose equation and grid are known.

        Args:
            model: The model that the posterior belongs to.

        Raises:
            InvalidInputError: If the equation isn't one that this family can follow.
        """


@dataclass(frozen=True)
class ControlMethod(PosteriorMethod):
    """The published posterior: a network controls the Brownian increments, which keep their variance. Simulated.

    Use it to compare with published results. Where observations are precise its bound pays for the time step.

    Attributes:
        hidden: The widths of the hidden layers of the control network.
        context: The size of the encoder's summary of a series.
        num_particles: The number of paths per series in each estimate of the bound.
        method: The scheme by which paths are simulated, an object or a name. ``"heun"`` and ``"milstein"`` apply the Itô correction
            of a diffusion that depends on the state; ``Euler(checkpoint=True)`` saves memory on long grids.
    """

    hidden: Sequence[int] = (64, 64)
    context: int = 64
    num_particles: int = 1
    method: Method | str = "euler"

    def __post_init__(self) -> None:
        _check_hidden(self.hidden)
        check_positive_int(self.context, "context")
        check_positive_int(self.num_particles, "num_particles")
        as_method(self.method)

    def build(self, model: LatentSDE) -> LatentPosterior:
        """Return the posterior; see :meth:`PosteriorMethod.build`."""
        return self._build(model, tight=False)

    def _build(self, model: LatentSDE, tight: bool) -> LatentPosterior:
        return ControlPosterior(
            model, self.hidden, tight, self.context, self.num_particles, as_method(self.method)
        )


@dataclass(frozen=True)
class TightMethod(ControlMethod):
    """All innovations get means, and a covariance for every step, so that the bound doesn't pay for the time step. Simulated.

    Use it when in doubt: it takes every noise and every diffusion. On very long grids it is slow, since it walks through the steps.
    Its options are those of :class:`ControlMethod`.
    """

    def build(self, model: LatentSDE) -> LatentPosterior:
        """Return the posterior; see :meth:`PosteriorMethod.build`."""
        return self._build(model, tight=True)


@dataclass(frozen=True)
class GaussianMethod(PosteriorMethod):
    """Linear feedback on a linear equation, whose moments follow for all times at once.

    Use it first where the diffusion is constant: it is the fastest, and tight where the latent path is nearly Gaussian given the data.

    Attributes:
        context: The size of the encoder's summary of a series.
        num_particles: The number of paths per series in each estimate of the bound.
    """

    context: int = 64
    num_particles: int = 1

    def __post_init__(self) -> None:
        check_positive_int(self.context, "context")
        check_positive_int(self.num_particles, "num_particles")

    def build(self, model: LatentSDE) -> LatentPosterior:
        """Return the posterior; see :meth:`PosteriorMethod.build`."""
        if not model.constant_diffusion:
            raise InvalidInputError(
                "a Gaussian posterior needs a constant diffusion",
                hint="diffusion='constant', or posterior='tight'",
            )
        return AmortisedGaussianPosterior(model, self.context, self.num_particles)


@dataclass(frozen=True)
class LinearisedMethod(PosteriorMethod):
    """The exact posterior of the model linearised around each series' most probable path. There is nothing to train in it.

    Use it where the drift bends little on the scale of the posterior and observations fall on points of the grid, and above all to learn a
    Hurst index: the bound is then tight from the first step on, and some hundred steps suffice. A step takes longer than those of the others,
    and its time grows with the cube of the number of states, the memory of the noise included.

    Attributes:
        max_iterations: The number of linearisations for a series; 1 is enough for a linear model.
        num_particles: The number of paths per series in each estimate of the bound.
    """

    max_iterations: int = 3
    num_particles: int = 1

    def __post_init__(self) -> None:
        check_positive_int(self.max_iterations, "max_iterations")
        check_positive_int(self.num_particles, "num_particles")

    def build(self, model: LatentSDE) -> LatentPosterior:
        """Return the posterior; see :meth:`PosteriorMethod.build`."""
        del model
        return LinearisedPosterior(self.max_iterations, self.num_particles)


@dataclass(frozen=True)
class MatchingMethod(PosteriorMethod):
    """Gaussian marginals at random times, for Brownian noise alone: trained without any simulated path.

    Use it for Brownian noise and long series: the cost of a step of training doesn't grow with the grid.

    Attributes:
        hidden: The widths of the hidden layers of the network of the marginals.
        context: The size of the recurrent summaries of a series, one in each direction of time.
        num_times: The number of random times per series in each estimate of the bound.
        method: The scheme by which paths are simulated after training, an object or a name. ``"heun"`` follows a smooth drift
            better in long steps, as in forecasts of many periods.
    """

    hidden: Sequence[int] = (64, 64)
    context: int = 64
    num_times: int = 1
    method: Method | str = "euler"

    def __post_init__(self) -> None:
        _check_hidden(self.hidden)
        check_positive_int(self.context, "context")
        check_positive_int(self.num_times, "num_times")
        as_method(self.method)

    def build(self, model: LatentSDE) -> LatentPosterior:
        """Return the posterior; see :meth:`PosteriorMethod.build`."""
        if model.sde.noise.num_states:
            raise InvalidInputError(
                "marginals alone don't make a posterior for noise with memory",
                got="posterior='matching' with fractional noise",
                hint="take posterior='gaussian', which needs no simulation either, or noise='brownian'",
            )
        return MatchingPosterior(model, self.hidden, self.context, self.num_times, as_method(self.method))


_METHODS: dict[str, type[PosteriorMethod]] = {
    "control": ControlMethod,
    "tight": TightMethod,
    "gaussian": GaussianMethod,
    "linearised": LinearisedMethod,
    "matching": MatchingMethod,
}


def as_posterior_method(posterior: object) -> PosteriorMethod:
    """Return a method, or the one that a name stands for with its defaults.

    Raises:
        InvalidInputError: If it is neither.
    """
    if isinstance(posterior, PosteriorMethod):
        return posterior
    if not isinstance(posterior, str):
        raise InvalidInputError(
            "posterior must be a method or the name of one",
            got=repr(posterior)[:60],
            expected="TightMethod(...) | GaussianMethod(...) | ... | " + " | ".join(map(repr, _METHODS)),
        )
    check_choice(posterior, tuple(_METHODS), "posterior")
    return _METHODS[posterior]()


def _check_hidden(hidden: object) -> None:
    if not isinstance(hidden, Sequence) or isinstance(hidden, str):
        raise InvalidInputError("hidden must be the widths of layers", got=repr(hidden)[:60])
    for width in hidden:
        check_positive_int(width, "hidden")
