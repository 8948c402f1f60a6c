"""Paths of stochastic differential equations as Pyro distributions, and the sites that carry them."""

from __future__ import annotations

import copy
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.distributions.torch_distribution import TorchDistributionMixin
from torch import Tensor
from torch.distributions import constraints

from stochdyn._checks import (
    as_time_grid,
    check_event_size,
    check_finite,
    check_ndim,
    check_nonempty,
    check_same_device,
    check_type,
    values_are_checked,
)
from stochdyn._lending import lent
from stochdyn.core.data.panel_grid import PanelGrid
from stochdyn.core.gaussian.exact_steps import takes_exact_steps
from stochdyn.core.law.initial import DistributionStart, FixedStart, InitialLaw, as_initial
from stochdyn.core.law.transition import euler_log_prob
from stochdyn.core.sde.coefficients import Matrix
from stochdyn.core.sde.equation import SDE
from stochdyn.core.sde.grids import first_time, noise_steps
from stochdyn.core.sde.methods import Method, as_method
from stochdyn.core.sde.noise import NoiseSteps
from stochdyn.core.sde.solvers import batch_shape_of, draw_increments, integrate, stepped
from stochdyn.errors import InvalidInputError, ShapeError, SingularDiffusionError
from stochdyn.infer.constraints import PinnedPath
from stochdyn.infer.driven import sample_driven
from stochdyn.infer.law_distribution import LawDistribution

__all__ = ["DiffusionPath", "PathIncrements", "sample_path"]


