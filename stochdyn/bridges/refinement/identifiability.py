"""What snapshots can't tell: rotations that leave all of them unchanged, and parameters without information."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stochdyn._checks import as_seed, check_positive_int, check_type
from stochdyn.bridges.data.snapshots import Snapshots
from stochdyn.diagnostics.metrics import energy_distance
from stochdyn.errors import ApproximationWarning

if TYPE_CHECKING:
    from stochdyn.bridges.families.base import DriftFamily
    from stochdyn.bridges.refinement.linear_response import LinearResponse

__all__ = ["RotationCheck", "check_counts", "check_information", "rotation_invariance", "warn_if_invariant"]

_MAX_POINTS = 500
_LITTLE = 0.02
_MARGIN = 1.6


@dataclass(frozen=True)
class RotationCheck:
    r"""How well a rotation :math:`e^{\phi A}` about a fixed centre leaves all snapshots unchanged.

    Attributes:
        generator: The skew-symmetric matrix :math:`A` of norm :math:`\sqrt2` whose rotation changes the snapshots least,
            ``(d, d)``.
        centre: The fixed point of the rotation, ``(d,)``.
        distance: The largest energy distance between a snapshot and its rotated copy, over snapshots and some angles.
        threshold: The distance that chance alone makes, estimated from the distances of random halves of the snapshots.
        invariant: Whether the distance is within the threshold in every snapshot.
    """

    generator: Tensor
    centre: Tensor
    distance: float
    threshold: float
    invariant: bool


def rotation_invariance(snapshots: Snapshots, num_samples: int = 20, seed: int = 0) -> RotationCheck:
    r"""Look for a rotation that leaves all snapshots as they are, so that their marginals can't show it.

    A drift :math:`A(x-c)` with skew :math:`A` moves the densities :math:`\rho_t` nowhere if they are invariant under the rotation that it
    generates. Among all generators the one is taken that commutes best with all covariances and moves the means least; whether the
    snapshots are invariant under it, is then tested on the particles.

    Args:
        snapshots: The snapshots to look at.
        num_samples: The number of random halves for the threshold.
        seed: The seed of the halves.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> ring = [r * torch.randn(200, 2, generator=g) for r in (1.0, 2.0)]
        >>> rotation_invariance(Snapshots([0.0, 1.0], ring)).invariant
        True

    Reference: Lavenant et al. (2024), Toward a mathematical theory of trajectory inference; Guan et al. (2024),
    Identifying drift, diffusion and causal structure from temporal snapshots.
    """
    check_type(snapshots, Snapshots, "snapshots")
    check_positive_int(num_samples, "num_samples")
    dim = snapshots.dim
    generator = torch.Generator().manual_seed(as_seed(seed))
    clouds = [_at_most(s.sample.double().cpu(), s.weights.double().cpu(), generator) for s in snapshots]
    skew, centre = _most_harmless(clouds)
    if dim == 1:
        return RotationCheck(skew, centre, math.inf, 0.0, False)
    distance, threshold, invariant = 0.0, 0.0, True
    for x in clouds:
        # the square of the distance is twice as large for halves as for two clouds of the size of x, and again twice as
        # large for a cloud and its mirror image as for independent ones: these cancel, and a margin covers several angles
        null = _MARGIN * torch.stack([_halves(x, generator) for _ in range(num_samples)]).quantile(0.95)
        found = 0.0
        for angle in (0.25 * math.pi, 0.5 * math.pi, math.pi):
            turned = centre + (x - centre) @ torch.linalg.matrix_exp(angle * skew).mT
            found = max(found, float(energy_distance(x, turned)))
        invariant = invariant and found <= float(null)
        distance, threshold = max(distance, found), max(threshold, float(null))
    return RotationCheck(skew, centre, distance, threshold, invariant)


def warn_if_invariant(check: RotationCheck, stacklevel: int = 3) -> None:
    """Warn if a rotation is undetermined."""
    if check.invariant:
        warnings.warn(
            "A rotation leaves every snapshot as it is, within the noise of sampling "
            f"(energy distance {check.distance:.2g}, threshold {check.threshold:.2g}): the snapshots can't tell a rotating drift from a still one. "
            "The refinement returns the one nearest to its start; start from an uneven population, or choose a family without rotation, "
            "such as PotentialDrift",
            ApproximationWarning,
            stacklevel=stacklevel,
        )


def check_information(response: LinearResponse, stacklevel: int = 3) -> None:
    """Warn if the snapshots hold hardly any of the information on some combination of parameters that paths would."""
    kept = response.information_kept
    if float(kept[0]) < _LITTLE:
        share, direction, spread = response.weakest()
        parts = [
            f"{value:+.2g} {name}"
            for name, value in zip(coordinate_names(response.family), direction.tolist(), strict=True)
            if abs(value) > 0.05
        ]
        warnings.warn(
            f"On {int((kept < _LITTLE).sum())} combination(s) of parameters the snapshots hold less than {100 * _LITTLE:g} % of the "
            f"information that paths would (least {100 * share:.2g} %): they are hardly identifiable from marginals. The least known is "
            f"({' '.join(parts[:6])}) times a number with standard deviation {spread:.2g}. "
            "More snapshots, an uneven start, or a prior would determine them",
            ApproximationWarning,
            stacklevel=stacklevel,
        )


def coordinate_names(family: DriftFamily) -> list[str]:
    """Return a name for each raw parameter, with its index where a tensor has several."""
    names = []
    for name, value in family.named_parameters():
        if value.numel() == 1:
            names.append(name)
        else:
            indices = torch.cartesian_prod(*(torch.arange(n) for n in value.shape)).reshape(value.numel(), -1)
            names += [f"{name}[{', '.join(map(str, index))}]" for index in indices.tolist()]
    return names


def check_counts(snapshots: Snapshots, family: DriftFamily, stacklevel: int = 3) -> None:
    """Warn if the snapshots after the first hold no more different numbers than the family has parameters."""
    size = sum(p.numel() for p in family.parameters() if p.requires_grad)
    distinct = [
        len(torch.unique(x[w > 0], dim=0)) for x, w in zip(snapshots.samples, snapshots.weights, strict=True)
    ]
    numbers = snapshots.dim * sum(distinct[1:])
    if numbers <= size:
        warnings.warn(
            f"{size} parameters are to be told from {numbers} different numbers (particles that coincide count once): nothing identifies "
            "them all, and what is found depends on the start. Give more particles, a family of fewer parameters, or priors",
            ApproximationWarning,
            stacklevel=stacklevel,
        )


def _at_most(x: Tensor, weights: Tensor, generator: torch.Generator) -> Tensor:
    equal = bool((weights - weights[0]).abs().max() < 1e-9 * weights[0])
    if equal and len(x) <= _MAX_POINTS:
        return x
    index = torch.multinomial(weights, min(_MAX_POINTS, len(x)), replacement=not equal, generator=generator)
    return x[index]


def _most_harmless(clouds: list[Tensor]) -> tuple[Tensor, Tensor]:
    r"""The skew ``A`` and centre with the least :math:`\sum_i|AS_i-S_iA|^2/|S_i|^2+|A(m_i-c)|^2/\mathrm{tr}S_i`."""
    dim = clouds[0].shape[1]
    means = torch.stack([x.mean(0) for x in clouds])
    covs = [torch.cov(x.mT).reshape(dim, dim) if len(x) > 1 else torch.eye(dim).to(x) for x in clouds]
    if dim == 1:
        return torch.zeros(1, 1, dtype=means.dtype), means.mean(0)
    rows, columns = torch.triu_indices(dim, dim, offset=1)
    count = len(rows)
    basis = torch.zeros(count, dim, dim, dtype=means.dtype)
    basis[range(count), rows, columns], basis[range(count), columns, rows] = 1.0, -1.0
    scales = [float(s.diagonal().sum()) + 1e-300 for s in covs]
    share = torch.tensor([1.0 / s for s in scales], dtype=means.dtype)
    centre = (share @ means) / share.sum()
    design = []
    # rows of a least-squares problem in the coefficients of A: the commutators with the covariances, and the motion of the means
    for mean, cov, scale in zip(means, covs, scales, strict=True):
        design.append(((basis @ cov - cov @ basis) * (dim / scale)).reshape(count, -1))
        design.append(basis @ (mean - centre) / scale**0.5)
    _, _, right = torch.linalg.svd(torch.cat(design, 1).mT)
    skew = torch.einsum("k,kij->ij", right[-1], basis)
    return skew * (math.sqrt(2.0) / skew.norm()), centre


def _halves(x: Tensor, generator: torch.Generator) -> Tensor:
    order = torch.randperm(len(x), generator=generator)
    return energy_distance(x[order[: len(x) // 2]], x[order[len(x) // 2 :]])
