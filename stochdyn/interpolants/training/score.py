"""Score matching of a noising process, with its Fokker-Planck equation as a regulariser."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from stochdyn._checks import (
    as_tensor,
    check_bool,
    check_callable,
    check_choice,
    check_finite,
    check_ndim,
    check_nonempty,
    check_positive_int,
    check_real,
)
from stochdyn.core.forward.divergences import Hutchinson, unbiased_square
from stochdyn.core.forward.flow import LearnedFlow, as_time
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.interpolants.fields.conditions import paired_condition
from stochdyn.interpolants.fields.learned import LearnedScore
from stochdyn.interpolants.fields.potential import FunctionPotential, Potential, PotentialNetwork
from stochdyn.interpolants.fields.preconditioned import PreconditionedScore
from stochdyn.interpolants.paths.processes import AffineProcess, check_process
from stochdyn.objectives.base import Objective, ObjectiveValue

if TYPE_CHECKING:
    from stochdyn.interpolants.sampling.reverse import ReverseDiffusion

__all__ = ["ScoreMatching"]

Field = Callable[..., Tensor]
TimeFunction = Callable[[Tensor], Tensor]
WeightSchedule = Callable[[Tensor], Tensor]
PointSampler = Callable[[], tuple[Tensor, Tensor]]

#: Weights of the squared error of the score and of the squared residual, as functions of time.
_WEIGHTS = ("variance", "likelihood", "none")
_RESIDUAL_WEIGHTS = ("log-snr", "variance", "none")


class ScoreMatching(Objective):
    r"""Denoising score matching, with the square of the Fokker-Planck residual at a weight.

    .. math::
        \ell = \mathbb E\Big[w(t)\,\big|s_\theta(t,X_t)+\tfrac{z}{\sigma_t}\big|^2\Big]
             + \omega\,\mathbb E\big[\rho(t)\,R_\theta(t,X_t)^2\big],\qquad X_t=\mu+a_t(x_0-\mu)+\sigma_tz

    The minimiser of the first term is the score of the noised data. A learned one that isn't exact drives a reverse
    SDE and a probability-flow ODE whose laws differ; they agree where the residual ``R`` of the log density
    vanishes.

    Args:
        process: The noising process.
        potential: The log density as a :class:`Potential`, or any ``potential(t, x) -> (...)`` or ``(..., 1)``; with conditions
            ``potential(t, x, condition)``.
        score: The score in its place, ``score(t, x) -> (..., d)``, with conditions ``score(t, x, condition)``. The residual is then that of
            the score form.
        fp_weight: The weight :math:`\omega` of the residual: a number, or a function of the number of training steps so far (a tensor), such as
            :class:`WeightRamp`.
        residual: How the residual is computed: ``"exact"``, ``"forward"`` (forward-mode Laplacian of a function potential) or
            ``"hutchinson"``: two probes or more, whose products estimate the square without bias.
        num_probes: The number of probes per point for ``"hutchinson"``.
        times: How times are drawn: ``"log-snr"`` (uniform in the log signal-to-noise ratio), ``"uniform"``, both with one
            time in each of ``n`` equal strata, or a function ``times(n) -> (n,)``.
        weight: The weight w of the squared error of the score: ``"variance"`` (sigma squared), ``"likelihood"`` (half of g squared),
            ``"none"``, or a function of time. None is the weight of its own for a :class:`PreconditionedScore`, and ``"variance"``
            for others.
        residual_weight: The weight :math:`\rho` of the squared residual: ``"log-snr"`` (squared residual per unit of log signal-to-noise
            ratio, hence finite at small times), ``"variance"`` (sigma to the fourth power), ``"none"``, or a function of time.
        collocation: Where the residual is evaluated: None on the noised data themselves, or a sampler of ``(t, x)``
            such as :class:`stochdyn.objectives.residual.UniformPoints`.
        averaged_targets: Whether to replace the noise of each point by its mean given the point and the batch as the set of
            possible starts; far less variance in few dimensions, and a bias that falls with the size of the batch.

    Raises:
        InvalidInputError: If not exactly one of ``potential`` and ``score`` is given, or an option is unknown or doesn't
            fit.

    Example:
        >>> from stochdyn.interpolants import PotentialNetwork
        >>> from stochdyn.interpolants import OU
        >>> diff = ScoreMatching(OU(), potential=PotentialNetwork(OU(), 2), fp_weight=0.01)
        >>> sorted(diff(torch.randn(16, 2)).terms)
        ['residual', 'score']

    Reference:
        Vincent, "A connection between score matching and denoising autoencoders", 2011; Deveney et al., "Closing the ODE-SDE
        gap in score-based diffusion models through the Fokker-Planck equation", 2025; Lai et al., "FP-Diffusion", 2023
        (score form); Xu, Tong and Jaakkola, "Stable target field", 2023 (averaged targets).
    """

    steps_seen: Tensor

    def __init__(
        self,
        process: AffineProcess,
        potential: Potential | Field | None = None,
        score: Field | None = None,
        *,
        fp_weight: float | WeightSchedule = 0.0,
        residual: Literal["exact", "forward", "hutchinson"] = "exact",
        num_probes: int = 2,
        times: Literal["log-snr", "uniform"] | Callable[[int], Tensor] = "log-snr",
        weight: Literal["variance", "likelihood", "none"] | TimeFunction | None = None,
        residual_weight: Literal["log-snr", "variance", "none"] | TimeFunction = "log-snr",
        collocation: PointSampler | None = None,
        averaged_targets: bool = False,
    ) -> None:
        super().__init__()
        check_process(process)
        if (potential is None) == (score is None):
            raise InvalidInputError(
                "give a potential or a score", got="both" if potential is not None else "neither"
            )
        for field, name in ((potential, "potential"), (score, "score")):
            if field is not None:
                check_callable(field, name, f"a network, {name}(t, x)")
        if not callable(fp_weight):
            check_real(fp_weight, "fp_weight", minimum=0.0)
        check_choice(residual, ("exact", "forward", "hutchinson"), "residual")
        check_positive_int(num_probes, "num_probes", 2 if residual == "hutchinson" else 1)
        check_bool(averaged_targets, "averaged_targets")
        if collocation is not None:
            check_callable(collocation, "collocation", "a sampler of (t, x)")
        _check_option(times, ("log-snr", "uniform"), "times")
        if weight is not None:
            _check_option(weight, _WEIGHTS, "weight")
        _check_option(residual_weight, _RESIDUAL_WEIGHTS, "residual_weight")
        if residual == "forward" and score is not None:
            raise InvalidInputError(
                "a score has no forward-mode residual", hint="use residual='exact' or 'hutchinson'"
            )
        if isinstance(potential, Potential):
            _check_same_process(process, potential.process, "potential")
        if isinstance(score, PreconditionedScore):
            _check_same_process(process, score.process, "score")
        source: Any = score
        if potential is not None:
            source = potential if isinstance(potential, Potential) else FunctionPotential(process, potential)
        self.learned = LearnedScore(process, source)
        self.fp_weight, self.num_probes = fp_weight, num_probes
        self.method: Literal["exact", "forward", "hutchinson"] = residual
        self.times, self.weight, self.residual_weight = times, weight, residual_weight
        self.collocation, self.averaged_targets = collocation, averaged_targets
        self.dim = potential.dim if isinstance(potential, PotentialNetwork) else None
        self.register_buffer("steps_seen", torch.zeros((), dtype=torch.long))

    @property
    def process(self) -> AffineProcess:
        """The noising process."""
        return self.learned.process

    @property
    def potential(self) -> Potential | None:
        """The potential, or None where a score is learned."""
        return self.learned.potential if self.learned.has_potential else None

    def get_extra_state(self) -> dict[str, Any]:
        """Return the dimension of the data, so that a loaded model can sample."""
        return {"dim": self.dim}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take it up again."""
        self.dim = state["dim"]

    def score(self, t: Tensor | float, x: Tensor, condition: Any = None) -> Tensor:
        """Return the learned score ``(..., d)`` at ``x (..., d)``, for a condition per point."""
        x = as_tensor(x, "x", finite=False)
        return self.learned.given(condition)(t, x)

    def flow(self) -> LearnedFlow:
        """Return the learned marginals as a :class:`stochdyn.LearnedFlow`, for :class:`stochdyn.objectives.ForwardResidual` say."""
        return self.learned.flow()

    def draw_times(self, n: int, like: Tensor) -> Tensor:
        """Draw times ``(n, 1)`` between start and horizon, from torch's global generator."""
        if callable(self.times):
            t = as_tensor(self.times(n), "times(n)")
            if tuple(t.shape) != (n,):
                raise ShapeError("times must return one time per point", got=tuple(t.shape), expected=(n,))
            self.process.check_times(t)
            return t.to(like)[:, None]
        start, horizon = self.process.start, self.process.horizon
        # One time in each of n equal strata: the batch covers all times evenly, at the law of a uniform draw.
        strata = torch.arange(n, dtype=like.dtype, device=like.device)[:, None]
        u = (strata + torch.rand(n, 1, dtype=like.dtype, device=like.device)) / n
        if self.times == "uniform":
            return start + (horizon - start) * u
        ends = torch.tensor([horizon, start], dtype=torch.float64)
        low, high = self.process.log_snr(ends).to(like).unbind()
        return self.process.time_of_log_snr(low + (high - low) * u).clamp(start, horizon)

    def fokker_planck_residual(
        self, t: Tensor | float, x: Tensor, form: Literal["log", "score"] | None = None, **options: Any
    ) -> Tensor:
        r"""How far the learned marginals are from solving the forward equation.

        Args:
            t: A number, or times that broadcast to ``x[..., :1]``.
            x: The points, ``(..., d)``.
            form: The form of the residual: ``"log"`` (a potential only) or ``"score"``, its gradient in space; None for the one that is trained.
            options: The options of :meth:`stochdyn.FokkerPlanck.residual`.

        Returns:
            ``(...)`` in log form, ``(..., d)`` in score form.

        Raises:
            ShapeError: If ``t`` doesn't broadcast to ``x[..., :1]``.
            UnavailableError: If the log form is asked of a score network.
        """
        x = as_tensor(x, "x", finite=False)
        if self.potential is not None and form != "score" and not options:
            return self.potential.score_and_residual(t, x).residuals[0]
        options["form"] = form or ("score" if self.potential is None else "log")
        time = as_time(t, x).to(x.dtype).expand(*x.shape[:-1], 1)
        return self.learned.operator().residual(self.flow(), time, x, **options)

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate on data: ``x1 (n, d)``, ``(x1, condition)``, or a dict of ``x1``, ``condition`` and ``mean``.

        The mean ``(n, d)`` is what the process reverts to, item by item.

        Raises:
            ShapeError, EmptyDataError: If the data aren't ``(n, d)`` with points in them.
            InvalidInputError: If they aren't floating, or the batch has another form.
        """
        x0, condition, mean = _parts(batch)
        self.dim = x0.shape[-1]
        self.learned.conditions.observe(condition is not None)
        learned = self.learned.given(condition, mean)
        process = learned.process
        t = self.draw_times(x0.shape[0], x0)
        z = torch.randn_like(x0, memory_format=torch.contiguous_format)
        x = process.perturb(t, x0, z)
        if self.averaged_targets:
            if condition is not None or mean is not None:
                raise InvalidInputError(
                    "averaged targets mix the points of a batch, so they can't have conditions or means of their own",
                    got="averaged_targets=True",
                )
            z = self._averaged_noise(t, x, x0)
        weight = self._fp_weight(x0)
        on_path = weight is not None and self.collocation is None
        if on_path:
            score, squares = self._score_and_square(learned, t, x)
        else:
            score = learned(t, x)
        std = process.std(t)
        # sigma^2 |s + z / sigma|^2: the error of the noise, bounded at small times
        error = (std * score + z).square().sum(-1)
        loss = fit = (error * self._weight(t, std)).mean()
        terms = {"score": fit.detach()}
        if weight is not None:
            if self.collocation is not None:
                t, x = self.collocation()
                squares = self._score_and_square(self.learned, t, x)[1]
            penalty = (squares * self._residual_weight(t)).mean()
            loss = loss + weight * penalty
            terms["residual"] = penalty.detach()
        if self.training and torch.is_grad_enabled():
            self.steps_seen.add_(1)
        return ObjectiveValue(loss, terms, "surrogate")

    def generator(self, dim: int | None = None) -> ReverseDiffusion:
        """Return the generative model: the reverse SDE, the probability-flow ODE, and their densities.

        Args:
            dim: The number of components of a point; known from the potential, or once a batch was seen.

        Raises:
            InvalidInputError: If the dimension is unknown.
        """
        from stochdyn.interpolants.sampling.reverse import ReverseDiffusion

        dim = self.dim if dim is None else dim
        if dim is None:
            raise InvalidInputError("the dimension isn't known yet", hint="pass dim=..., or fit first")
        like = next((p for p in self.parameters() if p.is_floating_point()), torch.empty(0))
        model = ReverseDiffusion(self.process, self.learned.source, dim, like.detach())
        model.learned.conditions = self.learned.conditions
        return model

    def _fp_weight(self, like: Tensor) -> Tensor | float | None:
        if callable(self.fp_weight):
            return self.fp_weight(self.steps_seen).to(like)
        return self.fp_weight or None

    def _score_and_square(self, learned: LearnedScore, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the score and the squared residual ``(n,)``, exact or without bias."""
        if learned.has_potential:
            score, residuals = learned.potential.score_and_residual(t, x, self.method, self.num_probes)
        else:
            exact = self.method != "hutchinson"
            score = learned(t, x)
            residuals = learned.operator().residual_probes(
                learned.flow(), t, x, form="score", method="exact" if exact else Hutchinson(self.num_probes)
            )
        squares = residuals[0].square() if self.method != "hutchinson" else unbiased_square(residuals)
        return score, squares if learned.has_potential else squares.sum(-1)

    def _weight(self, t: Tensor, std: Tensor) -> Tensor:
        """Return the weight of the squared error of the noise, which is sigma squared that of the score."""
        own = self.learned.source
        if callable(self.weight):
            weight = self.weight(t) / std.square()
        elif self.weight is None and isinstance(own, PreconditionedScore):
            weight = own.weight(t) / std.square()
        elif self.weight in (None, "variance"):
            return std.new_ones(())
        elif self.weight == "likelihood":
            weight = 0.5 * self.process.squared_diffusion(t) / std.square()
        else:
            weight = 1 / std.square()
        return weight.squeeze(-1)

    def _residual_weight(self, t: Tensor) -> Tensor:
        if callable(self.residual_weight):
            weight = self.residual_weight(t)
        elif self.residual_weight == "none":
            return t.new_ones(())
        else:
            weight = self.process.variance(t).square()
            if self.residual_weight == "log-snr":
                weight = 4 * weight / self.process.squared_diffusion(t).square()
        return weight.reshape(t.shape[:-1]) if weight.ndim == t.ndim else weight

    def _averaged_noise(self, t: Tensor, x: Tensor, x0: Tensor) -> Tensor:
        """Mean of the noise given the point, if the start is any point of the batch."""
        with torch.no_grad():
            center = self.process.center(x0)
            scale, std = self.process.scale(t), self.process.std(t)
            # softmax over the batch of log p(x | x0_j) = snr y.x0_j - snr^2 |x0_j|^2 / 2, up to what all share
            y, start = (x - center) / std, x0 - center
            snr = scale / std
            logits = snr * (y @ start.t()) - 0.5 * snr.square() * start.square().sum(-1)
            return y - snr * (logits.softmax(-1) @ start)


