"""Training: regressions whose minimisers are the fields of an interpolant."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stochdyn._checks import check_choice, check_positive_int, check_same_device, check_same_dtype
from stochdyn.core.law.path import Estimate
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.interpolants.fields.networks import Fields, Network
from stochdyn.interpolants.paths.interpolant import Interpolant, check_pair
from stochdyn.interpolants.paths.latents import BrownianLatent
from stochdyn.interpolants.sampling.starts import Starts
from stochdyn.interpolants.training.couplings import Coupling, IndependentCoupling, as_coupling
from stochdyn.objectives.base import Objective, ObjectiveValue

if TYPE_CHECKING:
    from stochdyn.interpolants.sampling.generator import InterpolantGenerator

__all__ = ["InterpolantRegression"]

Weight = Callable[[Tensor], Tensor]


class InterpolantRegression(Objective):
    r"""Learn one or two fields of an interpolant.

    .. math:: \ell=\sum_f\int_0^1w_f(t)\,E\left[\tfrac12|\hat f(t,x_t)|^2-y_f\cdot\hat f(t,x_t)\right]dt

    with :math:`y_f` the random variable whose conditional mean is the field: :math:`\dot x_t` for the velocity,
    :math:`\partial_tI` for v, :math:`-z/\gamma` for the score, :math:`z` for the denoiser, :math:`x_0` and :math:`x_1` for the
    means of the ends. The loss exceeds its minimum by half the mean squared error of the field, and may be negative. (Where the
    path has no latent, :math:`\tfrac12|\hat f-y_f|^2` takes the place of the bracket, which differs by a constant.)

    One field determines all others on one-sided and mirror paths, two do on others; with a velocity alone the model has a
    probability flow, but no score.

    Args:
        interpolant: the path.
        velocity: network for :math:`b=E[\dot x_t\mid x_t]`, called as ``net(t, x)`` with ``t (n, 1)``, or
            ``net(t, x, condition)``.
        denoiser: network for :math:`\eta_z=E[z\mid x_t]`; on one-sided paths for :math:`E[x_0\mid x_t]`.
        score: network for :math:`\nabla\log\rho_t`.
        v: network for :math:`E[\partial_tI\mid x_t]`.
        eta0: network for :math:`E[x_0\mid x_t]`.
        eta1: network for :math:`E[x_1\mid x_t]`.
        coupling: ``"independent"``, ``"ot"`` (a permutation), ``"entropic"`` (of strength :math:`2\sigma^2` with the scale of
            the interpolant, which gives the Schrödinger bridge), or a :class:`Coupling`.
        reuse: number of steps that a coupled batch serves, each with fresh times and latents.
        base: the law of the starts. If None: the standard normal, where batches come without starts or the path starts
            there; else the starts of the data.
        antithetic: evaluate at both signs of the latent, which removes the singularities of targets at the ends. None does so
            where it pays: for a score, and for a velocity with the Brownian latent.
        times: ``"stratified"`` spreads the times of a batch evenly; ``"uniform"`` draws them independently.
        time_margin: how near to 0 and 1 times may come.
        weights: functions of time that weigh the losses, by name of field. On the ``"vp"`` path velocities are weighed with
            :math:`\alpha^2` unless something else is given, since their targets are singular at time 1.
        condition_dropout: share of a batch whose condition is replaced by ``null_condition`` (for classifier-free guidance).
        null_condition: a label or a context vector that stands for no condition.
        clip: see :class:`Fields`.

    Batches are ``x1 (n, d)``; pairs ``(x0, x1)``; ``(x0, x1, condition)``; or a dict of these names.

    Raises:
        InvalidInputError: if no field, or more than two are given, or they don't belong to the path; and for options that
            don't exist.

    Example:
        >>> from stochdyn.interpolants import FieldNetwork
        >>> it = Interpolant("linear")
        >>> objective = InterpolantRegression(it, velocity=FieldNetwork(2), denoiser=FieldNetwork(2), coupling="ot")
        >>> value = objective((torch.randn(64, 2), torch.randn(64, 2) + 3))
        >>> sorted(value.terms)
        ['denoiser', 'velocity']

    Reference:
        Albergo, Boffi and Vanden-Eijnden, "Stochastic interpolants", 2023, theorems 2.7 to 2.10 and appendix C (antithetic).
    """

    def __init__(
        self,
        interpolant: Interpolant,
        *,
        velocity: Network | None = None,
        denoiser: Network | None = None,
        score: Network | None = None,
        v: Network | None = None,
        eta0: Network | None = None,
        eta1: Network | None = None,
        coupling: str | Coupling = "independent",
        reuse: int = 1,
        base: Any = None,
        antithetic: bool | None = None,
        times: str = "stratified",
        time_margin: float = 1e-5,
        weights: Mapping[str, Weight] | None = None,
        condition_dropout: float = 0.0,
        null_condition: Tensor | None = None,
        clip: float = 1e-3,
    ) -> None:
        super().__init__()
        if not isinstance(interpolant, Interpolant):
            raise InvalidInputError("interpolant must be an Interpolant", got=type(interpolant).__name__)
        named = {
            "velocity": velocity,
            "v": v,
            "denoiser": denoiser,
            "score": score,
            "eta0": eta0,
            "eta1": eta1,
        }
        networks = {n: f for n, f in named.items() if f is not None}
        check_choice(times, ("stratified", "uniform"), "times")
        check_positive_int(reuse, "reuse")
        if not 0 <= time_margin < 0.5:
            raise InvalidInputError("time_margin must lie in [0, 0.5)", got=time_margin)
        if not 0 <= condition_dropout < 1:
            raise InvalidInputError("condition_dropout must lie in [0, 1)", got=condition_dropout)
        if condition_dropout and null_condition is None:
            raise InvalidInputError(
                "condition_dropout needs a null_condition", hint="a label or vector for no condition"
            )
        if unknown := set(weights or {}) - set(networks):
            raise InvalidInputError("weights for fields that aren't learnt", got=sorted(unknown))
        self.interpolant = interpolant
        self.coupling = as_coupling(coupling, interpolant.scale)
        self._plain = isinstance(self.coupling, IndependentCoupling)
        self.fields = Fields(interpolant, networks, clip, null_condition, self._plain)
        self.reuse, self.times, self.time_margin = reuse, times, time_margin
        self.starts = Starts(base, interpolant.starts_normal)
        self.weights = dict(weights or {})
        if interpolant.path == "vp":
            # the rate of the noise grows like 1 / alpha towards time 1: unweighted, these losses have no variance
            for name in {"velocity", "v"} & set(networks):
                self.weights.setdefault(name, interpolant.alpha.square)
        self.condition_dropout = condition_dropout
        self.antithetic = self._signs(antithetic)
        # without a latent the targets are bounded, and the loss can be the mean square itself
        self._bounded = not interpolant.has_latent
        self._shortest = (
            self._bounded
            and interpolant.straight
            and not self.weights
            and tuple(networks) in (("velocity",), ("v",))
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
            InvalidInputError: if there is no batch, or it has another form.
            ShapeError, EmptyDataError, DtypeMismatchError, DeviceMismatchError: if its parts don't fit together.
        """
        x0, x1, condition = self.pairs(batch)
        n = x1.shape[0]
        t = self._times(n, x1)
        if self._shortest:
            name = self.fields.names[0]
            value = self.fields.call(name, t, torch.lerp(x0, x1, t), self._drop(condition, n))
            loss = F.mse_loss(value, x1 - x0) * (0.5 * x1.shape[-1])
            return ObjectiveValue(loss, {name: loss.detach()}, "surrogate")
        z = torch.randn_like(x1) if self.interpolant.has_latent else None
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
        self._kept, self._uses = ((x0, x1) if condition is None else (x0, x1, condition)), 1
        return x0, x1, condition

    def _unpack(self, batch: Any) -> tuple[Tensor, Tensor, Any]:
        condition = None
        if isinstance(batch, Tensor):
            given, x1 = None, batch
        elif isinstance(batch, Mapping):
            if unknown := set(batch) - {"x0", "x1", "condition"}:
                raise InvalidInputError(
                    "a batch has unknown parts", got=sorted(unknown), expected="x0, x1, condition"
                )
            if "x1" not in batch:
                raise InvalidInputError("a batch needs x1", got=sorted(batch))
            given, x1, condition = batch.get("x0"), batch["x1"], batch.get("condition")
        elif isinstance(batch, Sequence) and len(batch) in (2, 3):
            given, x1 = batch[0], batch[1]
            condition = batch[2] if len(batch) == 3 else None
        else:
            raise InvalidInputError(
                "a batch is x1, (x0, x1), (x0, x1, condition) or a dict of these", got=type(batch).__name__
            )
        if given is None or self.interpolant.starts_normal:
            x0 = self._draw_starts(x1)
        else:
            x0 = given
        alike = isinstance(x0, Tensor) and isinstance(x1, Tensor) and x0.shape == x1.shape
        if not (
            alike
            and x0.dtype == x1.dtype
            and x0.device == x1.device
            and x1.is_floating_point()
            and x1.numel()
        ):
            check_pair(x0, x1)
        if x1.ndim != 2:
            raise ShapeError("a batch is (n, d)", got=f"shape {tuple(x1.shape)}")
        if isinstance(condition, Tensor) and condition.shape[:1] != x1.shape[:1]:
            raise ShapeError(
                "there must be one condition a point",
                got=tuple(condition.shape),
                expected=f"({len(x1)}, ...)",
            )
        self.starts.observe(x0, given is not None)
        return x0, x1, condition

    def _draw_starts(self, x1: Tensor) -> Tensor:
        base = self.starts.base
        if base is None or self.interpolant.starts_normal:
            return torch.randn_like(x1)
        x0 = base.sample(x1.shape[:-1])
        check_same_dtype(base=x0, x1=x1)
        check_same_device(base=x0, x1=x1)
        return x0

    def _times(self, n: int, like: Tensor) -> Tensor:
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
        return t if self._shortest else t.clamp_(self.time_margin, 1 - self.time_margin)

    def _drop(self, condition: Any, n: int) -> Any:
        if condition is None or not self.condition_dropout:
            return condition
        null = self.fields.null_of(condition)
        lost = torch.rand(n, device=condition.device) < self.condition_dropout
        return torch.where(lost.reshape(n, *[1] * (condition.ndim - 1)), null, condition)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the coupled batch that is in use, so that a resumed run goes on with it."""
        return {
            "uses": self._uses,
            "kept": None if self._kept is None or self.reuse == 1 else list(self._kept),
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
