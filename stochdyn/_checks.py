"""The only place where user input is validated, and where arrays of any kind become tensors.

Checkers take any object: what a user passed may be anything, and each of them answers with a typed error that names the
argument. ``as_*`` functions return what the rest of the library works with.
"""

from __future__ import annotations

import contextlib
import functools
import math
import numbers
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import UninitializedParameter

from stochdyn._transforms import maps_are_active
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
    "as_generator",
    "as_integers",
    "as_mask",
    "as_sample_shape",
    "as_seed",
    "as_sequence",
    "as_tensor",
    "as_time_grid",
    "check_bool",
    "check_callable",
    "check_choice",
    "check_event_size",
    "check_finite",
    "check_floating",
    "check_hurst",
    "check_inside",
    "check_mapping",
    "check_ndim",
    "check_no_gradient",
    "check_nonempty",
    "check_not_before",
    "check_points",
    "check_positive",
    "check_positive_definite",
    "check_positive_int",
    "check_real",
    "check_same_device",
    "check_same_dtype",
    "check_time_broadcast",
    "check_time_grid",
    "check_type",
    "copied",
    "is_real",
    "of_times",
    "values_are_checked",
    "values_unchecked",
    "without_mask",
]


_Owner = TypeVar("_Owner")
_Rest = ParamSpec("_Rest")


class _Here(threading.local):
    """Whether this thread has switched the checks of values off."""

    off = False


_here = _Here()


def values_are_checked() -> bool:
    """Return whether values are looked at, and not only shapes.

    The switch is that of torch's and Pyro's distributions. Samplers turn it off, since their wildest proposals
    must count as improbable rather than end the run. Transforms of ``torch.func`` can't look at values at all.
    """
    return not _here.off and bool(torch.distributions.Distribution._validate_args) and not maps_are_active()


@contextlib.contextmanager
def values_unchecked() -> Iterator[None]:
    """Look at shapes and types alone inside the block: to look at a value on a GPU is to wait for it."""
    before, _here.off = _here.off, True
    try:
        yield
    finally:
        _here.off = before


# What data without a precision of their own are read like where all is computed in double precision.
DOUBLE = torch.empty(0, dtype=torch.float64)


def as_tensor(
    x: object,
    name: str,
    ndim: int | tuple[int, ...] | None = None,
    meaning: str = "",
    *,
    like: Tensor | None = None,
    missing: bool = False,
    finite: bool = True,
) -> Tensor:
    """Turn numbers, lists, NumPy, pandas, xarray or torch data into a floating tensor.

    A torch tensor keeps its precision and device and stays on its graph; other arrays keep their floating precision,
    and whole numbers and lists take torch's default one.

    Args:
        x: The data.
        name: The argument's name, for errors.
        ndim: The numbers of axes that are allowed, any if None.
        meaning: What the axes are, such as ``"(time, dim)"``, for errors.
        like: A tensor whose precision and device data without their own (lists, numbers, whole numbers) take.
        missing: Whether NaN is allowed, as a missing value.
        finite: Whether to look at the values at all.

    Raises:
        InvalidInputError: If the data aren't numbers.
        ShapeError: If they have another number of axes, or rows of unequal lengths.
        NonFiniteError: If a value is infinite, or NaN where none may be missing.
    """
    if isinstance(x, Tensor):
        value = x
        if value.is_complex():
            raise InvalidInputError(f"{name} must be real", got=value.dtype)
    else:
        frame = like is None and _holds_floats(x)
        dtype = torch.get_default_dtype() if like is None else like.dtype
        value = _from_array(x, name, torch.float64 if frame else dtype)
    if not value.is_floating_point():
        value = value.to(torch.get_default_dtype() if like is None else like.dtype)
    if like is not None and not isinstance(x, Tensor):
        value = value.to(like.device)
    if ndim is not None:
        check_ndim(value, ndim, name, meaning or f"{ndim} axes")
    if finite and values_are_checked():
        seen = value.detach()
        check_finite(seen[~torch.isnan(seen)] if missing else seen, name)
    return value


def _has_precision(x: object) -> bool:
    """Return whether data come with a floating precision of their own."""
    dtype = getattr(x, "dtype", None)
    dtype = getattr(dtype, "numpy_dtype", dtype)  # what a nullable column of pandas holds
    return isinstance(dtype, np.dtype) and np.issubdtype(dtype, np.floating)


