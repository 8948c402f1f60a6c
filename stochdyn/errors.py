"""The exception tree: every error says what was wrong, what was given, what was expected and what to try."""

from __future__ import annotations

__all__ = [
    "ApproximationWarning",
    "CheckpointError",
    "CheckpointInUseError",
    "CheckpointWriteError",
    "ConvergenceWarning",
    "DamagedCheckpointError",
    "DeviceMismatchError",
    "DiffusionError",
    "DiffusionMismatchError",
    "DisconnectedGraphError",
    "DtypeMismatchError",
    "EmptyDataError",
    "ExplosionError",
    "ForeignCheckpointError",
    "FrameError",
    "HurstRangeError",
    "InvalidInputError",
    "LindbladianError",
    "LostProcessError",
    "MissingDependencyError",
    "NonFiniteError",
    "NonFiniteLossError",
    "ShapeError",
    "SingularDiffusionError",
    "StochdynError",
    "StochdynWarning",
    "SystemSizeError",
    "TimeGridError",
    "TooFewDrawsError",
    "UnavailableError",
    "UnknownSiteError",
    "ZeroProbabilityError",
]


class StochdynError(Exception):
    """Root of all errors raised on purpose by stochdyn.

    Args:
        what: What is wrong, as one sentence naming the argument.
        got: The offending value or its description.
        expected: What would have been accepted.
        hint: What to try instead.

    Example:
        >>> str(StochdynError("ts must increase strictly", got="ts[3]=0.5 after ts[2]=0.5"))
        'ts must increase strictly; got ts[3]=0.5 after ts[2]=0.5'
    """

    def __init__(
        self,
        what: str,
        *,
        got: object | None = None,
        expected: object | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.got = got
        self.expected = expected
        self.hint = hint
        message = what
        if got is not None:
            message += f"; got {got}"
        if expected is not None:
            message += f"; expected {expected}"
        if hint is not None:
            message += f". {hint[0].upper()}{hint[1:]}"
        super().__init__(message)


class InvalidInputError(StochdynError, ValueError):
    """An argument has a value that the function can't work with. Root of all input errors."""


class ShapeError(InvalidInputError):
    """A tensor has the wrong number of axes or a wrong size along one of them.

    Shapes read ``(*sample, *batch, time, dim)`` outside, and time leads inside drifts:
    ``drift(t, x)`` sees ``x`` as ``(time, *batch, dim)`` or ``(*batch, dim)``.
    """


class TimeGridError(InvalidInputError):
    """A time grid is not a strictly increasing, finite, one-dimensional tensor, or a time lies outside it."""


class NonFiniteError(InvalidInputError):
    """Data or arguments hold NaN or infinity. The message names the first position."""


class ExplosionError(NonFiniteError):
    """Paths that were drawn leave the range of numbers, mostly because the steps of the equation are too large for them."""


class DeviceMismatchError(InvalidInputError):
    """Tensors live on different devices. Nothing is moved silently; call ``.to(device)`` yourself."""


class DtypeMismatchError(InvalidInputError):
    """Floating tensors have different precisions. Only the time grid may be more precise than the state."""


class EmptyDataError(InvalidInputError):
    """A series, snapshot or batch has no elements."""


class HurstRangeError(InvalidInputError):
    """The Hurst index is not inside the open interval (0, 1)."""


class DiffusionError(InvalidInputError):
    """A diffusion coefficient is negative or zero where it must be positive.

    For noise that reaches only some components of the state give a ``(d, m)`` matrix with ``m < d``.
    """


class DisconnectedGraphError(InvalidInputError):
    """The neighbourhood graph of a point cloud has several components; the message names them."""


class SingularDiffusionError(StochdynError, ValueError):
    """A density in state space was asked for, and the diffusion is singular, so there is none.

    Weights and divergences between such laws exist in noise space: use ``log_rn`` and ``kl``, or
    sample the driving increments (``stochdyn.infer.sample_path``) in a Pyro model.
    """


class DiffusionMismatchError(StochdynError, ValueError):
    """Two laws with different diffusions (or drifts that differ where no noise acts) are mutually singular."""


class FrameError(InvalidInputError):
    """Effects don't form an informationally complete measurement: positive, summing to one, spanning all operators."""


class LindbladianError(InvalidInputError):
    """A term of a master equation is unphysical: not Hermitian, of negative rate, or on sites that don't exist."""


class SystemSizeError(InvalidInputError):
    """A system is too large for a method that lists all outcomes or keeps a whole density matrix."""


class ZeroProbabilityError(InvalidInputError):
    """An initial state never gives some outcome of the measurement, so its log probability is infinite."""


class UnavailableError(StochdynError, NotImplementedError):
    """A quantity was asked of an object that can't give it: the density of a score network, say."""


class UnknownSiteError(StochdynError, KeyError):
    """A model or guide has no site of the given name, or lacks one that the other has."""

    def __str__(self) -> str:
        return str(self.args[0])


class TooFewDrawsError(InvalidInputError):
    """A diagnostic was asked of fewer draws than it needs to mean anything."""


class MissingDependencyError(StochdynError, ImportError):
    """An optional package is needed for this feature and isn't installed."""


class NonFiniteLossError(StochdynError, FloatingPointError):
    """Training met a NaN or infinite loss or gradient; the message names the step and the term.

    Attributes:
        step: The number of the bad step, from 1; the parameters are those after the step before it.
        result: The :class:`~stochdyn.run.FitResult` of the steps before it.
    """

    step: int | None = None
    result: object | None = None


class LostProcessError(StochdynError, ConnectionError):
    """Another process that computes for this run has died: a rank of data-parallel training, or one of an executor."""


class CheckpointError(StochdynError):
    """Root of the errors about files on disk."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint can't be read: cut short, altered, or not a checkpoint at all."""


class ForeignCheckpointError(CheckpointError):
    """A checkpoint is sound but belongs to another run: its model, data or options aren't these."""


class CheckpointInUseError(CheckpointError):
    """Another run, in this process or another one, writes its checkpoints to the same directory."""


class CheckpointWriteError(CheckpointError, OSError):
    """A checkpoint couldn't be written (a full disk, say); the previous one is untouched."""


class StochdynWarning(UserWarning):
    """Root of all warnings."""


class ApproximationWarning(StochdynWarning):
    """An approximation error is large; the message gives its size and what reduces it."""


class ConvergenceWarning(StochdynWarning):
    """An iterative method stopped before it converged."""
