"""One-step prediction errors of stationary Gaussian series, by the Durbin-Levinson recursion."""

from __future__ import annotations

import numpy as np

__all__ = ["prediction_errors"]

_BATCH_UP_TO = 1200  # longer rows no longer fit the cache beside each other


def prediction_errors(columns: np.ndarray, autocovariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    r"""Whiten columns under many stationary laws at once, at :math:`O(n^2)` per law.

    With :math:`\phi` the coefficients of the best linear predictor of :math:`y_k` from all before it and :math:`v_k` its
    variance, the errors :math:`e_k=y_k-\sum_j\phi_jy_{k-j}` are independent under the law, so that
    :math:`\log\det R=\sum\log v_k` and :math:`a^\top R^{-1}b=\sum_ke_k(a)e_k(b)/v_k`.

    Args:
        columns: The data and the columns that its mean is made of, ``(c, n)``.
        autocovariance: The autocovariances ``(M, n)``, one row per law.

    Returns:
        ``(M, c, n)`` errors over their standard deviations, and ``(M, n)`` the logarithms of the variances.

    Reference:
        P. J. Brockwell and R. A. Davis, Time series: theory and methods, 2nd ed., Springer 1991, section 5.2.
    """
    if columns.shape[1] > _BATCH_UP_TO:
        rows = [_one(columns, r) for r in autocovariance]
        return np.stack([e for e, _ in rows]), np.stack([v for _, v in rows])
    return _many(columns, autocovariance)


def _many(columns: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    laws, n = r.shape
    errors = np.empty((laws, columns.shape[0], n))
    log_variance = np.empty((laws, n))
    variance = r[:, 0].copy()
    errors[:, :, 0], log_variance[:, 0] = columns[:, 0], np.log(variance)
    phi = np.zeros_like(r)
    backwards, lags = columns[:, ::-1].copy(), r[:, ::-1].copy()
    for k in range(1, n):
        known = phi[:, : k - 1]
        # r(k-1) ... r(1) beside phi_1 ... phi_(k-1)
        partial = (r[:, k] - np.einsum("mj,mj->m", known, lags[:, n - k : n - 1])) / variance
        phi[:, : k - 1] = known - partial[:, None] * known[:, ::-1]
        phi[:, k - 1] = partial
        variance = variance * (1 - partial**2)
        errors[:, :, k] = columns[:, k] - phi[:, :k] @ backwards[:, n - k :].T
        log_variance[:, k] = np.log(variance)
    return errors * np.exp(-0.5 * log_variance)[:, None, :], log_variance


def _one(columns: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n = r.shape[0]
    errors, log_variance = np.empty(columns.shape), np.empty(n)
    variance = float(r[0])
    errors[:, 0], log_variance[0] = columns[:, 0], np.log(variance)
    phi, spare = np.zeros(n), np.zeros(n)
    backwards, lags = np.ascontiguousarray(columns[:, ::-1]), r[::-1].copy()
    for k in range(1, n):
        known = phi[: k - 1]
        partial = (r[k] - known @ lags[n - k : n - 1]) / variance
        np.multiply(known[::-1], -partial, out=spare[: k - 1])
        known += spare[: k - 1]
        phi[k - 1] = partial
        variance *= 1 - partial**2
        errors[:, k] = columns[:, k] - backwards[:, n - k :] @ phi[:k]
        log_variance[k] = np.log(variance)
    return errors * np.exp(-0.5 * log_variance), log_variance
