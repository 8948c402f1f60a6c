"""The contract of laws on path space: what every law offers, and what it answers where it can't."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import Tensor, nn

from stochdyn.core.law.marginals import Generator, Marginal, SampleShape
from stochdyn.core.law.path import Path
from stochdyn.errors import UnavailableError

if TYPE_CHECKING:
    from stochdyn.core.forward.operator import ForwardOperator
    from stochdyn.core.law.transformed import TransformedMeasure

__all__ = ["PathMeasure"]


class PathMeasure(nn.Module, ABC):
    r"""A probability law on paths.

    Every law of the library, in every system, offers the verbs below; whatever consumes laws asks for them and for
    nothing else. :meth:`sample` and :meth:`marginal` are always there and speak of the same law, weights and growth
    included. A law that lacks one of the others raises :class:`~stochdyn.errors.UnavailableError`, which says why.

    Laws with Gaussian marginals also have ``mean(ts) (*batch, T, d)`` and ``covariance(ts) (*batch, T, d, d)``, which are
    marginal everywhere, and ``joint_covariance(ts) (*batch, T d, T d)``.

    A new law inherits :class:`stochdyn.testing.PathMeasureSuite` in its tests.
    """

    @abstractmethod
    def sample(self, ts: Tensor, sample_shape: SampleShape = (), generator: Generator = None) -> Path:
        """Draw independent paths.

        Args:
            ts: The strictly increasing times ``(T,)`` at which the paths are wanted.
            sample_shape: The shape of independent draws, an integer or a tuple.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Returns:
            A path with ``ts`` and ``x (*sample, *batch, T, d)``.

        Raises:
            TimeGridError: If the grid doesn't increase strictly, or leaves the span of the law.
        """

    @abstractmethod
    def marginal(self, t: Tensor | float) -> Marginal:
        """Return the law of the state at one time, the same law that :meth:`sample` has there.

        Raises:
            TimeGridError: If the time lies outside the span of the law.
        """

    def log_rn(
        self, path: Path, other: PathMeasure, estimator: str = "density", *, recorded: bool = False
    ) -> Tensor:
        r"""Return :math:`\log dQ/dP` on given paths, ``(*sample, *batch)``, Q being this law as it is now and P ``other``.

        Args:
            path: The paths of either law.
            other: P.
            estimator: The estimator: ``"density"``, the true log weight; ``"rate"``, only its conditional mean under Q;
                ``"stl"``, the true log weight with a gradient of less noise.
            recorded: Whether to reuse what the law noted while it drew the paths. This saves time and is right as long
                as the law hasn't changed since.

        Raises:
            UnavailableError: If the density ratio isn't known.
            DiffusionMismatchError: If the laws are mutually singular.
        """
        self._refuse("log_rn", "its density with respect to another law isn't known")

    def log_prob(self, path: Path) -> Tensor:
        """Return the log density of the states of paths, ``(*sample, *batch)``.

        Raises:
            UnavailableError: If the density isn't known.
        """
        self._refuse("log_prob", "the density of its paths isn't known")

    def random_points(self, ts: Tensor) -> Tensor:
        """Return ``(T, *batch)``, True for the points of a grid ``(T,)`` or ``(*batch, T)`` that :meth:`log_prob` is a density of.

        A fixed start is none of them.
        """
        return torch.ones_like(ts.movedim(-1, 0), dtype=torch.bool)

    def transformed(self, transform: object) -> TransformedMeasure:
        """Return the law of the paths in other coordinates; see :class:`stochdyn.core.TransformedMeasure`.

        ``DiffusionMeasure(initial, sde.transformed("log")).transformed("exp")`` is simulated in logarithms and speaks of positive
        states.

        Args:
            transform: The change of variables: ``"exp"``, ``"sigmoid"``, ``"log"``, ``"logit"``, an invertible transform of
                ``torch.distributions`` or Pyro, or a list with one for each component.

        Raises:
            InvalidInputError: If the transform isn't invertible.
        """
        from stochdyn.core.law.transformed import TransformedMeasure

        return TransformedMeasure(self, transform)

    def forward(self) -> ForwardOperator:
        """Return the forward (Kolmogorov) operator of the law, for ``flow.residual(t, x, law.forward())``.

        Raises:
            UnavailableError: If the marginals obey no forward equation in the state alone.
        """
        self._refuse("forward", "its marginals obey no known forward equation")

    def drift(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the drift ``(..., d)`` of a diffusion at ``x (..., d)``, controls included.

        Raises:
            UnavailableError: If the law isn't a diffusion in its state alone.
        """
        self._refuse("drift", "it isn't a diffusion in its state alone")

    def rates(self, t: Tensor | float) -> Tensor:
        """Return the jump rates ``(*batch, S, S)`` at a time, each row summing to zero.

        Raises:
            UnavailableError: If the law isn't a jump process on finitely many states.
        """
        self._refuse("rates", "it isn't a jump process on finitely many states")

    def _refuse(self, verb: str, reason: str) -> NoReturn:
        raise UnavailableError(f"{type(self).__name__} has no {verb}: {reason}")
