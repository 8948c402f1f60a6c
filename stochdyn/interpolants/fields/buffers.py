"""Modules with tensors that take their shape from the data: saved, loaded and moved like all other state."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

__all__ = ["FlexibleBuffers"]


class FlexibleBuffers(nn.Module):
    """A module whose buffers named in ``flexible`` have no shape of their own: they are part of its extra state."""

    flexible: ClassVar[tuple[str, ...]] = ()

    def hold(self, name: str, value: Tensor | None) -> None:
        """Register a flexible buffer."""
        self.register_buffer(name, value, persistent=False)

    def buffers_changed(self) -> None:
        """Forget what was derived from buffers; called after they were loaded."""

    def get_extra_state(self) -> dict[str, Any]:
        """Return the flexible buffers."""
        return {name: getattr(self, name) for name in self.flexible}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Take them up again, in the precision and on the device of those that are there."""
        for name in self.flexible:
            own, value = self._buffers[name], state[name]
            if value is not None:
                value = value.detach().clone() if own is None else value.detach().to(own).clone()
            self._buffers[name] = value
        self.buffers_changed()
