"""Snapshots: unpaired, weighted clouds of particles seen at a few times."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_sequence,
    as_tensor,
    as_time_grid,
    check_event_size,
    check_finite,
    check_ndim,
    check_nonempty,
    check_positive_int,
    check_same_device,
    check_same_dtype,
)
from stochdyn.errors import InvalidInputError, ShapeError

__all__ = ["Snapshot", "Snapshots", "redrawn_weights"]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One cloud of particles at one time.

    Attributes:
        time: The time at which it was taken.
        sample: The particles, ``(n, d)``.
        weights: The weights of the particles, ``(n,)``, nonnegative and of sum one.
    """

    time: float
    sample: Tensor
    weights: Tensor

    def __len__(self) -> int:
        return self.sample.shape[0]

    @property
    def mean(self) -> Tensor:
        """``(d,)`` weighted mean."""
        return self.weights @ self.sample

    @property
    def covariance(self) -> Tensor:
        """``(d, d)`` weighted covariance, the maximum-likelihood one."""
        centred = self.sample - self.mean
        return centred.mT @ (self.weights[:, None] * centred)

    def draw(
        self, sample_shape: int | Sequence[int] = (), generator: torch.Generator | int | None = None
    ) -> Tensor:
        """Draw ``(*sample, d)`` particles with replacement."""
        shape, source = as_sample_shape(sample_shape), as_generator(generator, self.sample.device)
        index = torch.multinomial(self.weights, math.prod(shape), replacement=True, generator=source)
        return self.sample[index].reshape(*shape, -1)


