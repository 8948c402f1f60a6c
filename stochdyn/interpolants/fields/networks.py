"""Networks as fields of an interpolant: any of velocity, score, noise and end means, whatever was learnt."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from stochdyn._checks import (
    check_bool,
    check_callable,
    check_choice,
    check_event_size,
    check_mapping,
    check_positive_int,
    check_real,
    check_type,
    values_are_checked,
)
from stochdyn.core.forward.flow import as_time
from stochdyn.core.networks import MLP, ResidualMLP
from stochdyn.errors import DtypeMismatchError, InvalidInputError, ShapeError
from stochdyn.interpolants.fields.buffers import FlexibleBuffers
from stochdyn.interpolants.fields.conditions import SeenConditions
from stochdyn.interpolants.fields.conversions import anchors, check_known, conversion, determines, regular_at
from stochdyn.interpolants.paths.interpolant import Interpolant

__all__ = ["FieldNetwork", "Fields", "NetworkAdapter", "evaluating"]

Network = Callable[..., Tensor]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module into evaluation mode (dropout and the like switched off), and back as it was."""
    changed = [m for m in module.modules() if m.training]
    for m in changed:
        m.training = False
    try:
        yield
    finally:
        for m in changed:
            m.training = True


class TimedNetwork(nn.Module, ABC):
    """A network with a part that depends on time alone, which can be computed for many times at once."""

    @abstractmethod
    def at_times(self, times: Tensor) -> AbstractContextManager[None]:
        """Compute it for times ``(n,)``; inside the block it serves evaluations at one of them for all points."""


