"""Networks as fields of an interpolant: any of velocity, score, denoiser and end means, whatever was learnt."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stochdyn._checks import check_event_size
from stochdyn.core.forward.flow import as_time
from stochdyn.errors import InvalidInputError, ShapeError
from stochdyn.interpolants.fields.conversions import check_known, conversion
from stochdyn.interpolants.paths.interpolant import Interpolant

__all__ = ["FieldNetwork", "Fields"]

Network = Callable[..., Tensor]


class FieldNetwork(nn.Module):
    r"""A fully connected network for a field: ``net(t, x, condition)``.

    Args:
        dim: dimension of the state.
        width: of the hidden layers.
        depth: number of hidden layers.
        condition_dim: dimension of a context vector; 0 for none.
        num_classes: number of labels, given as integers; 0 for none. One more embedding stands for "no label" (its index is
            ``num_classes``).
        activation: class of the activation.
        out_dim: of the output; that of the state if None.

    Example:
        >>> FieldNetwork(2)(torch.rand(5, 1), torch.zeros(5, 2)).shape
        torch.Size([5, 2])
    """

    def __init__(
        self,
        dim: int,
        width: int = 64,
        depth: int = 3,
        *,
        condition_dim: int = 0,
        num_classes: int = 0,
        activation: type[nn.Module] = nn.SiLU,
        out_dim: int | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.condition_dim, self.num_classes = dim, condition_dim, num_classes
        extra = condition_dim
        if num_classes:
            extra = 16
            self.embedding = nn.Embedding(num_classes + 1, extra)
        sizes = [dim + 1 + extra, *[width] * depth]
        layers: list[nn.Module] = []
        for a, b in itertools.pairwise(sizes):
            layers += [nn.Linear(a, b), activation()]
        layers.append(nn.Linear(sizes[-1], dim if out_dim is None else out_dim))
        self.layers = nn.Sequential(*layers)

    def forward(self, t: Tensor, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return ``(..., dim)`` for ``t (..., 1)``, ``x (..., dim)`` and a context ``(..., c)`` or labels ``(...)``."""
        parts = [t, x]
        if self.num_classes:
            if condition is None:
                condition = torch.full(x.shape[:-1], self.num_classes, dtype=torch.long, device=x.device)
            parts.append(self.embedding(condition))
        elif self.condition_dim:
            if condition is None:
                condition = x.new_zeros(self.condition_dim)
            parts.append(condition.expand(*x.shape[:-1], self.condition_dim))
        return self.layers(torch.cat(parts, -1))


