"""Training of a flow whose velocity knows the population that it starts from."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stochdyn._checks import check_callable, check_choice, check_positive_int, check_type
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.interpolants.fields.networks import FieldNetwork
from stochdyn.interpolants.paths.interpolant import Interpolant
from stochdyn.interpolants.populations.around import Surroundings
from stochdyn.interpolants.populations.data import Populations
from stochdyn.interpolants.populations.encoder import SampleEncoder
from stochdyn.interpolants.training.couplings import ExactCoupling
from stochdyn.objectives.base import Objective, ObjectiveValue

if TYPE_CHECKING:
    from stochdyn.interpolants.populations.generator import PopulationGenerator

__all__ = ["PopulationField", "PopulationRegression"]


class PopulationField(nn.Module):
    """A velocity that knows a population: the encoder, the network, and the units of the data.

    Args:
        dim: The number of components of a point.
        encoder: The network of samples, or None for a field that is told nothing of them.
        network: The velocity, ``net(t, x, context)``.
        around: What it is told of the population around a point, ``(x, sample)`` to ``(..., n, c)``, joined to the context; or None.
    """

    center: Tensor
    scale: Tensor
    ready: Tensor

    def __init__(
        self, dim: int, encoder: nn.Module | None, network: nn.Module, around: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.encoder, self.network, self.around, self.dim = encoder, network, around, dim
        self.register_buffer("center", torch.zeros(dim))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        # spares a look at the device in every step
        self._known = False

    def observe(self, x0: Tensor) -> None:
        """Take the units from the starts of the first batch, ``(n, d)``."""
        if not self._known and not bool(self.ready):
            spread = x0.std(0).square().mean().sqrt() if len(x0) > 1 else x0.new_ones(())
            self.center.copy_(x0.mean(0))
            self.scale.copy_(torch.where(spread > 0, spread, torch.ones_like(spread)))
            self.ready.fill_(True)
        self._known = True

    def embed(self, x0: Tensor, treatment: Tensor | None) -> Tensor | None:
        """Return the context ``(..., c)`` of populations ``(..., n, d)``; None for a field that is told nothing."""
        if self.encoder is None:
            return treatment
        context = self.encoder((x0 - self.center) / self.scale)
        return context if treatment is None else torch.cat([context, treatment], -1)

    def forward(self, t: Tensor, x: Tensor, context: Tensor | None, sample: Tensor) -> Tensor:
        """Return the velocity ``(..., n, d)``.

        Args:
            t: The times, ``(..., n, 1)``.
            x: The points, ``(..., n, d)``.
            context: What :meth:`embed` returned, ``(..., c)``.
            sample: Members of the population, ``(..., m, d)``.
        """
        white = (x - self.center) / self.scale
        told = [] if context is None else [context.unsqueeze(-2).expand(*x.shape[:-1], -1)]
        if self.around is not None:
            told.append(self.around(white, (sample - self.center) / self.scale))
        flat = [y.reshape(-1, y.shape[-1]) for y in (t, white, *([torch.cat(told, -1)] if told else []))]
        return self.scale * self.network(*flat).reshape(x.shape)


class PopulationRegression(Objective):
    r"""Learn one flow for many populations, whose velocity sees a sample of the population that it starts from.

    .. math:: \ell=E_i\,E_{t,(x_0,x_1)\sim\pi_i}\tfrac12\big|v(t,x_t,\phi(p_0^{(i)}))-\dot x_t\big|^2

    The minimiser carries every population to its target, and an unseen one to where populations like it went. Use it where
    what happens depends on the whole sample: patients, wells, batches of cells. Each step draws points of every population of
    the batch, and others for its embedding, in a number that varies, so that the embedding of small samples is learnt too.

    Args:
        dim: The number of components of a point.
        encoder: The network of samples, such as :class:`SetEncoder`. None for a flow that is blind to populations, the baseline
            that an encoder has to beat; the ``velocity`` is called as ``net(t, x)`` then, or with the treatment alone.
        coupling: ``"paired"`` takes starts and targets row by row, for noise that is to be removed, say; ``"independent"`` draws them
            apart, and ``"ot"`` pairs them by optimal transport within every population, for cells that are destroyed when they are
            measured. The three have the same ends and different flows; those of ``"ot"`` are straightest.
        around: What the velocity is told of the population around a point beside the embedding, such as :class:`OwnUnits` (which costs nothing
            and helps wherever populations differ in place, width or orientation) or :class:`KernelMeans`: by far the better for populations that
            are like none of the training, in few dimensions. None for the embedding alone.
        velocity: The network ``net(t, x, context)``; a :class:`FieldNetwork` if None.
        treatment_dim: The number of components of treatments, which are joined to the embedding; 0 for none.
        interpolant: The path; the straight line if None.
        num_points: The number of points of a population in a step.

    Batches are those of :class:`Populations`.

    Raises:
        InvalidInputError: If the coupling is unknown, or a network can't be called.

    Example:
        >>> import stochdyn as sd
        >>> data = Populations([torch.randn(30, 2) for _ in range(4)], [torch.randn(30, 2) for _ in range(4)])
        >>> from stochdyn.interpolants import SetEncoder
        >>> objective = PopulationRegression(2, SetEncoder(2), "independent")
        >>> result = sd.fit(objective, data, steps=2, batch_size=2, progress=False)
        >>> objective.generator().sample(torch.randn(7, 2), num_steps=2).shape
        torch.Size([7, 2])

    Reference:
        Atanackovic et al., "Meta flow matching: integrating vector fields on the Wasserstein manifold", 2024.
    """

    def __init__(
        self,
        dim: int,
        encoder: nn.Module | None,
        coupling: str = "paired",
        *,
        around: nn.Module | None = None,
        velocity: nn.Module | None = None,
        treatment_dim: int = 0,
        interpolant: Interpolant | None = None,
        num_points: int = 128,
    ) -> None:
        super().__init__()
        check_positive_int(dim, "dim")
        check_positive_int(treatment_dim, "treatment_dim", 0)
        check_positive_int(num_points, "num_points")
        if encoder is not None:
            check_callable(encoder, "encoder", "a network of samples, such as SetEncoder(dim)")
        check_choice(coupling, ("paired", "independent", "ot"), "coupling")
        if interpolant is not None:
            check_type(interpolant, Interpolant, "interpolant")
            if interpolant.kind != "two-sided" or interpolant.has_latent:
                raise InvalidInputError(
                    "populations travel on two-sided paths without a latent",
                    got=f"path {interpolant.path!r}",
                    expected="such as Interpolant('linear', 'zero')",
                )
        for name, part in (("encoder", encoder), ("around", around)):
            if isinstance(part, SampleEncoder | Surroundings) and part.dim != dim:
                raise ShapeError(f"the {name} is of another dimension", got=part.dim, expected=dim)
        if around is not None:
            check_callable(around, "around", "a module of points and a sample, such as KernelMeans(dim)")
        if velocity is None:
            size = treatment_dim
            if encoder is not None:
                check_type(
                    encoder, SampleEncoder, "encoder", hint="give velocity=... for an encoder of your own"
                )
                size += encoder.out  # type: ignore[operator, assignment]
            if around is not None:
                check_type(around, Surroundings, "around", hint="give velocity=... for one of your own")
                size += around.out  # type: ignore[operator, assignment]
            velocity = FieldNetwork(dim, condition_dim=size)
        check_callable(velocity, "velocity", "a network, net(t, x, context)")
        self.interpolant = Interpolant("linear", "zero") if interpolant is None else interpolant
        self.field = PopulationField(dim, encoder, velocity, around)
        self.coupling, self.dim, self.treatment_dim, self.num_points = (
            coupling,
            dim,
            treatment_dim,
            num_points,
        )

    def forward(self, batch: Any = None) -> ObjectiveValue:
        """Evaluate on a batch of populations.

        Raises:
            InvalidInputError: If the batch isn't one of :class:`Populations`, or lacks treatments.
            ShapeError: If paired samples differ in size.
        """
        if isinstance(batch, Populations):
            batch = torch.utils.data.default_collate([batch[i] for i in range(len(batch))])
        if not isinstance(batch, dict) or not {"x0", "x1", "count0", "count1"} <= set(batch):
            raise InvalidInputError(
                "a batch is one of Populations",
                got=type(batch).__name__,
                hint="sd.fit(objective, Populations(...))",
            )
        x0, x1, treatment = batch["x0"], batch["x1"], batch.get("treatment")
        size = 0 if treatment is None else treatment.shape[-1]
        if x0.shape[-1] != self.dim or size != self.treatment_dim:
            raise ShapeError(
                "the populations don't fit the objective",
                got=f"points of {x0.shape[-1]} components, treatments of {size}",
                expected=f"{self.dim} and {self.treatment_dim}",
            )
        count0, count1 = batch["count0"], batch["count1"]
        start, end = self._draw(x0, x1, count0, count1)
        self.field.observe(start.detach().reshape(-1, self.dim))
        # other points for the embedding, whose number varies from step to step
        fewest = max(2, self.num_points // 2)
        size = int(torch.randint(min(fewest, self.num_points), self.num_points + 1, ()))
        sample = _pick(x0, _indices(count0, size))
        context = self.field.embed(sample, treatment)
        t = torch.rand(*start.shape[:2], 1, dtype=x0.dtype, device=x0.device)
        x = self.interpolant.mean(t, start, end)
        value = self.field(t, x, context, sample)
        error = (value - self.interpolant.mean_derivative(t, start, end)) / self.field.scale
        loss = 0.5 * error.square().sum(-1).mean()
        return ObjectiveValue(loss, {"velocity": loss.detach()}, "surrogate")

    def _draw(self, x0: Tensor, x1: Tensor, count0: Tensor, count1: Tensor) -> tuple[Tensor, Tensor]:
        """Draw coupled points ``(P, n, d)`` of every population."""
        first = _indices(count0, self.num_points)
        if self.coupling == "paired":
            if not torch.equal(count0, count1):
                raise ShapeError(
                    "paired samples must have one size per population",
                    got=f"{count0.tolist()[:6]} and {count1.tolist()[:6]}",
                    hint="use coupling='independent' or 'ot'",
                )
            return _pick(x0, first), _pick(x1, first)
        start, end = _pick(x0, first), _pick(x1, _indices(count1, self.num_points))
        if self.coupling == "ot":
            plan = ExactCoupling()
            end = torch.stack([b[plan.pair(a, b)] for a, b in zip(start, end, strict=True)])
        return start, end

    def generator(self) -> PopulationGenerator:
        """Return the model that carries populations; it shares the networks."""
        from stochdyn.interpolants.populations.generator import PopulationGenerator

        return PopulationGenerator(self.field, self.treatment_dim)


def _indices(count: Tensor, size: int) -> Tensor:
    """Draw ``size`` points of every population, with replacement: ``(P, size)``."""
    u = torch.rand(len(count), size, device=count.device, dtype=torch.float64)
    return (u * count[:, None]).long().clamp_max(count[:, None] - 1)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index.unsqueeze(-1).expand(*index.shape, x.shape[-1]))