def _holds_floats(x: object) -> bool:
    """Return whether data are a table with a column in double precision, which an array of it then has too."""
    dtypes = getattr(x, "dtypes", None)  # of a data frame
    return isinstance(dtypes, Iterable) and any(getattr(d, "numpy_dtype", d) == np.float64 for d in dtypes)


def without_mask(x: object) -> np.ndarray:
    """Return an array in which NaN stands where a masked array hides a number, and None where it hides anything else."""
    if not (isinstance(x, np.ma.MaskedArray) and np.ma.is_masked(x)):
        return np.asarray(x)
    if x.dtype.kind in "fiub":
        return np.where(np.ma.getmaskarray(x), np.nan, x.data)
    plain = np.array(x.data, dtype=object)
    plain[np.ma.getmaskarray(x)] = None
    return plain


def copied(array: np.ndarray) -> Tensor:
    """Return a copy of an array as a tensor; torch itself reads neither bytes in another order nor arrays that run backwards."""
    return torch.from_numpy(np.array(array, array.dtype.newbyteorder("="), order="C"))


def _as_number(value: object) -> float:
    """Return a number as a float, NaN for what marks a missing one (``None``, ``pandas.NA``)."""
    missing = value is None or type(value).__name__ == "NAType"
    return math.nan if missing else float(cast(float, value))


def _from_array(x: object, name: str, dtype: torch.dtype | None = None) -> Tensor:
    """Turn data that aren't a tensor into one; numbers without a floating precision of their own take ``dtype``."""
    if x is None or isinstance(x, str | bytes | dict | set):
        raise InvalidInputError(
            f"{name} must be numbers", got=repr(x)[:60], expected="a tensor, an array or a list"
        )
    if isinstance(x, Sequence) and any(isinstance(v, Tensor) for v in x):
        parts = [v if isinstance(v, Tensor) else _from_array(v, name, dtype) for v in x]
        try:
            return torch.stack(parts)
        except (RuntimeError, TypeError) as error:
            raise ShapeError(
                f"the rows of {name} differ", got=f"shapes {[tuple(p.shape) for p in parts][:4]}"
            ) from error
    try:
        array = without_mask(x)
    except (ValueError, TypeError) as error:
        raise ShapeError(
            f"{name} must be a regular array of numbers",
            got=type(x).__name__,
            hint="rows of unequal lengths can't be stacked",
        ) from error
    if array.dtype == object:
        try:
            array = np.vectorize(_as_number, otypes=[float])(array) if array.size else array.astype(float)
        except (TypeError, ValueError) as error:
            raise InvalidInputError(
                f"{name} must be numbers", got=f"{type(x).__name__} of objects"
            ) from error
    if array.dtype.kind not in "fiub":
        raise InvalidInputError(
            f"{name} must be real numbers", got=f"{type(x).__name__} of dtype {array.dtype}"
        )
    own = _has_precision(x)
    value = copied(array)
    return value if own or not value.is_floating_point() else value.to(dtype or torch.get_default_dtype())


def as_time_grid(
    ts: object, name: str = "ts", min_points: int = 2, like: Tensor | None = None, *, batch: bool = False
) -> Tensor:
    """Turn times of any kind into a tensor ``(T,)`` that is finite and increases strictly.

    With ``batch`` it may also be ``(*batch, T)``, a grid for every series.

    Raises:
        TimeGridError: If they aren't times, or don't increase.
        NonFiniteError: If they hold NaN or infinity.
    """
    if not isinstance(ts, Tensor):
        try:
            ts = as_tensor(ts, name, like=like, finite=False)
        except InvalidInputError as error:
            raise TimeGridError(f"{name} must be times", got=repr(ts)[:60]) from error
    elif not ts.is_floating_point() and not ts.is_complex():
        ts = ts.to(torch.get_default_dtype() if like is None else like.dtype)
    check_time_grid(ts, name, min_points, batch=batch)
    return ts


