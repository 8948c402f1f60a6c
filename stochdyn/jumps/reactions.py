"""Chemical reaction networks: exact simulation, truncation with a certificate, linear noise and Langevin approximations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
    as_tensor,
    as_time_grid,
    check_nonempty,
    check_positive_int,
    check_real,
)
from stochdyn.core.gaussian.measure import LinearGaussianMeasure
from stochdyn.core.law.marginals import Generator, Marginal, SampledMarginal, SampleShape
from stochdyn.core.law.measure import PathMeasure
from stochdyn.core.law.path import PathSample
from stochdyn.core.sde.coefficients import Matrix
from stochdyn.core.sde.equation import SDE
from stochdyn.errors import InvalidInputError, NonFiniteError, ShapeError, SystemSizeError, TimeGridError
from stochdyn.jumps.uniformisation import poisson_terms

__all__ = ["CountMarginal", "ReactionNetwork", "TruncatedNetwork"]

Propensity = Callable[[Tensor], Tensor]
_TERM = re.compile(r"^\s*(\d+)?\s*\*?\s*([A-Za-z_]\w*)\s*$")


class ReactionNetwork(PathMeasure):
    r"""A well-mixed chemical reaction network: molecules of some species, and reactions that change their numbers.

    Mass action is combinatorial: a reaction with rate constant c that takes :math:`k_m` molecules of each species has the
    propensity :math:`c\prod_m\binom{x_m}{k_m}`, so ``"2 A -> B"`` has :math:`c\,x(x-1)/2`. (Some tools leave out the 1/2, and some
    scale by a volume: convert c.)

    Args:
        reactions: such as ``"0 -> A"``, ``"2 A -> B"``, ``"A + B -> C + 2 D"``.
        rates: one rate constant per reaction, in 1/time, or a function of counts ``(..., M)`` that returns propensities ``(...)``.
        initial: the number of molecules of each species at the start; zero for species that aren't named.
        start_time: when the law starts.

    Attributes:
        species: names in the order of the components of paths.
        change: ``(R, M)`` what each reaction adds.

    Raises:
        InvalidInputError: for reactions that can't be read or change nothing, negative rates, or unknown species in ``initial``.

    Example:
        >>> network = ReactionNetwork(["0 -> A", "A -> 0"], rates=[3.0, 0.5], initial={"A": 7})
        >>> network.sample([0.0, 1.0, 2.0], 5, 0).x.shape
        torch.Size([5, 3, 1])
        >>> round(float(network.truncate({"A": 80}).marginal(1.3).mean[0]), 6)
        6.522046

    Reference:
        Gillespie, "Exact stochastic simulation of coupled chemical reactions", 1977.
    """

    taken: Tensor
    change: Tensor
    start: Tensor

    def __init__(
        self,
        reactions: Sequence[str],
        rates: Sequence[Any],
        initial: Mapping[str, int],
        start_time: float = 0.0,
    ) -> None:
        super().__init__()
        check_nonempty(reactions, "reactions")
        if isinstance(reactions, str) or not all(isinstance(r, str) for r in reactions):
            raise InvalidInputError("reactions must be a list of strings", got=repr(reactions)[:60])
        if not hasattr(rates, "__len__") or len(rates) != len(reactions):
            raise ShapeError(
                "there must be one rate per reaction", got=repr(rates)[:60], expected=len(reactions)
            )
        if not isinstance(initial, Mapping):
            raise InvalidInputError(
                "initial must map species to numbers of molecules", got=type(initial).__name__
            )
        check_real(start_time, "start_time")
        sides = [_read(r) for r in reactions]
        names = [*initial, *(name for side in sides for part in side for name in part)]
        self.species = list(dict.fromkeys(names))
        known = {name for side in sides for part in side for name in part}
        strangers = [name for name in initial if name not in known]
        if strangers:
            raise InvalidInputError(
                "initial names species that no reaction has", got=strangers, expected=sorted(known)
            )
        index = {name: m for m, name in enumerate(self.species)}
        taken = np.zeros((len(reactions), len(self.species)), dtype=int)
        made = np.zeros_like(taken)
        for r, (left, right) in enumerate(sides):
            for name, count in left.items():
                taken[r, index[name]] = count
            for name, count in right.items():
                made[r, index[name]] = count
            if not (made[r] - taken[r]).any():
                raise InvalidInputError("a reaction must change something", got=reactions[r])
        self.reactions, self.start_time = list(reactions), float(start_time)
        self.register_buffer("taken", torch.as_tensor(taken))
        self.register_buffer("change", torch.as_tensor(made - taken))
        constants, self._own = [], {}
        for r, rate in enumerate(rates):
            if callable(rate) and not isinstance(rate, Tensor):
                self._own[r] = rate
                constants.append(torch.ones((), dtype=torch.float64))
                continue
            check_real(rate, f"rates[{r}]", minimum=0.0)
            constants.append(
                rate.double() if isinstance(rate, Tensor) else torch.tensor(float(rate), dtype=torch.float64)
            )
        self.constants = torch.stack([c.reshape(()) for c in constants])
        start = np.zeros(len(self.species))
        for name, count in initial.items():
            check_positive_int(count, f"initial[{name!r}]", 0)
            start[index[name]] = count
        self.register_buffer("start", torch.as_tensor(start))

    def propensities(self, x: Tensor) -> Tensor:
        """Return the propensities ``(..., R)`` in 1/time at counts ``(..., M)``, zero where molecules are lacking."""
        return self._propensities(x, falling=True)

    def _propensities(self, x: Tensor, *, falling: bool) -> Tensor:
        """Combinatorial propensities, or with powers in place of falling factorials for continuous concentrations."""
        columns = []
        for r in range(len(self.reactions)):
            value = self.constants[r].to(x.device)
            if r in self._own:
                columns.append(value * self._own[r](x))
                continue
            term = torch.ones(x.shape[:-1], dtype=x.dtype, device=x.device)
            for m, k in enumerate(self.taken[r].tolist()):
                for j in range(k):
                    factor = x[..., m] - j if falling else x[..., m]
                    term = term * factor / (j + 1)
                if k and falling:
                    term = torch.where(x[..., m] >= k, term, torch.zeros_like(term))
            columns.append(value * term)
        return torch.stack(columns, -1)

    def sample(self, ts: object, sample_shape: SampleShape = (), generator: Generator = None) -> PathSample:
        """Draw exact paths by Gillespie's direct method, all at once; counts at a time are those after a reaction at it.

        Args:
            ts: ``(T,)`` times, none before the start.
            sample_shape: the shape of independent draws, an integer or a tuple.
            generator: the source of randomness.

        Returns:
            A path with ``x (*sample, T, M)``.
        """
        grid = as_time_grid(ts, min_points=1, like=self.start).double()
        shape, source = as_sample_shape(sample_shape), as_generator(generator)
        if float(grid[0]) < self.start_time:
            raise TimeGridError(
                "ts starts before the law", got=float(grid[0]), expected=f">= {self.start_time:g}"
            )
        lanes = math.prod(shape)
        state = self.start.expand(lanes, -1).clone()
        now = torch.full((lanes,), self.start_time, dtype=torch.float64)
        out = torch.empty(lanes, len(grid), len(self.species), dtype=torch.float64)
        place = torch.zeros(lanes, dtype=torch.long)  # how many times of the grid are written
        change = self.change.double()
        active = torch.arange(lanes)
        padded = torch.cat([grid, grid.new_tensor([math.inf])])
        with torch.no_grad():
            while len(active):
                x = state[active]
                cumulative = self.propensities(x).cumsum(-1)
                total = cumulative[:, -1]
                wait = -torch.log1p(-torch.rand(len(active), dtype=torch.float64, generator=source)) / total
                later = torch.where(total > 0, now[active] + wait, torch.full_like(wait, math.inf))
                # times of the grid before the next reaction see the state as it is
                while True:
                    due = padded[place[active]] < later
                    if not bool(due.any()):
                        break
                    who = active[due]
                    out[who, place[who]] = state[who]
                    place[who] += 1
                pick = torch.rand(len(active), dtype=torch.float64, generator=source) * total
                done = place[active] >= len(grid)
                reaction = torch.searchsorted(cumulative, pick[:, None], right=True)[:, 0].clamp(
                    max=len(change) - 1
                )
                state[active] = torch.where(done[:, None], x, x + change[reaction])
                now[active] = later
                active = active[~done]
        return PathSample.of_states(grid, out.reshape(*shape, len(grid), -1), self)

    def marginal(self, t: Tensor | float) -> Marginal:
        """Return the law of the counts at a time by simulation; :meth:`truncate` gives it exactly."""
        if isinstance(t, bool) or not isinstance(t, Tensor | float | int):
            raise InvalidInputError("t must be a time", got=repr(t)[:60])
        time = float(t)
        if not math.isfinite(time):
            raise NonFiniteError("t must be finite", got=time)
        if time < self.start_time:
            raise TimeGridError("t lies before the law's start", got=time, expected=f">= {self.start_time:g}")
        return SampledMarginal(lambda shape, source: self.sample([time], shape, source).x[..., 0, :])

    def truncate(self, bounds: Mapping[str, int]) -> TruncatedNetwork:
        """Return the network on finitely many counts (finite state projection): exact, with a certificate of what is lost.

        Args:
            bounds: the largest number of molecules of each species.
        """
        return TruncatedNetwork(self, bounds)

    def mean_field(self, x: Tensor) -> Tensor:
        """Return the deterministic rate of change ``(..., M)`` at counts ``(..., M)``."""
        return self._propensities(x, falling=True) @ self.change.to(x)

    def langevin(self) -> SDE:
        r"""Return the chemical Langevin equation :math:`dX=\nu^\top a\,dt+\sum_r\nu_r\sqrt{a_r}\,dW_r`, for many molecules.

        It is an approximation: propensities below zero count as zero, counts may become negative, and rates of rare events
        (extinction, escape from a well) are wrong by factors that grow with the number of molecules.
        """
        change = self.change.double()

        def diffusion(t: Tensor, x: Tensor) -> Matrix:
            a = self._propensities(x, falling=True).clamp(min=0.0)
            return Matrix(change.mT.to(x) * a.sqrt().unsqueeze(-2))

        return SDE(lambda t, x: self._propensities(x, falling=True).clamp(min=0.0) @ change.to(x), diffusion)

    def linear_noise(self, horizon: float, steps_per_stay: int = 50) -> LinearGaussianMeasure:
        r"""Return the linear noise approximation up to ``horizon``: Gaussian around the deterministic path.

        .. math:: \dot m=\nu^\top a(m),\qquad \dot\Sigma=J\Sigma+\Sigma J^\top+\nu^\top\mathrm{diag}(a(m))\,\nu

        Exact in mean and covariance where all propensities are linear. Wrong near extinction and between several stable states.

        Args:
            horizon: the last time of interest.
            steps_per_stay: how finely the deterministic path is computed, per shortest time scale on it.
        """
        check_real(horizon, "horizon", above=self.start_time)
        path = _MeanPath(self, float(horizon), steps_per_stay)
        change = self.change.double()

        def offset(t: Tensor) -> Tensor:
            m = path(t)
            rate, slope = self.mean_field(m), path.slope(m)
            return rate - (slope @ m.unsqueeze(-1)).squeeze(-1)

        def diffusion(t: Tensor) -> Tensor:
            a = self._propensities(path(t), falling=True).clamp(min=0.0)
            return change.mT * a.sqrt().unsqueeze(-2)

        return LinearGaussianMeasure(
            lambda t: path.slope(path(t)), offset, diffusion, self.start.clone(), initial_time=self.start_time
        )


class _MeanPath:
    """The deterministic path of a network on a fine grid, by Runge-Kutta steps and cubic interpolation."""

    def __init__(self, network: ReactionNetwork, horizon: float, per_stay: int) -> None:
        self.network = network
        span = horizon - network.start_time
        scale = float(torch.linalg.matrix_norm(self.slope(network.start), 2))
        steps = max(200, math.ceil(per_stay * scale * span))
        self.ts = torch.linspace(0, 1, steps + 1, dtype=torch.float64) * span + network.start_time
        f, h = network.mean_field, span / steps
        x, out = network.start, [network.start]
        for _ in range(steps):
            k1 = f(x)
            k2 = f(x + 0.5 * h * k1)
            k3 = f(x + 0.5 * h * k2)
            k4 = f(x + h * k3)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
            out.append(x)
        self.x = torch.stack(out)
        self.v = f(self.x)
        self.h = h

    def slope(self, m: Tensor) -> Tensor:
        """Return the Jacobian of the mean field ``(..., M, M)``."""
        columns = []
        for unit in torch.eye(m.shape[-1], dtype=m.dtype):
            columns.append(
                torch.func.jvp(self.network.mean_field, (m,), (unit.expand_as(m).contiguous(),))[1]
            )
        return torch.stack(columns, -1)

    def __call__(self, t: Tensor) -> Tensor:
        """Return the path at times ``(n,)``, ``(n, M)``, by Hermite interpolation."""
        index = ((t.double() - self.ts[0]) / self.h).floor().long().clamp(0, len(self.ts) - 2)
        s = ((t.double() - self.ts[index]) / self.h).clamp(0.0, 1.0)[:, None]
        x0, x1, v0, v1 = self.x[index], self.x[index + 1], self.v[index] * self.h, self.v[index + 1] * self.h
        return (
            (2 * s**3 - 3 * s**2 + 1) * x0
            + (s**3 - 2 * s**2 + s) * v0
            + (-2 * s**3 + 3 * s**2) * x1
            + (s**3 - s**2) * v1
        )


class CountMarginal(Marginal):
    """The law of the counts at one time on a truncated space.

    Attributes:
        probs: ``(*bounds,)`` probabilities of the counts, one axis per species.
        lost_mass: the probability that has left the truncated space: no probability is wrong by more, in total.
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


