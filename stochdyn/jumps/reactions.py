"""Chemical reaction networks: exact simulation, truncation with a certificate, linear noise and Langevin approximations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from stochdyn._checks import (
    as_generator,
    as_sample_shape,
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
from stochdyn.errors import InvalidInputError, NonFiniteError, ShapeError, TimeGridError
from stochdyn.jumps._runge_kutta import runge_kutta
from stochdyn.jumps.reaction_paths import Lanes, SimulationMethod, as_simulation

if TYPE_CHECKING:
    from stochdyn.jumps.moment_closure import Moments
    from stochdyn.jumps.truncation import TruncatedNetwork

__all__ = ["ReactionNetwork"]

Propensity = Callable[[Tensor], Tensor]
#: The deterministic path takes this many steps per shortest time scale, and between so many in each of its windows.
_STEPS_PER_STAY, _LEAST_STEPS, _MOST_STEPS = 50, 50, 1000
_TERM = re.compile(r"^\s*(\d+)?\s*\*?\s*([A-Za-z_]\w*)\s*$")


class ReactionNetwork(PathMeasure):
    r"""A well-mixed chemical reaction network: molecules of some species, and reactions that change their numbers.

    Mass action is combinatorial: a reaction with rate constant c that takes :math:`k_m` molecules of each species has the
    propensity :math:`c\prod_m\binom{x_m}{k_m}`, so ``"2 A -> B"`` has :math:`c\,x(x-1)/2`. (Some tools leave out the 1/2, and some
    scale by a volume: convert c.)

    Args:
        reactions: The reactions as text, such as ``"0 -> A"``, ``"2 A -> B"``, ``"A + B -> C + 2 D"``.
        rates: One rate constant per reaction, in 1/time, or a function of counts ``(..., M)`` that returns propensities ``(...)``.
        initial: The number of molecules of each species at the start; zero for species that aren't named.
        start_time: The time at which the law starts.

    Attributes:
        species: The names in the order of the components of paths.
        change: What each reaction adds to the counts, ``(R, M)``.

    Raises:
        InvalidInputError: If a reaction can't be read or changes nothing, a rate is negative, or ``initial`` has unknown species.

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
    _fixed: Tensor

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
        check_real(start_time, "start_time", fixed=True)
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
        self._taken = [[(m, k) for m, k in enumerate(row) if k] for row in taken.tolist()]
        constants: list[Tensor] = []
        self._own: dict[int, Propensity] = {}
        self._learnt: list[int] = []
        for r, rate in enumerate(rates):
            if callable(rate) and not isinstance(rate, Tensor):
                self._own[r] = rate
                constants.append(torch.ones((), dtype=torch.float64))
                continue
            check_real(rate, f"rates[{r}]", minimum=0.0)
            if isinstance(rate, nn.Parameter):
                self._learnt.append(r)
                self.register_parameter(f"rate_{r}", rate)
                rate = 0.0  # a placeholder: constants are made of the parameters whenever they are asked for
            constants.append(
                rate.double() if isinstance(rate, Tensor) else torch.tensor(float(rate), dtype=torch.float64)
            )
        self.register_buffer("_fixed", torch.stack([c.reshape(()) for c in constants]))
        start = np.zeros(len(self.species))
        for name, count in initial.items():
            check_positive_int(count, f"initial[{name!r}]", 0)
            start[index[name]] = count
        self.register_buffer("start", torch.as_tensor(start))

    @property
    def constants(self) -> Tensor:
        """The rate constants ``(R,)`` as they are now, one for propensities of one's own."""
        if not self._learnt:
            return self._fixed
        parts = list(self._fixed.unbind())
        for r in self._learnt:
            parts[r] = getattr(self, f"rate_{r}").double().reshape(())
        return torch.stack(parts)

    def propensities(self, x: Tensor) -> Tensor:
        """Return the propensities ``(..., R)`` in 1/time at counts ``(..., M)``, zero where molecules are lacking."""
        return self.constants.to(x) * self.unit_propensities(x)

    def unit_propensities(self, x: Tensor, whole: bool = True) -> Tensor:
        """Return the propensities ``(..., R)`` for rate constants of one.

        Args:
            x: The counts ``(..., M)``.
            whole: Whether counts are whole numbers, so that a reaction that lacks molecules doesn't happen; if not, the same
                polynomials without that rule, for means and concentrations.
        """
        columns = []
        for r, taken in enumerate(self._taken):
            if r in self._own:
                columns.append(self._own[r](x))
                continue
            # the binomials of mass action: x (x - 1) ... (x - k + 1) / k!
            term = torch.ones(x.shape[:-1], dtype=x.dtype, device=x.device)
            for m, k in taken:
                for j in range(k):
                    term = term * (x[..., m] - j if j else x[..., m])
                if k > 1:
                    term = term / math.factorial(k)
                    if whole:
                        term = torch.where(x[..., m] >= k, term, torch.zeros_like(term))
            columns.append(term)
        return torch.stack(columns, -1)

    def unit_slopes(self, x: Tensor) -> Tensor:
        """Return the derivatives ``(..., R, M)`` of the propensities at rate constants of one, for means and concentrations.

        Args:
            x: The means ``(..., M)``.
        """
        rows = []
        for r, taken in enumerate(self._taken):
            if r in self._own:
                units = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
                slopes = [
                    torch.func.jvp(self._own[r], (x,), (u.expand_as(x).contiguous(),))[1] for u in units
                ]
                rows.append(torch.stack(slopes, -1))
                continue
            # d/dx of x (x - 1) ... (x - k + 1) / k! is the sum over left-out factors
            row = torch.zeros_like(x)
            for m, k in taken:
                term = torch.zeros(x.shape[:-1], dtype=x.dtype, device=x.device)
                for left_out in range(k):
                    part = torch.ones_like(term)
                    for j in range(k):
                        part = part if j == left_out else part * (x[..., m] - j)
                    term = term + part / math.factorial(k)
                for other, count in taken:
                    for j in range(count if other != m else 0):
                        term = term * (x[..., other] - j) / (j + 1)
                row = torch.cat([row[..., :m], term[..., None], row[..., m + 1 :]], -1)
            rows.append(row)
        return torch.stack(rows, -2)

    def continuous(self, x: Tensor) -> Tensor:
        """Return the propensities ``(..., R)`` at means or concentrations ``(..., M)``."""
        return self.constants.to(x) * self.unit_propensities(x, whole=False)

    def _noise(self, x: Tensor) -> Tensor:
        """Return the noise ``(..., M, R)`` that reactions make at means, one channel each; propensities below zero make none."""
        return self.change.to(x).mT * self.continuous(x).clamp(min=0.0).sqrt().unsqueeze(-2)

    def sample(
        self,
        ts: object,
        sample_shape: SampleShape = (),
        generator: Generator = None,
        method: SimulationMethod | str = "direct",
    ) -> PathSample:
        """Draw paths, all at once; counts at a time are those after a reaction at it.

        Args:
            ts: The times ``(T,)``, none before the start.
            sample_shape: The shape of independent draws, an integer or a tuple.
            generator: The source of randomness.
            method: The way to simulate: ``"direct"`` (exact, the default), ``"next_reaction"`` (exact, one random number per reaction), or an object
                such as :class:`TauLeaping`, which is approximate and pays where counts are large.

        Returns:
            A path with ``x (*sample, T, M)``.
        """
        grid = as_time_grid(ts, min_points=1, like=self.start).double()
        shape, source = as_sample_shape(sample_shape), as_generator(generator)
        if float(grid[0]) < self.start_time:
            raise TimeGridError(
                "ts starts before the law", got=float(grid[0]), expected=f">= {self.start_time:g}"
            )
        start = self.start.expand(math.prod(shape), -1).clone()
        with torch.no_grad():
            out = as_simulation(method).paths(self.lanes(), start, self.start_time, grid, source)
        return PathSample.of_states(grid, out.reshape(*shape, len(grid), -1), self)

    def lanes(self, constants: Tensor | None = None) -> Lanes:
        """Return what a simulation needs of the network.

        Args:
            constants: Rate constants per lane ``(L, R)``; the network's own if None.
        """
        return Lanes(
            self.unit_propensities,
            self.change.double(),
            self.constants.detach() if constants is None else constants,
        )

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
            bounds: The largest number of molecules of each species.
        """
        from stochdyn.jumps.truncation import TruncatedNetwork

        return TruncatedNetwork(self, bounds)

    def moments(self, ts: object) -> Moments:
        """Return mean and covariance of the counts by Gaussian moment closure.

        Exact where all propensities are linear; otherwise third cumulants are left out, which is wrong near extinction and
        between several stable states. Against :meth:`linear_noise`, the mean knows of the fluctuations.

        Args:
            ts: The times ``(T,)``, none before the start.
        """
        from stochdyn.jumps.moment_closure import closed_moments

        return closed_moments(self, ts)

    @classmethod
    def from_sbml(cls, source: str) -> ReactionNetwork:
        """Read a network from SBML, with libsbml (the extra ``stochdyn[sbml]``).

        Amounts must be numbers of molecules, and kinetic laws mass action ``k * A * B`` or expressions of amounts and parameters;
        expressions are taken as they are, so ``k * A * A`` is not divided by two.

        Args:
            source: The path of a file, or SBML as text.

        Raises:
            InvalidInputError: If the model has errors, or parts that a network can't hold (events, rules, several
                compartments of different volume).
        """
        from stochdyn.jumps.sbml import read_sbml

        return read_sbml(source)

    def mean_field(self, x: Tensor) -> Tensor:
        """Return the deterministic rate of change ``(..., M)`` at counts ``(..., M)``."""
        return self.continuous(x) @ self.change.to(x)

    def langevin(self) -> SDE:
        r"""Return the chemical Langevin equation :math:`dX=\nu^\top a\,dt+\sum_r\nu_r\sqrt{a_r}\,dW_r`, for many molecules.

        It is an approximation: propensities below zero count as zero, counts may become negative, and rates of rare events
        (extinction, escape from a well) are wrong by factors that grow with the number of molecules.
        """
        return SDE(_Reactions(self), _ReactionNoise(self))

    def linear_noise(self) -> LinearGaussianMeasure:
        r"""Return the linear noise approximation: Gaussian around the deterministic path.

        .. math:: \dot m=\nu^\top a(m),\qquad \dot\Sigma=J\Sigma+\Sigma J^\top+\nu^\top\mathrm{diag}(a(m))\,\nu

        Exact in mean and covariance where all propensities are linear. Wrong near extinction and between several stable states.
        The deterministic path is computed as far as times are asked for, by steps that are short beside the fastest rate on it.

        Raises:
            NonFiniteError: On a question after the time at which the deterministic path leaves all bounds.
        """
        path = _MeanPath(self)
        return LinearGaussianMeasure(
            _Coefficient(self, path, "matrix"),
            _Coefficient(self, path, "offset"),
            _Coefficient(self, path, "diffusion"),
            self.start.clone(),
            initial_time=self.start_time,
        )


class _Reactions(nn.Module):
    """The mean change of counts by reactions, as a drift that lists the network's parameters as its own."""

    def __init__(self, network: ReactionNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        """Return the drift ``(..., M)``."""
        return self.network.continuous(x).clamp(min=0.0) @ self.network.change.to(x)


class _ReactionNoise(_Reactions):
    """The noise of reactions, one channel each."""

    def forward(self, t: Tensor, x: Tensor) -> Matrix:  # type: ignore[override]
        """Return the diffusion ``(..., M, R)``."""
        return Matrix(self.network._noise(x))


class _Coefficient(nn.Module):
    """One coefficient of the linear noise, as a function of time that lists the network's parameters as its own."""

    def __init__(
        self, network: ReactionNetwork, path: _MeanPath, what: Literal["matrix", "offset", "diffusion"]
    ) -> None:
        super().__init__()
        self.network, self.path, self.what = network, path, what

    def forward(self, t: Tensor) -> Tensor:
        """Return the values at times ``(n,)``, time leading."""
        m = self.path(t)
        if self.what == "matrix":
            return self.path.slope(m)
        if self.what == "offset":
            return self.network.mean_field(m) - (self.path.slope(m) @ m.unsqueeze(-1)).squeeze(-1)
        return self.network._noise(m)


class _MeanPath:
    """The deterministic path of a network, by Runge-Kutta steps and cubic interpolation, in windows that double in length.

    Windows depend on the network alone, so the path at a time doesn't depend on which other times were asked for. It is kept until
    rate constants change, or a backward pass has used up its graph.
    """

    def __init__(self, network: ReactionNetwork) -> None:
        self.network = network
        self._begin()

    def __reduce__(self) -> tuple[Any, ...]:
        return _MeanPath, (self.network,)

    def _begin(self) -> None:
        network = self.network
        self._of, self._spent = network.constants, False
        start, begin = network.start, torch.tensor([network.start_time], dtype=torch.float64)
        self.ts, self.x, self.v = begin, start[None], network.mean_field(start)[None]
        change = (self.v[0].detach().abs() / start.clamp(min=1.0)).max()
        rate = float(torch.maximum(self._fastest(self.x), change))
        self.window = math.inf if not bool(self.v.any()) else 1.0 / rate

    def _is_stale(self) -> bool:
        now = self.network.constants
        return (
            self._spent
            or not torch.equal(now.detach(), self._of.detach())
            or (now.requires_grad and not self._of.requires_grad)
        )

    def _spend(self, slope: Tensor) -> None:
        self._spent = True

    def _fastest(self, x: Tensor) -> Tensor:
        return torch.linalg.matrix_norm(self.slope(x).detach(), 2).amax()

    def _extend(self) -> None:
        """Add a window, in steps of a fiftieth of the shortest time scale met in it."""
        begin, steps = float(self.ts[-1]), _LEAST_STEPS
        while True:
            if self.window < 1e-9 * (begin - self.network.start_time):
                raise NonFiniteError(
                    "the deterministic path leaves all bounds",
                    got=f"by t={begin:g}",
                    hint="linear noise doesn't hold here: use truncate",
                )
            x, out = self.x[-1], []
            for _ in range(steps):
                (x,) = runge_kutta(lambda m: (self.network.mean_field(m),), (x,), self.window / steps)
                out.append(x)
            path = torch.stack(out)
            fastest = float(self._fastest(path.detach())) if bool(path.isfinite().all()) else math.inf
            wanted = max(_LEAST_STEPS, _STEPS_PER_STAY * fastest * self.window)
            if wanted <= 1.5 * steps:
                break
            if math.isfinite(wanted) and wanted <= _MOST_STEPS:
                steps = math.ceil(wanted)
            else:
                self.window, steps = 0.5 * self.window, _LEAST_STEPS
        grid = begin + self.window * torch.linspace(0, 1, steps + 1, dtype=torch.float64)[1:]
        self.ts, self.x = torch.cat([self.ts, grid]), torch.cat([self.x, path])
        self.v = torch.cat([self.v, self.network.mean_field(path)])
        if path.requires_grad:
            path.register_hook(self._spend)
        still = self.v[-1].detach().abs().max() <= 1e-14 * fastest * path[-1].detach().abs().max()
        self.window = math.inf if bool(still) else 2.0 * self.window

    def slope(self, m: Tensor) -> Tensor:
        """Return the Jacobian of the mean field ``(..., M, M)``."""
        constants = self.network.constants.to(m)
        return self.network.change.to(m).mT @ (constants[:, None] * self.network.unit_slopes(m))

    def __call__(self, t: Tensor) -> Tensor:
        """Return the path at times ``(n,)``, ``(n, M)``, by Hermite interpolation."""
        if self._is_stale():
            self._begin()
        at = t.detach().double()
        last = max([*at.tolist(), self.network.start_time])
        while math.isfinite(self.window) and (len(self.ts) == 1 or last > float(self.ts[-1])):
            self._extend()
        if len(self.ts) == 1:  # nothing ever happens
            return self.x.expand(len(at), -1)
        index = (torch.searchsorted(self.ts, at.contiguous(), right=True) - 1).clamp(0, len(self.ts) - 2)
        h = (self.ts[index + 1] - self.ts[index])[:, None]
        s = ((t.double()[:, None] - self.ts[index][:, None]) / h).clamp(0.0, 1.0)
        x0, x1, v0, v1 = self.x[index], self.x[index + 1], self.v[index] * h, self.v[index + 1] * h
        return (
            (2 * s**3 - 3 * s**2 + 1) * x0
            + (s**3 - 2 * s**2 + s) * v0
            + (-2 * s**3 + 3 * s**2) * x1
            + (s**3 - s**2) * v1
        )


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