class Snapshots:
    r"""Samples of the marginals of one process at several times, without knowledge of who is who.

    .. math:: \pi_i=\sum_a w_{ia}\,\delta_{x_{ia}},\qquad i=1,\dots,I

    Numbers of particles, weights and spacing of times may all differ.

    Args:
        times: The times of the snapshots, ``(I,)``, strictly increasing, at least two; a tensor, or a sequence of numbers.
        samples: The particles: one ``(n_i, d)`` array per time, or a tensor ``(I, n, d)``. NumPy arrays are taken as they are.
        weights: The weights of the particles: one ``(n_i,)`` array per time, nonnegative and not all zero; equal if None. They
            are normalised, and their totals kept as :attr:`masses`.
        names: The names of the particles, one sequence of ``n_i`` per time, such as the barcodes of cells, which stay with
            them; None for none.

    Raises:
        TimeGridError: If the times are fewer than two, repeated or unsorted.
        EmptyDataError: If a snapshot has no particles.
        ShapeError: If the numbers of times, samples and weights differ, or the dimensions of the particles do.
        NonFiniteError: If a particle or weight is NaN or infinite.
        InvalidInputError: If weights are negative or all zero.
        DtypeMismatchError, DeviceMismatchError: If snapshots differ in precision or device.

    Example:
        >>> snaps = Snapshots([0.0, 1.0, 3.0], [torch.zeros(4, 2), torch.ones(5, 2), torch.ones(3, 2)])
        >>> len(snaps), snaps.dim, snaps.sizes
        (3, 2, (4, 5, 3))
        >>> train, held_out = snaps.hold_out(1)
        >>> train.times.tolist(), held_out[0].time
        ([0.0, 3.0], 1.0)
    """

    def __init__(
        self,
        times: Tensor | Sequence[float],
        samples: Tensor | Sequence[Any],
        weights: Sequence[Any] | Tensor | None = None,
        names: Sequence[Any] | None = None,
    ) -> None:
        parts = as_sequence(samples, "samples", "one array of particles per time")
        clouds = tuple(as_tensor(x, f"samples[{i}]", finite=False) for i, x in enumerate(parts))
        check_nonempty(clouds, "samples")
        device = clouds[0].device
        self.times = as_time_grid(
            times, "times", like=torch.empty((), dtype=torch.float64, device=device)
        ).double()
        if len(clouds) != len(self.times):
            raise ShapeError("there must be one sample per time", got=len(clouds), expected=len(self.times))
        for i, cloud in enumerate(clouds):
            check_nonempty(cloud, f"samples[{i}]")
            check_ndim(cloud, 2, f"samples[{i}]", "(n, d)")
            check_event_size(cloud, clouds[0].shape[1], f"samples[{i}]")
            check_finite(cloud, f"samples[{i}]")
        named = {f"samples[{i}]": cloud for i, cloud in enumerate(clouds)}
        check_same_dtype(**named)
        check_same_device(**named)
        self.samples: tuple[Tensor, ...] = clouds
        self.weights, self.masses = _normalised(weights, clouds)
        self.names: tuple[np.ndarray, ...] | None = _as_names(names, clouds)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Snapshot:
        return Snapshot(float(self.times[index]), self.samples[index], self.weights[index])

    def __iter__(self) -> Iterator[Snapshot]:
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        times = ", ".join(f"{t:g}" for t in self.times.tolist())
        return f"Snapshots(times=[{times}], sizes={list(self.sizes)}, dim={self.dim})"

    @property
    def dim(self) -> int:
        """``d``, components of a particle."""
        return self.samples[0].shape[1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of particles."""
        return tuple(x.shape[0] for x in self.samples)

    @property
    def mean_count(self) -> float:
        """The mean number of particles of a snapshot that were seen; those of weight zero weren't."""
        return sum(int((own > 0).sum()) for own in self.weights) / len(self)

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the particles. Times are in double precision always."""
        return self.samples[0].dtype

    @property
    def device(self) -> torch.device:
        """Where the particles live."""
        return self.samples[0].device

    @property
    def durations(self) -> Tensor:
        """``(I-1,)`` lengths of the intervals."""
        return self.times.diff()

    def hold_out(self, *indices: int) -> tuple[Snapshots, list[Snapshot]]:
        """Split off snapshots for scoring; returns the rest and the held-out ones.

        Raises:
            InvalidInputError: If an index doesn't exist, or fewer than two snapshots are left.
        """
        size = len(self)
        if any(not -size <= i < size for i in indices):
            raise InvalidInputError(
                "there is no such snapshot", got=list(indices), expected=f"0 to {size - 1}"
            )
        held = sorted({i % size for i in indices})
        return self.select([i for i in range(size) if i not in held]), [self[i] for i in held]

    def select(self, indices: Sequence[int]) -> Snapshots:
        """Return only the snapshots of these indices, in order of time.

        Raises:
            TimeGridError: If fewer than two are left.
        """
        order = sorted(indices)
        return Snapshots(
            self.times[order],
            [self.samples[i] for i in order],
            [self.weights[i] * self.masses[i] for i in order],
            None if self.names is None else [self.names[i] for i in order],
        )

    def resample(self, generator: torch.Generator | int | None = None) -> Snapshots:
        """Return a bootstrap replicate: the particles of every snapshot redrawn by their multiplicities.

        Multiplicities become weights, and particles that weren't drawn are dropped.
        """
        generator = as_generator(generator, self.device)
        clouds, weights, kept_at = [], [], []
        for cloud, own, mass in zip(self.samples, self.weights, self.masses, strict=True):
            draws = torch.multinomial(own, cloud.shape[0], replacement=True, generator=generator)
            counts = torch.bincount(draws, minlength=cloud.shape[0])
            kept = counts > 0
            clouds.append(cloud[kept])
            weights.append(counts[kept].to(cloud.dtype) * (mass / cloud.shape[0]))
            kept_at.append(kept.nonzero()[:, 0])
        return Snapshots(self.times, clouds, weights, self._named(kept_at))

    def subsample(self, num_samples: int, generator: torch.Generator | int | None = None) -> Snapshots:
        """Return at most ``num_samples`` particles per snapshot, drawn without replacement by weight, equally weighted."""
        check_positive_int(num_samples, "num_samples")
        generator = as_generator(generator, self.device)
        clouds, chosen = [], []
        for cloud, own in zip(self.samples, self.weights, strict=True):
            count = min(num_samples, int((own > 0).sum()))
            chosen.append(torch.multinomial(own, count, replacement=False, generator=generator))
            clouds.append(cloud[chosen[-1]])
        return Snapshots(self.times, clouds, None, self._named(chosen))

    def _named(self, index: Sequence[Tensor]) -> list[np.ndarray] | None:
        """The names of chosen particles."""
        if self.names is None:
            return None
        return [own[i.cpu().numpy()] for own, i in zip(self.names, index, strict=True)]

    def standardised(self) -> tuple[Snapshots, Tensor, Tensor]:
        """Return snapshots with mean zero and variance one over all of them, the mean ``(d,)`` and scale ``(d,)``."""
        weights = torch.cat(list(self.weights)) / len(self)
        everything = torch.cat(self.samples)
        mean = weights @ everything
        scale = (weights @ (everything - mean).square()).sqrt()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return self.map(lambda x: (x - mean) / scale), mean, scale

    def map(self, function: Any) -> Snapshots:
        """Return the snapshots with ``function`` applied to every cloud ``(n, d)``."""
        masses = zip(self.weights, self.masses, strict=True)
        return Snapshots(
            self.times, [function(x) for x in self.samples], [w * m for w, m in masses], self.names
        )

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Snapshots:
        """Return the snapshots in another precision or on another device."""
        there = copy.copy(self)  # the same snapshots: their values aren't looked at again
        there.samples = tuple(x.to(dtype=dtype or x.dtype, device=device or x.device) for x in self.samples)
        there.weights = tuple(w.to(x) for w, x in zip(self.weights, there.samples, strict=True))
        there.masses = self.masses.to(there.samples[0])
        there.times = self.times.to(there.samples[0].device)
        return there


def redrawn_weights(snapshots: Snapshots, num: int, generator: torch.Generator | None = None) -> list[Tensor]:
    """Return multiplicities ``(num, n_i)`` of a bootstrap as normalised weights, one tensor per snapshot."""
    everything = []
    for own in snapshots.weights:
        # as many as were seen: particles of weight zero weren't
        count = int((own > 0).sum())
        index = torch.multinomial(own.expand(num, -1), count, replacement=True, generator=generator)
        hits = torch.zeros(num, len(own), dtype=own.dtype, device=own.device)
        everything.append(hits.scatter_add_(1, index, torch.ones_like(index, dtype=own.dtype)) / count)
    return everything


def _as_names(names: Sequence[Any] | None, clouds: tuple[Tensor, ...]) -> tuple[np.ndarray, ...] | None:
    if names is None:
        return None
    own = tuple(np.asarray(part) for part in names)
    sizes = [len(cloud) for cloud in clouds]
    if [part.shape for part in own] != [(n,) for n in sizes]:
        raise ShapeError(
            "names must have one name per particle", got=[part.shape for part in own], expected=sizes
        )
    return own


def _normalised(
    weights: Sequence[Any] | Tensor | None, clouds: tuple[Tensor, ...]
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Return weights that sum to one, and their totals before that, ``(I,)``."""
    if weights is None:
        equal = tuple(x.new_full((x.shape[0],), 1.0 / x.shape[0]) for x in clouds)
        return equal, clouds[0].new_ones(len(clouds))
    given = [torch.as_tensor(w) for w in weights]
    if len(given) != len(clouds):
        raise ShapeError("there must be one array of weights per time", got=len(given), expected=len(clouds))
    normalised, totals = [], []
    for i, (own, cloud) in enumerate(zip(given, clouds, strict=True)):
        if own.shape != cloud.shape[:1]:
            expected = tuple(cloud.shape[:1])
            raise ShapeError(f"weights[{i}] doesn't fit its sample", got=tuple(own.shape), expected=expected)
        own = own.to(dtype=cloud.dtype, device=cloud.device)
        check_finite(own, f"weights[{i}]")
        total = own.sum()
        if bool((own < 0).any()) or not bool(total > 0):
            raise InvalidInputError(
                f"weights[{i}] must be nonnegative and not all zero",
                got=f"minimum {float(own.min()):g}, total {float(total):g}",
            )
        normalised.append(own / total)
        totals.append(total)
    return tuple(normalised), torch.stack(totals)
