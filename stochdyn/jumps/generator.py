"""Rate matrices of jump processes: how they are made, what they say, and their forward equation."""

from __future__ import annotations

import itertools
import math
import warnings
from typing import Any, cast

import numpy as np
import torch
from scipy.linalg.blas import dger
from torch import Tensor, nn

from stochdyn._checks import as_mask, as_tensor, check_positive_int
from stochdyn.core.forward.master import MasterEquation
from stochdyn.errors import ApproximationWarning, InvalidInputError, ShapeError, SystemSizeError

__all__ = ["JumpGenerator", "RateMatrix", "as_rates"]


class RateMatrix(nn.Module):
    r"""The generator Q of a Markov jump process, ``Q[i, j]`` the rate from state i to state j.

    The diagonal is filled in, so that every row sums to zero. (The master equations of :mod:`stochdyn.core` hold the
    transpose, whose columns do.)

    Args:
        rates: The rates ``(*batch, S, S)`` in 1/time; the diagonal is ignored, unless it contradicts the rest. May require gradients.
        mask: True where a jump is possible, ``(S, S)``; other rates must be zero. All jumps are possible if None.

    Attributes:
        matrix: The generator ``(*batch, S, S)`` with its diagonal.

    Raises:
        InvalidInputError: If a rate is negative, rows of a full matrix don't sum to zero, or there are rates outside the mask.
        ShapeError: If the matrix isn't square, or has fewer than two states.

    Example:
        >>> Q = RateMatrix([[0.0, 0.7], [1.9, 0.0]])
        >>> Q.stationary(), Q.relaxation_times()
        (tensor([0.7308, 0.2692]), tensor([0.3846]))
    """

    # the names of what the rates are made of where that is learnt: symmetric rates and weights
    _constant: Tensor
    _parts: tuple[str, str] | None = None

    def __init__(self, rates: object, mask: object = None) -> None:
        super().__init__()
        value = as_tensor(rates.matrix if isinstance(rates, RateMatrix) else rates, "rates")
        if value.ndim < 2 or value.shape[-1] != value.shape[-2] or value.shape[-1] < 2:
            raise ShapeError(
                "rates must be square", got=tuple(value.shape), expected="(*batch, S, S) with S >= 2"
            )
        off = value - torch.diag_embed(value.diagonal(dim1=-2, dim2=-1))
        if bool((off < 0).any()):
            i = tuple((off < 0).nonzero()[0].tolist())
            raise InvalidInputError(
                "rates must not be negative", got=f"rates{list(i)}={float(off[i].detach()):g}"
            )
        diagonal = value.detach().diagonal(dim1=-2, dim2=-1)
        gap = (off.detach().sum(-1) + diagonal).abs()
        if bool(((diagonal != 0) & (gap > 1e-5 * off.detach().sum(-1))).any()):
            raise InvalidInputError(
                "the rows of rates must sum to zero",
                got=f"a row that sums to {float(gap.max()):.3g}",
                hint="rates[i, j] is the rate from i to j: pass the transpose if your columns sum to zero",
            )
        if mask is not None:
            allowed = as_mask(mask).to(value.device)
            if allowed.shape != value.shape[-2:]:
                raise ShapeError(
                    "mask must hold True or False for every pair of states", got=tuple(allowed.shape)
                )
            if bool(((off != 0) & ~allowed).any()):
                raise InvalidInputError("there are rates outside the mask")
        matrix = _filled(off)
        learnt = isinstance(rates, nn.Parameter)
        if isinstance(rates, nn.Parameter):
            self.rates = rates
        self.register_buffer("_constant", matrix.detach() if learnt else matrix, persistent=not learnt)

    @property
    def matrix(self) -> Tensor:
        """The generator ``(*batch, S, S)`` with its diagonal, of the rates as they are now."""
        if self._parts is not None:
            return _filled(_balanced(*(getattr(self, name) for name in self._parts)))
        if isinstance(getattr(self, "rates", None), nn.Parameter):
            return _filled(self.rates - torch.diag_embed(self.rates.diagonal(dim1=-2, dim2=-1)))
        return self._constant

    @property
    def num_states(self) -> int:
        """S, the number of states."""
        return self.matrix.shape[-1]

    @property
    def batch_shape(self) -> torch.Size:
        """Batch shape."""
        return self.matrix.shape[:-2]

    def __repr__(self) -> str:
        batch = f", batch {tuple(self.batch_shape)}" if self.batch_shape else ""
        return f"RateMatrix({self.num_states} states{batch})"

    @classmethod
    def reversible(cls, symmetric: object, stationary: object) -> RateMatrix:
        r"""Return the generator :math:`Q_{ij}=S_{ij}\sqrt{\pi_j/\pi_i}`, which is in detailed balance with π.

        Args:
            symmetric: The symmetric rates S, not negative, ``(*batch, S, S)``; the diagonal is ignored.
            stationary: The positive weights π, ``(*batch, S)``; they are normalised.
        """
        s = as_tensor(symmetric, "symmetric")
        pi = as_tensor(stationary, "stationary", like=s)
        if bool((pi <= 0).any()):
            raise InvalidInputError("stationary must be positive", got=f"minimum {float(pi.min()):g}")
        if not torch.allclose(s, s.mT, rtol=1e-6, atol=0):
            raise InvalidInputError("symmetric must be a symmetric matrix")
        made = cls(_balanced(s, pi))
        if isinstance(s, nn.Parameter) or isinstance(pi, nn.Parameter):
            made._parts = ("symmetric_rates", "stationary_weights")
            made.register_buffer("_constant", made._constant.detach(), persistent=False)
            for name, part in zip(made._parts, (s, pi), strict=True):
                if isinstance(part, nn.Parameter):
                    made.register_parameter(name, part)
                else:
                    made.register_buffer(name, part if part.requires_grad else part.detach().clone())
        return made

    def replicate(self, count: int) -> tuple[RateMatrix, Tensor]:
        """Return the generator of how many of ``count`` like and independent units are in each state.

        Args:
            count: The number of units, such as channels in a patch of membrane.

        Returns:
            The generator over occupations, and these occupations ``(C, S)``, C the number of ways to put the units into the
            states.

        Raises:
            SystemSizeError: If there are more than 20 000 occupations.
        """
        check_positive_int(count, "count")
        states = self.num_states
        total = math.comb(count + states - 1, states - 1)
        if total > 20_000:
            raise SystemSizeError("there are too many occupations", got=total, expected="at most 20000")
        cuts = itertools.combinations(range(count + states - 1), states - 1)
        rows = [np.diff([-1, *cut, count + states - 1]) - 1 for cut in cuts]
        occupation = np.stack(rows)
        index = {tuple(row): k for k, row in enumerate(occupation.tolist())}
        matrix = self.matrix
        out = matrix.new_zeros(*self.batch_shape, total, total)
        for i, j in itertools.permutations(range(states), 2):
            here = np.flatnonzero(occupation[:, i])
            moved = occupation[here].copy()
            moved[:, i] -= 1
            moved[:, j] += 1
            there = [index[tuple(row)] for row in moved.tolist()]
            factor = torch.as_tensor(occupation[here, i]).to(matrix)
            out[..., here, there] = factor * matrix[..., i, j, None]
        return RateMatrix(out), torch.as_tensor(occupation)

    def stationary(self) -> Tensor:
        """Return the stationary law ``(*batch, S)``, differentiable; improbable states have their own relative accuracy.

        Raises:
            InvalidInputError: If there are several, because more than one set of states is never left again.

        Reference:
            Grassmann, Taksar and Heyman, "Regenerative analysis and steady state distributions for Markov chains", 1985.
        """
        q = self.matrix.double()
        exact = []
        for k, matrix in enumerate(q.detach().reshape(-1, self.num_states, self.num_states).cpu().numpy()):
            classes = closed_classes(matrix)
            if len(classes) > 1:
                raise InvalidInputError(
                    "the stationary law isn't unique: several sets of states are never left again",
                    got=f"{classes}" + (f" in batch member {k}" if self.batch_shape else ""),
                )
            exact.append(_without_subtractions(matrix, classes[0]))
        value = torch.as_tensor(np.stack(exact)).reshape(q.shape[:-1]).to(q)
        if q.requires_grad:
            # π Q = 0 with one equation replaced by Σ π = 1; rows are scaled so that slow states keep their digits
            scale = (-q.diagonal(dim1=-2, dim2=-1)).detach()
            scale = torch.where(
                scale > 0, scale, scale.amax(-1, keepdim=True).clamp(min=torch.finfo(q.dtype).tiny)
            )
            flux = (q / scale[..., None]).mT
            system = torch.cat(
                [flux[..., :-1, :], (1.0 / scale)[..., None, :] * scale.amin(-1)[..., None, None]], -2
            )
            right = torch.zeros(*q.shape[:-2], self.num_states, 1, dtype=q.dtype, device=q.device)
            right[..., -1, 0] = 1.0
            solved = torch.linalg.solve(system, right)[..., 0] / scale
            solved = solved / solved.sum(-1, keepdim=True)
            value = value + (solved - solved.detach())  # nothing but its derivatives
        return value.to(self.matrix.dtype)

    def relaxation_times(self) -> Tensor:
        r"""Return :math:`-1/\mathrm{Re}\,\lambda_k` of the nonzero eigenvalues, longest first, ``(*batch, S - 1)``.

        Complex eigenvalues are damped oscillations: the time is that of the damping. Infinite, once for each further set of states
        that is never left again, where the chain remembers for ever which of them it has entered.
        """
        q = self.matrix.double()
        slow = torch.linalg.eigvals(q).real.sort(-1, descending=True).values[..., 1:]
        flat = q.detach().reshape(-1, self.num_states, self.num_states).cpu().numpy()
        further = torch.tensor([len(closed_classes(m)) - 1 for m in flat], device=q.device).reshape(
            *self.batch_shape, 1
        )
        for_ever = torch.arange(self.num_states - 1, device=q.device) < further
        times = torch.where(for_ever, math.inf, -1.0 / torch.where(for_ever, -1.0, slow))
        return times.to(self.matrix.dtype)

    def mean_first_passage(self, target: int | list[int] | None = None) -> Tensor:
        """Return mean times until a state is entered: zero in it, infinite from where it may never be reached.

        Args:
            target: The state, or the states of which any will do. None for each state in turn.

        Returns:
            The times ``(*batch, S)`` from every state; without a target ``(*batch, S, S)``, from state i to state j.
        """
        if target is None:
            return torch.stack([self.mean_first_passage(j) for j in range(self.num_states)], -1)
        goal = self._states(target, "target")
        q = self.matrix.double()
        rest = [i for i in range(self.num_states) if i not in goal]
        inner = q[..., rest, :][..., rest]
        out = torch.zeros(*self.batch_shape, self.num_states, dtype=q.dtype, device=q.device)
        reach = _can_reach(q.detach(), goal)
        safe = inner
        lost = ~reach[..., rest]
        if bool(
            lost.any()
        ):  # a state that may miss the target has no finite mean, nor have those that lead to it
            lost = lost | (_leads_to(q.detach(), ~reach, goal)[..., rest])
            eye = torch.eye(len(rest), dtype=q.dtype, device=q.device)
            safe = torch.where(
                lost[..., :, None], -eye, inner * ~lost[..., None, :] + inner * eye * lost[..., :, None]
            )
        time = torch.linalg.solve(
            -safe, torch.ones(*self.batch_shape, len(rest), 1, dtype=q.dtype, device=q.device)
        )[..., 0]
        out[..., rest] = torch.where(lost, torch.full_like(time, math.inf), time)
        return out.to(self.matrix.dtype)

    def committor(self, source: int | list[int], target: int | list[int]) -> Tensor:
        """Return the probability to enter the target before the source, from every state, ``(*batch, S)``.

        Zero from where neither may be reached.
        """
        a, b = self._states(source, "source"), self._states(target, "target")
        if set(a) & set(b):
            raise InvalidInputError("source and target must not share states", got=sorted(set(a) & set(b)))
        rest = [i for i in range(self.num_states) if i not in a and i not in b]
        q = self.matrix.double()
        out = torch.zeros(*self.batch_shape, self.num_states, dtype=q.dtype, device=q.device)
        out[..., b] = 1.0
        if rest:
            right = q[..., rest, :][..., b].sum(-1, keepdim=True)
            # what reaches neither stays between itself for ever: it has no equation
            lost = ~_can_reach(q.detach(), [*a, *b])[..., rest]
            eye = torch.eye(len(rest), dtype=q.dtype, device=q.device)
            inner = torch.where(
                lost[..., :, None] | lost[..., None, :], -eye * lost[..., None], q[..., rest, :][..., rest]
            )
            out[..., rest] = torch.linalg.solve(-inner, right)[..., 0]
        return out.to(self.matrix.dtype)

    def fluxes(self) -> Tensor:
        r"""Return the net probability currents :math:`J_{ij}=\pi_iQ_{ij}-\pi_jQ_{ji}` of the steady state, ``(*batch, S, S)``."""
        flow = self.stationary()[..., None] * self.matrix
        flow = flow - torch.diag_embed(flow.diagonal(dim1=-2, dim2=-1))
        return flow - flow.mT

    def entropy_production(self) -> Tensor:
        r"""Return the entropy production rate of the steady state, ``(*batch,)``, in 1/time.

        .. math:: \sigma=\sum_{i<j}J_{ij}\log\frac{\pi_iQ_{ij}}{\pi_jQ_{ji}}

        Infinite where a jump has no reverse. Zero in detailed balance.
        """
        flow = self.stationary()[..., None] * self.matrix
        upper = torch.triu_indices(self.num_states, self.num_states, 1)
        there, back = flow[..., upper[0], upper[1]], flow[..., upper[1], upper[0]]
        one_way = (there > 0) != (back > 0)
        both = (there > 0) & (back > 0)
        ratio = torch.log(torch.where(both, there, 1.0)) - torch.log(torch.where(both, back, 1.0))
        terms = torch.where(both, (there - back) * ratio, torch.zeros_like(there))
        total = terms.sum(-1)
        return torch.where(one_way.any(-1), torch.full_like(total, math.inf), total)

    def correlation(self, f: object, dt: object, g: object = None) -> Tensor:
        r"""Return the stationary autocovariance :math:`\mathrm{cov}(f(X_0),g(X_t))` of functions of the state.

        Args:
            f: The function of the state at the earlier time, ``(S,)``.
            dt: The times between the two, ``()`` or ``(n,)``.
            g: The function of the state at the later time, ``(S,)``; f if None.
        """
        from stochdyn.jumps.uniformisation import transition

        a = as_tensor(f, "f", 1, "(S,)", like=self.matrix).to(self.matrix)
        b = a if g is None else as_tensor(g, "g", 1, "(S,)", like=self.matrix).to(self.matrix)
        pi = self.stationary()
        later = (transition(self, dt) @ b[:, None])[..., 0]
        return (pi * a * later).sum(-1) - (pi * a).sum(-1) * (pi * b).sum(-1)

    def dwell_density(self, states: int | list[int], dt: object) -> Tensor:
        r"""Return the probability density of the time spent in a class of states per visit, in the steady state.

        .. math:: f(t)=\varphi\,e^{Q_{AA}t}Q_{AB}1,\qquad\varphi\propto\pi_BQ_{BA}

        Args:
            states: The states A of the class, such as the open states of a channel.
            dt: The times ``()`` or ``(n,)``.

        Returns:
            The density, of the shape of ``dt``, in 1/time.
        """
        inside = self._states(states, "states")
        outside = [i for i in range(self.num_states) if i not in inside]
        if not outside:
            raise InvalidInputError("states must leave out at least one state", got=inside)
        entry = (self.stationary()[outside, None] * self.matrix[outside][:, inside]).sum(0)
        if float(entry.sum()) == 0:
            raise InvalidInputError("the class is never entered in the steady state", got=inside)
        left, leaving = self._until_left(inside, dt)
        return ((entry / entry.sum()) * (left @ leaving)).sum(-1)

    def first_passage_density(self, target: int | list[int], dt: object) -> Tensor:
        """Return the probability density of the time at which a state of the target is first entered, from every state.

        Args:
            target: The states of the target.
            dt: The times ``()`` or ``(n,)``.

        Returns:
            The density ``(*n, S)``, in 1/time; zero in the target. It integrates to the probability that the target is reached.
        """
        goal = self._states(target, "target")
        rest = [i for i in range(self.num_states) if i not in goal]
        left, leaving = self._until_left(rest, dt)
        out = left.new_zeros(*left.shape[:-2], self.num_states)
        out[..., rest] = left @ leaving
        return out

    def _until_left(self, inside: list[int], dt: object) -> tuple[Tensor, Tensor]:
        """Return ``e^{Q_AA t}`` at times and the rates at which A is left from each of its states."""
        from stochdyn.jumps.uniformisation import transition

        if self.batch_shape:
            raise ShapeError("one matrix at a time", got=f"batch {tuple(self.batch_shape)}")
        inner = self.matrix[inside][:, inside]
        leaving = -inner.sum(-1).clamp(max=0.0)
        # with a sink for what has left, A is a generator of its own
        size = len(inside)
        closed = self.matrix.new_zeros(size + 1, size + 1)
        closed[:size, :size], closed[:size, size] = inner, leaving
        return transition(closed, dt)[..., :size, :size], leaving

    def embedding_report(self, dt: float) -> dict[str, Any]:
        """Say what observations every ``dt`` can't tell: other generators with the same transitions, and information lost.

        Returns:
            ``"aliases"``: other valid generators with the same transition matrix over dt (from other branches of the
            logarithm), ``"expected_jumps"``: the largest expected number of jumps within dt, and ``"information"``: the
            share of the information on a rate that remains, for two states of that rate.
        """
        from stochdyn.jumps.embedding import other_generators

        if self.batch_shape:
            raise ShapeError("one matrix at a time", got=f"batch {tuple(self.batch_shape)}")
        x = float((-self.matrix.diagonal()).max()) * dt
        kept = 4 * x / math.expm1(4 * x) if x > 0 else 1.0
        aliases = other_generators(self.matrix, dt)
        if aliases:
            warnings.warn(
                f"{len(aliases)} other generators have the same transition probabilities over {dt:g}: observations at "
                "that interval can't tell them apart.",
                ApproximationWarning,
                stacklevel=2,
            )
        return {"aliases": aliases, "expected_jumps": x, "information": kept}

    def _states(self, states: int | list[int], name: str) -> list[int]:
        chosen = [states] if isinstance(states, int) else list(states)
        for state in chosen:
            if isinstance(state, bool) or not isinstance(state, int) or not 0 <= state < self.num_states:
                raise InvalidInputError(
                    f"{name} isn't a state", got=repr(state), expected=f"0 to {self.num_states - 1}"
                )
        if not chosen:
            raise InvalidInputError(f"{name} is empty")
        return chosen


