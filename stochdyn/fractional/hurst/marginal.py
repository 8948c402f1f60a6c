"""Marginal likelihoods on a grid of parameters: mean and scale are integrated in closed form."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from stochdyn.errors import InvalidInputError
from stochdyn.fractional.exact.prediction import prediction_errors
from stochdyn.fractional.hurst.data import Block
from stochdyn.fractional.hurst.laws import Law

__all__ = ["Fit", "fits_of", "marginal_of", "whittle_fit", "without_gaps"]

_ELEMENTS = 2e7  # numbers held at once by dense covariances


@dataclass
class Fit:
    r"""What the data of one block say at M parameters, for unit scale.

    With V the covariance and Z the columns of the mean, :math:`G=Z^\top V^{-1}Z`, :math:`\hat\beta=G^{-1}Z^\top V^{-1}y` and
    :math:`q=(y-Z\hat\beta)^\top V^{-1}(y-Z\hat\beta)`.

    Attributes:
        free: The degrees of freedom n - p.
        log_det: The sums log det V + log det G, ``(M,)``.
        quadratic: The quadratic forms q, ``(M,)``.
        coefficients: The least-squares coefficients ``(M, p)``.
        root: The factors ``(M, p, p)`` with root root' the inverse of G.
        errors: The whitened data and columns ``(M, 1 + p, n)``;.
        log_variance: The logarithms ``(M, n)`` of the one-step prediction variances. Empty where no prediction errors are kept.
    """

    free: int
    log_det: np.ndarray
    quadratic: np.ndarray
    coefficients: np.ndarray
    root: np.ndarray
    errors: np.ndarray
    log_variance: np.ndarray


def fits_of(
    blocks: list[Block], law: Law, hurst: np.ndarray, other: np.ndarray, differences: bool
) -> list[Fit]:
    """Evaluate blocks of one law at M parameters: by prediction errors on complete grids, by factorisation elsewhere."""
    complete = [b for b in blocks if b.complete]
    whitened = dict(zip(map(id, complete), _predicted(complete, law, hurst, other), strict=True))
    return [
        _fit(b, *(whitened[id(b)] if b.complete else _solved(b, law, hurst, other, differences)))
        for b in blocks
    ]


def _predicted(
    blocks: list[Block], law: Law, hurst: np.ndarray, other: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Whitened data and columns ``(M, 1 + p, n)`` and log variances ``(M, n)`` of each block.

    The best linear predictor depends on the law alone, so that of the longest serves all: shorter series are filled up with zeros,
    whose errors nobody reads.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    longest = max((len(b.values) for b in blocks), default=0)
    together = max(1, int(_ELEMENTS / max(1, len(hurst) * longest * 4)))
    for start in range(0, len(blocks), together):
        part = blocks[start : start + together]
        n = max(len(b.values) for b in part)
        rows = [np.concatenate([b.values[None], b.design.T]) for b in part]
        columns = np.concatenate([np.pad(r, ((0, 0), (0, n - r.shape[1]))) for r in rows])
        errors, log_variance = prediction_errors(columns, law.correlations(n, hurst, other))
        first = 0
        for row in rows:
            own = errors[:, first : first + len(row), : row.shape[1]]
            found.append((own, log_variance[:, : row.shape[1]]))
            first += len(row)
    return found


def _solved(
    block: Block, law: Law, hurst: np.ndarray, other: np.ndarray, differences: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The same of one block at times of any kind, in pieces that fit the memory."""
    columns = np.concatenate([block.values[None], block.design.T])
    size = max(1, int(_ELEMENTS / (columns.shape[1] + 1) ** 2))
    parts = [
        _factorised(columns, law.covariances(block.times, h, o, differences))
        for h, o in zip(_chunks(hurst, size), _chunks(other, size), strict=True)
    ]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])


def _fit(block: Block, whitened: np.ndarray, log_variance: np.ndarray) -> Fit:
    """Generalised least squares of one block: with V^(-1/2) y and V^(-1/2) Z, the coefficients, q and log det V + log det G."""
    y, z = whitened[:, 0], whitened[:, 1:]
    gram = z @ z.swapaxes(1, 2)
    moment = np.einsum("mpn,mn->mp", z, y)
    lower = np.linalg.cholesky(gram)
    root = np.linalg.inv(lower).swapaxes(1, 2)
    coefficients = np.einsum("mpq,mrq,mr->mp", root, root, moment)
    rest = y - np.einsum("mp,mpn->mn", coefficients, z)
    log_det = log_variance.sum(-1) + 2 * np.log(np.diagonal(lower, axis1=1, axis2=2)).sum(-1)
    free = whitened.shape[-1] - z.shape[1]
    return Fit(free, log_det, (rest**2).sum(-1), coefficients, root, whitened, log_variance)