class DiffusionPath(LawDistribution):
    r"""The law of an SDE's path on a grid, as a distribution with event ``(T, d)``.

    The density is that of the Euler scheme on the grid (:func:`stochdyn.core.law.transition.euler_log_prob`):

    .. math::
        \log p_0(x_0) + \sum_n \log N\big(x_{n+1};\ x_n + b(t_n, x_n)\Delta_n,\ GG^\top(t_n, x_n)\Delta_n\big)

    A fixed start has no density; it is pinned, so samplers that move in unconstrained space leave it alone.

    Args:
        sde: The equation. Its coefficients may carry batch axes (parameters drawn in a Pyro model): write
            them so that they broadcast with ``x (*batch, d)``, such as ``rate[..., None] * x``, and give a
            batched strength as ``Scalar``.
        initial: A distribution with event ``(d,)``, or a tensor ``(d,)`` or ``(*batch, d)``.
        ts: The strictly increasing times ``(T,)``, data of any kind, ``(*batch, T)`` where every series has its own, or the grid
            of a panel.
        method: The integration method that draws paths; the density is Euler's, and the exact one for ``"exact"``.

    Raises:
        TimeGridError: If the grid isn't strictly increasing.
        ShapeError: If drift, diffusion and start don't fit together, or a path given to ``log_prob``
            doesn't fit.
        DiffusionError: If the diffusion isn't positive at the start.
        DeviceMismatchError: If grid, start and equation live on different devices.
        DtypeMismatchError: If drift or diffusion would change the precision of the state.
        NonFiniteError: By ``log_prob``, for a path with NaN or infinity, if validation is on.
        SingularDiffusionError: By ``log_prob``, if there is no density in state space (use
            :func:`sample_path`).

    Example:
        >>> from stochdyn.core import SDE
        >>> path = DiffusionPath(SDE(lambda t, x: -x, 1.0), torch.zeros(2), torch.linspace(0, 1, 11))
        >>> path.event_shape, path.sample().shape
        (torch.Size([11, 2]), torch.Size([11, 2]))
    """

    has_rsample = True
    _carried = ("sde", "initial", "ts", "method", "steps")

    def __init__(
        self,
        sde: SDE,
        initial: Any,
        ts: Tensor | PanelGrid,
        method: str | Method = "euler",
        validate_args: bool | None = None,
    ) -> None:
        ts = ts.ts if isinstance(ts, PanelGrid) else ts
        if isinstance(ts, Tensor) and isinstance(initial, Tensor):
            check_same_device(ts=ts, initial=initial)
        check_type(sde, SDE, "sde")
        ts = as_time_grid(ts, batch=True)
        self.sde = sde
        self.initial: InitialLaw = as_initial(initial)
        self.ts = ts
        self.method = as_method(method)
        probe = start_of(self.initial)
        check_nonempty(probe, "initial")
        check_same_device(ts=ts, initial=probe, **dict(sde.named_parameters()))
        sde.check(first_time(ts, probe), probe)
        #: The recursion of a noise with memory on the grid, None for Brownian motion.
        self.steps = noise_steps(sde.noise, ts, probe.dtype) if sde.noise.num_states else None
        batch = batch_shape_of(sde, probe, ts, self.steps)
        super().__init__(batch, torch.Size((ts.shape[-1], probe.shape[-1])), validate_args=validate_args)

    @property
    def support(self) -> constraints.Constraint:
        """Real paths, pinned at a fixed start."""
        if isinstance(self.initial, FixedStart):
            return PinnedPath(self.initial.point)
        return constraints.independent(constraints.real, 2)

    def draw_start(self, sample_shape: tuple[int, ...]) -> Tensor:
        """Return starts ``(*sample, *batch, d)``."""
        shape = (*sample_shape, *self.batch_shape, self.event_shape[-1])
        if isinstance(self.initial, DistributionStart):
            base = self.initial.distribution
            if base.batch_shape != self.batch_shape:
                base = base.expand(self.batch_shape)
            return DistributionStart(base).draw(tuple(sample_shape), None)
        if isinstance(self.initial, FixedStart):
            return self.initial.point.expand(shape)
        return self.initial.draw(shape[:-1], None)

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw paths, differentiable in all parameters."""
        x0 = self.draw_start(tuple(sample_shape))
        dw, memory = draw_increments(self.sde, x0, self.ts)
        return integrate(self.sde, x0, self.ts, dw, memory, method=self.method).x.movedim(0, -2)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the Euler log density of paths ``(..., T, d)``."""
        check_ndim(value, tuple(range(2, 16)), "value", "(..., time, dim)")
        check_event_size(value, self.event_shape[0], "value", -2)
        check_event_size(value, self.event_shape[1], "value", -1)
        if self._validate_args:
            self._validate_sample(value)
        # Batch axes that only the parameters have would else be taken for times, which lead inside.
        batch = torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        value = value.expand(*batch, *self.event_shape)
        log_prob = euler_log_prob(stepped(self.sde, self.method, self.ts), self.initial, self.ts, value)
        return log_prob.expand(batch)

    def _validate_sample(self, value: Tensor) -> None:
        """Raise a typed error unless ``value`` is finite, fits the batch and begins at a fixed start."""
        check_finite(value.detach(), "the path")
        try:
            torch.broadcast_shapes(value.shape[:-2], self.batch_shape)
        except RuntimeError as error:
            raise ShapeError(
                "the path doesn't fit the batch",
                got=f"shape {tuple(value.shape)}",
                expected=f"(..., {', '.join(map(str, (*self.batch_shape, *self.event_shape)))})",
            ) from error
        support = self.support
        if not values_are_checked():
            return
        if isinstance(support, PinnedPath) and not bool(support.check(value).all()):
            pair = torch.broadcast_tensors(value[..., 0, :], support.start)
            first, start = (p.reshape(-1, p.shape[-1]) for p in pair)
            worst = (first - start).abs().sum(-1).argmax()
            raise InvalidInputError(
                "the path doesn't begin at the fixed start",
                got=f"x[0]={first[worst].tolist()}",
                expected=start[worst].tolist(),
                hint="give a distribution as initial if the start isn't known",
            )


