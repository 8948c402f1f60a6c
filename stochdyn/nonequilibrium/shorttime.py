"""Entropy production from trajectories alone: linear currents in closed form, cross-fitted and extrapolated over lags."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from stochdyn._checks import DOUBLE, as_tensor, check_choice, check_nonempty, check_positive_int, check_real
from stochdyn.errors import ApproximationWarning, InvalidInputError, ShapeError
from stochdyn.nonequilibrium.current import Groups, group_parts

__all__ = ["ShortTimeEntropy", "short_time_entropy"]

Features = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ShortTimeEntropy:
    """Entropy production from trajectories alone.

    Attributes:
        rate: The estimate in 1/time, extrapolated over the lags.
        stderr: Its standard error, from blocks of time.
        per_lag: The cross-fitted estimate at each lag, in steps.
        in_sample: The estimate at the first lag without cross-fitting, which is too large by about ``2 p / T`` with ``p`` the number of
            currents that aren't gradients.
        parts: The estimate of each named group of components; empty without groups.
    """

    rate: float
    stderr: float
    per_lag: dict[int, float]
    in_sample: float
    parts: dict[str, float]


def short_time_entropy(
    paths: object,
    dt: float,
    features: str | Features = "linear",
    lags: Sequence[int] = (1, 2),
    folds: int = 2,
    num_blocks: int = 20,
    by: Groups | None = None,
) -> ShortTimeEntropy:
    r"""Estimate the entropy production rate of a steady state from trajectories alone, without its equation.

    Currents :math:`j_k=\phi_k(x_m)\cdot dx` at the midpoints of steps, with mean rates :math:`m` and covariance rates :math:`G`, bound
    the rate by

    .. math:: \sigma\ge\max_c\frac{2(c\cdot m)^2}{c^\top Gc}=2m^\top G^{-1}m,

    tight for short steps if :math:`c=2G^{-1}m` makes the features :math:`D^{-1}v`. In sample it is too large by twice the number of
    features over the total time; here the coefficients come from other blocks of the data than the currents (cross-fitting),
    which removes this bias. At a lag the bound lies below the rate by an amount of first order in the lag, and two lags are extrapolated to
    zero.

    When to use which: ``"linear"`` is exact for linear forces and a good first look at all others; a function of your own serves where
    you know better currents; :class:`PairCurrents` are those of many like particles, whose number doesn't grow with them; :class:`NEEP` trains a
    network where no list of features will do, and holds for long lags and for jumps.

    Args:
        paths: The states at equal times, ``(T, d)`` or ``(n, T, d)``.
        dt: The time between them.
        features: ``"linear"`` for all products :math:`x_i\,dx_j` and the steps themselves, or a function of states ``(..., d)`` that
            returns the coefficients of ``K`` currents, ``(..., K, d)``.
        lags: The numbers of steps, one or two different ones.
        folds: The number of parts for cross-fitting.
        num_blocks: The number of blocks of time for the standard error.
        by: Named groups of components, for instance one per particle, whose parts in the rate are returned as well.

    Raises:
        ShapeError: If the trajectories are too short for the blocks.
        InvalidInputError: If another argument has the wrong type or range.

    Warns:
        ApproximationWarning: If the estimate rises with the lag by more than its error: the noise of measurement then dominates
            short steps, and longer lags are closer to the truth; if there are more currents than the data can tell apart; or if a component
            moves smoothly, its squared steps growing with the square of the lag, as positions of underdamped motion do: the bound doesn't
            hold for it.

    The answer is a lower bound where the features are too few, or states are hidden.

    Example:
        >>> turn = torch.tensor([[-1.0, 1.5], [-1.5, -1.0]]).double()
        >>> from stochdyn import LinearGaussianMeasure
        >>> zero, eye = torch.zeros(2).double(), torch.eye(2).double()
        >>> law = LinearGaussianMeasure(turn, zero, 2**0.5 * eye, zero, eye)
        >>> x = law.sample(0.01 * torch.arange(50_000.0).double(), generator=0).x
        >>> found = short_time_entropy(x, dt=0.01)
        >>> abs(found.rate - 4.5) < 3 * found.stderr
        True

    Reference:
        S. Otsubo et al., "Estimating entropy production by machine learning of short-time fluctuating currents", 2020.
    """
    x = as_tensor(paths, "paths", (2, 3), "(T, d) or (n, T, d)", like=DOUBLE).double()
    x = x[None] if x.ndim == 2 else x
    check_nonempty(x, "paths")
    check_real(dt, "dt", above=0.0, fixed=True)
    check_positive_int(folds, "folds", 2)
    check_positive_int(num_blocks, "num_blocks", 2 * folds)
    if isinstance(features, str):
        check_choice(features, ("linear",), "features")
    if not isinstance(lags, tuple | list) or not 1 <= len(lags) <= 2 or len(set(lags)) != len(lags):
        raise InvalidInputError("lags must be one or two different numbers of steps", got=repr(lags)[:40])
    for lag in lags:
        check_positive_int(lag, "lags")
    segments = _segments(x, num_blocks, max(lags))
    states = torch.cat([piece.flatten(0, 1) for piece in segments])
    centre, spread = states.mean(0), states.std(0)
    if bool((spread == 0).any()):
        raise InvalidInputError("a component of paths doesn't move", got=f"component {int(spread.argmin())}")
    _check_rough(x, spread)
    fits = [
        _cross_fit(*_currents(segments, lag, features, by, centre, spread), lag * float(dt), folds)
        for lag in lags
    ]
    # Blocks are the same pieces of the trajectories at every lag, so the extrapolation is done in each of them.
    weight = 1.0 if len(lags) == 1 else lags[1] / (lags[1] - lags[0])
    weights = [weight, 1 - weight][: len(lags)]
    blocks = torch.stack([w * fit.blocks for w, fit in zip(weights, fits, strict=True)]).sum(0)
    parts = (
        {}
        if by is None
        else {
            name: float(sum(w * fit.parts[name] for w, fit in zip(weights, fits, strict=True))) for name in by
        }
    )
    stderr = float(blocks.std() / len(blocks) ** 0.5)
    if len(lags) == 2:
        first, second = (fits[i].blocks for i in ((0, 1) if lags[0] < lags[1] else (1, 0)))
        rise = second - first
        if float(rise.mean()) > 3 * float(rise.std() / len(rise) ** 0.5):
            _warn(
                "The estimate rises with the lag, as it does where the noise of measurement dominates short steps: "
                "it is too low. Take longer lags, until it falls."
            )
    rate = float(sum(w * fit.rate for w, fit in zip(weights, fits, strict=True)))
    return ShortTimeEntropy(
        rate, stderr, {int(k): float(f.rate) for k, f in zip(lags, fits, strict=True)},
        fits[0].in_sample, parts,
    )  # fmt: skip


def _segments(x: Tensor, num_blocks: int, lag: int) -> list[Tensor]:
    """Return pieces of the trajectories ``(n_b, T_b, d)``, one per block: whole trajectories or stretches of time."""
    n, length = x.shape[:2]
    if n >= num_blocks:
        return [x[i * n // num_blocks : (i + 1) * n // num_blocks] for i in range(num_blocks)]
    per_path = -(-num_blocks // n)
    size = (length - 1) // per_path
    if size < 2 * lag:
        raise ShapeError(
            "the trajectories are too short for so many blocks",
            got=f"{length} states",
            expected=f"at least {2 * lag * per_path + 1}",
        )
    pieces = [x[i : i + 1, k * size : (k + 1) * size + 1] for k in range(per_path) for i in range(n)]
    return pieces


@dataclass(frozen=True)
class _Fit:
    rate: Tensor
    blocks: Tensor
    in_sample: float
    parts: dict[str, Tensor]


def _currents(
    segments: list[Tensor],
    lag: int,
    features: str | Features,
    by: Groups | None,
    centre: Tensor,
    spread: Tensor,
) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Return by block the sums of currents ``(B, K)``, of their products ``(B, K, K)``, and numbers of steps ``(B,)``.

    Steps overlap where the lag is more than one. The last entry has the sums of the currents' parts by group, ``(B, K)`` each.
    """
    sums, products, counts = [], [], []
    parts: dict[str, list[Tensor]] = {name: [] for name in by or ()}
    for piece in segments:
        step, middle = piece[:, lag:] - piece[:, :-lag], 0.5 * (piece[:, lag:] + piece[:, :-lag])
        if isinstance(features, str):
            # In units of each component's own spread; currents x_i dx_j and dx_j, of which only the j-th component moves.
            step, middle = step / spread, (middle - centre) / spread
            one = torch.cat([middle, torch.ones_like(middle[..., :1])], -1)
            currents = (one[..., :, None] * step[..., None, :]).flatten(-2)
            own = None if by is None else currents[..., None].unflatten(-2, (one.shape[-1], step.shape[-1]))
            terms = None if own is None else torch.diag_embed(own[..., 0]).flatten(-3, -2)
        else:
            fields = features(middle)
            if (
                not isinstance(fields, Tensor)
                or fields.ndim != middle.ndim + 1
                or fields.shape[-1] != middle.shape[-1]
            ):
                got = f"shape {tuple(fields.shape)}" if isinstance(fields, Tensor) else type(fields).__name__
                raise ShapeError("features must return coefficients (..., K, d)", got=got)
            terms = fields.detach().double() * step[..., None, :]
            currents = terms.sum(-1)
        if by is not None and terms is not None:
            for name, value in group_parts(terms, by).items():
                parts[name].append(value.sum((0, 1)))
        flat = currents.flatten(0, 1)
        sums.append(flat.sum(0))
        products.append(flat.mT @ flat)
        counts.append(float(len(flat)))
    return (
        torch.stack(sums),
        torch.stack(products),
        torch.tensor(counts, dtype=torch.float64),
        {name: torch.stack(values) for name, values in parts.items()},
    )