def without_gaps(block: Block, fit: Fit) -> tuple[np.ndarray, np.ndarray]:
    """Return prediction errors ``(M, 1 + p, n)`` of what was observed from what was observed before, and their log variances.

    The errors of a filled grid are those given a free number u in each gap. A step over a gap makes u known up to the error of that
    step; each observed value after it tells more of u, by a recursive least-squares step.
    """
    missing = np.setdiff1d(np.arange(fit.errors.shape[-1]), block.place)
    which = {int(k): g for g, k in enumerate(missing)}
    own = fit.errors.shape[1] - len(missing)
    data, holes = fit.errors[:, :own], fit.errors[:, own:]
    mean = np.zeros((len(data), own, len(missing)))  # of the numbers in the gaps, for data and each column
    cov = np.zeros((len(data), len(missing), len(missing)))
    errors, log_variance = data.copy(), fit.log_variance.copy()
    known = 0
    for k in range(fit.errors.shape[-1]):
        if not known and k not in which:
            continue
        row = holes[:, :known, k]
        pull = np.einsum("mgh,mh->mg", cov[:, :known, :known], row)
        rest = data[:, :, k] - np.einsum("mcg,mg->mc", mean[:, :, :known], row)
        spread = 1 + np.einsum("mg,mg->m", row, pull)
        if k in which:
            size = holes[:, known, k]
            mean[:, :, known] = rest / size[:, None]
            cov[:, known, known] = spread / size**2
            cov[:, known, :known] = cov[:, :known, known] = -pull / size[:, None]
            known += 1
            continue
        gain = pull / spread[:, None]
        mean[:, :, :known] += rest[:, :, None] * gain[:, None, :]
        cov[:, :known, :known] -= gain[:, :, None] * pull[:, None, :]
        errors[:, :, k] = rest / np.sqrt(spread)[:, None]
        log_variance[:, k] += np.log(spread)
    return errors[:, :, block.place], log_variance[:, block.place]


def _chunks(x: np.ndarray, size: int) -> list[np.ndarray]:
    return [x[i : i + size] for i in range(0, len(x), size)]


def _factorised(columns: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    try:
        lower = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        jitter = 1e-10 * np.einsum("mnn->mn", covariance).mean(-1)[:, None, None]
        lower = np.linalg.cholesky(covariance + jitter * np.eye(covariance.shape[-1]))
    right = np.broadcast_to(columns.T, (len(lower), *columns.T.shape)).copy()
    solved = torch.linalg.solve_triangular(torch.from_numpy(lower), torch.from_numpy(right), upper=False)
    whitened = solved.numpy()
    return whitened.swapaxes(1, 2), 2 * np.log(np.diagonal(lower, axis1=1, axis2=2))


def marginal_of(fits: list[Fit], scale: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, int]:
    r"""Return log marginal likelihoods ``(M,)`` of blocks that share a scale, their summed q and degrees of freedom.

    Under :math:`p(\beta,s)\propto1/s` the integral over the mean and the scale is, up to a constant,
    :math:`-\frac12\sum(\log\det V+\log\det G)-\frac\nu2\log q`. A known ``scale (M,)`` is put in instead.
    """
    log_det = np.sum([f.log_det for f in fits], axis=0)
    quadratic = np.sum([f.quadratic for f in fits], axis=0)
    free = sum(f.free for f in fits)
    if scale is None:
        return -0.5 * log_det - 0.5 * free * np.log(quadratic), quadratic, free
    return -0.5 * log_det - free * np.log(scale) - 0.5 * quadratic / scale**2, quadratic, free


def whittle_fit(block: Block, law: Law, hurst: np.ndarray, other: np.ndarray | None = None) -> Fit:
    r"""Evaluate a long series by the debiased Whittle likelihood, :math:`O(n\log n)`.

    .. math:: \sum_{j\ne0}\left[\log\bar f(\omega_j)+I(\omega_j)/\bar f(\omega_j)\right],\qquad
        \bar f(\omega)=\sum_{|k|<n}(1-|k|/n)\,r(k)\,e^{-i\omega k},

    with the expectation of the periodogram in place of the spectral density.

    Reference:
        A. M. Sykulski, S. C. Olhede, A. P. Guillaumin, J. M. Lilly and J. J. Early, The debiased Whittle likelihood,
        Biometrika 106, 2019.
    """
    n, p = block.design.shape
    if p != 1:
        raise InvalidInputError(
            "regressors of a series of this length aren't supported", got=n, hint="subtract them beforehand"
        )
    intensity = np.abs(np.fft.rfft(block.values)) ** 2 / n
    log_det, quadratic, root = [], [], []
    other = np.zeros(len(hurst)) if other is None else other
    for h, o in zip(hurst, other, strict=True):
        r = law.correlations(n, np.array([h]), np.array([o]))[0]
        tapered = r * (1 - np.arange(n) / n)
        # folded onto n points: lags k and k - n fall on the same frequency
        folded = tapered.copy()
        folded[1:] += tapered[:0:-1]
        density = np.fft.rfft(folded).real
        twice = np.full(len(density), 2.0)
        twice[0] = 0.0
        if n % 2 == 0:
            twice[-1] = 1.0
        log_det.append(float((twice * np.log(density)).sum()))
        quadratic.append(float((twice * intensity / density).sum()))
        root.append(density[0] ** 0.5)  # n Var(mean of the series), nearly that of the best estimate
    empty = np.zeros((len(hurst), 0))
    log_det_all = np.array(log_det)
    return Fit(
        n - 1, log_det_all, np.array(quadratic), np.zeros((len(hurst), 1)),
        np.array(root)[:, None, None], np.zeros((len(hurst), 2, 0)), empty,
    )  # fmt: skip