def as_rates(rates: object) -> Tensor:
    """Return the matrix ``(*batch, S, S)`` of a RateMatrix or of an array, checked."""
    if isinstance(rates, RateMatrix):
        return rates.matrix
    if isinstance(rates, Tensor) and rates.requires_grad:
        RateMatrix(rates.detach())  # the checks alone: derivatives are those of the entries as given
        return rates
    return RateMatrix(rates).matrix


def _can_reach(q: Tensor, goal: list[int]) -> Tensor:
    """Return which states can reach the goal, ``(*batch, S)``."""
    link = q > 0
    reach = torch.zeros(q.shape[:-1], dtype=torch.bool, device=q.device)
    reach[..., goal] = True
    for _ in range(q.shape[-1]):
        reach = reach | (link & reach[..., None, :]).any(-1)
    return reach


def _leads_to(q: Tensor, where: Tensor, avoid: list[int]) -> Tensor:
    """Return which states can get to marked ones without passing ``avoid``, ``(*batch, S)``."""
    link = q > 0
    found = where.clone()
    blocked = torch.zeros_like(where)
    blocked[..., avoid] = True
    for _ in range(q.shape[-1]):
        found = (found | (link & found[..., None, :]).any(-1)) & ~blocked
    return found


def _without_subtractions(matrix: np.ndarray, recurrent: list[int]) -> np.ndarray:
    """Return the stationary law of a chain with one set of states that is never left, by an elimination without subtractions.

    Each state in turn is taken out, and its visits become jumps between the rest.
    """
    chain = np.asfortranarray(matrix[np.ix_(recurrent, recurrent)])
    for n in range(len(chain) - 1, 0, -1):
        chain[:n, n] /= chain[n, :n].sum()
        # into the first n rows and columns, in place: the columns lie together, and other rows get nothing
        arrivals = np.zeros(len(chain))
        arrivals[:n] = chain[:n, n]
        dger(1.0, arrivals, chain[n, :n].copy(), a=chain[:, :n], overwrite_a=1)
    weight = np.ones(len(chain))
    for n in range(1, len(chain)):
        weight[n] = weight[:n] @ chain[:n, n]
        weight[: n + 1] /= weight[: n + 1].max()  # neither too large nor too small to be held
    out = np.zeros(len(matrix))
    out[recurrent] = weight / weight.sum()
    return out