def as_sample_shape(sample_shape: object, name: str = "sample_shape") -> tuple[int, ...]:
    """Turn an integer or a sequence of integers into the shape of independent draws.

    Raises:
        InvalidInputError: If a size isn't an integer of at least one.
    """
    sizes = (sample_shape,) if _is_integer(sample_shape) else sample_shape
    if not isinstance(sizes, Sequence) or isinstance(sizes, str) or not all(map(_is_integer, sizes)):
        raise InvalidInputError(
            f"{name} must be an integer or a tuple of integers", got=repr(sample_shape)[:60]
        )
    shape = tuple(int(n) for n in sizes)
    if any(n < 1 for n in shape):
        raise InvalidInputError(f"{name} must be at least 1 along every axis", got=repr(sample_shape))
    return shape


def as_generator(
    generator: object, device: torch.device | str | None = None, name: str = "generator"
) -> torch.Generator | None:
    """Turn a generator, a seed or None into a generator, or None for torch's global one.

    Raises:
        InvalidInputError: For anything else.
        DeviceMismatchError: If the generator lives on another kind of device.
    """
    if generator is None:
        return None
    where = torch.device("cpu" if device is None else device)
    if isinstance(generator, torch.Generator):
        if device is not None and generator.device.type != where.type:
            raise DeviceMismatchError(
                f"{name} lives on another device", got=str(generator.device), expected=str(where)
            )
        return generator
    if not _is_integer(generator):
        raise InvalidInputError(f"{name} must be a torch.Generator, a seed or None", got=repr(generator)[:60])
    return torch.Generator(where).manual_seed(as_seed(generator, name))


def as_seed(seed: object, name: str = "seed") -> int:
    """Turn a whole number of any kind into a seed.

    Raises:
        InvalidInputError: If it isn't a whole number between 0 and 2^63 - 1.
    """
    if not _is_integer(seed) or not 0 <= int(seed) < 2**63:  # type: ignore[call-overload]
        raise InvalidInputError(f"{name} must be a whole number from 0 to 2^63 - 1", got=repr(seed)[:60])
    return int(seed)  # type: ignore[call-overload]


def _is_integer(x: object) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool | np.bool_)


def is_real(x: object) -> bool:
    """Return whether ``x`` is one real number of Python's or NumPy's, and not a truth value."""
    return isinstance(x, numbers.Real) and not isinstance(x, bool)


def check_bool(x: object, name: str) -> None:
    """Raise unless ``x`` is True or False."""
    if not isinstance(x, bool | np.bool_):
        raise InvalidInputError(f"{name} must be True or False", got=repr(x)[:60])


def as_mask(x: object, name: str = "mask") -> Tensor:
    """Turn True and False, or the whole numbers one and zero, of any kind of data into a boolean tensor.

    Raises:
        ShapeError: If it holds anything else.
    """
    value = x if isinstance(x, Tensor) else None
    if value is None:
        array = np.asarray(x)
        value = copied(array) if array.dtype.kind in "biu" else None
    if value is None or value.is_floating_point() or value.is_complex():
        got = value.dtype if value is not None else f"{type(x).__name__} {repr(x)[:40]}"
        raise ShapeError(f"{name} must be a boolean array", got=got, hint=f"use {name} > 0")
    if value.dtype == torch.bool:
        return value
    if values_are_checked() and not bool(((value == 0) | (value == 1)).all()):
        raise ShapeError(f"{name} must be a boolean array", got="whole numbers other than 0 and 1")
    return value.bool()


def check_callable(x: object, name: str, meaning: str = "a function") -> None:
    """Raise unless ``x`` can be called; ``meaning`` says what it should be."""
    if not callable(x):
        raise InvalidInputError(f"{name} must be {meaning}", got=type(x).__name__)


def as_sequence(x: object, name: str, meaning: str) -> list[Any]:
    """Return the elements of a list, a tuple, an array or another iterable; a word isn't a sequence of its letters.

    Raises:
        InvalidInputError: If there are no elements to run through.
    """
    if isinstance(x, str | bytes) or not isinstance(x, Iterable) or (isinstance(x, Tensor) and x.ndim == 0):
        raise InvalidInputError(f"{name} must be {meaning}", got=repr(x)[:60])
    return list(x)


def check_mapping(x: object, name: str, meaning: str) -> None:
    """Raise unless ``x`` is a mapping; ``meaning`` says of what."""
    if not isinstance(x, Mapping):
        raise InvalidInputError(f"{name} must be {meaning}", got=type(x).__name__)


