"""How far predicted populations are from those that were seen, above what two samples of one law are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import (
    as_generator,
    as_tensor,
    check_choice,
    check_nonempty,
    check_positive_int,
    check_real,
)
from stochdyn.core._distance import distance_between
from stochdyn.core.law.path import Estimate
from stochdyn.diagnostics.metrics import emd
from stochdyn.errors import ShapeError, TooFewDrawsError

__all__ = ["PopulationComparison", "compare_populations"]


@dataclass(frozen=True)
class PopulationComparison:
    """Distances of predicted populations from their targets; standard errors are over populations.

    Attributes:
        distances: The distances of the predictions from samples of their targets of ``num_points`` points, ``(M,)``.
        floors: The distances of two samples of the target itself, of the same size, ``(M,)``.
        num_points: The sizes of the samples, ``(M,)``.
    """

    distances: Tensor
    floors: Tensor
    num_points: Tensor

    @property
    def distance(self) -> Estimate:
        """The mean distance."""
        return Estimate.of(self.distances)

    @property
    def floor(self) -> Estimate:
        """The mean distance of two samples of one target: what a perfect prediction has."""
        return Estimate.of(self.floors)

    @property
    def excess(self) -> Estimate:
        """The mean distance above the floor, population by population."""
        return Estimate.of(self.distances - self.floors)

    def minus(self, other: PopulationComparison) -> Estimate:
        """Return the mean difference of the distances from those of another prediction, paired by population.

        Populations differ far more from one another than predictions of one population do, so only the paired difference
        tells which of two models is better. Compare both with the same targets and the same seed.

        Args:
            other: The comparison of the other prediction with the same targets.

        Raises:
            ShapeError: If it is of another number of populations.
        """
        if other.distances.shape != self.distances.shape:
            raise ShapeError(
                "both comparisons must be of the same populations",
                got=len(other.distances),
                expected=len(self.distances),
            )
        return Estimate.of(self.distances - other.distances)

    def interval(
        self, level: float = 0.9, num_draws: int = 2000, generator: torch.Generator | int | None = 0
    ) -> tuple[float, float]:
        """Return an interval of the mean excess by the bootstrap over populations, which are the independent units here.

        Args:
            level: The probability that the interval is to have.
            num_draws: The number of bootstrap draws.
            generator: The source of randomness: a ``torch.Generator``, a seed, or None for torch's global one.
        """
        check_real(level, "level", above=0.0, below=1.0)
        check_positive_int(num_draws, "num_draws")
        excess = self.distances - self.floors
        pick = torch.randint(len(excess), (num_draws, len(excess)), generator=as_generator(generator))
        means = excess[pick].mean(-1)
        ends = torch.tensor([0.5 - level / 2, 0.5 + level / 2], dtype=means.dtype)
        low, high = means.quantile(ends).tolist()
        return low, high

    def __str__(self) -> str:
        parts = {"distance": self.distance, "floor": self.floor, "excess": self.excess}
        return ", ".join(f"{k} {float(v.mean):.4f} ± {float(v.stderr):.4f}" for k, v in parts.items())


def compare_populations(
    predicted: Sequence[Any],
    target: Sequence[Any],
    metric: str = "w1",
    *,
    generator: torch.Generator | int | None = 0,
) -> PopulationComparison:
    r"""Compare predicted populations with those that were seen.

    Two samples of one law are apart as well: of every target one half is compared with the prediction, and with the other half.

    Args:
        predicted: A list of ``(n_i, d)`` samples, or one sample.
        target: A list of ``(m_i, d)`` samples, or one sample. Paired rows aren't compared as pairs.
        metric: ``"w1"`` or ``"w2"``, the transport distances :math:`W_1` and :math:`W_2`, in the units of the data, biased upwards in
            small samples; or ``"mmd"``, the squared maximum mean discrepancy without bias, which may be negative, under a
            Gaussian kernel as wide as the median distance in the target. Take W1 unless single far points matter (W2) or there
            are thousands of points (MMD).
        generator: The randomness of the halves: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        Distances, floors and what is above them.

    Raises:
        ShapeError: If there isn't one prediction per target.
        TooFewDrawsError: If a target has fewer than two points, for ``"mmd"`` four, or a prediction too few.

    Example:
        >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
        >>> result = compare_populations([x[:200], x[:200]], [x[200:], x[200:] + 3])
        >>> [bool(d > 2 * f) for d, f in zip(result.distances, result.floors)]
        [False, True]

    Reference:
        Gretton et al., "A kernel two-sample test", 2012, lemma 6 (the estimate without bias).
    """
    check_choice(metric, tuple(_METRICS), "metric")
    pairs = [_listed(group, name) for group, name in ((predicted, "predicted"), (target, "target"))]
    if len(pairs[0]) != len(pairs[1]):
        raise ShapeError("there must be one prediction per target", got=len(pairs[0]), expected=len(pairs[1]))
    source, measure, least = as_generator(generator), _METRICS[metric], 2 if metric == "mmd" else 1
    rows = []
    for i, (x, y) in enumerate(zip(*pairs, strict=True)):
        if len(y) < 2 * least:
            raise TooFewDrawsError(
                f"target[{i}] can't be halved", got=len(y), expected=f"at least {2 * least}"
            )
        if len(x) < least:
            raise TooFewDrawsError(f"predicted[{i}] is too small", got=len(x), expected=f"at least {least}")
        # the halves of the target are the same for every prediction of it, so that differences are paired
        y = y[torch.randperm(len(y), generator=source).to(y.device)]
        size = min(len(x), len(y) // 2)
        x = x[torch.randperm(len(x), generator=source).to(x.device)[:size]]
        near, far = y[:size], y[len(y) - size :]
        rows.append((measure(x, near), measure(far, near), size))
    distances, floors, sizes = zip(*rows, strict=True)
    return PopulationComparison(
        torch.tensor(distances, dtype=torch.float64),
        torch.tensor(floors, dtype=torch.float64),
        torch.tensor(sizes),
    )


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    r"""Return :math:`\overline{k(x_i,x_j)}_{i\ne j}+\overline{k(y_i,y_j)}_{i\ne j}-2\,\overline{k(x_i,y_j)}`, without bias."""
    x, y = x.double(), y.double()
    own = torch.pdist(y)
    width = float(own.median()) or float(distance_between(x, y).median()) or 1.0

    def kernel(distance: Tensor) -> Tensor:
        return torch.exp(-0.5 * (distance / width).square())

    return float(
        kernel(torch.pdist(x)).mean() + kernel(own).mean() - 2 * kernel(distance_between(x, y)).mean()
    )


_METRICS: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "w1": lambda x, y: float(emd(x, y, 1)),
    "w2": lambda x, y: float(emd(x, y, 2)),
    "mmd": _squared_mmd,
}


def _listed(group: Any, name: str) -> list[Tensor]:
    if not isinstance(group, list | tuple):
        group = [group]
    check_nonempty(group, name)
    samples = [as_tensor(x, f"{name}[{i}]", 2, "(n, d)") for i, x in enumerate(group)]
    for i, x in enumerate(samples):
        check_nonempty(x, f"{name}[{i}]")
    return samples
