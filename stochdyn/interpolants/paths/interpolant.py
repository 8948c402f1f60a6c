"""The interpolant: a random path between two samples, whose law at every time is what networks learn from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_tensor,
    check_bool,
    check_choice,
    check_event_size,
    check_floating,
    check_ndim,
    check_nonempty,
    check_real,
    check_same_device,
    check_same_dtype,
    check_type,
    values_are_checked,
)
from stochdyn.core.forward.flow import as_time
from stochdyn.errors import InvalidInputError, ShapeError, TimeGridError
from stochdyn.interpolants.paths.latents import (
    BrownianLatent,
    ParabolicLatent,
    SigmoidLatent,
    SineSquaredLatent,
)
from stochdyn.interpolants.paths.schedules import (
    Constant,
    Cosine,
    CosineSquared,
    Linear,
    Remaining,
    Schedule,
    Sine,
    VariancePreserving,
    as_schedule,
)

__all__ = ["GAMMAS", "PATHS", "TARGETS", "Interpolant", "as_points", "check_pair", "check_times"]

Kind = Literal["two-sided", "one-sided", "mirror"]
Correction = Callable[[Tensor, Tensor, Tensor], Tensor]
#: Names of the ready-made paths, with the latent that each takes by default.
PATHS = {
    "linear": "brownian",
    "trig": "brownian",
    "encoder-decoder": "sin2",
    "one-sided-linear": "zero",
    "one-sided-trig": "zero",
    "vp": "zero",
    "mirror": "brownian",
}
GAMMAS: dict[str, type[Schedule]] = {
    "brownian": BrownianLatent,
    "sin2": SineSquaredLatent,
    "parabolic": ParabolicLatent,
    "sigmoid": SigmoidLatent,
}
#: Conditional means that a network can learn.
TARGETS = ("velocity", "path_velocity", "score", "noise_prediction", "start_prediction", "data_prediction")


class Interpolant(nn.Module):
    r"""A stochastic interpolant between :math:`x_0\sim\rho_0` and :math:`x_1\sim\rho_1`.

    .. math:: x_t = \alpha(t)\,x_0+\beta(t)\,x_1+\gamma(t)\,z,\qquad z\sim N(0,I)

    Its law at time t has a density :math:`\rho_t` that is carried along the velocity
    :math:`b=E[\dot x_t\mid x_t=x]`, and its score is :math:`s=-E[z\mid x_t=x]/\gamma`. On *one-sided* paths
    :math:`\rho_0` is the standard normal and :math:`x_0` plays the part of z, so :math:`s=-E[x_0\mid x_t]/\alpha`;
    on *mirror* paths :math:`\rho_0=\rho_1` and :math:`x_0` isn't used.

    Which path? From noise to data, ``"one-sided-linear"``: one network gives flow, score and densities; ``"one-sided-trig"`` where data
    are standardised, since it keeps their variance; ``"vp"`` to meet models of variance-preserving diffusion. Between two samples,
    ``"linear"``: with ``gamma="zero"`` for a flow alone, with the Brownian latent for an SDE or a Schrödinger bridge. ``"trig"`` keeps the
    variance of standardised ends there. ``"encoder-decoder"`` goes through the standard normal at time 1/2, so that two laws can be joined
    that were learnt apart. ``"mirror"`` makes new draws of a law out of its own.

    Args:
        path: The name of a path: ``"linear"``, ``"trig"``, ``"encoder-decoder"``, ``"one-sided-linear"``, ``"one-sided-trig"``,
            ``"vp"``, ``"mirror"``; or a pair of schedules (or functions of time) for alpha and beta.
        gamma: The size of the latent: ``"brownian"`` :math:`\sigma\sqrt{t(1-t)}`, ``"sin2"`` :math:`\sigma\sin^2\pi t`, ``"parabolic"``
            :math:`\sigma t(1-t)`, ``"sigmoid"``, ``"zero"``, a schedule or a function of time. None takes the
            path's own: ``"sin2"`` for the encoder-decoder, ``"zero"`` for one-sided paths, else ``"brownian"``.
        scale: The factor :math:`\sigma` on a named gamma, in units of the data.
        correction: A function ``(t, x0, x1) -> (..., d)``, often a network, that bends the path between its ends:
            :math:`t(1-t)\,c(t,x_0,x_1)` is added to :math:`x_t`.
        one_sided: Whether a path of one's own without a latent starts in the standard normal.

    Raises:
        InvalidInputError: If a name is unknown, alpha or beta don't take the values 1, 0 and 0, 1 at the ends, or
            gamma doesn't vanish there, or isn't positive between.

    Example:
        >>> it = Interpolant("linear", "brownian")
        >>> it.sample(0.5, torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2))
        tensor([[1., 1.]])

    Reference:
        Albergo, Boffi and Vanden-Eijnden, "Stochastic interpolants: a unifying framework for flows and diffusions", 2023,
        definition 2.1 and tables 4 and 8.
    """

    _derived_ = ("facts",)

    def __init__(
        self,
        path: str
        | tuple[Schedule | Callable[[Tensor], Tensor], Schedule | Callable[[Tensor], Tensor]] = "linear",
        gamma: str | Schedule | Callable[[Tensor], Tensor] | None = None,
        scale: float = 1.0,
        *,
        correction: Correction | None = None,
        one_sided: bool = False,
    ) -> None:
        super().__init__()
        check_real(scale, "scale", above=0.0)
        check_bool(one_sided, "one_sided")
        self.scale = float(scale)
        if isinstance(path, str):
            check_choice(path, tuple(PATHS), "path")
        elif not isinstance(path, tuple) or len(path) != 2:
            raise InvalidInputError("path must be a name or a pair (alpha, beta)", got=repr(path))
        if gamma is None:
            gamma = PATHS[path] if isinstance(path, str) else "zero" if one_sided else "brownian"
        self.gamma = _latent(gamma, self.scale)
        self.alpha, self.beta = _coefficients(path, self.gamma)
        self.path = path if isinstance(path, str) else "custom"
        ends_normal = one_sided or (isinstance(path, str) and (path.startswith("one-sided") or path == "vp"))
        self.kind: Kind = "two-sided"
        if path == "mirror":
            self.kind = "mirror"
        elif ends_normal and self.gamma.is_zero:
            self.kind = "one-sided"
        self.starts_normal = ends_normal
        if correction is not None and not callable(correction):
            raise InvalidInputError("correction must be callable", got=type(correction).__name__)
        self.correction = correction
        # the commonest path in the fewest operations: small networks train no faster than this is evaluated
        self.straight = (
            isinstance(self.alpha, Remaining) and isinstance(self.beta, Linear) and correction is None
        )
        # what fields determine which others, and where: found once, and kept here
        self.facts: dict[object, tuple[bool, bool, bool] | tuple[int, ...]] = {}
        self._check_ends()

    def _check_ends(self) -> None:
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        inside = torch.linspace(0, 1, 101, dtype=torch.float64)[1:-1]
        with torch.no_grad():
            values = {name: getattr(self, name).value(ends).double() for name in ("alpha", "beta", "gamma")}
            between = self.gamma.value(inside)
        wanted = {"alpha": [1.0, 0.0], "beta": [0.0, 1.0], "gamma": [0.0, 0.0]}
        if self.kind == "mirror":
            wanted |= {"alpha": [0.0, 0.0], "beta": [1.0, 1.0]}
        for name, value in values.items():
            target = torch.tensor(wanted[name], dtype=torch.float64)
            if value.shape != target.shape or not bool((value - target).abs().max() < 1e-6):
                raise InvalidInputError(
                    f"{name} must be {wanted[name][0]:g} at time 0 and {wanted[name][1]:g} at time 1",
                    got=f"{value.tolist()}",
                    hint="the path would not run from the first law to the second",
                )
        if not self.gamma.is_zero and not bool((between > 0).all()):
            raise InvalidInputError(
                "gamma must be positive between the ends", got=f"minimum {float(between.min()):g}"
            )

    @property
    def has_latent(self) -> bool:
        """Whether gamma is more than zero."""
        return not self.gamma.is_zero

    @property
    def noise(self) -> Schedule:
        """The schedule of what is Gaussian: gamma, or alpha on one-sided paths."""
        return self.alpha if self.kind == "one-sided" else self.gamma

    def mean(self, t: Tensor | float, x0: Tensor, x1: Tensor) -> Tensor:
        r"""Return :math:`I(t,x_0,x_1)`, the path without its latent, ``(..., d)``."""
        _check_ends_fit(x0, x1)
        time = as_time(t, x1)
        if self.straight:
            return torch.lerp(x0, x1, time)
        mixed = self.beta.value(time) * x1
        if self.kind != "mirror":
            mixed = mixed + self.alpha.value(time) * x0
        if self.correction is not None:
            mixed = mixed + time * (1 - time) * self.correction(time.expand(*x1.shape[:-1], 1), x0, x1)
        return mixed

    def mean_derivative(self, t: Tensor | float, x0: Tensor, x1: Tensor) -> Tensor:
        r"""Return :math:`\partial_tI(t,x_0,x_1)`, ``(..., d)``."""
        if self.straight:
            return x1 - x0
        time = as_time(t, x1)
        slope = self.beta.derivative(time) * x1
        if self.kind != "mirror":
            slope = slope + self.alpha.derivative(time) * x0
        if self.correction is not None:
            slope = slope + self._correction_slope(time, x0, x1)
        return slope

    def _correction_slope(self, t: Tensor, x0: Tensor, x1: Tensor) -> Tensor:
        assert self.correction is not None
        correction = self.correction
        each = t.expand(*x1.shape[:-1], 1).contiguous()

        def bend(s: Tensor) -> Tensor:
            return s * (1 - s) * correction(s, x0, x1)

        return torch.func.jvp(bend, (each,), (torch.ones_like(each),))[1]

    def sample(
        self,
        t: Tensor | float,
        x0: Tensor,
        x1: Tensor,
        z: Tensor | None = None,
        generator: torch.Generator | int | None = None,
    ) -> Tensor:
        r"""Return :math:`x_t`, ``(..., d)``.

        Args:
            t: The times in [0, 1]: a number, or a tensor that broadcasts to ``x1[..., :1]``.
            x0: The points of the first law, ``(..., d)``.
            x1: The points of the second law, paired with them, ``(..., d)``.
            z: The standard normal latents, ``(..., d)``; drawn if None, and not used where gamma is zero.
            generator: The source of randomness of drawn latents.

        Raises:
            TimeGridError: If a time is outside [0, 1].
            ShapeError: If the points differ in shape, or the times don't fit.
            EmptyDataError: If there are none.
            DtypeMismatchError, DeviceMismatchError: If they differ in precision or device.
        """
        x0, x1, z = as_points(x0, x1, z)
        check_pair(x0, x1, z)
        time = as_time(t, x1)
        check_times(time)
        if z is None and self.has_latent:
            source = as_generator(generator, x1.device)
            z = torch.randn(x1.shape, dtype=x1.dtype, device=x1.device, generator=source)
        mixed = self.mean(time, x0, x1)
        return mixed + self.gamma.value(time) * z if self.has_latent and z is not None else mixed

    def target(self, name: str, t: Tensor | float, x0: Tensor, x1: Tensor, z: Tensor | None) -> Tensor:
        r"""Return the random variable whose mean given :math:`x_t` is the field ``name``, ``(..., d)``.

        ``"velocity"``: :math:`\dot x_t`; ``"path_velocity"``: :math:`\partial_tI`; ``"score"``: :math:`-z/\gamma`;
        ``"noise_prediction"``: z; ``"start_prediction"``: :math:`x_0`; ``"data_prediction"``: :math:`x_1`. On one-sided paths :math:`x_0` is z.

        Raises:
            InvalidInputError: If the name is unknown, or the path has no such field.
        """
        check_choice(name, TARGETS, "name")
        _check_ends_fit(x0, x1)
        if z is not None and (not isinstance(z, Tensor) or z.shape != x1.shape or z.dtype != x1.dtype):
            check_pair(x0, x1, z)
        time = as_time(t, x1)
        if name == "data_prediction":
            return x1
        if name == "start_prediction":
            return x0
        if name in ("velocity", "path_velocity"):
            slope = self.mean_derivative(time, x0, x1)
            if name == "path_velocity" or not self.has_latent:
                return slope
            if z is None:
                raise InvalidInputError("the velocity of a path with a latent needs z", got="None")
            return slope + self.gamma.derivative(time) * z
        latent = x0 if self.kind == "one-sided" else z
        if self.kind != "one-sided" and not self.has_latent:
            raise InvalidInputError(
                f"this path has no {name}", got="gamma = 0", hint="give it a latent, or use a one-sided path"
            )
        if latent is None:
            raise InvalidInputError(f"the target of the {name} needs z", got="None")
        return latent if name == "noise_prediction" else -latent / self.noise.value(time)

    def optimal_epsilon(self, t: Tensor | float) -> Tensor:
        r"""Return the noise that minimises the path divergence of a model with one network.

        The errors of velocity and score are then multiples of one another, :math:`\delta b=c\,\delta\eta` and
        :math:`\delta s=-\delta\eta/\gamma`, and :math:`\varepsilon^*=\gamma|c|` whatever the size of the error:

        .. math:: \varepsilon^*=\alpha\left|\dot\alpha-\alpha\dot\beta/\beta\right|\ \text{(one-sided)},\qquad
                  \varepsilon^*=\gamma|\dot\gamma|\ \text{(mirror)}

        For one-sided paths it grows without bound towards time 0.

        Raises:
            InvalidInputError: If the path is two-sided, where it depends on the errors.
        """
        time = t if isinstance(t, Tensor) else torch.tensor(float(t))
        if self.kind == "mirror":
            return 0.5 * self.gamma.square_derivative(time).abs()
        if self.kind != "one-sided":
            raise InvalidInputError(
                "the optimal noise of a two-sided path depends on the errors of both networks",
                got=f"path {self.path!r}",
                hint="give a number, or stochdyn.interpolants.optimal_epsilon(model, truth)",
            )
        rate = 0.5 * self.alpha.square_derivative(time)
        share = self.alpha.square(time) * self.beta.derivative(time) / self.beta.value(time)
        return (rate - share).abs()


def _check_ends_fit(x0: Tensor, x1: Tensor) -> None:
    """Raise a typed error unless two ends fit together, at next to no cost where they do."""
    fit = isinstance(x0, Tensor) and isinstance(x1, Tensor) and x0.shape == x1.shape and x0.dtype == x1.dtype
    if not fit or not x1.is_floating_point():
        check_pair(x0, x1)


def as_points(x0: Any, x1: Any, z: Any = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return points of any form as tensors; those that are tensors stay as they are."""
    x1 = x1 if isinstance(x1, Tensor) else as_tensor(x1, "x1")
    x0 = x0 if isinstance(x0, Tensor) else as_tensor(x0, "x0", like=x1)
    z = z if z is None or isinstance(z, Tensor) else as_tensor(z, "z", like=x1)
    return x0, x1, z


