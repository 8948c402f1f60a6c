"""Training: regressions whose minimisers are the fields of an interpolant."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stochdyn._checks import (
    as_tensor,
    check_bool,
    check_callable,
    check_choice,
    check_nonempty,
    check_positive_int,
    check_real,
    check_same_device,
    check_same_dtype,
    check_type,
)
from stochdyn.core.law.path import Estimate
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.interpolants.fields.conditions import paired_condition
from stochdyn.interpolants.fields.conversions import anchors
from stochdyn.interpolants.fields.networks import Fields, Network
from stochdyn.interpolants.paths.interpolant import Interpolant, check_pair, check_times
from stochdyn.interpolants.paths.latents import BrownianLatent
from stochdyn.interpolants.sampling.starts import Starts
from stochdyn.interpolants.training.couplings import Coupling, IndependentCoupling, as_coupling
from stochdyn.objectives.base import Objective, ObjectiveValue

if TYPE_CHECKING:
    from stochdyn.interpolants.sampling.generator import InterpolantGenerator

__all__ = ["InterpolantRegression"]

Weight = Callable[[Tensor], Tensor]

#: How near to 0 and 1 times of training may come.
_MARGIN = 1e-5


class InterpolantRegression(Objective):
    r"""Learn one or two fields of an interpolant.

    .. math:: \ell=\sum_f\int_0^1w_f(t)\,E\left[\tfrac12|\hat f(t,x_t)|^2-y_f\cdot\hat f(t,x_t)\right]dt

    with :math:`y_f` the random variable whose conditional mean is the field: :math:`\dot x_t` for the velocity,
    :math:`\partial_tI` for v, :math:`-z/\gamma` for the score, :math:`z` for the noise_prediction, :math:`x_0` and :math:`x_1` for the
    means of the ends. The loss exceeds its minimum by half the mean squared error of the field, and may be negative. (Where the
    path has no latent, :math:`\tfrac12|\hat f-y_f|^2` takes the place of the bracket, which differs by a constant.)

    One field determines all others on one-sided and mirror paths, two do on others; with a velocity alone the model has a
    probability flow, but no score. Which one to learn? A velocity with a noise prediction on two-sided paths (both are bounded, and give SDEs
    and densities); a velocity alone for a flow. On one-sided paths a velocity or a data prediction: the first has one scale at all
    times, the second is what guidance by observations differentiates, and the better one where data lie near a surface. Noise
    predictions are for networks that come from diffusion models, scores for comparisons.

    The words *noise prediction* and *data prediction* are those of most diffusion libraries;
    "denoiser" is the first of them in the interpolants paper and the second elsewhere, so it is no name here.

    Args:
        interpolant: The path.
        velocity: The network for :math:`b=E[\dot x_t\mid x_t]`, called as ``net(t, x)`` with ``t (n, 1)``, or
            ``net(t, x, condition)``. For networks with other arguments see :class:`NetworkAdapter`.
        score: The network for :math:`\nabla\log\rho_t`.
        noise_prediction: The network for :math:`\eta_z=E[z\mid x_t]`; on one-sided paths for :math:`E[x_0\mid x_t]`.
        data_prediction: The network for :math:`\eta_1=E[x_1\mid x_t]`.
        start_prediction: The network for :math:`\eta_0=E[x_0\mid x_t]`.
        path_velocity: The network for :math:`E[\partial_tI\mid x_t]`, the velocity without the part of the latent.
        coupling: How starts and ends are paired: ``"independent"``, ``"ot"`` (a permutation), ``"entropic"`` (of strength :math:`2\sigma^2`
            with the scale of the interpolant, which gives the Schrödinger bridge), or a :class:`Coupling`. Couplings respect conditions by
            default.
        reuse: The number of steps that a coupled batch serves, each with fresh times and latents.
        base: The law of the starts, a distribution with event ``(d,)``. If None, it is the standard normal where the path starts
            there or batches come without starts; else it is the law of the starts in the data, whose density is taken to be that of the
            Gaussian with their moments.
        antithetic: Whether to evaluate at both signs of the latent, which removes the singularities of targets at the ends. None
            does so where it pays: for a score, and for a velocity with the Brownian latent.
        times: How the times of a batch are drawn: ``"stratified"`` spreads them evenly, ``"uniform"`` draws them independently, and
            ``"late"`` spreads :math:`(1-t)^{1/4}` evenly; or a function ``times(n) -> (n,)`` with values in [0, 1]. Features of the
            size w, in units of the data's spread, are decided where :math:`1-t` is about w: half of the late times lie in the last
            sixteenth of the path. Take them for sharp laws, such as the posteriors of precise data.
        weights: The functions of time that weigh the losses, by name of field. On the ``"vp"`` path velocities are weighed with
            :math:`\alpha^2` unless something else is given, since their targets are singular at time 1. Predictions that the
            velocity divides by the distance from an end are weighed with its inverse square, up to 10 000, which makes their
            loss that of a velocity.
        condition_dropout: The share of a batch whose condition is replaced by ``null_condition`` (for classifier-free guidance).
        null_condition: A label or a context vector that stands for no condition.
        anchored: Whether a prediction that the velocity divides by the distance from an end is held to what it must be there: the
            data prediction at time 1, say, to the point itself. Predictions are then as good as velocities. Switch it off for
            fields that were not trained here and whose data lie on points or surfaces, off which a point isn't its own prediction.
        denoiser: A word with two meanings, which is refused with an explanation.

    Batches are ``x1 (n, *event)``; pairs ``(x0, x1)``; ``(x0, x1, condition)``; or a dict of these names. On paths that start in the
    standard normal they have no ``x0``. Conditions are labels ``(n,)`` or contexts ``(n, c)``.

    Raises:
        InvalidInputError: If no field, or more than two are given, or they don't belong to the path; and for options that
            don't exist.

    Example:
        >>> from stochdyn.interpolants import FieldNetwork
        >>> it = Interpolant("linear")
        >>> objective = InterpolantRegression(it, velocity=FieldNetwork(2), noise_prediction=FieldNetwork(2), coupling="ot")
        >>> value = objective((torch.randn(64, 2), torch.randn(64, 2) + 3))
        >>> sorted(value.terms)
        ['noise_prediction', 'velocity']

    Reference:
        Albergo, Boffi and Vanden-Eijnden, "Stochastic interpolants", 2023, theorems 2.7 to 2.10 and appendix C (antithetic).
    """

    def __init__(
        self,
        interpolant: Interpolant,
        *,
        velocity: Network | None = None,
        score: Network | None = None,
        noise_prediction: Network | None = None,
        data_prediction: Network | None = None,
        start_prediction: Network | None = None,
        path_velocity: Network | None = None,
        coupling: str | Coupling = "independent",
        reuse: int = 1,
        base: Any = None,
        antithetic: bool | None = None,
        times: str | Callable[[int], Tensor] = "stratified",
        weights: Mapping[str, Weight] | None = None,
        condition_dropout: float = 0.0,
        null_condition: Tensor | int | None = None,
        anchored: bool = True,
        denoiser: None = None,
    ) -> None:
        super().__init__()
        check_type(interpolant, Interpolant, "interpolant")
        if denoiser is not None:
            raise InvalidInputError(
                "denoiser has two meanings: the interpolants paper means E[z | x_t], most diffusion libraries E[x_1 | x_t]",
                got="denoiser=...",
                expected="noise_prediction=... for E[z | x_t], data_prediction=... for E[x_1 | x_t]",
            )
        named = {
            "velocity": velocity,
            "path_velocity": path_velocity,
            "noise_prediction": noise_prediction,
            "score": score,
            "start_prediction": start_prediction,
            "data_prediction": data_prediction,
        }
        networks = {n: f for n, f in named.items() if f is not None}
        if not callable(times):
            check_choice(times, ("stratified", "uniform", "late"), "times")
        check_positive_int(reuse, "reuse")
        if antithetic is not None:
            check_bool(antithetic, "antithetic")
        check_real(condition_dropout, "condition_dropout", minimum=0.0, below=1.0)
        if condition_dropout and null_condition is None:
            raise InvalidInputError(
                "condition_dropout needs a null_condition", hint="a label or vector for no condition"
            )
        if weights is not None:
            check_type(weights, Mapping, "weights")
        for name, weight in (weights or {}).items():
            check_callable(weight, f"weights[{name!r}]", "a function of time")
        if unknown := set(weights or {}) - set(networks):
            raise InvalidInputError("weights for fields that aren't learnt", got=sorted(unknown))
        null = None if null_condition is None else torch.as_tensor(null_condition)
        self.interpolant = interpolant
        self.coupling = as_coupling(coupling, interpolant.scale)
        self._plain = isinstance(self.coupling, IndependentCoupling)
        self.fields = Fields(
            interpolant, networks, null_condition=null, independent=self._plain, anchored=anchored
        )
        self.reuse, self.times = reuse, times
        self.starts = Starts(base, interpolant.starts_normal)
        self.weights = dict(weights or {})
        if interpolant.path == "vp":
            # the rate of the noise grows like 1 / alpha towards time 1: unweighted, these losses have no variance
            for name in {"velocity", "path_velocity"} & set(networks):
                self.weights.setdefault(name, interpolant.alpha.square)
        for name in networks:
            if (
                anchored
                and name not in self.weights
                and (ends := anchors(interpolant, tuple(networks), name))
            ):
                self.weights[name] = _InverseSquare(ends)
        self.condition_dropout = condition_dropout
        self.antithetic = self._signs(antithetic)
        # without a latent the targets are bounded, and the loss can be the mean square itself
        self._bounded = not interpolant.has_latent
        self._shortest = (
            self._bounded
            and interpolant.straight
            and not self.weights
            and tuple(networks) in (("velocity",), ("path_velocity",))
        )
        self._ranks: Tensor | None = None
        self._kept: tuple[Tensor, ...] | None = None
        self._uses = 0

    def _signs(self, asked: bool | None) -> bool:
        if not self.interpolant.has_latent:
            return False
        if asked is not None:
            return asked
        names = self.fields.names
        return "score" in names or (
            "velocity" in names and isinstance(self.interpolant.gamma, BrownianLatent)
        )

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate on a batch.

        Raises:
            InvalidInputError: If there is no batch, or it has another form.
            ShapeError, EmptyDataError, DtypeMismatchError, DeviceMismatchError: If its parts don't fit together.
        """
        x0, x1, condition = self.pairs(batch)
        n = x1.shape[0]
        t = self._times(n, x1)
        if self._shortest:
            name = self.fields.names[0]
            value = self.fields.call(name, t, torch.lerp(x0, x1, t), self._drop(condition, n))
            loss = F.mse_loss(value, x1 - x0) * (0.5 * x1.shape[-1])
            return ObjectiveValue(loss, {name: loss.detach()}, "surrogate")
        z = (
            torch.randn_like(x1, memory_format=torch.contiguous_format)
            if self.interpolant.has_latent
            else None
        )
        condition = self._drop(condition, n)
        losses = self._losses(t, x0, x1, z, condition)
        total = torch.stack(list(losses.values())).sum() if len(losses) > 1 else next(iter(losses.values()))
        return ObjectiveValue(total, {k: v.detach() for k, v in losses.items()}, "surrogate")

    def _losses(
        self, t: Tensor, x0: Tensor, x1: Tensor, z: Tensor | None, condition: Any
    ) -> dict[str, Tensor]:
        it = self.interpolant
        middle = it.mean(t, x0, x1)
        latent = None if z is None else it.gamma.value(t) * z
        x = middle if latent is None else middle + latent
        if self.antithetic and latent is not None:
            x, t2 = torch.cat([x, middle - latent]), torch.cat([t, t])
            condition = None if condition is None else torch.cat([condition, condition])
        else:
            t2 = t
        losses = {}
        for name in self.fields.names:
            value = self.fields.call(name, t2, x, condition)
            target = it.target(name, t, x0, x1, z)
            if self.antithetic and z is not None:
                target = torch.cat([target, it.target(name, t, x0, x1, -z)])
            if self._bounded and name not in self.weights:
                losses[name] = F.mse_loss(value, target) * (0.5 * value.shape[-1])
                continue
            # |f|^2 / 2 - y.f has the same minimiser as |f - y|^2 / 2, and a finite mean where |y|^2 has none
            if self._bounded:
                loss = 0.5 * (value - target).square().sum(-1, keepdim=True)
            else:
                loss = (value * (0.5 * value - target)).sum(-1, keepdim=True)
            if name in self.weights:
                loss = loss * self.weights[name](t2)
            losses[name] = loss.mean()
        return losses

    def pairs(self, batch: Any) -> tuple[Tensor, Tensor, Any]:
        """Return coupled ``x0``, ``x1`` and their conditions; a batch is coupled once in ``reuse`` calls."""
        if self.reuse > 1 and self._kept is not None and 0 < self._uses < self.reuse:
            self._uses += 1
            kept = self._kept
            return kept[0], kept[1], kept[2] if len(kept) > 2 else None
        x0, x1, condition = self._unpack(batch)
        if not self._plain:
            with torch.no_grad():
                partner = self.coupling.pair(x0, x1, condition)
            x1 = x1[partner]
            condition = None if condition is None else condition[partner]
        if self.reuse > 1:
            self._kept, self._uses = ((x0, x1) if condition is None else (x0, x1, condition)), 1
        return x0, x1, condition

    def _unpack(self, batch: Any) -> tuple[Tensor, Tensor, Any]:
        given, x1, condition = _parts(batch)
        if given is not None and self.interpolant.starts_normal:
            raise InvalidInputError(
                "this path starts in the standard normal, so a batch has no x0",
                got=f"x0 on the path {self.interpolant.path!r}",
                hint="pass x1 alone, {'x1': ..., 'condition': ...} for conditions, or use Interpolant('linear') for pairs",
            )
        for name, part in (("x0", given), ("x1", x1)):
            if isinstance(part, Tensor) and not part.is_floating_point():
                raise InvalidInputError(
                    f"{name} must be floating",
                    got=part.dtype,
                    hint="a pair is (x0, x1); data with labels are {'x1': data, 'condition': labels}",
                )
        x1 = as_tensor(x1, "x1", finite=False)
        check_nonempty(x1, "x1")
        if x1.ndim < 2:
            raise ShapeError("a batch is (n, *event)", got=f"shape {tuple(x1.shape)}")
        self.fields.observe_shape(tuple(x1.shape[1:]))
        x1 = x1.reshape(len(x1), -1)
        if given is None:
            x0 = self._draw_starts(x1)
        else:
            x0 = as_tensor(given, "x0", finite=False)
            x0 = x0.reshape(len(x0), -1) if x0.ndim > 1 else x0
        alike = x0.shape == x1.shape and x0.dtype == x1.dtype and x0.device == x1.device
        if not alike:
            check_pair(x0, x1)
        condition = paired_condition(condition, x1)
        self.fields.conditions.observe(condition is not None)
        self.starts.observe(x0, given is not None)
        return x0, x1, condition

    def _draw_starts(self, x1: Tensor) -> Tensor:
        base = self.starts.base
        if base is None or self.interpolant.starts_normal:
            return torch.randn_like(x1, memory_format=torch.contiguous_format)
        x0 = base.sample(x1.shape[:-1])
        check_same_dtype(base=x0, x1=x1)
        check_same_device(base=x0, x1=x1)
        return x0

    def _times(self, n: int, like: Tensor) -> Tensor:
        if callable(self.times):
            t = as_tensor(self.times(n), "times(n)")
            if tuple(t.shape) != (n,):
                raise ShapeError("times must return one time per point", got=tuple(t.shape), expected=(n,))
            check_times(t)
            return t.to(like).unsqueeze(1).clamp(_MARGIN, 1 - _MARGIN)
        if self.times == "uniform":
            t = torch.rand(n, 1, dtype=like.dtype, device=like.device)
        else:
            # row i of a batch may sit in any stratum: one common shift keeps every time uniform
            ranks = self._ranks
            if (
                ranks is None
                or ranks.shape[0] != n
                or ranks.dtype != like.dtype
                or ranks.device != like.device
            ):
                self._ranks = ranks = torch.arange(n, dtype=like.dtype, device=like.device).unsqueeze(1)
            u = torch.rand(n + 1, 1, dtype=like.dtype, device=like.device)
            t = torch.add(u[n], u[:n] + ranks, alpha=1.0 / n).remainder_(1.0)
            if self.times == "late":
                t = 1 - t.pow_(4)
        return t if self._shortest else t.clamp_(_MARGIN, 1 - _MARGIN)

    def _drop(self, condition: Any, n: int) -> Any:
        if condition is None or not self.condition_dropout:
            return condition
        null = self.fields.null_of(condition)
        lost = torch.rand(n, device=condition.device) < self.condition_dropout
        return torch.where(lost.reshape(n, *[1] * (condition.ndim - 1)), null, condition)

    def _apply(self, fn: Any, recurse: bool = True) -> InterpolantRegression:
        super()._apply(fn, recurse)
        self._ranks = None
        self._kept = None if self._kept is None else tuple(fn(value) for value in self._kept)
        return self

    def get_extra_state(self) -> dict[str, Any]:
        """Return the coupled batch that is in use, so that a resumed run goes on with it."""
        return {
            "uses": self._uses,
            "kept": None if self._kept is None else list(self._kept),
        }

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it up again."""
        self._uses, kept = state["uses"], state["kept"]
        self._kept = None if kept is None else tuple(kept)

    def generator(self) -> InterpolantGenerator:
        """Return the model that samples, and gives densities; it shares the networks."""
        from stochdyn.interpolants.sampling.generator import InterpolantGenerator

        return InterpolantGenerator(self.fields, self.starts)

    def kl_bound(self, x0: Tensor, x1: Tensor, epsilon: Any, truth: Any = None, **options: Any) -> Estimate:
        r"""Bound the divergence :math:`KL(\rho_1\,\|\,\hat\rho_1)` of the SDE sampler, by Girsanov's theorem.

        .. math:: KL\le\int_0^1\frac1{4\varepsilon}E\left|\delta b+\varepsilon\,\delta s\right|^2dt

        See :func:`stochdyn.interpolants.densities.bounds.kl_bound` for the options.
        """
        from stochdyn.interpolants.densities.bounds import kl_bound

        return kl_bound(self.generator(), x0, x1, epsilon, truth, **options)


class _InverseSquare:
    """The inverse squared distance from some ends, which turns errors of a prediction into those of the velocity."""

    def __init__(self, ends: tuple[int, ...], largest: float = 1e4) -> None:
        self.ends, self.largest = ends, largest

    def __call__(self, t: Tensor) -> Tensor:
        weight = torch.ones_like(t)
        for end in self.ends:
            weight = weight / (t - end).square()
        return weight.clamp(max=self.largest)


def _parts(batch: Any) -> tuple[Any, Any, Any]:
    """Return starts, ends and conditions of a batch, None for what it doesn't have."""
    if isinstance(batch, Mapping):
        if unknown := set(batch) - {"x0", "x1", "condition"}:
            raise InvalidInputError(
                "a batch has unknown parts", got=sorted(map(str, unknown)), expected="x0, x1, condition"
            )
        if "x1" not in batch:
            raise InvalidInputError("a batch needs x1", got=sorted(batch))
        return batch.get("x0"), batch["x1"], batch.get("condition")
    if isinstance(batch, tuple | list) and len(batch) in (1, 2, 3):
        if len(batch) == 1:
            return None, batch[0], None
        return batch[0], batch[1], batch[2] if len(batch) == 3 else None
    if batch is None or isinstance(batch, tuple | list | str | bytes):
        raise InvalidInputError(
            "a batch is x1, (x0, x1), (x0, x1, condition) or a dict of these", got=type(batch).__name__
        )
    return None, batch, None
