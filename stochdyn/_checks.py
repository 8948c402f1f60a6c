"""The only place where user input is validated: shapes, time grids, finiteness, devices, precisions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from stochdyn.errors import (
    DeviceMismatchError,
    DiffusionError,
    DtypeMismatchError,
    EmptyDataError,
    HurstRangeError,
    InvalidInputError,
    NonFiniteError,
    ShapeError,
    TimeGridError,
)

__all__ = [
    "check_choice",
    "check_event_size",
    "check_finite",
    "check_hurst",
    "check_inside",
    "check_ndim",
    "check_nonempty",
    "check_positive",
    "check_positive_int",
    "check_same_device",
    "check_same_dtype",
    "check_time_broadcast",
    "check_time_grid",
    "values_are_checked",
]


def values_are_checked() -> bool:
    """Return whether values are looked at, and not only shapes.

    The switch is that of torch's and Pyro's distributions. Samplers turn it off, since their wildest proposals
    must count as improbable rather than end the run.
    """
    return bool(torch.distributions.Distribution._validate_args)


def check_time_grid(ts: Tensor, name: str = "ts", min_points: int = 2) -> None:
    """Raise unless ``ts`` is a finite, one-dimensional, strictly increasing floating tensor."""
    if not isinstance(ts, Tensor):
        raise TimeGridError(f"{name} must be a tensor", got=type(ts).__name__, hint="use torch.as_tensor")
    if ts.ndim != 1:
        raise TimeGridError(f"{name} must have one axis", got=f"shape {tuple(ts.shape)}")
    if ts.shape[0] < min_points:
        raise TimeGridError(f"{name} needs at least {min_points} times", got=ts.shape[0])
    if not ts.is_floating_point():
        raise TimeGridError(f"{name} must be floating", got=ts.dtype, hint=f"use {name}.double()")
    check_finite(ts, name)
    bad = (ts[1:] <= ts[:-1]).nonzero()
    if bad.numel():
        i = int(bad[0, 0])
        raise TimeGridError(
            f"{name} must increase strictly",
            got=f"{name}[{i + 1}]={ts[i + 1].item():g} after {name}[{i}]={ts[i].item():g}",
            hint="sort the times and merge repeated ones",
        )


def check_inside(times: Tensor, ts: Tensor, name: str = "times", grid: str = "ts") -> None:
    """Raise unless every one of ``times`` lies within the span of the grid ``ts``."""
    low, high = ts[0].item(), ts[-1].item()
    slack = 1e-6 * max(high - low, 1e-30)
    outside = ((times < low - slack) | (times > high + slack)).nonzero()
    if outside.numel():
        i = tuple(outside[0].tolist())
        raise TimeGridError(
            f"{name} must lie inside the span of {grid}",
            got=f"{name}{list(i)}={times[i].item():g}",
            expected=f"[{low:g}, {high:g}]",
        )


def check_finite(x: Tensor, name: str) -> None:
    """Raise if ``x`` holds NaN or infinity, unless values aren't checked."""
    if not values_are_checked():
        return
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise NonFiniteError(
            f"{name} must be finite",
            got=f"{name}{list(where)}={x[where].item()} ({int(bad.sum())} of {x.numel()} values)",
        )


def check_nonempty(x: Tensor | Sequence[object], name: str) -> None:
    """Raise if ``x`` has no elements."""
    size = x.numel() if isinstance(x, Tensor) else len(x)
    if size == 0:
        shape = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else "length 0"
        raise EmptyDataError(f"{name} is empty", got=shape)


def check_ndim(x: Tensor, ndim: int | tuple[int, ...], name: str, meaning: str) -> None:
    """Raise unless ``x`` has ``ndim`` axes; ``meaning`` names them, such as ``"(time, dim)"``."""
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if x.ndim not in allowed:
        raise ShapeError(
            f"{name} has the wrong number of axes", got=f"shape {tuple(x.shape)}", expected=meaning
        )


def check_event_size(x: Tensor, size: int, name: str, axis: int = -1) -> None:
    """Raise unless axis ``axis`` of ``x`` has ``size`` elements."""
    if x.ndim == 0 or x.shape[axis] != size:
        raise ShapeError(
            f"{name} has the wrong size along axis {axis}", got=f"shape {tuple(x.shape)}", expected=size
        )


def check_same_device(**tensors: Tensor | None) -> None:
    """Raise unless all given tensors live on one device."""
    seen = {n: t.device for n, t in tensors.items() if t is not None}
    if len(set(seen.values())) > 1:
        listing = ", ".join(f"{n} on {d}" for n, d in seen.items())
        raise DeviceMismatchError(
            "tensors must share a device", got=listing, hint="move them with .to(device)"
        )


def check_same_dtype(**tensors: Tensor | None) -> None:
    """Raise unless all given floating tensors have one precision."""
    seen = {n: t.dtype for n, t in tensors.items() if t is not None and t.is_floating_point()}
    if len(set(seen.values())) > 1:
        listing = ", ".join(f"{n} {d}" for n, d in seen.items())
        raise DtypeMismatchError(
            "tensors must share a precision", got=listing, hint="convert them with .to(dtype)"
        )


def check_positive(x: Tensor | float, name: str, error: type[InvalidInputError] = InvalidInputError) -> None:
    """Raise unless every value is finite and greater than zero, or values aren't checked."""
    if not values_are_checked():
        return
    value = torch.as_tensor(x)
    check_finite(value.detach(), name)
    if bool((value <= 0).any()):
        hint = (
            "noise on only some components is a (d, m) matrix with m < d" if error is DiffusionError else None
        )
        raise error(f"{name} must be positive", got=f"minimum {value.min().item():g}", hint=hint)


def check_positive_int(x: int, name: str, minimum: int = 1) -> None:
    """Raise unless ``x`` is an integer of at least ``minimum``."""
    if isinstance(x, bool) or not isinstance(x, int) or x < minimum:
        raise InvalidInputError(f"{name} must be an integer of at least {minimum}", got=repr(x))


def check_hurst(hurst: Tensor | float, name: str = "hurst") -> None:
    """Raise unless every value lies strictly between 0 and 1, or values aren't checked."""
    if not values_are_checked():
        return
    value = torch.as_tensor(hurst).detach()
    if not bool(((value > 0) & (value < 1)).all()):
        raise HurstRangeError(f"{name} must lie strictly between 0 and 1", got=value.tolist())


def check_choice(value: object, choices: Sequence[str], name: str) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if value not in choices:
        raise InvalidInputError(
            f"{name} is unknown", got=repr(value), expected=" | ".join(map(repr, choices))
        )


def check_time_broadcast(t: Tensor, x: Tensor, name: str = "t") -> None:
    """Raise unless the times ``t`` broadcast to ``x[..., :1]``."""
    want = (*x.shape[:-1], 1)
    aligned = (1,) * (len(want) - t.ndim) + tuple(t.shape)
    if len(aligned) != len(want) or any(a not in (1, b) for a, b in zip(aligned, want, strict=True)):
        raise ShapeError(
            f"{name} must broadcast to x[..., :1]",
            got=f"shapes {tuple(t.shape)} and {tuple(x.shape)}",
            expected=f"a number or shape {want}",
            hint=f"one time a point is {name}[:, None]; times that lead are {name}[:, None, None]",
        )