class TruncatedNetwork:
    """A reaction network on counts up to given bounds, whose outflow is collected: finite state projection.

    Args:
        network: the network.
        bounds: the largest count of each species.

    Attributes:
        generator: sparse ``(S, S)`` rates between counts, rows summing to minus the outflow.

    Raises:
        SystemSizeError: for more than two million counts.

    Reference:
        Munsky and Khammash, "The finite state projection algorithm for the solution of the chemical master equation", 2006.
    """

    def __init__(self, network: ReactionNetwork, bounds: Mapping[str, int]) -> None:
        self.network = network
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
        self.generator = self._assemble()

    def _assemble(self) -> sp.csr_matrix:
        with torch.no_grad():
            rates = self.network.propensities(self.grid).numpy()
        if (rates < 0).any():
            raise InvalidInputError("a propensity is negative", got=float(rates.min()))
        x, size = self.grid.numpy(), len(self.grid)
        stride = np.array([math.prod(self.shape[m + 1 :]) for m in range(len(self.shape))])
        rows, columns, values = [np.arange(size)], [np.arange(size)], [-rates.sum(1)]
        for r, change in enumerate(self.network.change.numpy()):
            there = x + change
            inside = ((there >= 0) & (there < np.array(self.shape))).all(1) & (rates[:, r] > 0)
            here = np.flatnonzero(inside)
            rows.append(here)
            columns.append(here + int(change @ stride))
            values.append(rates[here, r])
        parts = (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns)))
        return sp.coo_matrix(parts, shape=(size, size)).tocsr()

    def marginal(self, t: float) -> CountMarginal:
        """Return the law at a time, by uniformisation with sparse products."""
        check_real(t, "t", minimum=self.network.start_time)
        stride = [math.prod(self.shape[m + 1 :]) for m in range(len(self.shape))]
        p = np.zeros(len(self.grid))
        p[int(sum(int(c) * s for c, s in zip(self.network.start.tolist(), stride, strict=True)))] = 1.0
        p = self.propagate(p, float(t) - self.network.start_time)
        lost = max(0.0, 1.0 - float(p.sum()))
        return CountMarginal(torch.as_tensor(p).reshape(self.shape), lost, self.grid)

    def propagate(self, p: np.ndarray, dt: float) -> np.ndarray:
        """Return the law ``(S,)`` after a time."""
        rate = float(-self.generator.diagonal().min())
        if rate == 0 or dt == 0:
            return p
        step = (sp.identity(len(p), format="csr") + self.generator / rate).T.tocsr()
        pieces = max(1, math.ceil(rate * dt / 500.0))
        mean = rate * dt / pieces
        terms = poisson_terms(mean)
        for _ in range(pieces):
            log_weight = -mean
            total = math.exp(log_weight) * p
            now = p
            for k in range(1, terms + 1):
                now = step @ now
                log_weight += math.log(mean / k)
                total = total + math.exp(log_weight) * now
            p = total
        return p

    def log_likelihood(self, times: object, counts: Mapping[str, object]) -> Tensor:
        """Return the exact log-likelihood of counts of some species, seen without error at times.

        Args:
            times: ``(T,)`` increasing times, none before the start.
            counts: the counts ``(T,)`` of each observed species; NaN where missing.
        """
        at = as_time_grid(times, "times", 1, like=self.network.start).double()
        seen = {
            name: as_tensor(value, f"counts[{name!r}]", 1, "(T,)", missing=True)
            for name, value in counts.items()
        }
        for name, value in seen.items():
            if name not in self.network.species:
                raise InvalidInputError(
                    "counts name an unknown species", got=name, expected=self.network.species
                )
            if len(value) != len(at):
                raise ShapeError(
                    f"counts[{name!r}] must have one value per time", got=len(value), expected=len(at)
                )
        p = np.zeros(len(self.grid))
        start = self.marginal(self.network.start_time).probs.reshape(-1).numpy()
        p, before, total = start, self.network.start_time, 0.0
        x = self.grid.numpy()
        for k, t in enumerate(at.tolist()):
            p = self.propagate(p, t - before)
            for name, value in seen.items():
                if not math.isnan(float(value[k])):
                    p = p * (x[:, self.network.species.index(name)] == float(value[k]))
            mass = float(p.sum())
            if mass <= 0:
                return torch.tensor(-math.inf, dtype=torch.float64)
            total, p, before = total + math.log(mass), p / mass, t
        return torch.tensor(total, dtype=torch.float64)


def _read(reaction: str) -> tuple[dict[str, int], dict[str, int]]:
    """Read one reaction such as ``"2 A + B -> C"``."""
    sides = reaction.split("->")
    if len(sides) != 2:
        raise InvalidInputError("a reaction has one arrow", got=reaction, expected="such as '2 A + B -> C'")
    return _side(sides[0], reaction), _side(sides[1], reaction)


def _side(text: str, reaction: str) -> dict[str, int]:
    out: dict[str, int] = {}
    if text.strip() in ("0", "", "∅"):
        return out
    for term in text.split("+"):
        found = _TERM.match(term)
        if found is None:
            raise InvalidInputError(
                "a reaction can't be read",
                got=f"{term.strip()!r} in {reaction!r}",
                expected="such as '2 A + B -> C'",
            )
        count = int(found.group(1) or 1)
        if count < 1:
            raise InvalidInputError("a stoichiometric number must be positive", got=reaction)
        out[found.group(2)] = out.get(found.group(2), 0) + count
    return out