def closed_classes(matrix: np.ndarray) -> list[list[int]]:
    """Return the sets of states that are never left again once entered."""
    from scipy.sparse.csgraph import connected_components

    link = matrix > 0
    count, label = connected_components(link, directed=True, connection="strong")
    classes = [np.flatnonzero(label == k) for k in range(count)]
    return [c.tolist() for c in classes if not link[np.ix_(c, np.setdiff1d(np.arange(len(label)), c))].any()]


def _filled(off: Tensor) -> Tensor:
    """Return rates with the diagonal that makes rows sum to zero."""
    return off - torch.diag_embed(off.sum(-1))


def _balanced(symmetric: Tensor, stationary: Tensor) -> Tensor:
    """Return the rates, without a diagonal, that are symmetric but for the weights and so in detailed balance with them."""
    root = stationary.sqrt()
    off = symmetric * root[..., None, :] / root[..., :, None]
    return off - torch.diag_embed(off.diagonal(dim1=-2, dim2=-1))


class JumpGenerator(MasterEquation):
    r"""The master equation :math:`\dot p_j=\sum_ip_iQ_{ij}` of a jump process, differentiable in its rates.

    Strings of outcomes have one site, whose outcome is the state.

    Args:
        rates: A :class:`RateMatrix` without a batch, or a function ``rates(t)`` that returns its matrix ``(S, S)``.
        num_states: The number of states S, for a function.
    """

    def __init__(self, rates: Any, num_states: int | None = None) -> None:
        super().__init__()
        self.rates = rates
        if isinstance(rates, RateMatrix):
            if rates.batch_shape:
                raise ShapeError("a forward equation is one law's", got=f"batch {tuple(rates.batch_shape)}")
            num_states = rates.num_states
        check_positive_int(num_states, "num_states", 2)
        self.num_sites, self.num_outcomes = 1, int(cast(int, num_states))

    def _columns(self, t: Tensor | float | None) -> Tensor:
        """Return ``L = Qᵀ``, whose columns sum to zero."""
        if isinstance(self.rates, RateMatrix):
            return self.rates.matrix.mT
        if t is None:
            raise InvalidInputError("rates that change in time need t")
        at = t if isinstance(t, Tensor) else torch.tensor(float(t), dtype=torch.float64)
        return self.rates(at.reshape(-1)[0]).mT

    def multiply(self, p: Tensor, t: Tensor | float | None = None) -> Tensor:
        """Return ``L p`` for ``p (*batch, S)``."""
        return (self._columns(t).to(p.dtype) @ p.unsqueeze(-1)).squeeze(-1)

    def connected(self, a: Tensor, t: Tensor | float | None = None) -> tuple[Tensor, Tensor]:
        """Return all states that feed given ones, themselves first, with the rates; see :meth:`MasterEquation.connected`."""
        matrix = self._columns(t)
        states = torch.arange(self.num_outcomes, device=a.device)
        order = (a + states) % self.num_outcomes
        return order.unsqueeze(-1), matrix[a, order]

    def mass_defect(self) -> Tensor:
        """Return zero: the diagonal is made so that mass is conserved."""
        probe = self.rates.matrix if isinstance(self.rates, RateMatrix) else torch.zeros(())
        return torch.zeros((), dtype=probe.dtype, device=probe.device)
