"""Whether torch maps over, or differentiates forward through, what runs now: then nothing may be written in place.

This is the only place that asks torch's private interface for it.
"""

from __future__ import annotations

import torch

__all__ = ["maps_are_active", "transforms_are_active"]


def maps_are_active() -> bool:
    """Return whether a transform of ``torch.func`` is active."""
    return bool(torch._C._are_functorch_transforms_active())


def transforms_are_active() -> bool:
    """Return whether a transform of ``torch.func`` or forward-mode differentiation is active."""
    return maps_are_active() or torch.autograd.forward_ad._current_level >= 0