class FieldNetwork(nn.Module):
    r"""A fully connected network for a field: ``net(t, x, condition)``.

    Args:
        dim: The number of components of a point.
        width: The width of the hidden layers.
        depth: The number of hidden layers.
        condition_dim: The dimension of a context vector; 0 for none.
        num_classes: The number of labels, given as integers; 0 for none. One more embedding stands for "no label" (its index is
            ``num_classes``).
        activation: The name of the nonlinearity between layers, as in :class:`stochdyn.core.MLP`.
        out_dim: The number of components of the output; that of a point if None.
        skips: Whether every hidden layer adds to what came before (:class:`stochdyn.core.networks.ResidualMLP`), for networks of five
            hidden layers and more.

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
        activation: str | Callable[[Tensor], Tensor] = "silu",
        out_dim: int | None = None,
        skips: bool = False,
    ) -> None:
        super().__init__()
        check_bool(skips, "skips")
        for name, size, least in (
            ("dim", dim, 1), ("width", width, 1), ("depth", depth, 1), ("condition_dim", condition_dim, 0), ("num_classes", num_classes, 0),
        ):  # fmt: skip
            check_positive_int(size, name, least)
        if out_dim is not None:
            check_positive_int(out_dim, "out_dim")
        if condition_dim and num_classes:
            raise InvalidInputError(
                "a condition is a label or a context vector, not both",
                got=f"condition_dim={condition_dim}, num_classes={num_classes}",
                hint="embed the label yourself and pass one context vector",
            )
        self.dim, self.condition_dim, self.num_classes = dim, condition_dim, num_classes
        extra = condition_dim
        if num_classes:
            extra = 16
            self.embedding = nn.Embedding(num_classes + 1, extra)
        out = dim if out_dim is None else out_dim
        self.net: MLP | ResidualMLP
        if skips:
            self.net = ResidualMLP(dim + 1 + extra, width, depth, out, activation)
        else:
            self.net = MLP((dim + 1 + extra, *[width] * depth, out), activation=activation)

    @property
    def layers(self) -> nn.ModuleList:
        """The linear layers, from the input to the output."""
        return self.net.layers

    def forward(self, t: Tensor, x: Tensor, condition: Tensor | None = None) -> Tensor:
        """Return ``(..., dim)`` for ``t (..., 1)``, ``x (..., dim)`` and a context ``(..., c)`` or labels ``(...)``.

        Raises:
            InvalidInputError: If the network has no input for a condition, or labels aren't whole numbers.
            ShapeError: If the context has another size.
        """
        if not isinstance(x, Tensor) or not isinstance(t, Tensor) or x.shape[-1:] != (self.dim,):
            check_type(t, Tensor, "t")
            check_event_size(x, self.dim, "x")
        if t.shape != (*x.shape[:-1], 1):
            raise ShapeError(
                "there must be one time per point",
                got=tuple(t.shape),
                expected=(*x.shape[:-1], 1),
                hint="use t[:, None]",
            )
        if x.dtype != (own := self.layers[0].weight.dtype) and not torch.is_autocast_enabled(x.device.type):
            raise DtypeMismatchError(
                "the network and the points have different precisions",
                got=f"{own} and {x.dtype}",
                hint="convert one with .to(dtype)",
            )
        parts = [t.to(x.dtype), x]
        if condition is not None:
            self._check_condition(condition)
        if self.num_classes:
            if condition is None:
                condition = torch.full(x.shape[:-1], self.num_classes, dtype=torch.long, device=x.device)
            parts.append(self.embedding(condition))
        elif self.condition_dim:
            if condition is None:
                condition = x.new_zeros(self.condition_dim)
            parts.append(condition.to(x.dtype).expand(*x.shape[:-1], self.condition_dim))
        return self.net(torch.cat(parts, -1))

    def _check_condition(self, condition: Any) -> None:
        check_type(condition, Tensor, "condition")
        if not self.num_classes and not self.condition_dim:
            raise InvalidInputError(
                "the network has no input for a condition",
                got=f"a condition of shape {tuple(condition.shape)}",
                hint="build it with num_classes=... for labels, or condition_dim=... for context vectors",
            )
        if self.num_classes:
            if condition.is_floating_point():
                raise InvalidInputError(
                    "labels must be whole numbers", got=condition.dtype, hint="use labels.long()"
                )
            # a look at labels elsewhere would wait for the device
            if condition.device.type == "cpu" and values_are_checked():
                outside = (condition < 0) | (condition > self.num_classes)
                if bool(outside.any()):
                    raise InvalidInputError(
                        "there is no such label",
                        got=sorted(set(condition[outside].reshape(-1).tolist()))[:5],
                        expected=f"0 to {self.num_classes - 1}, or {self.num_classes} for no label",
                        hint="give num_classes=... the number of labels",
                    )
        elif condition.ndim == 0 or condition.shape[-1] != self.condition_dim:
            raise ShapeError(
                "the context has the wrong size",
                got=tuple(condition.shape),
                expected=f"(..., {self.condition_dim})",
            )


class NetworkAdapter(nn.Module):
    """A network of your own, with its own order of arguments and form of time, as a field.

    The library calls fields as ``net(t, x)`` or ``net(t, x, condition)``, with ``t (n, 1)`` in [0, 1] and ``x (n, *event)``. Wrap a
    network that expects something else, such as a U-Net called as ``net(x, timesteps, labels)``.

    Args:
        network: A callable or a module.
        time_first: Whether the network is called as ``net(t, x)``; otherwise as ``net(x, t)``.
        time: The form of the times: ``"column"`` passes them as ``(n, 1)``, ``"flat"`` as ``(n,)``, ``"event"`` as ``(n, 1, ..., 1)``
            beside the event.
        time_scale: A factor on the times, such as 1000 for networks made for a thousand integer steps.
        condition: The name of the keyword that takes the condition; None passes it as the third argument.

    Raises:
        InvalidInputError: If the network isn't callable, or the form of the time is unknown.

    Example:
        >>> net = NetworkAdapter(lambda x, t: x * t[:, None], time_first=False, time="flat")
        >>> net(torch.full((2, 1), 0.5), torch.ones(2, 3)).sum()
        tensor(3.)
    """

    def __init__(
        self,
        network: Callable[..., Tensor],
        *,
        time_first: bool = True,
        time: str = "column",
        time_scale: float = 1.0,
        condition: str | None = None,
    ) -> None:
        super().__init__()
        check_callable(network, "network", "a network, net(t, x) or net(x, t)")
        check_bool(time_first, "time_first")
        check_choice(time, ("column", "flat", "event"), "time")
        check_real(time_scale, "time_scale", above=0.0)
        if condition is not None:
            check_type(condition, str, "condition")
        self.network, self.time_first, self.time = network, time_first, time
        self.time_scale, self.condition = float(time_scale), condition

    def forward(self, t: Tensor, x: Tensor, condition: Any = None) -> Tensor:
        """Return the field ``(n, *event)`` for ``t (n, 1)``, or one time ``()`` for all, and ``x (n, *event)``."""
        time = (t.expand(x.shape[0], 1) if t.ndim == 0 else t) * self.time_scale
        if self.time == "flat":
            time = time.squeeze(-1)
        elif self.time == "event":
            time = time.reshape(-1, *[1] * (x.ndim - 1))
        arguments = [time, x] if self.time_first else [x, time]
        if condition is None:
            return self.network(*arguments)
        if self.condition is None:
            return self.network(*arguments, condition)
        return self.network(*arguments, **{self.condition: condition})


class Fields(FlexibleBuffers):
    r"""Fields of an interpolant, evaluated from one or two networks.

    Events of any shape are vectors to everything but the networks, which see them in their own shape.

    Args:
        interpolant: The path.
        networks: The networks by name (``"velocity"``, ``"path_velocity"``, ``"score"``, ``"noise_prediction"``, ``"start_prediction"``,
            ``"data_prediction"``); called as ``net(t, x)`` with ``t (..., 1)``, or ``net(t, x, condition)`` where there is one.
        clip: The distance from the ends of [0, 1] to which times are moved at which a converted field is known as a limit only.
        null_condition: What stands for no condition, in classifier-free guidance.
        independent: Whether the two ends are independent. If they aren't, the noise of a one-sided path isn't either, and its
            mean gives no score.
        anchored: Whether predictions are held to what they must be at an end, see :meth:`call`.

    Raises:
        InvalidInputError: If there are no networks, or they don't belong to the path.
    """

    flexible = ("event_sizes", "null_condition")
    event_sizes: Tensor
    null_condition: Tensor | None

    _derived_ = ("_functions",)

    def __init__(
        self,
        interpolant: Interpolant,
        networks: Mapping[str, Network],
        clip: float = 1e-3,
        null_condition: Tensor | None = None,
        independent: bool = True,
        anchored: bool = True,
    ) -> None:
        super().__init__()
        check_bool(anchored, "anchored")
        check_type(interpolant, Interpolant, "interpolant")
        check_mapping(networks, "networks", "networks by the names of their fields")
        self.anchored = anchored
        check_known(interpolant, list(networks))
        self._scoreless = interpolant.kind == "one-sided" and not independent
        if self._scoreless and "score" in networks:
            raise InvalidInputError(
                "a score on a one-sided path needs the independent coupling",
                hint="give the path a latent, such as path='linear' with gamma='brownian'",
            )
        for name, net in networks.items():
            check_callable(net, name, "a network, net(t, x)")
        check_real(clip, "clip", above=0.0, below=0.5)
        self.interpolant, self.clip = interpolant, clip
        self.networks = nn.ModuleDict({n: f for n, f in networks.items() if isinstance(f, nn.Module)})
        self._functions = {n: f for n, f in networks.items() if not isinstance(f, nn.Module)}
        self.names = tuple(networks)
        self.hold("null_condition", None if null_condition is None else torch.as_tensor(null_condition))
        self.hold("event_sizes", torch.zeros(0, dtype=torch.long))
        self._event_shape: tuple[int, ...] | None = None
        self.conditions = SeenConditions()

    @property
    def event_shape(self) -> tuple[int, ...] | None:
        """The shape of an event, or None as long as no batch was seen."""
        if self._event_shape is None and self.event_sizes.numel():
            self._event_shape = tuple(self.event_sizes.tolist())
        return self._event_shape

    def observe_shape(self, event_shape: tuple[int, ...]) -> None:
        """Note the shape of events.

        Raises:
            ShapeError: If events of another shape were seen before.
        """
        if self.event_shape is None:
            self.event_sizes = torch.tensor(event_shape, dtype=torch.long, device=self.event_sizes.device)
            self._event_shape = None
        elif self.event_shape != tuple(event_shape):
            raise ShapeError(
                "the data have events of another shape than before",
                got=tuple(event_shape),
                expected=self.event_shape,
            )

    def buffers_changed(self) -> None:
        """Forget what was derived from buffers."""
        self._event_shape = None

    @property
    def has_score(self) -> bool:
        """Whether the networks determine a score."""
        return not self._scoreless and determines(self.interpolant, self.names, "score")

    @contextmanager
    def at_times(self, times: Callable[[], Tensor]) -> Iterator[None]:
        """Let networks compute at once what depends on times alone, for evaluations at one of them inside the block.

        Args:
            times: A function that returns them, ``(n,)``; it is called only if a network has such a part.
        """
        timed = [net for net in self.networks.values() if isinstance(net, TimedNetwork)]
        with ExitStack() as stack:
            if timed:
                known = times()
                for net in timed:
                    stack.enter_context(net.at_times(known))
            yield

    @property
    def owns_all(self) -> bool:
        """Whether all that is learnt is a parameter here, rather than something that a function sees or Pyro samples."""
        return not self._functions and not any(isinstance(m, PyroModule) for m in self.modules())

    def regular_at(self, target: str, end: int) -> bool:
        """Return whether a field can be evaluated at time 0 or 1 itself, and not only near it."""
        return regular_at(self.interpolant, self.names, target, end)

    def call(self, name: str, t: Tensor, x: Tensor, condition: Any = None) -> Tensor:
        r"""Return a field that is learnt, at ``t (..., 1)``.

        It is what the network returns, but for a prediction that is divided by the distance :math:`d` from an end, where its value
        :math:`\eta_e(x)` is known: the network's error there is taken off nearby,
        :math:`\hat\eta=N(t,x)-(1-d)^2\,[N(e,x)-\eta_e(x)]`. In training and afterwards alike, and nothing for an exact one.
        """
        ends = anchors(self.interpolant, self.names, name) if self.anchored else ()
        if not ends:
            return self._network(name, t, x, condition)
        flat = x.reshape(-1, x.shape[-1])
        times = t.expand(*x.shape[:-1], 1).reshape(-1, 1)
        copies = 1 + len(ends)
        if isinstance(condition, Tensor):
            if condition.shape[: x.ndim - 1] == x.shape[:-1]:
                condition = condition.reshape(len(flat), *condition.shape[x.ndim - 1 :])
            if condition.ndim and len(condition) == len(flat):
                condition = condition.repeat(copies, *[1] * (condition.ndim - 1))
        every = torch.cat([times, *(torch.full_like(times, float(end)) for end in ends)])
        value, *limits = self._network(name, every, flat.repeat(copies, 1), condition).chunk(copies)
        for end, limit in zip(ends, limits, strict=True):
            error = limit - (-flat if name == "score" else flat)
            share = (times if end else 1 - times).square()
            # an exact field may be no number at the end itself
            value = value - share * torch.where(torch.isfinite(error), error, torch.zeros_like(error))
        return value.reshape(x.shape)

    def _network(self, name: str, t: Tensor, x: Tensor, condition: Any) -> Tensor:
        """Evaluate a network."""
        net = self.networks[name] if name in self.networks else self._functions[name]
        event = self.event_shape
        shaped = event is not None and len(event) != 1
        seen = x.reshape(-1, *event) if shaped else x  # type: ignore[misc]
        time = t.reshape(-1, 1) if shaped else t
        try:
            value: Tensor = net(time, seen) if condition is None else net(time, seen, condition)
        except RuntimeError as error:
            _explain_precision(net, x, name, error)
            raise
        if not isinstance(value, Tensor) or value.shape != seen.shape:
            raise ShapeError(
                f"the network of the {name} returns the wrong shape",
                got=tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__,
                expected=tuple(seen.shape),
            )
        return value.reshape(x.shape) if shaped else value

    def guided(self, name: str, t: Tensor, x: Tensor, condition: Any, guidance: float) -> Tensor:
        """Evaluate a network with classifier-free guidance."""
        if condition is None:
            if guidance != 1.0:
                raise InvalidInputError(
                    "guidance needs a condition", got=f"guidance={guidance:g}, condition=None"
                )
            return self.call(name, t, x, self._absent(name, x))
        value = self.call(name, t, x, condition)
        if guidance == 1.0:
            return value
        return torch.lerp(self.call(name, t, x, self.null_of(condition)), value, guidance)

    def _absent(self, name: str, x: Tensor) -> Tensor | None:
        """Return what stands for no condition, where the model knows no other way to go without."""
        if not self.conditions.always:
            return None
        if self.null_condition is None:
            if name in self.networks and isinstance(self.networks[name], FieldNetwork):
                self.conditions.check_absent()
            return None  # a network of the user's own knows what it does without
        null = self.null_condition.to(x) if self.null_condition.is_floating_point() else self.null_condition
        return null.expand(*x.shape[:-1], *null.shape)

    def null_of(self, condition: Tensor) -> Tensor:
        """Return what stands for no condition, in the shape of ``condition``.

        Raises:
            InvalidInputError: If the model has no null condition.
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
            targets: The weights by name of field; numbers, or tensors that broadcast to ``x[..., :1]``.
            t: The times that broadcast to ``x[..., :1]``.
            x: The points, ``(..., d)``.
            condition: The labels or contexts that are passed on to the networks; None for none.
            guidance: The strength of classifier-free guidance: 1 for none, 0 for the unconditional model.
        """
        time = self._moved(targets, as_time(t, x).to(x.dtype))
        at_points: Tensor | None = None
        at_fields: list[Tensor | None] = [None] * len(self.names)
        for name, weight in targets.items():
            own, factors = conversion(self.interpolant, self.names, name, time)
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

    def _moved(self, targets: Mapping[str, Any], t: Tensor) -> Tensor:
        """Move times off an end where a field is known as a limit only: the network and its factors see the same time."""
        regular = [all(self.regular_at(name, end) for name in targets) for end in (0, 1)]
        if all(regular):
            return t
        return t.clamp(0.0 if regular[0] else self.clip, 1.0 if regular[1] else 1 - self.clip)

    def forward(
        self, name: str, t: Tensor | float, x: Tensor, condition: Any = None, guidance: float = 1.0
    ) -> Tensor:
        """Return the field ``name`` at ``x (..., d)``.

        Raises:
            UnavailableError: If the networks don't determine it.
        """
        if name in self.names:
            time = as_time(t, x).to(x.dtype).expand(*x.shape[:-1], 1)
            return self.guided(name, time, x, condition, guidance)
        return self.combine({name: 1.0}, t, x, condition, guidance)


def _explain_precision(net: Network, x: Tensor, name: str, error: RuntimeError) -> None:
    """Raise a typed error where a network failed because its precision isn't that of the points."""
    own = (
        next((p for p in net.parameters() if p.is_floating_point()), None)
        if isinstance(net, nn.Module)
        else None
    )
    if own is not None and own.dtype != x.dtype and not torch.is_autocast_enabled(x.device.type):
        raise DtypeMismatchError(
            f"the network of the {name} and the points have different precisions",
            got=f"{own.dtype} and {x.dtype}",
            hint="convert the data with .to(dtype), or the network",
        ) from error


def _add(total: Tensor | None, value: Tensor | None, weight: Tensor | float) -> Tensor | None:
    if value is None:
        return total
    return value * weight if total is None else total + value * weight


def check_dim(x: Tensor, dim: int | None) -> None:
    """Raise unless ``x`` has the dimension of the model, where that is known."""
    if dim is not None:
        check_event_size(x, dim, "x")