def check_not_frozen(parameters: Iterable[Tensor]) -> None:
    """Raise if parameters were made in inference mode: they can't be differentiated, or changed outside of it."""
    if any(p.is_inference() for p in parameters if not isinstance(p, UninitializedParameter)):
        raise InvalidInputError(
            "parameters that were made in inference mode can't be trained",
            got="made within torch.inference_mode()",
            hint="make, copy or load what is trained outside of it",
        )


def check_type(x: object, kind: type | tuple[type, ...], name: str, hint: str | None = None) -> None:
    """Raise unless ``x`` is an instance of ``kind``."""
    if not isinstance(x, kind):
        kinds = kind if isinstance(kind, tuple) else (kind,)
        raise InvalidInputError(
            f"{name} has the wrong type",
            got=type(x).__name__,
            expected=" | ".join(k.__name__ for k in kinds),
            hint=hint,
        )


def check_real(
    x: object,
    name: str,
    *,
    minimum: float = -math.inf,
    maximum: float = math.inf,
    above: float = -math.inf,
    below: float = math.inf,
    fixed: bool = False,
) -> None:
    """Raise unless ``x`` is one finite real number: ``minimum`` and ``maximum`` are allowed, ``above`` and ``below`` aren't.

    A ``fixed`` number becomes a plain one, so a wanted gradient with respect to it is refused rather than lost.
    """
    if fixed and isinstance(x, Tensor) and x.requires_grad and torch.is_grad_enabled():
        raise InvalidInputError(
            f"nothing is differentiated in {name}",
            got="a tensor that requires a gradient",
            hint=f"give {name}.detach()",
        )
    single = isinstance(x, Tensor | np.ndarray) and getattr(x, "ndim", 1) == 0
    if isinstance(x, bool | np.bool_) or not (isinstance(x, numbers.Real) or single):
        raise InvalidInputError(f"{name} must be a real number", got=repr(x)[:60])
    try:
        value = float(x.detach() if isinstance(x, Tensor) else x)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInputError(f"{name} must be a real number", got=repr(x)[:60]) from error
    if not math.isfinite(value):
        raise NonFiniteError(f"{name} must be finite", got=f"{name}={value}")
    bounds = [
        (value < minimum, f"at least {minimum:g}"),
        (value > maximum, f"at most {maximum:g}"),
        (value <= above, f"greater than {above:g}"),
        (value >= below, f"less than {below:g}"),
    ]
    for broken, wanted in bounds:
        if broken:
            raise InvalidInputError(f"{name} must be {wanted}", got=f"{value:g}")


def check_time_grid(ts: object, name: str = "ts", min_points: int = 2, *, batch: bool = False) -> None:
    """Raise unless ``ts`` is a finite, one-dimensional, strictly increasing floating tensor, or a batch of such."""
    if not isinstance(ts, Tensor):
        raise TimeGridError(f"{name} must be a tensor", got=type(ts).__name__, hint="use torch.as_tensor")
    if ts.ndim == 0 or (ts.ndim > 1 and not batch):
        raise TimeGridError(f"{name} must have one axis", got=f"shape {tuple(ts.shape)}")
    if ts.shape[-1] < min_points:
        raise TimeGridError(f"{name} needs at least {min_points} times", got=ts.shape[-1])
    if not ts.is_floating_point():
        raise TimeGridError(f"{name} must be floating", got=ts.dtype, hint=f"use {name}.double()")
    if _here.off or maps_are_active():
        return
    check_finite(ts, name)
    bad = (ts[..., 1:] <= ts[..., :-1]).nonzero()
    if bad.numel():
        *series, i = bad[0].tolist()
        row, at = ts[tuple(series)], "".join(f"{k}, " for k in series)
        raise TimeGridError(
            f"{name} must increase strictly",
            got=f"{name}[{at}{i + 1}]={row[i + 1].item():g} after {name}[{at}{i}]={row[i].item():g}",
            hint="sort the times and merge repeated ones",
        )


