"""How far predicted populations are from those that were seen, above what two samples of one law are apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stochdyn._checks import as_generator, as_tensor, check_choice, check_nonempty
from stochdyn.core.law.path import Estimate
from stochdyn.diagnostics.metrics import emd
from stochdyn.errors import ShapeError, TooFewDrawsError

__all__ = ["PopulationComparison", "compare_populations"]


@dataclass(frozen=True)
class PopulationComparison:
    """Distances of predicted populations from their targets; standard errors are over populations.

    Attributes:
        distances: ``(M,)`` distances of samples of ``num_points`` points.
        floors: ``(M,)`` distances of two samples of the target itself, of the same size.
        num_points: ``(M,)`` the sizes of the samples.
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

    def __str__(self) -> str:
        parts = {"distance": self.distance, "floor": self.floor, "excess": self.excess}
        return ", ".join(f"{k} {float(v.mean):.4f} ± {float(v.stderr):.4f}" for k, v in parts.items())


def compare_populations(
    predicted: Sequence[Any],
    target: Sequence[Any],
    p: int = 1,
    *,
    generator: torch.Generator | int | None = 0,
) -> PopulationComparison:
    r"""Compare predicted populations with those that were seen, by the transport distance :math:`W_p`.

    Two samples of one law are apart as well: of every target one half is compared with the prediction, and with the other half.

    Args:
        predicted: a list of ``(n_i, d)``, or one sample.
        target: a list of ``(m_i, d)``, or one sample. Paired rows aren't compared as pairs.
        p: the order of the distance, 1 or 2.
        generator: decides the halves: a ``torch.Generator``, a seed, or None for torch's global one.

    Returns:
        Distances, floors and what is above them.

    Raises:
        ShapeError: if there isn't one prediction per target.
        TooFewDrawsError: if a target has fewer than two points.

    Example:
        >>> x = torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
        >>> result = compare_populations([x[:200], x[:200]], [x[200:], x[200:] + 3])
        >>> [bool(d > 2 * f) for d, f in zip(result.distances, result.floors)]
        [False, True]
    """
    check_choice(p, (1, 2), "p")  # type: ignore[arg-type]
    pairs = [_listed(group, name) for group, name in ((predicted, "predicted"), (target, "target"))]
    if len(pairs[0]) != len(pairs[1]):
        raise ShapeError("there must be one prediction per target", got=len(pairs[0]), expected=len(pairs[1]))
    source = as_generator(generator)
    rows = []
    for i, (x, y) in enumerate(zip(*pairs, strict=True)):
        if len(y) < 2:
            raise TooFewDrawsError(f"target[{i}] can't be halved", got=len(y), expected="at least 2")
        size = min(len(x), len(y) // 2)
        x, y = (v[torch.randperm(len(v), generator=source).to(v.device)] for v in (x, y))
        near, far = y[:size], y[len(y) - size :]
        rows.append((emd(x[:size], near, p), emd(near, far, p), size))
    distances, floors, sizes = zip(*rows, strict=True)
    return PopulationComparison(
        torch.tensor(distances, dtype=torch.float64),
        torch.tensor(floors, dtype=torch.float64),
        torch.tensor(sizes),
    )


def _listed(group: Any, name: str) -> list[Tensor]:
    if not isinstance(group, list | tuple):
        group = [group]
    check_nonempty(group, name)
    samples = [as_tensor(x, f"{name}[{i}]", 2, "(n, d)") for i, x in enumerate(group)]
    for i, x in enumerate(samples):
        check_nonempty(x, f"{name}[{i}]")
    return samples