def _cross_fit(
    sums: Tensor, products: Tensor, counts: Tensor, parts: dict[str, Tensor], span: float, folds: int
) -> _Fit:
    """Return the rate in every block with coefficients from the other folds, the rate in sample, and parts by group."""
    g = products.sum(0) / counts.sum()
    unit = g.diagonal().sqrt()
    unit = torch.where(unit > 0, unit, 1.0)
    sums, g = sums / unit, g / unit / unit[:, None]
    if float(counts.sum()) < 4 * len(g):
        _warn(f"There are {len(g)} currents and {int(counts.sum())} steps: the estimate is far too low.")
    # Features may depend on each other linearly, as symmetric products do; their combinations without variance count for nothing.
    inverse = torch.linalg.pinv(g, rtol=1e-10, hermitian=True)
    mean = sums.sum(0) / counts.sum()
    inside = 2 * float(mean @ inverse @ mean) / span
    # Folds are stretches of time, not every second block: blocks that touch share an end, so their sums of currents that are nearly
    # gradients are opposite to each other, and every such border would lower the product of their means.
    fold = torch.arange(len(counts)) * folds // len(counts)
    # By blocks, the change of 2 m G⁻¹ m with its means: 2 c·m_b - c·G_b c / 2 with c = 2 G⁻¹ m; coefficients scatter as well.
    whole = 2 * inverse @ mean
    quadratic = torch.einsum("i,bij,j->b", whole, products / unit / unit[:, None], whole)
    blocks = (2 * sums @ whole - 0.5 * quadratic) / counts / span
    rate = torch.zeros((), dtype=g.dtype)
    grouped = {name: torch.zeros((), dtype=g.dtype) for name in parts}
    for k in range(folds):
        here, there = fold == k, fold != k
        coefficients = 2 * inverse @ (sums[there].sum(0) / counts[there].sum()) / span
        rate = rate + (sums[here].sum(0) / counts[here].sum()) @ coefficients * here.sum() / len(counts)
        for name, value in parts.items():
            share = (value[here] / unit / counts[here, None]).mean(0) @ coefficients
            grouped[name] = grouped[name] + share * here.sum() / len(counts)
    return _Fit(rate, blocks, inside, grouped)


def _check_rough(x: Tensor, spread: Tensor) -> None:
    """Warn where squared steps over two times grow more like the square of the time than like the time, as they do without noise."""
    one, two = ((x[:, lag:] - x[:, :-lag]) / spread for lag in (1, 2))
    growth = two.square().mean((0, 1)) / one.square().mean((0, 1))
    smooth = (growth > 2**1.5).nonzero()[:, 0].tolist()
    if smooth:
        _warn(
            f"Components {smooth[:8]} move smoothly, as positions of underdamped motion do. Short-time currents bound the entropy "
            "production of overdamped motion alone: the answer means nothing for them."
        )


def _warn(message: str) -> None:
    warnings.warn(message, ApproximationWarning, stacklevel=4)