def check_inside(times: Tensor, ts: Tensor, name: str = "times", grid: str = "ts") -> None:
    """Raise unless every one of ``times`` lies within the span of the grid ``ts``."""
    low, high = ts[0].item(), ts[-1].item()
    slack = 1e-6 * max(high - low, 1e-30)
    outside = (times < low - slack) | (times > high + slack)
    if bool(outside.any()):
        i = tuple(outside.nonzero()[0].tolist())
        raise TimeGridError(
            f"{name} must lie inside the span of {grid}",
            got=f"{name}{list(i)}={times[i].item():g}",
            expected=f"[{low:g}, {high:g}]",
        )


def check_finite(x: object, name: str) -> None:
    """Raise if ``x`` holds NaN or infinity, unless values aren't checked."""
    if not values_are_checked():
        return
    x = _numbers(x, name)
    if x.ndim == 0 and x.device.type == "cpu" and not maps_are_active() and math.isfinite(x.item()):
        return  # a tenth of what the general way takes, for the times that loops ask coefficients at
    bad = ~torch.isfinite(x)
    if bool(bad.any()):
        where = tuple(bad.nonzero()[0].tolist())
        raise NonFiniteError(
            f"{name} must be finite",
            got=f"{name}{list(where)}={x[where].item()} ({int(bad.sum())} of {x.numel()} values)",
        )


def check_nonempty(x: object, name: str) -> None:
    """Raise if ``x`` has no elements, or can't have any."""
    if not hasattr(x, "__len__") and not isinstance(x, Tensor):
        raise InvalidInputError(f"{name} must be data or a sequence", got=type(x).__name__)
    size = x.numel() if isinstance(x, Tensor) else len(x)
    if size == 0:
        shape = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else "length 0"
        raise EmptyDataError(f"{name} is empty", got=shape)


def check_points(x: object, name: str = "x", meaning: str = "(..., d)") -> None:
    """Raise unless ``x`` is a real tensor, integer or in single or double precision, with values that are numbers.

    This is the check at the entrance of functions that are evaluated at many points, often inside other computations: values
    are looked at on the CPU only, where that costs no synchronisation, and not under the transforms of ``torch.func``.
    """
    value = _require_tensor(x, name, meaning)
    if value.is_complex() or value.dtype in (torch.float16, torch.bfloat16, torch.bool):
        raise InvalidInputError(
            f"{name} must be real numbers in single or double precision",
            got=value.dtype,
            hint=f"use {name}.float()",
        )
    if value.is_floating_point() and value.device.type == "cpu" and not maps_are_active():
        check_finite(value.detach(), name)


def check_floating(x: object, name: str = "x", meaning: str = "(..., d)") -> None:
    """Raise unless ``x`` is a floating tensor in single or double precision, with values that are numbers."""
    check_points(x, name, meaning)
    if isinstance(x, Tensor) and not x.is_floating_point():
        raise InvalidInputError(f"{name} must be a floating tensor", got=x.dtype, hint=f"use {name}.float()")


def of_times(
    method: Callable[Concatenate[_Owner, Tensor, _Rest], Tensor],
) -> Callable[Concatenate[_Owner, Tensor, _Rest], Tensor]:
    """Check the times of a method ``coefficient(self, t, ...)`` at its entrance, as :func:`check_points` does."""

    @functools.wraps(method)
    def checked(self: _Owner, t: Tensor, *args: _Rest.args, **kwargs: _Rest.kwargs) -> Tensor:
        check_points(t, "t", "times of any shape")
        return method(self, t, *args, **kwargs)

    return checked


def check_not_before(t: Tensor, first: float, name: str = "t") -> None:
    """Raise if a time on the CPU lies before ``first``, but for rounding."""
    if t.device.type != "cpu" or not values_are_checked() or maps_are_active():
        return
    least = float(t.detach().min()) if t.numel() else first
    if least < first - 1e-6 * max(abs(first), abs(least)):
        raise TimeGridError(f"{name} must not lie before {first:g}", got=f"{least:g}")


def check_ndim(x: object, ndim: int | tuple[int, ...], name: str, meaning: str) -> None:
    """Raise unless ``x`` has ``ndim`` axes; ``meaning`` names them, such as ``"(time, dim)"``."""
    x = _require_tensor(x, name, meaning)
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if x.ndim not in allowed:
        raise ShapeError(
            f"{name} has the wrong number of axes", got=f"shape {tuple(x.shape)}", expected=meaning
        )


