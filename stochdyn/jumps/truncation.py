"""Reaction networks on finitely many counts: finite state projection, with a certificate of what is lost."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from functools import cached_property

import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.csgraph import breadth_first_order
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    as_time_grid,
    check_no_gradient,
    check_positive_int,
    check_real,
)
from stochdyn.core.law.marginals import Generator, Marginal, SampleShape
from stochdyn.errors import ApproximationWarning, InvalidInputError, ShapeError, SystemSizeError
from stochdyn.jumps.reactions import ReactionNetwork
from stochdyn.jumps.uniformisation import poisson_terms

__all__ = ["CountMarginal", "TruncatedNetwork", "warn_leak"]


class CountMarginal(Marginal):
    """The law of the counts at one time on a truncated space.

    Attributes:
        probs: The probabilities of the counts, one axis per species.
        lost_mass: The probability that has left the truncated space: no probability is wrong by more, in total.
    """

    def __init__(self, probs: Tensor, lost_mass: float, grid: Tensor) -> None:
        self.probs, self.lost_mass, self._grid = probs, lost_mass, grid

    def sample(self, sample_shape: SampleShape = (), generator: Generator = None) -> Tensor:
        """Draw counts ``(*sample, M)``."""
        shape = as_sample_shape(sample_shape)
        flat = torch.multinomial(
            self.probs.reshape(-1), math.prod(shape), replacement=True, generator=as_generator(generator)
        )
        return self._grid[flat].reshape(*shape, -1)

    @property
    def mean(self) -> Tensor:
        """The mean counts ``(M,)``, of the mass that is left."""
        p = self.probs.reshape(-1)
        return (p[:, None] * self._grid).sum(0) / p.sum()

    @property
    def covariance(self) -> Tensor:
        """The covariance of the counts ``(M, M)``, of the mass that is left."""
        p = self.probs.reshape(-1) / self.probs.sum()
        gap = self._grid - self.mean
        return (p[:, None] * gap).mT @ gap

    def log_prob(self, x: Tensor) -> Tensor:
        """Return the log probability of counts ``(..., M)``; minus infinity off the truncated space."""
        shape = torch.tensor(self.probs.shape)
        inside = ((x >= 0) & (x < shape) & (x == x.round())).all(-1)
        index = tuple(torch.where(inside[..., None], x, torch.zeros_like(x)).long().unbind(-1))
        return torch.where(inside, self.probs[index].log(), torch.full_like(self.probs[index], -math.inf))


def warn_leak(lost: float, when: str) -> None:
    """Warn where more than a hundredth of the probability has left the bounds.

    Args:
        lost: The lost probability.
        when: When it was lost, in words.
    """
    if lost > 0.01:
        warnings.warn(
            f"The truncation leaks: {lost:.2g} of the probability leaves the bounds {when}. Enlarge the bounds.",
            ApproximationWarning,
            stacklevel=3,
        )


class TruncatedNetwork:
    """A reaction network on counts up to given bounds, whose outflow is collected: finite state projection.

    Args:
        network: The network.
        bounds: The largest count of each species.

    Attributes:
        generator: The sparse rates ``(S, S)`` between counts, rows summing to minus the outflow.

    Raises:
        SystemSizeError: If there are more than two million counts.

    Reference:
        Munsky and Khammash, "The finite state projection algorithm for the solution of the chemical master equation", 2006.
    """

    def __init__(self, network: ReactionNetwork, bounds: Mapping[str, int]) -> None:
        self.network = network
        check_no_gradient(network.constants, "rates", "finite state projection", "take linear_noise()")
        if not isinstance(bounds, Mapping) or set(bounds) != set(network.species):
            raise InvalidInputError(
                "bounds must name every species", got=repr(bounds)[:60], expected=network.species
            )
        for name, bound in bounds.items():
            check_positive_int(bound, f"bounds[{name!r}]", 1)
        self.shape = tuple(int(bounds[name]) + 1 for name in network.species)
        if math.prod(self.shape) > 2_000_000:
            raise SystemSizeError(
                "there are too many counts", got=math.prod(self.shape), expected="at most 2 000 000"
            )
        if any(float(c) >= s for c, s in zip(network.start, self.shape, strict=True)):
            raise InvalidInputError(
                "the start lies outside the bounds", got=network.start.tolist(), expected=self.shape
            )
        axes = [torch.arange(s, dtype=torch.float64) for s in self.shape]
        self.grid = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, len(self.shape))
        self.parts = self._parts()
        self.generator = self._assemble()

    def _assemble(self) -> sp.csr_matrix:
        """Sum the reactions, each a sparse matrix at its rate constant."""
        constants = self.network.constants.detach().numpy()
        return sum(c * part for c, part in zip(constants, self.parts, strict=True)).tocsr()

    def _parts(self) -> list[sp.csr_matrix]:
        """Return the generator of every reaction at a rate constant of one; outflow over a bound is lost from the diagonal."""
        with torch.no_grad():
            rates = self.network.unit_propensities(self.grid).numpy()
        if (rates < 0).any():
            raise InvalidInputError("a propensity is negative", got=float(rates.min()))
        x, size = self.grid.numpy(), len(self.grid)
        stride = np.array([math.prod(self.shape[m + 1 :]) for m in range(len(self.shape))])
        parts = []
        for r, change in enumerate(self.network.change.numpy()):
            there = x + change
            if bool(((there < 0).any(1) & (rates[:, r] > 0)).any()):
                raise InvalidInputError(
                    "a reaction would make a count negative: its propensity must vanish where molecules are lacking",
                    got=self.network.reactions[r],
                )
            inside = (there < np.array(self.shape)).all(1) & (rates[:, r] > 0)
            here = np.flatnonzero(inside)
            rows = np.concatenate([np.arange(size), here])
            columns = np.concatenate([np.arange(size), here + int(change @ stride)])
            values = np.concatenate([-rates[:, r], rates[here, r]])
            parts.append(sp.coo_matrix((values, (rows, columns)), shape=(size, size)).tocsr())
        return parts

    def marginal(self, t: float) -> CountMarginal:
        """Return the law at a time, by uniformisation with sparse products.

        Warns:
            ApproximationWarning: If more than a hundredth of the probability has left the bounds.
        """
        check_real(t, "t", minimum=self.network.start_time, fixed=True)
        stride = [math.prod(self.shape[m + 1 :]) for m in range(len(self.shape))]
        p = np.zeros(len(self.grid))
        p[int(sum(int(c) * s for c, s in zip(self.network.start.tolist(), stride, strict=True)))] = 1.0
        p = self.propagate(p, float(t) - self.network.start_time)
        lost = max(0.0, 1.0 - float(p.sum()))
        warn_leak(lost, "by this time")
        return CountMarginal(torch.as_tensor(p).reshape(self.shape), lost, self.grid)

    def propagate(self, p: np.ndarray, dt: float, constants: np.ndarray | None = None) -> np.ndarray:
        """Return the law after a time, by uniformisation with sparse products.

        Args:
            p: The law before, ``(S,)``, or one column per vector of rate constants, ``(S, n)``.
            dt: The time.
            constants: The rate constants ``(n, R)``; the network's own if None.
        """
        # counts that can't be reached from the law cost time, and their fast exits more steps
        inside = self._reached(p)
        if not len(inside):
            return p
        if len(inside) < len(p):
            out = np.zeros_like(p)
            out[inside] = self._propagate(p[inside], dt, constants, inside)
            return out
        return self._propagate(p, dt, constants, None)

    def _reached(self, p: np.ndarray) -> np.ndarray:
        """Return the numbers of the counts that can be reached from where the law ``(S,)`` or ``(S, n)`` has mass, sorted."""
        begin = np.flatnonzero(p.reshape(len(p), -1).any(1))
        links = self._links
        # a source that leads to all of them is one row more
        graph = sp.csr_matrix(
            (
                np.ones(links.nnz + len(begin)),
                np.concatenate([links.indices, begin]),
                np.append(links.indptr, links.nnz + len(begin)),
            ),
            shape=(len(p) + 1, len(p) + 1),
        )
        return np.sort(breadth_first_order(graph, len(p), return_predecessors=False)[1:])

    @cached_property
    def _links(self) -> sp.csr_matrix:
        """Which counts lead to which by any reaction, whatever its rate constant."""
        return sp.csr_matrix(sum(abs(part) for part in self.parts))

    def _propagate(
        self, p: np.ndarray, dt: float, constants: np.ndarray | None, inside: np.ndarray | None
    ) -> np.ndarray:
        """Return the law ``(S,)`` or ``(S, n)`` after a time on some of the counts, all of them if None."""

        def within(matrix: sp.csr_matrix) -> sp.csr_matrix:
            return matrix if inside is None else matrix[inside][:, inside]

        if constants is None:
            generator = within(self.generator)
            exits = -generator.diagonal()
            matrix = generator.T.tocsr()

            def flow(now: np.ndarray) -> np.ndarray:
                return matrix @ now

        else:
            parts = [within(part) for part in self.parts]
            exits = np.stack([-part.diagonal() for part in parts], -1) @ constants.max(0)
            turned = [part.T.tocsr() for part in parts]

            def flow(now: np.ndarray) -> np.ndarray:
                return sum((part @ now) * c for part, c in zip(turned, constants.T, strict=True))

        rate = float(exits.max())
        if rate == 0 or dt == 0:
            return p
        pieces = max(1, math.ceil(rate * dt / 500.0))
        mean = rate * dt / pieces
        # P = sum over k of the Poisson probability of k candidates times (I + Q / rate)^k
        weights = np.exp(np.cumsum([-mean, *(math.log(mean / k) for k in range(1, poisson_terms(mean) + 1))]))
        for _ in range(pieces):
            total, now = weights[0] * p, p
            for weight in weights[1:]:
                now = now + flow(now) / rate
                total = total + weight * now
            p = total
        return p

    def log_likelihood(self, times: object, counts: Mapping[str, object]) -> Tensor:
        """Return the exact log-likelihood of counts of some species, seen without error at times.

        Args:
            times: The increasing times ``(T,)``, none before the start.
            counts: The counts ``(T,)`` of each observed species; NaN where missing.

        Raises:
            InvalidInputError: If a count isn't a whole number between zero and its bound.

        Warns:
            ApproximationWarning: If more than a hundredth of the probability leaves the bounds between two observations.
        """
        at, seen = checked_counts(self.network, times, counts)
        self.check_counts(seen)
        value, lost = self.evidence(at, seen, None)
        warn_leak(lost, "between two observations")
        return torch.tensor(value[0], dtype=torch.float64)

    def check_counts(self, counts: Mapping[str, Tensor]) -> None:
        """Refuse counts seen without error that no state has.

        Args:
            counts: The counts ``(T,)`` by species, NaN where missing.
        """
        for name, value in counts.items():
            known = value[~value.isnan()]
            bound = self.shape[self.network.species.index(name)] - 1
            wrong = known[(known != known.round()) | (known < 0) | (known > bound)]
            if len(wrong):
                raise InvalidInputError(
                    f"counts[{name!r}] must be whole numbers within the bounds",
                    got=float(wrong[0]),
                    expected=f"0 to {bound}",
                )

    def evidence(
        self,
        times: Tensor,
        counts: Mapping[str, Tensor],
        constants: np.ndarray | None,
        obs_scale: float | None = None,
    ) -> tuple[np.ndarray, float]:
        """Return log-likelihoods ``(n,)`` of rate constants ``(n, R)``, and the largest mass that was lost over a bound in between.

        Args:
            times: The times ``(T,)``.
            counts: The counts ``(T,)`` by species, NaN where missing.
            constants: The rate constants ``(n, R)``; the network's own if None.
            obs_scale: The standard deviation of Gaussian noise on the counts; none if None.
        """
        stride = [math.prod(self.shape[m + 1 :]) for m in range(len(self.shape))]
        start = int(sum(int(c) * s for c, s in zip(self.network.start.tolist(), stride, strict=True)))
        p = np.zeros((len(self.grid), 1 if constants is None else len(constants)))
        p[start] = 1.0
        before, total, lost, x = self.network.start_time, np.zeros(p.shape[1]), 0.0, self.grid.numpy()
        for k, t in enumerate(times.tolist()):
            p = (
                self.propagate(p[:, 0], t - before)[:, None]
                if constants is None
                else self.propagate(p, t - before, constants)
            )
            lost = max(lost, float(1 - p.sum(0).min()))
            for name, value in counts.items():
                y, column = float(value[k]), x[:, self.network.species.index(name)]
                if math.isnan(y):
                    continue
                if obs_scale is None:
                    p = p * (column == y)[:, None]
                else:
                    log_b = -0.5 * ((y - column) / obs_scale) ** 2
                    top = log_b[p.any(1)].max(
                        initial=-math.inf
                    )  # likelihoods far from all counts don't underflow
                    if math.isfinite(top):
                        p = p * np.exp(log_b - top)[:, None]
                        total = total + top - math.log(obs_scale * math.sqrt(2 * math.pi))
            mass = p.sum(0)
            with np.errstate(divide="ignore"):
                total = total + np.log(mass)
            p, before = p / np.where(mass > 0, mass, 1.0), t
        return total, lost


def checked_counts(
    network: ReactionNetwork, times: object, counts: Mapping[str, object]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return times and counts by species, checked."""
    at = as_time_grid(times, "times", 1, like=network.start).double()
    if float(at[0]) < network.start_time:
        raise InvalidInputError(
            "times start before the network", got=float(at[0]), expected=f">= {network.start_time:g}"
        )
    if not isinstance(counts, Mapping) or not counts:
        raise InvalidInputError("counts must map species to their counts", got=repr(counts)[:60])
    seen = {
        name: as_tensor(value, f"counts[{name!r}]", 1, "(T,)", missing=True, like=network.start)
        for name, value in counts.items()
    }
    for name, value in seen.items():
        if name not in network.species:
            raise InvalidInputError("counts name an unknown species", got=name, expected=network.species)
        if len(value) != len(at):
            raise ShapeError(
                f"counts[{name!r}] must have one value per time", got=len(value), expected=len(at)
            )
    return at, seen
