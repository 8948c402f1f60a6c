"""The watch for NaN and infinity: it names step and culprit, and keeps bad updates off the parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from stochdyn.errors import NonFiniteLossError
from stochdyn.objectives.base import ObjectiveValue
from stochdyn.run.distributed import World

__all__ = ["FiniteGuard"]

_LISTED = 5


class FiniteGuard:
    """Checks loss, terms and gradients of every step on the device.

    On the CPU looking at a flag is free, so a bad step raises before its update. Elsewhere the flag stays on
    the device and is looked at only when losses are gathered; from the bad step on the updates are undone on
    the device (or skipped inside a fused optimiser), so the parameters still are those of the last good step.

    Args:
        parameters: The trainable parameters by name.
        optimizer: The optimiser that changes them.
        device: Where flags live.
        world: The ranks that must agree.
        step: The number of steps done before.
        immediate: Whether to look at every step; None decides by the device.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        optimizer: Optimizer,
        device: torch.device,
        world: World,
        step: int = 0,
        immediate: bool | None = None,
    ) -> None:
        self._parameters = parameters
        self._optimizer = optimizer
        self._device = device
        self._world = world
        self.immediate = device.type == "cpu" if immediate is None else immediate
        self._bad = torch.zeros((), dtype=torch.int32, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._start = step
        self._names: tuple[str, ...] = ()
        self._record: Tensor | None = None
        self._kept: list[Tensor] = []

    @property
    def alive(self) -> Tensor | None:
        """Device-side 1 while all steps were finite, else 0; None when every step is looked at anyway."""
        return None if self.immediate else 1 - self._bad

    @torch.no_grad()
    def inspect(self, value: ObjectiveValue) -> None:
        """Check one step, after its backward pass and before its update.

        Raises:
            NonFiniteLossError: If a loss isn't finite, in immediate mode.
        """
        # A parameter without entries has nothing that could go wrong, and no largest entry either.
        grads = {n: p.grad for n, p in self._parameters.items() if p.grad is not None and p.grad.numel()}
        if self.immediate and self._world.size == 1 and _surely_finite(value, list(grads.values())):
            self._start += 1
            return
        names = (*value.terms, "", *grads)
        finite = torch.cat([self._finite_values(value), self._finite_gradients(list(grads.values()))])
        if names != self._names:
            self.look()
            self._names, self._record = names, torch.ones_like(finite)
        assert self._record is not None
        was_bad = self._bad.bool()
        self._record = torch.where(was_bad, self._record, finite)
        # A rank with a finite loss must stop with the others, or it would wait for them forever.
        self._bad = torch.maximum(self._bad, self._world.maximum((~finite.all()).to(torch.int32)))
        self._good_steps += 1 - self._bad
        if self.immediate:
            self.look()

    def _finite_values(self, value: ObjectiveValue) -> Tensor:
        scalars = [*(torch.as_tensor(t).detach() for t in value.terms.values()), value.loss.detach()]
        return torch.stack([torch.isfinite(s).reshape(()).to(self._device) for s in scalars])

    def _finite_gradients(self, grads: list[Tensor]) -> Tensor:
        dense = [g.coalesce().values() if g.is_sparse else g for g in grads]
        flags = torch.ones(len(dense), dtype=torch.bool, device=self._device)
        for dtype in dict.fromkeys(g.dtype for g in dense):
            index = [i for i, g in enumerate(dense) if g.dtype == dtype]
            # The largest entry, and not the 2-norm: squares of finite gradients may overflow.
            largest = torch._foreach_norm([dense[i] for i in index], float("inf"))
            found = torch.isfinite(torch.stack([x.to(self._device) for x in largest]))
            if len(index) == len(dense):
                return found
            flags[index] = found
        return flags

    @torch.no_grad()
    def update(self) -> None:
        """Let the optimiser step; a bad step, and all after it, leave the parameters as they are."""
        if self.immediate:
            self._optimizer.step()
            return
        if getattr(self._optimizer, "_step_supports_amp_scaling", False):
            # The switch of gradient scalers: a fused optimiser skips its update where found_inf is not 0.
            self._optimizer.found_inf = self._bad.to(torch.float32)  # type: ignore[attr-defined]
            self._optimizer.step()
            del self._optimizer.found_inf  # type: ignore[attr-defined]
            return
        parameters = [p.detach() for p in self._parameters.values()]
        if not self._kept:
            self._kept = [torch.empty_like(p) for p in parameters]
        torch._foreach_copy_(self._kept, parameters)
        self._optimizer.step()
        for parameter, kept in zip(parameters, self._kept, strict=True):
            parameter.copy_(torch.where(self._bad.bool(), kept, parameter))

    def look(self) -> None:
        """Wait for the device and raise if a step was bad.

        Raises:
            NonFiniteLossError: If a loss or a gradient isn't finite; the message names the step and the terms or the
                parameters' gradients.
        """
        if not bool(self._bad):
            return
        step = self._start + int(self._good_steps) + 1
        assert self._record is not None
        found = [i for i, ok in enumerate(self._record.tolist()) if not ok]
        split = self._names.index("")
        terms = [self._names[i] for i in found if i < split]
        gradients = [self._names[i] for i in found if i > split]
        raise _error(step, terms, split in found, gradients)


def _surely_finite(value: ObjectiveValue, grads: list[Tensor]) -> bool:
    """Quick test on the CPU; False means that the thorough one must tell."""
    if not all(math.isfinite(s) for s in (value.loss, *value.terms.values())):
        return False
    if not grads or any(g.is_sparse or g.dtype != grads[0].dtype for g in grads):
        return not grads
    return math.isfinite(torch.stack(torch._foreach_norm(grads, float("inf"))).sum())


def _error(step: int, terms: list[str], loss: bool, gradients: list[str]) -> NonFiniteLossError:
    if terms:
        what = f"term {_listed(terms)} of the objective is not finite"
        hint = "look at the data and the inputs of this term"
    elif loss:
        what, hint = (
            "the loss is not finite",
            "report its parts as terms of the ObjectiveValue to see which one it is",
        )
    elif gradients:
        what = f"the gradient of parameter {_listed(gradients)} is not finite although the loss is"
        hint = "look for sqrt, log, norm or division at 0 in the part that uses it, or try a smaller lr"
    else:
        what, hint = "the loss or a gradient on another rank is not finite", "its error names the term"
    error = NonFiniteLossError(
        f"{what} at step {step}", hint=f"{hint}. The parameters are those after step {step - 1}"
    )
    error.step = step
    return error


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(repr, names[:_LISTED])) + more