class WeightRamp:
    """A weight that moves geometrically between two values over a span of training steps.

    Args:
        first: The weight up to step ``begin``; 0 starts the ramp at a thousandth of ``last``, after nothing before.
        last: The weight from step ``end`` on.
        begin: The number of the step at which the weight starts to move.
        end: The number of the step at which it has arrived.

    Raises:
        InvalidInputError: If a weight is negative, or the end isn't after the begin.

    Example:
        >>> WeightRamp(0.0, 0.1, 100, 200)(torch.tensor([50, 200]))
        tensor([0.0000, 0.1000])
    """

    def __init__(self, first: float, last: float, begin: int, end: int) -> None:
        check_real(first, "first")
        check_real(last, "last")
        check_positive_int(begin, "begin", 0)
        check_positive_int(end, "end", 0)
        if first < 0 or last < 0 or not end > begin >= 0:
            raise InvalidInputError(
                "a ramp needs weights that aren't negative and 0 <= begin < end",
                got=f"first={first}, last={last}, begin={begin}, end={end}",
            )
        self.first, self.last, self.begin, self.end = first, last, begin, end

    def __call__(self, step: Tensor) -> Tensor:
        """Return the weight after ``step`` steps."""
        share = ((step.to(torch.get_default_dtype()) - self.begin) / (self.end - self.begin)).clamp(0, 1)
        floor = 1e-3 * max(self.first, self.last)
        low, high = max(self.first, floor), max(self.last, floor)
        moving = low * (high / max(low, 1e-300)) ** share if high else share * 0
        moving = torch.where(share >= 1, torch.full_like(moving, self.last), moving)
        return torch.where(share <= 0, torch.full_like(moving, self.first), moving)


