"""Marginal flows: the densities a process passes through, one for every time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    check_choice,
    check_nonempty,
    check_points,
    check_positive,
    check_real,
    check_time_broadcast,
    values_are_checked,
)
from stochdyn._transforms import ordinarily, recording
from stochdyn.core.forward.divergences import attach, gradient, jacobian_contraction, pull_back, release
from stochdyn.core.gaussian.small import psd_factor
from stochdyn.core.law.marginals import Generator, SampleShape
from stochdyn.errors import InvalidInputError, ShapeError, SingularDiffusionError, UnavailableError

if TYPE_CHECKING:
    from stochdyn.core.forward.operator import ForwardOperator

__all__ = ["GaussianFlow", "LearnedFlow", "MarginalFlow", "MixtureFlow", "as_time"]

TimeFunction = Callable[[Tensor], Tensor]
Sampler = Callable[[Tensor, int, "torch.Generator | None"], Tensor]


def as_time(t: Tensor | float, x: Tensor) -> Tensor:
    """Return ``t`` as a tensor beside ``x (..., d)``; numbers take the precision of ``x``.

    Raises:
        ShapeError: If it doesn't broadcast to ``x[..., :1]``, or one of both is no tensor.
        InvalidInputError: If one of both is complex or in half precision.
        NonFiniteError: If one of both holds NaN or infinity.

    Example:
        >>> as_time(0.5, torch.zeros(3, 2))
        tensor(0.5000)
    """
    check_points(x)
    if not isinstance(t, Tensor):
        check_real(t, "t")
        dtype = x.dtype if x.is_floating_point() else torch.get_default_dtype()
        return torch.full((), float(t), dtype=dtype, device=x.device)
    check_points(t, "t", "a number or times that broadcast to x[..., :1]")
    check_time_broadcast(t, x)
    return t


class MarginalFlow(nn.Module, ABC):
    r"""A family of densities :math:`\rho_t` on :math:`\mathbb R^d`, or on strings of outcomes.

    Times follow the inner convention: ``t`` is a number, or a tensor that broadcasts to ``x[..., :1]``; a
    leading time axis of ``x (T, n, d)`` needs ``t (T, 1, 1)``, and one time per point ``t (n, 1)``. Subclasses
    implement :meth:`log_prob` and :meth:`sample`; score and time derivative come by automatic differentiation
    where no better formula is given.
    """

    @abstractmethod
    def log_prob(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return :math:`\log\rho_t(x)`, ``(...)``, at ``x (..., d)``.

        Raises:
            ShapeError: If ``t`` doesn't broadcast to ``x[..., :1]``.
            UnavailableError: If the flow knows no density.
        """

    @abstractmethod
    def sample(
        self, t: Tensor | float, sample_shape: SampleShape = (), generator: Generator = None
    ) -> Tensor:
        r"""Draw independent points of every :math:`\rho_t`: ``(*t.shape, *sample, d)``.

        Args:
            t: The times; a number stands for a tensor of torch's default precision.
            sample_shape: The shape of independent draws at every time, an integer or a tuple.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.

        Raises:
            UnavailableError: If the flow can't be sampled.
        """

    @ordinarily
    def score(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return :math:`\nabla\log\rho_t(x)`, ``(..., d)``."""
        time = as_time(t, x)
        return gradient(lambda y: self.log_prob(time, y), x)

    @ordinarily
    def time_derivative(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return :math:`\partial_t\log\rho_t(x)`, ``(...)``."""
        return time_derivative(self.log_prob, as_time(t, x), x)

    @ordinarily
    def score_time_derivative(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return :math:`\partial_t\nabla\log\rho_t(x)`, ``(..., d)``."""
        return time_derivative(self.score, as_time(t, x), x)

    def residual(self, t: Tensor | float, x: Tensor, operator: ForwardOperator, **options: Any) -> Tensor:
        r"""Return how far the flow is from :math:`\partial_t\rho=L^*\rho` at ``x``.

        The options are those of ``operator.residual``.
        """
        return operator.residual(self, t, x, **options)


def time_derivative(function: Callable[[Tensor, Tensor], Tensor], t: Tensor, x: Tensor) -> Tensor:
    """Return the derivative in time of ``function(t, x) -> (...)`` or ``(..., d)``, of the same shape."""
    create_graph = torch.is_grad_enabled()
    with recording():
        s = attach(t)
        value = function(s, x)
        if value.ndim == x.ndim - 1 and s.shape == (*x.shape[:-1], 1):
            result = pull_back(value, s, create_graph=create_graph).squeeze(-1)
        else:
            result = jacobian_contraction(value, s, torch.ones_like(s)[None], create_graph)[0]
    result = result.to(x.dtype) if x.is_floating_point() else result
    return release(result, create_graph, (t, s))


class LinearLaw(Protocol):
    """A linear-Gaussian law, as far as its marginals go; :class:`stochdyn.LinearGaussianMeasure` is one."""

    batch_shape: torch.Size
    initial_time: float
    initial_mean: Tensor
    initial_cov: Tensor

    def transition(self, start: Tensor, stop: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return matrix, offset and covariance of the state at ``stop (N,)`` given that at ``start (N,)``."""


class GaussianFlow(MarginalFlow):
    r"""Gaussian marginals with given mean and covariance.

    .. math:: \rho_t = N(m(t), C(t))

    Use it for linear equations, whose marginals it has exactly, and as a reference that a learnt flow corrects.

    Args:
        mean: A function that maps times ``(*s,)`` to ``(*s, d)``; differentiable where time derivatives are wanted. May
            be a module.
        covariance: A function that maps times ``(*s,)`` to ``(*s, d, d)``.

    Example:
        >>> flow = GaussianFlow(lambda t: torch.zeros(*t.shape, 1), lambda t: (1 + t)[..., None, None])
        >>> flow.log_prob(0.0, torch.zeros(2, 1))
        tensor([-0.9189, -0.9189])
    """

    def __init__(self, mean: TimeFunction, covariance: TimeFunction) -> None:
        super().__init__()
        if not (callable(mean) and callable(covariance)):
            raise InvalidInputError("mean and covariance must be functions of time")
        self.mean = mean
        self.covariance = covariance

    @classmethod
    def from_measure(cls, measure: LinearLaw) -> GaussianFlow:
        """Return the marginals of a :class:`stochdyn.LinearGaussianMeasure` without batch axes.

        Raises:
            ShapeError: If the measure is a batch of laws.

        Example:
            >>> from stochdyn.core import LinearGaussianMeasure
            >>> flow = GaussianFlow.from_measure(LinearGaussianMeasure.brownian(2))
            >>> flow.score(2.0, torch.ones(1, 2))
            tensor([[-0.5000, -0.5000]])
        """
        if measure.batch_shape:
            raise ShapeError(
                "a flow is one law", got=f"a measure of batch shape {tuple(measure.batch_shape)}"
            )
        moments = _LinearMoments(measure)
        return cls(moments.mean, moments.covariance)

    def _moments(self, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
        time = as_time(t, x)
        time = time[..., 0] if time.ndim else time
        mean, covariance = self.mean(time), self.covariance(time)
        if mean.shape[-1] != x.shape[-1]:
            raise ShapeError(
                "x has the wrong dimension",
                got=f"shape {tuple(x.shape)}",
                expected=f"(..., {mean.shape[-1]})",
            )
        factor, info = torch.linalg.cholesky_ex(covariance)
        if factor.device.type != "cpu" or not values_are_checked():
            # Without waiting for the device a failed factor turns into NaN, which guards downstream report.
            return mean, torch.where((info == 0)[..., None, None], factor, torch.nan)
        if bool(info.any()):
            raise SingularDiffusionError(
                "a covariance of the flow isn't positive definite, so there is no density",
                hint="keep away from times at which the law is a single point",
            )
        return mean, factor

    def log_prob(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return :math:`\log\rho_t(x)`, ``(...)``, at ``x (..., d)``.

        Raises:
            SingularDiffusionError: If a covariance isn't positive definite (on accelerators the result is
                NaN).
        """
        mean, factor = self._moments(t, x)
        # log N(x; m, L L^T), whitened by L.
        white = _solve_lower(factor, x - mean)
        log_det = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        return -0.5 * white.square().sum(-1) - log_det - 0.5 * x.shape[-1] * math.log(2 * math.pi)

    def score(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return :math:`\nabla\log\rho_t(x)`, ``(..., d)``."""
        mean, factor = self._moments(t, x)
        precision = torch.cholesky_inverse(factor)
        return -((x - mean).unsqueeze(-2) @ precision).squeeze(-2)

    def sample(
        self, t: Tensor | float, sample_shape: SampleShape = (), generator: Generator = None
    ) -> Tensor:
        r"""Draw independent points of every :math:`\rho_t`: ``(*t.shape, *sample, d)``. Singular covariances are allowed."""
        shape, time = as_sample_shape(sample_shape), _as_times(t)
        mean, covariance = self.mean(time), self.covariance(time)
        source = as_generator(generator, mean.device)
        size = (*time.shape, math.prod(shape), mean.shape[-1])
        noise = torch.randn(size, dtype=mean.dtype, device=mean.device, generator=source)
        x = mean.unsqueeze(-2) + noise @ psd_factor(covariance).mT
        return x.reshape(*time.shape, *shape, mean.shape[-1])


def _as_times(t: Tensor | float) -> Tensor:
    if isinstance(t, Tensor):
        return t
    check_real(t, "t")
    return torch.tensor(float(t))


def _solve_lower(factor: Tensor, v: Tensor) -> Tensor:
    if factor.ndim == 2:
        flat = v.reshape(-1, v.shape[-1])
        return torch.linalg.solve_triangular(factor.mT, flat, upper=True, left=False).reshape(v.shape)
    return torch.linalg.solve_triangular(factor, v.unsqueeze(-1), upper=False).squeeze(-1)


class _LinearMoments:
    """Moments of a linear-Gaussian law at times of any shape and order, by its transition from the start."""

    def __init__(self, measure: LinearLaw) -> None:
        self.measure = measure

    def _from_start(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flat = t.reshape(-1)
        parts = self.measure.transition(torch.full_like(flat, self.measure.initial_time), flat)
        phi, c, q = (part.reshape(*t.shape, *part.shape[1:]) for part in parts)
        return phi, c, q

    def mean(self, t: Tensor) -> Tensor:
        # E x_t = Phi m_0 + c, Cov x_t = Phi P_0 Phi^T + Q.
        phi, c, _ = self._from_start(t)
        return (phi @ self.measure.initial_mean.unsqueeze(-1)).squeeze(-1) + c

    def covariance(self, t: Tensor) -> Tensor:
        phi, _, q = self._from_start(t)
        return phi @ self.measure.initial_cov @ phi.mT + q


class MixtureFlow(MarginalFlow):
    r"""A mixture of flows with constant weights.

    .. math:: \rho_t = \sum_k w_k\,\rho^{(k)}_t

    Mixtures of solutions of one linear forward equation solve it too.

    Use it for laws with several modes that are each simple, such as a linear equation started from a mixture.

    Args:
        components: The flows on the same space.
        weights: The positive weights ``(K,)``; they are normalised.

    Raises:
        ShapeError: If there isn't one weight per component.

    Example:
        >>> wide = GaussianFlow(lambda t: torch.zeros(*t.shape, 1), lambda t: torch.ones(*t.shape, 1, 1))
        >>> MixtureFlow([wide, wide], torch.tensor([1.0, 3.0])).sample(0.0, 5).shape
        torch.Size([5, 1])
    """

    log_weights: Tensor

    def __init__(self, components: Sequence[MarginalFlow], weights: Tensor) -> None:
        super().__init__()
        check_nonempty(components, "components")
        weights = as_tensor(weights, "weights", 1, "(K,)")
        check_positive(weights, "weights")
        if weights.shape[0] != len(components):
            raise ShapeError(
                "a mixture needs one weight per component", got=weights.shape[0], expected=len(components)
            )
        self.components = nn.ModuleList(components)
        self.register_buffer("log_weights", (weights / weights.sum()).log())

    def _joint(self, t: Tensor | float, x: Tensor) -> Tensor:
        parts: list[Tensor] = [c.log_prob(t, x) for c in self.components]  # type: ignore[operator]
        return torch.stack(parts, -1) + self.log_weights

    def log_prob(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return :math:`\log\rho_t(x)`, ``(...)``, at ``x (..., d)``."""
        return self._joint(t, x).logsumexp(-1)

    def score(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return :math:`\nabla\log\rho_t(x)`, ``(..., d)``; scores averaged under the posterior of the component."""
        # grad log sum_k w_k rho_k = sum_k p(k | x) grad log rho_k.
        posterior = self._joint(t, x).softmax(-1)
        scores: list[Tensor] = [c.score(t, x) for c in self.components]  # type: ignore[operator]
        return (torch.stack(scores, -1) @ posterior.unsqueeze(-1)).squeeze(-1)

    def sample(
        self, t: Tensor | float, sample_shape: SampleShape = (), generator: Generator = None
    ) -> Tensor:
        r"""Draw independent points of every :math:`\rho_t`: ``(*t.shape, *sample, d)``."""
        shape = as_sample_shape(sample_shape)
        source = as_generator(generator, self.log_weights.device)
        draws: list[Tensor] = [c.sample(t, shape, source) for c in self.components]  # type: ignore[operator]
        stacked = torch.stack(draws, -2)
        flat = stacked.shape[:-2].numel()
        pick = torch.multinomial(self.log_weights.exp(), flat, replacement=True, generator=source)
        index = pick.reshape(*stacked.shape[:-2], 1, 1).expand(*stacked.shape[:-2], 1, stacked.shape[-1])
        return stacked.gather(-2, index).squeeze(-2)


class LearnedFlow(MarginalFlow):
    r"""A flow given by a network, or any function, of time and state.

    Use it where the densities are to be learnt, from a residual or by regression.

    Args:
        function: A function ``function(t, x)`` with ``t`` expanded to ``x[..., :1]`` in the precision of ``x``. Returns
            the log density ``(...)`` or ``(..., 1)``, up to a constant, or the score ``(..., d)``.
        predicts: What the function returns: ``"log_density"`` or ``"score"``.
        reference: A flow whose log density or score is added, so that the function learns the difference
            only.
        sampler: A function ``sampler(t, n, generator) -> (*t.shape, n, d)``; or another flow, whose samples stand in.

    A residual of the forward equation doesn't see a constant in the log density, but does see how the
    normaliser changes in time.

    Raises:
        InvalidInputError: If ``predicts`` is unknown.

    Example:
        >>> flow = LearnedFlow(lambda t, x: -0.5 * x.square().sum(-1))
        >>> flow.score(0.0, torch.ones(1, 2))
        tensor([[-1., -1.]])
    """

    def __init__(
        self,
        function: Callable[[Tensor, Tensor], Tensor],
        predicts: Literal["log_density", "score"] = "log_density",
        reference: MarginalFlow | None = None,
        sampler: Sampler | MarginalFlow | None = None,
    ) -> None:
        super().__init__()
        check_choice(predicts, ("log_density", "score"), "predicts")
        self.function = function
        self.predicts = predicts
        self.reference = reference
        self.sampler = sampler

    def _call(self, t: Tensor | float, x: Tensor) -> tuple[Tensor, Tensor]:
        time = as_time(t, x)
        shared = time.to(x.dtype) if x.is_floating_point() else time
        return time, self.function(shared.expand(*x.shape[:-1], 1), x)

    def log_prob(self, t: Tensor | float, x: Tensor) -> Tensor:
        """Return the log density ``(...)`` up to a constant.

        Raises:
            UnavailableError: If the function is a score.
        """
        if self.predicts == "score":
            raise UnavailableError("a score gives no log density", hint="use the residual with form='score'")
        time, value = self._call(t, x)
        value = value.squeeze(-1) if value.ndim == x.ndim else value
        return value if self.reference is None else value + self.reference.log_prob(time, x)

    @ordinarily
    def score(self, t: Tensor | float, x: Tensor) -> Tensor:
        r"""Return :math:`\nabla\log\rho_t(x)`, ``(..., d)``."""
        if self.predicts == "log_density":
            return super().score(t, x)
        time, value = self._call(t, x)
        return value if self.reference is None else value + self.reference.score(time, x)

    def sample(
        self, t: Tensor | float, sample_shape: SampleShape = (), generator: Generator = None
    ) -> Tensor:
        """Draw points with the ``sampler``.

        Raises:
            UnavailableError: If none was given.
        """
        if self.sampler is None:
            raise UnavailableError(
                "this flow was given no sampler", hint="pass sampler=..., a function or another flow"
            )
        if isinstance(self.sampler, MarginalFlow):
            return self.sampler.sample(t, sample_shape, generator)
        shape, time = as_sample_shape(sample_shape), _as_times(t)
        x = self.sampler(time, math.prod(shape), as_generator(generator, time.device))
        return x.reshape(*time.shape, *shape, x.shape[-1])