def check_pair(x0: Tensor, x1: Tensor, z: Tensor | None = None) -> None:
    """Raise a typed error unless points fit together."""
    for name, x in (("x0", x0), ("x1", x1), ("z", z)):
        if x is None:
            continue
        check_floating(x, name)
        check_ndim(x, tuple(range(1, 12)), name, "(..., d)")
        check_nonempty(x, name)
    check_type(x0, Tensor, "x0")
    check_type(x1, Tensor, "x1")
    check_event_size(x0, x1.shape[-1], "x0")
    if x0.shape != x1.shape or (z is not None and z.shape != x1.shape):
        shapes = [tuple(x.shape) for x in (x0, x1, z) if x is not None]
        raise ShapeError("x0, x1 and z must have one shape", got=shapes)
    check_same_dtype(x0=x0, x1=x1, z=z)
    check_same_device(x0=x0, x1=x1, z=z)


def check_times(t: Tensor) -> None:
    """Raise unless all times lie in [0, 1]."""
    if values_are_checked() and not bool(((t >= 0) & (t <= 1)).all()):
        bad = t.detach().flatten()
        bad = bad[~((bad >= 0) & (bad <= 1))]
        raise TimeGridError("t must lie in [0, 1]", got=f"{float(bad[0]):g}", expected="[0, 1]")


def _latent(gamma: str | Schedule | Callable[[Tensor], Tensor], scale: float) -> Schedule:
    if isinstance(gamma, str):
        check_choice(gamma, (*GAMMAS, "zero"), "gamma")
        return Constant(0.0) if gamma == "zero" else GAMMAS[gamma](scale)
    return as_schedule(gamma, "gamma")


def _coefficients(path: object, gamma: Schedule) -> tuple[Schedule, Schedule]:
    if isinstance(path, tuple):
        return as_schedule(path[0], "alpha"), as_schedule(path[1], "beta")
    if path in ("linear", "one-sided-linear"):
        return Remaining(), Linear()
    if path in ("trig", "one-sided-trig"):
        return Cosine(gamma), Sine(gamma)
    if path == "encoder-decoder":
        return CosineSquared(True), CosineSquared(False)
    if path == "vp":
        return VariancePreserving(), Linear()
    return Constant(0.0), Constant(1.0)