def _check_option(value: Any, choices: tuple[str, ...], name: str) -> None:
    if not callable(value):
        check_choice(value, choices, name)


def _check_same_process(ours: AffineProcess, given: AffineProcess, name: str) -> None:
    if given is ours:
        return
    t = torch.linspace(given.start, given.horizon, 5)
    same = type(ours) is type(given) and ours.horizon == given.horizon and ours.start == given.start
    if not (same and torch.equal(ours.variance(t), given.variance(t)) and torch.equal(ours.mean, given.mean)):
        raise InvalidInputError(
            f"the {name} is of another process", got=type(ours).__name__, hint="build both from one process"
        )


def _parts(batch: Any) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return data, conditions and means of a batch."""
    condition = mean = None
    if isinstance(batch, Mapping):
        if unknown := set(batch) - {"x1", "condition", "mean"}:
            raise InvalidInputError(
                "a batch has unknown parts", got=sorted(map(str, unknown)), expected="x1, condition, mean"
            )
        if "x1" not in batch:
            raise InvalidInputError("a batch needs x1", got=sorted(batch))
        batch, condition, mean = batch["x1"], batch.get("condition"), batch.get("mean")
    elif isinstance(batch, tuple | list) and len(batch) in (1, 2):
        batch, condition = (batch[0], None) if len(batch) == 1 else batch
    if batch is None or isinstance(batch, tuple | list):
        raise InvalidInputError(
            "a batch is x1, (x1, condition) or a dict", got=type(batch).__name__, expected="(n, d)"
        )
    x1 = batch
    if isinstance(x1, Tensor) and not x1.is_floating_point():
        raise InvalidInputError("data must be floating", got=x1.dtype, hint="use data.float()")
    x1 = as_tensor(x1, "x1", finite=False)
    check_ndim(x1, 2, "x1", "(n, d)")
    check_nonempty(x1, "x1")
    if x1.device.type == "cpu":
        check_finite(x1, "x1")
    condition = paired_condition(condition, x1)
    if mean is not None:
        mean = as_tensor(mean, "mean").to(x1)
        if mean.shape != x1.shape:
            raise ShapeError(
                "there must be one mean per point", got=tuple(mean.shape), expected=tuple(x1.shape)
            )
    return x1, condition, mean