class PathIncrements(LawDistribution):
    """Standard increments of the noise on a grid: independent Gaussians, event ``(T-1, m * R)``.

    The layout is that of :class:`stochdyn.core.sde.noise.NoiseProcess`. The equation and the start are carried
    along, so that a guide can see what the increments drive.

    Args:
        sde: The equation that the increments drive.
        x0: ``(*batch, d)`` start.
        ts: ``(T,)`` times.
        memory0: ``(*batch, m, K)`` initial memory states, or None.
        method: The integration method that turns the increments into a path.
        steps: The recursion of the noise on the grid, where it is known already.

    Example:
        >>> from stochdyn.core import SDE
        >>> PathIncrements(SDE(lambda t, x: -x, 1.0), torch.zeros(2), torch.linspace(0, 1, 11)).sample().shape
        torch.Size([10, 2])
    """

    support = constraints.independent(constraints.real, 2)
    has_rsample = True
    _carried = ("sde", "x0", "ts", "memory0", "method", "steps", "scale")

    def __init__(
        self,
        sde: SDE,
        x0: Tensor,
        ts: Tensor,
        memory0: Tensor | None = None,
        method: str | Method = "euler",
        steps: NoiseSteps | None = None,
        validate_args: bool | None = None,
    ) -> None:
        check_type(sde, SDE, "sde")
        check_type(x0, Tensor, "x0")
        check_type(ts, Tensor, "ts")
        check_nonempty(ts, "ts")
        self.sde = sde
        self.x0 = x0
        self.ts = ts
        self.memory0 = memory0
        self.method = as_method(method)
        #: The recursion of the noise on the grid.
        self.steps = noise_steps(sde.noise, ts, x0.dtype) if steps is None else steps
        #: Standard deviations ``(N, m R)`` of the increments, time leading; ``(N, *batch, m R)`` with a grid per series.
        self.scale = scale_of(self.steps, sde.noise_dim(first_time(ts, x0), x0))
        event = torch.Size((self.scale.shape[0], self.scale.shape[-1]))
        super().__init__(self.scale.shape[1:-1], event, validate_args=validate_args)

    def starting_at(self, x0: Tensor, memory0: Tensor | None) -> PathIncrements:
        """Return the same increments for a path from another start."""
        new = copy.copy(self)
        new.x0, new.memory0 = x0, memory0
        return new

    def rsample(self, sample_shape: Any = torch.Size()) -> Tensor:
        """Draw increments."""
        shape = self._extended_shape(torch.Size(sample_shape))
        return torch.randn(shape, dtype=self.scale.dtype, device=self.scale.device) * self.scale.movedim(
            0, -2
        )

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log density of increments ``(..., T-1, m R)``."""
        check_event_size(value, self.event_shape[0], "value", -2)
        check_event_size(value, self.event_shape[1], "value", -1)
        scale = self.scale.movedim(0, -2)
        log_prob = dist.Normal(torch.zeros_like(scale), scale).to_event(2).log_prob(value)
        return log_prob.expand(torch.broadcast_shapes(log_prob.shape, self.batch_shape))


def start_of(initial: InitialLaw) -> Tensor:
    """Return one start without touching the random state."""
    if isinstance(initial, FixedStart):
        return initial.point.detach()
    if isinstance(initial, DistributionStart):
        try:
            mean = initial.distribution.mean.detach()
            if not values_are_checked() or bool(torch.isfinite(mean).all()):
                return mean
        except NotImplementedError:
            pass
    with lent(0):
        return initial.draw((), None).detach()


def scale_of(steps: NoiseSteps, channels: int) -> Tensor:
    """Return the standard deviations of increments, in the layout of NoiseProcess, from the recursion of the noise."""
    variance = steps.variance
    brownian = variance[..., :1].expand(*variance.shape[:-1], channels)
    residual = variance[..., None, 1:].expand(*variance.shape[:-1], channels, -1).flatten(-2)
    return torch.cat([brownian, residual], -1).sqrt()


def is_degenerate(sde: SDE, x0: Tensor, ts: Tensor) -> bool:
    """Return whether paths of the equation lack a density in state space by its form: memory, or fewer channels than components.

    The sites of a model mustn't depend on the values of its parameters, so a square matrix counts as regular, however
    small it gets.
    """
    if sde.noise.num_states:
        return True
    with torch.no_grad():
        g = sde.diffusion(first_time(ts, x0), x0)
    return isinstance(g, Matrix) and g.value.shape[-1] < g.value.shape[-2]


def sample_path(
    name: str,
    sde: SDE,
    initial: Any,
    ts: Tensor | PanelGrid,
    method: str | Method | None = None,
    noise_space: bool | None = None,
) -> Tensor:
    """Sample a path in a Pyro model, whatever drives it.

    Brownian paths with a density are one site ``name``, of :class:`DiffusionPath`, which takes Euler steps on the grid: halve them until
    the posterior no longer changes. A drift that says that it is affine (:class:`~stochdyn.core.AffineField`) takes exact steps where
    each component has a channel of noise, and its posterior doesn't depend on the grid. Where no density exists
    (noise with memory, or a ``(d, m)`` matrix with fewer channels than components) or is known (another method than Euler's)
    the random sites are the driving increments ``{name}_dw``, a random start ``{name}_0`` and, for noise with a past,
    ``{name}_past``; ``name`` is then a deterministic site. Which of the two it is depends on the form of the equation alone
    and never on the values of its parameters; a singular square matrix needs ``noise_space=True``.

    Args:
        name: The name of the site.
        sde: The equation.
        initial: A distribution with event ``(d,)``, or a tensor for a fixed start.
        ts: The times ``(T,)``, data of any kind, ``(*batch, T)`` where every series has its own, or the grid of a panel.
        method: The integration method of the path; None takes exact steps where the drift says that it is affine, else Euler's.
        noise_space: True for the noise form, False for the path itself; None chooses by the form of the equation.

    Returns:
        The path, ``(*batch, T, d)``.

    Raises:
        TimeGridError: If the grid isn't strictly increasing; and the other errors of :class:`DiffusionPath`.
        SingularDiffusionError: If ``noise_space=False`` and there is no density in state space.

    Example:
        >>> from stochdyn.core import SDE
        >>> strength = torch.tensor([[0.0], [1.0]])  # noise moves the velocity alone
        >>> oscillator = SDE(lambda t, x: torch.stack([x[..., 1], -x[..., 0]], -1), strength)
        >>> ts = torch.linspace(0, 1, 11)
        >>> trace = pyro.poutine.trace(lambda: sample_path("x", oscillator, torch.zeros(2), ts)).get_trace()
        >>> trace.nodes["x_dw"]["value"].shape, trace.nodes["x"]["value"].shape
        (torch.Size([10, 1]), torch.Size([11, 2]))
    """
    if method is None:
        path = DiffusionPath(sde, initial, ts)
        if noise_space is not False and takes_exact_steps(sde, path.ts, start_of(path.initial)):
            path = DiffusionPath(sde, initial, ts, "exact")
    else:
        path = DiffusionPath(sde, initial, ts, method)
    degenerate = is_degenerate(sde, start_of(path.initial), path.ts)
    euler = path.method.name == "euler"
    if noise_space is False and (degenerate or not euler):
        raise SingularDiffusionError(
            "paths of this equation have no density in state space"
            if degenerate
            else f"the density of paths by method {path.method.name!r} isn't known",
            hint="leave noise_space=None",
        )
    if not degenerate and not noise_space and euler:
        return pyro.sample(name, path)
    return pyro.deterministic(name, sample_noise(name, path), event_dim=2)


def sample_noise(name: str, path: DiffusionPath) -> Tensor:
    """Sample the noise sites of ``path`` and return the path that they drive; see :func:`sample_path`."""
    sde, ts, batch = path.sde, path.ts, path.batch_shape
    if isinstance(path.initial, DistributionStart):
        x0 = pyro.sample(f"{name}_0", _spread(path.initial.distribution, batch), infer={"path": name})  # type: ignore[arg-type]
    elif isinstance(path.initial, FixedStart):
        x0 = path.initial.point
    else:
        raise InvalidInputError("a simulated start has no density", hint="give a distribution or a tensor")
    memory0 = None
    factor = sde.noise.initial_factor(dtype=x0.dtype, device=x0.device)
    if factor is not None:
        channels = sde.noise_dim(first_time(ts, x0), x0)
        standard = x0.new_zeros(channels, factor.shape[0])
        past = dist.Normal(standard, torch.ones_like(standard)).to_event(2)
        memory0 = pyro.sample(f"{name}_past", _spread(past, batch), infer={"path": name}) @ factor  # type: ignore[arg-type]
    return sample_driven(name, _spread(PathIncrements(sde, x0, ts, memory0, path.method, path.steps), batch))


def _callable(law: Any) -> Any:
    """Return a distribution of torch's as one that ``pyro.sample`` takes."""
    if isinstance(law, TorchDistributionMixin):
        return law
    kind = type(type(law).__name__, (type(law), TorchDistributionMixin), {})
    new: Any = object.__new__(kind)
    new.__dict__.update(law.__dict__)
    return new


def _spread(law: Any, batch: torch.Size) -> Any:
    """Return ``law`` for a whole batch: without a plate, too, every series has noise of its own."""
    law = _callable(law)
    return law.expand(torch.broadcast_shapes(law.batch_shape, batch))