def check_event_size(x: object, size: int, name: str, axis: int = -1) -> None:
    """Raise unless axis ``axis`` of ``x`` has ``size`` elements."""
    x = _require_tensor(x, name, f"size {size} along axis {axis}")
    if x.ndim <= (axis if axis >= 0 else -axis - 1) or x.shape[axis] != size:
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


def check_positive(x: object, name: str, error: type[InvalidInputError] = InvalidInputError) -> None:
    """Raise unless every value is finite and greater than zero, or values aren't checked."""
    value = _numbers(x, name)
    if not values_are_checked():
        return
    check_finite(value.detach(), name)
    if bool((value <= 0).any()):
        hint = (
            "noise on only some components is a (d, m) matrix with m < d" if error is DiffusionError else None
        )
        raise error(f"{name} must be positive", got=f"minimum {value.min().item():g}", hint=hint)


def check_positive_definite(cov: Tensor, name: str) -> None:
    """Raise unless a matrix ``(d, d)`` is a finite covariance with a density: symmetric and positive definite."""
    if cov.ndim != 2 or cov.shape[0] != cov.shape[1]:
        raise ShapeError(f"{name} must be a square matrix", got=f"shape {tuple(cov.shape)}")
    check_finite(cov.detach(), name)
    own = cov.detach().double()
    unit = own.diagonal().clamp(min=torch.finfo(own.dtype).tiny).rsqrt()
    # in units of each component, so that what is symmetric or definite doesn't depend on them
    scaled = unit[:, None] * own * unit
    symmetric = bool(((scaled - scaled.mT).abs() <= 1e3 * torch.finfo(cov.dtype).eps).all())
    if not symmetric or bool(torch.linalg.cholesky_ex(scaled).info):
        raise InvalidInputError(f"{name} must be symmetric and positive definite", got=cov.tolist())


def check_positive_int(x: object, name: str, minimum: int = 1) -> None:
    """Raise unless ``x`` is an integer of at least ``minimum``."""
    if not _is_integer(x) or x < minimum:  # type: ignore[operator]
        raise InvalidInputError(f"{name} must be an integer of at least {minimum}", got=repr(x)[:60])


def as_integers(value: object, name: str) -> Tensor:
    """Return whole numbers of any form as a tensor of integers, or raise."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.array(value))
    except (TypeError, ValueError) as error:
        raise InvalidInputError(f"{name} must be integers", got=type(value).__name__) from error
    if (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool) and tensor.numel():
        raise InvalidInputError(f"{name} must be integers", got=tensor.dtype)
    return tensor.long()


def check_no_gradient(value: object, name: str, what: str, hint: str) -> None:
    """Raise InvalidInputError if a gradient is wanted with respect to a value through something that has none."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise InvalidInputError(
            f"{what} isn't differentiable in {name}",
            got="a tensor that requires a gradient",
            hint=f"{hint}; or give {name}.detach()",
        )


def check_hurst(hurst: object, name: str = "hurst") -> None:
    """Raise unless every value lies strictly between 0 and 1, or values aren't checked."""
    value = _numbers(hurst, name).detach()
    if not values_are_checked():
        return
    if not bool(((value > 0) & (value < 1)).all()):
        raise HurstRangeError(f"{name} must lie strictly between 0 and 1", got=value.tolist())


def check_choice(value: object, choices: Sequence[str], name: str) -> None:
    """Raise unless ``value`` is one of ``choices``."""
    if not isinstance(value, str | int | None) or value not in choices:
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
            hint=f"one time per point is {name}[:, None]; times that lead are {name}[:, None, None]",
        )


def _require_tensor(x: object, name: str, meaning: str) -> Tensor:
    if not isinstance(x, Tensor):
        raise ShapeError(f"{name} must be a tensor", got=type(x).__name__, expected=meaning)
    return x


def _numbers(x: object, name: str) -> Tensor:
    """Return a number or a tensor as a tensor; anything else is refused by name."""
    if isinstance(x, Tensor):
        if x.is_complex():
            raise InvalidInputError(f"{name} must be real", got=x.dtype)
        return x
    if isinstance(x, bool | np.bool_) or not isinstance(x, numbers.Real | np.ndarray | list | tuple):
        raise InvalidInputError(f"{name} must be a number or a tensor", got=repr(x)[:60])
    return _from_array(x, name)
