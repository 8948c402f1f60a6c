"""Tangent frames by weighted local principal components, and the intrinsic dimension."""

from __future__ import annotations

import warnings

import numpy as np

from stochdyn.errors import ApproximationWarning

__all__ = ["estimate_dimension", "local_frames", "local_variances"]


def _weighted(
    points: np.ndarray, centres: np.ndarray, distances: np.ndarray, nodes: np.ndarray
) -> np.ndarray:
    """Neighbours of every centre, itself included, about their weighted mean, times the root of the weights."""
    # Weights 1 - (r / r_K)² make the covariance of the neighbours continuous as one of them leaves or comes.
    reach = distances[:, -1:] * (1.0 + 1e-6)
    weights = np.concatenate([np.ones((len(nodes), 1)), 1.0 - (distances / reach) ** 2], axis=1)
    around = np.concatenate([centres[:, None], points[nodes]], axis=1)
    mean = np.einsum("qk,qkd->qd", weights, around) / weights.sum(1, keepdims=True)
    return (around - mean[:, None]) * np.sqrt(weights)[..., None]


def local_frames(
    points: np.ndarray, centres: np.ndarray, distances: np.ndarray, nodes: np.ndarray, dim: int
) -> np.ndarray:
    r"""Return an orthonormal basis of the tangent space at every centre, ``(q, D, dim)``.

    The leading principal directions of the neighbours with weights :math:`1-(r/r_K)^2`, which fall to zero at
    the farthest one, so that frames change little when a neighbour comes or goes.

    Args:
        points: The points of the cloud, ``(n, D)``.
        centres: The places ``(q, D)`` where frames are wanted, points of the cloud or near it.
        distances: The distances ``(q, K)`` from every centre to the nearest other points.
        nodes: The numbers ``(q, K)`` of those points.
        dim: The dimension of the manifold.

    Reference:
        Singer and Wu, "Vector diffusion maps and the connection Laplacian", 2012, section 2.1.
    """
    spread = _weighted(points, centres, distances, nodes)
    # Leading eigenvectors of Σ w (x - x̄)(x - x̄)', or right singular vectors of the same where D exceeds K.
    if spread.shape[2] <= spread.shape[1]:
        covariance = np.einsum("qki,qkj->qij", spread, spread)
        return np.ascontiguousarray(np.linalg.eigh(covariance)[1][:, :, ::-1][:, :, :dim])
    return np.ascontiguousarray(np.linalg.svd(spread, full_matrices=False)[2][:, :dim].transpose(0, 2, 1))


def local_variances(points: np.ndarray, distances: np.ndarray, nodes: np.ndarray) -> np.ndarray:
    """Return the mean share of the local variance along each principal direction, largest first, ``(min(D, K),)``."""
    spread = _weighted(points, points, distances, nodes)
    share = np.linalg.svd(spread, compute_uv=False) ** 2
    return (share / share.sum(1, keepdims=True)).mean(0)


def estimate_dimension(points: np.ndarray, distances: np.ndarray, nodes: np.ndarray) -> int:
    r"""Estimate the dimension of the manifold from how distances grow, checked against local variances.

    The number of neighbours grows like :math:`r^m`, so :math:`m\approx\log(K/k)\,/\,\langle\log(r_K/r_k)\rangle`.

    Args:
        points: The points of the cloud, ``(n, D)``.
        distances: The distances ``(n, K)`` to the nearest other points, nearest first.
        nodes: The numbers ``(n, K)`` of those points.

    Returns:
        At least 1 and at most D.

    Warns:
        ApproximationWarning: If the growth lies between two whole numbers, or the local variances say otherwise.

    Reference:
        Farahmand, Szepesvári and Audibert, "Manifold-adaptive dimension estimation", 2007, equation 2.
    """
    ambient, last = points.shape[1], distances.shape[1]
    first = max(1, last // 3)
    # N(r) ~ r^m between the k-th and the K-th neighbour (Farahmand et al., equation 2).
    growth = np.log(last / first) / np.mean(np.log(distances[:, -1] / distances[:, first - 1]))
    dim = int(np.clip(round(growth), 1, ambient))
    share = local_variances(points, distances, nodes)
    explained = np.cumsum(share)
    by_variance = int(np.argmax(explained >= 0.9)) + 1
    if abs(growth - dim) > 0.35 or by_variance != dim:
        warnings.warn(
            f"The dimension of the points is uncertain: their neighbours grow in number like r^{growth:.2f}, "
            f"while the leading {by_variance} of {ambient} directions hold {explained[by_variance - 1]:.0%} of "
            f"the local variance. Taking dim={dim}; pass dim=... if you know better.",
            ApproximationWarning,
            stacklevel=3,
        )
    return dim