class Fields(nn.Module):
    r"""Fields of an interpolant, evaluated from one or two networks.

    Args:
        interpolant: the path.
        networks: by name (``"velocity"``, ``"v"``, ``"score"``, ``"denoiser"``, ``"eta0"``, ``"eta1"``); called as
            ``net(t, x)`` with ``t (..., 1)``, or ``net(t, x, condition)`` where there is one.
        clip: distance from the ends of [0, 1] at which coefficients that grow without bound are held.
        null_condition: what stands for no condition, in classifier-free guidance.
        independent: whether the two ends are independent. If they aren't, the noise of a one-sided path isn't either, and its
            mean gives no score.

    Raises:
        InvalidInputError: if there are no networks, or they don't belong to the path.
    """

    def __init__(
        self,
        interpolant: Interpolant,
        networks: Mapping[str, Network],
        clip: float = 1e-3,
        null_condition: Tensor | None = None,
        independent: bool = True,
    ) -> None:
        super().__init__()
        check_known(interpolant, list(networks))
        self._scoreless = interpolant.kind == "one-sided" and not independent
        if self._scoreless and "score" in networks:
            raise InvalidInputError(
                "a score on a one-sided path needs the independent coupling",
                hint="give the path a latent, such as path='linear' with gamma='brownian'",
            )
        for name, net in networks.items():
            if not callable(net):
                raise InvalidInputError(
                    f"{name} must be callable", got=type(net).__name__, expected="net(t, x)"
                )
        if not 0 < clip < 0.5:
            raise InvalidInputError("clip must lie between 0 and 0.5", got=clip)
        self.interpolant, self.clip = interpolant, clip
        self.networks = nn.ModuleDict({n: f for n, f in networks.items() if isinstance(f, nn.Module)})
        self._functions = {n: f for n, f in networks.items() if not isinstance(f, nn.Module)}
        self.names = tuple(networks)
        self.null_condition: Tensor | None
        self.register_buffer("null_condition", null_condition, persistent=False)

    @property
    def has_score(self) -> bool:
        """Whether the networks determine a score."""
        it = self.interpolant
        if self._scoreless or (not it.has_latent and it.kind != "one-sided"):
            return False
        needed = 1 if it.kind in ("one-sided", "mirror") else 2
        return len(self.names) >= needed or bool({"score", "denoiser"} & set(self.names))

    @property
    def singular_start(self) -> bool:
        """Whether the velocity is known at time 0 only as a limit: one-sided paths on which only the noise is learnt."""
        return self.interpolant.kind == "one-sided" and self.names[0] in ("denoiser", "score", "eta0")

    def call(self, name: str, t: Tensor, x: Tensor, condition: Any = None) -> Tensor:
        """Evaluate a network at ``t (..., 1)``."""
        net = self.networks[name] if name in self.networks else self._functions[name]
        value: Tensor = net(t, x) if condition is None else net(t, x, condition)
        if value.shape != x.shape:
            raise ShapeError(
                f"the network of the {name} has the wrong shape",
                got=tuple(value.shape),
                expected=tuple(x.shape),
            )
        return value

    def guided(self, name: str, t: Tensor, x: Tensor, condition: Any, guidance: float) -> Tensor:
        """Evaluate a network with classifier-free guidance."""
        value = self.call(name, t, x, condition)
        if guidance == 1.0 or condition is None:
            return value
        return torch.lerp(self.call(name, t, x, self.null_of(condition)), value, guidance)

    def null_of(self, condition: Tensor) -> Tensor:
        """Return what stands for no condition, in the shape of ``condition``.

        Raises:
            InvalidInputError: if the model has no null condition.
        """
        if self.null_condition is None:
            raise InvalidInputError(
                "guidance needs a null condition",
                hint="train with null_condition=... and condition_dropout above 0",
            )
        return self.null_condition.to(condition).expand_as(condition)

    def combine(
        self,
        targets: Mapping[str, Tensor | float],
        t: Tensor | float,
        x: Tensor,
        condition: Any = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """Return a weighted sum of fields at once, each network evaluated a single time.

        Args:
            targets: weights by name of field; numbers, or tensors that broadcast to ``x[..., :1]``.
            t: times that broadcast to ``x[..., :1]``.
            x: ``(..., d)``.
            condition: passed on to the networks.
            guidance: strength of classifier-free guidance: 1 for none, 0 for the unconditional model.
        """
        time = as_time(t, x).to(x.dtype)
        at_points: Tensor | None = None
        at_fields: list[Tensor | None] = [None] * len(self.names)
        for name, weight in targets.items():
            own, factors = conversion(self.interpolant, self.names, name, time, self.clip)
            at_points = _add(at_points, own, weight)
            at_fields = [_add(a, b, weight) for a, b in zip(at_fields, factors, strict=True)]
        each = time.expand(*x.shape[:-1], 1)
        total = None if at_points is None else at_points * x
        for name, factor in zip(self.names, at_fields, strict=True):
            if factor is None:
                continue
            value = self.guided(name, each, x, condition, guidance)
            total = factor * value if total is None else torch.addcmul(total, factor.expand_as(value), value)
        assert total is not None
        return total

    def forward(
        self, name: str, t: Tensor | float, x: Tensor, condition: Any = None, guidance: float = 1.0
    ) -> Tensor:
        """Return the field ``name`` at ``x (..., d)``.

        Raises:
            UnavailableError: if the networks don't determine it.
        """
        if name in self.names:
            time = as_time(t, x).to(x.dtype).expand(*x.shape[:-1], 1)
            return self.guided(name, time, x, condition, guidance)
        return self.combine({name: 1.0}, t, x, condition, guidance)


def _add(total: Tensor | None, value: Tensor | None, weight: Tensor | float) -> Tensor | None:
    if value is None:
        return total
    return value * weight if total is None else total + value * weight


def check_dim(x: Tensor, dim: int | None) -> None:
    """Raise unless ``x`` has the dimension of the model, where that is known."""
    if dim is not None:
        check_event_size(x, dim, "x")
